"""Completion as bash does it: the printed script is sourced, and asked what it would offer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.cli.main import COMMANDS, main
from gptlab.options import options_of
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def offered(requires_program: Callable[[str], str], capsys: Capture) -> Callable[..., list[str]]:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def offer(*words: str) -> list[str]:
        asked = f"COMP_WORDS=({' '.join(repr(w) for w in words)}) COMP_CWORD={len(words) - 1}; _shtab_gptlab"
        done = subprocess.run(
            [requires_program("bash"), "--norc", "-c", f'{script}\n{asked}\nprintf "%s\n" "${{COMPREPLY[@]}}"'],
            check=True, capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        return done.stdout.split()

    return offer


def test_bash_is_offered_what_there_is(offered: Callable[..., list[str]]) -> None:
    assert offered("gptlab", "") == list(COMMANDS)
    assert offered("gptlab", "ex") == ["experiment", "export"]
    assert set(offered("gptlab", "train", "--")) >= {f"--{o.key}" for o in options_of(TrainingConfig)}
    assert offered("gptlab", "train", "--signal.na") == ["--signal.name"]
    assert offered("gptlab", "train", "--preset", "gpt2-1") == ["gpt2-124m", "gpt2-1558m"]
    assert offered("gptlab", "train", "--preset", "") == list(PRESETS)  # and no files
    assert offered("gptlab", "train", "--signal.name", "gated") == ["gated_confidence"]
    assert offered("gptlab", "export", "--format", "ll") == ["llm.c"]
    assert offered("gptlab", "data", "pre") == ["prepare"]
    assert offered("gptlab", "completion", "z") == ["zsh"]
    assert "tmp" in offered("gptlab", "verify", "t")  # files, seen from /
    assert offered("gptlab", "sample", "--checkpoint", "RU") == []


def test_the_words_are_printed_as_json(capsys: Capture) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known.keys() == COMMANDS.keys()
    assert set(known["experiment"]["words"]) >= {"run", "status", "smoke", "pack"}
    assert known["train"]["values"]["--schedule"] == ["cosine", "wsd", "constant"]
    assert all("--json" in command["options"] for command in known.values())


def test_zsh_takes_the_script_where_completion_is_on(
    capsys: Capture, requires_program: Callable[[str], str], tmp_path: Path
) -> None:
    assert main(["completion", "zsh"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    profile = f'autoload -Uz compinit && compinit -u\neval "$(cat {script})"\nprint -r -- "$_comps[gptlab]"'
    shell = [requires_program("zsh"), "-f", "-c", profile]
    done = subprocess.run(shell, check=True, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert done.stdout.split() == ["_shtab_gptlab"], done


@pytest.mark.parametrize("shell", ["fish", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    assert "--signal.name" in capsys.readouterr().out or shell == "tcsh"
