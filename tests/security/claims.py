"""Files that claim to be huge, read by a process that has little room: who believes one has no memory left.

Started by test_payloads.py with a folder; prints a line of JSON a file, {case: the error's class and text}.
"""

from __future__ import annotations

import json
import logging
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from readers import SIZES, SMALL, readers, sign  # pyright: ignore[reportMissingImports]
from safetensors.torch import save

from gptlab.data.shards import open_shard
from gptlab.model.formats import open_foreign
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, to_huggingface
from gptlab.runs import checkpoint
from gptlab.runs.init_weights import any_model, any_state
from gptlab.signals import tuned_lens

ROOM = 2**28
Case = tuple[str, Callable[[], object]]


def safetensors(shape: list[int], offsets: list[int], *, dtype: str = "F32", header: int | None = None) -> bytes:
    return _stated({"transformer.wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, header)


def _stated(tensors: dict[str, dict[str, object]], header: int | None = None) -> bytes:
    """A file with this header, of its own length or of a stated one, and 64 bytes."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if header is None else header) + text + b"\0" * 64


TWICE = {name: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for name in ("weight", "bias")}
SAFETENSORS = {
    "huge": safetensors([2**20, 2**20], [0, 2**42]),
    "overlapping": _stated(TWICE),
    "beyond the end": safetensors([2**20], [2**40, 2**40 + 2**22]),
    "backwards": safetensors([4, 4], [64, 0]),
    "shape and length differ": safetensors([2**30], [0, 64]),
    "overflow": safetensors([2**63, 2], [0, 64]),
    "long header": safetensors([4, 4], [0, 64], header=2**62),
    "other type": safetensors([4, 4], [0, 64], dtype="F4096"),
}


def cases(folder: Path) -> Iterator[Case]:
    shard = struct.pack("<256i", 20240520, 1, 2**31 - 1, *[0] * 253) + b"\1\0" * 5
    yield from _file(folder / "train_000000.bin", shard, open_shard)
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    yield from _file(folder / "a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header, open_shard)
    numbers = (1024, 50257, 10_000, 64, 2**17, 50304)
    yield from _file(
        folder / "m.bin", struct.pack("<256i", 20240326, 3, *numbers, *[0] * 248) + b"\0" * 64, open_foreign
    )
    weights = {name: p.detach() for name, p in SMALL.named_parameters()}
    for name, changes in {"wide": {"n_embd": 2**17}, "long": {"block_size": 2**31}, "deep": {"n_layer": 2**40}}.items():
        path = folder / f"{name}.pt"
        torch.save({"model": weights, "model_args": {**SIZES, "vocab_size": 256, **changes}}, path)
        yield path.name, lambda path=path: open_foreign(path)
    path = folder / "expanded.pt"  # four bytes that are said to be a table
    sizes = {**SIZES, "vocab_size": 2**20, "n_embd": 2**12}
    torch.save({"model": {"transformer.wte.weight": torch.zeros(1).expand(2**20, 2**12)}, "model_args": sizes}, path)
    yield path.name, lambda path=path: open_foreign(path)
    yield from _huggingface(folder)
    yield from _checkpoints(folder)
    for kind, content in SAFETENSORS.items():
        path = folder / f"tuned {kind}"
        path.write_bytes(content)
        yield path.name, lambda path=path: tuned_lens.load(SMALL, path)


def _file(path: Path, content: bytes, read: Callable[[Path], object]) -> Iterator[Case]:
    path.write_bytes(content)
    yield path.name, lambda: read(path)


def _huggingface(folder: Path) -> Iterator[Case]:
    for key, value in {
        "n_embd": 2**20,
        "n_layer": 2**31,
        "n_positions": 2**40,
        "vocab_size": 2**40,
        "n_head": -1,
    }.items():
        path = folder / f"theirs {key}"
        to_huggingface(SMALL).save_pretrained(path)
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | {key: value}))
        yield path.name, lambda path=path: from_huggingface(path)
    for kind, content in SAFETENSORS.items():
        path = folder / f"theirs {kind}"
        to_huggingface(SMALL).save_pretrained(path)
        (path / "model.safetensors").write_bytes(content + b"\0" * 8000)
        yield path.name, lambda path=path: from_huggingface(path)


def _checkpoints(folder: Path) -> Iterator[Case]:
    """Each with checksums that are right: whoever writes a checkpoint writes them."""
    reader = next(one for one in readers(folder / "right") if one.name == "state.json")
    deep = {"n_layer": 2**40, "share_blocks": True}
    for name, changes in {"n_embd": {"n_embd": 2**20}, "block_size": {"block_size": 2**40, "total_batch_tokens": 2**40},
                          "n_layer": {"n_layer": 9_999}, "shared": deep}.items():  # fmt: skip
        path = folder / f"checkpoint {name}"
        reader.prepare(path)
        state = json.loads((path / "state.json").read_text())
        state["options"] |= changes
        (path / "state.json").write_text(json.dumps(state))
        if name == "shared":  # stored once, whatever n_layer says
            shared = GPT(GPTConfig(vocab_size=256, **SIZES, share_blocks=True))
            weights = {key: p.detach() for key, p in shared.named_parameters()}
            (path / checkpoint.WEIGHTS).write_bytes(save(weights))
            (path / checkpoint.MOMENTS).write_bytes(save({}))
        sign(path)
        yield path.name, lambda path=path: any_model(path)
    for kind, content in SAFETENSORS.items():
        for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
            path = folder / f"checkpoint {file} {kind}"
            reader.prepare(path)
            (path / file).write_bytes(content)
            sign(path)
            yield path.name, lambda path=path: any_state(path)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    known = list(cases(folder))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    for name, read in known:
        try:
            told = f"read: {read()}"
        except Exception as error:
            told = f"{type(error).__module__}.{type(error).__name__}: {error}"
        print(json.dumps({"case": name, "told": told}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
