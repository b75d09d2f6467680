"""A model directory in the layout of transformers: config.json, model.safetensors, the tokenizer's files.

What only standard parts make up is written as `qwen3` (QK-norm) or `llama` and loads there unchanged; the rest is written as
`haoai` with every field. This file owns the translation of names; inside, q/k/v and gate/up are fused, on disk they are not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import HaoAIConfig
from model.files import TEMPORARY_SUFFIX, atomic_directory, atomic_write_text, recover_directory, sync

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer
    from model.transformer import SmartHaoAI

WEIGHTS_FILE, CONFIG_FILE, GENERATION_FILE = "model.safetensors", "config.json", "generation_config.json"
RESULTS_FOLDER = "weight"  # local by convention: a name in it is never looked up online
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "haoai": "SmartHaoAI"}

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


def save_pretrained(model: SmartHaoAI, path: str | Path, tokenizer: BPETokenizer | None = None) -> None:
    """Write (or replace) the model files of `path`; other files that stand there are kept."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
        generation = {
            "eos_token_id": [tokenizer.im_end_id, tokenizer.document_end_id],
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
        }
        atomic_write_text(path / GENERATION_FILE, json.dumps(generation, indent=2) + "\n")
    config = config_to_disk(model.config, tokenizer)
    save_weights(weights_to_disk(model.state_dict(), model.config), path / WEIGHTS_FILE)
    atomic_write_text(path / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load_pretrained(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SmartHaoAI:
    """Read a model directory. FileNotFoundError or ValueError say what is missing or does not fit."""
    from model.transformer import SmartHaoAI

    path = find_model(path)
    config = load_config(path)
    weights = weights_from_disk(load_weights(path / WEIGHTS_FILE), config, path / WEIGHTS_FILE)
    with torch.device("meta"):
        model = SmartHaoAI(config)
    model.load_state_dict({name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}, assign=True)
    for module in model.modules():
        if hasattr(module, "inverse_frequency"):
            from model.attention import rotary_frequencies

            module.inverse_frequency = rotary_frequencies(config)[0].to(device)
    return model.eval()


def find_model(path: str | Path) -> Path:
    """The directory itself, or that of a hub name ("org/name") fetched through huggingface_hub. FileNotFoundError otherwise."""
    folder = Path(path)
    recover_directory(folder)
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.exists() or Path(path).is_absolute() or str(path).count("/") != 1 or str(path).startswith("."):
        raise FileNotFoundError(f"{folder} is not a model directory: it has no {CONFIG_FILE}")
    if folder.parts[0] == RESULTS_FOLDER:
        stage = folder.name if folder.name in ("pretrain", "sft") else "pretrain"
        raise FileNotFoundError(
            f"there is no model at {folder}; train it first: `python -m train.train_{stage}`, or name another with model_dir=..."
        )
    if folder.parent.is_dir():
        raise FileNotFoundError(f"there is no model at {folder} (its folder {folder.parent} exists, this name does not)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"there is no folder {folder}, and huggingface_hub is not installed to look for it online") from error
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no permission
        raise FileNotFoundError(
            f"there is no folder {folder}, and the model hub could not give {path!r} ({type(error).__name__}); check the name, or go online"
        ) from error


def load_config(path: str | Path) -> HaoAIConfig:
    """The HaoAIConfig of a model directory. ValueError names what this code base cannot express."""
    file = Path(path) / CONFIG_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not a model directory: it has no {CONFIG_FILE}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return config_from_disk(data, file)


def config_to_disk(config: HaoAIConfig, tokenizer: BPETokenizer | None = None) -> dict[str, Any]:
    """config.json with the old and the new spellings of every field that was renamed."""
    kind = model_type(config)
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "dtype": "float32",
        "transformers_version": "4.51.0",
    }
    for ours, theirs in FIELD_NAMES.items():
        data[theirs] = getattr(config, ours)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    data.update(rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, rope_parameters=rope)
    if kind == "qwen3":
        windows = [config.layer_window(i) for i in range(config.n_layer)]
        data.update(
            use_sliding_window=config.use_sliding_window,
            sliding_window=config.window_size if config.use_sliding_window else None,
            layer_types=["full_attention" if w is None else "sliding_attention" for w in windows],
            max_window_layers=next((i for i, w in enumerate(windows) if w is not None), config.n_layer),
        )
    if config.use_sliding_window or kind == "haoai":
        data.update(window_pattern=config.window_pattern, window_size=config.window_size)
    if config.eos_token_id is not None:
        data["eos_token_id"] = config.eos_token_id
    if kind == "haoai":
        data.update(qk_norm=config.qk_norm, use_sliding_window=config.use_sliding_window)
    if tokenizer is not None:
        data.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    return data


def model_type(config: HaoAIConfig) -> str:
    """The architecture of transformers that computes exactly this model; `haoai` when there is none."""
    if config.qk_norm:
        return "qwen3"
    return "haoai" if config.use_sliding_window else "llama"


def config_from_disk(data: dict[str, Any], file: Path) -> HaoAIConfig:
    kind = data.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type={kind!r} cannot be read; known: {', '.join(ARCHITECTURES)}")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act={data['hidden_act']!r} is not supported, only 'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if data.get(field):
            raise ValueError(f"{file}: {field}=true is not supported")
    fields = {ours: data[theirs] for ours, theirs in FIELD_NAMES.items() if data.get(theirs) is not None}
    if kind != "haoai":
        fields.setdefault("tie_word_embeddings", False)  # what transformers assumes when the field is absent
    rope = dict(data.get("rope_parameters") or {})
    old = data.get("rope_scaling") or {}
    fields["rope_theta"] = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    partial = {**old, **rope, **data}.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ValueError(f"{file}: partial_rotary_factor={partial!r} is not supported, only 1")
    scaling = {k: v for k, v in {**old, **rope}.items() if v is not None and k != "partial_rotary_factor"}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        fields["rope_scaling"] = scaling
    fields["eos_token_id"] = data.get("eos_token_id")
    fields["qk_norm"] = data.get("qk_norm", False) if kind == "haoai" else kind == "qwen3"
    try:
        if kind != "llama":  # transformers has no windows there, whatever the file says
            fields.update(_windows_from_disk(data))
        return HaoAIConfig(**fields)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _windows_from_disk(data: dict[str, Any]) -> dict[str, Any]:
    size = data.get("sliding_window") or data.get("window_size")
    if not data.get("use_sliding_window") or not size:
        return {}
    layers = int(data["num_hidden_layers"])
    types = data.get("layer_types")
    if data.get("window_pattern"):
        pattern = data["window_pattern"]
    elif types:
        pattern = "".join("S" if t == "sliding_attention" else "L" for t in types)
    else:
        first = int(data.get("max_window_layers") or 0)
        pattern = "L" * min(first, layers) + "S" * max(layers - first, 0)
    return {"use_sliding_window": True, "window_size": int(size), "window_pattern": pattern}


def weights_to_disk(state: dict[str, Tensor], config: HaoAIConfig) -> dict[str, Tensor]:
    """Our state dict -> transformers' key names, fused matrices split."""
    heads = [config.n_head * config.head_size, config.kv_heads * config.head_size, config.kv_heads * config.head_size]
    disk = {}
    for name, tensor in state.items():
        prefix = "" if name.startswith("lm_head.") else "model."
        if ".qkv_proj." in name:
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.split(heads), strict=True))
            disk.update({prefix + name.replace("qkv_proj", part): value for part, value in parts.items()})
        elif ".gate_up_proj." in name:
            disk.update(
                {
                    prefix + name.replace("gate_up_proj", part): value
                    for part, value in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
                }
            )
        else:
            disk[prefix + name] = tensor
    return disk


