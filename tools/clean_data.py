"""Cleans training data: repairs text, leaves out what is not worth learning from, and says of every row what became of it.

    python -m tools.clean_data IN... --out clean.jsonl [--report FILE] [--against EVAL...] [--simplified] [--near 0.7] [--strict]

IN is a file, folder or glob of any format that training reads; rows keep their format and their other fields. In order: unreadable rows
go; Unicode is repaired (Chinese punctuation stays) and, with --simplified, traditional characters become simplified; menu and notice
lines of web pages go; rows that are damaged, short, long, mostly signs, or say the same again and again go; so do rows that hold a
question of --against; last, of rows that are the same or nearly the same, all but the first. Read = kept + reported, always.

Memory does not grow with the texts, but by about 30 bytes a row, 16 a signature, 500 a duplicate; the cleaned rows, and 280 bytes a row of
signatures, wait on disk beside OUT. Exit status: 0; 1 when no row is left, or with --strict one is unreadable; 2 for a wrong
command line.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from model.files import TEMPORARY_SUFFIX, atomic_write_text, sync, temporary_name
from tools.check_data import identity, strings
from train.cleaning import Limits, in_every_text, is_boilerplate, lost_characters, repair, simplifier, why_unsuitable, without_lines
from train.config import UsageError
from train.formats import BadRows, DataFile, RawRow, RowError, Text, expand_paths, is_token_file, read_rows, recognise
from train.near_duplicates import BANDS, NGRAM, PERMUTATIONS, TestTexts, band_keys, near_duplicates, signature, texts_in, units
from train.program import run_main
from train.raw_rows import optional_package
from train.runtime import peak_memory_mb

RULES = {
    "unreadable": "could not be read, or fit no known format",
    "damaged": "characters lost by a wrong decoding",
    "short": "too few letters",
    "long": "too many characters",
    "symbols": "mostly signs",
    "repetitive": "says the same again and again",
    "contaminated": "holds a question of the test sets",
    "exact duplicate": "the same as an earlier row",
    "near-duplicate": "nearly the same as an earlier row",
}
QUESTIONS = ("question", "problem", "query", "prompt", "instruction", "text")
"""Fields that hold the question in rows of test sets."""
EXAMPLES = 20
NEAR_FROM = 100  # units; nearly the same short rows (sums, questions of one pattern) are wanted
RESULTS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")


@dataclass
class Options:
    """What is done; see the command line."""

    limits: Limits = field(default_factory=Limits)
    near: float = 0.7
    """Share of common shingles from which two rows are nearly the same; 0: not looked for."""
    lines: bool = True
    simplified: bool = False
    against: Sequence[Path] = ()
    overlap: float = 0.5
    strict: bool = False


@dataclass
class Report:
    """What became of the rows: `read` = `kept` + the rows of `removed`."""

    read: int = 0
    kept: int = 0
    removed: dict[str, BadRows] = field(default_factory=lambda: {rule: BadRows(keep=EXAMPLES) for rule in RULES})
    repaired: int = 0
    """Rows kept or removed in which a character was changed."""
    lines: BadRows = field(default_factory=lambda: BadRows(keep=EXAMPLES))
    files: dict[str, int] = field(default_factory=dict)
    """Rows read of each file."""
    unchecked: int = 0
    """Test texts that are too short to be looked for."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """With the first examples of each rule."""
        removed = {rule: {"rows": bad.total, "examples": _examples(bad)} for rule, bad in self.removed.items()}
        return {
            "read": self.read,
            "kept": self.kept,
            "removed": removed,
            "repaired": self.repaired,
            "lines": {"removed": self.lines.total, "examples": _examples(self.lines)},
            "files": [{"file": name, "rows": rows} for name, rows in self.files.items()],
            "unchecked_test_texts": self.unchecked,
            "seconds": round(self.seconds, 2),
        }


def _examples(bad: BadRows) -> list[dict[str, Any]]:
    return [{"file": str(row.path), "line": row.line, "reason": row.reason} for row in bad.first]


# ---------------------------------------------------------------- one row


class Cleaner:
    """What happens to a row by itself: `row` gives it repaired, or the rule that it falls under and the reason."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report = options, report
        self._simplify: Callable[[str], str] | None = simplifier() if options.simplified else None
        self._tests = TestTexts(_questions(options.against), options.overlap) if options.against else None
        if self._tests is not None:
            report.unchecked = self._tests.too_short

    def row(self, row: RawRow) -> tuple[Any, str, np.ndarray | None] | tuple[str, str]:
        """(value, what makes it the same as another, hashes of its units) or (rule, reason). Raises RowError, ValueError or TypeError
        for a row that cannot be used."""
        if row.error is not None:
            raise RowError(row.error)
        recognise(row.value)  # the row's own faults first: repairing could hide where they are
        lost = sum(map(lost_characters, texts_in(row.value)))
        value = in_every_text(row.value, self._repaired)
        self.report.repaired += value != row.value
        if self.options.lines and isinstance(value.get("text"), str):
            value["text"], removed = without_lines(value["text"], is_boilerplate)
            for line in removed:
                self.report.lines.add(row.path, row.line, line.strip())
        try:
            sample = recognise(value)
        except RowError as error:
            return "short", f"nothing is left of it: {error}"
        text = "\n".join(strings(sample))
        unsuitable = why_unsuitable(text, self.options.limits, lost, isinstance(sample, Text))
        if unsuitable:
            return unsuitable
        hashes = units(text) if self.options.near or self._tests is not None else None
        if self._tests is not None and hashes is not None and (question := self._tests.match(hashes)):
            return "contaminated", f"holds the question of {question}"
        return value, identity(sample), hashes

    def _repaired(self, text: str) -> str:
        text = repair(text)
        return self._simplify(text) if self._simplify else text


