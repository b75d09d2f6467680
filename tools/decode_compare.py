"""How fast is decoding here and in transformers? The same model, the same prompts, greedy, in turns.

    python -m tools.decode_compare MODEL [--batches 1 8 32] [--prompt-tokens 64] [--new-tokens 64] [--rounds 5] [--threads 1] [--json]

Per batch size: milliseconds to the first token and new tokens a second, medians over the rounds (smallest to largest): of Engine.generate,
of as many requests to a Batcher, and of transformers.generate. Every round measures all of them, so that whatever else the machine does,
it does to all; "against transformers" is the median of the rounds' quotients. A first round is not counted. On a machine that is busy with
other things, --threads 1 --cpu-time counts the time that the processor spends on this alone. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inference.batching import Batcher
from inference.engine import Engine
from inference.sampling import SamplingSettings
from model.checkpoint import find_model
from tools.evaluate import load
from tools.parity import import_transformers
from tools.reasoning_tasks.measure import middle
from train.config import UsageError
from train.runtime import describe_machine, device_name, run_main, set_threads, timed

NAMES = ("engine", "batcher", "transformers")
Generate = Callable[[int], list[list[int]]]  # number of new tokens -> the new ids of every prompt


def with_engine(engine: Engine, prompts: list[list[int]]) -> Generate:
    def generate(count: int) -> list[list[int]]:
        return [samples[0].ids for samples in engine.generate(prompts, _greedy(count))]

    return generate


def with_batcher(engine: Engine, prompts: list[list[int]]) -> Generate:
    def generate(count: int) -> list[list[int]]:
        # As a whole batch, and without what was kept of the round before.
        batcher = Batcher(engine, len(prompts), prefill_block=sum(map(len, prompts)), kept_prefixes=0)
        requests = [batcher.submit(prompt, _greedy(count)) for prompt in prompts]
        return [request.result()[0].ids for request in requests]

    return generate


def with_transformers(model: Any, prompts: list[list[int]]) -> Generate:
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)

    def generate(count: int) -> list[list[int]]:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[:, ids.shape[1] :].tolist()

    return generate


def _greedy(count: int) -> SamplingSettings:
    return SamplingSettings(temperature=0.0, max_new_tokens=count, eos_token_id=[])


def measure(
    ways: Sequence[Generate], new_tokens: int, rows: int, rounds: int, device: str, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """For each way, with median, min and max: `first_ms`, the time to the first token; `tokens_per_second`; `against_last`, these tokens
    over those of the last way in the same round."""
    first: list[list[float]] = [[] for _ in ways]
    speed: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for place, generate in enumerate(ways):
            begin = timed(lambda way=generate: way(1), device, clock)  # type: ignore[misc]
            whole = timed(lambda way=generate: way(new_tokens), device, clock)  # type: ignore[misc]
            if number:
                first[place].append(1000 * begin)
                speed[place].append(rows * new_tokens / whole)
    against = [[mine / last for mine, last in zip(each, speed[-1], strict=True)] for each in speed]
    names = ("first_ms", "tokens_per_second", "against_last")
    return [dict(zip(names, map(middle, found), strict=True)) for found in zip(first, speed, against, strict=True)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'batch':>5}  {'':<12}  {'first token, ms':>24}  {'tokens/s':>26}  {'against transformers':>20}  same ids"]
    for row in rows:
        for name in NAMES:
            first, speed = row[name]["first_ms"], row[name]["tokens_per_second"]
            lines.append(
                f"{row['batch'] if name == NAMES[0] else '':>5}  {name:<12}  "
                f"{first['median']:8.1f} ({first['min']:.1f}-{first['max']:.1f})".ljust(45)
                + f"  {speed['median']:8.0f} ({speed['min']:.0f}-{speed['max']:.0f})".ljust(28)
                + f"  {row[name]['against_last']['median']:19.2f}x  {row[name]['same_ids']}/{row['batch']}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.decode_compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="checkpoint folder that transformers reads, too")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of this process in place of time by the clock")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(argv)
    if min(*options.batches, options.prompt_tokens, options.new_tokens, options.rounds) < 1:
        raise UsageError("--batches, --prompt-tokens, --new-tokens and --rounds must be at least 1")
    transformers = import_transformers()
    set_threads(options.threads)
    device = device_name(options.device)
    if options.cpu_time and device != "cpu":
        raise UsageError(f"--cpu-time says nothing about {device}: leave it out, or add --device cpu")
    clock = time.process_time if options.cpu_time else time.perf_counter
    model, tokenizer = load(options.model, device)
    engine = Engine(model, tokenizer)
    if options.prompt_tokens + options.new_tokens > engine.context:
        raise UsageError(f"--prompt-tokens and --new-tokens add up to more than the model's context of {engine.context}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(find_model(options.model), dtype=torch.float32).to(device).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in options.batches:
        prompts = torch.randint(engine.vocab_size, (batch, options.prompt_tokens), generator=generator).tolist()
        ways = [with_engine(engine, prompts), with_batcher(engine, prompts), with_transformers(theirs, prompts)]
        ids = [way(options.new_tokens) for way in ways]
        found = measure(ways, options.new_tokens, batch, options.rounds, device, clock)
        row: dict[str, Any] = {"batch": batch}
        for name, numbers, new in zip(NAMES, found, ids, strict=True):
            same = sum(mine == other for mine, other in zip(new, ids[-1], strict=True))
            row[name] = {**numbers, "same_ids": same}
        rows.append(row)
    machine = describe_machine(device)
    if options.json:
        print(json.dumps({"machine": machine, "model": str(options.model), "cpu_time": options.cpu_time, "rows": rows}, ensure_ascii=False))
    else:
        what = "processor time" if options.cpu_time else "time by the clock"
        print(f"{machine}; {options.prompt_tokens} prompt tokens, {options.new_tokens} new ones, {options.rounds} rounds in turns, {what}")
        print(table(rows))


if __name__ == "__main__":
    run_main(main)  # type: ignore[arg-type]
