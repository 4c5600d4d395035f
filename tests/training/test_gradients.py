"""The block-wise gradient against a naive reference (naive_gradients.py), and what it must not depend on."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from naive_gradients import SIZE, B, Gradients, L, Rows, T, V, build, foreseen, found, furthest, gradients, naive, text
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.errors import ConfigError, DataError
from gptlab.model import GPT
from gptlab.signals import SIGNALS, Signal, SignalConfig, functions
from gptlab.training import Losses, backward, block_loss

ROUTES = [
    {"evaluator": evaluator, "reach": reach, "embeddings": embeddings}
    for evaluator in ("frozen", "live")
    for reach in ("full", "local")
    for embeddings in (True, False)
]


def written(options: Mapping[str, Any]) -> str:
    return "-".join(
        str(v) if not isinstance(v, bool) else "embeddings" if v else "no_embeddings" for v in options.values()
    )


@cache
def plain(share_blocks: bool, usual: bool) -> Gradients:
    """The true loss's gradient, of the usual text or of the other one."""
    return found(None, share_blocks, text() if usual else foreseen(share_blocks))[0]


def agree(
    config: SignalConfig,
    share_blocks: bool,
    rows: Rows | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    **keys: int,
) -> None:
    """Both ways of computing agree, and the signal's part in them is no rounding error."""
    ours, losses = found(config, share_blocks, data, **keys)
    theirs, true, signal_loss = naive(config, share_blocks, rows, keys.get("step", 0), keys.get("seed", 0), data)
    assert furthest(ours, theirs) < 1e-10
    assert losses.loss.item() == pytest.approx(true, rel=1e-12)
    assert losses.signal_loss.item() == pytest.approx(signal_loss, rel=1e-10)
    assert furthest(theirs, plain(share_blocks, data is None)) > 1e-4, (
        "the signal's gradient is zero: nothing was compared"
    )


@pytest.mark.parametrize("route", ROUTES, ids=written)
@pytest.mark.parametrize(
    ("name", "share_blocks"), [*((name, False) for name in sorted(SIGNALS)), ("confidence", True), ("advantage", True)]
)
def test_every_signal_by_every_route_equals_the_reference(name: str, route: dict[str, Any], share_blocks: bool) -> None:
    data = foreseen(share_blocks) if name == "verified_confidence" else None
    agree(SignalConfig(name=name, threshold=0.15, **route), share_blocks, data=data)


@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": (2,)},
        {"layers": (3, 1)},
        {"layers": (1,), "reach": "local"},
        {"layers": "rotate"},
        {"weight": 2.5},
        {"weight": -1.0},
        {"weight": 1.0, "start": 2, "anneal": 4},
        {"start": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["confidence", "self_distillation", "information_gain"])
def test_layers_and_weights_equal_the_reference(name: str, options: dict[str, Any], share_blocks: bool) -> None:
    agree(SignalConfig(name=name, **options), share_blocks, step=3, seed=5)


CONTROLS = [
    {"control": "placebo"},
    {"control": "shuffled"},
    {"control": "flipped"},
    {"control": "flipped", "flip": 0.5, "flip_to": "argmax"},
]


