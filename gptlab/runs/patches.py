"""An arm's own code: a copy of the package with a patch applied, which knows its patch and records it with every run.

The package that is in use, its folder and the user's checkout are never changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import gptlab
from gptlab.errors import ConfigError

MARK = "PATCH.sha256"
"""A file in the copy's package that holds the SHA-256 of its patch."""


def package() -> Path:
    """The folder of the package that is running."""
    return Path(gptlab.__file__).resolve().parent


def applied() -> str | None:
    """SHA-256 of the patch that the running package carries; None for the package as it is."""
    mark = package() / MARK
    return mark.read_text(encoding="utf-8").strip() if mark.is_file() else None


def patched(patch: Path, copies: Path) -> Path:
    """A folder in `copies` that holds the package under `patch`, made unless it is there: what goes on sys.path.

    Its name tells package and patch, so that a changed package or patch makes a new copy. Raises ConfigError where the
    patch cannot be read, does not apply or changes nothing.
    """
    try:
        content = patch.read_bytes()
    except OSError as error:
        raise ConfigError(f"patch {patch}: {error.strerror}; expected a file such as `git diff` writes") from None
    target = copies / f"{patch.stem}-{_name(content)}"
    if target.is_dir():
        return target
    copies.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building_", dir=copies))
    try:
        shutil.copytree(package(), building / "gptlab", ignore=shutil.ignore_patterns("__pycache__", MARK))
        before = _hash(building / "gptlab")
        _apply(patch.resolve(), building)
        if links := [path for path in building.rglob("*") if path.is_symlink()]:  # what is written next would follow
            raise ConfigError(f"patch {patch}: it makes a link of {links[0].relative_to(building)}; leave that out")
        if _hash(building / "gptlab") == before:
            raise ConfigError(f"patch {patch}: it changes nothing in gptlab/; leave it out")
        shutil.copyfile(patch, building / patch.name)
        (building / "gptlab" / MARK).write_text(hashlib.sha256(content).hexdigest() + "\n", encoding="utf-8")
        try:
            building.rename(target)
        except OSError:  # another runner was faster with the same copy
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _apply(patch: Path, folder: Path) -> None:
    """`git apply` in a repository of its own: inside another one git would leave out what lies elsewhere."""
    try:
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, capture_output=True)
        done = subprocess.run(["git", "apply", str(patch)], cwd=folder, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"patch {patch}: applying it needs the program git, which is not installed") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"patch {patch} does not apply to gptlab {gptlab.__version__}: {said[0].removeprefix('error: ')}; "
            "make it with `git diff -- gptlab` against the code in use"
        )
    shutil.rmtree(folder / ".git")


def _name(patch: bytes) -> str:
    return hashlib.sha256(_hash(package()).encode() + patch).hexdigest()[:12]


def _hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files but for caches and the mark."""
    h = hashlib.sha256()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(files):
            if name != MARK:
                path = Path(root, name)
                h.update(f"{path.relative_to(folder).as_posix()}\0".encode())
                h.update(hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()
