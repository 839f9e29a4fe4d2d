"""Storage: what commits and input reading rest on, on a local disk and on a real S3 store."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence import storage, stores
from influence.errors import InputError, StorageError

pytest_plugins = ["s3"]


@pytest.fixture(params=["local", "s3", "gs"])
def base(request, tmp_path):
    """An empty folder on each kind of store."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "gs":
        return request.getfixturevalue("gs_url")
    return storage.join(request.getfixturevalue("s3_url"), uuid.uuid4().hex)


def test_only_the_first_create_wins_and_its_bytes_stay(base):
    url = storage.join(base, "stage", "shard.parquet")
    assert storage.head(url) is None
    assert storage.put_new(url, b"first")
    assert not storage.put_new(url, b"second, longer"), "a second create was taken for a new one"
    assert storage.read_bytes(url) == b"first", "a refused create changed the object"
    info = storage.head(url)
    assert info is not None
    assert info.size == 5


def test_put_overwrites_and_delete_is_idempotent(base):
    url = storage.join(base, "manifest.json")
    storage.put(url, b"one")
    storage.put(url, b"two")
    assert storage.read_bytes(url) == b"two"
    storage.delete(url)
    storage.delete(url)
    assert storage.head(url) is None, "delete left the object"
    assert storage.put_new(url, b"three"), "a deleted object still blocks a create"


def test_replace_needs_the_current_etag(base):
    url = storage.join(base, uuid.uuid4().hex)
    storage.put(url, b"damaged")
    seen = storage.head(url)
    assert seen is not None
    assert storage.replace(url, b"repaired", seen.etag)
    assert not storage.replace(url, b"late", seen.etag), "the ETag was not compared"
    assert storage.read_bytes(url) == b"repaired"
    storage.delete(url)
    assert not storage.replace(url, b"late", seen.etag), "replace created an object"
    assert storage.head(url) is None


def test_replace_on_a_disk_overwrites(tmp_path):
    url = str(tmp_path / "shard")
    storage.put(url, b"damaged")
    assert storage.replace(url, b"repaired", None)
    assert storage.read_bytes(url) == b"repaired"


def test_an_object_above_the_multipart_size_is_still_created_only_once(base):
    data = bytes(range(256)) * (24 * 4096)  # 24 MiB, above obstore's 5 MiB parts
    url = storage.join(base, "large.bin")
    assert storage.put_new(url, data)
    assert not storage.put_new(url, b"x"), "a large object was not protected"
    assert storage.read_bytes(url) == data


def test_list_is_recursive_sorted_and_bound_to_the_folder(base):
    names = ["b/2", "b/10", "a", "b/c/d.bin", "bb/other", "b/with space#%20é.bin"]
    for name in names:
        storage.put(storage.join(base, name), name.encode())
    found = storage.list_objects(storage.join(base, "b"))
    expected = sorted(storage.join(base, n) for n in names if n.startswith("b/"))
    assert [info.url for info in found] == expected, "wrong folder, order or name encoding"
    assert [storage.read_bytes(info.url).decode() for info in found] == [
        url.removeprefix(base + "/") for url in expected
    ]
    assert [info.size for info in found] == [len(storage.read_bytes(i.url)) for i in found]
    assert storage.list_objects(storage.join(base, "nothing")) == []


GLOB_NAMES = [
    "pool/a.parquet",
    "pool/b.parquet",
    "pool/b.jsonl",
    "pool/.hidden.parquet",
    "pool/deep/c.parquet",
    "pool/deep/er/d.parquet",
    "pool/.secret/e.parquet",
    "pool2/f1.parquet",
    "pool2/f2.parquet",
    "pool2/f-.parquet",
]
GLOBS = {
    "pool/*.parquet": ["pool/a.parquet", "pool/b.parquet"],
    "pool/**/*.parquet": [n for n in GLOB_NAMES[:6] if "/." not in n and n.endswith("parquet")],
    "pool/**": [n for n in GLOB_NAMES[:6] if "/." not in n],
    "pool*/?.parquet": ["pool/a.parquet", "pool/b.parquet"],
    "pool2/f[0-9].parquet": ["pool2/f1.parquet", "pool2/f2.parquet"],
    "pool2/f[!0-9].parquet": ["pool2/f-.parquet"],
    "*/deep/**/d.parquet": ["pool/deep/er/d.parquet"],
}


def test_globs_mean_the_same_on_every_store(base):
    for name in GLOB_NAMES:
        storage.put(storage.join(base, name), b"x")
    for pattern, names in GLOBS.items():
        expected = sorted(storage.join(base, name) for name in names)
        assert storage.expand(storage.join(base, pattern)) == expected, pattern
    plain = storage.join(base, "pool/not-there.parquet")
    assert storage.expand(plain) == [plain]
    with pytest.raises(InputError, match=r"nothing-\*\.parquet"):
        storage.expand(storage.join(base, "nothing-*.parquet"))


