"""Controls: what turns a signal into its own placebo, and the true loss into a known amount of error or noise."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from small_run import SEQUENCES, WINDOWS, Run, T, V, make_run, noise_rows
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.errors import ConfigError
from gptlab.randomness import torch_generator
from gptlab.signals import SIGNALS, Signal, SignalConfig, functions
from gptlab.training import controls
from gptlab.training.block_graph import active_signals
from gptlab.training.block_loss import accumulate
from gptlab.training.controls import flipped, named, permuted, rotated, rotation, shuffled
from gptlab.training.gradient_sources import GradientSources
from gptlab.training.parallel import global_norm

Gradients = dict[str, Tensor]

CUTS = [(12,), (3, 4, 5), (1,) * 12]


def length(gradients: Gradients) -> float:
    return float(torch.stack([g.square().sum() for g in gradients.values()]).sum() ** 0.5)


def minus(a: Gradients, b: Gradients) -> Gradients:
    return {name: a[name] - b[name] for name in b}


def cosine(a: Gradients, b: Gradients) -> float:
    inner = torch.stack([(a[name] * b[name]).sum() for name in b]).sum()
    return float(inner) / length(a) / length(b)


def of_signal(cut: tuple[int, ...] = (12,), seed: int = 1, step: int = 0, **options: Any) -> Gradients:
    """The signal's own gradient in an update: what it adds to the true loss's."""
    run, plain = (make_run(seed=seed, signal=s) for s in (SignalConfig(**options), SignalConfig()))
    run.state.step = plain.state.step = step
    return minus(run.gradient(cut), plain.gradient(cut))


def test_noise_is_drawn_where_the_gradient_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of millions of numbers are not to come from the host; a CPU's own are what they always were."""
    asked: list[str] = []
    monkeypatch.setattr(controls, "torch_generator", lambda *key, device: asked.append(device))
    controls.add_drawn({"weight": torch.zeros(3, 2, device="meta")}, 1.0, "gradient noise", 1, 0)
    assert asked == ["meta"]
    monkeypatch.undo()
    gradient = torch.zeros(2, 3)
    controls.add_drawn({"weight": gradient}, 6**0.5, "gradient noise", 1, 0)
    drawn = torch.randn(2, 3, generator=torch_generator("gradient noise", 1, 0, "weight"))
    assert torch.equal(gradient, drawn)


def test_rotations_are_orthogonal_and_fixed_for_seed_and_judge() -> None:
    one = rotation(12, 3, 1)
    torch.testing.assert_close(one @ one.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    rotation.cache_clear()
    assert torch.equal(one, rotation(12, 3, 1))
    assert torch.equal(one, rotation(12, 3, 1, 0))
    others = [rotation(12, 3, 2), rotation(12, 4, 1), rotation(12, 3, 1, 1), rotation(12, 3, 1, 2)]
    assert all((one - other).norm() > 1 for other in others)


def test_rotations_favour_no_direction() -> None:
    """Uniform over the orthogonal group: every entry has mean 0 and variance 1/C, and both determinants occur."""
    drawn = torch.stack([rotation(5, seed, 1) for seed in range(600)])
    assert (drawn.mean(0).abs() < 5 * (1 / 5 / 600) ** 0.5).all()
    assert ((drawn.square().mean(0) - 1 / 5).abs() < 5 * (0.06 / 600) ** 0.5).all()
    assert 200 < int((torch.linalg.det(drawn) > 0).sum()) < 400


def test_a_rotated_gradient_is_as_coherent_and_every_token_turned_alike() -> None:
    g = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotated(g, 3, 1)
    a, b = g.flatten(0, 1), turned.flatten(0, 1)
    torch.testing.assert_close(b @ b.T, a @ a.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rotated(g[:1], 3, 1), turned[:1])
    assert (a - b).norm() > a.norm()


ROUTES = [
    {},
    {"evaluator": "live"},
    {"evaluator": "live", "reach": "local", "positions": 0.5},
    {"reach": "local", "layers": (3, 1)},
    {"embeddings": False, "layers": "rotate"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {"threshold": 0.05}) for name in sorted(SIGNALS)), *(("confidence", route) for route in ROUTES)],
    ids=str,
)
def test_a_placebo_is_as_long_as_its_signal_on_the_total_batch(name: str, options: dict[str, Any]) -> None:
    """Over all parameters and micro-batches; it differs from its signal in direction alone."""
    signal = of_signal(name=name, **options)
    assert length(signal) > 1e-3, "the signal is silent"
    cuts = CUTS if options in ROUTES else CUTS[1:2]
    placebos = [of_signal(cut, name=name, control="placebo", **options) for cut in cuts]
    for placebo in placebos:
        assert length(placebo) == pytest.approx(length(signal), rel=1e-9)
        assert abs(cosine(placebo, signal)) < 0.75
        assert length(minus(placebo, placebos[0])) < 1e-12 * length(signal)


