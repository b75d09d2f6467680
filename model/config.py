"""HaoAIConfig: the shape of a model, its presets, and what it will cost before anything is allocated.

HaoAIConfig(vocab_size=16384, n_layer=8, n_head=8, n_kv_head=4, n_embd=512)
HaoAIConfig.preset("nano", vocab_size=6400)
HaoAIConfig.from_depth(12)                      # one dial: width, heads and feed-forward follow the depth
HaoAIConfig.preset("mini").account().table()    # parameters, FLOPs, memory
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.account import Account

ROPE_SCALING_TYPES = ("linear", "yarn", "llama3")
SWITCHES = (
    "qk_norm",
    "attention_bias",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "norm_topk_prob",
    "residual_scale",
    "value_residual",
    "value_embedding",
    "use_reasoning",
)
CHOICES = {
    "attention_gate": ("none", "head", "element"),
    "attention_temperature": ("none", "query", "length"),
    "feed_forward": ("swiglu", "relu2"),
    "deep_supervision": ("none", "layers", "tokens"),
}
# What can be switched on in a trained model: it starts without an effect. The rest of the shape is fixed by the weights.
NEUTRAL_PARTS = (
    "attention_gate",
    "attention_temperature",
    "residual_scale",
    "value_residual",
    "value_embedding",
    "deep_supervision",
    "use_reasoning",
)
# Settings of a part that can be chosen with it, when it is switched on.
PART_SETTINGS = {
    "deep_supervision": ("deep_supervision_coef",),
    "use_reasoning": (
        "reasoning_steps",
        "reasoning_heads",
        "reasoning_ffn",
        "reasoning_step_coef",
        "reasoning_ponder_coef",
        "reasoning_halt",
    ),
}
# What can be set anew on any checkpoint, by the part that must be there for it ("": nothing). No weight depends on these, and only
# training heeds them, but for reasoning_halt, which is a choice of use. reasoning_steps is none of them: it sizes the step embedding
# (in use: `model.reasoning_steps`). router_bias_rate is none: it decides whether the model has choice biases.
TRAINING_SETTINGS = {
    "": ("dropout", "attention_dropout"),
    "n_expert": ("router_aux_loss_coef", "router_balance_scope", "router_z_loss_coef"),
    "deep_supervision": ("deep_supervision_coef",),
    "use_reasoning": ("reasoning_step_coef", "reasoning_ponder_coef", "reasoning_halt"),
}
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
    attention_gate: str = "none"
    """head | element: the attention output is multiplied by 2 * sigmoid of a projection of the block's input (Qiu et al., 2025)."""
    attention_temperature: str = "none"
    """query: a factor in (0, 2) on each query, predicted from it; length: one that grows with the logarithm of the number of keys
    (Nakanishi, 2025). Both start at 1."""
    residual_scale: bool = False
    """A learned factor per channel on what each branch adds; folded into o_proj and down_proj when a finished model is saved."""
    value_residual: bool = False
    """Each layer mixes the first layer's values into its own (Zhou et al., 2024), by a learned share per head that starts at 0."""
    value_embedding: bool = False
    """Every second layer adds a learned vector of the token itself to its values; the tables cost memory and no products."""
    feed_forward: str = "swiglu"
    """swiglu, or relu2: down(relu(up(x))^2) (So et al., 2021)."""
    logit_softcap: float = 0.0
    """Logits are squeezed into (-cap, cap) by cap * tanh(logit / cap); 0: not."""
    deep_supervision: str = "none"
    """Training only, dropped when a finished model is saved. layers: inner layers predict the next token, too, through the shared head;
    tokens: a small module predicts the token after the next (Gloeckle et al., 2024; DeepSeek-V3)."""
    deep_supervision_coef: float = 0.3
    """Weight of the deep_supervision loss at the beginning; it falls to 0 in the last tenth of a run."""
    use_reasoning: bool = False
    """A reasoning head over the last layer: latent steps with shared weights before the next token is predicted (model/reasoning.py)."""
    reasoning_steps: int = 4
    """Latent steps in training, and in use unless `model.reasoning_steps` says otherwise."""
    reasoning_heads: int | None = None
    """Query heads of the reasoning head, grouped as in the trunk; None: as many as the trunk."""
    reasoning_ffn: int | None = None
    """Width of the reasoning head's SwiGLU layer; None: that of the trunk."""
    reasoning_step_coef: float = 0.3
    """Weight of the loss of the predictions after the earlier steps; it makes fewer steps, and halting, usable."""
    reasoning_ponder_coef: float = 0.0
    """Weight of the ponder cost: the share of the steps that a token is expected to need. 0.01 is usual."""
    reasoning_halt: float = 0.0
    """In use, a token stops once it is more than this sure of its prediction; 0: every token takes all steps."""
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
            widths = 4 if self.feed_forward == "relu2" else 8 / 3  # the same number of weights
            self.intermediate_size = _round_up(self.n_embd * widths, FEED_FORWARD_MULTIPLE)
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
        for name in SWITCHES:
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
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("logit_softcap", "deep_supervision_coef", "reasoning_step_coef", "reasoning_ponder_coef", "reasoning_halt"):
            if isinstance(getattr(self, name), bool) or not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if self.n_expert and self.feed_forward != "swiglu":
            raise ValueError(f"feed_forward={self.feed_forward!r} cannot be combined with n_expert={self.n_expert}")
        if isinstance(self.n_expert, bool) or not isinstance(self.n_expert, int) or self.n_expert < 0:
            raise ValueError(f"n_expert must be 0 (dense) or a number of experts, not {self.n_expert!r}")
        if self.n_expert:
            self._check_experts()
        if self.use_reasoning:
            self._check_reasoning()
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

    def _check_reasoning(self) -> None:
        for name in ("reasoning_steps", "reasoning_heads", "reasoning_ffn"):
            value = getattr(self, name)
            if value is None and name != "reasoning_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.reasoning_halt >= 1:
            raise ValueError(f"reasoning_halt must lie in [0, 1): a confidence is never larger, not {self.reasoning_halt!r}")
        group = self.n_head // self.kv_heads
        if self.reasoning_heads is not None and self.reasoning_heads % group:
            raise ValueError(f"reasoning_heads={self.reasoning_heads} must be a multiple of n_head / n_kv_head = {group}")

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
    def ffn_matrices(self) -> int:
        """Matrices of a dense feed-forward layer."""
        return 2 if self.feed_forward == "relu2" else 3

    @property
    def expert_size(self) -> int:
        assert self.moe_intermediate_size is not None
        return self.moe_intermediate_size

    @property
    def readout_size(self) -> int:
        """Width of the hidden layer that reads a confidence from a state of the reasoning head."""
        return max(self.n_embd // 4, 1)

    @property
    def reasoning_shape(self) -> HaoAIConfig:
        """Shape of the reasoning head's block: one plain layer that shares the trunk's width and rotary positions."""
        heads = self.reasoning_heads or self.n_head
        return HaoAIConfig(
            vocab_size=self.vocab_size,
            n_layer=1,
            n_head=heads,
            n_kv_head=heads * self.kv_heads // self.n_head,
            n_embd=self.n_embd,
            head_dim=self.head_size,
            intermediate_size=self.reasoning_ffn or (self.ffn_size if self.feed_forward == "swiglu" else None),
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            qk_norm=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    def layer_is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts instead of one feed-forward layer."""
        return self.n_expert > 0 and self.moe_pattern[layer % len(self.moe_pattern)] == "E"

    def layer_has_value_embedding(self, layer: int) -> bool:
        """Every second layer, the last one included."""
        return self.value_embedding and (self.n_layer - 1 - layer) % 2 == 0

    @property
    def supervised_layers(self) -> list[int]:
        """Layers (counted from 0) whose output predicts the next token with deep_supervision="layers": at one and two thirds."""
        return sorted({max(1, self.n_layer // 3) - 1, max(1, 2 * self.n_layer // 3) - 1} - {self.n_layer - 1})

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
        return Account.of(self)


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
# The optional parts that were worth their time in measurements (docs/model.md), on top of each plain shape: `nano-smart` and so on.
SMART = "-smart"
SMART_PARTS: dict[str, Any] = {
    "attention_temperature": "length",
    "use_sliding_window": True,
    "window_pattern": "SSSL",
    "window_size": 128,
}
PRESETS.update({f"{name}{SMART}": {**shape, **SMART_PARTS} for name, shape in PRESETS.items()})


def training_settings(config: HaoAIConfig) -> list[str]:
    """The TRAINING_SETTINGS of the parts that `config` has."""
    plain = HaoAIConfig()
    return [
        name for part, names in TRAINING_SETTINGS.items() if not part or getattr(config, part) != getattr(plain, part) for name in names
    ]


def allowed_changes(config: HaoAIConfig, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` (fields and values) may differ in a model that was trained with `config`.

    Optional parts that it lacks, with the settings that belong to them, and the settings that no weight depends on.
    """
    plain = HaoAIConfig()
    added = {name: value for name, value in wanted.items() if name in NEUTRAL_PARTS}
    added = {name: value for name, value in added.items() if getattr(config, name) == getattr(plain, name) != value}
    free = {*training_settings(config), *(name for part in added for name in PART_SETTINGS.get(part, ()))}
    return {**added, **{name: value for name, value in wanted.items() if name in free}}


def _is_positive(value: Any) -> bool:
    """A finite number above 0 (True is no number)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _round_up(value: float, multiple: int) -> int:
    return int(-(-value // multiple) * multiple)
