"""The tuned lens: gradients against autograd, a fit whose answer is known, and the file they lie in."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.signals import readout, tuned_lens
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
