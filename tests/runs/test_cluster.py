"""Experiments as jobs: submitit's own local processes, and Slurm behind programs that answer as Slurm's do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm  # pyright: ignore[reportMissingImports]
from harness import ROOT, alive, wait_until  # pyright: ignore[reportMissingImports]
from tiny_experiment import HEAD, RunnerProcess, rows, write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.options import options_of
from gptlab.runs.cells import LEASE, Cell, Claim, Rows, cells_of, claimed, lease, leased, revoke
from gptlab.runs.cluster import FOLDER, TRIES, JobOptions, Jobs
from gptlab.runs.experiment_spec import read_experiment

Start = Callable[..., RunnerProcess]
LONG = {"steps": 400, "checkpoint_every": 40, "eval_every": 200}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {"plain": {}, "sure": {"signal.name": "confidence"}}
    return write(tmp_path_factory.mktemp("cluster"), arms, {**HEAD, "seeds": [1]}, **LONG)


@pytest.fixture(scope="module")
def expected(file: Path) -> bytes:
    """results.json of the experiment run by processes of this machine."""
    out = file.parent / "whole"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    return (out / "results.json").read_bytes()


@pytest.fixture
def start(file: Path) -> Iterator[Start]:
    started: list[RunnerProcess] = []

    def runner(out: Path, *words: str) -> RunnerProcess:
        started.append(RunnerProcess(file, out, *words))
        return started[-1]

    yield runner
    for one in started:
        one.abandon()


def cells(file: Path, out: Path) -> list[Cell]:
    return cells_of(read_experiment(file), out)


def pickles(out: Path) -> int:
    return len(list((out / FOLDER).glob("*_submitted.pkl")))


@pytest.mark.slow
def test_jobs_outlive_a_killed_runner_are_watched_by_the_next_and_stopped_with_it(
    file: Path, expected: bytes, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(out, "--executor", "local", "--jobs", "2")
    wait_until(lambda: all(Rows(cell).look().step for cell in cells(file, out)), "both jobs at work")
    controllers = first.trainers()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    before = rows(out)
    second = start(out, "--executor", "local", "--jobs", "2")
    wait_until(lambda: rows(out) > before, "rows of jobs without a runner")
    watched = ("running", "finished")  # on a busy machine jobs may end before the runner has begun
    wait_until(lambda: any(word in second.log() for word in watched), "a runner that watches them")
    assert pickles(out) == 2, "none was submitted again"
    second.send(signal.SIGTERM)
    code, _, err = second.end()
    stopped = [cell for cell in cells(file, out) if Rows(cell).look().event == "Stopped"]
    if stopped:
        assert code == 75, err
        assert "run the same command again to continue" in err
    assert not any(map(claimed, cells(file, out))), "the runner waited for what it stopped"
    wait_until(lambda: not any(map(alive, controllers)), "the end of submitit's processes")
    code, _, err = start(out, "--executor", "local").end()
    assert code == 0, err
    assert pickles(out) == 2 + len(stopped)
    assert (out / "results.json").read_bytes() == expected
    assert not list(out.glob(f"*/*/{LEASE}*"))


@pytest.mark.slow
def test_slurm_jobs_are_neither_lost_nor_doubled(
    file: Path, expected: bytes, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm, out = FakeSlurm(tmp_path / "slurm", held=True), tmp_path / "out"
    monkeypatch.setenv("PATH", slurm.path)
    words = ("--executor", "slurm", "--slurm", "partition=gpu", "--slurm", "timeout_min=7")
    first = start(out, *words)
    wait_until(lambda: all("id" in leased(cell.folder) for cell in cells(file, out)), "two jobs in the queue")
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    script = (slurm.folder / "1.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --time=7\n" in script
    lost = next(cell.folder for cell in cells(file, out) if str(leased(cell.folder)["id"]) == "1")
    second = start(out, *words)
    slurm.release()
    wait_until(lambda: any(lost.glob("checkpoints/step_*/MANIFEST.json")), "a checkpoint of job 1")
    slurm.lose_node(1)
    code, said, err = second.end()
    assert code == 0, err
    assert slurm.submitted == 3, "the queued ones once, and the one whose node went down once more"
    assert sorted(json.loads(said)["ran"]) == ["plain/seed_1", "sure/seed_1"]
    assert (out / "results.json").read_bytes() == expected
    slurm.wait_for_end()


def test_stopping_takes_waiting_jobs_out_of_the_queue(
    file: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm, out = FakeSlurm(tmp_path / "slurm", held=True), tmp_path / "out"
    monkeypatch.setenv("PATH", slurm.path)
    runner = start(out, "--executor", "slurm", "--jobs", "1")
    wait_until(lambda: "id" in leased(cells(file, out)[0].folder), "a job in the queue")
    runner.send(signal.SIGTERM)
    code, said, err = runner.end()
    assert code == 75, err
    assert json.loads(said.partition('\n{"error"')[0])["states"] == {"waiting": 2}
    assert slurm.submitted == 1, "--jobs bounds how many are queued"
    assert (slurm.folder / "1.cancelled").exists()
    slurm.wait_for_end()


def test_a_job_without_its_lease_trains_nothing(file: Path, tmp_path: Path) -> None:
    """Run as on a node: a newer job, or a stopped runner, has made it needless before it began."""
    cell = cells(file, tmp_path)[0]
    cell.folder.mkdir(parents=True)
    lease(cell.folder, "newer")
    revoke(cell.folder, "older")
    assert leased(cell.folder)["token"] == "newer"
    call = f"train_cell('', '', {str(cell.folder)!r}, 'older', 'no', 'train', '--help')"
    script = f"from gptlab.runs.cluster import train_cell; print({call})"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "not needed any more" in done.stdout
    assert done.stdout.endswith("75\n")
    assert not list(cell.folder.glob("output.txt"))


def test_jobs_that_save_nothing_further_are_not_submitted_for_ever(file: Path, tmp_path: Path) -> None:
    cell, jobs = cells(file, tmp_path)[0], Jobs("local", "tiny", tmp_path, JobOptions())

    def saved(step: int) -> None:
        folder = cell.folder / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()

    assert [jobs.again(cell) for _ in range(TRIES)] == [True, True, False]
    saved(40)
    assert jobs.again(cell), "it came further"
    assert [jobs.again(cell) for _ in range(TRIES - 1)] == [True, True]
    saved(80)
    assert [jobs.again(cell) for _ in range(1 + TRIES)] == [True, True, True, False]


def test_a_cell_whose_jobs_die_is_shown_failed_with_the_logs_last_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm, out = FakeSlurm(tmp_path / "slurm"), tmp_path / "out"
    monkeypatch.setenv("PATH", slurm.path)
    (slurm.bin / "srun").write_text(
        "#!/bin/sh\n"
        f'echo "slurmstepd: error: Detected 1 oom_kill event" > {out}/{FOLDER}/"$SLURM_JOB_ID"_0_log.out\n'
        "exit 137\n"
    )
    assert main(["experiment", "run", str(file), "--out", str(out), "--executor", "slurm", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["states"] == {"failed": 2}
    assert slurm.submitted == 2 * TRIES
    for cell in found["cells"]:
        assert cell["reason"].startswith("3 jobs in a row saved no further checkpoint; the last, ")
        assert cell["reason"].endswith("ends: slurmstepd: error: Detected 1 oom_kill event")
    slurm.wait_for_end()


def test_a_submission_that_slurm_refuses_is_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", slurm.path)
    (slurm.bin / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: no' >&2\nexit 1\n")
    out = tmp_path / "out"
    words = ["--executor", "slurm", "--slurm", "partition=no"]
    assert main(["experiment", "run", str(file), "--out", str(out), *words]) == 3
    assert "the job was not accepted: sbatch: error: invalid partition specified: no" in capsys.readouterr().err
    claim = Claim.take(cells(file, out)[0].folder)
    assert claim, "nobody has the cell"
    claim.release()


def test_job_options_are_read_with_clear_refusals() -> None:
    asked = JobOptions.read(
        ["partition=gpu", "timeout-min=30", "gpus_per_node=1", "mem_gb=16", "setup=module load cuda"]
    )
    assert asked.parameters() == {
        "slurm_partition": "gpu", "timeout_min": 30, "slurm_signal_delay_s": 120, "gpus_per_node": 1, "mem_gb": 16.0,
        "slurm_setup": ["module load cuda"],
    }  # fmt: skip
    for word, line in (
        ("partitoin=gpu", "unknown key 'partitoin'; did you mean 'partition'?; there are partition, account,"),
        ("gpus_per_node=8", "gpus_per_node: expected 0 or 1, a cell is one process; found 8"),
        ("timeout_min=soon", "timeout_min: expected a whole number, found 'soon'"),
        ("timeout_min=0", "timeout_min: expected at least 1, found 0"),
        ("gpu", "expected KEY=VALUE, found 'gpu'"),
    ):
        with pytest.raises(ConfigError) as error:
            JobOptions.read([word])
        assert line in str(error.value)


def test_submitit_knows_every_job_option() -> None:
    from submitit import AutoExecutor, SlurmExecutor

    known = AutoExecutor._typed_parameters().keys() | SlurmExecutor._valid_parameters()
    assert {option.key for option in options_of(JobOptions)} <= known


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["run", "{file}", "--executor", "slurn"], 2, "expected slurm, local, found 'slurn'"),
        (["run", "{file}", "--slurm", "qos=high"], 2, "--slurm is for jobs of a cluster: add --executor slurm"),
        (["smoke", "{file}", "--executor", "local"], 2, "--executor is for run, found it with smoke"),
        (["run", "{file}", "--executor", "slurm", "--slurm", "q=1"], 2, "--slurm: unknown key 'q'"),
        (["run", "{file}", "--executor", "slurm"], 3, "expected Slurm's srun and sbatch on PATH, found none"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], code: int, line: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *(word.format(file=file) for word in words)]) == code
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_without_submitit_the_option_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gptlab.runs.cluster.find_spec", lambda name: None)
    assert main(["experiment", "run", str(file), "--executor", "local"]) == 3
    assert "needs the package submitit, which is not installed; pip install 'submitit>=" in capsys.readouterr().err
