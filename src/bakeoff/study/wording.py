"""The words and number formats that the report and the terminal table share.

Also the one sentence that answers the study's question, so that it reads the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bakeoff.study.schema import Comparison, Results, parse_results

MISSING = "–"
MINUS = "−"


@dataclass(frozen=True)
class VerdictWording:
    """How a verdict is shown: a symbol beside the word, because colour alone excludes readers."""

    symbol: str
    ascii_symbol: str
    meaning: str


VERDICTS: Mapping[str, VerdictWording] = {
    "better": VerdictWording("▲", "+", "significantly better than the reference"),
    "worse": VerdictWording("▼", "-", "significantly worse than the reference"),
    "equivalent": VerdictWording(
        "≈", "=", "any difference is smaller than the margin that matters"
    ),
    "undecided": VerdictWording("?", "?", "the data do not tell; more units or seeds may"),
}


def duration(seconds: float) -> str:
    """Return a time span for readers.

    Examples
    --------
    >>> duration(0.034), duration(3.21), duration(95), duration(7500)
    ('34 ms', '3.2 s', '1 min 35 s', '2 h 05 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    """Return a size in decimal units, e.g. ``1.2 GB``."""
    return _scaled(count, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "B")


def quantity(count: float) -> str:
    """Return a count with three digits and a suffix, e.g. ``590k`` or ``134M``."""
    if count and (abs(count) >= 1e15 or abs(count) < 1e-3):
        return f"{count:.2g}".replace("-", MINUS)
    text = _scaled(count, [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")], "")
    return text.replace(" ", "").replace("-", MINUS)


def _scaled(count: float, units: list[tuple[float, str]], smallest: str) -> str:
    for size, unit in units:
        # 999.6 would round up to "1000", which belongs to the next unit.
        if abs(count) >= size * 0.9995:
            return f"{_three_digits(count / size)} {unit}"
    return f"{_three_digits(count)} {smallest}".strip()


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


@dataclass(frozen=True)
class CostWording:
    """How a cost is shown."""

    label: str
    meaning: str
    show: Callable[[float], str]


COSTS: Mapping[str, CostWording] = {
    "wall_seconds": CostWording(
        "Time", "time to fit and score once, without shared work", duration
    ),
    "peak_memory_bytes": CostWording("Peak memory", "largest memory while it ran", byte_size),
    "trained_parameters": CostWording("Trained parameters", "numbers that were fitted", quantity),
    "forward_flops_per_text": CostWording(
        "FLOPs per text", "floating-point operations to process one text", quantity
    ),
    "labels_used": CostWording("Labels used", "examples whose label was needed", quantity),
}


def cost_wording(name: str) -> CostWording:
    """Return how a cost is shown; names that nobody foresaw are spelt out."""
    if name in COSTS:
        return COSTS[name]
    show = duration if name.endswith("seconds") else quantity
    show = byte_size if name.endswith("bytes") else show
    label = name.replace("_", " ").strip() or name
    return CostWording(label[:1].upper() + label[1:], "reported by the problem", show)


def cost_names(results: Results) -> list[str]:
    """Return the costs that any design reports: the known ones first, in their order."""
    present = {cost for design in results.designs for cost in design.cost}
    known = [name for name in COSTS if name in present]
    return known + sorted(present - set(known))


def mean_cost(results: Results, design: str, cost: str) -> float | None:
    """Return a design's mean cost over seeds, or None."""
    found = results.design(design)
    value = found.cost.get(cost) if found else None
    return value.mean if value else None


def decimals(comparisons: Iterable[Comparison]) -> int:
    """Return how many decimals show two digits of a typical interval's half-width."""
    widths = [
        (high - low) / 2
        for comparison in comparisons
        for low, high in [ends(comparison)]
        if low is not None and high is not None and high > low
    ]
    if not widths:
        return 3
    typical = sorted(widths)[len(widths) // 2]
    return min(6, max(0, math.floor(-math.log10(typical)) + 2))


def ends(comparison: Comparison) -> tuple[float | None, float | None]:
    """Return the two ends of the interval; None where there is none."""
    if comparison.interval is None:
        return None, None
    return comparison.interval[0], comparison.interval[1]


def number(value: float | None, places: int) -> str:
    """Return a number with a true minus sign, or a dash for None."""
    if value is None:
        return MISSING
    if value and (abs(value) >= 1e7 or (abs(value) < 10.0**-places and places >= 6)):
        return f"{value:.2g}".replace("-", MINUS)
    text = f"{value:,.{places}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def signed(value: float | None, places: int) -> str:
    """Return a number with its sign, or a dash for None."""
    text = number(value, places)
    if value is not None and value > 0 and any(digit in text for digit in "123456789"):
        return f"+{text}"
    return text


def span(comparison: Comparison, places: int) -> str:
    """Return an interval, e.g. ``+0.031 to +0.055``, or a dash."""
    low, high = ends(comparison)
    if low is None or high is None:
        return MISSING
    return f"{signed(low, places)} to {signed(high, places)}"


def probability(value: float | None) -> str:
    """Return a p value."""
    if value is None:
        return MISSING
    if value < 0.001:
        return "<0.001"
    return f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"


def confidence(results: Results) -> str:
    """Return the intervals' confidence level, e.g. ``95 %``."""
    return f"{100 * (1 - results.study.alpha):g} %"


def answer(results: Mapping[str, Any] | Results) -> str:
    """Return the study's answer as one sentence; names of designs stand between backticks.

    Parameters
    ----------
    results
        The content of a ``results.json``.
    """
    return "".join(f"`{text}`" if is_name else text for text, is_name in answer_parts(results))


def answer_parts(results: Mapping[str, Any] | Results) -> list[tuple[str, bool]]:
    """Return the answer in pieces: text, and whether that text is the name of a design."""
    results = results if isinstance(results, Results) else parse_results(results)
    scored = [design.name for design in results.designs if results.headline in design.metrics]
    rivals = [name for name in scored if name != results.reference]
    trials = results.study.trials
    if not scored:
        return [(f"No answer: none of the {trials.planned} planned trials finished.", False)]
    if results.reference not in scored:
        return [
            ("No answer: the reference ", False),
            (results.reference, True),
            (" has no finished trial, so nothing can be compared with it.", False),
        ]
    if not rivals:
        return [
            ("No comparison: only the reference ", False),
            (results.reference, True),
            (" has finished trials.", False),
        ]
    sentence = _conclusion(results, rivals)
    if not results.study.complete:
        so_far = f"So far, with {trials.finished:,} of {trials.planned:,} trials: "
        sentence = [(so_far, False), *sentence]
    return sentence


def _conclusion(results: Results, rivals: list[str]) -> list[tuple[str, bool]]:
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for name in rivals:
        comparison = results.overall(name, results.headline)
        verdict = comparison.verdict if comparison else None
        by_verdict[verdict or "undecided"].append(name)
    better = by_verdict["better"]
    if better:
        winner = results.winner.design if results.winner.design in better else better[0]
        assert winner is not None
        others = len(better) - 1
        more = f"; {others} more {'beats' if others == 1 else 'beat'} it too" if others else ""
        return [
            (winner, True),
            (" helps: ", False),
            *_effect(results, winner),
            (f"{_price(results, winner)}{more}.", False),
        ]
    if by_verdict["undecided"]:
        closest = by_verdict["undecided"][0]
        return [
            ("Undecided: ", False),
            (closest, True),
            (" comes closest with ", False),
            *_effect(results, closest),
            (f"{_needed(results, closest)}.", False),
        ]
    if len(rivals) == 1:
        state = "is equivalent" if by_verdict["equivalent"] else "is worse"
        return [
            ("Nothing beat ", False),
            (results.reference, True),
            (": ", False),
            (rivals[0], True),
            (f" {state}.", False),
        ]
    counts = [
        f"{len(by_verdict[verdict])} {'is' if len(by_verdict[verdict]) == 1 else 'are'} {verdict}"
        for verdict in ("equivalent", "worse")
        if by_verdict[verdict]
    ]
    return [
        ("Nothing beat ", False),
        (results.reference, True),
        (f": of {len(rivals)} other designs, {' and '.join(counts)}.", False),
    ]


def _effect(results: Results, name: str) -> list[tuple[str, bool]]:
    comparison = results.overall(name, results.headline)
    assert comparison is not None
    metric = results.metrics[results.headline]
    places = decimals([comparison])
    interval = span(comparison, places)
    inside = [] if interval == MISSING else [f"{confidence(results)} interval {interval}"]
    inside += [] if metric.higher_is_better else ["lower is better"]
    difference = signed(comparison.difference, places)
    return [
        (f"{difference} {metric.label} against ", False),
        (results.reference, True),
        (f" ({'; '.join(inside)})" if inside else "", False),
    ]


def _price(results: Results, name: str) -> str:
    for cost in cost_names(results):
        ours = mean_cost(results, name, cost)
        theirs = mean_cost(results, results.reference, cost)
        if ours and theirs and theirs > 0:
            ratio = ours / theirs
            times = f"{ratio:.2g}" if ratio < 9.95 else f"{ratio:,.0f}"
            if cost == "wall_seconds":
                return ", taking as long" if times == "1" else f", taking {times} times as long"
            return f", at {times} times its {inside_sentence(cost_wording(cost).label)}"
    return ""


def inside_sentence(label: str) -> str:
    """Return a label with a small first letter, unless it begins with an acronym."""
    is_acronym = label[1:2].isupper()
    return label if is_acronym else label[:1].lower() + label[1:]


def _needed(results: Results, name: str) -> str:
    comparison = results.overall(name, results.headline)
    assert comparison is not None
    ways = [
        f"{needed:,} {word} instead of {today:,}"
        for needed, today, word in [
            (comparison.needed_seeds, comparison.n_seeds, "seeds"),
            (comparison.needed_units, comparison.n_units, "units"),
        ]
        if needed is not None and today is not None and needed > today
    ]
    return f"; to decide it would take about {' or '.join(ways)}" if ways else ""
