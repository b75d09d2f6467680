"""Weights in the form that a CPU multiplies fastest, for inference alone: packed fp32 or bf16, INT8, INT4.

    quantize(model, "int8")     # in place, from an ordinary checkpoint; then Engine(model, tokenizer) as always

| kind | weights | products |
|---|---|---|
| fp32, bf16 | reordered once into the blocks of oneDNN's kernels | fp32; inputs rounded to bf16 |
| int8 | 8 bits, a scale per output channel | each token's inputs rounded to 8 bits with a scale of their own, sums in whole numbers |
| int4 | 4 bits, a scale and a zero per 32 inputs | inputs rounded to bf16 |

What lies between the products (norms, rotation, attention over the cache, residual stream) is fp32 in all of them: on CPUs one query over
a cache is no faster in bf16, and each rounding would cost an operation. A prepared model neither trains, is saved, nor takes LoRA adapters:
merge them before.

Shapes: N rows (tokens), I inputs, O outputs, V vocabulary, C channels.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.choices import QUANTIZE
from model.attention import RMSNorm, SmartAttention, attend
from model.lora import linear_layers
from model.transformer import SmartHaoAI

GROUP = 32  # inputs that share a scale in int4: as in llama.cpp's Q4_0
INT4_ROWS = 16  # the INT4 kernel wants outputs in multiples of this
QUERIES = 64  # of a prompt, at once
WORTHWHILE = 1.15  # bf16 must be this much faster than fp32 to be chosen
SMALLEST = 1e-30  # scale of a row of zeros


def quantize(model: SmartHaoAI, kind: str) -> SmartHaoAI:
    """Bring all large matrices of the model, embedding and output head included, into the form `kind`, in place; returns the model.

    "none" changes nothing. Of a mixture of experts the experts are stored in bf16 and not quantised further. Raises ValueError for an
    unknown kind, for a model on a GPU, with an adapter in use, or prepared before.
    """
    if kind not in QUANTIZE:
        raise ValueError(f"quantize={kind!r} is unknown; known: {', '.join(QUANTIZE)}")
    if kind == "none":
        return model
    if model.device.type != "cpu":
        if kind == "auto":
            return model
        raise ValueError(f"quantize={kind!r} is for a CPU, the model is on {model.device}: leave it out, or set device=cpu")
    if model.adapter is not None:
        raise ValueError(f"quantize={kind!r} with a LoRA adapter in use: merge it first (python -m tools.convert merge-lora)")
    if is_prepared(model):
        raise ValueError("the weights have been prepared before: quantize an ordinary model")
    if kind == "auto":
        kind = faster_kind(model)
    model.float().eval().requires_grad_(False)
    for name in linear_layers(model):
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, prepared(linear.weight, linear.bias, kind))  # type: ignore[arg-type]
    for name, norm in [(name, module) for name, module in model.named_modules() if isinstance(module, RMSNorm)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PreparedNorm(norm))
    if kind != "fp32":
        for attention in model.modules():
            if isinstance(attention, SmartAttention):
                attention.kernel = half_attend
        for layer in model.expert_layers:
            layer.gate_up_proj.data, layer.down_proj.data = layer.gate_up_proj.bfloat16(), layer.down_proj.bfloat16()
    model.lm_head = prepared(model.head_weight, None, kind)  # type: ignore[assignment]
    if kind != "fp32":
        model.embed_tokens = PreparedEmbedding(model.embed_tokens.weight, kind)  # type: ignore[assignment]
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether `quantize` has changed the model."""
    return any(isinstance(module, _Prepared) for module in model.modules())


def faster_kind(model: SmartHaoAI, rounds: int = 5) -> str:
    """bf16 where a product with the model's head, one token, is clearly faster in it than in fp32."""
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with torch.inference_mode():
        x = torch.zeros(1, model.head_weight.shape[1])
        heads = {kind: prepared(model.head_weight.detach().float(), None, kind) for kind in times}
        for _ in range(rounds):  # in turns; the first round warms up
            for kind, head in heads.items():
                start = time.perf_counter()
                for _ in range(8):
                    head(x)
                times[kind].append(time.perf_counter() - start)
    return "bf16" if min(times["fp32"][1:]) >= WORTHWHILE * min(times["bf16"][1:]) else "fp32"


def prepared(weight: Tensor, bias: Tensor | None, kind: str) -> nn.Module:
    """A module that computes x W^T + bias in fp32 for x (..., I), from a matrix W (O, I)."""
    bias = None if bias is None else bias.detach().float()
    weight = weight.detach().float()
    if kind == "int8":
        return Int8Linear(weight, bias)
    if kind == "int4" and weight.shape[1] % GROUP == 0 and weight.shape[0] % INT4_ROWS == 0:
        return Int4Linear(weight, bias)
    return PackedLinear(weight, bias, torch.float32 if kind == "fp32" else torch.bfloat16)  # also what INT4 cannot cut into groups


class _Prepared(nn.Module, ABC):
    """What all have in common. `weight` gives the matrix (O, I) back, with its rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"

    @property
    @abstractmethod
    def weight(self) -> Tensor: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored matrix, scales included."""


