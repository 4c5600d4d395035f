"""Sums in one tree, blocks cut over processes, compiled blocks: the same updates as by one process, eagerly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CUT, outcome, runs_of
from scripts import load_script, run_ranks
from small_run import SEQUENCES, L, Run, T, V, make_run
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import ConfigError
from gptlab.model import GPTConfig
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training import TrainingConfig
from gptlab.training.loop import rehearse
from gptlab.training.parallel import (
    Node,
    TreeSum,
    compile_blocks,
    complete_subtrees,
    full_tensor,
    global_norm,
    local_shards,
    shard_like,
)


def terms(count: int) -> Tensor:
    """Terms (count, 50) over nine orders of magnitude, whose sums round otherwise in every order."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 50, generator=generator) * 10.0 ** torch.randint(-4, 5, (count, 50), generator=generator)


def recursion(units: Tensor) -> Tensor:
    """The sum of full trees over the largest powers of two, each left half plus right half, added from the left."""
    if len(units) == 1:
        return units[0]
    size = 1 << (len(units).bit_length() - 1)
    if size == len(units):
        return recursion(units[: size // 2]) + recursion(units[size // 2 :])
    total, units = recursion(units[:size]), units[size:]
    while len(units):
        size = 1 << (len(units).bit_length() - 1)
        total, units = total + recursion(units[:size]), units[size:]
    return total


def held(units: Tensor, ranks: int, rank: int) -> TreeSum:
    """What one of so many ranks holds."""
    each, tree = len(units) // ranks, TreeSum()
    for k in range(rank * each, (rank + 1) * each):
        tree.add(Node(0, k), [units[k].clone()])
    return tree


@pytest.mark.fault(number=13)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 12, 20, 24, 32])
def test_any_number_of_ranks_gives_the_bits_of_the_recursion(count: int) -> None:
    units = terms(count)
    expected = recursion(units)
    if count > 3:
        assert not torch.equal(expected, sum(units[1:], start=units[0])), "the order counts"
    for ranks in (n for n in range(1, count + 1) if count % n == 0):
        together = TreeSum()
        for rank in range(ranks):
            roots = held(units, ranks, rank).roots
            each = count // ranks
            assert [node for node, _ in roots] == complete_subtrees(range(rank * each, (rank + 1) * each))
            for node, tensors in roots:
                together.add(node, tensors)
        (total,) = together.total()
        assert torch.equal(total, expected), ranks


def test_units_are_as_large_for_any_ranks_and_what_cannot_be_shared_is_refused() -> None:
    config = TrainingConfig(block_size=32, total_batch_tokens=32 * 12, batch_size=5, deterministic=True, threads=1)
    assert [config.micro_batch(ranks) for ranks in (1, 3)] == [4, 4]
    with pytest.raises(
        ConfigError, match=r"12 sequences is 3 micro-batches of 4 .* 2 processes cannot share; use 1, 3"
    ):
        config.micro_batch(2)
    with pytest.raises(ConfigError, match="deterministic needs a fixed number of threads"):
        TrainingConfig(deterministic=True)


@pytest.mark.parametrize(
    ("ranks", "which"),
    [
        (2, "kinds"),
        pytest.param(2, "signals", marks=pytest.mark.slow),
        pytest.param(4, "kinds", marks=pytest.mark.slow),
    ],
)
def test_cut_blocks_make_what_one_process_makes(ranks: int, which: str, tmp_path: Path) -> None:
    """Real processes over gloo on the loopback, every signal and control, in float64: far below the 1e-6 promised."""
    out = tmp_path / "out.pt"
    run_ranks(Path(__file__).with_name("ranks.py"), ranks, out, which)
    found = torch.load(out, weights_only=True)
    assert set(found) == set(runs_of(which))
    for name, options in runs_of(which).items():
        most, passes = found[name].pop("whole blocks").tolist()
        assert most == 1, f"{name}: {most} blocks were whole at a time"
        assert passes > 8
        weights, moments = found[name].pop("bytes").tolist()
        if name == "baseline":  # docs/scale.md counts fp32
            said = load_script("tools/scale.py").state(GPTConfig(T, V, L, 2, 16), ranks, "fsdp")
            assert (weights, moments) == (2 * said.weights, 2 * said.moments)
        expected = outcome(make_run(**options), (SEQUENCES,), World())
        assert found[name].keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["baseline", "confidence", "live", "placebo", "one block shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_are_the_ones_that_were_not_kept(name: str, dtype: torch.dtype) -> None:
    options = CUT[name] | {"dtype": torch.float32, "autocast": None if dtype == torch.float32 else dtype}
    kept = outcome(make_run(**options), (5, 7), World())
    again = outcome(make_run(**options, activation_checkpointing=True), (5, 7), World())
    for key, tensor in kept.items():
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "muon"}, "whole matrices"),
        ({"deterministic": True, "threads": 1}, "one fixed order"),
        ({"noise_every": 5}, "single sequences"),
    ],
)
def test_what_needs_whole_tensors_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}.*{words}.*--parallel ddp"):
        TrainingConfig(parallel="fsdp", **options)


def test_whole_tensors_need_no_processes() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert global_norm(tensors) == pytest.approx(5.0)
    assert full_tensor(tensors[0]) is tensors[0]
    assert shard_like(tensors[0], tensors[1]) is tensors[0]
    assert all(a is b for a, b in zip(local_shards(tensors), tensors, strict=True))


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
