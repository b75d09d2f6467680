"""Finding data files (file, folder, glob, list, weights) and opening files of ready token ids.

`expand_paths` and `read_token_ids` are used through `train.formats`; `train.raw_rows` reads the rows of a file.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROW_SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".csv", ".parquet")
TOKEN_SUFFIXES = (".npy", ".bin")
COMPRESSIONS = (".gz", ".xz", ".zst")
KNOWN_SUFFIXES = f"{' '.join(ROW_SUFFIXES)} (all but parquet also as {' '.join(COMPRESSIONS)}), token ids {' '.join(TOKEN_SUFFIXES)}"

_NOT_DATA = re.compile(r"(readme|licen[cs]e|notice|copying)\b.*|sources\.md|manifest\.json", re.IGNORECASE)


@dataclass(frozen=True)
class DataFile:
    """One file to read; `weight` is its share in a mixture relative to the other files (1.0 unless given)."""

    path: Path
    weight: float = 1.0


def split_suffix(path: Path | str) -> tuple[str, str]:
    """`corpus.jsonl.xz` -> (".jsonl", ".xz"); no compression gives ("", second). Lower case."""
    path = Path(path)
    compression = path.suffix.lower()
    if compression in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), compression
    return compression, ""


def is_token_file(path: Path | str) -> bool:
    """Whether the file holds ready token ids (`read_token_ids`) instead of rows (`read_rows`)."""
    return split_suffix(path) in {(suffix, "") for suffix in TOKEN_SUFFIXES}


def is_known(path: Path) -> bool:
    """Whether the suffix is one that `read_rows` or `read_token_ids` reads."""
    suffix, compression = split_suffix(path)
    return (suffix in ROW_SUFFIXES and not (suffix == ".parquet" and compression)) or is_token_file(path)


def expand_paths(spec: str | os.PathLike[str] | dict[str, Any] | list[Any] | tuple[Any, ...]) -> list[DataFile]:
    """The data files that `spec` names.

    `spec`: a file, a folder (recursive, sorted), a glob, `{"path": ..., "weight": 2.0}`, or a list of these.

    Folders and globs take known suffixes only and skip hidden files, README*, LICENSE*, SOURCES.md and manifest.json;
    folders also `.bin` files without a sidecar (they could be anything). A file named by itself is always taken.
    A file reached twice counts once, with the weight of the last entry that names it.

    Raises FileNotFoundError (path missing; the message lists near names) and ValueError (nothing usable, bad weight,
    unknown suffix).
    """
    entries = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    found: dict[Path, DataFile] = {}
    for entry in entries:
        path, weight = _entry(entry)
        for file in _expand_one(path):
            found[file] = DataFile(file, weight)
    if not found:
        raise ValueError("no data files given: name a file, a folder or a glob")
    return list(found.values())


def _entry(entry: Any) -> tuple[str, float]:
    if isinstance(entry, dict):
        unknown = sorted(set(entry) - {"path", "weight"})
        if "path" not in entry or unknown:
            raise ValueError(f'data file entry {entry!r}: expected {{"path": ..., "weight": 2.0}}')
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"data file {entry['path']}: weight is {weight!r}, expected a number above 0")
        return _entry(entry["path"])[0], float(weight)
    if not isinstance(entry, (str, os.PathLike)) or not os.fspath(entry):
        raise ValueError(f"data file entry {entry!r}: expected a path, a glob or an object with a path")
    return os.path.expanduser(os.fspath(entry)), 1.0


def _expand_one(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = _folder_files(path)
        if not files:
            raise ValueError(f"no data files in {path}: {_listing(path)}. Known: {KNOWN_SUFFIXES}")
        return files
    if path.exists():
        if not is_known(path):
            raise ValueError(f"{path}: unknown data suffix {''.join(path.suffixes[-2:])!r}. Known: {KNOWN_SUFFIXES}")
        return [path]
    if glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        files = [m for m in matches if m.is_file() and is_known(m) and not _is_skipped(m, ask_sidecar=False)]
        for folder in (m for m in matches if m.is_dir() and not name.endswith("**")):
            files += _folder_files(folder)
        if not files:
            raise FileNotFoundError(f"no data file matches {name}. {missing_advice(path)}")
        return files
    raise FileNotFoundError(f"{path} does not exist. {missing_advice(path)}")


def check_row_file(path: Path) -> None:
    """Raises ValueError or FileNotFoundError, with the remedy, unless `path` is a file of rows."""
    if is_token_file(path):
        raise ValueError(f"{path} holds token ids, not rows: open it with train.formats.read_token_ids")
    if not is_known(path):
        raise ValueError(f"{path}: unknown data suffix {''.join(path.suffixes[-2:])!r}. Known: {KNOWN_SUFFIXES}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {missing_advice(path)}")


def _folder_files(folder: Path) -> list[Path]:
    """Data files below `folder`. Linked folders are followed: data often lives on another disk."""
    files: list[Path] = []
    seen: set[str] = set()
    for root, names, children in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        files += [Path(root, child) for child in children if is_known(Path(child))]
    return sorted(file for file in files if not _is_skipped(file, ask_sidecar=True))


def _is_skipped(path: Path, ask_sidecar: bool) -> bool:
    if path.name.startswith(".") or _NOT_DATA.fullmatch(path.name):
        return True
    if path.suffix == ".json" and (path.with_suffix(".bin").exists() or path.name.endswith(".bin.json")):
        return True  # the sidecar of a token file
    return ask_sidecar and path.suffix == ".bin" and _sidecar(path) is None


def _listing(folder: Path) -> str:
    names = sorted(child.name + ("/" if child.is_dir() else "") for child in folder.iterdir())
    if not names:
        return "the folder is empty"
    return "it holds " + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def missing_advice(path: Path) -> str:
    """For the message about a missing path: near names, or what the nearest existing folder holds."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return "Give a file, a folder or a glob."
    if parent == path.parent:
        near = difflib.get_close_matches(path.name, [child.name for child in parent.iterdir()], n=3, cutoff=0.6)
        if near:
            return f"Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f"Nearest folder {parent.resolve()}: {_listing(parent)}."


