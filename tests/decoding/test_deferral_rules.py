"""Rules against numpy, closed forms and planted worlds whose best ranking is known."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from bakeoff.decoding import deferral_rules
from bakeoff.decoding.deferral_curves import deferral_auc, deferral_curve
from bakeoff.decoding.deferral_mlp import DeferralMLP
from bakeoff.decoding.deferral_rules import (
    ChowAverage,
    ChowSum,
    LengthScore,
    PostHocDeferral,
    QuantileScore,
    RandomDeferral,
    load_rule,
    read_arrays,
    write_arrays,
)
from bakeoff.decoding.token_records import RaggedTokens, TokenRecord, as_records
from bakeoff.errors import DataError

PLAIN = [ChowSum(), ChowAverage(), QuantileScore(0.3), LengthScore(), RandomDeferral(3)]


def answers(rng, n, most=30):
    return [-rng.exponential(0.5, rng.integers(1, most)) for _ in range(n)]


def planted(rng, n, slope=3.0):
    """An answer is spoilt by its least certain token; chances of both models are known."""
    found = answers(rng, n)
    worst = np.array([-answer.min() for answer in found])
    p_small = expit(-slope * (worst - 1.8))
    p_large = np.full(n, 0.9)
    q_small = (rng.random(n) < p_small).astype(float)
    q_large = (rng.random(n) < p_large).astype(float)
    return found, q_small, q_large, p_large - p_small


# Scores -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(seed, alpha):
    records = answers(np.random.default_rng(seed), 12)
    tokens = RaggedTokens(as_records(records))
    levels = [0.0, alpha, 0.5, 1.0]
    expected = np.array([np.quantile(record, levels) for record in records])
    np.testing.assert_allclose(tokens.quantiles(levels), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        QuantileScore(alpha).score(records), [-np.quantile(record, alpha) for record in records]
    )


def test_scores_are_their_closed_forms():
    records = answers(np.random.default_rng(0), 50)
    for rule, formula in [
        (ChowSum(), lambda r: -math.fsum(r)),
        (ChowAverage(), lambda r: -math.fsum(r) / len(r)),
        (QuantileScore(0.0), lambda r: -min(r)),
        (QuantileScore(0.5), lambda r: -np.median(r)),
        (QuantileScore(1.0), lambda r: -max(r)),
        (LengthScore(), len),
    ]:
        np.testing.assert_allclose(rule.score(records), [formula(r) for r in records], rtol=1e-12)
    # nll_loss takes the one "class" of each row, whose log-probability is given.
    chosen = torch.from_numpy(records[0])[:, None]
    loss = torch.nn.functional.nll_loss(chosen, torch.zeros(len(chosen), dtype=torch.long))
    assert ChowAverage().score(records[:1])[0] == pytest.approx(loss.item())


@pytest.mark.parametrize("rule", PLAIN)
def test_scores_do_not_depend_on_neighbours_or_order(rule):
    records = answers(np.random.default_rng(0), 20)
    together = rule.score(records)
    apart = [rule.score([record])[0] for record in records]
    np.testing.assert_allclose(together, apart, rtol=1e-12)
    np.testing.assert_allclose(rule.score(records[::-1]), together[::-1], rtol=1e-12)


def test_an_empty_answer_is_deferred_first():
    records = [np.log([0.5]), np.empty(0), np.log([0.1, 0.2])]
    for rule in (ChowSum(), ChowAverage(), QuantileScore(0.2), LengthScore()):
        assert np.isinf(rule.score(records)).tolist() == [False, True, False]
        assert rule.score([np.empty(0)]).tolist() == [math.inf]


def test_random_scores_are_uniform_and_depend_on_the_seed():
    records = answers(np.random.default_rng(0), 4000)
    one, other = RandomDeferral(0).score(records), RandomDeferral(1).score(records)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    np.testing.assert_allclose(np.quantile(one, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
    texts = [TokenRecord(np.log([0.5]), text=text) for text in "ab"]
    assert len(set(RandomDeferral(0).score(texts))) == 2


def test_the_sum_prefers_long_answers_and_the_mean_does_not():
    rng = np.random.default_rng(0)
    records = answers(rng, 3000)
    lengths = np.array([len(record) for record in records])
    assert np.corrcoef(ChowSum().score(records), lengths)[0, 1] > 0.85
    assert abs(np.corrcoef(ChowAverage().score(records), lengths)[0, 1]) < 0.06


# The learned rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gap", "win", "small_error"])
def test_the_learned_rule_finds_the_planted_one(target):
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 2000)
    rule = PostHocDeferral(target=target, estimator="linear").fit(found, q_small, q_large)
    test, q_small, q_large, gap = planted(rng, 8000)
    best = deferral_curve(gap, q_small, q_large).auc
    ours = deferral_curve(rule.score(test), q_small, q_large).auc
    random = (q_small.mean() + q_large.mean()) / 2
    # Nearly all of the Bayes ranking's lead over chance.
    assert (ours - random) / (best - random) > 0.97
    for rival in (ChowSum(), ChowAverage(), LengthScore()):
        lead = deferral_auc(rule.score(test), q_small, q_large, versus=rival.score(test))
        assert lead.low > 0


def test_the_perceptron_finds_what_is_not_linear():
    """Answers are good at middling lengths only, which no weighted sum of features can rank."""
    rng = np.random.default_rng(1)

    def world(n):
        found = answers(rng, n)
        lengths = np.array([len(answer) for answer in found])
        bad = np.abs(lengths - 15) > 7
        small = np.where(bad, rng.random(n) < 0.2, rng.random(n) < 0.9).astype(float)
        return found, small, np.ones(n)

    options = {"features": ("length", "mean"), "folds": 2}
    train, test = world(1000), world(3000)
    scores = {
        name: PostHocDeferral(estimator=estimator, **options).fit(*train).score(test[0])
        for name, estimator in {
            "mlp": DeferralMLP(epochs=60),
            "linear": "linear",
            "boosting": HistGradientBoostingRegressor(random_state=0),
        }.items()
    }
    areas = {name: deferral_curve(s, *test[1:]).auc for name, s in scores.items()}
    assert areas["mlp"] > areas["linear"] + 0.03
    assert areas["mlp"] == pytest.approx(areas["boosting"], abs=0.01)


def test_a_linear_rule_is_ridge_on_standardised_features():
    rng = np.random.default_rng(0)
    found = answers(rng, 200)
    gap = np.array([0.3 * len(a) - a.sum() for a in found]) + 0.01 * rng.standard_normal(200)
    rule = PostHocDeferral(("sum", "length"), estimator=LinearRegression())
    rule.fit(found, -gap, np.zeros(200))
    features = np.array([[a.sum(), len(a)] for a in found])
    expected = LinearRegression().fit(features, gap).predict(features)
    np.testing.assert_allclose(rule.score(found), expected, rtol=1e-9)
    ours = PostHocDeferral(("sum", "length"), estimator="linear").fit(found, -gap, np.zeros(200))
    np.testing.assert_allclose(ours.score(found), expected, atol=0.02)


def test_calibration_scores_come_from_rules_that_have_not_seen_the_answer():
    rng = np.random.default_rng(0)
    found = answers(rng, 60)
    noise = rng.standard_normal(60)  # nothing to learn, and 104 features to learn it from
    rule = PostHocDeferral(estimator=LinearRegression()).fit(found, noise, np.zeros(60))
    own = np.corrcoef(rule.score(found), -noise)[0, 1]
    held_out = np.corrcoef(rule.calibration_scores_, -noise)[0, 1]
    assert own > 0.6
    assert abs(held_out) < 0.4
    # One fold, by hand.
    from sklearn.model_selection import KFold

    learn, rest = next(KFold(5, shuffle=True, random_state=0).split(found))
    part = PostHocDeferral(estimator=LinearRegression())
    part.fit([found[i] for i in learn] * 2, np.tile(noise[learn], 2), np.zeros(2 * len(learn)))
    np.testing.assert_allclose(
        part.score([found[i] for i in rest]), rule.calibration_scores_[rest], rtol=1e-5
    )


def with_embeddings(rng, n, width=40, rank=2):
    """The small model's state knows what its probabilities do not show."""
    directions = np.linalg.qr(np.random.default_rng(9).standard_normal((width, rank)))[0]
    code = 3 * rng.standard_normal((n, rank))
    states = code @ directions.T + 0.3 * rng.standard_normal((n, width))
    p_small = expit(code[:, 0])
    records = [
        TokenRecord(log_probs, state)
        for log_probs, state in zip(answers(rng, n), states, strict=True)
    ]
    return records, (rng.random(n) < p_small).astype(float), np.ones(n), 1 - p_small


