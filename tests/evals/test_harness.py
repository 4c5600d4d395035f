"""lm-evaluation-harness itself over a task of our own: its figures, by hand and by its own Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.tokenizers import get_tokenizer
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import DataError
from gptlab.evals.scoring import Scorer, run_harness
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import write_folder

lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm-eval: pip install 'lm-eval[hf]'")
pytest.importorskip("accelerate", reason="lm-eval's own Hugging Face model needs it: pip install 'lm-eval[hf]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, and its packages'
GPT2 = get_tokenizer("gpt2")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zq", "c"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def gpt2_model() -> GPT:
    """A tiny model over GPT-2's tokens."""
    model = GPT(GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=1, n_embd=8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=1.0)
    return model


@pytest.fixture(scope="module")
def tasks(gpt2_model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["rain", "the sea", "stone walls", "a cat", "green"]
    rows = [
        {
            "question": f"After {words[n % 5]} there is{' much' * (n % 4)}",
            "choices": [words[(n + k) % 5] for k in range(3)],
            "answer": n * 7 % 3,
            "written": "ab" if n % 4 == 0 else "abc",
        }
        for n in range(12)
    ]
    rows[0]["question"] = "a long story " * 30  # longer than the model reads
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return folder


@pytest.fixture
def score(gpt2_model: GPT, cpu: ComputeConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(name: str, every_block: bool = False) -> dict[str, list[dict[str, float]]]:
        scorer = Scorer(gpt2_model, cpu, World(), batch_size=4, every_block=every_block)
        return run_harness(name, scorer, GPT2, include_path=str(tasks))

    return run


def test_figures_are_those_of_the_harnesss_own_model(
    score: Callable[..., Any], gpt2_model: GPT, tasks: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    write_folder(gpt2_model, tmp_path / "model", files_of("gpt2", 32), {})
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'model'},dtype=float32", batch_size=1, device="cpu",
        tasks=["tiny_choice", "tiny_rolling"], task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    (choice,), (rolling,) = score("tiny_choice")["tiny_choice"], score("tiny_rolling")["tiny_rolling"]
    assert 0 < choice["acc"] < 1
    for metric in ("acc", "acc_norm"):
        assert choice[metric] == theirs["tiny_choice"][f"{metric},none"]
    for metric in ("word_perplexity", "bits_per_byte"):
        assert rolling[metric] == pytest.approx(theirs["tiny_rolling"][f"{metric},none"], rel=1e-4)


def test_every_block_has_its_own_figures(score: Callable[..., Any], gpt2_model: GPT, cpu: ComputeConfig) -> None:
    blocks = score("tiny_rolling", every_block=True)["tiny_rolling"]
    assert len(blocks) == 2
    assert blocks[1] == score("tiny_rolling")["tiny_rolling"][0]
    assert abs(blocks[0]["bits_per_byte"] - blocks[1]["bits_per_byte"]) > 0.01


def test_a_task_in_which_the_model_writes_says_what_scores_it(score: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"gptlab export RUN FOLDER.*lm_eval run --model hf"):
        score("tiny_writing")


def test_a_task_that_is_not_there_is_one_line(score: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="lm_eval:no_such_task cannot be run") as refused:
        score("no_such_task")
    assert "\n" not in str(refused.value)
