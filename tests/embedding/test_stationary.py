"""Simplex geometry in closed form, values of the released code, and updates that must hold."""

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tests.embedding.small_models import TEXTS, embedder

from bakeoff.embedding.baselines import MeanPooling
from bakeoff.embedding.compatibility import compatibility_matrix
from bakeoff.embedding.stationary import (
    ClassSlots,
    HOCLoss,
    SimplexClassifier,
    compatible_loss,
    simplex,
)
from bakeoff.embedding.stationary_head import StationaryHead, _batches
from bakeoff.embedding.stationary_text import (
    FEATURES,
    CompatibleEncoderLoss,
    StationaryProjection,
    _mixed_batches,
    compatible_dataset,
    fit_stationary_encoder,
    plain_encoder,
    projection_of,
    slots_of,
    stationary_encoder,
)
from bakeoff.embedding.upgrade_baselines import FixedClassifierHead
from bakeoff.errors import DataError, ModelError
from bakeoff.models import load_encoder


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order] / 16).astype(np.float32), y[order]


SMALL = {"n_slots": 32, "hidden": (64,), "epochs": 15}


# Geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 5, 100, 1024])
def test_gram_matrix_is_that_of_a_regular_simplex(k):
    vertices = simplex(k)
    expected = (1 + 1 / (k - 1)) * torch.eye(k) - 1 / (k - 1)
    assert vertices.shape == (k, k - 1)
    assert (vertices @ vertices.T - expected).abs().max() < 1e-5
    assert vertices.sum(dim=0).abs().max() < 1e-4


def test_vertices_are_those_of_the_released_construction():
    # Basis vectors and alpha * ones, centred, each divided by its norm.
    k = 7
    rows = np.vstack([np.eye(k - 1), np.full(k - 1, (1 - np.sqrt(k)) / (k - 1))])
    rows -= rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(simplex(k, dtype=torch.float64).numpy() - rows).max() < 1e-14


