"""Weights in shards, damaged bytes, other types: what is read is what was saved, or it is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import SmartHaoAI
from model.checkpoint import find_model, open_weights, save_pretrained

KEY = "model.layers.1.self_attn.k_proj.weight"
INDEX = "model.safetensors.index.json"
EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}


def weight_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if "safetensors" in file.name)


def assert_same(folder: Path, model: SmartHaoAI) -> None:
    back = SmartHaoAI.from_pretrained(folder)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("limit", [1, 3000, 20000])
@pytest.mark.parametrize("fields", [{}, EXPERTS, {**EXPERTS, "qk_norm": False}, {**EXPERTS, "router_bias_rate": 0.1}], ids=range(4))
def test_shards_are_one_model(fields: dict[str, Any], limit: int, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: tensors lost between shards; a shard above the limit; an index that is not what is in the files."""
    model = make_model(**fields)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("choice_bias"):
                buffer.normal_()
    save_pretrained(model, tmp_path, max_shard_bytes=limit)
    assert_same(tmp_path, model)
    places = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = sorted(set(places.values()))
    assert weight_files(tmp_path) == sorted([*files, INDEX]) and len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {name for name, place in places.items() if place == file}
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= limit


def test_saving_in_other_pieces_leaves_nothing_behind(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: an old single file or old shards that are read instead of the new weights."""
    for limit in (10**9, 8000, 10**9, 8000, 3000, 20000, 10**9):
        model = make_model()
        save_pretrained(model, tmp_path, max_shard_bytes=limit)
        assert_same(tmp_path, model)
        single = limit == 10**9
        assert weight_files(tmp_path) == ["model.safetensors"] if single else len(weight_files(tmp_path)) > 2
        assert (tmp_path / INDEX).exists() != single and (tmp_path / "model.safetensors").exists() == single
    with pytest.raises(ValueError, match="shard.*0"):
        save_pretrained(model, tmp_path, max_shard_bytes=0)


@pytest.mark.parametrize("before", [10**9, 8000, 3000])
@pytest.mark.parametrize("after", [10**9, 8000])
def test_a_full_disk_keeps_the_old_state(
    before: int, after: int, make_model, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: new shards beside old ones under the same names, which together are no model."""
    old = make_model()
    save_pretrained(old, tmp_path, max_shard_bytes=before)
    files = weight_files(tmp_path)
    written: list[Path] = []

    def full_disk(tensors: Any, file: Path, metadata: Any = None) -> None:
        written.append(Path(file))
        if len(written) > 2 or after == 10**9:
            Path(file).write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr("model.weight_files.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(make_model(), tmp_path, max_shard_bytes=after)
    assert weight_files(tmp_path) == files
    assert_same(tmp_path, old)


def test_shards_of_two_saves_are_refused(make_model, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a crash between the renames of two shards that gives a model of old and new layers."""
    save_pretrained(make_model(), tmp_path, max_shard_bytes=8000)
    renamed: list[Any] = []

    def crash(source: Any, target: Any) -> None:
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(target)
        Path(source).rename(target)

    monkeypatch.setattr("model.weight_files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(make_model(), tmp_path, max_shard_bytes=8000)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model-0000[12]-of.* is damaged.*checksum"):
        SmartHaoAI.from_pretrained(tmp_path)


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(index)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


def copy_shard(folder: Path) -> None:
    """The first shard once more, under a name that the index gives to one of its tensors."""
    first = sorted(folder.glob("model-00001-of-*"))[0]
    (folder / "again.safetensors").write_bytes(first.read_bytes())
    edit_index(lambda index: index["weight_map"].update({"again": "again.safetensors"}))(folder)


OUTSIDE_NAMES = ("../secret.safetensors", "/etc/secret.safetensors", "folder/part.safetensors", 7, None)
SHARD_DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing shard": (
        lambda folder: sorted(folder.glob("model-00002-of-*"))[0].unlink(),
        FileNotFoundError,
        r"index\.json.*missing: model-00002-of-\d+\.safetensors",
    ),
    "cut shard": (
        lambda folder: [f.write_bytes(f.read_bytes()[:-9]) for f in folder.glob("model-00002-of-*")],
        ValueError,
        r"model-00002-of-\d+\.safetensors is damaged or cut off",
    ),
    "index is no JSON": (write(INDEX, b"{"), ValueError, r"index\.json is not a readable index"),
    "index without map": (write(INDEX, b"{}"), ValueError, r"index\.json is not a readable index"),
    "index is a list": (write(INDEX, b"[]"), ValueError, r"index\.json is not a readable index"),
    "map is a list": (write(INDEX, b'{"weight_map": ["a"]}'), ValueError, r"index\.json is not a readable index"),
    "empty map": (write(INDEX, b'{"weight_map": {}}'), ValueError, r"index\.json"),
    "twice": (copy_shard, ValueError, r"stands in .* and in .*"),
    **{
        f"outside {name}": (
            edit_index(lambda index, name=name: index["weight_map"].update({KEY: name})),  # type: ignore[misc]
            ValueError,
            r"index\.json (names|is not a readable index)",
        )
        for name in OUTSIDE_NAMES
    },
}


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_damaged_shards_are_refused_by_name(name: str, make_model, tmp_path: Path) -> None:
    """Guards: a stack trace; weights read from outside the model's folder because an index says so."""
    damage, error, message = SHARD_DAMAGES[name]
    folder = tmp_path / "model"
    model = make_model()
    save_pretrained(model, folder, max_shard_bytes=8000)
    save_file({KEY: torch.zeros(16, 32)}, tmp_path / "secret.safetensors")
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        SmartHaoAI.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("limit", [10**9, 8000])
def test_a_flipped_bit_is_named(limit: int, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a bad disk or download that changes one weight unnoticed."""
    save_pretrained(make_model(), tmp_path, max_shard_bytes=limit)
    file = sorted(tmp_path.glob("model*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    names = json.loads(data[8 : 8 + header])
    place = 8 + header + int(torch.randint(len(data) - 8 - header, ()))
    (hit,) = [n for n, e in names.items() if n != "__metadata__" and e["data_offsets"][0] <= place - 8 - header < e["data_offsets"][1]]
    data[place] ^= 1 << int(torch.randint(8, ()))
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="checksum") as caught:
        SmartHaoAI.from_pretrained(tmp_path)
    assert hit in str(caught.value) and file.name in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files(dtype: torch.dtype, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: files of half the size that are not, that name another type, or that come back in half precision."""
    model = make_model(**EXPERTS)
    save_pretrained(model, tmp_path / "half", dtype=dtype)
    save_pretrained(model, tmp_path / "full")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    config = json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    back = SmartHaoAI.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
def test_pickled_weights_are_never_read(name: str, tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: running whatever a downloaded pickle contains; a message that does not say what to do."""
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"{name}.*pickled.*safetensors"):
        SmartHaoAI.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [10**9, 8000])
def test_loading_writes_nothing(limit: int, make_model, tmp_path: Path) -> None:
    """Guards: caches or locks left beside a model that may lie on a read-only disk."""
    save_pretrained(make_model(), tmp_path, max_shard_bytes=limit)
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.rglob("*")}
    SmartHaoAI.from_pretrained(tmp_path)
    open_weights(find_model(tmp_path)).shapes()
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.rglob("*")} == before


def test_the_model_does_not_depend_on_its_file(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: weights that are still mapped to a file which is then replaced: another model, or a crash."""
    model = make_model()
    model.save_pretrained(tmp_path)
    back = SmartHaoAI.from_pretrained(tmp_path)
    make_model(initializer_range=0.5).save_pretrained(tmp_path)
    back.save_pretrained(tmp_path)
    assert_same(tmp_path, model)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
