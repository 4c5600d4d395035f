"""The fixtures of a lab; what they are is in small_lab.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gptlab.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from small_lab import Run, Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def run(site: Site, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(words)` is (exit code, what was printed) of `gptlab judge WORDS --lab ... --json`."""

    def judge(*words: str | Path) -> tuple[int, dict[str, Any]]:
        code = main(["judge", *map(str, words), "--lab", str(site.lab), "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out.startswith("{") else {"text": out}

    return judge
