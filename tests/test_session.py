"""The embedded Ray of a run on one machine."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os
from types import SimpleNamespace

import psutil

from ray_jobs.session import ray_session

config = SimpleNamespace(replicas=SimpleNamespace(num_cpus=1, num_gpus=0))
with ray_session(config):
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                print(each.laddr.ip)
print("switch", os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"))
"""


def test_it_listens_on_loopback_only(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=180, check=True
    )
    *addresses, switch = done.stdout.split("\n")[:-1]
    assert addresses, "nothing listens: this is no Ray"
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, (
        f"open to the network: {sorted(set(addresses))}"
    )
    assert switch == "switch None", "a cluster that is joined later would be taken for a local one"
