"""GATEAU: what the paper says of finding samples that need a long context, run.

In made-up samples only the place of the answer differs: at the start of a long list, in its last
line, in the question, or nowhere. Those that need the start are to be found. The pair of models is
one model of 135 million parameters that sees the whole list, or its end only. The answers stand in
the first eighth, and in a second pool in the second quarter, because attention dwells on the first
tokens whatever they say; the second placement was added after the first had been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.data import TrainingPool
    from bakeoff.study import Study

PAPER = (
    'Si et al., "GATEAU: Selecting Influential Samples for Long Context Alignment", EMNLP 2025, '
    "arXiv 2410.15633"
)
RIVALS = ("random", "longest", "highest perplexity", "lowest perplexity")

CLAIMS = (
    Claim(
        name="central",
        statement="Of the samples that GATEAU picks, more need the far context than of those "
        "picked at random, by length or by perplexity.",
        source=f"{PAPER}, main tables (there by accuracy after training)",
        figure=None,
        treatment="gateau",
        references=RIVALS,
        metrics=("relevant",),
    ),
    Claim(
        name="both-parts",
        statement="Guidance by the pair of models and awareness of context together pick better "
        "than either alone.",
        source=f"{PAPER}, ablation (there by accuracy after training)",
        figure="56.8 against 53.2 and 52.8 on LongBench-Chat",
        treatment="gateau",
        references=("guidance only", "awareness only"),
        metrics=("relevant",),
    ),
    Claim(
        name="guidance",
        statement="Guidance by the pair of models alone picks better than chance and perplexity.",
        source=f"{PAPER}, ablation",
        figure=None,
        treatment="guidance only",
        references=RIVALS,
        metrics=("relevant",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Samples per pool, lines of a context and seeds, at one claim size."""

    n: int
    n_lines: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget(8, n_lines=16, seeds=2),
    "laptop": Budget(60, n_lines=32, seeds=3),
    "full": Budget(500, n_lines=128, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.selection.problem import TrainingProblem
    from bakeoff.study import Design, Designs, Study

    budget = BUDGETS[size]
    pools = (
        _pool("answers at the start", budget, (0.0, 0.125)),
        _pool("answers in the second quarter", budget, (0.25, 0.5)),
    )
    problem = TrainingProblem(pools, n_select=budget.n // 4, learner="none", base="smollm2-135m")
    of_response = {"part": "response", "max_length": 4096}
    segments = {"segment_length": 64, "truncate_context": 128}
    designs = Designs(
        [
            Design("random", "random"),
            Design("longest", "longest"),
            Design("highest perplexity", "perplexity", {**of_response, "order": "highest"}),
            Design("lowest perplexity", "perplexity", {**of_response, "order": "lowest"}),
            Design("guidance only", "gateau", {**segments, "alpha": 1.0}),
            Design("awareness only", "gateau", {**segments, "alpha": 0.0}),
            Design("gateau", "gateau", segments),
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


def _pool(name: str, budget: Budget, far_lines: tuple[float, float]) -> TrainingPool:
    import numpy as np

    from bakeoff.data import TrainingPool
    from bakeoff.data.far_context import far_context_samples

    samples = far_context_samples(budget.n, budget.n_lines, seed=0, far_lines=far_lines)
    others = far_context_samples(8, budget.n_lines, 1, ("far",), far_lines=far_lines)
    return TrainingPool(
        name,
        tuple(each for each in samples),
        tuple(each for each in others[:4]),
        tuple(each for each in others[4:]),
        relevant=np.array([each.kind == "far" for each in samples]),
    )
