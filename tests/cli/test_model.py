"""The model that a command names: with a tokenizer of its own or none through every command, to llm.c and back."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptlab.cli.main import main
from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.shards import write_shard
from gptlab.runs.init_weights import any_model, initial_model

Capture = pytest.CaptureFixture[str]
TEXT = "the lord of the manor spoke, and they're all gone; what of the play? naïve 🙂 no more of it. " * 30
NONE = "brings no tokenizer (tokenizer.json, or vocab.json and merges.txt) to read and write text with: put"


def write_tokenizer(folder: Path, block_size: int, tokenizer: str) -> None:
    for name, content in files_of(tokenizer, block_size).items():
        (folder / name).write_bytes(content)


def byte_level(size: int) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    found.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    how = {"vocab_size": size, "special_tokens": ["<|end|>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **how)
    found.train_from_iterator([TEXT], trainer)
    return found


def words(size: int) -> Tokenizer:
    found = Tokenizer(models.WordLevel(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    found.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    how = {"special_tokens": ["<unk>", "<|end|>"], "show_progress": False}
    found.train_from_iterator([TEXT], trainers.WordLevelTrainer(**how))
    return found


def write_model(folder: Path, rows: int, **changes: Any) -> transformers.GPT2LMHeadModel:
    """A drawn GPT-2 with weights so large that every token of a prompt decides what comes next."""
    torch.manual_seed(2)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, **{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() > 1:
                p.mul_(40 if "wpe" in name else 15)
    theirs.save_pretrained(folder)
    return theirs


def with_tokenizer(folder: Path, tokenizer: Tokenizer, *added: str, pad: int = 0) -> Any:
    """The folder gets the tokenizer, and a model of as many rows as it has tokens, and `pad` more."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens(list(added))
    write_model(folder, len(fast) + pad)
    fast.save_pretrained(folder)
    return fast


