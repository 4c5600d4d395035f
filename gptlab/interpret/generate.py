"""Text generated from a prompt: several texts at a time, a token a step, with each block's reading where asked for.

Beyond block_size the last block_size tokens are the context, as in nanoGPT. Positions are learnt and absolute, so every
token of the window stands at another place than before and its keys and values are of no use: the whole window is read
again for every token, which is slow and exactly what the model was trained to do.

Early exit: a token is taken from the first block whose reading gives its best token at least `exit_confidence` of the
probability; the blocks above are not computed, and their keys and values made of the state it left with
(decoder.py's `skip`). All blocks read the prompt except its last token, from which the first new one comes.
A confidence of 1 or more never exits. lens.py measures what is lost and saved by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError
from gptlab.model.decoder import Decoder, Weights
from gptlab.model.gpt import GPT
from gptlab.model.weights import refuse_not_finite
from gptlab.randomness import torch_generator
from gptlab.signals.tuned_lens import TunedLens


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature: 0 takes the likeliest; top_k, top_p: of the k likeliest only, of the fewest
    that hold p of the probability (nucleus, 1904.09751)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


class OpenedModel(Protocol):
    """A model in evaluation mode where it computes, and its tokenizer. vocabulary.size: tokens it may draw."""

    @property
    def model(self) -> GPT: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def placement(self) -> ComputeConfig: ...
    @property
    def vocabulary(self) -> Any: ...


PLAIN = Sampling()
COLDEST = 1e-6
"""Below this temperature the likeliest token has all the probability in float32, and division overflows."""


@dataclass(frozen=True)
class Step:
    """One written token and the block, of 1..L, whose reading it was drawn from.

    best, probability: of each block's reading up to that one, where they were looked at.
    """

    token: int
    block: int
    best: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Reading:
    """logits (B, V) of block `block`; best, probability: (blocks, B) of the readings that were looked at."""

    logits: Tensor
    block: int
    best: Tensor | None = None
    probability: Tensor | None = None

    def step(self, row: int, token: int) -> Step:
        if self.best is None or self.probability is None:
            return Step(token, self.block)
        return Step(token, self.block, self.best[:, row].tolist(), self.probability[:, row].tolist())


class TextModel(GPT):
    """A GPT with its tokenizer, which writes text; `gptlab.load` gives one.

    >>> model = gptlab.load("runs/a")
    >>> model.generate("To be", max_new_tokens=20, seed=3) == model.generate("To be", max_new_tokens=20, seed=3)
    True
    >>> logits = model(torch.zeros(1, 8, dtype=torch.long))
    >>> logits.shape == (1, 8, model.config.vocab_size)
    True
    """

    def __init__(self, opened: OpenedModel) -> None:
        self.__dict__.update(opened.model.__dict__)  # the same modules, not copies
        self._opened = opened

    @property
    def tokenizer(self) -> Tokenizer:
        """What its tokens stand for; raises DataError where that is not known."""
        return self._opened.tokenizer

    def generate(
        self, prompt: str = "\n", max_new_tokens: int = 200, *, temperature: float = 0.8, top_k: int | None = None,
        top_p: float = 1.0, seed: int = 1,
    ) -> str:  # fmt: skip
        """Text that continues `prompt`, which is not repeated; it ends with a document, or after max_new_tokens.

        temperature: 0 always takes the likeliest token; top_k, top_p: draw from the k likeliest, or the fewest that
        hold p of the probability. The same seed draws the same text. Raises ConfigError for what is out of range.
        """
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
            raise ConfigError(
                "expected max_new_tokens and temperature of at least 0, top_k of at least 1 and 0 < top_p <= 1, found "
                f"{max_new_tokens}, {temperature}, {top_k} and {top_p}"
            )
        steps = generate(
            Weights(self, self._opened.placement.autocast), self.tokenizer.prompt(prompt), max_new_tokens,
            Sampling(temperature, top_k, top_p), generator=torch_generator("sample", seed, 0),
            vocab_size=self._opened.vocabulary.size, end=self.tokenizer.end_of_text,
        )  # fmt: skip
        return self.tokenizer.decode([step.token for step in steps])


def generate(
    model: GPT | Weights,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Iterator[Step]:
    """One text: the steps of `generate_batch` for a single generator."""
    for (step,) in generate_batch(model, prompt, max_new_tokens, sampling, generators=[generator], **options):
        assert step is not None, "the last text has not ended"
        yield step


@torch.no_grad()
def generate_batch(
    model: GPT | Weights,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    generators: Sequence[torch.Generator | None],
    vocab_size: int | None = None,
    end: int | None = None,
    show_blocks: bool = False,
    exit_confidence: float | None = None,
    reader: TunedLens | None = None,
) -> Iterator[list[Step | None]]:
    """Texts that continue `prompt`, one for each generator (on the CPU; None: torch's own), a step of all at a time.

    A text ends with its first token `end` and is None from then on; the batch ends when all have, or after
    max_new_tokens. vocab_size: ids the tokenizer knows; rows that only pad the model's vocabulary are never written.
    show_blocks: look at every block's reading. With exit_confidence texts are written one at a time, since rows would
    leave at different blocks: give one generator. reader: what blocks are read with, None = raw. A model's weights are
    copied for the products (decoder.py): to generate several times, or in another dtype, give `Weights`.
    """
    if exit_confidence is not None and exit_confidence >= 1:
        exit_confidence = None
    assert exit_confidence is None or len(generators) == 1, "texts with early exit are written one at a time"
    if max_new_tokens < 1:
        return
    weights = model if isinstance(model, Weights) else Weights(model)
    writer = _Writer(weights, prompt, len(generators), max_new_tokens)
    ended = [False] * len(generators)
    for _ in range(max_new_tokens):
        if exit_confidence is None:
            reading = writer.read_in_full(vocab_size, show_blocks, reader)
        else:
            reading = writer.read_until(exit_confidence, vocab_size, reader)
        draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
        logits = reading.logits.expand(len(generators), -1)
        chosen = choose(logits, sampling, draws)
        tokens = chosen.tolist()
        yield [None if over else reading.step(row, t) for row, (over, t) in enumerate(zip(ended, tokens, strict=True))]
        ended = [over or t == end for over, t in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        writer.add(chosen)


class _Writer:
    """The tokens written so far, and the decoder that has read all but the last of them."""

    def __init__(self, weights: Weights, prompt: list[int], rows: int, new: int) -> None:
        self.block_size = weights.config.block_size
        self.tokens = torch.tensor([prompt], device=weights.device)  # (1, T), (B, T) once something is written
        self.decoder = Decoder(weights, rows, min(self.block_size, len(prompt) + new))
        self.rows = rows

    def add(self, chosen: Tensor) -> None:
        """Append a token (B,) to each text."""
        self.tokens = torch.cat([self.tokens.expand(self.rows, -1), chosen[:, None]], dim=1)

    def _unread(self) -> Tensor:
        """The tokens (B, T) that the decoder is to read next: the last one, or the whole window."""
        if self.decoder.length and self.tokens.shape[1] <= self.block_size:
            return self.tokens[:, self.decoder.length :]
        self.decoder.forget()
        return self.tokens[:, -self.block_size :]

    def read_in_full(self, vocab_size: int | None, show_blocks: bool, reader: TunedLens | None) -> _Reading:
        states = list(self.decoder.states(self._unread()))
        if not show_blocks:
            return _Reading(self.decoder.read(states[-1])[:, :vocab_size], len(states))
        if reader:
            states = [reader(number, h) for number, h in enumerate(states, 1)]
        logits = self.decoder.read(torch.stack(states))[..., :vocab_size]  # (L, B, V)
        probability, best = logits.softmax(2).max(2)
        return _Reading(logits[-1], len(states), best.expand(-1, self.rows), probability.expand(-1, self.rows))

    def read_until(self, confidence: float, vocab_size: int | None, reader: TunedLens | None) -> _Reading:
        """The reading of the first block that is sure enough, or of the last."""
        unread = self._unread()
        if unread.shape[1] > 1:
            for _ in self.decoder.states(unread[:, :-1]):
                pass
        best, probability, number, logits = [], [], 0, None
        for number, h in enumerate(self.decoder.states(unread[:, -1:]), 1):
            logits = self.decoder.read(reader(number, h) if reader else h)[:, :vocab_size]
            p, token = logits.softmax(1).max(1)
            best.append(token)
            probability.append(p)
            if number < self.decoder.config.n_layer and bool(p >= confidence):
                self.decoder.skip(number, h)
                break
        assert logits is not None
        return _Reading(logits, number, torch.stack(best), torch.stack(probability))


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """A token of each row of logits (B, V), as (B,): where `draws` (B,), uniform in [0, 1), falls in the distribution.

    >>> choose(torch.tensor([[0.0, 9.0, 9.0]]).repeat(2, 1), Sampling(), torch.tensor([0.1, 0.9]))
    tensor([1, 2])
    """
    refuse_not_finite(logits)
    if sampling.temperature < COLDEST:
        return logits.argmax(1)
    index = None
    if sampling.top_k and sampling.top_k < logits.shape[1]:
        logits, index = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, index = logits.sort(descending=True, stable=True)
    p = (logits / sampling.temperature).softmax(1)
    reached = p.cumsum(1, dtype=torch.float64)
    if sampling.top_p < 1:  # the likeliest token always stays
        reached = p.masked_fill(reached - p >= sampling.top_p, 0).cumsum(1, dtype=torch.float64)
    place = torch.searchsorted(reached, draws.to(reached)[:, None] * reached[:, -1:], right=True)
    return (place if index is None else index.gather(1, place))[:, 0]


def as_row(prompt: list[int], steps: list[Step], tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as a row of metrics.jsonl: the text, and for every token each block's best next one with its p."""
    tokens = [s.token for s in steps]
    return {
        "prompt": tokenizer.decode(prompt),
        "text": tokenizer.decode(tokens),
        "tokens": tokens,
        "written": [tokenizer.decode([t]) for t in tokens],
        "blocks": [
            [[tokenizer.decode([b]), round(p, 4)] for b, p in zip(s.best, s.probability, strict=True)] for s in steps
        ],
    }
