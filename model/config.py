"""HaoAIConfig: the shape of a model, its presets, and what it will cost before anything is allocated.

HaoAIConfig(vocab_size=16384, n_layer=8, n_head=8, n_kv_head=4, n_embd=512)
HaoAIConfig.preset("nano", vocab_size=6400)
HaoAIConfig.from_depth(12)                      # one dial: width, heads and feed-forward follow the depth
HaoAIConfig.preset("mini").account().table()    # parameters, FLOPs, memory
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

ROPE_SCALING_TYPES = ("linear", "yarn", "llama3")
ROPE_SCALING_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
HEAD_DIM = 64
FEED_FORWARD_MULTIPLE = 64
EXPERT_MULTIPLE = 32
PREFILL_BLOCK = 256
MOST_PARTS = 2**16  # layers, and experts of a layer: more is a damaged file, not a model


@dataclass
class HaoAIConfig:
    """Everything that decides the tensors of a `SmartHaoAI` model. Plain values only; sizes left at None are derived."""

    vocab_size: int = 16384
    """Number of token ids."""
    n_layer: int = 8
    """Number of Transformer blocks."""
    n_head: int = 8
    """Number of query heads."""
    n_kv_head: int | None = None
    """Number of key/value heads (grouped-query attention); None: as many as query heads."""
    n_embd: int = 512
    """Width of the residual stream."""
    head_dim: int | None = None
    """Width of one head; None: n_embd / n_head."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer; None: 8/3 of n_embd, rounded up to a multiple of 64."""
    max_position_embeddings: int = 2048
    """Longest sequence (context) in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """Context extension: {"rope_type": "linear" | "yarn" | "llama3", "factor": ..., ...} with the fields of transformers."""
    rms_norm_eps: float = 1e-6
    """Epsilon inside the root of RMSNorm."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    tie_word_embeddings: bool = True
    """The output head shares the embedding matrix."""
    dropout: float = 0.0
    """Dropout on the output of each residual branch, in training."""
    attention_dropout: float = 0.0
    """Dropout on attention weights, in training."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get it over sqrt(2 * n_layer)."""
    eos_token_id: int | list[int] | None = None
    """Token (or tokens) at which generation ends unless it is told otherwise; a tokenizer saved with the model sets it."""
    use_cache: bool = True
    """Generation keeps keys and values of earlier tokens."""
    use_sliding_window: bool = False
    """Layers marked S in window_pattern see only the last window_size tokens."""
    window_size: int = 512
    """Keys a windowed layer attends to, the token itself included."""
    window_pattern: str = "SSSL"
    """One letter a layer, repeated: S sliding window, L full attention."""
    n_expert: int = 0
    """Mixture of experts: feed-forward experts per layer, of which each token uses a few; 0: one dense feed-forward layer."""
    n_expert_per_token: int = 2
    """Experts that compute each token."""
    moe_intermediate_size: int | None = None
    """Width of one expert; None: intermediate_size / n_expert_per_token, so that a token costs what it costs in the dense model."""
    moe_pattern: str = "E"
    """One letter a layer, repeated: E experts, D dense."""
    norm_topk_prob: bool = True
    """The weights of a token's experts add up to 1."""
    router_aux_loss_coef: float = 0.01
    """Weight of the balance loss (Fedus et al., 2021), which asks for equal use of the experts."""
    router_balance_scope: str = "layer"
    """layer: the balance loss asks it of every layer; model: of the mean over all layers, as transformers computes it."""
    router_z_loss_coef: float = 0.0
    """Weight of the z-loss (Zoph et al., 2022), which keeps router logits small. Training only: costs no portability."""
    router_bias_rate: float = 0.0
    """Balance without a loss (Wang et al., 2024): a bias on the choice of experts, moved by this much a step against their load.
    0.001 is usual. The bias stays in the model, which transformers' qwen3_moe and mixtral and llama.cpp cannot express."""
    n_shared_expert: int = 0
    """Experts of moe_intermediate_size that compute every token besides the chosen ones. Not expressible as qwen3_moe or mixtral."""

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            if self.n_head > 0 and self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; set head_dim, or change one")
            self.head_dim = self.n_embd // max(self.n_head, 1)
        if self.intermediate_size is None:
            self.intermediate_size = _round_up(self.n_embd * 8 / 3, FEED_FORWARD_MULTIPLE)
        if self.n_expert and self.moe_intermediate_size is None:
            self.moe_intermediate_size = _round_up(self.ffn_size / max(self.n_expert_per_token, 1), EXPERT_MULTIPLE)
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "window_size",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("n_layer", "n_expert"):
            if isinstance(getattr(self, name), int) and getattr(self, name) > MOST_PARTS:
                raise ValueError(f"{name}={getattr(self, name)} is more than any model has (at most {MOST_PARTS:,})")
        for name in ("qk_norm", "attention_bias", "tie_word_embeddings", "use_cache", "use_sliding_window", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding turns pairs")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if value != 0 and not (_is_positive(value) and value < 1.0):
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        if self.use_sliding_window and (not self.window_pattern or set(self.window_pattern) - set("SL")):
            raise ValueError(f"window_pattern must consist of S (window) and L (full), not {self.window_pattern!r}")
        if isinstance(self.n_expert, bool) or not isinstance(self.n_expert, int) or self.n_expert < 0:
            raise ValueError(f"n_expert must be 0 (dense) or a number of experts, not {self.n_expert!r}")
        if self.n_expert:
            self._check_experts()
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id or 0]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ends):
            raise ValueError(f"eos_token_id must be a token id or a list of them, not {self.eos_token_id!r}")
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)

    def _check_rope_scaling(self, scaling: Any) -> None:
        if not isinstance(scaling, dict):
            raise ValueError(f"rope_scaling must be a mapping such as {{'rope_type': 'yarn', 'factor': 4}}, not {scaling!r}")
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in ROPE_SCALING_TYPES:
            raise ValueError(f"rope_scaling rope_type={kind!r} is unknown; known: {', '.join(ROPE_SCALING_TYPES)}")
        if "factor" not in scaling:
            raise ValueError("rope_scaling needs a 'factor' (how many times longer the context becomes)")
        for name in ROPE_SCALING_NUMBERS:
            if (name == "factor" or scaling.get(name) is not None) and not _is_positive(scaling[name]):
                raise ValueError(f"rope_scaling {name} must be a positive number, not {scaling[name]!r}")
        low, high = scaling.get("low_freq_factor") or 1, scaling.get("high_freq_factor") or 4
        if kind == "llama3" and not low < high:
            raise ValueError(f"rope_scaling low_freq_factor={low!r} must be smaller than high_freq_factor={high!r}")
        if kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_scaling yarn needs a rope_theta above 1, not {self.rope_theta!r}")

    def _check_experts(self) -> None:
        per_token = self.n_expert_per_token
        if isinstance(per_token, bool) or not isinstance(per_token, int) or not 1 <= per_token <= self.n_expert:
            raise ValueError(f"n_expert_per_token={self.n_expert_per_token} must lie between 1 and n_expert={self.n_expert}")
        if not isinstance(self.moe_intermediate_size, int) or self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size must be a positive integer, not {self.moe_intermediate_size!r}")
        if not self.moe_pattern or set(self.moe_pattern) - set("ED"):
            raise ValueError(f"moe_pattern must consist of E (experts) and D (dense), not {self.moe_pattern!r}")
        if not any(self.layer_is_sparse(layer) for layer in range(self.n_layer)):
            raise ValueError(f"moe_pattern={self.moe_pattern!r} gives none of {self.n_layer} layers experts; set n_expert=0, or change it")
        if not isinstance(self.n_shared_expert, int) or self.n_shared_expert < 0:
            raise ValueError(f"n_shared_expert must be 0 or more, not {self.n_shared_expert!r}")
        if self.router_balance_scope not in ("layer", "model"):
            raise ValueError(f"router_balance_scope must be layer or model, not {self.router_balance_scope!r}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_rate"):
            if getattr(self, name) != 0 and not _is_positive(getattr(self, name)):
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)!r}")

    @property
    def kv_heads(self) -> int:
        assert self.n_kv_head is not None
        return self.n_kv_head

    @property
    def rope_type(self) -> str:
        """The kind of `rope_scaling`, in its old or new spelling; "default" without."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @property
    def head_size(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def ffn_size(self) -> int:
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def expert_size(self) -> int:
        assert self.moe_intermediate_size is not None
        return self.moe_intermediate_size

    def layer_is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts instead of one feed-forward layer."""
        return self.n_expert > 0 and self.moe_pattern[layer % len(self.moe_pattern)] == "E"

    def layer_window(self, layer: int) -> int | None:
        """Number of keys layer `layer` may look at, itself included; None means all of them."""
        if self.use_sliding_window and self.window_pattern[layer % len(self.window_pattern)] == "S":
            return self.window_size
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HaoAIConfig:
        """A named shape, with any field changed. Raises ValueError that lists the names."""
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_depth(cls, depth: int, **changes: Any) -> HaoAIConfig:
        """A balanced shape from one number: width 64 * depth, heads of 64, two query heads per key/value head."""
        heads = max(2, depth + depth % 2)
        shape: dict[str, Any] = {"n_layer": depth, "n_head": heads, "n_kv_head": heads // 2, "n_embd": HEAD_DIM * heads}
        return cls(**{**shape, **changes})

    def account(self) -> Account:
        """Parameters, FLOPs and bytes of this shape, computed and not allocated."""
        width, heads, kv, size = self.n_embd, self.n_head, self.kv_heads, self.head_size
        attention = width * size * (heads + 2 * kv) + heads * size * width + (2 * size if self.qk_norm else 0)
        attention += size * (heads + 2 * kv) if self.attention_bias else 0
        sparse = sum(self.layer_is_sparse(layer) for layer in range(self.n_layer))
        body = self.n_layer * (attention + 2 * width) + (self.n_layer - sparse) * 3 * width * self.ffn_size + width
        unused = 0
        if sparse:
            expert = 3 * width * self.expert_size
            body += sparse * ((self.n_expert + self.n_shared_expert) * expert + self.n_expert * width)
            unused = sparse * (self.n_expert - self.n_expert_per_token) * expert
        embedding = self.vocab_size * width
        total = body + embedding * (1 if self.tie_word_embeddings else 2)
        return Account(self, total, body_parameters=body, active_body_parameters=body - unused, head_parameters=embedding)


@dataclass(frozen=True)
class Account:
    """What a shape costs. All sizes in bytes, all work in floating-point operations."""

    config: HaoAIConfig
    parameters: int
    body_parameters: int
    active_body_parameters: int
    """Those that compute one token: with experts, only the chosen ones."""
    head_parameters: int

    def flops_per_token(self, context: int, training: bool = True) -> float:
        """Work per token at a mean attention span of context / 2 (windows shorten it); 6 N + attention in training, 2 N forward."""
        spans = [min(context / 2, self.config.layer_window(i) or context) for i in range(self.config.n_layer)]
        attention = sum(4 * self.config.n_head * self.config.head_size * span for span in spans)
        forward = 2 * (self.active_body_parameters + self.head_parameters) + attention
        return forward * (3 if training else 1)

    def kv_cache_bytes(self, context: int, batch_size: int = 1, bytes_per_value: int = 4, block: int = PREFILL_BLOCK) -> int:
        """What a `KVCache` for `batch_size` sequences of `context` tokens occupies; windowed layers hold the window and one block."""
        per_token = 2 * self.config.kv_heads * self.config.head_size * bytes_per_value
        windows = [self.config.layer_window(i) for i in range(self.config.n_layer)]
        lengths = [context if w is None else min(context, w - 1 + min(block, context)) for w in windows]
        return batch_size * per_token * sum(lengths)

    def weight_bytes(self, bytes_per_value: int = 4) -> int:
        return self.parameters * bytes_per_value

    def training_bytes(self, batch_size: int, context: int, mixed_precision: bool = False) -> int:
        """Estimate of a training step's peak: fp32 weights, gradients and two AdamW moments, plus saved activations.

        The activation term counts the tensors autograd keeps per block (norm inputs, q, k, v, attention weights and
        output, four feed-forward tensors) and one chunk of logits with its gradient; it is an estimate, good to some tens of percent.
        """
        c = self.config
        act = 2 if mixed_precision else 4
        per_token_block = (
            4 * c.n_embd * 4  # fp32 residual stream and normalised inputs
            + (c.n_head + 2 * c.kv_heads) * c.head_size * 2 * act  # q, k, v before and after the rotation
            + c.n_head * c.head_size * act
            + 4 * max(c.ffn_size, c.expert_size * (c.n_expert_per_token + c.n_shared_expert) if c.n_expert else 0) * act
            + 2 * c.n_head * context * act  # attention weights, where they are stored
        )
        tokens = batch_size * context
        weights_and_state = self.parameters * 4 * 4 + (self.parameters * 2 if mixed_precision else 0)
        logits = min(tokens, 1024) * c.vocab_size * 4 * 2
        return weights_and_state + tokens * per_token_block * c.n_layer + logits

    def _feed_forward(self) -> str:
        c = self.config
        if not c.n_expert:
            return f"feed-forward {c.intermediate_size}"
        shared = f" and {c.n_shared_expert} shared" if c.n_shared_expert else ""
        return f"{c.n_expert} experts of {c.moe_intermediate_size}, {c.n_expert_per_token}{shared} per token"

    def table(self, context: int | None = None) -> str:
        """A few aligned lines for people."""
        context = context or self.config.max_position_embeddings
        rows = [
            (
                "parameters",
                f"{self.parameters / 1e6:.2f} M ({self.head_parameters / 1e6:.2f} M embedding"
                f"{', tied' if self.config.tie_word_embeddings else ', untied'})"
                + (f", {(self.active_body_parameters + self.head_parameters) / 1e6:.2f} M active" if self.config.n_expert else ""),
            ),
            (
                "shape",
                f"{self.config.n_layer} layers, width {self.config.n_embd}, {self.config.n_head}/{self.config.kv_heads} heads of "
                f"{self.config.head_dim}, {self._feed_forward()}, vocabulary {self.config.vocab_size}",
            ),
            ("weights", f"{self.weight_bytes() / 2**20:.1f} MiB fp32, {self.weight_bytes(2) / 2**20:.1f} MiB bf16"),
            (
                "work",
                f"{self.flops_per_token(context) / 1e6:.1f} MFLOP per trained token, "
                f"{self.flops_per_token(context, training=False) / 1e6:.1f} per generated token",
            ),
            ("KV cache", f"{self.kv_cache_bytes(context) / 2**20:.2f} MiB for one sequence of {context} tokens (fp32)"),
        ]
        return "\n".join(f"  {name:<11}{text}" for name, text in rows)


# The exact shapes of known small models (vocabulary 6400, rotary base 1e6) stand under their sizes, for comparisons.
_KNOWN: dict[str, Any] = {"vocab_size": 6400, "rope_theta": 1e6}
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "vocab_size": 4096,
        "n_layer": 6,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 192,
        "head_dim": 48,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
    },
    "mini": {**_KNOWN, "n_layer": 8, "n_head": 8, "n_kv_head": 2, "n_embd": 512, "intermediate_size": 1408, "qk_norm": False},
    "small": {**_KNOWN, "n_layer": 8, "n_head": 8, "n_kv_head": 4, "n_embd": 768, "intermediate_size": 2432},
    "medium": {**_KNOWN, "n_layer": 16, "n_head": 8, "n_kv_head": 2, "n_embd": 768, "intermediate_size": 2048, "qk_norm": False},
    "base": {
        "vocab_size": 32768,
        "n_layer": 24,
        "n_head": 16,
        "n_kv_head": 8,
        "n_embd": 1024,
        "head_dim": 128,
        "intermediate_size": 3072,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
    },
}


def _is_positive(value: Any) -> bool:
    """A finite number above 0 (True is no number)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _round_up(value: float, multiple: int) -> int:
    return int(-(-value // multiple) * multiple)
