"""Byte-level BPE: every text comes back, digits stand alone, files are complete or refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import BPETokenizer
from model.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, TAG_TOKENS

CORPUS = ["今天天气很好。今天天气不好。", "the cat sat on the mat, the cat sat", "def f(x):\n    return x\n"] * 3
TEXTS = [
    "今天天气很好，我们去公园。",
    "The quick brown fox doesn't jump.",
    "def add(a, b):\n\treturn a + b  # 加法\r\n\r\n",
    "👩‍👩‍👧‍👦 🇨🇳 😀😀",
    "𠮷野家 龘 ꧁ ﷽ مرحبا नमस्ते ไทย",
    "e\u0301 \u00e9 \u200b\u200d\ufeff \u2028 \x00\x01\x7f\x85",
    "\ufdd0\uffff\U0010ffff",
    "   leading, trailing   \n\n\n\t ",
    "<|im_end|><think></tool_call>",
    "Ġ ĠĊ ¡ÿ",
    "a" * 300,
    "",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trip(text: str, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: normalisation, unknown tokens, a space added in front or lost behind."""
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert b"".join(map(tiny_tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert not tiny_tokenizer.special_ids & set(ids)


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_random_unicode_round_trip(tiny_tokenizer: BPETokenizer, text: str) -> None:
    """Guards: a character no one thought of."""
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tiny_tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text, parse_special=True), skip_special_tokens=False) == text


