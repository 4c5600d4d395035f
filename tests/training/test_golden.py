"""Twenty losses of shakespeare-tiny-v1 with the block loss, kept: a change of any number in training shows here.

python tests/training/test_golden.py    writes them to tests/golden.json, after a change that is meant
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.signals import SignalConfig
from gptlab.training import TrainingConfig
from gptlab.training.block_graph import Batch
from gptlab.training.optimizer import build_optimizer
from gptlab.training.presets import PRESETS
from gptlab.training.state import TrainingState
from gptlab.training.step import update

GOLDEN = Path(__file__).parents[1] / "golden.json"
STEPS = 20
TOLERANCE = 1e-4
"""In nats: other processors and thread counts round otherwise, and twenty updates make more of it."""

VERSE = """Tell me, said the first, what you are sure of.
Of the sea, said the second, and of nothing else.
Then say what follows, and I shall tell you whether it was so.
"""


def text() -> torch.Tensor:
    """So many bytes that no two updates see the same: the verse, its words in an order that a rule turns each time."""
    words = VERSE.split()
    lines = (" ".join(words[(i * k + i) % len(words)] for i in range(11)) for k in range(1200))
    return torch.tensor(list("\n".join(lines).encode()))


def losses() -> dict[str, Any]:
    """The preset's own config but for its length; the text's windows in their order."""
    config = TrainingConfig(**PRESETS["shakespeare-tiny-v1"], signal=SignalConfig("confidence"))
    shape = GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    model = GPT(shape, config.seed)
    state = TrainingState(model, build_optimizer(model, config))
    compute = ComputeConfig(torch.device("cpu"), None, 1, False, {})
    B, T, tokens = config.sequences, config.block_size, text()
    found = []
    for step in range(STEPS):
        start = step * B * T
        rows = tokens[start : start + B * T + 1]
        batch = Batch(rows[:-1].view(B, T), rows[1:].view(B, T), step, config.seed, 0)
        done = update(state, config, [batch], World(), compute, measure_dose=step == 0)
        found.append((done.loss, done.signal_loss, done.grad_norm, done.dose))
    return {
        "loss": [round(one[0], 6) for one in found],
        "signal_loss": [round(one[1], 6) for one in found],
        "first_grad_norm": round(found[0][2], 6),
        "first_dose": round(found[0][3] or 0.0, 6),
    }


def test_twenty_losses_are_the_ones_that_were_kept() -> None:
    kept, found = json.loads(GOLDEN.read_text(encoding="utf-8"))["training"], losses()
    assert kept["loss"][0] - kept["loss"][-1] > 1.0, "the kept run learns"
    for name in ("loss", "signal_loss"):
        assert found[name] == pytest.approx(kept[name], abs=TOLERANCE), name
    for name in ("first_grad_norm", "first_dose"):
        assert found[name] == pytest.approx(kept[name], rel=1e-3), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    GOLDEN.write_text(json.dumps({**kept, "training": losses()}, indent=1) + "\n", encoding="utf-8")