def test_a_placebo_must_be_scaled_to_be_as_long() -> None:
    """What the test above would show without the scaling: a rotation alone reaches the weights at another length."""
    run = make_run(signal=SignalConfig("confidence", control="placebo"))
    sources = GradientSources(run.state.model, active_signals(run.config.signals, [0.25]), seed=1)
    for batch in run.batches():
        accumulate(run.state.model, batch, sources.signals, into=sources.into)
    assert abs(global_norm(sources.placebos[0]) / global_norm(sources.taught[0]) - 1) > 0.05


def test_a_placebos_direction_is_fixed_for_the_run_and_another_for_every_seed() -> None:
    def placebo(**options: Any) -> Gradients:
        return of_signal(name="confidence", control="placebo", **options)

    once = placebo()
    assert all(torch.equal(g, placebo()[name]) for name, g in once.items())
    assert length(minus(placebo(step=3), once)) < 1e-12 * length(once), "the same windows come again in step 3"
    assert length(minus(placebo(step=1), once)) > 0.1 * length(once)
    assert length(minus(placebo(seed=2), once)) > 0.1 * length(once)


@pytest.mark.parametrize("evaluator", ["frozen", "live"])
def test_each_rotation_is_another_placebo_of_one_norm_and_0_is_the_one_there_always_was(evaluator: Any) -> None:
    options: dict[str, Any] = {"name": "confidence", "control": "placebo", "evaluator": evaluator}
    first, *others = (of_signal(rotation=which, **options) for which in (0, 1, 2))
    assert all(torch.equal(g, first[name]) for name, g in of_signal(**options).items())
    assert all(length(other) == pytest.approx(length(first), rel=1e-9) for other in others)
    assert all(length(minus(other, first)) > 0.1 * length(first) for other in others)
    assert length(minus(*others)) > 0.1 * length(first)


REPLAYS = ({"match": "gradient"}, {"match": "gradient", "dose": 0.5}, {"match": "update"})


@pytest.mark.parametrize("options", REPLAYS, ids=str)
def test_a_placebo_replays_its_arms_norms_while_their_models_part(options: dict[str, Any]) -> None:
    """Scaled on its own model it strays, already in the first updates."""
    match, dose = options["match"], options.get("dose")
    name = "signal_norm" if match == "gradient" else "step_change"
    run: dict[str, Any] = {"grad_clip": 1.0, "learning_rate": 0.02}
    arm = make_run(signal=SignalConfig("confidence", dose=dose), **run)
    own = make_run(signal=SignalConfig("confidence", dose=dose, control="placebo"), **run)
    replaying = SignalConfig("confidence", dose=dose, control="placebo", placebo_of="arm", placebo_match=match)
    placebo = make_run(signal=replaying, **run)
    strayed = []
    for _ in range(8):
        wanted = getattr(arm.update(measure_dose=True), name)
        assert getattr(placebo.update((5, 7), replayed=wanted), name) == pytest.approx(wanted, rel=2e-3)
        strayed.append(abs(getattr(own.update(), name) / wanted - 1))
    assert max(strayed) > 0.02


def test_what_a_signal_changes_in_adams_step_is_the_difference_of_two_real_steps() -> None:
    """Of the very optimizer, with clipping, in the fourth update."""
    options: dict[str, Any] = {"grad_clip": 0.5, "weight_decay": 0.0, "learning_rate": 0.01}
    moves = {}
    for weight in (0.0, 0.25):
        run = make_run(signal=SignalConfig("confidence", weight=0.0), **options)
        for _ in range(3):
            run.update()
        run.config = dataclasses.replace(run.config, signal=SignalConfig("confidence", weight=weight))
        before, done = run.weights, run.update(measure_dose=True)
        assert done.clipped
        moves[weight] = {name: (p - before[name]) / done.learning_rate for name, p in run.weights.items()}
    changed = length(minus(moves[0.25], moves[0.0]))
    assert done.step_change == pytest.approx(changed, rel=1e-6)
    assert done.step_share == pytest.approx(changed / length(moves[0.0]), rel=1e-6)