@pytest.mark.parametrize("n_components", [5, None])
def test_embeddings_help_where_they_know_more(n_components):
    rng = np.random.default_rng(0)
    train, test = with_embeddings(rng, 600), with_embeddings(rng, 4000)
    best = deferral_curve(test[3], *test[1:3]).auc
    rule = PostHocDeferral(
        ("quantiles", "embedding"), estimator="linear", n_components=n_components
    ).fit(*train[:3])
    assert deferral_curve(rule.score(test[0]), *test[1:3]).auc > best - 0.01
    blind = PostHocDeferral(("quantiles",), estimator="linear").fit(*train[:3])
    assert deferral_curve(blind.score(test[0]), *test[1:3]).auc < best - 0.1


def test_components_are_those_of_the_covariance():
    rng = np.random.default_rng(0)
    records, q_small, q_large, _ = with_embeddings(rng, 200, width=12)
    rule = PostHocDeferral(("embedding",), estimator="linear", n_components=3)
    rule.fit(records, q_small, q_large)
    _, vectors = np.linalg.eigh(np.cov(np.array([r.embedding for r in records]).T))
    found = rule.model_["arrays"]["embedding_directions"]
    np.testing.assert_allclose(np.abs(found.T @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6)


def test_a_classifier_gives_its_probability_for_win():
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 300)
    forest = RandomForestClassifier(30, random_state=0)
    rule = PostHocDeferral(("sum", "length"), "win", forest).fit(found, q_small, q_large)
    features = np.array([[a.sum(), len(a)] for a in found])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    expected = clone(forest).fit(features, q_large > q_small).predict_proba(features)[:, 1]
    np.testing.assert_allclose(rule.score(found), expected)
    plain = PostHocDeferral(("sum", "length"), "win", "linear").fit(found, q_small, q_large)
    logistic = LogisticRegression(C=1.0, max_iter=2000).fit(features, q_large > q_small)
    ranks = np.corrcoef(plain.score(found), logistic.predict_proba(features)[:, 1])[0, 1]
    assert ranks > 0.99


