"""Candidate files: every row is there once, read as its format says, or with its reason."""

from __future__ import annotations

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence import parquet_rows, storage
from influence.candidates import (
    Message,
    read_examples,
    read_table,
    scan_files,
)
from influence.errors import InputError

pytest_plugins = ["s3"]

HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))


def chat(question: str = "Hi", answer: str = "Hello") -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def write_lines(path, rows, compress=None) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "\n".join(lines).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress == "gz":
        data = gzip.compress(data)
    elif compress == "zst":
        codec = pa.Codec("zstd")
        data = codec.compress(data, asbytes=True)
    path.write_bytes(data)
    return str(path)


def write_parquet(path, rows, row_group_size=4) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def read_all(path: str, **options):
    (file,) = scan_files([path], None)
    return read_examples(file, 0, file.rows - 1, **options)


ROWS = {
    "messages": (chat(), HELLO),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "observation", "value": "T"},
            ]
        },
        (Message("system", "S"), *HELLO, Message("tool", "T")),
    ),
    "prompt": ({"prompt": "Hi", "completion": "Hello"}, HELLO),
    "prompt turns": (
        {"prompt": chat()["messages"][:1], "completion": chat()["messages"][1:]},
        HELLO,
    ),
    "instruction": ({"instruction": "Hi", "output": "Hello"}, HELLO),
    "response": ({"instruction": "Hi", "input": "", "response": "Hello"}, HELLO),
    "input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        (Message("user", "Add\n\n1 2"), Message("assistant", "3")),
    ),
    "text parts": (
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": part} for part in parts]}
                for role, parts in [("user", "Hi"), ("assistant", ["Hell", "o"])]
            ]
        },
        HELLO,
    ),
    "precedence": ({"instruction": "no", "output": "no", "prompt": "no", **chat()}, HELLO),
    "null columns fall through": ({"messages": None, "prompt": "Hi", "completion": "Hello"}, HELLO),
    "roles stay": (
        {"messages": [{"role": "tool", "content": "T"}, *chat()["messages"]]},
        (Message("tool", "T"), *HELLO),
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_its_turns(name, kind, tmp_path):
    row, expected = ROWS[name]
    path = tmp_path / f"pool.{kind}"
    url = write_lines(path, [row]) if kind == "jsonl" else write_parquet(path, [row])
    (example,) = read_all(url)
    assert example.messages == expected
    assert example.reason is None


UNREADABLE = {
    '{"messages": [': "malformed json",
    "[1, 2]": "malformed: not a json object",
    '{"text": "Hi"}': "malformed: no recognised columns",
    '{"prompt": "Hi"}': "malformed: no recognised columns",
    '{"messages": []}': "malformed: empty messages",
    '{"messages": "Hi"}': "malformed: messages is not a list",
    '{"messages": ["Hi"]}': "malformed: a turn is not an object",
    '{"messages": [{"role": "wizard", "content": "Hi"}]}': "malformed: unknown role",
    '{"conversations": [{"from": ["x"], "value": "Hi"}]}': "malformed: unknown role",
    '{"messages": [{"role": "user", "content": null}]}': "malformed: content is not text",
    '{"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}': (
        "malformed: content is not text"
    ),
    '{"prompt": 5, "completion": "x"}': "malformed: content is not text",
    '{"prompt": "\\ud800", "completion": "x"}': "malformed: invalid unicode",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "no assistant turn",
    '{"prompt": "Hi", "completion": " \\n"}': "empty response",
}


def test_unreadable_rows_stay_in_place_with_a_reason_each(tmp_path):
    rows = [json.dumps(chat()), *UNREADABLE, json.dumps(chat())]
    examples = read_all(write_lines(tmp_path / "pool.jsonl", rows))
    assert [e.row for e in examples] == list(range(len(rows))), "rows were lost or moved"
    assert [e.reason for e in examples] == [None, *UNREADABLE.values(), None]
    assert examples[-1].messages == HELLO
    assert len({e.digest for e in examples}) > 1


def test_columns_id_source_and_group_are_read_as_text(tmp_path):
    rows = [{**chat(), "id": 7, "source": "flan", "task": 3}, {**chat(), "id": "x", "task": "y"}]
    url = write_lines(tmp_path / "pool.jsonl", rows)
    first, second = read_all(url, group_by="task")
    assert (first.id, first.source, first.group) == ("7", "flan", "3")
    assert (second.id, second.source, second.group) == ("x", None, "y")
    assert read_all(url)[0].group is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_group_column_names_file_row_and_columns(kind, tmp_path):
    rows = [{**chat(), "task": "a"}, {**chat(), "task": None}]
    path = tmp_path / f"targets.{kind}"
    url = write_lines(path, rows) if kind == "jsonl" else write_parquet(path, rows)
    with pytest.raises(InputError, match=rf"targets\.{kind} row 1: .*'task'.*messages"):
        read_all(url, group_by="task")
    with pytest.raises(InputError, match=r"row 0: .*'family'.*messages, task"):
        read_all(url, group_by="family")


def test_the_digest_is_equal_exactly_for_the_same_messages(tmp_path):
    rows = [
        chat(),
        {"prompt": "Hi", "completion": "Hello", "id": "another id"},
        chat("Hi", "Hello "),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "Hello"}]},
        chat('Hi", "assistant', "Hello"),
        {"messages": chat()["messages"] * 2},
    ]
    digests = [e.digest for e in read_all(write_lines(tmp_path / "p.jsonl", rows))]
    assert digests[0] == digests[1], "the same messages in another format are no duplicate"
    assert len(set(digests)) == len(rows) - 1, "different messages share a digest"
    assert all(len(digest) == 16 for digest in digests)


