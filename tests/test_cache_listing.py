"""`influence cache list`: what is there, who uses it, what it stands for; and the help."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cache_runs import FOREIGN, Shared, call, left_in, places, planned
from tiny_run import Setup, tiny_config

from influence.one_process import run_select
from influence.report_format import size


def test_the_listing_counts_what_is_there(
    shared: Shared, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = sorted(key for key in left_in(copied) if key.startswith("embedding/"))[0]
    (copied / damaged).write_bytes(b"")
    kinds = ("landmarks", "products")
    labels = [shared.configs[kind].run for kind in kinds]
    arguments = ["cache", "list", str(copied), "--config", labels[0], "--run", labels[1]]
    code, out, err = call([*arguments, "--json"], capsys)
    assert code == 0, err
    listing = json.loads(out)
    entries = {(e["stage"], e["fingerprint"]): e for e in listing["fingerprints"]}
    on_disk: dict[tuple[str, ...], list[Path]] = {}
    for key in left_in(copied) - {damaged}:
        on_disk.setdefault(tuple(key.split("/")[:2]), []).append(copied / key)
    assert entries.keys() == on_disk.keys(), "not one entry for each stage and fingerprint"
    for place, files in on_disk.items():
        entry = entries[place]
        assert entry["shards"] == len(files)
        assert entry["bytes"] == sum(path.stat().st_size for path in files)
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        if place[0] in ("catalogue", "embedding"):
            assert entry["rows"] == rows, f"{place}: rows are not those of the shards"
        elif place[0] != "target_vectors":  # their shards hold a row for each layer
            assert entry["rows"] in (None, rows), f"{place}: a wrong number of rows"
        users = [
            label
            for label, kind in zip(labels, kinds, strict=True)
            if "/".join(place) in places(planned(shared.configs[kind]))
        ]
        assert set(users) <= set(entry["used_by"]), f"{place}: its users are not named"
        others = set(entry["used_by"]) - set(users)
        # Of a config every stage counts, also one that its method does not need.
        assert others <= {labels[0]}, f"{place}: a run is named that did not use it"
        assert not others or place[0] == "target_vectors", f"{place}: used by a config that cannot"
        assert entry["values"] or entry["made"] or place[0] == "inner_products"
    values = [e["values"] for e in listing["fingerprints"] if e["stage"] == "embedding"]
    assert any(v and v["embedding"] == "jvp" and v["blocks"] == 2 for v in values)
    assert (listing["empty"]["objects"], listing["empty"]["examples"]) == (1, [damaged])
    assert listing["foreign"]["objects"] == len(FOREIGN)
    code, out, err = call(arguments, capsys)
    assert code == 0, err
    text = " ".join(out.split())
    for word in (*labels, damaged, "notes.txt", "embedding jvp", "dtype float32", "float16 x"):
        assert word in text, f"the table does not show {word!r}"


def test_a_run_directory_is_no_cache(
    shared: Shared, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="random")
    run_select(config, quiet=True)
    before = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for arguments in (["list"], ["prune", "--all", "--yes", "--older-than", "0"]):
        name, *options = arguments
        code, out, err = call(["cache", name, config.run, *options], capsys)
        assert code == 0, err
        assert f"did you mean {config.cache_url}?" in out
    assert before == {path for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["cache"], ["list", "prune"]),
        (["cache", "list"], ["CACHE", "--config", "--run", "--json", "Example", "Exit codes"]),
        (
            ["cache", "prune"],
            ["CACHE", "--keep", "--older-than", "--yes", "--all", "Example", "job at work"],
        ),
        (["export"], ["CONFIG", "--stage", "--out", "--partial", "Example", "Exit codes"]),
    ],
)
def test_the_help_teaches(
    command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call([*command, "--help"], capsys)
    text = " ".join(out.split())
    assert code == 0
    for word in words:
        assert word in text, f"{' '.join(command)} --help does not teach {word!r}"


def test_sizes_are_in_the_unit_a_person_would_use() -> None:
    shown = [size(value) for value in (0, 999, 1000, 12_345_678, 999_960_000, 2.5e12, 3e15)]
    assert shown == [
        *("0 bytes", "999 bytes", "1.0 kB", "12.3 MB", "1.0 GB", "2.5 TB", "3,000.0 TB")
    ], "a wrong unit, or a number that rounds into the next one"
