"""What the machine can do, and what a run makes of it: device, dtype, threads, compile, each with its reason.

`choose_compute` is a pure function of `Machine`, so that its choices for hardware that is not at hand are tested with
faked capabilities. The environment is read here and in distributed.py only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gptlab.errors import ConfigError, GptlabError, shown
from gptlab.files import is_number, read_json, write_json
from gptlab.processes import usable_cores
from gptlab.randomness import torch_generator

MOST_THREADS = 1024
"""Of a process: with many more PyTorch does not start."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_MIN_WIDTH = 64
"""The narrowest model for which bf16 was measured faster than fp32, with AMX and with AVX-512 (docs/LOG.md)."""

AMX_ROWS = 512

NO_FLOAT64 = "computes no float64, in which losses are summed"

MEASURED = 5
"""Sessions that measure the matmul peak of a machine."""


@dataclass(frozen=True)
class Machine:
    """Capabilities of the machine as far as the choices need them."""

    cores: int
    processor: str
    cpu_bf16: Literal["AMX", "AVX-512", ""]
    """The instructions by which the processor multiplies bf16 in hardware, if any."""
    gpus: tuple[str, ...] = ()
    gpu_bf16: bool = False
    gpu_capability: tuple[int, int] = (0, 0)
    compiler: bool = True
    """Whether torch.compile finds what it needs on this GPU."""
    mps: bool = False
    """Whether PyTorch finds an Apple GPU."""

    @staticmethod
    def probe() -> Machine:
        """Ask this machine."""
        capabilities = torch.cpu.get_capabilities()
        cuda = torch.cuda.is_available()
        return Machine(
            cores=usable_cores(),
            processor=str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
            cpu_bf16="AMX" if capabilities.get("amx_bf16") else "AVX-512" if capabilities.get("avx512_bf16") else "",
            gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else (),
            gpu_bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            gpu_capability=torch.cuda.get_device_capability() if cuda else (0, 0),
            mps=torch.backends.mps.is_available(),
        )


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how a process computes.

    autocast: dtype of the matmuls, None for the parameters' own (fp32); tf32: whether a GPU may round what enters an
    fp32 matmul to 10 bits. deterministic: only with algorithms that PyTorch knows to repeat bit for bit.
    """

    device: torch.device
    autocast: torch.dtype | None
    threads: int
    compile: bool
    reasons: dict[str, str] = field(default_factory=dict)
    row_block: int = 0
    """Rows of a block of a product with a narrow result (model/fast_cpu.py); 0 = whole."""
    tf32: bool = False
    deterministic: bool = False

    @property
    def dtype_name(self) -> str:
        if self.tf32:
            return "tf32"
        return next(name for name, dtype in DTYPES.items() if dtype == (self.autocast or torch.float32))

    @property
    def eager_bf16_on_cpu(self) -> bool:
        """Whether the modules of model/fast_cpu.py serve."""
        return self.autocast is not None and self.device.type == "cpu" and not self.compile

    @property
    def repeats(self) -> str:
        """How far the same updates give the same numbers again, in words."""
        if self.device.type == "cpu" or self.deterministic:
            return "bit for bit with the same threads and processes"
        return "but for the order of a GPU's sums, which --deterministic fixes"

    def as_json(self) -> dict[str, Any]:
        return {
            "device": str(self.device), "dtype": self.dtype_name, "threads": self.threads, "compile": self.compile,
            "reasons": self.reasons,
        }  # fmt: skip

    def apply(self) -> None:
        """Make this process compute so."""
        torch.set_num_threads(self.threads)
        keep_freed_memory(self.device.type == "cpu")
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS chooses by what is free
        torch.use_deterministic_algorithms(self.deterministic)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


@contextmanager
def deterministic_or_refused() -> Iterator[None]:
    """Inside, an operation without a deterministic algorithm, where one was asked for, raises ConfigError."""
    try:
        yield
    except RuntimeError as error:
        name, refused, _ = str(error).partition(" does not have a deterministic implementation")
        if not refused:
            raise
        raise ConfigError(
            f"deterministic: PyTorch has no deterministic algorithm for {name} here; leave --deterministic out, "
            "or the signal that computes so"
        ) from error


def keep_freed_memory(keep: bool) -> None:
    """Let glibc hand freed memory out again instead of returning it to the system after every large tensor.

    A training step frees and takes the same sizes again and again; each time the system would fault in and clear
    gigabytes page by page (a fifth of a step of 124M, docs/performance.md). False sets glibc's own limits, as they are
    after a while in any program; elsewhere than on Linux this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 2**30 if keep else 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1 if keep else 64 * 2**20)


