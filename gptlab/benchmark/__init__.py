"""Measuring training steps against the arithmetic they need and against peers, interleaved, in one process.

Here stand the names of what is measured, which are checked before torch is imported.
"""

from __future__ import annotations

from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 256, "block_size": 128, "batch": 16},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 50304, "block_size": 256, "batch": 4},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 256, "batch": 4},
}
ON_A_GPU = {name: {"block_size": 1024, "batch": batch} for name, batch in (("tiny", 128), ("small", 64), ("124m", 32))}
"""What is larger there: a GPU waits for its host where a step's products are small."""
PEERS = ("nanogpt", "build-nanogpt")
"""Peers that are measured from a checkout."""
MODES: dict[str, dict[str, Any]] = {
    "exact": {"name": "confidence"},
    "rotate": {"name": "confidence", "layers": "rotate"},
    "positions": {"name": "confidence", "positions": 0.125},
}
