"""An adapter and its base as one model: for programs that know no adapters, and to go on without the base's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from model.adapter_files import adapter_base, is_adapter, load_adapter
from model.checkpoint import GENERATION_FILE, find_model, load_pretrained, save_pretrained
from model.files import atomic_directory
from model.tokenizer import BPETokenizer
from tools.convert.compare import GREEDY_TOKENS, PROBE_TEXTS, Comparison, Difference, check_fits, greedy, log_probs, probe_rows, same_greedy
from tools.convert.hf_export import CONTEXT, DTYPES

TOKENIZER_FILE = "tokenizer.json"


def merge_lora(folder: str | Path, out_dir: str | Path, dtype: str = "f32", log: Callable[[str], None] = print) -> Path:
    """Write the model that the adapter in `folder` and its base are together to `out_dir`, which is replaced.

    FileNotFoundError where the base is not found, ValueError where it is another than the adapter was trained on.
    """
    folder, out_dir = find_model(folder), Path(out_dir)
    if not is_adapter(folder):
        raise ValueError(f"{folder} is no adapter but a whole model: there is nothing to merge")
    base = adapter_base(folder)
    model, tokenizer = load_pretrained(folder), _tokenizer(folder, base)
    check_fits(tokenizer, model.config.vocab_size)
    with atomic_directory(out_dir) as partial:
        save_pretrained(model, partial, tokenizer, DTYPES[dtype])
        if (folder / GENERATION_FILE).is_file():
            shutil.copyfile(folder / GENERATION_FILE, partial / GENERATION_FILE)
    log(f"merged {folder} into {base}: {out_dir} ({dtype})")
    return out_dir


def check_merged(folder: str | Path, out_dir: str | Path) -> Comparison:
    """Run the base with the adapter beside it, and what was written; both compute in fp32."""
    folder, out_dir = find_model(folder), Path(out_dir)
    base = adapter_base(folder)
    apart, whole = load_pretrained(base), load_pretrained(out_dir)
    load_adapter(apart, folder)
    tokenizer = _tokenizer(folder, base)
    rows = probe_rows(tokenizer, min(apart.config.max_position_embeddings, CONTEXT))
    difference = Difference()
    for row in rows:
        difference.add(log_probs(apart, row), log_probs(whole, row))
    equal = all(same_greedy(apart, row[: CONTEXT // 2], greedy(whole, row[: CONTEXT // 2], GREEDY_TOKENS)) for row in rows[:3])
    written = BPETokenizer.from_pretrained(out_dir)
    same_ids = all(tokenizer.encode(text) == written.encode(text) for text in PROBE_TEXTS)
    name = "merged against the adapter beside its base"
    return Comparison(name, difference.largest, difference.positions, same_ids, equal, mean_kl=difference.mean_kl)


def _tokenizer(folder: Path, base: Path) -> BPETokenizer:
    return BPETokenizer.from_pretrained(folder if (folder / TOKENIZER_FILE).is_file() else base)


__all__ = ["check_merged", "merge_lora"]
