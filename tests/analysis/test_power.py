"""The power planner against scipy's noncentral t and against simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gptlab.analysis import design as power
from gptlab.analysis.statistics import critical_t
from gptlab.cli.experiment import main
from gptlab.errors import UsageError
from gptlab.runs.smoke import Trial


@pytest.mark.parametrize(("effect", "n", "level"), [(0.5, 20, 0.05), (1.0, 10, 0.0125), (2.0, 5, 0.05), (5.0, 2, 0.05)])
def test_power_is_that_of_the_noncentral_t(effect: float, n: int, level: float) -> None:
    t, shift = critical_t(level, n - 1), effect * n**0.5
    expected = stats.nct.sf(t, n - 1, shift) + stats.nct.cdf(-t, n - 1, shift)
    assert power.power_of_difference(0.02 * effect, 0.02, n, level) == pytest.approx(expected, abs=5e-4)


def test_the_power_of_equivalence_is_what_simulation_finds() -> None:
    x = 0.3 + np.random.default_rng(3).standard_normal((200_000, 12))
    half = critical_t(0.10, 11) * x.std(axis=1, ddof=1) / 12**0.5
    found = ((x.mean(1) - half >= -1) & (x.mean(1) + half <= 1)).mean()
    assert power.power_of_equivalence(0.3, 1.0, 12, delta=1.0) == pytest.approx(found, abs=0.004)


def test_the_fewest_seeds_are_enough_and_one_fewer_is_not() -> None:
    n = power.seeds_for_difference(1.0, 1.0)
    assert n == 10  # the textbook's 8 by normal theory, and two for not knowing sigma
    assert power.power_of_difference(1.0, 1.0, n) >= 0.8 > power.power_of_difference(1.0, 1.0, n - 1)
    n = power.seeds_for_equivalence(1.0, 1.0)
    assert n is not None
    assert power.power_of_equivalence(0, 1.0, n, 1.0) >= 0.8 > power.power_of_equivalence(0, 1.0, n - 1, 1.0)


def test_the_smallest_difference_is_found_with_the_power_asked_for() -> None:
    smallest = power.smallest_difference(0.02, 5, level=0.0125, power=0.9)
    assert power.power_of_difference(smallest, 0.02, 5, 0.0125) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (power.seeds_for_difference(0.0, 1.0), None),
        (power.seeds_for_difference(1e-6, 1.0), None),
        (power.seeds_for_equivalence(1.0, 1.0, difference=1.5), None),
        (power.seeds_for_difference(0.1, 0.0), 2),
        (power.seeds_for_equivalence(0.1, 0.0), 2),
        (power.smallest_difference(0.0, 5), 0.0),
    ],
)
def test_the_ends_of_planning(found: float | None, expected: float | None) -> None:
    assert found == expected


def test_more_arms_and_looks_take_more_seeds() -> None:
    alone = power.plan(0.02, 0.02)
    several = power.plan(0.02, 0.02, arms=4, looks=[5, 10, 20])
    assert alone["seeds_for_difference"] < several["seeds_for_difference"]
    assert [row["n"] for row in several["seeds"]] == [5, 10, 20]


PLANS = {
    "out of reach": ("delta = 0.01", "out of reach for the declared 0.01, which takes 2"),
    "within reach": ("delta = 0.05", "'no difference' is within reach for a delta of 0.0"),
    "undeclared": ("", "no delta is declared, so that it is only said of exact equality: delta = 0.0"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_says_before_the_runs_what_is_out_of_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    declared, message = PLANS[case]
    file = tmp_path / "x.toml"
    head = f"name = 'x'\nbaseline = 'a'\nseeds = [1, 2, 3, 4, 5, 6, 7]\n{declared}\n"
    file.write_text(f"{head}[arms.a]\n[arms.b]\nweight_decay = 0.5\n")
    words = ["plan", str(file), "--out", str(tmp_path / "x")]
    assert main([*words, "--sigma", "0.017"]) == 0
    shown = capsys.readouterr().out
    assert message in shown
    assert ("out of reach" in shown) == (case == "out of reach")
    assert main([*words, "--sigma", "0.017", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["cells"], found["arms"]) == (7, 14, 1)
    assert power.power_of_equivalence(0.0, 0.017, 7, found["delta_in_reach"]) == pytest.approx(0.8, abs=0.01)
    with pytest.raises(UsageError, match="expected --sigma X"):
        main(words)
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(UsageError, match="--sigma: expected a spread above 0"):
            main([*words, "--sigma", wrong])


@pytest.mark.parametrize("case", PLANS)
def test_smoke_says_it_too_where_a_spread_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    declared, message = PLANS[case]
    file = tmp_path / "x.toml"
    head = f"name = 'x'\nbaseline = 'a'\nseeds = [1, 2, 3, 4, 5, 6, 7]\n{declared}\n"
    file.write_text(f"{head}[arms.a]\n[arms.b]\nweight_decay = 0.5\n")
    tried = [Trial(arm, 9, "no signal", None, None, 1.0, 10, 1e9) for arm in ("a", "b")]
    monkeypatch.setattr("gptlab.runs.smoke.smoke", lambda *_, **__: iter(tried))
    words = ["smoke", str(file), "--out", str(tmp_path / "x")]
    assert main([*words, "--sigma", "0.017"]) == 0
    assert (message in " ".join(capsys.readouterr().out.split())) == (case != "within reach")
    assert main(words) == 0
    assert "'No difference'" not in capsys.readouterr().out, "nothing is known"
    for sigma in (["--sigma", "0.017"], []):
        assert main([*words, *sigma, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)["plan"]
        assert (planned is None) == (not sigma)
        assert not planned or (planned["n"], planned["delta"]) == (7, planned["delta"])
