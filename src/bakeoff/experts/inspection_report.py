"""What `inspect_experts` found, for readers: rows of a table, remarks, and one HTML page.

The page is a single file that opens offline, without script. Its pictures are tables whose cells
are coloured, so that whoever cannot see them reads the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bakeoff import _page
from bakeoff._files import write_text
from bakeoff.experts.inspection import ExpertReport, LayerReport

# Numbers are written into the cells of a heat map up to so many columns.
_MOST_NUMBERED = 16
_FAVOURITES = 3
# Opacity of a cell of full colour, with and without a number on it that must stay readable.
_TINT, _COLOUR = 0.5, 0.9
# A load of so many times the even share has the full colour.
_FULL_LOAD = 4.0
_SPACE = "\N{NO-BREAK SPACE}"
_ATTENTION = ("self_attn", "attention", "attn")


@dataclass(frozen=True)
class LayerRow:
    """A mixture layer, in a line of a table.

    Parameters
    ----------
    label
        Its number in the model, and its part where a layer has two mixtures.
    n_experts
        N.
    max_over_mean
        Heaviest load over mean load, from 1 to N.
    idle
        Experts that no token chose.
    entropy
        Of a token's probabilities over experts, over log N, mean over tokens.
    specialisation
        Of the domains, from 0 (alike) to 1 (disjoint); None with fewer than two domains.
    drop_rate
        Share of assignments that capacity dropped.
    redundancy_to_next
        What this layer's choice tells about the next layer's, from 0 to 1; None for the last.
    similarity
        Mean cosine of two experts' weights; None where that is not known.
    soft
        Every token visits every expert; counted is the heaviest.
    favourites
        For each domain its experts of most assignments, at most three, as (expert, share).
    """

    label: str
    n_experts: int
    max_over_mean: float
    idle: int
    entropy: float
    specialisation: float | None
    drop_rate: float
    redundancy_to_next: float | None
    similarity: float | None
    soft: bool
    favourites: tuple[tuple[tuple[int, float], ...], ...]


def layer_rows(report: ExpertReport) -> list[LayerRow]:
    """Return a row for each layer, in the order of the model.

    Examples
    --------
    >>> import numpy as np
    >>> layer = LayerReport("model.layers.1.mlp", np.array([[9, 0], [1, 8]]), 0.5, 0.0, math.nan)
    >>> one = ExpertReport((layer,), ("code", "prose"), np.array([10, 8]), np.ones((1, 1)))
    >>> row = layer_rows(one)[0]
    >>> row.label, row.favourites[1]
    ('layer 1', ((1, 1.0),))
    """
    labels = _labels([layer.name for layer in report.layers])
    rows = []
    for i, (label, layer) in enumerate(zip(labels, report.layers, strict=True)):
        last = i + 1 == len(report.layers)
        rows.append(
            LayerRow(
                label,
                layer.n_experts,
                layer.max_over_mean,
                int((layer.counts.sum(axis=1) == 0).sum()),
                layer.entropy,
                _known(layer.specialisation),
                layer.drop_rate,
                None if last else float(report.redundancy[i, i + 1]),
                _known(layer.similarity),
                layer.soft,
                tuple(_favourites(column) for column in layer.by_domain.T),
            )
        )
    return rows


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _favourites(shares: Any) -> tuple[tuple[int, float], ...]:
    order = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
    return tuple((e, float(shares[e])) for e in order[:_FAVOURITES] if shares[e] > 0)


def _labels(names: Sequence[str]) -> list[str]:
    """Return short names of modules: the layer's number, and its part where that is not enough."""
    parts = [name.split(".") for name in names]
    numbers = [next((part for part in path if part.isdigit()), "") for path in parts]
    labels = []
    for name, path, number in zip(names, parts, numbers, strict=True):
        if not number:
            labels.append("all layers" if len(names) == 1 else name or "model")
            continue
        attention = any(part in _ATTENTION for part in path)
        twice = numbers.count(number) > 1
        labels.append(
            f"layer {number}" + (", attention" if attention else ", feed-forward") * twice
        )
    # Whatever is still not told apart has its full name.
    return [
        name if labels.count(label) > 1 else label
        for name, label in zip(names, labels, strict=True)
    ]


