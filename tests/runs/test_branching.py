"""Branches of a checkpoint: the true loss's is the run continued, the signal's batches are others, averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.analysis.noise import branching
from gptlab.analysis.noise.branching import Arm, Branched, GradientBias, GradientNoise, Plan, Progress, branch
from gptlab.cli.main import main
from gptlab.data.corpus import Corpus, open_corpus
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError, DataError
from gptlab.runs.folder import RunFolder
from gptlab.signals import SignalConfig
from gptlab.training import TrainingConfig
from gptlab.training.block_graph import Batch
from gptlab.training.state import TrainingState

PLACEMENT = ComputeConfig(torch.device("cpu"), None, 1, False, {})
PLAN = Plan(steps=3, averages=(1, 4), seeds=(1, 2))


@pytest.fixture(scope="module")
def straight(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline of 6 steps with a checkpoint at step 3: what comes after is what a branch of seed 1 does."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(tiny(out, checkpoint_every=3, eval_every=6, schedule="constant", threads=1)) == 0
    return out


@pytest.fixture(scope="module")
def half_way(straight: Path) -> Path:
    return straight / "checkpoints" / "step_00000003"


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return open_corpus(tiny_corpus)


def test_the_true_losses_branch_is_the_run_going_on(straight: Path, half_way: Path, corpus: Corpus) -> None:
    """To the last bit, after other branches too: moments, clipping, schedule and data are the run's own."""
    last = next(row["loss"] for row in RunFolder(straight).rows() if row["kind"] == "val")
    arms: dict[str, Arm] = {
        "silent": SignalConfig("confidence", weight=0.0),
        "tiny": SignalConfig("brier", weight=1e-9),
    }
    found = branch(half_way, arms, corpus, PLACEMENT, PLAN)
    assert found["silent"].true[0] == last
    assert found["silent"].true[1] != last, "another data seed"
    assert found["silent"].start > last
    assert found["silent"].differences == {1: [0.0, 0.0], 4: [0.0, 0.0]}, "weight 0 is out of the graph"
    assert found["silent"].dose == 0.0
    assert found["tiny"].differences[4] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_branches_are_the_same_every_time_and_a_signal_shows(half_way: Path, corpus: Corpus) -> None:
    arms: dict[str, Arm] = {
        "bad": SignalConfig("negative_deep_supervision", weight=0.5),
        "placebo": SignalConfig("brier", control="placebo", layers="rotate"),
    }
    found, again = (branch(half_way, arms, corpus, PLACEMENT, PLAN) for _ in range(2))
    assert found == again
    for M in PLAN.averages:
        assert all(x is not None and x > 0 for x in found["bad"].differences[M]), "it ascends the true loss"
    assert found["placebo"].differences[1] != found["placebo"].differences[4]


def test_a_dose_sets_one_weight_for_all_branches(half_way: Path, corpus: Corpus) -> None:
    arms: dict[str, Arm] = {
        "default": SignalConfig("brier"),
        "dosed": SignalConfig("brier", dose=0.3),
        "gated": SignalConfig("gated_confidence", threshold=1.0, dose=0.3),
        "noise": GradientNoise(0.7),
    }
    found = branch(half_way, arms, corpus, PLACEMENT, Plan(steps=1, averages=(1, 2), seeds=(1, 2)))
    default, dosed = found["default"], found["dosed"]
    assert default.weight == 1 / 2
    assert default.dose is not None
    assert dosed.weight == pytest.approx(0.3 * 0.5 / default.dose)
    assert dosed.dose == 0.3
    assert (found["gated"].weight, found["gated"].dose) == (0.5, 0.0), "silent at this checkpoint"
    assert (found["noise"].weight, found["noise"].dose) == (None, 0.7)


def test_a_branch_that_diverges_is_told_and_the_others_go_on(half_way: Path, corpus: Corpus) -> None:
    arms: dict[str, Arm] = {"bad": SignalConfig("brier", weight=1e38), "noise": GradientNoise(1.0)}
    found = branch(half_way, arms, corpus, PLACEMENT, PLAN)
    assert found["bad"].differences == {1: [None, None], 4: [None, None]}
    assert found["bad"].dose is None
    assert len(found["bad"].diverged) == 4
    assert found["bad"].diverged[0].startswith("M = 1, data seed 1: diverged at step 3")
    assert None not in found["noise"].differences[1]


@dataclass
class Seen:
    """What an update of a branch was given."""

    config: TrainingConfig
    batches: list[Batch]

    def windows(self, part: str) -> list[tuple[int, int]]:
        return [window for batch in self.batches if batch.part == part for window in batch.names]

    def share(self, part: str) -> float:
        return sum(batch.share for batch in self.batches if batch.part == part)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], list[Seen]]:
    """Every update that `branch` asks for, by (data seed, step), in place of being made."""
    seen: dict[tuple[int, int], list[Seen]] = {}

    class Nothing:
        dose = 0.5

    def update(state: TrainingState, config: TrainingConfig, batches: Any, *_: Any, **__: Any) -> Nothing:
        seen.setdefault((config.seed, state.step), []).append(Seen(config, list(batches)))
        state.step += 1
        return Nothing()

    monkeypatch.setattr(branching, "update", update)
    return seen


