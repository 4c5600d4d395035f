"""The model that a command names, with its tokenizer and a corpus of its tokens; `gptlab export` and `gptlab import`.

A run has the tokenizer that it was trained with, a Hugging Face folder the one that it brings. Where it brings none,
text is refused, and token shards are taken as the model's own: the size of a vocabulary says nothing of its tokens.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptlab
from gptlab.cli.arguments import Parser
from gptlab.errors import CheckpointError, ConfigError, DataError, UsageError
from gptlab.files import is_number

if TYPE_CHECKING:
    from gptlab.data.corpus import Corpus
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import ComputeConfig
    from gptlab.distributed import World
    from gptlab.model.gpt import GPT
    from gptlab.training.config import TrainingConfig

TOKENIZER = "bytes or gpt2, for a folder that brings none [the model's own]"
"""The help of --tokenizer."""


def add_model_options(parser: Parser) -> None:
    """The options of what a model is read with."""
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], help=TOKENIZER)
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matmuls [fp32]")


@dataclass(frozen=True)
class Vocabulary:
    """What a model's tokens stand for. known: its tokenizer; missing: why there is none; size: tokens it may draw."""

    known: Tokenizer | None
    missing: DataError
    size: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises DataError where there is none."""
        if self.known is None:
            raise self.missing
        return self.known

    def corpus(self, data: str, world: World, note: Callable[[str], None]) -> tuple[Corpus, Callable[[], bool]]:
        """The corpus, and whether somebody still prepares it; raises DataError or ConfigError for other tokens."""
        from gptlab.cli.data import open_or_prepare
        from gptlab.data.corpus import TOKENIZER_FILE, holds_corpus, holds_manifest, open_corpus
        from gptlab.data.tokenizers import TOKENIZERS

        if self.known and self.known.name in TOKENIZERS:
            return open_or_prepare(data, self.known.name, world, note)
        folder = Path(data)
        if not folder.is_dir() or not holds_corpus(folder):
            raise DataError(f"--data {data}: expected a folder of shards of the model's own tokens, found none there")
        corpus = open_corpus(folder)
        if self.known and (holds_manifest(folder) or (folder / TOKENIZER_FILE).exists()):
            raise ConfigError(f"{folder} holds {corpus.tokenizer} tokens, the model's are those of {self.known.name}")
        note(f"{folder}: its tokens are taken as the model's own")
        return corpus, lambda: False


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode on its device, what its tokens stand for, and the run's config where it is one's."""

    model: GPT
    vocabulary: Vocabulary
    placement: ComputeConfig
    config: TrainingConfig | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises DataError where there is none."""
        return self.vocabulary.tokenizer


def vocabulary_of(source: str, model: GPT, own: Callable[[], Tokenizer | None], asked: str | None) -> Vocabulary:
    """What the tokens of the model in `source` stand for.

    own: finds the model's own tokenizer, or raises DataError; asked: --tokenizer, which it must not contradict. Raises
    ConfigError for a tokenizer with tokens that the model does not know, or another than the model's own.
    """
    from gptlab.data.tokenizers import get_tokenizer

    missing = DataError(
        f"{source} brings no tokenizer (tokenizer.json, or vocab.json and merges.txt) to read and write text with: put "
        "the model's own into the folder, or add --tokenizer gpt2 or bytes if it is that; token shards need none "
        "(`gptlab eval FOLDER --data SHARDS`)"
    )
    try:
        known = own()
    except DataError as error:
        known, missing = None, error
    if asked and known and known.name != asked:
        raise ConfigError(f"--tokenizer: {source} has a tokenizer of its own, {known.name}; leave the option out")
    known = get_tokenizer(asked) if asked else known
    rows = model.config.vocab_size
    if known and (beyond := known.beyond(rows)):
        raise ConfigError(f"{source} knows {rows} tokens, {beyond}; give the model's own, or resize it")
    size = min(known.vocab_size, model.config.tokens) if known else model.config.tokens
    return Vocabulary(known, missing, size)


def open_any(source: str, asked: str | None) -> tuple[GPT, TrainingConfig | None, Vocabulary]:
    """The model in `source`, its run's config where it is one's, and what its tokens stand for."""
    from gptlab.runs.init_weights import any_model, tokenizer_of

    model, config = any_model(source)
    return model, config, vocabulary_of(source, model, lambda: tokenizer_of(source, config), asked)


def belongings(folder: Path | None, vocabulary: Vocabulary, block_size: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What goes into a Hugging Face folder besides weights and sizes: files, and special tokens for its config.json.

    folder: the one that the model comes from, whose own go along.
    """
    from gptlab.data.huggingface_tokenizer import VOCABULARY, WHOLE, files_of, read_files
    from gptlab.data.tokenizers import TOKENIZERS
    from gptlab.model.huggingface import SPECIAL, read_config

    files = read_files(folder) if folder else {}
    special = {key: value for key, value in read_config(folder).items() if key in SPECIAL} if folder else {}
    known = vocabulary.known
    if known and known.name in TOKENIZERS and not folder:
        special = {"bos_token_id": known.document_start, "eos_token_id": known.end_of_text}
    if known and known.name in TOKENIZERS and not files.keys() & {WHOLE, VOCABULARY}:
        files |= files_of(known.name, block_size)
    return files, special


