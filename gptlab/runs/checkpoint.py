"""Checkpoints: whole or absent. Weights and moments in safetensors, the rest in JSON, checksums over all of it.

Tensors stand in two files, or, where a run's blocks are cut over processes (training/parallel.py), in one file a
process, through torch.distributed.checkpoint in its one format without pickles: each process writes its rows into the
checkpoint's folder, which all must see, and reads the rows that it needs, of however many processes' files or of whole
tensors.

A checkpoint is written into a hidden folder, flushed, its MANIFEST.json last, and then renamed to step_%08d; a crash at
any moment leaves either the whole of it or a hidden folder that the next save removes. MANIFEST.json holds the SHA-256
of every file and of its own content. The checksums catch accidents; they do not stop an attacker.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptlab.distributed import World
from gptlab.errors import CheckpointError
from gptlab.files import flush, is_count, is_number, open_regular, parse_json, read_bytes, read_json, write_whole
from gptlab.model.gpt import GPTConfig
from gptlab.model.weights import check_moments, check_stored
from gptlab.training.state import TrainingState

WEIGHTS, MOMENTS, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
FORMAT = 1
KEPT = 2
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Problem:
    """A file of a checkpoint that is not as it was written."""

    file: str
    problem: str


@dataclass(frozen=True)
class Verified:
    """A folder that is as it was written, and its state without the tensors."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["scalars"]["step"]


@dataclass(frozen=True)
class Checkpoint(Verified):
    """What was loaded from `folder`, verified."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def save(
    checkpoints: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Save as checkpoints/step_%08d and keep the newest two; raises CheckpointError, with the older ones intact.

    Later steps' checkpoints are damaged ones that training fell back from; they go, so that the newest is the best.
    """
    building = prepare(checkpoints, state["scalars"]["step"])
    with saving(building):
        save_file({k: v.contiguous().cpu() for k, v in weights.items()}, building / WEIGHTS)
        save_file({k: v.contiguous().cpu() for k, v in moments.items()}, building / MOMENTS)
        return seal(building, state)


def prepare(checkpoints: Path, step: int) -> Path:
    """The hidden folder in which a checkpoint is to be made; what a kill left of others is removed."""
    building = checkpoints / f".saving_step_{step:08d}"
    with saving(building):
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_debris(checkpoints)
        building.mkdir()
    return building


@contextmanager
def saving(building: Path) -> Iterator[None]:
    """Inside, an error of writing becomes a CheckpointError, and the hidden folder goes."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        target = building.with_name(building.name.removeprefix(".saving_"))
        raise CheckpointError(
            f"could not save {target}: {what}; earlier checkpoints are intact; make room and run again"
        ) from error


def seal(building: Path, state: Mapping[str, Any]) -> Path:
    """Complete a folder that holds the tensors, and give it its name; see `save`."""
    checkpoints, step = building.parent, state["scalars"]["step"]
    target = checkpoints / f"step_{step:08d}"
    write_whole(building / STATE, _canonical(state))
    names = sorted(path.name for path in building.iterdir())
    manifest = {"format": FORMAT, "step": step, "files": {n: _fingerprint(building / n) for n in names}}
    manifest["sha256"] = hashlib.sha256(_canonical(manifest).encode()).hexdigest()
    write_whole(building / MANIFEST, _canonical(manifest))
    for name in (*names, MANIFEST):
        flush(building / name)
    flush(building)
    if target.exists():  # a damaged one that training fell back from
        _discard(target)
    building.rename(target)
    flush(checkpoints)
    saved = complete(checkpoints)
    at = saved.index(target)
    for stale in saved[:at] + saved[at + KEPT :]:
        _discard(stale)
    return target


_WHOLE = (WEIGHTS, MOMENTS, STATE)
_SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
_COUNTS = ("step", "clipped", "validated", "sampled")


def complete(checkpoints: Path) -> list[Path]:
    """The checkpoint folders that were finished, newest first (their content is not verified here)."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def verify(folder: Path) -> list[Problem]:
    """What is wrong with a checkpoint folder; empty if every file is as it was written."""
    path = folder / MANIFEST
    try:
        content = read_bytes(path, inside=folder, error=CheckpointError)
        manifest = parse_json(content)
        as_written = content == _canonical(manifest).encode()  # a space turned into a line break parses alike
        stated = manifest.pop("sha256")
        expected = {name: dict(fingerprint) for name, fingerprint in manifest["files"].items()}
        rows = sorted(name for name in expected if _SHARD.fullmatch(name))
        names = (*rows, STATE) if rows else _WHOLE
        if not as_written or hashlib.sha256(_canonical(manifest).encode()).hexdigest() != stated:
            return [Problem(str(path), "its content does not match its own checksum")]
        if unknown := expected.keys() - {*names}:
            return [Problem(str(path), f"it lists {sorted(unknown)[0]!r}, which belongs to no checkpoint")]
    except FileNotFoundError:
        return [Problem(str(path), "missing")]
    except CheckpointError as error:
        return [Problem(str(path), str(error))]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return [Problem(str(path), f"cannot be read ({type(error).__name__})")]
    found = ((folder / name, _difference(folder / name, expected.get(name, {}))) for name in names)
    problems = [Problem(str(file), problem) for file, problem in found if problem]
    extra = [path for path in shards(folder) if path.name not in names]
    return problems + [Problem(str(path), "it is not of this checkpoint") for path in extra]