def test_auto_takes_the_perceptron_when_there_is_enough(monkeypatch):
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 200)
    rule = PostHocDeferral(("sum",), folds=2).fit(found, q_small, q_large)
    assert rule.model_["kind"] == "linear"
    monkeypatch.setattr(deferral_rules, "_ENOUGH_FOR_MLP", 200)
    rule = PostHocDeferral(("sum",), folds=2).fit(found, q_small, q_large)
    assert rule.model_["kind"] == "mlp"
    rule = PostHocDeferral(("sum",), folds=2).fit(found[:199], q_small[:199], q_large[:199])
    assert rule.model_["kind"] == "linear"


def test_empty_answers_are_left_out_of_learning_and_deferred():
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 100)
    plain = PostHocDeferral(("sum", "length")).fit(found, q_small, q_large)
    rule = PostHocDeferral(("sum", "length")).fit(
        [*found, np.empty(0)], [*q_small, 1.0], [*q_large, 0.0]
    )
    assert rule.n_labelled_ == 100
    assert rule.calibration_scores_[-1] == math.inf
    np.testing.assert_allclose(rule.score(found), plain.score(found))
    assert rule.score([np.empty(0)]).tolist() == [math.inf]


def test_thresholds_come_from_the_calibration_scores():
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 400)
    for rule in (QuantileScore(0.0), PostHocDeferral(estimator="linear")):
        rule.fit(found, q_small, q_large)
        threshold = rule.choose_threshold(budget=0.25)
        assert (rule.calibration_scores_ > threshold).mean() == pytest.approx(0.25)
        threshold = rule.choose_threshold(min_quality=0.85)
        deferred = rule.calibration_scores_ > threshold
        assert np.where(deferred, q_large, q_small).mean() >= 0.85
    # New answers of the same kind are deferred about as often, the learned rule's too.
    threshold = rule.choose_threshold(budget=0.25)
    fresh = planted(rng, 4000)[0]
    assert (rule.score(fresh) > threshold).mean() == pytest.approx(0.25, abs=0.08)


# scikit-learn, files ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*PLAIN, PostHocDeferral(("sum",), "win", grid=[0.0, 1.0])])
def test_rules_are_estimators(rule):
    copy = clone(rule)
    assert type(copy) is type(rule)
    assert repr(copy.get_params()) == repr(rule.get_params())
    assert repr(pickle.loads(pickle.dumps(rule))) == repr(rule)


