"""What a model makes of the tasks: right answers, how sure it was of them, what they cost, and the way to one of them.

Shapes: B batch, T time, C channels, V vocabulary, N answer tokens, n reasoning steps.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference import Completion, Engine, SamplingSettings
from inference.rendering import render_prompt
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.rewards import Answer
from train.runtime import timed
from train.statistics import wilson

BATCH_TOKENS = 8192
GENERATED_BATCH = 64
BINS = 10
TIMED_TOKENS = 32
TIMED_ROUNDS = 5

Row = dict[str, Any]


@dataclass
class Answers:
    """The answers to some rows, in their order, and their tokens one after the other."""

    correct: list[bool]
    """Per row: every token of the answer, the end of the turn included, is the most probable one."""
    hits: Tensor
    """(N,) bool: the most probable token is the right one. The end of the turn is left out here and in the next two: once the answer
    stands there, it is no question."""
    softmax: Tensor
    """(N,) probability of the most probable token."""
    confidence: Tensor | None
    """(N,) what the reasoning head says of it; None without one."""
    answer_steps: float | None
    """Mean number of latent steps for the answer tokens; None where halting is off."""
    all_steps: float | None
    """The same for all tokens, those of the question included."""


def encode(tokenizer: BPETokenizer, row: Row, context: int) -> tuple[list[int], list[int]]:
    """Prompt (thinking closed) and answer with the end of the turn, as ids. Raises ValueError for a row longer than the context."""
    prompt = tokenizer.render(row["messages"][:1], add_generation_prompt=True, enable_thinking=False).ids
    answer = [*tokenizer.encode(row["answer"]), tokenizer.eos_token_id]
    if len(prompt) + len(answer) > context:
        raise ValueError(f"a task of {len(prompt) + len(answer)} tokens is longer than the model's context of {context}: {prompt!r}")
    return prompt, answer


@torch.inference_mode()
def answer_rows(model: SmartHaoAI, tokenizer: BPETokenizer, rows: Sequence[Row]) -> Answers:
    """Check the model's greedy answers without generating them: an answer is generated exactly when each of its tokens is the most
    probable one after the right ones before it."""
    pairs = [encode(tokenizer, row, model.config.max_position_embeddings) for row in rows]
    correct = [False] * len(rows)
    found: dict[str, list[Tensor]] = {"hits": [], "softmax": [], "confidence": [], "steps": []}
    steps_of_all, tokens_of_all = 0, 0
    for batch in _batches([len(prompt) + len(answer) for prompt, answer in pairs]):
        longest = max(len(pairs[i][0]) + len(pairs[i][1]) for i in batch)
        # Nothing looks to the right, so that padding there changes nothing.
        ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        asks = torch.zeros((len(batch), longest), dtype=torch.bool)
        inner = torch.zeros_like(asks)  # without the end of the turn
        real = torch.zeros_like(asks)
        for place, index in enumerate(batch):
            prompt, answer = pairs[index]
            ids[place, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            asks[place, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
            inner[place, len(prompt) - 1 : len(prompt) + len(answer) - 2] = True
            real[place, : len(prompt) + len(answer) - 1] = True
        out = model(ids.to(model.device), return_logits=False, output_hidden_states=True)
        assert out.hidden_states is not None
        logits = model.logits(out.hidden_states[asks.to(model.device)]).float().cpu()
        hits = logits.argmax(dim=-1) == torch.roll(ids, -1, dims=1)[asks]
        wrong = torch.zeros_like(asks)
        wrong[asks] = ~hits
        for place, index in enumerate(batch):
            correct[index] = not bool(wrong[place].any())
        kept = inner[asks]
        found["hits"].append(hits[kept])
        found["softmax"].append(logits.softmax(dim=-1).amax(dim=-1)[kept])
        if out.confidence is not None:
            found["confidence"].append(out.confidence.float().cpu()[inner])
        if out.steps_used is not None:
            used = out.steps_used.cpu()
            found["steps"].append(used[asks])
            steps_of_all, tokens_of_all = steps_of_all + int(used[real].sum()), tokens_of_all + int(real.sum())
    return Answers(
        correct,
        torch.cat(found["hits"]),
        torch.cat(found["softmax"]),
        torch.cat(found["confidence"]) if found["confidence"] else None,
        float(torch.cat(found["steps"]).double().mean()) if found["steps"] else None,
        steps_of_all / tokens_of_all if found["steps"] else None,
    )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like length, some BATCH_TOKENS tokens at a time."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def task_prompts(tokenizer: BPETokenizer, rows: Sequence[Row], thinking: bool | None = None) -> list[list[int]]:
    """The questions as ids. thinking: True opens it, False closes it, None leaves it to the model."""
    return [render_prompt(tokenizer, row["messages"][:1], thinking) for row in rows]


def generate_answers(
    model: SmartHaoAI,
    tokenizer: BPETokenizer,
    rows: Sequence[Row],
    max_new_tokens: int = 200,
    thinking: bool | None = None,
    temperature: float = 0.0,
) -> list[Completion]:
    """Freely generated answers; greedy, or sampled with fixed seeds. thinking as in `task_prompts`."""
    prompts = task_prompts(tokenizer, rows, thinking)
    engine, settings = Engine(model, tokenizer), SamplingSettings(max_new_tokens, temperature, top_k=0, top_p=1.0, seed=0)
    answers = {index: replies[0] for batch in engine.generate_many(prompts, settings, GENERATED_BATCH) for index, replies in batch}
    return [answers[i] for i in range(len(rows))]


def as_answers(replies: Sequence[Completion], rows: Sequence[Row]) -> list[Answer]:
    """Replies to the rows as rules judge them: a right result counts in any wording, not only to the letter."""
    return [
        Answer(row["messages"][0]["content"], reply.text, reply.reasoning, reference=row["answer"])
        for reply, row in zip(replies, rows, strict=True)
    ]


def share(correct: Sequence[bool]) -> dict[str, float]:
    """{"passed", "total", "rate", "low", "high"}, with Wilson's 95 % interval."""
    low, high = wilson(sum(correct), len(correct))
    return {"passed": sum(correct), "total": len(correct), "rate": sum(correct) / len(correct), "low": low, "high": high}


