"""`gptlab experiment` as its user meets it: words, streams, codes, tables. Kills are in tests/runs/."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptlab.cli.experiment import Watch
from gptlab.cli.main import main
from gptlab.runs.cells import Claim, State, cells_of
from gptlab.runs.experiment_runner import Progress, Snapshot, standing
from gptlab.runs.experiment_spec import read_experiment
from gptlab.runs.smoke import smoke

Capture = pytest.CaptureFixture[str]
TEXT = """
name = "small"
baseline = "plain"
seeds = [1, 2]
[options]
data = "{corpus}"
n_layer = 2
n_embd = 32
n_head = 2
block_size = 16
batch_size = 4
total_batch_tokens = 64
steps = 2000
eval_tokens = 512
[arms.plain]
[arms.sure]
signal.name = "negated_cross_entropy"
[arms.off]
signal.name = "confidence"
signal.weight = 0.0
[arms.late]
signal.name = "confidence"
signal.start = 1999
[arms.wild]
learning_rate = 1e9
grad_clip = 0
"""


@pytest.fixture
def file(tiny_corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(TEXT.format(corpus=tiny_corpus))
    return path


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["rnu", "x.toml"], 2, "smoke, plan, ladder, pack, unpack, found 'rnu'; did you mean 'run'?"),
        (["run"], 2, "the following arguments are required: FILE"),
        (["run", "{file}", "--jobs", "0"], 2, "--jobs: expected a whole number of at least 1, found '0'"),
        (["run", "{file}", "--job", "2"], 2, "unknown argument '--job'; did you mean '--jobs'?"),
        (
            ["run", "zzz.toml"],
            3,
            "expected an experiment file at zzz.toml, found none; ready ones, by name:",
        ),
        (["pack", "nowhere", "--out", "there.json.gz"], 3, "expected an experiment's folder, or its file, at nowhere"),
        (["status", "{folder}"], 3, "expected an experiment's folder, found no experiment.toml in"),
        (["run", "{folder}"], 3, "expected a regular file, found a folder; give the path of a file"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], code: int, line: str, file: Path, capsys: Capture) -> None:
    assert main(["experiment", *(word.format(file=file, folder=file.parent) for word in words)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1


def test_status_of_an_experiment_that_has_not_begun(file: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["experiment", "status", str(file), "--out", str(tmp_path / "none"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["states"], found["seconds_left"]) == ({"waiting": 10}, None)
    assert not (tmp_path / "none").exists(), "looking changes nothing"


def test_status_tells_every_state(file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"

    def cell(name: str, *rows: dict[str, Any], output: str = "") -> None:
        folder = out / name
        folder.mkdir(parents=True)
        train = {"step": 5, "kind": "train", "loss": 3.25, "tokens": 320, "tokens_per_second": 64.0}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (train, *rows)))
        (folder / "output.txt").write_text(output)

    finished = {"step": 2000, "kind": "event", "event": "finished"}
    cell("plain/seed_1", {"step": 2000, "kind": "val", "loss": 1.5}, finished)
    cell("sure/seed_1", {"step": 5, "kind": "event", "event": "DivergedError", "text": "diverged \x1b[2J at 5"})
    cell("off/seed_1", {"step": 5, "kind": "event", "event": "CheckpointError", "text": "the disk is full"})
    cell(
        "late/seed_1",
        {"step": 5, "kind": "event", "event": "Stopped", "text": "stopped"},
        output="gptlab: stopped at step 5 of 9\n",
    )
    cell("wild/seed_1", output="some words\ngptlab: ended by SIGKILL; was memory short?\n")
    cell("plain/seed_2")
    cell("sure/seed_2", output="gptlab: it holds another run:\n  steps: 3\n  seed: 4\n")
    (out / "off/seed_2").mkdir()
    (out / "off/seed_2/metrics.jsonl").write_text("no row\n")
    assert main(["experiment", "status", str(file), "--out", str(out), "--json"]) == 0
    cells = {f"{c['arm']}/{c['seed']}": c for c in json.loads(capsys.readouterr().out)["cells"]}
    states = {name: cell["state"] for name, cell in cells.items() if cell["state"] != "waiting"}
    assert states == {"plain/1": "finished", "sure/1": "diverged", "off/1": "failed", "late/1": "stopped",
                      "wild/1": "failed", "plain/2": "stopped", "sure/2": "failed", "off/2": "failed"}  # fmt: skip
    assert (cells["plain/1"]["loss"], cells["plain/2"]["loss"]) == (1.5, 3.25)
    assert cells["off/1"]["reason"] == "the disk is full"
    assert cells["sure/2"]["reason"] == "it holds another run: steps: 3 seed: 4"
    assert cells["off/2"]["reason"].endswith(
        f"before byte 7: expected a row with step and kind, found 'no row\\n'; remove {out}/off/seed_2"
    )
    assert cells["wild/1"]["reason"] == "ended by SIGKILL; was memory short?"
    experiment = read_experiment(file)
    claim = Claim.take(next(cell.folder for cell in cells_of(experiment, out) if cell.name == "plain/seed_2"))
    assert claim
    found = standing(experiment, out)
    claim.release()
    running = next(one for one in found.cells if one.cell.name == "plain/seed_2")
    assert (running.state, running.seconds_left) == ("running", 1995)  # one update of 64 tokens a second
    assert found.seconds_left == 2 * 1995 + 2 * 2000, "two that have begun, two that have not"
    assert main(["experiment", "status", str(file), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "off/seed_1: the disk is full" in shown
    assert "\x1b" not in shown
    assert "1 finished" in shown


def test_a_file_gets_a_line_a_change_and_a_terminal_a_table(file: Path, tmp_path: Path) -> None:
    cells = cells_of(read_experiment(file), tmp_path)[:2]

    def snapshot(*states: State) -> Snapshot:
        found = [Progress(c, s, 7, 2.5, None, "why \x1b" if s == "failed" else None)
                 for c, s in zip(cells, states, strict=True)]  # fmt: skip
        return Snapshot(tuple(found), 62.0)

    for terminal in (False, True):
        text = io.StringIO()
        with Watch(Console(file=text, force_terminal=terminal, width=200, highlight=False)) as watch:
            for states in (
                ("waiting", "waiting"),
                ("running", "waiting"),
                ("finished", "running"),
                ("finished", "failed"),
            ):
                watch.show(snapshot(*states))
                watch.show(snapshot(*states))
        shown = text.getvalue()
        assert "finished" in shown
        assert "plain/seed_1  step 7  loss 2.5000" in shown
        assert "why ␛" in shown
        if not terminal:
            assert [line.split()[0] for line in shown.splitlines()] == ["running", "finished", "running", "failed"]
            assert shown.count("1:02 left") == 4


@pytest.mark.slow
def test_smoke_tells_of_every_arm_and_leaves_nothing(file: Path, capsys: Capture, tmp_path: Path) -> None:
    longer = {"steps = 2000": "steps = 200_000", "start = 1999": "start = 199_999"}  # no machine gets there in seconds
    for old, new in longer.items():
        file.write_text(file.read_text().replace(old, new))
    before = sorted(tmp_path.rglob("*"))
    assert main(["experiment", "smoke", str(file), "--seconds", "5", "--json"]) == 3, "an arm does not run"
    out, err = capsys.readouterr()
    found = json.loads(out)
    arms = found["arms"]
    assert {name: arm["signal"] for name, arm in arms.items()} == {
        "plain": "no signal", "sure": "active", "off": "weight 0", "late": "starts at step 199999", "wild": "no signal",
    }  # fmt: skip
    assert arms["sure"]["dose"] > 0.01
    assert "diverged at step 1" in arms["wild"]["reason"]
    assert "wild: diverged at step 1" in err
    ran = [arm for name, arm in arms.items() if name != "wild"]
    assert all(4 <= arm["steps"] <= 200_000 and arm["seconds"] > 0 and arm["bytes"] > 300_000 for arm in ran)
    assert arms["sure"]["flops"] > arms["plain"]["flops"] == arms["off"]["flops"]
    as_long = arms["sure"]["equal_flops_steps"]
    assert as_long == round(200_000 * arms["sure"]["flops"] / arms["plain"]["flops"]) > 210_000
    assert arms["off"]["equal_flops_steps"] is None
    assert found["total"]["cells"] == 10
    assert found["total"]["flops"] == pytest.approx(2 * sum(arm["flops"] for arm in ran))
    assert sorted(tmp_path.rglob("*")) == before


def test_smoke_stops_when_asked(file: Path) -> None:
    from gptlab.errors import Stopped
    from gptlab.runs.executor import Packing

    asked: Callable[[], bool] = lambda: True  # noqa: E731
    with pytest.raises(Stopped, match="nothing was kept"):
        list(smoke(read_experiment(file), Packing(2), 60.0, stop=asked))
