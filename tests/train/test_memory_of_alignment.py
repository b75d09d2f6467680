"""Too little memory where rows belong together: pairs, and answers that the policy writes itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_helpers import make_source
from training_helpers import FAST, call_main, chat_rows, pair_rows, write_jsonl

from inference import Engine
from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train import record, rollout
from train.data import Batch
from train.metrics import EVENTS_FILE, METRICS_FILE, OF_THE_MACHINE, read_jsonl
from train.rollout import FEWER, RolloutSource

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ROLLOUT = [
    "data.prompt_file=FILES/chats.jsonl",
    "rewards.overlap=1",
    "rewards.variety=1",
    "rollout.prompts=4",
    "rollout.samples=4",
    "rollout.batch_size=16",
    "rollout.max_new_tokens=10",
    "rollout.eval_prompts=3",
    "train.batch_size=8",
    "data.val_share=0.2",
]
PAIRS = ["data.preference_file=FILES/pairs.jsonl", "data.val_share=0.2", "train.batch_size=8"]
STAGES: dict[str, tuple[str, list[str]]] = {
    "dpo": ("train_dpo", PAIRS),
    "simpo": ("train_dpo", [*PAIRS, "dpo.loss=simpo", "train.accumulation_steps=2"]),
    "reward": ("train_reward", PAIRS),
    "ppo": ("train_ppo", [*ROLLOUT, "reward_model_dir=FILES/judge", "ppo.epochs=2"]),
    "grpo": ("train_grpo", [*ROLLOUT, "grpo.epochs=2", "grpo.beta=0.05", "lora.r=4"]),
}
Run = Callable[..., tuple[int, str, Path]]


class Narrow:
    """A machine on which only so many rows at once have room in a pass: in training, or also where a policy or reference is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, self.learning_only, self.refused = 0, True, 0

        def tight(original: Any) -> Any:
            def call(model: Any, input_ids: Any, *arguments: Any, **more: Any) -> Any:
                bound = torch.is_grad_enabled() or not (self.learning_only or "cache" in more)
                if bound and 0 < self.rows < len(input_ids):
                    self.refused += 1
                    raise RuntimeError(CPU_SAYS)
                return original(model, input_ids, *arguments, **more)

            return call

        monkeypatch.setattr(SmartHaoAI, "forward", tight(SmartHaoAI.forward))
        monkeypatch.setattr(RewardModel, "forward", tight(RewardModel.forward))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BPETokenizer) -> Path:
    folder = tmp_path_factory.mktemp("files")
    shape = HaoAIConfig(vocab_size=tiny_tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32, intermediate_size=64)
    torch.manual_seed(1)
    SmartHaoAI(shape).save_pretrained(folder / "base", tiny_tokenizer)
    judge = RewardModel(shape)
    torch.nn.init.normal_(judge.score_head.weight, std=0.3)
    judge.save_pretrained(folder / "judge", tiny_tokenizer)
    write_jsonl(folder / "chats.jsonl", chat_rows(40))
    write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    return folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Narrow]:
    yield Narrow(monkeypatch)


