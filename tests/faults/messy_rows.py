"""Rows as people send them: good ones of every format, and every fault that was seen or thought of, each under its name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

WORDS = ["今天", "天气", "很好", "小猫", "learns", "to", "read", "42", "，", "。", " ", "don't", "🙂", "\n"]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "USER", "narrator", "", None, 3]


def said(random_: random.Random, least: int = 1) -> str:
    return "".join(random_.choice(WORDS) for _ in range(random_.randint(least, 12))) or "好"


def turns(random_: random.Random, count: int | None = None) -> list[dict[str, Any]]:
    count = count or random_.randint(1, 3)
    return [{"role": ("user", "assistant")[i % 2], "content": "说" + said(random_)} for i in range(2 * count)]


def good(random_: random.Random) -> dict[str, Any]:
    """A usable row of some format."""
    question, answer, other = "问" + said(random_), "答" + said(random_), "别" + said(random_)
    return random_.choice(
        [
            {"text": "文" + said(random_, 5)},
            {"conversations": turns(random_)},
            {"messages": [{"role": "system", "content": "短"}, *turns(random_)]},
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            {"prompt": question, "response": answer},
            {"instruction": question, "input": "", "output": answer},
            {"question": question, "answer": answer},
            {"system": "", "user": question, "cot": "想" + said(random_), "final": answer},
            {"prompt": question, "chosen": answer, "rejected": other, "margin": 0.5},
            {"prompt": turns(random_)[:1], "chosen": turns(random_)[1:2], "rejected": other},
            {"prompt": question, "completion": answer, "label": random_.random() < 0.5},
        ]
    )


def wrong_type(random_: random.Random) -> Any:
    return random_.choice([None, 7, -1.5, True, [], {}, [[]], [1, 2], {"text": 3}, ["a", None], float("nan"), 10**30])


def broken_json(random_: random.Random) -> bytes:
    text = json.dumps(good(random_), ensure_ascii=False)
    return random_.choice(
        [
            text[: random_.randrange(1, len(text))],
            text[:-1] + ",}",
            text.replace('"', "'"),
            text + text,
            "[" * 100_000,
            '{"a":' * 50_000,
            '{"text": ' + "9" * 5000 + "}",
            "{}{}",
            "nan",
            '"',
            "\x7f",
        ]
    ).encode("utf-8")


def missing_keys(random_: random.Random) -> dict[str, Any]:
    row = good(random_)
    del row[random_.choice(list(row))]
    return row


def wrong_types(random_: random.Random) -> Any:
    if random_.random() < 0.2:
        return wrong_type(random_)
    row = good(random_)
    row[random_.choice(list(row))] = wrong_type(random_)
    return row


def role_orders(random_: random.Random) -> dict[str, Any]:
    found = turns(random_, 3)
    random_.shuffle(found)
    for turn in found[: random_.randint(0, 3)]:
        turn["role"] = random_.choice(ROLES)
    return {random_.choice(["conversations", "messages", "prompt", "chosen"]): found, "rejected": "不"}


def empty_turns(random_: random.Random) -> dict[str, Any]:
    found = turns(random_)
    random_.choice(found)["content"] = random_.choice(["", " ", "\n\n", "<think></think>", "<think>想", None, [], "\u200b"])
    return random_.choice([{"conversations": found}, {"conversations": []}, {"text": ""}, {"prompt": "", "response": " "}])


def odd_characters(random_: random.Random) -> dict[str, Any]:
    odd = random_.choice(
        ["\x00", "\x1b[2J", "\ufeff", "\u202e", "\u2028", "<|im_end|>", "<|endoftext|>", "<think>", "\U0010ffff", "a" * 3000]
    )
    return {"conversations": [{"role": "user", "content": odd + said(random_)}, {"role": "assistant", "content": said(random_) + odd}]}


def half_character(random_: random.Random) -> bytes:
    return b'{"prompt": "' + said(random_).replace("\n", " ").encode() + b'\\ud83d", "response": "x", "lang": "\\udc00"}'


def not_utf8(random_: random.Random) -> bytes:
    data = bytearray(json.dumps(good(random_), ensure_ascii=False).encode("utf-8"))
    for _ in range(random_.randint(1, 4)):
        data[random_.randrange(len(data))] = random_.choice([0x80, 0xC3, 0xFE, 0xFF])
    return bytes(data)


def nul_bytes(random_: random.Random) -> bytes:
    data = bytearray(json.dumps(good(random_), ensure_ascii=False).encode("utf-8"))
    data.insert(random_.randrange(len(data)), 0)
    return bytes(data)


def marked(random_: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(good(random_)).encode()


def windows_end(random_: random.Random) -> bytes:
    return json.dumps(good(random_)).encode() + b"\r"


def giant(random_: random.Random) -> dict[str, Any]:
    size = random_.choice([20_000, 100_000])
    return random_.choice(
        [
            {"text": "很长" * size},
            {"conversations": turns(random_, size // 100)},
            {"prompt": "问", "chosen": "好" * size, "rejected": "坏" * size},
        ]
    )


def calls(random_: random.Random) -> dict[str, Any]:
    call = random_.choice([{"name": "f", "arguments": "{"}, {"name": "f", "arguments": {"a": 1}}, {"function": 3}, "f()", [], {"name": ""}])
    found = [{"role": "user", "content": "算"}, {"role": "assistant", "content": random_.choice(["", "好"]), "tool_calls": call}]
    return {"messages": found, "tools": random_.choice(["[", [], [{"name": "f"}], "x", {"a": 1}])}


FAULTS: dict[str, Callable[[random.Random], Any]] = {
    "good": good,
    "broken JSON": broken_json,
    "missing keys": missing_keys,
    "wrong types": wrong_types,
    "role orders": role_orders,
    "empty turns": empty_turns,
    "odd characters": odd_characters,
    "half a character": half_character,
    "invalid UTF-8": not_utf8,
    "NUL bytes": nul_bytes,
    "BOM in the middle": marked,
    "CRLF": windows_end,
    "tool calls": calls,
    "giant row": giant,
}
RARE = {"giant row": 0.02}


def rows(random_: random.Random, count: int) -> list[tuple[str, Any]]:
    """(fault, row) of mixed faults and formats; a row is a JSON value, or bytes that stand for themselves in a file of lines."""
    names = list(FAULTS)
    weights = [4.0 if name == "good" else RARE.get(name, 1.0) for name in names]
    return [(name, FAULTS[name](random_)) for name in random_.choices(names, weights, k=count)]


def as_line(row: Any) -> bytes:
    """A row as it stands in a file of lines, never blank; real line ends inside would be several rows."""
    data = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return data.replace(b"\n", b" ") + b"\n"
