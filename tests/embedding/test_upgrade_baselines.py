"""Adapters against closed forms and scipy; the rival heads' losses against their definitions."""

import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeCV

from bakeoff.embedding.stationary import ClassSlots, HOCLoss
from bakeoff.embedding.stationary_head import StationaryHead
from bakeoff.embedding.upgrade_baselines import (
    BackwardCompatibleHead,
    DistillationHead,
    FixedClassifierHead,
    InfoNCEHead,
    LearnedClassifier,
    LinearAdapter,
    ProcrustesAdapter,
    Reembed,
    ReplayHead,
    RidgeAdapter,
    SkipReindex,
)
from bakeoff.errors import DataError

SMALL = {"n_slots": 32, "hidden": (64,), "epochs": 8}
HEADS = [ReplayHead, FixedClassifierHead, DistillationHead, InfoNCEHead, BackwardCompatibleHead]
ADAPTERS = [ProcrustesAdapter, RidgeAdapter, SkipReindex, Reembed]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order] / 16).astype(np.float32), y[order]


# Adapters -----------------------------------------------------------------------------------------


def test_procrustes_equals_scipy_and_undoes_a_rotation():
    rng = np.random.default_rng(0)
    old = rng.standard_normal((40, 6))
    new = rng.standard_normal((40, 6))
    rotation, _ = orthogonal_procrustes(unit(new), unit(old))
    adapter = ProcrustesAdapter().fit(new, old)
    assert np.abs(adapter.rotation_ - rotation).max() < 1e-12
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    adapter.fit(5 * old @ turn, old)
    assert np.abs(adapter.transform(2 * old @ turn) - unit(old)).max() < 1e-6


@pytest.mark.parametrize(("wide", "narrow"), [(9, 4), (4, 9)])
def test_procrustes_between_widths_is_orthonormal(wide, narrow):
    rng = np.random.default_rng(1)
    new, old = rng.standard_normal((50, wide)), rng.standard_normal((50, narrow))
    rotation = ProcrustesAdapter().fit(new, old).rotation_
    assert rotation.shape == (wide, narrow)
    small = rotation.T @ rotation if wide > narrow else rotation @ rotation.T
    assert np.abs(small - np.eye(4)).max() < 1e-12
    # No other such matrix does better: the optimum is the sum of the singular values.
    product = unit(new).T @ unit(old)
    best = np.linalg.svd(product, compute_uv=False).sum()
    assert (product * rotation).sum() == pytest.approx(best)


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_equals_scikit_learn(bias):
    rng = np.random.default_rng(2)
    new, old = rng.standard_normal((60, 7)), rng.standard_normal((60, 5))
    expected = RidgeCV(alphas=[0.001, 0.01, 0.1, 1, 10], fit_intercept=bias)
    expected.fit(unit(new), unit(old))
    found = RidgeAdapter(fit_intercept=bias).fit(new, old).transform(new)
    assert np.abs(found - unit(expected.predict(unit(new)))).max() < 1e-6
    assert RidgeAdapter().fit(new, old[:, :1]).transform(new).shape == (60, 1)


def test_a_bias_hurts_where_stored_vectors_crowd_around_their_mean():
    # What a penalty takes away must not be what tells one query from another.
    rng = np.random.default_rng(4)
    meaning = rng.standard_normal((600, 40))
    old = meaning + 8 * rng.standard_normal(40)
    new = meaning @ rng.standard_normal((40, 48)) + 9 * rng.standard_normal((600, 48))
    found = {}
    for bias in (False, True):
        adapter = RidgeAdapter(fit_intercept=bias).fit(new[300:], old[300:])
        similarity = adapter.transform(new[:300]) @ unit(old).T
        rank = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
        found[bias] = (1 / rank).mean()
    assert found[False] > 1.2 * found[True]


@pytest.mark.parametrize("kind", [ProcrustesAdapter, RidgeAdapter])
def test_saved_adapters_are_what_was_fitted(kind, tmp_path):
    rng = np.random.default_rng(5)
    new, old = rng.standard_normal((50, 6)), rng.standard_normal((50, 4)) + 2
    for fitted in (kind().fit(new, old), RidgeAdapter(fit_intercept=True).fit(new, old[:, :1])):
        plain = LinearAdapter.of(fitted)
        plain.save(tmp_path)
        loaded = LinearAdapter.load(tmp_path)
        assert np.abs(loaded.transform(new) - fitted.transform(new)).max() < 1e-6
        features = {"sentence_embedding": torch.from_numpy(new.astype(np.float32))}
        for module in loaded.modules():
            features = module(features)
        assert (
            np.abs(features["sentence_embedding"].detach().numpy() - fitted.transform(new)).max()
            < 1e-5
        )
    (tmp_path / "adapter.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no adapter"):
        LinearAdapter.load(tmp_path)
    with pytest.raises(DataError, match="holds no adapter"):
        LinearAdapter.load(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="SkipReindex is no fitted linear adapter"):
        LinearAdapter.of(SkipReindex())
    with pytest.raises(DataError, match="offset must have the 4 values"):
        LinearAdapter(np.eye(4), np.zeros(3))
    with pytest.raises(DataError, match="fit another adapter"):
        LinearAdapter(np.eye(4)).fit(new, old)


