"""The signals: pure functions of a block's reading. Each gives the contribution of a token to the loss, mostly in nats.
After them the sequence objectives, which see whole sequences.

They are called as `signal(logits (n, V), targets (n,)) -> (n,)`, with `threshold=` where there is a τ and `other=` for
another block's logits. registry.py has the table of them, docs/signals.md what each is good for and when it fails.

p = softmax(z), m = argmax z, p_m its probability, y the true token. The notes' own signals (N2 to N4) are made of
log(1 - p_i) = -softplus(z_i - LSE_{k≠i} z_k), which is finite for every finite logit, where log(1 - softmax(z)_i) is
-inf as soon as p_i rounds to 1. The margin z_i - LSE_{k≠i} z_k is the log-odds of token i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad, softplus

from gptlab.errors import ConfigError

TWO_LEVEL_VOCABULARY = 4096
"""The smallest vocabulary for which an argmax in two levels pays."""


def likeliest(logits: Tensor) -> Tensor:
    """m = argmax z (n,) of logits (n, V), the first of several."""
    n, V = logits.shape
    if logits.is_cuda or V < TWO_LEVEL_VOCABULARY or V % 64:
        return logits.max(1).indices
    parts = logits.detach().view(n, -1, 64)  # in two levels, since PyTorch's own argmax is slow on a CPU
    part = parts.amax(2).max(1).indices  # (n,) the part that holds the maximum
    return part * 64 + parts[torch.arange(n), part].max(1).indices


def log_odds(logits: Tensor, index: Tensor) -> Tensor:
    """log(p_i / (1-p_i)) (n,) of token index (n,) under logits (n, V)."""
    index = index[:, None]
    rest = logits.scatter(1, index, -torch.inf).logsumexp(1)  # over the other tokens
    return logits.gather(1, index)[:, 0] - rest


def log_rest(logits: Tensor, index: Tensor) -> Tensor:
    """log(1 - p_i) (n,) of token index (n,) under logits (n, V); finite for finite logits."""
    return -softplus(log_odds(logits, index))


def top(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m (n,), log(1-p_m) (n,) and p_m (n,), the last detached."""
    m = likeliest(logits)
    odds = log_odds(logits, m)
    return m, -softplus(odds), odds.detach().sigmoid()


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1-p_m): near 0 where unsure, ever lower when sure (N4). Gradient of L1 norm 2·p_m; value unbounded below."""
    return log_rest(logits, likeliest(logits))


def overconfidence_penalty(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1-p_m): N4's sign turned, so that being sure costs."""
    return -confidence(logits, targets)


def gated_confidence(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ]·log(1-p_m): where the judge does not know what to reply there is no feedback (N2, N3)."""
    _, value, p = top(logits)
    return value.where(p >= threshold, 0.0)


def verified_confidence(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ, m=y]·log(1-p_m): confidence counts only where it is right (N2)."""
    m, value, p = top(logits)
    return value.where((p >= threshold) & (m == targets), 0.0)


