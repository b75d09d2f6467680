"""The configuration of every stage: dataclasses, YAML presets, and the command line.

Precedence: defaults < `--preset NAME` < `--config FILE` < dotted words:

    python -m train.train_pretrain --preset nano data.pretrain_file=corpus.jsonl train.lr=3e-4 out_dir=weight/pretrain

The docstring under a field is its help text. Values are converted by the field's type; an unknown key stops with the nearest
known names.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import sys
import textwrap
import types
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from model.config import PRESETS, SMART, HaoAIConfig

CONFIG_FOLDER = Path(__file__).parent / "configs"


class UsageError(ValueError):
    """A mistake on the command line or in a settings file; ends a program with status 2."""


@dataclass
class TokenizerConfig:
    """How a tokenizer is trained."""

    vocab_size: int = 16384
    """Number of tokens, special ones included."""
    sample_mb: float = 64.0
    """Train on at most this much text (10^6 bytes of UTF-8), drawn evenly from the languages and files."""


@dataclass
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    pretrain_file: Any = "training_data/pretrain"
    """Text to learn from: a file, folder, glob, or list of them; {path: ..., weight: 2} reads a source twice per epoch."""
    sft_file: Any = "training_data/sft"
    """Conversations to learn from, in the same forms."""
    val_file: Any = None
    """Held-out data to measure on; None: documents held out of the training data by their hash."""
    max_length: int = 512
    """Row length in tokens (the context in training)."""
    short_length: int = 0
    """Curriculum: begin with rows of this many tokens (0: full rows from the start)."""
    short_share: float = 0.5
    """Curriculum: share of the run that uses short rows."""
    val_share: float = 0.01
    """Share of the documents held out."""
    store_dir: str = "weight/token_store"
    """Folder of the token stores, one per content, tokenizer and kind."""
    strict: bool = False
    """Stop at the first unusable row instead of counting and skipping it."""


@dataclass
class OptimizationConfig:
    """One optimisation run, whatever the stage."""

    max_steps: int = 0
    """Optimiser steps; 0: as many as `epochs` or `max_minutes` say."""
    epochs: float = 1.0
    """Passes over the data when max_steps and max_minutes are 0."""
    max_minutes: float = 0.0
    """Time budget of the stage; the number of steps is derived from the measured speed, and corrected on the way."""
    batch_size: int = 16
    """Rows per micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches per optimiser step; each token counts the same however they are split."""
    optimizer: str = "adamw"
    """adamw, or muon (matrices by Muon, everything else by AdamW)."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The learning rate's floor at the end, as a share of the peak."""
    schedule: str = "cosine"
    """cosine, linear, wsd (constant, then linear decay over decay_share) or constant, each after the warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 0.4
    """wsd: share of the run spent decaying."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of norms)."""
    beta1: float = 0.9
    """AdamW: decay of the gradient mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    precision: str = "auto"
    """auto (measured once on this device), fp32, bf16 or fp16."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device name."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only when stopped."""
    checkpoint_minutes: float = 5.0
    """A checkpoint at least this often, however long a step takes; 0: by steps only."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0: at the end only."""
    eval_tokens: int = 40_000
    """Held-out tokens per evaluation."""
    sample_every: int = 500
    """Steps between sample generations; 0: at the end only."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row whose loss or gradient is not finite."""

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("batch_size", "accumulation_steps", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("max_steps", "epochs", "max_minutes", "warmup_steps", "clip", "weight_decay", "checkpoint_every"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _require(self.lr > 0, "train.lr", self.lr, "above 0")
        _require(self.max_steps > 0 or self.max_minutes > 0 or self.epochs > 0, "train.epochs", self.epochs, "above 0")
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "linear", "wsd", "constant")),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
        ):
            _require(getattr(self, name) in known, f"train.{name}", getattr(self, name), " | ".join(known))


@dataclass
class StageConfig:
    """What all stages share."""

    out_dir: str = ""
    """Directory of the result."""
    model_dir: str | None = None
    """Checkpoint to start from; its shape and vocabulary are used."""
    tokenizer_dir: str | None = None
    """Folder of the tokenizer; None: the checkpoint's, else weight/tokenizer (trained first when missing)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Shape of a new model: `preset`, and any field of HaoAIConfig."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: OptimizationConfig = field(default_factory=OptimizationConfig)
    resume: bool = False
    """Go on from the newest checkpoint in out_dir."""
    overwrite: bool = False
    """Replace an out_dir that already holds something."""
    dry_run: bool = False
    """Print parameters, memory, tokens and time, and stop."""

    def check(self) -> None:
        self.train.check()
        _require(self.data.max_length >= 2, "data.max_length", self.data.max_length, "at least 2")
        _require(0 <= self.data.val_share < 1, "data.val_share", self.data.val_share, "in [0, 1)")
        _require(
            0 <= self.data.short_length <= self.data.max_length,
            "data.short_length",
            self.data.short_length,
            "between 0 and data.max_length",
        )
        _require(self.tokenizer.sample_mb > 0, "tokenizer.sample_mb", self.tokenizer.sample_mb, "above 0")
        self.model_shape()

    def model_shape(self) -> dict[str, Any]:
        """Fields of HaoAIConfig: the preset's, then those set by name. Raises UsageError for unknown ones."""
        fields = dict(self.model)
        preset = fields.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise UsageError(f"model.preset={preset!r} is unknown; known: {', '.join(PRESETS)}")
        hints = typing.get_type_hints(HaoAIConfig)
        for name, value in fields.items():
            if name not in hints:
                raise _unknown(f"model.{name}", [f"model.{n}" for n in [*hints, "preset"]])
            fields[name] = convert(value, hints[name], f"model.{name}")
        return {**(PRESETS[preset] if preset else {}), **fields}


