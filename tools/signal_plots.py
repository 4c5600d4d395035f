"""The plots of docs/signals.md: every signal's value and gradient against p_m, one SVG each.

    python tools/signal_plots.py [FOLDER]    draws them again, into docs/images/signals by default

The same bytes for the same version of matplotlib. Tokens are bytes (V = 256), τ is 0.9. What the argmax leaves of the
probability is spread evenly over all other tokens; another block that a signal reads has p_m = 0.5 on the same argmax.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from gptlab.analysis.report.theme import BLUE, FILE_SETTINGS, GREY, RED, panels, save, settings
from gptlab.signals import SIGNALS

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "signals"
V = 256
OTHER = 0.5


def logits_at(p: Tensor) -> Tensor:
    """Logits (n, V), float64, whose softmax gives token 0 the probability p (n,) and every other token the same."""
    rest = ((1 - p) / (V - 1)).log()[:, None].expand(-1, V - 1)
    return torch.cat([p.log()[:, None], rest], dim=1)


def curves(name: str, p: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Values (n,) and their gradient (n,) at the argmax's logit, at top probabilities p (n,), if `target` is true."""
    signal, z = SIGNALS[name], logits_at(p).requires_grad_()
    other = logits_at(torch.full_like(p, OTHER)) if signal.needs else None
    values = signal(z, torch.full((len(p),), target), other=other)
    (slope,) = torch.autograd.grad(values.sum(), z, allow_unused=True, materialize_grads=True)
    return values.detach(), slope[:, 0]


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Write NAME.svg and give its path."""
    signal = SIGNALS[name]
    p = torch.cat([torch.linspace(1.5 / V, 0.98, 80), 1 - torch.logspace(-1.8, -4, 20)]).double()
    if signal.has_threshold:  # a gate is a step, not a slope
        p = torch.cat([p, torch.tensor([0.9 - 1e-9, 0.9 + 1e-9])]).sort().values
    lines = [("m = y", BLUE, "-", 0), ("m ≠ y", RED, "--", 1)] if signal.uses_truth else [("", BLUE, "-", 0)]
    with settings(FILE_SETTINGS):
        figure, both = panels(1, 2, (5.6, 1.9))
        for axes, what, title in zip(both, (0, 1), ("value", "gradient at z_m"), strict=True):
            axes.axhline(0.0, color=GREY, linewidth=0.6)
            for label, color, dashes, target in lines:
                axes.plot(p, curves(name, p, target)[what], dashes, color=color, label=label, linewidth=1.4)
            axes.set_title(title)
            axes.set_xlabel("p_m")
            axes.set_xlim(0, 1)
            if signal.uses_truth and not what:
                axes.legend(frameon=False, handlelength=1.6)
    path = folder / f"{name}.svg"
    save(figure, path, FILE_SETTINGS)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIGNALS:
        draw(name, folder)
