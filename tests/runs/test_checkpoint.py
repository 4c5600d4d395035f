"""Checkpoints: what goes in comes out bit for bit, sharded ones too; damage is named."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scripts import run_ranks
from torch import Tensor

from gptlab.cli.main import main
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import CheckpointError
from gptlab.model import GPT, GPTConfig
from gptlab.runs import checkpoint
from gptlab.runs.checkpoint import OFFSETS, WHERE, rows_together, weights_and_moments
from gptlab.runs.folder import RunFolder, newest
from gptlab.training import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import full_tensor, shard_blocks, shard_like
from gptlab.training.state import TrainingState


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


KEPT = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "muon": {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.fault(number=18)
@pytest.mark.parametrize(("optimizer", "share_blocks"), [("adamw", False), ("muon", False), ("muon", True)])
def test_weights_and_moments_are_the_ones_that_were_saved(
    optimizer: str, share_blocks: bool, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "optimizer": optimizer,
        "share_blocks": share_blocks,
        "schedule": "constant",
        "threads": 1,
    }
    changes |= {"signal_name": "confidence", "checkpoint_every": 100, "eval_every": 0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(tiny(whole, **changes)) == main(tiny(stopped, **changes, steps=3)) == 0

    saved, config = checkpoint.load(newest(stopped)), RunFolder(stopped).config()
    model = GPT(GPTConfig(16, 256, 2, 2, 32, share_blocks=share_blocks), seed=99)
    state = TrainingState(model, build_optimizer(model, config))
    for p in model.parameters():  # a state that has moved on already
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.restore(saved.weights, saved.moments, saved.state["scalars"])
    weights, moments = state.tensors()
    assert same(weights, saved.weights)
    assert same(moments, saved.moments)
    assert {name.partition(".")[0] for name in moments} == KEPT[optimizer]
    assert model.lm_head.weight is model.wte.weight, "tied"
    assert "lm_head.weight" not in weights
    assert state.step == 3

    assert main(tiny(stopped, **changes)) == 0
    assert checkpoint.digest(newest(stopped)) == checkpoint.digest(newest(whole))


@pytest.fixture
def one_of_two_ranks() -> Iterator[World]:
    """A rank whose process group answers at once and sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield World(rank=0, size=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ["adamw", "muon", "sharded"])
def test_every_tensor_is_restored_to_the_device_where_the_optimizer_keeps_it(
    case: str, fused: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On an accelerator a fused kernel refuses a `step` on the host. The meta device stands for the accelerator."""
    optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim hides the name
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config = TrainingConfig(optimizer="muon" if case == "muon" else "adamw")
    model = GPT(GPTConfig(16, 256, 2, 2, 32)).to("meta")
    if case == "sharded":
        world = request.getfixturevalue("one_of_two_ranks")
        shard_blocks(model, world, ComputeConfig(torch.device("cpu"), None, 1, False, {}))

    def fresh() -> TrainingState:
        state = TrainingState(model, build_optimizer(model, config))
        for group in state.optimizer.param_groups:
            if "betas" in group:  # AdamW's
                group["fused"] = fused
        return state

    stepped = fresh()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stepped.optimizer.step()
    weights, moments = stepped.tensors()
    loaded = {name: torch.zeros(()) if name.startswith("step.") else tensor for name, tensor in moments.items()}
    resumed = fresh()
    resumed.restore(weights, loaded, {})  # a checkpoint's counts are read into the host's memory
    found = {name: tensor.device for name, tensor in resumed.tensors()[1].items()}
    assert found == {name: tensor.device for name, tensor in moments.items()}
    assert {device.type for name, device in found.items() if name.startswith("step.")} == {"meta" if fused else "cpu"}
    resumed.optimizer.step()


SCRIPT = Path(__file__)
"""Run by itself, `python test_checkpoint.py FROM TO [FROM TO ...] [full]` is one of the ranks."""
SHAPE = GPTConfig(block_size=8, vocab_size=31, n_layer=3, n_head=2, n_embd=10)  # 10 rows: 4 ranks hold 3, 3, 3 and 1
REST = {"cursor": {"sequence": 3}, "rng": {"seed": 1}, "records": {"metrics_bytes": 1, "log_bytes": 1}}


def moved_on(model: GPT, seed: int) -> TrainingState:
    """A state after one update with gradients drawn from a seed, the same on every rank."""
    state = TrainingState(model, build_optimizer(model, TrainingConfig()))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = shard_like(torch.randn(p.shape, generator=generator), p.detach())
    state.optimizer.step()
    state.step = seed
    return state


def one_rank(world: World, source: str, out: Path, full: bool) -> None:
    """One of the processes over which a state's blocks are cut: a checkpoint in, another out.

    source: a checkpoint's folder, or - for a state after one update. It is restored over a state that has moved on,
    compared with what was saved, bit for bit, and saved into `out`. full: the last rank finds no room to write, and
    every rank says so.
    """
    model = GPT(SHAPE, seed=7)
    shard_blocks(model, world, ComputeConfig(torch.device("cpu"), None, 1, False, {}))
    state = moved_on(model, 5)
    if source != "-":
        state = moved_on(model, 6)
        checkpoint.load_sharded(Path(source), SHAPE, state, world)
        saved = checkpoint.load(Path(source))
        for mine, theirs in zip(state.tensors(), (saved.weights, saved.moments), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(full_tensor(mine[name]), theirs[name]) for name in theirs)
        assert state.step == saved.step
        assert model.lm_head.weight is model.wte.weight, "tied"
    if full and world.rank == world.size - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    rest = {**REST, "scalars": state.scalars()}
    refusal = f"could not save {out.resolve()}/step_00000005"
    with pytest.raises(CheckpointError, match=refusal) if full else nullcontext():
        checkpoint.save_sharded(out if world.main else None, state, rest if world.main else {}, world)


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

    shutil.rmtree(damaged)
    shutil.copytree(saved, damaged)
    next(damaged.glob("shard-00002*")).unlink()
    state = TrainingState(GPT(SHAPE, seed=9), build_optimizer(GPT(SHAPE), TrainingConfig()))
    with pytest.raises(CheckpointError, match=r"expected every row of .* once"):  # though a manifest lists what is left
        checkpoint.load_sharded(damaged, SHAPE, state, World())


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
    weights, moments = weights_and_moments({name: torch.zeros(()) for name in names})
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect(torch.device("cpu"), timeout=timedelta(seconds=120))
    try:
        words = [word for word in sys.argv[1:] if word != "full"]
        for source, out in zip(words[::2], words[1::2], strict=True):
            one_rank(world, source, Path(out), "full" in sys.argv)
    finally:
        world.disconnect()
