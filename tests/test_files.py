"""The one reader and the one writer of files, on everything that a path may lead to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from gptlab import files
from gptlab.errors import CheckpointError, ConfigError, DataError

SECRET = "root:hunter2"
READERS: dict[str, Callable[..., object]] = {
    "open_regular": files.open_regular,
    "read_bytes": files.read_bytes,
    "read_text": files.read_text,
    "read_json": files.read_json,
    "read_toml": files.read_toml,
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "write_whole": lambda path: files.write_whole(path, "new\n"),
    "write_json": lambda path: files.write_json(path, {"new": 1}),
    "open_append": lambda path: files.open_append(path).close(),
    "take_lock": lambda path: (files.take_lock(path) or contextlib.nullcontext()).__exit__(None, None, None),
}


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Nothing here may wait for another process: a hang ends the test instead of the suite."""

    def ring(number: int, frame: object) -> None:
        pytest.fail("it waits")  # no OSError, which would count as a refusal

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def linked(path: Path, make: Callable[[Path], Path]) -> Path:
    path.symlink_to(make(path.with_name("behind")))
    return path


STRANGE: dict[str, Callable[[Path], Path]] = {
    "a pipe": fifo,
    "a link to a pipe": lambda path: linked(path, fifo),
    "a socket": unix_socket,
    "a folder": folder,
    "a link to a folder": lambda path: linked(path, folder),
    "a loop of links": loop,
    "zeros": lambda path: Path("/dev/zero"),
    "a full device": lambda path: Path("/dev/full"),
    "a link to a device": lambda path: linked(path, lambda _: Path("/dev/zero")),
    "a name with a null": lambda path: path.with_name("x\0y"),
    "a name that is too long": lambda path: path.with_name("x" * 300),
    "what stands for a process": lambda path: Path("/proc/self/mem"),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("reader", [name for name in READERS if name != "open_regular"])
def test_what_is_no_file_is_refused_at_once(reader: str, strange: str, tmp_path: Path) -> None:
    path = STRANGE[strange](tmp_path / "x")
    with pytest.raises(ConfigError, match="expected a regular file") as caught:
        READERS[reader](path, error=ConfigError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "file/below", "nowhere/below"])
def test_a_file_that_is_not_there_is_told_apart(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError) as caught:
        files.read_text(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)


def test_a_link_that_the_user_typed_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    assert files.read_text(tmp_path / "link") == "content"


@pytest.mark.parametrize("where", ["file", "folder", "folder within", "file to its own folder", "loop", "up", "away"])
def test_nothing_outside_a_folder_is_read(where: str, tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    (run / "a").mkdir(parents=True)
    (away / "b").mkdir(parents=True)
    (away / "file").write_text(SECRET)
    (away / "b" / "file").write_text(SECRET)
    (run / "own").write_text("mine")
    asked = {
        "file": ("x", away / "file"), "folder": ("x/file", away), "folder within": ("a/x/b/file", away),
        "file to its own folder": ("x", run / "own"), "loop": ("x", "x"), "up": ("../away/file", None),
        "away": (str(away / "file"), None),
    }  # fmt: skip
    name, target = asked[where]
    if target is not None:
        link = run / name.partition("/file")[0].removesuffix("/b")
        link.symlink_to(target)
    for read in READERS.values():
        with pytest.raises(CheckpointError, match=r"is a link to elsewhere|expected a file in") as caught:
            read(run / name, inside=run, error=CheckpointError)
        assert SECRET not in str(caught.value)
    assert files.read_text(run / "own", inside=run) == "mine"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "disk" / "a" / "file").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "disk")
    assert files.read_text(tmp_path / "log" / "a" / "file", inside=tmp_path / "log") == "mine"


