"""Other programs' models: read from files in their own formats, equal in logits; hostile and damaged ones refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gptlab.errors import CheckpointError
from gptlab.model.formats import open_foreign, read_llmc, write_llmc
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, to_huggingface
from gptlab.model.weights import shapes

SIZES = {"block_size": 8, "vocab_size": 65, "n_layer": 3, "n_head": 2, "n_embd": 12}
TOKENS = torch.randint(65, (3, 8), generator=torch.Generator().manual_seed(5))


def drawn() -> GPT:
    """A model with every parameter drawn, so that no bias is 0, no norm is 1 and no two weights can be mistaken."""
    model, generator = GPT(GPTConfig(**SIZES)), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln_" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2, generator=generator)
    return model


MODEL = drawn()
WEIGHTS: dict[str, Tensor] = {name: p.detach() for name, p in MODEL.named_parameters()}


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def test_shapes_are_those_of_the_model() -> None:
    assert list(shapes(MODEL.config).items()) == [(name, tuple(p.shape)) for name, p in MODEL.named_parameters()]


def exact() -> GPT:
    """The same weights in a model with exact GELU, which nanoGPT computes."""
    model = GPT(replace(MODEL.config, exact_gelu=True))
    model.load_state_dict(MODEL.state_dict())
    return model


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module._orig_mod."]
)
def test_nanogpts_checkpoint_is_read(prefix: str, tmp_path: Path) -> None:
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}  # as without flash attention
    write_nanogpt_file(tmp_path / "ckpt.pt", {**WEIGHTS, **mask}, {**SIZES, "bias": True}, prefix)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        found = open_foreign(source)
        assert (found.format, found.file) == ("nanoGPT", tmp_path / "ckpt.pt")
        assert torch.equal(logits(found.model), logits(exact()))
        assert not torch.equal(logits(found.model), logits(MODEL))


def test_nanogpts_model_without_biases_has_none(tmp_path: Path) -> None:
    weights = {name: weight for name, weight in WEIGHTS.items() if not name.endswith("bias")}
    write_nanogpt_file(tmp_path / "ckpt.pt", weights, {**SIZES, "bias": False})
    model = open_foreign(tmp_path).model
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert torch.equal(model.wte.weight, MODEL.wte.weight)
    write_nanogpt_file(tmp_path / "ckpt.pt", weights, {**SIZES, "bias": True})
    with pytest.raises(CheckpointError, match=r"expected transformer.h.0.ln_1.bias \(12,\), found no such weight"):
        open_foreign(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_build_nanogpts_checkpoint_is_read_without_its_script(legacy: bool, tmp_path: Path) -> None:
    write_build_nanogpt_file(tmp_path / "model_19072.pt", WEIGHTS, SIZES, legacy)
    found = open_foreign(tmp_path / "model_19072.pt")
    assert found.format == "build-nanogpt"
    assert torch.equal(logits(found.model), logits(MODEL))


def test_build_nanogpts_log_folder_is_read_by_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 val 10.9\n")
    for step, scale in ((5000, 1.0), (19072, 0.5), (10000, 2.0)):
        weights = {name: weight * scale for name, weight in WEIGHTS.items()}
        write_build_nanogpt_file(tmp_path / f"model_{step:05d}.pt", weights, SIZES, legacy=False)
    found = open_foreign(tmp_path)
    assert (found.format, found.file) == ("build-nanogpt", tmp_path / "model_19072.pt")
    assert torch.equal(found.model.wte.weight, MODEL.wte.weight * 0.5)


def test_wrappers_within_a_name_are_taken_out_and_two_of_a_name_refused(tmp_path: Path) -> None:
    inner = {name.replace(".h.1.", ".h.1._orig_mod."): weight for name, weight in WEIGHTS.items()}
    write_build_nanogpt_file(tmp_path / "x.pt", inner, SIZES, legacy=False)
    assert torch.equal(logits(open_foreign(tmp_path / "x.pt").model), logits(MODEL))
    write_build_nanogpt_file(tmp_path / "x.pt", {**WEIGHTS, **inner}, SIZES, legacy=False)
    with pytest.raises(CheckpointError, match=r"expected transformer.h.1.ln_1.weight once, found it twice"):
        open_foreign(tmp_path / "x.pt")


@pytest.mark.parametrize("rows", [100, 257, 50257, 50260, 50304, 52000])
@pytest.mark.parametrize("kind", ["nanoGPT", "characters", "build-nanogpt", "llm.c", "llm.c, padded"])
def test_only_rows_known_to_pad_a_vocabulary_are_no_tokens(kind: str, rows: int, tmp_path: Path) -> None:
    """nanoGPT and build-nanogpt pad GPT-2's tokens to 50,304; llm.c says itself how many are tokens."""
    sizes = {"block_size": 4, "vocab_size": rows, "n_layer": 1, "n_head": 1, "n_embd": 4}
    weights = {name: p.detach() for name, p in GPT(GPTConfig(**sizes), seed=3).named_parameters()}
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    if kind.startswith("llm.c"):
        write_llmc_file(path, weights, sizes, 3, -(-rows // 128) * 128 if "padded" in kind else rows)
    elif kind == "build-nanogpt":
        write_build_nanogpt_file(path, weights, sizes, legacy=False)
    else:
        write_nanogpt_file(path, weights, sizes)
        if kind == "characters":  # nanoGPT's data/openwebtext/meta.pkl; what is in it is never read
            meta = tmp_path / "data" / "openwebtext" / "meta.pkl"
            meta.parent.mkdir(parents=True)
            meta.write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    found = open_foreign(path)
    pads = 47 if rows == 50304 and kind in ("nanoGPT", "build-nanogpt") else 0
    assert found.model.config.tokens == rows - pads
    assert found.gpt2 == (found.model.config.tokens == 50257 and kind != "characters")
    assert torch.equal(found.model.wte.weight, weights["transformer.wte.weight"])
    write_llmc(tanh := GPT(replace(found.model.config, exact_gelu=False)), tmp_path / "back.bin")
    back = read_llmc(tmp_path / "back.bin")
    assert back.config.tokens == back.config.vocab_size == rows - pads
    assert torch.equal(back.wte.weight, tanh.wte.weight[: rows - pads])
    assert not (tmp_path / "made").exists()


def test_llmc_is_given_no_model_that_it_computes_otherwise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"llm\.c computes GELU in its tanh form"):
        write_llmc(exact(), tmp_path / "m.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.bin", "ckpt.pt", "model_5.pt"])
