"""From logits to the next token: settings, pure functions on logits (B, V), and the history they look at.

The order of operations is that of `transformers`: (what a grammar allows,) bias, repetition penalty, (presence and frequency
penalties, as the OpenAI API defines them), no-repeat-ngram, minimum length, temperature, top-k, top-p, min-p. Unlike there, left
padding never counts as text that has been said.

Shapes: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inference.grammar import Grammar

NEVER = -math.inf


@dataclass
class SamplingSettings:
    """How to choose tokens. Every field is checked; a wrong value raises ValueError naming the field and its range."""

    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.8
    """Logits are divided by this; 0 takes the likeliest token (greedy)."""
    top_k: int = 50
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest; 0 drops none."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the reply less likely to come again; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the reply already holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time the reply holds it."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens may occur twice; 0 is off."""
    min_new_tokens: int = 0
    """No end-of-text token before this many new tokens."""
    seed: int | None = None
    """Equal seeds give equal replies; None draws from torch's global generator."""
    stop: list[str] = field(default_factory=list)
    """The reply ends before any of these strings."""
    eos_token_id: int | list[int] | None = None
    """Token ids that end the reply; None takes the tokenizer's, [] means none."""
    n: int = 1
    """Replies per prompt."""
    logprobs: bool = False
    """Also return the log-probability of every chosen token under the unmodified logits."""
    top_logprobs: int = 0
    """Also return the likeliest tokens of every step with their log-probabilities, this many, under the unmodified logits."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids: 5 makes a token likelier, -100 all but bans it."""
    num_beams: int = 1
    """Above 1: beam search over this many candidates, with temperature=0; the n best are returned."""
    length_penalty: float = 1.0
    """Beam search: a finished beam's log-probability is divided by its length to this power; above 0 favours long replies."""
    early_stopping: bool | Literal["never"] = False
    """Beam search: end when num_beams replies are finished (True), when a better one is unlikely (False) or impossible ("never")."""
    lookup: int = 0
    """Most tokens guessed per step from repetitions in prompt and reply (one reply at a time): faster, with the same result."""
    grammar: Grammar | None = None
    """The answer is a text that this grammar describes; thinking before it is free."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if not isinstance(self.stop, (list, tuple, type(None))):
            raise ValueError(f"stop must be a list of strings, got {self.stop!r}")
        self.stop = list(self.stop or [])
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        _check_integer("min_new_tokens", self.min_new_tokens, 0)
        _check_integer("n", self.n, 1)
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 is greedy")
        _check_number("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens")
        _check_number("min_p", self.min_p, 0.0, 1.0, "0 is off")
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 is off")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be greater than 0 (1 is off), got 0")
        _check_number("presence_penalty", self.presence_penalty, -math.inf, math.inf, "0 is off")
        _check_number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf, "0 is off")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
            if self.seed >= 2**63:
                raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs must be True or False (top_logprobs says how many), got {self.logprobs!r}")
        _check_integer("top_logprobs", self.top_logprobs, 0)
        self.logit_bias = _checked_bias(self.logit_bias)
        _check_integer("lookup", self.lookup, 0)
        if not (self.grammar is None or isinstance(self.grammar, Grammar)):
            raise ValueError(f"grammar must be a Grammar, such as Grammar.json_schema(schema), got {type(self.grammar).__name__}")
        self._check_beams()
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        if not isinstance(self.eos_token_id, (int, list, tuple, type(None))):
            raise ValueError(f"eos_token_id must be a token id or a list of them, got {self.eos_token_id!r}")
        for token in self.eos_ids:
            _check_integer("eos_token_id", token, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens ({self.min_new_tokens}) must not be larger than max_new_tokens ({self.max_new_tokens})")

    def _check_beams(self) -> None:
        _check_integer("num_beams", self.num_beams, 1)
        _check_number("length_penalty", self.length_penalty, -math.inf, math.inf, "1 is the mean log-probability, 0 is off")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        if self.num_beams == 1:
            if self.length_penalty != 1.0 or self.early_stopping:
                name = "early_stopping" if self.early_stopping else "length_penalty"
                raise ValueError(f"{name}={getattr(self, name)!r} only has a meaning in beam search: set num_beams, or leave it out")
            return
        if not self.greedy:
            raise ValueError(f"num_beams={self.num_beams} searches and does not sample: set temperature=0 (got {self.temperature})")
        if self.n > self.num_beams:
            raise ValueError(f"n={self.n} replies need at least as many beams: raise num_beams from {self.num_beams}")
        if self.lookup:
            raise ValueError(f"lookup={self.lookup} guesses for one reply, not for num_beams={self.num_beams}: set one of them only")

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError when logit_bias names a token that a vocabulary of this size has not."""
        outside = next((token for token in self.logit_bias if token >= size), None)
        if outside is not None:
            raise ValueError(f"logit_bias names token id {outside}, the model's vocabulary has {size} tokens: ids go from 0 to {size - 1}")

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on those before it, so that a TokenHistory is needed."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.no_repeat_ngram_size or self.min_new_tokens)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end tokens as a tuple, empty when none is set."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)


