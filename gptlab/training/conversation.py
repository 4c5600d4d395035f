"""The conversation: the model says something, and how sure it leaves a listener of the reply is what it is worth (N3).

In a micro-batch's sequences, `turns` positions each end a context x. K utterances a_k of `say` tokens are sampled after
it, the listener reads context and utterance, and its reply's confidence c_k, the mean of p_max over `reply` tokens, is
rewarded with r_k = [c_k >= τ]·(-log(1-c_k)). The score function carries it: the loss is the mean over turns of
-mean_k A_k·log p(a_k|x), with the advantage A_k of the rewards held constant. Who listens is the model itself or a
frozen one; what it computes takes no gradient.

The K utterances share their context's keys and values, which are made of the hidden states that the update has anyway.
Logits are read in chunks and never kept. Every draw is keyed by (seed, step, sequence, turn).

Shapes: B batch, T time, C channels, H heads, V vocabulary, K utterances a turn, N = turns·K of a sequence, R rounds,
which are tokens of an utterance: what continues a sequence is (B, R, N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from gptlab.errors import ConfigError
from gptlab.model.gpt import GPT
from gptlab.randomness import key_bits, permutation
from gptlab.signals.config import SignalConfig
from gptlab.signals.functions import confidence, likeliest
from gptlab.signals.readout import LossFunction, Readout
from gptlab.training.block_graph import (
    ActiveSignal,
    Batch,
    BlockGraph,
    HiddenGradient,
    SourceOutput,
    embedding_backward,
    matmuls_in,
)

REWARD_CAP = 10.0
"""The largest reward in nats: a confidence of 1 - 4.5e-5. Without one a single sure reply would be worth any number."""


def run_conversation(
    model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch
) -> SourceOutput:
    """The mean of -A·log p over turns and utterances, and its gradient at hidden states; the rest goes to `.grad`."""
    config, (B, T), L = signal.config, batch.tokens.shape, model.config.n_layer
    K = model.config.vocab_size if config.exact else config.samples
    device = batch.tokens.device
    ends = _turns(config, batch).to(device)  # (B, turns)
    rows = (ends + T * torch.arange(B, device=device)[:, None]).flatten()  # of the flattened batch
    states = [graph.hidden(j) for j in range(L + 1)]
    contexts = states[L].flatten(0, 1)[rows]  # (B·turns, C)

    def branches(of: GPT, hidden: Sequence[Tensor]) -> Branches:
        return Branches(of, hidden, ends.repeat_interleave(K, 1), graph.autocast)

    with torch.no_grad():
        speaker = branches(model, states)
        tokens, p = _utterances(config, readout, speaker, contexts, batch)  # (B, say, N) each
        rest = torch.log1p(-p.mean(1))  # log(1-c) (B, N), by the control self of what is said
        if config.control != "self":
            rest = _listen(config, *(_frozen(signal, graph, branches) or (readout, speaker)), tokens)
        chances = p.view(B, config.turns, K) if config.exact else p.new_full((1, 1, 1), 1 / K)
        reward, passed = _rewards(config, rest, batch)
        weights = chances * _advantages(config, reward, chances)  # (B, turns, K)
        figures = _figures(config, readout, contexts, tokens, (chances * reward).sum(2), (chances * passed).sum(2))

    # The first tokens are read where their contexts end, for all utterances at once; later ones after those before.
    scale = signal.weight * batch.share / len(rows)
    first = readout.read(
        contexts, *_scored(tokens[:, 0].reshape(len(rows), K), weights.flatten(0, 1)), scale, learn=True
    )
    at_end = torch.zeros_like(states[L]).flatten(0, 1).index_copy_(0, rows, first.gradient).view_as(states[L])
    gradients, total = [HiddenGradient(L, at_end)], first.total
    if config.say > 1:
        learner = branches(model, states)
        after = learner.run(tokens[:, :-1], learn=True)
        each = weights.view(B, 1, -1).expand(tokens[:, 1:].shape)
        one_by_one = _scored(tokens[:, 1:].reshape(-1, 1), each.reshape(-1, 1))
        later = readout.read(after.flatten(0, 2), *one_by_one, scale, learn=True)
        gradients += learner.backprop(later.gradient)
        total = total + later.total
    return SourceOutput({L: total / len(rows)}, gradients, figures=figures)


@dataclass
class Branches:
    """Tokens that continue a micro-batch's sequences, N continuations of each, run through the blocks as they come.

    hidden: h_0..h_L (B, T, C) of the sequences; ends (B, N): where each continuation's context ends, itself included.
    """

    model: GPT
    hidden: Sequence[Tensor]
    ends: Tensor
    autocast: torch.dtype | None
    rounds: int = 0
    _context: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _tape: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _input: tuple[Tensor, Tensor] | None = None

    def run(self, tokens: Tensor, *, learn: bool = False) -> Tensor:
        """The last block's output (B, R, N, C) for the next tokens (B, R, N) of every continuation.

        learn: keep each block's graph for `backprop`, which takes one run, the first.
        """
        B, R, N = tokens.shape
        positions = self.ends[:, None] + 1 + self.rounds + torch.arange(R, device=tokens.device)[:, None]  # (B, R, N)
        with matmuls_in(self.autocast, self.model, tokens.device):
            with torch.no_grad():
                x = (self.model.wte(tokens) + self.model.wpe(positions)).flatten(1, 2)
            self._input = tokens.flatten(1, 2), positions.flatten(1, 2)
            for j, block in enumerate(self.model.blocks):
                context = self.hidden[j].detach().requires_grad_(learn)
                x = x.detach().requires_grad_(learn)
                with torch.set_grad_enabled(learn):
                    # Not as compiled, whose graph is the whole block's; hooks of sharded blocks still run.
                    given = x, self._attention(j, R), None if j in self._context else context
                    y: Tensor = nn.Module._call_impl(block, *given)  # pyright: ignore
                if learn:
                    self._tape.append((x, context, y))
                x = y
        self.rounds += R
        return x.detach().view(B, R, N, -1)

    def backprop(self, gradient: Tensor) -> list[HiddenGradient]:
        """Send a gradient at the output of `run` down; weights add theirs to `.grad`, contexts' are given."""
        found = []
        gradient = gradient.view_as(self._tape[-1][2])
        for j, (x, context, y) in reversed(list(enumerate(self._tape))):
            torch.autograd.backward(y, gradient)
            assert x.grad is not None
            assert context.grad is not None
            gradient = x.grad
            found.append(HiddenGradient(j, context.grad))
        assert self._input is not None
        embedding_backward(self.model, self._input[0], gradient, self._input[1])
        return found

    def _attention(self, j: int, R: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Block j's attention of R rounds: to the context up to its end, and to the own utterance so far."""

        def attend(qkv: Tensor, of_context: Tensor | None) -> Tensor:  # (B, R·N, 3C), (B, T, 3C) -> (B, R·N, C)
            H, C = self.model.config.n_head, qkv.shape[2] // 3
            B, N, D = len(qkv), qkv.shape[1] // R, C // H
            q, k, v = qkv.view(B, R, N, 3, H, D).permute(3, 0, 4, 1, 2, 5)  # (B, H, R, N, D) each
            if of_context is not None:
                _, *pair = of_context.view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
                self._context[j] = (pair[0], pair[1])
            if j in self._own:
                k, v = (torch.cat(pair, 2) for pair in zip(self._own[j], (k, v), strict=True))
            self._own[j] = k, v
            context_k, context_v = self._context[j]
            T, S = context_k.shape[2], k.shape[2]
            far = (q.reshape(B, H, R * N, D) @ context_k.transpose(2, 3)).view(B, H, R, N, T)
            beyond = torch.arange(T, device=q.device) > self.ends[:, None, None, :, None]  # (B, 1, 1, N, T)
            near = torch.einsum("bhrnd,bhsnd->bhrns", q, k)
            later = torch.ones(R, S, dtype=torch.bool, device=q.device).triu(S - R + 1)[:, None]  # (R, 1, S)
            scores = torch.cat([far.masked_fill(beyond, -torch.inf), near.masked_fill(later, -torch.inf)], 4)
            wide = torch.promote_types(scores.dtype, torch.float32)
            p = (scores * D**-0.5).softmax(4, dtype=wide).to(v.dtype)
            y = (p[..., :T].reshape(B, H, R * N, T) @ context_v).view(B, H, R, N, D)
            y = y + torch.einsum("bhrns,bhsnd->bhrnd", p[..., T:], v)
            return y.permute(0, 2, 3, 1, 4).reshape(B, R * N, C)

        return attend


def _turns(config: SignalConfig, batch: Batch) -> Tensor:
    """Where the contexts of every sequence end (B, turns), each with room for utterance and reply."""
    room = batch.tokens.shape[1] - config.say - config.reply + 1
    drawn = [permutation(room, "turns", batch.seed, batch.step, s)[: config.turns] for s in batch.sequences]
    return torch.from_numpy(np.stack(drawn))


def _utterances(
    config: SignalConfig, readout: Readout, speaker: Branches, contexts: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Tokens of the utterances and the probability of each (B, say, N); float64. All but the last have been run."""
    B, N = speaker.ends.shape
    index = torch.arange(len(contexts), device=contexts.device)
    if config.exact:
        p = readout.values(contexts, index, lambda z, rows, other: z.softmax(1))  # (B·turns, V)
        every = torch.arange(p.shape[1], device=p.device).expand(p.shape)
        return every.reshape(B, 1, N), p.double().view(B, 1, N)
    drawn = [_uniform(config, batch, sequence) for sequence in batch.sequences]  # (turns, K, say) each
    u = torch.from_numpy(np.stack(drawn)).to(contexts.device)
    tokens, chances, draws = [], [], u[..., 0].flatten(0, 1)  # (B·turns, K)
    for i in range(config.say):
        if i:
            contexts, draws = speaker.run(tokens[-1][:, None]).flatten(0, 2), u[..., i].reshape(B * N, 1)
            index = torch.arange(B * N, device=contexts.device)
        sampled = readout.values(contexts, index, _sampler(draws)).view(B, N, 2)
        tokens.append(sampled[..., 0].long())
        chances.append(sampled[..., 1])
    return torch.stack(tokens, 1), torch.stack(chances, 1)


def _uniform(config: SignalConfig, batch: Batch, sequence: int) -> np.ndarray:
    """Numbers (turns, K, say) uniform over [0, 1) that the utterances of a sequence are drawn with."""
    shape, key = (config.samples, config.say), ("conversation", batch.seed, batch.step, sequence)
    streams = (np.random.Philox(key=key_bits(*key, turn)) for turn in range(config.turns))
    return np.stack([stream.random_raw(shape[0] * shape[1]).reshape(shape) for stream in streams]) * 2.0**-64


def _sampler(u: Tensor) -> LossFunction:
    """Of rows' logits (n, V): the tokens (n, K) at which the distribution function passes u, and their probability."""

    def sample(z: Tensor, rows: Tensor, other: Tensor | None) -> Tensor:
        p = z.double().softmax(1)
        up_to = p.cumsum(1)
        token = torch.searchsorted(up_to, u[rows] * up_to[:, -1:], right=True).clamp(max=z.shape[1] - 1)
        return torch.stack([token.double(), p.gather(1, token)], 2)

    return sample


def _frozen(
    signal: ActiveSignal, graph: BlockGraph, branches: Callable[[GPT, Sequence[Tensor]], Branches]
) -> tuple[Readout, Branches] | None:
    """The listener's readout and its own reading of the contexts, where another model listens."""
    if not signal.config.frozen_listener:
        return None
    if (model := signal.listener) is None:
        raise ConfigError(f"signal.listener {signal.config.listener} is loaded by training alone; use self here")
    with matmuls_in(graph.autocast, model, graph.batch.tokens.device):
        hidden = model.hidden_states(graph.batch.tokens)
    return Readout(model, graph.autocast), branches(model, hidden)


def _listen(config: SignalConfig, readout: Readout, listener: Branches, tokens: Tensor) -> Tensor:
    """log(1-c) (B, N) of the listener's reply to the utterances (B, say, N); its further tokens are the likeliest."""
    heard, rests = tokens[:, listener.rounds :], []
    for _ in range(config.reply):
        reply = listener.run(heard)[:, -1].flatten(0, 1)  # (B·N, C)
        read = readout.values(reply, torch.arange(len(reply), device=reply.device), _best_and_rest)
        heard = read[:, 0].long().view(len(tokens), 1, -1)
        rests.append(read[:, 1].view(len(tokens), -1))
    return torch.stack(rests).logsumexp(0) - np.log(config.reply)


def _best_and_rest(z: Tensor, rows: Tensor, other: Tensor | None) -> Tensor:
    """The likeliest token, and log(1-p_max) (n, 2), float64."""
    return torch.stack([likeliest(z).double(), confidence(z.double(), rows)], 1)


def _rewards(config: SignalConfig, rest: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """r, and whether c passed the gate (B, turns, K), of log(1-c) (B, N); dealt at random by the control shuffled."""
    passed = -torch.expm1(rest) >= config.threshold
    reward = (-rest).clamp(max=REWARD_CAP) * passed
    if config.control == "shuffled":
        N, key = rest.shape[1], ("shuffled rewards", batch.seed, batch.step)
        orders = [torch.from_numpy(permutation(N, *key, sequence)) for sequence in batch.sequences]
        reward = reward.gather(1, torch.stack(orders).to(reward.device))
    shape = (len(rest), config.turns, -1)
    return reward.view(shape), passed.view(shape)


def _advantages(config: SignalConfig, reward: Tensor, chances: Tensor) -> Tensor:
    """A (B, turns, K) of rewards: less the mean of the turn's other utterances, or of all where all are enumerated."""
    if config.advantage == "raw":
        return reward
    if config.exact:
        others = (chances * reward).sum(2, keepdim=True)
    else:
        others = (reward.sum(2, keepdim=True) - reward) / (reward.shape[2] - 1)
    return (reward - others).clamp(min=0) if config.advantage == "positive" else reward - others


def _scored(tokens: Tensor, weights: Tensor) -> tuple[Tensor, LossFunction]:
    """Targets and loss for a readout of rows: -Σ_k w_k·log p(token k), of tokens and weights (rows, K)."""

    def score(z: Tensor, rows: Tensor, other: Tensor | None) -> Tensor:
        return -(z.log_softmax(1).gather(1, tokens[rows]) * weights[rows].to(z.dtype)).sum(1)

    return torch.arange(len(tokens), device=tokens.device), score


FIGURES = ("reward", "reward_passed", "distinct_ngrams", "argmax_entropy")
"""What is logged of a conversation where the dose is."""


def _figures(
    config: SignalConfig, readout: Readout, contexts: Tensor, tokens: Tensor, reward: Tensor, passed: Tensor
) -> Tensor:
    """Means over sequences (3 + V,): reward, passed, distinct n-grams, and how often each token is the likeliest."""
    size, V = min(2, config.say), len(readout.head)
    shares = []
    for sequence in tokens.transpose(1, 2).tolist():  # N utterances of `say` tokens
        grams = [tuple(utterance[i : i + size]) for utterance in sequence for i in range(len(utterance) - size + 1)]
        shares.append(len(set(grams)) / len(grams))
    index = torch.arange(len(contexts), device=contexts.device)
    best = readout.values(contexts, index, lambda z, rows, other: likeliest(z))
    three = torch.stack([reward.mean(), passed.mean(), reward.new_tensor(shares).mean()])
    return torch.cat([three, torch.bincount(best, minlength=V).double() / len(best)])


def figure_count(vocab_size: int) -> int:
    """How many means `_figures` gives for a model's vocabulary."""
    return len(FIGURES) - 1 + vocab_size


def named_figures(config: SignalConfig, figures: Sequence[float]) -> dict[str, float | None]:
    """FIGURES by name, from their means over an update; the share of distinct n-grams is of sampled utterances only."""
    reward, passed, distinct, *argmax = figures
    entropy = -sum(p * np.log(p) for p in argmax if p > 0)
    return dict(zip(FIGURES, (reward, passed, None if config.exact else distinct, float(entropy)), strict=True))
