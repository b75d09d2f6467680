"""A model in our hands and in those of transformers; and when two replies count as equal."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch

from inference.engine import Engine
from inference.sampling import SamplingSettings, TokenHistory, process_logits

MARGIN = 1e-4  # two tokens closer than this may change places: sums of batched and single products are rounded differently


def in_transformers(model: Any) -> Any:
    """A model of ours, saved and read by transformers; the test is skipped without transformers."""
    pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_by_transformers(folder)


def read_by_transformers(folder: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")
    transformers.logging.disable_progress_bar()
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    other.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return other


@torch.no_grad()
def assert_same_greedy(model: Any, prompt: list[int], ids: list[int], expected: list[int], settings: SamplingSettings) -> None:
    """ids is expected, up to a place where the two likeliest tokens are as good as equal."""
    if ids == expected:
        return
    place = next(i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
    history = TokenHistory(torch.tensor([prompt]), None, model.config.vocab_size, len(ids))
    for token in ids[:place]:
        history.append(torch.tensor([token]))
    logits = model(torch.tensor([prompt + ids[:place]])).logits[:, -1]
    best, second = process_logits(logits, history, settings, Engine(model).end_tokens(settings)).topk(2).values[0].tolist()
    assert best - second < MARGIN, f"token {place} differs with a margin of {best - second:.2g}: {ids} is not {expected}"


def greedy_by_full_forward(model, prompt, count):
    """The slowest way that is right: no cache at all."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
