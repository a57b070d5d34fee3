import shutil

import numpy as np
import pytest

from tests.report.logged import METRICS, logged_epoch, logged_run
from utils.report.logger import Guard, Guarded, Logger
from utils.report.loggers import LOGGERS, loggers_of


def log_run(folder, epochs, start_epoch=0):
    guards = {name: Guard(name, pytest.fail) for name in LOGGERS}
    loggers = loggers_of(logged_run(folder, start_epoch=start_epoch), guards)
    for epoch in range(start_epoch, epochs):
        for logger in loggers:
            logger.epoch(logged_epoch(epoch, METRICS))
    for logger in loggers:
        logger.close()


def test_a_resumed_run_leaves_the_csv_files_of_an_uninterrupted_one(tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    log_run(tmp_path / "straight", 4)
    log_run(tmp_path / "resumed", 3)
    log_run(tmp_path / "resumed", 4, start_epoch=2)
    for name in ("results.csv", "timing.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


class Failing(Logger):
    def epoch(self, epoch):
        raise OSError("no space\nleft")


def test_a_logger_that_fails_is_one_warning_and_never_heard_of_again():
    warnings = []
    guard = Guard("Fragile", warnings.append)
    logger = Guarded(Failing, guard)
    for epoch in range(3):
        logger.epoch(logged_epoch(epoch))
    logger.close()
    Guarded(Failing, guard).epoch(logged_epoch(1))  # as when the run goes back
    assert warnings == ["no more Fragile in this run, which goes on: no space"]


def test_a_logger_that_cannot_be_made_is_one_warning():
    def make():
        raise ImportError("no such thing")

    warnings = []
    logger = Guarded(make, Guard("Fragile", warnings.append))
    logger.epoch(logged_epoch(0))
    logger.images({}, 0)
    assert warnings == ["no more Fragile in this run, which goes on: no such thing"]


@pytest.mark.parametrize("kind", LOGGERS.values())
def test_every_logger_takes_all_that_a_run_may_tell(kind, tmp_path):
    """Epochs with and without an evaluation, pictures, an end that is none, and one that is."""
    picture = {"tag": np.zeros((4, 6, 3), np.uint8)}
    for start_epoch, result in ((0, None), (1, METRICS)):
        logger = kind(logged_run(tmp_path, start_epoch=start_epoch))
        logger.images(picture, start_epoch)
        logger.epoch(logged_epoch(start_epoch))
        logger.epoch(logged_epoch(start_epoch + 1, METRICS))
        logger.close(result)


def test_loggers_are_told_and_those_that_nobody_counts_on_are_guarded(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGERS, "Fragile", lambda run: Failing())
    LOGGERS["Fragile"].essential = False
    warnings = []
    loggers = loggers_of(logged_run(tmp_path), {name: Guard(name, warnings.append) for name in LOGGERS})
    shutil.rmtree(tmp_path)
    for logger in loggers[1:]:
        logger.epoch(logged_epoch(0))
    assert {line.split(" in this run")[0] for line in warnings} >= {"no more timing.csv", "no more Fragile"}
    with pytest.raises(OSError):  # checkpoints count on it
        loggers[0].epoch(logged_epoch(0))
