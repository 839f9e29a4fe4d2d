"""Units of work: every row once, names by content."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from shard_tables import source_file

from influence.candidates import SourceFile
from influence.units import ExactUnits, Unit, bundled, hash_rows, range_units, sparse_units

A, B = source_file("pool/a.jsonl", 10), source_file("pool/b.parquet", 3)
UNIT = Unit("gradients", "0" * 32, A, 2, 5)


@pytest.mark.parametrize("per_shard", [1, 2, 3, 5, 9, 10, 11])
def test_ranges_hold_every_row_of_every_file_once(per_shard: int):
    units = range_units("embedding", "f", [A, B], per_shard, needs=("k",), group_by="task")
    held = [(unit.file.url, row) for unit in units for row in range(unit.first, unit.last + 1)]
    expected = [(file.url, row) for file in (A, B) for row in range(file.rows)]
    assert held == expected, "a row is missing, twice, or out of order"
    assert all(1 <= unit.count <= per_shard for unit in units)
    assert sum(unit.count for unit in units) == 13
    assert len({unit.key for unit in units}) == len(units), "two ranges share a name"
    assert {unit.needs for unit in units} == {("k",)}


@pytest.mark.parametrize("per_shard", [1, 2, 3, 4])
def test_sparse_units_hold_the_chosen_rows_once(per_shard: int):
    rows = [9, 0, 4, 7]
    units = sparse_units("gradients", "f", A, rows, per_shard)
    held = [row for unit in units for row in unit.rows or ()]
    assert held == sorted(rows), "a chosen row is missing, twice, or out of order"
    for unit in units:
        assert unit.rows is not None
        assert (unit.first, unit.last) == (unit.rows[0], unit.rows[-1])
        assert unit.count == len(unit.rows) <= per_shard
    assert units == sparse_units("gradients", "f", A, sorted(rows), per_shard)


def test_a_name_is_the_content_and_never_the_path():
    moved = replace(UNIT, file=SourceFile("s3://elsewhere/z.jsonl", A.content_hash, 10, 12))
    assert moved.key == UNIT.key, "a moved or grown-by-limit file would be computed again"
    assert A.content_hash in UNIT.key
    assert "a.jsonl" not in UNIT.key
    assert UNIT.key == f"gradients/{'0' * 32}/{A.content_hash}-2-5.parquet"


def test_whatever_the_rows_depend_on_is_in_the_name():
    variants = [
        UNIT,
        replace(UNIT, stage="embedding"),
        replace(UNIT, fingerprint="1" * 32),
        replace(UNIT, file=B),
        replace(UNIT, first=1),
        replace(UNIT, last=6),
        replace(UNIT, rows=(2, 5)),
        replace(UNIT, rows=(2, 3, 5)),
        replace(UNIT, rows=(2, 4, 5)),
        replace(UNIT, group_by="task"),
        replace(UNIT, group_by="source"),
    ]
    for one, other in itertools.combinations(variants, 2):
        assert one.key != other.key, f"{one} and {other} would share a shard"
    assert replace(UNIT, needs=("k",)).key == UNIT.key, "what it needs is in its fingerprint"


def test_row_digests_depend_on_values_not_on_types():
    assert hash_rows([1, 2]) == hash_rows((1, 2))
    assert len({hash_rows(rows) for rows in ([1, 2], [2, 1], [1], [1, 2, 2], [258])}) == 5


def test_bundles_share_a_pass_only_for_inner_products_of_the_same_rows():
    def products(fingerprint: str, rows: tuple[int, ...]) -> Unit:
        return Unit("inner_products", fingerprint, A, rows[0], rows[-1], rows=rows)

    one, two = products("1" * 32, (1, 3, 5)), products("2" * 32, (1, 3, 5))
    other_rows = products("2" * 32, (1, 4, 5))
    other_file = replace(one, file=B, fingerprint="3" * 32)
    whole_range = Unit("inner_products", "4" * 32, A, 1, 5)
    sketch = Unit("gradients", "5" * 32, A, 1, 5, rows=(1, 3, 5))
    same_rows_sketch = replace(sketch, fingerprint="6" * 32)
    units = [one, sketch, other_rows, two, other_file, whole_range, same_rows_sketch]
    found = [bundle.units for bundle in bundled(units)]
    expected = [
        (one, two),
        (sketch,),
        (other_rows,),
        (other_file,),
        (whole_range,),
        (same_rows_sketch,),
    ]
    assert found == expected, "units over different rows share a pass, or products do not"


def test_a_few_products_of_the_hessian_share_a_pass_and_leave_work_for_others():
    units = [
        Unit("hessian_products", f"{i:032x}", file, 1, 5, rows=(1, 3, 5), needs=(f"v{i}",))
        for i in range(9)
        for file in (A, B)
    ]
    found = bundled(units)
    assert [len(bundle.units) for bundle in found] == [4, 4, 1, 4, 4, 1]
    assert all(len({unit.file for unit in bundle.units}) == 1 for bundle in found)
    assert {unit for bundle in found for unit in bundle.units} == set(units), "one was lost"


def test_targets_come_first():
    target, sketch, product = (replace(UNIT, first=first) for first in range(3))
    assert ExactUnits([sketch], {"t": [target]}, {"t": [product]}).all == [target, sketch, product]
