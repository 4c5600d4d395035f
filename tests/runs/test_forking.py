"""Cells forked from a process that has imported PyTorch: the same run as in a process of their own, the same ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_experiment import ROOT, alive, children, wait_until, write  # pyright: ignore

from gptlab.errors import Stopped
from gptlab.files import is_locked
from gptlab.runs.cells import CLAIM, OUTPUT, Cell, Claim
from gptlab.runs.executor import Child, Children, ForkedChild, Packing, PatchedPackage
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import read_experiment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forked")
    write(folder, {"plain": {}, "taught": {"signal.name": "confidence"}}, threads=1)
    return folder


@pytest.fixture(scope="module")
def workers() -> Iterator[Children]:
    """One server for all tests here."""
    workers = Children()
    workers._forks = True  # also where the tests run next to a GPU
    yield workers
    workers.close()


def runner(place: Path, out: str) -> Runner:
    made = Runner(read_experiment(place / "tiny.toml"), place / out, Packing(1))
    made.prepare()
    return made


def start(workers: Children, cell: Cell, words: list[str]) -> Child:
    claim = Claim.take(cell.folder)
    assert claim
    return workers.start(cell, claim, None, words)


def end(child: Child) -> tuple[int, str | None]:
    wait_until(child.over, "the end of a cell", 300.0)
    return child.code, child.close()


def files(folder: Path) -> dict[str, bytes]:
    """What a cell's folder holds but for moments and speeds, which differ between any two runs."""
    kept = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".txt") or name in ("environment.json", "config.json"):
            kept[name] = path.read_bytes().replace(str(folder).encode(), b"")
    return kept


def losses(folder: Path) -> list[tuple[object, ...]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["kind"], row.get("loss"), row.get("grad_norm"), row.get("dose")) for row in rows]


def test_a_forked_cell_is_the_run_that_a_process_of_its_own_makes(place: Path, workers: Children) -> None:
    """Bit for bit: weights and moments, log.txt, what is said of machine and config; one after another, or together."""
    forked, own = runner(place, "forked"), runner(place, "own")
    started = [start(workers, cell, forked.words(cell, 0)) for cell in forked.cells[:2]]
    assert all(isinstance(child, ForkedChild) for child in started)
    assert [end(child) for child in started] == [(0, None)] * 2
    cell, other = own.cells[1], forked.cells[1]
    assert cell.arm.name == "taught"
    claim = Claim.take(cell.folder)
    assert claim
    assert end(Child(cell.folder, claim, None, own.words(cell, 0))) == (0, None)
    theirs, ours = files(cell.folder), files(other.folder)
    for said in (theirs, ours):
        said.pop(OUTPUT)  # seconds are among what is said there
    assert any(file.endswith(".safetensors") for file in ours)
    assert ours == theirs
    assert losses(other.folder) == losses(cell.folder)


def test_a_forked_cell_stops_fails_and_dies_as_any_process(place: Path, workers: Children) -> None:
    made = runner(place, "ends")
    cell = made.cells[0]
    words = [*made.words(cell, 0), "--steps", "100000", "--eval_every", "0"]
    child = start(workers, cell, words)
    wait_until(lambda: (cell.folder / "metrics.jsonl").exists(), "rows", 300.0)
    assert Claim.take(cell.folder) is None  # it is the cell's as long as that runs
    child.stop()
    assert end(child) == (Stopped.exit_code, None)
    assert "with a checkpoint saved" in (cell.folder / OUTPUT).read_text()
    child = start(workers, cell, [*words[:-2], "--stepz", "3"])
    assert end(child) == (2, "ended with exit code 2")
    assert "--steps" in (cell.folder / OUTPUT).read_text()
    child = start(workers, cell, words)
    child.kill()
    assert end(child) == (-signal.SIGKILL, "ended by SIGKILL; was memory short?")
    claim = Claim.take(cell.folder)
    assert claim
    claim.release()


def test_a_server_that_dies_takes_its_cells_along_and_is_replaced(place: Path, workers: Children) -> None:
    made = runner(place, "served")
    cell = made.cells[0]
    words = [*made.words(cell, 0), "--steps", "100000", "--eval_every", "0"]
    child = start(workers, cell, words)
    server = workers._server
    assert server
    wait_until(lambda: bool(children(server._process.pid)), "the fork", 300.0)
    (process,) = children(server._process.pid)
    os.kill(server._process.pid, signal.SIGKILL)
    assert end(child) == (-signal.SIGKILL, "ended by SIGKILL; was memory short?")
    wait_until(lambda: not alive(process), "the cell's end", 30.0)
    wait_until(lambda: not is_locked(cell.folder / CLAIM), "the claim, which the last of its threads lets go", 30.0)
    child = start(workers, cell, ["--version"])
    assert end(child) == (0, None)
    assert (cell.folder / OUTPUT).read_text().startswith("gptlab ")


def test_cells_end_with_their_runner(place: Path) -> None:
    made = runner(place, "orphans")
    cell = made.cells[0]
    words = [*made.words(cell, 0), "--steps", "100000", "--eval_every", "0"]
    script = (
        "import sys, time; from pathlib import Path; from gptlab.runs.cells import Claim;"
        "from gptlab.runs.executor import ForkedChild; from gptlab.processes import ForkServer;"
        "folder = Path(sys.argv[1]); claim = Claim.take(folder);"
        "child = ForkedChild(ForkServer(), folder, claim, sys.argv[2:]); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(cell.folder), *words], cwd=ROOT)
    try:
        wait_until(lambda: (cell.folder / "metrics.jsonl").exists(), "rows", 300.0)
        (server,) = children(process.pid)
        (training,) = children(server)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not alive(server) and not alive(training), "their end", 30.0)
    wait_until(lambda: not is_locked(cell.folder / CLAIM), "the claim, which the last of their threads lets go", 30.0)


def test_other_code_gets_a_process_of_its_own(place: Path, workers: Children) -> None:
    cell = runner(place, "patched").cells[0]
    claim = Claim.take(cell.folder)
    assert claim
    code = PatchedPackage({"gptlab/__init__.py": "", "gptlab/processes.py": "raise SystemExit(7)"})
    child = workers.start(cell, claim, code, ["--version"])
    assert type(child) is Child
    assert end(child) == (7, "ended with exit code 7")
