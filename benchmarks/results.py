"""What a run of the benchmarks leaves behind: the machine in words, tables for the reader, a JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workers import ROOT
from utils.machine import usable_cores

_IDLE_LOAD = 0.5
FOLDER = ROOT / "benchmarks" / "results"


def describe_machine() -> dict[str, Any]:
    """What a figure depends on besides its command."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # of others, before we begin
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def headline(machine: dict[str, Any], *, quick: bool) -> str:
    """What to know before reading on."""
    lines = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; torch {machine['torch']}; "
        f"commit {machine['commit']}"
    ]
    if quick:
        lines.append("Quick: toy sizes and hardly a repetition, so that no figure below means anything")
    elif machine["load"] is not None and machine["load"] > _IDLE_LOAD:
        lines.append(f"Something else was at work in the last minute (load {machine['load']}): figures may be too low")
    return "\n".join(lines)


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    listing = Path("/proc/meminfo")
    return round(int(listing.read_text().split()[1]) / 2**20, 1) if listing.is_file() else None


def _commit() -> str:
    """`abc1234`, and ` with changes` where files differ from it."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be: the first to the left, figures to the right."""
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, rows)])


def figure(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
