"""The chat without a terminal: commands by their lines, and replies as they are shown."""

import json

import pytest
from test_session import Scripted, make_session

from inference.chat_texts import TEXTS
from inference.commands import COMMANDS, help_text
from inference.file_assistant import FileAssistant
from inference.markdown import cell_width, wrapped
from inference.repl import Repl
from inference.reply import Reasoning
from inference.terminal import Console
from inference.toolbox import default_tools

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call><|im_end|>'


class Certain(Scripted):
    """Says the same at any temperature."""

    def _logits(self):
        return 1e4 * super()._logits()


@pytest.fixture
def start(make_model, tokenizer, tmp_path):
    """start(as_json=False, **settings): a chat with a random model, and all that it writes below tmp_path."""

    def begin(as_json=False, interactive=False, context=4096, **settings):
        session = make_session(make_model(tokenizer, max_position_embeddings=context), tokenizer, max_new_tokens=80, **settings)
        console = Console("en", interactive, as_json)
        return Repl(session, console, memory_file=tmp_path / "memory.sqlite", feedback_folder=tmp_path / "data")

    return begin


def type_in(repl, *lines):
    """The exit status after these lines and the end of input."""
    left = iter(lines)

    def read(prompt, default=""):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return repl.run(read)


@pytest.mark.parametrize("language", [0, 1])
def test_help_fits_a_narrow_terminal(language):
    """Guards: lines that the terminal breaks in the middle of a word."""
    shown = help_text(language) + "\n" + TEXTS["help_foot"][language].format(bare="clear quit memory reasoning stream template help")
    assert max(map(cell_width, shown.splitlines())) <= 80
    assert help_text(language, "memory").count("\n") == 1 and set(COMMANDS) <= {word for word in help_text(language).split()} | {
        word.lstrip("/") for word in help_text(language).split()
    }


def test_notices_break_between_words():
    """Guards: words and Chinese characters cut by the edge of the terminal, and lines that were to stand apart run together."""
    assert wrapped("one two three four five six", 20).split("\n") == ["one two three four ", "five six"]
    assert wrapped("你好，很高兴见到你。今天天气很好。", 20).split("\n") == ["你好，很高兴见到你。", "今天天气很好。"]
    assert wrapped("  a\n\nb", 20) == "  a\n\nb"


@pytest.mark.parametrize("styled", [True, False])
def test_a_call_stands_on_a_line_of_its_own(start, tokenizer, monkeypatch, capsys, styled):
    """Guards: a call shown in the middle of a word, or before what was said before it; two paragraphs run together."""
    repl = start(interactive=True)
    repl.console.styled = styled
    repl.session.tools = default_tools()
    Scripted(repl.session, tokenizer, monkeypatch, "Let me see. " + CALL, "It is 42.<|im_end|>")
    assert repl.ask("6*7?")
    lines = [line.rstrip() for line in capsys.readouterr().out.replace("\033[2m", "").replace("\033[0m", "").splitlines()]
    assert [line for line in lines if line][:3] == ["Let me see.", '⚙ calculator({"expression": "6*7"}) → 42', "It is 42."]


def test_a_failing_tool_is_told_and_the_chat_goes_on(start, tokenizer, monkeypatch, capsys):
    """Guards: an error of a tool that ends the chat, or that only the user sees."""
    repl = start()
    repl.session.tools = default_tools()
    wrong = '<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call><|im_end|>'
    unknown = '<tool_call>{"name": "calculater", "arguments": {}}</tool_call><|im_end|>'
    broken = '<tool_call>{"name": calculator</tool_call><|im_end|>'
    Scripted(repl.session, tokenizer, monkeypatch, wrong, unknown, broken, "I cannot.<|im_end|>", "fine<|im_end|>")
    assert type_in(repl, "1/0?", "and now?") == 0
    results = [message["content"] for message in repl.session.messages if message["role"] == "tool"]
    assert results[0] == "error: division by zero" and "did you mean calculator?" in results[1] and "not valid JSON" in results[2]
    assert capsys.readouterr().out == "I cannot.\nfine\n"


