"""Readings in chunks against autograd on all logits at once; the tuned lens, a fit with a known answer, its file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gptlab.errors import CheckpointError
from gptlab.model import GPT, GPTConfig
from gptlab.signals import SIGNALS, readout, tuned_lens
from gptlab.signals.readout import LossFunction, Readout, chunk_rows, true_loss
from gptlab.signals.tuned_lens import (
    FINAL_BLOCK,
    TRUE_TOKEN,
    TunedLens,
    add_gradients,
    divergences,
    fit,
    load,
    path_of,
    save,
)

N, V, C = 11, 61, 12
SCALE = 0.37


def model(dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose norm has a bias and whose head is strong enough to be sure of itself."""
    built = GPT(GPTConfig(block_size=8, vocab_size=V, n_layer=1, n_head=1, n_embd=C))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (built.wte.weight, built.ln_f.weight, built.ln_f.bias):
            parameter.normal_(0.3, 1.0, generator=generator)
    return built.to(dtype)


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, C), another block's, and true tokens (N,)."""
    generator = torch.Generator().manual_seed(6)
    h, other = (torch.randn(N, C, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    y = torch.randint(V, (N,), generator=generator)
    with torch.no_grad():
        y[::3] = model().read(h.double()).argmax(1)[::3]  # so that some are right, which one signal asks for
    return h, other, y


def signal(name: str) -> LossFunction:
    def value(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
        return SIGNALS[name](z, y, other=other, threshold=0.3)

    return value


VALUES: dict[str, LossFunction] = {"true_loss": true_loss} | {name: signal(name) for name in SIGNALS}
NEEDY = [name for name in SIGNALS if SIGNALS[name].needs]


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", sorted(VALUES))
def test_reading_equals_autograd_on_all_logits(name: str, learn: bool) -> None:
    value, (h, other, y) = VALUES[name], states()
    needs = other if name in NEEDY else None

    naive = model()
    leaf = h.clone().requires_grad_()
    others = None if needs is None else naive.read(needs).detach()
    values = value(naive.read(leaf), y, others).sum()
    (SCALE * values).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-3

    for chunk in (1, 4, 100):
        read = model()
        reading = Readout(read, chunk=chunk).read(h, y, value, SCALE, learn=learn, other=needs)
        torch.testing.assert_close(reading.total, values.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reading.gradient, leaf.grad, rtol=1e-11, atol=1e-12)
        for ours, theirs in ((read.wte, naive.wte), (read.ln_f, naive.ln_f)):
            for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
                if learn:
                    torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-11, atol=1e-12)
                else:
                    assert parameter.grad is None


def test_learning_adds_to_the_gradient_that_is_there() -> None:
    (h, _, y), once, twice = states(), model(), model()
    Readout(once).read(h, y, true_loss, 2.0, learn=True)
    for _ in range(2):
        Readout(twice).read(h, y, true_loss, 1.0, learn=True)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_reading_leaves_the_hidden_states_alone() -> None:
    (h, other, y), read = states(), model()
    before = h.clone()
    h.requires_grad_()
    Readout(read).read(h, y, signal("advantage"), 1.0, learn=True, other=other)
    assert torch.equal(h.detach(), before)
    assert h.grad is None


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_alone_are_each_tokens(name: str) -> None:
    value, (h, other, y), read = VALUES[name], states(), model()
    needs = other if name in NEEDY else None
    others = None if needs is None else read.read(needs)
    expected = value(read.read(h), y, others).detach()
    for chunk in (1, 4, 100):
        found = Readout(read, chunk=chunk).values(h, y, value, needs)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not found.requires_grad


@pytest.mark.parametrize("name", ["true_loss", "confidence"])
def test_bfloat16_matmuls_are_close(name: str) -> None:
    (h, _, y), (exact, rough) = states(torch.float32), (model(torch.float32), model(torch.float32))
    expected = Readout(exact).read(h, y, VALUES[name], 1.0, learn=True)
    found = Readout(rough, torch.bfloat16).read(h, y, VALUES[name], 1.0, learn=True)
    assert found.gradient.dtype == torch.float32
    assert found.total.item() == pytest.approx(expected.total.item(), rel=0.02)
    for a, b in ((found.gradient, expected.gradient), (rough.wte.weight.grad, exact.wte.weight.grad)):
        assert a is not None
        assert b is not None
        assert 0 < ((a - b).norm() / b.norm()).item() < 0.05


def test_a_reading_where_no_token_passes_the_gate_is_zero() -> None:
    (h, _, y), read = states(), model()

    def closed(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
        return SIGNALS["gated_confidence"](z, y, threshold=1.0) * 0.0

    reading = Readout(read, chunk=5).read(h, y, closed, 1.0, learn=True)
    assert reading.total.item() == 0.0
    assert torch.equal(reading.gradient, torch.zeros_like(h))


class LargestReading(TorchDispatchMode):
    """The most rows of any tensor made that has the vocabulary as a dimension and is not the head's own size."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and V in tensor.shape and C not in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // V)
        return out


@pytest.mark.parametrize("name", sorted(VALUES))
def test_no_logits_of_more_than_a_chunk_are_ever_held(name: str) -> None:
    (h, other, y), read = states(), model()
    needs = other if name in NEEDY else None
    for action in ("read", "values"):
        readout = Readout(read, chunk=4)
        with LargestReading() as largest:
            if action == "read":
                readout.read(h, y, VALUES[name], 1.0, learn=True, other=needs)
            else:
                readout.values(h, y, VALUES[name], needs)
        assert largest.rows == 4, action


def test_the_measure_of_the_test_above_sees_whole_logits() -> None:
    (h, _, y), read = states(), model()
    with LargestReading() as largest:
        true_loss(read.read(h), y).sum().backward()
    assert largest.rows == N


def test_chunks_of_a_large_vocabulary_are_bounded_by_memory() -> None:
    large = GPT(GPTConfig(block_size=1, vocab_size=50304, n_layer=1, n_head=1, n_embd=4))
    assert 64 <= Readout(large).chunk <= 128 * 2**20 // 4 // 50304
    assert Readout(large, torch.bfloat16).chunk <= 128 * 2**20 // 2 // 50304


def test_a_chunk_of_a_gpu_is_a_gigabyte_of_whole_tiles() -> None:
    assert chunk_rows(50304 * 2, on_gpu=True) == 10_624 == 83 * 128
    assert 2**30 - 128 * 50304 * 2 < 10_624 * 50304 * 2 <= 2**30
    assert chunk_rows(2**31, on_gpu=True) == 128
    assert chunk_rows(50304 * 2, on_gpu=False) == 1_334


def build() -> GPT:
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=3, n_head=1, n_embd=8), seed=1)
    with torch.no_grad():
        model.wte.weight.mul_(20)  # so that readings are of some confidence
    return model


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(20, (8, 8), generator=torch.Generator().manual_seed(step))


def drawn(model: GPT) -> TunedLens:
    lens, source = TunedLens.untuned(model), torch.Generator().manual_seed(3)
    lens.weight.normal_(0, 0.3, generator=source)
    lens.bias.normal_(0, 0.3, generator=source)
    return lens


def test_an_untuned_lens_changes_nothing_and_the_last_block_is_never_tuned() -> None:
    model, h = build(), torch.randn(2, 5, 8)
    assert all(torch.equal(TunedLens.untuned(model)(number, h), h) for number in (1, 2, 3))
    lens = drawn(model)
    expected = torch.einsum("btc,dc->btd", h, torch.eye(8) + lens.weight[1]) + lens.bias[1]
    torch.testing.assert_close(lens(2, h), expected)
    assert torch.equal(lens(3, h), h)


@pytest.mark.parametrize("objective", [FINAL_BLOCK, TRUE_TOKEN], ids=["final block", "true token"])
def test_losses_and_their_gradient_are_those_of_autograd(
    objective: tuned_lens.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "CHUNK_BYTES", 4 * 10 * 20)  # several chunks, and a last one that is not full
    model, given, targets = build(), tokens(), tokens(1)
    lens = drawn(model)
    found = add_gradients(lens, model, given, targets, objective, None)
    assert all(p.grad is None for p in model.parameters())

    weight, bias = lens.weight.clone().requires_grad_(), lens.bias.clone().requires_grad_()
    states = [h.detach().flatten(0, 1) for h in model.hidden_states(given)[1:]]
    final = model.read(states[-1]).log_softmax(1).detach()
    logits = [model.read(TunedLens(weight, bias)(j, states[j - 1])) for j in (1, 2)]
    if objective is FINAL_BLOCK:
        expected = [F.kl_div(z.log_softmax(1), final, reduction="batchmean", log_target=True) for z in logits]
        assert found == pytest.approx(divergences(model, given, lens), abs=1e-6)
    else:
        expected = [F.cross_entropy(z, targets.flatten()) for z in logits]
    assert found == pytest.approx([e.item() for e in expected], abs=1e-6)
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(lens.weight.grad, weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(lens.bias.grad, bias.grad, atol=1e-6, rtol=1e-4)


def test_a_fit_finds_the_map_that_makes_a_block_speak_as_the_last() -> None:
    """The last block only adds a constant, which an affine map of block 2 can add as well: KL goes to 0."""
    model = build()
    with torch.no_grad():
        last = model.blocks[-1]
        for p in (last.attn.c_proj.weight, last.mlp.c_proj.weight):
            p.zero_()
        last.mlp.c_proj.bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    before = divergences(model, tokens(99), TunedLens.untuned(model))
    steps: list[int] = []
    batches = ((tokens(step), tokens(step)) for step in itertools.count())
    lens = fit(
        TunedLens.untuned(model), model, batches, 150, learning_rate=0.02,
        progress=lambda step, found: steps.append(step),
    )  # fmt: skip
    after = divergences(model, tokens(99), lens)
    assert before[1] > 0.01
    assert after[1] < 0.01 * before[1]
    assert after[0] < 0.8 * before[0]
    assert steps == list(range(1, 151))
    assert lens.weight.grad is None


def test_a_kept_lens_belongs_to_its_weights(tmp_path: Path) -> None:
    model = build()
    lens, path = drawn(model), tmp_path / tuned_lens.FILE
    assert load(model, path) is None
    save(lens, model, path)
    found = load(model, path)
    assert found is not None
    assert torch.equal(found.weight, lens.weight)
    assert torch.equal(found.bias, lens.bias)
    with torch.no_grad():
        model.ln_f.bias[0] = 1
    with pytest.raises(CheckpointError, match="fitted to other weights"):
        load(model, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(model, path)


def test_a_lens_of_another_shape_is_refused_whatever_weights_it_names(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "reader.safetensors"
    L, C = model.config.n_layer, model.config.n_embd
    for weight, bias in (((L, C, C), (L, C)), ((L - 1, C, C + 1), (L - 1, C)), ((L - 1, C, C), (L - 1, 1))):
        save(TunedLens(torch.zeros(weight), torch.zeros(bias)), model, path)
        with pytest.raises(CheckpointError, match=f"expected maps of {L - 1} blocks {C} wide, found weights"):
            load(model, path)


def test_it_lies_in_the_runs_folder() -> None:
    assert (
        path_of("log/run") == path_of("log/run/checkpoints/step_00000100") == Path("log/run/tuned_reader.safetensors")
    )
