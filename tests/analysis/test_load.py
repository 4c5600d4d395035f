"""Runs, experiments and logs become arms x seeds; what nobody declared is found and told."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.comparability import steps_saved
from gptlab.analysis.load import Outcomes, read
from gptlab.analysis.report.comparison import page
from gptlab.analysis.run import count_parameters, read_run
from gptlab.analysis.tables import tables
from gptlab.cli.main import main
from gptlab.errors import CheckpointError, ConfigError, DataError
from gptlab.options import build, flatten
from gptlab.runs.experiment_spec import DECLARATION, experiment_from, keep_declaration
from gptlab.runs.folder import RunFolder
from gptlab.runs.records import rows_sha256
from gptlab.training.config import TrainingConfig

EXPERIMENT = """
name = "tried"
baseline = "plain"
seeds = [1, 2, 3]
delta = 0.02
[options]
steps = 20
eval_every = 10
[arms.plain]
[arms.sure]
signal.name = "confidence"
[arms.sure-placebo]
signal.name = "confidence"
signal.control = "placebo"
[arms.faster]
learning_rate = 0.002
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sure": {"signal.name": "confidence"},
    "sure-placebo": {"signal.name": "confidence", "signal.control": "placebo"},
    "faster": {"learning_rate": 0.002},
}
LOSSES = {"plain": 3.0, "sure": 2.9, "sure-placebo": 2.99, "faster": 3.1}
NOISE = {1: 0.0, 2: 0.011, 3: -0.013}


@pytest.fixture
def experiment(tmp_path: Path, write_run: Any) -> Path:
    for arm, options in OPTIONS.items():
        for seed in (1, 2, 3):
            loss = LOSSES[arm] + NOISE[seed] + 0.001 * (seed * len(arm) % 3)
            dose = 0.3 if "signal.name" in options else None
            write_run(tmp_path / arm / f"seed_{seed}", loss, seed=seed, options=options, dose=dose)
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    return tmp_path


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_experiment_is_read_as_declared(experiment: Path) -> None:
    outcomes = read([experiment])
    assert (outcomes.name, outcomes.step, outcomes.undeclared, outcomes.notes) == ("tried", 20, (), ())
    assert outcomes.losses["plain"] == {1: 3.002, 2: 3.012, 3: pytest.approx(2.987)}
    assert outcomes.arguments["placebos"] == {"sure": "sure-placebo"}
    assert outcomes.arguments["doses"] == {"sure": pytest.approx(0.3), "sure-placebo": pytest.approx(0.3)}
    result = outcomes.verdicts()
    found = {arm: (v["verdict"], v["control"]) for arm, v in result["arms"].items()}
    assert found == {"sure": ("better", False), "sure-placebo": ("no difference", True), "faster": ("worse", False)}
    assert (result["delta"], result["planned"], result["baseline"]) == (0.02, 3, "plain")
    assert result["arms"]["faster"]["changes"]["learning_rate"] == [0.001, 0.002]


def test_the_passport_tells_what_the_folders_tell(experiment: Path) -> None:
    found = read([experiment]).verdicts()["arms"]["sure"]["passport"]
    assert (found["vocabulary"], found["depth"], found["learning_rate"], found["tuned"]) == (256, 4, 0.001, False)
    assert (found["clipped_share"], found["dose"], found["epochs"]) == (0.25, pytest.approx(0.3), None)
    assert found["tokens_per_parameter"] == 20 * 2048 / found["parameters"]
    assert found["noise_floor"] > 0


def test_epochs_come_from_the_corpus_where_it_is_the_one(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "data" / "shakespeare-bytes"
    corpus.mkdir(parents=True)
    shard = {"file": "x.bin", "tokens": 1024, "sha256": ""}
    splits = {"train": [{**shard, "sha256": d * 64} for d in "12"], "val": [{**shard, "sha256": "3" * 64}]}
    manifest = {
        "format": 1,
        "name": "shakespeare",
        "source": {},
        "tokenizer": "bytes",
        "vocab_size": 256,
        "complete": True,
    }
    (corpus / "corpus.json").write_text(json.dumps({**manifest, "splits": splits}))
    monkeypatch.chdir(tmp_path)
    assert read([experiment]).passports["plain"]["epochs"] == 20
    splits["train"][0]["sha256"] = "9" * 64
    (corpus / "corpus.json").write_text(json.dumps({**manifest, "splits": splits}))
    assert read([experiment]).passports["plain"]["epochs"] is None


@pytest.mark.parametrize("options", [{}, {"share_blocks": True}, {"tokenizer": "gpt2", "n_embd": 64, "n_layer": 2}])
def test_parameters_are_counted_as_the_model_has_them(options: dict[str, Any]) -> None:
    from gptlab.model import GPT, GPTConfig

    config = build(TrainingConfig, options)
    shape = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.share_blocks)
    expected = sum(p.numel() for p in GPT(GPTConfig(*shape)).parameters())
    assert count_parameters(flatten(config), config.vocab_size) == expected


