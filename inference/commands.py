"""The commands of a chat: one table of what each is called, how it is explained and what it does."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import inference.command_actions as do
import inference.command_switches as turn
from inference.choices import THINKING
from inference.markdown import cell_width
from inference.session import AUTO

if TYPE_CHECKING:
    from inference.repl import Repl

BARE_WORDS = ("clear", "quit", "memory", "reasoning", "stream", "template", "help")
HELP_COLUMN = 28


@dataclass(frozen=True)
class Command:
    """run(repl, argument) obeys; it returns False to leave, and raises ValueError or OSError for what cannot be done."""

    usage: tuple[str, str]
    """What may follow the name, in Chinese and English."""
    help: tuple[str, str]
    run: Callable[[Repl, str], bool | None]
    words: tuple[str, ...] = ()
    """What may follow, for the completion."""


def nearest_commands(name: str) -> list[str]:
    """Commands with a similar name."""
    return [f"/{found}" for found in difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5)]


def help_text(language: int, only: str = "") -> str:
    """All commands (or one) in two columns, the explanation below where the first is too narrow. language: 0 Chinese, 1 English."""
    lines = []
    for name, command in COMMANDS.items():
        if only not in ("", name):
            continue
        use = f"/{name} {command.usage[language]}".rstrip()
        space = HELP_COLUMN - cell_width(use)
        lines.append(f"  {use}" + (" " * space if space > 1 else "\n" + " " * (HELP_COLUMN + 2)) + command.help[language])
    return "\n".join(lines)


def _help(repl: Repl, argument: str) -> None:
    console = repl.console
    name = argument.lower().removeprefix("/")
    if name in COMMANDS:
        console.tell(help_text(console.index, name))
    else:
        foot = console.text("help_foot", bare=" ".join(BARE_WORDS))
        console.tell(f"{console.text('help_head')}\n{help_text(console.index)}\n{foot}")


_FILE = ("文件", "FILE")
_ON_OFF = ("on", turn.OFF)
COMMANDS: dict[str, Command] = {
    "help": Command(("[命令]", "[COMMAND]"), ("显示本说明", "show this"), _help),
    "clear": Command(("", ""), ("清空对话", "forget the conversation"), do.clear),
    "retry": Command(("", ""), ("换一个回答", "another answer to the last question"), do.retry),
    "undo": Command(("", ""), ("撤回上一问一答", "take back the last question and answer"), do.undo),
    "edit": Command(("[文字]", "[TEXT]"), ("改写上一个问题并重新回答", "change the last question and ask again"), do.edit),
    "system": Command(
        ("[文字|clear]", "[TEXT|clear]"), ("查看或设置系统提示词", "show, set or remove the system text"), do.system, ("clear",)
    ),
    "stream": Command(("[on|off]", "[on|off]"), ("逐字显示，或等回答完整", "answers as they come, or whole"), do.stream, _ON_OFF),
    "set": Command(("[名称 值]", "[NAME VALUE]"), ("查看或更改采样设置", "show or change a setting, such as temperature"), do.change),
    "thinking": Command(
        ("[auto|on|off]", "[auto|on|off]"),
        ("思考：由模型决定、总是、从不", "think: as the model likes, always, never"),
        turn.thinking,
        tuple(THINKING),
    ),
    "think": Command(
        ("[show|fold]", "[show|fold]"),
        ("展开或折叠思考；单独用：上一次的思考", "thinking in full or folded; alone: the last one"),
        turn.think,
        ("show", "fold"),
    ),
    "reasoning": Command(
        (
            "[on|off|votes N|budget N|calculator|steps 问题|picture 文件]",
            "[on|off|votes N|budget N|calculator|steps QUESTION|picture FILE]",
        ),
        ("推理：多次思考后表决；分步求解", "reason: several thoughts vote; solve step by step"),
        turn.reasoning,
        ("on", turn.OFF, "votes", "budget", "calculator", "steps", "picture"),
    ),
    "steps": Command(
        ("[N [P]]", "[N [P]]"), ("推理头的步数；把握超过 P 时提前停止", "steps of the reasoning head; fewer if surer than P"), turn.steps
    ),
    "memory": Command(
        (
            "[on|off|list|forget N|edit N 文字|profile 名称|erase|export 文件]",
            "[on|off|list|forget N|edit N TEXT|profile NAME|erase|export FILE]",
        ),
        ("记忆：开关、查看、修改、删除、导出", "memory: switch, look, correct, erase, copy"),
        turn.memory,
        ("on", turn.OFF, "list", "forget", "edit", "profile", "erase", "export"),
    ),
    "template": Command(
        ("[on|off|auto|list|名称]", "[on|off|auto|list|NAME]"),
        ("提示模板", "templates for prompts"),
        turn.template,
        ("on", turn.OFF, AUTO, "list"),
    ),
    "auto": Command(("[on|off]", "[on|off]"), ("自动选择模板", "choose the template by the question"), turn.auto, _ON_OFF),
    "tools": Command(
        ("[on|off|list]", "[on|off|list]"),
        ("工具：计算器、时钟、记忆、文件", "calculator, clock, memory, files"),
        turn.tools,
        (*_ON_OFF, "list"),
    ),
    "files": Command(
        ("目录|do 要求|undo|log|off", "ROOT|do REQUEST|undo|log|off"),
        (
            "处理一个目录里的文件：模型，或您的一句话；可撤销",
            "work on the files of a folder, or let the model",
        ),
        turn.files,
        ("do", "undo", "log", turn.OFF),
    ),
    "rag": Command(("", ""), ("检索（尚未安装）", "retrieval (not installed yet)"), turn.rag),
    "model": Command(("[目录]", "[DIR]"), ("查看或更换模型，对话继续", "show or change the model; the conversation goes on"), do.model),
    "adapter": Command(
        ("[名称|off]", "[NAME|off]"), ("查看或切换 LoRA 适配器", "show or switch the LoRA adapter"), do.adapter, (turn.OFF,)
    ),
    "good": Command(("", ""), ("这个回答好，记为训练数据", "keep the answer as training data"), do.good),
    "bad": Command(("[更好的回答]", "[BETTER ANSWER]"), ("这个回答不好；可写出更好的", "the answer is bad; say a better one"), do.bad),
    "compare": Command(("[问题]", "[QUESTION]"), ("两个回答选一个", "two answers, of which you pick one"), do.compare),
    "save": Command(_FILE, ("保存对话与设置（JSON）", "save conversation and settings (JSON)"), do.save),
    "load": Command(_FILE, ("载入对话", "go on with a saved conversation"), do.load),
    "summary": Command(("", ""), ("总结到目前为止的对话", "sum up the conversation so far"), do.summary),
    "quit": Command(("", ""), ("退出", "leave"), do.quit),
}