def open_model(source: str, device: str, dtype: str, threads: int = 0, tokenizer: str | None = None) -> Opened:
    """Open `source`, to compute on `threads` threads, 0 for all cores; tokenizer: for a folder that brings none.

    Raises CheckpointError where there is no model, ConfigError for a device or tokenizer that does not fit.
    """
    from gptlab.device import Machine, choose_compute

    model, config, vocabulary = open_any(source, tokenizer)
    placement = choose_compute(Machine.probe(), device=device, dtype=dtype, threads=threads, n_embd=model.config.n_embd)
    placement.apply()
    model.to(placement.device).eval()
    return Opened(model, vocabulary, placement, config)


def export(argv: list[str]) -> int:
    """Write the model; raises UsageError where it would overwrite something, CheckpointError where RUN is damaged."""
    parser = Parser(
        prog="gptlab export",
        description="Write a model as a folder that transformers loads as GPT2LMHeadModel, or as a file that llm.c "
        "reads. A Hugging Face folder gets the model's tokenizer too, and that of a run a README.md.",
    )
    parser.add_argument("run", metavar="RUN", help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the folder (llm.c: the file) to write, which is not there"
    )
    parser.add_argument("--format", choices=["huggingface", "llm.c"], default="huggingface", help="[huggingface]")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of llm.c's weights [fp32]")
    parser.add_argument(
        "--json", action="store_true", help='print {"folder", "parameters", "padding", "tokenizer"}; llm.c: "file"'
    )
    options = parser.parse(argv)
    out: Path = options.out
    huggingface = options.format == "huggingface"
    _refuse_used(out, "export to", folder=huggingface)
    if huggingface and options.dtype != "fp32":
        raise UsageError("--dtype: a Hugging Face folder is written in fp32; bf16 is for --format llm.c")

    from gptlab.device import DTYPES
    from gptlab.model.formats import write_llmc
    from gptlab.model.huggingface import write_folder

    model, config, vocabulary = open_any(options.run, None)
    shape, known = model.config, vocabulary.known.name if vocabulary.known else None
    result = {"parameters": shape.parameters, "padding": shape.vocab_size - shape.tokens}
    if huggingface:
        files, special = belongings(None if config else Path(options.run), vocabulary, shape.block_size)
        if config:
            files["README.md"] = model_card(Path(options.run), config, shape.parameters).encode()
        write_folder(model, out, files, special)
        result = {"folder": str(out), **result, "tokenizer": known}
    else:
        write_llmc(model, out, DTYPES[options.dtype])
        result = {"file": str(out), **result}
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{options.run} exported to {out}")
    if result["padding"]:
        print(f"{result['padding']} rows that pad the vocabulary to {shape.vocab_size:,} were cut")
    if huggingface:
        print(f"tokenizer: {known}" if known else vocabulary.missing)
        print(f'load it with: transformers.GPT2LMHeadModel.from_pretrained("{out}")')
    return 0


def _refuse_used(out: Path, what: str, *, folder: bool) -> None:
    if out.exists() and not (folder and out.is_dir() and not any(out.iterdir())):
        kind = "a new or empty folder" if folder else "a new file"
        raise UsageError(f"expected {kind} to {what}, found {out} in use; give another one")


