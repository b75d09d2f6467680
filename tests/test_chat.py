"""chat.py as people use it: piped, and in a real terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chat
from inference import ChatSession, SamplingSettings
from inference.chat_texts import TEXTS
from inference.terminal import CONTROL_CHARACTERS
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
    console = chat.Console(language, interactive=False)
    return chat.Repl(session, console, streaming=True, show_thinking=False).run(lambda prompt: next(left))


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
        chat.Repl(session, chat.Console("en", interactive), streaming=True, show_thinking=False)._answer("hello")
        assert ("a mean of 1.0 reasoning steps a token, at most 4" in "".join(capsys.readouterr())) == shown


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
    assert chat.newest_stage(tmp_path).name == "dpo"
    assert chat.newest_stage(tmp_path / "unfinished") is None


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
    assert chat.interface_language(variables) == language


def test_both_languages_take_the_same_values():
    """A translation that misses a {value} breaks only for the users of that language."""
    from string import Formatter

    for key, (chinese, english) in TEXTS.items():
        fields = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in (chinese, english)]
        assert fields[0] == fields[1], key
        assert chinese and english and (key in ("you",) or chinese != english)


def test_model_output_cannot_command_the_terminal():
    assert CONTROL_CHARACTERS.sub("", "a\x1b]0;title\x07b\r\n\tc") == "a]0;titleb\n\tc"


@pytest.fixture
def terminal(folder):
    """Starts chat.py in a pseudo-terminal and waits for its prompt."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed: the terminal is not tested")
    if sys.platform == "win32":
        pytest.skip("pexpect.spawn needs a Unix terminal")
    children = []

    def start(*arguments, **changes):
        child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "chat.py"), "--lang", "en", *arguments],
            cwd=str(folder),
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            env=environment(folder, **changes),
            dimensions=(30, 120),
            # A job that a shell runs in the background ignores Ctrl-C, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        children.append(child)
        child.expect("/help lists the commands")
        child.expect("You>")
        return child

    yield start
    for child in children:
        child.close(force=True)


def test_terminal_commands_history_and_end(terminal, folder):
    child = terminal("--max-new-tokens", "4")
    child.send("/system Be kind.\r")
    child.expect("system text is set")
    child.send("stream\r")
    child.expect("streaming: off")
    child.send("help\r")
    child.expect("Ctrl-D quits")
    child.send("你好\x1b\r世界\r")  # Alt-Enter makes a second line
    child.expect("cut off at the length limit")
    child.send("/save said.json\r")
    child.expect("saved 3 messages")
    child.send("\x1b[A")  # the arrow up brings the last line back
    child.expect("/save said.json")
    child.send("\r")
    child.expect("saved 3 messages")
    child.send("\x04")
    child.expect("Goodbye")
    child.wait()
    assert child.exitstatus == 0
    said = json.loads((folder / "said.json").read_text(encoding="utf-8"))["messages"]
    assert said[1]["content"] == "你好\n世界"


def test_ctrl_c_stops_the_answer_and_twice_quits(terminal):
    """The first Ctrl-C must leave a usable session, the second one leave."""
    child = terminal("--max-new-tokens", "8000", "--temperature", "0")  # greedy: goes round in circles, endlessly
    child.send("tell me a very long story\r")
    child.expect("very long story")
    child.expect(r"(?s)\?2004l.{200}")  # behind the prompt's end: the answer is on its way, and a Ctrl-C is a signal again
    child.sendintr()
    child.expect("stopped; press Ctrl-C again")
    child.send("/thinking off\r")
    child.expect("thinking: off")
    child.expect("You>")
    time.sleep(0.5)
    child.sendintr()
    child.expect("press Ctrl-C again")
    child.expect("You>")
    time.sleep(0.5)  # a key pressed while the prompt is being set up is lost, here as for a person
    child.sendintr()
    child.expect("Goodbye")
    child.wait()
    assert child.exitstatus == 0


def test_thinking_is_folded_in_the_terminal_and_absent_in_a_pipe(capsys):
    console = chat.Console("en", interactive=True)
    console.styled = True
    view = chat.AnswerView(console, show_thinking=False)
    for channel, words in [("reasoning", "abc"), ("reasoning", "de"), ("answer", "yes")]:
        view.show(channel, words)
    shown = capsys.readouterr().out
    assert "abc" not in shown and "thought for 5 characters" in shown and shown.endswith("\nyes")
    view = chat.AnswerView(chat.Console("en", interactive=False), show_thinking=True)
    for channel, words in [("reasoning", "abc"), ("answer", "yes")]:
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
    assert chat.newest_stage() == Path("weight/lora")
    session = ChatSession.from_pretrained("weight/sft", device="cpu", temperature=0, max_new_tokens=12)
    repl = chat.Repl(session, chat.Console("en", interactive=False), streaming=False, show_thinking=False)

    def said(*lines):
        left = iter([*lines, "/quit"])
        status = repl.run(lambda _: next(left))
        return (status, *capsys.readouterr())

    own, other = said("你好", "/clear"), said("/adapter lora", "你好", "/clear")
    assert own[1] != other[1] and "adapter: weight/lora (choose weight/lora off" in other[2]
    assert said("/adapter off", "你好", "/clear")[1] == own[1]
    status, out, notes = said("/adapter nothing")
    assert status == 1 and not out and "Known adapters: weight/lora off" in notes and "weight/nothing" in notes
