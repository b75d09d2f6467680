"""BPETokenizer: byte-level BPE with Qwen2's split pattern, the special tokens, and the one chat renderer.

Any text of any language becomes ids and comes back unchanged. The files it writes are read by transformers as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model.chat_template import STORED_TEMPLATE, TEMPLATE_SOURCE, render_spans
from model.files import atomic_write_text

DOCUMENT_END = "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, THINK_END = "<think>", "</think>"
SPARE_TOKENS = [f"<|spare_{number}|>" for number in range(8)]
# Tokens that open and close turns are control tokens: decoding drops them. Tags inside an answer are ordinary text to a reader.
CONTROL_TOKENS = [DOCUMENT_END, IM_START, IM_END, *SPARE_TOKENS]
TAG_TOKENS = [THINK, THINK_END, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPECIAL_TOKENS = [DOCUMENT_END, IM_START, IM_END, *TAG_TOKENS, *SPARE_TOKENS]
BYTES = 256
SMALLEST_VOCABULARY = BYTES + len(SPECIAL_TOKENS)
LONGEST_TRAINED_WORD = 64

# Qwen2's way to cut text into words before merging: exports to GGUF can say `pre = qwen2`. Every digit stands alone.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    ids: list[int]
    loss_mask: list[bool]
    """True where the token is the assistant's own, through <|im_end|>."""


