"""An experiment with [tune] run with real processes: trials, the choice, cells; killed on the way, and identical."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import RunnerProcess, write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main

ARMS = {"plain": {}, "sure": {"signal.name": "confidence", "signal.dose": 0.3}}
HEAD = {"name": "tiny", "preset": "shakespeare-tiny-v1", "baseline": "plain", "seeds": [1]}
TUNE = {"seeds": [101], "learning_rate": [0.1, 1]}
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write(folder, ARMS, HEAD, TUNE, steps=STEPS)


@pytest.fixture(scope="module")
def whole(folder: Path, file: Path) -> Path:
    """The tiny experiment, run in one go."""
    out = folder / "whole"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    return out


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_cells_run_with_what_their_arms_trials_chose(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = {(cell["arm"], cell["seed"]): cell["loss"] for cell in content(whole / ".tune" / "results.json")["cells"]}
    assert list(trials) == [(f"{arm}.lr{factor}", 101) for arm in ("plain", "sure") for factor in ("0.1", "1")]
    for arm in ARMS:
        best = min((0.1, 1), key=lambda factor: trials[f"{arm}.lr{factor:g}", 101])
        chosen = content(whole / "tuning.json")["arms"][arm]
        assert (chosen["options"], chosen["loss"]) == ({"learning_rate": 0.01 * best}, trials[f"{arm}.lr{best:g}", 101])
        assert content(whole / arm / "seed_1" / "config.json")["options"]["learning_rate"] == 0.01 * best
    assert [(cell["arm"], cell["state"]) for cell in content(whole / "results.json")["cells"]] == [
        ("plain", "finished"),
        ("sure", "finished"),
    ]
    assert main(["experiment", "status", str(whole), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["states"] == {"finished": 6}
    assert status["tuning"] == content(whole / "tuning.json")


@pytest.mark.slow
def test_nothing_runs_again_where_it_was_run_or_where_its_packed_copy_lies(
    whole: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_of_it, packed = tmp_path / "packed.json.gz", tmp_path / "packed"
    assert main(["experiment", "pack", str(whole), "--out", str(file_of_it)]) == 0
    assert main(["experiment", "unpack", str(file_of_it), "--out", str(packed)]) == 0
    before = (whole / "results.json").read_bytes()
    for out in (whole, packed):
        capsys.readouterr()
        assert main(["experiment", "run", str(file), "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ran"] == []
    assert (whole / "results.json").read_bytes() == before
    assert (packed / "tuning.json").read_bytes() == (whole / "tuning.json").read_bytes()


@pytest.mark.slow
def test_killed_among_trials_and_among_cells_and_identical(whole: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    a_cell = STEPS + 2  # rows: updates, validation, its end
    for at in (a_cell + 3, 4 * a_cell + 3):
        runner = RunnerProcess(file, out)
        try:
            runner.wait_for_rows(at)
            runner.send(signal.SIGKILL)
            assert runner.end()[0] == -signal.SIGKILL
        finally:
            runner.abandon()
    assert (out / "tuning.json").is_file(), "the second kill was among cells"
    last = RunnerProcess(file, out)
    try:
        code, _, err = last.end()
    finally:
        last.abandon()
    assert code == 0, err
    for name in ("results.json", "tuning.json", ".tune/results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
