"""The question of upgrades: streams, versions, scores against the components, what leaves."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.embedding.small_models import WORDS, backbone_folder, embedder

from bakeoff.embedding.baselines import MeanPooling
from bakeoff.embedding.compatibility import compatibility_matrix
from bakeoff.embedding.problem.upgrades import (
    UPGRADE_METRICS,
    ClassTexts,
    UpgradeProblem,
    _Adapters,
    _all_pairs,
    _EncoderTrainer,
    _HeadTrainer,
    _inside,
    _Made,
    _matrix,
    _summary,
    arrange,
    default_class_texts,
    read_class_texts,
    upgrade_designs,
)
from bakeoff.errors import BakeoffError, DataError
from bakeoff.study import Design, Work

METHODS = {design.name: design for design in upgrade_designs()}


def class_texts(n_classes=9, n_texts=15, seed=0):
    """Return texts that repeat the one or two words of their class among others."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_classes):
        own = [WORDS[number], WORDS[(number * 5 + 1) % len(WORDS)]]
        texts = {}
        while len(texts) < n_texts:
            words = [*rng.choice(own, 5), *rng.choice(WORDS, rng.integers(1, 4))]
            texts[" ".join(rng.permutation(words))] = None
        rows += [(text, f"class {number}") for text in texts]
    texts, labels = zip(*rows, strict=True)
    return ClassTexts("words", texts, labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("upgrades")
    backbone_folder(made / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def problem(folder, data=None, **changes):
    settings = {"n_slots": 24, "hidden": 32, "epochs": 6, "batch_size": 16, "n_pairs": 40}
    settings["learning_rate"] = 0.1
    return UpgradeProblem(data or class_texts(), folder / "encoder", **{**settings, **changes})


def run(one, name, seed, directory, **params):
    design = METHODS[name]
    if params:
        design = Design(name, design.method, {**design.params, **params})
    directory.mkdir(parents=True)
    return one.run(design, seed, Work(directory))


# Streams ------------------------------------------------------------------------------------------


def test_every_text_and_class_has_one_place_whatever_the_order():
    data = class_texts()
    stream = arrange(data, 3)
    groups = [stream.elsewhere, *stream.arriving, stream.never]
    assert sorted(label for group in groups for label in group) == sorted(set(data.labels))
    assert [len(group) for group in stream.arriving] == [3, 1, 1]
    rows = np.concatenate(
        [stream.rows(part, sorted(set(data.labels)))
         for part in (stream.training, stream.documents, stream.queries)]
    )  # fmt: skip
    assert sorted(rows.tolist()) == list(range(len(data.texts)))
    order = np.random.default_rng(1).permutation(len(data.texts))
    shuffled = ClassTexts("words", [data.texts[i] for i in order], [data.labels[i] for i in order])
    other = arrange(shuffled, 3)
    assert other.arriving == stream.arriving
    for label in stream.queries:
        found = [{one.texts[row] for row in one.queries[label]} for one in (stream, other)]
        assert found[0] == found[1]


def test_copies_and_small_classes_are_left_out():
    data = class_texts()
    more = ClassTexts(
        "words",
        (*data.texts, data.texts[0].upper() + " ", "lonely", "lonely too", "lonely three"),
        (*data.labels, "class 1", "rare", "rare", "rare"),
    )
    first, second = arrange(data, 3), arrange(more, 3)
    assert second.arriving == first.arriving
    assert all(np.array_equal(second.queries[label], first.queries[label]) for label in first.own)


def test_streams_that_cannot_be_made():
    with pytest.raises(DataError, match="7 classes have at least 4 texts; 3 steps need 8"):
        arrange(class_texts(n_classes=7), 3)
    assert arrange(class_texts(n_classes=8), 3).arriving
    with pytest.raises(DataError, match="2 texts and 1 labels"):
        ClassTexts("x", ("a", "b"), ("c",))
    with pytest.raises(DataError, match="text 1 is blank"):
        ClassTexts("x", ("a", " "), ("c", "d"))


def test_labelled_files_become_streams(tmp_path):
    data = class_texts()
    lines = [f"{text},{label}" for text, label in zip(data.texts, data.labels, strict=True)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *lines]))
    (read,) = read_class_texts(tmp_path / "mine.csv")
    assert read.name == "mine"
    assert dict(zip(read.texts, read.labels, strict=True)) == dict(
        zip(data.texts, data.labels, strict=True)
    )
    assert not any("held out" in note for note in read.notes)
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *lines, "alone,rare"]))
    (read,) = read_class_texts(tmp_path / "mine.csv")
    assert not any("never tested" in note for note in read.notes)
    assert read.notes[-1] == "mine: 1 class with fewer than 4 texts left out ('rare')."
    assert "rare" not in arrange(read, 2).training


