"""Looks at training data before a run: formats, bad rows with line and reason, lengths, languages, duplicates.

    python -m tools.check_data FILE... [--strict] [--show 3] [--json] [--tokenizer DIR] [--context 512]

FILE is a file, folder or glob of any format that training reads. Nothing is changed. `--show` prints rows with their
learned tokens (an assistant's words) marked and the context dimmed. Exit status: 0; 1 when no row is usable, or with
`--strict` any row is bad; 2 for a wrong command line or a missing file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from train.documents import answer_ids
from train.formats import (
    BadRows,
    Conversation,
    DataFile,
    Judged,
    Preference,
    RowError,
    Sample,
    Text,
    expand_paths,
    format_name,
    is_token_file,
    read_rows,
    read_token_ids,
    recognise,
)

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer

DEFAULT_TOKENIZER = Path("weight/tokenizer")
PRINTED_BAD_ROWS = 20
KEPT_BAD_ROWS = 1000  # in the JSON output; the count is always complete
LANGUAGE_SAMPLE = 4000  # characters of a row that decide its language
BAR_WIDTH = 40

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class FileReport:
    """What was found in one file. Lengths and hashes take 12 to 16 bytes a row, whatever the length of the rows."""

    path: Path
    bad: BadRows = field(default_factory=lambda: BadRows(keep=KEPT_BAD_ROWS))
    formats: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    characters: array[int] = field(default_factory=lambda: array("Q"))
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    languages: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, Sample]] = field(default_factory=list)
    ready_tokens: int | None = None
    """Number of ids in a file of ready token ids, which has no rows to look into."""
    largest_id: int | None = None

    @property
    def rows(self) -> int:
        """Usable and bad rows."""
        return self.kept + self.bad.total

    @property
    def format(self) -> str:
        """Names of the formats found, the most frequent first."""
        return ", ".join(name for name, _ in self.formats.most_common()) or "none"

    def longer_than(self, context: int) -> int | None:
        """Rows with more tokens than the context; None when no tokenizer counted them."""
        return int((np.asarray(self.tokens) > context).sum()) if self.tokens else None


# ---------------------------------------------------------------- measuring


def check_file(file: DataFile | Path, tokenizer: BPETokenizer | None = None, show: int = 0) -> FileReport:
    """Reads one file; faulty rows land in `.bad`. Raises ValueError or OSError when it cannot be opened."""
    path = file.path if isinstance(file, DataFile) else file
    report = FileReport(path)
    if is_token_file(path):
        _check_token_file(report)
        return report
    for row in tqdm(read_rows(path), desc=path.name, unit=" rows", leave=False, disable=None, file=sys.stderr):
        if row.error is not None:
            report.bad.add(path, row.line, row.error)
            continue
        try:
            sample = recognise(row.value)
        except RowError as error:
            report.bad.add(path, row.line, str(error))
            continue
        try:
            tokens = None if tokenizer is None else max(len(ids) for ids, _ in marked_tokens(sample, tokenizer))
        except ValueError as error:  # the chat template of an imported model refuses it
            report.bad.add(path, row.line, str(error))
            continue
        report.formats[format_name(row.value)] += 1
        report.kept += 1
        _measure(report, sample, tokens)
        if len(report.samples) < show:
            report.samples.append((row.line, sample))
    return report


def _check_token_file(report: FileReport) -> None:
    ids = read_token_ids(report.path)
    step = 1 << 24  # in steps: a memory map of many gigabytes is never held at once
    report.ready_tokens = len(ids)
    report.largest_id = max(int(ids[start : start + step].max()) for start in range(0, len(ids), step))
    report.formats[f"token ids ({ids.dtype.name})"] = 1
    report.kept = 1


def _measure(report: FileReport, sample: Sample, tokens: int | None) -> None:
    text = "\n".join(strings(sample))
    report.characters.append(len(text))
    report.languages[language_of(text)] += 1
    digest = hashlib.blake2b(identity(sample).encode("utf-8"), digest_size=8).digest()
    report.hashes.append(int.from_bytes(digest, "big"))
    if tokens is not None:
        report.tokens.append(tokens)


def language_of(text: str) -> str:
    """ "zh", "en" or "other" by script. A Chinese character counts as three letters: it says about as much."""
    part = text[:LANGUAGE_SAMPLE]
    han, latin = len(_HAN.findall(part)), len(_LATIN.findall(part))
    letters = len(_LETTER.findall(part)) + 2 * han
    if not letters:
        return "other"
    if 3 * han >= letters / 2:
        return "zh"
    return "en" if latin >= letters / 2 else "other"


def _messages(sample: Sample) -> Iterator[dict[str, Any]]:
    if isinstance(sample, Conversation):
        yield from sample.messages
    elif isinstance(sample, Preference):
        yield from (*sample.prompt, *sample.chosen, *sample.rejected)
    elif isinstance(sample, Judged):
        yield from (*sample.prompt, *sample.completion)


def strings(sample: Sample) -> Iterator[str]:
    """Every text of a sample: what is said, reasoned and called."""
    if isinstance(sample, Text):
        yield sample.text
    for message in _messages(sample):
        yield from (message[key] for key in ("reasoning_content", "content") if message.get(key))
        yield from (json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ()))


def identity(sample: Sample) -> str:
    """Equal for samples that are the same row."""
    parts = [sample.text] if isinstance(sample, Text) else list(_messages(sample))
    return json.dumps([type(sample).__name__, getattr(sample, "label", None), parts], ensure_ascii=False, sort_keys=True)


def marked_tokens(sample: Sample, tokenizer: BPETokenizer) -> list[tuple[list[int], list[bool]]]:
    """What training sees, as (token ids, learned) sequences: two for a preference pair, else one."""
    if isinstance(sample, Text):
        ids = [*tokenizer.encode(sample.text), tokenizer.document_end_id]
        return [(ids, [True] * len(ids))]
    if isinstance(sample, Conversation):
        rendered = tokenizer.render(sample.messages, sample.tools, enable_thinking=sample.thinking)
        return [(rendered.ids, rendered.loss_mask)]
    answers = (sample.chosen, sample.rejected) if isinstance(sample, Preference) else (sample.completion,)
    return [answer_ids(sample, answer, tokenizer) for answer in answers]


def count_duplicates(reports: Iterable[FileReport]) -> int:
    """Rows that repeat an earlier row of these files exactly."""
    hashes = [np.asarray(report.hashes, dtype=np.uint64) for report in reports if report.hashes]
    return sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes))) if hashes else 0


# ---------------------------------------------------------------- output


def as_json(report: FileReport, context: int) -> dict[str, Any]:
    """The object for one file; `bad` holds the first 1,000 bad rows, `bad_rows` counts all."""
    return {
        "file": str(report.path),
        "format": report.format,
        "rows": report.rows,
        "kept": report.kept,
        "bad": [{"line": bad.line, "reason": bad.reason} for bad in report.bad.first],
        "bad_rows": report.bad.total,
        "formats": dict(report.formats),
        "duplicates": count_duplicates([report]),
        "languages": dict(report.languages),
        "characters": _spread(report.characters),
        "tokens": {"total": report.ready_tokens} if report.ready_tokens else _spread(report.tokens),
        "context": context,
        "longer_than_context": report.longer_than(context),
    }


def _spread(lengths: array[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    values = np.asarray(lengths)
    median, high = np.percentile(values, (50, 90), method="lower")
    ends = {"min": int(values.min()), "median": int(median), "p90": int(high), "max": int(values.max())}
    return {"total": int(values.sum()), **ends}


def print_report(report: FileReport, context: int) -> None:
    """One file for a reader."""
    print(f"\n{report.path}")
    _line("format", report.format)
    if report.ready_tokens is not None:
        _line("tokens", f"{report.ready_tokens:,}, largest id {report.largest_id:,}: needs a vocabulary above that")
        return
    _line("rows", f"{report.rows:,}: {report.kept:,} usable, {report.bad.total:,} bad")
    if len(report.formats) > 1:
        _line("mixed", ", ".join(f"{name} {count:,}" for name, count in report.formats.most_common()))
    if report.kept:
        shares = [f"{name} {_share(report.languages[name], report.kept)}" for name in ("zh", "en", "other")]
        _line("languages", ", ".join(shares) + " (of rows, by script)")
        duplicates = count_duplicates([report])
        _line("duplicates", f"{duplicates:,} exact ({_share(duplicates, report.kept)})")
        _line_lengths("characters", report.characters)
        longer = report.longer_than(context)
        if longer is not None:
            _line_lengths("tokens", report.tokens)
            _line("too long", f"{longer:,} rows ({_share(longer, report.kept)}) exceed the context of {context:,} tokens")
        what, lengths = ("tokens", report.tokens) if report.tokens else ("characters", report.characters)
        print(f"  lengths in {what} of a row:")
        _print_histogram(lengths)
    if report.bad.total:
        _print_bad(report.bad)


def _line(name: str, text: str) -> None:
    print(f"  {name:<11} {text}")


def _line_lengths(name: str, lengths: array[int]) -> None:
    spread = _spread(lengths)
    assert spread is not None
    steps = ", ".join(f"{key} {spread[key]:,}" for key in ("min", "median", "p90", "max"))
    _line(name, f"{spread['total']:,} in all; of a row: {steps}")


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return f"{percent:.1f}%" if part == 0 or percent >= 0.1 else "<0.1%"


def _print_histogram(lengths: array[int]) -> None:
    """Bins double in width: rows of 30 and of 3,000 tokens fit one picture."""
    exponents = np.maximum(np.frexp(np.asarray(lengths, dtype=np.float64))[1], 1)  # 2**(e-1) <= length < 2**e
    counts = Counter(exponents.tolist())
    width = len(f"{2 ** max(counts):,}")
    for exponent in range(min(counts), max(counts) + 1):
        low, high = (0 if exponent == 1 else 2 ** (exponent - 1)), 2**exponent - 1
        bar = "#" * round(BAR_WIDTH * counts[exponent] / max(counts.values()))
        print(f"    {low:>{width},} - {high:>{width},} {counts[exponent]:>10,} {bar}".rstrip())


def _print_bad(bad: BadRows) -> None:
    print("  bad rows (skipped in training):")
    for row in bad.first[:PRINTED_BAD_ROWS]:
        print(f"    line {row.line}: {_CONTROL.sub('�', row.reason)}")
    if bad.total > PRINTED_BAD_ROWS:
        print(f"    ... {bad.total - PRINTED_BAD_ROWS:,} more; all by reason (N is any number):")
        for reason, count in bad.by_reason.most_common():
            print(f"    {count:>9,}  {_CONTROL.sub('�', reason)}")


def print_samples(report: FileReport, tokenizer: BPETokenizer, colour: bool) -> None:
    """The first rows as training sees them, learned tokens marked."""
    for line, sample in report.samples:
        sequences = marked_tokens(sample, tokenizer)
        names = ("chosen", "rejected") if len(sequences) == 2 else (type(sample).__name__.lower(),)
        for name, (ids, learned) in zip(names, sequences, strict=True):
            print(f"\n  line {line}, {name}: {len(ids):,} tokens, {sum(learned):,} learned")
            print(marked_text(ids, learned, tokenizer, colour))


def marked_text(ids: Sequence[int], learned: Sequence[bool], tokenizer: BPETokenizer, colour: bool) -> str:
    """Tokens as text, special ones included: learned runs bold green, the rest dim; or learned runs in «guillemets»."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and learned[end] == learned[start]:
            continue
        data = b"".join(tokenizer.token_bytes(token) for token in ids[start:end])
        text = _CONTROL.sub("�", data.decode("utf-8", errors="replace"))  # data must not steer the terminal
        if colour:
            text = ("\x1b[1;32m" if learned[start] else "\x1b[2m") + text + "\x1b[0m"
        elif learned[start]:
            text = f"«{text}»"
        out.append(text)
        start = end
    return "".join(out)