@pytest.fixture
def run(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(stage, folder, words...): status, what it said, and its folder."""
    monkeypatch.setattr(record, "plot_loss", lambda *arguments: True)  # a second each

    def call(name: str, folder: str, *words: str) -> tuple[int, str, Path]:
        module, own = STAGES[name]
        out = tmp_path / folder
        settings = [*FAST, f"model_dir={files / 'base'}", f"out_dir={out}", f"data.store_dir={tmp_path / 'store'}", "data.max_length=64"]
        settings += ["train.max_steps=4", "train.log_every=1", "train.lr=1e-3", "train.warmup_steps=0", "train.eval_every=2"]
        settings += [word.replace("FILES", str(files)) for word in [*own, *words]]
        status, said, trouble = call_main(importlib.import_module(f"train.{module}").main, settings, capsys, monkeypatch)
        return status, said + trouble, out

    return call


def rows(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in read_jsonl(out / METRICS_FILE)]


@pytest.mark.parametrize("name", STAGES)
def test_a_step_is_halved_between_what_belongs_together(run: Run, narrow: Narrow, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a stage that ends for lack of memory where smaller passes would do; pairs that are torn apart, weights that are counted
    for a part, data that are gone through twice; a rollout that is measured in other passes than those that learn from it."""
    status, said, whole = run(name, "whole")
    assert status == 0, said
    narrow.rows = 3
    status, said, halved = run(name, "halved")
    assert status == 0 and narrow.refused > 0, said
    events = [event["event"] for event in read_jsonl(halved / EVENTS_FILE)]
    assert "halved" in events and "half as many from now on, the step stays the same" in said
    for one, other in zip(rows(whole), rows(halved), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == (value if value is None else pytest.approx(value, rel=2e-3, abs=2e-4)), (key, one["step"])
    narrow.refused, narrow.learning_only = 0, name != "grpo"  # a judge's passes are small anyhow
    monkeypatch.setattr(rollout, "RATIO_TOLERANCE", 0.0)
    status, said, halved = run(name, "halved", "train.max_steps=6", "--resume")
    assert status == 0 and not narrow.refused, said
    assert not [event for event in read_jsonl(halved / EVENTS_FILE) if event["step"] > 4 and event["event"] in ("ratio", "halved")]


def test_measuring_the_reference_is_halved(run: Run, narrow: Narrow) -> None:
    """Guards a DPO run that ends before its first step."""
    _, _, whole = run("dpo", "whole", "train.max_steps=2")
    narrow.rows, narrow.learning_only = 2, False
    status, said, out = run("dpo", "tight", "train.max_steps=2", f"data.store_dir={out_store(whole)}")
    assert status == 0 and narrow.refused > 0, said
    assert rows(out)[1]["loss"] == pytest.approx(rows(whole)[1]["loss"], rel=1e-5)


def out_store(out: Path) -> Path:
    """A store of its own, without the reference values of another run."""
    return out.parent / "another_store"


def test_what_cannot_be_parted_says_what_to_do(run: Run, narrow: Narrow) -> None:
    """Guards a mean over the rows of a batch that a part of them would falsify, and an endless loop."""
    narrow.rows = 1
    status, said, _ = run("grpo", "bnpo", "grpo.loss=bnpo", "train.batch_size=16", "data.max_length=40")
    assert status == 1 and "halve train.batch_size and double train.accumulation_steps" in said and "Traceback" not in said


class Plain(RolloutSource):
    def finish_rollout(self) -> None:
        pass


def test_answers_are_written_in_smaller_batches(
    tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a run that ends because its answers do not fit into memory together, other answers because they were written apart, a
    size that is tried in vain at every rollout, and a change that nobody hears of."""
    shape = {"prompts": 4, "samples": 2, "batch_size": 16}
    events: list[tuple[str, Any]] = []
    wanted = make_source(Plain, tiny_model, tiny_tokenizer, rollout=shape)
    wanted.next_batch(0.0)
    tries: list[int] = []
    generate_many = Engine.generate_many

    def tight(self: Engine, asked: Any, sampling: Any, at_once: int, own: Any) -> Any:
        tries.append(at_once)
        if at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate_many(self, asked, sampling, at_once, own)

    monkeypatch.setattr(Engine, "generate_many", tight)
    source = make_source(Plain, tiny_model, tiny_tokenizer, rollout=shape, alarm=lambda step, kind, details: events.append((kind, details)))
    start = source.state_dict()
    source.next_batch(0.0)
    source.load_state_dict(start)  # the loop's trial is taken back
    batch = source.next_batch(0.0)
    source.note_update(batch.extra["old"], batch.extra["old"], True)
    assert tries == [8, 4, 2] and [sample.ids for sample in source.samples] == [sample.ids for sample in wanted.samples]
    assert [(kind, details["prompts"]) for kind, details in events] == [(FEWER, 4), (FEWER, 2)]
    resumed = make_source(Plain, tiny_model, tiny_tokenizer, rollout=shape)
    resumed.load_state_dict(source.state_dict())
    resumed.renew()
    resumed.next_batch(0.0)
    assert tries == [8, 4, 2, 2]
    monkeypatch.setattr(Engine, "generate_many", lambda *arguments: (_ for _ in ()).throw(MemoryError()))
    resumed.renew()
    with pytest.raises(MemoryError):
        resumed.next_batch(0.0)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_a_batch(seed: int) -> None:
    """Guards rows that are lost, counted twice, or parted from those they belong to, and pieces larger than asked for without need."""
    torch.manual_seed(seed)
    count = int(torch.randint(1, 20, ()))
    cuts = [row for row in range(1, count) if torch.rand(()) < 0.6]
    held = torch.randint(1, 4, (count,)).tolist()
    batch = Batch({"input_ids": torch.arange(count)[:, None]}, {"pairs": 3.0}, count, count, cuts=cuts, entries={"documents": held})
    batch.extra = {"documents": torch.arange(sum(held)), "scalar": torch.tensor(1.0)}
    longest = max(b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True))
    for rows_at_once in range(1, count + 2):
        pieces = batch.split(rows_at_once)
        assert torch.equal(torch.cat([piece.inputs["input_ids"] for piece in pieces]), batch.inputs["input_ids"])
        assert torch.equal(torch.cat([piece.extra["documents"] for piece in pieces]), batch.extra["documents"])
        sizes = [len(piece.inputs["input_ids"]) for piece in pieces]
        assert max(sizes) <= max(rows_at_once, longest)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        assert set(ends[:-1]) <= set(cuts)
        inner = [row + start for piece, start in zip(pieces, [0, *ends], strict=False) for row in piece.cuts or []]
        assert inner == [row for row in cuts if row not in ends]
