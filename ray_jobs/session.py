"""Connecting to Ray: a cluster where there is one, else an embedded one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from influence.config import Config
from influence.errors import InputError
from influence.signals import stop_signals


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start an embedded one on this machine's cores.

    Raises:
        InputError: the embedded cluster cannot hold one replica of this config.
        InterruptedRunError: SIGTERM or SIGINT arrived inside the block.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined = ray.is_initialized()
    embedded = not joined and "RAY_ADDRESS" not in os.environ
    if not joined:
        # The embedded cluster has no dashboard and listens on loopback only.
        local: dict[str, Any] = (
            {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if embedded else {}
        )
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **local)
    try:
        if embedded:
            _check_room(config)
        with stop_signals():  # again: ray.init has put its own SIGTERM handler in place
            yield
    finally:
        if not joined:
            ray.shutdown()


def _check_room(config: Config) -> None:
    """One replica must fit, or the job would wait for ever."""
    have = ray.cluster_resources()
    for key, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        needed = getattr(config.replicas, key)
        if needed > have.get(resource, 0):
            raise InputError(
                f"replicas.{key}: a replica needs {needed:g} {resource}, this machine has "
                f"{have.get(resource, 0):g}: set replicas.{key} to what it has "
                f"(--set replicas.{key}=0 for a machine without a GPU), or set RAY_ADDRESS to a "
                "cluster"
                if resource == "GPU"
                else f"replicas.{key}: a replica needs {needed:g} CPUs, this machine has "
                f"{have.get(resource, 0):g}: --set replicas.{key}={int(have.get(resource, 1))}"
            )
