"""KVCache: preallocated keys and values for decoding.

Full-attention layers hold every token up to `capacity`; windowed layers hold the window plus the longest block that is fed at
once, so their memory does not grow with the text. Shapes: B batch, K key/value heads, S slots, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.account import PREFILL_BLOCK
from model.config import HaoAIConfig


class LayerCache:
    """Keys and values (B, K, size, D) of one layer; the newest `filled` tokens lie at the front of the buffer in order."""

    def __init__(self, shape: tuple[int, int, int, int], window: int | None, device: torch.device | str | None, dtype: torch.dtype):
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.window = window
        self.filled = 0

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def make_room(self, count: int) -> None:
        """Windowed layers: slide the last window - 1 tokens to the front when `count` more do not fit."""
        if self.window is None or self.filled + count <= self.size:
            return
        keep = min(self.filled, self.window - 1)
        start = self.filled - keep
        for buffer in (self.keys, self.values):
            buffer[:, :, :keep] = buffer[:, :, start : self.filled].clone()
        self.filled = keep

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) and return views of all that is held, (B, K, filled + T, D)."""
        end = self.filled + keys.shape[2]
        assert end <= self.size, "KVCache.prepare was not called for this block"
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The cache of a whole model. `length` counts the tokens fed so far, padding included.

    batch_size rows of at most `capacity` tokens; `block` is the longest piece that will be fed at once (longer pieces are still
    accepted: the model splits them). A left-padded batch passes its attention mask with the first call; the cache remembers it.

    A reasoning head has a layer of its own for the trunk's states and one for each of its steps. What they hold depends on the
    number of steps and on when tokens halt, so a cache with tokens belongs to one such setting; an empty one adapts.
    """

    def __init__(
        self,
        config: HaoAIConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        block: int = PREFILL_BLOCK,
    ) -> None:
        if capacity < 1 or batch_size < 1:
            raise ValueError(f"a KVCache needs batch_size >= 1 and capacity >= 1, not {batch_size} and {capacity}")
        self.capacity = capacity
        self.block = min(block, capacity)
        self.length = 0
        self.padding: Tensor | None = None  # (B,) number of padding tokens at the left of each row
        self.layers = []
        for index in range(config.n_layer):
            window = config.layer_window(index)
            size = capacity if window is None else min(capacity, window - 1 + self.block)
            shape = (batch_size, config.kv_heads, size, config.head_size)
            self.layers.append(LayerCache(shape, window if size < capacity else None, device, dtype))
        self.reasoning: list[LayerCache] = []
        self.reasoning_setting: tuple[int, float] | None = None
        """Steps and halting threshold of the model whose tokens are held."""
        if config.use_reasoning:
            shape = (batch_size, config.reasoning_shape.kv_heads, capacity, config.head_size)
            self.reasoning = [LayerCache(shape, None, device, dtype) for _ in range(1 + config.reasoning_steps)]

    @property
    def all_layers(self) -> list[LayerCache]:
        return [*self.layers, *self.reasoning]

    @property
    def batch_size(self) -> int:
        return self.layers[0].keys.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(2 * layer.keys.nbytes for layer in self.all_layers)

    def prepare(self, count: int, reasoning: tuple[int, float] | None = None) -> None:
        """Make room for the next `count` tokens of a model with this `reasoning_setting`.

        Raises ValueError when the context is full, or when the tokens that are held were computed with another setting.
        """
        if self.length and reasoning != self.reasoning_setting:
            raise ValueError(
                f"the cache holds {self.length} tokens computed with (reasoning_steps, reasoning_halt) = {self.reasoning_setting}, "
                f"the model is now set to {reasoning}: feed them again into a new KVCache"
            )
        if self.length + count > self.capacity:
            raise ValueError(f"the context is full: {self.length} tokens are cached, {count} more exceed the capacity of {self.capacity}")
        assert count <= self.block or all(layer.window is None for layer in self.layers)
        self._adapt(reasoning)
        for layer in self.layers:
            layer.make_room(count)

    def _adapt(self, reasoning: tuple[int, float] | None) -> None:
        """Give an empty cache as many layers as the reasoning head has steps now."""
        self.reasoning_setting = reasoning
        if reasoning is not None and len(self.reasoning) != 1 + reasoning[0]:
            assert self.reasoning, "the cache was made for a config without a reasoning head"
            like = self.reasoning[0].keys
            shape = (like.shape[0], like.shape[1], like.shape[2], like.shape[3])
            self.reasoning = [LayerCache(shape, None, like.device, like.dtype) for _ in range(1 + reasoning[0])]

    def key_positions(self, layer: int, count: int) -> Tensor:
        """Row slots (S,) of the keys that layer `layer` will hold once `count` more tokens are appended."""
        end = self.length + count
        held = self.all_layers[layer].filled + count
        return torch.arange(end - held, end, device=self.layers[0].keys.device)

    def rewind(self, length: int) -> bool:
        """Forget all tokens from `length` on. False (and nothing changed) when a windowed layer no longer holds what is needed."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} tokens to {length}")
        removed = self.length - length
        for layer in self.all_layers:
            oldest = self.length - layer.filled
            needed = 0 if layer.window is None else max(0, length - (layer.window - 1))
            if removed and oldest > needed:
                return False
        for layer in self.all_layers:
            layer.filled -= removed
        self.length = length
        if length == 0:
            self.padding = None  # the next first call brings its own mask
        return True

    def reorder(self, index: Tensor) -> None:
        """Keep rows `index` (N,) in that order; rows may repeat (several samples of one prompt) or be left out (finished rows)."""
        for layer in self.all_layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        if self.padding is not None:
            self.padding = self.padding[index]
