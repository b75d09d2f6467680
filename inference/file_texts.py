"""What the file assistant says to its user, in Chinese and English. Errors are English, as everywhere."""

from __future__ import annotations

from typing import Any

# Each entry is (Chinese, English).
TEXTS: dict[str, tuple[str, str]] = {
    "about": (
        "按一句话整理一个文件夹里的文件：先给出计划，确认后才动手，每一步都能撤销。",
        "Tidies the files of one folder as a sentence says: a plan first, changes when confirmed, each can be undone.",
    ),
    "opt_root": ("文件夹；助手不会离开它", "the folder; the assistant never leaves it"),
    "opt_prompt": ("要做什么，例如：把所有 .txt 移到 notes 文件夹", "what to do, such as: move all .txt to notes"),
    "opt_plan": (
        "从 JSON 文件读取计划（- 为标准输入），而不是一句话",
        "take the plan from a JSON file (-: standard input)",
    ),
    "opt_model": ("由这个目录里的模型制定计划，而不是规则", "let the model in this directory plan instead of the rules"),
    "opt_apply": ("真的执行；不写则只显示计划", "really do it; without, the plan is only shown"),
    "opt_yes": ("不询问；删除和批量改名需要写两次", "do not ask; twice for deleting and for renaming several files"),
    "opt_undo": ("撤销最近一批（或指定编号的一批，或 all）", "take back the last batch (or the one of that number, or all)"),
    "opt_log": ("显示做过的事", "show what was done"),
    "opt_json": ("以 JSON 输出", "print JSON"),
    "opt_lang": ("语言", "language"),
    "opt_allow": ("只处理符合此模式的文件，可重复，如 '*.txt'", "touch only files that fit this pattern; may be repeated, as in '*.txt'"),
    "opt_deny": ("另外不处理符合此模式的文件，可重复", "also leave alone what fits this pattern; may be repeated"),
    "opt_limit": ("一次最多改动的文件数", "most files changed at once"),
    "opt_backup": (
        "日志和备份放在这个文件夹（默认：文件夹内的 .smarthaoai）",
        "for log and backups (default: .smarthaoai in the folder)",
    ),
    "opt_help": ("显示本说明并退出", "show this help and exit"),
    "plan": ("计划，共 {count} 项改动：", "Plan, changes: {count}"),
    "nothing": ("没有要改动的。", "There is nothing to change."),
    "more": ("  …… 还有 {count} 项", "  ... and {count} more"),
    "left": ("不处理：{note}", "left alone: {note}"),
    "dry": ("这只是计划，什么都没有改。加 --apply 执行。", "This is only the plan; nothing was changed. Add --apply to do it."),
    "dry_tool": (
        "这只是计划，什么都没有改；需要用户确认后才能执行。",
        "This is only the plan; nothing was changed. It needs the user's confirmation.",
    ),
    "ask": ("执行以上 {count} 项改动吗？", "Make these changes ({count})?"),
    "ask_delete": (
        "其中 {deleted} 项是删除、{renamed} 项是改名。确定吗？（备份会保留，可以撤销）",
        "Deleting: {deleted}, renaming: {renamed}. Are you sure? (Backups are kept, so it can be undone.)",
    ),
    "yes_no": (" [y/N] ", " [y/N] "),
    "refused": ("没有确认，什么都没有改。", "Not confirmed; nothing was changed."),
    "done": (
        "完成 {done} 项（批次 {batch}，可以撤销）。",
        "Changes made: {done} (batch {batch}; they can be undone).",
    ),
    "stopped": (
        "完成 {done}/{count} 项后停下：{error}（批次 {batch}，已完成的可以撤销）。",
        "stopped after {done} of {count} changes: {error} (batch {batch}; those that were made can be undone).",
    ),
    "settled": ("上次被中断的改动已复原：{what}", "a change that was interrupted was taken back: {what}"),
    "unsettled": ("上次被中断的改动无法复原：{what}：{error}", "a change that was interrupted could not be taken back: {what}: {error}"),
    "undone": ("已撤销：{what}", "undone: {what}"),
    "not_undone": ("未能撤销：{what}：{error}", "not undone: {what}: {error}"),
    "no_undo": ("没有可撤销的。", "There is nothing to undo."),
    "empty": ("（空）", "(empty)"),
    "binary": ("（不是文本，{size} 字节）", "(not a text; {size} bytes)"),
    "no_log": ("还没有做过任何事。", "Nothing was done yet."),
    "folder": ("新建文件夹 {path}", "make folder {path}"),
    "create": ("新建 {path}（{size} 字）", "create {path} ({size} characters)"),
    "update": ("改写 {path}", "rewrite {path}"),
    "append": ("在 {path} 末尾追加 {size} 字", "append {size} characters to {path}"),
    "replace": ("在 {path} 中把 {find} 换成 {content}", "replace {find} by {content} in {path}"),
    "move": ("移动 {path} → {to}", "move {path} -> {to}"),
    "rename": ("改名 {path} → {to}", "rename {path} -> {to}"),
    "copy": ("复制 {path} → {to}", "copy {path} -> {to}"),
    "delete": ("删除 {path}", "delete {path}"),
    "delete_folder": ("删除文件夹 {path}（含 {files} 个文件和文件夹）", "delete the folder {path} (with what is in it: {files})"),
    "tag": ("给 {path} 加标签 {tags}", "tag {path}: {tags}"),
    "untag": ("去掉 {path} 的标签 {tags}", "untag {path}: {tags}"),
    "tagged": ("标签 {path}", "tags of {path}"),
    "created": ("新建 {path}", "create {path}"),
    "changed": ("改写 {path}", "change {path}"),
    "tool": (
        "Files of the folder {name}: list, read, create, update, move, copy, rename, delete, classify, tag. Paths are relative to it; "
        "nothing is replaced; changes are shown to the user first. 处理文件夹 {name} 里的文件。",
    )
    * 2,
}


def say(key: str, language: str, **values: Any) -> str:
    """The text of a key in zh or en."""
    text = TEXTS[key][0 if language == "zh" else 1]
    return text.format(**values) if values else text
