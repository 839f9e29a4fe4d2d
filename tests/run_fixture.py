"""Fabricates a small, valid run directory: all files of a finished run, and no model needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from scipy.stats import rankdata

from influence.records import (
    FailedShard,
    Fidelity,
    Interval,
    Manifest,
    Recall,
    StageRecord,
    TargetFidelity,
    to_json,
)
from influence.schemas import SELECTION_FIELDS, scores_schema

SOURCES = ("web_qa", "code_review", "maths_steps", "dialogue", "recipes")
STEPS = {"scores", "selection", "fidelity.json", "landmarks.parquet", "samples.json", "config.yaml"}


def write_run(
    folder: Path | str,
    *,
    rows: int = 400,
    selected: int = 40,
    names: Sequence[str] = ("gsm8k", "bbh", "bbh/navigate", "bbh/sorting"),
    landmarks: int = 60,
    method: str = "influence_distillation",
    state: str = "done",
    failed: int = 0,
    parts: int = 3,
    sources: Sequence[str] = SOURCES,
    text: str = "What is 17 times 3? Show each step.",
    seed: int = 0,
    without: Sequence[str] = (),
) -> Path:
    """Write a run directory and return it.

    `names`: score columns, groups with a slash. `landmarks=0`: a method without a regression
    (`fidelity.exact`). `failed`: shards that failed for good. `text` goes wherever a pool's own
    text goes (ids, messages); `sources` are drawn from evenly but favoured unevenly. `without`:
    files and folders that are left out, out of STEPS. The last row of every 50 has no score.
    """
    if unknown := set(without) - STEPS:
        raise ValueError(f"without: {sorted(unknown)}; expected names out of {sorted(STEPS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = _scores(rows, selected, names, sources, text, seed)
    fidelity, landmark_table = _certificate(table, names, landmarks, method, selected / rows, seed)
    files: dict[str, Any] = {
        "config.yaml": yaml.safe_dump(_config(folder, names, method)).encode(),
        "fidelity.json": to_json(fidelity),
        "samples.json": json.dumps(_samples(table, text)).encode(),
    }
    for name, data in files.items():
        if name not in without:
            (folder / name).write_bytes(data)
    if landmark_table is not None and "landmarks.parquet" not in without:
        pq.write_table(landmark_table, folder / "landmarks.parquet")
    if "scores" not in without:
        _write_parts(table, folder / "scores", parts)
    if "selection" not in without:
        _write_parts(_selection(table, text), folder / "selection", 1)
    (folder / "manifest.json").write_bytes(
        to_json(_manifest(table, names, method, state, failed, rows, text))
    )
    return folder


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation by its definition: Pearson's of the ranks, ties at their mean rank."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _scores(
    rows: int, selected: int, names: Sequence[str], sources: Sequence[str], text: str, seed: int
) -> pa.Table:
    rng = np.random.default_rng(seed)
    source = rng.integers(len(sources), size=rows)
    tokens = np.maximum(2, rng.lognormal(4.2, 0.9, rows)).astype(np.int32)
    scored = np.arange(rows) % 50 != 49
    taste = rng.normal(0, 0.012, (len(sources), len(names)))
    P = rng.normal(0, 0.015, (rows, len(names))) + taste[source]
    P += 0.002 * np.log(tokens)[:, None] + 0.01 * rng.normal(size=(rows, 1))
    P[~scored] = np.nan
    best = np.where(scored, np.nan_to_num(P, nan=-np.inf).max(axis=1), np.nan)
    weight = np.zeros(rows)
    if selected:
        order = np.argsort(np.where(scored, -best, np.inf), kind="stable")
        tau = best[order[selected]]
        gain = best[order[:selected]] - tau
        weight[order[:selected]] = gain / gain.sum() * scored.sum()
    column = np.nan_to_num(P, nan=-np.inf).argmax(axis=1)
    columns: dict[str, Any] = {
        "id": [f"{text} #{i}" if i % 7 == 0 else f"row-{i}" for i in range(rows)],
        "source": pa.array([sources[s] for s in source], pa.string()),
        "score": pa.array(best, from_pandas=True),
        "target": [names[c] if ok else None for c, ok in zip(column, scored, strict=True)],
        "weight": weight,
        "exact": rng.random(rows) < 0.2,
        "n_tokens": tokens + 40,
        "n_response_tokens": tokens,
        "truncated": tokens > 400,
        "reason": [None if ok else _reason(i, text) for i, ok in enumerate(scored)],
    }
    for j, name in enumerate(names):
        for field, shift in (("score", 0.0), ("low", -0.02), ("high", 0.02)):
            columns[f"{field}.{name}"] = pa.array(P[:, j] + shift, from_pandas=True)
    return pa.table(columns, schema=scores_schema(list(names)))


def _reason(row: int, text: str) -> str:
    return "duplicate" if row % 100 == 99 else f"no response tokens ({text})"


def _certificate(
    table: pa.Table, names: Sequence[str], count: int, method: str, share: float, seed: int
) -> tuple[Fidelity, pa.Table | None]:
    if not count:
        return Fidelity(method=method, exact=True), None
    rng = np.random.default_rng(seed + 1)
    exact_rows = np.flatnonzero(table.column("score").is_valid().to_numpy())
    drawn = rng.choice(exact_rows, count, replace=False)
    columns: dict[str, Any] = {"id": table.column("id").take(drawn)}
    targets = {}
    for name in names:
        exact = table.column(f"score.{name}").to_numpy()[drawn]
        loo = exact.mean() + 0.6 * (exact - exact.mean()) + rng.normal(0, 0.008, count)
        columns[f"exact.{name}"], columns[f"loo.{name}"] = exact, loo
        rho = spearman(exact, loo)
        r2 = 1 - float(np.sum((exact - loo) ** 2) / np.sum((exact - exact.mean()) ** 2))
        half = float(np.quantile(np.abs(exact - loo), 0.9))
        targets[name] = TargetFidelity(
            recall=Recall(expected=0.83, low=0.76, high=0.9, audit_low=None, exact_gradients=count),
            spearman=Interval(value=rho, low=rho - 0.08, high=min(1.0, rho + 0.05)),
            r2=r2,
            score_halfwidth=half,
            landmark_halfwidth=1.645 * 0.002,
            sketch_sd=0.002,
            reliability=0.97,
        )
    overall = Recall(expected=0.84, low=0.78, high=0.89, audit_low=0.77, exact_gradients=count + 20)
    fidelity = Fidelity(
        method=method, exact=False, landmarks=count, recall=overall, targets=targets
    )
    return fidelity, pa.table(columns)


def _samples(table: pa.Table, text: str) -> dict[str, list[dict[str, Any]]]:
    rows = table.select(["id", "source", "score", "target", "weight"]).to_pylist()
    ranked = sorted((r for r in rows if r["score"] is not None), key=lambda r: -r["score"])

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        return {
            **row,
            "messages": [
                {"role": "user", "content": text},
                {
                    "role": "assistant",
                    "content": f"17 × 3 = 51.\n\nFirst 10 × 3, then 7 × 3. {text}",
                },
            ],
        }

    return {"best": [*map(sample, ranked[:5])], "worst": [*map(sample, ranked[:-6:-1])]}


def _selection(table: pa.Table, text: str) -> pa.Table:
    rows = table.select(["id", "source", "score", "weight"]).to_pylist()
    chosen = sorted((r for r in rows if r["weight"] > 0), key=lambda r: -r["score"])
    total = sum(r["weight"] for r in chosen)
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), *SELECTION_FIELDS])
    records = [
        {
            "id": row["id"],
            "prompt": text,
            "influence_rank": rank,
            "influence_score": row["score"],
            "influence_weight": row["weight"] * len(chosen) / total,
        }
        for rank, row in enumerate(chosen, 1)
    ]
    return pa.Table.from_pylist(records, schema=schema)


def _write_parts(table: pa.Table, folder: Path, parts: int) -> None:
    folder.mkdir(exist_ok=True)
    cuts = np.linspace(0, table.num_rows, parts + 1).astype(int)
    for i, (first, last) in enumerate(pairwise(cuts)):
        pq.write_table(table.slice(first, last - first), folder / f"part-{i:05d}.parquet")


def _counts(table: pa.Table, names: Sequence[str], text: str) -> dict[str, Any]:
    score = table.column("score").to_numpy()
    tokens = table.column("n_response_tokens").to_numpy()
    ok = np.isfinite(score)
    reasons = Counter(r for r in table.column("reason").to_pylist() if r is not None)
    targets: dict[str, Any] = {}
    for name in names:
        owner = targets.setdefault(
            name.split("/")[0], {"rows": 64, "scored": 63, "columns": 0, "reasons": {text: 1}}
        )
        owner["columns"] += 1
    return {
        "rows": table.num_rows,
        "scored": int(ok.sum()),
        "selected": int((table.column("weight").to_numpy() > 0).sum()),
        "duplicates": reasons.get("duplicate", 0),
        "reasons": dict(reasons),
        "truncated": int(table.column("truncated").to_numpy(zero_copy_only=False).sum()),
        "targets": targets,
        "budget": "10%",
        "combine": "round_robin",
        "budget_exceeds_pool": False,
        "length_spearman": {
            name: spearman(tokens[ok], table.column(f"score.{name}").to_numpy()[ok])
            if ok.sum() > 1
            else None
            for name in names
        },
    }


def _manifest(
    table: pa.Table,
    names: Sequence[str],
    method: str,
    state: str,
    failed: int,
    rows: int,
    text: str,
) -> Manifest:
    broken = [
        FailedShard(
            key=f"embeddings/5f1c/9ab3-{512 * i}-{512 * i + 511}.parquet",
            file=f"pool/{text}-{i}.parquet",
            first=512 * i,
            last=512 * i + 511,
            attempts=4,
            error=f"RuntimeError: {text}",
        )
        for i in range(failed)
    ]
    stages = {
        "catalogue": StageRecord(
            fingerprint="c0ffee01",
            shards=4,
            computed=1,
            reused=3,
            rows=rows,
            seconds=1.25,
            model_seconds=0.0,
            replica_seconds=0.0,
        ),
        "embeddings": StageRecord(
            fingerprint="5f1c22aa",
            shards=8,
            computed=8,
            rows=rows,
            tokens=rows * 150,
            seconds=75.0,
            model_seconds=210.0,
            replica_seconds=280.0,
            devices=["cuda: NVIDIA H100"],
            notes=["attention in float32: the kernel has no bfloat16 derivative"],
            failed=broken,
        ),
    }
    coverage = [
        ("linear weights of the blocks", 106_168_320, 0.7893, "linear", None),
        (
            "embeddings, tied with the output head",
            28_311_552,
            0.2105,
            None,
            "no rule for embeddings",
        ),
        ("norms", 35_136, 0.0002, None, "no rule for norms"),
    ]
    return Manifest(
        method=method,
        state=state,
        versions={"influence": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        counts=_counts(table, names, text),
        coverage=[
            {
                "group": group,
                "parameters": parameters,
                "share": share,
                "rule": rule,
                "attributed": rule is not None,
                "reason": reason,
            }
            for group, parameters, share, rule, reason in coverage
        ],
        stages=stages,
    )


def _config(folder: Path, names: Sequence[str], method: str) -> dict[str, Any]:
    targets = {name.split("/")[0]: {"path": f"{name.split('/')[0]}.jsonl"} for name in names}
    return {
        "run": str(folder),
        "method": method,
        "model": {"name": "tiny-llama"},
        "data": {"candidates": ["pool/*.parquet"]},
        "targets": targets,
        "selection": {"budget": "10%", "combine": "round_robin"},
    }
