"""Hostile inputs to every reader of outside bytes, many times over: how many ended in an error that is not ours.

python benchmarks/fuzz.py [--inputs 100000] [--only corpus.json ckpt.pt ...] [--seed 1]

An input is a file that is right with a few bytes or a value changed, drawn from the seed and the reader's name. It is
read as a command would read it; what comes out is a value, an error of gptlab/errors.py, or another exception, which
is a fault of ours. The process may take 1 GiB more than it has when it begins, so that a size that is believed before
it was checked shows as a MemoryError. Results are kept reader by reader, so that it can run in several sittings.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import platform
import resource
import sys
import tempfile
import time
import traceback
import warnings
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "security")]

import torch  # noqa: E402
from readers import Reader, readers  # noqa: E402  # pyright: ignore[reportMissingImports]

from gptlab.errors import GptlabError  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "fuzz.json", ROOT / "docs" / "hardening.md"
ROOM = 2**30
TABLE = ("<!-- fuzz: python benchmarks/fuzz.py -->", "<!-- end of fuzz -->")
GUIDED = ("<!-- fuzz: python benchmarks/fuzz_guided.py -->", "<!-- end of guided -->")
KEPT = 10
"""Faults of a reader that are reported whole."""


def fuzz(reader: Reader, inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of what came out, and the first faults with the input that made them."""
    rng = Random(f"{seed} {reader.name}")
    reader.prepare(folder)
    counts, faults, slowest = {"read": 0, "ours": 0, "others": 0}, [], 0.0
    began = time.monotonic()
    for number in range(inputs):
        content = reader.hostile(rng)
        start = time.monotonic()
        try:
            reader(folder, content)
            counts["read"] += 1
        except GptlabError:
            counts["ours"] += 1
        except Exception as error:
            counts["others"] += 1
            if len(faults) < KEPT:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error}"[:200]
                faults.append(
                    {"error": said, "at": f"{Path(where.filename).name}:{where.lineno}", "input": content[:400].hex()}
                )
                print(f"\n{reader.name}: {said} ({where.filename}:{where.lineno})", file=sys.stderr)
        slowest = max(slowest, time.monotonic() - start)
        if number % 1000 == 999:
            print(f"\r{reader.name}  {number + 1}/{inputs}  {counts['others']} others", end="", file=sys.stderr)
    print(file=sys.stderr)
    seconds = {"seconds": round(time.monotonic() - began, 1), "slowest_seconds": round(slowest, 3)}
    return {"reader": reader.name, "inputs": inputs, **counts, **seconds, "seed": seed, "faults": faults}


def machine() -> dict[str, str]:
    return {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}


def keep(found: dict[str, Any], how: Literal["readers", "guided"] = "readers") -> None:
    """Put a reader's figures among those of earlier sittings, of inputs drawn or guided, and renew the page."""
    with RESULTS.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # sittings may overlap
        file.seek(0)
        results = {"readers": [], "guided": []} | json.loads(file.read() or "{}")
        others = [one for one in results[how] if one["reader"] != found["reader"]]
        results[how] = sorted([*others, {**found, **machine()}], key=lambda one: one["reader"])
        file.truncate(0)
        file.write(json.dumps(results, indent=1) + "\n")
        file.flush()
        write_page(results)


def table(results: dict[str, Any]) -> str:
    lines = ["| file | inputs | read | our errors | others | seconds | date |", "|---|---|---|---|---|---|---|"]
    for one in results["readers"]:
        counts = " | ".join(f"{one[key]:,}" for key in ("inputs", "read", "ours", "others"))
        lines.append(f"| `{one['reader']}` | {counts} | {one['seconds']:.0f} | {one['date']} |")
    return "\n".join(lines)


def guided_table(results: dict[str, Any]) -> str:
    lines = ["| file | inputs | branches reached | others | date |", "|---|---|---|---|---|"]
    for one in results["guided"]:
        found = f"{one['inputs']:,} | {one['branches']:,} | {int(one['fault'] is not None)}"
        lines.append(f"| `{one['reader']}` | {found} | {one['date']} |")
    return "\n".join(lines)


def write_page(results: dict[str, Any]) -> None:
    """Renew the tables in docs/hardening.md."""
    text = PAGE.read_text(encoding="utf-8")
    for (start, end), lines in ((TABLE, table(results)), (GUIDED, guided_table(results))):
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{lines}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def limit_memory() -> None:
    """Let this process grow by ROOM and no further."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each reader")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FILE", help="these readers, by a part of the file's name"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the inputs")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()  # transformers has much to say of a hostile config
    faults = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        known = list(readers(Path(scratch, "right")))
        asked = [one for one in known if not chosen.only or any(part in one.name for part in chosen.only)]
        if not asked:
            parser.error(f"no reader of {chosen.only}; there are {', '.join(one.name for one in known)}")
        limit_memory()
        for number, reader in enumerate(asked):
            found = fuzz(reader, chosen.inputs, chosen.seed, Path(scratch, str(number)))
            faults += found["others"]
            print(f"{reader.name:26}", *(f"{found[key]:>8} {key}" for key in ("inputs", "read", "ours", "others")),
                  f"{found['seconds']:>8} s, slowest {found['slowest_seconds']} s", flush=True)  # fmt: skip
            for fault in found["faults"][:3]:
                print(f"    {fault['error']}  ({fault['at']})")
            if not chosen.dry:
                keep(found)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
