"""A model's own tokenizer, from the files that transformers keeps next to its weights; and ours written as such files.

Read is tokenizer.json, or vocab.json with merges.txt as GPT-2 has them, through the package tokenizers. What is in them
decides: GPT-2's own vocabulary and merges are our `gpt2`, whatever the folder is called, and nothing is concluded from
the size of a vocabulary. Files may come from anyone: they are read up to a size, and no class or code that they name is
looked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.tokenizers import (
    END_OF_TEXT,
    MERGES_FILE,
    TOKENIZERS,
    Tokenizer,
    encodable,
    get_tokenizer,
    read_merges,
    visible_bytes,
)
from gptlab.errors import DataError, needs_package, one_line, shown
from gptlab.files import MB, is_count, parse_json, read_bytes

WHOLE, SETTINGS, SPECIAL, ADDED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
VOCABULARY, MERGES = "vocab.json", "merges.txt"
UNREAD = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt")
"""Files of tokenizers that transformers writes as tokenizer.json too, if it is asked to."""
READ = (WHOLE, SETTINGS, SPECIAL, ADDED, VOCABULARY, MERGES)
KEPT = (*READ, *UNREAD, "chat_template.jinja", "generation_config.json", "README.md", "LICENSE")
"""What belongs to a model besides its weights and sizes."""
LIMIT = 64 * MB
"""Bytes of a file of a tokenizer; one of 250,000 tokens has 17 MB."""
CONTEXT = 8
"""Tokens that a new token's text is decoded after: some tokenizers drop a blank at the beginning."""
ADDS_NOTHING = ("TemplateProcessing", {})
"""What transformers 5 writes for a tokenizer that puts nothing before or after a text."""
Files = Mapping[str, bytes]


