"""The ablation frame: the same data for all variants, runs that survive being killed, and statistics that claim no more than they know."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tools.ablate as program
from model import BPETokenizer, HaoAIConfig
from tools.ablate import ablate, main
from tools.ablation import timing
from tools.ablation.report import collect, write_report
from tools.ablation.results import T_QUANTILES, LengthCurve, Result, interval, read_result
from tools.ablation.settings import FOLDER, AblationConfig, differences, plan, read_config, run_settings
from tools.ablation.timing import StepTimes
from train.config import UsageError, parse_command_line
from train.metrics import read_jsonl
from train.runtime import peak_memory_mb
from train.train_pretrain import PretrainConfig, pretrain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> Path:
    """Two variants of a very small model, one seed, eight steps."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": f"小猫第{i}次在窗边睡觉。The quick brown fox jumps over {i} lazy dogs and {i * 7 % 13} cats."} for i in range(60)]
    for name, part in {"text": rows[10:], "held_zh": rows[:5], "held_en": rows[5:10]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "intermediate_size": 64}
    data = {"pretrain_file": "text.jsonl", "val_file": ["held_zh.jsonl", "held_en.jsonl"], "store_dir": "store"}
    train = {"max_steps": 8, "batch_size": 2, "precision": "fp32", "threads": 1, "log_every": 1, "eval_every": 2, "sample_every": 0}
    settings = {
        "out_dir": str(tmp_path / "out"),
        "tokenizer_dir": str(tmp_path / "tokenizer"),
        "model": {"preset": None, **shape},
        "data": {**{k: _inside(tmp_path, v) for k, v in data.items()}, "max_length": 32},
        "train": {**train, "eval_tokens": 200, "checkpoint_every": 3, "checkpoint_minutes": 0, "device": "cpu"},
        "time_rounds": 2,
        "variants": {"baseline": {}, "gate": {"model.attention_gate": "head"}},
    }
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def _inside(folder: Path, names: Any) -> Any:
    return [str(folder / name) for name in names] if isinstance(names, list) else str(folder / names)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings run in this process; the list of their out_dirs."""
    started: list[str] = []

    def wait_for(self: Any, command: list[str], log_file: Path) -> int:
        assert command[1:3] == ["-m", "train.train_pretrain"]
        settings = parse_command_line(PretrainConfig, command[3:])
        started.append(settings.out_dir)
        with open(log_file, "a", encoding="utf-8") as file:
            try:
                return pretrain(settings, log=lambda line: file.write(line + "\n"))
            except ValueError as error:
                file.write(f"error: {error}\n")
                return 1

    monkeypatch.setattr(program._Progress, "_wait_for", wait_for)
    for slow in ("train.record.plot_loss", "tools.ablation.report.draw_curves", "tools.ablation.report.draw_differences"):
        monkeypatch.setattr(slow, lambda *args: False)
    monkeypatch.setattr("train.train_pretrain.sample_continuations", lambda *args: [])
    return started


def silent(line: str) -> None:
    """A log that nobody reads."""


# ------------------------------------------------------------------------------------------- settings


def test_runs_differ_only_where_the_variant_says_so(config_file: Path) -> None:
    """Guards: variants compared at other seeds, data or lengths; settings shared between runs and changed in one."""
    words = ["seeds=[3,4]", "baseline_lengths=[0.5,1.5]", "sizes={a: {}, b: {model.n_embd: 64}}"]
    runs = plan(read_config(str(config_file), words))
    assert len(runs) == 2 * 2 * 4 and len({run.settings.out_dir for run in runs}) == 16
    assert [run.label for run in runs[:4]] == ["a baseline seed 3", "a baseline@0.5 seed 3", "a baseline@1.5 seed 3", "a gate seed 3"]
    for run in runs:
        settings = run.settings
        assert settings.train.seed == run.seed and settings.train.max_steps == round(8 * run.share)
        assert settings.model.get("attention_gate", "none") == ("head" if run.variant == "gate" else "none")
        assert settings.model["n_embd"] == (64 if run.size == "b" else 32)
    first, fourth = runs[0].settings, runs[3].settings
    assert first.data == fourth.data and first.train == fourth.train and first.data is not fourth.data


def test_keys_of_a_variant(config_file: Path) -> None:
    """Guards: more seeds of the baseline that drag its other lengths along; a length that is taken for a setting."""
    words = ["baseline_lengths=[0.5]", "variants={baseline: {seeds: [0, 1, 2]}, long: {length: 1.25, train.lr: 1e-4}}"]
    config = read_config(str(config_file), words)
    labels = [run.label for run in plan(config)]
    assert labels == ["baseline seed 0", "baseline@0.5 seed 0", "long@1.25 seed 0", "baseline seed 1", "baseline seed 2"]
    assert plan(config)[2].settings.train.lr == 1e-4 and plan(config)[2].settings.train.max_steps == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["variants.gate={model.atention_gate: head}"], "variant gate: .*attention_gate"),
        (["variants.gate={model.attention_gate: heads}"], "variant gate: .*heads"),
        (["variants.a/b={}"], "a/b"),
        (["baseline=plain"], "plain"),
        (["train.max_steps=0", "train.epochs=1"], "max_steps"),
        (["seeds=[]"], "seeds"),
        (["seeds=[one]"], "seeds"),
        (["baseline_lengths=[0]"], "baseline_lengths"),
        (["sizes=[tiny]"], "tiny"),
        (["variant=x"], "variants"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(words: list[str], message: str, config_file: Path, here: list[str]) -> None:
    """Guards: an unattended night that ends at the last variant, because of a misspelt setting."""
    with pytest.raises(ValueError, match=message):
        main([str(config_file), *words])
    assert not here


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_settings_that_come_along_are_valid(file: Path) -> None:
    """Guards: a preset that stopped working when a field was renamed; variants that are not what their comments promise."""
    runs = plan(read_config(file.stem, []))
    for run in runs:
        config = HaoAIConfig(**run.settings.model_shape())
        if run.variant == "relu2":
            plain = HaoAIConfig(**runs[0].settings.model_shape())
            assert config.account().body_parameters == pytest.approx(plain.account().body_parameters, rel=0.1)
    assert len({run.settings.out_dir for run in runs}) == len(runs)


# ---------------------------------------------------------------------------------------------- runs


def test_from_settings_to_the_table(config_file: Path, here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: any link of the chain; finished runs that are trained again; a report of other numbers than the runs'."""
    config = read_config(str(config_file), ["baseline_lengths=[0.5]", "limit_kb=0.4"])
    assert ablate(config, log=silent) == 0
    out = Path(config.out_dir)
    assert here == [str(out / name / "seed_0") for name in ("baseline", "baseline@0.5", "gate")]
    results = {run.label: read_result(run) for run in plan(config)}
    base, half, gate = (results[f"{name} seed 0"] for name in ("baseline", "baseline@0.5", "gate"))
    assert base and half and gate
    assert base.tokens == gate.tokens == 2 * half.tokens == 8 * 2 * 32
    assert gate.parameters == base.parameters + 2 * 2 * 32 and set(base.bpb_by_file) == {"held_zh", "held_en"}
    assert [tokens for tokens, _ in base.curve] == [128, 256, 384, 512] and base.peak_memory_mb
    assert not (out / "gate" / "seed_0" / "checkpoints").exists() and (out / "gate" / "seed_0" / "model.safetensors").is_file()
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"{gate.bpb:.4f}" in report and f"{gate.bpb - base.bpb:+.4f}" in report and "3 of 3 runs" in report
    saved = json.loads((out / "report.json").read_text(encoding="utf-8"))["sizes"][0]["rows"]
    assert [row["name"] for row in saved] == ["baseline", "baseline@0.5", "gate"]
    before = (out / "gate" / "seed_0" / "result.json").stat().st_mtime_ns
    assert ablate(config, log=silent) == 0 and len(here) == 3
    assert main([str(config_file), "baseline_lengths=[0.5]", "limit_kb=0.4", "--report"]) == 0
    assert f"{gate.bpb:.4f}" in capsys.readouterr().out
    assert (out / "gate" / "seed_0" / "result.json").stat().st_mtime_ns == before


