"""From the user's files to pairs and tasks: layouts, splits, leaks, bad input (about 4 s)."""

import json

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from bakeoff.data import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    SimilarityTask,
    embedding_data,
    task_texts,
)
from bakeoff.data.splits import normalise
from bakeoff.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write_rows


def pairs(n, **more):
    return [{"query": f"query {i}", "answer": f"answer {i}", **more} for i in range(n)]


def labelled(n, n_classes=2):
    return [{"text": f"text {i}", "label": f"class {i % n_classes}"} for i in range(n)]


def scored(n):
    return [{"sentence1": f"left {i}", "sentence2": f"right {i}", "score": i / n} for i in range(n)]


def train_texts(data):
    return {
        normalise(text)
        for group in data.train
        for text in (*group.queries, *group.positives, *(group.negatives or ()))
    }


def held_out_texts(data):
    return {normalise(text) for task in data.tasks for text in task_texts(task)}


# --- pairs ------------------------------------------------------------------------------------


def test_pairs_are_split_and_every_answer_stays_with_its_query(write):
    data = embedding_data(write(pairs(100)))
    (train,), (task,) = data.train, data.tasks
    assert isinstance(task, RetrievalTask)
    assert (len(train), len(task.queries), len(task.documents)) == (80, 20, 20)
    assert train.group == "data"
    assert data.name == "data"
    for query, positive in zip(train.queries, train.positives, strict=True):
        assert positive == query.replace("query", "answer")
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        assert task.documents[relevant] == query.replace("query", "answer")
    assert set(train.queries) | set(task.queries) == {f"query {i}" for i in range(100)}


def test_the_split_follows_content_not_order(write):
    rows = pairs(60)
    first = embedding_data(write(rows))
    again = embedding_data(write(rows[::-1]))
    assert set(first.tasks[0].queries) == set(again.tasks[0].queries)
    assert set(embedding_data(write(rows), seed=1).tasks[0].queries) != set(first.tasks[0].queries)
    grown = embedding_data(write([*rows, *pairs(65)[60:]]))
    moved = set(first.tasks[0].queries) - set(grown.tasks[0].queries)
    assert len(moved) <= 5


