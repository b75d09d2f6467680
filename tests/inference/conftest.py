"""A tokenizer and random models small enough to build for every test run."""

import os

import pytest
import torch

from model import BPETokenizer, HaoAIConfig, SmartHaoAI

SENTENCES = [
    "你好，很高兴见到你。今天天气很好，我们去公园散步吧。",
    "The little fox runs through the quiet forest and sings a song.",
    "一加一等于二，二加二等于四。",
    "Hello! How are you today?",
    "print('hello')\nfor i in range(3): print(i)\n",
]


@pytest.fixture(scope="session")
def tokenizer():
    return BPETokenizer.train(SENTENCES * 3, vocab_size=400, progress=False)


def _make_model(tokenizer=None, seed=0, std=0.2, **changes):
    """A random model; large initial weights spread its logits, so that greedy choices are no near-ties."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=tokenizer.vocab_size if tokenizer else 97,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=std,
    )
    return SmartHaoAI(HaoAIConfig(**{**shape, **changes})).eval()


@pytest.fixture(scope="session")
def make_model():
    """make_model(tokenizer=None, **config fields): a fresh random model."""
    return _make_model


@pytest.fixture(scope="session")
def model(tokenizer):
    return _make_model(tokenizer)


@pytest.fixture(scope="session")
def imported_pair():
    """The model in the folder PARITY_MODEL, such as one from the hub, and the same in transformers."""
    from generate_helpers import read_by_transformers

    folder = os.environ.get("PARITY_MODEL")
    if folder is None:
        pytest.skip("set PARITY_MODEL to the folder of a model")
    return SmartHaoAI.from_pretrained(folder).eval(), read_by_transformers(folder)
