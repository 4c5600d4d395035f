"""Options: text and TOML values become the field's own type, or a refusal; and the command that repeats a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import pytest

from gptlab.analysis.load import read
from gptlab.cli.arguments import Parser, add_options, given_options
from gptlab.cli.train import resolve
from gptlab.errors import ConfigError
from gptlab.options import Option, build, flatten, flatten_table, option, options_of, typed
from gptlab.runs.archive import read_pack
from gptlab.runs.experiment_spec import experiment_from, read_experiment
from gptlab.runs.folder import RunFolder
from gptlab.runs.session import made_elsewhere, repeated_by
from gptlab.training.config import FREE_ON_RESUME, TrainingConfig
from gptlab.training.presets import PRESETS, RUNGS, command_of, preset_options


@dataclass(frozen=True)
class Inner:
    name: str = option("none", "a choice", choices=["none", "some"])
    layers: str | tuple[int, ...] = option("all", "all or a list")


@dataclass(frozen=True)
class Outer:
    steps: int = option(5, "how many", unit="updates", group="Run")
    rate: float = option(0.5, "how fast", shown="half")
    on: bool = option(True, "whether")
    limit: float | None = option(None, "at most")
    mode: Literal["fast", "slow"] = option("fast", "how")
    inner: Inner = field(default_factory=Inner)


OPTIONS: dict[str, Option] = {o.key: o for o in options_of(Outer)}


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("steps", "12", 12), ("steps", "1_000", 1000), ("steps", "-3", -3), ("steps", 7, 7), ("steps", 1e3, 1000),
        ("rate", "1e-3", 0.001), ("rate", 2, 2.0), ("rate", "3", 3.0),
        ("on", "true", True), ("on", "Off", False), ("on", "0", False), ("on", "yes", True), ("on", False, False),
        ("limit", "none", None), ("limit", "None", None), ("limit", "1.5", 1.5), ("limit", 2, 2.0),
        ("mode", "slow", "slow"), ("inner.name", "some", "some"),
        ("inner.layers", "all", "all"), ("inner.layers", "1,3", (1, 3)), ("inner.layers", "2", (2,)),
        ("inner.layers", [1, 2], (1, 2)), ("inner.layers", 4, (4,)),
    ],
)  # fmt: skip
def test_a_value_takes_its_own_type(key: str, given: Any, expected: Any) -> None:
    found = typed(OPTIONS[key], given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("steps", "many", "steps: expected a whole number, found 'many'"),
        ("steps", "1.5", "steps: expected a whole number, found '1.5'"),
        ("steps", 1.5, "steps: expected a whole number, found 1.5"),
        ("steps", True, "steps: expected a whole number, found True"),
        ("steps", "", "steps: expected a whole number, found ''"),
        ("steps", float("nan"), "steps: expected a whole number, found nan"),
        ("steps", float("inf"), "steps: expected a whole number, found inf"),
        ("rate", "fast", "rate: expected a number, found 'fast'"),
        ("rate", "nan", "rate: expected a number, found 'nan'"),
        ("rate", "-inf", "rate: expected a number, found '-inf'"),
        ("rate", [1], r"rate: expected a number, found \[1\]"),
        ("rate", 10**400, "rate: expected a number, found 1000"),
        ("on", "maybe", "on: expected true or false, found 'maybe'"),
        ("on", 1, "on: expected true or false, found 1"),
        ("limit", "all", "limit: expected .*a number.*, found 'all'"),
        ("mode", "slo", "mode: expected one of fast, slow, found 'slo'; did you mean 'slow'"),
        ("inner.name", "sme", "inner.name: expected one of none, some, found 'sme'; did you mean 'some'"),
        ("inner.layers", [], r"inner.layers: expected .*, found \[\]"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(key: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(OPTIONS[key], given)


def test_options_come_in_order_with_default_and_unit() -> None:
    assert list(OPTIONS) == ["steps", "rate", "on", "limit", "mode", "inner.name", "inner.layers"]
    assert (OPTIONS["steps"].unit, OPTIONS["steps"].group, OPTIONS["rate"].group) == ("updates", "Run", "Run")
    assert [OPTIONS[key].default_shown for key in ("steps", "rate", "on", "limit")] == ["5", "half", "true", "none"]
    assert OPTIONS["mode"].choices == ("fast", "slow")


def test_build_and_flatten_are_inverse() -> None:
    values = {"steps": 1, "on": False, "inner.name": "some", "inner.layers": (1, 2)}
    config = build(Outer, values)
    assert config == Outer(steps=1, on=False, inner=Inner("some", (1, 2)))
    assert flatten(config) == {
        "steps": 1, "rate": 0.5, "on": False, "limit": None, "mode": "fast", "inner.name": "some",
        "inner.layers": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(("key", "nearest"), [("stepz", "steps"), ("inner.nme", "inner.name")])
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{key}'; did you mean '{nearest}'"):
        build(Outer, {key: 1})


def test_tables_become_dotted_keys_and_dashes_underscores() -> None:
    assert flatten_table({"a-b": {"c-d": 1, "e": {"f": 2}}, "g": [1]}) == {"a_b.c_d": 1, "a_b.e.f": 2, "g": [1]}


BASE = {**PRESETS["shakespeare-tiny-v1"], "signal.name": "deep_supervision"}
OTHERS: dict[str, tuple[Any, ...]] = {
    "preset": ("gpt2-124m", "ladder"), "depth": (2, 4), "out": ("x",),
    "seed": (0, 7), "resume": ("never", "must"), "init_from": ("x",),
    "init_jitter": (0.1,), "data": ("x",), "tokenizer": ("gpt2",), "block_size": (1, 48, 4096), "batch_size": (1, 999),
    "total_batch_tokens": (128, 2176), "n_layer": (1, 2, 48), "n_head": (1, 3, 128), "n_embd": (4, 129, 768),
    "share_blocks": (True,), "steps": (1, 99_999), "optimizer": ("muon",), "beta1": (0.0,), "beta2": (0.0, 0.99),
    "learning_rate": (0.0, 1e-5, 9.0),
    "min_lr": (0.0, 1e-3, 2e-3), "warmup_steps": (0, 99_999), "schedule": ("wsd", "constant"), "weight_decay": (0.0,),
    "grad_clip": (0.0,), "gradient_noise": (0.5,), "gradient_noise_shape": ("batch",), "gradient_bias": (0.5,),
    "dropout": (0.5,), "target_flip": (0.5,), "target_flip_to": ("argmax",), "log_every": (0, 1), "eval_every": (0, 1),
    "eval_tokens": (1, 128),
    "checkpoint_every": (0, 1), "sample_every": (0, 1), "dose_every": (0, 1), "dose_first": (0, 1),
    "log": ("tensorboard",), "log_project": ("x",), "log_name": ("x",),
    "noise_every": (0, 5), "device": ("cpu",), "dtype": ("bf16",), "threads": (2,), "compile": ("on",),
    "parallel": ("fsdp",), "activation_checkpointing": (True,), "deterministic": (True,), "rank_timeout": (1,),
    "signal.name": ("none", "gated_confidence", "advantage"), "signal.weight": (0.0, -1.0), "signal.dose": (0.0, 0.5),
    "signal.layers": ("rotate", (1,), (3,)), "signal.positions": (0.001,), "signal.evaluator": ("live",),
    "signal.reach": ("local",), "signal.embeddings": (False,), "signal.threshold": (0.1, 1.0),
    "signal.start": (1, 700), "signal.anneal": (0, 99_999), "signal.control": ("placebo", "shuffled", "flipped"),
    "signal.placebo_of": ("x",), "signal.placebo_match": ("update",), "signal.rotation": (1, 2),
    "signal.flip": (0.0, 0.5),
    "signal.flip_to": ("argmax",), "signal.say": (2, 9), "signal.reply": (3,), "signal.samples": (1, 9),
    "signal.turns": (1, 99), "signal.advantage": ("signed", "raw"), "signal.exact": (True,),
    "signal.listener": ("self", "frozen:log/earlier"),
}  # fmt: skip
"""Values of every option that are legal for some value of the others."""
BOUND = (
    ("depth", "preset"), ("total_batch_tokens", "block_size"), ("eval_tokens", "block_size"), ("n_embd", "n_head"),
    ("min_lr", "learning_rate"), ("min_lr", "schedule"), ("deterministic", "threads"),
    ("parallel", "optimizer"), ("parallel", "deterministic"), ("parallel", "noise_every"),
    ("n_layer", "signal.name"), ("signal.layers", "n_layer"), ("signal.start", "steps"),
    ("signal.weight", "signal.dose"), ("signal.flip", "signal.control"), ("signal.flip_to", "signal.control"),
    ("signal.placebo_of", "signal.control"), ("signal.placebo_match", "signal.placebo_of"),
    ("signal.placebo_match", "optimizer"), ("signal.rotation", "signal.control"),
    *((f"signal.{name}", "signal.name") for name in ("say", "reply", "samples", "turns", "advantage", "exact",
                                                                        "listener")),
)  # fmt: skip
"""The pairs of options that can contradict each other, which is said in one line that names both."""


def refusal(values: dict[str, Any]) -> str:
    """What is said against these options; "" where they can be run."""
    try:
        build(TrainingConfig, {**BASE, **values})
    except ConfigError as error:
        return str(error)
    return ""


def test_every_option_has_other_values_here() -> None:
    assert list(OTHERS) == [o.key for o in sorted(options_of(TrainingConfig), key=lambda o: list(OTHERS).index(o.key))]


def test_of_all_pairs_of_options_only_the_known_ones_contradict_each_other() -> None:
    """An option that is refused next to another's default is bound to that; every other pair is its own."""
    bound = {frozenset(pair) for pair in BOUND}
    alone = {(key, value): refusal({key: value}) for key, values in OTHERS.items() for value in values}
    for a, b in combinations(OTHERS, 2):
        for x, y in product(OTHERS[a], OTHERS[b]):
            if alone[a, x] or alone[b, y]:
                continue
            said = refusal({a: x, b: y})
            assert not said or frozenset((a, b)) in bound, f"{a} {x}, {b} {y}: {said}"
    for (key, value), said in alone.items():
        assert not said or any(key in pair for pair in bound), f"{key} {value}: {said}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_lr": 1.0, "learning_rate": 0.001}, "min_lr learning_rate 0.001 1.0"),
        ({"min_lr": 2e-3, "schedule": "wsd"}, "min_lr learning_rate wsd"),
        ({"n_embd": 100, "n_head": 3}, "n_embd n_head"),
        ({"n_head": 256}, "n_embd n_head"),
        ({"total_batch_tokens": 100}, "total_batch_tokens block_size try 128"),
        ({"block_size": 4096}, "total_batch_tokens block_size"),
        ({"eval_tokens": 127}, "eval_tokens block_size 128 127"),
        ({"n_layer": 1}, "n_layer signal"),
        ({"signal.layers": (1, 4)}, "signal.layers judges 1 to 3 4"),
        ({"signal.layers": (0,)}, "signal.layers judges 0"),
        ({"signal.layers": (3,), "n_layer": 3}, "signal.layers 3"),
        ({"signal.start": 700}, "signal.start steps 700 never"),
        ({"signal.start": 5, "steps": 5}, "signal.start steps never"),
        ({"signal.weight": 0.0, "signal.dose": 0.1}, "signal.weight signal.dose"),
        ({"signal.flip": 0.5}, "signal.flip signal.control flipped"),
        ({"signal.flip_to": "argmax", "signal.control": "placebo"}, "signal.flip_to signal.control placebo"),
        ({"signal.threshold": 0.0}, "signal.threshold above 0"),
        ({"signal.threshold": 1.5}, "signal.threshold at most 1"),
        ({"signal.positions": 0.0}, "signal.positions above 0"),
        ({"deterministic": True}, "deterministic threads"),
        ({"parallel": "fsdp", "optimizer": "muon"}, "muon fsdp"),
        ({"also": [{"name": "confidence", "layers": (9,)}]}, "signal.layers 9"),
        ({"also": [{"name": "confidence", "start": 900}]}, "signal.start steps confidence"),
    ],
)
def test_options_that_contradict_each_other_are_refused_together(values: dict[str, Any], words: str) -> None:
    said = refusal(values)
    assert said, values
    assert [word for word in words.split() if word not in said] == [], said
    assert "\n" not in said