def test_default_data_are_the_running_pythons():
    (smoke,) = default_class_texts("smoke")
    assert smoke.fingerprint() == default_class_texts("smoke")[0].fingerprint()
    assert len(set(smoke.labels)) == 9
    assert len(set(smoke.texts)) == len(smoke.texts) == 9 * 24
    with pytest.raises(DataError, match="size must be one of smoke, demo, full, got 'tiny'"):
        default_class_texts("tiny")


# Scores -------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_compatibility_matrix(folder, tmp_path):
    one = problem(folder)
    (stream,) = one.streams
    design = METHODS["simplex, cross-entropy alone"]
    trial = run(one, design.name, 3, tmp_path / "trial")
    made = one._versions(design, 3, stream, lambda done, total: None)
    parts = {"came later": stream.own[3:], "never trained on": stream.never}
    for task, labels in parts.items():
        group = stream.never if task == "never trained on" else stream.own
        queries = stream.rows(stream.queries, labels)
        documents = stream.rows(stream.documents, group)
        vectors = [(made.embed(t, queries), made.embed(t, documents)) for t in range(3)]
        expected = compatibility_matrix(
            vectors, None, None, stream.labels_of(queries), stream.labels_of(documents)
        )
        found = {metric: tasks[f"words: {task}"] for metric, tasks in trial.scores.items()}
        assert found["average_compatibility"].mean() == expected.average_compatibility()
        assert found["average_accuracy"].mean() == pytest.approx(expected.average_accuracy())
        assert np.array_equal(
            found["old_index_identification"], expected.per_query["identification"][2, 0]
        )
        reciprocal = expected.per_query["mrr"][2, 0]
        assert np.array_equal(found["old_index"], np.where(reciprocal < 0.1, 0, reciprocal))
        reciprocal = expected.per_query["mrr"][2, 2]
        assert np.array_equal(found["self_test"], np.where(reciprocal < 0.1, 0, reciprocal))


def test_compatibility_counts_pairs_strictly():
    hits = {
        (0, 0): [1, 0, 0, 0], (1, 0): [1, 1, 0, 0], (1, 1): [1, 1, 0, 0],
        (2, 0): [1, 0, 0, 0], (2, 1): [1, 1, 1, 0], (2, 2): [1, 1, 1, 1],
    }  # fmt: skip
    matrix = {key: (np.zeros(4), np.array(row, dtype=float)) for key, row in hits.items()}
    found = _summary(matrix, np.ones(4, dtype=bool), 3)
    assert found["average_compatibility"].tolist() == [1.0, 0.0, 1.0]
    assert found["average_accuracy"].mean() == pytest.approx((1 + 2 + 2 + 1 + 3 + 4) / 24)


