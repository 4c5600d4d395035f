"""`gptlab doctor`: what it says of this machine is what a run here would use."""

from __future__ import annotations

import json

import pytest
import torch

import gptlab
from gptlab.cli.main import main
from gptlab.device import Machine, choose_compute

Capture = pytest.CaptureFixture[str]


def test_doctor_in_json_tells_what_a_run_uses_here(capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gptlab"] == gptlab.__version__
    assert found["torch"] == torch.__version__
    machine = Machine.probe()
    assert (found["cores"], found["gpus"]) == (machine.cores, list(machine.gpus))
    assert found["preset"] == ("gpt2-124m" if machine.gpus else "shakespeare-tiny")
    for name, width in (("shakespeare-tiny", 128), ("gpt2-124m", 768)):
        placement = choose_compute(machine, n_embd=width)
        used = found["runs"][name]
        assert (used["device"], used["dtype"]) == (str(placement.device), placement.dtype_name)
        assert (used["threads"], used["reasons"]) == (placement.threads, placement.reasons)
    assert all(rate > 0 for rate in found["matmul_peak"].values())
    assert found["packages"]["rich"]


def test_doctor_in_words(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("processor", "GPUs", "matmul", "GFLOP/s", "shakespeare-tiny", "threads", "screen", "transformers"):
        assert words in out
