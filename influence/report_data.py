"""What the report needs of a run directory: the documents, and the score parts as small arrays.

The score parts are read one after the other with only the columns that are shown; nothing that
grows with the pool is kept beyond a few numbers per row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError

from influence import storage
from influence.contamination_record import Contamination
from influence.errors import InputError
from influence.methods import METHODS
from influence.outputs import CONTAMINATION, COVERAGE, TRANSFER
from influence.records import Coverage, Fidelity, Manifest, Transfer

#: Targets (or groups) that get figures; the tables hold all of them.
MAX_DRAWN = 6
NO_SOURCE = "(no source)"

_DESCRIBED = {
    "config.yaml": "the resolved config",
    "scores/": "a score for every candidate",
    "selection/": "the selected rows",
    "fidelity.json": "the certificate",
    "landmarks.parquet": "exact and leave-one-out scores of the landmarks",
    "samples.json": "the best and worst samples",
}

Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True)
class SourceRow:
    """One source: rows in the pool and in the selection, their shares (0 to 1), and the ratio.

    `enrichment` is share in the selection / share in the pool: 1 is what a random selection gives.
    None where nothing was selected.
    """

    name: str
    pool: int
    chosen: int
    pool_share: float
    chosen_share: float
    enrichment: float | None


@dataclass(frozen=True)
class ScoreColumns:
    """The score parts of a run.

    `names`: every target and group with scores; `drawn`: those of them in `by_name`. A selected
    row is one with a positive weight. Scores are NaN for rows that could not be scored.
    """

    names: tuple[str, ...]
    drawn: tuple[str, ...]
    by_name: dict[str, Float[np.ndarray, "n"]]
    score: Float[np.ndarray, "n"]
    weight: Float[np.ndarray, "n"]
    response_tokens: Int[np.ndarray, "n"]
    pool_sources: Counter[str]
    chosen_sources: Counter[str]


@dataclass(frozen=True)
class LandmarkScores:
    """Exact scores of the uniformly drawn landmarks, and what each was predicted without itself."""

    exact: Float[np.ndarray, "l"]
    predicted: Float[np.ndarray, "l"]


@dataclass(frozen=True)
class RunData:
    """What was found in a run directory; `missing` names what was not, and what it is.

    `evaluation`: evaluation.json as it is, None where nothing was evaluated.
    """

    url: str
    manifest: Manifest
    config_text: str | None
    config: dict[str, Any]
    fidelity: Fidelity | None
    scores: ScoreColumns | None
    landmarks: dict[str, LandmarkScores]
    samples: dict[str, list[dict[str, Any]]]
    coverage: Coverage | None = None
    transfer: Transfer | None = None
    contamination: Contamination | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)
    evaluation: bytes | None = None


def read_run(run_url: str) -> RunData:
    """Read a run directory (local path, s3:// or gs://), finished or not.

    Raises:
        InputError: there is no manifest.json, or a document is there but cannot be understood.
    """
    raw = optional_bytes(run_url, "manifest.json")
    if raw is None:
        raise InputError(
            f"{run_url}: no manifest.json there, so this is not the directory of a run; check the "
            f"path, or start the run with `influence select CONFIG` (run: {run_url})"
        )
    manifest = _document(Manifest, raw, run_url, "manifest.json")
    text, fidelity_raw = (
        optional_bytes(run_url, "config.yaml"),
        optional_bytes(run_url, "fidelity.json"),
    )
    fidelity = None
    if fidelity_raw is not None:
        fidelity = _document(Fidelity, fidelity_raw, run_url, "fidelity.json")
    landmarks, samples = (
        optional_bytes(run_url, "landmarks.parquet"),
        optional_bytes(run_url, "samples.json"),
    )
    parts, selection = _parts(run_url, "scores"), _parts(run_url, "selection")
    method = METHODS.get(manifest.method)
    needs_landmarks = (method is not None and method.draws_landmarks) and not (
        fidelity is not None and fidelity.exact
    )
    found = {
        "config.yaml": text is not None,
        "scores/": bool(parts),
        "selection/": bool(selection),
        "fidelity.json": fidelity is not None,
        "landmarks.parquet": landmarks is not None or not needs_landmarks,
        "samples.json": samples is not None,
    }
    return RunData(
        url=run_url,
        manifest=manifest,
        config_text=None if text is None else text.decode("utf-8", "replace"),
        config={} if text is None else _config(text, run_url),
        fidelity=fidelity,
        scores=read_scores(parts) if parts else None,
        landmarks={} if landmarks is None else _landmarks(landmarks),
        samples={} if samples is None else _samples(samples, run_url),
        coverage=optional_document(Coverage, run_url, COVERAGE),
        transfer=optional_document(Transfer, run_url, TRANSFER),
        contamination=optional_document(Contamination, run_url, CONTAMINATION),
        missing=[(name, _DESCRIBED[name]) for name, there in found.items() if not there],
        evaluation=optional_bytes(run_url, "evaluation.json"),
    )


def read_scores(part_urls: Sequence[str]) -> ScoreColumns:
    """The score parts, in order, without ids and intervals; scores in float32."""
    names: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    columns: dict[str, list[np.ndarray]] = {}
    pool: Counter[str] = Counter()
    chosen: Counter[str] = Counter()
    for url in part_urls:
        with pq.ParquetFile(storage.open_input(url)) as part:
            if not columns:
                schema_names = part.schema_arrow.names
                names = tuple(n.removeprefix("score.") for n in schema_names if n[:6] == "score.")
                drawn = choose_drawn(names)
            wanted = ["score", *(f"score.{name}" for name in drawn)]
            table = part.read(columns=[*wanted, "weight", "n_response_tokens", "source"])
        for name in wanted:
            columns.setdefault(name, []).append(_numbers(table, name, np.float32))
        columns.setdefault("weight", []).append(_numbers(table, "weight", np.float64))
        columns.setdefault("tokens", []).append(_numbers(table, "n_response_tokens", np.int32))
        _count_sources(table, columns["weight"][-1] > 0, pool, chosen)
    joined = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    return ScoreColumns(
        names,
        drawn,
        {name: joined[f"score.{name}"] for name in drawn},
        joined["score"],
        joined["weight"],
        joined["tokens"],
        pool,
        chosen,
    )


def choose_drawn(names: Sequence[str]) -> tuple[str, ...]:
    """Names that get figures: targets, then groups of targets without a score of their own."""
    plain = [name for name in names if "/" not in name]
    orphans = [name for name in names if "/" in name and name.split("/", 1)[0] not in plain]
    return tuple((plain + orphans)[:MAX_DRAWN])


def source_table(
    pool: Counter[str], chosen: Counter[str], limit: int = 30
) -> tuple[list[SourceRow], SourceRow | None]:
    """The `limit` largest sources of the pool, ties by name, and the sum of the others, if any."""
    rows, picks = sum(pool.values()), sum(chosen.values())

    def row(name: str, size: int, taken: int) -> SourceRow:
        pool_share = size / rows
        chosen_share = taken / picks if picks else 0.0
        return SourceRow(
            name,
            size,
            taken,
            pool_share,
            chosen_share,
            chosen_share / pool_share if picks else None,
        )

    order = sorted(pool, key=lambda name: (-pool[name], name))
    top, others = order[:limit], order[limit:]
    rest = None
    if others:
        size, taken = sum(pool[n] for n in others), sum(chosen[n] for n in others)
        rest = row(f"other ({len(others):,} sources)", size, taken)
    return [row(name, pool[name], chosen[name]) for name in top], rest


def effective_numbers(weights: Float[np.ndarray, "k"]) -> tuple[float, float]:
    """How many equal weights these amount to: (sum w)^2 / sum w^2 (Kish) and exp(entropy)."""
    p = weights / weights.sum()
    return float(1.0 / np.sum(p**2)), float(np.exp(-np.sum(p * np.log(p))))


def optional_bytes(run_url: str, name: str) -> bytes | None:
    """A file of the directory, None where there is none."""
    url = storage.join(run_url, name)
    return None if storage.head(url) is None else storage.read_bytes(url)


def _parts(run_url: str, folder: str) -> list[str]:
    listed = [info.url for info in storage.list_objects(storage.join(run_url, folder))]
    names = [(url, url.rsplit("/", 1)[-1]) for url in listed]
    return [url for url, name in names if name.startswith("part-") and name.endswith(".parquet")]


def optional_document(kind: type[Document], run_url: str, name: str) -> Document | None:
    """A JSON document of the directory, None where there is none.

    Raises:
        InputError: it is there, and this version did not write it.
    """
    raw = optional_bytes(run_url, name)
    return None if raw is None else _document(kind, raw, run_url, name)


def _document(kind: type[Document], raw: bytes, run_url: str, name: str) -> Document:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"]) or "the document"
        raise InputError(
            f"{storage.join(run_url, name)}: {place}: {first['msg']}; the file was not written by "
            "this version of influence: run `influence select CONFIG` again to rewrite it"
        ) from None


def _config(text: bytes, run_url: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{storage.join(run_url, 'config.yaml')}: no YAML: {error}") from None
    return loaded if isinstance(loaded, dict) else {}


def _samples(raw: bytes, run_url: str) -> dict[str, list[dict[str, Any]]]:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise InputError(
            f"{storage.join(run_url, 'samples.json')}: no JSON ({error}); run "
            "`influence select CONFIG` again to rewrite it"
        ) from None


def _landmarks(raw: bytes) -> dict[str, LandmarkScores]:
    """Landmarks with both numbers, per name; a landmark without one of them is not comparable."""
    table = pq.ParquetFile(pa.BufferReader(raw)).read()
    found = {}
    for column in table.column_names:
        if not column.startswith("exact."):
            continue
        name = column.removeprefix("exact.")
        exact = _numbers(table, column, np.float64)
        predicted = _numbers(table, f"loo.{name}", np.float64)
        both = np.isfinite(exact) & np.isfinite(predicted)
        found[name] = LandmarkScores(exact[both], predicted[both])
    return found


def _numbers(table: pa.Table, name: str, dtype: Any) -> np.ndarray:
    """A column as numbers; nulls are NaN."""
    return table.column(name).to_numpy().astype(dtype, copy=False)


def _count_sources(
    table: pa.Table, chosen: np.ndarray, pool: Counter[str], picks: Counter[str]
) -> None:
    for counter, rows in ((pool, table), (picks, table.filter(pa.array(chosen)))):
        for name, count in _value_counts(rows.column("source")):
            counter[name] += count


def _value_counts(column: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for entry in column.value_counts():
        value = entry["values"].as_py()
        yield NO_SOURCE if value is None else value, entry["counts"].as_py()
