"""A size that a file merely claims is asked against the file before anything of that size is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="the process's room is limited by Linux's means")
def test_a_claim_ends_in_an_error_of_ours_and_takes_no_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, str(HERE / "claims.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {one["case"]: one["told"] for one in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 48
    assert {case: told for case, told in found.items() if not told.startswith("gptlab.errors.")} == {}
    assert {case: told for case, told in found.items() if "\n" in told or "allocate" in told or "memory" in told} == {}
