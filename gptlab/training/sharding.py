"""Blocks shared out over the processes (`--parallel fsdp`), by PyTorch's FSDP2.

Every process keeps its rows of each block's weights, gradients and moments. A block is whole only while a pass goes
through it, up or down, so a verdict gathers the block that it is passed through and never the model. What every reading
needs (embeddings, head, final norm) stays whole everywhere, and its gradient is summed as without sharding.

Tensors that are cut are recognised by `full_tensor`, so that nothing of torch.distributed is imported without need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gptlab.device import Placement
from gptlab.distributed import World
from gptlab.model.gpt import GPT


def shard_blocks(model: GPT, world: World, placement: Placement) -> None:
    """Cut every block of the model into this process's rows; the process group must be there.

    Gradients are summed over processes, not averaged: a micro-batch's share of the update is in them already. On a GPU
    a block is gathered in the dtype of the matmuls, and its gradient summed in float32; on CPUs it is gathered as it
    is, which their layer norms insist on.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = placement.device.type
    mesh = init_device_mesh(device, (world.size,))
    gathered = placement.autocast if device == "cuda" else None
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


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered where it is cut: every process must call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def held(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each, sharing its memory: for elementwise work in place."""
    return [cast(Any, t).to_local() if is_sharded(t) else t for t in tensors]


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, cut as `like` is; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut = cast(Any, like)
    return distribute_tensor(tensor, cut.device_mesh, cut.placements, src_data_rank=None)


def length(gradients: Sequence[Tensor]) -> float:
    """The Euclidean length over all of them; where some are cut, every process must ask."""
    norm = torch.nn.utils.get_total_norm
    cut = [g for g in gradients if is_sharded(g)]
    if not cut:
        return float(norm(gradients))
    uncut = [g for g in gradients if not is_sharded(g)]
    lengths = [whole(norm(cut)), *([norm(uncut)] if uncut else [])]
    return float(torch.linalg.vector_norm(torch.stack(lengths)))
