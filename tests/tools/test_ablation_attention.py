"""What an ablation says of attention on the first token."""

from __future__ import annotations

import math

import pytest
import torch

from model import HaoAIConfig, SmartHaoAI
from tools.ablation.attention import FIRST_QUERY, first_token_attention

LENGTH = 48


def model(**fields: object) -> SmartHaoAI:
    shape = {"vocab_size": 61, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "max_position_embeddings": 64}
    return SmartHaoAI(HaoAIConfig(**{**shape, **fields}))


def rows() -> list[list[int]]:
    return torch.randint(61, (3, LENGTH)).tolist()


def test_queries_that_ask_nothing_look_everywhere_alike() -> None:
    """Guards: a mask that lets queries look ahead, early queries counted, heads or layers added up instead of averaged."""
    plain = model()
    with torch.no_grad():
        for block in plain.layers:
            block.self_attn.qkv_proj.weight.zero_()
    expected = sum(1 / (t + 1) for t in range(FIRST_QUERY, LENGTH)) / (LENGTH - FIRST_QUERY)
    mean, largest = first_token_attention(plain, rows())
    assert mean == pytest.approx(expected, rel=1e-5) and largest == pytest.approx(expected, rel=1e-5)


def test_against_the_attention_weights_of_transformers(tmp_path) -> None:
    """Guards: weights that are not those of the model: rotation, norms, scale, grouped heads."""
    transformers = pytest.importorskip("transformers")
    ours = model(initializer_range=0.3)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    texts = rows()
    by_head = []
    with torch.no_grad():
        for ids in texts:
            attentions = theirs(torch.tensor([ids]), output_attentions=True).attentions
            by_head.append(torch.stack([layer[0, :, FIRST_QUERY:, 0].mean(dim=1) for layer in attentions]))
    heads = torch.stack(by_head).mean(dim=0)
    mean, largest = first_token_attention(ours, texts)
    assert mean == pytest.approx(float(heads.mean()), rel=1e-4) and largest == pytest.approx(float(heads.max()), rel=1e-4)


def test_layers_with_a_window_do_not_count() -> None:
    """Guards: a window that hides the first token taken for a model without a sink; a model left in another mode."""
    windowed = model(use_sliding_window=True, window_size=8, window_pattern="S").train()
    assert all(math.isnan(value) for value in first_token_attention(windowed, rows()))
    assert windowed.training
