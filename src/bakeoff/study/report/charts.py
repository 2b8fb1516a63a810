"""The report's plots as geometry: every position is a percentage of the drawing's width or height.

Percentages let one drawing serve a telephone and a wide screen with text that stays readable, and
leave colours to the style sheet, which knows the reader's theme. A plotting library's static output
does neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bakeoff.study.schema import Comparison, Results
from bakeoff.study.wording import (
    MISSING,
    cost_names,
    cost_wording,
    decimals,
    duration,
    ends,
    mean_cost,
    number,
    signed,
    span,
)

N_TICKS = 7


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Maps values to percentages of an axis.

    A logarithmic scale that must also show zeros keeps a slot of its own for them at the low end.
    """

    low: float
    high: float
    logarithmic: bool = False
    zero_slot: float = 0.0

    def position(self, value: float) -> float:
        """Return where `value` lies, in percent from the low end; never beyond an end."""
        if not self.logarithmic:
            return 100 * _clamp((value - self.low) / (self.high - self.low))
        if value <= 0:
            return 100 * self.zero_slot / 2
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return 100 * (self.zero_slot + (1 - self.zero_slot) * _clamp(share))


def _clamp(share: float) -> float:
    return min(1.0, max(0.0, share))


def linear_scale(values: Iterable[float], *, include_zero: bool = False) -> Scale:
    """Return a scale that holds all values with a little room at both ends."""
    held = [*values, *([0.0] if include_zero else [])]
    low, high = (min(held), max(held)) if held else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = 0.5 * abs(high) or 0.5
    else:
        room = 0.06 * (high - low)
    return Scale(low - room, high + room)


def cost_scale(values: Sequence[float]) -> Scale:
    """Return a linear scale, or a logarithmic one if the positive values span a factor over 20."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) / min(positive) <= 20:
        return linear_scale(values)
    factor = (max(positive) / min(positive)) ** 0.06
    return Scale(
        min(positive) / factor,
        max(positive) * factor,
        logarithmic=True,
        zero_slot=0.12 if min(values) <= 0 else 0.0,
    )


def tick_values(scale: Scale) -> list[float]:
    """Return round values inside the scale: steps of 1, 2 or 5, or powers of ten.

    Examples
    --------
    >>> tick_values(Scale(-0.03, 0.12))
    [0.0, 0.05, 0.1]
    >>> tick_values(Scale(2.0, 3e4, logarithmic=True))
    [10.0, 100.0, 1000.0, 10000.0]
    """
    if scale.logarithmic:
        return _logarithmic_ticks(scale)
    rough = (scale.high - scale.low) / N_TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m >= rough * 0.999)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _logarithmic_ticks(scale: Scale) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    every = max(1, round((last - first) / 6))
    decades = [10.0**power for power in range(first, last + 1, every)]
    if last - first <= 3:
        decades = [multiple * decade for decade in decades for multiple in (1, 2, 5)]
    return [tick for tick in decades if scale.low <= tick <= scale.high]


def _difference_ticks(scale: Scale) -> list[Tick]:
    values = tick_values(scale)
    places = _places_of(values)
    return [Tick(scale.position(v), signed(v, places)) for v in values]


def _value_ticks(scale: Scale) -> list[Tick]:
    values = tick_values(scale)
    places = _places_of(values)
    return [Tick(scale.position(v), number(v, places)) for v in values]


def _places_of(ticks: Sequence[float]) -> int:
    if len(ticks) < 2:
        return 3
    return min(6, max(0, math.ceil(-math.log10(ticks[1] - ticks[0]) - 1e-9)))


@dataclass(frozen=True)
class IntervalRow:
    """A design's line in the interval plot; positions are None where nothing was computed."""

    name: str
    verdict: str | None
    is_reference: bool
    low: float | None
    middle: float | None
    high: float | None
    difference: str
    interval: str


@dataclass(frozen=True)
class IntervalPlot:
    """Differences to the reference with their intervals, one line per design."""

    ticks: list[Tick]
    zero: float
    margin: tuple[float, float] | None
    better_is_right: bool
    rows: list[IntervalRow]


def interval_plot(results: Results, metric: str) -> IntervalPlot:
    """Return the interval plot of one metric, or one without rows if it has no differences."""
    compared = _compared(results, metric)
    margin = results.metrics[metric].margin
    places = decimals(comparison for _, comparison in compared)
    extent = [v for _, c in compared for v in (*ends(c), c.difference) if v is not None]
    scale = linear_scale(extent, include_zero=True)
    if margin is not None:
        # A margin far wider than every interval would press them all into one dot.
        widest = 2 * max(map(abs, extent), default=margin) or margin
        scale = linear_scale(
            [*extent, -min(margin, widest), min(margin, widest)], include_zero=True
        )

    def place(value: float | None) -> float | None:
        return None if value is None else scale.position(value)

    rows = []
    for name, comparison in compared:
        is_reference = name == results.reference
        low, high = (None, None) if is_reference else ends(comparison)
        rows.append(
            IntervalRow(
                name,
                comparison.verdict,
                is_reference,
                place(low),
                None if is_reference else place(comparison.difference),
                place(high),
                signed(comparison.difference, places),
                span(comparison, places),
            )
        )
    return IntervalPlot(
        _difference_ticks(scale),
        scale.position(0.0),
        None if margin is None else (scale.position(-margin), scale.position(margin)),
        results.metrics[metric].higher_is_better,
        rows,
    )


