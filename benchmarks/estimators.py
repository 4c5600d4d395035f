"""How often the intervals of the measures of noise miss: synthetic gradients of known mean and covariance.

python benchmarks/estimators.py [--trials 1000]   writes benchmarks/results/measured.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from figures import keep
from scipy.stats import binomtest

from gptlab.analysis.noise import LEAST_GROUPS, estimators, looks
from gptlab.analysis.statistics import Interval
from gptlab.training.gradient_noise import InnerProducts


@dataclass(frozen=True)
class Scenario:
    """n groups' gradients of P parameters. length: of the true loss's mean gradient; signal: of the signal's.

    angle: between the two, radians. Noise has the deviation `noise` in every direction up to a factor that grows
    geometrically from 1 to `spread` over the parameters; the signal has half of the true loss's noise besides its own.
    """

    name: str
    groups: int = 32
    parameters: int = 200
    length: float = 3.0
    signal: float = 2.0
    angle: float = 1.2
    noise: float = 0.5
    spread: float = 1.0

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        true, signal = np.zeros(self.parameters), np.zeros(self.parameters)
        true[0] = self.length
        signal[:2] = self.signal * np.cos(self.angle), self.signal * np.sin(self.angle)
        return true, signal

    def deviations(self) -> np.ndarray:
        return self.noise * np.geomspace(1, self.spread, self.parameters)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Gradients of the true loss and the signal, (groups, 2, parameters)."""
        shared, own = generator.standard_normal((2, self.groups, self.parameters)) * self.deviations()
        true, signal = self.means()
        return np.stack([true + shared, signal + 0.5 * shared + own], 1)

    def truth(self) -> dict[str, float]:
        true, signal = self.means()
        trace, squared = float((self.deviations() ** 2).sum()), self.length**2
        return {
            "squared_length": squared,
            "noise_scale": trace / squared,
            "alignment": float(np.cos(self.angle)),
            "progress": 1 + float(true @ signal) / squared,
            "variance": 1 + 1 + 0.25 + 1,  # of CE + signal: (1 + 1/2)² + 1
        }


SCENARIOS = (
    Scenario("clear"),
    Scenario("64 groups", groups=64),
    Scenario("unequal noise", spread=8.0, noise=0.1),
    Scenario("against each other", angle=2.8),
    Scenario("at right angles", angle=np.pi / 2),
    Scenario("as much noise as signal", length=1.0, signal=1.0, noise=0.25, parameters=1000),
    Scenario("few directions", parameters=5, noise=1.0),
    Scenario("drowned in noise", length=1.0, signal=1.0, noise=1.0),
)


def intervals(products: InnerProducts) -> dict[str, Interval | None]:
    """The intervals of one trial; None where no figure is given, or none that is resolved."""
    scale = estimators.noise_scale(products, 0)
    aligned = estimators.alignment(products, 0, 1)
    left, ratio = estimators.progress(products, 0, 1), estimators.variance_ratio(products, 0, 1)
    return {
        "squared_length": estimators.mean_product(products, 0, 0).interval,
        "noise_scale": scale[1] if scale else None,
        "alignment": aligned.estimate.interval if aligned.estimate and aligned.resolved else None,
        "progress": left.interval if left else None,
        "variance": ratio.interval if ratio else None,
    }


def missed(scenario: Scenario, trials: int, generator: np.random.Generator) -> dict[str, Any]:
    """Of every figure: in how many trials it was given, and in how many its interval missed the truth."""
    truth = scenario.truth()
    given, misses = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(trials):
        for name, interval in intervals(InnerProducts.of(scenario.draw(generator))).items():
            if interval:
                given[name] += 1
                misses[name] += not interval[0] <= truth[name] <= interval[1]
    return {
        "name": scenario.name,
        "figures": {
            name: {
                "truth": truth[name],
                "given": given[name],
                "missed": misses[name],
                "miss_rate_interval": binomtest(misses[name], trials).proportion_ci(),
            }
            for name in truth
        },
    }


NARROW, MOST = (0.1, 0.05), 512
"""Half widths of the interval at which `stopped` adds no more groups, and how many it has."""


def _growing(scenario: Scenario, generator: np.random.Generator) -> Iterator[tuple[int, dict[str, Any]]]:
    """(groups so far, the alignment) at every look of one trial."""
    gradients = replace(scenario, groups=0).draw(generator)
    for n in looks(MOST):
        gradients = np.concatenate([gradients, replace(scenario, groups=n - len(gradients)).draw(generator)])
        yield n, estimators.alignment(InnerProducts.of(gradients), 0, 1).as_json()


def stopped(scenario: Scenario, narrow: float, trials: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often the interval of an alignment misses where groups were added until it was narrow (`gptlab noise`).

    looks: {groups: trials that stopped there}.
    """
    truth, misses, unknown = scenario.truth()["alignment"], 0, 0
    looked: dict[str, int] = {}
    for _ in range(trials):
        n, found = next(
            (n, found)
            for n, found in _growing(scenario, generator)
            if n == MOST or estimators.half_width(found) < narrow
        )
        looked[str(n)] = looked.get(str(n), 0) + 1
        if not found["resolved"]:
            unknown += 1
        elif not found["interval"][0] <= truth <= found["interval"][1]:
            misses += 1
    return {
        "name": scenario.name,
        "narrow": narrow,
        "looks": dict(sorted(looked.items(), key=lambda look: int(look[0]))),
        "unresolved": unknown,
        "missed": misses,
        "miss_rate_interval": binomtest(misses, trials).proportion_ci(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="trials of each scenario [1000]")
    trials = parser.parse_args().trials
    rows = [missed(scenario, trials, np.random.default_rng([1, k])) for k, scenario in enumerate(SCENARIOS)]
    few = [scenario for scenario in SCENARIOS if scenario.groups == LEAST_GROUPS]
    stops = [
        stopped(scenario, narrow, trials, np.random.default_rng([2, i, k]))
        for i, narrow in enumerate(NARROW)
        for k, scenario in enumerate(few)
    ]
    result = {"trials": trials, "scenarios": rows, "stopped": stops}
    keep("estimators", result)
    for row in rows:
        shown = (f"{name} {one['missed']}/{one['given']}" for name, one in row["figures"].items())
        print(f"{row['name']:<25}" + ", ".join(shown))
    for row in stops:
        shown = ", ".join(f"{count} at {groups}" for groups, count in row["looks"].items())
        print(f"{row['name']:<25}±{row['narrow']:g}: {row['missed']} missed, {row['unresolved']} unresolved; {shown}")


if __name__ == "__main__":
    main()
