"""CSV tables that grow by a row per epoch and survive being killed at any moment."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from utils.files import write_text

_LONGEST_CELL = 2**31 - 1  # csv's own limit is less than the paths of a large batch can take


class CsvTable:
    """A CSV file that grows by a row per epoch and survives being killed at any moment.

    Cells are right-aligned with spaces after the comma, text in quotes where it needs them; read it with
    `skipinitialspace`, or strip. Opening an existing file keeps its whole rows, moves them below today's columns if
    those are others, and drops a last row cut short.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, lasting: bool = False) -> None:
        """A row that is to be `lasting` is on disk before `append` returns, whatever becomes of the machine."""
        self.path, self.columns, self._lasting = path, columns, lasting
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != self._text(rows := self.rows()):
            self._replace(rows)

    def rows(self) -> list[dict[str, str]]:
        """The complete rows, cells as text without padding."""
        return read_rows(self.path)

    def append(self, row: Mapping[str, float | str]) -> None:
        """Add one row. A number is rounded to 6 significant digits; a missing value leaves its cell empty.

        An OSError on the way names the file, and what was written of the row is gone when the file is next opened.
        """
        unknown = set(row) - set(self.columns)
        assert not unknown, f"{self.path.name} has no column {sorted(unknown)}"
        cells = {name: _cell(value) for name, value in row.items()}
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                # one write, so that a kill cuts at most one row
                file.write(self._line(cells) if file.tell() else self._text([cells]))
                if self._lasting:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # a full disk has none
            raise

    def truncate(self, keep_epochs: int) -> None:
        """Drop the rows after the first `keep_epochs` epochs, which a resumed run is about to write again."""
        self.keep(lambda row: _is_within(row.get("epoch", ""), keep_epochs))

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        """Drop the other rows."""
        rows = self.rows()
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            self._replace(kept)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        write_text(self.path, self._text(rows))

    def _text(self, rows: list[dict[str, str]]) -> str:
        return "".join(map(self._line, [dict(zip(self.columns, self.columns)), *rows]))

    def _line(self, cells: Mapping[str, str]) -> str:
        return ", ".join(_quoted(cells.get(name, "")).rjust(max(len(name), 11)) for name in self.columns) + "\n"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of such a file, which stays as it is; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    csv.field_size_limit(_LONGEST_CELL)
    names, *rows = map(_cells, text[: text.rfind("\n") + 1].splitlines() or [""])
    return [dict(zip(names, row)) for row in rows if len(row) == len(names)]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, float | str]]) -> str:
    """A whole table as `CsvTable` has it, its columns as wide as their widest cell, but for the last.

    A number that is to keep all its digits is given as text.
    """
    lines = [list(columns), *([_quoted(_cell(row.get(name, ""))) for name in columns] for row in rows)]
    widths = [max(11, *map(len, cells)) for cells in list(zip(*lines))[:-1]]
    return "".join(", ".join([*map(str.rjust, cells, widths), cells[-1]]) + "\n" for cells in lines)


def _cells(line: str) -> list[str]:
    """Of one line by itself, so that a stray quote swallows no other."""
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True), [])]


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if "," in cell or '"' in cell else cell


def _cell(value: float | str) -> str:
    return on_one_line(value) if isinstance(value, str) else _six_digits(value)


def on_one_line(text: str) -> str:
    """With escapes for line breaks, and for bytes of a file name that are no text."""
    if text.isprintable():  # a table of thousands of rows is nearly all numbers
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _six_digits(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{float(value):.6g}"


def _is_within(cell: str, epochs: int) -> bool:
    try:
        return float(cell) <= epochs
    except ValueError:  # a row that names no epoch belongs to none
        return False