@pytest.mark.parametrize("shape", ["isotropic", "batch"])
def test_the_share_of_adams_step_that_noise_changes_is_that_of_two_real_steps(shape: Any) -> None:
    options: dict[str, Any] = {"grad_clip": 0.5, "weight_decay": 0.0, "learning_rate": 0.01}
    moves = {}
    for noise in (0.0, 0.5):
        run = make_run(**options)
        for _ in range(3):
            run.update()
        run.config = dataclasses.replace(run.config, gradient_noise=noise, gradient_noise_shape=shape)
        before, done = run.weights, run.update(measure_dose=True)
        moves[noise] = {name: (p - before[name]) / done.learning_rate for name, p in run.weights.items()}
    assert done.noise_step_share == pytest.approx(length(minus(moves[0.5], moves[0.0])) / length(moves[0.0]), rel=1e-6)
    assert (done.batch_noise is None) == (shape == "isotropic")


def test_a_placebo_has_no_step_of_adam_to_match_under_muon() -> None:
    run = make_run(signal=SignalConfig("confidence"), optimizer="muon")
    done = run.update(measure_dose=True)
    assert (done.step_change, done.step_share) == (None, None)
    assert done.signal_norm
    with pytest.raises(ConfigError, match="placebo_match update compares steps of adamw, found optimizer muon"):
        make_run(
            signal=SignalConfig("brier", control="placebo", placebo_of="x", placebo_match="update"), optimizer="muon"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placebo_of": "run"}, "placebo_of is for signal.control placebo, found control none"),
        (
            {"placebo_of": "run", "control": "shuffled"},
            "placebo_of is for signal.control placebo, found control shuffled",
        ),
        ({"control": "placebo", "placebo_match": "update"}, "add --signal.placebo_of RUN"),
        ({"rotation": 1}, "is for signal.control placebo, found 1 with control none"),
        ({"rotation": 3, "control": "placebo"}, "is 0, 1 or 2, found 3"),
        ({"rotation": -1, "control": "placebo"}, "is 0, 1 or 2, found -1"),
    ],
)
def test_what_only_a_replaying_placebo_has_is_refused_elsewhere(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SignalConfig("brier", **options)


def test_a_live_judges_own_gradient_is_permuted_within_each_parameter() -> None:
    """Judge 3 alone with local reach: block 3, the norm and the head hold nothing but what the judge itself learns."""
    options: dict[str, Any] = {"name": "confidence", "evaluator": "live", "reach": "local", "layers": (3,)}
    signal = of_signal(**options, embeddings=False)
    placebo = of_signal(**options, embeddings=False, control="placebo")
    scales = []
    own = [name for name in signal if name.startswith(("transformer.h.2.", "transformer.ln_f", "transformer.wte"))]
    assert len(own) == 15
    for name in own:
        a, b = signal[name].flatten(), placebo[name].flatten()
        scale = float(b.norm() / a.norm())
        torch.testing.assert_close(b.sort().values, scale * a.sort().values, rtol=1e-6, atol=1e-9)
        assert (b - scale * a).norm() > 0.3 * b.norm(), f"{name} is in its old order"
        scales.append(scale)
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-6)


def test_entries_are_permuted_by_seed_and_parameter() -> None:
    g = torch.arange(24.0).view(4, 6)
    once = permuted(g, 1, "a")
    assert torch.equal(once, permuted(g, 1, "a"))
    assert once.shape == g.shape
    assert once.flatten().sort().values.tolist() == g.flatten().tolist()
    assert not torch.equal(once, permuted(g, 2, "a"))
    assert not torch.equal(once, permuted(g, 1, "b"))
    assert not torch.equal(once, permuted(g, 1, "a", 1))


def test_shuffled_gradients_stay_in_their_sequence() -> None:
    g = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    mixed = shuffled(g, 1, 0, 0, 2)
    for b in range(3):
        order = [int((g[b] == row).all(1).nonzero()) for row in mixed[b]]
        assert sorted(order) == list(range(7))
    assert not torch.equal(mixed, g)
    assert torch.equal(shuffled(g[1:], 1, 0, 1, 2), mixed[1:]), "keyed by the sequence's place in the update"
    for keys in ((2, 0, 0, 2), (1, 1, 0, 2), (1, 0, 1, 2), (1, 0, 0, 3)):
        assert not torch.equal(shuffled(g, *keys), mixed), keys


