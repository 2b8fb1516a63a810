"""Curves, areas, intervals and thresholds against closed forms and programs written plainly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bakeoff.decoding.deferral_curves import (
    choose_threshold,
    cost_saved,
    deferral_auc,
    deferral_curve,
)
from bakeoff.errors import DataError


def plain_curve(scores, q_small, q_large, rng):
    """Quality at each count, one by one, with ties broken by one random order."""
    order = rng.permutation(len(scores))
    order = order[np.argsort(-np.asarray(scores)[order], kind="stable")]
    quality = []
    for k in range(len(scores) + 1):
        answered = [q_large[i] for i in order[:k]] + [q_small[i] for i in order[k:]]
        quality.append(sum(answered) / len(answered))
    return np.array(quality)


def sample(seed, n=50, levels=None):
    rng = np.random.default_rng(seed)
    scores = rng.random(n) if levels is None else rng.integers(0, levels, n).astype(float)
    return scores, rng.random(n), rng.random(n)


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_and_its_area_are_those_of_a_direct_sum(seed):
    scores, small, large = sample(seed)
    curve = deferral_curve(scores, small, large)
    expected = plain_curve(scores, small, large, np.random.default_rng(0))
    np.testing.assert_allclose(curve.quality, expected, atol=1e-12)
    assert curve.auc == pytest.approx(np.trapezoid(expected, curve.rates), abs=1e-12)
    random = (small.mean() + large.mean()) / 2
    assert curve.gain == pytest.approx(curve.auc / random - 1)


def test_ties_are_averaged_over():
    scores, small, large = sample(1, n=30, levels=3)
    curve = deferral_curve(scores, small, large)
    rng = np.random.default_rng(0)
    drawn = np.array([plain_curve(scores, small, large, rng) for _ in range(4000)])
    error = drawn.std(axis=0) / math.sqrt(len(drawn))
    assert (np.abs(drawn.mean(axis=0) - curve.quality) <= 5 * error + 1e-12).all()
    assert curve.auc == pytest.approx(np.trapezoid(curve.quality, curve.rates), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 2, 7]))
def test_order_does_not_matter_nor_does_any_increasing_map(seed, levels):
    scores, small, large = sample(seed, n=40, levels=levels)
    curve = deferral_curve(scores, small, large)
    order = np.random.default_rng(seed).permutation(40)
    other = deferral_curve(np.exp(3 * scores[order]), small[order], large[order])
    np.testing.assert_allclose(other.quality, curve.quality, atol=1e-12)
    assert other.auc == pytest.approx(curve.auc, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_no_score_beats_the_oracle(seed):
    scores, small, large = sample(seed, n=25, levels=6)
    oracle = deferral_curve(large - small, small, large)
    assert (oracle.quality >= deferral_curve(scores, small, large).quality - 1e-12).all()
    lead = deferral_auc(scores, small, large, versus="oracle")
    assert lead.value == pytest.approx(deferral_curve(scores, small, large).auc - oracle.auc)
    assert lead.value <= 1e-12


def test_one_score_for_all_is_random_deferral():
    _, small, large = sample(3)
    curve = deferral_curve(np.zeros(50), small, large)
    assert curve.auc == pytest.approx((small.mean() + large.mean()) / 2)
    np.testing.assert_allclose(np.diff(curve.quality, 2), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "area"),
    [
        # The small model errs with probability p(u) at score quantile u, the large one never:
        # Q(r) = 1 - integral of p below 1 - r, and the area is 1 - integral of p(u) (1 - u).
        (lambda u: u, 1 - 1 / 6),
        (lambda u: u**2, 1 - 1 / 12),
        (lambda u: 1 - u, 1 - 1 / 3),
        (lambda u: np.full_like(u, 0.5), 0.75),
    ],
)
def test_the_area_is_the_closed_form_of_a_known_distribution(wrong, area):
    rng = np.random.default_rng(0)
    u = rng.random(200_000)
    small = (rng.random(u.size) >= wrong(u)).astype(float)
    scores = np.log(u)  # any increasing map of u
    value, low, high = deferral_auc(scores, small, np.ones(u.size), confidence=0.999)
    assert low < area < high
    assert high - low < 0.005
    curve = deferral_curve(scores, small, np.ones(u.size))
    for rate in (0.1, 0.5, 0.9):
        grid = np.linspace(0, 1 - rate, 10_001)
        expected = 1 - np.trapezoid(wrong(grid), grid)
        assert curve.at(rate) == pytest.approx(expected, abs=0.006)
    assert value == curve.auc


def test_the_curve_at_a_rate_and_the_rate_for_a_quality_undo_each_other():
    curve = deferral_curve([4, 3, 2, 1], [0, 0, 1, 1], [1, 1, 1, 1])
    assert curve.rate_for(0.6) == pytest.approx(0.1)
    assert curve.at(0.1) == pytest.approx(0.6)
    assert curve.rate_for(0.2) == 0.0
    assert math.isnan(curve.rate_for(1.01))
    with pytest.raises(DataError, match=r"rate must be in \[0, 1\], got 1.5"):
        curve.at(1.5)


# Intervals ----------------------------------------------------------------------------------------


def world(rng, n):
    """Binary qualities and two correlated scores; many ties in the second."""
    u = rng.random(n)
    small = (rng.random(n) >= u).astype(float)
    large = (rng.random(n) < 0.9).astype(float)
    return u, np.round(3 * (u + rng.random(n)) / 2), small, large


@pytest.mark.parametrize("versus", [None, "random", "other"])
def test_the_intervals_cover_and_agree_with_the_bootstrap(versus):
    rng = np.random.default_rng(1)
    u, other, small, large = world(rng, 400_000)
    against = other if versus == "other" else versus
    truth = deferral_auc(u, small, large, versus=against).value
    covered = 0
    for _ in range(400):
        u, other, small, large = world(rng, 120)
        against = other if versus == "other" else versus
        found = deferral_auc(u, small, large, versus=against, confidence=0.9)
        covered += found.low <= truth <= found.high
    assert 0.9 - 4 * 0.015 < covered / 400 < 0.9 + 4 * 0.015
    u, other, small, large = world(rng, 2000)
    against = other if versus == "other" else versus
    exact = deferral_auc(u, small, large, versus=against)
    resampled = deferral_auc(u, small, large, versus=against, method="bootstrap", random_state=3)
    assert resampled.value == exact.value
    assert resampled.low == pytest.approx(exact.low, abs=0.1 * (exact.high - exact.low))
    assert resampled.high == pytest.approx(exact.high, abs=0.1 * (exact.high - exact.low))


@pytest.mark.parametrize("levels", [None, 3])
def test_the_width_is_that_of_the_gradient_over_all_pairs(levels):
    scores, small, large = sample(4, n=40, levels=levels)
    # The area is the mean over pairs (i, j) of q_small[i] + gap[i] * [j is below i].
    below = np.sign(scores[:, None] - scores[None, :]) / 2 + 0.5
    pairs = small[:, None] + (large - small)[:, None] * below
    found = deferral_auc(scores, small, large)
    assert found.value == pytest.approx(pairs.mean())
    influence = pairs.mean(axis=1) + pairs.mean(axis=0)
    half = stats.t.ppf(0.975, 39) * influence.std(ddof=1) / math.sqrt(40)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((half, half))


def test_the_bootstrap_is_that_of_resampled_data():
    u, _, small, large = world(np.random.default_rng(0), 60)
    found = deferral_auc(
        np.round(4 * u), small, large, method="bootstrap", n_resamples=200, random_state=5
    )
    rng = np.random.default_rng(5)
    drawn = rng.integers(0, 60, (200, 60))
    areas = [deferral_curve(np.round(4 * u)[row], small[row], large[row]).auc for row in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))


def test_a_paired_comparison_with_itself_is_zero():
    u, _, small, large = world(np.random.default_rng(0), 60)
    assert deferral_auc(u, small, large, versus=u**3) == (0.0, 0.0, 0.0)


def test_cost_saved_is_that_of_counting():
    # Half of the queries need the large model and the score knows which; deferring costs both.
    gap = np.repeat([1.0, 0.0], 500)
    found = cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0)
    assert found.value == pytest.approx(1 - (0.1 + 0.5))
    # The interval is that of the share that needs it: half ± 1.96 · sqrt(.25 / 1000).
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(1000), rel=0.1)
    # Without information the large model has to answer all, and the small one is paid on top.
    flat = cost_saved(np.zeros(1000), 1 - gap, np.ones(1000), 0.1, 1.0)
    assert flat.value == pytest.approx(-0.1)
    against = cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0, versus=np.zeros(1000))
    assert against.value == pytest.approx(1 - 0.6 / 1.1)
    # Three quarters right: half of those that need it, linear in between.
    part = cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0, quality=0.7502)
    assert part.value == pytest.approx(1 - (0.1 + 0.2502))
    same = cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0, recovered=0.5004)
    assert same.value == pytest.approx(part.value)
    assert cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0, recovered=0).value == 0.9
    assert math.isnan(cost_saved(gap, 1 - gap, np.ones(1000), 0.1, 1.0, quality=1.1).value)


def test_cost_saved_resamples_are_those_of_resampled_data():
    rng = np.random.default_rng(2)
    u, _, small, large = world(rng, 80)
    cheap, dear = rng.random(80), 5 * rng.random(80)
    found = cost_saved(
        np.round(9 * u), small, large, cheap, dear, quality=0.7, n_resamples=100, random_state=1
    )
    drawn = np.random.default_rng(1).integers(0, 80, (100, 80))
    values = [
        cost_saved(
            np.round(9 * u)[row],
            small[row],
            large[row],
            cheap[row],
            dear[row],
            quality=0.7,
            n_resamples=20,
        ).value
        for row in drawn
    ]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


# Thresholds ---------------------------------------------------------------------------------------


def realised(scores, threshold):
    return float((np.asarray(scores) > threshold).mean())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 2, 9]), st.floats(0, 1))
def test_a_budget_is_kept_and_used_up_as_far_as_ties_allow(seed, levels, budget):
    scores, small, large = sample(seed, n=37, levels=levels)
    point = choose_threshold(scores, small, large, budget=budget)
    assert realised(scores, point.threshold) == pytest.approx(point.rate)
    assert point.rate <= budget + 1e-9
    possible = {0.0, *(realised(scores, s - 1e-12) for s in scores)}
    assert point.rate == pytest.approx(max(r for r in possible if r <= budget + 1e-9))
    expected = np.where(scores > point.threshold, large, small).mean()
    assert point.quality == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 9]), st.floats(0.3, 0.7))
def test_the_least_rate_that_reaches_a_quality_is_that_of_trying_all(seed, levels, goal):
    scores, small, large = sample(seed, n=37, levels=levels)
    rates = {
        realised(scores, t): np.where(scores > t, large, small).mean()
        for t in (-math.inf, math.inf, *scores)
    }
    reached = [rate for rate, quality in rates.items() if quality >= goal]
    if not reached:
        best = max(rates.values())
        with pytest.raises(DataError, match=f"the most is {best:g}".replace(".", r"\.")):
            choose_threshold(scores, small, large, min_quality=goal)
        return
    point = choose_threshold(scores, small, large, min_quality=goal)
    assert point.rate == pytest.approx(min(reached))


def test_a_cost_is_kept_and_used_up():
    rng = np.random.default_rng(0)
    scores, cheap, dear = rng.random(40), rng.random(40), 10 * rng.random(40)
    point = choose_threshold(scores, small_costs=cheap, large_costs=dear, max_cost=3.0)
    costs = {
        realised(scores, t): (cheap + np.where(scores > t, dear, 0)).mean()
        for t in (math.inf, -math.inf, *scores)
    }
    assert point.cost == pytest.approx(max(c for c in costs.values() if c <= 3.0))
    assert costs[point.rate] == pytest.approx(point.cost)
    assert math.isnan(point.quality)
    with pytest.raises(DataError, match="less than the small model alone costs"):
        choose_threshold(scores, small_costs=cheap, large_costs=dear, max_cost=0.01)


def test_the_ends_defer_none_and_all_whatever_comes():
    scores, small, _ = sample(0)
    assert choose_threshold(scores, budget=0.0).threshold == math.inf
    assert choose_threshold(scores, budget=1.0).threshold == -math.inf
    assert choose_threshold(scores, small, np.ones(50), min_quality=1.0).rate == 1.0


def test_infinite_scores_can_be_told_apart_from_large_ones():
    scores = [math.inf, math.inf, 5.0, 1.0]
    threshold = choose_threshold(scores, budget=0.5).threshold
    assert (np.array(scores) > threshold).tolist() == [True, True, False, False]
    assert choose_threshold(scores, budget=0.4).rate == 0.0


@pytest.mark.parametrize("binary", [True, False])
def test_a_confident_threshold_keeps_its_promise(binary):
    """The small model is wrong with probability u at score u; quality at rate r is known."""
    rng = np.random.default_rng(0)
    goal, misses, rates, n = 0.9, 0, [], 150
    for _ in range(400):
        u = rng.random(n)
        small = (rng.random(n) >= u).astype(float) if binary else 1 - u
        point = choose_threshold(u, small, np.ones(n), min_quality=goal, confidence=0.9)
        kept = min(1.0, max(0.0, point.threshold))
        misses += 1 - kept**2 / 2 < goal  # the true quality of this threshold
        rates.append(point.rate)
    # Chance of 10 %, and four standard errors of 400 draws.
    assert misses / 400 < 0.1 + 4 * 0.015
    # Not by deferring all: 1 - sqrt(0.2) = 55 % is the least possible.
    assert np.mean(rates) < 0.75
    plain = [
        choose_threshold(u, (rng.random(n) >= u).astype(float), np.ones(n), min_quality=goal)
        for u in rng.random((200, n))
    ]
    assert np.mean([1 - min(1, p.threshold) ** 2 / 2 < goal for p in plain]) > 0.3


def test_confidence_is_refused_where_the_large_model_does_not_allow_it():
    with pytest.raises(DataError, match=r"cannot be had with confidence 0\.95"):
        choose_threshold(
            np.arange(20.0), np.zeros(20), np.ones(20), min_quality=0.99, confidence=0.95
        )


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deferral_curve([1, 2], [1], [1, 2]), r"q_small must have shape \(2,\)"),
        (lambda: deferral_curve([], [], []), "scores must be a non-empty vector"),
        (lambda: deferral_curve([math.nan], [1], [1]), "scores has NaN at query 0"),
        (lambda: deferral_curve([1, 2], [1, math.inf], [1, 2]), "q_small has inf at query 1"),
        (lambda: deferral_auc([1], [1], [1]), "at least 2"),
        (lambda: deferral_auc([1, 2], [1, 0], [1, 0], versus="best"), "versus must be 'random'"),
        (lambda: deferral_auc([1, 2], [1, 0], [1, 0], versus=[1]), r"versus must be of shape"),
        (lambda: deferral_auc([1, 2], [1, 0], [1, 0], confidence=95), "confidence must be in"),
        (lambda: deferral_auc([1, 2], [1, 0], [1, 0], method="exact"), "method must be"),
        (lambda: cost_saved([1, 2], [1, 0], [1, 0], -1, 1), "small_costs must not be negative"),
        (lambda: cost_saved([1, 2], [1, 0], [1, 0], 1, 0), "large_costs are all 0"),
        (lambda: cost_saved([1, 2], [1, 0], [1, 0], 1, 1, recovered=95), "recovered must be in"),
        (lambda: choose_threshold([1, 2]), "exactly one of budget.*none"),
        (lambda: choose_threshold([1, 2], budget=0.1, max_cost=1), "exactly one of"),
        (lambda: choose_threshold([1, 2], budget=30), r"budget must be in \[0, 1\], got 30"),
        (lambda: choose_threshold([1, 2], max_cost=1), "max_cost needs small_costs"),
        (lambda: choose_threshold([1, 2], min_quality=1), "min_quality needs q_small"),
        (lambda: choose_threshold([1, 2], budget=0.1, confidence=0.9), "confidence goes with"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(call, message):
    with pytest.raises(DataError, match=message):
        call()