def _compared(results: Results, metric: str) -> list[tuple[str, Comparison]]:
    """Return designs that have results under `metric`, best mean first, those without mean last."""
    found = [
        (design.name, design.metrics[metric].overall)
        for design in results.designs
        if metric in design.metrics
    ]
    sign = -1.0 if results.metrics[metric].higher_is_better else 1.0
    return sorted(found, key=lambda item: math.inf if item[1].mean is None else sign * item[1].mean)


@dataclass(frozen=True)
class RankRow:
    """A design's line in the critical-difference diagram."""

    name: str
    is_reference: bool
    position: float
    rank: str


@dataclass(frozen=True)
class Group:
    """Designs that cannot be told apart: a vertical bar in one of the lanes beside the plot."""

    lane: int
    first: int
    last: int
    runs: list[tuple[int, int]]
    names: list[str]


@dataclass(frozen=True)
class RankPlot:
    """The critical-difference diagram, turned so that each design has a line of its own."""

    ticks: list[Tick]
    rows: list[RankRow]
    groups: list[Group]
    n_lanes: int
    critical_difference: str | None
    width: float | None
    start: float
    n_blocks: int
    test: str


def rank_plot(results: Results, metric: str) -> RankPlot | None:
    """Return the critical-difference diagram of one metric, or None if there are no ranks."""
    ranks = results.ranks.get(metric)
    if ranks is None or len(ranks.average_ranks) < 2:
        return None
    ordered = sorted(ranks.average_ranks.items(), key=lambda item: item[1])
    values = [rank for _, rank in ordered]
    difference = ranks.critical_difference
    best = values[0]
    scale = linear_scale([*values, *([best + difference] if difference else [])])
    index = {name: i for i, (name, _) in enumerate(ordered)}
    groups = _lanes([sorted(index[n] for n in set(c) if n in index) for c in ranks.cliques])
    return RankPlot(
        _value_ticks(scale),
        [
            RankRow(name, name == results.reference, scale.position(rank), f"{rank:.2f}")
            for name, rank in ordered
        ],
        [
            Group(lane, members[0], members[-1], _runs(members), [ordered[i][0] for i in members])
            for lane, members in groups
        ],
        1 + max((lane for lane, _ in groups), default=-1),
        None if difference is None else f"{difference:.2f}",
        None if difference is None else scale.position(best + difference) - scale.position(best),
        scale.position(best),
        ranks.n_blocks,
        ranks.test,
    )


def _lanes(cliques: Iterable[list[int]]) -> list[tuple[int, list[int]]]:
    """Give each group the first lane that is free along its whole length."""
    ends_of_lanes: list[int] = []
    placed = []
    for members in sorted(clique for clique in cliques if len(clique) > 1):
        lane = next((i for i, end in enumerate(ends_of_lanes) if end < members[0]), None)
        if lane is None:
            lane = len(ends_of_lanes)
            ends_of_lanes.append(0)
        ends_of_lanes[lane] = members[-1]
        placed.append((lane, members))
    return placed


def _runs(members: list[int]) -> list[tuple[int, int]]:
    """Return the stretches of neighbours in a group; a test other than by ranks may leave gaps."""
    runs: list[tuple[int, int]] = []
    for i in members:
        if runs and runs[-1][1] == i - 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


@dataclass(frozen=True)
class UnitRow:
    """How a design's units differ from the reference's.

    `marks` holds one SVG path per kind (win, tie, loss) in a box of 1000 by 10.
    """

    name: str
    verdict: str | None
    marks: dict[str, str]
    median: float | None
    wins: float
    ties: float
    losses: float
    counts: tuple[int, int, int]
    n_units: int
    extremes: str


@dataclass(frozen=True)
class UnitPlot:
    """Per-unit differences, one line per design."""

    ticks: list[Tick]
    zero: float
    better_is_right: bool
    rows: list[UnitRow]


def unit_plot(results: Results, metric: str) -> UnitPlot:
    """Return the per-unit differences of one metric; designs without them are left out."""
    facts = results.metrics[metric]
    rows = [
        (name, comparison, [q for q in comparison.difference_quantiles or [] if q is not None])
        for name, comparison in _compared(results, metric)
        if name != results.reference and comparison.wins is not None
    ]
    # The most extreme unit says little and would squeeze all others: show 5 % to 95 %.
    inner = [q for _, _, quantiles in rows for q in quantiles[1:-1]]
    scale = linear_scale(inner, include_zero=True)
    places = decimals(comparison for _, comparison, _ in rows)
    improves = 1 if facts.higher_is_better else -1
    return UnitPlot(
        _difference_ticks(scale),
        scale.position(0.0),
        facts.higher_is_better,
        [
            _unit_row(name, comparison, quantiles, scale, places, improves)
            for name, comparison, quantiles in rows
        ],
    )


