"""Answers that are thought over: thinking with a limit and a calculator, a vote among several samples, and solving in several steps.

result = generate_with_reasoning(engine, "What is 37 + 45?", samples=5)
result.answer, result.confidence, result.votes

path = MultiStepReasoning(engine).solve("Tom has 3 apples, gets 4 more and gives 2 away. How many are left?")
print(path.text()); path.picture("path.png")
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from inference.answers import answer_key, final_answer
from inference.conversations import check_messages
from inference.engine import Completion, Engine
from inference.lexical import Language, language
from inference.reasoning_view import draw, tree
from inference.rendering import render_prompt
from inference.sampling import SamplingSettings
from inference.thinking import Call, ThinkingMatcher, guided, replayed

MAX_NEW_TOKENS = 1024  # when no settings are given; the context may hold less
MAX_STEPS = 6
PLAN_TOKENS = 256
LONGEST_NOTE = 160  # characters of what is carried from a step to the next ones

Messages = Sequence[dict[str, Any]]


@dataclass
class Sample:
    """One reply of a vote."""

    answer: str
    thinking: str = ""
    result: str | None = None
    """What the answer ends in, as it is voted on."""
    finish_reason: str = "length"
    confidence: float = 0.0
    """Estimated probability of the answer's tokens: see ReasoningResult.basis."""
    log_prob: float = -math.inf
    """Mean log-probability of the tokens that the model chose itself, nats."""
    thinking_tokens: int = 0
    cut: bool = False
    """Whether the budget ended the thinking."""
    calls: list[Call] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


@dataclass
class Vote:
    """Equal answers."""

    result: str
    count: int
    share: float
    """Of all samples."""


@dataclass
class ReasoningResult:
    """The answer that was chosen, and how sure it is."""

    thinking: str
    answer: str
    result: str | None
    confidence: float
    """From 0 to 1."""
    basis: str
    """What the confidence is: "votes", the share of equal answers; "reasoning head" or "probability", the geometric mean over the
    answer's tokens of the head's confidence, or of their probability."""
    votes: list[Vote]
    """Most votes first; empty for one sample."""
    samples: list[Sample]
    calls: list[Call]
    """What was worked out in the thinking of the chosen sample."""
    thinking_tokens: int
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    """Of all samples."""
    seconds: float


