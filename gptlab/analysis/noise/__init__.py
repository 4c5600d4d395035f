"""Bias or noise: every option of the measures, with default and unit, and the signals that a list of names asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gptlab.errors import ConfigError
from gptlab.options import option
from gptlab.signals.config import SignalConfig

CONTROLS = ("placebo", "shuffled", "flipped", "self")
TRUE_LOSS = "true_loss"
THRESHOLDS = (*(round(0.05 * k, 2) for k in range(20)), 0.99)
"""The τ at which coverage and precision are given."""
LEAST_GROUPS = 32
"""Fewer make intervals wide, and the jackknife too sure of them."""

TEXT = "text"
ALTERNATIVES = {
    "sample": "the model's own sample",
    "elsewhere": "text from elsewhere",
    "shuffled": "the same shuffled",
    "random": "random tokens",
}
"""What is said in a conversation: what really was, and what is said in its place."""


@dataclass(frozen=True)
class NoiseConfig:
    """What is measured, on what. The signal's options stand over those of a run that was trained with it."""

    signals: str = option(
        "", "names such as confidence,placebo:confidence; none: the true loss alone", shown="the run's own",
        group="Gradients",
    )  # fmt: skip
    narrow: float = option(
        0.05, "more groups are measured until the 95% intervals of the alignments are narrower than ± this, 0: never"
    )
    budget: float = option(60.0, "or until this time is over, 0: no limit", unit="seconds")
    groups: int = option(4096, f"or until so many groups are compared, at least {LEAST_GROUPS}")
    group: int = option(1, "size of a group", unit="sequences")
    batch_size: int = option(16, "the most that are computed at once", unit="sequences")
    seed: int | None = option(None, "decides which sequences are read, and every draw", shown="the run's")
    branch_steps: int = option(20, "length of the branch test, 0 leaves it out", unit="updates")
    eval_tokens: int = option(65536, "validation tokens for labels and collapse", unit="tokens", group="Labels")
    reader_tokens: int = option(65536, "training tokens for the tuned affine readers, 0: none", unit="tokens")
    say: int = option(16, "length of what is said in a conversation", unit="tokens", group="Conversation")
    data: str | None = option(None, "a corpus by name, or a folder of shards", shown="the run's", group="Data")
    tokenizer: Literal["bytes", "gpt2"] | None = option(None, "of the corpus", shown="the run's")
    block_size: int | None = option(None, "length of a sequence", unit="tokens", shown="the model's")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="Machine")
    dtype: Literal["fp32", "bf16"] = option("fp32", "of the matmuls")
    threads: int = option(0, "threads of the process", unit="threads", shown="all cores")
    signal: SignalConfig = field(default_factory=SignalConfig)

    def __post_init__(self) -> None:
        least = {
            "say": 1, "narrow": 0, "budget": 0, "groups": LEAST_GROUPS, "group": 1, "batch_size": 1, "branch_steps": 0,
            "eval_tokens": 1, "reader_tokens": 0, "block_size": 1,
        }  # fmt: skip
        for name, low in least.items():
            found = getattr(self, name)
            if found is not None and found < low:
                raise ConfigError(f"{name} must be at least {low}, found {found}")


def looks(most: int) -> Iterator[int]:
    """After how many groups it is looked whether the intervals are narrow enough.

    Each look has twice as many as the one before: few looks, so that stopping at one hardly changes how often an
    interval misses.

    >>> list(looks(200))
    [32, 64, 128, 200]
    """
    groups = LEAST_GROUPS
    while groups < most:
        yield groups
        groups *= 2
    yield most


def own_names(signals: Sequence[SignalConfig]) -> list[str]:
    """The signals of a run as they are asked for."""
    return [s.name if s.control == "none" else f"{s.control}:{s.name}" for s in signals]


def split_name(name: str) -> tuple[str, Any]:
    """(the signal, its control) of a name such as placebo:confidence.

    >>> split_name("placebo:confidence"), split_name("idea.py:mine")
    (('confidence', 'placebo'), ('idea.py:mine', 'none'))
    """
    control, colon, rest = name.partition(":")
    return (rest, control) if colon and control in CONTROLS else (name, "none")


def names_in(text: str) -> list[str]:
    """The names of a list, each once; the true loss is always measured and need not be asked for."""
    names = [name.strip() for name in text.split(",")]
    return [name for name in dict.fromkeys(names) if name not in ("", "none", TRUE_LOSS)]


def signal_configs(
    names: Sequence[str], own: Sequence[SignalConfig], changes: Mapping[str, Any]
) -> dict[str, SignalConfig]:
    """The config of every name: the run's own for its signals, the defaults for others, and `changes` over both.

    Raises ConfigError for an unknown signal.
    """
    mine, configs = {signal.name: signal for signal in own}, {}
    for name in names:
        signal, control = split_name(name)
        configs[name] = replace(mine.get(signal, SignalConfig(signal)), control=control, dose=None, **changes)
    return configs
