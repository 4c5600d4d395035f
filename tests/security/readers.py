"""Every reader of bytes from outside, with files that are right and a way to make them wrong.

What the tests of this folder and benchmarks/fuzz.py share. No assertions.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import torch
from mutations import (  # pyright: ignore[reportMissingImports]
    Mutation,
    a_value,
    other_bytes,
    other_json,
    other_lines,
    other_toml,
    other_value,
)
from pyarrow import parquet
from safetensors.torch import save

from gptlab.analysis.report.page import sample
from gptlab.analysis.report.run import FIGURES, binned, facts, read_history
from gptlab.analysis.run import read_run
from gptlab.cli.arguments import file_options
from gptlab.cli.main import main
from gptlab.data.corpora import get_source
from gptlab.data.corpus import open_corpus
from gptlab.data.huggingface_tokenizer import files_of, read_tokenizer
from gptlab.data.shards import check_tokens, open_shard, write_shard
from gptlab.data.text_files import count_documents, read_documents
from gptlab.data.tokenizers import TOKENIZERS, get_tokenizer
from gptlab.errors import CheckpointError
from gptlab.evals.tasks import hellaswag, lambada
from gptlab.model.formats import open_foreign, write_llmc
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, to_huggingface
from gptlab.model.weights import ADAMW
from gptlab.options import build, flatten
from gptlab.runs import checkpoint
from gptlab.runs.cells import Cell, Rows
from gptlab.runs.checkpoint import OFFSETS, WHERE
from gptlab.runs.experiment_spec import Arm
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import model_in
from gptlab.signals import tuned_lens
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

SHARD = "shard-00001-model-00001-of-00001.safetensors"
SIZES = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 4}
SMALL = GPT(GPTConfig(vocab_size=256, **SIZES))
EXPERIMENT = """name = "tiny"
preset = "shakespeare-tiny"
baseline = "plain"
seeds = [1, 2]
delta = 0.01
[options]
steps = 20
total_batch_tokens = 2048
[arms.plain]
[arms.sure]
signal.name = "confidence"
signal.layers = [1, 2]
[arms.penalty]
signal.name = "confidence_penalty"
signal.dose = 0.1
[groups]
small = ["plain", "sure", "penalty"]
[tune]
seeds = [101, 102]
learning_rate = [0.5, 1, 2]
"""
OPTIONS = """preset = "shakespeare-tiny"
steps = 20
learning_rate = 1e-3
min_lr = 1e-4
share_blocks = false
data = "markov:order=2"
log = "none"
threads = 1
[signal]
name = "confidence"
layers = [1, 2]
positions = 0.5
"""
ROWS = [
    {"step": 1, "kind": "train", "loss": 5.5, "tokens": 64, "tokens_per_second": 10.5, "dose": 0.1, "doses": [0.1]},
    {"step": 1, "kind": "val", "loss": 5.4, "tempered_loss": 5.3, "bits_per_byte": 7.9},
    {
        "step": 2,
        "kind": "sample",
        "prompt": "a",
        "text": "b",
        "tokens": [98],
        "written": ["b"],
        "blocks": [[["b", 0.5]]],
    },
    {"step": 2, "kind": "event", "event": "finished", "loss": 5.4, "clipped_share": 0.5},
]


@dataclass(frozen=True)
class Reader:
    """read: a folder in which the file `name` was written; samples: files that are right; mutate: a wrong one."""

    name: str
    samples: tuple[bytes, ...]
    mutate: Mutation
    read: Callable[[Path], object]
    beside: Callable[[Path], None] = lambda folder: None
    """What else the folder holds."""

    def prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.beside(folder)

    def hostile(self, rng: Random) -> bytes:
        return self.mutate(rng.choice(self.samples), rng)

    def __call__(self, folder: Path, content: bytes) -> None:
        (folder / self.name).write_bytes(content)
        self.read(folder)


def _shard(count: int = 5) -> bytes:
    return struct.pack("<256i", 20240520, 1, count, *[0] * 253) + np.arange(count, dtype="<u2").tobytes()


def _npy() -> bytes:
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (5,), }"
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + np.arange(5, dtype="<u2").tobytes()


def _tokens(file: str) -> Callable[[Path], object]:
    return lambda folder: check_tokens(open_shard(folder / file), 256, file)


_TEXT = b'{"text": "a b c"}\n{"text": "\xc3\xa4"}\n'


def _documents(name: str) -> Callable[[Path], object]:
    return lambda folder: (count_documents(folder / name), list(read_documents(folder / name)))


def _parquet() -> tuple[bytes, ...]:
    found = []
    for options in ({}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}):
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"id": range(6), "text": ["ab c"] * 6}), file, row_group_size=4, **options)
        found.append(file.getvalue())
    return tuple(found)


def _corpus(folder: Path) -> None:
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", np.arange(5, dtype=np.uint16))


def _manifest() -> bytes:
    sha256 = hashlib.sha256(_shard()).hexdigest()
    splits = {split: [{"file": f"{split}_000000.bin", "tokens": 5, "sha256": sha256}] for split in ("train", "val")}
    floor = {"unit": "nats a token", "rate": 0.5, "period": [0.5], "start": [2.0, 1.0]}
    head = {"format": 1, "name": "text", "source": {}, "tokenizer": "bytes", "vocab_size": 256, "complete": True}
    return json.dumps({**head, "splits": splits, "floor": floor}).encode()


def _options(folder: Path) -> None:
    found = file_options(folder / "options.toml", TrainingConfig)
    build(TrainingConfig, {**PRESETS["shakespeare-tiny"], **found})


def _run(folder: Path) -> None:
    """The run in `folder`, and another one to compare it with."""
    for place, seed in ((folder, 1), (folder / "good", 1)):
        place.mkdir(exist_ok=True)
        config = json.loads(_config())
        options = {**config["options"], "seed": seed, "grad_clip": 1.0 if place == folder else 2.0}
        (place / "config.json").write_text(json.dumps({**config, "options": options}))
        (place / "environment.json").write_text("{}")
        (place / "metrics.jsonl").write_bytes(_metrics())


def _cells(folder: Path) -> None:
    """An experiment's cells, its file and its choice."""
    (folder / "experiment.toml").write_text(EXPERIMENT)
    (folder / "tuning.json").write_text(json.dumps(KEPT))
    (folder / "ladder.json").write_text(json.dumps(HELD))
    for arm in ("plain", "sure", "penalty"):
        for seed in (1, 2):
            cell = folder / arm / f"seed_{seed}"
            cell.mkdir(parents=True, exist_ok=True)
            (cell / "config.json").write_text(json.dumps({"options": {"seed": seed}}))
            (cell / "environment.json").write_text("{}")
            rows = [{**row, "loss": len(arm) + seed / 10} if "loss" in row else row for row in ROWS]
            (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _commands(*commands: list[str]) -> None:
    """What `gptlab` makes of a file, with every command to its own end; a refusal of one is one of ours."""
    refused = []
    for words in commands:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if main(words):
                refused.append(said.getvalue())
    if refused:
        raise CheckpointError(refused[0])


def _compare(name: str) -> Callable[[Path], None]:
    """Comparing an experiment's folder, or a log in it, as a user does."""
    return lambda folder: _commands(["compare", str(folder / name), "--despite" if name else "--json"])


def _config() -> bytes:
    return json.dumps({"options": flatten(TrainingConfig()), "data": {"train": []}}).encode()


def _metrics() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def _read_run(folder: Path) -> None:
    """Every command that reads a run's records, and what resuming and an experiment make of them."""
    errors = []
    run, good = str(folder), str(folder / "good")
    for read in (
        lambda: _commands(["runs", run, "--json"], ["verify", good], ["compare", run, good, "--despite", "--json"]),
        lambda: figures(folder),
        lambda: RunFolder(folder).config(),
        lambda: RunFolder(folder).finished(2),
        lambda: Rows(Cell(Arm("a", {}), 1, folder, 2, 8)).look().state(running=False),
    ):
        try:
            read()
        except Exception as error:
            errors.append(error)
    for error in sorted(errors, key=lambda one: type(one).__module__ == "gptlab.errors"):  # a foreign one first
        raise error


def figures(folder: Path) -> None:
    """What a run's report is filled with, without its plots."""
    run, history = read_run(folder), read_history(folder)
    list(facts(run, history))
    for figure in FIGURES:
        binned(history.updates[figure])
    for row in history.samples:
        sample(row, "sample")


def _state() -> bytes:
    options = flatten(TrainingConfig(**{**SIZES, "tokenizer": "bytes", "total_batch_tokens": 64}))
    scalars = {"step": 3, "clipped": 1, "weights": [0.5, None], "validated": 0, "sampled": 0}
    records = {"metrics_bytes": 10, "log_bytes": 10}
    rng = {"seed": 1, "scheme": "keyed"}
    return json.dumps(
        {"scalars": scalars, "cursor": {"sequence": 3}, "rng": rng, "records": records, "options": options}
    ).encode()


def _weights() -> bytes:
    return save({name: p.detach() for name, p in SMALL.named_parameters()})


def _moments() -> dict[str, torch.Tensor]:
    kept = {key: torch.zeros(()) if key == "step" else None for key in sorted(ADAMW)}
    every = [(f"{key}.{name}", zero, p) for name, p in SMALL.named_parameters() for key, zero in kept.items()]
    return {name: torch.zeros_like(p) if zero is None else zero.clone() for name, zero, p in every}


def _checkpoint(folder: Path) -> None:
    moments = _moments()
    (folder / checkpoint.WEIGHTS).write_bytes(_weights())
    (folder / checkpoint.MOMENTS).write_bytes(save(moments))
    (folder / checkpoint.STATE).write_bytes(_state())
    sign(folder)


def _rows() -> bytes:
    """All of a checkpoint's tensors as one process of a run that cuts its blocks writes them."""
    weights = {name: p.detach() for name, p in SMALL.named_parameters()}
    tensors = weights | _moments()
    places = {name: {OFFSETS: [0] * tensor.dim()} for name, tensor in tensors.items()}
    return save(tensors, {WHERE: json.dumps(places)})


def _state_alone(folder: Path) -> None:
    (folder / checkpoint.STATE).write_bytes(_state())


def sign(folder: Path) -> None:
    """Write the manifest that whoever wrote the files would write: checksums stop no attacker."""
    possible = (checkpoint.WEIGHTS, checkpoint.MOMENTS, SHARD, checkpoint.STATE)
    names = [name for name in possible if (folder / name).exists()]
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in names
        for content in [(folder / name).read_bytes()]
    }
    manifest: dict[str, Any] = {"format": 1, "step": 3, "files": files}
    manifest["sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / checkpoint.MANIFEST).write_bytes(canonical(manifest))


def canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _signed(folder: Path) -> None:
    sign(folder)
    model_in(checkpoint.load(folder))


def _self_signed(content: bytes, rng: Random) -> bytes:
    """A manifest with a value changed, and its own checksum right nevertheless."""
    if rng.random() < 0.3:
        return other_bytes(content, rng)
    value = other_value(json.loads(content), rng) if rng.random() < 0.9 else a_value(rng)
    if isinstance(value, dict):
        value.pop("sha256", None)
        value["sha256"] = hashlib.sha256(canonical(value)).hexdigest()
    return canonical(value)


def _manifest_of_checkpoint(scratch: Path) -> bytes:
    _checkpoint(scratch)
    return (scratch / checkpoint.MANIFEST).read_bytes()


def _numbers(content: bytes, rng: Random) -> bytes:
    return rng.randbytes(2 * rng.randrange(40))


def _decode(folder: Path) -> None:
    """Tokens of any value, and text of any kind, through both tokenizers; a decoded text is encoded again."""
    content = (folder / "tokens").read_bytes()
    numbers = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2").astype(int) * 3
    errors = []
    for name in TOKENIZERS:
        tokenizer = get_tokenizer(name)
        for use in (
            lambda t=tokenizer: t.encode(t.decode(numbers % t.vocab_size)),
            lambda t=tokenizer: t.decode(numbers),
            lambda t=tokenizer: t.encode(content.decode("utf-16", "surrogatepass" if len(content) % 4 else "replace")),
        ):
            try:
                use()
            except UnicodeDecodeError:
                continue  # no text at all: nothing was given to the tokenizer
            except Exception as error:
                errors.append(error)
    for error in sorted(errors, key=lambda one: type(one).__module__ == "gptlab.errors"):
        raise error


def _llmc(scratch: Path) -> bytes:
    write_llmc(SMALL, scratch / "m.bin")
    return (scratch / "m.bin").read_bytes()


def _nanogpt(scratch: Path, legacy: bool) -> bytes:
    sizes = {**SIZES, "vocab_size": 256}
    weights = {name: p.detach() for name, p in SMALL.named_parameters()}
    torch.save({"model": weights, "model_args": sizes}, scratch / "x.pt", _use_new_zipfile_serialization=not legacy)
    return (scratch / "x.pt").read_bytes()


def _huggingface(folder: Path) -> None:
    to_huggingface(SMALL).save_pretrained(folder)


def _huggingface_config(scratch: Path) -> bytes:
    _huggingface(scratch)
    return (scratch / "config.json").read_bytes()


def _parts(folder: Path) -> None:
    """A model in two parts."""
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    theirs = to_huggingface(SMALL)
    theirs.config.save_pretrained(folder / "hf")
    weights = {name: w for name, w in theirs.state_dict().items() if name != "lm_head.weight"}
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:])):
        (folder / "hf" / f"part-{number}.safetensors").write_bytes(save({name: weights[name] for name in part}))


