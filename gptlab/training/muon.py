"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer (`--optimizer muon`).

Muon (Jordan 2024) makes of a matrix's momentum, by Newton-Schulz steps, a nearly orthogonal matrix of the same
directions. That is meant for matrices within the network; embeddings with the head, vectors and biases stay with AdamW.
Gradients are summed over processes before the step, so that every process sees whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MuonWithAdamW:
    """torch.optim.Muon and AdamW side by side: the groups of both, and one state for all parameters."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._optimizers = (muon, adamw)
        muon.state = adamw.state  # keyed by parameter, and no parameter is in both
        self.state = adamw.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def build_muon(
    matrices: Sequence[Tensor], rest: torch.optim.AdamW, learning_rate: float, weight_decay: float
) -> MuonWithAdamW:
    """Muon with momentum 0.95, Nesterov's, beside AdamW for the rest, under one learning rate and schedule.

    An orthogonal (A, B) matrix is longer the larger it is, so its entries are scaled by 0.2·sqrt(max(A, B)), which
    makes them as large as AdamW's usual updates: learning rates and decay found for AdamW serve (Liu et al. 2025,
    2502.16982; PyTorch's `adjust_lr_fn="match_rms_adamw"`).
    """
    muon = torch.optim.Muon(
        list(matrices), lr=learning_rate, weight_decay=weight_decay, momentum=0.95, nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return MuonWithAdamW(muon, rest)
