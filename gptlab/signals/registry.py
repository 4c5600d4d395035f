"""Every signal and sequence objective by name. Adding one is one pure function in functions.py and one line here.

A signal is called as `signal(logits (n, V), targets (n,)) -> (n,)` and gives each token's contribution to the loss,
in nats or as its formula says; what it teaches is its gradient. A sequence objective sees whole sequences at the end of
the model. The tables need no torch: options are checked against them before torch is imported, and the functions are
imported at the first call of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from gptlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """One row of the table of signals, which is called as a function of logits (n, V) and true tokens (n,).

    >>> import torch
    >>> signal = SIGNALS["deep_supervision"]
    >>> signal.formula, signal.uses_truth, signal(torch.zeros(1, 4), torch.tensor([2]))
    ('CE(z,y)', True, tensor([1.3863]))

    name: also of its function in functions.py
    formula: the loss contribution of one token
    source: where the idea comes from
    needs: the other block whose logits for the same tokens it reads, detached: judge j's previous (j-1), next (j+1)
        or the final block
    uses_truth: whether it sees the true next token
    has_threshold: whether it has a τ
    gradient_bound: greatest L1 norm of a token's gradient at its logits, over all logits and vocabularies; None where
        there is none
    """

    name: str
    formula: str
    source: str
    needs: Literal["previous", "next", "final"] | None = None
    uses_truth: bool = False
    has_threshold: bool = False
    gradient_bound: float | None = None

    @cached_property
    def function(self) -> Any:
        from gptlab.signals import functions

        return getattr(functions, self.name)

    def __call__(
        self, logits: Tensor, targets: Tensor, *, other: Tensor | None = None, threshold: float = 0.9
    ) -> Tensor:
        """Loss contributions (n,) of logits (n, V), computed in float32 or better; targets (n,) are true tokens.

        other: the logits (n, V) of the block that `needs` names, for the same tokens; threshold: τ. Raises ConfigError
        for shapes that do not fit, and where a signal that needs another block's logits gets none.

        >>> import torch
        >>> SIGNALS["confidence"](torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1]))
        tensor([-0.6931, -9.0001])
        """
        if logits.ndim != 2 or targets.shape != logits.shape[:1]:
            found = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            raise ConfigError(f"{self.name}: expected logits (n, V) and targets (n,), found {found}; flatten B and T")
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        options: dict[str, Any] = {"threshold": threshold} if self.has_threshold else {}
        if self.needs is not None:
            if other is None or other.shape != logits.shape:
                found = "none" if other is None else f"shape {tuple(other.shape)}"
                raise ConfigError(
                    f"{self.name} reads the {self.needs} block: expected its logits for the same tokens, of shape "
                    f"{tuple(logits.shape)}, found {found}; give its logits as other="
                )
            options["other"] = other.detach().to(logits.dtype)
        return self.function(logits, targets, **options)


@dataclass(frozen=True)
class Objective:
    """One row of the table of sequence objectives; name, formula and source are as a `Signal`'s.

    reads: what its function takes first, logits (B, T, V) or the hidden states h_0..h_L (B, T, C)
    """

    name: str
    formula: str
    source: str
    reads: Literal["logits", "hidden_states"] = "logits"

    @cached_property
    def function(self) -> Any:
        from gptlab.signals import functions

        return getattr(functions, self.name)

    def __call__(
        self, states: Sequence[Tensor], tokens: Tensor, targets: Tensor, read: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Each token's loss (B, T), of the hidden states h_0..h_L, tokens and targets (B, T).

        read: head(ln_f(h)), from (B, T, C) to logits (B, T, V)
        """
        if self.reads == "logits":
            return self.function(read(states[-1]), tokens, targets)
        return self.function(states, tokens, targets, read)


@dataclass(frozen=True)
class Sampled:
    """One row of the table of sampled objectives."""

    name: str
    formula: str
    source: str


def _table(*signals: Signal) -> dict[str, Signal]:
    return {signal.name: signal for signal in signals}


