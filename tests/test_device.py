"""Where a run computes: devices faked by their capabilities, and how its processes meet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptlab.device import Machine, choose_compute, deterministic_or_refused, environment, kept_matmul_peak, matmul_peak
from gptlab.distributed import ROUND, join_store, missing_ranks
from gptlab.errors import ConfigError

LAPTOP = Machine(cores=8, processor="old", cpu_bf16="")
XEON = Machine(cores=16, processor="new", cpu_bf16="AVX-512")
TWO_CORES = Machine(cores=2, processor="new", cpu_bf16="AVX-512")
H100 = Machine(cores=64, processor="x", cpu_bf16="AVX-512", gpus=("H100",) * 8, gpu_bf16=True, gpu_capability=(9, 0))
T4 = Machine(cores=8, processor="x", cpu_bf16="", gpus=("T4",), gpu_bf16=False, gpu_capability=(7, 5))
MAC = Machine(cores=10, processor="Apple M3", cpu_bf16="", mps=True)
P100 = Machine(cores=8, processor="x", cpu_bf16="", gpus=("P100",), gpu_bf16=False, gpu_capability=(6, 0))


@pytest.mark.parametrize(
    ("machine", "asked", "device", "dtype", "threads", "compiled"),
    [
        (LAPTOP, {}, "cpu", "fp32", 8, False),
        (XEON, {}, "cpu", "bf16", 16, False),
        (XEON, {"n_embd": 64}, "cpu", "bf16", 16, False),
        (XEON, {"n_embd": 32}, "cpu", "fp32", 16, False),
        (XEON, {"n_embd": 32, "dtype": "bf16"}, "cpu", "bf16", 16, False),
        (XEON, {"threads": 3, "compile": "on"}, "cpu", "bf16", 3, True),
        (TWO_CORES, {"local_rank": 7, "local_size": 8}, "cpu", "bf16", 1, False),
        (TWO_CORES, {"local_rank": 1, "local_size": 2}, "cpu", "bf16", 1, False),
        (H100, {}, "cuda:0", "bf16", 64, True),
        (H100, {"local_rank": 5, "local_size": 8}, "cuda:5", "bf16", 8, True),
        (H100, {"n_embd": 32}, "cuda:0", "bf16", 64, True),
        (H100, {"device": "cpu"}, "cpu", "bf16", 64, False),
        (H100, {"device": "cuda:3", "local_rank": 1, "local_size": 2}, "cuda:3", "bf16", 32, True),
        (H100, {"dtype": "fp32", "compile": "off"}, "cuda:0", "fp32", 64, False),
        (H100, {"dtype": "tf32"}, "cuda:0", "tf32", 64, True),
        (T4, {}, "cuda:0", "fp32", 8, True),
        (MAC, {}, "cpu", "fp32", 10, False),
        (P100, {}, "cuda:0", "fp32", 8, False),
    ],
)
def test_what_a_run_uses(
    machine: Machine, asked: dict[str, Any], device: str, dtype: str, threads: int, compiled: bool
) -> None:
    compute = choose_compute(machine, **asked)
    assert str(compute.device) == device
    assert compute.dtype_name == dtype
    assert compute.autocast == (torch.bfloat16 if dtype == "bf16" else None)
    assert (compute.threads, compute.compile) == (threads, compiled)


@pytest.mark.parametrize("machine", [LAPTOP, XEON, TWO_CORES, H100, T4, P100, MAC])
@pytest.mark.parametrize("n_embd", [32, 768])
def test_every_choice_has_its_reason(machine: Machine, n_embd: int) -> None:
    reasons = choose_compute(machine, n_embd=n_embd).reasons
    assert set(reasons) == {"device", "dtype", "threads", "compile"}
    assert all(reasons.values())
    asked = choose_compute(machine, device="cpu", dtype="fp32", threads=1, compile="off").reasons
    assert set(asked.values()) == {"as asked"}


def test_an_apple_gpu_is_left_alone_and_the_reason_said() -> None:
    assert choose_compute(MAC).reasons["device"] == "an Apple GPU computes no float64, in which losses are summed"


@pytest.mark.parametrize(
    ("machine", "asked", "message"),
    [
        (LAPTOP, {"device": "cuda"}, r"device cuda:0 is not there: this machine has 0 GPU\(s\) for 1 process"),
        (H100, {"device": "cuda:8"}, r"device cuda:8 is not there: this machine has 8 GPU\(s\)"),
        (
            T4,
            {"local_rank": 1, "local_size": 2},
            r"cuda:1 is not there: .* for 2 process\(es\); lower --nproc_per_node",
        ),
        (LAPTOP, {"threads": -1}, r"threads must be from 0 \(a share of the cores\) to 1024, found -1"),
        (T4, {"dtype": "tf32"}, r"dtype tf32 needs a GPU of compute capability 8.0 or later, found T4; use fp32"),
        (H100, {"dtype": "tf32", "device": "cpu"}, r"dtype tf32 needs a GPU .*, found a CPU; use fp32"),
        (LAPTOP, {"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, found 'tpu'"),
        (MAC, {"device": "mps"}, "device mps: an Apple GPU computes no float64, .*; use --device cpu"),
    ],
)
def test_what_is_not_there_is_refused(machine: Machine, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_compute(machine, **asked)


@pytest.fixture
def process_settings() -> Iterator[None]:
    """What `apply` sets in this process is as before afterwards."""
    threads = torch.get_num_threads()
    yield
    choose_compute(LAPTOP, threads=threads).apply()


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "tf32"])
def test_fp32_products_are_rounded_to_tf32_only_where_that_is_asked_for(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bf16 too: what stays outside of autocast is meant to be fp32."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.set_float32_matmul_precision("medium")  # as another program in this process may have left it
    choose_compute(H100, dtype=dtype).apply()
    assert torch.get_float32_matmul_precision() == ("high" if dtype == "tf32" else "highest")


@pytest.mark.usefixtures("process_settings")
def test_deterministic_is_pytorchs_own_on_a_gpu_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    choose_compute(H100).apply()
    assert (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")) == (False, None)
    choose_compute(H100, deterministic=True).apply()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    refused = pytest.raises(ConfigError, match="deterministic: PyTorch has no deterministic algorithm for put_")
    with refused, deterministic_or_refused():
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic_or_refused():  # others stay what they are
        torch.zeros(2).add(torch.zeros(3))
    choose_compute(LAPTOP).apply()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("machine", "asked", "promise"),
    [
        (LAPTOP, {}, "bit for bit"),
        (H100, {"device": "cpu"}, "bit for bit"),
        (H100, {}, "but for the order of a GPU's sums"),
        (T4, {"dtype": "fp32", "compile": "off"}, "but for the order of a GPU's sums"),
        (H100, {"deterministic": True}, "bit for bit"),
    ],
)
def test_each_device_says_which_promise_it_keeps(machine: Machine, asked: dict[str, Any], promise: str) -> None:
    assert choose_compute(machine, **asked).repeats.startswith(promise)


def test_this_machine_is_probed_and_its_record_tells_no_secrets() -> None:
    machine = Machine.probe()
    assert machine.cores >= 1
    assert machine.processor
    compute = choose_compute(machine, device="cpu")
    recorded = environment(compute, machine)
    assert recorded["torch"] == torch.__version__
    assert recorded["reasons"] == compute.reasons
    assert set(recorded) == {
        "machine",
        "platform",
        "python",
        "torch",
        "device",
        "dtype",
        "threads",
        "compile",
        "reasons",
    }


@pytest.mark.parametrize("before", [None, "not JSON", "[1]", '{"key": 3}', "a folder"])
def test_a_busy_moment_lowers_no_peak_that_was_seen_before(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine.probe()
    compute = choose_compute(machine, device="cpu", dtype="fp32")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "gptlab" / "matmul_peaks.json"
    if before == "a folder":
        file.mkdir(parents=True)
    elif before:
        file.parent.mkdir()
        file.write_text(before)
    measured = iter([3e9, 5e9, 1e9, 2e9, 4e9, 9e9])
    monkeypatch.setattr("gptlab.device.matmul_peak", lambda compute: next(measured))
    found = [kept_matmul_peak(compute, machine) for _ in range(6)]
    assert found == [3e9, 5e9, 1e9, 2e9, 4e9, 9e9] if before == "a folder" else [3e9, 5e9, 5e9, 5e9, 5e9, 5e9]


def test_the_matmul_peak_is_a_rate() -> None:
    assert 1e7 < matmul_peak(choose_compute(Machine.probe(), device="cpu", dtype="fp32"), size=64) < 1e15


SOON = timedelta(seconds=20)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def address(store: dist.TCPStore) -> str:
    return f"127.0.0.1:{store.port}"


def together(call: Callable[[int], Any], ranks: list[int]) -> list[Any]:
    """What the call gives to each of these ranks, all at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(call, rank) for rank in ranks]]


