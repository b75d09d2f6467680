"""Settings: precedence, conversion, and messages that name the mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import SMART_PARTS
from train import command_line
from train import config as settings_module
from train.config import (
    CONFIG_FOLDER,
    FLAGS,
    PretrainConfig,
    SFTConfig,
    StageConfig,
    UsageError,
    help_text,
    known_names,
    parse_command_line,
    stage_name,
    to_dict,
    to_yaml,
)


def all_stages() -> dict[str, type[StageConfig]]:
    kinds = [k for k in vars(settings_module).values() if isinstance(k, type) and issubclass(k, StageConfig) and k is not StageConfig]
    return {stage_name(kind): kind for kind in kinds}


STAGES = list(all_stages().values())


def test_later_layers_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order defaults < preset < config file < dotted words, whatever the order of the words."""
    monkeypatch.setattr(command_line, "CONFIG_FOLDER", tmp_path)
    (tmp_path / "pretrain_tiny.yaml").write_text("train: {lr: 0.1, batch_size: 3, seed: 1}\nmodel: {n_layer: 3}\n", encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text("train: {batch_size: 4, seed: 2}\n", encoding="utf-8")
    got = parse_command_line(PretrainConfig, ["train.seed=5", "--config", str(file), "--preset=tiny"])
    assert (got.train.lr, got.train.batch_size, got.train.seed, got.train.clip) == (0.1, 4, 5, 1.0)
    assert got.model_shape()["n_layer"] == 3 and got.model["preset"] == "nano"


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("train.lr=3e-4", "lr", 3e-4),
        ("train.max_steps=1e3", "max_steps", 1000),
        ("train.batch_size=8.0", "batch_size", 8),
        ("train.epochs=2", "epochs", 2.0),
        ("train.device=cpu", "device", "cpu"),
    ],
)
def test_words_become_the_fields_type(word: str, name: str, value: Any) -> None:
    """Guards against text reaching the arithmetic: `3e-4` is text to YAML, `1e3` is no int to Python."""
    got = getattr(parse_command_line(PretrainConfig, [word]).train, name)
    assert got == value and type(got) is type(value)


def test_yaml_text_numbers_none_lists_and_bools(tmp_path: Path) -> None:
    """Guards conversion of what PyYAML leaves as text, and of None, lists and switches."""
    file = tmp_path / "s.yaml"
    file.write_text(
        "train: {lr: 3e-4}\ndata: {strict: 'yes', val_file: [a.txt, b.txt]}\nmodel_dir: null\nmodel:\n",
        encoding="utf-8",
    )
    got = parse_command_line(SFTConfig, ["--config", str(file)])
    assert got.train.lr == 3e-4 and got.data.strict is True and got.data.val_file == ["a.txt", "b.txt"] and got.model_dir is None
    assert got.model == {}
    words = ["model_dir=none", "data.sft_file=[a.jsonl, {path: b.jsonl, weight: 2}]", "data.strict=1", "--dry-run"]
    got = parse_command_line(SFTConfig, words)
    assert got.model_dir is None and got.data.strict is True and got.dry_run
    assert got.data.sft_file == ["a.jsonl", {"path": "b.jsonl", "weight": 2}]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train.learning_rat=1"], "train"),
        (["lr=1"], "train.lr"),
        (["train.batchsize=2"], "train.batch_size"),
        (["model.n_layr=2"], "model.n_layer"),
        (["train=3"], "train"),
        (["train.lr.x=1"], "train.lr"),
    ],
)
def test_unknown_key_names_the_nearest(words: list[str], named: str) -> None:
    """Guards against a mistyped setting being ignored."""
    with pytest.raises(UsageError, match=f"unknown setting.*{named}"):
        parse_command_line(PretrainConfig, words)


