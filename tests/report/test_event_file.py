import pytest

from utils.report import summaries
from utils.report.event_file import EventFile, event, records

resource = pytest.importorskip("resource")
loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")


def steps_in(path):
    events = loader.RawEventFileLoader(str(path)).Load()
    parsed = map(loader.event_pb2.Event.FromString, events)
    return [one.step for one in parsed if one.HasField("summary")]


def scalars_at(step):
    return [event(summaries.scalar("loss", 0.5), step=step)]


def test_what_is_written_is_there_to_read_at_once(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    for step in (1, 2):
        file.write(scalars_at(step))
        assert steps_in(file.path) == list(range(1, step + 1))
    file.close()


def test_files_begun_in_one_second_are_several_and_in_order(tmp_path):
    paths = [EventFile(tmp_path, first_step=1).path for _ in range(20)]
    assert sorted(set(paths)) == paths


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    file.path.unlink()
    with pytest.raises(FileNotFoundError, match=file.path.name):
        file.write(scalars_at(1))
    with pytest.raises(FileNotFoundError):
        EventFile(tmp_path / "gone", first_step=1)


def test_a_full_disk_is_an_error_and_what_was_there_stays_sound(tmp_path):
    file = EventFile(tmp_path, first_step=1)
    file.write(scalars_at(1))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 10, usual[1]))
    try:
        with pytest.raises(OSError, match=file.path.name):
            file.write(scalars_at(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert steps_in(file.path) == [1]


def test_half_a_record_ends_a_file_and_not_the_next(tmp_path):
    first = EventFile(tmp_path, first_step=1)
    first.write(scalars_at(1))
    first.close()
    with first.path.open("ab") as file:
        file.write(records(scalars_at(2))[:-5])
    second = EventFile(tmp_path, first_step=2)
    second.write(scalars_at(2))
    second.close()
    assert [steps_in(path) for path in sorted(tmp_path.iterdir())] == [[1], [2]]
