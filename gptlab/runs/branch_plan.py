"""What is asked of branches: which arms, how many steps, over how many batches a signal is averaged; and the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

from gptlab.errors import ConfigError
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig

MOST_AVERAGED = 2**20
"""The M of a branch lies below it, so that (step, m) fits into one number: step·MOST_AVERAGED + m."""


@dataclass(frozen=True)
class GradientNoise:
    """What is noise by definition (`--gradient_noise`): Gaussian, `size` times |g_CE| long, fresh each step.

    An average of M such draws is one that is 1/√M as long, and so it is drawn.
    """

    size: float


@dataclass(frozen=True)
class GradientBias:
    """What is bias by definition (`--gradient_bias`): one direction for each data seed, `size` times |g_CE| long.

    It is the same in every step, and so its average over any number of batches is itself.
    """

    size: float


Arm = SignalConfig | GradientNoise | GradientBias


@dataclass(frozen=True)
class Plan:
    """What every arm goes through.

    steps: K, updates of a branch; averages: the M, lowest first; seeds: data seeds; eval_tokens: held-out tokens, None
    for the run's own; learning_rate: held at this, None for the schedule as the run would have gone on. Raises
    ConfigError.
    """

    steps: int = 20
    averages: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    eval_tokens: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a branch needs at least 1 step, found {self.steps}")
        ordered = tuple(sorted(set(self.averages)))
        if len(ordered) < 2 or ordered[0] != 1 or ordered[-1] >= MOST_AVERAGED:
            raise ConfigError(
                f"averages must hold 1 and at least one more number of batches, such as 1,4,16, found {self.averages}"
            )
        object.__setattr__(self, "averages", ordered)
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ConfigError(f"an interval needs at least 2 data seeds, each once, found {list(self.seeds)}")

    def cost(self, arms: Sequence[Arm]) -> int:
        """Gradients of an update's batch that the branches of all arms need, the true loss's branch included."""
        signals = sum(isinstance(arm, SignalConfig) for arm in arms)
        known = len(arms) - signals
        averages = len(self.averages)
        per_step = 1 + signals * (averages + sum(self.averages)) + known * averages
        return len(self.seeds) * (self.steps * per_step + signals)


def arms_named(names: Sequence[str], config: TrainingConfig) -> dict[str, Arm]:
    """Arms by name: SIGNAL, CONTROL:SIGNAL, gradient_noise:SIZE or gradient_bias:SIZE.

    A signal that the run was trained with has the run's own options, another the defaults. Raises ConfigError.
    """
    controls = get_args(get_type_hints(SignalConfig)["control"])
    own = {signal.name: signal for signal in config.signals}
    arms: dict[str, Arm] = {}
    for text in names:
        head, _, rest = text.partition(":")
        if known := {"gradient_noise": GradientNoise, "gradient_bias": GradientBias}.get(head):
            arms[text] = known(_size(head, rest))
        elif head in controls and rest:
            arms[text] = replace(own.get(rest) or SignalConfig(rest), control=head)
        else:
            arms[text] = own.get(text) or SignalConfig(text)
    return arms


def _size(name: str, size: str) -> float:
    try:
        found = float(size or 1)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"{name}:{size}: expected {name}:SIZE with a size above 0 in units of |g_CE|")
    return found