@pytest.mark.parametrize(
    "values",
    [
        {"min_lr": 0.001, "learning_rate": 0.001},
        {"min_lr": 1.0, "schedule": "constant"},
        {"min_lr": 0.0, "learning_rate": 0.0},
        {"warmup_steps": 10_000, "steps": 1},
        {"warmup_steps": 699, "schedule": "wsd"},
        {"batch_size": 10_000},
        {"eval_tokens": 128},
        {"signal.start": 699},
        {"signal.start": 10, "signal.anneal": 10_000},
        {"signal.weight": -1.0, "signal.dose": 0.1},
        {"signal.weight": 0.0},
        {"signal.layers": (1,), "signal.embeddings": False},
        {"signal.layers": "rotate", "signal.embeddings": False},
        {"signal.flip": 0.5, "signal.control": "flipped", "signal.flip_to": "argmax"},
        {"signal.name": "none", "signal.flip": 0.5, "signal.start": 9_999, "signal.layers": (40,), "n_layer": 1},
        {"target_flip_to": "argmax"},
    ],
)
def test_options_without_effect_are_no_contradiction(values: dict[str, Any]) -> None:
    assert refusal(values) == ""


@pytest.mark.parametrize("key", ["signal.name", "log", "steps", "signal.layers", "x" * 100])
def test_what_was_found_is_quoted_in_few_words(key: str) -> None:
    long = "y" * 3_000_000
    with pytest.raises(ConfigError) as error:
        build(TrainingConfig, {k: typed(o, long) for k, o in OPTIONS_OF_RUNS.items() if k == key} or {long: 1})
    assert len(str(error.value)) < 600


