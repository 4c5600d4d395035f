"""Does the branch test tell noise from bias? Trials on real branches, of signals that are one or the other by make.

    python benchmarks/branch.py --trials 50 --jobs 2 --out benchmarks/results/branch.json

Every branch is of ordinary updates: AdamW with the checkpoint's moments, clipped. Of four arms the answer is known:

- gradient bias: a Gaussian direction over all parameters, the same in every step and whatever the batch;
- gradient noise: such a direction, fresh each step;
- signal bias: a direction at the judge's logits that is fixed for the trial; what of its gradient hangs on the batch is
  noise after all, so that where its mean does little, both may be there;
- signal noise: a direction at the logits that is drawn again for every sequence, with mean 0.

A trial has its own direction, data seeds and, with the others of its turn, checkpoint. It adds to the trials and
arms that the file of results already holds. The signals are registered in this process only.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from gptlab.analysis.noise.branching import Arm, GradientBias, GradientNoise, Plan, branch_test
from gptlab.cli.data import open_or_prepare
from gptlab.cli.main import main as gptlab
from gptlab.data.corpus import Corpus
from gptlab.device import ComputeConfig, Machine
from gptlab.distributed import World
from gptlab.randomness import torch_generator
from gptlab.signals import SIGNALS, Signal, SignalConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "branch.json"
EXPECTED = {"gradient_bias": "bias", "gradient_noise": "noise", "signal_bias": "bias", "signal_noise": "noise"}
DOSE = 1.0
CHECKPOINTS = 5
STEPS, SEEDS, EVAL_TOKENS = 10, 24, 4096
RUN = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 32, "total_batch_tokens": 256, "batch_size": 64,
    "steps": 20, "learning_rate": 0.003, "warmup_steps": 10, "schedule": "constant", "eval_tokens": EVAL_TOKENS,
    "eval_every": 0, "sample_every": 0, "log_every": 0, "threads": 1, "dtype": "fp32", "device": "cpu",
}  # fmt: skip


def fixed_direction(trial: int) -> Signal:
    """r·z, with one direction r for all tokens of all batches."""

    def signal(logits: Tensor, targets: Tensor) -> Tensor:
        r = torch.randn(logits.shape[1], generator=torch_generator("fixed direction", trial))
        return logits @ r.to(logits.dtype)

    return _registered("fixed_direction", signal)


def fresh_direction(trial: int) -> Signal:
    """r·z, with a direction r for every sequence, drawn by what the sequence is and so without any mean."""

    def signal(logits: Tensor, targets: Tensor) -> Tensor:
        z = logits.unflatten(0, (-1, RUN["block_size"]))
        rows = [
            torch.randn(z.shape[2], generator=torch_generator("fresh direction", trial, *sequence))
            for sequence in targets.view(z.shape[:2]).tolist()
        ]
        return (z @ torch.stack(rows).to(z.dtype)[:, :, None]).flatten()

    return _registered("fresh_direction", signal)


def _registered(name: str, function: Any) -> Signal:
    signal = Signal(name, "r·z", "benchmarks/branch.py", uses_truth=True)
    signal.__dict__["function"] = function  # in place of the one that `Signal` would look up
    SIGNALS[name] = signal
    return signal


def arms_of(trial: int) -> dict[str, Arm]:
    """The arms of a trial, by what they are. The embeddings are left alone: what they get hangs on a batch's tokens."""
    signals = {"signal_bias": fixed_direction(trial), "signal_noise": fresh_direction(trial)}
    arms: dict[str, Arm] = {"gradient_bias": GradientBias(DOSE), "gradient_noise": GradientNoise(DOSE)}
    return arms | {k: SignalConfig(s.name, dose=DOSE, embeddings=False) for k, s in signals.items()}


def train(folder: Path, data: str, seed: int) -> Path:
    """A run's folder with the checkpoint that a turn of trials starts from."""
    out = folder / f"seed_{seed}"
    words = [f"--{key}={value}" for key, value in {**RUN, "data": data, "out": out, "seed": seed}.items()]
    if code := gptlab(["train", *words]):
        raise SystemExit(code)
    return out


def trial_of(
    number: int, run: Path, corpus: Corpus, plan: Plan | None = None, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One trial: what was said of every arm, with bias and noise. known: arms that need not be tried again."""
    first, known = 100 * number, known or {}
    plan = plan or Plan(STEPS, seeds=tuple(range(first, first + SEEDS)), eval_tokens=EVAL_TOKENS)
    arms = {name: arm for name, arm in arms_of(number).items() if name not in known}
    found = branch_test(run, arms, corpus, ComputeConfig(torch.device("cpu"), None, 1, False, {}), plan)
    kept = ("verdict", "bias", "noise", "weight", "dose")
    arms = {**known, **{name: {key: result[key] for key in kept} for name, result in found.items()}}
    return {"trial": number, "arms": {name: arms[name] for name in EXPECTED}}


def trial_in_its_process(number: int, run: Path, known: Mapping[str, Any], data: str) -> dict[str, Any]:
    """`trial_of` on one thread, with the corpus opened by name."""
    torch.set_num_threads(1)
    corpus, _ = open_or_prepare(data, "bytes", World(), lambda text: print(text, file=sys.stderr))
    return trial_of(number, run, corpus, known=known)


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """For every arm the verdicts counted, and the share that is right with its exact 95% binomial interval."""
    arms = {}
    for name, expected in EXPECTED.items():
        said = [trial["arms"][name]["verdict"] for trial in trials]
        right = said.count(expected)
        arms[name] = {
            "expected": expected,
            "right": right,
            "of": len(said),
            "rate": right / len(said),
            "interval": binomtest(right, len(said)).proportion_ci(),
            "verdicts": {verdict: said.count(verdict) for verdict in sorted(set(said))},
        }
    return arms


def _number(trial: Mapping[str, Any]) -> int:
    return trial["trial"]


def keep(out: Path, of: int, trials: list[dict[str, Any]]) -> None:
    """Write what all trials so far came to."""
    results = {
        "command": f"python benchmarks/branch.py --trials {of}",
        "machine": f"{Machine.probe().processor}, 1 thread a trial",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "run": RUN,
        "plan": {"steps": STEPS, "averages": Plan().averages, "seeds": SEEDS, "dose": DOSE},
        "arms": summary([trial for trial in trials if trial["arms"].keys() == EXPECTED.keys()]),
        "trials": trials,
    }
    out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--data", default="shakespeare", help="a corpus by name, or a folder of shards, of bytes")
    parser.add_argument("--work", type=Path, default=Path("log/branch"), help="where the checkpoints go")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials = json.loads(options.out.read_text())["trials"] if options.out.exists() else []
    known = {trial["trial"]: trial["arms"] for trial in trials}
    left = [number for number in range(options.trials) if known.get(number, {}).keys() < EXPECTED.keys()]
    runs = {seed: train(options.work, options.data, seed) for seed in sorted({1 + n % CHECKPOINTS for n in left})}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = partial(trial_in_its_process, data=options.data)
        for trial in pool.map(work, left, (runs[1 + n % CHECKPOINTS] for n in left), (known.get(n, {}) for n in left)):
            trials = sorted([*(one for one in trials if one["trial"] != trial["trial"]), trial], key=_number)
            keep(options.out, options.trials, trials)
            said = ", ".join(f"{name}: {result['verdict']}" for name, result in trial["arms"].items())
            print(f"trial {trial['trial']}: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
