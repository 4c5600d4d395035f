"""`gptlab compare` as its users meet it: tables, JSON, Markdown, refusals with their exit codes, a plan."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.tables import sentences
from gptlab.cli.compare import main as compare
from gptlab.cli.main import guarded
from gptlab.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [
        f"5,{3 + seed / 50 + difference + 0.001 * (seed * len(arm) % 3)},{arm},{seed}"
        for arm, difference in (("baseline", 0.0), ("a|b", -0.1), ("[bold]c", 0.02))
        for seed in range(1, 6)
    ]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["step,loss,arm,seed", *rows]))
    return path


def test_json_has_the_promised_shape(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([str(log), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"baseline", "noise_floor", "arms"} <= result.keys()
    promised = {"verdict", "reason", "difference", "interval", "n", "p_holm", "more_seeds", "dose"}
    assert all(promised <= arm.keys() for arm in result["arms"].values())
    assert result["arms"]["a|b"]["verdict"] == "better"


def test_the_tables_show_names_as_they_are(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "forest.svg"
    assert compare([str(log), "--markdown", str(tmp_path / "page.md"), "--svg", str(picture)]) == 0
    drawn = ElementTree.parse(picture).getroot()
    assert {"a|b", "better"} <= {element.text for element in drawn.iter()}
    assert "--better: #" in str(drawn[0].text)
    shown, page = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    assert all(text in shown for text in ("a|b", "[bold]c", "better", "worse", "below its baseline"))
    assert re.search(r"^\| a\\\|b \| better \| 2\.9\d\d\d \| -0\.1012 \|", page, re.MULTILINE)
    assert r"\[bold\]c" in page


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<svg"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_figures_and_tables_for_a_paper(
    ending: str, start: bytes, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, tables = tmp_path / f"idea.{ending}", tmp_path / "idea.tex"
    for _ in range(2):  # the same bytes each time
        assert compare([str(log), "--figure", str(figure), "--latex", str(tables)]) == 0
        drawn = [path.read_bytes() for path in (figure, tmp_path / f"idea_losses.{ending}")]
        assert all(content.startswith(start) for content in drawn)
        assert drawn == [path.read_bytes() for path in (figure, tmp_path / f"idea_losses.{ending}")]
    assert f"figure: {figure}" in capsys.readouterr().err
    page = tables.read_text()
    assert page.count(r"\begin{table}") == page.count(r"\toprule") == page.count(r"\end{table}") > 0
    assert re.search(r"^a\|b & better & 2\.9\d\d\d & \$-\$0\.1012 & ", page, re.MULTILINE)


@pytest.mark.parametrize("name", ["idea.jpg", "idea", "idea.svg.txt", "svg"])
def test_a_figure_of_another_format_is_refused(name: str, log: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.pdf, \.svg or \.png"):
        compare([str(log), "--figure", str(tmp_path / name)])
    assert not (tmp_path / name).exists()


def test_a_log_may_have_looks_a_delta_a_placebo_and_another_baseline(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--baseline", "a|b", "--placebo", "baseline=[bold]c", "--delta", "0.2", "--looks", "5,10", "--json"]
    assert compare([str(log), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["baseline"], result["delta"], result["looks"]) == ("a|b", 0.2, [5, 10])
    assert {arm: v["verdict"] for arm, v in result["arms"].items()} == dict.fromkeys(
        ("baseline", "[bold]c"), "no difference"
    )
    assert result["arms"]["[bold]c"]["control"]


def test_a_plan_needs_no_runs(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(["--plan", "--sigma", "0.02", "--difference", "0.02", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds_for_difference"] == 10
    assert compare(["--plan", str(log)]) == 0
    assert "lies within" not in capsys.readouterr().out
    assert compare(["--plan", str(log), "--delta", "0.01"]) == 0
    assert "to show that it lies within ±0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "expected runs, an experiment's folder or a log"),
        (["nowhere"], 3, "found nothing; check the path"),
        (["{log}", "{log}"], 3, "alone, found 2 sources"),
        (["{log}", "--looks", "5,x"], 2, "--looks"),
        (["{log}", "--delta", "-1"], 2, "expected a number of at least 0"),
        (["{log}", "--delta", "nan"], 2, "expected a number of at least 0"),
        (["{log}", "--placebo", "a"], 2, "expected ARM=PLACEBO"),
        (["{log}", "--baseline", "basline"], 3, "did you mean 'baseline'"),
        (["--plan"], 2, "expected --sigma X"),
        (["--plan", "--sigma", "1", "--power", "1.5"], 2, "a power between 0 and 1"),
        (["{log}", "--markdwn", "x"], 2, "did you mean '--markdown'"),
    ],
)
def test_mistakes_end_in_one_line_and_their_code(
    options: list[str], code: int, message: str, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(compare, [option.format(log=log) for option in options]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def small_run(folder: Path, seed: int, loss: float, torch: str = "2.13.0") -> str:
    """The least that makes a run."""
    options = {"seed": seed, "signal.name": "none", "steps": 5, "total_batch_tokens": 64, "tokenizer": "bytes",
               "n_embd": 8, "n_layer": 1, "share_blocks": False, "block_size": 8, "data": "none",
               "learning_rate": 1.0 if "fast" in folder.name else 0.1}  # fmt: skip
    folder.mkdir(parents=True)
    data = {"tokenizer": "bytes", "train": ["1"], "val": ["2"], "complete": True}
    (folder / "config.json").write_text(json.dumps({"options": options, "data": data}))
    (folder / "environment.json").write_text(json.dumps({"torch": torch}))
    rows = [{"step": 5, "kind": "val", "loss": loss}, {"step": 5, "kind": "event", "event": "finished"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_undeclared_differences_are_refused_and_the_override_stands_on_every_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [small_run(tmp_path / "plain", 1, 3.0), small_run(tmp_path / "fast", 1, 2.0, torch="2.12.0")]
    assert guarded(compare, [*runs, "--json"]) == 3
    told = capsys.readouterr()
    line = f"{runs[1]}: software torch: expected '2.13.0' as in {runs[0]}, found '2.12.0'"
    assert line in told.err
    assert line in json.loads(told.out)["error"]
    assert compare([*runs, "--despite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["undeclared"] == [line]
    page = tmp_path / "page.md"
    assert compare([*runs, "--despite", "--markdown", str(page)]) == 0
    assert "COMPARED DESPITE" in capsys.readouterr().out.replace("\n", " ")
    assert "COMPARED DESPITE" in page.read_text()


def test_what_an_experiment_declares_cannot_be_changed_after_the_runs(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text("")
    with pytest.raises(UsageError, match="after the runs it stands: leave --delta out"):
        compare([str(tmp_path), "--delta", "0.5"])


def test_help_needs_no_torch_and_no_scipy() -> None:
    code = (
        "import sys\nfrom gptlab.cli.compare import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'scipy', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


Arm = dict[str, Any]
ANSWERS = {
    "sure": "sure harms: 2.50 against 2.23 nats, difference +0.27 [0.25, 0.30], 5 seeds; its placebo "
    "harms half as much",
    "wide": "wide helps: 2.00 against 2.23 nats, difference -0.23 [-0.30, -0.16], 1 seed; its placebo harms 1.1 times "
    "as much",
    "same": "same makes no difference: 2.2300 against 2.2300 nats, difference +0.0000 [0.0000, 0.0000], 5 seeds",
    "early": "early is undecided: too few",
}


def _arm(verdict: str, loss: float | None, interval: list[float | None], placebo: str | None, n: int = 5) -> Arm:
    difference = None if loss is None else loss - 2.23
    return {"verdict": verdict, "loss": loss, "baseline_loss": 2.23, "difference": difference, "interval": interval,
            "n": n, "reason": "too few", "control": verdict == "control",
            "placebo": placebo and {"arm": placebo}}  # fmt: skip


def test_the_answer_stands_first_in_plain_words(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {
        "sure": _arm("worse", 2.5, [0.25, 0.30], "p"), "wide": _arm("better", 2.0, [-0.30, -0.16], "q", 1),
        "same": _arm("no difference", 2.23, [0.0, 0.0], None), "early": _arm("undecided", None, [None, None], "p"),
        "p": _arm("control", 2.365, [0.1, 0.2], None), "q": _arm("control", 2.485, [0.1, 0.2], None),
    }  # fmt: skip
    assert sentences({"arms": arms, "metric": "loss", "better": "lower"}) == list(ANSWERS.values())
    assert compare([str(log)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a|b helps: 2.960 against 3.061 nats, difference -0.101 [")


def test_what_all_arms_share_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([str(ROOT / "docs/findings/1_noise.json.gz")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("842,496") == 1
    assert "all arms" in shown
    assert "minimum detectable effect (80% power)" in shown
