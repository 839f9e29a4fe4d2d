"""An embedded Ray that listens on loopback only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants

_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Of the process groups that workers make with torch.
    "GLOO_SOCKET_IFNAME": _INTERFACE,
    "NCCL_SOCKET_IFNAME": _INTERFACE,
}


@contextmanager
def loopback_only() -> Iterator[None]:
    """Inside, a cluster that `ray.init` starts takes 127.0.0.1 for this node's address.

    Ray puts the machine's own address in the place of a given loopback address, unless clusters of
    several nodes are switched off, as they are by default on systems that cannot have them. That
    switch is a constant of this process and a variable of those that it starts. Not for joining a
    cluster.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(_VARIABLES)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
