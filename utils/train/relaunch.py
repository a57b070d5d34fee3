"""The run that a launcher began, and goes on with when it starts its ranks again: the run's folder knows the launch.

torch tells ranks that they were started again after a failure, but not after hosts came or went.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from utils.config import TrainOptions
from utils.files import run_folders, write_text
from utils.ranks import Ranks
from utils.run_folder import RunFolder

_FILE = "launch.json"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a run was started by, and with which options: a name for a launch may be used again another day."""

    names: Collection[str] = ()  # of all hosts; where nobody gave one, each has its own, and hosts come and go
    again: bool = False  # whether ranks were started before, as far as torch tells
    options: dict[str, Any]

    @classmethod
    def of(cls, ranks: Ranks, given: TrainOptions) -> Launch:
        """Without a launcher it has no name."""
        place, options = ranks.place, json.loads(json.dumps(asdict(given)))
        if place is None:
            return cls(options=options)
        names = sorted({name for name in ranks.gather(place.launch) if name})
        return cls(names=names, again=place.restarts > 0, options=options)

    def begun(self) -> RunFolder | None:
        """The newest run that it has begun: one to go on with; a finished one only where ranks were started again."""
        if not self.names:
            return None
        found = [run for run in map(RunFolder, run_folders(*self._place)) if self._has_begun(run.path)]
        found = [run for run in found if self.again or not run.finished]
        newest = max(found, key=lambda run: (not run.finished, (run.path / _FILE).stat().st_mtime), default=None)
        if newest is not None:
            newest.saved = newest.last.exists() or newest.previous.exists()
        return newest

    @property
    def _place(self) -> tuple[Path, str]:
        return Path(self.options["project"]), self.options["name"]

    def _has_begun(self, folder: Path) -> bool:
        known = _read(folder)
        return known.get("options") == self.options and not set(self.names).isdisjoint(known.get("launches", ()))

    def note_in(self, run: RunFolder) -> None:
        """Let the folder of a run know of it."""
        if self.names:
            names = sorted({*self.names, *(_read(run.path).get("launches", ()) if self._has_begun(run.path) else ())})
            run.put(_FILE, partial(write_text, text=json.dumps({"launches": names, "options": self.options})))


def _read(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
