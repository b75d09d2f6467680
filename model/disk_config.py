"""config.json: HaoAIConfig <-> the configuration of transformers, in its old and new spellings.

A model that uses only standard parts is written under the `model_type` that computes exactly it. `portability_notes` names what
keeps a model from being one. Reading refuses by name what this code base does not compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.config import MOST_PARTS, PART_SETTINGS, HaoAIConfig

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer

CONFIG_FILE = "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "haoai": "SmartHaoAI",
}

# our field -> its name in a transformers config
FIELD_NAMES = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "dropout": "residual_dropout",
}
EXPERT_FIELD_NAMES = {
    "n_expert_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "router_balance_scope": "router_balance_scope",
    "router_z_loss_coef": "router_z_loss_coef",
}
OWN_FIELDS = ("qk_norm", "use_sliding_window", "window_size", "window_pattern")  # `haoai` only, under our own names
SMART_FIELDS = (  # `haoai` only, and only where they are not at their defaults
    "attention_gate",
    "attention_temperature",
    "residual_scale",
    "value_residual",
    "value_embedding",
    "feed_forward",
    "logit_softcap",
    "deep_supervision",
    "use_reasoning",
)
SMART_SETTINGS = tuple(name for names in PART_SETTINGS.values() for name in names)  # `haoai` only: they mean nothing without their part
OWN_EXPERT_FIELDS = ("moe_pattern", "router_bias_rate", "n_shared_expert")

# What transformers assumes when a file leaves a field out, where that is not our own default.
_COMMON = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON},
    "mistral": {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "max_window_layers": 28,
        "sliding_window": 4096,
    },
    "qwen3": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "mixtral": {
        **_COMMON,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3_moe": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    "haoai": {},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # no file leaves these out
EXPERT_COUNTS = ("num_experts", "num_local_experts")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def model_type(config: HaoAIConfig) -> str:
    """The architecture of transformers that computes exactly this model; `haoai` when there is none."""
    if portability_notes(config):
        return "haoai"
    if _sparse_layers(config):
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.attention_bias:
        return "qwen2"
    if config.qk_norm:
        return "qwen3"
    return "mistral" if _windowed_layers(config) else "llama"


def portability_notes(config: HaoAIConfig) -> list[str]:
    """The settings, with their values, that no architecture of transformers (and llama.cpp) computes; empty for a standard model."""
    notes = smart_parts(config)
    windowed, sparse = _windowed_layers(config), _sparse_layers(config)
    mixed_windows = windowed and len(windowed) < config.n_layer
    pattern = f"window_pattern={config.window_pattern!r} (some layers with a window, some without)"
    if sparse:
        if config.router_bias_rate:
            notes.append(f"router_bias_rate={config.router_bias_rate:g} (a bias on the choice of experts)")
        if config.n_shared_expert:
            notes.append(f"n_shared_expert={config.n_shared_expert}")
        if config.attention_bias:
            notes.append("attention_bias=True in a mixture of experts")
        if mixed_windows:
            notes.append(f"{pattern} in a mixture of experts")
        if not config.qk_norm and len(sparse) < config.n_layer:
            notes.append(f"moe_pattern={config.moe_pattern!r} (some dense layers) without qk_norm")
        if not config.qk_norm and not config.norm_topk_prob:
            notes.append("norm_topk_prob=False without qk_norm")
    else:
        if config.attention_bias and config.qk_norm:
            notes.append("attention_bias=True together with qk_norm")
        if mixed_windows and not config.qk_norm and not config.attention_bias:
            notes.append(f"{pattern} without qk_norm")
    return notes


def smart_parts(config: HaoAIConfig) -> list[str]:
    """The optional parts that are on, as setting=value: what only this code base computes."""
    plain = HaoAIConfig()
    return [f"{name}={getattr(config, name)!r}" for name in SMART_FIELDS if getattr(config, name) != getattr(plain, name)]


def _windowed_layers(config: HaoAIConfig) -> list[int]:
    return [layer for layer in range(config.n_layer) if config.layer_window(layer) is not None]


def _sparse_layers(config: HaoAIConfig) -> list[int]:
    return [layer for layer in range(config.n_layer) if config.layer_is_sparse(layer)]


def config_to_disk(
    config: HaoAIConfig, tokenizer: BPETokenizer | None = None, dtype: torch.dtype = torch.float32, reward: bool = False
) -> dict[str, Any]:
    """config.json with the old and the new spellings of every field that was renamed; that of a reward model when `reward`."""
    kind = model_type(config)
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": DTYPES[dtype],
        "dtype": DTYPES[dtype],
        "transformers_version": "4.51.0",
    }
    if reward:
        architecture = "RewardModel" if kind == "haoai" else ARCHITECTURES[kind].replace("CausalLM", "SequenceClassification")
        data.update(architectures=[architecture], num_labels=1)
    for ours, theirs in FIELD_NAMES.items():
        data[theirs] = getattr(config, ours)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    data.update(rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, rope_parameters=rope)
    data.update(_windows_to_disk(config, kind))
    if config.n_expert:
        data.update(_experts_to_disk(config, kind))
    if config.eos_token_id is not None:
        data["eos_token_id"] = config.eos_token_id
    if kind == "haoai" or config.use_sliding_window:
        data.update(window_pattern=config.window_pattern)
    if kind == "haoai":
        data.update({name: getattr(config, name) for name in OWN_FIELDS}, qkv_bias=config.attention_bias)
        data.update({name: getattr(config, name) for name in (*SMART_FIELDS, *SMART_SETTINGS)})
    if tokenizer is not None:
        data.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    return data


def _windows_to_disk(config: HaoAIConfig, kind: str) -> dict[str, Any]:
    windowed = _windowed_layers(config)
    size = config.window_size if windowed else None
    if kind in ("mistral", "mixtral"):
        return {"sliding_window": size}
    if kind == "qwen3_moe":
        return {"use_sliding_window": bool(windowed), "sliding_window": size, "max_window_layers": 0 if windowed else config.n_layer}
    if kind in ("qwen2", "qwen3"):
        return {
            "use_sliding_window": bool(windowed),
            "sliding_window": size,
            "layer_types": ["sliding_attention" if i in windowed else "full_attention" for i in range(config.n_layer)],
            "max_window_layers": min(windowed, default=config.n_layer),
        }
    return {}


def _experts_to_disk(config: HaoAIConfig, kind: str) -> dict[str, Any]:
    data = {theirs: getattr(config, ours) for ours, theirs in EXPERT_FIELD_NAMES.items()}
    data.update(moe_pattern=config.moe_pattern, num_experts=config.n_expert, num_local_experts=config.n_expert, output_router_logits=False)
    if kind == "mixtral":
        data.update(intermediate_size=config.moe_intermediate_size, dense_intermediate_size=config.intermediate_size)
    else:
        dense = [layer for layer in range(config.n_layer) if not config.layer_is_sparse(layer)]
        data.update(decoder_sparse_step=1, mlp_only_layers=dense)
    if kind == "haoai":
        data.update({name: getattr(config, name) for name in OWN_EXPERT_FIELDS})
    return data


def read_config(path: str | Path) -> HaoAIConfig:
    """The HaoAIConfig that the config.json of a directory describes. ValueError names what this code base cannot express."""
    file = Path(path) / CONFIG_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not a model directory: it has no {CONFIG_FILE}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return config_from_disk(data, file)


def config_from_disk(data: dict[str, Any], file: Path) -> HaoAIConfig:
    """The HaoAIConfig of a config.json's content. ValueError names `file`, the field and its value."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type={kind!r} cannot be read; known: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(data, kind, file)
    data = {**ABSENT[kind], **_one_name_for_experts(data, kind)}
    try:
        fields = {ours: data[theirs] for ours, theirs in FIELD_NAMES.items() if data.get(theirs) is not None}
        fields.update(_rope_from_disk(data), eos_token_id=data.get("eos_token_id"))
        fields["attention_bias"] = data.get("qkv_bias", False) if kind == "haoai" else kind == "qwen2"
        fields["qk_norm"] = data.get("qk_norm", False) if kind == "haoai" else kind in ("qwen3", "qwen3_moe")
        if kind == "haoai":
            fields.update({name: data[name] for name in (*SMART_FIELDS, *SMART_SETTINGS) if name in data})
        fields.update(_windows_from_disk(data, kind))
        fields.update(_experts_from_disk(data, kind))
        return HaoAIConfig(**fields)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _one_name_for_experts(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """`data` with the number of experts under the name that the architecture began with: transformers writes either."""
    given = [data[name] for name in EXPERT_COUNTS if data.get(name) is not None]
    name = "num_local_experts" if kind == "mixtral" else "num_experts"
    return {
        **{key: value for key, value in data.items() if key not in EXPERT_COUNTS},
        **({name: data.get(name) or given[0]} if given else {}),
    }


def _refuse_unsupported(data: dict[str, Any], kind: str, file: Path) -> None:
    for field in SIZES:
        if data.get(field) is None:
            raise ValueError(f"{file} lacks {field!r}")
    for field in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(data.get(field) or {}, dict):
            raise ValueError(f"{file}: {field}={data[field]!r} must be a mapping")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act={data['hidden_act']!r} is not supported, only 'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if data.get(field):
            raise ValueError(f"{file}: {field}=true is not supported (biases on queries, keys and values alone are: qwen2)")
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"{file}: the weights are quantised ({method}); take the model's unquantised files, or a GGUF")
    partial = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {}), **data}.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ValueError(f"{file}: partial_rotary_factor={partial!r} is not supported, only 1")
    nested = [name for name, value in (data.get("rope_parameters") or {}).items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{file}: rope_parameters={{{nested[0]!r}: ...}} is not supported, only one rotary embedding for all layers")


def _rope_from_disk(data: dict[str, Any]) -> dict[str, Any]:
    # Where a file has both, transformers goes by the old name, and by the base that stands beside the scaling.
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    bases = (given.get("rope_theta"), data.get("rope_theta"), ABSENT["llama"]["rope_theta"])
    fields: dict[str, Any] = {"rope_theta": next(base for base in bases if base is not None)}
    scaling = {k: v for k, v in given.items() if v is not None and k not in ("partial_rotary_factor", "rope_theta")}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        fields["rope_scaling"] = scaling
    return fields


def _windows_from_disk(data: dict[str, Any], kind: str) -> dict[str, Any]:
    layers, size = _whole(data, "num_hidden_layers", most=MOST_PARTS), data.get("sliding_window")
    if kind == "haoai":
        return {name: data[name] for name in OWN_FIELDS[1:] if data.get(name) is not None}
    switch = data.get("use_sliding_window")
    if switch is not None and not isinstance(switch, bool):
        raise ValueError(f"use_sliding_window must be true or false, not {switch!r}")
    if kind == "llama" or not size:  # transformers has no windows in llama, whatever the file says
        return {}
    if kind in ("mistral", "mixtral"):
        pattern = "S"
    elif not switch:
        return {}
    elif kind == "qwen3_moe":
        pattern = "S"
    elif data.get("layer_types"):
        pattern = _pattern_of_layers(data["layer_types"], layers)
    else:
        first = _whole(data, "max_window_layers") if data["max_window_layers"] else 0
        pattern = "L" * min(first, layers) + "S" * max(layers - first, 0)
    return {
        "use_sliding_window": True,
        "window_size": _whole(data, "sliding_window"),
        "window_pattern": _shortest(pattern, data.get("window_pattern"), layers),
    }


def _experts_from_disk(data: dict[str, Any], kind: str) -> dict[str, Any]:
    experts = data.get("num_local_experts" if kind == "mixtral" else "num_experts")
    if kind not in ("mixtral", "qwen3_moe", "haoai") or not experts:
        return {}
    fields = {ours: data[theirs] for ours, theirs in EXPERT_FIELD_NAMES.items() if data.get(theirs) is not None}
    layers = _whole(data, "num_hidden_layers", most=MOST_PARTS)
    fields["n_expert"] = experts
    if kind == "mixtral":
        return {
            **fields,
            "moe_intermediate_size": data["intermediate_size"],
            "intermediate_size": data.get("dense_intermediate_size") or data["intermediate_size"],
            "norm_topk_prob": True,
            "moe_pattern": _shortest("E" * layers, data.get("moe_pattern"), layers),
        }
    if kind == "haoai":
        return {**fields, **{name: data[name] for name in OWN_EXPERT_FIELDS if data.get(name) is not None}}
    every, dense = _whole({"decoder_sparse_step": 1, **data}, "decoder_sparse_step"), data.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers")
    pattern = "".join("E" if i not in dense and (i + 1) % every == 0 else "D" for i in range(layers))
    if "E" not in pattern:
        return {}  # a dense model under the name of one with experts
    return {**fields, "moe_pattern": _shortest(pattern, data.get("moe_pattern"), layers)}


def _whole(data: dict[str, Any], name: str, most: int | None = None) -> int:
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}={value!r} must be a whole number from 1{'' if most is None else f' to {most:,}'}")
    return value


def _pattern_of_layers(kinds: Any, layers: int) -> str:
    """layer_types in our letters. ValueError for other kinds of attention, and for a list of another length."""
    letters = {"sliding_attention": "S", "full_attention": "L"}
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in letters] if isinstance(kinds, list) else [kinds]
    if unknown:
        raise ValueError(f"layer_types names {unknown[0]!r}, which cannot be read; known: {', '.join(letters)}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}")
    return "".join(letters[kind] for kind in kinds)


def _shortest(pattern: str, own: Any, layers: int) -> str:
    """A pattern read from standard fields, in the words it was set with (`own`, written beside them) where these say the same."""

    def spelled(letters: str) -> str:
        return (letters * layers)[:layers]

    for candidate in (own, pattern[:1]):
        if candidate and isinstance(candidate, str) and spelled(candidate) == spelled(pattern):
            return candidate
    return pattern