class BPETokenizer:
    """Text <-> ids. Make one with `train` or `from_pretrained`."""

    def __init__(self, backend: Tokenizer, chat_template: str | None = None) -> None:
        self.backend = backend
        self.chat_template = chat_template or STORED_TEMPLATE
        self._plain = _without_special_tokens(backend)
        self.document_end_id = self._required(DOCUMENT_END)
        self.im_start_id = self._required(IM_START)
        self.im_end_id = self._required(IM_END)
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        controls = {token.content for token in backend.get_added_tokens_decoder().values() if token.special} - set(TAG_TOKENS)
        controls |= {DOCUMENT_END, IM_START, IM_END}
        self._control_pattern = re.compile("|".join(map(re.escape, sorted(controls))))
        self._foreign_pattern = re.compile("|".join(map(re.escape, sorted(controls | {THINK, THINK_END, "<tool_call>", "</tool_call>"}))))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = True) -> BPETokenizer:
        """Learn `vocab_size` tokens from texts. Very long words (base64, runs of one letter) are cut for training only.

        Raises ValueError when vocab_size leaves no room for the 256 bytes and the special tokens.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
                f"at least {SMALLEST_VOCABULARY}"
            )
        backend = Tokenizer(BPE(byte_fallback=False))
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            special_tokens=[],
            show_progress=progress,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=LONGEST_TRAINED_WORD,
        )
        backend.train_from_iterator(_capped(texts), trainer)
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS if t in CONTROL_TOKENS])
        backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAG_TOKENS])
        return cls(backend)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> BPETokenizer:
        """Read tokenizer.json (and chat_template.jinja) from a directory, or one tokenizer.json file."""
        path = Path(path)
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json in {path}; train one with `python -m train.train_tokenizer`, or name its folder with tokenizer_dir=..."
            )
        try:
            backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
        template = file.with_name("chat_template.jinja")
        return cls(backend, template.read_text(encoding="utf-8") if template.is_file() else None)

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        path = Path(path)
        atomic_write_text(path / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": DOCUMENT_END,
            "bos_token": None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
            "chat_template": self.chat_template,
        }
        atomic_write_text(path / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        atomic_write_text(path / "chat_template.jinja", self.chat_template)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text and conversations become ids."""
        return hashlib.blake2b((self.backend.to_str() + self.chat_template).encode("utf-8"), digest_size=10).hexdigest()

    @property
    def eos_token_id(self) -> int:
        """<|im_end|>: the end of an assistant's turn."""
        return self.im_end_id

    @property
    def pad_token_id(self) -> int:
        return self.document_end_id

    @property
    def special_ids(self) -> set[int]:
        """Control tokens: turn marks, document end, spares."""
        return self._special

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text. Special tokens written in it are ordinary characters unless parse_special."""
        return (self.backend if parse_special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that form no character become U+FFFD."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self._special))
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for (possibly part of a character). Raises ValueError for an id outside the vocabulary."""
        token_id = int(token_id)
        if not hasattr(self, "_byte_table"):
            self._byte_table = self._make_byte_table()
        if not 0 <= token_id < len(self._byte_table):
            raise ValueError(f"token id {token_id} is outside the vocabulary of {len(self._byte_table)}")
        return self._byte_table[token_id]

    def _make_byte_table(self) -> list[bytes]:
        letters = _byte_letters()
        added = {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}
        table = []
        for token_id in range(self.vocab_size):
            token = self.backend.id_to_token(token_id)
            if token_id in added:
                table.append(added[token_id].encode("utf-8"))
            else:
                table.append(b"" if token is None else bytes(letters[c] for c in token))
        return table

    def token_byte_lengths(self) -> list[int]:
        """Number of text bytes per id; control tokens count as 0."""
        return [0 if i in self._special else len(self.token_bytes(i)) for i in range(self.vocab_size)]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        learn: set[int] | None = None,
    ) -> Rendered:
        """A conversation as text, ids and assistant-loss mask: the only place where a conversation becomes tokens.

        messages: {"role", "content", "reasoning_content"?, "tool_calls"?}. enable_thinking=False closes the thinking before it starts.
        learn: indices of the assistant's turns that count for the loss; None: all of them.
        Structural tokens inside a message stay ordinary characters, so that no user can open or close a turn.
        A template that came with an imported model has no marks for the mask: it can be rendered for chatting, not for training.
        """
        own = self.chat_template == STORED_TEMPLATE
        # Unguessable, of characters that neither JSON nor the template changes: a structural token from a message travels between
        # two of these marks and is then encoded as plain text.
        mark = f"\ufdd0{secrets.token_hex(16)}\ufdd1"
        messages, tools = self._shield(messages, mark), self._shield(tools, mark)
        pieces = render_spans(messages, tools, add_generation_prompt, enable_thinking, TEMPLATE_SOURCE if own else self.chat_template)
        ids: list[int] = []
        mask: list[bool] = []
        turns = (index for index, message in enumerate(messages) if message["role"] == "assistant")
        for piece, learned in pieces:
            learned = learned and (next(turns) in learn if learn is not None else True)
            part = self._encode_shielded(piece, mark)
            ids += part
            mask += [learned] * len(part)
        return Rendered("".join(piece for piece, _ in pieces).replace(mark, ""), ids, mask)

    def _shield(self, value: Any, mark: str, pattern: re.Pattern[str] | None = None) -> Any:
        """The same messages or tools with every special token that stands in a text put between two marks.

        Control tokens are marked everywhere, tags in what is not the assistant's own. <tool_response> stays as it is: by the
        format, a user's turn may hand over a tool's result in it.
        """
        pattern = pattern or self._control_pattern
        if isinstance(value, str):
            return pattern.sub(lambda found: mark + found.group() + mark, value) if "<" in value else value
        if isinstance(value, dict):
            if value.get("role") in ("user", "system", "tool"):
                pattern = self._foreign_pattern
            return {self._shield(key, mark, pattern): self._shield(item, mark, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._shield(item, mark, pattern) for item in value]
        return value

    def _encode_shielded(self, text: str, mark: str) -> list[int]:
        """Encode rendered text: the template's own special tokens are parsed, shielded ones from a message are not."""
        ids: list[int] = []
        for index, part in enumerate(text.split(mark)):
            ids += self.encode(part, parse_special=index % 2 == 0)
        return ids

    def _required(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token} token; train one with `python -m train.train_tokenizer`")
        return found


def _without_special_tokens(backend: Tokenizer) -> Tokenizer:
    """The same merges, where special tokens written in a text are only characters."""
    data = json.loads(backend.to_str())
    data["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(data))


_LONG_WORD = re.compile(rf"[^\W\d_]{{{LONGEST_TRAINED_WORD}}}")


def _capped(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield _LONG_WORD.sub(r"\g<0> ", text)


def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(BYTES) if byte not in printable]
    table.update({chr(BYTES + index): byte for index, byte in enumerate(others)})
    return table
