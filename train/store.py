"""TokenStore: text, conversations or answers as token ids in memory-mapped files, built once and found again by content.

A store is a folder `<store_dir>/<kind>-<hash>` with, for each of the splits train and val, `<split>.tokens.bin` (uint16 or
uint32), `<split>.offsets.bin` (int64, where each document begins, and the end) and, but for text, `<split>.mask.bin` (1 where the
token is learned). The kinds "preference" and "judged" hold documents in twos (see `train.documents`), and of each document its line
(`<split>.lines.bin`, int64) and value (`<split>.values.bin`, float32). The hash covers the files' bytes, the tokenizer and the
settings that matter. Memory does not grow with the corpus: rows are read, encoded on all cores and written in pieces of about a
megabyte.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from model.files import atomic_directory, atomic_write_text, recover_directory, writing
from model.tokenizer import BPETokenizer
from train import parallel
from train.config import DataConfig
from train.data_files import DataFile, expand_paths, is_token_file, read_token_ids
from train.documents import Document, Encoded, as_judged, encode_judged, encode_pairs, held_out
from train.formats import BadRows, Conversation, Judged, Preference, as_conversation, as_preference, as_text, read_samples

VERSION = 3
PIECE_CHARACTERS = 1_000_000
SPLITS = ("train", "val")
AGAIN = "delete its folder, and it is built again"
PAIRED = {"mask": "uint8", "lines": "int64", "values": "float32"}
PARTS: dict[str, dict[str, str]] = {"pretrain": {}, "sft": {"mask": "uint8"}, "preference": PAIRED, "judged": PAIRED}
UNITS = {"preference": ("pairs", 2), "judged": ("answers", 2)}  # what people count, and how many documents one of it is
WANTED = {"pretrain": "text", "sft": "conversation", "preference": "{prompt, chosen, rejected}", "judged": "judged"}


@dataclass(frozen=True)
class Source:
    """Documents [start, stop) of each split come from one file."""

    path: str
    weight: float
    ranges: dict[str, tuple[int, int]]


class Split:
    """Documents of one split: `tokens(i)` (n,) integers, `mask(i)` (n,) booleans or None, `lengths` (N,); where the kind has them
    `lines` and `values` (N,)."""

    def __init__(self, folder: Path, name: str, dtype: str, kind: str) -> None:
        self.offsets = np.fromfile(folder / f"{name}.offsets.bin", dtype=np.int64)
        if not len(self.offsets):
            raise ValueError(f"{folder / name}.offsets.bin is damaged: it is empty; {AGAIN}")
        self._tokens = _memory_map(folder / f"{name}.tokens.bin", dtype)
        parts = {part: _memory_map(folder / f"{name}.{part}.bin", of) for part, of in PARTS[kind].items()}
        self._mask, self.lines, self.values = (parts.get(part) for part in ("mask", "lines", "values"))
        expected = {"tokens": self.token_count, "mask": self.token_count, "lines": len(self), "values": len(self)}
        for part, found in {"tokens": self._tokens, **parts}.items():
            if len(found) != expected[part]:
                raise ValueError(f"{folder / name}.{part}.bin is damaged: {len(found):,} entries instead of {expected[part]:,}; {AGAIN}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def token_count(self) -> int:
        return int(self.offsets[-1])

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._tokens[self._slice(index, start, stop)]

    def mask(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        return None if self._mask is None else self._mask[self._slice(index, start, stop)]

    def _slice(self, index: int, start: int, stop: int | None) -> slice:
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        return slice(first + start, last if stop is None else min(first + stop, last))


class TokenStore:
    """An opened store: `.train`, `.val` (Split), `.sources`, `.bad` (number of skipped rows)."""

    def __init__(self, folder: Path, weights: dict[str, float] | None = None) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'meta.json'} is damaged: {error}; {AGAIN}") from error
        self.folder, self.kind, self.bad = folder, meta["kind"], int(meta["bad"])
        self.train, self.val = (Split(folder, name, meta["dtype"], meta["kind"]) for name in SPLITS)
        self.sources = [Source(s["path"], (weights or {}).get(s["path"], 1.0), {n: tuple(s[n]) for n in SPLITS}) for s in meta["sources"]]

    def summary(self) -> str:
        """What it holds, in words."""
        unit, size = UNITS.get(self.kind, ("documents", 1))
        held = f", {self.val.token_count:,} in {len(self.val) // size:,} held out" if len(self.val) else f", none held out (too few {unit})"
        return f"{self.train.token_count:,} tokens in {len(self.train) // size:,} {unit}{held}"

    def where(self, split: str, document: int) -> str:
        """file:line of a document of a kind that keeps lines."""
        lines = getattr(self, split).lines
        path = next(s.path for s in self.sources if s.ranges[split][0] <= document < s.ranges[split][1])
        return f"{path}:{int(lines[document])}"

    def origin(self) -> str:
        """The files it was made from, with their weights."""
        return ", ".join(f"{s.path}" + (f" (x{s.weight:g})" if s.weight != 1 else "") for s in self.sources)


def open_store(
    spec: Any, tokenizer: BPETokenizer, kind: str, data: DataConfig, log: Callable[[str], object] = print, val_share: float | None = None
) -> TokenStore:
    """The store of the files that `spec` names, built when it is not there. kind is "pretrain", "sft", "preference" or "judged".

    Raises FileNotFoundError for missing files; ValueError when no row is usable, or with data.strict when any is not.
    """
    files = expand_paths(spec)
    share = data.val_share if val_share is None else val_share
    folder = Path(data.store_dir) / f"{kind}-{_key(files, tokenizer, kind, share)}"
    with parallel.first_before_others():
        recover_directory(folder)
        if not (folder / "meta.json").is_file():
            _build(folder, files, tokenizer, kind, share, data.strict, log)
    store = TokenStore(folder, {str(f.path): f.weight for f in files})
    if store.bad and data.strict:
        raise ValueError(f"{store.bad} rows of {spec} are unusable and data.strict is set; `python -m tools.check_data` lists them")
    return store


def _key(files: list[DataFile], tokenizer: BPETokenizer, kind: str, val_share: float) -> str:
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps([VERSION, kind, val_share, tokenizer.fingerprint]).encode())
    for file in files:
        digest.update(f"{file.path}:".encode() + file_digest(file.path))
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """Hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()


