"""What the stages of a `train_smart.py` run are worth: bits per byte, reasoning tasks, held-out prompts and sample answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.curriculum import score
from tools.evaluate import answer_probes, file_bits_per_byte, load, probe_table
from tools.reasoning_tasks.measure import Row, as_answers, generate_answers, share
from train.rewards import exact
from train.runtime import device_name

VALIDATION_KB = 100
TASK_TOKENS = 112  # more than the longest working needs
SAMPLE_QUESTIONS = (
    "你好！",
    "你叫什么名字？",
    "天空是什么颜色？",
    "12 + 7 = ?",
    "给我讲一个小兔子的故事。",
    "Hello!",
    "Who are you?",
    "What does a cow eat?",
    "How much is 25 + 13?",
    "Tell me a story about a little cat.",
)

Cell = dict[str, float]


def write_report(out: Path, last: str, data: Path, tasks: Path, title: str, per_kind: int, device: str) -> str:
    """Measure the stages pretrain, sft and `last` of the run in `out`; the report as text, also in report.md and report.json.

    data: the corpus, with its valid/. tasks: a file of reasoning tasks. per_kind: held-out prompts per kind and language.
    """
    bits: list[tuple[str, str, Any]] = []
    probes: dict[str, dict[str, Any]] = {}
    thinking: dict[str, dict[str, Cell]] = {}
    rows = [json.loads(line) for line in tasks.read_text(encoding="utf-8").splitlines()]
    for stage in ("pretrain", "sft", last):
        model, tokenizer = load(str(out / stage), device)
        for file in sorted((data / "valid").glob("*.jsonl")):
            measured = file_bits_per_byte(model, tokenizer, file, context=256, limit_bytes=VALIDATION_KB * 1000)
            bits.append((stage, file.stem, measured.bpb))
        if stage != "pretrain":  # it has never seen a conversation
            probes[stage] = score(answer_probes(model, tokenizer, per_kind))
            thinking[stage] = {name: share(right_answers(model, tokenizer, rows, name == "on")) for name in ("on", "off")}
    lines = ["held-out text, bits per byte"]
    for name in dict.fromkeys(file for _, file, _ in bits):
        lines.append(f"  {name:<16}" + "  ".join(f"{stage} {bpb:.3f}" for stage, file, bpb in bits if file == name))
    lines += ["", f"held-out reasoning tasks, right results{'after sft':>17}{'after ' + last:>22}"]
    for name in ("on", "off"):
        lines.append(f"  thinking {name:<22}" + "".join(_counted(cells[name]).rjust(22) for cells in thinking.values()))
    for stage, result in probes.items():
        lines += ["", f"after {stage}: {_passed(result)}", probe_table(result)]
    lines += ["", *_honest_words(probes[last], thinking[last]), "", "sample answers"]
    lines += [f"  > {question}\n    {answer}" for question, answer in sample_answers(out / last, device)]
    text = "\n".join(lines)
    atomic_write_text(out / "report.md", f"# train_smart: {title}\n\n```text\n{text}\n```\n")
    facts = {"last": last, "bits_per_byte": bits, "tasks": thinking, "probes": probes}
    atomic_write_text(out / "report.json", json.dumps(facts, ensure_ascii=False) + "\n")
    return text


def right_answers(model: SmartHaoAI, tokenizer: BPETokenizer, rows: Sequence[Row], thinking: bool) -> list[bool]:
    """Whether the greedy answer to each task has the right result, with the thinking opened or closed in the prompt."""
    replies = generate_answers(model, tokenizer, rows, TASK_TOKENS, thinking)
    return [exact(answer) == 1 for answer in as_answers(replies, rows)]


def _counted(cell: Cell) -> str:
    return f"{cell['passed']:g}/{cell['total']:g} ({cell['low']:.0%}-{cell['high']:.0%})"


def _passed(result: dict[str, Any]) -> str:
    return f"{result['overall']['passed']} of {result['overall']['total']} held-out prompts passed"


def _honest_words(result: dict[str, Any], tasks: dict[str, Cell]) -> list[str]:
    """What the numbers say in plain words."""
    rates = {name: cell["rate"] for name, cell in result["cells"].items()}
    rates["reasoning tasks"] = tasks["on"]["rate"]
    good = [name for name, rate in rates.items() if rate >= 0.8]
    weak = [name for name, rate in rates.items() if rate < 0.5]
    between = [name for name in rates if name not in good + weak]
    words = ["It can: " + (", ".join(good) or "nothing of this reliably") + " (4 of 5 held-out prompts or more)."]
    if between:
        words.append("It can sometimes: " + ", ".join(between) + ".")
    if weak:
        words.append("It cannot yet: " + ", ".join(weak) + " (under half).")
    words.append("It knows only what it was taught; outside that small world it makes things up. A longer --minutes helps.")
    return words


def sample_answers(folder: Path, device: str) -> list[tuple[str, str]]:
    """(question, answer) of a fresh conversation each."""
    from inference import ChatSession

    chat = ChatSession.from_pretrained(str(folder), device=device_name(device), temperature=0.0)
    answers = []
    for question in SAMPLE_QUESTIONS:
        chat.reset()
        answer = chat.chat(question)
        reasoning = f"({chat.last.reasoning.strip()}) " if chat.last is not None and chat.last.reasoning else ""
        answers.append((question, reasoning + answer))
    return answers
