"""How fast a corpus is prepared: `gptlab data prepare` against tiktoken's own threads, in turn, on the same documents.

    python benchmarks/prepare.py [--rounds N] [--megabytes N] [--json]

Documents are Shakespeare's texts cut into pieces of a few thousand characters, in another order each time they come
round, as JSON lines. Ours is the whole command: reading, tokenising, hashing, writing shards. tiktoken's is
`encode_ordinary_batch` over texts that lie in memory, with as many threads as there are cores. The most memory that
our processes held together is sampled meanwhile. Writes benchmarks/results/measured.json and docs/performance.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from figures import keep, rewrite

from gptlab.benchmark.contenders import interleave
from gptlab.cli.arguments import Parser
from gptlab.data.corpora import Shakespeare
from gptlab.data.tokenizers import GPT2Tokenizer
from gptlab.device import Machine

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- measured by benchmarks/prepare.py -->", "<!-- end of what prepare.py measured -->"
PIECE = 4000  # characters of a document


def main(argv: list[str]) -> int:
    """Measure, print and keep the figures."""
    parser = Parser(prog="benchmarks/prepare.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse(argv)
    cores, peaks = os.cpu_count() or 1, []
    with tempfile.TemporaryDirectory() as folder:
        texts = documents(options.megabytes * 10**6)
        file = Path(folder) / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        encoding = GPT2Tokenizer()._encoding
        steps = {
            "gptlab": lambda: peaks.append(prepared(file, Path(folder))),
            "tiktoken": lambda: encoding.encode_ordinary_batch(texts, num_threads=cores),
        }
        timings = interleave(steps, options.rounds, report=lambda line: print(line, file=sys.stderr, flush=True))
        tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=cores)))
    found: dict[str, Any] = {
        "command": " ".join(["python benchmarks/prepare.py", *argv]),
        "date": date.today().isoformat(),
        "processor": Machine.probe().processor,
        "cores": cores,
        "rounds": options.rounds,
        "megabytes": options.megabytes,
        "documents": len(texts),
        "tokens_per_second": {name: tokens / timing.median for name, timing in timings.items()},
        "spread": {name: timing.spread for name, timing in timings.items()},
        "ratio": timings["tiktoken"].median / timings["gptlab"].median,
        "peak_memory_bytes": max(peaks),
    }
    keep("prepare", found)
    rewrite(PAGE, START, END, paragraph(found))
    if options.json:
        print(json.dumps(found))
    else:
        for name, rate in found["tokens_per_second"].items():
            print(f"{name:<10} {rate:12,.0f} tokens/s ±{found['spread'][name]:.1%}")
        print(f"{found['ratio']:.0%} of tiktoken's rate, {found['peak_memory_bytes'] / 2**20:,.0f} MiB at most")
    return 0


def paragraph(found: dict[str, Any]) -> str:
    """The figures as a paragraph of Markdown."""
    rate, spread = found["tokens_per_second"], found["spread"]
    who = {name: f"{rate[name]:,.0f} tokens/s (±{spread[name]:.1%})" for name in rate}
    return (
        f"`{found['command']}`: {who['gptlab']}, tiktoken {who['tiktoken']}, so {found['ratio']:.0%} of its rate, and "
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB at most. {found['megabytes']} MB, {found['cores']} cores, "
        f"{found['rounds']} rounds; {found['processor']}, {found['date']}.\n\n"
    )


def documents(characters: int) -> list[str]:
    """Pieces of Shakespeare's texts, so many characters of them, shuffled by a seed."""
    source = Shakespeare()
    whole = [text for stream in source.streams for text, _ in source.documents(stream)]
    pieces = [text[i : i + PIECE] for text in whole for i in range(0, len(text), PIECE)]
    drawn, found = random.Random(1), []
    while characters > 0:
        drawn.shuffle(pieces)
        for piece in pieces:
            found.append(piece)
            characters -= len(piece)
            if characters <= 0:
                break
    return found


def prepared(file: Path, folder: Path) -> int:
    """Prepare the corpus again; the most bytes that the command's processes held together, each counted whole."""
    out = Path(tempfile.mkdtemp(dir=folder))
    words = ["data", "prepare", "text", "--input", str(file), "--tokenizer", "gpt2", "--out", str(out)]
    command = [sys.executable, "-P", "-m", "gptlab", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = [0]

    def watch() -> None:
        while process.poll() is None:
            most[0] = max(most[0], resident(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    assert code == 0, code
    return most[0]


def resident(pid: int) -> int:
    """Bytes in memory of a process and all that it started; pages that several share count for each."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total = int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return total
    return total + sum(resident(int(child)) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
