"""Keyed random numbers: the same on every machine for good (golden values), independent between keys, uniform."""

from __future__ import annotations

import numpy as np
import torch

from gptlab.randomness import key_bits, permutation, torch_generator, uniform_index


def test_a_key_stands_for_the_same_numbers_for_good() -> None:
    """Golden values: a change of them would change every run's data order."""
    assert key_bits("windows", 1, 0, 0) == 115686943453296968236951949290310013670
    assert permutation(10, "windows", 1, 0, 0).tolist() == [5, 2, 9, 6, 8, 4, 1, 3, 7, 0]
    assert [uniform_index(11, "rotate", 1, step) for step in range(8)] == [5, 2, 10, 7, 2, 4, 0, 0]


def test_keys_that_differ_in_any_part_differ() -> None:
    keys = [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 11), ("a", 1, 1), ()]
    assert len({key_bits(*key) for key in keys}) == len(keys)
    orders = {tuple(permutation(20, *key)) for key in keys}
    assert len(orders) == len(keys)


def test_a_permutation_has_every_number_once() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(n, "x", n).tolist()) == list(range(n))


def test_permutations_and_indices_are_uniform() -> None:
    """Each of 4 places is taken about as often: 4,000 draws, five standard deviations."""
    firsts = np.bincount([permutation(4, "first", i)[0] for i in range(4000)], minlength=4)
    indices = np.bincount([uniform_index(4, "index", i) for i in range(4000)], minlength=4)
    for counts in (firsts, indices):
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_torch_generators_are_fresh_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (torch.rand(3, generator=torch_generator("x", seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
