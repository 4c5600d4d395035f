"""GPT-2 to and from Hugging Face: the same logits, under transformers' names and layout.

transformers' linear layers are `Conv1D`: their weights are (in, out), ours (out, in). Its vocabulary is GPT-2's own
50,257 tokens, so rows that pad ours are cut on the way out. `share_blocks` is written out as L equal blocks.
Weights are read from safetensors; an old folder's pickled pytorch_model.bin too, as tensors alone (weights_only).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptlab.data.huggingface_tokenizer import write_tokenizer
from gptlab.errors import CheckpointError, DataError, UsageError, needs_package
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.nanogpt import load_pickled
from gptlab.model.weights import GPT2_VOCABULARY, checked_config
from gptlab.parsing import is_count, parse_json

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SIZES = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner",
    "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
"""Keys of config.json under both of their names."""
ARITHMETIC = (
    "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)  # fmt: skip
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise DataError(needs_package("a Hugging Face model", "transformers")) from None
    return transformers


@contextlib.contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars, which it draws into files too, and for a moment's work."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def to_huggingface(model: GPT) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` on the CPU that gives the same logits; `save_pretrained` makes its folder."""
    transformers = _transformers()
    config = model.config
    vocabulary = min(config.vocab_size, GPT2_VOCABULARY)
    small = vocabulary < GPT2_VOCABULARY  # a byte model: token 0 starts a document
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.block_size,
            n_ctx=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0 if small else GPT2_VOCABULARY - 1,
            eos_token_id=0 if small else GPT2_VOCABULARY - 1,
        )
    )
    ours = model.state_dict()
    weights = {}
    for name, target in theirs.state_dict().items():
        weight = ours[name]
        weight = weight.t() if name.endswith(TRANSPOSED) else weight[: target.shape[0]]
        weights[name] = weight.detach().to("cpu", torch.float32).contiguous()
    theirs.load_state_dict(weights)
    return theirs.eval()


def write_folder(model: GPT, out: Path, *, tokenizer: bool) -> None:
    """Write a folder that `transformers` loads, with GPT-2's tokenizer if asked for, whole or not at all.

    Raises UsageError where there is something at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder to write to, found {out} in use; give another one")
    building = out.with_name(f".{out.name}.writing")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with _quietly(_transformers()):
            to_huggingface(model).save_pretrained(building)
        if tokenizer:
            write_tokenizer(building, model.config.block_size)
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def from_huggingface(path_or_model: str | Path | GPT2LMHeadModel) -> GPT:
    """A `GPT` with the weights of a GPT-2 folder or of a loaded `GPT2LMHeadModel`.

    Raises CheckpointError where the folder is missing or is not a GPT-2 that this model can be equal to.
    """
    transformers = _transformers()
    theirs = path_or_model
    if isinstance(theirs, str | Path):
        folder = Path(theirs)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"expected a Hugging Face folder with config.json, found none at {folder}")
        theirs = _load(transformers, folder)
    _check(theirs.config)
    model = GPT(
        GPTConfig(
            block_size=theirs.config.n_positions,
            vocab_size=theirs.config.vocab_size,
            n_layer=theirs.config.n_layer,
            n_head=theirs.config.n_head,
            n_embd=theirs.config.n_embd,
        )
    )
    source = theirs.state_dict()
    weights = {
        name: (source[name].t() if name.endswith(TRANSPOSED) else source[name]).detach().to("cpu", torch.float32)
        for name in model.state_dict()
    }
    model.load_state_dict(weights)
    return model


def _load(transformers: Any, folder: Path) -> GPT2LMHeadModel:
    """transformers' model of a folder, with all its weights: a missing one would be drawn at random without a word."""
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    files = sorted(folder.glob("model*.safetensors")) or pickled
    kind = "pickled tensors" if files and files == pickled else "safetensors"
    try:
        config = _config(transformers, folder)
        _check(config)
        if files:
            room = sum(file.stat().st_size for file in files)
            checked_config({**vars(config), "block_size": config.n_positions}, room, folder)
        if files == pickled:
            for file in files:
                load_pickled(file)  # refuses code, and an archive that would grow, before transformers looks at it
        with _quietly(transformers):
            model, found = transformers.GPT2LMHeadModel.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=kind == "safetensors", weights_only=True,
                dtype=torch.float32, output_loading_info=True, trust_remote_code=False, attn_implementation="eager",
            )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # transformers, its hub client, pickle and safetensors have no common kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder} cannot be read as a GPT-2 in {kind}: {reason}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{folder} lacks weights of a GPT-2: {missing[0]} and {len(missing) - 1} more")
    return model


def _config(transformers: Any, folder: Path) -> Any:
    """transformers' config with what a GPT-2's config.json says of its arithmetic, and with nothing else of it.

    Other keys may name code to fetch and run: auto_map, attn_implementation, quantization_config.
    """
    content = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("model_type") != "gpt2":
        found = content.get("model_type") if isinstance(content, dict) else content
        raise CheckpointError(f"expected a GPT-2 with model_type 'gpt2', found {found!r:.60}; it cannot be imported")
    for key in SIZES:
        if key in content and not (is_count(content[key]) or (key == "n_inner" and content[key] is None)):
            raise CheckpointError(
                f"{folder / 'config.json'}: expected a whole number for {key}, found {content[key]!r:.60}"
            )
    known = {key: content[key] for key in (*SIZES, *ARITHMETIC) if key in content}
    # transformers' own defaults are GPT-2's last token, of which it warns where a vocabulary has fewer.
    return transformers.GPT2Config(**known, bos_token_id=None, eos_token_id=None)


def _check(config: Any) -> None:
    """Refuse a Hugging Face GPT-2 whose arithmetic differs from GPT-2's own."""
    if (found := getattr(config, "model_type", None)) != "gpt2":
        raise CheckpointError(f"expected a GPT-2 with model_type 'gpt2', found {found!r}; it cannot be imported")
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "tie_word_embeddings": (True, True),
        "layer_norm_epsilon": (1e-5, 1e-05),
    }
    for key, allowed in expected.items():
        found = getattr(config, key, None)
        if found not in allowed:
            raise CheckpointError(f"expected a GPT-2 with {key} {allowed[0]!r}, found {found!r}; it cannot be imported")
