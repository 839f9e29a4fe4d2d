"""`influence export`: the cache's vectors, bit for bit, for tools that know nothing of it."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import (
    POOL_ROWS,
    UNSCORABLE,
    Setup,
    manifest_of,
    scores_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence import storage
from influence.cache import Cache, Shard
from influence.cli import main
from influence.config import Config
from influence.errors import InputError
from influence.one_process import run_select
from influence.pipeline import catalogue_units, prepare
from influence.progress import Progress
from influence.run_log import RunLog
from influence.schemas import ExportLayout
from influence.shard_reader import READERS, read_catalogue
from influence.vector_export import Exported, export_vectors

#: Rows of the pool without a vector: duplicates have that of their messages.
WITHOUT = sum(UNSCORABLE.values()) - UNSCORABLE["duplicate"]
COMMAND = "influence select job.yaml"


def export(config: Config, stage: str, out: Path | str, **options: Any) -> Exported:
    return export_vectors(config, stage, str(out), command=COMMAND, **options)


def tables(folder: Path | str) -> list[pa.Table]:
    urls = [info.url for info in storage.list_objects(str(folder))]
    return [pq.read_table(pa.BufferReader(storage.read_bytes(url))) for url in urls]


def layout(table: pa.Table) -> ExportLayout:
    return ExportLayout.model_validate_json(table.schema.metadata[b"influence"])


def vectors(table: pa.Table) -> np.ndarray:
    """As a user's tool would read them."""
    return np.stack(table.column("vector").to_numpy())


def pool_ids(config: Config) -> list[str]:
    """Ids of the pool's rows as the catalogue has them, in file order."""
    job = prepare(config, Progress(quiet=True), RunLog.unsaved(config.run, config.method))
    pool, _ = catalogue_units(job)
    return read_catalogue(job.cache, pool, drop_duplicates=False).ids


def assert_equals_the_cache(config: Config, exported: list[pa.Table]) -> None:
    """Every file holds the rows of one shard that have a vector, to the bit."""
    for table in exported:
        facts = layout(table)
        shard = Cache(config.cache_url).read(facts.shard)
        assert shard.layout.model_dump() == facts.model_dump(
            include={"dtype", "dim", "blocks", "sizes"}
        )
        position = {row: i for i, row in enumerate(shard.table.column("row").to_pylist())}
        where = [position[row] for row in table.column("row").to_pylist()]
        found, expected = vectors(table), shard.vectors()[where]
        assert found.dtype == expected.dtype, "the vectors changed their type"
        assert found.tobytes() == expected.tobytes(), f"{facts.shard}: vectors differ in some bit"
        for name in ("norm", "n_tokens", "source"):
            original = shard.table.column(name).take(pa.array(where))
            assert table.column(name).to_pylist() == original.to_pylist(), f"{name} is misplaced"
        assert table.schema.field("vector").type == pa.list_(
            pa.field("element", pa.from_numpy_dtype(facts.dtype), nullable=False), facts.dim
        )


