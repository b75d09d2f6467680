"""What the fault drill runs: every stage on a model of 0.1M parameters, its data, how it is run, and what two results must share."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train.checkpoints import list_checkpoints
from train.metrics import METRICS_FILE, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STEPS, LONGEST = 12, 1200.0  # seconds after which a run counts as hanging, even on a machine that is stopped for minutes
Fault = tuple[str, str, int, str]
"""folder, mode, number and log, as in faulty_disk.c"""
COMMON = [
    "train.precision=fp32",
    "train.threads=1",
    "train.batch_size=2",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=3",
    "train.checkpoint_minutes=0",
    "train.keep_checkpoints=2",
    "train.log_every=1",
    "train.eval_every=6",
    "train.eval_tokens=200",
    "train.sample_every=0",
    "train.lr=3e-3",
    "train.warmup_steps=2",
    "data.max_length=96",
    "data.val_share=0.1",
    "data.store_dir={out}/../store",
    "out_dir={out}",
]
ROLLOUT = [
    "model_dir={files}/sft",
    "data.prompt_file={files}/chats.jsonl",
    "data.val_share=0.2",
    "rollout.prompts=2",
    "rollout.samples=4",
    "rollout.max_new_tokens=8",
    "rollout.eval_prompts=2",
    "train.batch_size=3",
    "train.accumulation_steps=2",
    "rewards.overlap=1",
    "rewards.variety=1",
]
SHAPE = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "intermediate_size": 128, "max_position_embeddings": 128}
STAGES: dict[str, tuple[str, list[str]]] = {
    "tokenizer": ("train.train_tokenizer", ["data.pretrain_file={files}/text.jsonl", "tokenizer.vocab_size=400", "out_dir={out}"]),
    "pretrain": (
        "train.train_pretrain",
        [
            *COMMON,
            "data.pretrain_file={files}/text.jsonl",
            "tokenizer_dir={files}/sft",
            "model.preset=none",
            "model.dropout=0.1",
            *(f"model.{name}={value}" for name, value in SHAPE.items()),
        ],
    ),
    "sft": ("train.train_sft", [*COMMON, "model_dir={files}/sft", "data.sft_file={files}/chats.jsonl", "model.dropout=0.1"]),
    "reasoning": (
        "train.train_sft",
        [*COMMON, "model_dir={files}/sft", "data.sft_file=[{files}/thoughts.jsonl, {files}/chats.jsonl]", "train.optimizer=muon"],
    ),
    "lora": ("train.train_lora", [*COMMON, "model_dir={files}/sft", "data.sft_file={files}/chats.jsonl", "lora.r=4", "lora.dropout=0.1"]),
    "reward": ("train.train_reward", [*COMMON, "model_dir={files}/sft", "data.preference_file={files}/pairs.jsonl"]),
    "ppo": ("train.train_ppo", [*COMMON, *ROLLOUT, "reward_model_dir={files}/reward", "ppo.epochs=2"]),
    "dpo": ("train.train_dpo", [*COMMON, "model_dir={files}/sft", "data.preference_file={files}/pairs.jsonl"]),
    "grpo": ("train.train_grpo", [*COMMON, *ROLLOUT, "grpo.epochs=2", "grpo.beta=0.05"]),
    "distillation": (
        "train.train_distill",
        [*COMMON, "model_dir={files}/sft", "teacher_dir={files}/teacher", "data.sft_file={files}/chats.jsonl", "distill.top_k=8"],
    ),
}


def write_files(folder: Path, tokenizer: BPETokenizer) -> None:
    """Data, a chat model, a teacher and a reward model of random weights."""
    shape = HaoAIConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
    torch.manual_seed(1)
    for name in ("sft", "teacher"):
        SmartHaoAI(shape).save_pretrained(folder / name, tokenizer)
    judge = RewardModel(shape)
    torch.nn.init.normal_(judge.score_head.weight, std=0.3)
    judge.save_pretrained(folder / "reward", tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": f"小猫第{i}次在窗边睡觉。The fox jumps over {i} dogs and {i * 7 % 13} cats."} for i in range(40)],
        "chats": [{"prompt": f"{i} + {i + 1} = ?", "response": f"答案是 {2 * i + 1}。"} for i in range(40)],
        "thoughts": [{"prompt": f"{i} + 2 = ?", "response": f"<think>{i} + 1 = {i + 1}</think>{i + 2}"} for i in range(40)],
        "pairs": [{"prompt": f"{i} + {i} = ?", "chosen": f"答案是 {2 * i}。", "rejected": f"I do not know {i}."} for i in range(40)],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def command(stage: str, files: Path, out: Path, resume: bool = False) -> tuple[str, list[str]]:
    """Module and words of a stage. The tokenizer has nothing to go on from: it is made again by the same command."""
    module, words = STAGES[stage]
    more = ["resume=true"] if resume and stage != "tokenizer" else []
    return module, [*(word.format(files=files, out=out) for word in words), *more]


@dataclass
class Ended:
    """How a run ended: exit code (negative: the signal; None: it hung), all it printed, the points of the disk it passed."""

    code: int | None
    text: str
    points: list[str]


class Runner:
    """Runs stages, in children of a fork server or by interpreters of their own, on a disk that may fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk, self.plots = folder, folder / "faulty_disk.so", False
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-o", str(self.disk), str(HERE / "faulty_disk.c")]
        subprocess.run(compiler, check=True, capture_output=True)
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUTF8": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "LD_PRELOAD": str(self.disk),
        }
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would what it starts
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), str(self.disk)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment,
        )
        assert self.server.stdout is not None and self.server.stdout.readline() == "ready\n"

    def run(
        self,
        module: str,
        words: list[str],
        fault: tuple[Path, str, int] | None = None,
        send: tuple[signal.Signals, float] | None = None,
        fresh: bool = False,
    ) -> Ended:
        """fault: folder, mode and number of the point. send: a signal so many seconds after the start."""
        output, log = self.folder / "output.txt", self.folder / "points.txt"
        log.unlink(missing_ok=True)
        armed = None if fault is None else (str(fault[0]), fault[1], fault[2], str(log))
        code = self._fresh(module, words, armed, send, output) if fresh else self._forked(module, words, armed, send, output)
        points = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return Ended(code, output.read_text(encoding="utf-8", errors="replace"), points)

    def _forked(self, module: str, words: list[str], armed: Fault | None, send: Any, output: Path) -> int | None:
        request = {"module": module, "words": words, "output": str(output), "fault": armed, "plots": self.plots}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        answer: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: answer.put(self.server.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        if send is not None:
            try:
                return int(answer.get(timeout=send[1]))
            except queue.Empty:
                _kill(child, send[0])
        try:
            return int(answer.get(timeout=LONGEST))
        except queue.Empty:
            _kill(child, signal.SIGKILL)
            answer.get(timeout=LONGEST)
            return None

    def _fresh(self, module: str, words: list[str], armed: Fault | None, send: Any, output: Path) -> int | None:
        names = ("FAULT_FOLDER", "FAULT_MODE", "FAULT_AT", "FAULT_LOG")
        environment = {**self.environment, **dict(zip(names, map(str, armed or ()), strict=False))}
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )
            try:
                if send is not None:
                    try:
                        return process.wait(timeout=send[1])
                    except subprocess.TimeoutExpired:
                        process.send_signal(send[0])
                return process.wait(timeout=LONGEST)
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()
                process.wait()

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def timed(self, module: str, words: list[str]) -> float:
        """Seconds of an undisturbed run."""
        start = time.monotonic()
        ended = self.run(module, words)
        assert ended.code == 0, ended.text
        return time.monotonic() - start


