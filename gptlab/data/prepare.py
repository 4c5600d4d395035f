"""Documents to shards: tokenised by several threads, written whole, continued after a kill.

After each shard the partial manifest is replaced by one that lists it and says where to continue; the last step writes
corpus.json. So a preparation killed at any moment leaves finished shards, a place to resume from, and nothing that
looks complete; and as documents come and are packed in a fixed order, the corpus is the same bytes for any number of
kills and workers. Sources are in corpora.py, the file format in shards.py.

Texts that one machine would be too slow for are made in parts. Every machine writes one part or more, each from
documents of its own, into a folder that all of them see: shards in the usual format and, last, part_NNNNN.json, which
lists them. Once all parts are there, `merge_parts` writes the corpus's manifest over the same files, so that nothing is
copied. Who hands the documents out is not here: docs/scale.md has a datatrove pipeline that does.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.corpora import get_source, is_known
from gptlab.data.corpus import (
    FORMAT,
    MANIFEST,
    PARTIAL_MANIFEST,
    SPLITS,
    Corpus,
    EntropyFloor,
    Position,
    Source,
    holds_corpus,
    open_corpus,
    read_manifest,
    shard_names,
)
from gptlab.data.shards import ShardInfo, open_shard, write_atomically, write_shard
from gptlab.data.synthetic import canonical
from gptlab.data.tokenizers import Tokenizer, get_tokenizer
from gptlab.errors import ConfigError, DataError
from gptlab.files import LOCK, is_count, parse_json, read_bytes, take_lock
from gptlab.processes import usable_cores

MODIFIED = "modified_ns"  # in a manifest: when each file was last changed, in their order
CHUNK_CHARACTERS = 1 << 19  # what a thread gets at a time: about a tenth of a second of work for GPT-2's tokenizer

_OUR_SHARD = re.compile(r"(?:train|val)_\d{6}\.bin")
_OUR_TEMPORARY = re.compile(r"\.(?:(?:train|val)_\d{6}\.bin|corpus(?:\.partial)?\.json)\.(?:\d+|[0-9a-f]{16})\.tmp")


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: documents and tokens so far, and how many documents there will be, where known."""

    documents: int
    tokens: int
    total_documents: int | None


@dataclass(frozen=True)
class Chunk:
    """Some documents to tokenise together, and the source's position before them."""

    texts: list[str]
    position: Position


@dataclass(frozen=True)
class Resume:
    """Where to continue after a shard: in the midst of a chunk, whose documents are tokenised again."""

    stream: int = 0
    position: Position = None  # before the chunk
    skip: int = 0  # tokens of the chunk that are in finished shards
    documents: int = 0  # before the chunk


def default_folder(name: str, tokenizer: str, root: Path = Path("data")) -> Path:
    """Where a corpus is prepared by default: data/<name>-<tokenizer>, parameters after a dash too."""
    return root / f"{canonical(name).replace(':', '-')}-{tokenizer}"


def corpus_folder(data: str, tokenizer: str) -> Path:
    """Where the corpus is that `--data` names: a folder that holds one, else where one of that name is prepared.

    A folder that is called as a corpus is, and holds none, is something else of the user's.
    """
    own = Path(data)
    return own if own.is_dir() and (holds_corpus(own) or not is_known(data)) else default_folder(data, tokenizer)


def known_tokens(data: str, tokenizer: str, shards: Sequence[str]) -> int | None:
    """Training tokens of the corpus that `--data` names, where it is at hand and its shards have these SHA-256s."""
    folder = corpus_folder(data, tokenizer)
    try:
        manifest = read_manifest(folder / MANIFEST)
    except DataError:
        return None
    if manifest is None or [shard["sha256"] for shard in manifest["splits"]["train"]] != list(shards):
        return None
    return sum(shard["tokens"] for shard in manifest["splits"]["train"])


