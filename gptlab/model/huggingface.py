"""GPT-2 to and from Hugging Face: the same logits, under transformers' names and layout.

Its linear layers are `Conv1D`: their weights are (in, out), ours (out, in). Rows known to pad our vocabulary are cut on
the way out, and `share_blocks` is written out as L equal blocks. A folder is read by its files alone: config.json, of
which everything that would change the arithmetic is refused unless the model computes it, and safetensors, or an old
folder's pickled pytorch_model.bin as tensors alone. transformers itself is needed for its model objects only.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import CheckpointError, DataError, UsageError, needs_package, shown
from gptlab.files import is_count, open_regular, read_json, write_json, write_whole
from gptlab.model.gpt import GPT
from gptlab.model.weights import CONV1D, HEAD, checked_config, load_pickled, named, shapes, with_weights

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SIZES = {
    "vocab_size": ("vocab_size", 50257), "n_positions": ("max_position_embeddings", 1024),
    "n_embd": ("hidden_size", 768), "n_layer": ("num_hidden_layers", 12), "n_head": ("num_attention_heads", 12),
}  # fmt: skip
"""Keys of config.json with their other names and transformers' defaults."""
GELU = {
    "gelu_new": False, "gelu_pytorch_tanh": False, "gelu_python_tanh": False, "gelu_fast": False,
    "gelu_accurate": False, "gelu": True, "gelu_python": True,
}  # fmt: skip
"""Activation functions and whether they are exact: the others are tanh forms that agree to rounding."""
ARITHMETIC = {
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({}, []),
}  # fmt: skip
"""What our model computes, by key of config.json; null is the default. reorder_and_upcast_attn changes no sum in fp32,
and dropout none when a model is read."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_FILE = re.compile(r"\w[\w.-]*\.(?:safetensors|bin)")


def to_huggingface(model: GPT) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` on the CPU that gives the same logits; `save_pretrained` makes its folder.

    >>> from gptlab.model import GPT, GPTConfig
    >>> model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=4))
    >>> tokens = torch.arange(8).view(1, 8)
    >>> torch.allclose(to_huggingface(model)(tokens).logits, model(tokens), atol=1e-6)
    True
    """
    try:
        import transformers
    except ImportError:
        raise DataError(needs_package("a Hugging Face model", "transformers")) from None
    gpt2 = get_tokenizer("gpt2")
    end = gpt2.document_start if model.config.tokens == gpt2.vocab_size else None
    content = config_of(model, {"bos_token_id": end, "eos_token_id": end})
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**content))
    weights = weights_of(model)
    theirs.load_state_dict({**weights, HEAD: weights["transformer.wte.weight"]})
    return theirs.eval()


