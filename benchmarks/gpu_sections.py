"""The sections of benchmarks/gpu.py, which see: what each of them tries, and what it finds.

A section's figures are in a file that each of them renews, so that one that fails or is cut off leaves what it had.
`summary` among them is what the page says, in a line.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import PROMPT
from generate import ours as own_text
from generate import transformers as peer_text
from torch.nn import functional as F

from gptlab.benchmark import MODES, contenders
from gptlab.benchmark.contenders import Step, Work, interleave
from gptlab.benchmark.run import MatmulTimes, products
from gptlab.data.shards import write_shard
from gptlab.device import DTYPES, ComputeConfig, Machine, choose_compute
from gptlab.interpret.generate import Sampling, generate_batch
from gptlab.model import GPT, GPTConfig
from gptlab.model.decoder import Weights
from gptlab.model.fast_cpu import install
from gptlab.model.huggingface import to_huggingface
from gptlab.processes import how_it_ended
from gptlab.runs.checkpoint import digest
from gptlab.runs.folder import newest
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training import backward
from gptlab.training.parallel import compile_blocks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))  # for the naive reference, which stands with the tests

from naive_gradients import gradients, naive  # noqa: E402  # pyright: ignore[reportMissingImports]

TINY = GPTConfig(block_size=32, vocab_size=512, n_layer=3, n_head=2, n_embd=32)
REPORT = partial(print, file=sys.stderr, flush=True)


@dataclass
class Section:
    """What one section has found so far, in a file that every figure renews. problems: why it is not ok."""

    file: Path
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, **figures: Any) -> None:
        self.found |= figures
        self.file.write_text(json.dumps(self.found | {"problems": self.problems}), encoding="utf-8")

    def expect(self, fine: bool, otherwise: str) -> None:
        if not fine:
            self.problems.append(otherwise)
            self.note()

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda:0"

    def compute(self, dtype: str, *, compile: bool = False, deterministic: bool = False) -> ComputeConfig:
        """How this process computes from here on."""
        chosen = choose_compute(
            Machine.probe(), device=self.device, dtype=dtype, threads=int(self.tiny),
            compile="on" if compile else "off", deterministic=deterministic,
        )  # fmt: skip
        chosen.apply()
        return chosen

    def ready(self, model: GPT, compute: ComputeConfig, rehearse: Callable[[GPT], object]) -> GPT:
        """A model where it computes, its blocks compiled if that is asked for; that they cannot be is a problem."""
        model = model.to(compute.device)
        install(model, compute)
        done = compile_blocks(model, compute, partial(rehearse, model))
        self.expect(done.startswith("compiled") or not compute.compile, done)
        return model


SIGNAL_CASES: dict[str, dict[str, Any]] = {
    "none": {},
    **{s: {"name": s} | ({"threshold": 0.05} if SIGNALS[s].has_threshold else {}) for s in SIGNALS},
    **{f"{s}, live": {"name": s, "evaluator": "live"} for s in ("confidence", "brier", "advantage")},
    "rotate": {"name": "confidence", "layers": "rotate"},
    "local": {"name": "confidence", "reach": "local"},
    "no embeddings": {"name": "confidence", "embeddings": False},
    "placebo": {"name": "confidence", "control": "placebo"},
    "placebo, live": {"name": "confidence", "control": "placebo", "evaluator": "live"},
    "shuffled": {"name": "confidence", "control": "shuffled"},
    "flipped": {"name": "deep_supervision", "control": "flipped"},
    "flipped to argmax": {"name": "deep_supervision", "control": "flipped", "flip_to": "argmax"},
}
FARTHEST = {"fp64": 1e-9, "fp32": 1e-4, "fp32 compiled": 1e-4, "tf32": 0.05, "bf16": 0.2, "bf16 compiled": 0.2}
"""The most that a gradient may differ from the reference, by norms. Rounding may move a token over a threshold."""


def parity(section: Section) -> None:
    """Every signal and control on the device, against a naive reference on the CPU in float64."""
    narrow: dict[str, Any] = {"block_size": 16, "vocab_size": 64, "n_embd": 32} if section.tiny else {}
    config = GPTConfig(**{"block_size": 128, "vocab_size": 1024, "n_layer": 4, "n_head": 2, "n_embd": 128, **narrow})
    keys = {"step": 3, "seed": 1}

    def make() -> GPT:
        model = GPT(config, seed=1)
        with torch.no_grad():
            model.wte.weight.mul_(6)  # so that blocks are sure of something and thresholds are passed
        return model.double()

    tokens, targets = Work(config, 4).data(torch.device("cpu"))
    with torch.no_grad():
        for j, h in enumerate(make().hidden_states(tokens)):
            targets[:, j] = make().read(h)[:, j].argmax(-1)  # some blocks are right, which one signal asks for
    signals = {name: SignalConfig(**options, weight=1.0) if options else None for name, options in SIGNAL_CASES.items()}
    plain = SignalConfig("confidence", weight=0.0)
    expected = {name: _flat(naive(s or plain, False, **keys, data=(tokens, targets), make=make)[0])
                for name, s in signals.items()}  # fmt: skip
    for name in signals:
        moved = _distance(expected[name], expected["none"])
        section.expect(name == "none" or moved > 1e-3, f"{name}: nothing to compare, it adds {moved:.0e} of the loss")

    tf32 = not section.tiny and torch.cuda.get_device_capability() >= (8, 0)
    differences: dict[str, dict[str, float]] = {}
    for column in [c for c in FARTHEST if tf32 or c != "tf32"]:
        dtype, _, compiled = column.partition(" ")
        compute = section.compute("fp32" if dtype == "fp64" else dtype, compile=bool(compiled))
        x, y = tokens.to(compute.device), targets.to(compute.device)
        run = partial(backward, tokens=x, targets=y, **keys, autocast=compute.autocast)
        model = section.ready(make().to(torch.float64 if dtype == "fp64" else torch.float32), compute, run)
        differences[column] = {}
        for name, config_of in signals.items():
            model.zero_grad(set_to_none=True)
            run(model, signal_config=config_of)
            differences[column][name] = far = _distance(_flat(gradients(model)), expected[name])
            section.expect(far <= FARTHEST[column], f"{name} in {column} is {far:.1e} from the reference")
        worst = {c: max(of.items(), key=lambda item: item[1]) for c, of in differences.items()}
        said = [f"{c}: at most {far:.0e} from the reference ({case})" for c, (case, far) in worst.items()]
        section.note(differences=differences, summary=said)


def _flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([named[name].detach().double().cpu().flatten() for name in sorted(named)])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    far = float((a - b).norm() / b.norm())
    return far if math.isfinite(far) else math.inf


def determinism(section: Section) -> None:
    """The same gradient three times, to the bit: with --deterministic it must be, else it is said."""
    work = Work(TINY, 2) if section.tiny else Work(GPTConfig(), 8)
    bits: dict[str, bool] = {}
    for deterministic in (True, False):  # in this order: PyTorch reads cuBLAS's setting at the first product
        for compiled in (False, True):
            compute = section.compute("bf16", compile=compiled, deterministic=deterministic)
            run = partial(backward, **dict(zip(("tokens", "targets"), work.data(compute.device), strict=True)))
            run = partial(run, autocast=compute.autocast)
            model = section.ready(GPT(work.config), compute, run)
            for name in ("baseline", "exact"):
                key = f"{name}, {'compiled' if compiled else 'eager'}{', --deterministic' * deterministic}"
                once = partial(run, model, signal_config=SignalConfig(**MODES.get(name, {})))
                bits[key] = _repeats(model, once)
                section.note(repeats=bits, summary=[f"{k}: {'same' if v else 'other'} bits" for k, v in bits.items()])
                needed = deterministic or section.tiny
                section.expect(bits[key] or not needed, f"{key}: the same gradient came out in other bits")


def _repeats(model: GPT, once: Callable[[], object]) -> bool:
    kept: list[torch.Tensor] = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        once()
        kept.append(_flat(gradients(model)))
    return all(torch.equal(kept[0], again) for again in kept[1:])


def resume(section: Section) -> None:
    """A run stopped by SIGTERM and continued, against one that was not: bit for bit, or how far apart."""
    steps = 80 if section.tiny else 200
    small = "--n_layer 2 --n_embd 32 --n_head 2 --block_size 32 --total_batch_tokens 128 --batch_size 2"
    options = (
        f"--data markov:tokens=400000 --steps {steps} --device {section.device} --threads 1 --compile off "
        f"--log_every 1 --eval_every {steps} --eval_tokens 4096 --checkpoint_every {steps} --sample_every 0 "
        f"--dose_every 0 --resume auto {small if section.tiny else ''}"
    ).split()
    summary: list[str] = []
    for name, more in (("as shipped", []), ("--deterministic", ["--deterministic"]))[: 1 if section.tiny else 2]:
        runs = {kind: section.file.parent / f"{kind} {name}" for kind in ("whole", "stopped")}
        command = [sys.executable, str(ROOT / "train_gpt2_ben.py"), *options, *more, "--out"]
        ends = [_train([*command, str(runs["stopped"])], stop_at=steps // 2)]
        ends += [_train([*command, str(runs[kind])]) for kind in ("stopped", "whole")]
        section.expect(ends == [75, 0, 0], f"{name}: expected exit codes 75, 0 and 0, found {ends}")
        equal = digest(newest(runs["whole"])) == digest(newest(runs["stopped"]))
        (whole, again) = ([row["loss"] for row in _rows(runs[kind], "train")] for kind in runs)
        apart = max(abs(a - b) / a for a, b in zip(whole, again, strict=True))
        summary += [f"{name}: {'bit for bit' if equal else f'losses up to {apart:.0e} apart'}"]
        section.note(**{name: {"bit for bit": equal, "losses apart": apart}}, summary=summary)
        section.expect(equal or not (more or section.tiny), f"{name}: the continued run ended in other bits")
        section.expect(apart < 0.1, f"{name}: losses of the continued run are up to {apart:.1%} away")


def _train(command: Sequence[str], stop_at: int = 0) -> int:
    """A trainer's exit code, sent SIGTERM once it has printed update `stop_at`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            REPORT(line, end="")
            if line.split()[1:3] == ["train", "loss"] and int(line.split()[0]) == stop_at > 0:
                run.send_signal(signal.SIGTERM)
    return run.returncode


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == kind]


