"""Is a reply surer after what was really said? The premise of N3, asked of a model as it stands, without training.

A window of validation text is cut: its beginning is the context, and what follows is what was really said. The model
replies to that, and to other things said in its place: its own sample, text from elsewhere, the same words shuffled,
random tokens. If sure replies tell good utterances from bad ones, they are surer after the text. How often they are, of
all pairs of windows, is the area under the curve (Mann and Whitney 1947): 1 always, 0.5 never mind.

Windows are the units: a window left out takes its text and its alternative along, so pairs are accounted for (DeLong
1988 in its jackknife form). Every draw belongs to its window, so that batches change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptlab.analysis.noise import ALTERNATIVES, TEXT, NoiseConfig
from gptlab.analysis.noise.estimators import Estimate
from gptlab.errors import ConfigError, DivergedError
from gptlab.model.decoder import Decoder, Weights
from gptlab.randomness import key_bits, uniform_index

if TYPE_CHECKING:
    from gptlab.analysis.noise.measure import Progress, Subject

REPLIES = (1, 4, 16)
"""Lengths of the reply, in tokens; those that fit."""
MOST_SHUFFLES = 16
"""Tries at another order before words that are alike are left as they are."""


def conversation(
    subject: Subject, options: NoiseConfig, progress: Progress = lambda what, done, of, words="": None
) -> dict[str, Any]:
    """How sure replies are after the text and its alternatives, by length of the reply and by block; JSON values.

    Raises ConfigError where a window has no room for what is said and a reply, DivergedError for a model that is
    nowhere sure of anything.
    """
    model, windows, size = subject.state.model, subject.validation, subject.windows.vocab_size
    n, T, seed = len(windows), windows.block_size, subject.windows.seed
    replies = [length for length in REPLIES if options.say + length <= T]
    if not replies or n < 3:
        raise ConfigError(
            f"a conversation needs 3 windows of {options.say + 1} tokens (--say, and a reply), found {n} of {T}; say "
            "less, or give more --eval_tokens"
        )
    context = T - options.say - replies[-1] + 1  # the last token of a reply is not read again
    tokens = windows.rows(0, n)[0].numpy()
    begins = _word_beginnings(subject)
    said = utterances(tokens[:, context : context + options.say], begins, size, seed)
    confidence = np.zeros((1 + len(ALTERNATIVES), n, replies[-1], model.config.n_layer))
    weights = Weights(model, subject.placement.autocast)
    for first in range(0, n, options.batch_size):
        rows = slice(first, min(first + options.batch_size, n))
        decoder = Decoder(weights, rows.stop - first, T)
        final = _read(decoder, tokens[rows, :context])
        uniform = np.stack([_uniform(options.say, seed, "sample", window) for window in range(n)[rows]])
        sampled = _sample(decoder, final, uniform, size)
        for kind, of_kind in enumerate([said[TEXT][rows], sampled, *(said[name][rows] for name in list(said)[1:])]):
            decoder.forget(context)
            confidence[kind, rows] = _reply(decoder, of_kind, replies[-1], size)
        progress("conversation", rows.stop, n)
    if not np.isfinite(confidence).all():
        raise DivergedError("the model's probabilities are not finite: there is nothing to measure")
    by_length = {length: confidence[:, :, :length].mean(2) for length in replies}  # (kinds, n, L) each

    def against(kind: int, block: int) -> dict[str, Any]:
        found = {length: auc(sure[0, :, block], sure[kind, :, block]) for length, sure in by_length.items()}
        return {str(length): {"auc": one.value, "interval": bounded(one)} for length, one in found.items()}

    blocks = range(model.config.n_layer)
    compared = {name: [against(kind, block) for block in blocks] for kind, name in enumerate(ALTERNATIVES, 1)}
    return {
        "windows": n,
        "context": context,
        "say": options.say,
        "replies": replies,
        "shuffled": "tokens" if begins is None else "words",
        "confidence": {
            name: {str(length): float(sure[kind, :, -1].mean()) for length, sure in by_length.items()}
            for kind, name in enumerate((TEXT, *ALTERNATIVES))
        },
        "against": {name: {"total": of_blocks[-1], "blocks": of_blocks} for name, of_blocks in compared.items()},
    }


def utterances(text: np.ndarray, begins: np.ndarray | None, size: int, seed: int) -> dict[str, np.ndarray]:
    """What is said instead of `text` (n, say): from elsewhere, shuffled, random; and itself, first.

    Elsewhere is the text of a window at least a quarter of all windows away, each being taken once. begins (size,):
    which tokens begin a word; None shuffles tokens.
    """
    n, say = text.shape
    far = n // 4 + uniform_index(max(1, n - 2 * (n // 4)), "conversation", seed, "elsewhere")
    random = [(_uniform(say, seed, "random", window) * size).astype(np.int64) for window in range(n)]
    return {
        TEXT: text,
        "elsewhere": np.roll(text, max(1, far), 0),
        "shuffled": np.stack([shuffled(row, begins, seed, window) for window, row in enumerate(text)]),
        "random": np.stack(random),
    }


def shuffled(row: np.ndarray, begins: np.ndarray | None, *key: int) -> np.ndarray:
    """The words of a row (say,) but the last in another order, or where there is none its tokens but the last.

    The end stays, since how sure a reply is depends on it: in the middle of a word less than after one.
    """
    cuts = [] if begins is None else [place for place in range(1, len(row)) if begins[row[place]]]
    for words in (np.split(row, cuts), np.split(row, range(1, len(row)))):
        for attempt in range(MOST_SHUFFLES * (len(words) > 2)):
            order = _uniform(len(words) - 1, *key, "shuffled", attempt).argsort(kind="stable")
            if ((found := np.concatenate([*(words[place] for place in order), words[-1]])) != row).any():
                return found
    return row


def auc(x: np.ndarray, y: np.ndarray) -> Estimate:
    """P(x_i > y_k) + P(x_i = y_k)/2 over all pairs of x (n,) and y (n,), and without each index in turn.

    >>> auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])).value
    0.875
    """
    n = len(x)
    low, high = np.sort(x), np.sort(y)
    wins = (high.searchsorted(x, "left") + high.searchsorted(x, "right")) / 2  # of each x over all y
    losses = n - (low.searchsorted(y, "left") + low.searchsorted(y, "right")) / 2  # of each y to all x
    own = (x > y) + 0.5 * (x == y)
    return Estimate(float(wins.sum() / n**2), (wins.sum() - wins - losses + own) / (n - 1) ** 2)


def bounded(estimate: Estimate) -> list[float]:
    """The 95% interval of a share, within 0 and 1."""
    return [min(max(bound, 0.0), 1.0) for bound in estimate.interval]


def _word_beginnings(subject: Subject) -> np.ndarray | None:
    """(tokens,) which of them begin a word: with a blank; None where nobody knows what tokens stand for."""
    known = subject.tokenizer
    if known is None:
        return None
    return np.array([known.decode([token])[:1].isspace() for token in range(subject.windows.vocab_size)])


def _uniform(count: int, *key: str | int) -> np.ndarray:
    """(count,) in [0, 1), of the key."""
    words = np.random.Philox(key=key_bits("conversation", *key)).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def _read(decoder: Decoder, tokens: np.ndarray) -> Tensor:
    """Read tokens (B, t); the last one's state after the last block (B, C)."""
    *_, final = decoder.states(torch.from_numpy(tokens).to(decoder.weights.device))
    return final