@pytest.mark.parametrize(
    ("event", "verdict", "note"),
    [
        ({"event": "DivergedError", "text": "not finite"}, "undecided", None),
        (None, "undecided", "is at step 20 and has not finished"),
        ({"event": "Stopped"}, "undecided", "has not finished"),
    ],
    ids=["diverged", "running", "stopped"],
)
def test_a_run_that_did_not_finish_is_told(
    experiment: Path, write_run: Any, event: dict[str, Any] | None, verdict: str, note: str | None
) -> None:
    cell = experiment / "faster" / "seed_2"
    os.rename(cell, experiment / "before")
    write_run(cell, 3.1, seed=2, options=OPTIONS["faster"], end=event)
    outcomes = read([experiment])
    assert [note in line for line in outcomes.notes] == ([True] if note else [])
    found = outcomes.verdicts()["arms"]["faster"]
    assert found["verdict"] == verdict
    assert ("seed 2" if note is None else "2 of the 3 declared seeds") in found["reason"]


UNDECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "training data": ({"data": {"train": ["9" * 64, "2" * 64]}}, "data shards train: expected ['111111111111…'"),
    "validation data": ({"data": {"val": ["9" * 64]}}, "data shards val: expected"),
    "validation hash": ({"end": {"event": "finished", "validation_sha256": "e" * 64}}, "validation set"),
    "model": ({"options": {"n_layer": 3}}, "option n_layer: expected 4 as in"),
    "an option": ({"options": {"weight_decay": 0.2}}, "option weight_decay: expected 0.1 as in"),
    "gptlab": ({"config": {"gptlab": "0.2.0"}}, "software gptlab: expected '0.1.0' as in"),
    "a patch": ({"config": {"patch": "abc"}}, "software patch: expected None as in"),
    "a user's signal": ({"config": {"code": {"idea.py": "abc"}}}, "software code: expected None as in"),
    "torch": ({"environment": {"torch": "2.12.0"}}, "software torch: expected '2.13.0' as in"),
    "torch until step 9": ({"environment": {"earlier": [{"torch": "2.12.0"}]}}, "software earlier: expected [] as in"),
    "compile": ({"environment": {"compile": True}}, "software compile: expected False as in"),
    "processor": ({"environment": {"machine": {"processor": "another"}}}, "machine processor: expected 'a processor'"),
    "device": ({"environment": {"device": "cuda:1"}}, "machine device: expected 'cpu' as in"),
    "dtype": ({"environment": {"dtype": "bf16"}}, "machine dtype: expected 'fp32' as in"),
}


@pytest.mark.parametrize("seed", [1, 3], ids=["against the baseline", "within the arm"])
@pytest.mark.parametrize("case", UNDECLARED.values(), ids=UNDECLARED)
def test_what_nobody_declared_is_found(
    experiment: Path, write_run: Any, case: tuple[dict[str, Any], str], seed: int
) -> None:
    changes, message = case
    cell = experiment / "faster" / f"seed_{seed}"
    os.rename(cell, experiment / "before")
    options = {**OPTIONS["faster"], **changes.get("options", {})}
    write_run(cell, 2.9, seed=seed, **{**changes, "options": options})
    found = read([experiment]).undeclared
    assert len(found) == 1
    assert found[0].startswith(f"{cell}: {message}"), found


