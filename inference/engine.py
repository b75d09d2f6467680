"""The engine: prefill, decode, left-padded batches, several samples of a prompt, streaming with a reusable cache.

    engine = Engine(model, tokenizer)
    engine.generate([ids_a, ids_b], SamplingSettings(n=2))     # [[Completion, Completion], [Completion, Completion]]
    for piece in engine.stream(ids, SamplingSettings()): print(piece.text, end="")

Shapes: B rows (prompts times samples), T prompt length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inference.sampling import (
    SamplingSettings,
    TokenHistory,
    choose,
    chosen_logprobs,
    process_logits,
    prompt_seeds,
    row_generator,
)
from inference.text import Channel, ReplyText, starts_in_reasoning
from model.cache import KVCache
from model.config import HaoAIConfig
from model.transformer import pad_left


@dataclass
class Completion:
    """One finished reply. `ids` holds every generated token, the end token included; `text` is the answer alone."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    finish_reason: str = "length"
    """"stop" (end token or stop string) or "length" (max_new_tokens or the context is used up)."""
    logprobs: list[float] | None = None
    """Log-probability of each of `ids` under the unmodified logits, when asked for."""


@dataclass
class Piece:
    """A step of a streamed reply: text that may be shown now (possibly none) and the tokens that were taken for it."""

    text: str
    channel: Channel
    ids: list[int]
    finish_reason: str | None = None
    """Set on the last piece only."""
    logprobs: list[float] | None = None


