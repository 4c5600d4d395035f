"""The model that a command names: a run's, a checkpoint's or a Hugging Face GPT-2 folder's, where it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import Placement
    from gptlab.model.gpt import GPT
    from gptlab.training.config import TrainingConfig


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode on its device, its tokenizer, and the run's config where it is one's."""

    model: GPT
    tokenizer: Tokenizer
    placement: Placement
    config: TrainingConfig | None


def open_model(source: str, device: str, dtype: str, threads: int = 0) -> Opened:
    """Open `source`, to compute on `threads` threads, 0 for all cores.

    Raises CheckpointError where there is no model, ConfigError for a device that is not there.
    """
    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.device import Machine, decide
    from gptlab.runs.initial import any_model

    model, config = any_model(source)
    foreign = "bytes" if model.config.vocab_size <= 256 else "gpt2"
    placement = decide(Machine.probe(), device=device, dtype=dtype, threads=threads, n_embd=model.config.n_embd)
    placement.apply()
    model.to(placement.device).eval()
    return Opened(model, get_tokenizer(config.tokenizer if config else foreign), placement, config)
