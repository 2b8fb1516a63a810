"""The report: one HTML file that opens offline, drawn from the content of ``results.json`` alone.

`charts` computes the plots' geometry and `tables` the tables' text; the template only places them.
There is no script library and no image: plots are SVG, colours come from the style sheet and follow
the reader's light or dark theme, and the few lines of script sort the table and place labels.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bakeoff._files import write_text
from bakeoff._page import environment, printable, style
from bakeoff.study import wording
from bakeoff.study.report import charts, tables
from bakeoff.study.schema import Results, parse_results
from bakeoff.study.terminal import LiveProgress, terminal_table

__all__ = ["LiveProgress", "render_report", "terminal_table", "write_report"]


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the report of a study as one self-contained HTML file, atomically.

    Parameters
    ----------
    results
        The content of a ``results.json``.
    path
        The file to write, usually ``report.html`` in the study's folder.

    Raises
    ------
    StoreError
        If `results` do not follow the schema.
    """
    write_text(Path(path), render_report(results))


def render_report(results: Mapping[str, Any] | Results) -> str:
    """Return the report as an HTML document.

    Parameters
    ----------
    results
        The content of a ``results.json``.

    Raises
    ------
    StoreError
        If `results` do not follow the schema.
    """
    checked = results if isinstance(results, Results) else parse_results(results)
    page: str = _template().render(_context(checked))
    return printable(page)


@cache
def _template() -> Any:
    templates = environment(_resource)
    templates.filters["position"] = _position
    templates.filters["facts"] = tables.facts
    templates.filters["sentence"] = _sentence
    return templates.get_template("template.html.j2")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _position(percent: float) -> str:
    return f"{percent:.4g}%"


def _sentence(text: str) -> str:
    """Return `text` with a capital first letter and a full stop."""
    ended = text if text.endswith((".", "!", "?")) else f"{text}."
    return ended[:1].upper() + ended[1:]


def _context(results: Results) -> dict[str, Any]:
    from markupsafe import Markup

    script = _resource("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "results": results,
        "style": Markup(style()),
        "script": Markup(script),
        "script_digest": digest,
        "answer": wording.answer_parts(results),
        "started": _day(results.study.started),
        "wording": wording,
        "verdict_rows": tables.verdict_rows(results),
        "costs": [wording.cost_wording(name) for name in wording.cost_names(results)],
        "heat_groups": tables.heat_groups(results),
        "cost_plots": charts.cost_plots(results),
        "design_notes": tables.design_notes(results),
        "failure_groups": tables.failure_groups(results.failures),
        "charts": charts,
        "usage": _usage(results),
        "n_units": _headline_units(results),
    }


def _day(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return moment


def _usage(results: Results) -> list[str]:
    usage = results.problem.description.get("usage", [])
    return [str(line) for line in (usage if isinstance(usage, list) else [usage])]


def _headline_units(results: Results) -> int:
    counts = [
        design.metrics[results.headline].overall.n_units or 0
        for design in results.designs
        if results.headline in design.metrics
    ]
    return max(counts, default=0)
