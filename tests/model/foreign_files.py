"""Writers of other programs' model files, from their documented layouts, sharing no code of ours."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KINDS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def write_llmc_file(
    path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, int], version: int, rows: int
) -> None:
    """llm.c's: 256 int32, then the weights, float32 in version 3 and bfloat16 (the upper half of float32) in 5."""
    values = [20240326, version, *(sizes[k] for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")), rows]
    L, C = sizes["n_layer"], sizes["n_embd"]
    table = torch.zeros(rows, C)
    table[: sizes["vocab_size"]] = weights["transformer.wte.weight"]
    names = [f"transformer.h.{i}.{kind}" for kind in KINDS for i in range(L)]
    parts = [table, weights["transformer.wpe.weight"], *(weights[n] for n in names)]
    parts += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *values, *[0] * (256 - len(values))))
        for part in parts:
            numbers = part.flatten().tolist()
            if version == 3:
                file.write(struct.pack(f"<{len(numbers)}f", *numbers))
            else:
                bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *numbers))
                file.write(struct.pack(f"<{len(bits)}H", *(b >> 16 for b in bits)))


def write_nanogpt_file(path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, Any], prefix: str = "") -> None:
    """nanoGPT's ckpt.pt: the weights, maybe with torch.compile's prefix, the optimizer's state and plain values."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    named = {f"{prefix}{name}": weight for name, weight in weights.items()}
    named[f"{prefix}lm_head.weight"] = weights["transformer.wte.weight"]
    content = {
        "model": named, "optimizer": optimizer.state_dict(), "model_args": {**sizes, "dropout": 0.0}, "iter_num": 5,
        "best_val_loss": torch.tensor(3.5),
        "config": {"out_dir": "out", "dataset": "openwebtext", "learning_rate": 6e-4},
    }  # fmt: skip
    torch.save(content, path)


def write_build_nanogpt_file(path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, int], legacy: bool) -> None:
    """build-nanogpt's log/model_*.pt: its config is pickled as an instance of the script's own dataclass."""
    fields = [(name, int, value) for name, value in sizes.items()]
    script = ModuleType("train_gpt2")
    config = make_dataclass("GPTConfig", fields)
    config.__module__ = script.__name__
    script.GPTConfig = config  # type: ignore[attr-defined]
    named = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    content = {"model": named, "config": config(), "step": 19072, "val_loss": 3.07}
    before = sys.modules.get("train_gpt2")
    sys.modules["train_gpt2"] = script
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["train_gpt2"]
        if before:
            sys.modules["train_gpt2"] = before
