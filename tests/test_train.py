"""`python train.py` as a user meets it: what it says, what it leaves behind, and how it fails."""

import csv
import errno
import fcntl
import json
import locale
import logging
import multiprocessing
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import train
from utils.checkpoint import load_checkpoint
from utils.clock import PARTS
from utils.files import this_python
from utils.report.loggers import RESULT_COLUMNS, TIMING_COLUMNS
from utils.structures import Metrics, UserError
from utils.train.trainer import Trainer

RUN = Path("runs/train/exp")
ALWAYS = {"about.json", "report.html", "weights", "results.csv", "timing.csv", "hyp.yaml", "opt.yaml", "metrics.json"}
PICTURES = {
    *("labels.jpg", "labels_correlogram.jpg", "train_batch0.jpg", "train_batch1.jpg"),
    *(f"val_batch{index}_{kind}.jpg" for index in range(3) for kind in ("labels", "pred")),
    *("results.png", "worst_images.jpg"),
    *("confusion_matrix.png", "confusion_matrix_counts.png"),
    *("F1_curve.png", "P_curve.png", "R_curve.png", "PR_curve.png"),
}


# ---- a run as a process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, draw_tiny):
    """A whole run of 2 epochs with pictures, its output in files: (working directory, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("process")
    tiny = draw_tiny(folder / "set")
    command = [sys.executable, train.__file__, *tiny.flags(epochs=2, workers=1, noplots=None)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_nothing_on_standard_error(finished):
    assert finished[2] == ""


def test_output_without_a_terminal_is_tidy_lines(finished):
    _, output, _ = finished
    assert "\r" not in output and "\x1b" not in output and "warning" not in output.lower()
    epochs = [line for line in output.splitlines() if re.match(r" *\d/2 ", line)]
    assert [line.split()[0] for line in epochs] == ["1/2", "2/2"]
    header = next(line for line in output.splitlines() if line.startswith("epoch"))
    assert {len(line) for line in epochs} == {len(header)}
    table = [line.split() for line in output.splitlines()]
    assert ["train", "8", "0", "8", "0", "0"] in table and ["val", "4", "0", "4", "0", "0"] in table
    assert "runs/train/exp" in output


def test_all_files_are_there(finished):
    files = {path.name for path in (finished[0] / RUN).iterdir()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert files - events == ALWAYS | PICTURES
    assert len(events) == 1
    assert {path.name for path in (finished[0] / RUN / "weights").iterdir()} == {"last.pt", "best.pt"}


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_pictures_show_something(finished, name):
    picture = cv2.imread(str(finished[0] / RUN / name))
    assert picture is not None
    assert min(picture.shape[:2]) >= 64
    assert picture.std() > 5


def test_tables(finished):
    for name, columns in (("results.csv", RESULT_COLUMNS), ("timing.csv", TIMING_COLUMNS)):
        with (finished[0] / RUN / name).open() as file:
            header, *rows = csv.reader(file, skipinitialspace=True)
        assert tuple(header) == columns
        assert [row[0] for row in rows] == ["1", "2"]
        assert np.isfinite([[float(cell) for cell in row] for row in rows]).all()


def test_the_parts_of_an_epoch_fill_it(finished):
    with (finished[0] / RUN / "timing.csv").open() as file:
        rows = [
            {name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file, skipinitialspace=True)
        ]
    for row in rows:
        parts = [row[f"{part}_s"] for part in PARTS]
        assert sum(parts) <= row["epoch_s"] * 1.001  # six digits are written
        assert all(seconds > 0 for seconds in parts)
    assert all(row["save_s"] > 0 for row in rows)  # the checkpoint before the first epoch, and that after it
    assert "share" in finished[1] and "%" in finished[1]


def test_a_run_goes_on_below_a_table_of_other_columns(tiny):
    """timing.csv of an older version of this trainer."""
    train.run(**tiny.options(epochs=1))
    (RUN / "timing.csv").write_text("epoch, epoch_s, train_s\n    1,      12,      10\n")
    train.run(resume=str(RUN / "weights/last.pt"), epochs=2)
    with (RUN / "timing.csv").open() as file:
        header, *rows = csv.reader(file, skipinitialspace=True)
    assert tuple(header) == TIMING_COLUMNS
    assert [row[0] for row in rows] == ["1", "2"]
    assert (rows[0][2], rows[0][3], float(rows[1][5]) > 0) == ("12", "", True)


def test_tensorboard_events_carry_the_columns(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / RUN)).Reload()
    with (finished[0] / RUN / "results.csv").open() as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    for tag in set(RESULT_COLUMNS) - {"epoch"}:
        assert [one.step for one in events.Scalars(tag)] == [1, 2]
        assert [one.value for one in events.Scalars(tag)] == pytest.approx([float(row[tag]) for row in rows], rel=1e-5)


def test_settings_are_written_as_used(finished):
    folder, _, _ = finished
    options = yaml.safe_load((folder / RUN / "opt.yaml").read_text())
    assert (options["imgsz"], options["batch_size"], options["epochs"], options["seed"]) == (64, 4, 2, 0)
    assert Path(options["data"]).is_absolute()
    hyp = yaml.safe_load((folder / RUN / "hyp.yaml").read_text())
    assert (hyp["lr0"], hyp["mosaic"], hyp["fliplr"]) == (0.02, 0, 0.5)


def test_metrics_file(finished):
    metrics = json.loads((finished[0] / RUN / "metrics.json").read_text())
    assert (metrics["images"], metrics["labels"]) == (4, 4)
    assert [one["name"] for one in metrics["per_class"]] == ["blue", "red"]
    assert metrics["fitness"] == pytest.approx(0.1 * metrics["mAP_0.5"] + 0.9 * metrics["mAP_0.5:0.95"])


def test_a_run_of_its_own_hyp_file_is_the_same_run(finished, tiny, cli):
    """hyp.yaml is complete and reads back."""
    hyp = finished[0] / RUN / "hyp.yaml"
    code, _, problems = cli(train, *tiny.flags(hyp=hyp))
    assert (code, problems) == (0, "")
    assert (RUN / "hyp.yaml").read_bytes() == hyp.read_bytes()


def test_a_terminal_gets_bars(tiny, start):
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 30, 120, 0, 0))  # rows, columns
    process = start("train.py", *tiny.flags(epochs=2), stdout=ours, stderr=subprocess.PIPE)
    os.close(ours)
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how a pty says that its other end is closed
            break
        if not piece:
            break
        seen += piece
    assert process.wait() == 0
    assert process.stderr.read() == b""
    shown = seen.decode()
    assert re.search(r"Epoch 1/2 .*%.* images/s", shown) and "Evaluating" in shown
    lasting = [line.rsplit("\r", 1)[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    assert [line.split()[0] for line in lasting if re.match(r" *\d/2 ", line)] == ["1/2", "2/2"]


def test_help_is_quick_and_complete(start):
    process = start("train.py", "--help")
    output, problems = process.communicate(timeout=60)
    assert (process.returncode, problems) == (0, b"")
    for flag in (b"--batch-size", b"--batch", b"--img-size", b"--resume", b"--seed"):
        assert flag in output


# ---- from Python ----------------------------------------------------------------------------------------------------


def test_run_returns_metrics_and_changes_nothing_global(tiny, random_states):
    def world():
        return {
            "random": random_states(),
            "threads": (torch.get_num_threads(), cv2.getNumThreads()),
            "dtype": torch.get_default_dtype(),
            "grad": torch.is_grad_enabled(),
            "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
            "folder": Path.cwd(),
            "environment": dict(os.environ),
            "handlers": list(logging.getLogger().handlers),
            "filters": list(warnings.filters),
            "printing": str(np.get_printoptions()),
            "locale": locale.setlocale(locale.LC_ALL),
            "signals": signal.getsignal(signal.SIGINT),
            "pyplot": "matplotlib.pyplot" in sys.modules,
            "children": multiprocessing.active_children(),
        }

    import torch.utils.tensorboard  # whose own import may change what it likes

    before = world()
    metrics = train.run(**tiny.options(workers=1, noplots=False))
    assert isinstance(metrics, Metrics)
    assert metrics.images == 4
    assert world() == before


def test_spellings_of_python_and_shell_mean_the_same(tiny, cli):
    short = {"batch_size": None, "imgsz": None}
    train.run(**tiny.options(**short), batch=4, img=60)
    assert cli(train, *tiny.flags("--batch=4", "--img-size", "60", "--exist_ok", name="shell", **short))[0] == 0
    ours, shells = (yaml.safe_load((RUN.parent / name / "opt.yaml").read_text()) for name in ("exp", "shell"))
    assert shells | {"name": "exp", "exist_ok": False} == ours
    assert (RUN / "weights/best.pt").stat().st_size > 0


def test_mistakes_are_value_errors_from_python(tiny):
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        train.run(**tiny.options(), epoch=3)


def test_run_folders_count_up(tiny):
    for _ in range(2):
        train.run(**tiny.options())
    train.run(**tiny.options(exist_ok=True))
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["exp", "exp2"]
    assert len((RUN / "results.csv").read_text().splitlines()) == 2


# ---- mistakes -------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def coco_of_crowds(tiny) -> str:
    content = {
        "images": [{"id": 0, "file_name": "images/train/0.png"}],
        "categories": [{"id": 5, "name": yaml.safe_load(tiny.data.read_text())["names"][0]}],
        "annotations": [{"image_id": 0, "category_id": 5, "bbox": [1, 1, 20, 20], "iscrowd": 1}],
    }
    return write(tiny.folder / "crowds.json", json.dumps(content))


def data_with(tiny, **changes) -> str:
    content = yaml.safe_load(tiny.data.read_text()) | changes
    return write(tiny.folder / "changed.yaml", yaml.safe_dump({k: v for k, v in content.items() if v is not None}))


# what is wrong: the flags that say so, made from a Tiny; what the line must contain
MISTAKES = {
    "unknown flag": (lambda tiny: ["--epoch", "3"], ["--epoch", "did you mean '--epochs'"]),
    "unknown flag with a value": (lambda tiny: ["--bach-size=3"], ["--bach-size=3", "did you mean '--batch-size'"]),
    "stray word": (lambda tiny: ["hello"], ["unknown argument 'hello'"]),
    "no number": (lambda tiny: ["--epochs", "many"], ["--epochs", "many"]),
    "no epochs": (lambda tiny: ["--epochs", "0"], ["--epochs 0", "1 or more"]),
    "no batch": (lambda tiny: ["--batch", "0"], ["--batch-size 0"]),
    "choice": (lambda tiny: ["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
    "no value": (lambda tiny: ["--data"], ["--data"]),
    "missing data YAML": (lambda tiny: ["--data", "none.yaml"], ["--data file not found", "none.yaml"]),
    "folder for data": (lambda tiny: ["--data", str(tiny.folder)], ["is a folder", "/set"]),
    "binary data YAML": (lambda tiny: ["--data", str(tiny.image("train", 0))], ["0.png", "cannot be read"]),
    "broken data YAML": (
        lambda tiny: ["--data", write(tiny.folder / "x.yaml", "train: [a\nval: b")],
        ["not valid YAML", "x.yaml:2"],
    ),
    "list for data YAML": (lambda tiny: ["--data", write(tiny.folder / "x.yaml", "- a")], ["mapping", "x.yaml"]),
    "empty data YAML": (lambda tiny: ["--data", write(tiny.folder / "x.yaml", "")], ["an empty file", "x.yaml"]),
    "no train": (lambda tiny: ["--data", data_with(tiny, train=None)], ["'train' is missing"]),
    "no names": (lambda tiny: ["--data", data_with(tiny, names=None)], ["'names' is missing; it should be"]),
    "nc": (lambda tiny: ["--data", data_with(tiny, nc=3)], ["'nc: 3'", "2 names"]),
    "no such folder": (lambda tiny: ["--data", data_with(tiny, train="pics")], ["'train'", "/set/pics not found"]),
    "no image": (
        lambda tiny: ["--data", data_with(tiny, train="labels/train")],
        ["no image found for 'train'", "/set/labels/train", "a folder of images"],
    ),
    "no label": (
        lambda tiny: [str(path.unlink() or "--noplots") for path in (tiny.folder / "labels/train").iterdir()],
        ["no usable label for 'train'", "images/train/0.png", "labels/train/0.txt"],
    ),
    "crowds alone": (
        lambda tiny: ["--data", data_with(tiny, train=coco_of_crowds(tiny))],
        ["no usable label for 'train'", "all of its boxes are crowd regions"],
    ),
    "class beyond names": (
        lambda tiny: [write(tiny.label("train", 3), "0 .5 .5 .2 .2\n2 .5 .5 .2 .2\n") and "--noplots"],
        ["labels/train/3.txt:2", "class 2 does not exist", "0 to 1"],
    ),
    "missing hyp": (lambda tiny: ["--hyp", "none.yaml"], ["--hyp file not found", "none.yaml"]),
    "hyp key": (
        lambda tiny: ["--hyp", write(tiny.folder / "h.yaml", "lr_0: 0.1")],
        ["h.yaml", "'lr_0: 0.1'", "did you mean 'lr0'"],
    ),
    "hyp value": (
        lambda tiny: ["--hyp", write(tiny.folder / "h.yaml", "momentum: high")],
        ["'momentum: high'", "from 0 to 1"],
    ),
    "missing network": (lambda tiny: ["--cfg", "none.yaml"], ["network YAML not found", "none.yaml"]),
    "broken network": (
        lambda tiny: ["--cfg", write(tiny.folder / "n.yaml", tiny.cfg.read_text().replace("SPPF", "SPPFF"))],
        ["unknown module 'SPPFF'", "did you mean SPPF", "layer 5"],
    ),
    "missing weights": (lambda tiny: ["--weights", "none.pt"], ["checkpoint not found", "none.pt"]),
    "weights are no checkpoint": (
        lambda tiny: ["--weights", str(tiny.data)],
        ["checkpoint cannot be read", "data.yaml"],
    ),
    "device": (lambda tiny: ["--device", "7"], ["--device 7", "there is", "cpu"]),
    "fp16 on the CPU": (lambda tiny: ["--amp", "fp16"], ["--amp fp16", "bf16"]),
    "file as project": (lambda tiny: ["--project", str(tiny.data)], ["--project", "is a file"]),
    "file as run": (
        lambda tiny: ["--exist-ok", "--project", str(tiny.folder), "--name", "data.yaml"],
        ["--name data.yaml", "is a file"],
    ),
    "name with a folder": (lambda tiny: ["--name", "a/b"], ["--name 'a/b'"]),
    "resume of nothing": (lambda tiny: ["--resume", "none.pt"], ["--resume"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_no_run_folder(tiny, cli, mistake):
    make_flags, expected = MISTAKES[mistake]
    flags = make_flags(tiny)
    code, output, problems = cli(train, *tiny.flags(*flags))
    assert code == 2
    assert problems.startswith("train.py: error: ") and problems.count("\n") == 1
    assert all(part in problems for part in expected), problems
    assert "Traceback" not in output + problems
    assert not Path("runs").exists()


def test_a_mistake_as_a_process(tiny, start):
    process = start("train.py", "--epoch", "3")
    output, problems = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, b"")
    assert problems == b"train.py: error: unknown flag '--epoch'; did you mean '--epochs'?\n"


def test_notes_on_what_was_adjusted(tiny, cli):
    code, output, problems = cli(train, *tiny.flags(imgsz=50, batch_size=100))
    assert (code, problems) == (0, "")
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "--imgsz 50" in notes[0] and "using 64" in notes[0]
    assert "--batch-size 100" in notes[1] and "using 8" in notes[1]


def test_unreadable_images_are_named_and_left_out(tiny, cli):
    whole = tiny.image("train", 1).read_bytes()
    tiny.image("train", 1).write_bytes(whole[: len(whole) // 2])
    tiny.image("train", 2).write_bytes(b"this is no picture")
    tiny.image("val", 0).write_bytes(b"")
    code, output, problems = cli(train, *tiny.flags())
    assert (code, problems) == (0, "")
    table = [line.split() for line in output.splitlines()]
    assert ["train", "6", "0", "6", "2", "2"] in table  # images, without boxes, boxes, skipped, findings
    assert ["val", "3", "0", "3", "1", "1"] in table
    for index in (1, 2):
        assert re.search(rf"images/train/{index}\.png: .*skipped", output)
    with (RUN / "scan.csv").open() as file:
        findings = list(csv.DictReader(file))
    assert [Path(one["file"]).name for one in findings] == ["1.png", "2.png", "0.png"]


def test_a_reader_that_has_seen_enough_ends_the_run_quietly(tiny, start):
    process = start("train.py", *tiny.flags(epochs=1000))
    while b" 2/1000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    assert load_checkpoint(RUN / "weights/last.pt")["epoch"] == len(rows_of_results())  # no epoch that was told is lost


def rows_of_results() -> list[str]:
    return (RUN / "results.csv").read_text().splitlines()[1:]


def test_strict_stops_at_a_finding_before_there_is_a_run_folder(tiny, cli):
    caches = tiny.folder.parent / "caches"
    assert cli(train, *tiny.flags("--strict", "--cache-dir", str(caches)))[0] == 0
    assert not (RUN / "scan.csv").exists()
    assert len(list(caches.iterdir())) == 2 and not list(tiny.folder.glob(".*"))
    tiny.image("val", 1).write_bytes(b"")
    for _ in range(2):  # scanned, then from the cache
        code, output, problems = cli(train, *tiny.flags("--strict", name="second"))
        assert (code, problems.count("\n")) == (2, 1)
        assert problems.startswith("train.py: error: --strict: findings: 1 in val; ")
        assert f"-m utils.data.scan --data {tiny.data}` lists them" in problems
        assert "images/val/1.png: empty file: image skipped" in output
    assert not RUN.with_name("second").exists()


def test_labels_without_val_boxes_train_with_a_warning(tiny, cli):
    for index in range(4):
        tiny.label("val", index).unlink()
    code, output, problems = cli(train, *tiny.flags(epochs=3, patience=1))
    assert (code, problems) == (0, "")
    assert "warning: no usable label for 'val'" in output
    assert "best.pt is of epoch 3" in output


# ---- accidents ------------------------------------------------------------------------------------------------------


def test_images_that_vanish_after_the_scan(tiny, cli):
    """The second run trusts the cache only if the files are as they were."""
    assert cli(train, *tiny.flags())[0] == 0
    tiny.image("train", 5).unlink()
    code, output, _ = cli(train, *tiny.flags())
    assert code == 0
    assert ["train", "7", "0", "7", "0", "1"] in [line.split() for line in output.splitlines()]
    assert "labels/train/5.txt: label file without an image" in output


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_in_mid_run(tiny, cli, monkeypatch, workers):
    honest = Trainer.train_epoch

    def vanishing(self):
        if self.state.epoch == 1:
            for split, count in (("train", 8), ("val", 4)):
                for index in range(count):
                    tiny.image(split, index).unlink()
        return honest(self)

    monkeypatch.setattr(Trainer, "train_epoch", vanishing)
    code, _, problems = cli(train, *tiny.flags(epochs=20, workers=workers))
    assert code == 1
    assert problems.startswith("train.py: error: ") and problems.count("\n") == 1
    assert re.search(r"images/\w+/\d\.png: No such file", problems)
    assert load_checkpoint(RUN / "weights/last.pt")["epoch"] >= 1


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


ACCIDENTS = {
    "GPU memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        ["--batch-size (now 4)", "--imgsz (now 64)"],
    ),
    "CPU memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--batch-size (now 4)"]),
    "Python's memory": (MemoryError(), ["--batch-size (now 4)"]),
    "dead loader": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal"),
        ["loader process died", "--workers"],
    ),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "x/last.pt"), ["No space left on device: x/last.pt"]),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_in_mid_run_is_one_line(tiny, cli, monkeypatch, accident):
    error, expected = ACCIDENTS[accident]
    monkeypatch.setattr("models.yolo.DetectionModel.forward", fail_with(error))
    code, _, problems = cli(train, *tiny.flags())
    assert code == 1
    assert problems.startswith("train.py: error: ") and problems.count("\n") == 1
    assert all(part in problems for part in expected), problems


def test_our_own_bugs_keep_their_traceback(tiny, monkeypatch):
    monkeypatch.setattr("models.yolo.DetectionModel.forward", fail_with(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.run(**tiny.options())


def test_a_full_disk_keeps_the_checkpoint_before(tiny, cli, monkeypatch):
    import utils.checkpoint as checkpoint

    honest, written = checkpoint.write_atomic, []

    def half(file):
        file.write(b"half a")
        raise OSError(errno.ENOSPC, "No space left on device")

    def filling_up(path, write, **choices):
        full = len(written) == 4  # last.pt at the start, best.pt and last.pt of the first epoch, and one of the second
        honest(path, half if full else write, **choices)
        written.append(path.name)

    monkeypatch.setattr(checkpoint, "write_atomic", filling_up)
    code, _, problems = cli(train, *tiny.flags(epochs=5))
    assert code == 1
    assert re.fullmatch(r"train\.py: error: No space left on device: \S+\.pt\n", problems)
    monkeypatch.undo()
    saved = written.count("last.pt") - 1
    assert load_checkpoint(tiny.folder.parent / "work" / RUN / "weights/last.pt")["epoch"] == saved
    assert not list((tiny.folder.parent / "work" / RUN / "weights").glob(".*"))


def test_numbers_that_are_none_end_a_run_after_a_second_attempt(tiny, cli):
    hyp = write(tiny.folder / "wild.yaml", tiny.hyp.read_text().replace("lr0: 0.02", "lr0: 1.0e+30"))
    code, output, problems = cli(train, *tiny.flags(hyp=hyp, epochs=50, amp="bf16"))
    assert code == 1
    assert problems == (
        "train.py: error: 20 updates in a row, or more, gave no finite numbers, at half the learning rate as well: "
        f"{RUN / 'nonfinite.csv'} names batches and images; look at these, lower lr0 (now 1e+30), or use --amp off\n"
    )
    assert len([line for line in output.splitlines() if line.startswith("warning: 20 updates in a row")]) == 1
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(RUN / "weights/last.pt")["ema"].values())


# ---- loader processes


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="Linux lists them there")
def test_a_loader_process_that_is_killed_ends_the_run(tiny, start):
    """As by the system when memory runs out: one line, exit code 1, and nothing stays behind."""
    data = tiny.data.rename(tiny.data.with_name("killed.yaml"))  # no other test has files of this name in memory
    process = start("train.py", *tiny.flags(data=data, epochs=5000, workers=2, cache="ram"))
    while b" 2/5000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    inside = f"yolo-trainer-{os.getuid()}.{data.stem}-*"
    assert list(Path("/dev/shm").glob(inside))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(
        rf"train.py: error: loader process 1 \(pid {children[0]}\) was killed \(signal 9\)( while it made batch \d+ of "
        r"epoch \d+)?: out of memory\? lower --workers, --batch-size or --imgsz\n",
        problems.decode(),
    )
    assert group_is_empty(process.pid)
    assert not list(Path("/dev/shm").glob(inside))


def test_a_run_under_way_is_not_resumed_by_another_process(tiny, start, cli, monkeypatch):
    """As by a bare --resume, which takes the newest; nothing of the run is touched."""
    process = start("train.py", *tiny.flags(epochs=5000))
    while b" 2/5000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # for it is not obeyed at once
    monkeypatch.setattr("utils.run_folder._PATIENCE_S", 0.2)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for flags in (["--resume"], tiny.flags("--exist-ok")):
        code, _, problems = cli(train, *flags)
        assert code == 2
        assert problems == (
            f"train.py: error: {RUN}: another process is training in this folder; wait for it, or stop it\n"
        )
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    process.kill()
    process.wait()
    epoch = load_checkpoint(RUN / "weights/last.pt")["epoch"]
    assert cli(train, "--resume", "--epochs", str(epoch + 1))[0] == 0


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="Linux lists them there")
def test_loader_processes_go_with_a_main_process_that_is_killed(tiny, start):
    process = start("train.py", *tiny.flags(epochs=5000, workers=2))
    while b" 2/5000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    assert comes_true(lambda: not any(map(lives, children)))


def lives(pid: str) -> bool:
    """Not so a process that nobody has asked for its end yet."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def comes_true(condition) -> bool:
    """Before long, though the machine may be a busy one."""
    deadline = time.monotonic() + 30
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


