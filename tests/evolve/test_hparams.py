import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.evolve.studies import RANGES, add, new_study, searched
from utils.evolve.history import RESULT_NAMES
from utils.evolve.hparams import EVENTS_NAME, METRICS, HParamsLog

ROOT = Path(__file__).resolve().parent.parent.parent
GENES = {name: RANGES[name] for name in ("lr0", "mosaic", "anchors")}


def runs_of(folder):
    return [str(path.parent.relative_to(folder)) for path in folder.rglob(EVENTS_NAME)]


class Tab:
    """What the HParams tab would show of a folder, asked of TensorBoard's own backend."""

    def __init__(self, folder):
        from tensorboard import context
        from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.plugins import base_plugin
        from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        provider = MultiplexerDataProvider(multiplexer, str(folder))
        backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
        request = api_pb2.GetExperimentRequest()
        self.experiment = get_experiment.Handler(context.RequestContext(), backend, "", request).run()
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=1000,
            allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_UNKNOWN],
        )
        groups = list_session_groups.Handler(context.RequestContext(), backend, "", request).run().session_groups
        self.status_success = api_pb2.STATUS_SUCCESS
        self.sessions = {group.name: group for group in groups}
        self.multiplexer = multiplexer

    def hparams(self, name):
        return {key: value.number_value for key, value in self.sessions[name].hparams.items()}

    def metrics(self, name):
        return {one.name.tag: one.value for one in self.sessions[name].metric_values}

    def is_success(self, name):
        (session,) = self.sessions[name].sessions
        return session.status == self.status_success


def test_the_tab_shows_the_trials_that_gave_something(tmp_path):
    study = new_study()
    results = dict(zip(RESULT_NAMES, (0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07)))
    add(
        study,
        fitness=0.5,
        values={"lr0": 0.01, "mosaic": 0.25, "anchors": 3.0},
        reports={3: 0.2, 9: 0.5},
        results=results,
    )
    add(study, TrialState.PRUNED, values={"lr0": 0.02, "mosaic": 0.5, "anchors": None}, reports={3: 0.125}, results={})
    add(study, TrialState.FAIL, values={"lr0": 0.03}, failure="NaN")
    add(study, TrialState.FAIL, values={"lr0": 0.03})
    add(study, TrialState.RUNNING, values={"lr0": 0.03})
    HParamsLog(tmp_path, GENES).write(study)
    tab = Tab(tmp_path)
    assert sorted(tab.sessions) == ["tensorboard/trial_0000", "tensorboard/trial_0001"]
    assert tab.hparams("tensorboard/trial_0000") == {"lr0": 0.01, "mosaic": 0.25, "anchors": 3.0}
    assert tab.hparams("tensorboard/trial_0001") == {"lr0": 0.02, "mosaic": 0.5}
    assert tab.metrics("tensorboard/trial_0000") == pytest.approx({"fitness": 0.5, **results})
    assert tab.metrics("tensorboard/trial_0001") == {"fitness": 0.125}
    assert tab.is_success("tensorboard/trial_0000") and not tab.is_success("tensorboard/trial_0001")
    rungs = tab.multiplexer.Tensors("tensorboard/trial_0000", "fitness")
    assert [(one.step, one.tensor_proto.float_val[0]) for one in rungs] == [(3, pytest.approx(0.2)), (9, 0.5)]


def test_every_column_is_described_though_no_trial_is_done(tmp_path):
    HParamsLog(tmp_path, GENES).write(new_study())
    experiment = Tab(tmp_path).experiment
    genes = {info.name: info for info in experiment.hparam_infos}
    assert set(genes) == set(GENES)
    assert {info.name.tag for info in experiment.metric_infos} == set(METRICS)
    bounds = genes["lr0"].domain_interval
    assert (bounds.min_value, bounds.max_value) == (1e-5, 0.1)
    assert [one.number_value for one in genes["anchors"].domain_discrete.values] == [3.0, 5.0]


def test_every_trial_of_a_long_study_is_there_once(tmp_path):
    study = searched(60, list(GENES))
    for _ in range(2):
        HParamsLog(tmp_path, GENES).write(study)
    counted = [trial for trial in study.trials if trial.state != TrialState.FAIL]
    tab = Tab(tmp_path)
    assert sorted(tab.sessions) == [f"tensorboard/trial_{trial.number:04d}" for trial in counted]
    for trial in counted:
        name = f"tensorboard/trial_{trial.number:04d}"
        assert tab.hparams(name) == {key: value for key, value in trial.params.items() if value is not None}


def test_only_what_is_missing_is_written_whoever_wrote_the_rest(tmp_path):
    study = searched(6, list(GENES))
    mine, theirs = HParamsLog(tmp_path, GENES), HParamsLog(tmp_path, GENES)
    mine.write(study)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(EVENTS_NAME)}
    add(study, values={"lr0": 0.01})
    theirs.write(study)
    mine.write(study)
    new = {path for path in tmp_path.rglob(EVENTS_NAME) if path not in times}
    assert new == {tmp_path / "tensorboard" / "trial_0006" / EVENTS_NAME}
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_a_trial_that_was_running_is_added_when_it_is_done(tmp_path):
    study, log = new_study(), HParamsLog(tmp_path, GENES)
    trial = study.ask()
    log.write(study)
    assert runs_of(tmp_path) == ["tensorboard"]
    trial.suggest_float("lr0", 1e-5, 0.1)
    study.tell(trial, 0.5)
    log.write(study)
    assert sorted(Tab(tmp_path).sessions) == ["tensorboard/trial_0000"]


def test_what_a_kill_left_half_way_goes_and_misleads_nobody(tmp_path):
    study = searched(1, list(GENES))
    HParamsLog(tmp_path, GENES).write(study)
    path = tmp_path / "tensorboard" / "trial_0000" / EVENTS_NAME
    whole = Tab(tmp_path)
    half = path.with_name(f".{EVENTS_NAME}.01234567")
    half.write_bytes(path.read_bytes()[:-20])
    name = "tensorboard/trial_0000"
    assert Tab(tmp_path).metrics(name) == whole.metrics(name)
    path.unlink()
    HParamsLog(tmp_path, GENES).write(study)
    assert [one.name for one in path.parent.iterdir()] == [EVENTS_NAME]
    assert Tab(tmp_path).metrics(name) == whole.metrics(name)


def test_without_tensorboard_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams", None)
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams.metadata", None)
    notes = []
    log = HParamsLog(tmp_path, GENES, note=notes.append)
    for _ in range(2):
        log.write(searched(3, list(GENES)))
    assert notes == ["no TensorBoard HParams: `pip install tensorboard` to get them"] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(OSError, match="tensorboard"):
        HParamsLog(tmp_path, GENES).write(new_study())


def test_neither_torch_nor_tensorflow_is_needed_nor_much_time(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from tests.evolve.studies import RANGES, searched
from utils.evolve.hparams import HParamsLog
study = searched(300, list(RANGES))
log = HParamsLog(Path({str(tmp_path)!r}), RANGES)
log.write(searched(1, list(RANGES)))
start = time.perf_counter()
log.write(study)
print((time.perf_counter() - start) / 270, "torch" in sys.modules, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == ["False", "False"]
    assert float(seconds) < 0.01
