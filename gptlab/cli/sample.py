"""`gptlab sample`: write on from a prompt, streamed to the terminal. Drawing tokens is interpret/generate.py's."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser
from gptlab.cli.terminal import printable
from gptlab.errors import UsageError

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.interpret.generate import Step
    from gptlab.model.gpt import GPT


def main(argv: list[str]) -> int:
    """Write samples; raises UsageError, and CheckpointError where there is no model."""
    options = _parse(argv)

    import torch

    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.device import Machine, decide
    from gptlab.interpret.generate import generate
    from gptlab.randomness import torch_generator

    model, name = _open(options.checkpoint)
    tokenizer = get_tokenizer(name)
    prompt = tokenizer.encode(options.prompt).tolist() or [tokenizer.document_start]
    placement = decide(Machine.probe(), device=options.device, dtype=options.dtype, n_embd=model.config.n_embd)
    placement.apply()
    model.to(placement.device).eval()
    cast = torch.autocast(placement.device.type, placement.autocast) if placement.autocast else nullcontext()
    samples = []
    for n in range(options.samples):
        with cast:
            steps = generate(
                model,
                prompt,
                options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
                generator=torch_generator("sample", options.seed, n),
            )
            if options.json:
                samples.append(_as_json(list(steps), tokenizer, show_blocks=options.show_blocks))
                continue
            if n:
                print("\n" + "-" * 20)
            for text in _blocks(steps, tokenizer) if options.show_blocks else _text(prompt, steps, tokenizer):
                print(text, end="", flush=True)
            print()
    if options.json:
        print(json.dumps({"samples": samples}))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="gptlab sample", description="Write on from a prompt.")
    add = parser.add_argument
    add("--checkpoint", metavar="RUN|FOLDER", required=True, help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--prompt", metavar="TEXT", default="\n", help="what to write on from [a line break]")
    add("--max_new_tokens", metavar="N", type=int, default=200, help="tokens to write, exactly [200]")
    add("--temperature", metavar="T", type=float, default=0.8, help="0 = always the likeliest token [0.8]")
    add("--top_k", metavar="K", type=int, help="draw from the K likeliest tokens only [all]")
    add("--top_p", metavar="P", type=float, default=1.0, help="from the fewest that hold P of the probability [1.0]")
    add("--seed", metavar="N", type=int, default=1, help="the same seed draws the same text [1]")
    add("--samples", metavar="N", type=int, default=1, help="how many texts [1]")
    add("--show_blocks", action="store_true", help="a line per token: each block's best next token and its probability")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matmuls [fp32]")
    add("--json", action="store_true", help='print {"samples": [{"tokens", "text", "exit_blocks"}]}, tokens as written')
    options = parser.parse(argv)
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 1), ("samples", 1)):
        found = getattr(options, name)
        if found is not None and not least <= found < float("inf"):
            raise UsageError(f"--{name}: expected a number of at least {least}, found {found}")
    if not 0 < options.top_p <= 1:
        raise UsageError(f"--top_p: expected a number above 0 and at most 1, found {options.top_p}")
    return options


def _open(source: str) -> tuple[GPT, str]:
    """The model that `source` names, and the name of its tokenizer."""
    from gptlab.runs.initial import any_model

    model, config = any_model(source)
    if config is None:
        return model, "bytes" if model.config.vocab_size <= 256 else "gpt2"
    return model, config.tokenizer


def _text(prompt: list[int], steps: Iterator[Step], tokenizer: Tokenizer) -> Iterator[str]:
    """The prompt, dimmed on a terminal, then every piece of text as soon as its tokens make whole characters."""
    given = printable(tokenizer.decode(prompt))
    yield f"\033[2m{given}\033[0m" if sys.stdout.isatty() else given
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for step in steps:
        yield printable(decoder.decode(tokenizer.token_bytes(step.token)))
    yield printable(decoder.decode(b"", final=True))


def _blocks(steps: Iterator[Step], tokenizer: Tokenizer) -> Iterator[str]:
    """A line per token: what was written, then for block 1 to L its best next token and how sure it was of it."""
    for step in steps:
        guesses = (f"{_shown(b, tokenizer):>8} {p:4.0%}" for b, p in zip(step.best, step.probability, strict=True))
        yield f"{_shown(step.token, tokenizer):>8}  |{'  '.join(guesses)}\n"


def _shown(token: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode([token]))


def _as_json(steps: list[Step], tokenizer: Tokenizer, *, show_blocks: bool) -> dict[str, Any]:
    tokens = [step.token for step in steps]
    sample: dict[str, Any] = {
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "exit_blocks": [len(step.best) for step in steps],  # every token is read from the last block
    }
    if show_blocks:
        sample["blocks"] = [
            [[tokenizer.decode([b]), round(p, 4)] for b, p in zip(step.best, step.probability, strict=True)]
            for step in steps
        ]
    return sample
