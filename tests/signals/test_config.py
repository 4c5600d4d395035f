"""When a signal speaks, how loudly and by which judges; and which configs are refused."""

from collections import Counter
from typing import Any

import pytest

from gptlab.errors import ConfigError
from gptlab.signals import SignalConfig


def confidence(**options: Any) -> SignalConfig:
    return SignalConfig(name="confidence", **options)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.25] * 6),
        ({"weight": 0.5}, [0.5] * 6),
        ({"weight": 0.0}, [0.0] * 6),
        ({"start": 2}, [0, 0, 0.25, 0.25, 0.25, 0.25]),
        ({"weight": 1.0, "anneal": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"weight": 1.0, "start": 1, "anneal": 2}, [0, 1, 0.5, 0, 0, 0]),
        ({"weight": 1.0, "start": 1, "anneal": 0}, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_the_weight_of_every_step(options: dict[str, Any], weights: list[float]) -> None:
    assert [confidence(**options).weight_at(step, n_layer=4) for step in range(6)] == pytest.approx(weights)


def test_without_a_signal_there_is_no_weight() -> None:
    assert SignalConfig(weight=3.0).weight_at(0, n_layer=4) == 0.0


def test_judges_are_all_blocks_but_the_last_or_those_listed() -> None:
    assert confidence().judges_at(0, 4, seed=1) == ((1, 2, 3), 1)
    assert confidence(layers=(3, 1)).judges_at(0, 4, seed=1) == ((3, 1), 1)
    assert confidence(layers=[2]).layers == (2,)
    assert confidence(layers="rotate").judges_at(0, 2, seed=1) == ((1,), 1)


def test_rotate_draws_each_judge_equally_often_and_counts_it_for_all() -> None:
    drawn: Counter[int] = Counter()
    for step in range(3000):
        judges, factor = confidence(layers="rotate").judges_at(step, 4, seed=1)
        assert (len(judges), factor) == (1, 3)
        drawn.update(judges)
    assert set(drawn) == {1, 2, 3}
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in drawn.values()), drawn


def test_rotate_is_keyed_by_seed_and_step() -> None:
    def draws(seed: int) -> list[tuple[int, ...]]:
        return [confidence(layers="rotate").judges_at(step, 9, seed)[0] for step in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "confidense"}, "unknown signal 'confidense'; did you mean 'confidence'"),
        ({"layers": "some"}, "all, rotate or a list such as 1,3, found 'some'"),
        ({"positions": 0.0}, "signal.positions must lie above 0 and at most 1, found 0.0"),
        ({"positions": 1.5}, "signal.positions .* found 1.5"),
        ({"threshold": 0.0}, "signal.threshold .* found 0.0"),
        ({"start": -1}, "signal.start must be at least 0, found -1"),
        ({"anneal": -1}, "signal.anneal must be at least 0, found -1"),
        ({"dose": -0.1}, "signal.dose must be at least 0, found -0.1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SignalConfig(**options)


@pytest.mark.parametrize("judge", [0, 4, -1])
def test_only_blocks_that_judge_another_below_the_last_can_be_listed(judge: int) -> None:
    with pytest.raises(ConfigError, match=rf"judges 1 to 3 of this model, found {judge}"):
        confidence(layers=(1, judge)).judges_at(0, 4, seed=1)


def test_a_judge_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="once, found 2,2"):
        confidence(layers=(2, 2)).judges_at(0, 4, seed=1)


def test_no_judges_and_a_dose_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="found an empty list"):
        confidence(layers=())
    with pytest.raises(ConfigError, match=r"signal\.weight 0 takes the signal out, signal\.dose 0\.3"):
        confidence(weight=0.0, dose=0.3)