def test_a_pipe_or_device_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="expected a regular file, found a pipe"):
        open_foreign(tmp_path / name)


@pytest.mark.parametrize(("version", "rows"), [(3, 128), (3, 65), (5, 128)])
def test_llmcs_model_is_read(version: int, rows: int, tmp_path: Path) -> None:
    rounded = {n: (w.view(torch.int32) >> 16 << 16).view(torch.float32) for n, w in WEIGHTS.items()}
    kept = WEIGHTS if version == 3 else rounded
    write_llmc_file(tmp_path / "m.bin", WEIGHTS, SIZES, version, rows)
    found = open_foreign(tmp_path / "m.bin")
    assert found.format == "llm.c"
    assert found.model.config == MODEL.config
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, kept[name]), name


def test_what_is_written_for_llmc_is_what_its_layout_says(tmp_path: Path) -> None:
    write_llmc(MODEL, tmp_path / "ours.bin")
    write_llmc_file(tmp_path / "theirs.bin", WEIGHTS, SIZES, 3, 128)
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    write_llmc(MODEL, tmp_path / "half.bin", torch.bfloat16)
    assert (tmp_path / "half.bin").stat().st_size == 1024 + ((tmp_path / "ours.bin").stat().st_size - 1024) // 2
    for name, parameter in read_llmc(tmp_path / "half.bin").named_parameters():
        assert torch.equal(parameter, WEIGHTS[name].bfloat16().float()), name


def test_shared_blocks_are_written_out_and_padding_is_cut(tmp_path: Path) -> None:
    shared = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=3, n_head=1, n_embd=4, share_blocks=True))
    write_llmc(shared, tmp_path / "m.bin")
    header = struct.unpack("<8i", (tmp_path / "m.bin").read_bytes()[:32])
    assert header == (20240326, 3, 8, 50257, 3, 1, 4, 50304)
    with torch.no_grad():
        torch.testing.assert_close(read_llmc(tmp_path / "m.bin")(TOKENS), shared(TOKENS)[..., :50257], atol=0, rtol=0)


@pytest.mark.parametrize("bare", [False, True])
def test_an_old_hugging_face_folder_with_a_pickle_is_read(bare: bool, tmp_path: Path) -> None:
    theirs = to_huggingface(MODEL)
    theirs.config.save_pretrained(tmp_path)
    weights = dict(theirs.state_dict())
    weights = (
        {name.removeprefix("transformer."): w for name, w in weights.items()} if bare else weights
    )  # as on the hub
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not bare)
    found = open_foreign(tmp_path)
    assert found.format == "Hugging Face"
    torch.testing.assert_close(logits(found.model), logits(MODEL), atol=0, rtol=0)