@pytest.mark.parametrize(
    "word",
    [
        "train.lr=fast",
        "train.lr=nan",
        "train.batch_size=2.5",
        "train.batch_size=0",
        "train.max_steps=inf",
        "train.max_steps=-1",
        "data.strict=maybe",
        "train.optimizer=sgd",
        "train.precision=int8",
        "data.max_length=1",
        "data.val_share=1",
        "model=nano",
        "model.n_layer=two",
        "model.preset=giant",
        "data.val_file={",
        "--train.lr=3",
        "--preset",
        "--preset=nowhere",
        "--config=nowhere.yaml",
        "stray",
        "--flag",
    ],
)
def test_wrong_values_are_usage_errors(word: str) -> None:
    """Guards against tracebacks (or silent acceptance) for values of the wrong type or range."""
    with pytest.raises(UsageError):
        parse_command_line(PretrainConfig, [word])


@pytest.mark.parametrize("text", ["[1, 2]", "train: {lr: [1]}", "a: b: c", "train: {lr: {x: 1}}"])
def test_malformed_settings_files_are_usage_errors(text: str, tmp_path: Path) -> None:
    """Guards against tracebacks for YAML that is broken or of the wrong shape."""
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        parse_command_line(PretrainConfig, ["--config", str(file)])


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_preset_loads(path: Path) -> None:
    """Guards against a shipped file that its own stage refuses."""
    stage, name = path.stem.split("_", 1)
    assert stage in all_stages(), f"{path.name} belongs to no stage"
    parse_command_line(all_stages()[stage], ["--preset", name])


def test_a_smart_preset_is_the_plain_one_with_its_parts() -> None:
    """Guards: --preset nano-smart without nano's settings of the run or without the parts, or refused where there is a checkpoint."""
    plain, smart = (parse_command_line(PretrainConfig, ["--preset", name]) for name in ("nano", "nano-smart"))
    assert smart.train == plain.train and smart.data == plain.data
    assert smart.model_shape() == {**plain.model_shape(), **SMART_PARTS}
    assert parse_command_line(SFTConfig, ["--preset", "nano-smart"]) == parse_command_line(SFTConfig, ["--preset", "nano"])
    with pytest.raises(UsageError, match="tiny: unknown"):
        parse_command_line(PretrainConfig, ["--preset", "tiny-smart"])


@pytest.mark.parametrize("kind", STAGES)
def test_help_lists_every_setting_with_its_text(kind: type[StageConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against settings that --help forgets or leaves unexplained."""
    with pytest.raises(SystemExit) as ended:
        parse_command_line(kind, ["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == help_text(kind)
    model_fields = {n for n in known_names(kind()) if n.startswith("model.")}
    for name in [n for n in known_names(kind()) if n not in model_fields]:
        wanted = f"  --{name.replace('_', '-')}" if name in FLAGS else f"  {name}="
        where = [i for i, line in enumerate(lines) if line.startswith(wanted)]
        assert where and lines[where[0] + 1].startswith("      ") and lines[where[0] + 1].strip(), name
    assert all(n.removeprefix("model.") in lines[-1] for n in model_fields)


@pytest.mark.parametrize("kind", STAGES)
def test_run_yaml_round_trip(kind: type[StageConfig], tmp_path: Path) -> None:
    """Guards that a run's settings can be given back, and that its switches (overwrite!) do not come back with them."""
    words = [
        "train.lr=3e-4",
        "data.pretrain_file=[语料.txt, {path: b.txt, weight: 0.5}]",
        "model.n_layer=3",
        "tokenizer_dir=none",
        "--overwrite",
    ]
    first = parse_command_line(kind, words)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(first), encoding="utf-8")
    again = parse_command_line(kind, ["--config", str(file)])
    assert first.overwrite and not again.overwrite
    assert to_dict(again) == to_dict(dataclasses.replace(first, overwrite=False))
    assert set(yaml.safe_load(to_yaml(first))) == {f.name for f in dataclasses.fields(kind)} - set(FLAGS)
