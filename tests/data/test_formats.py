"""The file formats, each against another writer, and what is said of broken ones (about 4 s)."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data import read_table
from bakeoff.errors import DataError

ROWS = [
    {"query": "wo?", "answer": 'hier, "da"\nund dort'},
    {"query": "où ?", "answer": "là; ici\there"},
    {"query": "何処", "answer": "🙂"},
]
COLUMNS = {name: tuple(row[name] for row in ROWS) for name in ("query", "answer")}


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: list(cells) for name, cells in columns.items()}), path)


def test_every_format_gives_the_same_columns(tmp_path):
    import datasets

    write_csv(tmp_path / "a.csv", ROWS)
    write_csv(tmp_path / "semicolon.csv", ROWS, delimiter=";")
    write_csv(tmp_path / "a.tsv", ROWS, delimiter="\t", lineterminator="\n")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), "utf-8")
    parquet(tmp_path / "a.parquet", COLUMNS)
    (tmp_path / "shards").mkdir()
    for i, row in enumerate(ROWS):
        parquet(tmp_path / "shards" / f"{i}.parquet", {name: [row[name]] for name in row})
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for path in tmp_path.iterdir():
        assert read_table(path).columns == COLUMNS, path.name
        assert read_table(str(path)).splits == (None, None, None)


def test_places_are_those_an_editor_shows(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    assert read_table(tmp_path / "a.csv").places == ("line 2", "line 4", "line 5")
    (tmp_path / "b.csv").write_text("\nquery\n\none\n\n\ntwo\n")
    assert read_table(tmp_path / "b.csv").places == ("line 4", "line 7")
    (tmp_path / "a.jsonl").write_text('{"query": "one"}\n\n{"query": "two"}')
    assert read_table(tmp_path / "a.jsonl").places == ("line 1", "line 3")
    (tmp_path / "a.json").write_text('[{"query": "one"}, {"query": "two"}]')
    assert read_table(tmp_path / "a.json").places == ("item 1", "item 2")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_accepted(tmp_path, suffix):
    text = "query\nwo?\n" if suffix == ".csv" else '{"query": "wo?"}\n'
    (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_table(tmp_path / f"a{suffix}").columns == {"query": ("wo?",)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_any_text_survives_csv_and_json(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    rows = [{"query": text, "other": "x"} for text in texts]
    write_jsonl(folder / "a.jsonl", rows)
    assert read_table(folder / "a.jsonl").columns["query"] == tuple(texts)
    write_csv(folder / "a.csv", rows, quoting=csv.QUOTE_ALL)
    assert read_table(folder / "a.csv").columns["query"] == tuple(texts)


def test_a_cell_longer_than_the_csv_module_likes_is_read_and_its_limit_restored(tmp_path):
    limit = csv.field_size_limit()
    write_csv(tmp_path / "a.csv", [{"query": "x" * 300_000, "answer": "y"}])
    assert len(read_table(tmp_path / "a.csv").columns["query"][0]) == 300_000
    assert csv.field_size_limit() == limit


def test_a_dataset_dict_keeps_its_splits_and_class_names(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )

    def part(texts, labels):
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    saved = datasets.DatasetDict(
        {
            "train": part(["a", "b", "c"], [0, 1, 0]).select([2, 0]),
            "validation": part(["d"], [1]),
            "test": part(["e"], [-1]),
        }
    )
    saved.save_to_disk(str(tmp_path / "dict"))
    table = read_table(tmp_path / "dict")
    assert table.columns == {"text": ("c", "a", "e"), "label": ("ham", "ham", None)}
    assert table.splits == ("train", "train", "test")
    assert table.places == ("train row 1", "train row 2", "test row 1")


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    for name in ("train-0", "train-1", "validation-0"):
        parquet(tmp_path / f"{name}.parquet", {"text": [name]})
    table = read_table(tmp_path)
    assert table.splits == ("train", "train", "test")
    assert table.places[2] == "validation-0.parquet row 1"


def test_shards_of_other_names_are_no_split(tmp_path):
    for name in ("test-a", "part-b"):
        parquet(tmp_path / f"{name}.parquet", {"text": [name]})
    assert read_table(tmp_path).splits == (None, None)


def test_a_record_without_a_key_has_a_gap(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "1"}\n{"a": "2", "b": null}\n{"b": "3"}\n')
    assert read_table(tmp_path / "a.jsonl").columns == {
        "a": ("1", "2", None),
        "b": (None, None, "3"),
    }


BROKEN = {
    "empty": ("a.csv", b"", "a.csv: the file is empty"),
    "extension": ("a.xlsx", b"x", r"unknown extension '.xlsx'; accepted is a .jsonl"),
    "latin 1": (
        "a.csv",
        "query,answer\nab,c\ncafé,d\n".encode("latin-1"),
        r"not UTF-8 at byte 21 \(line 3, value 0xe9\); tried UTF-8 with and without byte order",
    ),
    "latin 1 after a mark": (
        "a.jsonl",
        b'\xef\xbb\xbf{"a": "\xe9"}',
        r"not UTF-8 at byte 10 \(line 1",
    ),
    "utf-16": ("a.csv", "query,answer\n".encode("utf-16"), "begins with the mark of UTF-16"),
    "json line": (
        "a.jsonl",
        b'{"a": "b"}\n{"a": \n',
        r"line 2 is not valid JSON: Expecting value at column \d",
    ),
    "json array": ("a.json", b'[{"a": "b"},\n {"a" "c"}]', "line 2 is not valid JSON"),
    "pretty printed": ("a.json", b'{\n"a": "b"}', "line 1 is not valid JSON.*an array of objects"),
    "not an object": ("a.jsonl", b'{"a": "b"}\n["c"]\n', "line 2 is an array, not an object"),
    "number": ("a.json", b'[{"a": "b"}, 3]', "item 2 is a number, not an object"),
    "deep": ("a.jsonl", b'{"a":' + b"[" * 200_000, "line 1 is not usable JSON"),
    "long number": ("a.jsonl", b'{"a":' + b"1" * 9999 + b"}", "line 1 is not usable JSON"),
    "ragged": (
        "a.csv",
        b"query,answer\na,b\nc,d,e\n",
        "line 3 has 3 fields, the header has 2 .'query', 'answer'.",
    ),
    "short": ("a.tsv", b"query\tanswer\na\n", "line 2 has 1 field, the header has 2"),
    "open quote": (
        "a.csv",
        b'query,answer\na,b\n"c,d\ne,f\n',
        "the row that starts at line 3 is not valid CSV: unexpected end of data",
    ),
    "stray quote": ("a.csv", b'query,answer\n"a"b,c\n', "starts at line 2 is not valid CSV"),
    "twice": ("a.csv", b"query,query\na,b\n", "the header names column 'query' twice"),
    "parquet": ("a.parquet", b"PAR1 no", "a.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(tmp_path / name)
    assert name in str(caught.value)


def test_missing_paths_and_unfit_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.csv: no such file; accepted is"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"a folder without \.parquet shards or a saved dataset"):
        read_table(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable datasets folder"):
        read_table(tmp_path)


def test_shards_with_other_columns_are_named(tmp_path):
    parquet(tmp_path / "a.parquet", {"query": ["x"]})
    parquet(tmp_path / "b.parquet", {"question": ["x"]})
    with pytest.raises(DataError, match=r"a.parquet has 'query', b.parquet has 'question'"):
        read_table(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"b.parquet: not a readable Parquet file"):
        read_table(tmp_path)


def test_unread_columns_stay_on_disk(tmp_path):
    import datasets

    from bakeoff.data.formats import iterate_rows

    parquet(tmp_path / "a.parquet", {"query": ["x"], "vector": [[0.0] * 8]})
    datasets.Dataset.from_dict({"query": ["x"], "vector": [[0.0]]}).save_to_disk(
        str(tmp_path / "saved")
    )
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert [row.values for row in iterate_rows(path, ["query"])] == [{"query": "x"}]


def test_reading_streams(tmp_path):
    from bakeoff.data.formats import iterate_rows

    # The mistake in line 3 must not be met before line 3 is asked for.
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\nnonsense\n')
    rows = iterate_rows(tmp_path / "a.jsonl")
    assert [next(rows).values["a"], next(rows).values["a"]] == [1, 2]
    with pytest.raises(DataError, match="line 3"):
        next(rows)
