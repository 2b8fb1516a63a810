"""The report and the schema of results.json, without a browser (about 2 s)."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import example_results as examples
import numpy as np
import pytest

from bakeoff.errors import StoreError
from bakeoff.study import wording
from bakeoff.study.report import charts, render_report, tables, write_report
from bakeoff.study.schema import Comparison, json_schema, parse_results, read_results

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "results.schema.json"
ALL = [
    examples.example,
    examples.with_failure,
    examples.partial,
    examples.one_design,
    examples.with_nulls,
    examples.nothing_finished,
    examples.sixty_designs,
    examples.hostile_names,
    examples.nothing_beats,
    examples.undecided,
    examples.lower_is_better,
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a report: checks that tags nest, keeps the verdict table, scripts and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts = 0
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self._in_table = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.scripts += tag == "script"
        self.addresses += [given[key] or "" for key in ("src", "href") if key in given]
        self.handlers += [key for key in given if key.startswith("on")]
        if tag == "table":
            self._in_table = given.get("id") == "verdict-table"
        if self._in_table and tag == "tr":
            self.rows.append([])
        if self._in_table and tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self._in_table = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_page_is_whole_self_contained_and_under_one_and_a_half_megabytes(make: Any) -> None:
    results = make()
    html = render_report(results)
    page = Page(html)
    assert page.open == []
    assert page.scripts == 1
    assert page.handlers == []
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "http" not in re.sub(r'<meta http-equiv="Content-Security-Policy"', "", html)
    assert re.findall(r'="-?(?:nan|inf|None)', html) == []
    assert len(html.encode()) < 1_500_000
    assert len(page.rows) == 1 + len(results["designs"])


def test_verdict_table_says_what_the_results_say() -> None:
    results = examples.example()
    heading, *rows = Page(render_report(results)).rows
    assert [text.strip() for text in heading[:7]] == [
        "Design",
        "Verdict",
        "Mean",
        "Difference",
        "95 % interval",
        "p (Holm)",
        "Effect size",
    ]
    assert [text.strip() for text in heading[7:]] == [
        "Time",
        "Peak memory",
        "Trained parameters",
        "FLOPs per text",
    ]
    for row, design in zip(rows, results["designs"], strict=True):
        record = design["metrics"]["mean_score"]["overall"]
        assert row[0].startswith(design["name"])
        assert row[2] == f"{record['mean']:.3f}"
        if design["name"] == results["reference"]:
            assert "reference" in row[1]
            assert row[3:7] == ["–"] * 4
            continue
        assert record["verdict"] in row[1]
        assert wording.VERDICTS[record["verdict"]].symbol in row[1]
        assert float(row[3].replace("−", "-")) == pytest.approx(record["difference"], abs=5e-4)
        low, high = (float(end.replace("−", "-")) for end in row[4].split(" to "))
        assert (low, high) == pytest.approx(tuple(record["interval"]), abs=5e-4)


def test_user_text_stays_text() -> None:
    html = render_report(examples.hostile_names())
    page = Page(html)
    text = "".join(page.text)
    for name in examples.HOSTILE:
        assert name in text
    assert "</pre><script>window.hacked = 3</script>" in text
    assert html.count("<script") == 1
    assert "{{ 7 * 7 }}" in text


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    results = examples.example(["mean", "broken \ud83e name"], [0.0, 0.02], reference="mean")
    write_report(results, tmp_path / "report.html")
    assert "broken ? name" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_results_give_the_same_page() -> None:
    assert render_report(examples.example()) == render_report(examples.example())


def test_ten_thousand_trials_of_sixty_designs_take_less_than_five_seconds(tmp_path: Path) -> None:
    results = examples.sixty_designs()
    results["failures"] *= 100  # 2,000 failed trials
    start = time.perf_counter()
    write_report(results, tmp_path / "report.html")
    assert time.perf_counter() - start < 5
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_failures_and_state_are_shown() -> None:
    text = "".join(Page(render_report(examples.partial())).text)
    assert "This study is not complete." in text
    assert "RuntimeError: the loss is not finite after 40 steps; lower learning_rate" in text
    assert "no result" in text
    assert "12 of 4,174 texts were longer" in text
    assert 'model = SentenceTransformer("winner/")' in text
    assert "bakeoff run embedding --seeds 3 --workers 2" in text
    assert "not complete" not in "".join(Page(render_report(examples.example())).text)


def test_equal_failures_are_grouped_and_long_tracebacks_cut_at_their_start() -> None:
    failure = {"design": "d", "error": "E", "traceback": "x" * 10_000 + "the end"}
    results = examples.example()
    results["failures"] = [{**failure, "seed": seed} for seed in range(3)]
    (group,) = tables.failure_groups(parse_results(results).failures)
    assert group.seeds == "0, 1, 2"
    assert group.traceback.endswith("the end")
    assert len(group.traceback) < 6_100


def test_a_note_of_many_designs_is_said_once() -> None:
    results = examples.example(["mean", "last", "first"], [0.0, 0.02, 0.01])
    for design in results["designs"]:
        design["notes"] = ["all"] if design["name"] == "mean" else ["all", "not the mean"]
    names = [design["name"] for design in results["designs"] if design["name"] != "mean"]
    notes = tables.design_notes(parse_results(results))
    assert notes == [([], "all"), (names, "not the mean")]


# The schema


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_examples_follow_the_schema_and_survive_a_round_trip(make: Any, tmp_path: Path) -> None:
    results = make()
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
    assert read_results(path).model_dump() == parse_results(results).model_dump() == results


def test_documented_json_schema_is_current() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema(), (
        "docs/results.schema.json is out of date; docs/results.md has the command that renews it"
    )


def _break(path: str, value: Any) -> dict[str, Any]:
    results = examples.example(["mean", "last"], [0.0, 0.02])
    *parents, last = path.split(".")
    target: Any = results
    for part in parents:
        target = target[int(part) if part.isdigit() else part]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return results


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("study.alpha", 1.5),
        ("study.trials.planned", -1),
        ("metrics", {}),
        ("designs.1.metrics.mean_score.overall.verdict", "great"),
        ("designs.1.metrics.mean_score.overall.interval", [0.1]),
        ("designs.1.metrics.mean_score.overall.mean", math.nan),
        ("designs.1.metrics.mean_score.overall.difference_quantiles", [0.0] * 20),
        ("designs.0.name", KeyError),
        ("winner.extra", 1),
    ],
)
def test_wrong_results_are_refused_with_the_place_named(path: str, value: Any) -> None:
    with pytest.raises(StoreError) as caught:
        parse_results(_break(path, value))
    assert path in str(caught.value)


def test_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="schema_version 2"):
        parse_results(examples.example() | {"schema_version": 2})
    with pytest.raises(StoreError, match="JSON object, got list"):
        parse_results([])  # type: ignore[arg-type]
    path = tmp_path / "results.json"
    with pytest.raises(StoreError, match="cannot be read"):
        read_results(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be read"):
        read_results(path)


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(StoreError):
        write_report({"schema_version": 1}, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# The answer


def test_answer_names_the_winner_its_effect_and_its_price() -> None:
    results = examples.example(["mean", "best"], [0.0, 0.05])
    best = next(design for design in results["designs"] if design["name"] == "best")
    best["metrics"]["mean_score"]["overall"] |= {"difference": 0.043, "interval": [0.03, 0.056]}
    best["cost"]["wall_seconds"]["mean"] = 48.0
    results["designs"][1]["cost"]["wall_seconds"]["mean"] = 40.0
    assert wording.answer(results) == (
        "`best` helps: +0.043 mean score against `mean` (95 % interval +0.030 to +0.056), "
        "taking 1.2 times as long."
    )


def test_answer_when_lower_is_better_says_so() -> None:
    answer = wording.answer(examples.lower_is_better())
    assert answer.startswith("`multi-layer, bidirectional` helps: −0.05")
    assert "lower is better" in answer


def test_answer_when_nothing_helps() -> None:
    assert wording.answer(examples.nothing_beats()) == (
        "Nothing beat `mean, causal`: of 11 other designs, 5 are equivalent and 6 are worse."
    )
    alone = examples.example(["mean", "last"], [0.0, -0.1])
    assert wording.answer(alone) == "Nothing beat `mean`: `last` is worse."


def test_answer_when_undecided_says_what_it_would_take() -> None:
    results = examples.undecided()
    answer = wording.answer(results)
    assert answer.startswith("Undecided: `")
    assert "to decide it would take about 12 seeds instead of 3 or 9,360 units" in answer
    for design in results["designs"]:
        design["metrics"]["mean_score"]["overall"] |= {"needed_seeds": None, "needed_units": None}
    assert "it would take" not in wording.answer(results)


def test_answer_of_unfinished_studies() -> None:
    assert wording.answer(examples.partial()).startswith("So far, with 21 of 36 trials: `multi-")
    assert "none of the 36 planned trials" in wording.answer(examples.nothing_finished())
    assert "only the reference `mean`" in wording.answer(examples.one_design())
    results = examples.example()
    reference = next(d for d in results["designs"] if d["name"] == results["reference"])
    reference["metrics"] = {}
    assert "the reference `mean, causal` has no finished trial" in wording.answer(results)


# Numbers


def _comparison(low: float, high: float) -> Comparison:
    record = examples.example()["designs"][0]["metrics"]["mean_score"]["overall"]
    return Comparison.model_validate(record | {"interval": [low, high]})


@pytest.mark.parametrize(
    ("half_width", "places"), [(0.012, 3), (0.0042, 4), (0.3, 2), (5.0, 1), (40, 0), (1e-9, 6)]
)
def test_two_digits_of_the_typical_interval_are_shown(half_width: float, places: int) -> None:
    assert wording.decimals([_comparison(-half_width, half_width)]) == places


def test_numbers_are_shown_in_full() -> None:
    assert wording.signed(0.0, 3) == "0.000"
    assert wording.signed(-0.0001, 3) == "0.000"
    assert wording.signed(-0.0301, 3) == "−0.030"
    assert wording.signed(1234.5, 1) == "+1,234.5"
    assert wording.signed(3e-9, 6) == "+3e−09"
    assert wording.number(None, 3) == "–"
    assert [wording.probability(p) for p in (1e-9, 0.0123, 0.5, 1.0, None)] == [
        "<0.001",
        "0.012",
        "0.50",
        "1.00",
        "–",
    ]
    assert [wording.byte_size(size) for size in (0, 999, 999_600, 1.23e9)] == [
        "0 B",
        "999 B",
        "1 MB",
        "1.23 GB",
    ]
    assert [wording.quantity(count) for count in (0, 7, 590_000, 134.5e6, 2.7e10)] == [
        "0",
        "7",
        "590k",
        "134M",
        "27G",
    ]
    shown = [wording.duration(s) for s in (0.0, 0.9999, 59.7, 3599.6, 86_400)]
    assert shown == ["0 ms", "1.0 s", "1 min 00 s", "1 h 00 min", "24 h 00 min"]


def test_unknown_costs_are_spelt_out() -> None:
    assert wording.cost_wording("queue_seconds").label == "Queue seconds"
    assert wording.cost_wording("queue_seconds").show(90) == "1 min 30 s"
    assert wording.cost_wording("disk_bytes").show(2e6) == "2 MB"
    assert wording.cost_wording("dollars").show(12.5) == "12.5"


# Geometry


def test_linear_scale_is_affine_and_holds_its_values() -> None:
    values = np.random.default_rng(0).normal(size=50)
    scale = charts.linear_scale(values)
    positions = [scale.position(value) for value in values]
    assert 0 <= min(positions) < max(positions) <= 100
    slope, offset = np.polyfit(values, positions, 1)
    assert positions == pytest.approx(slope * values + offset)
    assert slope > 0


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-1e-300, 1e-300], [1e12, 1e12 + 1]])
def test_scales_of_hardly_any_spread_are_still_scales(values: list[float]) -> None:
    scale = charts.linear_scale(values)
    assert scale.low < scale.high
    ticks = charts.tick_values(scale)
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert len(ticks) <= 12


def test_ticks_are_round_evenly_spaced_and_inside() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        low = rng.normal() * 10.0 ** rng.integers(-6, 6)
        scale = charts.Scale(low, low + rng.uniform(0.1, 10) * 10.0 ** rng.integers(-5, 5))
        ticks = charts.tick_values(scale)
        assert 2 <= len(ticks) <= 9
        assert scale.low - 1e-9 * abs(low) <= ticks[0]
        assert ticks[-1] <= scale.high + 1e-9 * abs(scale.high)
        steps = np.diff(ticks)
        assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-4)
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


def test_wide_costs_are_logarithmic_with_a_place_for_zero() -> None:
    scale = charts.cost_scale([0, 1e3, 1e5, 1e7])
    assert scale.logarithmic
    zero, *positions = [scale.position(value) for value in (0, 1e3, 1e5, 1e7)]
    assert zero < 100 * scale.zero_slot < positions[0]
    assert positions[1] - positions[0] == pytest.approx(positions[2] - positions[1])
    assert not charts.cost_scale([1.0, 19.0]).logarithmic
    assert charts.cost_scale([1.0, 30.0]).zero_slot == 0
    assert not charts.cost_scale([0.0, 0.0]).logarithmic


def test_frontier_is_the_undominated_points_by_brute_force() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        points = [(float(c), float(q)) for c, q in rng.integers(0, 6, (rng.integers(1, 9), 2))]
        dominated = {
            i
            for i, (cost, quality) in enumerate(points)
            for other_cost, other_quality in points
            if other_cost <= cost
            and other_quality >= quality
            and (other_cost, other_quality) != (cost, quality)
        }
        expected = {points[i] for i in range(len(points)) if i not in dominated}
        frontier = charts.pareto_frontier(points)
        assert {points[i] for i in frontier} == expected
        assert [points[i][0] for i in frontier] == sorted(points[i][0] for i in frontier)


def test_interval_rows_stand_where_their_numbers_are() -> None:
    results = parse_results(examples.example())
    plot = charts.interval_plot(results, "mean_score")
    rows = [row for row in plot.rows if not row.is_reference]
    values, places = [], []
    for row in rows:
        record = results.overall(row.name, "mean_score")
        assert record is not None
        assert record.interval is not None
        values += [record.interval[0], record.difference, record.interval[1]]
        places += [row.low, row.middle, row.high]
    slope, offset = np.polyfit(np.array(values, float), np.array(places, float), 1)
    assert places == pytest.approx(slope * np.array(values, float) + offset)
    assert plot.zero == pytest.approx(offset)
    assert plot.margin is not None
    assert plot.margin[1] - plot.margin[0] == pytest.approx(0.02 * slope)
    for tick in plot.ticks:
        value = float(tick.text.replace("−", "-"))
        assert tick.position == pytest.approx(slope * value + offset)
    assert [row.name for row in plot.rows] == [design.name for design in results.designs]


def test_a_huge_margin_does_not_hide_the_intervals() -> None:
    results = examples.example(margin=50.0)
    plot = charts.interval_plot(parse_results(results), "mean_score")
    assert max(row.high - row.low for row in plot.rows if row.low and row.high) > 1


def test_rank_groups_never_share_a_lane_and_none_is_lost() -> None:
    results = examples.sixty_designs()
    ranks = results["ranks"]["mean_score"]
    names = [design["name"] for design in results["designs"]]
    rng = np.random.default_rng(4)
    starts = rng.integers(0, 55, 25)
    ranks["cliques"] = [names[s : s + 2 + rng.integers(0, 5)] for s in starts] + [[names[0]]]
    plot = charts.rank_plot(parse_results(results), "mean_score")
    assert plot is not None
    drawn = sorted(group.names for group in plot.groups)
    assert drawn == sorted(clique for clique in ranks["cliques"] if len(clique) > 1)
    taken: set[tuple[int, int]] = set()
    for group in plot.groups:
        cells = {(group.lane, row) for row in range(group.first, group.last + 1)}
        assert not cells & taken
        taken |= cells
    assert plot.n_lanes == 1 + max(group.lane for group in plot.groups)


def test_groups_with_gaps_show_the_gap() -> None:
    results = examples.example()
    names = [design["name"] for design in results["designs"]]
    results["ranks"]["mean_score"]["cliques"] = [[names[0], names[1], names[4]]]
    plot = charts.rank_plot(parse_results(results), "mean_score")
    assert plot is not None
    assert plot.groups[0].runs == [(0, 1), (4, 4)]


def test_critical_difference_has_the_length_of_its_value() -> None:
    results = parse_results(examples.example())
    plot = charts.rank_plot(results, "mean_score")
    assert plot is not None
    assert plot.width is not None
    ranks = results.ranks["mean_score"]
    per_rank = (plot.rows[-1].position - plot.rows[0].position) / (0.93 * 11)
    assert ranks.critical_difference is not None
    assert plot.width == pytest.approx(per_rank * ranks.critical_difference)


def test_units_are_drawn_on_the_side_they_favour() -> None:
    for make in (examples.example, examples.lower_is_better):
        plot = charts.unit_plot(parse_results(make()), "mean_score")
        for row in plot.rows:
            assert row.wins + row.ties + row.losses == pytest.approx(100)
            for kind, path in row.marks.items():
                for x in map(float, re.findall(r"M(\d+) ", path)):
                    side = (x / 10 - plot.zero) * (1 if plot.better_is_right else -1)
                    expected = {"win": 1, "loss": -1, "tie": 0}[kind]
                    # Positions are rounded to a thousandth of the axis.
                    assert side * expected > -0.1 if expected else abs(side) < 0.1


def test_colours_appear_only_where_decided_and_grow_with_the_difference() -> None:
    results = parse_results(examples.example())
    for group in tables.heat_groups(results).values():
        cells = [c for row in group.rows.values() for c in row if not c.is_reference]
        assert all(0 <= cell.strength <= 1 for cell in cells)
        sizes = [(abs(float(c.text.replace("−", "-"))), c.strength) for c in cells]
        strengths = [strength for _, strength in sorted(sizes)]
        assert all(b >= a - 0.1 for a, b in pairwise(strengths))
    html = render_report(examples.example())
    assert not re.search(r'class="number undecided[^>]*--s', html)
    assert re.search(r'class="number better[^>]*--s', html)


def test_equal_costs_are_not_plotted() -> None:
    results = examples.example()
    for design in results["designs"]:
        design["cost"]["labels_used"] = {"mean": 100.0, "min": 100.0, "max": 100.0}
    names = [plot.cost for plot in charts.cost_plots(parse_results(results))]
    assert names == [
        "wall_seconds",
        "peak_memory_bytes",
        "trained_parameters",
        "forward_flops_per_text",
    ]
    assert charts.cost_plots(parse_results(examples.one_design())) == []
