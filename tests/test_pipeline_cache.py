"""What the cache saves: new targets, larger pools, more landmarks, damaged shards, restarts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    Setup,
    assert_same_results,
    conversation,
    manifest_of,
    scores_of,
    shards_in,
    third_target,
    tiny_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from influence import cost
from influence.cache import Cache
from influence.config import Config
from influence.errors import InputError
from influence.one_process import run_select
from influence.plan import make_plan
from influence.units import Bundle, Unit
from influence.worker import Worker

PROJECTIONS = {"kronecker": "gradients", "exact": "inner_products"}


def column(run_directory: str, name: str) -> np.ndarray:
    """A column of the scores, null as NaN."""
    return scores_of(run_directory).column(name).to_numpy(zero_copy_only=False)


def rows_computed(config: Config, stage: str) -> int:
    return manifest_of(config.run).stages[stage].rows


def landmarks_of(config: Config) -> dict[str, float]:
    """Scores of the exact rows by id."""
    rows = scores_of(config.run).to_pylist()
    return {row["id"]: row["score.sums"] for row in rows if row["exact"]}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_more_landmarks_cost_the_new_ones_only(
    setup: Setup, tmp_path: Path, projection: str
) -> None:
    stage = PROJECTIONS[projection]
    changes: dict[str, Any] = {
        "cache": str(tmp_path / "cache"),
        "gradients__projection": projection,
    }
    small = tiny_config(setup, tmp_path / "16", landmarks__count=16, **changes)
    large = tiny_config(setup, tmp_path / "32", landmarks__count=32, **changes)
    run_select(small, quiet=True)
    planned = make_plan(large).work.stages[stage]
    run_select(large, quiet=True)
    assert rows_computed(large, stage) == 16, "landmarks that were there were computed again"
    record = manifest_of(large.run).stages[stage]
    targets = 1 if projection == "kronecker" else 2  # inner products are kept for each target
    assert record.borrowed_rows == 16 * targets
    assert any(f"{16 * targets} rows are read from" in note for note in record.notes)
    assert (planned.shards, planned.cached) == (record.shards, record.reused), "plan and run differ"
    assert planned.least.rows == 16, "the plan counts rows that other shards lend"
    before, after = landmarks_of(small), landmarks_of(large)
    assert len(after) == 32
    assert before.items() <= after.items(), "a landmark has another score, or is none any more"
    again = tiny_config(setup, tmp_path / "again", landmarks__count=32, **changes)
    run_select(again, quiet=True)
    assert rows_computed(again, stage) == 0, "the second run of the same config computed again"
    assert_same_results(large.run, again.run, "shards of other runs were read in another order")
    fresh = tiny_config(
        setup, tmp_path / "fresh", landmarks__count=32, gradients__projection=projection
    )
    run_select(fresh, quiet=True)
    assert landmarks_of(fresh).keys() == after.keys()
    np.testing.assert_allclose(
        column(fresh.run, "score.sums"),
        column(large.run, "score.sums"),
        rtol=1e-3,
        atol=1e-6,
        err_msg="scores through other runs' shards are not those of a fresh run",
    )


def test_a_new_file_costs_its_own_landmarks_only(setup: Setup, tmp_path: Path) -> None:
    draw = random.Random(7)
    more = tmp_path / "c.jsonl"
    more.write_text("".join(json.dumps({"messages": conversation(draw)}) + "\n" for _ in range(40)))
    cache = str(tmp_path / "cache")
    before = tiny_config(setup, tmp_path / "before", cache=cache)
    run_select(before, quiet=True)
    pool = [*setup.candidates, str(more)]
    after = tiny_config(setup, tmp_path / "after", cache=cache, data__candidates=pool)
    run_select(after, quiet=True)
    old, new = landmarks_of(before), landmarks_of(after)
    added = new.keys() - old.keys()
    assert 0 < len(added) < 24, "the draw does not tell new rows from old ones"
    assert all(name.startswith("c.jsonl:") for name in added), "an old row was drawn anew"
    assert rows_computed(after, "gradients") == len(added), "old landmarks were computed again"
    assert rows_computed(after, "embedding") == 40
    kept = {name: new[name] for name in old.keys() & new.keys()}
    assert kept.items() <= old.items(), "a kept landmark has another score"


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(
    setup: Setup, tmp_path: Path, projection: str
) -> None:
    """Whatever subset of a run's shards stands, the rest is cut as the first time."""
    stage = PROJECTIONS[projection]
    changes: dict[str, Any] = {"gradients__projection": projection}
    first = tiny_config(setup, tmp_path / "first", landmarks__count=10, **changes)
    run_select(first, quiet=True)
    lent = shards_in(first.cache_url)
    whole = tiny_config(
        setup, tmp_path / "whole", cache=first.cache_url, landmarks__count=40, **changes
    )
    run_select(whole, quiet=True)
    everything = shards_in(first.cache_url)
    own = sorted(key for key in everything - lent if key.startswith(stage))
    assert len(own) > 3
    for attempt in range(3):
        cache = tmp_path / f"cut{attempt}"
        shutil.copytree(first.cache_url, cache)
        lost = random.Random(attempt).sample(own, 2)
        for key in lost:
            (cache / key).unlink()
        again = tiny_config(
            setup, tmp_path / f"run{attempt}", cache=str(cache), landmarks__count=40, **changes
        )
        run_select(again, quiet=True)
        assert shards_in(cache) == everything, "the rest was cut otherwise than the first time"
        assert manifest_of(again.run).stages[stage].computed == 2
        assert_same_results(whole.run, again.run, f"after the loss of {lost}")


