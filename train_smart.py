"""From raw text to a chatting model in one command: `python train_smart.py [--minutes 18] [--recipe quick|sample]`.

Prepares a bilingual corpus, trains the tokenizer, pretrains, fine-tunes on conversations, measures, and shows sample answers. Run
again, it reuses finished stages; interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from model.config import HaoAIConfig
from model.files import atomic_write_text
from model.transformer import SmartHaoAI
from tools.curriculum import score
from tools.evaluate import answer_probes, file_bits_per_byte, load, probe_table
from tools.prepare_data import SourcesUnavailable, prepare
from train.checkpoints import newest_checkpoint
from train.config import (
    DataConfig,
    OptimizationConfig,
    PretrainConfig,
    SFTConfig,
    StageConfig,
    TokenizerConfig,
    TokenizerStageConfig,
    UsageError,
    to_yaml,
)
from train.runtime import Precision, choose_precision, describe_machine, device_name, format_minutes, run_main, set_threads, timed
from train.train_pretrain import pretrain
from train.train_sft import sft
from train.train_tokenizer import train_tokenizer

PRETRAIN_SHARE, SFT_SHARE = 0.52, 0.30  # of the minutes; the rest is data, tokenizer and evaluation
VALIDATION_KB = 100
REAL_WEIGHT = 0.5  # passes over the real texts per pass over the generated ones
SAMPLE_QUESTIONS = (
    "你好！",
    "你叫什么名字？",
    "天空是什么颜色？",
    "12 + 7 = ?",
    "给我讲一个小兔子的故事。",
    "Hello!",
    "Who are you?",
    "What does a cow eat?",
    "How much is 25 + 13?",
    "Tell me a story about a little cat.",
)


@dataclass(frozen=True)
class Shape:
    """A model and batch for budgets of up to `minutes` on two CPU cores."""

    minutes: float
    model: dict[str, Any]
    vocab_size: int
    max_length: int = 256
    batch_size: int = 16


RECORD_FILE = "smart.json"
LADDER = (
    Shape(4, {"preset": "nano", "n_layer": 4}, 4096),
    Shape(60, {"preset": "nano"}, 6144),
    Shape(300, {"n_layer": 8, "n_head": 6, "n_kv_head": 3, "n_embd": 384, "max_position_embeddings": 512}, 8192),
    Shape(float("inf"), {"preset": "mini"}, 16384, 512, 8),
)
GPU_SPEED = 40  # how many minutes of two CPU cores one minute of a GPU is taken for when the shape is chosen


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    started = time.perf_counter()
    device = device_name(args.device)
    set_threads(args.threads)
    out = Path(args.out)
    print(f"machine     {describe_machine(device)}")
    shape = choose_shape(args.minutes, device)
    _check_earlier_run(out, args)
    precision, rate = measure(shape, device)
    stages = _stages(args, shape, out, device, precision.name)
    print_plan(args, shape, precision, rate, device)

    data = prepare_corpus(args)
    set_sources(stages, data)
    print("\n[1/4] tokenizer")
    train_tokenizer(stages["tokenizer"])  # type: ignore[arg-type]
    for number, (name, run) in enumerate((("pretrain", pretrain), ("sft", sft)), start=2):
        print(f"\n[{number}/4] {name}")
        status = run_stage(stages[name], run)
        if status:
            print("\nrun the same command again to go on from here")
            return status
    print("\n[4/4] evaluation")
    report = evaluate(out, data, args)
    print(report)
    plots = ", ".join(str(out / name / "loss.png") for name in ("pretrain", "sft"))
    print(f"\nloss plots  {plots}\nreport      {out / 'report.md'}\ntotal time  {format_minutes(time.perf_counter() - started)}")
    print(f"\nGo on with:  python chat.py --model {out / 'sft'}\n接着聊：      python chat.py --model {out / 'sft'} --lang zh")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=18.0, help="time budget of the whole run (default 18)")
    parser.add_argument(
        "--recipe",
        choices=("quick", "sample", "core"),
        default="quick",
        help="quick: small real corpora plus generated data; sample: generated only, no network; core: a larger real corpus",
    )
    parser.add_argument("--out", default="weight", help="folder of the results (default weight)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--per-kind", type=int, default=50, help="held-out prompts per kind and language in the evaluation")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run with other settings")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        raise UsageError(f"--minutes {args.minutes:g} must be above 0")
    if args.per_kind < 1:
        raise UsageError(f"--per-kind {args.per_kind} must be at least 1")
    return args


def choose_shape(minutes: float, device: str) -> Shape:
    """The largest model that such a budget trains well: small and fast wins when time is short."""
    budget = minutes * (GPU_SPEED if device.startswith("cuda") else 1)
    return next(shape for shape in LADDER if budget <= shape.minutes)


def _config(shape: Shape) -> HaoAIConfig:
    fields = dict(shape.model)
    preset = fields.pop("preset", None)
    fields["vocab_size"] = shape.vocab_size
    return HaoAIConfig.preset(preset, **fields) if preset else HaoAIConfig(**fields)


def measure(shape: Shape, device: str) -> tuple[Precision, float]:
    """The precision that is fast here, and training tokens per second in it, from a few steps on random tokens."""
    config = _config(shape)
    torch.manual_seed(0)
    model = SmartHaoAI(config).to(device).train()
    ids = torch.randint(0, config.vocab_size, (shape.batch_size, shape.max_length), device=device)
    segments = torch.ones_like(ids)

    def step() -> None:
        model(ids, labels=ids, segment_ids=segments).loss.backward()
        model.zero_grad(set_to_none=True)

    precision = choose_precision(OptimizationConfig(), device, step)
    with precision.autocast():
        seconds = sorted(timed(step, device) for _ in range(3))[1]
    return precision, ids.numel() / seconds


def print_plan(args: argparse.Namespace, shape: Shape, precision: Precision, rate: float, device: str) -> None:
    config = _config(shape)
    account = config.account()
    print(f"device      {device}, precision {precision.name} ({precision.reason})")
    print("model\n" + account.table(shape.max_length))
    memory = account.training_bytes(shape.batch_size, shape.max_length, precision.name != "fp32") / 2**20
    print(f"memory      about {memory:,.0f} MiB for a training step")
    print(f"budget      {args.minutes:g} minutes, recipe {args.recipe}, {rate:,.0f} training tokens per second measured")
    for name, share in (("pretraining", PRETRAIN_SHARE), ("fine-tuning", SFT_SHARE)):
        print(f"  {name:<12}{share * args.minutes:5.1f} min  about {share * args.minutes * 60 * rate / 1e6:.1f} M tokens")
    print(f"  {'the rest':<12}{(1 - PRETRAIN_SHARE - SFT_SHARE) * args.minutes:5.1f} min  data, tokenizer, evaluation", flush=True)


def _stages(args: argparse.Namespace, shape: Shape, out: Path, device: str, precision: str) -> dict[str, StageConfig]:
    """The settings of the three stages. They depend on the arguments alone, so that a second run finds them unchanged."""
    tokenizer = TokenizerConfig(vocab_size=shape.vocab_size, sample_mb=16)
    data: dict[str, Any] = {"max_length": shape.max_length, "store_dir": str(out / "token_store")}
    common: dict[str, Any] = {
        "batch_size": shape.batch_size,
        "optimizer": "muon",
        "min_lr_ratio": 0.03,
        "device": device,
        "precision": precision,
        "threads": args.threads,
        "seed": args.seed,
    }
    return {
        "tokenizer": TokenizerStageConfig(out_dir=str(out / "tokenizer"), tokenizer=tokenizer, data=DataConfig(**data)),
        "pretrain": PretrainConfig(
            out_dir=str(out / "pretrain"),
            tokenizer_dir=str(out / "tokenizer"),
            tokenizer=tokenizer,
            resume=True,
            model=dict(shape.model),
            data=DataConfig(**data, short_length=shape.max_length // 2, short_share=0.5),
            train=OptimizationConfig(**common, schedule="wsd", lr=6e-3, max_minutes=args.minutes * PRETRAIN_SHARE),
        ),
        "sft": SFTConfig(
            out_dir=str(out / "sft"),
            model_dir=str(out / "pretrain"),
            tokenizer=tokenizer,
            resume=True,
            data=DataConfig(**data),
            train=OptimizationConfig(**common, schedule="linear", lr=3e-3, max_minutes=args.minutes * SFT_SHARE),
        ),
    }


def _check_earlier_run(out: Path, args: argparse.Namespace) -> None:
    """Results of other settings are not mixed with this run. Raises UsageError; with --overwrite they are removed."""
    record = out / RECORD_FILE
    wanted = {"recipe": args.recipe, "minutes": args.minutes, "seed": args.seed}
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    trained = any((out / name).exists() for name in ("pretrain", "sft"))
    if trained and {name: found.get(name) for name in wanted} != wanted:
        if not args.overwrite:
            before = ", ".join(f"{name} {value}" for name, value in found.items()) or "stages that were trained one by one"
            raise UsageError(f"{out} already holds {before}: name another folder with --out, or replace it with --overwrite")
        for name in ("pretrain", "sft"):
            shutil.rmtree(out / name, ignore_errors=True)
        found = {}
    atomic_write_text(record, json.dumps({**wanted, **{k: v for k, v in found.items() if k == "corpus"}}) + "\n")


def prepare_corpus(args: argparse.Namespace) -> Path:
    """The folder of the recipe's data; the generated sample stands in, and is named, when the real corpora cannot be had."""
    folder = Path("training_data/recipes")
    record = Path(args.out) / RECORD_FILE
    found = json.loads(record.read_text(encoding="utf-8"))
    recipe = found.get("corpus", args.recipe)  # a run that began with the sample goes on with it
    print(f"\n[0/4] data: recipe {recipe}")
    try:
        prepare(recipe, folder / recipe, seed=args.seed)
        return folder / recipe
    except SourcesUnavailable as error:
        print(f"the real corpora cannot be had: {error}\nusing the generated sample instead; no real text will be learned", file=sys.stderr)
    prepare("sample", folder / "sample", seed=args.seed)
    atomic_write_text(record, json.dumps({**found, "corpus": "sample"}) + "\n")
    return folder / "sample"


