"""ONNX files with a key/value cache, for onnxruntime in Python, browsers and phones; and what running one shows.

    python -m tools.convert onnx weight/sft out_dir            # model.onnx, and config and tokenizer files as runtimes look for them
    python -m tools.convert onnx weight/sft model.onnx --dtype f16   # the graph alone

Inputs: input_ids (B, T) and attention_mask (B, P + T), int64 (padding on the left), past_key_values.N.key and .value
(B, K, P, D); P = 0 begins. Outputs: logits (B, T, V) fp32, present.N.key and .value (B, K, P + T, D), which are the next call's past.
Positions follow from attention_mask, so there is no position_ids. A windowed layer gets and returns all keys, its mask hides the old ones.
In transformers.js: `AutoModelForCausalLM.from_pretrained(dir, {subfolder: ""})`; config.json carries the rest of what it asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.adapter_files import whole_model
from model.checkpoint import (
    CONFIG_FILE,
    GENERATION_FILE,
    find_model,
    finished_config,
    load_config,
    load_finished,
    load_pretrained,
    model_type,
)
from model.disk_config import smart_parts
from model.files import sync
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI, pad_left
from tools.convert.compare import GREEDY_TOKENS, Comparison, Difference, check_fits, log_probs, probe_rows, same_greedy

if TYPE_CHECKING:
    from onnx import ModelProto

DTYPES = {"f32": torch.float32, "f16": torch.float16}
MODEL_FILE = "model.onnx"
LARGEST_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GiB, so that larger ones lie in a second file
SMALLEST_OUTSIDE = 1024  # bytes; smaller tensors stay in the graph
PAGE = 4096  # tensors of the second file begin at a page, so that runtimes can map them
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", GENERATION_FILE)
GREEDY_ROWS = 3


def export_onnx(folder: str | Path, out_file: str | Path, dtype: str = "f32", log: Callable[[str], None] = print) -> Path:
    """Write the model of `folder` as ONNX and return the .onnx file.

    out_file ending in .onnx: that file alone. Otherwise a folder: model.onnx with config.json, generation_config.json and the
    tokenizer's files; what else stands there is kept. Weights above 1.8 GB go to a second file, `<name>.onnx_data`, which must stay
    beside the first. dtype: "f32", or "f16" (weights, activations and cache; norms, softmax and logits stay fp32). Raises ValueError for
    another dtype, for OUT = the model's own folder, and when onnx is not installed; nothing is left behind on an error.
    """
    if dtype not in DTYPES:
        reason = "; onnxruntime has no bf16 kernels for CPUs" if dtype == "bf16" else ""
        raise ValueError(f"--dtype {dtype} is not available for onnx{reason}; choose one of: {', '.join(DTYPES)}")
    source, target = find_model(folder), Path(out_file)
    alone = target.suffix == ".onnx"
    if not alone and target.resolve() == source.resolve():
        raise ValueError(f"{target} is the model's own folder; name another folder, or a file: {target / MODEL_FILE}")
    try:
        from tools.convert.onnx_graph import ModelGraph
    except ImportError as error:
        raise ValueError(f'ONNX export needs a package that is missing ({error.name}): pip install -e ".[export]"') from error
    if parts := smart_parts(finished_config(load_config(source))):
        raise ValueError(f"{source} cannot be written as ONNX: the graph has no {', '.join(parts)}")
    model = load_finished(source, log)
    if (source / "tokenizer.json").is_file():
        check_fits(BPETokenizer.from_pretrained(source), model.config.vocab_size)
    graph, weights = ModelGraph(model, DTYPES[dtype]).build()
    file = target if alone else target / MODEL_FILE
    where = target.parent if alone else target
    home = next(place for place in (where, *where.absolute().parents) if place.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=home) as temporary:
        _write(graph, weights, Path(temporary) / file.name)
        if not alone:
            _copy_beside(source, Path(temporary), dtype)
        where.mkdir(parents=True, exist_ok=True)
        # The graph comes last: where it stands, all that it needs is there.
        for made in sorted(Path(temporary).iterdir(), key=lambda path: path.name == file.name):
            sync(made)
            os.replace(made, where / made.name)
    if not _is_outside(weights):
        _data_file(file).unlink(missing_ok=True)  # of a larger model that stood here before
    sync(where)
    _describe(model, file, weights, dtype, log)
    return file


def _data_file(file: Path) -> Path:
    return file.with_name(f"{file.name}_data")  # the name under which Optimum and transformers.js know it


def _write(graph: ModelProto, weights: dict[str, Tensor], file: Path) -> None:
    import onnx

    data = open(_data_file(file), "wb") if _is_outside(weights) else None
    try:
        for name, tensor in weights.items():
            array = tensor.cpu().contiguous().numpy()
            proto = onnx.TensorProto(name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
            if data is None or array.nbytes < SMALLEST_OUTSIDE:
                proto.raw_data = array.tobytes()
            else:
                data.write(b"\0" * (-data.tell() % PAGE))
                place = {"location": _data_file(file).name, "offset": data.tell(), "length": array.nbytes}
                proto.data_location = onnx.TensorProto.EXTERNAL
                proto.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
                data.write(array.data)
            graph.graph.initializer.append(proto)
    finally:
        if data is not None:
            data.close()
    file.write_bytes(graph.SerializeToString())
    onnx.checker.check_model(str(file), full_check=True)


def _copy_beside(source: Path, target: Path, dtype: str) -> None:
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = json.loads((whole_model(source) / CONFIG_FILE).read_text(encoding="utf-8"))
    # What transformers.js cannot see in the graph: that the file's name has no suffix ("fp32", whatever the weights are), the cache's
    # type, and that there is a second file.
    hints: dict[str, Any] = {"dtype": "fp32", "kv_cache_dtype": "float16" if dtype == "f16" else "float32"}
    if _data_file(target / MODEL_FILE).exists():
        hints["use_external_data_format"] = True
    config["transformers.js_config"] = hints
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(model: SmartHaoAI, file: Path, weights: dict[str, Tensor], dtype: str, log: Callable[[str], None]) -> None:
    c = model.config
    size = file.stat().st_size + (_data_file(file).stat().st_size if _is_outside(weights) else 0)
    log(f"{file}: {size / 2**20:.1f} MiB, {dtype}, {len(weights)} tensors, cache of {c.n_layer} layers")
    if _is_outside(weights):
        log(f"{_data_file(file).name} holds the weights: keep it beside {file.name}")
    if model.expert_layers:
        times = (c.n_expert + c.n_shared_expert) / (c.n_expert_per_token + c.n_shared_expert)
        log(f"the graph computes all {c.n_expert} experts for every token: {times:.1f} times the expert work of the sparse model")
    if model_type(c) == "haoai":
        log("onnxruntime runs the graph; libraries that read config.json first do not know model_type haoai")


def _is_outside(weights: dict[str, Tensor]) -> bool:
    return sum(tensor.nbytes for tensor in weights.values()) > LARGEST_FILE


class OnnxRunner:
    """An exported file in onnxruntime on the CPU. `past` is a dictionary of the cache's inputs."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.cache = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {v.name: np.zeros((batch, v.shape[1], 0, v.shape[3]), kinds[v.type]) for v in self.cache}

    def run(self, ids: Tensor, mask: Tensor | None = None, past: dict[str, np.ndarray] | None = None) -> tuple[Tensor, dict]:
        """ids (B, T), mask (B, P + T) or None (no padding): logits (B, T, V) and the next call's past."""
        past = self.empty(len(ids)) if past is None else past
        if mask is None:
            mask = torch.ones(len(ids), next(iter(past.values())).shape[2] + ids.shape[1], dtype=torch.int64)
        logits, *present = self.session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past})
        return torch.from_numpy(logits), dict(zip(past, present, strict=True))

    def in_pieces(self, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T) fed in blocks of `sizes` through the cache."""
        past, logits, start = self.empty(len(ids)), [], 0
        for size in sizes:
            end = start + size
            part, past = self.run(ids[:, start:end], None if mask is None else mask[:, :end], past)
            logits.append(part)
            start = end
        return torch.cat(logits, dim=1)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most likely next tokens, decoded with the cache."""
        given: list[int] = []
        logits, past = self.run(torch.tensor([ids]))
        for _ in range(count):
            given.append(int(logits[0, -1].argmax()))
            logits, past = self.run(torch.tensor([given[-1:]]), past=past)
        return given


