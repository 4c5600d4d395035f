"""The tuned lens: an affine map for each block before the model's own readout (Belrose et al., 2303.08112).

The raw reading z_j = head(ln_f(h_j)) asks a block to write in the last block's basis, which lower blocks have no reason
to do. The tuned one reads head(ln_f(h_j + A_j h_j + b_j)), with A_j and b_j fitted while the model itself stays as it
is: to the final block's distribution, KL(p_L ‖ p_j), or to the true next token. They begin at 0, where the tuned
reading is the raw one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from gptlab.errors import CheckpointError
from gptlab.files import open_regular, write_whole
from gptlab.model.gpt import GPT
from gptlab.signals.functions import self_distillation
from gptlab.signals.readout import Readout, TokenLoss, true_loss

FILE = "tuned_reader.safetensors"


class TunedLens:
    """weight (n, C, C) and bias (n, C): the maps of blocks 1..n; blocks above n are read raw."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @staticmethod
    def untuned(model: GPT, blocks: int | None = None) -> TunedLens:
        """The lens before it is fitted: it changes nothing. blocks: how many it maps, by default all but the last."""
        C, device = model.config.n_embd, model.lm_head.weight.device
        n = model.config.n_layer - 1 if blocks is None else blocks
        return TunedLens(torch.zeros(n, C, C, device=device), torch.zeros(n, C, device=device))

    def __call__(self, number: int, h: Tensor) -> Tensor:
        """State h (..., C) of block `number` of 1..L, as the readout is to be given it."""
        if number > len(self.weight):
            return h
        return h + h @ self.weight[number - 1].t() + self.bias[number - 1]


@dataclass(frozen=True)
class Objective:
    """What a lens is fitted to, and by which of Adam's settings.

    loss: of a token, which also reads the final block if `needs_final`; rate: Adam's at the start, for width C
    """

    loss: TokenLoss
    needs_final: bool
    rate: Callable[[int], float]
    betas: tuple[float, float]


def _kl_from_final(logits: Tensor, targets: Tensor, other: Tensor | None) -> Tensor:
    assert other is not None
    return self_distillation(logits, targets, other=other)


FINAL_BLOCK = Objective(TokenLoss(_kl_from_final), True, lambda C: 1e-3, (0.9, 0.99))
"""The final block's distribution, which says what a block already decides."""
TRUE_TOKEN = Objective(true_loss, False, lambda C: 0.5 / C, (0.9, 0.999))
"""The true next token, which says what a block knows. C entries that each move by rate move h by half of it at most."""


def fit(
    lens: TunedLens,
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    objective: Objective = FINAL_BLOCK,
    *,
    learning_rate: float | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, list[float]], None] = lambda step, losses: None,
) -> TunedLens:
    """Fit `lens` in place by Adam, whose rate falls linearly to 0, on batches of tokens and targets (B, T); give it.

    progress: called after each step with the mean loss (nats a token) of every mapped block before it.
    """
    rate = learning_rate or objective.rate(model.config.n_embd)
    optimizer = torch.optim.Adam([lens.weight, lens.bias], lr=rate, betas=objective.betas)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        losses = add_gradients(lens, model, *next(batches), objective, autocast)
        optimizer.step()
        lens.weight.grad = lens.bias.grad = None
        progress(step + 1, losses)
    return lens


@torch.no_grad()
def add_gradients(
    lens: TunedLens, model: GPT, tokens: Tensor, targets: Tensor, objective: Objective, autocast: torch.dtype | None
) -> list[float]:
    """Set the lens's `.grad` to that of the mean loss over tokens and targets (B, T); give each mapped block's loss."""
    states, y = _read_states(lens, model, tokens, autocast), targets.flatten()
    readout = Readout(model, autocast, readings=len(lens.weight) * (1 + objective.needs_final))
    weight_grad, bias_grad = torch.zeros_like(lens.weight), torch.zeros_like(lens.bias)
    losses = []
    for number, h in enumerate(states[: len(lens.weight)], 1):
        other = states[-1] if objective.needs_final else None
        reading = readout.read(lens(number, h), y, objective.loss, 1 / len(y), learn=False, other=other)
        weight_grad[number - 1] = reading.gradient.t() @ h
        bias_grad[number - 1] = reading.gradient.sum(0)
        losses.append(float(reading.total / len(y)))
    lens.weight.grad, lens.bias.grad = weight_grad, bias_grad
    return losses


def divergences(model: GPT, tokens: Tensor, lens: TunedLens, autocast: torch.dtype | None = None) -> list[float]:
    """Mean KL(p_L ‖ p_j) in nats a token over tokens (B, T), for every mapped block."""
    states, readout, y = _read_states(lens, model, tokens, autocast), Readout(model, autocast), tokens.flatten()
    mapped = enumerate(states[: len(lens.weight)], 1)
    values = (readout.values(lens(number, h), y, FINAL_BLOCK.loss, states[-1]) for number, h in mapped)
    return [float(of_block.double().mean()) for of_block in values]


@torch.no_grad()
def _read_states(lens: TunedLens, model: GPT, tokens: Tensor, autocast: torch.dtype | None) -> list[Tensor]:
    """h_1..h_L of tokens (B, T), each (B·T, C), in the lens's dtype."""
    with torch.autocast(tokens.device.type, autocast) if autocast else nullcontext():
        return [h.flatten(0, 1).to(lens.weight.dtype) for h in model.hidden_states(tokens)[1:]]


def path_of(source: str | Path) -> Path:
    """Where the lens of a run, of one of its checkpoints or of a Hugging Face folder lies."""
    folder = Path(source)
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / FILE


def fingerprint(model: GPT) -> str:
    """SHA-256 of the weights that a lens belongs to."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(lens: TunedLens, model: GPT, path: Path) -> None:
    """Write the lens of `model` whole or not at all."""
    tensors = {"weight": lens.weight.cpu().contiguous(), "bias": lens.bias.cpu().contiguous()}
    content = to_bytes(tensors, metadata={"model": fingerprint(model), "format": "pt"})
    write_whole(path, content, error=CheckpointError)


def load(model: GPT, path: Path) -> TunedLens | None:
    """The lens at `path`; None where there is no file. Raises CheckpointError if it is damaged or another model's."""
    try:
        open_regular(path, inside=path.parent, error=CheckpointError).close()
    except FileNotFoundError:
        return None
    try:
        with safe_open(path, framework="pt", device=str(model.lm_head.weight.device)) as file:
            of, lens = file.metadata().get("model"), TunedLens(file.get_tensor("weight"), file.get_tensor("bias"))
    except (SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fit it again or remove it") from error
    L, C = model.config.n_layer, model.config.n_embd
    if lens.weight.shape != (L - 1, C, C) or lens.bias.shape != (L - 1, C):
        raise CheckpointError(
            f"{path}: expected maps of {L - 1} blocks {C} wide, found weights {tuple(lens.weight.shape)} and biases "
            f"{tuple(lens.bias.shape)}; fit it again or remove it"
        )
    if of != fingerprint(model):
        raise CheckpointError(f"{path} was fitted to other weights than these; fit it again or remove it")
    return lens
