"""The model that a command names, where it computes, its tokenizer, and a corpus of its tokens.

A run has the tokenizer that it was trained with, a Hugging Face folder the one that it brings. Where it brings none,
text is refused, and token shards are taken as the model's own: the size of a vocabulary says nothing of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gptlab.data.corpus import Corpus
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import ComputeConfig
    from gptlab.distributed import World
    from gptlab.model.gpt import GPT
    from gptlab.training.config import TrainingConfig

TOKENIZER = "bytes or gpt2, for a folder that brings none [the model's own]"
"""The help of --tokenizer."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model's tokens stand for. known: its tokenizer; missing: why there is none; size: tokens it may draw."""

    known: Tokenizer | None
    missing: DataError
    size: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises DataError where there is none."""
        if self.known is None:
            raise self.missing
        return self.known

    def corpus(self, data: str, world: World, note: Callable[[str], None]) -> tuple[Corpus, Callable[[], bool]]:
        """The corpus, and whether somebody still prepares it; raises DataError or ConfigError for other tokens."""
        from gptlab.cli.corpus import open_or_prepare
        from gptlab.data.corpus import TOKENIZER_FILE, holds_corpus, holds_manifest, open_corpus
        from gptlab.data.tokenizers import TOKENIZERS

        if self.known and self.known.name in TOKENIZERS:
            return open_or_prepare(data, self.known.name, world, note)
        folder = Path(data)
        if not folder.is_dir() or not holds_corpus(folder):
            raise DataError(f"--data {data}: expected a folder of shards of the model's own tokens, found none there")
        corpus = open_corpus(folder)
        if self.known and (holds_manifest(folder) or (folder / TOKENIZER_FILE).exists()):
            raise ConfigError(f"{folder} holds {corpus.tokenizer} tokens, the model's are those of {self.known.name}")
        note(f"{folder}: its tokens are taken as the model's own")
        return corpus, lambda: False


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode on its device, what its tokens stand for, and the run's config where it is one's."""

    model: GPT
    vocabulary: Vocabulary
    placement: ComputeConfig
    config: TrainingConfig | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises DataError where there is none."""
        return self.vocabulary.tokenizer


def vocabulary_of(source: str, model: GPT, own: Callable[[], Tokenizer | None], asked: str | None) -> Vocabulary:
    """What the tokens of the model in `source` stand for.

    own: finds the model's own tokenizer, or raises DataError; asked: --tokenizer, which it must not contradict. Raises
    ConfigError for a tokenizer with tokens that the model does not know, or another than the model's own.
    """
    from gptlab.data.tokenizers import get_tokenizer

    missing = DataError(
        f"{source} brings no tokenizer (tokenizer.json, or vocab.json and merges.txt) to read and write text with: put "
        "the model's own into the folder, or add --tokenizer gpt2 or bytes if it is that; token shards need none "
        "(`gptlab eval FOLDER --data SHARDS`)"
    )
    try:
        known = own()
    except DataError as error:
        known, missing = None, error
    if asked and known and known.name != asked:
        raise ConfigError(
            f"--tokenizer {asked}: {source} has a tokenizer of its own, {known.name}; leave the option out"
        )
    known = get_tokenizer(asked) if asked else known
    rows = model.config.vocab_size
    if known and (beyond := known.beyond(rows)):
        raise ConfigError(
            f"{source} knows {rows} tokens, {beyond}; give the model's own tokenizer, or resize the model to this one"
        )
    size = min(known.vocab_size, model.config.tokens) if known else model.config.tokens
    return Vocabulary(known, missing, size)


def open_any(source: str, asked: str | None) -> tuple[GPT, TrainingConfig | None, Vocabulary]:
    """The model in `source`, its run's config where it is one's, and what its tokens stand for."""
    from gptlab.runs.init_weights import any_model, tokenizer_of

    model, config = any_model(source)
    return model, config, vocabulary_of(source, model, lambda: tokenizer_of(source, config), asked)


def belongings(folder: Path | None, vocabulary: Vocabulary, block_size: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What goes into a Hugging Face folder besides weights and sizes: files, and special tokens for its config.json.

    folder: the one that the model comes from, whose own go along.
    """
    from gptlab.data.huggingface_tokenizer import VOCABULARY, WHOLE, files_of, read_files
    from gptlab.data.tokenizers import TOKENIZERS
    from gptlab.model.huggingface import SPECIAL, read_config

    files = read_files(folder) if folder else {}
    special = {key: value for key, value in read_config(folder).items() if key in SPECIAL} if folder else {}
    known = vocabulary.known
    if known and known.name in TOKENIZERS and not folder:
        special = {"bos_token_id": known.document_start, "eos_token_id": known.end_of_text}
    if known and known.name in TOKENIZERS and not files.keys() & {WHOLE, VOCABULARY}:
        files |= files_of(known.name, block_size)
    return files, special


def open_model(source: str, device: str, dtype: str, threads: int = 0, tokenizer: str | None = None) -> Opened:
    """Open `source`, to compute on `threads` threads, 0 for all cores; tokenizer: for a folder that brings none.

    Raises CheckpointError where there is no model, ConfigError for a device or tokenizer that does not fit.
    """
    from gptlab.device import Machine, choose_compute

    model, config, vocabulary = open_any(source, tokenizer)
    placement = choose_compute(Machine.probe(), device=device, dtype=dtype, threads=threads, n_embd=model.config.n_embd)
    placement.apply()
    model.to(placement.device).eval()
    return Opened(model, vocabulary, placement, config)
