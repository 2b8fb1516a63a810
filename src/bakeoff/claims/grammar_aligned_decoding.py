"""ASAp: what the paper says of sampling under a grammar, run where everything can be computed.

Languages of 3 to 400 texts are enumerated, in all spellings, so that the distance of a sampler's
distribution from the target is exact. The paper estimates it from 2,000 samples per task of a model
with 7 billion parameters; here the model has 135 million. The protocol is fixed beforehand: the
enumerable prompts of `constrained_prompts`, ten texts per prompt after 0, 1, 10 or 400 texts that
are dropped, and, for equal costs, learning until 40 model calls are used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = 'Park et al., "Grammar-Aligned Decoding", NeurIPS 2024, arXiv 2405.21047'

CLAIMS = (
    Claim(
        name="central",
        statement="After 400 texts the texts of ASAp are closer to the model's distribution given "
        "the grammar than those of step-by-step masking.",
        source=f"{PAPER}, figures of the KL divergence over 2,000 samples",
        figure="the divergence falls with samples on most tasks, masking's stays",
        treatment="asap after 400",
        references=("masking",),
        metrics=("kl", "total_variation"),
    ),
    Claim(
        name="limit",
        statement="After 400 texts ASAp is as good as exact: adaptive rejection is not closer to "
        "the target by more than 0.01 nats.",
        source=f"{PAPER}, theorem on convergence; the number of texts is ours",
        figure=None,
        treatment="adaptive rejection",
        references=("asap after 400",),
        metrics=("kl",),
        expected="not better",
    ),
    Claim(
        name="first samples",
        statement="After a single text the next one of ASAp is not closer to the target than one "
        "of masking.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="asap after 1",
        references=("masking",),
        metrics=("first_kl",),
        expected="not better",
    ),
    Claim(
        name="without burn-in",
        statement="The first ten texts of ASAp are together closer to the target than those of "
        "masking.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="asap",
        references=("masking",),
        metrics=("kl",),
    ),
    Claim(
        name="likelihood",
        statement="After 400 texts the texts of ASAp are likelier under the model than those of "
        "masking.",
        source=f"{PAPER}, figures of the expectation of P (there closer to the true expectation)",
        figure=None,
        treatment="asap after 400",
        references=("masking",),
        metrics=("log_prob",),
    ),
    Claim(
        name="equal calls",
        statement="With 40 model calls to learn from, the texts of ASAp are closer to the target "
        "than masked texts resampled by their weights, and than rejection with masking where the "
        "calls do not suffice.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="asap, 40 calls",
        references=("resampling, 40 calls", "rejection, 40 calls"),
        metrics=("kl",),
    ),
    Claim(
        name="exact rival",
        statement="Adaptive rejection is closer to the target in its first ten texts than ASAp, "
        "where texts that it fails to deliver are masked.",
        source="not in the paper; later work on the same trie",
        figure=None,
        treatment="adaptive rejection",
        references=("asap",),
        metrics=("kl",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Prompts, texts per prompt and seeds, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    n_samples: int
    timed_prompts: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", n_samples=5, timed_prompts=0, seeds=2),
    "laptop": Budget("demo", n_samples=10, timed_prompts=2, seeds=3),
    "full": Budget("full", n_samples=10, timed_prompts=10, seeds=10),
}
_CALLS = 40


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.data.constrained_prompts import constrained_prompts
    from bakeoff.decoding.problem.constrained import ConstrainedProblem
    from bakeoff.study import Design, Designs, Study

    budget = BUDGETS[size]
    data = constrained_prompts(budget.data)
    problem = ConstrainedProblem(
        data.prompts,
        grammar=data.grammars,
        n_samples=budget.n_samples,
        timed_prompts=budget.timed_prompts,
    )
    designs = Designs(
        [
            Design("masking", "gcd"),
            Design("asap", "asap"),
            *(Design(f"asap after {n}", "asap", {"burn_in": n}) for n in (1, 10, 400)),
            Design(f"asap, {_CALLS} calls", "asap", {"calls": _CALLS}),
            Design(f"resampling, {_CALLS} calls", "importance", {"calls": _CALLS}),
            Design(f"rejection, {_CALLS} calls", "rejection", {"calls": _CALLS}),
            Design("adaptive rejection", "adaptive"),
        ]
    )
    return Study(
        problem,
        designs,
        reference="masking",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
