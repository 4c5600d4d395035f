"""`gptlab export`: a model in another program's format; what the weights become is in gptlab/model/."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import gptlab
from gptlab.cli.arguments import Parser
from gptlab.errors import CheckpointError, UsageError
from gptlab.parsing import is_number

if TYPE_CHECKING:
    from gptlab.training.config import TrainingConfig


def main(argv: list[str]) -> int:
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
    if out.exists() and not (huggingface and out.is_dir() and not any(out.iterdir())):
        kind = "a new or empty folder" if huggingface else "a new file"
        raise UsageError(f"expected {kind} to export to, found {out} in use; give another one")
    if huggingface and options.dtype != "fp32":
        raise UsageError("--dtype: a Hugging Face folder is written in fp32; bf16 is for --format llm.c")

    from gptlab.cli.model import belongings, open_any
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


def model_card(run: Path, config: TrainingConfig, parameters: int) -> str:
    """README.md of a run's model: what was trained, on what, for how long, to which loss, by which command."""
    from gptlab.options import flatten
    from gptlab.runs.folder import RunFolder, newest
    from gptlab.training.config import TrainingConfig
    from gptlab.training.presets import PRESETS

    found = newest(run)
    folder = RunFolder(found.parent.parent if found.parent.name == "checkpoints" else found)
    step = int(found.name.rpartition("_")[2]) if found.name.startswith("step_") else config.steps
    loss = "not recorded"
    with contextlib.suppress(CheckpointError):  # damaged records do not keep weights from being exported
        for row in folder.rows():
            if row["kind"] == "val" and row["step"] <= step and is_number(row.get("loss")):
                loss = f"{row['loss']:.4f} nats a token at step {row['step']:,}"
    preset = flatten(TrainingConfig(**PRESETS.get(config.preset, {})))
    free = ("preset", "out", "resume", "also", "log", "device", "threads", "rank_timeout")
    changed = {key: value for key, value in flatten(config).items() if value != preset[key] and key not in free}
    command = shlex.join(["gptlab", "train", "--preset", config.preset, *(f"--{k}={v}" for k, v in changed.items())])
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
