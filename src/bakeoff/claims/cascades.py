"""Cascades: what the paper says of deferral by token-level uncertainty, run.

Two decoders are trained from scratch to read numbers, dates, sums of money and the like aloud; the
larger is better. Which prompts to send to it is decided from the smaller one's answers. The paper
does this with FLAN-T5 of 250 million parameters and more, on question answering, inference and
translation.

Laid down before any rule was run on these decoders' answers: quality is 1 minus the edit rate in
words; five parts per seed, each ranked by rules fitted to the others. The laptop's two decoders are
not the first: shapes and training were changed, some five times, until the larger was clearly
better and not perfect (0.86 against 0.64). Only losses, answers and their qualities were looked at
for that. The smoke size had been run by then, with decoders of its own, on some of the same
prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Gupta et al., "Language Model Cascades: Token-level uncertainty and beyond", ICLR 2024, '
    "arXiv 2404.10136"
)

CLAIMS = (
    Claim(
        name="central",
        statement="A rule learned on quantiles of the token log-probabilities has a larger area "
        "under the deferral curve than their sum (Chow-Sum) and their mean (Chow-Average).",
        source=f"{PAPER}, main table",
        figure="0.711 against 0.627 and 0.642 (MNLI), 0.097 against 0.073 and 0.087 (TriviaQA), "
        "FLAN-T5 Base and Large",
        treatment="post-hoc-quantile",
        references=("chow-sum", "chow-average"),
        metrics=("area",),
    ),
    Claim(
        name="quantile",
        statement="A single quantile, its level chosen on calibration data, beats the sum and the "
        "mean.",
        source=f"{PAPER}, comparison of scores that are not learned",
        figure=None,
        treatment="chow-quantile, chosen",
        references=("chow-sum", "chow-average"),
        metrics=("area",),
    ),
    Claim(
        name="learned",
        statement="The learned rule beats the best single quantile.",
        source=f"{PAPER}: no quantile is best on all tasks, the learned combination is more robust",
        figure=None,
        treatment="post-hoc-quantile",
        references=("chow-quantile, chosen",),
        metrics=("area",),
    ),
    Claim(
        name="length",
        statement="Chow-Sum does no better than deferring the longest answers first.",
        source=f"{PAPER}: the sum is biased by length; the comparison with length alone is ours",
        figure=None,
        treatment="chow-sum",
        references=("length",),
        metrics=("area",),
        expected="not better",
    ),
    Claim(
        name="controls",
        statement="The learned rule beats deferral at random and by length alone.",
        source=f"{PAPER}, main table, for random; length alone is a sceptic's control",
        figure="gains over random of 10.4% (MNLI), 15.5% (TriviaQA), 3.6% (translation)",
        treatment="post-hoc-quantile",
        references=("random", "length"),
        metrics=("area",),
    ),
    Claim(
        name="embeddings",
        statement="The small model's embedding beside the quantiles does not help the learned rule "
        "with this many labelled answers.",
        source="not in the paper, which sees small gains on most tasks; a sceptic's control",
        figure="the paper: 0.722 with embeddings of both models, 0.711 without (MNLI)",
        treatment="post-hoc-embed",
        references=("post-hoc-quantile",),
        metrics=("area",),
        expected="not better",
    ),
)


@dataclass(frozen=True)
class Budget:
    """Data, with the two decoders that belong to them, and seeds, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", seeds=2),
    "laptop": Budget("demo", seeds=3),
    "full": Budget("full", seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.decoding.problem.cascading import cascade_designs, default_cascade_problem
    from bakeoff.study import Study

    budget = BUDGETS[size]
    return Study(
        default_cascade_problem(budget.data),
        cascade_designs(),
        reference="chow-average",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
