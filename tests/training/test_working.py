"""The fast path of a CPU gives what the plain one gives: working copies, blocks of rows, attention with kept scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_gradients import SIZE, build, furthest, gradients, naive, text
from torch.nn.functional import scaled_dot_product_attention

from gptlab.model import GPT, attention, working
from gptlab.model.working import Workspace, product
from gptlab.signals import SignalConfig
from gptlab.training import backward


@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize(
    "options",
    [{}, {"evaluator": "live"}, {"reach": "local"}, {"embeddings": False}, {"control": "shuffled"}, {"layers": (2,)}],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 4])
def test_working_copies_equal_the_naive_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, options: dict[str, Any], share_blocks: bool
) -> None:
    """In float64, so that nothing but the path differs."""
    monkeypatch.setattr(working, "NARROW", range(1, 100))
    config = SignalConfig("confidence", **options)
    model = build(share_blocks)
    Workspace(model, torch.float64, rows)
    for name, p in model.named_parameters():
        assert p.grad is None, name
    losses = backward(model, *text(), config)
    expected, true, signal_loss = naive(config, share_blocks)
    assert furthest(gradients(model), expected) < 1e-10
    assert losses.loss.item() == pytest.approx(true, rel=1e-12)
    assert losses.signal_loss.item() == pytest.approx(signal_loss, rel=1e-10)


def test_copies_follow_the_weights_only_when_refreshed() -> None:
    model = build()
    workspace, (tokens, _) = Workspace(model, torch.float64), text()
    before = model(tokens)
    with torch.no_grad():
        for p in model.transformer["h"].parameters():
            p.mul_(1.1)
        stale = model(tokens)
        workspace.refresh()
        fresh = model(tokens)
    assert not torch.equal(before, fresh)
    assert not torch.equal(stale, fresh)
    expected = build()
    with torch.no_grad():
        for p in expected.transformer["h"].parameters():
            p.mul_(1.1)
        torch.testing.assert_close(fresh, expected(tokens))


def test_bfloat16_copies_train_as_autocast_does() -> None:
    """The same products in the same dtype: gradients agree to bf16's own rounding."""
    size = replace(SIZE, n_embd=32)
    plain, copied = GPT(size, seed=2), GPT(size, seed=2)
    Workspace(copied, torch.bfloat16)
    for model in (plain, copied):
        backward(model, *text(), SignalConfig("brier"), autocast=torch.bfloat16)
    a, b = (torch.cat([g.flatten() for g in gradients(model).values()]) for model in (copied, plain))
    assert a.dtype == torch.float32
    assert ((a - b).norm() / b.norm()).item() < 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 600), (8, 600), (9, 600), (23, 512), (23, 100)])
def test_a_product_in_blocks_of_rows_is_the_product(n: int, m: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((n, 5), (5, m)))
    c = torch.randn(m, dtype=torch.float64, generator=generator) if bias else None
    expected = a @ b if c is None else a @ b + c
    torch.testing.assert_close(product(a, b, 8, c), expected)
    torch.testing.assert_close(product(a, b, 0, c), expected)


@pytest.mark.parametrize("T", [1, 7, 32])
def test_attention_with_kept_scores_is_attention(T: int) -> None:
    B, H, D = 2, 3, 4
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(B, T, 3 * H * D, dtype=torch.float64, generator=generator)
    dy = torch.randn(B, T, H * D, dtype=torch.float64, generator=generator)
    ours, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    y = attention._KeptScores.apply(ours, H)
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in theirs.split(H * D, dim=2))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)
    torch.testing.assert_close(y, expected)
    y.backward(dy)  # type: ignore[union-attr]
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_kept_scores_serve_short_bfloat16_sequences_on_a_processor_only() -> None:
    def used(T: int, dtype: torch.dtype) -> bool:
        y = attention.causal_attention(torch.zeros(1, T, 12, dtype=dtype, requires_grad=True), 2)
        return type(y.grad_fn).__name__.startswith("_KeptScores")

    assert used(attention.SHORT, torch.bfloat16)
    assert not used(attention.SHORT + 1, torch.bfloat16)
    assert not used(8, torch.float32)