OPTIONS_OF_RUNS = {o.key: o for o in options_of(TrainingConfig)}


def test_the_recipe_of_the_findings_stays_as_it_was() -> None:
    usual = flatten(build(TrainingConfig, PRESETS["shakespeare-tiny-v1"]))
    found = {key: usual[key] for key in usual if not key.startswith("signal.")}
    assert found == {
        "preset": "shakespeare-tiny", "depth": None, "out": None, "seed": 1, "resume": "auto",
        "init_from": None, "init_jitter": 0.0,
        "data": "shakespeare", "tokenizer": "bytes", "block_size": 128, "batch_size": 16, "total_batch_tokens": 2048,
        "n_layer": 4, "n_head": 4, "n_embd": 128, "share_blocks": False, "steps": 700, "optimizer": "adamw", "beta1":
        0.9, "beta2": 0.95, "learning_rate": 1e-3, "min_lr": None, "warmup_steps": 50, "schedule": "cosine",
        "weight_decay": 0.1, "grad_clip": 1.0, "dropout": 0.0, "gradient_noise": 0.0,
        "gradient_noise_shape": "isotropic", "gradient_bias": 0.0, "target_flip": 0.0, "target_flip_to": "uniform",
        "also": [], "log_every": 10, "eval_every": 100, "eval_tokens": 131072, "checkpoint_every": 100, "sample_every":
        350, "dose_every": 50, "dose_first": 100,
        "log": "none", "log_project": "gptlab", "log_name": "", "noise_every": 0,
        "device": "auto", "dtype": "auto", "threads": 0,
        "compile": "auto", "parallel": "ddp", "activation_checkpointing": False, "deterministic": False, "rank_timeout":
        600,
    }  # fmt: skip


