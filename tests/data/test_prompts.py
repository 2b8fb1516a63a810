"""Prompts from files of every kind, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeoff.data.prompts import Prompt, prompts_fingerprint, read_prompts
from bakeoff.errors import DataError

ROWS = [
    {"question": "One?", "answer": "1", "choices": ["1", "2"], "context": "Numbers."},
    {"question": "Two?", "answer": ["2", "two"], "choices": ["1", "2"], "context": None},
]
EXPECTED = (
    Prompt("One?", ("1",), ("1", "2"), (), "Numbers."),
    Prompt("Two?", ("2", "two"), ("1", "2")),
)


def write(tmp_path, rows, name="p.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_usual_names_are_found(tmp_path):
    assert read_prompts([write(tmp_path, ROWS)]) == (EXPECTED, ())


def test_csv_holds_json_arrays_or_one_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        'prompt,answers,options\nOne?,1,"[""1"", ""2""]"\nBracket?,[open,"[""[open""]"\n',
        encoding="utf-8",
    )
    found, _ = read_prompts([path])
    assert found == (
        Prompt("One?", ("1",), ("1", "2")),
        Prompt("Bracket?", ("[open",), ("[open",)),
    )


def test_parquet_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "p.parquet"
    table = pyarrow.table({"prompt": ["a", "b"], "options": [["x", "y"], []], "answer": ["x", "z"]})
    pyarrow.parquet.write_table(table, path)
    assert read_prompts([path])[0] == (Prompt("a", ("x",), ("x", "y")), Prompt("b", ("z",)))


def test_named_columns_prevail(tmp_path):
    path = write(tmp_path, [{"prompt": "no", "mine": "yes", "answer": 3}])
    (found,), _ = read_prompts([path], columns={"prompt": "mine"})
    assert (found.text, found.answers) == ("yes", ("3",))


def test_blank_and_repeated_rows_are_counted(tmp_path):
    path = write(tmp_path, [*ROWS, ROWS[0], {"question": " "}, {"answer": "x"}])
    found, notes = read_prompts([path])
    assert found == EXPECTED
    assert notes == (
        "p.jsonl: 2 rows left out: without a prompt.",
        "p.jsonl: 1 row left out: seen before.",
    )


def test_a_draw_depends_on_content_alone(tmp_path):
    rows = [{"prompt": f"number {n}"} for n in range(50)]
    first, notes = read_prompts([write(tmp_path, rows)], max_prompts=10)
    second, _ = read_prompts([write(tmp_path, rows[::-1])], max_prompts=10)
    assert len(first) == 10
    assert set(first) == set(second)
    assert notes == ("10 of 50 prompts drawn by their content.",)
    assert set(read_prompts([write(tmp_path, rows)], max_prompts=10, seed=1)[0]) != set(first)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"words": "x"}], {}, r"no column has a usual name for a prompt.*'?words"),
        ([{"prompt": "x"}], {"columns": {"document": "d"}}, "document: there is no column 'd'"),
        ([{"prompt": "x"}], {"columns": {"label": "d"}}, "no role 'label'"),
        ([{"prompt": " "}], {}, "no row has a prompt"),
        ([{"prompt": "x", "answer": {"a": 1}}], {}, r"line 1: answers must be a text or a list"),
        ([{"prompt": "x", "answer": [None]}], {}, r"line 1: answers must be a text or a list"),
        ([{"prompt": "x", "context": 3}], {}, "line 1: document must be text, got int"),
        ([{"prompt": "x", "answer": "a", "options": ["b"]}], {}, "line 1: no accepted answer"),
        ([{"prompt": "x", "options": ["b", "b"]}], {}, "line 1: options must differ"),
        ([{"prompt": "x", "passages": ["b", " "]}], {}, "line 1: passages must not hold a blank"),
        ([{"prompt": "x"}], {"max_prompts": 0}, "max_prompts must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        read_prompts([write(tmp_path, rows)], **options)


texts = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.builds(Prompt, texts, st.lists(texts).map(tuple)), max_size=4, unique=True))
def test_the_fingerprint_tells_prompts_and_orders_apart(prompts):
    known = prompts_fingerprint(prompts)
    assert known == prompts_fingerprint(list(prompts))
    if len(prompts) > 1:
        assert known != prompts_fingerprint(prompts[::-1])
        assert known != prompts_fingerprint(prompts[1:])