# ---------------------------------------------------------------- command line


def load_tokenizer(path: Path | None) -> BPETokenizer | None:
    """The named tokenizer, else weight/tokenizer, else None."""
    if path is None and not (DEFAULT_TOKENIZER / "tokenizer.json").is_file():
        return None
    from model.tokenizer import BPETokenizer

    return BPETokenizer.from_pretrained(path or DEFAULT_TOKENIZER)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_data",
        description=(__doc__ or "").splitlines()[0],
        epilog="Exit: 0 fine, 1 bad data, 2 usage.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders or globs of any format that training reads")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when any row is bad")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N rows of each file, learned tokens marked")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=f"count tokens with it (default: {DEFAULT_TOKENIZER})")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="report rows of more than N tokens (default: 512)")
    arguments = parser.parse_args(argv)
    if arguments.context < 1 or arguments.show < 0:
        parser.error("--context needs a number from 1, --show a number from 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    arguments = _arguments(argv)
    try:
        files = expand_paths(arguments.files)
        tokenizer = load_tokenizer(arguments.tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tokenizer is None:
        if arguments.show:
            print(
                "error: --show needs a tokenizer: --tokenizer DIR, or `python -m train.train_tokenizer`",
                file=sys.stderr,
            )
            return 2
        print(f"no tokenizer ({DEFAULT_TOKENIZER} is not there): lengths are in characters only", file=sys.stderr)
    reports = []
    for file in files:
        try:
            report = check_file(file, tokenizer, arguments.show)
        except (ValueError, OSError) as error:  # one unreadable file must not hide what is known about the others
            report = FileReport(file.path)
            report.bad.add(file.path, 0, str(error))
        reports.append(report)
        if not arguments.json:
            print_report(report, arguments.context)
            if tokenizer is not None and report.samples:
                print_samples(report, tokenizer, _wants_colour())
    if arguments.json:
        print(json.dumps({"files": [as_json(report, arguments.context) for report in reports]}, ensure_ascii=False))
    elif len(reports) > 1:
        _print_total(reports)
    usable, bad = sum(report.kept for report in reports), sum(report.bad.total for report in reports)
    if not usable:
        print("error: no usable row in these files", file=sys.stderr)
    elif bad and arguments.strict:
        print(f"error: {bad:,} bad rows with --strict", file=sys.stderr)
    return 1 if not usable or (bad and arguments.strict) else 0


def _print_total(reports: list[FileReport]) -> None:
    rows, kept = sum(report.rows for report in reports), sum(report.kept for report in reports)
    print(f"\n{len(reports)} files")
    _line("rows", f"{rows:,}: {kept:,} usable, {rows - kept:,} bad")
    _line("duplicates", f"{count_duplicates(reports):,} exact, within and between the files")


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    from train.program import run_main

    run_main(main)
