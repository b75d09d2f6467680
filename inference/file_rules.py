"""From a sentence to requests for the file assistant, by rules, in Chinese and English.

    read_prompt("把所有 .txt 移到 notes 文件夹")   # [{"operation": "move", "path": "*.txt", "to": "notes/"}]
    read_prompt("rename *.jpeg to *.jpg")        # [{"operation": "rename", "path": "*.jpeg", "to": "*.jpg"}]

A rule reads the whole sentence or does not apply: nothing that a user says ("except", "older than") is passed over. What no rule
reads is refused with examples. Several requests stand on lines of their own, or with "; " / "，然后" / ", then" between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from inference.file_types import is_suffix, suffixes_of

Request = dict[str, Any]
EXAMPLES = (
    "list notes", "read notes/a.txt", 'create a.txt with content "hello"', 'append "bye" to a.txt', "move all .txt to notes",
    "copy a.txt to b.txt", "rename *.jpeg to *.jpg", "delete all .tmp files", "organize by type", "tag a.txt with work",
    "list files tagged work", "列出 notes", "读取 notes/a.txt", "新建 a.txt，内容为“你好”", "在 a.txt 末尾追加“再见”",
    "把所有 .txt 移到 notes 文件夹", "把 a.txt 复制到 b.txt", "把所有 .jpeg 改名为 .jpg", "删除所有 .tmp 文件", "按类型整理",
    "给 a.txt 加标签 工作", "列出标签为 工作 的文件",
)  # fmt: skip

_CHINESE = re.compile("[\u4e00-\u9fff]")
_QUOTES = (("“", "”"), ("「", "」"), ("『", "』"), ("《", "》"), ('"', '"'), ("'", "'"), ("`", "`"), ("‘", "’"))
_QUOTED = "|".join(f"{re.escape(a)}[^{re.escape(a + b)}]*{re.escape(b)}" for a, b in _QUOTES)
# One thing that a sentence names: in quotes, or anything up to the words of the rule that follow.
_X = rf"(?:{_QUOTED}|\S.*?)"
_WORD = rf"(?:{_QUOTED}|[^\s，。；：、“”\"'「」]+)"
_TO = r"(?:移动到|移动至|移到|移至|移入|移进|移动进|放到|放进|放入|放在|挪到)"
_NAMED = r"(?:重命名为|改名为|改名成|改名叫|重命名成|改成|改为|命名为)"
_BY = {
    word: by
    for by, words in {
        "type": "type kind 类型 种类 类别 文件类型",
        "suffix": "extension suffix 后缀 扩展名 后缀名",
        "month": "date month 日期 月份 时间",
        "tag": "tag tags 标签",
    }.items()
    for word in words.split()
}
_GROUP = "|".join(sorted(_BY, key=len, reverse=True))
_NEGATED = re.compile(
    r"\b(?:don'?t|do not|never|except|excluding|but not|unless|without)\b|不要|请勿|切勿|(?:^|[，,。；])\s*[别勿]|除了|除外|以外|之外|不含",
    re.IGNORECASE,
)
_SUBFOLDERS = re.compile(
    r"[\s,，(（]*(?:\b(?:recursively|(?:including|and|in|with) (?:all )?(?:the )?subfolders)\b"
    r"|(?:包括|包含|含|及|和|连同)?(?:所有)?(?:子文件夹|子目录)(?:里|中|内|下)?的?)[)）]?",
    re.IGNORECASE,
)
_PLEASE = re.compile(r"(?:please|could you|can you|请你?|帮我|麻烦你?|帮忙)[\s,，]*", re.IGNORECASE)
_THANKS = re.compile(r"(?:\bplease|谢谢|吧)\Z", re.IGNORECASE)
_GAP = re.compile(r"[\s,，(（]{40}")  # several patterns may each take a part of a gap, in every way there is
_MARKS = " \t\r\n,，.。!！?？"
_SEPARATOR = re.compile(r"\s*(?:\n|[;；]|[,，]?\s*然后(?:再)?|[,，]?\s*接着|,?\s+(?:and )?then\s)\s*", re.IGNORECASE)


def read_prompt(prompt: str) -> list[Request]:
    """The requests of a sentence. Raises ValueError when it is not understood as a whole, with sentences that are."""
    if len(prompt) > 4000:
        raise ValueError(f"the prompt has {len(prompt)} characters, at most 4000 are read")
    if _GAP.search(re.sub(_QUOTED, "", prompt)):
        raise ValueError("the prompt holds a long row of spaces or commas; put names and texts that need them in quotes")
    requests = [request for sentence in _sentences(prompt) for request in _read_one(sentence)]
    if not requests:
        raise ValueError("the prompt is empty; say what to do, such as: list")
    return requests


def _sentences(prompt: str) -> list[str]:
    """Cut at separators that stand outside quotes."""
    quoted = [match.span() for match in re.finditer(_QUOTED, prompt)]
    cuts = [m.span() for m in _SEPARATOR.finditer(prompt) if not any(start < m.end() and m.start() < end for start, end in quoted)]
    edges = [0, *(edge for cut in cuts for edge in cut), len(prompt)]
    return [sentence for a, b in zip(edges[::2], edges[1::2], strict=True) if (sentence := prompt[a:b]).strip()]


def _read_one(sentence: str) -> list[Request]:
    text = _without_politeness(sentence)
    if _NEGATED.search(re.sub(_QUOTED, "", text)):
        raise ValueError(f"{sentence.strip()!r}: exceptions and negations are not read by rules; name the files that are meant")
    found = _SUBFOLDERS.search(re.sub(_QUOTED, lambda match: "\0" * len(match.group()), text))
    within = text if found is None else text[: found.start()] + (" " if found.end() < len(text) else "") + text[found.end() :]
    for pattern, build in _RULES:
        if match := pattern.fullmatch(within):
            try:
                request = build(*match.groups())
            except _NotThis:
                continue
            if found is not None:
                request["subfolders"] = True
            return [{**request, "path": path} for path in request["path"].split(_AND)] if "path" in request else [request]
    chinese = bool(_CHINESE.search(sentence))
    known = [example for example in EXAMPLES if bool(_CHINESE.search(example)) is chinese]
    raise ValueError(f"{sentence.strip()!r:.200} is not understood as a whole. Sentences that are: {'; '.join(known)}")


def _without_politeness(sentence: str) -> str:
    text = sentence.strip()
    while True:
        shorter = _PLEASE.sub("", text, count=1) if _PLEASE.match(text) else text
        shorter = _THANKS.sub("", shorter.rstrip(_MARKS)).rstrip(_MARKS)
        if shorter == text:
            return text
        text = shorter


class _NotThis(Exception):
    """The sentence fits the pattern, but means something else."""


def _plain(text: str) -> str:
    """A name without its quotes."""
    text = text.strip()
    for a, b in _QUOTES:
        if len(text) >= 2 and text.startswith(a) and text.endswith(b):
            return text[1:-1]
    return text


_AND = "\n"  # between the names of one request; no name can hold it
_LISTED = re.compile(r"\s*(?:[、,，]|\band\b|以及|和|及|与)\s*(?:and\b)?\s*", re.IGNORECASE)
_ALL = re.compile(r"(?:all|every|each)\s+(?:the\s+|of the\s+)?(.*)|(?:所有|全部|每个)的?\s*(.*)", re.IGNORECASE)
_FILES = re.compile(r"\s*(?:\b(?:files?|documents?)$|(?:格式|类型)?的?文件$)", re.IGNORECASE)
_SUFFIX = re.compile(r"(?:\*?\.)?([A-Za-z0-9]{1,12})")
_INSIDE = (
    re.compile(rf"(?P<what>{_X})\s+(?:in|from|inside|under)\s+(?:the\s+)?(?:folder\s+)?(?P<where>{_WORD})(?:\s+folder)?", re.IGNORECASE),
    re.compile(rf"(?P<where>{_WORD})\s*(?:文件夹|目录)?(?:里面|里|中|内|下面|下)的?\s*(?P<what>{_X})"),
)


def _files(text: str) -> str:
    """The path or pattern that words stand for: a.txt, "my file.txt", all .tmp files, 所有图片, notes 里的所有 .txt."""
    text = text.strip()
    pieces = [piece for piece in _LISTED.split(text) if piece]
    if len(pieces) > 1 and all(re.fullmatch(rf"{_QUOTED}|[^\s\"“「]+\.\w+", piece) for piece in pieces):
        return _AND.join(map(_plain, pieces))
    if _plain(text) != text:
        return _plain(text)
    for inside in _INSIDE:
        if found := inside.fullmatch(text):
            what = _files(found["what"])
            return f"{_plain(found['where']).rstrip('/')}/{what}"
    spoken = _ALL.fullmatch(text)
    rest = next(group for group in spoken.groups() if group is not None) if spoken else text
    kind = _FILES.sub("", rest).strip()
    if spoken is None and kind.lower() != "everything" and (kind == rest or not (kind.startswith((".", "*")) or suffixes_of(kind))):
        name = re.sub(
            r"^(?:the\s+)?(?:file|folder|directory)\s+|^(?:文件夹|文件|目录)\s*(?=\S)|\s+folder$|\s*(?:文件夹|目录|文件)$",
            "",
            text,
            flags=re.IGNORECASE,
        )
        if re.search(r"\s", name) and not re.search(r"\.\w+$", name):
            raise _NotThis  # words, not a name
        return _plain(name)
    if not kind or kind.lower() in ("文件", "东西", "内容", "everything"):
        return "*"
    if endings := suffixes_of(kind):
        return f"*.{{{','.join(ending[1:] for ending in endings)}}}"
    if spoken is None and "*" in kind and not re.search(r"\s", kind):
        return kind
    found = _SUFFIX.fullmatch(kind)
    if found and (kind.startswith((".", "*")) or (spoken and is_suffix(found[1]))):
        return f"*.{found[1]}"
    if re.fullmatch(r"\S*[*?]\S*", kind):
        return kind
    raise _NotThis


def _folder(text: str) -> str:
    """A folder that something goes to."""
    text = text.strip()
    named = re.sub(
        r"^(?:the\s+)?(?:folder|directory)\s+|^(?:文件夹|目录)\s*(?=\S)|\s+(?:folder|directory)$|\s*(?:文件夹|目录)(?:里面|里|中|内|下)?$|(?:里面|里|中)$",
        "",
        text,
        flags=re.IGNORECASE,
    )
    name = _plain(named).removeprefix("the ").strip()
    if named != text:
        return name.rstrip("/") + "/"
    return name


def _new_names(text: str, name: str) -> tuple[str, str]:
    """Both sides of a renaming: suffixes alone mean all their files."""
    path = _files(text)
    name = _plain(re.sub(r"^(?:the\s+)?name\s+|\s*(?:后缀|格式)$", "", name.strip()))
    if re.fullmatch(r"\*\.\w+", path) and re.fullmatch(r"(?:\*?\.)\w+", name):
        return path, f"*.{name.lstrip('*.')}"
    return path, name


def _tags(text: str) -> list[str]:
    return [_plain(tag) for tag in re.split(r"\s*(?:[,，、]|\band\b|和)\s*", text.strip()) if tag.strip()]


def _rule(pattern: str, build: Callable[..., Request]) -> tuple[re.Pattern[str], Callable[..., Request]]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL), build


def _list(where: str | None = None) -> Request:
    path = "" if where is None else _files(where)
    return {"operation": "list", **({"path": path} if path not in ("", "*", "files") else {})}


def _rename(old: str, new: str) -> Request:
    path, name = _new_names(old, new)
    return {"operation": "rename", "path": path, "to": name}


def _update(content: str, path: str, mode: str) -> Request:
    return {"operation": "update", "path": _files(path), "content": _plain(content), "mode": mode}


def _create(path: str, content: str | None = None) -> Request:
    return {"operation": "create", "path": _plain(path), "content": "" if content is None else _plain(content)}


def _replace(find: str, content: str, path: str) -> Request:
    return {"operation": "update", "path": _files(path), "find": _plain(find), "content": _plain(content)}


def _tag(path: str, tags: str, remove: bool = False) -> Request:
    return {"operation": "tag", "path": _files(path), "tags": _tags(tags), **({"remove": True} if remove else {})}


def _classify(by: str, where: str | None = None) -> Request:
    path = (
        ""
        if where is None
        else _plain(re.sub(r"^(?:the\s+)?(?:files in\s+|folder\s+)|\s*(?:文件夹|目录|folder)?\s*(?:里|中|内|下)?(?:的?文件)?$", "", where))
    )
    every = path.lower() in ("", "files", "文件", "所有文件", "all files", "everything", "the files", "all", "all the files", "所有")
    return {"operation": "classify", **({} if every else {"path": path}), "by": _BY[by.lower()]}


# English rules stand before Chinese ones; the first that reads the whole sentence is taken.
_RULES = (
    _rule(r"(?:list|ls|dir|show files|show all files|list (?:all )?(?:the )?files|what files are there)", lambda: _list()),
    _rule(
        rf"(?:list|show|find)\s+(?:all\s+)?(?:the\s+)?files\s+(?:tagged|with (?:the )?tags?)\s+(?:as\s+)?({_X})",
        lambda t: {"operation": "list", "tags": _tags(t)},
    ),
    _rule(
        rf"(?:list|ls|show)\s+(?:the\s+)?(?:files|contents?)\s+(?:in|of|inside)\s+(?:the\s+)?({_X})",
        lambda w: _list(_folder(w).rstrip("/")),
    ),
    _rule(rf"(?:list|ls|dir|find)\s+({_X})", _list),
    _rule(
        rf"(?:read|open|cat|show|print|display)\s+(?:me\s+)?(?:the\s+(?:contents?|text)\s+of\s+)?({_X})",
        lambda p: {"operation": "read", "path": _files(p)},
    ),
    _rule(
        rf"(?:create|make|add|new)\s+(?:a\s+|the\s+)?(?:new\s+)?(?:folder|directory)\s+(?:called\s+|named\s+)?({_WORD})",
        lambda p: {"operation": "make_folder", "path": _plain(p)},
    ),
    _rule(
        rf"(?:create|make|write|new)\s+(?:a\s+|the\s+)?(?:new\s+)?(?:empty\s+)?(?:file\s+)?(?:called\s+|named\s+)?({_WORD})(?:\s+(?:with|containing)\s+(?:the\s+)?(?:contents?\s+|text\s+)?(.+))?",
        _create,
    ),
    _rule(rf"(?:append|add)\s+(.+?)\s+(?:to|at)\s+(?:the\s+end\s+of\s+)?({_WORD})", lambda c, p: _update(c, p, "append")),
    _rule(
        rf"(?:replace|change|set)\s+(?:the\s+)?(?:contents?|text)\s+of\s+({_WORD})\s+(?:with|by|to)\s+(.+)",
        lambda p, c: _update(c, p, "replace"),
    ),
    _rule(rf"replace\s+({_QUOTED}|\S+)\s+(?:with|by)\s+({_QUOTED}|\S+)\s+in\s+({_WORD})", _replace),
    _rule(rf"(?:move|mv)\s+({_X})\s+(?:in)?to\s+({_X})", lambda p, t: {"operation": "move", "path": _files(p), "to": _folder(t)}),
    _rule(rf"(?:copy|cp|duplicate)\s+({_X})\s+(?:in)?to\s+({_X})", lambda p, t: {"operation": "copy", "path": _files(p), "to": _folder(t)}),
    _rule(rf"rename\s+({_X})\s+(?:to|as|into)\s+({_X})", _rename),
    _rule(rf"(?:untag|remove\s+(?:the\s+)?tags?)\s+({_X})\s+from\s+({_X})", lambda t, p: _tag(p, t, True)),
    _rule(rf"(?:delete|remove|rm|erase)\s+({_X})", lambda p: {"operation": "delete", "path": _files(p)}),
    _rule(
        rf"(?:organi[sz]e|sort|classify|group|tidy(?:\s+up)?|arrange)(?:\s+({_X}))?\s+by\s+(?:file\s+)?({_GROUP})s?",
        lambda w, b: _classify(b, w),
    ),
    _rule(rf"tag\s+({_X})\s+(?:with|as)\s+({_X})", _tag),
    _rule(r"(?:列出|显示|看看|查看)?(?:所有|全部|有哪些|有什么)?(?:的)?文件|列出|有哪些文件|有什么文件", lambda: _list()),
    _rule(
        rf"(?:列出|查找|找出|显示)\s*(?:所有|全部)?(?:带有?|有|标签为|标签是)\s*(?:标签)?\s*({_WORD})\s*(?:标签)?\s*的\s*(?:所有)?文件",
        lambda t: {"operation": "list", "tags": _tags(t)},
    ),
    _rule(
        rf"(?:列出|显示|看看)\s*({_WORD})\s*(?:文件夹|目录)?\s*(?:里面?|中|内|下面?)?的?\s*(?:所有|全部)?\s*(?:文件|内容)",
        lambda w: _list(_folder(w).rstrip("/")),
    ),
    _rule(rf"(?:列出|查找)\s*({_X})", _list),
    _rule(rf"(?:读取|读一?下?|打开|查看|显示|看看)\s*({_X})\s*(?:的)?(?:内容)?", lambda p: {"operation": "read", "path": _files(p)}),
    _rule(
        rf"(?:新建|创建|建立|建)\s*(?:一个)?\s*(?:新的?)?(?:文件夹|目录)\s*(?:叫做?|名为)?\s*({_WORD})",
        lambda p: {"operation": "make_folder", "path": _plain(p)},
    ),
    _rule(
        rf"(?:新建|创建|建立|建)\s*(?:一个)?\s*(?:名为|叫做?)\s*({_WORD})\s*的\s*(?:文件夹|目录)",
        lambda p: {"operation": "make_folder", "path": _plain(p)},
    ),
    _rule(
        rf"(?:新建|创建|建立|写)\s*(?:一个)?\s*(?:文件)?\s*({_WORD})(?:\s*[，,]?\s*(?:内容(?:为|是|：|:)|写入|写上)[:：]?\s*(.+))?", _create
    ),
    _rule(
        rf"(?:在|向|往)\s*({_WORD})\s*(?:文件)?的?\s*(?:末尾|最后|结尾|里|中|后面)?\s*(?:追加|添加|加上|写入|加入)[:：]?\s*(.+)",
        lambda p, c: _update(c, p, "append"),
    ),
    _rule(
        rf"(?:把|将)\s*({_WORD})\s*的?\s*内容\s*(?:改为|改成|替换为|替换成|换成|设为)[:：]?\s*(.+)", lambda p, c: _update(c, p, "replace")
    ),
    _rule(
        rf"(?:把|将)\s*({_WORD})\s*(?:里面?|中)的?\s*({_QUOTED}|\S+?)\s*(?:替换成|替换为|换成|改成|改为)\s*({_QUOTED}|\S+)",
        lambda p, a, b: _replace(a, b, p),
    ),
    _rule(rf"(?:把|将)\s*({_X})\s*(?:都|全部?)?{_TO}\s*({_X})", lambda p, t: {"operation": "move", "path": _files(p), "to": _folder(t)}),
    _rule(rf"(?:移动|移)\s*({_X})\s*(?:到|至|进)\s*({_X})", lambda p, t: {"operation": "move", "path": _files(p), "to": _folder(t)}),
    _rule(
        rf"(?:把|将)\s*({_X})\s*(?:都|全部?)?(?:复制|拷贝)(?:一份)?(?:到|至|为|成)\s*({_X})",
        lambda p, t: {"operation": "copy", "path": _files(p), "to": _folder(t)},
    ),
    _rule(rf"(?:复制|拷贝)\s*({_X})\s*(?:到|至|为|成)\s*({_X})", lambda p, t: {"operation": "copy", "path": _files(p), "to": _folder(t)}),
    _rule(rf"(?:把|将)\s*({_X})\s*(?:都|全部?)?{_NAMED}\s*({_X})", _rename),
    _rule(rf"(?:重命名|改名)\s*({_X})\s*(?:为|成|叫)\s*({_X})", _rename),
    _rule(rf"(?:删除|删掉|删去|移除|清除)\s*({_X})\s*的?标签\s*({_X})", lambda p, t: _tag(p, t, True)),
    _rule(rf"(?:去掉|去除|取消)\s*({_X})\s*的?标签\s*({_X})", lambda p, t: _tag(p, t, True)),
    _rule(rf"(?:删除|删掉|删去|清除|清理)\s*({_X})", lambda p: {"operation": "delete", "path": _files(p)}),
    _rule(rf"(?:把|将)\s*({_X})\s*(?:都|全部?)?(?:删除|删掉|删去|清除|删了)", lambda p: {"operation": "delete", "path": _files(p)}),
    _rule(
        rf"(?:把|将)?\s*({_X}?)\s*按照?\s*(?:文件的?)?({_GROUP})\s*(?:整理|分类|归类|排列|分组|分开)(?:文件|所有文件)?",
        lambda w, b: _classify(b, w),
    ),
    _rule(rf"(?:整理|分类|归类)\s*({_X})?\s*[，,]?\s*按照?\s*(?:文件的?)?({_GROUP})", lambda w, b: _classify(b, w)),
    _rule(rf"按照?\s*(?:文件的?)?({_GROUP})\s*(?:整理|分类|归类|分组)\s*({_X})", lambda b, w: _classify(b, w)),
    _rule(rf"(?:整理|分类|归类)\s*({_X})?", lambda w: _classify("type", w)),
    _rule(rf"(?:给|为)\s*({_X})\s*(?:都)?(?:加上?|打上?|添加)\s*(?:标签)[:：]?\s*({_X})", _tag),
    _rule(rf"(?:给|为)\s*({_X})\s*(?:都)?(?:加上?|打上?|添加)\s*({_X})\s*(?:的)?标签", _tag),
)
