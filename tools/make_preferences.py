"""Makes preference pairs from a model's own answers: the best against the worst, or the data's own answer against a wrong one.

    python -m tools.make_preferences MODEL --prompts FILE --samples 4 --by reward --reward-model weight/reward OUT.jsonl
    python -m tools.make_preferences MODEL --prompts FILE --samples 8 --by rule --rule exact --rule length=0.5 OUT.jsonl
    python -m tools.make_preferences MODEL --prompts FILE --samples 2 --by reference OUT.jsonl

FILE: rows of any format that ask something, {prompt} alone included; rules that compare (exact) need the data's answer in the row.
reward and rule: several answers to each question, the best against the worst. reference: the data's own answer, its thinking
included, against the model's first one with another result; questions without a wrong answer are left out and counted.
Rows of OUT.jsonl: {prompt, chosen, rejected, chosen_score, rejected_score}, ready for train_dpo and train_reward. Answers that were
cut off by --max-new-tokens or are empty take no part; questions whose answers are all equally good are left out and counted. Equal
seeds give equal files.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inference import Completion, Engine, SamplingSettings
from inference.sampling import prompt_seeds
from model.checkpoint import find_model
from model.files import temporary_name
from model.reward import RewardModel, check_same_vocabulary
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.convert_sft import check_out
from tools.evaluate import load
from train.config import UsageError
from train.data_files import expand_paths
from train.formats import Message, RowError, recognise
from train.prompts import Prompt, read_prompts
from train.rewards import NEED_REFERENCE, NEED_RESULT, RULES, Judge, check_weights

SHOWN = 3
Scored = tuple[Completion, float]


class NoPairs(ValueError):
    """Nothing can be learned from the answers."""


@dataclass
class PairReport:
    """What became of the questions."""

    questions: int = 0
    answers: int = 0
    pairs: int = 0
    ties: int = 0
    """Questions whose answers are all as good as each other."""
    too_few: int = 0
    """Questions with fewer answers that can be used than a pair takes of them."""
    right: int = 0
    """Questions with only right answers, where the data's own is the other half of the pair."""
    cut_off: int = 0
    empty: int = 0
    chosen: float = 0.0
    """Sum of the chosen answers' scores."""
    rejected: float = 0.0

    def lines(self) -> list[str]:
        """The report in words."""
        left_out = {"ties": self.ties, "answered right": self.right, "with too few usable answers": self.too_few}
        lines = [
            f"{self.pairs:,} pairs from {self.questions:,} questions; left out: "
            + (", ".join(f"{count:,} {what}" for what, count in left_out.items() if count) or "none"),
            f"{self.answers:,} answers: {self.cut_off:,} cut off by --max-new-tokens, {self.empty:,} empty or unreadable",
        ]
        if self.pairs:
            lines.append(f"mean score: chosen {self.chosen / self.pairs:.3f}, rejected {self.rejected / self.pairs:.3f}")
        return lines


