"""The rows of `tools.bench decode` and `prefill`: the engine, transformers, and llama.cpp on the same model, greedy, the same prompts.

A turn answers all prompts once with one new token and once with all of them: what lies between is decoding, the first is the prompt.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.batching import Batcher
from inference.engine import Engine
from inference.quantized import quantize
from inference.sampling import SamplingSettings
from model.checkpoint import load_config
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.benchmark.machine import Ceilings
from tools.benchmark.measure import Check, Measured, Missing, Row, Turn
from tools.benchmark.shapes import Workplace, random_ids
from train.runtime import DTYPES, timed

CHECK_PROMPT, CHECK_STEPS = 24, 4
# Norm of the difference over the norm of the reference, of logits less their mean. Weights of random numbers are the hardest to round.
TOLERANCES = {"fp32": 1e-3, "F16": 1e-2, "bf16": 4e-2, "int8": 8e-2, "Q8_0": 8e-2, "int4": 0.4, "Q4_0": 0.4}
# Bytes of a weight as it is read in each step: blocks of 32 have a scale of two bytes in GGUF, scale and zero of two each in our INT4.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "F16": 2.0, "int8": 1.0, "int4": 20 / 32, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
LLAMA_TYPES = {"F16": "f16", "Q8_0": "q8_0", "Q4_0": "q4_0"}


@dataclass(frozen=True)
class DecodeSetting:
    """What all rows of one group share."""

    place: Workplace
    batch: int = 1
    prompt: int = 64
    new: int = 128
    """1: only the prompt is measured."""
    device: str = "cpu"
    threads: int = 0
    seconds: float = 1.0
    """A turn ends with the answer after which it has lasted this long."""

    @property
    def group(self) -> str:
        return f"batch {self.batch}" if self.new > 1 else f"prompt {self.prompt}"

    def prompts(self) -> list[list[int]]:
        """The same for every program; different from each other from the first token, so that nothing is shared."""
        tokenizer = BPETokenizer.from_pretrained(self.place.model)
        draw = np.random.default_rng(self.batch * 10_000 + self.prompt)
        return [random_ids(tokenizer, self.prompt, draw) for _ in range(self.batch)]


def our_row(setting: DecodeSetting, precision: str, name: str = "", group: str = "") -> Row:
    return Row(name or f"ours {precision}", partial(ours, setting, precision), group or setting.group)


def compiled_row(setting: DecodeSetting, precision: str) -> Row:
    return Row(f"ours {precision}, compiled", partial(ours, setting, precision, compiled=True), setting.group)


def batcher_row(setting: DecodeSetting, precision: str) -> Row:
    return Row(f"ours {precision}, batcher", partial(ours, setting, precision, batched=True), setting.group)


def peer_rows(setting: DecodeSetting, against: Sequence[str]) -> list[Row]:
    rows = []
    if "transformers" in against:
        rows += [Row(f"transformers {name}", partial(transformers, setting, name), setting.group) for name in ("fp32", "bf16")]
    if "llama.cpp" in against:
        rows += [Row(f"llama.cpp {name}", partial(llama_cpp, setting, name), setting.group) for name in LLAMA_TYPES]
    return rows


Answer = Callable[[list[list[int]], int], Any]  # (prompts, number of new tokens)


def _turns(setting: DecodeSetting, answer: Answer, turn: Turn) -> None:
    prompts = setting.prompts()
    while True:
        start = time.perf_counter()
        firsts: list[float] = []
        wholes: list[float] = []
        while not firsts or time.perf_counter() - start < setting.seconds:
            firsts.append(timed(lambda: answer(prompts, 1), setting.device))
            if setting.new > 1:
                wholes.append(timed(lambda: answer(prompts, setting.new), setting.device))
        _report(setting, turn, firsts, [whole - first for whole, first in zip(wholes, firsts, strict=False)])


def _report(setting: DecodeSetting, turn: Turn, firsts: list[float], rests: list[float]) -> None:
    """The end of a turn of so many answers: seconds to the first token of each, and from there to the last."""
    first_ms = 1000 * sum(firsts) / len(firsts)
    if setting.new == 1:
        turn({"units": len(firsts) * setting.batch * setting.prompt, "seconds": sum(firsts), "first_ms": first_ms})
    else:
        turn({"units": len(rests) * setting.batch * (setting.new - 1), "seconds": max(sum(rests), 1e-9), "first_ms": first_ms})


# ------------------------------------------------------------------------------------------------ ours


def ours(setting: DecodeSetting, precision: str, turn: Turn, batched: bool = False, compiled: bool = False) -> None:
    """Engine.generate, or (batched) as many requests to a Batcher."""
    engine = make_engine(setting.place.model, precision, setting.device)
    if compiled:
        engine.compile()
    settings = {count: SamplingSettings(temperature=0.0, max_new_tokens=count, eos_token_id=[]) for count in {1, setting.new}}
    ids, prompt = check_ids(setting.place)
    with engine.evaluating(), torch.inference_mode():
        cache = engine.new_cache(1, ids.shape[1])
        ids = ids.to(setting.device)
        logits = [engine.prefill(ids[:, :prompt], None, cache)]
        logits += [engine.decode(ids[:, at], cache) for at in range(prompt, ids.shape[1])]
    turn({"logits": _portable(logits), "precision": precision, "cache_bytes": 4 if setting.device == "cpu" else DTYPES[precision].itemsize})

    def answer(prompts: list[list[int]], count: int) -> None:
        if not batched:
            engine.generate(prompts, settings[count])
            return
        # As a whole batch, and without what was kept of the turn before.
        batcher = Batcher(engine, len(prompts), prefill_block=sum(map(len, prompts)), kept_prefixes=0)
        for request in [batcher.submit(prompt, settings[count]) for prompt in prompts]:
            request.result()

    _turns(setting, answer, turn)


def make_engine(folder: Path, precision: str, device: str) -> Engine:
    """The engine with weights of this kind; on a GPU the whole model in it."""
    if device == "cpu":
        model = quantize(SmartHaoAI.from_pretrained(folder), precision)
    else:
        model = SmartHaoAI.from_pretrained(folder, device=device, dtype=DTYPES[precision])
    return Engine(model.eval(), BPETokenizer.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------ the others


def transformers(setting: DecodeSetting, precision: str, turn: Turn) -> None:
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise Missing('pip install -e ".[parity]"') from error

    model: Any = AutoModelForCausalLM.from_pretrained(setting.place.model, dtype=DTYPES[precision])
    model = model.to(setting.device).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids, prompt = check_ids(setting.place)
    with torch.inference_mode():
        out = model(ids[:, :prompt].to(setting.device), use_cache=True, logits_to_keep=1)
        logits = [out.logits[:, -1]]
        for at in range(prompt, ids.shape[1]):
            out = model(ids[:, at : at + 1].to(setting.device), past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    turn({"logits": _portable(logits), "precision": precision, "cache_bytes": DTYPES[precision].itemsize})

    def answer(prompts: list[list[int]], count: int) -> None:
        rows = torch.tensor(prompts, device=setting.device)
        out = model.generate(rows, attention_mask=torch.ones_like(rows), min_new_tokens=count, max_new_tokens=count, do_sample=False)
        assert out.shape[1] == rows.shape[1] + count

    _turns(setting, answer, turn)


def llama_cpp(setting: DecodeSetting, kind: str, turn: Turn) -> None:
    """llama.cpp's server in this process, at its own settings, with as many slots as there are prompts."""
    try:
        import xllamacpp
    except ImportError as error:
        raise Missing('pip install -e ".[parity]"') from error
    from tools.convert.gguf_export import export_gguf

    file = setting.place.folder / f"{kind}.gguf"
    if not file.is_file():
        export_gguf(setting.place.model, file, LLAMA_TYPES[kind], log=lambda text: None)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    ids, prompt = check_ids(setting.place)
    params.n_parallel = setting.batch
    params.n_ctx = setting.batch * _rounded(max(setting.prompt + setting.new, ids.shape[1] + 2))
    params.warmup, params.fit_params, params.ui, params.cache_prompt = False, False, False, False
    params.cache_ram_mib, params.n_gpu_layers = 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setting.threads or torch.get_num_threads()
    _quiet()
    server = xllamacpp.Server(params)
    every = {"temperature": 0, "cache_prompt": False, "ignore_eos": True}

    def complete(row: list[int], count: int, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = server.handle_completions({"prompt": row, "n_predict": count, **every, **more})
        if "timings" not in answer:
            raise ValueError(f"llama.cpp refused: {str(answer)[:300]}")
        return answer

    rows = ids[0].tolist()
    size = load_config(setting.place.model).vocab_size
    logits = []
    for end in range(prompt, len(rows) + 1):
        found = complete(rows[:end], 1, n_probs=size)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        values = torch.full((1, size), -math.inf)
        for entry in found:
            values[0, entry["id"]] = entry["logprob"]
        logits.append(values)
    turn({"logits": _portable(logits), "precision": kind, "cache_bytes": 2})
    prompts = setting.prompts()
    pool = ThreadPoolExecutor(setting.batch)
    while True:
        start = time.perf_counter()
        firsts: list[float] = []
        rests: list[float] = []
        while not firsts or time.perf_counter() - start < setting.seconds:
            times = [answer["timings"] for answer in pool.map(lambda row: complete(row, setting.new), prompts)]
            assert all(t["predicted_n"] == setting.new for t in times), "a reply ended early"
            # The server's own clock, from the first new token to the last: what it does around a request is not counted against it.
            firsts.append(max(t["prompt_ms"] for t in times) / 1000)
            rests.append(max(t["predicted_ms"] for t in times) / 1000)
        _report(setting, turn, firsts, rests)


def _rounded(size: int) -> int:
    return -(-size // 256) * 256


def _quiet() -> None:
    """The native library prints to the process's own streams: away with it, once it is known that this is a process of its own."""
    import multiprocessing

    if multiprocessing.parent_process() is not None:
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)


# ------------------------------------------------------------------------------------------------ what is right


def check_ids(place: Workplace) -> tuple[Tensor, int]:
    """ids (1, T) whose logits every program gives: of a prompt of so many tokens, then of the others one by one."""
    tokenizer = BPETokenizer.from_pretrained(place.model)
    ids = random_ids(tokenizer, CHECK_PROMPT + CHECK_STEPS, np.random.default_rng(1))
    return torch.tensor([ids]), CHECK_PROMPT


def reference(place: Workplace, turn: Turn) -> None:
    """Logits of the model in fp32, without a cache."""
    model = SmartHaoAI.from_pretrained(place.model).eval()
    ids, prompt = check_ids(place)
    with torch.inference_mode():
        logits = model(ids).logits
    turn({"logits": _portable([logits[:, at] for at in range(prompt - 1, ids.shape[1])])})


def _portable(logits: list[Tensor]) -> Any:
    """(steps, V) as fp32 numbers for a pipe, less their mean."""
    rows = torch.cat([row.float().cpu() for row in logits])
    return (rows - rows.mean(dim=1, keepdim=True)).numpy()


def add_checks(found: Sequence[Measured], expected: Any) -> None:
    """Compare every row's logits with the reference's."""
    size = float(np.linalg.norm(expected))
    for row in found:
        logits = row.facts.pop("logits")
        error = float(np.linalg.norm(logits - expected)) / size
        row.checks.append(Check("norm of the logits", float(np.linalg.norm(logits)), size, error, TOLERANCES[row.facts["precision"]]))


def bytes_per_step(setting: DecodeSetting, facts: dict[str, Any]) -> float:
    """Read from memory per step of the whole batch: every active weight, and keys and values of half-way through the reply."""
    account = load_config(setting.place.model).account()
    weights = (account.active_body_parameters + account.head_parameters) * WEIGHT_BYTES[facts["precision"]]
    return weights + account.kv_cache_bytes(setting.prompt + setting.new // 2, setting.batch, facts["cache_bytes"])


def share(setting: DecodeSetting, row: Measured, ceilings: Ceilings) -> float:
    """Of reading memory, or, where only the prompt is measured, of the matrix product."""
    rate = row.rate["median"]
    if setting.new > 1:
        return bytes_per_step(setting, row.facts) * rate / setting.batch / ceilings.bytes_per_second
    account = load_config(setting.place.model).account()
    work = account.flops_per_token(setting.prompt, training=False) - 2 * account.head_parameters  # logits of the last token only
    return work * rate / ceilings.product_flops
