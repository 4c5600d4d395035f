"""The run folder: rows that survive a kill, one writer, and damage that is reported with the file's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptlab.errors import CheckpointError
from gptlab.options import build, flatten
from gptlab.runs.folder import RunFolder, newest
from gptlab.runs.session import differences
from gptlab.training.config import FREE_ON_RESUME, TrainingConfig


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
