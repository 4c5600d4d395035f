"""Sources that are made up, so that the floor of the loss is known: a Markov chain, noisy parity, copying.

A corpus is named with its parameters, `markov:order=3,symbols=8`; what is not named has its default. Each character is
one token of the bytes tokenizer, all are printable but the end of a line. Everything is drawn from keys that name the
source: the same documents on every machine, and the same beginning however many tokens are asked for. What a floor is
the floor of stands in corpus.py.
"""

from __future__ import annotations

import math
import string
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from gptlab.data.corpus import Documents, EntropyFloor, Position, Source
from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.options import option, options_of, typed
from gptlab.randomness import key_bits, permutation

ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits
DOCUMENT_TOKENS = 2**20
"""Of a training document, its NUL included."""
VALIDATION_TOKENS = 2**18
"""Of the validation stream after its NUL: one document."""
CHANCES = 2**12
"""Transition probabilities are multiples of 1/CHANCES, so that the chain that is drawn is the one that is computed."""
MOST_STATES = 4096


@dataclass(frozen=True)
class SyntheticSource(Source):
    """A source by its parameters. Every `period` characters of a document are alike in kind: a line.

    name: the shortest that means it, with only those parameters that differ from their defaults.
    """

    SUMMARY: ClassVar[str]
    streams = ("val", "train")

    name: str = field(init=False)
    tokens: int = option(2**23, "training tokens", unit="tokens")
    seed: int = option(1, "which chain, which secret, which draws")

    def __post_init__(self) -> None:
        self._within("tokens", 2 * self.period, 2**34)
        defaults = {o.key: o.default for o in options_of(type(self))}
        given = [f"{key}={value}" for key, value in self._parameters.items() if value != defaults[key]]
        object.__setattr__(self, "name", ":".join([self.kind, *([",".join(given)] if given else [])]))

    def _within(self, name: str, low: float, high: float) -> None:
        if not low <= (value := getattr(self, name)) <= high:
            raise ConfigError(f"{self.kind}: expected {name} from {low:g} to {high:g}, found {value}")

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    @property
    def _parameters(self) -> dict[str, Any]:
        """The kind's own ones first."""
        shared = [o.key for o in options_of(SyntheticSource)]
        own = [o.key for o in options_of(type(self)) if o.key not in shared]
        return {key: getattr(self, key) for key in [*own, *shared]}

    @property
    @abstractmethod
    def period(self) -> int: ...

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._parameters}

    def documents(self, stream: str, position: Position = None) -> Documents:
        for index in range(position or 0, 1 if stream == "val" else self._training_documents):
            yield self.text(self._length(stream, index), stream, index), index + 1

    def count(self) -> int:
        return 1 + self._training_documents

    @property
    def _training_documents(self) -> int:
        return -(-self.tokens // self._document)

    @property
    def _document(self) -> int:
        return DOCUMENT_TOKENS // self.period * self.period

    def _length(self, stream: str, index: int) -> int:
        """Characters of a document. NUL stands where a line's end would, so all lines of a stream are in step."""
        if stream == "val":
            return VALIDATION_TOKENS // self.period * self.period
        left = self.tokens - index * self._document
        return max(2, min(self._document, left)) - 1

    def words(self, count: int, *key: str | int) -> np.ndarray:
        """(count,) random words of 64 bits that belong to this kind, its seed and `key`."""
        return np.random.Philox(key=key_bits(self.kind, self.seed, *key)).random_raw(count)

    @abstractmethod
    def text(self, length: int, stream: str, index: int) -> str:
        """The document, so many characters."""

    @abstractmethod
    def floor(self) -> EntropyFloor: ...


@dataclass(frozen=True)
class Markov(SyntheticSource):
    """A stationary chain: every character hangs on the `order` characters before it and on nothing else.

    Each context has its own distribution, uneven as natural ones are, of which an eighth is for all symbols alike. The
    floor is the entropy rate Σ_s π(s)·H(P(s, ·)), π being the contexts' stationary distribution (Shannon 1948, section
    7).
    """

    SUMMARY = "a Markov chain whose entropy rate is known: markov:order=2,symbols=16,seed=1,tokens=8388608"

    order: int = option(2, "characters that the next one hangs on", unit="characters")
    symbols: int = option(16, "different characters")

    @property
    def period(self) -> int:
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("symbols", 2, len(ALPHABET))
        most = int(math.log(MOST_STATES) / math.log(self.symbols) + 1e-9)
        self._within("order", 1, most)

    @cached_property
    def chances(self) -> np.ndarray:
        """(symbols**order, symbols) int64: how many of CHANCES lead from a context to a symbol; none is 0."""
        states, S = self.symbols**self.order, self.symbols
        words = self.words(states * S, "transitions", self.order, S).reshape(states, S)
        weights = -np.log((words >> np.uint64(11)) * 2.0**-53 + 2.0**-54)  # exponential, and its cube: a few are likely
        weights = weights**3
        least = CHANCES // (8 * S)
        free = CHANCES - least * S
        chances = least + np.floor(free * weights / weights.sum(1, keepdims=True)).astype(np.int64)
        chances[np.arange(states), weights.argmax(1)] += CHANCES - chances.sum(1)  # what rounding left
        return chances

    @cached_property
    def stationary(self) -> np.ndarray:
        """(symbols**order,) the probability of every context, oldest character first."""
        S, P = self.symbols, self.chances / CHANCES
        p = np.full(len(P), 1 / len(P))
        for _ in range(100_000):
            following = (p[:, None] * P).reshape(S, -1, S).sum(0).ravel()
            following /= following.sum()
            p, change = following, np.abs(following - p).max()
            if change < 4e-16:  # rounding
                break
        return p

    def floor(self) -> EntropyFloor:
        joint = self.stationary.reshape((self.symbols,) * self.order)
        blocks = [0.0, *(entropy(joint.sum(tuple(range(n, self.order)))) for n in range(1, self.order + 1))]
        P = self.chances / CHANCES
        rate = float(self.stationary @ -(P * np.log(P)).sum(1))
        return EntropyFloor((rate,), tuple(float(n) for n in np.diff(blocks)))

    def text(self, length: int, stream: str, index: int) -> str:
        S, states = self.symbols, self.symbols**self.order
        words = self.words(length + 1, "walk", self.order, S, stream, index)
        state = int(np.searchsorted(np.cumsum(self.stationary), words[0] * 2.0**-64, side="right"))
        state = min(state, states - 1)
        context = [state // S ** (self.order - 1 - n) % S for n in range(self.order)]
        following = np.repeat(np.tile(np.arange(S, dtype=np.uint8), states), self.chances.ravel()).tobytes()
        walked = bytearray(context)
        for chance in (words[1:] % np.uint64(CHANCES)).tolist():
            symbol = following[state * CHANCES + chance]
            walked.append(symbol)
            state = (state * S + symbol) % states
        return walked[:length].translate(ALPHABET.encode().ljust(256, b"?")).decode()


@dataclass(frozen=True)
class LPN(SyntheticSource):
    """Lines of random bits and the parity of a secret few of them, wrong with probability `noise`.

    Learning it is the problem that cryptography is built on (learning parity with noise, Blum, Kalai and Wasserman
    2003). Of a line's bits + 2 tokens each bit costs log 2, the label H(noise), the line's end nothing: the floor is
    (bits·log 2 + H(noise)) / (bits + 2); without a grasp of the secret the label costs log 2 instead.
    """

    SUMMARY = "parity of a secret few of random bits, with noise: lpn:bits=6,ones=2,noise=0.1,seed=1,tokens=8388608"

    bits: int = option(6, "random bits a line", unit="bits")
    ones: int = option(2, "bits of the secret that count", unit="bits")
    noise: float = option(0.1, "share of wrong labels, training and validation alike", unit="share of 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("bits", 1, 62)
        self._within("ones", 1, self.bits)
        self._within("noise", 0, 0.5)

    @property
    def period(self) -> int:
        return self.bits + 2

    @cached_property
    def secret(self) -> tuple[int, ...]:
        """The places of the bits that count, from 0."""
        return tuple(sorted(permutation(self.bits, "lpn", self.seed, "secret", self.bits)[: self.ones].tolist()))

    def floor(self) -> EntropyFloor:
        label = entropy(np.array([self.noise, 1 - self.noise]))
        two = math.log(2)
        return EntropyFloor(
            (*[two] * self.bits, label, 0.0), parts={"bit": two, "label": label, "label_by_chance": two}
        )

    def text(self, length: int, stream: str, index: int) -> str:
        lines = -(-length // self.period)
        key = ("line", self.bits, stream, index)
        bits = self.words(lines, *key)[:, None] >> np.arange(self.bits, dtype=np.uint64) & np.uint64(1)
        wrong = self.words(lines, *key, "noise") < np.uint64(self.noise * 2.0**64)
        label = bits[:, self.secret].sum(1) % np.uint64(2) ^ wrong
        end = np.full(lines, ord("\n") - ord("0"), dtype=np.int64)
        rows = np.column_stack([bits.astype(np.int64), label.astype(np.int64), end]) + ord("0")
        return rows.astype(np.uint8).tobytes()[:length].decode()


@dataclass(frozen=True)
class Copy(SyntheticSource):
    """Lines of different characters, and the same again in a circle from a random one on: `cab:abc`.

    Each repeated character but the first follows from what stood after its predecessor: induction (Olsson 2022,
    2209.11895), which no fixed distance solves. A line costs log(symbols·(symbols-1)···(symbols-length+1)) for the
    first half, log(length) for where the second begins, and nothing else.
    """

    SUMMARY = "characters said again from anywhere on, for induction: copy:length=15,symbols=26,seed=1,tokens=8388608"

    length: int = option(15, "characters that are said again", unit="characters")
    symbols: int = option(26, "different characters there are")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("symbols", 2, len(ALPHABET))
        self._within("length", 2, self.symbols)

    @property
    def period(self) -> int:
        return 2 * self.length + 2

    def floor(self) -> EntropyFloor:
        new = [math.log(self.symbols - n) for n in range(self.length)]
        again = [math.log(self.length), *[0.0] * (self.length - 1)]
        return EntropyFloor((*new, 0.0, *again, 0.0), parts={"where_it_begins": again[0], "said_again": 0.0})

    def text(self, length: int, stream: str, index: int) -> str:
        lines, n = -(-length // self.period), self.length
        words = self.words(lines * (self.symbols + 1), "line", n, self.symbols, stream, index).reshape(lines, -1)
        said = np.argsort(words[:, 1:], axis=1, kind="stable")[:, :n]
        start = (words[:, :1] % np.uint64(n)).astype(np.int64)
        again = np.take_along_axis(said, (start + np.arange(n)) % n, axis=1)
        letters = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
        signs = [np.full((lines, 1), ord(sign), dtype=np.uint8) for sign in ":\n"]
        return np.hstack([letters[said], signs[0], letters[again], signs[1]]).tobytes()[:length].decode()


SYNTHETIC: dict[str, type[SyntheticSource]] = {"markov": Markov, "lpn": LPN, "copy": Copy}


def synthetic(name: str) -> SyntheticSource:
    """The source that a name with parameters means; raises ConfigError naming the nearest parameter.

    >>> synthetic("markov:symbols=16,order=3").name
    'markov:order=3'
    """
    kind, _, given = name.partition(":")
    source = SYNTHETIC[kind]
    known = {o.key: o for o in options_of(source)}
    values: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            hint = did_you_mean(key, known)
            raise ConfigError(
                f"corpus {shown(name)}: expected parameters of {', '.join(known)}, found {shown(part)}{hint}"
            )
        try:
            values[key] = typed(known[key], value)
        except ConfigError as error:
            raise ConfigError(f"corpus {shown(name)}: {error}") from None
    return source(**values)


def canonical(name: str) -> str:
    """The shortest name of a corpus that is made up; any other name as it is. Raises ConfigError."""
    return synthetic(name).name if name.partition(":")[0] in SYNTHETIC else name


def entropy(p: np.ndarray) -> float:
    """Entropy in nats of probabilities of any shape."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
