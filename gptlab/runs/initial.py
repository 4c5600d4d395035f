"""Weights to start from that are not drawn: another run's, or a Hugging Face GPT-2's (`--init_from`)."""

from __future__ import annotations

from pathlib import Path

import torch

from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, newest
from gptlab.training.config import TrainingConfig


def model_of(run: str | Path) -> tuple[GPT, TrainingConfig]:
    """The model of a run's newest checkpoint (or of a checkpoint's folder) and the config it was trained with."""
    from gptlab.options import build

    found = checkpoint.load(newest(run))
    config: TrainingConfig = build(TrainingConfig, found.state["options"])
    shape = GPTConfig(
        config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.share_blocks
    )
    model = GPT(shape)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found.weights[name])
    return model, config


def initial_model(source: str, shape: GPTConfig, seed: int) -> GPT:
    """A model of `shape` with the weights of `source`; raises CheckpointError where the sizes differ.

    A vocabulary that is padded in one and not in the other is no difference: missing rows keep their drawn weights.
    """
    path = Path(source)
    if (path / "config.json").is_file() and not RunFolder(path).checkpoints.exists():
        from gptlab.model.huggingface import from_huggingface

        theirs = from_huggingface(path)
    else:
        theirs, _ = model_of(path)
    model = GPT(shape, seed)
    given = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in given:
                raise CheckpointError(f"--init_from {source}: has no {name}; it has another number of blocks")
            w = given[name]
            rows = min(len(p), len(w)) if name == "transformer.wte.weight" else len(p)
            if w[:rows].shape != p[:rows].shape:
                raise CheckpointError(
                    f"--init_from {source}: {name} is {tuple(w.shape)} there and {tuple(p.shape)} here; "
                    "give the sizes of that model"
                )
            p[:rows] = w[:rows]
    return model
