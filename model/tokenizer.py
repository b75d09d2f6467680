"""BPETokenizer: text <-> ids, the special tokens, and the one chat renderer.

`train` makes ours: byte-level BPE with Qwen2's split pattern and ChatML. `from_pretrained` reads any BPE tokenizer.json, with the
chat template of its model. Any text of any language becomes ids and comes back. The files it writes are read by transformers as
they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model.chat_spans import assistant_spans, with_thinking
from model.chat_template import STORED_TEMPLATE, TEMPLATE_SOURCE, has_generation_marks, render_spans, turn_ending, unguessable
from model.files import atomic_write_text
from model.token_names import TokenNames, document_beginning, guess_names, read_names, read_template
from model.token_text import BYTE_TOKEN, BYTES, byte_table, drops_first_space, plain_copy, spelling_of

DOCUMENT_END = "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
THINK, THINK_END = "<think>", "</think>"
SPARE_TOKENS = [f"<|spare_{number}|>" for number in range(8)]
# Tokens that open and close turns are control tokens: decoding drops them. Tags inside an answer are ordinary text to a reader.
CONTROL_TOKENS = [DOCUMENT_END, IM_START, IM_END, *SPARE_TOKENS]
TAG_TOKENS = [THINK, THINK_END, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPECIAL_TOKENS = [DOCUMENT_END, IM_START, IM_END, *TAG_TOKENS, *SPARE_TOKENS]
OWN_NAMES = TokenNames(eos=IM_END, document_end=DOCUMENT_END, pad=DOCUMENT_END)
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
    """True where the token is the assistant's own, through the token that ends its turn."""

    @property
    def answer_end(self) -> int:
        """One past the last of those tokens, where a generated answer ends, too: what a template writes after it says nothing. 0 when
        there is none."""
        return max((index + 1 for index, own in enumerate(self.loss_mask) if own), default=0)


