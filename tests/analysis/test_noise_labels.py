"""Verdicts as labels and collapse, by hand; and the tuned lens on a model that hides what it knows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gptlab.analysis.noise.estimators import QUANTILES, Readings, collapse, quality, token_figures
from gptlab.device import ComputeConfig
from gptlab.model import GPT, GPTConfig
from gptlab.signals.readout import Readout
from gptlab.signals.tuned_lens import TRUE_TOKEN, TunedLens, fit
from gptlab.training.evaluate import hidden_states


def readings() -> Readings:
    """Four tokens over three values, with the probabilities given."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.45, 0.4, 0.15]], dtype=torch.float64)
    return Readings.of(
        [token_figures(p.log()[:2], torch.tensor([0, 0])), token_figures(p.log()[2:], torch.tensor([0, 1]))]
    )


def test_coverage_precision_and_calibration_by_hand() -> None:
    found = quality(readings(), thresholds=(0.0, 0.5, 0.85, 0.99), bins=2)
    assert found["coverage"] == [1.0, 0.75, 0.25, 0.0]
    assert found["precision"] == [0.5, pytest.approx(2 / 3), 1.0, None]
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(-(math.log(0.5) + math.log(0.1) + math.log(0.9) + math.log(0.4)) / 4)
    low, high = found["reliability"]
    assert (low["count"], low["confidence"], low["accuracy"]) == (1, pytest.approx(0.45), 0.0)
    assert (high["count"], high["confidence"], high["accuracy"]) == (3, pytest.approx(2.2 / 3), pytest.approx(2 / 3))
    assert found["calibration_error"] == pytest.approx((0.45 + 0.2) / 4)
    assert quality(readings(), bins=15)["reliability"][0] == {"count": 0, "confidence": None, "accuracy": None}


def test_collapse_by_hand() -> None:
    found = collapse(readings())
    assert found["argmax_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert list(found["p_max"].values()) == pytest.approx(np.quantile([0.5, 0.8, 0.9, 0.45], QUANTILES).tolist())
    same = Readings.of([token_figures(torch.tensor([[3.0, 0.0, 0.0, 0.0]] * 5), torch.zeros(5, dtype=torch.long))])
    assert collapse(same)["argmax_entropy"] == 0
    assert collapse(same)["logit_rms"] == pytest.approx(1.5)
    even = Readings.of([token_figures(torch.zeros(5, 8), torch.zeros(5, dtype=torch.long))])
    assert collapse(even)["entropy"] == pytest.approx(math.log(8))


def test_a_tuned_lens_begins_as_the_identity_and_finds_what_a_block_hides() -> None:
    """Token t is followed by t + 1: the embedding says which, but not in the head's basis."""
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16), seed=1)
    placement = ComputeConfig(torch.device("cpu"), None, 1, False, {})
    with torch.no_grad():
        model.wte.weight.mul_(20)
    before = {name: p.clone() for name, p in model.named_parameters()}
    h = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    lens = TunedLens.untuned(model, blocks=2)
    assert torch.equal(lens(1, h), h)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            tokens = torch.randint(16, (8, 8), generator=generator)
            yield tokens, (tokens + 1) % 16

    fit(lens, model, batches(1), 200, TRUE_TOKEN)
    tokens, targets = next(batches(2))
    readout = Readout(model)
    for j, hidden in enumerate(hidden_states(model, tokens, placement)[1:], 1):
        flat, y = hidden.flatten(0, 1), targets.flatten()
        raw, tuned = (quality(Readings.of([readout.values(x, y, token_figures)])) for x in (flat, lens(j, flat)))
        assert raw["accuracy"] < 0.2
        assert tuned["accuracy"] > 0.9
        assert tuned["loss"] < 0.5 * raw["loss"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
