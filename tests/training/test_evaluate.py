"""Validation against a naive cross-entropy, with a known corruption undone, and at its fitted temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from small_run import make_run
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.data.shards import write_shard
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.training import TrainingConfig
from gptlab.training.controls import LEAST_PROBABILITY as LEAST
from gptlab.training.controls import clean_loss, undo_uniform_flips
from gptlab.training.evaluate import SHAPE, Validation, tempered, validate

T = 16
CPU = ComputeConfig(torch.device("cpu"), None, 1, False, {})


@pytest.fixture(scope="module")
def model() -> GPT:
    """Sure of itself by place and token, so that windows differ."""
    model = GPT(GPTConfig(block_size=T, vocab_size=256, n_layer=3, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@pytest.fixture
def windows(tiny_corpus: Path) -> Callable[..., ValidationWindows]:
    def cut(tokens: int = 512, folder: Path = tiny_corpus) -> ValidationWindows:
        return ValidationWindows(open_corpus(folder), T, 256, tokens)

    return cut


def validated(model: GPT, windows: ValidationWindows, compute: ComputeConfig = CPU) -> Validation:
    found = validate(model, windows, World(), compute)
    assert found is not None
    return found


@torch.no_grad()
def naive(model: GPT, windows: ValidationWindows) -> tuple[Tensor, Tensor]:
    """Every block's mean loss (L, n) and mean top probability (L, n) of every window, one at a time in float64."""
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    twin.double()
    losses, sure = [], []
    for n in range(len(windows)):
        tokens, targets = windows.rows(n, 1)
        logits = [twin.read(h)[0] for h in twin.hidden_states(tokens)[1:]]
        losses.append(torch.stack([cross_entropy(z, targets[0]) for z in logits]))
        sure.append(torch.stack([z.softmax(1).amax(1).mean() for z in logits]))
    return torch.stack(losses, 1), torch.stack(sure, 1)


@pytest.mark.parametrize("tokens", [16, 8 * 16, 9 * 16, 512])
def test_validation_is_the_naive_cross_entropy_of_every_window(
    tokens: int, model: GPT, windows: Callable[..., ValidationWindows]
) -> None:
    given = windows(tokens)
    found, (losses, sure) = validated(model, given), naive(model, given)
    assert len(given) == tokens // 16
    torch.testing.assert_close(found.windows, losses[-1], rtol=1e-6, atol=1e-6)
    assert len(given) == 1 or found.windows.std() > 0.05
    assert found.loss == pytest.approx(losses[-1].mean().item(), rel=1e-6)
    first = losses[:, :SHAPE].mean(1), sure[:, :SHAPE].mean(1)
    assert found.block_loss == pytest.approx(first[0].tolist(), rel=1e-5)
    assert found.block_confidence == pytest.approx(first[1].tolist(), rel=1e-5)


