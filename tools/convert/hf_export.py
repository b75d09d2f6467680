"""A checkpoint as transformers keeps it: another number type, shards of a wanted size, and what transformers says of the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import (
    GENERATION_FILE,
    MAX_SHARD_BYTES,
    find_model,
    finished_config,
    load_config,
    load_finished,
    load_pretrained,
    model_type,
    portability_notes,
    save_pretrained,
)
from model.files import atomic_directory
from model.tokenizer import BPETokenizer
from tools.convert.compare import GREEDY_TOKENS, PROBE_TEXTS, Comparison, Difference, check_fits, log_probs, probe_rows, same_greedy

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BESIDE = (GENERATION_FILE, "README.md", "LICENSE")  # taken over as they are
CONTEXT = 256

CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "你好！"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "2 + 3 = ?"}],
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?\n\nIn one word."},
    ],
)


def export_hf(
    folder: str | Path,
    out_dir: str | Path,
    dtype: str = "f32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    log: Callable[[str], None] = print,
) -> Path:
    """Write the model of `folder` to `out_dir` (a folder that stands there is replaced) with its weights as f32, bf16 or f16.

    ValueError for another dtype and for a model that transformers has no architecture for, naming the settings in the way.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not available for hf; choose one of: {', '.join(DTYPES)}")
    folder, out_dir = find_model(folder), Path(out_dir)
    config = finished_config(load_config(folder))
    if model_type(config) == "haoai":
        raise ValueError(f"{folder} has no architecture in transformers: {'; '.join(portability_notes(config))}")
    model, tokenizer = load_finished(folder, log), BPETokenizer.from_pretrained(folder)
    check_fits(tokenizer, config.vocab_size)
    with atomic_directory(out_dir) as partial:
        save_pretrained(model, partial, tokenizer, DTYPES[dtype], max_shard_bytes)
        for name in BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    files = sorted(out_dir.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    log(f"wrote {out_dir} ({size / 2**20:.1f} MiB of weights in {count}, {model_type(config)}, {dtype})")
    return out_dir


def check_hf(folder: str | Path, out_dir: str | Path) -> Comparison | None:
    """Load `out_dir` in transformers and compare it with the checkpoint `folder`; None when transformers is not installed.

    Both compute in fp32, so that what differs is the rounding of the stored weights.
    """
    try:
        import transformers
    except ImportError:
        return None
    transformers.utils.logging.disable_progress_bar()
    folder = find_model(folder)
    ours, tokenizer = load_pretrained(folder), BPETokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out_dir)
    context = min(ours.config.max_position_embeddings, CONTEXT)
    rows = probe_rows(tokenizer, context)
    difference = Difference()
    for row in rows:
        difference.add(log_probs(ours, row), _their_log_probs(theirs, row))
    texts = [
        their_tokenizer(text, add_special_tokens=False).input_ids == tokenizer.encode(text, parse_special=True) for text in PROBE_TEXTS
    ]
    chats = _same_chats(tokenizer, their_tokenizer)
    starts = [row[: context // 2] for row in rows[:3]]
    equal = all(same_greedy(ours, row, _their_greedy(theirs, row)) for row in starts)
    version = f"transformers {transformers.__version__}"
    return Comparison(
        version,
        difference.largest,
        difference.positions,
        all(texts),
        equal,
        all(chats) if chats else None,
        mean_kl=difference.mean_kl,
    )


@torch.inference_mode()
def _their_log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def _their_greedy(model: Any, ids: list[int]) -> list[int]:
    # Not by `generate`, which follows generation_config.json: its end tokens, penalties and sampling.
    given = list(ids)
    for _ in range(GREEDY_TOKENS):
        given.append(int(_their_log_probs(model, given)[-1].argmax()))
    return given[len(ids) :]


def _same_chats(ours: BPETokenizer, theirs: Any) -> list[bool]:
    """Whether the ids are equal, per conversation that our renderer does not refuse."""
    same = []
    for chat in CHATS:
        try:
            expected = ours.render(chat, add_generation_prompt=True).ids
        except ValueError:
            continue
        same.append(theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False) == expected)
    return same


__all__ = ["DTYPES", "check_hf", "export_hf"]
