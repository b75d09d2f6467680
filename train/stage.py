"""What every stage does around the loop: output directory, tokenizer, model, plan, and the finished checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import find_model, load_config
from model.config import HaoAIConfig, allowed_changes
from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.checkpoints import FOLDER, newest_checkpoint
from train.config import StageConfig, TokenizerConfig, TokenizerStageConfig, UsageError, stage_name
from train.data import BatchSource, evaluation_batches, make_source
from train.loop import Evaluate, FitResult, fit
from train.losses import lm_loss
from train.metrics import held_out_loss, write_report
from train.runtime import describe_machine, device_name, format_minutes, seed_everything, total_memory
from train.store import TokenStore, open_store
from train.train_tokenizer import train_tokenizer

RUN_FILE = "run.yaml"  # beside every model that was trained here
DEFAULT_TOKENIZER = "weight/tokenizer"
INTERRUPTED = 130
Sampler = Callable[[SmartHaoAI, BPETokenizer], list[tuple[str, str]]]


def open_out_dir(settings: StageConfig) -> None:
    """Refuse to mix two runs in one directory. Raises UsageError for a non-empty out_dir without --resume or --overwrite."""
    out = Path(settings.out_dir)
    if not settings.out_dir:
        raise UsageError("out_dir is empty; name a directory for the result")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out_dir={out} is a file")
    if settings.resume or not out.is_dir() or not any(out.iterdir()):
        return
    if not settings.overwrite:
        raise UsageError(f"out_dir={out} already holds a run; go on with --resume, replace it with --overwrite, or name another out_dir")
    if settings.model_dir is not None and Path(settings.model_dir).resolve() == out.resolve():
        raise UsageError(f"out_dir={out} is also model_dir: --overwrite would delete the checkpoint to start from")
    if not any((out / name).exists() for name in (RUN_FILE, FOLDER, "config.json")):
        raise UsageError(f"out_dir={out} holds files that no run wrote; it is not overwritten, name another out_dir")


def clear_out_dir(settings: StageConfig) -> None:
    """Delete what --overwrite replaces; only once everything that can be wrong with the settings and the data has been checked."""
    if settings.overwrite and not settings.resume and Path(settings.out_dir).is_dir():
        shutil.rmtree(settings.out_dir)


def load_tokenizer(settings: StageConfig, log: Callable[[str], object] = print) -> BPETokenizer:
    """tokenizer_dir, else the checkpoint's, else weight/tokenizer, which is trained first when it is missing."""
    if settings.tokenizer_dir is not None:
        return BPETokenizer.from_pretrained(settings.tokenizer_dir)
    if settings.model_dir is not None:
        return BPETokenizer.from_pretrained(find_model(settings.model_dir))
    if not (Path(DEFAULT_TOKENIZER) / "tokenizer.json").is_file():
        log(f"there is no tokenizer in {DEFAULT_TOKENIZER} yet: training it first")
        size = settings.model.get("vocab_size")  # a size set by name wins over a preset's
        if size is None and settings.tokenizer.vocab_size == TokenizerConfig.vocab_size:
            size = settings.model_shape().get("vocab_size")
        tokenizer = replace(settings.tokenizer, vocab_size=int(size or settings.tokenizer.vocab_size))
        return train_tokenizer(TokenizerStageConfig(out_dir=DEFAULT_TOKENIZER, data=settings.data, tokenizer=tokenizer), log)
    return BPETokenizer.from_pretrained(DEFAULT_TOKENIZER)