def test_a_replacement_can_be_tied_to_the_version_that_made_the_index(digits, tmp_path):
    X, y = digits
    rows = slice(0, 300)

    def head(seed, **more):
        return InfoNCEHead(**SMALL, random_state=seed, **more)

    first = head(0).fit(X[rows], y[rows])
    elsewhere = head(1, from_end=False).fit(
        X[300:900], np.array([f"digit {label}" for label in y[300:900]])
    )
    cosine = {}
    for tied in (False, True):
        newer = first.version().partial_fit(
            X[rows], y[rows], previous=elsewhere, compatible_with=first if tied else None
        )
        new, old = newer.transform(X[900:1200]), first.transform(X[900:1200])
        cosine[tied] = float((new * old).sum(axis=1).mean())
    assert cosine[True] > cosine[False] + 0.3
    # Saved with the width of the network that it took over.
    other = InfoNCEHead(**{**SMALL, "hidden": (40,)}, from_end=False).fit(X[rows], y[rows] + 50)
    newer = first.version().partial_fit(X[rows], y[rows], previous=other)
    newer.save(tmp_path)
    assert np.array_equal(InfoNCEHead.load(tmp_path).features(X[:9]), newer.features(X[:9]))
    # Without it, nothing changes: tied to the version from which it starts.
    plain = first.version().partial_fit(X[rows], y[rows])
    named = first.version().partial_fit(X[rows], y[rows], compatible_with=first)
    assert np.array_equal(plain.features(X[:9]), named.features(X[:9]))
    with pytest.raises(DataError, match="compatible_with is not fitted"):
        first.version().partial_fit(X[rows], y[rows], compatible_with=head(2))
    with pytest.raises(DataError, match="give previous"):
        head(2).partial_fit(X[rows], y[rows], compatible_with=first)
    wider = InfoNCEHead(**{**SMALL, "n_slots": 16}).fit(X[rows], y[rows])
    with pytest.raises(DataError, match="features of width 15, this version has 31"):
        first.version().partial_fit(X[rows], y[rows], compatible_with=wider)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_share_their_manners(kind):
    rng = np.random.default_rng(3)
    new, old = rng.standard_normal((30, 5)), rng.standard_normal((30, 5))
    adapter = clone(kind()).fit(new, old)
    vectors = adapter.transform(new)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert np.abs(adapter.transform(7 * new[:3]) - vectors[:3]).max() < 1e-6
    assert np.array_equal(pickle.loads(pickle.dumps(adapter)).transform(new), vectors)
    assert kind.reembeds == (kind is Reembed)
    if kind in (SkipReindex, Reembed):
        assert np.abs(vectors - unit(new)).max() < 1e-6
    with pytest.raises(DataError, match="one row per item, got 30 and 29"):
        kind().fit(new, old[1:])
    with pytest.raises(DataError, match="new must be finite, row 1 is not"):
        kind().fit(np.where(np.arange(30)[:, None] == 1, np.nan, new), old)
    with pytest.raises(DataError, match="the width 5 that fit has seen, got 4"):
        adapter.transform(new[:, 1:])
    with pytest.raises(ValueError, match="not fitted"):
        kind().transform(new)


def test_skipping_needs_one_width():
    with pytest.raises(DataError, match="width 3 cannot be compared with stored ones of width 4"):
        SkipReindex().fit(np.ones((2, 3)), np.ones((2, 4)))


# The learned classifier ---------------------------------------------------------------------------


def test_learned_classifier_keeps_rows_when_it_grows():
    classifier = LearnedClassifier(16, 5, seed=1)
    classifier.add(["a", "b"])
    before = classifier.weight.detach().clone()
    classifier.add(["b", "c", "c"])
    assert torch.equal(classifier.weight[:2], before)
    assert classifier.weight.shape == (3, 5)
    assert classifier.weight.abs().max() <= 5**-0.5
    assert classifier.targets(["c", "a"]).tolist() == [2, 0]
    features = torch.randn(4, 5)
    assert torch.equal(classifier(features), features @ classifier.weight.T)
    # A label that is known from a manifest alone has no row and is never predicted.
    shared = LearnedClassifier(16, 5, slots=ClassSlots(16, {"z": 3}))
    shared.add(["a"])
    known = shared.known_logits(features)
    assert torch.isinf(known[:, 0]).all()
    assert torch.equal(known[:, 1], shared(features)[:, 0])


# Heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_heads_have_one_interface(kind, digits, tmp_path):
    X, y = digits
    old = y[:600] < 5
    head = clone(kind(**SMALL)).fit(X[:600][old], y[:600][old])
    first = head.version()
    head.partial_fit(X[:600][~old], y[:600][~old])
    assert head.classes_.tolist() == list(range(10))
    assert head.transform(X[:4]).shape == first.transform(X[:4]).shape == (4, 31)
    assert first.score(X[600:][y[600:] < 5], y[600:][y[600:] < 5]) > 0.8
    head.save(tmp_path)
    loaded = kind.load(tmp_path)
    assert np.array_equal(loaded.predict(X), head.predict(X))
    assert np.array_equal(loaded.transform(X), head.transform(X))
    with pytest.raises(DataError, match=f"holds a {kind.__name__}, not a StationaryHead"):
        StationaryHead.load(tmp_path)