def confident_error(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ, m≠y]·(-log(1-p_m)): being sure and wrong costs (N2's penalty; unlikelihood, 1908.04319)."""
    m, value, p = top(logits)
    return (-value).where((p >= threshold) & (m != targets), 0.0)


def advantage(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """log(1-p_m) less the previous block's, held constant, where that is negative: only growing surer counts (N3)."""
    gain = confidence(logits, targets) - confidence(other, targets)
    return gain.where(gain < 0, 0.0)


def target_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1-p_y): confidence in the true token; unbounded below."""
    return log_rest(logits, targets)


def deep_supervision(logits: Tensor, targets: Tensor) -> Tensor:
    """CE(z, y): every block predicts the next token (Lee 2015, 1409.5185; Al-Rfou 2018, 1808.04444)."""
    return cross_entropy(logits, targets, reduction="none")


def negative_deep_supervision(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(z, y): N5 read literally with the true token; climbs the true loss."""
    return -deep_supervision(logits, targets)


def negative_self_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(z, m) = log p_m: N5 read literally with the block's own argmax; lowers confidence. Gradient 2·(1-p_m)."""
    return -cross_entropy(logits, likeliest(logits), reduction="none")


def negated_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(-z, m): N5 as first coded. Gradient of L1 norm about 2 whatever the confidence; unbounded below."""
    return -cross_entropy(-logits, likeliest(logits), reduction="none")


def confidence_weighted_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """sg(p_m)·CE(z, y): a token counts as much as the block is sure of itself (N2)."""
    _, _, p = top(logits)
    return p * deep_supervision(logits, targets)


def pseudo_label(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ]·(-log p_m): the own argmax as a label where it is sure (FixMatch, 2001.07685)."""
    m, _, p = top(logits)
    return cross_entropy(logits, m, reduction="none").where(p >= threshold, 0.0)


def information_gain(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """CE(z_j, y)·sg[log p_j(y) - log p_{j-1}(y)]_+: learn where this block added information (RLP, 2510.01265)."""
    loss = deep_supervision(logits, targets)
    gain = deep_supervision(other, targets) - loss.detach()
    return loss * gain.clamp(min=0)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """H(p) in nats; its gradient vanishes at one-hot and at uniform (Grandvalet & Bengio 2005)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def confidence_penalty(logits: Tensor, targets: Tensor) -> Tensor:
    """-H(p): sure blocks pay (Pereyra 2017, 1701.06548)."""
    return -entropy(logits, targets)


def brier(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_k (p_k-[k=y])², in [0, 2], a proper score (Brier 1950; RLCR, 2507.16806)."""
    return (logits.softmax(1) - one_hot(targets, logits.shape[1])).square().sum(1)


def collision(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - Σp², the chance that two draws differ, in [0, 1] (Rényi-2; RLSC, 2506.06395)."""
    return 1 - logits.softmax(1).square().sum(1)


def self_certainty(logits: Tensor, targets: Tensor) -> Tensor:
    """-KL(uniform ‖ p) = -(LSE(z) - mean z - log V); unbounded below (Intuitor, 2505.19590)."""
    return -(logits.logsumexp(1) - logits.mean(1) - math.log(logits.shape[1]))


def self_distillation(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """KL(sg p_L ‖ p_j): follow the final block (Be Your Own Teacher, 1905.08094). Gradient of L1 norm at most 2."""
    teacher = other.log_softmax(1)
    return (teacher.exp() * (teacher - logits.log_softmax(1))).sum(1)


# Sequence objectives: of logits (B, T, V) or hidden states h_0..h_L (B, T, C), tokens and targets (B, T), to the loss
# (B, T) of every token.


def label_smoothing(logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """-mean_k log p_k; next to the true loss weight w smooths labels by ε = w/(1+w) (Szegedy 2016, 1512.00567)."""
    return -logits.log_softmax(-1).mean(-1)


def z_loss(logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """LSE(z)²: keeps logits from drifting, which the true loss does not see (PaLM, 2204.02311)."""
    return logits.logsumexp(-1).square()


def multi_token_prediction(
    hidden_states: Sequence[Tensor], tokens: Tensor, targets: Tensor, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """CE of the token after the next, read below the last block by the model's own head (after 2404.19737).

    The paper's heads are blocks of their own; here h_{L-1} has to say the token after next and block L makes the next
    of it, without new parameters. A window's last position has no such token and counts 0.
    """
    logits = read(hidden_states[-2][:, :-1])
    losses = cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
    return pad(losses, (0, 1))


def prefix_token_prediction(logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """CE of the longest other token whose bytes the true one begins with; 0 where there is none.

    What is spelled alike is then close to right. Raises ConfigError for a vocabulary without such tokens.
    """
    prefix = torch.tensor(prefix_tokens(logits.shape[-1]), device=targets.device)[targets]
    losses = cross_entropy(logits.transpose(1, 2), prefix.clamp(min=0), reduction="none")
    return losses.where(prefix >= 0, 0.0)


@lru_cache(maxsize=4)
def prefix_tokens(rows: int) -> list[int]:
    """By token of the tokenizer whose models have so many rows: its longest proper prefix that is a token too, or -1.

    >>> prefixes = prefix_tokens(50304)
    >>> prefixes[31373] == 12758, prefixes[0]  # hello begins with hell
    (True, -1)
    """
    from gptlab.data.tokenizers import TOKENIZERS, get_tokenizer

    tokenizers = [get_tokenizer(name) for name, kind in TOKENIZERS.items() if kind.rows == rows]
    prefixes = [-1] * rows
    for tokenizer in tokenizers:
        numbers = {spelled: token for token, spelled in enumerate(tokenizer.token_table)}
        del numbers[tokenizer.token_table[tokenizer.document_start]]  # stands for no text
        for spelled, token in numbers.items():
            starts = (numbers[spelled[:n]] for n in range(len(spelled) - 1, 0, -1) if spelled[:n] in numbers)
            prefixes[token] = next(starts, -1)
    if max(prefixes) < 0:
        raise ConfigError(
            f"prefix_token_prediction needs tokens that begin with other tokens, and a vocabulary of {rows} has none; "
            "use --tokenizer gpt2"
        )
    return prefixes
