"""`python -m utils.data.scan` on real data, as a user starts it."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from utils.config import ScanOptions
from utils.data import scan
from utils.report import scan_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path):
    """Runs the command in an empty folder; its exit code and what it printed."""

    def run(*flags: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        (tmp_path / "here").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "utils.data.scan", *map(str, flags)],
            cwd=tmp_path / "here",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def copied(shared_datasets, tmp_path):
    """A copy of a data set that may be damaged."""

    def copy(name: str) -> Path:
        shutil.copytree(shared_datasets / name, tmp_path / name, copy_function=shutil.copyfile)
        for path in [tmp_path / name, *(tmp_path / name).rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        return tmp_path / name

    return copy


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_clean_data_set_passes_strict(command, copied, tmp_path):
    folder = copied("road_signs")
    done = command("--data", folder / "data.yaml", "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["split", "images", "without", "boxes", "boxes", "skipped", "findings"]
    assert ["val", "128", "0", "153", "0", "0"] in map(str.split, lines)
    assert ["green_light", "120", "47", "0"] in map(str.split, lines)
    assert lines[-1] == "All findings, and a picture: runs/scan/exp"
    report = tmp_path / "here/runs/scan/exp"
    assert sorted(path.name for path in report.iterdir()) == ["scan.csv", "scan.png"]
    assert rows_of(report / "scan.csv") == []
    assert cv2.imread(str(report / "scan.png")).std() > 1


def test_defects_are_on_screen_and_all_of_them_in_the_file(command, copied, tmp_path):
    folder = copied("chess")
    train = next(path for path in folder.rglob("*") if path.is_dir() and len(list(path.glob("*.jpg"))) == 58)
    first, second, third = sorted(train.glob("*.jpg"))[:3]
    first.write_bytes(first.read_bytes()[:9999])
    second.unlink()
    third.write_bytes(cv2.imencode(".png", cv2.imread(str(third)))[1].tobytes())
    before = sorted(folder.rglob("*"))
    flags = ("--data", folder / "chess.yaml", "--cache-dir", tmp_path / "caches", "--name", "mine", "--exist-ok")
    for _ in range(2):  # scanned, then from the cache
        done = command(*flags, "--strict", "--noplots")
        assert done.returncode == 2
        assert done.stderr == (
            "python -m utils.data.scan: error: --strict: findings: 3 in train; all of them are in "
            "runs/scan/mine/scan.csv\n"
        )
        assert f"{first}: truncated: image skipped\n" in done.stdout
        rows = rows_of(tmp_path / "here/runs/scan/mine/scan.csv")
        assert [(row["split"], row["file"], row["problem"], row["severity"]) for row in rows] == [
            ("train", str(first), "truncated: image skipped", "high"),
            ("train", str(second), "No such file or directory: image skipped", "high"),
            ("train", str(third), "is a PNG with the name .jpg", "low"),
        ]
    assert sorted(folder.rglob("*")) == before
    assert len(list((tmp_path / "caches").iterdir())) == 2
    assert command(*flags).returncode == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dta", "x"], "unknown flag '--dta'; did you mean '--data'?"),
        (["--data", "none.yaml"], "--data file not found: none.yaml"),
        (["--name", "a/b"], "--name 'a/b': should be one folder name"),
    ],
)
def test_a_mistake_is_one_line(flags, says, cli, tiny):
    code, _, problems = cli(scan, *flags)
    assert code == 2 and problems.count("\n") == 1
    assert says in problems
    assert not Path("runs").exists()


def test_a_data_set_without_labels_to_train_on_is_reported_and_refused(cli, tiny):
    for path in tiny.data.parent.rglob("labels/train/*.txt"):
        path.unlink()
    code, printed, problems = cli(scan, "--data", str(tiny.data), "--noplots")
    assert code == 2 and problems.count("\n") == 1
    assert "no usable label for 'train'; those of" in problems
    assert "without boxes" in printed and "runs/scan/exp" in printed


def test_without_flags_it_is_the_embedded_data_set():
    assert ScanOptions().data == "data/shapes.yaml"


def test_torch_is_not_waited_for(tiny):
    script = f"import sys; from utils.report import scan_command as c; c.report({{'data': {str(tiny.data)!r}}}); "
    script += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0


def test_a_test_split_is_optional(tiny):
    assert list(scan_command.report({"data": str(tiny.data), "noplots": True}).reports) == ["train", "val"]


def test_a_test_split_that_an_export_only_names_is_a_note(tiny, capsys):
    tiny.data.write_text(tiny.data.read_text() + "\ntest: ../test/images\n")
    assert list(scan_command.report({"data": str(tiny.data), "noplots": True}).reports) == ["train", "val"]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].endswith("test/images not found, so there is no report on it")
