"""Trials of benchmarks/branch.py: what is bias or noise by make is named so, on real branches under AdamW."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from gptlab.data.corpus import open_corpus
from gptlab.runs.branching import Plan
from gptlab.signals import SIGNALS

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
