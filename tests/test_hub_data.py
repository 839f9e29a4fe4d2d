"""Candidates and targets on the hub: the same rows as on a disk, one commit for the whole job."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import TOKEN, Hub
from huggingface_hub import constants, hf_hub_download
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config

from influence import hub_files, storage
from influence.candidates import read_examples, scan_files, short_names
from influence.errors import InputError, StorageError
from influence.one_process import run_select

NAME = "owner/pool"
LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(autouse=True)
def hub(data_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, and no long pauses between attempts."""
    monkeypatch.setattr(hub_files, "_PAUSE_SECONDS", 0.01)
    return data_hub


def test_a_run_from_the_hub_equals_one_from_a_disk(setup: Setup, hub: Hub, tmp_path: Path) -> None:
    pool = setup.folder / "pool"
    files = {f"data/{path.name}": path.read_bytes() for path in pool.iterdir()}
    for name, target in setup.targets.items():
        files[f"targets/{name}.jsonl"] = Path(target["path"]).read_bytes()
    hub.commit(NAME, files)
    local = tiny_config(setup, tmp_path / "local", cache=str(tmp_path / "cache"))
    run_select(local, quiet=True)
    targets = {
        name: {**target, "path": f"hf://datasets/{NAME}/targets/{name}.jsonl"}
        for name, target in setup.targets.items()
    }
    config = tiny_config(
        setup,
        tmp_path / "hub",
        data__candidates=[f"hf://datasets/{NAME}/data/*.parquet", f"hf://datasets/{NAME}/**/b.*"],
        targets=targets,
    )
    run_select(config, quiet=True)
    assert_same_results(local.run, config.run, "rows from the hub are not those on the disk")
    moved = config.model_copy(update={"run": str(tmp_path / "moved"), "cache": local.cache})
    run_select(moved, quiet=True)
    stages = manifest_of(moved.run).stages.values()
    assert sum(stage.computed for stage in stages) == 0, "moving files to the hub made new shards"
    assert_same_results(local.run, moved.run, "a run on reused shards differs")


def test_globs_on_the_hub_mean_what_they_mean_elsewhere(hub: Hub) -> None:
    names = ["a.jsonl", "data/b.jsonl", "data/deep/c.jsonl", "data/.hidden.jsonl", "data/d e.jsonl"]
    commit = hub.commit(NAME, dict.fromkeys(names, LINE))
    base = f"hf://datasets/{NAME}@{commit}"

    def expanded(pattern: str) -> list[str]:
        return [url.removeprefix(base + "/") for url in storage.expand(pattern)]

    at = f"hf://datasets/{NAME}"
    assert expanded(f"{at}/*.jsonl") == ["a.jsonl"]
    assert expanded(f"{at}/data/*.jsonl") == ["data/b.jsonl", "data/d e.jsonl"]
    assert expanded(f"{at}@main/data/**/*.jsonl") == [names[1], names[4], names[2]]
    assert expanded(f"{at}/data/b.jsonl") == ["data/b.jsonl"]
    assert [storage.read_bytes(url) for url in storage.expand(f"{at}/data/d*.jsonl")] == [LINE]
    for pattern in ("no*.jsonl", "nothing/here/*.jsonl"):
        with pytest.raises(InputError, match="no file matches"):
            storage.expand(f"{at}/{pattern}")


def test_a_branch_that_moves_does_not_move_a_job(hub: Hub) -> None:
    hub.commit(NAME, {"a.jsonl": LINE * 2})
    (file,) = scan_files([f"hf://datasets/{NAME}/a.jsonl"])
    hub.commit(NAME, {"a.jsonl": LINE * 3})
    assert file.rows == len(read_examples(file, 0, 1)) == 2
    (now,) = scan_files([f"hf://datasets/{NAME}/a.jsonl"])
    assert now.rows == 3, "a new job does not see the new commit"
    assert now.url != file.url


@pytest.mark.parametrize(
    "revision", ["refs/convert/parquet", "refs%2Fconvert%2Fparquet", "topic%2Fnew", "v1"]
)
def test_revisions_with_slashes(hub: Hub, revision: str) -> None:
    hub.commit(NAME, {"a.jsonl": LINE})
    other = hub.commit(NAME, {"a.jsonl": LINE * 5}, revision.replace("%2F", "/"))
    (url,) = storage.expand(f"hf://datasets/{NAME}@{revision}/a.jsonl")
    assert url == f"hf://datasets/{NAME}@{other}/a.jsonl"
    assert storage.read_bytes(f"hf://datasets/{NAME}@{revision}/a.jsonl") == LINE * 5