def test_an_adapter_undoes_a_rotation_and_re_embedding_needs_none(folder):
    one = problem(folder)
    (stream,) = one.streams
    base = one._base_vectors(stream)
    width = base.shape[1]
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]

    def embed(version, rows):
        return base[rows] @ turn if version else base[rows]

    queries, documents = (stream.rows(p, stream.own) for p in (stream.queries, stream.documents))

    def summary(search, method):
        adapters = _Adapters(Design(method, method), 40, stream, embed)
        pairs = _all_pairs(search, 2, embed, adapters, queries, documents)
        matrix = _matrix(pairs, queries, documents, stream)
        return _summary(matrix, np.ones(len(queries), dtype=bool), 2)

    as_it_is, adapted = summary("as it is", "replay"), summary("adapter", "procrustes")
    again = summary("embed again", "re-embed")
    assert np.array_equal(adapted["old_index"], again["old_index"])
    assert np.array_equal(again["old_index"], again["self_test"])
    assert as_it_is["old_index"].mean() < again["old_index"].mean() - 0.1


def test_what_the_simple_rivals_must_score(folder, tmp_path):
    one = problem(folder)
    found = {
        name: run(one, name, 0, tmp_path / str(number))
        for number, name in enumerate(
            ("re-embed", "replay", "keep the first version", "untrained vectors", "Procrustes")
        )
    }
    scores = {name: trial.scores for name, trial in found.items()}
    for task in scores["replay"]["old_index"]:
        again, replay, keep, untrained, rotated = (scores[name] for name in found)
        assert np.array_equal(again["old_index"][task], again["self_test"][task])
        # The same versions, searched otherwise.
        assert np.array_equal(again["self_test"][task], replay["self_test"][task])
        assert np.array_equal(rotated["self_test"][task], replay["self_test"][task])
        for unchanged in (keep, untrained):
            assert np.array_equal(unchanged["old_index"][task], unchanged["self_test"][task])
            assert not unchanged["average_compatibility"][task].any()
    other = run(one, "untrained vectors", 1, tmp_path / "again")
    assert all(
        np.array_equal(other.scores["old_index"][task], values)
        for task, values in scores["untrained vectors"]["old_index"].items()
    )
    cost = {name: trial.cost for name, trial in found.items()}
    assert cost["untrained vectors"]["trained_parameters"] == 0
    assert cost["untrained vectors"]["labels_used"] == 0
    (stream,) = one.streams
    n_documents = len(stream.rows(stream.documents, (*stream.own, *stream.never)))
    assert cost["re-embed"]["texts_embedded_again"] == 2 * n_documents
    assert cost["Procrustes"]["texts_embedded_again"] == 80
    assert cost["replay"]["texts_embedded_again"] == cost["replay"]["paired_vectors"] == 0
    assert 0 < cost["keep the first version"]["labels_used"] < cost["replay"]["labels_used"]
    # Learned rows of every class that the newest version knows, two of them from elsewhere.
    assert cost["replay"]["trained_parameters"] == 16 * 64 + 64 + 64 * 23 + 7 * 23


def test_a_shared_classifier_keeps_an_old_index_and_learned_ones_do_not(folder, tmp_path):
    one = problem(folder, epochs=40, replacements=(2,))
    task = "words: from the start"
    means = {
        name: np.mean(
            [
                run(one, name, seed, tmp_path / f"{name}{seed}").scores["old_index"][task].mean()
                for seed in (0, 1)
            ]
        )
        for name in ("simplex, cross-entropy alone", "replay", "InfoNCE")
    }
    assert means["simplex, cross-entropy alone"] > means["replay"]
    assert means["InfoNCE"] > means["replay"]


@pytest.mark.parametrize("name", list(METHODS))
def test_units_do_not_depend_on_design_or_seed_and_trials_repeat(name, folder, tmp_path):
    one = problem(folder)
    first, again, other = (
        run(one, name, seed, tmp_path / str(number)) for number, seed in enumerate((0, 0, 1))
    )
    reference = run(one, "untrained vectors", 0, tmp_path / "reference")
    assert set(first.scores) == set(UPGRADE_METRICS)
    for metric, tasks in first.scores.items():
        assert list(tasks) == list(reference.scores[metric])
        for task, values in tasks.items():
            assert np.isfinite(values).all()
            assert values.shape == reference.scores[metric][task].shape
            assert np.array_equal(values, again.scores[metric][task])
            assert values.shape == other.scores[metric][task].shape
    same = {key: value for key, value in first.cost.items() if "seconds" not in key}
    assert same == {key: value for key, value in again.cost.items() if "seconds" not in key}


