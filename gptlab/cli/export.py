"""`gptlab export`: a run as a Hugging Face GPT-2 folder. What the weights become is told in model/huggingface.py."""

from __future__ import annotations

import json
from pathlib import Path

from gptlab.cli.arguments import Parser
from gptlab.errors import UsageError


def main(argv: list[str]) -> int:
    """Write the folder; raises UsageError where it would overwrite something, CheckpointError where RUN is damaged."""
    parser = Parser(
        prog="gptlab export",
        description="Write a run's newest checkpoint as a folder that transformers loads as GPT2LMHeadModel. "
        "A run over GPT-2 tokens gets its tokenizer too.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, new or empty")
    parser.add_argument("--json", action="store_true", help='print {"folder", "parameters", "tokenizer"}')
    options = parser.parse(argv)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder to export to, found {out} in use; give another one")

    from gptlab.model.huggingface import to_huggingface
    from gptlab.runs.initial import model_of

    model, config = model_of(options.run)
    to_huggingface(model).save_pretrained(out)
    written = config.tokenizer == "gpt2"
    if written:
        _write_tokenizer(out, config.block_size)
    if options.json:
        parameters = model.config.parameters
        print(json.dumps({"folder": str(out), "parameters": parameters, "tokenizer": "gpt2" if written else None}))
        return 0
    print(f"{options.run} exported to {out}")
    if not written:
        print("no tokenizer was written: this run reads bytes, so a token is the value of a UTF-8 byte")
    print(f'load it with: transformers.GPT2LMHeadModel.from_pretrained("{out}")')
    return 0


def _write_tokenizer(out: Path, block_size: int) -> None:
    """GPT-2's tokenizer in the files that transformers reads: the merges as they are, and every token's number."""
    from gptlab.data.tokenizers import MERGES_FILE

    merges = MERGES_FILE.read_bytes()
    end = "<|endoftext|>"
    # Merges are written in visible stand-ins of bytes: the printable of Latin-1 themselves, then U+0100 and on.
    visible = [chr(byte) for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    singles = visible + [chr(256 + extra) for extra in range(256 - len(visible))]
    joined = [line.replace(" ", "") for line in merges.decode().splitlines()[1:]]
    vocabulary = {token: number for number, token in enumerate([*singles, *joined, end])}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
    }
    (out / "merges.txt").write_bytes(merges)
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
