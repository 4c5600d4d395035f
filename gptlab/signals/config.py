"""What is asked of a signal: which, how strong, judged by whom, reaching how far. docs/signals.md has it all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.options import option
from gptlab.randomness import uniform_index
from gptlab.signals.registry import (
    CONVERSATION,
    OBJECTIVES,
    SAMPLED,
    SIGNALS,
    GivenFunction,
    Objective,
    Signal,
    known_names,
    user_signal,
)

READING_OPTIONS = ("layers", "positions", "evaluator", "reach", "embeddings")
"""What signals that read blocks have and other sources have not."""
CONVERSATION_OPTIONS = ("say", "reply", "samples", "turns", "advantage", "exact", "listener")
EXACT_VOCABULARY = 1024
"""The most utterances that are enumerated at each turn."""


@dataclass(frozen=True)
class SignalConfig:
    """One signal and its options. Judges are counted from 1; judge j reads z_j and teaches h_{j-1}.

    In Python, name may also be a function `(logits (n, V), targets (n,)) -> (n,)` of one's own.

    >>> SignalConfig("confidence", layers=(1, 3)).judges_at(step=0, n_layer=4, seed=1)
    ((1, 3), 1)
    """

    name: str = option(
        "none", "the signal: what adds a gradient (none: the baseline), or FILE.py:FUNCTION with --allow_code"
    )
    weight: float | None = option(None, "factor of the signal in the total loss", shown="1/n_layer")
    dose: float | None = option(None, "hold |weight·g_signal|/|g_CE| at this by setting the weight")
    layers: str | tuple[int, ...] = option("all", "the judges: all, rotate (one a step, drawn), or a list such as 1,3")
    positions: float = option(1.0, "share of each sequence's positions that are read")
    evaluator: Literal["frozen", "live"] = option("frozen", "whether judge and head learn from their own reading")
    reach: Literal["full", "local"] = option("full", "the gradient continues below the taught block, or stops there")
    embeddings: bool = option(True, "whether the signal moves the embeddings")
    threshold: float = option(0.9, "τ of the signals that have one")
    start: int = option(0, "the signal's first step", unit="steps")
    anneal: int | None = option(None, "the weight falls to 0 over so many steps after start", unit="steps", shown="off")
    control: Literal["none", "placebo", "shuffled", "flipped", "self"] = option(
        "none", "turn the signal into its own control; self: a conversation's without a listener"
    )
    placebo_of: str | None = option(
        None, "a run, of whose signal the placebo takes the norm of every update", shown="its own signal's norm"
    )
    placebo_match: Literal["gradient", "update"] = option(
        "gradient", "that norm is the gradient's, or that of what the signal changes in Adam's step"
    )
    rotation: int = option(0, "which of three rotations, drawn for the seed, a placebo has: 0, 1 or 2")
    flip: float = option(1.0, "share of wrong targets that the control flipped shows the signal")
    flip_to: Literal["uniform", "shuffled", "argmax"] = option(
        "uniform", "what a wrong target is: any, another place's, or the likeliest"
    )
    say: int = option(1, "length of a conversation's utterance", unit="tokens")
    reply: int = option(1, "length of the reply whose confidence is the reward", unit="tokens")
    samples: int = option(4, "utterances sampled at each turn")
    turns: int = option(4, "positions of each sequence at which something is said")
    advantage: Literal["positive", "signed", "raw"] = option(
        "positive", "an utterance's reward less the others' mean, where above 0 or as it is; or the reward itself"
    )
    exact: bool = option(False, "enumerate all utterances of one token instead of sampling some")
    listener: str = option("self", "who replies: the model itself, or frozen:PATH, a run, checkpoint or GPT-2 folder")

    def __post_init__(self) -> None:
        if callable(self.name):
            object.__setattr__(self, "name", GivenFunction(self.name))
        if not isinstance(self.name, str):
            raise ConfigError(f"signal.name must be a signal's name or a function, found {shown(self.name)}")
        if self.name not in known_names() and not self.is_code:
            raise ConfigError(f"unknown signal {shown(self.name)}{did_you_mean(self.name, known_names())}")
        if self.is_code and not self.name.rpartition(":")[2].isidentifier():  # it is a part of the run folder's name
            raise ConfigError(
                f"signal.name: expected FILE.py:FUNCTION with the name of a function, found {shown(self.name)}"
            )
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers == ():
            raise ConfigError("signal.layers must be all, rotate or a list such as 1,3, found an empty list")
        if isinstance(self.layers, str) and self.layers not in ("all", "rotate"):
            raise ConfigError(f"signal.layers must be all, rotate or a list such as 1,3, found {shown(self.layers)}")
        if len(set(self.layers)) < len(self.layers) and isinstance(self.layers, tuple):
            raise ConfigError(f"signal.layers must list a judge once, found {','.join(map(str, self.layers))}")
        for name in ("positions", "threshold"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ConfigError(f"signal.{name} must lie above 0 and at most 1, found {value}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"signal.flip must be at least 0 and at most 1, found {self.flip}")
        for name in ("start", "anneal", "dose"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"signal.{name} must be at least 0, found {value}")
        if self.placebo_of and self.control != "placebo":
            raise ConfigError(
                f"signal.placebo_of is for signal.control placebo, found control {self.control}; leave one out"
            )
        if self.rotation not in (0, 1, 2):
            raise ConfigError(f"signal.rotation is 0, 1 or 2, found {self.rotation}")
        if self.rotation and self.control != "placebo":
            raise ConfigError(
                f"signal.rotation is for signal.control placebo, found {self.rotation} with control {self.control}; "
                "leave it out"
            )
        if self.placebo_match != "gradient" and not self.placebo_of:
            raise ConfigError(
                f"signal.placebo_match {self.placebo_match} needs a run whose steps the placebo takes after; "
                "add --signal.placebo_of RUN"
            )
        if self.weight == 0 and self.dose:
            raise ConfigError(
                f"signal.weight 0 takes the signal out, signal.dose {self.dose} asks for some; leave one out"
            )
        if self.name != "none" and not self.is_code:  # a file says what it is once it may be run
            self._check_kind(self.kind)

    def _check_conversation(self) -> None:
        """Raise ConfigError for options of a conversation that contradict each other."""
        for name in ("say", "reply", "samples", "turns"):
            if (found := getattr(self, name)) < 1:
                raise ConfigError(f"signal.{name} must be at least 1, found {found}")
        if self.control == "flipped":
            raise ConfigError("signal.control flipped shows wrong targets, and a conversation sees none; "
                              "use shuffled, self or placebo")  # fmt: skip
        if self.exact and (self.say > 1 or self.control == "shuffled"):
            found = f"say {self.say}" if self.say > 1 else "control shuffled, which deals rewards of sampled ones"
            raise ConfigError(f"signal.exact enumerates utterances of one token, found signal.{found}; leave one out")
        if self.samples < 2 and self.advantage != "raw" and not self.exact:
            raise ConfigError(f"signal.advantage {self.advantage} compares utterances, found signal.samples 1; "
                              "sample 2 or more, or use raw")  # fmt: skip
        if self.listener != "self" and not self.frozen_listener:
            raise ConfigError(
                f"signal.listener: expected self or frozen:PATH, found {shown(self.listener)}; an average of the "
                "weights would be a second model in every checkpoint"
            )

    def _check_kind(self, kind: str) -> None:
        """Raise ConfigError for an option that this kind of signal has no use for."""
        own = () if kind == CONVERSATION else CONVERSATION_OPTIONS
        for name in own:
            if (found := getattr(self, name)) != getattr(SignalConfig, name):
                raise ConfigError(f"signal.{name} {found} is an option of a conversation, found signal {self.name}; "
                                  "leave it out")  # fmt: skip
        if kind != CONVERSATION and self.control == "self":
            raise ConfigError(f"signal.control self is a conversation without its listener, found signal {self.name}; "
                              "use another control")  # fmt: skip
        if kind == "reading":
            return
        for name in READING_OPTIONS:
            if (found := getattr(self, name)) != getattr(SignalConfig, name):
                raise ConfigError(
                    f"signal.{name} {found} is for signals that read blocks, and {self.name} acts at the model's end; "
                    "leave it out"
                )
        if kind == CONVERSATION:
            self._check_conversation()
        elif self.flip_to == "argmax":
            raise ConfigError(f"signal.flip_to argmax needs the logits of one block, which {self.name} does not read; "
                              "use uniform")  # fmt: skip

    @cached_property
    def signal(self) -> Signal | Objective:
        """The signal; a user's own as its file stood at the first look, so that it cannot change within a run."""
        if self.is_code:
            return user_signal(self.name)
        return {**SIGNALS, **OBJECTIVES, **SAMPLED}[self.name]

    @cached_property
    def kind(self) -> Literal["reading", "objective", "conversation"]:
        """What its gradient comes from; of a user's own function its file says it, which this runs."""
        if self.name == CONVERSATION:
            return "conversation"
        kind = "objective" if isinstance(self.signal, Objective) else "reading"
        if self.is_code:
            self._check_kind(kind)
        return kind

    @property
    def frozen_listener(self) -> str | None:
        """The path of the weights that reply in a conversation; None where the model itself does."""
        kind, _, path = self.listener.partition(":")
        return path if kind == "frozen" and path else None

    @property
    def learns(self) -> bool:
        """Whether what reads (a live judge; head and ln_f under an objective) learns from its own reading."""
        return self.kind != "reading" or self.evaluator == "live"

    @property
    def shuffles_gradients(self) -> bool:
        """Whether the control shuffled moves the gradients at hidden states; of a conversation it deals the rewards."""
        return self.control == "shuffled" and self.kind != CONVERSATION

    @property
    def is_code(self) -> bool:
        """Whether the signal is a user's own function, FILE.py:FUNCTION."""
        return ".py:" in self.name

    def schedule_at(self, step: int) -> float:
        """The share of the weight that update `step` (counted from 0) uses, from 1 down to 0."""
        if self.name == "none" or step < self.start:
            return 0.0
        return 1.0 if self.anneal is None else max(0.0, 1 - (step - self.start) / max(1, self.anneal))

    def weight_at(self, step: int, n_layer: int) -> float:
        """The weight of update `step` (counted from 0) in a model of n_layer blocks; 0 is out of the graph."""
        return (1 / n_layer if self.weight is None else self.weight) * self.schedule_at(step)

    def judges_at(self, step: int, n_layer: int, seed: int) -> tuple[tuple[int, ...], int]:
        """The judges that speak in update `step`, and the factor that keeps their sum unbiased."""
        everyone = tuple(range(1, n_layer))
        if not self.is_code and self.kind != "reading":
            return (), 1
        if self.layers == "all":
            return everyone, 1
        if self.layers == "rotate":
            if not everyone:
                return (), 1
            return (everyone[uniform_index(len(everyone), "rotate", seed, step)],), len(everyone)
        assert isinstance(self.layers, tuple)
        for judge in self.layers:
            if judge not in everyone:
                raise ConfigError(f"signal.layers lists judges 1 to {n_layer - 1} of this model, found {judge}")
        return self.layers, 1
