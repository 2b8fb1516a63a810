from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data.pool_files import PickedRows, PoolFiles, read_row_numbers, write_picks
from bakeoff.data.samples import Sample
from bakeoff.errors import DataError


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return path


def test_columns_are_guessed_by_name_whatever_the_case(tmp_path):
    def text_column(*names: str) -> str:
        path = lines(tmp_path / "pool.jsonl", [dict.fromkeys(names, "x")])
        return PoolFiles([path]).text_column

    assert text_column("id", "Text") == "Text"
    assert text_column("question", "text") == "text"
    assert text_column("only") == "only"
    with pytest.raises(DataError, match=r"no column has a usual name.* 'a', 'b'"):
        text_column("a", "b")


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("instruction", "input", "output"), ["input", "instruction", "output"]),
        (("context", "question", "answer"), ["context", "question", "answer"]),
        (("prompt", "completion"), [None, "prompt", "completion"]),
    ],
)
def test_samples_are_guessed_by_name(tmp_path, names, roles):
    path = lines(tmp_path / "chat.jsonl", [{name: name.upper() for name in names}])
    files = PoolFiles([path], samples=True)
    found = [files.roles.get(role) for role in ("context", "instruction", "response")]
    assert found == roles
    (sample,) = files.samples(files.scan())
    expected = ["" if role is None else role.upper() for role in roles]
    assert [sample.context, sample.instruction, sample.response] == expected


def test_an_answer_alone_is_no_sample(tmp_path):
    path = lines(tmp_path / "pool.jsonl", [{"text": "a", "answer": "yes"}])
    files = PoolFiles([path], samples=True)
    assert files.roles == {"text": "text"}
    assert list(files.samples(files.scan())) == [Sample("a")]


def test_row_numbers_run_through_files_and_shards_and_lead_back(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    texts = [f"text {i}" for i in range(50)]
    for name, start, stop in (("a", 0, 13), ("b", 13, 14), ("c", 14, 40)):
        table = pa.table({"text": texts[start:stop], "n": list(range(start, stop))})
        pq.write_table(table, shards / f"{name}.parquet", row_group_size=4)
    last = pa.table({"n": list(range(40, 50)), "text": texts[40:]})  # another order of columns
    pq.write_table(last, tmp_path / "last.parquet")
    files = PoolFiles([shards, tmp_path / "last.parquet"])
    pool = files.scan()
    assert pool.rows.tolist() == list(range(50))
    assert list(files.texts(pool)) == texts
    for numbers in ([49, 0, 13, 12, 40, 39], [7], list(range(50))[::-1]):
        rows = files.fetch(numbers).table
        assert rows["n"].to_pylist() == numbers
        assert rows["text"].to_pylist() == [texts[i] for i in numbers]


@settings(max_examples=30, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 39), min_size=1, unique=True),
    group=st.integers(1, 45),
    parquet=st.booleans(),
)
def test_any_rows_are_fetched_in_the_order_asked_for(tmp_path_factory, numbers, group, parquet):
    folder = tmp_path_factory.mktemp("fetch")
    records = [{"text": f"t{i}", "n": i} for i in range(40)]
    if parquet:
        path = folder / "pool.parquet"
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=group)
        found = PoolFiles([path]).fetch(numbers).table.to_pylist()
    else:
        found = PoolFiles([lines(folder / "pool.jsonl", records)]).fetch(numbers).records
    assert found == [records[i] for i in numbers]


def test_the_test_split_of_shards_is_left_out_and_numbers_still_fit(tmp_path):
    for name, texts in (("train", ["a", "b"]), ("test", ["c"]), ("validation", ["d", "e"])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}-00000.parquet")
    files = PoolFiles([tmp_path])
    pool = files.scan()
    assert list(files.texts(pool)) == ["a", "b"]
    assert "1 row of the data's own test split were left out." in pool.notes[0] + " "
    fetched = files.fetch(pool.rows.tolist()).table
    assert fetched["text"].to_pylist() == ["a", "b"]


