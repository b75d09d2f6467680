"""What the alignment stages say to data, models and settings that cannot work together: one line, the right exit status, and no out_dir."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_helpers import FAST, call_main, chat_rows, pair_rows, text_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from train.metrics import read_jsonl

Command = Callable[..., tuple[int, str, str]]
SMALL = [*FAST, "data.max_length=96", "model_dir=sft", "data.store_dir=store", "out_dir=run", "train.max_steps=2", "train.log_every=1"]
ROLLOUT = ["data.prompt_file=chats.jsonl", "rollout.max_new_tokens=8", "rollout.prompts=4", "data.val_share=0.2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BPETokenizer) -> Path:
    """Models of two vocabularies (sft, reward; foreign, foreign_reward) and files of every kind."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(1)
    other = BPETokenizer.train(["quite other words stand here, 完全不同"] * 9, vocab_size=300, progress=False)
    for prefix, tokenizer in (("", tiny_tokenizer), ("foreign_", other)):
        shape = HaoAIConfig(tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, intermediate_size=16, max_position_embeddings=128)
        SmartHaoAI(shape).save_pretrained(folder / f"{prefix}sft", tokenizer)
        judge = RewardModel(shape)
        torch.nn.init.normal_(judge.score_head.weight)
        judge.save_pretrained(folder / f"{prefix}reward", tokenizer)
    label = [{"prompt": "q", "completion": "a", "label": "maybe"}]
    equal = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "", "rejected": "a"}]
    long = [{"prompt": "很长 long " * 99, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "很长 long " * 99, "rejected": "b"}]
    for name, rows in (
        ("chats", chat_rows(30)),
        ("pairs", pair_rows(30)),
        ("texts", text_rows(5)),
        ("empty", []),
        ("label", label),
        ("mixed", [*pair_rows(8), *equal, *long]),
        ("questions", [{"prompt": f"{n} + 1 = ?"} for n in range(9)]),
        ("too_long", [{"prompt": "很长 long " * 99}]),
    ):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """command(stage, words...) -> (status, stdout, stderr) in a folder of its own with the models and files."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAOAI_DEBUG", raising=False)

    def run(stage: str, *words: str) -> tuple[int, str, str]:
        main = importlib.import_module(stage if stage == "train_rlhf" else f"train.train_{stage}").main
        return call_main(main, [*SMALL, *words], capsys, monkeypatch)

    return run


PAIRS = "data.preference_file=pairs.jsonl"
MISTAKES: list[tuple[str, list[str], int, list[str]]] = [
    # files of another kind, or of none
    ("dpo", ["data.preference_file=empty.jsonl"], 1, ["{prompt, chosen, rejected}", "empty.jsonl", "check_data"]),
    ("reward", ["data.preference_file=empty.jsonl"], 1, ["empty.jsonl", "check_data"]),
    ("reward", ["data.preference_file=chats.jsonl"], 1, ["chats.jsonl:1", "found a conversation", "check_data"]),
    ("dpo", ["data.preference_file=texts.jsonl"], 1, ["texts.jsonl:1", "expected a pair", "found a text"]),
    ("dpo", ["dpo.loss=kto", "data.preference_file=chats.jsonl"], 1, ["chats.jsonl:1", "{prompt, completion, label}"]),
    ("dpo", ["dpo.loss=kto", "data.preference_file=label.jsonl"], 1, ["label.jsonl:1", "'maybe'", "true or false"]),
    ("grpo", [*ROLLOUT, "data.prompt_file=empty.jsonl"], 1, ["empty.jsonl", "no prompt"]),
    ("grpo", [*ROLLOUT, "data.prompt_file=texts.jsonl"], 1, ["texts.jsonl", "5 unusable"]),
    ("grpo", [*ROLLOUT, "data.prompt_file=questions.jsonl"], 1, ["questions.jsonl", "9 without an answer"]),
    ("train_rlhf", [*ROLLOUT, "data.preference_file=chats.jsonl"], 1, ["chats.jsonl:1", "found a conversation"]),
    ("train_rlhf", [*ROLLOUT, PAIRS, "data.prompt_file=too_long.jsonl"], 1, ["too_long.jsonl", "1 longer than"]),
    # models that do not fit
    ("ppo", [*ROLLOUT, "reward_model_dir=foreign_reward"], 1, ["foreign_reward", "another vocabulary", "train.train_reward"]),
    ("grpo", [*ROLLOUT, "reward_model_dir=foreign_reward"], 1, ["foreign_reward", "another vocabulary", "train.train_reward"]),
    ("ppo", [*ROLLOUT, "reward_model_dir=sft"], 2, ["sft is no trained reward model", "train.train_reward model_dir=sft"]),
    ("distill", ["teacher_dir=reward", "data.sft_file=chats.jsonl"], 1, ["reward", "is a reward model"]),
    ("dpo", ["model_dir=reward", PAIRS], 1, ["reward", "is a reward model"]),
    ("lora", ["model_dir=reward", "data.sft_file=chats.jsonl"], 1, ["reward", "is a reward model"]),
    ("dpo", ["model_dir=foreign_sft", "tokenizer_dir=sft", PAIRS], 1, ["sft has", "foreign_sft only", "leave tokenizer_dir out"]),
    # settings
    ("dpo", [PAIRS, "lora.r=4", "lora.targets=[q_proj, xx]"], 1, ["lora.targets", "no xx", "v_proj"]),
    ("dpo", [PAIRS, "data.max_length=500"], 2, ["data.max_length=500", "128"]),
    ("grpo", [*ROLLOUT, "rollout.max_new_tokens=96"], 2, ["rollout.max_new_tokens=96", "data.max_length=96"]),
    ("grpo", [*ROLLOUT, "rewards.exat=1"], 2, ["rewards.exat", "exact"]),
    ("grpo", [*ROLLOUT, "rewards.exact=0", "rewards.format=0"], 2, ["weight/reward", "rewards.exact=1"]),
    ("train_rlhf", [*ROLLOUT, PAIRS, "rollout.max_new_tokens=200"], 2, ["rollout.max_new_tokens=200", "data.max_length=96"]),
    ("train_rlhf", [*ROLLOUT, PAIRS, "reward_model_dir=reward"], 2, ["reward_model_dir='reward'", "train.train_ppo"]),
]


@pytest.mark.parametrize(("stage", "words", "status", "parts"), MISTAKES, ids=[str(n) for n in range(len(MISTAKES))])
def test_mistakes_are_one_line(command: Command, tmp_path: Path, stage: str, words: list[str], status: int, parts: list[str]) -> None:
    """Guards against a traceback, against a message without file, line, value or remedy, and against training that begins all the same."""
    ended, _, err = command(stage, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert ended == status and len(lines) == 1 and all(part in lines[0] for part in parts), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_unusable_rows_are_named_and_the_others_learned(command: Command, stage: str) -> None:
    """Guards equal, empty and over-long answers on the way through a whole stage: each is named with its line, and none is learned."""
    ended, out, err = command(stage, "data.preference_file=mixed.jsonl", "data.val_share=0")
    assert ended == 0, err
    for said in ("mixed.jsonl:9: chosen and rejected are the same", "mixed.jsonl:10: chosen is empty", "2 rows skipped"):
        assert said in out
    assert "1 lost the beginning of their prompt, 1 left out because an answer does not fit (mixed.jsonl:12)" in out
    ended, _, err = command(stage, "data.preference_file=mixed.jsonl", "data.val_share=0.3", "data.strict=true", "out_dir=strict")
    assert ended == 1 and "the first is mixed.jsonl:9: chosen and rejected are the same" in err and not Path("strict").exists()


def test_pairs_as_conversations(command: Command) -> None:
    """Guards: the rejected answers of a preference file learned as examples."""
    from train.store import TokenStore

    ended, out, err = command("sft", "data.sft_file=pairs.jsonl", "data.val_share=0")
    assert ended == 0 and "tokenised 30 documents" in out, err
    (folder,) = Path("store").glob("sft-*")
    split, tokenizer = TokenStore(folder).train, BPETokenizer.from_pretrained("sft")
    texts = [tokenizer.decode(split.tokens(n).tolist()) for n in range(30)]
    assert all("答案是" in text and "I do not know" not in text for text in texts)


def test_an_adapter_as_the_model(command: Command) -> None:
    """Guards `model_dir=` of an adapter: it stands for base and adapter together, the result stands alone, and a base that was trained
    on is refused."""
    assert command("lora", "data.sft_file=chats.jsonl", "lora.r=2", "out_dir=lora", "train.lr=0.05")[0] == 0
    ended, _, err = command("dpo", "model_dir=lora", PAIRS, "train.eval_first=false")
    assert ended == 0, err
    assert read_jsonl(Path("run") / "metrics.jsonl")[0]["loss"] == pytest.approx(0.6931, abs=1e-4), "it is its own reference"
    assert command("sft", "data.sft_file=chats.jsonl", "out_dir=trained")[0] == 0
    shutil.rmtree("sft")
    assert SmartHaoAI.from_pretrained("run").adapter is None
    shutil.move("trained", "sft")
    for stage, words in (("dpo", [PAIRS]), ("grpo", ROLLOUT), ("reward", [PAIRS])):
        ended, _, err = command(stage, "model_dir=lora", *words, "out_dir=other")
        assert ended == 1 and "error: the adapter lora was trained on another base: on 'sft'" in err and "model_dir" in err, err
        assert not Path("other").exists()
