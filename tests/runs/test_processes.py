"""Processes that we start: what they import, and when they end. Planted files leave a mark when they are imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, alive, wait_until  # pyright: ignore[reportMissingImports]
from tiny_experiment import write  # pyright: ignore[reportMissingImports]

from gptlab.processes import end_with, how_it_ended, package, python_command

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