def test_the_fingerprint_tells_texts_and_their_order_apart(tmp_path):
    def fingerprint(*texts: str, **options: Any) -> str:
        path = lines(tmp_path / "pool.jsonl", [{"text": text} for text in texts])
        return PoolFiles([path]).scan(**options).fingerprint

    first = fingerprint("ab", "c", "d")
    assert first == fingerprint("ab", "c", " ", "d")  # a blank row is not in the pool
    different = [
        fingerprint("a", "bc", "d"),
        fingerprint("c", "ab", "d"),
        fingerprint("ab", "c"),
        fingerprint("ab", "c", "d", max_rows=2),
        fingerprint("ab", "c", "d", max_rows=2, seed=1),
    ]
    assert len({first, *different}) == 6


@pytest.mark.parametrize(
    ("cells", "labelled"),
    [
        ([None, "", " ", "yes", "no"], [3, 4]),
        ([None, 0, 1], [1, 2]),
        ([True, False, None], [0]),
        (["True", "false", "", "FALSE"], [0]),
        (["false", "true", "maybe"], [0, 1, 2]),  # three labels, not a yes or no
        ([float("nan"), 0.0, None], [1]),
        ([[], ["a"], None], [1]),
    ],
)
def test_labelled_rows_by_column(tmp_path, cells, labelled):
    records = [{"text": "x", "label": cell} for cell in cells]
    path = lines(tmp_path / "pool.jsonl", records)
    assert PoolFiles([path]).scan(labelled="label").labelled.tolist() == labelled


def test_labelled_rows_by_number_count_blank_rows_too(tmp_path):
    path = lines(tmp_path / "pool.jsonl", [{"text": t} for t in ("a", "", "b", "c")])
    files = PoolFiles([path])
    pool = files.scan(labelled=[1, 2])
    assert pool.rows.tolist() == [0, 2, 3]
    assert pool.labelled.tolist() == [1]
    with pytest.raises(DataError, match="numbered from 0 to 3, got 4"):
        files.scan(labelled=[4])


def test_a_sample_of_rows_keeps_what_belongs_to_each(tmp_path):
    records = [
        {"text": f"t{i}", "p": i / 7, "g": i % 3, "label": "x" if i in (5, 70) else None}
        for i in range(90)
    ]
    files = PoolFiles([lines(tmp_path / "pool.jsonl", records)])
    pool = files.scan(labelled="label", confidence="p", groups="g", max_rows=20, seed=3)
    assert len(pool) == 22
    assert pool.rows[pool.labelled].tolist() == [5, 70]
    np.testing.assert_allclose(pool.confidence, pool.rows / 7)
    assert pool.groups == [str(row % 3) for row in pool.rows]
    assert list(files.texts(pool)) == [f"t{row}" for row in pool.rows]
    assert len(files.scan(max_rows=90)) == 90


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 7}, r"line 2: column 'text' holds int '7', not text"),
        ({"text": ["a"]}, r"column 'text' holds list"),
        ({"text": "half \ud83d"}, r"line 2: the text has half a surrogate pair at character 5"),
        ({"text": "a", "p": "high"}, r"line 2: column 'p' must hold numbers, got 'high'"),
        ({"text": "a", "p": None}, r"column 'p' must hold numbers, got None"),
    ],
)
def test_cells_that_cannot_be_used_are_named(tmp_path, record, message):
    path = lines(tmp_path / "pool.jsonl", [{"text": "fine", "p": 1}, record])
    with pytest.raises(DataError, match=message):
        PoolFiles([path]).scan(confidence="p")


