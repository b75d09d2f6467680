"""Settings read from the command line and YAML files, whatever the dataclass: layers, conversion by type, near names, help.

The dataclasses themselves are in `train.config`, through which these functions are used.
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
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from model.config import SMART, HaoAIConfig

CONFIG_FOLDER = Path(__file__).parent / "configs"


class UsageError(ValueError):
    """A mistake on the command line or in a settings file; ends a program with status 2."""


class Checked(Protocol):
    """A settings dataclass."""

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        ...


Settings = TypeVar("Settings", bound=Checked)
SYNONYMS: dict[str, str | tuple[str, ...]] = {  # names of other programs; of several those that the stage knows
    "lr": "train.lr",
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
    "per_device_train_batch_size": "train.batch_size",
    "num_generations": "rollout.samples",
    "max_completion_length": "rollout.max_new_tokens",
    "response_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_length",
    "beta": ("dpo.beta", "grpo.beta"),
    "rpo_alpha": "dpo.nll_coef",
    "desirable_weight": "dpo.wanted_weight",
    "undesirable_weight": "dpo.unwanted_weight",
    "loss_type": ("dpo.loss", "grpo.loss"),
    "epsilon": "grpo.clip_low",
    "epsilon_high": "grpo.clip_high",
    "num_iterations": "grpo.epochs",
    "cliprange": "ppo.clip",
    "cliprange_value": "ppo.value_clip",
    "vf_coef": "ppo.value_coef",
    "init_kl_coef": "ppo.kl_coef",
    "num_ppo_epochs": "ppo.epochs",
    "missing_eos_penalty": "ppo.missing_end",
    "center_rewards_coefficient": "reward.centre_coef",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
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
        raise unknown(prefix + name, [prefix + n for n in known_names(settings)])
    target = getattr(settings, first)
    if dot and dataclasses.is_dataclass(target):
        set_value(target, rest, value, f"{prefix}{first}.")
    elif dot and isinstance(target, dict):
        target[rest] = _literal(value)
    elif dot or dataclasses.is_dataclass(target):
        raise unknown(prefix + name, [prefix + n for n in known_names(settings)])
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


def unknown(name: str, known: list[str]) -> UsageError:
    meant = SYNONYMS.get(name.split(".")[-1].lower(), ())
    there = [setting for setting in ([meant] if isinstance(meant, str) else meant) if setting in known or setting.startswith("model.")]
    if there:
        return UsageError(f"unknown setting {name!r}; did you mean {' or '.join(there)}?")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return UsageError(f"unknown setting {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r} must be {wanted}")
