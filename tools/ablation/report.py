"""The tables (report.md, report.json) and plots of an ablation, from whatever runs are finished.

Equal tokens: final held-out bits per byte minus the baseline's of the same seed. Equal time: a variant whose step takes r times as
long is compared with a baseline that trains r times as long. The end of a run is worth more than its middle, because the
learning rate falls there: a curve cannot be read off before its end. So the baseline is trained at other lengths too
(`baseline_lengths`), each with its full schedule, and its result at r times the length is interpolated between those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.files import atomic_write_text
from tools.ablation.results import SPIKE, Interval, LengthCurve, Result, interval, read_result
from tools.ablation.settings import AblationConfig, Run, run_name
from tools.ablation.timing import StepTimes, read_step_times
from train.plotting import pyplot, save_figure

NONE = "–"
FIRST_SHOWN = 0.15  # share of a run that the plots leave out: there all variants fall steeply


@dataclass
class Row:
    """A variant in one size."""

    variant: str
    share: float
    results: dict[int, Result] = field(default_factory=dict)
    """By seed."""
    ratio: tuple[float, float, float] | None = None
    """Step time against the baseline's: median, smallest, largest."""
    tokens_per_second: float | None = None
    equal_tokens: Interval | None = None
    equal_time: Interval | None = None
    extrapolated: bool = False
    """The equal-time comparison lies outside the lengths at which the baseline was trained."""

    @property
    def name(self) -> str:
        return run_name(self.variant, self.share)

    def mean(self, field_name: str) -> float | None:
        values = [value for result in self.results.values() if (value := getattr(result, field_name)) is not None]
        return sum(values) / len(values) if values else None


@dataclass
class Table:
    """All rows of one size; the baseline first."""

    size: str
    rows: list[Row]
    lengths: LengthCurve
    times: StepTimes | None
    spread: Interval | None
    """Bits per byte of the baseline over its seeds."""


def collect(config: AblationConfig, runs: Sequence[Run]) -> list[Table]:
    """One table a size, from the finished ones of `runs`."""
    tables = []
    for size in config.size_names:
        results: dict[tuple[str, float], dict[int, Result]] = {}
        for run in runs:
            result = read_result(run) if run.size == size else None
            if result is not None:
                results.setdefault((run.variant, run.share), {})[run.seed] = result
        times = read_step_times(Path(config.out_dir) / size)
        by_seed: dict[int, dict[float, float]] = {}
        for (variant, share), seeds in results.items():
            for seed, result in seeds.items():
                if variant == config.baseline:
                    by_seed.setdefault(seed, {})[share] = result.bpb
        lengths = LengthCurve(by_seed)
        base = results.get((config.baseline, 1.0), {})
        rows = [_row(variant, share, seeds, base, lengths, times, config.baseline) for (variant, share), seeds in results.items()]
        spread = interval([result.bpb for result in base.values()])
        tables.append(Table(size, rows, lengths, times, spread))
    return tables


def _row(
    variant: str, share: float, seeds: dict[int, Result], base: dict[int, Result], lengths: LengthCurve, times: StepTimes | None, name: str
) -> Row:
    row = Row(variant, share, seeds)
    if times is not None and variant in times.seconds:
        row.ratio, row.tokens_per_second = times.ratio(variant), times.tokens_per_second(variant)
    if variant == name:
        return row
    pairs = [(result.bpb, base[seed].bpb) for seed, result in seeds.items() if seed in base]
    if share == 1 or lengths.known:
        row.equal_tokens = interval([bpb - other - (lengths.change(share) if share != 1 else 0.0) for bpb, other in pairs])
    if row.ratio is not None and lengths.known:
        length = share * row.ratio[0]
        row.equal_time = interval([bpb - other - lengths.change(length) for bpb, other in pairs])
        if row.equal_time is not None and times is not None:
            row.equal_time = _widened(
                row.equal_time, [lengths.change(length) - lengths.change(share * r) for r in times.likely_ratio(variant)]
            )
        row.extrapolated = not lengths.covers(length)
    return row


def _widened(value: Interval, shifts: Sequence[float]) -> Interval:
    """An interval over seeds with the uncertainty of the step time added: `shifts` of the mean at the ends of its interval."""
    if value.low is None or value.high is None:
        return value
    return Interval(value.mean, value.low + min(0.0, *shifts), value.high + max(0.0, *shifts), value.count)


def write_report(config: AblationConfig, runs: Sequence[Run], failures: dict[str, str] | None = None) -> str:
    """Write report.md, report.json and the plots to config.out_dir; returns the Markdown."""
    tables = [table for table in collect(config, runs) if table.rows]
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    done = sum(len(row.results) for table in tables for row in table.rows)
    text = [f"# Ablation: {out.name}", "", f"{done} of {len(runs)} runs are finished.", ""]
    for table in tables:
        drawn = draw_curves(table, config.baseline, out / f"curves{_suffix(table)}.png")
        drawn &= draw_differences(table, config.baseline, out / f"differences{_suffix(table)}.png")
        text += [markdown(table, config), ""]
        if drawn:
            text += [f"![{kind}]({kind}{_suffix(table)}.png)" for kind in ("curves", "differences")] + [""]
    if failures:
        text += ["## Failed", "", *(f"- {label}: {reason}" for label, reason in failures.items()), ""]
    result = "\n".join(text)
    atomic_write_text(out / "report.md", result)
    atomic_write_text(out / "report.json", json.dumps(_as_json(tables, failures or {}), ensure_ascii=False, indent=1) + "\n")
    return result