class PromptCache:
    """Keys and values of one conversation between calls of `Engine.stream`; only what differs from last time is fed
    again."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: KVCache | None = None
        self.reused = 0
        """Prompt tokens that the last call found here."""

    def clear(self) -> None:
        self.ids, self.cache, self.reused = [], None, 0


class _Decoding:
    """Rows that are being decoded together: the logits of the next token, the cache and the history."""

    def __init__(
        self,
        engine: Engine,
        logits: Tensor,
        cache: KVCache,
        history: TokenHistory,
        settings: SamplingSettings,
        generators: list[torch.Generator] | None,
    ) -> None:
        self.engine, self.logits, self.cache, self.history = engine, logits, cache, history
        self.settings, self.generators = settings, generators
        self.eos_ids = engine.end_tokens(settings)

    def choose(self) -> tuple[Tensor, list[float] | None]:
        """The next token of every row (B,), and their log-probabilities when asked for."""
        scores = process_logits(self.logits, self.history, self.settings, self.eos_ids)
        tokens = choose(scores, self.settings.greedy, self.generators)
        logprobs = chosen_logprobs(self.logits, tokens).tolist() if self.settings.logprobs else None
        self.history.append(tokens)
        return tokens, logprobs

    def feed(self, tokens: Tensor) -> None:
        self.logits = self.engine.decode(tokens, self.cache)

    def select(self, rows: list[int]) -> Tensor:
        """Go on with these rows only; returns their indices as a tensor."""
        index = torch.tensor(rows, device=self.logits.device)
        self.cache.reorder(index)
        self.history.select(index)
        if self.generators is not None:
            self.generators = [self.generators[row] for row in rows]
        return index


class Engine:
    """Generates with a SmartHaoAI model. Without a tokenizer it gives ids only (no text, no stop strings)."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self.config: HaoAIConfig = model.config  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self.steps_used: Tensor | None = None
        """(B, T) reasoning steps that each token of the last feed took; None of a model that never halts."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""
        return self.config.max_position_embeddings

    def end_tokens(self, settings: SamplingSettings) -> tuple[int, ...]:
        """The ids that end a reply: those of the settings, else all that the tokenizer names."""
        if settings.eos_token_id is not None:
            return settings.eos_ids
        if self.tokenizer is None:
            return ()
        return tuple(self.tokenizer.stop_ids)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        parameter = next(self.model.parameters())
        return KVCache(self.config, batch_size, capacity, device=parameter.device, dtype=parameter.dtype)

    def prefill(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Feed prompts ids (B, T), left-padded where mask (B, T) is 0, into the cache; returns the next logits (B,
        V)."""
        out = self.model(ids, attention_mask=mask, cache=cache, last_only=True)
        self.steps_used = out.steps_used
        logits = out.logits[:, -1]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "the model's output is not finite (NaN or infinity): its weights are damaged, or its numbers are too "
                "large for this precision; load an earlier checkpoint, or run it in fp32"
            )
        return logits

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Feed one token per row, tokens (B,); returns the next logits (B, V)."""
        out = self.model(tokens.unsqueeze(1), cache=cache, last_only=True)
        self.steps_used = out.steps_used
        return out.logits[:, -1]

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Replies to several prompts (lists of token ids) at once: settings.n completions for each, in order.

        All samples of a prompt share its prefill; rows that finish leave the batch. With a seed, a prompt's replies do
        not depend on what else is in the batch (up to the rounding of batched products); the same prompt given twice
        goes on with the next samples. One seed gives every prompt the same draws; `seeds` gives each its own
        (`generate_many` makes them). Raises ValueError for an empty prompt or one longer than the context.
        """
        lists = [list(prompt) for prompt in prompts]
        if not lists:
            return []
        if seeds is not None and len(seeds) != len(lists):
            raise ValueError(f"{len(lists)} prompts need as many seeds, got {len(seeds)}")
        limits = [self._room(prompt, settings) for prompt in lists for _ in range(settings.n)]
        self._check_stop(settings)
        results = [Completion(logprobs=[] if settings.logprobs else None) for _ in limits]
        texts = self._reply_texts([prompt for prompt in lists for _ in range(settings.n)], settings)
        with self._evaluating(), torch.inference_mode():
            if max(limits) > 0:
                self._decode_batch(lists, settings, seeds, limits, results, texts)
        for result, text in zip(results, texts, strict=True):
            if text is not None:
                text.finish()
                result.text, result.reasoning = text.text, text.reasoning
        return [results[start : start + settings.n] for start in range(0, len(results), settings.n)]

    def generate_many(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, at_once: int
    ) -> Iterator[list[tuple[int, list[Completion]]]]:
        """Replies to any number of prompts, `at_once` of like length together: batches of (number of the prompt, its completions).

        With settings.seed every prompt has draws of its own, whatever batch it is in.
        """
        seeds = None if settings.seed is None else prompt_seeds(settings.seed, len(prompts))
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            own = None if seeds is None else [seeds[number] for number in part]
            yield list(zip(part, self.generate([prompts[number] for number in part], settings, own), strict=True))

    def stream(self, ids: Sequence[int], settings: SamplingSettings, cache: PromptCache | None = None) -> Iterator[Piece]:
        """The reply to one prompt as it comes, one piece or more per token; the last piece carries finish_reason.

        With a PromptCache, the part of the prompt that it already holds is not computed again. Closing the iterator at
        any point leaves the cache usable. Raises ValueError like `generate`; settings.n must be 1.
        """
        prompt = list(ids)
        if settings.n != 1:
            raise ValueError(f"a stream gives one reply, got n={settings.n}; call generate for several")
        limit = self._room(prompt, settings)
        self._check_stop(settings)
        # A generator function would report the mistakes above only when it is first read.
        return self._stream(prompt, settings, limit, PromptCache() if cache is None else cache)

    def _stream(self, prompt: list[int], settings: SamplingSettings, limit: int, held: PromptCache) -> Iterator[Piece]:
        text = self._reply_texts([prompt], settings)[0]
        channel: Channel = "reasoning" if text is not None and text.in_reasoning else "answer"
        if limit == 0:
            yield Piece("", channel, [], "length")
            return
        # Each step enters inference mode by itself: around a yield it would leak into the caller's code.
        with self._evaluating(), torch.inference_mode():
            logits = self._prefill_rest(prompt, limit, held)
            assert held.cache is not None
            history = self._history([prompt], limit)
            run = _Decoding(self, logits, held.cache, history, settings, self._generators([prompt], settings, None))
        for count in range(1, limit + 1):
            with self._evaluating(), torch.inference_mode():
                tokens, logprobs = run.choose()
            token = int(tokens)
            segments = [] if text is None or token in run.eos_ids else text.push(token)
            reason = _finish_reason(token, run.eos_ids, text, count, limit)
            if reason is not None and text is not None:
                segments += text.finish()
            for channel, words in segments[:-1]:
                yield Piece(words, channel, [])
            channel, words = segments[-1] if segments else (text.channel if text is not None else channel, "")
            yield Piece(words, channel, [token], reason, logprobs)
            if reason is not None:
                return
            known, held.ids = held.ids, []  # a feed that is interrupted leaves the cache unusable, hence empty
            with self._evaluating(), torch.inference_mode():
                run.feed(tokens)
            held.ids = [*known, token]

    def _prefill_rest(self, prompt: list[int], limit: int, held: PromptCache) -> Tensor:
        """Bring the cache to hold exactly `prompt`, feeding what it lacks; returns the next logits (1, V)."""
        # The last token is always fed: its logits are what the reply starts from.
        reused = min(_common_prefix(prompt, held.ids), len(prompt) - 1)
        needed = len(prompt) + limit
        fits = held.cache is not None and held.cache.capacity >= needed
        # Other reasoning steps, or another threshold for halting: what is held was computed by another model, as it were.
        fits = fits and held.cache.reasoning_setting == getattr(self.model, "reasoning_setting", None)  # type: ignore[union-attr]
        if held.cache is None or not fits or reused == 0 or not held.cache.rewind(reused):
            capacity = min(self.context, max(256, 1 << (needed - 1).bit_length()))
            held.cache, reused = self.new_cache(1, capacity), 0
        held.ids, held.reused = [], reused
        logits = self.prefill(torch.tensor([prompt[reused:]], device=self.device), None, held.cache)
        held.ids = prompt
        return logits

    def _decode_batch(
        self,
        prompts: list[list[int]],
        settings: SamplingSettings,
        seeds: Sequence[int] | None,
        limits: list[int],
        results: list[Completion],
        texts: list[ReplyText | None],
    ) -> None:
        ids, mask = pad_left(prompts, 0, self.device)
        cache = self.new_cache(len(prompts), ids.shape[1] + max(limits))
        logits = self.prefill(ids, mask, cache)
        history = self._history(prompts, max(limits))
        generators = self._generators(prompts, settings, seeds)
        if settings.n > 1:
            share = torch.arange(len(prompts), device=self.device).repeat_interleave(settings.n)
            logits = logits[share]
            cache.reorder(share)
            history.select(share)
        run = _Decoding(self, logits, cache, history, settings, generators)
        rows = list(range(len(results)))  # the reply that each row of the batch is working on
        done = [limit == 0 for limit in limits]
        while True:
            tokens, logprobs = run.choose()
            for slot, token in enumerate(tokens.tolist()):
                row = rows[slot]
                if done[row]:
                    continue
                result, text = results[row], texts[row]
                result.ids.append(token)
                if logprobs is not None and result.logprobs is not None:
                    result.logprobs.append(logprobs[slot])
                if text is not None and token not in run.eos_ids:
                    text.push(token)
                reason = _finish_reason(token, run.eos_ids, text, len(result.ids), limits[row])
                if reason is not None:
                    result.finish_reason, done[row] = reason, True
            alive = [slot for slot, row in enumerate(rows) if not done[row]]
            if not alive:
                return
            # Dropping rows copies the cache, so it waits until half of them are finished.
            if len(alive) <= len(rows) // 2:
                tokens = tokens[run.select(alive)]
                rows = [rows[slot] for slot in alive]
            run.feed(tokens)

    def _history(self, prompts: list[list[int]], room: int) -> TokenHistory:
        ids, mask = pad_left(prompts, 0, self.device)
        return TokenHistory(ids, mask, self.config.vocab_size, room)

    def _generators(
        self, prompts: list[list[int]], settings: SamplingSettings, seeds: Sequence[int] | None
    ) -> list[torch.Generator] | None:
        """The random stream of every row."""
        if settings.greedy or (seeds is None and settings.seed is None):
            return None
        if seeds is not None:
            return [row_generator(seed, sample, self.device) for seed in seeds for sample in range(settings.n)]
        assert settings.seed is not None
        return [row_generator(settings.seed, sample, self.device) for sample in _sample_numbers(prompts, settings.n)]

    def _reply_texts(self, prompts: list[list[int]], settings: SamplingSettings) -> list[ReplyText | None]:
        if self.tokenizer is None:
            return [None] * len(prompts)
        return [ReplyText(self.tokenizer, settings.stop, reasoning=starts_in_reasoning(self.tokenizer, prompt)) for prompt in prompts]

    def _room(self, prompt: list[int], settings: SamplingSettings) -> int:
        """How many tokens may follow this prompt."""
        if not prompt:
            raise ValueError("a prompt is empty: give at least one token")
        if len(prompt) > self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {self.context}: shorten the prompt, "
                "or use a model with a larger max_position_embeddings"
            )
        vocab_size = self.config.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"the prompt holds token id {wrong}, the model's vocabulary has {vocab_size} tokens: tokenizer and "
                "model do not belong together"
            )
        return min(settings.max_new_tokens, self.context - len(prompt))

    def _check_stop(self, settings: SamplingSettings) -> None:
        if settings.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Dropout off for the time being; a model in training goes on training afterwards."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            yield
        finally:
            if training:
                self.model.train()


