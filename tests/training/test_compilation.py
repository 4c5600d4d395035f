"""Compiled blocks: the same gradients for every signal, compiled before the first update, and eager where that fails.

Through PyTorch's own front and AOTAutograd, which is what splits a block into passes; the code generator behind them,
which takes minutes on a CPU, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import pytest
import torch
from small_run import Run, make_run
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import ConfigError
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training.loop import rehearse
from gptlab.training.parallel import compile_blocks

Backend = Callable[[GraphModule, list[Any]], Any]


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """`compile_with(backend)` has torch.compile use it, and forget what was compiled before."""
    plain = torch.nn.Module.compile

    def use(backend: Any) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(plain, backend=backend))

    return use


def compiled(run: Run, autocast: torch.dtype | None = None) -> str:
    """Compile a run's blocks as a session does; what became of it."""
    run.compute = ComputeConfig(torch.device("cpu"), autocast, 1, True, {"compile": "as asked"})
    model = run.state.model
    return compile_blocks(model, run.compute, partial(rehearse, model, run.config, World(), run.compute))


def passes(forward: Backend, backward: Backend) -> Any:
    return aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=forward)


def as_it_is(graph: GraphModule, inputs: list[Any]) -> Any:
    return make_boxed_func(graph.forward)


CASES: dict[str, dict[str, Any]] = {
    "baseline": {},
    **{name: {"name": name, "threshold": 0.1} if SIGNALS[name].has_threshold else {"name": name} for name in SIGNALS},
    **{f"{name}, live": {"name": name, "evaluator": "live"} for name in ("confidence", "brier", "advantage")},
    "rotate": {"name": "confidence", "layers": "rotate"},
    "positions": {"name": "confidence", "positions": 0.25},
    "local": {"name": "confidence", "reach": "local"},
    "live and local": {"name": "confidence", "reach": "local", "evaluator": "live"},
    "no embeddings": {"name": "confidence", "embeddings": False},
    "placebo": {"name": "confidence", "control": "placebo"},
    "live placebo": {"name": "confidence", "control": "placebo", "evaluator": "live"},
    "shuffled": {"name": "confidence", "control": "shuffled"},
    "flipped": {"name": "deep_supervision", "control": "flipped", "flip_to": "argmax"},
    "held dose": {"name": "confidence", "dose": 0.1},
}


def test_gradients_are_those_of_eager_blocks_for_every_signal(compile_with: Callable[[Any], None]) -> None:
    compile_with("aot_eager")
    for name, options in CASES.items():
        signal = SignalConfig(**options) if options else SignalConfig()
        plain, other = make_run(signal=signal), make_run(signal=signal)
        assert compiled(other) == "compiled: as asked", name
        assert other.state.model.blocks[0]._compiled_call_impl is not None
        expected, found = plain.gradient((4, 8)), other.gradient((4, 8))
        for key, gradient in expected.items():
            assert torch.allclose(found[key], gradient, rtol=1e-9, atol=1e-12), (name, key)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_compiled_after_the_rehearsal(
    autocast: torch.dtype | None, checkpointing: bool, compile_with: Callable[[Any], None]
) -> None:
    """The graphs of an update are those of the rehearsal: its shape, its autocast, no symbols for sizes."""
    made: list[list[Any]] = []

    def count(graph: GraphModule, inputs: list[Any]) -> Any:
        made.append(inputs)
        return make_boxed_func(graph.forward)

    compile_with(passes(count, count))
    signal = SignalConfig("confidence", positions=0.5)
    run = make_run(
        signal=signal, dtype=torch.float32, activation_checkpointing=checkpointing, batch_size=6, dose_every=1
    )
    assert compiled(run, autocast).startswith("compiled")
    before = len(made)
    assert before >= 2 + 1  # forward and backward, and a validation's forward
    assert all(isinstance(size, int) for inputs in made for x in inputs if hasattr(x, "shape") for size in x.shape)
    run.update((6, 6), measure_dose=True)
    run.update((6, 6))
    assert len(made) == before


def fails(graph: GraphModule, inputs: list[Any]) -> Any:
    raise RuntimeError("no such instruction\n  and a page more")


def fails_in_bf16(graph: GraphModule, inputs: list[Any]) -> Any:
    if any(
        node.meta["val"].dtype == torch.bfloat16 for node in graph.graph.nodes if hasattr(node.meta.get("val"), "dtype")
    ):
        fails(graph, inputs)
    return make_boxed_func(graph.forward)


def fails_at_8_tokens(graph: GraphModule, inputs: list[Any]) -> Any:
    return (
        fails(graph, inputs)
        if any(getattr(x, "dim", int)() == 3 and x.shape[1] == 8 for x in inputs)
        else make_boxed_func(graph.forward)
    )


@pytest.mark.parametrize(
    "backend",
    [
        passes(fails, as_it_is), passes(as_it_is, fails), passes(fails_in_bf16, fails_in_bf16),
        passes(as_it_is, fails_in_bf16), passes(fails_at_8_tokens, as_it_is), fails,
    ],
    ids=["forward", "backward", "bf16", "backward in bf16", "at the real length", "the front"],
)  # fmt: skip
def test_a_compiler_that_fails_leaves_eager_blocks(backend: Any, compile_with: Callable[[Any], None]) -> None:
    """Whatever it is in training's own graph that it cannot do: the run is then the eager one."""
    compile_with(backend)
    options = {"signal": SignalConfig("confidence"), "dtype": torch.float32, "autocast": torch.bfloat16}
    plain, other = make_run(**options), make_run(**options)
    said = compiled(other, torch.bfloat16)
    assert said.startswith("eager: torch.compile failed (")
    assert "\n" not in said
    assert all(block._compiled_call_impl is None for block in other.state.model.blocks)
    assert all(p.grad is None for p in other.state.model.parameters())
    expected, found = plain.gradient(), other.gradient()
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_a_users_signal_that_fails_is_no_failure_of_the_compiler(compile_with: Callable[[Any], None]) -> None:
    compile_with("eager")
    run = make_run()

    def refused() -> None:
        raise ConfigError("signal.name idea.py:mine failed")

    run.compute = ComputeConfig(torch.device("cpu"), None, 1, True, {"compile": "as asked"})
    with pytest.raises(ConfigError, match="mine failed"):
        compile_blocks(run.state.model, run.compute, refused)
