"""From raw text to a chatting model in one command: `python train_smart.py [--minutes 18] [--recipe quick|sample]`.

Prepares a bilingual corpus, trains the tokenizer, pretrains, fine-tunes on conversations, teaches the model to think about tasks
before it answers, lets it learn from its own mistakes (--rlhf), measures, and shows sample answers. Run again, it reuses finished
stages; interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from model.config import HaoAIConfig
from model.files import atomic_write_text
from model.transformer import SmartHaoAI
from tools import make_preferences, smart_data
from tools.prepare_data import SourcesUnavailable, prepare
from tools.reasoning_tasks import KINDS
from tools.smart_report import write_report
from train.checkpoints import newest_checkpoint
from train.config import (
    DataConfig,
    DPOStageConfig,
    GRPOStageConfig,
    OptimizationConfig,
    PPOStageConfig,
    PretrainConfig,
    RewardStageConfig,
    SFTConfig,
    StageConfig,
    TokenizerConfig,
    TokenizerStageConfig,
    UsageError,
    to_yaml,
)
from train.program import run_main
from train.runtime import Precision, choose_precision, describe_machine, device_name, format_minutes, set_threads, timed
from train.stage import INTERRUPTED
from train.train_dpo import dpo
from train.train_grpo import grpo
from train.train_ppo import ppo
from train.train_pretrain import pretrain
from train.train_reward import reward
from train.train_sft import sft
from train.train_tokenizer import train_tokenizer

# Shares of the minutes; what is left is for data, tokenizer and evaluation. Then: what the last one is for, by --rlhf, and in which
# proportion. pairs: the model answers questions of its training; where its result is wrong, the data's own answer is preferred.
SHARES = {"pretrain": 0.41, "sft": 0.26, "reasoning": 0.13, "preference": 0.05}
PREFERENCE = {
    "dpo": {"pairs": 1, "dpo": 1},
    "ppo": {"pairs": 1, "reward": 1, "ppo": 2},
    "grpo": {"grpo": 1},
    "none": {},
}
STAGES = {"pretrain": pretrain, "sft": sft, "reasoning": sft, "dpo": dpo, "reward": reward, "ppo": ppo, "grpo": grpo}
NO_CHAT = ("pretrain", "pairs", "reward")  # what cannot be the last: nobody can talk to it
REAL_WEIGHT = 0.5  # passes over the real texts per pass over the generated ones
CHAT_WEIGHT = 0.25  # the same in reasoning, of conversations per pass over the tasks: about half of the tokens, so that chat stays
TASKS = 10_000
QUESTIONS_A_MINUTE = 3_000  # to make pairs from: more than can be asked
FEWEST_PAIRS = 16  # below that a preference stage would learn them by heart


@dataclass(frozen=True)
class Shape:
    """A model and batch for budgets of up to `minutes` on two CPU cores."""

    minutes: float
    model: dict[str, Any]
    vocab_size: int
    max_length: int = 256
    batch_size: int = 16


RECORD_FILE = "smart.json"
OWN_DATA = "data"  # folder in --out of what this program makes to learn from
TASK_FOLDER, QUESTIONS, PAIRS = f"{OWN_DATA}/tasks", f"{OWN_DATA}/questions.jsonl", f"{OWN_DATA}/pairs.jsonl"
WHAT = {  # in the plan
    "pairs": "answers questions; right answers against its wrong ones",
    "dpo": "learns from the pairs",
    "reward": "a reward model learns from the pairs",
    "ppo": "answers tasks; reward model and results say how well",
    "grpo": "answers tasks, several times each; right against wrong",
}
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
    set_sources(stages, data, out)
    remove_changed(stages, out, args.overwrite)
    smart_data.write_tasks(out / TASK_FOLDER, TASKS, args.per_kind * len(KINDS), args.seed)
    minutes = minutes_of(args)
    total = len(minutes) + 2
    print(f"\n[1/{total}] tokenizer")
    train_tokenizer(stages["tokenizer"])  # type: ignore[arg-type]
    last = ""
    for number, name in enumerate(minutes, start=2):
        print(f"\n[{number}/{total}] {name}", flush=True)
        if name == "pairs":
            if not make_pairs(args, out, data, minutes[name]):
                print("too few pairs to learn from: the stages after this one are left out")
                break
        elif run_stage(stages[name]):
            print("\nrun the same command again to go on from here")
            return INTERRUPTED
        if name not in NO_CHAT:
            last = name
    print(f"\n[{total}/{total}] evaluation", flush=True)
    title = f"{args.recipe}, {args.minutes:g} minutes"
    print(write_report(out, last, data, out / TASK_FOLDER / "valid.jsonl", title, args.per_kind, args.device))
    plots = ", ".join(str(out / name / "loss.png") for name in minutes if (out / name / "loss.png").is_file())
    print(f"\nloss plots  {plots}\nreport      {out / 'report.md'}\ntotal time  {format_minutes(time.perf_counter() - started)}")
    print(f"\nGo on with:  python chat.py --model {out / last}\n接着聊：      python chat.py --model {out / last} --lang zh")
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
    parser.add_argument(
        "--rlhf",
        choices=tuple(PREFERENCE),
        default="dpo",
        help="how the model learns from its own answers, after reasoning: dpo (default): right answers against its wrong ones; ppo: a "
        "reward model from such pairs, then PPO; grpo: right against wrong ones among its own, on tasks; none: not at all. "
        "The stages before are the same, and reused when only this changes",
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


def minutes_of(args: argparse.Namespace) -> dict[str, float]:
    """What is done between tokenizer and evaluation, in its order, and the minutes for it."""
    minutes = {name: share * args.minutes for name, share in SHARES.items()}
    left, parts = minutes.pop("preference"), PREFERENCE[args.rlhf]
    return {**minutes, **{name: left * part / sum(parts.values()) for name, part in parts.items()}}


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
    minutes = minutes_of(args)
    for name, length in minutes.items():
        what = WHAT.get(name) or f"about {length * 60 * rate / 1e6:.1f} M tokens"
        print(f"  {name:<12}{length:5.1f} min  {what}")
    print(f"  {'the rest':<12}{args.minutes - sum(minutes.values()):5.1f} min  data, tokenizer, evaluation", flush=True)


def _stages(args: argparse.Namespace, shape: Shape, out: Path, device: str, precision: str) -> dict[str, StageConfig]:
    """The settings of all stages that are to run. They depend on the arguments alone, so that a second run finds them unchanged."""
    minutes = minutes_of(args)
    tokenizer = TokenizerConfig(vocab_size=shape.vocab_size, sample_mb=16)
    data: dict[str, Any] = {"max_length": shape.max_length, "store_dir": str(out / "token_store")}
    machine: dict[str, Any] = {"device": device, "precision": precision, "threads": args.threads, "seed": args.seed}
    # Nobody watches such a run: a gradient that stands out is cut back, which costs nothing otherwise (docs/log.md).
    common: dict[str, Any] = {
        **machine,
        "batch_size": shape.batch_size,
        "optimizer": "muon",
        "min_lr_ratio": 0.03,
        "adaptive_clip": 2.5,
    }

    def aligned(settings: StageConfig) -> StageConfig:
        """The stage of this name with the defaults of its own command, from reasoning, in its time."""
        name = Path(settings.out_dir).name
        settings.out_dir, settings.model_dir, settings.resume = str(out / name), str(out / "reasoning"), True
        settings.data = replace(settings.data, **data)
        settings.train = replace(settings.train, **machine, eval_every=0, sample_every=0, eval_tokens=20_000, max_minutes=minutes[name])
        return settings

    stages: dict[str, StageConfig] = {
        "tokenizer": TokenizerStageConfig(out_dir=str(out / "tokenizer"), tokenizer=tokenizer, data=DataConfig(**data)),
        "pretrain": PretrainConfig(
            out_dir=str(out / "pretrain"),
            tokenizer_dir=str(out / "tokenizer"),
            tokenizer=tokenizer,
            resume=True,
            model=dict(shape.model),
            data=DataConfig(**data, short_length=shape.max_length // 2, short_share=0.5),
            train=OptimizationConfig(**common, schedule="wsd", lr=6e-3, max_minutes=minutes["pretrain"]),
        ),
        "sft": SFTConfig(
            out_dir=str(out / "sft"),
            model_dir=str(out / "pretrain"),
            tokenizer=tokenizer,
            resume=True,
            data=DataConfig(**data),
            train=OptimizationConfig(**common, schedule="linear", lr=3e-3, max_minutes=minutes["sft"]),
        ),
        "reasoning": SFTConfig(
            out_dir=str(out / "reasoning"),
            model_dir=str(out / "sft"),
            tokenizer=tokenizer,
            resume=True,
            data=DataConfig(**data),
            train=OptimizationConfig(**common, schedule="linear", lr=1.5e-3, max_minutes=minutes["reasoning"]),
        ),
    }
    if args.rlhf == "dpo":
        stages["dpo"] = aligned(DPOStageConfig())
    elif args.rlhf == "grpo":
        stages["grpo"] = aligned(GRPOStageConfig())
    elif args.rlhf == "ppo":
        stages["reward"] = aligned(RewardStageConfig())
        stages["ppo"] = aligned(PPOStageConfig(reward_model_dir=str(out / "reward"), rewards={"exact": 1.0}))
    return stages


def _check_earlier_run(out: Path, args: argparse.Namespace) -> None:
    """Results of other settings are not mixed with this run. Raises UsageError; with --overwrite they are removed."""
    record = out / RECORD_FILE
    wanted = {"recipe": args.recipe, "minutes": args.minutes, "seed": args.seed}
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    trained = any((out / name).exists() for name in STAGES)
    if trained and {name: found.get(name) for name in wanted} != wanted:
        if not args.overwrite:
            before = ", ".join(f"{name} {value}" for name, value in found.items()) or "stages that were trained one by one"
            raise UsageError(f"{out} already holds {before}: name another folder with --out, or replace it with --overwrite")
        for name in (*STAGES, OWN_DATA):
            shutil.rmtree(out / name, ignore_errors=True)
        found = {}
    atomic_write_text(record, json.dumps({**wanted, **{k: v for k, v in found.items() if k == "corpus"}}) + "\n")


def prepare_corpus(args: argparse.Namespace) -> Path:
    """The folder of the recipe's data; the generated sample stands in, and is named, when the real corpora cannot be had."""
    folder = Path("training_data/recipes")
    record = Path(args.out) / RECORD_FILE
    found = json.loads(record.read_text(encoding="utf-8"))
    recipe = found.get("corpus", args.recipe)  # a run that began with the sample goes on with it
    print(f"\n[0/{len(minutes_of(args)) + 2}] data: recipe {recipe}")
    try:
        prepare(recipe, folder / recipe, seed=args.seed)
        return folder / recipe
    except SourcesUnavailable as error:
        print(f"the real corpora cannot be had: {error}\nusing the generated sample instead; no real text will be learned", file=sys.stderr)
    prepare("sample", folder / "sample", seed=args.seed)
    atomic_write_text(record, json.dumps({**found, "corpus": "sample"}) + "\n")
    return folder / "sample"