def whole_step(work: Work, compute: ComputeConfig) -> Step:
    """A step as nanoGPT makes it: the same model, compiled as one graph, with one loss over all logits."""
    model = GPT(work.config).to(compute.device)
    tokens, targets = work.data(compute.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    return contenders.plain_step(model, optimizer, loss, compute)


def speed(section: Section) -> None:
    """Whole updates, compiled, interleaved: the block loss, and peers compiled as whole models."""
    compute = section.compute("bf16", compile=True)
    config = TINY if section.tiny else GPTConfig(vocab_size=50304)
    most = 0 if section.tiny else torch.cuda.mem_get_info()[1]
    peers = {"whole model": whole_step, "transformers": contenders.transformers_step}
    groups = [(2 if section.tiny else 16, tuple(MODES), "whole model"), (3 if section.tiny else 64, (), "whole model"),
              (2 if section.tiny else 16, (), "transformers")]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for batch, modes, peer in groups:
        if batch == 64 and most < 60 * 2**30:
            continue
        work, names = Work(config, batch), ("baseline", *modes)
        mine = contenders.ours(work, compute, [SignalConfig(**MODES.get(name, {})) for name in names])
        steps = dict(zip(names, mine, strict=True)) | {peer: peers[peer](work, compute)}
        timings = interleave(steps, 2 if section.tiny else 5, 1 if section.tiny else 4, REPORT)
        times = MatmulTimes(compute)
        needed = {n: products(config, work.tokens, SignalConfig(**MODES.get(n, {}))) for n in names}
        for of_name in needed.values():
            times.measure(of_name)
        for name, timing in timings.items():
            limit = times.seconds(needed[name]) / timing.median if name in needed else None
            rows.append({"name": name, "batch": batch, "tokens_per_second": work.tokens / timing.median,
                         "spread": timing.spread, "share_of_limit": limit,
                         "against_peer": timings[peer].median / timing.median, "peer": peer})  # fmt: skip
        section.note(rows=rows, tokens=config.block_size)
        del steps, mine
        torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]