def test_landmarks_after_an_exact_run_cost_nothing(setup: Setup, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    run_select(tiny_config(setup, tmp_path / "all", cache=cache, method="exact"), quiet=True)
    config = tiny_config(setup, tmp_path / "some", cache=cache)
    run_select(config, quiet=True)
    assert rows_computed(config, "gradients") == 0, "rows of whole ranges were computed again"
    exact = np.asarray(scores_of(config.run).column("exact"))
    assert exact.sum() == 24, "rows that are no landmarks were taken from the lenders"


def test_a_targets_shards_are_the_same_whatever_shares_their_pass(
    setup: Setup, tmp_path: Path
) -> None:
    targets = {**setup.targets, "third": third_target(tmp_path)}
    config = tiny_config(
        setup, tmp_path / "run", targets=targets, method="exact", gradients__projection="exact"
    )
    run_select(config, quiet=True)
    cache = Cache(config.cache_url)
    alone = Worker(tiny_config(setup, tmp_path / "alone", gradients__projection="exact"))
    shutil.copytree(
        Path(config.cache_url, "target_vectors"), Path(alone.cache.url, "target_vectors")
    )
    from influence.exact_work import plan_exact
    from influence.job import Job
    from influence.pipeline import catalogue_units, prepare
    from influence.progress import Progress
    from influence.reducer import Reducer

    job: Job = prepare(config, Progress(quiet=True))
    reducer = Reducer(config)
    reducer.load_catalogue(*catalogue_units(job))
    products = plan_exact(job, reducer, None).units.products
    assert len(products) == 3
    for name, units in products.items():
        unit: Unit = units[1]
        alone.run(Bundle((unit,)))
        together, single = cache.read(unit.key).table, alone.cache.read(unit.key).table
        assert together.equals(single), f"{name}: other bits alone than beside other targets"
    alone.close()


def test_a_target_row_without_a_gradient_is_named(setup: Setup, tmp_path: Path) -> None:
    """One letter makes NaN in the model; neither pool nor targets have it but for one row."""
    folder = tmp_path / "model"
    shutil.copytree(setup.model, folder)
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    (token,) = AutoTokenizer.from_pretrained(setup.model)("z")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    lines = Path(setup.targets["sums"]["path"]).read_text().splitlines()
    broken = {"id": "q", "family": "x", "messages": [{"role": "user", "content": "z"}]}
    broken["messages"].append({"role": "assistant", "content": "add"})
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[2:]]) + "\n")
    targets = {"broken": {"path": str(path), "per": "group"}}
    for normalize in (True, False):
        config = tiny_config(
            setup,
            tmp_path / f"run{normalize}",
            model__name=str(folder),
            targets=targets,
            gradients__projection="exact",
            gradients__normalize=normalize,
        )
        with pytest.raises(InputError, match=r"broken\.jsonl row 2: .*nan"):
            run_select(config, quiet=True)
        assert not list(Path(config.cache_url).glob("target_vectors/*/*")), "NaN in the cache"


