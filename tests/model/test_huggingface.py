"""Equality with transformers' GPT2LMHeadModel on the same random weights, biases included, in both directions."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

from gptlab.errors import CheckpointError
from gptlab.model import GPT, GPTConfig, from_huggingface, to_huggingface
from gptlab.model.formats import open_foreign
from gptlab.model.huggingface import ARITHMETIC, GELU, SIZES, SPECIAL, write_folder
from gptlab.runs.init_weights import any_model

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


ACCEPTED: list[dict[str, object]] = [
    *({"activation_function": name} for name in GELU),
    {"n_inner": 96},
    {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    {"initializer_range": 1.0, "summary_type": "last", "use_cache": False},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
@pytest.mark.parametrize("how", ["model", "folder", "shards", "bin", "float16", "bfloat16"])
@torch.no_grad()
def test_every_accepted_config_gives_transformers_logits(changes: dict[str, object], how: str, tmp_path: Path) -> None:
    config = SHAPES[1]
    source = theirs(config, **changes)
    source.lm_head.weight.copy_(source.transformer.wte.weight)  # a head of its own, equal to the table
    if how in ("float16", "bfloat16"):
        source = source.to(getattr(torch, how))
    if how != "model":
        source.save_pretrained(tmp_path, max_shard_size="9KB" if how == "shards" else "1GB")
    if how == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    assert how != "shards" or len(list(tmp_path.glob("*.safetensors"))) > 2
    model = from_huggingface(source if how == "model" else tmp_path)
    expected = source.float()(tokens(config)).logits
    assert expected.std() > 0.5, "logits too small for 1e-4 to mean much"
    assert furthest(model(tokens(config)), expected) < 1e-4
    assert furthest(to_huggingface(model)(tokens(config)).logits, expected) < 1e-4, "and back"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("activation_function", "quick_gelu"),
        ("activation_function", ["gelu"]),
        ("n_inner", 8),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-6),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [0]}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("model_type", "llama"),
        ("model_type", ["gpt2"]),
        ("n_head", "2"),
        ("n_layer", True),
        ("hidden_size", 32),
    ],
    ids=str,
)
def test_another_arithmetic_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    theirs(SHAPES[0]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    named = {"hidden_size": "n_embd"}.get(key, key)
    with pytest.raises(CheckpointError, match=named) as refused:
        from_huggingface(tmp_path)
    assert "\n" not in str(refused.value)


def test_every_field_of_their_config_is_accounted_for() -> None:
    """A field that comes with a later transformers is to be looked at: does it change the arithmetic?"""
    about_training = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache"}
    other_heads = {name for name in GPT2Config().to_dict() if name.startswith("summary_")}
    known = {*SIZES, *ARITHMETIC, *SPECIAL, "activation_function", "n_inner", "tie_word_embeddings"}
    known |= {"reorder_and_upcast_attn"}  # the same sums, in fp32
    own = set(GPT2Config().to_dict()) - set(PretrainedConfig().to_dict()) | {"tie_word_embeddings"}
    assert own - {"transformers_version"} <= known | about_training | other_heads


def as_folder(how: str, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """The weights in one of the ways in which a folder holds them."""
    theirs(SHAPES[0]).config.save_pretrained(folder)
    if how == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif how == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save = {"shards": save_file, "bin shards": torch.save}[how]
        name, suffix = ("model", "safetensors") if how == "shards" else ("pytorch_model", "bin")
        half, names = len(weights) // 2, sorted(weights)
        parts = {f"{name}-{n}-of-2.{suffix}": part for n, part in enumerate((names[:half], names[half:]), 1)}
        for file, part in parts.items():
            save({one: weights[one] for one in part}, folder / file)
        index = {"weight_map": {one: file for file, part in parts.items() for one in part}}
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index))


WAYS = ["safetensors", "shards", "bin", "bin shards"]


def stored(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """transformers' weights without the head, some of them others (`__` for a dot) or missing."""
    weights = {name: w.clone() for name, w in theirs(SHAPES[0]).state_dict().items() if name != "lm_head.weight"}
    for key, value in changes.items():
        weights.pop(key.replace("__", "."), None)
        if value is not None:
            weights[key.replace("__", ".")] = value
    return weights


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__h__0__attn__c_attn__weight": torch.zeros(48, 16)},
         r"transformer.h.0.attn.c_attn.weight as floating-point numbers \(16, 48\), found torch.float32 \(48, 16\)"),
        ({"transformer__wte__weight": torch.zeros(67, 16)},
         r"transformer.wte.weight as .* \(64, 16\), found torch.float32 \(67, 16\)"),
        ({"transformer__wpe__weight": torch.zeros(16, 16, dtype=torch.int8)}, r"found torch.int8 \(16, 16\)"),
        ({"transformer__h__1__ln_1__weight": None}, r"transformer.h.1.ln_1.weight \(16,\), found no such weight"),
        ({"score__weight": torch.zeros(2, 16)}, "found 'score.weight' among them"),
        ({"lm_head__weight": torch.full((64, 16), 0.1)}, "expected lm_head.weight to be tied to transformer.wte"),
        ({"lm_head__weight": torch.zeros(65, 16)}, r"lm_head.weight to be tied .* another matrix \(65, 16\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    how: str, changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    as_folder(how, stored(**changes), tmp_path)
    with pytest.raises(CheckpointError, match=message) as refused:
        from_huggingface(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_names_are_read_bare_or_wrapped(how: str, tmp_path: Path) -> None:
    weights = stored()
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")}
    expected = from_huggingface(theirs(SHAPES[0]))(tokens(SHAPES[0]))
    for number, prefix in enumerate(("", "module.", "_orig_mod.module.", "transformer.")):
        bare = prefix == "transformer."
        named = {f"{prefix}{n}" if not bare else n.removeprefix(prefix): w for n, w in (weights | masks).items()}
        folder = tmp_path / str(number)
        folder.mkdir()
        as_folder(how, named, folder)
        assert torch.equal(from_huggingface(folder)(tokens(SHAPES[0])), expected)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "in/x.safetensors", "x.py", ".x.bin", "no.bin", 5, ""]
)
def test_an_index_names_weight_files_of_its_own_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "in").mkdir(parents=True)
    as_folder("shards", stored(), folder)
    for path in (tmp_path / "x.safetensors", folder / "in" / "x.safetensors", folder / ".x.bin", folder / "x.py"):
        save_file({"transformer.wte.weight": torch.zeros(64, 16)}, path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="expected names of weight files in its own folder, found"):
        from_huggingface(folder)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, r"expected model.safetensors or pytorch_model.bin, .* found 'tf_model.h5'"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "merge it into its base"),
        (lambda f: (f / "config.json").write_text("[]"), "expected an object, found"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged: expected JSON"),
        (lambda f: (f / "config.json").unlink(), "expected a Hugging Face folder with config.json, found none"),
        (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read as safetensors"),
        (lambda f: pipe(f / "config.json"), "expected a regular file, found a pipe"),
        (lambda f: pipe(f / "model.safetensors"), "expected model.safetensors or"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    as_folder("safetensors", stored(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refused:
        from_huggingface(tmp_path)
    assert "\n" not in str(refused.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_an_adapter_alone_is_refused_wherever_a_model_is_expected(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    save_file({"base_model.model.x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    for read in (from_huggingface, open_foreign, any_model):
        with pytest.raises(CheckpointError, match=r"holds an adapter .* merge it into its base"):
            read(tmp_path)


@pytest.mark.parametrize("rows", [100, 257, 50257, 50260, 50304, 52000])
@torch.no_grad()
def test_a_vocabulary_goes_there_and_back_whole(rows: int, tmp_path: Path) -> None:
    """Of a Hugging Face model every row is a token; of ours 50,304 rows hold GPT-2's 50,257."""
    config = GPTConfig(block_size=8, vocab_size=rows, n_layer=1, n_head=1, n_embd=8)
    source = theirs(config)
    source.save_pretrained(tmp_path / "theirs")
    model = from_huggingface(tmp_path / "theirs")
    write_folder(model, tmp_path / "back", {}, {"eos_token_id": 3})
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    assert (back.config.vocab_size, back.config.eos_token_id, back.config.bos_token_id) == (rows, 3, None)
    assert torch.equal(back.transformer.wte.weight, source.transformer.wte.weight)
    assert torch.equal(to_huggingface(model).transformer.wte.weight, source.transformer.wte.weight)
    some = tokens(config)
    assert furthest(back(some).logits, source(some).logits) < 1e-5
    ours = to_huggingface(GPT(config))
    assert ours.config.vocab_size == (50257 if rows == 50304 else rows)


def test_a_folder_is_written_and_read_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(GPT(SHAPES[0]), tmp_path / "model", {}, {})
    from_huggingface(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json, found none at .*nowhere"):
        from_huggingface(tmp_path / "nowhere")
