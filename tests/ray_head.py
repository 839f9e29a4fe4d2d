"""A Ray head on loopback with token authentication; started and ended by pid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from s3 import free_ports

ROOT = Path(__file__).parent.parent
START_SECONDS = 90.0
CLI_SECONDS = 240
_COMMANDS = (
    *("initialization", "setup", "head_setup", "worker_setup"),
    *("head_start_ray", "worker_start_ray"),
)
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Head:
    """Where job server and control store are, and what a client has in its environment."""

    process: subprocess.Popen
    address: str
    gcs: str
    token: str
    environment: dict[str, str]

    def cli(self, *arguments: str) -> subprocess.CompletedProcess:
        """`ray job ARGUMENTS`, as a user types it; stdout and stderr together."""
        return self.ray("job", *arguments)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess:
        """`ray ARGUMENTS`; stdout and stderr together."""
        return subprocess.run(
            [_ray(), *arguments],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CLI_SECONDS,
            check=False,
        )

    def ask(
        self, method: str, path: str, body: object = None, token: str | None = ""
    ) -> tuple[int, str]:
        """(status, text) of one request; `token`: "" for the right one, None for none at all."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data=data, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def job(self, submission: str) -> dict[str, Any]:
        """What the job server knows of a submission."""
        status, text = self.ask("GET", f"/api/jobs/{submission}")
        assert status == 200, f"no information on {submission}: {status} {text}"
        return json.loads(text)

    def logs(self, submission: str) -> str:
        """The driver's output so far."""
        status, text = self.ask("GET", f"/api/jobs/{submission}/logs")
        assert status == 200, f"no logs of {submission}: {status} {text}"
        return json.loads(text)["logs"]

    def ended(self, submission: str, seconds: float) -> dict[str, Any]:
        """The same as `job`, once it has ended."""
        deadline = time.monotonic() + seconds
        while (info := self.job(submission))["status"] not in ENDED:
            assert time.monotonic() < deadline, (
                f"{submission} is {info['status']} after {seconds} s:\n{self.logs(submission)}"
            )
            time.sleep(0.05)
        return info

    def actors(self) -> list[psutil.Process]:
        """The actors of jobs (not Ray's own): what may still commit a shard."""
        found = []
        for process in _children(self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                if re.search("ReplicaActor|ReducerActor", " ".join(process.cmdline())):
                    found.append(process)
        return found

    def nodes(self) -> int:
        """Raylets that run here beside the head's own."""
        count = -1
        for process in _children(self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                count += process.name() == "raylet"
        return count

    def listening(self) -> set[str]:
        """The addresses that any process of this cluster listens on."""
        found: set[str] = set()
        for process in [psutil.Process(self.process.pid), *_children(self.process)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                open_ones = process.net_connections("tcp")
                found |= {c.laddr.ip for c in open_ones if c.status == psutil.CONN_LISTEN}
        return found


def _ray() -> str:
    return str(Path(sys.executable).parent / "ray")


def _children(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _environment(folder: Path, token_file: Path, metrics_port: int) -> dict[str, str]:
    """The tests' own, so that `python -m ray_jobs.select` means this interpreter and this tree."""
    hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    return environment | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Loopback only, on Linux too; Ray replaces `--node-ip-address=127.0.0.1` by another one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # As in the image: a busy machine may need more than the 3 s before a job is killed.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_METRIC_PORT": str(metrics_port),
    }


def _command(folder: Path, ports: list[int], cpus: int, job_server: bool) -> list[str]:
    names = [
        "port",
        "dashboard-port",
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "runtime-env-agent-port",
    ]
    return [
        _ray(),
        "start",
        "--head",
        "--block",
        "--dashboard-host=127.0.0.1",
        f"--include-dashboard={str(job_server).lower()}",
        f"--num-cpus={cpus}",
        "--num-gpus=0",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
        *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
    ]


def _autoscaling(folder: Path, gcs: str, types: dict[str, Any], idle: float) -> dict[str, str]:
    """Writes the autoscaler's config; returns what the head needs in its environment.

    The nodes are further raylets here (`FakeMultiNodeProvider`). It has to be named as an external
    provider: Ray's own entry for it reads a file that is not in the wheel.
    """
    config = {
        "cluster_name": "local",
        "max_workers": sum(each["max_workers"] for each in types.values()),
        "idle_timeout_minutes": idle / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            **types,
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        # An external provider has no defaults.
        "auth": {},
        "cluster_synced_files": [],
        "file_mounts": {},
        **{f"{name}_commands": [] for name in _COMMANDS},
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))
    return {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_enable_autoscaler_v2": "1",
    }


def _wait_until_it_answers(head: Head, log: Path, job_server: bool) -> None:
    deadline = time.monotonic() + START_SECONDS
    host, port = head.gcs.split(":")
    while True:
        with contextlib.suppress(OSError):
            if not job_server:
                socket.create_connection((host, int(port)), timeout=5).close()
                if head.nodes() == 0:
                    return
            elif head.ask("GET", "/api/jobs/")[0] == 200:
                return
        ended = head.process.poll()
        if ended is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the head did not start (exit code {ended}):\n{tail}")
        time.sleep(0.1)


@contextlib.contextmanager
def running_head(
    *, job_server: bool = True, autoscaled: dict[str, Any] | None = None, idle: float = 60.0
) -> Iterator[Head]:
    """A head of two CPUs; when the block is left, it and whatever it started are ended by pid.

    Args:
        job_server: whether jobs can be submitted to it.
        autoscaled: node types of an autoscaler, by name; the head has no CPUs then.
        idle: seconds after which the autoscaler takes an idle node away.
    """
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: Ray's sockets have their paths below it
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token = secrets.token_hex(16)
    token_file.write_text(token)
    *ports, metrics_port = free_ports(8)
    gcs = f"127.0.0.1:{ports[0]}"
    environment = _environment(folder, token_file, metrics_port)
    command = _command(folder, ports, 0 if autoscaled else 2, job_server)
    extra: dict[str, str] = {}
    if autoscaled:
        extra = _autoscaling(folder, gcs, autoscaled, idle)
        command.append(f"--autoscaling-config={folder / 'autoscaling.json'}")
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment | extra, cwd=ROOT
        )
    head = Head(process, f"http://127.0.0.1:{ports[1]}", gcs, token, environment)
    try:
        _wait_until_it_answers(head, log, job_server)
        yield head
    finally:
        children = _children(process)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        _, alive = psutil.wait_procs(children, timeout=5)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        process.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)
