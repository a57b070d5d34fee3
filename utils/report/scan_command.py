"""What `python -m utils.data.scan` does: a report on a data set, on screen and in a folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import ScanOptions, parse_flags, run_command, validated
from utils.data.findings import write_findings
from utils.data.scan import DatasetScan, open_dataset, refuse_findings, refuse_no_label, scan_dataset
from utils.files import new_run_folder
from utils.report.console import Console
from utils.report.plots import plot_scan
from utils.structures import DatasetSpec

_PROGRAM = "python -m utils.data.scan"
_CLASSES_SHOWN = 30  # more, and only the most and the fewest are named


def report(values: Mapping[str, Any]) -> DatasetScan:
    """Scan for options by name, show and save the report. Raises UserError for what a user can mend."""
    options = validated(ScanOptions, dict(values))
    console = Console(quiet=options.quiet)
    spec = open_dataset(options.data, note=console.note, bar=console.download_bar)
    splits = ["train", "val", *(["test"] if _has_test(spec, console) else [])]
    scan = scan_dataset(spec, splits, progress=console.bar, cache_dir=options.cache_dir)
    for line in scan.lines(most_classes=_CLASSES_SHOWN):
        console.line(line)
    folder = new_run_folder(Path(options.project), options.name, exist_ok=options.exist_ok)
    write_findings(folder / "scan.csv", scan.reports.values())
    if not options.noplots:
        plot_scan(scan.stores, spec.names, folder / "scan.png")
    console.line(f"All findings{'' if options.noplots else ', and a picture'}: {folder}")
    refuse_no_label(scan)
    if options.strict:
        refuse_findings(scan, listed=folder / "scan.csv")
    return scan


def _has_test(spec: DatasetSpec, console: Console) -> bool:
    """Whether there is a test split to look at; exports name one that they may lack, and no training needs it."""
    missing = [entry for entry in spec.test if not entry.exists()]
    if missing:
        console.note(f"{spec.source}: 'test': {missing[0]} not found, so there is no report on it")
    return bool(spec.test) and not missing


def main() -> int:
    return run_command(_PROGRAM, lambda: report(parse_flags(ScanOptions, sys.argv[1:], program=_PROGRAM)))