SIGNALS: dict[str, Signal] = _table(
    Signal("confidence", "log(1-p_m)", "N4", gradient_bound=2),
    Signal("overconfidence_penalty", "-log(1-p_m)", "N4 typed with a plus", gradient_bound=2),
    Signal("gated_confidence", "[p_m>=τ]·log(1-p_m)", "N2, N3", has_threshold=True, gradient_bound=2),
    Signal(
        "verified_confidence", "[p_m>=τ, m=y]·log(1-p_m)", "N2", uses_truth=True, has_threshold=True, gradient_bound=2
    ),
    Signal(
        "confident_error",
        "[p_m>=τ, m≠y]·(-log(1-p_m))",
        "N2's penalty; unlikelihood, Welleck 2019 (1908.04319)",
        uses_truth=True,
        has_threshold=True,
        gradient_bound=2,
    ),
    Signal(
        "advantage",
        "log(1-p_m,j) - sg log(1-p_m,j-1) where negative, else 0",
        "N3: what was said made the judge sure",
        needs="previous",
        gradient_bound=2,
    ),
    Signal("target_confidence", "log(1-p_y)", "N4 with the true token", uses_truth=True, gradient_bound=2),
    Signal("confidence_weighted_ce", "sg(p_m)·CE(z,y)", "N2 literally", uses_truth=True, gradient_bound=2),
    Signal("negated_cross_entropy", "-CE(-z,m)", "N5 as first coded", gradient_bound=2),
    Signal("negative_self_cross_entropy", "-CE(z,m) = log p_m", "N5 read literally, own target", gradient_bound=2),
    Signal(
        "negative_deep_supervision", "-CE(z,y)", "N5 read literally, true target", uses_truth=True, gradient_bound=2
    ),
    Signal(
        "deep_supervision",
        "CE(z,y)",
        "Lee 2015 (1409.5185); Al-Rfou 2018 (1808.04444); LayerSkip (2404.16710); all live",
        uses_truth=True,
        gradient_bound=2,
    ),
    Signal("pseudo_label", "[p_m>=τ]·(-log p_m)", "FixMatch (2001.07685)", has_threshold=True, gradient_bound=2),
    Signal(
        "information_gain",
        "CE(z_j,y)·sg[log p_j(y) - log p_j-1(y)]_+",
        "RLP (2510.01265), made blockwise",
        needs="previous",
        uses_truth=True,
    ),
    Signal("brier", "Σ_k (p_k-[k=y])²", "Brier 1950; RLCR (2507.16806)", uses_truth=True, gradient_bound=32 / 27),
    Signal("entropy", "H(p)", "Grandvalet & Bengio 2005"),
    Signal("confidence_penalty", "-H(p)", "Pereyra 2017 (1701.06548)"),
    Signal("self_certainty", "-(LSE(z) - mean z - log V)", "Intuitor (2505.19590)", gradient_bound=2),
    Signal("collision", "1 - Σp²", "Rényi-2; RLSC (2506.06395)", gradient_bound=16 / 27),
    Signal(
        "self_distillation", "KL(sg p_L ‖ p_j)", "Be Your Own Teacher (1905.08094)", needs="final", gradient_bound=2
    ),
)

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("label_smoothing", "-mean_k log p_k", "Szegedy 2016 (1512.00567)"),
        Objective("z_loss", "LSE(z)²", "PaLM (2204.02311)"),
        Objective(
            "multi_token_prediction",
            "CE(head(ln_f(h_L-1)), the token after y)",
            "Gloeckle 2024 (2404.19737), without heads of its own",
            "hidden_states",
        ),
        Objective(
            "prefix_token_prediction",
            "CE(z, the longest other token that y begins with)",
            "the NanoGPT speedrun's record of July 2026",
        ),
    )
}


CONVERSATION = "conversation"
SAMPLED = {CONVERSATION: Sampled(CONVERSATION, "-mean_k A_k·log p(a_k|x)", "N3, between tokens")}
"""The sampled objectives. What one does is in training/conversation.py."""


def known_names() -> tuple[str, ...]:
    """What `--signal.name` knows."""
    return ("none", *SIGNALS, *OBJECTIVES, *SAMPLED)
