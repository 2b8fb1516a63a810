"""How good a cascade is at every share of deferred queries: curve, area, intervals, thresholds."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bakeoff.errors import DataError

FloatArray = NDArray[np.float64]

# Entries of a bootstrap block: resamples times items, a few copies of which are held at once.
_BLOCK_ENTRIES = 2**18
# Rates are multiples of 1/n; a budget of 0.3 must not lose one to rounding.
_SLACK = 1e-9


class DeferralCurve(NamedTuple):
    """Mean quality of a cascade for every share of queries that goes to the large model.

    Parameters
    ----------
    rates
        float64 ``(n + 1,)``: 0, 1/n, ..., 1.
    quality
        float64 ``(n + 1,)``: mean quality where the share `rates` with the highest scores is
        deferred; among equal scores the expectation over a random choice.
    auc
        Area under the curve, by trapezoids. It can exceed what either model reaches alone.
    gain
        ``auc`` relative to deferring at random, ``auc / random - 1``; NaN unless random is
        positive.
    """

    rates: FloatArray
    quality: FloatArray
    auc: float
    gain: float

    def at(self, rate: float) -> float:
        """Return the quality at a rate, linear between the points.

        Raises
        ------
        DataError
            If the rate is outside [0, 1].
        """
        return float(np.interp(checked_share("rate", rate), self.rates, self.quality))

    def rate_for(self, quality: float) -> float:
        """Return the smallest rate that reaches `quality`, linear between points; NaN if none."""
        reached = np.flatnonzero(self.quality >= quality)
        if not reached.size:
            return math.nan
        k = int(reached[0])
        if k == 0:
            return 0.0
        low, high = self.quality[k - 1], self.quality[k]
        part = (quality - low) / (high - low)
        return float(self.rates[k - 1] + part * (self.rates[k] - self.rates[k - 1]))


class Estimate(NamedTuple):
    """A figure with its interval.

    Parameters
    ----------
    value
        The figure.
    low, high
        The confidence interval.
    """

    value: float
    low: float
    high: float


class OperatingPoint(NamedTuple):
    """A threshold and what the calibration data say about it.

    Parameters
    ----------
    threshold
        Queries whose score is **above** it are deferred; infinite for all or none.
    rate
        Share of the calibration queries that are deferred.
    quality
        Their mean quality; NaN where qualities are unknown.
    cost
        Their mean cost, the small model's included; NaN where costs are unknown.
    """

    threshold: float
    rate: float
    quality: float
    cost: float


# The curve ----------------------------------------------------------------------------------------


def deferral_curve(scores: ArrayLike, q_small: ArrayLike, q_large: ArrayLike) -> DeferralCurve:
    """Return the deferral curve of a score and the area under it.

    Parameters
    ----------
    scores
        float ``(n,)``: the higher, the sooner a query is deferred. ``inf`` is allowed.
    q_small, q_large
        float ``(n,)``: quality of the small and of the large model's answer, higher is better, in
        any unit.

    Returns
    -------
    DeferralCurve
        Unpacks as ``rates, quality, auc, gain``.

    Raises
    ------
    DataError
        If lengths differ, there is no item, or a value is NaN (or a quality infinite).

    Notes
    -----
    Equal scores are averaged over, so that the curve does not depend on the order of the data.
    The area is then ``mean(q_small + gap * u)``, where ``gap = q_large - q_small`` and u is the
    share of scores below, ties and the item itself counted half.

    References
    ----------
    Neha Gupta, Harikrishna Narasimhan, Wittawat Jitkrittum, Ankit Singh Rawat, Aditya Krishna
    Menon and Sanjiv Kumar. "Language model cascades: token-level uncertainty and beyond".
    ICLR 2024. arXiv:2404.10136.

    Examples
    --------
    >>> curve = deferral_curve([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1], [1, 1, 1, 1])
    >>> curve.quality.tolist()
    [0.5, 0.75, 1.0, 1.0, 1.0]
    >>> curve.auc, round(curve.gain, 3), curve.rate_for(1.0)
    (0.875, 0.167, 0.5)
    """
    s, small, large = _checked(scores, q_small, q_large)
    n = len(s)
    gap = large - small
    order = np.argsort(-s, kind="stable")
    # Expected gain of one more deferral inside a group of equal scores: the group's mean.
    _, group, sizes = np.unique(-s[order], return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=gap[order]) / sizes
    quality = small.mean() + np.concatenate([[0.0], np.cumsum(means[group])]) / n
    auc = float((small + gap * _share_below(s)).mean())
    random = float((small.mean() + large.mean()) / 2)
    return DeferralCurve(
        rates=np.arange(n + 1) / n,
        quality=quality,
        auc=auc,
        gain=auc / random - 1 if random > 0 else math.nan,
    )


def deferral_auc(
    scores: ArrayLike,
    q_small: ArrayLike,
    q_large: ArrayLike,
    *,
    versus: ArrayLike | Literal["random", "oracle"] | None = None,
    confidence: float = 0.95,
    method: Literal["influence", "bootstrap"] = "influence",
    n_resamples: int = 2000,
    random_state: int = 0,
) -> Estimate:
    """Return the area under the deferral curve, or its lead over another score's, with an interval.

    Parameters
    ----------
    scores, q_small, q_large
        As for `deferral_curve`.
    versus
        Scores ``(n,)`` of another rule on the same queries: the result is the difference of the
        areas, paired by query. ``"random"``: deferral at random. ``"oracle"``: by the observed gap,
        which no rule can beat. None: the area itself.
    confidence
        Of the two-sided interval, for queries drawn anew with both rules fixed.
    method
        ``"influence"``: Student's t with the variance of the queries' influence on the area, which
        is an average of pairs. ``"bootstrap"``: percentiles over resampled queries.
    n_resamples, random_state
        Of the bootstrap.

    Returns
    -------
    Estimate
        Value, low and high.

    Raises
    ------
    DataError
        As `deferral_curve`; also if an option is not accepted or there are fewer than two queries.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> score = rng.random(400)
    >>> q_small = (rng.random(400) > score).astype(float)  # a calibrated score
    >>> value, low, high = deferral_auc(score, q_small, np.ones(400))
    >>> bool(low < 1 / 2 + 1 / 3 < high)  # the closed form
    True
    """
    s, small, large = _checked(scores, q_small, q_large)
    level = _checked_confidence(confidence)
    if method not in ("influence", "bootstrap"):
        raise DataError(f"method must be 'influence' or 'bootstrap', got {method!r}")
    if len(s) < 2:
        raise DataError("an interval needs at least 2 queries, got 1")
    other = _other_scores(versus, s, small, large)
    if method == "influence":
        influence = _influence(s, small, large)
        if isinstance(other, str):
            influence = influence - (small + large) / 2
        elif other is not None:
            influence = influence - _influence(other, small, large)
        return _t_interval(influence, _area(s, other, small, large), level)
    rng = np.random.default_rng(random_state)
    drawn = []
    for weights in _bootstrap_weights(len(s), _checked_resamples(n_resamples), rng):
        areas = _weighted_areas(s, small, large, weights)
        if isinstance(other, str):
            areas = areas - weights @ ((small + large) / 2) / len(s)
        elif other is not None:
            areas = areas - _weighted_areas(other, small, large, weights)
        drawn.append(areas)
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(_area(s, other, small, large), float(low), float(high))


def cost_saved(
    scores: ArrayLike,
    q_small: ArrayLike,
    q_large: ArrayLike,
    small_costs: ArrayLike,
    large_costs: ArrayLike,
    *,
    recovered: float = 1.0,
    quality: float | None = None,
    versus: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    random_state: int = 0,
) -> Estimate:
    """Return the share of cost that a cascade saves at equal quality, with a bootstrap interval.

    Parameters
    ----------
    scores, q_small, q_large
        As for `deferral_curve`.
    small_costs, large_costs
        Cost of each answer, ``(n,)`` or one number for all, in one unit of your choice. A deferred
        query pays both.
    recovered
        Where costs are compared: at this share of the way from the small model's mean quality to
        the large one's, on the same (re)sample; 1 is the large model's own. The smallest rate that
        gets there is taken (linear between points).
    quality
        A fixed mean quality instead.
    versus
        Scores of another rule, whose cascade is compared with; None: the large model alone.
    confidence, n_resamples, random_state
        Of the percentile bootstrap over queries.

    Returns
    -------
    Estimate
        ``1 - cost / cost of the rival``. Negative where the cascade costs more, which at best rate
        1 is the small model's cost. NaN, or an interval of NaN, where the data or a resample of
        them cannot reach a fixed `quality`.

    Raises
    ------
    DataError
        As `deferral_curve`; also for costs that are negative, or all zero for the large model.

    Examples
    --------
    >>> gap = np.array([1.0, 1.0, 0.0, 0.0])
    >>> cost_saved(gap, 1 - gap, np.ones(4), 0.1, 1.0, n_resamples=50).value  # doctest: +ELLIPSIS
    0.4
    """
    s, small, large = _checked(scores, q_small, q_large)
    n = len(s)
    cheap, dear = _costs("small_costs", small_costs, n), _costs("large_costs", large_costs, n)
    if dear.sum() == 0:
        raise DataError("large_costs are all 0: there is nothing to save")
    level = _checked_confidence(confidence)
    share = checked_share("recovered", recovered)
    other = None if versus is None else _checked_scores("versus", versus, n)

    def saved(weights: FloatArray) -> FloatArray:
        if quality is None:
            goal = weights @ (share * large + (1 - share) * small) / n
        else:
            goal = np.full(len(weights), float(quality))
        ours = _cost_at(s, small, large, cheap, dear, goal, weights)
        theirs = (
            weights @ dear / n
            if other is None
            else _cost_at(other, small, large, cheap, dear, goal, weights)
        )
        return 1 - ours / theirs

    value = float(saved(np.ones((1, n)))[0])
    if math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    rng = np.random.default_rng(random_state)
    blocks = _bootstrap_weights(n, _checked_resamples(n_resamples), rng)
    drawn = np.concatenate([saved(weights) for weights in blocks])
    if np.isnan(drawn).any():
        # Some resamples do not reach the quality: no percentile describes them.
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


# Thresholds ---------------------------------------------------------------------------------------


def choose_threshold(
    scores: ArrayLike,
    q_small: ArrayLike | None = None,
    q_large: ArrayLike | None = None,
    *,
    small_costs: ArrayLike | None = None,
    large_costs: ArrayLike | None = None,
    budget: float | None = None,
    max_cost: float | None = None,
    min_quality: float | Literal["large"] | None = None,
    confidence: float | None = None,
) -> OperatingPoint:
    """Choose the score above which queries are deferred, from calibration data.

    Exactly one of `budget`, `max_cost` and `min_quality` is given. Queries of equal score go the
    same way, so that the rate can stay below a budget.

    Parameters
    ----------
    scores, q_small, q_large
        As for `deferral_curve`. For a learned rule the scores must be of queries that it was not
        trained on. Qualities are needed for `min_quality`.
    small_costs, large_costs
        ``(n,)`` or numbers; needed for `max_cost`.
    budget
        Largest share of queries to defer, in [0, 1].
    max_cost
        Largest mean cost per query, the small model's included.
    min_quality
        Least mean quality; the smallest rate that reaches it is taken. ``"large"``: the large
        model's own mean.
    confidence
        With a number as `min_quality`: how sure to be that the quality holds for queries like
        these, say 0.95. Rates are tested from 1 downwards (Clopper and Pearson's bound if all
        qualities are 0 or 1, else Student's t) and the last before the first failure is taken,
        which keeps the chance of a wrong choice near ``1 - confidence`` however many rates there
        are. None: the calibration mean itself has to reach it.

    Returns
    -------
    OperatingPoint
        Its threshold lies half-way between the scores on either side; it is -inf where all
        queries are deferred and inf where none is.

    Raises
    ------
    DataError
        If not exactly one target is given, what it needs is missing, or it cannot be reached; the
        message says what can.

    Examples
    --------
    >>> choose_threshold([4.0, 3.0, 2.0, 1.0], budget=0.5).threshold
    2.5
    >>> choose_threshold([4.0, 3.0, 2.0, 1.0], [0, 1, 1, 1], [1, 1, 1, 1], min_quality=1.0).rate
    0.25
    """
    targets = {"budget": budget, "max_cost": max_cost, "min_quality": min_quality}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise DataError(
            f"give exactly one of budget, max_cost and min_quality, got {given or 'none'}"
        )
    if confidence is not None and (min_quality is None or min_quality == "large"):
        raise DataError("confidence goes with a number as min_quality")
    s = _checked_scores("scores", scores, None)
    n = len(s)
    order = np.argsort(-s, kind="stable")
    ranked = s[order]
    # k queries can be deferred where the k-th score is above the next.
    allowed = np.concatenate([[True], ranked[:-1] > ranked[1:], [True]])
    counts = np.flatnonzero(allowed)
    quality = bound = np.full(n + 1, math.nan)
    large_mean = math.nan
    if q_small is not None and q_large is not None:
        _, small, large = _checked(s, q_small, q_large)
        large_mean = float(large.mean())
        quality, spread = _running_moments(small[order], large[order])
        if confidence is not None:
            binary = bool(np.isin(np.concatenate([small, large]), (0.0, 1.0)).all())
            bound = _lower_bound(quality, spread, n, _checked_confidence(confidence), binary)
    cost = np.full(n + 1, math.nan)
    if small_costs is not None and large_costs is not None:
        cheap, dear = _costs("small_costs", small_costs, n), _costs("large_costs", large_costs, n)
        cost = cheap.mean() + np.concatenate([[0.0], np.cumsum(dear[order])]) / n

    if budget is not None:
        limit = checked_share("budget", budget) * n + _SLACK
        k = int(counts[counts <= limit][-1])
    elif max_cost is not None:
        if np.isnan(cost).any():
            raise DataError("max_cost needs small_costs and large_costs")
        within = counts[cost[counts] <= max_cost * (1 + _SLACK)]
        if not within.size:
            raise DataError(
                f"max_cost={max_cost:g} is less than the small model alone costs, {cost[0]:g}"
            )
        k = int(within[-1])
    else:
        if math.isnan(large_mean):
            raise DataError("min_quality needs q_small and q_large")
        goal = large_mean if min_quality == "large" else float(min_quality)  # type: ignore[arg-type]
        k = _smallest_rate(quality, bound, counts, goal, confidence)
    return OperatingPoint(_between(ranked, k), float(k / n), float(quality[k]), float(cost[k]))


def _smallest_rate(
    quality: FloatArray,
    bound: FloatArray,
    counts: NDArray[np.intp],
    goal: float,
    confidence: float | None,
) -> int:
    """Return how many queries to defer, as few as reach the goal."""
    n = len(quality) - 1
    if confidence is None:
        # Sums in another order may fall short of the large model's mean by a rounding error.
        reached = counts[quality[counts] >= goal - 1e-12 * max(1.0, abs(goal))]
        if not reached.size:
            best = int(counts[np.argmax(quality[counts])])
            raise DataError(
                f"min_quality={goal:g} is not reached on the calibration data; the most is "
                f"{quality[best]:g}, with {best / n:.0%} deferred"
            )
        return int(reached[0])
    failed = np.flatnonzero(bound[counts[::-1]] < goal)
    if failed.size and failed[0] == 0:
        raise DataError(
            f"min_quality={goal:g} cannot be had with confidence {confidence:g}: of the large "
            f"model alone, with mean {quality[-1]:g}, these data show no more than {bound[-1]:g}"
        )
    last = int(failed[0]) - 1 if failed.size else len(counts) - 1
    return int(counts[::-1][last])


def _lower_bound(
    quality: FloatArray, spread: FloatArray, n: int, level: float, binary: bool
) -> FloatArray:
    """Return a one-sided lower confidence bound of each mean."""
    if n < 2:
        raise DataError("confidence needs at least 2 calibration queries, got 1")
    if binary:
        # Student's t has no width where all answers are right; Clopper and Pearson's bound has.
        right = np.rint(quality * n)
        exact = stats.beta.ppf(1 - level, np.maximum(right, 1), n - right + 1)
        return np.asarray(np.where(right > 0, exact, 0.0), dtype=np.float64)
    return quality - float(stats.t.ppf(level, n - 1)) * spread / math.sqrt(n)


def _running_moments(small: FloatArray, large: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard deviation of the answers' quality with the first k deferred."""
    n = len(small)
    # Around the overall mean, so that squares do not cancel.
    center = float(np.concatenate([small, large]).mean())
    moments = []
    for power in (1, 2):
        before = np.concatenate([[0.0], np.cumsum((large - center) ** power)])
        after = np.concatenate([np.cumsum(((small - center) ** power)[::-1])[::-1], [0.0]])
        moments.append((before + after) / n)
    mean, square = moments
    variance = np.maximum(square - mean**2, 0.0) * n / max(n - 1, 1)
    return center + mean, np.sqrt(variance)


def _between(ranked: FloatArray, k: int) -> float:
    if k == 0:
        return math.inf
    if k == len(ranked):
        return -math.inf
    above, below = float(ranked[k - 1]), float(ranked[k])
    middle = below + (above - below) / 2
    # Beside an infinite score, or two neighbouring floats, the lower one itself separates.
    return middle if below < middle < above and math.isfinite(middle) else below


# Areas and costs under weights --------------------------------------------------------------------


def _share_below(scores: FloatArray) -> FloatArray:
    """Return per item the share of scores below its own, equal ones counted half."""
    return np.asarray((stats.rankdata(scores) - 0.5) / len(scores), dtype=np.float64)


def _area(
    s: FloatArray, other: FloatArray | str | None, small: FloatArray, large: FloatArray
) -> float:
    area = float((small + (large - small) * _share_below(s)).mean())
    if other is None:
        return area
    if isinstance(other, str):
        return area - float((small.mean() + large.mean()) / 2)
    return area - float((small + (large - small) * _share_below(other)).mean())


def _influence(s: FloatArray, small: FloatArray, large: FloatArray) -> FloatArray:
    """Return how each query moves the area, up to a constant: the gradient of a V-statistic.

    A query counts twice: by its own gap, and by the queries above it, which it moves up.
    """
    gap = large - small
    values, group = np.unique(s, return_inverse=True)
    sums = np.bincount(group, weights=gap, minlength=len(values))
    above = (sums.sum() - np.cumsum(sums) + 0.5 * sums)[group] / len(s)
    return np.asarray(small + gap * _share_below(s) + above, dtype=np.float64)


def _t_interval(influence: FloatArray, value: float, level: float) -> Estimate:
    n = len(influence)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * influence.std(ddof=1) / math.sqrt(n))
    return Estimate(value, value - half, value + half)


