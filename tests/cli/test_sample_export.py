"""`gptlab sample` and `gptlab export`: the same text for the same seed, and the same model in transformers' hands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptlab.cli import sample
from gptlab.cli.main import main
from gptlab.cli.sample import PLAIN, blocks, colour, legend, text
from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.shards import write_shard
from gptlab.data.tokenizers import get_tokenizer
from gptlab.interpret.generate import Step
from gptlab.model.huggingface import write_folder
from gptlab.runs.init_weights import model_of

Capture = pytest.CaptureFixture[str]


def sampled(capsys: Capture, source: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["sample", "--checkpoint", str(source), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["samples"]


def test_json_holds_exactly_the_tokens_that_were_written(finished_run: Path, capsys: Capture) -> None:
    (sample,) = sampled(capsys, finished_run, "--prompt", "line", "--max_new_tokens", "9")
    assert sample.keys() == {"tokens", "text", "exit_blocks"}
    assert len(sample["tokens"]) == len(sample["exit_blocks"]) == 9
    assert set(sample["exit_blocks"]) == {2}
    assert sample["text"] == get_tokenizer("bytes").decode(sample["tokens"])


def test_the_seed_decides_and_samples_differ(finished_run: Path, capsys: Capture) -> None:
    words = ("--prompt", "line", "--max_new_tokens", "8", "--temperature", "1")
    first = sampled(capsys, finished_run, *words, "--samples", "2", "--seed", "3")
    assert sampled(capsys, finished_run, *words, "--samples", "2", "--seed", "3") == first
    assert first[0] != first[1]
    assert sampled(capsys, finished_run, *words, "--seed", "4")[0] != first[0]


def test_greedy_text_is_the_argmax_of_the_model(finished_run: Path, capsys: Capture) -> None:
    (sample,) = sampled(capsys, finished_run, "--prompt", "a", "--max_new_tokens", "20", "--temperature", "0")
    model, config = model_of(finished_run)
    tokens = [97]
    with torch.no_grad():
        for _ in range(20):
            tokens.append(int(model(torch.tensor([tokens[-config.block_size :]]))[0, -1].argmax()))
    assert sample["tokens"] == tokens[1:]
    (same,) = sampled(capsys, finished_run, "--prompt", "a", "--max_new_tokens", "20", "--top_k", "1")
    assert same["tokens"] == sample["tokens"]


def test_no_tokens_and_no_prompt_are_fine(finished_run: Path, capsys: Capture) -> None:
    (sample,) = sampled(capsys, finished_run, "--prompt", "", "--max_new_tokens", "0")
    assert sample == {"tokens": [], "text": "", "exit_blocks": []}


def test_a_text_ends_with_its_document(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The readout is made sure of token 0, which begins a document of bytes."""
    model, _ = model_of(finished_run)
    with torch.no_grad():
        model.ln_f.bias += 1e3 * model.wte.weight[0]
    write_folder(model, tmp_path / "ends", files_of("bytes", 16), {})
    words = ("--max_new_tokens", "5", "--temperature", "0")
    for more in ((), ("--samples", "2"), ("--exit_confidence", "0.9")):
        assert {tuple(sample["tokens"]) for sample in sampled(capsys, tmp_path / "ends", *words, *more)} == {(0,)}
    assert sampled(capsys, tmp_path / "ends", *words, "--ignore_end")[0]["tokens"] == [0] * 5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--exit_confidence", "1.5"], "--exit_confidence: expected a number above 0 and at most 1, found 1.5"),
        (["--exit_confidence", "nan"], "--exit_confidence: expected a number above 0 and at most 1, found nan"),
        (["--top_p", "0"], "--top_p: expected a number above 0 and at most 1, found 0.0"),
        (["--temperature", "-1"], "--temperature: expected a number of at least 0, found '-1'"),
        (["--samples", "0"], "--samples: expected a whole number of at least 1, found '0'"),
        (["--reader", "tuned"], "--reader says how blocks are read; add --exit_confidence P or --show_blocks"),
    ],
)
def test_what_cannot_be_asked_exits_2(words: list[str], line: str, capsys: Capture) -> None:
    assert main(["sample", "--checkpoint", "nowhere", *words]) == 2
    assert line in capsys.readouterr().err


