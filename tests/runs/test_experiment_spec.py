"""Experiment files: read as declared, refused by name of key; the ready ones train."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.cli.main import main
from gptlab.data.shards import write_shard
from gptlab.errors import ConfigError
from gptlab.options import LARGEST_SIZES, build, check_size
from gptlab.runs.cells import cells_of
from gptlab.runs.experiment_spec import COUNTS, Arm, Experiment, as_toml, find_experiment, read_experiment
from gptlab.training.config import TrainingConfig, flops_per_token

READY = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
GOOD = """
name = "tried"
preset = "shakespeare-tiny"
baseline = "plain"
seeds = [3, 1]
delta = 0.02
[options]
steps = 20
[arms.plain]
[arms.sure]
signal.name = "confidence"
signal.layers = [1, 2]
[arms.wide]
n_embd = 256
"""


def read(folder: Path, text: str) -> Experiment:
    (folder / "x.toml").write_text(text)
    return read_experiment(folder / "x.toml")


def test_a_file_is_read_as_declared(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert (found.name, found.baseline, found.delta, found.looks) == ("tried", "plain", 0.02, None)
    assert found.arms["sure"] == Arm(
        "sure", {"steps": 20, "signal.name": "confidence", "signal.layers": (1, 2)}, patch=None
    )
    assert found.folder == Path("log/tried")
    cells = cells_of(found, Path("x"))
    names = [cell.name for cell in cells]
    assert names == ["plain/seed_3", "sure/seed_3", "wide/seed_3", "plain/seed_1", "sure/seed_1", "wide/seed_1"]
    assert [(c.steps, c.n_embd) for c in cells[:3]] == [(20, 128), (20, 128), (20, 256)]
    assert [c.name for c in cells_of(found, Path("x"), seeds=1)] == names[:3]


def test_a_placebo_takes_the_norms_of_the_arm_that_it_is_the_placebo_of(tmp_path: Path) -> None:
    placebo = "\n[arms.{}]\nsignal = {{name = 'confidence', layers = {}, control = 'placebo'}}\n"
    text = GOOD + placebo.format("same", "[1, 2]") + placebo.format("other", "[1]")
    assert read(tmp_path, text).replayed == {}, "on its own model, unless the file says otherwise"
    found = read(tmp_path, text.replace("delta", "placebo_match = 'gradient'\ndelta"))
    assert (found.placebo_match, found.replayed) == ("gradient", {"same": "sure"})
    turned = text + placebo.format("turned", "[1, 2]").replace("'placebo'", "'placebo', rotation = 2")
    found = read(tmp_path, turned.replace("delta", "placebo_match = 'gradient'\ndelta"))
    assert found.replayed == {"same": "sure", "turned": "sure"}
    muon = text.replace("delta", "placebo_match = 'update'\ndelta").replace(
        "steps = 20", "steps = 20\noptimizer = 'muon'"
    )
    with pytest.raises(ConfigError, match=r"\[arms.same\] signal.placebo_match update compares steps of adamw"):
        read(tmp_path, muon)


def test_looks_are_seeds_up_to_the_last(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD.replace("seeds = [3, 1]", "looks = [2, 4]"))
    assert (found.seeds, found.looks) == ((1, 2, 3, 4), (2, 4))


def test_a_baseline_may_have_seeds_of_its_own_that_nothing_else_uses(tmp_path: Path) -> None:
    text = GOOD.replace("delta", "baseline_seeds = 4\ndelta") + "[tune]\nseeds = [101]\n"
    found = read(tmp_path, text)
    assert (found.seeds, found.further) == ((3, 1), (102, 103))
    cells = [cell.name for cell in cells_of(found, Path("x"))]
    assert cells[-3:] == ["wide/seed_1", "plain/seed_102", "plain/seed_103"]
    assert len(cells) == 8
    assert len(cells_of(found, Path("x"), seeds=1)) == 3, "to try an arm takes none of them"


MANY_ARMS = "".join(f"[arms.a{k}]\nweight_decay = {k}\n" for k in range(5_001)) + "[arms.sure]"
CELLS = "".join(f"arms.b{k}.weight_decay = {k}\n" for k in range(5))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tried"', "", "name: expected text, found nothing"),
        ('name = "tried"', 'name = "../x"', "name: expected a name for a folder"),
        ("delta", "dleta", "unknown key 'dleta'; did you mean 'delta'"),
        ("delta = 0.02", "delta = -1", "delta: expected a number in the metric's unit, at least 0, found -1"),
        ("delta = 0.02", f"delta = {10**400}", "delta: expected a number"),
        ("delta = 0.02", "delta = nan", "delta: expected a number"),
        ("delta", "metric = 3\ndelta", "metric: expected text, found 3"),
        ("delta", "metric = 'wins'\ndelta", "better: expected .* for the metric 'wins', found None"),
        ("delta", "better = 'more'\ndelta", "better: expected .* for the metric 'loss', found 'more'"),
        ("delta", "baseline_seeds = 1\ndelta", "in all, from the arms' 2 to 10,000, found 1"),
        ("delta", "baseline_seeds = true\ndelta", "from the arms' 2 to 10,000, found True"),
        ("delta = 0.02", "delta = true", "delta: expected a number"),
        ("tiny", "tyni", "unknown preset 'shakespeare-tyni'; did you mean 'shakespeare-tiny'"),
        ('"plain"', '"plian"', "baseline: no arm 'plian'; did you mean 'plain'.; there are plain, sure, wide"),
        ("steps = 20", "stpes = 20", r"\[options\] unknown key 'stpes'; did you mean 'steps'"),
        ("steps = 20", 'steps = "many"', r"\[options\] steps: expected a whole number, found 'many'"),
        ("steps = 20", "seed = 20", r"\[options\] seed is the experiment's to set: give seeds"),
        ("n_embd = 256", "n_embdd = 256", r"\[arms.wide\] unknown key 'n_embdd'; did you mean 'n_embd'"),
        ("n_embd = 256", "n_embd = 250", r"\[arms.wide\] n_embd must be a multiple of n_head 4"),
        ("n_embd = 256", 'out = "x"', r"\[arms.wide\] out is the experiment's to set: give it as --out"),
        ("n_embd = 256", 'patch = "no.diff"', r"\[arms.wide\] patch: expected a file at .*no.diff, found none"),
        ("n_embd = 256", "patch = 3", "patch: expected text, found 3"),
        ("n_embd = 256", "", "'plain' and 'wide' are the same; .* init_jitter"),
        ("confidence", "confidense", r"\[arms.sure\] unknown signal 'confidense'; did you mean 'confidence'"),
        ("[1, 2]", "[4]", r"\[arms.sure\] signal.layers lists judges 1 to 3"),
        ("[arms.plain]", '[arms."a/b"]', r"arms: expected \[arms.NAME\] of letters"),
        ("seeds = [3, 1]", "", "either seeds or looks, found neither"),
        ("seeds = [3, 1]", "seeds = [1]\nlooks = [2]", "either seeds or looks, found both"),
        ("[3, 1]", "[]", "seeds: expected a list of whole numbers"),
        ("[3, 1]", "[1, true]", "seeds: expected a list of whole numbers"),
        ("[3, 1]", "[1, 1]", "seeds: expected each seed once"),
        ("seeds = [3, 1]", "looks = [5, 3]", "looks: expected rising numbers of seeds"),
        ("seeds = [3, 1]", "looks = [1, 3]", "looks: expected the first at 2 seeds or more"),
        ("delta = 0.02", "options = 3\n", None),
        ("[arms.plain]", '[groups]\na = ["plain", "sure"]\n[arms.plain]', "every arm in one group, found 'wide' in 0"),
        ("[arms.plain]", '[groups]\na = ["plain", "sur"]\n[arms.plain]', "no arm 'sur'; did you mean 'sure'"),
        ("[arms.plain]", '[groups]\na = "plain"\n[arms.plain]', "a: expected a list of at least two arms"),
        ("[arms.plain]", '[groups]\na = ["sure", "plain", "wide"]\n[arms.plain]', "'plain' first, found 'sure'"),
        ("[arms.plain]", "[tune]\n[arms.plain]", r"\[tune\] seeds: expected a list of whole numbers .*, found None"),
        ("[arms.plain]", "[tune]\nseeds = [2, 3]\n[arms.plain]", "seeds: 3 of the verdict's seeds; .*103, 104"),
        ("seeds = [3, 1]", "looks = [2, 5]\ntune.seeds = [4, 9]", r"\[tune\] seeds: 4 of the verdict's seeds"),
        ("[arms.plain]", "[tune]\nseeds = [7, 7]\n[arms.plain]", r"\[tune\] seeds: expected each seed once"),
        ("[arms.plain]", "[tune]\nseed = [7]\n[arms.plain]", r"\[tune\] unknown key 'seed'; did you mean 'seeds'"),
        ("delta", "placebo_match = 'same'\ndelta", "placebo_match: expected one of 'same'"),
        ("delta", "placebo_match = 3\ndelta", "placebo_match: expected text, found 3"),
        ("delta", "placebo_match = 'update'\ndelta", "found none; add one, or leave placebo_match out"),
        ("delta", "tune = 3\ndelta", r"tune: expected a table \[tune\], found 3"),
        ("delta", "tune = {seeds = [7], dose = [0]}\ndelta", r"dose: expected a list of factors above 0, .* \[0\]"),
        ("delta", "tune = {seeds = [7], dose = []}\ndelta", "dose: expected a list of factors above 0"),
        ("delta", "tune = {seeds = [7], learning_rate = [1, nan]}\ndelta", "learning_rate: expected a list"),
        ("delta", "tune = {seeds = [7], learning_rate = [1, true]}\ndelta", "learning_rate: expected a list"),
        ("delta", "tune = {seeds = [7], learning_rate = [2, 1, 2]}\ndelta", "factors that differ by 1% or more"),
        ("delta", "tune = {seeds = [7], learning_rate = [1]}\ndelta", "at least 2 factors, found 1; an arm without"),
        ("delta", "tune = {seeds = [7], learning_rate = [1, 1.02], dose = [1, 2]}\ndelta", "4 trials do not fit"),
        ("[arms.sure]", "arms.sure", "not a TOML file"),
        ("seeds = [3, 1]", "looks = [2, 300000000]", "looks: expected at most 10,000 seeds, found 300,000,000"),
        ("seeds = [3, 1]", f"looks = [2, {10**30}]", "looks: expected a list of whole numbers"),
        ("seeds = [3, 1]", f"seeds = {list(range(10_001))}", "seeds: expected at most 10,000 seeds, found 10,001"),
        ("seeds = [3, 1]", f"seeds = {list(range(300_000))}", "expected at most 1 MB, found 2 MB"),
        ("seeds = [3, 1]", f"seeds = [1, {2**63}]", "seeds: expected a list of whole numbers"),
        ("[arms.sure]", MANY_ARMS, "expected at most 1,000 arms and 50,000 cells, .* found 5,004 and 10,008"),
        ("seeds = [3, 1]", "looks = [2, 9999]\n" + CELLS, "50,000 cells, .* found 8 and 79,992"),
        ("delta", "tune = {seeds = [7], learning_rate = [1, 1e300]}\ndelta", "learning_rate: expected a list .* up to"),
        ("delta", f"tune = {{seeds = [7], dose = {list(range(1, 60))}}}\ndelta", "dose: expected a list .* at most 50"),
        ("n_embd = 256", f"n_layer = {10**9}", r"\[arms.wide\] n_layer must be at most 10000"),
        ("n_embd = 256", f"steps = {10**30}", r"\[arms.wide\] steps: expected a whole number"),
        ("n_embd = 256", f"n_embd = {'9' * 5000}", "not a TOML file"),
        ("n_embd = 256", f"min_lr = {10**400}", r"\[arms.wide\] min_lr: expected a number"),
        ('name = "tried"', f'name = "{"x" * 101}"', "name: expected a name for a folder"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_run_is_refused(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message or "x.toml") as raised:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(raised.value).startswith(str(tmp_path / "x.toml"))
    assert "\n" not in str(raised.value).partition(" is not a TOML file")[0]


TOO_LARGE = [
    *((key, most + 1) for key, most in LARGEST_SIZES.items() if key != "vocab_size"),
    ("n_embd", 10**12), ("n_head", 10**12), ("block_size", 10**12), ("steps", 10**18), ("n_layer", 2**63 - 1),
]  # fmt: skip
PATCHED = 'patch = "idea.diff"\n'
"""What only the patched code knows is not bounded; what is counted with here is."""


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [(where, *too_large) for where in ("[options]", "[arms.plain]") for too_large in TOO_LARGE]
    + [(f"[arms.idea]\n{PATCHED}", key, value) for key, value in TOO_LARGE if key in COUNTS],
)
def test_a_size_that_nobody_can_train_is_refused_in_one_line(tmp_path: Path, where: str, key: str, value: int) -> None:
    (tmp_path / "idea.diff").write_text("")
    text = GOOD.replace("steps = 20\n", "") + f"[arms.idea]\n{PATCHED}"
    with pytest.raises(ConfigError, match=rf"{key} must be at most {LARGEST_SIZES[key]}, found {value}$") as raised:
        read(tmp_path, text.replace(where, f"{where}\n{key} = {value}\n", 1))
    assert "\n" not in str(raised.value)


def test_the_largest_sizes_are_options_and_may_be_asked_for() -> None:
    config = TrainingConfig()
    for key, most in LARGEST_SIZES.items():
        if key != "vocab_size":
            check_size(key, most)
            assert getattr(config, key) <= most


def test_a_file_with_one_arm_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least one other arm .* found 1"):
        read(tmp_path, GOOD.partition("[arms.sure]")[0])
    with pytest.raises(ConfigError, match=r"expected an experiment file at .*none.toml, found none"):
        read_experiment(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "learning_rate": 1e-06, "data": 'a "b" \\ ä', "compile": "off", "share_blocks": True},
        {"signal.name": "entropy", "signal.weight": None, "signal.layers": (1, 2)},
        {"steps": 3, "signal.name": "entropy", "also": ({"name": "brier", "weight": 0.5}, {"name": "collision"})},
    ],
)
def test_options_written_for_train_are_read_as_they_were(tmp_path: Path, options: dict[str, Any]) -> None:
    from gptlab.cli.arguments import file_options

    (tmp_path / "x.toml").write_text(as_toml(options), encoding="utf-8")
    assert build(TrainingConfig, file_options(tmp_path / "x.toml", TrainingConfig)) == build(TrainingConfig, options)


def corpus_of_gpt2_tokens(folder: Path) -> Path:
    """A corpus of GPT-2's vocabulary, of tokens in no order."""
    folder.mkdir()
    (folder / "tokenizer.txt").write_text("gpt2\n")
    tokens = np.arange(4096, dtype=np.uint16) * 11 % 50257
    for name in ("tokens_train_000001.bin", "tokens_val_000000.bin"):
        write_shard(folder / name, tokens)
    return folder


