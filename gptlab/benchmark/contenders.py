"""What is measured: whole optimizer steps of ours and of peers, on the same tokens; timed in turn, or in a ladder.

Peers are run as their users run them: their own model, eager on a CPU and compiled on a GPU, autocast for bf16,
gradient clipping at 1, AdamW as they set it. transformers is a package; nanoGPT and build-nanogpt come from a checkout
that the caller names.

Interleaved timing: every contender runs once a round, so that a machine's drift falls on all of them alike. The ladder
is one small run a core, as an experiment's cells run, their steps summed.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from gptlab.benchmark import SIZES
from gptlab.device import DTYPES, ComputeConfig, Machine, choose_compute, keep_freed_memory
from gptlab.distributed import World
from gptlab.errors import UsageError
from gptlab.files import read_text
from gptlab.model.fast_cpu import install
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.weights import SIZES as MODEL_SIZES
from gptlab.processes import python_command
from gptlab.signals.config import SignalConfig
from gptlab.training.block_graph import Batch
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import rehearse
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import compile_blocks
from gptlab.training.state import TrainingState
from gptlab.training.step import Update, update

Step = Callable[[], Any]
ALONE = World()


@dataclass(frozen=True)
class Work:
    """The step to measure: a model's size and one batch of tokens (B, T)."""

    config: GPTConfig
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.config.block_size

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.config.block_size + 1)
        rows = torch.randint(self.config.vocab_size, shape, generator=generator)
        return rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)


def ours(
    work: Work, placement: ComputeConfig, signals: Sequence[SignalConfig] = (SignalConfig(),), world: World = ALONE
) -> list[Step]:
    """A step of this project's trainer for each signal, through the same `update` that trains, on one model.

    world: the processes that make the step together, each of them the work.
    """
    c = work.config
    plain = TrainingConfig(
        block_size=c.block_size, batch_size=work.batch, total_batch_tokens=work.tokens * world.size,
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, learning_rate=1e-5,
    )  # fmt: skip
    model = GPT(c).to(placement.device)
    install(model, placement)
    compile_blocks(model, placement, partial(rehearse, model, plain, world, placement))
    state = TrainingState(model, build_optimizer(model, plain))
    tokens, targets = work.data(placement.device)

    def step(config: TrainingConfig) -> Update:
        keep_freed_memory(placement.device.type == "cpu")
        batch = Batch(tokens, targets, state.step, 0, world.rank * work.batch, share=1 / world.size)
        return update(state, config, [batch], world, placement)

    return [partial(step, replace(plain, signal=signal)) for signal in signals]


def transformers_step(work: Work, placement: ComputeConfig) -> Step:
    """A step of transformers' GPT2LMHeadModel with fused AdamW, no dropout, attention through PyTorch's own."""
    import transformers

    c = work.config
    peer = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    with placement.device:
        model = transformers.GPT2LMHeadModel(peer)
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, targets = work.data(placement.device)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return plain_step(model, optimizer, loss, placement)


class Peer(NamedTuple):
    """Where a peer's checkout has its model, and how it is made as its own trainer makes it.

    optimizer: what its configure_optimizers takes before the device; on a CPU neither asks for a fused one
    """

    file: str
    load: Callable[[Path, str], ModuleType]
    optimizer: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})


def peer_step(name: str, work: Work, placement: ComputeConfig, checkout: Path) -> Step:
    """A step of the model of a peer's checkout."""
    peer = CHECKOUTS[name]
    module = peer.load(checkout / peer.file, f"{name.replace('-', '_')}_model")
    sizes = {size: getattr(work.config, size) for size in MODEL_SIZES}
    model = module.GPT(module.GPTConfig(**sizes, **peer.options)).to(placement.device)
    configured = model.configure_optimizers(*peer.optimizer, placement.device.type)
    tokens, targets = work.data(placement.device)
    return plain_step(model, configured, lambda: model(tokens, targets)[1], placement)


def check_checkout(name: str, path: Path) -> None:
    """Raise UsageError if there is no checkout of a peer at `path`."""
    if not (path / CHECKOUTS[name].file).is_file():
        raise UsageError(f"--peer {name}: expected a checkout with {CHECKOUTS[name].file}, found none at {path}")


