"""What PPO and GRPO share around their losses: prompts, judge, frozen reference, evaluation on held-out prompts, plot and alarms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import Completion, Engine, SamplingSettings
from model.checkpoint import find_model
from model.lora import disabled
from model.reward import RewardModel, check_same_vocabulary
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train import parallel
from train.config import GRPOStageConfig, PPOStageConfig, UsageError, stage_name
from train.log_probs import completion_log_probs
from train.loop import LossFunction
from train.metrics import METRICS_FILE, append_event, read_jsonl
from train.planning import Prepare
from train.plotting import plot_panels
from train.prompts import Prompt, read_prompts
from train.reference import disable_dropout
from train.rehearsal import rehearse
from train.rewards import NEED_REFERENCE, NEED_RESULT, Judge, check_weights
from train.rollout import FEWER, LOGGED, REWARD, RolloutSource
from train.runtime import Precision, device_name, format_minutes, only_for_show, timed
from train.stage import Log, begin, make_model, print_peak, print_plan, run_stage

PolicyConfig = PPOStageConfig | GRPOStageConfig
MakeSource = Callable[..., RolloutSource]
DEFAULT_REWARD_MODEL = "weight/reward"
SHOWN_PROMPTS = 4
ALARMS = {
    FEWER: "not enough memory for answers to {before} prompts at once ({reason}): {prompts} at once from now on, the same answers but for "
    "rounding",
    "ratio": "the first update after a rollout did not start at a ratio of 1 (largest deviation {largest_deviation:.2g}): the policy that "
    "learns is not the one that wrote the answers; train.precision=fp32 rules the number type out",
    "kl_runaway": "the policy is {kl_per_token:.2f} nats per token from where it started (limit {limit:g}): what it says is likely "
    "broken; raise the KL weight or lower train.lr",
    "rewards_collapsed": "every answer of the rollout got the reward {reward:.3g}: there is nothing to learn from them; other questions, "
    "other rewards, or a higher rollout.temperature would differ",
    "groups_equal": "in each of the {groups} groups all answers got the same reward: nothing is learned from this rollout; harder or "
    "easier questions, more rollout.samples or a higher rollout.temperature would differ",
}


def run_policy_stage(
    settings: PolicyConfig,
    make_source: MakeSource,
    make_loss: Callable[[RolloutSource], LossFunction],
    reference_needed: bool,
    panels: dict[str, tuple[str, ...]],
    log: Log = print,
) -> int:
    """A stage whose policy writes what it learns from. Returns the exit status.

    make_source takes what RolloutSource takes; make_loss gets that source. panels: title -> names in metrics.jsonl, for the plot.
    """
    tokenizer, config = begin(settings, log)
    rollout, row_length = settings.rollout, settings.data.max_length
    judge = make_judge(settings, tokenizer)
    train, held_out = stage_prompts(settings, tokenizer, log)
    source = make_source(
        tokenizer,
        train,
        judge,
        rollout,
        row_length=row_length,
        batch_size=settings.train.batch_size,
        accumulation_steps=settings.train.accumulation_steps,
        seed=settings.train.seed,
        alarm=Alarms(Path(settings.out_dir), log),
    )
    loss_fn = make_loss(source)
    own_reference = reference_needed and not settings.lora.r  # else the frozen base of the adapter is the reference
    frozen = config.account().parameters if own_reference else 0
    frozen += 0 if judge.reward_model is None else judge.reward_model.num_parameters()
    answer = round(sum(len(prompt.ids) for prompt in train) / len(train)) + rollout.max_new_tokens
    summary = f"{len(train):,} prompts, {len(held_out):,} held out"
    print_plan(settings, config, source, summary, log, answer=answer, frozen=frozen)
    log(
        f"  rollout    {rollout.prompts} prompts x {rollout.samples} answers of up to {rollout.max_new_tokens} tokens, learned from "
        f"{source.passes} times, {settings.train.batch_size} answers at once"
    )
    log(f"  rewards    {judge.describe()}")
    device = device_name(settings.train.device)
    if judge.reward_model is not None:
        judge.reward_model.to(device)
    model = make_model(settings, config)
    disable_dropout(model)
    source.attach(model)
    reference = frozen_model(settings).to(device) if own_reference else None
    if reference_needed:
        source.reference = lambda inputs: reference_log_probs(reference or model, inputs, rollout.temperature)

    def prepare(model: SmartHaoAI, precision: Precision) -> None:
        source.precision = precision

    if settings.dry_run:
        print_time(settings, model, source, loss_fn, tokenizer, prepare, log)
        return 0
    shown = (held_out or train)[:SHOWN_PROMPTS]
    asked = held_out[: rollout.eval_prompts]
    status = run_stage(
        settings,
        tokenizer,
        model,
        source,
        loss_fn,
        (lambda model: held_out_rewards(model, tokenizer, asked, judge)) if asked else None,
        lambda model, tokenizer: [(p.question, spoken(c)) for p, c in greedy(model, tokenizer, shown, rollout.max_new_tokens)],
        data=str(settings.data.prompt_file),
        prepare=prepare,
        facts=lambda: {
            "rewards": judge.describe(),
            **before_and_after(read_jsonl(Path(settings.out_dir) / METRICS_FILE)),
            **{f"last rollout, {k}": f"{v:.3f}" for k, v in source.diagnostics.items()},
        },
        log=log,
    )
    if not parallel.is_first():
        return status
    out = Path(settings.out_dir)
    name = stage_name(type(settings))
    with only_for_show(f"{name}.png"):
        title = out.name if out.name == name else f"{out.name}: {name}"
        plot_panels(read_jsonl(out / METRICS_FILE), out / f"{name}.png", panels, title)
    return status


def print_time(
    settings: PolicyConfig,
    model: SmartHaoAI,
    source: RolloutSource,
    loss_fn: LossFunction,
    tokenizer: BPETokenizer,
    prepare: Prepare,
    log: Log,
) -> None:
    """--dry-run: memory and time of the run, from one rollout, its plan and its first steps; the model is of no more use then."""
    train, device = settings.train, device_name(settings.train.device)
    model.to(device).train()
    cursor = source.state_dict()
    answering = timed(lambda: source.next_batch(0.0), device)
    source.load_state_dict(cursor)
    found = rehearse(settings, model, source, loss_fn, tokenizer=tokenizer, prepare=prepare, log=log)
    print_peak(found, log)
    answers = train.batch_size * train.accumulation_steps
    rollouts = answers / (settings.rollout.prompts * settings.rollout.samples * source.passes)  # per step
    in_second = math.ceil(2 * rollouts) - math.ceil(rollouts)  # which is the step that was timed
    learning = max(found.seconds - in_second * answering, 0.0)
    steps = train.max_steps or max(1, round(train.epochs * source.rows_per_epoch() / answers))
    log(f"  time       {answering:.1f} s to write and measure a rollout, {learning:.1f} s for a step ({found.state.precision})")
    if train.max_minutes and not train.max_steps:
        steps = int(train.max_minutes * 60 / (learning + rollouts * answering))
    log(f"             about {format_minutes(steps * (learning + rollouts * answering))} for {steps:,} steps")


def make_judge(settings: PolicyConfig, tokenizer: BPETokenizer) -> Judge:
    """Rules and reward model of the settings. Raises UsageError when there is neither, ValueError for another vocabulary."""
    weights = check_weights(settings.rewards)
    folder = settings.reward_model_dir
    if folder is None and not weights:
        folder = settings.reward_model_dir = DEFAULT_REWARD_MODEL
        if not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"nothing says which answers are good: there is no reward model in {folder} (python -m train.train_reward makes one; "
                "reward_model_dir=... names another) and no rule is set (rewards.exact=1, rewards.format=0.5 ...)"
            )
    reward_model = None
    if folder is not None:
        check_same_vocabulary(tokenizer, BPETokenizer.from_pretrained(find_model(folder)), folder)
        reward_model = RewardModel.from_pretrained(folder).requires_grad_(False)
        if not settings.dry_run and not reward_model.score_head.weight.any():  # a plan may stand on what will be trained
            raise UsageError(
                f"{folder} is no trained reward model, all answers would get 0: `python -m train.train_reward model_dir={folder}` makes one"
            )
    missing_end = settings.ppo.missing_end if isinstance(settings, PPOStageConfig) else 0.0
    return Judge(weights, settings.rollout.max_new_tokens, reward_model, missing_end, tokenizer.pad_token_id)


def stage_prompts(settings: PolicyConfig, tokenizer: BPETokenizer, log: Log) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn on and held-out ones: data.val_file's, else what data.val_share keeps back."""
    data, weights = settings.data, check_weights(settings.rewards)
    longest = data.max_length - settings.rollout.max_new_tokens

    def read(spec: Any, share: float) -> tuple[list[Prompt], list[Prompt]]:
        return read_prompts(
            spec,
            tokenizer,
            longest,
            val_share=share,
            answered=any(name in NEED_REFERENCE for name in weights),
            verifiable=any(name in NEED_RESULT for name in weights),
            thinking=settings.rollout.thinking,
            strict=data.strict,
            log=log,
        )

    if data.val_file:
        return read(data.prompt_file, 0.0)[0], read(data.val_file, 0.0)[0]
    return read(data.prompt_file, data.val_share)