TRAINED: list[dict[str, Any]] = []
"""What arms of ready experiments, as small as they are here, differ in: many are another's again."""


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_experiment_trains_in_every_arm(path: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Its quick variant: a tiny model for four updates, in this process."""
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    assert path.read_text().startswith("# "), "it says what it asks, and how long it takes"
    blocks = 4 if any("also" in arm.options for arm in experiment.arms.values()) else 2  # judges 1 to 3, one by one
    quick = {"data": str(tiny_corpus), "steps": 4, "n_layer": blocks, "n_head": 2, "n_embd": 32, "block_size": 16,
             "batch_size": 4, "total_batch_tokens": 64, "eval_tokens": 512, "checkpoint_every": 0,
             "dose_every": 2, "threads": 1}  # fmt: skip
    if experiment.arms[experiment.baseline].options.get("tokenizer") == "gpt2":
        quick["data"] = str(corpus_of_gpt2_tokens(tmp_path / "tokens"))
    if "init_from" in experiment.arms[experiment.baseline].options:
        (tmp_path / "prior.toml").write_text(as_toml({"preset": experiment.preset, **quick, "checkpoint_every": 4}))
        assert main(["train", "--config", str(tmp_path / "prior.toml"), "--out", str(tmp_path / "prior")]) == 0
        quick["init_from"] = str(tmp_path / "prior")
    for arm in experiment.arms.values():
        differs = {key: value for key, value in arm.options.items() if key not in quick}
        if differs in TRAINED:
            continue
        TRAINED.append(differs)
        file = tmp_path / f"{arm.name}.toml"
        begins = {"signal.start": 1} if "signal.start" in arm.options else {}
        file.write_text(as_toml({"preset": experiment.preset, **arm.options, **quick, **begins}))
        code = ["--allow_code"] if ".py:" in arm.options.get("signal.name", "") else []
        assert main(["train", "--config", str(file), "--out", str(tmp_path / arm.name), "--json", *code]) == 0
        last = json.loads((tmp_path / arm.name / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["event"], math.isfinite(last["loss"])) == ("finished", True)


def test_the_ready_experiments_are_the_ones_promised() -> None:
    found = {path.stem: read_experiment(path) for path in READY}
    assert {"1_noise", "aa", "dose", "dose_response", "gates", "supervised"} <= found.keys()
    assert len(found["aa"].seeds) == 64
    signals = {arm.options.get("signal.name") for arm in found["1_noise"].arms.values()}
    assert signals == {None, "confidence", "negated_cross_entropy", "negative_self_cross_entropy",
                       "negative_deep_supervision"}  # fmt: skip
    for name in ("1_noise", "dose"):
        arms = {key: arm.options for key, arm in found[name].arms.items()}
        for key, options in arms.items():
            if "signal.name" in options and options.get("signal.weight") != 0 and "signal.control" not in options:
                assert {**options, "signal.control": "placebo"} in arms.values(), f"{name}: {key} has no placebo"
    dose = found["dose"].arms.values()
    assert {arm.options["signal.dose"] for arm in dose if "signal.name" in arm.options} == {0.1}


@pytest.mark.parametrize("named", ["first_look", "first_look.toml", "experiments/first_look.toml"])
def test_a_ready_experiment_is_found_by_its_name(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_experiment(named)
    assert found.is_absolute()
    assert read_experiment(found).name == "first_look"


@pytest.mark.parametrize("named", ["first_look.json", "mine/first_look.toml", "/first_look", "../first_look", "mine"])
def test_another_path_stands_for_itself(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_experiment(named) == Path(named)
    (tmp_path / "first_look").mkdir()
    assert find_experiment("first_look") == Path("first_look"), "what lies there comes first"


def test_judges_arithmetic_is_counted() -> None:
    """12·C² weights a block: 6 FLOPs each for plain training, 2 more for a frozen judge's input gradient."""
    plain = build(TrainingConfig, {"n_layer": 3, "n_embd": 8, "n_head": 2, "block_size": 4, "total_batch_tokens": 4})

    def flops(**signal: Any) -> float:
        options = {f"signal.{key}": value for key, value in signal.items()}
        shape = {"n_layer": 3, "n_embd": 8, "n_head": 2, "block_size": 4, "total_batch_tokens": 4}
        return flops_per_token(build(TrainingConfig, {**shape, **options}))

    base = 6 * (3 * 12 * 64 + 256 * 8) + 3 * 12 * 8 * 4
    assert flops_per_token(plain) == base == flops(name="confidence", weight=0.0)
    block, reading = 2 * 12 * 64 + 8 * 8 * 4, 4 * 256 * 8
    assert flops(name="confidence") == base + 2 * (block + reading)
    assert flops(name="confidence", layers="rotate") == base + block + reading
    assert flops(name="confidence", evaluator="live") == base + 2 * (block + 24 * 64 + 6 * 256 * 8)
    assert flops(name="confidence", control="placebo") == base + 2 * (block + reading) + 2 / 3 * base
    assert tomllib.loads(as_toml({"a": 1})) == {"a": 1}