# What a run says, too, that has not stopped a second after it was asked to, as on a busy machine
WAITS = "\nstopping as soon as this step is done; a second Ctrl-C does not wait for it\n"


def test_ctrl_c_with_loader_processes(tiny, start, cli):
    process = start("train.py", *tiny.flags(epochs=5000, workers=2))
    while b" 2/5000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, problems = process.communicate(timeout=100)
    assert process.returncode == 130
    last = str(RUN / "weights/last.pt")
    assert (
        problems.decode().replace(WAITS, "").strip()
        == f"train.py: interrupted; continue with: {this_python()} {train.__file__} --resume {last}"
    )
    assert group_is_empty(process.pid)
    epoch = load_checkpoint(Path(last))["epoch"]
    code, output, problems = cli(train, "--resume", last, "--epochs", str(epoch + 1), "--workers", "0")
    assert (code, problems) == (0, "")
    assert f"Resuming {last} after epoch {epoch} of {epoch + 1}" in output
    assert len((RUN / "results.csv").read_text().splitlines()) == 1 + epoch + 1


def test_further_ctrl_cs_change_nothing_once_all_is_said(tiny, start):
    """While Python and its libraries shut down."""
    process = start("train.py", *tiny.flags(epochs=5000))
    while b" 2/5000 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    while b"continue with" not in (line := process.stderr.readline()):
        assert line.decode() in ("\n", WAITS[1:])
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    assert (process.returncode, process.stderr.read()) == (130, b"")