def test_a_file_is_downloaded_once_and_then_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(NAME, {"a.jsonl": LINE * 4, "empty.jsonl": b"", "named.jsonl": LINE})
    at = f"hf://datasets/{NAME}"
    (file,) = scan_files([f"{at}/a.jsonl", f"{at}/empty.jsonl"])
    asked = hub.asked.copy()
    assert len(read_examples(file, 1, 3)) == 3
    assert hub.asked == asked, "every read asks the hub again"
    hf_hub_download(NAME, "named.jsonl", repo_type="dataset")  # by branch, as people do
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert scan_files([file.url]) == [file]
    assert scan_files([f"{at}/named.jsonl"])[0].rows == 1, "a cached branch is not known offline"
    for missing in (f"{at}/b.jsonl", file.url.replace("a.jsonl", "b.jsonl")):
        with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*does not have this file"):
            scan_files([missing])
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*name the files one by one"):
        scan_files([f"{at}/*.jsonl"])


def test_what_is_missing_or_closed_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(NAME, {"a.jsonl": LINE})
    hub.commit("owner/closed", {"a.jsonl": LINE})
    hub.gated.add("owner/closed")
    for url, message in {
        "hf://datasets/owner/none/a.jsonl": "no dataset 'owner/none', or it is private.*HF_TOKEN",
        "hf://datasets/owner/a--b/a.jsonl": "no name of a dataset",
        f"hf://datasets/{NAME}@v9/a.jsonl": "no revision 'v9'",
        f"hf://datasets/{NAME}/b.jsonl": "no file of this name",
        "hf://datasets/owner/closed/a.jsonl": "is gated: ask for access.*HF_TOKEN",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            scan_files([url])
        assert caught.value.exit_code == 2
        assert caught.value.__cause__ is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert scan_files(["hf://datasets/owner/closed/a.jsonl"])[0].rows == 1


@pytest.mark.parametrize(
    "url",
    [
        "hf://models/owner/name/a.jsonl",
        "hf://owner/name/a.jsonl",
        "hf://datasets/name",
        "hf://datasets/owner/name",
        "hf://datasets/owner/name@/a.jsonl",
        "hf://datasets//name/a.jsonl",
    ],
)
def test_other_urls_of_the_hub_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected hf://datasets/OWNER/NAME/PATH"):
        storage.read_bytes(url)


def test_the_hub_is_read_only() -> None:
    url = f"hf://datasets/{NAME}/out"
    for write in (
        lambda: storage.put(url, b"x"),
        lambda: storage.put_new(url, b"x"),
        lambda: storage.list_objects(url),
        lambda: storage.delete(url),
    ):
        with pytest.raises(InputError, match="read only"):
            write()


def test_a_token_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="HF_TOKEN") as caught:
        storage.read_bytes("hf://user:hunter2@datasets/owner/name/a.jsonl")
    assert "hunter2" not in str(caught.value)


def test_a_hub_that_fails_for_a_while_is_asked_again(hub: Hub) -> None:
    hub.commit(NAME, {"a.jsonl": LINE})
    hub.fails = 2
    assert scan_files([f"hf://datasets/{NAME}/a.jsonl"])[0].rows == 1
    hub.fails = 1000
    with pytest.raises(StorageError, match=r"the hub \(http://127.*503"):
        scan_files([f"hf://datasets/{NAME}/b.jsonl"])


def test_a_hub_that_is_not_there_is_a_failing_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot be reached \(http://127\.0\.0\.1:9") as caught:
        scan_files([f"hf://datasets/{NAME}/a.jsonl"])
    assert "HF_ENDPOINT" in str(caught.value)


def test_rows_without_an_id_are_not_called_by_a_commit(hub: Hub) -> None:
    for name in ("owner/one", "owner/two"):
        hub.commit(name, {"train.jsonl": LINE})
    urls = [f"hf://datasets/{name}/train.jsonl" for name in ("owner/one", "owner/two")]
    found = [url for each in urls for url in storage.expand(each)]
    assert sorted(short_names(found).values()) == ["one/train.jsonl", "two/train.jsonl"]
