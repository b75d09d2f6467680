"""HaoAIConfig: derived sizes, presets, the account, and messages that name the field."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import HaoAIConfig, KVCache, SmartHaoAI
from model.config import PRESETS


def real_parameters(config: HaoAIConfig) -> int:
    with torch.device("meta"):
        return SmartHaoAI(config).num_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_the_account_counts_every_preset(name: str) -> None:
    """Guards: a parameter count that forgets norms, key/value heads or the head."""
    for changes in ({}, {"qk_norm": False, "tie_word_embeddings": False}, {"qk_norm": True, "n_layer": 3}):
        config = HaoAIConfig.preset(name, **changes)
        account = config.account()
        assert account.parameters == real_parameters(config)
        assert account.weight_bytes(2) == 2 * account.parameters
        assert account.body_parameters + account.head_parameters * (1 if config.tie_word_embeddings else 2) == account.parameters


@pytest.mark.parametrize(("name", "millions"), [("mini", 26), ("small", 64), ("medium", 104), ("base", 411)])
def test_known_shapes_have_their_known_size(name: str, millions: int) -> None:
    """Guards: a preset that no longer is the model it is compared with."""
    assert abs(HaoAIConfig.preset(name).account().parameters / 1e6 - millions) < 0.03 * millions


def test_from_depth_grows_and_counts() -> None:
    """Guards: an odd depth whose heads cannot be grouped; a dial that does not turn everything."""
    sizes = []
    for depth in range(1, 17):
        config = HaoAIConfig.from_depth(depth)
        assert config.n_layer == depth and config.n_embd == 64 * config.n_head and config.n_head == 2 * config.kv_heads
        sizes.append(config.account().parameters)
        assert sizes[-1] == real_parameters(config)
    assert sizes == sorted(set(sizes))
    assert HaoAIConfig.from_depth(4, vocab_size=99, n_kv_head=1).kv_heads == 1
    with pytest.raises(ValueError, match="n_layer"):
        HaoAIConfig.from_depth(0)


def test_derived_sizes() -> None:
    """Guards: other defaults than the documented ones."""
    config = HaoAIConfig(vocab_size=100, n_layer=1, n_head=3, n_embd=96)
    assert (config.n_kv_head, config.head_dim, config.intermediate_size) == (3, 32, 256)
    assert HaoAIConfig(n_embd=512).intermediate_size == 1408
    assert HaoAIConfig(**config.to_dict()) == config


@pytest.mark.parametrize("block", [1, 5, 256])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_sliding_window": True, "window_size": 7, "window_pattern": "SSL"},
        {"use_sliding_window": True, "window_size": 100, "window_pattern": "S"},
    ],
)
def test_cache_bytes_equal_the_real_cache(fields: dict[str, Any], block: int) -> None:
    """Guards: a memory estimate for another cache than the one that is allocated."""
    config = HaoAIConfig(vocab_size=10, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, head_dim=6, **fields)
    for context, batch in ((50, 1), (3, 2), (130, 3)):
        cache = KVCache(config, batch, context, dtype=torch.bfloat16, block=block)
        assert config.account().kv_cache_bytes(context, batch, bytes_per_value=2, block=block) == cache.nbytes
    assert config.account().kv_cache_bytes(300) == KVCache(config, 1, 300).nbytes


def test_windows_save_memory_and_work() -> None:
    """Guards: windows that are counted as full attention."""
    full = HaoAIConfig.preset("nano", max_position_embeddings=4096)
    windowed = HaoAIConfig.preset("nano", max_position_embeddings=4096, use_sliding_window=True, window_size=64)
    assert windowed.account().kv_cache_bytes(4096) < 0.6 * full.account().kv_cache_bytes(4096)
    assert windowed.account().flops_per_token(4096) < full.account().flops_per_token(4096)


def test_flops_follow_the_parameters() -> None:
    """Guards: 6 N per trained token, counted once for a tied matrix."""
    account = HaoAIConfig.preset("mini").account()
    assert abs(account.flops_per_token(1) / (6 * account.parameters) - 1) < 0.01
    assert account.flops_per_token(512) == 3 * account.flops_per_token(512, training=False)
    assert account.training_bytes(4, 512) > account.training_bytes(1, 512) > 16 * account.parameters
    assert "25.8" in account.table() and "tied" in account.table()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "zero-vocabulary": ({"vocab_size": 0}, "vocab_size .*0"),
    "negative-layers": ({"n_layer": -1}, "n_layer .*-1"),
    "float-layers": ({"n_layer": 2.0}, "n_layer .*2.0"),
    "no-heads": ({"n_head": 0}, "n_head .*0"),
    "uneven-width": ({"n_embd": 100, "n_head": 8}, "n_embd=100.*n_head=8.*head_dim"),
    "uneven-groups": ({"n_head": 8, "n_kv_head": 3}, "n_head=8.*n_kv_head=3"),
    "zero-kv": ({"n_kv_head": 0}, "n_kv_head .*0"),
    "odd-head": ({"head_dim": 7}, "head_dim=7.*even"),
    "dropout": ({"dropout": 1.0}, "dropout .*1.0"),
    "negative-dropout": ({"attention_dropout": -0.1}, "attention_dropout .*-0.1"),
    "context": ({"max_position_embeddings": 0}, "max_position_embeddings .*0"),
    "window": ({"window_size": 0}, "window_size .*0"),
    "pattern": ({"use_sliding_window": True, "window_pattern": "SX"}, "window_pattern.*'SX'"),
    "empty-pattern": ({"use_sliding_window": True, "window_pattern": ""}, "window_pattern"),
    "theta": ({"rope_theta": 0.0}, "rope_theta .*0.0"),
    "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "scaling-kind": ({"rope_scaling": {"rope_type": "magic", "factor": 2}}, "'magic'.*yarn"),
    "scaling-factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "scaling-text-factor": ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor.*'two'"),
    "scaling-text": ({"rope_scaling": "yarn"}, "rope_scaling.*'yarn'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(name: str) -> None:
    """Guards: a shape error from deep inside torch, minutes later."""
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        HaoAIConfig(**fields)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    """Guards: a KeyError."""
    with pytest.raises(ValueError, match="'huge'.*nano.*base"):
        HaoAIConfig.preset("huge")
