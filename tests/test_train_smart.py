"""The one-command run: what it decides before training, and that it can be stopped, continued and repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_smart
from inference.loading import newest_stage
from tools import make_preferences
from tools.prepare_data import SourcesUnavailable
from train.config import DPOStageConfig, UsageError, to_dict, to_yaml

ROOT = Path(__file__).parent.parent


def arguments(out: Path, *words: str):
    return train_smart._arguments(["--out", str(out), *words])


def stages_of(out: Path, *words: str, precision: str = "fp32"):
    args = arguments(out, *words)
    stages = train_smart._stages(args, train_smart.choose_shape(args.minutes, "cpu"), out, "cpu", precision)
    train_smart.set_sources(stages, out / "corpus", out)
    return stages


def finish(out: Path, stages) -> None:
    """What a finished stage leaves that the next run looks at."""
    for name in stages.keys() - {"tokenizer"}:
        (out / name).mkdir(parents=True)
        (out / name / "run.yaml").write_text(to_yaml(stages[name]), encoding="utf-8")
        (out / name / "report.md").write_text("done", encoding="utf-8")
    (out / train_smart.PAIRS).parent.mkdir(exist_ok=True)
    (out / train_smart.PAIRS).write_text("{}\n" * 3, encoding="utf-8")


@pytest.mark.parametrize(
    "rlhf, names",
    [("dpo", ["pairs", "dpo"]), ("ppo", ["pairs", "reward", "ppo"]), ("grpo", ["grpo"]), ("none", [])],
)
def test_stages_of_each_choice(rlhf, names, tmp_path, capsys):
    """Guards: a stage without minutes or settings, a budget that is overdrawn, stages that start from the wrong checkpoint or data."""
    args = arguments(tmp_path, "--rlhf", rlhf)
    minutes, stages = train_smart.minutes_of(args), stages_of(tmp_path, "--rlhf", rlhf)
    assert list(minutes) == ["pretrain", "sft", "reasoning", *names]
    assert stages.keys() - {"tokenizer"} == minutes.keys() - {"pairs"} and stages.keys() <= {"tokenizer", *train_smart.STAGES}
    assert sum(minutes.values()) <= 0.9 * args.minutes
    for name in stages.keys() - {"tokenizer"}:
        settings = stages[name]
        settings.check()
        assert settings.resume and settings.out_dir == str(tmp_path / name) and settings.train.max_minutes == minutes[name] > 0
        start = {"pretrain": None, "sft": "pretrain", "reasoning": "sft"}.get(name, "reasoning")
        assert settings.model_dir == (start and str(tmp_path / start))
    tasks = str(tmp_path / train_smart.TASK_FOLDER / "train.jsonl")
    assert tasks in stages["reasoning"].data.sft_file and len(stages["reasoning"].data.sft_file) > 1
    for name in names:
        if name in ("dpo", "reward"):
            assert stages[name].data.preference_file == str(tmp_path / train_smart.PAIRS)
        elif name != "pairs":
            assert stages[name].data.prompt_file == tasks and stages[name].data.val_file.endswith("valid.jsonl")
    if rlhf == "ppo":
        assert stages["ppo"].reward_model_dir == stages["reward"].out_dir
    shape = train_smart.choose_shape(args.minutes, "cpu")
    train_smart.print_plan(args, shape, train_smart.Precision("fp32", "cpu", "test"), 1000.0, "cpu")
    plan = capsys.readouterr().out
    assert all(f"  {name} " in plan for name in (*minutes, "the rest"))


def test_another_preference_stage_reuses_what_came_before(tmp_path):
    """Guards: settings that depend on --rlhf or on what was measured, so that a second run trains all over."""
    before = {name: {**to_dict(stage), "train": None} for name, stage in stages_of(tmp_path).items()}
    for rlhf in train_smart.PREFERENCE:
        for name, stage in stages_of(tmp_path, "--rlhf", rlhf, precision="bf16").items():
            if name in before:
                assert {**to_dict(stage), "train": None} == before[name]
    finish(tmp_path, stages_of(tmp_path))
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--overwrite"))
    for name in ("pretrain", "sft", "reasoning", "dpo"):
        (tmp_path / name).mkdir(exist_ok=True)
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--rlhf", "grpo"))
    assert (tmp_path / "dpo").exists()


def test_preference_stages_keep_the_defaults_of_their_commands(tmp_path):
    """Guards: a learning rate or beta here that differs from `python -m train.train_dpo`."""
    ours, theirs = stages_of(tmp_path)["dpo"], DPOStageConfig()
    assert (ours.dpo, ours.train.lr, ours.train.batch_size, ours.train.optimizer) == (
        theirs.dpo,
        theirs.train.lr,
        theirs.train.batch_size,
        theirs.train.optimizer,
    )


def test_a_stage_of_other_settings_is_named_before_anything_is_trained_and_replaced_on_request(tmp_path):
    """Guards: --overwrite without an effect; stages kept that came from a checkpoint which is replaced; others' results removed."""
    stages = stages_of(tmp_path)
    finish(tmp_path, {**stages, **stages_of(tmp_path, "--rlhf", "grpo")})
    train_smart.remove_changed(stages, tmp_path, overwrite=False)
    stages["dpo"].dpo.beta = 0.7
    with pytest.raises(UsageError, match="dpo was trained with other settings.*--overwrite"):
        train_smart.remove_changed(stages, tmp_path, overwrite=False)
    train_smart.remove_changed(stages, tmp_path, overwrite=True)
    assert not (tmp_path / "dpo").exists() and (tmp_path / "grpo").exists() and (tmp_path / train_smart.PAIRS).exists()
    stages["sft"].data.sft_file = "others.jsonl"
    train_smart.remove_changed(stages, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrain"]


def test_too_few_pairs_are_not_learned_from(tmp_path, monkeypatch, capsys):
    """Guards: hundreds of passes over three pairs; a run that fails where the model makes no usable mistake; pairs that are made twice."""
    monkeypatch.setattr(train_smart.smart_data, "write_questions", lambda *words: None)
    asked = []

    def main(words):
        asked.append(words)
        Path(words[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(words[1]).write_text("{}\n" * train_smart.FEWEST_PAIRS, encoding="utf-8")

    def none(words):
        raise make_preferences.NoPairs("no pair was made")

    args = arguments(tmp_path)
    monkeypatch.setattr(make_preferences, "main", none)
    assert not train_smart.make_pairs(args, tmp_path, tmp_path, 0.5) and "no pair was made" in capsys.readouterr().out
    monkeypatch.setattr(make_preferences, "main", main)
    assert train_smart.make_pairs(args, tmp_path, tmp_path, 0.5) and train_smart.make_pairs(args, tmp_path, tmp_path, 0.5)
    assert len(asked) == 1 and "0.500" in asked[0]
    (tmp_path / train_smart.PAIRS).write_text("{}\n" * (train_smart.FEWEST_PAIRS - 1), encoding="utf-8")
    assert not train_smart.make_pairs(args, tmp_path, tmp_path, 0.5)


def test_larger_budgets_get_larger_models():
    sizes = [train_smart._config(train_smart.choose_shape(minutes, "cpu")).account().parameters for minutes in (2, 18, 120, 1000)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert train_smart.choose_shape(18, "cuda") != train_smart.choose_shape(18, "cpu")


def test_results_of_other_settings_are_not_mixed(tmp_path):
    """A second run with another recipe must not go on training the first one's model."""
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "sample"))
    (tmp_path / "pretrain").mkdir()
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "sample"))
    with pytest.raises(UsageError, match="--overwrite"):
        train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "quick"))
    assert (tmp_path / "pretrain").exists()
    train_smart._check_earlier_run(tmp_path, arguments(tmp_path, "--recipe", "quick", "--overwrite"))
    assert not (tmp_path / "pretrain").exists()


