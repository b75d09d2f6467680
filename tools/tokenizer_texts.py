"""Texts through a tokenizer: does every text come back, how many tokens does a language cost, which ids are never used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from model.token_text import BYTE_TOKEN
from tools.check_data import language_of
from tools.tokenizer_folder import TokenizerFolder
from train.formats import BadRows, as_text, expand_paths, is_token_file, read_samples, read_token_ids

DATA_CHARACTERS = 20_000_000  # read from --data at most, in equal parts from its files: about a minute
BATCH = 256
RANDOM_STRINGS = 64
OUR_READER = "SmartHaoAI"
NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text contains

# Scripts that a careless normaliser or a missing byte damages. Each is a known trap of some tokenizer.
ROUND_TRIP_TEXTS = {
    "Chinese": "今天天气很好，我们一起去公园散步。“真的吗？”她笑着说……",
    "English": "The quick brown fox doesn't jump; it's 12:30 already, isn't it?",
    "code": "def f(x):\n\tif x > 0:\n\t\treturn [i ** 2 for i in range(x)]  # ok\n    \n",
    "emoji": "😀👍🏽👩‍👩‍👧‍👦🇨🇳❤️‍🔥 ok",
    "CJK extension B": "𠀀𠮷𡃁𪚥 㐀",
    "combining marks": "e\u0301 n\u0303 a\u030a\u0323 \u1100\u1161\u11a8 क्षि",
    "composed and decomposed": "é e\u0301 ﬁ ½ Å Å",
    "right to left": "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "control characters": "a\x01\x02\x08\x0b\x0c\x1b[0m\x7f\x85z",
    "NUL": "a\x00b\x00\x00c",
    "line ends": "a\rb\r\nc\n\n\rd\u2028e",
    "full-width": "ＡＢＣ　１２３！（全角）～",
    "mathematics": "∀x∈ℝ: ∑ᵢ xᵢ² ≤ ∞ ⇒ 𝔽₂ ≅ ℤ/2ℤ",
    "zero-width": "a\u200bb\u200cc\u200dd\ufeffe\u00adf",
    "white space": "  two  spaces \t\t tabs \u00a0\u2003 end  ",
    "private and unassigned": "\ue000\uf8ff\U000f0000\U0010ffff\ufffd",
}

SAMPLE_TEXTS = {
    "zh": (
        "清晨的集市还没有完全醒来，卖豆腐的老人已经把木板一块块卸下。雾从河面漫上来，贴着石阶慢慢散开。",
        "计算机用有限的步骤解决问题：先把任务分成小块，再逐一完成，最后检查结果是否正确。",
        "她把信叠好放进抽屉，想了想又拿出来，在末尾添了一句：“下个月我会回来看你们。”",
        "这座城市的地铁每天运送三百万名乘客，高峰时两分钟就有一班列车进站。",
    ),
    "en": (
        "The market had not fully woken when the old man set out his baskets. Mist rose from the river and drifted over the steps.",
        "A computer solves a problem in a finite number of steps: divide the task, finish each part, and check the result.",
        "She folded the letter, put it in the drawer, then took it out again and added one more line before the post left.",
        "Nearly three million passengers ride the city's trains every day, and at rush hour one arrives every two minutes.",
    ),
    "code": (
        "def average(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n"
        "    return sum(values) / len(values)\n",
        "for (int i = 0; i < n; i++) {\n    total += items[i].price * items[i].count;\n}\nreturn total;\n",
        "SELECT name, COUNT(*) AS orders FROM customers JOIN sales USING (id) WHERE year >= 2020 GROUP BY name;\n",
    ),
    "mixed": (
        "用 Python 写一个函数，输入 list，返回 average；如果为空就 raise ValueError。👍",
        "版本 2.1.0 released on 2024-06-30: 修复了 3 bugs ✅，提升 speed 15% 🚀",
    ),
}


@dataclass(frozen=True)
class Failure:
    """A text that came back changed."""

    sample: str
    reader: str
    text: str
    back: str

    def line(self) -> str:
        """The first difference, with a few characters around it."""
        pairs = zip(self.text, self.back, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.text), len(self.back)))
        start = max(0, at - 4)
        return f"{self.sample} ({self.reader}): {ascii(self.text[start : at + 8])} came back as {ascii(self.back[start : at + 8])}"


@dataclass
class Usage:
    """What texts cost in tokens: counts by language, and how often each id was produced."""

    counts: np.ndarray
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    bad_rows: int = 0
    cut: bool = False
    largest_id: int = -1
    """Of ready token ids in the data."""

    def add(self, language: str, text: str, ids: Sequence[int]) -> None:
        """Count one text."""
        row = self.languages.setdefault(language, Counter())
        row.update(texts=1, characters=len(text), bytes=len(text.encode("utf-8")), tokens=len(ids))
        np.add.at(self.counts, np.asarray(ids, dtype=np.int64), 1)

    def table(self) -> list[dict[str, str | float | int]]:
        """One row a language: texts, tokens, characters and bytes per token."""
        return [
            {
                "language": language,
                "texts": row["texts"],
                "tokens": row["tokens"],
                "characters_per_token": round(row["characters"] / max(row["tokens"], 1), 3),
                "bytes_per_token": round(row["bytes"] / max(row["tokens"], 1), 3),
            }
            for language, row in sorted(self.languages.items(), key=lambda item: -item[1]["tokens"])
        ]


def random_strings(seed: int, count: int = RANDOM_STRINGS) -> Iterator[str]:
    """Strings of up to 40 random characters from all of Unicode, short code points more often; the same for one seed."""
    source = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x4E00, 0x9FFF), (0x20, 0x7E)]
    for _ in range(count):
        yield "".join(chr(source.randint(*source.choice(ranges))) for _ in range(source.randint(1, 40)))


def round_trip(folder: TokenizerFolder, seed: int) -> tuple[int, list[Failure]]:
    """(number of texts tried, failures): encode, then decode, with the tokenizers library and with BPETokenizer where it loads."""
    backend, loaded = folder.backend, folder.loaded
    readers: dict[str, Callable[[str], str]] = {}
    if backend is not None:
        library: Tokenizer = backend
        readers["tokenizers"] = lambda text: library.decode(library.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    if loaded is not None:
        own = loaded
        readers[OUR_READER] = lambda text: own.decode(own.encode(text), skip_special_tokens=False)
    texts = [*ROUND_TRIP_TEXTS.items(), *((f"random {i} of seed {seed}", text) for i, text in enumerate(random_strings(seed)))]
    failures = []
    for name, text in texts:
        changed = {reader: back for reader, convert in readers.items() if (back := convert(text)) != text}
        for back in sorted(set(changed.values())):
            failures.append(Failure(name, " and ".join(reader for reader in changed if changed[reader] == back), text, back))
    return len(texts), failures


def measure(folder: TokenizerFolder, files: Sequence[Path | str]) -> Usage:
    """Tokens by language on the files of `--data` (any format that training reads), else on the sample texts.

    Raises ValueError or FileNotFoundError for files that cannot be read.
    """
    usage = Usage(np.zeros(max(len(folder.ids) + len(folder.gaps), 1), dtype=np.int64))
    texts: Iterable[tuple[str, str]] = ((language, text) for language, texts in SAMPLE_TEXTS.items() for text in texts)
    if files:
        texts = _data_texts(files, usage)
    batch: list[tuple[str, str]] = []
    for item in texts:
        batch.append(item)
        if len(batch) == BATCH:
            _count(folder, batch, usage)
            batch = []
    _count(folder, batch, usage)
    return usage


def _count(folder: TokenizerFolder, batch: list[tuple[str, str]], usage: Usage) -> None:
    texts = [text for _, text in batch]
    if folder.loaded is not None:
        rows = folder.loaded.encode_batch(texts)
    elif folder.backend is not None:
        rows = [encoding.ids for encoding in folder.backend.encode_batch(texts, add_special_tokens=False)]
    else:
        return
    for (language, text), ids in zip(batch, rows, strict=True):
        usage.add(language, text, [i for i in ids if i < len(usage.counts)])


def _data_texts(names: Sequence[Path | str], usage: Usage) -> Iterator[tuple[str, str]]:
    files = expand_paths([str(name) for name in names])
    share = DATA_CHARACTERS // max(len(files), 1)
    bad = BadRows()
    for file in files:
        if is_token_file(file.path):
            ids = np.asarray(read_token_ids(file.path)[:share]).astype(np.int64)
            usage.largest_id = max(usage.largest_id, int(ids.max()))
            usage.counts += np.bincount(ids[ids < len(usage.counts)], minlength=len(usage.counts))
            continue
        left = share
        for _, text in read_samples(file.path, bad, as_text):
            if left <= 0:
                usage.cut = True
                break
            text, left = text[:left], left - len(text)
            yield language_of(text), text
    usage.bad_rows = bad.total


def unused(folder: TokenizerFolder, usage: Usage) -> list[int]:
    """Ids (sorted) that the measured texts never produced, without special tokens and the bytes that no UTF-8 text contains."""
    special = {token["id"] for token in folder.added}
    if folder.loaded is not None and folder.byte_level:
        size, never = min(folder.size, folder.loaded.vocab_size), {bytes([value]) for value in NEVER_IN_TEXT}
        special |= {i for i in range(size) if folder.loaded.token_bytes(i) in never}
    used = set(np.flatnonzero(usage.counts).tolist())
    return sorted(set(folder.vocab.values()) - used - special)


def missing_bytes(folder: TokenizerFolder) -> list[int]:
    """Bytes of UTF-8 text for which there is no token: characters that need them are lost."""
    if folder.tokenizer.values.get("model", {}).get("byte_fallback"):
        return [value for value in range(256) if f"<0x{value:02X}>" not in folder.ids and value not in NEVER_IN_TEXT]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    missing = set()
    # Every byte of UTF-8 stands in one of these characters: all of one byte, then each leading byte with each following one.
    characters = [chr(code) for code in (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000))]
    for character in characters:
        letters = splitter.pre_tokenize_str(character)[0][0]
        missing |= {value for value, letter in zip(character.encode("utf-8"), letters, strict=True) if letter not in folder.vocab}
    return sorted(missing)


def unreachable(folder: TokenizerFolder) -> list[int]:
    """Ids (sorted) of learned tokens that no text produces: their merges are missing or lose against others, or the split
    pattern always cuts through them. Single letters, byte tokens and special tokens are not looked at."""
    backend = folder.backend
    if backend is None:
        return []
    special = {token["content"] for token in folder.added}
    words = [(t, i) for t, i in folder.vocab.items() if len(t) > 1 and t not in special and not BYTE_TOKEN.fullmatch(t)]
    # Merges inside a token's letters happen in the same order wherever the letters stand, so a token that its own letters do
    # not give is given by no text.
    lost = {i for t, i in words if [token.id for token in backend.model.tokenize(t)] != [i]}
    if folder.byte_level:
        rest = [(text, i) for _, i in words if i not in lost and "\ufffd" not in (text := backend.decode([i], skip_special_tokens=False))]
        for shape in ("{}", "a{}", "{}a", " {}", "{}\n", "\n{}\n", "{}{}"):  # white space is cut by what stands around it
            encoded = backend.encode_batch([shape.replace("{}", text) for text, _ in rest], add_special_tokens=False)
            rest = [item for item, encoding in zip(rest, encoded, strict=True) if item[1] not in encoding.ids]
            if not rest:
                break
        lost |= {i for _, i in rest}
    return sorted(lost)
