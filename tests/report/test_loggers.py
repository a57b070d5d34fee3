import numpy as np
import pytest

from tests.report.logged import METRICS, logged_epoch, logged_run
from utils.report.logger import Guarded, LoggedEpoch, Logger
from utils.report.loggers import LOGGERS, loggers_of


def log_run(folder, epochs, start_epoch=0):
    loggers = loggers_of(logged_run(folder, start_epoch=start_epoch), warn=pytest.fail)
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
    logger = Guarded("Fragile", Failing, warnings.append)
    for epoch in range(3):
        logger.epoch(logged_epoch(epoch))
    logger.close()
    assert warnings == ["no more of Fragile in this run, which goes on: no space"]


def test_a_logger_that_cannot_be_made_is_one_warning():
    def make():
        raise ImportError("no such thing")

    warnings = []
    logger = Guarded("Fragile", make, warnings.append)
    logger.epoch(logged_epoch(0))
    logger.images({}, 0)
    assert warnings == ["no more of Fragile in this run, which goes on: no such thing"]


@pytest.mark.parametrize("kind", LOGGERS.values())
def test_every_logger_keeps_the_contract_that_the_null_logger_states(kind):
    assert issubclass(kind, Logger)
    Logger().epoch(LoggedEpoch(number=1, results={}, timing={}))
    Logger().images({"tag": np.zeros((1, 1, 3), np.uint8)}, 0)
    Logger().close()
