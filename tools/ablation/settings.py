"""What an ablation compares: variants x seeds (x sizes), each a pretraining run whose settings differ only where the variant says so."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import HaoAIConfig
from train.config import PretrainConfig, UsageError, apply, parse_command_line, read_yaml, set_value, to_dict

FOLDER = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
OWN_KEYS = ("length", "seeds")  # of a variant, besides settings of train.train_pretrain
NO_INFLUENCE = ("out_dir", "resume", "overwrite", "dry_run")  # settings that change nothing about a run's result


@dataclass
class AblationConfig(PretrainConfig):
    """python -m tools.ablate CONFIG.yaml: the settings of train.train_pretrain, which all runs share, and what differs between them."""

    out_dir: str = "weight/ablation"
    variants: dict[str, Any] = field(default_factory=dict)
    """name: {setting: value}, for example gate_head: {model.attention_gate: head}. Two more keys: `length`, a share of
    train.max_steps; `seeds`, instead of those below."""
    baseline: str = "baseline"
    """The variant that the others are compared with."""
    seeds: Any = field(default_factory=lambda: [0])
    """Seeds of initial weights and data order; differences are taken between runs of the same seed."""
    sizes: Any = None
    """Shapes in which everything is run: a list of model presets, or name: {setting: value}; None: model as it is set."""
    baseline_lengths: Any = field(default_factory=list)
    """Shares of train.max_steps, for example [0.75, 1.33], at which the baseline is trained, too: what its result is worth in time."""
    time_rounds: int = 9
    """Rounds of the interleaved run that measures step times."""
    limit_kb: float = 0.0
    """Only the first so many kB of text of each held-out file are measured at the end of a run; 0: all."""
    probes: int = 0
    """Held-out prompts of the curriculum per kind and language, asked at the end of a run; 0: none."""

    def check(self) -> None:
        super().check()
        if self.baseline not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise UsageError(f"baseline={self.baseline!r} is not one of the variants ({known})")
        if self.train.max_steps < 1:
            raise UsageError("train.max_steps must be set: variants are compared after the same number of tokens")
        if self.time_rounds < 1:
            raise UsageError(f"time_rounds={self.time_rounds!r} must be at least 1")
        self.seeds = _numbers(self.seeds, int, "seeds")
        if not self.seeds:
            raise UsageError("seeds is empty; one run needs one seed, for example seeds=[0]")
        self.baseline_lengths = _numbers(self.baseline_lengths, float, "baseline_lengths")
        if any(not share > 0 or share == 1 for share in self.baseline_lengths):
            raise UsageError(f"baseline_lengths={self.baseline_lengths!r} must be positive shares of train.max_steps other than 1")
        for name in [*self.variants, *self.size_names]:
            if name and not NAME.fullmatch(str(name)):
                raise UsageError(f"{name!r} cannot name a folder: use letters, digits, and _ . + -")

    @property
    def size_names(self) -> list[str]:
        """Names of the sizes; one empty name when none are set."""
        return [str(name) for name in self.sizes] if self.sizes else [""]

    def size_changes(self, size: str) -> dict[str, Any]:
        """Settings of a size."""
        if not size:
            return {}
        return dict(self.sizes[size] or {}) if isinstance(self.sizes, dict) else {"model.preset": size}


@dataclass(frozen=True)
class Run:
    """One training: a variant, at a share of the full length, with a seed."""

    size: str
    variant: str
    share: float
    seed: int
    settings: PretrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.settings.out_dir)

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.size, run_name(self.variant, self.share), f"seed {self.seed}")))


def run_name(variant: str, share: float = 1.0) -> str:
    """`gate_head`, or `baseline@0.75` for another length."""
    return variant if share == 1 else f"{variant}@{share:g}"


def read_config(file: str, words: list[str]) -> AblationConfig:
    """The settings of a YAML file (or of a name that lies beside this module: smart, example), then key=value words. Raises UsageError."""
    path = Path(file)
    if not path.is_file() and (FOLDER / f"{file}.yaml").is_file():
        path = FOLDER / f"{file}.yaml"
    elif not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UsageError(f"there is no settings file {file}; those that come with the program: {known}")
    config = parse_command_line(AblationConfig, ["--config", str(path), *words])
    if config.resume or config.overwrite or config.dry_run:
        raise UsageError("--resume, --overwrite and --dry-run mean nothing here: finished runs are kept, interrupted ones continued")
    return config


def plan(config: AblationConfig) -> list[Run]:
    """All runs, in order: size by size, seed by seed, the baseline first. Raises UsageError for a setting that does not exist."""
    order = [config.baseline, *(name for name in config.variants if name != config.baseline)]
    runs: list[Run] = []
    for size in config.size_names:
        wanted: dict[str, list[tuple[int, list[float]]]] = {}
        for name in order:
            values = dict(config.variants[name] or {})
            seeds = _numbers(values.get("seeds", config.seeds), int, f"variants.{name}.seeds")
            lengths = [float(values.get("length", 1.0))]
            for seed in seeds:
                # Other lengths only for the common seeds: more seeds of the baseline alone are there to show its spread.
                more = config.baseline_lengths if name == config.baseline and seed in config.seeds else []
                wanted.setdefault(name, []).append((seed, [*lengths, *more]))
        seeds_in_order = list(dict.fromkeys([*config.seeds, *(seed for rows in wanted.values() for seed, _ in rows)]))
        for seed in seeds_in_order:
            for name in order:
                for share in [share for s, shares in wanted[name] if s == seed for share in shares]:
                    runs.append(Run(size, name, share, seed, run_settings(config, size, name, share, seed)))
    return runs


def run_settings(config: AblationConfig, size: str, variant: str, share: float = 1.0, seed: int = 0) -> PretrainConfig:
    """Settings of one run for train.train_pretrain."""
    settings = PretrainConfig(**{f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(PretrainConfig)})
    changes = {key: value for key, value in dict(config.variants[variant] or {}).items() if key not in OWN_KEYS}
    try:
        for values in (config.size_changes(size), changes):
            for name, value in values.items():
                set_value(settings, str(name), value)
        settings.train.max_steps = max(1, round(settings.train.max_steps * share))
        settings.train.seed = seed
        settings.out_dir = str(Path(config.out_dir) / size / run_name(variant, share) / f"seed_{seed}")
        settings.check()
        if settings.model_dir is None:
            HaoAIConfig(**settings.model_shape())
    except ValueError as error:
        raise UsageError(f"variant {variant}{f' of size {size}' if size else ''}: {error}") from error
    return settings


def identity(settings: PretrainConfig) -> dict[str, Any]:
    """Every setting that can change a run's result, flat, by its dotted name."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif prefix or name not in NO_INFLUENCE:
                flat[prefix + name] = value

    walk(to_dict(settings), "")
    return flat


def differences(run: Run) -> list[str]:
    """Settings in which what lies in the run's folder differs from what is wanted now; empty also when nothing lies there."""
    file = run.folder / "run.yaml"
    if not file.is_file():
        return []
    there = PretrainConfig()
    there.model = {}
    apply(there, read_yaml(file))
    before, now = identity(there), identity(run.settings)
    return [f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in sorted(before | now) if before.get(name) != now.get(name)]


def _numbers(values: Any, kind: type, name: str) -> list[Any]:
    values = values if isinstance(values, list | tuple) else [] if values is None else [values]
    try:
        return list(dict.fromkeys(kind(value) for value in values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}={values!r} must be a list of numbers") from error


__all__ = ["AblationConfig", "Run", "differences", "identity", "plan", "read_config", "run_name", "run_settings"]