def make_pairs(
    engine: Engine,
    prompts: Sequence[Prompt],
    judge: Judge,
    settings: SamplingSettings,
    *,
    at_once: int,
    gap: float = 0.0,
    reference: bool = False,
    minutes: float = 0.0,
    report: PairReport,
) -> Iterator[dict[str, Any]]:
    """Yield the pairs of `prompts` as rows; `settings.n` answers to each, `at_once` answers generated together.

    gap: scores that differ by no more than this are a tie. reference: the data's own answer against one that `judge` gives 0.
    minutes: begin no batch after so long; 0: ask them all.
    """
    step = max(1, at_once // settings.n)
    seeds = None if settings.seed is None else prompt_seeds(settings.seed, len(prompts))
    started = time.monotonic()
    for start in tqdm(range(0, len(prompts), step), desc="answering", leave=False, disable=None):
        if minutes and time.monotonic() - started > 60 * minutes:
            return
        part = prompts[start : start + step]
        replies = engine.generate([prompt.ids for prompt in part], settings, seeds and seeds[start : start + step])
        scores = iter(judge([(prompt, reply) for prompt, group in zip(part, replies, strict=True) for reply in group]))
        for prompt, group in zip(part, replies, strict=True):
            scored = [(reply, next(scores)["reward"]) for reply in group]
            report.questions += 1
            report.answers += len(scored)
            usable = _usable(prompt, scored, report)
            row = _against_reference(prompt, usable, report) if reference else _pair(prompt, usable, gap, report)
            if row is not None:
                yield row


def _usable(prompt: Prompt, scored: list[Scored], report: PairReport) -> list[Scored]:
    """The answers that came to their end and can be read; the others are counted."""
    usable: list[Scored] = []
    for reply, score in scored:
        if reply.finish_reason != "stop":
            report.cut_off += 1
        elif not _readable(prompt, reply):
            report.empty += 1
        else:
            usable.append((reply, score))
    return usable


def _pair(prompt: Prompt, usable: list[Scored], gap: float, report: PairReport) -> dict[str, Any] | None:
    """The best and the worst answer as a row; None when nothing can be learned from these."""
    if len(usable) < 2:
        report.too_few += 1
        return None
    chosen, best = max(usable, key=lambda pair: pair[1])
    rejected, worst = min(usable, key=lambda pair: pair[1])
    if best - worst <= gap or _answer(chosen.text, chosen.reasoning) == _answer(rejected.text, rejected.reasoning):
        report.ties += 1
        return None
    return _row(prompt, _answer(chosen.text, chosen.reasoning), best, rejected, worst, report)


def _against_reference(prompt: Prompt, usable: list[Scored], report: PairReport) -> dict[str, Any] | None:
    """The data's own answer and the first wrong one as a row; None when there is no wrong one."""
    assert prompt.answer is not None
    wrong = [(reply, score) for reply, score in usable if score == 0]
    if not wrong:
        report.right += bool(usable)
        report.too_few += not usable
        return None
    whole = prompt.answer.keys() > {"role", "content"}  # with thinking or tool calls
    return _row(prompt, [prompt.answer] if whole else prompt.answer["content"], 1.0, *wrong[0], report)


def _row(
    prompt: Prompt, chosen: str | list[Message], best: float, rejected: Completion, worst: float, report: PairReport
) -> dict[str, Any]:
    """A pair as a row, counted."""
    report.pairs += 1
    report.chosen += best
    report.rejected += worst
    scores = {"chosen_score": round(best, 6), "rejected_score": round(worst, 6)}
    return {**_asked(prompt), "chosen": chosen, "rejected": _answer(rejected.text, rejected.reasoning), **scores}


def _asked(prompt: Prompt) -> dict[str, Any]:
    alone = len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user"
    row: dict[str, Any] = {"prompt": prompt.messages[0]["content"] if alone else prompt.messages}
    if prompt.tools:
        row["tools"] = prompt.tools
    if prompt.thinking is not None:
        row["chat_template_kwargs"] = {"enable_thinking": prompt.thinking}
    return row


def _answer(text: str, thought: str) -> str | list[Message]:
    """Text, or with thinking a list of one turn."""
    text, thought = text.strip(), thought.strip()
    return [{"role": "assistant", "content": text, "reasoning_content": thought}] if thought else text


def _without_thinking(answer: Message | None) -> Message | None:
    return None if answer is None else {name: value for name, value in answer.items() if name != "reasoning_content"}


def _readable(prompt: Prompt, reply: Completion) -> bool:
    """Whether training will read the answer as it was said: not empty, no thinking or tool call that is never closed."""
    try:
        recognise({**_asked(prompt), "completion": _answer(reply.text, reply.reasoning), "label": True})
    except RowError:
        return False
    return True


def make_judge(options: argparse.Namespace, tokenizer: BPETokenizer, model: SmartHaoAI) -> Judge:
    """What ranks the answers. Raises UsageError for a choice that does not fit, ValueError for a reward model of other tokens."""
    if options.by == "rule":
        if not options.rule or options.reward_model is not None:
            raise UsageError(f"--by rule needs --rule NAME (and no --reward-model); rules: {', '.join(RULES)}")
        named = [rule.partition("=") for rule in options.rule]
        return Judge(check_weights({name: weight or 1.0 for name, _, weight in named}), options.max_new_tokens)
    if options.rule or (options.by == "reference" and options.reward_model is not None):
        alone = {"reward": "ranks by the reward model alone", "reference": "compares results with the data's own answers alone"}
        raise UsageError(f"--by {options.by} {alone[options.by]}; use --by rule for --rule, --by reward for --reward-model")
    if options.by == "reference":
        return Judge({"exact": 1.0}, options.max_new_tokens)
    folder = find_model(options.reward_model or "weight/reward")
    check_same_vocabulary(tokenizer, BPETokenizer.from_pretrained(folder), folder)
    reward_model = RewardModel.from_pretrained(folder).to(model.device)
    return Judge({}, options.max_new_tokens, reward_model, pad_id=tokenizer.pad_token_id)


def run(options: argparse.Namespace, log: Callable[[str], object] = print) -> PairReport:
    """Write the pairs to options.out; without a pair it stays as it is. Raises NoPairs when there is none."""
    out: Path = options.out
    check_out(out, options.overwrite, [file.path for file in expand_paths(options.prompts)])
    sampling = SamplingSettings(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed=options.seed, n=options.samples
    )
    model, tokenizer = load(options.model, options.device)
    judge = make_judge(options, tokenizer, model)
    room = model.config.max_position_embeddings - options.max_new_tokens
    if room < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} leaves no room for a question in the context of {options.model}")
    answered, verifiable = (any(name in needed for name in judge.weights) for needed in (NEED_REFERENCE, NEED_RESULT))
    thinking = False if options.no_thinking else None
    prompts, _ = read_prompts(options.prompts, tokenizer, room, answered=answered, verifiable=verifiable, thinking=thinking, log=log)
    prompts = prompts[: options.limit or None]
    if options.no_thinking:
        prompts = [replace(prompt, answer=_without_thinking(prompt.answer)) for prompt in prompts]
    how = "the data's own against one with another result" if options.by == "reference" else f"ranked by {judge.describe()}"
    log(f"{len(prompts):,} questions, {options.samples} answer{'s' * (options.samples > 1)} each, {how}")
    report, shown = PairReport(), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            engine = Engine(model, tokenizer)
            pairs = make_pairs(
                engine,
                prompts,
                judge,
                sampling,
                at_once=options.batch,
                gap=options.gap,
                reference=options.by == "reference",
                minutes=options.minutes,
                report=report,
            )
            for row in pairs:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if shown < SHOWN:
                    shown += 1
                    log(shown_pair(row))
        if report.pairs:
            os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    for line in report.lines():
        log(line)
    if not report.pairs:
        raise NoPairs("no pair was made: take more --samples, a higher --temperature, or another way of ranking")
    log(f"wrote {out.as_posix()}")
    return report


