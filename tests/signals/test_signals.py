"""Every signal of the registry against its formula, written a second time from softmax in float64.

One table. A signal that is added must be added here: its formula, and the bounds that its value and gradient keep.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gptlab.errors import ConfigError
from gptlab.signals import SIGNALS

TAU = 0.4
V = 7


@dataclass(frozen=True)
class Point:
    """Where a formula is evaluated: p (n, V) varies; what is stopped is taken from p0, as are gates and the argmax."""

    p: Tensor
    p0: Tensor
    other: Tensor
    y: Tensor
    z: Tensor

    @property
    def m(self) -> Tensor:
        return self.p0.argmax(1)

    @property
    def sure(self) -> Tensor:
        return self.p0.amax(1) >= TAU

    def of(self, index: Tensor, p: Tensor | None = None) -> Tensor:
        return (self.p if p is None else p).gather(1, index[:, None])[:, 0]

    def rest(self, index: Tensor) -> Tensor:
        """log of the probability of all tokens but one, summed and not subtracted from 1."""
        return self.p.scatter(1, index[:, None], 0.0).sum(1).log()


def rest_of_top(p: Tensor) -> Tensor:
    return (1 - p.amax(1)).log()


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(1)


def negated(at: Point) -> Tensor:
    """-CE(-z, m): the softmax of the logits turned round."""
    q = (-at.z).softmax(1)
    return at.of(at.m, q).log()


def advantage(at: Point) -> Tensor:
    gate = rest_of_top(at.p0) < rest_of_top(at.other)
    return (at.rest(at.m) - rest_of_top(at.other)) * gate


def information_gain(at: Point) -> Tensor:
    gain = at.of(at.y, at.p0).log() - at.of(at.y, at.other).log()
    return -at.of(at.y).log() * gain.clamp(min=0)


INFINITE = math.inf


@dataclass(frozen=True)
class Expected:
    """formula: the value; values: its range; l1: the L1 norm of a token's gradient at the logits, or its greatest.

    exact: `l1` is the norm itself where a gate is open, not only its bound
    """

    formula: Callable[[Point], Tensor]
    values: tuple[float, float]
    l1: Callable[[Point], Tensor | float] = lambda at: INFINITE
    exact: bool = False
    needs: str | None = None
    truth: bool = False
    threshold: bool = False


def twice(choose: Callable[[Point], Tensor]) -> Callable[[Point], Tensor]:
    return lambda at: 2 * choose(at)


p_m = twice(lambda at: at.of(at.m))
p_y = twice(lambda at: at.of(at.y))
not_m = twice(lambda at: 1 - at.of(at.m))
not_y = twice(lambda at: 1 - at.of(at.y))

EXPECTED: dict[str, Expected] = {
    "confidence": Expected(lambda at: at.rest(at.m), (-INFINITE, 0), p_m, True),
    "overconfidence_penalty": Expected(lambda at: -at.rest(at.m), (0, INFINITE), p_m, True),
    "gated_confidence": Expected(lambda at: at.rest(at.m) * at.sure, (-INFINITE, 0), p_m, True, threshold=True),
    "verified_confidence": Expected(
        lambda at: at.rest(at.m) * (at.sure & (at.m == at.y)), (-INFINITE, 0), p_m, True, truth=True, threshold=True
    ),
    "confident_error": Expected(
        lambda at: -at.rest(at.m) * (at.sure & (at.m != at.y)), (0, INFINITE), p_m, True, truth=True, threshold=True
    ),
    "advantage": Expected(advantage, (-INFINITE, 0), p_m, True, needs="previous"),
    "target_confidence": Expected(lambda at: at.rest(at.y), (-INFINITE, 0), p_y, True, truth=True),
    "confidence_weighted_ce": Expected(
        lambda at: -at.of(at.m, at.p0) * at.of(at.y).log(),
        (0, INFINITE),
        lambda at: 2 * at.of(at.m) * (1 - at.of(at.y)),
        True,
        truth=True,
    ),
    "negated_cross_entropy": Expected(
        negated, (-INFINITE, -math.log(V)), lambda at: 2 * (1 - at.of(at.m, (-at.z).softmax(1))), True
    ),
    "negative_self_cross_entropy": Expected(lambda at: at.of(at.m).log(), (-math.log(V), 0), not_m, True),
    "negative_deep_supervision": Expected(lambda at: at.of(at.y).log(), (-INFINITE, 0), not_y, True, truth=True),
    "deep_supervision": Expected(lambda at: -at.of(at.y).log(), (0, INFINITE), not_y, True, truth=True),
    "pseudo_label": Expected(lambda at: -at.of(at.m).log() * at.sure, (0, -math.log(TAU)), not_m, True, threshold=True),
    "information_gain": Expected(information_gain, (0, INFINITE), needs="previous", truth=True),
    "brier": Expected(
        lambda at: (at.p - torch.eye(V, dtype=at.p.dtype)[at.y]).square().sum(1), (0, 2), lambda at: 2.0, truth=True
    ),
    "entropy": Expected(lambda at: entropy(at.p), (0, math.log(V))),
    "confidence_penalty": Expected(lambda at: -entropy(at.p), (-math.log(V), 0)),
    "self_certainty": Expected(
        lambda at: (math.log(1 / V) - at.p.log()).mean(1) * -1,
        (-INFINITE, 0),
        lambda at: (at.p - 1 / V).abs().sum(1),
        True,
    ),
    "collision": Expected(lambda at: 1 - at.p.square().sum(1), (0, 1), lambda at: 1.0),
    "self_distillation": Expected(
        lambda at: (at.other * (at.other / at.p).log()).sum(1),
        (0, INFINITE),
        lambda at: (at.p - at.other).abs().sum(1),
        True,
        needs="final",
    ),
}

each_signal = pytest.mark.parametrize("name", sorted(SIGNALS))


def draw(n: int = 200, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the other block's logits, (n, V) float64, and true tokens (n,), every third one the argmax."""
    generator = torch.Generator().manual_seed(2)
    z, other = (torch.randn(n, V, dtype=torch.float64, generator=generator) * scale for _ in range(2))
    y = torch.randint(V, (n,), generator=generator)
    return z, other, y.where(torch.arange(n) % 3 > 0, z.argmax(1))