def test_a_rule_ends_a_pipeline():
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 100)
    halve = FunctionTransformer(lambda records: [record / 2 for record in records])
    pipeline = Pipeline([("halve", halve), ("rule", PostHocDeferral(("sum", "length")))])
    pipeline.fit(found, q_small, rule__q_large=q_large)
    plain = PostHocDeferral(("sum", "length")).fit([a / 2 for a in found], q_small, q_large)
    np.testing.assert_allclose(pipeline.score_samples(found), plain.score([a / 2 for a in found]))


@pytest.mark.parametrize(
    "rule",
    [
        *PLAIN,
        PostHocDeferral(estimator="linear", grid=np.linspace(0, 1, 5)),
        PostHocDeferral(["sum", "embedding"], "win", "linear"),
        PostHocDeferral(("sum", "embedding"), "gap", "mlp", n_components=3, folds=2),
        PostHocDeferral(("sum", "mean"), "win", "mlp", folds=2),
    ],
)
def test_a_saved_rule_is_the_same_rule(rule, tmp_path):
    rng = np.random.default_rng(0)
    records, q_small, q_large, _ = with_embeddings(rng, 150)
    rule = clone(rule).fit(records, q_small, q_large)
    rule.save(tmp_path / "rule.safetensors")
    other = load_rule(tmp_path / "rule.safetensors")
    assert type(other) is type(rule)
    np.testing.assert_array_equal(other.score(records), rule.score(records))
    for target in ({"budget": 0.3}, {"min_quality": "large"}):
        assert other.choose_threshold(**target) == rule.choose_threshold(**target)
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "rule.safetensors"
    ).read_bytes()


def test_an_unfitted_rule_can_be_saved_and_fitted_later(tmp_path):
    PostHocDeferral(target="small_error").save(tmp_path / "r")
    other = load_rule(tmp_path / "r")
    with pytest.raises(DataError, match="not fitted"):
        other.score([[-1.0]])
    assert other.get_params()["target"] == "small_error"


def test_what_is_no_rule_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load_rule(tmp_path / "absent")
    (tmp_path / "pickle").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(DataError, match="was not written by save"):
        load_rule(tmp_path / "pickle")
    write_arrays(tmp_path / "other", {"rule": "os.system", "parameters": {}}, {})
    with pytest.raises(DataError, match="has no rule of these: ChowSum"):
        load_rule(tmp_path / "other")
    write_arrays(tmp_path / "later", {"format": 2}, {})
    with pytest.raises(DataError, match="has format 2, and this version of bakeoff reads 1"):
        read_arrays(tmp_path / "later")
    rng = np.random.default_rng(0)
    found, q_small, q_large, _ = planted(rng, 100)
    rule = PostHocDeferral(("sum",), estimator=LinearRegression()).fit(found, q_small, q_large)
    with pytest.raises(DataError, match="LinearRegression cannot be saved"):
        rule.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChowSum().score([[0.3, 0.9]]), "record 0: log_probs has 0.3 at token 0.*positive"),
        (lambda: ChowSum().score([[-1.0], [-1, math.nan]]), "record 1: log_probs has nan at token"),
        (lambda: ChowSum().score([[-math.inf]]), "has -inf at token 0: take raw"),
        (lambda: ChowSum().score([[[-1.0]]]), "must be a vector"),
        (lambda: ChowSum().score([]), "non-empty sequence"),
        (lambda: ChowSum().score(TokenRecord(np.zeros(2))), "must be a non-empty sequence"),
        (lambda: TokenRecord(np.zeros(1), np.full(3, np.nan)), "embedding must be a finite"),
        (lambda: QuantileScore(1.5).score([[-1.0]]), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: ChowSum().choose_threshold(budget=0.5), "call fit first"),
        (lambda: ChowSum().fit([[-1.0]]).choose_threshold(min_quality=1), "needs q_small"),
        (lambda: ChowSum().fit([[-1.0]], [1, 2]), r"q_small must have shape \(1,\)"),
    ],
)
def test_bad_records_are_refused_by_name(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"features": "sum"}, {}, "features must be a sequence"),
        ({"features": ("entropy",)}, {}, "features must be among.*'entropy'"),
        ({"features": ("large_embedding",)}, {}, "large model are not offered"),
        ({"features": ("embedding",)}, {}, "record 0 has no embedding"),
        ({"target": "loss"}, {}, "target must be one of gap, win, small_error"),
        ({"estimator": "forest"}, {}, "estimator must be 'auto'"),
        ({"estimator": LinearRegression(), "target": "win"}, {}, "predict_proba"),
        ({"folds": 1}, {}, "folds must be at least 2"),
        ({"n_components": 0}, {}, "n_components must be at least 1"),
        ({"grid": [0, 50, 100]}, {}, "grid must be a vector of levels"),
        ({}, {"q_small": None}, "q_small is missing"),
        ({}, {"q_large": None}, "q_large is missing"),
        ({}, {"q_large": np.ones(7)}, "q_large must have shape"),
        ({}, {"q_small": np.ones(60), "q_large": np.ones(60)}, "'gap' is 0 for all answers"),
        ({}, {"n": 49}, "at least 50 labelled answers that are not empty, got 49"),
    ],
)
def test_what_cannot_be_learnt_is_refused_by_name(options, changes, message):
    n = changes.get("n", 60)
    found, q_small, q_large, _ = planted(np.random.default_rng(0), n)
    q_small, q_large = changes.get("q_small", q_small), changes.get("q_large", q_large)
    with pytest.raises(DataError, match=message):
        PostHocDeferral(**options).fit(found, q_small, q_large)


