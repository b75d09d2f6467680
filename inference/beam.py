"""Beam search: keep the num_beams likeliest beginnings of a reply instead of one.

Ids and scores are those of `transformers`: log-probabilities are processed like logits (so a repetition penalty acts on them), a reply's
score is its summed log-probability over its length to the power of length_penalty, only the num_beams best candidates of a step may
end, and early_stopping decides when nothing better is expected.

Shapes: P prompts, R rows (the running beams of all prompts), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from inference.decoding import DAMAGED, NOTHING_LEFT, SPARE_COLUMNS, Completion
from inference.grammar import Matcher, allowed_tokens
from inference.sampling import SamplingSettings, TokenHistory, process_logits, top_logprobs
from inference.text import ReplyText, starts_in_reasoning
from model.transformer import pad_left

if TYPE_CHECKING:
    from inference.engine import Engine

TopTokens = Sequence[list[tuple[int, float]]]


@dataclass(frozen=True)
class Beam:
    """The beginning of a reply, or a finished one."""

    ids: tuple[int, ...] = ()
    score: float = 0.0
    """Summed processed log-probabilities; of a finished beam divided by length ** length_penalty."""
    logprobs: tuple[float, ...] = ()
    """Of every token under the unmodified logits."""
    top: TopTokens = ()
    """The likeliest tokens of every step, when asked for."""
    matcher: Matcher | None = None
    steps: int = 0
    """Of the reasoning head, as in Completion."""
    row: int = 0
    """The row of the batch that holds all but the last token."""
    finish_reason: str = "length"


class _Search:
    """The beams of one prompt."""

    def __init__(self, engine: Engine, prompt: list[int], settings: SamplingSettings, limit: int, row: int) -> None:
        self.settings, self.limit = settings, limit
        self.tokenizer, self.end_ids = engine.tokenizer, engine.end_tokens(settings)
        self.in_reasoning = self.tokenizer is not None and starts_in_reasoning(self.tokenizer, prompt)
        matcher = None if settings.grammar is None else settings.grammar.matcher(self.tokenizer, prompt, self.end_ids)
        self.beams = [Beam(matcher=matcher, row=row)]
        self.done = limit == 0
        self.finished = [Beam()] * settings.n if self.done else []

    def advance(self, candidates: Sequence[Beam]) -> None:
        """One step: go on with the best of these continuations (best first) of all beams."""
        settings, finished = self.settings, self.finished
        if not candidates and not finished:
            raise ValueError(NOTHING_LEFT)
        length = len(self.beams[0].ids) + 1
        running: list[Beam] = []
        ended: list[Beam] = []
        for rank, beam in enumerate(candidates):
            reason = self._finish_reason(beam)
            if reason is None:
                running.append(beam)
            elif rank < settings.num_beams:
                ended.append(replace(beam, score=beam.score / length**settings.length_penalty, finish_reason=reason))
        self.beams = running[: settings.num_beams]
        self.finished = sorted(finished + ended, key=lambda beam: -beam.score)[: settings.num_beams]
        full = len(self.finished) == settings.num_beams
        self.done = not self.beams or (full and (settings.early_stopping is True or not self._may_improve(length)))

    def _may_improve(self, length: int) -> bool:
        """Whether a running beam may still beat the worst finished one: with "never" at any length, else as good as it is now."""
        penalty = self.settings.length_penalty
        reach = self.limit if self.settings.early_stopping == "never" and penalty > 0 else length
        return self.beams[0].score / reach**penalty > self.finished[-1].score

    def _finish_reason(self, beam: Beam) -> str | None:
        if beam.ids[-1] in self.end_ids or (beam.matcher is not None and beam.matcher.finished):
            return "stop"
        if self.settings.stop and self.text(beam).stopped:
            return "stop"
        return "length" if len(beam.ids) >= self.limit else None

    def text(self, beam: Beam) -> ReplyText:
        """What a beam says so far."""
        text = ReplyText(self.tokenizer, self.settings.stop, reasoning=self.in_reasoning)
        for token in beam.ids:
            if token not in self.end_ids:
                text.push(token)
        return text


def beam_search(engine: Engine, prompts: Sequence[Sequence[int]], settings: SamplingSettings) -> list[list[Completion]]:
    """The settings.n best replies to each prompt, best first, with their scores; fewer where a grammar knows no more.

    A prompt's replies do not depend on the others. Stop strings end a beam like an end token. Raises ValueError like Engine.generate.
    """
    lists = [list(prompt) for prompt in prompts]
    limits = [engine.room(prompt, settings) for prompt in lists]
    searches = [_Search(engine, prompt, settings, limit, row) for row, (prompt, limit) in enumerate(zip(lists, limits, strict=True))]
    if max(limits, default=0) > 0:
        with engine.evaluating(), torch.inference_mode():
            _run(engine, lists, searches, settings)
    return [[_completion(search, beam) for beam in search.finished[: settings.n]] for search in searches]


def _run(engine: Engine, prompts: list[list[int]], searches: list[_Search], settings: SamplingSettings) -> None:
    end_ids = engine.end_tokens(settings)
    room = min(SPARE_COLUMNS, max(search.limit for search in searches))  # they grow
    ids, mask = pad_left(prompts, 0, engine.device)
    cache = engine.new_cache(len(prompts), ids.shape[1] + room)
    logits = engine.prefill(ids, mask, cache)
    history = TokenHistory(ids, mask, engine.config.vocab_size, room)
    # Of any num_beams beams, so many continuations are sure to leave num_beams that have not ended.
    wanted = max(2, 1 + len(end_ids)) * settings.num_beams
    active = [search for search in searches if not search.done]
    while True:
        rows = [beam for search in active for beam in search.beams]
        index = torch.tensor([beam.row for beam in rows], device=engine.device)
        if index.tolist() != list(range(len(logits))):
            cache.reorder(index)
            history.select(index)
        if rows[0].ids:
            tokens = torch.tensor([beam.ids[-1] for beam in rows], device=engine.device)
            history.append(tokens)
            cache.reserve(len(rows), cache.length + 1)
            logits = engine.decode(tokens, cache)
            steps = None if engine.steps_used is None else engine.steps_used[:, -1].tolist()
        else:
            logits = logits[index]
            steps = None if engine.steps_used is None else engine.steps_used[index, -1].tolist()
        plain = logits.float().log_softmax(dim=-1)
        if not bool(torch.isfinite(plain.amax(dim=-1)).all()):
            raise ValueError(DAMAGED)
        allowed = allowed_tokens([None if beam.matcher is None else beam.matcher.mask() for beam in rows])
        scores = process_logits(plain, history, settings, end_ids, None if allowed is None else allowed.to(engine.device))
        scores = scores + torch.tensor([beam.score for beam in rows], device=scores.device)[:, None]
        tops = top_logprobs(logits, settings.top_logprobs) if settings.top_logprobs else []
        start = 0
        for search in active:
            stop = start + len(search.beams)
            best, places = scores[start:stop].reshape(-1).topk(min(wanted, (stop - start) * scores.shape[1]))
            best, places = best[best > -torch.inf], places[best > -torch.inf]
            beam_rows, tokens = start + places // scores.shape[1], places % scores.shape[1]
            found = zip(beam_rows.tolist(), tokens.tolist(), best.tolist(), plain[beam_rows, tokens].tolist(), strict=True)
            search.advance(
                [
                    _continued(rows[row], row, token, score, logprob, tops[row : row + 1], 0 if steps is None else steps[row])
                    for row, token, score, logprob in found
                ]
            )
            start = stop
        active = [search for search in active if not search.done]
        if not active:
            return


def _continued(beam: Beam, row: int, token: int, score: float, logprob: float, top: TopTokens, steps: int) -> Beam:
    matcher = beam.matcher
    if matcher is not None:
        matcher = matcher.copy()
        matcher.take(token)
    return Beam((*beam.ids, token), score, (*beam.logprobs, logprob), (*beam.top, *top), matcher, beam.steps + steps, row)


def _completion(search: _Search, beam: Beam) -> Completion:
    settings = search.settings
    found = Completion(list(beam.ids), finish_reason=beam.finish_reason, score=beam.score, reasoning_steps=beam.steps)
    found.logprobs = list(beam.logprobs) if settings.logprobs else None
    found.top_logprobs = list(beam.top) if settings.top_logprobs else None
    if search.tokenizer is not None:
        text = search.text(beam)
        text.finish()
        found.text, found.reasoning = text.text, text.reasoning
    return found