def test_test_fraction_and_maximum_are_kept(write):
    path = write(pairs(200))
    assert len(embedding_data(path, test_fraction=0.5).tasks[0].queries) == 100
    assert len(embedding_data(path, max_test=7).tasks[0].queries) == 7


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 90)] * 3, st.booleans()), min_size=20, max_size=60, unique=True
    ),
    st.integers(0, 3),
)
def test_no_held_out_text_is_trained_on_and_no_second_answer_is_in_the_pool(
    tmp_path_factory, cells, seed
):
    # Queries, positives and negatives collide in every way, in two spellings.
    path = tmp_path_factory.mktemp("triplets") / "t.jsonl"
    rows = [
        {
            "query": f"Q {a}" if upper else f" q  {a}",
            "positive": f"d {b}",
            "negative": f"D {c}",
        }
        for a, b, c, upper in cells
    ]
    rows += [{"query": f"x {i}", "positive": f"y {i}", "negative": f"z {i}"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        data = embedding_data(path, seed=seed)
    except DataError:  # all may be linked; a test of its own says what happens then
        reject()
    (task,) = data.tasks
    assert train_texts(data).isdisjoint(held_out_texts(data))
    answers = {}
    for row in rows:
        answers.setdefault(normalise(row["query"]), set()).add(normalise(row["positive"]))
    documents = [normalise(text) for text in task.documents]
    assert len(set(documents)) == len(documents)
    assert len(set(map(normalise, task.queries))) == len(task.queries)
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        right = answers[normalise(query)]
        assert [i for i, text in enumerate(documents) if text in right] == [relevant]


def test_negatives_train_and_enlarge_the_pool(write):
    rows = [{**row, "hard negative": f"wrong {i}"} for i, row in enumerate(pairs(50))]
    data = embedding_data(write(rows))
    (train,), (task,) = data.train, data.tasks
    assert all(
        n.split()[1] == q.split()[1] for q, n in zip(train.queries, train.negatives, strict=True)
    )
    assert len(task.documents) == 20
    assert {text.split()[1] for text in task.documents[10:]} == {
        text.split()[1] for text in task.queries
    }


def test_a_negative_that_is_an_answer_is_dropped_and_said(write):
    rows = [{**row, "negative": f"wrong {i}"} for i, row in enumerate(pairs(30))]
    rows[3]["negative"] = "ANSWER 3"
    data = embedding_data(write(rows))
    assert len(data.train[0]) + len(data.tasks[0].queries) == 29
    assert any("1 row left out, because their negative is a positive" in n for n in data.notes)


def test_copies_are_dropped_and_said(write):
    rows = [*pairs(40), {"query": "QUERY  1", "answer": "answer 1 "}]
    data = embedding_data(write(rows))
    assert len(data.train[0]) + len(data.tasks[0].queries) == 40
    assert any("1 row left out, because they repeat an earlier row" in n for n in data.notes)


def test_rows_chained_by_shared_texts_cannot_be_split(write):
    rows = [{"query": "always the same?", "answer": f"answer {i}"} for i in range(5)]
    rows += [{"query": f"query {i}", "answer": "answer 0"} for i in range(20)]
    with pytest.raises(DataError, match="nearly all of its 25 rows are linked by texts"):
        embedding_data(write(rows))


def test_a_given_split_is_honoured_and_cleaned(tmp_path):
    import datasets

    train = [*pairs(30), {"query": "query 101", "answer": "leaked query"}]
    train.append({"query": "leaked answer", "answer": "answer 102"})
    test = [{"query": f"query {i}", "answer": f"answer {i}"} for i in range(100, 115)]
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
    ).save_to_disk(str(tmp_path / "faq"))
    data = embedding_data(tmp_path / "faq")
    assert set(data.tasks[0].queries) == {row["query"] for row in test}
    assert set(data.train[0].queries) == {row["query"] for row in pairs(30)}
    assert any("2 rows left out, because a text of theirs is held out" in n for n in data.notes)
    assert len(embedding_data(tmp_path / "faq", max_test=5).tasks[0].queries) == 5


# --- labelled ---------------------------------------------------------------------------------


def test_labelled_texts_become_classification_and_clustering(write):
    data = embedding_data(write(labelled(100, 4)))
    classification, clustering = data.tasks
    assert isinstance(classification, ClassificationTask)
    assert isinstance(clustering, ClusteringTask)
    assert data.train == ()
    assert len(classification.test_texts) == 20
    assert len(classification.train_texts) == 80
    assert set(classification.train_texts).isdisjoint(classification.test_texts)
    assert clustering.texts == classification.test_texts
    for texts, labels in [
        (classification.train_texts, classification.train_labels),
        (classification.test_texts, classification.test_labels),
    ]:
        assert all(
            f"class {int(t.split()[1]) % 4}" == lab for t, lab in zip(texts, labels, strict=True)
        )
    assert np.unique(classification.test_labels, return_counts=True)[1].tolist() == [5, 5, 5, 5]


def test_a_class_with_one_text_is_trained_on_and_said(write):
    data = embedding_data(write([*labelled(40), {"text": "lonely", "label": "rare"}]))
    assert "rare" in data.tasks[0].train_labels
    assert "rare" not in data.tasks[0].test_labels
    assert any("1 class with one text only ('rare')" in note for note in data.notes)


def test_a_text_with_two_labels_keeps_the_first(write):
    data = embedding_data(write([*labelled(40), {"text": "TEXT 0", "label": "class 1"}]))
    task = data.tasks[0]
    label_of = dict(zip(task.train_texts, task.train_labels, strict=True))
    label_of |= dict(zip(task.test_texts, task.test_labels, strict=True))
    assert label_of["text 0"] == "class 0"
    assert "TEXT 0" not in label_of
    assert any("repeat a text with another label" in note for note in data.notes)


def test_labels_may_be_integers_booleans_and_whole_floats(write):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate([1, 2.0, True] * 10)]
    assert set(embedding_data(write(rows)).tasks[0].train_labels) == {"1", "2", "True"}


def test_few_test_texts_give_no_clustering_task(write):
    data = embedding_data(write(labelled(24, 8)))
    assert [type(task) for task in data.tasks] == [ClassificationTask]
    assert any("no clustering task" in note for note in data.notes)


def test_a_given_split_wins_over_a_copy_in_training(tmp_path):
    import datasets

    test = [{"text": f"test {i}", "label": f"class {i % 2}"} for i in range(6)]
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([*labelled(20), *test[:2]]),
            "test": datasets.Dataset.from_list(test),
        }
    ).save_to_disk(str(tmp_path / "mail"))
    task = embedding_data(tmp_path / "mail").tasks[0]
    assert set(task.test_texts) == {row["text"] for row in test}
    assert set(task.train_texts) == {row["text"] for row in labelled(20)}


# --- scored -----------------------------------------------------------------------------------


def test_scored_pairs_become_similarity(write):
    rows = scored(30)
    rows[4]["score"] = "0.75"  # as CSV would give it
    (task,) = embedding_data(write(rows)).tasks
    assert isinstance(task, SimilarityTask)
    expected = {row["sentence1"]: float(row["score"]) for row in rows}
    assert dict(zip(task.texts_a, task.scores.tolist(), strict=True)) == expected
    assert all(
        a.split()[1] == b.split()[1] for a, b in zip(task.texts_a, task.texts_b, strict=True)
    )


