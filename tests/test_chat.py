"""chat.py as people use it: piped, and in a real terminal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference import ChatSession, SamplingSettings
from inference.chat_texts import TEXTS
from inference.loading import newest_stage
from inference.repl import Repl
from inference.terminal import CONTROL_CHARACTERS, AnswerView, Console, interface_language
from model import BPETokenizer, HaoAIConfig, SmartHaoAI

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with weight/sft and an older weight/pretrain: one random tiny model."""
    place = tmp_path_factory.mktemp("chat")
    texts = ["你好，很高兴见到你。", "Hello, how are you today? " * 3]
    tokenizer = BPETokenizer.train(texts, vocab_size=400, progress=False)
    torch.manual_seed(0)
    shape = HaoAIConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, intermediate_size=64, max_position_embeddings=8192)
    SmartHaoAI(shape).save_pretrained(place / "weight" / "sft", tokenizer)
    shutil.copytree(place / "weight" / "sft", place / "weight" / "pretrain")
    return place


def environment(folder, **changes):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(folder / "state"),
        "LC_ALL": "C.UTF-8",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm",
        "PYTHONIOENCODING": "utf-8",
        **changes,
    }


def piped(folder, text, *arguments, **changes):
    return subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), *arguments],
        input=text.encode(),
        cwd=folder,
        capture_output=True,
        timeout=120,
        env=environment(folder, **changes),
        check=False,
    )


def test_piped_answers_alone_reach_standard_output(folder):
    """Prompts, notes and banners in a pipe would end up in the user's file."""
    arguments = ("--max-new-tokens", "5", "--temperature", "0", "--lang", "en")
    done = piped(folder, "你好\n\n/stream\n/clear\n你好\nquit\n你好\n", *arguments)
    out, notes = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, notes
    half = len(out) // 2
    assert out and out[:half] == out[half:] and out.endswith("\n")  # cleared in between: the same answer twice
    assert "weight/sft" in notes and "streaming: off" in notes and "cleared" in notes and "You>" not in out + notes
    without_end = piped(folder, "你好", *arguments, "--no-stream")
    assert without_end.stdout.decode() == out[:half] and without_end.returncode == 0


def test_json_is_one_object_a_line(folder):
    """Guards: notes, thinking or command output between the objects; a question without its object, so that lines no longer match."""
    words = ("--json", "--max-new-tokens", "5", "--temperature", "0", "--model", "weight/sft", "--lang", "en")
    done = piped(folder, "你好\n/help\nHello\n/nothing\n", *words)
    answers = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [sorted(answer) for answer in answers[:2]] == [["answer", "finish_reason", "seconds", "thinking", "usage"]] * 2
    assert answers[0]["usage"]["completion_tokens"] == 5 and answers[1]["usage"]["reused_tokens"] > 0 and "/nothing" in answers[2]["error"]
    assert done.returncode == 1 and "Ctrl-D" in done.stderr.decode() and len(answers) == 3
    once = piped(folder, "", *words, "--prompt", "/quit 你好")
    assert once.returncode == 0 and json.loads(once.stdout)["finish_reason"] == "length"


def test_one_question_of_many_lines(folder):
    """Guards: a prompt that is read as commands, or cut at its first line."""
    words = ("--json", "--max-new-tokens", "1", "--model", "weight/sft")
    whole, block = (piped(folder, text, *words, *more) for text, more in (("a\n/quit\n", ("--prompt", "-")), ('"""a\n/quit"""\n', ())))
    lengths = [json.loads(done.stdout)["usage"]["prompt_tokens"] for done in (whole, block)]
    tokenizer = BPETokenizer.from_pretrained(folder / "weight" / "sft")
    assert lengths == [len(tokenizer.render([{"role": "user", "content": "a\n/quit"}], add_generation_prompt=True).ids)] * 2


def test_piped_mistakes_are_told_and_end_with_status_1(folder):
    done = piped(folder, "/quti\n/load missing.json\n/thinking maybe\n", "--lang", "zh", "--model", "weight/sft")
    notes = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b""
    assert "/quit" in notes and "没有文件 missing.json" in notes and "maybe" in notes


