"""Tokenizers of other models: names, both spellings of BPE, the same ids as transformers, files that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imported_helpers import LLAMA3_TEMPLATE, LLAMA3_TOKENS, STYLES, byte_level, sentencepiece, write_folder
from tokenizers import AddedToken, Tokenizer, models

from model import BPETokenizer
from model.tokenizer import TokenNames

TEXTS = [
    "hello there",
    " two  spaces\n\n\tand lines \n",
    "你好，世界 😀 é",
    "a<s>b</s>[INST] c [/INST]<|eot_id|><unk><0x0A>",
    "▁ Ġ",
    "1234567",
    "",
]
DIALOGUE = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "how are you?"},
    {"role": "user", "content": "你好 1+1"},
    {"role": "assistant", "content": "2\n\nfine 😀"},
]


@pytest.fixture(scope="session", params=STYLES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return STYLES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> BPETokenizer:
    return BPETokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trip_and_pieces(tokenizer: BPETokenizer, text: str) -> None:
    """Guards: letters of the vocabulary ("▁", "<0xE4>", "Ġ") shown to a reader, a special token made by a text."""
    ids = tokenizer.encode(text)
    shown = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
    # SentencePiece cannot tell its own letter for a space from a space; Metaspace takes a first space for the one it would write.
    expected = text.replace("▁", " ") if tokenizer.drops_first_space else text
    if tokenizer.backend.normalizer is None and tokenizer.drops_first_space:
        expected = expected.removeprefix(" ")
    assert tokenizer.decode(ids) == expected
    assert (shown.removeprefix(" ") if tokenizer.drops_first_space else shown) == expected
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_names(tmp_path: Path) -> None:
    """Guards: a reply that never ends, a document that begins or ends with the token of another model."""
    expected = {
        "llama2": (TokenNames("</s>", "</s>", "</s>", "<s>", "<unk>"), ["</s>"], ["<s>"]),
        "llama3": (
            TokenNames("<|eot_id|>", "<|end_of_text|>", "<|end_of_text|>", "<|begin_of_text|>", None, ("<|eom_id|>",)),
            ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
            ["<|begin_of_text|>"],
        ),
        "mistral": (TokenNames("</s>", "</s>", "</s>", "<s>", "<unk>"), ["</s>"], ["<s>"]),
    }
    for name, (names, stops, start) in expected.items():
        tokenizer = BPETokenizer.from_pretrained(STYLES[name](tmp_path / name))
        assert tokenizer.names == names
        assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids] == stops
        assert [tokenizer.backend.id_to_token(i) for i in tokenizer.document_start()] == start
        assert tokenizer.eos_token_id == tokenizer.token_id(names.eos) and tokenizer.bos_token_id == tokenizer.token_id(start[0])
        assert tokenizer.token_id("<think>") is None and tokenizer.im_start_id is None


def test_our_own_tokenizer_keeps_its_ids(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: stored tokens and checkpoints that an update makes worthless."""
    tiny_tokenizer.save_pretrained(tmp_path)
    for tokenizer in (tiny_tokenizer, BPETokenizer.from_pretrained(tmp_path)):
        ends = [tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")]
        assert tokenizer.stop_ids == ends and tokenizer.document_start() == ends[1:]
        assert tokenizer.bos_token_id is None and not tokenizer.drops_first_space
        assert tokenizer.fingerprint == tiny_tokenizer.fingerprint


def test_names_without_a_config(tmp_path: Path) -> None:
    """Guards: a lone tokenizer.json that is refused, or guessed in silence where nothing can be known."""
    file = tmp_path / "tokenizer.json"
    sentencepiece().save(str(file))
    assert BPETokenizer.from_pretrained(file).names == TokenNames("</s>", "</s>", "</s>", "<s>", "<unk>")
    byte_level(LLAMA3_TOKENS).save(str(file))
    assert BPETokenizer.from_pretrained(file).names.eos == "<|eot_id|>"
    byte_level(["<|strange|>"]).save(str(file))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*which token ends a turn.*tokenizer_config\.json"):
        BPETokenizer.from_pretrained(file)
    with pytest.raises(ValueError, match=r"no <\|nowhere\|> token"):
        BPETokenizer(byte_level(["<|strange|>"]), names=TokenNames("<|nowhere|>", "<|strange|>", "<|strange|>"))


def test_special_tokens_map_and_missing_files(tmp_path: Path) -> None:
    """Guards: directories of the older layout; a broken file that is taken for none."""
    write_folder(
        tmp_path, byte_level(["<end>", "<fill>"]), {}, special_tokens_map={"eos_token": {"content": "<end>"}, "pad_token": "<fill>"}
    )
    assert BPETokenizer.from_pretrained(tmp_path).names == TokenNames("<end>", "<end>", "<fill>")
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 99999, null]}', encoding="utf-8")
    assert len(BPETokenizer.from_pretrained(tmp_path).stop_ids) == 2
    for content, reason in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"eos_token": "<gone>"}', "<gone>")):
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=reason):
            BPETokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_overrides_the_file(flag: bool, tmp_path: Path) -> None:
    """Guards: documents without the token that their model saw at every beginning, or with one that it never saw."""
    backend = byte_level(["<bos>", "<eos>"], None if flag else "<bos>")
    write_folder(tmp_path, backend, {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": flag})
    tokenizer = BPETokenizer.from_pretrained(tmp_path)
    assert tokenizer.document_start() == [tokenizer.token_id("<bos>" if flag else "<eos>")]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert BPETokenizer.from_pretrained(tmp_path / "saved").document_start() == tokenizer.document_start()


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    """Guards: ids that shift, or a padding token that is lost, when tokens stand outside tokenizer.json's vocabulary."""
    backend = byte_level(["<eos>"])
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("<late>", normalized=False)])
    size = backend.get_vocab_size()
    added = {str(size): {"content": "<pad>", "special": True}}
    write_folder(tmp_path, backend, {"eos_token": "<eos>", "pad_token": "<pad>", "added_tokens_decoder": added})
    tokenizer = BPETokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (size, size + 1)
    assert tokenizer.encode("a    b")[1:-1] == [tokenizer.token_id("    ")], "a run of spaces is text, not structure"
    assert tokenizer.token_id("<late>") not in tokenizer.encode("<late>")
    assert tokenizer.decode(tokenizer.encode("a    <late>")) == "a    <late>"


