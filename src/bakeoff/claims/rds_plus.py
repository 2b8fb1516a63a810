"""RDS+: what the paper says of selection by hidden states, run.

Texts of one kind are to be found in a mixed pool, given a few of them. A language model of 135
million parameters makes the vectors; a small one, trained on the pool beforehand, is trained on the
picks. The paper does both with 7 billion parameters and up to millions of instruction samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = 'Ivison et al., "Large-Scale Data Selection for Instruction Tuning", 2025, arXiv 2503.01807'

CLAIMS = (
    Claim(
        name="central",
        statement="Training on RDS+'s picks gives a lower loss on the target than training on "
        "random ones, balanced or not.",
        source=f"{PAPER}, tables 1 to 3 (there accuracy over seven tasks)",
        figure="46.4 against 40.9 and 42.2, 10,000 of 200,000 samples",
        treatment="rds-plus",
        references=("random", "balanced-random"),
        metrics=("target_loss",),
    ),
    Claim(
        name="pooling",
        statement="Weighting later tokens more beats the plain mean and the last token, by the "
        "share of picks that are of the target's kind.",
        source=f"{PAPER}, table 9 (there by accuracy after training)",
        figure="46.4 against 45.8 (mean) and 45.4 (last token)",
        treatment="rds-plus",
        references=("rds-plus, mean", "rds-plus, last token"),
        metrics=("relevant",),
    ),
    Claim(
        name="rivals",
        statement="Training on RDS+'s picks beats those by an embedding model, by length and by "
        "perplexity.",
        source=f"{PAPER}, tables 1 and 2",
        figure="46.4 against 42.1 (GTR), 43.5 (length), 34.2 (highest perplexity)",
        treatment="rds-plus",
        references=("embedding-similarity", "longest", "perplexity"),
        metrics=("target_loss",),
    ),
    Claim(
        name="words",
        statement="Training on RDS+'s picks beats those that words alone choose: TF-IDF, BM25 and "
        "importance resampling.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="rds-plus",
        references=(
            "tf-idf",
            "bm25",
            "importance-resampling",
            "importance-resampling, by length",
        ),
        metrics=("target_loss",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Data, picks, tokens to train on and seeds, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    targets: tuple[str, ...]
    n_select: int
    n_tokens: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", ("manual",), n_select=30, n_tokens=2_000, seeds=2),
    "laptop": Budget("demo", ("manual", "news"), n_select=300, n_tokens=40_000, seeds=3),
    "full": Budget(
        "full",
        ("manual", "news", "docstrings", "code"),
        n_select=1500,
        n_tokens=1_000_000,
        seeds=5,
    ),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.data import training_pools_default
    from bakeoff.selection.fine_tuning import FineTuningBudget
    from bakeoff.selection.problem import TrainingProblem
    from bakeoff.study import Design, Designs, Study

    budget = BUDGETS[size]
    problem = TrainingProblem(
        training_pools_default(budget.data, budget.targets),
        n_select=budget.n_select,
        selector_model="smollm2-135m",
        budget=FineTuningBudget(n_tokens=budget.n_tokens),
    )
    names = "random balanced-random longest perplexity tf-idf bm25 importance-resampling"
    designs = Designs(
        [
            *(Design(name, name) for name in names.split()),
            Design("embedding-similarity", "embedding-similarity"),
            Design("rds-plus", "rds-plus"),
            Design(
                "importance-resampling, by length",
                "importance-resampling",
                {"adjust_length": True, "smoothing": 1e-4},
            ),
            Design("rds-plus, mean", "rds-plus", {"pooling": "mean"}),
            Design("rds-plus, last token", "rds-plus", {"pooling": "last"}),
        ]
    )
    return Study(
        problem,
        designs,
        reference="random",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
