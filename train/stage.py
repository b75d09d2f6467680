"""What every stage does around the loop: output directory, tokenizer, model, plan, and the finished checkpoint.

A stage: begin(), its store and source, print_plan(), with --dry-run print_estimate(), make_model(), run_stage(). `run_lm_stage` is
the whole of it for what learns from next tokens.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import find_model, load_config, save_pretrained
from model.config import NEUTRAL_PARTS, HaoAIConfig, allowed_changes
from model.files import WriteError, atomic_write_text, writing
from model.lora import Adapter, inject_lora
from model.reward import RewardModel
from model.shapes import without_values
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train import parallel, sharding
from train.checkpoints import FOLDER, list_checkpoints, models_begun_from
from train.config import StageConfig, TokenizerConfig, TokenizerStageConfig, UsageError, read_yaml, stage_name
from train.data import BatchSource, evaluation_batches, make_source
from train.loop import Evaluate, FitResult, fit
from train.losses import lm_loss
from train.metrics import EVENTS_FILE, LossFunction, held_out_loss, read_jsonl, write_report
from train.planning import Prepare
from train.rehearsal import Rehearsal, rehearse
from train.runtime import describe_machine, device_name, format_minutes, seed_everything, total_memory
from train.speed import usual_positions
from train.store import TokenStore, open_store
from train.train_tokenizer import train_tokenizer

RUN_FILE = "run.yaml"  # beside every model that was trained here
DEFAULT_TOKENIZER = "weight/tokenizer"
INTERRUPTED = 130
NEWEST = "newest"
CHAT_MODELS = ("weight/sft", "weight/reasoning")
Log = Callable[[str], object]
Sampler = Callable[[SmartHaoAI, BPETokenizer], list[tuple[str, str]]]


def begin(settings: StageConfig, log: Log = print) -> tuple[BPETokenizer, HaoAIConfig]:
    """The beginning of every stage: where it starts from, an out_dir that may be written to, tokenizer and shape of the model."""
    if settings.model_dir == NEWEST:
        settings.model_dir = newest_model(settings)
        log(f"starting from {settings.model_dir}")
    open_out_dir(settings)
    with parallel.first_before_others():
        tokenizer = load_tokenizer(settings, log)
    return tokenizer, model_config(settings, tokenizer)


def newest_model(settings: StageConfig, field: str = "model_dir") -> str:
    """What `newest` stands for in a field of these settings: the newest chat model, on --resume the one that the run began with."""
    run = Path(settings.out_dir) / RUN_FILE
    begun = read_yaml(run).get(field) if settings.resume and run.is_file() else None
    return str(begun or newest_chat_model())


def newest_chat_model() -> str:
    """The finished chat model that was written last; weight/sft when there is none."""
    there = [folder for folder in CHAT_MODELS if (Path(folder) / "config.json").is_file()]
    return max(there, key=lambda folder: (Path(folder) / "config.json").stat().st_mtime, default=CHAT_MODELS[0])


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
        with writing(settings.out_dir):
            shutil.rmtree(settings.out_dir)


def load_tokenizer(settings: StageConfig, log: Log = print) -> BPETokenizer:
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
        added = [name for name in changes if name in NEUTRAL_PARTS]
        if added and settings.lora.r:
            raise UsageError(f"model.{min(added)}: an adapter's base stays as it is; train the new part first, without lora.r")
        try:
            config = replace(config, **changes)
        except ValueError as error:
            raise UsageError(f"model settings: {error}") from error
    elif settings.lora.r:
        raise UsageError(f"lora.r={settings.lora.r} needs model_dir: an adapter changes a finished model")
    else:
        shape = {"eos_token_id": tokenizer.eos_token_id, **settings.model_shape(), "vocab_size": tokenizer.vocab_size}
        shape["max_position_embeddings"] = max(shape.get("max_position_embeddings", 0), settings.data.max_length)
        try:
            config = HaoAIConfig(**shape)
        except ValueError as error:
            raise UsageError(f"model settings: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {settings.tokenizer_dir or settings.model_dir} has {tokenizer.vocab_size} tokens, the model "
            f"{settings.model_dir} only {config.vocab_size}: they do not belong together"
            + ("; leave tokenizer_dir out to use the model's own" if settings.tokenizer_dir else "")
        )
    if settings.data.max_length > config.max_position_embeddings:
        raise UsageError(f"data.max_length={settings.data.max_length} exceeds the checkpoint's context of {config.max_position_embeddings}")
    return config


def _allowed_changes(settings: StageConfig, config: HaoAIConfig) -> dict[str, Any]:
    """What is set by name and may differ from the checkpoint's `config`: parts that start without an effect, and settings of training."""
    return allowed_changes(config, {name: value for name, value in settings.model_shape().items() if name in settings.model})