def set_sources(stages: dict[str, StageConfig], data: Path, out: Path) -> None:
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
    chats = [{"path": f, "weight": REAL_WEIGHT * CHAT_WEIGHT} for f in sft_real] + [{"path": curriculum["sft"], "weight": CHAT_WEIGHT}]
    tasks, held_out = (str(out / TASK_FOLDER / f"{name}.jsonl") for name in ("train", "valid"))
    stages["reasoning"].data.sft_file = [*chats, tasks]
    for name in {"dpo", "reward"} & stages.keys():
        stages[name].data.preference_file = str(out / PAIRS)
    for name in {"ppo", "grpo"} & stages.keys():
        stages[name].data.prompt_file, stages[name].data.val_file = tasks, held_out


def remove_changed(stages: dict[str, StageConfig], out: Path, overwrite: bool) -> None:
    """Raises UsageError for a finished stage of other settings or data; with `overwrite` it is removed, and all that came after it."""
    for name in STAGES:
        if name not in stages or not _finished(out / name) or _same_settings(stages[name]):
            continue
        if not overwrite:
            raise UsageError(
                f"{out / name} was trained with other settings or data; replace it with --overwrite, or name another folder with --out"
            )
        after = [stage for stage in list(STAGES)[list(STAGES).index(name) :] if name in SHARES or stage in stages]
        for folder in [*after, *([OWN_DATA] if name in SHARES else [])]:
            shutil.rmtree(out / folder, ignore_errors=True)


