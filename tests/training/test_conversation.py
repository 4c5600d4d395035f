"""The conversation against its enumeration: the estimator's mean, `exact`, and what of an update it may depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SEQUENCES, make_run
from test_controls import length, minus
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.cli.main import main
from gptlab.errors import CheckpointError, ConfigError
from gptlab.model import GPT, GPTConfig
from gptlab.runs import init_weights
from gptlab.runs.folder import RunFolder
from gptlab.signals import SignalConfig, readout
from gptlab.training import TrainingConfig, conversation
from gptlab.training.block_graph import Batch, active_signals
from gptlab.training.block_loss import accumulate

T, V = 4, 4
THRESHOLD = 0.4


def build(vocab_size: int = V, *, seed: int = 1, n_layer: int = 2) -> GPT:
    shape = GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_embd=8)
    model = GPT(shape, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return model


def gradients(
    config: SignalConfig, tokens: Tensor, *, model: GPT | None = None, step: int = 0, listener: GPT | None = None
) -> tuple[dict[str, Tensor], float]:
    """What the signal alone adds at weight 1 on sequences (B, T), and its mean."""
    model = model or build()
    batch = Batch(tokens, tokens, step, 3, 0, part="signals")
    losses = accumulate(model, batch, active_signals([config], [1.0], listener))
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}, float(
        losses.signal_loss
    )


def log_p(model: GPT, context: Tensor, said: Tensor) -> Tensor:
    """log p(said | context), token by token (say,), by one plain forward pass."""
    logits = model(torch.cat([context, said])[None])[0].log_softmax(-1)
    rows = logits[len(context) - 1 : -1]
    return rows.gather(1, said[:, None])[:, 0]


@torch.no_grad()
def reward(model: GPT, context: Tensor, said: Tensor, reply: int = 1) -> float:
    heard, confidences = torch.cat([context, said]), []
    for _ in range(reply):
        p = model(heard[None])[0, -1].softmax(-1)
        confidences.append(float(p.max()))
        heard = torch.cat([heard, p.argmax()[None]])
    c = sum(confidences) / reply
    return -math.log(1 - c) if c >= THRESHOLD else 0.0


def expected(
    say: int, advantage: str, tokens: Tensor, ends: list[int], *, vocab: int = V, listener: GPT | None = None
) -> dict[str, Tensor]:
    """The gradient of -E[A·log p], by going through all utterances; positive: with two samples, or `exact` (limit)."""
    model = build(vocab)
    everything = [torch.tensor(a) for a in itertools.product(range(vocab), repeat=say)]
    loss = torch.zeros((), dtype=torch.float64)
    for end in ends:
        context = tokens[: end + 1]
        logs = torch.stack([log_p(model, context, a).sum() for a in everything])
        p = logs.detach().exp()
        r = torch.tensor([reward(listener or model, context, a) for a in everything], dtype=torch.float64)
        if advantage == "positive of two":
            weight = p * ((r[:, None] - r[None, :]).clamp(min=0) * p[None, :]).sum(1)
        elif advantage == "positive":
            weight = p * (r - (p * r).sum()).clamp(min=0)
        else:
            weight = p * r
        loss = loss - (weight * logs).sum() / len(ends)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


TEXT = torch.tensor([1, 3, 0, 2])


@pytest.mark.parametrize(
    ("advantage", "samples", "of"), [("raw", 1, "raw"), ("signed", 3, "raw"), ("positive", 2, "positive of two")]
)
def test_the_mean_over_draws_is_the_enumerated_gradient(advantage: Any, samples: int, of: str) -> None:
    """z-tests over 60 updates of 100 sequences, for every parameter, along directions that are fixed beforehand."""
    config = SignalConfig(
        "conversation", say=2, turns=2, samples=samples, advantage=advantage, threshold=THRESHOLD
    )  # room for two turns: at positions 0 and 1
    wanted = expected(2, of, TEXT, [0, 1])
    found = [gradients(config, TEXT.expand(100, T), step=step)[0] for step in range(60)]
    generator = torch.Generator().manual_seed(8)
    for name, w in wanted.items():
        directions = torch.randn(3, w.numel(), dtype=torch.float64, generator=generator)
        directions[2] = w.flatten()
        draws = torch.stack([(g[name] - w).flatten() for g in found]) @ directions.T  # (60, 3)
        error = draws.std(0) / 60**0.5
        z = draws.mean(0) / error
        assert (z.abs() < 4.5).all(), (name, z)
        if w.norm() > 1e-3:
            assert error[2] < 0.2 * w.norm() ** 2, f"{name}: too few draws to see a difference"


@pytest.mark.parametrize("advantage", ["raw", "signed", "positive"])
@pytest.mark.parametrize(("vocab", "frozen"), [(4, False), (11, False), (11, True)])
def test_exact_is_the_enumeration(advantage: Any, vocab: int, frozen: bool) -> None:
    """frozen: another model listens, of another depth."""
    listener = build(vocab, seed=2, n_layer=3) if frozen else None
    who = "frozen:there" if frozen else "self"
    config = SignalConfig("conversation", exact=True, turns=3, advantage=advantage, threshold=THRESHOLD, listener=who)
    found, _ = gradients(config, TEXT[None], model=build(vocab), listener=listener)
    for name, w in expected(1, advantage, TEXT, [0, 1, 2], vocab=vocab, listener=listener).items():
        torch.testing.assert_close(found[name], w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("say", [1, 2, 4])
@pytest.mark.parametrize(("reply", "frozen"), [(1, False), (3, False), (3, True)])
def test_long_utterances_are_read_as_plain_forward_passes_do(
    say: int, reply: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the draws that were made: probabilities, rewards, and the gradient of -mean A·log p."""
    seen: dict[str, Any] = {}

    def spy(name: str) -> None:
        function = getattr(conversation, name)

        def spied(*given: Any) -> Any:
            seen[name] = function(*given)
            return seen[name]

        monkeypatch.setattr(conversation, name, spied)

    for name in ("_turns", "_utterances", "_rewards", "_advantages"):
        spy(name)
    tokens = torch.randint(9, (2, 8), generator=torch.Generator().manual_seed(1))
    listener = build(9, seed=2) if frozen else None
    config = SignalConfig(
        "conversation", say=say, reply=reply, turns=2, samples=3, advantage="signed", threshold=THRESHOLD,
        listener="frozen:there" if frozen else "self",
    )  # fmt: skip
    found, mean = gradients(config, tokens, model=build(9), listener=listener)
    model, loss = build(9), torch.zeros((), dtype=torch.float64)
    said, p = seen["_utterances"]
    for b, turn, k in itertools.product(range(2), range(2), range(3)):
        context = tokens[b, : int(seen["_turns"][b, turn]) + 1]
        a = said[b, :, 3 * turn + k]
        logs = log_p(model, context, a)
        torch.testing.assert_close(p[b, :, 3 * turn + k], logs.detach().exp(), rtol=1e-9, atol=0)
        assert float(seen["_rewards"][0][b, turn, k]) == pytest.approx(
            reward(listener or model, context, a, reply), rel=1e-9
        )
        loss = loss - seen["_advantages"][b, turn, k] * logs.sum() / 12
    loss.backward()
    assert mean == pytest.approx(loss.item(), rel=1e-9)
    for name, w in model.named_parameters():
        torch.testing.assert_close(found[name], w.grad, rtol=1e-8, atol=1e-11)


