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

from inference.file_assistant import FileAssistant
from inference.loading import known_adapters
from inference.reply import Reasoning
from inference.session import AUTO, RETRY_TEMPERATURE
from inference.toolbox import Toolbox, default_tools
from model.checkpoint import find_model

if TYPE_CHECKING:
    from inference.repl import Repl

OFF = "off"
THINKING: dict[str, bool | None] = {"auto": None, "on": True, "off": False}


def _switch(value: str, now: bool) -> bool:
    """on, off, or nothing: the other way. ValueError for anything else."""
    if value not in ("", "on", OFF):
        raise ValueError(f"expected on or off, got {value!r}")
    return value == "on" if value else not now


def _first_word(argument: str) -> tuple[str, str]:
    word, _, rest = argument.partition(" ")
    return word.lower(), rest.strip()


# ---------------------------------------------------------------- the chat


def quit(repl: Repl, argument: str) -> bool:
    return False


def clear(repl: Repl, argument: str) -> None:
    repl.session.reset()
    repl.console.notice("cleared")


def stream(repl: Repl, argument: str) -> None:
    repl.streaming = _switch(argument, repl.streaming)
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
    session = repl.session
    plain = {n: v for n, v in dataclasses.asdict(dataclasses.replace(session.settings, grammar=None)).items() if n != "grammar"}
    if name:
        name = name.replace("-", "_")
        if name not in plain:
            near = difflib.get_close_matches(name, plain, n=1)
            raise ValueError(f"there is no setting {name!r}{f' (did you mean {near[0]}?)' if near else ''}; known: {', '.join(plain)}")
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        session.settings = dataclasses.replace(session.settings, **{name: given})
        plain = {name: getattr(session.settings, name)}
    repl.console.tell("  ".join(f"{n}={v}" for n, v in plain.items()))


def save(repl: Repl, name: str) -> None:
    path = _file(repl, "save", name)
    repl.console.notice("saved", count=repl.session.save(path), path=path)


def load(repl: Repl, name: str) -> None:
    path = _file(repl, "load", name)
    if not path.exists():
        raise FileNotFoundError(repl.console.text("no_file", path=path))
    count = repl.session.load(path)
    repl.console.notice("loaded", count=count, path=path)
    repl.console.remark(repl.status())


def _file(repl: Repl, command: str, name: str) -> Path:
    if not name:
        raise ValueError(repl.console.text("file_missing", command=f"/{command}"))
    return Path(name).expanduser()


def summary(repl: Repl, argument: str) -> None:
    repl.show(("answer", words) for words in repl.session.summary())


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
    return {"adapter": session.adapter, "thinking": session.enable_thinking, "settings": settings}


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
    console.notice("answer_number", number=2)
    if not repl.answer(session.retry):
        return
    second = session.prompt_of_answer()[1]
    if first == second:
        console.notice("compare_same")
        return
    picked = repl.read(console.text("compare_pick")).strip()
    if picked not in ("1", "2"):
        console.notice("compare_none")
        return
    chosen, rejected = (first, second) if picked == "1" else (second, first)
    session.messages[-1] = chosen
    _thank(repl, repl.feedback.better(prompt, chosen, rejected, **_source(repl)))


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
        repl.console.tell(last.reasoning if last is not None and last.reasoning else repl.console.text("think_none"))


def reasoning(repl: Repl, argument: str) -> None:
    session, console = repl.session, repl.console
    word, rest = _first_word(argument)
    now = session.reasoning or Reasoning()
    if word in ("", "on", OFF):
        session.reasoning = now if _switch(word, session.reasoning is not None) else None
    elif word == "votes":
        session.reasoning = dataclasses.replace(now, votes=_count(rest, "votes", 64))
    elif word == "budget":
        session.reasoning = dataclasses.replace(now, budget=None if rest == OFF else _count(rest, "budget", 1 << 20))
    elif word == "calculator":
        session.reasoning = dataclasses.replace(now, calculator=_switch(rest, now.calculator))
    elif word == "steps":
        _solve(repl, rest)
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
    repl.console.remark(repl.console.text("solving"))
    repl.console.tell(MultiStepReasoning(repl.session.engine).solve(question).text())


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
        memory.enabled = _switch(word, session.memory is not None)
        session.memory = memory if memory.enabled else None
        session.tools = session.tools and _toolbox(repl)
        console.notice("memory_on" if memory.enabled else "memory_off", file=memory.path or ":memory:", profile=memory.profile)
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
        path = _file(repl, "memory export", rest)
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
        session.template = AUTO if word == AUTO or _switch(word, session.template is not None) else None
    elif word in names:
        session.template = names[word]
    else:
        near = difflib.get_close_matches(word, [*names, "list", AUTO, OFF], n=1)
        hint = console.text("nearest", name=near[0]) if near else ""
        raise ValueError(console.text("template_bad", value=argument, nearest=hint, known=" ".join([*names.values(), AUTO, OFF])))
    console.notice("template_off" if session.template is None else "template_is", name=session.template)


def auto(repl: Repl, argument: str) -> None:
    on = _switch(argument.lower(), repl.session.template == AUTO)
    template(repl, AUTO if on else OFF)


def rag(repl: Repl, argument: str) -> None:
    raise ValueError(repl.console.text("rag"))


def tools(repl: Repl, argument: str) -> None:
    session, console = repl.session, repl.console
    toolbox = session.tools or _toolbox(repl)
    if argument == "list":
        schemas = [schema["function"] for schema in toolbox.schemas()]
        console.tell("\n".join(f"  {tool['name']}  {tool['description']}" for tool in schemas))
        return
    session.tools = toolbox if _switch(argument, session.tools is not None) else None
    console.notice("tools_off" if session.tools is None else "tools_on", names=" ".join(toolbox.names()))
    if session.tools is not None:
        shown = session.tokenizer.render([{"role": "user", "content": "-"}], toolbox.schemas()).ids
        if len(shown) > session.engine.context // 2:
            console.notice("tools_large", tokens=len(shown), context=session.engine.context)


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
            repl.session.tools = repl.session.tools and _toolbox(repl)
        return
    path = _file(repl, "files", argument)
    repl.files = FileAssistant(path, language=console.language, confirm=repl.agrees)
    repl.session.tools = _toolbox(repl)
    console.notice("files_on", root=path)


def _toolbox(repl: Repl) -> Toolbox:
    """The tools for what is there: a search where the memory is on, files where a folder was named."""
    return default_tools(repl.session.memory, repl.files)


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
    size = repl.session.model.num_parameters() / 1e6
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
