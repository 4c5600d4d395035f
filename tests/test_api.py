"""The Python API: what `import gptlab` offers, without a command line, and what it says of wrong use."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import TINY

import gptlab
from gptlab import api
from gptlab.analysis.report.run import write_run
from gptlab.analysis.run import listed, read_run
from gptlab.cli.compare import main as compare_command
from gptlab.cli.main import main
from gptlab.errors import CheckpointError, ConfigError, DataError
from gptlab.interpret.generate import TextModel
from gptlab.model import GPT, GPTConfig
from gptlab.runs.folder import RunFolder
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training import TrainingConfig, backward

ROOT = Path(__file__).parents[1]


def margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """z_2 - z_1"""
    first, second = logits.topk(2, 1).values.unbind(1)
    return second - first


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options(tiny_corpus: Path) -> dict[str, Any]:
    return {**TINY, "data": tiny_corpus}


def test_importing_it_is_fast_and_its_names_are_there_for_completion() -> None:
    script = (
        "import sys, gptlab; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'train', 'load', 'compare', 'record', 'signals'} <= set(dir(gptlab)); gptlab.compare; gptlab.record; "
        "gptlab.signals.entropy; assert 'torch' not in sys.modules; "
        "print(all(hasattr(gptlab, name) for name in gptlab.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("True\n", "")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gptlab.trian  # noqa: B018


def test_windows_is_refused_in_one_line() -> None:
    script = "import sys; sys.platform = 'win32'; import gptlab"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("gptlab: expected Linux or macOS, found Windows; use WSL")
    assert done.stderr.count("\n") == 1


PUBLIC = re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
HERE = ["train", "load", "compare", "record", "Comparison", "Recorder", "TextModel"]
"""Names whose examples are run below; pytest runs the others where they stand."""


def test_every_public_name_has_an_example() -> None:
    assert set(gptlab.__all__) <= {name for _, name in PUBLIC} | {"signals"}
    assert {name for module, name in PUBLIC if module == "gptlab.api"} < set(HERE)
    documented = [getattr(importlib.import_module(module), name) for module, name in PUBLIC]
    for public in [*documented, gptlab.signals]:
        (found,) = doctest.DocTestFinder(recurse=False).find(public, "example")
        assert found.examples, public


@pytest.mark.parametrize("name", HERE)
def test_an_example_runs(name: str, here: Path, options: dict[str, Any]) -> None:
    """As they stand in the documents, but for a model and a corpus that are small."""
    small = {**options, "sample_every": 0}
    names = {"gptlab": _Small(small), "torch": torch}
    public = TextModel if name == "TextModel" else getattr(api, name)
    examples = doctest.DocTestFinder(recurse=False).find(public, f"gptlab.{name}", globs=names)
    assert examples[0].examples
    if name in ("load", "TextModel"):
        gptlab.train(small, out="runs/a", quiet=True, steps=1, checkpoint_every=1)
    said = io.StringIO()
    assert doctest.DocTestRunner().run(examples[0], out=said.write).failed == 0, said.getvalue()


class _Small:
    """gptlab, whose `train` trains something small."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __getattr__(self, name: str) -> Any:
        if name == "train":
            return lambda **more: gptlab.train(self._options, **more)
        return getattr(gptlab, name)


FORMS: dict[str, Callable[[dict[str, Any], Path], gptlab.api.Run]] = {
    "named": lambda o, out: gptlab.train(**o, out=out, signal="confidence", quiet=True),
    "dotted": lambda o, out: gptlab.train({**o, "out": out, "signal.name": "confidence"}, quiet=True),
    "nested": lambda o, out: gptlab.train({**o, "signal": {"name": "confidence"}}, out=str(out), quiet=True),
    "config": lambda o, out: gptlab.train(o, out=out, signal=SignalConfig("confidence"), quiet=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_options_may_be_given_in_any_form_and_give_one_run(form: str, here: Path, options: dict[str, Any]) -> None:
    found = FORMS[form](options, here / "run")
    assert found.finished
    assert found.has_signal
    assert found.loss is not None
    assert len(repr(found)) < 1000
    again = FORMS["dotted"](options, here / "run")  # a finished run of equal options gives itself
    assert again.losses == found.losses


def test_a_toml_file_and_a_config_are_options_too(here: Path, options: dict[str, Any]) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**options, "data": str(options["data"])}.items()]
    (here / "run.toml").write_text("\n".join([*lines, "signal.name = 'entropy'"]))
    found = gptlab.train(here / "run.toml", steps=2, out="a", quiet=True)
    assert (found.last_step, found.options["signal.name"]) == (2, "entropy")
    config = TrainingConfig(**{**options, "data": str(options["data"]), "steps": 2, "out": "b"})
    assert gptlab.train(config, quiet=True).last_step == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"steps": "many"}, "steps: expected a whole number"),
        ({"signal": "confidense"}, "did you mean 'confidence'"),
        ({"signal": 3}, "a signal's name or a function"),
        ({"signal": lambda z, y: z}, "define it with def"),
        ({"signal": {"nam": "confidence"}}, "unknown key 'signal.nam'"),
        ({"signal": "idea.py:margin"}, "allow_code"),
        ({"preset": "gpt5"}, "unknown preset"),
        ({"log": "wandbb"}, "wandb"),
    ],
)
def test_wrong_options_are_errors_of_one_line(wrong: dict[str, Any], said: str, here: Path) -> None:
    with pytest.raises(gptlab.errors.GptlabError, match=said) as error:
        gptlab.train(wrong, quiet=True)
    assert "\n" not in str(error.value)
    assert not list(here.iterdir())


