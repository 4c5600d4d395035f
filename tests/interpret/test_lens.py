"""The lens and early exit: against readings made one by one, and early exit against text written token by token."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gptlab.data.tokenizers import get_tokenizer
from gptlab.interpret.lens import as_json, curve, leave, look, summary
from gptlab.model.decoder import Decoder, Weights
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.signals.tuned_lens import TunedLens

V = 40


@pytest.fixture(scope="module")
def model() -> GPT:
    """Its vocabulary is padded by two rows, and its readings differ from block to block."""
    model = GPT(GPTConfig(block_size=12, vocab_size=V + 2, n_layer=3, n_head=2, n_embd=16), seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.25, generator=source))
        model.ln_f.weight.mul_(2.5)  # some readings are sure, some are not
    return model


@pytest.fixture(scope="module")
def reader(model: GPT) -> TunedLens:
    reader, source = TunedLens.untuned(model), torch.Generator().manual_seed(3)
    reader.weight.normal_(0, 0.2, generator=source)
    return reader


@pytest.mark.parametrize("tuned", [False, True])
@torch.no_grad()
def test_a_lens_holds_every_blocks_reading(model: GPT, reader: TunedLens, tuned: bool) -> None:
    tokens = [3, 1, 4, 1, 5, 9]
    lens = look(model, tokens, top=4, reader=reader if tuned else None, vocab_size=V)
    states = model.hidden_states(torch.tensor([tokens]))[1:]
    final = model.read(states[-1])[0, :, :V].argmax(1)
    for j, h in enumerate(states):
        for t in range(len(tokens)):
            p = model.read(reader(j + 1, h[0, t]) if tuned else h[0, t])[:V].double().softmax(0)
            assert lens.best[j, t].tolist() == p.topk(4).indices.tolist()
            assert lens.probability[j, t].tolist() == pytest.approx(p.topk(4).values.tolist(), abs=1e-6)
            assert float(lens.entropy[j, t]) == pytest.approx(-float((p * p.log()).sum()), abs=1e-5)
            assert bool(lens.agrees[j, t]) == bool(p.argmax() == final[t])
    assert lens.agrees[-1].all()
    assert not lens.agrees.all()


def test_a_lens_as_json_and_in_short(model: GPT) -> None:
    lens = look(model, [7, 10], top=2)
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
def test_a_window_left_early_is_a_text_read_token_by_token(model: GPT, reader: TunedLens, tuned: bool) -> None:
    tokens, targets = given()
    confidence, own = 0.35, reader if tuned else None
    found = leave(model, tokens, targets, confidence, reader=own, vocab_size=V)
    for row in range(len(tokens)):
        decoder = Decoder(Weights(model))
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
def test_the_curve_ends_in_the_full_model(model: GPT) -> None:
    tokens, targets = given()
    points = list(curve(model, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])], (1e-6, 0.35, 1.0), vocab_size=V))
    logits = model(tokens)[..., :V]
    full = points[-1]
    assert full.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.mT, targets)), abs=1e-5)
    assert (full.agreement, full.blocks, full.compute, full.exits) == (1, 1, 1, [0, 0, 1])
    first = points[0]  # every token leaves at the first block
    assert (first.blocks, first.exits) == (pytest.approx(1 / 3), [1, 0, 0])
    block, head, fill = 12 * 16 * 16, (V + 2) * 16, 2 * 16 * 16
    assert first.compute == pytest.approx((block + head + 2 * fill) / (3 * block + head))
    alone = model.read(model.blocks[0](model.embed(tokens)))[..., :V]
    assert first.agreement == pytest.approx(float((alone.argmax(-1) == logits.argmax(-1)).double().mean()))
    assert sum(points[1].exits) == pytest.approx(1)
    assert 1 / 3 < points[1].blocks < 1
