"""Lets the tests of experiments import what they share with benchmarks/experiment_kills.py and the fault tests."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "faults")]  # for `tiny_experiment`, which takes its corpus from `harness`
