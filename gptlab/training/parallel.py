"""Many devices and processes, one update: blocks sharded or compiled, and sums over micro-batches and ranks.

Sharded (`--parallel fsdp`, by PyTorch's FSDP2), every process keeps its rows of each block's weights, gradients and
moments. A block is whole only while a pass goes through it, up or down, so a judge gathers the block that its gradient
passes through and never the model. What every reading needs (embeddings, head, final norm) stays whole everywhere, and
its gradient is summed as without sharding. Sharded tensors and blocks are recognised by what they can do, so that
torch.distributed is not imported without need.

As a rule micro-batches are added as they come and processes by an all-reduce. Floating-point addition depends on its
order, so `--deterministic` does both in one fixed binary tree over the update's units, which are micro-batches of a
fixed number of sequences: unit 2k with 2k+1, pairs with pairs, and so on. A process holds a run of consecutive units
and adds the subtrees that are complete within it; the roots of these go to every process, which adds the rest in the
same tree. So the bits are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from gptlab.device import ComputeConfig
from gptlab.distributed import World, buckets
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT

if TYPE_CHECKING:
    from gptlab.training.block_graph import Batch
    from gptlab.training.config import TrainingConfig


def compile_blocks(
    model: GPT, compute: ComputeConfig, rehearse: Callable[[], object], *, dynamic: bool | None = False
) -> str:
    """Compile every block in place if `compute` asks for it; give what happened, in words.

    rehearse: makes the passes to come, in their shapes and dtypes; a compiler that fails does so here, where blocks can
    still run as they are. dynamic: as torch.compile's own; False compiles every shape by itself.
    A judged block's graph is gone through twice in the backward pass, so the compiled backward must not hand its
    buffers on: functorch's `donated_buffer` is off.
    """
    if not compute.compile:
        return f"eager: {compute.reasons['compile']}"
    try:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
        for block in dict.fromkeys(model.blocks):
            block.compile(dynamic=dynamic)
        rehearse()
    except GptlabError:  # of a user's signal, not of the compiler
        raise
    except Exception as error:  # a compiler's failures have no common type, and none may stop a run
        for block in model.blocks:
            block._compiled_call_impl = None
        return f"eager: torch.compile failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]})"
    finally:
        model.zero_grad(set_to_none=True)
    return f"compiled: {compute.reasons['compile']}"


def shard_blocks(model: GPT, world: World, compute: ComputeConfig) -> None:
    """Shard every block of the model, so that this process keeps its rows; the process group must be there.

    Gradients are summed over processes, not averaged: a micro-batch's share of the update is in them already. On a GPU
    a block is gathered in the dtype of the matmuls, and its gradient summed in float32; on CPUs it is gathered as it
    is, which their layer norms insist on.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = compute.device.type
    mesh = init_device_mesh(device, (world.size,))
    gathered = compute.autocast if device == "cuda" else None
    reduced = torch.float32 if gathered else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
    for block in dict.fromkeys(model.blocks):
        unit = cast(Any, fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy))
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other


