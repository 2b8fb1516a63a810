"""The records: what they refuse, and what their fingerprint depends on (under 1 s)."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from bakeoff.data import (
    ClassificationTask,
    ClusteringTask,
    EmbeddingData,
    RetrievalTask,
    SimilarityTask,
    TextPairs,
    task_texts,
)
from bakeoff.errors import DataError


def everything():
    return EmbeddingData(
        "all",
        (TextPairs(("a",), ("b",), ("c",), "g"),),
        (
            RetrievalTask("r", ("q",), ("d", "e"), np.array([1])),
            SimilarityTask("s", ("x",), ("y",), np.array([0.5])),
            ClusteringTask("c", ("t",), ("l",)),
            ClassificationTask("k", ("u",), ("l",), ("v",), ("m",)),
        ),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextPairs(("a",), ("b", "c")),
        lambda: TextPairs(("a",), ("b",), ()),
        lambda: RetrievalTask("r", ("q", "r"), ("d",), np.array([0])),
        lambda: SimilarityTask("s", ("a",), ("b",), np.array([0.0, 1.0])),
        lambda: ClusteringTask("c", ("a",), ()),
        lambda: ClassificationTask("k", ("a",), ("l",), ("b",), ()),
    ],
)
def test_lengths_that_differ_are_refused(make):
    with pytest.raises(DataError, match="lengths must agree"):
        make()


@pytest.mark.parametrize("relevant", [[2], [-1]])
def test_relevant_outside_the_documents_is_refused(relevant):
    with pytest.raises(DataError, match="task 'r': relevant must index the 2 documents"):
        RetrievalTask("r", ("q",), ("d", "e"), np.array(relevant))


@pytest.mark.parametrize("relevant", [[0.0], [[0]]])
def test_relevant_must_be_integers_in_one_dimension(relevant):
    with pytest.raises(DataError, match="one integer per query"):
        RetrievalTask("r", ("q",), ("d", "e"), np.array(relevant))


def test_scores_must_be_finite():
    with pytest.raises(DataError, match=r"1 are not \(first at index 1\)"):
        SimilarityTask("s", ("a", "b"), ("c", "d"), np.array([1.0, np.nan]))


def test_one_string_is_no_sequence_of_texts():
    with pytest.raises(DataError, match="texts must be a sequence"):
        ClusteringTask("c", "abc", ("x", "y", "z"))


def test_task_names_must_differ():
    task = ClusteringTask("c", ("a",), ("x",))
    with pytest.raises(DataError, match=r"distinct names.*'c'"):
        EmbeddingData("d", (), (task, task))


def test_texts_are_all_and_distinct():
    data = everything()
    assert data.texts() == ("a", "b", "c", "q", "d", "e", "x", "y", "t", "u", "v")
    assert [list(task_texts(task)) for task in data.tasks][3] == ["u", "v"]


def test_the_fingerprint_sees_every_field_but_name_and_notes():
    data = everything()
    same = replace(data, name="other", notes=("read from a file",))
    assert same.fingerprint() == data.fingerprint()
    assert pickle.loads(pickle.dumps(data)).fingerprint() == data.fingerprint()
    seen = {data.fingerprint()}
    for part in (*data.train, *data.tasks):
        for name, value in vars(part).items():
            if isinstance(value, str):
                changed = replace(part, **{name: value + "!"})
            elif name == "relevant":
                changed = replace(part, relevant=np.array([0]))
            elif name == "scores":
                changed = replace(part, scores=np.array([0.25]))
            else:
                changed = replace(part, **{name: (value[0] + "!", *value[1:])})
            other = replace(
                data,
                train=tuple(changed if p is part else p for p in data.train),
                tasks=tuple(changed if t is part else t for t in data.tasks),
            )
            assert other.fingerprint() not in seen, (part, name)
            seen.add(other.fingerprint())


def test_the_package_exports_lazily_and_names_what_is_missing():
    import bakeoff.data

    assert all(getattr(bakeoff.data, name) is not None for name in bakeoff.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bakeoff.data.nothing  # noqa: B018 (the access is the test)
