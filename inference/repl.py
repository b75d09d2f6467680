"""The loop of a chat: read a message, and either obey or answer it. What the commands do is in `inference.commands`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.commands import BARE_WORDS, COMMANDS, nearest_commands
from inference.feedback import Feedback
from inference.file_assistant import FileAssistant
from inference.memory import ConversationMemory
from inference.prompts import SmartPromptEngineer
from inference.reply import Event
from inference.session import ChatSession
from inference.terminal import YES, AnswerView, Console, Reader

if TYPE_CHECKING:
    from inference.reasoning import ReasoningPath

BLOCK = '"""'
_COMMAND = re.compile(r"/[A-Za-z]+(?!\S)")  # a path such as /home/me is something to talk about


class Repl:
    """One conversation at a terminal or in a pipe."""

    def __init__(
        self,
        session: ChatSession,
        console: Console,
        streaming: bool = True,
        show_thinking: bool = False,
        *,
        model: Path = Path("model"),
        open_session: Callable[[Path], ChatSession] | None = None,
        weights: Path = Path("weight"),
        memory_file: str | Path = ":memory:",
        feedback_folder: str | Path = "training_data",
        templates: SmartPromptEngineer | None = None,
    ) -> None:
        """model: the folder that answers; open_session: loads another one; weights: where short names of models and adapters are
        looked for; memory_file: made when the memory is first switched on and told something."""
        self.session, self.console = session, console
        session.prompts = SmartPromptEngineer(lang=console.language) if templates is None else templates
        self.streaming, self.show_thinking = streaming, show_thinking
        self.model, self.open_session, self.weights = model, open_session, weights
        self.memory = ConversationMemory(memory_file, enabled=False)
        self.feedback = Feedback(feedback_folder, model.as_posix())
        self.files: FileAssistant | None = None
        self.path: ReasoningPath | None = None  # of the last question that was solved in steps
        self.read: Reader = _nothing_to_read
        self.failed = False
        self.interrupts = 0
        self._view: AnswerView | None = None

    def run(self, read: Reader) -> int:
        """Until the end of input, /quit or a second Ctrl-C. Status 1 when something piped in could not be done."""
        self.read = read
        while True:
            try:
                message = self.read_message()
                self.interrupts = 0
                if not self.handle(message.strip()):
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
        return self.close()

    def close(self) -> int:
        """Let go of the files; returns the exit status."""
        self.memory.close()
        return 1 if self.failed and not self.console.interactive else 0

    def read_message(self, prompt: str | None = None, default: str = "") -> str:
        """One message: a line, lines that end with a backslash and the one after them, or all between two \"\"\"."""
        text = self.read(self.console.text("you") if prompt is None else prompt, default=default)
        with contextlib.suppress(EOFError):
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self.read("... ")
            if text.lstrip().startswith(BLOCK):
                text = text.lstrip()
                while len(text) < 2 * len(BLOCK) or not text.rstrip().endswith(BLOCK):
                    text += "\n" + self.read("... ")
                text = text.rstrip()[len(BLOCK) : -len(BLOCK)].strip("\n")
        # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer can encode.
        return text.encode("utf-8", "replace").decode("utf-8").lstrip("\ufeff")

    def agrees(self, question: str) -> bool:
        """Whether the user says yes; nobody in a pipe does."""
        if not self.console.interactive:
            return False
        if self._view is not None:  # a tool asks in mid-answer
            self._view.pause()
        return self.read(f"{self.console.clean(question)} {self.console.text('yes_no')} ").strip().lower() in YES

    def handle(self, message: str) -> bool:
        """Obey or answer one message; False to leave."""
        if message.lower() in BARE_WORDS:
            message = "/" + message.lower()
        if message == "/?":
            message = "/help"
        if "\n" not in message and _COMMAND.match(message):
            name, _, argument = message.partition(" ")
            return self.obey(name[1:].lower(), argument.strip())
        if message:
            self.ask(message)
        return True

    def ask(self, text: str) -> bool:
        """Answer a text that is no command, whatever it looks like."""
        return self.answer(lambda: self.session.stream_events(text))

    def obey(self, name: str, argument: str) -> bool:
        """Run one command; False to leave."""
        command = COMMANDS.get(name)
        if command is None:
            near = nearest_commands(name)
            hint = self.console.text("nearest", name=" ".join(near)) if near else ""
            self.fail(self.console.text("unknown", command=f"/{name}", nearest=hint))
            return True
        try:
            return command.run(self, argument) is not False
        except (ValueError, OSError) as error:
            self.fail(str(error))
            return True

    def fail(self, message: str) -> None:
        """Tell of something that could not be done."""
        self.failed = True
        if self.console.as_json:
            self.console.write_json({"error": message})
        self.console.say(message)

    # ---------------------------------------------------------------- answers

    def answer(self, ask: Callable[[], Iterable[Event]]) -> bool:
        """Show the reply to what `ask` asks, and what there is to say about it; False when it failed or was stopped."""
        console, session = self.console, self.session
        dropped = session.dropped_turns
        if session.reasoning is not None and session.reasoning.votes > 1:
            console.remark(console.text("voting", votes=session.reasoning.votes))
        try:
            stopped = self.show(ask())
        except (ValueError, OSError) as error:
            self.fail(str(error))
            return False
        except RuntimeError as error:  # torch, out of memory most of all: the conversation is worth keeping
            self.fail(f"{type(error).__name__}: {error}")
            return False
        if console.as_json:
            self._write_json()
        elif stopped:
            console.notice("stopped")
        elif session.last is not None and session.last.finish_reason == "length":
            console.notice("length")
        console.remark(self.figures())
        if session.dropped_turns > dropped:
            console.notice("dropped", count=session.dropped_turns)
        return not stopped

    def show(self, events: Iterable[Event]) -> bool:
        """Show a reply; True when Ctrl-C stopped it, which leaves the session as it is then."""
        console = self.console
        view = self._view = AnswerView(console, self.show_thinking)
        stopped = False
        answer: list[str] = []
        try:
            for channel, words in events:
                if channel == "answer" and (not self.streaming or console.as_json):
                    answer.append(words)
                else:
                    view.show(channel, words)
        except KeyboardInterrupt:
            if not console.interactive:
                raise
            stopped, self.interrupts = True, 1
        except BaseException:
            if not view.empty:
                view.finish()
            raise
        finally:
            self._view = None
            if hasattr(events, "close"):
                events.close()
        if not console.as_json:
            if answer:
                view.show("answer", "".join(answer))
            view.finish()
        return stopped

    def figures(self) -> str:
        """One line about the last reply."""
        session, text = self.session, self.console.text
        last = session.last
        if last is None:
            return ""
        parts = [text("figures", tokens=last.completion_tokens, rate=last.tokens_per_second, seconds=last.seconds)]
        if last.reasoning_steps:
            mean = last.reasoning_steps / last.completion_tokens
            parts.append(text("steps_used", mean=mean, steps=session.model.reasoning_steps))
        if last.confidence is not None:
            parts.append(text("confidence", share=last.confidence))
        if len(last.votes) > 1:
            parts.append(text("votes", votes=", ".join(f"{answer} ×{count}" for answer, count in last.votes.items())))
        if last.template:
            parts.append(text("template_used", name=last.template, reason=last.reason))
        return " · ".join(parts)

    def status(self) -> str:
        """One line about what is on."""
        session, text = self.session, self.console.text
        parts = [self.model.name if session.adapter is None else f"{self.model.name}+{Path(session.adapter).name}"]
        if session.enable_thinking is not None:
            parts.append(text("status_thinking_on" if session.enable_thinking else "status_thinking_off"))
        if session.reasoning is not None:
            parts.append(text("status_reasoning", votes=session.reasoning.votes))
        if session.memory is not None:
            parts.append(text("status_memory", profile=session.memory.profile))
        if session.template is not None:
            parts.append(text("status_template", name=session.template))
        if session.tools is not None:
            parts.append(text("status_tools", count=len(session.tools.names())))
        if not self.streaming:
            parts.append(text("status_whole"))
        if session.last is not None:
            last = session.last
            parts.append(f"{last.prompt_tokens + last.completion_tokens}/{session.engine.context}")
            parts.append(text("status_rate", rate=last.tokens_per_second))
        return " · ".join(parts)

    def _write_json(self) -> None:
        last = self.session.last
        if last is None:
            return
        usage = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens, "reused_tokens": last.reused_tokens}
        row: dict[str, Any] = {"answer": last.text, "thinking": last.reasoning, "finish_reason": last.finish_reason}
        if last.confidence is not None:
            row |= {"confidence": last.confidence, "votes": last.votes}
        self.console.write_json({**row, "usage": usage, "seconds": round(last.seconds, 3)})


def _nothing_to_read(prompt: str, default: str = "") -> str:
    raise EOFError
