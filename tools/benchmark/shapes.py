"""Shapes to measure: by name or by fields, and the checkpoint, tokenizer and documents that all rows of a run share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import PRESETS, HaoAIConfig
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.config import PretrainConfig, UsageError, set_value

# The shapes that the figures of docs/performance.md belong to.
SHAPES: dict[str, dict[str, Any]] = {
    "known": {"vocab_size": 6400, "n_layer": 8, "n_head": 8, "n_kv_head": 4, "n_embd": 512, "intermediate_size": 1664, "rope_theta": 1e6},
    "mark": {"vocab_size": 6400, "n_layer": 8, "n_head": 8, "n_kv_head": 4, "n_embd": 256, "intermediate_size": 832, "rope_theta": 1e6},
    "0.1b": {"vocab_size": 32768, "n_layer": 12, "n_head": 12, "n_kv_head": 6, "n_embd": 768, "intermediate_size": 2048},
    "0.4b": {"vocab_size": 32768, "n_layer": 24, "n_head": 16, "n_kv_head": 8, "n_embd": 1024, "head_dim": 64, "intermediate_size": 4096},
}
SHORT = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "kv_heads": "n_kv_head",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}
FULL_SHARE, SHORTEST = 0.6, 80  # of the documents; lengths so that padded rows of 340 hold 85% real tokens
ROW_LENGTH = 340
LEAST_CONTEXT = 128  # for the tokens that results are compared on
DOCUMENT_TOKENS = 400_000


def parse_shape(text: str, context: int) -> HaoAIConfig:
    """`known`, a preset, or `layers=8,width=512,...` (any field of HaoAIConfig; `known` fills in the rest). The context holds at least
    `context` tokens. Raises UsageError."""
    named = {**PRESETS, **SHAPES}
    fields: dict[str, Any] = {}
    if "=" not in text:
        if text not in named:
            raise UsageError(f"--shape {text}: known are {', '.join(named)}, or fields: layers=8,width=512,heads=8,kv_heads=4,ffn=1664")
        fields = dict(named[text])
    else:
        settings = PretrainConfig(model=dict(SHAPES["known"]))
        for word in text.split(","):
            name, _, value = word.partition("=")
            set_value(settings, f"model.{SHORT.get(name, name)}", value)
        fields = settings.model_shape()
    fields["max_position_embeddings"] = max(context, LEAST_CONTEXT, fields.get("max_position_embeddings", 0))
    try:
        return HaoAIConfig(**fields)
    except ValueError as error:
        raise UsageError(f"--shape {text}: {error}") from error


def with_model_words(config: HaoAIConfig, words: Sequence[str]) -> HaoAIConfig:
    """The shape with the `model.*` among words such as model.n_expert=4. Raises UsageError for what cannot be."""
    settings = PretrainConfig(model={})
    for word in words:
        name, _, value = word.partition("=")
        set_value(settings, name, value)
    try:
        return replace(config, **settings.model_shape())
    except ValueError as error:
        raise UsageError(f"{' '.join(words)}: {error}") from error


@dataclass(frozen=True)
class Workplace:
    """A folder with what all rows of a run start from."""

    folder: Path
    given: Path | None = None
    """A checkpoint to measure in place of one with random weights."""

    @property
    def model(self) -> Path:
        """A checkpoint with its tokenizer."""
        return self.given or self.folder / "model"

    @property
    def documents(self) -> Path:
        """Random token ids, cut into documents by the document-end token."""
        return self.folder / "documents.npy"

    @property
    def store(self) -> Path:
        return self.folder / "store"


def prepare(folder: Path, config: HaoAIConfig, seed: int = 0, length: int = 0) -> Workplace:
    """Write a model of this shape, a tokenizer and documents of random ids. What is computed costs the same whatever the words are.

    length: of every document; 0: lengths of which rows of 340, one document each, are 85% full.
    """
    place = Workplace(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(config.vocab_size, seed)
    torch.manual_seed(seed)
    SmartHaoAI(config).save_pretrained(place.model, tokenizer)
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < DOCUMENT_TOKENS:
        full = draw.random() < FULL_SHARE
        drawn = int(draw.integers(ROW_LENGTH, 2 * ROW_LENGTH) if full else draw.integers(SHORTEST, ROW_LENGTH))
        ids += [*random_ids(tokenizer, length or drawn, draw), tokenizer.document_end_id]
    np.save(place.documents, np.asarray(ids, dtype=np.uint32))
    return place


def random_ids(tokenizer: BPETokenizer, count: int, draw: np.random.Generator) -> list[int]:
    """Ids of ordinary tokens, from the upper half of the vocabulary."""
    special = [number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special]
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size // 2, tokenizer.vocab_size), special)
    ids: list[int] = draw.choice(ordinary, count).tolist()
    return ids


def _tokenizer(size: int, seed: int) -> BPETokenizer:
    """Learned from made-up words: just large enough a vocabulary, in a few seconds."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(4, 8))) for _ in range(size)]
    tokenizer = BPETokenizer.train([" ".join(words[at : at + 100]) for at in range(0, size, 100)] * 2, vocab_size=size, progress=False)
    if tokenizer.vocab_size != size:
        raise UsageError(
            f"a vocabulary of {size} tokens cannot be made for the benchmark (got {tokenizer.vocab_size}): choose at least 400"
        )
    return tokenizer