def prepare(
    name: str,
    out: Path,
    tokenizer: str,
    *,
    inputs: Sequence[str | Path] = (),
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.05,
    text_field: str = "text",
    skip_null: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    limit_shards: int | None = None,
) -> Corpus:
    """Make corpus `name` in folder `out`, or continue making it, and return it; a finished one is returned as it is.

    `inputs`, `val_fraction`, `text_field` and `skip_null` are for get_source. `shard_tokens` is the size of a shard,
    `workers` the tokenising threads (default: all processors). `limit_shards` stops once there are so many training
    shards and leaves the corpus unfinished, to be continued later.
    Waits while another process prepares the same folder. Raises ConfigError for options that cannot be, DataError for
    documents that cannot be read, a disk that refuses, or a finished corpus made with other settings.
    """
    if not 1 <= shard_tokens < 2**31:
        raise ConfigError(f"expected shard_tokens from 1 to 2147483647, found {shard_tokens}")
    if workers is not None and workers < 1:
        raise ConfigError(f"expected workers of 1 or more, found {workers}")
    out = Path(out)
    try:
        if file := next((path for path in [out, *out.parents] if path.is_file()), None):
            raise DataError(f"expected a folder for {name!r}, found {out}, and {file} is a file: change --out")
        source = get_source(name, inputs, val_fraction, text_field, skip_null)
        settings = {"name": source.name, "source": source.settings()}
        settings |= {"tokenizer": tokenizer, "shard_tokens": shard_tokens}
        get_tokenizer(tokenizer)  # an unknown name is an error before anything is written
        if (floor := source.floor()) and tokenizer != "bytes":
            raise ConfigError(f"corpus {name!r} is made of bytes, found tokenizer {tokenizer}: use bytes")
        if not (out / PARTIAL_MANIFEST).exists() and (corpus := _finished(out, settings)):
            _refuse_changed(source, out, read_manifest(out / MANIFEST) or {})
            return corpus
        with take_lock(out / LOCK, wait=True) or contextlib.nullcontext():
            if _finished(out, settings) is None:  # it may be by now, through the one that was waited for
                manifest = _begin(out, settings, source, floor)
                _sweep(out)
                _write_shards(out, source, manifest, workers or usable_cores(), progress, limit_shards)
            _sweep(out)
    except OSError as error:
        raise DataError(f"cannot use {error.filename or out}: {error.strerror or error}: look at its rights") from error
    return open_corpus(out)


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of some documents on end, (n,) uint16, each after a `document_start`. Raises DataError."""
    start = np.array([tokenizer.document_start], dtype=np.uint16)
    parts: list[np.ndarray] = []
    for text in texts:
        try:
            parts += start, tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"the document that begins {text[:40]!r}: {error}") from error
    return np.concatenate(parts)


def _write_shards(
    out: Path,
    source: Source,
    manifest: dict[str, Any],
    workers: int,
    progress: Callable[[Progress], None] | None,
    limit_shards: int | None,
) -> None:
    """Write the shards that `manifest` lacks, keeping it up to date on disk, and corpus.json after the last one."""
    splits = manifest["splits"]
    total_documents = source.count()

    def report(documents: int, tokens_in_hand: int) -> None:
        if progress:
            finished = sum(shard["tokens"] for split in SPLITS for shard in splits[split])
            progress(Progress(documents, finished + tokens_in_hand, total_documents))

    def may_stop() -> bool:
        unfinished = resume.stream < len(source.streams)
        return unfinished and limit_shards is not None and len(splits["train"]) >= limit_shards

    resume = Resume(**manifest["resume"])
    if may_stop():
        return
    while resume.stream < len(source.streams):
        stream = source.streams[resume.stream]
        with (
            contextlib.closing(source.documents(stream, resume.position)) as documents,
            contextlib.closing(cut_into_chunks(documents, resume.position)) as chunks,
            contextlib.closing(encode_in_order(chunks, manifest["tokenizer"], workers)) as encoded,
            contextlib.closing(pack(encoded, resume, manifest["shard_tokens"], report)) as packed,
        ):
            for tokens, resume in packed:  # where to continue replaces where this stream was begun
                if len(tokens):
                    split = "val" if stream == "val" or (stream == "all" and not splits["val"]) else "train"
                    shard = write_shard(out / f"{split}_{len(splits[split]):06d}.bin", tokens)
                    splits[split].append(shard.as_json())
                manifest.update(documents=resume.documents, resume=asdict(resume))
                write_manifest(out / PARTIAL_MANIFEST, manifest)
                if may_stop():
                    return
    if not all(splits.values()):
        raise DataError(
            f"expected documents for training and for validation, found too few in corpus {manifest['name']!r}: "
            "give more of them with --input, or lower --shard_tokens"
        )
    del manifest["resume"]
    write_manifest(out / MANIFEST, {**manifest, "complete": True})


def pack(
    encoded: Iterable[tuple[Chunk, np.ndarray]], resume: Resume, shard_tokens: int, report: Callable[[int, int], None]
) -> Generator[tuple[np.ndarray, Resume], None, None]:
    """Tokens cut into shards, each with where to continue after it; last the stream's rest, which may be empty.

    The array is one buffer, filled again for the next shard.
    """
    buffer, filled = np.empty(shard_tokens, dtype=np.uint16), 0
    skip, documents = resume.skip, resume.documents
    for chunk, tokens in encoded:
        taken = min(skip, len(tokens))
        skip -= taken
        while taken < len(tokens):
            count = min(shard_tokens - filled, len(tokens) - taken)
            buffer[filled : filled + count] = tokens[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == shard_tokens:
                yield buffer, Resume(resume.stream, chunk.position, taken, documents)
                filled = 0
        documents += len(chunk.texts)
        report(documents, filled)
    yield buffer[:filled], Resume(resume.stream + 1, None, 0, documents)


def cut_into_chunks(
    documents: Iterable[tuple[str, Position]], position: Position = None
) -> Generator[Chunk, None, None]:
    """Documents gathered until they are enough work for a thread; each comes with the source's position after it."""
    texts: list[str] = []
    characters = 0
    for text, after in documents:
        texts.append(text)
        characters += len(text) + 1  # a document is work even if empty
        if characters >= CHUNK_CHARACTERS:
            yield Chunk(texts, position)
            texts, characters, position = [], 0, after
    if texts:
        yield Chunk(texts, position)


