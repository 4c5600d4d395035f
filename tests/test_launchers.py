"""train_gpt2.py and train_gpt2_ben.py: the same trainer with other defaults, and no logic of their own."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Callable
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
