"""Checkpoints of blocks that are cut over processes: saved by four, read by two and by one, and read by nobody else."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from gptlab.errors import CheckpointError
from gptlab.runs import checkpoint
from gptlab.runs.checkpoint import OFFSETS, WHERE, apart, rows_together

SCRIPT = Path(__file__).with_name("sharded_checkpoint.py")


@pytest.mark.fault(number=18)
def test_four_processes_save_what_two_and_one_read(tmp_path: Path) -> None:
    """Weights and moments, tied ones once, bit for bit, whoever reads; whole tensors can be read in rows too."""
    by_four, by_two, again = (tmp_path / name for name in ("four", "two", "again"))
    run_ranks(SCRIPT, 4, "-", by_four)
    saved = by_four / "step_00000005"
    assert [path.name for path in checkpoint.shards(saved)] == [
        f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2, 3, 4)
    ]
    assert checkpoint.verify(saved) == []
    found = checkpoint.load(saved)
    assert {name.partition(".")[0] for name in found.moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert "lm_head.weight" not in found.weights

    whole = checkpoint.save(tmp_path / "one", found.weights, found.moments, found.state)
    assert checkpoint.digest(whole) == checkpoint.digest(saved)
    run_ranks(SCRIPT, 2, saved, by_two, whole, again)
    for copy in (by_two, again):
        assert checkpoint.digest(copy / "step_00000005") == checkpoint.digest(saved)

    damaged = tmp_path / "damaged"
    for name, spoil, words in (
        ("shard-00002", lambda path: path.unlink(), "missing"),
        ("shard-00003", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "does not match"),
        ("shard-00004", lambda path: shutil.copy(path, path.with_name(path.name.replace("4", "5", 1))), "not of this"),
    ):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(saved, damaged)
        spoil(next(damaged.glob(f"{name}*")))
        (problem,) = checkpoint.verify(damaged)
        assert words in problem.problem
        with pytest.raises(CheckpointError, match=r"damaged checkpoint: .*shard-0000"):
            checkpoint.load(damaged)


@pytest.mark.fault(number=4)
def test_one_process_without_room_fails_the_save_of_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_ranks(SCRIPT, 2, "-", out, "full")
    assert list(out.iterdir()) == [], "nothing is left that looks like a checkpoint, and no debris"


def rows(folder: Path, *pieces: tuple[object, torch.Tensor]) -> list[Path]:
    """Files of rows of a tensor w, one a piece, with what their headers say of its place."""
    files = []
    for n, (place, tensor) in enumerate(pieces, start=1):
        files.append(folder / f"shard-{n:05d}-model-00001-of-00001.safetensors")
        save_file({"w": tensor}, files[-1], {WHERE: json.dumps(place) if not isinstance(place, str) else place})
    return files


def at(*offsets: int) -> dict[str, dict[str, list[int]]]:
    return {"w": {OFFSETS: list(offsets)}}


def test_rows_are_put_together_in_their_order(tmp_path: Path) -> None:
    whole = torch.arange(15.0).view(5, 3)
    found = rows_together(rows(tmp_path, (at(2, 0), whole[2:]), (at(0, 0), whole[:2])))
    assert torch.equal(found["w"], whole)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (((at(0, 0), 2), (at(3, 0), 2)), "expected row 2 of w"),
        (((at(0, 0), 2), (at(1, 0), 2)), "expected row 2 of w"),
        (((at(1, 0), 2),), "expected row 0 of w"),
        (((at(0, 0), 2), (at(10**12, 0), 2)), "expected row 2 of w"),
        (((at(0, 1), 2),), "place of each tensor's rows"),
        (((at(0), 2),), "place of each tensor's rows"),
        (((at(-1, 0), 2),), "place of each tensor's rows"),
        ((({"w": [0, 0]}, 2),), "place of each tensor's rows"),
        ((("not json", 2),), "place of each tensor's rows"),
        ((([], 2),), "place of each tensor's rows"),
    ],
)
def test_rows_that_make_no_whole_are_refused(pieces: tuple, words: str, tmp_path: Path) -> None:
    files = rows(tmp_path, *((place, torch.zeros(count, 3)) for place, count in pieces))
    with pytest.raises(CheckpointError, match=words):
        rows_together(files)


def test_moments_are_told_from_weights_by_their_names() -> None:
    names = ["transformer.wte.weight", "exp_avg.transformer.wte.weight", "step.transformer.wte.weight", "h.weight"]
    weights, moments = apart({name: torch.zeros(()) for name in names})
    assert list(weights) == [names[0], names[3]]
    assert list(moments) == names[1:3]


def test_a_manifest_lists_nothing_but_a_checkpoints_own_files(tmp_path: Path) -> None:
    """Whoever wrote it: a name that leads out of the folder is not followed."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    state = {"scalars": {"step": 1}}
    folder = checkpoint.save(tmp_path / "checkpoints", {"w": torch.zeros(1)}, {}, state)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest.pop("sha256")
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    text = json.dumps(manifest, sort_keys=True, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")
    (problem,) = checkpoint.verify(folder)
    assert "belongs to no checkpoint" in problem.problem
