"""Multipliers, fits and compounding of made-up costs whose truth is known, and of made-up runs."""

from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.analysis.dose_response import (
    THEORIES,
    Multiplier,
    compounding,
    corruptions,
    fit_exponent,
    growth,
    multiplier,
    tokens_to_reach,
)
from gptlab.analysis.statistics import critical_t
from gptlab.cli.main import main
from gptlab.options import build, flatten, table_options
from gptlab.runs.experiment_spec import as_toml
from gptlab.training.config import TrainingConfig

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("values", "level", "rising", "expected"),
    [
        ([3.0, 2.0, 1.0], 1.75, False, 225.0),
        ([3.0, 2.0, 1.0], 2.0, False, 200.0),
        ([3.0, 2.0, 1.0], 0.9, False, None),  # censored
        ([3.0, 2.0, 1.0], 3.5, False, 100.0),  # there before anyone looked
        ([3.0, 1.0, 2.0], 2.0, False, 150.0),  # the first time counts, whatever comes after
        ([0.1, 0.3, 0.4], 0.35, True, 250.0),
        ([0.1, 0.3, 0.4], 0.5, True, None),
    ],
)
def test_tokens_to_a_level(values: list[float], level: float, rising: bool, expected: float | None) -> None:
    assert tokens_to_reach([100, 200, 300], values, level, rising=rising) == pytest.approx(expected)


def test_a_multiplier_is_a_geometric_mean_with_a_paired_interval() -> None:
    """Ratios 2, 4, 8 around 4, whatever each seed's own pace is."""
    reference, ends = {1: 10.0, 2: 50.0, 3: 30.0}, {1: 1e3, 2: 1e3, 3: 1e3}
    found = multiplier({1: 20.0, 2: 200.0, 3: 240.0}, reference, ends)
    half = critical_t(0.05, 2) * math.log(2) / math.sqrt(3)
    assert (found.n, found.censored, found.whole) == (3, 0, True)
    assert found.ratio == pytest.approx(4)
    assert found.interval == pytest.approx((4 / math.exp(half), 4 * math.exp(half)))


def test_who_never_arrives_makes_it_a_lower_bound_without_an_interval() -> None:
    found = multiplier({1: 20.0, 2: None}, {1: 10.0, 2: 25.0}, {1: 200.0, 2: 200.0})
    assert (found.n, found.censored, found.whole, found.interval) == (2, 1, False, None)
    assert found.ratio == pytest.approx(math.sqrt(2 * 8))
    assert found.logs == {1: pytest.approx(math.log(2))}


def test_a_seed_without_its_clean_run_is_left_out() -> None:
    found = multiplier({1: 20.0, 2: 20.0}, {1: 10.0, 2: None, 3: 5.0}, {1: 99.0, 2: 99.0})
    assert (found.n, found.ratio, found.interval) == (1, pytest.approx(2), None)
    assert multiplier({1: 20.0}, {1: None}, {1: 99.0}).ratio is None


@pytest.mark.parametrize(
    ("theory", "dose", "vocabulary", "ratio"),
    [("uniform", 0.3, 256, 1 / (1 - 0.3 * 256 / 255)), ("parity", 0.3, 256, 2.5), ("gaussian", 2.0, 256, 5.0)],
)
def test_theories_at_exponent_one(theory: str, dose: float, vocabulary: int, ratio: float) -> None:
    assert math.exp(THEORIES[theory][1](dose, vocabulary)) == pytest.approx(ratio)


def test_a_fit_finds_the_exponent_it_was_made_of() -> None:
    """Each seed has an exponent of its own, so the interval is that of the three."""
    x = [THEORIES["parity"][1](dose, 256) for dose in (0.1, 0.2, 0.4)]
    found = fit_exponent([(one, {seed: (1 + seed) * one for seed in (0, 1, 2)}) for one in x])
    assert found is not None
    half = critical_t(0.05, 2) / math.sqrt(3)
    assert (found.exponent, found.doses, found.worst) == (pytest.approx(2), 3, pytest.approx(1))
    assert found.interval == pytest.approx((2 - half, 2 + half))


def test_a_fit_says_how_far_the_worst_dose_is_off_and_leaves_out_what_has_no_theory() -> None:
    found = fit_exponent([(1.0, {1: 1.0}), (2.0, {1: 4.0}), (math.inf, {1: 9.0})])
    assert found is not None
    assert found.exponent == pytest.approx(9 / 5)
    assert found.worst == pytest.approx(math.exp(0.8))
    assert (found.doses, found.interval) == (2, None)
    assert fit_exponent([]) is fit_exponent([(math.inf, {1: 1.0})]) is fit_exponent([(1.0, {1: 1.0}), (2.0, {2: 1.0})])


