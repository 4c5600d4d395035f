"""The evidence for the verdicts: what benchmarks/rigor.py found holds its promises and stands in docs/verdicts.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import load_script

from gptlab.analysis.statistics import levels

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "rigor.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rigor() -> ModuleType:
    return load_script("benchmarks/rigor.py")


def test_ten_thousand_experiments_keep_the_promised_error_and_find_what_was_planted() -> None:
    assert RESULTS["experiments"] >= 10_000
    for row in RESULTS["no_effect"]:
        for kind in ("experiments_with_an_error", "arms_in_error"):
            assert row[kind]["interval"][0] <= 0.05, row["name"]
    for row in RESULTS["planted"]:
        assert row["found"]["rate"] >= 0.9, row["name"]
    undecided = {row["name"]: row["undecided"]["rate"] for row in RESULTS["two_seeds"]}
    assert undecided["an effect of 1 sigma"] > 0.9
    assert undecided["an effect of 100 sigma"] < 0.1


def test_the_page_shows_the_results_and_the_levels_that_are_used(rigor: ModuleType) -> None:
    assert rigor.table(RESULTS) in PAGE
    shown = re.findall(r"^\| (\d+) \| (0\.\d{4}) \| (0\.\d{4}) \| (\d\d\.\d)% \|$", PAGE, flags=re.MULTILINE)
    looks = tuple(int(row[0]) for row in shown)
    columns = zip(levels(0.05, looks), levels(0.05 / 4, looks), levels(0.10, looks), strict=True)
    assert [row[1:] for row in shown] == [(f"{a:.4f}", f"{b:.4f}", f"{100 - 100 * c:.1f}") for a, b, c in columns]


def test_a_scenario_is_the_same_every_time_and_an_effect_is_told_from_none(rigor: ModuleType) -> None:
    def judged(judge: Any, *effects: float) -> dict[str, Any]:
        return judge(rigor.Scenario("tried", effects, (5,)), 40, np.random.default_rng(1))

    nothing = judged(rigor.errors, 0.0)
    assert nothing == judged(rigor.errors, 0.0)
    assert nothing["experiments_with_an_error"]["hits"] < 10
    assert judged(rigor.found, 9.0)["found"]["hits"] == 40


def test_experiments_are_drawn_from_real_runs(rigor: ModuleType, tmp_path: Path, write_run: Any) -> None:
    generator, seeds = np.random.default_rng(2), range(1, 25)
    arms = {"plain": {}, "twin": {"init_jitter": 1e-6}, "slow": {"learning_rate": 1e-4}}
    text = f"baseline = 'plain'\nseeds = {list(seeds)}\n"
    for arm, options in arms.items():
        for seed in seeds:
            loss = 3 + 0.02 * float(generator.standard_normal()) + 0.05 * (arm == "slow")
            write_run(tmp_path / arm / f"seed_{seed}", loss, seed=seed, options=options)
        text += f"[arms.{arm}]\n" + "".join(f"{key} = {value}\n" for key, value in options.items())
    (tmp_path / "experiment.toml").write_text(text)
    results = rigor.real(tmp_path, 60)
    found, (planted,) = results["real"], results["real_planted"]
    assert found["available_seeds"] == 24
    assert tuple(found["seeds"]) == (5, 10, 20)
    assert found["experiments_with_an_error"]["of"] == 60
    assert found["experiments_with_an_error"]["rate"] < 0.2
    assert planted["name"] == "learning_rate 0.0001"
    assert planted["effect"] == pytest.approx(0.05, abs=0.02)
    assert 3 <= planted["seeds"][0] <= 12
    assert planted["found"]["rate"] > 0.8
    (tmp_path / "experiment.toml").write_text(text.replace("init_jitter", "learning_rate"))
    with pytest.raises(SystemExit, match="expected two arms that differ by --init_jitter"):
        rigor.real(tmp_path, 1)
