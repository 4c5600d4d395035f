"""Models that other programs wrote, distinguished by what is in a file, never by its name; and llm.c's file written.

nanoGPT and build-nanogpt write dicts with torch.save: weights, sizes, the optimizer's state. nanoGPT computes GELU
exactly, GPT-2 and build-nanogpt its tanh form. Both pad GPT-2's 50,257 tokens to 50,304 rows; a nanoGPT model of
characters has another number, or keeps their alphabet in a meta.pkl, which is never read.

llm.c writes a header of 256 little-endian int32, then every weight in a fixed order. The header holds 20240326, the
version (3 = float32, 5 = bfloat16), block_size, vocab_size, n_layer, n_head, n_embd and the rows of the token table,
padded to a multiple of 128; the rest is 0. Then come the token and position tables, each kind of weight for all blocks
in turn, and the last norm. Linear weights are (out, in), as ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.data.shards import MAGIC as SHARD_MAGIC
from gptlab.data.tokenizers import GPT2Tokenizer
from gptlab.errors import CheckpointError, shortened
from gptlab.files import open_regular, writing
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, is_huggingface
from gptlab.model.weights import (
    PICKLE,
    TABLE,
    ZIP,
    PickledConfig,
    block_shapes,
    checked_config,
    load_pickled,
    named,
    shapes,
    with_weights,
)

MAGIC, HEADER_BYTES, MULTIPLE = 20240326, 1024, 128
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
OWN = ("checkpoints", "MANIFEST.json")
"""What lies in a run's folder, and in a checkpoint's."""
FORMATS = "a Hugging Face GPT-2 folder, a nanoGPT or build-nanogpt checkpoint, or an llm.c model"
_STEP = re.compile(r"model_(\d{1,12})\.pt")


@dataclass(frozen=True)
class Foreign:
    """A model of another program. file: what was read; gpt2: whether its tokens are known to be GPT-2's."""

    model: GPT
    format: str
    file: Path
    gpt2: bool = False


def open_foreign(source: str | Path) -> Foreign:
    """The model in `source`; raises CheckpointError where it is none that is known.

    source: a Hugging Face folder, nanoGPT's out_dir, build-nanogpt's log, or a file of nanoGPT, build-nanogpt or llm.c
    """
    path = Path(source)
    if path.is_dir():
        if is_huggingface(path):
            return Foreign(from_huggingface(path), "Hugging Face", path)
        if (pickled := pickled_in(path)) is None:
            ours = "; what gptlab trained needs no import" * any((path / name).exists() for name in OWN)
            raise CheckpointError(f"expected {FORMATS}, found none of them in the folder {path}{ours}")
        path = pickled
    try:
        with open_regular(path, error=CheckpointError) as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"expected {FORMATS}, found nothing at {path}; check the path") from None
    number = int.from_bytes(start[:4], "little")
    if number == MAGIC:
        model = read_llmc(path)
        return Foreign(model, "llm.c", path, gpt2=model.config.tokens == GPT2Tokenizer.vocab_size)
    if number == SHARD_MAGIC:
        raise CheckpointError(f"{path} holds tokens, not a model: give its folder to --data")
    if start[:1] == b"{" or start[8:9] == b"{":
        raise CheckpointError(f"{path}: expected {FORMATS}, found a single file of one; give its folder")
    if start.startswith((ZIP, PICKLE)):
        return _read_pickled(path)
    raise CheckpointError(f"{path}: expected {FORMATS}, found none of them; is it cut off?")


def pickled_in(folder: Path) -> Path | None:
    """The checkpoint in nanoGPT's out_dir, or the last one in build-nanogpt's log folder, if it is either."""
    if (file := folder / "ckpt.pt").is_file():
        return file
    steps = [(int(match[1]), path) for path in folder.glob("model_*.pt") if (match := _STEP.fullmatch(path.name))]
    return max(steps)[1] if steps else None


