import hashlib
import io
import json
import re
import stat
import tarfile
import threading
import zipfile
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import yaml

from utils.config import read_dataset
from utils.data import download as module
from utils.data.download import ensure_downloaded, fetch
from utils.structures import Download, UserError

CONTENT = bytes(range(256)) * 4000  # 1 MB


class Server:
    """A web server of this process: files by path, and what it does wrong."""

    def __init__(self) -> None:
        self.files = {"/data.bin": CONTENT}
        self.ranges = True
        self.tag: str | None = '"v1"'
        self.cut: list[int] = []  # bytes after which each of the next answers breaks off
        self.statuses: list[int] = []  # of the next answers
        self.length = True  # whether it says how much will come
        self.log: list[tuple[str, str | None]] = []  # path and Range of each request
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that had enough
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.log.append((handler.path, wanted))
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
            return
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        start = 0
        if wanted and self.ranges and handler.headers.get("If-Range") == self.tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.length:
            handler.send_header("Content-Length", str(len(data) - start))
        if self.tag:
            handler.send_header("ETag", self.tag)
        handler.end_headers()
        handler.wfile.write(data[start:][: self.cut.pop(0)] if self.cut else data[start:])


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Fetches a path of the server into `tmp_path/set`; returns the notes."""

    def call(path: str = "/data.bin", **fields) -> list[str]:
        notes = []
        fetch(Download(url=server.url + path, to=tmp_path / "set", **fields), note=notes.append, pause_s=0.001)
        return notes

    return call


def left(tmp_path) -> list[str]:
    return sorted(
        path.relative_to(tmp_path / "set").as_posix() for path in (tmp_path / "set").rglob("*") if path.is_file()
    )


# ---- transfer


def test_a_file_is_fetched_once_with_a_note(get, server, tmp_path):
    assert get() == [f"downloading {server.url}/data.bin (1.0 MB)"]
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT
    assert left(tmp_path) == ["data.bin"]
    assert get() == []
    assert len(server.log) == 1


@pytest.mark.skipif(module.fcntl is None, reason="no locks on folders")
def test_of_two_that_want_the_same_one_waits_and_finds_it_done(server, tmp_path):
    server.files["/set.zip"] = zipped({"images/a.txt": b"a"})
    wanted = Download(url=f"{server.url}/set.zip", to=tmp_path / "set")
    (tmp_path / "set").mkdir()
    notes, waits = [], threading.Event()

    def second():
        fetch(wanted, note=lambda line: notes.append(line) or waits.set())

    thread = threading.Thread(target=second)
    with module._alone_in(wanted.to, print):  # as another process has it
        thread.start()
        assert waits.wait(10)
        module._fetch(wanted, print, lambda total, description: nullcontext(), 0)
    thread.join(10)
    assert notes == [f"waiting for another process that downloads into {tmp_path / 'set'}"]
    assert len(server.log) == 1
    assert (tmp_path / "set/images/a.txt").read_bytes() == b"a"


def test_a_bar_counts_megabytes(server, tmp_path):
    server.files["/big"] = b"x" * 3_500_000
    shown = []

    @contextmanager
    def bar(total, description):
        shown.append((total, description))
        yield SimpleNamespace(update=shown.append)

    fetch(Download(url=f"{server.url}/big", to=tmp_path), note=print, bar=bar)
    assert shown[0] == (3, "Downloading big")
    assert sum(shown[1:]) == 3


def test_a_connection_that_breaks_is_taken_up_where_it_broke(get, server, tmp_path):
    server.cut = [300_000, 0, 200_000]
    assert get(size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())[-1].endswith("of which 0.5 MB are there")
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.log] == [None, "bytes=300000-", "bytes=300000-", "bytes=500000-"]
    assert left(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("fault", ["ranges", "tag"])
def test_a_server_that_cannot_continue_starts_over(fault, get, server, tmp_path):
    setattr(server, fault, False if fault == "ranges" else None)
    server.cut = [300_000]
    get()
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(get, server, tmp_path):
    server.cut = [300_000] + [0] * 5
    with pytest.raises(UserError, match=r"broke off; what is there is kept, start again to continue$"):
        get()
    assert left(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    server.tag, server.files["/data.bin"] = '"v2"', CONTENT[::-1]
    get()
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT[::-1]
    assert left(tmp_path) == ["data.bin"]


def test_ctrl_c_keeps_what_is_there_for_the_next_start(get, server, tmp_path, monkeypatch):
    blocks = []

    def interrupted(response):
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(response.read(100_000))
        return blocks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert (tmp_path / "set/data.bin.part").stat().st_size == 300_000
    get()
    assert server.log[-1] == ("/data.bin", "bytes=300000-")
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


def test_a_part_of_another_file_is_not_continued(get, server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.bin.part").write_bytes(b"z" * 1000)
    (tmp_path / "set/data.bin.part.json").write_text(
        json.dumps({"url": "http://other", "validator": '"v1"', "size": 9})
    )
    get()
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(get, server, tmp_path):
    server.statuses = [503, 429]
    get()
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


def test_a_server_that_says_no_length_is_believed(get, server, tmp_path):
    server.length = False
    assert get() == [f"downloading {server.url}/data.bin"]
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        ("/gone.zip", {}, "the server says 404 Not Found"),
        ("/data.bin", {"size": 5}, "the server has 1024000 bytes, the data set YAML says 'size: 5'"),
        ("/data.bin", {"sha256": "0" * 64}, "its sha256 is [0-9a-f]{64}, the data set YAML says 0000"),
    ],
)
def test_what_cannot_be_had_is_one_line(path, fields, says, get, server, tmp_path):
    with pytest.raises(UserError, match=rf"^'download' {server.url}{path}: {says}") as error:
        get(path, **fields)
    assert "\n" not in str(error.value)
    assert left(tmp_path) == []


def test_a_size_is_checked_where_the_server_does_not_say(get, server, tmp_path):
    server.length = False
    with pytest.raises(UserError, match="more than the 1000 bytes"):
        get(size=1000)
    server.files["/data.bin"] = b"short"
    with pytest.raises(UserError, match="5 bytes, the data set YAML says 'size: 1000'"):
        get("/data.bin", size=1000)


def test_no_network_is_one_line(server, tmp_path):
    server.http.server_close()
    with pytest.raises(UserError, match=r"/x.zip: no connection: Connection refused$"):
        fetch(Download(url=f"{server.url}/x.zip", to=tmp_path), note=print, pause_s=0.001)


def test_a_full_disk_is_seen_before_the_download(get, monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(UserError, match=r"needs 1 MB in .*set, which has 67 free$"):
        get()
    assert left(tmp_path) == []


def test_a_file_in_the_way_is_left_alone(get, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.bin").write_text("mine")
    with pytest.raises(UserError, match="is there and is another file; remove it or name another folder in 'to'"):
        get(size=len(CONTENT))
    assert (tmp_path / "set/data.bin").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(get, tmp_path):
    (tmp_path / "set").write_text("a file")
    with pytest.raises(UserError, match=r"File exists|Not a directory"):
        get()


# ---- archives


def zipped(files: dict[str, bytes | str], *, mode: int = 0) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return data.getvalue()


def tarred(*members: tuple[str, bytes, str], mode: str = "w:gz") -> bytes:
    """Members are (name, kind, content or target of a link)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content.encode()))
            else:
                info.linkname = content
                archive.addfile(info)
    return data.getvalue()


