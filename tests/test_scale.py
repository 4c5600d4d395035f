"""docs/scale.md: its arithmetic against real tensors, its tables against that, its files against the real parsers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from scripts import load_script
from torch.distributed.run import get_args_parser

from gptlab.cli.arguments import Parser, add_options, given_options
from gptlab.cli.train import resolve
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.presets import PRESETS

ROOT = Path(__file__).parents[1]
FILES = ROOT / "docs" / "cluster"
TINY = GPTConfig(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=64)
LARGE = ["124M", "350M", "774M", "1.5B"]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return load_script("tools/scale.py")


@pytest.mark.parametrize("name", LARGE)
def test_blocks_and_the_rest_are_all_parameters(name: str, scale: ModuleType) -> None:
    model = scale.shape(scale.preset(name))
    assert scale.rest(model) + model.n_layer * scale.block_parameters(model.n_embd) == model.parameters


def test_what_a_process_holds_is_what_its_tensors_take(scale: ModuleType) -> None:
    config = TrainingConfig(block_size=32, total_batch_tokens=64, n_layer=3, n_head=4, n_embd=64)
    model = GPT(TINY)
    optimizer = build_optimizer(model, config)
    model(torch.zeros(1, 32, dtype=torch.long)).logsumexp(-1).sum().backward()
    optimizer.step()
    weights, gradients = (sum(t.nbytes for t in x) for x in (model.parameters(), [p.grad for p in model.parameters()]))
    moments = [s[key] for s in optimizer.state_dict()["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    held = scale.state(TINY, 1, "ddp")
    assert (held.weights, held.gradients, held.moments) == (weights, gradients, sum(m.nbytes for m in moments))
    halves = scale.state(TINY, 2, "fsdp")
    assert halves.weights == weights - sum(p.nbytes for p in model.transformer["h"].parameters()) / 2


@pytest.mark.parametrize("working", [4, 2])
def test_a_block_keeps_so_many_bytes_of_a_token(working: int, scale: ModuleType) -> None:
    """All that autograd stores of one block, in fp32 and with autocast to bf16, whose copies of weights count apart."""
    model, B = GPT(TINY), 2
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def store(t: torch.Tensor) -> torch.Tensor:
        stored.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())
        return t

    x = torch.randn(B, TINY.block_size, TINY.n_embd, requires_grad=True)
    cast = torch.autocast("cpu", torch.bfloat16) if working == 2 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(store, lambda t: t), cast:
        y = model.blocks[0](x)
    kept = sum(storage.nbytes() for address, storage in stored.items() if address not in known)
    copies = 2 * 12 * TINY.n_embd**2 if working == 2 else 0
    assert kept - copies == x.shape[0] * x.shape[1] * scale.block_activations(TINY.n_embd, TINY.n_head, working)
    assert y.nbytes == B * TINY.block_size * 4 * TINY.n_embd, "what checkpointing keeps of it"


def test_checkpointing_keeps_the_streams_and_one_block(scale: ModuleType) -> None:
    C, inside = TINY.n_embd, scale.block_activations(TINY.n_embd, TINY.n_head)
    assert scale.activations(TINY, 10) == 10 * (3 * inside + 4 * C)
    assert scale.activations(TINY, 10, recompute=True) == 10 * (3 * 4 * C + inside + 4 * C)
    assert scale.activations(TINY, 10, judges=2) - scale.activations(TINY, 10) == 10 * 2 * 4 * C


def test_what_is_sent(scale: ModuleType) -> None:
    """Of one micro-batch: two gathers in bf16 and one scatter in fp32 are what an all-reduce in fp32 sends."""
    ddp, fsdp = (scale.traffic(TINY, 4, parallel) for parallel in ("ddp", "fsdp"))
    assert ddp.total == 2 * 3 / 4 * 4 * TINY.parameters
    assert fsdp.total == pytest.approx(ddp.total)
    assert fsdp.reduced == 2 * 3 / 4 * 4 * scale.rest(TINY)
    judged = scale.traffic(TINY, 4, "fsdp", micro_batches=5, judges=2)
    assert judged.gathered / (5 * (2 * 3 + 2)) == 3 / 4 * 2 * scale.block_parameters(TINY.n_embd)
    assert scale.traffic(TINY, 1, "ddp").total == 0


def test_micro_batches_are_the_trainers(scale: ModuleType) -> None:
    for name in LARGE:
        config = scale.preset(name)
        for gpus in scale.GPUS:
            size, times = scale.micro_batches(config, gpus)
            assert size <= config.batch_size
            assert size * times * gpus == config.sequences


def test_the_tables_are_those_that_the_arithmetic_gives(scale: ModuleType) -> None:
    text = scale.PAGE.read_text(encoding="utf-8")
    assert {mark[1] for mark in scale.MARK.finditer(text)} == set(scale.TABLES)
    assert scale.renewed(text) == text, "run `python tools/scale.py`"


def test_the_traffic_on_the_page_was_measured_and_is_what_is_computed(scale: ModuleType) -> None:
    traffic = load_script("benchmarks/traffic.py")
    found = json.loads(traffic.RESULT.read_text(encoding="utf-8"))
    assert traffic.table(found) in scale.PAGE.read_text(encoding="utf-8")
    for row in found["rows"]:
        _, parallel, judges = traffic.KINDS[row["run"]]
        assert traffic.computed(row["processes"], parallel, judges) == {key: row[key] for key in ("ring", "gloo")}
        assert row["measured"] == pytest.approx(row["gloo"], rel=0.01)
    assert len(found["rows"]) == 2 * len(traffic.KINDS)


VALUES = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "12", "head": "node-1", "SKYPILOT_NUM_NODES": "4", "ip": "10.0.0.1",
          "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SKYPILOT_TASK_ID": "sky-1",
          "OLDPWD": "/checkout"}  # fmt: skip
"""What stands in for the variables of a cluster."""


def commands(text: str) -> list[list[str]]:
    """The words of every command with torchrun in a script, from torchrun on, over lines that end in a backslash."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^[^#\n]*?\b(torchrun .*)$", joined, flags=re.MULTILINE)
    filled = [re.sub(r"\$\{?(\w+)\}?", lambda name: VALUES[name[1]], line) for line in found]
    return [shlex.split(line.rstrip("'"), comments=True) for line in filled]