def _difference(file: Path, stated: Mapping[str, Any]) -> str | None:
    """How a file differs from what the manifest states of it, in words."""
    try:
        found = _fingerprint(file, hash_if_bytes=stated.get("bytes", -1))
    except FileNotFoundError:
        return "missing"
    except CheckpointError as error:
        return str(error)
    if found["bytes"] != stated.get("bytes"):
        return f"expected {stated.get('bytes')} bytes, found {found['bytes']}"
    return None if found["sha256"] == stated.get("sha256") else "its content does not match its checksum"


def verified(folder: Path) -> Verified:
    """A checkpoint's state, once its files are found to be as they were written; raises CheckpointError naming one."""
    if problems := verify(folder):
        raise CheckpointError(f"damaged checkpoint: {problems[0].file}: {problems[0].problem}")
    return Verified(folder, read_state(folder / STATE))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint after verifying it, whole even where it was saved in rows; raises CheckpointError."""
    state = verified(folder).state
    if files := shards(folder):
        weights, moments = weights_and_moments(rows_together(files))
    else:
        weights, moments = tensors_in(folder / WEIGHTS), tensors_in(folder / MOMENTS)
    return Checkpoint(folder, state, weights, moments)


def shards(folder: Path) -> list[Path]:
    """The files of a checkpoint in which every process saved its rows; none of one that holds whole tensors."""
    return sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def read_state(path: Path) -> dict[str, Any]:
    """state.json, checked for shape, or CheckpointError: a checksum says that it is as it was written, not by whom."""
    state = read_json(path, inside=path.parent, error=CheckpointError)
    if not isinstance(state, dict) or not _well_formed(state) or not _is_finite(state):
        raise CheckpointError(f"{path}: expected scalars, cursor, rng and records as a run saves them; it is not read")
    return state


def _well_formed(state: Mapping[str, Any]) -> bool:
    scalars, cursor, rng, records = (state.get(part) for part in ("scalars", "cursor", "rng", "records"))
    if not all(isinstance(part, dict) for part in (scalars, cursor, rng, records)):
        return False
    assert isinstance(scalars, dict)
    assert isinstance(records, dict)
    weights = scalars.get("weights")
    return (
        scalars.keys() == {*_COUNTS, "weights"}
        and all(is_count(scalars[name]) for name in _COUNTS)
        and isinstance(weights, list)
        and all(weight is None or is_number(weight) for weight in weights)
        and records.keys() <= {"metrics_bytes", "log_bytes"}
        and all(map(is_count, records.values()))
    )


def _is_finite(state: Mapping[str, Any]) -> bool:
    """Whether it holds neither NaN nor infinity, which JSON has no word for and a run never writes."""
    try:
        return bool(_canonical(state))
    except ValueError:
        return False


def digest(folder: Path) -> tuple[str, int]:
    """(SHA-256 over weights, moments, RNG and data cursor, step) of a checkpoint: equal only for equal states."""
    checkpoint = load(folder)
    h = hashlib.sha256()
    for part in (checkpoint.weights, checkpoint.moments):
        for name, tensor in sorted(part.items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.dim() else tensor.numpy().tobytes())
    scalars = {k: checkpoint.state["scalars"][k] for k in ("step", "clipped", "weights")}
    rest = {"scalars": scalars, "cursor": checkpoint.state["cursor"], "rng": checkpoint.state["rng"]}
    h.update(_canonical(rest).encode())
    return h.hexdigest(), checkpoint.step


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"


def _fingerprint(path: Path, hash_if_bytes: object = None) -> dict[str, Any]:
    """A file's size and SHA-256; of one that has another size than `hash_if_bytes` the size alone: it may be huge."""
    with open_regular(path, inside=path.parent, error=CheckpointError) as file:
        size = os.fstat(file.fileno()).st_size
        if hash_if_bytes not in (None, size):
            return {"bytes": size}
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that a crash half-way leaves no folder that looks finished."""
    hidden = folder.with_name(f".removing_{folder.name}")
    _remove(hidden)
    folder.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Remove a folder if there is one; of a link, or a file, that alone and not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def remove_debris(checkpoints: Path) -> None:
    """Remove what a kill in the middle of a save left; only for the run's writer."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if path.name.startswith((".saving_", ".removing_")):
            _remove(path)


