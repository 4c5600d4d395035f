"""The ledger: lines are added and never changed, and whatever is changed is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.errors import DataError
from gptlab.judge.lab import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path)
    with found.locked():
        found.add_note({"kind": "declared"})
        for number in range(3):
            found.add_note({"kind": "confirmation", "idea": f"idea {number}"})
            found.add_try({"verdict": "discard", "difference": 0.1 * number, "name": "Süd→"})
    return found


def test_what_was_added_is_read_again(ledger: Ledger) -> None:
    tries, journal = ledger.read()
    assert [line["line"] for line in tries] == [1, 2, 3]
    assert len(journal) == 4
    assert tries[1]["previous"] == tries[0]["hash"]


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "a verdict": lambda lines: [lines[0].replace("discard", "keep"), *lines[1:]],
    "a number": lambda lines: [*lines[:1], lines[1].replace("0.1", "0.2"), *lines[2:]],
    "blanks": lambda lines: [lines[0].replace('": ', '":  ', 1), *lines[1:]],
    "the order": lambda lines: lines[::-1],
    "a line removed": lambda lines: [lines[0], lines[2]],
    "the first removed": lambda lines: lines[1:],
    "the last removed": lambda lines: lines[:2],
    "all removed": lambda lines: [],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "another kind of line": lambda lines: [*lines, "[]"],
    "no JSON": lambda lines: [lines[0], "x", *lines[1:]],
    "a key twice": lambda lines: [lines[0][:-1] + ', "verdict": "keep"}', *lines[1:]],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_found(edit: str, ledger: Ledger, tmp_path: Path) -> None:
    with ledger.locked():
        ledger.add_note({"kind": "adopted"})
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(f"{line}\n" for line in EDITS[edit](path.read_text().splitlines())))
    with pytest.raises(DataError, match=r"ledger\.jsonl.*(edited|removed)"):
        ledger.read()


def test_an_edit_is_found_even_where_its_own_hash_was_made_new(ledger: Ledger, tmp_path: Path) -> None:
    from gptlab.judge.lab import digest

    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["verdict"] = "keep"
    lines[0]["hash"] = digest({key: value for key, value in lines[0].items() if key != "hash"})
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 2"):
        ledger.read()


def test_a_line_that_a_kill_cut_off_is_no_line_and_the_next_takes_its_place(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    for length in range(1, 40, 7):
        path.write_bytes(whole + whole[:length])
        assert len(ledger.read()[0]) == 3
    ledger.add_try({"verdict": "keep"})
    assert [line["verdict"] for line in ledger.read()[0]] == ["discard"] * 3 + ["keep"]
