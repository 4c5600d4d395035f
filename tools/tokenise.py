"""A corpus tokenised on many machines: a datatrove pipeline that writes gptlab's shards.

    pip install 'datatrove[io]'      and gptlab, in an environment that every machine sees
    python tools/tokenise.py --input TEXTS --out data/mine --tasks 200 --executor slurm --partition cpu
    python tools/tokenise.py --input TEXTS --out data/mine --tasks 4      here, in four processes

TEXTS is a folder or an address that fsspec knows (s3://..., hf://datasets/...) of .jsonl or .parquet files with a field
`text`. A task takes every TASKS-th file, so make them no more than the files. The same command again makes only what is
missing.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader, ParquetReader

from gptlab.data.prepare import merge_parts, write_part


class WriteShards(PipelineStep):
    """Tokenises what the steps before let through, and writes it as the part of its task."""

    name = "gptlab shards"
    type = "WRITER"

    def __init__(self, out: str, tokenizer: str, shard_tokens: int) -> None:
        super().__init__()
        self.out, self.tokenizer, self.shard_tokens = out, tokenizer, shard_tokens

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        def texts() -> Iterator[str]:
            for document in data or ():
                self.update_doc_stats(document)
                yield document.text

        part = write_part(texts(), Path(self.out), rank, self.tokenizer, shard_tokens=self.shard_tokens)
        self.stat_update("tokens", value=sum(shard.tokens for shard in (*part.train, *part.val)))
        yield from ()  # nothing comes after it


class Gather(PipelineStep):
    """Puts the parts together, in a task of its own once all others are done."""

    name = "gptlab corpus"
    type = "WRITER"

    def __init__(self, out: str, parts: int) -> None:
        super().__init__()
        self.out, self.parts = out, parts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        merge_parts(Path(self.out), Path(self.out).name, self.parts)
        yield from ()


def executor(options: argparse.Namespace) -> Callable[..., Any]:
    """datatrove's executor of that name, with what it needs to know of the machines."""
    if options.executor == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        return lambda **how: SlurmPipelineExecutor(time=options.time, partition=options.partition, **how)
    if options.executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="a folder or address of .jsonl or .parquet files")
    parser.add_argument("--out", required=True, help="the corpus's folder, which every machine sees")
    parser.add_argument("--tasks", type=int, default=1, help="parts of the corpus, at most as many as files")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time [all]")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local")
    parser.add_argument("--partition", default="cpu", help="of Slurm")
    parser.add_argument("--time", default="12:00:00", help="of a task, for Slurm")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000)
    options = parser.parse_args()
    out = str(Path(options.out).resolve())
    reader = ParquetReader if options.format == "parquet" else JsonlReader
    start = executor(options)
    logs = Path(out) / ".datatrove" / f"{options.tokenizer}-{options.shard_tokens}-{options.tasks}"  # else all is again
    write = start(
        pipeline=[reader(options.input), WriteShards(out, options.tokenizer, options.shard_tokens)],
        tasks=options.tasks,
        workers=options.workers,
        logging_dir=str(logs / "write"),
    )
    # Filters and the removal of duplicates are datatrove's own steps, between the reader and the writer.
    start(pipeline=[Gather(out, options.tasks)], tasks=1, logging_dir=str(logs / "gather"), depends=write).run()


if __name__ == "__main__":
    main()