def test_scan_keeps_pattern_order_counts_once_and_hashes_the_bytes(tmp_path):
    for name, count in {"b/2": 2, "b/1": 3, "a/9": 4}.items():
        write_lines(tmp_path / f"{name}.jsonl", [chat()] * count)
    patterns = [f"{tmp_path}/b/*.jsonl", f"{tmp_path}/a/9.jsonl", f"{tmp_path}/**/1.jsonl"]
    files = scan_files(patterns, None)
    names = [f.url.removeprefix(f"{tmp_path}/") for f in files]
    assert names == ["b/1.jsonl", "b/2.jsonl", "a/9.jsonl"], "order or duplicates"
    assert [f.rows for f in files] == [f.total_rows for f in files] == [3, 2, 4]
    for file in files:
        with open(file.url, "rb") as raw:
            assert file.content_hash == hashlib.blake2b(raw.read(), digest_size=16).hexdigest()


def test_the_limit_takes_the_first_rows_and_opens_no_further_file(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [chat()] * 3)
    (tmp_path / "c.parquet").write_bytes(b"this file would be refused if it were opened")
    files = scan_files([f"{tmp_path}/*"], 5)
    assert [(f.rows, f.total_rows) for f in files] == [(3, 3), (2, 3)]
    assert len(scan_files([f"{tmp_path}/*"], 3)) == 1
    with pytest.raises(InputError, match=r"data\.limit"):
        scan_files([f"{tmp_path}/*"], 0)


@pytest.mark.parametrize("compress", [None, "gz", "zst"])
def test_line_files_read_the_same_however_compressed(compress, tmp_path):
    rows = [{**chat(f"question {i}", "é" * 50), "id": i} for i in range(20_000)]
    lines = [json.dumps(rows[0]), "", "   ", *[json.dumps(r, ensure_ascii=False) for r in rows[1:]]]
    suffix = f".{compress}" if compress else ""
    url = write_lines(tmp_path / f"pool.jsonl{suffix}", lines, compress)
    (file,) = scan_files([url], None)
    assert file.total_rows == len(rows), "blank lines were counted, or lines cut at a chunk"
    for first, last in [(0, 0), (1, 3), (19_990, 19_999), (9_000, 11_000)]:
        got = read_examples(file, first, last)
        assert [e.id for e in got] == [str(i) for i in range(first, last + 1)]
        assert [e.messages[0].content for e in got] == [
            f"question {i}" for i in range(first, last + 1)
        ]


def test_concatenated_gzip_members_are_all_read(tmp_path):
    path = tmp_path / "pool.json.gz"
    path.write_bytes(b"".join(gzip.compress(json.dumps(chat()).encode() + b"\n") for _ in "abc"))
    assert len(read_all(str(path))) == 3


