"""Paired comparison of designs: difference, interval, test, effect size and verdict.

The estimand
------------
One number per design: *how much higher (or lower) the design would score than the reference, on
average over these tasks, units like these (queries, examples, pairs) and training seeds like
these*. Tasks count equally, whatever their number of units. With ``tasks="sampled"`` it is *tasks
like these*: a claim about tasks that were not run, for which five tasks are five observations. With
one seed the words "seeds like these" shrink to "this seed": nothing in the data tells how much
another one would differ.

The method, in short
--------------------
Everything is computed from ``d = design - reference``, unit by unit and seed by seed.

1. The *unit variance* is what the difference would vary by if only the units were drawn anew.
2. The *crossed variance* also lets seeds be drawn anew, and tasks if they are sampled: the spread
   between tasks (or the unit variance if they are fixed) plus the spread between seeds minus what
   both of them count (two-way clustering).
3. If the crossed variance is not above the unit variance, seeds (and tasks) agree as well as the
   units' noise lets them, and the test flips the signs of the units' differences (a permutation
   test, exact for few units of one task; between fixed tasks their own differences are taken out
   first, since they are no noise); the interval holds every value that this test does not reject.
   Otherwise test and interval are Student's t with the crossed variance and Satterthwaite's degrees
   of freedom, which are few when seeds or tasks are few. Where units (many) and seeds (few) are the
   only sources, each also brings its own quantile; the wider interval counts.

A percentile bootstrap is not used because, with three seeds or five tasks to draw from, its
intervals are far too short; ``benchmarks/calibration.py`` measures what this method does instead.

References
----------
.. [1] J. A. Hartigan, "Using subsample values as typical values", Journal of the American
   Statistical Association 64, 1969 (sign flips and the interval that belongs to them).
.. [2] F. E. Satterthwaite, "An approximate distribution of estimates of variance components",
   Biometrics Bulletin 2, 1946; for the quantiles in quadrature S. K. Banerjee, "Approximate
   confidence interval for linear functions of means of k populations when the population variances
   are not equal", Sankhya 22, 1960.
.. [3] A. C. Cameron, J. B. Gelbach, D. L. Miller, "Robust inference with multiway clustering",
   Journal of Business & Economic Statistics 29, 2011.
.. [4] D. G. Bonett, R. M. Price, "Adjusted Wald confidence interval for a difference of binomial
   proportions based on paired data", Journal of Educational and Behavioral Statistics 37, 2012.
.. [5] S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
   Statistics 6, 1979.
.. [6] D. J. Schuirmann, "A comparison of the two one-sided tests procedure and the power approach",
   Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Comparison",
    "Ranks",
    "Record",
    "Verdict",
    "compare",
    "critical_difference",
    "wilcoxon_holm",
]

Verdict = Literal["better", "worse", "equivalent", "undecided"]
FloatArray = NDArray[np.float64]

_EXACT_UNITS = 13  # up to here all 2**n sign patterns are enumerated, beyond they are drawn
_FLIPS = 9_999
_FLIP_BUDGET = 100_000_000  # signs drawn per call before the number of flips is lowered
_MIN_FLIPS = 1_999
_MAX_FLIPS = 99_999
_INTERACTION_LEVEL = 0.05
_POWER = 0.8
_LARGEST_MULTIPLE = 1_000  # a study a thousand times larger is no advice
_QUANTILES = np.linspace(0.0, 1.0, 21)


class _Items:
    """Lets a frozen dataclass be read with square brackets, like the JSON it becomes."""

    def __getitem__(self, name: str) -> Any:
        if name not in {field.name for field in fields(self)}:  # type: ignore[arg-type]
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True)
class Record(_Items):
    """What is known of one design against the reference, over all tasks or on one.

    Parameters
    ----------
    mean
        The design's score: mean over tasks of the mean over units and seeds.
    difference
        Mean of design minus reference, in the metric's own direction.
    interval
        Low and high end of the ``1 - alpha`` confidence interval of the difference; infinite where
        nothing can be estimated (one unit).
    p_value
        Two-sided, of the hypothesis that the true difference is 0.
    p_holm
        The same, corrected by Holm's method for the number of designs compared.
    effect_size
        Standardised paired difference: `difference` divided by the standard deviation of the units'
        seed-averaged differences (within tasks, tasks weighing equally). Infinite if all units
        differ by the same amount.
    verdict
        ``"better"``, ``"worse"``, ``"equivalent"`` or ``"undecided"``.
    n_units, n_seeds, n_tasks
        What the record rests on; units are summed over tasks.
    wins, ties, losses
        Units whose seed-averaged difference favours the design, neither, or the reference.
    difference_quantiles
        0 %, 5 %, ..., 100 % quantiles of the units' seed-averaged differences, all tasks together.
    needed_units, needed_seeds
        How many units (or seeds, the other left as it is) would decide with probability 0.8 if the
        true difference is the one observed; None when decided, hopeless, or not estimable.
    """

    mean: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    p_holm: float
    effect_size: float
    verdict: Verdict
    n_units: int
    n_seeds: int
    n_tasks: int
    wins: int
    ties: int
    losses: int
    difference_quantiles: tuple[float, ...] | None
    needed_units: int | None
    needed_seeds: int | None

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary ready for `json.dumps`; infinite numbers become None."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Comparison(_Items):
    """One design against the reference: `overall`, and `tasks` by name."""

    overall: Record
    tasks: dict[str, Record]

    def to_json(self) -> dict[str, Any]:
        """Return ``{"overall": ..., "tasks": {task: ...}}``, ready for `json.dumps`."""
        return {
            "overall": self.overall.to_json(),
            "tasks": {name: record.to_json() for name, record in self.tasks.items()},
        }


@dataclass(frozen=True)
class Ranks(_Items):
    """Average ranks of designs and which of them cannot be told apart.

    Parameters
    ----------
    average_ranks
        Mean rank over blocks, best (lowest) first; ties share their mean rank.
    critical_difference
        Nemenyi's critical difference of two average ranks at `alpha`, for the ruler of the
        diagram; None for a single design.
    cliques
        Runs of neighbouring designs, at least two, with no significant pair among them.
    n_blocks
        Number of things the designs were ranked on.
    test
        In words: what a block is, Friedman's test, and how pairs were compared.
    p_value
        Of Friedman's test (of Wilcoxon's for two designs; 1 for one design).
    """

    average_ranks: dict[str, float]
    critical_difference: float | None
    cliques: tuple[tuple[str, ...], ...]
    n_blocks: int
    test: str
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary ready for `json.dumps`."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def compare(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    reference: str,
    *,
    margin: float | None = None,
    alpha: float = 0.05,
    rng: int | np.random.Generator | None = None,
    higher_is_better: bool = True,
    tasks: Literal["fixed", "sampled"] = "fixed",
) -> dict[str, Comparison]:
    """Compare every design with a reference on the same units and seeds.

    The quantity estimated is the mean difference design minus reference over these tasks, counting
    equally, and over units and training seeds like those observed (see the module's text for method
    and limits).

    Verdicts. *Better* or *worse*: the Holm-corrected p-value is below `alpha` and the interval
    excludes 0. *Equivalent*: a margin is given and two one-sided tests place the difference inside
    ``(-margin, margin)``, Holm-corrected too; this takes precedence, so a difference that is
    certain but too small to matter is called equivalent. Else *undecided*. Over all tasks, the
    method aims to keep the probability of any false better or worse at `alpha`, and that of any
    false equivalent likewise; the documentation has what simulations measured.

    Holm's correction runs over the designs: once for the overall records, and once within each
    task. Task records are thus corrected for the number of designs but not of tasks.

    Parameters
    ----------
    scores
        ``scores[design][task]`` is a float array of shape (n_seeds, n_units), units and seeds in
        the same order for every design. n_units may differ between tasks; n_seeds may not.
    reference
        Name of the design that the others are compared with.
    margin
        Differences smaller than this, in the metric's unit, have no practical consequence.
    alpha
        Level of the tests; intervals have confidence ``1 - alpha``.
    rng
        Seed or generator for the sign flips; None stands for seed 0, so that the same scores give
        the same result.
    higher_is_better
        Direction of the metric.
    tasks
        ``"fixed"``: the verdict is about these tasks, as for data of one's own. ``"sampled"``: it
        is about tasks like these, so that a design must win on most of them; with fewer than about
        five tasks that disagree, nothing can be decided.

    Returns
    -------
    dict
        A `Comparison` for each design, in the order given, the reference included.

    Raises
    ------
    ValueError
        If shapes disagree, scores are not finite, tasks or the reference are missing, or `margin`
        or `alpha` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> generator = np.random.default_rng(0)
    >>> difficulty = generator.normal(size=(1, 40))
    >>> noise = lambda: 0.3 * generator.normal(size=(3, 40))
    >>> scores = {
    ...     "mean": {"search": difficulty + noise()},
    ...     "last": {"search": difficulty + noise() - 0.5},
    ... }
    >>> result = compare(scores, "mean")
    >>> result["last"].overall.verdict
    'worse'
    """
    margin = _checked_margin(margin)
    alpha = _checked_alpha(alpha)
    arrays = _checked_scores(scores)
    if reference not in arrays:
        raise ValueError(f"reference {reference!r} is not among the designs: {list(arrays)}")
    if tasks not in ("fixed", "sampled"):
        raise ValueError(f"tasks must be 'fixed' or 'sampled', got {tasks!r}")
    generator = np.random.default_rng(0 if rng is None else rng)

    names = [name for name in arrays if name != reference]
    built = [
        _Task.build(
            task, [arrays[name][task] for name in names], arrays[reference][task], higher_is_better
        )
        for task in arrays[reference]
    ]
    n_units = [task.n_units for task in built]
    n_flips = _number_of_flips(sum(n_units), len(names), alpha)
    flips = [_Flips.draw([task], n_flips, generator) for task in built]
    stretched = tasks == "fixed" and len(built) > 1 and min(n_units) > 1
    pooled = _with_common_mean(built) if stretched else built
    everything = (
        _Flips.exact(pooled)
        if sum(n_units) <= _EXACT_UNITS
        else _Flips.average(
            [part.moved(*pair) for part, *pair in zip(flips, built, pooled, strict=True)]
        )
    )

    context = _Context(margin, alpha, higher_is_better, len(names), tasks == "sampled")
    overall = _records(built, everything, context)
    by_task = {
        task.name: _records([task], _Flips.exact([task]) if task.is_small else flipped, context)
        for task, flipped in zip(built, flips, strict=True)
    }

    result = {}
    for name in arrays:
        if name == reference:
            result[name] = Comparison(
                _reference_record(built), {task.name: _reference_record([task]) for task in built}
            )
        else:
            index = names.index(name)
            result[name] = Comparison(
                overall[index], {task: records[index] for task, records in by_task.items()}
            )
    return result


# --- one task, one scope -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Differences of all designs from the reference on one task, summed up (K designs)."""

    name: str
    n_units: int
    n_seeds: int
    means: FloatArray  # (K,) score of each design
    reference_mean: float
    units: FloatArray  # (K, n_units) differences averaged over seeds
    seeds: FloatArray  # (K, n_seeds) differences averaged over units
    unit_variance: FloatArray  # (K,) variance of the task's mean difference from units
    residual_variance: FloatArray  # (K,) the part of it that more seeds would average out
    spread: FloatArray  # (K,) variance of `units`
    binary: NDArray[np.bool_]  # (K,) design and reference hold nothing but 0 and 1
    favour: NDArray[np.int64]  # (3, K) wins, ties, losses

    @property
    def is_small(self) -> bool:
        return self.n_units <= _EXACT_UNITS

    @staticmethod
    def build(
        name: str, designs: Sequence[FloatArray], reference: FloatArray, higher_is_better: bool
    ) -> _Task:
        n_seeds, n_units = reference.shape
        stacked = np.stack(designs) if designs else np.empty((0, n_seeds, n_units))
        d = stacked - reference
        units, seeds = d.mean(axis=1), d.mean(axis=2)
        # Differences that only rounding tells from 0 are ties.
        dust = 1e-12 * np.maximum(np.abs(stacked).max(axis=(1, 2)), np.abs(reference).max())
        units = np.where(np.abs(units) <= dust[:, None], 0.0, units)
        better = units > 0 if higher_is_better else units < 0
        wins, ties = better.sum(axis=1), (units == 0).sum(axis=1)
        spread = units.var(axis=1, ddof=1) if n_units > 1 else np.zeros(len(d))
        residual = np.zeros(len(d))
        if n_units > 1 and n_seeds > 1:
            centred = d - units[:, None, :] - seeds[:, :, None] + seeds.mean(axis=1)[:, None, None]
            degrees = (n_units - 1) * (n_seeds - 1)
            residual = (centred**2).sum(axis=(1, 2)) / degrees / (n_seeds * n_units)
        return _Task(
            name=name,
            n_units=n_units,
            n_seeds=n_seeds,
            means=stacked.mean(axis=(1, 2)),
            reference_mean=float(reference.mean()),
            units=units,
            seeds=seeds,
            unit_variance=spread / n_units,
            residual_variance=residual,
            spread=spread,
            binary=_is_binary(stacked) & _is_binary(reference[None]),
            favour=np.stack([wins, ties, n_units - wins - ties]),
        )


