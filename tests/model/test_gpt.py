"""GPT-2's shape, names, initial weights and arithmetic; its equality with transformers is test_huggingface.py's."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptlab.errors import ConfigError
from gptlab.model import GPT, GPTConfig

SMALL = GPTConfig(block_size=12, vocab_size=96, n_layer=3, n_head=2, n_embd=32)
SHARED = GPTConfig(block_size=12, vocab_size=96, n_layer=3, n_head=2, n_embd=32, share_blocks=True)

BLOCK = {  # of C channels, linear weights (out, in)
    "ln_1.weight": (1,), "ln_1.bias": (1,), "attn.c_attn.weight": (3, 1), "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1), "attn.c_proj.bias": (1,), "ln_2.weight": (1,), "ln_2.bias": (1,),
    "mlp.c_fc.weight": (4, 1), "mlp.c_fc.bias": (4,), "mlp.c_proj.weight": (1, 4), "mlp.c_proj.bias": (1,),
}  # fmt: skip


def tokens(B: int = 2, T: int = 12, V: int = 96) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def test_the_state_bears_nanogpts_names_and_shapes() -> None:
    C = SMALL.n_embd
    expected = {
        "transformer.wte.weight": (96, C),
        "transformer.wpe.weight": (12, C),
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (96, C),
    }
    for i in range(SMALL.n_layer):
        expected |= {f"transformer.h.{i}.{name}": tuple(C * n for n in shape) for name, shape in BLOCK.items()}
    assert {name: tuple(t.shape) for name, t in GPT(SMALL).state_dict().items()} == expected


@pytest.mark.parametrize("config", [SMALL, SHARED])
def test_head_and_embedding_are_one_tensor_counted_once(config: GPTConfig) -> None:
    model = GPT(config)
    assert model.lm_head.weight is model.wte.weight
    assert sum(p.numel() for p in model.parameters()) == config.parameters
    assert len(set(map(id, model.blocks))) == (1 if config.share_blocks else 3)
    assert len(model.hidden_states(tokens())) == 4


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    assert GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd).parameters == parameters


@pytest.mark.parametrize("config", [SMALL, SHARED])
def test_training_costs_three_counted_forward_passes(config: GPTConfig) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # plain products are counted
        GPT(config)(tokens())
    assert 3 * counter.get_total_flops() == config.flops_per_token * tokens().numel()


def test_initial_weights_are_gpt2s() -> None:
    config = GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=2, n_embd=64)
    for name, parameter in GPT(config, seed=3).named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif ".ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            n = parameter.numel()
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
            assert parameter.abs().max().item() < 6 * std, name


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = GPT(SMALL, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state), "building a model drew from the global generator"
    torch.manual_seed(2)
    again, other = GPT(SMALL, seed=7), GPT(SMALL, seed=8)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.dim() == 2:
            assert not torch.equal(a, c), name
    matrices = [p.flatten()[:100] for p in first.parameters() if p.dim() == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices), "two parameters share their draws"


def test_weights_of_one_name_do_not_depend_on_the_depth() -> None:
    deeper = GPT(GPTConfig(block_size=12, vocab_size=96, n_layer=5, n_head=2, n_embd=32))
    assert torch.equal(GPT(SMALL).blocks[1].mlp.c_fc.weight, deeper.blocks[1].mlp.c_fc.weight)


def test_no_position_sees_a_later_one() -> None:
    model, before = GPT(SMALL), tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 96
    changed = (model(before) - model(after)).abs().amax((0, 2))
    assert torch.equal(changed[:7], torch.zeros(7))
    assert (changed[7:] > 0).all()


def test_logits_are_the_reading_of_the_last_hidden_state() -> None:
    model = GPT(SMALL)
    states = model.hidden_states(tokens())
    assert torch.equal(model.read(states[-1]), model(tokens()))
    assert torch.equal(states[2], model.blocks[1](states[1]))


def test_input_longer_than_the_block_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most block_size 12 tokens at once, found 13"):
        GPT(SMALL)(tokens(T=13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1, found 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, found -1"),
        ({"n_embd": 100, "n_head": 3}, "n_embd 100 and n_head 3; try n_embd 99"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**change)


@pytest.mark.parametrize(
    ("rows", "padding", "tokens"),
    [(50304, None, 50257), (50304, 0, 50304), (50257, None, 50257), (50260, None, 50260), (256, None, 256), (8, 3, 5)],
)
def test_only_rows_known_to_pad_are_no_tokens(rows: int, padding: int | None, tokens: int) -> None:
    assert GPTConfig(vocab_size=rows, padding=padding).tokens == tokens
