"""A unit that takes more memory than its node has: Ray kills its replica before the kernel does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from faults import counting_factory, lines_of, recomputed, recorded
from ray._private.utils import get_system_memory, get_used_memory
from ray_nodes import LocalNode, further_nodes
from tiny_run import Setup, assert_same_results, manifest_of, shards_in, tiny_config

from influence import one_process
from influence.errors import ShardsFailedError
from ray_jobs import select as select_job

pytestmark = pytest.mark.clusters

CHUNK = 2**28


@pytest.mark.usefixtures("ray_cluster")
def test_a_unit_that_runs_out_of_memory_is_named_and_the_rest_is_committed(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "method": "rds",
        "replicas__rows_per_shard": 8,
        "replicas__retries": 1,
    }
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    one_process.run_select(plain, quiet=True)
    greedy_key = manifest_of(plain.run).stages["embedding"].planned[-3]
    config = tiny_config(setup, tmp_path / "run", **changes)
    log = tmp_path / "log"
    total = get_system_memory()
    free = total - get_used_memory()

    def greedy(key: str) -> None:
        held = []
        while key == greedy_key and len(held) * CHUNK < 0.8 * free:
            held.append(b"\1" * CHUNK)
            time.sleep(0.05)

    # Half of what is free now: as much for all else on the machine to grow.
    share = (total - free / 2) / total
    with recorded("out of memory (Ray's monitor kills the replica)", runs=2) as fault:
        with monkeypatch.context() as patch, further_nodes() as nodes:
            nodes.append(LocalNode(1, {"RAY_memory_usage_threshold": f"{share:.4f}"}))
            patch.setattr(select_job, "replica_factory", counting_factory(log, greedy))
            with pytest.raises(ShardsFailedError) as caught:
                select_job.run_select(config, quiet=True)
        assert caught.value.exit_code == 3
        manifest = manifest_of(config.run)
        (failed,) = manifest.stages["embedding"].failed
        assert failed.key == greedy_key, "an innocent unit was charged"
        assert failed.attempts == 2
        assert "OutOfMemory" in failed.error, f"the record does not say why: {failed.error}"
        planned = {key for stage in manifest.stages.values() for key in stage.planned}
        assert planned - shards_in(config.cache_url) == {greedy_key}
        fault.kills = sum(line[:2] == ("begin", greedy_key) for line in lines_of(log))
        # On a node with more memory (the head) the same command goes on.
        monkeypatch.setattr(select_job, "replica_factory", counting_factory(log))
        select_job.run_select(config, quiet=True)
        fault.recomputed = recomputed(log)
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        assert_same_results(plain.run, config.run, "a run that went on after a failure differs")
        fault.outcome = "exit 3, the shard is named, all others committed; then the same bytes"
