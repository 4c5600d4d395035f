"""`gptlab falsify` and `gptlab experiment ladder`: the same arms in other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.runs.experiment_spec import Experiment, read_experiment
from gptlab.runs.variants import Variant, changes, derived, rungs, status

Capture = pytest.CaptureFixture[str]
TEXT = """
name = "small"
baseline = "plain"
seeds = [1, 2]
delta = 0.01
[options]
data = "{corpus}"
n_embd = 32
steps = 6
warmup_steps = 0
eval_every = 1000
eval_tokens = 512
threads = 1
[arms.plain]
[arms.slow]
learning_rate = 0.0005
"""


@pytest.fixture(scope="module")
def finding(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment in which a tenth of the learning rate is surely worse."""
    folder = tmp_path_factory.mktemp("finding")
    (folder / "small.toml").write_text(TEXT.format(corpus=tiny_corpus))
    assert main(["experiment", "run", str(folder / "small.toml"), "--out", str(folder / "small")]) == 0
    return folder / "small"


@pytest.fixture
def experiment(tiny_corpus: Path, tmp_path: Path) -> Experiment:
    path = tmp_path / "declared.toml"
    path.write_text(TEXT.format(corpus=tiny_corpus))
    return read_experiment(path)


@pytest.mark.slow
def test_a_finding_is_tried_under_changes_and_continued(
    finding: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's vocabulary does not fit the finding's own corpus of bytes, so that it cannot be tried."""
    monkeypatch.chdir(tmp_path)
    words = ["falsify", str(finding), "--arm", "slow", "--budget", "1", "--seeds", "2", "--out", "out", "--json"]
    words += ["--only", "other_seeds,vocabulary"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {one["name"]: one for one in found["changes"]}
    assert found["found"]["difference"] > 0
    assert by_name["other_seeds"]["status"] == "survived"
    assert by_name["vocabulary"]["status"] == "not tried"
    assert "tokenizer" in by_name["vocabulary"]["reason"]
    assert found["sentence"] == "the sign of slow survived 1 of 1 changes, was reversed in 0, and 0 are open"
    assert json.loads(Path("out/falsify.json").read_text()) == found

    rows = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*/seed_*/metrics.jsonl")}
    assert {path.parent.name for path in rows if "other_seeds" in str(path)} == {"seed_3", "seed_4"}
    words[-1] = "other_seeds"
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in rows} == rows  # nothing was trained again


@pytest.mark.slow
def test_a_spent_budget_begins_nothing(finding: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["falsify", str(finding), "--arm", "slow", "--budget", "1e-9", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "survived 0 of 0 changes" in out
    assert "the budget ended" in out
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.slow
def test_an_arm_on_the_rungs_of_the_ladder(finding: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["experiment", "ladder", str(finding.with_suffix(".toml")), "--depths", "2,4", "--seeds", "2"]
    assert main([*words, "--out", str(tmp_path / "rungs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rung["depth"] for rung in found["rungs"]] == [2, 4]
    assert all(rung["arms"]["slow"]["difference"] > 0 for rung in found["rungs"])
    assert found["arms"]["slow"] == {"sign": "higher", "holds": 2, "of": 2}
    assert json.loads((tmp_path / "rungs" / "ladder.json").read_text()) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["{folder}", "--budget", "1", "--arm", "fast"], 2, "found fast"),
        (["{folder}", "--arm", "slow", "--budget", "1", "--only", "rate_hlf"], 2, "did you mean 'rate_half'?"),
    ],
)
def test_an_arm_or_a_change_that_is_not_there(
    words: list[str], code: int, line: str, finding: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["falsify", *(word.format(folder=finding) for word in words)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["x", "--budget", "-1"], 2, "--budget: expected hours above 0, found '-1'"),
        (["x", "--budget", "nan"], 2, "--budget: expected hours above 0, found 'nan'"),
        (["x"], 2, "required: --budget"),
        (["x.json.gz", "--budget", "1"], 3, "expected a packed experiment at x.json.gz, found nothing"),
        ([".", "--budget", "1"], 3, "expected an experiment's folder, found no experiment.toml in ."),
        (["first_look", "--budget", "1"], 3, "found none; first: gptlab experiment run first_look"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], code: int, line: str, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["falsify", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_numbers_keep_their_ratio_to_the_recipe_of_a_rung(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + '[arms.late]\nsignal.name = "confidence"\nsignal.start = 3\n')
    (rung,) = rungs([4])
    found = derived(read_experiment(path), rung, ["plain", "slow", "late"], 2)
    assert found.preset == "ladder"
    assert found.arms["slow"].get("learning_rate", "ladder") == pytest.approx(0.0003)  # a tenth of the rung's 0.003
    assert found.arms["plain"].get("steps", "ladder") == round(6 / 1300 * 8148)
    assert found.arms["late"].options["signal.start"] == round(3 / 1300 * 8148)
    assert found.arms["plain"].get("data", "ladder") == experiment.arms["plain"].options["data"]


def test_changes_that_an_arm_makes_itself_are_not_tried(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + '[arms.muon]\noptimizer = "muon"\n[arms.patched]\npatch = "x.diff"\n')
    path.with_name("x.diff").write_text("")
    with_more = read_experiment(path)
    reasons = {one.name: one.impossible for one in changes(with_more, ["plain", "muon"])}
    assert reasons.pop("muon") == "muon has it already"
    assert set(reasons.values()) == {""}
    reasons = {one.name: one.impossible for one in changes(with_more, ["plain", "patched"])}
    assert reasons["untied_head"] == "patched is a patch itself"


def test_the_cheapest_change_comes_first(experiment: Experiment) -> None:
    names = [one.name for one in changes(experiment, ["plain", "slow"])]
    assert names.index("rate_half") < names.index("vocabulary") < names.index("tokens")


def test_choices_of_tune_hold_for_their_own_setting_alone(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + "[tune]\nseeds = [9]\n")
    with pytest.raises(ConfigError, match=r"without \[tune\]"):
        derived(read_experiment(path), Variant("same", "the same"), ["plain", "slow"], 2)


@pytest.mark.parametrize(
    ("sign", "difference", "interval", "expected"),
    [
        (0.1, 0.2, [0.1, 0.3], "survived"),
        (-0.1, -0.2, [-0.3, -0.1], "survived"),
        (0.1, -0.2, [-0.3, -0.1], "reversed"),
        (0.1, 0.2, [-0.1, 0.5], "open"),
        (0.1, 0.2, [0.0, 0.4], "open"),
        (0.1, None, [None, None], "open"),
    ],
)
def test_a_sign_survives_where_its_interval_does(
    sign: float, difference: float | None, interval: list[float | None], expected: str
) -> None:
    assert status(sign, {"difference": difference, "interval": interval}) == expected
