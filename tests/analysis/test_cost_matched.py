"""Beside a verdict: calibration mended, and equal cost against a baseline that really was longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.comparability import COST_TOLERANCE
from gptlab.analysis.load import read
from gptlab.analysis.statistics import paired_t
from gptlab.analysis.tables import markdown
from gptlab.options import build
from gptlab.training.config import TrainingConfig, run_flops

OWN = {1: 2.50, 2: 2.53, 3: 2.49}
PLAIN = {1: 2.30, 2: 2.31, 3: 2.32}
LONG = {1: 2.20, 2: 2.22, 3: 2.19}
SIGNAL = {"signal.name": "confidence"}


def flops(**options: Any) -> float:
    return run_flops(build(TrainingConfig, {"steps": 20, **options}))


STEPS = round(20 * flops(**SIGNAL) / flops())
"""Updates of the baseline that cost what the signal's 20 do."""


def edit(run: Path, seconds: float, last: int, tempered: float) -> None:
    """Give a run a clock, a last step and a loss at its best temperature."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["step"] = last if row["step"] == 20 else row["step"]
        if row["kind"] == "train":
            row |= {"tokens": 100, "tokens_per_second": 100 / seconds}
        if row["kind"] == "val" and row["step"] == last:
            row["tempered_loss"] = tempered
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def experiment(tmp_path: Path, write_run: Any) -> Path:
    """A signal that costs as many FLOPs as baseline-long and as much time as baseline-slow."""
    arms: tuple[tuple[str, dict[int, float], dict[str, Any], float], ...] = (
        ("baseline", PLAIN, {}, 10.0),
        ("sure", OWN, SIGNAL, 20.0),
        ("long", LONG, {"steps": STEPS}, 15.0),
        ("slow", {seed: loss - 0.1 for seed, loss in LONG.items()}, {"steps": 40, "warmup_steps": 5}, 21.0),
    )
    text = "name = 'cost'\nbaseline = 'baseline'\nseeds = [1, 2, 3]\n[options]\nsteps = 20\neval_every = 10\n"
    for arm, losses, options, seconds in arms:
        for seed, loss in losses.items():
            run = write_run(tmp_path / arm / f"seed_{seed}", loss, seed=seed, options=options, dose=0.2)
            edit(run, seconds, options.get("steps", 20), loss - (0.2 if arm == "sure" else 0.01))
        text += f"[arms.{arm}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    (tmp_path / "experiment.toml").write_text(text)
    return tmp_path


def expected(other: dict[int, float], shift: float = 0.0) -> dict[str, Any]:
    test = paired_t([OWN[seed] - other[seed] + shift for seed in OWN])
    return {"difference": pytest.approx(test.mean), "interval": pytest.approx(list(test.interval())), "n": 3}


def test_longer_baselines_are_no_arms_but_what_an_arm_stands_beside(experiment: Path) -> None:
    outcomes = read([experiment])
    assert outcomes.longer == {"long": "baseline", "slow": "baseline"}
    assert outcomes.step == 20
    result = outcomes.verdicts()
    assert list(result["arms"]) == ["sure"]
    sure = result["arms"]["sure"]
    assert sure["tempered"] == expected(PLAIN, shift=-0.19)
    assert sure["equal_flops"] == expected(LONG) | {
        "against": "long",
        "ratio": pytest.approx(1, abs=COST_TOLERANCE["equal_flops"]),
    }
    slow = {seed: loss - 0.1 for seed, loss in LONG.items()}
    assert sure["equal_time"] == expected(slow) | {"against": "slow", "ratio": pytest.approx(21 / 20)}
    assert "against long" in markdown(result)


def test_without_a_run_of_equal_cost_there_is_no_figure(experiment: Path) -> None:
    for arm in ("long", "slow"):
        for file in sorted((experiment / arm).rglob("*.*"), reverse=True):
            file.unlink()
    sure = read([experiment]).verdicts()["arms"]["sure"]
    assert sure["equal_flops"] is None
    assert sure["equal_time"] is None


def test_an_arm_that_costs_what_its_baseline_does_stands_beside_it(tmp_path: Path, write_run: Any) -> None:
    runs = []
    for seed in (1, 2, 3):
        runs.append(write_run(tmp_path / f"a{seed}", PLAIN[seed], seed=seed))
        runs.append(write_run(tmp_path / f"b{seed}", OWN[seed], seed=seed, options={"learning_rate": 0.01}))
    (found,) = read(runs).verdicts()["arms"].values()
    assert found["equal_flops"] == expected(PLAIN) | {"against": "baseline", "ratio": 1.0}
    assert found["tempered"] is None
    assert found["equal_time"] is None


def test_longer_runs_join_no_group(experiment: Path) -> None:
    file = experiment / "experiment.toml"
    file.write_text(file.read_text() + "[groups]\nall = ['baseline', 'sure', 'long', 'slow']\n")
    result = read([experiment]).verdicts()
    assert list(result["arms"]) == ["sure"]
    assert result["arms"]["sure"]["equal_flops"]["against"] == "long"
