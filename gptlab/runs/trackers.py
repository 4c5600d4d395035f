"""Figures of a run, handed on to TensorBoard, Weights & Biases or trackio as they are recorded (`--log`).

Observers: the run does not know of them, and what they do or fail to do changes no figure of it. Nothing leaves the
machine unless the user's own settings of Weights & Biases or trackio say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gptlab.errors import ConfigError, needs_package
from gptlab.options import flatten
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record

PROJECT = "gptlab"


class Tracker(Protocol):
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def figures(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl under its names, entries of lists counted from 1; what is null is left out.

    >>> figures("val", {"loss": 2.5, "block_loss": [3.0, 2.5]})
    {'val/loss': 2.5, 'val/block_loss/1': 3.0, 'val/block_loss/2': 2.5}
    """

    def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, list):
            for i, one in enumerate(value, start=1):
                yield from numbers(f"{name}/{i}", one)
        elif isinstance(value, int | float):
            yield name, float(value)

    return {name: number for key, value in values.items() for name, number in numbers(f"{kind}/{key}", value)}


class TensorBoard:
    """Event files in the run's folder. Every step is on disk before its checkpoint is: a resume finds none missing."""

    def __init__(self, config: TrainingConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)  # readers forget what came after `step`

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project gptlab, written into the run's folder for `wandb sync`: offline unless the user set a mode."""

    def __init__(self, config: TrainingConfig, folder: Path, step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own errors to its makers
        wandb = import_module("wandb")
        chosen = "mode" in wandb.setup().settings.model_fields_set
        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=flatten(config),
            mode=None if chosen else "offline",
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of project gptlab in trackio's own folder on this machine, unless the user has set a Space for it."""

    def __init__(self, config: TrainingConfig, folder: Path, step: int) -> None:
        trackio = import_module("trackio")
        name = folder.resolve()
        self._trackio = trackio
        self._run = trackio.init(
            project=PROJECT, name=f"{name.parent.name}/{name.name}", resume="allow", config=flatten(config),
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._trackio.finish()  # the run's own would be called again when Python ends, and print


TRACKERS: dict[str, Callable[[TrainingConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_installed(config: TrainingConfig) -> None:
    """Raises ConfigError for a tracker whose package is not there."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(needs_package(f"--log {name}", name))


@contextlib.contextmanager
def tracking(
    config: TrainingConfig, folder: Path, step: int, note: Callable[[str], None]
) -> Iterator[Callable[[Record], None]]:
    """Hands records on to all trackers of the config, from after `step` on; what they print goes to standard error.

    Raises ConfigError where one cannot begin. One that fails later is left out from then on; `note` gets the reason.
    """
    trackers: dict[str, Tracker] = {}

    def each(action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    action(tracker)
            except Exception as error:
                del trackers[name]
                note(f"{name} logs no more: {type(error).__name__}: {error}".partition("\n")[0])

    def write(record: Record) -> None:
        if record.kind in ("train", "val"):
            named = figures(record.kind, record.values)
            each(lambda one: one.write(record.step, named))

    try:
        for name in config.trackers:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    trackers[name] = TRACKERS[name](config, folder, step)
            except Exception as error:
                line = f"--log {name} cannot begin: {type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"{line}; leave it out, or mend its settings") from error
        yield write
    finally:
        each(lambda one: one.close())