class BPETokenizer:
    """Text <-> ids. Make one with `train` or `from_pretrained`."""

    def __init__(self, backend: Tokenizer, chat_template: str | None = None, names: TokenNames | None = None) -> None:
        """names: which token does what; None: told from well-known names. Raises ValueError for what is no BPE tokenizer, and for
        a named token that is not in the vocabulary. Without a template, one that has all of our chat tokens gets ours."""
        data = json.loads(backend.to_str())
        self._spelling = spelling_of(data)
        self.names = names or guess_names(backend)
        added = {token["content"] for token in data["added_tokens"]}
        named = self.names.tokens()
        for token in named:
            _required(backend, token)
        if named - added:
            backend = Tokenizer.from_str(json.dumps(data))  # the caller's stays as it is
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in sorted(named - added)])
            data = json.loads(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.drops_first_space = self._spelling == "spaces" and drops_first_space(data)
        """True where the first token of a text carries a space that does not belong to the text (SentencePiece)."""
        is_chatml = all(backend.token_to_id(token) is not None for token in (DOCUMENT_END, IM_START, IM_END, THINK, THINK_END))
        self.chat_template = chat_template or (STORED_TEMPLATE if is_chatml else "")

        special = {token["content"] for token in data["added_tokens"] if token["special"]} | named
        structural = special | {token["content"] for token in data["added_tokens"] if _TAG_LIKE.fullmatch(token["content"])}
        if self._spelling == "spaces":  # some files list the bytes of unknown characters among the special tokens
            special, structural = ({t for t in tokens if not BYTE_TOKEN.fullmatch(t)} for tokens in (special, structural))
        secret = unguessable("\ufdd4", "")
        self._aliases = {token: f"{secret}{number}\ufdd5" for number, token in enumerate(sorted(structural))}
        self._plain = plain_copy(data, self._aliases)
        assert all(self._plain.token_to_id(alias) == backend.token_to_id(token) for token, alias in self._aliases.items())
        self._structural_pattern = _any_of(structural)
        self._control_pattern = _any_of(structural - set(TAG_TOKENS))
        self._foreign_pattern = _any_of((structural - set(TAG_TOKENS)) | {THINK, THINK_END, "<tool_call>", "</tool_call>"})
        self._special = {_required(backend, token) for token in special}
        self._settle_turn_end()
        self.document_end_id = _required(backend, self.names.document_end)
        self.im_start_id, self.im_end_id = backend.token_to_id(IM_START), backend.token_to_id(IM_END)

    def _settle_turn_end(self) -> None:
        """What the template writes behind an assistant's words ends a turn, whatever the files call the eos token."""
        ending = "" if self.chat_template in ("", STORED_TEMPLATE) else turn_ending(self.chat_template, self._template_tokens())
        found = self._structural_pattern.match(ending.lstrip())
        if found is None or found.group() in (self.names.eos, *self.names.stops):
            return
        if "eos_token" in self.chat_template:
            self.names = dataclasses.replace(self.names, stops=(*self.names.stops, found.group()))
        else:
            self.names = dataclasses.replace(self.names, eos=found.group(), stops=(*self.names.stops, self.names.eos))

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
        """Read tokenizer.json and what stands beside it (tokenizer_config.json, special_tokens_map.json, generation_config.json,
        chat_template.jinja) from a directory, or from the file's. Raises FileNotFoundError or ValueError that name the file."""
        path = Path(path)
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json in {path}; train one with `python -m train.train_tokenizer`, or name its folder with tokenizer_dir=..."
            )
        try:
            backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except BaseException as error:  # the Rust library raises plain Exception, and of a damaged file its panic, which is not even that
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
        try:
            return cls(backend, read_template(file.parent), read_names(file.parent, backend))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        except Exception as error:  # again the library, where the tokenizer is put together anew
            raise ValueError(f"{file} is not a usable tokenizer: {error}") from error

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        path = Path(path)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.names.eos,
            "pad_token": self.names.pad,
            "bos_token": self.names.bos,
            "unk_token": self.names.unk,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
        }
        if self.chat_template:
            config["chat_template"] = self.chat_template
            atomic_write_text(path / "chat_template.jinja", self.chat_template)
        atomic_write_text(path / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        atomic_write_text(path / "tokenizer.json", self.backend.to_str(pretty=True))  # last: by it a tokenizer is known to be there

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: ids that stand for nothing count too."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def first_difference(self, other: BPETokenizer) -> tuple[int, str] | None:
        """The lowest id at which the two vocabularies differ, and a token that has it; None where every token has the same id in both."""
        ours, theirs = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (self, other))
        return min(((index, token) for token, index in ours.items() ^ theirs.items()), default=None)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text and conversations become ids."""
        parts = self.backend.to_str() + self.chat_template
        if self.names != OWN_NAMES:
            parts += repr((dataclasses.replace(self.names, stops=tuple(sorted(self.names.stops))), self.document_start()))
        return hashlib.blake2b(parts.encode("utf-8"), digest_size=10).hexdigest()

    @property
    def eos_token_id(self) -> int:
        """The end of an assistant's turn (ours: <|im_end|>)."""
        return _required(self.backend, self.names.eos)

    @property
    def pad_token_id(self) -> int:
        return _required(self.backend, self.names.pad)

    @property
    def bos_token_id(self) -> int | None:
        return None if self.names.bos is None else self.backend.token_to_id(self.names.bos)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Every token that ends a reply, the end of a turn first."""
        return [_required(self.backend, name) for name in self._stop_names]

    @property
    def _stop_names(self) -> list[str]:
        return list(dict.fromkeys((self.names.eos, self.names.document_end, *self.names.stops)))

    @property
    def special_ids(self) -> set[int]:
        """Control tokens: turn marks, document end, spares."""
        return self._special

    def document_start(self) -> list[int]:
        """The ids that a document begins with: the BOS of a tokenizer that puts one before every text, else the document end."""
        beginning = document_beginning(self.backend)
        return [self.document_end_id if beginning is None else beginning]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name; None when the vocabulary has no such token."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text. Special tokens written in it are ordinary characters unless parse_special."""
        return (self.backend if parse_special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that form no character become U+FFFD."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self._special))
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for (possibly part of a character). Raises ValueError for an id outside the vocabulary."""
        token_id = int(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._byte_table[token_id]

    @cached_property
    def _byte_table(self) -> list[bytes]:
        return byte_table(self.backend, self._spelling, self.vocab_size)

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

        messages: {"role", "content", "reasoning_content"?, "tool_calls"?}. enable_thinking=False closes the thinking before it starts:
        empty thinking then belongs to the question and is not learned.
        learn: indices of the assistant's turns that count for the loss; None: all of them.
        Structural tokens inside a message stay ordinary characters, so that no user can open or close a turn.
        A template that came with an imported model has a mask only where no reply is asked for (add_generation_prompt=False).
        Raises ValueError for a conversation that the template refuses, or in which it does not show what the assistant says.
        """
        if not self.chat_template:
            raise ValueError(
                "this tokenizer has no chat template, so that it is not known how a conversation is written; put the "
                "chat_template.jinja of the model's chat version beside tokenizer.json"
            )
        # A structural token from a message travels between two of these marks and is then encoded as plain text.
        mark = unguessable("\ufdd0", "\ufdd1")
        shielded, tools = self._shield(messages, mark), self._shield(tools, mark)
        own = self.chat_template == STORED_TEMPLATE

        def pieces(messages: list[dict[str, Any]], prompt: bool) -> list[tuple[str, bool]]:
            template = TEMPLATE_SOURCE if own else self.chat_template
            return render_spans(messages, tools, prompt, enable_thinking, template, self._template_tokens())

        assistants = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        learned = set(assistants).intersection(assistants if learn is None else learn)
        if own or has_generation_marks(self.chat_template):
            parts = _chosen(pieces(shielded, add_generation_prompt), assistants, learned)
            parts = _asked_not_to_think(parts) if enable_thinking is False else parts
            text = "".join(piece for piece, _ in parts)
            ids, mask = self._encode_pieces(parts, mark) if own else self._encode_whole(parts, mark)
        else:
            spans: list[tuple[int, int]] = []
            if add_generation_prompt:
                text = "".join(piece for piece, _ in pieces(shielded, True))
            else:
                if self.token_id(THINK) is not None and "reasoning_content" not in self.chat_template:
                    shielded = [with_thinking(m) if i in learned else m for i, m in enumerate(shielded)]
                stop = re.compile(f"{mark}.*?{mark}|({_any_of(self._stop_names).pattern})", re.DOTALL)
                text, spans = assistant_spans(lambda m, p: "".join(t for t, _ in pieces(m, p)), shielded, learned, stop)
            parts = _cut(text, spans)
            ids, mask = self._encode_whole(_asked_not_to_think(parts) if enable_thinking is False else parts, mark)
        return Rendered(text.replace(mark, ""), ids, mask)

    def _template_tokens(self) -> dict[str, str]:
        """The variables of a chat template that name tokens; those that a tokenizer lacks are undefined, as in transformers."""
        tokens = {"bos_token": self.names.bos, "eos_token": self.names.eos, "pad_token": self.names.pad, "unk_token": self.names.unk}
        return {name: token for name, token in tokens.items() if token is not None}

    def _shield(self, value: Any, mark: str, pattern: re.Pattern[str] | None = None) -> Any:
        """The same messages or tools with every special token that stands in a text put between two marks.

        Control tokens are marked everywhere, tags in what is not the assistant's own. <tool_response> stays as it is: by the
        format, a user's turn may hand over a tool's result in it.
        """
        pattern = pattern or self._control_pattern
        if isinstance(value, str):
            return pattern.sub(lambda found: mark + found.group() + mark, value)
        if isinstance(value, dict):
            if value.get("role") in ("user", "system", "tool"):
                pattern = self._foreign_pattern
            return {self._shield(key, mark, pattern): self._shield(item, mark, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._shield(item, mark, pattern) for item in value]
        return value

    def _encode_pieces(self, parts: list[tuple[str, bool]], mark: str) -> tuple[list[int], list[bool]]:
        """(text, learned) pieces, each encoded on its own: an answer's tokens never reach into its prompt."""
        ids: list[int] = []
        mask: list[bool] = []
        for piece, learned in parts:
            for index, part in enumerate(piece.split(mark)):
                found = self.encode(part, parse_special=index % 2 == 0)
                ids += found
                mask += [learned] * len(found)
        return ids, mask

    def _encode_whole(self, parts: list[tuple[str, bool]], mark: str) -> tuple[list[int], list[bool]]:
        """(text, learned) pieces encoded as one text, as transformers does it; a token is learned if any of it is.

        Special tokens of the template go by their aliases, those between two marks (from a message) are plain characters.
        """
        text, spans, inside = "", [], False
        for piece, learned in parts:
            start = len(text)
            for index, part in enumerate(piece.split(mark)):
                inside ^= index > 0
                text += part if inside else self._structural_pattern.sub(lambda found: self._aliases[found.group()], part)
            if learned:
                spans.append((start, len(text)))
        encoding = self._plain.encode(text, add_special_tokens=False)
        mask, at = [], 0
        for start, end in encoding.offsets:
            while at < len(spans) and spans[at][1] <= start:
                at += 1
            mask.append(at < len(spans) and max(end, start + 1) > spans[at][0])
        return encoding.ids, mask


_EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")
# Names of structure that files do not always flag as special: <think>, <|user|>, </tool_call>, [INST].
_TAG_LIKE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these tokens, the longest where several begin."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))))


def _cut(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text as (piece, learned), cut at the edges of the spans."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [(text[start:end], index % 2 == 1) for index, (start, end) in enumerate(zip(edges, edges[1:], strict=False))]


def _chosen(parts: list[tuple[str, bool]], assistants: list[int], learned: set[int]) -> list[tuple[str, bool]]:
    """Pieces of a template with marks, where only the turns in `learned` stay marked. ValueError when it is not clear whose they are."""
    if learned.issuperset(assistants):
        return parts
    if sum(spoken for _, spoken in parts) != len(assistants):
        raise ValueError("the chat template does not put each of the assistant's turns between {% generation %} marks of its own")
    turns = iter(assistants)
    return [(piece, spoken and next(turns) in learned) for piece, spoken in parts]


def _asked_not_to_think(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The same pieces, where empty thinking at the beginning of a learned one is not learned."""
    found: list[tuple[str, bool]] = []
    for piece, learned in parts:
        empty = _EMPTY_THINKING.match(piece) if learned else None
        end = empty.end() if empty else 0
        found += [(piece[:end], False)] * bool(end) + [(piece[end:], learned)]
    return found


def _required(backend: Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token} token; name one that it has, or train one with `python -m train.train_tokenizer`")
    return int(found)


_LONG_WORD = re.compile(rf"[^\W\d_]{{{LONGEST_TRAINED_WORD}}}")


def _capped(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield _LONG_WORD.sub(r"\g<0> ", text)
