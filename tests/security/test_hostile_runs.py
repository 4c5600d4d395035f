"""Every command that reads a run, over run folders as damage or ill will would leave them.

Of the several hundred of hostile_runs.py some are tried here, the same ones each time; benchmarks/hostile.py tries
them all, in processes of their own whose time and memory it measures.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_runs import VALUES, allowed, commands, hostile_runs, some  # pyright: ignore[reportMissingImports]

COUNT, SECONDS = 96, 20.0
"""Spoilt runs, and the CPU seconds of a command: twice and more what the slowest takes on a machine of its own."""
WITH_REPORTS = True
SELDOM = {"resume": 6, "compare to a report": 4, "report": 6, "compare": 2, "verify --json": 4, "runs": 3}
"""Commands that are tried on every so many-eth run, as others read the same."""


def test_the_set_has_every_field_of_every_file_and_every_kind_of_value(finished_run: Path) -> None:
    names = [one.name for one in hostile_runs(finished_run, each=1, drawn=1)]
    assert len(names) == len(set(names)) > 300
    text = "\n".join(names)
    for part in ("options.n_layer ", "data.train ", "machine.gpus ", "grad_norm of train ", "block_loss of val ",
                 "written of sample ", "event of event ", "scalars.step ", "files.state.json "):  # fmt: skip
        assert part in text
    for value in VALUES:
        assert f" {value}" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_command_ends_in_a_traceback_whatever_a_run_holds(
    finished_run: Path, tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    faults, codes = [], Counter()
    for number, hostile in enumerate(some(hostile_runs(finished_run, each=1, drawn=6), COUNT)):
        folder = tmp_path / "runs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished_run, folder / "bad")
        shutil.copytree(finished_run, folder / "good")
        hostile.spoil(folder / "bad")
        options = {"signal_name": "confidence", "sample_every": 3, "checkpoint_every": 3, "noise_every": 3, "steps": 7}
        try:
            for name, command in commands(folder / "bad", folder / "good", tiny(folder / "bad", **options)):
                if number % SELDOM.get(name, 1):
                    continue
                begun = time.process_time()
                outcome = command()
                codes[name.rstrip("0123456789 "), outcome.code] += 1
                if outcome.code not in allowed(name) or "Traceback" in outcome.text:
                    faults.append((hostile.name, name, outcome.code, outcome.text[-300:]))
                if (seconds := time.process_time() - begun) > SECONDS:
                    faults.append((hostile.name, name, f"{seconds:.1f} s"))
        except Exception as error:
            faults.append((hostile.name, "raised", repr(error)))
    assert faults == []
    assert codes["verify", 3] > COUNT / 2  # most of them are damaged, and said to be
    assert codes["page", 200] == COUNT
    assert codes["compare with a good run", 0] > 5
