"""Weights to start from: another run's or a Hugging Face GPT-2's (`--init_from`), and drawn ones a hair off."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import torch

from gptlab.data.huggingface_tokenizer import read_tokenizer
from gptlab.data.tokenizers import TOKENIZERS, Tokenizer, get_tokenizer
from gptlab.errors import CheckpointError, ConfigError
from gptlab.model.formats import pickled_in
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, is_huggingface, read_config
from gptlab.model.weights import check_moments, check_stored
from gptlab.options import recorded
from gptlab.randomness import torch_generator
from gptlab.runs import checkpoint
from gptlab.runs.folder import newest
from gptlab.training.config import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.state import TrainingState

_OPTION = {"transformer.wpe.weight": "--block_size and --n_embd", "transformer.wte.weight": "--tokenizer and --n_embd"}


def model_of(run: str | Path) -> tuple[GPT, TrainingConfig]:
    """The model of a run's newest checkpoint (or of a checkpoint's folder) and the config it was trained with."""
    return model_in(_stored(run))


def model_in(found: checkpoint.Checkpoint) -> tuple[GPT, TrainingConfig]:
    """The model of a loaded checkpoint and the config it was trained with."""
    config = _config(found)
    model = GPT(config.shape)
    model.load_state_dict(found.weights, strict=False)  # the head is the token table
    return model, config


def any_state(source: str | Path) -> tuple[TrainingState, TrainingConfig | None]:
    """What `any_model` gives, with the optimizer's moments and the step: 0 and none of a Hugging Face folder."""
    if is_huggingface(Path(source)):
        model, _ = any_model(source)
        return TrainingState(model, build_optimizer(model, TrainingConfig())), None
    found = _stored(source)
    config = _config(found)
    model = GPT(config.shape)
    state = TrainingState(model, build_optimizer(model, config))
    state.restore(found.weights, found.moments, found.state["scalars"])
    return state, config


def _stored(source: str | Path) -> checkpoint.Checkpoint:
    """The checkpoint that `source` names; raises CheckpointError, with the way in for another program's model."""
    path = Path(source)
    pickled = None if path.is_file() else pickled_in(path)
    if pickled or path.is_file():
        what = f"{pickled.name} in the folder" if pickled else "file"
        raise CheckpointError(
            f"expected the folder of a run, a checkpoint or a Hugging Face GPT-2, found the {what} {path}; a model of "
            f"another program is read with `gptlab import {shlex.quote(str(path))} --out FOLDER`"
        )
    return checkpoint.load(newest(path))


def _config(found: checkpoint.Checkpoint) -> TrainingConfig:
    """The config of a checkpoint whose tensors are those of such a model; raises CheckpointError."""
    options = found.state.get("options")
    if not isinstance(options, dict):
        raise CheckpointError(f"{found.folder / checkpoint.STATE}: expected the options of its run, found none")
    try:
        config: TrainingConfig = recorded(TrainingConfig, options)
    except ConfigError as error:
        raise CheckpointError(f"{found.folder / checkpoint.STATE} has no options of this version: {error}") from None
    check_stored(config.shape, found.weights, found.folder / checkpoint.WEIGHTS)
    check_moments(found.weights, found.moments, found.folder / checkpoint.MOMENTS)
    return config


def any_model(source: str | Path) -> tuple[GPT, TrainingConfig | None]:
    """The model of a run, checkpoint or Hugging Face folder, and a run's config; else raises CheckpointError."""
    if is_huggingface(Path(source)):
        return from_huggingface(source), None
    return model_of(source)


def tokenizer_of(source: str | Path, config: TrainingConfig | None) -> Tokenizer | None:
    """The tokenizer of the model in `source`: its run's, or the one its folder brings; None where it brings none.

    config: what `any_model` gave with the model. Raises DataError where the folder's cannot be read.
    """
    if config:
        return get_tokenizer(config.tokenizer)
    return read_tokenizer(Path(source), read_config(Path(source)))


def weights_digest(model: GPT) -> str:
    """SHA-256 over a model's weights, by name: what figures of it belong to, whatever folder it came from."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        h.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def initial_model(source: str, shape: GPTConfig, seed: int, tokenizer: str) -> GPT:
    """A model of `shape` with the weights of `source`; raises CheckpointError where sizes or tokens differ.

    tokenizer: of the data. A vocabulary that is padded to other rows in one and the other is no difference: missing
    rows keep their drawn weights. A model with exact GELU is trained on with the tanh form, as every run computes it.
    """
    source_model, config = any_model(source)
    own = tokenizer_of(source, config)
    if own and own.name != tokenizer:
        way = f"add --tokenizer {own.name}" if own.name in TOKENIZERS else f"start from a model of {tokenizer} tokens"
        raise CheckpointError(f"{source}: its tokens are those of {own.name}, the data's of {tokenizer}; {way}")
    same = source_model.config.tokens == shape.tokens
    known = own.vocab_size if own else shape.tokens if same else shape.vocab_size
    given = dict(source_model.named_parameters())
    model = GPT(shape, seed)
    parameters = dict(model.named_parameters())
    for name in (*parameters, *given):
        if name not in given or name not in parameters:
            where = "here" if name in given else "there"
            raise CheckpointError(f"--init_from {source}: {name} is missing {where}; give that model's --n_layer")
    with torch.no_grad():
        for name, p in parameters.items():
            w, rows = given[name], len(p)
            if name == "transformer.wte.weight" and min(len(p), len(w)) >= known:
                rows = min(len(p), len(w))
            if w[:rows].shape != p[:rows].shape:
                raise CheckpointError(
                    f"--init_from {source}: {name} is {tuple(w.shape)} there and {tuple(p.shape)} here; "
                    f"give that model's {_OPTION.get(name, '--n_embd')}"
                )
            p[:rows] = w[:rows]
    return model


def frozen_listener(config: TrainingConfig) -> GPT | None:
    """The model that replies in the run's conversation, where another than its own does; it takes no gradient.

    Raises CheckpointError where there is none, or it has other tokens or shorter windows.
    """
    for path in (signal.frozen_listener for signal in config.signals):
        if path:
            model, there = any_model(path)
            own = tokenizer_of(path, there)
            if model.config.vocab_size != config.vocab_size or (own and own.name != config.tokenizer):
                raise CheckpointError(f"signal.listener {path}: expected a model of {config.tokenizer} tokens, found "
                                      f"another vocabulary, of {model.config.vocab_size:,}")  # fmt: skip
            if model.config.block_size < config.block_size:
                raise CheckpointError(f"signal.listener {path}: expected windows of block_size {config.block_size} or "
                                      f"more, found {model.config.block_size}")  # fmt: skip
            return model.requires_grad_(False)
    return None


@torch.no_grad()
def jitter(model: GPT, amount: float, seed: int) -> None:
    """Multiply every weight by 1 + amount·N(0, 1), drawn by (seed, parameter).

    Two runs that differ by it alone differ by chance alone: what separates them after training is what a verdict must
    not call an effect.
    """
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape).normal_(generator=torch_generator("init_jitter", seed, name))
        p.mul_(noise.mul_(amount).add_(1))
