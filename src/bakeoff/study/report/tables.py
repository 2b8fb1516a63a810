"""The report's tables as rows of finished text with sort keys beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from bakeoff.study.schema import Comparison, DesignResult, Failure, Results
from bakeoff.study.wording import (
    MISSING,
    cost_names,
    cost_wording,
    decimals,
    number,
    probability,
    signed,
    span,
)

# Best first when the column of verdicts is sorted.
VERDICT_ORDER = {"better": 3, "equivalent": 2, "undecided": 1, "worse": 0}
N_FAILURES_SHOWN = 40
N_TRACEBACK_CHARACTERS = 6_000


@dataclass(frozen=True)
class Cell:
    """Text with the value it sorts by (None: last) and an explanation on hover."""

    text: str
    sort: float | str | None = None
    title: str = ""


@dataclass(frozen=True)
class VerdictRow:
    """A design's line in the verdict table."""

    name: str
    details: str
    is_reference: bool
    is_winner: bool
    verdict: str | None
    verdict_order: int | None
    mean: Cell
    difference: Cell
    interval: Cell
    p_holm: Cell
    effect_size: Cell
    costs: list[Cell]


def verdict_rows(results: Results) -> list[VerdictRow]:
    """Return the verdict table of the headline metric, in the order of the results."""
    places = decimals(_overalls(results, results.headline))
    return [_verdict_row(results, design, places) for design in results.designs]


def _overalls(results: Results, metric: str) -> list[Comparison]:
    return [d.metrics[metric].overall for d in results.designs if metric in d.metrics]


def _verdict_row(results: Results, design: DesignResult, places: int) -> VerdictRow:
    comparison = results.overall(design.name, results.headline)
    is_reference = design.name == results.reference
    verdict = None if is_reference or comparison is None else comparison.verdict
    nothing = Cell(MISSING, None, "not computed")

    def cell(value: float | None, text: str) -> Cell:
        return nothing if value is None else Cell(text, value)

    compared = None if is_reference else comparison
    return VerdictRow(
        design.name,
        _details(design),
        is_reference,
        design.name == results.winner.design,
        verdict,
        None if verdict is None else VERDICT_ORDER[verdict],
        cell(comparison.mean, number(comparison.mean, places)) if comparison else nothing,
        cell(compared.difference, signed(compared.difference, places)) if compared else nothing,
        Cell(
            span(compared, places),
            compared.interval[0] if compared.interval else None,
            f"{compared.n_units or 0:,} units, {compared.n_seeds or 0} seeds, "
            f"{compared.n_tasks or 0} tasks",
        )
        if compared
        else nothing,
        Cell(
            probability(compared.p_holm),
            compared.p_holm,
            f"before correction: {probability(compared.p_value)}",
        )
        if compared
        else nothing,
        cell(compared.effect_size, signed(compared.effect_size, 2)) if compared else nothing,
        [_cost_cell(design, cost) for cost in cost_names(results)],
    )


def _details(design: DesignResult) -> str:
    """Return method and parameters on one line."""
    settings = [f"{key}={_plain(value)}" for key, value in design.params.items()]
    return " · ".join([design.method, *settings])


def _plain(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cost_cell(design: DesignResult, cost: str) -> Cell:
    found = design.cost.get(cost)
    if found is None or found.mean is None:
        return Cell(MISSING, None, "not reported")
    show = cost_wording(cost).show
    varies = found.min is not None and found.max is not None and found.min != found.max
    title = f"{show(found.min or 0)} to {show(found.max or 0)} over seeds" if varies else ""
    return Cell(show(found.mean), found.mean, title)


@dataclass(frozen=True)
class HeatCell:
    """A difference on one task (or over all of a metric's tasks)."""

    text: str
    mean: str
    title: str
    verdict: str | None
    strength: float
    is_reference: bool


@dataclass(frozen=True)
class HeatGroup:
    """The columns of one metric: over all its tasks, then task by task."""

    label: str
    lower_is_better: bool
    columns: list[str]
    rows: dict[str, list[HeatCell]]


def heat_groups(results: Results) -> dict[str, HeatGroup]:
    """Return by metric the columns of the table of differences.

    A combined metric has no columns for its tasks, which stand under their own metrics; a metric
    with one task has no column for all of them, which would say the same.
    """
    return {name: _heat_group(results, name) for name in results.metrics}


def _heat_group(results: Results, metric: str) -> HeatGroup:
    facts = results.metrics[metric]
    tasks = [] if facts.combines else facts.tasks
    with_overall = len(tasks) != 1
    rows: dict[str, list[Comparison | None]] = {}
    for design in results.designs:
        found = design.metrics.get(metric)
        by_task = [found.tasks.get(task) if found else None for task in tasks]
        overall = [found.overall if found else None] if with_overall else []
        rows[design.name] = overall + by_task
    present = [comparison for row in rows.values() for comparison in row if comparison is not None]
    places = decimals(present)
    largest = max((abs(c.difference) for c in present if c.difference is not None), default=0.0)
    return HeatGroup(
        facts.label,
        not facts.higher_is_better,
        (["all tasks"] if with_overall else []) + tasks,
        {
            name: [_heat_cell(c, places, largest, name == results.reference) for c in row]
            for name, row in rows.items()
        },
    )


def _heat_cell(
    comparison: Comparison | None, places: int, largest: float, is_reference: bool
) -> HeatCell:
    if comparison is None:
        return HeatCell(MISSING, MISSING, "not computed", None, 0.0, is_reference)
    mean = number(comparison.mean, places)
    if is_reference:
        return HeatCell(mean, mean, "mean of the reference", None, 0.0, True)
    difference = comparison.difference
    title = (
        f"mean {mean}, interval {span(comparison, places)}, "
        f"p (Holm) {probability(comparison.p_holm)}, {comparison.n_units or 0:,} units"
    )
    return HeatCell(
        signed(difference, places),
        mean,
        title,
        comparison.verdict,
        # A square root keeps small but certain differences visible beside large ones.
        0.0 if not difference or not largest else (abs(difference) / largest) ** 0.5,
        False,
    )


def design_notes(results: Results) -> list[tuple[list[str], str]]:
    """Return each note once with the designs it is about; an empty list of names means all."""
    names_by_note: dict[str, list[str]] = {}
    for design in results.designs:
        for note in design.notes:
            names_by_note.setdefault(note, []).append(design.name)
    return [
        ([] if len(names) == len(results.designs) > 1 else names, note)
        for note, names in names_by_note.items()
    ]


@dataclass(frozen=True)
class FailureGroup:
    """Failed trials of a design that raised the same error, with one of their tracebacks."""

    design: str
    seeds: str
    error: str
    traceback: str


def failure_groups(failures: list[Failure]) -> list[FailureGroup]:
    """Return failures grouped by design and error, the most frequent first."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.design, failure.error), []).append(failure)
    ordered = sorted(groups.values(), key=len, reverse=True)[:N_FAILURES_SHOWN]
    return [
        FailureGroup(
            group[0].design,
            ", ".join(str(failure.seed) for failure in group),
            group[0].error,
            _tail(group[0].traceback),
        )
        for group in ordered
    ]


def _tail(traceback: str) -> str:
    if len(traceback) <= N_TRACEBACK_CHARACTERS:
        return traceback
    return "…\n" + traceback[-N_TRACEBACK_CHARACTERS:]


def facts(value: JsonValue) -> str:
    """Return a scalar or a list of scalars as readable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(facts(item) for item in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
