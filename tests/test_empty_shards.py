"""Shards none of whose rows can be scored: wherever they come, they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, scores_of, tiny_config

from influence.one_process import run_select

WARMUP = {"fraction": 0.5, "rank": 2, "epochs": 2}
METHODS: dict[str, dict[str, Any]] = {
    "less": {"warmup": WARMUP, "gradients": {}},
    "exact": {},
    "influence_distillation": {"warmup": WARMUP, "optimizer": {"kind": "adamw"}},
    "rds": {},
    "perplexity": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_may_meet_a_shard_of_nothing_first(
    setup: Setup, tmp_path: Path, method: str
) -> None:
    """What a stage needs is built with the first row, and may be spoken of before."""
    lines = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(8)]
    empty = tmp_path / "a.jsonl"
    empty.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def scores(name: str, candidates: list[str]) -> dict[str, float]:
        config = tiny_config(
            setup,
            tmp_path / name,
            method=method,
            data__candidates=candidates,
            replicas__rows_per_shard=8,
            **METHODS[method],
        )
        run_select(config, quiet=True)
        table = scores_of(config.run)
        values = table.column("score").to_pylist()
        return {row: v for row, v in zip(table.column("id").to_pylist(), values, strict=True) if v}

    found = scores("first", [str(empty), *setup.candidates])
    alone = scores("without", setup.candidates)
    assert found.keys() == alone.keys()
    if "warmup" not in METHODS[method]:  # another pool, another warm-up
        assert found == pytest.approx(alone, rel=1e-5)