def test_embeddings_of_another_width_are_refused():
    records, q_small, q_large, _ = with_embeddings(np.random.default_rng(0), 60)
    rule = PostHocDeferral(("embedding",), estimator="linear").fit(records, q_small, q_large)
    with pytest.raises(DataError, match="must have width 40, as in fit, got 3"):
        rule.score([TokenRecord(np.zeros(1), np.zeros(3))])
    with pytest.raises(DataError, match=r"of one width, got \[3, 40\]"):
        rule.score([records[0], TokenRecord(np.zeros(1), np.zeros(3))])


# The perceptron -----------------------------------------------------------------------------------


def test_the_perceptron_is_five_layers_of_32_with_batch_norm():
    model = DeferralMLP(epochs=1).fit(np.random.default_rng(0).random((40, 7)), np.arange(40.0))
    shapes = [tuple(p.shape) for p in model.network_.parameters()]
    hidden = [(32, 32), (32,), (32,), (32,)]
    assert shapes == [(32, 7), (32,), (32,), (32,), *hidden * 4, (1, 32), (1,)]


def test_the_perceptron_depends_on_its_seed_alone():
    x, y = np.random.default_rng(0).random((65, 3)), np.arange(65.0) % 2
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = DeferralMLP("logistic", epochs=3).fit(x, y).predict(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    np.testing.assert_array_equal(DeferralMLP("logistic", epochs=3).fit(x, y).predict(x), first)
    other = DeferralMLP("logistic", epochs=3, random_state=1).fit(x, y).predict(x)
    assert not np.allclose(other, first)
    np.testing.assert_allclose(
        [DeferralMLP("logistic", epochs=3).fit(x, y).predict(x[i : i + 1])[0] for i in (0, 9)],
        first[[0, 9]],
        rtol=1e-5,
    )


def test_the_perceptron_predicts_in_the_units_of_its_targets():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2))
    y = 1000 + 50 * x[:, 0]
    model = DeferralMLP(epochs=100).fit(x, y)
    assert np.abs(model.predict(x) - y).mean() < 10
    p = expit(2 * x[:, 0])
    chances = DeferralMLP("logistic", epochs=30).fit(x, (rng.random(400) < p) * 1.0).predict(x)
    assert ((chances >= 0) & (chances <= 1)).all()
    assert np.corrcoef(chances, p)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("options", "x", "y", "message"),
    [
        ({"loss": "hinge"}, np.zeros((4, 1)), np.zeros(4), "loss must be"),
        ({"epochs": 0}, np.zeros((4, 1)), np.zeros(4), "epochs must be at least 1"),
        ({"batch_size": 1}, np.zeros((4, 1)), np.zeros(4), "batch_size must be at least 2"),
        ({}, np.zeros(4), np.zeros(4), "X must have shape"),
        ({}, np.full((4, 1), np.inf), np.zeros(4), "finite"),
        ({"loss": "logistic"}, np.zeros((4, 1)), np.full(4, 0.5), "must be 0 or 1"),
    ],
)
def test_the_perceptron_refuses_by_name(options, x, y, message):
    with pytest.raises(DataError, match=message):
        DeferralMLP(**options).fit(x, y)
    with pytest.raises(DataError, match="not fitted"):
        DeferralMLP().predict(np.zeros((1, 1)))