@pytest.mark.parametrize("pack", sorted((Path(__file__).parents[1] / "docs" / "findings").glob("*.json.gz")), ids=str)
def test_what_a_pack_was_made_with_is_what_its_preset_says_now(pack: Path) -> None:
    packed = read_pack(pack)
    experiment = experiment_from(packed.text, pack)
    for cell in packed.cells:
        arm = experiment.arms[cell.arm].options
        match = experiment.placebo_match
        replay = {"signal.placebo_of": "RUN", "signal.placebo_match": match} if cell.arm in experiment.replayed else {}
        tuned = packed.tuning["arms"][cell.arm]["options"] if packed.tuning else {}
        usual = flatten(build(TrainingConfig, {**preset_options(experiment.preset, arm), **arm, **tuned, **replay}))
        made = cell.run.config["options"]
        differ = {key for key in usual.keys() & made.keys() if json.loads(json.dumps(usual[key])) != made[key]}
        assert differ <= FREE_ON_RESUME | {"preset", "seed", "also"}, f"{cell.name}: {differ}"


@pytest.mark.parametrize("depth", RUNGS)
def test_a_rung_of_the_ladder_has_twenty_tokens_a_parameter_or_four_epochs(depth: int) -> None:
    config = resolve({"preset": "ladder", "depth": depth}, 0)
    assert (config.n_layer, config.shape.n_embd % config.n_head, config.folder) == (
        depth,
        0,
        f"log/ladder-{depth}-none-1",
    )
    tokens = config.steps * config.total_batch_tokens
    epochs = tokens / 4_557_580  # of Shakespeare
    assert tokens / config.shape.parameters == pytest.approx(20, rel=0.01) or epochs == pytest.approx(4, rel=0.01)
    assert depth > 4 or tokens / config.shape.parameters > 19.8
    assert config.weight_decay * config.learning_rate * config.steps == pytest.approx(1, rel=0.05)
    assert resolve({"preset": "ladder", "depth": depth, "n_embd": 8 * depth}, 0).n_embd == 8 * depth


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "ladder", "depth": 5}, "depth 2, 3, 4, 6, 8 5"),
        ({"preset": "ladder", "depth": 0}, "depth 2, 3, 4, 6, 8 0"),
        ({"preset": "ladder", "depth": -2}, "depth 2, 3, 4, 6, 8 -2"),
        ({"preset": "shakespeare-tiny", "depth": 2}, "depth ladder shakespeare-tiny --n_layer"),
        ({"depth": 4}, "depth ladder --n_layer"),
    ],
)
def test_a_depth_that_chooses_no_rung_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(values, 0)
    assert all(word in str(refused.value) for word in words.split())


