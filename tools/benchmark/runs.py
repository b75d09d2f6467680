"""One function per `python -m tools.bench WHAT`: its rows, their turns, and what they are compared with."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import find_model, load_config
from model.config import HaoAIConfig
from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from tools.benchmark import decoding, profiling, starting, training
from tools.benchmark import gpu as gpu_rows
from tools.benchmark.machine import Ceilings
from tools.benchmark.measure import Measured, Row, Turn, ratios, run_once, summary, take_turns
from tools.benchmark.plain import PlainSettings
from tools.benchmark.quality import Task, make_tokenizer, ours, plain
from tools.benchmark.quality import text as quality_text
from tools.benchmark.report import Result, finish
from tools.benchmark.shapes import Workplace, parse_shape, prepare, with_model_words
from train.config import UsageError
from train.runtime import describe_machine

TRAIN_CONTEXT = 512
SPARE = 8  # tokens of context beyond what is asked for
PRODUCT, READING = "the bf16 product", "reading memory"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def size_of(name: str, config: HaoAIConfig) -> str:
    return f"{name}, {config.account().parameters / 1e6:.1f}M parameters"


ALIKE = {
    "fp32": ["transformers fp32"],
    "bf16": ["transformers fp32", "transformers bf16", "llama.cpp F16"],
    "int8": ["ours bf16", "transformers bf16", "llama.cpp Q8_0"],
    "int4": ["ours bf16", "transformers bf16", "llama.cpp Q4_0"],
}
"""Precision of ours -> what an answer of it is compared with."""


def like_with_like(found: Sequence[Measured]) -> dict[str, list[str]]:
    return {row.name: ALIKE[row.facts["precision"]] for row in found if row.name.startswith("ours")}


def mine_and_others(found: Sequence[Measured]) -> dict[str, list[str]]:
    """Every row of ours with all that it is compared with: the peers, and our first row."""
    names = list(dict.fromkeys(row.name for row in found))
    ours = [name for name in names if name.startswith("ours")]
    peers = [name for name in names if name not in ours]
    return {name: [*ours[:1], *peers] for name in ours}


@dataclass
class Session:
    """What all rows of a command share: options, folder, ceilings; and what has been found so far."""

    options: argparse.Namespace
    folder: Path
    isolated: bool
    device: str = "cpu"
    found: list[Measured] = field(default_factory=list)
    shares: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ceilings = Ceilings(self.device, small=not self.isolated)

    def place(self, config: HaoAIConfig, length: int = 0) -> Workplace:
        """A new folder with a model of this shape."""
        return prepare(self.folder / str(len(list(self.folder.iterdir()))), config, length=length)

    def expected(self, reference: Callable[[Turn], None]) -> dict[str, Any]:
        return run_once(Row("reference", reference), self.options.threads, isolated=self.isolated)

    def take_turns(self, rows: Sequence[Row]) -> list[Measured]:
        found = take_turns(
            rows,
            self.options.rounds,
            threads=self.options.threads,
            device=self.device,
            isolated=self.isolated,
            between=self.ceilings.measure,
            log=say,
        )
        self.found += found
        return found

    def train(self, rows: Sequence[tuple[Row, Workplace]]) -> list[Measured]:
        """Training rows and what each started from."""
        places = {(row.group, row.name): place for row, place in rows}
        found = self.take_turns([row for row, _ in rows])
        known: dict[tuple[Workplace, str], dict[str, Any]] = {}
        for row in found:
            place, batch = places[row.group, row.name], row.facts.pop("batch")
            if (place, batch) not in known:
                known[place, batch] = self.expected(partial(training.reference, place, batch, self.device))
            training.add_checks([row], known[place, batch])
            flops = training.flops_per_token(place)
            self.shares[row.group, row.name] = row.rate["median"] * flops / self.ceilings.product_flops
        return found

    def answer(self, rows: Sequence[tuple[Row, decoding.DecodeSetting]]) -> list[Measured]:
        """Decode and prefill rows and their settings."""
        settings = {(row.group, row.name): setting for row, setting in rows}
        found = self.take_turns([row for row, _ in rows])
        known = {place: self.expected(partial(decoding.reference, place))["logits"] for place in {setting.place for _, setting in rows}}
        for row in found:
            setting = settings[row.group, row.name]
            decoding.add_checks([row], known[setting.place])
            self.shares[row.group, row.name] = decoding.share(setting, row, self.ceilings)
        return found

    def result(self, what: str, pairs: dict[str, list[str]], share_of: str) -> Result:
        """The result of everything found."""
        notes = [f"{row.name}: {text}" for row in self.found for text in row.facts.pop("said", [])]
        machine = describe_machine(self.device)
        return Result(what, machine, self.found, self.ceilings, ratios(self.found, pairs), self.shares, share_of, notes)


def train(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    config, session = parse_shape(options.shape, TRAIN_CONTEXT), Session(options, folder, isolated)
    usual = training.TrainSetting(session.place(config), options.seconds, options.batch, options.row_length)
    rows = []
    for variant in ("", *options.variants):
        chosen = [*options.own, *(variant.split(",") if variant else [])]
        shape = [word for word in chosen if word.startswith("model.")]
        setting = replace(usual, place=session.place(with_model_words(config, shape))) if shape else usual
        rest = [word for word in chosen if word not in shape]
        rows.append((training.our_row(setting, f"ours {variant}".strip(), rest), setting.place))
    rows += [(row, usual.place) for row in training.peer_rows(usual, options.against)]
    found = session.train(rows)
    return finish([session.result(f"training, {size_of(options.shape, config)}", mine_and_others(found), PRODUCT)], words, options.json)


def decode(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    what = f"decoding, prompt {options.prompt}, {options.new} new tokens"
    return _answers(options, folder, isolated, words, [(batch, options.prompt, options.new) for batch in options.batches], what, READING)


def prefill(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    return _answers(options, folder, isolated, words, [(1, prompt, 1) for prompt in options.prompts], "prompts", PRODUCT)


def _answers(
    options: argparse.Namespace,
    folder: Path,
    isolated: bool,
    words: Sequence[str],
    sizes: Sequence[tuple[int, int, int]],
    what: str,
    share_of: str,
) -> int:
    """Rows for several (batch, prompt, new tokens), one group after the other."""
    longest = max(prompt + new for _, prompt, new in sizes)
    session = Session(options, folder, isolated)
    if options.model:
        place = Workplace(folder, find_model(options.model))
        config = load_config(place.model)
        if longest > config.max_position_embeddings:
            raise UsageError(
                f"prompt and new tokens add up to {longest}, the context of {options.model} is {config.max_position_embeddings}"
            )
    else:
        config = parse_shape(options.shape, longest + SPARE)
        place = session.place(config)
    for size in sizes:
        setting = decoding.DecodeSetting(place, *size, threads=options.threads, seconds=options.seconds)
        ours = [decoding.our_row(setting, precision) for precision in options.precision]
        ours += [decoding.batcher_row(setting, options.precision[0])] if options.batcher else []
        if options.compiled and setting.batch == 1 and setting.new > 1:
            ours += [decoding.compiled_row(setting, precision) for precision in options.precision if precision != "int4"]
        session.answer([(row, setting) for row in [*ours, *decoding.peer_rows(setting, options.against)]])
    what = f"{what}, {size_of(options.model or options.shape, config)}"
    return finish([session.result(what, like_with_like(session.found), share_of)], words, options.json)


def experts(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    """Training, then decoding after a context: the model as it is, with experts that cost a token the same, and with windows."""
    longest = max(options.contexts)
    config = parse_shape(options.shape, longest + SPARE)
    kinds = {
        "dense, full attention": config,
        "8 experts, 2 used": replace(config, n_expert=8, n_expert_per_token=2),
        "windows of 512 in 3 of 4 layers": replace(config, use_sliding_window=True, window_size=512, window_pattern="SSSL"),
        "windows of 512": replace(config, use_sliding_window=True, window_size=512, window_pattern="S"),
    }
    learning, answering = Session(options, folder, isolated), Session(options, folder, isolated)
    for context in options.contexts:
        places = {name: learning.place(kind, context) for name, kind in kinds.items()}
        length = (f"data.max_length={context}", f"train.batch_size={max(1, longest // context)}", *options.own)
        group = f"rows of {context}"
        rows = []
        for name, place in places.items():
            setting = training.TrainSetting(place, options.seconds)
            rows.append((training.our_row(setting, name, length, group), place))
        learning.train(rows)
        new = min(64, context // 2)
        settings = {
            name: decoding.DecodeSetting(place, 1, context - new, new, threads=options.threads, seconds=options.seconds)
            for name, place in places.items()
        }
        answering.answer([(decoding.our_row(one, "fp32", name, f"context {context}"), one) for name, one in settings.items()])
    names = list(kinds)
    pairs = {name: names[:1] for name in names[1:]}
    results = [
        learning.result(f"training, {size_of(options.shape, config)}", pairs, PRODUCT),
        answering.result(f"decoding, batch 1, {size_of(options.shape, config)}", pairs, READING),
    ]
    return finish(results, words, options.json)


def quality(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    out = Path(options.out)
    tokenizer = Path(options.tokenizer) if options.tokenizer else make_tokenizer(options.train, out / "tokenizer", 6400)
    task = Task(options.train, list(map(Path, options.val)), tokenizer, out, options.context, options.limit_kb * 1000, options.threads)
    task.open()  # tokenised once for all
    rows = [ours(task, f"ours, {minutes:g} minutes", minutes, options.own) for minutes in options.minutes]
    for variant in options.variants:
        rows.append(ours(task, f"ours {variant}", options.minutes[0], [*options.own, *variant.split(",")]))
    if "plain" in options.against:
        vocabulary = BPETokenizer.from_pretrained(tokenizer).vocab_size
        config = replace(parse_shape(options.shape, max(options.context, PlainSettings.row_length)), vocab_size=vocabulary)
        rows.append(plain(task, config, options.peer_minutes or options.minutes[0]))
    print(f"{describe_machine('cpu')}; {time.strftime('%Y-%m-%d %H:%M')}\n  {shlex.join(['python', '-m', 'tools.bench', *words])}\n")
    print(quality_text(rows))
    if options.json:
        found = {"machine": describe_machine("cpu"), "rows": [asdict(row) for row in rows]}
        atomic_write_text(Path(options.json), json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return 0


def start(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    """Programs from the command to their end; what each import takes."""
    model = Path(options.model) if options.model else prepare(folder / "start", parse_shape(options.shape, TRAIN_CONTEXT)).model
    programs = starting.measure(model, options.rounds, options.only)
    print(f"start; {describe_machine('cpu')}\n\n{starting.text(programs)}")
    imports = {p.name: starting.slowest_imports(p, options.modules) for p in programs if p.name in ("import SmartHaoAI", "chat.py --help")}
    for name, modules in imports.items():
        print(f"\n{name}: ms with all that it imports (itself)")
        print("\n".join(f"  {whole:8.0f} ({own:.0f})  {module}" for module, own, whole in modules))
    if options.json:
        rows = [{"name": p.name, "seconds": summary(p.seconds)} for p in programs]
        data = {"what": "start", "machine": describe_machine("cpu"), "rows": rows, "imports": imports}
        atomic_write_text(Path(options.json), json.dumps(data, indent=1) + "\n")
    return 0


def profile(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    """Where a training step and decoding steps spend their time."""
    config = parse_shape(options.shape, TRAIN_CONTEXT)
    place = prepare(folder / "profile", config)
    kinds = {"training": partial(profiling.training_costs, training.TrainSetting(place), options.own, options.steps)}
    for batch in options.batches:
        setting = decoding.DecodeSetting(place, batch, prompt=8, new=min(128, TRAIN_CONTEXT // 2), threads=options.threads)
        for precision in options.precision:
            kinds[f"decoding, batch {batch}, {precision}"] = partial(profiling.decoding_costs, setting, precision)
    found = {name: work() for name, work in kinds.items()}
    print(f"profile, {size_of(options.shape, config)}; {describe_machine('cpu')}; {time.strftime('%Y-%m-%d %H:%M')}")
    for name, costs in found.items():
        print("\n" + profiling.text(name, costs, options.operations))
    if options.json:
        data = {"what": "profile", "machine": describe_machine("cpu"), "rows": {name: asdict(costs) for name, costs in found.items()}}
        atomic_write_text(Path(options.json), json.dumps(data, indent=1) + "\n")
    return 0


def gpu(options: argparse.Namespace, folder: Path, isolated: bool, words: Sequence[str]) -> int:
    """Training of each shape and decoding of the first, in JSON and Markdown under --out. 1 where the device is not there."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("this machine has no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    out, results = Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        config = parse_shape(shape, options.length)
        session = Session(options, folder, isolated, options.device)
        place = session.place(config)
        setting = training.TrainSetting(place, options.seconds, device=options.device)
        for name, row_words in gpu_rows.variants(options.batch, options.length).items():
            # One after the other: two of them may not fit beside each other.
            session.train([(training.our_row(setting, name, row_words), place)])
        plan = gpu_rows.planned_mb(config, options.batch, options.length)
        result = session.result(f"training, {size_of(shape, config)}, {options.batch} x {options.length}", {}, PRODUCT)
        result.notes += [f"{row.name}: peak of the plan {plan:,.0f} MiB, measured {row.peak_memory_mb or 0:,.0f}" for row in session.found]
        results.append(result)
    config = parse_shape(options.shapes[0], options.length)
    session = Session(options, folder, isolated, options.device)
    place = session.place(config)
    for batch in (1, 8, 32):
        size = decoding.DecodeSetting(place, batch, 64, min(128, options.length - 64), options.device, seconds=options.seconds)
        session.answer([(decoding.our_row(size, "bf16"), size), *((row, size) for row in decoding.peer_rows(size, ["transformers"]))])
    results.append(session.result(f"decoding, {size_of(options.shapes[0], config)}", like_with_like(session.found), READING))
    status = finish(results, words, options.json or str(out / "gpu.json"))
    tables = [f"## {result.what}\n\n{result.machine}, {result.when}: `{result.command}`\n\n{result.markdown()}\n" for result in results]
    atomic_write_text(out / "gpu.md", "\n".join(tables))
    say(f"written: {out / 'gpu.md'}, {options.json or out / 'gpu.json'}")
    return status


RUNS: dict[str, Callable[[argparse.Namespace, Path, bool, Sequence[str]], int]] = {
    "train": train,
    "decode": decode,
    "prefill": prefill,
    "experts": experts,
    "quality": quality,
    "start": start,
    "profile": profile,
    "gpu": gpu,
}
