"""The one way in which replies come about: prompts are prefilled, join the running batch, take one token a step, and leave.

    batch = Batch(engine)
    batch.join(prefill, rows)          # when prefill.advance() has said True
    while batch.rows:
        for row, pieces in batch.choose(): ...
        batch.leave([row for row in batch.rows if row.done])
        batch.feed()

`Engine.generate`, `Engine.stream` and the `Batcher` differ only in when they do which of these.
Shapes: B rows (replies that are being written), T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.grammar import allowed_tokens
from inference.prefixes import Prefix
from inference.sampling import SamplingSettings, TokenHistory, choose, chosen_logprobs, process_logits, row_generator, top_logprobs
from inference.speculative import Lookup
from inference.text import Channel, ReplyText, starts_in_reasoning
from model.cache import KVCache
from model.transformer import pad_left

if TYPE_CHECKING:
    from inference.engine import Engine

DAMAGED = (
    "the model's output is not finite (NaN or infinity): its weights are damaged, or its numbers are too "
    "large for this precision; load an earlier checkpoint, or run it in fp32"
)
NOTHING_LEFT = (
    "no token can come next: the grammar demands what this tokenizer cannot write, or a penalty, bias or temperature is too extreme"
)
SPARE_COLUMNS = 256  # room for new tokens that a cache has at first, where replies may become longer than most do


@dataclass
class Completion:
    """One finished reply. `ids` holds every generated token, the end token included; `text` is the answer alone."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    finish_reason: str = "length"
    """"stop" (end token or stop string), "length" (max_new_tokens or the context is used up) or "cancelled"."""
    logprobs: list[float] | None = None
    """Log-probability of each of `ids` under the unmodified logits, when asked for."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """The likeliest (token, log-probability) at each of `ids`, when asked for."""
    score: float | None = None
    """Of beam search: the summed log-probability over the length to the power of length_penalty."""
    reasoning_steps: int = 0
    """Steps of the reasoning head that the tokens took, added up, where halting is on; 0 where it is not."""


@dataclass
class Piece:
    """A step of a streamed reply: text that may be shown now (possibly none) and the tokens that were taken for it."""

    text: str
    channel: Channel
    ids: list[int]
    finish_reason: str | None = None
    """Set on the last piece of a reply only."""
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    reasoning_steps: int = 0
    """As in Completion, for these tokens."""
    sample: int = 0
    """Which of settings.n replies goes on."""


class Row:
    """One reply that is being written."""

    def __init__(self, engine: Engine, prompt: list[int], settings: SamplingSettings, number: int = 0, sample: int = 0) -> None:
        """number: which of the random streams of the seed it draws from; sample: what its pieces say of themselves. Raises ValueError for
        a prompt or settings that cannot be met."""
        self.prompt, self.settings, self.sample = prompt, settings, sample
        self.limit = engine.room(prompt, settings)
        self.end_ids = engine.end_tokens(settings)
        seeded = settings.seed is not None and not settings.greedy
        self.generator = row_generator(settings.seed or 0, number, engine.device) if seeded else None
        self.text: ReplyText | None = None
        if engine.tokenizer is not None:
            self.text = ReplyText(engine.tokenizer, settings.stop, reasoning=starts_in_reasoning(engine.tokenizer, prompt))
        self.matcher = None if settings.grammar is None else settings.grammar.matcher(engine.tokenizer, prompt, self.end_ids)
        own: dict[str, Any] = {"seed": 0 if seeded else None, "stop": [], "n": 1, "lookup": 0, "grammar": None}
        self.rule = dataclasses.replace(settings, max_new_tokens=engine.context + settings.min_new_tokens, **own)
        """What rows must have in common for their tokens to be chosen together."""
        self.completion = Completion(logprobs=[] if settings.logprobs else None, top_logprobs=[] if settings.top_logprobs else None)
        self.steps = 0
        """Reasoning steps behind the token that is chosen next."""
        self.done = False
        self.error: Exception | None = None
        if self.limit == 0:
            self.finish("length")

    @property
    def channel(self) -> Channel:
        return "answer" if self.text is None else self.text.channel

    @property
    def ids(self) -> list[int]:
        """Prompt and reply."""
        return self.prompt + self.completion.ids

    def take(self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None) -> list[Piece]:
        """Go on by one token; the last of the pieces carries it. None after `fail`."""
        if self.matcher is not None and self.error is None:
            try:
                self.matcher.take(token)
            except ValueError as error:
                self.fail(error)
        if self.error is not None:
            return []
        said, text, channel = self.completion, self.text, self.channel
        said.ids.append(token)
        said.reasoning_steps += self.steps
        if said.logprobs is not None and logprob is not None:
            said.logprobs.append(logprob)
        if said.top_logprobs is not None and top is not None:
            said.top_logprobs.append(top)
        ended = token in self.end_ids
        segments = [] if text is None or ended else text.push(token)
        reason = None
        if ended or (text is not None and text.stopped) or (self.matcher is not None and self.matcher.finished):
            reason = "stop"
        elif len(said.ids) >= self.limit:
            reason = "length"
        if reason is not None:
            segments += self.finish(reason)
        pieces = [Piece(words, channel, [], sample=self.sample) for channel, words in segments[:-1]]
        channel, words = segments[-1] if segments else (self.channel if text is not None else channel, "")
        last = Piece(words, channel, [token], reason, None if logprob is None else [logprob], None if top is None else [top])
        last.reasoning_steps, last.sample = self.steps, self.sample
        return [*pieces, last]

    def allowed(self) -> Tensor | None:
        """The tokens that the grammar lets come next, bool (V,); None: any. The reply fails when the grammar does."""
        try:
            return None if self.matcher is None else self.matcher.mask()
        except ValueError as error:
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """End the reply, which cannot go on; the other rows can."""
        self.done, self.error = True, error

    def finish(self, reason: str) -> list[tuple[Channel, str]]:
        """End the reply; returns the text that was held back."""
        self.done, self.completion.finish_reason = True, reason
        if self.text is None:
            return []
        segments = self.text.finish()
        self.completion.text, self.completion.reasoning = self.text.text, self.text.reasoning
        return segments


class Prefill:
    """Prompts on their way into a cache of their own, a block at a time.

    All rows are fed the same number of tokens at the end, the longest rest of a prompt without its prefix; what lies before comes from
    the prefixes. So they need no padding but that of prompts which are shorter than this rest.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[list[int]], prefixes: Sequence[Prefix | None], room: int, own: bool = False
    ) -> None:
        """room: columns for new tokens; many are made only when they are needed. own: the prefix's cache (one prompt only) is the
        caller's and is gone on with, not copied."""
        self.engine = engine
        room = min(room, SPARE_COLUMNS)
        self.fed = max(rest(prompt, prefix) for prompt, prefix in zip(prompts, prefixes, strict=True))
        """Columns to compute."""
        self.reused = [max(0, len(prompt) - self.fed) for prompt in prompts]
        """Tokens of each prompt that are not computed."""
        first = prefixes[0]
        if own and first is not None:
            self.cache = first.cache
            rewound = self.cache.rewind(self.reused[0])
            assert rewound, "PromptCache.find promised these tokens"
        else:
            self.cache = engine.new_cache(len(prompts), max(map(len, prompts)) + room)
            for row, (prefix, count) in enumerate(zip(prefixes, self.reused, strict=True)):
                if count:
                    assert prefix is not None
                    self.cache.put(row, prefix.cache, prefix.row, count)
        start = self.cache.length
        self.cache.reserve(len(prompts), start + self.fed + room)
        self.cache.begin_at(torch.tensor([start + self.fed - len(prompt) for prompt in prompts], device=engine.device))
        self._ids = pad_left([prompt[len(prompt) - min(self.fed, len(prompt)) :] for prompt in prompts], 0, engine.device)[0]
        self._done = 0
        self.logits: Tensor | None = None
        """(prompts, V) for the first tokens of the replies, once all is fed."""
        self.steps: Tensor | None = None

    def advance(self, columns: int | None = None) -> bool:
        """Feed at most this many columns (None: all); True when the prompts are in the cache."""
        end = self.fed if columns is None else min(self.fed, self._done + columns)
        self.logits = self.engine.prefill(self._ids[:, self._done : end], None, self.cache)
        self.steps = self.engine.steps_used
        self._done = end
        return end == self.fed


