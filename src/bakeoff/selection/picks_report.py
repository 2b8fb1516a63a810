"""A selection as one HTML page: the picks on a map of the pool, and why each was picked.

The page is a single file that opens offline, without script: the map is SVG in percentages, colours
follow the reader's light or dark theme, and a pick's number on the map and in the table lead to
each other. `picks_map` computes where rows lie; the template only places them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from bakeoff._files import write_text
from bakeoff.data.neighbours import unit_rows
from bakeoff.errors import DataError
from bakeoff.selection.selector import checked_vectors

Kind = Literal["pick", "labelled", "query", "other"]

MOST_ON_MAP = 1500
"""Points that the map shows; t-SNE of so many takes seconds."""

MOST_PICKS = 1000
"""Picks that the page shows, the first ones; the output file has them all."""

# Below this a t-SNE has no neighbourhoods to keep.
_LEAST_FOR_TSNE = 50
# Numbers are written into the marks up to so many picks; beyond, marks would hide each other.
_MOST_NUMBERED = 150
_NUMBERED_OF_MANY = 25
_NEIGHBOURS = 10
_SNIPPET = 320
_HOVER = 90
# In percent of the drawing's height: a numbered mark, and how far one is moved at most.
_MARK_HEIGHT = 2.7
_FARTHEST = 4.0
# Width over height of the drawing, as in the style sheet: one unit is as long in both directions.
_ASPECT = 1.4


@dataclass(frozen=True, eq=False)
class PicksMap:
    """Rows in the plane.

    Parameters
    ----------
    positions
        float64 array ``(n, 2)``: x to the right and y downwards, in percent of a drawing that is
        1.4 times as wide as it is high; all are within 3 and 97.
    method
        ``"t-SNE"`` or ``"PCA"``.
    neighbours_kept
        Share of each row's 10 nearest rows by cosine (fewer if there are no 11) that are also among
        its 10 nearest in the plane, averaged over rows; NaN for fewer than three rows.
    """

    positions: NDArray[np.float64]
    method: Literal["t-SNE", "PCA"]
    neighbours_kept: float


def picks_map(vectors: ArrayLike, *, random_state: int = 0) -> PicksMap:
    """Lay out vectors in the plane so that rows of large cosine are near each other.

    Vectors are scaled to length 1 and reduced to 50 dimensions by PCA; t-SNE, which starts at the
    first two of them, does the rest. Fewer than 50 rows are laid out by PCA alone.

    Parameters
    ----------
    vectors
        Array ``(n, d)``; keep n at some thousands.
    random_state
        Seed of t-SNE.

    Raises
    ------
    DataError
        If the vectors are not a matrix of finite numbers.

    Examples
    --------
    >>> picks_map([[1, 0], [0, 1], [0.9, 0.1]]).method
    'PCA'
    """
    unit = unit_rows(checked_vectors(vectors, name="vectors", cosine=False))
    method: Literal["t-SNE", "PCA"] = "PCA"
    plane = np.zeros((len(unit), 2))
    # Copies of one row lie on one spot: nothing but rounding would be left to lay out.
    n_distinct = len(np.unique(unit, axis=0))
    if n_distinct > 1:
        reduced = PCA(min(50, *unit.shape), svd_solver="full").fit_transform(unit)
        plane[:, : min(2, reduced.shape[1])] = reduced[:, :2]
    if n_distinct >= _LEAST_FOR_TSNE:
        method = "t-SNE"
        perplexity = min(30.0, (len(unit) - 1) / 3)
        layout = TSNE(2, init="pca", perplexity=perplexity, random_state=random_state)
        plane = layout.fit_transform(reduced).astype(np.float64)
    return PicksMap(_fitted(plane), method, _neighbours_kept(unit, plane))


def _fitted(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn the longer side across, and scale both directions alike until all fits the drawing."""
    centred = plane - plane.mean(axis=0)
    turned = PCA(2).fit_transform(centred) if centred.any() else centred
    low, high = turned.min(axis=0), turned.max(axis=0)
    middle, extent = (low + high) / 2, high - low
    # In units of the drawing's height: 94 percent of either side may be used.
    room = 0.94 * np.array([_ASPECT, 1.0])
    scale = np.min(room / np.maximum(extent, 1e-9)) if extent.max() > 1e-9 else 0.0
    inside = (turned - middle) * scale / np.array([_ASPECT, 1.0])
    return np.asarray(50 + 100 * inside * np.array([1.0, -1.0]), dtype=np.float64)