@dataclass
class TokenizerStageConfig(StageConfig):
    """python -m train.train_tokenizer: learn a byte-level BPE from text."""

    out_dir: str = "weight/tokenizer"


@dataclass
class PretrainConfig(StageConfig):
    """python -m train.train_pretrain: learn a language model from text."""

    out_dir: str = "weight/pretrain"
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "nano"})
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(optimizer="muon", lr=6e-3, schedule="wsd", min_lr_ratio=0.05, batch_size=8)
    )


@dataclass
class SFTConfig(StageConfig):
    """python -m train.train_sft: fine-tune on conversations; only the assistant's words are learned."""

    out_dir: str = "weight/sft"
    model_dir: str | None = "weight/pretrain"
    train: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(optimizer="muon", lr=2e-3, schedule="linear", min_lr_ratio=0.05, batch_size=8, epochs=2)
    )


Settings = TypeVar("Settings", bound=StageConfig)
SYNONYMS = {  # names of other programs
    "learning_rate": "train.lr",
    "gradient_clip": "train.clip",
    "max_grad_norm": "train.clip",
    "block_size": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "num_train_epochs": "train.epochs",
    "mixed_precision": "train.precision",
    "dtype": "train.precision",
    "output_dir": "out_dir",
    "hidden_size": "model.n_embd",
    "num_hidden_layers": "model.n_layer",
    "num_attention_heads": "model.n_head",
}
FLAGS = ("resume", "overwrite", "dry_run")


def parse_command_line(kind: type[Settings], argv: list[str] | None = None) -> Settings:
    """Settings from words such as `--preset nano train.lr=3e-4 --resume`. Raises UsageError; `--help` prints and exits."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        print(help_text(kind))
        raise SystemExit(0)
    layers: list[dict[str, Any]] = []
    dotted: dict[str, Any] = {}
    preset, file = None, None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--preset", "--config"):
            if not equals and not words:
                raise UsageError(f"{name} needs a value")
            value = value if equals else words.pop(0)
            preset, file = (value, file) if name == "--preset" else (preset, value)
        elif name.startswith("--") and name[2:].replace("-", "_") in FLAGS and not equals:
            dotted[name[2:].replace("-", "_")] = True
        elif equals and not name.startswith("-"):
            dotted[name] = value
        else:
            raise UsageError(
                f"cannot read {word!r}: settings are written key=value (for example train.lr=3e-4), switches as "
                f"--preset NAME, --config FILE, {', '.join('--' + f.replace('_', '-') for f in FLAGS)}, --help"
            )
    if preset is not None:
        layers.append(read_preset(kind, preset))
    if file is not None:
        layers.append(read_yaml(Path(file)))
    settings = kind()
    for layer in layers:
        apply(settings, layer)
    for name, value in dotted.items():
        set_value(settings, name, value)
    settings.check()
    return settings


def stage_name(kind: type) -> str:
    """`pretrain` for PretrainConfig: the first part of its presets' file names."""
    return kind.__name__.removesuffix("Config").removesuffix("Stage").lower()


def preset_file(kind: type, name: str) -> Path:
    path = CONFIG_FOLDER / f"{stage_name(kind)}_{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem.split("_", 1)[1] for p in CONFIG_FOLDER.glob(f"{stage_name(kind)}_*.yaml"))
        raise UsageError(f"--preset {name}: unknown; presets of this stage: {', '.join(known) or 'none'}")
    return path


