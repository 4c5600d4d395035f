"""The arithmetic of docs/scale.md: memory and traffic of GPT-2 on many GPUs. Pure functions, and the tables from them.

    python tools/scale.py     writes the tables: what stands between <!-- computed: NAME --> and <!-- end of NAME -->

Nothing here is measured but what the table `checked` compares with. `parallel` is ddp (every process holds the model)
or fsdp (it holds 1/N of every block and all of the rest, and a block is whole only while a pass goes through it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptlab.benchmark import SIZES
from gptlab.model.gpt import GPTConfig
from gptlab.options import build
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import CHUNK_BYTES
from gptlab.training.config import TrainingConfig, flops_per_token
from gptlab.training.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
MARK = re.compile(r"<!-- computed: (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)

NAMES = {"124M": "gpt2-124m", "350M": "gpt2-350m", "774M": "gpt2-774m", "1.5B": "gpt2-1558m"}
GPUS = (1, 8, 16, 64)
GPUS_A_NODE = 8
FP32, BF16 = 4, 2
NVLINK = 450e9
"""Bytes a second, each way: an H100's NVLink."""
ETHERNET = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9}
"""Bytes a second, each way, of the one link that joins a node to the others."""
ARITHMETIC = 0.4 * 989e12
"""FLOP/s of a GPU: two fifths of an H100's peak in bf16."""


@dataclass(frozen=True)
class State:
    """Bytes that a process holds from update to update, and `working`: the copies of weights that a pass needs."""

    weights: float
    gradients: float
    moments: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.working


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends in an update: within its blocks' all-gather and reduce-scatter, and in all-reduces."""

    gathered: float
    scattered: float
    reduced: float

    @property
    def total(self) -> float:
        return self.gathered + self.scattered + self.reduced


def shape(config: TrainingConfig) -> GPTConfig:
    """The model that a run trains."""
    c = config
    return GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.share_blocks)


def preset(name: str) -> TrainingConfig:
    """The run of a model of NAMES, with its preset's batch."""
    return build(TrainingConfig, {**PRESETS[NAMES[name]], "preset": NAMES[name]})


def block_parameters(C: int) -> int:
    """Of one block: four matrices of 12·C² together, their biases, two norms."""
    return 12 * C * C + 13 * C


def rest(model: GPTConfig) -> int:
    """Parameters outside the blocks: both embeddings, of which one is the head, and the last norm."""
    return (model.vocab_size + model.block_size + 2) * model.n_embd


def state(model: GPTConfig, gpus: int, parallel: str) -> State:
    """What a process holds, with AdamW: weights, gradients and two moments in fp32; the head and the blocks' matrices
    in bf16 next to them, of which fsdp has one block's at a time, with its gradient whole, in bf16 and in fp32."""
    C, L = model.n_embd, model.n_layer
    blocks, cut = model.parameters - rest(model), parallel == "fsdp" and gpus > 1
    held = rest(model) + blocks / (gpus if cut else 1)
    one = (BF16 + BF16 + FP32) * block_parameters(C)
    copied = BF16 * model.vocab_size * C + (one if cut else BF16 * L * 12 * C * C)
    return State(FP32 * held, FP32 * held, 2 * FP32 * held, copied)


def block_activations(C: int, heads: int, working: int = BF16) -> int:
    """Bytes that a block keeps of one token for its way back: 36·C and a little in bf16.

    The residual stream before the attention and before the MLP and two norms' mean and deviation are fp32; two norms'
    outputs, queries, keys and values, attention's output, and the MLP's 4·C before and after GELU are in the dtype of
    the matmuls; attention keeps a log-sum a head.
    """
    return 2 * FP32 * C + (1 + 3 + 1 + 1 + 4 + 4) * working * C + 4 * FP32 + FP32 * heads


def activations(model: GPTConfig, tokens: int, *, recompute: bool = False, judges: int = 0) -> int:
    """Bytes of a micro-batch's activations, once all blocks have been read.

    recompute: every block keeps its input alone (`--activation_checkpointing`), and one block at a time the rest. Each
    judge's verdict waits as a gradient (C) in fp32 for the way down. Logits, of which
    there are never more than CHUNK_BYTES, are not among them.
    """
    C, L = model.n_embd, model.n_layer
    inside = block_activations(C, model.n_head)
    kept = FP32 * C * L + inside if recompute else inside * L
    return tokens * (kept + FP32 * C + judges * FP32 * C)


def traffic(
    model: GPTConfig, gpus: int, parallel: str, *, micro_batches: int = 1, judges: int = 0, gathered: int = BF16
) -> Traffic:
    """What a process sends in an update, over rings.

    Each of N sends (N-1)/N of a tensor to gather or to scatter it, and twice that to reduce it everywhere. ddp reduces
    the gradient once an update, in fp32. fsdp reduces that of what is not cut, and in every micro-batch gathers each
    block for the way up, for the way down and for a judge's verdict, at `gathered` bytes a number (bf16, on a CPU
    fp32), and scatters its gradient in fp32.
    """
    ring = (gpus - 1) / gpus
    if parallel == "ddp":
        return Traffic(0, 0, 2 * ring * FP32 * model.parameters)
    one, L = block_parameters(model.n_embd), model.n_layer
    passes = micro_batches * (2 * L + judges)
    scattered = micro_batches * L * ring * FP32 * one
    return Traffic(passes * ring * gathered * one, scattered, 2 * ring * FP32 * rest(model))