def set_sources(stages: dict[str, StageConfig], data: Path) -> None:
    """Which files each stage reads, and how often.

    The tokenizer learns from real text where there is any: the generated rows repeat themselves so much that whole phrases would
    become tokens, and a name would be another token in every phrase, which makes copying it hard.
    """
    pretrain_real, sft_real = (
        [str(f) for f in sorted((data / kind).glob("*.jsonl")) if f.stem != "curriculum"] for kind in ("pretrain", "sft")
    )
    curriculum = {kind: str(data / kind / "curriculum.jsonl") for kind in ("pretrain", "sft")}
    for stage in stages.values():
        stage.data.pretrain_file = [{"path": f, "weight": REAL_WEIGHT} for f in pretrain_real] + [curriculum["pretrain"]]
        stage.data.sft_file = [{"path": f, "weight": REAL_WEIGHT} for f in sft_real] + [curriculum["sft"]]
    stages["tokenizer"].data.pretrain_file = pretrain_real or curriculum["pretrain"]


def run_stage(settings: StageConfig, run: Any) -> int:
    """Run a stage unless it is finished; a stopped one goes on. Returns its exit status."""
    out = Path(settings.out_dir)
    if (out / "report.md").is_file() and (out / "run.yaml").is_file():
        found = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))
        wanted = yaml.safe_load(to_yaml(settings))
        if {**found, "train": None} == {**wanted, "train": None}:
            print(f"{out}: finished earlier, reused")
            return 0
        raise UsageError(f"{out} was trained with other settings or data; replace it with --overwrite, or name another folder with --out")
    if newest_checkpoint(out) is not None:
        print(f"{out}: interrupted earlier, going on")
    return run(settings)