@pytest.mark.parametrize(
    "environment",
    [{"machine": 5}, {"machine": {"gpus": 5}}, {"machine": {"gpus": [{}]}}, {"earlier": 5}, {"earlier": [5]},
     {"earlier": [{"machine": {"gpus": 5}}]}],
)  # fmt: skip
def test_an_environment_of_another_kind_is_damage(experiment: Path, environment: dict[str, Any]) -> None:
    (experiment / "faster" / "seed_1" / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(
        CheckpointError, match=r"seed_1/environment\.json: expected a machine with its gpus, and earlier"
    ):
        read([experiment])


def test_a_sitting_before_that_was_made_alike_is_no_difference(experiment: Path, write_run: Any) -> None:
    cell = experiment / "faster" / "seed_1"
    os.rename(cell, experiment / "before")
    alike = {**RunFolder(experiment / "before").recorded("environment.json"), "gptlab": "0.1.0", "threads": 7}
    earlier = [{"until_step": 9, **alike, "machine": {**alike["machine"], "cores": 99}}]
    write_run(cell, 2.9, seed=1, options=OPTIONS["faster"], environment={"earlier": earlier})
    assert read([experiment]).undeclared == ()


@pytest.mark.parametrize("declared", ["n_layer = 3", "weight_decay = 0.2", 'dtype = "bf16"', 'patch = "idea.diff"'])
def test_what_an_arm_declares_is_what_is_compared(experiment: Path, write_run: Any, declared: str) -> None:
    key, value = declared.split(" = ")
    options = {} if key == "patch" else {key: json.loads(value)}
    environment = {"dtype": "bf16"} if key == "dtype" else {}
    config = {"patch": "abc"} if key == "patch" else {}
    for seed in (1, 2, 3):
        cell = experiment / "other" / f"seed_{seed}"
        write_run(cell, 3.2, seed=seed, options=options, environment=environment, config=config)
    with (experiment / "experiment.toml").open("a") as file:
        file.write(f"[arms.other]\n{declared}\n")
    assert read([experiment]).undeclared == ()


def test_a_users_signal_brings_its_code_and_is_the_same_for_every_seed(experiment: Path, write_run: Any) -> None:
    for seed, code in ((1, "abc"), (2, "abc"), (3, "def")):
        options = {"signal.name": "idea.py:mine"}
        cell = experiment / "mine" / f"seed_{seed}"
        write_run(cell, 2.9, seed=seed, options=options, dose=0.3, config={"code": {"idea.py": code}})
    with (experiment / "experiment.toml").open("a") as file:
        file.write("[arms.mine]\nsignal.name = 'idea.py:mine'\n")
    (found,) = read([experiment]).undeclared
    assert found.startswith(f"{cell}: software code: expected {{'idea.py': 'abc'}} as in")
    (alone,) = read([*sorted(experiment.glob("mine/*")), *experiment.glob("plain/*")]).undeclared
    assert "software code" in alone


def test_threads_folders_and_shards_prepared_since_are_no_difference(experiment: Path, write_run: Any) -> None:
    cell = experiment / "sure" / "seed_1"
    os.rename(cell, experiment / "before")
    environment = {"threads": 1, "device": "cpu:0"}
    data = {"train": ["1" * 64], "complete": False}
    write_run(cell, 2.9, options=OPTIONS["sure"], dose=0.3, environment=environment, data=data)
    assert read([experiment]).undeclared == ()


def test_a_seed_that_was_not_declared_does_not_count(experiment: Path, write_run: Any) -> None:
    extra = write_run(experiment / "sure" / "seed_9", 1.0, seed=9, options=OPTIONS["sure"])
    outcomes = read([experiment])
    assert set(outcomes.losses["sure"]) == {1, 2, 3}
    assert outcomes.notes == (f"{extra}: seed 9 was not declared",)


def test_an_arm_of_several_signals_is_an_arm_with_a_signal(experiment: Path) -> None:
    several = "[[arms.both.signal]]\nname = 'confidence'\n[[arms.both.signal]]\nname = 'entropy'\n"
    (experiment / "experiment.toml").write_text(EXPERIMENT + several)
    outcomes = read([experiment])
    assert outcomes.arguments["signals"] == ["sure", "both"]
    assert outcomes.verdicts()["arms"]["both"]["reason"].startswith("0 of the 3 declared seeds")


def test_runs_by_themselves_become_arms_by_their_options(tmp_path: Path, write_run: Any) -> None:
    sure = {"signal.name": "confidence", "signal.weight": 0.0}
    runs = [write_run(tmp_path / f"{s}", 2.9, seed=s, options=sure) for s in (1, 2)]
    runs += [write_run(tmp_path / f"plain {s}", 3.0 + s / 10, seed=s) for s in (1, 2)]
    outcomes = read(runs)
    assert list(outcomes.losses) == ["baseline", "confidence, signal.weight=0.0"]
    assert outcomes.losses["baseline"] == {1: 3.1, 2: 3.2}
    assert outcomes.verdicts()["arms"]["confidence, signal.weight=0.0"]["verdict"] == "inactive"
    turned = read(runs, baseline=str(runs[0]))
    assert list(turned.losses) == ["baseline", "none, signal.weight=None"]


def test_runs_by_themselves_share_data_and_model(tmp_path: Path, write_run: Any) -> None:
    runs = [write_run(tmp_path / "a", 3.0), write_run(tmp_path / "b", 2.9, options={"n_layer": 6, "grad_clip": 2.0})]
    assert [line.partition(": ")[2].partition(":")[0] for line in read(runs).undeclared] == ["option n_layer"]


def test_losses_are_taken_at_one_step(experiment: Path) -> None:
    assert read([experiment], step=10).losses["plain"][1] == pytest.approx(4.002)
    with pytest.raises(DataError, match=r"--step 15: .* has no validation loss there; steps that all have: 10, 20"):
        read([experiment], step=15)
    metrics = experiment / "faster" / "seed_1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('{"step": 20, "kind": "val"', '{"step": 20, "kind": "eval"'))
    assert read([experiment]).step == 10


def test_a_last_line_cut_off_by_a_kill_is_left_out(experiment: Path) -> None:
    run = experiment / "plain" / "seed_1"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "ki')
    assert read_run(run).last_step == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name =", "not a TOML file"),
        (EXPERIMENT.replace('"plain"', '"plane"'), "baseline: no arm 'plane'; did you mean 'plain'"),
        (EXPERIMENT + "[groups]\n", None),
        (EXPERIMENT.replace("seeds = [1, 2, 3]", ""), "either seeds or looks, found neither"),
        (EXPERIMENT.replace("delta", "looks = [2, 3]\ndelta"), "either seeds or looks, found both"),
    ],
)
def test_an_experiment_file_that_cannot_be_read_is_refused(experiment: Path, text: str, message: str | None) -> None:
    (experiment / "experiment.toml").write_text(text)
    if message is None:
        assert read([experiment]).verdicts()["arms"]
        return
    with pytest.raises(ConfigError, match=message):
        read([experiment])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "found no config.json"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
        (lambda run: (run / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda run: (run / "config.json").write_text("{}"), "expected a JSON object with options"),
        (lambda run: (run / "config.json").write_text('{"options": {}}'), "a run's options with its seed"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1: expected a row with step and kind"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "line 1: expected a row with step and kind"),
    ],
)
def test_a_damaged_run_is_refused(experiment: Path, broken: Any, message: str) -> None:
    run = experiment / "plain" / "seed_1"
    broken(run)
    with pytest.raises(CheckpointError, match=message):
        read([run])


