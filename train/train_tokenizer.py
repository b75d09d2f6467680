"""Learn a byte-level BPE tokenizer: `python -m train.train_tokenizer [tokenizer.vocab_size=16384] [data.pretrain_file=...]`.

The same corpus and settings give the same tokenizer, which is then reused instead of trained again.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.files import atomic_write_text, remove_leftovers
from model.tokenizer import BPETokenizer
from train.config import TokenizerStageConfig, UsageError, parse_command_line, to_dict
from train.data_files import DataFile, expand_paths, is_token_file
from train.formats import BadRows, as_text, read_samples
from train.program import run_main
from train.runtime import peak_memory_mb
from train.store import file_digest

VERSION = 1
RECORD_FILE = "corpus.json"
LONGEST_DOCUMENT = 20_000  # characters of one document that the sample uses


def train_tokenizer(settings: TokenizerStageConfig, log: Callable[[str], object] = print) -> BPETokenizer:
    """The tokenizer of settings.out_dir, trained unless it was made from this corpus with these settings.

    Raises ValueError when no text is usable or the vocabulary is too small, FileNotFoundError for missing files.
    """
    files = [f for f in expand_paths(settings.data.pretrain_file) if not is_token_file(f.path)]
    if not files:
        raise ValueError(f"{settings.data.pretrain_file} holds only ready token ids; a tokenizer is learned from text")
    out = Path(settings.out_dir)
    key = _key(files, settings)
    record = out / RECORD_FILE
    if out.is_dir():
        remove_leftovers(out)
    if (out / "tokenizer.json").is_file() and not settings.overwrite:
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["key"] == key:
            log(f"tokenizer {out}: unchanged corpus and settings, reused")
            return BPETokenizer.from_pretrained(out)
        if not record.is_file():
            raise UsageError(f"{out} holds a tokenizer that was not trained here; name another out_dir, or --overwrite it")
    start = time.perf_counter()
    texts, sizes = sample_texts(files, settings.tokenizer.sample_mb, settings.data.strict, log)
    tokenizer = BPETokenizer.train(texts, settings.tokenizer.vocab_size, progress=sys.stderr.isatty())
    atomic_write_text(record, json.dumps({"key": None}) + "\n")  # until all files are there: trained here, from no corpus
    tokenizer.save_pretrained(out)
    facts = {"key": key, "vocab_size": tokenizer.vocab_size, "sample_bytes": sizes, "settings": to_dict(settings.tokenizer)}
    atomic_write_text(record, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    memory = peak_memory_mb("cpu")
    log(
        f"tokenizer {out}: {tokenizer.vocab_size:,} tokens from "
        + ", ".join(f"{size / 1e6:.1f} MB {language}" for language, size in sorted(sizes.items()))
        + f" in {time.perf_counter() - start:.1f} s"
        + (f", peak memory {memory:,.0f} MiB" if memory else "")
    )
    if tokenizer.vocab_size < settings.tokenizer.vocab_size:
        log(f"note: the text is too small for {settings.tokenizer.vocab_size:,} tokens; nothing more can be merged")
    for language, text in _examples(texts).items():
        log(f"  {language}: {len(text) / max(len(tokenizer.encode(text)), 1):.2f} characters per token")
    return tokenizer


def sample_texts(
    files: list[DataFile], megabytes: float, strict: bool = False, log: Callable[[str], object] = print
) -> tuple[list[str], dict[str, int]]:
    """At most `megabytes` of documents, half for each of zh and the rest, chosen by the hash of their text.

    The choice depends neither on the order of files nor on a random state, and memory stays within the sample's size.
    Returns the texts in order of their hash, and bytes by language.
    """
    budget = megabytes * 1e6 / 2
    kept: dict[str, list[tuple[int, str]]] = {"zh": [], "en": []}
    sizes = dict.fromkeys(kept, 0)
    bad = BadRows()
    with tqdm(total=sum(f.path.stat().st_size for f in files), unit="B", unit_scale=True, desc="reading", leave=False, disable=None) as bar:
        for file in files:
            for _, text in read_samples(file.path, bad, as_text):
                text = text[:LONGEST_DOCUMENT]
                language = language_of(text)
                heap = kept[language]
                rank = -int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
                if sizes[language] >= budget and rank < heap[0][0]:
                    continue
                heapq.heappush(heap, (rank, text))
                sizes[language] += len(text.encode("utf-8"))
                while sizes[language] > budget and len(heap) > 1:
                    sizes[language] -= len(heapq.heappop(heap)[1].encode("utf-8"))
            bar.update(file.path.stat().st_size)
    bad.report(log)
    bad.raise_if_strict(strict)
    texts = [text for _, text in sorted(kept["zh"] + kept["en"])]
    if not texts:
        raise ValueError(f"no usable text in {', '.join(str(f.path) for f in files[:3])}; `python -m tools.check_data` shows what it holds")
    return texts, {language: size for language, size in sizes.items() if size}


def language_of(text: str) -> str:
    """zh when Chinese characters are a fifth or more of the letters, else en (any other language)."""
    letters = [c for c in text[:2000] if c.isalpha()]
    return "zh" if sum("\u4e00" <= c <= "\u9fff" for c in letters) >= 0.2 * max(len(letters), 1) and letters else "en"


def _examples(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts[:2000]:
        language = language_of(text)
        found[language] = (found.get(language, "") + text)[:50_000]
    return found


def _key(files: list[DataFile], settings: TokenizerStageConfig) -> str:
    facts: list[Any] = [VERSION, to_dict(settings.tokenizer)]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for hashed in sorted(file_digest(f.path) for f in files):
        digest.update(hashed)
    return digest.hexdigest()


def main() -> None:
    settings = parse_command_line(TokenizerStageConfig)
    if settings.dry_run:
        files = expand_paths(settings.data.pretrain_file)
        print(
            f"{len(files)} files, {sum(f.path.stat().st_size for f in files) / 1e6:.1f} MB on disk -> "
            f"{settings.tokenizer.vocab_size} tokens in {settings.out_dir}"
        )
        return
    train_tokenizer(settings)


if __name__ == "__main__":
    run_main(main)
