"""Saving and loading a state whose blocks are cut over the processes (training/sharding.py).

Through torch.distributed.checkpoint, in its one format without pickles: each process writes its rows into a safetensors
file of the checkpoint's folder, which all must see, and reads the rows that it needs, of however many processes' files
or of whole tensors. The rest is as for any checkpoint: hidden folder, checksums, rename, all by rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.distributed import World
from gptlab.model.gpt import GPTConfig
from gptlab.model.weights import check_moments, check_stored
from gptlab.runs import checkpoint
from gptlab.runs.checkpoint import apart
from gptlab.training.state import TrainingState


def save(checkpoints: Path | None, state: TrainingState, rest: Mapping[str, Any], world: World) -> None:
    """Save a checkpoint together; every process calls it. checkpoints, rest: of rank 0, see `checkpoint.save`.

    Raises CheckpointError on every process where any could not write, with the older checkpoints intact.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_rows
    from torch.distributed.checkpoint.api import CheckpointException

    device = next(state.model.parameters()).device

    def prepare() -> str:
        assert checkpoints is not None, "rank 0 writes the run's folder"
        return str(checkpoint.prepare(checkpoints, state.step).resolve())

    def finish(failed: str) -> None:
        with checkpoint.saving(building):
            if failed:
                raise OSError(failed)
            checkpoint.seal(building, rest)

    building = Path(world.broadcast_from_main(prepare, device))
    weights, moments = state.tensors()
    writer = HuggingFaceStorageWriter(str(building), save_distributed=True)
    failed = ""
    with world.collective():
        try:
            save_rows({**weights, **moments}, storage_writer=writer)
        except CheckpointException as error:  # raised by all processes alike
            failed = str(next(iter(error.failures.values()))[0])
    world.broadcast_from_main(lambda: finish(failed), device)


def load(folder: Path, shape: GPTConfig, state: TrainingState, world: World) -> None:
    """Restore a state from a verified checkpoint, of cut or of whole tensors; every process calls it.

    Raises CheckpointError, before anything is allocated, where its tensors are not those of a model of this shape.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_rows
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    said = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    stored = {
        name: _shaped(entry.size, entry.properties.dtype)
        for name, entry in said.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    weights, moments = apart(stored)
    check_stored(shape, weights, folder)
    check_moments(weights, moments, folder)
    parameters = dict(state.model.named_parameters())
    into = {name: torch.empty_like(parameters[name].detach()) for name in weights}
    for name, found in moments.items():
        key, _, of = name.partition(".")
        like = parameters[of].detach()
        into[name] = torch.empty_like(found, device="cpu") if key == "step" else torch.empty_like(like)
    with world.collective():
        load_rows(into, storage_reader=HuggingFaceStorageReader(str(folder)))
    rest = checkpoint.read_state(folder / checkpoint.STATE)
    state.restore(*apart(into), rest["scalars"])


def _shaped(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.zeros((), dtype=dtype).expand(size)