def test_every_round_has_a_part_of_its_own_and_all_ranks_the_same(store: dist.TCPStore) -> None:
    """The second round is the one after a restart: all that the first has said still stands in the store."""
    for told in ("first", "second"):
        parts = together(lambda rank: join_store(address(store), rank, 3, SOON), [2, 1, 0])
        assert not parts[0].check(["told"]), "nothing of another round is seen"
        parts[0].set("told", told)
        assert [part.get("told") for part in parts] == [told.encode()] * 3


def test_who_comes_first_does_not_join_a_round_of_the_dead(store: dist.TCPStore) -> None:
    """Rank 1 comes half a second before rank 0, and finds a round in which another rank 1 was taken."""
    store.set(ROUND, "dead")
    store.set(f"{ROUND}/dead", json.dumps(["another process"]))

    def come(rank: int) -> dist.PrefixStore:
        time.sleep(0.0 if rank else 0.5)
        return join_store(address(store), rank, 2, SOON)

    late, early = together(come, [0, 1])
    late.set("told", "alive")
    assert early.get("told") == b"alive"


def test_a_rank_that_waits_in_vain_says_so(store: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError, match="rank 0 has not come"):
        join_store(address(store), 1, 2, timedelta(seconds=0.3))
    with pytest.raises(RuntimeError):
        join_store(address(store), 0, 2, timedelta(seconds=0.3))


@pytest.mark.parametrize(("there", "missing"), [([0, 1, 3], [2]), ([1, 2], [0, 3]), ([0, 1, 2, 3], [])])
def test_those_that_do_not_answer_are_named(there: list[int], missing: list[int], store: dist.TCPStore) -> None:
    found = together(lambda rank: missing_ranks(address(store), rank, 4, patience=0.5), there)
    assert found == [missing] * len(there)


def test_a_store_that_is_gone_tells_nothing_and_at_once() -> None:
    began = time.monotonic()
    assert missing_ranks("127.0.0.1:1", 0, 2, patience=60.0) is None
    assert time.monotonic() - began < 30, "a refused call is not tried again until the patience is over"
    assert missing_ranks(":", 0, 2) is None