def test_conversations_are_saved_and_loaded(folder):
    """A saved conversation is a row that the SFT reader takes, and no other file is overwritten."""
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    lines = "/system Be kind.\nhello\n/save talk.json\n/save notes.txt\n/clear\n/load talk.json\n/save talk.json\n"
    done = piped(folder, lines, "--max-new-tokens", "3", "--lang", "en")
    saved = json.loads((folder / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert "not a saved conversation" in done.stderr.decode()


def obey(model, tokenizer, language, *lines):
    """The exit status of a REPL that reads these lines; what it says is for capsys."""
    session = ChatSession(model, tokenizer, settings=SamplingSettings(temperature=0, max_new_tokens=4))
    left = iter([*lines, "/quit"])
    console = Console(language, interactive=False)
    return Repl(session, console, streaming=True, show_thinking=False).run(lambda prompt, default="": next(left))


def test_steps_are_shown_set_and_refused(folder, capsys):
    """Guards: a setting that is half taken over from a wrong line; silence about a model that has nothing to set."""
    tokenizer = BPETokenizer.from_pretrained(folder / "weight" / "sft")
    model = SmartHaoAI.from_pretrained(folder / "weight" / "sft", use_reasoning=True)
    assert obey(model, tokenizer, "en", "/steps", "/steps 2", "/steps 7   0.9", "hello", "/steps 7 0") == 0
    notes = capsys.readouterr().err.splitlines()
    assert ["4, all" in notes[0], "2, all" in notes[1], "most 7" in notes[2] and "0.9" in notes[2], "7, all" in notes[-1]] == [True] * 4
    model.set_reasoning(3, 0.5)
    for wrong in ("0", "2.5", "many", "2 1", "2 -1", "2 nan", "5 0.5 0.5"):
        assert obey(model, tokenizer, "zh", f"/steps {wrong}") == 1
        assert f"而不是 {wrong}" in capsys.readouterr().err and model.reasoning_setting == (3, 0.5)
    plain = SmartHaoAI.from_pretrained(folder / "weight" / "sft")
    for language, part in (("en", "no reasoning head"), ("zh", "没有推理头")):
        assert obey(plain, tokenizer, language, "/steps 2") == 1
        assert part in capsys.readouterr().err


def test_the_mean_number_of_steps_is_shown_in_a_terminal(folder, capsys):
    """Guards: a line about steps in a pipe's answers, or about a model that never halts."""
    tokenizer = BPETokenizer.from_pretrained(folder / "weight" / "sft")
    session = ChatSession(SmartHaoAI.from_pretrained(folder / "weight" / "sft", use_reasoning=True), tokenizer)
    session.settings = SamplingSettings(temperature=0, max_new_tokens=4)
    for interactive, halt, shown in ((True, 1e-9, True), (True, 0.0, False), (False, 1e-9, False)):
        session.model.reasoning_halt = halt
        Repl(session, Console("en", interactive), streaming=True, show_thinking=False).ask("hello")
        assert ("a mean of 1.0 reasoning steps a token" in "".join(capsys.readouterr())) == shown


def test_options_for_steps_reach_the_model(folder, tmp_path):
    """Guards: an option that is read and forgotten, and a traceback where the model has no head."""
    model = SmartHaoAI.from_pretrained(folder / "weight" / "sft", use_reasoning=True)
    model.save_pretrained(tmp_path / "head", BPETokenizer.from_pretrained(folder / "weight" / "sft"))
    words = ("--lang", "en", "--reasoning-steps", "6", "--reasoning-halt", "0.25")
    done = piped(folder, "/steps\n", "--model", str(tmp_path / "head"), *words)
    assert done.returncode == 0 and b"at most 6" in done.stderr and b"0.25" in done.stderr, done.stderr
    done = piped(folder, "hi\n", "--model", "weight/sft", *words)
    assert done.returncode == 1 and b"no reasoning head" in done.stderr and b"Traceback" not in done.stderr


def test_no_model_says_how_to_make_one(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py")],
        input=b"",
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        env=environment(folder, LC_ALL="zh_CN.UTF-8"),
        check=False,
    )
    assert done.returncode == 1 and "train_smart.py" in done.stderr.decode() and "还没有模型" in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_newest_stage_prefers_later_stages(tmp_path):
    """A pretraining that ran again after SFT must not take the place of the model that can chat."""
    for age, name in enumerate(["sft", "dpo", "reward", "pretrain", "dpo.123.tmp"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(b"")
        os.utime(file, (age, age))
    (tmp_path / "unfinished").mkdir()
    assert newest_stage(tmp_path).name == "dpo"
    assert newest_stage(tmp_path / "unfinished") is None


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LC_ALL": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN"}, "en"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LC_ALL": "", "LANG": "de_DE"}, "en"),
    ],
)
def test_language_follows_the_locale(variables, language):
    assert interface_language(variables) == language


def test_both_languages_take_the_same_values():
    """A translation that misses a {value} breaks only for the users of that language."""
    from string import Formatter

    for key, (chinese, english) in TEXTS.items():
        fields = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in (chinese, english)]
        assert fields[0] == fields[1], key
        assert chinese and english and (key in ("you",) or chinese != english)


