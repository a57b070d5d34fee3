import errno
import io
import json
import os
import re
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from utils.files import (
    cache_folder,
    from_here,
    nearest_name,
    new_run_folder,
    printable,
    read_arrays,
    read_yaml,
    remove_unfinished,
    write_arrays,
    write_atomic,
    write_text,
    write_yaml,
)
from utils.structures import UserError

# ---- atomic writes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_whole_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(b"old")
    seen = []
    write_atomic(path, lambda file: (file.write(b"new"), file.flush(), seen.append(path.read_bytes())))
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_program_left_is_removed_but_not_what_another_is_writing(tmp_path):
    for name in (".last.pt.0123abcd", ".best.pt.0123abcd", ".last.pt.0123abcg", ".env", "last.pt.0123abcd"):
        (tmp_path / name).touch()
    seen = []

    def look(file):
        remove_unfinished(tmp_path, "last.pt")
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    write_atomic(tmp_path / "last.pt", look)
    [half] = set(seen[0]) - {".best.pt.0123abcd", ".last.pt.0123abcg", ".env", "last.pt.0123abcd"}
    assert re.fullmatch(r"\.last\.pt\.[0-9a-f]{8}", half)
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {".last.pt.0123abcg", ".env", "last.pt.0123abcd", "last.pt"}


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    write_text(tmp_path / "ours", "text")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_threads_that_write_at_once_leave_the_permissions_of_the_process_alone(tmp_path):
    (tmp_path / "before").touch()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: write_text(tmp_path / f"{index}", "", lasting=False), range(1000)))
    (tmp_path / "after").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a", "Größe 汉\n")
    assert (tmp_path / "a").read_bytes() == "Größe 汉\n".encode()


# ---- YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--data file must be a YAML mapping of `key: value` lines, got an empty file: {path}"),
        ("- a\n- b\n", "--data file must be a YAML mapping of `key: value` lines, got list: {path}"),
        ("just words", "--data file must be a YAML mapping of `key: value` lines, got str: {path}"),
        ("a: 1\nb: [1, 2\n", "--data file is not valid YAML: {path}:3: expected ',' or ']', but got '<stream end>'"),
        (
            "a: 1\n\tb: 2\n",
            "--data file is not valid YAML: {path}:2: found character '\\t' that cannot start any token",
        ),
        ("a: \x01", "--data file is not valid YAML: {path}: special characters are not allowed"),
        ("made: 2024-13-45", "--data file is not valid YAML: {path}: month must be in 1..12"),
        ("a: " + "[" * 2000, "--data file is not valid YAML: {path}: maximum recursion depth exceeded"),
    ],
)
def test_a_bad_yaml_is_one_line_that_names_file_and_place(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path, what="--data file")
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(path, what="--data file")
    assert not (tmp_path / "made").exists()


def test_a_yaml_that_is_no_text_file(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"^--hyp file not found: .*missing\.yaml$"):
        read_yaml(tmp_path / "missing.yaml", what="--hyp file")
    with pytest.raises(UserError, match=r"^--hyp file is a folder, expected a YAML file"):
        read_yaml(tmp_path, what="--hyp file")
    with pytest.raises(UserError, match=r"^--hyp file cannot be read: .*bytes \(not text\)$"):
        read_yaml(tmp_path / "bytes", what="--hyp file")
    with pytest.raises(UserError, match=r"^--hyp file cannot be read: .*\(Not a directory\)$"):
        read_yaml(tmp_path / "bytes" / "below", what="--hyp file")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "my.yaml").write_text("\ufefftrain: a\n", encoding="utf-8")
    assert read_yaml(tmp_path / "my.yaml", what="it") == {"train": "a"}


text = st.text(st.characters(categories=("L", "N", "P", "S")) | st.just(" "), max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text


@settings(deadline=None, max_examples=25)
@given(content=st.dictionaries(text, plain | st.lists(plain, max_size=4), min_size=1, max_size=5))
def test_yaml_round_trip(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write_yaml(path, content, header="# of a test\n")
    assert path.read_text(encoding="utf-8").startswith("# of a test\n")
    assert read_yaml(path, what="it") == content


def test_written_yaml_keeps_the_order_of_keys(tmp_path):
    write_yaml(tmp_path / "a.yaml", {"z": 1, "a": [1, 2], "m": {"k": 1}})
    assert (tmp_path / "a.yaml").read_text().splitlines() == ["z: 1", "a: [1, 2]", "m: {k: 1}"]


def test_a_value_that_yaml_does_not_know_leaves_the_old_file(tmp_path):
    path = tmp_path / "opt.yaml"
    path.write_text("a: 1")
    with pytest.raises(yaml.YAMLError):
        write_yaml(path, {"a": np.float32(1)})
    assert path.read_text() == "a: 1"


def test_nearest_name():
    assert nearest_name("rbc", ["wbc", "RBC"]) == "; did you mean 'RBC'?"
    assert nearest_name("lr", ["momentum", "lr0", "box"]) == "; did you mean 'lr0'?"
    assert nearest_name("colour", ["momentum", "lr0", "box"]) == ""


# ---- arrays -------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from(["u1", "i4", "<i8", ">i2", "f4", "f8", "?", "U3"])
ARRAYS = DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0, max_side=4)))


