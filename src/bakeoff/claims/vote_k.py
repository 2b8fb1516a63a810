"""Vote-k: what the paper says of selective annotation, run.

The paper labels with 6-billion-parameter models and a pool of 3,000; here a language model of 135
million parameters answers, at the smaller of the paper's two budgets, and a nearest-label rule at
both. Vote-k is the fast variant: the full one reads the whole pool with the language model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Su et al., "Selective Annotation Makes Language Models Better Few-Shot Learners", ICLR 2023, '
    "arXiv 2209.01975"
)

CLAIMS = (
    Claim(
        name="central",
        statement="With 18 labels and similar examples in the prompt, vote-k's picks give higher "
        "accuracy in context than random ones.",
        source=f"{PAPER}, abstract (there a mean over ten tasks and large models)",
        figure="12.9 % relative gain at 18 labels",
        treatment="vote-k",
        references=("random",),
        metrics=("in_context",),
    ),
    Claim(
        name="nearest-label",
        statement="Without a language model, by the label of the nearest pick, vote-k's picks give "
        "higher accuracy than random ones, over 18, 50 and 100 labels.",
        source="our question: the choice of examples without a language model",
        figure=None,
        treatment="vote-k",
        references=("random",),
        metrics=("accuracy",),
    ),
    Claim(
        name="rivals",
        statement="Vote-k's picks beat those of k-means and facility location.",
        source=f"{PAPER}, comparison of selection methods",
        figure=None,
        treatment="vote-k",
        references=("kmeans", "facility-location"),
        metrics=("accuracy", "in_context"),
    ),
    Claim(
        name="discount",
        statement="Discounting the votes of voters that have a pick beats counting all votes "
        "alike.",
        source=f"{PAPER}, definition of the score; the comparison is ours",
        figure=None,
        treatment="vote-k",
        references=("vote-k, no discount",),
        metrics=("accuracy", "known_class"),
    ),
    Claim(
        name="needs-similarity",
        statement="With random examples in the prompt instead of similar ones, vote-k's picks are "
        "no better than random ones.",
        source=f"{PAPER}, ablation of prompt retrieval",
        figure=None,
        treatment="vote-k, random examples",
        references=("random, random examples",),
        metrics=("in_context",),
        expected="not better",
    ),
)


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.claims.annotation_budget import annotation_study
    from bakeoff.study import Design, Designs

    designs = Designs(
        [
            Design("random", "random"),
            Design("kmeans", "kmeans"),
            Design("facility-location", "facility-location"),
            Design("vote-k", "vote-k"),
            Design("vote-k, no discount", "vote-k", {"rho": 1.0}),
            Design("random, random examples", "random", {"retrieval": "random"}),
            Design("vote-k, random examples", "vote-k", {"retrieval": "random"}),
        ]
    )
    return annotation_study(designs, size, directory, workers)
