"""benchmarks/time_to_loss.py: which lines are losses, and when a loss was reached. Its figures are nobody's test."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from scripts import load_script

script = load_script("benchmarks/time_to_loss.py")


@pytest.mark.parametrize(
    ("line", "theirs", "ours"),
    [
        ("step 250: train loss 2.4000, val loss 2.4123\n", 2.4123, None),
        ("step 0: train loss 4.2000, val loss 4.2123\n", None, None),
        ("iter 12: loss 3.1000, time 4.00ms, mfu -100.00%\n", None, None),
        ("    50 val   loss 2.5091  accuracy 20%\n", None, 2.5091),
        ("    50 train loss 2.5091\n", None, None),
    ],
)
def test_the_lines_that_hold_a_validation_loss(line: str, theirs: float | None, ours: float | None) -> None:
    assert script.printed_loss(line) == theirs
    assert script.logged_loss(line) == ours


def test_the_clock_is_read_when_a_line_comes(tmp_path: Path) -> None:
    lines = [f"step {k}: train loss 3, val loss {loss}" for k, loss in ((1, 2.1), (2, 1.9))]
    code = f"import time; print({lines[0]!r}); time.sleep(0.5); print({lines[1]!r})"
    marks = script.marks([sys.executable, "-u", "-c", code], tmp_path, time.perf_counter(), script.printed_loss)
    (first, high), (second, low) = marks
    assert (high, low) == (2.1, 1.9)
    assert second - first > 0.4
    assert [script.seconds_to(loss, marks) for loss in (2.2, 2.0, 1.88)] == [first, second, None]
    found = script.medians([marks, [(1.0, 2.0)], [(3.0, 1.0)]])
    assert found["2.0"] == sorted([second, 1.0, 3.0])[1]
    assert found["1.88"] is None


def test_the_split_is_nanogpts(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(1, 102)))
    script.write_characters(str(tmp_path / "text"), str(tmp_path / "data"))
    from gptlab.data.corpus import open_corpus

    corpus = open_corpus(tmp_path / "data")
    assert corpus.read("train", 0).tolist() == list(range(1, 91))
    assert corpus.read("val", 0).tolist() == list(range(91, 102))
