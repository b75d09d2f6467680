"""Talk to a trained model: `python chat.py` (newest finished stage in weight/) or `python chat.py --model weight/sft`.

In a terminal it is a prompt with history and commands (/help). Piped, standard output carries the answers and what
commands were asked to show; everything else goes to standard error:  printf '你好\\nquit\\n' | python chat.py
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.session import ChatSession
from inference.terminal import AnswerView, Console, interface_language, make_reader
from model.adapter_files import is_adapter
from model.files import atomic_write_text
from train.runtime import run_main

WEIGHTS = Path("weight")
THINKING: dict[str, bool | None] = {"auto": None, "on": True, "off": False}
BARE_WORDS = ("clear", "quit", "stream", "help")
COMMANDS = ("/help", "/stream", "/clear", "/system", "/thinking", "/steps", "/adapter", "/save", "/load", "/quit")
NO_ADAPTER = "off"


def newest_stage(weights: Path = WEIGHTS) -> Path | None:
    """The finished model directory to talk to: the newest stage after pretraining, else the newest pretraining."""
    found = [
        file.parent
        for file in weights.glob("*/*model.safetensors")
        if ((file.parent / "config.json").is_file() or is_adapter(file.parent))
        and not file.parent.name.startswith((".", "reward"))
        and not file.parent.name.endswith((".tmp", ".old"))
    ]

    def rank(folder: Path) -> tuple[bool, float]:
        return not folder.name.startswith("pretrain"), max(file.stat().st_mtime for file in folder.glob("*model.safetensors"))

    return max(found, key=rank, default=None)


def known_adapters(weights: Path = WEIGHTS) -> list[str]:
    """Folders of adapters in weight/, whatever base they are for."""
    return sorted(file.parent.as_posix() for file in weights.glob("*/adapter_config.json") if is_adapter(file.parent))


class Repl:
    """The loop of reading a line, and either obeying or answering it."""

    def __init__(self, session: ChatSession, console: Console, streaming: bool, show_thinking: bool) -> None:
        self.session, self.console = session, console
        self.streaming, self.show_thinking = streaming, show_thinking
        self.failed = False
        self.interrupts = 0

    def run(self, read: Callable[[str], str]) -> int:
        """Until the end of input, /quit or a second Ctrl-C. Status 1 when something piped in could not be done."""
        while True:
            try:
                line = self._read_message(read)
                self.interrupts = 0
                if not self._handle(line.strip()):
                    break
            except EOFError:
                if self.console.interactive:
                    print()
                break
            except KeyboardInterrupt:
                if not self.console.interactive:
                    raise
                self.interrupts += 1
                if self.interrupts > 1:
                    print()
                    break
                self.console.notice("again")
        if self.console.interactive:
            self.console.notice("bye")
        return 1 if self.failed and not self.console.interactive else 0

    def _read_message(self, read: Callable[[str], str]) -> str:
        lines = [read(self.console.text("you"))]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(read("... "))
            except EOFError:
                break
        # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer can encode.
        return "\n".join(lines).encode("utf-8", "replace").decode("utf-8").lstrip("\ufeff")

    def _handle(self, line: str) -> bool:
        """Obey or answer one line; False to leave."""
        if line.lower() in BARE_WORDS:
            line = "/" + line.lower()
        if line.startswith("/"):
            command, _, argument = line.partition(" ")
            return self._obey(command.lower(), argument.strip())
        if line:
            self._answer(line)
        return True

    def _fail(self, message: str) -> None:
        self.failed = True
        print(message, file=sys.stdout if self.console.interactive else sys.stderr, flush=True)

    def _answer(self, text: str) -> None:
        console, session = self.console, self.session
        dropped = session.dropped_turns
        try:
            events = session.stream_events(text)
        except ValueError as error:
            self._fail(str(error))
            return
        view = AnswerView(console, self.show_thinking)
        stopped = False
        answer: list[str] = []
        with contextlib.closing(events):  # type: ignore[type-var]
            try:
                for channel, words in events:
                    if channel == "answer" and not self.streaming:
                        answer.append(words)
                    else:
                        view.show(channel, words)
            except KeyboardInterrupt:
                if not console.interactive:
                    raise
                stopped = True
        view.end_thinking()
        console.write("".join(answer) + "\n")
        if stopped:
            self.interrupts = 1
            console.notice("stopped")
        elif session.last is not None and session.last.finish_reason == "length":
            console.notice("length")
        if console.interactive and session.last is not None and session.last.reasoning_steps:
            mean = session.last.reasoning_steps / session.last.completion_tokens
            print(console.dim(console.text("steps_used", mean=mean, steps=session.model.reasoning_steps)))
        if session.dropped_turns > dropped:
            console.notice("dropped", count=session.dropped_turns)

    def _obey(self, command: str, argument: str) -> bool:
        console, session = self.console, self.session
        if command == "/quit":
            return False
        if command == "/help":
            console.write(console.text("help") + "\n")
        elif command == "/stream":
            self.streaming = not self.streaming
            console.notice("stream_on" if self.streaming else "stream_off")
        elif command == "/clear":
            session.reset()
            console.notice("cleared")
        elif command == "/system":
            self._system(argument)
        elif command == "/thinking":
            self._thinking(argument.lower())
        elif command == "/adapter":
            self._adapter(argument)
        elif command == "/steps":
            self._steps(argument)
        elif command in ("/save", "/load"):
            self._file(command, argument)
        else:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            nearest = console.text("nearest", name=close[0]) if close else ""
            self._fail(console.text("unknown", command=command, nearest=nearest, known=" ".join(COMMANDS)))
        return True

    def _system(self, text: str) -> None:
        session = self.session
        if text == "clear":
            session.system = ""
            self.console.notice("system_off")
        elif text:
            session.system = text
            self.console.notice("system_set")
        elif session.system:
            self.console.notice("system_is", text=session.system)
        else:
            self.console.notice("system_none")

    def _thinking(self, value: str) -> None:
        if value and value not in THINKING:
            self._fail(self.console.text("thinking_bad", value=value))
            return
        if value:
            self.session.enable_thinking = THINKING[value]
        current = next(name for name, setting in THINKING.items() if setting is self.session.enable_thinking)
        self.console.notice("thinking_is", value=current)

    def _adapter(self, name: str) -> None:
        """Show the adapter in use, or switch: a folder, the name of one in weight/, or off."""
        console, session = self.console, self.session
        if name:
            path = Path(name).expanduser()
            try:
                session.use_adapter(None if name == NO_ADAPTER else path if path.exists() else WEIGHTS / name)
            except FileNotFoundError as error:
                known = " ".join([*known_adapters(), NO_ADAPTER])
                self._fail(console.text("adapter_missing", reason=error, known=known))
                return
            except ValueError as error:
                self._fail(str(error))
                return
        console.notice("adapter_is", name=session.adapter or NO_ADAPTER, known=" ".join([*known_adapters(), NO_ADAPTER]))

    def _steps(self, value: str) -> None:
        model = self.session.model
        if model.reasoning is None:
            self._fail(self.console.text("steps_none"))
            return
        steps, _, halt = value.partition(" ")
        try:
            model.set_reasoning(int(steps) if steps else None, float(halt) if halt else None)
        except ValueError:
            self._fail(self.console.text("steps_bad", value=value))
            return
        show_steps(self.session, self.console)

    def _file(self, command: str, name: str) -> None:
        if not name:
            self._fail(self.console.text("file_missing", command=command))
            return
        path = Path(name).expanduser()
        try:
            (self._save if command == "/save" else self._load)(path)
        except FileNotFoundError:
            self._fail(self.console.text("no_file", path=path))
        except OSError as error:
            self._fail(str(error))
        except (ValueError, KeyError, TypeError) as error:
            self._fail(self.console.text("not_chat", path=path, reason=error))

    def _save(self, path: Path) -> None:
        if path.exists():
            try:
                read_conversation(path)
            except (ValueError, KeyError, TypeError):
                self._fail(self.console.text("foreign", path=path))
                return
        session = self.session
        system = [{"role": "system", "content": session.system}] if session.system else []
        messages = system + session.messages
        atomic_write_text(path, json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n")
        self.console.notice("saved", count=len(messages), path=path)

    def _load(self, path: Path) -> None:
        messages = read_conversation(path)
        self.session.load_messages(messages)
        self.console.notice("loaded", count=len(messages), path=path)


def show_steps(session: ChatSession, console: Console) -> None:
    """How many steps the reasoning head takes; nothing for a model without one."""
    model = session.model
    if model.reasoning is not None:
        console.notice("steps_halt" if model.reasoning_halt else "steps_all", steps=model.reasoning_steps, halt=model.reasoning_halt)


def read_conversation(path: Path) -> list[Any]:
    """The messages of a saved conversation. KeyError, TypeError or ValueError when the file is something else."""
    return list(json.loads(path.read_text(encoding="utf-8-sig"))["messages"])


def make_parser(text: Callable[[str], str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description=text("about"), add_help=False)
    parser.add_argument("-h", "--help", action="help", help=text("opt_help"))
    parser.add_argument("--model", metavar="DIR", help=text("opt_model"))
    parser.add_argument("--system", metavar="TEXT", default="", help=text("opt_system"))
    parser.add_argument("--temperature", type=float, help=text("opt_temperature"))
    parser.add_argument("--top-k", type=int, help=text("opt_top_k"))
    parser.add_argument("--top-p", type=float, help=text("opt_top_p"))
    parser.add_argument("--repetition-penalty", type=float, help=text("opt_repetition"))
    parser.add_argument("--max-new-tokens", type=int, help=text("opt_max"))
    parser.add_argument("--seed", type=int, help=text("opt_seed"))
    parser.add_argument("--lang", choices=("zh", "en"), help=text("opt_lang"))
    parser.add_argument("--no-stream", action="store_true", help=text("opt_no_stream"))
    parser.add_argument("--thinking", choices=tuple(THINKING), default="auto", help=text("opt_thinking"))
    parser.add_argument("--show-thinking", action="store_true", help=text("opt_show"))
    parser.add_argument("--reasoning-steps", type=int, metavar="N", help=text("opt_steps"))
    parser.add_argument("--reasoning-halt", type=float, metavar="P", help=text("opt_halt"))
    parser.add_argument("--device", help=text("opt_device"))
    return parser


def main() -> int:
    # The language decides in which words mistakes on the command line are explained, so it is read first.
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--lang", choices=("zh", "en"))
    language = early.parse_known_args()[0].lang or interface_language()
    console = Console(language, interactive=sys.stdin.isatty() and sys.stdout.isatty())
    arguments = make_parser(console.text).parse_args()
    path = Path(arguments.model) if arguments.model else newest_stage()
    if path is None:
        raise FileNotFoundError(console.text("none"))

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    session = ChatSession.from_pretrained(
        arguments.model or path,
        device=arguments.device,
        system=arguments.system,
        enable_thinking=THINKING[arguments.thinking],
        reasoning_steps=arguments.reasoning_steps,
        reasoning_halt=arguments.reasoning_halt,
        **given,
    )
    if not arguments.model:
        console.notice("found", path=path.as_posix())
        if path.name.startswith("pretrain"):
            console.notice("base")
    if console.interactive:
        size = session.model.num_parameters() / 1e6
        console.notice("ready", path=path.as_posix(), size=size, device=session.engine.device)
        show_steps(session, console)
    repl = Repl(session, console, streaming=not arguments.no_stream, show_thinking=arguments.show_thinking)
    return repl.run(make_reader(console.interactive, COMMANDS))


if __name__ == "__main__":
    run_main(main)
