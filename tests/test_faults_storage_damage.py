"""Objects under a shard's name that are no whole shard: found, counted, made anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_faults import write_outcome
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence import one_process
from influence.cli import main
from influence.errors import ShardsFailedError
from ray_jobs import select as select_job
from ray_jobs.reducer_actor import RemoteReducer

pytestmark = pytest.mark.clusters


def _other_rows(path: Path) -> None:
    """A whole shard with the right footer whose rows are not those that its name says."""
    table = pq.read_table(path)
    if "row" not in table.column_names:
        path.write_bytes(b"")
        return
    place = table.column_names.index("row")
    rows = pa.array([row + 1 for row in table.column("row").to_pylist()], table.schema[place].type)
    metadata = table.schema.metadata
    moved = table.set_column(place, table.schema[place], rows).replace_schema_metadata(metadata)
    pq.write_table(moved, path, compression="none", write_statistics=False)


def _foreign(path: Path) -> None:
    pq.write_table(pa.table({"row": [1, 2, 3], "text": ["a", "b", "c"]}), path)


def _neighbour(path: Path) -> None:
    other = next(each for each in sorted(path.parent.iterdir()) if each != path)
    path.write_bytes(other.read_bytes())


DAMAGE: list[Callable[[Path], Any]] = [
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    _other_rows,
    _foreign,
    _neighbour,
]


@pytest.mark.parametrize("projection", ["kronecker", "exact"])
def test_damaged_shards_of_every_stage_are_counted_and_made_anew(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str], projection: str
) -> None:
    config = tiny_config(setup, tmp_path / "run", gradients__projection=projection)
    path = write_config(tmp_path / "config.yaml", config)
    plain = tiny_config(setup, tmp_path / "plain", gradients__projection=projection)
    one_process.run_select(plain, quiet=True)
    one_process.run_select(config, quiet=True)
    stages = manifest_of(config.run).stages
    damaged: set[str] = set()
    for stage, record in stages.items():
        # A target's shards are the first ones of its stage.
        for key, damage in zip(record.planned, DAMAGE, strict=False):
            damage(Path(config.cache_url, key))
            damaged.add(key)
        assert not record.planned or len(set(record.planned) & damaged) >= 4, f"{stage}: too weak"
    began = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        main(["select", path, "--in-process"])
    seconds = time.monotonic() - began
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    assert_same_results(plain.run, config.run, "a damaged shard was believed")
    manifest = manifest_of(config.run)
    for stage, record in manifest.stages.items():
        gone = set(record.planned) & damaged
        assert record.damaged == record.computed == len(gone), f"{stage}: not exactly the damaged"
        assert record.reused == record.shards - len(gone)
        assert {f"replaced a damaged shard: {key}" for key in gone} <= set(record.notes)
    for key in damaged:
        assert f"damaged shard, computed again: {key}" in shown.err, "the user is not told"
    assert f"made anew: {len(damaged)}" in shown.out.replace("\n", " "), "not in the summary"
    write_outcome(
        f"truncated, empty and foreign objects under shards' names, projection: {projection}",
        kills=len(damaged),
        recomputed=0,
        seconds=seconds,
    )


@pytest.mark.usefixtures("ray_cluster")
def test_damage_that_comes_after_the_check_is_said_and_mended_by_the_same_command(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="exact")
    path = write_config(tmp_path / "config.yaml", config)

    class Damaging(RemoteReducer):
        def __getattr__(self, method: str) -> Any:
            if method == "score_exact":
                shard = sorted(Path(config.cache_url, "gradients").glob("*/*.parquet"))[0]
                shard.write_bytes(shard.read_bytes()[:-20])
            return super().__getattr__(method)

    with monkeypatch.context() as patch:
        patch.setattr(select_job, "RemoteReducer", Damaging)
        with pytest.raises(SystemExit) as caught:
            main(["select", path])
    text = capsys.readouterr().err
    assert caught.value.code == ShardsFailedError.exit_code == 3, text
    assert "Traceback" not in text, text
    assert "not a whole shard" in text
    assert "the same command computes this shard anew" in text, "what to do is not said"
    assert manifest_of(config.run).state == "failed"
    before = shards_in(config.cache_url)
    with pytest.raises(SystemExit) as caught:
        main(["select", path])
    assert caught.value.code == 0
    stages = manifest_of(config.run).stages
    assert {name: stage.computed for name, stage in stages.items() if stage.computed} == {
        "gradients": 1
    }, "more than the damaged shard was computed"
    assert shards_in(config.cache_url) == before
    plain = tiny_config(setup, tmp_path / "plain", method="exact")
    one_process.run_select(plain, quiet=True)
    assert_same_results(plain.run, config.run, "a run that went on after a damaged shard differs")
