"""What a run hands out: score parts, the weighted selection, samples for the report."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.candidates import read_examples, read_table
from influence.catalogue import Catalogue
from influence.schemas import SELECTION_CONTAMINATION_FIELDS, SELECTION_FIELDS, scores_schema
from influence.score_shards import remove_scoring
from influence.score_table import ScoreTable
from influence.selection import Selection

ROWS_PER_PART = 500_000
# Numbers of a part of scores/ at most: 2^21 float64 are 16 MiB.
VALUES_PER_PART = 1 << 21
WRITERS = 4
SAMPLE_ROWS = 10
_OF_SAMPLE = ("score", "target", "weight")
SAMPLE_CHARACTERS = 1_500
# Besides the parts of scores/ and selection/. The manifest is last: it says that a run began here.
COVERAGE, TRANSFER = "coverage.json", "transfer.json"
CONTAMINATION = "contamination.json"
RESULTS = (
    "selection.jsonl",
    "fidelity.json",
    "landmarks.parquet",
    "samples.json",
    COVERAGE,
    TRANSFER,
    CONTAMINATION,
    "evaluation.json",
    "report.html",
    "manifest.json",
)
#: Called right before something is written; raises where it must not be.
Check = Callable[[], None]
ColumnsOf = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
_PART = re.compile(r"part-\d+\.parquet")


def _nothing() -> None: ...


def remove_results(run: str) -> None:
    """Remove everything that a run wrote about its config, the manifest last; not the cache.

    Of the folders only the parts that runs write: others' files in them stay.
    """
    for folder in ("scores", "selection"):
        for info in storage.list_objects(storage.join(run, folder)):
            if _PART.fullmatch(info.url.rsplit("/", 1)[1]):
                storage.delete(info.url)
    remove_scoring(run)
    for name in RESULTS:
        storage.delete(storage.join(run, name))


def write_scores(
    run: str,
    catalogue: Catalogue,
    names: Sequence[str],
    table: ScoreTable,
    columns: ColumnsOf,
    check: Check = _nothing,
    *,
    flagged: bool = False,
) -> int:
    """Write `scores/part-*.parquet`, one row per candidate; returns the number of parts.

    `columns` makes of some rows' positions and scores `score`, `weight`, `exact` (arrays),
    `target` (list) and for each name `score.NAME`, `low.NAME`, `high.NAME`; NaN becomes null.
    `flagged`: also `contamination` and `overlap`.
    Memory for a few parts. `check` is called right before each part is put.
    """
    schema = scores_schema(list(names), contamination=flagged)
    wide = table.columns + 3 * len(names) + 8
    rows = max(1, min(ROWS_PER_PART, VALUES_PER_PART // wide))
    parts = (
        _score_part(catalogue, schema, start, columns(start + np.arange(len(P)), P))
        for start, P in _parts_of(table, rows)
    )
    return _write_parts(storage.join(run, "scores"), parts, check)


def _parts_of(table: ScoreTable, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, scores) of `rows` rows at a time; NaN for a row without any."""
    start, P = 0, np.full((min(rows, table.size), table.columns), np.nan)
    for block in table.blocks():
        done = 0
        while done < len(block.positions):
            stop = start + len(P)
            upto = int(np.searchsorted(block.positions, stop))
            P[block.positions[done:upto] - start] = block.P[done:upto]
            done = max(done, upto)
            if done < len(block.positions):
                yield start, P
                start, P = stop, np.full((min(rows, table.size - stop), table.columns), np.nan)
    while True:
        yield start, P
        start += len(P)
        if start >= table.size:
            return
        P = np.full((min(rows, table.size - start), table.columns), np.nan)


def _score_part(
    catalogue: Catalogue, schema: pa.Schema, start: int, columns: Mapping[str, Any]
) -> pa.Table:
    part = slice(start, start + len(columns["score"]))
    own = {
        "id": catalogue.ids[part].arrow,
        "source": catalogue.sources[part].arrow,
        "n_tokens": catalogue.n_tokens[part],
        "n_response_tokens": catalogue.n_response_tokens[part],
        "truncated": catalogue.truncated[part],
        "reason": catalogue.reason[part].arrow,
    }
    arrays = []
    for field in schema:
        values: Any = own.get(field.name, columns.get(field.name))
        if isinstance(values, pa.Array):
            arrays.append(values.cast(field.type))
        elif isinstance(values, np.ndarray) and values.dtype.kind == "f" and field.nullable:
            arrays.append(pa.array(values, type=field.type, mask=np.isnan(values)))
        else:
            arrays.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_selection(
    run: str,
    catalogue: Catalogue,
    selection: Selection,
    scores: np.ndarray,
    check: Check = _nothing,
    beside: Sequence[tuple[pa.Field, Any]] = (),
) -> pa.Table:
    """Write `selection/part-*.parquet` and `selection.jsonl`, best first.

    Each row has its input columns, then rank (from 1), score, and weight of mean 1 (w k / n).
    `scores` (k,) is the `score` column of the selected rows, `beside` further columns of them.
    """
    order = selection.order
    table = _input_rows(catalogue, order)
    weights = selection.weights * len(order) / selection.n_scored
    added = [np.arange(1, len(order) + 1), scores, weights]
    # The pool may itself be an earlier selection: its rank, score and weight are superseded.
    ours = [field.name for field in (*SELECTION_FIELDS, *SELECTION_CONTAMINATION_FIELDS)]
    table = table.drop_columns([name for name in ours if name in table.column_names])
    for field, values in [*zip(SELECTION_FIELDS, added, strict=True), *beside]:
        table = table.append_column(field, pa.array(values, type=field.type))
    starts = range(0, max(1, table.num_rows), ROWS_PER_PART)
    parts = [table.slice(s, ROWS_PER_PART) for s in starts]
    _write_parts(storage.join(run, "selection"), parts, check)
    lines = (_json_line(row) for row in table.to_pylist())
    data = "".join(lines).encode()
    check()
    storage.put(storage.join(run, "selection.jsonl"), data)
    return table


