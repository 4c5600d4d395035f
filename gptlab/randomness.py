"""Random numbers named by what they are for: a key, never a global generator.

Every draw in the project is a pure function of a key such as ("rotate", seed, step), so that it does not depend
on the rank, the micro-batch or what was drawn before, and a resumed run needs no generator's state.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def key_bits(*key: str | int) -> int:
    """A 128-bit number that stands for `key`: SHA-256 of its parts, cut. The same on every machine and version."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")


def permutation(n: int, *key: str | int) -> np.ndarray:
    """A permutation of range(n), (n,) int64, drawn from `key`.

    The order of Philox's raw 64-bit words: NumPy promises that stream for good, which it does not for
    `Generator.permutation`.
    """
    import numpy as np  # here, since options import this file and `--help` needs no numbers

    words = np.random.Philox(key=key_bits(*key)).random_raw(n)
    return np.argsort(words, kind="stable")


def uniform_index(n: int, *key: str | int) -> int:
    """One number uniform over range(n), drawn from `key`; the bias of the division is below n / 2**128."""
    return key_bits(*key) % n


def torch_generator(*key: str | int, device: str = "cpu") -> torch.Generator:
    """A fresh torch generator seeded from `key`, for draws made where tensors live."""
    import torch

    return torch.Generator(device=device).manual_seed(key_bits(*key) % 2**63)
