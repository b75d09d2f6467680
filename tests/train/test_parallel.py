"""Training in several processes (`train.parallel`, `train.sharding`): what they compute together is what one computes.

`python -m pytest -m drill tests/train/test_parallel.py -s` prints the table of all stages and of kills.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import ROOT, chat_rows, pair_rows, run_python, stage_environment, text_rows, write_jsonl, write_store

from inference import Engine, SamplingSettings
from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train import parallel
from train.config import DataConfig
from train.data import Batch, PackedConversations, PackedText
from train.pairs import PackedPairs
from train.store import open_store

TOLERANCE = 1e-4
gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo"
)
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "intermediate_size": 128, "max_position_embeddings": 128}
EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 64, "router_bias_rate": 0.001}
COMMON = [
    "train.precision=fp32",
    "train.threads=1",
    "train.log_every=1",
    "train.eval_every=5",
    "train.eval_tokens=400",
    "train.sample_every=0",
    "train.checkpoint_minutes=0",
    "train.warmup_steps=2",
    "train.keep_checkpoints=20",
    "train.compile=off",
    "data.max_length=64",
]
MEASURED = ("seconds", "tokens_per_second", "peak_memory_mb", "memory_mb")


# ---------------------------------------------------------------------------------------------- shares of a batch


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_shares_of_a_batch_are_the_batch(count: int, tmp_path: Path) -> None:
    """Guards: a row that no process computes, or that two do; a global weight that is counted from a part."""
    random = np.random.default_rng()
    store = write_store(tmp_path / "store", [random.integers(1, 90, random.integers(5, 60)).tolist() for _ in range(50)])
    source = PackedText(store, int(random.integers(1, 12)), 32, 0)
    batches = [source.next_batch() for _ in range(3)]
    for batch in batches:
        parts = [parallel.share(batch, place, count) for place in range(count)]
        rows = torch.cat([part.inputs["input_ids"] for part in parts if part is not None])
        assert torch.equal(rows, batch.inputs["input_ids"])
        assert all(part.weights == batch.weights for part in parts if part is not None)
        sizes = [0 if part is None else len(part.inputs["input_ids"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_values_of_rows_go_where_their_rows_go() -> None:
    """Guards: advantages of one answer that are learned from with the tokens of another, after rows were divided."""
    rows = 7
    counts = torch.randint(0, 5, (rows,)).tolist()
    owner = torch.arange(rows).repeat_interleave(torch.tensor(counts))
    ids = torch.arange(rows)[:, None].expand(rows, 4)
    batch = Batch({"input_ids": ids}, {"tokens": 9.0}, rows * 4, rows * 4, {"old": owner, "first": torch.tensor(True)}, cuts=[2, 3, 6])
    batch.entries = {"old": counts}
    parts = [part for place in range(3) if (part := parallel.share(batch, place, 3)) is not None]
    for part in parts:
        assert set(part.extra["old"].tolist()) <= set(part.inputs["input_ids"][:, 0].tolist())
        assert bool(part.extra["first"])
    assert torch.equal(torch.cat([part.extra["old"] for part in parts]), owner)


def test_rows_that_belong_together_stay_together(tmp_path: Path) -> None:
    """Guards: a batch of one group, or whose pair lies in two rows, that is cut in the middle."""
    store = write_store(tmp_path / "store", [[1, 2, 3, 4]] * 30, [[0, 1, 1, 1]] * 30)
    batch = PackedConversations(store, 6, 4, 0).next_batch()
    whole = replace(batch, group=0)
    assert parallel.share(whole, 0, 4) is whole
    assert [parallel.share(whole, place, 4) for place in (1, 2, 3)] == [None] * 3
    assert replace(batch, group=0, cuts=[4]).boundaries() == [0, 4, 6]


def test_pairs_and_their_values_stay_together(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a pair in two rows that go to two processes; the margin of another pair."""
    file = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "margin": n + 1} for n, row in enumerate(pair_rows(60))])
    store = open_store(str(file), tiny_tokenizer, "preference", DataConfig(store_dir=str(tmp_path / "store")), lambda text: None, 0.0)
    lengths = store.train.lengths
    for length in (int(lengths.max()), int(lengths.max()) * 2 + 5):  # pairs in two rows, several pairs in one
        source = PackedPairs(store, 7, length, 0)
        for batch in (source.next_batch() for _ in range(4)):
            parts = [part for place in range(3) if (part := parallel.share(batch, place, 3)) is not None]
            for part in parts:
                segments = part.inputs["segment_ids"]
                sequences = sum(len(row[row > 0].unique()) for row in segments)
                documents = part.extra["documents"]
                assert len(documents) == sequences and torch.equal(documents[::2] + 1, documents[1::2])
                assert store.train.values is not None
                assert part.extra["margins"].tolist() == [float(store.train.values[n]) for n in documents[::2].tolist()]
            assert torch.equal(torch.cat([part.extra["documents"] for part in parts]), batch.extra["documents"])


