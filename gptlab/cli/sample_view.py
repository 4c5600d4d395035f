"""What a person sees of a sample: text as it comes, coloured by the block it was taken from, or a line per token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptlab.cli.console import printable

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.interpret.generate import Step

SHADES = (51, 45, 39, 33, 63, 99, 135, 171, 207, 213)
"""Colours of blocks from the first to the last but one, of the terminal's 256: cyan over blue to pink."""
PLAIN = "\033[0m"


def text(prompt: Sequence[int], steps: Iterator[Step], tokenizer: Tokenizer, blocks: int | None) -> Iterator[str]:
    """The prompt, dimmed on a terminal, then every piece of text as soon as its tokens make whole characters.

    blocks: of the model, where tokens are to be coloured by the block they left at; those of the last stay plain.
    """
    terminal = sys.stdout.isatty()
    given = printable(tokenizer.decode(prompt))
    yield f"\033[2m{given}{PLAIN}" if terminal else given
    added = tokenizer.stream(prompt)
    for step in steps:
        piece = printable(added(step.token))
        yield colour(step.block, blocks) + piece + PLAIN if terminal and blocks and piece else piece
    yield printable(added(None))


def blocks(steps: Iterator[Step], tokenizer: Tokenizer) -> Iterator[str]:
    """A line per token: what was written, then for block 1 to the one it was taken from the best token and its p."""
    for step in steps:
        guesses = (f"{_shown(b, tokenizer):>8} {p:4.0%}" for b, p in zip(step.best, step.probability, strict=True))
        yield f"{_shown(step.token, tokenizer):>8}  |{'  '.join(guesses)}\n"


def colour(block: int, blocks: int | None) -> str:
    """The escape sequence that starts the colour of `block` of 1..blocks."""
    if not blocks or block >= blocks:
        return PLAIN
    return f"\033[38;5;{SHADES[round((block - 1) / max(1, blocks - 2) * (len(SHADES) - 1))]}m"


def legend(blocks: int, exits: Mapping[str, Any]) -> str:
    """The colours of blocks, the share of them that was computed, and the time against the full model."""
    if exits["share_of_blocks"] is None:
        return "nothing was written"
    shades = (f"{colour(j, blocks)}{j}{PLAIN}" for j in range(1, blocks + 1))
    key = f"exit block {' '.join(shades)}; " if sys.stdout.isatty() else ""
    return (
        f"{key}{exits['share_of_blocks']:.1%} of the blocks computed; {exits['seconds']:.2f} s, "
        f"the full model {exits['seconds_in_full']:.2f} s: {exits['gain']:.2f}x"
    )


def _shown(token: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode([token]))
