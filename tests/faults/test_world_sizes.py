"""A run that goes on with other numbers of processes: the same losses, and on request the same bits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, options, outcome, rows

pytestmark = pytest.mark.slow

SITTINGS = (1, 2, 4, 1)
QUIET = {"steps": 16, "schedule": "constant", "eval_every": 0, "checkpoint_every": 100, "sample_every": 0,
         "batch_size": 2, "rank_timeout": 120}  # fmt: skip
DETERMINISTIC, MUON = QUIET | {"deterministic": None}, QUIET | {"optimizer": "muon"}
TOLERANCE = 1e-4
"""Nats; losses of 16 updates at a learning rate of 0.01 differ by a hundredth of that."""


def train(sittings: list[tuple[int, list[str]]]) -> None:
    """Train in so many processes with these options, one sitting after the other."""
    driver = [sys.executable, str(Path(__file__).with_name("world_sizes.py"))]
    done = subprocess.run(driver, input=json.dumps(sittings), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0] * processes for processes, _ in sittings], done.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if row["kind"] in ("train", "val")]


@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_one_two_four_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """A signal whose dose is measured now and then, so that parts of gradients are summed too; Muon in another run."""
    cuts = [*sorted(choose.sample(range(1, 16), 3)), 16]

    def changing(run: str, last: dict[str, Any], **how: Any) -> list[tuple[int, list[str]]]:
        each = [(n, {**how, "steps": stop}) for n, stop in zip(SITTINGS, cuts, strict=True)]
        each[-1] = (each[-1][0], each[-1][1] | last)
        return [(n, options(corpus, tmp_path / run, **changed)) for n, changed in each]

    at_last = {"eval_every": 100}
    train(
        [
            (1, options(corpus, tmp_path / "whole", **DETERMINISTIC | {"eval_every": 100})),
            *changing("changing", at_last, **DETERMINISTIC),
            *changing("fast", at_last, **QUIET),
            (2, options(corpus, tmp_path / "muon", **MUON)),
            *(
                (2, options(corpus, tmp_path / "muon in two", **QUIET | {"steps": n}, optimizer="muon"))
                for n in (7, 16)
            ),
        ]
    )
    assert outcome(tmp_path / "changing") == outcome(tmp_path / "whole")
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "whole"), abs=TOLERANCE)
    assert outcome(tmp_path / "fast")[0] != outcome(tmp_path / "whole")[0], "the fast path adds in another order"
    assert outcome(tmp_path / "muon in two") == outcome(tmp_path / "muon")


@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_blocks_cut_over_four_two_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """FSDP2's rows go on in other processes' hands; with the same number of them a stop changes no bit."""
    first, second = sorted(choose.sample(range(1, 16), 2))
    at_last = QUIET | {"eval_every": 100}
    cut = at_last | {"parallel": "fsdp", "batch_size": 1}
    sittings = ((4, first), (2, second), (1, 16))
    train(
        [
            (1, options(corpus, tmp_path / "whole", **at_last)),
            *((n, options(corpus, tmp_path / "cut", **cut | {"steps": stop})) for n, stop in sittings),
            (2, options(corpus, tmp_path / "two", **cut)),
            (2, options(corpus, tmp_path / "two saving", **cut | {"checkpoint_every": first, "steps": 16})),
            *((2, options(corpus, tmp_path / "stopped", **cut | {"steps": n, "eval_every": 0})) for n in (second, 16)),
            (2, options(corpus, tmp_path / "kept on", **cut | {"eval_every": 0})),
        ]
    )
    expected = losses(tmp_path / "whole")
    of_each_step = [row["loss"] for row in rows(tmp_path / "cut") if row["kind"] == "train"]
    assert of_each_step == pytest.approx(expected[: len(of_each_step)], abs=TOLERANCE)
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=TOLERANCE)
    assert outcome(tmp_path / "two saving") == outcome(tmp_path / "two")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "kept on")