def test_blocks_are_shown_with_their_probabilities(finished_run: Path, capsys: Capture) -> None:
    (sample,) = sampled(capsys, finished_run, "--max_new_tokens", "3", "--show_blocks")
    assert np.shape(sample["blocks"]) == (3, 2, 2)
    assert all(0 <= p <= 1 for blocks in sample["blocks"] for _, p in blocks)
    assert main(["sample", "--checkpoint", str(finished_run), "--max_new_tokens", "3", "--show_blocks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.count("%") == 2]) == 3


def test_text_comes_on_standard_output_without_control_sequences(finished_run: Path, capsys: Capture) -> None:
    words = ["--max_new_tokens", "99", "--temperature", "5", "--prompt", "\x1b[2Jhello", "--ignore_end"]
    assert main(["sample", "--checkpoint", str(finished_run), *words]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("␛[2Jhello")
    assert err == ""
    assert not [c for c in out if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    (exact,) = sampled(capsys, finished_run, *words)
    assert any(token < 9 or 13 < token < 32 for token in exact["tokens"])  # so there was something to hide


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a run or a checkpoint, found none at"),
        (lambda path: path.mkdir(), "expected a run or a checkpoint, found none at"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"options": {}}')), "found none at"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "found none at"),
    ],
)
def test_where_there_is_no_model_it_says_so(
    make: Callable[[Path], Any], message: str, tmp_path: Path, capsys: Capture
) -> None:
    make(tmp_path / "x")
    assert main(["sample", "--checkpoint", str(tmp_path / "x")]) == 3
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(finished_run), str(out)]) == 0
    return out