def with_figure(folder: Path, name: str, values: dict[str, float]) -> None:
    """Write a figure into the validations of an experiment's cells: `values` by arm, and the noise of the seed."""
    for arm, value in values.items():
        for file in (folder / arm).glob("seed_*/metrics.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            figure = value + NOISE[int(file.parent.name[5:])] * value
            rows = [{**row, name: figure} if row["kind"] == "val" else row for row in rows]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


GAINS = {"plain": 0.4, "sure": 0.55, "sure-placebo": 0.41, "faster": 0.3}
DECLARED = {
    "metric = 'truth_probability'": ("truth_probability", "probability"),
    "metric = 'share_of_wins'\nbetter = 'higher'": ("share_of_wins", ""),
}


@pytest.mark.parametrize("declared", DECLARED)
def test_the_declared_metric_is_what_is_judged(experiment: Path, declared: str) -> None:
    name, unit = DECLARED[declared]
    with_figure(experiment, name, GAINS)
    (experiment / "experiment.toml").write_text(EXPERIMENT.replace("delta", f"{declared}\ndelta"))
    outcomes = read([experiment])
    result = outcomes.verdicts()
    found = {arm: v["verdict"] for arm, v in result["arms"].items()}
    assert found == {"sure": "better", "sure-placebo": "no difference", "faster": "worse"}
    assert (result["metric"], result["better"], result["unit"]) == (name, "higher", unit)
    assert result["arms"]["sure"]["difference"] == pytest.approx(0.15, abs=1e-3)
    assert outcomes.curves["plain"][1] == {10: pytest.approx(0.4), 20: pytest.approx(0.4)}
    title = next(tables(result)).title
    assert f"{name.replace('_', ' ')} minus its baseline's{unit and ', ' + unit}, paired by seed" in title
    drawn = page(outcomes, result, {})
    assert f"Validation {name.replace('_', ' ')}" in drawn
    assert "higher is better" in drawn
    assert "nats" not in " ".join(re.findall("<figcaption>.*?</figcaption>", drawn))


def test_a_metric_that_no_run_has_is_refused_with_those_that_there_are(experiment: Path) -> None:
    with_figure(experiment, "accuracy", GAINS)
    (experiment / "experiment.toml").write_text(
        EXPERIMENT.replace("delta", "metric = 'acuracy'\nbetter='lower'\ndelta")
    )
    with pytest.raises(ConfigError, match=r"no figure 'acuracy'; .* 'accuracy'\?; the runs have accuracy, loss"):
        read([experiment])


ROWS = [(step, 3 - step / 100 + d + seed / 1000, arm, seed)
        for arm, d in (("adam", 0.0), ("mine", -0.2)) for seed in (1, 2) for step in (10, 20)]  # fmt: skip


def log(path: Path, rows: list[tuple[Any, ...]]) -> Outcomes:
    names = ("step", "loss", "arm", "seed")
    if path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [(*names, "note"), *[(*r, "x") for r in rows]]))
    else:
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return read([path])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_other_trainers_logs_are_read(tmp_path: Path, suffix: str) -> None:
    outcomes = log(tmp_path / f"log{suffix}", ROWS)
    assert (outcomes.step, list(outcomes.losses)) == (20, ["adam", "mine"])
    assert outcomes.losses["mine"] == pytest.approx({1: 2.601, 2: 2.602})
    assert outcomes.verdicts()["arms"]["mine"]["difference"] == pytest.approx(-0.2)


