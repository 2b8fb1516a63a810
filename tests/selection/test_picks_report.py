from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from bakeoff.errors import DataError
from bakeoff.selection.picks_report import (
    MapPoint,
    PickRow,
    PicksReport,
    beginning,
    picks_map,
    render_picks_report,
    write_picks_report,
)

HOSTILE = '<script>alert("x")</script> & <b>bold</b> \x00\u2028 \ud800 end'


def groups_of_rows(sizes: list[int], seed: int = 0, width: int = 20) -> tuple[Any, Any]:
    """Return vectors in well separated groups, and the group of each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), width))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return centres[labels] + 0.1 * rng.normal(size=(len(labels), width)), labels


def report(n_picks: int = 3, n_others: int = 4, **changes: Any) -> PicksReport:
    points = [MapPoint("pick", f"text {i}", i + 1) for i in range(n_picks)]
    points += [MapPoint("other", f"other {i}") for i in range(n_others)]
    given: dict[str, Any] = {
        "method": "vote-k",
        "data": "pool.parquet",
        "n_candidates": 12345,
        "n_labelled": 0,
        "n_picks": n_picks,
        "picks": [PickRow(i + 1, 10 * i, f"text {i}", f"{9 - i} votes") for i in range(n_picks)],
        "points": points,
        "positions": np.linspace(5, 95, 2 * len(points)).reshape(-1, 2),
        "map_method": "PCA",
        "neighbours_kept": 0.5,
        "map_vectors": "tiny, 8 dimensions",
        "sees_map_vectors": True,
        "n_others": n_others,
    }
    return PicksReport(**{**given, **changes})


class Tags(HTMLParser):
    """Collects tags, ids, links and whether all that opens is closed."""

    VOID = ("meta", "link", "br", "circle", "path")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        values = dict(attributes)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# The map ------------------------------------------------------------------------------------------


def test_groups_stay_apart_on_the_map():
    vectors, labels = groups_of_rows([40, 40, 40])
    found = picks_map(vectors)
    assert found.method == "t-SNE"
    scaled = found.positions * [1.4, 1.0]
    distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_positions_fill_the_drawing_and_keep_its_proportions():
    vectors, _ = groups_of_rows([30, 30])
    positions = picks_map(vectors).positions
    assert positions.min() >= 3 - 1e-9
    assert positions.max() <= 97 + 1e-9
    assert np.isclose(np.ptp(positions, axis=0).max(), 94)

    # Few rows are laid out by PCA: distances on the page are those of the plane, up to one factor.
    plane = np.array([[1, 0, 0], [1, 0.02, 0], [1, 0, 0.01], [1, 0.01, 0.01]])
    found = picks_map(plane)
    assert found.method == "PCA"
    shown = found.positions * [1.4, 1.0]

    def distances(places):
        return np.linalg.norm(places[:, None] - places[None], axis=2)[np.triu_indices(4, 1)]

    ratio = distances(shown) / distances(plane / np.linalg.norm(plane, axis=1, keepdims=True))
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.01)


def test_neighbours_kept_is_one_where_nothing_is_lost_and_chance_where_all_is():
    # Rows on a quarter of a circle are a curve in the plane already.
    angles = np.linspace(0, 1.5, 40)
    assert picks_map(np.stack([np.cos(angles), np.sin(angles)], axis=1)).neighbours_kept > 0.95
    noise = np.random.default_rng(0).normal(size=(45, 400))
    assert picks_map(noise).neighbours_kept < 0.6


@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_copies_and_few_rows_are_laid_out(n):
    found = picks_map(np.ones((n, 5)))
    assert found.positions.shape == (n, 2)
    np.testing.assert_allclose(found.positions, 50, atol=1e-6)


def test_the_map_is_the_same_for_the_same_rows_and_ignores_lengths():
    vectors, _ = groups_of_rows([30, 30])
    lengths = np.random.default_rng(1).uniform(1, 9, size=(60, 1))
    first = picks_map(vectors).positions
    np.testing.assert_array_equal(first, picks_map(vectors.copy()).positions)
    # Scaling to length 1 rounds differently, which t-SNE enlarges: groups stay where they are.
    again = picks_map(np.exp2(np.round(lengths)) * vectors).positions
    np.testing.assert_allclose(first, again, atol=1e-6)


def test_bad_vectors_are_refused():
    with pytest.raises(DataError, match="vectors has NaN or inf in row 1"):
        picks_map([[1.0, 0.0], [np.nan, 1.0]])


# The page -----------------------------------------------------------------------------------------


def test_page_says_what_was_picked_and_why():
    page = render_picks_report(
        report(
            n_labelled=7,
            title="Votes",
            paper="Su et al., 2023",
            facts={"seed": "3"},
            notes=["2 rows were left out."],
            command="bakeoff select --method vote-k",
        )
    )
    text = re.sub(r"[ \n]+", " ", re.sub(r"<[^>]+>", "", page[page.index("<body") :]))
    for part in (
        "vote-k picked 3 of 12,345 rows beside 7 already labelled.",
        "Votes. Su et al., 2023.",
        "2 rows were left out.",
        "bakeoff select --method vote-k",
        "50\N{NO-BREAK SPACE}% are also among its nearest on the map",
        "vote-k chose by the vectors themselves and never saw the map.",
        "1. 9 votes: text 0",
    ):
        assert part in text, part


def test_page_is_well_formed_and_its_links_lead_somewhere():
    tags = Tags(render_picks_report(report(n_picks=5)))
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert tags.links
    assert {link.removeprefix("#") for link in tags.links} <= set(tags.ids)


def test_page_needs_nothing_from_outside_and_runs_nothing():
    page = render_picks_report(report())
    assert "script" not in Tags(page).found
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|url\(|@import|src=", page)
    assert "prefers-color-scheme: dark" in page


def test_texts_are_escaped_wherever_they_stand():
    page = render_picks_report(
        report(
            2,
            1,
            method=HOSTILE,
            data=HOSTILE,
            picks=[PickRow(i + 1, i, HOSTILE, HOSTILE) for i in range(2)],
            points=[
                MapPoint("pick", HOSTILE, 1),
                MapPoint("query", HOSTILE),
                MapPoint("labelled", HOSTILE),
            ],
            map_vectors=HOSTILE,
            title=HOSTILE,
            paper=HOSTILE,
            facts={HOSTILE: HOSTILE},
            notes=[HOSTILE],
            command=HOSTILE,
            usage=[HOSTILE],
        )
    )
    assert "<script" not in page
    assert "<b>bold" not in page
    assert "alert(&#34;x&#34;)" in page
    page.encode("utf-8")
    assert Tags(page).open == []


def test_picks_are_in_order_in_the_table_and_the_first_lies_on_top_of_the_map():
    page = render_picks_report(report(n_picks=12))
    assert [int(n) for n in re.findall(r'<tr id="pick-(\d+)"', page)] == list(range(1, 13))
    assert [int(n) for n in re.findall(r'<a id="on-map-(\d+)"', page)] == list(range(12, 0, -1))


def test_many_picks_get_small_marks_but_for_the_first():
    page = render_picks_report(report(n_picks=200))
    assert page.count('<circle class="small"') == 175
    assert len(re.findall(r"<text [^>]*>\d+</text>", page)) == 25


def test_marks_on_one_spot_are_moved_apart_a_little():
    spot = np.full((9, 2), 40.0)
    spot[4:] = [[90, 90], [5, 5], [5, 90], [90, 5], [60, 20]]
    page = render_picks_report(report(n_picks=4, n_others=5, positions=spot))
    marks = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%" r="9"', page)
    places = np.array(marks, dtype=float) * [1.4, 1.0]
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)[np.triu_indices(4, 1)]
    assert distances.min() > 2.2  # percent of the height; a mark is 2.5
    assert np.linalg.norm(places - [56, 40], axis=1).max() < 4.1
    others = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%" r="2.4"', page)
    np.testing.assert_allclose(np.array(others, dtype=float), spot[4:])


def test_without_a_map_the_table_stays():
    page = render_picks_report(report(points=[], positions=np.empty((0, 2))))
    assert "<svg" not in page
    assert page.count('<tr id="pick-') == 3
    assert Tags(page).links == []


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"positions must have shape \(7, 2\)"):
        report(positions=np.zeros((6, 2)))


def test_write(tmp_path):
    write_picks_report(report(), tmp_path / "chosen.html")
    assert (tmp_path / "chosen.html").read_text("utf-8") == render_picks_report(report())


@pytest.mark.parametrize(
    ("text", "length", "shown"),
    [
        ("short", 10, "short"),
        ("", 10, ""),
        ("one two three", 9, "one two…"),
        ("  a\t\n b\x00c ", 10, "a b c"),
        ("x" * 50, 10, "x" * 10 + "…"),
        ("文" * 50, 10, "文" * 10 + "…"),
        (" " * 1000 + "late", 10, "…"),
    ],
)
def test_beginning(text, length, shown):
    assert beginning(text, length) == shown
