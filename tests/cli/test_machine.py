"""`gptlab doctor` and `gptlab bench`: what a run here would use, and the shape of a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scripts import load_script

import gptlab
from gptlab import device
from gptlab.benchmark.contenders import STEPS, Ladder, Timing, ours
from gptlab.benchmark.run import Bench
from gptlab.cli.main import main
from gptlab.device import Machine, choose_compute
from gptlab.errors import UsageError

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


@pytest.mark.slow
def test_the_json_has_a_row_a_contender(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--size",
        "tiny",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--modes",
        "rotate",
        "--threads",
        "1",
        "--dtype",
        "fp32",
    ]
    assert main(["bench", *words, "--ladder", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert {"baseline", "rotate", "transformers fp32", "ladder"} <= set(rows)
    assert result["matmul_limit_tokens_per_second"] > 0
    assert rows["baseline"]["ratio_to_baseline"] == pytest.approx(1.0)
    for name, row in rows.items():
        assert row["tokens_per_second"] > 0, name
        assert row["ratio_to_baseline"] * row["tokens_per_second"] == pytest.approx(
            rows["baseline"]["tokens_per_second"]
        )
    assert rows["baseline"]["peak_memory_bytes"] > 2**20
    assert 0 < rows["rotate"]["share_of_limit"]


@pytest.mark.parametrize(("size", "both"), [("tiny", False), ("small", False), ("small", True)])
def test_peers_run_in_both_dtypes_where_asked_or_narrow(size: str, both: bool) -> None:
    bench = Bench(size, peers_in_both=both)
    bench.__dict__["machine"] = replace(bench.machine, cpu_bf16="AVX-512")
    names = {"transformers bf16", "transformers fp32"} if both or size == "tiny" else {"transformers bf16"}
    assert set(bench.theirs()) == names
    bench.__dict__["machine"] = replace(bench.machine, cpu_bf16="")
    assert set(bench.theirs()) == {"transformers fp32"}


@pytest.mark.parametrize("size", ["tiny", "small", "124m"])
def test_a_gpu_is_measured_with_its_own_sizes_and_compiled(size: str) -> None:
    bench = Bench(size, ladder=True)
    bench.__dict__["machine"] = replace(
        bench.machine, gpus=("H200",), gpu_bf16=True, gpu_capability=(9, 0), cpu_bf16=""
    )
    assert (bench.placement.device.type, bench.placement.compile, bench.placement.dtype_name) == ("cuda", True, "bf16")
    assert bench.work.config.block_size == 1024
    assert bench.work.tokens >= 32 * 1024
    with pytest.raises(UsageError, match="--ladder runs one process a core"):
        bench.run()
    bench.__dict__["machine"] = replace(bench.machine, gpus=())
    assert bench.placement.compile is False
    assert bench.work.config.block_size <= 256


def test_the_peak_is_the_best_of_repeats_on_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy for most of them still shows its rate; ones would be multiplied faster on a GPU."""
    seen: list[torch.Tensor] = []
    busy = iter([8.0, 2.0, 4.0, 1.0, 9.0, *[5.0] * 50])
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.clone()) or plain(a, b, out=out))

    def took(action: Callable[[], object], where: torch.device) -> float:
        action()
        return next(busy)

    monkeypatch.setattr(device, "seconds", took)
    compute = device.choose_compute(device.Machine.probe(), device="cpu", dtype="fp32", threads=1)
    assert device.matmul_peak(compute, 32) == 2 * 32**3 / 1.0
    assert all(a.unique().numel() > 1000 for a in seen)


@pytest.mark.slow
def test_a_profile_names_the_products(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "tiny", "--batch", "1", "--modes", "", "--threads", "1", "--profile"]) == 0
    assert "aten::mm" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "tinny"], "--size: expected tiny, small, 124m, found 'tinny'; did you mean 'tiny'?"),
        (["--modes", "exakt"], "did you mean 'exact'?"),
        (["--peer", "nanogtp=."], "did you mean 'nanogpt'?"),
        (["--batch", "-3"], "--batch: expected at least 1, or 0 for the size's own, found -3"),
        (["--rounds", "0"], "--rounds and --per_round: expected at least 1, found 0, 1"),
        (["--peer", "nanogpt=/nowhere", "--batch", "1"], "expected a checkout with model.py, found none at /nowhere"),
    ],
)
def test_wrong_words_are_named(capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["bench", *words]) == 2
    assert said in capfd.readouterr().err


def test_weak_scaling_compares_the_rate_a_thread() -> None:
    """A second for one thread's 100 tokens, 1.25 for two threads' 200, two for two processes' 200."""
    speed = load_script("benchmarks/speed.py")
    one, two, pair = speed.rows({name: Timing([s]) for name, s in zip(speed.TEAMS, (1.0, 1.25, 2.0), strict=True)}, 100)
    assert [row["tokens_per_second"] for row in (one, two, pair)] == pytest.approx([100, 160, 100])
    assert [row["efficiency"] for row in (one, two, pair)] == pytest.approx([1.0, 0.8, 0.5])
    assert [row["ratio_to_one_process"] for row in (one, two, pair)] == pytest.approx([1.0, 1.0, 0.625])


def test_processes_of_a_team_sum_their_gradients() -> None:
    """Both take the same batch, of which each is half: together their gradient is as long as that of one alone."""
    bench = Bench("tiny", batch=1, threads=1, dtype="fp32")
    (step,) = ours(bench.work, bench.placement)
    alone = [step().grad_norm for _ in range(1 + STEPS)]
    with Ladder("tiny", bench.placement, 2, batch=1, together=True) as team:
        assert team.steps() == pytest.approx([alone[-1]] * 2, rel=1e-4)
