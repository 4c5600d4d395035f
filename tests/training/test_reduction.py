"""The same bits however units are shared: against the tree written as a recursion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptlab.errors import ConfigError
from gptlab.training import TrainingConfig
from gptlab.training.parallel import Node, TreeSum, complete_subtrees


def terms(count: int) -> Tensor:
    """Terms (count, 50) over nine orders of magnitude, whose sums round otherwise in every order."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 50, generator=generator) * 10.0 ** torch.randint(-4, 5, (count, 50), generator=generator)


def recursion(units: Tensor) -> Tensor:
    """The sum of full trees over the largest powers of two, each left half plus right half, added from the left."""
    if len(units) == 1:
        return units[0]
    size = 1 << (len(units).bit_length() - 1)
    if size == len(units):
        return recursion(units[: size // 2]) + recursion(units[size // 2 :])
    total, units = recursion(units[:size]), units[size:]
    while len(units):
        size = 1 << (len(units).bit_length() - 1)
        total, units = total + recursion(units[:size]), units[size:]
    return total


def held(units: Tensor, ranks: int, rank: int) -> TreeSum:
    """What one of so many ranks holds."""
    each, tree = len(units) // ranks, TreeSum()
    for k in range(rank * each, (rank + 1) * each):
        tree.add(Node(0, k), [units[k].clone()])
    return tree


@pytest.mark.fault(number=13)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 12, 20, 24, 32])
def test_any_number_of_ranks_gives_the_bits_of_the_recursion(count: int) -> None:
    units = terms(count)
    expected = recursion(units)
    if count > 3:
        assert not torch.equal(expected, sum(units[1:], start=units[0])), "the order counts"
    for ranks in (n for n in range(1, count + 1) if count % n == 0):
        together = TreeSum()
        for rank in range(ranks):
            roots = held(units, ranks, rank).roots
            each = count // ranks
            assert [node for node, _ in roots] == complete_subtrees(range(rank * each, (rank + 1) * each))
            for node, tensors in roots:
                together.add(node, tensors)
        (total,) = together.total()
        assert torch.equal(total, expected), ranks


def test_units_are_as_large_for_any_ranks_and_what_cannot_be_shared_is_refused() -> None:
    config = TrainingConfig(block_size=32, total_batch_tokens=32 * 12, batch_size=5, deterministic=True, threads=1)
    assert [config.micro_batch(ranks) for ranks in (1, 3)] == [4, 4]
    with pytest.raises(
        ConfigError, match=r"12 sequences is 3 micro-batches of 4 .* 2 processes cannot share; use 1, 3"
    ):
        config.micro_batch(2)
    with pytest.raises(ConfigError, match="deterministic needs a fixed number of threads"):
        TrainingConfig(deterministic=True)