def test_a_shuffled_lesson_is_the_same_lesson_at_other_positions() -> None:
    """Judge 1 teaches the embeddings alone: the places' gradients are permuted sums, their total is the same."""
    places = "transformer.wpe.weight"
    plain = of_signal(name="confidence", layers=(1,))[places]
    for cut in CUTS:
        mixed = of_signal(cut, name="confidence", layers=(1,), control="shuffled")[places]
        torch.testing.assert_close(mixed.sum(0), plain.sum(0), rtol=1e-9, atol=1e-12)
        assert (mixed - plain).norm() > 0.1 * plain.norm()


Names = list[tuple[int, int]]


def flips(names: Names, share: float = 0.3, seed: int = 1, purpose: str = "flip", size: int = V) -> Tensor:
    true = torch.full((len(names), 50), 4)
    return flipped(true, share, "uniform", size, seed, names, purpose)


def test_the_share_of_flips_is_the_one_asked_for_and_uniform_over_the_other_tokens() -> None:
    names: Names = [(0, n) for n in range(400)]
    wrong = flips(names)
    share, n = float((wrong != 4).double().mean()), 400 * 50
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    counts = np.bincount(wrong[wrong != 4].numpy(), minlength=V)
    assert counts[4] == 0
    expected = counts.sum() / (V - 1)
    chi_square = ((np.delete(counts, 4) - expected) ** 2 / expected).sum()
    assert chi_square < 29 + 5 * (2 * 29) ** 0.5
    assert (flips(names, 0.0) == 4).all()
    assert (flips(names, 1.0) != 4).all()
    by_position = (wrong != 4).double().mean(0)
    assert ((by_position - 0.3).abs() < 5 * (0.3 * 0.7 / 400) ** 0.5).all()


def test_flips_belong_to_seed_window_position_and_purpose() -> None:
    names: Names = [(0, 0), (0, 1), (1, 0)]
    once = flips(names)
    assert torch.equal(once, flips(names))
    assert torch.equal(once[[2, 0]], flips([names[2], names[0]])), "a window's flips go with it into any batch"
    assert len({tuple(row) for row in once.tolist()}) == 3
    assert not torch.equal(once, flips(names, seed=2))
    assert not torch.equal(once, flips(names, purpose="target flip"))
    more = flips(names, 0.6)
    assert torch.equal(more[once != 4], once[once != 4]), "a higher share only adds flips"


