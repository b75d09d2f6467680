"""The tokenizer as GGUF metadata: tokens with their kinds, merges or scores, special ids and the chat template.

llama.cpp does not read tokenizer.json: it knows ways to cut text by name (`PRE_TOKENIZERS`) and applies no normaliser. A tokenizer
that none of them describes is refused here, because its text would silently become other ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.chat_template import without_generation_marks
from model.token_text import SPACE, steps
from tools.convert.compare import check_fits
from tools.convert.gguf_names import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    GPT2_PATTERN,
    INEXACT,
    KNOWN_STOPS,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    missing_bytes,
)

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer


@dataclass
class GGUFTokenizer:
    """Everything that stands under `tokenizer.` in a GGUF file."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE)."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] | None
    scores: list[float] | None
    add_space_prefix: bool
    ids: dict[str, int]
    """bos, eos, eot, eom, unk, pad: what the tokenizer has."""
    add_bos: bool
    add_eos: bool
    chat_template: str

    def write(self, writer: Any) -> None:
        """Hand all fields to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.add_space_prefix)
        for name, token_id in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def gguf_tokenizer(tokenizer: BPETokenizer, vocab_size: int, log: Callable[[str], None] = print) -> GGUFTokenizer:
    """Describe a tokenizer for a model with `vocab_size` rows; ids that it leaves free become UNUSED tokens.

    Raises ValueError where llama.cpp would cut text differently, naming what is not known there.
    """
    data = json.loads(tokenizer.backend.to_str())
    if data["model"].get("type") != "BPE":
        raise ValueError(f"the tokenizer is a {data['model'].get('type')} model; GGUF export knows BPE")
    check_fits(tokenizer, vocab_size)
    tokens, kinds = _tokens(data, vocab_size)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]]
    joined: list[str] | None = None
    scores: list[float] | None = None
    prefix = False
    if _is_byte_level(data):
        kind, pre = "gpt2", _pre_name(data, log)
        joined = [" ".join(pair) for pair in merges]
    else:
        kind, pre, prefix = "llama", "default", _space_prefix(data, log)
        scores = _scores(data, merges, vocab_size)
        kinds = [BYTE if k == NORMAL and t in BYTE_TOKENS else k for t, k in zip(tokens, kinds, strict=True)]
        missing = missing_bytes(tokens)
        if missing:
            raise ValueError(f"a SentencePiece tokenizer needs all byte tokens in GGUF; missing: {', '.join(missing[:4])}")
    ids = _special_ids(tokenizer, data, tokens, log)
    if "unk" in ids and kind == "llama":
        kinds[ids["unk"]] = UNKNOWN
    marked = tokenizer.backend.encode("a").ids  # with what the post-processor adds
    return GGUFTokenizer(
        kind,
        pre,
        tokens,
        kinds,
        joined,
        scores,
        prefix,
        ids,
        add_bos=len(marked) > 1 and marked[0] == tokenizer.bos_token_id,
        add_eos=len(marked) > 1 and marked[-1] == tokenizer.eos_token_id,
        chat_template=without_generation_marks(tokenizer.chat_template),
    )


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens: list[str | None] = [None] * vocab_size
    kinds = [UNUSED] * vocab_size
    for token, token_id in data["model"]["vocab"].items():
        tokens[token_id], kinds[token_id] = token, NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    taken = set(tokens)
    names = []
    for token_id, token in enumerate(tokens):
        name = token
        if name is None:
            name = f"[PAD{token_id}]"
            while name in taken:  # llama.cpp refuses a file with two equal tokens
                name = f"[{name}]"
        names.append(name)
    return names, kinds


def _is_byte_level(data: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps(data["pre_tokenizer"]))


def _pre_name(data: dict[str, Any], log: Callable[[str], None]) -> str:
    """The name in `PRE_TOKENIZERS` of the way this byte-level tokenizer cuts text."""
    for step in steps(data["normalizer"]):
        if step["type"] != "NFC":
            raise ValueError(f"the tokenizer normalises text ({step['type']}); llama.cpp applies no normaliser, so GGUF cannot express it")
        log("note: the tokenizer normalises text to NFC, llama.cpp does not: text in another form gets other ids there")
    patterns = tuple(pattern for step in steps(data["pre_tokenizer"]) for pattern in _step_patterns(step))
    ignore_merges = bool(data["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if patterns in (known.patterns, *known.spellings) and known.ignore_merges == ignore_merges:
            if name in INEXACT:
                log(f"note: {name}: {INEXACT[name]}")
            return name
    raise ValueError(
        f"llama.cpp knows no pre-tokenizer that cuts text by {list(patterns)} with ignore_merges={str(ignore_merges).lower()}; "
        f"known to this exporter: {', '.join(PRE_TOKENIZERS)}"
    )


def _step_patterns(step: dict[str, Any]) -> Iterable[str]:
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"]]
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2_PATTERN] if step.get("use_regex", True) else []
    raise ValueError(f"llama.cpp has no pre-tokenizer with the step {json.dumps(step, ensure_ascii=False)}")


def _space_prefix(data: dict[str, Any], log: Callable[[str], None]) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before a text. ValueError for steps that llama.cpp does not have."""
    prefix, spaces = False, False
    for step in [*steps(data["normalizer"]), *steps(data["pre_tokenizer"])]:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            spaces = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            spaces, prefix = True, step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "first":
                log("note: llama.cpp also puts a space before text that follows a special token, this tokenizer only before the first")
        else:
            raise ValueError(f"llama.cpp's SentencePiece tokenizer has no step {json.dumps(step, ensure_ascii=False)}")
    if not spaces:
        raise ValueError(f"the tokenizer is neither byte-level nor writes spaces as {SPACE}: llama.cpp knows no such BPE")
    return prefix


