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


@pytest.fixture(scope="module")
def script() -> str:
    from gptlab.cli.completion import _known
    from gptlab.cli.completion import script as printed

    return printed("bash", {name: _known(name) for name in COMMANDS})


@pytest.fixture
def offered(script: str, requires_program: Callable[[str], str]) -> Callable[..., list[str]]:
    def offer(*words: str) -> list[str]:
        asked = f"COMP_WORDS=({' '.join(repr(w) for w in words)}) COMP_CWORD={len(words) - 1}; _gptlab"
        done = subprocess.run(
            [requires_program("bash"), "--norc", "-c", f'{script}\n{asked}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
            check=True, capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert done.stderr == ""
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


def test_the_words_are_printed_as_json_and_for_zsh(
    script: str, capsys: Capture, requires_program: Callable[[str], str], tmp_path: Path
) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known.keys() == COMMANDS.keys()
    assert known["experiment"]["words"] == ["run", "status", "smoke", "pack", "unpack"]
    assert all("--json" in command["options"] for command in known.values())
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    shell = [requires_program("zsh"), "-f", "-c", f'{zsh}\nprint -r -- "$_comps[gptlab]"']
    done = subprocess.run(shell, check=True, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert (done.stdout.split()[0], done.stdout.split()[-1]) == ("_bash_complete", "_gptlab")
    assert zsh.splitlines()[1:4] == ["autoload -Uz compinit bashcompinit", "compinit", "bashcompinit"]
    assert script.partition("\n")[2] in zsh
