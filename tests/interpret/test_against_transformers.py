"""Greedy text against transformers' `generate` on the same weights, in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptlab.interpret.generate import Sampling, generate
from gptlab.model.huggingface import from_huggingface


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