def write_samples(
    run: str,
    catalogue: Catalogue,
    positions: Mapping[str, np.ndarray],
    columns: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `samples.json`: the `best` and the `worst` rows with their text, cut to a length.

    `columns` holds score, target and weight of either's rows.
    """
    document = {
        kind: [
            _sample(catalogue, int(position), {k: columns[kind][k][i] for k in _OF_SAMPLE})
            for i, position in enumerate(rows)
        ]
        for kind, rows in positions.items()
    }
    data = json.dumps(document, ensure_ascii=False, indent=1).encode()
    storage.put(storage.join(run, "samples.json"), data)


def write_landmarks(
    run: str,
    ids: Sequence[str],
    names: Sequence[str],
    exact: np.ndarray,
    predicted: np.ndarray,
) -> None:
    """Write `landmarks.parquet`: exact scores and leave-one-out predictions (L x names)."""
    columns: dict[str, Any] = {"id": list(ids)}
    for j, name in enumerate(names):
        columns[f"exact.{name}"] = exact[:, j]
        columns[f"loo.{name}"] = predicted[:, j]
    storage.put(storage.join(run, "landmarks.parquet"), _parquet(pa.table(columns)))


def _sample(catalogue: Catalogue, position: int, columns: Mapping[str, Any]) -> dict[str, Any]:
    file = catalogue.files[catalogue.file[position]]
    row = int(catalogue.row[position])
    (example,) = read_examples(file, row, row)
    messages, target = [], columns["target"]
    for message in example.messages:
        text = message.content
        if len(text) > SAMPLE_CHARACTERS:
            text = text[:SAMPLE_CHARACTERS] + " […]"
        messages.append({"role": message.role, "content": text})
    return {
        "id": catalogue.ids[position],
        "source": catalogue.sources[position],
        "score": float(columns["score"]),
        "target": target.as_py() if isinstance(target, pa.Scalar) else target,
        "weight": float(columns["weight"]),
        "messages": messages,
    }


def _input_rows(catalogue: Catalogue, order: np.ndarray) -> pa.Table:
    """The input columns of these rows, in this order, over files with different columns."""
    parts, positions = [], []
    for file, rows in catalogue.by_file([int(p) for p in np.sort(order)]):
        parts.append(read_table(file, rows))
        positions.append(catalogue.positions(file, rows))
    table = _concatenate(parts)
    where = {int(position): i for i, position in enumerate(np.concatenate(positions))}
    return table.take(pa.array([where[int(position)] for position in order]))


def _json_line(row: dict[str, Any]) -> str:
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        # JSON has no NaN and no infinity, and strict readers refuse the file: null.
        text = json.dumps(_finite(row), ensure_ascii=False, default=str, allow_nan=False)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def _concatenate(parts: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        # A column has types that do not meet (a list in one file, text in another): as JSON text.
        kinds: dict[str, list[pa.Schema]] = {}
        for part in parts:
            for field in part.schema:
                kinds.setdefault(field.name, []).append(pa.schema([(field.name, field.type)]))
        clashing = {name for name, schemas in kinds.items() if not _meet(schemas)}
        return pa.concat_tables(
            [_as_text(part, clashing) for part in parts], promote_options="permissive"
        )


def _meet(schemas: Sequence[pa.Schema]) -> bool:
    try:
        pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True


def _as_text(table: pa.Table, names: set[str]) -> pa.Table:
    for position, field in enumerate(table.schema):
        if field.name in names:
            values = [
                None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                for value in table.column(position).to_pylist()
            ]
            table = table.set_column(position, field.name, pa.array(values, type=pa.string()))
    return table


def _write_parts(folder: str, parts: Iterable[pa.Table], check: Check) -> int:
    """Put the parts, a few at once; returns their number."""
    names: list[str] = []
    with ThreadPoolExecutor(WRITERS) as writers:
        ahead: deque[Future[None]] = deque()
        for part in parts:
            names.append(f"part-{len(names):05d}.parquet")
            if len(ahead) == WRITERS:
                ahead.popleft().result()
            check()
            ahead.append(writers.submit(_put_part, storage.join(folder, names[-1]), part))
        for written in ahead:
            written.result()
    for info in storage.list_objects(folder):
        name = info.url.rsplit("/", 1)[1]
        if _PART.fullmatch(name) and name not in names:
            check()
            storage.delete(info.url)  # a part of an earlier, larger result of this run directory
    return len(names)


def _put_part(url: str, part: pa.Table) -> None:
    storage.put(url, _parquet(part))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    if any(pa.types.is_nested(field.type) for field in table.schema):
        pq.write_table(table, sink, compression="zstd")
    else:
        # Scores are noise to a compressor and to a dictionary, and most of a part.
        texts = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
        codecs: Any = {name: "zstd" if name in texts else "none" for name in table.column_names}
        dictionaries: Any = texts
        pq.write_table(table, sink, compression=codecs, use_dictionary=dictionaries)
    return sink.getvalue().to_pybytes()
