"""KVCache: preallocated keys and values for decoding.

Full-attention layers hold every token up to `capacity`; windowed layers hold the window plus the longest block that is fed at
once, so their memory does not grow with the text. Shapes: B batch, K key/value heads, S slots, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.account import PREFILL_BLOCK
from model.config import HaoAIConfig


class CacheSetting(NamedTuple):
    """What keys and values depend on besides tokens and weights."""

    reasoning: tuple[int, float] | None = None
    """Steps and halting threshold of the reasoning head, if any."""
    adapter: object | None = None
    """The LoRA adapter in use."""

    def same(self, other: CacheSetting) -> bool:
        return self.reasoning == other.reasoning and self.adapter is other.adapter


class LayerCache:
    """Keys and values of one layer in buffers (rows, K, size, D); the newest `filled` tokens of a row lie at the front in order.

    Rows from `rows` on are spare. What lies outside of a layer's window, or before a row's first token, is never looked at, but is
    finite: a weight of zero times NaN would still be NaN.
    """

    def __init__(self, shape: tuple[int, int, int, int], window: int | None, device: torch.device | str | None, dtype: torch.dtype):
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = shape[0]
        self.window = window
        self.filled = 0

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def resize(self, rows: int, size: int) -> None:
        """Move to buffers that are at least this large."""
        old_rows, heads, old_size, width = self.keys.shape
        if rows <= old_rows and size <= old_size:
            return
        shape = (max(rows, old_rows), heads, max(size, old_size), width)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.zeros(shape, device=old.device, dtype=old.dtype)
            new[: self.rows, :, : self.filled] = old[: self.rows, :, : self.filled]
            setattr(self, name, new)

    def hold(self, count: int) -> None:
        """Hold `count` tokens of each row: the newest ones, with something finite before them when there are fewer."""
        kept = min(self.filled, count)
        if count != self.filled and kept:
            for buffer in (self.keys, self.values):
                buffer[: self.rows, :, count - kept : count] = buffer[: self.rows, :, self.filled - kept : self.filled].clone()
        self.filled = count

    def make_room(self, count: int) -> None:
        """Windowed layers: slide the last window - 1 tokens to the front when `count` more do not fit."""
        if self.window is not None and self.filled + count > self.size:
            self.hold(min(self.filled, self.window - 1))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) and return views of all that is held, (B, K, filled + T, D)."""
        end = self.filled + keys.shape[2]
        assert end <= self.size, "KVCache.prepare was not called for this block"
        held = []
        for buffer, new in ((self.keys, keys), (self.values, values)):
            rows = buffer if self.rows == len(buffer) else buffer[: self.rows]
            rows.narrow(2, self.filled, new.shape[2]).copy_(new)  # half the time of assigning to an index
            held.append(rows.narrow(2, 0, end))
        self.filled = end
        return held[0], held[1]

    def put(self, row: int, other: LayerCache, source: int, end: int, count: int) -> int:
        """Let `row` end with the `count` tokens before slot `end` of a row of another layer, or with as many as that one still has.
        Returns how many it was."""
        count = min(count, end)
        if self.window is not None:
            count = min(count, max(self.filled, self.window - 1))
        if count > self.filled:
            self.hold(count)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[row, :, : self.filled - count] = 0
            mine[row, :, self.filled - count : self.filled] = theirs[source, :, end - count : end]
        return count