@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("route", ROUTES, ids=written)
@pytest.mark.parametrize("control", CONTROLS, ids=written)
def test_controls_equal_the_reference(control: dict[str, Any], route: dict[str, Any], share_blocks: bool) -> None:
    agree(SignalConfig("information_gain", weight=1.0, **control, **route), share_blocks, step=3, seed=5)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The true tokens that the signal `watcher` was shown, reading after reading: one function, one registry line."""
    seen: list[Tensor] = []

    def watcher(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.clone())
        return logits.logsumexp(1)

    monkeypatch.setattr(functions, "watcher", watcher, raising=False)
    monkeypatch.setitem(SIGNALS, "watcher", Signal("watcher", "LSE(z)", "this test", uses_truth=True))
    return seen


def positions_read(seen: list[Tensor], judge: int, positions: float, **keys: int) -> Tensor:
    """The flat positions that a judge reads, sorted, told by their targets."""
    seen.clear()
    backward(build(), *text(), SignalConfig("watcher", layers=(judge,), positions=positions), **keys)
    _, targets = text()
    return torch.cat([(targets.flatten() == y).nonzero()[:, 0] for y in torch.cat(seen)]).sort().values


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.4, 2), (0.5, 2), (0.7, 4), (0.99, 5), (1.0, 5)])
def test_each_sequence_reads_its_share_without_replacement(watched: list[Tensor], share: float, count: int) -> None:
    for judge in (1, 3):
        rows = positions_read(watched, judge, share)
        assert len(set(rows.tolist())) == len(rows) == B * count
        assert torch.bincount(rows // T, minlength=B).tolist() == [count] * B


def test_positions_are_drawn_anew_for_step_seed_sequence_and_judge(watched: list[Tensor]) -> None:
    def drawn(judge: int = 1, **keys: int) -> list[list[int]]:
        """By sequence."""
        rows = positions_read(watched, judge, 0.4, **keys)
        return [(rows[rows // T == b] % T).tolist() for b in range(B)]

    assert drawn() == drawn()
    by_step = [drawn(step=step) for step in range(8)]
    assert len({str(rows) for rows in by_step}) > 4
    assert any(rows[0] != rows[1] for rows in by_step), "every sequence of a batch draws the same positions"
    assert any(drawn(seed=seed) != drawn() for seed in range(1, 4))
    assert any(drawn(judge=2, step=step) != by_step[step] for step in range(4))
    assert drawn(first_sequence=1)[:2] == drawn()[1:], "positions follow the sequence's place in the update"


def test_every_position_is_drawn_equally_often(watched: list[Tensor]) -> None:
    steps = 60
    counts = sum(torch.bincount(positions_read(watched, 2, 0.4, step=step) % T, minlength=T) for step in range(steps))
    expected = steps * B * 0.4
    assert isinstance(counts, Tensor)
    assert ((counts - expected).abs() < 5 * (expected * 0.6) ** 0.5).all(), counts


@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("route", ROUTES, ids=written)
@pytest.mark.parametrize("name", ["self_distillation"])
def test_some_positions_equal_the_reference(
    watched: list[Tensor], name: str, route: dict[str, Any], share_blocks: bool
) -> None:
    keys = {"step": 4, "seed": 2, "first_sequence": 8}
    rows = {judge: positions_read(watched, judge, 0.6, **keys) for judge in range(1, L)}
    agree(SignalConfig(name=name, positions=0.6, **route), share_blocks, rows, **keys)


MIXED = [
    {"layers": (3, 1), "weight": 1.5, "start": 2, "anneal": 9, "threshold": 0.1, "positions": 0.6},
    {"layers": (2, 3), "evaluator": "live", "reach": "local", "weight": 0.7, "positions": 0.4, "threshold": 0.05},
    {"layers": "rotate", "embeddings": False, "evaluator": "live", "control": "placebo", "threshold": 0.1},
    {"layers": (3, 2), "positions": 0.6, "control": "shuffled", "anneal": 20, "threshold": 0.1},
    {"positions": 0.6, "reach": "local", "control": "flipped", "flip": 0.6, "threshold": 0.1},
    {"evaluator": "live", "positions": 0.6, "control": "flipped", "flip_to": "argmax", "flip": 0.6, "threshold": 0.1},
]


@pytest.mark.parametrize("options", MIXED, ids=written)
@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_every_signal_with_options_that_are_mixed_equals_the_reference(
    watched: list[Tensor], name: str, options: dict[str, Any]
) -> None:
    data = foreseen(False) if name == "verified_confidence" else None
    keys, rows, positions = {"step": 4, "seed": 2}, None, options.get("positions")
    if positions:
        rows = {judge: positions_read(watched, judge, positions, **keys) for judge in range(1, L)}
    agree(SignalConfig(name=name, **options), False, rows, data, **keys)


def test_rotating_judges_average_to_all_of_them() -> None:
    """Exactly: the mean over one step that draws each judge is the gradient with all."""
    rotating = SignalConfig("confidence", layers="rotate")
    steps = {rotating.judges_at(step, L, seed=3)[0][0]: step for step in range(40)}
    assert set(steps) == {1, 2, 3}
    drawn = [found(rotating, step=step, seed=3)[0] for step in steps.values()]
    everyone, _ = found(SignalConfig("confidence"))
    assert furthest({name: sum(g[name] for g in drawn) / 3 for name in everyone}, everyone) < 1e-12  # type: ignore
    assert furthest(drawn[0], everyone) > 1e-3


def test_sampled_positions_average_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: the mean over every pair of positions that could be drawn is the gradient with all."""
    sampled, drawn = SignalConfig("confidence", positions=0.4), []
    for pair in combinations(range(T), 2):
        order = np.array([*pair, *(i for i in range(T) if i not in pair)])
        monkeypatch.setattr(block_loss, "permutation", lambda *key, order=order: order)
        drawn.append(found(sampled)[0])
    everyone, _ = found(SignalConfig("confidence"))
    mean = {name: sum(g[name] for g in drawn) / len(drawn) for name in everyone}
    assert furthest(mean, everyone) < 1e-12  # type: ignore[arg-type]
    assert furthest(drawn[0], everyone) > 1e-3


