"""SIGKILL at any moment, then the same command again: the very same run; and what may differ between two that are."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, Trainer, kill, make_corpus, options, outcome, row_count, rows, settle

from gptlab.data.batches import TrainingWindows
from gptlab.data.corpus import open_corpus
from gptlab.distributed import World
from gptlab.errors import CheckpointError
from gptlab.options import build
from gptlab.runs.folder import RunFolder, newest
from gptlab.training.config import TrainingConfig
from gptlab.training.step import MicroBatches

STEPS = 24  # over three epochs; with the rows of validation and samples 28 rows


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run in one go, by number of processes: sums over two ranks round otherwise than one rank's."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = Trainer(corpus, folder)
    try:
        for processes in (1, 2):
            ended = trainer.train(folder / str(processes), processes=processes, steps=STEPS)
            assert ended.code == 0, ended.err
    finally:
        trainer.close()
    return {processes: folder / str(processes) for processes in (1, 2)}


@pytest.mark.slow
@pytest.mark.fault(number=2)
@pytest.mark.parametrize(("processes", "victim"), [(1, "worker"), (1, "torchrun"), (2, "worker"), (2, "both")])
def test_killed_at_a_random_moment_and_identical(
    processes: int, victim: str, trainer: Trainer, whole: dict[int, Path], tmp_path: Path
) -> None:
    run, choose = tmp_path / "run", random.Random(f"{processes} {victim}")
    running = trainer.start(run, processes=processes, steps=STEPS)
    running.wait_for_rows(run, choose.randrange(6, 22))
    time.sleep(choose.uniform(0, 0.05))
    kill(running, victim, choose)
    left, written = settle(running, run)
    assert (left, written) == ([], 0), "a worker outlived its torchrun, or wrote on"
    assert running.end().code != 0
    ended = trainer.train(run, processes=processes, steps=STEPS)
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(whole[processes])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"say": 2, "reply": 2, "dose": 0.3}, {"exact": "true", "control": "placebo"}, {"listener": "frozen:EARLIER"}],
    ids=str,
)
def test_a_conversation_killed_twice_is_identical(
    options: dict[str, Any], trainer: Trainer, tmp_path: Path, choose: random.Random
) -> None:
    """What is said is drawn by key, so its figures are the same too; a frozen listener is read again each time."""
    how = {f"signal.{key}": value for key, value in {"name": "conversation", "threshold": 0.01, **options}.items()}
    if "listener" in options:
        assert trainer.train(tmp_path / "earlier", signal_name="none", steps=4).code == 0
        how["signal.listener"] = f"frozen:{tmp_path / 'earlier'}"
    how |= {"signal_name": "none", "steps": STEPS}
    run, whole = tmp_path / "run", tmp_path / "whole"
    ended = trainer.train(whole, **how)
    assert ended.code == 0, ended.err
    for first, last in ((6, 12), (15, 24)):
        running = trainer.start(run, **how)
        running.wait_for_rows(run, choose.randrange(first, last))
        kill(running, "worker", choose)
        assert running.end().code == -signal.SIGKILL
    ended = trainer.train(run, **how)
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(whole)
    (weights, *others) = (newest(path) / "model.safetensors" for path in (run, whole))
    assert [path.read_bytes() for path in others] == [weights.read_bytes()]
    assert any(row.get("reward", 0) > 0 for row in rows(run))


@pytest.mark.slow
@pytest.mark.fault(number=12)
def test_with_restarts_it_goes_on_by_itself(
    trainer: Trainer, whole: dict[int, Path], tmp_path: Path, choose: random.Random
) -> None:
    """`--resume never` too: what torchrun starts anew is the run that it has begun, not another."""
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=STEPS, restarts=1, resume="never")
    running.wait_for_rows(run, choose.randrange(1, 22))
    time.sleep(choose.uniform(0, 0.05))
    kill(running, "worker", choose)
    ended = running.end()
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(whole[2])
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


@pytest.mark.slow
@pytest.mark.fault(number=7)
def test_torchrun_passes_a_stop_on(
    trainer: Trainer, whole: dict[int, Path], tmp_path: Path, choose: random.Random
) -> None:
    """Both ranks stop after the same update and one of them speaks; torchrun's own exit code is 1 or the signal's."""
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=STEPS)
    running.wait_for_rows(run, choose.randrange(2, 12))
    asked = time.monotonic()
    running.send(signal.SIGTERM)
    ended = running.end()
    assert time.monotonic() - asked < 30
    assert ended.code != 0
    (line,) = ended.ours
    assert "with a checkpoint saved" in line
    last = rows(run)[-1]
    assert last["event"] == "Stopped"
    assert newest(run).name == f"step_{last['step']:08d}"
    assert not running.workers()
    ended = trainer.train(run, processes=2, steps=STEPS)
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(whole[2])


@pytest.mark.slow
def test_the_rank_that_is_left_says_that_it_lost_one(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=4000)
    running.wait_for_rows(run, 5)
    running.send(signal.SIGKILL, running.workers()[1])
    ended = running.end()
    assert ended.code != 0
    (line,) = ended.ours
    assert "another process of this run has ended or no longer answers: rank " in line
    assert "gptlab/training/step.py" not in ended.err, "a traceback of ours"
    assert rows(run)[-1]["event"] == "LostProcessError"


@pytest.mark.slow
@pytest.mark.fault(number=15)
def test_a_checkpoint_at_an_epochs_very_end(tmp_path: Path) -> None:
    """64 windows are eight updates of eight: checkpoints 8 and 16 lie between two epochs."""
    corpus = make_corpus(tmp_path / "corpus", train=64 * 32 + 1)
    trainer = Trainer(corpus, tmp_path)
    try:
        how = {"steps": 24, "checkpoint_every": 8, "eval_every": 0, "sample_every": 0}
        assert trainer.train(tmp_path / "whole", **how).code == 0
        run = tmp_path / "run"
        running = trainer.start(run, **how)
        running.wait_for_rows(run, 17)
        kill(running, "worker", random.Random(2))
        running.end()
        ended = trainer.train(run, **how)
        assert ended.code == 0, ended.err
        assert outcome(run) == outcome(tmp_path / "whole")
        assert [row["step"] for row in rows(run) if row["kind"] == "train"] == list(range(1, 25))
    finally:
        trainer.close()
    windows = TrainingWindows(open_corpus(corpus), 32, 256, seed=1)
    for epoch in range(3):
        assert sorted(windows.window_ids(64 * epoch, 64)) == [(0, window) for window in range(64)]
    assert windows.cursor(8, 8)["epoch"] == 1


def inside(corpus: Path, tmp_path: Path, number: str, moments: list[str], *sizes: str) -> list[dict[str, Any]]:
    """Trials of killed_inside.py over six steps of three saves; the last but for sizes is the uninterrupted run."""
    how = options(corpus, tmp_path / "whole", steps=6, checkpoint_every=2, eval_every=6, sample_every=0)
    where = how.index("--out")
    del how[where : where + 2]
    driver = Path(__file__).with_name("killed_inside.py")
    command = [sys.executable, str(driver), "--folder", str(tmp_path), "--signal", number, "--at"]
    command += [*moments, "10000", "--sizes", *sizes, "--", *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.fault(number=3)
def test_killed_within_every_phase_of_a_save(corpus: Path, tmp_path: Path) -> None:
    """Files that are opened, renamed or removed in the third save, and the middle of a write of either tensor file.

    The last moments of a save are those in which an older checkpoint goes; benchmarks/faults.py tries every moment.
    """
    moments = [
        "os.rename .config.json.tmp",
        "os.mkdir .saving_step_00000006",
        "open .saving_step_00000006",
        "os.rename .MANIFEST.json.tmp",
        "os.rename .saving_step_00000006",
        "os.rename step_00000002",
        "os.remove state.json",
        "os.remove MANIFEST.json",
        "os.rmdir .removing_step_00000002",
    ]
    trials = inside(corpus, tmp_path, "SIGKILL", moments, "50000", "200000")
    *trials, none, in_weights, in_moments = trials
    assert (none["died"], none["ended"]) == (0, 0), "no moment 10,000: the uninterrupted run"
    assert [trial["where"] for trial in trials] == moments
    for trial in (*trials, in_weights, in_moments):
        assert trial["died"] < 0, f"{trial}: it was to be killed"
        assert (trial["ended"], trial["damaged"], trial["debris"]) == (0, [], []), trial
        assert outcome(Path(trial["run"])) == outcome(Path(none["run"])), trial


@pytest.mark.slow
@pytest.mark.fault(number=8)
def test_asked_to_stop_at_the_start_and_in_a_save(corpus: Path, tmp_path: Path) -> None:
    """While the folder is set up there is nothing to save and the process ends; a save that has begun is finished."""
    start = ["os.rename .config.json.tmp", "open metrics.jsonl"]
    save = ["os.mkdir checkpoints", "os.rename .MANIFEST.json.tmp", "os.rename .saving_step_00000004"]
    *trials, none = inside(corpus, tmp_path, "SIGTERM", [*start, *save])
    assert (none["died"], none["ended"]) == (0, 0)
    assert [trial["where"] for trial in trials] == [*start, *save]
    assert [trial["died"] for trial in trials] == [143] * 2 + [75] * 3, trials
    for trial in trials:
        assert (trial["ended"], trial["damaged"], trial["debris"]) == (0, [], []), trial
        assert outcome(Path(trial["run"])) == outcome(Path(none["run"])), trial


@pytest.mark.slow
@pytest.mark.fault(number=16)
def test_a_second_writer_is_refused_until_the_first_is_gone(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=4000)
    running.wait_for_rows(run, 2)
    with pytest.raises(CheckpointError, match=r"is being written by process (\d+) on ") as refused:
        RunFolder(run).lock(patience=0.5)
    assert any(f"process {worker} on" in str(refused.value) for worker in running.workers())
    before = row_count(run)
    running.wait_for_rows(run, before + 2)
    kill(running, "both", random.Random(3))
    running.end()
    folder = RunFolder(run)
    folder.lock(patience=5.0)
    count = row_count(run)
    steps = [row["step"] for row in rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "one writer's rows, in order"
    assert row_count(run) == count
    folder.close()


@pytest.mark.slow
@pytest.mark.fault(number=16)
def test_a_writer_waits_for_one_that_is_about_to_end(trainer: Trainer, tmp_path: Path) -> None:
    """The second start of a run that is being stopped goes on with it, rather than fail."""
    run = tmp_path / "run"
    running = trainer.start(run, steps=4000)
    running.wait_for_rows(run, 3)
    second = trainer.start(run, steps=4000)
    running.send(signal.SIGTERM)
    assert running.end().code == 75
    stopped_at = rows(run)[-1]["step"]
    second.wait_for_rows(run, row_count(run) + 3)
    second.send(signal.SIGTERM)
    ended = second.end()
    assert ended.code == 75, ended.err
    steps = [row["step"] for row in rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > stopped_at


FIVE_STEPS = {"steps": 5, "eval_every": 5, "sample_every": 0, "checkpoint_every": 5, "dose_every": 0}


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row["kind"] == kind]


@pytest.mark.slow
def test_the_same_loss_from_one_process_and_from_two(trainer: Trainer, tmp_path: Path) -> None:
    runs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, run in runs.items():
        ended = trainer.train(run, processes=processes, **FIVE_STEPS)
        assert ended.code == 0, ended.err
    one, two = ([row["loss"] for row in of_kind(run, "train")] for run in runs.values())
    assert two == pytest.approx(one, abs=1e-5)
    (one,), (two,) = ([row["loss"] for row in of_kind(run, "val")] for run in runs.values())
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_same_sequences_in_the_same_order_for_any_ranks(size: int, corpus: Path) -> None:
    config = build(TrainingConfig, {"block_size": 32, "total_batch_tokens": 32 * 16, "batch_size": 4})
    windows = TrainingWindows(open_corpus(corpus), 32, 256, seed=1)

    def tokens(ranks: int, step: int) -> torch.Tensor:
        worlds = [World(rank, ranks) for rank in range(ranks)]
        batches = [b for world in worlds for b in MicroBatches(config, windows, world, torch.device("cpu")).of(step)]
        return torch.cat([batch.tokens for batch in batches])

    for step in range(6):  # across the end of an epoch
        alone = tokens(1, step)
        assert torch.equal(tokens(size, step), alone)
        assert torch.equal(alone, windows.rows(step * 16, 16)[0])


@pytest.mark.slow
@pytest.mark.fault(number=14)
def test_other_intervals_leave_the_trajectory_alone(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, choose: random.Random
) -> None:
    run = tmp_path / "run"
    every = {name: choose.randrange(least, 12) for name, least in (("log", 0), ("checkpoint", 1), ("sample", 0))}
    intervals = {f"{name}_every": value for name, value in every.items()}
    ended = trainer.train(run, **intervals, eval_every=choose.choice((1, 2, 3, 4)), noise_every=0)
    assert ended.code == 0, ended.err
    assert outcome(run)[0] == outcome(uninterrupted)[0]
    assert of_kind(run, "train") == of_kind(uninterrupted, "train")
    mine = {row["step"]: row for row in of_kind(run, "val")}
    shared = [row for row in of_kind(uninterrupted, "val") if row["step"] in mine]
    assert len(shared) >= 2
    assert all(mine[row["step"]] == row for row in shared)


@pytest.mark.slow
@pytest.mark.fault(number=14)
def test_measuring_the_dose_leaves_the_trajectory_alone(trainer: Trainer, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = trainer.train(run, dose_every=0, sample_every=0)
    assert ended.code == 0, ended.err
    assert outcome(run)[0] == outcome(uninterrupted)[0]
    assert [row["loss"] for row in of_kind(run, "train")] == [row["loss"] for row in of_kind(uninterrupted, "train")]


SITTINGS = (1, 2, 4, 1)
QUIET = {"steps": 16, "schedule": "constant", "eval_every": 0, "checkpoint_every": 100, "sample_every": 0,
         "batch_size": 2, "rank_timeout": 120}  # fmt: skip
DETERMINISTIC, MUON = QUIET | {"deterministic": None}, QUIET | {"optimizer": "muon"}
TOLERANCE = 1e-4
"""Nats; losses of 16 updates at a learning rate of 0.01 differ by a hundredth of that."""


def train(sittings: list[tuple[int, list[str]]]) -> None:
    """Train in so many processes with these options, one sitting after the other."""
    driver = [sys.executable, str(Path(__file__).with_name("killed_inside.py")), "--sittings"]
    done = subprocess.run(driver, input=json.dumps(sittings), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0] * processes for processes, _ in sittings], done.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if row["kind"] in ("train", "val")]


@pytest.mark.slow
@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_one_two_four_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """A signal whose dose is measured now and then, so that parts of gradients are summed too; Muon in another run."""
    cuts = [*sorted(choose.sample(range(1, 16), 3)), 16]

    def changing(run: str, last: dict[str, Any], **how: Any) -> list[tuple[int, list[str]]]:
        each = [(n, {**how, "steps": stop}) for n, stop in zip(SITTINGS, cuts, strict=True)]
        each[-1] = (each[-1][0], each[-1][1] | last)
        return [(n, options(corpus, tmp_path / run, **changed)) for n, changed in each]

    at_last = {"eval_every": 100}
    train(
        [
            (1, options(corpus, tmp_path / "whole", **DETERMINISTIC | {"eval_every": 100})),
            *changing("changing", at_last, **DETERMINISTIC),
            *changing("fast", at_last, **QUIET),
            (2, options(corpus, tmp_path / "muon", **MUON)),
            *(
                (2, options(corpus, tmp_path / "muon in two", **QUIET | {"steps": n}, optimizer="muon"))
                for n in (7, 16)
            ),
        ]
    )
    assert outcome(tmp_path / "changing") == outcome(tmp_path / "whole")
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "whole"), abs=TOLERANCE)
    assert outcome(tmp_path / "fast")[0] != outcome(tmp_path / "whole")[0], "the fast path adds in another order"
    assert outcome(tmp_path / "muon in two") == outcome(tmp_path / "muon")


@pytest.mark.slow
@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_blocks_cut_over_four_two_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """FSDP2's rows go on in other processes' hands; with the same number of them a stop changes no bit."""
    first, second = sorted(choose.sample(range(1, 16), 2))
    at_last = QUIET | {"eval_every": 100}
    cut = at_last | {"parallel": "fsdp", "batch_size": 1}
    sittings = ((4, first), (2, second), (1, 16))
    train(
        [
            (1, options(corpus, tmp_path / "whole", **at_last)),
            *((n, options(corpus, tmp_path / "cut", **cut | {"steps": stop})) for n, stop in sittings),
            (2, options(corpus, tmp_path / "two", **cut)),
            (2, options(corpus, tmp_path / "two saving", **cut | {"checkpoint_every": first, "steps": 16})),
            *((2, options(corpus, tmp_path / "stopped", **cut | {"steps": n, "eval_every": 0})) for n in (second, 16)),
            (2, options(corpus, tmp_path / "kept on", **cut | {"eval_every": 0})),
        ]
    )
    expected = losses(tmp_path / "whole")
    of_each_step = [row["loss"] for row in rows(tmp_path / "cut") if row["kind"] == "train"]
    assert of_each_step == pytest.approx(expected[: len(of_each_step)], abs=TOLERANCE)
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=TOLERANCE)
    assert outcome(tmp_path / "two saving") == outcome(tmp_path / "two")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "kept on")
