"""A file of JSON lines to which lines are only added, each with the hash of the one before, so that an edit is found.

A chain cannot show that its end was cut off. So a lab has two: `ledger.jsonl`, one line a try, and `journal.jsonl`,
what was reserved and adopted; each line holds the head of the other chain as it stood, which has to be there still.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import GB, open_append, parse_json, read_text, take_lock

START = "0" * 64
"""What stands for the hash before the first line."""

Line = Mapping[str, Any]


class Chain:
    """One such file; `lines` reads and verifies it, `append` adds to it. Hold `locked` from reading to appending."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All whole lines; raises DataError naming the first that is not as it was written.

        What a kill left of a last line is no line: nobody was given its verdict.
        """
        try:
            whole = read_text(self.path, limit=GB, inside=self.path.parent).rpartition("\n")[0]
        except FileNotFoundError:
            return []
        found: list[Line] = []
        for number, text in enumerate(whole.split("\n") if whole else [], 1):
            found.append(self._checked(text, number, found[-1]["hash"] if found else START))
        return found

    def _checked(self, text: str, number: int, previous: str) -> Line:
        where = f"{self.path}, line {number}"
        try:
            line = parse_json(text, unique=True)
            recorded = line["hash"]
            content = {key: value for key, value in line.items() if key != "hash"}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{where}: expected a line of a ledger, found something else; it was edited") from None
        if recorded != digest(content) or text != _text(line):
            raise DataError(f"{where}: its content is not what its hash is of; it was edited: restore it from a copy")
        if content.get("previous") != previous:
            raise DataError(f"{where}: it does not follow the line before it; a line was removed or put in before it")
        return line

    def append(self, content: Mapping[str, Any]) -> Line:
        """Add a line and give it, with `line`, `time` (UTC), `previous` and `hash`; on disk when this returns."""
        before = self.lines()
        line = {"line": len(before) + 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **content}
        line["previous"] = before[-1]["hash"] if before else START
        line["hash"] = digest(line)
        with open_append(self.path) as file:
            file.truncate(sum(len(_text(one).encode()) + 1 for one in before))  # the rest of a line that a kill cut off
            file.write(_text(line).encode() + b"\n")
        return line


class Ledger:
    """The two chains of a lab's folder, which hold each other's heads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tries, self._journal = Chain(folder / "ledger.jsonl"), Chain(folder / "journal.jsonl")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The right to add lines; waits for whoever has it, for moments only."""
        lock = take_lock(self._folder / ".ledger.lock", wait=True)
        assert lock
        with lock:
            yield

    def read(self) -> tuple[list[Line], list[Line]]:
        """Tries and journal, verified, also against each other; raises DataError."""
        tries, journal = self._tries.lines(), self._journal.lines()
        for one, other, chain in ((tries, journal, self._journal), (journal, tries, self._tries)):
            heads = {line["hash"] for line in other} | {START}
            for line in one:
                if line.get("other") not in heads:
                    raise DataError(
                        f"{chain.path}: expected the line that was its last at {line['time']}, found it no more; lines "
                        "were removed: restore the file from a copy"
                    )
        return tries, journal

    def add_try(self, content: Mapping[str, Any]) -> Line:
        """Add a try; hold `locked`."""
        return self._tries.append({**content, "other": _head(self._journal.lines())})

    def add_note(self, content: Mapping[str, Any]) -> Line:
        """Add to the journal; hold `locked`."""
        return self._journal.append({**content, "other": _head(self._tries.lines())})


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, however its keys are ordered."""
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def _head(lines: list[Line]) -> str:
    return lines[-1]["hash"] if lines else START
