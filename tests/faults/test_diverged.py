"""A loss or gradient that is no longer finite: no update, the step and the block named, exit code 4, on every rank."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Trainer, rows

from gptlab.runs import checkpoint
from gptlab.runs.folder import newest

pytestmark = pytest.mark.slow

ON_ONE_RANK = '''
"""The launcher, with a block that gives NaN on rank 1 from its update 6 on."""
import functools, os, sys
import torch
from gptlab.cli.main import guarded
from gptlab.cli.train import main

calls = 0

def spoil(module, arguments, output):
    global calls
    if type(module).__name__ == "MLP":
        calls += 1
        if calls > 40:
            return output * float("nan")

if os.environ["RANK"] == "1":
    torch.nn.modules.module.register_module_forward_hook(spoil)
sys.exit(guarded(functools.partial(main, defaults={"signal.name": "confidence"}), sys.argv[1:]))
'''


SPOILT = """
calls = 0

def nan(logits, targets):
    global calls
    calls += 1
    return logits[:, 0] * (float('nan') if calls == 3 else 1.0)
"""


def test_an_infinite_weight_to_start_from(trainer: Trainer, killed: Callable[[], Path], tmp_path: Path) -> None:
    """`--init_from` a checkpoint whose second block overflows: nothing is learnt from it, nothing saved over it."""
    good = checkpoint.load(newest(killed()))
    weights = dict(good.weights)
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.1.mlp.c_fc.weight"].clone()
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("inf")
    bad = checkpoint.save(tmp_path / "bad" / "checkpoints", weights, good.moments, good.state)
    run = tmp_path / "run"
    ended = trainer.train(run, init_from=bad)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    assert "diverged at step 0" in line
    assert "first in the output of block 2 (transformer.h.1)" in line
    assert "the weights were not changed" in line
    assert "Traceback" not in ended.err
    (row,) = rows(run)
    assert (row["kind"], row["event"], row["step"]) == ("event", "DivergedError", 0)
    assert row["text"] in line
    assert not checkpoint.complete(run / "checkpoints")


def test_too_large_a_learning_rate(trainer: Trainer, tmp_path: Path) -> None:
    """The last checkpoint before the fault is whole and finite; the rows say how far it went."""
    run = tmp_path / "run"
    ended = trainer.train(run, learning_rate=1e30, checkpoint_every=1, warmup_steps=0)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    event = rows(run)[-1]
    assert f"diverged at step {event['step']}" in line
    assert event["step"] == sum(row["kind"] == "train" for row in rows(run))
    saved = checkpoint.load(newest(run))
    assert saved.step == event["step"]
    assert all(w.isfinite().all() for w in saved.weights.values())


@pytest.mark.fault(number=9)
def test_on_one_rank_only_all_stop(trainer: Trainer, tmp_path: Path) -> None:
    run, launcher = tmp_path / "run", tmp_path / "spoilt.py"
    launcher.write_text(ON_ONE_RANK)
    ended = trainer.train(run, processes=2, launcher=launcher)
    assert ended.code != 0
    (line,) = ended.ours
    assert "in sequences 4 to 7 of the update" in line, "the second rank's"
    step = rows(run)[-1]["step"]
    assert f"diverged at step {step}" in line
    assert "first in the output of block 1 (transformer.h.0)" in line, "though the rank that speaks has it not"
    assert "gptlab/training" not in ended.err, "a traceback of ours"
    codes = set(re.findall(r"exitcode +: (-?\d+)", ended.err))
    assert "4" in codes
    assert codes <= {"4", "-15"}, "torchrun may end the second rank while it leaves"
    assert rows(run)[-1]["event"] == "DivergedError"
    saved = checkpoint.load(newest(run))
    assert saved.step <= step
    assert all(w.isfinite().all() for w in saved.weights.values())


@pytest.mark.fault(number=10)
def test_a_signal_that_gives_nan(trainer: Trainer, tmp_path: Path, choose: random.Random) -> None:
    """The signal, its judge, the step and the batch are named, not the true loss, which is well.

    Not finite is what judge 1 says, its only one, of the fifth sequence on.
    """
    run, signal = tmp_path / "run", tmp_path / "spoilt.py"
    signal.write_text(SPOILT)
    start = choose.randrange(1, 6)
    changes = {"signal.name": f"{signal}:nan", "signal.start": start, "allow_code": None, "batch_size": 2}
    ended = trainer.train(run, **changes)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    assert f"diverged at step {start}" in line
    assert f"the signal {signal}:nan of judge 1 (block 1) is not finite" in line
    assert "in sequences 4 to 5 of the update; the weights were not changed" in line
    assert [row["kind"] for row in rows(run)] == ["train"] * start + ["event"]
