"""How good after how long? The same text, the same held-out text, the same tokenizer, and as much time as was given.

Ours is `python -m train.train_pretrain` in a process of its own; `plain` is the loop of `plain.py` with the settings that the best-known
small-model project trains with. Both are cut off by the clock, with the schedule planned for it, and measured by
`tools.evaluate.file_bits_per_byte`. Reading and tokenising the text, done once for all, is not counted; everything else is, compilation
included.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.config import HaoAIConfig
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.benchmark.plain import PlainRun, PlainSettings, padded_rows
from tools.evaluate import file_bits_per_byte, load
from train.config import DataConfig, TokenizerConfig, TokenizerStageConfig, UsageError
from train.data import Documents
from train.metrics import read_jsonl
from train.store import TokenStore, open_store
from train.train_tokenizer import train_tokenizer

OURS = ["--preset", "quick", "train.sample_every=0", "train.eval_every=0", "train.checkpoint_every=0", "train.checkpoint_minutes=0"]


@dataclass
class Trained:
    """One program and how far it came."""

    name: str
    minutes: float
    """From the command to its end."""
    steps: int
    tokens: int
    parameters: int
    bits_per_byte: dict[str, float]
    """File name -> bits per byte."""


@dataclass
class Task:
    """What all programs have in common."""

    train: list[str]
    held_out: list[Path]
    tokenizer: Path
    folder: Path
    context: int
    limit_bytes: int
    threads: int = 0

    @property
    def store_words(self) -> list[str]:
        files = ", ".join(self.train)
        return [f"data.pretrain_file=[{files}]", f"data.store_dir={self.folder / 'store'}", f"tokenizer_dir={self.tokenizer}"]

    def open(self) -> TokenStore:
        data = DataConfig(store_dir=str(self.folder / "store"))
        return open_store(list(self.train), BPETokenizer.from_pretrained(self.tokenizer), "pretrain", data, val_share=0.0)

    def measure(self, name: str, minutes: float, steps: int, tokens: int, folder: Path) -> Trained:
        model, tokenizer = load(str(folder), "cpu")
        found = {
            file.name: file_bits_per_byte(model, tokenizer, file, self.context, self.context, self.limit_bytes).bpb or 0.0
            for file in self.held_out
        }
        return Trained(name, minutes, steps, tokens, model.num_parameters(), found)


def make_tokenizer(files: Sequence[str], folder: Path, size: int) -> Path:
    """A tokenizer of these files, trained only once in this folder."""
    if not (folder / "tokenizer.json").is_file():
        data = DataConfig(pretrain_file=list(files))
        train_tokenizer(TokenizerStageConfig(out_dir=str(folder), data=data, tokenizer=TokenizerConfig(vocab_size=size)))
    return folder


def ours(task: Task, name: str, minutes: float, words: Sequence[str]) -> Trained:
    """The training command with `words`. Raises UsageError when it fails."""
    out = task.folder / name.replace(" ", "_").replace("/", "_")
    held_out = f"data.val_file=[{', '.join(map(str, task.held_out))}]"
    own = [f"out_dir={out}", f"train.max_minutes={minutes}", f"train.threads={task.threads}", "--overwrite"]
    command = [sys.executable, "-m", "train.train_pretrain", *OURS, *task.store_words, held_out, *own, *words]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=2)  # what it says goes where messages go
    spent = (time.perf_counter() - start) / 60
    if done.returncode:
        raise UsageError(f"{name}: {' '.join(command[1:])} ended with status {done.returncode}")
    last = [row for row in read_jsonl(out / "metrics.jsonl") if "tokens_per_second" in row][-1]
    return task.measure(name, spent, last["step"], last["tokens"], out)


def plain(task: Task, config: HaoAIConfig, minutes: float, settings: PlainSettings | None = None, seed: int = 0) -> Trained:
    """The plain loop for that long."""
    run, store = PlainRun.of(config, settings), task.open()
    tokenizer = BPETokenizer.from_pretrained(task.tokenizer)
    rows = _pieces(store, run.settings.row_length, seed)
    start, steps, tokens = time.perf_counter(), 0, 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        batch = [next(rows) for _ in range(run.settings.batch_size)]
        run.step(*padded_rows(batch, run.settings.row_length, tokenizer.pad_token_id), done)
        steps, tokens = steps + 1, tokens + sum(map(len, batch))
    spent = (time.perf_counter() - start) / 60
    out = task.folder / "plain"
    save(run, config, tokenizer, out)
    return task.measure("plain fp32", spent, steps, tokens, out)


def _pieces(store: TokenStore, length: int, seed: int) -> Iterator[list[int]]:
    """The shuffled documents, each cut into pieces of at most `length` tokens, the pieces of 2048 documents shuffled once more."""
    documents, random, epoch = Documents(store, "train", seed), np.random.default_rng(seed), 0
    while True:
        order = documents.order(epoch)
        for block in range(0, len(order), 2048):
            cut = [
                (document, start)
                for document in order[block : block + 2048]
                for start in range(0, int(store.train.lengths[document]), length)
            ]
            for index in random.permutation(len(cut)):
                document, start = cut[index]
                yield store.train.tokens(document, start, start + length).tolist()
        epoch += 1


@torch.no_grad()
def save(run: PlainRun, config: HaoAIConfig, tokenizer: BPETokenizer, folder: Path) -> None:
    """The plain model as a checkpoint, to be measured like every other."""
    SmartHaoAI(config).save_pretrained(folder, tokenizer)
    file = folder / "model.safetensors"
    trained = {f"model.{name}": tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    names = load_file(file)
    missing = names.keys() - trained.keys()
    assert not missing, f"the plain model has no {missing}"
    save_file({name: trained[name] for name in names}, file, metadata={"format": "pt"})


def text(rows: Sequence[Trained]) -> str:
    files = list(rows[0].bits_per_byte)
    cells = [["", "minutes", "steps", "tokens", "tokens/s", "parameters", *(f"{name}, bits/byte" for name in files)]]
    for row in rows:
        rate = row.tokens / row.minutes / 60
        counts = [f"{row.minutes:.2f}", f"{row.steps:,}", f"{row.tokens:,}", f"{rate:,.0f}", f"{row.parameters / 1e6:.1f}M"]
        cells.append([row.name, *counts, *(f"{row.bits_per_byte[name]:.3f}" for name in files)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) for line in cells
    )
