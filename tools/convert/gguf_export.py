"""A checkpoint as one GGUF file for llama.cpp, LM Studio and Ollama, and the proof by running it there.

python -m tools.convert gguf weight/sft model.gguf --dtype q8_0

What llama.cpp's graphs cannot compute is refused with the setting that stands in the way. Norms, biases and routers stay F32 in every
type. Quantised types apply to matrices whose rows are whole blocks of 32 numbers, the rest is F16; q4_0 keeps the embedding and the
output matrix in Q8_0, because errors there reach every token.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention import rotary_frequencies
from model.checkpoint import find_model, finished_config, load_config, load_finished, model_type, portability_notes, weights_to_disk
from model.config import HaoAIConfig
from model.files import sync, temporary_name
from model.tokenizer import BPETokenizer
from tools.convert.gguf_check import check_gguf
from tools.convert.gguf_file import require_gguf
from tools.convert.gguf_names import (
    ARCHITECTURES,
    BLOCK_TENSORS,
    EXPERT_TENSORS,
    MODEL_TENSORS,
    ROPE_FACTORS_TENSOR,
    exported_context,
    llama3_factors,
    permute_rows,
)
from tools.convert.gguf_tokenizer import gguf_tokenizer

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}  # dtype -> general.file_type
BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0
LARGEST_F16 = 65504.0
Log = Callable[[str], None]


@dataclass
class Entry:
    """One tensor of the file; `make` gives its values when they are written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def export_gguf(folder: str | Path, out_file: str | Path, dtype: str = "f32", log: Log = print) -> Path:
    """Write the model, tokenizer and chat template of `folder` to `out_file`; an error leaves nothing there.

    dtype: f32, f16, bf16, q8_0 or q4_0. Raises ValueError for what GGUF or llama.cpp cannot express.
    """
    gguf = require_gguf()
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype={dtype!r} is not a type of this export; known: {', '.join(FILE_TYPES)}")
    folder, out_file = find_model(folder), Path(out_file)
    tokenizer = BPETokenizer.from_pretrained(folder)
    config = finished_config(load_config(folder))
    check_expressible(config)
    model = load_finished(folder, log)
    vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, log)
    entries = list(_entries(weights_to_disk(model.state_dict(), config), config))
    arch = ARCHITECTURES[model_type(config)]
    out_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out_file)
    writer = gguf.GGUFWriter(temporary, arch)
    try:
        writer.add_type("model")
        writer.add_name(folder.resolve().name)
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_shape(writer, arch, config, log)
        vocabulary.write(writer)
        _write_tensors(writer, entries, dtype, log)
        writer.close()
        sync(temporary)
        os.replace(temporary, out_file)
    except OSError as error:  # numpy counts bytes and names no file
        raise OSError(f"{out_file} could not be written: {error}") from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    log(f"wrote {out_file} ({out_file.stat().st_size / 2**20:.1f} MiB, {arch}, {dtype})")
    return out_file


def check_expressible(config: HaoAIConfig) -> None:
    """Raise ValueError, naming the settings, when no architecture of llama.cpp computes this model."""
    kind = model_type(config)
    if kind not in ARCHITECTURES:
        raise ValueError(f"GGUF has no architecture for this model: {'; '.join(portability_notes(config))}")
    problems = []
    sparse = [layer for layer in range(config.n_layer) if config.layer_is_sparse(layer)]
    if sparse and len(sparse) < config.n_layer:
        problems.append(f"moe_pattern={config.moe_pattern!r}: llama.cpp wants experts in every layer")
    if sparse and not config.norm_topk_prob and config.n_expert_per_token < config.n_expert:
        problems.append("norm_topk_prob=false: llama.cpp always renormalises the weights of the chosen experts")
    if kind == "qwen2" and config.n_head * config.head_size != config.n_embd:
        problems.append(f"head_dim={config.head_size}: llama.cpp wants n_head * head_dim = n_embd in the architecture qwen2")
    scaling = config.rope_scaling or {}
    if config.rope_type == "llama3" and ARCHITECTURES[kind] != "llama":
        problems.append(f"rope_scaling rope_type=llama3: llama.cpp has it for the architecture llama only, not for {kind}")
    if config.rope_type == "yarn":
        if not scaling.get("truncate", True):
            problems.append("rope_scaling truncate=false: llama.cpp always truncates YaRN's range")
        for field, usual in (("beta_fast", 32), ("beta_slow", 1)):
            if float(scaling.get(field) or usual) != usual:
                problems.append(f"rope_scaling {field}={scaling[field]}: llama.cpp takes {usual} for this architecture")
    if problems:
        raise ValueError("llama.cpp cannot run this model: " + "; ".join(problems))


