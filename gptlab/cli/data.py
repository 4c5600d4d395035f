"""`gptlab data`: prepare a corpus, or look at one. The work is done in gptlab/data; here are options and words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gptlab.cli.arguments import Parser
from gptlab.cli.console import printable
from gptlab.data import prepare as preparation
from gptlab.data.corpora import CORPORA, default_tokenizer, is_known
from gptlab.data.corpus import SPLITS, UNKNOWN, Corpus, holds_corpus, open_corpus
from gptlab.data.prepare import default_folder
from gptlab.data.shards import check_tokens
from gptlab.data.tokenizers import TOKENIZERS, get_tokenizer
from gptlab.errors import UsageError, did_you_mean, shown

SUMMARY = "prepare a corpus, or look at one"

COMMANDS = ("prepare", "info")
EXCERPT_TOKENS = 120


def main(argv: list[str]) -> int:
    """Run `gptlab data ...` with the words after `data`; returns the exit code. Raises GptlabError."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UsageError(f"data: expected {' or '.join(COMMANDS)}, found {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}")
    options = _parser().parse(argv)
    return options.run(options)


def _prepare(options: argparse.Namespace) -> int:
    for given, known in ((options.name, CORPORA), (options.tokenizer, TOKENIZERS)):
        if given is not None and given not in known and not (known is CORPORA and is_known(given)):
            raise UsageError(f"expected one of {', '.join(known)}, found {shown(given)}{did_you_mean(given, known)}")
    tokenizer = options.tokenizer or default_tokenizer(options.name)
    out = options.out or default_folder(options.name, tokenizer)
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(options.name, total=None, documents=0, tokens=0, tokens_before=None)

        def show(progress: preparation.Progress) -> None:
            # What an earlier preparation had done is no speed of this one's.
            before = bar.tasks[0].fields["tokens_before"]
            bar.update(
                task,
                total=progress.total_documents,
                completed=progress.documents,
                documents=progress.documents,
                tokens=progress.tokens,
                tokens_before=progress.tokens if before is None else before,
            )

        corpus = preparation.prepare(
            options.name,
            out,
            tokenizer,
            inputs=options.input,
            shard_tokens=options.shard_tokens,
            val_fraction=options.val_fraction,
            text_field=options.text_field,
            skip_null=options.skip_null,
            workers=options.workers,
            progress=show,
        )
    if options.json:
        print(json.dumps(_summary(corpus), indent=1))
    else:
        print(_counts(corpus))
        print(*_left_out(corpus), f"look at it with: gptlab data info {corpus.folder}", sep="\n")
    return 0


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
        "folder": str(corpus.folder),
        "name": corpus.name,
        "tokenizer": corpus.tokenizer,
        "vocab_size": corpus.vocab_size,
        "complete": corpus.complete,
        **({"floor": corpus.floor.as_json()} if corpus.floor else {}),
        **({"doubt": corpus.doubt} if corpus.doubt else {}),
        "left_out": corpus.left_out.as_json(),
        "nulls": corpus.nulls,
        "splits": {
            split: {
                "tokens": corpus.tokens(split),
                "shards": [shard.as_json() for shard in corpus.splits[split]],
            }
            for split in SPLITS
        },
    }


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


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        before, seconds = task.fields["tokens_before"], task.elapsed
        if before is None or not seconds or task.fields["tokens"] == before:
            return Text("")
        return Text(f"{(task.fields['tokens'] - before) / seconds:,.0f}/s")


def _parser() -> Parser:
    parser = Parser(prog="gptlab data", description=SUMMARY)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    prepare = commands.add_parser("prepare", help="make a corpus, or continue making it")
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("name", metavar="NAME", help="; ".join(f"{name}: {what}" for name, what in CORPORA.items()))
    prepare.add_argument(
        "--input", metavar="PATH", action="append", default=[],
        help="a file or folder, repeatable; of a folder all .txt, .jsonl, .json and .parquet are read, .gz and .zst of "
        "them too, but nothing whose name begins with a dot",
    )  # fmt: skip
    prepare.add_argument(
        "--text_field", metavar="NAME", default="text", help="of objects and rows of corpus text (default: text)"
    )
    prepare.add_argument(
        "--skip_null", action="store_true", help="leave out documents whose text is null, and count them"
    )
    prepare.add_argument(
        "--tokenizer", metavar="NAME", help="bytes or gpt2 (default: gpt2 for text and fineweb-edu, else bytes)"
    )
    prepare.add_argument("--out", metavar="DIR", type=Path, help="default: data/NAME-TOKENIZER")
    prepare.add_argument("--workers", metavar="N", type=int, help="tokenising threads (default: all processors)")
    prepare.add_argument("--shard_tokens", metavar="N", type=int, default=100_000_000, help="default: 100000000")
    prepare.add_argument("--val_fraction", metavar="F", type=float, default=0.05, help="of corpus text (default: 0.05)")
    info = commands.add_parser("info", help="counts, hashes and an excerpt of a corpus")
    info.set_defaults(run=_info)
    info.add_argument("corpus", metavar="FOLDER|NAME", help="a folder of shards, or the name of a corpus made here")
    for command in (prepare, info):
        command.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    return parser
