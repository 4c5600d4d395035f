"""How fast text is written: GPT-2 124M with drawn weights against transformers' `generate`, interleaved in one process.

    python benchmarks/generate.py [--rounds N] [--tokens N] [--batches 1,8] [--dtypes fp32,bf16] [--n_layer N]

Greedy, from a prompt of 16 tokens, every contender to the same length; a turn begins with one text that is not timed.
Beside them the linear layers and the head alone, as a token needs them: no more than that can be reached. Writes
benchmarks/results/measured.json and the table of docs/performance.md, unless --n_layer makes it a trial. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import keep, measured, rewrite

from gptlab.benchmark.contenders import Timing, interleave
from gptlab.cli.arguments import Parser
from gptlab.data.tokenizers import GPT2Tokenizer
from gptlab.device import DTYPES, Machine, choose_compute, keep_freed_memory
from gptlab.interpret.generate import Sampling, generate_batch
from gptlab.model.decoder import Weights
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import to_huggingface

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- measured by benchmarks/generate.py -->", "<!-- end of what generate.py measured -->"
PROMPT = list(range(100, 116))


def main(argv: list[str]) -> int:
    """Measure, print a table, and keep the figures."""
    parser = Parser(prog="benchmarks/generate.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--n_layer", type=int, default=12)
    options = parser.parse(argv)
    machine = Machine.probe()
    placement = choose_compute(machine, device="cpu")
    placement.apply()
    model = GPT(GPTConfig(n_layer=options.n_layer, vocab_size=GPT2Tokenizer.vocab_size))
    steps: dict[str, Callable[[], Any]] = {}
    written: dict[str, int] = {}
    for dtype in options.dtypes.split(","):
        theirs: Any = to_huggingface(model)
        weights, theirs = Weights(model, DTYPES[dtype]), theirs.to(DTYPES[dtype])
        for batch in map(int, options.batches.split(",")):
            for name, step in (
                ("gptlab", partial(ours, weights, batch, options.tokens)),
                ("transformers", partial(transformers, theirs, batch, options.tokens)),
                ("products alone", partial(products, weights, batch, options.tokens)),
            ):
                steps[f"{name} {dtype} {batch}"], written[f"{name} {dtype} {batch}"] = step, batch * options.tokens
    timings = interleave(steps, options.rounds, report=partial(print, file=sys.stderr, flush=True))
    rows = [row(name, timing, written[name], timings) for name, timing in timings.items()]
    for found in rows:
        print("{name:<26} {tokens_per_second:8.1f} tokens/s ±{spread:.1%}  {ratio:.2f}x transformers".format(**found))
    if options.n_layer == GPTConfig().n_layer:
        about = {"processor": machine.processor, "threads": placement.threads, "date": date.today().isoformat()}
        about |= {"command": " ".join(["python benchmarks/generate.py", *argv]), "tokens": options.tokens}
        about |= {"rounds": options.rounds}
        earlier = measured("generate")["earlier"]  # another machine's, which the page names
        keep("generate", {**about, "rows": rows, "earlier": earlier})
        rewrite(PAGE, START, END, table({**about, "rows": rows}))
    return 0


def row(name: str, timing: Timing, written: int, timings: dict[str, Timing]) -> dict[str, Any]:
    """A contender's rate, and its ratio to transformers' at the same dtype and batch."""
    _, dtype, batch = name.rsplit(" ", 2)
    ratio = timings[f"transformers {dtype} {batch}"].median / timing.median
    return {"name": name, "tokens_per_second": written / timing.median, "spread": timing.spread, "ratio": ratio}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"GPT-2 124M, {found['tokens']} tokens a text, {found['threads']} threads, medians of {found['rounds']} "
        f"interleaved rounds; {found['processor']}, {found['date']}.",
        "",
        f"`{found['command']}`",
        "",
        "| who | dtype | texts at once | tokens/s | ± | against transformers |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        name, dtype, batch = row["name"].rsplit(" ", 2)
        rate, spread = f"{row['tokens_per_second']:,.1f}", f"{row['spread']:.1%}"
        lines.append(f"| {name} | {dtype} | {batch} | {rate} | {spread} | {row['ratio']:.2f}x |")
    return "\n".join([*lines, "", ""])


def ours(weights: Weights, batch: int, tokens: int) -> None:
    """Texts side by side through this project's decoder."""
    keep_freed_memory(True)
    for _ in generate_batch(weights, PROMPT, tokens, Sampling(temperature=0), generators=[None] * batch):
        pass


@torch.no_grad()
def transformers(model: Any, batch: int, tokens: int) -> None:
    """The same through transformers, as its users call it; no end token, so that every text is as long."""
    keep_freed_memory(False)
    prompt = torch.tensor([PROMPT], device=model.device).expand(batch, -1)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def products(weights: Weights, batch: int, tokens: int) -> None:
    """The products of as many tokens with what a decoder multiplies by, and nothing else."""
    c = weights.config
    narrow, wide = (torch.ones(batch, width, dtype=weights.dtype) for width in (c.n_embd, 4 * c.n_embd))
    for _ in range(tokens):
        for block in weights.blocks:
            for product, x in ((block.c_attn, narrow), (block.attn_proj, narrow), (block.c_fc, narrow)):
                product(x)
            block.mlp_proj(wide)
        weights.head(narrow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
