"""One update: the same for any cut and number of ranks, clipped, stopped where not finite; its rate, decay and Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import COPIED, outcomes
from scripts import run_ranks
from small_run import SEQUENCES, WINDOWS, Run, T, make_run
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.distributed import World
from gptlab.errors import DivergedError
from gptlab.model import GPT, GPTConfig
from gptlab.model.fast_cpu import WorkingLinear, replace_linears
from gptlab.randomness import torch_generator
from gptlab.signals import SIGNALS, Signal, SignalConfig, functions
from gptlab.training import TrainingConfig
from gptlab.training.block_graph import Batch
from gptlab.training.loop import measures_dose
from gptlab.training.optimizer import AdamStep, build_optimizer
from gptlab.training.step import Update, learning_rate_at, update

Gradients = dict[str, Tensor]

SIGNALS_TRIED: dict[str, dict[str, Any]] = {
    "baseline": {},
    "confidence": {"signal": SignalConfig("confidence")},
    "live, some positions": {"signal": SignalConfig("advantage", evaluator="live", positions=0.5)},
    "placebo": {"signal": SignalConfig("brier", control="placebo")},
    "two": {"signal": SignalConfig("confidence"), "also": (SignalConfig("entropy", layers="rotate"),)},
    "dropout": {"signal": SignalConfig("confidence"), "dropout": 0.4},
}


def length(gradients: Gradients) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum() ** 0.5)


def minus(a: Gradients, b: Gradients) -> Gradients:
    return {name: a[name] - b[name] for name in b}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-5), ({"autocast": torch.bfloat16}, 1e-4), ({"dtype": torch.float64}, 1e-12)],
    ids=["fp32", "bf16", "fp64"],
)
@pytest.mark.parametrize("tried", sorted(SIGNALS_TRIED))
def test_an_update_is_the_same_however_it_is_cut(tried: str, options: dict[str, Any], tolerance: float) -> None:
    options = {"dtype": torch.float32, "sure": False, **options, **SIGNALS_TRIED[tried]}
    whole = make_run(**options)
    expected = whole.update()
    for cut in ((6, 6), (5, 4, 3)):
        run = make_run(**options)
        done = run.update(cut)
        assert done.loss == pytest.approx(expected.loss, rel=tolerance)
        assert done.signal_loss == pytest.approx(expected.signal_loss, rel=tolerance, abs=tolerance)
        assert done.grad_norm == pytest.approx(expected.grad_norm, rel=100 * tolerance)
        assert run.state.step == 1


def test_an_update_is_adamws_own_step_with_that_gradient() -> None:
    run, twin = (make_run(signal=SignalConfig("confidence"), grad_clip=0.1, learning_rate=0.01) for _ in range(2))
    for _ in range(2):
        gradient = run.gradient((5, 7))
        assert length(gradient) == pytest.approx(0.1)
        for name, p in twin.state.model.named_parameters():
            p.grad = gradient[name]
        twin.state.optimizer.step()
        twin.state.step += 1
    for name, p in twin.weights.items():
        assert torch.equal(run.weights[name], p)


def test_dropout_leaves_out_of_the_residual_stream_what_its_keys_say() -> None:
    share = 0.25
    run = make_run(dropout=share, seed=5)
    model, windows = run.state.model, run.text[:SEQUENCES]
    tokens, targets = windows[:, :-1], windows[:, 1:]

    def factors(places: int, j: int) -> Tensor:  # (places, B, T, C)
        drawn = [torch.rand(places, T, 16, generator=torch_generator("dropout", 5, 0, b, j)) for b in range(SEQUENCES)]
        return torch.stack([(one >= share) / (1 - share) for one in drawn], 1)

    h = model.embed(tokens) * factors(1, 0)[0]
    for j, block in enumerate(model.blocks, 1):
        attention, mlp = factors(2, j)
        h = h + attention * block.attn(block.ln_1(h))
        h = h + mlp * block.mlp(block.ln_2(h))
    loss = cross_entropy(model.read(h).flatten(0, 1), targets.flatten())
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    done = run.update((5, 7))
    assert done.loss == pytest.approx(loss.item(), rel=1e-7)
    for name, p in make_run(dropout=share, seed=5).gradient((5, 7)).items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-12)
    assert 0.2 < float((factors(2, 1) == 0).double().mean()) < 0.3
    signal = SignalConfig("confidence", evaluator="live")
    kept, again = (make_run(dropout=share, signal=signal, activation_checkpointing=a).gradient() for a in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept), "blocks run again leave out the same"


def test_a_gradient_is_clipped_over_all_parameters_and_the_clipped_are_counted() -> None:
    free, clipped = make_run(), make_run(grad_clip=0.5)
    expected, found = free.gradient(), clipped.gradient()
    assert length(expected) > 0.6
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g * 0.5 / length(expected), rtol=1e-9, atol=1e-12)
    done = clipped.update()
    assert done.clipped
    assert done.grad_norm > 0.5, "the length before clipping"
    assert (free.state.clipped, clipped.state.clipped) == (0, 2)
    loose = make_run(grad_clip=1e6)
    assert not loose.update().clipped
    assert loose.state.clipped == 0


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal `broken`, whose first value of a reading is not finite."""

    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        values = logits.logsumexp(1)
        return torch.cat([values[:1] / 0.0, values[1:]])

    monkeypatch.setattr(functions, "broken", broken, raising=False)
    monkeypatch.setitem(SIGNALS, "broken", Signal("broken", "LSE(z)/0", "this test"))