WHERE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; raises CheckpointError where it cannot be read."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """A file's tensors, and what else its header says."""
    open_regular(path, inside=path.parent, error=CheckpointError).close()
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


def _first_row(entry: object, piece: Tensor) -> int | None:
    """The row of the whole tensor at which a piece begins; None where the header says nothing that can be so."""
    offsets = entry.get(OFFSETS) if isinstance(entry, dict) else None
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
            raise CheckpointError(f"{folder}: expected row {expected} of {name} next, found {first}, or another cut")
        expected += len(piece)
    return torch.cat([piece for _, piece in pieces])


def weights_and_moments(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, moments) of tensors that stand together: a moment's name is its kind, a dot and its weight's name."""
    moments = {name for name in tensors if name.partition(".")[2] in tensors}
    weights = {name: tensor for name, tensor in tensors.items() if name not in moments}
    return weights, {name: tensors[name] for name in tensors if name in moments}


def save_sharded(checkpoints: Path | None, state: TrainingState, rest: Mapping[str, Any], world: World) -> None:
    """Save a checkpoint together; every process calls it. checkpoints, rest: of rank 0, see `save`.

    Raises CheckpointError on every process where any could not write, with the older checkpoints intact.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_rows
    from torch.distributed.checkpoint.api import CheckpointException

    device = next(state.model.parameters()).device

    def begin() -> str:
        assert checkpoints is not None, "rank 0 writes the run's folder"
        return str(prepare(checkpoints, state.step).resolve())

    def finish(failed: str) -> None:
        with saving(building):
            if failed:
                raise OSError(failed)
            seal(building, rest)

    building = Path(world.broadcast_from_main(begin, device))
    weights, moments = state.tensors()
    writer = HuggingFaceStorageWriter(str(building), save_distributed=True)
    failed = ""
    with world.collective():
        try:
            save_rows({**weights, **moments}, storage_writer=writer)
        except CheckpointException as error:  # raised by all processes alike
            failed = str(next(iter(error.failures.values()))[0])
    world.broadcast_from_main(lambda: finish(failed), device)


def load_sharded(folder: Path, shape: GPTConfig, state: TrainingState, world: World) -> None:
    """Restore a state from a verified checkpoint, of cut or of whole tensors; every process calls it.

    Raises CheckpointError, before anything is allocated, where its tensors are not those of a model of this shape.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_rows
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored: dict[str, Tensor] = {}
    for name, entry in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        stored[name] = torch.zeros((), dtype=entry.properties.dtype).expand(entry.size)  # of its shape, without memory
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != stored[name].numel():  # torch would leave them unset
            raise CheckpointError(f"{folder}: expected every row of {name} once, found some missing or twice")
    weights, moments = weights_and_moments(stored)
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
    check_moments(*weights_and_moments(into), folder)
    rest = read_state(folder / STATE)
    state.restore(*weights_and_moments(into), rest["scalars"])
