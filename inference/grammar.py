"""Answers of a given form: JSON of a schema, a pattern, one of several words. After every token the grammar says which may come next.

    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    grammar = Grammar.json_schema(city)
    engine.generate([ids], SamplingSettings(grammar=grammar))

An answer that ends by itself (finish_reason "stop") always has the form; one that max_new_tokens cuts (finish_reason "length") has not.
The work is done by the library `llguidance`, the extra `constrained`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from inference.text import THINK_CLOSE, THINK_OPEN, special_id, starts_in_reasoning

# One space, or one line end and the indentation of eight levels: small models like to go on with empty lines for ever.
WHITESPACE = r" |\r?\n[ \t]{0,16}"
GAP = 2  # line ends that models write between their thinking and the answer


@dataclass(frozen=True)
class Grammar:
    """What an answer may look like. Made by one of the functions below, used by any number of replies."""

    source: str = field(repr=False)
    """In the words of llguidance."""
    name: str

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | str) -> Grammar:
        """JSON that a JSON Schema describes. Raises ValueError for a schema that is wrong, or asks for what cannot be enforced."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            source = _llguidance().LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
        except (TypeError, ValueError) as error:
            raise ValueError(f"a JSON Schema must be a JSON object: {error}") from error
        return cls._checked(source, "JSON Schema")

    @classmethod
    def json(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that the whole pattern matches (the syntax of Rust's regex: no look-around, no back-references)."""
        return cls._checked(_llguidance().LLMatcher.grammar_from_regex(pattern), "regex")

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in the syntax of Lark, beginning with the rule `start`."""
        return cls._checked(_llguidance().LLMatcher.grammar_from_lark(text), "Lark grammar")

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """One of several texts. Raises ValueError when there is none, or one is empty."""
        if isinstance(options, str) or not options or not all(isinstance(option, str) and option for option in options):
            raise ValueError(f"choice needs a list of texts that are not empty, got {options!r}")
        quoted = " | ".join(json.dumps(option, ensure_ascii=False) for option in dict.fromkeys(options))
        return cls._checked(_llguidance().LLMatcher.grammar_from_lark(f"start: {quoted}"), "choice")

    @classmethod
    def _checked(cls, source: str, name: str) -> Grammar:
        problem = _llguidance().LLMatcher.validate_grammar(source)
        if problem:
            raise ValueError(f"the {name} cannot be used: {problem.strip()}")
        return cls(source, name)

    def matcher(self, tokenizer: Any, prompt: Sequence[int] = (), end_ids: Sequence[int] | None = None) -> Matcher:
        """For one reply to prompt (token ids). Thinking is free: when the prompt has opened it, or when the assistant's turn has just
        begun and the reply opens it; the answer begins behind </think>.

        end_ids: the tokens that end a reply (default: the tokenizer's). Raises ValueError without a tokenizer.
        """
        if tokenizer is None:
            raise ValueError("a grammar needs a tokenizer: Engine(model, tokenizer)")
        return Matcher(self, tokenizer, prompt, tokenizer.stop_ids if end_ids is None else end_ids)


class Matcher:
    """Where one reply stands in its grammar."""

    def __init__(self, grammar: Grammar, tokenizer: Any, prompt: Sequence[int], end_ids: Sequence[int]) -> None:
        if tokenizer not in _VOCABULARIES:
            _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
        self._vocabulary = _VOCABULARIES[tokenizer]
        library = _llguidance()
        quiet = library.LLParserLimits(verbose_errors=False)
        self._parser = library.LLMatcher(self._vocabulary.trie, grammar.source, log_level=0, limits=quiet)
        self._end_ids = list(end_ids)
        self._opening, self._closing = special_id(tokenizer, THINK_OPEN), special_id(tokenizer, THINK_CLOSE)
        turn = special_id(tokenizer, "<|im_start|>")
        edges = {self._opening, self._closing, turn, *tokenizer.stop_ids}
        self._thinking = starts_in_reasoning(tokenizer, prompt)
        self._may_think = None not in (turn, self._opening) and next((token for token in reversed(prompt) if token in edges), None) == turn
        self._gap = 0  # line ends that may still come before the answer
        self._begun = False
        self.finished = False
        """True when no token may follow: the end token was taken, or the answer is complete and there is no end token."""
        self._check()

    def mask(self) -> Tensor:
        """Which tokens may come next: bool (V,), V the tokenizer's vocabulary, on the CPU."""
        words = self._vocabulary
        if self.finished:
            return torch.ones_like(words.ordinary)
        if self._thinking:
            allowed = words.ordinary.clone()
            allowed[[self._closing]] = True
            return allowed
        bits = np.frombuffer(self._parser.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=len(words.ordinary))).bool()
        allowed[words.end] = False  # the library's idea of an end token
        if not self._begun:
            for spaced, bare in words.without_space.items():
                allowed[spaced] |= allowed[bare]
            if self._may_think:
                allowed[self._opening] = True
            for token, count in words.line_ends.items():
                allowed[token] |= count <= self._gap
        if self._parser.is_accepting():
            allowed[self._end_ids] = True
        return allowed

    def take(self, token: int) -> None:
        """Go on by one token. Raises ValueError for one that mask() does not allow. What comes after the end is nobody's concern."""
        if self.finished:
            return
        if token in self._end_ids:
            self.finished = True
        elif self._thinking:
            if token == self._closing:
                self._thinking, self._gap = False, GAP
        elif not self._begun and self._may_think and token == self._opening:
            self._thinking, self._may_think = True, False
        elif not self._begun and self._vocabulary.line_ends.get(token, GAP + 1) <= self._gap:
            self._gap -= self._vocabulary.line_ends[token]
        else:
            bare = token if self._begun else self._vocabulary.without_space.get(token, token)
            self._begun = True
            self._parser.consume_token(bare)
            self._check()
            self.finished = self._parser.is_stopped() and not self._end_ids

    def copy(self) -> Matcher:
        """A matcher that stands where this one stands and goes on by itself."""
        other = copy.copy(self)
        other._parser = self._parser.deep_copy()
        return other

    def _check(self) -> None:
        if self._parser.is_error():
            raise ValueError(f"the grammar cannot go on: {self._parser.get_error().splitlines()[0]}")


def allowed_tokens(masks: Sequence[Tensor | None]) -> Tensor | None:
    """From `Matcher.mask` of every row, bool (V,), to the `allowed` (B, V) of process_logits; a row of None may say anything. None: no
    row has a mask."""
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if mask is None else mask for mask in masks])


