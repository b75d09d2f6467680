"""The tokenizer of a GGUF file as a `BPETokenizer`: byte-level BPE from its merges, SentencePiece's BPE from its scores.

llama.cpp knows how text is cut only by a name (`tokenizer.ggml.pre`); a name that `PRE_TOKENIZERS` does not hold is refused, because
its text would silently become other ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from model.token_names import DOCUMENT_ENDS, TokenNames
from model.token_text import SPACE
from model.tokenizer import BPETokenizer
from tools.convert.gguf_file import GGUFFile
from tools.convert.gguf_names import CONTROL, KNOWN_STOPS, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED, missing_bytes

# Other names of `tokenizer.ggml.pre` for a way to cut text in PRE_TOKENIZERS.
SAME_PRE = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "phi-2": "gpt-2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
}
ADDS_BOS = ("llama-bpe", "tekken")  # where a file that does not say whether BOS is added means yes


class _Vocabulary:
    """Tokens and their kinds (V,), trailing unused ones left out, and the ids that the file gives a role."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.tokens: list[str] = file.items("tokenizer.ggml.tokens", str)
        self.kinds = (
            file.items("tokenizer.ggml.token_type", int) if "tokenizer.ggml.token_type" in file.fields else [NORMAL] * len(self.tokens)
        )
        if len(self.kinds) != len(self.tokens):
            raise ValueError(f"{file.path}: {len(self.tokens)} tokens, but {len(self.kinds)} entries in tokenizer.ggml.token_type")
        self.sentencepiece = file.text("tokenizer.ggml.model") == "llama"
        usual = {"bos": 1, "eos": 2, "unknown": 0} if self.sentencepiece else {}
        self.ids: dict[str, int | None] = {}
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            key = f"tokenizer.ggml.{role}_token_id"
            token_id = file.integer(key, usual.get(role)) if key in file.fields or role in usual else None
            # Some files write -1 or 2^32 - 1 for a token they do not have.
            self.ids[role] = None if token_id in (-1, 2**32 - 1) else token_id
            if token_id is not None and self.ids[role] is not None and not 0 <= token_id < len(self.tokens):
                raise ValueError(f"{file.path}: {key}={token_id} is outside the vocabulary of {len(self.tokens)} tokens")
        roles = {self.ids[role] for role in ("bos", "eos", "eot", "eom", "padding")}
        self.kinds = [CONTROL if i in roles else kind for i, kind in enumerate(self.kinds)]
        while self.kinds and self.kinds[-1] == UNUSED:  # rows that only pad the embedding
            del self.tokens[-1], self.kinds[-1]
        repeated = len(self.tokens) - len(set(self.tokens))
        if repeated:
            raise ValueError(f"{file.path}: {repeated} tokens occur twice in tokenizer.ggml.tokens")

    def name(self, role: str) -> str | None:
        token_id = self.ids[role]
        return None if token_id is None else self.tokens[token_id]

    def controls(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that are control tokens here, in the order of `names`."""
        found = {token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == CONTROL}
        return [name for name in names if name in found]


def tokenizer_from_gguf(file: GGUFFile, log: Callable[[str], None] = print) -> BPETokenizer:
    """Build the tokenizer. ValueError names a field that is missing, contradictory or not supported."""
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model={kind!r} is not supported, only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        )
    vocabulary = _Vocabulary(file)
    backend = _sentencepiece(vocabulary) if vocabulary.sentencepiece else _byte_level(vocabulary)
    backend.add_tokens(_added(vocabulary))
    for token_id, token in enumerate(vocabulary.tokens):
        if backend.token_to_id(token) != token_id:
            raise ValueError(f"{file.path}: the token {token!r} has the id {token_id}, which this kind of tokenizer cannot give it")
    template = file.fields.get("tokenizer.chat_template")
    template = file.text("tokenizer.chat_template") if template is not None else None
    names = _names(vocabulary, template)
    if names.bos is not None and _adds_bos(file):
        bos_id = vocabulary.tokens.index(names.bos)
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[names.bos, "$A"], pair=[names.bos, "$A", names.bos, "$B:1"], special_tokens=[(names.bos, bos_id)]
        )
    if file.flag("tokenizer.ggml.add_eos_token", False):
        log("note: the file asks for an end token after every text (tokenizer.ggml.add_eos_token), which is left out")
    return BPETokenizer(backend, template, names)


def _added(vocabulary: _Vocabulary) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=kind == CONTROL or kind == UNKNOWN)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _model_vocabulary(vocabulary: _Vocabulary) -> dict[str, int]:
    """Token -> id, without the added tokens at the end: those follow by themselves, as in most tokenizer.json files."""
    count = len(vocabulary.tokens)
    while count and vocabulary.kinds[count - 1] in (CONTROL, USER_DEFINED):
        count -= 1
    return {token: i for i, token in enumerate(vocabulary.tokens[:count])}


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **settings: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(vocab=_model_vocabulary(vocabulary), merges=merges, **settings))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{vocabulary.file.path}: its tokens and merges do not fit together: {error}") from error


# -------------------------------------------------------------------------------------------- byte-level BPE


def _pre_name(file: GGUFFile) -> str:
    given = file.text("tokenizer.ggml.pre", "default")
    return SAME_PRE.get(given, given)


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    file = vocabulary.file
    known = PRE_TOKENIZERS.get(_pre_name(file))
    if known is None:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre={file.fields['tokenizer.ggml.pre']!r} names an unknown way to cut text; "
            f"known: {', '.join([*PRE_TOKENIZERS, *SAME_PRE])}"
        )
    merges = []
    for merge in file.items("tokenizer.ggml.merges", str):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ValueError(f"{file.path}: tokenizer.ggml.merges holds {merge!r}, which is not a pair")
        merges.append((merge[:cut], merge[cut + 1 :]))
    backend = _bpe(vocabulary, merges, ignore_merges=known.ignore_merges)
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


# ---------------------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    file = vocabulary.file
    if file.fields.get("tokenizer.ggml.precompiled_charsmap"):
        raise ValueError(f"{file.path}: tokenizer.ggml.precompiled_charsmap (normalised text) is not supported")
    scores = file.items("tokenizer.ggml.scores", (int, float))
    if len(scores) < len(vocabulary.tokens):
        raise ValueError(f"{file.path}: {len(vocabulary.tokens)} tokens, but {len(scores)} entries in tokenizer.ggml.scores")
    missing = missing_bytes(vocabulary.tokens)
    if missing:
        raise ValueError(f"{file.path}: a SentencePiece tokenizer needs all byte tokens; missing: {', '.join(missing[:4])}")
    backend = _bpe(
        vocabulary, _merges_from_scores(vocabulary, scores), byte_fallback=True, fuse_unk=True, unk_token=vocabulary.name("unknown")
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces  # type: ignore[assignment]
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)  # type: ignore[assignment]
    return backend


def _merges_from_scores(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, best score first.

    SentencePiece merges the neighbours whose union has the highest score, the first of equals; merging by rank does the same as
    long as no two unions share a score. ValueError otherwise, as neither rule could stand for the other.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.kinds[i] == NORMAL}
    unions: dict[float, str] = {}
    found: list[tuple[float, int, str, str]] = []
    for token in ids:
        score = scores[ids[token]]
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids]
        if cuts and unions.setdefault(score, token) != token:
            raise ValueError(
                f"{vocabulary.file.path}: the tokens {unions[score]!r} and {token!r} have the same score in tokenizer.ggml.scores, "
                "so that their order cannot be written as merges"
            )
        found += [(-score, min(ids[left], ids[right]), left, right) for left, right in cuts]
    return [(left, right) for _, _, left, right in sorted(found)]


# -------------------------------------------------------------------------------------------------- the roles


def _adds_bos(file: GGUFFile) -> bool:
    usual = file.text("tokenizer.ggml.model") == "llama" or _pre_name(file) in ADDS_BOS
    return file.flag("tokenizer.ggml.add_bos_token", usual)


def _names(vocabulary: _Vocabulary, template: str | None) -> TokenNames:
    """Which tokens end a turn, a document and generation. ValueError when the file names no end token."""
    file = vocabulary.file
    eos, eot = vocabulary.name("eos"), vocabulary.name("eot")
    if eos is None and eot is None:
        raise ValueError(f"{file.path} lacks the key tokenizer.ggml.eos_token_id")
    turn_end = eot or eos  # where the template closes turns with another token, BPETokenizer sees it
    assert turn_end is not None
    documents = vocabulary.controls(DOCUMENT_ENDS)
    document_end = documents[0] if documents else eos or turn_end
    stops = [
        name for name in (turn_end, eos, document_end, vocabulary.name("eom"), *vocabulary.controls(tuple(sorted(KNOWN_STOPS)))) if name
    ]
    uses_bos = _adds_bos(file) or "bos_token" in (template or "")
    return TokenNames(
        eos=turn_end,
        document_end=document_end,
        pad=vocabulary.name("padding") or document_end,
        bos=vocabulary.name("bos") if uses_bos else None,
        unk=vocabulary.name("unknown"),
        stops=tuple(dict.fromkeys(stops)),
    )


__all__ = ["tokenizer_from_gguf"]