def check_onnx(folder: str | Path, out_file: str | Path) -> Comparison | None:
    """Run an exported file in onnxruntime against the checkpoint: whole rows, rows through the cache in pieces, a left-padded batch,
    greedy decoding. None when onnxruntime is not installed."""
    file = Path(out_file)
    file = file if file.suffix == ".onnx" else file / MODEL_FILE
    try:
        runner = OnnxRunner(file)
    except ImportError:
        return None
    source = find_model(folder)
    model, tokenizer = load_pretrained(source), BPETokenizer.from_pretrained(source)
    rows = probe_rows(tokenizer, model.config.max_position_embeddings)
    expected = [log_probs(model, row) for row in rows]
    found = {"whole": Difference(), "cached": Difference(), "padded": Difference()}

    def compare(name: str, logits: Tensor, wanted: Tensor) -> None:
        found[name].add(wanted, logits.log_softmax(-1))

    for row, wanted in zip(rows, expected, strict=True):
        ids = torch.tensor([row])
        compare("whole", runner.run(ids)[0][0], wanted)
        compare("cached", runner.in_pieces(ids, _pieces(len(row)))[0], wanted)
    some = sorted(range(len(rows)), key=lambda i: len(rows[i]))[:: max(1, len(rows) // 3)]
    ids, mask = pad_left([rows[i] for i in some], tokenizer.pad_token_id)
    for place, logits in zip(some, runner.in_pieces(ids, _pieces(ids.shape[1]), mask), strict=True):
        compare("padded", logits[-len(rows[place]) :], expected[place])
    prompts = [row[: max(1, model.config.max_position_embeddings - GREEDY_TOKENS)] for row in rows[:GREEDY_ROWS]]
    return Comparison(
        runtime=f"onnxruntime {runner.version}",
        largest=max((d.largest for d in found.values()), key=lambda value: (value != value, value)),
        tokens=sum(map(len, rows)),
        same_ids=None,
        same_greedy=all(same_greedy(model, row, runner.greedy(row, GREEDY_TOKENS)) for row in prompts),
        note=", ".join(f"{name} {difference.largest:.1e}" for name, difference in found.items()),
        mean_kl=found["whole"].mean_kl,
    )


def _pieces(length: int) -> list[int]:
    """Half of a row at once, some tokens one by one, the rest at once: prefill, decoding, and a block after a block."""
    first = (length + 1) // 2
    singles = min(4, length - first)
    rest = length - first - singles
    return [first, *[1] * singles, *([rest] if rest else [])]


__all__ = ["OnnxRunner", "check_onnx", "export_onnx"]
