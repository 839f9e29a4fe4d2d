"""A cluster of no nodes at all that grows to three with the work, and back to none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults import lines_of, recomputed, recorded, wait_until
from ray_head import Head, running_head
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config, write_config

from influence import one_process

pytestmark = pytest.mark.clusters

NODES = 3
#: Arguments: config, the replicas' log, the gate.
DRIVER = """
import sys
from pathlib import Path
from faults import counting_factory, held
from influence.cli import main
from ray_jobs import select

config, log, gate = sys.argv[1:]
select.replica_factory = counting_factory(Path(log), held(Path(gate)))
main(["select", config])
"""


def demands(head: Head) -> str:
    """What the autoscaler has been asked for and has not met."""
    status = head.ray("status", f"--address={head.gcs}")
    assert status.returncode == 0, status.stdout
    return status.stdout.split("Pending Demands:")[-1].split("Demands:")[-1].strip()


def test_from_no_node_to_three_and_back(setup: Setup, tmp_path: Path) -> None:
    changes = {"method": "rds", "replicas__rows_per_shard": 2}
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    one_process.run_select(plain, quiet=True)
    # One more than the cluster can have: a demand that is never met.
    config = tiny_config(setup, tmp_path / "run", replicas__max=NODES + 1, **changes)
    path = write_config(tmp_path / "config.yaml", config)
    log, gate = tmp_path / "log", tmp_path / "gate"
    gate.write_text("")
    (tmp_path / "driver.py").write_text(DRIVER)
    tests = Path(__file__).parent
    types = {"cpu": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": NODES}}
    with (
        recorded("autoscaling 0 -> 3 -> 0 nodes") as fault,
        running_head(job_server=False, autoscaled=types, idle=3) as head,
    ):
        assert head.nodes() == 0
        driver = subprocess.Popen(
            [sys.executable, str(tmp_path / "driver.py"), path, str(log), str(gate)],
            env={
                **head.environment,
                "RAY_ADDRESS": head.gcs,
                "PYTHONPATH": f"{tests.parent}:{tests}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            wait_until(
                "a replica on each of the nodes that came",
                lambda: len({line.node for line in lines_of(log)}) == NODES,
            )
            assert head.nodes() == NODES
            assert head.listening() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
            wait_until("the fourth replica is asked for", lambda: "'CPU': 1.0" in demands(head))
            # Now one last unit holds the job up.
            last = manifest_of(plain.run).stages["embedding"].planned[-1]
            gate.write_text(f"scores/.*{last.rsplit('/', 1)[-1]}")
            wait_until("all nodes but the one at work are given back", lambda: head.nodes() == 1)
            assert driver.poll() is None, "the job is over: test too weak"
            wait_until("no demand outlives its work", lambda: "'CPU'" not in demands(head))
            gate.unlink()
            output, _ = driver.communicate(timeout=120)
            assert driver.returncode == 0, output
            wait_until("the last node is given back", lambda: head.nodes() == 0)
        finally:
            driver.kill()
        fault.recomputed = recomputed(log)
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        assert_same_results(plain.run, config.run, "nodes that come and go change the result")
        fault.outcome = (
            "the same bytes; 3 nodes came, 2 went while the last shard ran, 0 at the end"
        )