def test_prompts_are_dealt_to_processes_without_changing_an_answer(tiny_tokenizer: BPETokenizer, model: SmartHaoAI) -> None:
    """Guards: answers of a rollout that depend on how many processes write them, or that nobody writes."""
    prompts = [torch.randint(5, 300, (int(n),)).tolist() for n in torch.randint(2, 9, (11,))]
    settings = SamplingSettings(max_new_tokens=6, n=2, seed=int(torch.randint(1000, ())))
    engine = Engine(model, tiny_tokenizer)
    whole = dict(pair for batch in engine.generate_many(prompts, settings, 2) for pair in batch)
    for count in (2, 3, 7):
        dealt = [pair for place in range(count) for batch in engine.generate_many(prompts, settings, 2, (place, count)) for pair in batch]
        assert len(dealt) == len(prompts) and dict(dealt) == whole


# ---------------------------------------------------------------------------------------------- whole runs


class Workshop:
    """Data, tokenizer and small models for all stages in one folder."""

    def __init__(self, folder: Path, tokenizer: BPETokenizer) -> None:
        self.folder = folder
        write_jsonl(folder / "text.jsonl", text_rows(600))
        write_jsonl(folder / "chat.jsonl", chat_rows(200))
        write_jsonl(folder / "pairs.jsonl", pair_rows(120))
        tokenizer.save_pretrained(folder / "tokenizer")
        torch.manual_seed(1)
        config = HaoAIConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id, **SHAPE)
        SmartHaoAI(config).save_pretrained(folder / "base", tokenizer)
        reward = RewardModel(config)
        torch.nn.init.normal_(reward.score_head.weight)
        reward.save_pretrained(folder / "judge", tokenizer)

    def command(self, processes: int, module: str, *words: str, restarts: int = 0) -> list[str]:
        """What Python is to run, as a user would."""
        start = (
            ["-m", module]
            if processes == 1
            else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", module]
        )
        if restarts:
            start.insert(2, f"--max-restarts={restarts}")
        data = [
            f"data.store_dir={self.folder / 'store'}",
            f"data.pretrain_file={self.folder / 'text.jsonl'}",
            f"data.sft_file={self.folder / 'chat.jsonl'}",
            f"data.preference_file={self.folder / 'pairs.jsonl'}",
        ]
        return [*start, *COMMON, *data, *words]

    def run(self, processes: int, module: str, *words: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = run_python(*self.command(processes, module, *words))
        assert status is None or done.returncode == status, f"{module} {words}:\n{done.stdout}\n{done.stderr}"
        return done

    def stage(self, name: str, processes: int, how: str, out: Path, *words: str) -> list[dict[str, Any]]:
        """Run a stage and return the rows of its metrics."""
        module, own = STAGES[name]
        own = [word.replace("FOLDER", str(self.folder)) for word in own]
        self.run(processes, f"train.train_{module}", *own, f"train.parallel={how}", f"out_dir={out}", *words)
        return metrics(out)


PRETRAIN = ["tokenizer_dir=FOLDER/tokenizer", "model.preset=none", *(f"model.{name}={value}" for name, value in SHAPE.items())]
FROM_BASE = ["model_dir=FOLDER/base", "train.max_steps=6", "train.batch_size=5", "train.accumulation_steps=2"]
ROLLOUT = [
    "model_dir=FOLDER/base",
    "data.prompt_file=FOLDER/chat.jsonl",
    "train.max_steps=6",
    "train.batch_size=8",
    "rollout.prompts=4",
    "rollout.samples=4",
    "rollout.batch_size=4",
    "rollout.max_new_tokens=12",
    "rollout.eval_prompts=4",
    "data.max_length=96",
]
STAGES: dict[str, tuple[str, list[str]]] = {
    "pretrain": ("pretrain", [*PRETRAIN, "train.max_steps=50", "train.batch_size=7", "train.accumulation_steps=2"]),
    "pretrain, 4 experts": (
        "pretrain",
        # As many rows in each pass for any number of processes: the balance of the experts is a statistic of a pass.
        [*PRETRAIN, *(f"model.{n}={v}" for n, v in EXPERTS.items()), "train.max_steps=12", "train.batch_size=8", "train.micro_batch=2"],
    ),
    "pretrain, all heads": (
        "pretrain",
        [*PRETRAIN, "model.deep_supervision=tokens", "model.residual_scale=true", "train.max_steps=12", "train.batch_size=5"],
    ),
    "pretrain, bf16, adamw": (
        "pretrain",
        [*PRETRAIN, "train.precision=bf16", "train.optimizer=adamw", "train.max_steps=12", "train.lr=1e-3"],
    ),
    "sft": ("sft", FROM_BASE),
    "lora": ("lora", [*FROM_BASE, "lora.r=4"]),
    "dora, sft": ("sft", [*FROM_BASE, "lora.r=4", "lora.dora=true"]),
    "dpo": ("dpo", FROM_BASE),
    "dpo, 2 rows at once": ("dpo", [*FROM_BASE, "train.micro_batch=2"]),
    "dpo, kto": ("dpo", [*FROM_BASE, "dpo.loss=kto"]),
    "dpo, lora": ("dpo", [*FROM_BASE, "lora.r=4"]),
    "reward": ("reward", FROM_BASE),
    "distill": (
        "distill",
        [*PRETRAIN[1:], "teacher_dir=FOLDER/base", "train.max_steps=6", "train.batch_size=5", "distill.structure_weight=2"],
    ),
    "distill, top 8": ("distill", [*PRETRAIN[1:], "teacher_dir=FOLDER/base", "train.max_steps=6", "train.batch_size=5", "distill.top_k=8"]),
    "ppo": ("ppo", [*ROLLOUT, "reward_model_dir=FOLDER/judge"]),
    "ppo, lora": ("ppo", [*ROLLOUT, "reward_model_dir=FOLDER/judge", "lora.r=4"]),
    "grpo": ("grpo", [*ROLLOUT, "reward_model_dir=FOLDER/judge", "grpo.beta=0.05"]),
    "grpo, 1 row at once": ("grpo", [*ROLLOUT, "reward_model_dir=FOLDER/judge", "grpo.beta=0.05", "train.micro_batch=1"]),
}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compare(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest relative difference of a loss, and of any other logged value; the data must be the same to the token."""
    assert [(row["step"], row["tokens"], row["real_token_share"]) for row in one] == [
        (row["step"], row["tokens"], row["real_token_share"]) for row in many
    ]
    worst = {True: 0.0, False: 0.0}
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float) and name not in MEASURED:
                difference = abs(value - b[name]) / max(abs(value), 1e-2)
                of_loss = name.endswith("loss")
                worst[of_loss] = max(worst[of_loss], difference)
    return worst[True], worst[False]


@pytest.fixture(scope="module")
def workshop(tiny_tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), tiny_tokenizer)


@gloo
@pytest.mark.slow
def test_two_processes_and_then_one_learn_what_one_does(workshop: Workshop, tmp_path: Path) -> None:
    """Guards: gradients that are averaged twice or not at all, a share of the data that is left out, a sharded checkpoint that another
    number of processes cannot read, and output of a process that should be silent."""
    short = ["train.max_steps=8", "train.checkpoint_every=4"]
    one = workshop.stage("pretrain", 1, "auto", tmp_path / "one", *short)
    for how in ("ddp", "fsdp"):
        losses, others = compare(one, workshop.stage("pretrain", 2, how, tmp_path / how, *short))
        assert losses < TOLERANCE and others < 10 * TOLERANCE, how
    forget_after(tmp_path / "fsdp", 4)
    losses, others = compare(one, workshop.stage("pretrain", 1, "fsdp", tmp_path / "fsdp", *short, "--resume"))
    assert losses < TOLERANCE and others < 10 * TOLERANCE, "resumed by one process"
    assert SmartHaoAI.from_pretrained(tmp_path / "fsdp").num_parameters() == SmartHaoAI.from_pretrained(tmp_path / "one").num_parameters()


@gloo
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a run in /proc")
@pytest.mark.slow
def test_a_mistake_is_said_once_and_a_killed_process_ends_the_run(workshop: Workshop, tmp_path: Path) -> None:
    """Guards: an error that every process repeats, a run that waits for a process that is gone."""
    done = workshop.run(
        2, "train.train_sft", f"model_dir={workshop.folder / 'base'}", "data.max_length=5000", f"out_dir={tmp_path / 'a'}", status=None
    )
    assert done.returncode != 0
    assert len(re.findall(r"^error.*data.max_length=5000", done.stderr, re.MULTILINE)) == 1
    killed, seconds = kill_one(workshop, tmp_path / "b", "ddp")
    assert "another process of this run has ended" in killed and seconds < 60


def forget_after(out: Path, step: int) -> None:
    """As if the run had been killed before its next checkpoint: those after `step` are gone, and so is the result."""
    for folder in (out / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert (out / "checkpoints" / f"step_{step:06d}").is_dir()


def kill_one(workshop: Workshop, out: Path, how: str, steps: int = 100_000, restarts: int = 0) -> tuple[str, float]:
    """SIGKILL for the second of two processes in the middle of a run: what was said, and how long the run took to end, which with
    `restarts` it does at its last step."""
    module, own = STAGES["pretrain"]
    own = [word.replace("FOLDER", str(workshop.folder)) for word in own]
    words = [*own, f"train.parallel={how}", f"out_dir={out}", f"train.max_steps={steps}", "train.checkpoint_every=5", "--resume"]
    with subprocess.Popen(
        [sys.executable, *workshop.command(2, f"train.train_{module}", *words, restarts=restarts)],
        cwd=ROOT,
        env=stage_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as run:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step_*[05]")) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = sorted(pid for pid in children(run.pid) if pid != run.pid)
        assert len(workers) == 2, "the run did not begin"
        began = time.monotonic()
        os.kill(workers[1], signal.SIGKILL)
        said = run.communicate(timeout=120)[0]
        assert (run.returncode == 0) == (restarts > 0), said
        return said, time.monotonic() - began


def children(parent: int) -> list[int]:
    """Processes that `parent` started, those of Linux."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return found


# ---------------------------------------------------------------------------------------------- the tables


@gloo
@pytest.mark.drill
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_in_1_2_and_4_processes(name: str, workshop: Workshop, tmp_path: Path) -> None:
    """Guards: a stage whose loss, metrics or data depend on the number of processes."""
    one = workshop.stage(name, 1, "auto", tmp_path / "one")
    print(f"\n{name}: {len(one)} rows, last loss {one[-1]['loss']:.4f}")
    failed = []
    for processes, how in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")):
        losses, others = compare(one, workshop.stage(name, processes, how, tmp_path / f"{processes}{how}"))
        print(f"  {processes} processes, {how}: largest relative difference of a loss {losses:.1e}, of another value {others:.1e}")
        if losses > TOLERANCE:
            failed.append((processes, how, losses))
    assert not failed


@gloo
@pytest.mark.drill
@pytest.mark.parametrize("name", ["pretrain", "pretrain, 4 experts", "lora", "dpo", "reward", "ppo", "grpo"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_resumed_by_other_numbers_of_processes(name: str, how: str, workshop: Workshop, tmp_path: Path) -> None:
    """Guards: a checkpoint that holds what belongs to the number of processes that wrote it."""
    words = ["train.max_steps=12", "train.checkpoint_every=4"]
    one = workshop.stage(name, 1, "auto", tmp_path / "one", *words)
    out = tmp_path / "many"
    workshop.stage(name, 2, how, out, *words)
    for step, processes in ((4, 1), (8, 4)):
        forget_after(out, step)
        rows = workshop.stage(name, processes, how, out, *words, "--resume")
    losses, others = compare(one, rows)
    print(f"\n{name}, {how}, 2 -> 1 -> 4 processes: largest relative difference of a loss {losses:.1e}, of another value {others:.1e}")
    assert losses < TOLERANCE


@gloo
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a run in /proc")
@pytest.mark.drill
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_killed_and_resumed(how: str, workshop: Workshop, tmp_path: Path) -> None:
    """Guards: a run that hangs when a process is killed, or that cannot be resumed."""
    said, seconds = kill_one(workshop, tmp_path / "run", how)
    steps = [int(folder.name.removeprefix("step_")) for folder in (tmp_path / "run" / "checkpoints").glob("step_*") if not folder.suffix]
    stop = max(steps) + 4
    words = [f"train.max_steps={stop}", "train.schedule=constant"]
    rows = workshop.stage("pretrain", 2, how, tmp_path / "run", *words, "--resume")
    print(f"\n{how}: ended {seconds:.1f} s after the kill at step {max(steps)} or later, then resumed to step {rows[-1]['step']}")
    print("\n".join("  " + line for line in said.splitlines() if line.startswith("error")))
    assert rows[-1]["step"] == stop


@gloo
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a run in /proc")
@pytest.mark.drill
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_killed_and_started_again_by_torchrun(how: str, workshop: Workshop, tmp_path: Path) -> None:
    """Guards: processes that torchrun starts in place of killed ones, and that look for each other where the old ones were."""
    one = workshop.stage("pretrain", 1, "auto", tmp_path / "one", "train.max_steps=60")
    kill_one(workshop, tmp_path / "run", how, steps=60, restarts=1)
    losses, others = compare(one, metrics(tmp_path / "run"))
    print(f"\n{how}: killed and started again by torchrun: difference of a loss {losses:.1e}, of another value {others:.1e}")
    assert losses < TOLERANCE
