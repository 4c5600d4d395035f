"""HellaSwag and LAMBADA from files in their real formats, scored one row at a time; lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.tokenizers import get_tokenizer
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import DataError
from gptlab.evals.scoring import Request, Scorer, run_harness
from gptlab.evals.tasks import PORTION, Record, Task, hellaswag, lambada, portions, run_task
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import write_folder
from gptlab.training.evaluate import hidden_states
from gptlab.training.parallel import compile_blocks

Naive = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
BYTES = get_tokenizer("bytes")
WORDS = ["sits", "on a roof", "pulls at it", "sings", "is using wrap", "climbs", "rips tiles off", "holds a cube"]


@pytest.fixture(scope="session")
def cpu() -> ComputeConfig:
    return ComputeConfig(torch.device("cpu"), None, 1, False, {"compile": "as asked"})


@pytest.fixture(scope="session")
def model() -> GPT:
    """Over bytes, reading 64 at once; sure of itself by place and token, so that scores differ."""
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=3, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@pytest.fixture(scope="session")
def naive(model: GPT) -> Naive:
    """(context, continuation) -> (each block's summed loss (L,), whether all of it was the likeliest (L,)).

    One row at a time, in float64; the row must be no longer than the model reads.
    """
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    twin.double()

    @torch.no_grad()
    def score(context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        row = torch.tensor([context + continuation])
        losses, greedy = [], []
        for h in twin.hidden_states(row[:, :-1])[1:]:
            log_p = twin.read(h)[0, len(context) - 1 :].log_softmax(1)
            targets = torch.tensor(continuation)
            losses.append(-log_p.gather(1, targets[:, None]).sum())
            greedy.append((log_p.argmax(1) == targets).all())
        return torch.stack(losses), torch.stack(greedy)

    return score


def swag(n: int) -> dict[str, Any]:
    """A row as the authors' files have it."""
    endings = [WORDS[(n * 3 + k * 5 + n * k) % 8] + "." * (k + n % 3) for k in range(4)]
    return {
        "ind": n, "activity_label": "Roof", "ctx_a": f"A man {WORDS[n % 8]}.", "ctx_b": "he", "split": "val",
        "ctx": f"A man {WORDS[n % 8]}. he", "label": n * 7 % 4, "endings": endings, "split_type": "indomain",
        "source_id": "activitynet~v_-JhWjGDPHMY",
    }  # fmt: skip


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unrecorded(task: Task, scorer: Scorer) -> list[dict[str, float]]:
    return run_task(task, scorer, Record(None, {}), lambda done, figures: None)


@torch.no_grad()
def reference(model: GPT, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(acc, acc_norm) of every block: four padded rows at a time, the ending masked, its losses' sum and mean."""
    right = torch.zeros(model.config.n_layer, 2)
    for row in rows:
        context = BYTES.encode(row["ctx"]).tolist()
        endings = [BYTES.encode(" " + ending).tolist() for ending in row["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for k, ending in enumerate(endings):
            tokens[k, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[k, len(context) : len(context) + len(ending)] = 1
        for j, h in enumerate(model.hidden_states(tokens)[1:]):
            losses = cross_entropy(model.read(h)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
            sums = (losses * mask[:, 1:]).sum(1)
            right[j, 0] += int(sums.argmin()) == row["label"]
            right[j, 1] += int((sums / mask[:, 1:].sum(1)).argmin()) == row["label"]
    return [tuple(figures) for figures in (right / len(rows)).tolist()]


def test_hellaswag_is_scored_as_a_completion(model: GPT, cpu: ComputeConfig, tmp_path: Path) -> None:
    rows = [swag(n) for n in range(40)]
    scorer = Scorer(model, cpu, World(), batch_size=7, every_block=True)
    found = unrecorded(hellaswag(lines(tmp_path / "val.jsonl", rows), BYTES), scorer)
    expected = reference(model, rows)
    assert [f["acc"] for f in found] == pytest.approx([acc for acc, _ in expected])
    assert [f["acc_norm"] for f in found] == pytest.approx([acc_norm for _, acc_norm in expected])
    assert len({figure for block in expected for figure in block}) > 2, "figures too alike to tell blocks apart"


def test_the_datasets_parquet_with_its_label_as_text_is_the_same_test(
    model: GPT, cpu: ComputeConfig, tmp_path: Path
) -> None:
    rows = [swag(n) for n in range(9)]
    parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "label": str(row["label"])} for row in rows]), tmp_path / "x"
    )
    read = hellaswag(str(tmp_path / "x"), BYTES)
    assert list(read.rows) == list(hellaswag(lines(tmp_path / "val.jsonl", rows), BYTES).rows)
    assert len(hellaswag(str(tmp_path / "x"), BYTES, limit=4).rows) == 4


def test_lambada_is_the_last_word(model: GPT, cpu: ComputeConfig, naive: Naive, tmp_path: Path) -> None:
    texts = [f"he {a}, and she {b}" for a in WORDS for b in ("sat", "went", "is")]
    context = BYTES.encode("so it").tolist()
    guesses = []
    with torch.no_grad():
        row = [*context, 32]
        for _ in range(2):
            guesses.append(int(model(torch.tensor([row]))[0, -1, 33:127].argmax()) + 33)
            row.append(guesses[-1])
    texts.append("so it " + bytes(guesses).decode())
    scorer = Scorer(model, cpu, World(), every_block=True)
    found = unrecorded(lambada(lines(tmp_path / "l.jsonl", [{"text": text} for text in texts]), BYTES), scorer)
    split = [text.rpartition(" ") for text in texts]
    scores = [naive(BYTES.encode(a).tolist(), BYTES.encode(" " + c).tolist()) for a, _, c in split]
    for j, figures in enumerate(found):
        losses = [float(loss[j]) for loss, _ in scores]
        assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
        assert figures["acc"] == pytest.approx(sum(bool(greedy[j]) for _, greedy in scores) / len(scores))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "row 1: expected a label of 0 to 3, found ''"),
        ({"label": 4}, "row 1: expected a label of 0 to 3, found 4"),
        ({"endings": ["a", "b"]}, "row 1: expected ctx and 4 endings"),
        ({"endings": [1, 2, 3, 4]}, "row 1: expected endings that are text"),
        ({"ctx": None}, "row 1: expected ctx and 4 endings"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "val.jsonl", [swag(0), swag(1) | change])
    with pytest.raises(DataError, match=message):
        hellaswag(file, BYTES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a b"}\n{"text"', "line 2: expected a JSON object"),
        (b"[1]\n", "line 1: expected a JSON object"),
        (b"\n\n", "expected rows, found none"),
        (b'{"text": "one"}\n', "row 0: expected a text of several words"),
        (b'{"text": "ends with a blank "}\n', "row 0: expected a text of several words"),
        (b"PAR1 and then nothing", "is no parquet file that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError, match=message):
        lambada(str(tmp_path / "f"), BYTES)
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        lambada(str(tmp_path / "nowhere"), BYTES)


def test_a_test_that_was_stopped_goes_on_with_the_portion_it_was_at(
    model: GPT, cpu: ComputeConfig, tmp_path: Path
) -> None:
    texts = [{"text": f"he {WORDS[n % 8] * (1 + n % 5)} {n}"} for n in range(2 * PORTION + 10)]
    task = lambada(lines(tmp_path / "l.jsonl", texts), BYTES)
    scorer, path = Scorer(model, cpu, World(), every_block=True), tmp_path / "eval" / "lambada.json"
    unbroken = unrecorded(task, scorer)

    def stop(done: int, figures: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(task, scorer, Record(path, {"model": "a"}), stop)
    told: list[int] = []
    record = Record(path, {"model": "a"})
    assert sorted(record.done) == sorted(portions(task.rows)[0])
    assert run_task(task, scorer, record, lambda done, figures: told.append(done)) == unbroken
    assert told == [2 * PORTION, len(texts)]
    again = Record(path, {"model": "a"})
    assert run_task(task, scorer, again, lambda done, figures: told.append(-1)) == unbroken
    assert told == [2 * PORTION, len(texts)]
    assert Record(path, {"model": "b"}).done == {}
    assert not list(path.parent.glob(".*"))
    for damaged in ("", "{", "[]", '{"identity": {"model": "a"}, "done": {"0": [[1, 2, 3]]}}'):
        path.write_text(damaged)
        assert Record(path, {"model": "a"}).done == {}


def test_a_file_that_claims_more_rows_than_it_has_bytes_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptlab.evals.tasks.LARGEST", 2**20)
    many = pyarrow.table({"text": pyarrow.array(["the same words" * 40]).take(pyarrow.array([0] * 20_000))})
    parquet.write_table(many, tmp_path / "many.parquet")
    assert (tmp_path / "many.parquet").stat().st_size < 5_000
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a b " * 2**18 + '"}\n')
    for name, message in (("many.parquet", "expected rows of at most 1 MB"), ("long.jsonl", "expected at most 1 MB")):
        with pytest.raises(DataError, match=message):
            lambada(str(tmp_path / name), BYTES)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(DataError, match=f"expected a regular file, found a {kind}"):
        hellaswag(str(path), BYTES)


def test_finished_rows_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("keep")
    (tmp_path / "own.json").symlink_to(tmp_path / "theirs")
    Record(tmp_path / "own.json", {"a": 1}).write()
    assert (tmp_path / "theirs").read_text() == "keep"
    assert not (tmp_path / "own.json").is_symlink()


def requests(count: int = 23) -> list[Request]:
    generator = torch.Generator().manual_seed(7)

    def some(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return tuple(torch.randint(256, (length,), generator=generator).tolist())

    return [Request(some(40), some(20)) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_those_of_one_row_at_a_time(batch_size: int, model: GPT, cpu: ComputeConfig, naive: Naive) -> None:
    asked = requests()
    asked.append(Request((3,), (int(model(torch.tensor([[3]]))[0, -1].argmax()),)))  # the last block's own guess
    found = Scorer(model, cpu, World(), batch_size=batch_size, every_block=True)(asked)
    expected = [naive(list(r.context), list(r.continuation)) for r in asked]
    torch.testing.assert_close(found.loss, torch.stack([loss for loss, _ in expected]), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.greedy, torch.stack([greedy for _, greedy in expected]))
    assert found.greedy[-1, -1]
    assert not found.greedy[0].any()
    last = Scorer(model, cpu, World(), batch_size=batch_size)(asked)
    assert torch.equal(last.loss, found.loss[:, -1:])
    assert torch.equal(last.greedy, found.greedy[:, -1:])


def test_a_context_is_cut_at_its_beginning(model: GPT, cpu: ComputeConfig, naive: Naive) -> None:
    (long,) = (tuple(range(100, 200)),)
    found = Scorer(model, cpu, World(), every_block=True)([Request(long, (5, 6))])
    torch.testing.assert_close(found.loss[0], naive(list(long[-63:]), [5, 6])[0], rtol=1e-5, atol=1e-5)


def test_a_long_text_is_scored_in_stretches_each_with_all_that_fits_before_it(
    model: GPT, cpu: ComputeConfig, naive: Naive
) -> None:
    """0 | 1..64 | 65..128 | 129..150: the last stretch sees 64 tokens, of which it scores the last 22."""
    text = [n * 7 % 256 for n in range(151)]
    found = Scorer(model, cpu, World(), every_block=True)([Request((text[0],), tuple(text[1:]))])
    parts = [naive(text[:1], text[1:65]), naive(text[64:65], text[65:129]), naive(text[86:129], text[129:])]
    torch.testing.assert_close(found.loss[0], sum(loss for loss, _ in parts), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_close_and_progress_is_told(model: GPT, naive: Naive) -> None:
    rough = ComputeConfig(torch.device("cpu"), torch.bfloat16, 1, False, {})
    told: list[int] = []
    asked = requests(8)
    found = Scorer(model, rough, World(), batch_size=3)(asked, told.append)
    exact = torch.stack([naive(list(r.context), list(r.continuation))[0][-1:] for r in asked])
    torch.testing.assert_close(found.loss, exact, rtol=0.03, atol=0.1)
    assert not torch.equal(found.loss.float(), exact.float())
    assert told == [1, 2, 3]


def test_a_compiled_model_scores_the_same(
    model: GPT, cpu: ComputeConfig, naive: Naive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch.compile's own front, and the eager back end behind it, which needs no compiler."""
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    for block in twin.blocks:
        compiled = block.compile
        monkeypatch.setattr(block, "compile", partial(compiled, backend="eager"))
    placement = ComputeConfig(cpu.device, None, 1, True, {"compile": "as asked"})
    rehearse = partial(hidden_states, twin, torch.zeros(2, 4, dtype=torch.int64), placement)
    assert compile_blocks(twin, placement, rehearse, dynamic=None) == "compiled: as asked"
    asked = requests(4)
    found = Scorer(twin, placement, World(), batch_size=2, every_block=True)(asked)
    torch.testing.assert_close(found.loss, Scorer(model, cpu, World(), batch_size=2, every_block=True)(asked).loss)


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