def remarks(report: ExpertReport) -> list[str]:
    """Return what a reader should not overlook, a sentence each."""
    rows = layer_rows(report)
    found = []
    idle = [row for row in rows if row.idle]
    if idle:
        worst = max(idle, key=lambda row: row.idle / row.n_experts)
        found.append(
            f"{sum(row.idle for row in idle)} of {sum(row.n_experts for row in rows)} experts were "
            f"chosen by no token, most of them in {worst.label}: {worst.idle} of "
            f"{worst.n_experts}."
        )
    dropped = [row for row in rows if row.drop_rate > 0]
    if dropped:
        worst = max(dropped, key=lambda row: row.drop_rate)
        found.append(
            f"Capacity dropped assignments in {_count(len(dropped), 'layer')}, up to "
            f"{percent(worst.drop_rate)} in {worst.label}."
        )
    alike = [row for row in rows if row.similarity is not None and row.similarity > 0.995]
    if alike:
        found.append(
            f"In {_count(len(alike), 'layer')} the experts' weights are all but equal (cosine over "
            "0.995): what the router chooses makes no difference there until the mixture is "
            "trained."
        )
    soft = [row for row in rows if row.soft]
    if soft:
        found.append(
            f"In {_count(len(soft), 'layer')} every token visits every expert ({soft[0].label}"
            f"{' and others' if len(soft) > 1 else ''}): counted is each token's heaviest one."
        )
    if len(report.domains) < 2:
        found.append("There is one domain, so specialisation is not known.")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def percent(share: float) -> str:
    """Return a share in percent: two digits below 10, else whole.

    Examples
    --------
    >>> [percent(x).replace(chr(160), " ") for x in (0, 0.004, 0.052, 0.31)]
    ['0 %', '0.4 %', '5.2 %', '31 %']
    """
    value = 100 * share
    places = 0 if value >= 9.95 or value == 0 else 1
    return f"{value:.{places}f}{_SPACE}%"


def hundredths(value: float) -> str:
    """Return a number with two places, without the sign of zero.

    Examples
    --------
    >>> hundredths(-0.001), hundredths(1.5)
    ('0.00', '1.50')
    """
    return f"{round(value, 2) + 0.0:.2f}"


# The page -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InspectionPage:
    """Everything that the page says.

    Parameters
    ----------
    report
        From `inspect_experts`.
    model
        What was inspected.
    data
        What it read, in a few words.
    facts
        How it was measured: names and values.
    notes
        Sentences that the reader should know, besides `remarks`.
    command
        The command that repeats it.
    started
        When, as the reader should see it.
    version
        bakeoff's.
    """

    report: ExpertReport
    model: str
    data: str
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""
    started: str = ""
    version: str = ""


def write_inspection(page: InspectionPage, path: str | Path) -> None:
    """Write the page as one self-contained HTML file, atomically."""
    write_text(Path(path), render_inspection(page))


def render_inspection(page: InspectionPage) -> str:
    """Return the page as an HTML document; every text in it is escaped."""
    from markupsafe import Markup

    report = page.report
    rows = layer_rows(report)
    text: str = _template().render(
        page=page,
        report=report,
        rows=rows,
        meters=[_meters(row, max(2.0, *(row.max_over_mean for row in rows))) for row in rows],
        sizes=_sizes(rows),
        worst=max(rows, key=lambda row: row.max_over_mean),
        mean_heaviest=sum(row.max_over_mean for row in rows) / len(rows),
        mean_specialisation=_mean([row.specialisation for row in rows]),
        groups=_load_groups(rows, report.layers, report.domains),
        redundancy=_redundancy(rows, report) if len(rows) > 1 else None,
        remarks=[*remarks(report), *page.notes],
        style=Markup(_page.style() + _resource("inspection.css")),
    )
    return _page.printable(text)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sizes(rows: Sequence[LayerRow]) -> str:
    """Return how many experts the layers have, in words."""
    counts = sorted({row.n_experts for row in rows})
    if len(counts) == 1:
        return f"{counts[0]} experts"
    return f"{counts[0]} to {counts[-1]} experts"