def added(cut: tuple[int, ...] = (SEQUENCES,), **options: Any) -> dict[str, Tensor]:
    config = SignalConfig("conversation", threshold=0.1, turns=2, **options)
    return minus(make_run(signal=config).gradient(cut), make_run().gradient(cut))


OPTIONS = [{}, {"say": 2, "reply": 2, "advantage": "raw"}, {"exact": True}, {"say": 3, "control": "self"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"control": "shuffled"}, {"control": "placebo", "say": 2}], ids=str)
def test_an_update_is_the_same_however_it_is_cut(options: dict[str, Any]) -> None:
    """Gradient and figures, in float64, where no rounding decides a draw."""
    whole = added(**options)
    assert length(whole) > 1e-4
    assert length(minus(added((5, 1, 6), **options), whole)) < 1e-11 * length(whole)
    config = SignalConfig("conversation", threshold=0.1, turns=2, **options)
    figures = [make_run(signal=config).update(cut).conversation or {} for cut in ((12,), (1,) * 12)]
    assert len(figures[0]) == len(conversation.FIGURES)
    for name, value in figures[0].items():
        assert figures[1][name] == (None if value is None else pytest.approx(value, rel=1e-12)), name
    if options.get("control") == "placebo":
        assert length(whole) == pytest.approx(length(added(say=2)), rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weight_0_is_the_baseline_and_a_dose_is_held(options: dict[str, Any]) -> None:
    run, plain = make_run(signal=SignalConfig("conversation", weight=0.0, turns=2, **options)), make_run()
    run.update()
    plain.update()
    assert all(torch.equal(p, plain.weights[name]) for name, p in run.weights.items())
    held = make_run(signal=SignalConfig("conversation", threshold=0.1, turns=2, dose=0.25, **options))
    assert held.update((5, 7)).dose == pytest.approx(0.25, rel=1e-9)


class Largest(TorchDispatchMode):
    """Inside, the most elements that a tensor has had which an operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                stored = one.untyped_storage().nbytes() // one.element_size()  # an expanded one takes no memory
                self.most = max(self.most, min(one.numel(), stored))
        return made


@pytest.mark.parametrize(
    "options", [{"say": 3, "reply": 2}, {"say": 2, "advantage": "raw"}, {"exact": True}, {"listener": "frozen:there"}]
)
def test_no_tensor_holds_logits_or_states_of_whole_sequences_for_each_utterance(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks that hold few logits, the largest is what one block computes of what is said, not of its context."""
    B, T, vocab, K = 2, 48, 60, 6
    shape = GPTConfig(block_size=T, vocab_size=vocab, n_layer=2, n_head=2, n_embd=16)
    tokens = torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(readout, "CHUNK_BYTES", 8 * 20 * vocab)  # 20 rows

    def largest(turns: int) -> int:
        config = SignalConfig("conversation", turns=turns, samples=K, threshold=1e-6, **options)
        with Largest() as seen:
            gradients(config, tokens, model=GPT(shape, seed=1).double(), listener=GPT(shape, seed=2).double())
        return seen.most

    N, said = (vocab if options.get("exact") else K) * 12, options.get("say", 1)
    most = largest(12)
    assert most < B * N * T * min(vocab, shape.n_embd), "the context's states or logits, once for each utterance"
    assert most <= B * N * said * max(4 * shape.n_embd, shape.n_head * (T + said + 1), vocab)
    assert largest(3) < most, "a tensor does grow with what is said: the bound above is no constant"


def test_shuffled_deals_the_same_rewards_within_each_sequence() -> None:
    rest = torch.linspace(-3, -0.6, 24, dtype=torch.float64).view(2, 12)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    batch = Batch(tokens, tokens, 5, 3, 7)
    plain, shuffled = (
        conversation._rewards(SignalConfig("conversation", control=control, turns=3), rest, batch)[0]
        for control in ("none", "shuffled")
    )
    assert not torch.equal(plain, shuffled)
    assert torch.equal(plain.flatten(1).sort().values, shuffled.flatten(1).sort().values)
    alone = Batch(tokens[1:], tokens[1:], 5, 3, 8)
    config = SignalConfig("conversation", control="shuffled", turns=3)
    assert torch.equal(conversation._rewards(config, rest[1:], alone)[0], shuffled[1:])


def test_a_reward_is_capped_and_gated() -> None:
    c = torch.tensor([[0.89, 0.9, 0.99, 1 - 1e-12]], dtype=torch.float64)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    config = SignalConfig("conversation", turns=1, threshold=0.9 - 1e-12)
    found, passed = conversation._rewards(config, torch.log1p(-c), Batch(tokens, tokens, 0, 1, 0))
    assert passed.flatten().tolist() == [False, True, True, True]
    assert found.flatten().tolist() == pytest.approx([0, math.log(10), math.log(100), conversation.REWARD_CAP])


def test_figures_are_counted() -> None:
    """Two utterances a turn that are the same, and an argmax that never changes."""
    figures = torch.tensor([0.5, 0.25, 0.75, *one_hot(torch.tensor(2), 4).tolist()])
    assert conversation.named_figures(SignalConfig("conversation"), figures.tolist()) == {
        "reward": 0.5, "reward_passed": 0.25, "distinct_ngrams": 0.75, "argmax_entropy": 0.0,
    }  # fmt: skip
    uniform = conversation.named_figures(SignalConfig("conversation", exact=True), [0, 0, 1, 0.25, 0.25, 0.25, 0.25])
    assert uniform["distinct_ngrams"] is None
    assert uniform["argmax_entropy"] == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"say": 0}, r"signal\.say must be at least 1"),
        ({"samples": 1}, "compares utterances.*sample 2 or more"),
        ({"control": "flipped"}, "a conversation sees none"),
        ({"exact": True, "say": 2}, r"signal\.exact enumerates utterances of one token, found signal\.say 2"),
        ({"exact": True, "control": "shuffled"}, "found signal.control shuffled"),
        ({"layers": "rotate"}, r"signal\.layers rotate is for signals that read blocks"),
        ({"listener": "ema"}, r"signal\.listener: expected self or frozen:PATH, found 'ema'"),
        ({"listener": "frozen:"}, r"signal\.listener: expected self or frozen:PATH"),
        ({"name": "confidence", "listener": "frozen:x"}, "is an option of a conversation, found signal confidence"),
        ({"name": "confidence", "say": 2}, r"signal\.say 2 is an option of a conversation, found signal confidence"),
        ({"name": "z_loss", "control": "self"}, "a conversation without its listener, found signal z_loss"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SignalConfig(**{"name": "conversation", **options})


def test_what_a_run_has_no_room_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"signal\.turns must be at most 2 in windows of block_size 64"):
        TrainingConfig(signal=SignalConfig("conversation", say=60, reply=3, turns=3))
    with pytest.raises(ConfigError, match="a vocabulary of at most 1024, found 50304"):
        TrainingConfig(signal=SignalConfig("conversation", exact=True), tokenizer="gpt2")
    with pytest.raises(ConfigError, match="figures of one conversation"):
        TrainingConfig(signal=SignalConfig("conversation"), also=(SignalConfig("conversation", say=2),))