@pytest.mark.fault(number=20)
@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_at_weight_zero_a_signal_is_bit_identical_to_none(name: str, share_blocks: bool) -> None:
    plain, true = found(None, share_blocks)
    silent = {
        "weight": SignalConfig(name, weight=0.0),
        "before start": SignalConfig(name, start=6),
        "after anneal": SignalConfig(name, start=1, anneal=4),
        "live": SignalConfig(name, weight=0.0, evaluator="live", embeddings=False, layers="rotate", positions=0.5),
    }
    for why, config in silent.items():
        ours, losses = found(config, share_blocks, step=5)
        assert all(torch.equal(ours[n], plain[n]) for n in plain), why
        assert torch.equal(losses.loss, true.loss)
        assert losses.signal_loss.item() == 0.0
        assert losses.by_judge == ()


def test_the_true_loss_alone_is_autograds() -> None:
    model, (tokens, targets) = build(), text()
    loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    ours, losses = found(None)
    assert furthest(ours, gradients(model)) < 1e-13
    assert losses.loss.item() == pytest.approx(loss.item(), rel=1e-14)


def test_a_frozen_judge_learns_nothing_of_its_own_verdict() -> None:
    """Judge 3 alone moves blocks 1 and 2 and the embeddings; with local reach, block 2 alone."""
    plain, _ = found(None)

    def moved(**options: Any) -> set[str]:
        ours, _ = found(SignalConfig("confidence", layers=(3,), **options))
        changed = {name for name in plain if (ours[name] - plain[name]).abs().max() > 1e-12}
        return {name.removeprefix("transformer.").rsplit(".", 1)[0].split(".ln_")[0].split(".attn")[0].split(".mlp")[0]
                for name in changed}  # fmt: skip

    assert moved() == {"h.0", "h.1", "wte", "wpe"}
    assert moved(embeddings=False) == {"h.0", "h.1"}
    assert moved(reach="local") == {"h.1"}
    assert moved(evaluator="live") == {"h.0", "h.1", "h.2", "wte", "wpe", "ln_f"}
    assert moved(evaluator="live", reach="local") == {"h.1", "h.2", "wte", "ln_f"}


def halves(config: SignalConfig, model: GPT, **keys: int) -> Losses:
    """The four sequences of `doubled` text in micro-batches of 1 and 3, each weighted by its share of the tokens."""
    tokens, targets = (torch.cat([t, t[:1]]) for t in text())
    total: dict[str, Tensor] = {}
    signal_loss, loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for first, last in ((0, 1), (1, 4)):
        model.zero_grad()
        losses = backward(model, tokens[first:last], targets[first:last], config, first_sequence=first, **keys)
        share = (last - first) / 4
        loss, signal_loss = loss + share * losses.loss, signal_loss + share * losses.signal_loss
        for name, g in gradients(model).items():
            total[name] = total.get(name, 0) + share * g
    for name, p in model.named_parameters():
        p.grad = total[name]
    return Losses(loss, signal_loss)


