"""`gptlab experiment` and `gptlab falsify` as their user meets them: words, streams, codes, tables."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptlab.cli.experiment import Watch
from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.runs.cells import Claim, State, cells_of
from gptlab.runs.experiment_runner import Progress, Snapshot, standing
from gptlab.runs.experiment_spec import Experiment, read_experiment
from gptlab.runs.smoke import smoke
from gptlab.runs.variants import Variant, changes, derived, rungs, status

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
    assert re.search(r"off +1 +5 +the disk is full", shown)
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


FINDING_TEXT = """
name = "small"
baseline = "plain"
seeds = [1, 2]
delta = 0.01
[options]
data = "{corpus}"
n_embd = 32
steps = 6
warmup_steps = 0
eval_every = 1000
eval_tokens = 512
threads = 1
[arms.plain]
[arms.slow]
learning_rate = 0.0005
"""


@pytest.fixture(scope="module")
def finding(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment in which a tenth of the learning rate is surely worse."""
    folder = tmp_path_factory.mktemp("finding")
    (folder / "small.toml").write_text(FINDING_TEXT.format(corpus=tiny_corpus))
    assert main(["experiment", "run", str(folder / "small.toml"), "--out", str(folder / "small")]) == 0
    return folder / "small"


@pytest.fixture
def experiment(tiny_corpus: Path, tmp_path: Path) -> Experiment:
    path = tmp_path / "declared.toml"
    path.write_text(FINDING_TEXT.format(corpus=tiny_corpus))
    return read_experiment(path)


@pytest.mark.slow
def test_a_finding_is_tried_under_changes_and_continued(
    finding: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's vocabulary does not fit the finding's own corpus of bytes, so that it cannot be tried."""
    monkeypatch.chdir(tmp_path)
    words = ["falsify", str(finding), "--arm", "slow", "--budget", "1", "--seeds", "2", "--out", "out", "--json"]
    words += ["--only", "other_seeds,vocabulary"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {one["name"]: one for one in found["changes"]}
    assert found["found"]["difference"] > 0
    assert by_name["other_seeds"]["status"] == "survived"
    assert by_name["vocabulary"]["status"] == "not tried"
    assert "tokenizer" in by_name["vocabulary"]["reason"]
    assert found["sentence"] == "the sign of slow survived 1 of 1 changes, was reversed in 0, and 0 are open"
    assert json.loads(Path("out/falsify.json").read_text()) == found

    rows = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*/seed_*/metrics.jsonl")}
    assert {path.parent.name for path in rows if "other_seeds" in str(path)} == {"seed_3", "seed_4"}
    words[-1] = "other_seeds"
    words[words.index("--budget") + 1] = "1e-9"
    capsys.readouterr()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == [by_name["other_seeds"]], "what is whole needs no budget"
    assert {path: path.stat().st_mtime_ns for path in rows} == rows  # nothing was trained again


@pytest.mark.slow
def test_a_spent_budget_begins_nothing(finding: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["falsify", str(finding), "--arm", "slow", "--budget", "1e-9", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "survived 0 of 0 changes" in out
    assert "the budget ended" in out
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.slow
def test_an_arm_on_the_rungs_of_the_ladder(finding: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["experiment", "ladder", str(finding.with_suffix(".toml")), "--depths", "2,4", "--seeds", "2"]
    assert main([*words, "--out", str(tmp_path / "rungs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rung["depth"] for rung in found["rungs"]] == [2, 4]
    assert all(rung["arms"]["slow"]["difference"] > 0 for rung in found["rungs"])
    assert found["arms"]["slow"] == {"sign": "higher", "holds": 2, "of": 2}
    assert json.loads((tmp_path / "rungs" / "ladder.json").read_text()) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["{folder}", "--budget", "1", "--arm", "fast"], 2, "found fast"),
        (["{folder}", "--arm", "slow", "--budget", "1", "--only", "rate_hlf"], 2, "did you mean 'rate_half'?"),
    ],
)
def test_an_arm_or_a_change_that_is_not_there(
    words: list[str], code: int, line: str, finding: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["falsify", *(word.format(folder=finding) for word in words)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["x", "--budget", "0"], 2, "--budget: expected hours above 0, found '0'"),
        (["x", "--budget", "nan"], 2, "--budget: expected a number of at least 0, found 'nan'"),
        (["x"], 2, "required: --budget"),
        (["x.json.gz", "--budget", "1"], 3, "expected a packed experiment at x.json.gz, found nothing"),
        ([".", "--budget", "1"], 3, "expected an experiment's folder, found no experiment.toml in ."),
        (["first_look", "--budget", "1"], 3, "found none; first: gptlab experiment run first_look"),
    ],
)
def test_a_mistake_of_falsify_is_one_line(
    words: list[str], code: int, line: str, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["falsify", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_numbers_keep_their_ratio_to_the_recipe_of_a_rung(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + '[arms.late]\nsignal.name = "confidence"\nsignal.start = 3\n')
    (rung,) = rungs([4])
    found = derived(read_experiment(path), rung, ["plain", "slow", "late"], 2)
    assert found.preset == "ladder"
    assert found.arms["slow"].get("learning_rate", "ladder") == pytest.approx(0.0003)  # a tenth of the rung's 0.003
    assert found.arms["plain"].get("steps", "ladder") == round(6 / 1300 * 8148)
    assert found.arms["late"].options["signal.start"] == round(3 / 1300 * 8148)
    assert found.arms["plain"].get("data", "ladder") == experiment.arms["plain"].options["data"]


def test_changes_that_an_arm_makes_itself_are_not_tried(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + '[arms.muon]\noptimizer = "muon"\n[arms.patched]\npatch = "x.diff"\n')
    path.with_name("x.diff").write_text("")
    with_more = read_experiment(path)
    reasons = {one.name: one.impossible for one in changes(with_more, ["plain", "muon"])}
    assert reasons.pop("muon") == "muon has it already"
    assert set(reasons.values()) == {""}
    reasons = {one.name: one.impossible for one in changes(with_more, ["plain", "patched"])}
    assert reasons["untied_head"] == "patched is a patch itself"


def test_the_cheapest_change_comes_first(experiment: Experiment) -> None:
    names = [one.name for one in changes(experiment, ["plain", "slow"])]
    assert names.index("rate_half") < names.index("vocabulary") < names.index("tokens")


def test_choices_of_tune_hold_for_their_own_setting_alone(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(experiment.text + "[tune]\nseeds = [9]\n")
    with pytest.raises(ConfigError, match=r"without \[tune\]"):
        derived(read_experiment(path), Variant("same", "the same"), ["plain", "slow"], 2)


@pytest.mark.parametrize(
    ("sign", "difference", "interval", "expected"),
    [
        (0.1, 0.2, [0.1, 0.3], "survived"),
        (-0.1, -0.2, [-0.3, -0.1], "survived"),
        (0.1, -0.2, [-0.3, -0.1], "reversed"),
        (0.1, 0.2, [-0.1, 0.5], "open"),
        (0.1, 0.2, [0.0, 0.4], "open"),
        (0.1, None, [None, None], "open"),
    ],
)
def test_a_sign_survives_where_its_interval_does(
    sign: float, difference: float | None, interval: list[float | None], expected: str
) -> None:
    assert status(sign, {"difference": difference, "interval": interval}) == expected
