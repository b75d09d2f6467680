"""The chat as it is used at a terminal: typed, pasted, interrupted. One program is driven through all commands, since it starts slowly."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from inference.commands import COMMANDS

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal needs Unix", allow_module_level=True)

from terminal_helpers import Terminal

ROOT = Path(__file__).resolve().parents[2]
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
ESCAPE_ENTER = "\x1b\r"


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer):
    """A folder with weight/sft and weight/other: random models that talk at length, and never the same."""
    folder = tmp_path_factory.mktemp("terminal")
    make_model(tokenizer, max_position_embeddings=4096).save_pretrained(folder / "weight" / "sft", tokenizer)
    make_model(tokenizer, seed=1, max_position_embeddings=4096).save_pretrained(folder / "weight" / "other", tokenizer)
    (folder / "papers").mkdir()
    (folder / "papers" / "a.txt").write_text("hello", encoding="utf-8")
    return folder


@pytest.fixture
def chat(place):
    """chat(arguments, **environment): the program at its first prompt."""
    running = []

    def start(*arguments, prompt="You>", **changes):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(place / "state"),
            "OMP_NUM_THREADS": "1",
            "LC_ALL": "C.UTF-8",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm",
            **changes,
        }
        command = [sys.executable, str(ROOT / "chat.py"), "--model", "weight/sft", *arguments]
        terminal = Terminal(command, place, environment)
        running.append(terminal)
        terminal.expect(prompt)
        return terminal

    yield start
    for terminal in running:
        terminal.close()


def test_every_command(chat, place):
    """Guards: a command that is in the table and fails, says nothing, or ends the chat."""
    for name in ("training_data", "said.json", "memories.json"):
        shutil.rmtree(place / name, ignore_errors=True)
    done = set()
    terminal = chat("--lang", "en", "--max-new-tokens", "6", "--temperature", "1", "--seed", "3")

    def does(line, *shown):
        terminal.line(line)
        terminal.expect(line.rpartition("\x1b")[2][-20:])  # the line itself, as it is typed
        for text in shown:
            terminal.expect(text)
        terminal.expect("You>")
        done.add(line.split()[0].lstrip("/"))

    does("/help", "/reasoning", "Ctrl-D quits")
    does("/quti", "did you mean /quit")
    does("hello", "tokens/s")
    does("/good", "training_data/sft/feedback/chat.jsonl")
    does("/bad A better answer, 更好的回答。", "training_data/rlhf/feedback/chat.jsonl")
    does("/retry", "tokens/s")
    terminal.line("/compare")
    terminal.expect("answer 2")
    terminal.expect("which is better?")
    does("1", "training_data/rlhf")
    done.add("compare")
    terminal.line("/edit")
    terminal.expect("You> hello")  # ready to be changed
    does(" world", "tokens/s")
    done.add("edit")
    does("/undo", "taken back: hello world")
    does("/edit how are you?", "tokens/s")
    does("/system Be kind.", "system text is set")
    does("/system", "Be kind.")
    does("stream", "streaming: off")
    does("and now?", "tokens/s")
    does("/stream on", "streaming: on")
    does("/set", "top_k=")
    does("/set temprature 1", "did you mean temperature?")
    does("/set top-k 7", "top_k=7")
    does("/thinking on", "thinking: on")
    does("/thinking maybe", "not maybe")
    does("/think show", "shown in full")
    does("what do you think?", "tokens/s")
    does("/think fold", "folded")
    does("/think")
    does("/thinking auto", "thinking: auto")
    does("reasoning", "reasoning: on")
    does("/reasoning votes 2", "votes 2")
    does("2 + 2 = ?", "tokens/s")
    does("/reasoning budget 9999999", "9999999")
    does("/reasoning steps 2 + 3 = ?", "2 + 3")
    does("/reasoning off", "reasoning: off")
    does("/steps 2", "no reasoning head")
    does("memory", "memory: on")
    does("My dog is called Biscuit.", "tokens/s")
    does("/memory list", "user: My dog is called Biscuit.")
    does("/memory export memories.json", "memories are written")
    does("/memory forget 1", "memory 1 is forgotten")
    does("/memory forget 1", "1")
    does("/memory profile lin", "profile: lin")
    does("/memory list", "Nothing is remembered")
    terminal.line("/memory erase")
    terminal.expect("(yes/no)")
    does("yes", "memories are erased")
    does("/memory off", "memory: off")
    does("/memory bake", "not bake")
    does("template", "template: auto")
    does("Hello!", "template chat")
    does("/template list", "translation")
    does("/template translaton", "did you mean translation?")
    does("/template translation", "template: translation")
    does("/auto", "template: auto")
    does("/auto off", "template: off")
    does("/tools list", "calculator")
    does("/tools", "tools: on (calculator clock")
    does("what time is it?", "tokens/s")
    does("/tools off", "tools: off")
    does("/files nowhere", "nowhere")
    does("/files papers", "you are asked before anything is changed")
    terminal.line("/files do move a.txt to notes")
    terminal.expect("?")
    does("yes", "1")
    assert (place / "papers" / "notes" / "a.txt").is_file()
    does("/files undo", "a.txt")
    assert (place / "papers" / "a.txt").is_file()
    does("/files log", "a.txt")
    does("/files off")
    does("/rag", "not installed yet")
    does("/adapter", "adapter: off")
    does("/adapter nothing", "Known adapters: off")
    does("/model nowhere", "nowhere")
    does("/model other", "weight/other")
    does("/save said.json", "messages to said.json")
    does("/clear", "cleared")
    does("/load said.json", "messages from said.json")
    does("/load missing.json", "there is no file missing.json")
    does("/summary")
    does("clear", "cleared")
    does("/retry", "say something first")
    terminal.line("quit")
    terminal.expect("Goodbye")
    assert terminal.wait() == 0
    assert set(COMMANDS) - {"quit"} <= done
    saved = json.loads((place / "said.json").read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "system", "content": "Be kind."} and saved["settings"]["top_k"] == 40  # the other model's own
    rows = [json.loads(line) for line in (place / "training_data/rlhf/feedback/chat.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["chosen"][0]["content"] == "A better answer, 更好的回答。"


def test_typing_pasting_and_interrupting(chat, place):
    """Guards: a paste that is sent line by line or obeyed as commands; Chinese that is lost on the way; a Ctrl-C that ends the chat
    or leaves it unusable; history that forgets."""
    shutil.rmtree(place / "said.json", ignore_errors=True)
    terminal = chat("--lang", "zh", "--max-new-tokens", "4", "--temperature", "0", prompt="你>")
    terminal.send("你好" + ESCAPE_ENTER + "世界\r")
    terminal.expect("词元/秒")
    terminal.expect("你>")
    terminal.send(f"{PASTE}第一行\n/quit\n第三行{PASTED}")
    time.sleep(0.5)
    terminal.send("\r")
    terminal.expect("词元/秒")
    terminal.expect("你>")
    for line in ('"""def f():', "    return 1", '"""'):
        terminal.line(line)
        time.sleep(0.5)
    terminal.expect("词元/秒")
    terminal.expect("你>")
    terminal.line("one\\")
    time.sleep(0.5)
    terminal.line("two")
    terminal.expect("词元/秒")
    terminal.expect("你>")
    terminal.line("/home/me 是什么？")  # a path is no command
    terminal.expect("词元/秒")
    terminal.expect("你>")
    terminal.line("/save said.json")
    terminal.expect("已保存 10 条")
    terminal.expect("你>")
    terminal.send("\x1b[A")  # the arrow up
    terminal.expect("/save said.json")
    terminal.send("\x03")  # a half-typed line is given up
    terminal.expect("再按一次")
    terminal.expect("你>")
    terminal.line("/set max_new_tokens 3000")
    terminal.expect("max_new_tokens=3000")
    terminal.expect("你>")
    terminal.line("tell me a very long story")
    terminal.expect("very long story")
    terminal.expect_more(150)
    terminal.interrupt()
    terminal.expect("已停止")
    terminal.expect("你>")
    terminal.line("/stream")
    terminal.expect("逐字显示：关")
    terminal.expect("你>")
    time.sleep(0.5)
    terminal.send("\x04")
    terminal.expect("再见")
    assert terminal.wait() == 0
    said = [row["content"] for row in json.loads((place / "said.json").read_text(encoding="utf-8"))["messages"]][::2]
    assert said == ["你好\n世界", "第一行\n/quit\n第三行", "def f():\n    return 1", "one\ntwo", "/home/me 是什么？"]


def test_without_colours_and_prompt_toolkit(chat, place, tmp_path):
    """Guards: a plain terminal, or one without the extra packages, in which nothing works."""
    for name in ("prompt_toolkit", "rich"):
        (tmp_path / f"{name}.py").write_text("raise ImportError\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    terminal = chat("--lang", "en", "--max-new-tokens", "4", TERM="dumb", NO_COLOR="1", PYTHONPATH=path)
    terminal.line("你好")
    terminal.expect("tokens/s")
    terminal.expect("You>")
    terminal.interrupt_for("again to quit")
    terminal.expect("You>")
    terminal.interrupt_for("Goodbye")
    assert terminal.wait() == 0
