"""The documents against the program: README's commands, every figure that a real run records, the tables of signals."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from scripts import load_script

from gptlab.cli.main import main
from gptlab.model import GPT, GPTConfig
from gptlab.options import options_of
from gptlab.runs.experiment_spec import KEYS, TUNE_KEYS, read_experiment
from gptlab.runs.folder import RunFolder
from gptlab.signals import SIGNALS, Signal, SignalConfig, functions
from gptlab.signals.registry import OBJECTIVES, Objective
from gptlab.training import backward

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def documented() -> dict[str, set[str]]:
    """The names in the tables of docs/metrics.md, by kind of row."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `(\w+)`: ", text, flags=re.MULTILINE)[1:]
    names: dict[str, set[str]] = {}
    for kind, section in zip(sections[::2], sections[1::2], strict=True):
        cells = re.findall(r"^\| (`[^|]*) \|", section.partition("\n## ")[0], flags=re.MULTILINE)
        names[kind] = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    return names


def test_a_real_run_records_documented_figures_only_and_all_of_a_plain_one(finished_run: Path) -> None:
    names = documented()
    assert names.keys() == {"train", "val", "sample", "event"}
    found: dict[str, set[str]] = {}
    for row in RunFolder(finished_run).rows():
        found.setdefault(row["kind"], set()).update(row.keys() - {"step", "kind"})
    assert found.keys() == names.keys()
    for kind, figures in found.items():
        assert figures <= names[kind], f"{kind}: not in docs/metrics.md: {figures - names[kind]}"
    unseen = {"doses", "weights", "signals_by_judge", "text"}  # of several signals, and of errors
    unseen |= {"differences"}  # of a run that goes on despite of something
    unseen |= {"noise_step_share", "batch_noise"}  # of noise that is injected
    unseen |= {"reward", "reward_passed", "distinct_ngrams", "argmax_entropy"}  # of a conversation
    unseen |= {"excess_loss", "truth_probability", "clean_loss"}  # of corpora that are made up; of flipped targets
    for kind, figures in names.items():
        assert figures - unseen <= found[kind], f"{kind}: in docs/metrics.md only: {figures - unseen - found[kind]}"


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    assert len(README.encode()) <= 10_000
    first_screen = README[:1200]
    assert "source setup.sh && torchrun --standalone --nproc_per_node=1 train_gpt2_ben.py" in first_screen
    assert "source setup.sh && pytest" in first_screen
    for screen in re.findall(r"^screen -dm .*$", (ROOT / "docs" / "how-to.md").read_text(), flags=re.MULTILINE):
        assert screen in README


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    if page.name == "LOG.md":
        pytest.skip("the log names files of its time")
    named = re.findall(r"\b(?:gptlab|tests|tools|benchmarks)/[\w/.]+\.\w+", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]
    if page.name == "architecture.md":
        assert len(named) > 40


@pytest.mark.parametrize(
    ("page", "name"), [("tutorial.md", "margin"), ("experiment-files.md", "1_noise"), ("own-objective.md", "echo")]
)
def test_the_experiments_in_the_documents_are_ones(page: str, name: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (tmp_path / "idea.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    (tmp_path / "experiment.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    assert read_experiment(tmp_path / "experiment.toml").name == name


SMALL = """n_layer = 2
n_embd = 32
n_head = 2
total_batch_tokens = 256
steps = 6
eval_every = 3
eval_tokens = 512
checkpoint_every = 6
dose_every = 1
threads = 1
"""
"""Options that make a document's experiment one of seconds."""


@pytest.mark.slow
def test_the_session_of_an_objective_of_your_own_runs_as_it_is_written(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "own-objective.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    of = {kind: body for kind, body in blocks if kind}
    small = of["toml"].replace("[1, 2, 3, 4, 5]", "[1, 2]")
    small = small.replace("[options]", f"[options]\ndata = {str(tiny_corpus)!r}\n{SMALL}#", 1)
    (tmp_path / "echo.py").write_text(of["python"])
    (tmp_path / "echo.toml").write_text(small)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for kind, body in blocks if not kind for line in body.splitlines()]
    less = {"noise": ["--branch_steps=1", "--eval_tokens=512", "--reader_tokens=0"], "smoke": ["--seconds=15"]}
    found = {}
    for program, *words in commands:
        assert program == "gptlab"
        name = words[1] if words[0] == "experiment" else words[0]
        assert main([*words, "--json", *less.get(name, [])]) == 0, capsys.readouterr().err
        found[name] = json.loads(capsys.readouterr().out)
    assert list(found) == ["smoke", "run", "compare", "noise"]
    arms = found["compare"]["arms"]
    assert {name: arm["n"] for name, arm in arms.items()} == {"echo": 2, "echo-placebo": 2}
    assert all(arm["dose"] == pytest.approx(0.1, rel=1e-6) for arm in arms.values())
    assert {"echo.py:no_echo", "placebo:echo.py:no_echo"} <= found["noise"]["signals"].keys()
    assert all(signal["branch"]["verdict"] for name, signal in found["noise"]["signals"].items() if name != "true_loss")


def test_a_figure_begins_no_line() -> None:
    """Markdown would end the paragraph, or the list, before a line that begins with a comment."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.lstrip().startswith("<!-- = ")], page


@pytest.mark.parametrize(
    "document", ["README.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{document}: {target}"


def test_the_reference_is_what_options_and_parsers_say() -> None:
    reference = load_script("tools/reference.py")
    for page in (reference.DOCS / name for name in reference.PAGES):
        text = page.read_text(encoding="utf-8")
        assert reference.renewed(text) == text, f"{page}: run `python tools/reference.py`"


def test_every_key_of_an_experiment_file_is_explained() -> None:
    page = (ROOT / "docs" / "experiment-files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\[?([a-z_]+)", page, flags=re.MULTILINE)
    assert set(rows) == set(KEYS)
    assert set(re.findall(r"^([a-z_]+) = ", page.partition("## `[tune]`")[2], flags=re.MULTILINE)) == set(TUNE_KEYS)


def test_documented_json_is_what_compare_prints() -> None:
    findings = load_script("tools/findings.py")
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (?:`(\w+)`|an arm) .*?\| (`\{.*)\|$", page, flags=re.MULTILINE))
    result = findings._result("1_noise")
    assert set(re.findall(r'"(\w+)"', rows["compare"])) == result.keys() - {"blocks", "hours"}
    assert set(re.findall(r'"(\w+)"', rows[""])) <= result["arms"]["confidence"].keys()


def test_the_pictures_of_the_findings_are_of_the_committed_results(tmp_path: Path) -> None:
    pictures = load_script("tools/findings.py")
    pictures.draw_pictures(tmp_path)
    shown = "".join(page.read_text(encoding="utf-8") for page in pictures.pages())
    for name in pictures.PICTURES:
        drawn, committed = (
            list(ElementTree.parse(folder / f"{name}.svg").getroot().itertext())
            for folder in (tmp_path, pictures.FINDINGS)
        )
        assert drawn == committed, "run `python tools/findings.py`"
        assert f"{name}.svg)" in shown


def test_the_findings_show_what_compare_says_of_the_committed_results() -> None:
    findings = load_script("tools/findings.py")
    pages = list(findings.pages())
    tables = [mark for page in pages for mark in findings.MARK.findall(page.read_text(encoding="utf-8"))]
    assert ("verdicts", "1_noise") in tables
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert findings.renewed(text) == text, f"{page}: run `python tools/findings.py`"


DOCS = ROOT / "docs"
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
