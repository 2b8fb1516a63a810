"""CodeGen2: what the paper says of one decoder that writes from left to right and fills in, run.

The protocol: a decoder of 1.3 million weights and a vocabulary of 2,048 are made anew from the
functions of Python's standard library; every design reads the same number of tokens from the same
first weights; they are judged on functions of six modules that none of them has read, one line
taken out of each. The number of tokens was set by the time that training takes, not by what came
out: 0.5 million at the laptop size, 6 million at the full size. The paper trains 1 to 16 billion
weights on hundreds of billions of tokens, so that a claim that fails here says what so little
training does not show yet, not that the paper is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Nijkamp et al., "CodeGen2: Lessons for Training LLMs on Programming and Natural Languages", '
    "2023, arXiv 2305.02309"
)

CLAIMS = (
    Claim(
        name="central",
        statement="A decoder trained half on the next token and half on file-level span corruption "
        "finds the text of a hole likelier, given both sides, than one trained on the next token "
        "alone finds it after the left side, at equal tokens.",
        source=f"{PAPER}, the final recipe and its infill evaluation (there pass@1 on "
        "HumanEval-Infill, and no causal decoder beside it)",
        figure="68.74 (one line) and 38.88 (several) at 7B; InCoder 66.69 and 34.62",
        treatment="span corruption",
        references=("causal LM",),
        metrics=("infill_loss",),
    ),
    Claim(
        name="not free",
        statement="Infilling is not free: from left to right the mixture is not better than plain "
        "next-token training at equal tokens.",
        source=f"{PAPER}, the lesson on infill (there PSM at 1B on HumanEval)",
        figure="about 1 point of pass@1 lost",
        treatment="span corruption",
        references=("causal LM",),
        metrics=("causal_loss",),
        expected="not better",
    ),
    Claim(
        name="file level",
        statement="Corrupting each file by itself fills holes better than corrupting the packed "
        "sequence across files.",
        source=f"{PAPER}, the recipe's choice of file level",
        figure=None,
        treatment="span corruption",
        references=("span corruption, sequence level",),
        metrics=("infill_loss",),
    ),
    Claim(
        name="one hole",
        statement="For a single hole, span corruption is not better than fill-in-the-middle "
        "training at the same share.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="span corruption",
        references=("fill in the middle",),
        metrics=("infill_loss",),
        expected="not better",
    ),
    Claim(
        name="several holes",
        statement="For two holes at once, span corruption is better than fill-in-the-middle "
        "training at the same share, which sees the first without the text of the second.",
        source="not in the paper; what its layout of several spans is for",
        figure=None,
        treatment="span corruption",
        references=("fill in the middle",),
        metrics=("several_loss",),
    ),
    Claim(
        name="prefix-LM",
        statement="Reading a prefix in both directions is not better than a causal decoder, from "
        "left to right.",
        source=f"{PAPER}, the lesson on architecture (there HumanEval at 1B)",
        figure="no measurable benefit; about 1.3 points lower with several languages",
        treatment="prefix-LM",
        references=("causal LM",),
        metrics=("causal_loss",),
        expected="not better",
    ),
)

DESIGNS = (
    "causal LM",
    "span corruption",
    "span corruption, sequence level",
    "fill in the middle",
    "prefix-LM",
)


@dataclass(frozen=True)
class Budget:
    """Texts, tokens that every design reads, holes and seeds, at one claim size."""

    texts: Literal["smoke", "demo", "full"]
    n_tokens: int
    n_functions: int
    n_fills: int
    n_doctests: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", 4_000, n_functions=12, n_fills=4, n_doctests=2, seeds=2),
    "laptop": Budget("demo", 500_000, n_functions=200, n_fills=40, n_doctests=15, seeds=3),
    "full": Budget("full", 6_000_000, n_functions=400, n_fills=200, n_doctests=60, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.decoding.problem.infilling import InfillingProblem, infilling_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = InfillingProblem(
        budget.texts,
        n_tokens=budget.n_tokens,
        n_functions=budget.n_functions,
        n_fills=budget.n_fills,
        n_doctests=budget.n_doctests,
    )
    designs = infilling_designs()
    if size != "full":
        designs = Designs([design for design in designs if design.name in DESIGNS])
    return Study(
        problem,
        designs,
        reference="causal LM",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