def _sidecar(path: Path) -> Path | None:
    return next((file for file in (path.with_suffix(".json"), Path(f"{path}.json")) if file.is_file()), None)


def read_token_ids(path: str | os.PathLike[str]) -> np.ndarray[Any, Any]:
    """Memory-maps ready token ids, shape (N,): `.npy` (1-D, integers), or `.bin`, raw little-endian uint16 unless a
    sidecar `<name>.json` (`train.json` or `train.bin.json` beside `train.bin`) says {"dtype": "uint32"}.

    Raises FileNotFoundError, or ValueError naming what is wrong. Ids are not compared with any vocabulary here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {missing_advice(path)}")
    if not is_token_file(path):
        raise ValueError(f"{path} is no token-id file (.npy, .bin): read its rows with train.formats.read_rows")
    if path.suffix.lower() == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (
            ValueError,
            EOFError,
            SyntaxError,
            TypeError,
            OverflowError,
            MemoryError,
            tokenize.TokenError,
        ) as error:  # from its Python-like header
            raise ValueError(f"{path} is not a plain .npy array ({error})") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise ValueError(f"{path} holds shape {ids.shape} of {ids.dtype}, expected a non-empty 1-D array of integers")
        return ids
    dtype: Any = "uint16"
    sidecar = _sidecar(path)
    if sidecar is not None:
        try:
            described = json.loads(sidecar.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{sidecar} is not valid JSON ({error})") from error
        dtype = described.get("dtype") if isinstance(described, dict) else None
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f'{sidecar}: dtype is {dtype!r}, expected {{"dtype": "uint16"}} or "uint32"')
    kind = np.dtype(dtype).newbyteorder("<")
    if not path.stat().st_size or path.stat().st_size % kind.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected a positive multiple of {kind.itemsize} ({dtype})")
    return np.memmap(path, dtype=kind, mode="r")
