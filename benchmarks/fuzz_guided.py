"""The readers of fuzz.py under inputs that are led by coverage, where atheris is installed (`pip install atheris`).

python benchmarks/fuzz_guided.py [--inputs 100000] [--only corpus.json ckpt.pt ...] [--seed 1]

fuzz.py draws its inputs blindly; libFuzzer keeps those that reach a new branch of gptlab and changes them further. It
begins with the files that are right. It stops at the first exception that is not ours, at 1 GiB more than the process
has when it begins, or at an input that takes 10 seconds; then it keeps the input and its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "security"), str(ROOT / "benchmarks")]

SLOWEST = 10


def become(name: str, inputs: int, seed: int, folder: Path) -> None:
    """Fuzz one reader in this process; libFuzzer ends it."""
    import atheris as untyped  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    atheris: Any = untyped
    with atheris.instrument_imports(include=["gptlab"]):
        from fuzz import ROOM  # pyright: ignore[reportMissingImports]
        from readers import readers  # pyright: ignore[reportMissingImports]

        from gptlab.errors import GptlabError

    reader = next(one for one in readers(folder / "right") if one.name == name)
    reader.prepare(folder / "read")
    begin = folder / "begin"
    begin.mkdir()
    for number, sample in enumerate(reader.samples):
        (begin / str(number)).write_bytes(sample)

    def read(content: bytes) -> None:
        with contextlib.suppress(GptlabError):
            reader(folder / "read", content)

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    room = (pages * 4096 + ROOM) // 2**20
    flags = [f"-runs={inputs}", f"-seed={seed}", f"-timeout={SLOWEST}", f"-rss_limit_mb={room}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={folder}/", str(begin)], read)
    atheris.Fuzz()


def fuzz(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """What became of a reader: inputs made, branches reached, and the end of a fault's traceback."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        words = ["--become", name, "--inputs", str(inputs), "--seed", str(seed), "--folder", folder]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        inputs_of_fault = [path.read_bytes() for path in Path(folder).iterdir() if path.is_file()]
    runs, reached = re.findall(r"Done (\d+) runs", said), re.findall(r"cov: (\d+)", said)
    fault = None
    if done.returncode or not runs:
        lines = [line for line in said.splitlines() if line.strip()]
        at = next((n for n, line in enumerate(lines) if "Uncaught Python exception" in line or "ERROR" in line), -10)
        fault = {"said": "\n".join(lines[at : at + 12])[:2000], "input": [one[:400].hex() for one in inputs_of_fault]}
    made = int(runs[0]) if runs else 0
    return {
        "reader": name,
        "inputs": made,
        "branches": int(reached[-1]) if reached else 0,
        "fault": fault,
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="these readers, by a part of their name")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    parser.add_argument("--become", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.become:
        become(chosen.become, chosen.inputs, chosen.seed, chosen.folder)
    from fuzz import keep  # pyright: ignore[reportMissingImports]
    from readers import readers  # pyright: ignore[reportMissingImports]

    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        names = [one.name for one in readers(Path(scratch))]
    for name in names:
        if chosen.only and not any(part in name for part in chosen.only):
            continue
        found = fuzz(name, chosen.inputs, chosen.seed)
        faults += found["fault"] is not None
        print(f"{name:46} {found['inputs']:>8} inputs  {found['branches']:>6} branches", flush=True)
        if found["fault"]:
            print(found["fault"]["said"])
        if not chosen.dry:
            keep(found, "guided")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