def config_of(model: GPT, special: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a model; special: its SPECIAL tokens."""
    c = model.config
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.tokens,
        "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
        "n_head": c.n_head, "n_inner": None, "activation_function": "gelu" if c.exact_gelu else "gelu_new",
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "tie_word_embeddings": True, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dtype": "float32",
        **{key: special.get(key) for key in SPECIAL},
    }  # fmt: skip


def weights_of(model: GPT) -> dict[str, Tensor]:
    """A model's weights as transformers stores them, in float32 on the CPU; the head is the token table."""
    ours, found = model.state_dict(), {}
    for name, shape in shapes(model.config).items():
        weight = ours[name].t() if name.endswith(CONV1D) else ours[name][: shape[0]]
        weight = weight[: model.config.tokens] if name == "transformer.wte.weight" else weight
        found[name] = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
    return found


def write_folder(model: GPT, out: Path, files: Mapping[str, bytes], special: Mapping[str, Any]) -> None:
    """Write a folder that `transformers` loads, whole or not at all.

    files: what else goes into it, by name; special: the SPECIAL tokens' numbers. Raises UsageError where there is
    something at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder to write to, found {out} in use; give another one")
    with _new_folder(out) as building:
        write_json(building / CONFIG, config_of(model, special))
        save_file(weights_of(model), building / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            write_whole(building / name, content)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends, or goes if it raises."""
    building = out.with_name(f".{out.name[:200]}.{secrets.token_hex(8)}.tmp")
    building.mkdir(parents=True)
    try:
        yield building
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def from_huggingface(path_or_model: str | Path | GPT2LMHeadModel) -> GPT:
    """A `GPT` with the weights of a GPT-2 folder or of a loaded `GPT2LMHeadModel`.

    Raises CheckpointError where the folder is missing or is not a GPT-2 that this model can be equal to.

    >>> from gptlab.model import GPT, GPTConfig
    >>> theirs = to_huggingface(GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=4)))
    >>> from_huggingface(theirs).config.n_embd  # or the folder of theirs.save_pretrained(folder)
    4
    """
    if isinstance(path_or_model, str | Path):
        folder = Path(path_or_model)
        content, files = read_config(folder), _weight_files(folder)
        room = sum(file.stat().st_size for file in files)
        return _built(content, room, folder, lambda: _read(files, folder))
    theirs = path_or_model
    weights = {name: weight.cpu() for name, weight in theirs.state_dict().items()}
    return _built(theirs.config.to_dict(), 2**62, type(theirs).__name__, lambda: weights)


def _built(content: Mapping[str, Any], room: int, source: object, read: Callable[[], dict[str, Any]]) -> GPT:
    """The model of a config and of weights that `read` gives, once the config has been found to fit the room."""
    sizes = _checked(content, source)
    config = checked_config({**sizes, "block_size": sizes["n_positions"]}, room, source, padding=0,
                            exact_gelu=GELU[content.get("activation_function") or "gelu_new"])  # fmt: skip
    weights = named(read(), source)
    if content.get("tie_word_embeddings") is False and HEAD not in weights:
        raise CheckpointError(f"{source}: tie_word_embeddings is false and there is no {HEAD}; it cannot be imported")
    return with_weights(config, weights, source, conv1d=True)


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is of transformers (a run's own config.json has no model_type), or of peft."""
    try:
        return (folder / ADAPTER).is_file() or "model_type" in read_json(folder / CONFIG)
    except (OSError, DataError, TypeError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json of a GPT-2's folder says; raises CheckpointError where there is none."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA: {ADAPTER}), which changes a model and is none itself; merge it into its "
            "base (peft: merge_and_unload, then save_pretrained) and give that folder"
        )
    try:
        content = read_json(folder / CONFIG, error=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"expected a Hugging Face folder with config.json, found none at {folder}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / CONFIG}: expected an object, found {shown(content)}")
    return content


def _checked(content: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The sizes that a config states; raises CheckpointError for an arithmetic other than our model's."""
    if (kind := content.get("model_type")) != "gpt2":
        raise CheckpointError(f"expected a GPT-2 with model_type 'gpt2', found {shown(kind)}; it cannot be imported")
    if content.get("quantization_config"):
        raise CheckpointError(
            f"{source} is quantised (quantization_config), which is not read; dequantise it (transformers: "
            "model.dequantize(), then save_pretrained) and give that folder"
        )
    sizes = {}
    for key, (other, default) in SIZES.items():
        stated = [content[name] for name in (key, other) if name in content]
        if any(not is_count(value) or value != stated[0] for value in stated):
            found = " and ".join(map(shown, stated))
            raise CheckpointError(f"{source}: expected a whole number for {key}, found {found}")
        sizes[key] = stated[0] if stated else default
    expected: dict[str, tuple[object, ...]] = {
        **ARITHMETIC, "activation_function": tuple(GELU), "n_inner": (4 * sizes["n_embd"],),
    }  # fmt: skip
    for key, allowed in expected.items():
        found = content.get(key)
        if found is not None and found not in allowed:
            raise CheckpointError(
                f"{source}: expected a GPT-2 with {key} {' or '.join(map(repr, allowed))}, found {shown(found)}; "
                "gptlab computes no other"
            )
    return sizes


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or those that its index lists, all of them in the folder."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / kind).is_file():
            return [folder / kind]
        if (index := folder / f"{kind}.index.json").is_file():
            return [folder / name for name in _listed(index)]
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".h5", ".msgpack", ".bin", ".safetensors"))
    raise CheckpointError(
        f"{folder}: expected model.safetensors or pytorch_model.bin, or an index of their parts, found "
        f"{shown(', '.join(found), 200) if found else 'no weights'}; save the model with transformers' save_pretrained"
    )


def _listed(index: Path) -> list[str]:
    content = read_json(index, error=CheckpointError)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: expected a file for every weight under weight_map, found {shown(names)}")
    for name in names.values():
        if not isinstance(name, str) or not _FILE.fullmatch(name) or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: expected names of weight files in its own folder, found {shown(name)}")
    return sorted(set(names.values()))


def _read(files: list[Path], folder: Path) -> dict[str, Any]:
    """The weights of all files; raises CheckpointError for one that is damaged or that two files hold."""
    found: dict[str, Any] = {}
    for path in files:
        open_regular(path, error=CheckpointError).close()
        try:
            weights = load_pickled(path) if path.suffix == ".bin" else load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}; copy it again") from None
        if twice := sorted(map(str, found.keys() & weights.keys())):
            raise CheckpointError(f"{folder}: expected {twice[0]} in one file, found it in {path.name} and another")
        found |= weights
    return found
