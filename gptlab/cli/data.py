"""`gptlab data`: prepare a corpus, or look at one; and the corpus that any command names, prepared where it is missing.

The work is done in gptlab/data; here are options and words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gptlab.cli.arguments import Parser
from gptlab.cli.console import Counter, printable
from gptlab.data import prepare as preparation
from gptlab.data.corpora import CORPORA, base_name, default_tokenizer, is_known
from gptlab.data.corpus import (
    MANIFEST,
    PARTIAL_MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    UNKNOWN,
    Corpus,
    holds_corpus,
    holds_manifest,
    open_corpus,
    wait_for_shard,
)
from gptlab.data.prepare import corpus_folder, default_folder
from gptlab.data.shards import check_tokens
from gptlab.data.synthetic import SYNTHETIC
from gptlab.data.tokenizers import TOKENIZERS, get_tokenizer
from gptlab.distributed import World
from gptlab.errors import ConfigError, DataError, UsageError, did_you_mean, shown
from gptlab.files import LOCK, is_locked, open_append
from gptlab.processes import python_command

SUMMARY = "prepare a corpus, or look at one"

EXCERPT_TOKENS = 120


def main(argv: list[str]) -> int:
    """Run `gptlab data ...` with the words after `data`; returns the exit code. Raises GptlabError."""
    options = _parser().parse(argv)
    return options.run(options)


def _prepare(options: argparse.Namespace) -> int:
    if not is_known(name := options.name):
        raise UsageError(f"expected one of {', '.join(CORPORA)}, found {shown(name)}{did_you_mean(name, CORPORA)}")
    tokenizer = options.tokenizer or default_tokenizer(options.name)
    out = options.out or default_folder(options.name, tokenizer)
    with Counter() as display:
        counted = partial(_count, display, options.name, time.monotonic(), [])
        corpus = preparation.prepare(
            options.name, out, tokenizer, inputs=options.input, shard_tokens=options.shard_tokens,
            val_fraction=options.val_fraction, text_field=options.text_field, skip_null=options.skip_null,
            workers=options.workers, progress=counted,
        )  # fmt: skip
    if options.json:
        print(json.dumps(_summary(corpus), indent=1))
    else:
        print(_counts(corpus))
        print(*_left_out(corpus), f"look at it with: gptlab data info {corpus.folder}", sep="\n")
    return 0


def _count(display: Counter, name: str, began: float, before: list[int], at: preparation.Progress) -> None:
    """Show how far a preparation is; what one before it had done, `before` has it, is no speed of this one's."""
    before[:] = before or [at.tokens]
    speed = (at.tokens - before[0]) / max(1e-9, time.monotonic() - began)
    display.count(
        name, at.documents, at.total_documents, f"{at.documents:,} documents, {at.tokens:,} tokens, {speed:,.0f}/s"
    )


def _info(options: argparse.Namespace) -> int:
    corpus = open_corpus(_folder(options.corpus))
    excerpts = {split: _excerpt(corpus, split) for split in SPLITS}
    if options.json:
        summary = _summary(corpus)
        for split, text in excerpts.items():
            summary["splits"][split]["excerpt"] = text
        print(json.dumps(summary, indent=1))
        return 0
    print(_counts(corpus), *_left_out(corpus), sep="\n")
    for split in SPLITS:
        for shard in corpus.splits[split]:
            print(f"{split}  {printable(shard.name)}  {shard.tokens:,} tokens  sha256 {shard.sha256}")
    for split, text in excerpts.items():
        print(f"\n--- {split} begins ---\n{printable(text)}")
    return 0


def _folder(given: str) -> Path:
    """The folder itself, or where a corpus of that name is by default."""
    if is_known(given) and not (Path(given).is_dir() and holds_corpus(Path(given))):
        folders = [default_folder(given, tokenizer) for tokenizer in (default_tokenizer(given), *TOKENIZERS)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])
    return Path(given)


def _excerpt(corpus: Corpus, split: str) -> str:
    """The first words of a split, its first document's beginning."""
    if not corpus.splits[split]:
        return ""
    tokens = corpus.read(split, 0)[:EXCERPT_TOKENS]
    if corpus.tokenizer == UNKNOWN:
        return "tokens " + " ".join(map(str, tokens))
    tokenizer = get_tokenizer(corpus.tokenizer)
    check_tokens(tokens, tokenizer.vocab_size, corpus.folder / corpus.splits[split][0].name)
    return tokenizer.decode(tokens[tokens != tokenizer.document_start]).strip()