@settings(deadline=None, max_examples=60)
@given(
    content=st.dictionaries(st.text(max_size=5), ARRAYS, max_size=4),
    meta=st.dictionaries(st.text(max_size=5), plain, max_size=3),
)
def test_arrays_round_trip(tmp_path_factory, content, meta):
    path = tmp_path_factory.getbasetemp() / "round_trip.arrays"
    write_arrays(path, content, meta)
    got, got_meta = read_arrays(path)
    assert got_meta == meta
    assert list(got) == list(content)
    for name, array in content.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()


def test_arrays_are_mapped_read_only_and_aligned(tmp_path):
    path = tmp_path / "labels.cache"
    write_arrays(path, {"odd": np.zeros(3, np.uint8), "boxes": np.arange(12.0).reshape(3, 4)[:, ::2]}, {})
    boxes = read_arrays(path)[0]["boxes"]
    assert boxes.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert boxes.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        boxes[0] = 1


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "labels.cache"
    write_arrays(path, {"boxes": np.arange(12.0), "none": np.empty((0, 4)), "classes": np.arange(3)}, {"key": "k"})
    return path


def test_a_truncated_array_file_is_a_value_error(packed):
    content = packed.read_bytes()
    meant = len(content) - 40  # up to here there is data, then padding
    for size in range(0, meant, 5):
        packed.write_bytes(content[:size])
        with pytest.raises(ValueError):  # numpy's or json's, whichever notices
            read_arrays(packed)


def test_a_damaged_array_file_is_a_value_error_or_reads(packed):
    content = packed.read_bytes()
    generator = np.random.default_rng(0)
    failures = 0
    for at, value in zip(generator.integers(0, len(content), 400), generator.integers(0, 256, 400)):
        packed.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        try:
            read_arrays(packed)
        except ValueError:
            failures += 1
    assert failures > 100


@pytest.mark.parametrize("header", [[], {}, {"arrays": []}, {"arrays": {"a": 1}}, {"arrays": {}}])
def test_a_foreign_header_is_a_value_error(packed, header):
    text = json.dumps(header).encode()
    packed.write_bytes(packed.read_bytes()[:10] + len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="damaged array file"):
        read_arrays(packed)


def test_another_file_is_no_array_file(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not an array file"):
        read_arrays(tmp_path / "x")


# ---- folders ------------------------------------------------------------------------------------------------------


def test_run_folders_count_up(tmp_path):
    made = [new_run_folder(tmp_path / "runs" / "train", "exp", exist_ok=False).name for _ in range(3)]
    assert made == ["exp", "exp2", "exp3"]


def test_the_first_free_name_is_taken(tmp_path):
    for name in ("exp", "exp3"):
        (tmp_path / name).mkdir()
    (tmp_path / "exp2").touch()  # a file is in the way of its name alone
    assert new_run_folder(tmp_path, "exp", exist_ok=False).name == "exp4"


def test_exist_ok_joins_the_folder(tmp_path):
    first = new_run_folder(tmp_path, "exp", exist_ok=True)
    (first / "results.csv").touch()
    assert new_run_folder(tmp_path, "exp", exist_ok=True) == first
    assert (first / "results.csv").exists()


def test_files_in_the_way_of_a_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--project .*: .*file is a file, expected a folder"):
        new_run_folder(tmp_path / "file" / "train", "exp", exist_ok=False)
    with pytest.raises(UserError, match=r"--name file: .*file is a file; remove it or choose another --name"):
        new_run_folder(tmp_path, "file", exist_ok=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_project_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot make .*: Permission denied"):
        new_run_folder(tmp_path, "exp", exist_ok=False)


def test_asking_for_the_cache_folder_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert tmp_path in cache_folder().parents
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().is_relative_to(tempfile.gettempdir())


def test_text_is_escaped_where_the_terminal_lacks_its_letters():
    western = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert printable("größe 猫", western) == "größe \\u732b"
    assert printable("größe 猫", io.StringIO()) == "größe 猫"


def test_paths_are_shown_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "runs/exp") == Path("runs/exp")
    assert from_here(tmp_path.parent) == tmp_path.parent


def test_a_full_disk_names_the_file(tmp_path):
    def full(file) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as failure:
        write_atomic(tmp_path / "best.pt", full)
    assert failure.value.filename == str(tmp_path / "best.pt")
    assert not list(tmp_path.iterdir())