def torchrun(section: Section) -> None:
    """The launcher as a user starts it, on all GPUs (--tiny: two processes), with a corpus of drawn tokens."""
    data, out = section.file.parent / "drawn", section.file.parent / "launched"
    data.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train_000001", 40_000 if section.tiny else 12_000_000), ("val_000000", 600_000)):
        tokens = np.minimum(generator.zipf(1.2, count), 50256).astype(np.uint16)
        write_shard(data / f"drawn_{split}.bin", tokens)
    processes = 2 if section.tiny else torch.cuda.device_count()
    small = "--n_layer 2 --n_embd 32 --n_head 2 --block_size 32 --batch_size 2 --total_batch_tokens 128 --threads 1"
    options = f"--preset gpt2-124m --data {data} --out {out} --steps 12 --eval_every 6 --checkpoint_every 6 "
    options += "--sample_every 0 --log_every 1 --eval_tokens 65536"
    where = f"{small} --eval_tokens 512 --compile off --device cpu" if section.tiny else "--device cuda"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    code = _train([*launcher, str(ROOT / "train_gpt2.py"), *options.split(), *where.split()])
    section.expect(code == 0, f"torchrun {how_it_ended(code)}")
    rows = _rows(out, "train")
    section.expect(len(rows) == 12, f"expected 12 updates, found {len(rows)}")
    rate = statistics.median([row["tokens_per_second"] for row in rows][3:])
    section.note(processes=processes, tokens_per_second=rate, mfu=rows[-1]["mfu"],
                 summary=[f"{processes} process(es), {rate:,.0f} tokens/s"])  # fmt: skip


