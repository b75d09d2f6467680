"""Where a chat's words come from and go to: the terminal with its history and colours, or a pipe."""

from __future__ import annotations

import contextlib
import json
import locale
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from inference.chat_texts import TEXTS
from inference.markdown import MarkdownStream, fit_cells, wrapped

# What a terminal would obey instead of show: a model's answer must not move the cursor or rename the window.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COUNTER_SECONDS = 0.1
YES = ("yes", "y", "是", "好", "确定")


def interface_language(environment: Any = os.environ) -> str:
    """zh or en, by the locale of the environment."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            break
    else:
        name = ""
    value = environment.get(name) or locale.getlocale()[0] or ""
    return "zh" if value.lower().startswith(("zh", "chinese")) else "en"


class Console:
    """Where words go: answers to standard output, notices beside them in a terminal and to standard error otherwise, so that a pipe
    carries the answers. As json, answers are objects, one a line, and what commands show is a notice, too."""

    def __init__(self, language: str, interactive: bool, as_json: bool = False) -> None:
        self.language: Literal["zh", "en"] = "zh" if language == "zh" else "en"
        self.index = 0 if language == "zh" else 1
        self.interactive, self.as_json = interactive, as_json
        self.styled = interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" and _obeys_escapes()

    def text(self, key: str, **values: Any) -> str:
        return TEXTS[key][self.index].format(**values) if values else TEXTS[key][self.index]

    def notice(self, key: str, **values: Any) -> None:
        self.say(self.text(key, **values))

    def say(self, line: str) -> None:
        """A remark beside the conversation."""
        print(self.wrapped(self.clean(line)), file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def remark(self, line: str) -> None:
        """A remark that only someone at the terminal wants."""
        if self.interactive:
            print(self.dim(self.wrapped(self.clean(line))), flush=True)

    def tell(self, text: str) -> None:
        """What a command was asked to show."""
        print(self.clean(text), file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def write_json(self, value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)

    def wrapped(self, text: str) -> str:
        """Broken between words, where somebody reads it in a terminal."""
        return wrapped(text, shutil.get_terminal_size().columns) if self.interactive else text

    def dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.styled else text

    def clean(self, text: str) -> str:
        return CONTROL_CHARACTERS.sub("", text) if self.interactive else text

    def write(self, text: str) -> None:
        sys.stdout.write(self.clean(text))
        sys.stdout.flush()


def _obeys_escapes() -> bool:
    """Whether the terminal understands colours; that of Windows has to be asked to."""
    if sys.platform != "win32":
        return True
    import ctypes

    kernel = ctypes.windll.kernel32
    output, mode = kernel.GetStdHandle(-11), ctypes.c_ulong()
    return bool(kernel.GetConsoleMode(output, ctypes.byref(mode)) and kernel.SetConsoleMode(output, mode.value | 4))


class AnswerView:
    """Shows one reply: the answer as it comes, as Markdown where the terminal has colours; the thinking folded to one line (in full
    with show_thinking), and calls of tools in one line each. In a pipe the answer alone."""

    def __init__(self, console: Console, show_thinking: bool) -> None:
        self.console, self.show_thinking = console, show_thinking
        self.thought = 0
        self.folded = True
        self.empty = True
        """Whether nothing was shown yet."""
        self._counted = 0.0
        self._markdown = MarkdownStream(shutil.get_terminal_size().columns) if console.styled else None

    def show(self, channel: str, words: str) -> None:
        console = self.console
        self.empty = False
        if channel == "reasoning":
            self._think(words)
            return
        self.end_thinking()
        if channel == "tool":
            console.remark(fit_cells(f"⚙ {words}", 3 * shutil.get_terminal_size().columns))
        elif self._markdown is None:
            console.write(words)
        else:
            sys.stdout.write(self._markdown.push(console.clean(words)))
            sys.stdout.flush()

    def _think(self, words: str) -> None:
        if not self.console.interactive:
            return
        now = time.perf_counter()
        self.folded = False
        self.thought += len(words)
        if self.show_thinking:
            print(self.console.dim(self.console.clean(words)), end="", flush=True)
        elif self.console.styled and now - self._counted > COUNTER_SECONDS:
            self._counted = now
            print("\r" + self.console.dim(self.console.text("thinking_now", count=self.thought)), end="", flush=True)

    def end_thinking(self) -> None:
        """Fold the line away before the answer begins (or when the reply ends without one)."""
        if self.folded:
            return
        self.folded = True
        if not self.show_thinking:
            erase = "\r\033[K" if self.console.styled else ""
            print(erase + self.console.dim(self.console.text("thought", count=self.thought)), end="")
        print(flush=True)

    def pause(self) -> None:
        """Something else is shown in between, from the beginning of a line."""
        self.end_thinking()
        if self._markdown is not None:
            shown = self._markdown.finish()
            self._markdown = MarkdownStream(shutil.get_terminal_size().columns)
            sys.stdout.write(shown)
        self.console.write("\n")

    def finish(self) -> None:
        """The reply is over."""
        self.pause()


class Reader(Protocol):
    """Reads one message: read(prompt, default="") -> text. EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    def __call__(self, prompt: str, default: str = "") -> str: ...


def make_reader(interactive: bool, commands: Mapping[str, Sequence[str]], status: Callable[[], str] = str) -> Reader:
    """How messages are read: prompt_toolkit with history and a status line when it is there, plain input otherwise, bare lines from
    a pipe. commands: for the completion, each with the words that may follow."""
    if not interactive:
        return _read_piped
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):  # gives input() its arrow keys; Windows has none
            import readline  # noqa: F401
        return lambda prompt, default="": input(prompt)
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            command, space, typed = document.text_before_cursor.partition(" ")
            words = commands.get(command, ()) if space else tuple(commands)
            typed = typed if space else command
            return [
                Completion(word, start_position=-len(typed)) for word in words if typed and word.startswith(typed) or space and not typed
            ]

    file = history_file()
    session: Any = PromptSession(
        history=FileHistory(str(file)) if file else InMemoryHistory(),
        key_bindings=bindings,
        completer=Commands(),
        complete_while_typing=False,
        bottom_toolbar=lambda: fit_cells(status(), shutil.get_terminal_size().columns) or None,
    )
    return lambda prompt, default="": session.prompt(prompt, default=default)


def _read_piped(prompt: str, default: str = "") -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def state_folder() -> Path:
    """Where what belongs to this user is kept between chats."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "smarthaoai"


def history_file() -> Path | None:
    """Where the typed lines are kept, readable by the user only; None when that place cannot be written."""
    file = state_folder() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return None
    return file
