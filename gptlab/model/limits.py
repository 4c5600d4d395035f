"""How large a model may say it is before anything of that size is made: what no file's length can tell."""

from __future__ import annotations

MOST_BLOCKS = 10_000
"""A shared block is stored once whatever n_layer says, and lists as long as n_layer are made."""
