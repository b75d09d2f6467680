"""Reading the raw rows of every container (JSON lines, JSON, CSV, text, parquet; compressed or not).

What a row means is `train.formats`, through which `read_rows` is used. Every row comes out, unreadable ones with the
reason: nothing is lost in silence.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data_files import check_row_file, split_suffix

DOCUMENT_CHARACTERS = 8000  # a .txt or .md file becomes documents of about this size
CSV_CELL_CHARACTERS = 1 << 24  # an unclosed quote would otherwise swallow the rest of a large file
JSON_CHUNK_CHARACTERS = 1 << 16

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a byte that is not UTF-8
_NOT_UTF8_ADVICE = "save the file as UTF-8"


@dataclass(frozen=True)
class RawRow:
    """One row as stored: `value` (parsed JSON, or a dict made of a CSV line or a document), or `error`.

    `line` is the 1-based line on which the row starts (for parquet: the row number).
    """

    path: Path
    line: int
    value: Any = None
    error: str | None = None


def read_rows(path: str | os.PathLike[str]) -> Iterator[RawRow]:
    """Yields every row of a `.jsonl .json .txt .md .csv` file (plain, .gz, .xz, .zst) or a `.parquet` file.

    Memory is bounded by the longest row, whatever the size of the file. Blank lines are not rows; byte order marks and
    CRLF are removed. A row that cannot be read is yielded with `error` set and reading goes on; when the structure
    itself is lost (a broken JSON list, a damaged archive) the last row says that the rest was not read.

    Documents of `.txt` and `.md`: consecutive paragraphs (divided by blank lines) are gathered up to about 8,000
    characters without cutting a paragraph; only a block of lines longer than that is divided, at a line end. A line
    that is just `<|endoftext|>` ends a document.

    Raises FileNotFoundError, and ValueError for an unknown suffix, token-id files, or a missing optional package.
    """
    path = Path(path)
    suffix, _ = split_suffix(path)
    check_row_file(path)
    return _parquet_rows(path) if suffix == ".parquet" else _stream_rows(path, suffix)


def _stream_rows(path: Path, suffix: str) -> Iterator[RawRow]:
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".txt": _document_rows,
        ".md": _document_rows,
    }
    line = 0
    with _open_binary(path) as stream:
        try:
            mark = stream.peek(3)[:3]
            if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield RawRow(path, 1, error=f"file is UTF-16, nothing of it was read; {_NOT_UTF8_ADVICE}")
                return
            if mark == codecs.BOM_UTF8:
                stream.read(3)
            for row in readers[suffix](path, stream):
                line = row.line
                yield row
        except _damage(path) as error:
            yield RawRow(path, line + 1, error=f"compressed file is damaged, the rest of it was not read ({error})")


def _open_binary(path: Path) -> io.BufferedReader:
    compression = split_suffix(path)[1]
    if compression == ".gz":
        return io.BufferedReader(_Steps(gzip.open(path, "rb")), 1 << 20)
    if compression == ".xz":
        return io.BufferedReader(_Steps(lzma.open(path, "rb")), 1 << 20)
    if compression == ".zst":
        return io.BufferedReader(_Steps(_ZstandardFile(path)), 1 << 20)
    return open(path, "rb")


class _Steps(io.RawIOBase):
    """A decompressor read one step at a time: what stands before a damage is delivered before the damage is met."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


class _ZstandardFile:
    """A .zst file of one or more frames. The package's own reader takes a file that is cut off for a whole one."""

    _PIECE = 1024  # bytes; one of them can become a thousand blocks of 128 KiB

    def __init__(self, path: Path) -> None:
        self._decompressor = _optional("zstandard", path).ZstdDecompressor()
        self._file = open(path, "rb")
        self._frame: Any = None
        self._left = self._ready = b""

    def read1(self, count: int) -> bytes:
        while not self._ready:
            data = self._left or self._file.read(self._PIECE)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return b""
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = self._frame.decompress(data)
            self._left = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        data, self._ready = self._ready[:count], self._ready[count:]
        return data

    def close(self) -> None:
        self._file.close()


