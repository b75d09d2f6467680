"""Guided thinking: a limit in tokens with a clean end, and a calculator that works out what the model writes down.

Both are said token by token in the way of a grammar: what must come next is the only token allowed. So they work in every kind of
decoding that knows grammars: batches, streams, several samples.

    settings = guided(SamplingSettings(), engine, prompt, budget=200, calculator=True)
    engine.generate([prompt], settings)
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inference.calculator import MAX_CHARACTERS, pending
from inference.engine import Engine
from inference.grammar import Grammar, Matcher
from inference.rendering import thinking_end
from inference.sampling import SamplingSettings
from inference.text import THINK_CLOSE, THINK_OPEN, special_id, starts_in_reasoning

LEAST_ANSWER = 16  # tokens that are kept free for the answer
LONGEST_CHARACTER = 4  # bytes
LONGEST_NUMBER = 8  # tokens by which a number may exceed the budget


@dataclass(frozen=True)
class Call:
    """Something that was worked out for the model."""

    expression: str
    value: str
    """As it was written into the thinking."""


@dataclass(frozen=True)
class ThinkingGuide(Grammar):
    """What `guided` puts into the settings. Each reply gets a matcher of its own."""

    budget: int | None = None
    calculator: bool = False
    answer: Grammar | None = None
    """The form of the answer behind the thinking, when it has one."""

    def matcher(self, tokenizer: Any, prompt: Sequence[int] = (), end_ids: Sequence[int] | None = None) -> ThinkingMatcher:
        """For one reply to prompt (token ids). Raises ValueError without a tokenizer."""
        if tokenizer is None:
            raise ValueError("guided thinking needs a tokenizer: Engine(model, tokenizer)")
        return ThinkingMatcher(self, tokenizer, prompt, tokenizer.stop_ids if end_ids is None else end_ids)


def guided(
    settings: SamplingSettings, engine: Engine, prompt: Sequence[int], budget: int | None = None, calculator: bool = False
) -> SamplingSettings:
    """The same settings with a limit for the thinking and with the calculator; prompt (token ids) is what will be answered.

    budget: most tokens of the thinking; then it is closed and the answer follows. It may be a few more, so that no character and no
    number is cut; it is less where max_new_tokens or the context would leave no room for an answer. calculator: behind "3 + 4 =" in the
    thinking, the value is written; in a reply without thinking, in all of it. Raises ValueError for a budget that is no number of tokens.
    """
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            raise ValueError(f"budget must be a whole number of tokens, at least 0, or None for no limit, got {budget!r}")
        needed = len(engine.tokenizer.encode(thinking_end(engine.tokenizer), parse_special=True)) + LEAST_ANSWER
        budget = max(0, min(budget, settings.max_new_tokens - needed, engine.context - len(prompt) - needed))
    if budget is None and not calculator:
        return settings
    return dataclasses.replace(settings, grammar=ThinkingGuide("", "thinking", budget, calculator, settings.grammar))


class ThinkingMatcher(Matcher):
    """Where one reply stands in its thinking."""

    def __init__(self, guide: ThinkingGuide, tokenizer: Any, prompt: Sequence[int], end_ids: Sequence[int]) -> None:
        self._guide, self._tokenizer, self._end_ids = guide, tokenizer, list(end_ids)
        self._answer = None if guide.answer is None else guide.answer.matcher(tokenizer, prompt, end_ids)
        self._edges = special_id(tokenizer, THINK_OPEN), special_id(tokenizer, THINK_CLOSE)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""  # the end of what was said, as far as it matters for an expression
        self._forced: list[int] = []  # tokens that must come next
        self._ending = False  # they end the thinking
        self._or_digit = False  # unless the number before them goes on
        self._no_digit = False  # the result that was just written is whole
        self.thinking = starts_in_reasoning(tokenizer, prompt)
        self.thinking_tokens = 0
        self.cut = False
        """Whether the budget ended the thinking."""
        self.answer_start = 0
        """Place of the first token behind the thinking; 0 where there was none."""
        self.calls: list[Call] = []
        self.own: list[bool] = []
        """For every token taken, whether the model chose it."""
        self.finished = False
        self._calculates = guide.calculator and (self._answer is None or self.thinking)
        self._plan("")

    def mask(self) -> Tensor:
        """Which tokens may come next: bool (V,), V the tokenizer's vocabulary, on the CPU."""
        if self._forced:
            only = torch.zeros(self._tokenizer.vocab_size, dtype=torch.bool)
            only[self._forced[0]] = True
            return only | _begin_with_digit(self._tokenizer) if self._or_digit else only
        allowed = torch.ones(self._tokenizer.vocab_size, dtype=torch.bool) if self._answer is None else self._answer.mask()
        if self.thinking and self._guide.budget is not None:
            allowed[self._end_ids] = False  # an end is certain, and behind it an answer
        return allowed & ~_begin_with_digit(self._tokenizer) if self._no_digit else allowed

    def take(self, token: int) -> None:
        """Go on by one token that mask() allows."""
        forced = bool(self._forced) and token == self._forced[0]
        self.own.append(not forced)
        self._forced = self._forced[1:] if forced else []
        self._no_digit = forced and not self._ending and not self._forced
        self.cut = self.cut or (forced and self._ending)
        self._or_digit = False
        if self._answer is not None:
            self._answer.take(token)
        self.finished = token in self._end_ids if self._answer is None else self._answer.finished
        said = ""
        if token in self._edges:
            self.thinking = token == self._edges[0]
            self._calculates = self._guide.calculator and self.thinking
            self.answer_start = len(self.own)
            self._text = ""
            self._decoder.reset()
        elif not self.finished:
            self.thinking_tokens += self.thinking and not self.cut  # the line end of the closing is none
            if token not in self._tokenizer.special_ids and token < self._tokenizer.vocab_size:
                said = self._decoder.decode(self._tokenizer.token_bytes(token))
                self._text = (self._text + said)[-3 * MAX_CHARACTERS :]
        if not self._forced and not self.finished:
            self._plan(said)

    def copy(self) -> ThinkingMatcher:
        """A matcher that stands where this one stands and goes on by itself."""
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        other._answer = None if self._answer is None else self._answer.copy()
        other.calls, other.own = list(self.calls), list(self.own)
        return other

    def _plan(self, said: str) -> None:
        """Decide whether tokens must follow the text that was just said."""
        if self._calculates and ("=" in said or "＝" in said):
            found = pending(self._text)
            if found is not None:
                self.calls.append(Call(*found))
                before, space = self._text.rstrip(" "), " " * (self._text[-2:-1] == " ")
                self._forced = self._encode(found[1] if before != self._text else space + found[1])
                self._ending = False
                return
        budget = self._guide.budget
        if self.thinking and budget is not None and self.thinking_tokens >= budget:
            if self._decoder.getstate()[0] and self.thinking_tokens < budget + LONGEST_CHARACTER - 1:
                return  # in the middle of a character
            self._ending = True
            self._or_digit = self._text[-1:].isdigit() and not self._no_digit and self.thinking_tokens < budget + LONGEST_NUMBER
            words = thinking_end(self._tokenizer)
            if self._text.endswith("\n"):
                words = words.lstrip("\n")
            self._forced = self._tokenizer.encode(words, parse_special=True)

    def _encode(self, text: str) -> list[int]:
        # Where a tokenizer writes a space before the first word itself, ours would be a second one.
        return self._tokenizer.encode(text.lstrip(" ") if self._tokenizer.drops_first_space else text)


def replayed(
    settings: SamplingSettings, tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], end_ids: Sequence[int]
) -> ThinkingMatcher:
    """What happened in a reply (token ids): its matcher after the last token, whether or not the settings guide anything."""
    guide = settings.grammar if isinstance(settings.grammar, ThinkingGuide) else ThinkingGuide("", "thinking")
    matcher = dataclasses.replace(guide, answer=None).matcher(tokenizer, prompt, end_ids)
    for token in ids:
        matcher.take(token)
    return matcher


def _begin_with_digit(tokenizer: Any) -> Tensor:
    """bool (V,): the tokens that would make the number before them longer."""
    if tokenizer not in _DIGITS:
        texts = (tokenizer.token_bytes(token)[:1] for token in range(tokenizer.vocab_size))
        _DIGITS[tokenizer] = torch.tensor([text.isdigit() for text in texts])
    return _DIGITS[tokenizer]


_DIGITS: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
