"""The run folder: rows that survive a kill, one writer, damage that is named; and `--log`, read back by its readers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlab.cli import progress as trackers
from gptlab.cli.main import main
from gptlab.cli.progress import figures, tracking
from gptlab.errors import CheckpointError, ConfigError
from gptlab.options import build, flatten
from gptlab.runs.folder import RunFolder, newest
from gptlab.runs.session import differences
from gptlab.training.config import FREE_ON_RESUME, TrainingConfig
from gptlab.training.loop import Record


def folder_with_rows(path: Path, count: int) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir()
    folder.open_records()
    for step in range(1, count + 1):
        folder.write("train", step, {"loss": step / 8})
    return folder


def test_rows_and_log_lines_are_appended_and_cut_back(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path / "run", 2)
    folder.write("val", 2, {"loss": 0.5})
    lengths = folder.written()
    folder.write("train", 3, {"loss": 9.0})
    folder.write("event", 3, {"event": "Stopped"})
    folder.close()
    again = RunFolder(tmp_path / "run")
    assert [row["kind"] for row in again.rows()] == ["train", "train", "val", "train", "event"]
    again.open_records(**lengths)
    again.write("train", 3, {"loss": 0.375})
    again.close()
    assert [(row["step"], row["kind"], row["loss"]) for row in again.rows()] == [
        (1, "train", 0.125), (2, "train", 0.25), (2, "val", 0.5), (3, "train", 0.375),
    ]  # fmt: skip
    assert (tmp_path / "run" / "log.txt").read_text() == (
        "1 train 0.125000\n2 train 0.250000\n2 val 0.5000\n3 train 0.375000\n"
    )


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder_with_rows(tmp_path / "run", 2).close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "tra')
    assert [row["step"] for row in RunFolder(tmp_path / "run").rows()] == [1, 2]


def test_a_row_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    folder_with_rows(tmp_path / "run", 2).close()
    for damage in ("}{\n", "[1]\n", '{"loss": 1}\n', "\udcff\n"):
        path = tmp_path / "run" / "metrics.jsonl"
        first = path.read_bytes().splitlines(keepends=True)[0]
        path.write_bytes(first + damage.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: expected a row"):
            list(RunFolder(tmp_path / "run").rows())
        assert RunFolder(tmp_path / "run").finished(1) is None


def test_records_shorter_than_the_checkpoint_says_are_refused(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path / "run", 2)
    length = folder.written()["metrics_bytes"]
    folder.close()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is shorter than its checkpoint says"):
        RunFolder(tmp_path / "run").open_records(length + 1)


def test_no_row_holds_what_json_does_not(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write("train", 2, {"loss": float("nan")})
    folder.close()
    assert len(list(folder.rows())) == 1


def test_one_writer_at_a_time_and_the_holder_is_named(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()} on .*give another --out"):
        second.lock(patience=0.3)
    first.close()
    second.lock(patience=0)
    second.close()


def test_a_lock_goes_with_its_process_however_it_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time; from gptlab.runs.folder import RunFolder as R; f = R(sys.argv[1]); f.lock(); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "run")])
    try:
        folder = RunFolder(tmp_path / "run")
        while holder.poll() is None and not (
            (tmp_path / "run" / ".lock").exists() and str(holder.pid) in (tmp_path / "run" / ".lock").read_text()
        ):
            time.sleep(0.02)
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"):
            folder.lock(patience=0)
    finally:
        holder.kill()
        holder.wait()
    folder.lock()
    folder.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: expected JSON, found Expecting property name"),
        ("[]", "is damaged: expected a JSON object with options"),
        ('{"options": 3}', "is damaged: expected a JSON object with options"),
        ('{"options": {"stepz": 1}}', "is no config of this version: unknown option 'stepz'; did you mean 'steps'"),
        ('{"options": {"steps": "many"}}', "is no config of this version"),
    ],
)
def test_a_damaged_config_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json ") as caught:
        RunFolder(tmp_path).config()
    assert message in str(caught.value)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run folder, found no config\.json in"):
        RunFolder(tmp_path).config()
    with pytest.raises(CheckpointError, match="expected a run or a checkpoint, found none at"):
        newest(tmp_path)


def test_a_config_is_recorded_and_read_back(tmp_path: Path) -> None:
    config = TrainingConfig(steps=9, min_lr=1e-5, signal=replace(TrainingConfig().signal, name="brier", layers=(1, 2)))
    RunFolder(tmp_path).record("config.json", {"options": flatten(config)})
    assert RunFolder(tmp_path).config() == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["options"]["signal.layers"] == [1, 2]


def test_only_what_is_free_on_resume_and_more_steps_are_no_difference() -> None:
    own = {"signal.name": "brier", "signal.control": "placebo"}
    before = build(TrainingConfig, own)
    free = {
        "signal.placebo_of": "x",
        "signal.listener": "self",
        "out": "x",
        "resume": "must",
        "device": "cpu",
        "compile": "on",
        "log": "tensorboard",
    }
    free |= dict.fromkeys(FREE_ON_RESUME - free.keys(), 3)
    assert differences(before, build(TrainingConfig, {**own, **free, "steps": before.steps + 1})) == []
    changed = replace(before, seed=2, steps=before.steps - 1, weight_decay=0.3)
    assert [line.partition(":")[0] for line in differences(before, changed)] == ["seed", "steps", "weight_decay"]


def test_who_waits_for_a_folder_that_is_moved_away_gets_the_one_at_its_place(tmp_path: Path) -> None:
    path, waiting = tmp_path / "run", RunFolder(tmp_path / "run")
    holder, other = RunFolder(path), RunFolder(path)
    holder.lock()
    waits = threading.Thread(target=waiting.lock)
    waits.start()
    time.sleep(0.3)
    path.rename(tmp_path / "trash")
    holder.close()
    waits.join()
    with pytest.raises(CheckpointError, match="is being written by"):
        other.lock(patience=0)
    assert (path / ".lock").is_file()
    waiting.close()


Words = Callable[..., list[str]]
Capture = pytest.CaptureFixture[str]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{scalar: (step, value) of every event} as TensorBoard sees them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, in the precision that event files have."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in RunFolder(folder).rows():
        if row["kind"] in ("train", "val"):
            values = {key: value for key, value in row.items() if key not in ("step", "kind")}
            for name, value in figures(row["kind"], values).items():
                found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6, abs=1e-12)))
    return found


def digest(folder: Path, capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["digest", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["sha256"]


def test_tensorboard_holds_every_figure_once_also_after_a_resume_and_changes_no_run(
    tiny: Words, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    words = tiny(out, signal_name="confidence", sample_every=3, checkpoint_every=3, log="tensorboard")
    assert main(words) == 0
    assert digest(out, capsys) == digest(finished_run, capsys), "watched or not, the run is the same"
    seen = read_back(out)
    assert seen == recorded(out)
    assert {"train/loss", "train/signal_by_judge/1", "val/loss", "val/block_loss/2"} <= seen.keys()
    assert [step for step, _ in seen["train/loss"]] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(out / "checkpoints" / "step_00000006")  # as if it was killed in its last step
    assert main([*words, "--steps=8"]) == 0
    assert len(list(out.glob("events.out.tfevents.*"))) == 2
    assert [step for step, _ in read_back(out)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_back(out) == recorded(out)


class Fake(types.ModuleType):
    """A tracker's module: keeps what `init`, `log` and `finish` are given. chosen: what its own settings say."""

    def __init__(self, chosen: set[str]) -> None:
        super().__init__("fake")
        self.chosen, self.asked, self.rows, self.finished = chosen, {}, [], False

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(model_fields_set=self.chosen))

    def Settings(self, **asked: Any) -> dict[str, Any]:
        return asked

    def init(self, **asked: Any) -> Fake:
        print("a greeting")
        self.asked = asked
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if values.get("train/loss") == 13:
            raise RuntimeError("no room\nat all")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_project_and_a_name_are_what_was_asked(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(set())
    monkeypatch.setitem(sys.modules, tracker, fake)
    config = TrainingConfig(log=tracker, log_project="sure", log_name="first try")
    with tracking(config, tmp_path / "run", 0, print):
        pass
    assert (fake.asked["project"], fake.asked["name"]) == ("sure", "first try")


@pytest.mark.parametrize(("chosen", "mode"), [(set(), "offline"), ({"mode"}, None)])
def test_wandb_is_offline_unless_the_user_chose(
    chosen: set[str], mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake = Fake(chosen)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    config = TrainingConfig(log="wandb", seed=7)
    with tracking(config, tmp_path / "run", 0, print) as track:
        track(Record("train", 1, {"loss": 2.0, "clipped": True, "signal_by_judge": [None, 0.5]}))
        track(Record("sample", 1, {"tokens": [1, 2]}))
        track(Record("val", 1, {"loss": 3.0}))
    assert (fake.asked["project"], fake.asked["mode"], fake.asked["config"]["seed"]) == ("gptlab", mode, 7)
    expected = {"train/loss": 2.0, "train/clipped": 1.0, "train/signal_by_judge/2": 0.5}
    assert fake.rows == [(1, expected), (1, {"val/loss": 3.0})]
    assert fake.asked["name"] == "run"
    assert fake.finished
    assert capsys.readouterr().out == "", "standard output is for --json"


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {name: Fake(set()) for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(fakes["trackio"], "log", lambda values, step: fakes["trackio"].rows.append(step))
    notes: list[str] = []
    with tracking(TrainingConfig(log="wandb, trackio"), tmp_path, 0, notes.append) as track:
        for step, loss in enumerate((2.0, 13.0, 2.0), start=1):
            track(Record("train", step, {"loss": loss}))
    assert notes == ["wandb logs no more: RuntimeError: no room"]
    assert ([step for step, _ in fakes["wandb"].rows], fakes["trackio"].rows) == ([1], [1, 2, 3])

    def refuse(**asked: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(fakes["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match="--log wandb cannot begin: RuntimeError: not logged in; leave it out"):
        tracking(TrainingConfig(log="trackio,wandb"), tmp_path, 0, print).__enter__()
    assert fakes["trackio"].finished, "what had begun is ended"


@pytest.mark.parametrize(
    ("log", "code", "line"),
    [
        ("tensorbord", 2, "log: expected none, tensorboard, wandb, trackio or several with commas, found 'tensorbord'; "
                          "did you mean 'tensorboard'?"),
        ("tensorboard,", 2, "found ''"),
        ("wandb", 3, "--log wandb needs the package wandb, which is not installed; pip install wandb"),
        ("tensorboard", 3, "the package tensorboard, which is not installed; pip install 'tensorboard>="),
    ],
)  # fmt: skip
def test_what_cannot_log_is_said_before_anything_begins(
    log: str, code: int, line: str, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(tiny(tmp_path / "run", log=log)) == code
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_log_is_no_part_of_a_run_and_no_prefix_of_log_every(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    assert "log" in FREE_ON_RESUME
    assert main([*tiny(tmp_path / "run"), "--log_ever", "2"]) == 2
    assert "unknown argument '--log_ever'; did you mean '--log_every'?" in capsys.readouterr().err
