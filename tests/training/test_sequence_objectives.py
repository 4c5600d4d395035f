"""Sequence objectives: their gradients by plain autograd, and every option of a signal with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SEQUENCES, make_run
from test_controls import length, minus
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.errors import ConfigError
from gptlab.model import GPT, GPTConfig
from gptlab.signals import SignalConfig, functions
from gptlab.signals.registry import OBJECTIVES, user_signal
from gptlab.training import TrainingConfig, backward

NAMES = ["label_smoothing", "z_loss", "multi_token_prediction"]
each_objective = pytest.mark.parametrize("name", NAMES)
B, T, V, L = 3, 6, 11, 3

CONSISTENT = '''
def consistent(hidden_states, tokens, targets, read):
    """Half the mean square of what the last block adds, and the loss of the reading below it."""
    change = (hidden_states[-1] - hidden_states[-2]).square().mean(-1) / 2
    z = read(hidden_states[-2])
    return change - z.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
'''


@pytest.fixture
def consistent(tmp_path: Path) -> str:
    (tmp_path / "idea.py").write_text(CONSISTENT)
    return f"{tmp_path / 'idea.py'}:consistent"


def model_and_text() -> tuple[GPT, Tensor, Tensor]:
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=8), seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    tokens = torch.randint(V, (B, T + 1), generator=generator)
    return model, tokens[:, :-1], tokens[:, 1:]


def reference(name: str, model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, written a second time."""
    states = model.hidden_states(tokens)
    z = model.read(states[-1])
    if name == "label_smoothing":
        return -z.log_softmax(-1).sum(-1).mean() / V
    if name == "z_loss":
        return z.exp().sum(-1).log().pow(2).mean()
    if name == "multi_token_prediction":
        below = model.read(states[-2])
        pairs = [(below[b, t], targets[b, t + 1]) for b in range(B) for t in range(T - 1)]
        return torch.stack([cross_entropy(z[None], y[None]) for z, y in pairs]).sum() / (B * T)
    change = (states[-1] - states[-2]).pow(2).sum(-1) / 8 / 2
    return change.mean() + cross_entropy(model.read(states[-2]).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", [*NAMES, "a user's"])
@pytest.mark.parametrize("chunk", [None, 1, 2 * T])
def test_the_gradient_is_plain_autograds(
    name: str, chunk: int | None, consistent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sequences go through at once, however few rows of logits may be held."""
    if chunk:
        monkeypatch.setattr("gptlab.signals.readout.CHUNK_BYTES", chunk * V * 8)
    model, tokens, targets = model_and_text()
    loss = reference(name, model, tokens, targets)
    (cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) + 0.7 * loss).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    config = SignalConfig(consistent if name == "a user's" else name, weight=0.7)
    losses = backward(model, tokens, targets, config)
    assert float(losses.signal_loss) == pytest.approx(0.7 * loss.item(), rel=1e-12)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], rtol=1e-9, atol=1e-12)


def test_a_prefix_is_the_longest_token_that_another_begins_with() -> None:
    from gptlab.data.tokenizers import get_tokenizer

    tokenizer = get_tokenizer("gpt2")
    table, prefixes = tokenizer.token_table, functions.prefix_tokens(50304)
    for word, start in ((" hello", " hell"), (" t", " "), ("The", "Th")):
        assert prefixes[table.index(word.encode())] == table.index(start.encode())
    assert prefixes[table.index(b"a")] == -1
    assert prefixes[tokenizer.document_start :] == [-1] * (50304 - 50256)
    for token in range(300, 50000, 997):
        longer = [other for other in range(50256) if other != token and table[token].startswith(table[other])]
        assert prefixes[token] == max(longer, key=lambda other: len(table[other]), default=-1)


def test_the_loss_of_a_prefix_is_its_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "prefix_tokens", lambda rows: [-1, -1, 0, 1, 2])
    z = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[0, 2, 3], [4, 1, 2]])
    found = OBJECTIVES["prefix_token_prediction"]([z], targets, targets, lambda h: h)
    log_p = z.log_softmax(-1)
    expected = [[0.0, -log_p[0, 1, 0], -log_p[0, 2, 1]], [-log_p[1, 0, 2], 0.0, -log_p[1, 2, 0]]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rows", [256, 31])
def test_a_vocabulary_without_prefixes_is_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match=f"a vocabulary of {rows} has none; use --tokenizer gpt2"):
        functions.prefix_tokens(rows)
    with pytest.raises(ConfigError, match="add --tokenizer gpt2"):
        TrainingConfig(signal=SignalConfig("prefix_token_prediction"))
    assert TrainingConfig(signal=SignalConfig("prefix_token_prediction"), tokenizer="gpt2").signals


def added(name: str, cut: tuple[int, ...] = (SEQUENCES,), **options: Any) -> dict[str, Tensor]:
    """What a signal adds to an update's gradient."""
    return minus(make_run(signal=SignalConfig(name, **options)).gradient(cut), make_run().gradient(cut))


@each_objective
@pytest.mark.parametrize("control", ["none", "placebo", "shuffled", "flipped"])
def test_controls_and_micro_batches_are_those_of_any_signal(name: str, control: Any) -> None:
    plain, controlled = added(name), added(name, control=control)
    again = added(name, cut=(5, 1, 6), control=control)
    assert length(minus(again, controlled)) < 1e-12 * length(controlled)
    if control == "placebo":
        assert length(controlled) == pytest.approx(length(plain), rel=1e-9)
    unchanged = control == "none" or (control == "flipped" and name != "multi_token_prediction")
    assert (length(minus(controlled, plain)) < 1e-12 * length(plain)) == unchanged


@each_objective
def test_a_dose_is_held_and_measured(name: str) -> None:
    run = make_run(signal=SignalConfig(name, dose=0.3))
    said = run.update((5, 7))
    assert said.dose == pytest.approx(0.3, rel=1e-9)
    free = make_run(signal=SignalConfig(name, weight=said.weights[0])).update((12,), measure_dose=True)
    assert free.dose == pytest.approx(0.3, rel=1e-9)
    assert free.signal_loss == pytest.approx(said.signal_loss, rel=1e-9)
    assert free.by_judge == [[None] * 3], "no block below the last is read"


@each_objective
def test_weight_0_is_the_baseline(name: str) -> None:
    run, plain = make_run(signal=SignalConfig(name, weight=0.0), sure=False), make_run(sure=False)
    for _ in range(2):
        assert run.update() == plain.update() or run.config.signals
    assert all(torch.equal(p, plain.weights[key]) for key, p in run.weights.items())


@each_objective
@pytest.mark.parametrize(
    ("option", "value"),
    [("layers", "rotate"), ("positions", 0.5), ("evaluator", "live"), ("reach", "local"), ("embeddings", False)],
)
def test_what_blocks_alone_have_is_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"signal\.{option} {value} is for signals that read blocks.*leave it out"):
        SignalConfig(name, **{option: value})
    with pytest.raises(ConfigError, match=r"flip_to argmax needs the logits of one block"):
        SignalConfig(name, control="flipped", flip_to="argmax")


def test_one_block_is_enough() -> None:
    assert TrainingConfig(n_layer=1, signal=SignalConfig("z_loss")).signals
    with pytest.raises(ConfigError, match="n_layer must be at least 2"):
        TrainingConfig(n_layer=1, signal=SignalConfig("confidence"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def name(content: str) -> str:
        (tmp_path / "idea.py").write_text(content)
        return f"{tmp_path / 'idea.py'}:f"

    return name


def test_the_arguments_of_a_users_function_say_what_it_is(write: Callable[[str], str]) -> None:
    kinds = {"z, y": None, "logits, tokens, targets": "logits", "hidden_states, tokens, targets": "hidden_states"}
    for arguments, reads in kinds.items():
        config = SignalConfig(write(f"def f({arguments}):\n    return {arguments.split(', ')[0]}\n"))
        assert config.kind == ("objective" if reads else "reading")
        assert getattr(config.signal, "reads", None) == reads
    with pytest.raises(ConfigError, match=r"to take logits or hidden_states, then tokens and targets, found z, tokens"):
        user_signal(write("def f(z, tokens): ...\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(logits, tokens, targets):\n    return logits.sum()\n", r"a tensor of shape \(3, 6\), found shape \(\)"),
        ("def f(logits, tokens, targets):\n    return 3\n", "found a int"),
        ("def f(hidden_states, tokens, targets):\n    return hidden_states[9]\n", "failed: IndexError"),
    ],
)
def test_a_users_objective_that_does_not_work_is_said_in_a_line(
    content: str, message: str, write: Callable[[str], str]
) -> None:
    model, tokens, targets = model_and_text()
    with pytest.raises(ConfigError, match=message):
        backward(model, tokens, targets, SignalConfig(write(content)))


def test_a_users_objective_has_no_use_for_a_blocks_options_either(consistent: str) -> None:
    model, tokens, targets = model_and_text()
    with pytest.raises(ConfigError, match=r"signal\.positions 0\.5 is for signals that read blocks"):
        backward(model, tokens, targets, SignalConfig(consistent, positions=0.5))