class OwnTokenizer(Tokenizer):
    """A tokenizer that a model brings along; a special token spelled out in text is that token, as in transformers."""

    def __init__(self, description: str, name: str, settings: Mapping[str, Any], ids: Mapping[str, Any]) -> None:
        """description: the text of a tokenizer.json; settings: of tokenizer_config.json; ids: of config.json.

        Raises DataError where it is none that the package tokenizers can read, or the package is missing.
        """
        try:
            import tokenizers
        except ImportError:
            raise DataError(needs_package(name, "tokenizers")) from None
        self.name = name
        self._inner: Any = _guarded(name, "it cannot be read", lambda: tokenizers.Tokenizer.from_str(description))
        self._inner.no_truncation()  # what it was trained with may be in its file
        self._inner.no_padding()
        self._known: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._known.values(), default=-1) + 1
        self._end = self._special("eos", settings, ids)
        start = self._special("bos", settings, ids)
        self._start = self._end if start is None else start
        self._adds_start = settings.get("add_bos_token") is True and not self._ids("", special=True)

    def _special(self, kind: str, settings: Mapping[str, Any], ids: Mapping[str, Any]) -> int | None:
        """The token that the tokenizer's settings call so, else the model's."""
        if (content := _content(settings.get(f"{kind}_token"))) in self._known:
            return self._known[content]
        number: Any = ids.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if is_count(number) and number in self._known.values() else None

    @property
    def document_start(self) -> int:
        if self._start is None:
            raise DataError(f"{self.name} has no token that starts a document, so that an empty text has no tokens")
        return self._start

    @property
    def end_of_text(self) -> int | None:
        return self._end

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._ids(text, special=False), dtype=np.int64)

    def prompt(self, text: str) -> list[int]:
        """Tokens to continue from, with those that the tokenizer itself puts before a text."""
        ids = self._ids(text, special=True)
        return [self.document_start, *ids] if self._adds_start or not ids else ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        plain = encodable(text)
        problem = "it has no tokens for this text"
        return _guarded(self.name, problem, lambda: self._inner.encode(plain, add_special_tokens=special).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._inner.decode([int(token) for token in tokens], skip_special_tokens=False)

    def stream(self, prompt: Sequence[int]) -> Callable[[int | None], str]:
        before, new = list(prompt)[-CONTEXT:], []

        def text(token: int | None) -> str:
            new.extend(() if token is None else (token,))
            whole = self.decode([*before, *new])
            if token is not None and whole.endswith("\ufffd"):
                return ""  # a part of a character
            added = whole[len(self.decode(before)) :]
            before[:] = [*before, *new][-CONTEXT:]
            new.clear()
            return added

        return text

    def count_bytes(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes of the text that the tokens decode to, special tokens left out."""
        return len(self._inner.decode(np.ravel(tokens).tolist(), skip_special_tokens=True).encode())

    def beyond(self, rows: int) -> str:
        number, token = min(((n, t) for t, n in self._known.items() if n >= rows), default=(0, ""))
        return f"{self.name} has {shown(token)} as token {number}" if number else ""


def read_files(folder: Path) -> dict[str, bytes]:
    """Those of KEPT that a folder holds, by name; raises DataError where one is no regular file or too large."""
    found = {}
    for name in KEPT:
        try:
            found[name] = read_bytes(folder / name, limit=LIMIT)
        except FileNotFoundError:
            continue
    return found


def read_tokenizer(folder: Path, ids: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a model's folder, ours where it is the same; None where there is none.

    ids: the model's config, for its bos_token_id and eos_token_id. Raises DataError where one is damaged, or is of a
    kind that is not read.
    """
    files = read_files(folder)
    if WHOLE in files:
        name, text = WHOLE, _text(files, WHOLE, folder)
        description = _object(files, WHOLE, folder)
        settings = {**_object(files, SPECIAL, folder), **_object(files, SETTINGS, folder)}
    elif VOCABULARY in files and MERGES in files:
        name = VOCABULARY
        settings = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
        settings |= {**_object(files, SPECIAL, folder), **_object(files, SETTINGS, folder)}
        description = _byte_level(files, folder, settings)
        text = json.dumps(description)
    elif odd := [name for name in (VOCABULARY, MERGES, *UNREAD) if name in files]:
        raise DataError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, found {' and '.join(odd)}; write the "
            f"first with transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    else:
        return None
    if ours := next((one for one in TOKENIZERS if _is(one, description)), None):
        return get_tokenizer(ours)
    digest = hashlib.sha256(b"\0".join(files[name] for name in READ if name in files)).hexdigest()
    return OwnTokenizer(text, f"{folder / name} ({digest[:12]})", settings, ids)


def files_of(tokenizer: str, block_size: int) -> dict[str, bytes]:
    """A tokenizer of ours as the files that transformers reads.

    gpt2 as its merges and every token's number; bytes as byte-level BPE without a merge, each byte its own number.
    """
    settings: dict[str, Any] = {"model_max_length": block_size}
    if tokenizer == "bytes":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {WHOLE: _written(_description(*_model(tokenizer))), SETTINGS: _written(settings)}
    settings |= {"tokenizer_class": "GPT2Tokenizer"}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {MERGES: read_bytes(MERGES_FILE), VOCABULARY: _written(_model(tokenizer)[0]), SETTINGS: _written(settings)}


def _model(tokenizer: str) -> tuple[dict[str, int], list[str]]:
    """(every token's number by its visible bytes, the merges) of a tokenizer of ours."""
    if tokenizer == "bytes":
        return {character: byte for byte, character in sorted(visible_bytes().items())}, []
    merges = read_merges(MERGES_FILE)
    strings = [*visible_bytes().values(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    return {string: number for number, string in enumerate(strings)}, merges


def _description(vocabulary: Mapping[str, int], merges: Sequence[str]) -> dict[str, Any]:
    """What a tokenizer.json says of a byte-level BPE, GPT-2's kind."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(vocabulary), "merges": [merge.split(" ") for merge in merges],
        },
    }  # fmt: skip


def _byte_level(files: Files, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer.json would say of GPT-2's two files and of the tokens added to them."""
    lines = _text(files, MERGES, folder).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    vocabulary = _object(files, VOCABULARY, folder)
    if not all(is_count(number) for number in vocabulary.values()) or any(len(m.split(" ")) != 2 for m in merges):
        raise DataError(f"{folder}: expected a number for each token of vocab.json, two strings a line of merges.txt")
    found = _description(vocabulary, merges)
    found["pre_tokenizer"] = {**found["pre_tokenizer"], "add_prefix_space": settings.get("add_prefix_space") is True}
    added = _added(files, folder, settings, vocabulary)
    if not all(isinstance(content, str) and is_count(number) for content, number in added.items()):
        raise DataError(f"{folder}: expected a number for each added token, found {shown(added)}")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"] = [
        {"id": number, "content": content, **flags, "special": True}
        for content, number in sorted(added.items(), key=lambda item: item[1])
    ]
    return found


def _added(files: Files, folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[Any, Any]:
    """The number of every token that is to be found in text before anything else, wherever the folder lists it."""
    added: dict[Any, Any] = {**_object(files, ADDED, folder)}
    for number, token in _mapping(settings.get("added_tokens_decoder")).items():
        added[_content(token)] = int(number) if number.isdecimal() and len(number) < 19 else None
    named = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
    contents = [_content(token) for token in [*named, *_list(settings.get("additional_special_tokens"))]]
    return {**added, **{content: vocabulary[content] for content in contents if content and content in vocabulary}}


def _content(token: object) -> str | None:
    """The text of a token as settings name it: itself, or an object with flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _is(tokenizer: str, description: Mapping[str, Any]) -> bool:
    """Whether it describes a tokenizer of ours: the same tokens by the same rules, none added."""
    model, level = _mapping(description.get("model")), _mapping(description.get("pre_tokenizer"))
    after = _mapping(description.get("post_processor"))
    plain = (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not description.get("normalizer")
        and (level.get("type"), level.get("add_prefix_space")) == ("ByteLevel", False)
        and level.get("use_regex", True) is True
        and (
            after.get("type") in (None, "ByteLevel") or (after.get("type"), after.get("special_tokens")) == ADDS_NOTHING
        )
    )
    if not plain or len(_mapping(model.get("vocab"))) != TOKENIZERS[tokenizer].vocab_size:
        return False
    vocabulary, merges = _model(tokenizer)
    joined = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in _list(model.get("merges"))]
    added = {_content(token) for token in _list(description.get("added_tokens"))}
    return model.get("vocab") == vocabulary and joined == merges and added <= {END_OF_TEXT} & vocabulary.keys()


def _guarded(name: str, problem: str, call: Callable[[], Any]) -> Any:
    """What `call` gives; DataError for whatever the package raises, which has no common kind and may panic."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: {problem}: {one_line(error)}") from None


def _text(files: Files, name: str, folder: Path) -> str:
    try:
        return files[name].decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = f"another byte at {error.start}"
        raise DataError(f"{folder / name}: expected UTF-8, found {found}; copy it again") from None


def _object(files: Files, name: str, folder: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is no file."""
    if name not in files:
        return {}
    try:
        found = parse_json(_text(files, name, folder))
    except ValueError as error:
        raise DataError(f"{folder / name} is damaged: expected JSON, found {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{folder / name}: expected an object, found {shown(found)}")
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _written(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
