"""Methods with a stage of their own on Ray: the same bytes as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config

from influence import one_process
from ray_jobs import select as select_job

pytestmark = [pytest.mark.clusters, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.parametrize(("method", "stage"), [("perplexity", "losses"), ("semantic", "sentences")])
def test_replicas_make_the_shards_and_change_no_byte(
    setup: Setup, tmp_path: Path, encoder: str, method: str, stage: str
) -> None:
    changes: dict[str, Any] = {"method": method, "semantic": {"encoder": encoder}}
    alone = tiny_config(setup, tmp_path / "alone", **changes)
    one_process.run_select(alone, quiet=True)
    config = tiny_config(setup, tmp_path / "run", **changes, replicas__min=2, replicas__max=2)
    select_job.run_select(config, quiet=True)
    assert_same_results(alone.run, config.run, "a row's numbers depend on where they are computed")
    record = manifest_of(config.run).stages[stage]
    assert record.computed == record.shards, "shards came from elsewhere than the replicas"
