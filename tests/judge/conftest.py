"""The fixtures of a lab; what they are is in small_lab.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_lab import Run, Site

from gptlab.cli.main import main
from gptlab.judge.lab import FIRST_FRESH, read_lab
from gptlab.judge.procedure import Judge


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="session")
def baseline_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the baseline gave at the seeds of screening and at the first fresh ones, as a lab keeps it."""
    site = Site(tmp_path_factory.mktemp("baseline"))
    judge = Judge(read_lab(site.lab), lambda: False, lambda line: None)
    plan = judge.plan
    seeds = [*range(1, plan.looks[-1] + 1), *range(FIRST_FRESH, FIRST_FRESH + plan.confirm_looks[-1])]
    assert all(ran.state == "ok" for ran in judge.run([(judge.baseline, seed) for seed in seeds]))
    return site.lab / "cells"


@pytest.fixture
def known_site(site: Site, baseline_runs: Path) -> Site:
    """A lab whose baseline ran before, for tests of what comes after: half of the runs are saved."""
    shutil.copytree(baseline_runs, site.lab / "cells")
    return site


@pytest.fixture
def run(site: Site, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(words)` is (exit code, what was printed) of `gptlab judge WORDS --lab ... --json`."""

    def judge(*words: str | Path) -> tuple[int, dict[str, Any]]:
        code = main(["judge", *map(str, words), "--lab", str(site.lab), "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out.startswith("{") else {"text": out}

    return judge
