"""How much alike are the rows of a selection? Pairwise cosines of their cached gradients.

    python benchmarks/redundancy.py --gradients RUN --select mean=RUN1 --select second=RUN2 \
        [--json FILE]

RUN is a done run of `method: exact` with a sketch, whose gradient shards hold every row of the
pool; the other runs chose from the same pool. Of every selection: the mean cosine over pairs of
different rows (plain, and with the rows' weights), the rows that count by their weights
(exp(entropy)), the sources and the length of responses; beside it all rows of the pool, which is
what random rows have on average.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import read_scores, write_json
from jaxtyping import Float

from influence import storage
from influence.config_loading import load_config
from influence.errors import InfluenceError, InputError
from influence.exact_work import plan_exact
from influence.own_training import with_made_training
from influence.pipeline import catalogue_units, prepare
from influence.progress import Progress
from influence.reducer import Reducer
from influence.run_log import RunLog
from influence.scoring import unit, usable_norm
from influence.shard_reader import read_shards

COLUMNS = ["id", "source", "score", "weight", "n_response_tokens"]


def unit_gradients(run: str) -> tuple[list[str], Float[np.ndarray, "n d"]]:
    """(ids, gradients of length 1, NaN where there is none) of the pool's rows, in their order.

    Raises InputError if the run has no sketches of every row.
    """
    config = with_made_training(load_config(storage.join(run, "config.yaml")))
    if config.method != "exact" or config.gradients.projection == "exact":
        raise InputError(f"{run}: expected a run of method: exact with a sketch")
    job = prepare(config, Progress(quiet=True), RunLog.unsaved(run, config.method))
    reduce = Reducer(config)
    reduce.load_catalogue(*catalogue_units(job))
    pool = reduce.pool
    assert pool is not None  # just loaded
    rows: np.ndarray | None = None
    for each, shard in read_shards(job.cache, plan_exact(job, reduce, None).units.sketches):
        norm = shard.floats("norm")
        usable = usable_norm(norm)
        if not usable.any():
            continue
        vectors = shard.vectors()[usable]
        if rows is None:
            rows = np.full((len(pool), vectors.shape[1]), np.nan)
        numbers = shard.table.column("row").to_numpy()[usable]
        rows[pool.positions(each.file, numbers)] = unit(vectors, norm[usable], True)
    assert rows is not None  # a done run has a row with a gradient
    return list(pool.ids), rows


def pair_cosine(rows: Float[np.ndarray, "k d"], weights: Float[np.ndarray, " k"]) -> float:
    """Mean cosine over pairs of different rows, each pair weighted by both rows' weights.

    sum over i != j of w_i w_j u_i'u_j over the sum of w_i w_j: from |sum of w_i u_i|^2, without a
    matrix of pairs.
    """
    w = weights / weights.sum()
    together = w @ rows
    own = (w**2 * (rows**2).sum(axis=1)).sum()
    return float((together @ together - own) / (1.0 - (w**2).sum()))


def effective_rows(weights: Float[np.ndarray, " k"]) -> float:
    """exp of the entropy of the weights: their number where they are equal."""
    w = weights / weights.sum()
    return float(np.exp(-(w * np.log(w)).sum()))


def of_selection(
    run: str, ids: Sequence[str], gradients: Float[np.ndarray, "n d"]
) -> dict[str, Any]:
    """Similarity, sources and lengths of a run's selection."""
    table = read_scores(run, COLUMNS)
    if table.column("id").to_pylist() != list(ids):
        raise InputError(f"{run}: other rows than those of the gradients' run")
    weights = table.column("weight").to_numpy(zero_copy_only=False).astype(np.float64)
    return described(table, gradients, np.nan_to_num(weights))


def described(
    table: Any, gradients: Float[np.ndarray, "n d"], weights: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """The same of any weights of the pool's rows."""
    chosen = np.flatnonzero((weights > 0) & np.isfinite(gradients).all(axis=1))
    sources = np.asarray(table.column("source").to_pylist(), dtype=object)[chosen]
    families = Counter(str(source).split("/")[0] for source in sources)
    tokens = table.column("n_response_tokens").to_numpy(zero_copy_only=False)[chosen]
    return {
        "rows": len(chosen),
        "cosine": pair_cosine(gradients[chosen], np.ones(len(chosen))),
        "weighted_cosine": pair_cosine(gradients[chosen], weights[chosen]),
        "effective_rows": effective_rows(weights[chosen]),
        "sources": len(set(sources)),
        "families": dict(families.most_common()),
        "top_sources": dict(Counter(map(str, sources)).most_common(5)),
        "median_response_tokens": float(np.median(tokens)),
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A table, a line for each selection."""
    lines = [
        "| selection | rows | mean cosine | weighted | effective rows | sources | families | "
        "median response |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, each in found.items():
        families = ", ".join(f"{key} {count}" for key, count in each["families"].items())
        lines.append(
            f"| {name} | {each['rows']} | {each['cosine']:.3f} | {each['weighted_cosine']:.3f} | "
            f"{each['effective_rows']:.1f} | {each['sources']} | {families} | "
            f"{each['median_response_tokens']:.0f} |"
        )
    return "\n".join(lines)


def compare(gradients_run: str, runs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every selection, and the pool that random rows are drawn from."""
    ids, gradients = unit_gradients(gradients_run)
    table = read_scores(gradients_run, COLUMNS)
    scored = table.column("score").is_valid().to_numpy(zero_copy_only=False)
    found = {"pool": described(table, gradients, scored.astype(np.float64))}
    return found | {name: of_selection(run, ids, gradients) for name, run in runs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gradients", required=True, metavar="RUN")
    parser.add_argument("--select", action="append", default=[], metavar="NAME=RUN")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        runs = {}
        for value in arguments.select:
            name, equals, run = value.partition("=")
            if not (name and equals and run):
                raise InputError(f"--select {value!r}: expected NAME=RUN")
            runs[name] = run
        found = compare(arguments.gradients, runs)
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    print(markdown(found))
    if arguments.json:
        write_json(Path(arguments.json), json.loads(json.dumps(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
