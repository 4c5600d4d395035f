"""train_gpt2.py and train_gpt2_ben.py, one trainer with other defaults; and the README's commands under GNU screen."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptlab.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("train_gpt2.py", "train_gpt2_ben.py")


def start(launcher: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of a launcher run as a script in this process."""
    monkeypatch.setattr(sys, "argv", [launcher, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / launcher), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_at_most_twenty_lines_without_logic(launcher: str) -> None:
    text = (ROOT / launcher).read_text()
    assert len(text.splitlines()) <= 20
    kinds = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try, ast.With)
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def test_they_are_equal_but_for_their_defaults() -> None:
    def without_defaults(launcher: str) -> str:
        tree = ast.parse((ROOT / launcher).read_text())
        tree.body = [
            node for node in tree.body[1:] if not (isinstance(node, ast.ImportFrom) and "functools" in str(node.module))
        ]
        call = tree.body[-1].body[0].value.args[0]  # type: ignore[attr-defined]  # sys.exit(guarded(main, argv))
        if isinstance(call.args[0], ast.Call):
            call.args[0] = call.args[0].args[0]
        return ast.unparse(tree)

    assert without_defaults(LAUNCHERS[0]) == without_defaults(LAUNCHERS[1])


def test_the_one_is_the_baseline_the_other_has_the_block_loss(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for launcher in LAUNCHERS:
        out = tmp_path / launcher
        assert start(launcher, tiny(out, steps=1, eval_every=0)[1:], monkeypatch) == 0
        found[launcher] = RunFolder(out).config()
    plain, judged = (found[launcher] for launcher in LAUNCHERS)
    assert (plain.signal.name, judged.signal.name) == ("none", "confidence")
    assert judged.signal.weight is None  # 1/n_layer
    assert judged.signal.weight_at(0, 4) == 1 / 4
    assert plain.folder != judged.folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_unknown_key_exits_2_and_names_the_nearest(
    launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(launcher, ["--lerning-rate", "1"], monkeypatch) == 2
    assert "unknown argument '--lerning_rate'; did you mean '--learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "2e-4", "--signal.weight", "0.5"],
        ["--learning-rate", "2e-4", "--signal.weight=0.5"],
        ["--learning-rate=2e-4", "--signal.weight", "0.5"],
        ["--learning_rate=2e-4", "--signal.weight=0.5"],
    ],
)
def test_dash_underscore_and_equals_are_alike(
    words: list[str], tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert start(LAUNCHERS[1], [*tiny(out, steps=1, eval_every=0)[1:], *words], monkeypatch) == 0
    config = RunFolder(out).config()
    assert (config.learning_rate, config.signal.weight) == (2e-4, 0.5)


def test_help_is_the_same_from_both_and_from_gptlab_train() -> None:
    commands = [[str(ROOT / launcher)] for launcher in LAUNCHERS] + [["-m", "gptlab", "train"]]
    shown = [
        subprocess.run(
            [sys.executable, *command, "--help"], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout
        for command in commands
    ]
    assert shown[0] == shown[1] == shown[2]
    assert "--signal.name" in shown[0]


QUICK = (
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_tokens 128 --steps 3 --threads 1 "
    "--eval_every 0 --sample_every 0 --dose_every 0 --checkpoint_every 3 --compile off"
)
PATIENCE = 180.0
"""Seconds after which a session is taken for stuck; it takes about ten."""


class Screen:
    """screen with sockets of its own, so that no session of the user's is seen or touched."""

    def __init__(self, program: str, sockets: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._program = program
        self._environment = os.environ | {"SCREENDIR": str(sockets), "PATH": path}

    def __call__(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self._program, *arguments]
        settings = {"cwd": cwd, "env": self._environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, capture_output=True, text=True, timeout=30, **settings)

    def sessions(self) -> list[int]:
        """The process ids of the sessions there are."""
        return [int(found) for found in re.findall(r"^\s+(\d+)\.", self("-ls").stdout, re.MULTILINE)]


@pytest.fixture
def screen(requires_program: Callable[[str], str]) -> Iterator[Screen]:
    with tempfile.TemporaryDirectory(prefix="screen") as sockets:  # in a short path, as a socket's name has a limit
        screen = Screen(requires_program("screen"), Path(sockets))
        yield screen
        for session in screen.sessions():
            os.kill(session, signal.SIGTERM)  # hangs up on the training, which ends with its torchrun
        until(lambda: not screen.sessions())


def until(true: Callable[[], bool]) -> bool:
    """Wait for it, at most PATIENCE; whether it came."""
    deadline = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train_gpt2.py", "train_gpt2_ben.py"])
def test_a_detached_session_trains_to_the_end_and_logs_it(launcher: str, screen: Screen, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()  # as setup.sh leaves it
    shutil.copy(ROOT / launcher, tmp_path)
    command = f"torchrun --standalone --nproc_per_node=1 {launcher} {QUICK} > log/screen.txt 2>&1"
    started = screen("-dm", "bash", "-c", command, cwd=tmp_path)
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    assert until(lambda: len(screen.sessions()) == 1), "a session to come back to with screen -r"
    assert until(lambda: not screen.sessions()), (tmp_path / "log/screen.txt").read_text()
    output = (tmp_path / "log/screen.txt").read_text()
    assert "step 3: finished" in output, output
    [checkpoint] = tmp_path.glob("log/*/checkpoints/step_*")
    assert checkpoint.name == "step_00000003"