KINDS: dict[str, Callable[[Path], Any]] = {
    "byte-level of 300": lambda folder: with_tokenizer(folder, byte_level(300)),
    "added tokens": lambda folder: with_tokenizer(folder, byte_level(280), "<|user|>", "<|bot|>"),
    "words": lambda folder: with_tokenizer(folder, words(0)),
    "more rows than tokens": lambda folder: with_tokenizer(folder, byte_level(290), pad=7),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "model"
    KINDS[request.param](folder)
    return folder


def said(capsys: Capture, *argv: object, code: int = 0) -> dict[str, Any]:
    assert main([*map(str, argv), "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err.count("gptlab: ") == (1 if code else 0), captured.err
    return json.loads(captured.out)


PROMPT = "<|user|>what of the lord"


def greedy(folder: Path, count: int) -> list[int]:
    """What transformers' model and tokenizer write on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens, end = tokenizer(PROMPT).input_ids, tokenizer.eos_token_id
    given = len(tokens)
    with torch.no_grad():
        while len(tokens) < given + count and (len(tokens) == given or tokens[-1] != end):
            logits = model(torch.tensor([tokens[-16:]])).logits[0, -1, : len(tokenizer)]
            tokens.append(int(logits.argmax()))
    return tokens[given:]


def test_text_is_written_and_read_in_the_models_own_tokens(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = greedy(folder, 12)
    assert len(set(expected)) > 2
    said(capsys, "import", folder, "--out", tmp_path / "in")
    said(capsys, "export", folder, tmp_path / "out")
    for source in (folder, tmp_path / "in", tmp_path / "out"):
        kept = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        assert kept(PROMPT).input_ids == tokenizer(PROMPT).input_ids
        words = ("--prompt", PROMPT, "--max_new_tokens", 12, "--temperature", 0)
        (sample,) = said(capsys, "sample", "--checkpoint", source, *words)["samples"]
        assert sample["tokens"] == expected
        assert sample["text"] == tokenizer.decode(expected, clean_up_tokenization_spaces=False)
        found = said(capsys, "lens", source, "--prompt", PROMPT)["readers"]["raw"]["positions"]
        assert [position["token"] for position in found] == tokenizer(PROMPT).input_ids
    assert main(["sample", "--checkpoint", str(folder), *map(str, words)]) == 0
    shown = capsys.readouterr().out.rstrip("\n")
    whole = tokenizer.decode([*tokenizer(PROMPT).input_ids, *expected], clean_up_tokenization_spaces=False)
    assert shown.replace("\ufffd", "") == whole.replace("\ufffd", "") or "\ufffd" in whole


def test_a_test_of_text_is_scored_in_the_models_own_tokens(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    rows = ["no more of the play", "what of the lord", "they spoke of it all"]
    (tmp_path / "rows").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    losses = []
    for row in rows:
        before, _, last = row.rpartition(" ")
        context, word = tokenizer(before).input_ids, tokenizer(" " + last, add_special_tokens=False).input_ids
        tokens = torch.tensor([[*context, *word]])
        with torch.no_grad():
            log_p = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
        losses.append(-float(log_p[-len(word) :].sum()))
    words = ("--tasks", "lambada", "--lambada", tmp_path / "rows", "--out", tmp_path / "eval", "--threads", 1)
    found = said(capsys, "eval", folder, *words)
    assert found["tasks"]["lambada"]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found["tokenizer"].startswith(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nanoGPT folder of characters: raw tokens below 60, and a meta.pkl that would run code if it were read."""
    folder = tmp_path_factory.mktemp("characters")
    tokens = np.random.default_rng(1).integers(0, 60, 3000).astype("<u2")
    (folder / "train.bin").write_bytes(tokens[:2000].tobytes())
    (folder / "val.bin").write_bytes(tokens[2000:].tobytes())

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "made",)

    (folder / "meta.pkl").write_bytes(pickle.dumps(Payload()))
    return folder


@pytest.mark.parametrize("rows", [60, 256, 257, 300, 50257, 50304])
def test_a_model_without_a_tokenizer_has_its_shards_scored_and_its_text_refused(
    rows: int, shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    theirs = write_model(tmp_path / "model", rows)
    found = said(capsys, "eval", tmp_path / "model", "--data", shards, "--eval_tokens", 512, "--threads", 1)
    tokens = torch.from_numpy(np.fromfile(shards / "val.bin", dtype="<u2")[:513].astype(np.int64))
    with torch.no_grad():
        logits = theirs(tokens[:-1].view(-1, 16)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:])
    assert found["tasks"]["val"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found["tasks"]["val"]["bits_per_byte"] is None
    assert found["tokenizer"] is None
    model = tmp_path / "model"
    for argv in (
        ("sample", "--checkpoint", model, "--prompt", "a"), ("lens", model, "--prompt", "a"),
        ("eval", model, "--tasks", "val,lambada", "--data", shards),
    ):  # fmt: skip
        assert NONE in said(capsys, *argv, code=3)["error"]
    assert "expected a folder of shards" in said(capsys, "eval", model, "--data", "shakespeare", code=3)["error"]
    told = said(capsys, "import", model, "--out", tmp_path / "in")
    assert (told["tokenizer"], told["vocab_size"], told["padding"]) == (None, rows, 0)
    assert main(["import", str(model), "--out", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert "sample" not in out
    assert f"try next: gptlab eval {tmp_path / 'again'} --data SHARDS" in out
    assert not (shards / "made").exists()


def test_noise_and_the_lens_measure_on_shards_without_a_tokenizer(
    shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_model(tmp_path / "model", 60)
    words = ("--data", shards, "--threads", 1, "--eval_tokens", 256, "--reader_tokens", 0, "--branch_steps", 0)
    found = said(capsys, "noise", tmp_path / "model", "--signals", "confidence", *words)
    assert found["signals"].keys() == {"true_loss", "confidence"}
    found = said(capsys, "lens", tmp_path / "model", "--early_exit", "--data", shards, "--tokens", 64)
    assert found["tokens"] == 64


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_tokenizer_that_is_asked_for_must_fit(name: str, tmp_path: Path, capsys: Capture) -> None:
    write_model(tmp_path / "small", 200)
    known = {"gpt2": 50257, "bytes": 256}[name]
    error = said(capsys, "sample", "--checkpoint", tmp_path / "small", "--tokenizer", name, code=3)["error"]
    assert f"knows 200 tokens, {name} has {known}; " in error
    write_model(tmp_path / "fits", known)
    words = ("--prompt", "line", "--max_new_tokens", 2, "--temperature", 0)
    given = said(capsys, "sample", "--checkpoint", tmp_path / "fits", "--tokenizer", name, *words)
    told = said(capsys, "import", tmp_path / "fits", "--out", tmp_path / "in", "--tokenizer", name)
    assert told["tokenizer"] == name
    assert said(capsys, "sample", "--checkpoint", tmp_path / "in", *words) == given
    other = {"gpt2": "bytes", "bytes": "gpt2"}[name]
    error = said(capsys, "sample", "--checkpoint", tmp_path / "in", "--tokenizer", other, code=3)["error"]
    assert f"has a tokenizer of its own, {name}; leave the option out" in error


@pytest.mark.parametrize("command", ["sample", "import", "export", "eval", "lens"])
def test_a_tokenizer_of_another_model_is_refused_by_name_and_number(
    command: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(280), eos_token="<|end|>")
    fast.add_tokens(["<|bot|>"])
    write_model(folder, len(fast) - 1)
    fast.save_pretrained(folder)
    argv = {
        "sample": ("--checkpoint", folder), "import": (folder, "--out", tmp_path / "o"),
        "export": (folder, tmp_path / "o"), "eval": (folder, "--data", "x"), "lens": (folder, "--prompt", "a"),
    }[command]  # fmt: skip
    error = said(capsys, command, *argv, code=3)["error"]
    assert f"knows {len(fast) - 1} tokens, " in error
    assert f"has '<|bot|>' as token {len(fast) - 1}" in error
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_of_a_kind_that_is_not_read_goes_along(shards: Path, tmp_path: Path, capsys: Capture) -> None:
    write_model(tmp_path / "model", 60)
    (tmp_path / "model" / "spiece.model").write_bytes(b"\x0a\x05<unk>")
    (tmp_path / "model" / "LICENSE").write_text("theirs")
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit")
    said(capsys, "import", tmp_path / "model", "--out", tmp_path / "in")
    assert (tmp_path / "in" / "spiece.model").read_bytes() == b"\x0a\x05<unk>"
    assert (tmp_path / "in" / "LICENSE").read_text() == "theirs"
    assert not (tmp_path / "in" / "evil.py").exists()
    error = said(capsys, "sample", "--checkpoint", tmp_path / "in", code=3)["error"]
    assert "expected tokenizer.json, or vocab.json and merges.txt, found spiece.model; write the first" in error
    assert said(capsys, "eval", tmp_path / "in", "--data", shards, "--eval_tokens", 64, "--threads", 1)["tasks"]["val"]


def test_a_corpus_of_other_tokens_is_refused(folder: Path, tiny_corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    """tiny_corpus says that it holds bytes; unnamed shards are taken at their word."""
    error = said(capsys, "eval", folder, "--data", tiny_corpus, code=3)["error"]
    assert "holds bytes tokens, the model's are those of" in error
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = np.array(tokenizer(TEXT).input_ids, dtype=np.uint16)
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}_000000.bin", tokens)
    found = said(capsys, "eval", folder, "--data", tmp_path, "--eval_tokens", 160, "--threads", 1)["tasks"]["val"]
    read = tokenizer.decode(tokens[:161].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2) * 161 / len(read.encode()))


def test_training_starts_from_a_model_of_the_datas_tokens_alone(
    folder: Path, tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    how = {"steps": 1, "n_embd": 16, "n_layer": 2, "eval_tokens": 64}
    assert main(tiny(tmp_path / "a", init_from=folder, **how)) == 3
    assert re_line(capsys, "its tokens are those of", "the data's of bytes; start from a model of bytes tokens")
    write_model(tmp_path / "bytes", 256)
    write_tokenizer(tmp_path / "bytes", 16, "bytes")
    assert main(tiny(tmp_path / "b", init_from=tmp_path / "bytes", **how)) == 0
    write_tokenizer(tmp_path / "bytes", 16, "gpt2")
    (tmp_path / "bytes" / "tokenizer.json").unlink()
    capsys.readouterr()
    assert main(tiny(tmp_path / "c", init_from=tmp_path / "bytes", **how)) == 3
    assert re_line(capsys, "its tokens are those of gpt2, the data's of bytes; add --tokenizer gpt2")


def re_line(capsys: Capture, *parts: str) -> bool:
    """Whether one line on standard error holds all of the parts."""
    return any(all(part in line for part in parts) for line in capsys.readouterr().err.splitlines())


def test_llmcs_file_comes_back_as_the_same_model(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    model, _ = any_model(finished_run)
    file, folder = tmp_path / "out" / "model.bin", tmp_path / "model"
    assert main(["export", str(finished_run), str(file), "--format", "llm.c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(file),
        "parameters": model.config.parameters,
        "padding": 0,
    }
    assert main(["import", str(file), "--out", str(folder), "--tokenizer", "bytes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["n_layer"], told["vocab_size"], told["tokenizer"]) == ("llm.c", 2, 256, "bytes")
    given = dict(any_model(folder)[0].named_parameters())
    started = dict(initial_model(str(folder), model.config, 5, "bytes").named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, given[name]), name
        assert torch.equal(p, started[name]), name
    words = ["--prompt", "line", "--max_new_tokens", "9", "--temperature", "0", "--json"]
    texts = []
    for source in (finished_run, folder):
        assert main(["sample", "--checkpoint", str(source), *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1]


def test_another_programs_model_is_pointed_to_the_import(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04")
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        for words in (["sample", "--checkpoint"], ["lens", "--prompt", "a"], ["eval"], ["noise"]):
            assert main([*words, str(source)]) == 3
            assert f"is read with `gptlab import {source} --out FOLDER`" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    (tmp_path / "no_model").write_bytes(b"x" * 40)
    refused = (
        (["import", str(tmp_path / "no_model"), "--out", str(used)], 2, "expected a new or empty folder to import to"),
        (["import", str(tmp_path / "no_model"), "--out", str(tmp_path / "new")], 3, "found none of them"),
        (["import", str(finished_run), "--out", str(tmp_path / "new")], 3, "what gptlab trained needs no import"),
        (["export", str(finished_run), str(used)], 2, "expected a new or empty folder to export to"),
        (["export", str(finished_run), str(used), "--format", "llm.c"], 2, "expected a new file to export to"),
        (["export", str(finished_run), str(tmp_path / "n"), "--dtype", "bf16"], 2, "bf16 is for --format llm.c"),
    )
    before = sorted(tmp_path.rglob("*"))
    for words, code, line in refused:
        assert main(words) == code
        assert line in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
