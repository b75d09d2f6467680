"""What GGUF calls the parts of a model: architectures, tensors and ways to cut text. Shared by the exporter and the importer.

Block tensors are written without their `blk.N.` / `model.layers.N.` prefix; shapes are those of transformers (rows first), which
GGUF stores with the axes reversed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import HaoAIConfig
from model.token_text import BYTES

# model_type of transformers -> general.architecture. Mistral and Mixtral are spellings of llama there.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}

MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

BLOCK_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    # Routers: Qwen3-MoE's and Mixtral's name for the same thing.
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
}

# A matrix of one expert -> the tensor (E, rows, columns) that stacks it over all experts of the layer.
EXPERT_TENSORS = {
    "gate_proj.weight": "ffn_gate_exps.weight",
    "up_proj.weight": "ffn_up_exps.weight",
    "down_proj.weight": "ffn_down_exps.weight",
    "w1.weight": "ffn_gate_exps.weight",
    "w3.weight": "ffn_up_exps.weight",
    "w2.weight": "ffn_down_exps.weight",
}

ROPE_FACTORS_TENSOR = "rope_freqs.weight"


def permute_rows(tensor: Tensor, heads: int) -> Tensor:
    """q or k of the architecture `llama`: rows (H*D, ...) from half-split rotation (transformers) to neighbouring pairs (GGUF).

    Within each head row i of the first half and row i of the second half become rows 2i and 2i + 1. Works for biases too.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def unpermute_rows(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `permute_rows`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(inverse_frequency: Tensor, theta: float) -> Tensor:
    """What `rope_freqs.weight` holds, (D/2,): the plain frequency divided by the one in use."""
    size = 2 * inverse_frequency.shape[0]
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / inverse_frequency.double()).float()


def missing_bytes(tokens: Iterable[str]) -> list[str]:
    """The byte tokens that a SentencePiece vocabulary lacks."""
    present = set(tokens)
    return [name for name in BYTE_TOKENS if name not in present]


def exported_context(config: HaoAIConfig) -> int:
    """Tokens up to which llama.cpp, which ignores sliding windows, computes the same: the smallest window, or the whole context."""
    windows = [config.layer_window(layer) for layer in range(config.n_layer)]
    return min([config.max_position_embeddings, *(window for window in windows if window is not None)])


@dataclass(frozen=True)
class PreTokenizer:
    """How a value of `tokenizer.ggml.pre` cuts text before merging.

    patterns: regular expressions applied one after another, each isolating its matches in the pieces left by the one before; bytes
    become letters afterwards. ignore_merges: a piece that is a token as a whole is taken without merging.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    spellings: tuple[tuple[str, ...], ...] = ()
    """Other ways to write the same patterns that stand in tokenizer.json files."""


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SHORT_FORMS_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
_QWEN2 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", GPT2_PATTERN))
PRE_TOKENIZERS = {
    "qwen2": PreTokenizer((_SHORT_FORMS + _QWEN2,), spellings=((_SHORT_FORMS_SPELLED + _QWEN2,),)),
    "llama-bpe": PreTokenizer((_SHORT_FORMS + _LLAMA3,), ignore_merges=True, spellings=((_SHORT_FORMS_SPELLED + _LLAMA3,),)),
    "dbrx": PreTokenizer((_SHORT_FORMS + _LLAMA3,), spellings=((_SHORT_FORMS_SPELLED + _LLAMA3,),)),
    "gpt-2": PreTokenizer((GPT2_PATTERN,)),
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True),
    # What a file without tokenizer.ggml.pre gets.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
}

# Pre-tokenizers that llama.cpp itself only approximates.
INEXACT = {"tekken": "llama.cpp cuts words with accents or combining marks differently, so that their ids may differ there"}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens, tokenizer.ggml.token_type
BYTE_TOKENS = dict.fromkeys(f"<0x{byte:02X}>" for byte in range(BYTES))  # SentencePiece's, in order

# Tokens at which llama.cpp ends a reply by their names alone, whatever the file declares.
KNOWN_STOPS = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"})