def test_what_a_replacement_is_tied_to_changes_that_step_alone(folder, tmp_path):
    tied, free = (
        run(problem(folder), name, 0, tmp_path / name)
        for name in ("stationary", "stationary, tied to the last version")
    )
    plain = problem(folder, replacements=())
    same = [
        run(plain, name, 0, tmp_path / f"{name} without").scores["old_index"]
        for name in ("stationary", "stationary, tied to the last version")
    ]
    assert any(
        not np.array_equal(tied.scores["self_test"][task], free.scores["self_test"][task])
        for task in tied.scores["self_test"]
    )
    assert all(np.array_equal(same[0][task], same[1][task]) for task in same[0])


def test_each_design_looks_for_its_own_rate_without_test_texts(folder, tmp_path, monkeypatch):
    one = problem(folder, learning_rate=None)
    (stream,) = one.streams
    seen = []
    original = one._found_inside

    def spied(design, inner, rate):
        for label in inner.own:
            parts = (inner.training[label], inner.documents[label], inner.queries[label])
            assert sorted(np.concatenate(parts).tolist()) == stream.training[label].tolist()
        seen.append(rate)
        return 1.0 if rate == 0.01 else original(design, inner, rate) / 2

    monkeypatch.setattr(one, "_found_inside", spied)
    trial = run(one, "BCT", 0, tmp_path / "trial")
    assert seen == [0.1, 0.03, 0.01, 0.003]
    assert trial.notes == ("words: updates at a learning rate of 0.01.",)
    run(one, "BCT", 1, tmp_path / "other seed")
    assert len(seen) == 4  # once for all seeds
    assert not run(one, "untrained vectors", 0, tmp_path / "untrained").notes
    given = run(problem(folder, learning_rate=0.01), "BCT", 0, tmp_path / "given")
    assert not given.notes
    small = problem(folder, data=class_texts(n_texts=5), learning_rate=None)
    assert not run(small, "BCT", 0, tmp_path / "small").notes


def test_a_rate_that_was_looked_for_is_that_of_one_design_and_one_protocol(folder, monkeypatch):
    tried = []
    monkeypatch.setattr(
        UpgradeProblem, "_found_inside", lambda self, design, inner, rate: tried.append(rate) or 0.0
    )

    def looks(design, **changes):
        """Return whether a rate is looked for, and not taken from what was found before."""
        before = len(tried)
        one = problem(folder, data=class_texts(seed=7), learning_rate=None, **changes)
        one._rate(design, one.streams[0])
        return len(tried) == before + 4

    design = Design("x", "stationary")
    assert looks(design)
    assert not looks(Design("another name", "stationary"))
    for other in (
        Design("x", "orthonormal"),
        Design("x", "stationary", {"lam": 0.5}),
        Design("x", "stationary", {"tied_to": "last"}),
    ):
        assert looks(other)
    for changes in (
        {"epochs": 5}, {"batch_size": 8}, {"steps": 2}, {"replacements": ()}, {"n_slots": 25},
        {"memory_per_class": 3}, {"hidden": 16}, {"n_pairs": 39},
    ):  # fmt: skip
        assert looks(design, **changes)
        assert not looks(design, **changes)


