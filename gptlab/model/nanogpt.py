"""Checkpoints that nanoGPT and build-nanogpt wrote with torch.save, read without running anything that is in them.

Such a file is a pickle, which may call any function when it is read. `torch.load(weights_only=True)` builds tensors and
plain values and refuses everything else. build-nanogpt also pickles its config, an instance of a class of the training
script: an empty class of ours stands in for it, so that its fields are read as values and no code of the file runs.

nanoGPT computes GELU exactly; GPT-2, build-nanogpt and ours take its tanh form: logits come out about 0.001 off.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT
from gptlab.model.weights import checked_config, with_weights

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""How a file of torch.save begins, since torch 1.6 and before."""
_SCRIPTS = ("__main__", "train_gpt2", "model")
"""Modules in which a training script's GPTConfig may have been defined."""
_COMPILED = re.compile(r"^_orig_mod\.")
_MASK = re.compile(r"\.attn\.(masked_)?bias$")
"""The causal mask, which some versions keep among the weights."""


class _Config:
    """Stands in for a pickled config: it has no method, so that setting its fields is all that a file can do."""


def read_pickled(path: str | Path) -> tuple[GPT, str]:
    """The model of a checkpoint, and whose it is: "nanoGPT" or "build-nanogpt".

    Raises CheckpointError where it is cut off, holds more than tensors and plain values, or is no GPT-2.
    """
    path = Path(path)
    content = load_pickled(path)
    weights, sizes = content.get("model"), content.get("model_args")
    kind = "nanoGPT" if sizes is not None else "build-nanogpt"
    if sizes is None:
        config = content.get("config")
        sizes = vars(config) if isinstance(config, _Config) else config
    if not isinstance(weights, Mapping) or not isinstance(sizes, Mapping):
        keys = ", ".join(sorted(map(str, content))) or "nothing"
        raise CheckpointError(
            f"{path}: expected a checkpoint of nanoGPT (model, model_args) or build-nanogpt (model, config), "
            f"found {keys}"
        )
    config = checked_config(sizes, path.stat().st_size, path)
    named = {_COMPILED.sub("", str(name)): weight for name, weight in weights.items()}
    named = {name: weight for name, weight in named.items() if not _MASK.search(name)}
    return with_weights(config, named, path, biases=bool(sizes.get("bias", True))), kind


def load_pickled(path: Path) -> Mapping[Any, Any]:
    """The dict that torch.save wrote, made of tensors and plain values alone; raises CheckpointError."""
    stands_in: Any = [(_Config, f"{script}.GPTConfig") for script in _SCRIPTS]
    zipped = refuse_bombs(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stands_in):
            warnings.simplefilter("ignore")  # about files of old versions: what is wrong with one is told below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # pickle, zip and torch have no common kind
        unsafe = re.search(r"unsupported global(?:: GLOBAL)? (\S+)", str(error), re.IGNORECASE)
        reason = f"it needs {unsafe[1]}, and nothing but tensors and plain values is read" if unsafe else ""
        if not reason and str(error).startswith("Weights only"):  # torch goes on to advise to run what is in it
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
    with path.open("rb") as file:
        if file.read(4) != ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is cut off or damaged: {error}") from None
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members) or (
        sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: expected what torch.save wrote, found a compressed archive; it is not read")
    return True