def generate(section: Section) -> None:
    """Greedy text against transformers' generate; each token of it is the likeliest of a plain forward pass too."""
    compute = section.compute("fp32")
    model = GPT(TINY if section.tiny else GPTConfig(), seed=2).to(compute.device)
    new, rows, summary = 12 if section.tiny else 96, list[dict[str, Any]](), list[str]()
    for dtype, batch in ((d, b) for d in DTYPES for b in (1, 8)):
        weights = Weights(model, DTYPES[dtype])
        peer: Any = to_huggingface(model)
        peer = peer.to(compute.device, DTYPES[dtype])
        who = {"gptlab": partial(own_text, weights, batch, new), "transformers": partial(peer_text, peer, batch, new)}
        timings = interleave(who, 2 if section.tiny else 3, report=REPORT)
        rates = {name: batch * new / timing.median for name, timing in timings.items()}
        rows.append({"dtype": dtype, "texts": batch, **rates})
        ratio = rates["gptlab"] / rates["transformers"]
        summary += [f"{dtype}, {batch} at once: {rates['gptlab']:,.0f} tokens/s, {ratio:.2f}x transformers"]
        section.note(rows=rows, summary=summary)
    written = [step[0] for step in generate_batch(model, PROMPT, new, Sampling(0), generators=[None])]
    text = torch.tensor([*PROMPT, *(step.token for step in written if step)], device=compute.device)
    with torch.no_grad():
        logits = model(text[None, :-1])[0, len(PROMPT) - 1 :]
    behind = float((logits.max(1).values - logits.gather(1, text[len(PROMPT) :, None])[:, 0]).max())
    section.note(behind=behind)
    section.expect(behind < 1e-3, f"a token of the text is {behind:.1e} behind the likeliest")


SECTIONS: dict[str, Callable[[Section], None]] = {
    "parity": parity, "determinism": determinism, "resume": resume, "speed": speed, "torchrun": torchrun,
    "generate": generate,
}  # fmt: skip


def main(name: str, file: str, *tiny: str) -> int:
    """A section, in a process that is its own. tiny: anything, for a CPU."""
    section, machine = Section(Path(file), bool(tiny)), Machine.probe()
    where = machine.processor if tiny else machine.gpus[0]
    section.note(machine=where, torch=torch.__version__, date=date.today().isoformat())
    if tiny:  # through dynamo and AOTAutograd, without minutes of C++
        torch.compile = partial(torch.compile, backend="aot_eager")
    SECTIONS[name](section)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