@pytest.mark.parametrize(
    "options", [{}, {"positions": 0.4}, {"layers": "rotate"}, {"evaluator": "live", "positions": 0.6}], ids=str
)
@pytest.mark.parametrize("name", ["confidence", "advantage", "brier"])
def test_micro_batches_give_what_the_whole_batch_gives(name: str, options: dict[str, Any]) -> None:
    config, keys = SignalConfig(name, **options), {"step": 2, "seed": 7}
    whole, cut = build(), build()
    expected = backward(whole, *(torch.cat([t, t[:1]]) for t in text()), config, **keys)
    losses = halves(config, cut, **keys)
    assert furthest(gradients(cut), gradients(whole)) < 1e-12
    assert losses.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert losses.signal_loss.item() == pytest.approx(expected.signal_loss.item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"embeddings": False}, {"evaluator": "live"}], ids=str)
@pytest.mark.parametrize("share_blocks", [False, True], ids=["distinct", "shared"])
def test_gradients_accumulate(share_blocks: bool, options: dict[str, Any]) -> None:
    config, model = SignalConfig("confidence", **options), build(share_blocks)
    once, _ = found(config, share_blocks)
    for _ in range(2):
        backward(model, *text(), config)
    assert furthest(gradients(model), {name: 2 * g for name, g in once.items()}) < 1e-12


def test_the_losses_say_what_every_judge_found() -> None:
    _, losses = found(SignalConfig("brier", weight=0.5))
    model, (tokens, targets) = build(), text()
    with torch.no_grad():
        means = [
            SIGNALS["brier"](model.read(h).flatten(0, 1), targets.flatten()).mean().item()
            for h in model.hidden_states(tokens)[1:-1]
        ]
    assert [losses.by_judge[0][j].item() for j in (1, 2, 3)] == pytest.approx(means)
    assert losses.signal_loss.item() == pytest.approx(0.5 * sum(means))
    assert not losses.loss.requires_grad


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_bfloat16_matmuls_are_close_to_float32(name: str) -> None:
    """In the whole gradient's length; small weights, so that no argmax or gate hangs by a rounding."""
    exact, rough = (GPT(replace(SIZE, n_embd=32), seed=2) for _ in range(2))
    config = SignalConfig(name, threshold=0.01)
    expected = backward(exact, *text(), config)
    losses = backward(rough, *text(), config, autocast=torch.bfloat16)
    assert losses.loss.item() == pytest.approx(expected.loss.item(), rel=2e-3)
    a, b = (torch.cat([g.flatten() for g in gradients(model).values()]) for model in (rough, exact))
    assert a.dtype == torch.float32
    assert 0 < ((a - b).norm() / b.norm()).item() < 0.1


@pytest.mark.parametrize("place", ["tokens", "targets"])
@pytest.mark.parametrize("token", [V, -1])
def test_a_token_without_a_row_is_refused(place: str, token: int) -> None:
    tokens, targets = text()
    (tokens if place == "tokens" else targets)[1, 2] = token
    model = build()
    with pytest.raises(DataError, match=rf"expected ids from 0 to {V - 1}, found {token};"):
        backward(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most block_size 6 tokens at once, found 7"):
        backward(build(), torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long))


def test_a_judge_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="judges 1 to 3"):
        backward(build(), *text(), SignalConfig("confidence", layers=(4,)))


@pytest.fixture
def global_generators() -> Iterator[None]:
    """Checks that torch's global generator stands where it stood."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("global_generators")
def test_no_draw_touches_the_global_generator() -> None:
    found(SignalConfig("confidence", layers="rotate", positions=0.5), step=1, seed=2)