def frozen_model(settings: PolicyConfig) -> SmartHaoAI:
    """The model that the run started from, read again: on --resume the policy has moved on."""
    assert settings.model_dir is not None  # the settings were checked
    model = SmartHaoAI.from_pretrained(settings.model_dir)
    disable_dropout(model)
    return model.requires_grad_(False)


@torch.no_grad()
def reference_log_probs(model: SmartHaoAI, inputs: dict[str, Tensor], temperature: float) -> Tensor:
    """Log-probabilities (N,) under a frozen model, or the frozen base of an adapted one; computed like the policy's, in the mode of
    training, which some kernels look at."""
    model.train()
    with disabled(model):
        return completion_log_probs(model, inputs, temperature).values


class Alarms:
    """Writes trouble to events.jsonl, and says it the first time it comes."""

    def __init__(self, out_dir: Path, log: Log) -> None:
        self.out_dir, self.log = out_dir, log
        self.said: set[str] = set()

    def __call__(self, step: int, kind: str, details: dict[str, Any]) -> None:
        if not parallel.is_first():
            return
        append_event(self.out_dir, step, kind, **details)
        if kind in ALARMS and kind not in self.said:
            self.said.add(kind)
            self.log(f"warning: step {step}: " + ALARMS[kind].format(**details))