def _build(
    folder: Path, files: list[DataFile], tokenizer: BPETokenizer, kind: str, share: float, strict: bool, log: Callable[[str], object]
) -> None:
    bad = BadRows()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    sources: list[dict[str, Any]] = []
    with atomic_directory(folder) as temporary:
        writers = {name: _Writer(temporary, name, dtype, PARTS[kind]) for name in SPLITS}
        total = sum(file.path.stat().st_size for file in files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", leave=False, disable=None) as bar:
            for file in files:
                first = {name: writer.count for name, writer in writers.items()}
                for document in _documents(file.path, tokenizer, kind, share, bad):
                    writers["val" if document.held_out else "train"].add(document)
                bar.update(file.path.stat().st_size)
                sources.append({"path": str(file.path), **{n: [first[n], writers[n].count] for n in SPLITS}})
        counts = {name: writer.close() for name, writer in writers.items()}
        bad.report(log)
        bad.raise_if_strict(strict)
        if counts["val"][0] and not counts["train"][0]:
            raise ValueError(
                f"all {counts['val'][0]} documents are held out by data.val_share={share:g}; set data.val_share=0, or add data"
            )
        if counts["train"][0] == 0:
            names = ", ".join(str(f.path) for f in files[:3])
            example = f" (the first bad row: {bad.first[0].path}:{bad.first[0].line}: {bad.first[0].reason})" if bad.first else ""
            raise ValueError(f"no usable {WANTED[kind]} row in {names}{example}; `python -m tools.check_data` shows what each file holds")
        meta = {"kind": kind, "dtype": dtype, "bad": bad.total, "sources": sources}
        atomic_write_text(temporary / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))
    unit, size = UNITS.get(kind, ("documents", 1))
    log(
        f"tokenised {(counts['train'][0] + counts['val'][0]) // size:,} {unit}, {counts['train'][1] + counts['val'][1]:,} tokens "
        f"({counts['val'][0] // size:,} {unit} held out), {bad.total:,} rows skipped"
    )


def _documents(path: Path, tokenizer: BPETokenizer, kind: str, share: float, bad: BadRows) -> Iterator[Document]:
    """Every document of a file."""
    if is_token_file(path):
        if kind != "pretrain":
            raise ValueError(f"{path} holds ready token ids; this stage needs conversations, to know which words are the assistant's")
        yield from _token_documents(path, tokenizer, share)
    elif kind == "pretrain":
        texts = (text for _, text in read_samples(path, bad, as_text))
        yield from _in_pieces(texts, len, lambda piece: _encode_texts(piece, tokenizer, share))
    else:
        convert, encode = _ROWS[kind]
        rows = read_samples(path, bad, convert)
        for line, row in _in_pieces(rows, _row_size, lambda piece: encode(piece, tokenizer, share)):
            if isinstance(row, str):
                bad.add(path, line, row)
            else:
                yield from row


