"""[tune]: which trials an arm gets and what they choose, by known answers and with real processes that are killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import RunnerProcess, write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.runs.cells import cells_of
from gptlab.runs.experiment_spec import Experiment, finer, read_experiment
from gptlab.runs.tuning import (
    Choice,
    Trial,
    all_trials,
    cells_an_arm,
    choices,
    choose,
    chosen,
    keep,
    leaders,
    read_kept,
    trial_experiment,
)

HEAD = """
name = "tried"
preset = "shakespeare-tiny-v1"
baseline = "plain"
seeds = [1, 2, 3]
[tune]
seeds = [101, 102]
learning_rate = [2, 0.5, 1]
dose = [0.5, 2]
[options]
n_layer = 4
learning_rate = 0.001
"""
ARMS = """
[arms.plain]
[arms.faster]
learning_rate = 0.004
min_lr = 0.0
[arms.held]
signal.name = "confidence"
signal.dose = 0.1
[arms.held-placebo]
signal.name = "confidence"
signal.dose = 0.1
signal.control = "placebo"
[arms.held-flipped]
signal.name = "confidence"
signal.dose = 0.1
signal.control = "flipped"
signal.flip = 0.5
[arms.usual]
signal.name = "entropy"
[arms.longer]
steps = 800
warmup_steps = 60
[arms.off]
signal.name = "entropy"
signal.weight = 0.0
[arms.longer-off]
steps = 800
warmup_steps = 60
signal.name = "entropy"
signal.weight = 0.0
[arms.lonely]
signal.name = "brier"
signal.weight = 0.5
signal.control = "shuffled"
[[arms.both.signal]]
name = "confidence"
dose = 0.1
[[arms.both.signal]]
name = "collision"
weight = 3
[[arms.both.signal]]
name = "brier"
"""


def read(folder: Path, text: str = HEAD + ARMS) -> Experiment:
    (folder / "x.toml").write_text(text)
    return read_experiment(folder / "x.toml")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return read(tmp_path)


def test_a_finer_grid_keeps_the_given_factors_and_divides_the_widest_gap() -> None:
    assert finer((0.5, 1, 2), 3) == (0.5, 1, 2)
    assert finer((0.5, 1, 2), 5) == (0.5, 0.7071, 1, 1.414, 2)
    assert finer((1, 2, 16), 5) == (1, 2, 4, 8, 16)
    assert finer((0.5, 2), 4) == (0.5, 0.7937, 1.26, 2)


def test_every_arm_gets_the_same_number_of_trials(experiment: Experiment) -> None:
    found = all_trials(experiment)
    assert {arm: len(trials) for arm, trials in found.items()} == dict.fromkeys(
        ("plain", "faster", "held", "usual", "lonely", "both"), 6
    )
    assert [trial.options for trial in found["plain"]] == [
        {"learning_rate": 0.001 * factor} for factor in (0.5, 0.63, 0.7937, 1, 1.414, 2)
    ], "no dose: more learning rates"
    assert found["faster"][5].options == {"learning_rate": 0.008, "min_lr": 0.0}
    held = [(trial.name, trial.options) for trial in found["held"]]
    assert held[:3] == [
        ("held.lr0.5.dose0.5", {"learning_rate": 0.0005, "signal.dose": 0.05}),
        ("held.lr0.5.dose2", {"learning_rate": 0.0005, "signal.dose": 0.2}),
        ("held.lr1.dose0.5", {"learning_rate": 0.001, "signal.dose": 0.05}),
    ]
    assert found["usual"][0].options == {"learning_rate": 0.0005, "signal.weight": 0.125}, "half of 1/n_layer"
    assert found["both"][1].options == {
        "learning_rate": 0.0005,
        "signal.dose": 0.2,
        "also": ({"name": "collision", "weight": 6.0}, {"name": "brier", "weight": 0.5}),
    }


def test_a_dose_is_tuned_only_where_it_was_asked_for(tmp_path: Path) -> None:
    for dose in ("", "dose = [1]"):
        found = all_trials(read(tmp_path, (HEAD + ARMS).replace("dose = [0.5, 2]", dose)))
        names = {"learning_rate", "min_lr"}
        assert all(len(trials) == 3 and trial.options.keys() <= names for trials in found.values() for trial in trials)
        assert [trial.name for trial in found["held"]] == ["held.lr0.5", "held.lr1", "held.lr2"]


def test_controls_weight_0_and_longer_baselines_follow_what_they_are_measured_by(experiment: Experiment) -> None:
    own = {arm: arm for arm in ("plain", "faster", "held", "usual", "lonely", "both")}
    to_held = dict.fromkeys(("held-placebo", "held-flipped"), "held")
    to_plain = dict.fromkeys(("off", "longer", "longer-off"), "plain")
    assert leaders(experiment) == {**own, **to_held, **to_plain}


def test_trials_are_an_ordinary_experiment_that_can_be_read_back(experiment: Experiment, tmp_path: Path) -> None:
    derived = trial_experiment(experiment)
    assert (derived.name, derived.baseline, derived.seeds, derived.looks) == (
        "tried.tune",
        "plain.lr1",
        (101, 102),
        None,
    )
    assert len(cells_of(derived, tmp_path)) == 6 * 6 * 2
    arm = derived.arms["held.lr2.dose0.5"]
    assert (arm.trial_of, arm.options["learning_rate"], arm.options["n_layer"]) == ("held", 0.002, 4)
    again = read(tmp_path, derived.text)
    assert {name: arm.options for name, arm in again.arms.items()} == {
        name: {
            **arm.options,
            **({"also": tuple(dict(s) for s in arm.options["also"])} if "also" in arm.options else {}),
        }
        for name, arm in derived.arms.items()
    }
    assert (again.seeds, again.delta, again.baseline) == (derived.seeds, derived.delta, derived.baseline)


def test_cells_are_counted_with_the_trials(experiment: Experiment) -> None:
    counts = cells_an_arm(experiment, 3)
    assert (counts["plain"], counts["held"], counts["held-placebo"], counts["off"]) == (15, 15, 3, 3)


def test_a_patched_arms_options_are_numbers_once_they_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "idea.diff").write_text("x")
    arms = '[arms.plain]\n[arms.idea]\npatch = "idea.diff"\nnew_option = [1, 2]\nlearning_rate = "2e-3"\n'
    found = read(tmp_path, HEAD.replace("dose = [0.5, 2]", "") + arms)
    derived = trial_experiment(found)
    assert derived.arms["idea.lr2"].patch == tmp_path / "idea.diff"
    assert derived.arms["idea.lr2"].options == {"n_layer": 4, "learning_rate": 0.004, "new_option": [1, 2]}
    wrong = read(tmp_path, HEAD.replace("dose = [0.5, 2]", "") + arms.replace("2e-3", "much"))
    with pytest.raises(ConfigError, match=r"\[tune\] arm 'idea': learning_rate: expected a number, found 'much'"):
        trial_experiment(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "[arms.plain]\n[arms.other]\nweight_decay = 0.2\n", r"dose: no arm has a signal whose dose"),
        (HEAD + "[arms.plain]\n[arms.x]\nsignal.name = 'entropy'\nlearning_rate = 0.0\n", "a learning_rate of 0"),
        (HEAD + "eval_every = 0\n[arms.plain]\n[arms.x]\nsignal.name = 'entropy'\n", "arm 'plain': .* eval_every = 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trial_experiment(read(tmp_path, text))


RATES = {factor: Trial("a", factor, None, {"learning_rate": factor}) for factor in (0.5, 1, 2)}


def best(*losses: list[float | None]) -> Choice:
    """The choice for losses of the three learning rates, over seeds."""
    return choose(list(RATES.values()), dict(zip(("a.lr0.5", "a.lr1", "a.lr2"), losses, strict=True)))


def test_the_lowest_mean_over_seeds_is_chosen() -> None:
    found = best([3.0, 3.0], [2.5, 3.1], [2.0, 3.9])
    assert (found.trial, found.loss, found.notes) == (RATES[1], 2.8, ())
    assert found.options == {"learning_rate": 1}
    assert found.losses["a.lr2"] == (2.0, 3.9)


def test_an_optimum_at_the_edge_is_told() -> None:
    assert best([3.0], [2.5], [2.0]).notes == (
        "the best learning rate is the largest that was tried, 2 times the declared one: try a wider range",
    )
    doses = [Trial("a", rate, dose, {}) for rate in (0.5, 1, 2) for dose in (0.5, 1)]
    found = choose(doses, {trial.name: [abs(trial.learning_rate - 1) + (trial.dose or 0)] for trial in doses})
    assert found.trial == doses[2]
    assert found.notes == (
        "the best dose is the smallest that was tried, 0.5 times the declared one: try a wider range",
    )


def test_a_trial_that_diverged_loses_and_equals_stay_near_what_was_declared() -> None:
    assert best([3.0, 3.0], [2.0, None], [4.0, 4.0]).trial == RATES[0.5]
    assert best([3.0], [3.0], [3.0]).trial == RATES[1]
    assert best([3.0], [None], [3.0]).trial == RATES[0.5], "both as far away: the smaller rate"
    none = best([None], [None], [None])
    assert (none.trial, none.loss, none.options) == (None, None, {})
    assert none.notes == ("every trial diverged: it runs as it was declared",)


def outcomes(experiment: Experiment, best_of: dict[str, str], without: str = "") -> list[dict[str, Any]]:
    """Entries of results.json: the named trials have loss 1, all others 2."""
    derived = trial_experiment(experiment)
    return [
        {"arm": name, "seed": seed, "state": "failed" if name == without else "finished",
         "loss": None if name == without else 1.0 if best_of.get(arm.trial_of or "") == name else 2.0}
        for name, arm in derived.arms.items() for seed in derived.seeds
    ]  # fmt: skip


def test_followers_take_over_the_choice(experiment: Experiment) -> None:
    best_of = {"plain": "plain.lr1.414", "held": "held.lr2.dose0.5", "usual": "usual.lr1.dose2"}
    found = chosen(experiment, choices(experiment, outcomes(experiment, best_of)))
    options = {name: arm.options for name, arm in found.arms.items()}
    assert options["held"] == {"n_layer": 4, "learning_rate": 0.002, "signal.name": "confidence", "signal.dose": 0.05}
    assert options["held-placebo"] == {**options["held"], "signal.control": "placebo"}
    assert options["off"]["learning_rate"] == options["plain"]["learning_rate"] == pytest.approx(0.001414)
    assert "signal.weight" not in options["held"]
    assert options["off"]["signal.weight"] == 0
    assert options["usual"]["signal.weight"] == 0.5
    assert (found.seeds, found.text) == (experiment.seeds, experiment.text)


def test_an_arm_with_a_failed_trial_waits_and_its_followers_with_it(experiment: Experiment) -> None:
    made = choices(experiment, outcomes(experiment, {}, without="held.lr2.dose0.5"))
    assert experiment.arms.keys() - chosen(experiment, made).arms.keys() == {"held", "held-placebo", "held-flipped"}


def test_a_choice_is_kept_and_not_changed_once_cells_have_begun(experiment: Experiment, tmp_path: Path) -> None:
    assert read_kept(tmp_path) is None
    made = choices(experiment, outcomes(experiment, {"held": "held.lr2.dose0.5"}))
    keep(experiment, tmp_path, made)
    kept = read_kept(tmp_path)
    assert kept
    assert (kept["trials"], kept["seeds"], kept["arms"]["held-placebo"]["follows"]) == (6, [101, 102], "held")
    assert kept["arms"]["held"]["options"] == {"learning_rate": 0.002, "signal.dose": 0.05}
    assert kept["arms"]["held"]["losses"]["held.lr2.dose0.5"] == [1.0, 1.0]
    assert kept["arms"]["plain"]["follows"] is None
    other = choices(experiment, outcomes(experiment, {"held": "held.lr1.dose0.5"}))
    keep(experiment, tmp_path, other)  # nothing has begun
    rows = tmp_path / "held" / "seed_1" / "metrics.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("")
    keep(experiment, tmp_path, other)
    with pytest.raises(ConfigError, match=r"held has begun with .*0.05.*, and its trials now choose .*give another"):
        keep(experiment, tmp_path, made)
    for damage in ("{", "[]", json.dumps({"arms": {"plain": {}}})):
        (tmp_path / "tuning.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"tuning.json is damaged: .*remove it and run the experiment again"):
            read_kept(tmp_path)


RUN_ARMS = {"plain": {}, "sure": {"signal.name": "confidence", "signal.dose": 0.3}}
RUN_HEAD = {"name": "tiny", "preset": "shakespeare-tiny-v1", "baseline": "plain", "seeds": [1]}
TUNE = {"seeds": [101], "learning_rate": [0.1, 1]}
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write(folder, RUN_ARMS, RUN_HEAD, TUNE, steps=STEPS)


@pytest.fixture(scope="module")
def whole(folder: Path, file: Path) -> Path:
    """The tiny experiment, run in one go."""
    out = folder / "whole"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    return out


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_cells_run_with_what_their_arms_trials_chose(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = {(cell["arm"], cell["seed"]): cell["loss"] for cell in content(whole / ".tune" / "results.json")["cells"]}
    assert list(trials) == [(f"{arm}.lr{factor}", 101) for arm in ("plain", "sure") for factor in ("0.1", "1")]
    for arm in RUN_ARMS:
        best = min((0.1, 1), key=lambda factor: trials[f"{arm}.lr{factor:g}", 101])
        chosen = content(whole / "tuning.json")["arms"][arm]
        assert (chosen["options"], chosen["loss"]) == ({"learning_rate": 0.01 * best}, trials[f"{arm}.lr{best:g}", 101])
        assert content(whole / arm / "seed_1" / "config.json")["options"]["learning_rate"] == 0.01 * best
    assert [(cell["arm"], cell["state"]) for cell in content(whole / "results.json")["cells"]] == [
        ("plain", "finished"),
        ("sure", "finished"),
    ]
    assert main(["experiment", "status", str(whole), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["states"] == {"finished": 6}
    assert status["tuning"] == content(whole / "tuning.json")


@pytest.mark.slow
def test_nothing_runs_again_where_it_was_run_or_where_its_packed_copy_lies(
    whole: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_of_it, packed = tmp_path / "packed.json.gz", tmp_path / "packed"
    assert main(["experiment", "pack", str(whole), "--out", str(file_of_it)]) == 0
    assert main(["experiment", "unpack", str(file_of_it), "--out", str(packed)]) == 0
    before = (whole / "results.json").read_bytes()
    for out in (whole, packed):
        capsys.readouterr()
        assert main(["experiment", "run", str(file), "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ran"] == []
    assert (whole / "results.json").read_bytes() == before
    assert (packed / "tuning.json").read_bytes() == (whole / "tuning.json").read_bytes()


@pytest.mark.slow
def test_killed_among_trials_and_among_cells_and_identical(whole: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    a_cell = STEPS + 2  # rows: updates, validation, its end
    for at in (a_cell + 3, 4 * a_cell + 3):
        runner = RunnerProcess(file, out)
        try:
            runner.wait_for_rows(at)
            runner.send(signal.SIGKILL)
            assert runner.end()[0] == -signal.SIGKILL
        finally:
            runner.abandon()
    assert (out / "tuning.json").is_file(), "the second kill was among cells"
    last = RunnerProcess(file, out)
    try:
        code, _, err = last.end()
    finally:
        last.abandon()
    assert code == 0, err
    for name in ("results.json", "tuning.json", ".tune/results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