def test_a_rate_is_judged_by_the_newest_queries_in_the_oldest_index(folder, monkeypatch):
    one = problem(folder)
    (stream,) = one.streams
    base = one._base_vectors(stream)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((base.shape[1],) * 2))[0]
    seen = []

    def embed(version, rows):
        seen.extend(rows.tolist())
        return base[rows] @ turn if version == 2 else base[rows]

    made = _Made(embed, 0, 0, 0, lambda folder: None)
    monkeypatch.setattr(one, "_versions", lambda *given: made)
    inner = _inside(stream)
    found = one._found_inside(METHODS["replay"], inner, 0.1)
    queries, index = (inner.rows(part, inner.own) for part in (inner.queries, inner.documents))
    # By hand: turned queries, documents as they were.
    lengths = np.linalg.norm(base[index], axis=1)
    similarity = base[queries] @ turn @ base[index].T / lengths
    relevant = np.array(inner.labels_of(queries))[:, None] == np.array(inner.labels_of(index))
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    rank = 1 + (~relevant & (similarity >= best)).sum(axis=1)
    assert found == pytest.approx(np.where(rank <= 10, 1 / rank, 0).mean(), abs=1e-3)
    assert found < one._found_inside(METHODS["re-embed"], inner, 0.1) - 0.1
    assert set(seen) <= set(stream.rows(stream.training, stream.own).tolist())


# Versions -----------------------------------------------------------------------------------------