def call(name: str, z: Tensor, y: Tensor, other: Tensor | None = None, threshold: float = TAU) -> Tensor:
    return SIGNALS[name](z, y, other=other if SIGNALS[name].needs else None, threshold=threshold)


def gradient(name: str, z: Tensor, y: Tensor, other: Tensor, threshold: float = TAU) -> Tensor:
    """Of the sum of the values, at the logits, in their dtype."""
    z = z.detach().requires_grad_()
    values = call(name, z, y, other, threshold)
    return torch.autograd.grad(values.sum(), z, allow_unused=True, materialize_grads=True)[0]


def formula(name: str, z: Tensor, at: Tensor, other: Tensor, y: Tensor) -> Tensor:
    return EXPECTED[name].formula(Point(z.softmax(1), at.softmax(1), other.softmax(1), y, z))


def test_the_table_holds_every_signal() -> None:
    assert set(EXPECTED) == set(SIGNALS)
    assert all(signal.name == name for name, signal in SIGNALS.items())


@each_signal
def test_a_signal_says_what_it_is_and_needs(name: str) -> None:
    signal, expected = SIGNALS[name], EXPECTED[name]
    declared = (signal.needs, signal.uses_truth, signal.has_threshold)
    assert declared == (expected.needs, expected.truth, expected.threshold)
    assert signal.function.__doc__
    assert signal.formula
    assert signal.source


@each_signal
def test_values_are_the_formulas(name: str) -> None:
    z, other, y = draw()
    values = call(name, z, y, other)
    torch.testing.assert_close(values, formula(name, z, z, other, y), rtol=1e-11, atol=1e-11)
    assert values.shape == (200,)
    assert (values != 0).sum() >= 20, "hardly any token passes: this would show nothing"


