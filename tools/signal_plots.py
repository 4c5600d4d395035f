"""The picture of docs/signals.md: every signal's value and gradient against p_m, side by side.

    python tools/signal_plots.py [FILE]    draws it again, as docs/images/signals.svg by default

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

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "signals.svg"
V = 256
OTHER = 0.5
ACROSS = 3
"""Signals in a row."""


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


def draw(path: Path = PICTURE) -> Path:
    """Write the picture and give its path."""
    rows = -(-len(SIGNALS) // ACROSS)
    with settings(FILE_SETTINGS | {"axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        figure, axes = panels(rows, 2 * ACROSS, (10.4, 1.65 * rows))
        for k, (name, signal) in enumerate(SIGNALS.items()):
            p = torch.cat([torch.linspace(1.5 / V, 0.98, 80), 1 - torch.logspace(-1.8, -4, 20)]).double()
            if signal.has_threshold:  # a gate is a step, not a slope
                p = torch.cat([p, torch.tensor([0.9 - 1e-9, 0.9 + 1e-9])]).sort().values
            lines = [(BLUE, "-", 0), (RED, "--", 1)] if signal.uses_truth else [(BLUE, "-", 0)]
            for what, title in enumerate((name, "gradient at z_m")):
                panel = axes[2 * k + what]
                panel.axhline(0.0, color=GREY, linewidth=0.6)
                for color, dashes, target in lines:
                    panel.plot(p, curves(name, p, target)[what], dashes, color=color, linewidth=1.3)
                panel.set_title(title, loc="left")
                panel.set_xlim(0, 1)
                panel.set_xticks([0, 0.5, 1])
        for panel in axes[2 * len(SIGNALS) :]:
            panel.set_axis_off()
        key = axes[-2 if len(axes) > 2 * len(SIGNALS) else -1]
        for color, dashes, label in ((BLUE, "-", "the argmax is right, or the truth is not read"),
                                     (RED, "--", "the argmax is wrong")):  # fmt: skip
            key.plot([], [], dashes, color=color, linewidth=1.3, label=label)
        figure.legend(*key.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2,
                      title="against p_m, the probability of the argmax")  # fmt: skip
    save(figure, path, FILE_SETTINGS)
    return path


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
