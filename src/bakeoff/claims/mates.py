"""MATES: what the paper says of choosing data while a model trains, run.

A GPT of 3.1 million parameters that has read the pool for a while goes on with a fifth of it. The
reference are texts of the target's kind; tests are others of them. The paper trains models of 410
million and 1 billion parameters on 25 billion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Yu et al., "MATES: Model-Aware Data Selection for Efficient Pretraining with Data Influence '
    'Models", NeurIPS 2024, arXiv 2406.06046'
)

CLAIMS = (
    Claim(
        name="central",
        statement="Choosing data anew by predicted influence while a model trains gives a lower "
        "loss on the target than random data, for the same number of training tokens.",
        source=f"{PAPER}, main table (there accuracy over nine tasks)",
        figure="45.8 against 44.5 (410M), 47.5 against 46.4 (1B)",
        treatment="mates, refreshed",
        references=("random",),
        metrics=("target_loss",),
    ),
    Claim(
        name="refreshing",
        statement="Choosing anew in each stage beats choosing once.",
        source=f"{PAPER}, analysis of a frozen influence model",
        figure=None,
        treatment="mates, refreshed",
        references=("mates, chosen once",),
        metrics=("target_loss",),
    ),
    Claim(
        name="rivals",
        statement="It beats choosing beforehand by importance resampling (DSIR) and by TF-IDF "
        "similarity to the reference.",
        source=f"{PAPER}, main table for DSIR; TF-IDF is a sceptic's control",
        figure="45.8 against 44.4 (DSIR, 410M)",
        treatment="mates, refreshed",
        references=("importance-resampling", "tf-idf"),
        metrics=("target_loss",),
    ),
    Claim(
        name="before-training",
        statement="Choosing by probes of the starting model, before training, beats random data.",
        source="our question: what `bakeoff select --method mates` does",
        figure=None,
        treatment="mates, before training",
        references=("random",),
        metrics=("target_loss",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Data, picks, tokens to train on, probes per refresh and seeds, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    n_select: int
    n_tokens: int
    n_probes: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", n_select=30, n_tokens=3_000, n_probes=20, seeds=2),
    "laptop": Budget("demo", n_select=500, n_tokens=120_000, n_probes=150, seeds=3),
    "full": Budget("full", n_select=3000, n_tokens=3_000_000, n_probes=2000, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.data import training_pools_default
    from bakeoff.selection.fine_tuning import FineTuningBudget
    from bakeoff.selection.problem import TrainingProblem
    from bakeoff.study import Design, Designs, Study

    budget = BUDGETS[size]
    problem = TrainingProblem(
        training_pools_default(budget.data, ("manual",)),
        n_select=budget.n_select,
        budget=FineTuningBudget(n_tokens=budget.n_tokens),
    )
    probes = {"n_probes": budget.n_probes}
    designs = Designs(
        [
            Design("random", "random"),
            Design("tf-idf", "tf-idf"),
            Design("importance-resampling", "importance-resampling"),
            Design("mates, before training", "mates", probes),
            Design("mates, chosen once", "mates-refreshed", {**probes, "refresh": False}),
            Design("mates, refreshed", "mates-refreshed", probes),
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
