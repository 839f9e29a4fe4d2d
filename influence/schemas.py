"""File contracts: the Arrow schemas of shards, scores and selections.

Everything in Parquet that another program may read is declared here and nowhere else; the JSON
documents are in `influence.records`.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 1

#: Columns of every shard that describe the row itself. `id` is null where the input has none.
ROW_FIELDS: list[pa.Field] = [
    pa.field("id", pa.string()),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("source", pa.string()),
    pa.field("group", pa.string()),
    pa.field("digest", pa.binary(16), nullable=False),
    pa.field("n_tokens", pa.int32(), nullable=False),
    pa.field("n_response_tokens", pa.int32(), nullable=False),
    pa.field("truncated", pa.bool_(), nullable=False),
    pa.field("reason", pa.string()),
]

REASON_DUPLICATE = "duplicate"
REASON_CONTAMINATED = "contaminated"


class VectorLayout(BaseModel):
    """How the bytes of a shard's `vector` column are read (kept in the schema's metadata).

    `blocks` lists the layers of a gradient as (name, offset, length), in elements; a vector without
    any is an embedding, inner products, or a projection's two halves. `sizes` are the layers' sizes
    before they were projected, each for itself; without any, `blocks` are the whole layers. A layer
    that is shorter than its size is two halves side by side.
    """

    model_config = ConfigDict(extra="forbid")
    dtype: str
    dim: int
    blocks: list[tuple[str, int, int]] = []
    sizes: list[int] = []

    @property
    def whole(self) -> bool:
        """Whether a vector is an unprojected gradient."""
        lengths = [length for _name, _offset, length in self.blocks]
        return bool(lengths) and (not self.sizes or self.sizes == lengths)


def catalogue_schema() -> pa.Schema:
    """Schema of a catalogue shard: what tokenising a row says, no model involved."""
    return pa.schema(ROW_FIELDS)


def shard_schema(layout: VectorLayout) -> pa.Schema:
    """Schema of a shard with vectors: the row's columns, `vector`, `norm` and `loss`.

    `vector` is fixed-size binary (measured: read at raw file speed, where fixed-size lists are
    several times slower). With sizes there is `norms`, too: every layer's exact norm in float32,
    in their order. An unscorable row has a null vector, norm, norms and loss.
    """
    itemsize = {"float16": 2, "float32": 4, "float64": 8}[layout.dtype]
    vector = [
        pa.field("vector", pa.binary(itemsize * layout.dim)),
        pa.field("norm", pa.float64()),
        pa.field("loss", pa.float64()),
    ]
    if layout.sizes:
        vector.append(pa.field("norms", pa.binary(4 * len(layout.blocks))))
    metadata = {b"vector": layout.model_dump_json().encode()}
    return pa.schema([*ROW_FIELDS, *vector], metadata=metadata)


def score_shard_schema(layout: VectorLayout) -> pa.Schema:
    """Schema of a shard of predicted scores: the row, then its scores and their variance.

    `vector` holds one score per column of the run's targets and, last, the variance; it is null for
    a row without an embedding. Partial sums of DataInf have a row for each column of the targets.
    """
    itemsize = {"float32": 4, "float64": 8}[layout.dtype]
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("vector", pa.binary(itemsize * layout.dim)),
    ]
    return pa.schema(fields, metadata={b"vector": layout.model_dump_json().encode()})


def layout_of(schema: pa.Schema) -> VectorLayout:
    """Read the vector layout back from a shard's schema metadata."""
    return VectorLayout.model_validate_json((schema.metadata or {})[b"vector"])


def target_vector_schema() -> pa.Schema:
    """Schema of a target-vector shard: one row per layer, the (out x in) matrix as bytes."""
    return pa.schema(
        [
            pa.field("layer", pa.string(), nullable=False),
            pa.field("out_features", pa.int64(), nullable=False),
            pa.field("in_features", pa.int64(), nullable=False),
            pa.field("vector", pa.large_binary(), nullable=False),
        ]
    )


def retraining_schema(*, answers: bool) -> pa.Schema:
    """Schema of a retraining's shard: a row for each test row, its place among the test's rows.

    `loss` in nats per response token, null for a row with a `reason`. With `answers` there is
    `correct`, too: 1 where the generated answer is the reference's, null where none was asked for.
    """
    fields = [
        pa.field("test", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("loss", pa.float64()),
        pa.field("n_response_tokens", pa.int32(), nullable=False),
        pa.field("reason", pa.string()),
    ]
    return pa.schema([*fields, pa.field("correct", pa.int8())] if answers else fields)


class ExportLayout(BaseModel):
    """What an exported file's `vector` column holds (JSON under `influence` in its metadata).

    `values` is what the fingerprint covers; `blocks` and `sizes` as in `VectorLayout`; `shard` the
    cache key.
    Embeddings are unit rows and `norm` their length before; gradients are not normalised.
    """

    stage: str
    fingerprint: str
    values: dict[str, Any]
    dtype: str
    dim: int
    blocks: list[tuple[str, int, int]] = []
    sizes: list[int] = []
    shard: str


def export_schema(layout: ExportLayout) -> pa.Schema:
    """Schema of an exported file: the rows of one shard that have a vector."""
    element = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
    inner = pa.field("element", element[layout.dtype], nullable=False)
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("vector", pa.list_(inner, layout.dim), nullable=False),
        pa.field("norm", pa.float64()),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
    return pa.schema(fields, metadata={b"influence": layout.model_dump_json().encode()})


def contamination_schema() -> pa.Schema:
    """Schema of a contamination shard: the best match of every candidate, null without one.

    `target_file` is the content hash of the file that `target_row` (from 0) is of. `overlap` is 1
    for the kind exact, the share of the target row's n-grams for ngram, the estimated Jaccard
    similarity for minhash.
    """
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("kind", pa.string()),
            pa.field("overlap", pa.float64()),
            pa.field("target_file", pa.string()),
            pa.field("target_row", pa.int64()),
        ]
    )


#: Columns added to `scores/` where contamination is flagged or dropped: the target row as NAME:ID.
CONTAMINATION_FIELDS: list[pa.Field] = [
    pa.field("contamination", pa.string()),
    pa.field("overlap", pa.float64()),
]


def scores_schema(names: list[str], *, contamination: bool = False) -> pa.Schema:
    """Schema of `scores/part-*.parquet`; `names` are the targets and their groups."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("target", pa.string()),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("exact", pa.bool_(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("n_response_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        *(CONTAMINATION_FIELDS if contamination else ()),
    ]
    for name in names:
        fields += [
            pa.field(f"{column}.{name}", pa.float64()) for column in ("score", "low", "high")
        ]
    return pa.schema(fields)


#: Columns added to the input columns of a selected row.
SELECTION_FIELDS: list[pa.Field] = [
    pa.field("influence_rank", pa.int64(), nullable=False),
    pa.field("influence_score", pa.float64(), nullable=False),
    pa.field("influence_weight", pa.float64(), nullable=False),
]

#: Added to them where contamination is flagged.
SELECTION_CONTAMINATION_FIELDS: list[pa.Field] = [
    pa.field(f"influence_{field.name}", field.type) for field in CONTAMINATION_FIELDS
]