def make_model(settings: StageConfig, config: HaoAIConfig, make: type[SmartHaoAI] = SmartHaoAI) -> SmartHaoAI:
    """A new model of class `make` with seeded weights, or the checkpoint's."""
    seed_everything(settings.train.seed)
    if settings.model_dir is None:
        return make(config)
    model = make.from_pretrained(settings.model_dir, **_allowed_changes(settings, load_config(find_model(settings.model_dir))))
    if settings.lora.r:
        inject_lora(model, settings.lora, Path(settings.model_dir).as_posix())
    return model


def planned_adapter(settings: StageConfig, config: HaoAIConfig) -> Adapter | None:
    """The adapter that `make_model` will train, without memory; None without. ValueError for targets that the model does not have."""
    if not settings.lora.r:
        return None
    with without_values():
        return inject_lora(SmartHaoAI(config), settings.lora)


def print_plan(
    settings: StageConfig, config: HaoAIConfig, source: BatchSource, summary: str, log: Log = print, *, answer: int = 0, frozen: int = 0
) -> None:
    """What will run, before anything large is allocated. summary: the data in words.

    answer: where train.batch_size counts answers instead of rows, the tokens of one with its prompt. frozen: parameters of models in
    memory beside the one that learns.
    """
    train, data = settings.train, settings.data
    device = device_name(train.device)
    account, adapter = config.account(), planned_adapter(settings, config)
    rows, each = train.batch_size * train.accumulation_steps, answer or data.max_length
    log(f"{stage_name(type(settings))}: {describe_machine(device)}")
    log(account.table(data.max_length))
    log(f"  data       {summary}")
    if train.max_steps:
        length = f"{train.max_steps:,} steps"
    elif train.max_minutes:
        length = f"{train.max_minutes:g} minutes"
    else:
        length = f"{train.epochs:g} epochs, {max(1, round(train.epochs * source.rows_per_epoch() / rows)):,} steps"
    log(
        f"  run        {length} of {rows} x {each} = {rows * each:,} tokens; "
        f"{train.optimizer if adapter is None else 'adamw'}, peak rate {train.lr:g}, {train.schedule}"
    )
    learning = 0 if adapter is None else adapter.num_parameters()
    if adapter is not None:
        names = " ".join(dict.fromkeys(name for factors in adapter.layers.values() for name in factors))
        kind = "DoRA" if settings.lora.dora else "LoRA"
        log(
            f"  adapter    {kind} of rank {settings.lora.r} on {names}: {learning:,} parameters learn, "
            f"{learning / account.parameters:.1%} of the model's, which is frozen"
        )
    at_once = -(-train.batch_size * each // data.max_length)  # rows of a pass
    if limit := usual_positions(train.micro_batch, data.max_length, device, bool(getattr(source, "group", 0))):
        at_once = min(at_once, max(1, limit // data.max_length))
    again = train.activation_checkpointing
    need = account.training_bytes(at_once, data.max_length, adapter=learning, activation_checkpointing=again) + 4 * frozen
    there = total_memory() if device == "cpu" else None
    log(f"  memory     about {need / 2**20:,.0f} MiB for the step, by its shape" + (f" ({there / 2**20:,.0f} MiB here)" if there else ""))
    foreign = settings.model_dir is not None and not (find_model(settings.model_dir) / RUN_FILE).is_file()
    if foreign and train.optimizer == "muon" and adapter is None:
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


def run_lm_stage(settings: StageConfig, kind: str, spec: Any, sample: Sampler, log: Log = print) -> int:
    """Pretraining and SFT: next-token loss on a token store. Returns the exit status.

    kind is the store's ("pretrain" or "sft"), spec the files; sample shows what the model says.
    """
    tokenizer, config = begin(settings, log)
    store = open_store(spec, tokenizer, kind, settings.data, log, val_share=0.0 if settings.data.val_file else None)
    source = make_source(store, settings, tokenizer.pad_token_id, log=log)
    print_plan(settings, config, source, store.summary(), log)
    if settings.dry_run:
        print_estimate(settings, make_model(settings, config), source, lm_loss, tokenizer, log)
        return 0
    model = make_model(settings, config)
    evaluate = next_token_evaluation(settings, store, tokenizer, log)
    return run_stage(settings, tokenizer, model, source, lm_loss, evaluate, sample, data=store.origin(), log=log)


def next_token_evaluation(settings: StageConfig, store: TokenStore, tokenizer: BPETokenizer, log: Log) -> Evaluate | None:
    """Loss and bits per byte of the held-out data; None when there is none."""
    held_out = held_out_store(settings, store, tokenizer, log)
    if held_out is None:
        return None
    source = make_source(held_out[0], settings, tokenizer.pad_token_id, held_out[1])
    batches = evaluation_batches(source, settings.train.eval_tokens)
    lengths = torch.tensor(tokenizer.token_byte_lengths())
    device = device_name(settings.train.device)
    return lambda model: held_out_loss(model, batches, lengths, device)


def run_stage(
    settings: StageConfig,
    tokenizer: BPETokenizer,
    model: SmartHaoAI,
    source: BatchSource,
    loss_fn: LossFunction,
    evaluate: Evaluate | None = None,
    sample: Sampler | None = None,
    *,
    data: str,
    prepare: Prepare | None = None,
    facts: Callable[[], dict[str, Any]] | None = None,
    log: Log = print,
) -> int:
    """From the first step to the finished checkpoint in out_dir. Returns the exit status.

    data: the files in words, for the report. prepare: as for `fit`. facts: what else the report tells, asked at the end.
    """
    parallel.barrier()  # no other process looks into out_dir any more
    show = None if sample is None else lambda m: sample(m, tokenizer)
    with telling_how_to_go_on(settings):
        with parallel.first_before_others():
            if parallel.is_first():
                clear_out_dir(settings)
        result = fit(
            settings,
            model,
            source,
            loss_fn,
            evaluate,
            tokenizer=tokenizer,
            sample=show,
            prepare=prepare,
            begun_from=models_begun_from(settings) if parallel.is_first() else {},
            log=log,
        )
    if result.interrupted:
        log(f"stopped at step {result.step} of {result.total_steps}; go on with --resume")
        return INTERRUPTED
    model.eval()
    state = sharding.whole_state(model)
    with sharding.whole(model):
        if parallel.is_first():
            with parallel.alone():
                samples = [] if sample is None else sample(model, tokenizer)
                with telling_how_to_go_on(settings):
                    finish(settings, model, tokenizer, result, samples, data, {} if facts is None else facts(), state)
                _say_result(settings, result, samples, log)
        parallel.barrier()
    return 0


def _say_result(settings: StageConfig, result: FitResult, samples: list[tuple[str, str]], log: Log) -> None:
    texts = {
        "val_loss": "held-out loss {:.3f}",
        "val_bpb": "{:.3f} bits per byte",
        "val_accuracy": "held-out accuracy {:.3f}",
        "val_reward": "held-out reward {:.3f}",
        "val_exact": "held-out exact {:.3f}",
    }
    known = [text.format(result.last[name]) for name, text in texts.items() if name in result.last]
    done = f"{result.step:,} steps, {result.tokens:,} tokens in {format_minutes(result.seconds)}"
    log(f"{settings.out_dir}: " + ", ".join([done, *known]))
    for prompt, answer in samples:
        log(f"  {prompt!r} -> {answer.strip()!r}")


@contextmanager
def telling_how_to_go_on(settings: StageConfig) -> Iterator[None]:
    """A WriteError inside also says from where the run can be resumed."""
    try:
        yield
    except WriteError as error:
        saved = list_checkpoints(Path(settings.out_dir))
        place = f"it goes on from {saved[-1]}" if saved else "it begins anew, nothing was saved yet"
        raise OSError(f"{error} (a stage with --resume): {place}") from error


def held_out_store(settings: StageConfig, store: TokenStore, tokenizer: BPETokenizer, log: Log = print) -> tuple[TokenStore, str] | None:
    """The store of the held-out data and its split: data.val_file's, else what the training data kept back; None when that is none."""
    split = "val"
    if settings.data.val_file:
        store, split = open_store(settings.data.val_file, tokenizer, store.kind, settings.data, log, val_share=0.0), "train"
    return (store, split) if len(getattr(store, split)) else None


def print_estimate(
    settings: StageConfig,
    model: SmartHaoAI,
    source: BatchSource,
    loss_fn: LossFunction,
    tokenizer: BPETokenizer,
    log: Log = print,
    *,
    prepare: Prepare | None = None,
) -> None:
    """--dry-run: memory and time of the run, from its plan and its first steps; the model is of no more use then."""
    found = rehearse(settings, model, source, loss_fn, tokenizer=tokenizer, prepare=prepare, log=log)
    print_peak(found, log)
    steps, rate = found.state.total_steps, f"{found.tokens / found.seconds:,.0f} tokens/s in {found.state.precision}"
    rate += f" ({found.state.precision_reason})"
    if settings.train.max_minutes and not settings.train.max_steps:
        log(f"  time       {settings.train.max_minutes:g} minutes, about {steps:,} steps at {rate}")
    else:
        log(f"  time       about {format_minutes(steps * found.seconds)} at {rate}")


def print_peak(found: Rehearsal, log: Log) -> None:
    """The memory that a dry run has measured."""
    if found.peak_memory_mb is not None:
        log(f"  peak       {found.peak_memory_mb:,.0f} MiB of memory, measured: two steps, an evaluation and a plot")


def finish(
    settings: StageConfig,
    model: SmartHaoAI,
    tokenizer: BPETokenizer,
    result: FitResult,
    samples: list[tuple[str, str]],
    data: str,
    more: dict[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the finished checkpoint with its report and model card; the report last: by it a finished run is known. state: as for
    `save_pretrained`."""
    out = Path(settings.out_dir)
    facts = {
        "started from": settings.model_dir or "random weights",
        "parameters": f"{model.num_parameters():,}",
        "of these trained, an adapter": None if model.adapter is None else f"{model.adapter.num_parameters():,}",
        "data": data,
        "tokens seen": f"{result.tokens:,} in {result.step:,} steps",
        "precision": result.precision,
        "processes": f"{result.processes}" if result.processes > 1 else None,
        "machine": describe_machine(device_name(settings.train.device)),
        "loss at the end": _rounded(result.last.get("loss")),
        "held-out loss": _rounded(result.last.get("val_loss")),
        "held-out bits per byte": _rounded(result.last.get("val_bpb")),
        "held-out accuracy": _rounded(result.last.get("val_accuracy")),
        "tokens per second": _rounded(result.last.get("tokens_per_second"), 0),
        "real tokens in the rows": _rounded(result.last.get("real_token_share"), 4),
        "peak memory, MiB": _rounded(result.last.get("peak_memory_mb"), 0),
        "what happened on the way (events.jsonl)": told_events(out),
        **more,
    }
    save_pretrained(model, out, tokenizer, state=state)
    loader = "RewardModel" if isinstance(model, RewardModel) else "SmartHaoAI"
    atomic_write_text(out / "README.md", _model_card(settings, facts, loader))
    write_report(out, f"{stage_name(type(settings))} run", facts, samples, result.seconds)


def told_events(out_dir: Path) -> str | None:
    """How often what happened in the run, samples left out; None when nothing did."""
    counts = Counter(row["event"] for row in read_jsonl(out_dir / EVENTS_FILE) if row["event"] != "sample")
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or None


def _model_card(settings: StageConfig, facts: dict[str, Any], loader: str) -> str:
    licences = sorted({str(p) for f in facts["data"].split(", ") for p in _sources_notes(Path(f.split(" (x")[0]))})
    lines = [
        "# A SmartHaoAI model",
        "",
        f"Stage: {stage_name(type(settings))}. A small language model trained from scratch on one machine; it makes mistakes,",
        f"knows little, and is meant for study. Load it with `{loader}.from_pretrained`"
        + (", `python chat.py --model`, or `transformers`." if loader == "SmartHaoAI" else " or `transformers`."),
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
