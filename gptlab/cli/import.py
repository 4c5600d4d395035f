"""`gptlab import`: another program's model as a Hugging Face GPT-2 folder, which every command of ours reads.

A folder of weights and sizes, and not a checkpoint: a checkpoint also holds moments, a data cursor and the options of a
run that never was.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from gptlab.cli.arguments import Parser
from gptlab.errors import UsageError


def main(argv: list[str]) -> int:
    """Write the folder; raises CheckpointError where SOURCE is no model that is known, UsageError where OUT is used."""
    parser = Parser(
        prog="gptlab import",
        description="Read a GPT-2 of another program and write it as a Hugging Face folder, for sample, eval, export "
        "and --init_from. SOURCE is a Hugging Face GPT-2 folder, nanoGPT's ckpt.pt or out_dir, a build-nanogpt "
        "checkpoint, or a model file of llm.c (version 3 or 5); which one, its content tells. Pickled files are read "
        "as tensors and plain values: code in them is refused, never run.",
    )
    parser.add_argument("source", metavar="SOURCE", help="the file or folder to read")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument(
        "--json", action="store_true", help='print {"folder", "format", "parameters", ..., "tokenizer"}'
    )
    options = parser.parse(argv)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder to import to, found {out} in use; give another one")

    from gptlab.model.foreign import open_foreign
    from gptlab.model.huggingface import GPT2_VOCABULARY, write_folder

    model, kind = open_foreign(options.source)
    shape = model.config
    gpt2 = shape.vocab_size >= GPT2_VOCABULARY
    write_folder(model, out, tokenizer=gpt2)
    told = {
        "folder": str(out), "format": kind, "parameters": shape.parameters, "n_layer": shape.n_layer,
        "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": min(shape.vocab_size, GPT2_VOCABULARY), "tokenizer": "gpt2" if gpt2 else None,
    }  # fmt: skip
    if options.json:
        print(json.dumps(told))
        return 0
    print(f"{options.source}: {kind}, {shape.parameters:,} parameters, {shape.n_layer} blocks, {shape.n_embd} wide")
    if kind == "nanoGPT":
        print("nanoGPT computes GELU exactly, GPT-2 its tanh form: logits differ by about 0.001")
    print(f"imported to {out}")
    if not gpt2:
        print(f"no tokenizer was written: {shape.vocab_size} tokens are not GPT-2's; what they stand for, you know")
    print(f"try next: gptlab sample --checkpoint {shlex.quote(str(out))}")
    return 0