def test_a_function_is_a_signal_wherever_a_name_is_one(here: Path, options: dict[str, Any]) -> None:
    model = GPT(GPTConfig(8, 16, 2, 2, 16))
    tokens = torch.arange(16).view(2, 8)
    found = backward(model, tokens, tokens, SignalConfig(margin, weight=1.0)).signal_loss  # type: ignore[arg-type]
    model.zero_grad()
    named = backward(model, tokens, tokens, SignalConfig(f"{__file__}:margin", weight=1.0)).signal_loss
    assert found == named != 0
    run = gptlab.train(options, signal=margin, out="run", quiet=True)
    assert run.options["signal.name"].endswith("test_api.py:margin")
    assert next(iter(run.config["code"].values())) == gptlab.signals.registry.file_hash(f"{__file__}:margin")
    placebo = gptlab.train(options, signal=SignalConfig(margin, control="placebo"), out="placebo", quiet=True)  # type: ignore[arg-type]
    assert placebo.dose == pytest.approx(run.dose, rel=0.5)


def test_a_function_without_a_file_trains_too_and_another_is_refused(here: Path, options: dict[str, Any]) -> None:
    def of_notebook(source: str) -> Any:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(source, names)
        return names["idea"]

    first, second = (of_notebook(f"def idea(z, y):\n    return {k} * z.logsumexp(1)") for k in (1, 2))
    assert gptlab.train(options, signal=first, out="run", quiet=True).finished
    assert gptlab.train(options, signal=first, out="run", quiet=True).finished
    with pytest.raises(CheckpointError, match="a signal's file has changed"):
        gptlab.train(options, signal=second, out="run", quiet=True)


@pytest.mark.parametrize("name", [name for name, signal in SIGNALS.items() if signal.needs])
@pytest.mark.parametrize("other", [None, torch.zeros(3, 4), torch.zeros(2, 5)])
def test_a_signal_that_needs_another_block_says_so(name: str, other: torch.Tensor | None) -> None:
    z, y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match=f"{name} reads the (previous|final) block.*other="):
        getattr(gptlab.signals, name)(z, y, other=other)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["confidence", "advantage"])
def test_a_signal_says_what_shapes_it_takes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expected logits \(n, V\)"):
        gptlab.signals.SIGNALS[name](torch.zeros(shape), torch.zeros(2, dtype=torch.long))


def test_a_model_is_loaded_from_whatever_names_it_and_writes_text(finished_run: Path, here: Path) -> None:
    model = gptlab.load(finished_run, device="cpu")
    assert isinstance(model, GPT)
    assert isinstance(model, TextModel)
    text = model.generate("line 1", max_new_tokens=8, seed=3)
    assert text == gptlab.load(read_run(finished_run), device="cpu").generate("line 1", 8, seed=3)
    assert text != model.generate("line 1", max_new_tokens=8, seed=4)
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, model.config.vocab_size)
    assert main(["export", str(finished_run), "hf"]) == 0
    assert gptlab.load("hf", device="cpu").generate("line 1", 8, seed=3) == text
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_new_tokens": -1}):
        with pytest.raises(ConfigError, match="expected max_new_tokens"):
            model.generate("a", **wrong)
    with pytest.raises(CheckpointError, match="expected a run or a checkpoint"):
        gptlab.load("nowhere")


LOSSES = {
    "baseline": {seed: 3 + seed / 100 for seed in range(5)},
    "<b>|a": {seed: 2.5 + seed / 90 for seed in range(5)},
}


