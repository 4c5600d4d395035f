"""The branch test: its statistics by exact fits and how often it errs, and that branches are runs continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_script

from gptlab.analysis.noise import branching
from gptlab.analysis.noise.branching import (
    Arm,
    Branched,
    BranchTest,
    GradientBias,
    GradientNoise,
    Plan,
    as_json,
    branch,
    judge,
)
from gptlab.analysis.statistics import paired_t
from gptlab.cli.main import main
from gptlab.data.corpus import Corpus, open_corpus
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError, DataError
from gptlab.runs.folder import RunFolder
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training import TrainingConfig
from gptlab.training.block_graph import Batch
from gptlab.training.state import TrainingState

AVERAGES = (1, 4, 16)


def differences(
    bias: list[float], noise: list[float], curve: float = 0.0, averages: tuple[int, ...] = AVERAGES
) -> dict[int, list[float | None]]:
    """Exact quadratics in 1/M: bias + (noise - curve)/M + curve/M², a bias and a noise for every seed."""
    parts = list(zip(bias, noise, strict=True))
    return {M: [b + (n - curve) / M + curve / M**2 for b, n in parts] for M in averages}


def around(middle: float, half: float) -> list[float]:
    """Four values with that mean, whose 95% interval reaches `half` to either side."""
    unit = [-1.0, 1.0, -2.0, 2.0]
    low, high = paired_t(unit).interval()
    return [middle + half * x / ((high - low) / 2) for x in unit]


def test_a_quadratic_is_found_again_seed_by_seed() -> None:
    bias, noise = [0.03, 0.05, 0.02, 0.06], [0.2, 0.1, 0.3, 0.15]
    found = judge(differences(bias, noise, curve=-0.07))
    assert found.bias is not None
    assert found.noise is not None
    assert found.fit == pytest.approx([np.mean(bias), np.mean(noise) + 0.07, -0.07], abs=1e-12)
    for part, truth in ((found.bias, bias), (found.noise, noise)):
        assert part.value == pytest.approx(np.mean(truth), abs=1e-12)
        assert part.interval == pytest.approx(paired_t(truth).interval(), abs=1e-12)


def test_more_averages_are_fitted_by_least_squares_and_two_by_a_line() -> None:
    many = differences([0.1, 0.2], [0.3, 0.4], curve=0.05, averages=(1, 2, 4, 8, 16))
    found = judge(many)
    assert found.fit == pytest.approx([0.15, 0.30, 0.05], abs=1e-12)
    line = judge(differences([0.1, 0.2], [0.3, 0.4], averages=(1, 8)))
    assert line.fit == pytest.approx([0.15, 0.35], abs=1e-12)


@pytest.mark.parametrize(
    ("bias", "noise", "verdict", "reason"),
    [
        (around(0.05, 0.01), around(0, 0.04), "bias", "no noise is shown; its mean harms"),
        (around(-0.05, 0.01), around(0, 0.04), "bias", "its mean helps"),
        (around(0, 0.04), around(0.05, 0.01), "noise", "no bias is shown; averaging would help"),
        (around(0, 0.04), around(-0.05, 0.01), "noise", "averaging would harm"),
        (around(0.05, 0.01), around(0.02, 0.01), "bias and noise", "its mean harms; averaging would help"),
        (around(0.004, 0.001), around(0.05, 0.01), "noise", "the bias is less than a tenth of it"),
        (around(0.05, 0.01), around(0.004, 0.001), "bias", "the noise is less than a tenth of it"),
        (around(0.05, 0.01), around(0, 0.06), "undecided", "bias is shown, but there may be as much noise"),
        (around(0, 0.06), around(0.05, 0.01), "undecided", "noise is shown, but there may be as much bias"),
        (around(0, 0.0009), around(0, 0.0008), "neither", "both lie within 0.001"),
        (around(0, 0.0009), around(0, 0.002), "undecided", "take more seeds or steps"),
        ([0.0] * 4, [0.0] * 4, "neither", "both lie within"),
    ],
)
def test_the_rule(bias: list[float], noise: list[float], verdict: str, reason: str) -> None:
    found = judge(differences(bias, noise))
    assert found.verdict == verdict, found.reason
    assert reason in found.reason


@pytest.mark.parametrize(
    ("averages", "dose", "share"),
    [(AVERAGES, 1, 0.0071), (AVERAGES, 2, 0.0620), (AVERAGES, 3, 0.1748), ((*AVERAGES, 64), 3, 0.0904)],
)
def test_how_much_of_a_noise_that_slows_adam_down_the_fit_takes_for_bias(
    averages: tuple[int, ...], dose: float, share: float
) -> None:
    """Adam's steps keep their length, so that noise leaves 1/√(1 + dose²/M) of their progress; docs/noise.md."""
    lost = differences([0.0] * 4, [0.0] * 4, averages=averages)
    for M, row in lost.items():
        row[:] = [1 - (1 + dose**2 / M) ** -0.5] * len(row)
    found = judge(lost)
    assert found.bias is not None
    assert found.noise is not None
    assert found.bias.value / found.noise.value == pytest.approx(share, abs=5e-5)


def test_what_diverged_is_undecided() -> None:
    lost = differences(around(0.05, 0.01), around(0.0, 0.01))
    lost[1][1] = None
    found = judge(lost)
    assert found == BranchTest("undecided", "diverged at M = 1: lower the weight")


