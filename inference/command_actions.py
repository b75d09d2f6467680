"""What the commands of a chat do; `inference.commands` is the table that names and explains them.

Each takes the chat and what was written behind the command. It returns False to leave, and raises ValueError or OSError, with the
message for the user, for what cannot be done.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.command_switches import OFF, make_toolbox, named_file, show_steps, switch
from inference.loading import known_adapters
from inference.session import RETRY_TEMPERATURE
from model.checkpoint import find_model

if TYPE_CHECKING:
    from inference.repl import Repl

NOT_SET = ("grammar", "n", "logprobs", "top_logprobs")
"""Sampling settings that are not for a conversation."""


# ---------------------------------------------------------------- the chat


def quit(repl: Repl, argument: str) -> bool:
    return False


def clear(repl: Repl, argument: str) -> None:
    repl.session.reset()
    repl.console.notice("cleared")


def stream(repl: Repl, argument: str) -> None:
    repl.streaming = switch(argument, repl.streaming)
    repl.console.notice("stream_on" if repl.streaming else "stream_off")


def system(repl: Repl, text: str) -> None:
    session, console = repl.session, repl.console
    if text == "clear":
        session.system = ""
        console.notice("system_off")
    elif text:
        session.system = text
        console.notice("system_set")
    elif session.system:
        console.notice("system_is", text=session.system)
    else:
        console.notice("system_none")


def change(repl: Repl, argument: str) -> None:
    """Show or change a sampling setting."""
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    session, console = repl.session, repl.console
    known = [field.name for field in dataclasses.fields(session.settings) if field.name not in NOT_SET]
    if name and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = console.text("nearest", name=near[0]) if near else ""
        raise ValueError(console.text("set_bad", name=name, nearest=hint, known=", ".join(known)))
    if value:
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        session.settings = dataclasses.replace(session.settings, **{name: given})
    shown = (f"{entry}={getattr(session.settings, entry)}" for entry in ([name] if name else known))
    console.tell(console.wrapped("  ".join(shown)))


def save(repl: Repl, name: str) -> None:
    path = named_file(repl, "save", name)
    repl.console.notice("saved", count=repl.session.save(path), path=path)


def load(repl: Repl, name: str) -> None:
    path = named_file(repl, "load", name)
    if not path.exists():
        raise FileNotFoundError(repl.console.text("no_file", path=path))
    session = repl.session
    had_memory = session.memory is not None
    count = session.load(path, repl.memory)
    repl.memory.enabled = session.memory is not None
    session.tools = session.tools and make_toolbox(repl)
    repl.console.notice("loaded", count=count, path=path)
    if repl.memory.enabled and not had_memory:
        repl.console.notice("memory_on", file=repl.memory.path or ":memory:", profile=repl.memory.profile)
    repl.console.remark(repl.status())


def summary(repl: Repl, argument: str) -> None:
    words = repl.session.summary()
    if repl.console.as_json:
        repl.console.tell("".join(words))
    else:
        repl.show(("answer", piece) for piece in words)


# ---------------------------------------------------------------- the last answer


def retry(repl: Repl, argument: str) -> None:
    if repl.session.settings.greedy:
        repl.console.remark(repl.console.text("retry_greedy", temperature=RETRY_TEMPERATURE))
    repl.answer(repl.session.retry)


def undo(repl: Repl, argument: str) -> None:
    repl.console.notice("undone", text=repl.session.undo())


def edit(repl: Repl, text: str) -> None:
    questions = [message["content"] for message in repl.session.messages if message["role"] == "user"]
    if not text:
        if not repl.console.interactive:
            raise ValueError(repl.console.text("edit_missing"))
        text = repl.read_message(default=questions[-1] if questions else "").strip()
    if not text:
        return
    if questions:
        repl.session.undo()
    repl.answer(lambda: repl.session.stream_events(text))


def _source(repl: Repl) -> dict[str, Any]:
    """What the verdict is about, beside the answer itself."""
    session = repl.session
    settings = dataclasses.asdict(dataclasses.replace(session.settings, grammar=None))
    tools = None if session.tools is None else session.tools.schemas()
    return {"tools": tools, "adapter": session.adapter, "thinking": session.enable_thinking, "settings": settings}


def good(repl: Repl, argument: str) -> None:
    prompt, answer = repl.session.prompt_of_answer()
    _thank(repl, repl.feedback.good(prompt, answer, **_source(repl)))


def bad(repl: Repl, better: str) -> None:
    prompt, answer = repl.session.prompt_of_answer()
    _thank(repl, repl.feedback.bad(prompt, answer, better, **_source(repl)))


def _thank(repl: Repl, files: list[Path]) -> None:
    repl.console.notice("feedback", files=" ".join(file.as_posix() for file in files))


def compare(repl: Repl, question: str) -> None:
    """Two answers to one question, of which the user keeps the better one."""
    session, console = repl.session, repl.console
    if question:
        console.notice("answer_number", number=1)
        if not repl.answer(lambda: session.stream_events(question)):
            return
    prompt, first = session.prompt_of_answer()
    if not question and console.interactive:
        console.notice("answer_number", number=1)
        console.tell(first["content"])
    kept = list(session.messages)
    console.notice("answer_number", number=2)
    if not repl.answer(session.retry):
        return
    second_prompt, second = session.prompt_of_answer()
    if first == second:
        console.notice("compare_same")
        return
    picked = repl.read(console.text("compare_pick")).strip()
    if picked not in ("1", "2"):
        console.notice("compare_none")
        return
    if picked == "1":
        session.messages[:] = kept
    if prompt != second_prompt:  # tools told the two answers different things
        console.notice("compare_calls")
        return
    chosen, rejected = (first, second) if picked == "1" else (second, first)
    _thank(repl, repl.feedback.better(prompt, chosen, rejected, **_source(repl)))


# ---------------------------------------------------------------- models


def model(repl: Repl, name: str) -> None:
    """Go on with another model in the same conversation."""
    session, console = repl.session, repl.console
    if name:
        if repl.open_session is None:
            raise ValueError(console.text("model_fixed"))
        path = Path(name).expanduser()
        path = path if path.exists() or not (repl.weights / name).exists() else repl.weights / name
        find_model(path)  # the right message before anything is loaded
        new = repl.open_session(path)
        new.take_over(session)
        repl.session, repl.model, repl.feedback.model = new, path, path.as_posix()
    size = repl.session.model.config.account().parameters / 1e6
    console.notice("ready", path=repl.model.as_posix(), size=size, device=repl.session.engine.device)
    show_steps(repl)


def adapter(repl: Repl, name: str) -> None:
    """Show the adapter in use, or switch: a folder, the name of one in weight/, or off."""
    session, console = repl.session, repl.console
    known = " ".join([*known_adapters(repl.weights), OFF])
    if name:
        path = Path(name).expanduser()
        try:
            session.use_adapter(None if name == OFF else path if path.exists() else repl.weights / name)
        except FileNotFoundError as error:
            raise FileNotFoundError(console.text("adapter_missing", reason=error, known=known)) from error
    console.notice("adapter_is", name=session.adapter or OFF, known=known)
