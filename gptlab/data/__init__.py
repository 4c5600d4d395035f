"""Text to tokens to shards, and back: everything a run is trained on. Importing it needs NumPy, not torch."""

from gptlab.data.corpus import Corpus, open_corpus
from gptlab.data.tokenizers import Tokenizer, get_tokenizer

__all__ = ["Corpus", "Tokenizer", "get_tokenizer", "open_corpus"]
