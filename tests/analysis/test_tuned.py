"""A comparison of tuned arms: what was tuned counts as declared, and what was chosen stands on every output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.load import read
from gptlab.analysis.report.comparison import page
from gptlab.analysis.tables import markdown, tables
from gptlab.errors import ConfigError

TEXT = """
name = "tried"
baseline = "plain"
seeds = [1, 2, 3]
[tune]
seeds = [101, 102]
[options]
steps = 20
eval_every = 10
[arms.plain]
[arms.sure]
signal.name = "confidence"
signal.dose = 0.1
[arms.sure-placebo]
signal.name = "confidence"
signal.dose = 0.1
signal.control = "placebo"
"""
SURE = {"signal.name": "confidence", "signal.dose": 0.05, "learning_rate": 0.002}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 0.0005},
    "sure": SURE,
    "sure-placebo": {**SURE, "signal.control": "placebo"},
}
EDGE = "the best learning rate is the largest that was tried, 2 times the declared one: try a wider range"


def choice(options: dict[str, float], **changes: Any) -> dict[str, Any]:
    found = {"follows": None, "trial": "a trial", "options": options, "loss": 2.5, "notes": [], "losses": {}}
    return {**found, "learning_rate": options["learning_rate"] * 1000, "dose": None, **changes}


@pytest.fixture
def experiment(tmp_path: Path, write_run: Any) -> Path:
    for arm, options in OPTIONS.items():
        for seed in (1, 2, 3):
            loss = 3.0 - 0.2 * (arm == "sure") - 0.05 * (arm == "sure-placebo") + 0.001 * (seed * len(arm) % 3)
            write_run(tmp_path / arm / f"seed_{seed}", loss, seed=seed, options=options, dose=0.05)
    sure = {"learning_rate": 0.002, "signal.dose": 0.05}
    arms = {
        "plain": choice({"learning_rate": 0.0005}),
        "sure": choice(sure, dose=0.5, notes=[EDGE]),
        "sure-placebo": choice(sure, dose=0.5, follows="sure", notes=[EDGE]),
    }
    (tmp_path / "tuning.json").write_text(json.dumps({"trials": 9, "seeds": [101, 102], "arms": arms}))
    (tmp_path / "experiment.toml").write_text(TEXT)
    return tmp_path


def test_tuned_options_are_declared_and_stand_in_the_passports(experiment: Path) -> None:
    outcomes = read([experiment])
    assert outcomes.undeclared == ()
    result = outcomes.verdicts()
    assert result["arms"]["sure"]["verdict"] == "better", "its placebo is found though options were chosen"
    assert result["arms"]["sure"]["changes"]["learning_rate"] == [0.0005, 0.002]
    passports = {arm: found["passport"] for arm, found in result["arms"].items()}
    tuned = {arm: (p["learning_rate"], p["tuned"], p["trials"], p["follows"]) for arm, p in passports.items()}
    assert tuned == {"sure": (0.002, True, 9, None), "sure-placebo": (0.002, True, 9, "sure")}
    assert result["tuning"]["arms"]["plain"]["options"] == {"learning_rate": 0.0005}


def test_what_was_chosen_stands_on_every_output(experiment: Path) -> None:
    outcomes = read([experiment])
    result = outcomes.verdicts()
    last = list(tables(result))[-1]
    assert last.title == "What 9 trials an arm chose, on seeds 101, 102"
    assert last.rows == [
        ("plain", "learning_rate 0.0005", "learning rate x0.5", "2.5000", ""),
        ("sure", "learning_rate 0.002, signal.dose 0.05", "learning rate x2, dose x0.5", "2.5000", EDGE),
        ("sure-placebo", "learning_rate 0.002, signal.dose 0.05", "learning rate x2, dose x0.5", "2.5000",
         f"as sure; {EDGE}"),
    ]  # fmt: skip
    text = markdown(result)
    assert "learning rate 0.002 (tuned for each arm, best of 9 trials)" in text
    assert "learning rate 0.002 (tuned for each arm, best of 9 trials of sure)" in text
    assert "What 9 trials an arm chose" in page(outcomes, result, {})


def test_runs_of_one_arm_still_have_one_choice(experiment: Path, write_run: Any) -> None:
    write_run(experiment / "sure" / "seed_0", 2.8, seed=0, options={**SURE, "learning_rate": 0.001}, dose=0.05)
    text = TEXT.replace("[1, 2, 3]", "[0, 1, 2, 3]")
    (experiment / "experiment.toml").write_text(text)
    assert [line.partition(": ")[2].partition(":")[0] for line in read([experiment]).undeclared] == [
        "option learning_rate"
    ] * 3


def test_results_without_the_choice_are_compared_and_a_damaged_choice_is_refused(experiment: Path) -> None:
    (experiment / "tuning.json").unlink()
    result = read([experiment]).verdicts()
    assert result["arms"]["sure"]["passport"]["trials"] is None
    assert "(tuned for each arm)" in markdown(result)
    (experiment / "tuning.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tuning.json is damaged"):
        read([experiment])
