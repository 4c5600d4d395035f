"""Text to tokens to shards, and back: everything a run is trained on. Importing it needs NumPy, not torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptlab import lazy_exports

if TYPE_CHECKING:
    from gptlab.data.corpus import Corpus, open_corpus
    from gptlab.data.tokenizers import Tokenizer, get_tokenizer

__all__ = ["Corpus", "Tokenizer", "get_tokenizer", "open_corpus"]

_exports = {
    "Corpus": "gptlab.data.corpus",
    "Tokenizer": "gptlab.data.tokenizers",
    "get_tokenizer": "gptlab.data.tokenizers",
    "open_corpus": "gptlab.data.corpus",
}


def __getattr__(name: str) -> Any:
    return lazy_exports(__name__, _exports, name)