def break_weights(name: str) -> Callable[[Run], None]:
    def action(run: Run) -> None:
        with torch.no_grad():
            dict(run.state.model.named_parameters())[name][0] = torch.nan

    return action


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("signal", "breaks", "message"),
    [
        ({"name": "broken", "layers": (2,)}, None, r"the signal broken of judge 2 \(block 2\) is not finite"),
        ({"name": "broken", "layers": (3,), "control": "placebo"}, None, "the signal broken of judge 3"),
        ({}, break_weights("transformer.h.1.mlp.c_fc.bias"),
         r"the true loss is not finite, first in the output of block 2 \(transformer\.h\.1\)"),
        ({"name": "confidence"}, break_weights("transformer.h.2.mlp.c_fc.bias"),
         r"the signal confidence of judge 3 .* first in the output of block 3"),
        ({"name": "confidence"}, break_weights("transformer.wpe.weight"), "first in the embeddings"),
        ({"name": "confidence", "weight": 1e308}, None, "the gradient is not finite"),
    ],
    ids=["judge", "placebo", "true loss", "block", "embeddings", "gradient"],
)  # fmt: skip
def test_what_is_not_finite_is_named_before_anything_changes(
    signal: dict[str, Any], breaks: Callable[[Run], None] | None, message: str
) -> None:
    run = make_run(signal=SignalConfig(**signal))
    if breaks:
        breaks(run)
    before = run.weights
    batch = "" if "gradient" in message else "in sequences 0 to 5 of the update"
    with pytest.raises(DivergedError, match=f"diverged at step 0: .*{message}.*{batch}; the weights were not changed"):
        run.update((6, 6))
    assert all(torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, p in run.weights.items())
    assert (run.state.step, len(run.state.optimizer.state)) == (0, 0)


@pytest.mark.parametrize("tried", [name for name in sorted(SIGNALS_TRIED) if name != "baseline"])
def test_measuring_the_dose_leaves_the_trajectory_bit_identical(tried: str) -> None:
    measured, plain = (make_run(dtype=torch.float32, **SIGNALS_TRIED[tried]) for _ in range(2))
    for step in range(4):
        said = [run.update((5, 7), measure_dose=run is measured and step != 2) for run in (measured, plain)]
        assert (said[0].dose is not None) == (step != 2 or tried == "placebo")
        assert (said[0].loss, said[0].grad_norm) == (said[1].loss, said[1].grad_norm)
    assert all(torch.equal(p, plain.weights[name]) for name, p in measured.weights.items())


def parts(run_options: dict[str, Any], signal: SignalConfig, cut: tuple[int, ...] = (6, 6)) -> tuple[float, float]:
    """(|g_CE|, |weighted g_signal|) of the first update, from two runs."""
    plain = make_run(**run_options).gradient(cut)
    return length(plain), length(minus(make_run(**run_options, signal=signal).gradient(cut), plain))