def _read_pickled(path: Path) -> Foreign:
    """The model of a checkpoint of torch.save.

    Raises CheckpointError where it is cut off, holds more than tensors and plain values, or is no GPT-2.
    """
    content = load_pickled(path)
    weights, sizes = content.get("model"), content.get("model_args")
    nanogpt = sizes is not None
    if not nanogpt:
        config = content.get("config")
        sizes = vars(config) if isinstance(config, PickledConfig) else config
    if not isinstance(weights, Mapping) or not isinstance(sizes, Mapping):
        keys = ", ".join(sorted(map(str, content))) or "nothing"
        raise CheckpointError(
            f"{path}: expected a checkpoint of nanoGPT (model, model_args) or build-nanogpt (model, config), "
            f"found {shortened(keys, 200)}"
        )
    characters = nanogpt and _alphabet(path, content) is not None
    padding = 0 if characters else None
    config = checked_config(sizes, path.stat().st_size, path, exact_gelu=nanogpt, padding=padding)
    model = with_weights(config, named(weights, path), path, biases=bool(sizes.get("bias", True)))
    known = not characters and config.tokens == GPT2Tokenizer.vocab_size
    return Foreign(model, "nanoGPT" if nanogpt else "build-nanogpt", path, gpt2=known)


def _alphabet(path: Path, content: Mapping[Any, Any]) -> Path | None:
    """nanoGPT's meta.pkl next to a checkpoint or in the data that it names, if there is one."""
    options = content.get("config")
    name = options.get("dataset") if isinstance(options, Mapping) else None
    places = [path.parent / "meta.pkl"]
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name):
        places.append(path.absolute().parent.parent / "data" / name / "meta.pkl")
    return next((place for place in places if place.is_file()), None)


def read_llmc(path: str | Path) -> GPT:
    """The model of a file; raises CheckpointError where its header or its length is not what the format says."""
    path = Path(path)
    with open_regular(path, error=CheckpointError) as file:
        start = file.read(HEADER_BYTES)
        header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4").tolist()
        if len(header) < HEADER_BYTES // 4 or header[0] != MAGIC:
            raise CheckpointError(f"{path}: expected the header of an llm.c model, found none")
        if header[1] not in VERSIONS:
            raise CheckpointError(f"{path}: expected version 3 (fp32) or 5 (bf16) of llm.c's format, found {header[1]}")
        dtype, padded, room = VERSIONS[header[1]], header[7], path.stat().st_size - HEADER_BYTES
        config = checked_config(dict(zip(FIELDS, header[2:7], strict=True)), room, path, padding=0)
        if padded < config.vocab_size:
            raise CheckpointError(
                f"{path}: expected at least {config.vocab_size} rows in the token table, found {padded}"
            )
        order = _order(config, padded)
        expected = dtype.itemsize * sum(int(np.prod(shape)) for _, shape in order)
        if room != expected:
            raise CheckpointError(f"{path}: expected {expected + HEADER_BYTES:,} bytes, found {room + HEADER_BYTES:,}")
        weights: dict[str, Tensor] = {}
        for name, shape in order:
            numbers = np.fromfile(file, dtype="<f4" if dtype is torch.float32 else "<i2", count=int(np.prod(shape)))
            weights[name] = torch.from_numpy(numbers).view(dtype).view(shape)
    weights[TABLE] = weights[TABLE][: config.vocab_size]
    return with_weights(config, weights, path)


def write_llmc(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a file that llm.c reads; rows that pad the vocabulary become rows of zeros, as llm.c has them.

    Raises CheckpointError for a model with exact GELU, which llm.c does not compute.
    """
    config, ours = model.config, model.state_dict()
    if config.exact_gelu:
        raise CheckpointError("llm.c computes GELU in its tanh form, this model exactly: export a Hugging Face folder")
    padded = -(-config.tokens // MULTIPLE) * MULTIPLE
    version = next(number for number, kind in VERSIONS.items() if kind == dtype)
    sizes = (config.block_size, config.tokens, config.n_layer, config.n_head, config.n_embd, padded)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[: 2 + len(sizes)] = (MAGIC, version, *sizes)
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out, error=CheckpointError) as file:
        file.write(header.tobytes())
        for name, shape in _order(config, padded):
            weight = ours[name].detach().to("cpu", dtype)
            if name == TABLE:
                rows = weight[: config.tokens]
                weight = torch.cat([rows, rows.new_zeros(padded - config.tokens, shape[1])])
            file.write(weight.contiguous().view(torch.uint8).numpy().data)


def _order(config: GPTConfig, padded: int) -> list[tuple[str, tuple[int, ...]]]:
    """The weights as they follow each other, with their shapes."""
    shape = {**shapes(config), TABLE: (padded, config.n_embd)}
    kinds = [f"transformer.h.{{}}.{kind}" for kind in block_shapes(config.n_embd)]
    blocks = [kind.format(i) for kind in kinds for i in range(config.n_layer)]
    names = [TABLE, "transformer.wpe.weight", *blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"]
    return [(name, shape[name]) for name in names]