def model_card(run: Path, config: TrainingConfig, parameters: int) -> str:
    """README.md of a run's model: what was trained, on what, for how long, to which loss, by which command."""
    from gptlab.runs.folder import RunFolder, newest
    from gptlab.training.config import TrainingConfig
    from gptlab.training.presets import command_of

    found = newest(run)
    folder = RunFolder(found.parent.parent if found.parent.name == "checkpoints" else found)
    step = int(found.name.rpartition("_")[2]) if found.name.startswith("step_") else config.steps
    loss = "not recorded"
    with contextlib.suppress(CheckpointError):  # damaged records do not keep weights from being exported
        for row in folder.rows():
            if row["kind"] == "val" and row["step"] <= step and is_number(row.get("loss")):
                loss = f"{row['loss']:.4f} nats a token at step {row['step']:,}"
    usual = {key: getattr(TrainingConfig(), key) for key in ("out", "log", "device", "threads", "rank_timeout")}
    command = command_of(replace(config, **usual)) or "gptlab train --config FILE  # of several signals"
    signals = ", ".join(f"{one.name}, control {one.control}" for one in config.signals) or "none, the true loss alone"
    shared = " (one block, shared)" if config.share_blocks else ""
    return f"""# GPT-2, {parameters:,} parameters

Trained with gptlab {gptlab.__version__}; figures are the run's own.

| | |
|---|---|
| blocks, heads, width | {config.n_layer}, {config.n_head}, {config.n_embd}{shared} |
| context | {config.block_size:,} tokens of `{config.tokenizer}` |
| data | {config.data} |
| steps | {step:,} updates of {config.total_batch_tokens:,} tokens: {step * config.total_batch_tokens:,} tokens |
| extra signal | {signals} |
| validation loss | {loss} |
| seed | {config.seed} |

```
{command}
```

License: not stated. Whoever publishes this model states it here; the data may have terms of its own.
"""


def import_(argv: list[str]) -> int:
    """Write the folder; raises CheckpointError where SOURCE is no model that is known, UsageError where OUT is used."""
    parser = Parser(
        prog="gptlab import",
        description="Read a GPT-2 of another program and write it as a Hugging Face folder, for sample, eval, export "
        "and --init_from, with the tokenizer that it brings. SOURCE is a Hugging Face GPT-2 folder, nanoGPT's ckpt.pt "
        "or out_dir, a build-nanogpt checkpoint or its log folder, or a model file of llm.c (version 3 or 5); which "
        "one, its content tells. Pickled files are read as tensors and plain values: code in them is refused, never "
        "run.",
    )
    parser.add_argument("source", metavar="SOURCE", help="the file or folder to read")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], help=TOKENIZER)
    parser.add_argument(
        "--json", action="store_true", help='print {"folder", "format", "parameters", ..., "padding", "tokenizer"}'
    )
    options = parser.parse(argv)
    out: Path = options.out
    _refuse_used(out, "import to", folder=True)

    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.model.formats import open_foreign
    from gptlab.model.huggingface import write_folder
    from gptlab.runs.init_weights import tokenizer_of

    found = open_foreign(options.source)
    shape, folder = found.model.config, found.file if found.file.is_dir() else None

    def own() -> Tokenizer | None:
        return tokenizer_of(folder, None) if folder else get_tokenizer("gpt2") if found.gpt2 else None

    vocabulary = vocabulary_of(options.source, found.model, own, options.tokenizer)
    files, special = belongings(folder, vocabulary, shape.block_size)
    write_folder(found.model, out, files, special)
    result = {
        "folder": str(out), "format": found.format, "file": str(found.file), "parameters": shape.parameters,
        "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": shape.tokens, "padding": shape.vocab_size - shape.tokens,
        "tokenizer": vocabulary.known.name if vocabulary.known else None,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 0
    size = f"{shape.parameters:,} parameters, {shape.n_layer} blocks, {shape.n_embd} wide"
    print(f"{found.file}: {found.format}, {size}, {shape.tokens:,} tokens")
    if result["padding"]:
        print(f"{result['padding']} rows that pad {found.format}'s vocabulary to {shape.vocab_size:,} were cut")
    print(f"imported to {out}")
    if vocabulary.known:
        print(f"tokenizer: {vocabulary.known.name}")
        print(f"try next: gptlab sample --checkpoint {shlex.quote(str(out))}")
    else:
        print(vocabulary.missing)
        print(f"try next: gptlab eval {shlex.quote(str(out))} --data SHARDS")
    return 0