@pytest.mark.parametrize("options", [{}, {"evaluator": "live"}, {"positions": 0.5}, {"control": "placebo"}], ids=str)
def test_the_dose_is_the_ratio_of_the_two_gradients(options: dict[str, Any]) -> None:
    config = SignalConfig("confidence", weight=0.7, **options)
    true, signal = parts({}, config)
    said = make_run(signal=config).update((5, 7), measure_dose=True)
    assert said.dose == pytest.approx(signal / true, rel=1e-9)
    assert (said.doses, said.weights) == ([said.dose], [0.7])


def applied(run: Run) -> float:
    """The dose of the update that comes, made: from the gradient it leaves and the true loss's at the same weights."""
    plain = make_run()
    plain.state.restore(run.weights, {}, {"step": run.state.step})
    true = plain.gradient((6, 6))
    return length(minus(run.gradient((6, 6), measure_dose=True), true)) / length(true)


@pytest.mark.parametrize(
    "options", [{}, {"evaluator": "live"}, {"layers": "rotate"}, {"control": "placebo"}, {"weight": -1.0}], ids=str
)
@pytest.mark.parametrize("dose", [0.02, 0.3, 4.0])
def test_a_dose_that_is_held_is_the_one_of_the_gradient_that_is_made(dose: float, options: dict[str, Any]) -> None:
    run = make_run(signal=SignalConfig("confidence", dose=dose, **options), learning_rate=3e-3)
    for _ in range(3):
        assert applied(run) == pytest.approx(dose, rel=0.001)


def test_a_dose_falls_as_its_signal_is_annealed_and_starts_with_it() -> None:
    signal = SignalConfig("confidence", dose=0.4, start=1, anneal=4)
    run = make_run(signal=signal, learning_rate=3e-3)
    assert [applied(run) for _ in range(7)] == pytest.approx([0, 0.4, 0.3, 0.2, 0.1, 0, 0], abs=1e-4)


def test_a_dose_is_held_in_every_update_whether_or_not_one_is_measured() -> None:
    """So that another dose_every is no other trajectory."""
    often, never = (make_run(signal=SignalConfig("confidence", dose=0.4), learning_rate=3e-3) for _ in range(2))
    for _ in range(4):
        said = [often.update((5, 7), measure_dose=True), never.update((5, 7))]
        assert [u.dose for u in said] == [pytest.approx(0.4)] * 2
        assert said[0] == said[1]
    assert all(torch.equal(p, never.weights[name]) for name, p in often.weights.items())


def test_two_signals_hold_a_dose_each_from_their_first_update_on() -> None:
    late = SignalConfig("negated_cross_entropy", dose=0.1, start=2)
    run = make_run(signal=SignalConfig("confidence", dose=0.4), also=(late,), learning_rate=3e-3)
    said = [run.update() for _ in range(4)]
    assert [u.doses for u in said] == [[pytest.approx(0.4), pytest.approx(d)] for d in (0.0, 0.0, 0.1, 0.1)]
    assert [u.weights[1] > 0 for u in said] == [False, False, True, True]


def test_a_gate_that_lets_nothing_by_keeps_its_weight() -> None:
    run = make_run(signal=SignalConfig("gated_confidence", dose=0.4, threshold=1.0, weight=0.5))
    assert [(u.dose, u.weights) for u in (run.update(), run.update())] == [(0.0, [0.5])] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dose_every": 10, "dose_first": 3}, [0, 1, 2, 10, 20]),
        ({"dose_every": 10, "dose_first": 3, "signal": SignalConfig("entropy", start=7)}, [0, 1, 2, 7, 8, 9, 10, 20]),
        ({"dose_every": 10, "dose_first": 0}, [0, 10, 20]),
        ({"dose_every": 0, "dose_first": 3}, []),
        ({"dose_every": 1000}, list(range(25))),
    ],
)
def test_the_first_updates_measure_doses_one_and_all(options: dict[str, Any], expected: list[int]) -> None:
    config = make_run(**options).config
    assert [step for step in range(25) if measures_dose(config, step)] == expected