def _bootstrap_weights(n: int, n_resamples: int, rng: np.random.Generator) -> Any:
    """Yield blocks ``(b, n)`` of how often each item is drawn."""
    block = max(1, _BLOCK_ENTRIES // n)
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        draws = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _weighted_areas(
    s: FloatArray, small: FloatArray, large: FloatArray, weights: FloatArray
) -> FloatArray:
    """Return the area for each row of weights ``(b, n)``, whose sums are n."""
    n = len(s)
    order = np.argsort(s, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], s[order][1:] > s[order][:-1]]))
    sorted_weights = weights[:, order]
    mass = np.add.reduceat(sorted_weights, starts, axis=1)
    gains = np.add.reduceat(sorted_weights * (large - small)[order], starts, axis=1)
    below = np.cumsum(mass, axis=1) - 0.5 * mass
    areas: FloatArray = (weights @ small + (gains * below).sum(axis=1) / n) / n
    return areas


def _cost_at(
    s: FloatArray,
    small: FloatArray,
    large: FloatArray,
    cheap: FloatArray,
    dear: FloatArray,
    goal: FloatArray,
    weights: FloatArray,
) -> FloatArray:
    """Return the least mean cost at which each resample's cascade reaches its goal; else NaN."""
    n, n_rows = len(s), len(weights)
    order = np.argsort(-s, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], s[order][1:] < s[order][:-1]]))
    picked = weights[:, order]
    gains = np.add.reduceat(picked * (large - small)[order], starts, axis=1)
    prices = np.add.reduceat(picked * dear[order], starts, axis=1)
    zero = np.zeros((n_rows, 1))
    quality = (weights @ small)[:, None] / n + np.cumsum(np.hstack([zero, gains]), axis=1) / n
    cost = (weights @ cheap)[:, None] / n + np.cumsum(np.hstack([zero, prices]), axis=1) / n
    reached = quality >= goal[:, None] - 1e-12
    k = reached.argmax(axis=1)
    rows = np.arange(n_rows)
    before = np.maximum(k - 1, 0)
    rise = quality[rows, k] - quality[rows, before]
    part = np.divide(
        goal - quality[rows, before], rise, out=np.ones(n_rows), where=(k > 0) & (rise > 0)
    ).clip(0.0, 1.0)
    found = cost[rows, before] + part * (cost[rows, k] - cost[rows, before])
    return np.asarray(np.where(reached.any(axis=1), found, math.nan), dtype=np.float64)


