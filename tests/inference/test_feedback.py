"""Verdicts of a user: rows on the disk, and stages that train on them."""

import json
import sys

import pytest
from test_session import make_session

from inference.feedback import Feedback, append_row
from inference.toolbox import default_tools
from train import train_dpo, train_sft
from train.formats import Conversation, Judged, Preference, recognise
from train.program import run_main

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"}]


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def rows(folder, kind):
    file = folder / kind / "feedback" / "chat.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def test_every_verdict_is_a_row_of_its_kind(tmp_path):
    """Guards: rows that the readers of the stages take for something else, and verdicts without their circumstances."""
    feedback = Feedback(tmp_path, model="weight/sft")
    feedback.good(PROMPT, said("您好", reasoning_content="hm"), settings={"temperature": 0.5})
    feedback.bad(PROMPT, said("走开"), "你好呀")
    feedback.bad([{"role": "user", "content": "Hi"}], said("no"))
    feedback.better(PROMPT, said("一"), said("二"))
    (good,), (first, second), (judged,) = (rows(tmp_path, kind) for kind in ("sft", "rlhf", "judged"))
    assert recognise(good) == Conversation([*PROMPT, said("您好", reasoning_content="hm")])
    assert recognise(first) == Preference(PROMPT, [said("你好呀")], [said("走开")])
    assert recognise(second) == Preference(PROMPT, [said("一")], [said("二")])
    assert recognise(judged) == Judged([{"role": "user", "content": "Hi"}], [said("no")], False)
    for row in (good, first, second, judged):
        assert row["source"]["model"] == "weight/sft" and row["source"]["time"].startswith("20")
    assert good["source"]["settings"] == {"temperature": 0.5}


def test_how_the_model_was_asked_is_part_of_the_row(tmp_path):
    """Guards: training on calls of tools that the prompt does not show, and on answers without thinking as if thinking had been left out
    by the model's own choice."""
    tools = default_tools().schemas()
    feedback = Feedback(tmp_path)
    how = {"tools": tools, "thinking": False}
    feedback.good(PROMPT, said("您好"), **how)
    feedback.bad(PROMPT, said("走开"), "你好呀", **how)
    feedback.bad([{"role": "user", "content": "Hi"}], said("no"), **how)
    feedback.better(PROMPT, said("一", reasoning_content="hm"), said("二"), **how)
    (good,), (first, second), (judged,) = (rows(tmp_path, kind) for kind in ("sft", "rlhf", "judged"))
    assert [recognise(row).tools for row in (good, first, second, judged)] == [tools] * 4
    assert [recognise(row).thinking for row in (good, first, second, judged)] == [False, False, None, False]
    assert "tools" not in good["source"]


def test_opposite_verdicts_on_one_prompt_make_a_pair(tmp_path):
    """Guards: the pair that /bad, /retry, /good stand for being lost; pairs of answers to different questions."""
    feedback = Feedback(tmp_path)
    feedback.bad(PROMPT, said("走开"))
    feedback.good([{"role": "user", "content": "Bye"}], said("bye"))
    assert rows(tmp_path, "rlhf") == []
    feedback.good(PROMPT, said("您好"))
    feedback.bad(PROMPT, said("不"))
    assert [recognise(row) for row in rows(tmp_path, "rlhf")] == [
        Preference(PROMPT, [said("您好")], [said("走开")]),
        Preference(PROMPT, [said("您好")], [said("不")]),
    ]
    feedback.good(PROMPT, said("不"))  # the user's mind has changed
    assert len(rows(tmp_path, "rlhf")) == 2


def test_what_nothing_can_be_learned_from_is_refused(tmp_path):
    """Guards: rows that every later training run reports as bad."""
    feedback = Feedback(tmp_path)
    with pytest.raises(ValueError, match="empty"):
        feedback.good(PROMPT, said(" "))
    with pytest.raises(ValueError, match="no question"):
        feedback.bad([], said("a"))
    with pytest.raises(ValueError, match="the same"):
        feedback.bad(PROMPT, said("a"), "a")
    assert not list(tmp_path.iterdir())


def test_rows_are_added_whole(tmp_path):
    """Guards: a line that a crash cut off swallowing the next verdict; text that is no UTF-8; earlier lines that change."""
    file = tmp_path / "a" / "x.jsonl"
    append_row(file, {"a": "你好\n\ud800"})
    append_row(file, {"a": 2})
    before = file.read_bytes()
    file.write_bytes(before + b'{"a": 3, "cut')
    append_row(file, {"a": 4})
    lines = file.read_bytes().split(b"\n")
    assert file.read_bytes().startswith(before) and [json.loads(lines[n])["a"] for n in (0, 1, 3)] == ["你好\n?", 2, 4]


def test_what_is_said_in_a_chat_is_trained_on(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    """Guards: the loop from use back to training: rows that a stage skips, refuses or learns nothing from."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tokenizer)
    model.save_pretrained("weight/sft", tokenizer)
    chat = make_session(model, tokenizer, max_new_tokens=8)
    feedback = Feedback("training_data", model="weight/sft")
    for question in ("Hello!", "你好", "1 + 2 = ?", "Who are you?", "天气好吗？"):
        chat.chat(question)
        feedback.good(*chat.prompt_of_answer())
        feedback.bad(*chat.prompt_of_answer(), better="I am glad to see you. 很高兴见到你。")
        first = chat.prompt_of_answer()[1]
        list(chat.retry())
        prompt, second = chat.prompt_of_answer()
        if second != first:
            feedback.better(prompt, second, first)
        feedback.bad(prompt, second)
    assert len(rows(tmp_path / "training_data", "sft")) == 5 and len(rows(tmp_path / "training_data", "rlhf")) >= 5
    fast = "model_dir=weight/sft train.max_steps=2 train.batch_size=2 train.accumulation_steps=1 train.precision=fp32 train.log_every=1"
    fast += " train.eval_every=0 train.threads=1 train.checkpoint_minutes=0 data.max_length=128 data.val_share=0"
    stages = [
        (train_sft.main, "out_dir=weight/sft2"),
        (train_dpo.main, "out_dir=weight/dpo"),
        (train_dpo.main, "dpo.loss=kto data.preference_file=training_data/judged out_dir=weight/kto"),
    ]
    for main, words in stages:
        monkeypatch.setattr(sys, "argv", ["stage", *f"{fast} {words}".split()])
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        assert "0 rows skipped" in out, out
        folder = words.rpartition("out_dir=")[2]
        steps = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in steps if "loss" in row][-1] == 2 and (tmp_path / folder / "model.safetensors").is_file()
