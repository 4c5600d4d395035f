"""llm.c's model files: a header of 256 little-endian int32, then every weight in a fixed order.

The header holds 20240326, the version (3 = float32, 5 = bfloat16), block_size, vocab_size, n_layer, n_head, n_embd and
the rows of the token table, padded to a multiple of 128; the rest is 0. Then come the token and position tables, each
kind of weight for all blocks in turn, and the last norm. Linear weights are (out, in), as ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.weights import GPT2_VOCABULARY, TABLE, block_shapes, checked_config, shapes, with_weights

MAGIC, HEADER_BYTES, PADDING = 20240326, 1024, 128
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


def read_llmc(path: str | Path) -> GPT:
    """The model of a file; raises CheckpointError where its header or its length is not what the format says."""
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4).tolist()
    if len(header) < HEADER_BYTES // 4 or header[0] != MAGIC:
        raise CheckpointError(f"{path}: expected the header of an llm.c model, found none")
    if header[1] not in VERSIONS:
        raise CheckpointError(f"{path}: expected version 3 (fp32) or 5 (bf16) of llm.c's format, found {header[1]}")
    dtype, padded, room = VERSIONS[header[1]], header[7], path.stat().st_size - HEADER_BYTES
    config = checked_config(dict(zip(FIELDS, header[2:7], strict=True)), room, path)
    if padded < config.vocab_size:
        raise CheckpointError(f"{path}: expected at least {config.vocab_size} rows in the token table, found {padded}")
    order = _order(config, padded)
    expected = dtype.itemsize * sum(int(np.prod(shape)) for _, shape in order)
    if room != expected:
        raise CheckpointError(f"{path}: expected {expected + HEADER_BYTES:,} bytes, found {room + HEADER_BYTES:,}")
    weights: dict[str, Tensor] = {}
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        for name, shape in order:
            numbers = np.fromfile(file, dtype="<f4" if dtype is torch.float32 else "<i2", count=int(np.prod(shape)))
            weights[name] = torch.from_numpy(numbers).view(dtype).view(shape)
    weights[TABLE] = weights[TABLE][: config.vocab_size]
    return with_weights(config, weights, path)


def write_llmc(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a file that llm.c reads; the vocabulary is cut to GPT-2's and padded with rows of zeros, as llm.c does."""
    config, ours = model.config, model.state_dict()
    vocabulary = min(config.vocab_size, GPT2_VOCABULARY)
    padded = -(-vocabulary // PADDING) * PADDING
    version = next(number for number, kind in VERSIONS.items() if kind == dtype)
    sizes = (config.block_size, vocabulary, config.n_layer, config.n_head, config.n_embd, padded)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[: 2 + len(sizes)] = (MAGIC, version, *sizes)
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.writing")
    with building.open("wb") as file:
        file.write(header.tobytes())
        for name, shape in _order(config, padded):
            weight = ours[name].detach().to("cpu", dtype)
            if name == TABLE:
                weight = torch.cat([weight[:vocabulary], weight.new_zeros(padded - vocabulary, shape[1])])
            file.write(weight.contiguous().view(torch.uint8).numpy().data)
    building.replace(out)


def _order(config: GPTConfig, padded: int) -> list[tuple[str, tuple[int, ...]]]:
    """The weights as they follow each other, with their shapes."""
    shape = {**shapes(config), TABLE: (padded, config.n_embd)}
    kinds = [f"transformer.h.{{}}.{kind}" for kind in block_shapes(config.n_embd)]
    blocks = [kind.format(i) for kind in kinds for i in range(config.n_layer)]
    names = [TABLE, "transformer.wpe.weight", *blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"]
    return [(name, shape[name]) for name in names]