# Checks -------------------------------------------------------------------------------------------


def checked_share(name: str, value: float) -> float:
    """Return a number in [0, 1] as a float, or refuse it."""
    if not 0 <= value <= 1:
        raise DataError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def checked_qualities(name: str, values: ArrayLike, n: int) -> FloatArray:
    """Return finite qualities ``(n,)`` as float64, or refuse them."""
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (n,):
        raise DataError(f"{name} must have shape ({n},), one per query, got {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise DataError(f"{name} has {found[bad[0]]} at query {int(bad[0])}")
    return found


def _checked_scores(name: str, scores: ArrayLike, n: int | None) -> FloatArray:
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1 or not found.size or (n is not None and len(found) != n):
        wanted = "a non-empty vector" if n is None else f"of shape ({n},)"
        raise DataError(f"{name} must be {wanted}, got shape {found.shape}")
    bad = np.flatnonzero(np.isnan(found))
    if bad.size:
        raise DataError(f"{name} has NaN at query {int(bad[0])}")
    return found


def _checked(
    scores: ArrayLike, q_small: ArrayLike, q_large: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    s = _checked_scores("scores", scores, None)
    return (
        s,
        checked_qualities("q_small", q_small, len(s)),
        checked_qualities("q_large", q_large, len(s)),
    )


def _other_scores(
    versus: ArrayLike | str | None, s: FloatArray, small: FloatArray, large: FloatArray
) -> FloatArray | str | None:
    if versus is None:
        return None
    if isinstance(versus, str):
        if versus not in ("random", "oracle"):
            raise DataError(f"versus must be 'random', 'oracle' or scores, got {versus!r}")
        gap: FloatArray = large - small
        return gap if versus == "oracle" else versus
    return _checked_scores("versus", versus, len(s))


def _costs(name: str, costs: ArrayLike, n: int) -> FloatArray:
    found = np.asarray(costs, dtype=np.float64)
    if found.ndim == 0:
        found = np.full(n, float(found))
    if found.shape != (n,):
        raise DataError(f"{name} must be a number or have shape ({n},), got {found.shape}")
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if bad.size:
        raise DataError(f"{name} must not be negative, got {found[bad[0]]} at query {int(bad[0])}")
    return found


def _checked_confidence(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise DataError(f"confidence must be in [0.5, 1), got {confidence!r}")
    return float(confidence)


def _checked_resamples(n_resamples: int) -> int:
    if n_resamples < 20:
        raise DataError(f"n_resamples must be at least 20, got {n_resamples!r}")
    return int(n_resamples)
