"""Gradients of groups: the same for any micro-batches, passes and ranks, and of one piece with an update's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SEQUENCES, Run, make_run
from torch import Tensor

from gptlab.signals import SignalConfig
from gptlab.training.block_graph import ActiveSignal
from gptlab.training.block_loss import accumulate
from gptlab.training.gradient_noise import (
    GroupGradients,
    Groups,
    GrowingProducts,
    inner_products,
    over_pairs,
    parts_by_block,
    products,
    sums_over,
)
from gptlab.training.gradient_sources import Gradients, GradientSources
from gptlab.training.parallel import global_norm

SIGNALS = (
    SignalConfig("confidence"),
    SignalConfig("confidence", control="placebo", evaluator="live"),
    SignalConfig("deep_supervision", control="shuffled"),
    SignalConfig("brier", control="flipped", flip=0.5),
)


def gathered(run: Run, groups: Groups, signals: tuple[SignalConfig, ...] = SIGNALS) -> GroupGradients:
    windows = run.text

    def rows(first: int, count: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        names = [(0, (first + b) % len(windows)) for b in range(count)]
        tokens = windows[[row for _, row in names]]
        return tokens[:, :-1], tokens[:, 1:], names

    active = [ActiveSignal(signal, 0.25) for signal in signals]
    return GroupGradients(run.state.model, active, groups, rows, torch.device("cpu"))


GROUPS, COUNT = Groups(first=0, size=4, seed=1), 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_micro_batches_do_not_change_a_group(batch_size: int) -> None:
    run = make_run()
    whole, cut = gathered(run, GROUPS), gathered(run, replace(GROUPS, batch_size=batch_size))
    for a, b in zip(whole(1), cut(1), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        assert global_norm(a) > 0


def test_groups_average_to_the_gradient_of_an_update_placebos_too() -> None:
    run = make_run()
    gather = gathered(run, GROUPS)
    sums, _ = sums_over(gather, range(3), [0] * len(run.weights), gather.zeros())
    factors = gather.factors(products(sums, sums, [0] * len(run.weights))[0])
    (batch,) = run.batches()
    sources = GradientSources(run.state.model, gather.signals, batch.seed)
    accumulate(run.state.model, batch, gather.signals, into=sources.into)
    sources.scale_placebos()
    assert SEQUENCES == COUNT * GROUPS.size
    for total, factor, expected in zip(sums, factors, [sources.true, *sources.parts], strict=False):
        for g, e in zip(total, expected, strict=True):
            torch.testing.assert_close(g * factor / 3, e, rtol=1e-9, atol=1e-12)


def test_gradients_made_twice_give_the_figures_of_gradients_kept() -> None:
    run = make_run()
    gather = gathered(run, GROUPS)
    parts, blocks = parts_by_block(run.state.model)
    assert (sorted(set(parts)), blocks) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    metric = [torch.full_like(p, 2.0) for p in run.state.model.parameters()]
    kept = inner_products(gather, COUNT, parts, [None, metric])
    growing = GrowingProducts(gather, parts, kept_bytes=0)
    for look in range(COUNT):  # looks between change nothing
        growing.add()
        assert len(growing.look()[0][0].own) == look + 1
    for plain, doubled, other in zip(*kept, growing.look()[0], strict=True):
        assert np.array_equal(plain.own, other.own)
        assert np.array_equal(plain.cross, other.cross)
        assert doubled.cross == pytest.approx(2 * plain.cross)
    # one pass, shared among two ranks, says the same of pairs
    halves = [sums_over(gather, groups, parts, gather.zeros()) for groups in (range(0, 3, 2), range(1, 3, 2))]
    both: list[Gradients] = [
        [a + b for a, b in zip(*of, strict=True)] for of in zip(halves[0][0], halves[1][0], strict=True)
    ]
    pairs = over_pairs(products(both, both, parts), halves[0][1] + halves[1][1], 3)
    expected = [over_pairs(part.cross.sum(0), part.own.sum(0), 3) for part in kept[0]]
    assert pairs == pytest.approx(np.array(expected), rel=1e-9, abs=1e-15)


def test_shared_blocks_are_one_part() -> None:
    parts, blocks = parts_by_block(make_run(share_blocks=True).state.model)
    assert blocks == [0, 0, 0, 0]
    assert set(parts) == {0, 1}
