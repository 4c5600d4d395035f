"""Processes that we start: what they import, when they end; and cells forked, the same run with the same ends."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT, alive, wait_until  # pyright: ignore[reportMissingImports]
from tiny_experiment import (
    children,
    write,  # pyright: ignore[reportMissingImports]
)

from gptlab.errors import Stopped
from gptlab.files import is_locked
from gptlab.processes import end_with, how_it_ended, package, python_command
from gptlab.runs.cells import CLAIM, OUTPUT, Cell, Claim
from gptlab.runs.executor import Child, Children, ForkedChild, Packing, PatchedPackage
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import read_experiment

PLANTED = (
    "numpy",
    "torch",
    "json",
    "gptlab",
    "sitecustomize",
    "usercustomize",
    "triton",
    "optree",
    "wandb",
    "submitit",
)


@pytest.fixture
def plant(tmp_path: Path) -> Callable[..., Path]:
    """Put modules that Python would find first into a folder; gives the folder of their marks, empty so far."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def into(folder: Path, *names: str) -> Path:
        folder.mkdir(exist_ok=True)
        for name in names or PLANTED:
            line = f"open({str(marks / name)!r}, 'w').close()\n"
            (folder / f"{name}.py").write_text(line)
            if name not in ("sitecustomize", "usercustomize"):
                (folder / name).mkdir(exist_ok=True)
                (folder / name / "__init__.py").write_text(line)
        return marks

    return into


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_child_imports_nothing_that_lies_around(plant: Callable[..., Path], tmp_path: Path) -> None:
    found = plant(tmp_path / "here")
    unsafe = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, "-c", "import numpy"], cwd=tmp_path / "here", env=unsafe, check=True)
    assert marks(found) == ["numpy"], "Python alone would import it"
    (found / "numpy").unlink()
    command = python_command("gptlab.cli.main:main", "bench", "--help")
    done = subprocess.run(command, cwd=tmp_path / "here", env=unsafe, check=True, capture_output=True, text=True)
    assert "gptlab bench" in done.stdout
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import numpy, json'], check=True)"
    command = [word.replace("from gptlab.cli.main import main; sys.exit(main(sys.argv[3:]))", grandchild)
               for word in python_command("gptlab.cli.main:main")]  # fmt: skip
    subprocess.run(command, cwd=tmp_path / "here", env=unsafe, check=True)
    assert marks(found) == []


def test_what_lies_next_to_the_package_is_not_imported(plant: Callable[..., Path], tmp_path: Path) -> None:
    """As in a checkout, into which somebody has put a file."""
    checkout = tmp_path / "checkout"
    found = plant(checkout, *set(PLANTED) - {"gptlab", "sitecustomize", "usercustomize"})
    shutil.copytree(package(), checkout / "gptlab", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "gptlab" / "marker.py").write_text("def main(words):\n    import json, torch\n    print(__file__)\n")
    done = subprocess.run(
        python_command("gptlab.marker:main", code=checkout), cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(checkout / "gptlab" / "marker.py"), "this package and no other"
    assert marks(found) == []


@pytest.mark.parametrize("how", ["script", "module"])
def test_our_own_commands_import_nothing_that_lies_around(how: str, plant: Callable[..., Path], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    found = plant(checkout, *set(PLANTED) - {"gptlab", "sitecustomize", "usercustomize", "submitit"})
    shutil.copytree(package(), checkout / "gptlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_gpt2.py", checkout)
    command = ["train_gpt2.py"] if how == "script" else ["-m", "gptlab", "doctor"]
    words = [*command, *(["--steps", "0"] if how == "script" else ["--json"])]
    done = subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True, text=True, check=False)
    assert (done.returncode, marks(found)) == (3 if how == "script" else 0, []), done.stderr


def test_an_experiments_cells_import_nothing_that_lies_around(plant: Callable[..., Path], tmp_path: Path) -> None:
    """Neither of the folder in which the command is typed nor of the experiment's; a patched arm's least of all."""
    found = plant(tmp_path / "here")
    (tmp_path / "here" / "idea.diff").write_text("--- /dev/null\n+++ b/gptlab/idea.py\n@@ -0,0 +1 @@\n+x = 1\n")
    arms = {"plain": {}, "idea": {"patch": "idea.diff"}}
    file = write(tmp_path / "here", arms, {"name": "tiny", "baseline": "plain", "seeds": [1]}, steps=2)
    words = ["experiment", "run", str(file), "--out", "out"]
    command = [str(Path(sys.executable).with_name("gptlab")), *words]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=False)
    assert (done.returncode, marks(found)) == (0, []), done.stderr


def test_nobody_else_starts_python() -> None:
    """One helper builds the command of every child: whoever needs the interpreter's path asks it."""
    where = {}
    for path in sorted((ROOT / "gptlab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable":
                where[path.relative_to(ROOT).as_posix()] = node.lineno
    with_safe_path = {"gptlab/runs/cluster.py", "gptlab/data/corpora.py"}  # submitit and pip, each with -P
    assert set(where) == {"gptlab/processes.py", *with_safe_path}


def test_a_child_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    shutil.copytree(package(), tmp_path / "gptlab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "gptlab" / "sleeping.py").write_text("import time\ndef main(words):\n    time.sleep(60)\n")
    starting = (
        "import subprocess, sys, time; from pathlib import Path; from gptlab.processes import python_command\n"
        "words = python_command('gptlab.sleeping:main', code=Path(sys.argv[1]), ends_with_us=True)\n"
        "print(subprocess.Popen(words).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starting, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not alive(child), "the child's end", 10.0)
    finally:
        parent.kill()
        parent.communicate()


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    script = f"from gptlab.processes import end_with; end_with({os.getpid() + 10**6}); print('still there')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert end_with.__doc__


@pytest.mark.parametrize(("code", "words"), [(3, "exit code 3"), (-9, "SIGKILL; was memory short"), (-15, "SIGTERM")])
def test_an_end_in_words(code: int, words: str) -> None:
    assert re.search(words, how_it_ended(code))


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only")


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


@ONLY_LINUX
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


@ONLY_LINUX
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


@ONLY_LINUX
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


@ONLY_LINUX
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


@ONLY_LINUX
def test_other_code_gets_a_process_of_its_own(place: Path, workers: Children) -> None:
    cell = runner(place, "patched").cells[0]
    claim = Claim.take(cell.folder)
    assert claim
    code = PatchedPackage({"gptlab/__init__.py": "", "gptlab/processes.py": "raise SystemExit(7)"})
    child = workers.start(cell, claim, code, ["--version"])
    assert type(child) is Child
    assert end(child) == (7, "ended with exit code 7")