def test_parquet_ranges_read_only_the_row_groups_they_need(tmp_path, monkeypatch):
    rows = [{**chat(f"question {i}"), "id": i, "unused": "x"} for i in range(10)]
    url = write_parquet(tmp_path / "pool.parquet", rows, row_group_size=4)
    (file,) = scan_files([url], None)
    asked = []
    real = parquet_rows._row_group

    def spy(url, content_hash, group, names):
        asked.append((group, names))
        return real(url, content_hash, group, names)

    monkeypatch.setattr(parquet_rows, "_row_group", spy)
    for first in range(10):
        for last in range(first, 10):
            asked.clear()
            got = read_examples(file, first, last)
            assert [e.id for e in got] == [str(i) for i in range(first, last + 1)]
            assert [e.row for e in got] == list(range(first, last + 1))
            assert [g for g, _ in asked] == list(range(first // 4, last // 4 + 1))
    assert asked[0][1] == ("messages", "id"), "columns that nobody needs are read"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_read_table_gives_the_input_columns_in_the_order_asked(kind, tmp_path):
    rows = [{**chat(f"q{i}"), "id": i, "extra": {"a": [i]}} for i in range(10)]
    path = tmp_path / f"pool.{kind}"
    url = write_lines(path, rows) if kind == "jsonl" else write_parquet(path, rows)
    (file,) = scan_files([url], None)
    wanted = [7, 0, 9, 3, 7]
    assert read_table(file, wanted).to_pylist() == [rows[i] for i in wanted]
    assert read_table(file, []).num_rows == 0
    with pytest.raises(IndexError):
        read_table(file, [10])
    with pytest.raises(IndexError):
        read_examples(file, 0, 10)


def test_columns_without_a_common_type_are_json_encoded_and_can_be_written(tmp_path):
    rows = [{**chat(), "x": 1, "y": {}, "big": 2**70}, {**chat(), "x": "a"}, chat(), {"only": True}]
    (file,) = scan_files([write_lines(tmp_path / "p.jsonl", rows)], None)
    table = read_table(file, [0, 1, 2, 3])
    assert table["x"].to_pylist() == ["1", '"a"', None, None]
    assert table["y"].to_pylist() == ["{}", None, None, None]
    assert table["big"].to_pylist() == [str(2**70), None, None, None]
    assert table["only"].to_pylist() == [None, None, None, True], "a late column was dropped"
    pq.write_table(table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table)


def test_a_pool_in_object_storage_reads_like_a_local_one(s3_url, tmp_path):
    rows = [{**chat(f"q{i}"), "id": i} for i in range(10)]
    local = [
        write_parquet(tmp_path / "a.parquet", rows),
        write_lines(tmp_path / "b.jsonl.gz", rows, "gz"),
        write_lines(tmp_path / "c.json.zst", rows, "zst"),
    ]
    for path in local:
        with open(path, "rb") as raw:
            storage.put(storage.join(s3_url, path.rsplit("/", 1)[-1]), raw.read())
    remote = scan_files([storage.join(s3_url, "*")], None)
    here = scan_files(local, None)
    assert [f.content_hash for f in remote] == [f.content_hash for f in here]
    for far, near in zip(remote, here, strict=True):
        assert read_examples(far, 2, 8) == read_examples(near, 2, 8)
        assert read_table(far, [9, 1]).equals(read_table(near, [9, 1]))


def test_bad_files_are_named_with_what_was_expected(tmp_path):
    (tmp_path / "fake.parquet").write_bytes(b'{"messages": []}\n')
    (tmp_path / "pool.csv").write_text("a,b\n")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "array.json").write_text(json.dumps([chat()], indent=1))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    (tmp_path / "not.jsonl.zst").write_bytes(b'{"a": 1}\n')
    expected = {
        "fake.parquet": "not a Parquet file",
        "pool.csv": r"unknown kind.*\.jsonl",
        "empty.jsonl": "no rows",
        "array.json": "JSON array; expected one JSON object per line",
        "cut.jsonl.gz": "gzip",
        "not.jsonl.zst": "zstd",
        "gone.jsonl": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            scan_files([str(tmp_path / name)], None)
        assert name in str(caught.value), "the file is not named"
    with pytest.raises(InputError, match="no file matches"):
        scan_files([str(tmp_path / "*.arrow")], None)
    with pytest.raises(InputError, match="no rows"):
        scan_files([], None)


def test_an_empty_part_beside_full_ones_is_no_error(tmp_path):
    write_lines(tmp_path / "part-0.jsonl", [])
    write_lines(tmp_path / "part-1.jsonl", [chat()])
    assert [f.rows for f in scan_files([f"{tmp_path}/*.jsonl"], None)] == [1]


def test_a_file_that_changed_after_the_scan_is_refused(tmp_path):
    url = write_lines(tmp_path / "p.jsonl", [chat()] * 3)
    parquet = write_parquet(tmp_path / "p.parquet", [chat()] * 3)
    files = scan_files([url, parquet], None)
    write_lines(tmp_path / "p.jsonl", [chat("changed")] * 3)
    write_parquet(tmp_path / "p.parquet", [chat()] * 4)
    for file in files:
        with pytest.raises(InputError, match="changed since"):
            read_examples(file, 0, 2)
