"""Talk to a trained model: `python chat.py` (newest finished stage in weight/) or `python chat.py --model weight/sft`.

In a terminal it is a prompt with history and commands (/help). Piped, standard output carries the answers and what
commands were asked to show; everything else goes to standard error:  printf '你好\\nquit\\n' | python chat.py
One question:  python chat.py --prompt 'Who are you?' --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.choices import QUANTIZE, THINKING
from inference.terminal import Console, interface_language, make_reader, state_folder
from train.program import run_main

if TYPE_CHECKING:
    from inference.repl import Repl

WEIGHTS = Path("weight")
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")


def make_parser(text: Callable[[str], str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description=text("about"), add_help=False)
    parser.add_argument("-h", "--help", action="help", help=text("opt_help"))
    parser.add_argument("--model", metavar="DIR", help=text("opt_model"))
    parser.add_argument("--prompt", metavar="TEXT", help=text("opt_prompt"))
    parser.add_argument("--json", action="store_true", help=text("opt_json"))
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
    parser.add_argument("--votes", type=int, metavar="N", help=text("opt_reasoning"))
    parser.add_argument("--memory", metavar="FILE", help=text("opt_memory"))
    parser.add_argument("--template", metavar="NAME", help=text("opt_template"))
    parser.add_argument("--templates", metavar="FILE", help=text("opt_templates"))
    parser.add_argument("--tools", action="store_true", help=text("opt_tools"))
    parser.add_argument("--feedback", metavar="DIR", default="training_data", help=text("opt_feedback"))
    parser.add_argument("--device", help=text("opt_device"))
    parser.add_argument("--quantize", choices=QUANTIZE, default="none", help=text("opt_quantize"))
    parser.add_argument("--compile", action="store_true", help=text("opt_compile"))
    return parser


def switch_on(repl: Repl, arguments: argparse.Namespace) -> None:
    """What the command line asks for beside the model, as the commands of the same names would."""
    from inference.command_switches import memory, reasoning, template, tools

    if arguments.memory:
        memory(repl, "on")
    if arguments.template:
        template(repl, arguments.template)
    if arguments.tools:
        tools(repl, "on")
    if arguments.votes is not None:
        reasoning(repl, f"votes {arguments.votes}")


def main() -> int:
    # The language decides in which words mistakes on the command line are explained, so it is read first.
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--lang", choices=("zh", "en"))
    language = early.parse_known_args()[0].lang or interface_language()
    return talk(make_parser(Console(language, interactive=False).text).parse_args(), language)


def talk(arguments: argparse.Namespace, language: str) -> int:
    """Everything after the command line was read; imported here is what takes a while to import."""
    from inference.command_switches import show_steps
    from inference.commands import COMMANDS
    from inference.loading import newest_stage
    from inference.prompts import SmartPromptEngineer
    from inference.repl import Repl
    from inference.sampling import SamplingSettings
    from inference.session import ChatSession

    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not arguments.json and arguments.prompt is None
    console = Console(language, interactive, arguments.json)
    path = Path(arguments.model) if arguments.model else newest_stage(WEIGHTS)
    if path is None:
        raise FileNotFoundError(console.text("none"))
    given: dict[str, Any] = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    SamplingSettings(**given)  # a wrong value should be heard of before a model is loaded

    def open_session(folder: Path) -> ChatSession:
        session = ChatSession.from_pretrained(
            folder,
            device=arguments.device,
            system=arguments.system,
            enable_thinking=THINKING[arguments.thinking],
            reasoning_steps=arguments.reasoning_steps,
            reasoning_halt=arguments.reasoning_halt,
            quantize=arguments.quantize,
            **given,
        )
        if arguments.compile:
            console.notice("compiling")
            session.engine.compile()
        return session

    repl = Repl(
        open_session(path),
        console,
        streaming=not arguments.no_stream,
        show_thinking=arguments.show_thinking,
        model=path,
        open_session=open_session,
        weights=WEIGHTS,
        memory_file=arguments.memory or state_folder() / "memory.sqlite",
        feedback_folder=arguments.feedback,
        templates=SmartPromptEngineer.from_file(arguments.templates, console.language) if arguments.templates else None,
    )
    switch_on(repl, arguments)
    if not arguments.model:
        console.notice("found", path=path.as_posix())
        if path.name.startswith("pretrain"):
            console.notice("base")
    if arguments.prompt is not None:
        repl.ask(sys.stdin.read().strip("\n") if arguments.prompt == "-" else arguments.prompt)
        return repl.close()
    if interactive:
        size = repl.session.model.config.account().parameters / 1e6
        console.notice("ready", path=path.as_posix(), size=size, device=repl.session.engine.device)
        show_steps(repl)
    words = {f"/{name}": command.words for name, command in COMMANDS.items()}
    return repl.run(make_reader(interactive, words, repl.status))


if __name__ == "__main__":
    run_main(main)
