"""The file contracts: what an earlier version wrote still reads, field by field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from influence import storage
from influence.cache import parse
from influence.candidates import SourceFile
from influence.config_loading import dump_config, load_config
from influence.errors import InputError
from influence.records import Fidelity, Manifest, to_json
from influence.run_log import read_manifest
from influence.schemas import (
    FORMAT_VERSION,
    ROW_FIELDS,
    SELECTION_CONTAMINATION_FIELDS,
    SELECTION_FIELDS,
    VectorLayout,
    contamination_schema,
    layout_of,
    scores_schema,
    shard_schema,
)
from influence.units import Unit

FIXTURES = Path(__file__).parent / "fixtures"


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value under its path of keys, and of places in lists of objects."""
    if isinstance(node, list) and any(isinstance(each, dict) for each in node):
        node = dict(enumerate(node))
    if isinstance(node, dict) and node:
        return {
            path: value
            for key, child in node.items()
            for path, value in _leaves(child, f"{prefix}/{key}").items()
        }
    return {prefix: node}


def _assert_keeps(written: Any, read: Any) -> None:
    before, now = _leaves(written), _leaves(read)
    lost = {path: value for path, value in before.items() if now.get(path, "gone") != value}
    assert not lost, "a key of the contract was renamed, removed or changed its meaning"


def test_a_config_of_an_earlier_version_still_loads():
    path = FIXTURES / "config.yaml"
    config = load_config(str(path))
    _assert_keeps(yaml.safe_load(path.read_text()), yaml.safe_load(dump_config(config)))
    assert config.targets["bbh"].group_by == "task"
    assert config.selection.per_source["code"].max == 0.5


@pytest.mark.parametrize(("name", "model"), [("manifest", Manifest), ("fidelity", Fidelity)])
def test_a_document_of_an_earlier_version_still_reads(name: str, model: Any):
    data = (FIXTURES / f"{name}.json").read_bytes()
    document = model.model_validate_json(data)
    _assert_keeps(json.loads(data), json.loads(to_json(document)))


def test_a_manifest_says_what_failed():
    manifest = read_manifest(str(FIXTURES))
    assert manifest is not None
    assert (manifest.format_version, manifest.state) == (FORMAT_VERSION, "failed")
    (failed,) = manifest.stages["gradients"].failed
    assert (failed.file, failed.first, failed.last, failed.attempts) == ("pool.jsonl", 2, 7, 4)
    assert manifest.stages["gradients"].model_seconds == 1.0


def test_a_shard_of_an_earlier_version_is_still_whole():
    data = (FIXTURES / "shard.parquet").read_bytes()
    metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    key = json.loads(metadata[b"influence"])["key"]
    # STAGE/FINGERPRINT/CONTENT-FIRST-LAST-ROWS: a name that changes loses every cache.
    assert re.fullmatch(r"gradients/(0123456789abcdef){2}/(ab){16}-2-7-[0-9a-f]{16}\.parquet", key)
    shard = parse(data, key)
    assert shard.table.schema.names == shard_schema(shard.layout).names
    expected = [[1, 2], [np.nan, np.nan], [0.5, -0.25]]
    np.testing.assert_array_equal(shard.vectors(), np.array(expected, np.float32))
    assert shard.layout.blocks == [("left", 0, 1), ("right", 1, 1)]
    np.testing.assert_array_equal(shard.floats("norm"), [2.0, np.nan, 0.5])
    assert shard.table.column("row").to_pylist() == [2, 4, 7]
    assert shard.meta["tokens"] == 40


def test_the_name_of_a_shard_has_not_moved():
    data = (FIXTURES / "shard.parquet").read_bytes()
    metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    file = SourceFile("elsewhere.jsonl", "ab" * 16, 9, 9)
    unit = Unit("gradients", "0123456789abcdef" * 2, file, 2, 7, (2, 4, 7))
    assert json.loads(metadata[b"influence"])["key"] == unit.key, "existing caches are lost"


def test_score_parts_have_the_columns_that_they_had():
    table = pq.read_table(FIXTURES / "scores-part-00000.parquet")
    now = scores_schema(["gsm8k", "bbh", "bbh/navigate"])
    assert table.schema.remove_metadata().equals(now), "a column of scores/ moved"
    rows = table.to_pylist()
    assert [row["score"] for row in rows] == [0.5, 0.25, None]
    assert rows[1]["low.bbh/navigate"] == 0.125
    assert rows[2]["reason"] == "no assistant turn"


def test_selection_parts_have_the_columns_that_they_had():
    table = pq.read_table(FIXTURES / "selection-part-00000.parquet")
    assert [table.schema.field(field.name) for field in SELECTION_FIELDS] == SELECTION_FIELDS
    assert table.column("influence_weight").to_pylist() == [1.5, 0.5]
    assert table.column("messages")[0].as_py()[1] == {"role": "assistant", "content": "a"}


def test_the_columns_are_those_that_are_documented():
    rows = "id row source group digest n_tokens n_response_tokens truncated reason"
    assert [field.name for field in ROW_FIELDS] == rows.split()
    scores = "id source score target weight exact n_tokens n_response_tokens truncated reason"
    named = ["score.t", "low.t", "high.t"]
    assert scores_schema(["t"]).names == [*scores.split(), *named]
    flagged = scores_schema(["t"], contamination=True).names
    assert flagged == [*scores.split(), "contamination", "overlap", *named]
    marked = [field.name for field in SELECTION_CONTAMINATION_FIELDS]
    assert marked == ["influence_contamination", "influence_overlap"]
    matches = "row kind overlap target_file target_row"
    assert contamination_schema().names == matches.split()


@pytest.mark.parametrize(("dtype", "width"), [("float16", 2), ("float32", 4), ("float64", 8)])
def test_a_layout_comes_back_from_the_schema(dtype: str, width: int):
    layout = VectorLayout(dtype=dtype, dim=6, blocks=[("a", 0, 2), ("b", 2, 4)])
    schema = shard_schema(layout)
    assert layout_of(schema) == layout
    assert schema.field("vector").type == pa.binary(6 * width), "bytes per vector"


def test_documents_are_strict_json():
    data = to_json(Manifest(method="exact", counts={"x": float("nan"), "y": [float("inf")]}))
    assert b"NaN" not in data, "strict readers refuse NaN"
    assert json.loads(data)["counts"] == {"x": None, "y": [None]}


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    assert read_manifest(str(tmp_path)) is None
    for text in (b'{"state": "done"}', b"", b"{"):
        storage.put(str(tmp_path / "manifest.json"), text)
        with pytest.raises(InputError, match=r"manifest\.json: not a manifest of this version"):
            read_manifest(str(tmp_path))