class _Vocabulary:
    """A tokenizer's tokens in the form that llguidance searches."""

    def __init__(self, tokenizer: Any) -> None:
        structural = sorted(tokenizer.special_ids | set(tokenizer.backend.get_added_tokens_decoder()))
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.end = tokenizer.eos_token_id
        self.trie = _llguidance().LLTokenizer(_Wrapper(tokenizer, tokens, structural))
        self.ordinary = torch.ones(len(tokens), dtype=torch.bool)
        """Tokens that stand for text."""
        self.ordinary[structural] = False
        self.ordinary[[i for i, token in enumerate(tokens) if not token]] = False
        self.line_ends = {i: len(token) for i, token in enumerate(tokens) if token in (b"\n", b"\n\n") and self.ordinary[i]}
        self.without_space: dict[int, int] = {}
        """Tokens that are written with a space before the first word only (SentencePiece), and what they say without it."""
        if tokenizer.drops_first_space:
            ids = {token: i for i, token in enumerate(tokens) if self.ordinary[i]}
            self.without_space = {i: ids[token[1:]] for token, i in ids.items() if token[:1] == b" " and token[1:] in ids}


class _Wrapper:
    """What llguidance wants to know of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, tokenizer.eos_token_id
        self._backend = tokenizer.backend  # not the tokenizer: what is kept for it must not keep it alive
        # Behind a line end, SentencePiece writes no space of its own.
        self._before = "\n" if tokenizer.drops_first_space else ""

    def __call__(self, text: str) -> list[int]:
        before, whole = (self._backend.encode(part, add_special_tokens=False).ids for part in (self._before, self._before + text))
        return whole[len(before) :]


_VOCABULARIES: WeakKeyDictionary[Any, _Vocabulary] = WeakKeyDictionary()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError('constrained answers need llguidance: pip install -e ".[constrained]"') from error
    return llguidance
