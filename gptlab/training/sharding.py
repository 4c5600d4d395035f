"""Blocks made ready for the devices: sharded over the processes (`--parallel fsdp`) by PyTorch's FSDP2, or compiled.

Every process keeps its rows of each block's weights, gradients and moments. A block is whole only while a pass goes
through it, up or down, so a judge gathers the block that its gradient passes through and never the model. What every
reading needs (embeddings, head, final norm) stays whole everywhere, and its gradient is summed as without sharding.

Sharded tensors and blocks are recognised by what they can do, so that torch.distributed is not imported without need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT


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
