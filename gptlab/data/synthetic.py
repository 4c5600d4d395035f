"""Sources that are made up, so that the floor of the loss is known: a Markov chain, noisy parity, copying, dialogue.

A corpus is named with its parameters, `markov:order=3,symbols=8`; what is not named has its default. Each character is
one token of the bytes tokenizer, all are printable but the end of a line. Everything is drawn from keys that name the
source: the same documents on every machine, and the same beginning however many tokens are asked for. What a floor is
the floor of stands in corpus.py.

A source may know more than the floor: `wanted` names figures of validation, each the mean probability that a model
gives to a token which the source names.
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

    def wanted(self, stream: np.ndarray) -> dict[str, np.ndarray]:
        """{figure: (n,) int64} of a validation stream (n,): which token it is the probability of, -1 for none."""
        return {}


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
        first = np.argsort(words[:, 1:], axis=1, kind="stable")[:, :n]
        start = (words[:, :1] % np.uint64(n)).astype(np.int64)
        again = np.take_along_axis(first, (start + np.arange(n)) % n, axis=1)
        letters = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
        signs = [np.full((lines, 1), ord(sign), dtype=np.uint8) for sign in ":\n"]
        return np.hstack([letters[first], signs[0], letters[again], signs[1]]).tobytes()[:length].decode()


@dataclass(frozen=True)
class Dialogue(SyntheticSource):
    """Lines of a question, an answer and a reply, `aC3`, where the true answer is known and rarer than a wrong one.

    Every question has one true answer, given with probability `truth`, and a decoy, given with probability `decoy`; all
    other answers share the rest. Each pair of question and answer has a reply of its own. The reply is *determined*
    where it is that one with probability `determined`, and uniform otherwise; undetermined it is always uniform. kappa
    says after what it is determined: 1 after the truth alone, 0 after any answer, -1 after errors alone; between them
    the probability falls linearly. So with kappa 1 who hears the truth is surer of a reply (N3), with -1 less sure.

    A word is `length` characters of which the first says which word it is: the others cost nothing. Questions are of
    small letters, answers of capitals, replies of digits.
    """

    SUMMARY = (
        "questions, answers, replies, and which answers are true: "
        "dialogue:truth=0.3,decoy=0.5,determined=0.9,kappa=1,seed=1,tokens=8388608"
    )

    truth: float = option(0.3, "how often the answer is the true one", unit="share of 1")
    decoy: float = option(0.5, "how often the answer is one and the same wrong one", unit="share of 1")
    determined: float = option(0.9, "how often a determined reply is the one of its pair", unit="share of 1")
    kappa: float = option(1.0, "replies are determined after: 1 the truth, 0 any answer, -1 errors")
    questions: int = option(8, "different questions")
    answers: int = option(8, "different answers")
    replies: int = option(8, "different replies")
    length: int = option(1, "of a question, an answer and a reply each", unit="characters")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (
            ("truth", 0, 1), ("decoy", 0, 1), ("determined", 0, 1), ("kappa", -1, 1),
            ("questions", 1, 26), ("answers", 3, 26), ("replies", 2, 10), ("length", 1, 16),
        ):  # fmt: skip
            self._within(name, low, high)
        if self.truth + self.decoy > 1 + 1e-9:
            found = f"{self.truth:g} + {self.decoy:g}"
            raise ConfigError(f"dialogue: expected truth + decoy to be at most 1, found {found}; lower one of them")

    @property
    def period(self) -> int:
        return 3 * self.length + 1

    @cached_property
    def order(self) -> np.ndarray:
        """(questions, answers) int64: the answers to each question, the true one first, then the decoy."""
        shape = (self.questions, self.answers)
        return self.words(math.prod(shape), "answers", *shape).reshape(shape).argsort(1, kind="stable")

    @cached_property
    def reply(self) -> np.ndarray:
        """(questions, answers) int64: the reply that belongs to each pair."""
        shape = (self.questions, self.answers)
        words = self.words(math.prod(shape), "replies", *shape, self.replies)
        return (words % np.uint64(self.replies)).astype(np.int64).reshape(shape)

    @cached_property
    def spelling(self) -> tuple[np.ndarray, ...]:
        """(number of words, length) uint8 of questions, answers and replies: the characters of each word."""
        alphabets = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
        spelled = []
        for alphabet, count in zip(alphabets, (self.questions, self.answers, self.replies), strict=True):
            words = self.words(count * self.length, "spelling", alphabet, count, self.length) % np.uint64(len(alphabet))
            letters = words.astype(np.int64).reshape(count, self.length)
            letters[:, 0] = np.arange(count)
            spelled.append(np.frombuffer(alphabet.encode(), dtype=np.uint8)[letters])
        return tuple(spelled)

    @property
    def chances(self) -> np.ndarray:
        """(answers,) the probability of every answer, in the order of `order`."""
        others = self.answers - 2
        return np.array([self.truth, self.decoy, *[max(0.0, 1 - self.truth - self.decoy) / others] * others])

    @property
    def sureness(self) -> tuple[float, float]:
        """How often a reply is taken from its pair rather than drawn: after the truth, after an error."""
        return self.determined * min(1.0, 1 + self.kappa), self.determined * min(1.0, 1 - self.kappa)

    def floor(self) -> EntropyFloor:
        def reply(sure: float) -> float:
            rest = (1 - sure) / self.replies
            return entropy(np.array([sure + rest, *[rest] * (self.replies - 1)]))

        question, answer = math.log(self.questions), entropy(self.chances)
        after_truth, after_error = map(reply, self.sureness)
        mean = self.truth * after_truth + (1 - self.truth) * after_error
        spelled = [0.0] * (self.length - 1)
        parts = {"question": question, "answer": answer, "reply": mean}
        parts |= {"reply_after_truth": after_truth, "reply_after_error": after_error}
        return EntropyFloor((question, *spelled, answer, *spelled, mean, *spelled, 0.0), parts=parts)

    def text(self, length: int, stream: str, index: int) -> str:
        lines = -(-length // self.period)
        key = ("line", self.questions, self.answers, self.replies, stream, index)
        words = self.words(4 * lines, *key).reshape(lines, 4)
        uniform = (words >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        question = (words[:, 0] % np.uint64(self.questions)).astype(np.int64)
        place = np.searchsorted(np.cumsum(self.chances)[:-1], uniform[:, 1], side="right")
        answer = self.order[question, place]
        sure = np.where(place == 0, *self.sureness)
        drawn = (words[:, 3] % np.uint64(self.replies)).astype(np.int64)
        reply = np.where(uniform[:, 2] < sure, self.reply[question, answer], drawn)
        spelled = [letters[which] for letters, which in zip(self.spelling, (question, answer, reply), strict=True)]
        return np.hstack([*spelled, np.full((lines, 1), ord("\n"), dtype=np.uint8)]).tobytes()[:length].decode()

    def wanted(self, stream: np.ndarray) -> dict[str, np.ndarray]:
        """`truth_probability`: of the true answer's first character, where an answer begins."""
        true = np.full(256, -1, dtype=np.int64)  # by the first character of the question
        true[self.spelling[0][:, 0]] = self.spelling[1][self.order[:, 0], 0]
        wanted = np.full(len(stream), -1, dtype=np.int64)
        answers = np.arange(1 + self.length, len(stream), self.period)  # a stream is NUL and then lines
        wanted[answers] = true[stream[answers - self.length]]
        return {"truth_probability": wanted}


SYNTHETIC: dict[str, type[SyntheticSource]] = {"markov": Markov, "lpn": LPN, "copy": Copy, "dialogue": Dialogue}


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


def is_synthetic(name: str) -> bool:
    """Whether a corpus's name is that of a source of this file.

    >>> is_synthetic("markov:order=3"), is_synthetic("shakespeare")
    (True, False)
    """
    return name.partition(":")[0] in SYNTHETIC


def canonical(name: str) -> str:
    """The shortest name of a corpus that is made up; any other name as it is. Raises ConfigError."""
    return synthetic(name).name if is_synthetic(name) else name


def entropy(p: np.ndarray) -> float:
    """Entropy in nats of probabilities of any shape."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