def shown_pair(row: dict[str, Any]) -> str:
    """A row on a few short lines."""
    asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    said = {name: row[name] if isinstance(row[name], str) else row[name][0]["content"] for name in ("chosen", "rejected")}
    answers = [f"    {name:<8} {row[f'{name}_score']:>7.3f}  {textwrap.shorten(text, 100)}" for name, text in said.items()]
    return "\n".join([f"  {textwrap.shorten(asked, 110)}", *answers])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_preferences", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="the checkpoint that answers")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .jsonl file to write")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="file, folder or glob with questions")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="answers per question (default: 4)")
    parser.add_argument("--by", choices=("reward", "rule", "reference"), required=True, help="what makes an answer better")
    parser.add_argument("--reward-model", metavar="DIR", help="with --by reward (default: weight/reward)")
    parser.add_argument(
        "--rule", action="append", default=[], metavar="NAME[=WEIGHT]", help=f"with --by rule, also several: {', '.join(RULES)}"
    )
    parser.add_argument("--gap", type=float, default=0.0, help="scores that differ by no more than this are a tie (default: 0)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M", help="stop asking after so long (default: ask them all)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="ask the first N questions only (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.9, help="of sampling (default: 0.9)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of sampling (default: 0.95)")
    parser.add_argument("--top-k", type=int, default=50, help="of sampling (default: 50)")
    parser.add_argument("--no-thinking", action="store_true", help="close the thinking before it starts")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="answers generated together (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    options = parser.parse_args(argv)
    if options.samples < (1 if options.by == "reference" else 2):
        parser.error("--samples needs at least 2: a pair is made of two answers; with --by reference, 1 and the data's own")
    if options.batch < 1 or options.max_new_tokens < 1 or min(options.limit, options.gap, options.minutes) < 0:
        parser.error("--batch and --max-new-tokens need a number from 1, --limit, --gap and --minutes from 0")
    if options.temperature <= 0:
        parser.error("--temperature needs a number above 0: greedy answers are all the same")
    run(options)
    return 0


if __name__ == "__main__":
    from train.program import run_main

    run_main(main)