def _finish_reason(token: int, eos_ids: tuple[int, ...], text: ReplyText | None, count: int, limit: int) -> str | None:
    if token in eos_ids or (text is not None and text.stopped):
        return "stop"
    return "length" if count >= limit else None


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


def _sample_numbers(prompts: list[list[int]], n: int) -> list[int]:
    """Number of each row among the replies to its prompt; a prompt given again continues the count."""
    given: Counter[tuple[int, ...]] = Counter()
    numbers: list[int] = []
    for prompt in prompts:
        key = tuple(prompt)
        numbers += range(given[key], given[key] + n)
        given[key] += n
    return numbers


def generate_ids(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    **unknown: Any,
) -> Tensor:
    """What `model.generate` does: input_ids (B, T), left-padded where attention_mask (B, T) is 0, to ids (B, T + new).

    Names and meanings are those of `transformers`, except that temperature 0 is greedy (and 1, sampling, is the
    default). Rows that end early are filled with pad_token_id (default: the first end token, or 0). Generation ends
    where the context does. Raises ValueError for a bad value, TypeError for an unknown name.
    """
    if unknown:
        raise TypeError(_unknown_message(sorted(unknown)))
    if num_beams != 1:
        raise ValueError(f"beam search is not available yet (num_beams={num_beams}); leave num_beams at 1")
    if length_penalty != 1.0:
        raise ValueError(f"length_penalty={length_penalty} only has a meaning in beam search; leave it out")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have the shape (batch, time), got {tuple(input_ids.shape)}")
    if eos_token_id is None:
        eos_token_id = getattr(model.config, "eos_token_id", None)
    settings = SamplingSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        seed=seed,
        eos_token_id=[] if eos_token_id is None else eos_token_id,
    )
    if pad_token_id is None:
        pad_token_id = settings.eos_ids[0] if settings.eos_ids else 0
    completions = Engine(model).generate(_unpadded_rows(input_ids, attention_mask), settings)
    new = [row[0].ids for row in completions]
    longest = max(map(len, new))
    # Built outside inference mode: training code may go on with these ids.
    filled = [row + [pad_token_id] * (longest - len(row)) for row in new]
    tail = torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device).reshape(len(new), longest)
    return torch.cat((input_ids, tail), dim=1)


def _unpadded_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: they must agree")
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("generation needs left padding: attention_mask has a 0 to the right of a 1; pad on the left")
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _unknown_message(names: list[str]) -> str:
    parameters = inspect.signature(generate_ids).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    hint = "; temperature=0 is greedy, any other temperature samples" if "do_sample" in names else ""
    return f"generate() has no setting {', '.join(names)}; it knows {', '.join(known)}{hint}"
