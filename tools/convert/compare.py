"""Is an exported file still the same model? Texts to run it on, our own log-probabilities for them, and the result in one line."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer
    from model.transformer import SmartHaoAI

GREEDY_TOKENS = 12
TIE = 1e-3  # nats: below it the order of our two best tokens is rounding

# What breaks converters: scripts without spaces, runs of white space, digits, full-width and combining characters, characters of
# several code points, tokens cut inside a character, structural tokens written as text.
PROBE_TEXTS: tuple[str, ...] = (
    "清晨的阳光照进教室，同学们正在朗读课文。",
    "The train leaves at 7:45, so please don't be late!",
    'def total(prices):\n    """Sum of a list."""\n\treturn sum(p * 1.08 for p in prices)  # 8% tax\n',
    "ＡＢＣ１２３，全角字符！～「引号」\u3000空格",
    "笑脸 😀👍🏽 家庭 👨‍👩‍👧 旗帜 🇨🇳",
    "12345 + 67890 = 80235; 3.14159; 2024年10月1日",
    "  two spaces,\t\ttabs\n\n\nblank lines   \n end ",
    "naïve café e\u0301 Ångström Привет 안녕하세요",
    "<|im_start|>user\n<think>not a tag</think></s>",
)


@dataclass
class Difference:
    """How far log-probabilities of the same tokens lie apart, collected over positions."""

    largest: float = 0.0
    divergence: float = 0.0
    positions: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Log-probabilities (T, V), or (V,) of one position. V may be the most likely tokens only."""
        found = float((ours - theirs).abs().max())
        # max() drops a NaN; a file that gives one must not pass.
        self.largest = found if math.isnan(found) or math.isnan(self.largest) else max(self.largest, found)
        ours, theirs = ours.double(), theirs.double()
        # The second half is 0 for whole distributions; it keeps the sum positive for rounded or cut ones.
        self.divergence += float((ours.exp() * (ours - theirs) + theirs.exp() - ours.exp()).sum())
        self.positions += ours.numel() // ours.shape[-1]

    @property
    def mean_kl(self) -> float:
        return self.divergence / max(self.positions, 1)


@dataclass
class Comparison:
    """What running an exported file showed, against the checkpoint that it was made from."""

    runtime: str
    """The program and version that ran it."""
    largest: float
    """Largest |difference| of a log-probability, in nats; nan when nothing could be compared."""
    tokens: int
    """Positions compared."""
    same_ids: bool | None
    """Whether its tokenizer gave our ids; None: it has none."""
    same_greedy: bool | None
    """Whether greedy decoding gave our tokens; None: not tried."""
    same_template: bool | None = None
    """Whether its chat template gave our renderer's text or ids; None: it has none."""
    note: str = ""
    mean_kl: float | None = None
    """Mean over the positions of KL(ours || theirs) in nats: what the differences are worth; `largest` is often that of a token
    which is never chosen."""

    def line(self) -> str:
        """The result for people."""
        words = {True: "equal", False: "DIFFERENT", None: "not compared"}
        text = f"{self.runtime}: largest log-probability difference {self.largest:.2e} nats over {self.tokens:,} tokens"
        text += "" if self.mean_kl is None else f" (mean KL divergence {self.mean_kl:.1e})"
        text += f"; token ids {words[self.same_ids]}; greedy continuation {words[self.same_greedy]}"
        if self.same_template is not None:
            text += f"; chat template {words[self.same_template]}"
        return f"{text}; {self.note}" if self.note else text


def check_fits(tokenizer: BPETokenizer, vocab_size: int) -> None:
    """ValueError when the tokenizer gives ids that a model with `vocab_size` rows does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size} rows: they do not belong together")


def probe_rows(tokenizer: BPETokenizer, context: int) -> list[list[int]]:
    """Token rows to run a model on: the probe texts, each after what a document begins with, cut to `context` tokens."""
    start = tokenizer.document_start()
    return [(start + tokenizer.encode(text))[:context] for text in PROBE_TEXTS]


@torch.inference_mode()
def log_probs(model: SmartHaoAI, ids: list[int]) -> Tensor:
    """Log-probabilities (T, V), fp32, of the token after each of `ids`."""
    device = next(model.parameters()).device
    return model(torch.tensor([ids], device=device)).logits[0].float().log_softmax(-1).cpu()


@torch.inference_mode()
def greedy(model: SmartHaoAI, ids: list[int], count: int) -> list[int]:
    """The `count` most likely next tokens, one after the other; no end token stops them. Fewer where the context is full."""
    room = model.config.max_position_embeddings - len(ids)
    given = list(ids)
    for _ in range(min(count, room)):
        given.append(int(log_probs(model, given)[-1].argmax()))
    return given[len(ids) :]


def same_greedy(model: SmartHaoAI, ids: list[int], theirs: list[int], stops: Collection[int] = ()) -> bool:
    """Whether `theirs`, decoded greedily after `ids`, is what our model gives (to the first tie, or to a token of `stops`)."""
    ours = greedy(model, ids, GREEDY_TOKENS)
    for index, token in enumerate(ours):
        if index == len(theirs):
            return bool(theirs) and theirs[-1] in stops
        if theirs[index] != token:
            scores = log_probs(model, ids + ours[:index])[-1]
            return bool(scores[token] - scores[theirs[index]] < TIE)
    return True


__all__ = ["PROBE_TEXTS", "GREEDY_TOKENS", "Comparison", "Difference", "check_fits", "greedy", "log_probs", "probe_rows", "same_greedy"]
