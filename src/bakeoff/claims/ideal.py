"""IDEAL: what the paper says of influence-driven annotation, run.

Under the same protocol as vote-k's claims.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Zhang et al., "IDEAL: Influence-Driven Selective Annotations Empower In-Context Learners in '
    'Large Language Models", ICLR 2024, arXiv 2310.10873'
)

CLAIMS = (
    Claim(
        name="central",
        statement="With 18 labels, IDEAL's picks give higher accuracy in context than random ones "
        "and than vote-k's.",
        source=f"{PAPER}, main table (there nine tasks and a 6-billion-parameter model)",
        figure="best in 17 of 18 cells (as a secondary source reports)",
        treatment="ideal",
        references=("random", "vote-k"),
        metrics=("in_context",),
    ),
    Claim(
        name="nearest-label",
        statement="Without a language model, by the label of the nearest pick, IDEAL's picks give "
        "higher accuracy than random ones and vote-k's, over 18, 50 and 100 labels.",
        source="our question: the choice of examples without a language model",
        figure=None,
        treatment="ideal",
        references=("random", "vote-k"),
        metrics=("accuracy",),
    ),
    Claim(
        name="rivals",
        statement="IDEAL's picks beat those of k-means and facility location.",
        source=f"{PAPER}, comparison with coreset methods",
        figure=None,
        treatment="ideal",
        references=("kmeans", "facility-location"),
        metrics=("accuracy", "in_context"),
    ),
    Claim(
        name="more-simulations",
        statement="200 simulations give picks no better than the paper's 10, if both use the same "
        "live edges throughout.",
        source="our question: the paper does not study the number",
        figure=None,
        treatment="ideal",
        references=("ideal, 10 simulations",),
        metrics=("accuracy",),
        expected="not better",
    ),
)


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.claims.annotation_budget import annotation_study
    from bakeoff.study import Design, Designs

    names = ("random", "kmeans", "facility-location", "vote-k", "ideal")
    few = Design("ideal, 10 simulations", "ideal", {"n_simulations": 10})
    designs = Designs([*(Design(name, name) for name in names), few])
    return annotation_study(designs, size, directory, workers)