def encode_in_order(
    chunks: Iterable[Chunk], tokenizer: str, workers: int
) -> Generator[tuple[Chunk, np.ndarray], None, None]:
    """Each chunk with its tokens, in order, tokenised by `workers` threads: tiktoken lets go of Python's lock.

    As many chunks wait as are worked on, so that a thread is never idle and memory stays what a few chunks take.
    """
    known = get_tokenizer(tokenizer)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    given: deque[tuple[Chunk, Future[np.ndarray]]] = deque()
    try:
        for chunk in chunks:
            given.append((chunk, pool.submit(encode_documents, chunk.texts, known)))
            if len(given) == 2 * workers:
                first, tokens = given.popleft()
                yield first, tokens.result()
        for chunk, tokens in given:
            yield chunk, tokens.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(out: Path, settings: dict[str, Any]) -> Corpus | None:
    """The finished corpus in `out`, or None; one whose shards are gone is none. Raises DataError for another corpus."""
    manifest = read_manifest(out / MANIFEST)
    if manifest is None:
        return None
    if differing := _differing(manifest, settings):
        raise DataError(f"{out} holds a finished corpus of another {differing}: choose another --out, or remove it")
    try:
        return open_corpus(out)
    except DataError:
        return None


def _refuse_changed(source: Source, out: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError where a file is not the one that the corpus in `out`, finished or not, was made from.

    Names and sizes alone do not tell, and whether a time is later depends on whose clock made it.
    """
    for file, before in zip(source.files, manifest.get(MODIFIED, ()), strict=False):
        if file.stat().st_mtime_ns != before:
            raise DataError(f"{file} was changed since {out} was prepared from it: choose another --out, or remove it")


def _differing(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that a manifest has otherwise, in words; empty if it has them all."""
    return " and ".join(key for key, value in settings.items() if manifest.get(key) != value)


def _begin(out: Path, settings: dict[str, Any], source: Source, floor: EntropyFloor | None) -> dict[str, Any]:
    """The manifest of the unfinished preparation in `out` if it has its shards, else a fresh one.

    Raises DataError for a preparation with other settings, and for shards that are not ours.
    """
    manifest = read_manifest(out / PARTIAL_MANIFEST)
    if manifest is None and not (out / MANIFEST).exists() and (others := shard_names(out)):
        raise DataError(f"{out} holds {others[0]}, and no manifest of ours: choose another --out")
    if manifest is not None and any(manifest["splits"][split] for split in SPLITS):
        if differing := _differing(manifest, settings):
            raise DataError(
                f"{out} holds an unfinished corpus of another {differing}: give the same to continue, choose another "
                "--out, or remove it"
            )
        _refuse_changed(source, out, manifest)
        with contextlib.suppress(DataError):
            for shard in (shard for split in SPLITS for shard in manifest["splits"][split]):
                open_shard(out / shard["file"])
            (out / MANIFEST).unlink(missing_ok=True)
            return manifest
    manifest = {
        "format": FORMAT,
        **settings,
        **({"floor": floor.as_json()} if floor else {}),
        **({MODIFIED: [file.stat().st_mtime_ns for file in source.files]} if source.files else {}),
        **({"left_out": source.left_out.as_json()} if source.left_out.count else {}),
        **({"nulls": nulls} if (nulls := source.nulls()) is not None else {}),
        "vocab_size": get_tokenizer(settings["tokenizer"]).vocab_size,
        "complete": False,
        "documents": 0,
        "splits": {split: [] for split in SPLITS},
        "resume": asdict(Resume()),
    }
    write_manifest(out / PARTIAL_MANIFEST, manifest)  # first: shards to come must not look like a foreign corpus
    (out / MANIFEST).unlink(missing_ok=True)  # there only if its shards are not
    return manifest


def _sweep(out: Path) -> None:
    """Remove what interrupted or superseded preparations left; only the holder of the lock may."""
    if (out / MANIFEST).exists():
        (out / PARTIAL_MANIFEST).unlink(missing_ok=True)
    corpus = open_corpus(out)
    kept = {shard.name for split in SPLITS for shard in corpus.splits[split]}
    for path in out.iterdir():
        ours = _OUR_SHARD.fullmatch(path.name) and path.name not in kept
        if ours or _OUR_TEMPORARY.fullmatch(path.name):
            path.unlink()


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, whole or not at all."""
    write_atomically(path, [(json.dumps(manifest, indent=1) + "\n").encode()])


@dataclass(frozen=True)
class Part:
    """What one part came to: its documents, and its shards by split. The first shard of part 0 is validation."""

    tokenizer: str
    documents: int
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]


def write_part(
    texts: Iterable[str], out: Path, number: int, tokenizer: str, *, shard_tokens: int = 100_000_000, workers: int = 1
) -> Part:
    """Write part `number` of a corpus in folder `out` from its documents.

    The same documents give the same bytes, and the list of shards is written last: a part whose machine was lost is
    written again. Raises ConfigError for options that cannot be, DataError where a text or the disk refuses.
    """
    if number < 0 or not 1 <= shard_tokens < 2**31:
        raise ConfigError(
            f"expected a part's number from 0 and shard_tokens from 1 to 2147483647, found {number} and {shard_tokens}"
        )
    get_tokenizer(tokenizer)  # an unknown name is an error before anything is written
    out.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    documents = 0

    def count(so_far: int, _: int) -> None:
        nonlocal documents
        documents = so_far

    chunks = cut_into_chunks((text, None) for text in texts)
    for tokens, _ in pack(encode_in_order(chunks, tokenizer, workers), Resume(), shard_tokens, count):
        if len(tokens):
            split = "val" if number == 0 and not shards["val"] else "train"
            path = out / f"part_{number:05d}_{split}_{len(shards[split]):06d}.bin"
            shards[split].append(write_shard(path, tokens))
    part = Part(tokenizer, documents, tuple(shards["train"]), tuple(shards["val"]))
    write_manifest(_listing(out, number), asdict(part))
    return part


def merge_parts(out: Path, name: str, parts: int) -> Corpus:
    """Put `parts` parts, from 0 on, together as corpus `name`, in their order; the corpus.

    Raises DataError, naming the first of them, where parts are missing, damaged or of several tokenizers, or where
    there is nothing to train or to validate on. Every shard's size is compared with its header; its SHA-256 is the one
    that was taken as it was written, and is checked when it is first read.
    """
    missing = [number for number in range(parts) if not _listing(out, number).is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise DataError(f"{out}: expected parts 0 to {parts - 1}, found none of {shown}: write them first")
    found = [_read_part(_listing(out, number)) for number in range(parts)]
    tokenizers = sorted({part.tokenizer for part in found})
    if len(tokenizers) != 1:
        raise DataError(
            f"{out}: expected parts of one tokenizer, found {' and '.join(tokenizers) or 'none'}: write them again"
        )
    manifest = {
        "format": FORMAT,
        "name": name,
        "source": {"kind": "parts", "parts": parts},
        "tokenizer": tokenizers[0],
        "vocab_size": get_tokenizer(tokenizers[0]).vocab_size,
        "complete": True,
        "documents": sum(part.documents for part in found),
        "splits": {split: [shard.as_json() for part in found for shard in getattr(part, split)] for split in SPLITS},
    }
    if not all(manifest["splits"].values()):
        raise DataError(f"{out}: expected documents for training and for validation, found too few: lower shard_tokens")
    write_manifest(out / MANIFEST, manifest)
    try:
        return open_corpus(out)
    except DataError:
        (out / MANIFEST).unlink()
        raise


def _listing(out: Path, number: int) -> Path:
    return out / f"part_{number:05d}.json"


def _read_part(path: Path) -> Part:
    """What a part's listing says; what it says of its shards is checked when the corpus is opened. Raises DataError."""
    try:
        content = parse_json(read_bytes(path))
        shards = {split: tuple(ShardInfo(**shard) for shard in content[split]) for split in SPLITS}
        part = Part(content["tokenizer"], content["documents"], shards["train"], shards["val"])
        if is_count(part.documents) and get_tokenizer(part.tokenizer):
            return part
    except (ValueError, KeyError, TypeError, ConfigError):
        pass
    raise DataError(f"{path} is damaged: expected the list of a part's shards: write that part again")