def _in_pieces(items: Iterable[Any], size: Callable[[Any], int], encode: Callable[[list[Any]], list[Any]]) -> Iterator[Any]:
    """Encode items in pieces of bounded size in a second thread, while the next piece is being read."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[list[Any]]] = deque()
        piece: list[Any] = []
        held = 0
        for item in items:
            piece.append(item)
            held += size(item)
            if held >= PIECE_CHARACTERS:
                waiting.append(pool.submit(encode, piece))
                piece, held = [], 0
                if len(waiting) > 1:
                    yield from waiting.popleft().result()
        if piece:
            waiting.append(pool.submit(encode, piece))
        while waiting:
            yield from waiting.popleft().result()


def _encode_texts(texts: list[str], tokenizer: BPETokenizer, share: float) -> list[Document]:
    """A document is its text between a beginning, which gives its first word something to follow (ours: the document-end token;
    a tokenizer with a BOS: that), and a document-end token."""
    start, end = tokenizer.document_start(), tokenizer.document_end_id
    encoded = tokenizer.encode_batch(texts)
    return [Document(held_out(text.encode("utf-8"), share), [*start, *ids, end]) for text, ids in zip(texts, encoded, strict=True)]


def _encode_conversations(conversations: list[tuple[int, Conversation]], tokenizer: BPETokenizer, share: float) -> Encoded:
    """The documents to train on, or the reason why the chat template cannot write a conversation."""
    rows: Encoded = []
    for line, conversation in conversations:
        key = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, sort_keys=True).encode("utf-8")
        is_val = held_out(key, share)
        try:
            turns = training_turns(conversation.messages)
            thinking = conversation.thinking
            rendered = [tokenizer.render(said, conversation.tools, enable_thinking=thinking, learn=learn) for said, learn in turns]
        except ValueError as error:
            rows.append((line, str(error)))
        else:
            rows.append((line, [Document(is_val, r.ids, r.loss_mask, line) for r in rendered]))
    return rows


_ROWS: dict[str, tuple[Callable[[Any], Any], Callable[[list[Any], BPETokenizer, float], Encoded]]] = {
    "sft": (as_conversation, _encode_conversations),
    "preference": (as_preference, encode_pairs),
    "judged": (as_judged, encode_judged),
}


def training_turns(messages: list[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], set[int]]]:
    """The rows to train on: (messages, indices of the turns that are learned).

    The template leaves out the reasoning of turns before the last question. A turn whose reasoning would vanish is therefore
    learned in a row of its own that ends with its answer; what is left is learned in the row of the whole conversation.
    """
    questions = [i for i, m in enumerate(messages) if m["role"] == "user"]
    starts = [*questions, len(messages)]
    whole: set[int] = {i for i, m in enumerate(messages[: starts[0]]) if m["role"] == "assistant"}
    for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        turns = {i for i in range(start, stop) if messages[i]["role"] == "assistant"}
        last = number == len(questions) - 1
        if not last and any(_reasons(messages[i]) for i in turns):
            yield messages[:stop], turns
        else:
            whole |= turns
    if whole:
        yield messages, whole


def _reasons(message: dict[str, Any]) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in (message.get("content") or "")


def _row_size(numbered: tuple[int, Conversation | Preference | list[Judged]]) -> int:
    row = numbered[1]
    if isinstance(row, list):
        messages = [message for judged in row for message in (*judged.prompt, *judged.completion)]
    else:
        messages = row.messages if isinstance(row, Conversation) else [*row.prompt, *row.chosen, *row.rejected]
    return sum(len(m.get("content") or "") + len(m.get("reasoning_content") or "") + 20 for m in messages)


def _token_documents(path: Path, tokenizer: BPETokenizer, share: float) -> Iterator[Document]:
    ids = read_token_ids(path)
    beginning, end = tokenizer.document_start(), tokenizer.document_end_id
    for at in range(0, len(ids), PIECE_CHARACTERS):
        piece = np.asarray(ids[at : at + PIECE_CHARACTERS])
        if piece.size and (piece.min() < 0 or piece.max() >= tokenizer.vocab_size):
            raise ValueError(f"{path} holds id {int(piece.max())}, outside the tokenizer's vocabulary of {tokenizer.vocab_size}")
        for document in np.split(piece, np.nonzero(piece == end)[0]):
            words = document[document != end]
            if words.size and words[0] == beginning[0]:
                words = words[1:]
            if words.size:
                yield Document(held_out(words.tobytes(), share), [*beginning, *words.tolist(), end])


class _Writer:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, name: str, dtype: str, parts: dict[str, str]) -> None:
        self.dtypes = {"tokens": dtype, "offsets": "int64", **parts}
        self.count = self.tokens = 0
        self.folder = folder
        with writing(folder):
            self._files: dict[str, IO[bytes]] = {part: open(folder / f"{name}.{part}.bin", "wb") for part in self.dtypes}
            self._write("offsets", 0)

    def add(self, document: Document) -> None:
        self.count += 1
        self.tokens += len(document.ids)
        values = {"tokens": document.ids, "offsets": self.tokens, "mask": document.mask, "lines": document.line, "values": document.value}
        with writing(self.folder):
            for part in self._files:
                self._write(part, values[part])

    def _write(self, part: str, values: Any) -> None:
        self._files[part].write(np.asarray(values, dtype=self.dtypes[part]).tobytes())

    def close(self) -> tuple[int, int]:
        with writing(self.folder):
            for file in self._files.values():
                file.close()
        return self.count, self.tokens


def _memory_map(path: Path, dtype: str) -> np.ndarray:
    count = path.stat().st_size // np.dtype(dtype).itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)