@pytest.mark.parametrize("part", ["a", "file"])
def test_a_link_that_comes_after_the_look_is_not_followed(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody swaps a folder for a link between the check and the opening."""
    run, away = tmp_path / "run", tmp_path / "away"
    for place in (run / "a", away):
        place.mkdir(parents=True)
        (place / "file").write_text(SECRET)
    look = files.refuse_links

    def swapped(path: Path, folder: Path, **how: type[DataError]) -> None:
        look(path, folder, **how)
        victim = run / "a" if part == "a" else run / "a" / "file"
        victim.rename(tmp_path / "moved")
        victim.symlink_to(away if part == "a" else away / "file")

    monkeypatch.setattr(files, "refuse_links", swapped)
    with pytest.raises((DataError, FileNotFoundError)):
        files.read_text(run / "a" / "file", inside=run)


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1" * 100)
    assert len(files.read_bytes(path, limit=100)) == 100
    with pytest.raises(DataError, match="expected at most 99 bytes, found 100 bytes; is it the right file"):
        files.read_bytes(path, limit=99)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file of a terabyte
    with pytest.raises(DataError, match="expected at most 16 MB, found 1024 GB"):
        files.read_json(path)


def test_text_is_utf8_with_any_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, text in (
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        ("é\u2028".encode(), "é\u2028"),
        (b"\xef\xbb\xbfa", "a"),
        (b"", ""),
    ):
        path.write_bytes(content)
        assert files.read_text(path) == text
    for content in (b"ab\xff", "é".encode("latin-1"), "text".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x: expected UTF-8, found another byte at \d; convert the file"):
            files.read_text(path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "nul", '{"a": 1}}'])
def test_what_is_no_json_or_toml_is_one_line_that_quotes_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(content + f"\n# {SECRET}\n")
    for read in (files.read_json, files.read_toml):
        with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
            read(path, error=ConfigError)
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("strange", ["a folder", "a pipe", "a link to a pipe", "a link to a device", "a socket"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_not_written(writer: str, strange: str, tmp_path: Path) -> None:
    path = STRANGE[strange](tmp_path / "x")
    before = sorted(tmp_path.iterdir()), path.lstat()
    with pytest.raises(
        DataError, match=r"x: expected (the name of a file to write|a regular file to append to), found"
    ):
        WRITERS[writer](path)
    assert (sorted(tmp_path.iterdir()), path.lstat().st_ino) == (before[0], before[1].st_ino)


DEVICES = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/null", "/dev/full", "/dev/never", "/proc/self/comm"]


@pytest.mark.parametrize("path", DEVICES)
def test_a_name_for_a_stream_is_not_replaced_even_where_it_leads_to_a_file(path: str, tmp_path: Path) -> None:
    """`--out /dev/stdout > file`: root would put a file in the place of the device."""
    script = (
        "import sys; from gptlab import files, errors\n"
        "try: files.write_whole(sys.argv[1], 'new')\n"
        "except errors.DataError as error: sys.stderr.write(str(error)); sys.exit(3)"
    )
    before = sorted(os.listdir("/dev"))
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", script, path], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3, done.stderr
    assert "expected the name of a file to write, found one of /" in done.stderr
    assert (tmp_path / "out").read_bytes() == b""
    assert sorted(os.listdir("/dev")) == before


@pytest.mark.parametrize("to", ["a file", "nothing", "a folder's file"])
def test_a_link_is_replaced_and_not_followed(to: str, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "x"
    if to != "nothing":
        victim.write_text("mine")
    path.symlink_to(victim)
    files.write_whole(path, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert victim.read_text() == "mine" if to != "nothing" else not victim.exists()
    path.unlink()
    path.symlink_to(victim)
    for append in (files.open_append, files.take_lock):
        with pytest.raises(DataError, match="found a link"):
            append(path)
    with files.open_new(path) as file:
        file.write(b"new")
    assert victim.read_text() == "mine" if to != "nothing" else not victim.exists()
    assert path.read_text() == "new"


def test_links_at_names_that_could_be_foreseen_are_left_alone(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "x.html"
    victim.write_text("mine")
    names = [".x.html.tmp", "x.html.tmp", f".x.html.{os.getpid()}", f".x.html.{'0' * 16}.tmp", "x.html~", ".x.html"]
    for name in names:
        (tmp_path / name).symlink_to(victim)
    files.write_whole(path, "new")
    assert (path.read_text(), victim.read_text()) == ("new", "mine")
    assert all((tmp_path / name).is_symlink() for name in names)


def test_the_name_while_writing_cannot_be_guessed_and_is_hidden(tmp_path: Path) -> None:
    seen = set()
    for _ in range(8):
        with files.writing(tmp_path / "x") as file:
            file.write(b"a")
            (building,) = [path.name for path in tmp_path.iterdir() if path.name != "x"]
            assert re.fullmatch(r"\.x\.[0-9a-f]{16}\.tmp", building)
            seen.add(building)
    assert len(seen) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["é" * 120, "[a]*?", " ", "x" * 255, "-rf"])
def test_any_name_that_a_file_can_have_can_be_written(name: str, tmp_path: Path) -> None:
    for content in ("one", "two"):
        files.write_whole(tmp_path / name, content)
        assert files.read_text(tmp_path / name) == content
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _fail(file: BinaryIO, failure: type[BaseException]) -> None:
    file.write(b"half")
    raise failure


def test_a_failure_leaves_the_old_content_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    for failure in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(failure), files.writing(path) as file:
            _fail(file, failure)
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, float("nan"))
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_missing_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_whole(tmp_path / "nowhere" / "x", "new")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def test_the_rights_of_a_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_whole(path, "a")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o600)
    files.write_whole(path, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


HALF = (
    "import sys, time; from gptlab import files\n"
    "with files.writing(sys.argv[1]) as file:\n"
    "    file.write(b'half'); file.flush(); print('at it', flush=True); time.sleep(60)"
)


@contextlib.contextmanager
def writer_at_work(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "at it\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_kill_leaves_the_old_content_and_the_next_writer_clears_up(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / ".x.not-ours.tmp"
    path.write_text("old")
    other.write_text("mine")
    for _ in range(2):
        with writer_at_work(path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert path.read_text() == "old"
    left = [one for one in tmp_path.iterdir() if one.read_bytes() == b"half"]
    assert len(left) == 1, "the second writer has cleared up after the first"
    files.write_whole(path, "new")
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_a_writer_at_work_is_not_debris(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with writer_at_work(path):
        files.write_whole(path, "new")
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_text() == "new"


def test_many_writers_at_once_leave_one_whole_content(tmp_path: Path) -> None:
    path, contents = tmp_path / "x", [str(k) * 50_000 for k in range(6)]

    def write(content: str) -> None:
        for _ in range(15):
            files.write_whole(path, content)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_text() in contents
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_json_is_written_for_any_reader(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x", {"b": 1, "a": "é"}, sort_keys=True)
    assert json.loads((tmp_path / "x").read_bytes()) == {"a": "é", "b": 1}
    assert files.read_json(tmp_path / "x") == {"a": "é", "b": 1}


def test_a_lock_has_one_holder_and_can_be_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    assert not files.is_locked(path)
    holder = files.take_lock(path)
    assert holder
    assert files.take_lock(path) is None
    assert files.is_locked(path)
    threading.Timer(0.3, holder.close).start()
    began = time.monotonic()
    waited = files.take_lock(path, wait=True)
    assert waited
    assert time.monotonic() - began > 0.2
    waited.close()
    assert not files.is_locked(path)


@pytest.mark.parametrize("strange", ["a pipe", "a loop of links", "a folder", "a socket"])
def test_asking_about_a_lock_that_is_no_file_waits_for_nobody(strange: str, tmp_path: Path) -> None:
    assert not files.is_locked(STRANGE[strange](tmp_path / "x"))
