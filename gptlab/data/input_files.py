"""Which files of an input are read, by one rule for texts and shards, and an account of what is left out.

Names that begin with a dot are no input: macOS, notebooks and editors put copies there. Suffixes count in any case, a
linked folder is followed once, and a link has the kind of its own name, not of what it leads to.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.errors import DataError, shortened
from gptlab.files import MB, kind_of, read_bytes
from gptlab.parsing import is_count, parse_json

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": ("",), ".zst": ("", ".gz")}
"""Endings of compressed files, each with those of the copies that are read instead where there are such."""


@dataclass
class LeftOut:
    """What in a folder is not read: how many entries of each kind, and the first names."""

    kinds: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kinds.values())

    def add(self, path: Path, kind: str = "") -> None:
        """Count an entry; its kind is its suffix if no other reason is given."""
        if not kind:
            kind = "hidden" if path.name.startswith(".") else path.suffix.lower() or "without a suffix"
        kind = shortened(kind, 30) if len(self.kinds) < 20 or kind in self.kinds else "other"
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.first) < 8:
            self.first.append(shortened(path.name, 80))

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "kinds": self.kinds, "first": self.first}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LeftOut:
        """The inverse of `as_json`. Raises ValueError, KeyError or TypeError for anything else."""
        found = cls(dict(content["kinds"]), list(content["first"]))
        if not (all(map(is_count, found.kinds.values())) and all(isinstance(name, str) for name in found.first)):
            raise ValueError("expected counts and names")
        return found

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        more = ", ..." * (self.count > len(self.first))
        return f"left out {self.count:,}: {kinds} ({', '.join(self.first)}{more})"


def text_kind(name: str) -> tuple[str, str]:
    """(suffix, compression) of a file that can be read, by its name in any case; two empty strings for another.

    >>> text_kind("Part-0.JSONL.gz"), text_kind("a.parquet"), text_kind("a.csv")
    (('.jsonl', '.gz'), ('.parquet', ''), ('', ''))
    """
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = os.path.splitext(name.removesuffix(compression))[1]
    known = suffix in SUFFIXES and not (compression and suffix == ".parquet")  # parquet compresses its pages itself
    return (suffix, compression) if known else ("", "")


def find_files(
    inputs: Sequence[str | Path], suffixes: Sequence[str] = SUFFIXES, text_field: str = "text"
) -> tuple[tuple[Path, ...], LeftOut]:
    """The files of these suffixes among `inputs`, each once, and an account of what is left out.

    Folders are searched through, linked ones too, and their files sorted. Names that begin with a dot are not read.
    Raises DataError naming an input that is missing, of another kind, or a folder without such files.
    """
    kinds = ", ".join(suffixes)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    left_out = LeftOut()
    for given in map(Path, inputs):
        if given.is_dir():
            if _identity(given) in seen:
                continue
            files = sorted(_files_below(given.resolve(), seen, left_out))
            known = frozenset(files)
            wanted = [file for file in files if _is_wanted(file, suffixes, text_field, known, left_out)]
            if not wanted:
                others = f" ({left_out})" if left_out.count else ""
                raise DataError(
                    f"expected {kinds} files in folder {given}, found none{others}: choose another with --input"
                )
            found += wanted
        elif not given.exists():
            raise DataError(f"expected a file or folder at {given}, found nothing: look at --input")
        elif text_kind(given.name)[0] not in suffixes:
            raise DataError(f"expected a file of kind {kinds}, found {given}: convert or rename it")
        elif not given.is_file():
            raise DataError(f"{given}: expected a regular file, found {kind_of(given.stat().st_mode)}; copy it to one")
        else:
            found.append(_without_links(given))
    return tuple(dict.fromkeys(found)), left_out


def _without_links(given: Path) -> Path:
    """The file that a link leads to, but for one of another name's kind: Hugging Face caches call files by hash."""
    own, real = given.parent.resolve() / given.name, given.resolve()
    return real if text_kind(real.name) == text_kind(own.name) else own


def _files_below(folder: Path, seen: set[tuple[int, int]], left_out: LeftOut) -> Iterator[Path]:
    """The regular files of a folder and those in it, each folder once, and by its own name where it has one."""
    folders, links = [folder], []
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        if _identity(place) in seen:
            continue
        seen.add(_identity(place))
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                left_out.add(path)
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                yield path
            else:
                left_out.add(path, kind_of(path.stat().st_mode) if path.exists() else "links to nothing")
        links.sort()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_wanted(
    file: Path, suffixes: Sequence[str], text_field: str, known: Collection[Path], left_out: LeftOut
) -> bool:
    suffix, compression = text_kind(file.name)
    if suffix not in suffixes:
        left_out.add(file)
    elif compression and any(file.with_suffix(other) in known for other in COMPRESSIONS[compression]):
        left_out.add(file, "compressed copies")
    elif suffix == ".json" and not compression and _is_metadata(file, text_field):
        left_out.add(file, ".json without documents")
    else:
        return True
    return False


def _is_metadata(file: Path, text_field: str) -> bool:
    """Whether a .json is one object that is no document, as datasets have next to their files."""
    try:
        content = parse_json(read_bytes(file, limit=MB))
    except (ValueError, DataError):
        return False
    return isinstance(content, dict) and text_field not in content
