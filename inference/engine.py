"""The engine: prefill, decode, left-padded batches, several samples of a prompt, streaming with a reusable cache.

    engine = Engine(model, tokenizer)
    engine.generate([ids_a, ids_b], SamplingSettings(n=2))     # [[Completion, Completion], [Completion, Completion]]
    for piece in engine.stream(ids, SamplingSettings()): print(piece.text, end="")

Shapes: B rows (prompts times samples), T prompt length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inference.beam import beam_search
from inference.decoding import Batch, Completion, Piece, Prefill, Row
from inference.prefixes import PromptCache
from inference.sampling import SamplingSettings, prompt_seeds
from model.cache import CacheSetting, KVCache
from model.config import HaoAIConfig

if TYPE_CHECKING:
    from inference.compiled import CompiledStep

PREFILL_TOKENS = 512  # of a whole batch, fed at once on a CPU
__all__ = ["Completion", "Engine", "Piece", "PromptCache", "generate_ids"]


class Engine:
    """Generates with a SmartHaoAI model. Without a tokenizer it gives ids only (no text, no stop strings)."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self.config: HaoAIConfig = model.config  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self._last = threading.local()
        self._step: CompiledStep | None = None
        self.vocab_size = self.config.vocab_size
        """Ids that can be read and chosen: an embedding is often padded beyond the tokenizer's last token."""
        if tokenizer is not None:
            self.vocab_size = min(self.vocab_size, tokenizer.vocab_size)

    @property
    def steps_used(self) -> Tensor | None:
        """(B, T) reasoning steps that each token of this thread's last feed took; None of a model that never halts. Replies and pieces
        carry their own."""
        return getattr(self._last, "steps", None)

    @steps_used.setter
    def steps_used(self, steps: Tensor | None) -> None:
        self._last.steps = steps

    def compile(self) -> None:
        """Compile the step of a single reply, on a CPU; batches and prompts run as before. Takes half a minute, later starts of the same
        model a few seconds. Raises ValueError where that is not possible."""
        from inference.compiled import CompiledStep

        self._step = CompiledStep(self.model)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""
        return self.config.max_position_embeddings

    @property
    def cache_setting(self) -> CacheSetting:
        """What keys and values depend on besides tokens and weights: the reasoning head's setting and the LoRA adapter in use."""
        return self.model.cache_setting  # type: ignore[return-value]

    def end_tokens(self, settings: SamplingSettings) -> tuple[int, ...]:
        """The ids that end a reply: those of the settings, else all that the tokenizer names. Ids that can never come are left out."""
        named = settings.eos_ids if settings.eos_token_id is not None or self.tokenizer is None else self.tokenizer.stop_ids
        return tuple(token for token in named if token < self.vocab_size)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        parameter = next(self.model.parameters())
        return KVCache(self.config, batch_size, capacity, device=parameter.device, dtype=parameter.dtype)

    def prefill(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Feed prompts ids (B, T), left-padded where mask (B, T) is 0; returns the next logits (B, V)."""
        columns = max(1, PREFILL_TOKENS // len(ids))
        if mask is not None or ids.shape[1] <= columns or ids.device.type != "cpu":
            return self.feed(ids, cache, mask)[:, -1]
        for part in ids.split(columns, dim=1):  # what a layer makes of so few tokens stays in the processor's cache
            logits = self.feed(part, cache)
        return logits[:, -1]

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Feed one token per row, tokens (B,); returns the next logits (B, V)."""
        return self.feed(tokens.unsqueeze(1), cache)[:, -1]

    def decode_block(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Feed tokens (B, T); returns the logits (B, T, V) after each of them."""
        return self.feed(tokens, cache, last_only=False)

    def feed(self, ids: Tensor, cache: KVCache, mask: Tensor | None = None, last_only: bool = True) -> Tensor:
        """Feed ids (B, T), the only place where the model is run; returns logits (B, T, V), with last_only (B, 1, V).

        Ids that the tokenizer does not have can never be chosen: their logits are minus infinity.
        """
        if self._step is not None and mask is None and self._step.fits(ids, cache):
            logits, self.steps_used = self._step(ids, cache), None
        else:
            out = self.model(ids, attention_mask=mask, cache=cache, last_only=last_only)
            logits, self.steps_used = out.logits, out.steps_used
        if self.vocab_size < logits.shape[-1]:
            logits[..., self.vocab_size :] = -torch.inf
        return logits

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Replies to several prompts (lists of token ids) at once: settings.n completions for each, in order.

        All samples of a prompt share its prefill; rows that finish leave the batch. With a seed, a prompt's replies do
        not depend on what else is in the batch (up to the rounding of batched products); the same prompt given twice
        goes on with the next samples. One seed gives every prompt the same draws; `seeds` gives each its own
        (`generate_many` makes them). Nothing is drawn in beam search: there seeds change nothing. Raises ValueError for an empty
        prompt or one longer than the context.
        """
        lists = [token_ids(prompt) for prompt in prompts]
        if seeds is not None and len(seeds) != len(lists):
            raise ValueError(f"{len(lists)} prompts need as many seeds, got {len(seeds)}")
        if settings.num_beams > 1:
            return beam_search(self, lists, settings)
        rows: list[list[Row]] = []
        given: Counter[tuple[int, ...]] = Counter()
        for place, prompt in enumerate(lists):
            own = settings if seeds is None else dataclasses.replace(settings, seed=seeds[place])
            first = given[tuple(prompt)] if seeds is None else 0
            rows.append([Row(self, prompt, own, first + sample, sample) for sample in range(settings.n)])
            given[tuple(prompt)] += settings.n
        open_rows = [samples for samples in rows if not samples[0].done]
        with self.evaluating(), torch.inference_mode():
            batch = Batch(self)
            if open_rows:
                room = max(samples[0].limit for samples in open_rows)
                prefill = Prefill(self, [samples[0].prompt for samples in open_rows], [None] * len(open_rows), room)
                prefill.advance()
                batch.join(prefill, open_rows)
            while batch.rows:
                for row, _ in batch.choose():
                    if row.error is not None:
                        raise row.error
                batch.leave([row for row in batch.rows if row.done])
                batch.feed()
        return [[row.completion for row in samples] for samples in rows]

    def generate_many(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, at_once: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[list[tuple[int, list[Completion]]]]:
        """Replies to any number of prompts, `at_once` of like length together: batches of (number of the prompt, its completions).

        part: (number, count), of several that share the work: every count-th batch from that number on. With settings.seed every
        prompt has draws of its own, whatever batch it is in. Raises ValueError like `generate`.
        """
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1 prompt, got {at_once}")
        seeds = None if settings.seed is None else prompt_seeds(settings.seed, len(prompts))
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(part[0] * at_once, len(order), part[1] * at_once):
            numbers = order[start : start + at_once]
            own = None if seeds is None else [seeds[number] for number in numbers]
            yield list(zip(numbers, self.generate([prompts[number] for number in numbers], settings, own), strict=True))

    def stream(self, ids: Sequence[int], settings: SamplingSettings, cache: PromptCache | None = None) -> Iterator[Piece]:
        """The reply to one prompt as it comes, one piece or more per token; the last piece carries finish_reason.

        With a PromptCache, the part of the prompt that it already holds is not computed again. Closing the iterator at
        any point leaves the cache usable. Raises ValueError like `generate`; settings.n must be 1.
        """
        prompt = token_ids(ids)
        if settings.n != 1:
            raise ValueError(f"a stream gives one reply, got n={settings.n}; call generate for several")
        if settings.num_beams != 1:
            raise ValueError(f"beam search knows its reply at the end only (num_beams={settings.num_beams}): call generate")
        # A generator function would report mistakes only when it is first read.
        return self._stream(Row(self, prompt, settings), PromptCache() if cache is None else cache)

    def _stream(self, row: Row, held: PromptCache) -> Iterator[Piece]:
        batch = Batch(self)
        if row.done:
            yield Piece("", row.channel, [], "length")
            return
        epoch = held.epoch
        # Each step enters inference mode by itself: around a yield it would leak into the caller's code.
        with self.evaluating(), torch.inference_mode():
            prefix = held.find(row.prompt, self)
            own = prefix is not None and held.use(prefix)
            prefill = Prefill(self, [row.prompt], [prefix], row.limit, own)
            held.reused = prefill.reused[0]
            prefill.advance()
            batch.join(prefill, [[row]])
        try:
            while not row.done:
                with self.evaluating(), torch.inference_mode():
                    taken = batch.choose()
                if row.error is not None:
                    raise row.error
                yield from taken[0][1]
                if not row.done:
                    with self.evaluating(), torch.inference_mode():
                        batch.feed()
        finally:
            with torch.inference_mode():
                kept = None if row.error else batch.keep(row)
            if kept is not None:
                held.put(*kept, epoch)

    def room(self, prompt: Sequence[int], settings: SamplingSettings) -> int:
        """How many tokens may follow this prompt. Raises ValueError for one that the model cannot read, or settings it cannot meet."""
        if not prompt:
            raise ValueError("a prompt is empty: give at least one token")
        if len(prompt) > self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {self.context}: shorten the prompt, "
                "or use a model with a larger max_position_embeddings"
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(
                f"the prompt holds token id {wrong}, the model's vocabulary has {self.vocab_size} tokens: tokenizer and "
                "model do not belong together"
            )
        for name, wanted in (("stop strings need", settings.stop), ("a grammar needs", settings.grammar)):
            if wanted and self.tokenizer is None:
                raise ValueError(f"{name} a tokenizer: Engine(model, tokenizer)")
        settings.check_vocabulary(self.vocab_size)
        return min(settings.max_new_tokens, self.context - len(prompt))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off for the time being; a model in training goes on training afterwards."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            yield
        finally:
            if training:
                self.model.train()


def token_ids(prompt: Sequence[int]) -> list[int]:
    """A prompt as a list; also from an array or a tensor (T,). Raises ValueError for what is no sequence of whole numbers."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(f"a prompt is a list of token ids, such as tokenizer.encode(text), not {prompt!r:.60}") from error


def generate_ids(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    num_return_sequences: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    prompt_lookup_num_tokens: int = 0,
    **unknown: Any,
) -> Tensor:
    """What `model.generate` does: input_ids (B, T), left-padded where attention_mask (B, T) is 0, to ids
    (B * num_return_sequences, T + new).

    Names and meanings are those of `transformers`, except that temperature 0 is greedy (and 1, sampling, is the
    default, but for beam search). Rows that end early are filled with pad_token_id (default: the first end token, or 0). Generation ends
    where the context does. Raises ValueError for a bad value, TypeError for an unknown name.
    """
    if unknown:
        raise TypeError(_unknown_message(sorted(unknown)))
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have the shape (batch, time), got {tuple(input_ids.shape)}")
    if temperature is None:
        temperature = 1.0 if num_beams == 1 else 0.0
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
        n=num_return_sequences,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        lookup=prompt_lookup_num_tokens,
        eos_token_id=[] if eos_token_id is None else eos_token_id,
    )
    if pad_token_id is None:
        pad_token_id = settings.eos_ids[0] if settings.eos_ids else 0
    completions = Engine(model).generate(_unpadded_rows(input_ids, attention_mask), settings)
    new = [completion.ids for row in completions for completion in row]
    if len(new) < num_return_sequences * len(input_ids):
        raise ValueError(f"there are fewer than num_return_sequences={num_return_sequences} different replies: ask for fewer")
    longest = max(map(len, new))
    # Built outside inference mode: training code may go on with these ids.
    filled = [row + [pad_token_id] * (longest - len(row)) for row in new]
    tail = torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device).reshape(len(new), longest)
    return torch.cat((input_ids.repeat_interleave(num_return_sequences, dim=0), tail), dim=1)


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
