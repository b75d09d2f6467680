"""Fixtures shared by all tests: a fresh random seed, printed when a test fails; a tokenizer, a configuration and a model so small that
every test can afford them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
import torch

from model import BPETokenizer, HaoAIConfig, SmartHaoAI

# No test may reach for the network: what is not on this disk does not exist.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small lose ten times more to threads that wait for each other on a busy machine than they gain.
torch.set_num_threads(1)

SENTENCES = [
    "今天天气很好，我们一起去公园散步。",
    "小猫在窗边睡觉，阳光照在它的身上。",
    "请问 12 加 35 等于多少？答案是 47。",
    "The quick brown fox jumps over the lazy dog.",
    "A small model can learn to speak Chinese and English.",
    "def add(a, b):\n    return a + b\n",
    "The answer is 47, because 12 + 35 = 47.",
    "你好！Hello! 很高兴认识你，nice to meet you.",
]


SKIPPED: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        SKIPPED.add(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        SKIPPED.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Names the tests that could not run here in the file $SKIPPED_TESTS, for an environment that has the packages they need."""
    if os.environ.get("SKIPPED_TESTS"):
        Path(os.environ["SKIPPED_TESTS"]).write_text("".join(f"{name}\n" for name in sorted(SKIPPED)), encoding="utf-8")


@pytest.fixture
def seed() -> int:
    """A new seed for every test; set TEST_SEED to repeat a failure."""
    value = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**31))
    print(f"TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def tiny_tokenizer() -> BPETokenizer:
    """About 400 tokens, trained on eight bilingual sentences."""
    return BPETokenizer.train(SENTENCES * 4, vocab_size=400, progress=False)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: BPETokenizer) -> HaoAIConfig:
    """Two layers of width 32 with grouped queries, over the vocabulary of `tiny_tokenizer`."""
    return HaoAIConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        intermediate_size=64,
        max_position_embeddings=256,
    )


@pytest.fixture
def tiny_model(tiny_config: HaoAIConfig) -> SmartHaoAI:
    """A fresh model of `tiny_config` with the same weights every time, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmartHaoAI(tiny_config).eval()
