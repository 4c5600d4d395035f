"""The lens's answers: a text read by every block of a model that was asked for, a few models kept open."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gptlab.errors import CheckpointError
from gptlab.page.run_index import stamp
from gptlab.page.worker_queue import Cache

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import ComputeConfig
    from gptlab.model.gpt import GPT
    from gptlab.signals.tuned_lens import TunedLens

KEPT = 2
"""Models that stay in memory."""


class Opened(Protocol):
    """A model in evaluation mode where it computes, and its tokenizer."""

    @property
    def model(self) -> GPT: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def placement(self) -> ComputeConfig: ...


class Models:
    """Models by where they lie, opened when they are asked for. Used by one thread, so that one computes at a time."""

    def __init__(self, open_model: Callable[[str], Opened]) -> None:
        self._open_model = open_model
        self._opened = Cache(KEPT)

    def read(self, source: Path, prompt: str) -> dict[str, Any]:
        """What `gptlab lens --json` says of a prompt, and `note`, why there is no tuned reading.

        Raises CheckpointError where there is no model, DataError for text that its tokenizer cannot hold, ConfigError
        for more than its block_size tokens.
        """
        from gptlab.interpret.lens import readings

        opened, tuned, note = self._opened.get(source, _mark(source), lambda: self._open(source))[0]
        readers = {"raw": None} if tuned is None else {"raw": None, "tuned": tuned}
        found = readings(opened.model, opened.tokenizer, prompt, readers, autocast=opened.placement.autocast)
        return {"prompt": prompt, "readers": found, "note": note}

    def _open(self, source: Path) -> tuple[Opened, TunedLens | None, str]:
        from gptlab.signals.tuned_lens import load, path_of

        opened = self._open_model(str(source))
        try:
            return opened, load(opened.model, path_of(source)), ""
        except CheckpointError as error:
            return opened, None, f"no tuned reader: {error}"


def _mark(source: Path) -> Hashable:
    """Another one when the model has changed: a run has a newer checkpoint, or a folder's files are others."""
    from gptlab.runs import checkpoint
    from gptlab.signals.tuned_lens import path_of

    if newest := checkpoint.complete(source / "checkpoints")[:1]:
        return newest[0], stamp(path_of(source))
    files = sorted(entry.path for entry in os.scandir(source) if entry.is_file())
    return tuple((file, stamp(Path(file))) for file in [*files, path_of(source)])