def model_config(settings: StageConfig, tokenizer: BPETokenizer) -> HaoAIConfig:
    """The shape of the model to train: the checkpoint's, or the settings' with the tokenizer's vocabulary."""
    if settings.model_dir is not None:
        folder = find_model(settings.model_dir)
        config = load_config(folder)
        changes = _allowed_changes(settings, config)
        for name, value in settings.model_shape().items():
            if name in settings.model and getattr(config, name) != value and name not in changes:
                raise UsageError(f"model.{name}={value!r} does not fit the checkpoint {folder}, which has {getattr(config, name)!r}")
        try:
            config = replace(config, **changes)
        except ValueError as error:
            raise UsageError(f"model settings: {error}") from error
    else:
        shape = {"eos_token_id": tokenizer.eos_token_id, **settings.model_shape(), "vocab_size": tokenizer.vocab_size}
        shape["max_position_embeddings"] = max(shape.get("max_position_embeddings", 0), settings.data.max_length)
        try:
            config = HaoAIConfig(**shape)
        except ValueError as error:
            raise UsageError(f"model settings: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    if settings.data.max_length > config.max_position_embeddings:
        raise UsageError(f"data.max_length={settings.data.max_length} exceeds the checkpoint's context of {config.max_position_embeddings}")
    return config


def _allowed_changes(settings: StageConfig, config: HaoAIConfig) -> dict[str, Any]:
    """What is set by name and may differ from the checkpoint's `config`: parts that start without an effect, and settings of training."""
    return allowed_changes(config, {name: value for name, value in settings.model_shape().items() if name in settings.model})


def make_model(settings: StageConfig, config: HaoAIConfig) -> SmartHaoAI:
    """A new model with seeded weights, or the checkpoint's."""
    seed_everything(settings.train.seed)
    if settings.model_dir is not None:
        return SmartHaoAI.from_pretrained(settings.model_dir, **_allowed_changes(settings, load_config(find_model(settings.model_dir))))
    return SmartHaoAI(config)


def print_plan(
    settings: StageConfig, config: HaoAIConfig, source: BatchSource, store: TokenStore, log: Callable[[str], object] = print
) -> None:
    """What will run, before anything large is allocated."""
    train, data = settings.train, settings.data
    device = device_name(train.device)
    account = config.account()
    rows = train.batch_size * train.accumulation_steps
    log(f"{stage_name(type(settings))}: {describe_machine(device)}")
    log(account.table(data.max_length))
    held = f", {store.val.token_count:,} held out" if len(store.val) else ", none held out (too few documents)"
    log(f"  data       {store.train.token_count:,} tokens in {len(store.train):,} documents{held}")
    if train.max_steps:
        length = f"{train.max_steps:,} steps"
    elif train.max_minutes:
        length = f"{train.max_minutes:g} minutes"
    else:
        length = f"{train.epochs:g} epochs, {max(1, round(train.epochs * source.rows_per_epoch() / rows)):,} steps"
    log(
        f"  run        {length} of {rows} x {data.max_length} = {rows * data.max_length:,} tokens; "
        f"{train.optimizer}, peak rate {train.lr:g}, {train.schedule}"
    )
    need, there = account.training_bytes(train.batch_size, data.max_length), total_memory() if device == "cpu" else None
    log(f"  memory     about {need / 2**20:,.0f} MiB for the step" + (f" of {there / 2**20:,.0f} MiB" if there else ""))
    if settings.model_dir is not None and train.optimizer == "muon" and not (find_model(settings.model_dir) / RUN_FILE).is_file():
        log(
            f"  note       {settings.model_dir} was not trained here: muon at a rate of {train.lr:g} suits fresh models and can spoil a "
            "finished one; gentle: train.optimizer=adamw train.lr=5e-5"
        )
    if account.head_parameters > account.body_parameters:
        log(
            f"  note       the embedding of {config.vocab_size:,} tokens is larger than all layers together: a smaller vocabulary "
            f"(tokenizer.vocab_size) would leave more for the layers"
        )
    if there and need > there:
        log("  warning    this does not fit: lower train.batch_size (and raise train.accumulation_steps), or data.max_length")


def run_lm_stage(settings: StageConfig, kind: str, spec: Any, sample: Sampler, log: Callable[[str], object] = print) -> int:
    """Pretraining and SFT: next-token loss on a token store. Returns the exit status.

    kind is the store's ("pretrain" or "sft"), spec the files; sample shows what the model says.
    """
    open_out_dir(settings)
    tokenizer = load_tokenizer(settings, log)
    config = model_config(settings, tokenizer)
    store = open_store(spec, tokenizer, kind, settings.data, log, val_share=0.0 if settings.data.val_file else None)
    source = make_source(store, settings, tokenizer.pad_token_id, log=log)
    print_plan(settings, config, source, store, log)
    if settings.dry_run:
        log("  time       " + _estimate(settings, config, source))
        return 0
    model = make_model(settings, config)
    evaluate = _evaluation(settings, store, tokenizer, kind, log)
    clear_out_dir(settings)
    result = fit(settings, model, source, lm_loss, evaluate, tokenizer=tokenizer, sample=lambda m: sample(m, tokenizer), log=log)
    if result.interrupted:
        log(f"stopped at step {result.step} of {result.total_steps}; go on with --resume")
        return INTERRUPTED
    samples = sample(model.eval(), tokenizer)
    finish(settings, model, tokenizer, result, samples, store)
    log(
        f"{settings.out_dir}: {result.step:,} steps, {result.tokens:,} tokens in {format_minutes(result.seconds)}"
        + (
            f", held-out loss {result.last['val_loss']:.3f}, {result.last['val_bpb']:.3f} bits per byte"
            if "val_loss" in result.last
            else ""
        )
    )
    for prompt, answer in samples:
        log(f"  {prompt!r} -> {answer.strip()!r}")
    return 0


def _estimate(settings: StageConfig, config: HaoAIConfig, source: BatchSource) -> str:
    """Minutes of the run, from a few real steps of a model that is then thrown away."""
    import time

    from train.loop import BUDGET_RESERVE
    from train.runtime import choose_precision

    train = settings.train
    device = device_name(train.device)
    model = make_model(settings, config).to(device).train()
    batch = source.next_batch(1.0).to(device)

    def step() -> None:
        lm_loss(model, batch)[0].total.backward()
        model.zero_grad(set_to_none=True)

    precision = choose_precision(train, device, step)
    with precision.autocast():
        step()
        start = time.perf_counter()
        step()
        seconds = (time.perf_counter() - start) * train.accumulation_steps
    rate = f"{batch.real / (seconds / train.accumulation_steps):,.0f} tokens/s in {precision.name} ({precision.reason})"
    if train.max_minutes and not train.max_steps:
        return f"{train.max_minutes:g} minutes, about {int(train.max_minutes * 60 * BUDGET_RESERVE / seconds):,} steps at {rate}"
    steps = train.max_steps or max(1, round(train.epochs * source.rows_per_epoch() / (train.batch_size * train.accumulation_steps)))
    return f"about {format_minutes(steps * seconds)} at {rate}"


def _evaluation(
    settings: StageConfig, store: TokenStore, tokenizer: BPETokenizer, kind: str, log: Callable[[str], object]
) -> Evaluate | None:
    if settings.data.val_file:
        store = open_store(settings.data.val_file, tokenizer, kind, settings.data, log, val_share=0.0)
    split = "train" if settings.data.val_file else "val"
    if not len(getattr(store, split)):
        return None
    batches = evaluation_batches(make_source(store, settings, tokenizer.pad_token_id, split), settings.train.eval_tokens)
    lengths = torch.tensor(tokenizer.token_byte_lengths())
    device = device_name(settings.train.device)
    return lambda model: held_out_loss(model, batches, lengths, device)


def finish(
    settings: StageConfig, model: SmartHaoAI, tokenizer: BPETokenizer, result: FitResult, samples: list[tuple[str, str]], store: TokenStore
) -> None:
    """Write the finished checkpoint with its report and model card."""
    out = Path(settings.out_dir)
    facts = {
        "started from": settings.model_dir or "random weights",
        "parameters": f"{model.num_parameters():,}",
        "data": ", ".join(f"{s.path}" + (f" (x{s.weight:g})" if s.weight != 1 else "") for s in store.sources),
        "tokens seen": f"{result.tokens:,} in {result.step:,} steps",
        "precision": result.precision,
        "machine": describe_machine(device_name(settings.train.device)),
        "loss at the end": _rounded(result.last.get("loss")),
        "held-out loss": _rounded(result.last.get("val_loss")),
        "held-out bits per byte": _rounded(result.last.get("val_bpb")),
        "tokens per second": _rounded(result.last.get("tokens_per_second"), 0),
        "real tokens in the rows": _rounded(result.last.get("real_token_share"), 4),
        "peak memory, MiB": _rounded(result.last.get("peak_memory_mb"), 0),
    }
    write_report(out, f"{stage_name(type(settings))} run", facts, samples, result.seconds)
    atomic_write_text(out / "README.md", _model_card(settings, facts))
    model.save_pretrained(out, tokenizer)


def _model_card(settings: StageConfig, facts: dict[str, Any]) -> str:
    licences = sorted({str(p) for f in facts["data"].split(", ") for p in _sources_notes(Path(f.split(" (x")[0]))})
    lines = [
        "# A SmartHaoAI model",
        "",
        f"Stage: {stage_name(type(settings))}. A small language model trained from scratch on one machine; it makes mistakes,",
        "knows little, and is meant for study. Load it with `SmartHaoAI.from_pretrained`, `python chat.py --model`, or `transformers`.",
        "",
        "## Results and settings",
        "",
        *(f"- {name}: {value}" for name, value in facts.items() if value is not None),
        "- all settings: `run.yaml`; curves: `metrics.jsonl`, `loss.png`",
        "",
        "## Data and licences",
        "",
    ]
    lines += [f"- see `{path}`" for path in licences] or ["- the data named above; no licence note stands beside it"]
    return "\n".join(lines) + "\n"


def _sources_notes(file: Path) -> list[Path]:
    return [folder / "SOURCES.md" for folder in (file.parent, file.parent.parent) if (folder / "SOURCES.md").is_file()][:1]


def _rounded(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def resumable(settings: StageConfig) -> bool:
    """Whether out_dir holds a checkpoint to go on from."""
    return newest_checkpoint(Path(settings.out_dir)) is not None