def test_the_same_two_texts_count_once_in_either_order(write):
    rows = [*scored(20), {"sentence1": "RIGHT 3", "sentence2": "left 3", "score": 1}]
    assert len(embedding_data(write(rows)).tasks[0].scores) == 20


def test_scored_pairs_beyond_the_maximum_are_sampled(write):
    assert len(embedding_data(write(scored(50)), max_test=12).tasks[0].scores) == 12


# --- several files ----------------------------------------------------------------------------


def test_several_files_are_groups_of_their_own_and_do_not_leak_into_each_other(write):
    first, second = write(pairs(60), "a.jsonl"), write(pairs(90), "b.jsonl")
    third, fourth = write(labelled(20), "c.jsonl"), write(scored(20), "d.jsonl")
    data = embedding_data([first, second, third, fourth], seed=3, name="everything")
    assert data.name == "everything"
    assert [group.group for group in data.train] == ["a", "b"]
    assert [task.name for task in data.tasks] == [
        "a retrieval",
        "b retrieval",
        "c classification",
        "c clustering",
        "d similarity",
    ]
    assert train_texts(data).isdisjoint(held_out_texts(data))
    assert any("because another file holds a text of theirs out" in note for note in data.notes)


def test_files_of_one_name_are_told_apart(write, tmp_path):
    (tmp_path / "other").mkdir()
    data = embedding_data([write(scored(20), "a.jsonl"), write(scored(20), "other/a.jsonl")])
    assert [task.name for task in data.tasks] == ["a similarity", "a 2 similarity"]


# --- sampling ---------------------------------------------------------------------------------


def test_max_texts_samples_by_hash_while_reading(write):
    path = write(pairs(2000))
    small, large = (embedding_data(path, max_texts=n) for n in (100, 400))
    assert len(small.texts()) == 100
    assert len(large.texts()) == 400
    assert set(small.texts()) <= set(large.texts())
    assert any("50 of them sampled" in note for note in small.notes)
    assert set(embedding_data(path, max_texts=100, seed=1).texts()) != set(small.texts())


def test_sampling_still_checks_every_row(write):
    rows = pairs(500)
    rows[490]["answer"] = None
    with pytest.raises(DataError, match=r"1 cell is not text: line 491 \(missing\)"):
        embedding_data(write(rows), max_texts=60)


# --- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("Question", "ANSWER"), RetrievalTask),
        (("anchor", "positive"), RetrievalTask),
        (("docstring", "code"), RetrievalTask),
        (("sentence 1", "Sentence-2", "score"), SimilarityTask),
        (("text", "Category"), ClassificationTask),
        (("document", "label"), ClassificationTask),
        (("id", "query", "passage", "url"), RetrievalTask),
        (("query", "positive", "negative", "score"), RetrievalTask),
    ],
)
def test_usual_column_names_are_guessed(write, columns, kind):
    def cell(name, i):
        return i % 2 if name in ("Category", "label") else i if name == "score" else f"{name} {i}"

    rows = [{name: cell(name, i) for name in columns} for i in range(30)]
    assert isinstance(embedding_data(write(rows)).tasks[0], kind)


def test_columns_can_be_named(write):
    rows = [{"frage": f"f {i}", "antwort": f"a {i}", "text": f"t {i}"} for i in range(30)]
    data = embedding_data(write(rows), columns={"text": "frage", "positive": "antwort"})
    assert data.train[0].queries[0].startswith("f ")
    rows = [{"l": f"l {i}", "r": f"r {i}", "label": i} for i in range(30)]
    chosen = {"text_a": "l", "text_b": "r", "score": "label"}
    assert isinstance(embedding_data(write(rows), columns=chosen).tasks[0], SimilarityTask)


def test_task_decides_where_columns_allow_several(write):
    rows = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 2} for i in range(30)]
    path = write(rows)
    with pytest.raises(DataError, match="several readings: 'premise', 'hypothesis', 'label'"):
        embedding_data(path)
    assert isinstance(embedding_data(path, task="pairs").tasks[0], RetrievalTask)
    assert isinstance(embedding_data(path, task="labelled").tasks[0], ClassificationTask)


