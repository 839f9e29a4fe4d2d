"""Everything in gs://, on a stand-in for Google Cloud Storage: the same results as on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from gcs import BUCKET, TOKEN
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config

from influence import storage
from influence.errors import InputError, StorageError
from influence.one_process import run_select


def test_a_run_in_gs_equals_one_on_a_disk(setup: Setup, tmp_path: Path, gs_url: str) -> None:
    local = tiny_config(setup, tmp_path / "local")
    run_select(local, quiet=True)
    for path in (setup.folder / "pool").iterdir():
        storage.put(f"{gs_url}/pool/{path.name}", path.read_bytes())
    targets = {}
    for name, target in setup.targets.items():
        targets[name] = {**target, "path": f"{gs_url}/{name}.jsonl"}
        storage.put(targets[name]["path"], Path(target["path"]).read_bytes())
    remote = tiny_config(
        setup,
        f"{gs_url}/runs/tiny",
        cache=f"{gs_url}/cache",
        data__candidates=[f"{gs_url}/pool/*"],
        targets=targets,
    )
    run_select(remote, quiet=True)
    assert_same_results(local.run, remote.run, "the store changed the result")
    key = next(iter(manifest_of(remote.run).stages["embedding"].planned))
    storage.put(f"{gs_url}/cache/{key}", b"")
    run_select(remote, quiet=True)
    stages = manifest_of(remote.run).stages
    assert sum(stage.computed for stage in stages.values()) == 1, "shards were not reused"
    assert stages["embedding"].damaged == 1
    assert_same_results(local.run, remote.run, "a run on reused shards differs")
    names = ("config.yaml", "manifest.json", "report.html", "driver.json")
    written = b"".join(storage.read_bytes(f"{remote.run}/{name}") for name in names)
    assert TOKEN.encode() not in written, "a credential was written into the run"


def test_errors_name_the_bucket_and_what_google_calls_things(
    gs_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"'no-such-bucket' at http://127.*does not exist"):
        storage.list_objects("gs://no-such-bucket/x")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "wrong-and-never-shown")
    refusal = rf"'{BUCKET}'.*refused access.*GOOGLE_APPLICATION_CREDENTIALS"
    with pytest.raises(InputError, match=refusal) as caught:
        storage.read_bytes(f"{gs_url}/x")
    assert "never-shown" not in str(caught.value)
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    away = rf"'{BUCKET}' at http://127\.0\.0\.1:9 cannot be reached.*GOOGLE_BASE_URL"
    with pytest.raises(StorageError, match=away):
        storage.read_bytes(f"{gs_url}/x")
