"""The tokenizer of a GGUF file: the ids of llama.cpp for every text, and the right tokens for the ends of turns and documents."""

from __future__ import annotations

import random
import secrets
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")
from gguf_files import (  # noqa: E402
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    model_fields,
    model_tensors,
    random_model,
    tokenizer_fields,
    write_gguf,
)

from model import BPETokenizer  # noqa: E402
from tools.convert.compare import PROBE_TEXTS  # noqa: E402
from tools.convert.gguf_file import GGUFFile  # noqa: E402
from tools.convert.gguf_import import import_gguf  # noqa: E402
from tools.convert.gguf_import_tokenizer import SAME_PRE, tokenizer_from_gguf  # noqa: E402
from tools.convert.gguf_names import PRE_TOKENIZERS  # noqa: E402

LETTERS = "abcdeé的中，  \n1"


def quiet(message: str) -> None:
    """A log that nobody reads."""


@pytest.fixture
def generator() -> random.Random:
    """A new seed every time, printed when a test fails."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


def write_with(path: Path, fields: dict[str, Any]) -> Path:
    """A file with a tiny random model over the tokens in `fields`."""
    model = random_model({"vocab_size": len(fields["tokenizer.ggml.tokens"]), "qk_norm": False, "n_layer": 1})
    return write_gguf(path, "llama", {**model_fields(model.config, "llama"), **fields}, model_tensors(model, "llama"))


def sentencepiece_fields(generator: random.Random, prefix: bool = True) -> dict[str, Any]:
    """Unions of random pieces with random, distinct scores: harder on the order of merging than any trained vocabulary."""
    pieces = sorted(set(LETTERS.replace(" ", "▁").replace("\n", "")))
    unions: set[str] = set()
    while len(unions) < 150:
        union = generator.choice([*pieces, *sorted(unions)]) + generator.choice([*pieces, *sorted(unions)])
        if len(union) <= 8:
            unions.add(union)
    normal = sorted(unions) + pieces
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal, "<tag>"]
    scores = [0.0] * 259 + [-float(i + 1) for i in generator.sample(range(len(unions)), len(unions))] + [-1e6] * len(pieces) + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(normal) + [USER_DEFINED],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def random_texts(generator: random.Random, count: int) -> list[str]:
    return ["".join(generator.choice(LETTERS) for _ in range(generator.randint(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, *SAME_PRE])
def test_byte_level_ids_are_those_of_llama_cpp(pre: str, tiny_tokenizer: BPETokenizer, tmp_path: Path, generator: random.Random) -> None:
    """Guards: a pre-tokenizer's name that stands for another way to cut text: wrong ids, and a model that seems confused."""
    pytest.importorskip("xllamacpp")
    from tools.convert.llama_server import LlamaServer

    file = write_with(tmp_path / "model.gguf", {**tokenizer_fields(tiny_tokenizer), "tokenizer.ggml.pre": pre})
    tokenizer = tokenizer_from_gguf(GGUFFile(file), quiet)
    with LlamaServer(file, 64) as server:
        for text in [*PROBE_TEXTS, *random_texts(generator, 10), "I'LL we've ISN'T　　x", "ABCdef GHi 1234567 ①²½"]:
            assert tokenizer.encode(text, parse_special=True) == server.tokenize(text, parse_special=True), text
            if "<think>" not in text:  # llama.cpp always takes tags for tokens
                assert tokenizer.encode(text) == server.tokenize(text), text
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_llama_cpp(prefix: bool, tmp_path: Path, generator: random.Random) -> None:
    """Guards: scores turned into merges in another order; a space that is put before the text, or before what follows a tag, or not."""
    pytest.importorskip("xllamacpp")
    from tools.convert.llama_server import LlamaServer

    file = write_with(tmp_path / "model.gguf", sentencepiece_fields(generator, prefix))
    folder = import_gguf(file, tmp_path / "out", log=quiet)
    tokenizer = BPETokenizer.from_pretrained(folder)
    texts = [*PROBE_TEXTS, *random_texts(generator, 100), " a", "a ", "  ", "ab<tag>cd<tag> e", "</s>a"]
    texts = [text for text in texts if "</s>" not in text or text == "</s>a"]
    with LlamaServer(file, 64) as server:
        for text in texts:
            assert tokenizer.encode(text, parse_special=True) == server.tokenize(text, parse_special=True), text
            if "<" not in text:
                assert tokenizer.encode(text) == server.tokenize(text), text
                assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_adds_the_same_bos(tmp_path: Path, generator: random.Random) -> None:
    """Guards: an imported Llama that sees its documents begin without BOS, here or in transformers."""
    transformers = pytest.importorskip("transformers")
    file = write_with(tmp_path / "model.gguf", sentencepiece_fields(generator))
    folder = import_gguf(file, tmp_path / "out", log=quiet)
    tokenizer, theirs = BPETokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.document_start() == [1] and tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    for text in random_texts(generator, 20):
        assert theirs(text)["input_ids"] == [1, *tokenizer.encode(text)]


