"""GPT-2's tokenizer in the files that transformers reads: the merges as they are, and every token's number."""

from __future__ import annotations

import json
from pathlib import Path

from gptlab.data.tokenizers import MERGES_FILE


def write_tokenizer(out: Path, block_size: int) -> None:
    """Write merges.txt, vocab.json and tokenizer_config.json into a folder."""
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
