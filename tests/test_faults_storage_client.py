"""One operation on a store that fails: how long it is tried, and that its result is whole."""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Iterator

import pytest
from flaky_proxy import FlakyProxy, flaky_proxy
from s3 import S3Server

from influence import storage, stores
from influence.errors import StorageError


@pytest.fixture
def base(s3_url: str) -> str:
    """A folder of this test's own."""
    return f"{s3_url}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FlakyProxy]:
    """Before the store; the client's own retries are off, so that what is left can be seen."""
    monkeypatch.setitem(stores._RETRY, "max_retries", 0)
    monkeypatch.setattr(stores, "_PAUSE_SECONDS", 0.01)
    with flaky_proxy(s3_server.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        yield between


def test_a_store_that_never_answered_is_not_waited_for(base: str, proxy: FlakyProxy) -> None:
    proxy.shares = {"refused": 1.0}
    with pytest.raises(StorageError, match="503"):
        storage.head(base + "/x")
    assert proxy.counts == {"refused": 1}


def test_one_that_has_answered_is_waited_for_and_not_for_ever(
    base: str, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(base + "/x", b"data")
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 1.0)
    proxy.shares = {"refused": 1.0}
    began = time.monotonic()
    with pytest.raises(StorageError, match="503"):
        storage.read_bytes(base + "/x")
    assert 1.0 < time.monotonic() - began < 10.0
    assert proxy.counts["refused"] > 5, "given up at once"
    proxy.shares = {"refused": 0.7}
    assert storage.read_bytes(base + "/x") == b"data"


@pytest.mark.parametrize("kind", ["refused", "lost", "hung up", "cut"])
def test_every_operation_comes_through(base: str, proxy: FlakyProxy, kind: str) -> None:
    data = bytes(range(256)) * 400
    storage.put(f"{base}/a", data)
    proxy.shares = {kind: 0.5}
    for number in range(6):
        assert storage.read_bytes(f"{base}/a") == data
        assert [info.url for info in storage.list_objects(base)] == [f"{base}/a"]
        created = storage.put_new(f"{base}/b", data)
        assert created or kind in ("lost", "hung up"), "its own object was taken for another's"
        found = storage.load(f"{base}/b")
        assert found is not None
        assert found[0] == data
        new = b"%d" % number
        replaced = storage.replace(f"{base}/b", new, found[1].etag)
        assert replaced or kind in ("lost", "hung up")
        assert storage.read_bytes(f"{base}/b") == new, "it was not replaced"
        assert not storage.replace(f"{base}/b", b"late", found[1].etag)
        storage.delete(f"{base}/b")
        assert storage.head(f"{base}/b") is None
        storage.probe_create_only(base)
    assert proxy.counts[kind] > 30, "test too weak"


def test_a_file_is_read_on_where_it_broke_off(base: str, proxy: FlakyProxy) -> None:
    data = b"".join(i.to_bytes(4, "big") for i in range(1_500_000))
    storage.put(f"{base}/large", data)
    proxy.shares = {"cut": 0.3, "refused": 0.2}
    file, found = storage.open_input(f"{base}/large"), io.BytesIO()
    while piece := file.read(300_001):
        found.write(piece)
    assert found.getvalue() == data, "bytes were skipped, or read twice"
    file.seek(-5_000_000, 2)
    assert file.read(10) == data[-5_000_000:][:10]
    assert sum(proxy.counts[kind] for kind in proxy.shares) > 3, "test too weak"