def test_signals_add_up_each_with_its_own_weight() -> None:
    one, two = SignalConfig("confidence", weight=0.5), SignalConfig("brier", weight=2.0, embeddings=False)
    base = make_run().gradient()
    both = minus(make_run(signal=one, also=(two,)).gradient((5, 7)), base)
    apart = [minus(make_run(signal=s).gradient(), base) for s in (one, two)]
    for name, g in both.items():
        torch.testing.assert_close(g, apart[0][name] + apart[1][name], rtol=1e-9, atol=1e-12)
    said = make_run(signal=one, also=(two,)).update(measure_dose=True)
    assert said.doses == pytest.approx([length(g) / length(base) for g in apart])
    assert said.dose == pytest.approx(length(both) / length(base))
    assert said.weights == [0.5, 2.0]
    sums = [sum(value for value in judges if value is not None) for judges in said.by_judge]
    assert said.signal_loss == pytest.approx(0.5 * sums[0] + 2.0 * sums[1])


def test_what_judges_found_is_told_by_judge_and_silence_is_not_zero() -> None:
    signals = [SignalConfig("confidence", layers=(3, 1)), SignalConfig("brier", start=5)]
    said = make_run(signal=signals[0], also=(signals[1],)).update()
    everyone = make_run(signal=SignalConfig("confidence")).update()
    one, _, three = everyone.by_judge[0]
    assert said.by_judge == [[pytest.approx(one), None, pytest.approx(three)], [None, None, None]]
    assert said.weights == [0.25, 0.0]


def test_the_signal_loss_of_a_held_dose_is_that_of_the_weight_used() -> None:
    run = make_run(signal=SignalConfig("brier", dose=0.3, layers="rotate"))
    said = run.update(measure_dose=True)
    (value,) = [v for v in said.by_judge[0] if v is not None]
    assert said.signal_loss == pytest.approx(said.weights[0] * 3 * value)


def test_two_ranks_make_what_one_makes(tmp_path: Path) -> None:
    """Real processes over gloo on the loopback: weights and figures of every kind of run, to the last digits."""
    out = tmp_path / "two.pt"
    run_ranks(Path(__file__).with_name("ranks.py"), 2, out)
    found, expected = torch.load(out, weights_only=True), outcomes(World(), (SEQUENCES,))
    assert set(found) == set(COPIED)
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-7, atol=1e-9)
            assert name != "deterministic" or torch.equal(found[name][key], tensor), key
    assert not torch.equal(expected["placebo"]["transformer.wte.weight"], expected["noise"]["transformer.wte.weight"])


SIGNALS_BATCH_PARTS: dict[str, dict[str, Any]] = {
    "confidence": {"signal": SignalConfig("confidence")},
    "live, some positions": {"signal": SignalConfig("advantage", evaluator="live", positions=0.5)},
    "local, embeddings left alone": {"signal": SignalConfig("brier", reach="local", embeddings=False)},
    "shuffled": {"signal": SignalConfig("confidence", control="shuffled")},
    "placebo": {"signal": SignalConfig("brier", control="placebo")},
    "two": {"signal": SignalConfig("confidence"), "also": (SignalConfig("entropy", layers="rotate"),)},
}


def others(run: Run, m: int) -> Iterator[Batch]:
    """Batch m of the signal's own: other windows of the text, with draws of their own."""
    for batch in run.batches((5, 7)):
        rows = [(shard, (window + 7 * (m + 1)) % WINDOWS) for shard, window in batch.names]
        tokens = run.text[[window for _, window in rows]]
        yield replace(batch, tokens=tokens[:, :-1], targets=tokens[:, 1:], windows=rows, step=100 + m)