def test_pyarrow_reads_one_row_group_through_open_input(base):
    table = pa.table({"x": list(range(50_000)), "y": [str(i) for i in range(50_000)]})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=10_000)
    url = storage.join(base, "t.parquet")
    storage.put(url, buffer.getvalue().to_pybytes())
    with pq.ParquetFile(storage.open_input(url)) as parquet:
        assert parquet.read_row_groups([3]).equals(table.slice(30_000, 10_000))
    file = storage.open_input(url)
    file.seek(-4, 2)
    assert bytes(file.read(4)) == b"PAR1", "seek or read of the file object is off"
    storage.put(storage.join(base, "empty"), b"")
    assert bytes(storage.open_input(storage.join(base, "empty")).read()) == b""


def test_missing_objects_are_named(base):
    url = storage.join(base, "gone.jsonl")
    for read in (storage.read_bytes, storage.open_input):
        with pytest.raises(InputError, match=r"gone\.jsonl"):
            read(url)


def test_the_probe_passes_here_and_leaves_nothing(base):
    storage.put(storage.join(base, "kept"), b"x")
    storage.probe_create_only(base)
    assert [info.url for info in storage.list_objects(base)] == [storage.join(base, "kept")]


def test_the_probe_reports_a_store_that_overwrites(tmp_path, monkeypatch):
    def careless(url: str, data: bytes) -> bool:
        storage.put(url, data)
        return True

    monkeypatch.setattr(storage, "put_new", careless)
    with pytest.raises(StorageError, match="create-only"):
        storage.probe_create_only(str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "the probe's object stayed behind"


@pytest.mark.parametrize(
    "url", ["s3://AKIA1:hunter2@bucket/key", "s3://AKIA1:hunt/er2@bucket/key", "gs://u:hunter2@b/k"]
)
@pytest.mark.parametrize("call", [storage.read_bytes, storage.head, storage.expand])
def test_credentials_in_a_url_are_refused_and_not_repeated(url, call):
    with pytest.raises(InputError, match="credentials") as caught:
        call(url)
    assert "hunt" not in str(caught.value), "the secret is echoed"
    assert "AKIA1" not in str(caught.value), "the key id is echoed"


@pytest.mark.parametrize("url", ["ftp://host/file", "s3://", "s3://bucket", "s3:///key", ""])
def test_unusable_urls_are_input_errors(url):
    with pytest.raises(InputError):
        storage.read_bytes(url)


@pytest.mark.parametrize("call", [storage.read_bytes, storage.probe_create_only])
def test_a_wrong_endpoint_fails_in_seconds_naming_bucket_and_endpoint(s3_url, monkeypatch, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"'pool'.*http://127\.0\.0\.1:9") as caught:
        call(s3_url + "/x")
    assert time.monotonic() - started < 25, "retries are not bounded"
    assert "never-shown" not in str(caught.value)
    assert caught.value.exit_code == 2


class Failing(BaseHTTPRequestHandler):
    """Knows every object's size, and fails whoever reads or writes one."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def failing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose store answers 503."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(stores._RETRY, "max_retries", 1)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    environment = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield "s3://bucket-that-fails"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "call",
    [
        lambda url: storage.read_bytes(url),
        lambda url: storage.open_input(url).read(10),
        lambda url: storage.put(url, b"x"),
    ],
    ids=["read", "reader", "put"],
)
def test_a_store_that_fails_is_no_bad_input(failing_store, call):
    with pytest.raises(StorageError, match=r"'bucket-that-fails'.*503"):
        call(f"{failing_store}/x")


def test_http_is_refused_where_the_environment_says_so(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(InputError, match="AWS_ALLOW_HTTP"):
        storage.read_bytes(s3_url + "/x")


@pytest.mark.parametrize(
    "call",
    [
        lambda url: storage.read_bytes(url),
        lambda url: storage.put_new(url, b"x"),
        lambda url: storage.list_objects(url),
    ],
    ids=["read", "create", "list"],
)
def test_a_missing_bucket_and_a_wrong_key_are_told_apart(s3_url, monkeypatch, call):
    with pytest.raises(InputError, match=r"'no-such-bucket'.*does not exist"):
        call("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(InputError, match=r"'pool'.*refused access") as caught:
        call(s3_url + "/x")
    assert "wrong-secret" not in str(caught.value)
    assert caught.value.__cause__ is None, "the store's raw text, which may hold keys, is chained"


def test_join_keeps_schemes_and_roots():
    assert storage.join("s3://b", "x", "y") == "s3://b/x/y"
    assert storage.join("s3://b/p/", "/x/", "") == "s3://b/p/x"
    assert storage.join("/", "x") == "/x"
    assert storage.join("", "x") == "x"