def plain_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], placement: ComputeConfig
) -> Step:
    """One step as nanoGPT-like trainers make it: autocast forward, backward, clip, update."""
    parameters = list(model.parameters())
    loss = torch.compile(loss) if placement.compile else loss  # the whole model, as its users do on a GPU

    def step() -> None:
        keep_freed_memory(False)  # glibc as the peer's users have it
        optimizer.zero_grad(set_to_none=True)
        cast = torch.autocast(placement.device.type, placement.autocast) if placement.autocast else nullcontext()
        with cast:
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _definitions(path: Path, name: str) -> ModuleType:
    """A script's imports and class definitions as a module, without running the rest of it."""
    import ast
    import tempfile

    tree = ast.parse(read_text(path))
    kept = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.Import) or _safe_import(n)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.py"
        file.write_text("master_process = False\n" + ast.unparse(ast.Module(kept, [])), encoding="utf-8")
        return _module(file, name)


def _safe_import(node: Any) -> bool:
    import ast

    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "dataclasses")


CHECKOUTS = {
    "nanogpt": Peer("model.py", _module, (0.1, 1e-5, (0.9, 0.95)), {"dropout": 0.0, "bias": True}),
    "build-nanogpt": Peer("train_gpt2.py", _definitions, (0.1, 1e-5)),
}


def placed(placement: ComputeConfig, dtype: str) -> ComputeConfig:
    """The same placement in another dtype."""
    return replace(placement, autocast=None if dtype == "fp32" else DTYPES[dtype])


STEPS = 4
"""Steps that a run of the ladder makes before it waits for the others."""


@dataclass
class Timing:
    """Seconds of a step in each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median."""
        if len(self.seconds) < 3:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    per_round: int = 1,
    report: Callable[[str], None] = print,
    also: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every step `rounds` times in turn, after one round that warms up; `also` is called once in each.

    Each turn begins with a step that is not timed: the contender before left caches and heap in its own state, for
    which a run by itself pays once, not in every step.
    """
    timings = {name: Timing() for name in steps}
    for round_ in range(rounds + 1):
        also()
        for name, step in steps.items():
            step()
            wait()
            start = time.perf_counter()
            for _ in range(per_round):
                step()
            wait()
            if round_:
                timings[name].seconds.append((time.perf_counter() - start) / per_round)
        report(f"round {round_} of {rounds}" if round_ else "warmed up")
    return timings


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ladder:
    """`runs` processes at the same size and dtype, ended at the end of the block.

    threads: of each; batch: sequences of a step of each, 0 = the size's own; together: they make each step as one run.
    """

    def __init__(
        self, size: str, placement: ComputeConfig, runs: int, *, threads: int = 1, batch: int = 0,
        together: bool = False,
    ) -> None:  # fmt: skip
        where = ""
        if together:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            where = f"127.0.0.1:{self._store.port}"
        asked = [size, placement.dtype_name, str(threads), str(batch), where]
        commands = [
            python_command("gptlab.benchmark.contenders:run_of_ladder", *asked, f"{k}/{runs}") for k in range(runs)
        ]
        self._runs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
        ]

    def __enter__(self) -> Ladder:
        for run in self._runs:
            _gradient_norm(run)
        return self

    def steps(self) -> list[float]:
        """Every run makes STEPS steps; the norm of each one's last gradient."""
        for run in self._runs:
            assert run.stdin is not None
            run.stdin.write("1\n")
            run.stdin.flush()
        return [_gradient_norm(run) for run in self._runs]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for run in self._runs:
            assert run.stdin is not None
            assert run.stdout is not None
            run.stdin.close()
            run.wait(60)
            run.stdout.close()


def _gradient_norm(run: subprocess.Popen[str]) -> float:
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, "a run of the ladder ended early"
    return json.loads(line)


def run_of_ladder(words: list[str]) -> None:
    """One run, or process `place` ("rank/number") of one: some steps for every line on standard input."""
    size, dtype, threads, batch, store, place = words
    sizes: dict[str, Any] = dict(SIZES[size])
    own = sizes.pop("batch")
    count = int(threads)
    placement = placed(replace(choose_compute(Machine.probe(), device="cpu", threads=count), threads=count), dtype)
    placement.apply()
    rank, number = map(int, place.split("/"))
    world = World(rank, number, rank, number, store=store, store_stays=True) if store else World()
    world.connect(placement.device)
    (step,) = ours(Work(GPTConfig(**sizes), int(batch) or own), placement, world=world)
    done = step()
    print(json.dumps(done.grad_norm), flush=True)
    for _ in sys.stdin:
        for _ in range(STEPS):
            done = step()
        print(json.dumps(done.grad_norm), flush=True)
    world.disconnect()