def test_no_merges_lead_to_a_special_token() -> None:
    """Guards: a mark that is also a word of the vocabulary, where a user's characters merge into it."""
    vocab = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4, "▁": 5, **{f"<0x{byte:02X}>": 6 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")], unk_token="<s>", byte_fallback=True))
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    assert backend.encode("<s>").ids == [4]
    tokenizer = BPETokenizer(backend, names=TokenNames("<s>", "<s>", "<s>"))
    assert tokenizer.encode("<s>") == [3, 2] and tokenizer.vocab_size == len(vocab)
    assert tokenizer.encode("\n") == [6 + 10] and tokenizer.token_bytes(6 + 10) == b"\n"


def test_bytes_listed_as_added_tokens() -> None:
    """Guards: "<0x0A>" typed in a text that becomes a line end; a line end that is lost because its token was taken out."""
    backend = sentencepiece()
    backend.add_special_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer = BPETokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a\n<0x0A>你")) == "a\n<0x0A>你"
    assert not any(tokenizer.token_bytes(i) == b"\n" for i in tokenizer.encode("<0x0A>"))


def test_other_kinds_are_refused_by_name() -> None:
    """Guards: a tokenizer whose tokens are shown with pieces of its own spelling, or a failure deep in training."""
    for model, name in (
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("a", 0.0)], unk_id=0), "Unigram"),
        (models.BPE({"a": 0, "</s>": 1}, []), "neither byte-level nor SentencePiece"),
        (models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ):
        with pytest.raises(ValueError, match=name):
            BPETokenizer(Tokenizer(model), names=TokenNames("a", "a", "a"))


def test_the_template_says_what_ends_a_turn(tmp_path: Path) -> None:
    """Guards: files that call the document end eos while the template ends turns with another token: the reply never stops."""
    backend = byte_level(LLAMA3_TOKENS, "<|begin_of_text|>")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": LLAMA3_TEMPLATE}
    tokenizer = BPETokenizer.from_pretrained(write_folder(tmp_path, backend, config))
    assert tokenizer.eos_token_id == backend.token_to_id("<|eot_id|>")
    assert set(tokenizer.stop_ids) == {backend.token_to_id("<|eot_id|>"), backend.token_to_id("<|end_of_text|>")}


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    """Guards: a base model that is spoken to in a format it has never seen; a directory that then cannot be saved."""
    tokenizer = BPETokenizer(sentencepiece())
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        tokenizer.render(DIALOGUE)
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert BPETokenizer.from_pretrained(tmp_path).encode("hello") == tokenizer.encode("hello")


# ---------------------------------------------------------------- against transformers


def reference(folder: Path) -> Any:
    pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_ids_equal_transformers(folder: Path, tokenizer: BPETokenizer) -> None:
    """Guards: a pretrained model fed with other ids than those it was trained on."""
    theirs = reference(folder)
    for text in TEXTS:
        assert tokenizer.encode(text, parse_special=True) == theirs(text, add_special_tokens=False).input_ids
    for text in ("hello there", "你好\n"):
        ids = theirs(text).input_ids
        assert [*tokenizer.document_start(), *tokenizer.encode(text)] == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("ask", [False, True])
def test_conversations_equal_transformers(folder: Path, tokenizer: BPETokenizer, ask: bool) -> None:
    """Guards: a prompt cut into pieces, each of which gets a SentencePiece space of its own."""
    theirs = reference(folder)
    for messages in (DIALOGUE, DIALOGUE[:1], [{"role": "system", "content": "be kind"}, *DIALOGUE]):
        if ask:
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        rendered = tokenizer.render(messages, add_generation_prompt=ask)
        assert rendered.text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=ask, return_dict=False)
        assert rendered.ids == ids == tokenizer.encode(rendered.text, parse_special=True)


def test_saved_and_read_by_transformers(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a fine-tuned checkpoint that forgets the names or the template of the model it began with."""
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == tokenizer.names.eos and config["bos_token"] == tokenizer.names.bos
    back = BPETokenizer.from_pretrained(tmp_path)
    assert (back.names.eos, back.names.document_end, back.chat_template) == (
        tokenizer.names.eos,
        tokenizer.names.document_end,
        tokenizer.chat_template,
    )
    assert back.render(DIALOGUE) == tokenizer.render(DIALOGUE)
    theirs = reference(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    )
    assert theirs.apply_chat_template(DIALOGUE, tokenize=True, return_dict=False) == tokenizer.render(DIALOGUE).ids
