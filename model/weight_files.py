"""Weights in safetensors files, one or several with an index: written so that a reader finds the old ones or the new ones, read one
tensor at a time, each held against the checksum it was saved with.

What the tensors are called and which model they belong to is `model/checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.files import atomic_write_text, sync, temporary_name, writing

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = "crc32"  # entry in a safetensors file's metadata: {tensor name: checksum of its bytes}
MAX_SHARD_BYTES = 4 * 2**30


class WeightSource(Protocol):
    """Tensors under the key names of transformers, wherever they come from."""

    file: Path
    """What messages about these weights name."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def tensor(self, name: str) -> Tensor: ...


def save_sharded(weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """model.safetensors, or model-00001-of-00003.safetensors and so on with their index; files of an earlier save are removed.

    No file is replaced before all are written. A crash among the renames of shards leaves an index whose checksums are not theirs,
    which is refused when it is read.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"the size of a shard must be positive, not {max_shard_bytes}")
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if shards[-1] and filled + tensor.numel() * size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.numel() * size
    files = [WEIGHTS_FILE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    checksums: dict[str, int] = {}
    try:
        for file, names in zip(files, shards, strict=True):
            checksums.update(_write_weights({name: weights[name] for name in names}, temporary_name(folder / file), dtype))
        for file in files:
            with writing(folder / file):
                os.replace(temporary_name(folder / file), folder / file)
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                temporary_name(folder / file).unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in weights.values()) * size
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_index(folder / INDEX_FILE, places, checksums, total)
    for old in [folder / WEIGHTS_FILE, *folder.glob("model-*-of-*.safetensors"), folder / INDEX_FILE]:
        if old.name not in files and not (old.name == INDEX_FILE and len(shards) > 1):
            with writing(old):
                old.unlink(missing_ok=True)


def write_index(index: Path, places: Mapping[str, str], checksums: Mapping[str, int], size: int) -> None:
    """Where each tensor stands: its file in the index's folder, its checksum, and the bytes of all."""
    content = {"metadata": {"total_size": size, CHECKSUMS: checksums}, "weight_map": places}
    atomic_write_text(index, json.dumps(content, indent=1) + "\n")


def save_weights(
    weights: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None = None, notes: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write tensors as safetensors under a temporary name, then rename. Checksums of their bytes go into the file's metadata, beside
    `notes`, and are returned."""
    try:
        checksums = _write_weights(weights, temporary_name(file), dtype, notes)
        with writing(file):
            os.replace(temporary_name(file), file)
    finally:
        with contextlib.suppress(OSError):
            temporary_name(file).unlink(missing_ok=True)
    return checksums


def _write_weights(
    weights: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None, notes: Mapping[str, str] | None = None
) -> dict[str, int]:
    tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    with writing(file):
        file.touch()
        mode = file.stat().st_mode  # what the user's umask asks for; safetensors makes files that only their owner can read
        try:
            save_file(tensors, file, metadata={"format": "pt", CHECKSUMS: json.dumps(checksums), **(notes or {})})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # what the system said, in the words of safetensors
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
        file.chmod(mode)
        sync(file)
    return checksums


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_index(index: Path) -> tuple[dict[str, str], dict[str, int]]:
    """An index of shards: tensor -> name of its file in the same folder, and tensor -> checksum (known only for files written here).

    ValueError when it cannot be read, and when it names a file outside its folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = dict(content["weight_map"].items())
        names = sorted(set(places.values()))
        checksums = dict((content.get("metadata") or {}).get(CHECKSUMS) or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a readable index of shards: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of this folder")
    return places, checksums


def indexed_weights(index: Path) -> SafetensorsWeights:
    """The tensors of all files that an index names. FileNotFoundError names one that is missing."""
    places, checksums = read_index(index)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {len(names)} files; missing: {', '.join(missing)}")
    return SafetensorsWeights([index.parent / name for name in names], index, checksums)


class SafetensorsWeights:
    """Tensors of one or several safetensors files, mapped into memory and read one at a time."""

    def __init__(self, files: list[Path], index: Path | None = None, checksums: Mapping[str, int] | None = None) -> None:
        self.file = index or files[0]
        self.notes: dict[str, str] = {}
        """Metadata of the files."""
        self._readers: dict[str, tuple[Path, Any]] = {}
        self._checksums: dict[str, int] = {}
        for file in files:
            reader = _open(file)
            self.notes.update(reader.metadata() or {})
            try:
                self._checksums.update(json.loads((reader.metadata() or {}).get(CHECKSUMS, "{}")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged: its checksums cannot be read") from error
            for name in reader.keys():
                if name in self._readers:
                    raise ValueError(f"{name} stands in {self._readers[name][0]} and in {file}")
                self._readers[name] = (file, reader)
        self._checksums.update(checksums or {})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(reader.get_slice(name).get_shape()) for name, (_, reader) in self._readers.items()}

    def checksums(self) -> dict[str, int] | None:
        """By tensor; None unless all are known."""
        return dict(self._checksums) if self._checksums.keys() >= self._readers.keys() else None

    def tensor(self, name: str) -> Tensor:
        """One tensor. ValueError when its bytes are not those that were saved (known only for files written here)."""
        file, reader = self._readers[name]
        try:
            tensor = reader.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: {name} cannot be read: {error}") from error
        if name in self._checksums and _checksum(tensor) != self._checksums[name]:
            raise ValueError(f"{file} is damaged: the bytes of {name} are not those that were saved (checksum)")
        return tensor


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"the weights {file} are missing")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}") from error


def load_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, by the names they have there. ValueError when it is cut off, altered or not safetensors."""
    source = SafetensorsWeights([file])
    return {name: source.tensor(name).clone() for name in source.shapes()}
