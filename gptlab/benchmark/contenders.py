"""What is measured: whole optimizer steps of ours and of peers, on the same tokens, each a function without arguments.

Peers are run as their users run them: their own model, eager on a CPU and compiled on a GPU, autocast for bf16,
gradient clipping at 1, AdamW as they set it. transformers is a package; nanoGPT and build-nanogpt come from a checkout
that the caller names.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.device import DTYPES, ComputeConfig, keep_freed_memory
from gptlab.distributed import World
from gptlab.errors import UsageError
from gptlab.files import read_text
from gptlab.model.fast_cpu import install
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.signals.config import SignalConfig
from gptlab.training.block_graph import Batch
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import rehearse
from gptlab.training.optimizer import build_optimizer
from gptlab.training.sharding import compile_blocks
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


def nanogpt_step(work: Work, placement: ComputeConfig, checkout: Path) -> Step:
    """A step of nanoGPT's model.py, its optimizer as it configures it (on a CPU: not fused)."""
    module = _module(checkout / "model.py", "nanogpt_model")
    return _checkout_step(work, placement, module, (0.1, 1e-5, (0.9, 0.95)), dropout=0.0, bias=True)


def build_nanogpt_step(work: Work, placement: ComputeConfig, checkout: Path) -> Step:
    """A step of build-nanogpt's model: its file is a script, so only its definitions are executed."""
    module = _definitions(checkout / "train_gpt2.py", "build_nanogpt_model")
    return _checkout_step(work, placement, module, (0.1, 1e-5))


def _checkout_step(
    work: Work, placement: ComputeConfig, module: ModuleType, optimizer: tuple[Any, ...], **options: Any
) -> Step:
    """A step of a checkout's own GPT; optimizer: what its configure_optimizers takes before the device."""
    model = module.GPT(module.GPTConfig(**_sizes(work.config), **options)).to(placement.device)
    configured = model.configure_optimizers(*optimizer, placement.device.type)
    tokens, targets = work.data(placement.device)
    return plain_step(model, configured, lambda: model(tokens, targets)[1], placement)


def _sizes(c: GPTConfig) -> dict[str, int]:
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    return {name: getattr(c, name) for name in names}


PEERS: dict[str, Callable[[Work, ComputeConfig, Path], Step]] = {
    "nanogpt": nanogpt_step,
    "build-nanogpt": build_nanogpt_step,
}
FILES = {"nanogpt": "model.py", "build-nanogpt": "train_gpt2.py"}


def check_checkout(name: str, path: Path) -> None:
    """Raise UsageError if there is no checkout of a peer at `path`."""
    if not (path / FILES[name]).is_file():
        raise UsageError(f"--peer {name}: expected a checkout with {FILES[name]}, found none at {path}")


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


def placed(placement: ComputeConfig, dtype: str) -> ComputeConfig:
    """The same placement in another dtype."""
    return replace(placement, autocast=None if dtype == "fp32" else DTYPES[dtype])
