"""The one way to read and to write a file: regular files up to a size in, whole files or none out.

A path may come from anyone: a packed experiment, a run on a shared disk, a typing error. So a reader opens regular
files only (a pipe would hang it, a device would never end), reads no more than it was built for, and does not follow a
link out of the folder it was given. A writer builds the new content in a file of its own whose name nobody can foresee
and renames it over the old one: a kill leaves the old content or the new, and a planted link is replaced, not followed.

What is streamed (shards, metrics) uses `open_regular` and `writing`; everything else is one call.

What a file holds is the caller's to check, with `is_count` and `is_number` for figures: numbers beyond 64 bits,
infinities and NaN are no damage to a parser of JSON. Every refusal to read or write is one of our errors, of the kind
the caller names; of text alone, `parse_json` and `parse_toml` make a value or raise ValueError.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import math
import os
import secrets
import stat
import tomllib
from collections.abc import Iterator
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from gptlab.errors import DataError, GptlabError

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
SMALL = 16 * MB
"""Bytes of the largest config, manifest or table that is read at once; the largest of ours is below 1 MB."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)
LOCK = ".lock"
"""The file in a folder of ours whose lock its one writer holds."""
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NAMED = 50
"""Characters of a file's name in the name of its temporary file, which has at most 255 bytes."""
_NOT_FOLDERS = ("/dev", "/proc", "/sys")
"""Where a name stands for something that runs: files there are not to be replaced, even if they lead to a file."""


def open_regular(
    path: str | Path, *, inside: str | Path | None = None, error: type[GptlabError] = DataError
) -> BufferedReader:
    """Open a regular file for reading; never waits for the other end of a pipe.

    inside: the folder that the file has to lie in, with no link on the way from it to the file. Without it links are
    followed, as for a path that the user typed.

    Raises FileNotFoundError, and `error` for anything that is no regular file or lies elsewhere.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, _READ) if inside is None else _open_inside(path, Path(inside), error)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(2, "No such file or directory", str(path)) from None
    except (OSError, ValueError) as failure:  # a socket, a loop of links, no permission, a name that cannot be one
        raise error(f"{path} cannot be opened: {_reason(failure)}; expected a regular file") from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: expected a regular file, found {kind_of(mode)}; give the path of a file")
    return os.fdopen(descriptor, "rb")


def _open_inside(path: Path, folder: Path, error: type[GptlabError]) -> int:
    """Open folder by folder, so that no link that is put there meanwhile is followed either."""
    refuse_links(path, folder, error=error)
    *folders, name = path.relative_to(folder).parts or (".",)
    at = os.open(folder, _READ | os.O_DIRECTORY)
    try:
        for step in folders:
            outer, at = at, os.open(step, _READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(outer)
        return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def read_bytes(
    path: str | Path, *, limit: int = SMALL, inside: str | Path | None = None, error: type[GptlabError] = DataError
) -> bytes:
    """The whole content of a regular file of at most `limit` bytes; raises as open_regular does."""
    with open_regular(path, inside=inside, error=error) as file:
        try:
            content = file.read(limit + 1) or b""
        except OSError as failure:  # what stands for a file in /proc
            raise error(f"{path} cannot be read: {_reason(failure)}; expected a regular file") from None
        found = max(os.fstat(file.fileno()).st_size, len(content))
    if len(content) > limit:
        raise error(f"{path}: expected at most {size(limit)}, found {size(found)}; is it the right file?")
    return content


def read_text(
    path: str | Path, *, limit: int = SMALL, inside: str | Path | None = None, error: type[GptlabError] = DataError
) -> str:
    """The whole text of a UTF-8 file, line ends made \\n, without a mark before it; `error` for other bytes."""
    content = read_bytes(path, limit=limit, inside=inside, error=error)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: expected UTF-8, found another byte at {failure.start}; convert the file") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(
    path: str | Path, *, limit: int = SMALL, inside: str | Path | None = None, error: type[GptlabError] = DataError
) -> Any:
    """The value of a JSON file; raises as read_text does, and `error` for what is no JSON."""
    text = read_text(path, limit=limit, inside=inside, error=error)
    try:
        return parse_json(text, unique=True)
    except ValueError as failure:
        raise error(f"{path} is damaged: expected JSON, found {failure}") from None


def read_toml(
    path: str | Path, *, limit: int = SMALL, inside: str | Path | None = None, error: type[GptlabError] = DataError
) -> dict[str, Any]:
    """The table of a TOML file; raises as read_text does, and `error` for what is no TOML."""
    text = read_text(path, limit=limit, inside=inside, error=error)
    try:
        return parse_toml(text)
    except ValueError as failure:
        raise error(f"{path} is not a TOML file that can be read: {failure}") from None


@contextlib.contextmanager
def writing(path: str | Path, *, error: type[GptlabError] = DataError) -> Iterator[BufferedWriter]:
    """A binary file that becomes `path` when the block ends, whole and on disk; nothing changes if the block raises.

    The folder must exist. A link at `path` is replaced, not followed. What a kill left of an earlier writing goes.

    Raises `error` where `path` is a folder, a pipe or a device: /dev/stdout must not be renamed over.
    """
    path, mode = Path(path), None
    _refuse_unwritable(path, error)
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat().st_mode
        mode = None if stat.S_ISLNK(found) else stat.S_IMODE(found)  # what others may not read stays so
    _remove_abandoned(path)
    building, file = _temporary_file(path)
    try:
        with file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(building, path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, content: bytes | str, *, error: type[GptlabError] = DataError) -> None:
    """Make `content` the whole content of a file, or leave the file as it was; text is written as UTF-8."""
    with writing(path, error=error) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | Path, value: object, *, error: type[GptlabError] = DataError, **how: Any) -> None:
    """`write_whole` of a value as JSON that any reader takes, without NaN; how: further options of `json.dumps`."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False, **how) + "\n", error=error)


