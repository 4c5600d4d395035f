"""torch.compile, block by block, with a way back: what cannot be compiled runs eagerly and says why."""

from __future__ import annotations

import torch

from gptlab.device import ComputeConfig
from gptlab.model.gpt import GPT


def compile_blocks(model: GPT, compute: ComputeConfig) -> str:
    """Compile every block in place if `compute` asks for it; give what happened, in words.

    A judged block's graph is gone through twice in the backward pass, so the compiled backward must not hand its
    buffers on: functorch's `donated_buffer` is off.
    """
    if not compute.compile:
        return f"eager: {compute.reasons['compile']}"
    try:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
        for block in dict.fromkeys(model.blocks):
            block.compile()
        x = torch.zeros(1, 2, model.config.n_embd, device=compute.device, requires_grad=True)
        model.blocks[0](x).sum().backward()
    except Exception as error:  # a compiler's failures have no common type, and none may stop a run
        for block in model.blocks:
            block._compiled_call_impl = None
        return f"eager: torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    finally:
        model.zero_grad(set_to_none=True)
    return f"compiled: {compute.reasons['compile']}"