COLUMN_ERRORS = {
    "missing": (
        {"question": "a", "said": "b"},
        {"task": "pairs"},
        r"data.jsonl: no column for 'positive'.*found: 'question', 'said'.*--column positive=NAME",
    ),
    "unrecognised": (
        {"foo": "a", "bar": "b"},
        {},
        r"not recognised. Columns found: 'foo', 'bar'.*--column text=NAME",
    ),
    "text alone": ({"text": "a"}, {}, "not recognised. Columns found: 'text'"),
    "double": (
        {"question": "a", "query": "b", "answer": "c"},
        {},
        r"columns 'question', 'query' could each be 'text'.*found: 'question', 'query', 'answer'"
        r".*--column text=NAME",
    ),
    "no such": (
        {"question": "a", "answer": "b"},
        {"columns": {"text": "frage"}},
        "--column text=frage: no such column; columns found: 'question', 'answer'",
    ),
    "no such role": (
        {"question": "a", "answer": "b"},
        {"columns": {"qury": "question"}},
        "unknown role 'qury' in --column qury=question; roles are 'text', 'positive'",
    ),
    "twice": (
        {"question": "a", "answer": "b"},
        {"columns": {"text": "question", "positive": "question"}},
        "column 'question' cannot be 'text' and 'positive'",
    ),
}


@pytest.mark.parametrize(("row", "options", "message"), COLUMN_ERRORS.values(), ids=COLUMN_ERRORS)
def test_unclear_columns_are_named_with_the_option_that_mends_it(write, row, options, message):
    with pytest.raises(DataError, match=message):
        embedding_data(write([row] * 20), **options)


# --- bad input --------------------------------------------------------------------------------


def with_cell(rows, column, *values):
    for i, value in enumerate(values):
        rows[2 + 2 * i][column] = value
    return rows


BAD_ROWS = {
    "cells": (
        with_cell(pairs(30), "answer", None, 7, "  ", float("nan"), ["x"]),
        r"column 'answer': 5 cells are not text: line 3 \(missing\), line 5 \(the number 7\), "
        r"line 7 \(blank\), \.\.\.; mend or remove",
    ),
    "surrogate": (
        with_cell(pairs(30), "query", "\ud800"),
        r"column 'query': 1 cell is not text: line 3 \(half of a surrogate pair",
    ),
    "labels": (
        with_cell(labelled(30), "label", 0.5, "", float("nan")),
        r"column 'label': 3 cells are not a label: line 3 \(the number 0.5\), line 5 \(blank\), "
        r"line 7 \(missing: NaN\)",
    ),
    "scores": (
        with_cell(scored(30), "score", "high", True, float("inf")),
        r"3 cells are not a finite number: line 3 \(the text 'high'\), line 5 \(the value True\)",
    ),
    "one row": (pairs(1), "only 1 distinct row; at least 10 are needed"),
    "few rows": (labelled(9), "only 9 distinct rows; at least 10 are needed"),
    "copies": (pairs(5) * 20, "only 5 distinct rows"),
    "all queries": (
        [{"query": "same", "answer": f"answer {i}"} for i in range(30)],
        r"column 'query': all texts are identical \('same'\)",
    ),
    "all answers": (
        [{"query": f"query {i}", "answer": "Same"} for i in range(30)],
        "column 'answer': all texts are identical",
    ),
    "all labelled": (
        [{"text": "same", "label": i % 2} for i in range(30)],
        "only 1 distinct row",
    ),
    "one class": (labelled(30, 1), "column 'label' holds one class only .'class 0'.; at least 2"),
    "all classes single": (labelled(30, 30), "fewer than 2 classes have a text to test on"),
    "constant": (
        [{**row, "score": 0.5} for row in scored(30)],
        "column 'score': all scores are 0.5; a rank correlation needs scores that differ",
    ),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(write, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        embedding_data(write(rows))
    assert "data.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "task must be one of 'pairs', 'labelled', 'scored' or None"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1, got 1.0"),
        ({"max_test": 1}, "max_test must be at least 2, got 1"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"max_texts": 3}, "max_texts must be at least 30 per file, got 3 for 1 file"),
    ],
)
def test_bad_arguments_are_named(write, options, message):
    with pytest.raises(DataError, match=message):
        embedding_data(write(pairs(30)), **options)


def test_paths_must_be_some_and_distinct(write):
    with pytest.raises(DataError, match="paths is empty"):
        embedding_data([])
    path = write(pairs(30))
    with pytest.raises(DataError, match="names a file twice"):
        embedding_data([path, str(path)])


def test_a_header_without_rows_is_an_empty_file(tmp_path):
    (tmp_path / "a.csv").write_text("query,answer\n")
    with pytest.raises(DataError, match="the file is empty; it must hold at least 10 rows"):
        embedding_data(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("Where?,Here.\nWhen?,Now.\n")
    with pytest.raises(DataError, match="the first line must name the columns"):
        embedding_data(tmp_path / "b.csv")