def _suffix(table: Table) -> str:
    return f"_{table.size}" if table.size else ""


def _as_json(tables: list[Table], failures: dict[str, str]) -> dict[str, Any]:
    sizes = []
    for table in tables:
        lengths = [{"share": share, "change": table.lengths.change(share)} for share in table.lengths.shares if table.lengths.known]
        rows = [{"name": row.name, **asdict(row)} for row in table.rows]
        sizes.append({"size": table.size, "rows": rows, "baseline_lengths": lengths, "baseline": _values(table.spread)})
    return {"sizes": sizes, "failures": failures}


def _values(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def markdown(table: Table, config: AblationConfig) -> str:
    """The table of one size with what it means."""
    first = next((row for row in table.rows if row.name == config.baseline), table.rows[0])
    files = sorted({name for row in table.rows for result in row.results.values() for name in result.bpb_by_file})
    probes = any(result.probes for row in table.rows for result in row.results.values())
    heads = ["variant", "seeds", "parameters (active), M", "step time", "tokens/s", "memory, MiB", "bits/byte", *files]
    heads += ["equal tokens", "equal time"] + (["probes"] if probes else []) + ["largest gradient", "first token"]
    lines = [f"## {table.size or 'Results'}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.rows:
        lines.append("| " + " | ".join(_cells(row, files, probes)) + " |")
    tokens = first.mean("tokens") or 0
    notes = [
        f"- Each run sees {tokens:,.0f} tokens (rows `{config.baseline}@s`: s times as many), rows of one seed the same ones in the "
        "same order. Differences are to the baseline's run of the same seed, in bits per byte; below 0 is better.",
        "- Intervals: Student's 95 % over seeds. Without one: one seed, which proves nothing about differences of the size of the spread.",
    ]
    if table.spread is not None and table.spread.count > 1:
        spread = _spread(first)
        notes.append(f"- The baseline over {table.spread.count} seeds: {table.spread.mean:.4f}, standard deviation {spread:.4f}.")
    notes.append(
        f"- Gradient: the largest norm after the first tenth of the run; a spike is over {SPIKE:g} times the run's median. First token: "
        "share of the attention that goes to a text's first token, mean over the heads (and the head with most) of layers without a window."
    )
    if table.times is not None:
        rounds = len(table.times.seconds[table.times.baseline])
        notes.append(
            f"- Step time: forward, backward and update against the baseline's, median of {rounds} interleaved rounds (smallest to "
            f"largest), {table.times.precision}, {table.times.machine}."
        )
    if table.lengths.known:
        points = ", ".join(f"{share:g}: {table.lengths.change(share):+.4f}" for share in table.lengths.shares if share != 1)
        notes.append(
            f"- Equal time: against the baseline trained as long as the variant takes, whole schedule included; interpolated from its "
            f"results at other lengths ({points}). Its interval includes that of the step time. *: beyond those lengths."
        )
    else:
        notes.append("- Equal time needs the baseline at other lengths (`baseline_lengths`).")
    versions = {result.code for row in table.rows for result in row.results.values()}
    if len(versions) > 1:
        notes.append(f"- **The program changed between the runs**: {len(versions)} versions of model/ and train/ made them.")
    return "\n".join([*lines, "", *notes])


def _spread(row: Row) -> float:
    import statistics

    return statistics.stdev([result.bpb for result in row.results.values()])


def _cells(row: Row, files: list[str], probes: bool) -> list[str]:
    parameters, active = row.mean("parameters") or 0, row.mean("active_parameters") or 0
    size = f"{parameters / 1e6:.2f}" + (f" ({active / 1e6:.2f})" if active != parameters else "")
    ratio = NONE if row.ratio is None else "{:.3f} ({:.3f}–{:.3f})".format(*row.ratio)
    by_file = []
    for name in files:
        values = [result.bpb_by_file[name] for result in row.results.values() if name in result.bpb_by_file]
        by_file.append(f"{sum(values) / len(values):.4f}" if values else NONE)
    cells = [
        row.name,
        str(len(row.results)),
        size,
        ratio,
        _number(row.tokens_per_second, ",.0f"),
        _number(row.mean("peak_memory_mb"), ",.0f"),
    ]
    cells += [_number(row.mean("bpb"), ".4f"), *by_file, _difference(row.equal_tokens)]
    cells.append(_difference(row.equal_time) + ("*" if row.extrapolated else ""))
    if probes:
        passed, total = (sum(result.probes.get(key, 0) for result in row.results.values()) for key in ("passed", "total"))
        cells.append(f"{passed}/{total}" if total else NONE)
    skipped = sum(result.skipped for result in row.results.values())
    spikes = sum(result.spikes or 0 for result in row.results.values())
    trouble = (f", {spikes} spikes" if spikes else "") + (f", {skipped} skipped" if skipped else "")
    shares = [result.first_token for result in row.results.values() if result.first_token is not None]
    sink = f"{sum(mean for mean, _ in shares) / len(shares):.3f} ({max(top for _, top in shares):.2f})" if shares else NONE
    return [*cells, _number(row.mean("largest_grad_norm"), ".2f") + trouble, sink]


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _difference(value: Interval | None) -> str:
    if value is None:
        return NONE
    shown = f"{value.mean:+.4f}"
    if value.low is not None:
        shown += f" ({value.low:+.4f} to {value.high:+.4f})"
    return f"**{shown}**" if value.clear else shown


# ---------------------------------------------------------------------------------------------- plots


def draw_curves(table: Table, baseline: str, file: Path) -> bool:
    """Held-out bits per byte over tokens and over time, a line per variant (mean of the seeds); False without matplotlib."""
    plt = pyplot()
    rows = [row for row in table.rows if row.share == 1]
    if plt is None or not rows:
        return False
    # Other seeds are measured on other held-out rows while they train, so only those that all variants have are drawn.
    common = set.intersection(*(set(row.results) for row in rows)) or None
    curves = {row.name: mean_curve([result for seed, result in row.results.items() if common is None or seed in common]) for row in rows}
    rows = [row for row in rows if curves[row.name][0]]
    if not rows:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), dpi=110, sharey=True)
    colours = plt.get_cmap("tab20")
    for number, row in enumerate(sorted(rows, key=lambda row: curves[row.name][1][-1])):
        tokens, bpb = curves[row.name]
        shown = [i for i, count in enumerate(tokens) if count >= FIRST_SHOWN * tokens[-1]]
        x, y = [tokens[i] for i in shown], [bpb[i] for i in shown]
        is_base = row.variant == baseline
        look = {"color": "black", "linewidth": 3, "zorder": 5} if is_base else {"color": colours(number % 20), "linewidth": 1.3}
        look["marker"] = "."
        axes[0].plot([t / 1e6 for t in x], y, label=f"{row.name} {y[-1]:.4f}", **look)
        if row.tokens_per_second:
            axes[1].plot([t / row.tokens_per_second / 60 for t in x], y, **look)
    axes[0].set(xlabel="tokens seen (millions)", ylabel="held-out bits per byte", title="equal tokens")
    axes[1].set(xlabel="minutes of training steps (interleaved step times)", title="equal time")
    for axis in axes:
        axis.grid(alpha=0.3)
    if table.size:
        figure.suptitle(table.size)
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, title="at the end")
    save_figure(figure, file)
    return True