def arrived(logs: dict[int, float], censored: int = 0) -> Multiplier:
    """The multiplier of seeds' log ratios, of which the first `censored` are lower bounds only."""
    ends = {seed: math.exp(log) for seed, log in logs.items()}
    reached = {seed: None if i < censored else end for i, (seed, end) in enumerate(ends.items())}
    return multiplier(reached, dict.fromkeys(ends, 1.0), ends)


@pytest.mark.parametrize(
    ("everywhere", "verdict"), [(1.5 * 2 * 3, "product"), (1 + 0.5 + 1 + 2, "sum"), (2.0, "neither"), (20.0, "neither")]
)
def test_errors_multiply_add_or_neither(everywhere: float, verdict: str) -> None:
    """Five seeds whose paces differ by a per cent, about the truth."""
    noise = np.random.Generator(np.random.Philox(key=1)).normal(0, 0.01, (4, 5))
    noise -= noise.mean(1, keepdims=True)
    logs = [dict(enumerate(math.log(m) + row)) for m, row in zip((1.5, 2, 3, everywhere), noise, strict=True)]
    found = compounding(list(map(arrived, logs[:3])), arrived(logs[3]))
    assert found is not None
    assert (found.verdict, found.bounds) == (verdict, "")
    assert (found.n, found.product, found.everywhere) == (5, pytest.approx(9), pytest.approx(everywhere))
    assert found.sum == pytest.approx(4.5, rel=1e-3)


def test_small_errors_cannot_be_told_apart_and_one_seed_tells_nothing() -> None:
    logs = [{1: math.log(1.01), 2: math.log(1.03)}] * 2
    found = compounding(list(map(arrived, logs)), arrived({1: math.log(1.02), 2: math.log(1.06)}))
    assert found is not None
    assert found.verdict == "both"
    alone = compounding([arrived({1: 0.5})], arrived({1: 0.5}))
    assert alone is not None
    assert (alone.verdict, alone.against_product) == ("undecided", None)
    assert compounding([arrived({1: 0.5})], arrived({2: 0.5})) is None


@pytest.mark.parametrize(
    ("everywhere", "lost", "verdict", "bounds"),
    [
        (2.0, (2, 0), "neither", "singles"),
        (9.0, (2, 0), "undecided: not all runs arrived", "singles"),
        (20.0, (2, 0), "undecided: not all runs arrived", "singles"),
        (20.0, (0, 1), "neither", "everywhere"),
        (9.0, (0, 1), "undecided: not all runs arrived", "everywhere"),
        (2.0, (0, 1), "undecided: not all runs arrived", "everywhere"),
        (2.0, (2, 1), "undecided: not all runs arrived", "all"),
        (20.0, (2, 1), "undecided: not all runs arrived", "all"),
    ],
)
def test_bounds_decide_where_whatever_they_hide_could_not(
    everywhere: float, lost: tuple[int, int], verdict: str, bounds: str
) -> None:
    """A single judge that never arrived costs at least so much: more than all together, if that is what they cost."""

    def costs(ratio: float, censored: int = 0) -> Multiplier:
        return arrived({seed: math.log(ratio) + seed / 100 for seed in range(5)}, censored)

    found = compounding([costs(1.5), costs(2), costs(3, lost[0])], costs(everywhere, lost[1]))
    assert found is not None
    assert (found.verdict, found.bounds) == (verdict, bounds)


def test_neither_says_on_which_side(experiment: Path, capsys: Capture) -> None:
    """Where all wrong judges together cost less than one of them, or more than all costs multiplied."""
    for cost, side in ((1.2, "neither: less than both"), (4.0, "neither: more than both")):
        shutil.rmtree(experiment / "all")
        write_arm(experiment, "all", {"signal": flipped("all")}, cost)
        assert main(["dose_response", str(experiment), "--shares", "0.125"]) == 0
        assert side in capsys.readouterr().out


def test_growth_is_late_over_early() -> None:
    found = growth({1: math.log(2), 2: math.log(2)}, {1: math.log(3), 2: math.log(3), 3: 9.0})
    assert found is not None
    assert found[0] == pytest.approx(1.5)
    assert found[1] == pytest.approx((1.5, 1.5))
    assert growth({1: 0.0}, {2: 0.0}) is None


