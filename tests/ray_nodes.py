"""Further nodes on loopback for the cluster that this process is connected to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from faults import wait_until
from ray._private.node import Node
from ray._private.parameter import RayParams

#: For processes that join: without it Ray puts the machine's address in the place of 127.0.0.1.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class LocalNode:
    """One more raylet on this machine, with its agents and workers."""

    def __init__(self, cpus: int, environment: Mapping[str, str] | None = None) -> None:
        address = ray.get_runtime_context().gcs_address
        parameters: dict[str, Any] = {
            "gcs_address": address,
            "redis_address": address,
            "node_ip_address": "127.0.0.1",
            "num_cpus": cpus,
            "num_gpus": 0,
            "object_store_memory": 80 * 2**20,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "node_manager_port": 0,
            "dashboard_agent_listen_port": None,
            "include_log_monitor": False,
            "env_vars": dict(environment or {}),
        }
        # Its processes end with this one; it takes no signal handler and no exit hook.
        self._node = Node(RayParams(**parameters), shutdown_at_exit=False, spawn_reaper=True)
        self.id = self._node.node_id

    @property
    def _raylet(self) -> subprocess.Popen:
        return self._node.all_processes["raylet"][0].process

    @property
    def up(self) -> bool:
        """Whether its raylet runs."""
        return self._raylet.poll() is None

    def kill(self) -> None:
        """SIGKILL the raylet, as a machine that goes without a word."""
        self._raylet.kill()

    def drain(self, seconds: int) -> None:
        """`ray drain-node`: a spot notice that ends so many seconds from now."""
        command = [
            *(str(Path(sys.executable).parent / "ray"), "drain-node"),
            f"--address={ray.get_runtime_context().gcs_address}",
            f"--node-id={self.id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=a spot notice",
            f"--deadline-remaining-seconds={seconds}",
        ]
        done = subprocess.run(
            command,
            env=os.environ | ON_LOOPBACK,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"the drain was refused:\n{done.stdout}{done.stderr}"

    def close(self) -> None:
        """End what is left of it, by pid."""
        self._node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


def alive() -> set[str]:
    """Ids of the nodes that Ray takes for alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextlib.contextmanager
def further_nodes() -> Iterator[list[LocalNode]]:
    """A list of nodes to add to; all are ended, and known to be, when the block is left.

    The CPUs of the nodes that are there before are taken meanwhile: replicas go to the new ones.
    """

    class Idle:  # local, so that it travels by value
        def up(self) -> None: ...

    before, taken = alive(), []
    for node in ray.nodes():
        if node["Alive"] and (cpus := node["Resources"].get("CPU")):
            taken.append(ray.remote(Idle).options(num_cpus=cpus).remote())
    ray.get([each.up.remote() for each in taken])
    nodes: list[LocalNode] = []
    try:
        yield nodes
    finally:
        for node in nodes:
            node.close()
        for each in taken:
            ray.kill(each)
        wait_until("Ray knows that the nodes are gone", lambda: alive() == before)
