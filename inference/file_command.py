"""The command line of the file assistant: `python -m inference.file_assistant ROOT --prompt "..."`.

Status 0: done, or a plan was shown; 1: something could not be done, or was not confirmed; 2: a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.file_assistant import FileAssistant, Outcome, stated_requests
from inference.file_paths import DENIED, Policy
from inference.file_plan import Plan
from inference.file_requests import PLAN_SCHEMA
from inference.file_texts import say
from inference.json_text import JsonTextError, read_object
from inference.terminal import CONTROL_CHARACTERS, YES, interface_language

MOST_PLAN_CHARACTERS = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; mistakes of the user are one line on standard error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--lang", choices=("zh", "en"))
    language = early.parse_known_args(arguments)[0].lang or interface_language()
    options = _parser(language).parse_args(arguments)
    try:
        return _run(options, language)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print("\nstopped", file=sys.stderr)
        return 130


def _parser(language: str) -> argparse.ArgumentParser:
    def text(key: str) -> str:
        return say(key, language)

    parser = argparse.ArgumentParser(prog="python -m inference.file_assistant", description=text("about"), add_help=False)
    parser.add_argument("root", metavar="ROOT", help=text("opt_root"))
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--prompt", metavar="TEXT", help=text("opt_prompt"))
    task.add_argument("--plan", metavar="FILE", help=text("opt_plan"))
    task.add_argument("--undo", metavar="BATCH", nargs="?", const="", help=text("opt_undo"))
    task.add_argument("--log", action="store_true", help=text("opt_log"))
    parser.add_argument("--apply", action="store_true", help=text("opt_apply"))
    parser.add_argument("--yes", action="count", default=0, help=text("opt_yes"))
    parser.add_argument("--model", metavar="DIR", help=text("opt_model"))
    parser.add_argument("--allow", metavar="PATTERN", action="append", default=[], help=text("opt_allow"))
    parser.add_argument("--deny", metavar="PATTERN", action="append", default=[], help=text("opt_deny"))
    parser.add_argument("--limit", metavar="N", type=int, default=Policy.max_operations, help=text("opt_limit"))
    parser.add_argument("--backup", metavar="DIR", help=text("opt_backup"))
    parser.add_argument("--json", action="store_true", help=text("opt_json"))
    parser.add_argument("--lang", choices=("zh", "en"), help=text("opt_lang"))
    parser.add_argument("-h", "--help", action="help", help=text("opt_help"))
    return parser


def _run(options: argparse.Namespace, language: str) -> int:
    policy = Policy(allow=tuple(options.allow), deny=(*DENIED, *options.deny), max_operations=options.limit)
    assistant = FileAssistant(options.root, policy, options.backup, language)
    if options.log:
        _print(options, assistant.log() if options.json else assistant.log_text())
        return 0
    if options.undo is not None:
        return _report(options, assistant, _undo(assistant, options.undo))
    plan = _plan(assistant, options)
    if not options.json:
        _print(options, assistant.preview(plan))
    if not plan.changes or not options.apply:
        if options.json:
            looks = assistant.preview(Plan([step for step in plan.steps if step not in plan.changes])) if not plan.changes else ""
            _print(options, {**plan.to_dict(), "applied": False, "text": looks})
        elif plan.changes:
            _print(options, say("dry", language))
        return 0
    return _report(options, assistant, assistant.apply(plan, _confirmation(options, language)), plan)


def _plan(assistant: FileAssistant, options: argparse.Namespace) -> Plan:
    if options.plan is None:
        return assistant.plan_by_model(options.prompt, _model(options.model)) if options.model else assistant.plan(options.prompt)
    if options.plan == "-":
        text = sys.stdin.read(MOST_PLAN_CHARACTERS)
    else:
        with open(options.plan, encoding="utf-8-sig") as file:
            text = file.read(MOST_PLAN_CHARACTERS)
    try:
        return assistant.plan_of(stated_requests(read_object(text)))
    except JsonTextError as error:
        raise ValueError(f"{options.plan} is not a plan in JSON: {error}") from error


def _undo(assistant: FileAssistant, which: str) -> Outcome:
    if which and which != "all" and not which.isdecimal():
        raise ValueError(f"--undo {which}: give the number of a batch, all, or nothing for the last one")
    return assistant.undo(int(which) if which.isdecimal() else None, everything=which == "all")


def _confirmation(options: argparse.Namespace, language: str) -> Callable[[str], bool]:
    """Each --yes answers one question; the others are asked where somebody can answer."""
    left = [options.yes]

    def confirm(question: str) -> bool:
        if left[0] > 0:
            left[0] -= 1
            return True
        if not sys.stdin.isatty() or options.json:
            raise ValueError(f"nobody can be asked: {question} Add --yes (twice for deleting and for renaming several files)")
        return input(question + say("yes_no", language)).strip().lower() in YES

    return confirm


def _model(folder: str) -> Callable[[list[dict[str, str]]], str]:
    """A model that answers, held to the form of a plan where the extra for grammars is installed."""
    from inference.grammar import Grammar  # torch and the model are loaded only for this
    from inference.session import ChatSession

    session = ChatSession.from_pretrained(Path(folder), temperature=0.0, max_new_tokens=400, enable_thinking=False)
    try:
        # A small model that may write line ends writes nothing else.
        session.settings.grammar = Grammar.json_schema({**PLAN_SCHEMA, "x-guidance": {"whitespace_pattern": " "}})
    except ValueError as error:
        print(f"({error}; without it the model's plan may be no JSON)", file=sys.stderr)

    def generate(messages: list[dict[str, str]]) -> str:
        session.system = messages[0]["content"]
        return session.chat(messages[-1]["content"])

    return generate


def _report(options: argparse.Namespace, assistant: FileAssistant, outcome: Outcome, plan: Plan | None = None) -> int:
    if options.json:
        done = {"done": outcome.done, "failed": outcome.failed, "batch": outcome.batch, "text": outcome.text}
        _print(options, {**(plan.to_dict() if plan else {}), "applied": outcome.done > 0, **done})
    else:
        _print(options, outcome.text)
    return 1 if outcome.failed or (plan is not None and not outcome.done) else 0


def _print(options: argparse.Namespace, what: Any) -> None:
    if options.json:
        print(json.dumps(what, ensure_ascii=False, indent=1))
    else:
        # A file's text or name must not move the cursor of a terminal.
        print(CONTROL_CHARACTERS.sub("", what) if sys.stdout.isatty() else what)
