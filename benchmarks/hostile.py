"""Every command that reads a run, over run folders as damage or ill will would leave them.

python benchmarks/hostile.py [--each 2] [--drawn 25] [--seed 1] [--part 1/2] [--only TEXT ...]

Each folder is a copy of a real tiny run with one thing wrong (tests/security/hostile_runs.py), read by a process of its
own: its table gives each command's exit codes or HTTP statuses, the longest it computed, and the largest process. A
fault is a traceback, an exit code that is not documented, more than 5 seconds, or a process above 500 MB more than one
that reads the unspoilt run. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "security")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hostile_runs import Hostile, allowed, commands, hostile_runs  # noqa: E402  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main as gptlab  # noqa: E402
from gptlab.data.shards import write_shard  # noqa: E402

SECONDS, ROOM = 5.0, 500
"""CPU of a command, and MB of its process over one that reads the unspoilt run."""


def tiny_run(folder: Path) -> tuple[Path, Callable[[Path, int], list[str]]]:
    """A finished run of six steps with a signal, samples and two checkpoints, and the words that train such a one."""
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "tokenizer.txt").write_text("bytes\n")
    text = "".join(f"line {i * i % 97} of the play\n" for i in range(250)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    write_shard(corpus / "train_000000.bin", tokens[:4000])
    write_shard(corpus / "val_000000.bin", tokens[4000:5000])
    options = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 4, "total_batch_tokens": 64,
               "warmup_steps": 2, "eval_every": 3, "eval_tokens": 512, "checkpoint_every": 3, "sample_every": 3,
               "dose_every": 2, "noise_every": 3, "threads": 1,
               "signal.name": "confidence", "data": corpus}  # fmt: skip

    def words(out: Path, steps: int) -> list[str]:
        return ["train", *(f"--{key}={value}" for key, value in {**options, "out": out, "steps": steps}.items())]

    run = folder / "good" / "run"
    assert gptlab(words(run, 6)) == 0
    return run, words


def in_a_process(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work()` gives, computed by a fork of this process, and the most MB that it had."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        os.close(reading)
        try:
            found = work()
        except BaseException:
            found = traceback.format_exc()
        with os.fdopen(writing, "w") as file:
            json.dump([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024], file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(said)) if said else ("the process was killed", 0)  # type: ignore[return-value]


def try_all(hostile: Hostile | None, good: Path, folder: Path, words: Callable[[Path, int], list[str]]) -> Any:
    """[command, code, seconds, what is wrong or an empty text] of every command over a run spoilt that way."""
    shutil.rmtree(folder, ignore_errors=True)
    bad = folder / "bad"
    shutil.copytree(good, bad)
    shutil.copytree(good, folder / "good")
    if hostile:
        hostile.spoil(bad)
    found = []
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    for name, command in timed(commands(bad, folder / "good", words(bad, 7))):
        start, code, wrong = time.process_time(), -1, ""
        try:
            code, text = (outcome := command()).code, outcome.text
            if code not in allowed(name) or "Traceback" in text:
                wrong = f"code {code}: {text[-300:]}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
        seconds = time.process_time() - start
        if seconds > SECONDS and not wrong:
            wrong = f"{seconds:.1f} s"
        found.append([name, code, seconds, wrong])
    return found


def timed(found: Any) -> Any:
    """The commands; what making the next one costs (the page's list) is a fault too where it raises."""
    try:
        yield from found
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:200]} ({Path(trace.filename).name}:{trace.lineno})"

        def again() -> Any:
            raise RuntimeError(text)

        yield "page", again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=2, help="values that every field is given")
    parser.add_argument("--drawn", type=int, default=25, help="mutations of each file that are drawn")
    parser.add_argument("--seed", type=int, default=1, help="of those")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth of them from the Kth on, side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="those with this in their name")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        good, words = tiny_run(Path(scratch))
        every = hostile_runs(good, chosen.each, chosen.drawn, chosen.seed)
        every = [one for one in every if not chosen.only or any(text in one.name for text in chosen.only)]
        part, parts = map(int, chosen.part.split("/"))
        every = every[part - 1 :: parts]
        _, usual = in_a_process(lambda: try_all(None, good, Path(scratch, "x"), words))
        table: dict[str, dict[str, Any]] = {}
        faults, largest = [], 0
        for number, hostile in enumerate(every, 1):
            found, megabytes = in_a_process(lambda one=hostile: try_all(one, good, Path(scratch, "x"), words))
            largest = max(largest, megabytes)
            if isinstance(found, str):
                faults.append((hostile.name, "all", found))
                continue
            if megabytes > usual + ROOM:
                faults.append((hostile.name, "all", f"{megabytes} MB, {usual} MB usually"))
            for name, code, seconds, wrong in found:
                row = table.setdefault(name.rstrip(" 0123456789"), {"codes": Counter(), "slowest": 0.0, "faults": 0})
                row["codes"][code] += 1
                row["slowest"] = max(row["slowest"], seconds)
                row["faults"] += bool(wrong)
                if wrong:
                    faults.append((hostile.name, name, wrong))
                    print(f"\n{faults[-1]}", file=sys.stderr)
            print(f"\r{number}/{len(every)}  {len(faults)} faults", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        print(f"{len(every)} spoilt runs; the largest process had {largest} MB, one with the unspoilt run {usual} MB")
        print("| command | exit codes or statuses | slowest, CPU seconds | faults |\n|---|---|---|---|")
        for name, row in table.items():
            codes = ", ".join(f"{code}: {count}" for code, count in sorted(row["codes"].items()))
            print(f"| {name} | {codes} | {row['slowest']:.2f} | {row['faults']} |")
        for fault in faults:
            print(*fault, sep=" | ")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