@dataclass(frozen=True)
class _Meter:
    """A number and the bar behind it, whose width is in percent of the cell."""

    text: str
    width: float | None


def _meters(row: LayerRow, heaviest: float) -> list[_Meter]:
    """Return the cells of a row of the table of layers."""

    def share(value: float | None) -> _Meter:
        if value is None:
            return _Meter("–", None)
        return _Meter(hundredths(value), 100 * min(max(value, 0.0), 1.0))

    load = 100 * (row.max_over_mean - 1) / (heaviest - 1)
    return [
        _Meter(hundredths(row.max_over_mean), load),
        _Meter(str(row.idle), 100 * row.idle / row.n_experts),
        share(row.entropy),
        share(row.specialisation),
        _Meter(percent(row.drop_rate), 100 * row.drop_rate),
        share(row.redundancy_to_next),
        share(row.similarity),
    ]


@dataclass(frozen=True)
class _Cell:
    text: str
    title: str
    opacity: str


@dataclass(frozen=True)
class _Map:
    """A heat map: heads are (text, columns), blocks are (label, lines), lines (name, cells)."""

    heads: list[tuple[str, int]]
    blocks: list[tuple[str, list[tuple[str, list[_Cell]]]]]
    numbered: bool
    n_columns: int
    full: float = 1.0


def _heads(n: int) -> list[tuple[str, int]]:
    """Return column numbers: all of them, or every 8th, 16th ... so that they have room."""
    step = 1 if n <= _MOST_NUMBERED else 2 ** math.ceil(math.log2(n / 12))
    return [(str(start), min(step, n - start)) for start in range(0, n, step)]


def _load_groups(
    rows: Sequence[LayerRow], layers: Sequence[LayerReport], domains: Sequence[str]
) -> list[_Map]:
    """Return a heat map for each stretch of layers with as many experts."""
    maps = []
    pairs = zip(rows, layers, strict=True)
    for n, stretch in itertools.groupby(pairs, key=lambda pair: pair[0].n_experts):
        full = min(_FULL_LOAD, float(n))
        numbered = n <= _MOST_NUMBERED
        blocks = []
        for row, layer in stretch:
            named = list(zip(domains, layer.by_domain.T, strict=True))
            if len(domains) > 1:
                named.append(("all", layer.load))
            lines = [
                (name, [_load_cell(name, e, float(s), n, full) for e, s in enumerate(shares)])
                for name, shares in named
            ]
            blocks.append((row.label, lines))
        maps.append(_Map(_heads(n), blocks, numbered, n, full))
    return maps


def _load_cell(domain: str, expert: int, share: float, n_experts: int, full: float) -> _Cell:
    depth = _TINT if n_experts <= _MOST_NUMBERED else _COLOUR
    opacity = depth * min(share * n_experts / full, 1.0)
    title = f"expert {expert}, {domain}: {percent(share)}, {share * n_experts:.2f} even shares"
    return _Cell(f"{100 * share:.0f}", title, f"{opacity:.2f}")


def _redundancy(rows: Sequence[LayerRow], report: ExpertReport) -> _Map:
    n = len(rows)
    depth = _TINT if n <= _MOST_NUMBERED else _COLOUR
    short = [row.label.removeprefix("layer ") for row in rows]
    plain = all(label.isdigit() for label in short)
    lines = []
    for i, row in enumerate(rows):
        cells = [
            _Cell(
                f"{value:.2f}".replace("0.", "."),
                f"{row.label} and {rows[j].label}: {value:.2f}",
                f"{depth * min(max(float(value), 0.0), 1.0):.2f}",
            )
            for j, value in enumerate(report.redundancy[i])
        ]
        lines.append((row.label, cells))
    heads = [
        (short[int(start)] if plain else f"{int(start) + 1}.", width) for start, width in _heads(n)
    ]
    return _Map(heads, [("", lines)], n <= _MOST_NUMBERED, n)


@cache
def _template() -> Any:
    templates = _page.environment(_resource)
    templates.filters["percent"] = percent
    templates.filters["thousands"] = "{:,}".format
    return templates.get_template("inspection.html.j2")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