class KVCache:
    """The cache of a whole model. `length` counts the columns fed so far, padding included.

    batch_size rows of at most `capacity` tokens; `block` is the longest piece that will be fed at once (longer pieces are still
    accepted: the model splits them). All rows end at the same column; `padding` says where each begins. A left-padded batch passes its
    attention mask with the first call; the cache remembers it.

    Rows may join (`put`), leave (`drop`) and be copied into another cache at any time; `reserve` makes the buffers larger.

    A reasoning head has a layer of its own for the trunk's states and one for each of its steps. What the layers hold depends on the
    `setting` of the model, so a cache with tokens belongs to one setting; an empty one adapts.
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
        self.config = config
        self.capacity = capacity
        self._longest_block = block
        self.length = 0
        self.padding: Tensor | None = None  # (B,) number of padding tokens at the left of each row; None: none at all
        self._known = [0] * batch_size
        """For each row the column from which on windowed layers may hold it: a row that joined late brought its last tokens only, and
        the slots before them hold nothing of it."""
        self.layers = []
        for index in range(config.n_layer):
            window = config.layer_window(index)
            shape = (batch_size, config.kv_heads, self._size(window, capacity), config.head_size)
            self.layers.append(LayerCache(shape, window, device, dtype))
        self.reasoning: list[LayerCache] = []
        self.setting = CacheSetting()
        """Of the model whose tokens are held."""
        if config.use_reasoning:
            shape = (batch_size, config.reasoning_shape.kv_heads, capacity, config.head_size)
            self.reasoning = [LayerCache(shape, None, device, dtype) for _ in range(1 + config.reasoning_steps)]

    def _size(self, window: int | None, capacity: int) -> int:
        """Slots of a layer in a cache of `capacity` columns."""
        return capacity if window is None else min(capacity, window - 1 + min(self._longest_block, capacity))

    @property
    def block(self) -> int:
        return min(self._longest_block, self.capacity)

    @property
    def all_layers(self) -> list[LayerCache]:
        return [*self.layers, *self.reasoning]

    @property
    def batch_size(self) -> int:
        """Rows in use."""
        return self.layers[0].rows

    @property
    def row_room(self) -> int:
        """Rows that the buffers hold, spare ones included."""
        return self.layers[0].keys.shape[0]

    @property
    def starts(self) -> Tensor:
        """(B,) first column of each row."""
        none = torch.zeros(self.batch_size, dtype=torch.long, device=self.layers[0].keys.device)
        return none if self.padding is None else self.padding

    @property
    def nbytes(self) -> int:
        return sum(2 * layer.keys.nbytes for layer in self.all_layers)

    def prepare(self, count: int, setting: CacheSetting) -> None:
        """Make room for the next `count` tokens of a model with this setting.

        Raises ValueError when the context is full, or when the tokens that are held were computed with another setting.
        """
        self.check_setting(setting)
        if self.length + count > self.capacity:
            raise ValueError(f"the context is full: {self.length} tokens are cached, {count} more exceed the capacity of {self.capacity}")
        assert count <= self.block or all(layer.window is None for layer in self.layers), "the model splits longer pieces"
        self._adapt(setting)
        for layer in self.layers:
            layer.make_room(count)

    def check_setting(self, setting: CacheSetting) -> None:
        """Raise ValueError when tokens computed with this setting cannot follow or join those that are held."""
        if self.length == 0 or setting.same(self.setting):
            return
        if setting.reasoning != self.setting.reasoning:
            change = f"(reasoning_steps, reasoning_halt) = {self.setting.reasoning}, now it is {setting.reasoning}"
        else:
            change = "another LoRA adapter than is in use now"
        raise ValueError(f"the cache holds {self.length} tokens computed with {change}: feed them again into a new KVCache")

    def _adapt(self, setting: CacheSetting) -> None:
        """Give an empty cache as many layers as the reasoning head has steps now."""
        self.setting = setting
        reasoning = setting.reasoning
        if reasoning is not None and len(self.reasoning) != 1 + reasoning[0]:
            assert self.reasoning, "the cache was made for a config without a reasoning head"
            like = self.reasoning[0].keys
            shape = (like.shape[0], like.shape[1], like.shape[2], like.shape[3])
            self.reasoning = [LayerCache(shape, None, like.device, like.dtype) for _ in range(1 + reasoning[0])]
            for layer in self.reasoning:
                layer.rows = self.batch_size

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
            if layer.window is not None:
                oldest = max([oldest, *self._known])
            needed = 0 if layer.window is None else max(0, length - (layer.window - 1))
            if removed and oldest > needed:
                return False
        for layer in self.all_layers:
            layer.filled -= removed
        self.length = length
        if length == 0:
            self.padding = None  # the next first call brings its own mask
            self._known = [0] * self.batch_size
        return True

    def reorder(self, index: Tensor) -> None:
        """Keep rows `index` (N,) in that order; rows may repeat (several samples of one prompt) or be left out (finished rows)."""
        count = len(index)
        for layer in self.all_layers:
            layer.resize(count, layer.size)
            for buffer in (layer.keys, layer.values):
                buffer[:count, :, : layer.filled] = buffer[index, :, : layer.filled]
            layer.rows = count
        self._known = [self._known[row] for row in index.tolist()]
        if self.padding is not None:
            self.padding = self.padding[index]

    def reserve(self, rows: int, columns: int) -> None:
        """Make the buffers hold this many rows and columns; what grows at least doubles. When memory runs out, nothing is lost."""
        room = self.row_room
        rows = room if rows <= room else max(rows, 2 * room)
        columns = self.capacity if columns <= self.capacity else max(columns, 2 * self.capacity)
        for layer in self.all_layers:
            layer.resize(rows, self._size(layer.window, columns))
        self.capacity = columns

    def put(self, row: int, other: KVCache, source: int = 0, count: int | None = None) -> None:
        """Let `row` hold the first `count` tokens (None: all) of row `source` of another cache of the same model, ending at the present
        column; row == batch_size adds a row. ValueError when the two were computed with different settings.

        Of a row with windowed layers only beginnings that `has_prefix` confirms may be put.
        """
        self.check_setting(other.setting)
        self._adapt(other.setting)
        start = int(other.starts[source])
        end = other.length if count is None else start + count
        count = end - start
        length = max(self.length, count)
        self.reserve(row + 1, length)
        self._move(length)
        starts = torch.cat((self.starts, self.starts.new_zeros(max(0, row + 1 - self.batch_size))))
        starts[row] = length - count
        known = [*self._known, *[0] * (len(starts) - len(self._known))]
        known[row] = 0
        for mine, theirs in zip(self.all_layers, other.all_layers, strict=True):
            held, mine.rows = mine.filled, len(starts)
            there = count if theirs.window is None else min(count, end - other._known[source])
            put = mine.put(row, theirs, source, end - (other.length - theirs.filled), there)
            if mine.window is not None:
                others = length - held if mine.filled > held else 0  # more slots than before: the other rows have nothing there
                known = [max(first, length - put if index == row else others) for index, first in enumerate(known)]
        self._known = known
        self.begin_at(starts)

    def has_prefix(self, row: int, count: int) -> bool:
        """Whether the first `count` tokens of a row can be put elsewhere: a windowed layer may have forgotten what they need."""
        start, known = int(self.starts[row]), self._known[row]
        return all(
            layer.window is None or max(self.length - layer.filled, known) <= start + max(0, count - (layer.window - 1))
            for layer in self.all_layers
        )

    def copied(self, row: int) -> KVCache:
        """A cache of its own with the tokens of one row."""
        keys = self.layers[0].keys
        copy = KVCache(self.config, 1, max(1, self.length - int(self.starts[row])), keys.device, keys.dtype, self._longest_block)
        copy.put(0, self, row)
        return copy

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its place. Columns that no row needs any more are given up once they are a quarter."""
        last = self.batch_size - 1
        starts = self.starts.clone()
        starts[row] = starts[last]
        self._known[row] = self._known[last]
        self._known.pop()
        for layer in self.all_layers:
            if row != last:
                for buffer in (layer.keys, layer.values):
                    buffer[row, :, : layer.filled] = buffer[last, :, : layer.filled]
            layer.rows = last
        self.begin_at(starts[:last])
        spare = self.length if not last else 0 if self.padding is None else int(self.padding.min())
        if 4 * spare >= self.length:
            self._move(self.length - spare)

    def _move(self, length: int) -> None:
        """Let all rows end at column `length` from now on."""
        if length == self.length:
            return
        for layer in self.all_layers:
            layer.hold(length if layer.window is None else min(layer.filled, length))
        starts = self.starts + (length - self.length)
        self._known = [max(0, first + length - self.length) for first in self._known]
        self.length = length
        self.begin_at(starts)

    def begin_at(self, starts: Tensor) -> None:
        """Set the first column of every row, starts (B,): what lies before is padding."""
        # Without padding the model needs no mask, hence runs faster kernels.
        self.padding = starts if bool(starts.any()) else None
