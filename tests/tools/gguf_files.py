"""GGUF files for the importer's tests, written with the `gguf` package from a model and a tokenizer: names and layout spelled out here,
independently of the exporter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.checkpoint import weights_to_disk

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

NAMES = [
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("block_sparse_moe.gate.", "ffn_gate_inp."),
    ("mlp.gate.", "ffn_gate_inp."),
    ("block_sparse_moe.experts.", "experts."),
    ("mlp.experts.", "experts."),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
]
EXPERT_MATRICES = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def random_model(seed_config: dict[str, Any]) -> SmartHaoAI:
    """A random model, weights large enough that every part matters."""
    shape = {
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
        "head_dim": 32,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
    }
    model = SmartHaoAI(HaoAIConfig(**{"initializer_range": 0.1, **shape, **seed_config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    return model


def model_fields(config: HaoAIConfig, arch: str) -> dict[str, Any]:
    """The metadata that describes the shape."""
    fields: dict[str, Any] = {
        "block_count": config.n_layer,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.n_expert:
        fields |= {"expert_count": config.n_expert, "expert_used_count": config.n_expert_per_token}
        fields["expert_feed_forward_length"] = config.expert_size
        if arch == "llama":
            fields["feed_forward_length"] = config.expert_size
    return {f"{arch}.{name}": value for name, value in fields.items()}


def model_tensors(model: SmartHaoAI, arch: str) -> dict[str, np.ndarray]:
    """Every weight as fp32 under its GGUF name; q and k of `llama` with neighbouring rotation pairs, experts stacked."""
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, weight in weights_to_disk(model.state_dict(), model.config).items():
        data = weight.detach().numpy().copy()
        heads = {"q_proj": model.config.n_head, "k_proj": model.config.kv_heads}.get(name.split(".")[-2])
        if heads is not None and arch == "llama":
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        for old, new in NAMES:
            name = name.replace(old, new)
        if ".experts." in name:
            block, _, rest = name.partition(".experts.")
            stacks.setdefault(f"{block}.ffn_{EXPERT_MATRICES[rest.split('.')[1]]}_exps.weight", []).append(data)
        else:
            tensors[name] = data
    return tensors | {name: np.stack(parts) for name, parts in stacks.items()}


def tokenizer_fields(tokenizer: BPETokenizer, rows: int | None = None) -> dict[str, Any]:
    """The metadata of a tokenizer of our own, padded with unused tokens to `rows`."""
    data = json.loads(tokenizer.backend.to_str())
    added = {token["id"]: token for token in data["added_tokens"]}
    count = tokenizer.vocab_size
    kinds = [(CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL for i in range(count)]
    pads = range(count, rows or count)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [tokenizer.backend.id_to_token(i) for i in range(count)] + [f"[PAD{i}]" for i in pads],
        "tokenizer.ggml.token_type": kinds + [UNUSED for _ in pads],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.bos_token_id": tokenizer.document_end_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def write_gguf(path: Path, arch: str, fields: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32") -> Path:
    """Write a file; matrices are quantised as `kind`, vectors stay fp32. A field that is None is left out."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, data in tensors.items():
        if data.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(data))
        elif kind == "F16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