def test_a_result_is_json_without_nan() -> None:
    plan = Plan(steps=7, seeds=(5, 6))
    losses: dict[int, list[float | None]] = {1: [3.0, 3.1], 4: [2.9, 3.0], 16: [2.8, 2.9]}
    result = as_json(plan, Branched(3.5, [2.7, 2.8], 0.25, 0.6, losses))
    assert json.loads(json.dumps(result, allow_nan=False)) == result | {"fit": list(result["fit"])} | {
        part: {"value": result[part]["value"], "interval": list(result[part]["interval"])} for part in ("bias", "noise")
    }
    assert result["differences"]["4"] == pytest.approx([0.2, 0.2])
    assert (result["steps"], result["averages"], result["seeds"]) == (7, [1, 4, 16], [5, 6])
    losses[4][0] = None
    broken = as_json(plan, Branched(3.5, [2.7, 2.8], 0.25, None, losses, ["M = 4"]))
    assert (broken["bias"], broken["noise"], broken["verdict"]) == (None, None, "undecided")
    assert json.dumps(broken, allow_nan=False)


@pytest.mark.parametrize(("part", "other"), [("bias", "noise"), ("noise", "bias")])
def test_one_part_alone_is_named_and_the_other_seldom(part: str, other: str) -> None:
    """500 tests with errors in every branch: the part that is not there may be named in the 5% that 95% leaves."""
    generator = np.random.default_rng(4)
    said = []
    for _ in range(500):
        there, error = np.full(4, 0.05), 0.004 * generator.standard_normal((3, 4))
        true = differences(list(there * (part == "bias")), list(there * (part == "noise")))
        noisy = {M: [x + e for x, e in zip(true[M], row, strict=True) if x is not None]
                 for M, row in zip(AVERAGES, error, strict=True)}  # fmt: skip
        said.append(judge(noisy).verdict)
    assert said.count(part) >= 450
    assert said.count(other) == 0
    assert said.count("bias and noise") <= 40


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trials() -> ModuleType:
    return load_script("benchmarks/branch.py")


def test_a_trial_tells_bias_from_noise(
    trials: ModuleType, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fixed_direction", "fresh_direction"):
        monkeypatch.setitem(SIGNALS, name, None)  # so that both are gone afterwards
    monkeypatch.setitem(trials.RUN, "block_size", 16)
    monkeypatch.setitem(trials.RUN, "total_batch_tokens", 64)
    run = trials.train(tmp_path, str(tiny_corpus), 1)
    plan = Plan(steps=8, seeds=(1, 2, 3), eval_tokens=512)
    found = trials.trial_of(0, run, open_corpus(tiny_corpus), plan)
    assert found["arms"]["signal_bias"]["verdict"] == "bias"
    assert found["arms"]["gradient_noise"]["verdict"] == "noise"
    assert found["arms"]["gradient_bias"]["noise"]["value"] == pytest.approx(0.0, abs=1e-12)
    assert found["arms"]["signal_noise"]["dose"] == trials.DOSE
    counted = trials.summary([found, found])
    assert counted["signal_bias"]["right"] == counted["signal_bias"]["of"] == 2
    assert counted["signal_bias"]["interval"][1] == 1.0
    assert counted["gradient_noise"]["verdicts"] == {"noise": 2}
    less = {name: arm for name, arm in found["arms"].items() if name != "gradient_noise"}
    assert trials.trial_of(0, run, open_corpus(tiny_corpus), plan, less) == found, "what was missing is what it was"


def test_what_the_document_says_of_the_trials_is_what_was_found() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "branch.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "noise.md").read_text(encoding="utf-8")
    assert set(results["arms"]) == {"gradient_bias", "gradient_noise", "signal_bias", "signal_noise"}
    for name, arm in results["arms"].items():
        said = [trial["arms"][name]["verdict"] for trial in results["trials"]]
        assert (arm["right"], arm["of"]) == (said.count(arm["expected"]), len(said))
        low, high = arm["interval"]
        assert f"| {name.replace('_', ' ')} | {arm['right']} of {arm['of']} | {low:.0%} to {high:.0%} |" in document, (
            name
        )


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
    reported: list[tuple[int, int | None, int]] = []

    def progress(what: str, done: int, of: int | None, words: str = "") -> None:
        assert (what, words) == ("branches", "")
        reported.append((done, of, len(updates)))

    arms: dict[str, Arm] = {"a": SignalConfig("confidence"), "n": GradientNoise(1.0)}
    plan = Plan(steps=2, averages=(1, 4, 16), seeds=(1, 2))
    branch(half_way, arms, corpus, PLACEMENT, plan, progress)
    assert reported[0] == (0, plan.cost(list(arms.values())), 0)
    assert reported[-1][0] == reported[-1][1] == 2 * (2 * (1 + 24 + 3) + 1)
    assert [done for done, *_ in reported] == sorted(done for done, *_ in reported)


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
        def never(*progress: Any) -> None:
            pytest.fail(f"began: {progress}")

        return branch(half_way, {"a": arm}, corpus, PLACEMENT, plan, never)["a"]

    with pytest.raises(ConfigError, match="lists judges 1 to 1 of this model, found 5"):
        refused(SignalConfig("brier", layers=(5,)))
    with pytest.raises(DataError, match="spoken for"):
        refused(SignalConfig("brier"), Plan(steps=40, averages=(1, 4), seeds=(1, 2)))