def _summary(corpus: Corpus) -> dict[str, Any]:
    return {
        "folder": str(corpus.folder), "name": corpus.name, "tokenizer": corpus.tokenizer,
        "vocab_size": corpus.vocab_size, "complete": corpus.complete,
        **({"floor": corpus.floor.as_json()} if corpus.floor else {}),
        **({"doubt": corpus.doubt} if corpus.doubt else {}),
        "left_out": corpus.left_out.as_json(),
        "nulls": corpus.nulls,
        "splits": {
            split: {"tokens": corpus.tokens(split), "shards": [shard.as_json() for shard in corpus.splits[split]]}
            for split in SPLITS
        },
    }  # fmt: skip


def _left_out(corpus: Corpus) -> list[str]:
    """What of the inputs, or of the folder, is not in the corpus, and why its tokens are of no known vocabulary."""
    files = [printable(str(corpus.left_out))] if corpus.left_out.count else []
    nulls = [f"left out {corpus.nulls:,} null document(s)"] if corpus.nulls else []
    return [*([f"unknown vocabulary: {printable(corpus.doubt)}"] if corpus.doubt else []), *files, *nulls]


def _counts(corpus: Corpus) -> str:
    state = "" if corpus.complete else ", still being prepared"
    splits = ", ".join(
        f"{corpus.tokens(split):,} {split} tokens in {len(corpus.splits[split])} shard(s)" for split in SPLITS
    )
    floor = f"; floor {corpus.floor.rate:.4f} nats a token" if corpus.floor else ""
    return f"{corpus.name} in {corpus.folder} (tokenizer {corpus.tokenizer}{state}): {splits}{floor}"


def _parser() -> Parser:
    parser = Parser(prog="gptlab data", description=SUMMARY)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    prepare = commands.add_parser("prepare", help="make a corpus, or continue making it")
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("name", metavar="NAME", help="; ".join(f"{name}: {what}" for name, what in CORPORA.items()))
    add = prepare.add_argument
    inputs = (
        "a file or folder, repeatable; of a folder all .txt, .jsonl, .json and .parquet are read, .gz and .zst of them "
        "too, but nothing whose name begins with a dot"
    )
    add("--input", metavar="PATH", action="append", default=[], help=inputs)
    add("--text_field", metavar="NAME", default="text", help="of objects and rows of corpus text [text]")
    add("--skip_null", action="store_true", help="leave out documents whose text is null, and count them")
    add(
        "--tokenizer",
        metavar="NAME",
        choices=[*TOKENIZERS],
        help="bytes or gpt2 [gpt2 for text and fineweb-edu, else bytes]",
    )
    add("--out", metavar="DIR", type=Path, help="[data/NAME-TOKENIZER]")
    add("--workers", metavar="N", type=int, help="tokenising threads [all processors]")
    add("--shard_tokens", metavar="N", type=int, default=100_000_000, help="[100000000]")
    add("--val_fraction", metavar="F", type=float, default=0.05, help="of corpus text [0.05]")
    info = commands.add_parser("info", help="counts, hashes and an excerpt of a corpus")
    info.set_defaults(run=_info)
    info.add_argument("corpus", metavar="FOLDER|NAME", help="a folder of shards, or the name of a corpus made here")
    for command in (prepare, info):
        command.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    return parser


SMALL = ("shakespeare", *SYNTHETIC)
LARGE = ("fineweb-edu",)
KNOWN = ("shakespeare", "fineweb-edu", *SYNTHETIC)


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
        preparation.prepare(data, folder, tokenizer)
    elif data in LARGE and missing:
        alive = _start_preparing(data, folder, tokenizer, world, note)
        wait_for_shard(folder, "val", 0, alive=alive, timeout=3600.0)
        wait_for_shard(folder, "train", 0, alive=alive, timeout=3600.0)
    elif not folder.is_dir():
        raise DataError(
            f"no corpus {shown(data)}: expected a folder of shards or one of {', '.join(KNOWN)}"
            f"{did_you_mean(data, KNOWN)}; make one with `gptlab data prepare text --input FILE --out {data}`"
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
