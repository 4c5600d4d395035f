"""One rank of a small run over gloo, for test_step.py: RANK and WORLD_SIZE say which, the last word where to write.

Makes three updates of every run of RUNS and writes what rank 0 has then, as torch saves it.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
from small_run import make_run

from gptlab.distributed import World
from gptlab.signals import SignalConfig

PLACEBO = SignalConfig("advantage", control="placebo", evaluator="live", positions=0.5)
RUNS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "confidence": {"signal": SignalConfig("confidence"), "grad_clip": 0.5},
    "rotate": {"signal": SignalConfig("self_distillation", layers="rotate", positions=0.5)},
    "placebo": {"signal": PLACEBO},
    "shuffled and flipped": {
        "signal": SignalConfig("confidence", control="shuffled", dose=0.3),
        "also": (SignalConfig("brier", control="flipped", flip=0.5),),
    },
    "conversation": {"signal": SignalConfig("conversation", say=2, reply=2, turns=2, threshold=0.1, dose=0.2)},
    "objectives": {
        "signal": SignalConfig("multi_token_prediction", control="placebo", dose=0.2),
        "also": (SignalConfig("z_loss", control="shuffled"), SignalConfig("label_smoothing", control="flipped")),
    },
    "muon": {"optimizer": "muon", "learning_rate": 0.01},
    "deterministic": {"signal": PLACEBO, "deterministic": True, "threads": 1, "batch_size": 2, "dtype": torch.float32},
    "deterministic noise": {
        "deterministic": True,
        "threads": 1,
        "batch_size": 2,
        "dtype": torch.float32,
        "gradient_noise": 0.5,
        "gradient_noise_shape": "batch",
    },
    "batch noise": {"signal": PLACEBO, "gradient_noise": 0.5, "gradient_noise_shape": "batch", "target_flip": 0.3},
    "noise": {
        "signal": PLACEBO,
        "gradient_noise": 0.5,
        "gradient_bias": 0.2,
        "target_flip": 0.3,
        "target_flip_to": "argmax",
    },
}


def outcomes(world: World, cut: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every run after three updates, the second of which measures, and what the updates said."""
    found = {}
    for name, options in RUNS.items():
        run = make_run(**options)
        unit = run.config.batch_size
        pieces = (unit,) * (sum(cut) // unit) if run.config.deterministic else cut
        said = [run.update(pieces, world=world, measure_dose=step == 1) for step in range(3)]
        figures = [[u.loss, u.signal_loss, u.grad_norm, u.dose or 0.0, *u.weights, float(u.clipped)] for u in said]
        found[name] = {**run.weights, "said": torch.tensor(figures, dtype=torch.float64)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect(torch.device("cpu"), timeout=timedelta(seconds=60))
    try:
        found = outcomes(world, (2, 4))
        if world.main:
            torch.save(found, sys.argv[1])
    finally:
        world.disconnect()