@dataclass(frozen=True)
class _Flips:
    """Sums under sign flips: ``sums[b, k] = sum_i w_i s_bi d_ki``, ``totals[b] = sum_i w_i s_bi``.

    The weights w give every task the same weight and sum to one. Testing the value x by flipping
    the signs of ``d - x`` rejects pattern b's claim exactly when x lies outside the two means that
    the pattern splits the units into (+ and -), so one set of sums gives the p-value of every x.
    """

    sums: FloatArray
    totals: FloatArray
    n_units: int
    complete: bool  # every pattern is there once, the observed one included

    @staticmethod
    def draw(tasks: Sequence[_Task], n_flips: int, generator: np.random.Generator) -> _Flips:
        (task,) = tasks
        n, columns = task.n_units, np.vstack([task.units, np.ones(task.n_units)]).T / task.n_units
        out = np.empty((n_flips, columns.shape[1]))
        rows = max(1, 4_000_000 // n)  # bounds the memory that the signs take
        for start in range(0, n_flips, rows):
            size = min(rows, n_flips - start)
            packed = generator.integers(0, 256, size=(size, -(-n // 8)), dtype=np.uint8)
            bits = np.unpackbits(packed, axis=1, count=n)
            out[start : start + size] = (2.0 * bits - 1.0) @ columns
        return _Flips(out[:, :-1], out[:, -1], n, complete=False)

    @staticmethod
    def exact(tasks: Sequence[_Task]) -> _Flips:
        n = sum(task.n_units for task in tasks)
        weights = np.concatenate(
            [np.full(task.n_units, 1 / (task.n_units * len(tasks))) for task in tasks]
        )
        units = np.concatenate([task.units for task in tasks], axis=1)
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        signs = 2.0 * patterns - 1.0
        return _Flips(signs @ (units * weights).T, signs @ weights, n, complete=True)

    def moved(self, task: _Task, other: _Task) -> _Flips:
        """Return the sums for `other`, whose units are those of `task` stretched and shifted."""
        stretch = _stretch(task) if other is not task else 1.0
        shift = other.units.mean(axis=1) - stretch * task.units.mean(axis=1)
        return replace(self, sums=stretch * self.sums + self.totals[:, None] * shift)

    @staticmethod
    def average(parts: Sequence[_Flips]) -> _Flips:
        return _Flips(
            np.mean([part.sums for part in parts], axis=0),
            np.mean([part.totals for part in parts], axis=0),
            sum(part.n_units for part in parts),
            complete=False,
        )


def _with_common_mean(tasks: Sequence[_Task]) -> list[_Task]:
    """Return the tasks with their units moved so that every task has the overall difference.

    Between fixed tasks a difference of differences is no noise, and flipping its sign would count
    it as such. What is left of a task's n units varies by (n - 1) / n of their variance; the
    stretch makes up for that.
    """
    overall = np.mean([task.units.mean(axis=1) for task in tasks], axis=0)[:, None]
    return [
        replace(
            task,
            units=overall + _stretch(task) * (task.units - task.units.mean(axis=1, keepdims=True)),
        )
        for task in tasks
    ]


def _stretch(task: _Task) -> float:
    return math.sqrt(task.n_units / (task.n_units - 1))


@dataclass(frozen=True)
class _Context:
    margin: float | None
    alpha: float
    higher_is_better: bool
    n_designs: int
    tasks_sampled: bool


@dataclass(frozen=True)
class _Components:
    """Variances of a mean difference, each already divided by its number of draws; arrays (K,)."""

    unit: FloatArray  # units drawn anew (residual included)
    residual: FloatArray  # unit x seed noise within
    task: FloatArray  # tasks: beyond what units and seeds explain
    seed: FloatArray  # seeds: beyond what the residual explains, tasks x seeds included
    variance: FloatArray  # the crossed variance, or the unit variance where that is not exceeded
    degrees: FloatArray  # Satterthwaite's, of `variance`
    crossed: NDArray[np.bool_]  # tasks or seeds spread beyond the units' noise
    unit_degrees: FloatArray
    tasks_count: bool  # tasks are a source of variance here


def _components(tasks: Sequence[_Task], *, sampled: bool) -> _Components:
    """Split the variance of the mean difference over units, seeds and, if sampled, tasks.

    With T tasks and S seeds, ``between tasks`` estimates task + task x seed + unit variance,
    ``between seeds`` estimates seed + task x seed + residual variance. Their sum counts task x seed
    and residual twice. The residual is known well (from the units), the task x seed part badly
    (few degrees of freedom), so the latter is taken out of the sum only where an F test sees it.
    """
    from scipy.stats import f as f_distribution

    n_tasks, n_seeds = len(tasks), tasks[0].n_seeds
    unit = _sum([task.unit_variance for task in tasks]) / n_tasks**2
    residual = _sum([task.residual_variance for task in tasks]) / n_tasks**2
    unit_degrees = _satterthwaite(
        unit, [(task.unit_variance / n_tasks**2, task.n_units - 1) for task in tasks]
    )
    residual_degrees = _satterthwaite(
        residual,
        [
            (task.residual_variance / n_tasks**2, (task.n_units - 1) * (n_seeds - 1))
            for task in tasks
        ],
    )
    # One task's unit variance cannot be had from one unit; the spread between tasks holds it.
    unit_known = all(task.n_units > 1 for task in tasks)
    sampled = n_tasks > 1 and (sampled or not unit_known)
    floor = unit if unit_known else np.zeros_like(unit)

    cells = np.stack([task.seeds for task in tasks], axis=1)  # (K, T, S)
    zero = np.zeros_like(unit)
    between_tasks = cells.mean(axis=2).var(axis=1, ddof=1) / n_tasks if sampled else zero
    between_seeds = cells.mean(axis=1).var(axis=1, ddof=1) / n_seeds if n_seeds > 1 else zero
    interaction, seen = zero, np.zeros(len(unit), dtype=bool)
    if sampled and n_seeds > 1:
        interaction = _interaction(cells)
        degrees = (n_tasks - 1) * (n_seeds - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = interaction / residual
        limit = f_distribution.isf(_INTERACTION_LEVEL, degrees, np.maximum(residual_degrees, 1.0))
        seen = unit_known & (ratio > limit)

    common = np.where(seen, interaction, residual)
    seed_part = between_seeds - common if n_seeds > 1 else zero
    # With the badly known interaction subtracted the sum may fall below the spread between tasks
    # alone, which is an honest estimate by itself.
    truncate = seen if unit_known else np.ones_like(seen)
    seed_part = np.where(truncate, np.maximum(seed_part, 0.0), seed_part)
    first = between_tasks if sampled else unit
    variance = first + seed_part
    crossed = variance > floor * (1 + 1e-9)
    parts = [(first, n_tasks - 1 if sampled else unit_degrees)]
    if n_seeds > 1:
        used = ~truncate | (seed_part > 0)
        parts.append((np.where(used, between_seeds, 0.0), n_seeds - 1))
        parts.append((np.where(seen, 0.0, residual), residual_degrees))
    degrees_crossed = _satterthwaite(variance, parts)
    inter = np.where(seen, np.maximum(interaction - residual, 0.0), 0.0)
    return _Components(
        unit=unit,
        residual=residual,
        task=np.where(crossed, np.maximum(between_tasks - unit - inter, 0.0), 0.0),
        seed=np.where(crossed, np.maximum(seed_part, 0.0) + inter, 0.0),
        variance=np.where(crossed, variance, unit),
        degrees=np.where(crossed, degrees_crossed, unit_degrees),
        crossed=crossed,
        unit_degrees=unit_degrees,
        tasks_count=sampled,
    )


def _interaction(cells: FloatArray) -> FloatArray:
    """Return the tasks x seeds variance of the grand mean from cell means (K, T, S)."""
    n_tasks, n_seeds = cells.shape[1:]
    centred = (
        cells
        - cells.mean(axis=1, keepdims=True)
        - cells.mean(axis=2, keepdims=True)
        + cells.mean(axis=(1, 2), keepdims=True)
    )
    draws = (n_tasks - 1) * (n_seeds - 1) * n_tasks * n_seeds
    variance: FloatArray = (centred**2).sum(axis=(1, 2)) / draws
    return variance


def _satterthwaite(
    variance: FloatArray, parts: Sequence[tuple[FloatArray, float | FloatArray]]
) -> FloatArray:
    """Return the degrees of freedom of a linear combination of independent mean squares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        denominator = _sum([part**2 / np.maximum(degrees, 1e-9) for part, degrees in parts])
        degrees = np.where(denominator > 0, variance**2 / denominator, 1.0)
    clipped: FloatArray = np.clip(degrees, 1.0, 1e9)
    return clipped


# --- from estimates to p-values and intervals --------------------------------------------------


class _FlipTest:
    """p-values and interval of one design from sign flips; the two agree exactly."""

    def __init__(self, flips: _Flips, index: int, difference: float, scale: float) -> None:
        sums, totals = flips.sums[:, index], flips.totals
        with np.errstate(divide="ignore", invalid="ignore"):
            minus = (difference - sums) / (1.0 - totals)
            plus = (difference + sums) / (1.0 + totals)
        # A pattern that flips all units or none rejects nothing, whatever the value tested.
        trivial = np.abs(totals) > 1 - 1e-12
        self._low = np.where(trivial, -np.inf, np.minimum(minus, plus))
        self._high = np.where(trivial, np.inf, np.maximum(minus, plus))
        self._observed = 0 if flips.complete else 1  # drawn patterns: the observed one counts too
        self._total = len(totals) + self._observed
        self._tolerance = 1e-10 * scale  # patterns that tie up to rounding count as ties

    def p_value(self, value: float) -> float:
        inside = (self._low <= value + self._tolerance) & (self._high >= value - self._tolerance)
        return (int(inside.sum()) + self._observed) / self._total

    def interval(self, alpha: float) -> tuple[float, float]:
        allowed = math.floor(alpha * self._total + 1e-9) - self._observed
        if allowed < 0:
            return -math.inf, math.inf
        low = float(np.partition(self._low, allowed)[allowed])
        last = len(self._high) - 1 - allowed
        high = float(np.partition(self._high, last)[last])
        return tuple(0.0 if abs(end) <= self._tolerance else end for end in (low, high))  # type: ignore[return-value]


class _StudentTest:
    """p-values and interval of Student's t around a centre.

    `pieces` are (variance, degrees of freedom) that add up to the variance. Where one is known well
    and the other badly, Satterthwaite's interval is a little short; letting each piece bring its
    own quantile, added in quadrature, is a little short elsewhere. The wider one is taken.
    """

    def __init__(
        self,
        centre: float,
        variance: float,
        degrees: float,
        smallest: float,
        pieces: Sequence[tuple[float, float]] = (),
    ) -> None:
        self._centre, self._variance = centre, variance
        self._degrees, self._smallest, self._pieces = degrees, smallest, pieces

    def p_value(self, value: float) -> float:
        from scipy.optimize import brentq
        from scipy.special import stdtr

        distance = abs(self._centre - value)
        if distance == 0:
            return 1.0
        if self._variance == 0:  # units that all agree still number only so many
            return self._smallest
        p_value = float(2 * stdtr(self._degrees, -distance / math.sqrt(self._variance)))
        if p_value == 0 or self._half(p_value) <= distance * (1 + 1e-12):
            return p_value
        # On the logarithm, because p-values may differ by hundreds of orders of magnitude.
        return math.exp(
            brentq(lambda log_p: self._half(math.exp(log_p)) - distance, math.log(p_value), 0.0)
        )

    def interval(self, alpha: float) -> tuple[float, float]:
        half = self._half(alpha)
        return self._centre - half, self._centre + half

    def _half(self, alpha: float) -> float:
        from scipy.special import stdtrit

        half = -stdtrit(self._degrees, alpha / 2) * math.sqrt(self._variance)
        squares = [v * stdtrit(degrees, alpha / 2) ** 2 for v, degrees in self._pieces]
        return max(float(half), math.sqrt(sum(squares)))


class _McNemarTest:
    """0/1 scores under one seed: exact McNemar test, Bonett and Price's interval.

    An exact test of few discordant units is coarse; the interval that inverts it would cover too
    often, and would shrink to a point where all units tie. Adding one win and one loss mends both.
    """

    def __init__(self, wins: int, losses: int, n_units: int) -> None:
        self._wins, self._losses = wins, losses
        centre = (wins - losses) / (n_units + 2)
        variance = ((wins + losses + 2) / (n_units + 2) - centre**2) / (n_units + 2)
        self._adjusted = _StudentTest(centre, variance, 1e9, 1.0)

    def p_value(self, value: float) -> float:
        from scipy.stats import binomtest

        if value != 0:
            return self._adjusted.p_value(value)
        discordant = self._wins + self._losses
        return float(binomtest(self._wins, discordant).pvalue) if discordant else 1.0

    def interval(self, alpha: float) -> tuple[float, float]:
        low, high = self._adjusted.interval(alpha)
        return max(low, -1.0), min(high, 1.0)


class _NoTest:
    """One unit: nothing tells how much another one would differ."""

    def p_value(self, value: float) -> float:
        return 1.0

    def interval(self, alpha: float) -> tuple[float, float]:
        return -math.inf, math.inf


_Test = _FlipTest | _StudentTest | _McNemarTest | _NoTest


def _choose_test(
    tasks: Sequence[_Task], flips: _Flips, parts: _Components, index: int, context: _Context
) -> _Test:
    difference = float(np.mean([task.units[index].mean() for task in tasks]))
    n_units, n_seeds = flips.n_units, tasks[0].n_seeds
    if len(tasks) == 1 and n_units == 1:
        return _NoTest()
    if len(tasks) == 1 and n_seeds == 1 and tasks[0].binary[index]:
        units = tasks[0].units[index]
        return _McNemarTest(int((units > 0).sum()), int((units < 0).sum()), n_units)
    finest = 2.0 ** (1 - n_units)  # the smallest p-value that sign flips can give
    if parts.crossed[index] or finest > context.alpha:
        pieces: list[tuple[float, float]] = []
        if parts.crossed[index] and not parts.tasks_count:
            pieces = [
                (parts.unit[index], parts.unit_degrees[index]),
                (parts.seed[index], n_seeds - 1),
            ]
        return _StudentTest(
            difference, float(parts.variance[index]), float(parts.degrees[index]), finest, pieces
        )
    scale = max(float(np.abs(task.units[index]).max()) for task in tasks)
    return _FlipTest(flips, index, difference, scale)


def _records(tasks: Sequence[_Task], flips: _Flips, context: _Context) -> list[Record]:
    """Return one record per design over the given tasks, Holm-corrected among them."""
    if context.n_designs == 0:
        return []
    parts = _components(tasks, sampled=context.tasks_sampled)
    tests = [
        _choose_test(tasks, flips, parts, index, context) for index in range(context.n_designs)
    ]
    differences = np.mean([task.units.mean(axis=1) for task in tasks], axis=0)
    p_values = np.array([test.p_value(0.0) for test in tests])
    p_equivalent = np.array(
        [
            _equivalence_p_value(test, float(difference), context.margin)
            for test, difference in zip(tests, differences, strict=True)
        ]
    )
    p_holm, p_equivalent = _holm(p_values), _holm(p_equivalent)
    means = np.mean([task.means for task in tasks], axis=0)
    spread = np.sqrt(np.mean([task.spread for task in tasks], axis=0))
    favour = _sum([task.favour for task in tasks])
    pooled = np.concatenate([task.units for task in tasks], axis=1)
    quantiles = np.quantile(pooled, _QUANTILES, axis=1)
    n_units, n_seeds = pooled.shape[1], tasks[0].n_seeds
    estimable = not isinstance(tests[0], _NoTest)

    records = []
    for index, test in enumerate(tests):
        difference = float(differences[index])
        interval = test.interval(context.alpha)
        verdict = _verdict(interval, float(p_holm[index]), float(p_equivalent[index]), context)
        needed: tuple[int | None, int | None] = (None, None)
        if verdict == "undecided" and estimable:
            needed = _needed(parts, index, difference, n_units, n_seeds, context)
        records.append(
            Record(
                mean=float(means[index]),
                difference=difference,
                interval=interval,
                p_value=float(p_values[index]),
                p_holm=float(p_holm[index]),
                effect_size=_effect_size(difference, float(spread[index])),
                verdict=verdict,
                n_units=n_units,
                n_seeds=n_seeds,
                n_tasks=len(tasks),
                wins=int(favour[0, index]),
                ties=int(favour[1, index]),
                losses=int(favour[2, index]),
                difference_quantiles=tuple(map(float, quantiles[:, index])),
                needed_units=needed[0],
                needed_seeds=needed[1],
            )
        )
    return records


def _equivalence_p_value(test: _Test, difference: float, margin: float | None) -> float:
    """Return the p-value of two one-sided tests: half the larger two-sided one at the margins."""
    if margin is None or abs(difference) >= margin:
        return 1.0
    return max(test.p_value(-margin), test.p_value(margin)) / 2


def _verdict(
    interval: tuple[float, float], p_holm: float, p_equivalent: float, context: _Context
) -> Verdict:
    if context.margin is not None and p_equivalent < context.alpha:
        return "equivalent"
    if p_holm < context.alpha and (interval[0] > 0 or interval[1] < 0):
        return "better" if (interval[0] > 0) == context.higher_is_better else "worse"
    return "undecided"


def _effect_size(difference: float, spread: float) -> float:
    if difference == 0:
        return 0.0
    # Below rounding error of the differences themselves the spread is none at all.
    return (
        difference / spread
        if spread > 1e-12 * abs(difference)
        else math.copysign(math.inf, difference)
    )


def _needed(
    parts: _Components,
    index: int,
    difference: float,
    n_units: int,
    n_seeds: int,
    context: _Context,
) -> tuple[int | None, int | None]:
    """Return units and seeds that would decide with power 0.8, taking the estimates for true."""
    task, seed = float(parts.task[index]), float(parts.seed[index])
    residual = float(min(parts.residual[index], parts.unit[index]))
    unit = float(parts.unit[index]) - residual
    degrees = float(parts.degrees[index])
    # Each goal: how far the estimate lies from what must be excluded, and the level it takes.
    goals = [(abs(difference), context.alpha / context.n_designs / 2)]
    if context.margin is not None:
        goals.append((context.margin - abs(difference), context.alpha / context.n_designs))

    def enough(variance: float, freedom: float) -> bool:
        return any(
            distance > 0
            and distance >= _distance_needed(freedom, level) * math.sqrt(max(variance, 0.0))
            for distance, level in goals
        )

    def units_suffice(size: int) -> bool:
        return enough(task + seed + (unit + residual) * n_units / size, degrees)

    def seeds_suffice(size: int) -> bool:
        # Degrees of freedom grow with the seeds as far as the seeds are what limits them.
        share = seed / (task + seed) if task + seed > 0 else 0.0
        growth = 1 + share * (size - n_seeds) / max(n_seeds - 1, 1)
        return enough(task + unit + (seed + residual) * n_seeds / size, degrees * growth)

    # One seed says nothing about others.
    by_seeds = _smallest(n_seeds, seeds_suffice) if n_seeds > 1 else None
    return _smallest(n_units, units_suffice), by_seeds


def _distance_needed(degrees: float, level: float) -> float:
    """Return how many standard errors away a value must lie to be excluded with power 0.8."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(degrees, 1 - level) + ndtri(_POWER))


def _smallest(today: int, suffices: Callable[[int], bool]) -> int | None:
    sizes = range(today + 1, today * _LARGEST_MULTIPLE + 1)
    found = bisect_left(sizes, True, key=suffices)
    return sizes[found] if found < len(sizes) else None


def _reference_record(tasks: Sequence[_Task]) -> Record:
    n_units = sum(task.n_units for task in tasks)
    return Record(
        mean=float(np.mean([task.reference_mean for task in tasks])),
        difference=0.0,
        interval=(0.0, 0.0),
        p_value=1.0,
        p_holm=1.0,
        effect_size=0.0,
        verdict="equivalent",
        n_units=n_units,
        n_seeds=tasks[0].n_seeds,
        n_tasks=len(tasks),
        wins=0,
        ties=n_units,
        losses=0,
        difference_quantiles=(0.0,) * len(_QUANTILES),
        needed_units=None,
        needed_seeds=None,
    )


# --- ranks and rank tests over data sets -------------------------------------------------------

_TASK_BLOCKS = 10  # Demsar's advice for ranks over data sets: more than ten of them


def critical_difference(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    *,
    alpha: float = 0.05,
    higher_is_better: bool = True,
) -> Ranks:
    """Rank the designs, for a critical-difference diagram.

    A block is what the designs are ranked on. With ten tasks or more a block is a task (its mean
    over units and seeds); with fewer, too few to rank on, a block is a unit (its mean over seeds),
    and tasks with more units weigh more. Friedman's test asks whether any designs differ; if so,
    every pair is tested by Wilcoxon's signed-rank test with Holm's correction over all pairs.

    Ranks are for the picture of all designs at once. They ignore training noise beyond the seeds
    at hand; `compare` gives the verdicts.

    Parameters
    ----------
    scores
        As for `compare`.
    alpha
        Level of the tests.
    higher_is_better
        Direction of the metric: rank 1 is best.

    Returns
    -------
    Ranks
        Average ranks, best first, and the runs of designs that cannot be told apart.

    Raises
    ------
    ValueError
        As in `compare`.

    References
    ----------
    J. Demsar, "Statistical comparisons of classifiers over multiple data sets", Journal of Machine
    Learning Research 7, 2006. A. Benavoli, G. Corani, F. Mangili, "Should we really use post-hoc
    tests based on mean-ranks?", Journal of Machine Learning Research 17, 2016.

    Examples
    --------
    >>> scores = {"a": {"t": [[3, 4, 5, 6, 7, 8, 9]]}, "b": {"t": [[1, 2, 3, 4, 5, 6, 7.5]]}}
    >>> critical_difference(scores).average_ranks
    {'a': 1.0, 'b': 2.0}
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    alpha = _checked_alpha(alpha)
    arrays = _checked_scores(scores)
    names = list(arrays)
    n_tasks = len(arrays[names[0]])
    over_tasks = n_tasks >= _TASK_BLOCKS
    blocks = np.stack(
        [
            np.array([scored.mean() for scored in arrays[name].values()])
            if over_tasks
            else np.concatenate([arrays[name][task].mean(axis=0) for task in arrays[names[0]]])
            for name in names
        ]
    )
    n_designs, n_blocks = blocks.shape
    # Rounding makes equal means differ in the last digit; they are ties.
    blocks = np.round(blocks / (np.abs(blocks).max() or 1.0), 12)
    ranks = rankdata(-blocks if higher_is_better else blocks, axis=0).mean(axis=1)
    order = np.argsort(ranks, kind="stable")
    block = "task" if over_tasks else "unit, averaged over seeds"
    if n_designs == 1:
        return Ranks({names[0]: 1.0}, None, (), n_blocks, f"one design; block: {block}", 1.0)

    pairs = [(i, j) for i in range(n_designs) for j in range(i + 1, n_designs)]
    p_pairs = np.array([1.0])
    if n_blocks > 1:
        p_pairs = np.concatenate(
            [_wilcoxon(blocks[i] - blocks[i + 1 :])[1] for i in range(n_designs - 1)]
        )
    else:
        p_pairs = np.ones(len(pairs))
    p_pairs = _holm(p_pairs)
    if n_designs == 2:
        p_value, omnibus = float(p_pairs[0]), "Wilcoxon signed-rank test"
    else:
        omnibus = "Friedman test, then Wilcoxon signed-rank tests of all pairs with Holm correction"
        constant = n_blocks < 2 or bool((blocks == blocks[0]).all())
        p_value = 1.0 if constant else float(friedmanchisquare(*blocks).pvalue)
        if p_value >= alpha:
            p_pairs = np.ones_like(p_pairs)
    apart = np.zeros((n_designs, n_designs), dtype=bool)
    for (i, j), p_pair in zip(pairs, p_pairs, strict=True):
        apart[i, j] = apart[j, i] = p_pair < alpha
    quantile = float(studentized_range.ppf(1 - alpha, n_designs, np.inf)) / math.sqrt(2)
    return Ranks(
        average_ranks={names[i]: float(ranks[i]) for i in order},
        critical_difference=quantile * math.sqrt(n_designs * (n_designs + 1) / (6 * n_blocks)),
        cliques=tuple(
            tuple(names[i] for i in order[start:stop])
            for start, stop in _runs(apart[np.ix_(order, order)])
        ),
        n_blocks=n_blocks,
        test=f"{omnibus}; block: {block}",
        p_value=p_value,
    )


def _runs(apart: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return maximal runs [start, stop) of two or more neighbours of whom no pair is apart."""
    found: list[tuple[int, int]] = []
    for start in range(len(apart)):
        stop = start + 1
        while stop < len(apart) and not apart[start:stop, stop].any():
            stop += 1
        if stop - start > 1 and (not found or stop > found[-1][1]):
            found.append((start, stop))
    return found


def wilcoxon_holm(scores: Mapping[str, ArrayLike], reference: str) -> dict[str, dict[str, float]]:
    """Test each design against a reference over data sets: Wilcoxon's signed-rank test, Holm.

    Parameters
    ----------
    scores
        ``scores[design]`` is a float array of shape (n_datasets,), data sets in the same order.
    reference
        Name of the design that the others are compared with.

    Returns
    -------
    dict
        For every other design ``statistic`` (the smaller of the two rank sums), two-sided
        ``p_value``, ``p_holm`` and ``mean_difference`` (design minus reference).

    Raises
    ------
    ValueError
        If lengths disagree, scores are not finite or the reference is unknown.

    References
    ----------
    F. Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1, 1945; used so
    over data sets by Y. Tang, Y. Yang, "Pooling And Attention: What Are Effective Designs For
    LLM-Based Embedding Models?", arXiv 2409.02727.

    Examples
    --------
    >>> scores = {"mean": [1.0, 2, 3, 4, 5, 6], "last": [2.0, 3.5, 5, 6.5, 8, 9.5]}
    >>> wilcoxon_holm(scores, "mean")["last"]["p_value"]
    0.03125
    """
    arrays = {
        name: next(iter(tasks.values()))[0]
        for name, tasks in _checked_scores(
            {name: {"data sets": _as_row(name, values)} for name, values in scores.items()}
        ).items()
    }
    if reference not in arrays:
        raise ValueError(f"reference {reference!r} is not among the designs: {list(arrays)}")
    names = [name for name in arrays if name != reference]
    if not names:
        return {}
    differences = np.stack([arrays[name] - arrays[reference] for name in names])
    statistics, p_values = _wilcoxon(differences)
    p_holm = _holm(p_values)
    return {
        name: {
            "statistic": float(statistics[index]),
            "p_value": float(p_values[index]),
            "p_holm": float(p_holm[index]),
            "mean_difference": float(differences[index].mean()),
        }
        for index, name in enumerate(names)
    }


def _as_row(name: str, values: ArrayLike) -> ArrayLike:
    row = np.asarray(values)
    if row.ndim != 1:
        raise ValueError(
            f"scores of design {name!r} must have shape (n_datasets,), got shape {row.shape}"
        )
    return row[None, :]


def _wilcoxon(differences: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return statistics and p-values of Wilcoxon's test of every row."""
    from scipy.stats import wilcoxon

    statistics, p_values = np.zeros(len(differences)), np.ones(len(differences))
    for index, row in enumerate(differences):
        if row.any():  # scipy has no answer where nothing differs
            result = wilcoxon(row)
            statistics[index], p_values[index] = result.statistic, result.pvalue
    return statistics, p_values


# --- small helpers -----------------------------------------------------------------------------


def _holm(p_values: FloatArray) -> FloatArray:
    """Return Holm's step-down adjustment.

    As `statsmodels.stats.multitest.multipletests` has it, which is not called because it runs the
    garbage collector every time: a tenth of a second a call in a process that has loaded torch.
    """
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(n)
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(n, 0, -1))
    return np.minimum(adjusted, 1.0)


def _is_binary(arrays: FloatArray) -> NDArray[np.bool_]:
    answer: NDArray[np.bool_] = ((arrays == 0) | (arrays == 1)).all(axis=(1, 2))
    return answer


def _sum(arrays: Sequence[Any]) -> Any:
    return np.sum(arrays, axis=0)


def _number_of_flips(n_units: int, n_designs: int, alpha: float) -> int:
    """Return how many sign patterns to draw.

    Enough that Holm's smallest level, alpha / n_designs, is ten times the finest p-value; fewer
    than usual only for very many units, where the distribution is smooth anyway.
    """
    fine = math.ceil(10 * max(n_designs, 1) / alpha)
    affordable = max(_MIN_FLIPS, _FLIP_BUDGET // max(n_units, 1))
    return min(max(_FLIPS, fine), _MAX_FLIPS, max(affordable, fine))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _checked_alpha(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    return float(alpha)


def _checked_margin(margin: float | None) -> float | None:
    if margin is None:
        return None
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be a positive finite number or None, got {margin!r}")
    return float(margin)


def _checked_scores(
    scores: Mapping[str, Mapping[str, ArrayLike]],
) -> dict[str, dict[str, FloatArray]]:
    """Return the scores as float64 arrays, tasks in the first design's order, or raise."""
    if not scores:
        raise ValueError("scores is empty: give at least one design")
    arrays = {
        name: {task: _checked_array(name, task, values) for task, values in tasks.items()}
        for name, tasks in scores.items()
    }
    first, expected = next(iter(arrays.items()))
    if not expected:
        raise ValueError(f"design {first!r} has no tasks: give at least one")
    seeds_task, seeds_array = next(iter(expected.items()))
    for name, tasks in arrays.items():
        missing, extra = set(expected) - set(tasks), set(tasks) - set(expected)
        if missing or extra:
            raise ValueError(
                f"designs must have the same tasks: {name!r} lacks {sorted(missing)} and adds "
                f"{sorted(extra)} to those of {first!r}"
            )
        for task, array in tasks.items():
            if array.shape != expected[task].shape:
                raise ValueError(
                    f"scores of task {task!r} are misaligned: design {name!r} has shape "
                    f"{array.shape}, design {first!r} has {expected[task].shape}; units and seeds "
                    "must be the same"
                )
            if len(array) != len(seeds_array):
                raise ValueError(
                    f"all tasks need the same number of seeds: design {name!r} has shape "
                    f"{array.shape} on task {task!r} and {seeds_array.shape} on {seeds_task!r}"
                )
    return {name: {task: tasks[task] for task in expected} for name, tasks in arrays.items()}


def _checked_array(design: str, task: str, values: ArrayLike) -> FloatArray:
    where = f"scores of design {design!r} on task {task!r}"
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} are not a rectangular array of numbers: {error}") from error
    if array.ndim != 2:
        raise ValueError(f"{where} must have shape (n_seeds, n_units), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{where} are empty: shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{where} hold {bad} NaN or infinite values; every score must be finite")
    return array
