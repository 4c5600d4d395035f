"""The branch test's statistics: exact fits, the rule case by case, how often it errs, and no NaN."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts import load_script

from gptlab.analysis.noise.branching import Branched, BranchTest, Plan, as_json, judge
from gptlab.analysis.statistics import paired_t
from gptlab.data.corpus import open_corpus
from gptlab.signals import SIGNALS

AVERAGES = (1, 4, 16)
SEEDS = (1, 2, 3, 4)


def differences(
    bias: list[float], noise: list[float], curve: float = 0.0, averages: tuple[int, ...] = AVERAGES
) -> dict[int, dict[int, float | None]]:
    """Exact quadratics in 1/M: bias + (noise - curve)/M + curve/M², a bias and a noise for every seed."""
    parts = dict(zip(SEEDS, zip(bias, noise, strict=True), strict=False))
    return {M: {s: b + (n - curve) / M + curve / M**2 for s, (b, n) in parts.items()} for M in averages}


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
        row.update(dict.fromkeys(row, 1 - (1 + dose**2 / M) ** -0.5))
    found = judge(lost)
    assert found.bias is not None
    assert found.noise is not None
    assert found.bias.value / found.noise.value == pytest.approx(share, abs=5e-5)


def test_what_diverged_is_undecided() -> None:
    lost = differences(around(0.05, 0.01), around(0.0, 0.01))
    lost[1][2] = None
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
        noisy = {M: {s: x + e for (s, x), e in zip(true[M].items(), row, strict=True) if x is not None}
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