def _unit_row(
    name: str,
    comparison: Comparison,
    quantiles: list[float],
    scale: Scale,
    places: int,
    improves: int,
) -> UnitRow:
    counts = (comparison.wins or 0, comparison.ties or 0, comparison.losses or 0)
    total = sum(counts)
    wins, ties, losses = (100 * count / total if total else 0.0 for count in counts)
    complete = len(quantiles) > 2
    marks: dict[str, str] = {}
    for q in quantiles[1:-1]:
        kind = "win" if q * improves > 0 else "loss" if q * improves < 0 else "tie"
        marks[kind] = marks.get(kind, "") + f"M{10 * scale.position(q):.0f} 3v4"
    extremes = (
        f"{signed(quantiles[0], places)} to {signed(quantiles[-1], places)}"
        if complete
        else MISSING
    )
    return UnitRow(
        name,
        comparison.verdict,
        marks,
        scale.position(quantiles[len(quantiles) // 2]) if complete else None,
        wins,
        ties,
        losses,
        counts,
        total,
        extremes,
    )


@dataclass(frozen=True)
class CostPoint:
    """A design in the plot of quality against cost."""

    name: str
    verdict: str | None
    is_reference: bool
    on_frontier: bool
    x: float
    y: float
    cost: str
    mean: str


@dataclass(frozen=True)
class CostPlot:
    """Quality against one cost; `frontier` is the staircase of designs that nothing dominates."""

    cost: str
    label: str
    meaning: str
    metric: str
    logarithmic: bool
    zero_slot: float
    better_is_up: bool
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[CostPoint]
    frontier: list[tuple[float, float, float, float]]
    frontier_names: list[str]


def cost_plots(results: Results) -> list[CostPlot]:
    """Return one plot of the headline mean per cost in which the designs differ."""
    plots = []
    for cost in cost_names(results):
        found = []
        for name, comparison in _compared(results, results.headline):
            spent = mean_cost(results, name, cost)
            if spent is not None and comparison.mean is not None:
                found.append((name, comparison, spent, comparison.mean))
        if len(found) > 1 and len({spent for _, _, spent, _ in found}) > 1:
            plots.append(_cost_plot(results, cost, found))
    return plots


def _cost_plot(
    results: Results, cost: str, found: list[tuple[str, Comparison, float, float]]
) -> CostPlot:
    wording, metric = cost_wording(cost), results.metrics[results.headline]
    across = cost_scale([spent for _, _, spent, _ in found])
    up = linear_scale([mean for _, _, _, mean in found])
    places = decimals(comparison for _, comparison, _, _ in found)
    best = pareto_frontier(
        [(spent, mean if metric.higher_is_better else -mean) for _, _, spent, mean in found]
    )
    points = [
        CostPoint(
            name,
            comparison.verdict,
            name == results.reference,
            i in best,
            across.position(spent),
            100 - up.position(mean),
            wording.show(spent),
            number(mean, places),
        )
        for i, (name, comparison, spent, mean) in enumerate(found)
    ]
    corners = [(points[i].x, points[i].y) for i in best]
    return CostPlot(
        cost,
        wording.label,
        wording.meaning,
        metric.label,
        across.logarithmic,
        100 * across.zero_slot,
        metric.higher_is_better,
        _cost_ticks(across, cost),
        [Tick(100 - tick.position, tick.text) for tick in _value_ticks(up)],
        points,
        _staircase(corners),
        [points[i].name for i in best],
    )


def _cost_ticks(scale: Scale, cost: str) -> list[Tick]:
    show = cost_wording(cost).show
    values = [value for value in tick_values(scale) if value >= 0]
    if show is duration and not scale.logarithmic and scale.high > 120:
        # Round numbers of seconds are not round numbers of minutes.
        unit = 3600.0 if scale.high > 7200 else 60.0
        in_unit = tick_values(Scale(scale.low / unit, scale.high / unit))
        values = [unit * value for value in in_unit if value >= 0]
    zero = [Tick(scale.position(0.0), "0")] if scale.zero_slot else []
    return zero + [Tick(scale.position(value), _without_zeros(show(value))) for value in values]


def _without_zeros(text: str) -> str:
    return "0" if text.startswith("0 ") else text.removesuffix(" 00 s").removesuffix(" 00 min")


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that none dominates, cheapest first.

    Parameters
    ----------
    points
        (cost, quality): less cost and more quality are better.

    Examples
    --------
    >>> pareto_frontier([(1.0, 0.2), (2.0, 0.5), (3.0, 0.4)])
    [0, 1]
    """
    by_cost = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    frontier: list[int] = []
    for i in by_cost:
        if not frontier or points[i][1] > points[frontier[-1]][1]:
            frontier.append(i)
    return frontier


def _staircase(corners: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    lines = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        lines += [(x, y, next_x, y), (next_x, y, next_x, next_y)]
    if corners:
        lines.append((*corners[-1], 100.0, corners[-1][1]))
    return lines
