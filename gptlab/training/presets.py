"""Presets: defaults that belong together, by name. Every value can be set over them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from gptlab.errors import ConfigError, shown
from gptlab.model.config import GPTConfig
from gptlab.options import as_typed, build, flatten
from gptlab.training.config import TrainingConfig

_V1: dict[str, Any] = {  # what shakespeare-tiny was when the findings were made; larger presets build on it
    "block_size": 128,
    "batch_size": 16,
    "total_batch_tokens": 2048,
    "steps": 700,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "log_every": 10,
    "eval_every": 100,
    "checkpoint_every": 100,
    "sample_every": 350,
    "dose_every": 50,
}

_TINY: dict[str, Any] = {"beta2": 0.99, "min_lr": 0.0}  # the rest are defaults, tuned: docs/options.md

_FINEWEB: dict[str, Any] = _V1 | {  # build-nanogpt's recipe: one pass over 10B tokens
    "data": "fineweb-edu",
    "tokenizer": "gpt2",
    "block_size": 1024,
    "batch_size": 64,
    "total_batch_tokens": 524_288,
    "steps": 19_073,
    "learning_rate": 6e-4,
    "warmup_steps": 715,
    "eval_every": 250,
    "eval_tokens": 10_485_760,
    "checkpoint_every": 1000,
    "sample_every": 250,
    "dose_every": 250,
}

RUNGS = (2, 3, 4, 6, 8)
TOKENS_PER_PARAMETER, MOST_TOKENS = 20, 4 * 4_557_580
"""Of the ladder: what a rung trains on, and at most four passes over Shakespeare."""


def ladder(depth: int) -> dict[str, Any]:
    """The rung of so many blocks: its depth sets width, heads, batch, learning rate, weight decay and updates.

    Raises ConfigError for a depth that is none of RUNGS.
    """
    if depth not in RUNGS:
        raise ConfigError(f"depth must be one of {', '.join(map(str, RUNGS))}, found {shown(depth)}")
    width, batch, rate = 32 * depth, 512 * depth, 0.012 / depth
    parameters = GPTConfig(64, 256, depth, depth, width).parameters
    steps = round(min(TOKENS_PER_PARAMETER * parameters, MOST_TOKENS) / batch)
    decay = float(f"{1 / (rate * steps):.2g}")  # weights forget over a whole run, however long it is
    return {
        "preset": "ladder", "depth": depth, "n_layer": depth, "n_head": depth, "n_embd": width,
        "total_batch_tokens": batch, "batch_size": 32, "learning_rate": rate, "min_lr": 0.0, "weight_decay": decay,
        "steps": steps, "eval_every": -(-steps // 4), "checkpoint_every": 500, "sample_every": -(-steps // 2),
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "shakespeare-tiny": _TINY,
    "shakespeare-tiny-muon": _TINY | {"optimizer": "muon", "learning_rate": 8e-3},
    "shakespeare-tiny-v1": _V1,
    "ladder": ladder(RUNGS[0]),
    "shakespeare-gpt2": _V1
    | {
        "tokenizer": "gpt2",
        "block_size": 256,
        "batch_size": 4,
        "total_batch_tokens": 1024,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "steps": 500,
        "eval_tokens": 65_536,
        "sample_every": 250,
    },
    "gpt2-124m": _FINEWEB | {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-350m": _FINEWEB | {"n_layer": 24, "n_head": 16, "n_embd": 1024, "batch_size": 32, "learning_rate": 3e-4},
    "gpt2-774m": _FINEWEB | {"n_layer": 36, "n_head": 20, "n_embd": 1280, "batch_size": 16, "learning_rate": 2.5e-4},
    "gpt2-1558m": _FINEWEB | {"n_layer": 48, "n_head": 25, "n_embd": 1600, "batch_size": 8, "learning_rate": 2e-4},
    "notes-124m": _FINEWEB  # the setting of the notes' experiment 1-noise (N5)
    | {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "share_blocks": True,
        "batch_size": 16,
        "total_batch_tokens": 131_072,
    },
}


def preset_options(preset: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a preset sets under the `given` options, of which depth chooses the ladder's rung.

    Raises ConfigError for a depth that the ladder does not have.
    """
    depth = (given or {}).get("depth")
    return PRESETS[preset] if depth is None or preset != "ladder" else ladder(depth)


def command_of(config: TrainingConfig, program: str = "gptlab train") -> str:
    """The command that makes a run of this config, wherever its options came from.

    Empty for one with more signals than one, which only a file of options can hold.
    """
    if config.also:
        return ""
    given = {"depth": config.depth} if config.depth else {}
    usual = flatten(build(TrainingConfig, preset_options(config.preset, given)))
    usual |= {"resume": config.resume, "depth": None}  # depth chooses what else is usual
    words = ["--preset", config.preset]
    words += [f"--{key}={as_typed(value)}" for key, value in flatten(config).items()
              if value != usual[key] and key not in ("preset", "also")]  # fmt: skip
    words += ["--allow_code"] if config.signal.is_code else []
    return f"{program} {shlex.join(words)}"