@settings(max_examples=25, deadline=None)
@given(k=st.integers(2, 60), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_logits_without_the_matrix_equal_the_product_with_it(k, n, seed):
    torch.manual_seed(seed)
    features = torch.randn(n, k - 1, dtype=torch.float64, requires_grad=True)
    fast = SimplexClassifier(k)(features)
    slow = features @ simplex(k, dtype=torch.float64).T
    assert (fast - slow).abs().max() < 1e-12
    weights = torch.randn(n, k, dtype=torch.float64)
    (one,) = torch.autograd.grad((fast * weights).sum(), features, retain_graph=True)
    (two,) = torch.autograd.grad((slow * weights).sum(), features)
    assert (one - two).abs().max() < 1e-12


def test_classifier_has_nothing_to_train_or_to_save():
    classifier = SimplexClassifier(1024)
    assert not list(classifier.parameters())
    assert not classifier.state_dict()
    assert torch.equal(classifier.weight, simplex(1024))


@pytest.mark.parametrize(("geometry", "width"), [("orthonormal", 12), ("gaussian", 11)])
def test_control_geometries(geometry, width):
    classifier = SimplexClassifier(12, geometry=geometry, seed=3)
    weight = classifier.weight
    assert weight.shape == (12, width)
    assert torch.allclose(weight.norm(dim=1), torch.ones(12), atol=1e-5)
    if geometry == "orthonormal":
        assert (weight @ weight.T - torch.eye(12)).abs().max() < 1e-5
    again = SimplexClassifier(12, geometry=geometry, seed=3)
    assert torch.equal(again.weight, weight)
    assert not torch.equal(SimplexClassifier(12, geometry=geometry, seed=4).weight, weight)
    features = torch.randn(2, width)
    assert torch.allclose(classifier(features), features @ weight.T, atol=1e-6)


def test_logits_of_known_classes_are_in_the_order_in_which_they_came():
    classifier = SimplexClassifier(8)
    classifier.add(["b", "a", 2])
    features = torch.randn(3, 7)
    assert torch.allclose(
        classifier.known_logits(features), features @ simplex(8)[[7, 6, 5]].T, atol=1e-6
    )


# Slots --------------------------------------------------------------------------------------------


def test_slots_from_both_ends_never_meet_before_all_are_taken():
    ours = ClassSlots(6).add(["a", "b", "a"])
    both = ours.merge(ClassSlots(6).add(["x", "y", "z"], from_end=False))
    assert dict(both) == {"a": 5, "b": 4, "x": 0, "y": 1, "z": 2}
    full = both.add(["c"])
    assert dict(full)["c"] == 3
    with pytest.raises(DataError, match="more classes than slots: 6 of 6"):
        full.add(["d"])
    # The released rule, slot(y) = K - 1 - y.
    assert ClassSlots(100).add(range(10)).slots_of(range(10)).tolist() == list(range(99, 89, -1))


def test_slots_refuse_collisions_and_other_classifiers():
    ours = ClassSlots(8).add(["a", "b"])
    with pytest.raises(DataError, match="slot collision: slot 7 is taken by label 'a'"):
        ours.merge(ClassSlots(8).add(["c"]))
    with pytest.raises(DataError, match="slot collision: label 'b' has slot 6"):
        ours.merge(ClassSlots(8, {"b": 0}))
    with pytest.raises(DataError, match=r"\(8, 'simplex', 0\) are|\(8, 'simplex', 0\) here"):
        ours.merge(ClassSlots(9))
    with pytest.raises(DataError, match="fixed classifier"):
        ours.merge(ClassSlots(8, geometry="gaussian"))
    with pytest.raises(DataError, match="slots must be from 0 to 7, got 8"):
        ClassSlots(8, {"a": 8})
    with pytest.raises(DataError, match="1 label without a slot"):
        ours.slots_of(["a", "z"])
    with pytest.raises(DataError, match=r"strings or whole numbers, got 1\.5"):
        ours.add([1.5])
    with pytest.raises(DataError, match="at least 2, got 1"):
        ClassSlots(1)
    with pytest.raises(DataError, match=r"slot of 'a' must be an int, got 3\.7"):
        ClassSlots(8, {"a": 3.7})


def test_manifest_round_trip_keeps_types_and_order(tmp_path):
    slots = ClassSlots(16).add(np.array([3, 1])).add(["3", "Ä"], from_end=False)
    slots.save(tmp_path)
    assert ClassSlots.load(tmp_path) == slots
    assert ClassSlots.load(tmp_path).labels == (3, 1, "3", "Ä")
    assert hash(ClassSlots.load(tmp_path)) == hash(slots)
    plain = slots.to_json()
    for damage in ({"slots": [["a"]]}, {"slots": None}, {"geometry": "cube"}, {"seed": "x"}):
        (tmp_path / "slots.json").write_text(
            json.dumps({**plain, "geometry": "gaussian", **damage})
        )
        with pytest.raises(DataError, match="is no slot manifest"):
            ClassSlots.load(tmp_path)
    (tmp_path / "slots.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="is no slot manifest"):
        ClassSlots.load(tmp_path)
    with pytest.raises(DataError, match="there is no slot manifest"):
        ClassSlots.load(tmp_path / "elsewhere.json")


def test_classifier_takes_only_a_manifest_that_fits():
    slots = ClassSlots(8).add(["a"])
    assert SimplexClassifier(8, slots).targets(["a"]).tolist() == [7]
    assert SimplexClassifier(8, {"a": 2}, from_end=False).targets(["a"]).tolist() == [2]
    with pytest.raises(DataError, match="share their fixed classifier"):
        SimplexClassifier(9, slots)
    with pytest.raises(DataError, match="features must have width 7 for 8 slots"):
        SimplexClassifier(8)(torch.zeros(2, 8))


# The loss -----------------------------------------------------------------------------------------


def released_example():
    torch.manual_seed(0)
    new, old = unit(torch.randn(6, 8)), unit(torch.randn(6, 8))
    return new, old, torch.tensor([0, 0, 1, 1, 2, 3])


def test_hoc_has_the_released_code_s_value():
    # methods/hoc.py of the authors' repository gives 2.511366; without same-class terms 2.300678.
    new, old, labels = released_example()
    assert abs(float(HOCLoss(10)(new, old, labels)) - 2.511366) < 2e-6
    assert abs(float(HOCLoss(10, same_class="drop")(new, old, labels)) - 2.300678) < 2e-6


@pytest.mark.parametrize("same_class", ["zero", "drop"])
@pytest.mark.parametrize("mu", [1.0, 10.0])
def test_hoc_equals_its_definition(same_class, mu):
    rng = np.random.default_rng(1)
    old, new = rng.standard_normal((2, 7, 5))
    labels = [0, 1, 2, 0, 1, 0, 3]
    expected = 0.0
    for i in range(7):
        s = [old[i] @ new[j] / np.linalg.norm(old[i]) / np.linalg.norm(new[j]) for j in range(7)]
        terms = [
            np.exp(mu * s[j]) if labels[j] != labels[i] else float(same_class == "zero")
            for j in range(7)
        ]
        expected += (-mu * s[i] + np.log(sum(terms))) / 7
    loss = HOCLoss(mu, same_class)(
        torch.from_numpy(new), torch.from_numpy(old), torch.tensor(labels)
    )
    assert abs(float(loss) - expected) < 1e-12


def test_hoc_gradients_and_invariances():
    new, old, labels = released_example()
    new64 = new.double().requires_grad_()
    loss = HOCLoss(10)
    assert torch.autograd.gradcheck(lambda x: loss(x, old.double(), labels), (new64,))
    old_with_gradient = old.clone().requires_grad_()
    loss(new.clone().requires_grad_(), old_with_gradient, labels).backward()
    assert old_with_gradient.grad is None
    value = loss(new, old, labels)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(loss(new[order], old[order], labels[order]), value, atol=1e-6)
    assert torch.allclose(loss(3 * new, 0.2 * old, labels + 7), value, atol=1e-6)
    assert loss(new.half(), old.half(), labels).dtype == torch.float32
    assert torch.allclose(loss(new.double(), old, labels), value.double(), atol=1e-6)


def test_hoc_bad_input():
    new, old, labels = released_example()
    loss = HOCLoss()
    with pytest.raises(DataError, match="all 6 are of one class"):
        loss(new, old, torch.zeros(6))
    with pytest.raises(DataError, match=r"new features: row 2 has length 0\.0"):
        loss(new * (torch.arange(6) != 2)[:, None], old, labels)
    with pytest.raises(DataError, match="old features: row 0 has length nan"):
        loss(new, torch.where(torch.arange(6)[:, None] == 0, torch.nan, old), labels)
    with pytest.raises(DataError, match=r"one shape \(n, d\)"):
        loss(new, old[:, :7], labels)
    with pytest.raises(DataError, match="mu must be above 0"):
        HOCLoss(0)
    with pytest.raises(ValueError, match="same_class must be one of"):
        HOCLoss(same_class="keep")
    with pytest.raises(DataError, match="lam must be from 0 to 1"):
        compatible_loss(torch.tensor(1.0), torch.tensor(1.0), lam=2)


def test_compatible_loss_is_the_convex_combination():
    assert compatible_loss(torch.tensor(2.0), torch.tensor(-3.0)).item() == pytest.approx(-2.5)


# The estimator ------------------------------------------------------------------------------------


def test_two_independent_versions_are_interchangeable_only_with_one_slot_map(digits):
    X, y = digits
    train, query, index = slice(0, 900), slice(900, 1200), slice(1200, 1797)
    one = StationaryHead(**SMALL, random_state=0).fit(X[train], y[train])
    two = StationaryHead(**{**SMALL, "hidden": (40,)}, random_state=1).fit(X[train], y[train])
    permuted = ClassSlots(32, {int(c): 31 - (int(c) + 3) % 10 for c in range(10)})
    other = StationaryHead(**SMALL, slots=permuted, random_state=2).fit(X[train], y[train])

    def hits(query_model, index_model):
        vectors = [
            (index_model.transform(X[query]), index_model.transform(X[index])),
            (query_model.transform(X[query]), query_model.transform(X[index])),
        ]
        found = compatibility_matrix(vectors, None, None, y[query], y[index])
        return found.matrix("identification")[1, 0]

    self_test, cross_test, wrong_map = hits(one, one), hits(two, one), hits(other, one)
    assert other.score(X[query], y[query]) > 0.9  # fine alone
    assert self_test > 0.85
    assert cross_test > self_test - 0.1
    assert wrong_map < 0.3


def test_update_keeps_the_old_index_useful_and_leaves_the_old_version_alone(digits):
    X, y = digits
    few = np.concatenate([np.flatnonzero((y == digit)[:1000])[:6] for digit in range(10)])
    head = StationaryHead(**SMALL).fit(X[few], y[few])
    first = head.version()
    before = first.transform(X[:50])
    head.partial_fit(X[:1000], y[:1000])
    assert np.array_equal(first.transform(X[:50]), before)
    assert head.classifier_.slots == first.classifier_.slots
    query, index = slice(1000, 1300), slice(1300, 1797)
    found = compatibility_matrix([first, head], X[query], X[index], y[query], y[index])
    assert found.matrix()[1, 0] > 0.65  # the new version on the old index; chance is 0.1
    # What the loss asks for holds on items that were not trained on, where the classifier alone
    # leaves it undone.
    free = FixedClassifierHead(**SMALL).fit(X[:1000], y[:1000], previous=_as_fixed(first))
    held_out = [
        HOCLoss()(
            *(torch.from_numpy(m.transform(X[1000:])) for m in (new, first)), torch.tensor(y[1000:])
        )
        for new in (head, free)
    ]
    assert held_out[0] < held_out[1] - 0.5


def _as_fixed(head):
    """Return the same network under the class that is trained without the HOC loss."""
    fixed = FixedClassifierHead(**head.get_params())
    fixed.__dict__.update(head.version().__dict__)
    return fixed


def test_new_classes_are_learned_and_take_new_slots(digits):
    X, y = digits
    old = y[:1000] < 5
    head = StationaryHead(**SMALL, lam=0.7).fit(X[:1000][old], y[:1000][old])
    first = dict(head.classifier_.slots)
    head.partial_fit(X[:1000][~old], y[:1000][~old])
    assert head.classes_.tolist() == list(range(10))
    assert {label: slot for label, slot in head.classifier_.slots if label < 5} == first
    assert head.score(X[1000:], y[1000:]) > 0.8
    kept = np.flatnonzero(y < 5)[-200:]
    assert head.score(X[kept], y[kept]) > 0.85


def test_replacement_starts_from_the_other_model_and_keeps_own_memory(digits):
    X, y = digits
    service = StationaryHead(**SMALL, memory_per_class=7).fit(X[:300], y[:300])
    elsewhere = StationaryHead(**SMALL, from_end=False).fit(
        X[300:900], np.array([f"digit {label}" for label in y[300:900]])
    )
    weights = [p.clone() for p in elsewhere.network_.parameters()]
    replaced = service.version().partial_fit(X[900:1200], y[900:1200], previous=elsewhere)
    assert all(map(torch.equal, weights, elsewhere.network_.parameters()))
    assert dict(replaced.classifier_.slots) == {
        **{int(label): 31 - label for label in range(10)},
        **{f"digit {label}": label for label in range(10)},
    }
    # Trained from the replacement: what moved is less than the way to an unrelated start.
    moved = sum(
        (a - b).norm() for a, b in zip(weights, replaced.network_.parameters(), strict=True)
    )
    unrelated = StationaryHead(**SMALL, random_state=5).fit(X[:300], y[:300])
    far = sum((a - b).norm() for a, b in zip(weights, unrelated.network_.parameters(), strict=True))
    assert moved < far
    memory_rows, memory_labels = replaced.memory_
    assert memory_labels == sorted(memory_labels)
    assert memory_labels.count(3) == 7
    assert len(memory_rows) == 70


def test_three_successive_versions_and_their_matrix(digits):
    # Classes arrive in three steps; the last version starts from a model trained elsewhere.
    X, y = digits
    train, query, index = slice(0, 1000), slice(1000, 1300), slice(1300, 1797)
    settings_ = {**SMALL, "epochs": 40}
    elsewhere = StationaryHead(**settings_, from_end=False, random_state=7).fit(
        X[train], np.array([f"digit {label}" for label in y[train]])
    )
    head, versions = StationaryHead(**settings_), []
    for step, classes in enumerate(((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))):
        rows = np.flatnonzero(np.isin(y[train], classes))
        head.partial_fit(X[rows], y[rows], previous=elsewhere if step == 2 else None)
        versions.append(head.version())
    found = compatibility_matrix(versions, X[query], X[index], y[query], y[index])
    matrix = found.matrix()
    assert matrix.shape == (3, 3)
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    lower = np.tril_indices(3)
    assert (matrix[lower] > 0.3).all()  # by chance 0.1
    assert matrix[1, 0] > 0.4
    assert found.average_accuracy() == pytest.approx(matrix[lower].mean())
    pairs = [matrix[t, k] > matrix[k, k] for t, k in ((1, 0), (2, 0), (2, 1))]
    assert found.average_compatibility() == np.mean(pairs)
    assert len(versions[2].memory_[1]) == 200


def test_a_fit_forgets_what_was_learned_before(digits):
    X, y = digits
    head = StationaryHead(**SMALL).fit(X[y < 5], y[y < 5])
    again = head.version().fit(X[y >= 5], y[y >= 5])
    fresh = StationaryHead(**SMALL).fit(X[y >= 5], y[y >= 5])
    assert again.classes_.tolist() == [5, 6, 7, 8, 9]
    assert np.array_equal(again.predict(X), fresh.predict(X))


@pytest.mark.parametrize("verb", ["fit", "partial_fit"])
def test_a_head_is_as_it_was_after_a_call_that_fails(digits, verb):
    X, y = digits
    head = StationaryHead(**SMALL).fit(X[:300], y[:300])
    before, slots = head.transform(X), head.classifier_.slots

    def stop(done, total):
        raise KeyboardInterrupt

    def unchanged():
        return np.array_equal(head.transform(X), before) and head.classifier_.slots == slots

    with pytest.raises(KeyboardInterrupt):
        getattr(head, verb)(X[300:600], y[300:600] + 10, progress=stop)
    assert unchanged()
    with pytest.raises(DataError, match="X must be finite"):
        getattr(head, verb)(np.full((2, 64), np.nan), [0, 1])
    assert unchanged()
    with pytest.raises(FloatingPointError):
        getattr(head.set_params(learning_rate=1e12), verb)(X, y)
    assert unchanged()
    assert set(head.predict(X)) <= set(range(10))
    with pytest.raises(DataError, match="previous is this object itself"):
        head.fit(X, y, previous=head)
    assert unchanged()


def test_old_features_of_a_model_with_other_inputs(digits):
    X, y = digits
    old = StationaryHead(**SMALL).fit(X[:900], y[:900])
    wider = np.hstack([X, X**2, np.ones_like(X)])
    new = StationaryHead(**SMALL, random_state=3).fit(
        wider[:900], y[:900], old_features=old.transform(X[:900])
    )
    free = StationaryHead(**SMALL, random_state=3).fit(wider[:900], y[:900])

    def found_again(head):
        """Return how well an item's new vector finds its own old one (reciprocal rank)."""
        one_each = np.arange(900, 1797)
        vectors = (head.transform(wider[900:]), old.transform(X[900:]))
        return compatibility_matrix([vectors], None, None, one_each, one_each).matrix("mrr")[0, 0]

    # The fixed classifier alone aligns classes; the HOC loss aligns the items within them.
    assert found_again(new) > 1.3 * found_again(free)
    with pytest.raises(DataError, match="old_features must have width 31, got 30"):
        StationaryHead(**SMALL).fit(X, y, old_features=np.ones((len(X), 30)))
    zero = old.transform(X) * (np.arange(len(X)) != 5)[:, None]
    with pytest.raises(DataError, match="old_features: row 5 is 0"):
        StationaryHead(**SMALL).fit(wider, y, old_features=zero)
    with pytest.raises(DataError, match="X has width 192, the memory of earlier classes 64"):
        old.version().partial_fit(wider, y, previous=free)
    with pytest.raises(DataError, match="previous or old_features, not both"):
        StationaryHead(**SMALL).fit(X, y, previous=old, old_features=np.ones((len(X), 31)))


def test_seed_decides_and_global_state_is_left_alone(digits):
    X, y = digits
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b = (StationaryHead(**SMALL, random_state=4).fit(X[:200], y[:200]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(a.transform(X), b.transform(X))
    c = StationaryHead(**SMALL, random_state=5).fit(X[:200], y[:200])
    assert not np.array_equal(a.transform(X), c.transform(X))


def test_transform_is_unit_and_independent_of_batch_mates(digits):
    X, y = digits
    head = StationaryHead(**SMALL).fit(X[:200], y[:200])
    vectors = head.transform(X[:40])
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    alone = np.vstack([head.transform(X[i : i + 1]) for i in range(40)])
    assert np.abs(alone - vectors).max() < 1e-6
    assert np.allclose(head.features(X[:3]) @ simplex(32).numpy().T[:, [31]],
                       head.decision_function(X[:3])[:, :1], atol=1e-4)  # fmt: skip


def test_scikit_learn_habits(digits, tmp_path):
    X, y = digits
    head = StationaryHead(**SMALL)
    assert clone(head).get_params() == head.get_params()
    pipeline = make_pipeline(StandardScaler(), StationaryHead(**SMALL)).fit(X[:400], y[:400])
    assert pipeline.transform(X[:3]).shape == (3, 31)
    assert pipeline.score(X[400:600], y[400:600]) > 0.85
    head.fit(X[:300], y[:300])
    assert np.array_equal(pickle.loads(pickle.dumps(head)).transform(X), head.transform(X))
    names = np.array(["even", "odd"])[y % 2]
    assert set(StationaryHead(**SMALL).fit(X[:300], names[:300]).predict(X)) == {"even", "odd"}
    calls = []
    clone(head).fit(X[:50], y[:50], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 15) for i in range(15)]


def test_saved_head_loads_the_same_and_goes_on(digits, tmp_path):
    X, y = digits
    head = StationaryHead(**SMALL).fit(X[:300], y[:300])
    head.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "slots.json",
    }
    loaded = StationaryHead.load(tmp_path)
    assert np.array_equal(loaded.transform(X), head.transform(X))
    assert np.array_equal(loaded.predict(X), head.predict(X))
    more = loaded.version().partial_fit(X[300:500], y[300:500])
    assert more.classifier_.slots == head.classifier_.slots
    manifest = json.loads((tmp_path / "slots.json").read_text())
    (tmp_path / "slots.json").write_text(json.dumps({**manifest, "num_slots": 64}))
    with pytest.raises(DataError, match=r"is for 64 slots, the head for 32"):
        StationaryHead.load(tmp_path)
    (tmp_path / "slots.json").write_text(json.dumps(manifest))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:40])
    with pytest.raises(DataError, match="holds a damaged head"):
        StationaryHead.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no head: there is no model\.safetensors"):
        StationaryHead.load(tmp_path)
    for text, message in (
        ('{"class": "Other"}', "holds a Other, not a StationaryHead"),
        ('{"class": "StationaryHead"}', "holds a damaged head"),
        ("{", "holds a damaged head"),
        ("[]", "holds a damaged head"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            StationaryHead.load(tmp_path)


def test_numbers_of_numpy_are_saved_and_where_it_ran_is_not(digits, tmp_path):
    X, y = digits
    slots = ClassSlots(32, geometry="gaussian", seed=3)
    numbers = {"random_state": np.int64(3), "lam": np.float32(0.5), "n_slots": np.int64(32)}
    head = StationaryHead(**{**SMALL, **numbers}, slots=slots, geometry="gaussian")
    head.fit(X[:100], y[:100]).set_params(device="cuda:7").save(tmp_path)
    loaded = StationaryHead.load(tmp_path)
    assert loaded.device == "cpu"
    assert loaded.classifier_.slots.seed == 3
    assert np.array_equal(
        loaded.decision_function(X), head.set_params(device="cpu").decision_function(X)
    )


def test_head_refuses_what_would_break_compatibility(digits):
    X, y = digits
    head = StationaryHead(**SMALL).fit(X[:200], y[:200])
    with pytest.raises(DataError, match="n_slots is 64 here and 32 in previous"):
        StationaryHead(**{**SMALL, "n_slots": 64}).fit(X, y, previous=head)
    with pytest.raises(DataError, match="X has width 63, the previous version reads 64"):
        head.version().partial_fit(X[:, 1:], y)
    with pytest.raises(DataError, match="geometry is simplex here and gaussian in previous"):
        StationaryHead(**SMALL).fit(
            X, y, previous=StationaryHead(**SMALL, geometry="gaussian").fit(X[:200], y[:200])
        )
    with pytest.raises(DataError, match="more classes than slots"):
        StationaryHead(n_slots=5, epochs=1).fit(X, y)
    elsewhere = StationaryHead(**SMALL).fit(X[:200], np.where(y[:200] < 5, "low", "high"))
    with pytest.raises(DataError, match="slot collision"):
        head.version().partial_fit(X[:200], y[:200], previous=elsewhere)
    few = StationaryHead(**{**SMALL, "memory_per_class": 0}).fit(X[y == 3], y[y == 3])
    with pytest.raises(DataError, match=r"one class only \(3\)"):
        few.partial_fit(X[y == 3], y[y == 3])
    with pytest.raises(DataError, match="X must be finite, row 1 is not"):
        StationaryHead(**SMALL).fit([[0.0], [np.nan]], [0, 1])
    with pytest.raises(DataError, match=r"y must have the shape \(2,\)"):
        StationaryHead(**SMALL).fit([[0.0], [1.0]], [0])
    with pytest.raises(DataError, match="labels must be strings or whole numbers"):
        StationaryHead(**SMALL).fit([[0.0], [1.0]], [0.5, 1.5])
    with pytest.raises(DataError, match="previous is not fitted"):
        StationaryHead(**SMALL).partial_fit(X, y, previous=StationaryHead())
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        StationaryHead(**{**SMALL, "learning_rate": 1e12}).fit(X, y)
    with pytest.raises(ValueError, match="not fitted"):
        StationaryHead().transform(X)


def test_every_batch_of_an_update_has_two_classes(digits):
    # One row of another class among many: most batches would be of one class.
    X, y = digits
    rows = np.concatenate([np.flatnonzero(y == 0)[:60], np.flatnonzero(y == 1)[:1]])
    settings_ = {**SMALL, "batch_size": 8, "memory_per_class": 0}
    head = StationaryHead(**settings_).fit(X[rows], y[rows])
    head.partial_fit(X[rows], y[rows])  # would raise in the loss
    assert np.isfinite(head.loss_curve_).all()


def cosine_rate(rate, last, step, n_steps):
    return last + (rate - last) * (1 + math.cos(math.pi * step / n_steps)) / 2


def test_an_update_takes_the_steps_of_the_released_loop(digits):
    # By hand: momentum, decay of matrices alone, cosine by epoch, half memory, and the loss.
    X, y = digits
    settings_ = {
        "n_slots": 32, "hidden": (16,), "epochs": 4, "batch_size": 16, "lam": 0.3, "mu": 4.0,
        "same_class": "drop", "learning_rate": 0.1, "final_learning_rate": 0.05,
        "momentum": 0.8, "weight_decay": 0.1, "memory_per_class": 3,
    }  # fmt: skip
    first = StationaryHead(**settings_).fit(X[:40], y[:40])
    updated = first.version().partial_fit(X[40:80], y[40:80])

    network = copy.deepcopy(first.network_)
    assert [name for name, _ in network.named_parameters()] == ["0.weight", "0.bias", "2.weight"]
    rows = torch.cat([torch.from_numpy(X[40:80]), first.memory_[0]])
    slots = torch.tensor([31 - label for label in [*y[40:80].tolist(), *first.memory_[1]]])
    old = torch.from_numpy(first.features(rows.numpy()))
    generator = torch.Generator().manual_seed(0)
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    losses = []
    for epoch in range(4):
        rate = cosine_rate(0.1, 0.05, epoch, 4)
        batches = _batches(40, slots, 16, generator, mixed=True)
        assert [(batch < 40).sum() for batch in batches] == [
            (batch >= 40).sum() for batch in batches
        ]
        for batch in batches:
            z = network(rows[batch])
            entropy = torch.nn.functional.cross_entropy(z @ simplex(32).T, slots[batch])
            loss = 0.3 * entropy + 0.7 * HOCLoss(4, "drop")(z, old[batch], slots[batch])
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for (name, p), gradient in zip(network.named_parameters(), gradients, strict=True):
                    decayed = gradient + 0.1 * p * (p.dim() > 1)
                    velocity[name] = 0.8 * velocity[name] + decayed
                    p -= rate * velocity[name]
    assert updated.loss_curve_ == pytest.approx(np.reshape(losses, (4, -1)).mean(axis=1), abs=1e-4)
    for mine, theirs in zip(network.parameters(), updated.network_.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-5


def test_memory_is_a_random_choice_of_every_class(digits):
    X, y = digits
    one, other = (
        StationaryHead(**{**SMALL, "epochs": 1}, random_state=seed, memory_per_class=4).fit(
            X[:200], y[:200]
        )
        for seed in (0, 1)
    )
    first_four = np.concatenate([X[:200][y[:200] == label][:4] for label in range(10)])
    for head in (one, other):
        rows, labels = head.memory_
        assert labels == [label for label in range(10) for _ in range(4)]
        assert len({row.numpy().tobytes() for row in rows}) == 40
        for row, label in zip(rows.numpy(), labels, strict=True):
            assert (X[:200][y[:200] == label] == row).all(axis=1).any()
        assert not np.array_equal(rows, first_four)
    assert not torch.equal(one.memory_[0], other.memory_[0])


def test_a_replacement_from_elsewhere_goes_on_from_the_service_s_end(digits):
    X, y = digits
    settings_ = {**SMALL, "epochs": 1}
    elsewhere = StationaryHead(**settings_, from_end=False).fit(X[:100], y[:100])
    replaced = StationaryHead(**settings_).fit(X[:100], y[:100] + 50, previous=elsewhere)
    assert dict(replaced.classifier_.slots) == {
        **{label: label for label in range(10)},
        **{50 + label: 31 - label for label in range(10)},
    }


# Text encoders ------------------------------------------------------------------------------------

LABELS = ["cat", "dog", "tree", "dog"]


@pytest.fixture
def text_model(tmp_path):
    return embedder(tmp_path / "backbone", MeanPooling(16))


def test_encoder_saves_loads_in_a_new_process_and_keeps_its_slots(text_model, tmp_path):
    model = stationary_encoder(text_model, 12)
    fit_stationary_encoder(model, TEXTS, LABELS, epochs=3, batch_size=4)
    expected = model.encode(list(TEXTS))
    assert expected.shape == (4, 11)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).max() < 1e-6
    folder = tmp_path / "saved"
    model.save(str(folder))
    script = (
        "import sys, numpy as np\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu', trust_remote_code=True)\n"
        "np.save(sys.argv[2], model.encode(sys.argv[3:]))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "v.npy"), *TEXTS], check=True
    )
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-6
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert dict(slots_of(loaded)) == {"cat": 11, "dog": 10, "tree": 9}
    plain = plain_encoder(loaded)
    assert np.abs(plain.encode(list(TEXTS)) - expected).max() < 1e-6
    assert type(list(plain)[-1]).__module__.startswith("sentence_transformers.")
    (manifest,) = folder.rglob("slots.json")
    ClassSlots(13).save(manifest)
    with pytest.raises(DataError, match="share their fixed classifier"):
        StationaryProjection.load(str(manifest.parent))
    manifest.unlink()
    with pytest.raises(DataError, match=r"no slots\.json"):
        StationaryProjection.load(str(manifest.parent))


def test_encoder_loss_equals_its_parts(text_model):
    model = stationary_encoder(text_model, 12)
    old = torch.randn(4, 11)
    loss = CompatibleEncoderLoss(model, LABELS, old.numpy(), lam=0.3, mu=5)
    features = model.preprocess(list(TEXTS))
    raw = model(dict(features))[FEATURES]
    slots = torch.tensor([11, 10, 9, 10])
    logits = raw @ simplex(12).T
    expected = 0.3 * torch.nn.functional.cross_entropy(logits, slots) + 0.7 * HOCLoss(5)(
        raw, old, slots
    )
    rows = torch.arange(4)
    assert torch.allclose(loss([features], rows), expected, atol=1e-6)
    tied = CompatibleEncoderLoss(model, LABELS, old.numpy(), lam=0, mu=5)
    assert torch.allclose(tied([features], rows), HOCLoss(5)(raw, old, slots), atol=1e-6)
    first = CompatibleEncoderLoss(model, LABELS)
    assert torch.allclose(
        first([features], rows), torch.nn.functional.cross_entropy(logits, slots), atol=1e-6
    )
    half = model.preprocess([TEXTS[3], TEXTS[0]])
    assert torch.allclose(
        first([half], torch.tensor([3, 0])),
        torch.nn.functional.cross_entropy(logits[[3, 0]], slots[[3, 0]]),
        atol=1e-5,
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_update_moves_new_vectors_to_the_stored_ones(text_model, tmp_path, freeze):
    texts = [f"{a} {b} {c}" for a in ("the", "a") for b in ("cat", "dog", "tree")
             for c in ("sat", "ran", "on", "under")]  # fmt: skip
    labels = [text.split()[1] for text in texts]
    old = stationary_encoder(text_model, 12, seed=0)
    fit_stationary_encoder(
        old, texts, labels, epochs=100, freeze_encoder=True, projection_learning_rate=0.1
    )
    stored = old.encode(texts)
    fresh = embedder(tmp_path / "other", MeanPooling(16))
    new = stationary_encoder(fresh, 12, slots=slots_of(old), seed=9)
    before = {name: p.clone() for name, p in new.named_parameters()}

    def agreement():
        """Return the share of texts whose new vector is nearest to a stored one of its class."""
        nearest = (new.encode(texts) @ stored.T).argmax(axis=1)
        return np.mean([labels[i] == labels[j] for i, j in enumerate(nearest)])

    start = agreement()
    state = torch.get_rng_state()
    history = fit_stationary_encoder(
        new, texts, labels, old=stored, epochs=40, batch_size=8, freeze_encoder=freeze,
        learning_rate=1e-3, projection_learning_rate=0.1,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert history[-1] < history[0] - 0.5
    assert agreement() > start + 0.2
    changed = {name for name, p in new.named_parameters() if not torch.equal(p, before[name])}
    assert (len(changed) == 1) == freeze
    assert all(p.requires_grad for p in new.parameters())
    assert not new.training


@pytest.mark.parametrize("freeze", [True, False])
def test_training_of_an_encoder_takes_the_stated_steps(text_model, freeze):
    # AdamW at two rates, cosine by step, texts under the default prompt, and the loss.
    text_model.prompts["query"] = "find : "
    text_model.default_prompt_name = "query"
    texts = [*TEXTS, "the tree", "a red mat", "the cat ran"]
    labels = ["cat", "dog", "tree", "dog", "tree", "mat", "cat"]
    old = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    model = stationary_encoder(text_model, 12)
    mine = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = fit_stationary_encoder(
        model, texts, labels, old=old, freeze_encoder=freeze, epochs=3, batch_size=3, seed=5,
        lam=0.4, mu=3.0, same_class="drop", weight_decay=5.0, learning_rate=1e-3,
        projection_learning_rate=1e-2,
    )  # fmt: skip

    projection = projection_of(mine)
    inner = list(projection.parameters())
    outer = [p for p in mine.parameters() if all(p is not one for one in inner)]
    groups = [{"params": inner}, *([] if freeze else [{"params": outer}])]
    optimizer = torch.optim.AdamW(groups, weight_decay=5.0)
    # Slots are given in the order of the labels: cat 11, dog 10, mat 9, tree 8.
    slots = torch.tensor([11, 10, 8, 10, 8, 9, 11])
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(3):
        for rows in _mixed_batches(slots, 3, generator, mixed=True):
            rates = (cosine_rate(rate, 0, len(losses), 9) for rate in (1e-2, 1e-3))
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
            batch = mine.preprocess([f"find : {texts[row]}" for row in rows])
            z = mine(dict(batch))[FEATURES]
            entropy = torch.nn.functional.cross_entropy(z @ simplex(12).T, slots[rows])
            alignment = HOCLoss(3, "drop")(z, torch.from_numpy(old)[rows], slots[rows])
            loss = 0.4 * entropy + 0.6 * alignment
            mine.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert history == pytest.approx(np.reshape(losses, (3, 3)).mean(axis=1), abs=1e-3)
    expected = dict(mine.named_parameters())
    for name, p in model.named_parameters():
        way = (expected[name] - start[name]).norm()
        assert (p - expected[name]).norm() <= 0.02 * way


def test_every_batch_of_an_encoder_s_update_has_two_classes(text_model):
    texts = [f"{word} {other}" for word in ("cat", "dog", "tree") for other in ("a", "on", "the")]
    history = fit_stationary_encoder(
        stationary_encoder(text_model, 12), texts, [*["x"] * 8, "y"], epochs=2, batch_size=3,
        old=np.random.default_rng(0).normal(size=(9, 11)), freeze_encoder=True,
    )  # fmt: skip
    assert np.isfinite(history).all()


def test_dropout_is_drawn_by_the_seed_and_only_where_the_encoder_is_trained(text_model):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dropout

    dropping = SentenceTransformer(modules=[*text_model, Dropout(0.5)], device="cpu")
    trained = {}
    for name, chance, freeze in (
        ("one", 1, False), ("two", 2, False), ("frozen", 1, True), ("frozen too", 2, True)
    ):  # fmt: skip
        model = stationary_encoder(copy.deepcopy(dropping), 12)
        torch.manual_seed(chance)
        fit_stationary_encoder(model, TEXTS, LABELS, epochs=2, freeze_encoder=freeze, seed=3)
        trained[name] = projection_of(model).linear.weight.detach()
    plain = stationary_encoder(copy.deepcopy(text_model), 12)
    fit_stationary_encoder(plain, TEXTS, LABELS, epochs=2, freeze_encoder=True, seed=3)
    assert torch.equal(trained["one"], trained["two"])
    assert torch.equal(trained["frozen"], trained["frozen too"])
    assert torch.equal(trained["frozen"], projection_of(plain).linear.weight)
    whole = stationary_encoder(copy.deepcopy(text_model), 12)
    fit_stationary_encoder(whole, TEXTS, LABELS, epochs=2, seed=3)
    assert not torch.allclose(trained["one"], projection_of(whole).linear.weight, atol=1e-5)


def test_a_normalisation_at_the_end_is_left_out(text_model):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    unit_vectors = SentenceTransformer(modules=[*text_model, Normalize()], device="cpu")
    kinds = [type(module) for module in stationary_encoder(unit_vectors, 12)]
    assert kinds == [*(type(module) for module in text_model), StationaryProjection]


def test_a_plain_encoder_keeps_lengths_prompts_and_the_vectors_of_a_control(text_model):
    text_model.prompts["query"] = "find : "
    text_model.default_prompt_name = "query"
    slots = ClassSlots(12, {"cat": 3}, geometry="gaussian", seed=5)
    model = stationary_encoder(
        text_model, 12, slots=slots, geometry="gaussian", seed=1, normalize=False
    )
    assert slots_of(model) == slots
    assert torch.equal(
        projection_of(model).classifier.weight,
        SimplexClassifier(12, geometry="gaussian", seed=5).weight,
    )
    vectors = model.encode(list(TEXTS))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > 0.01
    plain = plain_encoder(model)
    assert np.abs(plain.encode(list(TEXTS)) - vectors).max() < 1e-6
    assert plain.prompts == model.prompts
    assert plain.default_prompt_name == "query"


def test_trainer_of_sentence_transformers_takes_the_loss(text_model, tmp_path):
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    model = stationary_encoder(text_model, 12)
    loss = CompatibleEncoderLoss(model, LABELS, np.random.default_rng(0).normal(size=(4, 11)))
    weight = projection_of(model).linear.weight.detach().clone()
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model, arguments, train_dataset=compatible_dataset(TEXTS), loss=loss
    ).train()
    assert not torch.equal(projection_of(model).linear.weight, weight)


def test_encoder_bad_input(text_model):
    model = stationary_encoder(text_model, 12)
    with pytest.raises(DataError, match=r"old_vectors must be \(4, 11\)"):
        CompatibleEncoderLoss(model, LABELS, np.ones((4, 12)))
    assert not len(slots_of(model))  # nothing was given out for a call that failed
    with pytest.raises(DataError, match="1 rows are not finite or of length 0, first 2"):
        CompatibleEncoderLoss(model, LABELS, np.ones((4, 11)) * [[1], [1], [0], [1]])
    with pytest.raises(DataError, match="must end in a StationaryProjection"):
        CompatibleEncoderLoss(text_model, LABELS)
    with pytest.raises(DataError, match="one length above 0, got 4 and 3"):
        fit_stationary_encoder(model, TEXTS, LABELS[:3])
    with pytest.raises(DataError, match="needs negatives"):
        fit_stationary_encoder(model, TEXTS, ["x"] * 4, old=np.ones((4, 11)))
    for old in (None, np.ones((4, 11))):
        with pytest.raises(FloatingPointError, match="training diverged at step 2"):
            fit_stationary_encoder(
                stationary_encoder(text_model, 12), TEXTS, LABELS, old=old, freeze_encoder=True,
                projection_learning_rate=1e30, epochs=3, batch_size=4,
            )  # fmt: skip
    with pytest.raises(DataError, match="more classes than slots"):
        CompatibleEncoderLoss(stationary_encoder(text_model, 2), LABELS)
    with pytest.raises(DataError, match="slots are for 12 slots"):
        stationary_encoder(text_model, 13, slots=slots_of(model))
    again = stationary_encoder(model, 20)  # a replaced projection is left out
    assert len(list(again)) == len(list(model))
    assert again.encode("the cat").shape == (19,)


def test_encoders_are_loaded_by_folder_without_trusting_them(text_model, tmp_path):
    text_model.prompts["query"] = "find : "
    model = stationary_encoder(text_model, 12)
    fit_stationary_encoder(model, TEXTS, LABELS, epochs=2)
    expected = model.encode(list(TEXTS))
    model.save(str(tmp_path / "version-1"))
    loaded = load_encoder(tmp_path / "version-1")
    assert np.abs(loaded.encode(list(TEXTS)) - expected).max() < 1e-6
    assert loaded.prompts["query"] == "find : "
    assert slots_of(loaded) == slots_of(model)
    assert not loaded.trust_remote_code
    plain_encoder(model).save(str(tmp_path / "plain"))
    assert np.abs(load_encoder(tmp_path / "plain").encode(list(TEXTS)) - expected).max() < 1e-6
    # Tied to a version by its folder, and put behind one by its folder.
    nothing = stationary_encoder(tmp_path / "version-1", 12, slots=slots_of(model))
    assert len(list(nothing)) == len(list(model))
    fit_stationary_encoder(nothing, TEXTS, LABELS, old=str(tmp_path / "version-1"), epochs=1)


def test_no_code_of_a_folder_is_run(text_model, tmp_path):
    stationary_encoder(text_model, 12).save(str(tmp_path / "model"))
    entries = json.loads((tmp_path / "model" / "modules.json").read_text())
    trap = f"open({str(tmp_path / 'run')!r}, 'w')\nclass Trap: pass\nclass Config: pass\n"
    for name in ("bakeoff", "trap", "configuration_trap"):
        (tmp_path / "model" / f"{name}.py").write_text(trap)
    for kind, message in (
        ("bakeoff.Trap", "code of others, which is never run"),
        ("trap.Trap", "code of others, which is never run"),
        ("bakeoff.embedding.stationary.ClassSlots", "is no module of sentence-transformers"),
        ("bakeoff.embedding.no_such.Thing", "cannot be loaded"),
    ):
        changed = [*entries, {"idx": 9, "name": "9", "path": "", "type": kind}]
        (tmp_path / "model" / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message):
            load_encoder(tmp_path / "model")
    away = [*entries[:-1], {**entries[-1], "path": "../elsewhere"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(away))
    with pytest.raises(ModelError, match="lies outside of the folder"):
        load_encoder(tmp_path / "model")
    # A configuration that names a class of its own, in letters that a search would not find.
    (tmp_path / "model" / "modules.json").write_text(json.dumps(entries))
    (config,) = (
        path
        for path in (tmp_path / "model").rglob("config.json")
        if "model_type" in path.read_text()
    )
    plain = json.loads(config.read_text())
    text = json.dumps(
        {**plain, "model_type": "trap", "AUTO": {"AutoConfig": "configuration_trap.Config"}}
    )
    config.write_text(text.replace("AUTO", "auto\\u005fmap"))
    assert json.loads(config.read_text())["auto_map"]
    if config.parent != tmp_path / "model":
        (config.parent / "configuration_trap.py").write_text(trap)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(tmp_path / "model")
    assert not (tmp_path / "run").exists()


def test_code_on_the_method_page_runs(text_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/methods/stationary-representations.md"
    blocks = [part.split("```")[0] for part in page.read_text("utf-8").split("```python\n")[1:]]
    assert len(blocks) == 3
    names = {"BASE": text_model}
    for block in blocks:
        exec(block.replace('"PATH_OR_HUB_ID"', "BASE"), names)
    assert names["verdicts"]["procrustes"].overall.verdict == "equivalent"
    assert names["found"].matrix().shape == (2, 2)