@each_signal
def test_gradients_are_central_differences_with_stopped_factors_held(name: str) -> None:
    z, other, y = draw(60)
    step = 1e-6
    numeric = torch.empty_like(z)
    for k in range(V):
        shift = torch.zeros_like(z)
        shift[:, k] = step
        up, down = (formula(name, z + sign * shift, z, other, y) for sign in (1, -1))
        numeric[:, k] = (up - down) / (2 * step)
    found = gradient(name, z, y, other)
    assert found.abs().max() > 1e-2
    torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-8)


@each_signal
def test_values_and_gradients_keep_their_bounds(name: str) -> None:
    expected = EXPECTED[name]
    for scale in (0.01, 1.0, 5.0, 15.0):
        z, other, y = draw(scale=scale)
        values, norms = call(name, z, y, other), gradient(name, z, y, other).abs().sum(1)
        low, high = expected.values
        assert ((values >= low - 1e-12) & (values <= high + 1e-12)).all(), (values.min(), values.max())
        bound = torch.as_tensor(expected.l1(Point(z.softmax(1), z.softmax(1), other.softmax(1), y, z)))
        assert (norms <= bound + 1e-8).all()  # PyTorch's softplus is the identity from 20 on: 2e-9 off there
        if expected.exact:
            spoke = norms > 0
            torch.testing.assert_close(norms[spoke], bound[spoke], rtol=1e-6, atol=1e-8)


