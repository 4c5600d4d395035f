"""`gptlab export`: a model in another program's format. What the weights become is told in gptlab/model/."""

from __future__ import annotations

import json
from pathlib import Path

from gptlab.cli.arguments import Parser
from gptlab.errors import UsageError


def main(argv: list[str]) -> int:
    """Write the model; raises UsageError where it would overwrite something, CheckpointError where RUN is damaged."""
    parser = Parser(
        prog="gptlab export",
        description="Write a model as a folder that transformers loads as GPT2LMHeadModel, or as a file that llm.c "
        "reads. A Hugging Face folder of a model over GPT-2 tokens gets its tokenizer too.",
    )
    parser.add_argument("run", metavar="RUN", help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the folder (llm.c: the file) to write, which is not there"
    )
    parser.add_argument("--format", choices=["huggingface", "llm.c"], default="huggingface", help="[huggingface]")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of llm.c's weights [fp32]")
    parser.add_argument(
        "--json", action="store_true", help='print {"folder", "parameters", "tokenizer"}; llm.c: "file"'
    )
    options = parser.parse(argv)
    out: Path = options.out
    huggingface = options.format == "huggingface"
    if out.exists() and not (huggingface and out.is_dir() and not any(out.iterdir())):
        kind = "a new or empty folder" if huggingface else "a new file"
        raise UsageError(f"expected {kind} to export to, found {out} in use; give another one")
    if huggingface and options.dtype != "fp32":
        raise UsageError("--dtype: a Hugging Face folder is written in fp32; bf16 is for --format llm.c")

    from gptlab.device import DTYPES
    from gptlab.model.huggingface import GPT2_VOCABULARY, write_folder
    from gptlab.model.llmc import write_llmc
    from gptlab.runs.initial import any_model

    model, config = any_model(options.run)
    gpt2 = config.tokenizer == "gpt2" if config else model.config.vocab_size >= GPT2_VOCABULARY
    told = {"parameters": model.config.parameters}
    if huggingface:
        write_folder(model, out, tokenizer=gpt2)
        told = {"folder": str(out), **told, "tokenizer": "gpt2" if gpt2 else None}
    else:
        write_llmc(model, out, DTYPES[options.dtype])
        told = {"file": str(out), **told}
    if options.json:
        print(json.dumps(told))
        return 0
    print(f"{options.run} exported to {out}")
    if huggingface and not gpt2:
        print("no tokenizer was written: this run reads bytes, so a token is the value of a UTF-8 byte")
    if huggingface:
        print(f'load it with: transformers.GPT2LMHeadModel.from_pretrained("{out}")')
    return 0
