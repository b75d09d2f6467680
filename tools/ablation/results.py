"""What a finished run leaves (`result.json`), and the statistics over seeds and variants."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import model
import train
from model.files import atomic_write_text
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.ablation.attention import FIRST_QUERY, first_token_attention
from tools.ablation.settings import AblationConfig, Run
from tools.curriculum import score
from tools.evaluate import answer_probes, file_bits_per_byte, load
from train.checkpoints import FOLDER as CHECKPOINTS
from train.config import PretrainConfig
from train.data_files import expand_paths
from train.formats import BadRows, as_text, read_samples
from train.metrics import read_jsonl
from train.stage import model_config

FILE = "result.json"
SINK_TEXTS = 40  # of each held-out file
SPIKE = 3.0
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table, that of the normal distribution.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
NORMAL_QUANTILE = 1.960


@dataclass
class Result:
    """Measurements of one finished run."""

    parameters: int
    active_parameters: int
    """Those that compute one token: of the experts the chosen ones, of tables of tokens only the head."""
    tokens: int
    seconds: float
    peak_memory_mb: float | None
    bpb: float
    """Held-out bits per byte, of all files together."""
    bpb_by_file: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens seen, held-out bits per byte) during training."""
    largest_grad_norm: float | None = None
    """After the first tenth of the run, before clipping."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    code: str = ""
    """Hash of the source of model/ and train/ when the run was finished."""
    probes: dict[str, Any] = field(default_factory=dict)
    """passed and total of the curriculum's held-out prompts."""
    first_token: tuple[float, float] | None = None
    """Share of attention on a text's first token: mean over the heads, and the head with most."""
    spikes: int | None = None
    """Logged rows after the first tenth whose largest gradient norm is over SPIKE times the median of the run."""


def read_result(run: Run) -> Result | None:
    """The result in the run's folder, None when it is not finished."""
    file = run.folder / FILE
    return Result(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def finish_run(run: Run, config: AblationConfig) -> Result:
    """Measure the trained model of `run`, write its result, and delete the checkpoints that were there to resume from."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    trained, tokenizer = load(str(run.folder), run.settings.train.device)
    last: dict[str, Any] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if value is not None})
    measured = {}
    if run.settings.data.val_file:
        limit = int(config.limit_kb * 1000) or None
        context = run.settings.data.max_length
        for file in expand_paths(run.settings.data.val_file):
            measured[file.path.stem] = file_bits_per_byte(trained, tokenizer, file.path, context, limit_bytes=limit)
    nats, size = sum(m.nats for m in measured.values()), sum(m.bytes for m in measured.values())
    bpb = nats / math.log(2) / size if size else last.get("val_bpb")
    if bpb is None:
        raise ValueError(f"{run.folder}: nothing was held out to measure on; set data.val_file, or a larger data.val_share")
    answers = score(answer_probes(trained, tokenizer, config.probes)) if config.probes else None
    account = model_config(run.settings, tokenizer).account()
    norms = [row["grad_norm"] for row in rows if row.get("grad_norm") is not None and row["step"] > run.settings.train.max_steps / 10]
    result = Result(
        parameters=account.parameters,
        active_parameters=account.active_body_parameters + account.head_parameters,
        tokens=int(last["tokens"]),
        seconds=float(last["seconds"]),
        peak_memory_mb=last.get("peak_memory_mb"),
        bpb=float(bpb),
        bpb_by_file={name: float(m.bpb or 0) for name, m in measured.items()},
        curve=[(int(row["tokens"]), float(row["val_bpb"])) for row in rows if row.get("val_bpb") is not None],
        largest_grad_norm=max(norms, default=None),
        skipped=int(last.get("skipped", 0)),
        code=code_version(),
        probes={key: int(answers["overall"][key]) for key in ("passed", "total")} if answers else {},
        first_token=_first_token(trained, tokenizer, run.settings),
        spikes=sum(norm > SPIKE * statistics.median(norms) for norm in norms) if norms else None,
    )
    atomic_write_text(run.folder / FILE, json.dumps(asdict(result), ensure_ascii=False, indent=1) + "\n")
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    return result


def _first_token(trained: SmartHaoAI, tokenizer: BPETokenizer, settings: PretrainConfig) -> tuple[float, float] | None:
    """`first_token_attention` on the beginnings of some held-out texts."""
    rows: list[list[int]] = []
    for file in expand_paths(settings.data.val_file) if settings.data.val_file else []:
        texts = itertools.islice(read_samples(file.path, BadRows(), as_text), SINK_TEXTS)
        rows += [[*tokenizer.document_start(), *tokenizer.encode(text)][: settings.data.max_length] for _, text in texts]
    rows = [row for row in rows if len(row) > FIRST_QUERY]
    shares = first_token_attention(trained, rows) if rows else (math.nan, math.nan)
    return None if math.isnan(shares[0]) else shares


def code_version() -> str:
    """Hash of the files that decide what a run computes."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (model, train):
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


@dataclass
class Interval:
    """A mean over seeds; low and high are None with one seed."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float]) -> Interval | None:
    """Mean with Student's 95 % interval; None for no values."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    quantile = T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


class LengthCurve:
    """How the baseline's final result depends on the length of its run, each length with its full schedule.

    Change of bits per byte against the full length, linear in the logarithm of the length between the lengths that were run and,
    with the slope of the nearest two, beyond them.
    """

    def __init__(self, by_seed: dict[int, dict[float, float]]) -> None:
        """by_seed: {seed: {share of the full length: bits per byte}}; seeds without the full length are left out."""
        changes: dict[float, list[float]] = {1.0: [0.0]}
        for results in by_seed.values():
            for share, bpb in results.items():
                if 1.0 in results and share != 1.0:
                    changes.setdefault(share, []).append(bpb - results[1.0])
        shares = sorted(changes)
        self.shares = shares
        self._x = np.log(shares)
        self._y = np.array([statistics.fmean(changes[share]) for share in shares])

    @property
    def known(self) -> bool:
        return len(self.shares) > 1

    def covers(self, share: float) -> bool:
        return self.shares[0] <= share <= self.shares[-1]

    def change(self, share: float) -> float:
        """Bits per byte at `share` of the full length minus those at the full length."""
        x = math.log(share)
        right = min(max(int(np.searchsorted(self._x, x)), 1), len(self._x) - 1)
        slope = (self._y[right] - self._y[right - 1]) / (self._x[right] - self._x[right - 1])
        return float(self._y[right - 1] + slope * (x - self._x[right - 1]))