def read_preset(kind: type, name: str) -> dict[str, Any]:
    """The settings of `--preset NAME`. NAME-smart takes those of NAME, and a new model gets the parts of SMART_PARTS."""
    plain = name.removesuffix(SMART)
    values = read_yaml(preset_file(kind, plain))
    if plain != name and "preset" in values.get("model", {}):
        values["model"]["preset"] += SMART
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file holding a mapping. Raises UsageError that names file and line."""
    if not path.is_file():
        raise UsageError(f"settings file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"settings file {path}: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"settings file {path} must hold `key: value` lines, not a {type(data).__name__}")
    return data


def apply(settings: Any, values: dict[str, Any], prefix: str = "") -> None:
    """Set nested values from a mapping."""
    for key, value in values.items():
        target = getattr(settings, str(key), None) if not isinstance(settings, dict) else None
        if isinstance(value, dict) and dataclasses.is_dataclass(target):
            apply(target, value, f"{prefix}{key}.")
        elif isinstance(value, dict) and isinstance(target, dict) and key in _field_names(settings):
            target.update(value)
        else:
            set_value(settings, str(key), value, prefix)


def set_value(settings: Any, name: str, value: Any, prefix: str = "") -> None:
    """Set one setting by its dotted name, converting the value to the field's type."""
    first, dot, rest = name.partition(".")
    names = _field_names(settings)
    if first not in names:
        raise _unknown(prefix + name, [prefix + n for n in known_names(settings)])
    target = getattr(settings, first)
    if dot and dataclasses.is_dataclass(target):
        set_value(target, rest, value, f"{prefix}{first}.")
    elif dot and isinstance(target, dict):
        target[rest] = _literal(value)
    elif dot or dataclasses.is_dataclass(target):
        raise _unknown(prefix + name, [prefix + n for n in known_names(settings)])
    else:
        setattr(settings, first, convert(value, typing.get_type_hints(type(settings))[first], prefix + name))


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as the annotated type; text such as "3e-4", "true" or "none" is understood. Raises UsageError."""
    if kind is Any:
        return _literal(value)
    if kind == dict[str, Any]:
        value = _literal(value)
        if value is not None and not isinstance(value, dict):
            raise UsageError(f"{name}={value!r} is not a mapping; set its fields by name, for example {name}.preset=nano")
        return value or {}  # an empty section of a settings file reads as None
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "") and type(None) in kinds):
            return None
        return convert(value, next(k for k in kinds if k is not type(None)), name)
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(value).lower()]
        if kind is int:
            number = float(value)
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            if isinstance(value, bool) or float(value) != float(value):
                raise ValueError
            return float(value)
        if kind is str and isinstance(value, str | int | float):
            return str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    else:
        if typing.get_origin(kind) is dict and isinstance(value, dict):
            return value
    raise UsageError(f"{name}={value!r} is not a {getattr(kind, '__name__', kind)}")


def _literal(value: Any) -> Any:
    """Text of the command line read as YAML where that is what it looks like; numbers such as 3e-4 included."""
    if not isinstance(value, str):
        return value
    if value[:1] in ("[", "{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"cannot read {value!r}: {error}") from error
    if value.lower() in ("none", "null"):
        return None
    return value


def known_names(settings: Any) -> list[str]:
    """Every dotted name of a settings object."""
    names = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        names += [f"{item.name}.{n}" for n in known_names(value)] if dataclasses.is_dataclass(value) else [item.name]
        if item.name == "model":
            names += [f"model.{f.name}" for f in dataclasses.fields(HaoAIConfig)]
    return names


def to_dict(settings: Any) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def to_yaml(settings: Any) -> str:
    """The settings as a file for --config. Switches are left out: a file must not overwrite a directory unasked."""
    values = {name: value for name, value in to_dict(settings).items() if name not in FLAGS}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def help_text(kind: type) -> str:
    """The page that `--help` prints: every setting, its default and meaning."""
    lines = [
        (kind.__doc__ or "").strip(),
        "",
        "usage: settings are words key=value; later ones win",
        "  --preset NAME    " + ", ".join(sorted(p.stem.split("_", 1)[1] for p in CONFIG_FOLDER.glob(f"{stage_name(kind)}_*.yaml"))),
        "  --config FILE    a YAML file with any of the settings below",
        "",
    ]
    _describe(kind(), "", lines)
    lines += ["", "model.*: " + ", ".join(f.name for f in dataclasses.fields(HaoAIConfig))]
    return "\n".join(lines)


def _describe(settings: Any, prefix: str, lines: list[str]) -> None:
    kind: type = type(settings)
    notes = _field_notes(kind)
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            _describe(value, f"{prefix}{item.name}.", lines)
            continue
        name = (
            f"--{item.name.replace('_', '-')}"
            if not prefix and item.name in FLAGS
            else f"{prefix}{item.name}={'' if value is None else value}"
        )
        text = textwrap.wrap(notes.get(item.name, ""), 88) or [""]
        lines.append(f"  {name}")
        lines += [f"      {line}" for line in text]


@lru_cache(maxsize=32)
def _field_notes(kind: type) -> dict[str, str]:
    """Docstrings that stand under the fields of a dataclass and its bases."""
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for item, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                notes[item.target.id] = " ".join(str(after.value.value).split())
    return notes


def _field_names(settings: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(settings)]


def _unknown(name: str, known: list[str]) -> UsageError:
    meant = SYNONYMS.get(name.split(".")[-1].lower())
    if meant:
        return UsageError(f"unknown setting {name!r}; did you mean {meant}?")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return UsageError(f"unknown setting {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r} must be {wanted}")
