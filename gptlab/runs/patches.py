"""An arm's own code: the package with a patch applied, which knows its patch and records it with every run.

It is made from the package in use and the patch, once for a runner, and kept in memory. Each cell gets a copy of its
own in a fresh private folder, removed when the cell has ended: nothing that lies in an experiment's folder, which may
have come from anywhere, is run in its place. The package in use and the user's checkout are never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gptlab
from gptlab.errors import ConfigError, shown
from gptlab.files import MB, kind_of, open_new, read_bytes, read_text
from gptlab.processes import environment, package

MARK = "PATCH.sha256"
"""A file in the copy's package that holds the SHA-256 of its patch."""

LARGEST_PATCH, LARGEST_ARCHIVE = MB, 64 * MB


def applied() -> str | None:
    """SHA-256 of the patch that the running package carries; None for the package as it is."""
    mark = package() / MARK
    return read_text(mark, inside=mark.parent).strip() if mark.exists() else None


@dataclass(frozen=True)
class PatchedPackage:
    """files: {gptlab/...: text} of the package under a patch, its mark too; patch: as it was applied."""

    files: Mapping[str, str]
    patch: bytes = b""

    @property
    def archive(self) -> bytes:
        """All of it as one file, for machines that share no memory with this one."""
        return json.dumps(self.files, sort_keys=True).encode()

    @classmethod
    def from_archive(cls, path: Path, sha256: str) -> PatchedPackage:
        """What another machine has archived; raises ConfigError where the file is not as it was written."""
        archive = read_bytes(path, limit=LARGEST_ARCHIVE, inside=path.parent, error=ConfigError)
        if hashlib.sha256(archive).hexdigest() != sha256:
            raise ConfigError(f"{path}: expected the code that was submitted, found another content; submit it again")
        return cls(json.loads(archive))

    def unpack(self) -> Path:
        """A fresh folder that holds the package and that nobody else can write: what goes on sys.path."""
        folder = Path(tempfile.mkdtemp(prefix="gptlab_code_"))
        _write(folder, self.files)
        return folder


def patched(patch: Path) -> PatchedPackage:
    """The package under a patch.

    A patch changes or adds Python files of gptlab/ and nothing else: a researcher reads these, and a run of the arm
    can contain nothing that is not among them. Raises ConfigError where it cannot be read, does not apply, changes
    something else or nothing.
    """
    try:
        content = read_bytes(patch, limit=LARGEST_PATCH, error=ConfigError)
    except FileNotFoundError as error:
        raise ConfigError(f"patch {patch}: {error.strerror}; expected a file such as `git diff` writes") from None
    before = {f"gptlab/{name}": _text(package() / name) for name in _files(package()) if name != MARK}
    with tempfile.TemporaryDirectory(prefix="gptlab_patch_") as scratch:
        folder = Path(scratch, "package")
        _write(folder, before)
        _apply(patch, content, folder)
        after = {path: _changed(patch, folder, path, before) for path in _files(folder)}
    if lost := sorted(before.keys() - after.keys()):
        raise ConfigError(f"patch {patch}: it removes {shown(lost[0])}; empty the file instead")
    if after == before:
        raise ConfigError(f"patch {patch}: it changes nothing; leave it out")
    return PatchedPackage({**after, f"gptlab/{MARK}": hashlib.sha256(content).hexdigest() + "\n"}, content)


def _changed(patch: Path, folder: Path, name: str, before: Mapping[str, str]) -> str:
    """A file as the patch leaves it; raises ConfigError where that is no plain Python file of the package."""
    path = folder / name
    mode = path.lstat().st_mode
    text = _text(path) if stat.S_ISREG(mode) else ""
    if text == before.get(name) and not mode & 0o111:
        return text
    if not stat.S_ISREG(mode):
        found = kind_of(mode)
    elif mode & 0o111:
        found = "a program"
    elif not re.fullmatch(r"gptlab/(\w+/)*\w+\.py", name):
        found = "another file"
    elif not text.isprintable() and not all(c.isprintable() or c in "\n\t\f" for c in text):
        found = "no text"
    else:
        return text
    raise ConfigError(f"patch {patch}: expected changes of Python files in gptlab/, found {found}: {shown(name)}")


def _apply(patch: Path, content: bytes, folder: Path) -> None:
    """`git apply` outside of any repository: inside one git would leave out what lies elsewhere."""
    where = environment(without="GIT_", GIT_CEILING_DIRECTORIES=os.path.realpath(folder.parent))
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    try:
        done = subprocess.run(command, cwd=folder, input=content, check=False, capture_output=True, env=where)
    except FileNotFoundError:
        raise ConfigError(f"patch {patch}: applying it needs the program git, which is not installed") from None
    if done.returncode:
        reasons = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"patch {patch} does not apply to gptlab {gptlab.__version__}: {reasons[0].removeprefix('error: ')}; "
            "make it with `git diff -- gptlab` against the code in use"
        )


def _files(folder: Path) -> Iterator[str]:
    """The names of all that lies in a folder and below, but for folders and what Python keeps there of itself."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(root, name).relative_to(folder).as_posix()


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open_new(folder / name) as file:
            file.write(text.encode(errors="surrogateescape"))
