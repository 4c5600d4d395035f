"""A size that a file merely claims is asked against the file before anything of that size is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from readers import readers, sign  # pyright: ignore[reportMissingImports]
from safetensors.torch import load, save

from gptlab.errors import CheckpointError
from gptlab.runs import checkpoint
from gptlab.runs.init_weights import any_model, any_state

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


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("exp_avg.transformer.ln_f.bias", (5,), r"expected exp_avg.transformer.ln_f.bias \(4,\), found .* \(5,\)"),
        ("step.transformer.ln_f.bias", (4,), r"expected step.transformer.ln_f.bias \(\), found"),
        ("exp_avg.transformer.h.9.ln_1.bias", (4,), "expected exp_avg.transformer.h.9.ln_1.bias None, found"),
    ],
)
def test_moments_are_those_of_the_weights(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    reader.prepare(tmp_path / "saved")
    any_state(tmp_path / "saved")
    (tmp_path / "saved" / checkpoint.MOMENTS).write_bytes(save({name: torch.zeros(shape)}))
    sign(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        any_state(tmp_path / "saved")


def test_weights_have_the_shapes_of_the_options(tmp_path: Path) -> None:
    """As many numbers as there should be, in another shape."""
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    reader.prepare(tmp_path / "saved")
    any_model(tmp_path / "saved")
    name, file = "transformer.h.0.mlp.c_fc.weight", tmp_path / "saved" / checkpoint.WEIGHTS
    weights = load(file.read_bytes())
    file.write_bytes(save({**weights, name: weights[name].T.contiguous()}))
    sign(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"expected {name} to be there|expected {name} .*, found"):
        any_model(tmp_path / "saved")
