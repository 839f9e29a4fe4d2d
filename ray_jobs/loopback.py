"""An embedded Ray that listens on loopback only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants

_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def loopback_only() -> Iterator[None]:
    """Inside, a cluster that `ray.init` starts takes 127.0.0.1 for this node's address.

    Ray puts the machine's own address in the place of a given loopback address, unless clusters of
    several nodes are switched off, as they are by default on systems that cannot have them. That
    switch is a constant of this process and a variable of those that it starts. Not for joining a
    cluster.
    """
    before, constant = os.environ.get(_SWITCH), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_SWITCH] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
