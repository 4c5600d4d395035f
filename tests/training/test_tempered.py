"""The fitted temperature against scipy's minimum on all logits, and what it says of a loss that was only misscaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.data.shards import write_shard
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.training.evaluate import tempered, validate

HERE = ComputeConfig(torch.device("cpu"), None, 1, compile=False)


@pytest.fixture
def windows(tmp_path: Path) -> ValidationWindows:
    (tmp_path / "tokenizer.txt").write_text("bytes\n")
    draw = np.random.Generator(np.random.PCG64(3))
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}_000000.bin", draw.integers(0, 20, 700).astype(np.uint16))
    return ValidationWindows(open_corpus(tmp_path), 16, 256, 700)


def model(sharpness: float) -> GPT:
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


def test_it_is_the_minimum_over_one_division_of_all_logits(windows: ValidationWindows) -> None:
    sharp = model(60.0)
    temperature, loss = fitted(sharp, windows)
    tokens, targets = windows.rows(0, len(windows))
    with torch.no_grad():
        logits = sharp(tokens).flatten(0, 1).double()

    def at(log_temperature: float) -> float:
        return cross_entropy(logits / np.exp(log_temperature), targets.flatten()).item()

    found = minimize_scalar(at, bounds=(-5, 8), method="bounded", options={"xatol": 1e-8})
    assert loss == pytest.approx(found.fun, rel=1e-6)
    assert temperature == pytest.approx(np.exp(found.x), rel=1e-3)
    assert loss < at(0.0) - 0.5


def test_scaling_the_logits_scales_the_temperature_and_leaves_the_loss(windows: ValidationWindows) -> None:
    once, twice = (fitted(model(s), windows) for s in (20.0, 40.0))
    assert twice[0] == pytest.approx(2 * once[0], rel=1e-3)
    assert twice[1] == pytest.approx(once[1], rel=1e-6)