@pytest.mark.parametrize("layers", ["all", "rotate"])
def test_the_signal_reads_batches_of_its_own(
    half_way: Path, corpus: Corpus, updates: dict[tuple[int, int], list[Seen]], layers: str
) -> None:
    plan = Plan(steps=2, averages=(1, 4, 16), seeds=(1, 2))
    arms: dict[str, Arm] = {"a": SignalConfig("confidence", layers=layers)}
    branch(half_way, arms, corpus, PLACEMENT, plan)
    assert updates.keys() == {(seed, step) for seed in (1, 2) for step in (3, 4)}
    true_of_all = {seed: [w for step in (3, 4) for w in updates[seed, step][0].windows("all")] for seed in (1, 2)}
    assert true_of_all[1] != true_of_all[2]
    for (seed, step), seen in updates.items():
        true, *branches = [one for one in seen if not one.config.signals or "signals" in {b.part for b in one.batches}]
        drawn = []
        for M, one in zip(plan.averages, branches, strict=True):
            assert one.windows("true loss") == true.windows("all"), "the true loss's batches are unchanged"
            assert (one.share("true loss"), one.share("signals")) == (pytest.approx(1), pytest.approx(1))
            drawn.append(one.windows("signals"))
            assert len(drawn[-1]) == M * len(true.windows("all"))
            assert not set(drawn[-1]) & set(true_of_all[seed])
            places = [(b.step, b.first_sequence) for b in one.batches if b.part == "signals"]
            assert len(set(places)) == len(places), "positions and judges are drawn again for each"
            if layers == "rotate":
                assert len({place for place, _ in places}) == M
        assert drawn[1][: len(drawn[0])] == drawn[0], (seed, step)
        assert drawn[2][: len(drawn[1])] == drawn[1]
    assert updates[1, 3][-1].windows("signals") != updates[1, 4][-1].windows("signals")


def test_gradient_noise_is_averaged_by_its_length(
    half_way: Path, corpus: Corpus, updates: dict[tuple[int, int], list[Seen]]
) -> None:
    branch(half_way, {"n": GradientNoise(2.0)}, corpus, PLACEMENT, Plan(steps=1, averages=(1, 4, 16), seeds=(1, 2)))
    sizes = [one.config.gradient_noise for one in updates[1, 3]]
    assert sizes == [0.0, 2.0, 1.0, 0.5]
    assert [{b.part for b in one.batches} for one in updates[1, 3]] == [{"all"}] * 4


def test_gradient_bias_is_the_same_however_often_it_is_averaged(half_way: Path, corpus: Corpus) -> None:
    found = branch(half_way, {"b": GradientBias(1.0)}, corpus, PLACEMENT, Plan(steps=3, averages=(1, 4), seeds=(1, 2)))
    assert (found["b"].weight, found["b"].dose) == (None, 1.0)
    assert found["b"].differences[1] == found["b"].differences[4]
    assert None not in found["b"].differences[1]
    assert len({0.0, *found["b"].differences[1]}) == 3, "two data seeds, two directions"


def test_the_cost_is_said_before_the_first_gradient_and_kept(
    half_way: Path, corpus: Corpus, updates: dict[tuple[int, int], list[Seen]]
) -> None:
    reported: list[tuple[Progress, int]] = []
    arms: dict[str, Arm] = {"a": SignalConfig("confidence"), "n": GradientNoise(1.0)}
    plan = Plan(steps=2, averages=(1, 4, 16), seeds=(1, 2))
    branch(half_way, arms, corpus, PLACEMENT, plan, progress=lambda p: reported.append((p, len(updates))))
    assert reported[0][0] == Progress(0, plan.cost(list(arms.values())), "held-out loss of the checkpoint")
    assert reported[0][1] == 0
    assert reported[-1][0].done == reported[-1][0].total == 2 * (2 * (1 + 24 + 3) + 1)
    assert [p.done for p, _ in reported] == sorted(p.done for p, _ in reported)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1 step, found 0"),
        ({"averages": (4, 16)}, "must hold 1 and at least one more"),
        ({"averages": (1,)}, "must hold 1 and at least one more"),
        ({"seeds": (3,)}, "at least 2 data seeds"),
        ({"seeds": (3, 3)}, "each once"),
    ],
)
def test_a_plan_that_says_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**options)


def test_what_does_not_suit_is_refused_before_anything_is_computed(half_way: Path, corpus: Corpus) -> None:
    def refused(arm: Arm, plan: Plan = PLAN) -> Branched:
        def never(progress: Progress) -> None:
            pytest.fail(f"began: {progress}")

        return branch(half_way, {"a": arm}, corpus, PLACEMENT, plan, progress=never)["a"]

    with pytest.raises(ConfigError, match="lists judges 1 to 1 of this model, found 5"):
        refused(SignalConfig("brier", layers=(5,)))
    with pytest.raises(DataError, match="spoken for"):
        refused(SignalConfig("brier"), Plan(steps=40, averages=(1, 4), seeds=(1, 2)))