def mean_curve(results: Sequence[Result]) -> tuple[list[int], list[float]]:
    """Mean over seeds at the token counts that all of them have."""
    curves = [dict((int(tokens), float(bpb)) for tokens, bpb in result.curve) for result in results]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return shared, [sum(curve[tokens] for curve in curves) / len(curves) for tokens in shared]


def draw_differences(table: Table, baseline: str, file: Path) -> bool:
    """Differences to the baseline with their intervals, best at equal tokens on top; False without matplotlib."""
    plt = pyplot()
    rows = sorted((row for row in table.rows if row.equal_tokens is not None), key=lambda row: row.equal_tokens.mean)  # type: ignore[union-attr]
    if plt is None or not rows:
        return False
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.42 * len(rows)), dpi=110)
    styles = (("equal_tokens", "equal tokens", "tab:blue", "o", -0.13), ("equal_time", "equal time", "tab:orange", "s", 0.13))
    for name, label, colour, marker, shift in styles:
        shown = [(place, value) for place, row in enumerate(rows) if (value := getattr(row, name)) is not None]
        if not shown:
            continue
        errors = [
            [v.mean - v.low if v.low is not None else 0 for _, v in shown],
            [v.high - v.mean if v.high is not None else 0 for _, v in shown],
        ]
        axis.errorbar(
            [value.mean for _, value in shown], [place + shift for place, _ in shown], xerr=errors, fmt=marker, color=colour, label=label,
            capsize=3, markersize=5,
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=2)
    if table.spread is not None and table.spread.count > 1:
        spread = _spread(next(row for row in table.rows if row.name == baseline))
        axis.axvspan(-spread, spread, color="grey", alpha=0.15, label="baseline, ± 1 standard deviation over seeds")
    axis.set_yticks(range(len(rows)), [f"{row.name} ({len(row.results)})" for row in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference to the baseline, held-out bits per byte (left: better); in brackets the number of seeds")
    if table.size:
        axis.set_title(table.size)
    figure.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2)
    save_figure(figure, file)
    return True