def test_vectors_in_the_cache_are_those_of_one_encoder(folder, tmp_path):
    model = embedder(tmp_path / "made", MeanPooling(16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save(str(tmp_path / "other"), create_model_card=False)
    one = problem(folder)
    other = UpgradeProblem(class_texts(), tmp_path / "other", n_slots=24, epochs=1)
    (stream,) = one.streams
    assert not np.allclose(one._base_vectors(stream), other._base_vectors(stream))
    assert one.fingerprint() != other.fingerprint()


def test_a_model_from_elsewhere_comes_without_its_data_at_the_one_rate(folder):
    one = problem(folder, data=class_texts(n_classes=12), replacements=(1, 2))
    (stream,) = one.streams
    base = one._base_vectors(stream)
    trainer = _HeadTrainer(one, METHODS["stationary"], 4, stream, base, 0.01)
    models = [trainer.elsewhere(number) for number in range(3)]
    assert [len(model.classes_) for model in models] == [2, 3, 4]
    assert set(models[-1].classes_) == set(stream.elsewhere)
    assert [model.hidden for model in models] == [(32,), (64,), (96,)]
    slots = dict(models[0].classifier_.slots)
    assert {slots[label] for label in stream.elsewhere} == set(range(4))
    assert {slots[label] for label in stream.own} == set(range(24 - len(stream.own), 24))
    rows = [stream.rows(stream.training, group) for group in stream.arriving]
    first = trainer.step(0, models[0], None, rows[0])
    assert {model.learning_rate for model in models} == {0.1}
    assert first.learning_rate == 0.01
    # Its own classes are remembered, and none of those that were trained on elsewhere.
    assert set(first.memory_[1]) == set(stream.arriving[0])
    second = trainer.step(1, models[1], first, rows[1])
    assert set(second.memory_[1]) == {*stream.arriving[0], *stream.arriving[1]}
    assert set(first.memory_[1]) == set(stream.arriving[0])
    third = trainer.step(2, second, second, rows[2])
    other = _HeadTrainer(one, METHODS["stationary"], 5, stream, base, 0.01)
    seeds = [
        *(head.random_state for head in (*models, first, second, third)),
        *(other.elsewhere(number).random_state for number in range(3)),
        other.step(0, models[0], None, rows[0]).random_state,
    ]
    assert len(set(seeds)) == len(seeds)


def test_what_a_design_says_reaches_what_is_trained(folder, monkeypatch):
    one = problem(folder, memory_per_class=6)
    (stream,) = one.streams

    def head(name, **params):
        design = Design(name, METHODS[name].method, {**METHODS[name].params, **params})
        return _HeadTrainer(one, design, 0, stream, one._base_vectors(stream), None)._head(0, 0)

    plain = head("stationary")
    assert (plain.lam, plain.mu, plain.same_class, plain.geometry) == (0.1, 10, "zero", "simplex")
    assert (plain.n_slots, plain.epochs, plain.batch_size) == (24, 6, 16)
    assert plain.memory_per_class == 6
    other = head("stationary", lam=0.7, mu=3.0, same_class="drop", n_slots=40)
    assert (other.lam, other.mu, other.same_class, other.n_slots) == (0.7, 3.0, "drop", 40)
    assert [head(name).lam for name in ("BCT", "L2", "InfoNCE")] == [0.5, 0.1, 0.1]
    assert head("InfoNCE", mu=5).mu == 5.0
    assert [head(name).geometry for name in ("orthonormal", "gaussian")] == [
        "orthonormal",
        "gaussian",
    ]

    calls = []
    monkeypatch.setattr(
        "bakeoff.embedding.stationary_text.fit_stationary_encoder",
        lambda model, texts, labels, **settings: calls.append((model, texts, labels, settings)),
    )
    whole = problem(folder, train="full", memory_per_class=2)
    params = {"lam": 0.7, "mu": 3.0, "same_class": "drop"}
    for name, tied in (("stationary", True), ("simplex, cross-entropy alone", False)):
        design = Design(name, METHODS[name].method, params if tied else {})
        trainer = _EncoderTrainer(whole, design, 3, stream)
        rows = [stream.rows(stream.training, group) for group in stream.arriving]
        start = trainer.elsewhere(0)
        first = trainer.step(0, start, None, rows[0])
        replacement = trainer.elsewhere(1)
        calls.clear()
        trainer.step(1, replacement, first, rows[1])
        ((model, texts, labels, settings),) = calls
        # New texts and two of each earlier class; tied to the replacement as it came.
        new = [stream.texts[row] for row in rows[1]]
        assert texts[: len(new)] == new
        assert sorted(labels[len(new) :]) == sorted(2 * stream.arriving[0])
        earlier = {stream.texts[row] for row in rows[0]}
        assert set(texts[len(new) :]) <= earlier
        assert model is not replacement
        assert settings["old"] is (replacement if tied else None)
        assert (settings["lam"], settings["mu"], settings["same_class"]) == (
            (0.7, 3.0, "drop") if tied else (0.1, 10.0, "zero")
        )
        assert (settings["epochs"], settings["batch_size"]) == (6, 16)


# Checks -------------------------------------------------------------------------------------------


def test_bad_designs_and_settings_are_refused(folder):
    one = problem(folder)
    for design, message in (
        (Design("x", "magic"), "magic does not say how to upgrade"),
        (Design("x", "replay", {"lam": 0.1}), "replay takes no parameters; got lam"),
        (Design("x", "stationary", {"lam": 2}), "design 'x': lam is out of range: 2"),
        (Design("x", "stationary", {"mu": 0}), "mu is out of range"),
        (Design("x", "stationary", {"tied_to": "mast"}), "tied_to must be"),
        (Design("x", "stationary", {"n_slots": 5}), "design 'x': more classes than slots"),
        (Design("x", "ridge", {"n_pairs": 1}), "n_pairs must be a whole number of at least 2"),
    ):
        with pytest.raises(DataError, match=message):
            one.check(design)
    for changes, message in (
        ({"train": "lora"}, "train must be"),
        ({"steps": 1}, "steps must be a whole number of at least 2, got 1"),
        ({"epochs": True}, "epochs must be"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"replacements": (0,)}, r"replacements must be distinct steps from 1 to 2, got \[0\]"),
        ({"replacements": (1, 1)}, "replacements must be distinct"),
        ({"n_slots": 6}, "n_slots must be at least the 7 classes, got 6"),
        ({"data": [class_texts(), class_texts()]}, "names distinct"),
    ):
        with pytest.raises(DataError, match=message):
            problem(folder, **changes)
    whole = problem(folder, train="full")
    for name in ("replay", "BCT", "L2", "InfoNCE", "stationary, tied to the last version"):
        with pytest.raises(DataError, match="with train='full' there are stationary, simplex-ce"):
            whole.check(METHODS[name])


def test_diverging_training_is_an_error_with_a_way_out(folder, tmp_path):
    with pytest.raises(BakeoffError, match="try a learning_rate below 1e\\+30"):
        run(problem(folder, learning_rate=1e30), "replay", 0, tmp_path / "x")


def test_the_fingerprint_says_what_scores_depend_on_and_pickles_are_light(folder):
    one = problem(folder)
    assert problem(folder).fingerprint() == one.fingerprint()
    others = [
        problem(folder, steps=2),
        problem(folder, replacements=()),
        problem(folder, n_pairs=39),
        problem(folder, epochs=7),
        problem(folder, data=class_texts(seed=1)),
        problem(folder, train="full"),
        problem(folder, batch_size=8),
        problem(folder, learning_rate=0.05),
        problem(folder, learning_rate=None),
        problem(folder, memory_per_class=3),
        problem(folder, n_slots=25),
        problem(folder, hidden=33),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 13
    one.prepare(list(METHODS.values()), [0], Work(folder))
    assert one._vectors.of_stream
    copied = pickle.loads(pickle.dumps(one))
    assert not copied._vectors.of_stream
    assert copied.fingerprint() == one.fingerprint()
    assert json.dumps(one.describe())


# What leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stationary", "Procrustes", "untrained vectors"])
def test_the_winner_is_a_folder_that_gives_the_trials_vectors(name, folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    one = problem(folder)
    design = METHODS[name]
    trial = run(one, name, 0, tmp_path / "trial")
    destination = tmp_path / "winner"
    destination.mkdir()
    (destination / "old").write_text("what was there")
    assert one.export(design, trial.artifact, destination, reason="It won.")
    assert not (destination / "old").exists()
    assert "It won." in (destination / "README.md").read_text()
    scope = {}
    exec("\n".join(one.usage(destination)), scope)
    assert scope["queries"].ndim == 2
    (stream,) = one.streams
    rows = stream.rows(stream.queries, stream.own)
    made = one._versions(design, 0, stream, lambda done, total: None)
    expected = made.embed(2, rows)
    if name == "Procrustes":
        expected = _Adapters(design, 40, stream, made.embed)(2, 0).transform(expected)
    model = SentenceTransformer(str(destination / "words"))
    found = model.encode([stream.texts[row] for row in rows])
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    if name == "untrained vectors":
        found = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs(found - unit).max() < 1e-4
    if name == "stationary":
        from bakeoff.embedding.stationary_head import StationaryHead

        head = StationaryHead.load(destination / "words" / "update")
        assert set(stream.own) <= set(head.classifier_.slots.labels)


@pytest.mark.parametrize("name", ["stationary", "ridge"])
def test_whole_encoders_are_trained_searched_and_saved(name, folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    one = problem(folder, train="full", epochs=1, learning_rate=1e-3)
    trial = run(one, name, 0, tmp_path / "trial")
    again = run(one, name, 0, tmp_path / "again")
    for metric, tasks in trial.scores.items():
        for task, values in tasks.items():
            assert np.isfinite(values).all()
            assert np.array_equal(values, again.scores[metric][task])
    assert trial.cost["trained_parameters"] > 1000
    assert (trial.cost["paired_vectors"] > 0) == (name in ("stationary", "ridge"))
    assert one.export(METHODS[name], trial.artifact, tmp_path / "winner")
    model = SentenceTransformer(str(tmp_path / "winner" / "words"))
    assert model.encode(["the cat"]).shape == (1, 23)


def test_a_study_runs_and_names_a_winner(folder, tmp_path):
    from bakeoff.study import Designs, Study

    study = Study(
        problem(folder, data=[class_texts(), replace(class_texts(seed=1), name="more words")]),
        Designs([METHODS[name] for name in ("replay", "stationary", "untrained vectors")]),
        reference="replay",
        seeds=2,
        directory=tmp_path / "study",
    )
    results = study.run()
    assert not results.data["failures"]
    assert results.winner in ("replay", "stationary", "untrained vectors")
    (design,) = [one for one in results.data["designs"] if one["name"] == "stationary"]
    assert len(design["metrics"]["old_index"]["tasks"]) == 6
