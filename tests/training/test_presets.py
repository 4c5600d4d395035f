"""The command that repeats a run, and that nothing is compared by it or by the commit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlab.analysis.load import read
from gptlab.cli.arguments import Parser, add_options, given_options
from gptlab.cli.train import resolve
from gptlab.options import flatten
from gptlab.runs.folder import RunFolder
from gptlab.runs.session import made_elsewhere, repeated_by
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import command_of


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "gpt2-124m", "seed": 7, "learning_rate": 3e-4, "out": "my runs/it's one"},
        {"preset": "ladder", "depth": 4, "share_blocks": True},
        {"preset": "notes-124m", "share_blocks": False, "min_lr": 0.0, "resume": "must"},
        {"signal.name": "confidence", "signal.weight": -0.5, "signal.layers": [1, 2], "signal.anneal": 10},
        {"signal.name": "gated_confidence", "signal.dose": 0.25, "signal.control": "placebo", "steps": 3},
        {"signal.name": "/some where/idea.py:mine", "target_flip": 0.125},
    ],
)
def test_the_recorded_command_makes_the_same_config(values: dict[str, Any]) -> None:
    config = resolve(values, 0)
    program, command, *words = shlex.split(command_of(config))
    assert (program, command) == ("gptlab", "train")
    parser = Parser(prog="gptlab train")
    parser.add_argument("--allow_code", action="store_true")
    add_options(parser, TrainingConfig)
    parsed = parser.parse(words)
    assert flatten(resolve(given_options(parsed, TrainingConfig), 0)) == flatten(config) | {"resume": "auto"}
    assert parsed.allow_code == config.signal.is_code


def test_a_run_records_the_commit_of_a_clone_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = repeated_by(TrainingConfig())
    assert found["command"].startswith("gptlab train --preset ")
    monkeypatch.setattr("gptlab.runs.session.package", lambda: tmp_path / "gptlab")
    assert repeated_by(TrainingConfig()).keys() == {"command"}  # installed: in no clone
    (tmp_path / ".git").mkdir()
    assert repeated_by(TrainingConfig()).keys() == {"command"}  # no repository, and nothing is lost


def test_runs_that_differ_in_commit_and_command_alone_are_one_recipe(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    runs = []
    for arm, signal in (("a", "none"), ("b", "confidence")):
        for seed in (1, 2):
            made = {"commit": f"{seed}{arm}" * 8, "command": f"gptlab train --seed {seed} --out {arm}"}
            options = {"signal.name": signal}
            runs.append(
                write_run(tmp_path / f"{arm}{seed}", 2.0 + seed / 9, seed=seed, options=options, environment=made)
            )
    outcomes = read(runs)
    assert outcomes.undeclared == ()
    assert {arm: len(found) for arm, found in outcomes.losses.items()} == {"baseline": 2, "confidence": 2}
    folder, before = RunFolder(runs[0]), json.loads((runs[0] / "environment.json").read_text())
    version = json.loads((runs[0] / "config.json").read_text()).get("gptlab")
    monkey = {**before, "commit": "another", "command": "another"}
    assert made_elsewhere(folder, {**monkey, "gptlab": version}, 5).keys() <= {"earlier"}
    changed = made_elsewhere(folder, {**monkey, "torch": "0.0"}, 5)
    assert changed["earlier"][0]["torch"] == before["torch"]
