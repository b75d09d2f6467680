"""Does alignment help? Every stage from one chat model, with several seeds, measured before and after on the same held-out questions.

    python -m tools.alignment_study weight/sft --conversations FILE [--unseen FILE] [--text FILE ...] [--seeds 3] [--only STAGE ...]

FILE holds the conversations that the chat model learned from. Stages:

    reasoning   fine-tuning on tasks with written steps (tools.make_reasoning), among the conversations
    grpo        rewards for right results, from the reasoning model of the first seed, as all below but the last
    reward      a reward model from pairs of the reasoning model's own answers, a right one against a wrong one
    dpo         on the same pairs
    ppo         rewards for right results; the reward model is a judge that it has not seen
    distil      a smaller student from few conversations: with the chat model as its teacher, and without; measured on --unseen, else
                on conversations that the teacher has learned from

What is finished is kept: the same command goes on after a stop. OUT/report.md has a table for each stage. Hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.files import atomic_write_text
from tools import alignment_report
from train.program import run_main
from train.runtime import format_minutes

STAGES = ("reasoning", "grpo", "reward", "dpo", "ppo", "distil")
REWARD_FACTS = ("held-out accuracy", "calibration", "accuracy where the preferred answer is longer", "accuracy where it is shorter")
FEW, HELD_OUT = 2000, 600
"""Conversations that the students of the distillation learn from, and are measured on."""


@dataclass
class Study:
    """Where things lie, and the commands that make them."""

    model: str
    conversations: str
    text: list[str]
    out: Path
    seeds: int
    threads: int
    unseen: str | None = None
    """Conversations that the chat model did not learn from; None: the students are measured on some that it did."""
    log: Callable[[str], object] = print

    @property
    def tasks(self) -> Path:
        return self.out / "tasks"

    @property
    def pairs(self) -> Path:
        return self.out / "pairs.jsonl"

    @property
    def few(self) -> Path:
        return self.out / "few.jsonl"

    @property
    def held_out(self) -> Path:
        return self.out / "held_out.jsonl"

    def folder(self, stage: str, seed: int) -> Path:
        return self.out / stage / f"seed_{seed}"

    def folders(self, stage: str) -> list[str]:
        return [str(self.folder(stage, seed)) for seed in range(self.seeds)]

    @property
    def questions(self) -> Path:
        """Tasks for the model to answer, none of which is among `tasks`, for training or held out."""
        return self.out / "questions"

    # ------------------------------------------------------------------ data

    def prepare(self) -> None:
        """Tasks and the few conversations, unless they are there. Raises ValueError for too few conversations."""
        if not (self.tasks / "train.jsonl").is_file():
            self._call("tools.make_reasoning", str(self.tasks), "--rows", "20000", "--style", "both")
        if not self.questions.is_dir():
            made = self.out / "questions.made"
            self._call("tools.make_reasoning", str(made), "--rows", "20000", "--style", "think", "--seed", "1")
            _leave_out(made, self.tasks)
            made.rename(self.questions)
        if not self.held_out.is_file():
            lines = _lines(Path(self.conversations), FEW if self.unseen else FEW + HELD_OUT)
            held_out = _lines(Path(self.unseen), HELD_OUT) if self.unseen else lines[FEW:]
            atomic_write_text(self.few, "".join(lines[:FEW]))
            atomic_write_text(self.held_out, "".join(held_out))

    def make_pairs(self) -> None:
        """Right against wrong answers of the reasoning model, unless they are there."""
        if not self.pairs.is_file():
            sampling = ["--samples", "4", "--temperature", "1", "--top-p", "1", "--top-k", "0", "--max-new-tokens", "72"]
            sampling += ["--limit", "16000"]
            asked = ["--prompts", f"{self.questions}/train.jsonl", "--by", "rule", "--rule", "exact"]
            self._call("tools.make_preferences", str(self.folder("reasoning", 0)), str(self.pairs), *asked, *sampling)

    # ------------------------------------------------------------------ stages

    def words(self, stage: str, seed: int) -> tuple[str, list[str]]:
        """Module and settings of a stage; those that are not named are the stage's own."""
        mixture = f"data.sft_file=[{self.tasks}/train.jsonl, {{path: {self.conversations}, weight: 0.3}}]"
        valid, start = f"data.val_file={self.tasks}/valid.jsonl", f"model_dir={self.folder('reasoning', 0)}"
        asked = [f"data.prompt_file={self.questions}/train.jsonl", f"data.val_file={self.questions}/valid.jsonl"]
        rollouts = [*asked, "rollout.max_new_tokens=72", "rollout.eval_prompts=200"]
        steps = ["train.max_steps=150", "train.eval_every=50"]
        by_rule = ["rewards.exact=1", "rollout.prompts=256", "train.accumulation_steps=4", "ppo.epochs=1", "ppo.kl_coef=0.02"]
        by_rule += ["train.lr=1.5e-4", "train.schedule=linear", "train.max_steps=100", "train.eval_every=50"]
        pairs = [f"data.preference_file={self.pairs}", "data.val_share=0.1", "train.eval_every=50"]
        few = [f"data.sft_file={self.few}", f"data.val_file={self.held_out}", "train.epochs=8", "train.eval_every=50"]
        student = ["--preset", "nano", "model.n_layer=3", f"tokenizer_dir={self.model}", *few]
        return {
            "reasoning": ("train.train_sft", ["--preset", "nano", mixture, valid, f"model_dir={self.model}", "train.max_steps=500"]),
            "grpo": ("train.train_grpo", [*rollouts, start, *steps]),
            "reward": ("train.train_reward", [*pairs, start, "train.epochs=3"]),
            "dpo": ("train.train_dpo", [*pairs, start, "train.epochs=1", "train.lr=1e-4"]),
            "ppo": ("train.train_ppo", [*rollouts, start, *by_rule]),
            "distil": ("train.train_distill", [*student, f"teacher_dir={self.model}"]),
            "distil_alone": ("train.train_distill", [*student, "teacher_dir=none"]),
        }[stage]

    def train(self, stage: str, seed: int) -> None:
        """One stage with one seed, unless it is finished; one that was stopped goes on."""
        folder = self.folder(stage, seed)
        if (folder / "report.md").is_file():
            return
        module, words = self.words(stage, seed)
        common = [f"out_dir={folder}", f"train.seed={seed}", f"train.threads={self.threads}", f"data.store_dir={self.out / 'store'}"]
        self._call(module, *words, *common, *(["--resume"] if folder.is_dir() else []), into=folder.parent / f"seed_{seed}.log")

    def _call(self, module: str, *words: str, into: Path | None = None) -> None:
        """Run a module as a user would. Raises ValueError when it fails."""
        shown = subprocess.list2cmdline(["python", "-m", module, *words])
        self.log(f"$ {shown}")
        start = time.perf_counter()
        command = [sys.executable, "-m", module, *words]
        if into is None:
            status = subprocess.run(command, check=False).returncode
        else:
            into.parent.mkdir(parents=True, exist_ok=True)
            with open(into, "a", encoding="utf-8") as file:
                status = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            raise ValueError(f"this command ended with status {status}: {shown}" + (f"; its output is in {into}" if into else ""))
        self.log(f"  {format_minutes(time.perf_counter() - start)}")

    # ------------------------------------------------------------------ what came of it

    def report(self, stage: str) -> str:
        """The table of a stage."""
        file = self.out / "reports" / stage / "report.md"
        if stage == "reward":
            return self._reward_table()
        if not file.is_file():
            tasks, start = ["--tasks", str(self.tasks), "--limit", "600"], [str(self.folder("reasoning", 0))]
            judge = self.folder("reward", 0)
            judged = [*tasks, "--probes", "20", *(["--reward-model", str(judge)] if (judge / "report.md").is_file() else [])]
            before, more = {
                "reasoning": ([self.model], [*tasks, "--probes", "20"]),
                "grpo": (start, judged),
                "dpo": (start, judged),
                "ppo": (start, judged),
                "distil": (self.folders("distil_alone"), ["--probes", "20"]),
            }[stage]
            words = ["--before", *before, "--after", *self.folders(stage), *more, "--out", str(file.parent)]
            alignment_report.main([*words, *(["--text", *self.text] if self.text else [])])
        return file.read_text(encoding="utf-8").partition("\n\n")[2]

    def _reward_table(self) -> str:
        """What each reward model says of its held-out pairs in its own report."""
        lines = ["| held-out pairs | " + " | ".join(f"seed {seed}" for seed in range(self.seeds)) + " |", "|---" * (self.seeds + 1) + "|"]
        reports = [(self.folder("reward", seed) / "report.md").read_text(encoding="utf-8") for seed in range(self.seeds)]
        for name in REWARD_FACTS:
            found = [next((line for line in text.splitlines() if line.startswith(f"- {name}: ")), "- : ") for text in reports]
            lines.append(f"| {name} | " + " | ".join(line.partition(": ")[2] for line in found) + " |")
        return "\n".join(lines) + "\n"


