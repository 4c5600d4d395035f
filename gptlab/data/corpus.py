"""What a corpus is: the source of its documents, the entropy floor of its loss; an opened one, a folder of shards.

Kinds of sources are in corpora.py and synthetic.py; prepare.py makes a corpus of one. Ours carry a manifest
(corpus.json, or corpus.partial.json while they are being prepared). Folders of nanoGPT, build-nanogpt and llm.c carry
none: their files' names say what they are, and their tokens which vocabulary they may be of.
"""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.shards import ShardInfo, open_shard, sha256_of
from gptlab.data.text_files import LeftOut
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError, DataError, shortened, shown
from gptlab.files import GB, is_count, parse_json, read_bytes, read_text

Position = Any  # JSON-able; None is the beginning
Documents = Generator[tuple[str, Position], None, None]

MANIFEST = "corpus.json"
PARTIAL_MANIFEST = "corpus.partial.json"
FORMAT = 1
LARGEST_MANIFEST = GB // 4
SPLITS = ("train", "val")
TOKENIZER_FILE = "tokenizer.txt"  # in a folder of another program's shards: the name of their tokenizer, if not gpt2

_SHARD_NAME = re.compile(r"\w[\w.-]*\.bin", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOREIGN_SHARD = re.compile(r"((?!\.).*_)?(train|val)(_\d{6})?(\.(?i:bin|npy))", re.DOTALL)
_PART = re.compile(r"part_\d{5}_")
UNKNOWN = "unknown"
"""The tokenizer of shards that name none and cannot be GPT-2's: they can be read and scored, not turned into text."""
VOCABULARY_FILE = "meta.pkl"  # nanoGPT's, of its character-level sets; a pickle, which is never opened
FEW_IDS, MANY_TOKENS = 256, 1024
"""GPT-2's first 256 tokens are single bytes: no text of a thousand tokens has no others."""


class Source(ABC):
    """Documents in a fixed order, cut into `streams` that are read one after the other.

    A stream named "val" or "train" is that split; in one named "all" the first shard is validation.
    """

    name: str
    streams: tuple[str, ...]
    files: tuple[Path, ...] = ()
    """Where a change since the corpus was prepared can be seen."""
    left_out: LeftOut = LeftOut()
    """What lies next to the files and is not read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the documents, JSON-able: a preparation continues only if it is the same."""

    @abstractmethod
    def documents(self, stream: str, position: Position = None) -> Documents:
        """The documents of a stream after `position`, each with the position after it. Raises DataError."""

    def count(self) -> int | None:
        """How many documents there are in all streams together, where that is known beforehand."""
        return None

    def floor(self) -> EntropyFloor | None:
        """The loss that no model can beat, where the documents come from a known distribution."""
        return None

    def nulls(self) -> int | None:
        """Documents that are left out because they are null, where that was asked for. Raises DataError."""
        return None


@dataclass(frozen=True)
class EntropyFloor:
    """The loss that no model can beat: nats of a source's characters, exact for the windows of a validation stream.

    The floor of a window's tokens is the conditional entropy of each given all tokens of the window before it, and
    nothing from outside the window, for one who knows the source and where the window stands in the stream. No model's
    expected loss is below it, and the source's own predictor reaches it. A model that learnt from windows of the same
    length knows where they stand too, by its position embeddings: a source is periodic, and a floor is only given for
    windows of whole periods. A validation stream is NUL and then one document.

    period: of the character at each place of a period, with all of the period before it in sight
    start: of a character with none, one, two, ... characters of its window in sight, where that is too few for `period`
    parts: nats of single kinds of character, by name, for the reader
    """

    period: tuple[float, ...]
    start: tuple[float, ...] = ()
    parts: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        assert self.period
        assert len(self.period) == 1 or not self.start, "only sources without places begin slowly"

    @property
    def rate(self) -> float:
        """Nats a character without end and without windows: the source's entropy rate."""
        return math.fsum(self.period) / len(self.period)

    def of_windows(self, block_size: int, count: int) -> float:
        """Nats a token, mean over all positions of the first `count` windows of a validation stream.

        A window's first token is NUL in the first window, which shows nothing, and a character in all others. Raises
        ConfigError where windows of block_size tokens are no whole periods.
        """
        if block_size % len(self.period):
            fitting = max(1, round(block_size / len(self.period))) * len(self.period)
            raise ConfigError(
                f"the floor of this corpus is known for windows of whole lines, of {len(self.period)} tokens each, "
                f"found block_size {block_size}; try {fitting}"
            )
        first, other = (
            math.fsum([*self.start[seen : seen + block_size], self.rate * max(0, block_size - len(self.start[seen:]))])
            for seen in (0, 1)
        )
        return (first + other * (count - 1)) / (block_size * count)

    def as_json(self) -> dict[str, Any]:
        """What a corpus's manifest holds of it; `rate` is there for the reader."""
        parts = {"parts": dict(self.parts)} if self.parts else {}
        return {"unit": "nats a token", "rate": self.rate, **parts, "period": [*self.period], "start": [*self.start]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EntropyFloor:
        """The inverse of `as_json`. Raises ValueError, KeyError or TypeError for anything else."""
        period, start = (_nats(content[key]) for key in ("period", "start"))
        if not period or (start and len(period) > 1):
            raise ValueError("expected a period, and a start only with a period of one")
        return cls(period, start, content.get("parts"))


def _nats(values: Sequence[Any]) -> tuple[float, ...]:
    found = tuple(map(float, values))
    if not all(0 <= value < math.inf for value in found):
        raise ValueError(f"expected entropies, found {shown(values)}")
    return found


@dataclass(frozen=True)
class Corpus:
    """A folder of shards as it was when opened; `complete` is False while more are being prepared.

    floor: the loss that no model can beat, of a corpus that is made up. left_out: files next to what was read. nulls:
    documents left out because their text was null. doubt: why the tokenizer is UNKNOWN.
    """

    folder: Path
    name: str
    tokenizer: str
    vocab_size: int
    complete: bool
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]
    floor: EntropyFloor | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    nulls: int = 0
    doubt: str = ""
    _verified: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def splits(self) -> dict[str, tuple[ShardInfo, ...]]:
        """The shards of "train" and of "val", in order."""
        return {"train": self.train, "val": self.val}

    def tokens(self, split: str) -> int:
        """Tokens in a split, of the shards there are."""
        return sum(shard.tokens for shard in self.splits[split])

    def identity(self) -> dict[str, Any]:
        """What a run writes down of its data, JSON-able; `grew_from` compares with it."""
        hashes = {split: [shard.sha256 for shard in self.splits[split]] for split in SPLITS}
        return {"tokenizer": self.tokenizer, **hashes, "complete": self.complete}

    def grew_from(self, recorded: Mapping[str, Any]) -> list[str]:
        """Empty if this is the corpus whose `identity()` was recorded, or that one with more shards prepared since.

        Otherwise what differs, one line each.
        """
        differences = []
        if self.tokenizer != recorded.get("tokenizer"):
            differences.append(f"tokenizer: recorded {recorded.get('tokenizer')}, found {self.tokenizer}")
        for split in SPLITS:
            before, now = recorded[split], [shard.sha256 for shard in self.splits[split]]
            changed = [index for index, (old, new) in enumerate(zip(before, now, strict=False)) if old != new]
            if changed:
                old, new = before[changed[0]], now[changed[0]]
                differences.append(f"{split} shard {changed[0]}: recorded SHA-256 {old[:12]}…, found {new[:12]}…")
            if len(now) < len(before) or (recorded.get("complete", True) and len(now) > len(before)):
                differences.append(f"{split}: recorded {len(before)} shards, found {len(now)}")
        if recorded.get("complete", True) and not self.complete:
            differences.append("recorded a complete corpus, found one still being prepared")
        return differences

    def read(self, split: str, index: int) -> np.ndarray:
        """Tokens of one shard, (n,) uint16, mapped. Its checksum is verified the first time; raises DataError."""
        shard = self.splits[split][index]
        if shard.sha256 not in self._verified:
            self._verified[shard.sha256] = open_shard(self.folder / shard.name, shard.sha256)
        return self._verified[shard.sha256]

    def wait_for(self, split: str, index: int, *, alive: Callable[[], bool], timeout: float = math.inf) -> Corpus:
        """The corpus once it has that shard, or is complete; see `wait_for_shard`."""
        if self.complete or index < len(self.splits[split]):
            return self
        found = wait_for_shard(self.folder, split, index, alive=alive, timeout=timeout)
        return replace(found, _verified=self._verified)


def open_corpus(folder: str | Path) -> Corpus:
    """The corpus in `folder`, finished or not, ours or another program's (see the top of this file).

    Raises DataError where there is none, or where its manifest or a shard is damaged, missing or of another size.
    Other programs' shards are hashed here, which takes a second per gigabyte or two.
    """
    folder = Path(folder)
    # The finished one is looked for twice, as a preparation may end between the first two looks.
    for manifest in (MANIFEST, PARTIAL_MANIFEST, MANIFEST):
        if (content := read_manifest(folder / manifest)) is not None:
            return _open_ours(folder, content)
    return _open_foreign(folder)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest's content, checked for shape, or None where there is no such file. Raises DataError."""
    try:
        content = parse_json(read_bytes(path, limit=LARGEST_MANIFEST))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if content is None or not _well_formed(content):
        raise DataError(f"{path} is damaged: expected a corpus manifest: remove the folder and prepare it again")
    if content["format"] != FORMAT:
        raise DataError(f"{path}: expected manifest format {FORMAT}, found {shown(content['format'])}: update gptlab")
    return content


def _well_formed(content: Any) -> bool:
    try:
        if "floor" in content:
            EntropyFloor.from_json(content["floor"])
        if "left_out" in content:
            LeftOut.from_json(content["left_out"])
        return (
            is_count(content.get("nulls", 0))
            and isinstance(content.get("modified_ns", []), list)
            and {"format", "name", "source", "tokenizer", "vocab_size", "complete"} <= content.keys()
            and isinstance(content["name"], str)
            and isinstance(content["complete"], bool)
            and get_tokenizer(content["tokenizer"]).vocab_size == content["vocab_size"]
            and all(
                # A name without folders: a manifest from elsewhere must not reach out of its own.
                _SHARD_NAME.fullmatch(shard["file"])
                and is_count(shard["tokens"])
                and shard["tokens"] > 0
                and _SHA256.fullmatch(shard["sha256"])
                for split in SPLITS
                for shard in content["splits"][split]
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ConfigError):
        return False


def wait_for_shard(
    folder: str | Path, split: str, index: int, *, alive: Callable[[], bool], timeout: float = math.inf
) -> Corpus:
    """The corpus in `folder` as soon as it has shard `index` of `split`, or is complete without it.

    The folder need not exist yet. `alive` says whether anyone is still preparing it. Raises DataError after `timeout`
    seconds, or when nobody prepares it and the shard is not there.
    """
    deadline = time.monotonic() + timeout
    while True:
        running = alive()  # asked before looking, so that a shard finished just before the end is seen
        corpus = open_corpus(folder) if holds_manifest(Path(folder)) else None
        if corpus and (corpus.complete or index < len(corpus.splits[split])):
            return corpus
        if not running:
            raise DataError(f"{folder}: expected {split} shard {index}, but its preparation ended: start it again")
        if time.monotonic() > deadline:
            late = f"within {timeout:g} seconds, found none: try later"
            raise DataError(f"{folder}: expected {split} shard {index} {late}")
        time.sleep(min(0.5, timeout / 10))


def _open_ours(folder: Path, content: dict[str, Any]) -> Corpus:
    shards = content["splits"]
    train, val = (tuple(ShardInfo(one["file"], one["tokens"], one["sha256"]) for one in shards[key]) for key in SPLITS)
    for shard in (*train, *val):
        if (found := len(open_shard(folder / shard.name))) != shard.tokens:  # header and size; checksums in read()
            raise DataError(f"{folder / shard.name}: expected {shard.tokens} tokens, found {found}: prepare it again")
    floor = EntropyFloor.from_json(content["floor"]) if "floor" in content else None
    left_out = LeftOut.from_json(content["left_out"]) if "left_out" in content else LeftOut()
    name, tokenizer, vocab_size = content["name"], content["tokenizer"], content["vocab_size"]
    nulls = content.get("nulls", 0)
    return Corpus(folder, name, tokenizer, vocab_size, content["complete"], train, val, floor, left_out, nulls)


def shard_names(folder: Path) -> list[str]:
    """The names of files in a folder that are shards, as other programs write them or we do."""
    return sorted(path.name for path in folder.iterdir() if _FOREIGN_SHARD.fullmatch(path.name))


def holds_corpus(folder: Path) -> bool:
    """Whether there is a corpus in a folder, or a part of one."""
    return holds_manifest(folder) or bool(shard_names(folder))


def _open_foreign(folder: Path) -> Corpus:
    if not folder.is_dir():
        raise DataError(f"expected a corpus at {folder}, found no folder: make one with `gptlab data prepare`")
    names = _foreign_shards(folder)
    left_out, read = LeftOut(), {*names["train"], *names["val"], TOKENIZER_FILE, VOCABULARY_FILE}
    for path in sorted(folder.iterdir()):
        if path.name not in read:
            left_out.add(path)
    if not all(names.values()):
        found = ", ".join(split for split in SPLITS if names[split]) or "neither"
        others = f" ({left_out})" if left_out.count else ""
        raise DataError(
            f"expected a corpus in {folder} ({MANIFEST}, or files such as train.bin and val.bin), found {found}"
            f"{others}: make one with `gptlab data prepare`"
        )
    tokens = {name: open_shard(folder / name) for name in (*names["train"], *names["val"])}
    train, val = (
        tuple(ShardInfo(name, len(tokens[name]), sha256_of(folder / name)) for name in names[split]) for split in SPLITS
    )
    tokenizer, vocab_size, doubt = _foreign_tokenizer(folder, tokens)
    name = folder.resolve().name
    return Corpus(folder, name, tokenizer, vocab_size, True, train, val, left_out=left_out, doubt=doubt)


def _foreign_shards(folder: Path) -> dict[str, list[str]]:
    """The shards by split of the one data set in a folder: of the files without a prefix where there are such.

    Raises DataError where files of several sets lie there, or of several kinds: both would be trained on.
    """
    sets: dict[str, list[re.Match[str]]] = {}
    for match in filter(None, map(_FOREIGN_SHARD.fullmatch, shard_names(folder))):
        sets.setdefault(_PART.sub("part_", match[1] or ""), []).append(match)
    if {match[2] for match in sets.get("", ())} == set(SPLITS):
        sets = {"": sets[""]}
    if len(sets) > 1:
        first = shortened(", ".join(matches[0].string for matches in sets.values()), 200)
        raise DataError(f"{folder}: expected the shards of one corpus, found several ({first}): move the others away")
    names = {}
    for split in SPLITS:
        found = [match for match in next(iter(sets.values()), ()) if match[2] == split]
        names[split] = [match.string for match in found]
        one_series = all(match[3] for match in found) and len({match[4].lower() for match in found}) == 1
        if len(found) > 1 and not one_series:
            several = shortened(" and ".join(names[split]), 200)
            raise DataError(f"{folder}: expected the {split} tokens once, found {several}: move all but one away")
    return names


def _foreign_tokenizer(folder: Path, shards: Mapping[str, np.ndarray]) -> tuple[str, int, str]:
    """(tokenizer, vocabulary, doubt) of shards that name no tokenizer: GPT-2's, unless something speaks against it."""
    if (named := folder / TOKENIZER_FILE).exists():
        tokenizer = get_tokenizer(read_text(named).strip())
        return tokenizer.name, tokenizer.vocab_size, ""
    gpt2, largest = get_tokenizer("gpt2"), 0
    doubt = f"{VOCABULARY_FILE} stands for a vocabulary of their own" * (folder / VOCABULARY_FILE).exists()
    for name, tokens in shards.items():
        largest = max(largest, most := int(tokens.max()))
        if most >= gpt2.vocab_size and not doubt:
            place = int(np.argmax(tokens >= gpt2.vocab_size))
            doubt = f"{name} has token {int(tokens[place])} at position {place}, GPT-2 has {gpt2.vocab_size}"
    if not doubt and largest < FEW_IDS and sum(map(len, shards.values())) >= MANY_TOKENS:
        doubt = f"no token is above {largest}, which is no text of GPT-2's tokenizer"
    return (UNKNOWN, largest + 1, doubt) if doubt else (gpt2.name, gpt2.vocab_size, "")


def holds_manifest(folder: Path) -> bool:
    """Whether there is a corpus of ours in a folder, finished or not."""
    return (folder / MANIFEST).exists() or (folder / PARTIAL_MANIFEST).exists()