def test_a_memory_that_cannot_be_written_is_told(start, tokenizer, monkeypatch, tmp_path, capsys):
    """Guards: a full disk or a locked file that ends the chat and takes the last words with it."""
    repl = start(interactive=True)
    repl.console.styled = True  # the last word waits for what follows it
    Scripted(repl.session, tokenizer, monkeypatch, "fine words<|im_end|>", "good<|im_end|>")
    repl.obey("memory", "on")

    def refuse(*arguments, **keywords):
        raise TimeoutError("memory.sqlite has been in use by another program")

    monkeypatch.setattr(repl.memory, "add", refuse)
    assert not repl.ask("hello") and repl.failed
    shown = capsys.readouterr().out
    assert "fine words" in shown and "in use by another program" in shown
    repl.obey("memory", "off")
    assert repl.ask("and now?") and len(repl.session.messages) == 4


def test_an_exhausted_machine_keeps_the_conversation(start, tokenizer, monkeypatch, capsys):
    """Guards: a conversation lost because one answer was too much for the memory of the device."""
    repl = start()
    Scripted(repl.session, tokenizer, monkeypatch, "fine<|im_end|>", "good<|im_end|>")
    repl.ask("hello")
    with monkeypatch.context() as patch:
        patch.setattr(repl.session.engine, "stream", lambda *arguments: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert not repl.ask("a long one")
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert repl.ask("and now?") and [message["content"] for message in repl.session.messages] == ["hello", "fine", "and now?", "good"]


@pytest.mark.parametrize(
    "saved",
    [
        {"messages": [], "on": {"reasoning": {"votes": "many"}}},
        {"messages": [], "on": {"thinking": "yes"}},
        {"messages": [], "on": {"template": 5}},
        {"messages": [], "on": [1]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "late"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": "boo"}]},
    ],
)
def test_a_strange_file_is_refused_whole(start, tmp_path, capsys, saved):
    """Guards: a file that somebody wrote by hand ending the chat at once, or at a later command."""
    (tmp_path / "odd.json").write_text(json.dumps(saved), encoding="utf-8")
    repl = start()
    assert type_in(repl, f"/load {tmp_path / 'odd.json'}", "/thinking", "hello") == 1
    assert "odd.json is not a saved conversation" in capsys.readouterr().err
    assert [message["role"] for message in repl.session.messages] == ["user", "assistant"]


def test_a_conversation_comes_back_with_memory_tools_and_reasoning(start, tmp_path, capsys):
    """Guards: what a file says was on, and is not; fields of a later version that make it unreadable."""
    file = tmp_path / "talk.json"
    repl = start()
    type_in(repl, "/memory on", "/tools on", "/reasoning budget 7", "hello", f"/save {file}")
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["on"]["reasoning"]["of_a_later_version"] = stored["on"]["of_a_later_version"] = 1
    file.write_text(json.dumps(stored), encoding="utf-8")
    capsys.readouterr()
    other = start()
    (tmp_path / "papers").mkdir()
    assert type_in(other, f"/files {tmp_path / 'papers'}", f"/load {file}") == 0
    assert "memory: on" in capsys.readouterr().err
    assert other.session.memory is other.memory and other.memory.enabled and other.session.reasoning == Reasoning(budget=7)
    assert other.session.tools.names() == ["calculator", "clock", "memory_search", "files"]


def test_tools_that_do_not_fit_are_not_switched_on(start, tmp_path, capsys):
    """Guards: a chat in which every question is too long because of the tools; a folder of files that nobody can work on."""
    repl = start(context=512)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("hello", encoding="utf-8")
    assert type_in(repl, "/tools on", "hello") == 1
    assert "the model's context only 512" in capsys.readouterr().err and repl.session.tools is None and repl.session.last.text
    assert type_in(start(context=512), f"/files {tmp_path / 'papers'}", "/files do read a.txt", "/files off") == 0
    said = capsys.readouterr()
    assert said.out == "hello\n" and "files: " in said.err and "this model cannot be given them" in said.err and "files: off" in said.err


def test_settings_that_make_no_conversation_are_not_offered(start, capsys):
    """Guards: /set n 3, after which no question is answered; a setting that cannot be looked at alone."""
    repl = start()
    assert type_in(repl, "/set n 3", "/set top-k", "/set top_k 3", "/set top_k [") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["top_k=50", "top_k=3"] and "there is no setting n" in said.err and repl.session.settings.top_k == 3


def test_a_summary_between_objects_is_a_notice(start, tokenizer, monkeypatch, capsys):
    """Guards: a summary that nobody sees, or that stands between the JSON lines."""
    repl = start(as_json=True)
    Scripted(repl.session, tokenizer, monkeypatch, "fine<|im_end|>", "We said hello.<|im_end|>")
    assert type_in(repl, "hello", "/summary") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["answer"] == "fine" and "We said hello." in said.err


@pytest.mark.parametrize("pick, kept, rows", [("1", "one", 1), ("2", "two", 1), ("", "two", 0)])
def test_compare_keeps_the_one_that_was_picked(start, tokenizer, monkeypatch, tmp_path, pick, kept, rows):
    """Guards: the other answer in the conversation or in the row."""
    repl = start()
    Certain(repl.session, tokenizer, monkeypatch, "one<|im_end|>", "two<|im_end|>")
    assert type_in(repl, "/compare which?", pick) == 0
    assert [message["content"] for message in repl.session.messages] == ["which?", kept]
    file = tmp_path / "data" / "rlhf" / "feedback" / "chat.jsonl"
    written = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    assert len(written) == rows and all(json.loads(line)["chosen"][0]["content"] == kept for line in written)


def test_compare_with_tools_keeps_all_of_the_picked_answer(start, tokenizer, monkeypatch, tmp_path, capsys):
    """Guards: the first answer behind the calls of the second, and a pair whose two answers belong to different prompts."""
    repl = start()
    repl.session.tools = default_tools()
    Certain(repl.session, tokenizer, monkeypatch, "one<|im_end|>", CALL, "two<|im_end|>")
    assert type_in(repl, "/compare which?", "1") == 0
    assert [message["content"] for message in repl.session.messages] == ["which?", "one"]
    assert "nothing is noted" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_a_turn_of_before_the_model_was_changed_can_be_forgotten(start, tokenizer, monkeypatch):
    """Guards: /undo after /model that leaves what was taken back in the memory."""
    repl, other = start(), start()
    Scripted(repl.session, tokenizer, monkeypatch, "fine<|im_end|>")
    repl.obey("memory", "on")
    repl.ask("My dog is called Biscuit.")
    other.session.take_over(repl.session)
    other.session.undo()
    assert repl.memory.list() == []


def test_a_retry_that_fails_keeps_the_answer(start, tokenizer, monkeypatch):
    """Guards: an answer lost for a question that no longer fits."""
    repl = start(context=512)
    Scripted(repl.session, tokenizer, monkeypatch, "fine<|im_end|>")
    repl.ask("hello")
    repl.session.system = "a " * 600
    with pytest.raises(ValueError, match="too long"):
        repl.session.retry()
    assert [message["content"] for message in repl.session.messages] == ["hello", "fine"]


def test_the_users_own_words_ask_and_are_asked(start, tmp_path, capsys, monkeypatch):
    """Guards: changes without consent, consent in Chinese that is not understood, and hints for another program's options."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("hello", encoding="utf-8")
    repl = start(interactive=True)
    repl.console.styled = False
    assert (
        type_in(repl, f"/files {tmp_path / 'papers'}", "/files do delete a.txt", "n", "/files do 删除 a.txt", "是", "好", "/files undo")
        == 0
    )
    shown = capsys.readouterr().out
    assert "Not confirmed" in shown and "can be undone" in shown and "--" not in shown and (tmp_path / "papers" / "a.txt").is_file()
    assert isinstance(repl.files, FileAssistant)


def test_a_path_is_drawn(start, capsys, tmp_path):
    """Guards: a question that is solved otherwise than the settings of the reasoning say, and a picture of nothing."""
    pytest.importorskip("matplotlib")
    repl, picture = start(temperature=0.0), tmp_path / "path.png"
    assert type_in(repl, f"/reasoning picture {picture}") == 1 and "nothing was solved in steps" in capsys.readouterr().err
    repl.failed = False
    repl.session.reasoning = Reasoning(votes=2, budget=4)
    assert type_in(repl, "/reasoning steps hello?", "/reasoning picture", f"/reasoning picture {picture}") == 1
    said = capsys.readouterr()
    assert "Question: hello?" in said.out and "name a file" in said.err and picture.as_posix() in said.err.replace("\\", "/")
    assert picture.read_bytes().startswith(b"\x89PNG") and repl.path is not None and repl.path.question == "hello?"