def near_the_bound(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the other block's and true tokens at which a bounded gradient is as long as it gets, or nearly so."""
    p = torch.full((1, 5000), 1e-9, dtype=torch.float64)
    p[0, 0] = {"brier": 1 / 3, "collision": 2 / 3}.get(name, 1e-6 if SIGNALS[name].has_threshold else 1e-3)
    p[0, 1] = 2 / 3 if name == "brier" else 1e-9
    of_the_rest = ("confidence", "gated_confidence", "verified_confidence", "confident_error", "target_confidence",
                   "overconfidence_penalty", "advantage")  # fmt: skip
    if name in (*of_the_rest, "self_certainty", "confidence_weighted_ce", "self_distillation"):
        p[0, 0] = 1 - 1e-6
    elif name != "brier":
        p[0, 2:] = (1 - p[0, 0]) / 4998
    z = p.log()
    other = torch.zeros_like(z)
    other[0, 3] = 40.0 if name == "self_distillation" else 0.0
    y = 1 if name in ("confident_error", "confidence_weighted_ce") else 0
    return z, other, torch.tensor([y])


@each_signal
def test_the_registrys_bound_of_the_gradient_holds_and_is_the_least(name: str) -> None:
    bound = SIGNALS[name].gradient_bound
    drawn = [draw(scale=scale) for scale in (0.01, 1.0, 3.0, 5.0, 15.0)]
    norms = torch.cat([gradient(name, z, y, other, 1e-9).abs().sum(1) for z, other, y in drawn])
    if bound is None:  # it grows with the vocabulary, or with what the block before did not know
        wide = torch.zeros(1, 10**6, dtype=torch.float64)
        wide[0, :4] = math.log(10**6 / 4)  # half of the probability on four tokens
        lost = torch.zeros_like(wide)
        lost[0, 0] = -100.0
        assert gradient(name, wide, torch.tensor([0]), lost).abs().sum() > 5
        return
    assert norms.max() <= bound + 1e-8
    z, other, y = near_the_bound(name)
    assert bound * 0.99 < gradient(name, z, y, other, 1e-9).abs().sum() <= bound


def test_the_table_of_greatest_gradients() -> None:
    """What the exact norms come to: some vanish with confidence, some never do."""
    y = torch.tensor([3])
    for p in (0.9, 0.999, 1 - 1e-9):
        z = torch.zeros(1, V, dtype=torch.float64)
        z[0, 0] = math.log(p / (1 - p) * (V - 1))

        def norm(name: str, z: Tensor = z) -> float:
            return gradient(name, z, y, torch.zeros_like(z)).abs().sum().item()

        assert norm("confidence") == pytest.approx(2 * p)
        assert 2 * (1 - 1 / V) < norm("negated_cross_entropy") < 2
        assert norm("negative_self_cross_entropy") == pytest.approx(2 * (1 - p), rel=1e-4)
        assert norm("self_distillation") == pytest.approx(2 * (p - 1 / V))
        assert norm("entropy") < 12 * (1 - p) * -math.log(1 - p)


@each_signal
def test_only_differences_of_logits_count(name: str) -> None:
    z, other, y = draw()
    shifted = call(name, z + 3.0, y, other - 5.0)
    torch.testing.assert_close(shifted, call(name, z, y, other), rtol=1e-9, atol=1e-9)
    assert gradient(name, z, y, other).sum(1).abs().max() < 1e-12


@each_signal
def test_the_true_token_counts_only_where_declared(name: str) -> None:
    z, other, y = draw()
    same = torch.equal(call(name, z, y, other), call(name, z, (y + 1) % V, other))
    assert same != SIGNALS[name].uses_truth


@each_signal
def test_tokens_do_not_see_each_other(name: str) -> None:
    z, other, y = draw(20)
    one_by_one = [call(name, z[i : i + 1], y[i : i + 1], other[i : i + 1]) for i in range(20)]
    torch.testing.assert_close(torch.cat(one_by_one), call(name, z, y, other), rtol=1e-12, atol=1e-12)


def extremes() -> tuple[Tensor, Tensor, Tensor]:
    """Logits as far as ±1e4: one-hot for and against, equal, tied, spread; every pairing with another block's."""
    hot = torch.full((V,), -1e4)
    hot[2] = 1e4
    halves = torch.where(torch.arange(V) < 3, 1e4, -1e4)
    steps = torch.linspace(-1e4, 1e4, V)
    rows = torch.stack([hot, -hot, torch.full((V,), 1e4), torch.full((V,), -1e4), halves, steps, torch.zeros(V)])
    n = len(rows)
    return rows.repeat_interleave(n * V, 0), rows.repeat_interleave(V, 0).repeat(n, 1), torch.arange(V).repeat(n * n)


@each_signal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    z, other, y = extremes()
    z, other = z.to(dtype), other.to(dtype)
    values, slope = call(name, z, y, other), gradient(name, z, y, other)
    assert values.isfinite().all()
    assert slope.isfinite().all()
    assert (values.dtype, slope.dtype) == (torch.float32, dtype)


@each_signal
def test_float32_agrees_with_the_formula_where_it_is_sure(name: str) -> None:
    z, other, y = draw(scale=4.0)
    found = call(name, z.float(), y, other.float()).double()
    torch.testing.assert_close(found, formula(name, z, z, other, y), rtol=2e-4, atol=2e-5)


def test_certainty_is_told_apart_where_float32_rounds_it_to_one() -> None:
    """p_m of both rows is 1.0 in float32; log(1-p_m) is -50 and -80 and its gradient still 2."""
    z = torch.zeros(2, 2)
    z[:, 0] = torch.tensor([50.0, 80.0])
    y = torch.zeros(2, dtype=torch.long)
    assert z.softmax(1)[:, 0].eq(1.0).all()
    assert call("confidence", z, y).tolist() == [-50.0, -80.0]
    assert gradient("confidence", z, y, z).tolist() == [[-1.0, 1.0], [-1.0, 1.0]]


@pytest.mark.parametrize("name", [name for name in sorted(SIGNALS) if SIGNALS[name].has_threshold])
def test_a_gate_opens_at_the_threshold(name: str) -> None:
    """Two equal logits are p_m = 1/2 exactly, and the threshold belongs to the open side."""
    z = torch.zeros(1, 2, dtype=torch.float64)
    y = (z.argmax(1) + (name == "confident_error")) % 2

    def at(threshold: float) -> tuple[float, float]:
        return call(name, z, y, threshold=threshold).item(), gradient(name, z, y, z, threshold).abs().sum().item()

    assert abs(at(0.5)[0]) == pytest.approx(math.log(2))
    assert at(0.5)[1] == pytest.approx(1.0)
    assert at(0.5 - 1e-12) == at(0.5)
    assert at(0.5 + 1e-12) == (0.0, 0.0)
    assert call(name, z, y, threshold=0.5).item() != call(name, z, y, threshold=0.9).item()


@pytest.mark.parametrize(("name", "speaks"), [("verified_confidence", True), ("confident_error", False)])
def test_a_verdict_on_right_and_wrong(name: str, speaks: bool) -> None:
    z = torch.tensor([[4.0, 0.0, 0.0]]).double()
    for y, right in ((0, True), (1, False), (2, False)):
        assert (call(name, z, torch.tensor([y])).item() != 0) == (right == speaks)


def test_the_threshold_is_nine_tenths_unless_said() -> None:
    z = torch.tensor([[math.log(9.1), 0.0], [math.log(8.9), 0.0]]).double()
    values = SIGNALS["gated_confidence"](z, torch.zeros(2, dtype=torch.long))
    assert values.tolist() == [pytest.approx(-math.log(10.1)), 0.0]


def test_advantage_counts_only_growing_surer() -> None:
    z, other, y = draw()
    surer = z.softmax(1).amax(1) > other.softmax(1).amax(1)
    assert 20 < surer.sum() < 180
    values, slope = call("advantage", z, y, other), gradient("advantage", z, y, other)
    assert (values[surer] < 0).all()
    assert torch.equal(values[~surer], torch.zeros_like(values[~surer]))
    assert torch.equal(slope[~surer], torch.zeros_like(slope[~surer]))
    assert torch.equal(call("advantage", z, y, z), torch.zeros_like(values))
    torch.testing.assert_close(slope[surer], gradient("confidence", z, y, other)[surer])


def test_information_gain_counts_only_information() -> None:
    z, other, y = draw()
    informed = z.log_softmax(1).gather(1, y[:, None]) > other.log_softmax(1).gather(1, y[:, None])
    assert torch.equal(call("information_gain", z, y, other) > 0, informed[:, 0])


@pytest.mark.parametrize("name", [name for name in sorted(SIGNALS) if SIGNALS[name].needs])
def test_the_other_block_is_not_taught(name: str) -> None:
    z, other, y = draw()
    z.requires_grad_()
    other.requires_grad_()
    call(name, z, y, other).sum().backward()
    assert other.grad is None
    with pytest.raises(ConfigError, match="give its logits as other="):
        SIGNALS[name](z, y)


@pytest.mark.parametrize(("strength", "q_m"), [(0.25, 0.4), (0.5, 0.3), (-0.5, 0.6), (-2.0, 0.9)])
def test_confidence_beside_the_true_loss_has_its_closed_form(strength: float, q_m: float) -> None:
    """Minimising E_q[CE] + λ·log(1-p_m) gives p_m = q_m/(1-λ), the rest in proportion to q: bias, not noise."""
    q = torch.tensor([q_m, *[(1 - q_m) * share for share in (0.1, 0.2, 0.3, 0.4)]], dtype=torch.float64)
    z = q.log().clone().requires_grad_()
    everyone = torch.arange(len(q))
    optimizer = torch.optim.LBFGS(
        [z], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        rows = z.expand(len(q), -1)
        truth = (q * call("deep_supervision", rows, everyone)).sum()
        total = truth + strength * call("target_confidence", z[None], torch.tensor([0])).sum()
        total.backward()
        return total

    optimizer.step(loss)
    p = z.detach().softmax(0)
    expected = q * (1 - q_m / (1 - strength)) / (1 - q_m)
    expected[0] = q_m / (1 - strength)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)
    if p.argmax() == 0:  # where token 0 is the argmax, that is `confidence` itself
        at = z.detach()[None]
        assert torch.equal(call("confidence", at, everyone[:1]), call("target_confidence", at, everyone[:1]))


def test_the_table_loads_without_torch() -> None:
    """Options are checked against it before torch is imported, which takes seconds."""
    code = "import sys, gptlab.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
