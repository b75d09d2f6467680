"""What the tokens of a BPE vocabulary stand for, and its copy for texts in which special tokens are only characters.

Two spellings exist: byte-level (GPT-2, Llama 3, Qwen, ours), where every byte is written as one printable letter, and
SentencePiece's (Llama 2, Mistral), where "▁" is a space and "<0x0A>" a byte of a character that is not in the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import Tokenizer

BYTES = 256
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Spelling = Literal["bytes", "spaces"]


def spelling_of(data: dict[str, Any]) -> Spelling:
    """How a tokenizer.json (parsed) writes its tokens. Raises ValueError for what is not BPE, or BPE of another kind."""
    model = data["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"a {model.get('type')} tokenizer cannot be used, only BPE (the kind of Llama, Qwen, Mistral, SmolLM)")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(f"a BPE tokenizer with {field}={model[field]!r} cannot be used, only byte-level and SentencePiece-style BPE")
    types = {str(step.get("type")) for part in ("decoder", "pre_tokenizer") for step in steps(data.get(part))}
    if "ByteLevel" in types:
        return "bytes"
    if model.get("byte_fallback") or types & {"Metaspace", "ByteFallback"}:
        return "spaces"
    raise ValueError(f"this BPE tokenizer is neither byte-level nor SentencePiece-style (its parts: {', '.join(sorted(types)) or 'none'})")


def drops_first_space(data: dict[str, Any]) -> bool:
    """Whether decoding leaves out the space that a text's first token begins with (SentencePiece's prefix)."""
    for step in steps(data.get("decoder")):
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def steps(part: Any) -> list[dict[str, Any]]:
    """A component of tokenizer.json (normaliser, pre-tokenizer, decoder) as the list of its steps, sequences unfolded."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    children = [child for key in ("normalizers", "pretokenizers", "decoders") for child in part.get(key) or []]
    return [step for child in children for step in steps(child)]


def byte_table(backend: Tokenizer, spelling: Spelling, size: int) -> list[bytes]:
    """The UTF-8 bytes of every id below `size`; b"" for an id that stands for nothing."""
    letters = _byte_letters()
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    table = []
    for token_id in range(size):
        token = added.get(token_id, backend.id_to_token(token_id))
        byte = BYTE_TOKEN.fullmatch(token) if token is not None and spelling == "spaces" else None
        if token is None:
            table.append(b"")
        elif byte:
            table.append(bytes.fromhex(byte[1]))
        elif token_id in added:
            table.append(token.encode("utf-8"))
        elif spelling == "spaces":
            table.append(token.replace(SPACE, " ").encode("utf-8"))
        else:
            # A special token may stand in the vocabulary itself, in its own characters.
            table.append(bytes(letters[c] for c in token) if all(c in letters for c in token) else token.encode("utf-8"))
    return table


def plain_copy(data: dict[str, Any], aliases: Mapping[str, str]) -> Tokenizer:
    """The same vocabulary with the same ids, where each token of `aliases` answers to its alias only.

    Written in a text, such a token is then ordinary characters, also where merges would lead to it.
    """
    model = dict(data["model"])
    if any(token in model["vocab"] for token in aliases):
        model["vocab"] = {aliases.get(token, token): i for token, i in model["vocab"].items()}
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
        model["merges"] = [list(m) for m in merges if not any(part in aliases for part in (*m, "".join(m)))]
        if model.get("unk_token") is not None:
            model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    added = [
        {**token, "content": aliases.get(token["content"], token["content"])}
        for token in data["added_tokens"]
        # Some files list the bytes as added tokens: typed in a text, "<0x0A>" would be a line end.
        if not (BYTE_TOKEN.fullmatch(token["content"]) and token["content"] in model["vocab"])
    ]
    # The post-processor may trim offsets and names tokens that are no longer there.
    copy = {**data, "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(copy))


def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(BYTES) if byte not in printable]
    table.update({chr(BYTES + index): byte for index, byte in enumerate(others)})
    return table