def made_of(run: Run, batches: list[Batch]) -> tuple[Update, torch.Tensor]:
    """The update and its gradient, flat; gradients are not clipped here."""
    done = update(run.state, run.config, batches, World(), run.compute)
    return done, torch.cat([p.grad.flatten() for p in run.state.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tried", SIGNALS_BATCH_PARTS)
def test_the_parts_of_one_batch_add_up_to_the_whole(tried: str) -> None:
    expected, whole = made_of(run := make_run(**SIGNALS_BATCH_PARTS[tried]), list(run.batches()))
    run = make_run(**SIGNALS_BATCH_PARTS[tried])
    batches = list(run.batches((4, 8)))
    parts = [replace(b, part="true loss") for b in batches] + [replace(b, part="signals") for b in batches]
    done, found = made_of(run, parts)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
    assert done.loss == pytest.approx(expected.loss, rel=1e-12)
    assert done.signal_loss == pytest.approx(expected.signal_loss, rel=1e-12)
    for ours, theirs in zip(done.by_judge, expected.by_judge, strict=True):
        assert [x is None for x in ours] == [x is None for x in theirs]
        assert [x or 0.0 for x in ours] == pytest.approx([x or 0.0 for x in theirs], rel=1e-12)


@pytest.mark.parametrize("tried", [name for name in SIGNALS_BATCH_PARTS if name != "placebo"])
def test_a_signal_is_averaged_over_batches_of_its_own(tried: str) -> None:
    """The gradient is the true loss's on one batch and the mean of the signals' on three others."""
    run = make_run()
    true, gradient = made_of(run, list(run.batches()))
    signal_loss = 0.0
    for m in range(3):
        plain, without = made_of(run := make_run(), list(others(run, m)))
        whole, with_signals = made_of(run := make_run(**SIGNALS_BATCH_PARTS[tried]), list(others(run, m)))
        gradient = gradient + (with_signals - without) / 3
        signal_loss += whole.signal_loss / 3
        assert whole.loss == plain.loss
    run = make_run(**SIGNALS_BATCH_PARTS[tried])
    parts = [replace(b, part="true loss") for b in run.batches()]
    parts += [replace(b, part="signals", share=b.share / 3) for m in range(3) for b in others(run, m)]
    done, found = made_of(run, parts)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
    assert done.loss == pytest.approx(true.loss, rel=1e-12)
    assert done.signal_loss == pytest.approx(signal_loss, rel=1e-12)


def test_a_placebo_is_as_long_as_its_signals_average() -> None:
    lengths = []
    for control in ("none", "placebo"):
        run = make_run(signal=SignalConfig("brier", control=control))
        parts = [replace(b, part="true loss", share=1e-9) for b in run.batches()]
        parts += [replace(b, part="signals", share=b.share / 3) for m in range(3) for b in others(run, m)]
        lengths.append(made_of(run, parts)[1].norm().item())
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-6)
    assert lengths[0] > 0.01


def test_all_judges_that_spoke_in_some_batch_are_reported() -> None:
    run = make_run(signal=SignalConfig("confidence", layers="rotate"))
    parts = [replace(b, part="true loss") for b in run.batches()]
    parts += [replace(b, part="signals", share=b.share / 9) for m in range(9) for b in others(run, m)]
    done, _ = made_of(run, parts)
    assert all(value is not None for value in done.by_judge[0])


# The learning rate, what decays, and the step itself.


def rates(**options: Any) -> list[float]:
    config = TrainingConfig(**{"learning_rate": 1.0, "min_lr": 0.1, "warmup_steps": 4, "steps": 14, **options})
    return [learning_rate_at(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule, steps=40)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(schedule=schedule, warmup_steps=0, steps=40)[0] == 1.0
    assert rates(schedule=schedule, warmup_steps=50, steps=5) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_cosine_falls_to_the_lowest_at_the_end() -> None:
    falling = rates(schedule="cosine")[4:]
    assert falling == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])
    assert falling[5] == pytest.approx(0.55), "half way it is the mean of both"
    config = TrainingConfig(learning_rate=1.0, warmup_steps=4, steps=14)
    assert learning_rate_at(14, config) == pytest.approx(0.1), "a tenth of the peak, unless said"


def test_wsd_stays_and_falls_linearly_over_the_last_fifth() -> None:
    found = rates(schedule="wsd", steps=20)
    assert found[4:17] == [1.0] * 13
    assert found[16:] == pytest.approx([1.0, 0.775, 0.55, 0.325])


