"""The fast path of a CPU gives what the plain one gives: working copies, rows in blocks, attention, GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_gradients import SIZE, build, furthest, gradients, naive, text
from small_run import make_run
from torch.nn.functional import gelu, scaled_dot_product_attention

from gptlab.device import ComputeConfig
from gptlab.model import GPT, GPTConfig, fast_cpu
from gptlab.model.fast_cpu import ShortAttention, WorkingLinear, install, product, replace_linears
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
    monkeypatch.setattr(fast_cpu, "NARROW_PRODUCTS", range(1, 100))
    config = SignalConfig("confidence", **options)
    model = build(share_blocks)
    replace_linears(model, torch.float64, rows)
    for name, p in model.named_parameters():
        assert p.grad is None, name
    losses = backward(model, *text(), config)
    expected, true, signal_loss = naive(config, share_blocks)
    assert furthest(gradients(model), expected) < 1e-10
    assert losses.loss.item() == pytest.approx(true, rel=1e-12)
    assert losses.signal_loss.item() == pytest.approx(signal_loss, rel=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_copies_follow_the_weights(fused: bool) -> None:
    """Whatever changes them in place; and a training step with the fused optimizer, which hides that it does."""
    model, expected, (tokens, _) = build(), build(), text()
    replace_linears(model, torch.float64)
    with torch.no_grad():
        before = model(tokens)
        for one in (model, expected):
            for p in one.transformer["h"].parameters():
                p.mul_(1.1)
        changed = model(tokens)
        assert not torch.equal(before, changed)
        torch.testing.assert_close(changed, expected(tokens))
    run = make_run(dtype=torch.float32)
    replace_linears(run.state.model, torch.float32)
    for group in run.state.optimizer.param_groups:
        group["fused"] = fused
    for _ in range(2):
        run.update()
        for layer in run.state.model.modules():
            if isinstance(layer, WorkingLinear):
                assert torch.equal(layer.operands(torch.float32)[0], layer.weight)


def test_a_pass_that_asks_for_no_weights_gradient_makes_none() -> None:
    """As of any layer: what a frozen judge passes on must not reach its weights."""
    model, (tokens, _) = build(), text()
    replace_linears(model, torch.float64)
    x = model.embed(tokens).detach().requires_grad_()
    y = model.blocks[0](x)
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert all(p.grad is None for name, p in model.named_parameters() if ".c_" in name)
    torch.autograd.backward(y, torch.ones_like(y))
    assert all(p.grad is not None for name, p in model.named_parameters() if "h.0." in name and ".c_" in name)


def test_modules_are_replaced_where_it_pays_and_parameters_keep_their_names() -> None:
    def kinds(compute: ComputeConfig, **options: Any) -> set[str]:
        model = GPT(GPTConfig(8, 31, 2, 2, 16))
        names = {name: id(p) for name, p in model.named_parameters()}
        install(model, compute, **options)
        assert {name: id(p) for name, p in model.named_parameters()} == names
        assert list(model.state_dict()) == list(GPT(model.config).state_dict())
        assert model.lm_head.weight is model.wte.weight, "tied"
        return {type(module).__name__ for module in model.modules()}

    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    fast = {"WorkingLinear", "ShortAttention", "SlopeGELU"}
    assert fast < kinds(ComputeConfig(cpu, bf16, 1, False))
    assert kinds(ComputeConfig(cpu, bf16, 1, False), copies=False) & fast == {"ShortAttention", "SlopeGELU"}
    assert not kinds(ComputeConfig(cpu, None, 1, False)) & fast
    assert not kinds(ComputeConfig(cpu, bf16, 1, True)) & fast
    assert not kinds(ComputeConfig(torch.device("cuda"), bf16, 1, False)) & fast


def test_bfloat16_copies_train_as_autocast_does() -> None:
    """The same products in the same dtype: gradients agree to bf16's own rounding."""
    size = replace(SIZE, n_embd=32)
    plain, copied = GPT(size, seed=2), GPT(size, seed=2)
    replace_linears(copied, torch.bfloat16)
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
    y = fast_cpu._KeptScores.apply(ours, H)
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in theirs.split(H * D, dim=2))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)
    torch.testing.assert_close(y, expected)
    y.backward(dy)  # type: ignore[union-attr]
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_kept_scores_serve_short_bfloat16_sequences_only() -> None:
    def used(T: int, dtype: torch.dtype) -> bool:
        y = ShortAttention(2)(torch.zeros(1, T, 12, dtype=dtype, requires_grad=True))
        return type(y.grad_fn).__name__.startswith("_KeptScores")

    assert used(fast_cpu.LONGEST_KEPT, torch.bfloat16)
    assert not used(fast_cpu.LONGEST_KEPT + 1, torch.bfloat16)
    assert not used(8, torch.float32)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 2**18 + 3)], ids=str)
def test_gelu_by_its_slope_is_gelu_rounded_once(shape: tuple[int, ...]) -> None:
    """Against float64: every value and slope within half a unit of bfloat16, and a little for fp32."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).mul_(3).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = fast_cpu.SlopeGELU("tanh")(ours), gelu(theirs, approximate="tanh")
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    assert ours.grad is not None
    assert theirs.grad is not None
    for found, exact in ((y, expected), (ours.grad, theirs.grad)):
        torch.testing.assert_close(found.double(), exact.detach(), rtol=1.01 * 2**-8, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(fast_cpu.SlopeGELU("tanh")(x), y), "without a gradient too"


def test_only_gpt2s_own_gelu_in_bfloat16_is_replaced() -> None:
    for form, dtype in (("tanh", torch.float32), ("none", torch.bfloat16), ("none", torch.float64)):
        x = torch.linspace(-3, 3, 99, dtype=dtype)
        assert torch.equal(fast_cpu.SlopeGELU(form)(x), gelu(x, approximate=form))