def _kill(child: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(child, number)


def differences(one: Path, two: Path) -> list[str]:
    """What of two finished runs is not equal: weights of the models and of their last checkpoints to the last bit, optimisers and random
    state, rows of metrics.jsonl but for times and memory; and what a run should not leave behind."""
    found = []
    folders = [(one, two)]
    if list_checkpoints(one):
        last = list_checkpoints(one)[-1].relative_to(one)
        folders.append((one / last, two / last))
        rows = [_logged(folder / METRICS_FILE) for folder in (one, two)]
        if rows[0] != rows[1] or rows[0][-1]["step"] != STEPS:
            found.append(f"metrics: {len(rows[1])} rows instead of {len(rows[0])}, or others")
        found += [] if (two / "report.md").is_file() else ["no report.md"]
    for expected, there in folders:
        for file in [*expected.glob("*.safetensors"), *expected.glob("tokenizer*.json"), *expected.glob("*.jinja")]:
            if not (there / file.name).is_file():
                found.append(f"{file.name} is missing")
            elif file.suffix != ".safetensors":
                found += [] if file.read_bytes() == (there / file.name).read_bytes() else [f"{file.name} differs"]
            else:
                ours, theirs = load_file(file), load_file(there / file.name)
                found += [] if ours.keys() == theirs.keys() else [f"{file.name}: other tensors"]
                found += [f"{file.name}: {name}" for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    found += [f"left behind: {path.name}" for path in two.rglob("*") if re.search(r"\.tmp", path.name) or path.name.endswith(".replaced")]
    return found


def _logged(file: Path) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in times and "memory" not in name} for row in read_jsonl(file)]