def most_frequent(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """The most frequent answer of each kind and language: what can be learned from rows to train on without reading a question."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row["kind"], row["lang"]), Counter())[row["answer"]] += 1
    return {key: answers.most_common(1)[0][0] for key, answers in counts.items()}


def guessing(rows: Sequence[Row], frequent: Mapping[tuple[str, str], str]) -> list[bool]:
    """What always giving the most frequent answer gets right: the least that counts as an achievement. frequent: of rows to train on,
    since the answers of the rows that are tested on are not known to anyone who guesses."""
    return [row["answer"] == frequent.get((row["kind"], row["lang"])) for row in rows]


def calibration(estimates: Tensor, hits: Tensor) -> dict[str, Any]:
    """How far estimated probabilities (N,) fit what happened (N,).

    brier: mean squared difference. ece: mean difference between estimate and share of hits over BINS equal intervals, weighted by what
    falls into them (Naeini et al., 2015). bins: per interval that is not empty its count, mean estimate and share of hits.
    """
    estimates, outcomes = estimates.double(), hits.double()
    place = (estimates * BINS).long().clamp(max=BINS - 1)
    bins = []
    for index in range(BINS):
        inside = place == index
        if bool(inside.any()):
            mean, rate = float(estimates[inside].mean()), float(outcomes[inside].mean())
            bins.append({"low": index / BINS, "high": (index + 1) / BINS, "count": int(inside.sum()), "estimate": mean, "rate": rate})
    ece = sum(part["count"] * abs(part["estimate"] - part["rate"]) for part in bins) / len(estimates)
    return {
        "tokens": len(estimates),
        "rate": float(outcomes.mean()),
        "estimate": float(estimates.mean()),
        "brier": float(((estimates - outcomes) ** 2).mean()),
        "ece": ece,
        "bins": bins,
    }


def flops_per_token(model: SmartHaoAI, steps: float | None, context: int, training: bool = False) -> float:
    """Floating-point operations for a token, at a mean number of latent steps: a step that is not taken is not counted."""
    if steps is None:
        return model.config.account().flops_per_token(context, training)
    one, two = (replace(model.config, reasoning_steps=n).account().flops_per_token(context, training) for n in (1, 2))
    return one + (steps - 1) * (two - one)


@dataclass
class Timing:
    """What is timed: one conversation, at one setting of the reasoning head."""

    engine: Engine
    prompt: list[int]
    steps: int | None
    halt: float


def decoding_times(timings: Sequence[Timing]) -> list[list[float]]:
    """Milliseconds a generated token: TIMED_ROUNDS rounds of all in turn, so that whatever else the machine does, it does to all of
    them. A first round is not counted."""
    times: list[list[float]] = [[] for _ in timings]
    settings = SamplingSettings(max_new_tokens=TIMED_TOKENS, temperature=0.0, eos_token_id=[])
    for number in range(TIMED_ROUNDS + 1):
        for place, timing in enumerate(timings):
            engine = timing.engine
            assert isinstance(engine.model, SmartHaoAI)
            set_steps(engine.model, timing.steps, timing.halt)
            room = min(TIMED_TOKENS, engine.context - len(timing.prompt))
            seconds = timed(partial(engine.generate, [timing.prompt], settings), str(engine.device))
            if number:
                times[place].append(1000 * seconds / max(room, 1))
    return times


def middle(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def set_steps(model: SmartHaoAI, steps: int | None, halt: float) -> None:
    """Let the reasoning head take `steps` steps, and stop earlier when it is surer than `halt` (0: never). None: there is no head."""
    if steps is not None:
        model.reasoning_steps, model.reasoning_halt = steps, halt


@dataclass
class Path:
    """What a model would say after each latent step, for one task."""

    question: str
    answer: str
    tokens: list[str]
    """The right tokens of the answer, the end of the turn included."""
    predicted: list[list[str]]
    """[step][token]: the most probable token."""
    probability: list[list[float]]
    confidence: list[list[float]]

    @property
    def changes(self) -> int:
        """How often a step changes the prediction."""
        return sum(
            a != b for before, after in zip(self.predicted, self.predicted[1:], strict=False) for a, b in zip(before, after, strict=True)
        )


@torch.inference_mode()
def reasoning_path(model: SmartHaoAI, tokenizer: BPETokenizer, row: Row) -> Path:
    """The path of one task, at the model's present number of steps. Raises ValueError for a model without a reasoning head."""
    prompt, answer = encode(tokenizer, row, model.config.max_position_embeddings)
    ids = torch.tensor([prompt + answer], device=model.device)
    out = model(ids, output_reasoning=True, return_logits=False)
    if out.step_hidden_states is None or out.step_confidence is None:
        raise ValueError("the model has no reasoning head, so that there is no path to draw")
    asked = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    chances, tops = model.logits(out.step_hidden_states[:, 0, asked]).float().softmax(dim=-1).max(dim=-1)  # (n, answer)
    return Path(
        row["messages"][0]["content"],
        row["answer"],
        [shown(tokenizer, token) for token in answer],
        [[shown(tokenizer, token) for token in line] for line in tops.tolist()],
        chances.tolist(),
        out.step_confidence[:, 0, asked].float().tolist(),
    )


def shown(tokenizer: BPETokenizer, token: int) -> str:
    """A token for people: the end of a turn by name, blanks visible."""
    if token == tokenizer.eos_token_id:
        return "<end>"
    text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
    return text.replace(" ", "␣").replace("\n", "↵")
