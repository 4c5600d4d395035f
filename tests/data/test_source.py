"""Floors of windows, by hand; what a manifest may hold of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gptlab.data.corpus import EntropyFloor
from gptlab.errors import ConfigError


def test_the_rate_is_the_mean_over_a_period() -> None:
    assert EntropyFloor((1.0, 2.0, 0.0)).rate == 1.0


@pytest.mark.parametrize(
    ("floor", "block_size", "count", "total"),
    [
        (EntropyFloor((2.0,)), 4, 3, 24.0),
        (EntropyFloor((1.0, 2.0, 0.0)), 6, 2, 12.0),
        # By what is in sight: nothing, one character (5, 3), then 2 each. Only the first window starts with nothing.
        (EntropyFloor((2.0,), (5.0, 3.0)), 4, 1, 5 + 3 + 2 + 2),
        (EntropyFloor((2.0,), (5.0, 3.0)), 4, 3, (5 + 3 + 2 + 2) + 2 * (3 + 2 + 2 + 2)),
        (EntropyFloor((2.0,), (5.0, 3.0)), 1, 2, 5 + 3),  # a window shorter than what it takes
        (EntropyFloor((2.0,), (7.0, 5.0, 3.0)), 2, 2, (7 + 5) + (5 + 3)),
    ],
)
def test_the_floor_of_windows_counts_what_each_token_has_in_sight(
    floor: EntropyFloor, block_size: int, count: int, total: float
) -> None:
    assert floor.of_windows(block_size, count) == pytest.approx(total / (block_size * count), rel=1e-15)


def test_windows_out_of_step_with_the_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows of whole lines, of 3 tokens each, found block_size 128; try 129"):
        EntropyFloor((1.0, 2.0, 0.0)).of_windows(128, 4)
    with pytest.raises(ConfigError, match="found block_size 1; try 3"):
        EntropyFloor((1.0, 2.0, 0.0)).of_windows(1, 4)


@pytest.mark.parametrize(
    "floor", [EntropyFloor((1 / 3, 0.0), parts={"bit": 0.1}), EntropyFloor((math.log(7),), (0.1, 0.3))]
)
def test_a_manifest_keeps_every_digit(floor: EntropyFloor) -> None:
    assert EntropyFloor.from_json(json.loads(json.dumps(floor.as_json()))) == floor


@pytest.mark.parametrize(
    "content",
    [
        {"period": [], "start": []},
        {"period": [1.0]},
        {"period": [1.0, 2.0], "start": [1.0]},
        {"period": [-1.0], "start": []},
        {"period": [float("nan")], "start": []},
        {"period": ["much"], "start": []},
    ],
)
def test_a_manifest_that_holds_no_floor_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        EntropyFloor.from_json(content)
