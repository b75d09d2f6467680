"""Damaged and hostile files, for every reader of models: a clear error or the right data; no crash, no hang, no huge allocation.

The long version is a drill: `python -m pytest -m drill tests/faults/test_hostile_files.py -s` (DRILL_FILES sets how many files of each
kind, 2,000 unless set).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.prompts import load_templates
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.checkpoint import load_pretrained
from model.weight_files import load_weights, read_index, save_weights
from train.config import PretrainConfig, parse_command_line
from train.formats import read_token_ids

ROOM = 512 * 2**20  # bytes that a reader may take beyond what the process has
LONGEST = 20.0  # seconds for one file of a few kilobytes
REFUSED = (ValueError, FileNotFoundError)
"""What `train.program.run_main` shows as one line."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(900, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """An allocation of more than ROOM fails (Linux; elsewhere nothing is limited)."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def flipped(data: bytes, random_: random.Random, first: int = 0, most: int = 3) -> bytes:
    """One to `most` bits changed; or the end gone; or a few bytes replaced by extreme ones."""
    changed = bytearray(data)
    kind = random_.randrange(4)
    if kind == 0:
        return bytes(changed[: random_.randrange(first, len(data))])
    for _ in range(random_.randint(1, most)):
        place = random_.randrange(first, len(data))
        if kind == 1:
            changed[place : place + 8] = random_.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b'":[[{{}},'])
        else:
            changed[place] ^= 1 << random_.randrange(8)
    return bytes(changed)


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "\0",
    [],
    [[]],
    {},
    {"a": {}},
    "x" * 10**5,
]


