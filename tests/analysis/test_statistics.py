"""The statistics against scipy's own tests and numbers worked by hand: tests, levels for looks, seeds, and rigor.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scripts import load_script

from gptlab.analysis import design as power
from gptlab.analysis import statistics
from gptlab.analysis.statistics import (
    CHOICE,
    PairedT,
    critical_t,
    equivalent,
    holm,
    jackknife,
    last_look,
    levels,
    look_level,
    more_baseline_t,
    paired_t,
    repeated,
    spent,
    welch_t,
    wilcoxon_p,
)
from gptlab.cli.experiment import main
from gptlab.errors import ConfigError, UsageError
from gptlab.runs.smoke import Trial

SAMPLES = {
    "two": [0.01, 0.03],
    "five": [0.012, -0.004, 0.03, 0.011, 0.02],
    "twenty": list(np.random.default_rng(0).standard_normal(20)),
    "a tiny spread": [1.0, 1.0 + 1e-9, 1.0 - 1e-9],
}


@pytest.mark.parametrize("differences", SAMPLES.values(), ids=SAMPLES)
def test_the_paired_t_is_scipys(differences: list[float]) -> None:
    baseline = np.linspace(3.0, 3.1, len(differences))
    expected = stats.ttest_rel(baseline + differences, baseline)
    found = paired_t(list(baseline + differences - baseline))
    interval = expected.confidence_interval(0.9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval(0.9) == pytest.approx((interval.low, interval.high), rel=1e-9)


@pytest.mark.parametrize(("differences", "p"), [([0.0, 0.0, -0.0], 1.0), ([0.1, 0.1, 0.1], 0.0)])
def test_differences_without_spread_have_a_p_and_an_interval(differences: list[float], p: float) -> None:
    test = paired_t(differences)
    assert (test.p, test.interval()) == (p, (differences[0], differences[0]))


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, float("nan")], [0.1, float("inf")]])
def test_what_cannot_be_tested_is_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 finite"):
        paired_t(differences)


@pytest.mark.parametrize("others", [3, 5, 40])
@pytest.mark.parametrize("own", SAMPLES.values(), ids=SAMPLES)
def test_welchs_t_is_scipys(own: list[float], others: int) -> None:
    other = list(np.random.default_rng(1).standard_normal(others) * 0.3)
    expected, found = stats.ttest_ind(own, other, equal_var=False), welch_t(own, other)
    interval = expected.confidence_interval(0.9)
    assert (found.p, found.freedom) == (pytest.approx(expected.pvalue, rel=1e-9), pytest.approx(expected.df, rel=1e-9))
    assert found.interval(0.9) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_a_larger_baseline_is_used_where_seeds_pair_badly_and_costs_a_little() -> None:
    rng = np.random.default_rng(2)
    other, extra = list(rng.standard_normal(8)), list(rng.standard_normal(12))
    alike, apart = (
        [x + 0.1 * e for x, e in zip(other, rng.standard_normal(8), strict=True)],
        list(rng.standard_normal(8)),
    )
    for own, expected in ((alike, paired_t([a - b for a, b in zip(alike, other, strict=True)])), (apart, None)):
        found, used = more_baseline_t(own, other, extra)
        expected = expected or welch_t(own, [*other, *extra])
        assert used == (own is apart)
        assert found.mean == expected.mean
        assert (found.n, found.freedom) == (8, 7)
        assert found.deviation == pytest.approx(CHOICE * expected.deviation)


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        ({1: [2.71828183], 2: [2.5], 3: [2.71828183]}, (1, 3)),
        ({1: [10.98, 5.1, 4.2, 3.9, 3.8], 2: [10.98, 5.1, 4.2, 3.9, 3.8]}, (1, 2)),
        ({1: [10.98, 5.1, 4.2, 3.9], 2: [10.98, 5.1, 4.2, 3.9]}, None),
        ({1: [3.279], 2: [3.279]}, None),
        ({1: [0.0] * 9, 2: [0.0] * 9}, None),
        ({1: [2.71828183], 2: [2.71828184]}, None),
        ({}, None),
    ],
)
def test_one_run_under_two_names_is_found_and_short_figures_may_agree(runs: Any, found: Any) -> None:
    assert repeated(runs) == found


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        # 3 * 0.01; then 2 * 0.03; then 1 * 0.04, which may not be smaller than the one before
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.001, 0.012, 0.5], [0.08, 0.004, 0.036, 0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


def test_wilcoxon_leaves_zeros_out_and_never_gives_nan() -> None:
    assert wilcoxon_p([0.0, 0.0]) == 1.0
    assert wilcoxon_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5  # all signs equal: the two ends of 2^5
    assert wilcoxon_p([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5
    assert 0 < wilcoxon_p([1.0, 1.0, -1.0, 2.0, 3.0]) < 1


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    x = np.random.default_rng(1).standard_normal(12)
    without = [float(np.delete(x, i).mean()) for i in range(12)]
    assert jackknife(float(x.mean()), without) == pytest.approx(paired_t(list(x)).interval())


def test_the_jackknife_needs_two_groups() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        jackknife(1.0, [1.0])


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.0, True), (0.0049, True), (0.0052, False), (-0.0052, False), (0.02, False)]
)
def test_equivalence_is_two_one_sided_tests(mean: float, expected: bool) -> None:
    test = PairedT(n=10, mean=mean, deviation=0.0085, p=0.5)  # half a 90% interval: 1.833 * 0.0085 / sqrt(10) = 0.00493
    below, above = ((s * mean + 0.01) / (0.0085 / 10**0.5) for s in (1, -1))
    assert equivalent(test, 0.01) is expected
    assert bool(max(stats.t.sf(below, 9), stats.t.sf(above, 9)) <= 0.05) is expected


def test_correlation_and_spread_are_none_where_they_mean_nothing() -> None:
    assert statistics.correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert statistics.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert statistics.correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert statistics.spread([1.0]) is None


def normal_levels(alpha: float, fractions: list[float]) -> list[float]:
    """The levels for normal statistics, by integrating the density of the sum over a grid (Armitage et al. 1969)."""
    grid = np.linspace(-8, 8, 4001)
    step = grid[1] - grid[0]
    found, density = [], np.zeros_like(grid)  # of sum / sqrt(1 unit of all information), among those not stopped
    for k, fraction in enumerate(fractions):
        before = fractions[k - 1] if k else 0.0
        spread = math.sqrt(fraction - before)
        if k == 0:
            density = stats.norm.pdf(grid / spread) / spread
        else:
            density = np.array([(density * stats.norm.pdf((x - grid) / spread)).sum() * step / spread for x in grid])
        wanted = spent(alpha, fraction) - spent(alpha, before)
        tails = np.cumsum(density) * step
        bound = -float(np.interp(wanted / 2, tails, grid + step / 2))
        found.append(float(2 * stats.norm.sf(bound / math.sqrt(fraction))))
        density[np.abs(grid) >= bound] = 0
    return found


def test_many_seeds_give_the_levels_of_normal_statistics() -> None:
    found = levels(0.05, (2000, 4000, 6000, 8000, 10_000))
    assert found == pytest.approx(normal_levels(0.05, [0.2, 0.4, 0.6, 0.8, 1.0]), rel=0.03)
    assert 0.0145 < min(found)
    assert max(found) < 0.0172  # around Pocock's one level for five looks, 0.0158 (1977)


@pytest.mark.parametrize("looks", [(5, 10, 20), (2, 3), (3, 4, 5, 6)])
@pytest.mark.parametrize("alpha", [0.05, 0.10])
def test_looking_at_every_look_keeps_the_error_with_few_seeds(looks: tuple[int, ...], alpha: float) -> None:
    experiments = 200_000
    x = np.random.default_rng(7).standard_normal((experiments, looks[-1]))
    wrong = np.zeros(experiments, dtype=bool)
    for n, nominal in zip(looks, levels(alpha, looks), strict=True):
        wrong |= stats.ttest_1samp(x[:, :n], 0, axis=1).pvalue < nominal
    four_deviations = 4 * math.sqrt(alpha * (1 - alpha) / experiments)
    assert wrong.mean() == pytest.approx(alpha, abs=four_deviations)


def test_the_first_look_spends_by_its_share_and_one_look_spends_all() -> None:
    assert levels(0.05, (5, 20))[0] == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 4))
    assert levels(0.05, (8,)) == pytest.approx((0.05,))
    assert look_level(0.0125) == 0.0125


def test_levels_are_the_same_every_time() -> None:
    first = levels(0.05, (4, 8))
    levels.cache_clear()
    assert levels(0.05, (4, 8)) == first


@pytest.mark.parametrize(("n", "look"), [(2, None), (5, 5), (9, 5), (10, 10), (30, 20)])
def test_seeds_between_looks_wait(n: int, look: int | None) -> None:
    assert last_look((5, 10, 20), n) == look


@pytest.mark.parametrize("looks", [(), (1, 5), (5, 5), (10, 5), (2.5, 5), (True, 5)])
def test_looks_that_are_none_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rising numbers of seeds, at least 2, such as \[5, 10, 20\]"):
        levels(0.05, looks)


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
    "undeclared": ("", "no delta is declared, so that 'no difference' means exact equality: delta = 0.0"),
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


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
RESULTS = load_script("benchmarks/figures.py").measured("rigor")


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
