"""The three sizes at which embedding claims run; shared by all claims about pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Size

if TYPE_CHECKING:
    from bakeoff.study import Study


@dataclass(frozen=True)
class Budget:
    """Data size, seeds, steps, tokens kept and head size of one claim size."""

    data: Literal["smoke", "demo", "full"]
    seeds: int
    steps: int
    batch_size: int
    max_length: int
    num_latents: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", seeds=2, steps=5, batch_size=16, max_length=24, num_latents=2),
    "laptop": Budget("demo", seeds=5, steps=100, batch_size=16, max_length=48, num_latents=8),
    "full": Budget("full", seeds=10, steps=2000, batch_size=64, max_length=256, num_latents=64),
}


def pooling_study(
    size: Size, names: Sequence[str], *, reference: str, directory: Path, workers: int
) -> Study:
    """Return a study of some default designs on the default data and base model."""
    from bakeoff.data import embedded_default
    from bakeoff.embedding.problem import EmbeddingProblem, default_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = EmbeddingProblem(
        embedded_default(budget.data),
        steps=budget.steps,
        batch_size=budget.batch_size,
        max_length=budget.max_length,
    )
    designs = Designs(
        [d for d in default_designs(num_latents=budget.num_latents) if d.name in names]
    )
    return Study(
        problem,
        designs,
        reference=reference,
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