def test_a_comparison_prints_shows_and_is_plain_values() -> None:
    found = gptlab.compare(LOSSES, delta=0.01)
    assert found["<b>|a"]["verdict"] == "better"
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "<b>|a" in str(found)
    assert "better" in repr(found)
    shown = found._repr_html_()
    assert "&lt;b&gt;|a" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize(
    ("sources", "said"),
    [((), "found nothing"), (("nowhere",), "found nothing"), (({"a": {1: 2.0}}, {"b": {1: 2.0}}), "alone"),
     ((ROOT / "docs/findings/1_noise.json.gz",), "declares its baseline"), ((3,), "expected runs"),
     (([1, 2],), "expected runs")],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line(sources: tuple[Any, ...], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        gptlab.compare(*sources, delta=0.1)


def test_in_a_notebook_the_text_is_returned_and_not_shown_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    before = str(gptlab.compare(LOSSES, delta=0.01))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(gptlab.compare(LOSSES, delta=0.01)) == before


def test_a_packed_finding_is_compared_by_its_path() -> None:
    found = gptlab.compare(ROOT / "docs/findings/1_noise.json.gz")
    assert found["confidence"]["verdict"] == "worse"


@pytest.fixture
def trials(here: Path) -> Path:
    for arm, gain in (("baseline", 0.0), ("mine", 0.1)):
        for seed in (1, 2, 3):
            with gptlab.record(f"trials/{arm}/{seed}", seed=seed, arm=arm, lr=0.1 * (1 + gain)) as log:
                for step in range(0, 30, 10):
                    log(step, loss=torch.tensor(3 + seed / 100 - gain * step), train_loss=3.0, accuracy=0.5)
    return here / "trials"


def test_a_recorded_trainer_is_read_by_every_reader(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_run(trials / "mine" / "1")
    assert (run.finished, run.last_step, run.seed) == (True, 20, 1)
    assert compare_command([str(trials), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "baseline"
    assert found["arms"]["mine"]["verdict"] == "better"
    assert found["arms"]["mine"]["difference"] == pytest.approx(-2.0)
    assert gptlab.compare(trials, baseline="mine")["baseline"]["verdict"] == "worse"
    assert gptlab.compare(trials, metric="accuracy")["mine"]["verdict"] == "no difference"
    assert main(["runs", str(trials), "--each"]) == 0
    assert "mine/1" in capsys.readouterr().out
    assert "of another trainer" in write_run(trials / "mine" / "1").read_text()
    assert listed(trials, trials / "mine" / "1").figures["state"] == "finished"
    assert compare_command([str(trials)]) == 0


def test_runs_of_an_arm_that_differ_in_more_than_the_seed_are_refused(trials: Path) -> None:
    with gptlab.record(trials / "mine" / "4", seed=4, arm="mine", lr=0.5) as log:
        log(20, loss=1.0)
    with pytest.raises(ConfigError, match="option lr"):
        gptlab.compare(trials)


def test_a_loss_that_is_not_finite_ends_the_block_as_diverged(here: Path) -> None:
    reached = []
    with gptlab.record("run", seed=1) as log:
        log(1, loss=2.0)
        log(2, loss=float("nan"))
        reached.append("after")
    assert not reached
    assert read_run("run").diverged


def test_another_error_is_recorded_and_passes_on(here: Path) -> None:
    with pytest.raises(ZeroDivisionError), gptlab.record("run", seed=1) as log:
        log(1, loss=1 / (log is None))
    assert list(RunFolder("run").rows())[-1]["event"] == "ZeroDivisionError"
    assert not read_run("run").finished


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "text": (lambda log: log(1, loss="low"), "loss: expected a number"),
    "tensor of several": (lambda log: log(1, loss=torch.zeros(3)), "loss: expected a number"),
    "nothing": (lambda log: log(1), "expected loss="),
    "step back": (lambda log: (log(5, loss=1.0), log(4, loss=1.0)), "step of at least 5"),
    "no step": (lambda log: log("1", loss=1.0), "step of at least 0"),
    "figure": (lambda log: log(1, loss=1.0, accuracy="high"), "accuracy: expected a number"),
}


@pytest.mark.parametrize("call", CALLS)
def test_figures_that_are_none_are_refused(call: str, here: Path) -> None:
    wrong, said = CALLS[call]
    with pytest.raises(ConfigError, match=said), gptlab.record("run", seed=1) as log:
        wrong(log)


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_written_over_unless_it_was_recorded_and_asked_for(run: Path, trials: Path) -> None:
    for folder, overwrite in ((trials / "mine" / "1", False), (run, False), (run, True)):
        with unchanged(folder), pytest.raises(CheckpointError, match="holds a run"):  # noqa: SIM117
            with gptlab.record(folder, seed=1, overwrite=overwrite):
                pass
    with gptlab.record(trials / "mine" / "1", seed=1, arm="mine", overwrite=True) as log:
        log(20, loss=1.5)
    assert read_run(trials / "mine" / "1").losses == {20: 1.5}


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": "1"}, {"lr": [1, 2]}, {"lr": object()}, {"steps": "many"}])
def test_a_record_that_no_reader_would_take_is_refused(wrong: dict[str, Any], here: Path) -> None:
    with pytest.raises(ConfigError), gptlab.record("run", **{"seed": 1, **wrong}):
        pass
    assert not (here / "run" / "config.json").exists()
