"""Messy data, for every reader: nothing crashes, nothing hangs, nothing is lost: rows read = rows kept + rows reported.

The long version is a drill: `python -m pytest -m drill tests/faults/test_messy_data.py -s` reads 10,000 rows and prints its table
(DRILL_ROWS sets another number).
"""

from __future__ import annotations

import contextlib
import csv
import faulthandler
import gzip
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messy_rows import FAULTS, as_line, rows

from model import BPETokenizer
from tools.check_data import check_file
from tools.clean_data import Options, clean
from train.config import DataConfig
from train.documents import as_judged
from train.formats import (
    BadRows,
    DataFile,
    RowError,
    as_conversation,
    as_preference,
    as_text,
    format_name,
    read_rows,
    read_samples,
    recognise,
)
from train.prompts import _prompt_of, _read_row, read_prompts
from train.store import open_store
from train.train_tokenizer import sample_texts

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "pretrain": as_text,
    "sft": as_conversation,
    "preference": as_preference,
    "judged": as_judged,
}
ROOT = Path(__file__).resolve().parents[2]
SLOWEST = 120  # seconds for a file; a hang ends the tests with the place where it hangs


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(20 * SLOWEST, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def zstandard_bytes(data: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard_bytes}


def all_readers(path: Path, tokenizer: BPETokenizer, folder: Path) -> dict[str, tuple[int, int]]:
    """{reader: (kept, reported)} of everything that reads rows; raises where one crashes. Stores go to `folder`."""
    found: dict[str, tuple[int, int]] = {}
    raw = list(read_rows(path))
    found["rows"] = (sum(row.error is None for row in raw), sum(row.error is not None for row in raw))
    for name, convert in CONVERSIONS.items():
        bad = BadRows()
        found[name] = (sum(1 for _ in read_samples(path, bad, convert)), bad.total)
        assert bad.total == sum(bad.by_reason.values()) and all(row.line >= 1 and row.reason for row in bad.first)
    bad = BadRows()
    found["prompts"] = (sum(1 for _ in read_samples(path, bad, _prompt_of, _read_row)), bad.total)
    report = check_file(path, tokenizer)
    found["check_data"] = (report.kept, report.bad.total)
    cleaned = clean([DataFile(path)], folder / "clean.jsonl", Options(), progress=False)
    found["clean_data"] = (cleaned.kept, sum(rule.total for rule in cleaned.removed.values()))
    assert sum(1 for row in read_rows(folder / "clean.jsonl") if row.error is None) == cleaned.kept
    for kind in CONVERSIONS:
        with contextlib.suppress(ValueError):  # no usable row of this kind: a message, tested below
            store = open_store(str(path), tokenizer, kind, DataConfig(store_dir=str(folder / "store")), log=lambda line: None)
            documents = len(store.train) + len(store.val)
            assert documents > 0 and store.bad >= found[kind][1]  # the template may refuse more
            if kind == "pretrain":
                assert (documents, store.bad) == found[kind]
            elif kind == "preference":
                assert documents == 2 * (sum(found[kind]) - store.bad)
    with contextlib.suppress(ValueError):
        train, held = read_prompts(str(path), tokenizer, longest=200, val_share=0.1, log=lambda line: None)
        assert len(train) + len(held) <= found["prompts"][0]
    texts = sample_texts([DataFile(path)], 1.0, log=lambda line: None)[0] if found["pretrain"][0] else []
    assert all(isinstance(text, str) and text.strip() for text in texts)
    return found


def check_counts(found: dict[str, tuple[int, int]], expected: int) -> None:
    """Every reader accounts for every row."""
    for reader, (kept, reported) in found.items():
        assert kept + reported == expected, f"{reader}: {kept} kept + {reported} reported, {expected} rows were written"


# ---------------------------------------------------------------- short version


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_of_every_fault(suffix: str, seed: int, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: one fault among 160 rows that ends a run, or that hides another row."""
    mixed = rows(random.Random(seed), 160)
    path = tmp_path / f"数据 文件 (1).jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf\r\n" + b"".join(as_line(row) for _, row in mixed) + b"\n \n"))
    found = all_readers(path, tiny_tokenizer, tmp_path)
    check_counts(found, len(mixed))
    assert found["pretrain"][0] > 0 and found["sft"][0] > 0 and found["rows"][1] > 0


def containers(random_: random.Random, count: int) -> Iterator[tuple[str, bytes, int]]:
    """(file name, content, rows) of other containers than lines, with faults that they can hold."""
    values = [row for _, row in rows(random_, 4 * count) if not isinstance(row, bytes)][:count]
    text = json.dumps(values, ensure_ascii=False, indent=random_.choice([None, 1])).encode("utf-8", "surrogatepass")
    yield "一 列表.json", random_.choice([b"", b"\xef\xbb\xbf"]) + text, len(values)
    yield "lines.json", b"".join(json.dumps(value).encode() + b"\r\n" for value in values), len(values)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["prompt", "response", "lang"])
    for value in values:
        wrong = json.dumps(value)[:2000] if random_.random() < 0.7 else "a\nb\r\nc\x00\ufeff"
        writer.writerow(random_.choice([("问", "答", "zh"), (wrong, "答", ""), ("问", wrong, "zh"), ("", " ", wrong)]))
    yield "table 表.csv", table.getvalue().encode("utf-8"), len(values)


def test_other_containers(seed: int, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a list whose faulty row takes the following ones with it; cells with line ends counted as rows."""
    for name, content, count in containers(random.Random(seed), 60):
        (tmp_path / name).write_bytes(content)
        check_counts(all_readers(tmp_path / name, tiny_tokenizer, tmp_path), count)


def test_a_table_of_mixed_types(seed: int, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: values that JSON does not know (dates, bytes) and missing cells."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime

    count = 40
    columns = {
        "prompt": ["问", None, "", "x\x00y"] * 10,
        "response": pyarrow.array([b"bytes", None, b"\xff", b""] * 10),
        "text": ["文", None, None, "字"] * 10,
        "when": [datetime.datetime(2024, 1, day % 28 + 1) for day in range(count)],
    }
    path = tmp_path / "表.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    check_counts(all_readers(path, tiny_tokenizer, tmp_path), count)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.parquet"
    random_ = random.Random(seed)
    for _ in range(60):
        changed = bytearray(data[: random_.randrange(len(data))] if random_.random() < 0.3 else data)
        for _ in range(random_.randint(1, 3)):
            if changed:
                changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
        damaged.write_bytes(bytes(changed))
        read = list(read_rows(damaged))  # without checksums of pages a changed letter is not noticed, a lost row is
        assert len(read) == count or any(row.error for row in read) or not read


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_archives(suffix: str, seed: int, tmp_path: Path) -> None:
    """Guards: an archive cut off by a broken download read as if it were whole; a flipped bit that ends the program."""
    random_ = random.Random(seed)
    lines = [json.dumps({"text": f"{i} " + "".join(random_.choices("天地玄黄宇宙洪荒abcdefgh", k=40))}) for i in range(300)]
    data = COMPRESS[suffix](("\n".join(lines) + "\n").encode())
    path = tmp_path / f"半 half.jsonl{suffix}"
    for trial in range(60):
        changed = bytearray(data)
        if trial % 2:
            del changed[random_.randrange(1, len(data)) :]
        else:
            changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(changed))
        read = list(read_rows(path))
        whole = [row.value for row in read if row.error is None]
        assert any(row.error for row in read) or whole == [json.loads(line) for line in lines]


def test_a_damaged_end_is_one_reported_row(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: what was lost at the end of an archive counted as nothing."""
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(as_line({"text": f"第{i}行 words"}) for i in range(500)), 0)[:9000])
    found = all_readers(path, tiny_tokenizer, tmp_path)
    assert found["rows"][1] == 1 and found["rows"][0] > 100
    check_counts(found, sum(found["rows"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b c.csv", "一.txt", "a.md", "a.parquet", "a.jsonl.gz", "a.json.xz", "a.txt.zst"])
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_under_any_name(name: str, data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards: a file that is not what its name says ending in a trace."""
    for package, suffix in (("pyarrow", ".parquet"), ("zstandard", ".zst")):
        if name.endswith(suffix):
            pytest.importorskip(package)
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    for row in read_rows(path):
        assert row.line >= 1 and (row.error is None or row.error)
        if row.error is None:
            with contextlib.suppress(RowError):
                recognise(row.value)


FIELDS = ["text", "conversations", "messages", "prompt", "response", "completion", "label", "chosen", "rejected", "margin", "instruction"]
FIELDS += [
    "input",
    "output",
    "system",
    "user",
    "assistant",
    "cot",
    "final",
    "question",
    "answer",
    "tools",
    "history",
    "chat_template_kwargs",
]
FIELDS += ["role", "content", "from", "value", "tool_calls", "reasoning_content", "function", "name", "arguments", "type"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "<think>x</think>y"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5), max_leaves=12
)


@settings(max_examples=400, deadline=None)
@given(value=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6) | VALUES)
def test_any_value_is_a_sample_or_a_reason(value: Any) -> None:
    """Guards: TypeError and KeyError from rows of a shape that nobody thought of."""
    for read in (recognise, _read_row, format_name):
        with contextlib.suppress(RowError):
            sample = read(value)
            for convert in (*CONVERSIONS.values(), _prompt_of):
                with contextlib.suppress(RowError):
                    convert(sample)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("行 1.jsonl", b'{"text": "one"}\n\n{"text": }\n{"text": "two"}\n', 3),
        ("crlf.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": 5}\r\n', 2),
        ("list.json", b'[\n{"text": "one"},\n{"text": ""}\n]', 3),
        ("table.csv", b'text,lang\n"a\nb",zh\none\n', 4),
        ("words.txt", b"one\n\ntwo\n\xff\nthree\n", 4),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 3000, 0)[:4000], 250),
    ],
)
def test_strict_stops_at_file_and_line(name: str, content: bytes, line: int, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: --strict that only says that something is wrong somewhere. The lines are counted by hand."""
    path = tmp_path / name
    path.write_bytes(content)
    place = f"{path}:{line}:"
    data = DataConfig(store_dir=str(tmp_path / "store"), strict=True, val_share=0.0)
    with pytest.raises(ValueError) as stopped:
        open_store(str(path), tiny_tokenizer, "pretrain", data, log=lambda text: None)
    assert place in str(stopped.value)
    with pytest.raises(ValueError) as stopped:
        sample_texts([DataFile(path)], 1.0, strict=True, log=lambda text: None)
    assert place in str(stopped.value)
    with pytest.raises(ValueError) as stopped:
        clean([DataFile(path)], tmp_path / "clean.jsonl", Options(strict=True), progress=False)
    assert place in str(stopped.value) and not (tmp_path / "clean.jsonl").exists()
    said = [{"prompt": "问", "response": "答"}, {"prompt": 3, "response": "答"}]
    asked = tmp_path / "问.jsonl"
    asked.write_bytes(b"".join(map(as_line, said)))
    with pytest.raises(ValueError) as stopped:
        read_prompts(str(asked), tiny_tokenizer, 100, strict=True, log=lambda text: None)
    assert f"{asked}:2:" in str(stopped.value)


# ---------------------------------------------------------------- the drill

SMALL_RUN = (
    "model.preset=none model.n_layer=1 model.n_head=2 model.n_kv_head=1 model.n_embd=32 model.intermediate_size=64 data.max_length=64 "
    "train.max_steps=20 train.batch_size=4 train.threads=1 train.eval_tokens=500 train.checkpoint_minutes=0 train.precision=fp32"
).split()


def run_stage(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]])}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=SLOWEST,
        check=False,
    )


def train_on(path: Path, tokenizer_dir: Path, folder: Path) -> dict[str, list[float]]:
    """The losses that stages log which train on the file; each must end well."""
    losses = {}
    options = [*SMALL_RUN, f"tokenizer_dir={tokenizer_dir}", f"data.store_dir={folder / 'store'}"]
    start: list[str] = []
    for module, field in (("train_pretrain", "pretrain_file"), ("train_sft", "sft_file"), ("train_dpo", "preference_file")):
        out = folder / module
        done = run_stage(f"train.{module}", *options, *start, f"data.{field}={path}", f"out_dir={out}")
        assert done.returncode == 0, done.stderr[-2000:]
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert not any(step["skipped"] for step in steps), "a step with a loss that is not finite was left out"
        losses[module] = [step["loss"] for step in steps if step["step"]]
        start = [f"model_dir={out}"]
    return losses


@pytest.mark.slow
def test_training_on_messy_data_stays_finite(seed: int, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a row without learned tokens, or one longer than the context, that makes the loss NaN."""
    path = tmp_path / "messy 数据.jsonl"
    path.write_bytes(b"".join(as_line(row) for _, row in rows(random.Random(seed), 400)))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    losses = train_on(path, tmp_path / "tokenizer", tmp_path)
    assert all(values and all(map(math.isfinite, values)) for values in losses.values())


@pytest.mark.drill
def test_the_drill(seed: int, tiny_tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: what happens once in ten thousand rows."""
    random_, wanted = random.Random(seed), int(os.environ.get("DRILL_ROWS", "10000"))
    table: dict[str, Counter[str]] = defaultdict(Counter)
    files: dict[str, Counter[str]] = defaultdict(Counter)
    done, number, started = 0, 0, time.perf_counter()
    while done < wanted:
        number += 1
        folder = tmp_path / f"{number} 文件夹"
        folder.mkdir()
        count = random_.randint(100, 900)
        if number % 4 == 0:
            made = [(name, content, size, None) for name, content, size in containers(random_, count)]
        else:
            mixed = rows(random_, count)
            suffix = list(COMPRESS)[(number + number // 4) % len(COMPRESS)]
            made = [(f"a b.jsonl{suffix}", COMPRESS[suffix](b"".join(as_line(row) for _, row in mixed)), count, mixed)]
        for name, content, size, listed in made:
            (folder / name).write_bytes(content)
            start = time.perf_counter()
            found = all_readers(folder / name, tiny_tokenizer, folder)
            seconds = time.perf_counter() - start
            check_counts(found, size)
            assert seconds < SLOWEST
            done += size
            facts = files[re.sub(r"^.*?\.", ".", name)]
            facts.update(files=1, rows=size, kept=found["rows"][0], reported=found["rows"][1])
            facts["slowest"] = max(facts["slowest"], round(1000 * seconds))
            for fault, column, kept in by_fault(folder / name, listed or []):
                table[fault][column] += kept
        shutil.rmtree(folder)
    (tmp_path / "all.jsonl").write_bytes(b"".join(as_line(row) for _, row in rows(random_, 2000)))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    losses = train_on(tmp_path / "all.jsonl", tmp_path / "tokenizer", tmp_path)
    with capsys.disabled():
        print(
            f"\n{done:,} rows in {sum(f['files'] for f in files.values())} files, TEST_SEED={seed}, {time.perf_counter() - started:.0f} s"
        )
        columns = ["rows", *CONVERSIONS, "prompts"]
        print("".join(f"{name:>18}" for name in ("lines: fault", *columns)) + "   (kept by each reader; the rest is reported)")
        for fault in FAULTS:
            print(f"{fault:>18}" + "".join(f"{table[fault][column]:>18,}" for column in columns))
        for name, facts in files.items():
            print(f"{name:>18} " + ", ".join(f"{key} {value:,}" for key, value in facts.items()) + " ms for all readers")
        for stage, values in losses.items():
            finite = all(map(math.isfinite, values))
            print(f"{stage:>18} 20 steps on messy rows: loss {values[0]:.3f} -> {values[-1]:.3f}, all finite: {finite}")
    assert all(values and all(map(math.isfinite, values)) for values in losses.values())


def by_fault(path: Path, listed: list[tuple[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """(fault, reader, 1 if it kept the row) of a file of lines."""
    reports: list[tuple[str, Any, Any]] = [(name, convert, recognise) for name, convert in CONVERSIONS.items()]
    for name, convert, read in [*reports, ("prompts", _prompt_of, _read_row)]:
        for line, _ in read_samples(path, BadRows(), convert, read) if listed else []:
            yield listed[line - 1][0], name, 1
    for fault, _ in listed:
        yield fault, "rows", 1
