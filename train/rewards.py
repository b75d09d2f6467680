"""Rewards by rule: pure functions from a finished answer to a number, found by name and added up with weights.

    rewards:            # in the settings of PPO and GRPO
      exact: 1.0        # the answer's result is the reference's
      format: 0.1       # it came to its end, thinking closed, answer not empty

A rule of one's own: `train.rewards.RULES["mine"] = lambda answer: float("please" in answer.text)`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.answers import final_answer, same_answer
from inference.calculator import check_steps
from inference.engine import Completion
from model.reward import RewardModel
from train.config import UsageError

if TYPE_CHECKING:
    from train.prompts import Prompt

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile("[A-Za-z]")
_SENTENCE_END = (".", "!", "?", "。", "！", "？", "…", '."', '!"', '?"', "。”", "！”", "？”")
CHRF_ORDER, CHRF_BETA = 6, 2
SOFT_SHARE = 0.5  # share of the room for an answer above which the length rule begins to count


@dataclass(frozen=True)
class Answer:
    """What a rule may look at."""

    question: str
    """The last thing the user said."""
    text: str
    """The reply without its thinking."""
    reasoning: str = ""
    """The thinking."""
    finished: bool = True
    """It ended by itself, not because the room was used up."""
    tokens: int = 0
    """Generated tokens, thinking and end token included."""
    limit: int = 0
    """Most tokens that it could have had."""
    reference: str | None = None
    """The data's own answer to the question, when there is one."""


Rule = Callable[[Answer], float]


def exact(answer: Answer) -> float:
    """1 when the answer's result is the reference's, else 0."""
    wanted = None if answer.reference is None else final_answer(answer.reference)
    given = final_answer(answer.text)
    return float(wanted is not None and given is not None and same_answer(wanted, given))


def well_formed(answer: Answer) -> float:
    """1 when the reply came to its end with an answer outside the thinking, else 0."""
    return float(answer.finished and bool(answer.text.strip()))


def steps(answer: Answer) -> float:
    """Share of right ones among the different equations of thinking and answer, by the calculator; 0 when there is none."""
    checked = dict(check_steps(f"{answer.reasoning}\n{answer.text}"))
    return sum(checked.values()) / len(checked) if checked else 0.0


def language(answer: Answer) -> float:
    """Share of the answer's letters that are of the question's script (Chinese or Latin); 1 for an answer without letters.

    Requests for a translation should not be rewarded by it.
    """
    chinese, latin = len(_HAN.findall(answer.text)), len(_LATIN.findall(answer.text))
    if not chinese + latin:
        return 1.0
    return (chinese if _HAN.search(answer.question) else latin) / (chinese + latin)


def length(answer: Answer) -> float:
    """0 for a reply of up to half its room, falling evenly to -1 for one that fills it (the soft overlong punishment of DAPO, Yu et
    al. 2025)."""
    soft = SOFT_SHARE * answer.limit
    return -min(1.0, max(0.0, answer.tokens - soft) / (answer.limit - soft)) if answer.limit else 0.0


def punctuation(answer: Answer) -> float:
    """1 when the answer ends like a sentence, else 0."""
    return float(answer.text.rstrip().endswith(_SENTENCE_END))


def variety(answer: Answer) -> float:
    """Share of different ones among the runs of four characters: low for a reply that goes in circles."""
    runs = [answer.text[at : at + 4] for at in range(len(answer.text) - 3)]
    return len(set(runs)) / len(runs) if runs else 1.0


def overlap(answer: Answer) -> float:
    """How much of the data's own answer is in this one, and the other way round, from 0 to 1: chrF (Popović, 2015), the F-score of
    runs of 1 to 6 characters in which the reference's count twice; spaces are left out. For answers that may be worded freely."""
    if answer.reference is None:
        return 0.0
    wanted, given = ("".join(text.split()) for text in (answer.reference, answer.text))
    precision = recall = 0.0
    orders = min(CHRF_ORDER, len(wanted), len(given))
    for size in range(1, orders + 1):
        runs = [Counter(text[at : at + size] for at in range(len(text) - size + 1)) for text in (wanted, given)]
        shared = (runs[0] & runs[1]).total()
        recall += shared / runs[0].total() / orders
        precision += shared / runs[1].total() / orders
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if precision and recall else 0.0


RULES: dict[str, Rule] = {
    "exact": exact,
    "overlap": overlap,
    "format": well_formed,
    "steps": steps,
    "language": language,
    "length": length,
    "punctuation": punctuation,
    "variety": variety,
}
NEED_REFERENCE = ("exact", "overlap")
NEED_RESULT = ("exact",)  # a reference with a result that can be compared


def check_weights(weights: Mapping[str, object]) -> dict[str, float]:
    """Names and weights of the setting `rewards` as numbers. Raises UsageError for an unknown name or a weight that is no number."""
    checked: dict[str, float] = {}
    for name, weight in weights.items():
        if name not in RULES:
            raise UsageError(f"rewards.{name}: there is no such rule; known: {', '.join(RULES)}")
        try:
            checked[name] = float(weight)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            checked[name] = math.nan
        if not math.isfinite(checked[name]):
            raise UsageError(f"rewards.{name}={weight!r} is not a weight; give a number, 0 to leave the rule out")
    return {name: weight for name, weight in checked.items() if weight}


class Judge:
    """Rewards of finished answers: the weighted rules, plus the reward model's score, less what a missing end costs.

    judge([(prompt, completion), ...]) -> [{"exact": 1.0, "model": -0.3, "reward": 0.7}, ...]
    """

    def __init__(
        self, weights: Mapping[str, float], limit: int, reward_model: RewardModel | None = None, missing_end: float = 0.0, pad_id: int = 0
    ) -> None:
        """limit: most tokens an answer can have."""
        self.weights, self.limit, self.reward_model = dict(weights), limit, reward_model
        self.missing_end, self.pad_id = missing_end, pad_id

    def describe(self) -> str:
        parts = [f"{weight:g} x {name}" for name, weight in self.weights.items()] + ["the reward model"] * (self.reward_model is not None)
        return " + ".join(parts) + (f", -{self.missing_end:g} without an end" if self.missing_end else "")

    def __call__(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[dict[str, float]]:
        judged = []
        for prompt, reply in pairs:
            answer = Answer(
                prompt.question, reply.text, reply.reasoning, reply.finish_reason == "stop", len(reply.ids), self.limit, prompt.reference
            )
            parts = {name: RULES[name](answer) for name in self.weights}
            total = sum(self.weights[name] * value for name, value in parts.items()) - self.missing_end * (not answer.finished)
            judged.append({**parts, "reward": total})
        if self.reward_model is not None:
            scores = self.reward_model.score_ids([[*prompt.ids, *reply.ids] for prompt, reply in pairs], self.pad_id)
            for parts, score in zip(judged, scores.tolist(), strict=True):
                parts["model"] = score
                parts["reward"] += score
        wrong = next((parts for parts in judged if not math.isfinite(parts["reward"])), None)
        if wrong is not None:
            raise ValueError(f"a reward is not a finite number: {wrong}; check the reward model and the rules")
        return judged