def _check_integer(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}, got {value!r}")


def _check_number(name: str, value: object, lowest: float, highest: float, remark: str) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not lowest <= value <= highest:  # type: ignore[operator]
        span = {(0.0, math.inf): "at least 0", (-math.inf, math.inf): "that is finite"}.get((lowest, highest))
        span = span or f"between {lowest:g} and {highest:g}"
        raise ValueError(f"{name} must be a number {span} ({remark}), got {value!r}")


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}")
    found: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isdecimal():  # JSON has no other keys
            token = int(token)
        _check_integer("logit_bias (a token id)", token, 0)
        _check_number(f"logit_bias of token {token}", value, -math.inf, math.inf, "0 changes nothing")
        found[token] = float(value)
    return found


class TokenHistory:
    """What each row has said so far, kept in the form that the penalties need, so that one step costs O(V), not O(T).

    ids (B, T) is the left-padded prompt; mask (B, T) is 1 for real tokens (None: no padding). `seen` (B, V) marks
    tokens of prompt and reply, `counts` (B, V) counts tokens of the reply only. Padding counts nowhere.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, vocab_size: int, room: int) -> None:
        batch, length = ids.shape
        self.length = length
        self.ids = torch.zeros(batch, length + room, dtype=torch.long, device=ids.device)
        self.ids[:, :length] = ids
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.real = torch.ones_like(self.ids, dtype=torch.bool)
        self.real[:, :length] = real
        # Padding is scattered into a spare column, so that the pad token itself does not count as said.
        marks = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=ids.device)
        marks.scatter_(1, ids.masked_fill(~real, vocab_size), True)
        self.seen = marks[:, :vocab_size].contiguous()
        self.counts = torch.zeros(batch, vocab_size, device=ids.device)

    @property
    def new_tokens(self) -> Tensor:
        """(B,) tokens generated so far."""
        return self.counts.sum(dim=1)

    def append(self, tokens: Tensor) -> None:
        """Add one generated token (B,) to every row."""
        if self.length == self.ids.shape[1]:
            self._widen(0, self.length)
        column = tokens.unsqueeze(1)
        self.ids[:, self.length] = tokens
        self.length += 1
        self.seen.scatter_(1, column, True)
        self.counts.scatter_add_(1, column, torch.ones_like(column, dtype=self.counts.dtype))

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows, rows (B',) of indices."""
        self.ids, self.real = self.ids[rows], self.real[rows]
        self.seen, self.counts = self.seen[rows], self.counts[rows]

    def extend(self, other: TokenHistory) -> None:
        """Take in the rows of another history behind these. All end at the present token: the shorter ones are padded on the left."""
        length = max(self.length, other.length)
        for history in (self, other):
            history._widen(length - history.length, 0)
        room = max(self.ids.shape[1], other.ids.shape[1])
        for history in (self, other):
            history._widen(0, room - history.ids.shape[1])
        for name in ("ids", "real", "seen", "counts"):
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))

    def _widen(self, left: int, right: int) -> None:
        """More columns: padding on the left, room on the right."""
        self.ids = F.pad(self.ids, (left, right))
        self.real = F.pad(F.pad(self.real, (left, 0)), (0, right), value=True)
        self.length += left


