"""Tokenizers and chat templates in the styles of Llama 2, Llama 3 and Mistral, small enough to train for every run of the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "the cat sat on the mat and the dog ran to the park",
    "hello there, how are you today? I am fine, thank you.",
    "today is a good day to learn a little more about cats",
] * 4

LLAMA2_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('the system speaks first') }}{% endif %}
{%- if message.role == 'user' %}
{%- set before = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if loop.index0 == 1 and messages[0].role == 'system' else '' %}
{{- bos_token + '[INST] ' + before + message.content.strip() + ' [/INST]' }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson) + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
        {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}' }}
        {%- if not loop.last %}{{ ', ' }}{% endif %}
    {%- endfor %}
    {{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""


def sentencepiece(legacy: bool = True, extra: tuple[str, ...] = ()) -> Tokenizer:
    """SentencePiece-style BPE with byte fallback: Llama 2 (legacy: a normalizer writes the spaces), else Mistral (Metaspace)."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    names = ["<unk>", "<s>", "</s>", *extra]
    backend.train_from_iterator(CORPUS, BpeTrainer(vocab_size=360, special_tokens=[*names, *byte_tokens], show_progress=False))
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in names]
    backend = Tokenizer.from_str(json.dumps(data))
    if legacy:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return backend


def byte_level(specials: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE in Llama 3's manner: special tokens behind the vocabulary, words of the vocabulary taken before merges."""
    backend = Tokenizer(BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    if bos is not None:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids)
    return backend


LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
MISTRAL_TOKENS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


def write_folder(folder: Path, backend: Tokenizer, config: dict[str, Any], **files: Any) -> Path:
    """A model directory's tokenizer files; further ones by name (generation_config={...})."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def llama2(folder: Path) -> Path:
    token = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        name: {**token, "content": content} for name, content in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    return write_folder(folder, sentencepiece(), {**config, "pad_token": None, "chat_template": LLAMA2_TEMPLATE})


def llama3(folder: Path) -> Path:
    backend = byte_level(LLAMA3_TOKENS, "<|begin_of_text|>")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    ids = [backend.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    templates = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": LLAMA3_TEMPLATE}]
    return write_folder(folder, backend, {**config, "chat_template": templates}, generation_config={"eos_token_id": ids})


def mistral(folder: Path) -> Path:
    backend = sentencepiece(legacy=False, extra=MISTRAL_TOKENS)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": MISTRAL_TEMPLATE}
    return write_folder(folder, backend, config)


STYLES = {"llama2": llama2, "llama3": llama3, "mistral": mistral}
