"""docs/signals.md against the registry: an entry for every signal, the picture, and its example as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
import torch
from scripts import load_script

from gptlab.cli.main import main
from gptlab.model import GPT, GPTConfig
from gptlab.options import options_of
from gptlab.runs.folder import RunFolder
from gptlab.signals import SIGNALS, Signal, SignalConfig, functions
from gptlab.signals.registry import OBJECTIVES, Objective
from gptlab.training import backward

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "signals.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
FIELDS = {
    name: dict(re.findall(r"^- \*\*(.+?)\*\*: (.*?)(?=^- |\Z)", entry, flags=re.MULTILINE | re.DOTALL))
    for name, entry in ENTRIES.items()
}

each_signal = pytest.mark.parametrize("name", sorted(SIGNALS))


def test_every_signal_has_an_entry_in_the_order_of_the_registry() -> None:
    assert list(ENTRIES) == list(SIGNALS)


@each_signal
def test_an_entry_says_what_the_registry_says(name: str) -> None:
    signal, fields = SIGNALS[name], FIELDS[name]
    assert list(fields) == ["Formula", "Reads", "Gradient", "Claim", "Fails when"]
    assert fields["Formula"].strip() == f"`{signal.formula}`"
    bounds = re.findall(r"Bound: ([\d/]+)\.|(No bound)\.", " ".join(fields["Gradient"].split()))
    assert len(bounds) == 1
    numerator, _, denominator = bounds[0][0].partition("/")
    stated = int(numerator) / int(denominator or 1) if numerator else None
    assert stated == signal.gradient_bound
    assert ("the true token" in fields["Reads"]) == signal.uses_truth
    assert ("`threshold`" in fields["Reads"]) == signal.has_threshold
    assert re.findall(r"the (?:block )?(before|after|final)", fields["Reads"]) == (
        [{"previous": "before", "next": "after", "final": "final"}[signal.needs]] if signal.needs else []
    )


@each_signal
def test_an_entry_names_the_notes_and_papers_that_the_registry_names(name: str) -> None:
    said = SIGNALS[name].source
    for reference in re.findall(r"\d{4}\.\d{5}|\bN\d\b|(?:Brier|Bengio) \d{4}", said):
        assert reference in FIELDS[name]["Claim"], reference


def test_every_option_and_control_is_explained() -> None:
    explained = set(re.findall(r"\*\*`(\w+)`\*\*", PAGE))
    options = {option.key for option in options_of(SignalConfig)} - {"name", "control", "flip", "flip_to"}
    controls = {"placebo", "shuffled", "flipped", "self", "target_flip", "gradient_bias"}
    assert options | controls | {"gradient_noise", "gradient_noise_shape"} == explained
    assert all(f"`{key}" in PAGE for key in ("control", "flip", "flip_to"))


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return load_script("tools/signal_plots.py")


def test_the_picture_is_the_one_that_is_drawn_now(plots: ModuleType, tmp_path: Path) -> None:
    assert PAGE.count("(images/signals.svg)") == 1
    kept = (DOCS / "images" / "signals.svg").read_text(encoding="utf-8")
    drawn = plots.draw(tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn == plots.draw(tmp_path / "two.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in drawn
    for name in SIGNALS:
        assert f">{name}<" in drawn
    if f"Matplotlib v{matplotlib.__version__}," not in kept:
        pytest.skip("the picture was drawn by another version of matplotlib")  # requirements.txt has the one that did

    def numbers(svg: str) -> list[float]:
        paths = re.findall(r' d="([^"]*)"', svg)
        return [float(number) for path in paths for number in re.findall(r"-?\d+(?:\.\d+)?", path)]

    assert len(numbers(kept)) > 6000
    assert numbers(drawn) == pytest.approx(numbers(kept), abs=1e-3)


def test_what_is_plotted_is_the_signal(plots: ModuleType) -> None:
    p = torch.tensor([0.2, 0.5, 0.95], dtype=torch.float64)
    values, slopes = plots.curves("confidence", p, 0)
    torch.testing.assert_close(values, (1 - p).log())
    torch.testing.assert_close(slopes, -p)
    values, slopes = plots.curves("deep_supervision", p, 1)
    torch.testing.assert_close(values, -((1 - p) / 255).log())
    torch.testing.assert_close(slopes, p)


FUNCTION, LINE, OBJECTIVE, OBJECTIVE_LINE = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```\n(gptlab train .*?)\n```", PAGE, flags=re.MULTILINE)


def gradients(config: SignalConfig) -> dict[str, torch.Tensor]:
    model = GPT(GPTConfig(block_size=4, vocab_size=9, n_layer=3, n_head=1, n_embd=8)).double()
    tokens = torch.arange(8).view(2, 4)
    backward(model, tokens, tokens + 1, config)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_an_example_is_ten_lines_at_most() -> None:
    for function, line in ((FUNCTION, LINE), (OBJECTIVE, OBJECTIVE_LINE)):
        assert function.count("\n") + line.count("\n") <= 10


def test_the_conversations_command_runs_as_it_stands(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *words = shlex.split(COMMANDS[0])
    assert main([*words, *tiny(tmp_path / "run", steps=2)[1:]]) == 0, capsys.readouterr().err
    assert [row["reward"] >= 0 for row in RunFolder(tmp_path / "run").rows() if "dose" in row] == [True]


def test_the_table_of_objectives_is_the_registrys() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)`[^|]* \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    assert rows == [(one.name, one.formula, one.source) for one in OBJECTIVES.values()]


def test_the_example_of_an_objective_works_as_a_line_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(OBJECTIVE, names)
    objective = eval(OBJECTIVE_LINE, {"Objective": Objective})
    monkeypatch.setattr(functions, objective.name, names[objective.name], raising=False)
    z = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
    (value,) = objective(list(z[:, None]), z, z, lambda h: h).flatten().tolist()
    p = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
    assert value == pytest.approx(float((-p.log() / 2).sum() - torch.tensor(2.0).log()), rel=1e-6)


def test_the_example_works_as_a_line_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(FUNCTION, names)
    signal = eval(LINE, {"Signal": Signal})
    monkeypatch.setattr(functions, signal.name, names[signal.name], raising=False)
    monkeypatch.setitem(SIGNALS, signal.name, signal)
    z = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, 5.0]], requires_grad=True)
    values = SIGNALS["margin"](z, torch.tensor([0, 0]))
    assert values.tolist() == [-2.0, -5.0]
    values.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum(1).tolist() == [signal.gradient_bound] * 2
    with_it, without = gradients(SignalConfig("margin")), gradients(SignalConfig("margin", weight=0.0))
    assert any(not torch.equal(with_it[name], g) for name, g in without.items())


@pytest.mark.parametrize(("file", "content", "command"), [("idea.py", FUNCTION, 1), ("steady.py", OBJECTIVE, 2)])
def test_an_example_works_from_a_file_with_the_command_as_it_stands(
    file: str,
    content: str,
    command: int,
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command's own words, and options that make it short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(content)
    program, *words = shlex.split(COMMANDS[command])
    assert program == "gptlab"
    short = tiny(tmp_path / "run", steps=2)[1:]
    assert main([*words, *short]) == 0, capsys.readouterr().err
    doses = [row["dose"] for row in RunFolder(tmp_path / "run").rows() if "dose" in row]
    assert doses
    assert min(doses) > 0
    assert main([word for word in [*words, *short] if word != "--allow_code"]) == 2