def micro_batches(config: TrainingConfig, gpus: int) -> tuple[int, int]:
    """Sequences of a micro-batch and how many of them an update has, of each process."""
    size = config.micro_batch(gpus)
    return size, config.sequences // gpus // size


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 9.995e9 else f"{size / 1e9:,.1f}"


def _table(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") - 1
    rule = "|---|" + "---:|" * (columns - 1)
    return "\n".join([head, rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def state_table() -> str:
    rows = []
    for name in NAMES:
        model = shape(preset(name))
        for parallel, gpus in [("ddp", 1), *(("fsdp", n) for n in GPUS[1:])]:
            held = state(model, gpus, parallel)
            parts = (held.weights, held.gradients, held.moments, held.working, held.total)
            where = "any number" if parallel == "ddp" else str(gpus)
            rows.append([f"{name}, {parallel}", where, *map(_gb, parts)])
    return _table("| model | GPUs | weights | gradients | AdamW moments | for a pass | together |", rows)


def activation_table() -> str:
    rows = []
    for name in NAMES:
        config = preset(name)
        model, judges = shape(config), config.n_layer - 1
        sequences = {gpus: micro_batches(config, gpus)[0] for gpus in GPUS}
        for size in dict.fromkeys(sequences.values()):
            cells = [
                activations(model, size * model.block_size, recompute=recompute, judges=n)
                for recompute in (False, True)
                for n in (0, judges)
            ]
            rows.append([name, ", ".join(str(g) for g in GPUS if sequences[g] == size), str(size), *map(_gb, cells)])
    return _table("| model | GPUs | sequences | all kept | and block losses | checkpointed | and block losses |", rows)


def sent(config: TrainingConfig, gpus: int) -> list[float]:
    """Bytes under ddp, under fsdp, and under fsdp with every block judged."""
    model, (_, times) = shape(config), micro_batches(config, gpus)
    judged = [traffic(model, gpus, "fsdp", micro_batches=times, judges=n).total for n in (0, config.n_layer - 1)]
    return [traffic(model, gpus, "ddp").total, *judged]


def traffic_table() -> str:
    rows = []
    for name in NAMES:
        config = preset(name)
        rows += [[name, str(n), str(micro_batches(config, n)[1]), *map(_gb, sent(config, n))] for n in GPUS[1:]]
    return _table("| model | GPUs | micro-batches | ddp | fsdp | fsdp, block losses |", rows)


def seconds_table() -> str:
    rows = []
    for name in NAMES:
        config = preset(name)
        for gpus in GPUS[1:]:
            flops = [flops_per_token(replace(config, signal=SignalConfig(s))) for s in ("none", "confidence")]
            busy = [f"{config.total_batch_tokens * f / gpus / ARITHMETIC:.2f}" for f in flops]
            for link, speed in ({"NVLink": NVLINK} if gpus <= GPUS_A_NODE else ETHERNET).items():
                times = [f"{size / speed:.2g}" for size in sent(config, gpus)]
                rows.append([name, str(gpus), link, *times, *busy])
    return _table(
        "| model | GPUs | slowest link | ddp | fsdp | fsdp, block losses | computing | computing, block losses |", rows
    )


def checked_table() -> str:
    """What the benchmark measured of a process on a CPU, and what the functions above say of it."""
    rows = []
    measured = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text(encoding="utf-8"))
    for name in ("small", "124m"):
        found = measured[name]
        peaks = {row["name"]: row["peak_memory_bytes"] for row in found["rows"]}
        size: dict[str, Any] = {key: value for key, value in SIZES[name].items() if key != "batch"}
        model = GPTConfig(**size)
        tokens, scores = found["batch"] * model.block_size, BF16 * model.n_head * model.block_size * model.n_layer
        for mode, judges in (("baseline", 0), ("exact", model.n_layer - 1)):
            said = state(model, 1, "ddp").total + activations(model, tokens, judges=judges) + tokens * scores
            logits = min(CHUNK_BYTES, BF16 * tokens * model.vocab_size)
            rows.append([f"{name}, {mode}", _gb(said + logits), _gb(peaks[mode])])
    return _table("| run | computed | measured |", rows)


TABLES: dict[str, Callable[[], str]] = {
    "state": state_table,
    "activations": activation_table,
    "traffic": traffic_table,
    "seconds": seconds_table,
    "checked": checked_table,
}
"""name -> its table, as Markdown"""


def renewed(text: str) -> str:
    """A document with its tables as the functions give them now."""
    return MARK.sub(
        lambda found: f"<!-- computed: {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end of {found[1]} -->", text
    )


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
