"""An update whose signals read other sequences than its true loss: each part against updates that know no parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import WINDOWS, Run, make_run

from gptlab.distributed import World
from gptlab.signals import SignalConfig
from gptlab.training.block_graph import Batch
from gptlab.training.step import Update, update

SIGNALS: dict[str, dict[str, Any]] = {
    "confidence": {"signal": SignalConfig("confidence")},
    "live, some positions": {"signal": SignalConfig("advantage", evaluator="live", positions=0.5)},
    "local, embeddings left alone": {"signal": SignalConfig("brier", reach="local", embeddings=False)},
    "shuffled": {"signal": SignalConfig("confidence", control="shuffled")},
    "placebo": {"signal": SignalConfig("brier", control="placebo")},
    "two": {"signal": SignalConfig("confidence"), "also": (SignalConfig("entropy", layers="rotate"),)},
}


def others(run: Run, m: int) -> Iterator[Batch]:
    """Batch m of the signal's own: other windows of the text, with draws of their own."""
    for batch in run.batches((5, 7)):
        rows = [(shard, (window + 7 * (m + 1)) % WINDOWS) for shard, window in batch.names]
        tokens = run.text[[window for _, window in rows]]
        yield replace(batch, tokens=tokens[:, :-1], targets=tokens[:, 1:], windows=rows, step=100 + m)


def made_of(run: Run, batches: list[Batch]) -> tuple[Update, torch.Tensor]:
    """The update and its gradient, flat; gradients are not clipped here."""
    done = update(run.state, run.config, batches, World(), run.compute)
    return done, torch.cat([p.grad.flatten() for p in run.state.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tried", SIGNALS)
def test_the_parts_of_one_batch_add_up_to_the_whole(tried: str) -> None:
    expected, whole = made_of(run := make_run(**SIGNALS[tried]), list(run.batches()))
    run = make_run(**SIGNALS[tried])
    batches = list(run.batches((4, 8)))
    parts = [replace(b, part="true loss") for b in batches] + [replace(b, part="signals") for b in batches]
    done, found = made_of(run, parts)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
    assert done.loss == pytest.approx(expected.loss, rel=1e-12)
    assert done.signal_loss == pytest.approx(expected.signal_loss, rel=1e-12)
    for ours, theirs in zip(done.by_judge, expected.by_judge, strict=True):
        assert [x is None for x in ours] == [x is None for x in theirs]
        assert [x or 0.0 for x in ours] == pytest.approx([x or 0.0 for x in theirs], rel=1e-12)


@pytest.mark.parametrize("tried", [name for name in SIGNALS if name != "placebo"])
def test_a_signal_is_averaged_over_batches_of_its_own(tried: str) -> None:
    """The gradient is the true loss's on one batch and the mean of the signals' on three others."""
    run = make_run()
    true, gradient = made_of(run, list(run.batches()))
    signal_loss = 0.0
    for m in range(3):
        plain, without = made_of(run := make_run(), list(others(run, m)))
        whole, with_signals = made_of(run := make_run(**SIGNALS[tried]), list(others(run, m)))
        gradient = gradient + (with_signals - without) / 3
        signal_loss += whole.signal_loss / 3
        assert whole.loss == plain.loss
    run = make_run(**SIGNALS[tried])
    parts = [replace(b, part="true loss") for b in run.batches()]
    parts += [replace(b, part="signals", share=b.share / 3) for m in range(3) for b in others(run, m)]
    done, found = made_of(run, parts)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
    assert done.loss == pytest.approx(true.loss, rel=1e-12)
    assert done.signal_loss == pytest.approx(signal_loss, rel=1e-12)


def test_a_placebo_is_as_long_as_its_signals_average() -> None:
    lengths = []
    for control in ("none", "placebo"):
        run = make_run(signal=SignalConfig("brier", control=control))
        parts = [replace(b, part="true loss", share=1e-9) for b in run.batches()]
        parts += [replace(b, part="signals", share=b.share / 3) for m in range(3) for b in others(run, m)]
        lengths.append(made_of(run, parts)[1].norm().item())
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-6)
    assert lengths[0] > 0.01


def test_all_judges_that_spoke_in_some_batch_are_reported() -> None:
    run = make_run(signal=SignalConfig("confidence", layers="rotate"))
    parts = [replace(b, part="true loss") for b in run.batches()]
    parts += [replace(b, part="signals", share=b.share / 9) for m in range(9) for b in others(run, m)]
    done, _ = made_of(run, parts)
    assert all(value is not None for value in done.by_judge[0])