@pytest.mark.parametrize("lost", ["", "nan", "inf"])
def test_a_log_with_a_loss_that_is_no_number_is_a_run_that_diverged(tmp_path: Path, lost: str) -> None:
    outcomes = log(tmp_path / "log.csv", [*ROWS[:-1], (20, lost, "mine", 2)])
    assert outcomes.losses["mine"] == {1: pytest.approx(2.601), 2: None}
    assert outcomes.notes == ("mine, seed 2 has no finite loss",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected rows with step, loss, arm, seed, found none"),
        ([("ten", 1.0, "a", 1)], "line 2: expected numbers in step, loss and seed, found step='ten'"),
        ([ROWS[0], ROWS[0]], "line 3: adam with seed 1 has a loss at step 10 already"),
        ([(10, 1.0, "a", 1), (20, 1.0, "b", 1)], "a step at which every run was validated, found none"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(tmp_path: Path, rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        log(tmp_path / "log.csv", rows)


def table(path: Path, *losses: tuple[str, int, float]) -> Path:
    rows = [f"20,{loss},{arm},{seed}" for arm, seed, loss in losses]
    path.write_text("\n".join(["step,loss,arm,seed", *rows]))
    return path


FIVE = [("base", seed, 3 + seed / 50) for seed in range(1, 6)]


def test_an_arm_of_a_log_that_lacks_seeds_gets_no_verdict_and_they_are_named(tmp_path: Path) -> None:
    three = [("three", seed, loss - 0.5 + seed / 1000) for _, seed, loss in FIVE[:3]]
    whole = [("whole", seed, loss - 0.5 + seed / 1000) for _, seed, loss in FIVE]
    path = table(tmp_path / "log.csv", *FIVE, *three, *whole)
    arms = read([path]).verdicts()["arms"]
    assert {arm: found["verdict"] for arm, found in arms.items()} == {"three": "undecided", "whole": "better"}
    assert "3 of the 5 declared seeds are there, seeds 4, 5 of it missing" in arms["three"]["reason"]
    assert (arms["three"]["n"], arms["three"]["seeds_missing"], arms["three"]["more_seeds"]) == (3, [4, 5], 2)
    declared = read([path], seeds=[1, 2, 3])
    assert {found["verdict"] for found in declared.verdicts()["arms"].values()} == {"better"}
    assert declared.notes[:2] == ("base: seed 4 was not declared", "base: seed 5 was not declared")


def test_a_baseline_that_lacks_seeds_is_no_baseline_for_a_verdict(tmp_path: Path) -> None:
    more = [("more", seed, 2.5 + seed / 50) for seed in range(1, 8)]
    found = read([table(tmp_path / "log.csv", *FIVE, *more)]).verdicts()["arms"]["more"]
    assert (found["verdict"], found["seeds_missing"]) == ("undecided", [6, 7])
    assert "seeds 6, 7 of its baseline missing" in found["reason"]


def test_runs_by_themselves_that_lack_seeds_get_no_verdict(tmp_path: Path, write_run: Any) -> None:
    runs = [write_run(tmp_path / f"p{s}", 3.0 + s / 10, seed=s) for s in (1, 2, 3)]
    runs += [write_run(tmp_path / f"f{s}", 2.0 + s / 11, seed=s, options={"grad_clip": 2.0}) for s in (1, 3)]
    (found,) = read(runs).verdicts()["arms"].values()
    assert (found["verdict"], found["seeds_missing"]) == ("undecided", [2])
    (found,) = read(runs, seeds=[1, 3]).verdicts()["arms"].values()
    assert found["verdict"] == "better"
    with pytest.raises(ConfigError, match="--seeds: expected seeds that the runs have"):
        read(runs, seeds=[9])


@pytest.mark.parametrize("arm", ["same", "base"])
def test_equal_losses_on_all_seeds_are_one_run_and_refused(tmp_path: Path, arm: str) -> None:
    copies = [("same", seed, 2.75) for seed in range(1, 6)]
    rows = [(name, seed, 3.5 if name == arm == "base" else loss) for name, seed, loss in (*FIVE, *copies)]
    with pytest.raises(ConfigError, match=f"^{arm}: expected another loss with each seed, found .* with all 5"):
        read([table(tmp_path / "log.csv", *rows)]).verdicts()


def test_seeds_of_a_log_may_agree_by_rounding(tmp_path: Path) -> None:
    rounded = [("a", 1, 2.75), ("a", 2, 2.75), ("a", 3, 2.76), ("a", 4, 2.77), ("a", 5, 2.75)]
    assert read([table(tmp_path / "log.csv", *FIVE, *rounded)]).verdicts()["arms"]["a"]["verdict"] == "better"


def test_a_run_given_twice_is_refused(experiment: Path, tmp_path: Path, write_run: Any) -> None:
    cell = experiment / "faster"
    with pytest.raises(ConfigError, match=r"expected one run a seed, found .* of seed 1; leave one out"):
        read([cell / "seed_1", cell / "seed_1", experiment / "plain" / "seed_1"])
    shutil.copytree(cell / "seed_1", cell / "seed_7")  # a copy under another seed's name
    with pytest.raises(ConfigError, match=r"faster: expected one run a seed, found .* of seed 1"):
        read([experiment])
    shutil.rmtree(cell / "seed_7")


def test_a_copy_of_a_run_under_another_seed_is_refused(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "copy")
    config = json.loads((finished_run / "config.json").read_text())
    rewrite(tmp_path / "copy" / "config.json", options={**config["options"], "seed": 2})
    with pytest.raises(ConfigError, match=r"expected runs of their own, found .*copy to be a copy of"):
        read([finished_run, tmp_path / "copy"])


def test_a_log_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "run": "a"}\n')
    with pytest.raises(DataError, match="found no arm among step, loss, run"):
        read([tmp_path / "log.jsonl"])


TABLES = {
    "results.tsv": "commit\tval_bpb\tstatus\n" + "".join(f"{a}\t{x}\tkeep\n" for a, x in (
        ("base", 1.012), ("base", 1.015), ("base", 1.011), ("idea", 0.95), ("idea", 0.953))) + "idea\t0.0\tcrash\n",
    "log.csv": "iter,name,val_loss\n" + "".join(f"{s},{a},{x}\n" for s in (1, 9) for a, x in (
        ("base", 1.012), ("base", 1.015), ("base", 1.011), ("idea", 0.95), ("idea", 0.953), ("idea", "nan"))),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_seeds_is_compared_unpaired(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    outcomes = read([tmp_path / name], baseline="base")
    result = outcomes.verdicts()
    assert outcomes.losses["idea"] == {"run 1": 0.95, "run 2": 0.953, "run 3": None}
    assert (result["metric"], result["unit"]) == (("val_bpb", "bits a byte") if "tsv" in name else ("val_loss", "nats"))


TEXT_LOGS = {
    "nanoGPT": "step {}: train loss 2.5, val loss {}\niter 10: loss 2.4, time 5ms, mfu 1%\n",
    "modded-nanogpt": "print(f'step:{{step}}/20 val_loss:{{x}}')\nstep:{}/20 val_loss:{} train_time:9ms step_avg:1ms\n",
    "llm.c": "s:{0} trl:2.5 lr:0.01\ns:{0} tel:{1}\n",
    "build-nanogpt": "{0} train 2.5\n{0} hella 0.25\n{0} val {1}\n",
}


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("trainer", TEXT_LOGS)
def test_text_logs_of_other_trainers_are_read_by_their_lines(tmp_path: Path, trainer: str, seeded: bool) -> None:
    for arm, shift in (("adam", 0.0), ("mine", -0.2)):
        (tmp_path / arm).mkdir()
        for k, noise in enumerate((0.01, 0.02, 0.0, 0.013), 1):
            name = f"{arm}_seed{k}.log" if seeded else f"{arm}-{k * len(arm)}-{'abcd'[k - 1]}.txt"
            lines = "".join(TEXT_LOGS[trainer].format(s, round(3.5 - s / 20 + shift + noise, 4)) for s in (10, 20))
            (tmp_path / arm / name).write_text("code and its comments\n" + lines)
    outcomes = read([tmp_path / "adam", tmp_path / "mine"], baseline="adam")
    found = outcomes.verdicts()["arms"]["mine"]
    assert (outcomes.step, found["verdict"], found["paired"]) == (20, "better", seeded)
    assert found["difference"] == pytest.approx(-0.2)
    named = [f"plain={tmp_path / 'adam'}", *(f"new={file}" for file in (tmp_path / "mine").iterdir())]
    assert list(read(named, baseline="plain").losses) == ["plain", "new"]


SEVERAL = {
    "runs": ([(0, 9.0), (10, 3.5), (20, 3.1), (0, 9.0), (10, 3.6), (20, 3.2)], [3.1, 3.2]),
    "a run that was resumed": ([(0, 9.0), (10, 3.5), (10, 3.5), (20, 3.1)], [3.1]),
    "one started again before its end": ([(0, 9.0), (10, 3.5), (0, 9.0), (10, 3.4), (20, 3.0)], [3.0]),
    "runs and one that was cut off": ([(5, 4.0), (20, 3.1), (5, 4.1), (20, 3.2), (5, 4.2)], [3.1, 3.2]),
}


@pytest.mark.parametrize("trainer", TEXT_LOGS)
@pytest.mark.parametrize("case", SEVERAL)
def test_a_text_log_that_begins_again_holds_several_runs(tmp_path: Path, case: str, trainer: str) -> None:
    rows, ends = SEVERAL[case]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x_seed7.txt").write_text("".join(TEXT_LOGS[trainer].format(*row) for row in rows))
    outcomes = read([tmp_path / "a"])
    assert outcomes.step == 20
    assert list(outcomes.losses["a"].values()) == ends
    expected = [7] if len(ends) == 1 else ["x_seed7.txt, run 1", "x_seed7.txt, run 2"]
    assert list(outcomes.losses["a"]) == expected


@pytest.mark.parametrize("folders", [("seed_1", "seed_2"), ("x/seed1", "x/seed2"), ("first", "second")])
def test_text_logs_of_one_name_are_those_of_their_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    for k, name in enumerate(folders):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "log.txt").write_text(f"10 val {2.5 + k}\n")
    found = read([f"a={tmp_path / name / 'log.txt'}" for name in folders]).losses["a"]
    assert list(found) == ([1, 2] if "seed" in folders[0] else ["first/log.txt", "second/log.txt"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/x.log": "step 1: nothing"}, "expected lines with losses of validation as nanoGPT, "),
        ({"a/x.log": "10 val 2.5", "a/y.log": "val_bpb: 1.5"}, "expected one figure in all logs, found loss in"),
        ({"a/x_seed3.log": "10 val 2.5", "a/y_seed3.log": "10 val 2.6"}, "found a second one of a with 3"),
        ({"a/x_seed3.log": "10 val 2.71828182", "a/y.log": "10 val 2.71828182", "b/z.log": "10 val 1.5"},
         "the same ones with 3 and y.log"),
    ],
)  # fmt: skip
def test_text_logs_that_say_nothing_or_one_thing_twice_are_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    with pytest.raises((ConfigError, DataError), match=message):
        read(sorted({str((tmp_path / name).parent) for name in files})).verdicts()


def started(folder: Path, text: str = EXPERIMENT) -> None:
    """Record the declaration as a runner does whose first cell is about to begin."""
    experiment = experiment_from(text, folder / "experiment.toml")
    with tempfile.TemporaryDirectory() as empty:
        keep_declaration(experiment, Path(empty))
        shutil.copy(Path(empty) / DECLARATION, folder)


CHANGED = {
    "delta": ("delta = 0.02", "delta = 0.2", "delta: declared 0.02 on 2"),
    "no delta": ("delta = 0.02", "", "delta: declared 0.02 on 2.*, found None"),
    "seeds": ("seeds = [1, 2, 3]", "seeds = [1, 2]", r"seeds: declared \[1, 2, 3\] on"),
    "looks": ("seeds = [1, 2, 3]", "looks = [2, 3]", r"looks: declared None on .*, found \[2, 3\]"),
    "an arm": ("learning_rate = 0.002", "learning_rate = 0.003", "arms.faster: declared .*0.002.* found .*0.003"),
    "an arm less": ("[arms.faster]\nlearning_rate = 0.002", "", "arms.faster: declared .*, found None"),
    "the metric": ("delta", "metric = 'loss'\nbetter = 'higher'\ndelta", "better: declared None on .*, found 'higher'"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_was_declared_is_what_counts(experiment: Path, change: str) -> None:
    old, new, message = CHANGED[change]
    started(experiment)
    outcomes = read([experiment])
    assert outcomes.undeclared == ()
    assert re.match("declared on 20.*, SHA-256 [0-9a-f]{16}$", outcomes.declared)
    (experiment / "experiment.toml").write_text(EXPERIMENT.replace(old, new))
    assert re.search(message, "\n".join(read([experiment]).undeclared))
    assert main(["verify", str(experiment), "--json"]) == 3
    changed = experiment_from((experiment / "experiment.toml").read_text(), experiment / "experiment.toml")
    keep_declaration(changed, experiment)  # starting it again does not make it the declared one
    assert re.search(message, "\n".join(read([experiment]).undeclared))


def test_an_arm_that_is_added_later_has_its_date_and_a_forged_record_is_found(experiment: Path) -> None:
    started(experiment, EXPERIMENT.replace("[arms.faster]\nlearning_rate = 0.002", ""))
    keep_declaration(experiment_from(EXPERIMENT, experiment / "experiment.toml"), experiment)
    outcomes = read([experiment])
    assert outcomes.undeclared == ()
    assert "; faster was added on 20" in outcomes.declared
    file = experiment / DECLARATION
    file.write_text(file.read_text().replace("0.02", "0.2"))
    assert "its content is not what its checksum says" in read([experiment]).undeclared[0]
    file.unlink()
    keep_declaration(experiment_from(EXPERIMENT, experiment / "experiment.toml"), experiment)
    assert not file.exists(), "a date of today would say too much of runs that are there"


@pytest.mark.parametrize("edit", [("3.002", "2.002"), ('"kind": "train", "loss"', '"kind": "train", "lost"')])
def test_rows_that_were_edited_after_the_end_are_named(experiment: Path, edit: tuple[str, str]) -> None:
    run = experiment / "plain" / "seed_1"
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["rows_sha256"] = rows_sha256(rows)
    clock = [{**row, "mfu": 0.5} if row["kind"] == "train" else row for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in clock))
    assert read([experiment]).undeclared == ()
    file.write_text(file.read_text().replace(*edit))
    assert "its rows are not those that the run ended with" in read([experiment]).undeclared[0]
    assert main(["verify", str(run), "--json"]) == 3


def test_seeds_that_begin_alike_are_refused(experiment: Path) -> None:
    for seed in (1, 2, 3):
        file = experiment / "plain" / f"seed_{seed}" / "metrics.jsonl"
        first = {"step": 1, "kind": "train", "loss": 5.5, "grad_norm": 1.25 + (seed == 1)}
        file.write_text(json.dumps(first) + "\n" + file.read_text())
    with pytest.raises(ConfigError, match=r"other initial weights and data .*plain/seed_3 to be that of"):
        read([experiment])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_steps_saved_are_where_the_baselines_end_is_reached(paired: bool, better: str) -> None:
    sign = 1 if better == "lower" else -1
    steps = range(0, 101, 10)
    baseline = {k: {s: sign * (3 - 0.01 * s + 0.001 * k) for s in steps} for k in range(5)}
    twice = {k + 10 * (not paired): {s: sign * (3 - 0.02 * s + 0.001 * k) for s in steps} for k in range(5)}
    found = steps_saved(twice, baseline, 100, paired=paired, better=better)
    assert found
    assert found["value"] == pytest.approx(50)
    low, high = found["interval"]
    assert low <= 50 <= high
    assert (high - low < 1e-6) == paired, "what seeds share cancels in pairs"
    back = steps_saved(baseline, twice, 100, paired=paired, better=better)
    assert back
    assert back["value"] == pytest.approx(-50)
    assert steps_saved({1: {100: 1.0}, 2: {100: 1.0}}, baseline, 100, paired=paired, better=better) is None


def test_a_run_from_before_an_option_existed_had_its_default(experiment: Path) -> None:
    config = json.loads((file := experiment / "faster" / "seed_1" / "config.json").read_text())
    del config["options"]["weight_decay"]
    file.write_text(json.dumps(config))
    assert read([experiment]).undeclared == ()