def test_an_experiment_may_have_several_rungs() -> None:
    path = Path(__file__).parents[1] / "experiments" / "ladder.toml"
    found = read_experiment(path)
    assert [found.arms[arm].count("n_layer", found.preset) for arm in ("two", "four-half")] == [2, 4]
    steps = [found.arms[arm].count("steps", found.preset) for arm in ("two", "two-twice", "four", "four-half")]
    assert steps[0] == steps[1] < steps[2] == steps[3]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "gpt2-124m", "seed": 7, "learning_rate": 3e-4, "out": "my runs/it's one"},
        {"preset": "ladder", "depth": 4, "share_blocks": True},
        {"preset": "notes-124m", "share_blocks": False, "min_lr": 0.0, "resume": "must"},
        {"signal.name": "confidence", "signal.weight": -0.5, "signal.layers": [1, 2], "signal.anneal": 10},
        {"signal.name": "gated_confidence", "signal.dose": 0.25, "signal.control": "placebo", "steps": 3},
        {"signal.name": "/some where/idea.py:mine", "target_flip": 0.125},
    ],
)
def test_the_recorded_command_makes_the_same_config(values: dict[str, Any]) -> None:
    config = resolve(values, 0)
    program, command, *words = shlex.split(command_of(config))
    assert (program, command) == ("gptlab", "train")
    parser = Parser(prog="gptlab train")
    parser.add_argument("--allow_code", action="store_true")
    add_options(parser, TrainingConfig)
    parsed = parser.parse(words)
    assert flatten(resolve(given_options(parsed, TrainingConfig), 0)) == flatten(config) | {"resume": "auto"}
    assert parsed.allow_code == config.signal.is_code


def test_a_run_records_the_commit_of_a_clone_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = repeated_by(TrainingConfig())
    assert found["command"].startswith("gptlab train --preset ")
    monkeypatch.setattr("gptlab.runs.session.package", lambda: tmp_path / "gptlab")
    assert repeated_by(TrainingConfig()).keys() == {"command"}  # installed: in no clone
    (tmp_path / ".git").mkdir()
    assert repeated_by(TrainingConfig()).keys() == {"command"}  # no repository, and nothing is lost


def test_runs_that_differ_in_commit_and_command_alone_are_one_recipe(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    runs = []
    for arm, signal in (("a", "none"), ("b", "confidence")):
        for seed in (1, 2):
            made = {"commit": f"{seed}{arm}" * 8, "command": f"gptlab train --seed {seed} --out {arm}"}
            options = {"signal.name": signal}
            runs.append(
                write_run(tmp_path / f"{arm}{seed}", 2.0 + seed / 9, seed=seed, options=options, environment=made)
            )
    outcomes = read(runs)
    assert outcomes.undeclared == ()
    assert {arm: len(found) for arm, found in outcomes.losses.items()} == {"baseline": 2, "confidence": 2}
    folder, before = RunFolder(runs[0]), json.loads((runs[0] / "environment.json").read_text())
    version = json.loads((runs[0] / "config.json").read_text()).get("gptlab")
    monkey = {**before, "commit": "another", "command": "another"}
    assert made_elsewhere(folder, {**monkey, "gptlab": version}, 5).keys() <= {"earlier"}
    changed = made_elsewhere(folder, {**monkey, "torch": "0.0"}, 5)
    assert changed["earlier"][0]["torch"] == before["torch"]