def test_stages_trained_one_by_one_are_not_taken_over(tmp_path):
    (tmp_path / "sft").mkdir()
    with pytest.raises(UsageError, match="one by one"):
        train_smart._check_earlier_run(tmp_path, arguments(tmp_path))


def test_no_network_falls_back_to_the_sample_and_stays_with_it(tmp_path, monkeypatch, capsys):
    """When real corpora cannot be had, the run says so, uses the sample, and a continued run does not switch data in the middle."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def prepare(recipe, out, seed=0):
        asked.append(recipe)
        if recipe == "quick" and len(asked) == 1:
            raise SourcesUnavailable("no source could be fetched")

    monkeypatch.setattr(train_smart, "prepare", prepare)
    args = arguments(tmp_path / "weight")
    train_smart._check_earlier_run(tmp_path / "weight", args)
    assert train_smart.prepare_corpus(args).name == "sample"
    assert "no source could be fetched" in capsys.readouterr().err
    train_smart._check_earlier_run(tmp_path / "weight", args)
    assert train_smart.prepare_corpus(args).name == "sample"
    assert asked == ["quick", "sample", "sample"]


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--minutes", "-1"], ["--per-kind", "0"]])
def test_impossible_arguments(words, tmp_path):
    with pytest.raises(UsageError, match=words[0]):
        arguments(tmp_path, *words)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_interrupted_run_goes_on_and_finished_stages_are_reused(tmp_path):
    """Ctrl-C during pretraining keeps the state; the same command finishes; a third run with another --rlhf trains that stage only."""
    out = tmp_path / "weight"
    # One thread: two training processes with a thread per core each would wait for one another most of the time.
    words = ["--recipe", "sample", "--minutes", "0.5", "--per-kind", "2", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(ROOT / "train_smart.py"), *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    deadline = time.monotonic() + 300
    while not (out / "pretrain" / "metrics.jsonl").is_file() or not (out / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8"):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "run the same command again" in said
    stopped_at = max(int(p.name.split("_")[1]) for p in (out / "pretrain" / "checkpoints").iterdir())
    # Half a minute of training gives no answer that comes to its end; these pairs stand for the model's own.
    shutil.copyfile(ROOT / "training_data" / "rlhf" / "preference_sample.jsonl", out / train_smart.PAIRS)
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"at step {stopped_at}" in second.stdout
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(report["probes"]) == list(report["tasks"]) == ["sft", "dpo"] and report["last"] == "dpo"
    assert report["probes"]["dpo"]["overall"]["total"] == 20 and report["tasks"]["dpo"]["on"]["total"] == 12
    assert f"chat.py --model {out / 'dpo'}" in second.stdout and newest_stage(out) == out / "dpo"
    before = {name: (out / name / "model.safetensors").read_bytes() for name in ("sft", "reasoning", "dpo")}
    third = subprocess.run([*command, "--rlhf", "grpo"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert third.returncode == 0, third.stdout + third.stderr
    assert third.stdout.count("finished earlier, reused") == 3 and f"chat.py --model {out / 'grpo'}" in third.stdout
    assert {name: (out / name / "model.safetensors").read_bytes() for name in before} == before
    assert newest_stage(out) == out / "grpo"