def test_all_variants_see_the_same_tokens(config_file: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an order of the data that depends on the model, through a random state that both use."""
    import train.stage as stage

    seen: dict[str, list[Any]] = {}
    original = stage.lm_loss

    def watched(model: Any, batch: Any) -> Any:
        seen.setdefault(here[-1] if here else "timing", []).append(batch.inputs["input_ids"].tolist())
        return original(model, batch)

    monkeypatch.setattr(stage, "lm_loss", watched)
    config = read_config(str(config_file), ["model.dropout=0.2"])
    assert ablate(config, log=silent) == 0
    rows = [batches for name, batches in seen.items() if name != "timing"]
    assert len(rows) == 2 and len(rows[0]) >= 8 and rows[0] == rows[1]


def test_only_some_variants(config_file: Path, here: list[str]) -> None:
    """Guards: --only that runs everything, or that accepts a name that does not exist."""
    config = read_config(str(config_file), [])
    with pytest.raises(UsageError, match="gates"):
        ablate(config, ["gates"], log=silent)
    assert ablate(config, ["gate"], log=silent) == 0 and [Path(name).parent.name for name in here] == ["gate"]
    assert "–" in (Path(config.out_dir) / "report.md").read_text(encoding="utf-8")  # nothing to compare with yet


def test_runs_with_other_settings_are_not_mixed_in(config_file: Path, here: list[str]) -> None:
    """Guards: results of yesterday's learning rate in today's table; runs deleted unasked."""
    assert ablate(read_config(str(config_file), []), ["baseline"], log=silent) == 0
    changed = read_config(str(config_file), ["train.lr=1e-4"])
    with pytest.raises(ValueError, match=r"baseline.seed_0 holds a run with other settings \(train\.lr 0\.006 -> 0\.0001\)"):
        ablate(changed, log=silent)
    assert len(here) == 1
    assert not differences(plan(read_config(str(config_file), []))[0])


def test_a_failed_run_does_not_stop_the_others(config_file: Path, here: list[str]) -> None:
    """Guards: a night lost to one variant that diverges; a failure that the report keeps to itself, or that is never tried again."""
    config = read_config(str(config_file), ["variants={baseline: {}, bad: {}, last: {}}"])
    lines: list[str] = []
    original = program._Progress._train

    def train(self: Any, run: Any) -> str | None:
        return "steps in a row were not finite" if run.variant == "bad" else original(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program._Progress, "_train", train)
        assert ablate(config, log=lambda line: lines.append(str(line))) == 1
    assert [Path(name).parent.name for name in here] == ["baseline", "last"] and any("not finite" in line for line in lines)
    assert "bad seed 0: steps in a row were not finite" in (Path(config.out_dir) / "report.md").read_text(encoding="utf-8")
    assert ablate(config, log=silent) == 0 and Path(here[-1]).parent.name == "bad"


def test_the_reason_of_a_failure_is_its_last_line(config_file: Path, here: list[str]) -> None:
    """Guards: a run that ends with a message for its user, tried twice and reported as "exit status 1"."""
    config = read_config(str(config_file), [])
    run = plan(config)[0]
    run.settings.train.lr = 1e30
    run.settings.train.clip = 0.0
    progress = program._Progress(config, [run], [run], {}, sys.stdout, program.StopRequest(), silent)
    reason = progress._train(run)
    assert reason is not None and "train.lr" in reason and len(here) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("victim", ["training", "ablation", "asked"])
def test_killed_and_run_again(victim: str, config_file: Path, tmp_path: Path) -> None:
    """Guards: a killed ablation that starts its run anew, trains beside the process it left behind, or leaves another result."""
    words = [str(config_file), "train.max_steps=120", "train.eval_every=0", "time_rounds=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tools.ablate", *words, *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    straight = start(f"out_dir={tmp_path / 'straight'}")
    assert straight.wait(timeout=300) == 0
    first = start()
    checkpoints = tmp_path / "out" / "baseline" / "seed_0" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_??????/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if victim == "training":
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert first.wait(timeout=300) == 0
    else:
        first.send_signal(signal.SIGKILL if victim == "ablation" else signal.SIGTERM)
        assert first.wait(timeout=60) == (-9 if victim == "ablation" else 130)
        second = start()
        output, _ = second.communicate(timeout=300)
        assert second.returncode == 0, output
    log = (tmp_path / "out" / "baseline" / "seed_0.log").read_text(encoding="utf-8")
    assert "resuming from" in log
    for name in ("baseline", "gate"):
        results = [
            json.loads((tmp_path / out / name / "seed_0" / "result.json").read_text(encoding="utf-8")) for out in ("straight", "out")
        ]
        assert results[0]["bpb"] == results[1]["bpb"]


# -------------------------------------------------------------------------------------- step times


def test_step_times_are_measured_once_and_again_for_other_variants(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a new ratio, and so a new table, at every start; times of variants that have changed since."""
    calls: list[int] = []
    original = timing.measure

    def measure(*args: Any) -> StepTimes:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(timing, "measure", measure)

    def times(*words: str) -> StepTimes:
        config = read_config(str(config_file), list(words))
        variants = {name: run_settings(config, "", name) for name in config.variants}
        return timing.step_times(variants, "baseline", Path(config.out_dir), config.time_rounds, silent)

    first = times()
    assert times("train.max_steps=50", "seeds=[7]") == first and len(calls) == 1
    assert set(first.seconds) == {"baseline", "gate"} and all(len(values) == 2 for values in first.seconds.values())
    times("data.max_length=16")
    assert len(calls) == 2


def test_an_automatic_precision_is_the_same_for_all_runs(config_file: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: variants of different precision, each measured on a busy machine for itself."""
    choices = iter(["bf16", "fp32", "fp32", "fp32"])
    original = timing.choose_precision

    def choose(settings: Any, device: str, step: Callable[[], Any]) -> Any:
        chosen = original(settings, device, step)
        chosen.name = next(choices) if settings.precision == "auto" else chosen.name
        return chosen

    monkeypatch.setattr(timing, "choose_precision", choose)
    config = read_config(str(config_file), ["train.precision=auto"])
    assert ablate(config, ["baseline"], log=silent) == 0
    more = read_config(str(config_file), ["train.precision=auto", "variants.relu2={model.feed_forward: relu2}"])
    assert ablate(more, log=silent) == 0  # other variants: measured again, and still what the finished runs had
    settings = [yaml.safe_load((Path(folder) / "run.yaml").read_text(encoding="utf-8")) for folder in here]
    assert [s["train"]["precision"] for s in settings] == ["bf16"] * 3


def make_times(**seconds: list[float]) -> StepTimes:
    return StepTimes("fp32", "machine", 1000, "baseline", "key", seconds)


def test_ratios_are_taken_within_rounds() -> None:
    """Guards: another program's load in some rounds counted against a variant."""
    slow = [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 1.0, 1.0, 2.0]
    times = make_times(baseline=slow, gate=[1.1 * s for s in slow[:-1]] + [9.0])
    middle, least, most = times.ratio("gate")
    assert middle == pytest.approx(1.1) and least == pytest.approx(1.1) and most == pytest.approx(4.5)
    assert times.likely_ratio("gate") == (pytest.approx(1.1), pytest.approx(1.1))
    assert times.tokens_per_second("gate") == pytest.approx(1000 / 1.1)


def test_the_interval_of_a_median_covers_it() -> None:
    """Guards: order statistics that are off by one."""
    import random

    draw = random.Random(1)
    inside = 0
    for _ in range(2000):
        values = [draw.gauss(1.0, 0.1) for _ in range(9)]
        low, high = make_times(baseline=[1.0] * 9, gate=values).likely_ratio("gate")
        inside += low <= 1.0 <= high
    assert 0.945 < inside / 2000 < 0.975  # 0.961 exactly


# --------------------------------------------------------------------------------------- statistics


def test_intervals_over_seeds() -> None:
    """Guards: the normal distribution for three seeds, a standard deviation of the population, an interval from one run."""
    result = interval([0.02, 0.05, 0.02])
    assert result is not None and result.low is not None and result.high is not None
    half = 4.303 * statistics.stdev([0.02, 0.05, 0.02]) / math.sqrt(3)
    assert (result.mean, result.low, result.high) == pytest.approx((0.03, 0.03 - half, 0.03 + half)) and not result.clear
    one = interval([0.5])
    assert one is not None and one.low is None and not one.clear and interval([]) is None
    narrow = interval([0.1, 0.11, 0.1, 0.11])
    assert narrow is not None and narrow.clear


def test_quantiles_of_students_distribution() -> None:
    """Guards: a wrong number in the table: each one must leave 2.5 % above it (integrated numerically)."""
    for freedom, quantile in enumerate(T_QUANTILES, start=1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        steps = 20_000
        width = quantile / steps
        inner = sum((1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps)) * width * scale
        assert 0.5 - inner == pytest.approx(0.025, abs=5e-5)


def test_the_baseline_at_other_lengths() -> None:
    """Guards: seeds mixed up, a length read as time instead of its logarithm, no slope beyond the last length."""
    law = {share: 1.5 - 0.1 * math.log(share) for share in (0.5, 1.0, 2.0)}
    curve = LengthCurve({0: law, 1: {share: bpb + 0.3 for share, bpb in law.items()}, 2: {1.0: 9.0}, 3: {0.5: 9.0}})
    for share in (0.3, 0.5, 0.8, 1.0, 1.4, 2.0, 3.0):
        assert curve.change(share) == pytest.approx(-0.1 * math.log(share), abs=1e-12)
    assert curve.known and curve.covers(1.9) and not curve.covers(2.1) and not LengthCurve({0: {1.0: 1.0}}).known


def fake_results(config: AblationConfig, bpb: dict[tuple[str, float, int], float]) -> None:
    for run in plan(config):
        if (run.variant, run.share, run.seed) in bpb:
            run.folder.mkdir(parents=True, exist_ok=True)
            value = bpb[run.variant, run.share, run.seed]
            result = Result(1000, 900, 512, 1.0, 100.0, value, curve=[(256, value + 1), (512, value)])
            (run.folder / "result.json").write_text(json.dumps(vars(result)), encoding="utf-8")


def test_equal_tokens_and_equal_time(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: differences between different seeds; a slower variant that is compared with a baseline of the same length."""
    config = read_config(str(config_file), ["seeds=[0,1,2]", "baseline_lengths=[0.5,2]"])
    bpb: dict[tuple[str, float, int], float] = {}
    for seed, (level, gain) in enumerate([(1.0, 0.050), (2.0, 0.052), (3.0, 0.048)]):
        for share in (0.5, 1.0, 2.0):
            bpb["baseline", share, seed] = level - 0.1 * math.log2(share)
        bpb["gate", 1.0, seed] = level - gain
    fake_results(config, bpb)
    times = make_times(baseline=[1.0] * 9, gate=[2**0.25] * 9)
    monkeypatch.setattr("tools.ablation.report.read_step_times", lambda folder: times)
    row = collect(config, plan(config))[0].rows[-1]
    assert row.name == "gate" and row.equal_tokens is not None and row.equal_time is not None
    half = 4.303 * 0.002 / math.sqrt(3)
    assert (row.equal_tokens.mean, row.equal_tokens.low, row.equal_tokens.high) == pytest.approx((-0.05, -0.05 - half, -0.05 + half))
    # A step takes 2^0.25 times as long, and a baseline of that length is 0.1 * 0.25 better.
    assert (row.equal_time.mean, row.equal_time.low) == pytest.approx((-0.025, -0.025 - half)) and not row.extrapolated
    times.seconds["gate"] = [2**0.2] * 4 + [2**0.25] + [2**0.3] * 4  # an uncertain ratio is part of the interval
    row = collect(config, plan(config))[0].rows[-1]
    assert row.equal_time is not None and row.equal_time.low == pytest.approx(-0.025 - half - 0.005)
    assert row.equal_time.high == pytest.approx(-0.025 + half + 0.005)
    text = write_report(config, plan(config))
    assert re.search(r"\| gate \| 3 \|.*\*\*-0\.0500 \(-0\.0550 to -0\.0450\)\*\* \|", text)
    pytest.importorskip("matplotlib")
    assert (Path(config.out_dir) / "curves.png").stat().st_size > 10_000 and (Path(config.out_dir) / "differences.png").is_file()


def test_one_seed_is_never_clear(config_file: Path) -> None:
    """Guards: bold numbers in a screening of one seed; a table that fails while only some runs are there."""
    config = read_config(str(config_file), ["variants.baseline={seeds: [0, 1]}"])
    fake_results(config, {("baseline", 1.0, 0): 1.0, ("baseline", 1.0, 1): 1.1, ("gate", 1.0, 0): 0.5})
    text = write_report(config, plan(config))
    assert "-0.5000 |" in text and "**" not in text and "standard deviation 0.0707" in text and "3 of 3" in text


def test_peak_memory_is_the_process_s_own() -> None:
    """Guards: the memory of the program that starts a run, counted as the run's."""
    code = "from train.runtime import peak_memory_mb; print(peak_memory_mb('cpu'))"
    if not Path("/proc/self/status").is_file() or peak_memory_mb("cpu") is None:
        pytest.skip("this system does not tell")
    held = bytearray(1_500 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1_000 < len(held) / 2**20


def test_metrics_and_results_agree(config_file: Path, here: list[str]) -> None:
    """Guards: a result that was read from the middle of a log."""
    config = read_config(str(config_file), ["data.val_file=none", "data.val_share=0.3"])
    assert ablate(config, ["baseline"], log=silent) == 0
    run = plan(config)[0]
    result, last = read_result(run), read_jsonl(run.folder / "metrics.jsonl")[-1]
    assert result is not None and result.bpb == last["val_bpb"] and result.bpb_by_file == {} and result.tokens == last["tokens"]
