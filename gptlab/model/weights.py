"""Weights from elsewhere, checked before a model is built: names, shapes and room, against what a GPT-2 has.

Other programs' formats become one thing first, tensors under nanoGPT's names, and are told apart in foreign.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import CheckpointError, ConfigError
from gptlab.model.gpt import GPT, GPTConfig

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
HEAD = "lm_head.weight"
GPT2_VOCABULARY = 50257
TABLE = "transformer.wte.weight"


def block_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """A block's parameters and their shapes, in the order in which a block uses them."""
    return {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }  # fmt: skip


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a GPT-2 without shared blocks and their shapes; the head is the token table."""
    C = config.n_embd
    return {
        TABLE: (config.vocab_size, C),
        "transformer.wpe.weight": (config.block_size, C),
        **{f"transformer.h.{i}.{n}": shape for i in range(config.n_layer) for n, shape in block_shapes(C).items()},
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
    }


def checked_config(sizes: Mapping[str, Any], room: int, source: object) -> GPTConfig:
    """The config that a file states, if it is one and its weights can stand in `room` bytes at 2 bytes or more each.

    Raises CheckpointError; a size is never believed before the file is long enough for it.
    """
    for name in SIZES:
        if not isinstance(sizes.get(name), int) or isinstance(sizes[name], bool):
            raise CheckpointError(f"{source}: expected a whole number for {name}, found {sizes.get(name)!r}")
    try:
        config = GPTConfig(**{name: sizes[name] for name in SIZES})
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    C = config.n_embd  # biases are optional in nanoGPT: they are not counted
    least = 2 * C * (config.vocab_size + config.block_size + 12 * C * config.n_layer)
    if least > room:
        stated = ", ".join(f"{name} {sizes[name]}" for name in SIZES)
        raise CheckpointError(
            f"{source}: expected at least {least:,} bytes for {stated}, found {room:,}; it is cut off or no GPT-2"
        )
    return config


def check_stored(config: GPTConfig, weights: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError unless `weights` are, by name and shape, those of a model of ours of this size.

    To be asked before that model is built: a checkpoint states its size in one file and holds its weights in another.
    """
    held = sum(weight.numel() for weight in weights.values())
    if held != config.parameters:
        raise CheckpointError(f"{source}: expected {config.parameters:,} weights for its options, found {held:,}")
    one_block = replace(config, n_layer=1, share_blocks=False)
    expected = shapes(one_block if config.share_blocks else config)
    for name in (*expected, *weights):
        found = weights.get(name)
        if name not in expected or not _is_weight(found, expected[name]):
            kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else "none"
            raise CheckpointError(f"{source}: expected {name} {expected.get(name, 'not to be there')}, found {kind}")


def check_moments(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError unless each of an optimizer's tensors belongs to a weight: of its shape, or a count."""
    for name, found in moments.items():
        key, _, of = name.partition(".")
        expected = () if key == "step" else tuple(weights[of].shape) if of in weights else None
        if of not in weights or not _is_weight(found, expected):
            raise CheckpointError(f"{source}: expected {name} {expected}, found {found.dtype} {tuple(found.shape)}")


@torch.no_grad()
def with_weights(config: GPTConfig, weights: Mapping[str, Any], source: object, *, biases: bool = True) -> GPT:
    """A GPT with these weights in float32; without `biases` a missing bias is 0, as in nanoGPT's bias=False.

    Raises CheckpointError naming the first weight that is missing, unknown, of another shape or no number.
    """
    expected = shapes(config)
    for name in weights:
        if name not in expected and name != HEAD:
            raise CheckpointError(f"{source}: expected the weights of a GPT-2, found {name!r} among them")
    for name, shape in expected.items():
        if name not in weights and (biases or not name.endswith("bias")):
            raise CheckpointError(f"{source}: expected {name} {shape}, found no such weight")
        found = weights.get(name)
        if found is not None and not _is_weight(found, shape):
            kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{source}: expected {name} as floating-point numbers {shape}, found {kind}")
    head = weights.get(HEAD)
    if head is not None and not (_is_weight(head, expected[TABLE]) and torch.equal(head, weights[TABLE])):
        raise CheckpointError(f"{source}: expected {HEAD} to be tied to {TABLE}, found another matrix")
    model = GPT(config)
    for name, parameter in model.named_parameters():
        found = weights.get(name)
        parameter.zero_() if found is None else parameter.copy_(found)
    return model


def _is_weight(found: object, shape: tuple[int, ...] | None) -> bool:
    return (
        isinstance(found, Tensor)
        and found.layout is torch.strided
        and found.device.type == "cpu"
        and found.is_floating_point()
        and tuple(found.shape) == shape
    )
