"""The corpus that a command names: a folder of shards, or a known corpus that is prepared where it is missing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from gptlab.data.corpora import base_name
from gptlab.data.corpus import (
    MANIFEST,
    PARTIAL_MANIFEST,
    TOKENIZER_FILE,
    UNKNOWN,
    Corpus,
    holds_corpus,
    holds_manifest,
    open_corpus,
    wait_for_shard,
)
from gptlab.data.prepare import corpus_folder, prepare
from gptlab.data.synthetic import SYNTHETIC
from gptlab.distributed import World
from gptlab.errors import ConfigError, DataError, did_you_mean, shown
from gptlab.files import LOCK, is_locked, open_append
from gptlab.processes import python_command

SMALL = ("shakespeare", *SYNTHETIC)
LARGE = ("fineweb-edu",)
NAMES = ("shakespeare", "fineweb-edu", *SYNTHETIC)


def open_or_prepare(
    data: str, tokenizer: str, world: World, note: Callable[[str], None]
) -> tuple[Corpus, Callable[[], bool]]:
    """The corpus, and whether somebody still prepares it.

    A small known corpus is prepared here, a large one by a process of its own, and this returns as soon as its first
    shards are there. Every rank may call it: preparation holds a lock. Raises DataError for a corpus that is unknown,
    ConfigError for one of another tokenizer.
    """
    folder = corpus_folder(data, tokenizer)
    unfinished = (folder / PARTIAL_MANIFEST).exists() or not (folder.is_dir() and holds_corpus(folder))
    missing = unfinished and not (folder / MANIFEST).exists()
    alive: Callable[[], bool] = lambda: False  # noqa: E731
    if base_name(data) in SMALL and missing:
        note(f"preparing {data} in {folder}")
        prepare(data, folder, tokenizer)
    elif data in LARGE and missing:
        alive = _start_preparing(data, folder, tokenizer, world, note)
        wait_for_shard(folder, "val", 0, alive=alive, timeout=3600.0)
        wait_for_shard(folder, "train", 0, alive=alive, timeout=3600.0)
    elif not folder.is_dir():
        raise DataError(
            f"no corpus {shown(data)}: expected a folder of shards or one of {', '.join(NAMES)}"
            f"{did_you_mean(data, NAMES)}; make one with `gptlab data prepare text --input FILE --out {data}`"
        )
    corpus = open_corpus(folder)
    if corpus.tokenizer != tokenizer:
        holds, mend = f"{corpus.tokenizer} tokens", f"add --tokenizer {corpus.tokenizer}"
        if corpus.tokenizer == UNKNOWN:
            holds = f"tokens of an unknown vocabulary ({corpus.doubt})"
            mend = (
                f"tokenise its text with `gptlab data prepare text --input FILE --tokenizer {tokenizer} --out DIR`, or "
                f"if you know that they are {tokenizer}'s, write {tokenizer} into {folder / TOKENIZER_FILE}"
            )
        raise ConfigError(f"{folder} holds {holds}, the run is set for {tokenizer}; {mend}")
    if corpus.left_out.count and not holds_manifest(folder):
        note(f"of {folder}, {corpus.left_out}")
    return corpus, alive


def _start_preparing(
    data: str, folder: Path, tokenizer: str, world: World, note: Callable[[str], None]
) -> Callable[[], bool]:
    """Start `gptlab data prepare` next to the run (one process a machine); gives whether it still works."""
    folder.mkdir(parents=True, exist_ok=True)
    if world.local_rank == 0:
        note(f"preparing {data} in {folder}; training starts with the first shard (progress in {folder}/prepare.txt)")
        words = ["data", "prepare", data, "--tokenizer", tokenizer, "--out", str(folder)]
        with open_append(folder / "prepare.txt") as log:
            process = subprocess.Popen(python_command("gptlab.cli.main:main", *words), stdout=log, stderr=log)
        return lambda: process.poll() is None
    started = time.monotonic()

    def somebody_works() -> bool:
        # at first the other rank's process may not have taken the lock yet
        return time.monotonic() - started < 60 or is_locked(folder / LOCK)

    return somebody_works