def test_full_target_gradients_are_limited_by_bytes(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(setup, tmp_path / "run", gradients__projection="exact")
    # 3 blocks: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32; 5 + 2 columns.
    attributed = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    needed = 7 * attributed * 4
    monkeypatch.setattr(cost, "target_bytes_limit", lambda config: (needed - 1, "a test"))
    with pytest.raises(InputError, match=f"projection: exact .* {needed:,} bytes"):
        run_select(config, quiet=True)
    before = ("catalogue", "contamination")  # no model has run
    assert not {key for key in shards_in(config.cache_url) if not key.startswith(before)}
    assert any(f"{needed:,} bytes" in note for note in make_plan(config).notes)
    monkeypatch.setattr(cost, "target_bytes_limit", lambda config: (needed, "a test"))
    run_select(config, quiet=True)


def test_the_limit_is_this_machines_memory_over_the_replicas_that_fit(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}
    monkeypatch.setattr(cost.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 16)

    def limit(**changes: Any) -> int:
        replicas = {f"replicas__{name}": value for name, value in changes.items()}
        return cost.target_bytes_limit(tiny_config(setup, tmp_path / "run", **replicas))[0]

    assert limit(max=1) == 2_048_000_000
    assert limit(max=8, num_cpus=4) == 512_000_000, "four replicas fit on 16 cores"
    assert limit(max=2, num_cpus=4) == 1_024_000_000, "there are two replicas at most"
    assert limit(max=2, num_cpus=64) == 2_048_000_000, "one replica runs wherever it fits"
    assert limit(max=8, num_gpus=1) == 40_000_000_000
    assert limit(max=8, num_gpus=0.5) == 20_000_000_000


def test_a_new_target_costs_its_own_rows_only(setup: Setup, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    targets = {**setup.targets, "third": third_target(tmp_path)}
    for projection in ("kronecker", "exact"):
        changes: dict[str, Any] = {"cache": cache, "gradients__projection": projection}
        first = tiny_config(setup, tmp_path / f"{projection}-1", **changes)
        run_select(first, quiet=True)
        second = tiny_config(setup, tmp_path / f"{projection}-2", targets=targets, **changes)
        run_select(second, quiet=True)
        before, after = manifest_of(first.run).stages, manifest_of(second.run).stages
        assert after["embedding"].computed == 0, "embeddings were computed again for a new target"
        if projection == "kronecker":
            assert after["gradients"].computed == 1, "only the third target's shard is new"
            assert after["gradients"].reused == before["gradients"].shards
        else:
            assert after["target_vectors"].computed == 1, "old targets' gradients were made again"
            assert after["inner_products"].computed == before["inner_products"].shards // 2
            assert after["inner_products"].reused == before["inner_products"].shards
        for name in ("score.sums", "score.mixed"):
            np.testing.assert_allclose(
                column(first.run, name),
                column(second.run, name),
                rtol=1e-10,  # means over columns may round otherwise with one more column
                atol=1e-12,
                err_msg=f"{name} changed although only another target came",
            )
        assert not np.isnan(column(second.run, "score.third")).all()


def test_a_truncated_shard_is_found_and_computed_again(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run")
    run_select(config, quiet=True)
    before = {p.name: p.read_bytes() for p in Path(config.run).glob("scores/*.parquet")}
    damaged = sorted(Path(config.cache_url).glob("embedding/*/*.parquet"))[2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    flipped = sorted(Path(config.cache_url).glob("gradients/*/*.parquet"))[0]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 3] ^= 0xFF
    flipped.write_bytes(bytes(data))
    run_select(config, quiet=True)
    stages = manifest_of(config.run).stages
    assert stages["embedding"].computed == 1, "the truncated shard was believed"
    assert stages["gradients"].computed == 1, "a shard with a flipped byte was believed"
    assert any("replaced a damaged shard" in note for note in stages["embedding"].notes)
    after = {p.name: p.read_bytes() for p in Path(config.run).glob("scores/*.parquet")}
    assert after == before, "the mended shard holds other numbers"