def _from_parts(folder: Path) -> None:
    from_huggingface(folder / "hf")


def _own_files(scratch: Path) -> dict[str, bytes]:
    """The files of a tokenizer and of a model in parts."""
    names = sorted(name for name in to_huggingface(SMALL).state_dict() if name != "lm_head.weight")
    index = {name: f"part-{number >= 9:d}.safetensors" for number, name in enumerate(names)}
    level = files_of("bytes", 8)
    vocabulary = json.loads(level["tokenizer.json"])["model"]["vocab"] | {"ab": 256, "<|end|>": 257}
    settings = {"eos_token": "<|end|>", "added_tokens_decoder": {"257": {"content": "<|end|>"}}}
    whole = json.loads(level["tokenizer.json"])
    whole["model"] |= {"vocab": vocabulary, "merges": [["a", "b"]]}
    found = {"vocab.json": vocabulary, "tokenizer.json": whole, "tokenizer_config.json": settings}
    found["model.safetensors.index.json"] = {"weight_map": index}
    written = {name: json.dumps(value).encode() for name, value in found.items()}
    return {**written, "merges.txt": b"#version: 0.2\na b\n"}


def _tokenizer(folder: Path, without: str) -> None:
    """A folder with a tokenizer but for one file: GPT-2's two, or the whole in one."""
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    for name, content in _own_files(folder).items():
        if name != without and "index" not in name and not (name == "tokenizer.json" and without != name):
            (folder / "hf" / name).write_bytes(content)