def test_our_own_tokenizer_comes_back(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: lost tags, template or end tokens, and rows that only pad the embedding becoming tokens."""
    fields = tokenizer_fields(tiny_tokenizer, tiny_tokenizer.vocab_size + 12)
    again = BPETokenizer.from_pretrained(import_gguf(write_with(tmp_path / "model.gguf", fields), tmp_path / "out", log=quiet))
    assert again.vocab_size == tiny_tokenizer.vocab_size and again.chat_template == tiny_tokenizer.chat_template
    assert again.stop_ids == tiny_tokenizer.stop_ids and again.special_ids == tiny_tokenizer.special_ids
    assert (again.pad_token_id, again.document_end_id, again.bos_token_id) == (
        tiny_tokenizer.pad_token_id,
        tiny_tokenizer.document_end_id,
        None,
    )
    for text in PROBE_TEXTS:
        assert again.encode(text) == tiny_tokenizer.encode(text)
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello!"}]
    assert again.render(messages) == tiny_tokenizer.render(messages)


def test_what_ends_a_turn(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: replies that do not end, because the file calls the document's end the end token and the template closes turns otherwise."""
    fields = {**tokenizer_fields(tiny_tokenizer), "tokenizer.ggml.eos_token_id": tiny_tokenizer.document_end_id}
    names = tokenizer_from_gguf(GGUFFile(write_with(tmp_path / "base.gguf", fields)), quiet)
    assert set(names.stop_ids) == set(tiny_tokenizer.stop_ids)
    fields["tokenizer.ggml.eot_token_id"] = tiny_tokenizer.eos_token_id
    assert tokenizer_from_gguf(GGUFFile(write_with(tmp_path / "eot.gguf", fields)), quiet).eos_token_id == tiny_tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.token_type": [NORMAL]}, "token_type"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab'"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, "do not fit together"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [NORMAL, NORMAL]}, "outside the vocabulary"),
        ({"tokenizer.ggml.chat_template": 3, "tokenizer.chat_template": 3}, "tokenizer.chat_template"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], words: str, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a raw error of the tokenizers library, or a vocabulary shifted by one."""
    file = write_with(tmp_path / "model.gguf", {**tokenizer_fields(tiny_tokenizer), **changes})
    with pytest.raises(ValueError, match="model.gguf") as caught:
        tokenizer_from_gguf(GGUFFile(file), quiet)
    assert words in str(caught.value)


def test_sentencepiece_that_merges_cannot_express(tmp_path: Path, generator: random.Random) -> None:
    """Guards: equal scores, missing byte tokens or repeated tokens silently giving other ids."""
    fields = sentencepiece_fields(generator)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    cases = [
        ({"tokenizer.ggml.scores": [0.0] * len(tokens)}, "the same score"),
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.tokens": [*tokens[:10], "x7", *tokens[11:]]}, "<0x07>"),
        ({"tokenizer.ggml.tokens": [*tokens[:-1], tokens[-2]]}, "occur twice"),
        ({"tokenizer.ggml.token_type": [*kinds[:-2], UNUSED, UNUSED], "tokenizer.ggml.eos_token_id": len(tokens)}, "eos_token_id"),
    ]
    for index, (changes, words) in enumerate(cases):
        file = write_with(tmp_path / f"{index}.gguf", {**fields, **changes})
        with pytest.raises(ValueError, match=f"{index}.gguf") as caught:
            tokenizer_from_gguf(GGUFFile(file), quiet)
        assert words in str(caught.value)


def test_other_names_lead_somewhere() -> None:
    """Guards: a spelling that stands for a way to cut text that is not in the table."""
    assert set(SAME_PRE.values()) <= set(PRE_TOKENIZERS) and not set(SAME_PRE) & set(PRE_TOKENIZERS)
