"""Levels for looks: against an integration by other means, and by their promise, the error over all looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gptlab.analysis.statistics import last_look, levels, look_level, spent
from gptlab.errors import ConfigError


def normal_levels(alpha: float, fractions: list[float]) -> list[float]:
    """The levels for normal statistics, by integrating the density of the sum over a grid (Armitage et al. 1969)."""
    grid = np.linspace(-8, 8, 4001)
    step = grid[1] - grid[0]
    found, density = [], np.zeros_like(grid)  # of sum / sqrt(1 unit of all information), among those not stopped
    for k, fraction in enumerate(fractions):
        before = fractions[k - 1] if k else 0.0
        spread = math.sqrt(fraction - before)
        if k == 0:
            density = stats.norm.pdf(grid / spread) / spread
        else:
            density = np.array([(density * stats.norm.pdf((x - grid) / spread)).sum() * step / spread for x in grid])
        wanted = spent(alpha, fraction) - spent(alpha, before)
        tails = np.cumsum(density) * step
        bound = -float(np.interp(wanted / 2, tails, grid + step / 2))
        found.append(float(2 * stats.norm.sf(bound / math.sqrt(fraction))))
        density[np.abs(grid) >= bound] = 0
    return found


def test_many_seeds_give_the_levels_of_normal_statistics() -> None:
    found = levels(0.05, (2000, 4000, 6000, 8000, 10_000))
    assert found == pytest.approx(normal_levels(0.05, [0.2, 0.4, 0.6, 0.8, 1.0]), rel=0.03)
    assert 0.0145 < min(found)
    assert max(found) < 0.0172  # around Pocock's one level for five looks, 0.0158 (1977)


@pytest.mark.parametrize("looks", [(5, 10, 20), (2, 3), (3, 4, 5, 6)])
@pytest.mark.parametrize("alpha", [0.05, 0.10])
def test_looking_at_every_look_keeps_the_error_with_few_seeds(looks: tuple[int, ...], alpha: float) -> None:
    experiments = 200_000
    x = np.random.default_rng(7).standard_normal((experiments, looks[-1]))
    wrong = np.zeros(experiments, dtype=bool)
    for n, nominal in zip(looks, levels(alpha, looks), strict=True):
        wrong |= stats.ttest_1samp(x[:, :n], 0, axis=1).pvalue < nominal
    four_deviations = 4 * math.sqrt(alpha * (1 - alpha) / experiments)
    assert wrong.mean() == pytest.approx(alpha, abs=four_deviations)


def test_the_first_look_spends_by_its_share_and_one_look_spends_all() -> None:
    assert levels(0.05, (5, 20))[0] == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 4))
    assert levels(0.05, (8,)) == pytest.approx((0.05,))
    assert look_level(0.0125) == 0.0125


def test_levels_are_the_same_every_time() -> None:
    first = levels(0.05, (4, 8))
    levels.cache_clear()
    assert levels(0.05, (4, 8)) == first


@pytest.mark.parametrize(("n", "look"), [(2, None), (5, 5), (9, 5), (10, 10), (30, 20)])
def test_seeds_between_looks_wait(n: int, look: int | None) -> None:
    assert last_look((5, 10, 20), n) == look


@pytest.mark.parametrize("looks", [(), (1, 5), (5, 5), (10, 5), (2.5, 5), (True, 5)])
def test_looks_that_are_none_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rising numbers of seeds, at least 2, such as \[5, 10, 20\]"):
        levels(0.05, looks)
