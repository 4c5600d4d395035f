"""The floors of the house: every import of gptlab/, read by syntax tree; and what is not loaded before its time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    **dict.fromkeys(("errors", "files", "parsing", "randomness", "options"), 0),
    **dict.fromkeys(("device", "distributed", "processes"), 0),
    "data": 1, "model": 2, "signals": 3, "training": 4, "runs": 5,
    "analysis": 6, "judge": 6, "interpret": 6, "evals": 6, "benchmark": 6, "page": 7, "cli": 8, "api": 9, "__main__": 9,
}  # fmt: skip
SIDE_BY_SIDE = {"analysis", "interpret", "evals", "benchmark"}
"""Rooms of one floor that know nothing of each other."""


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module of gptlab, line, whether it runs when the file is imported) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(inner) for node in tree.body if not _postponed(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its floor"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top


def _postponed(node: ast.stmt) -> bool:
    functions = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return isinstance(node, functions) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "gptlab").parts[0].removesuffix(".py")


FILES = sorted((ROOT / "gptlab").rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_its_own_floor_or_lower(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        assert not [module for module, _, at_once in imports(path) if at_once and module.startswith("gptlab")]
        return
    for module, line, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "gptlab" or len(parts) < 2 or parts[1] == "__version__" or (parts[1] not in FLOORS):
            continue
        theirs = parts[1]
        where = f"{path}:{line}: {mine} (floor {FLOORS[mine]}) imports {module} (floor {FLOORS[theirs]})"
        assert FLOORS[theirs] <= FLOORS[mine], where
        assert theirs == mine or not {mine, theirs} <= SIDE_BY_SIDE, where


def test_the_reader_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import gptlab.a\nif True:\n    from gptlab import b\ndef f():\n    from gptlab.c import d\n")
    assert list(imports(file)) == [("gptlab.a", 1, True), ("gptlab.b", 3, True), ("gptlab.c.d", 5, False)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_of_extras_are_imported_where_they_are_used(path: Path) -> None:
    """Packages of extras may be missing: no file needs them to be imported itself."""
    extras = {"datasets", "transformers", "pyarrow", "matplotlib", "jinja2", "lm_eval"}
    extras |= {"submitit", "tensorboard", "wandb", "trackio", "starlette", "uvicorn"}
    assert not [module for module, _, at_once in imports(path) if at_once and module.split(".")[0] in extras]


WITHOUT_TORCH = [
    (["--help"], 0),
    (["--version"], 0),
    (["train", "--help"], 0),
    (["trian"], 2),
    (["train", "--stepz", "3"], 2),
    (["train", "--steps", "many"], 2),
    (["train", "--preset", "gpt5"], 2),
    (["train", "--config", "/nowhere.toml"], 3),
    (["data", "--help"], 0),
    (["data", "prepare", "shakespear"], 2),
    (["sample", "--help"], 0),
    (["sample"], 2),
    (["lens", "--help"], 0),
    (["lens", "run"], 2),
    (["digest"], 2),
    (["verify", "--help"], 0),
    (["export", "one"], 2),
    (["doctor", "--jsn"], 2),
    (["import", "model.bin"], 2),
    (["eval", "run", "--tasks", "hellaswg"], 2),
    (["runs", "docs"], 0),
    (["runs", "/nowhere"], 2),
    (["completion", "bash"], 0),
    (["page", "--help"], 0),
    (["page", "--port", "70000"], 2),
    (["noise", "--help"], 0),
    (["noise", "run", "--groups", "31"], 2),
    (["noise", "run", "--signals", "placebo:confidense"], 2),
]

HELP = [words for words, _ in WITHOUT_TORCH if words[-1] == "--help" and words[0] != "data"]
"""What must not import NumPy either: that alone takes as long as all the rest of the help."""


def test_usage_is_checked_before_torch_is_imported() -> None:
    """One process for all of them: the first that imports torch is found by the state it leaves. Help
    comes first, so that it is seen to import no NumPy either."""
    script = f"""
import contextlib, io, sys
from gptlab.cli.main import main
for words, code in {sorted(WITHOUT_TORCH, key=lambda one: one[0] not in HELP)!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = main(words)
        except SystemExit as ended:
            found = ended.code
    assert found == code, (words, found)
    for heavy in ("torch", "transformers", "datasets", "tiktoken", *["numpy"] * (words in {HELP!r})):
        assert heavy not in sys.modules, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
