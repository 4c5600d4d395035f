"""Checkpoints: what goes in comes out, damage is named, nothing half-written looks whole, two are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.errors import CheckpointError
from gptlab.runs import checkpoint


def state(step: int, **changes: Any) -> dict[str, Any]:
    scalars = {"step": step, "clipped": 1, "weights": [], "validated": 0, "sampled": 0, **changes}
    return {"scalars": scalars, "cursor": {"sequence": 8 * step}, "rng": {"seed": 1}, "records": {}}


def tensors(value: float = 0.5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"w": torch.full((3, 2), value)}, {"exp_avg.w": torch.ones(3, 2), "step.w": torch.tensor(4.0)}


def save(folder: Path, step: int, value: float = 0.5, **changes: Any) -> Path:
    return checkpoint.save(folder, *tensors(value), state(step, **changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    assert saved == tmp_path / "step_00000007"
    assert names(saved) == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    found = checkpoint.load(saved)
    weights, moments = tensors()
    assert found.step == 7
    assert found.state == state(7)
    for given, loaded in ((weights, found.weights), (moments, found.moments)):
        assert given.keys() == loaded.keys()
        assert all(torch.equal(given[key], loaded[key]) for key in given)


def test_the_newest_two_are_kept_and_later_ones_superseded(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    save(tmp_path, 2, value=0.7)  # training fell back behind 3 and continued
    assert names(tmp_path) == ["step_00000002"]
    assert checkpoint.load(tmp_path / "step_00000002").weights["w"][0, 0].item() == pytest.approx(0.7)


def test_debris_is_not_a_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".saving_step_00000002", ".removing_step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000001"]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_nothing_saved_is_nothing_complete(tmp_path: Path) -> None:
    assert checkpoint.complete(tmp_path / "none") == []


FILES = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flipped, shortened, emptied, Path.unlink])
def test_any_damage_is_named_and_refused(name: str, damage: Any, tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    assert checkpoint.verify(saved) == []
    damage(saved / name)
    (problem,) = checkpoint.verify(saved)
    assert problem.file == str(saved / name)
    with pytest.raises(CheckpointError, match=f"damaged checkpoint: .*{name}: "):
        checkpoint.load(saved)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.digest(saved)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"sha256": 1, "files": []}', "not JSON", "\udcff"])
def test_a_manifest_of_any_other_shape_is_a_problem_not_a_crash(content: str, tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    (saved / "MANIFEST.json").write_bytes(content.encode(errors="surrogateescape"))
    (problem,) = checkpoint.verify(saved)
    assert problem.file.endswith("MANIFEST.json")


def test_the_manifest_vouches_for_itself(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    manifest["files"]["state.json"]["sha256"] = "0" * 64
    (saved / "MANIFEST.json").write_text(json.dumps(manifest))
    assert [p.problem for p in checkpoint.verify(saved)] == ["its content does not match its own checksum"]


def test_the_digest_tells_every_part_of_the_state_and_nothing_else(tmp_path: Path) -> None:
    first, step = checkpoint.digest(save(tmp_path / "a", 1))
    assert step == 1
    assert len(first) == 64
    same = checkpoint.digest(save(tmp_path / "b", 1, validated=1, sampled=1))[0]
    assert same == first  # whether a step was validated is no part of what was learnt
    others = {
        checkpoint.digest(save(tmp_path / "c", 1, value=0.25))[0],
        checkpoint.digest(save(tmp_path / "d", 2))[0],
        checkpoint.digest(save(tmp_path / "e", 1, clipped=0))[0],
        checkpoint.digest(save(tmp_path / "f", 1, weights=[0.1]))[0],
        checkpoint.digest(checkpoint.save(tmp_path / "g", tensors()[0], {}, state(1)))[0],
        checkpoint.digest(checkpoint.save(tmp_path / "h", *tensors(), {**state(1), "rng": {"seed": 2}}))[0],
        checkpoint.digest(checkpoint.save(tmp_path / "i", *tensors(), {**state(1), "cursor": {"sequence": 9}}))[0],
    }
    assert len(others) == 7
    assert first not in others


def test_a_state_json_cannot_hold_is_our_own_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 1, weights=[float("nan")])


def test_a_place_that_cannot_be_written_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not save .*step_00000001: .*; earlier checkpoints are intact"):
        save(tmp_path / "file" / "checkpoints", 1)
