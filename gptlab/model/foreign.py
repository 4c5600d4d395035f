"""A model that another program wrote, whatever its format: told from what is in the file, never from its name."""

from __future__ import annotations

from pathlib import Path

from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT
from gptlab.model.llmc import MAGIC, read_llmc
from gptlab.model.nanogpt import PICKLE, ZIP, read_pickled
from gptlab.parsing import parse_json

NANOGPT_FILE = "ckpt.pt"
SHARD_MAGIC = 20240520
OWN = ("checkpoints", "MANIFEST.json")
"""What lies in a run's folder, and in a checkpoint's."""
FORMATS = "a Hugging Face GPT-2 folder, a nanoGPT or build-nanogpt checkpoint, or an llm.c model"


def open_foreign(source: str | Path) -> tuple[GPT, str]:
    """The model in `source` and the name of its format; raises CheckpointError where it is none that is known.

    source: a Hugging Face folder, nanoGPT's out_dir, or a file of nanoGPT, build-nanogpt or llm.c
    """
    path = Path(source)
    if path.is_dir():
        if is_huggingface(path):
            from gptlab.model.huggingface import from_huggingface

            return from_huggingface(path), "Hugging Face"
        if not (path / NANOGPT_FILE).is_file():
            ours = "; what gptlab trained needs no import" * any((path / name).exists() for name in OWN)
            raise CheckpointError(f"expected {FORMATS}, found none of them in the folder {path}{ours}")
        path /= NANOGPT_FILE
    if not path.is_file():
        raise CheckpointError(f"expected {FORMATS}, found nothing at {path}; check the path")
    with path.open("rb") as file:
        start = file.read(9)
    number = int.from_bytes(start[:4], "little")
    if number == MAGIC:
        return read_llmc(path), "llm.c"
    if number == SHARD_MAGIC:
        raise CheckpointError(f"{path} holds tokens, not a model: give its folder to --data")
    if start[:1] == b"{" or start[8:9] == b"{":
        raise CheckpointError(f"{path}: expected {FORMATS}, found a single file of one; give its folder")
    if start.startswith((ZIP, PICKLE)):
        return read_pickled(path)
    raise CheckpointError(f"{path}: expected {FORMATS}, found none of them; is it cut off?")


def is_huggingface(folder: Path) -> bool:
    """Whether the folder's config.json is of transformers: a run's own has no model_type."""
    try:
        return "model_type" in parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
