"""Questions for rollouts: the prompts of conversations and preference rows, with the data's own answer as the reference.

train, held_out = read_prompts("sums.jsonl", tokenizer, longest=128)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.answers import checkable
from model.tokenizer import BPETokenizer
from train.documents import held_out, prompt_key
from train.formats import (
    ANSWER_FIELDS,
    BadRows,
    Conversation,
    Judged,
    Message,
    Preference,
    RowError,
    Sample,
    expand_paths,
    read_samples,
    recognise,
)


@dataclass(frozen=True)
class Prompt:
    """`ids` ends where the assistant begins to speak."""

    ids: tuple[int, ...]
    question: str
    """The last thing the user said."""
    reference: str | None
    """The data's own answer."""
    messages: list[Message] = field(default_factory=list, compare=False)
    """The turns that `ids` stand for."""
    tools: list[dict[str, Any]] | None = field(default=None, compare=False)
    answer: Message | None = field(default=None, compare=False)
    """The turn that `reference` is the text of, thinking included."""
    thinking: bool | None = field(default=None, compare=False)
    """The switch that `ids` were written with; None: as the model decides."""


def read_prompts(
    spec: Any,
    tokenizer: BPETokenizer,
    longest: int,
    *,
    val_share: float = 0.0,
    answered: bool = False,
    verifiable: bool = False,
    thinking: bool | None = None,
    strict: bool = False,
    log: Callable[[str], object] = print,
) -> tuple[list[Prompt], list[Prompt]]:
    """The different prompts of the files that `spec` names, for training and held out (decided by each question's own hash, as in
    preference data).

    Left out and counted are prompts of more than `longest` tokens, with `answered` those without an answer of the data's, with
    `verifiable` those whose answer has no result that a rule could compare. thinking=False closes the thinking before it starts, True
    leaves it to the model, None to the rows. Raises FileNotFoundError for missing files, ValueError when no prompt is left or with
    `strict` a row is bad.
    """
    bad = BadRows()
    found: dict[tuple[int, ...], Prompt] = {}
    repeated = too_long = unanswered = unclear = 0
    for file in expand_paths(spec):
        for _, (messages, tools, answer, switch) in read_samples(file.path, bad, _prompt_of, _read_row):
            reference = None if answer is None else answer["content"]
            if answered and reference is None:
                unanswered += 1
                continue
            if verifiable and (reference is None or not checkable(reference)):
                unclear += 1
                continue
            enabled = switch if thinking is None else thinking
            ids = tuple(tokenizer.render(messages, tools, add_generation_prompt=True, enable_thinking=enabled).ids)
            too_long += len(ids) > longest
            repeated += ids in found
            if len(ids) <= longest and ids not in found:
                found[ids] = Prompt(ids, messages[-1]["content"], reference, messages, tools, answer, enabled)
    bad.report(log)
    bad.raise_if_strict(strict)
    left_out = {
        "unusable": bad.total,
        "said before": repeated,
        f"longer than {longest} tokens": too_long,
        "without an answer to compare with": unanswered,
        "without a result that can be checked (a number, a word, what stands behind #### or in \\boxed{})": unclear,
    }
    notes = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    if not found:
        raise ValueError(f"{spec} holds no prompt that can be used" + (f" (left out: {notes})" if notes else ""))
    if notes:
        log(f"prompts left out of {spec}: {notes}")
    held = {ids: held_out(prompt_key(prompt.messages, prompt.tools), val_share) for ids, prompt in found.items()}
    train = [prompt for ids, prompt in found.items() if not held[ids]]
    if not train:
        raise ValueError(f"all {len(found)} prompts of {spec} are held out: lower data.val_share")
    return train, [prompt for ids, prompt in found.items() if held[ids]]


def _read_row(value: Any) -> Sample:
    """As `recognise`, where {prompt} alone is a row, too: as one whose answer is not to be learned from."""
    if isinstance(value, dict) and "prompt" in value and not {*ANSWER_FIELDS, "chosen", "rejected"} & value.keys():
        value = {**value, "completion": "-", "label": False}
    return recognise(value)


def _prompt_of(sample: Sample) -> tuple[list[Message], list[dict[str, Any]] | None, Message | None, bool | None]:
    """Turns, tools, the data's own answer, and the row's switch for thinking."""
    answer: Message | None
    if isinstance(sample, Conversation):
        last = max(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
        messages, answer = sample.messages[:last], sample.messages[last]
    elif isinstance(sample, Preference):
        messages, answer = sample.prompt, sample.chosen[-1]
    elif isinstance(sample, Judged):
        messages, answer = sample.prompt, sample.completion[-1] if sample.label else None
    else:
        raise RowError("a plain text has no prompt; give conversations or preference rows")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError("nobody asks before the last answer")
    return messages, sample.tools, answer, sample.thinking


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts in their order: a run is resumed with the same ones."""
    digest = hashlib.blake2b(digest_size=10)
    for prompt in prompts:
        digest.update(json.dumps([prompt.ids, prompt.reference]).encode())
    return digest.hexdigest()
