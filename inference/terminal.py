"""Where a chat's words come from and go to: the terminal with its history and colours, or a pipe."""

from __future__ import annotations

import contextlib
import locale
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.chat_texts import TEXTS

# What a terminal would obey instead of show: a model's answer must not move the cursor or rename the window.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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
    """Where words go: notices to the terminal, or to standard error when piped, so that a pipe carries the answers."""

    def __init__(self, language: str, interactive: bool) -> None:
        self.index = 0 if language == "zh" else 1
        self.interactive = interactive
        self.styled = interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def text(self, key: str, **values: Any) -> str:
        return TEXTS[key][self.index].format(**values) if values else TEXTS[key][self.index]

    def notice(self, key: str, **values: Any) -> None:
        print(self.text(key, **values), file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.styled else text

    def write(self, text: str) -> None:
        sys.stdout.write(CONTROL_CHARACTERS.sub("", text) if self.interactive else text)
        sys.stdout.flush()


class AnswerView:
    """Shows one reply: the answer as it comes, the thinking folded to one line (in full with show_thinking, never in a
    pipe)."""

    def __init__(self, console: Console, show_thinking: bool) -> None:
        self.console, self.show_thinking = console, show_thinking
        self.thought = 0
        self.folded = True

    def show(self, channel: str, words: str) -> None:
        console = self.console
        if channel == "answer":
            self.end_thinking()
            console.write(words)
            return
        if not console.interactive:
            return
        if self.show_thinking:
            print(console.dim(CONTROL_CHARACTERS.sub("", words)), end="", flush=True)
        elif self.folded and console.styled:
            print(console.dim(console.text("thinking_now")), end="", flush=True)
        self.thought += len(words)
        self.folded = False

    def end_thinking(self) -> None:
        """Fold the line away before the answer begins (or when the reply ends without one)."""
        if self.folded:
            return
        self.folded = True
        if not self.show_thinking:
            erase = "\r\033[K" if self.console.styled else ""
            print(erase + self.console.dim(self.console.text("thought", count=self.thought)), end="")
        print(flush=True)


def make_reader(interactive: bool, commands: Sequence[str]) -> Callable[[str], str]:
    """How lines are read: prompt_toolkit with history when it is there, plain input otherwise, bare lines from a
    pipe. commands: what the completion offers."""
    if not interactive:
        return _read_piped
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):  # gives input() its arrow keys; Windows has none
            import readline  # noqa: F401
        return input
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    file = history_file()
    prompt: Any = PromptSession(
        history=FileHistory(str(file)) if file else InMemoryHistory(),
        key_bindings=bindings,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
    )
    return prompt.prompt


def _read_piped(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def history_file() -> Path | None:
    """Where the typed lines are kept, readable by the user only; None when that place cannot be written."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = base / "smarthaoai" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return None
    return file
