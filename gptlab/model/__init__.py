"""GPT-2: tokens -> one hidden state per block -> logits, and its way to and from Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptlab import lazy_exports

if TYPE_CHECKING:
    from gptlab.model.gpt import GPT, GPTConfig
    from gptlab.model.huggingface import from_huggingface, to_huggingface

__all__ = ["GPT", "GPTConfig", "from_huggingface", "to_huggingface"]

_exports = {
    "GPT": "gptlab.model.gpt",
    "GPTConfig": "gptlab.model.gpt",
    "from_huggingface": "gptlab.model.huggingface",
    "to_huggingface": "gptlab.model.huggingface",
}


def __getattr__(name: str) -> Any:
    return lazy_exports(__name__, _exports, name)
