"""The three sizes at which claims about what to label run; shared by all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Size

if TYPE_CHECKING:
    from bakeoff.study import Designs, Study


@dataclass(frozen=True)
class Budget:
    """Data, seeds and what is answered in context, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    labels: tuple[int, ...]
    seeds: int
    in_context: int


# In context only at the least budget: reading prompts takes nearly all of the time.
BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", (4,), seeds=2, in_context=4),
    "laptop": Budget("demo", (18, 50, 100), seeds=10, in_context=48),
    "full": Budget("full", (18, 50, 100), seeds=10, in_context=256),
}


def annotation_study(designs: Designs, size: Size, directory: Path, workers: int) -> Study:
    """Return a study of what to label, on the default data."""
    from bakeoff.data import labelled_default
    from bakeoff.selection.problem import AnnotationProblem
    from bakeoff.study import Study

    budget = BUDGETS[size]
    problem = AnnotationProblem(
        labelled_default(budget.data)[: 2 if size == "full" else 1],
        budgets=budget.labels,
        learners=("nearest-neighbour", "in-context"),
        max_in_context=budget.in_context,
        in_context_budgets=budget.labels[:1],
    )
    return Study(
        problem,
        designs,
        reference="random",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