def _finished(folder: Path) -> bool:
    return (folder / "report.md").is_file() and (folder / "run.yaml").is_file()


def _same_settings(settings: StageConfig) -> bool:
    found = yaml.safe_load((Path(settings.out_dir) / "run.yaml").read_text(encoding="utf-8"))
    return {**found, "train": None} == {**yaml.safe_load(to_yaml(settings)), "train": None}


def run_stage(settings: StageConfig) -> int:
    """Run a stage unless it is finished; a stopped one goes on. Returns its exit status."""
    out = Path(settings.out_dir)
    if _finished(out):
        print(f"{out}: finished earlier, reused")
        return 0
    if newest_checkpoint(out) is not None:
        print(f"{out}: interrupted earlier, going on")
    return STAGES[out.name](settings)  # type: ignore[operator]


def make_pairs(args: argparse.Namespace, out: Path, data: Path, minutes: float) -> bool:
    """Pairs of right and wrong answers in `out`, made unless they are there; whether there are enough."""
    pairs, questions = out / PAIRS, out / QUESTIONS
    if pairs.is_file():
        print(f"{pairs}: made earlier, reused")
    else:
        count = max(200, round(QUESTIONS_A_MINUTE * minutes))
        smart_data.write_questions(questions, count, data / "sft" / "curriculum.jsonl", out / TASK_FOLDER / "train.jsonl", args.seed)
        words = ["--prompts", str(questions), "--by", "reference", "--samples", "1", "--minutes", f"{minutes:.3f}", "--overwrite"]
        machine = ["--device", args.device, "--seed", str(args.seed)]
        try:
            make_preferences.main([str(out / "reasoning"), str(pairs), *words, *machine])
        except make_preferences.NoPairs as error:
            print(error)
            return False
    with open(pairs, encoding="utf-8") as file:
        return sum(1 for _ in file) >= FEWEST_PAIRS


if __name__ == "__main__":
    run_main(main)