def open_append(path: str | Path, *, error: type[GptlabError] = DataError) -> BufferedWriter:
    """Open a regular file to append to, made where it is missing; raises `error` for a link, pipe or device."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except (OSError, ValueError) as failure:
        found = _reason(failure)
        with contextlib.suppress(OSError, ValueError):
            found = kind_of(os.lstat(path).st_mode)
    else:
        if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "ab")
        os.close(descriptor)
        found = kind_of(mode)
    raise error(f"{path}: expected a regular file to append to, found {found}; remove it or give another")


def open_new(path: str | Path) -> BufferedWriter:
    """A new empty file to write as it comes, in place of the file or link that stood there."""
    Path(path).unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def flush(path: str | Path) -> None:
    """Have what was written to a file, or into a folder, on disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: str | Path, *, wait: bool = False, error: type[GptlabError] = DataError) -> BufferedWriter | None:
    """The file at a path, made where it is missing, locked for as long as it is open; None while another holds it.

    The kernel lets go of it however its holder ends. It is on the file, not on its path: a folder may be moved away,
    and another be made in its place, while somebody waits.
    """
    while True:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open_append(path, error=error)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        if not wait:
            return None


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock that is a file at a path; asking takes it for a moment, shared."""
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, DataError):
        pass
    return False


def refuse_links(path: str | Path, folder: str | Path, *, error: type[GptlabError] = DataError) -> None:
    """Raise `error` where `path` does not lie in `folder` or a link stands on the way from the folder to it."""
    path, folder = Path(path), Path(folder)
    try:
        parts = path.relative_to(folder).parts
    except ValueError:
        parts = ("..",)
    if ".." in parts:
        raise error(f"{path}: expected a file in {folder}, found one elsewhere")
    step = folder
    for part in parts:
        step = step / part
        if step.is_symlink():
            raise error(f"{step} is a link to elsewhere; expected a file of {folder} itself: remove the link")


def kind_of(mode: int) -> str:
    """What a file of this mode (st_mode) is, in words."""
    return next((name for matches, name in _KINDS if matches(mode)), "a regular file")


def size(count: int) -> str:
    """A count of bytes in the largest unit that it fills.

    >>> [size(n) for n in (12, 3 * KB, 5 * MB + 1, 2 * GB)]
    ['12 bytes', '3 kB', '5 MB', '2 GB']
    """
    for unit, name in ((GB, "GB"), (MB, "MB"), (KB, "kB")):
        if count >= unit:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def _refuse_unwritable(path: Path, error: type[GptlabError]) -> None:
    """Raise `error` for what is not to be replaced by a file: a folder, a pipe, a device or a name for one."""
    where = os.path.realpath(path.parent)
    if where in _NOT_FOLDERS or where.startswith(("/proc/", "/sys/", "/dev/fd")):
        raise error(f"{path}: expected the name of a file to write, found one of {where}; give another")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing there, a link that leads nowhere, or what opening it will say
        return
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected the name of a file to write, found {kind_of(mode)}; give another")


def _temporary_file(path: Path) -> tuple[Path, BufferedWriter]:
    """A new file in the folder of `path`, with the lock that tells other writers that it is no debris."""
    while True:
        building = path.with_name(f".{path.name[:_NAMED]}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror, str(path)) from None
        with contextlib.suppress(OSError):  # a disk without locks: there debris stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another writer took it for debris before the lock was on it
            return building, os.fdopen(descriptor, "wb")
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers left of `path`: temporary files that nobody holds the lock of."""
    with contextlib.suppress(OSError):
        for debris in path.parent.glob(f".{glob.escape(path.name[:_NAMED])}.{'[0-9a-f]' * 16}.tmp"):
            with contextlib.suppress(OSError):
                descriptor = os.open(debris, _READ | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    debris.unlink()
                finally:
                    os.close(descriptor)


def _reason(failure: OSError | ValueError) -> str:
    return (failure.strerror if isinstance(failure, OSError) else None) or str(failure)


DEEPEST = 64
"""Levels of objects and lists, one within the other; nothing of ours has more than 6."""


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text; ValueError for anything else, and for more than DEEPEST levels.

    unique: refuse objects in which a key occurs twice, of which parsers take one or the other.

    >>> parse_json('{"step": [1, 2]}')
    {'step': [1, 2]}
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _checked(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} twice")
    return found


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text; ValueError for anything else, and for more than DEEPEST levels."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _checked(table)


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on that 64 bits hold, as steps, tokens and sizes are.

    >>> [is_count(value) for value in (0, 7, -1, 1.0, True, 2**63)]
    [True, True, False, False, False, False]
    """
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Whether it is a finite number, as losses and doses are."""
    return (type(value) is int and -(2**63) <= value < 2**63) or (isinstance(value, float) and math.isfinite(value))


def _checked(value: Any) -> Any:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            for inner in (one.values() if type(one) is dict else one)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")