def _neighbours_kept(unit: NDArray[np.float32], plane: NDArray[np.float64]) -> float:
    n = len(unit)
    if n < 3:
        return float("nan")
    k = min(_NEIGHBOURS, n - 2)
    near = [
        NearestNeighbors(n_neighbors=k).fit(space).kneighbors(return_distance=False)
        for space in (unit, plane)
    ]
    shared = [len(set(a) & set(b)) for a, b in zip(*near, strict=True)]
    return float(np.mean(shared)) / k


@dataclass(frozen=True)
class MapPoint:
    """A row that the map shows.

    Parameters
    ----------
    kind
        ``"pick"``, ``"labelled"`` (before), ``"query"``, or ``"other"`` for a row left alone.
    text
        What it says; only its beginning is shown.
    number
        A pick's place in the order, from 1; for others it has no meaning.
    """

    kind: Kind
    text: str
    number: int = 0


@dataclass(frozen=True)
class PickRow:
    """A line of the table of picks.

    Parameters
    ----------
    number
        Place in the order, from 1.
    row
        Row of the data, from 0.
    text
        What it says; only its beginning is shown.
    reason
        One short sentence.
    """

    number: int
    row: int
    text: str
    reason: str


@dataclass(frozen=True, eq=False)
class PicksReport:
    """Everything that the page says.

    Parameters
    ----------
    method
        The selector's name, e.g. ``"vote-k"``.
    data
        What was selected from, in a few words, e.g. file names.
    n_candidates
        Rows that could be picked.
    n_labelled
        Rows that were labelled before.
    n_picks
        Rows that were picked; `picks` may hold only the first ones.
    picks
        The table.
    points, positions
        The map: n points and a float array ``(n, 2)`` of theirs, as `PicksMap` has them.
    map_method, neighbours_kept
        As in `PicksMap`.
    map_vectors
        What the map's vectors are, e.g. ``"all-minilm-l6-v2, 384 dimensions"``.
    sees_map_vectors
        Whether the method chose by the same vectors, or by something that the map does not show.
    n_others
        Rows that were neither picked nor labelled, of which the map may show a sample.
    paper, title
        The method's source and what it is, if it is a published one.
    facts
        How the picks came about: names and values.
    notes
        Sentences that the reader should know.
    command
        The command that repeats it.
    started
        When, as the reader should see it.
    usage
        Lines of code that load the picks.
    version
        bakeoff's.
    """

    method: str
    data: str
    n_candidates: int
    n_labelled: int
    n_picks: int
    picks: Sequence[PickRow]
    points: Sequence[MapPoint]
    positions: NDArray[np.float64]
    map_method: str
    neighbours_kept: float
    map_vectors: str
    sees_map_vectors: bool
    n_others: int
    paper: str = ""
    title: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""
    started: str = ""
    usage: Sequence[str] = ()
    version: str = ""

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions, dtype=np.float64)
        if positions.shape != (len(self.points), 2):
            raise DataError(
                f"positions must have shape ({len(self.points)}, 2), one row for each point, got "
                f"{positions.shape}"
            )
        object.__setattr__(self, "positions", positions)


def write_picks_report(report: PicksReport, path: Path) -> None:
    """Write the page as one self-contained HTML file, atomically."""
    write_text(Path(path), render_picks_report(report))


def render_picks_report(report: PicksReport) -> str:
    """Return the page as an HTML document; every text in it is escaped."""
    from markupsafe import Markup

    drawn = _drawn(report)
    on_map = {dot.number for dot in drawn.picks}
    page: str = _template().render(
        report=report,
        picks=[
            (pick, beginning(pick.text, _SNIPPET), pick.number in on_map) for pick in report.picks
        ],
        drawn=drawn,
        style=Markup(_resource("picks.css")),
    )
    # Texts come from users' files: half of a surrogate pair must not stop the page.
    return page.encode("utf-8", "replace").decode("utf-8")