def test_an_export_is_the_same_model_in_transformers(exported: Path, finished_run: Path) -> None:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(exported)
    ours, _ = model_of(finished_run)
    tokens = torch.arange(32).view(2, 16) * 5 % 256
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=0)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.ln_1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, ": expected model.safetensors or pytorch_model.bin, .* found no weights"),
        (cut_weights, "/model.safetensors cannot be read as safetensors"),
        (fewer_weights, r": expected transformer.h.1.ln_1.weight \(32,\), found no such weight"),
        (another_shape, ": expected at least .* bytes for .*n_embd 64"),
    ],
)
def test_a_damaged_hugging_face_folder_is_one_line(
    damage: Callable[[Path], None], message: str, exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    damage(folder)
    assert main(["sample", "--checkpoint", str(folder)]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gptlab: ")]
    assert len(lines) == 1
    assert re.search(f"{re.escape(str(folder))} ?{message}", lines[0]), lines[0]


def test_an_export_can_be_sampled_and_started_from(
    exported: Path, finished_run: Path, tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    words = ("--max_new_tokens", "12", "--temperature", "0")
    assert sampled(capsys, exported, *words) == sampled(capsys, finished_run, *words)
    losses = []
    for name, source in (("a", exported), ("b", finished_run)):
        assert main([*tiny(tmp_path / name, init_from=source, steps=1), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_export_says_what_it_did_and_overwrites_nothing(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "model"
    assert main(["export", str(finished_run), str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in model_of(finished_run)[0].parameters())
    assert told == {"folder": str(out), "parameters": parameters, "padding": 0, "tokenizer": "bytes"}
    assert main(["export", str(finished_run), str(out)]) == 2
    assert "expected a new or empty folder to export to" in capsys.readouterr().err


def test_a_run_over_gpt2_tokens_gets_its_tokenizer(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    tokens = get_tokenizer("gpt2").encode("the lord of the manor spoke, and they're all gone. " * 40)
    for split in ("train", "val"):
        write_shard(corpus / f"{split}_000000.bin", tokens)
    words = tiny(
        tmp_path / "run", data=corpus, tokenizer="gpt2", steps=1, eval_tokens=64, checkpoint_every=1, dose_every=0
    )
    assert main(words) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == "gpt2"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Hello world, it's naïve — 中文 🙂\n\n  12345<|endoftext|>"
    assert theirs.encode("a" + text[:-13]) == get_tokenizer("gpt2").encode("a" + text[:-13]).tolist()
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.encode("<|endoftext|>") == [50256]
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").config.vocab_size == 50257


def test_the_model_card_says_what_the_run_recorded_and_no_more(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    options = json.loads((finished_run / "config.json").read_text())["options"]
    checkpoints = sorted((finished_run / "checkpoints").iterdir())
    for number, source in enumerate((finished_run, checkpoints[0])):
        assert main(["export", str(source), str(tmp_path / f"{number}")]) == 0
        card = (tmp_path / f"{number}" / "README.md").read_text()
        step = 6 if source == finished_run else int(checkpoints[0].name[-8:])
        assert f"| validation loss | {losses[step]:.4f} nats a token at step {step} |" in card
        assert f"{step} updates of {options['total_batch_tokens']} tokens" in card
        assert f"| data | {options['data']} |" in card
        assert "confidence, control none" in card
        assert "\nLicense: not stated." in card
        command = next(line for line in card.splitlines() if line.startswith("gptlab train"))
        assert {f"--{key}={options[key]}" for key in ("seed", "steps", "n_embd", "signal.name")} - {"--seed=1"} <= {
            *shlex.split(command)
        }
    capsys.readouterr()
    damaged = Path(shutil.copytree(finished_run, tmp_path / "damaged"))
    (damaged / "metrics.jsonl").write_text("{\n")
    assert main(["export", str(damaged), str(tmp_path / "card")]) == 0
    assert "| validation loss | not recorded |" in (tmp_path / "card" / "README.md").read_text()


BYTES = get_tokenizer("bytes")
SNOWMAN = "☃".encode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.sys.stdout, "isatty", lambda: True)


def test_text_comes_as_soon_as_its_tokens_make_characters() -> None:
    made: list[int] = []

    def steps() -> Iterator[Step]:
        for token in (ord("a"), *SNOWMAN, SNOWMAN[0]):
            made.append(token)
            yield Step(token, 2)

    shown = text(list(b"hi"), steps(), BYTES, None)
    assert (next(shown), made) == ("hi", [])
    assert (next(shown), len(made)) == ("a", 1)
    assert [next(shown) for _ in range(3)] == ["", "", "☃"]
    assert (len(made), list(shown)) == (4, ["", "\N{REPLACEMENT CHARACTER}"])


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_each_piece_has_the_colour_of_its_block() -> None:
    steps = [Step(ord("a"), 1), Step(ord("\x1b"), 2), *(Step(byte, 3) for byte in SNOWMAN)]
    shown = list(text(list(b"hi"), iter(steps), BYTES, 3))
    assert shown[0] == f"\033[2mhi{PLAIN}"
    assert shown[1:3] == [f"{colour(1, 3)}a{PLAIN}", f"{colour(2, 3)}␛{PLAIN}"]
    assert "".join(shown[3:]) == f"{PLAIN}☃{PLAIN}"
    assert len({colour(1, 3), colour(2, 3), colour(3, 3)}) == 3
    assert "".join(text([], iter([Step(ord("a"), 1)]), BYTES, None)).removeprefix(f"\033[2m{PLAIN}") == "a"


@pytest.mark.usefixtures("terminal")
def test_the_last_line_has_the_colours_and_what_was_computed() -> None:
    assert legend(2, 0.625) == f"exit block {colour(1, 2)}1{PLAIN} {PLAIN}2{PLAIN}; 62.5% of the blocks computed"


def test_elsewhere_nothing_is_coloured() -> None:
    assert "\033" not in legend(2, 0.625) + "".join(text([104], iter([Step(97, 1)]), BYTES, 2))
    assert legend(2, None) == "nothing was written"


def test_a_line_a_token_holds_every_block_that_was_read() -> None:
    (line,) = blocks(iter([Step(ord("b"), 2, [ord("a"), 0x1B], [0.25, 0.5])]), BYTES)
    assert line.split() == ["'b'", "|", "'a'", "25%", "'\\x1b'", "50%"]
