"""Connecting to Ray: a cluster where there is one, else an embedded one."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ray

from influence.config import Config
from influence.errors import InputError
from influence.signals import stop_signals
from ray_jobs.loopback import loopback_only

_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"


@contextmanager
def ray_session(config: Config, copies: int = 1) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start an embedded one on this machine's cores.

    Raises:
        InputError: the embedded cluster cannot hold so many replicas of this config at once.
        InterruptedRunError: SIGTERM or SIGINT arrived inside the block (as KeyboardInterrupt).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined = ray.is_initialized()
    embedded = not joined and not os.environ.get("RAY_ADDRESS")
    with stop_signals() as listen_again:
        try:
            if not joined:
                _connect(embedded, listen_again)
            if embedded:
                _check_room(config, copies)
            yield
        finally:
            if not joined:
                ray.shutdown()


def _connect(embedded: bool, listen_again: Callable[[], None]) -> None:
    local: dict[str, Any] = {}
    listening: AbstractContextManager[None] = nullcontext()
    if embedded:
        listening = loopback_only()
        # "local": a cluster of somebody else that happens to run on this machine is not joined.
        # The embedded one has no dashboard and listens on loopback only.
        local = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Its line on token authentication (which stays as it is) is for clusters on a network.
        logging.getLogger(_TOKEN_LOGGER).setLevel(logging.ERROR)
    try:
        with listening:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **local)
    except SystemExit as stopped:
        if stopped.code != signal.SIGTERM:
            raise
        # ray.init puts its own SIGTERM handler in place before it does anything else.
        listen_again()
        signal.raise_signal(signal.SIGTERM)
    listen_again()


def _check_room(config: Config, copies: int) -> None:
    """All copies that are needed at once must fit, or the job would wait for ever."""
    have = ray.cluster_resources()
    for key, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        each, there = getattr(config.replicas, key), have.get(resource, 0)
        if copies * each <= there:
            continue
        who = "a replica needs" if copies == 1 else f"{copies} workers need"
        unit = "CPUs" if resource == "CPU" else resource
        lack = f"replicas.{key}: {who} {copies * each:g} {unit}, this machine has {there:g}: "
        if resource == "CPU":
            fits = int(have.get(resource, 1)) // copies
            raise InputError(lack + (f"--set replicas.{key}={fits}" if fits else _FEWER))
        raise InputError(
            f"{lack}set replicas.{key} to what it has (--set replicas.{key}=0 for a machine "
            "without a GPU), or set RAY_ADDRESS to a cluster"
        )


_FEWER = "set finetune.workers to that, or RAY_ADDRESS to a cluster"
