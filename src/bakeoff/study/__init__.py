"""The controlled comparison: designs, problems, trials, store, statistics, report. Knows no method.

Names are imported when they are first used, so that ``import bakeoff.study`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bakeoff.study.design import Design, Designs
    from bakeoff.study.engine import Study, StudyInterrupted
    from bakeoff.study.protocol import Metric, Problem, Trial, Work
    from bakeoff.study.report import write_report
    from bakeoff.study.results import Results, load_results
    from bakeoff.study.statistics import Comparison, Ranks, Record, compare, critical_difference
    from bakeoff.study.terminal import LiveProgress, terminal_table

_HOME = {
    "Comparison": "statistics",
    "Design": "design",
    "Designs": "design",
    "LiveProgress": "terminal",
    "Metric": "protocol",
    "Problem": "protocol",
    "Ranks": "statistics",
    "Record": "statistics",
    "Results": "results",
    "Study": "engine",
    "StudyInterrupted": "engine",
    "Trial": "protocol",
    "Work": "protocol",
    "compare": "statistics",
    "critical_difference": "statistics",
    "load_results": "results",
    "terminal_table": "terminal",
    "write_report": "report",
}

__all__ = [
    "Comparison",
    "Design",
    "Designs",
    "LiveProgress",
    "Metric",
    "Problem",
    "Ranks",
    "Record",
    "Results",
    "Study",
    "StudyInterrupted",
    "Trial",
    "Work",
    "compare",
    "critical_difference",
    "load_results",
    "terminal_table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
