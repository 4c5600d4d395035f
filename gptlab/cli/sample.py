"""`gptlab sample`: write on from a prompt, streamed to the terminal. Drawing tokens is interpret/generate.py's."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser
from gptlab.cli.sample_view import blocks, legend, text
from gptlab.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from gptlab.cli.model import Opened
    from gptlab.interpret.decoder import Weights
    from gptlab.interpret.generate import Step
    from gptlab.signals.tuned_reader import TunedReader


def main(argv: list[str]) -> int:
    """Write samples; raises UsageError, and CheckpointError where there is no model."""
    options = _parse(argv)

    from gptlab.cli.model import open_model
    from gptlab.interpret.decoder import Weights

    opened = open_model(options.checkpoint, options.device, options.dtype)
    weights = Weights(opened.model, opened.placement.autocast)
    tokenizer = opened.tokenizer
    prompt = tokenizer.encode(options.prompt).tolist() or [tokenizer.document_start]
    started = time.perf_counter()
    samples = []
    for number, steps in _texts(opened, weights, prompt, options):
        written = []
        if options.json:
            written = list(steps)
        else:
            if number:
                print("\n" + "-" * 20)
            L, coloured = opened.model.config.n_layer, options.exit_confidence is not None
            shown = blocks if options.show_blocks else text
            for piece in shown(prompt, _kept(steps, written), tokenizer, L if coloured else None):
                print(piece, end="", flush=True)
            print()
        samples.append(written)
    seconds = time.perf_counter() - started
    exits: dict[str, Any] = {}
    if options.exit_confidence is not None:
        exits = {"exit_confidence": options.exit_confidence, **_saved(weights, prompt, samples, seconds)}
    if options.json:
        told = [_as_json(steps, opened, show_blocks=options.show_blocks) for steps in samples]
        print(json.dumps({"samples": told, **exits}))
    elif exits:
        print("\n" + legend(opened.model.config.n_layer, exits))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="gptlab sample", description="Write on from a prompt.")
    add = parser.add_argument
    add("--checkpoint", metavar="RUN|FOLDER", required=True, help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--prompt", metavar="TEXT", default="\n", help="what to write on from [a line break]")
    add("--max_new_tokens", metavar="N", type=int, default=200, help="tokens to write, at most [200]")
    add("--temperature", metavar="T", type=float, default=0.8, help="0 = always the likeliest token [0.8]")
    add("--top_k", metavar="K", type=int, help="draw from the K likeliest tokens only [all]")
    add("--top_p", metavar="P", type=float, default=1.0, help="from the fewest that hold P of the probability [1.0]")
    add("--seed", metavar="N", type=int, default=1, help="the same seed draws the same text [1]")
    add("--samples", metavar="N", type=int, default=1, help="how many texts, written side by side [1]")
    add("--ignore_end", action="store_true", help="write on where a document ends, instead of stopping")
    add("--exit_confidence", metavar="P", type=float, help="take a token from the first block at least so sure [none]")
    add(
        "--reader",
        choices=["raw", "tuned"],
        default="raw",
        help="how blocks are read (`gptlab lens --fit`) [raw]",
    )
    add("--show_blocks", action="store_true", help="a line per token: each block's best next token and its probability")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matmuls [fp32]")
    add("--json", action="store_true", help='print {"samples": [{"tokens", "text", "exit_blocks"}]}, prompt left out')
    options = parser.parse(argv)
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 1), ("samples", 1)):
        found = getattr(options, name)
        if found is not None and not least <= found < float("inf"):
            raise UsageError(f"--{name}: expected a number of at least {least}, found {found}")
    for name in ("top_p", "exit_confidence"):
        if (found := getattr(options, name)) is not None and not 0 < found <= 1:
            raise UsageError(f"--{name}: expected a number above 0 and at most 1, found {found}")
    return options


def _texts(
    opened: Opened, weights: Weights, prompt: list[int], options: argparse.Namespace
) -> Iterator[tuple[int, Iterator[Step]]]:
    """Every text with its number. Side by side, the first streams and the others come whole after it."""
    from functools import partial

    from gptlab.interpret.generate import Sampling, generate, generate_batch
    from gptlab.randomness import torch_generator

    tokenizer, numbers = opened.tokenizer, range(options.samples)
    generators = [torch_generator("sample", options.seed, n) for n in numbers]
    how: dict[str, Any] = {
        "sampling": Sampling(options.temperature, options.top_k, options.top_p),
        "vocab_size": min(tokenizer.vocab_size, opened.model.config.vocab_size),
        "end": None if options.ignore_end else tokenizer.document_start,
        "show_blocks": options.show_blocks,
    }
    start = partial(generate, weights, prompt, options.max_new_tokens, **how)
    if options.exit_confidence is not None:
        early = partial(start, exit_confidence=options.exit_confidence, reader=_reader(opened, options))
        yield from ((n, early(generator=generators[n])) for n in numbers)
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


def _kept(steps: Iterator[Step], into: list[Step]) -> Iterator[Step]:
    for step in steps:
        into.append(step)
        yield step


def _reader(opened: Opened, options: argparse.Namespace) -> TunedReader | None:
    """The reader that was asked for; raises CheckpointError where a tuned one is missing or another model's."""
    from gptlab.signals.tuned_reader import beside, load

    if options.reader == "raw":
        return None
    reader = load(opened.model, path := beside(options.checkpoint))
    if reader is None:
        raise CheckpointError(f"expected a tuned reader at {path}, found none; fit it with `gptlab lens --fit`")
    return reader


def _saved(weights: Weights, prompt: list[int], samples: list[list[Step]], seconds: float) -> dict[str, Any]:
    """What early exit saved: the share of blocks computed, and the time the full model takes for as many tokens."""
    from gptlab.interpret.generate import generate

    started = time.perf_counter()
    for steps in samples:
        for _ in generate(weights, prompt, len(steps)):
            pass
    in_full = time.perf_counter() - started
    depths = [step.block for steps in samples for step in steps]
    return {
        "share_of_blocks": sum(depths) / (len(depths) * weights.config.n_layer) if depths else None,
        "seconds": seconds,
        "seconds_in_full": in_full,
        "gain": in_full / seconds if depths else None,
    }


def _as_json(steps: list[Step], opened: Opened, *, show_blocks: bool) -> dict[str, Any]:
    decode, tokens = opened.tokenizer.decode, [step.token for step in steps]
    sample: dict[str, Any] = {
        "tokens": tokens,
        "text": decode(tokens),
        "exit_blocks": [step.block for step in steps],
    }
    if show_blocks:
        sample["blocks"] = [
            [[decode([b]), round(p, 4)] for b, p in zip(step.best, step.probability, strict=True)] for step in steps
        ]
    return sample
