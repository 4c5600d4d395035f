"""Tensors in safetensors files: whole ones, and ones cut by rows over several files, put together again.

A file of rows is what torch.distributed.checkpoint writes with its HuggingFaceStorageWriter: its header says at which
offsets of the whole tensor each of its pieces stands. Nothing of torch.distributed is needed to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from gptlab.errors import CheckpointError
from gptlab.parsing import is_count, parse_json

WHERE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; raises CheckpointError where it cannot be read."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """A file's tensors, and what else its header says."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()  # an open file is no dict and cannot be iterated over itself
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:  # the last two: a dtype torch lacks
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def rows_together(files: Sequence[Path]) -> dict[str, Tensor]:
    """The whole tensors whose rows stand in these files.

    Raises CheckpointError where rows are missing, stand in two files, or are said to be cut otherwise than by rows.
    """
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for path in files:
        tensors, header = _read(path)
        offsets = _offsets(header)
        for name, piece in tensors.items():
            first = _first_row(offsets.get(name), piece)
            if first is None:
                raise CheckpointError(f"{path}: expected the place of each tensor's rows, found none of {name}")
            found.setdefault(name, []).append((first, piece))
    return {name: _together(name, pieces, files[0].parent) for name, pieces in found.items()}


def _offsets(header: Mapping[str, str]) -> Mapping[str, object]:
    """What a header says of each tensor's place; nothing where it says nothing that can be read."""
    try:
        parsed = parse_json(header.get(WHERE, ""))
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {}


def _first_row(said: object, piece: Tensor) -> int | None:
    """The row of the whole tensor at which a piece begins; None where the header says nothing that can be so."""
    offsets = said.get(OFFSETS) if isinstance(said, dict) else None
    if not isinstance(offsets, list) or len(offsets) != piece.dim() or not all(map(is_count, offsets)):
        return None
    return None if any(offsets[1:]) else sum(offsets[:1])


def _together(name: str, pieces: list[tuple[int, Tensor]], folder: Path) -> Tensor:
    pieces.sort(key=lambda piece: piece[0])
    if len(pieces) == 1 and not pieces[0][0]:
        return pieces[0][1]
    expected = 0
    shapes = {(piece.dtype, piece.shape[1:]) for _, piece in pieces}
    for first, piece in pieces:
        if first != expected or not piece.dim() or len(shapes) > 1:
            raise CheckpointError(
                f"{folder}: expected row {expected} of {name} next, found row {first}, or another cut"
            )
        expected += len(piece)
    return torch.cat([piece for _, piece in pieces])


def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, moments) of tensors that stand together: a moment's name is its kind, a dot and its weight's name."""
    moments = {name for name in tensors if name.partition(".")[2] in tensors}
    weights = {name: tensor for name, tensor in tensors.items() if name not in moments}
    return weights, {name: tensors[name] for name in tensors if name in moments}
