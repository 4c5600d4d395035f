"""What a conversation costs an update: peak memory and processor time next to the baseline's, by utterances a sequence.

    python benchmarks/conversation_cost.py    a minute of one core; writes benchmarks/results/measured.json

Each row is a process of its own, forked before anything is computed, that accumulates one micro-batch three times:
`peak_mib` is the kernel's mark of its resident memory, `seconds` the processor time of the fastest, `cost` that over
the baseline's. `all_logits_mib` is what logits at every position of every utterance's sequence would take, which are
never made.
"""

from __future__ import annotations

import multiprocessing
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from figures import keep

from gptlab.device import Machine
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.signals import SignalConfig
from gptlab.training.block_graph import Batch, active_signals
from gptlab.training.block_loss import accumulate

SHAPES = {
    "tiny": (16, GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128)),
    "T128": (4, GPTConfig(block_size=128, vocab_size=50304, n_layer=2, n_head=2, n_embd=64)),
    "T512": (4, GPTConfig(block_size=512, vocab_size=50304, n_layer=2, n_head=2, n_embd=64)),
}
"""Name -> sequences of the micro-batch, model."""
UTTERANCES = ((1, 4), (4, 4), (16, 4))
"""Turns of a sequence, samples of a turn."""
SAY = 2


def signals(turns: int, samples: int) -> list[SignalConfig]:
    """No turns: the baseline."""
    return [SignalConfig("conversation", say=SAY, turns=turns, samples=samples, threshold=1e-6)] if turns else []


def measure(name: str, turns: int, samples: int) -> dict[str, Any]:
    """Peak and time of one row, in this process."""
    torch.set_num_threads(1)
    B, shape = SHAPES[name]
    model, T = GPT(shape, seed=1), shape.block_size
    tokens = torch.randint(shape.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1))
    asked, seconds = signals(turns, samples), []
    for step in range(3):
        started = time.process_time()
        batch = Batch(tokens[:, :-1], tokens[:, 1:], step, 1, 0)
        accumulate(model, batch, active_signals(asked, [0.25] * len(asked)))
        seconds.append(time.process_time() - started)
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return {"peak_mib": peak / 1024, "seconds": min(seconds)}


def main() -> None:
    rows, fork = {}, multiprocessing.get_context("fork")
    for name, (B, shape) in SHAPES.items():
        of_shape = {}
        for turns, samples in ((0, 0), *UTTERANCES):
            with fork.Pool(1) as pool:
                row = pool.apply(measure, (name, turns, samples))
            logits = 4 * B * turns * samples * shape.block_size * shape.vocab_size / 2**20
            label = f"{turns}x{samples}" if turns else "baseline"
            of_shape[label] = row | {"all_logits_mib": logits}
            plain = of_shape["baseline"]
            of_shape[label]["cost"] = row["seconds"] / plain["seconds"]
            of_shape[label]["over_baseline_mib"] = row["peak_mib"] - plain["peak_mib"]
            print(name, label, of_shape[label], flush=True)
        rows[name] = of_shape
    machine = Machine.probe()
    result = {"date": date.today().isoformat(), "processor": machine.processor, "say": SAY, "rows": rows}
    keep("conversation_cost", result)


if __name__ == "__main__":
    main()
