"""The comparison of decoding speeds: what it prints can be relied on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import decode_compare
from train.config import UsageError


def test_all_ways_are_measured_and_agree(
    tmp_path: Path, tiny_model, tiny_tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: speeds of replies that differ; a table with columns mixed up."""
    pytest.importorskip("transformers", reason="the comparison needs: pip install -e .[parity]")
    monkeypatch.setattr(decode_compare, "set_threads", lambda count: None)
    tiny_model.save_pretrained(tmp_path, tiny_tokenizer)
    shape = ["--cpu-time", "--batches", "1", "3", "--prompt-tokens", "5", "--new-tokens", "4", "--rounds", "2", "--device", "cpu"]
    decode_compare.main([str(tmp_path), *shape, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        for name in decode_compare.NAMES:
            assert row[name]["same_ids"] == row["batch"]
            for what in ("first_ms", "tokens_per_second", "against_last"):
                assert 0 < row[name][what]["min"] <= row[name][what]["median"] <= row[name][what]["max"]
        assert row["transformers"]["against_last"]["median"] == 1
    lines = decode_compare.table(rows).splitlines()
    assert len(lines) == 7 and len({len(line.rstrip()) for line in lines[1:]}) == 1 and lines[3].count("1.00x") == 1
    with pytest.raises(UsageError, match="context of 256"):
        decode_compare.main([str(tmp_path), "--new-tokens", "500"])
    with pytest.raises(UsageError, match="at least 1"):
        decode_compare.main([str(tmp_path), "--rounds", "0"])