def _text(folder: Path) -> None:
    """What is read is used: text there and back, and as it comes."""
    if own := read_tokenizer(folder / "hf", {"eos_token_id": 3, "vocab_size": 258}):
        tokens = own.encode("ab c<|end|>\n").tolist()
        own.decode(tokens)
        own.prompt("")
        stream = own.stream(tokens[:1])
        _ = [*map(stream, tokens), stream(None)]
        own.count_bytes(np.array(tokens, dtype=np.int64))
        own.beyond(100)


def _evals(folder: Path) -> None:
    file, tokenizer = str(folder / "rows.jsonl"), get_tokenizer("bytes")
    hellaswag(file, tokenizer)


def _lambada(folder: Path) -> None:
    lambada(str(folder / "rows.jsonl"), get_tokenizer("bytes"))


def _tuned(scratch: Path) -> bytes:
    tuned_lens.save(tuned_lens.TunedLens.untuned(SMALL), SMALL, scratch / tuned_lens.FILE)
    return (scratch / tuned_lens.FILE).read_bytes()


def _name(folder: Path) -> None:
    get_source((folder / "name").read_bytes().decode("utf-8", "replace"))


LOG = b"step,loss,arm,seed,other\n10,3.5,base,1,x\n20,3.25,base,1,y\n10,3.5,new,1,x\n20,nan,new,1,\n20,3,new,2,\n"
LOG_LINES = b"".join(
    json.dumps({"step": n, "loss": 3.5 + n, "arm": arm, "seed": 1}).encode() + b"\n" for n in (1, 2) for arm in "ab"
)
QUESTION = json.dumps({"ctx": "a b", "endings": ["c", "d", "e", "f"], "label": 2}).encode() + b"\n"
CHOICE = {"options": {}, "follows": None, "trial": "t", "learning_rate": 1.0, "dose": 0.5, "loss": 1.0, "notes": ["n"],
          "losses": {"t": [1.0, None]}}  # fmt: skip