FILES = {"images/a.jpg": "picture", "labels/a.txt": "0 .5 .5 .1 .1"}


@pytest.mark.parametrize("kind", ["zip", "w:", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("top", ["", "set/", "./"])
def test_archives_are_unpacked_and_not_kept(kind, top, get, server, tmp_path):
    files = {top + name: content for name, content in FILES.items()}
    data = zipped(files) if kind == "zip" else tarred(*((n, tarfile.REGTYPE, c) for n, c in files.items()), mode=kind)
    server.files["/any%20name?id=3"] = data
    notes = get("/any name?id=3")
    assert notes[-1] == f"unpacking any name into {tmp_path / 'set'}"
    assert left(tmp_path) == [".any name.unpacked", *FILES]
    assert (tmp_path / "set/images/a.jpg").read_text() == "picture"
    asked = len(server.log)
    assert get("/any name?id=3") == []
    assert len(server.log) == asked


def test_another_folder_at_the_top_stays(get, server, tmp_path):
    server.files["/a.zip"] = zipped({f"coco8/{name}": content for name, content in FILES.items()})
    get("/a.zip")
    assert left(tmp_path)[1:] == [f"coco8/{name}" for name in FILES]


def test_what_is_there_already_stays(get, server, tmp_path):
    (tmp_path / "set/labels").mkdir(parents=True)
    (tmp_path / "set/labels/a.txt").write_text("mine")
    server.files["/a.zip"] = zipped(FILES)
    get("/a.zip")
    assert left(tmp_path) == [".a.zip.unpacked", *FILES]
    assert (tmp_path / "set/labels/a.txt").read_text() == "mine"


def test_an_archive_that_the_user_put_there_is_used_and_kept(get, server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.zip").write_bytes(zipped(FILES))
    get("/a.zip")
    assert server.log == []
    assert left(tmp_path) == [".a.zip.unpacked", "a.zip", *FILES]


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (zipped({"a.txt": "x", "../evil.txt": "x"}), r"holds '\.\./evil\.txt', which lies outside of the folder"),
        (zipped({"/evil.txt": "x"}), "holds '/evil.txt', which lies outside"),
        (zipped({"a/../../evil.txt": "x"}), "holds .*, which lies outside"),
        (zipped({"..\\evil.txt": "x"}), "holds .*, which lies outside"),
        (zipped({"C:\\evil.txt": "x"}), "holds .*, which lies outside"),
        (zipped({"a": "../../evil.txt"}, mode=stat.S_IFLNK | 0o777), "holds 'a', which is a link that leads outside"),
        (zipped({"a": "x"}, mode=stat.S_IFCHR | 0o666), "holds 'a', which is no file"),
        (tarred(("../evil.txt", tarfile.REGTYPE, "x")), "holds .*, which lies outside"),
        (tarred(("/evil.txt", tarfile.REGTYPE, "x")), "holds .*, which lies outside"),
        (tarred(("a", tarfile.SYMTYPE, "/etc/passwd")), "holds 'a', which is a link that leads outside of the folder"),
        (tarred(("a/b", tarfile.SYMTYPE, "../../x")), "holds .*, which is a link that leads outside"),
        (tarred(("a", tarfile.LNKTYPE, "../x")), "holds .*, which is a link that leads outside"),
        (tarred(("a", tarfile.CHRTYPE, "")), "holds 'a', which is no file"),
        (tarred(("a", tarfile.FIFOTYPE, "")), "holds 'a', which is no file"),
    ],
    ids=map(str, range(14)),
)
def test_evil_archives_are_refused(archive, says, get, server, tmp_path):
    server.files["/a.bin"] = archive
    with pytest.raises(UserError, match=rf"a\.bin {says}.*; nothing was unpacked$"):
        get("/a.bin")
    assert left(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_link_on_the_way_of_a_file_leads_nowhere(get, server, tmp_path):
    (tmp_path / "outside").mkdir()
    server.files["/a.tar"] = tarred(
        ("x", tarfile.SYMTYPE, "y"), ("y/", tarfile.DIRTYPE, ""), ("x/f", tarfile.REGTYPE, "1")
    )
    notes = get("/a.tar")
    assert left(tmp_path) == [".a.tar.unpacked", "x/f"]
    assert notes[-1] == "a.tar: 1 links in it, to folders or to nothing, were left out"


def test_links_to_files_inside_become_files(get, server, tmp_path):
    links = (("b/link", tarfile.SYMTYPE, "../a"), ("hard", tarfile.LNKTYPE, "a"), ("lost", tarfile.SYMTYPE, "nowhere"))
    server.files["/a.tar"] = tarred(("a", tarfile.REGTYPE, "text"), *links)
    assert get("/a.tar")[-1].startswith("a.tar: 1 links in it")
    assert left(tmp_path) == [".a.tar.unpacked", "a", "b/link", "hard"]
    assert not (tmp_path / "set/b/link").is_symlink()
    assert (tmp_path / "set/b/link").read_text() == "text"
    server.files["/b.zip"] = zipped({"target": "hello"})
    with zipfile.ZipFile(data := io.BytesIO(), "w") as archive:
        archive.writestr("target", "hello")
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "target")
    server.files["/b.zip"] = data.getvalue()
    get("/b.zip")
    assert (tmp_path / "set/link").read_text() == "hello"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_is_compared_with_the_disk(kind, get, server, monkeypatch, tmp_path):
    large = "0" * 20_000_000
    server.files["/a"] = zipped({"a": large}) if kind == "zip" else tarred(("a", tarfile.REGTYPE, large))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=(64 << 20) + 1_000_000))
    with pytest.raises(UserError, match=r"unpacking a needs 20 MB more, and 68 MB are free$"):
        get("/a")
    assert left(tmp_path) == ["a.part", "a.part.json"]  # there may be room the next time
    monkeypatch.undo()
    get("/a")
    assert len(server.log) == 1
    assert (tmp_path / "set/a").stat().st_size == 20_000_000


