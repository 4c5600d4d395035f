"""Weights from elsewhere, checked before a model is built: names, shapes and room, against what a GPT-2 has.

formats.py and huggingface.py read other programs' files into one thing first: tensors under nanoGPT's names. Where the
file is a pickle, which may call any function when it is read, tensors and plain values are built and nothing else.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import CheckpointError, ConfigError, DivergedError, shown
from gptlab.files import open_regular
from gptlab.model.gpt import GPT, GPTConfig

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
HEAD = "lm_head.weight"
TABLE = "transformer.wte.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that transformers stores (in, out)."""
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing leave in a name, in any order."""
_MASK = re.compile(r"\.attn\.(masked_)?bias$")
"""The causal mask, which some versions keep among the weights."""
ADAMW, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
"""What an optimizer keeps of a parameter, under PyTorch's names."""


ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""How a file of torch.save begins, since torch 1.6 and before."""
_SCRIPTS = ("__main__", "train_gpt2", "model")
"""Modules in which build-nanogpt's GPTConfig may have been defined."""


class PickledConfig:
    """Stands in for build-nanogpt's GPTConfig: it has no method, so that a file can set its fields and no more."""


def load_pickled(path: Path) -> Mapping[Any, Any]:
    """The dict that torch.save wrote, made of tensors and plain values alone; raises CheckpointError."""
    stands_in: Any = [(PickledConfig, f"{script}.GPTConfig") for script in _SCRIPTS]
    zipped = refuse_bombs(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stands_in):
            warnings.simplefilter("ignore")  # about files of old versions: what is wrong with one is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # pickle, zip and torch have no common kind
        unsafe = re.search(r"unsupported global(?:: GLOBAL)? (\S+)", str(error), re.IGNORECASE)
        reason = f"it needs {unsafe[1]}, and nothing but tensors and plain values is read" if unsafe else ""
        if not reason and str(error).startswith("Weights only"):  # torch then advises to run what is in it
            reason = "it holds more than tensors and plain values, or is damaged"
        reason = reason or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint of torch.save: {reason[:200]}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict in the checkpoint, found {type(content).__name__}")
    return content


def refuse_bombs(path: Path) -> bool:
    """Whether the file is a zip archive, as torch.save writes; raises CheckpointError for one that would grow.

    torch.save compresses nothing, so that its members are together no longer than the file.
    """
    with open_regular(path, error=CheckpointError) as file:
        if file.read(4) != ZIP:
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{path} is cut off or damaged: {error}") from None
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members) or (
        sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: expected what torch.save wrote, found a compressed archive; it is not read")
    return True


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


def checked_config(sizes: Mapping[str, Any], room: int, source: object, **known: Any) -> GPTConfig:
    """The config that a file states, if it is one and its weights can stand in `room` bytes at 2 bytes or more each.

    known: what else its reader knows of the model, by GPTConfig's names.

    Raises CheckpointError; a size is never believed before the file is long enough for it.
    """
    for name in SIZES:
        if not isinstance(sizes.get(name), int) or isinstance(sizes[name], bool):
            raise CheckpointError(f"{source}: expected a whole number for {name}, found {shown(sizes.get(name))}")
    try:
        config = GPTConfig(**{name: sizes[name] for name in SIZES}, **known)
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
    """Raise CheckpointError unless an optimizer's tensors are none, or all of each weight's, numbers of its shape."""
    kept: dict[str, set[str]] = {of: set() for of in weights} if moments else {}
    for name, found in moments.items():
        key, _, of = name.partition(".")
        expected = () if key == "step" else tuple(weights[of].shape) if of in weights else None
        if of not in weights or not _is_weight(found, expected):
            raise CheckpointError(f"{source}: expected {name} {expected}, found {found.dtype} {tuple(found.shape)}")
        if found.isnan().any():
            raise CheckpointError(f"{source}: expected numbers in {name}, found NaN")
        kept[of].add(key)
    for of, found in kept.items():
        if found not in (ADAMW, MUON):
            expected = f"{', '.join(sorted(ADAMW))} (AdamW) or {', '.join(MUON)} (Muon)"
            raise CheckpointError(f"{source}: expected {expected} of {of}, found {', '.join(sorted(found)) or 'none'}")


def refuse_not_finite(figures: Tensor) -> None:
    """Raise DivergedError where a figure of a model that is read is NaN or infinite."""
    if not figures.isfinite().all():
        raise DivergedError("the model's figures are not finite: it has diverged, or its weights are too large")


def named(weights: Mapping[Any, Any], source: object) -> dict[str, Any]:
    """`weights` under nanoGPT's names: without what wrappers left in them, without masks, `transformer.` before all.

    Raises CheckpointError where two come to the same name.
    """
    found: dict[str, Any] = {}
    bare = not any("transformer" in str(name).split(".") for name in weights)
    for name, weight in weights.items():
        own = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        own = f"transformer.{own}" if bare and own != HEAD else own
        if _MASK.search(own):
            continue
        if own in found:
            raise CheckpointError(f"{source}: expected {own} once, found it twice, the second time as {shown(name)}")
        found[own] = weight
    return found


@torch.no_grad()
def with_weights(
    config: GPTConfig, weights: Mapping[str, Any], source: object, *, biases: bool = True, conv1d: bool = False
) -> GPT:
    """A GPT with these weights in float32; without `biases` a missing bias is 0, as in nanoGPT's bias=False.

    conv1d: whether matrices are (in, out), as in transformers. Raises CheckpointError naming the first weight that is
    missing, unknown, of another shape or no number, and a head that is not the token table.
    """
    turned = CONV1D if conv1d else ()
    expected = {name: shape[::-1] if name.endswith(turned) else shape for name, shape in shapes(config).items()}
    for name in weights:
        if name not in expected and name != HEAD:
            raise CheckpointError(f"{source}: expected the weights of a GPT-2, found {shown(name)} among them")
    for name, shape in expected.items():
        if name not in weights and (biases or not name.endswith("bias")):
            raise CheckpointError(f"{source}: expected {name} {shape}, found no such weight")
        found = weights.get(name)
        if found is not None and not _is_weight(found, shape):
            kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{source}: expected {name} as floating-point numbers {shape}, found {kind}")
    head = weights.get(HEAD)
    if head is not None and not (_is_weight(head, expected[TABLE]) and torch.equal(head, weights[TABLE])):
        kind = f"another matrix {tuple(head.shape)}" if isinstance(head, Tensor) else type(head).__name__
        raise CheckpointError(
            f"{source}: expected {HEAD} to be tied to {TABLE}, found {kind}; a model with a head of its own has other "
            "logits than any that gptlab computes: tie the two and train on, or leave it"
        )
    model = GPT(config)
    for name, parameter in model.named_parameters():
        found = weights.get(name)
        if found is None:
            parameter.zero_()
        else:
            parameter.copy_(found.t() if name.endswith(turned) else found)
    return model


def _is_weight(found: object, shape: tuple[int, ...] | None) -> bool:
    return (
        isinstance(found, Tensor)
        and found.layout is torch.strided
        and found.device.type == "cpu"
        and found.is_floating_point()
        and tuple(found.shape) == shape
    )