def evaluate(out: Path, data: Path, args: argparse.Namespace) -> str:
    """Bits per byte before and after fine-tuning, pass rates on held-out prompts, and sample answers; also written to report.md."""
    rows = []
    for stage in ("pretrain", "sft"):
        model, tokenizer = load(str(out / stage), args.device)
        for file in sorted((data / "valid").glob("*.jsonl")):
            measured = file_bits_per_byte(model, tokenizer, file, context=256, limit_bytes=VALIDATION_KB * 1000)
            rows.append((stage, file.stem, measured.bpb))
    answers = answer_probes(model, tokenizer, args.per_kind)
    result = score(answers)
    overall = result["overall"]
    lines = ["held-out text, bits per byte"]
    for name in dict.fromkeys(file for _, file, _ in rows):
        lines.append(f"  {name:<16}" + "  ".join(f"{stage} {bpb:.3f}" for stage, file, bpb in rows if file == name))
    lines += [
        "",
        probe_table(result),
        "",
        f"all in all  {overall['passed']} of {overall['total']} held-out prompts passed",
        "",
        *_honest_words(result),
        "",
        "sample answers",
    ]
    lines += [f"  > {question}\n    {answer}" for question, answer in sample_answers(out / "sft", args)]
    text = "\n".join(lines)
    atomic_write_text(out / "report.md", f"# train_smart: {args.recipe}, {args.minutes:g} minutes\n\n```text\n{text}\n```\n")
    atomic_write_text(out / "report.json", json.dumps({"bits_per_byte": rows, "probes": result}, ensure_ascii=False) + "\n")
    return text


def _honest_words(result: dict[str, Any]) -> list[str]:
    """What the numbers say in plain words."""
    good = [name for name, cell in result["cells"].items() if cell["rate"] >= 0.8]
    weak = [name for name, cell in result["cells"].items() if cell["rate"] < 0.5]
    between = [name for name in result["cells"] if name not in good + weak]
    words = ["It can: " + (", ".join(good) or "nothing of this reliably") + " (4 of 5 held-out prompts or more)."]
    if between:
        words.append("It can sometimes: " + ", ".join(between) + ".")
    if weak:
        words.append("It cannot yet: " + ", ".join(weak) + " (under half).")
    words.append("It knows only what it was taught; outside that small world it makes things up. A longer --minutes helps.")
    return words


def sample_answers(folder: Path, args: argparse.Namespace) -> list[tuple[str, str]]:
    """(question, answer) of a fresh conversation each."""
    from inference import ChatSession

    chat = ChatSession.from_pretrained(str(folder), device=device_name(args.device), temperature=0.0)
    answers = []
    for question in SAMPLE_QUESTIONS:
        chat.reset()
        answer = chat.chat(question)
        reasoning = f"({chat.last.reasoning.strip()}) " if chat.last is not None and chat.last.reasoning else ""
        answers.append((question, reasoning + answer))
    return answers


if __name__ == "__main__":
    run_main(main)
