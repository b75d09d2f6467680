"""Which token does what in a tokenizer: read from the files of a model directory, or guessed from well-known names.

Nothing in tokenizer.json says which token ends a turn. tokenizer_config.json (older models: special_tokens_map.json) names eos,
bos, pad and unk; generation_config.json may list more tokens that end a reply.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

# The first of these that a tokenizer has is taken: those of chat formats stand before those that end documents.
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>",
    "<|endoftext|>", "<eos>",
)  # fmt: skip
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<｜begin▁of▁sentence｜>", "<bos>")
PADDINGS = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]", "<｜▁pad▁｜>")


@dataclass(frozen=True)
class TokenNames:
    """The tokens that have a task. Each must be in the vocabulary."""

    eos: str
    """Ends an assistant's turn."""
    document_end: str
    """Ends a document in pretraining."""
    pad: str
    bos: str | None = None
    unk: str | None = None
    stops: tuple[str, ...] = ()
    """Tokens beside eos and document_end that end a reply."""

    def tokens(self) -> set[str]:
        """Every token that has a task."""
        named = (self.eos, self.document_end, self.pad, self.bos, self.unk, *self.stops)
        return {token for token in named if token is not None}


def guess_names(backend: Tokenizer) -> TokenNames:
    """Names for a tokenizer.json that stands alone. Raises ValueError when no well-known token ends a turn."""
    if _has(backend, "<|im_start|>") and not _has(backend, "<|im_end|>"):
        raise ValueError("the tokenizer has an <|im_start|> token but no <|im_end|> token, so no turn could end; repair tokenizer.json")
    eos = _first(backend, TURN_ENDS)
    if eos is None:
        raise ValueError(
            f"cannot tell which token ends a turn: the tokenizer has none of {', '.join(TURN_ENDS)}; put a tokenizer_config.json "
            'that names it ({"eos_token": "..."}) beside tokenizer.json, or train a tokenizer with `python -m train.train_tokenizer`'
        )
    end = _first(backend, DOCUMENT_ENDS) or eos
    unk = backend.model.unk_token or _first(backend, ("<unk>",))
    return TokenNames(eos, end, _first(backend, PADDINGS) or end, _first(backend, BEGINNINGS), unk)


def read_names(folder: Path, backend: Tokenizer) -> TokenNames:
    """Names from the files of a model directory. Tokens that the files add to tokenizer.json are added to `backend`.

    Raises ValueError for a file that is not a JSON object, and for an eos token that is not in the vocabulary.
    """
    config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    _add_missing(backend, config)
    eos = _content(config.get("eos_token"))
    if eos is None:
        names = guess_names(backend)
    elif not _has(backend, eos):
        raise ValueError(f"{folder}: eos_token {eos!r} is not in the vocabulary of tokenizer.json: the files do not belong together")
    else:
        end = _first(backend, DOCUMENT_ENDS) or eos
        bos, pad, unk = (_known(backend, config.get(f"{name}_token")) for name in ("bos", "pad", "unk"))
        names = TokenNames(eos, end, pad or end, bos, unk)
    _set_beginning(backend, names.bos, config.get("add_bos_token"))
    stops = [backend.id_to_token(i) for i in _end_ids(folder) if 0 <= i < 1 << 32]
    extra = dict.fromkeys(token for token in stops if token is not None and token not in (names.eos, names.document_end))
    return TokenNames(names.eos, names.document_end, names.pad, names.bos, names.unk, tuple(extra))


def read_template(folder: Path) -> str | None:
    """The chat template of a model directory: chat_template.jinja, else the one (or the "default" one) in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stored = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = named.get("default") or next(iter(named.values()), None)
    return stored if isinstance(stored, str) else None


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


def _end_ids(folder: Path) -> list[int]:
    """The ids that end a reply: generation_config.json's; where there is none, config.json's, as transformers does."""
    file = folder / "generation_config.json"
    found = _read(file if file.is_file() else folder / "config.json").get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return [i for i in listed if isinstance(i, int) and i >= 0]


def _add_missing(backend: Tokenizer, config: dict[str, Any]) -> None:
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return
    fields = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and not _has(backend, entry["content"]):
            backend.add_tokens([AddedToken(entry["content"], **{name: bool(entry[name]) for name in fields if name in entry})])


def _set_beginning(backend: Tokenizer, bos: str | None, wanted: Any) -> None:
    """add_bos_token overrides what tokenizer.json puts before a text; made explicit there, every reader agrees."""
    if bos is None or not isinstance(wanted, bool) or (document_beginning(backend) is not None) == wanted:
        return
    single = f"{bos} $A" if wanted else "$A"
    known = [(bos, backend.token_to_id(bos))] if wanted else []
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=known)  # type: ignore[assignment]


def document_beginning(backend: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    encoding = backend.encode("a")
    return encoding.ids[0] if encoding.special_tokens_mask and encoding.special_tokens_mask[0] else None


def _content(token: Any) -> str | None:
    """A token as it is written in these files: a text, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _known(backend: Tokenizer, token: Any) -> str | None:
    name = _content(token)
    return name if name is not None and _has(backend, name) else None


def _has(backend: Tokenizer, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _first(backend: Tokenizer, tokens: tuple[str, ...]) -> str | None:
    return next((token for token in tokens if _has(backend, token)), None)