def test_constant_stays() -> None:
    assert rates(schedule="constant")[4:] == [1.0] * 10


def test_matrices_and_embeddings_decay_and_nothing_else() -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=2, n_head=1, n_embd=4))
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3, beta1=0.8, beta2=0.99))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name
    assert all(group["betas"] == (0.8, 0.99) for group in optimizer.param_groups)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.5, 100.0])
def test_a_change_beyond_reach_is_met_as_far_as_it_can_be_by_no_larger_norm_than_that_takes(
    clip: float, share: float
) -> None:
    """share: of the largest change that any factor makes. Beyond 1 the factor stays where 99% of it is reached."""
    model = GPT(GPTConfig(16, 16, 2, 2, 16))
    optimizer = build_optimizer(model, TrainingConfig())
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    gradient, added = ([torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(2))
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    optimizer.step()
    step = AdamStep(parameters, optimizer, clip)

    def change(factor: float) -> float:
        return step.effect(gradient, [factor * a for a in added])[0]

    largest = change(2.0**30)
    factor = step.factor_for(share * largest, gradient, added)
    assert change(factor) == pytest.approx(min(share, 0.99) * largest, rel=1e-3)
    assert factor < 1e4


RATE = 0.01


def is_matrix_within(name: str) -> bool:
    return name.startswith("transformer.h.") and name.endswith("weight") and ".ln_" not in name


def test_a_matrix_moves_by_a_nearly_orthogonal_one_of_its_gradients_directions() -> None:
    """The first update of momentum is the gradient's: its singular values become about 1, times 0.2·sqrt(max(A, B))."""
    run = make_run(optimizer="muon", learning_rate=RATE, weight_decay=0.0)
    before = run.weights
    gradient = run.gradient()
    seen = 0
    for name in filter(is_matrix_within, before):
        U, S, Vh = torch.linalg.svd(gradient[name], full_matrices=False)
        strong = 0.02 * S.square().sum().sqrt() < S  # five steps multiply a small singular value by 480
        scale = RATE * 0.2 * math.sqrt(max(before[name].shape))
        turned = U.T @ (before[name] - run.weights[name]) @ Vh.T / scale
        values = turned.diagonal()
        assert values[strong].min() > 0.6, name
        assert values.max() < 1.3, name
        assert (turned - values.diag())[strong][:, strong].abs().max() < 0.05, name
        assert strong.sum() >= 4, name
        seen += 1
    assert seen == 4 * 4


@pytest.mark.parametrize("share_blocks", [False, True])
def test_everything_else_is_adamws_and_each_parameter_is_in_one_group(share_blocks: bool) -> None:
    runs = {name: make_run(optimizer=name, share_blocks=share_blocks, weight_decay=0.3) for name in ("muon", "adamw")}
    for run in runs.values():
        run.update()
    for name, p in runs["muon"].weights.items():
        assert torch.equal(p, runs["adamw"].weights[name]) != is_matrix_within(name), name
    state = runs["muon"].state
    groups = state.optimizer.param_groups
    decay = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(dict(decay)) == len(decay) == len(list(state.model.parameters()))
    for name, p in state.model.named_parameters():
        assert dict(decay)[id(p)] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name
        kept = {"momentum_buffer"} if is_matrix_within(name) else {"exp_avg", "exp_avg_sq", "step"}
        assert state.optimizer.state[p].keys() == kept, name
    assert {group["lr"] for group in groups} == {runs["adamw"].state.optimizer.param_groups[0]["lr"]}


def test_working_copies_follow_muons_step() -> None:
    run = make_run(optimizer="muon", dtype=torch.float32, autocast=torch.bfloat16, learning_rate=RATE)
    replace_linears(run.state.model, torch.bfloat16)
    layers = [module for module in run.state.model.modules() if isinstance(module, WorkingLinear)]
    before = [layer.operands(torch.bfloat16)[0].clone() for layer in layers]
    run.update()
    for layer, old in zip(layers, before, strict=True):
        copy, _ = layer.operands(torch.bfloat16)
        assert torch.equal(copy, layer.weight.bfloat16())
        assert not torch.equal(copy, old)