def blocks_are_sharded(model: GPT) -> bool:
    """Whether every process holds rows of the blocks only, so that a pass through them needs all processes."""
    return hasattr(model.blocks[0], "reshard")  # FSDP2's mark


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only rows of it."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it, gathered where it is sharded: every process must call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each, sharing its memory: for elementwise work in place."""
    return [cast(Any, t).to_local() if is_sharded(t) else t for t in tensors]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as `like` is; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, like)
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def global_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm over all of them; where some are sharded, every process must ask."""
    gradients, norm = list(gradients), torch.nn.utils.get_total_norm
    sharded = [g for g in gradients if is_sharded(g)]
    if not sharded:
        return float(norm(gradients))
    rest = [g for g in gradients if not is_sharded(g)]
    norms = [full_tensor(norm(sharded)), *([norm(rest)] if rest else [])]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def clip_factor(norm: float, limit: float) -> float:
    """What a gradient of this norm is multiplied by, so that it is no longer than `limit`; 0 = never clipped."""
    return limit / norm if limit and norm > limit else 1.0


class Reducer:
    """An update's sums: the parameters' `.grad`, and other tensors, which are summed in place."""

    def __init__(self, config: TrainingConfig, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._parameters, self._others = parameters, others
        self._tree = TreeSum() if config.deterministic else None
        self._unit = config.micro_batch(1) if config.deterministic else 0
        self._units = config.sequences // self._unit if self._unit else 0

    def close(self, batch: Batch) -> None:
        """A micro-batch is in. Every unit of a tree begins with nothing, so that it does not depend on others."""
        if self._tree is None:
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        assert len(gradients) == len(self._parameters), "the true loss reaches every parameter"
        self._tree.add(Node(0, batch.first_sequence // self._unit), [*gradients, *(t.clone() for t in self._others)])
        for p in self._parameters:
            p.grad = None
        for t in self._others:
            t.zero_()

    def reduce(self, world: World) -> None:
        """Replace everything by its sum over all ranks."""
        if self._tree is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            for tensors in (gradients, self._others):
                world.sum_([t for t in tensors if not is_sharded(t)])  # FSDP2 has summed its own in every backward
            return
        total = self._tree.total_over(world, self._units)
        for p, gradient in zip(self._parameters, total, strict=False):
            p.grad = gradient
        for t, value in zip(self._others, total[len(self._parameters) :], strict=True):
            t.copy_(value)


class Node(NamedTuple):
    """The subtree over the units from place·2^level on, 2^level of them."""

    level: int
    place: int

    def joins(self, right: Node) -> bool:
        """Whether this and `right` are the two children of one node."""
        return self.level == right.level and self.place % 2 == 0 and right.place == self.place + 1


class TreeSum:
    """The sums of the subtrees that are complete so far, in the order of units.

    At any time there are about log2(units) of them, each as large as one term.
    """

    def __init__(self) -> None:
        self.roots: list[tuple[Node, list[Tensor]]] = []

    def add(self, node: Node, tensors: list[Tensor]) -> None:
        """Take over the tensors of the next subtree, a unit (level 0) or more; they are added to in place."""
        while self.roots and self.roots[-1][0].joins(node):
            (left, sums), right = self.roots.pop(), tensors
            if sums:
                torch._foreach_add_(sums, right)
            node, tensors = Node(left.level + 1, left.place // 2), sums
        self.roots.append((node, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all: where the number of units is no power of two, roots are added from the left."""
        (_, total), *rest = self.roots
        for _, tensors in rest:
            torch._foreach_add_(total, tensors)
        return total

    def total_over(self, world: World, units: int) -> list[Tensor]:
        """The sum over all ranks, the same on each, of `units` units shared equally and in order among them.

        Every rank gets every other's roots, a bucket of tensors at a time.
        """
        if world.size == 1:
            return self.total()
        each = units // world.size
        nodes = [complete_subtrees(range(rank * each, (rank + 1) * each)) for rank in range(world.size)]
        assert [node for node, _ in self.roots] == nodes[world.rank], "this rank's units were added in order"
        most = max(map(len, nodes))
        for places in buckets(self.roots[0][1]):
            mine = [torch.cat([tensors[k].reshape(-1) for k in places]) for _, tensors in self.roots]
            mine += [torch.zeros_like(mine[0])] * (most - len(mine))  # one shape for all ranks
            everything = TreeSum()
            for of_rank, parts in zip(nodes, world.gather(torch.stack(mine)), strict=True):
                for node, part in zip(of_rank, parts, strict=False):
                    everything.add(node, [part])
            (flat,) = everything.total()
            own = self.roots[0][1]
            for k, part in zip(places, flat.split([own[k].numel() for k in places]), strict=True):
                own[k].copy_(part.view_as(own[k]))
        return self.roots[0][1]


def complete_subtrees(units: Iterable[int]) -> list[Node]:
    """The fewest subtrees that cover consecutive units."""
    tree = TreeSum()
    for unit in units:
        tree.add(Node(0, unit), [])
    return [node for node, _ in tree.roots]
