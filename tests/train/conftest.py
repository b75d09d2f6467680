"""Fixtures of the training tests; plain helpers are in training_helpers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import BPETokenizer, HaoAIConfig, SmartHaoAI


@pytest.fixture(scope="session")
def tokenizer_dir(tiny_tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `tiny_tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_config: HaoAIConfig) -> SmartHaoAI:
    """A tiny model in training mode with weights that no other test has seen."""
    return SmartHaoAI(tiny_config).train()
