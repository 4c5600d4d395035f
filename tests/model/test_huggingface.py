"""Equality with transformers' GPT2LMHeadModel on the same random weights, biases included, in both directions."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptlab.errors import CheckpointError
from gptlab.model import GPT, GPTConfig, from_huggingface, to_huggingface
from gptlab.model.huggingface import write_folder

SHAPES = [
    GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16),
    GPTConfig(block_size=33, vocab_size=101, n_layer=3, n_head=1, n_embd=24),
    GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=5, n_embd=40),
    GPTConfig(block_size=16, vocab_size=64, n_layer=4, n_head=4, n_embd=16, share_blocks=True),
]
PADDED = GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter drawn anew, so that no bias is 0 and no norm is 1."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln_" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2, generator=generator)
    return model


def tokens(config: GPTConfig, V: int | None = None) -> torch.Tensor:
    shape = (3, config.block_size)
    return torch.randint(V or config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def theirs(config: GPTConfig, **changes: object) -> GPT2LMHeadModel:
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    options = {"vocab_size": config.vocab_size, "n_positions": config.block_size, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**(sizes | options | changes))).eval()
    randomised(model)
    return model


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("config", SHAPES)
@torch.no_grad()
def test_an_exported_model_gives_the_same_logits(config: GPTConfig) -> None:
    model = randomised(GPT(config))
    logits = model(tokens(config))
    assert logits.std() > 0.5, "logits too small for 1e-5 to mean much"
    assert furthest(to_huggingface(model)(tokens(config)).logits, logits) < 1e-5


@pytest.mark.parametrize("config", [shape for shape in SHAPES if not shape.share_blocks])
@torch.no_grad()
def test_an_imported_model_gives_the_same_logits(config: GPTConfig) -> None:
    source = theirs(config)
    model = from_huggingface(source)
    assert model.config == config
    assert model.lm_head.weight is model.wte.weight
    assert furthest(model(tokens(config)), source(tokens(config)).logits) < 1e-5


@torch.no_grad()
def test_hidden_states_are_theirs_before_the_last_norm() -> None:
    config = SHAPES[1]
    model = randomised(GPT(config))
    found = to_huggingface(model)(tokens(config), output_hidden_states=True).hidden_states
    for ours, expected in zip(model.hidden_states(tokens(config))[:-1], found[:-1], strict=True):
        assert furthest(ours, expected) < 1e-5
    assert furthest(model.ln_f(model.hidden_states(tokens(config))[-1]), found[-1]) < 1e-5


@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[3]])
@torch.no_grad()
def test_a_folder_keeps_every_weight(config: GPTConfig, tmp_path: Path) -> None:
    model = randomised(GPT(config))
    to_huggingface(model).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")), "weights are written as safetensors, never pickled"
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert furthest(loaded(tokens(config)).logits, model(tokens(config))) < 1e-5
    assert (loaded.config.n_ctx, loaded.config.activation_function) == (config.block_size, "gelu_new")
    back = from_huggingface(tmp_path)
    for (name, weight), kept in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(weight, kept), name


@torch.no_grad()
def test_rows_that_pad_the_vocabulary_are_cut() -> None:
    model = randomised(GPT(PADDED))
    exported = to_huggingface(model)
    assert exported.config.vocab_size == 50257
    assert exported.config.eos_token_id == 50256
    assert exported.transformer.wte.weight.shape == (50257, 8)
    some = tokens(PADDED, 50257)
    assert furthest(exported(some).logits, model(some)[..., :50257]) < 1e-5


def test_an_exported_model_shares_no_memory() -> None:
    model = GPT(SHAPES[0])
    before = model(tokens(SHAPES[0]))
    with torch.no_grad():
        for parameter in to_huggingface(model).parameters():
            parameter.zero_()
    assert torch.equal(model(tokens(SHAPES[0])), before)


def test_an_imported_model_shares_no_memory() -> None:
    source = theirs(SHAPES[0])
    model = from_huggingface(source)
    before = model(tokens(SHAPES[0]))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens(SHAPES[0])), before)


@pytest.mark.parametrize(
    "changes",
    [{"activation_function": "relu"}, {"n_inner": 8}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_arithmetic_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        from_huggingface(theirs(SHAPES[0], **changes))


def test_a_folder_is_written_and_read_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(GPT(SHAPES[0]), tmp_path / "model", tokenizer=False)
    from_huggingface(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json, found none at .*nowhere"):
        from_huggingface(tmp_path / "nowhere")
