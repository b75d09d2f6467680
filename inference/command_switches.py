"""What can be switched on in a chat, and how: thinking, reasoning, memory, templates, tools, files. See `inference.command_actions`."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from inference.choices import THINKING
from inference.file_assistant import FileAssistant
from inference.reply import Reasoning
from inference.session import AUTO
from inference.toolbox import Toolbox, default_tools

if TYPE_CHECKING:
    from inference.repl import Repl

OFF = "off"
MOST_OF_CONTEXT = 7 / 8  # that the description of tools may take


def switch(value: str, now: bool) -> bool:
    """on, off, or nothing: the other way. ValueError for anything else."""
    if value not in ("", "on", OFF):
        raise ValueError(f"expected on or off, got {value!r}")
    return value == "on" if value else not now


def named_file(repl: Repl, command: str, name: str) -> Path:
    """The path that was written behind a command. ValueError when there is none."""
    if not name:
        raise ValueError(repl.console.text("file_missing", command=f"/{command}"))
    return Path(name).expanduser()


def _first_word(argument: str) -> tuple[str, str]:
    word, _, rest = argument.partition(" ")
    return word.lower(), rest.strip()


# ---------------------------------------------------------------- thinking and reasoning


def thinking(repl: Repl, value: str) -> None:
    value = value.lower()
    if value and value not in THINKING:
        raise ValueError(repl.console.text("thinking_bad", value=value))
    if value:
        repl.session.enable_thinking = THINKING[value]
    current = next(name for name, setting in THINKING.items() if setting is repl.session.enable_thinking)
    repl.console.notice("thinking_is", value=current)


def think(repl: Repl, value: str) -> None:
    """Show the thinking in full or folded; alone: that of the last answer."""
    if value not in ("", "show", "fold"):
        raise ValueError(repl.console.text("think_bad", value=value))
    if value:
        repl.show_thinking = value == "show"
        repl.console.notice("think_show" if repl.show_thinking else "think_fold")
    else:
        last = repl.session.last
        shown = last.reasoning if last is not None and last.reasoning else repl.console.text("think_none")
        repl.console.tell(repl.console.wrapped(shown))


def reasoning(repl: Repl, argument: str) -> None:
    session, console = repl.session, repl.console
    word, rest = _first_word(argument)
    now = session.reasoning or Reasoning()
    if word in ("", "on", OFF):
        session.reasoning = now if switch(word, session.reasoning is not None) else None
    elif word == "votes":
        session.reasoning = dataclasses.replace(now, votes=_count(rest, "votes", 64))
    elif word == "budget":
        session.reasoning = dataclasses.replace(now, budget=None if rest == OFF else _count(rest, "budget", 1 << 20))
    elif word == "calculator":
        session.reasoning = dataclasses.replace(now, calculator=switch(rest, now.calculator))
    elif word == "steps":
        _solve(repl, rest)
        return
    elif word == "picture":
        if repl.path is None:
            raise ValueError(console.text("reasoning_no_path"))
        console.notice("reasoning_picture", path=repl.path.picture(named_file(repl, "reasoning picture", rest)))
        return
    else:
        raise ValueError(console.text("reasoning_bad", value=word))
    if session.reasoning is None:
        console.notice("reasoning_off")
    else:
        how = session.reasoning
        budget = OFF if how.budget is None else how.budget
        console.notice("reasoning_on", votes=how.votes, budget=budget, calculator="on" if how.calculator else OFF)


def _solve(repl: Repl, question: str) -> None:
    from inference.reasoning import MultiStepReasoning

    if not question:
        raise ValueError(repl.console.text("reasoning_question"))
    how, thinking = repl.session.reasoning or Reasoning(), repl.session.enable_thinking
    solver = MultiStepReasoning(repl.session.engine, samples=how.votes, thinking=thinking, budget=how.budget, calculator=how.calculator)
    repl.console.remark(repl.console.text("solving"))
    repl.path = solver.solve(question, lambda step: repl.console.remark(f"✓ {step.title}"))
    repl.console.tell(repl.path.text(width=min(100, shutil.get_terminal_size((100, 24)).columns)))


def _count(value: str, name: str, most: int) -> int:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
    return int(value)


def steps(repl: Repl, value: str) -> None:
    model = repl.session.model
    if model.reasoning is None:
        raise ValueError(repl.console.text("steps_none"))
    steps, _, halt = value.partition(" ")
    try:
        model.set_reasoning(int(steps) if steps else None, float(halt) if halt else None)
    except ValueError as error:
        raise ValueError(repl.console.text("steps_bad", value=value)) from error
    show_steps(repl)


def show_steps(repl: Repl) -> None:
    """How many steps the reasoning head takes; nothing for a model without one."""
    model = repl.session.model
    if model.reasoning is not None:
        key = "steps_halt" if model.reasoning_halt else "steps_all"
        repl.console.notice(key, steps=model.reasoning_steps, halt=model.reasoning_halt)


# ---------------------------------------------------------------- memory, prompts, tools


def memory(repl: Repl, argument: str) -> None:
    memory, session, console = repl.memory, repl.session, repl.console
    word, rest = _first_word(argument)
    if word in ("", "on", OFF):
        memory.enabled = switch(word, session.memory is not None)
        session.memory = memory if memory.enabled else None
        console.notice("memory_on" if memory.enabled else "memory_off", file=memory.path or ":memory:", profile=memory.profile)
        if session.tools is not None:
            _offer(repl, make_toolbox(repl))
    elif word == "list":
        rows = [f"{entry.id:>5}  {entry.importance:.2f}  {entry.role}: {entry.text}" for entry in memory.list(rest or None)]
        console.tell("\n".join(rows) or console.text("memory_empty"))
    elif word == "forget":
        memory.forget(_count(rest, "the number of a memory", 1 << 60))
        console.notice("memory_forgot", number=rest)
    elif word == "edit":
        number, _, text = rest.partition(" ")
        console.tell(memory.edit(_count(number, "the number of a memory", 1 << 60), text).text)
    elif word == "profile":
        memory.profile = rest or memory.profile
        console.notice("memory_profile", name=memory.profile, known=" ".join(memory.profiles()) or "-")
    elif word == "erase":
        # A pipe cannot be asked, and who writes the command into one means it.
        if not console.interactive or repl.agrees(console.text("memory_sure", profile=memory.profile)):
            console.notice("memory_erased", count=memory.erase())
    elif word == "export":
        path = named_file(repl, "memory export", rest)
        console.notice("memory_exported", count=memory.export(path), path=path)
    else:
        raise ValueError(console.text("memory_bad", value=word))


def template(repl: Repl, argument: str) -> None:
    session, console = repl.session, repl.console
    word = argument.lower()
    names = {name.lower(): name for name in session.prompts.templates}
    if word == "list":
        rows = [f"  {name}  {template.description[console.language]}" for name, template in session.prompts.templates.items()]
        console.tell("\n".join(rows))
        return
    if word in ("", "on", OFF, AUTO):
        session.template = AUTO if word == AUTO or switch(word, session.template is not None) else None
    elif word in names:
        session.template = names[word]
    else:
        near = difflib.get_close_matches(word, [*names, "list", AUTO, OFF], n=1)
        hint = console.text("nearest", name=near[0]) if near else ""
        raise ValueError(console.text("template_bad", value=argument, nearest=hint, known=" ".join([*names.values(), AUTO, OFF])))
    console.notice("template_off" if session.template is None else "template_is", name=session.template)


def auto(repl: Repl, argument: str) -> None:
    on = switch(argument.lower(), repl.session.template == AUTO)
    template(repl, AUTO if on else OFF)


def rag(repl: Repl, argument: str) -> None:
    raise ValueError(repl.console.text("rag"))


def tools(repl: Repl, argument: str) -> None:
    session, console = repl.session, repl.console
    toolbox = session.tools or make_toolbox(repl)
    if argument == "list":
        schemas = [schema["function"] for schema in toolbox.schemas()]
        console.tell("\n".join(f"  {tool['name']}  {tool['description']}" for tool in schemas))
        return
    if switch(argument, session.tools is not None):
        _offer(repl, toolbox)
        console.notice("tools_on", names=" ".join(toolbox.names()))
    else:
        session.tools = None
        console.notice("tools_off", names=" ".join(toolbox.names()))


def files(repl: Repl, argument: str) -> None:
    """Let the model work on the files of a folder; or work on them by a sentence, take it back, look at the log."""
    console = repl.console
    word, rest = _first_word(argument)
    if repl.files is not None and word in ("do", "undo", "log", OFF):
        if word == "do":
            plan = repl.files.plan(rest)
            console.tell(repl.files.preview(plan))
            if plan.changes:
                console.tell(repl.files.apply(plan, repl.agrees).text)
        elif word == "undo":
            console.tell(repl.files.undo().text)
        elif word == "log":
            console.tell(repl.files.log_text())
        else:
            repl.files = None
            repl.session.tools = repl.session.tools and make_toolbox(repl)
            console.notice("files_off")
        return
    if argument or repl.files is None:
        repl.files = FileAssistant(named_file(repl, "files", argument), language=console.language, confirm=repl.agrees)
    console.notice("files_on", root=repl.files.root.path)
    try:
        _offer(repl, make_toolbox(repl))
    except ValueError as error:  # the user's own requests need no tools
        console.say(str(error))


def _offer(repl: Repl, toolbox: Toolbox) -> None:
    """Give the model these tools. ValueError when its context cannot hold their description and a conversation."""
    session, console = repl.session, repl.console
    tokens = len(session.tokenizer.render([{"role": "user", "content": "-"}], toolbox.schemas()).ids)
    values = {"tokens": tokens, "context": session.engine.context}
    if tokens > session.engine.context * MOST_OF_CONTEXT:
        raise ValueError(console.text("tools_too_large", **values))
    session.tools = toolbox
    if tokens > session.engine.context // 2:
        console.notice("tools_large", **values)


def make_toolbox(repl: Repl) -> Toolbox:
    """The tools for what is there: a search where the memory is on, files where a folder was named."""
    return default_tools(repl.session.memory, repl.files)
