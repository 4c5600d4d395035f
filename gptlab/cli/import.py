"""`gptlab import`: another program's model as a Hugging Face GPT-2 folder, which every command of ours reads.

A folder of weights and sizes, and not a checkpoint: a checkpoint also holds moments, a data cursor and the options of a
run that never was.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.cli.arguments import Parser
from gptlab.cli.model import TOKENIZER
from gptlab.errors import UsageError

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer


def main(argv: list[str]) -> int:
    """Write the folder; raises CheckpointError where SOURCE is no model that is known, UsageError where OUT is used."""
    parser = Parser(
        prog="gptlab import",
        description="Read a GPT-2 of another program and write it as a Hugging Face folder, for sample, eval, export "
        "and --init_from, with the tokenizer that it brings. SOURCE is a Hugging Face GPT-2 folder, nanoGPT's ckpt.pt "
        "or out_dir, a build-nanogpt checkpoint or its log folder, or a model file of llm.c (version 3 or 5); which "
        "one, its content tells. Pickled files are read as tensors and plain values: code in them is refused, never "
        "run.",
    )
    parser.add_argument("source", metavar="SOURCE", help="the file or folder to read")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], help=TOKENIZER)
    parser.add_argument(
        "--json", action="store_true", help='print {"folder", "format", "parameters", ..., "padding", "tokenizer"}'
    )
    options = parser.parse(argv)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder to import to, found {out} in use; give another one")

    from gptlab.cli.model import belongings, vocabulary_of
    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.model.formats import open_foreign
    from gptlab.model.huggingface import write_folder
    from gptlab.runs.init_weights import tokenizer_of

    found = open_foreign(options.source)
    shape, folder = found.model.config, found.file if found.file.is_dir() else None

    def own() -> Tokenizer | None:
        return tokenizer_of(folder, None) if folder else get_tokenizer("gpt2") if found.gpt2 else None

    vocabulary = vocabulary_of(options.source, found.model, own, options.tokenizer)
    files, special = belongings(folder, vocabulary, shape.block_size)
    write_folder(found.model, out, files, special)
    result = {
        "folder": str(out), "format": found.format, "file": str(found.file), "parameters": shape.parameters,
        "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": shape.tokens, "padding": shape.vocab_size - shape.tokens,
        "tokenizer": vocabulary.known.name if vocabulary.known else None,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 0
    size = f"{shape.parameters:,} parameters, {shape.n_layer} blocks, {shape.n_embd} wide"
    print(f"{found.file}: {found.format}, {size}, {shape.tokens:,} tokens")
    if result["padding"]:
        print(f"{result['padding']} rows that pad {found.format}'s vocabulary to {shape.vocab_size:,} were cut")
    print(f"imported to {out}")
    if vocabulary.known:
        print(f"tokenizer: {vocabulary.known.name}")
        print(f"try next: gptlab sample --checkpoint {shlex.quote(str(out))}")
    else:
        print(vocabulary.missing)
        print(f"try next: gptlab eval {shlex.quote(str(out))} --data SHARDS")
    return 0