def alignment(kind, new, old, slots, old_classifier=None, **settings):
    return kind(**SMALL, **settings)._alignment(new, old, slots, old_classifier)


def test_alignment_losses_equal_their_definitions():
    torch.manual_seed(0)
    new, old = torch.randn(5, 31), torch.randn(5, 31)
    slots = torch.tensor([31, 31, 30, 29, 30])
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (new, old))
    assert alignment(ReplayHead, new, old, slots) is None
    assert alignment(FixedClassifierHead, new, old, slots) is None
    assert torch.allclose(
        alignment(DistillationHead, new, old, slots), (2 - 2 * (a * b).sum(dim=1)).mean(), atol=1e-6
    )
    similarity = 4.0 * b @ a.T
    expected = 0.0
    for i, others in enumerate(([2, 3, 4], [2, 3, 4], [0, 1, 3], [0, 1, 2, 4], [0, 1, 3])):
        expected += (similarity[i, [i, *others]].logsumexp(dim=0) - similarity[i, i]) / 5
    assert torch.allclose(alignment(InfoNCEHead, new, old, slots, mu=4.0), expected, atol=1e-6)
    assert torch.allclose(
        alignment(StationaryHead, new, old, slots), HOCLoss(10)(new, old, slots), atol=1e-6
    )
    classifier = LearnedClassifier(32, 31)
    classifier.add(["a", "b"])  # slots 31 and 30; slot 29 is new to it
    known = torch.tensor([0, 1, 2, 4])
    expected = torch.nn.functional.cross_entropy(
        new[known] @ classifier.weight.T, torch.tensor([0, 0, 1, 1])
    )
    found = alignment(BackwardCompatibleHead, new, old, slots, classifier)
    assert torch.allclose(found, expected, atol=1e-6)
    none_known = alignment(BackwardCompatibleHead, new[3:4], old[3:4], slots[3:4], classifier)
    assert float(none_known) == 0.0


def test_infonce_on_the_released_loss_s_example():
    torch.manual_seed(0)
    new, old = torch.randn(6, 8), torch.randn(6, 8)
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    found = alignment(InfoNCEHead, new, old, labels, mu=10.0)
    assert abs(float(found) - 3.294934) < 2e-6


def test_independent_learned_classifiers_are_not_interchangeable(digits):
    from bakeoff.embedding.compatibility import compatibility_matrix

    X, y = digits
    train, query, index = slice(0, 900), slice(900, 1200), slice(1200, 1797)

    def cross_test(kind):
        models = [
            kind(**{**SMALL, "hidden": hidden}, random_state=seed).fit(X[train], y[train])
            for seed, hidden in ((0, (64,)), (1, (40,)))
        ]
        return compatibility_matrix(models, X[query], X[index], y[query], y[index]).matrix()

    learned, fixed = cross_test(ReplayHead), cross_test(FixedClassifierHead)
    assert learned[1, 1] > 0.8
    assert learned[1, 0] < 0.4
    assert fixed[1, 0] > learned[1, 0] + 0.3


def test_adapter_makes_independent_learned_heads_compatible(digits):
    from bakeoff.embedding.compatibility import compatibility_matrix

    X, y = digits
    train, query, index = slice(0, 900), slice(900, 1200), slice(1200, 1797)
    old = ReplayHead(**SMALL, random_state=0).fit(X[train], y[train])
    new = ReplayHead(**SMALL, random_state=1).fit(X[train], y[train])
    adapter = ProcrustesAdapter().fit(new.transform(X[:500]), old.transform(X[:500]))
    vectors = (adapter.transform(new.transform(X[query])), old.transform(X[index]))
    found = compatibility_matrix([vectors], None, None, y[query], y[index])
    assert found.matrix()[0, 0] > 0.75


def test_kinds_do_not_mix_and_old_vectors_alone_are_not_enough(digits):
    X, y = digits
    learned = ReplayHead(**SMALL).fit(X[:200], y[:200])
    with pytest.raises(DataError, match="previous has a LearnedClassifier, StationaryHead needs"):
        StationaryHead(**SMALL).fit(X, y, previous=learned)
    with pytest.raises(DataError, match="needs the old version's classifier"):
        BackwardCompatibleHead(**SMALL).fit(
            X[:200], y[:200], old_features=learned.features(X[:200])
        )
    # Replacement of learned heads: rows for the memory's classes are made anew.
    other = ReplayHead(**SMALL, from_end=False, random_state=2).fit(
        X[200:400], np.array([f"digit {label}" for label in y[200:400]])
    )
    replaced = learned.version().partial_fit(X[400:500], y[400:500], previous=other)
    assert len(replaced.classes_) == 20
    assert set(replaced.predict(X[500:600])) <= set(replaced.classes_)
