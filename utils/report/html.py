"""report.html: a run on one page that opens anywhere, and several runs side by side.

`python -m utils.report.html RUN [RUN ...]`. All that a page shows comes from the files in the folders of the runs, and
all of it is in the page: it asks the network for nothing, and its policy forbids that it could.
"""

from __future__ import annotations

import os
import re
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from utils.config import FlagParser, run_command
from utils.files import from_here, write_text
from utils.report.charts import FRAME
from utils.report.comparison_page import comparison_content
from utils.report.page_parts import DASH, shown_seconds, text_of
from utils.report.run_files import read_run
from utils.report.run_page import report_content
from utils.structures import UserError

REPORT_FILE, COMPARISON_FILE = "report.html", "comparison.html"
_PROGRAM = "python -m utils.report.html"
_PAGES = Path(__file__).resolve().parent / "pages"
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML has no such characters


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run, from what lies there. Raises UserError where that is no run."""
    return _written(folder / REPORT_FILE, "report.html.j2", **report_content(read_run(folder)))


def compare(folders: Sequence[Path], path: Path) -> Path:
    """Write a page that shows runs side by side. Raises UserError where one of the folders is no run."""
    return _written(path, "comparison.html.j2", **comparison_content([read_run(folder) for folder in folders]))


def _written(path: Path, template: str, **content: Any) -> Path:
    page = _NO_TEXT.sub("\ufffd", _rendered(template, **content))
    try:
        write_text(path, page, lasting=False)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{text_of(path)}: cannot be written: {error.strerror}") from None
    return path


def _rendered(template: str, **content: Any) -> str:
    style, script = ((_PAGES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = {"default-src": "'none'", "img-src": "data:", "style-src": _hash(style), "script-src": _hash(script)}
    policy |= {"base-uri": "'none'", "form-action": "'none'"}
    page = _templates().get_template(template)
    return page.render(**content, style=style, script=script, policy="; ".join(map(" ".join, policy.items())))


@lru_cache(1)
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {}  # columns in their own order
    environment.filters |= {"flags": _with_flags, "path": _with_breaks}
    environment.globals.update(dash=DASH, frame=FRAME, shown_seconds=shown_seconds, text_of=text_of)
    return environment


def _with_flags(text: str) -> Any:
    """Text of ours as HTML, in which flags look as they are typed and stay on their line."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"--[a-z][a-z0-9-]*", r"<code>\g<0></code>", str(markupsafe.escape(text))))


def _with_breaks(text: str) -> Any:
    """Text as HTML that breaks after a slash, if it must."""
    import markupsafe

    return markupsafe.Markup(str(markupsafe.escape(text)).replace("/", "/<wbr>"))


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# ------------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class PageOptions:
    """Make report.html of a run anew, or comparison.html of several, from what is in their folders."""

    runs: tuple[Path, ...]
    output: Path | None = None


def main() -> int:
    return run_command(_PROGRAM, lambda: print(text_of(make_page(_parsed(sys.argv[1:])))))


def _parsed(argv: Sequence[str]) -> PageOptions:
    parser = FlagParser(prog=_PROGRAM, description=PageOptions.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/train/exp")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: RUN/{REPORT_FILE}, or {COMPARISON_FILE} beside the runs"
    )
    given = parser.parse_args(argv)
    return PageOptions(tuple(given.runs), given.output)


def make_page(options: PageOptions) -> Path:
    """The page that was written. Raises UserError for what a user can mend."""
    named = [path for path in options.runs if path.name != COMPARISON_FILE] or options.runs  # as of runs/train/*
    runs = list({folder.resolve(): folder for folder in named}.values())
    if len(runs) > 1:
        beside = Path(os.path.commonpath([folder.resolve().parent for folder in runs]))
        return compare(runs, options.output or from_here(beside / COMPARISON_FILE))
    run = read_run(runs[0])
    return _written(options.output or runs[0] / REPORT_FILE, "report.html.j2", **report_content(run))


if __name__ == "__main__":
    sys.exit(main())