def generate_with_reasoning(
    engine: Engine,
    messages: str | Messages,
    *,
    samples: int = 1,
    thinking: bool | None = True,
    budget: int | None = None,
    calculator: bool = False,
    settings: SamplingSettings | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> ReasoningResult:
    """Answer a conversation (or one question) with thinking, and say how sure the answer is.

    samples: above 1, self-consistency (Wang et al., 2022): the most frequent result wins, equal numbers counting as equal however they
    are written; a tie goes to the likeliest sample. thinking: True opens it, False skips it, None leaves it to the model.
    budget, calculator: see `inference.thinking.guided`; a budget of 0 is no thinking. settings: default greedy for one sample, else
    SamplingSettings(); max_new_tokens counts thinking and answer. tools: as for the chat template.
    Raises ValueError for bad values and messages, an engine without tokenizer, and thinking that the model has no token for.
    """
    started = time.perf_counter()
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
    if engine.tokenizer is None:
        raise ValueError("reasoning needs a tokenizer: Engine(model, tokenizer)")
    if settings is None:
        settings = SamplingSettings(MAX_NEW_TOKENS, temperature=0.0 if samples == 1 else SamplingSettings.temperature)
    if settings.n != 1:
        raise ValueError(f"the settings ask for n={settings.n} replies: leave n at 1 and say samples={settings.n}")
    if samples > 1 and settings.greedy:
        raise ValueError(f"samples={samples} with temperature 0 would all be the same: set a temperature, such as 0.8")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    check_messages(messages)
    prompt = render_prompt(engine.tokenizer, messages, False if budget == 0 else thinking, tools)
    used = guided(settings, engine, prompt, budget, calculator)
    replies = engine.generate([prompt], dataclasses.replace(used, n=samples, logprobs=True))[0]
    found = [_sample(engine, prompt, used, reply) for reply in replies]
    chosen, votes = vote(found)
    head = getattr(engine.model, "reasoning", None) is not None
    return ReasoningResult(
        thinking=chosen.thinking,
        answer=chosen.answer,
        result=chosen.result,
        confidence=chosen.confidence if samples == 1 else votes[0].share if votes else 0.0,
        basis="votes" if samples > 1 else "reasoning head" if head else "probability",
        votes=votes if samples > 1 else [],
        samples=found,
        calls=chosen.calls,
        thinking_tokens=chosen.thinking_tokens,
        finish_reason=chosen.finish_reason,
        prompt_tokens=len(prompt),
        completion_tokens=sum(len(reply.ids) for reply in replies),
        seconds=time.perf_counter() - started,
    )


def vote(samples: Sequence[Sample]) -> tuple[Sample, list[Vote]]:
    """The likeliest sample of the most frequent result, and all results with their votes.

    Samples that were cut off or hold no result have no vote, though they count in the shares; where that is so of all, their texts are
    compared.
    """
    voters = [(sample, sample.result) for sample in samples if sample.result is not None and sample.finish_reason != "length"]
    if not voters:
        voters = [(sample, sample.answer.strip()) for sample in samples if sample.answer.strip()]
    groups: dict[Fraction | str, list[tuple[Sample, str]]] = {}
    for sample, result in voters:
        key = answer_key(result)
        groups.setdefault(result if key == "" else key, []).append((sample, result))
    best = {key: max(members, key=lambda member: member[0].log_prob) for key, members in groups.items()}
    order = sorted(groups, key=lambda key: (-len(groups[key]), -best[key][0].log_prob))
    votes = [Vote(best[key][1], len(groups[key]), len(groups[key]) / len(samples)) for key in order]
    return (best[order[0]][0] if order else max(samples, key=lambda sample: sample.log_prob)), votes


def _sample(engine: Engine, prompt: list[int], settings: SamplingSettings, reply: Completion) -> Sample:
    ends = engine.end_tokens(settings)
    state = replayed(settings, engine.tokenizer, prompt, reply.ids, ends)
    logprobs = reply.logprobs or []
    own = [logprob for logprob, chosen in zip(logprobs, state.own, strict=False) if chosen]
    return Sample(
        answer=reply.text,
        thinking=reply.reasoning,
        result=final_answer(reply.text),
        finish_reason=reply.finish_reason,
        confidence=_confidence(engine, prompt, reply, state, ends),
        log_prob=sum(own) / len(own) if own else -math.inf,
        thinking_tokens=state.thinking_tokens,
        cut=state.cut,
        calls=state.calls,
        ids=list(reply.ids),
    )


def _confidence(engine: Engine, prompt: list[int], reply: Completion, state: ThinkingMatcher, ends: Sequence[int]) -> float:
    """Geometric mean over the tokens of the answer; 0 when there is none. The end of the turn is left out: it is no question."""
    tokenizer = engine.tokenizer
    places = [
        place
        for place in range(state.answer_start, len(reply.ids))
        if reply.ids[place] not in ends and state.own[place] and tokenizer.decode([reply.ids[place]]).strip()
    ]
    if not places or state.thinking:
        return 0.0
    if getattr(engine.model, "reasoning", None) is None:
        values = [(reply.logprobs or [])[place] for place in places]
    else:
        estimates = _head_confidence(engine, [*prompt, *reply.ids])
        values = [math.log(max(estimates[len(prompt) + place - 1], 1e-9)) for place in places]
    return math.exp(sum(values) / len(values))


@torch.inference_mode()
def _head_confidence(engine: Engine, ids: list[int]) -> list[float]:
    """What the reasoning head says at every token: the probability that what it predicts next is right."""
    model = engine.model
    training = model.training
    model.eval()
    try:
        out = model(torch.tensor([ids], device=engine.device), return_logits=False)
    finally:
        model.train(training)
    return out.confidence[0].tolist()


# ------------------------------------------------------------------------------------------------- several steps

# Each entry is (Chinese, English).
PROMPTS = {
    "question": ("问题：", "Question: "),
    "plan": (
        "回答这个问题要分哪几步？请列出编号的步骤，每行一步，最多 {most} 步。先不要计算，也不要给出答案。",
        "Which steps lead to the answer? List them with numbers, one per line, {most} at most. "
        "Do not work them out yet and do not give the answer.",
    ),
    "known": ("已经知道：", "What is known:"),
    "step": (
        "现在只做这一步：{step}\n请简短地写出这一步的结果。",
        "Now do this step only: {step}\nGive the result of this step in a few words.",
    ),
    "answer": ("请根据以上结果给出最终答案。", "Give the final answer from these results."),
}
_NUMBERED = re.compile(
    r"^[ \t>#*_]*(?:\(?\d{1,2}[.)、．:：）](?!\d)|[①-⑳]|[一二三四五六七八九十]{1,3}、|第[一二三四五六七八九十\d]{1,3}步[：:，,、]?|"
    r"步骤[ \t]*[一二三四五六七八九十\d]{1,3}[：:.、]?|Step[ \t]+\d{1,2}[:.)]?|[-•*][ \t])[ \t*_]*(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass
class ReasoningStep:
    """One step of a solution."""

    title: str
    result: str
    confidence: float
    thinking: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str = "stop"


@dataclass
class ReasoningPath:
    """How a question was answered."""

    question: str
    steps: list[ReasoningStep]
    answer: str
    confidence: float
    """Product of the steps' confidences and the answer's: the path is right only if all of them are."""
    planned: bool = True
    """False: the model gave no plan, and the question was answered in one step."""
    answer_confidence: float = 0.0
    language: Language = "en"
    seconds: float = 0.0

    def text(self, language: Language | None = None, width: int = 100) -> str:
        """The path as an indented tree; language zh or en (default: that of the question), width in columns of a terminal."""
        return tree(self, language or self.language, width)

    def picture(self, path: str | Path, language: Language | None = None) -> Path:
        """Draw the path as a PNG (or what the suffix says); returns the file. ValueError without matplotlib (extra `app`)."""
        return draw(self, Path(path), language or self.language)

    def to_dict(self) -> dict[str, Any]:
        """The path as JSON values."""
        return dataclasses.asdict(self)


class MultiStepReasoning:
    """Plan, steps, answer: for any chat model. A model that gives no plan answers in one step, and the path says so."""

    def __init__(
        self,
        engine: Engine,
        *,
        language: Language | None = None,
        max_steps: int = MAX_STEPS,
        samples: int = 1,
        thinking: bool | None = None,
        budget: int | None = None,
        calculator: bool = False,
        settings: SamplingSettings | None = None,
    ) -> None:
        """language: zh or en, default that of the question. The rest, as in `generate_with_reasoning`, holds for steps and answer;
        plans are greedy and without thinking. Raises ValueError for bad values."""
        if language not in (None, "zh", "en"):
            raise ValueError(f"language must be zh, en or None (that of the question), got {language!r}")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps!r}")
        self.engine, self.language, self.max_steps = engine, language, max_steps
        self.options: dict[str, Any] = {
            "samples": samples,
            "thinking": thinking,
            "budget": budget,
            "calculator": calculator,
            "settings": settings,
        }

    def solve(self, question: str, progress: Callable[[ReasoningStep], object] | None = None) -> ReasoningPath:
        """Answer a question step by step; progress is told of every step that is done. Raises ValueError when the question is empty or
        longer than the model's context."""
        if not question.strip():
            raise ValueError("the question is empty: ask something")
        started = time.perf_counter()
        lang = self.language or language(question)
        plan = self._plan(question, lang)
        steps: list[ReasoningStep] = []
        for title in plan or [question]:
            done = self._ask(question, "step", lang, steps, step=title) if plan else self._generate(question)
            steps.append(ReasoningStep(title, done.answer.strip(), done.confidence, done.thinking, done.calls, done.finish_reason))
            if progress is not None:
                progress(steps[-1])
        path = ReasoningPath(question, steps, steps[-1].result, 1.0, bool(plan), steps[-1].confidence, lang)
        if plan:
            last = self._ask(question, "answer", lang, steps)
            path.answer, path.answer_confidence = last.answer.strip(), last.confidence
        path.confidence = math.prod(step.confidence for step in steps) * (path.answer_confidence if plan else 1.0)
        path.seconds = time.perf_counter() - started
        return path

    def _plan(self, question: str, lang: Language) -> list[str]:
        """The steps that the model names, at most max_steps; none when it names fewer than two."""
        prompt = _prompt(question, lang, "", _words("plan", lang).format(most=self.max_steps))
        settings = SamplingSettings(PLAN_TOKENS, temperature=0.0)
        text = generate_with_reasoning(self.engine, prompt, budget=0, settings=settings).answer
        return read_plan(text, question)[: self.max_steps]

    def _ask(self, question: str, kind: str, lang: Language, steps: Sequence[ReasoningStep], **words: str) -> ReasoningResult:
        """The next thing to ask, with as many of the earlier results as the context has room for, the latest first."""
        notes = [f"{number}. {step.title} → {_end(step.result)}" for number, step in enumerate(steps, start=1)]
        settings = self.options["settings"]
        room = min(settings.max_new_tokens if settings else MAX_NEW_TOKENS, self.engine.context // 4)
        for first in range(len(notes) + 1):
            known = "\n".join([_words("known", lang), *notes[first:]]) if notes[first:] else ""
            prompt = _prompt(question, lang, known, _words(kind, lang).format(**words))
            if len(self.engine.tokenizer.encode(prompt)) + room <= self.engine.context:
                break
        return self._generate(prompt)

    def _generate(self, prompt: str) -> ReasoningResult:
        return generate_with_reasoning(self.engine, prompt, **self.options)


def read_plan(text: str, question: str = "") -> list[str]:
    """The numbered (or listed) lines of a text, without doubles and without what only repeats the question; [] when there are fewer
    than two."""
    found = (match.group(1).strip().rstrip("*_ ")[:LONGEST_NOTE] for match in _NUMBERED.finditer(text))
    steps = list(dict.fromkeys(step for step in found if _bare(step) not in ("", _bare(question))))
    return steps if len(steps) > 1 else []


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def _prompt(question: str, lang: Language, known: str, wish: str) -> str:
    return "\n\n".join(filter(None, (_words("question", lang) + question.strip(), known, wish)))


def _end(text: str) -> str:
    """The end of a long result: most texts come to their point there."""
    return text if len(text) <= LONGEST_NOTE else "…" + text[-LONGEST_NOTE:]


def _words(name: str, lang: Language) -> str:
    return PROMPTS[name][lang == "en"]
