"""How many cells run at a time, for machines that are not at hand."""

from __future__ import annotations

import pytest

from gptlab.runs.executor import SIDE_BY_SIDE, Packing


@pytest.mark.parametrize(
    ("packing", "width", "threads", "at_a_time", "said"),
    [
        (Packing(2), 128, 1, 2, "2 runs at a time of one thread"),
        (Packing(8), 128, 1, 8, "8 runs at a time of one thread"),
        (Packing(8, jobs=3), 128, 1, 3, "3 runs at a time of one thread"),
        (Packing(8, jobs=1), 128, 1, 1, "1 run at a time of one thread"),
        (Packing(2, jobs=9), 128, 1, 2, "2 runs at a time of one thread"),
        (Packing(1), 128, 1, 1, "1 run at a time of one thread"),
        (Packing(8), SIDE_BY_SIDE + 1, 8, 1, "one run over all 8 cores for models wider than"),
        (Packing(8, gpus=2), 768, 8, 2, "one run on each of 2 GPUs"),
        (Packing(8, gpus=4, jobs=3), 128, 1, 3, "one run on each of 3 of 4 GPUs"),
    ],
)
def test_cores_and_gpus_are_shared_out(packing: Packing, width: int, threads: int, at_a_time: int, said: str) -> None:
    assert packing.threads(width) == threads
    running: list[int] = []
    while packing.fits(width, running):
        running.append(width)
    assert len(running) == at_a_time
    assert packing.why({width}).startswith(said)


def test_a_wide_model_waits_for_the_narrow_ones() -> None:
    packing = Packing(4)
    assert not packing.fits(768, [128])
    assert packing.fits(768, [])
    assert not packing.fits(128, [768])
    assert packing.why({128, 768}).count(";") == 1
