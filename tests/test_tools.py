"""Scripts of benchmarks/ and tools/: gpu.py on a CPU, time_to_loss.py, the audit, the notebooks, docs/scale.md."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from scripts import ROOT, load_script
from torch.distributed.run import get_args_parser

from gptlab.cli.arguments import Parser, add_options, given_options
from gptlab.cli.train import resolve
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.presets import PRESETS

gpu = load_script("benchmarks/gpu.py")


def test_the_page_says_what_was_measured_and_nothing_else() -> None:
    between = gpu.PAGE.read_text().partition(gpu.START)[2].partition(gpu.END)[0].strip()
    found = json.loads(gpu.RESULT.read_text()) if gpu.RESULT.exists() else {}
    assert between == gpu.page(found).strip()
    assert gpu.page({}) == "Not measured.\n\n"
    row = {"name": "exact", "batch": 16, "tokens_per_second": 1234.5, "spread": 0.01, "share_of_limit": None}
    row |= {"peer": "transformers", "against_peer": 1.5}
    where = {"machine": "a GPU", "torch": "2.13.0", "date": "2026-12-01", "seconds": 9.0}
    page = gpu.page({
        "parity": {**where, "status": "ended with exit code 1: a|b", "summary": ["one", "two"]},
        "speed": {**where, "status": "ok", "tokens": 1024, "rows": [row]},
        "resume": {"status": "cut off after 5 s: ", "seconds": 5.0},
    })  # fmt: skip
    assert "| parity | ended with exit code 1: a/b | one; two | a GPU, torch 2.13.0, 2026-12-01 |" in page
    assert "| exact | 16 | 1,234 | 1.0% |  | transformers 1.50x |" in page


@pytest.mark.slow
def test_every_section_is_ok_on_a_cpu(tmp_path: Path) -> None:
    before = gpu.PAGE.read_text()
    code = gpu.main(["--tiny", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: of["status"] for name, of in found.items()} == dict.fromkeys(gpu.SECTIONS, "ok")
    assert code == 0
    assert len(found["parity"]["differences"]["bf16 compiled"]) > 30
    assert set(found["determinism"]["repeats"].values()) == {True}
    assert found["resume"]["as shipped"] == {"bit for bit": True, "losses apart": 0.0}
    names = {row["name"] for row in found["speed"]["rows"]}
    assert names == {"baseline", "exact", "rotate", "positions", "whole model", "transformers"}
    assert found["torchrun"]["processes"] == 2
    assert len(found["generate"]["rows"]) == 4
    assert gpu.PAGE.read_text() == before
    assert "| generate | ok |" in gpu.page(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "limit", "status"),
    [
        ("raise RuntimeError('broken here')", "0", "ended with exit code 1: RuntimeError: broken here"),
        ("import os; os.kill(os.getpid(), 9)", "0", "ended by SIGKILL; was memory short?"),
        ("import time; time.sleep(600)", "20", "cut off after 20 s"),
    ],
)
def test_a_broken_section_is_said_to_be(
    what: str, limit: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text(what)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (tmp_path / "found.json").write_text(json.dumps({"parity": {"status": "ok", "seconds": 1.0}}))
    code = gpu.main(["--tiny", "--only", "generate", "--limit", limit, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 1
    assert found["generate"]["status"].startswith(status)
    assert found["parity"]["status"] == "ok", "a section that was not asked for stays as it was"


timed = load_script("benchmarks/time_to_loss.py")


@pytest.mark.parametrize(
    ("line", "theirs", "ours"),
    [
        ("step 250: train loss 2.4000, val loss 2.4123\n", 2.4123, None),
        ("step 0: train loss 4.2000, val loss 4.2123\n", None, None),
        ("iter 12: loss 3.1000, time 4.00ms, mfu -100.00%\n", None, None),
        ("    50 val   loss 2.5091  accuracy 20%\n", None, 2.5091),
        ("    50 train loss 2.5091\n", None, None),
    ],
)
def test_the_lines_that_hold_a_validation_loss(line: str, theirs: float | None, ours: float | None) -> None:
    assert timed.printed_loss(line) == theirs
    assert timed.logged_loss(line) == ours


def test_the_clock_is_read_when_a_line_comes(tmp_path: Path) -> None:
    lines = [f"step {k}: train loss 3, val loss {loss}" for k, loss in ((1, 2.1), (2, 1.9))]
    code = f"import time; print({lines[0]!r}); time.sleep(0.5); print({lines[1]!r})"
    marks = timed.marks([sys.executable, "-u", "-c", code], tmp_path, time.perf_counter(), timed.printed_loss)
    (first, high), (second, low) = marks
    assert (high, low) == (2.1, 1.9)
    assert second - first > 0.4
    assert [timed.seconds_to(loss, marks) for loss in (2.2, 2.0, 1.88)] == [first, second, None]
    found = timed.medians([marks, [(1.0, 2.0)], [(3.0, 1.0)]])
    assert found["2.0"] == sorted([second, 1.0, 3.0])[1]
    assert found["1.88"] is None


def test_the_split_is_nanogpts_and_validation_reads_stretches_of_all_of_it(tmp_path: Path) -> None:
    text = bytes(b % 251 for b in range(400_000))
    (tmp_path / "text").write_bytes(text)
    timed.write_characters(str(tmp_path / "text"), str(tmp_path / "data"))
    from gptlab.data.corpus import open_corpus

    corpus = open_corpus(tmp_path / "data")
    assert bytes(corpus.read("train", 0).tolist()) == text[:360_000]
    read = bytes(corpus.read("val", 0).tolist())
    assert len(read) == timed.VALIDATED + 1
    apart = 40_000 // 30
    for k in range(30):
        assert read[1024 * k : 1024 * (k + 1)] == text[360_000 + apart * k :][:1024]


audit = load_script("tools/speedrun_audit.py")
LOGS = {
    "a/one.txt": "print(f'step:{step}/20 val_loss:{x}')\nstep:10/20 val_loss:3.4 t:1\nstep:20/20 val_loss:3.28 t:1\n",
    "a/two.txt": "".join(f"step:{s}/20 val_loss:{x} t:1\n" for x in (3.271, 3.272) for s in (10, 20)),
    "b/one.txt": "step:20/30 val_loss:3.29 val_ema_loss:3.27 t:1\nstep:30/30 val_loss:3.1 val_ema_loss:3.1 t:1\n",
    "c/README.md": "| seed | step 10 | step 20 |\n| -: | -: | -: |\n| 0 | 3.3 | 3.2 |\n| 1 | 3.4 | 3.1 |\n| mean |\n",
}


def test_runs_are_read_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in LOGS.items():
        (tmp_path / audit.TRACK / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / audit.TRACK / name).write_text(text)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    records = [audit.Record(k, "x", 20, logs, n) for k, (logs, n) in enumerate((("a/*", 3), ("b/*", 1), ("c/*", 2)))]
    monkeypatch.setattr(audit, "RECORDS", records)
    rows = audit.extract(tmp_path)
    assert [(row["record"], row["val_loss"]) for row in rows] == [
        (0, "3.28000"), (0, "3.27100"), (0, "3.27200"), (1, "3.27000"), (2, "3.20000"), (2, "3.10000")
    ]  # fmt: skip
    monkeypatch.setattr(audit, "RECORDS", [records[0]._replace(n=4)])
    with pytest.raises(SystemExit, match="#0: expected 4 runs"):
        audit.extract(tmp_path)


def test_pairs_agree_with_scipy_and_the_tracks_arithmetic() -> None:
    result = audit.audit()
    for old, new in pairwise(audit.RECORDS[2:]):
        pair, values = result["arms"][str(new.number)], [audit.steps_to_target(r.number) for r in (new, old)]
        test = stats.ttest_ind(*values, equal_var=False)
        assert pair["p"] == pytest.approx(test.pvalue)
        assert pair["interval"] == pytest.approx(list(test.confidence_interval()))
        means = [np.mean(one) for one in values]
        assert pair["margin"] == pytest.approx((means[1] - means[0]) * audit.SLOPE / np.sqrt(1 / new.n + 1 / old.n))
    shift = audit.detectable(1.0, 8, 16) / np.sqrt(1 / 8 + 1 / 16)
    bound = stats.t.ppf(0.975, 22)
    assert stats.nct.sf(bound, 22, shift) + stats.nct.cdf(-bound, 22, shift) == pytest.approx(audit.POWER, abs=2e-3)
    found = audit.needed(-1.0, 1.0)
    powers = [stats.nct.sf(stats.t.ppf(0.975, 2 * n - 2), 2 * n - 2, np.sqrt(n / 2)) for n in (found - 1, found)]
    assert powers[0] < audit.POWER <= powers[1] + 2e-3


tool = load_script("tools/notebooks.py")
NOTEBOOKS = tool.notebooks()


def outputs(notebook: dict[str, Any]) -> list[list[str]]:
    """What the cells show, without what a processor that rounds otherwise may change.

    Of tables their titles, headers and arms; of texts all but digits and verdicts.
    """
    shown = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                page = "".join(data["text/html"])
                shown.append(re.findall(r"<(?:caption|th)>.*?<|<tr><td>[^(<]*", page))
            else:
                text = "".join(output.get("text") or data["text/plain"])
                text = re.sub(r"better|worse|no difference|undecided", "VERDICT", text)
                shown.append([*data, re.sub(r"[-+]?[\d.,]*\d(e-?\d+)?", "0", text)])
    return shown


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["idea", "trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_is_what_its_executed_notebook_holds(path: Path) -> None:
    notebook = tool.read(path)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    page, images = tool.rendered(notebook, path.stem)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page, "run `python tools/notebooks.py --render`"
    assert {name: (tool.FOLDER / name).read_bytes() for name in images} == images
    assert path.stat().st_size < 100_000
    for said in re.findall(r"Here it is \*([\w ]+)\*", page):
        assert f"'verdict': '{said}'" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of a library that only writers of documents have
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_the_same_again(path: Path) -> None:
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        reason = "needs nbclient and ipykernel (pip install -e '.[docs]')"
        # .ci/run installs them with the site's generator, so that a skip there would hide notebooks that no longer run
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    notebook = tool.read(path)
    assert outputs(tool.executed(notebook)) == outputs(notebook)


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
    found = load_script("benchmarks/figures.py").measured("traffic")
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