def greedy(model: SmartHaoAI, tokenizer: BPETokenizer, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[Prompt, Completion]]:
    """The likeliest answer to each prompt."""
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    replies = Engine(model, tokenizer).generate([prompt.ids for prompt in prompts], settings)
    return [(prompt, reply[0]) for prompt, reply in zip(prompts, replies, strict=True)]


def spoken(reply: Completion) -> str:
    """Thinking in parentheses, then the answer."""
    return (f"({reply.reasoning.strip()}) " if reply.reasoning.strip() else "") + reply.text


def held_out_rewards(model: SmartHaoAI, tokenizer: BPETokenizer, prompts: Sequence[Prompt], judge: Judge) -> dict[str, float]:
    """Mean rewards of greedy answers, as val_reward, val_exact and so on."""
    parts = judge(greedy(model, tokenizer, prompts, judge.limit))
    return {f"val_{name}": sum(part[name] for part in parts) / len(parts) for name in [REWARD, *(n for n in parts[0] if n != REWARD)]}


def before_and_after(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The report's lines about held-out questions: what each rule and their sum gave in the first and the last evaluation."""
    found = [row for row in rows if row.get(f"val_{REWARD}") is not None]
    names = [name for name in found[0] if name.startswith("val_")] if found else []
    return {
        f"held-out {name.removeprefix('val_')}": f"{found[-1][name]:.3f} (step {found[0]['step']}: {found[0][name]:.3f})"
        for name in names
        if found[0][name] is not None and found[-1].get(name) is not None
    }


def logged_metrics(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """How the rollout of a batch went: the entries of `extra` that are only for the log."""
    return {name.removeprefix(LOGGED): value for name, value in extra.items() if name.startswith(LOGGED)}