def test_encode_batch_equals_encode(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a corpus tokenised in parallel with other ids than the chat uses."""
    assert tiny_tokenizer.encode_batch(TEXTS) == [tiny_tokenizer.encode(text) for text in TEXTS]


def test_every_digit_stands_alone() -> None:
    """Guards: numbers that are cut differently each time, which makes arithmetic hard to learn."""
    tokenizer = BPETokenizer.train(["2024 2024 2024 1234567890 ２０２４"] * 50, SMALLEST_VOCABULARY + 40, progress=False)
    for number in ("2024", "1234567890", "x2024y"):
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode(number)] == [c.encode() for c in number]
    assert len(tokenizer.encode("２０２４")) >= 4


def test_merges_are_learned() -> None:
    """Guards: a training that ends with bytes only."""
    tokenizer = BPETokenizer.train(CORPUS, SMALLEST_VOCABULARY + 60, progress=False)
    assert len(tokenizer.encode("今天天气")) < len("今天天气".encode()) / 2
    assert len(tokenizer.encode("the cat")) <= 3


def test_special_tokens_are_single_ids(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a turn mark made of several tokens; a mark typed in a text that becomes a real one."""
    ids = [tiny_tokenizer.encode(token, parse_special=True) for token in SPECIAL_TOKENS]
    assert all(len(found) == 1 for found in ids)
    assert sorted(found[0] for found in ids) == list(range(tiny_tokenizer.vocab_size - len(SPECIAL_TOKENS), tiny_tokenizer.vocab_size))
    for token in SPECIAL_TOKENS:
        plain = tiny_tokenizer.encode(token)
        assert len(plain) > 1 and tiny_tokenizer.decode(plain) == token
    assert tiny_tokenizer.eos_token_id == tiny_tokenizer.im_end_id == tiny_tokenizer.encode("<|im_end|>", parse_special=True)[0]
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.document_end_id == tiny_tokenizer.encode("<|endoftext|>", parse_special=True)[0]


def test_decoding_drops_control_tokens_and_keeps_tags(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: thinking tags that vanish from an answer, or turn marks that stay in it."""
    text = "<|im_start|>a<think>b</think><tool_call>c</tool_call><|im_end|>"
    ids = tiny_tokenizer.encode(text, parse_special=True)
    assert tiny_tokenizer.decode(ids) == "a<think>b</think><tool_call>c</tool_call>"
    assert tiny_tokenizer.decode(ids, skip_special_tokens=False) == text
    lengths = tiny_tokenizer.token_byte_lengths()
    assert len(lengths) == tiny_tokenizer.vocab_size
    assert all(lengths[i] == 0 for i in tiny_tokenizer.special_ids)
    assert all(lengths[tiny_tokenizer.encode(tag, parse_special=True)[0]] == len(tag) for tag in TAG_TOKENS)


def test_part_of_a_character_is_a_replacement_sign(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: an exception, or silence, where the model stops inside a character."""
    ids = tiny_tokenizer.encode("ok龘")
    assert tiny_tokenizer.decode(ids[:-1]) == "ok\ufffd"
    assert tiny_tokenizer.decode(ids[-1:]) == "\ufffd"


def test_ids_outside_the_vocabulary(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: ids of another model decoded into nonsense, negative ones counted from the end."""
    for wrong in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(ValueError, match=str(wrong)):
            tiny_tokenizer.decode([wrong])


def test_a_vocabulary_without_room_is_refused() -> None:
    """Guards: bytes or special tokens pushed out of a small vocabulary."""
    with pytest.raises(ValueError, match=f"tokenizer.vocab_size={SMALLEST_VOCABULARY - 1}.*{SMALLEST_VOCABULARY}"):
        BPETokenizer.train(CORPUS, SMALLEST_VOCABULARY - 1, progress=False)
    smallest = BPETokenizer.train(CORPUS, SMALLEST_VOCABULARY, progress=False)
    assert smallest.vocab_size == SMALLEST_VOCABULARY
    assert smallest.decode(smallest.encode("今天 the")) == "今天 the"


def test_training_is_deterministic() -> None:
    """Guards: another tokenizer from the same corpus, which makes every stored token id worthless."""
    words = [chr(0x4E00 + n) for n in range(60)] + [chr(97 + n % 26) * 2 for n in range(60)]
    generator = random.Random(5)
    corpus = [" ".join(generator.choices(words, k=30)) for _ in range(60)]
    files = [BPETokenizer.train(iter(corpus), 420, progress=False).backend.to_str() for _ in range(2)]
    assert files[0] == files[1]


def test_long_words_do_not_become_tokens() -> None:
    """Guards: a base64 block or a run of one letter that fills the vocabulary and the memory."""
    tokenizer = BPETokenizer.train(["x" * 5000, "字" * 5000, "normal words here"] * 2, SMALLEST_VOCABULARY + 60, progress=False)
    assert max(tokenizer.token_byte_lengths()) <= 64 * 3
    assert tokenizer.decode(tokenizer.encode("x" * 999)) == "x" * 999


def test_saved_and_read_again(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: files that give other ids, from a directory or from the one file."""
    tiny_tokenizer.save_pretrained(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder" / "tokenizer.json")):
        back = BPETokenizer.from_pretrained(path)
        assert [back.encode(t) for t in TEXTS] == [tiny_tokenizer.encode(t) for t in TEXTS]
        assert (back.vocab_size, back.eos_token_id, back.document_end_id) == (
            tiny_tokenizer.vocab_size,
            tiny_tokenizer.eos_token_id,
            tiny_tokenizer.document_end_id,
        )
        assert back.chat_template == tiny_tokenizer.chat_template
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe{}", b"[]"],
    ids=["empty", "cut", "no-model", "not-utf8", "list"],
)
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    """Guards: a bare Exception from the Rust library."""
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        BPETokenizer.from_pretrained(tmp_path)


def test_a_cut_off_file_is_named(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: the same for a file that was cut off by a full disk."""
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        BPETokenizer.from_pretrained(tmp_path)


def test_missing_files_and_missing_tokens(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a tokenizer without turn marks that fails in the middle of a conversation."""
    with pytest.raises(FileNotFoundError, match="train_tokenizer"):
        BPETokenizer.from_pretrained(tmp_path)
    data = json.loads(tiny_tokenizer.backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="im_end"):
        BPETokenizer.from_pretrained(tmp_path)