def _scores(data: dict[str, Any], merges: list[tuple[str, ...]], vocab_size: int) -> list[float]:
    """Scores (V,) with which SentencePiece's rule gives the tokens of the merge list.

    Merging by rank and merging the neighbours whose union has the highest score are the same when every pair of tokens whose union
    is a token may merge, and all merges that give one token stand together in the list. ValueError otherwise.
    """
    vocab: dict[str, int] = data["model"]["vocab"]
    added = {token["content"] for token in data["added_tokens"]}
    scores = [-1e6] * vocab_size
    last = None
    seen: set[str] = set()
    for pair in merges:
        union = "".join(pair)
        if union != last and union in seen:
            raise ValueError(f"the merges of {union!r} are spread over the list: no scores of a SentencePiece model give the same ids")
        if union != last:
            seen.add(union)
            scores[vocab[union]] = -float(len(seen))
        last = union
    allowed = set(merges)
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in allowed and pair[0] in vocab and pair[1] in vocab and not {token, *pair} & added and not _has_bytes(token, pair):
                raise ValueError(
                    f"the tokenizer may not merge {pair[0]!r} and {pair[1]!r}, a SentencePiece model with the token {token!r} would: "
                    "its ids cannot be expressed in GGUF"
                )
    return scores


def _has_bytes(token: str, pair: tuple[str, str]) -> bool:
    return any(part in BYTE_TOKENS for part in (token, *pair))


def _special_ids(tokenizer: BPETokenizer, data: dict[str, Any], tokens: list[str], log: Callable[[str], None]) -> dict[str, int]:
    """Names of GGUF -> ids. Generation must end at every stop: eos, eot and eom are three of them, others are known by name."""
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id
    # Without a BOS llama.cpp would take a default id that is an ordinary token here.
    ids = {"bos": tokenizer.document_end_id if bos is None else bos, "eos": eos, "eot": eos, "pad": tokenizer.pad_token_id}
    unknown = data["model"].get("unk_token")
    if unknown is not None and unknown in tokens:
        ids["unk"] = tokens.index(unknown)
    others = [i for i in tokenizer.stop_ids if i != eos and tokens[i] not in KNOWN_STOPS]
    if others:
        ids["eom"] = others[0]
    if len(others) > 1:
        log(f"note: GGUF has no place for these stop tokens: {', '.join(tokens[i] for i in others[1:])}; give them to the runtime as stops")
    return ids