def run(study: Study, only: Sequence[str] = STAGES) -> None:
    """Everything that is not finished, then the report."""
    study.prepare()
    for stage in (stage for stage in STAGES if stage in only):
        if stage in ("reward", "dpo"):
            study.make_pairs()
        for seed in range(study.seeds):
            for part in ("distil", "distil_alone") if stage == "distil" else (stage,):
                study.train(part, seed)
    tables = [f"## {stage}\n\n{study.report(stage)}" for stage in STAGES if stage in only]
    text = f"# Does alignment help?\n\nFrom {study.model}, {study.seeds} seeds.\n\n" + "\n".join(tables)
    atomic_write_text(study.out / "report.md", text)
    study.log(f"\n{text}\n{study.out / 'report.md'}")


def _lines(path: Path, count: int) -> list[str]:
    """The first lines of a file. Raises ValueError when it has fewer."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = [line for _, line in zip(range(count), file, strict=False)]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines):,} conversations, {count:,} are needed")
    return lines


def _leave_out(folder: Path, others: Path) -> None:
    """Take the questions that also stand in `others` out of the files of `folder`."""
    seen = {_question(line) for file in others.glob("*.jsonl") for line in _read(file)}
    for file in folder.glob("*.jsonl"):
        atomic_write_text(file, "".join(line for line in _read(file) if _question(line) not in seen))


def _read(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines(keepends=True)


def _question(line: str) -> str:
    return str(json.loads(line)["messages"][0]["content"])


def main(argv: list[str] | None = None) -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.alignment_study", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="DIR", help="the chat model that every stage begins with")
    parser.add_argument("--conversations", required=True, metavar="FILE", help="conversations whose questions are asked again (.jsonl)")
    parser.add_argument("--unseen", metavar="FILE", help="conversations that it did not learn from, to measure the students of distil on")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="held-out texts for bits per byte")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each stage (default 3)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="these stages alone")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("weight/alignment_study"), metavar="FOLDER", help="default %(default)s")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error("--seeds needs a number from 1")
    run(
        Study(options.model, options.conversations, options.text, options.out, options.seeds, options.threads, options.unseen), options.only
    )


if __name__ == "__main__":
    run_main(main)