def group_is_empty(group: int) -> bool:
    def empty() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    return comes_true(empty)


def test_ctrl_c_before_the_first_epoch_is_over(tiny, cli, monkeypatch):
    """A new run in the folder of another has a checkpoint of its own from the start."""
    assert cli(train, *tiny.flags())[0] == 0
    monkeypatch.setattr(Trainer, "evaluate", fail_with(KeyboardInterrupt()))
    code, _, problems = cli(train, *tiny.flags(exist_ok=True))
    assert code == 130
    assert "continue with: " in problems
    assert load_checkpoint(RUN / "weights/last.pt")["epoch"] == 0


def test_ctrl_c_before_training(tiny, cli, monkeypatch):
    monkeypatch.setattr("utils.train.build.scan_dataset", fail_with(KeyboardInterrupt()))
    code, _, problems = cli(train, *tiny.flags())
    assert (code, problems.strip()) == (130, "train.py: interrupted")
    assert not Path("runs").exists()


def test_ctrl_c_names_a_path_that_the_shell_takes(tiny, cli, monkeypatch):
    honest = Trainer.train_epoch

    def interrupted(self):
        if self.state.epoch == 1:
            raise KeyboardInterrupt
        return honest(self)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    _, _, problems = cli(train, *tiny.flags(name="my run", epochs=2))
    assert problems.strip().endswith("--resume 'runs/train/my run/weights/last.pt'")


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