def _write_shape(writer: Any, arch: str, config: HaoAIConfig, log: Log) -> None:
    """All `<arch>.*` fields."""
    context = exported_context(config)
    if context < config.max_position_embeddings:
        log(
            f"note: llama.cpp ignores sliding windows; context_length is limited to the window, {context} instead of "
            f"{config.max_position_embeddings} tokens, where both compute the same"
        )
    writer.add_block_count(config.n_layer)
    writer.add_context_length(context)
    writer.add_embedding_length(config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    width = config.ffn_size
    if config.layer_is_sparse(0):
        width = config.expert_size
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_per_token)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(width)
    writer.add_feed_forward_length(width)
    scaling = config.rope_scaling or {}
    kind = config.rope_type
    if kind not in ("linear", "yarn"):
        return
    factor = float(scaling["factor"])
    writer.add_string(f"{arch}.rope.scaling.type", kind)
    writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings))
        # llama.cpp scales cos and sin by YaRN's own 1 + ln(factor) / 10 and by this on top.
        own = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rotary_frequencies(config)[1] / own)


def _entries(weights: dict[str, Tensor], config: HaoAIConfig) -> Iterator[Entry]:
    """The file's tensors in writing order, from weights in transformers' names: q and k permuted, experts stacked."""
    permuted = ARCHITECTURES[model_type(config)] == "llama"
    heads = {"q_proj": config.n_head, "k_proj": config.kv_heads}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        if name in MODEL_TENSORS:
            yield _entry(MODEL_TENSORS[name], tensor)
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if found is None:
            raise ValueError(f"GGUF has no name for the tensor {name}")
        block, part = f"blk.{found[1]}.", found[2]
        expert = re.fullmatch(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(.+)", part)
        if expert is not None:
            stack = experts.setdefault(block + EXPERT_TENSORS[expert[2]], [])
            assert len(stack) == int(expert[1]), "experts come in order"
            stack.append(tensor)
            continue
        if part not in BLOCK_TENSORS:
            raise ValueError(f"GGUF has no name for the tensor {name}")
        module = part.split(".")[1]
        if permuted and module in heads:
            tensor = permute_rows(tensor, heads[module])
        yield _entry(block + BLOCK_TENSORS[part], tensor)
    for name, stack in experts.items():
        yield Entry(name, (len(stack), *stack[0].shape), lambda stack=stack: torch.stack(stack))  # type: ignore[misc]
    if config.rope_type == "llama3":
        yield _entry(ROPE_FACTORS_TENSOR, llama3_factors(rotary_frequencies(config)[0], config.rope_theta))


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), lambda: tensor)


def _storage_type(entry: Entry, dtype: str) -> str:
    if len(entry.shape) == 1 or "ffn_gate_inp" in entry.name:
        return "f32"
    if dtype in ("q8_0", "q4_0"):
        if entry.shape[-1] % BLOCK:
            return "f16"
        if entry.name in ("token_embd.weight", "output.weight"):
            return "q8_0"
    return dtype


def _write_tensors(writer: Any, entries: list[Entry], dtype: str, log: Log) -> None:
    """Table of tensors first, then their values one at a time, so that only one is converted in memory."""
    gguf = require_gguf()
    types = {entry.name: gguf.GGMLQuantizationType[_storage_type(entry, dtype).upper()] for entry in entries}
    for entry in entries:
        kind = types[entry.name]
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype("float32"), 4 * math.prod(entry.shape))
        else:
            stored = gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
            writer.add_tensor_info(entry.name, stored, np.dtype("uint8"), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        values = entry.make().detach().to("cpu", torch.float32).contiguous()
        if types[entry.name] == gguf.GGMLQuantizationType.F16 and values.abs().max() > LARGEST_F16:
            raise ValueError(f"{entry.name} holds {values.abs().max():.3g}, more than F16 can: export as bf16 or f32")
        data = gguf.quants.quantize(values.numpy(), types[entry.name])
        writer.write_tensor_data(data.view(np.uint8) if types[entry.name] == gguf.GGMLQuantizationType.F16 else data)
    counts: dict[str, int] = {}
    for kind in types.values():
        counts[kind.name] = counts.get(kind.name, 0) + 1
    log(f"{len(entries)} tensors: " + ", ".join(f"{count} in {name}" for name, count in counts.items()))
    odd = [entry.name for entry in entries if dtype in ("q8_0", "q4_0") and types[entry.name].name == "F16"]
    if odd:
        log(f"note: {len(odd)} tensors stay F16, their rows are no multiple of {BLOCK} ({', '.join(odd[:3])} ...)")


__all__ = ["FILE_TYPES", "check_expressible", "check_gguf", "export_gguf"]