def _sample(decoder: Decoder, final: Tensor, uniform: np.ndarray, size: int) -> np.ndarray:
    """What the model says (B, say) at temperature 1 after the state `final` (B, C), with uniform draws (B, say)."""
    said = []
    for step, u in enumerate(torch.from_numpy(uniform).to(final.device).unbind(1)):
        if step:
            final = _read(decoder, said[-1][:, None])
        reached = decoder.read(final)[:, :size].double().softmax(1).cumsum(1)
        chosen = (reached <= u[:, None] * reached[:, -1:]).sum(1).clamp(max=size - 1)
        said.append(chosen.cpu().numpy())
    return np.stack(said, 1)


def _reply(decoder: Decoder, said: np.ndarray, length: int, size: int) -> np.ndarray:
    """Every block's top probability (B, length, L) at the tokens of a greedy reply to what was said (B, say)."""
    for column in said[:, :-1].T:
        _read(decoder, column[:, None])
    token, found = torch.from_numpy(said[:, -1]).to(decoder.weights.device), []
    for _ in range(length):
        by_block, z = [], torch.empty(0)
        for h in decoder.states(token[:, None]):
            z = decoder.read(h)[:, :size]
            by_block.append(z.softmax(1).amax(1))
        token = z.argmax(1)
        found.append(torch.stack(by_block, 1).cpu().double().numpy())
    return np.stack(found, 1)
