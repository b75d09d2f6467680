"""A GGUF file as a checkpoint directory that SmartHaoAI and transformers load.

python -m tools.convert import-gguf model.gguf weight/imported --dtype bf16

Reads the architectures llama (with experts: mixtral), qwen2, qwen3 and qwen3moe; quantised weights are dequantised one tensor at a
time. What cannot be taken over exactly is refused by name, and nothing is written then.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention import rotary_frequencies
from model.checkpoint import build_model, model_type, save_pretrained, weights_to_disk
from model.config import HaoAIConfig
from model.files import atomic_directory
from model.shapes import without_values
from model.transformer import SmartHaoAI
from tools.convert.gguf_file import GGUFFile
from tools.convert.gguf_import_tokenizer import tokenizer_from_gguf
from tools.convert.gguf_names import (
    ARCHITECTURES,
    BLOCK_TENSORS,
    EXPERT_TENSORS,
    MODEL_TENSORS,
    ROPE_FACTORS_TENSOR,
    llama3_factors,
    unpermute_rows,
)
from tools.convert.hf_export import DTYPES

KNOWN = tuple(dict.fromkeys(ARCHITECTURES.values()))
ROPE_TOLERANCE = 2e-6  # relative: frequencies are stored and computed in fp32
LLAMA3_BANDS = (1.0, 4.0)  # low_freq_factor and high_freq_factor of every published model
LLAMA3_CONTEXT = 8192

# Keys below the architecture's name that change what the model computes, with the value that changes nothing.
MUST_BE = {
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.causal": True,
    "attention.temperature_scale": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 0,
    "embedding_scale": 0,
    "residual_scale": 0,
    "use_parallel_residual": False,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "expert_shared_count": 0,
    "expert_group_count": 0,
    "expert_weights_scale": 0,
    "expert_weights_norm": True,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
ALSO_NEUTRAL = {"logit_scale": 1, "embedding_scale": 1, "residual_scale": 1, "expert_weights_scale": 1}
SOFTMAX_GATING = 1


def import_gguf(
    file: str | Path, out_dir: str | Path, dtype: str = "f32", log: Callable[[str], None] = print, overwrite: bool = False
) -> Path:
    """Write the model and tokenizer of a GGUF file to the directory `out_dir`; returns it.

    dtype: f32, bf16 or f16, the precision of model.safetensors. overwrite: replace an `out_dir` that is not empty. Raises
    FileNotFoundError, and ValueError that names the file and what in it is damaged, missing or not supported; nothing is written then.
    """
    out = Path(out_dir)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise ValueError(f"{out} already exists and is not an empty directory; choose another name, or remove it first")
    source = GGUFFile(file)
    config = config_from_gguf(source)
    weights = GGUFWeights(source, config)
    tokenizer = tokenizer_from_gguf(source, log)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{source.path}: {tokenizer.vocab_size} tokens, but only {config.vocab_size} rows in token_embd.weight")
    formats = sorted({stored.kind.name for stored in source.tensors.values()})
    log(f"{source.path}: {model_type(config)}, {config.account().parameters / 1e6:.1f} M parameters stored as {', '.join(formats)}")
    model = build_model(config, weights, dtype=DTYPES[dtype])
    with atomic_directory(out) as folder:
        save_pretrained(model, folder, tokenizer=tokenizer, dtype=DTYPES[dtype])
    return out


# ----------------------------------------------------------------------------------------------- configuration


def config_from_gguf(file: GGUFFile) -> HaoAIConfig:
    """The shape of the model. ValueError names a key that is missing or asks for what this code base does not compute."""
    arch = file.text("general.architecture")
    if arch not in KNOWN:
        raise ValueError(f"{file.path}: the architecture {arch!r} is not supported; supported: {', '.join(KNOWN)}")
    _refuse_variants(file, arch)
    width, heads = file.integer(f"{arch}.embedding_length"), file.integer(f"{arch}.attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    if heads < 1 or width != embedding.shape[-1]:
        raise ValueError(
            f"{file.path}: {arch}.attention.head_count={heads} and {arch}.embedding_length={width} do not fit "
            f"token_embd.weight {list(embedding.shape)}"
        )
    _check_layers(file, arch)
    try:
        config = HaoAIConfig(
            vocab_size=embedding.shape[0],
            n_layer=file.integer(f"{arch}.block_count"),
            n_head=heads,
            n_kv_head=file.integer(f"{arch}.attention.head_count_kv", heads),
            n_embd=width,
            head_dim=_head_size(file, arch, width, heads),
            max_position_embeddings=file.integer(f"{arch}.context_length"),
            rope_theta=file.number(f"{arch}.rope.freq_base", 10000.0),
            rms_norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            qk_norm=arch in ("qwen3", "qwen3moe"),
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            tie_word_embeddings="output.weight" not in file.tensors,
            **_feed_forward(file, arch),
            **_window(file, arch),
        )
        return dataclasses.replace(config, rope_scaling=_rope_scaling(file, arch, config))
    except (TypeError, ValueError) as error:
        raise error if str(file.path) in str(error) else ValueError(f"{file.path}: {error}") from error


def _refuse_variants(file: GGUFFile, arch: str) -> None:
    for name, neutral in MUST_BE.items():
        value = file.fields.get(f"{arch}.{name}", neutral)
        if value != neutral and value != ALSO_NEUTRAL.get(name, neutral):
            raise ValueError(f"{file.path}: {arch}.{name}={value!r} is not supported, only {neutral!r}")
    gating = file.fields.get(f"{arch}.expert_gating_func", SOFTMAX_GATING)
    if gating not in (0, SOFTMAX_GATING):
        raise ValueError(f"{file.path}: {arch}.expert_gating_func={gating!r} is not supported, only {SOFTMAX_GATING} (softmax)")


def _check_layers(file: GGUFFile, arch: str) -> None:
    """block_count is what the file holds: checked before anything of that many layers is built."""
    layers = {int(found[1]) for found in (re.match(r"blk\.(\d+)\.", name) for name in file.tensors) if found}
    count = file.integer(f"{arch}.block_count")
    if layers != set(range(min(count, len(file.tensors)))) or not layers:
        raise ValueError(f"{file.path}: {arch}.block_count={count}, but the file holds tensors of {len(layers)} layers")


def _head_size(file: GGUFFile, arch: str, width: int, heads: int) -> int:
    size = file.integer(f"{arch}.attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.integer(f"{arch}.{name}", size) != size:
            raise ValueError(f"{file.path}: {arch}.{name}={file.integer(f'{arch}.{name}')} differs from the head's width {size}")
    return size


def _feed_forward(file: GGUFFile, arch: str) -> dict[str, Any]:
    experts = file.integer(f"{arch}.expert_count", 0)
    if not experts:
        return {"intermediate_size": file.integer(f"{arch}.feed_forward_length")}
    largest = max((stored.shape[0] for name, stored in file.tensors.items() if name.endswith("_exps.weight")), default=0)
    if experts > largest:
        raise ValueError(f"{file.path}: {arch}.expert_count={experts}, but its tensors stack {largest} experts")
    size = file.integer(f"{arch}.expert_feed_forward_length", file.integer(f"{arch}.feed_forward_length", 0) or None)
    layers = range(file.integer(f"{arch}.block_count"))
    return {
        "intermediate_size": file.integer(f"{arch}.feed_forward_length", size),
        "moe_intermediate_size": size,
        "n_expert": experts,
        "n_expert_per_token": file.integer(f"{arch}.expert_used_count"),
        "moe_pattern": "".join("E" if f"blk.{layer}.ffn_gate_inp.weight" in file.tensors else "D" for layer in layers),
    }


def _window(file: GGUFFile, arch: str) -> dict[str, Any]:
    """A sliding window in every layer, which of these architectures only Mistral has."""
    key = f"{arch}.attention.sliding_window"
    size = file.integer(key, 0)
    if not size or size >= file.integer(f"{arch}.context_length"):
        return {}
    if arch != "llama" or f"{arch}.attention.sliding_window_pattern" in file.fields:
        raise ValueError(f"{file.path}: {key}={size} is not supported for {arch}: the file does not say which layers have the window")
    return {"use_sliding_window": True, "window_size": size, "window_pattern": "S"}


def _rope_scaling(file: GGUFFile, arch: str, config: HaoAIConfig) -> dict[str, Any] | None:
    kind = file.text(f"{arch}.rope.scaling.type", "linear" if f"{arch}.rope.scale_linear" in file.fields else "none")
    factor = file.number(f"{arch}.rope.scaling.factor", file.number(f"{arch}.rope.scale_linear", 1.0)) or 1.0
    attention = file.number(f"{arch}.rope.scaling.attn_factor", 1.0)
    if attention != 1.0 and kind != "yarn":
        raise ValueError(f"{file.path}: {arch}.rope.scaling.attn_factor={attention} is supported with the scaling type yarn only")
    scaling: dict[str, Any] | None = None
    if kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        original = file.integer(f"{arch}.rope.scaling.original_context_length", config.max_position_embeddings)
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for ours in ("beta_fast", "beta_slow"):
            if f"{arch}.rope.scaling.yarn_{ours}" in file.fields:
                scaling[ours] = file.number(f"{arch}.rope.scaling.yarn_{ours}")
        if attention != 1.0:
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    elif kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: {arch}.rope.scaling.type={kind!r} is not supported; supported: none, linear, yarn")
    if ROPE_FACTORS_TENSOR not in file.tensors:
        return scaling
    if scaling is not None:
        raise ValueError(f"{file.path} has both {ROPE_FACTORS_TENSOR} and {arch}.rope.scaling.type={kind!r}, which is not supported")
    return _llama3_scaling(file, arch, config)


def _llama3_scaling(file: GGUFFile, arch: str, config: HaoAIConfig) -> dict[str, Any] | None:
    """The parameters of Llama 3's frequency bands behind the divisors in `rope_freqs.weight` (D/2,).

    Between the bands 1 / divisor is linear in the frequency, so two such points give the line. Tried are the published bands first,
    then those of the line; what does not give the stored divisors again is refused.
    """
    stored = file.tensors[ROPE_FACTORS_TENSOR]
    if stored.shape != (config.head_size // 2,):
        raise ValueError(f"{file.path}: {ROPE_FACTORS_TENSOR} has shape {list(stored.shape)}, not [{config.head_size // 2}]")
    file.check_format(ROPE_FACTORS_TENSOR)
    divisors = file.read(ROPE_FACTORS_TENSOR).double()
    if not bool((divisors > 0).all()):
        raise ValueError(f"{file.path}: {ROPE_FACTORS_TENSOR} must hold positive numbers")
    if bool((divisors == 1).all()):
        return None
    factor = float(f"{divisors.max().item():.6g}")
    low, high = LLAMA3_BANDS
    key = f"{arch}.rope.scaling.original_context_length"
    contexts = [file.integer(key)] if key in file.fields else [LLAMA3_CONTEXT, config.max_position_embeddings]
    tries = [(context, low, high) for context in contexts]
    plain = config.rope_theta ** -(torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size)
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if int(between.sum()) >= 2:
        blend = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        line = torch.linalg.lstsq(torch.stack((plain[between], torch.ones_like(blend)), dim=1), blend[:, None]).solution[:, 0].tolist()
        if line[0] > 0 > line[1]:  # blend = (context * frequency / 2 pi - low) / (high - low); only ratios matter, so low = 1
            high = 1 - 1 / line[1]
            tries.append((round(line[0] * 2 * math.pi * (high - low)), low, float(f"{high:.6g}")))
    for context, low, high in tries:
        scaling: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        found = llama3_factors(rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling))[0], config.rope_theta).double()
        if float((found / divisors - 1).abs().max()) <= ROPE_TOLERANCE:
            return scaling
    raise ValueError(f"{file.path}: {ROPE_FACTORS_TENSOR} is not one of Llama 3's scalings; such frequencies cannot be imported")


# ----------------------------------------------------------------------------------------------------- weights


class GGUFWeights:
    """The tensors of a GGUF file under the key names of transformers, dequantised one at a time (a `WeightSource`).

    Raises ValueError when a tensor of the file has no place in these architectures or a format that cannot be dequantised.
    """

    def __init__(self, source: GGUFFile, config: HaoAIConfig) -> None:
        self.file = source.path
        self._source = source
        arch = source.text("general.architecture")
        self._rotated_heads = {"q_proj": config.n_head, "k_proj": config.kv_heads} if arch == "llama" else {}
        self._places: dict[str, tuple[str, int | None]] = {}  # transformers' name -> name in the file, expert
        mixtral = model_type(config) == "mixtral"
        plain = {theirs: ours for ours, theirs in MODEL_TENSORS.items()}
        # Mixtral and Qwen3-MoE write the router and the experts differently.
        other_router = "mlp.gate.weight" if mixtral else "block_sparse_moe.gate.weight"
        block = {theirs: ours for ours, theirs in BLOCK_TENSORS.items() if ours != other_router}
        expert = {theirs: ours for ours, theirs in EXPERT_TENSORS.items() if ours.startswith("w") == mixtral}
        folder = "block_sparse_moe" if mixtral else "mlp"
        for name, stored in source.tensors.items():
            if name == ROPE_FACTORS_TENSOR:
                continue
            source.check_format(name)
            layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
            if name in plain:
                self._places[plain[name]] = (name, None)
            elif layer and layer[2] in block:
                self._places[f"model.layers.{layer[1]}.{block[layer[2]]}"] = (name, None)
            elif layer and layer[2] in expert and len(stored.shape) == 3:
                for index in range(stored.shape[0]):
                    self._places[f"model.layers.{layer[1]}.{folder}.experts.{index}.{expert[layer[2]]}"] = (name, index)
            else:
                raise ValueError(f"{source.path}: the tensor {name} {list(stored.shape)} has no place in the architecture {arch}")
        self._check(config)

    def _check(self, config: HaoAIConfig) -> None:
        """Names and shapes against the metadata, before anything of that size is allocated."""
        with without_values():
            expected = weights_to_disk(SmartHaoAI(config).state_dict(), config)
        shapes = self.shapes()
        missing, surplus = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        if missing:
            raise ValueError(f"{self.file} lacks {len(missing)} tensors, among them that of {missing[0]}")
        if surplus:
            raise ValueError(f"{self.file}: the tensor {self._places[surplus[0]][0]} does not fit the metadata ({surplus[0]})")
        for name, tensor in expected.items():
            if shapes[name] != tuple(tensor.shape):
                raise ValueError(
                    f"{self.file}: the tensor {self._places[name][0]} has shape {list(shapes[name])}, "
                    f"the metadata asks for {list(tensor.shape)}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        shapes = {name: self._source.tensors[stored].shape for name, (stored, _) in self._places.items()}
        return {name: shape[1:] if self._places[name][1] is not None else shape for name, shape in shapes.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor in fp32, rows of q and k in the order of half-split rotation."""
        stored, expert = self._places[name]
        tensor = self._source.read(stored, expert)
        heads = self._rotated_heads.get(name.split(".")[-2])
        return tensor if heads is None else unpermute_rows(tensor, heads)


__all__ = ["GGUFWeights", "config_from_gguf", "import_gguf"]
