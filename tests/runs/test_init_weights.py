"""Initial weights a hair off: by the amount asked for, by key, and no more than once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptlab.cli.main import main
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.runs.init_weights import jitter, model_of

SHAPE = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("amount", [1e-6, 1e-2])
def test_jitter_is_relative_and_drawn_by_seed_and_parameter(amount: float) -> None:
    model, again, other = GPT(SHAPE, 1), GPT(SHAPE, 1), GPT(SHAPE, 1)
    for twin, seed in ((model, 1), (again, 1), (other, 2)):
        jitter(twin, amount, seed)
    shares = []
    for (name, drawn), p, q, r in zip(
        GPT(SHAPE, 1).named_parameters(), model.parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if name.endswith("bias"):
            assert not p.any()
            continue
        assert not torch.equal(p, r)
        shares.append((p / drawn - 1).detach().flatten())
    share = torch.cat(shares)
    assert float(share.std()) == pytest.approx(amount, rel=0.02)
    assert abs(float(share.mean())) < amount / 50


def test_a_run_starts_jittered_and_goes_on_as_it_is(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """At a learning rate of 0 the weights stay what they were; a second sitting must not shake them again."""
    how = {"learning_rate": 0, "weight_decay": 0, "checkpoint_every": 2, "init_jitter": 1e-2}
    assert main(tiny(tmp_path / "run", steps=2, **how)) == 0
    assert main(tiny(tmp_path / "run", steps=4, **how)) == 0
    expected = GPT(SHAPE, 1)
    jitter(expected, 1e-2, 1)
    for p, q in zip(model_of(tmp_path / "run")[0].parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