KEPT = {"experiment": "tiny", "seeds": [101], "trials": 3, "factors": {"dose": [1]}, "arms": {"sure": CHOICE}}
HELD = {"experiment": "tiny", "depths": [2, 3], "arms": {"sure": {"sign": "higher", "holds": 1, "of": 2}}}


def readers(scratch: Path) -> Iterator[Reader]:
    """All of them. scratch: where files that are right are made."""
    scratch.mkdir(parents=True, exist_ok=True)
    yield Reader("train_000000.bin", (_shard(), _shard(300)), other_bytes, _tokens("train_000000.bin"))
    yield Reader("train.bin", (_shard(), b"\1\0\2\0\3\0"), other_bytes, _tokens("train.bin"))
    yield Reader("train.npy", (_npy(),), other_bytes, _tokens("train.npy"))
    yield Reader("corpus.json", (_manifest(),), other_json, open_corpus, _corpus)
    yield Reader("options.toml", (OPTIONS.encode(),), other_toml, _options)
    yield Reader("experiment.toml", (EXPERIMENT.encode(),), other_toml, _compare(""), _cells)
    yield Reader("metrics.jsonl", (_metrics(),), other_lines, _read_run, _run)
    yield Reader("config.json", (_config(),), other_json, _read_run, _run)
    yield Reader("tuning.json", (json.dumps(KEPT).encode(),), other_json, _compare(""), _cells)
    yield Reader("ladder.json", (json.dumps(HELD).encode(),), other_json, _compare(""), _cells)
    yield Reader("state.json", (_state(),), other_json, _signed, _checkpoint)
    yield Reader("model.safetensors", (_weights(),), other_bytes, _signed, _checkpoint)
    yield Reader(SHARD, (_rows(),), other_bytes, _signed, _state_alone)
    manifest = _manifest_of_checkpoint(scratch)
    yield Reader("MANIFEST.json", (manifest,), _self_signed, checkpoint.load, _checkpoint)
    yield Reader("model.bin", (_llmc(scratch),), other_bytes, lambda f: open_foreign(f / "model.bin"))
    pickles = tuple(_nanogpt(scratch, legacy) for legacy in (False, True))
    yield Reader("ckpt.pt", pickles, other_bytes, lambda f: open_foreign(f / "ckpt.pt"))
    theirs = _huggingface_config(scratch / "hf")
    yield Reader(
        "hf/config.json", (theirs,), other_json, lambda f: from_huggingface(f / "hf"), lambda f: _huggingface(f / "hf")
    )
    for file in ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        mutate = other_bytes if file == "merges.txt" else other_json
        read = _from_parts if "index" in file else _text
        beside = _parts if "index" in file else partial(_tokenizer, without=file)
        yield Reader(f"hf/{file}", (_own_files(scratch)[file],), mutate, read, beside)
    yield Reader("log.csv", (LOG,), other_bytes, _compare("log.csv"))
    yield Reader("log.jsonl", (LOG_LINES,), other_lines, _compare("log.jsonl"))
    yield Reader("rows.jsonl", (QUESTION * 2,), other_lines, _evals)
    yield Reader("text.jsonl", (_TEXT,), other_lines, _documents("text.jsonl"))
    yield Reader("text.json", (_TEXT, b'[{"text": "a"}]'), other_bytes, _documents("text.json"))
    yield Reader("text.jsonl.gz", (gzip.compress(_TEXT),), other_bytes, _documents("text.jsonl.gz"))
    zstd = pyarrow.Codec("zstd").compress(_TEXT, asbytes=True)
    yield Reader("text.jsonl.zst", (zstd,), other_bytes, _documents("text.jsonl.zst"))
    yield Reader("text.parquet", _parquet(), other_bytes, _documents("text.parquet"))
    tuned = _tuned(scratch)
    yield Reader(
        "tuned_reader.safetensors", (tuned,), other_bytes, lambda f: tuned_lens.load(SMALL, f / tuned_lens.FILE)
    )
    yield Reader("tokens", (b"",), _numbers, _decode)
    yield Reader("name", (b"markov:order=3", b"lpn:noise=0.2", b"copy"), other_bytes, _name)