def keep_allowed(logits: Tensor, allowed: Tensor) -> Tensor:
    """Forbid the tokens of logits (B, V) where allowed (B, V') is False. V' may be smaller, as a tokenizer's vocabulary may be smaller
    than the model's: the surplus is forbidden, too."""
    missing = logits.shape[1] - allowed.shape[1]
    return logits.masked_fill(~F.pad(allowed.to(logits.device), (0, missing)), NEVER)


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add a number to the logits (B, V) of some tokens (OpenAI's logit_bias; sequence_bias of single tokens in transformers)."""
    index = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(1, index, torch.tensor(list(bias.values()), device=logits.device).to(logits.dtype).expand(len(logits), -1))


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (Keskar et al. 2019): logits (B, V) of seen (B, V) tokens are divided by the penalty
    when positive, multiplied when negative, so that they fall either way."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_presence_frequency(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's penalties on generated tokens: logits - presence * [count > 0] - frequency * count; all (B, V)."""
    return logits - presence * (counts > 0).to(logits.dtype) - frequency * counts.to(logits.dtype)


def ban_repeated_ngrams(logits: Tensor, ids: Tensor, size: int, real: Tensor | None = None) -> Tensor:
    """Forbid every token that would complete an n-gram of `size` tokens which ids (B, T) already hold.

    logits (B, V); real (B, T) is False at padding, and an n-gram that touches padding is none.
    """
    length = ids.shape[1]
    if length < size:
        return logits
    vocab_size = logits.shape[1]
    prefix = ids[:, length + 1 - size :]
    windows = ids.unfold(1, size, 1)  # (B, T - size + 1, size)
    repeats = (windows[..., :-1] == prefix.unsqueeze(1)).all(-1)
    if real is not None:
        whole = real.unfold(1, size, 1).all(-1)
        suffix_real = real[:, length + 1 - size :].all(-1, keepdim=True)
        repeats = repeats & whole & suffix_real
    banned = torch.zeros(logits.shape[0], vocab_size + 1, dtype=torch.bool, device=logits.device)
    # Windows that do not match ban a spare column: they must not lift the ban of one that does.
    banned.scatter_(1, torch.where(repeats, windows[..., -1], vocab_size), True)
    return logits.masked_fill(banned[:, :vocab_size], NEVER)


def forbid(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Set the logits (B, V) of these tokens to minus infinity; ids outside the vocabulary are ignored."""
    inside = [token for token in token_ids if token < logits.shape[1]]
    if not inside:
        return logits
    return logits.index_fill(1, torch.tensor(inside, device=logits.device), NEVER)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (B, V) of each row, and all that tie with the k-th."""
    threshold = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values[..., -1, None]
    return logits.masked_fill(logits < threshold, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020) on logits (B, V): in ascending order drop tokens while their cumulative
    probability is at most 1 - p; the likeliest always stays."""
    # What top-k left is all there is to sort; softmax and sums over the rest would add zeros.
    left = int((logits > NEVER).sum(dim=-1).max()) if logits.device.type == "cpu" else logits.shape[-1]
    if 0 < left <= logits.shape[-1] // 4:
        descending, order = logits.topk(left)
        ascending, order = descending.flip(-1), order.flip(-1)
    else:
        ascending, order = torch.sort(logits, descending=False)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - p)
    drop[..., -1] = False
    return logits.scatter(1, order, ascending.masked_fill(drop, NEVER))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens of logits (B, V) whose probability is below min_p times that of the likeliest (Nguyen et al.
    2024)."""
    probabilities = logits.softmax(dim=-1)
    drop = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    # With min_p = 1 rounding must not drop the likeliest token itself.
    drop.scatter_(-1, probabilities.argmax(dim=-1, keepdim=True), False)
    return logits.masked_fill(drop, NEVER)


def process_logits(
    logits: Tensor,
    history: TokenHistory | None,
    settings: SamplingSettings,
    eos_ids: Sequence[int] | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Apply all settings to the logits (B, V) of the next token; returns a new (B, V) tensor in fp32 or wider.

    history may be None where `settings.looks_back` is false. eos_ids: the tokens held back by min_new_tokens (default: those of the
    settings). allowed: what the rows' grammars permit, as `inference.grammar.allowed_tokens` gives it; nothing else is ever chosen.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        logits = keep_allowed(logits, allowed)
    plain = logits
    if settings.logit_bias:
        logits = add_bias(logits, settings.logit_bias)
    if settings.looks_back:
        assert history is not None
        if settings.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, history.seen, settings.repetition_penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            logits = penalize_presence_frequency(logits, history.counts, settings.presence_penalty, settings.frequency_penalty)
        if settings.no_repeat_ngram_size:
            length = history.length
            logits = ban_repeated_ngrams(logits, history.ids[:, :length], settings.no_repeat_ngram_size, history.real[:, :length])
        if settings.min_new_tokens:
            early = (history.new_tokens < settings.min_new_tokens).unsqueeze(1)
            logits = torch.where(early, forbid(logits, settings.eos_ids if eos_ids is None else eos_ids), logits)
    if logits is not plain and (settings.no_repeat_ngram_size or settings.min_new_tokens):
        # A small vocabulary can run out of permitted tokens: going on unfiltered beats sampling from nothing.
        exhausted = (logits == NEVER).all(dim=-1, keepdim=True)
        logits = torch.where(exhausted, plain, logits)
    if settings.greedy:
        return logits
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p > 0.0:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def choose(logits: Tensor, greedy: bool, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """The next tokens (B,) from processed logits (B, V): the likeliest, or a draw.

    generators: one per row, so that a row's draw does not depend on its neighbours; None uses torch's global generator.
    """
    if greedy:
        return logits.argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    if generators is None:
        return torch.multinomial(probabilities, 1).squeeze(1)
    draws = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities.split(1), generators, strict=True)]
    return torch.cat(draws).squeeze(1)


def prompt_seeds(seed: int, count: int) -> list[int]:
    """A seed for each of `count` prompts. Prompts with one seed draw alike: their samples are not independent of each other."""
    return (np.random.Philox(key=[seed, 0]).random_raw(count) >> np.uint64(2)).tolist()


def row_generator(seed: int, sample: int, device: torch.device) -> torch.Generator:
    """The random stream of a prompt's `sample`-th reply. Sample 0 has the seed itself, hence draws what `transformers`
    draws after torch.manual_seed(seed)."""
    # The odd constant (2**64 / golden ratio) keeps the streams of nearby seeds apart, also in the low 32 bits that
    # the CPU generator uses.
    return torch.Generator(device=device).manual_seed((seed + 0x9E3779B97F4A7C15 * sample) % 2**63)


def chosen_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (B,) of tokens (B,) under unmodified logits (B, V), computed in fp32."""
    logprobs = logits.float().log_softmax(dim=-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def top_logprobs(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row of unmodified logits (B, V) with their log-probabilities, likeliest first."""
    values, tokens = logits.float().log_softmax(dim=-1).topk(min(count, logits.shape[1]))
    return [list(zip(row, found, strict=True)) for row, found in zip(tokens.tolist(), values.tolist(), strict=True)]