class PackedLinear(_Prepared):
    """A matrix in the blocks of oneDNN's kernel: the same products without reordering it on every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(dtype))
        self.dtype = dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, self.bias, "none", [], "")
        return y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        return self._packed.to_dense().float()

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize


class Int8Linear(_Prepared):
    """8 bits a weight, one scale per output channel; inputs are rounded to 8 bits token by token. The sums are exact, so that in a batch
    no token's result depends on its neighbours. Where torch has not the kernels of x86, inputs are rounded to bf16 only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=SMALLEST)
        self._packed: Any = None
        if "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch, "quantize_per_channel"):
            self._packed = _packed_int8(weight, scales)
        else:
            self._codes, self._scales = (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            rows = x.reshape(-1, self.in_features).bfloat16()
            y = torch._weight_int8pack_mm(rows, self._codes, self._scales).to(x.dtype).view(*x.shape[:-1], self.out_features)
        elif x.numel() == x.shape[-1]:  # one token: the kernel that chooses the scale of a whole batch serves
            y = torch.ops.quantized.linear_dynamic(x, self._packed)
        else:
            scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST).div_(127)
            y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1.0, 128, self._packed).mul_(scale)
        return y if self.bias is None else y + self.bias

    def codes(self) -> tuple[Tensor, Tensor]:
        """(O, I) int8, and fp32 scales (O,)."""
        if self._packed is None:
            return self._codes, self._scales.float()
        stored = torch.ops.quantized.linear_unpack(self._packed)[0]
        return stored.int_repr(), stored.q_per_channel_scales().float()

    @property
    def weight(self) -> Tensor:
        codes, scales = self.codes()
        return codes * scales[:, None]

    @property
    def nbytes(self) -> int:
        return self.out_features * (self.in_features + 4)


def _packed_int8(weight: Tensor, scales: Tensor) -> Any:
    """The matrix (O, I) as the kernels of x86 want it."""
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings(record=True) as raised:
        stored = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
    for warning in raised:  # torch 2.13 wants to give up such tensors, but there is no other way to these kernels
        if "quantized tensor creation" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return torch.ops.quantized.linear_prepack(stored, None)


class Int4Linear(_Prepared):
    """4 bits a weight: 16 even steps from the smallest to the largest of each group of 32, in bf16 products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.bfloat16())
        codes, scales, middles = int4_codes(weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._scales = torch.stack((scales, middles), dim=-1).transpose(0, 1).contiguous()  # (I / 32, O, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x.reshape(-1, self.in_features).bfloat16())
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, GROUP, self._scales)
        return y

    @property
    def weight(self) -> Tensor:
        return self._product(torch.eye(self.in_features).bfloat16()).float().t().contiguous()

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features // 2 + self._scales.nbytes


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (O, I) -> codes (O, I) int32 in 0..15, scales and middles (O, I / 32) bf16: weight is about (code - 8) * scale + middle."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    # The stored, rounded numbers decide on the codes: their own rounding then costs nothing.
    scales = ((high - low) / 15).clamp(min=SMALLEST).bfloat16()
    middles = (low + 8 * scales.float()).bfloat16()
    codes = ((groups - middles.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
    return codes.view_as(weight).to(torch.int32), scales, middles


class PreparedEmbedding(nn.Module):
    """Rows of the embedding (V, C), looked up and given in fp32: 8 bits with a scale a row, or bf16 (int4's rows, too, are of 8 bits)."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        weight = weight.detach()
        self.table: Tensor
        self.scales: Tensor | None
        whole = kind == "bf16"
        scales = None if whole else (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=SMALLEST)
        self.register_buffer("scales", scales, persistent=False)
        table = weight.bfloat16() if scales is None else (weight / scales).round().to(torch.int8)
        self.register_buffer("table", table, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.table).float()
        return found if self.scales is None else found * F.embedding(ids, self.scales)

    @property
    def weight(self) -> Tensor:
        """(V, C) fp32."""
        return self.table.float() if self.scales is None else self.table.float() * self.scales

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + (0 if self.scales is None else self.scales.nbytes)


class PreparedNorm(nn.Module):
    """RMSNorm over the last dimension in half as many operations: x / hypot(|x|, sqrt(C eps)) * sqrt(C) weight."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        width = norm.weight.numel()
        self.weight = nn.Parameter(norm.weight.detach().float() * math.sqrt(width), requires_grad=False)
        self.smallest: Tensor
        self.register_buffer("smallest", torch.tensor(math.sqrt(width * norm.eps)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.smallest)).mul_(self.weight)


def half_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, whole: bool, window: int | None = None) -> Tensor:
    """`model.attention.attend` for prompts: products in bf16, of so few queries at once that their scores stay in the processor's cache,
    and with none of the keys behind the last of them."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if T == 1:
        return attend(q, k, v, mask, dropout, whole, window)
    scaled = (q * D**-0.5).bfloat16().view(B, K, H // K, T, D)
    keys, values = k.bfloat16().transpose(2, 3), v.bfloat16()
    pieces = []
    for start in range(0, T, QUERIES):
        rows = scaled[:, :, :, start : start + QUERIES]
        n = rows.shape[3]
        seen = S - T + start + n
        scores = (rows.reshape(B, K, -1, D) @ keys[..., :seen]).view(B, K, -1, n, seen)
        if mask is None:
            scores += torch.full((n, seen), -torch.inf, dtype=scores.dtype).triu_(seen - n + 1)
        else:
            scores += mask[:, :, None, start : start + n, :seen]
        weights = scores.softmax(dim=-1).view(B, K, -1, seen)
        pieces.append((weights @ values[:, :, :seen]).view(B, H, n, D))
    return torch.cat(pieces, dim=2).to(q.dtype)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, prepared or not; a shared one counts once."""
    parts = [module for module in model.modules() if isinstance(module, (_Prepared, PreparedEmbedding))]
    biases = [part.bias.nbytes for part in parts if isinstance(part, _Prepared) and part.bias is not None]
    return sum(part.nbytes for part in parts) + sum(biases) + sum(parameter.nbytes for parameter in model.parameters())