class Payload:
    """What an attacker would pickle: reading it makes a file, if reading runs anything."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.made}",)


@pytest.mark.parametrize("place", ["model", "config", "step", "pytorch_model.bin", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(place: str, tmp_path: Path) -> None:
    made, source = tmp_path / "made", tmp_path / "model.pt"
    payload = Payload(made)
    if place == "pytorch_model.bin":
        source = tmp_path / "folder"
        to_huggingface(MODEL).config.save_pretrained(source)
        weights = {**to_huggingface(MODEL).state_dict(), "payload": payload}
        torch.save(weights, source / "pytorch_model.bin")
    elif place == "plain pickle":
        source.write_bytes(pickle.dumps(payload, 2))
    else:
        content: dict[str, Any] = {"model": dict(WEIGHTS), "config": dict(SIZES), "step": 1}
        if place == "model":
            content["model"]["transformer.wte.weight"] = payload
        else:
            content["step" if place == "legacy" else place] = payload
        torch.save(content, source, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint of torch.save: it needs \w+\.system"):
        open_foreign(source)
    assert not made.exists()
    if place == "step":  # the payload is a real one
        torch.load(source, weights_only=False)
        assert made.exists()


def header(path: Path, index: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * index, value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "expected 30,256 bytes, found 30,255"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "expected 30,256 bytes, found 30,257"),
        (lambda p: p.write_bytes(p.read_bytes()[:900]), "expected the header of an llm.c model"),
        (lambda p: header(p, 1, 1), "expected version 3 .* found 1"),
        (lambda p: header(p, 6, 2**20), "expected at least .* bytes for .*n_embd 1048576"),
        (lambda p: header(p, 6, -12), "n_embd must be at least 1, found -12"),
        (lambda p: header(p, 4, 9_999), "expected at least .* bytes"),
        (lambda p: header(p, 4, 2**31 - 1), "n_layer must be at most 10000, found 2147483647"),
        (lambda p: header(p, 5, 5), "n_embd must be a multiple of n_head"),
        (lambda p: header(p, 7, 12), "expected at least 65 rows in the token table, found 12"),
        (lambda p: header(p, 7, 2**31 - 1), "expected .* bytes, found 30,256"),
        (lambda p: header(p, 0, 20240520), "holds tokens, not a model"),
        (lambda p: p.write_bytes(b"hello"), "found none of them"),
        (lambda p: p.write_bytes(b""), "found none of them"),
        (lambda p: p.unlink(), "found nothing at"),
    ],
)
def test_a_damaged_llmc_file_is_one_line(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    write_llmc_file(path, WEIGHTS, SIZES, 3, 128)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as refused:
        open_foreign(path)
    assert "\n" not in str(refused.value)


def nanogpt(**changes: Any) -> dict[str, Any]:
    weights = dict(WEIGHTS)
    sizes: dict[str, Any] = dict(SIZES)
    for key, value in changes.items():
        (sizes if key in SIZES else weights)[key.replace("__", ".")] = value
    return {"model": weights, "model_args": sizes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nanogpt(n_embd=2**20), "expected at least .* bytes for .*n_embd 1048576"),
        (nanogpt(n_embd="12"), "expected a whole number for n_embd, found '12'"),
        (nanogpt(n_layer=True), "expected a whole number for n_layer"),
        (nanogpt(n_layer=2), "expected the weights of a GPT-2, found 'transformer.h.2.ln_1.weight'"),
        (nanogpt(transformer__wte__weight=torch.zeros(1).expand(65, 13)), r"transformer.wte.weight .* found torch.fl"),
        (nanogpt(transformer__wte__weight=torch.zeros(65, 12, dtype=torch.int64)), "found torch.int64"),
        (nanogpt(transformer__wte__weight=[1.0]), "as floating-point numbers .* found list"),
        (nanogpt(lm_head__weight=torch.zeros(65, 12)), "to be tied to transformer.wte.weight"),
        (nanogpt(extra=torch.zeros(2)), "found 'extra' among them"),
        ({"weights": 1}, "expected a checkpoint of nanoGPT .* found weights"),
        ({"model": 3, "model_args": {}}, "expected a checkpoint of nanoGPT"),
        ([1, 2], "expected a dict in the checkpoint, found list"),
    ],
)
def test_a_checkpoint_that_is_no_gpt2_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as refused:
        open_foreign(tmp_path / "x.pt")
    assert "\n" not in str(refused.value)


def test_a_checkpoint_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    for legacy in (False, True):
        write_build_nanogpt_file(tmp_path / "whole.pt", WEIGHTS, SIZES, legacy)
        whole = (tmp_path / "whole.pt").read_bytes()
        for length in (3, 10, 500, len(whole) // 2, len(whole) - 5):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            with pytest.raises(CheckpointError):
                open_foreign(tmp_path / "cut.pt")


def test_a_bit_that_turned_over_raises_nothing_else(tmp_path: Path) -> None:
    write_build_nanogpt_file(tmp_path / "whole.pt", WEIGHTS, SIZES, legacy=False)
    whole = bytearray((tmp_path / "whole.pt").read_bytes())
    for position in range(0, len(whole), len(whole) // 60):
        whole[position] ^= 0xFF
        (tmp_path / "turned.pt").write_bytes(whole)
        with contextlib.suppress(CheckpointError):  # a weight's bit may turn over unseen: the format has no checksums
            open_foreign(tmp_path / "turned.pt")
        whole[position] ^= 0xFF


def test_an_archive_that_would_grow_is_refused_unread(tmp_path: Path) -> None:
    torch.save(nanogpt(), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for member in stored.infolist():
            bomb.writestr(member.filename, stored.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="found a compressed archive; it is not read"):
        open_foreign(tmp_path / "bomb.pt")


def test_sizes_of_a_hugging_face_folder_are_checked_before_there_is_a_model(tmp_path: Path) -> None:
    to_huggingface(MODEL).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"n_embd": 12', '"n_embd": 1048576'))
    with pytest.raises(CheckpointError, match=r"expected at least .* bytes for .*n_embd 1048576"):
        from_huggingface(tmp_path)


def test_an_empty_state_is_no_model(tmp_path: Path) -> None:
    torch.save({"model": OrderedDict(), "model_args": dict(SIZES, n_embd=2, n_head=1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"found no such weight|expected at least"):
        open_foreign(tmp_path / "x.pt")


KINDS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def write_llmc_file(
    path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, int], version: int, rows: int
) -> None:
    """llm.c's: 256 int32, then the weights, float32 in version 3 and bfloat16 (the upper half of float32) in 5."""
    values = [20240326, version, *(sizes[k] for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")), rows]
    L, C = sizes["n_layer"], sizes["n_embd"]
    table = torch.zeros(rows, C)
    table[: sizes["vocab_size"]] = weights["transformer.wte.weight"]
    names = [f"transformer.h.{i}.{kind}" for kind in KINDS for i in range(L)]
    parts = [table, weights["transformer.wpe.weight"], *(weights[n] for n in names)]
    parts += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *values, *[0] * (256 - len(values))))
        for part in parts:
            numbers = part.flatten().tolist()
            if version == 3:
                file.write(struct.pack(f"<{len(numbers)}f", *numbers))
            else:
                bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *numbers))
                file.write(struct.pack(f"<{len(bits)}H", *(b >> 16 for b in bits)))


