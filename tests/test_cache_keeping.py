"""`influence cache list` and `prune`: nothing that a kept config uses is ever lost."""

from __future__ import annotations

import itertools
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cache_runs import FOREIGN, KINDS, Shared, age, call, left_in, places, planned
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    save_model,
    shards_in,
    tiny_config,
    write_config,
)
from transformers import LlamaForCausalLM

from influence import storage
from influence.cache_listing import STAGES, make_listing, scan_cache
from influence.cache_prune import parse_age, plan_prune
from influence.cache_use import use_of
from influence.errors import InputError
from influence.one_process import run_select


def prune(
    cache: Path | str, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> str:
    """stdout (of an error: stderr) of `influence cache prune`, spaces and lines joined."""
    found, out, err = call(["cache", "prune", str(cache), *arguments], capsys)
    assert found == code, f"exit code {found} instead of {code}: {out}{err}"
    assert "Traceback" not in err
    return " ".join((out if code == 0 else err).split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_config_computes_nothing_again(
    shared: Shared,
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    kept = shared.configs[kind]
    path = write_config(tmp_path / "kept.yaml", kept)
    prune(copied, capsys, "--keep", path, "--yes")
    left = left_in(copied)
    everything = shards_in(shared.cache)
    assert planned(kept) <= left, "a shard that the kept config uses was removed"
    used = {"/".join(place) for place in use_of(path, str(copied)).places}
    assert places(left) == places(everything) & used, "what only other configs used is still there"
    assert len(left) < len(everything), "nothing was removed: the test shows nothing"
    for name in FOREIGN:
        assert (copied / name).read_bytes() == b"left alone", f"{name} is no shard and was touched"
    again = kept.model_copy(update={"run": str(tmp_path / "again"), "cache": str(copied)})
    run_select(again, quiet=True)
    computed = {s: record.computed for s, record in manifest_of(again.run).stages.items()}
    assert not any(computed.values()), f"computed again after the prune: {computed}"
    assert_same_results(kept.run, again.run, "the pruned cache gave other results")


def test_no_choice_of_configs_to_keep_loses_a_shard(shared: Shared) -> None:
    contents = scan_cache(str(shared.cache))
    uses = {kind: use_of(c.run, c.cache_url) for kind, c in shared.configs.items()}
    keys = {kind: planned(config) for kind, config in shared.configs.items()}
    for count in range(len(KINDS) + 1):
        for kinds in itertools.combinations(KINDS, count):
            used = {place for kind in kinds for place in uses[kind].places}
            pruning = plan_prune(contents, used, timedelta(0))
            gone = {
                "/".join(shard.url.rsplit("/", 3)[1:])
                for shards in pruning.doomed.values()
                for shard in shards
            }
            needed = {key for kind in kinds for key in keys[kind]}
            assert not gone & needed, f"keeping {kinds} loses shards of theirs"
            others = {key for kind in set(KINDS) - set(kinds) for key in keys[kind]} - needed
            unused = {k for k in others if tuple(k.split("/")[:2]) not in used}
            assert gone == unused, f"keeping {kinds} leaves what only others used"


def test_every_stage_of_a_run_is_one_that_prune_knows(shared: Shared) -> None:
    stages = {key.split("/")[0] for config in shared.configs.values() for key in planned(config)}
    stages |= {"reference", "warmup"}  # which take a training: see their own tests
    assert stages == set(STAGES), "a stage's shards are taken for foreign objects, or the reverse"


def test_gradients_of_other_choices_of_rows_stay(
    shared: Shared, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, more = shared.configs["landmarks"], shared.configs["more landmarks"]
    own = {key for key in planned(more) - planned(few) if key.startswith("gradients/")}
    assert own, "both runs have the same landmarks: the test shows nothing"
    prune(copied, capsys, "--keep", few.run, "--yes")
    assert own <= left_in(copied), "gradients that more landmarks would reuse were removed"


def test_a_target_keeps_its_own_inner_products_only(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"cache": str(tmp_path / "cache"), "gradients__projection": "exact"}
    both = tiny_config(setup, tmp_path / "both", **changes)
    sums = {"sums": setup.targets["sums"]}
    one = tiny_config(setup, tmp_path / "one", targets=sums, **changes)
    for config in (both, one):
        run_select(config, quiet=True)
    products = {key for key in planned(both) if key.startswith("inner_products/")}
    of_one = products & planned(one)
    assert of_one < products, "both targets share a fingerprint"
    # The rows behind the columns are read from the target's catalogue, or made without writing it.
    shutil.rmtree(tmp_path / "cache" / "catalogue")
    prune(both.cache_url, capsys, "--keep", both.run, "--older-than", "0", "--yes")
    assert products <= shards_in(both.cache_url), "inner products of a kept target were removed"
    prune(both.cache_url, capsys, "--keep", one.run, "--older-than", "0", "--yes")
    left = shards_in(both.cache_url)
    assert left & products == of_one, "not those of the kept config's targets"
    assert not any(key.startswith("catalogue/") for key in left), "a prune wrote to the cache"


def test_a_dry_run_removes_nothing_and_says_what_would_go(
    shared: Shared, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    text = prune(copied, capsys, "--keep", shared.configs["rds"].run)
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert after == before, "a dry run changed the cache"
    for word in ("would go", "gradients", "inner_products", "Nothing was removed", "--yes"):
        assert word in text, f"the dry run does not say {word!r}"
    left = left_in(copied)
    prune(copied, capsys, "--keep", shared.configs["rds"].run, "--yes")
    gone = len(left) - len(left_in(copied))
    assert f"To remove {gone:,} shards" in text, "the dry run promised another number of shards"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"targets__sums__path": "nowhere.jsonl"}, "targets.sums.path"),
        ({"data__candidates": ["nowhere/*.parquet"]}, "data.candidates"),
        ({"data__candidates": ["nowhere.parquet"]}, "data.candidates"),
        ({"model__name": "nobody/nothing"}, "model.name"),
        ({"model__adapter": "nobody/no-adapter"}, "model.adapter"),
    ],
)
def test_a_config_that_cannot_be_resolved_removes_nothing(
    setup: Setup,
    shared: Shared,
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    path = write_config(tmp_path / "bad.yaml", tiny_config(setup, tmp_path / "run", **change))
    before = left_in(copied)
    good = shared.configs["rds"].run
    text = prune(copied, capsys, "--keep", good, "--keep", path, "--yes", code=2)
    assert path in text, f"the error does not name the config: {text}"
    assert expected in text
    assert left_in(copied) == before, "shards went although a kept config is not resolved"


def test_what_is_no_config_and_no_run_removes_nothing(
    shared: Shared, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left_in(copied)
    good = shared.configs["rds"].run
    (tmp_path / "broken.yaml").write_text("run: [1\n")
    for name in ("none.yaml", ".", "broken.yaml"):
        bad = str(tmp_path / name)
        text = prune(copied, capsys, "--keep", good, bad, "--yes", code=2)
        assert bad in text, f"the error does not name {bad}: {text}"
    assert "--keep" in prune(copied, capsys, "--yes", code=2), "a prune without --keep"
    assert "--keep" in prune(copied, capsys, good, "--yes", code=2), "a config without --keep"
    assert "--all" in prune(copied, capsys, "--all", "--keep", good, "--yes", code=2)
    assert "7 parsecs" in prune(copied, capsys, "--all", "--older-than", "7 parsecs", code=2)
    assert left_in(copied) == before, "an error removed shards"


def test_the_cache_of_somebody_else_is_refused(
    setup: Setup, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tiny_config(setup, tmp_path / "mine", data__max_length=77)  # shares the targets alone
    path = write_config(tmp_path / "mine.yaml", mine)
    before = left_in(copied)
    text = prune(copied, capsys, "--keep", path, "--yes", code=2)
    assert mine.cache_url in text, "not said which cache the config has"
    assert left_in(copied) == before, "a cache that no kept config uses was emptied"


def test_all_removes_every_shard_and_nothing_else(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = next(iter(sorted(left_in(copied))))
    (copied / empty).write_bytes(b"")
    age(copied, 7200, empty)
    prune(copied, capsys, "--all", "--yes")
    files = (path.relative_to(copied) for path in copied.rglob("*") if path.is_file())
    left = {str(path) for path in files if path.parts[0] != "history"}  # of earlier runs' speeds
    assert left == set(FOREIGN), "not the shards, all of them, and nothing but shards"
    assert "no shards" in prune(copied, capsys, "--all", "--yes")


def test_a_job_at_work_keeps_its_shards(
    shared: Shared, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = shared.configs["narrow"]
    at_work = {
        key
        for key in planned(narrow) - planned(shared.configs["landmarks"])
        if key.startswith("gradients/")
    }
    age(copied, 60, sorted(at_work)[0])  # committed a minute ago; the others two hours ago
    keep = shared.configs["rds"].run
    text = prune(copied, capsys, "--keep", keep, "--yes")
    assert at_work <= left_in(copied), "a fingerprint that is being worked on lost its shards"
    assert f"younger than 1h: {len(at_work)} shards" in text, "not said why they stay"
    prune(copied, capsys, "--keep", keep, "--older-than", "30s", "--yes")
    assert not at_work & left_in(copied), "older than was asked for, and still there"


def test_a_run_keeps_what_it_used_though_its_model_changed(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    config = tiny_config(setup, tmp_path / "run", model__name=str(model))
    run_select(config, quiet=True)
    before = shards_in(config.cache_url)
    other = LlamaForCausalLM.from_pretrained(model)
    other.lm_head.weight.data.mul_(2)  # further training, saved to the same folder
    other.save_pretrained(model)
    prune(config.cache_url, capsys, "--keep", config.run, "--older-than", "0", "--yes")
    assert shards_in(config.cache_url) == before, "a kept run lost what it used"
    path = write_config(tmp_path / "job.yaml", config)
    text = prune(config.cache_url, capsys, "--keep", path, "--older-than", "0")
    assert f"--keep {config.run} keeps them" in text, "no warning that the config's own run goes"
    prune(config.cache_url, capsys, "--keep", path, "--older-than", "0", "--yes")
    assert places(shards_in(config.cache_url)) == places(
        {key for key in before if key.startswith(("catalogue/", "contamination/"))}
    ), "the config alone stands for the model as it is now"


def test_a_cache_in_s3_is_kept_alike(
    shared: Shared, copied: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copied.rglob("*"):
        if path.is_file():
            storage.put(f"{s3_url}/{path.relative_to(copied)}", path.read_bytes())
    first = make_listing(scan_cache(str(copied))).model_dump(exclude={"cache": True})
    second = make_listing(scan_cache(s3_url)).model_dump(exclude={"cache": True})
    for listing in (first, second):
        for entry in listing["fingerprints"]:
            del entry["newest"]
    assert first == second, "the listing of a cache in S3 differs"
    keep = ("--keep", shared.configs["products"].run, "--yes")
    text = prune(s3_url, capsys, *keep)
    assert "nothing to remove" in text, "shards that were put a moment ago are older than 1h"
    prune(copied, capsys, *keep)
    prune(s3_url, capsys, *keep, "--older-than", "0")
    left = {info.url.removeprefix(f"{s3_url}/") for info in storage.list_objects(s3_url)}
    local = {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}
    assert left == local, "a prune in S3 leaves something else than on a disk"


def test_the_clock_is_the_store_s(tmp_path: Path, s3_url: str) -> None:
    for base in (str(tmp_path / "store"), s3_url):
        storage.put(f"{base}/before", b"x")
        now = storage.clock(base)
        storage.put(f"{base}/after", b"x")
        before, after = (storage.head(f"{base}/{name}") for name in ("before", "after"))
        assert before is not None
        assert after is not None
        assert before.modified <= now <= after.modified, "not the time that objects are dated by"
        names = {info.url.rsplit("/", 1)[1] for info in storage.list_objects(base)}
        assert names == {"before", "after"}, "the probe is still there"


def test_ages() -> None:
    assert parse_age("90s") == timedelta(seconds=90)
    assert parse_age("1.5h") == timedelta(minutes=90)
    assert parse_age(" 7 d ") == timedelta(days=7)
    assert parse_age("2w") == timedelta(weeks=2)
    assert parse_age("0") == timedelta(0)
    for bad in ("", "7", "d", "-1h", "1 month", "1h30m"):
        with pytest.raises(InputError, match="--older-than"):
            parse_age(bad)
