"""Undoing a known corruption, in closed form and in a run's validation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.training import TrainingConfig
from gptlab.training.controls import LEAST_PROBABILITY as LEAST
from gptlab.training.controls import clean_loss, undo_uniform_flips
from gptlab.training.evaluate import validate

SHARES = [0.1, 0.4, 0.7]


def corrupted(p: torch.Tensor, share: float) -> torch.Tensor:
    """What who knows p predicts of flipped targets: each token its own share, and a part of every other's."""
    V = p.shape[1]
    transitions = torch.full((V, V), share / (V - 1), dtype=p.dtype).fill_diagonal_(1 - share)
    return p @ transitions


@pytest.mark.parametrize("share", SHARES)
def test_what_is_undone_is_the_truth_again(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(50, 7, dtype=torch.float64, generator=generator).softmax(1)
    found = undo_uniform_flips(corrupted(p, share), share)
    torch.testing.assert_close(found, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
def test_what_falls_below_zero_is_clipped_and_the_rest_sums_to_one(share: float) -> None:
    """A model that denies a token altogether: q = (1, 0, 0) would be p = (1 + 2s, -s, -s)."""
    found = undo_uniform_flips(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), share if share < 2 / 3 else 0.5)
    s = (share if share < 2 / 3 else 0.5) / 2
    top = (1 - s) / (1 - 3 * s)
    assert found.tolist()[0] == pytest.approx([top / (top + 2 * LEAST), *[LEAST / (top + 2 * LEAST)] * 2], rel=1e-12)
    assert found.sum().item() == pytest.approx(1, rel=1e-15)


def test_the_loss_of_a_sure_model_in_closed_form() -> None:
    """q = (1-ρ, ρ/2, ρ/2) is certainty corrupted: right costs 2e-6, wrong log(1e6)."""
    logits = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64).log().repeat(2, 1)
    found = clean_loss(logits, torch.tensor([0, 2]), 0.2)
    assert found.tolist() == pytest.approx([math.log(1 + 2 * LEAST), math.log((1 + 2 * LEAST) / LEAST)], rel=1e-6)


def test_a_share_that_leaves_no_trace_cannot_be_undone() -> None:
    """1 - 1/V of uniform flips make all tokens alike; flips to the argmax are no known mixture."""
    shares = (0.0, 0.5, 0.99, 255 / 256, 0.999)
    assert [TrainingConfig(target_flip=share).undoable_flip for share in shares] == [0.0, 0.5, 0.99, 0.0, 0.0]
    assert TrainingConfig(target_flip=0.5, target_flip_to="argmax").undoable_flip == 0.0


def test_validation_takes_all_three_figures_at_true_targets(tiny_corpus: Path) -> None:
    T, share = 16, 0.3
    model = GPT(GPTConfig(block_size=T, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    windows = ValidationWindows(open_corpus(tiny_corpus), T, 256, 10 * T)
    compute = ComputeConfig(torch.device("cpu"), None, 1, False, {})
    plain, found = (validate(model, windows, World(), compute, flip=flip) for flip in (0.0, share))
    assert plain is not None
    assert found is not None
    tokens, targets = windows.rows(0, 10)
    with torch.no_grad():
        logits, y = model(tokens).flatten(0, 1).double(), targets.flatten()
    assert found.loss == plain.loss == pytest.approx(cross_entropy(logits, y).item(), rel=1e-6)
    assert found.accuracy == plain.accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item(), abs=1e-12)
    assert plain.clean_loss is None
    assert found.clean_loss is not None
    assert found.clean_loss == pytest.approx(clean_loss(logits, y, share).mean().item(), rel=1e-5)
    assert abs(found.clean_loss - found.loss) > 0.01
