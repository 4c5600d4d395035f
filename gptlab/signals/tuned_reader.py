"""A tuned reader: an affine map for each block before the model's own readout, fitted to the final block's reading.

The raw reading z_j = head(ln_f(h_j)) asks a block in the last block's language, which lower blocks have no reason to
speak. The tuned lens (Belrose et al., 2303.08112) reads head(ln_f(h_j + A_j h_j + b_j)) instead, with A_j and b_j
fitted to bring that distribution nearest to the final one, KL(p_L ‖ p_j), the model itself unchanged. They begin at 0,
where the tuned reading is the raw one. Block L needs none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from gptlab.errors import CheckpointError
from gptlab.files import open_regular, write_whole
from gptlab.model.gpt import GPT

FILE = "tuned_reader.safetensors"
CHUNK = 512
"""Tokens whose logits are held at once."""


class TunedReader:
    """weight (L-1, C, C) and bias (L-1, C): the maps of blocks 1..L-1."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @staticmethod
    def untuned(model: GPT) -> TunedReader:
        """The reader before it is fitted: it changes nothing."""
        L, C, device = model.config.n_layer, model.config.n_embd, model.lm_head.weight.device
        return TunedReader(torch.zeros(L - 1, C, C, device=device), torch.zeros(L - 1, C, device=device))

    def __call__(self, number: int, h: Tensor) -> Tensor:
        """State h (..., C) of block `number` of 1..L, as the readout is to be given it."""
        if number > len(self.weight):
            return h
        return h + h @ self.weight[number - 1].t() + self.bias[number - 1]


def fit(
    model: GPT,
    batch: Callable[[int], Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    autocast: torch.dtype | None = None,
    told: Callable[[int, list[float]], None] = lambda step, divergences: None,
) -> TunedReader:
    """Fit by Adam, whose rate falls linearly to 0, on the tokens (B, T) that `batch` gives for each step.

    told: called after each step with the mean KL (nats a token) of blocks 1..L-1 before it.
    """
    reader = TunedReader.untuned(model)
    optimizer = torch.optim.Adam([reader.weight, reader.bias], lr=learning_rate, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        reader.weight.grad, reader.bias.grad = torch.zeros_like(reader.weight), torch.zeros_like(reader.bias)
        found = divergences(model, batch(step), reader, autocast, learn=True)
        optimizer.step()
        told(step + 1, found)
    reader.weight.grad = reader.bias.grad = None
    return reader


@torch.no_grad()
def divergences(
    model: GPT, tokens: Tensor, reader: TunedReader, autocast: torch.dtype | None = None, *, learn: bool = False
) -> list[float]:
    """Mean KL(p_L ‖ p_j) in nats a token over tokens (B, T), for blocks 1..L-1; learn: add its gradient to `.grad`."""
    with torch.autocast(tokens.device.type, autocast) if autocast else nullcontext():
        states = [h.flatten(0, 1).to(reader.weight.dtype) for h in model.hidden_states(tokens)[1:]]
    found = torch.zeros(len(states) - 1, dtype=torch.float64)
    for start in range(0, tokens.numel(), CHUNK):
        rows = slice(start, start + CHUNK)
        final = model.read(states[-1][rows]).float().log_softmax(1)
        for number, h in enumerate(states[:-1], 1):
            x = reader(number, h[rows]).requires_grad_(learn)
            with torch.set_grad_enabled(learn):
                own = model.read(x).float().log_softmax(1)
                total = (final.exp() * (final - own)).sum()
            found[number - 1] += total.detach().double().cpu()
            if learn:
                dx = torch.autograd.grad(total, x)[0] / tokens.numel()
                assert reader.weight.grad is not None
                assert reader.bias.grad is not None
                reader.weight.grad[number - 1].addmm_(dx.t(), h[rows])
                reader.bias.grad[number - 1].add_(dx.sum(0))
    return (found / tokens.numel()).tolist()


def beside(source: str | Path) -> Path:
    """Where the reader of a run, of one of its checkpoints or of a Hugging Face folder lies."""
    folder = Path(source)
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / FILE


def fingerprint(model: GPT) -> str:
    """SHA-256 of the weights that a reader belongs to."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(reader: TunedReader, model: GPT, path: Path) -> None:
    """Write the reader of `model` whole or not at all."""
    tensors = {"weight": reader.weight.cpu().contiguous(), "bias": reader.bias.cpu().contiguous()}
    write_whole(path, serialize(tensors, metadata={"model": fingerprint(model), "format": "pt"}))


def load(model: GPT, path: Path) -> TunedReader | None:
    """The reader at `path`; None where there is no file. Raises CheckpointError if it is damaged or another model's."""
    try:
        open_regular(path, inside=path.parent, error=CheckpointError).close()
    except FileNotFoundError:
        return None
    try:
        with safe_open(path, framework="pt", device=str(model.lm_head.weight.device)) as file:
            of, reader = file.metadata().get("model"), TunedReader(file.get_tensor("weight"), file.get_tensor("bias"))
    except (SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fit it again or remove it") from error
    L, C = model.config.n_layer, model.config.n_embd
    if reader.weight.shape != (L - 1, C, C) or reader.bias.shape != (L - 1, C):
        raise CheckpointError(
            f"{path}: expected maps of {L - 1} blocks {C} wide, found weights {tuple(reader.weight.shape)} and biases "
            f"{tuple(reader.bias.shape)}; fit it again or remove it"
        )
    if of != fingerprint(model):
        raise CheckpointError(f"{path} was fitted to other weights than these; fit it again or remove it")
    return reader