def test_nothing_to_pick_is_refused(tmp_path):
    with pytest.raises(DataError, match="no row has a text in column 'text'"):
        PoolFiles([lines(tmp_path / "blank.jsonl", [{"text": ""}, {"text": None}])]).scan()
    (tmp_path / "none.csv").write_text("text\n")
    with pytest.raises(DataError, match="there are no rows"):
        PoolFiles([tmp_path / "none.csv"])
    with pytest.raises(DataError, match="at least one file"):
        PoolFiles([])


def test_files_that_differ_are_refused_and_types_that_agree_are_not(tmp_path):
    pq.write_table(
        pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.table({"text": ["b"], "n": pa.array([2], pa.int64())}), tmp_path / "b.parquet"
    )
    pq.write_table(pa.table({"text": ["c"], "n": pa.nulls(1)}), tmp_path / "c.parquet")
    fetched = PoolFiles([tmp_path]).fetch([2, 1, 0]).table
    assert fetched["n"].to_pylist() == [None, 2, 1]
    assert fetched["n"].type == pa.int64()
    pq.write_table(pa.table({"text": ["d"], "n": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"'n' is int32 in .*a.parquet and .* in"):
        PoolFiles([tmp_path])
    other = lines(tmp_path / "other.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match="files differ in their columns"):
        PoolFiles([tmp_path / "a.parquet", other])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "3\n 1,2\n"),
        ("rows.json", "[3, 1, 2]"),
        ("rows.csv", "row,reason\n3,x\n1,y\n2,z\n"),
        ("rows.jsonl", '{"row": 3}\n{"row": 1}\n{"row": 2}\n'),
    ],
)
def test_row_numbers_are_read_from_several_kinds_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_row_numbers(tmp_path / name) == [3, 1, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "three"),
        ("rows.json", "{"),
        ("rows.json", "[1.5]"),
        ("rows.json", "7"),
        ("rows.csv", "number\n1\n"),
        ("rows.txt", "\xff\xfe"),
    ],
)
def test_what_is_no_list_of_row_numbers_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(DataError, match="row"):
        read_row_numbers(tmp_path / name)


ODD = [
    {"text": 'say "hi",\nthere', "mixed": 1, "when": date(2024, 5, 1), "nest": {"a": [1, None]}},
    {"text": "ü 文", "mixed": "two", "when": None, "nest": None, "late": float("nan")},
]


def test_records_of_any_kind_are_written_whole(tmp_path):
    rows = PickedRows(records=[dict(record) for record in ODD])
    for suffix in (".parquet", ".jsonl", ".csv"):
        names = write_picks(rows, tmp_path / f"out{suffix}", {"row": [4, 2]})
        assert names == {"row": "row"}
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == [record["text"] for record in ODD]
    assert table["mixed"].to_pylist() == ["1", '"two"']  # of no common type: as JSON
    assert table["when"].to_pylist() == [date(2024, 5, 1), None]
    assert table["row"].to_pylist() == [4, 2]
    written = [
        json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    ]
    assert written[0] == {**ODD[0], "when": "2024-05-01", "row": 4}
    assert written[1] == {**ODD[1], "late": None, "row": 2}
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["text"] == ODD[0]["text"]
    assert json.loads(first["nest"]) == {"a": [1, None]}
    assert first["when"] == "2024-05-01"
    assert second["mixed"] == "two"
    assert second["nest"] == ""


def test_a_second_round_of_taken_names_counts_on(tmp_path):
    rows = PickedRows(records=[{"row": 1, "row_2": 2, "text": "a"}])
    assert write_picks(rows, tmp_path / "out.jsonl", {"row": [3]}) == {"row": "row_3"}


def test_texts_that_went_away_meanwhile_are_noticed(tmp_path):
    path = lines(tmp_path / "pool.jsonl", [{"text": "a"}, {"text": "b"}])
    files = PoolFiles([path])
    pool = files.scan()
    lines(path, [{"text": "a"}])
    with pytest.raises(DataError, match="became shorter"):
        list(files.texts(pool))
    with pytest.raises(DataError, match="became shorter"):
        files.fetch([1])