def documents() -> list[Any]:
    named = [ROOT / "docs" / "scale.md", *sorted(FILES.glob("train.*"))]
    return [pytest.param(path, id=path.name) for path in named]


@pytest.mark.parametrize("path", documents())
def test_every_torchrun_command_is_one_that_torchrun_and_the_trainer_take(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    found = commands(text)
    assert found
    for command in found:
        launch = get_args_parser().parse_args(command[1:])
        assert Path(launch.training_script).name in ("train_gpt2.py", "train_gpt2_ben.py")
        if not launch.standalone:
            assert launch.rdzv_backend == "c10d"
            assert launch.rdzv_endpoint
        parser = Parser(prog="gptlab train")
        add_options(parser, TrainingConfig)
        config = resolve(given_options(parser.parse(launch.training_script_args), TrainingConfig), gpus=8)
        assert config.preset in PRESETS
        nodes, each = int(launch.nnodes.split(":")[-1]), int(launch.nproc_per_node)
        assert config.sequences % (nodes * each) == 0, "an update that these processes cannot share"


def test_the_batch_script_is_bash_and_asks_slurm_for_one_agent_a_node() -> None:
    script = FILES / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert re.fullmatch(r"B:TERM@\d+|TERM@\d+", asked["signal"])


def test_the_skypilot_file_is_yaml_with_setup_and_run_in_bash() -> None:
    task = yaml.safe_load((FILES / "train.sky.yaml").read_text(encoding="utf-8"))
    assert isinstance(task["num_nodes"], int)
    assert task["resources"]["accelerators"].endswith(":8")
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