def options_of(**table: Any) -> dict[str, Any]:
    """A run's options as its config.json holds them."""
    return flatten(build(TrainingConfig, table_options(table, TrainingConfig)))


def flipped(layers: Any, flip: float = 0.4) -> dict[str, Any]:
    return {"name": "deep_supervision", "layers": layers, "control": "flipped", "flip": flip}


def test_what_is_wrong_with_a_run_and_what_it_is_without() -> None:
    clean, none = corruptions(options_of())
    assert none == []
    for table, series, dose, figure in (
        ({"target_flip": 0.2}, "uniform flips in the true loss", 0.2, "clean_loss"),
        ({"target_flip": 0.2, "target_flip_to": "argmax"}, "argmax flips in the true loss", 0.2, "accuracy"),
        ({"gradient_noise": 2.0}, "gradient noise", 2.0, "loss"),
    ):
        same, (error,) = corruptions(options_of(**table))
        assert same == clean
        assert (error.series, error.dose, error.figure) == (series, dose, figure)
    assert corruptions(options_of(learning_rate=1.0, gradient_noise=2.0))[0] != clean


def test_one_wrong_judge_among_true_ones_is_the_same_run_without_its_error() -> None:
    """However the judges are shared out over signals."""
    honest, none = corruptions(options_of(signal={"name": "deep_supervision"}))
    assert none == []
    everywhere, (error,) = corruptions(options_of(signal=flipped("all")))
    assert everywhere == honest
    assert (error.series, error.judges) == ("uniform flips in deep_supervision at judge 1,2,3", (1, 2, 3))
    rest = {"name": "deep_supervision", "layers": [1, 3]}
    single, (error,) = corruptions(options_of(signal=[rest, flipped([2])]))
    assert single == honest
    assert (error.judges, error.dose, error.figure, error.theory) == ((2,), 0.4, "loss", "uniform")
    assert corruptions(options_of(signal=[rest, flipped([2], 0.0)])) == (honest, [])
    assert corruptions(options_of(signal=[rest]))[0] != honest
    assert corruptions(options_of(signal=[{**rest, "weight": 1.0}, flipped([2])]))[0] != honest
    assert len(corruptions(options_of(signal=[flipped([1]), flipped([2, 3], 0.1)]))[1]) == 2


SEEDS = (1, 2, 3)
STEPS, PER_STEP = 40, 100


