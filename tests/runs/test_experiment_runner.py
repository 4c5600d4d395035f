"""Running an experiment with real processes: kills and stops, two runners, failing arms, and how many at a time."""

from __future__ import annotations

import difflib
import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import ARMS, HEAD, RunnerProcess, write  # pyright: ignore[reportMissingImports]

from gptlab.cli.arguments import file_options
from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.runs.cells import CLAIM, Claim, Rows, cells_of
from gptlab.runs.executor import SIDE_BY_SIDE, Packing, package
from gptlab.runs.experiment_runner import Runner, standing
from gptlab.runs.experiment_spec import options_file, options_text, read_experiment
from gptlab.runs.folder import RunFolder
from gptlab.runs.records import mean_over_updates
from gptlab.training.config import TrainingConfig

Start = Callable[..., RunnerProcess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write(folder)


@pytest.fixture(scope="module")
def whole(folder: Path, file: Path) -> Path:
    """The tiny experiment, run in one go; one of its arms diverges."""
    out = folder / "whole"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 4
    return out


@pytest.fixture
def start(file: Path) -> Iterator[Start]:
    """`start(out, "--jobs", "1")`: a runner in a process of its own."""
    started: list[RunnerProcess] = []

    def runner(out: Path, *words: str, file: Path = file) -> RunnerProcess:
        started.append(RunnerProcess(file, out, *words))
        return started[-1]

    yield runner
    for one in started:
        one.abandon()


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_results_say_what_every_cell_came_to(whole: Path) -> None:
    cells = {(cell["arm"], cell["seed"]): cell for cell in results(whole)["cells"]}
    assert list(cells) == [(arm, seed) for arm in sorted(ARMS) for seed in (1, 2)]
    for (arm, seed), cell in cells.items():
        rows = list(RunFolder(whole / arm / f"seed_{seed}").rows())
        if arm == "bad":
            assert (cell["state"], cell["loss"]) == ("diverged", None)
            assert cell["reason"] == rows[-1]["text"]
            continue
        assert (cell["state"], cell["step"], cell["reason"]) == ("finished", 24, None)
        assert cell["loss"] == [row["loss"] for row in rows if row["kind"] == "val"][-1]
        doses = [row["dose"] for row in rows if "dose" in row]
        assert len(doses) == (4 if arm == "sure" else 0)
        seven_digits = pytest.approx(sum(doses) / 4, rel=1e-6)
        assert cell["dose"] == (seven_digits if doses else None)
        assert cell["clipped_share"] == sum(row.get("clipped", False) for row in rows) / 24
    hashes = [cell["weights_sha256"] for cell in cells.values() if cell["state"] == "finished"]
    assert len(set(hashes)) == 4
    assert not {"seconds", "tokens_per_second"} & cells["plain", 1].keys(), "a clock"


@pytest.mark.slow
def test_compare_reads_the_folder_as_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(whole), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["experiment"], result["undeclared"], result["arms"]["sure"]["n"]) == ("tiny", [], 2)
    losses = {(cell["arm"], cell["seed"]): cell["loss"] for cell in results(whole)["cells"]}
    expected = sum(losses["sure", seed] - losses["plain", seed] for seed in (1, 2)) / 2
    assert result["arms"]["sure"]["difference"] == pytest.approx(expected, abs=1e-12)
    assert "diverged on 2 of 2 seeds, its baseline on 0" in result["arms"]["bad"]["reason"]


