"""Pairs and judged answers as documents of a token store: prompt and answer in one sequence, the answer's tokens marked.

Documents come in twos. Of a preference pair: prompt + chosen, prompt + rejected. Of a judged answer: prompt + answer, and the same
prompt + the answer to another prompt, on which KTO estimates how far the model has moved (Ethayarajh et al., 2024).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from model.tokenizer import BPETokenizer
from train.formats import Judged, Message, Preference, RowError, Sample


class Document(NamedTuple):
    """One sequence of a token store."""

    held_out: bool
    ids: list[int]
    mask: list[bool] | None = None
    """Which tokens are learned; None: all."""
    line: int = 0
    """Of its file."""
    value: float = 0.0
    """A pair's margin; 1 for an answer that is wanted, 0 for one that is not."""


Encoded = list[tuple[int, list[Document] | str]]
"""(line, documents of a row) or (line, why the row cannot be used)."""


def held_out(document: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its own hash, so that it is the same in every run."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") < share * 2**64


def as_judged(sample: Sample) -> list[Judged]:
    """The judged answers of a row: its one, or a pair's two. Raises RowError for other rows."""
    if isinstance(sample, Judged):
        return [sample]
    if isinstance(sample, Preference):
        return [
            Judged(sample.prompt, sample.chosen, True, sample.tools, sample.thinking),
            Judged(sample.prompt, sample.rejected, False, sample.tools, sample.thinking),
        ]
    raise RowError(f"expected {{prompt, completion, label}} or {{prompt, chosen, rejected}}, found {type(sample).__name__.lower()}")


def encode_pairs(rows: list[tuple[int, Preference]], tokenizer: BPETokenizer, share: float) -> Encoded:
    """Two documents of every pair; pairs of one prompt are held out together."""
    return [(line, _pair(line, row, tokenizer, share)) for line, row in rows]


def _pair(line: int, row: Preference, tokenizer: BPETokenizer, share: float) -> list[Document] | str:
    is_val = held_out(prompt_key(row.prompt, row.tools), share)
    try:
        sides = [answer_ids(row, said, tokenizer) for said in (row.chosen, row.rejected)]
    except ValueError as error:
        return str(error)
    documents = [Document(is_val, ids, mask, line, row.margin) for ids, mask in sides]
    if documents[0].ids == documents[1].ids:
        return "chosen and rejected are the same once the chat template has written them"
    return documents


def encode_judged(rows: list[tuple[int, list[Judged]]], tokenizer: BPETokenizer, share: float) -> Encoded:
    """Two documents of every judged answer, the second with the next answer in the file that was given to another prompt."""
    answers = [(line, row) for line, judged in rows for row in judged]
    keys = [prompt_key(row.prompt, row.tools) for _, row in answers]
    encoded: Encoded = []
    for index, (line, row) in enumerate(answers):
        following = [*range(index + 1, len(answers)), *range(index)]
        other = next((j for j in following if keys[j] != keys[index]), following[0] if following else index)
        is_val = held_out(keys[index], share)
        try:
            documents = [
                Document(is_val, *answer_ids(row, said, tokenizer), line, float(row.label))
                for said in (row.completion, answers[other][1].completion)
            ]
        except ValueError as error:
            encoded.append((line, str(error)))
        else:
            encoded.append((line, documents))
    return encoded


def answer_ids(row: Preference | Judged, answer: list[Message], tokenizer: BPETokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a row's prompt and an answer to it, and which of them are the answer's (its end token included).

    Raises ValueError when the chat template cannot write them.
    """
    messages = row.prompt + answer
    learn = set(range(len(row.prompt), len(messages)))
    rendered = tokenizer.render(messages, row.tools, enable_thinking=row.thinking, learn=learn)
    if not rendered.answer_end:
        raise ValueError("the chat template shows nothing of the answer")
    return rendered.ids[: rendered.answer_end], rendered.loss_mask[: rendered.answer_end]


def prompt_key(prompt: list[Message], tools: list[dict[str, Any]] | None) -> bytes:
    """What decides whether a question is held out: the same in every stage that asks it."""
    return json.dumps([prompt, tools], ensure_ascii=False, sort_keys=True).encode("utf-8")