def test_model_output_cannot_command_the_terminal():
    assert CONTROL_CHARACTERS.sub("", "a\x1b]0;title\x07b\r\n\tc") == "a]0;titleb\n\tc"


def test_thinking_is_folded_in_the_terminal_and_absent_in_a_pipe(capsys):
    console = Console("en", interactive=True)
    console.styled = True
    view = AnswerView(console, show_thinking=False)
    for channel, words in [("reasoning", "abc"), ("reasoning", "de"), ("answer", "yes")]:
        view.show(channel, words)
    view.finish()
    shown = capsys.readouterr().out
    assert "abc" not in shown and "thought for 5 characters" in shown and shown.endswith("\nyes\n")
    view = AnswerView(Console("en", interactive=False), show_thinking=True)
    for channel, words in [("reasoning", "abc"), ("tool", "clock() → now"), ("answer", "yes")]:
        view.show(channel, words)
    assert capsys.readouterr().out == "yes"


def test_adapters_are_switched_by_name(folder, tmp_path, monkeypatch, capsys):
    """An adapter of weight/ goes by its name, off leads back to the model, and a wrong name lists the right ones."""
    from inference import ChatSession
    from model.adapter_files import save_adapter
    from model.lora import LoRASettings, inject_lora

    shutil.copytree(folder / "weight" / "sft", tmp_path / "weight" / "sft")
    monkeypatch.chdir(tmp_path)
    model = SmartHaoAI.from_pretrained("weight/sft")
    torch.manual_seed(0)
    adapter = inject_lora(model, LoRASettings(r=4), "weight/sft")
    with torch.no_grad():
        for _, _, pair in adapter.pairs(model):
            pair.B.normal_()
    save_adapter(model, "weight/lora")
    assert newest_stage(Path("weight")) == Path("weight/lora")
    session = ChatSession.from_pretrained("weight/sft", device="cpu", temperature=0, max_new_tokens=12)
    repl = Repl(session, Console("en", interactive=False), streaming=False, show_thinking=False)

    def said(*lines):
        left = iter([*lines, "/quit"])
        status = repl.run(lambda prompt, default="": next(left))
        return (status, *capsys.readouterr())

    own, other = said("你好", "/clear"), said("/adapter lora", "你好", "/clear")
    assert own[1] != other[1] and "adapter: weight/lora (choose weight/lora off" in other[2]
    assert said("/adapter off", "你好", "/clear")[1] == own[1]
    status, out, notes = said("/adapter nothing")
    assert status == 1 and not out and "Known adapters: weight/lora off" in notes and "weight/nothing" in notes