def weights_from_disk(disk: dict[str, Tensor], config: HaoAIConfig, file: Path) -> dict[str, Tensor]:
    """transformers' key names -> our state dict; the inverse of `weights_to_disk`. ValueError names a tensor of `file` that is
    missing, not expected or of another shape."""
    disk = {name: tensor for name, tensor in disk.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        disk.pop("lm_head.weight", None)
    _check_weights(disk, config, file)
    state: dict[str, Tensor] = {}
    for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for name in [n for n in disk if f".{parts[0]}." in n]:
            others = [name.replace(parts[0], part) for part in parts]
            state[name.replace(parts[0], fused).removeprefix("model.")] = torch.cat([disk.pop(n) for n in others])
    state.update({name.removeprefix("model."): tensor for name, tensor in disk.items()})
    return state


def _check_weights(weights: dict[str, Tensor], config: HaoAIConfig, file: Path) -> None:
    from model.transformer import SmartHaoAI

    with torch.device("meta"):
        model = SmartHaoAI(config)
    expected = {name: tuple(p.shape) for name, p in weights_to_disk(model.state_dict(), config).items()}
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{file} does not fit its config.json: missing {missing[:4]}, not expected {extra[:4]}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{file}: {name} has shape {tuple(weights[name].shape)}, config.json asks for {shape}")


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors under a temporary name, then rename."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary, metadata={"format": "pt"})
    sync(temporary)
    os.replace(temporary, file)


def load_weights(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError when it is cut off or not safetensors."""
    if not file.is_file():
        raise FileNotFoundError(f"the weights {file} are missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}") from error


__all__ = [
    "atomic_directory",
    "config_from_disk",
    "config_to_disk",
    "find_model",
    "load_config",
    "load_pretrained",
    "load_weights",
    "model_type",
    "save_pretrained",
    "save_weights",
    "weights_from_disk",
    "weights_to_disk",
]