def _questions(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(file:line, text) of the questions of test sets: the text of a field that is named so; where that is
    too short, all texts of the row together. Answers to choose from do not count by themselves: a phrase of a law is no leak."""
    seen = set()
    for file in expand_paths(list(files)):
        for row in read_rows(file.path):
            named = [row.value[name] for name in QUESTIONS if name in row.value] if isinstance(row.value, dict) else []
            text = repair(" ".join(texts_in(named[:1])))
            if units(text).size < NGRAM:
                text = repair(" ".join(texts_in(row.value)))
            if text not in seen:
                seen.add(text)
                yield f"{file.path}:{row.line}", text


# ---------------------------------------------------------------- all rows


class Waiting:
    """Rows that passed by themselves, on disk until the duplicates are known; in memory where each came from and its hash."""

    def __init__(self, folder: Path, near: bool) -> None:
        self.rows: IO[bytes] = open(folder / "rows.jsonl", "wb+")
        self._keys: IO[bytes] = open(folder / "keys.bin", "wb+")
        self._bytes: IO[bytes] = open(folder / "bytes.bin", "wb+")
        self.near = near
        self.file, self.line, self.hashes, self.signed = array("I"), array("Q"), array("Q"), array("Q")

    def add(self, data: bytes, file: int, line: int, same: str, hashes: np.ndarray | None) -> None:
        self.rows.write(data)
        digest = hashlib.blake2b(same.encode("utf-8"), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "big"))
        if self.near and hashes is not None and hashes.size >= NEAR_FROM:
            values = signature(hashes)
            self._keys.write(band_keys(values).tobytes())
            self._bytes.write(values.astype(np.uint8).tobytes())
            self.signed.append(len(self.line))
        self.file.append(file)
        self.line.append(line)

    def duplicates(self, threshold: float) -> dict[int, tuple[str, int, float]]:
        """{row: (rule, earlier row that stays, similarity)}"""
        found: dict[int, tuple[str, int, float]] = {}
        hashes = np.asarray(self.hashes, dtype=np.uint64)
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        origin = first[which]
        for row in np.flatnonzero(origin != np.arange(len(hashes))).tolist():
            found[row] = ("exact duplicate", int(origin[row]), 1.0)
        if not self.signed:
            return found
        self._keys.flush()
        self._bytes.flush()
        keys = np.memmap(self._keys, dtype=np.uint64, mode="r").reshape(-1, BANDS)
        values = np.memmap(self._bytes, dtype=np.uint8, mode="r").reshape(-1, PERMUTATIONS)
        for later, (earlier, alike) in near_duplicates(keys, values, threshold).items():
            found.setdefault(self.signed[later], ("near-duplicate", self.signed[earlier], alike))
        return found

    def close(self) -> None:
        for file in (self.rows, self._keys, self._bytes):
            file.close()


def clean(files: Sequence[DataFile], out: Path, options: Options, progress: bool = True) -> Report:
    """Write the cleaned rows of `files` to `out`, which appears at once and complete.

    Raises ValueError with options.strict at the first unreadable row, OSError when there is no room.
    """
    report, start = Report(), time.perf_counter()
    cleaner = Cleaner(options, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX) as name:
        waiting = Waiting(Path(name), bool(options.near))
        try:
            for number, file in enumerate(files):
                _read(file.path, number, cleaner, waiting, progress)
            duplicates = waiting.duplicates(options.near)
            _write(out, waiting, duplicates, [file.path for file in files], report)
        finally:
            waiting.close()
    report.seconds = time.perf_counter() - start
    assert report.read == report.kept + sum(bad.total for bad in report.removed.values())
    return report


def _read(path: Path, number: int, cleaner: Cleaner, waiting: Waiting, progress: bool) -> None:
    report, before = cleaner.report, cleaner.report.read
    for row in tqdm(read_rows(path), desc=path.name, unit=" rows", leave=False, disable=None if progress else True, file=sys.stderr):
        report.read += 1
        try:
            result = cleaner.row(row)
            if len(result) == 2:
                rule, reason = result
                report.removed[rule].add(path, row.line, reason)
                continue
            value, same, hashes = result
            data = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8") + b"\n"
        except (ValueError, TypeError, RecursionError) as error:  # half a character in a field that is not looked at, endless nesting
            report.removed["unreadable"].add(path, row.line, str(error))
            report.removed["unreadable"].raise_if_strict(cleaner.options.strict)
            continue
        waiting.add(data, number, row.line, same, hashes)
    report.files[str(path)] = report.read - before


def _write(out: Path, waiting: Waiting, duplicates: dict[int, tuple[str, int, float]], paths: list[Path], report: Report) -> None:
    temporary = temporary_name(out)
    waiting.rows.seek(0)
    try:
        with _opened(temporary, out.name) as file:
            for index, data in enumerate(waiting.rows):
                path, line = paths[waiting.file[index]], waiting.line[index]
                if index not in duplicates:
                    file.write(data)
                    report.kept += 1
                    continue
                rule, earlier, alike = duplicates[index]
                where = f"{paths[waiting.file[earlier]]}:{waiting.line[earlier]}"
                report.removed[rule].add(path, line, f"as {where}" + (f" ({alike:.0%} alike)" if rule.startswith("near") else ""))
        sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _opened(path: Path, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A file to write, compressed by the suffix of `name`; the same rows give the same bytes."""
    if name.endswith(".gz"):
        return _gzip(path)
    if name.endswith(".xz"):
        return lzma.open(path, "wb", preset=3)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return optional_package("zstandard", f"{name}: writing .zst files").open(path, "wb")
    return open(path, "wb")


@contextlib.contextmanager
def _gzip(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        yield file  # type: ignore[misc]


# ---------------------------------------------------------------- command line


def print_report(report: Report, out: Path) -> None:
    """What was removed and why, with examples."""
    print(f"read     {report.read:>9,} rows of {len(report.files)} file{'s' if len(report.files) != 1 else ''}")
    print(f"kept     {report.kept:>9,} rows in {out}")
    for rule, bad in report.removed.items():
        if bad.total:
            print(f"removed  {bad.total:>9,} {rule}: {RULES[rule]}")
            for row in bad.first[:3]:
                print(f"                   {row.path}:{row.line}: {_shown(row.reason)}")
    if report.lines.total:
        print(f"lines    {report.lines.total:>9,} of menus and notices taken out of texts")
        for row in report.lines.first[:3]:
            print(f"                   {row.path}:{row.line}: {_shown(row.reason)}")
    print(f"repaired {report.repaired:>9,} rows")
    if report.unchecked:
        print(f"note: {report.unchecked:,} texts of the test sets are too short to be looked for")
    memory = peak_memory_mb("cpu")
    print(f"{report.seconds:.1f} s" + (f", peak memory {memory:,.0f} MiB" if memory else ""))


def _shown(text: str) -> str:
    """Data must not steer the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text[:120])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.clean_data", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    standard = Options()
    parser.add_argument("files", nargs="+", metavar="IN", help="files, folders or globs of any format that training reads")
    parser.add_argument("--out", type=Path, required=True, help=f"the result: {', '.join(RESULTS)}")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report as JSON, with more examples")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="EVAL", help="test sets: rows that hold a question go")
    parser.add_argument("--overlap", type=float, default=standard.overlap, help="share of a question's 13-grams that counts (0.5)")
    parser.add_argument("--near", type=float, default=standard.near, help="likeness of near-duplicates, 0: not looked for (0.7)")
    parser.add_argument("--simplified", action="store_true", help="traditional characters become simplified (extra data: opencc)")
    parser.add_argument("--keep-lines", action="store_true", help="leave menu and notice lines where they are")
    limits = standard.limits
    parser.add_argument("--min-letters", type=int, default=limits.min_letters, help="of a text (10)")
    parser.add_argument("--max-characters", type=int, default=limits.max_characters, help="of a row; 0: any (0)")
    parser.add_argument("--min-letter-share", type=float, default=limits.min_letter_share, help="among what is not space (0.3)")
    parser.add_argument("--min-compressed", type=float, default=limits.min_compressed, help="size when compressed; 0: any (0.15)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _arguments(argv)
    out: Path = arguments.out
    files = expand_paths(arguments.files)
    ready = [file.path for file in files if is_token_file(file.path)]
    if ready:
        raise UsageError(f"{ready[0]} holds ready token ids, not text")
    if not out.name.endswith(RESULTS):
        raise UsageError(f"--out {out}: the name of the result ends with one of {' '.join(RESULTS)}")
    if any(out.exists() and out.samefile(file.path) for file in files):
        raise UsageError(f"--out {out} is one of the files to read")
    if out.exists() and not arguments.overwrite:
        raise UsageError(f"--out {out} exists; --overwrite replaces it")
    if not 0 <= arguments.near <= 1 or not 0 < arguments.overlap <= 1:
        raise UsageError("--near is a share from 0 to 1, --overlap one above 0")
    limits = Limits(arguments.min_letters, arguments.max_characters, arguments.min_letter_share, arguments.min_compressed)
    options = Options(
        limits,
        arguments.near,
        not arguments.keep_lines,
        arguments.simplified,
        arguments.against,
        arguments.overlap,
        arguments.strict,
    )
    report = clean(files, out, options)
    print_report(report, out)
    if arguments.report:
        atomic_write_text(arguments.report, json.dumps(report.as_json(), ensure_ascii=False, indent=1) + "\n")
    if not report.kept:
        print("error: no row is left", file=sys.stderr)
    return 0 if report.kept else 1


if __name__ == "__main__":
    run_main(main)