@pytest.mark.slow
def test_an_experiment_that_has_ended_runs_nothing_again(
    whole: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "results.json").read_bytes()
    assert main(["experiment", "run", str(file), "--out", str(whole), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["ran"] == []
    assert (whole / "results.json").read_bytes() == before


@pytest.mark.slow
def test_killed_and_stopped_and_identical(whole: Path, start: Start, tmp_path: Path) -> None:
    choose, out = random.Random(4), tmp_path / "out"
    for number, first in ((signal.SIGTERM, 5), (signal.SIGKILL, 60)):  # of 116 rows
        runner = start(out)
        runner.wait_for_rows(choose.randrange(first, first + 35))
        time.sleep(choose.uniform(0, 0.3))
        runner.send(number)
        code, said, err = runner.end()
        assert code == (75 if number == signal.SIGTERM else -9), err
        if number == signal.SIGTERM:
            assert "run the same command again to continue" in err
            stopped = json.loads(said)
            assert stopped["exit_code"] == 75
            assert stopped["states"].get("running", 0) == 0
    code, said, err = start(out).end()
    assert code == 4, err
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.slow
def test_two_runners_share_the_work_and_never_a_cell(whole: Path, start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = start(out, "--jobs", "1"), start(out, "--jobs", "1")
    (code, said, err), (code_2, said_2, err_2) = first.end(), second.end()
    assert (code, code_2) == (4, 4), err + err_2
    ran, ran_2 = json.loads(said)["ran"], json.loads(said_2)["ran"]
    assert sorted([*ran, *ran_2]) == sorted(f"{arm}/seed_{seed}" for arm in ARMS for seed in (1, 2))
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_a_claim_is_one_runners_until_it_lets_go(file: Path, tmp_path: Path) -> None:
    cell = cells_of(read_experiment(file), tmp_path)[0]
    claim = Claim.take(cell.folder)
    assert claim
    assert Claim.take(cell.folder) is None
    assert standing(read_experiment(file), tmp_path).cells[0].state == "running"
    claim.release()
    again = Claim.take(cell.folder)
    assert again
    again.release()
    assert (cell.folder / CLAIM).is_file()


@pytest.mark.slow
def test_a_failing_arm_is_shown_with_its_reason_and_stops_nobody(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("def signal(logits, targets):\n    return logits.sum()\n")
    arms = {"plain": {}, "broken": {"signal.name": f"{tmp_path}/broken.py:signal"}}
    file, out = write(tmp_path, arms, {**HEAD, "seeds": [1]}, steps=4), tmp_path / "out"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 2, "it runs as code: not without --allow_code"
    assert main(["experiment", "run", str(file), "--out", str(out), "--allow_code"]) == 3
    err = capsys.readouterr().err
    assert "gptlab: 1 of 2 cells failed" in err
    assert re.search(r"arm seeds step reason broken 1 0 signal .*expected one value a token", " ".join(err.split()))
    broken, plain = results(out)["cells"]
    assert (plain["state"], broken["state"]) == ("finished", "failed")
    assert "expected one value a token" in broken["reason"]
    (tmp_path / "broken.py").write_text("def signal(logits, targets):\n    return logits.sum(1)\n")
    assert main(["experiment", "run", str(file), "--out", str(out), "--allow_code"]) == 0
    assert [cell["state"] for cell in results(out)["cells"]] == ["finished", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("match", ["gradient", "update"])
def test_placebos_wait_for_their_arms_and_take_their_norms(
    match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The placebo's arm stands last in the file, so that order alone would start it too late."""
    arms = {"plain": {}, "placebo": {"signal.name": "confidence", "signal.control": "placebo"},
            "sure": {"signal.name": "confidence"}}  # fmt: skip
    file = write(tmp_path, arms, {**HEAD, "seeds": [1, 2], "placebo_match": match}, steps=6)
    out, name = tmp_path / "out", "signal_norm" if match == "gradient" else "step_change"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    for seed in (1, 2):
        norms = {}
        for arm in ("sure", "placebo"):
            rows = (out / arm / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
            norms[arm] = [row[name] for row in map(json.loads, rows) if row["kind"] == "train"]
        assert len(norms["sure"]) == 6
        assert norms["placebo"] == pytest.approx(norms["sure"], rel=2e-3)
    capsys.readouterr()
    assert main(["compare", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["undeclared"] == []
    ratio = result["arms"]["sure"]["placebo"]["norm_ratio"]
    if match == "gradient":
        assert 0.98 < ratio["lowest"] <= ratio["median"] <= ratio["highest"] < 1.02
    assert 0 < result["arms"]["sure"]["dose_of_baseline"]["median"] < 1
    assert main(["experiment", "run", str(file), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ran"] == []


@pytest.mark.slow
def test_a_placebo_whose_arm_fails_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverging = {"signal.name": "confidence", "learning_rate": 1e9, "grad_clip": 0.0}
    arms = {"plain": {}, "sure": diverging, "placebo": {**diverging, "signal.control": "placebo"}}
    file = write(tmp_path, arms, {**HEAD, "seeds": [1], "placebo_match": "gradient"}, steps=6)
    assert main(["experiment", "run", str(file), "--out", str(tmp_path / "out")]) == 3
    assert "expected signal_norm of each of the 6 updates" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_patched_arm_runs_its_own_code_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (package() / "training" / "optimizer.py").read_text().splitlines(True)
    names = ("a/gptlab/training/optimizer.py", "b/gptlab/training/optimizer.py")
    diff = difflib.unified_diff(before, ["# an idea\n", *before], *names)
    (tmp_path / "idea.diff").write_text("".join(diff))
    arms = {"plain": {}, "idea": {"patch": "idea.diff"}}
    file, out = write(tmp_path, arms, {**HEAD, "seeds": [1]}, steps=4), tmp_path / "out"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    recorded = {arm: json.loads((out / arm / "seed_1" / "config.json").read_text()).get("patch") for arm in arms}
    assert recorded["plain"] is None
    assert len(recorded["idea"]) == 64
    losses = {cell["arm"]: cell["weights_sha256"] for cell in results(out)["cells"]}
    assert losses["plain"] == losses["idea"], "a comment changes nothing"
    capsys.readouterr()
    assert main(["compare", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["undeclared"] == []
    assert main(["experiment", "status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == {"finished": 2}
    plain_code = main(["train", "--config", str(out / "idea" / "options.toml"), "--out", str(out / "idea" / "seed_1")])
    assert plain_code == 3, "the run of a patched arm continues with patched code only"
    assert "patch: the run was made by this code under another patch" in capsys.readouterr().err


def test_a_patched_arms_options_are_judged_by_its_code(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "idea.diff").write_text("--- /dev/null\n+++ b/gptlab/idea.py\n@@ -0,0 +1 @@\n+x = 1\n")
    file = write(tmp_path, {"plain": {}, "idea": {"patch": "idea.diff", "lerning_rate": 1.0}})
    runner = Runner(read_experiment(file), tmp_path / "out", Packing(1))
    with pytest.raises(ConfigError, match=r"1 of 2 arms .*\n  idea: .*did you mean 'learning_rate'.* under idea.diff"):
        runner.prepare()


def test_all_arms_are_checked_before_the_first_cell_trains(tmp_path: Path) -> None:
    """A file that is missing, one that does not run, one that ends Python, an unknown function, a patch that fails."""
    (tmp_path / "wrong.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "good.py").write_text("def margin(logits, targets):\n    return logits.sum(1)\n")
    (tmp_path / "no.diff").write_text("--- a/gptlab/errors.py\n+++ b/gptlab/errors.py\n@@ -1 +1 @@\n-a\n+b\n")
    arms = {
        "plain": {}, "missing": {"signal.name": "nowhere.py:f"}, "wrong": {"signal.name": "wrong.py:f"},
        "ends": {"signal.name": "ends.py:f"}, "unknown": {"signal.name": "good.py:margn"},
        "good": {"signal.name": "good.py:margin"}, "patch": {"patch": "no.diff"},
    }  # fmt: skip
    runner = Runner(read_experiment(write(tmp_path, arms)), tmp_path / "out", Packing(1), allow_code=True)
    with pytest.raises(ConfigError) as caught:
        runner.prepare()
    text = str(caught.value)
    assert text.startswith("5 of 7 arms cannot run; nothing is trained:\n")
    for arm, reason in {
        "missing": f"expected a Python file at {tmp_path}/nowhere.py, found none", "unknown": "did you mean 'margin'",
        "wrong": "does not run: ModuleNotFoundError", "ends": "does not run: SystemExit", "patch": "does not apply",
    }.items():  # fmt: skip
        assert re.search(rf"\n  {arm}: .*{re.escape(reason)}", text), text
    assert not list((tmp_path / "out").glob("*/seed_*/metrics.jsonl"))
    assert not (tmp_path / "out" / "experiment.toml").exists()


def test_a_signals_file_lies_next_to_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the command is typed; and the options that its cells are started with name the same file."""
    ideas = tmp_path / "ideas"
    ideas.mkdir()
    (ideas / "good.py").write_text("def margin(logits, targets):\n    return logits.sum(1)\n")
    also = {"signal.name": "good.py:margin", "signal.weight": 0.5}
    write(ideas, {"plain": {}, "good": {"signal.name": "good.py:margin"}, "also": also})
    for here, file in ((tmp_path, "ideas/tiny.toml"), (ideas, "tiny.toml"), (Path("/"), str(ideas / "tiny.toml"))):
        monkeypatch.chdir(here)
        experiment = read_experiment(file)
        for out in (tmp_path / "out", Path("out") if here != Path("/") else tmp_path / "out2"):
            path = options_file(out, experiment.arms["good"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(options_text(experiment, experiment.arms["good"], out))
            name = file_options(path, TrainingConfig)["signal.name"]
            assert Path(name.partition(":")[0]).samefile(ideas / "good.py")
        assert Path(experiment.codes[0].partition(":")[0]).samefile(ideas / "good.py")


def test_the_same_seed_gives_every_arm_the_same_weights_and_data(folder: Path, tmp_path: Path) -> None:
    """At a learning rate of 0 the loss of every step shows the initial weights and that step's data, and no more."""
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    arms = {"plain": still, "sure": {**still, "signal.name": "confidence"},
            "placebo": {**still, "signal.name": "confidence", "signal.control": "placebo"}}  # fmt: skip
    file = write(tmp_path, arms, steps=10)
    runner = Runner(read_experiment(file), tmp_path / "out", Packing(1))
    runner.prepare()
    losses: dict[tuple[str, int], list[float]] = {}
    for cell in runner.cells:
        options = str(tmp_path / "out" / cell.arm.name / "options.toml")
        words = ["train", "--config", options, "--seed", str(cell.seed), "--out", str(cell.folder), "--threads", "1"]
        assert main(words) == 0
        rows = RunFolder(cell.folder).rows()
        losses[cell.arm.name, cell.seed] = [row["loss"] for row in rows if row["kind"] == "train"]
    for seed in (1, 2):
        assert losses["plain", seed] == losses["sure", seed] == losses["placebo", seed]
        assert len(set(losses["plain", seed])) == 10, "ten batches that differ"
    assert not set(losses["plain", 1]) & set(losses["plain", 2])


@pytest.mark.slow
def test_what_was_declared_is_not_changed_once_cells_have_begun(whole: Path, folder: Path, tmp_path: Path) -> None:

    def prepare(**changes: Any) -> None:
        options = {"data": str(folder / "corpus"), **changes.pop("options", {})}
        file = write(tmp_path, changes.pop("arms", ARMS), {**HEAD, **changes}, **options)
        Runner(read_experiment(file), whole, Packing(1)).prepare()

    prepare()
    for changes, named in (
        ({"seeds": [1, 2, 3]}, "seeds and has begun; .* more seeds later are declared as looks"),
        ({"delta": 0.5}, "delta"),
        ({"options": {"weight_decay": 0.2}}, "options"),
        ({"arms": {**ARMS, "sure": {"signal.name": "entropy"}}}, "arms.sure"),
        ({"arms": {"plain": {}, "bad": ARMS["bad"]}}, "arms.sure"),
    ):
        with pytest.raises(ConfigError, match=f"declared otherwise in {named}"):
            prepare(**changes)
    prepare(arms={**ARMS, "late": {"signal.name": "entropy"}})
    prepare()


def test_rows_are_read_on_and_anew_where_a_resume_cut_them(file: Path, tmp_path: Path) -> None:
    cell = cells_of(read_experiment(file), tmp_path)[0]
    cell.folder.mkdir(parents=True)
    metrics = cell.folder / "metrics.jsonl"

    def train(step: int) -> str:
        row = {"step": step, "kind": "train", "loss": 3.0, "tokens": step, "tokens_per_second": 1.0, "dose": step}
        return json.dumps(row) + "\n"

    rows = Rows(cell)
    assert rows.look().step == 0
    metrics.write_text(train(1) + train(2) + train(3)[:9])
    assert (rows.look().step, rows.doses) == (2, [(1, 1), (2, 2)])
    metrics.write_text(train(1) + train(2) + train(3))
    assert (rows.look().step, rows.doses) == (3, [(1, 1), (2, 2), (3, 3)])
    assert rows.dose == 2
    uneven = [(1, 3.0), (2, 3.0), (3, 1.0), (13, 1.0)]
    assert mean_over_updates(uneven) == pytest.approx((2 * 3 + 20 * 1) / 22), "each stands for those up to the next"
    assert (mean_over_updates([(7, 2.5)]), mean_over_updates([])) == (2.5, None)
    metrics.write_text(train(1))
    assert (rows.look().step, rows.doses) == (1, [(1, 1)])
    metrics.write_text(" " + train(1) + train(2))  # cut back and longer again: the old place lies within a line
    assert (rows.look().step, rows.doses) == (2, [(1, 1), (2, 2)])


@pytest.mark.parametrize(
    ("packing", "width", "threads", "at_a_time", "said"),
    [
        (Packing(2), 128, 1, 2, "2 runs at a time of one thread"),
        (Packing(8), 128, 1, 8, "8 runs at a time of one thread"),
        (Packing(8, jobs=3), 128, 1, 3, "3 runs at a time of one thread"),
        (Packing(8, jobs=1), 128, 1, 1, "1 run at a time of one thread"),
        (Packing(2, jobs=9), 128, 1, 2, "2 runs at a time of one thread"),
        (Packing(1), 128, 1, 1, "1 run at a time of one thread"),
        (Packing(8), SIDE_BY_SIDE + 1, 8, 1, "one run over all 8 cores for models wider than"),
        (Packing(8, gpus=2), 768, 8, 2, "one run on each of 2 GPUs"),
        (Packing(8, gpus=4, jobs=3), 128, 1, 3, "one run on each of 3 of 4 GPUs"),
    ],
)
def test_cores_and_gpus_are_shared_out(packing: Packing, width: int, threads: int, at_a_time: int, said: str) -> None:
    assert packing.threads(width) == threads
    running: list[int] = []
    while packing.fits(width, running):
        running.append(width)
    assert len(running) == at_a_time
    assert packing.why({width}).startswith(said)


def test_a_wide_model_waits_for_the_narrow_ones() -> None:
    packing = Packing(4)
    assert not packing.fits(768, [128])
    assert packing.fits(768, [])
    assert not packing.fits(128, [768])
    assert packing.why({128, 768}).count(";") == 1