def choose_compute(
    machine: Machine,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    compile: str = "auto",
    n_embd: int = 768,
    local_rank: int = 0,
    local_size: int = 1,
    deterministic: bool = False,
) -> ComputeConfig:
    """How one process computes; raises ConfigError for a device or dtype that it lacks, or threads that cannot be."""
    if not 0 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads must be from 0 (a share of the cores) to {MOST_THREADS}, found {threads}")
    reasons: dict[str, str] = {}
    where = _device(machine, device, local_rank, local_size, reasons)
    gpu = where.type == "cuda"
    if dtype == "auto":
        if gpu:
            fast = machine.gpu_bf16
            reasons["dtype"] = "this GPU computes bf16 natively" if fast else "this GPU has no native bf16"
        elif not machine.cpu_bf16:
            fast = False
            reasons["dtype"] = "this processor has no bf16 instructions"
        else:
            fast = n_embd >= BF16_MIN_WIDTH
            gains = "gains from" if fast else "is too small to gain from"
            reasons["dtype"] = f"a model {n_embd} wide {gains} this processor's bf16 ({machine.cpu_bf16})"
        dtype = "bf16" if fast else "fp32"
    else:
        reasons["dtype"] = "as asked"
    if dtype == "tf32" and not (gpu and machine.gpu_capability >= (8, 0)):
        found = machine.gpus[where.index] if gpu else "a CPU"
        raise ConfigError(f"dtype tf32 needs a GPU of compute capability 8.0 or later, found {found}; use fp32")
    if threads:
        reasons["threads"] = "as asked"
    else:
        threads = max(1, machine.cores // local_size)
        reasons["threads"] = f"{machine.cores} cores over {local_size} process{'es' * (local_size > 1)}"
    if compile == "auto":
        compiled = gpu and machine.gpu_capability >= (7, 0) and machine.compiler
        reasons["compile"] = "pays on a GPU" if compiled else "eager measured faster" if not gpu else "GPU too old"
    else:
        compiled = compile == "on"
        reasons["compile"] = "as asked"
    rows = AMX_ROWS if machine.cpu_bf16 == "AMX" and not gpu else 0
    autocast = torch.bfloat16 if dtype == "bf16" else None
    return ComputeConfig(where, autocast, threads, compiled, reasons, rows, dtype == "tf32", deterministic)


def _device(machine: Machine, asked: str, local_rank: int, local_size: int, reasons: dict[str, str]) -> torch.device:
    name, _, index = asked.partition(":")
    if name == "auto":
        name = "cuda" if machine.gpus else "cpu"
        none = f"an Apple GPU {NO_FLOAT64}" if machine.mps else "no GPU found"
        reasons["device"] = f"{len(machine.gpus)} GPU(s) found" if machine.gpus else none
    else:
        reasons["device"] = "as asked"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        raise ConfigError(f"device mps: an Apple GPU {NO_FLOAT64}; use --device cpu")
    if name != "cuda":
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, found {shown(asked)}")
    chosen = int(index) if index.isdigit() else local_rank
    if chosen >= len(machine.gpus):
        raise ConfigError(
            f"device cuda:{chosen} is not there: this machine has {len(machine.gpus)} GPU(s) for {local_size} "
            "process(es); lower --nproc_per_node or use --device cpu"
        )
    return torch.device("cuda", chosen)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """How long `device` takes for what an action gives it: by a GPU's own events, without the host's share."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def matmul_peak(compute: ComputeConfig, size: int | None = None) -> float:
    """The machine's matmul rate in FLOP/s for this process: the best of some square products, measured now.

    Of random numbers, since ones cost a GPU less power and so run at a higher clock than training's.
    """
    n = size or (8192 if compute.device.type == "cuda" else 1024)
    generator = torch_generator("matmul peak", device=str(compute.device))
    a = torch.randn(n, n, device=compute.device, generator=generator).to(compute.autocast or torch.float32)
    out = a @ a  # warms up
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, a, out=out), compute.device) for _ in range(12))


def kept_matmul_peak(compute: ComputeConfig, machine: Machine) -> float:
    """The best `matmul_peak` of this machine's first sessions, in FLOP/s: a busy moment makes one too low.

    The user's cache folder keeps MEASURED of them; where it cannot be used, the one measured now is returned.
    """
    processor = machine.gpus[compute.device.index or 0] if compute.device.type == "cuda" else machine.processor
    key = f"{processor}, {compute.dtype_name}, {compute.threads} threads"
    file, kept = None, {}
    with suppress(OSError, RuntimeError, GptlabError):  # RuntimeError: no home is known
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptlab", "matmul_peaks.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = read_json(file) if file.exists() else {}
    kept = kept if isinstance(kept, dict) else {}
    rates = kept.get(key, [])
    rates = [rate for rate in rates if is_number(rate) and rate > 0] if isinstance(rates, list) else []
    if len(rates) < MEASURED:
        rates.append(matmul_peak(compute))
        with suppress(OSError, GptlabError):
            if file:
                write_json(file, {**kept, key: rates})
    return max(rates)


def environment(compute: ComputeConfig, machine: Machine) -> dict[str, Any]:
    """What environment.json records of machine and software; no variable of the environment is among it."""
    return {
        "machine": {"processor": machine.processor, "cores": machine.cores, "gpus": list(machine.gpus)},
        "platform": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **compute.as_json(),
    }
