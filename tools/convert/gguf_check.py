"""Run a GGUF file in llama.cpp and compare it with the checkpoint that it was made from: token ids, log-probabilities, template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.chat_template import STORED_TEMPLATE
from model.checkpoint import find_model, load_pretrained
from model.token_text import steps
from model.tokenizer import BPETokenizer
from tools.convert.compare import GREEDY_TOKENS, PROBE_TEXTS, Comparison, Difference, log_probs, probe_rows, same_greedy
from tools.convert.gguf_names import exported_context
from tools.convert.llama_server import LlamaServer, installed

if TYPE_CHECKING:
    from model.transformer import SmartHaoAI

CONTEXT = 256
POSITIONS = 6  # per probe row; each is one request
WHOLE_VOCABULARY = 16384  # beyond it, the most likely tokens only: the answer of one request would be tens of MB

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city, 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "北京"}}}


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, bool] = field(default_factory=dict)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


CONVERSATIONS = (
    Conversation([_user("你好，今天 is a good day?")]),
    Conversation([{"role": "system", "content": "Answer briefly."}, _user("2 + 3 = ?")]),
    Conversation(
        [_user("What is the capital of France?"), {"role": "assistant", "content": "Paris."}, _user("And of Italy?\n\nOne word.")]
    ),
)
# Only our own template is asked for these: llama.cpp rewrites tools for templates that have no place for them.
OWN_CONVERSATIONS = (
    Conversation([_user("Think not.")], variables={"enable_thinking": False}),
    Conversation([_user("1?"), {"role": "assistant", "content": "One.", "reasoning_content": "hm"}, _user("2?")]),
    Conversation(
        [
            {"role": "system", "content": "Use tools."},
            _user("Weather in 北京?"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        ],
        [_WEATHER],
    ),
)


def check_gguf(folder: str | Path, out_file: str | Path) -> Comparison | None:
    """Compare `out_file`, run by llama.cpp, with the checkpoint `folder`. None: xllamacpp is not installed.

    Raises ValueError when llama.cpp cannot load or run the file.
    """
    runtime = installed()
    if runtime is None:
        return None
    folder = find_model(folder)
    model, tokenizer = load_pretrained(folder), BPETokenizer.from_pretrained(folder)
    context = min(exported_context(model.config), CONTEXT)
    with LlamaServer(out_file, context) as server:
        different = [text for text in PROBE_TEXTS if not _same_ids(server, tokenizer, text)]
        rows = [row for row in probe_rows(tokenizer, context - 1) if row]
        difference = _compare_log_probs(server, model, rows)
        # Prompt and continuation stay within the file's context: a windowed model computes something else beyond its window.
        longest = min(context // 2, context - GREEDY_TOKENS - 1)
        prompts = [row[:longest] for row in rows[:3]] if longest > 0 else []
        equal = all(same_greedy(model, row, server.greedy(row, GREEDY_TOKENS), tokenizer.stop_ids) for row in prompts)
        same_template = _same_template(server, tokenizer) if tokenizer.chat_template else None
    note = f"token ids differ on {', '.join(repr(text[:20]) for text in different[:3])}" if different else ""
    found, positions = difference.largest, difference.positions
    return Comparison(runtime, found, positions, not different, equal if prompts else None, same_template, note, difference.mean_kl)


def _same_ids(server: LlamaServer, tokenizer: BPETokenizer, text: str) -> bool:
    """Plain text and text with special tokens give our ids. llama.cpp normalises nothing, so both get the normalised text."""
    data = json.loads(tokenizer.backend.to_str())
    if {step["type"] for step in steps(data["normalizer"])} == {"NFC"}:
        text = tokenizer.backend.normalizer.normalize_str(text)
    tags = [token["content"] for token in data["added_tokens"] if not token["special"]]
    plain = [server.tokenize(text), _encode_with_tags(tokenizer, text, tags)]
    parsed = [server.tokenize(text, parse_special=True), tokenizer.encode(text, parse_special=True)]
    return plain[0] == plain[1] and parsed[0] == parsed[1]


def _encode_with_tags(tokenizer: BPETokenizer, text: str, tags: list[str]) -> list[int]:
    """llama.cpp reads USER_DEFINED tokens in any text, CONTROL tokens only where it is asked to."""
    if not tags:
        return tokenizer.encode(text)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, sorted(tags, key=len, reverse=True)))})", text):
        ids += tokenizer.encode(part, parse_special=True) if part in tags else tokenizer.encode(part)
    return ids


def _compare_log_probs(server: LlamaServer, model: SmartHaoAI, rows: list[list[int]]) -> Difference:
    size = model.config.vocab_size
    count = size if size <= WHOLE_VOCABULARY else 1024
    difference = Difference()
    for row in rows:
        ours = log_probs(model, row)
        for index in sorted({round(step * (len(row) - 1) / (POSITIONS - 1)) for step in range(POSITIONS)}):
            theirs = server.next_log_probs(row[: index + 1], count)
            difference.add(ours[index][list(theirs)], torch.tensor(list(theirs.values())))
    return difference


def _same_template(server: LlamaServer, tokenizer: BPETokenizer) -> bool:
    """Whether the file's template gives the renderer's text in every conversation that the renderer takes."""
    conversations = CONVERSATIONS + (OWN_CONVERSATIONS if tokenizer.chat_template == STORED_TEMPLATE else ())
    # llama.cpp leaves out a BOS that the template writes when it adds one itself.
    bos = (None if tokenizer.bos_token_id is None else tokenizer.backend.id_to_token(tokenizer.bos_token_id)) or ""
    for talk in conversations:
        try:
            ours = tokenizer.render(talk.messages, talk.tools, add_generation_prompt=True, **talk.variables).text  # type: ignore[arg-type]
        except ValueError:  # an imported template may refuse a system turn
            continue
        theirs = server.apply_template(talk.messages, talk.tools, **talk.variables)
        if theirs.removeprefix(bos) != ours.removeprefix(bos):
            return False
    return True
