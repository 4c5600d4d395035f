"""Text from models: generation against full recomputations, draws, early exit; `gptlab sample`, `gptlab export`."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gptlab.cli import sample
from gptlab.cli.main import main
from gptlab.cli.sample import PLAIN, blocks, colour, legend, text
from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.shards import write_shard
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError
from gptlab.interpret.generate import Sampling, Step, as_row, choose, generate, generate_batch
from gptlab.interpret.lens import as_json, curve, leave, look, summary
from gptlab.model.decoder import Decoder, Product, Weights
from gptlab.model.fast_cpu import replace_linears
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, write_folder
from gptlab.runs.init_weights import model_of
from gptlab.signals.tuned_lens import TunedLens

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


GREEDY = Sampling(temperature=0)
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])
P = LOGITS.double().softmax(0)


def build(**changes: int) -> GPT:
    """A model whose readings differ from block to block, so that a wrong state would be seen."""
    sizes = {"block_size": 8, "vocab_size": 50, "n_layer": 3, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**sizes | changes), seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.3, generator=source))
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return build()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"share_blocks": True}, {"n_layer": 1}, {"vocab_size": 51, "n_head": 1}, {"exact_gelu": True}]
)
def test_each_step_is_a_full_recomputation(changes: dict[str, int]) -> None:
    """20 tokens with a block_size of 8: with kept keys and values, and then with a window that slides."""
    model = build(**changes)
    tokens = [3, 1, 4]
    for step in generate(model, tokens.copy(), 20, GREEDY, show_blocks=True):
        states = model.hidden_states(torch.tensor([tokens[-8:]]))[1:]
        read = [model.read(h[0, -1]).softmax(-1) for h in states]
        assert step.best == [int(p.argmax()) for p in read]
        assert step.probability == pytest.approx([float(p.max()) for p in read], abs=1e-6)
        assert step.token == step.best[-1]
        assert step.block == model.config.n_layer
        tokens.append(step.token)
    assert len(tokens) == 23


@torch.no_grad()
def test_a_decoder_reads_on_as_the_model_reads_in_one_go(model: GPT) -> None:
    tokens = torch.randint(50, (3, 8), generator=generator(1))
    expected = model.hidden_states(tokens)
    decoder = Decoder(Weights(model), rows=3)
    found = list(decoder.states(tokens[:, :5]))
    for t in range(5, 9):
        for h, whole in zip(found, expected[1:], strict=True):
            torch.testing.assert_close(h, whole[:, t - 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoder.read(found[-1]), model(tokens)[:, t - 1], atol=1e-5, rtol=1e-5)
        if t < 8:
            found = list(decoder.states(tokens[:, t : t + 1]))
    with pytest.raises(ConfigError, match="block_size 8 tokens at once, found 9"):
        Decoder(Weights(model), capacity=9)


def test_texts_side_by_side_are_those_written_alone(model: GPT) -> None:
    alone = [[s.token for s in generate(model, [1, 2], 12, generator=generator(n))] for n in range(4)]
    rows = list(generate_batch(model, [1, 2], 12, generators=[generator(n) for n in range(4)], show_blocks=True))
    assert [[step.token for row in rows if (step := row[n])] for n in range(4)] == alone
    assert len({tuple(text) for text in alone}) == 4


def test_a_text_stops_at_its_end_and_the_batch_with_the_last(model: GPT) -> None:
    def texts(end: int | None) -> list[list[int]]:
        rows = list(generate_batch(model, [1], 30, generators=[generator(n) for n in range(3)], end=end))
        return [[step.token for row in rows if (step := row[n])] for n in range(3)]

    whole = texts(None)
    end = whole[0][4]
    cut = [text[: text.index(end) + 1] if end in text else text for text in whole]
    assert texts(end) == cut
    assert len({len(text) for text in cut}) > 1
    last = [step.token for step in generate(model, [1], 30, generator=generator(0), end=end)]
    assert last == cut[0]


def test_the_same_generator_draws_the_same_text(model: GPT) -> None:
    def drawn(seed: int) -> list[int]:
        return [step.token for step in generate(model, [1], 8, generator=generator(seed))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_padding_rows_are_never_written(model: GPT) -> None:
    steps = list(generate(model, [1], 40, Sampling(10.0), vocab_size=5, generator=generator(1), show_blocks=True))
    assert {step.token for step in steps} == set(range(5))
    assert max(best for step in steps for best in step.best) < 5


def test_nothing_is_learnt_while_writing(model: GPT) -> None:
    for _ in generate(model, [1], 2, generator=generator(1)):
        assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_bf16_multiplies_in_bf16_and_uses_working_copies() -> None:
    model = build(n_embd=64)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    exact = model(tokens)[:, -1]
    decoder = Decoder(Weights(model, torch.bfloat16))
    rounded = decoder.read(list(decoder.states(tokens))[-1])
    assert rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).abs().max() / exact.std()) < 0.05
    replace_linears(model, torch.bfloat16)
    working, _ = model.lm_head.operands(torch.bfloat16)
    again = Decoder(Weights(model))
    assert torch.equal(again.read(list(again.states(tokens))[-1]), rounded)
    working.zero_()
    assert not Weights(model).head(torch.ones(1, 64, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 40])
@torch.no_grad()
def test_a_product_is_a_linear_layer_packed_or_not(
    dtype: torch.dtype, packs: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr("gptlab.model.decoder._packs", lambda weight: False)
    weight, bias, x = (torch.randn(*shape, generator=generator(7)) for shape in ((48, 64), (48,), (rows, 64)))
    found = Product(weight, bias, dtype)
    assert found.is_packed <= packs
    rounded = [t.to(dtype).double() for t in (x, weight, bias)]
    expected = rounded[0] @ rounded[1].T + rounded[2]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.05}
    torch.testing.assert_close(found(x.to(dtype)).double(), expected, **tolerance)
    residual = torch.randn(rows, 48, generator=generator(8))
    added = found.added_to(residual, x.to(dtype))
    assert added.dtype == torch.float32, "sums stay in the residual's dtype"
    torch.testing.assert_close(added.double(), expected + residual.double(), **tolerance)
    part = found.from_column(16)(x.to(dtype))
    torch.testing.assert_close(part.double(), expected[:, 16:], **tolerance)
    for form in ("tanh", "none"):
        curved = Product(weight, bias, dtype, gelu=form)(x.to(dtype))
        torch.testing.assert_close(curved.double(), F.gelu(expected, approximate=form), **tolerance)


def test_products_are_packed_on_a_cpu_that_has_onednn() -> None:
    assert Product(torch.ones(2, 2), None, torch.float32).is_packed == torch.backends.mkldnn.is_available()
    assert not Product(torch.ones(2, 2), None, torch.float64).is_packed


@torch.no_grad()
def left_early(model: GPT, tokens: Sequence[int], confidence: float) -> tuple[torch.Tensor, int]:
    """Logits and exit block of the last of `tokens`, with plain attention over what each token left in each block.

    All tokens but the last `1` are taken to have been read by all blocks, as a prompt's are.
    """
    L = model.config.n_layer
    states = [h[0, :-1] for h in model.hidden_states(torch.tensor([tokens]))]
    h = model.embed(torch.tensor([tokens]))[0, -1]
    for j, block in enumerate(model.blocks, 1):
        before = torch.cat([states[j - 1], h[None]])[None]
        h = block(before)[0, -1]
        logits = model.read(h)
        if j == L or logits.softmax(0).max() >= confidence:
            return logits, j
    raise AssertionError


@torch.no_grad()
def test_early_exit_takes_the_first_block_that_is_sure() -> None:
    model = build(block_size=16)
    prompt, blocks = [3, 1, 4], set()
    for confidence in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        (step,) = generate(model, prompt, 1, GREEDY, exit_confidence=confidence)
        logits, block = left_early(model, prompt, confidence)
        assert (step.token, step.block) == (int(logits.argmax()), block)
        assert len(step.best) == len(step.probability) == block
        assert max(step.probability[:-1], default=0) < confidence
        blocks.add(block)
    assert len(blocks) > 1, "the confidences should not all exit at the same block"


@torch.no_grad()
def test_what_skipped_blocks_are_given_is_the_state_that_was_left_with(model: GPT) -> None:
    decoder = Decoder(Weights(model))
    tokens = torch.tensor([[3, 1, 4]])
    list(decoder.states(tokens[:, :2]))
    h = next(iter(decoder.states(tokens[:, 2:])))
    decoder.skip(1, h)
    C = model.config.n_embd
    for number in (1, 2):
        block = model.blocks[number]
        expected = F.linear(block.ln_1(h), block.attn.c_attn.weight[C:], block.attn.c_attn.bias[C:])
        found = decoder.kept[number][:, 2].reshape(2 * C)
        torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("confidence", [1.0, None])
def test_a_confidence_of_one_is_the_full_model(model: GPT, confidence: float | None) -> None:
    full = list(generate(model, [1, 2], 20, generator=generator(1)))
    assert list(generate(model, [1, 2], 20, generator=generator(1), exit_confidence=confidence)) == full


def test_a_confidence_that_is_never_reached_writes_the_same_text(model: GPT) -> None:
    """The window slides, and its last token is read apart from the others."""
    full = list(generate(model, [1, 2], 20, generator=generator(1), show_blocks=True))
    found = list(generate(model, [1, 2], 20, generator=generator(1), exit_confidence=1 - 1e-7))
    assert [(s.token, s.block, s.best) for s in found] == [(s.token, s.block, s.best) for s in full]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, 1.0, P),
        (0.5, None, 1.0, (2 * LOGITS.double()).softmax(0)),
        (1.0, 2, 1.0, torch.tensor([0, P[1], P[2], 0]) / (P[1] + P[2])),
        (1.0, 99, 1.0, P),
        (1.0, None, float(P[1]) + 0.01, torch.tensor([0, P[1], P[2], 0]) / (P[1] + P[2])),
        (1.0, None, float(P[1]) - 0.01, torch.tensor([0, 1.0, 0, 0])),
        (1.0, 3, 0.7, torch.tensor([0, P[1], P[2], 0]) / (P[1] + P[2])),
        (1.0, None, 1e-9, torch.tensor([0, 1.0, 0, 0])),
        (0.0, None, 1.0, torch.tensor([0, 1.0, 0, 0])),
        (1e-4, None, 1.0, torch.tensor([0, 1.0, 0, 0])),
        (1e-300, None, 1.0, torch.tensor([0, 1.0, 0, 0])),
    ],
)
def test_draws_follow_the_distribution_that_was_asked_for(
    temperature: float, top_k: int | None, top_p: float, expected: torch.Tensor
) -> None:
    """Over draws that are spaced evenly each token comes as often as its probability says, but for one at its edges."""
    n = 2000
    draws = (torch.arange(n) + 0.5) / n
    drawn = choose(LOGITS.expand(n, 4), Sampling(temperature, top_k, top_p), draws)
    found = torch.bincount(drawn, minlength=4)
    assert ((found - n * expected).abs() <= 1.001).all(), found


def test_the_ends_of_the_draws_stay_within_what_is_kept() -> None:
    draws = torch.tensor([0.0, 1 - 2**-24])
    assert choose(LOGITS.expand(2, 4), Sampling(top_p=float(P[1] + P[2]) - 0.01), draws).tolist() == [1, 2]
    assert choose(torch.tensor([[0.0, -200.0, -200.0]]).repeat(2, 1), Sampling(), draws).tolist() == [0, 0]


def test_a_sample_becomes_a_row_of_json_values() -> None:
    steps = [Step(104, 2, [97, 98], [0.123456, 0.5]), Step(105, 2, [0, 255], [1.0, 0.25])]
    assert as_row([72], steps, get_tokenizer("bytes")) == {
        "prompt": "H",
        "text": "hi",
        "tokens": [104, 105],
        "written": ["h", "i"],
        "blocks": [[["a", 0.1235], ["b", 0.5]], [["\0", 1.0], ["�", 0.25]]],
    }


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=7, eos_token_id=7)
    model = GPT2LMHeadModel(config).float().eval()
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():  # all of it from one seed, nothing from the global generator
            p.normal_(float(".ln_" in name and name.endswith("weight")), 0.2, generator=source)
        model.transformer.wpe.weight.mul_(4)  # else the text soon repeats itself
    return model


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4, 5, 6], [60, 0, 60, 0]])
def test_greedy_text_is_that_of_transformers(theirs: GPT2LMHeadModel, prompt: list[int]) -> None:
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=7, eos_token_id=None,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    )[0, len(prompt) :].tolist()  # fmt: skip
    found = [step.token for step in generate(from_huggingface(theirs), prompt, 24, Sampling(temperature=0))]
    assert found == expected
    assert len(set(found)) > 5, "a text that repeats itself compares little"


V = 40


@pytest.fixture(scope="module")
def opinionated() -> GPT:
    """Its vocabulary is padded by two rows, and its readings differ from block to block."""
    model = GPT(GPTConfig(block_size=12, vocab_size=V + 2, n_layer=3, n_head=2, n_embd=16), seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.25, generator=source))
        model.ln_f.weight.mul_(2.5)  # some readings are sure, some are not
    return model


@pytest.fixture(scope="module")
def reader(opinionated: GPT) -> TunedLens:
    reader, source = TunedLens.untuned(opinionated), torch.Generator().manual_seed(3)
    reader.weight.normal_(0, 0.2, generator=source)
    return reader


@pytest.mark.parametrize("tuned", [False, True])
@torch.no_grad()
def test_a_lens_holds_every_blocks_reading(opinionated: GPT, reader: TunedLens, tuned: bool) -> None:
    tokens = [3, 1, 4, 1, 5, 9]
    lens = look(opinionated, tokens, top=4, reader=reader if tuned else None, vocab_size=V)
    states = opinionated.hidden_states(torch.tensor([tokens]))[1:]
    final = opinionated.read(states[-1])[0, :, :V].argmax(1)
    for j, h in enumerate(states):
        for t in range(len(tokens)):
            p = opinionated.read(reader(j + 1, h[0, t]) if tuned else h[0, t])[:V].double().softmax(0)
            assert lens.best[j, t].tolist() == p.topk(4).indices.tolist()
            assert lens.probability[j, t].tolist() == pytest.approx(p.topk(4).values.tolist(), abs=1e-6)
            assert float(lens.entropy[j, t]) == pytest.approx(-float((p * p.log()).sum()), abs=1e-5)
            assert bool(lens.agrees[j, t]) == bool(p.argmax() == final[t])
    assert lens.agrees[-1].all()
    assert not lens.agrees.all()


def test_a_lens_as_json_and_in_short(opinionated: GPT) -> None:
    lens = look(opinionated, [7, 10], top=2)
    positions = json.loads(json.dumps(as_json(lens, get_tokenizer("bytes"))))
    assert [position["token"] for position in positions] == lens.tokens
    assert positions[1]["text"] == "\n"
    block = positions[1]["blocks"][2]
    assert block["agrees"] is True
    assert [best["token"] for best in block["top"]] == lens.best[2, 1].tolist()
    short = summary(lens)
    assert len(short) == 3
    assert short[2]["agreement"] == 1
    assert short[0]["entropy"] == pytest.approx(float(lens.entropy[0].mean()), abs=1e-6)
    assert 0 < short[0]["entropy"] < math.log(V + 2)


def given() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(V, (3, 13), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("tuned", [False, True])
def test_a_window_left_early_is_a_text_read_token_by_token(opinionated: GPT, reader: TunedLens, tuned: bool) -> None:
    tokens, targets = given()
    confidence, own = 0.35, reader if tuned else None
    found = leave(opinionated, tokens, targets, confidence, reader=own, vocab_size=V)
    for row in range(len(tokens)):
        decoder = Decoder(Weights(opinionated))
        for t in range(tokens.shape[1]):
            number, logits = 0, torch.zeros(V)
            for number, h in enumerate(decoder.states(tokens[row, t].view(1, 1)), 1):
                logits = decoder.read(own(number, h) if own else h)[0, :V]
                if number < 3 and logits.softmax(0).max() >= confidence:
                    decoder.skip(number, h)
                    break
            assert (int(found.block[row, t]), int(found.best[row, t])) == (number, int(logits.argmax()))
            loss = -float(logits.log_softmax(0)[targets[row, t]])
            assert float(found.loss[row, t]) == pytest.approx(loss, abs=1e-4)
    assert set(found.block.flatten().tolist()) == {1, 2, 3}


@torch.no_grad()
def test_the_curve_ends_in_the_full_model(opinionated: GPT) -> None:
    tokens, targets = given()
    points = list(
        curve(opinionated, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])], (1e-6, 0.35, 1.0), vocab_size=V)
    )
    logits = opinionated(tokens)[..., :V]
    full = points[-1]
    assert full.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.mT, targets)), abs=1e-5)
    assert (full.agreement, full.blocks, full.compute, full.exits) == (1, 1, 1, [0, 0, 1])
    first = points[0]  # every token leaves at the first block
    assert (first.blocks, first.exits) == (pytest.approx(1 / 3), [1, 0, 0])
    block, head, fill = 12 * 16 * 16, (V + 2) * 16, 2 * 16 * 16
    assert first.compute == pytest.approx((block + head + 2 * fill) / (3 * block + head))
    alone = opinionated.read(opinionated.blocks[0](opinionated.embed(tokens)))[..., :V]
    assert first.agreement == pytest.approx(float((alone.argmax(-1) == logits.argmax(-1)).double().mean()))
    assert sum(points[1].exits) == pytest.approx(1)
    assert 1 / 3 < points[1].blocks < 1