def test_a_window_has_the_same_loss_whatever_comes_after_it(
    model: GPT, windows: Callable[..., ValidationWindows]
) -> None:
    """To the last bit, also where the last batch is filled up with zeros."""
    many = validated(model, windows(512)).windows
    for tokens in (16, 5 * 16, 9 * 16):
        assert torch.equal(validated(model, windows(tokens)).windows, many[: tokens // 16])


def test_the_layout_of_shards_does_not_count(
    model: GPT, windows: Callable[..., ValidationWindows], tiny_corpus: Path, tmp_path: Path
) -> None:
    whole = windows(512)
    stream = open_corpus(tiny_corpus).read("val", 0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "tokenizer.txt").write_text("bytes\n")
    write_shard(folder / "train_000000.bin", np.zeros(100, dtype=np.uint16))
    for n, part in enumerate((stream[:70], stream[70:75], stream[75:])):
        write_shard(folder / f"val_{n:06d}.bin", np.asarray(part))
    parted = windows(512, folder)
    assert parted.sha256 == whole.sha256
    assert torch.equal(validated(model, parted).windows, validated(model, whole).windows)


def test_probabilities_of_named_tokens_are_the_naive_ones_and_change_no_loss(
    model: GPT, windows: Callable[..., ValidationWindows]
) -> None:
    """Figures that a source names: read with the loss, of any number, also where the last batch is filled up."""
    for tokens in (16, 9 * 16, 512):
        plain, given = windows(tokens), windows(tokens)
        n = len(given)
        drawn = torch.randint(-1, 256, (2, n, T), generator=torch.Generator().manual_seed(tokens))
        drawn[1, :, 1:] = -1
        given.wanted = {"everywhere": drawn[0], "first": drawn[1]}
        found, without = validated(model, given), validated(model, plain)
        assert torch.equal(found.windows, without.windows)
        assert (found.loss, found.accuracy, without.named) == (without.loss, without.accuracy, {})
        p = model(given.rows(0, n)[0]).double().softmax(2)
        for name, which in given.wanted.items():
            picked = p.gather(2, which.clamp(min=0)[..., None])[..., 0][which >= 0]
            assert found.named[name] == pytest.approx(picked.mean().item(), rel=1e-5)


def test_named_figures_cost_no_other_pass(
    model: GPT, windows: Callable[..., ValidationWindows], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, passes = windows(9 * 16), []
    given.wanted = {"named": torch.full((9, T), 3)}
    real = GPT.hidden_states
    monkeypatch.setattr(GPT, "hidden_states", lambda self, tokens: passes.append(1) or real(self, tokens))
    validated(model, given)
    assert len(passes) == 2  # batches of 8 windows


def test_bfloat16_is_close(model: GPT, windows: Callable[..., ValidationWindows]) -> None:
    rough = ComputeConfig(torch.device("cpu"), torch.bfloat16, 1, False, {})
    found, exact = validated(model, windows(512), rough), validated(model, windows(512))
    assert found.loss == pytest.approx(exact.loss, rel=5e-3)
    assert found.loss != exact.loss


def test_validation_changes_nothing_and_can_be_interrupted(
    model: GPT, windows: Callable[..., ValidationWindows]
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    asked = []

    def interrupted() -> bool:
        asked.append(True)
        return len(asked) == 2

    assert validate(model, windows(512), World(), CPU, interrupted) is None
    assert len(asked) == 2
    validated(model, windows(512))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_validation_between_updates_leaves_training_alone(windows: Callable[..., ValidationWindows]) -> None:
    """Bit for bit: readers and working copies are shared with training."""
    watched, plain = (make_run(dtype=torch.float32) for _ in range(2))
    given = windows(64)
    given.stream = given.stream % 31
    given.block_size, given.count = 8, 8
    for run in (watched, plain):
        for _ in range(3):
            run.update()
            if run is watched:
                validated(run.state.model, given)
    assert all(torch.equal(p, plain.weights[name]) for name, p in watched.weights.items())


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


HERE = ComputeConfig(torch.device("cpu"), None, 1, compile=False)


@pytest.fixture
def held_out(tmp_path: Path) -> ValidationWindows:
    (tmp_path / "tokenizer.txt").write_text("bytes\n")
    draw = np.random.Generator(np.random.PCG64(3))
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}_000000.bin", draw.integers(0, 20, 700).astype(np.uint16))
    return ValidationWindows(open_corpus(tmp_path), 16, 256, 700)


def overconfident(sharpness: float) -> GPT:
    """A model whose logits are multiplied by `sharpness`."""
    built = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16), seed=5)
    with torch.no_grad():
        built.ln_f.weight.mul_(sharpness)
        built.ln_f.bias.mul_(sharpness)
    return built


def fitted(built: GPT, windows: ValidationWindows) -> tuple[float, float]:
    """Its temperature and the loss at it, over all windows."""
    found = validate(built, windows, World(), HERE, keep=10**6)
    assert found is not None
    assert found.kept_windows == len(windows)
    return tempered(built, found, World(), HERE)


def test_it_is_the_minimum_over_one_division_of_all_logits(held_out: ValidationWindows) -> None:
    sharp = overconfident(60.0)
    temperature, loss = fitted(sharp, held_out)
    tokens, targets = held_out.rows(0, len(held_out))
    with torch.no_grad():
        logits = sharp(tokens).flatten(0, 1).double()

    def at(log_temperature: float) -> float:
        return cross_entropy(logits / np.exp(log_temperature), targets.flatten()).item()

    found = minimize_scalar(at, bounds=(-5, 8), method="bounded", options={"xatol": 1e-8})
    assert loss == pytest.approx(found.fun, rel=1e-6)
    assert temperature == pytest.approx(np.exp(found.x), rel=1e-3)
    assert loss < at(0.0) - 0.5


def test_scaling_the_logits_scales_the_temperature_and_leaves_the_loss(held_out: ValidationWindows) -> None:
    once, twice = (fitted(overconfident(s), held_out) for s in (20.0, 40.0))
    assert twice[0] == pytest.approx(2 * once[0], rel=1e-3)
    assert twice[1] == pytest.approx(once[1], rel=1e-6)
