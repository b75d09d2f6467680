"""config.json: what is refused, what an absent field means, and that nothing is lost on the way to the disk and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from model import HaoAIConfig, SmartHaoAI
from model.disk_config import ABSENT, FIELD_NAMES, SIZES, config_from_disk, config_to_disk, model_type, portability_notes, read_config

FILE = Path("somewhere/config.json")
SPARSE: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
WINDOWS: dict[str, Any] = {"use_sliding_window": True, "window_size": 5, "window_pattern": "S"}
BARE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3_WINDOW: dict[str, Any] = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4}
ARCHITECTURES = [kind for kind in ABSENT if kind != "haoai"]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"model_type": "gpt2"}, "model_type='gpt2'.*llama.*qwen3_moe"),
    "no type": ({"model_type": None}, "model_type=None"),
    "activation": ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    "attention bias": ({"attention_bias": True}, "attention_bias=true"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=true"),
    "partial rotary": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
    "partial rotary, new": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised.*gptq"),
    "quantised, no method": ({"quantization_config": {"bits": 4}}, "quantised"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "rope_type='longrope'"),
    "rotary by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.*full_attention"),
    "scaling without factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "heads": ({"num_attention_heads": 3}, "n_head=3.*n_kv_head=4"),
    "groups": ({"num_key_value_heads": 3}, "n_head=4.*n_kv_head=3"),
    "text": ({"num_hidden_layers": "many"}, "many"),
    "theta": ({"rope_theta": "much"}, "rope_theta.*'much'"),
    "scaling as text": ({"rope_scaling": "yarn"}, "rope_scaling.*'yarn'"),
    "quantised as text": ({"quantization_config": "int8"}, "quantization_config='int8'"),
    "window as text": ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window='wide'"),
    "type as list": ({"model_type": ["llama"]}, "model_type=.*llama"),
    "layers without end": ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
    "layers without end, experts": ({"model_type": "mixtral", "num_hidden_layers": 10**12, "num_local_experts": 2}, "num_hidden_layers"),
    "experts without end": ({"model_type": "mixtral", "num_local_experts": 10**9}, "n_expert=1000000000"),
    "experts as text": ({"model_type": "mixtral", "num_local_experts": "four"}, "n_expert.*'four'"),
    "half an expert": ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1.5}, "n_expert_per_token=1.5"),
    "dense layers as text": ({"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": "0"}, "mlp_only_layers='0'"),
    "half a step": ({"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 1.5}, "decoder_sparse_step=1.5"),
    "renormalised as text": ({"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": "no"}, "norm_topk_prob.*'no'"),
    "chunks": (QWEN3_WINDOW | {"layer_types": ["chunked_attention"] * 3}, "layer_types.*'chunked_attention'"),
    "too few layer types": (QWEN3_WINDOW | {"layer_types": ["sliding_attention"] * 2}, "layer_types has 2.*num_hidden_layers=3"),
    "layer types as text": (QWEN3_WINDOW | {"layer_types": "sliding_attention"}, "layer_types.*'sliding_attention'"),
    "endless theta": ({"rope_theta": float("inf")}, "rope_theta.*inf"),
    "theta of zero": ({"rope_theta": 0}, "rope_theta.*0"),
    "yarn as text": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "beta_fast.*'32'"),
    "yarn without turns": ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta.*1"),
    "empty band": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 1.0}},
        "low_freq_factor=1.*high_freq_factor=1",
    ),
    "windows as text": (QWEN3_WINDOW | {"use_sliding_window": "false"}, "use_sliding_window.*'false'"),
    "windows as a number": (QWEN3_WINDOW | {"model_type": "qwen3_moe", "use_sliding_window": 0}, "use_sliding_window.*0"),
    "windows of our own as text": ({"model_type": "haoai", "use_sliding_window": "no"}, "use_sliding_window.*'no'"),
    "tied as text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings.*'no'"),
    "end as text": ({"eos_token_id": "</s>"}, "eos_token_id.*'</s>'"),
    "ends as texts": ({"eos_token_id": [1, "</s>"]}, "eos_token_id.*'</s>'"),
    "dropout as text": ({"attention_dropout": "none"}, "attention_dropout.*'none'"),
    "balance as text": ({"model_type": "qwen3_moe", "num_experts": 8, "router_aux_loss_coef": "low"}, "router_aux_loss_coef.*'low'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_here_is_refused(name: str) -> None:
    """Guards: a model that loads and computes something else; a message without file, field or value."""
    change, message = REFUSED[name]
    data = {**config_to_disk(HaoAIConfig(n_layer=3, n_head=4, n_embd=32, qk_norm=False)), "rope_parameters": None, **change}
    with pytest.raises(ValueError, match=message) as caught:
        config_from_disk(data, FILE)
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "haoai"])
@pytest.mark.parametrize("field", SIZES)
def test_a_file_without_a_size_is_refused(kind: str, field: str) -> None:
    """Guards: another number of heads than the weights were trained with, where the shapes happen to fit."""
    with pytest.raises(ValueError, match=f"lacks '{field}'"):
        config_from_disk({**BARE, "model_type": kind, field: None}, FILE)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_absent_fields_mean_what_transformers_assumes(kind: str, tmp_path: Path) -> None:
    """Guards: a short config.json, as people write it by hand, that is another model here; compared with the classes themselves."""
    transformers = pytest.importorskip("transformers")
    data = {k: v for k, v in BARE.items() if k != "num_key_value_heads"} | {"num_attention_heads": 32, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**data, "model_type": kind}), encoding="utf-8")
    ours, theirs = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    heads = theirs.num_attention_heads
    assert (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads) == ours.head_dim
    for name, their_name in FIELD_NAMES.items():
        if name not in ("dropout", "head_dim"):
            assert getattr(ours, name) == getattr(theirs, their_name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    window = getattr(theirs, "sliding_window", None)
    assert [ours.layer_window(i) for i in range(3)] == [window] * 3
    if kind in ("mixtral", "qwen3_moe"):
        assert ours.n_expert == theirs.num_local_experts and ours.n_expert_per_token == theirs.num_experts_per_tok
        assert ours.expert_size == (theirs.intermediate_size if kind == "mixtral" else theirs.moe_intermediate_size)
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
        assert ours.router_aux_loss_coef == theirs.router_aux_loss_coef


SHORT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"max_position_embeddings": 64},  # no sliding_window: 4096
    "mistral-null-window": {"sliding_window": None},
    "mistral-window": {"sliding_window": 4},
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2-default-window": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3-default-head": {},  # no head_dim: 128
    "qwen3-null-kv": {"num_key_value_heads": None, "head_dim": 8},
    "qwen3-windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "head_dim": 8},
    "qwen3-no-max-window-layers": {"use_sliding_window": True, "sliding_window": 4, "head_dim": 8},  # 28: none of 3 layers
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 1},  # no rope_theta: a million
    "mixtral-other-name": {"num_experts": 4},
    "mixtral-window": {"num_local_experts": 4, "sliding_window": 4, "head_dim": 6},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},  # no norm_topk_prob: raw weights
    "qwen3_moe-other-name": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "qwen3_moe-steps": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    "qwen3_moe-mlp-only": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 2]},
    "qwen3_moe-all-dense": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1, 2]},
    "qwen3_moe-window": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "head_dim": 8,
    },
    "llama-old-yarn": {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama-new-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}},
    "qwen3-new-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "head_dim": 8},
    "mixtral-new-scaling-without-theta": {"num_local_experts": 4, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "llama-both-contradict": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_theta": 50.0,
    },
    "llama-theta-in-old-scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70.0}, "rope_theta": 50.0},
    "qwen2-yarn-without-original": {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1e5},
    "llama-old-dtype": {"torch_dtype": "bfloat16", "rope_theta": 123.0},
    "llama-window-ignored": {"sliding_window": 3, "use_sliding_window": True},
}


@pytest.mark.parametrize("name", SHORT)
def test_short_files_compute_what_they_do_in_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """Guards: defaults and spellings seen in the wild that change the model: windows, head sizes, rotary bases, router weights."""
    transformers = pytest.importorskip("transformers")
    data = {**BARE, **SHORT[name], "model_type": name.split("-")[0], "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(data), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if key.endswith((".bias", ".gate.weight")) else 0.15)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data), encoding="utf-8")  # without what they add
    ours = SmartHaoAI.from_pretrained(tmp_path)
    ids = torch.randint(61, (2, 40))
    with torch.no_grad():
        actual, expected = ours(ids).logits, theirs(ids).logits
    assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_expert_weights_of_several_spellings_are_one_number() -> None:
    """Guards: the default of one name that hides the other, which transformers 5 writes."""
    for kind in ("mixtral", "qwen3_moe"):
        for name in ("num_experts", "num_local_experts"):
            config = config_from_disk({**BARE, "model_type": kind, name: 6, "num_experts_per_tok": 1}, FILE)
            assert config.n_expert == 6


@pytest.mark.parametrize("pattern", ["S", "LSSS", "LLLS"])
@pytest.mark.parametrize("bias", [False, True])
def test_windows_without_layer_types(pattern: str, bias: bool) -> None:
    """Guards: versions of transformers that know max_window_layers alone and would see windows on other layers."""
    config = HaoAIConfig(n_layer=4, use_sliding_window=True, window_size=5, window_pattern=pattern, qk_norm=not bias, attention_bias=bias)
    data = config_to_disk(config)
    del data["layer_types"]
    assert [config_from_disk(data, FILE).layer_window(i) for i in range(4)] == [config.layer_window(i) for i in range(4)]


@st.composite
def configs(draw: st.DrawFn) -> HaoAIConfig:
    """Random settings. Fields of a part that is switched off stay at their defaults: nothing of them is written."""
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 1000)),
        "n_layer": draw(st.integers(1, 6)),
        "n_head": draw(st.sampled_from([2, 4])),
        "n_kv_head": draw(st.sampled_from([None, 1, 2])),
        "n_embd": draw(st.sampled_from([16, 48])),
        "head_dim": draw(st.sampled_from([None, 6, 20])),
        "intermediate_size": draw(st.sampled_from([None, 30])),
        "max_position_embeddings": draw(st.integers(1, 5000)),
        "rope_theta": draw(st.floats(1.5, 1e7)),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-3)),
        "rope_scaling": draw(
            st.sampled_from(
                [
                    None,
                    {"rope_type": "linear", "factor": 2.0},
                    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
                    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                ]
            )
        ),
        "initializer_range": draw(st.floats(1e-3, 1.0)),
        "dropout": draw(st.floats(0, 0.9)),
        "attention_dropout": draw(st.floats(0, 0.9)),
        "eos_token_id": draw(st.sampled_from([None, 1, [1, 0]])),
    }
    for name in ("qk_norm", "attention_bias", "tie_word_embeddings", "use_cache"):
        fields[name] = draw(st.booleans())
    if draw(st.booleans()):
        fields.update(
            use_sliding_window=True, window_size=draw(st.integers(1, 99)), window_pattern=draw(st.text("SL", min_size=1, max_size=5))
        )
        assume("S" in (fields["window_pattern"] * 6)[: fields["n_layer"]])
    if draw(st.booleans()):
        experts = draw(st.integers(1, 6))
        fields.update(
            n_expert=experts,
            n_expert_per_token=draw(st.integers(1, experts)),
            moe_intermediate_size=draw(st.sampled_from([None, 7])),
            moe_pattern=draw(st.text("ED", min_size=1, max_size=5)),
            norm_topk_prob=draw(st.booleans()),
            n_shared_expert=draw(st.sampled_from([0, 0, 2])),
            router_bias_rate=draw(st.sampled_from([0.0, 0.0, 0.001])),
            router_aux_loss_coef=draw(st.floats(0, 1)),
            router_z_loss_coef=draw(st.floats(0, 1)),
        )
        assume("E" in (fields["moe_pattern"] * 6)[: fields["n_layer"]])
    return HaoAIConfig(**fields)


@given(configs())
@hypothesis_settings(max_examples=400, deadline=None)
def test_every_setting_comes_back(config: HaoAIConfig) -> None:
    """Guards: a field that is not written, written under a name that is not read, or read with another default."""
    data = json.loads(json.dumps(config_to_disk(config)))
    assert config_from_disk(data, FILE) == config
    assert data["model_type"] == model_type(config)
    assert (data["model_type"] == "haoai") == bool(portability_notes(config))


@given(configs())
@hypothesis_settings(max_examples=100, deadline=None)
def test_either_spelling_is_enough(config: HaoAIConfig) -> None:
    """Guards: a file of transformers 4 (rope_theta, rope_scaling, "type", torch_dtype) or 5 (rope_parameters, dtype) read otherwise."""
    data = config_to_disk(config)
    old = {k: v for k, v in data.items() if k not in ("rope_parameters", "dtype")}
    if config.rope_scaling:
        kind = {"type": config.rope_scaling["rope_type"]}
        old["rope_scaling"] = kind | {k: v for k, v in config.rope_scaling.items() if k != "rope_type"}
    new = {k: v for k, v in data.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_disk(new, FILE) == config
    back = config_from_disk(old, FILE)
    if back.rope_scaling is not None:
        back.rope_scaling = {"rope_type": back.rope_scaling.get("rope_type", back.rope_scaling.get("type")), **back.rope_scaling}
        back.rope_scaling.pop("type", None)
    assert back == config


NOTES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bias": ({**SPARSE, "router_bias_rate": 0.01}, ["router_bias_rate=0.01"]),
    "shared": ({**SPARSE, "n_shared_expert": 2}, ["n_shared_expert=2"]),
    "attention bias and experts": ({**SPARSE, "attention_bias": True}, ["attention_bias=True in a mixture"]),
    "mixed windows and experts": ({**SPARSE, **WINDOWS, "window_pattern": "SL"}, ["window_pattern='SL'.*mixture"]),
    "mixed layers": ({**SPARSE, "qk_norm": False, "moe_pattern": "DE"}, ["moe_pattern='DE'.*qk_norm"]),
    "raw weights": ({**SPARSE, "qk_norm": False, "norm_topk_prob": False}, ["norm_topk_prob=False.*qk_norm"]),
    "attention bias and norm": ({"attention_bias": True}, ["attention_bias=True.*qk_norm"]),
    "mixed windows": ({**WINDOWS, "window_pattern": "SL", "qk_norm": False}, ["window_pattern='SL'.*qk_norm"]),
    "two at once": ({**SPARSE, "router_bias_rate": 0.01, "n_shared_expert": 1}, ["router_bias_rate", "n_shared_expert"]),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_name_the_switch_that_stands_in_the_way(name: str) -> None:
    """Guards: an export that is refused without a reason, or one that silently loses a part of the model."""
    fields, patterns = NOTES[name]
    config = HaoAIConfig(n_layer=4, **fields)
    notes = portability_notes(config)
    assert model_type(config) == "haoai" and len(notes) == len(patterns)
    for note, pattern in zip(notes, patterns, strict=True):
        assert re.search(pattern, note)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"qk_norm": False}, "llama"),
        ({"qk_norm": False, **WINDOWS}, "mistral"),
        ({"qk_norm": False, "attention_bias": True}, "qwen2"),
        ({"qk_norm": False, "attention_bias": True, **WINDOWS, "window_pattern": "LS"}, "qwen2"),
        ({}, "qwen3"),
        ({**WINDOWS, "window_pattern": "LS"}, "qwen3"),
        ({**SPARSE, "qk_norm": False}, "mixtral"),
        ({**SPARSE, "qk_norm": False, **WINDOWS}, "mixtral"),
        (SPARSE, "qwen3_moe"),
        ({**SPARSE, **WINDOWS, "moe_pattern": "DE", "norm_topk_prob": False}, "qwen3_moe"),
        ({"qk_norm": False, **WINDOWS, "window_pattern": "LLLLS"}, "llama"),  # no layer has a window
        ({**SPARSE, "router_z_loss_coef": 0.1}, "qwen3_moe"),  # training only
    ],
    ids=str,
)
def test_standard_models_have_a_standard_name(fields: dict[str, Any], kind: str) -> None:
    """Guards: a model written as haoai although others can compute it."""
    config = HaoAIConfig(n_layer=4, **fields)
    assert model_type(config) == kind and not portability_notes(config)
