"""What lies in a tokenizer's or model's folder, read leniently: a damaged file becomes a finding, never an exception.

The files are read as JSON beside the tokenizers library, because the report must also work where `BPETokenizer` refuses to load.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from model.chat_template import STORED_TEMPLATE
from model.checkpoint import CONFIG_FILE, GENERATION_FILE
from model.files import atomic_write_text
from model.token_text import steps
from model.tokenizer import SPARE_TOKENS, SPLIT_PATTERN, BPETokenizer
from model.weight_files import INDEX_FILE, WEIGHTS_FILE, read_index

TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MAP_FILE = "special_tokens_map.json"
RECORD_FILE = "corpus.json"  # train_tokenizer leaves it beside what it trained
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROLES = ("eos", "pad", "bos", "unk")
MOST_GAPS = 1000
OK, WARN, FAIL = "ok", "WARN", "FAIL"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    detail: str
    remedy: str = ""
    fixable: bool = False


@dataclass
class JsonFile:
    """A JSON object on disk: `data` is None when the file is missing or damaged, `problem` says which damage."""

    path: Path
    data: dict[str, Any] | None = None
    problem: str = ""

    @classmethod
    def read(cls, path: Path) -> JsonFile:
        """The file as it is; never raises for its content."""
        if not path.is_file():
            return cls(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            return cls(path, None, f"not valid JSON: {error}")
        if not isinstance(data, dict):
            return cls(path, None, f"holds a {type(data).__name__}, not an object")
        return cls(path, data)

    @property
    def values(self) -> dict[str, Any]:
        """The object, empty where there is none."""
        return self.data or {}


@dataclass
class TokenizerFolder:
    """The state of one folder. `ids` are the ids as the file declares them: those the model was trained with."""

    path: Path
    tokenizer: JsonFile
    settings: JsonFile
    config: JsonFile
    generation: JsonFile
    special_map: JsonFile
    template: str | None = None
    backend: Tokenizer | None = None
    loaded: BPETokenizer | None = None
    load_problem: str = ""
    vocab: dict[str, int] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, tuple[Path, int]] = field(default_factory=dict)
    """Tensor name -> (its file, its rows), for the embedding and the output matrix."""
    weights_problem: str = ""

    @classmethod
    def read(cls, path: str | Path) -> TokenizerFolder:
        """Read a folder, or that of a tokenizer.json. FileNotFoundError when it is none or holds none of the known files."""
        path = Path(path)
        path = path.parent if path.is_file() else path
        known = (TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE, CONFIG_FILE)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}; name a tokenizer's or a model's folder, for example weight/tokenizer")
        if not any((path / name).is_file() for name in known):
            raise FileNotFoundError(f"{path} holds no tokenizer: none of {', '.join(known)} is there")
        tokenizer, settings = JsonFile.read(path / TOKENIZER_FILE), JsonFile.read(path / SETTINGS_FILE)
        config, generation = JsonFile.read(path / CONFIG_FILE), JsonFile.read(path / GENERATION_FILE)
        folder = cls(path, tokenizer, settings, config, generation, JsonFile.read(path / MAP_FILE))
        file = path / TEMPLATE_FILE
        if file.is_file():
            folder.template = file.read_text(encoding="utf-8", errors="replace")
        folder._read_tokenizer()
        folder._read_rows()
        return folder

    def _read_tokenizer(self) -> None:
        if self.tokenizer.data is None:
            return
        model = self.tokenizer.data.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, dict):
            self.vocab = {token: i for token, i in vocab.items() if isinstance(i, int)}
        added = self.tokenizer.data.get("added_tokens")
        if isinstance(added, list):
            self.added = [t for t in added if isinstance(t, dict) and isinstance(t.get("content"), str) and isinstance(t.get("id"), int)]
        try:
            self.backend = Tokenizer.from_str(json.dumps(self.tokenizer.data))
        except Exception as error:  # the Rust library raises plain Exception
            self.tokenizer.problem = f"the tokenizers library cannot read it: {error}"
            return
        try:
            self.loaded = BPETokenizer.from_pretrained(self.path)
        except Exception as error:  # as above: with a damaged vocabulary the library's own exceptions come through
            self.load_problem = str(error)

    def _read_rows(self) -> None:
        names: dict[str, str] = dict.fromkeys((EMBEDDING, OUTPUT), WEIGHTS_FILE)
        if not (self.path / WEIGHTS_FILE).is_file():
            if not (self.path / INDEX_FILE).is_file():
                return
            try:
                places, _ = read_index(self.path / INDEX_FILE)
            except ValueError as error:
                self.weights_problem = str(error)
                return
            names = {name: places[name] for name in names if name in places}
        for name, file_name in names.items():
            file = self.path / file_name
            try:
                with safe_open(file, framework="pt") as tensors:
                    if name in tensors.keys():
                        self.rows[name] = (file, tensors.get_slice(name).get_shape()[0])
            except (SafetensorError, OSError) as error:
                self.weights_problem = f"{file.name} cannot be read: {error}"

    @property
    def ids(self) -> dict[str, int]:
        """Token -> id, as the file declares them."""
        # Some published tokenizers list tokens only in tokenizer_config.json.
        listed = self.settings.values.get("added_tokens_decoder")
        items = listed.items() if isinstance(listed, dict) else ()
        extra = {name: int(key) for key, entry in items if str(key).isdecimal() and (name := token_name(entry)) is not None}
        return {**extra, **self.vocab, **{token["content"]: token["id"] for token in self.added}}

    @property
    def size(self) -> int:
        """Ids the tokenizer needs: its largest one, plus one."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def gaps(self) -> list[int]:
        """Ids below the largest that no token has, the first thousand: a damaged file may say that a token has id 10**9."""
        used = set(self.ids.values())
        return list(islice((i for i in range(self.size) if i not in used), MOST_GAPS))

    @property
    def own(self) -> bool:
        """Whether train_tokenizer made it: its special tokens are then prescribed. An imported one has its own names."""
        contents = {token["content"] for token in self.added}
        if contents & set(SPARE_TOKENS) or (self.path / RECORD_FILE).is_file():
            return True
        return not contents and (SPLIT_PATTERN in split_patterns(self.tokenizer.values) or self.template == STORED_TEMPLATE)

    @property
    def named(self) -> dict[str, str]:
        """Role (eos, pad, bos, unk) -> token, as tokenizer_config.json says."""
        return {role: name for role in ROLES if (name := token_name(self.settings.values.get(f"{role}_token"))) is not None}

    @property
    def settings_template(self) -> str | None:
        """The template inside tokenizer_config.json; of several named ones the default."""
        found = self.settings.values.get("chat_template")
        if isinstance(found, list):
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        return found if isinstance(found, str) else None

    @property
    def model_rows(self) -> int | None:
        """Ids the model knows: rows of its embedding, else what config.json says; None without a model."""
        if EMBEDDING in self.rows:
            return self.rows[EMBEDDING][1]
        size = self.config.values.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def byte_level(self) -> bool:
        """Whether the vocabulary is written in the letters that stand for bytes (GPT-2's), not with `<0x0A>` byte tokens."""
        return not self.tokenizer.values.get("model", {}).get("byte_fallback") and any(token.startswith("Ġ") for token in self.vocab)


def token_name(value: Any) -> str | None:
    """A token written as text or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def split_patterns(data: dict[str, Any]) -> list[str]:
    """The regular expressions by which tokenizer.json cuts text before merging."""
    return [str(part["pattern"]["Regex"]) for part in steps(data.get("pre_tokenizer")) if "Regex" in (part.get("pattern") or {})]


def keep_copy(path: Path) -> str:
    """Keep the file as NAME.bak (or .bak2 ...: an earlier copy is never overwritten); its name, or "" where there is no file."""
    if not path.is_file():
        return ""
    copy, number = path.with_name(f"{path.name}.bak"), 2
    while copy.exists():
        copy, number = path.with_name(f"{path.name}.bak{number}"), number + 1
    try:
        os.link(path, copy)  # the file is replaced, never rewritten in place: a second name for it costs nothing
    except OSError:
        shutil.copy2(path, copy)
    return copy.name


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, after keeping a copy of the old one."""
    keep_copy(path)
    atomic_write_text(path, text)


def replace_json(path: Path, data: dict[str, Any]) -> None:
    """`replace_text` of an object as JSON."""
    replace_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