def write_arm(folder: Path, name: str, table: Mapping[str, Any], cost: float) -> None:
    """Runs whose figures run straight down (accuracy: up), `cost` times as slowly as a clean run's."""
    for seed in SEEDS:
        options = {**options_of(**table, steps=STEPS), "seed": seed, "total_batch_tokens": PER_STEP}
        cell = folder / name / f"seed_{seed}"
        cell.mkdir(parents=True)
        made_of = {"options": options, "data": {"tokenizer": "bytes", "train": ["1"], "val": ["2"], "complete": True}}
        (cell / "config.json").write_text(json.dumps(made_of))
        (cell / "environment.json").write_text("{}")
        rows: list[dict[str, Any]] = []
        for step in range(2, STEPS + 1, 2):
            learnt = step / STEPS / cost * (1 + seed / 10)
            figures = {"loss": 5 - learnt, "accuracy": learnt / 2}
            if table.get("target_flip") and "target_flip_to" not in table:
                figures = {"loss": 9.0, "accuracy": 0.1, "clean_loss": 5 - learnt}
            rows.append({"step": step, "kind": "val", **figures})
        rows.append({"step": STEPS, "kind": "event", "event": "finished"})
        (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Uniform flips cost the theory's square, argmax flips 2 and 9 times, judges multiply, noise is of two kinds."""
    judge = {"name": "deep_supervision"}
    arms: dict[str, tuple[dict[str, Any], float]] = {
        "baseline": ({}, 1.0),
        **{f"uniform-{r}": ({"target_flip": r}, (1 - r * 256 / 255) ** -2) for r in (0.1, 0.2, 0.3)},
        "argmax-0.2": ({"target_flip": 0.2, "target_flip_to": "argmax"}, 2.0),
        "argmax-0.4": ({"target_flip": 0.4, "target_flip_to": "argmax"}, 9.0),
        "honest": ({"signal": judge}, 1.0),
        "all": ({"signal": flipped("all")}, 1.2 * 1.3 * 1.4),
        **{
            f"judge_{j}": (
                {"signal": [{**judge, "layers": [k for k in (1, 2, 3) if k != j]}, flipped([j])]},
                1.1 + j / 10,
            )
            for j in (1, 2, 3)
        },
        "mixed": ({"target_flip": 0.1, "gradient_noise": 1.0}, 3.0),
    }
    text = 'name = "made"\nbaseline = "baseline"\nseeds = [1, 2, 3]\n'
    for name, (table, cost) in arms.items():
        write_arm(tmp_path, name, table, cost)
        own = {k: v for k, v in options_of(**table).items() if v != options_of()[k]}
        text += f'[arms."{name}"]\n' + as_toml(own, f'arms."{name}".')
    (tmp_path / "experiment.toml").write_text(text)
    return tmp_path


def test_an_experiments_folder_as_dose_and_response(experiment: Path, capsys: Capture) -> None:
    assert main(["dose_response", str(experiment), "--json", "--shares", "0.125,0.25"]) == 0
    result = json.loads(capsys.readouterr().out)
    series = {one["name"]: one for one in result["series"]}
    uniform = series["uniform flips in the true loss"]
    assert (uniform["reference"], uniform["figure"]) == ("baseline", "clean_loss")
    assert [level["share"] for level in uniform["levels"]] == [0.125, 0.25]
    for level, share in zip(uniform["levels"], (0.125, 0.25), strict=True):
        assert level["level"] == pytest.approx(5 - share * 1.2)
        assert level["fit"]["exponent"] == pytest.approx(2, rel=1e-9)
        for row in level["doses"]:
            assert row["multiplier"] == pytest.approx((1 - row["dose"] * 256 / 255) ** -2)
            assert row["interval"] == pytest.approx([row["multiplier"]] * 2)
            assert row["fitted"] == pytest.approx(row["multiplier"])
    assert uniform["growth"]["uniform-0.2"]["ratio"] == pytest.approx(1)
    assert "argmax-0.4" not in {arm for one in result["series"] for arm in one["growth"]}, "it never arrived"
    argmax = series["argmax flips in the true loss"]["levels"][1]
    assert [(row["multiplier"], row["censored"]) for row in argmax["doses"]] == [(pytest.approx(2), 0), (
        pytest.approx(np.exp(np.mean([np.log(4 * (1 + seed / 10) / 1.2) for seed in SEEDS]))), 3)]  # fmt: skip
    assert argmax["fit"]["doses"] == 1, "a dose at which runs never arrived is no part of a fit"
    (early, late) = result["compounding"]
    assert (early["everywhere"], early["product"]) == (pytest.approx(1.2 * 1.3 * 1.4), pytest.approx(1.2 * 1.3 * 1.4))
    assert early["sum"] == pytest.approx(1.9)
    assert early["verdict"] == late["verdict"] == "product"
    assert result["notes"] == ["mixed has errors of 2 kinds, so that no dose is its own"]


def test_tables_and_a_plot_for_people(experiment: Path, tmp_path: Path, capsys: Capture) -> None:
    svg = tmp_path / "plot.svg"
    assert main(["dose_response", str(experiment), "--figure", str(svg), "--levels", "4.75"]) == 0
    out, err = capsys.readouterr()
    words = " ".join(out.split())
    assert "uniform flips in the true loss: times the tokens of baseline" in words
    assert "1/(1-ρV/(V-1))^a" in words
    assert "at 4.75" in words
    assert "Does it compound?" in words
    assert "left out: mixed has errors of 2 kinds" in words
    assert f"figure: {svg}" in err
    drawn = "".join(ElementTree.parse(svg).getroot().itertext())
    assert "gradient noise" not in drawn
    assert "argmax flips in the true loss" in drawn
    for words in ("tokens needed, times the clean run’s", "dose of the known error", "fit", "at least so many"):
        assert words in drawn


def test_what_cannot_be_read_is_told(experiment: Path, tmp_path: Path, capsys: Capture) -> None:
    def told(*words: str) -> str:
        assert main(["dose_response", str(experiment), *words]) in (2, 3)
        return capsys.readouterr().err

    assert "expected shares above 0 and at most 1, found 2" in told("--shares", "2")
    assert "expected numbers such as 0.25,0.5, found 'half'" in told("--shares", "half")
    for cell in (experiment / "uniform-0.2").iterdir():
        rows = (cell / "metrics.jsonl").read_text().replace("clean_loss", "other")
        (cell / "metrics.jsonl").write_text(rows)
    assert "expected clean_loss in its validation rows" in told()
