"""Chosen rows of a file, files that change under a job, and the short names of files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from test_candidates import chat, write_lines, write_parquet

from influence import candidates, parquet_rows, storage
from influence.candidates import read_examples, read_rows, read_table, scan_files, short_names
from influence.errors import InputError

pytest_plugins = ["s3"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chosen_rows_are_those_of_the_whole_file_and_nothing_else_is_read(
    kind, tmp_path, monkeypatch
):
    rows = [{**chat(f"question {i}"), "id": i, "task": i % 3} for i in range(30)]
    path = tmp_path / f"pool.{kind}"
    url = write_lines(path, rows) if kind == "jsonl" else write_parquet(path, rows)
    (file,) = scan_files([url], None)
    whole = read_examples(file, 0, 29, "task")
    asked: list[int] = []
    group_of, parse = parquet_rows._row_group, candidates.parse_line
    monkeypatch.setattr(
        parquet_rows, "_row_group", lambda *a: (asked.append(a[2]), group_of(*a))[1]
    )
    monkeypatch.setattr(
        candidates, "parse_line", lambda a: (asked.append(json.loads(a)["id"]), parse(a))[1]
    )
    draw = random.Random(kind)
    for count in (1, 2, 5, 40):
        wanted = [draw.randrange(30) for _ in range(count)]
        asked.clear()
        assert read_rows(file, wanted, "task") == [whole[row] for row in wanted], "rows moved"
        needed = wanted if kind == "jsonl" else sorted({row // 4 for row in wanted})
        assert asked == needed, "lines or row groups that nobody asked for were read"
    assert read_rows(file, []) == []
    with pytest.raises(IndexError):
        read_rows(file, [0, 30])
    with pytest.raises(InputError, match=rf"{path} row 7: .*'family'"):
        read_rows(file, [7], "family")


@pytest.mark.parametrize("read", [lambda f: read_examples(f, 0, 1), lambda f: read_table(f, [1])])
def test_a_parquet_file_rewritten_with_as_many_rows_is_refused(read, tmp_path):
    path = tmp_path / "p.parquet"
    url = write_parquet(path, [chat("one"), chat("two")])
    (file,) = scan_files([url], None)
    before = path.stat()
    write_parquet(path, [chat("ONE"), chat("TWO")])
    assert path.stat().st_size == before.st_size, "the size alone must not give it away here"
    with pytest.raises(InputError, match="changed since the job scanned it"):
        read(file)
    path.unlink()
    with pytest.raises(InputError, match="changed since the job scanned it"):
        read(file)


def test_a_parquet_file_touched_or_copied_with_the_same_bytes_is_the_same(tmp_path):
    url = write_parquet(tmp_path / "p.parquet", [chat("one"), chat("two")])
    (file,) = scan_files([url], None)
    whole = read_examples(file, 0, 1)
    os.utime(url, ns=(1, 1))
    assert read_examples(file, 0, 1) == whole
    (again,) = scan_files([url], None)
    assert again == file, "the time of a file's last change became part of what it is"
    assert again.stamp != file.stamp


def test_a_rewritten_object_is_noticed_and_one_put_again_is_not(s3_url, tmp_path):
    url = storage.join(s3_url, "p.parquet")
    first, second = (
        Path(write_parquet(tmp_path / f"{text}.parquet", [chat(text)])).read_bytes()
        for text in ("one", "ONE")
    )
    assert len(first) == len(second)
    storage.put(url, first)
    (file,) = scan_files([url], None)
    storage.put(url, first)
    assert len(read_examples(file, 0, 0)) == 1
    storage.put(url, second)
    with pytest.raises(InputError, match="changed since the job scanned it"):
        read_examples(file, 0, 0)


def _slow_short_names(urls: list[str]) -> dict[str, str]:
    def suffix(url: str, depth: int) -> str:
        return "/".join(url.split("/")[-depth:])

    names = {}
    for url in urls:
        depth = 1
        while any(suffix(other, depth) == suffix(url, depth) for other in urls if other != url):
            depth += 1
        names[url] = suffix(url, depth)
    return names


def test_short_names_are_the_shortest_path_ends_that_differ():
    assert short_names(["s3://bucket/a/pool.jsonl"]) == {"s3://bucket/a/pool.jsonl": "pool.jsonl"}
    assert list(short_names(["a/x.jsonl", "a/y.jsonl"]).values()) == ["x.jsonl", "y.jsonl"]
    found = short_names(["a/p", "b/p", "p", "s3://b/p", "c/q"])
    assert found == {"a/p": "a/p", "b/p": "b/p", "p": "p", "s3://b/p": "/b/p", "c/q": "q"}
    draw = random.Random(0)
    for _ in range(300):
        urls = ["/".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(6)]
        urls = list(dict.fromkeys(urls))
        found = short_names(urls)
        assert found == _slow_short_names(urls)
        assert len(set(found.values())) == len(urls), f"two files share a name: {found}"
        assert found == short_names(urls[::-1]), "a name depends on the order of the files"