def altered(value: Any, random_: random.Random) -> Any:
    """JSON with one value somewhere replaced, a key renamed, or a list repeated."""
    if isinstance(value, dict) and value and random_.random() < 0.9:
        key = random_.choice(list(value))
        kind = random_.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {(name + "s" if name == key else name): item for name, item in value.items()}
        return {**value, key: altered(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.8:
        place = random_.randrange(len(value))
        return [*value[:place], altered(value[place], random_), *value[place + 1 :]]
    return random_.choice(ODD)


def try_read(read: Callable[[], str]) -> str:
    """What came of it: "refused", or what `read` says. Anything but a clear error fails the test."""
    start = time.perf_counter()
    try:
        with little_memory():
            result = read()
    except REFUSED as error:
        assert str(error).strip(), "an error without words"
        result = "refused"
    assert time.perf_counter() - start < LONGEST
    return result


# ---------------------------------------------------------------- the readers


def of_safetensors(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """One place of a file with checksums, as all that are written here: refused, or the same weights. (Two places could be the name
    under which the checksums stand, and a weight.)"""
    file = folder / "some.safetensors"
    weights = {"a": torch.arange(60, dtype=torch.float32).view(6, 10), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_weights(weights, file)
    file.write_bytes(flipped(file.read_bytes(), random_, most=1))

    def read() -> str:
        found = load_weights(file)
        assert all(torch.equal(found[name], weights[name]) for name in weights if name in found)
        return "the same" if found.keys() == weights.keys() else "another name"

    return try_read(read)


def of_foreign_safetensors(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """A header that lies: lengths, shapes, offsets, types."""
    header: Any = {
        "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [64, 68]},
    }
    for _ in range(random_.randint(1, 2)):
        header = altered(header, random_)
    text = json.dumps(header).encode()
    length = random_.choice([len(text)] * 6 + [2**63, 2**40, 0, len(text) + 1])
    file = folder / "foreign.safetensors"
    file.write_bytes(struct.pack("<Q", length) + text + bytes(68))

    def read() -> str:
        found = load_weights(file)
        assert sum(tensor.numel() for tensor in found.values()) <= 68
        return "read"

    return try_read(read)


def of_model_folder(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """One of the JSON files beside the weights, with a value changed or a bit flipped."""
    name = random_.choice(["config.json", "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
    place = folder / "model"
    file, whole = place / name, (place / name).read_bytes()
    if random_.random() < 0.4:
        file.write_bytes(flipped(whole, random_))
    else:
        content = json.loads(whole)
        for _ in range(random_.randint(1, 2)):
            content = altered(content, random_)
        file.write_text(json.dumps(content), encoding="utf-8")

    def read() -> str:
        if name == "config.json":
            loaded, ids = load_pretrained(place), torch.tensor([[1, 2, 3]])
            with torch.no_grad():
                loaded(ids)
            return "read"
        tokenizer = BPETokenizer.from_pretrained(place)
        tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
        return "read"

    try:
        return try_read(read)
    finally:
        file.write_bytes(whole)


def of_index(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """The index of shards: no name in it leaves the folder."""
    content: Any = {"metadata": {"total_size": 9, "crc32": {"a": 1}}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "c"}}
    content = altered(content, random_)
    file = folder / "model.safetensors.index.json"
    text = json.dumps(content).encode()
    file.write_bytes(flipped(text, random_) if random_.random() < 0.3 else text)

    def read() -> str:
        places, _ = read_index(file)
        assert all(Path(name).name == name for name in places.values())
        return "read"

    return try_read(read)


YAML_ATTACKS = [
    "a: !!python/object/apply:os.system ['touch HACKED']",
    "a: !!python/name:os.system",
    "- !!python/object/new:os.system ['touch HACKED']",
    "a: &a [*a]",
    "a: *b",
    "\t- x: [",
    "''",
    "[" * 5000,
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\ntrain: {lr: *c}\n",
]


def of_yaml(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """Settings and prompt templates: damaged, with tags that would make objects, with anchors that grow."""
    read_file, text = random_.choice(
        [
            (load_templates, "- name: greeting\n  description: 问候\n  template:\n    zh: 你好 {message}\n    en: Hello {message}\n"),
            (settings_of, "train:\n  lr: 3e-4\n  max_steps: 20\nmodel: {preset: nano, n_layer: 2}\ndata: {pretrain_file: [a, b]}\n"),
        ]
    )
    file = folder / "file.yaml"
    file.write_bytes(flipped(text.encode(), random_) if random_.random() < 0.7 else random_.choice(YAML_ATTACKS).encode())

    def read() -> str:
        read_file(file)
        return "read"

    result = try_read(read)
    assert not Path("HACKED").exists()
    return result


def settings_of(file: Path) -> PretrainConfig:
    return parse_command_line(PretrainConfig, ["--config", str(file)])


def of_token_ids(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """.npy files, pickled objects among them, and raw ids with a description."""
    file = folder / "ids.npy"
    with file.open("wb") as stream:
        np.save(stream, np.arange(100, dtype=np.uint16))
    if random_.random() < 0.2:
        file.write_bytes(pickle.dumps(Hostile()))
    elif random_.random() < 0.2:
        with file.open("wb") as stream:
            np.save(stream, np.array([Hostile()], dtype=object))
    else:
        file.write_bytes(flipped(file.read_bytes(), random_))

    def read() -> str:
        assert int(np.asarray(read_token_ids(file)[:4]).size) <= 4
        return "read"

    result = try_read(read)
    assert Hostile.ran == 0
    return result


class Hostile:
    """Runs when it is unpickled."""

    ran = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return hostile_call, ()


def hostile_call() -> None:
    Hostile.ran += 1


def of_gguf(random_: random.Random, folder: Path, model: SmartHaoAI) -> str:
    """A GGUF file: header and tensors."""
    from tools.convert.gguf_file import GGUFFile

    file = folder / "model.gguf"
    if not (folder / "whole.gguf").is_file():
        write_gguf(folder / "whole.gguf")
    data = (folder / "whole.gguf").read_bytes()
    file.write_bytes(flipped(data, random_))

    def read() -> str:
        found = GGUFFile(file)
        for name in found.tensors:
            found.check_format(name)
            found.read(name)
        return "read"

    return try_read(read)


def write_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(20)])
    writer.add_array("tokenizer.ggml.token_type", list(range(20)))
    writer.add_tensor("a.weight", np.ones((4, 32), dtype=np.float32))
    writer.add_tensor("b.weight", np.ones((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


READERS: dict[str, Callable[[random.Random, Path, SmartHaoAI], str]] = {
    "safetensors with checksums": of_safetensors,
    "safetensors of others": of_foreign_safetensors,
    "JSON of a model": of_model_folder,
    "index of shards": of_index,
    "YAML": of_yaml,
    "token ids": of_token_ids,
    "GGUF": of_gguf,
}


def fuzz(reader: str, count: int, seed: int, model: SmartHaoAI, tokenizer: BPETokenizer, folder: Path) -> Counter[str]:
    if reader == "GGUF":
        pytest.importorskip("gguf")
    random_ = random.Random(seed)
    model.save_pretrained(folder / "model", tokenizer)
    return Counter(READERS[reader](random_, folder, model) for _ in range(count))


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_refused_or_right(
    reader: str, seed: int, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    """Guards: raw errors of libraries, sizes in a header that are believed, code in data."""
    found = fuzz(reader, 60, seed, tiny_model, tiny_tokenizer, tmp_path)
    assert found["refused"] > 0 and found.total() == 60


@pytest.mark.drill
def test_the_drill(
    seed: int, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: what happens once in two thousand files."""
    count = int(os.environ.get("DRILL_FILES", "2000"))
    lines = []
    for reader in READERS:
        (tmp_path / reader).mkdir()
        start = time.perf_counter()
        found = fuzz(reader, count, seed, tiny_model, tiny_tokenizer, tmp_path / reader)
        words = ", ".join(f"{name} {number:,}" for name, number in found.most_common())
        lines.append(f"{reader:<28} {count:>6,} files: {words}; {time.perf_counter() - start:.0f} s")
    with capsys.disabled():
        print(f"\nTEST_SEED={seed}, at most {ROOM >> 20} MiB more memory, {LONGEST:.0f} s a file\n" + "\n".join(lines))


# ---------------------------------------------------------------- templates

ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ ('{0.__class__}').format(1) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ self._TemplateReference__context }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% extends '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_templates_reach_nothing(template: str, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: the template of a downloaded model running code, reading files, or taking all memory."""
    messages = [{"role": "user", "content": "x"}]
    tokenizer = BPETokenizer(tiny_tokenizer.backend, template)

    def read() -> str:
        text = tokenizer.render(messages).text
        assert "class" not in text and "root" not in text and "object" not in text, text
        return "harmless"

    assert try_read(read) in ("refused", "harmless")  # what the sandbox hides is empty in the text
    assert messages == [{"role": "user", "content": "x"}]


def test_a_whole_model_still_loads(tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a limit of memory in these tests so low that everything is refused."""
    SmartHaoAI(tiny_config).save_pretrained(tmp_path, tiny_tokenizer)

    def read() -> str:
        load_pretrained(tmp_path)
        return "read"

    assert try_read(read) == "read"


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("tokenizer.json", ("model", "continuing_subword_prefix"), "x" * 100, "tokenizer.json is not a readable tokenizer"),
        ("tokenizer.json", ("model", "merges"), [["没有", "有"]], "tokenizer.json"),
        ("generation_config.json", ("eos_token_id",), 10**30, None),
        ("generation_config.json", ("eos_token_id",), -1, None),
    ],
)
def test_what_the_drill_found(
    name: str, path: tuple[str, ...], value: Any, words: str | None, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    """Guards: a panic of the tokenizer library, which no `except Exception` catches; ids that are no ids."""
    tiny_model.save_pretrained(tmp_path, tiny_tokenizer)
    content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    if words is None:
        assert BPETokenizer.from_pretrained(tmp_path).encode("你好") == tiny_tokenizer.encode("你好")
    else:
        with pytest.raises(ValueError, match=words):
            BPETokenizer.from_pretrained(tmp_path)