def write_nanogpt_file(path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, Any], prefix: str = "") -> None:
    """nanoGPT's ckpt.pt: the weights, maybe with torch.compile's prefix, the optimizer's state and plain values."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    named = {f"{prefix}{name}": weight for name, weight in weights.items()}
    named[f"{prefix}lm_head.weight"] = weights["transformer.wte.weight"]
    content = {
        "model": named, "optimizer": optimizer.state_dict(), "model_args": {**sizes, "dropout": 0.0}, "iter_num": 5,
        "best_val_loss": torch.tensor(3.5),
        "config": {"out_dir": "out", "dataset": "openwebtext", "learning_rate": 6e-4},
    }  # fmt: skip
    torch.save(content, path)


def write_build_nanogpt_file(path: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, int], legacy: bool) -> None:
    """build-nanogpt's log/model_*.pt: its config is pickled as an instance of the script's own dataclass."""
    fields = [(name, int, value) for name, value in sizes.items()]
    script = ModuleType("train_gpt2")
    config = make_dataclass("GPTConfig", fields)
    config.__module__ = script.__name__
    script.GPTConfig = config  # type: ignore[attr-defined]
    named = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    content = {"model": named, "config": config(), "step": 19072, "val_loss": 3.07}
    before = sys.modules.get("train_gpt2")
    sys.modules["train_gpt2"] = script
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["train_gpt2"]
        if before:
            sys.modules["train_gpt2"] = before