@pytest.fixture(scope="module")
def done(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with uniform landmarks."""
    config = tiny_config(setup, tmp_path_factory.mktemp("done") / "run")
    run_select(config, quiet=True)
    return config


@pytest.fixture
def copied(done: Config, tmp_path: Path) -> Config:
    """The same run with a cache that may be damaged."""
    shutil.copytree(done.cache_url, tmp_path / "cache")
    return done.model_copy(update={"cache": str(tmp_path / "cache")})


def test_embeddings_equal_the_cache_and_ids_the_catalogue(done: Config, tmp_path: Path) -> None:
    exported = export(done, "embedding", tmp_path / "out")
    files = tables(tmp_path / "out" / "candidates")
    assert exported.files == len(files)
    assert_equals_the_cache(done, files)
    whole = pa.concat_tables(files)
    assert exported.rows == {"candidates": whole.num_rows}
    assert whole.num_rows == POOL_ROWS - WITHOUT, "not all rows with a vector, or rows without one"
    assert sum(exported.left_out.values()) == WITHOUT, "rows without a vector are not counted"
    assert exported.left_out["no assistant turn"] == 1, "not counted by reason"
    ids = pool_ids(done)
    offset = {"a.parquet": 0, "b.jsonl": 40}
    expected = [
        ids[offset[r["file"]] + r["row"]] for r in whole.select(["file", "row"]).to_pylist()
    ]
    assert whole.column("id").to_pylist() == expected, "ids are not those of the results"
    assert [ids.index(each) for each in expected] == sorted(ids.index(e) for e in expected), (
        "files in the order of their names are not in the pool's order"
    )
    known = {row["id"] for row in scores_of(done.run).to_pylist() if row["score"] is not None}
    assert known <= set(expected), "a scored row was not exported"
    lengths = np.linalg.norm(vectors(whole).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-2, err_msg="embeddings are no unit rows")


@pytest.mark.parametrize("projection", ["kronecker", "none"])
def test_gradients_of_every_row_and_of_the_targets(
    setup: Setup, tmp_path: Path, projection: str
) -> None:
    config = tiny_config(
        setup,
        tmp_path / "run",
        method="exact",
        gradients__projection=projection,
        gradients__blocks="last 1",
    )
    run_select(config, quiet=True)
    exported = export(config, "gradients", tmp_path / "out")
    assert exported.rows == {
        "candidates": POOL_ROWS - WITHOUT,
        "targets/sums": 5,
        "targets/mixed": 6,
    }
    for folder in exported.rows:
        assert_equals_the_cache(config, tables(tmp_path / "out" / folder))
    sums = pa.concat_tables(tables(tmp_path / "out" / "targets" / "sums"))
    assert sums.column("id").to_pylist() == [f"sums{i}" for i in range(5)]
    facts = layout(sums)
    assert facts.fingerprint in {key.split("/")[1] for key in shards_in(config.cache_url)}
    assert facts.values["projection"] == projection, "not said what the vectors are"
    if projection == "none":
        assert sum(length for _, _, length in facts.blocks) == facts.dim, "layers are not described"
        np.testing.assert_allclose(
            np.linalg.norm(vectors(sums), axis=1),
            sums.column("norm").to_numpy(),
            rtol=1e-4,
            err_msg="gradients are not what they were before normalising",
        )


@pytest.mark.parametrize("choose", ["uniform", "certified"])
def test_gradients_of_a_run_that_chose_its_rows(setup: Setup, tmp_path: Path, choose: str) -> None:
    changes = {"landmarks__choose": choose, "landmarks__initial": 8, "landmarks__count": 30}
    config = tiny_config(setup, tmp_path / "run", **changes)
    run_select(config, quiet=True)
    exported = export(config, "gradients", tmp_path / "out")
    files = tables(tmp_path / "out" / "candidates")
    assert_equals_the_cache(config, files)
    ids = pa.concat_tables(files).column("id").to_pylist()
    rows = scores_of(config.run).to_pylist()
    assert set(ids) == {row["id"] for row in rows if row["exact"]}, "not the rows that are exact"
    assert len(ids) == len(set(ids)), "a row stands twice"
    assert exported.rows["targets/mixed"] == 6


def test_rows_of_several_choices_stand_once(setup: Setup, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for count in (10, 24):  # each in a cache of its own: their shards share rows
        apart = tiny_config(setup, tmp_path / f"run{count}", landmarks__count=count)
        run_select(apart, quiet=True)
        shutil.copytree(apart.cache_url, cache, dirs_exist_ok=True)
    config = tiny_config(setup, tmp_path / "run", landmarks__count=40, cache=str(cache))
    run_select(config, quiet=True)
    exported = export(config, "gradients", tmp_path / "out")
    assert exported.repeated, "no shard shares a row with another: the test shows nothing"
    files = tables(tmp_path / "out" / "candidates")
    ids = pa.concat_tables(files).column("id").to_pylist()
    assert len(ids) == len(set(ids)), "a row stands twice"
    assert {r["id"] for r in scores_of(config.run).to_pylist() if r["exact"]} <= set(ids)
    assert_equals_the_cache(config, files)


def test_rds_embeds_the_targets_too(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", method="rds")
    run_select(config, quiet=True)
    exported = export(config, "embedding", tmp_path / "out")
    assert exported.rows["targets/sums"] == 5
    assert_equals_the_cache(config, tables(tmp_path / "out" / "targets" / "sums"))


def test_a_missing_shard_is_refused_or_counted(
    copied: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = sorted(key for key in shards_in(copied.cache_url) if key.startswith("embedding/"))
    Path(copied.cache_url, keys[1]).unlink()
    path = write_config(tmp_path / "job.yaml", copied)
    arguments = ["export", path, "--stage", "embedding", "--out", str(tmp_path / "out")]
    setting = "landmarks.count=20"  # changes no embedding
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--set", setting])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{len(keys) - 1} of {len(keys)} shards" in error, error
    assert f"influence select {path} --set {setting}" in error, "the command is not named"
    assert not (tmp_path / "out").exists(), "a refused export wrote files"
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--partial"])
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    assert "missing or damaged: 1" in shown.out, "what is missing is not said"
    assert "left out: " in shown.out
    found = {layout(table).shard for table in tables(tmp_path / "out")}
    assert found == set(keys) - {keys[1]}, "--partial did not export what is there"


def test_a_damaged_shard_is_named(copied: Config, tmp_path: Path) -> None:
    keys = sorted(key for key in shards_in(copied.cache_url) if key.startswith("embedding/"))
    path = Path(copied.cache_url, keys[2])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=keys[2]):
        export(copied, "embedding", tmp_path / "out")
    exported = export(copied, "embedding", tmp_path / "partial", partial=True)
    assert exported.missing == 1, "a damaged shard is not counted"
    assert {layout(t).shard for t in tables(tmp_path / "partial")} == set(keys) - {keys[2]}


def test_a_folder_in_use_is_left_alone(done: Config, tmp_path: Path) -> None:
    (tmp_path / "part-000000.parquet").write_bytes(b"of an earlier export")
    with pytest.raises(InputError, match="empty or new"):
        export(done, "embedding", tmp_path)
    assert (tmp_path / "part-000000.parquet").read_bytes() == b"of an earlier export"


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("embedding", {"method": "exact"}, "--set method=influence_distillation"),
        ("embedding", {"method": "random"}, "no vectors"),
        ("gradients", {"method": "rds"}, "embedding only"),
        ("gradients", {"gradients__projection": "exact"}, "inner products"),
        ("gradients", {"gradients__side": 4}, "side: 8 there, 4 now"),
    ],
)
def test_what_the_settings_do_not_give(
    setup: Setup, done: Config, tmp_path: Path, stage: str, changes: dict[str, Any], expected: str
) -> None:
    config = tiny_config(setup, done.run, **changes)
    with pytest.raises(InputError, match=expected):
        export(config, stage, tmp_path / "out")


def test_only_a_finished_run_has_chosen_all_its_rows(
    setup: Setup, done: Config, tmp_path: Path
) -> None:
    config = tiny_config(setup, tmp_path / "run", cache=done.cache_url)
    with pytest.raises(InputError, match=COMMAND):
        export(config, "gradients", tmp_path / "out")
    manifest = json.loads(storage.read_bytes(f"{done.run}/manifest.json"))
    manifest["state"] = "interrupted"
    storage.put(f"{config.run}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(InputError, match=r"'interrupted'.*--partial"):
        export(config, "gradients", tmp_path / "out")
    exported = export(config, "gradients", tmp_path / "out", partial=True)
    assert exported.rows["candidates"] == 24
    assert manifest_of(done.run).state == "done"


def test_an_export_to_s3_is_the_same(done: Config, tmp_path: Path, s3_url: str) -> None:
    export(done, "embedding", tmp_path / "out")
    export(done, "embedding", f"{s3_url}/out")
    local = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in (tmp_path / "out").rglob("*.parquet")
    }
    remote = {
        info.url.removeprefix(f"{s3_url}/"): storage.read_bytes(info.url)
        for info in storage.list_objects(f"{s3_url}/out")
    }
    assert remote == local, "the store changed the export"


def test_few_shards_are_held_at_a_time(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(setup, tmp_path / "run", replicas__rows_per_shard=2)
    run_select(config, quiet=True)
    read, most = Cache.read, 0
    seen: list[weakref.ref[Shard]] = []

    def counted(cache: Cache, key: str) -> Shard:
        nonlocal most
        shard = read(cache, key)
        seen.append(weakref.ref(shard))
        most = max(most, sum(reference() is not None for reference in list(seen)))
        return shard

    monkeypatch.setattr(Cache, "read", counted)
    exported = export(config, "embedding", tmp_path / "out")
    assert exported.files > 3 * READERS
    assert most <= READERS + 2, f"{most} shards were held at once: memory grows with the pool"
