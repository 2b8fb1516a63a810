"""The user's files as a training pool: columns, sources, the split of the target, and leaks."""

from __future__ import annotations

import csv
import json

import pytest
from tests.embedding.tiny_problem import sentences

from bakeoff.data.samples import Sample
from bakeoff.data.training_files import training_pool
from bakeoff.errors import DataError

TEXTS = sentences(60, 7)


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(path, texts, column="text", **more):
    return write(path, [{column: text, **more} for text in texts])


@pytest.fixture
def files(tmp_path):
    return plain(tmp_path / "pool.jsonl", TEXTS[:30]), plain(tmp_path / "target.csv", TEXTS[30:42])


def responses(samples):
    return [sample.response for sample in samples]


def test_half_of_the_target_are_queries_and_half_are_tests(files):
    pool = training_pool([files[0]], files[1])
    assert pool.samples == tuple(map(Sample, TEXTS[:30]))
    assert len(pool.queries) == len(pool.test) == 6
    assert {*responses(pool.queries), *responses(pool.test)} == set(TEXTS[30:42])
    assert pool.relevant is None
    assert pool.name == "pool.jsonl"
    assert pool.notes[-1] == "target.csv: 6 queries, 6 tests."


def test_the_split_goes_by_content_and_seed_and_not_by_order(files, tmp_path):
    pool = training_pool([files[0]], files[1])
    turned = plain(tmp_path / "turned.jsonl", [f"  {text.upper()}" for text in TEXTS[30:42][::-1]])
    same = training_pool([files[0]], turned)
    assert [text.strip().lower() for text in responses(same.test)] == responses(pool.test)
    others = [training_pool([files[0]], files[1], seed=seed).test for seed in (1, 2)]
    assert len({pool.test, *others}) == 3


def test_rows_that_are_also_tests_leave_the_pool_in_whatever_spelling(files, tmp_path):
    pool = training_pool([files[0]], files[1])
    test, query = pool.test[0].response, pool.queries[0].response
    leaky = plain(tmp_path / "leaky.jsonl", [*TEXTS[:5], f" {test.upper()} ", query, test])
    found = training_pool([leaky], files[1])
    assert responses(found.samples) == [*TEXTS[:5], query]
    assert "2 rows of the pool left out: also among the tests." in found.notes
    only = plain(tmp_path / "only.jsonl", [test, test])
    with pytest.raises(DataError, match=r"^only\.jsonl: every row .* also a test row of .*target"):
        training_pool([only], files[1])


def test_copies_in_the_target_do_not_straddle_the_split(files, tmp_path):
    copies = [*TEXTS[30:36], *(text.upper() for text in TEXTS[30:36]), *TEXTS[30:36]]
    pool = training_pool([files[0]], plain(tmp_path / "copies.csv", copies))
    assert len(pool.queries) == len(pool.test) == 3
    lower = [{text.lower() for text in responses(part)} for part in (pool.queries, pool.test)]
    assert lower[0].isdisjoint(lower[1])


def test_sources_are_read_and_rows_drawn(tmp_path, files):
    rows = [{"text": text, "source": f"s{i % 3}"} for i, text in enumerate(TEXTS[:30])]
    path = write(tmp_path / "mixed.jsonl", rows)
    pool = training_pool([path], files[1])
    assert pool.samples == tuple(Sample(row["text"], source=row["source"]) for row in rows)
    drawn = training_pool([path], files[1], max_texts=10, seed=4)
    assert len(drawn.samples) == 10
    assert set(drawn.samples) <= set(pool.samples)
    assert any("10 were drawn at random (seed 4)" in note for note in drawn.notes)
    assert drawn.samples == training_pool([path], files[1], max_texts=10, seed=4).samples
    assert drawn.samples != training_pool([path], files[1], max_texts=10, seed=5).samples


def test_tests_are_limited(files):
    pool = training_pool([files[0]], files[1], max_test=2)
    assert (len(pool.queries), len(pool.test)) == (6, 2)


def test_samples_are_read_from_their_columns(tmp_path):
    rows = [
        {"context": TEXTS[i], "instruction": TEXTS[i + 1], "response": TEXTS[i + 2]}
        for i in range(0, 45, 3)
    ]
    pool = training_pool(
        [write(tmp_path / "pool.jsonl", rows[:9])], write(tmp_path / "target.jsonl", rows[9:])
    )
    assert pool.samples == tuple(Sample(**row) for row in rows[:9])
    assert {*pool.queries, *pool.test} == {Sample(**row) for row in rows[9:]}


def test_several_files_are_one_pool_with_both_names(files, tmp_path):
    more = plain(tmp_path / "more.jsonl", TEXTS[50:55])
    pool = training_pool([files[0], more], files[1])
    assert pool.name == "pool.jsonl, more.jsonl"
    assert responses(pool.samples) == [*TEXTS[:30], *TEXTS[50:55]]
    assert training_pool([more], files[1], name="mine").name == "mine"


def test_columns_that_were_named_serve_the_target_too(tmp_path):
    """Neither name is usual, and there is a second column, so that nobody could guess."""
    pool = plain(tmp_path / "pool.jsonl", TEXTS[:9], "words", other="x")
    target = plain(tmp_path / "target.jsonl", TEXTS[10:20], "words", other="x")
    found = training_pool([pool], target, columns={"text": "words"})
    assert responses(found.samples) == list(TEXTS[:9])
    assert {*responses(found.queries), *responses(found.test)} == set(TEXTS[10:20])
    # A column of a usual name does not win over the one that was named.
    pool = plain(tmp_path / "pool.jsonl", TEXTS[:9], "words", text="x")
    target = plain(tmp_path / "target.jsonl", TEXTS[10:20], "words", text="x")
    found = training_pool([pool], target, columns={"text": "words"})
    assert {*responses(found.queries), *responses(found.test)} == set(TEXTS[10:20])


def test_a_target_may_have_columns_of_its_own(tmp_path):
    pool = plain(tmp_path / "pool.jsonl", TEXTS[:9], "words", other="x")
    target = plain(tmp_path / "target.jsonl", TEXTS[10:20], "sentence", number=3)
    found = training_pool([pool], target, columns={"text": "words"})
    assert {*responses(found.queries), *responses(found.test)} == set(TEXTS[10:20])


def test_what_cannot_be_read_is_named(files, tmp_path):
    with pytest.raises(DataError, match="a target needs at least 4 distinct rows, got 3"):
        training_pool([files[0]], plain(tmp_path / "t.csv", ["a", "b", "c", " C"]))
    with pytest.raises(DataError, match=r"absent\.csv: no such file"):
        training_pool([files[0]], tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"absent\.csv: no such file"):
        training_pool([tmp_path / "absent.csv"], files[1])
    with pytest.raises(DataError, match=r"text: there is no column 'words' in .*pool\.jsonl"):
        training_pool([files[0]], files[1], columns={"text": "words"})
    with pytest.raises(DataError, match="give at least one file or folder"):
        training_pool([], files[1])
    unclear = plain(tmp_path / "u.jsonl", TEXTS[:9], "words", other="x")
    with pytest.raises(DataError, match=r"u\.jsonl: no column has a usual name for a text"):
        training_pool([files[0]], unclear)