def _damage(path: Path) -> tuple[type[BaseException], ...]:
    """What the decompressors raise on a truncated or foreign file."""
    errors: tuple[type[BaseException], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    return (*errors, _optional("zstandard", path).ZstdError) if path.suffix.lower() == ".zst" else errors


def optional_package(package: str, what: str) -> Any:
    """A package of the extra `data`. ValueError says how to install it: "<what> needs the package ..."."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ValueError(f"{what} needs the package {name}: install the extra `data`, or run `pip install {name}`") from error


def _optional(package: str, path: Path) -> Any:
    return optional_package(package, f"{path}: reading {path.suffix} files")


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, str, str | None]]:
    """(line number, text without its line end, reason it is unreadable or None). U+2028 is no line end."""
    for number, raw in enumerate(stream, start=1):
        raw = raw.rstrip(b"\r\n")
        try:
            yield number, raw.decode("utf-8"), None
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode("utf-8")) + 1
            byte = raw[error.start]
            yield number, "", f"line is not UTF-8 (byte 0x{byte:02x} at column {column}); {_NOT_UTF8_ADVICE}"


def _jsonl_rows(path: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    for number, text, error in _lines(stream):
        if error is not None:
            yield RawRow(path, number, error=error)
            continue
        if not text.strip():
            continue
        try:
            yield RawRow(path, number, json.loads(text))
        except json.JSONDecodeError as bad:
            hint = "; a list of rows belongs in a .json file" if text.strip() == "[" else ""
            yield RawRow(path, number, error=f"not valid JSON: {bad.msg} at column {bad.colno}{hint}")
        except (ValueError, RecursionError) as bad:  # a number with thousands of digits, thousands of nested brackets
            yield RawRow(path, number, error=f"not valid JSON: {bad}")


class _JsonText:
    """A JSON file as a window of text: values are parsed one by one: a list of any size needs the memory of a row."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._reader = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
        self._chunk = JSON_CHUNK_CHARACTERS
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def grow(self) -> None:
        """Reads on; doubles the step while one value does not fit, so that a long value is not rescanned too often."""
        piece = self._reader.read(self._chunk)
        self.text, self.position = self.text[self.position :] + piece, 0
        self.ended = not piece
        self._chunk *= 2

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end
        self._chunk = JSON_CHUNK_CHARACTERS

    def next_character(self, skip: str) -> str:
        """Moves over white space and `skip`; returns the character there, "" at the end of the file."""
        while True:
            end = self.position
            while end < len(self.text) and (self.text[end].isspace() or self.text[end] in skip):
                end += 1
            self.advance(end)
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self.grow()

    def value(self) -> tuple[Any, str]:
        """Parses the value at the position: (value, its source text). JSONDecodeError once more text cannot help."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if self.ended or not near_end:
                    raise
            else:
                if end < len(self.text) or self.ended:  # at the window's edge a number might go on
                    return value, self.text[self.position : end]
            self.grow()


def _json_rows(path: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    """A list of rows, one row, or JSON lines under the wrong name."""
    text = _JsonText(stream)
    in_list = text.next_character("") == "["
    if in_list:
        text.advance(text.position + 1)
    while (character := text.next_character("," if in_list else "")) != "":
        if in_list and character == "]":
            text.advance(text.position + 1)
            if text.next_character("") != "":
                yield RawRow(path, text.line, error="text after the end of the list was not read")
            return
        try:
            value, source = text.value()
        except (ValueError, RecursionError) as bad:
            reason = f"not valid JSON: {bad}"
            if isinstance(bad, json.JSONDecodeError):
                line = text.line + text.text.count("\n", text.position, bad.pos)
                reason = f"not valid JSON: {bad.msg} at line {line}, {bad.pos - text.position} characters into the row"
            if in_list:
                yield RawRow(path, text.line, error=f"{reason}; the rest of the file was not read")
                return
            yield RawRow(path, text.line, error=reason)
            while (end := text.text.find("\n", text.position)) < 0 and not text.ended:
                text.grow()
            text.advance(end + 1 if end >= 0 else len(text.text))
            continue
        wrong = _ESCAPED_BYTE.search(source)
        if wrong:
            yield RawRow(path, text.line, error=_escaped_reason("row", wrong))
        else:
            yield RawRow(path, text.line, value)
        text.advance(text.position + len(source))


def _escaped_reason(what: str, wrong: re.Match[str]) -> str:
    byte = ord(wrong[0]) - 0xDC00
    return f"{what} is not UTF-8 (byte 0x{byte:02x} at character {wrong.start() + 1}); {_NOT_UTF8_ADVICE}"


def _csv_rows(path: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    csv.field_size_limit(CSV_CELL_CHARACTERS)  # the module's default, 131,072, is shorter than a long document
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)  # strict: an unclosed quote is an error, not one giant cell
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = f" (lines {line} to {reader.line_num} were not read)" if reader.line_num > line else ""
            yield RawRow(path, line, error=f"not valid CSV: {error}{lost}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        wrong = _ESCAPED_BYTE.search("\n".join(cells))
        if header is None:
            header = [cell.strip() for cell in cells]
        elif wrong:
            yield RawRow(path, line, error=_escaped_reason("row", wrong))
        elif len(cells) != len(header):
            yield RawRow(path, line, error=f"row has {len(cells)} cells, the header has {len(header)}")
        else:
            yield RawRow(path, line, dict(zip(header, cells, strict=True)))


class _Documents:
    """Gathers lines into paragraphs and paragraphs into documents."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._document: list[str] = []  # closed paragraphs
        self._paragraph: list[str] = []
        self._document_line = self._paragraph_line = 0
        self._document_size = self._paragraph_size = 0

    def add(self, number: int, line: str) -> Iterator[RawRow]:
        if self._paragraph and self._paragraph_size + len(line) > DOCUMENT_CHARACTERS:
            yield from self.end_paragraph()  # a block without blank lines: constant memory needs a division
        if not self._paragraph:
            self._paragraph_line = number
        self._paragraph.append(line.rstrip())
        self._paragraph_size += len(line) + 1

    def end_paragraph(self) -> Iterator[RawRow]:
        if not self._paragraph:
            return
        if self._document_size + self._paragraph_size > DOCUMENT_CHARACTERS:
            yield from self._end()
        if not self._document:
            self._document_line = self._paragraph_line
        self._document.append("\n".join(self._paragraph))
        self._document_size += self._paragraph_size + 1
        self._paragraph, self._paragraph_size = [], 0

    def end_document(self) -> Iterator[RawRow]:
        yield from self.end_paragraph()
        yield from self._end()

    def _end(self) -> Iterator[RawRow]:
        if self._document:
            yield RawRow(self._path, self._document_line, {"text": "\n\n".join(self._document)})
        self._document, self._document_size = [], 0


def _document_rows(path: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    documents = _Documents(path)
    for number, line, error in _lines(stream):
        if error is not None:  # no text is joined across a missing line
            yield from documents.end_document()
            yield RawRow(path, number, error=error)
        elif line.strip() == "<|endoftext|>":
            yield from documents.end_document()
        elif not line.strip():
            yield from documents.end_paragraph()
        else:
            yield from documents.add(number, line)
    yield from documents.end_document()


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    parquet = _optional("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(path, number, value)
            if number != file.metadata.num_rows:
                raise ValueError(f"it holds {number:,} rows, its end says {file.metadata.num_rows:,}")
    except (ValueError, OSError, OverflowError, NotImplementedError) as error:  # pyarrow's ArrowInvalid and what a damaged page becomes
        what = "not a parquet file" if not number else "parquet file is damaged, the rest of it was not read"
        yield RawRow(path, number + 1, error=f"{what} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