def test_a_run_in_two_sessions_is_one_in_one(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"signal_name": "conversation", "signal_say": 2, "signal_threshold": 0.001, "signal_dose": 0.3}

    def result(name: str, *lengths: int) -> tuple[Any, bytes]:
        out, clock = tmp_path / name, {"tokens_per_second", "mfu"}
        for steps in lengths:
            words = tiny(out, **options, steps=steps, checkpoint_every=2, schedule="constant")
            assert main(words) == 0, capsys.readouterr().err
        rows = [row for row in RunFolder(out).rows() if row["kind"] == "train"]
        weights = (out / "checkpoints" / "step_00000004" / "model.safetensors").read_bytes()
        return [{key: value for key, value in row.items() if key not in clock} for row in rows], weights

    whole = result("whole", 4)
    assert all(row["reward"] > 0 and row["dose"] > 0 for row in whole[0])
    assert result("parts", 2, 4) == whole


def test_a_frozen_listener_is_the_same_wherever_it_lies_and_no_other(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that hears an earlier one; that is moved, then trained on, then taken away."""
    there, moved = tmp_path / "there", tmp_path / "moved"
    assert main(tiny(there, steps=2, checkpoint_every=1)) == 0
    options = {"signal_name": "conversation", "signal_threshold": 0.001, "checkpoint_every": 2, "schedule": "constant"}

    def end(path: Path, steps: int = 4, **changes: Any) -> tuple[int, str]:
        words = tiny(tmp_path / "run", **options, steps=steps, signal_listener=f"frozen:{path}", **changes)
        capsys.readouterr()
        return main(words), capsys.readouterr().err

    assert end(there, steps=2)[0] == 0
    there.rename(moved)
    code, said = end(there)
    assert (code, said.count("\n")) == (3, 1)
    assert str(there) in said
    code, said = end(moved / "checkpoints" / "step_00000001")
    assert code == 3
    assert "signal.listener: who replies is not who did when the run began" in said
    assert end(moved)[0] == 0
    rows = [row for row in RunFolder(tmp_path / "run").rows() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    alone = tiny(tmp_path / "alone", **options, steps=4)
    assert main(alone) == 0
    heard = [row["reward"] for row in rows if "reward" in row]
    assert heard != [row["reward"] for row in RunFolder(tmp_path / "alone").rows() if "reward" in row]
    capsys.readouterr()
    code = main(["noise", str(tmp_path / "run"), "--branch_steps", "0", "--eval_tokens", "64", "--reader_tokens", "0"])
    assert (code, capsys.readouterr().err.count("is loaded by training alone; use self here")) == (3, 1)


@pytest.mark.parametrize(
    ("shape", "said"), [({"tokenizer": "gpt2"}, "expected a model of bytes tokens"), ({"block_size": 8}, "windows of")]
)
def test_a_listener_that_cannot_hear_is_refused(
    shape: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(block_size=16, signal=SignalConfig("conversation", listener="frozen:there"))
    there = TrainingConfig(**{"block_size": 16, "n_layer": 2, "n_embd": 8, **shape})
    monkeypatch.setattr(init_weights, "any_model", lambda path: (GPT(there.shape, seed=1), there))
    with pytest.raises(CheckpointError, match=said):
        init_weights.frozen_listener(config)