def test_shuffled_flips_are_targets_of_other_places_of_the_window() -> None:
    true = torch.tensor([[3, 3, 3, 7] * 100, [5] * 400])
    names: Names = [(0, 0), (0, 1)]
    wrong = flipped(true, 1.0, "shuffled", V, 1, names, "flip")
    assert set(wrong[0].tolist()) == {3, 7}
    assert (wrong[1] == 5).all(), "nothing from another window"
    assert abs(float((wrong[0] == 7).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    some = flipped(true, 0.4, "shuffled", V, 1, names, "flip")
    kept = flipped(torch.full_like(true, 4), 0.4, "uniform", V, 1, names, "flip") == 4
    assert torch.equal(some, torch.where(kept, true, wrong)), "the places that uniform flips take"
    assert torch.equal(flipped(true[1:], 0.4, "shuffled", V, 1, names[1:], "flip"), some[1:])


def test_argmax_flips_name_the_likeliest_wrong_token() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [5.0, 5.0, 9.0]], requires_grad=True)
    marked = torch.tensor([-1 - 0, -1 - 1, 1, -1 - 2])
    assert named(logits, marked).tolist() == [1, 0, 1, 0]
    all_of_them = flipped(torch.tensor([[0, 2]]), 1.0, "argmax", 3, 1, [(0, 0)], "flip")
    assert all_of_them.tolist() == [[-1, -3]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(logits, targets) that the signal `watcher` was shown, reading after reading."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watcher(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((logits.detach().clone(), targets.clone()))
        return logits.logsumexp(1)

    monkeypatch.setattr(functions, "watcher", watcher, raising=False)
    monkeypatch.setitem(SIGNALS, "watcher", Signal("watcher", "LSE(z)", "this test", uses_truth=True))
    return seen


def shown(seen: list[tuple[Tensor, Tensor]], run: Run, cut: tuple[int, ...] = (12,)) -> Tensor:
    """The targets (SEQUENCES, T) that judge 2 was shown in the run's next update."""
    seen.clear()
    run.update(cut)
    return torch.cat([y for _, y in seen]).view(SEQUENCES, T)


def test_a_flipped_signal_sees_the_same_wrong_targets_in_every_epoch_and_cut(
    watched: list[tuple[Tensor, Tensor]],
) -> None:
    run = make_run(signal=SignalConfig("watcher", layers=(2,), control="flipped", flip=0.4))
    epochs = [torch.cat([shown(watched, run, cut) for _ in range(WINDOWS // SEQUENCES)]) for cut in CUTS]
    assert torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    wrong = (epochs[0] != run.text[:, 1:]).double().mean()
    assert abs(float(wrong) - 0.4) < 4 * (0.4 * 0.6 / (WINDOWS * T)) ** 0.5


def test_what_a_flipped_signal_sees_leaves_the_true_loss_alone(watched: list[tuple[Tensor, Tensor]]) -> None:
    plain = make_run().update()
    flipping = make_run(signal=SignalConfig("watcher", layers=(2,), control="flipped"))
    assert flipping.update().loss == pytest.approx(plain.loss, rel=1e-13)
    logits, targets = watched[0]
    assert (targets.view(SEQUENCES, T) != flipping.text[:SEQUENCES, 1:]).all()
    flipping = make_run(signal=SignalConfig("watcher", layers=(2,), control="flipped", flip_to="argmax"))
    watched.clear()
    flipping.update()
    logits, targets = watched[0]
    true = flipping.text[:SEQUENCES, 1:].flatten()
    best, second = logits.topk(2, 1).indices.unbind(1)
    assert torch.equal(targets, torch.where(best == true, second, best))


@pytest.mark.parametrize("to", ["uniform", "shuffled", "argmax"])
def test_the_true_losss_flips_are_autograds_on_those_targets(to: Any, watched: list[tuple[Tensor, Tensor]]) -> None:
    run = make_run(target_flip=0.3, target_flip_to=to, signal=SignalConfig("watcher", layers=(2,), weight=1e-30))
    (batch,) = run.batches()
    model = run.state.model
    wrong = flipped(batch.targets, 0.3, to, V, 1, batch.names, "target flip").flatten()
    logits = model(batch.tokens).flatten(0, 1)
    loss = cross_entropy(logits, named(logits, wrong))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for cut in CUTS:
        again = make_run(target_flip=0.3, target_flip_to=to, signal=run.config.signal)
        gradient = again.gradient(cut)
        assert length(minus(gradient, expected)) < 1e-11 * length(expected)
        assert torch.equal(torch.cat([y for _, y in watched]), batch.targets.flatten()), "signals see the truth"
        watched.clear()
    assert run.update().loss == pytest.approx(loss.item(), rel=1e-12)
    assert make_run().update().loss != pytest.approx(loss.item(), rel=1e-3)


def noise(cut: tuple[int, ...] = (12,), step: int = 0, share: float = 0.5, **options: Any) -> tuple[Gradients, float]:
    """What gradient_noise adds in an update, and its length over |g_CE|'s."""
    noisy, clean, true = (make_run(gradient_noise=s, **o) for s, o in ((share, options), (0.0, options), (0.0, {})))
    for run in (noisy, clean, true):
        run.state.step = step
    added = minus(noisy.gradient(cut), clean.gradient(cut))
    return added, length(added) / length(true.gradient(cut))


def test_noise_is_gaussian_and_as_long_as_asked() -> None:
    drawn, ratio = noise()
    n = sum(g.numel() for g in drawn.values())
    assert n > 10_000
    assert ratio == pytest.approx(0.5, abs=5 * 0.5 / (2 * n) ** 0.5)
    assert noise(share=2.0)[1] == pytest.approx(4 * ratio, rel=1e-9)
    one = torch.cat([g.flatten() for g in drawn.values()])
    one = (one - one.mean()) / one.std()
    assert abs(float(one.pow(4).mean()) - 3) < 5 * (24 / n) ** 0.5
    assert abs(float(one.pow(3).mean())) < 5 * (6 / n) ** 0.5
    by_parameter = torch.stack([g.square().mean() for g in drawn.values() if g.numel() > 500])
    assert by_parameter.max() < 1.3 * by_parameter.min(), "spread evenly over all entries"


NOISY: dict[str, dict[str, Any]] = {
    "alone": {},
    "a signal": {"signal": SignalConfig("confidence", weight=20.0)},
    "a placebo": {"signal": SignalConfig("confidence", weight=20.0, control="placebo")},
    "flips": {"target_flip": 0.3},
}


@pytest.mark.parametrize("case", NOISY)
@pytest.mark.parametrize("step", [0, 3])
def test_batch_noise_is_autograds_difference_of_two_batches_scaled(case: str, step: int) -> None:
    """For any cut: what neither the batch nor anything else makes of it, of the norm that is asked for."""
    options = NOISY[case]
    flip = options.get("target_flip", 0.0)
    run = make_run()
    model, gradients = run.state.model, list[list[Tensor]]()
    for half in (0, 1):
        batch = run.batch(noise_rows(step, half), 0)
        targets = flipped(batch.targets, flip, "uniform", V, 1, batch.names, "target flip") if flip else batch.targets
        loss = cross_entropy(model(batch.tokens).flatten(0, 1), targets.flatten())
        gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    names = [name for name, _ in model.named_parameters()]
    difference = {name: a - b for name, a, b in zip(names, *gradients, strict=True)}
    true = make_run(target_flip=flip)
    true.state.step = step
    norm = length(true.gradient())
    for cut in CUTS:
        noisy, clean = make_run(gradient_noise=0.5, gradient_noise_shape="batch", **options), make_run(**options)
        noisy.state.step = clean.state.step = step
        done = noisy.update(cut, measure_dose=True)
        with_noise = {name: p.grad for name, p in noisy.state.model.named_parameters() if p.grad is not None}
        added = minus(with_noise, clean.gradient(cut))
        expected = {name: g * (0.5 * norm / length(difference)) for name, g in difference.items()}
        assert length(minus(added, expected)) < 1e-9 * length(expected)
        assert done.batch_noise == pytest.approx(length(difference) / 2**0.5 / norm, rel=1e-9)


def test_measuring_what_noise_changes_changes_nothing() -> None:
    runs = [make_run(gradient_noise=0.5, gradient_noise_shape="batch") for _ in range(2)]
    for _ in range(2):
        for run, measure in zip(runs, (True, False), strict=True):
            run.update(measure_dose=measure)
    assert all(torch.equal(p, runs[1].weights[name]) for name, p in runs[0].weights.items())


def test_noise_is_fresh_each_step_and_the_same_for_any_cut() -> None:
    drawn, _ = noise()
    n = sum(g.numel() for g in drawn.values())
    assert abs(cosine(drawn, noise(step=3)[0])) < 5 / n**0.5
    assert abs(cosine(drawn, noise(seed=2)[0])) < 5 / n**0.5
    for cut in CUTS[1:]:
        assert length(minus(noise(cut)[0], drawn)) < 1e-9 * length(drawn)


def test_bias_is_as_long_and_one_direction_in_every_step() -> None:
    def bias(step: int = 0, seed: int = 1, cut: tuple[int, ...] = (12,)) -> Gradients:
        biased, clean = (make_run(gradient_bias=share, seed=seed) for share in (0.5, 0.0))
        biased.state.step = clean.state.step = step
        return minus(biased.gradient(cut), clean.gradient(cut))

    drawn = bias()
    n = sum(g.numel() for g in drawn.values())
    assert length(drawn) / length(make_run().gradient((12,))) == pytest.approx(0.5, abs=5 * 0.5 / (2 * n) ** 0.5)
    assert cosine(drawn, bias(step=3)) > 1 - 1e-9
    assert abs(cosine(drawn, bias(seed=2))) < 5 / n**0.5
    assert abs(cosine(drawn, noise()[0])) < 5 / n**0.5
    assert length(minus(bias(cut=CUTS[1]), drawn)) < 1e-9 * length(drawn)


@pytest.mark.parametrize("control", ["none", "placebo"])
def test_noise_is_a_share_of_the_true_loss_gradient_also_beside_a_signal(control: Any) -> None:
    alone, _ = noise()
    beside, ratio = noise(signal=SignalConfig("confidence", weight=20.0, control=control))
    assert ratio == pytest.approx(0.5, rel=0.05)
    assert length(minus(beside, alone)) < 1e-9 * length(alone)


def test_controls_touch_no_global_generator() -> None:
    before = torch.random.get_rng_state()
    signal = SignalConfig("brier", evaluator="live", control="placebo", positions=0.5)
    also = (SignalConfig("entropy", control="shuffled"), SignalConfig("brier", control="flipped"))
    make_run(signal=signal, also=also, gradient_noise=0.1, gradient_bias=0.1, target_flip=0.2).update((6, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
