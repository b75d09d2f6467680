"""Decoding one reply on a CPU as one compiled graph: a token in, the logits of the next out, nothing interpreted in between.

Beside reading the weights a step consists of some hundreds of small operations. In a graph they become a few loops; the product of one
row is such a loop, too, which reads each weight once, in the form in which it is stored.

    engine.compile()        # half a minute; from then on one reply at a time takes 0.6 of the time
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from inference.quantized import Int8Linear, PackedLinear
from model.attention import TokenContext
from model.cache import KVCache
from model.transformer import SmartHaoAI

WARM_UP = 4  # tokens; the second has other sizes than the first, the rest are compared
TOLERANCE = 0.1  # between a compiled step and a plain one, whose inputs may be rounded to 8 bits: norm of the difference of logits


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    # Only sizes of the cache change between calls, and those are open; checking 150 tensors would take a quarter of a step.
    return [False for _ in guards]


OPTIONS: dict[str, Any] = {"cpp_wrapper": True}
if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # the versions that can leave out guards
    OPTIONS["guard_filter_fn"] = _no_guards


class RowProduct(nn.Module):
    """x W^T + bias of a single row x (1, 1, I): W (O, I) in fp32, bf16, or in 8 bits with a scale per output."""

    def __init__(self, rows: Tensor, scales: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.rows: Tensor
        self.scales: Tensor | None
        self.bias: Tensor | None
        for name, tensor in (("rows", rows), ("scales", scales), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        # as_strided has the input written down first; the compiler would else work out the norm before it again for every output.
        y = (self.rows.float() * x.as_strided((x.shape[-1],), (1,))).sum(dim=-1)
        y = y if self.scales is None else y * self.scales
        y = y if self.bias is None else y + self.bias.float()
        return y.view(1, 1, -1)


class _Slots:
    """The cache of one layer for a graph: keys and values are put into one slot, and the whole buffers are looked at."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        self.keys, self.values, self.slot = keys, values, slot

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values


def _step(model: SmartHaoAI, token: Tensor, position: Tensor, slots: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """What is compiled. token (1, 1), position (1,), slots (layers,): where each layer puts it; keys, values (1, K, S, D) a layer ->
    logits (1, 1, V)."""
    x = model.embed_tokens(token)
    cos, sin = model.rotary(position[None])
    context = TokenContext(token, position[None], cos, sin)
    for index, layer in enumerate(model.layers):
        slot, places = slots[index : index + 1], torch.arange(keys[index].shape[2])
        seen = places <= slot
        window = model.config.layer_window(index)
        if window is not None:
            seen = seen & (places > slot - window)
        mask = torch.where(seen, 0.0, -torch.inf)[None, None, None]
        x = layer(x, context, mask, _Slots(keys[index], values[index], slot))
    return model.logits(model.norm(x))


def _compiled(model: SmartHaoAI) -> Callable[..., Tensor]:
    """`_step` of this model. The compiler keeps what it makes by the code it was made from, and without guards it would take one model's
    for another's: so each has a code of its own."""
    code = _step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
    return partial(torch.compile(FunctionType(code, _step.__globals__), dynamic=False, fullgraph=True, options=OPTIONS), model)


_NUMBERS = itertools.count()


class CompiledStep:
    """One step of one reply. Raises ValueError for a model whose steps cannot be one graph, or where nothing can be compiled."""

    def __init__(self, model: SmartHaoAI) -> None:
        if model.device.type != "cpu" or model.norm.weight.dtype != torch.float32:
            raise ValueError(f"compiled steps are for a CPU and fp32 norms; the model is {model.norm.weight.dtype} on {model.device}")
        parts = {"a LoRA adapter (merge it first)": model.adapter, "experts": model.expert_layers, "a reasoning head": model.reasoning}
        for name, part in parts.items():
            if part:
                raise ValueError(f"a model with {name} has no compiled steps")
        self.model, self.setting = model, model.cache_setting
        self._step = _compiled(twin(model).eval())
        try:
            with torch.inference_mode():
                self._check()
        except Exception as error:  # what a compiler may raise has no common class
            raise ValueError(
                f"a step cannot be compiled here ({type(error).__name__}: {str(error).splitlines()[0][:200]}): "
                "is there a C++ compiler (g++, clang, MSVC)? Without compiled steps everything works, slower"
            ) from error

    def _check(self) -> None:
        """Compile, and compare with the model itself."""
        vocabulary = self.model.config.vocab_size
        ids = torch.arange(1, WARM_UP + 2)[:, None, None] % vocabulary
        mine, plain = (KVCache(self.model.config, 1, WARM_UP + 4) for _ in range(2))
        for cache in (mine, plain):
            self.model(ids[0], cache=cache)
        for token in ids[1:]:
            found, expected = self(token, mine), self.model(token, cache=plain).logits
            off = float((found - expected).norm() / expected.norm().clamp(min=1e-9))
            if not off <= TOLERANCE:
                raise ValueError(f"its logits are off by {off:.2g}")

    def fits(self, ids: Tensor, cache: KVCache) -> bool:
        """Whether ids (B, T) are one more token of one reply, of the model as it was compiled."""
        return ids.shape == (1, 1) and cache.length > 0 and cache.padding is None and self.model.cache_setting.same(self.setting)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Feed ids (1, 1); returns the logits (1, 1, V) and leaves the token in the cache."""
        cache.prepare(1, self.setting)
        layers = cache.layers
        keys, values = [_one_row(layer.keys) for layer in layers], [_one_row(layer.values) for layer in layers]
        slots = torch.tensor([layer.filled for layer in layers])
        logits = self._step(ids, torch.tensor([cache.length]), slots, keys, values)
        for layer in layers:
            layer.filled += 1
        cache.length += 1
        return logits


def _one_row(buffer: Tensor) -> Tensor:
    """The first row of a buffer, behind which there may be spare ones; the number of its slots is left open."""
    row = buffer if len(buffer) == 1 else buffer[:1]
    if not hasattr(row, "_dynamo_dynamic_indices"):
        torch._dynamo.mark_dynamic(row, 2)
    return row


def twin(model: SmartHaoAI) -> SmartHaoAI:
    """A model of the same parameters, with products of single rows in place of its linear layers. Matrices that are stored in the order
    of other kernels are stored once more."""
    linear = {id(module): row_product(module) for module in model.modules() if isinstance(module, nn.Linear | PackedLinear | Int8Linear)}
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, {**shared, **linear})
    if made.lm_head is None:
        made.lm_head = RowProduct(model.head_weight, None, None)  # type: ignore[assignment]
    return made


def row_product(linear: Any) -> RowProduct:
    if isinstance(linear, Int8Linear):
        return RowProduct(*linear.codes(), linear.bias)
    return RowProduct(linear.weight.to(linear.dtype) if isinstance(linear, PackedLinear) else linear.weight, None, linear.bias)