def test_a_zip_that_lies_about_its_sizes_is_refused(get, server, tmp_path):
    data = bytearray(zipped({"a": "0" * 100_000}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = data.rindex(signature) + offset
        data[place : place + 4] = (10).to_bytes(4, "little")
    server.files["/a.zip"] = bytes(data)
    with pytest.raises(UserError, match=r"a\.zip cannot be unpacked"):
        get("/a.zip")
    assert left(tmp_path) == []


@pytest.mark.parametrize("spoil", ["cut", "bits"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_damaged_archive_leaves_nothing_behind(kind, spoil, get, server, tmp_path):
    noise = hashlib.shake_256(b"").digest(50_000).hex()
    data = bytearray(zipped({"a": noise}) if kind == "zip" else tarred(("a", tarfile.REGTYPE, noise)))
    if spoil == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    name = f"/a.{kind}"
    server.files[name] = bytes(data)
    with pytest.raises(UserError, match=rf"{name[1:]} cannot be unpacked: |{name}: is damaged, or no archive") as error:
        get(name)
    assert "\n" not in str(error.value)
    assert left(tmp_path) == []


# ---- data sets


def write_yaml(tmp_path, **fields):
    content = {"path": "set", "train": "images", "val": "images", "names": ["a"], **fields}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    return read_dataset(str(tmp_path / "data.yaml"))[0]


def test_a_data_set_that_is_there_is_not_fetched(server, tmp_path):
    (tmp_path / "set/images").mkdir(parents=True)
    spec = write_yaml(tmp_path, download=f"{server.url}/gone.zip")
    assert ensure_downloaded(spec, note=print) is spec
    assert ensure_downloaded(write_yaml(tmp_path, train="nowhere"), note=print).train == (tmp_path / "set/nowhere",)
    assert server.log == []


def test_a_data_set_that_is_missing_is_fetched_and_its_entries_are_found(server, tmp_path):
    server.files["/a.zip"] = zipped({"set/train/images/a.jpg": "x", "set/valid/images/b.jpg": "x"})
    spec = write_yaml(tmp_path, train="../train/images", val="../valid/images", download=f"{server.url}/a.zip")
    fetched = ensure_downloaded(spec, note=print)
    assert fetched.train == (tmp_path / "set/train/images",)
    assert fetched.val == (tmp_path / "set/valid/images",)
    assert ensure_downloaded(fetched, note=print) is fetched
    assert len(server.log) == 1


def test_an_archive_without_what_the_yaml_names_is_fetched_once(server, tmp_path):
    server.files["/a.zip"] = zipped(FILES)
    spec = write_yaml(tmp_path, val="images/val", download=f"{server.url}/a.zip")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"set/images/val is not in what 'download' brought; to fetch it again, remove "
        ):
            ensure_downloaded(spec, note=print)
    assert len(server.log) == 1
    assert left(tmp_path) == [".a.zip.unpacked", *FILES]


def test_unpacking_that_was_interrupted_is_finished(server, tmp_path, monkeypatch):
    server.files["/a.zip"] = zipped(FILES)
    spec = write_yaml(tmp_path, download=f"{server.url}/a.zip")
    moves = []

    def interrupted(path, target):
        if moves:
            raise KeyboardInterrupt
        moves.append(path.rename(target))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_downloaded(spec, note=print)
    ensure_downloaded(write_yaml(tmp_path, download=f"{server.url}/a.zip"), note=print)
    assert left(tmp_path) == [".a.zip.unpacked", *FILES]
    assert len(server.log) == 1