def rest(prompt: Sequence[int], prefix: Prefix | None) -> int:
    """Tokens of the prompt behind its prefix."""
    return len(prompt) - (prefix.length if prefix else 0)


class _Group:
    """Rows whose tokens are chosen by the same rule."""

    def __init__(self, rule: SamplingSettings) -> None:
        self.rule = rule
        self.rows: list[Row] = []
        self.history: TokenHistory | None = None

    def add(self, rows: list[Row], vocab_size: int, device: torch.device) -> None:
        self.rows += rows
        if self.rule.looks_back:
            ids, mask = pad_left([row.prompt for row in rows], 0, device)
            history = TokenHistory(ids, mask, vocab_size, min(SPARE_COLUMNS, max(row.limit for row in rows)))
            if self.history is None:
                self.history = history
            else:
                self.history.extend(history)

    def remove(self, gone: set[Row]) -> None:
        stay = [index for index, row in enumerate(self.rows) if row not in gone]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[index] for index in stay]
            if self.history is not None and stay:
                self.history.select(torch.tensor(stay, device=self.history.ids.device))

    def choose(self, logits: Tensor) -> list[tuple[Row, list[Piece]]]:
        """The next token of every row from logits (B, V), in the order of `rows`."""
        rule, rows = self.rule, self.rows
        allowed = allowed_tokens([row.allowed() for row in rows])
        scores = process_logits(logits, self.history, rule, rows[0].end_ids, None if allowed is None else allowed.to(logits.device))
        scores = self._without_unusable(logits, scores)
        generators = [row.generator for row in rows if row.generator is not None]
        tokens = choose(scores, rule.greedy, generators or None)
        if self.history is not None:
            self.history.append(tokens)
        logprobs = chosen_logprobs(logits, tokens).tolist() if rule.logprobs else [None] * len(rows)
        top = top_logprobs(logits, rule.top_logprobs) if rule.top_logprobs else [None] * len(rows)
        return [(row, row.take(*found)) for row, *found in zip(rows, tokens.tolist(), logprobs, top, strict=True)]

    def _without_unusable(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) from which a token can be chosen in every row; rows where there is none fail."""
        unusable = [slot for slot, fine in enumerate(torch.isfinite(scores.amax(dim=-1)).tolist()) if not fine]
        for slot in unusable:
            damaged = not bool(torch.isfinite(logits[slot].amax()))
            self.rows[slot].fail(ValueError(DAMAGED if damaged else NOTHING_LEFT))
        return scores.index_fill(0, torch.tensor(unusable, device=scores.device), 0.0) if unusable else scores


class Batch:
    """The replies that are written at the moment. Row i of the cache and of the logits belongs to rows[i]."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._empty()

    def _empty(self) -> None:
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        """None: there are no rows, or a feed was interrupted and the batch cannot go on."""
        self.logits = torch.empty(0)
        self._groups: list[_Group] = []
        self._lookup: Lookup | None = None

    def join(self, prefill: Prefill, rows: Sequence[Sequence[Row]]) -> None:
        """Take in finished prompts: rows[i] are the replies (any number) to prompt i. When memory runs out, nothing has changed."""
        assert prefill.logits is not None
        source = [index for index, replies in enumerate(rows) for _ in replies]
        new = [row for replies in rows for row in replies]
        if not new:
            return
        index = torch.tensor(source, device=prefill.logits.device)
        logits = prefill.logits[index]
        if not self.rows:
            if source != list(range(prefill.cache.batch_size)):
                prefill.cache.reorder(index)
            self.cache, self.logits = prefill.cache, logits
        else:
            assert self.cache is not None
            self._end_lookup()
            self.cache.check_setting(prefill.cache.setting)
            self.cache.reserve(len(self.rows) + len(new), max(self.cache.length, prefill.cache.length) + 1)
            self.logits = torch.cat((self.logits, logits))
            cache, self.cache = self.cache, None
            for offset, prompt in enumerate(source):
                cache.put(len(self.rows) + offset, prefill.cache, prompt)
            self.cache = cache
        for row, prompt in zip(new, source, strict=True):
            row.steps = 0 if prefill.steps is None else int(prefill.steps[prompt, -1])
        self.rows += new
        for row in new:
            if not any(row.rule == group.rule for group in self._groups):
                self._groups.append(_Group(row.rule))
        for group in self._groups:
            added = [row for row in new if row.rule == group.rule]
            if added:
                group.add(added, self.logits.shape[1], self.logits.device)

    def choose(self) -> list[tuple[Row, list[Piece]]]:
        """One more token for every row; a row that cannot go on is done, with `error` and without a piece."""
        slots = {row: slot for slot, row in enumerate(self.rows)}
        taken: list[tuple[Row, list[Piece]]] = []
        for group in self._groups:
            places = [slots[row] for row in group.rows]
            whole = places == list(range(len(self.rows)))
            taken += group.choose(self.logits if whole else self.logits[torch.tensor(places, device=self.logits.device)])
        return taken

    def feed(self) -> None:
        """Compute what comes after the tokens that were chosen."""
        if not self.rows:
            return
        assert self.cache is not None, "a step before this one was interrupted: begin a new Batch"
        cache, self.cache = self.cache, None
        first = self.rows[0]
        guessed = first.settings.lookup if len(self.rows) == 1 else 0
        cache.reserve(len(self.rows), cache.length + 1 + guessed)
        if guessed and self._lookup is None:
            self._lookup = Lookup(self.engine, cache, first.ids[:-1], guessed)
        tokens = torch.tensor([row.completion.ids[-1] for row in self.rows], device=self.logits.device)
        self.logits = self.engine.decode(tokens, cache) if self._lookup is None else self._lookup.feed(tokens)
        if self.engine.steps_used is not None:
            for row, steps in zip(self.rows, self.engine.steps_used[:, -1].tolist(), strict=True):
                row.steps = steps
        self.cache = cache

    def leave(self, rows: Sequence[Row]) -> None:
        """Let these rows go."""
        gone = set(rows)
        if not gone:
            return
        if len(gone) == len(self.rows):
            self._empty()
            return
        self._end_lookup()
        for slot in reversed([slot for slot, row in enumerate(self.rows) if row in gone]):
            last = len(self.rows) - 1
            if self.cache is not None:
                self.cache.drop(slot)
            self.rows[slot] = self.rows[last]
            if slot != last:
                self.logits[slot] = self.logits[last]
            del self.rows[last]
            self.logits = self.logits[:last]
        for group in self._groups:
            group.remove(gone)
        self._groups = [group for group in self._groups if group.rows]

    def running(self, rows: Sequence[Row]) -> list[tuple[list[int], KVCache, int]]:
        """The tokens of these rows that are in the cache, with their places: what a prompt may begin with."""
        if self.cache is None or not rows:
            return []
        self._end_lookup()
        counts = (self.cache.length - self.cache.starts).tolist()
        slots = map(self.rows.index, rows)
        return [(self.rows[slot].ids[: counts[slot]], self.cache, slot) for slot in slots]

    def keep(self, row: Row) -> tuple[list[int], KVCache] | None:
        """The tokens of a row and a cache with just these, before it leaves; None when they are lost."""
        for ids, cache, slot in self.running([row]):
            return ids, cache if cache.row_room == 1 else cache.copied(slot)
        return None

    def _end_lookup(self) -> None:
        if self._lookup is not None:
            self._lookup.close()
            self._lookup = None
