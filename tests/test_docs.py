"""The documents against the program: README's commands, and every figure that a real run records."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from scripts import load_script

from gptlab.cli.main import main
from gptlab.runs.experiment_spec import KEYS, TUNE_KEYS, read_experiment
from gptlab.runs.folder import RunFolder

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
    assert set(re.findall(r'"(\w+)"', rows["compare"])) == result.keys() - {"blocks"}
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
