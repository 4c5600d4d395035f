"""`gptlab sample`: generate text from a prompt, streamed to the terminal. interpret/generate.py draws the tokens."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser, amount, count, whole
from gptlab.cli.console import printable
from gptlab.cli.model import add_model_options
from gptlab.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from gptlab.cli.model import Opened
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.interpret.generate import Step
    from gptlab.model.decoder import Weights
    from gptlab.signals.tuned_lens import TunedLens

SHADES = (51, 45, 39, 33, 63, 99, 135, 171, 207, 213)
"""Colours of blocks from the first to the last but one, of the terminal's 256: cyan over blue to pink."""
PLAIN = "\033[0m"


def main(argv: list[str]) -> int:
    """Write samples; raises UsageError, and CheckpointError where there is no model."""
    options = _parse(argv)

    from gptlab.cli.model import open_model
    from gptlab.model.decoder import Weights

    opened = open_model(options.checkpoint, options.device, options.dtype, tokenizer=options.tokenizer)
    prompt = opened.tokenizer.prompt(options.prompt)
    weights = Weights(opened.model, opened.placement.autocast)
    samples: list[list[Step]] = []
    for number, steps in _texts(opened, weights, prompt, options):
        samples.append(kept := [])
        steps = _kept(steps, kept)
        if options.json:
            list(steps)
        else:
            _show(number, steps, prompt, opened, options)
    L, confidence = opened.model.config.n_layer, options.exit_confidence
    exits = {} if confidence is None else _computed(samples, L, confidence)
    if options.json:
        found = [_as_json(steps, opened.tokenizer, show_blocks=options.show_blocks) for steps in samples]
        print(json.dumps({"samples": found, **exits}))
    elif exits:
        print("\n" + legend(L, exits["share_of_blocks"]))
    return 0


def _kept(steps: Iterator[Step], kept: list[Step]) -> Iterator[Step]:
    """The same steps, which are also added to `kept`."""
    for step in steps:
        kept.append(step)
        yield step


def _show(number: int, steps: Iterator[Step], prompt: list[int], opened: Opened, options: argparse.Namespace) -> None:
    """Print a text as its steps come, with a line between it and the one before."""
    if number:
        print("\n" + "-" * 20)
    coloured = opened.model.config.n_layer if options.exit_confidence is not None else None
    pieces = blocks(steps, opened.tokenizer) if options.show_blocks else text(prompt, steps, opened.tokenizer, coloured)
    for piece in pieces:
        print(piece, end="", flush=True)
    if not options.show_blocks:
        print()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="gptlab sample", description="Generate text from a prompt.")
    add = parser.add_argument
    add("--checkpoint", metavar="RUN|FOLDER", required=True, help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--prompt", metavar="TEXT", default="\n", help="the text to continue [a line break]")
    add("--max_new_tokens", metavar="N", type=whole, default=200, help="tokens to generate, at most [200]")
    add("--temperature", metavar="T", type=amount, default=0.8, help="0 = always the likeliest token [0.8]")
    add("--top_k", metavar="K", type=count, help="draw from the K likeliest tokens only [all]")
    add("--top_p", metavar="P", type=float, default=1.0, help="from the fewest that hold P of the probability [1.0]")
    add("--seed", metavar="N", type=int, default=1, help="the same seed draws the same text [1]")
    add("--samples", metavar="N", type=count, default=1, help="how many texts, generated side by side [1]")
    add("--ignore_end", action="store_true", help="continue past the end of a document, instead of stopping there")
    add("--exit_confidence", metavar="P", type=float, help="take a token from the first block at least so sure [none]")
    reader = "how --exit_confidence and --show_blocks read blocks; `gptlab lens --fit` makes a tuned one [raw]"
    add("--reader", choices=["raw", "tuned"], default="raw", help=reader)
    add("--show_blocks", action="store_true", help="a line per token: each block's best next token and its probability")
    add_model_options(parser)
    add("--json", action="store_true", help='print {"samples": [{"tokens", "text", "exit_blocks"}]}, prompt left out')
    options = parser.parse(argv)
    for name in ("top_p", "exit_confidence"):
        if (found := getattr(options, name)) is not None and not 0 < found <= 1:
            raise UsageError(f"--{name}: expected a number above 0 and at most 1, found {found}")
    if options.reader != "raw" and options.exit_confidence is None and not options.show_blocks:
        raise UsageError("--reader says how blocks are read; add --exit_confidence P or --show_blocks")
    return options


def _texts(
    opened: Opened, weights: Weights, prompt: list[int], options: argparse.Namespace
) -> Iterator[tuple[int, Iterator[Step]]]:
    """Every text with its number. Side by side, the first streams and the others come whole after it."""
    from functools import partial

    from gptlab.interpret.generate import Sampling, generate, generate_batch
    from gptlab.randomness import torch_generator

    numbers = range(options.samples)
    generators = [torch_generator("sample", options.seed, n) for n in numbers]
    how: dict[str, Any] = {
        "sampling": Sampling(options.temperature, options.top_k, options.top_p),
        "vocab_size": opened.vocabulary.size,
        "end": None if options.ignore_end else opened.tokenizer.end_of_text,
        "show_blocks": options.show_blocks,
        "reader": _reader(opened, options),
    }
    if options.exit_confidence is not None:
        early = partial(generate, weights, prompt, options.max_new_tokens, exit_confidence=options.exit_confidence)
        yield from ((n, early(generator=generators[n], **how)) for n in numbers)
        return
    columns: list[list[Step]] = [[] for _ in numbers]

    def first() -> Iterator[Step]:
        for row in generate_batch(weights, prompt, options.max_new_tokens, generators=generators, **how):
            for column, step in zip(columns, row, strict=True):
                if step is not None:
                    column.append(step)
            if row[0] is not None:
                yield row[0]

    yield 0, first()
    yield from ((n, iter(columns[n])) for n in numbers[1:])


def _reader(opened: Opened, options: argparse.Namespace) -> TunedLens | None:
    """The reader that was asked for; raises CheckpointError where a tuned one is missing or another model's."""
    from gptlab.signals.tuned_lens import load, path_of

    if options.reader == "raw":
        return None
    reader = load(opened.model, path := path_of(options.checkpoint))
    if reader is None:
        raise CheckpointError(f"expected a tuned reader at {path}, found none; fit it with `gptlab lens --fit`")
    return reader


def _computed(samples: list[list[Step]], L: int, confidence: float) -> dict[str, Any]:
    """The share of blocks that early exit computed; None where nothing was written."""
    depths = [step.block for steps in samples for step in steps]
    return {"exit_confidence": confidence, "share_of_blocks": sum(depths) / (len(depths) * L) if depths else None}


def _as_json(steps: list[Step], tokenizer: Tokenizer, *, show_blocks: bool) -> dict[str, Any]:
    from gptlab.interpret.generate import as_row

    row = as_row([], steps, tokenizer)
    sample = {"tokens": row["tokens"], "text": row["text"], "exit_blocks": [step.block for step in steps]}
    return {**sample, "blocks": row["blocks"]} if show_blocks else sample


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


def legend(blocks: int, share_of_blocks: float | None) -> str:
    """The colours of blocks, and the share of them that was computed."""
    if share_of_blocks is None:
        return "nothing was written"
    shades = (f"{colour(j, blocks)}{j}{PLAIN}" for j in range(1, blocks + 1))
    key = f"exit block {' '.join(shades)}; " if sys.stdout.isatty() else ""
    return f"{key}{share_of_blocks:.1%} of the blocks computed"


def _shown(token: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode([token]))
