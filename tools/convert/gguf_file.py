"""GGUFFile: the header of a GGUF file read with every length checked, and its tensors dequantised a few rows at a time.

A damaged, cut or hostile file ends in a ValueError that names the file and the place; nothing beyond its end is ever read and
nothing larger than the file is allocated for its header. The quantisation formats themselves come from the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SMALLEST_HEADER = 24  # magic, version, two counts
MAX_DIMENSIONS = 4
STRING, ARRAY, FLOAT32 = 8, 9, 6
# value type of the format -> struct letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CHUNK_BYTES = 16 * 2**20  # stored bytes dequantised at a time


def require_gguf() -> ModuleType:
    """The `gguf` package. ValueError says how to install it."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError('GGUF files need the gguf package: pip install -e ".[export]"') from error
    return gguf


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `shape` has rows first, as in torch."""

    shape: tuple[int, ...]
    kind: Any
    """gguf.GGMLQuantizationType"""
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


class GGUFFile:
    """Metadata in `fields` (key -> number, bool, str or list), tensors in `tensors`; `read` gives a tensor in fp32.

    Raises FileNotFoundError, and ValueError for what is not a complete little-endian GGUF file of version 2 or 3, or one part of
    a split one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = require_gguf()
        self._readable: set[Any] = set()  # formats that were seen to be dequantised
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        self.size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            start = file.read(8)
            if start[:4] != MAGIC:
                raise ValueError(f"{self.path} is not a GGUF file: it begins with {start[:4]!r}, not with {MAGIC!r}")
            if self.size < SMALLEST_HEADER:
                raise self._cut("its header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(data)

    def _read_header(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(MAGIC)
        try:
            version = self._number("I", "its version")
            if version not in VERSIONS:
                swapped = int.from_bytes(struct.pack("<I", version), "big")
                if swapped in VERSIONS:
                    raise ValueError(f"{self.path} is a big-endian GGUF file; convert it to little-endian first")
                raise ValueError(f"{self.path} is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
            n_tensors, n_fields = self._number("Q", "its header"), self._number("Q", "its header")
            self.fields: dict[str, Any] = {}
            for _ in range(n_fields):
                key = self._string("the name of a key")
                if key in self.fields:
                    raise ValueError(f"{self.path}: the key {key} occurs twice")
                self.fields[key] = self._value(self._number("I", f"the key {key}"), key)
            parts = self.integer("split.count", 0)
            if parts > 1:
                raise ValueError(
                    f"{self.path} is part {self.integer('split.no', 0) + 1} of a model split into {parts} files (split.count); "
                    "join them first with llama.cpp's `llama-gguf-split --merge`"
                )
            entries = [self._entry() for _ in range(n_tensors)]
            end = self._at
        finally:
            del self._data
        alignment = self.integer("general.alignment", self._gguf.GGUF_DEFAULT_ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment={alignment} is not a power of two")
        begin = -(-end // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in entries:
            if name in self.tensors:
                raise ValueError(f"{self.path}: the tensor {name} occurs twice")
            if offset % alignment:
                raise ValueError(f"{self.path}: the tensor {name} does not lie at a multiple of {alignment} bytes")
            self.tensors[name] = self._locate(name, shape, number, begin + offset)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("the name of a tensor")
        dimensions = self._number("I", f"the tensor {name}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: the tensor {name} has {dimensions} dimensions")
        sizes = [self._number("Q", f"the tensor {name}") for _ in range(dimensions)]
        kind, offset = self._number("I", f"the tensor {name}"), self._number("Q", f"the tensor {name}")
        return name, tuple(reversed(sizes)), kind, offset

    def _locate(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> StoredTensor:
        try:
            kind = self._gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise ValueError(f"{self.path}: the tensor {name} is stored in the unknown format {number}") from error
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{self.path}: the tensor {name} has shape {list(shape)}, which {kind.name} cannot store (blocks of {block})")
        size = math.prod(shape) // block * block_bytes
        if offset + size > self.size:
            raise self._cut(f"the tensor {name}", offset + size)
        return StoredTensor(shape, kind, offset, size)

    # -------------------------------------------------------------------------------------------- header values

    def _cut(self, place: str, needed: int | None = None) -> ValueError:
        more = f", at least {needed:,} are needed" if needed else ""
        return ValueError(f"{self.path} is cut off or damaged: it ends within {place} ({self.size:,} bytes{more})")

    def _take(self, count: int, place: str) -> int:
        """Move `count` bytes on; the position before them."""
        at = self._at
        if at + count > self.size:
            raise self._cut(place)
        self._at = at + count
        return at

    def _number(self, letter: str, place: str) -> Any:
        return struct.unpack_from(f"<{letter}", self._data, self._take(struct.calcsize(f"<{letter}"), place))[0]

    def _string(self, place: str) -> str:
        length = self._number("Q", place)
        at = self._take(length, place)
        try:
            return self._data[at : at + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {place} is not valid UTF-8") from error

    def _value(self, kind: int, key: str) -> Any:
        place = f"the value of {key}"
        if kind == STRING:
            return self._string(place)
        if kind == ARRAY:
            return self._array(key, place)
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {key} has the unknown value type {kind}")
        value = self._number(SCALARS[kind], place)
        return _shortest(value) if kind == FLOAT32 else value

    def _array(self, key: str, place: str) -> list[Any]:
        kind, count = self._number("I", place), self._number("Q", place)
        if kind == STRING:
            self._check_room(count * 8, place)
            return [self._string(place) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {key} is an array of the unsupported value type {kind}")
        size = struct.calcsize(f"<{SCALARS[kind]}") * count
        self._check_room(size, place)
        at = self._take(size, place)
        return np.frombuffer(self._data[at : at + size], dtype=np.dtype(SCALARS[kind]).newbyteorder("<")).tolist()

    def _check_room(self, size: int, place: str) -> None:
        if self._at + size > self.size:
            raise self._cut(place)

    # --------------------------------------------------------------------------------------------- typed access

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; for a list of one number per layer, the number if all are equal. ValueError names the key."""
        value = self.fields.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise ValueError(f"{self.path}: {key} differs between layers, which is not supported")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.fields.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def items(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """A list whose members are all of `kind`."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, "a list")
        return value

    def _wrong(self, key: str, wanted: str) -> ValueError:
        if key not in self.fields:
            return ValueError(f"{self.path} lacks the key {key}")
        return ValueError(f"{self.path}: {key} must be {wanted}, not {str(self.fields[key])[:60]!r}")

    # -------------------------------------------------------------------------------------------------- tensors

    def check_format(self, name: str) -> None:
        """ValueError when the tensor is stored in a format that cannot be dequantised."""
        kind = self.tensors[name].kind
        if kind in self._readable:
            return
        block_bytes = self._gguf.GGML_QUANT_SIZES[kind][1]
        try:
            self._gguf.quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
            self._readable.add(kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: the tensor {name} is stored as {kind.name}, which cannot be dequantised") from error

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor in fp32, or its part `index` along the first axis: only that part is read from disk."""
        stored = self.tensors[name]
        shape, offset, size = stored.shape, stored.offset, stored.size
        if index is not None:
            shape, size = shape[1:], size // shape[0]
            offset += index * size
        rows = math.prod(shape[:-1])
        row_bytes = size // rows
        result = np.empty((rows, shape[-1]), dtype=np.float32)
        step = max(1, CHUNK_BYTES // row_bytes)
        with open(self.path, "rb") as file:
            file.seek(offset)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                chunk = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
                if chunk.size != count * row_bytes:
                    raise self._cut(f"the tensor {name}")
                result[first : first + count] = self._gguf.quants.dequantize(chunk.reshape(count, row_bytes), stored.kind)
        return torch.from_numpy(result.reshape(shape))


def _shortest(value: float) -> float:
    """The number with the fewest digits that has this fp32 value: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


__all__ = ["GGUFFile", "StoredTensor", "require_gguf"]