def beginning(text: str, length: int) -> str:
    r"""Return the first words of a text on one line, without characters that show nothing.

    Examples
    --------
    >>> beginning("one\n two\x00 three", 8)
    'one two…'
    """
    # A little more than is kept: a text may be a book.
    start = text[: 8 * length]
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in start)
    words = " ".join(shown.split())
    if len(words) <= length and len(text) <= 8 * length:
        return words
    cut = words[:length]
    spaced = cut.rfind(" ")
    # Languages without spaces are cut anywhere.
    return (cut[:spaced] if spaced > length // 2 else cut).rstrip() + "…"


@dataclass(frozen=True)
class _Dot:
    number: int
    x: str
    y: str
    hover: str
    large: bool = False


@dataclass(frozen=True)
class _Drawn:
    others: list[_Dot]
    labelled: list[_Dot]
    queries: list[_Dot]
    picks: list[_Dot]  # the last first, so that the first lies on top

    @property
    def n_points(self) -> int:
        return len(self.others) + len(self.labelled) + len(self.queries) + len(self.picks)


def _drawn(report: PicksReport) -> _Drawn:
    reasons = {pick.number: pick.reason for pick in report.picks}
    n_picks = sum(point.kind == "pick" for point in report.points)
    n_numbered = n_picks if n_picks <= _MOST_NUMBERED else _NUMBERED_OF_MANY
    places = report.positions.copy()
    numbered = [
        i for i, p in enumerate(report.points) if p.kind == "pick" and p.number <= n_numbered
    ]
    queries = [i for i, p in enumerate(report.points) if p.kind == "query"]
    places[numbered] = _apart(places[numbered], places[queries])
    groups: dict[Kind, list[_Dot]] = {"other": [], "labelled": [], "query": [], "pick": []}
    for point, (x, y) in zip(report.points, places, strict=True):
        text = beginning(point.text, _HOVER)
        if point.kind == "pick":
            because = reasons.get(point.number, "")
            text = f"{point.number}. {because}: {text}" if because else f"{point.number}. {text}"
        elif point.kind == "query":
            text = f"Query {point.number}: {text}"
        elif point.kind == "labelled":
            text = f"Labelled before: {text}"
        dot = _Dot(point.number, f"{x:.2f}%", f"{y:.2f}%", text, point.number <= n_numbered)
        groups[point.kind].append(dot)
    groups["pick"].sort(key=lambda dot: -dot.number)
    return _Drawn(groups["other"], groups["labelled"], groups["query"], groups["pick"])


def _apart(marks: NDArray[np.float64], fixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move marks that would cover each other's numbers apart, by about a mark's width at most.

    Places are in percent; `fixed` ones are moved away from. A mark is 18 pixels wide where the
    drawing has its full width.
    """
    scale = np.array([_ASPECT, 1.0])
    places = np.concatenate([marks, fixed])
    moved = places * scale
    order = np.arange(len(places))
    for _ in range(30):
        step = moved[:, None] - moved[None]
        distance = np.linalg.norm(step, axis=2)
        near = (distance < _MARK_HEIGHT) & (order[:, None] != order)
        if not near.any():
            break
        # Marks on one spot go apart along a direction of their own.
        angle = 2.4 * np.minimum(order[:, None], order)
        turn = np.where(order[:, None] < order, 1.0, -1.0)
        spread = np.stack([turn * np.cos(angle), turn * np.sin(angle)], axis=2)
        unit = np.where(
            distance[..., None] > 1e-9, step / np.maximum(distance, 1e-9)[..., None], spread
        )
        push = np.where(near, (_MARK_HEIGHT - distance) / 2, 0.0)[..., None] * unit
        moved += 0.7 * push.sum(axis=1)
        away = moved - places * scale
        length = np.linalg.norm(away, axis=1, keepdims=True)
        moved = places * scale + away * np.minimum(1.0, _FARTHEST / np.maximum(length, 1e-9))
        moved[len(marks) :] = fixed * scale
    return np.asarray(np.clip(moved[: len(marks)] / scale, 1.5, 98.5), dtype=np.float64)


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
    return environment.get_template("picks.html.j2")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
