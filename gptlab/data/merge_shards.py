"""A corpus made in parts by many machines, and put together: for texts that one machine would be too slow for.

Every machine writes one part or more, each from documents of its own, into a folder that all of them see: shards in the
usual format and, last, part_NNNNN.json, which lists them. Once all parts are there, `merge_parts` writes the corpus's
manifest over the same files, so that nothing is copied. Who hands the documents out is not here: docs/scale.md has a
datatrove pipeline that does. One machine needs none of this: see prepare.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gptlab.data.corpus import FORMAT, MANIFEST, SPLITS, Corpus, open_corpus
from gptlab.data.prepare import Resume, cut_into_chunks, encode_in_order, pack, write_manifest
from gptlab.data.shards import ShardInfo, write_shard
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError, DataError
from gptlab.files import read_bytes
from gptlab.parsing import is_count, parse_json


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
    found = [_read(_listing(out, number)) for number in range(parts)]
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


def _read(path: Path) -> Part:
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
