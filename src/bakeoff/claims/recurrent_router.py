"""Layerwise recurrent router: what the paper says of a state carried through depth, run.

The protocol: a decoder with 8 experts per layer, 2 per token, from random weights, on Python,
English and Bulgarian; every design reads the same sequences. The perceptron's width is chosen so
that its routers have as many parameters as the recurrent ones. The usual balance loss of every
layer by itself has weight 0.01, as in the paper. The number of tokens was set by the time that
training takes, not by what came out. Since 23 November 2026 experts are chosen by their logits, of
equal ones the lowest; until then by probabilities, in which rounding makes ties that fell anyhow.
Nothing else of the protocol has changed. The paper's small models have 36 million weights and train
for 80,000 steps, its large ones 0.9 and 15 billion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", ICLR 2025, arXiv 2408.06793'
)

CLAIMS = (
    Claim(
        name="central",
        statement="Routers joined by a state that each token carries through the layers give a "
        "lower loss than linear routers, and than perceptrons with as many parameters.",
        source=f"{PAPER}, table 1 (bits per character of enwik8, test)",
        figure="1.116 against 1.128 (linear) and 1.137 (perceptron)",
        treatment="recurrent",
        references=("linear", "perceptron"),
        metrics=("loss",),
    ),
    Claim(
        name="the state counts",
        statement="It is the state: the same routers are worse when it is not passed on, and when "
        "it is passed on without its gradient.",
        source=f"{PAPER}, table 5 (bits per character of enwik8, test)",
        figure="1.116 against 1.123 (not passed) and 1.133 (no gradient)",
        treatment="recurrent",
        references=("recurrent, state not passed", "recurrent, state without gradient"),
        metrics=("loss",),
    ),
    Claim(
        name="not by parameters",
        statement="Without passing the state, the same parameters are not better than linear "
        "routers.",
        source=f"{PAPER}, table 5 against table 1: there they are a little better",
        figure="1.123 against 1.128",
        treatment="recurrent, state not passed",
        references=("linear",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="not without gradient",
        statement="With the gradient of the state cut, they are not better than linear routers.",
        source=f"{PAPER}, table 5 against table 1",
        figure="1.133 against 1.128",
        treatment="recurrent, state without gradient",
        references=("linear",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="layers know of each other",
        statement="What one layer chooses tells more about the next layer's choice than with "
        "linear routers.",
        source=f"{PAPER}, table 8 (mutual information of gate scores; here of first choices)",
        figure="about 0.9 to 1.1 against 0.16 to 0.2",
        treatment="recurrent",
        references=("linear",),
        metrics=("layer_information",),
    ),
    Claim(
        name="softer choices",
        statement="The gate's probabilities have a higher entropy than those of linear routers.",
        source=f"{PAPER}, table 8 (sum of the chosen probabilities)",
        figure="0.57 against 0.92",
        treatment="recurrent",
        references=("linear",),
        metrics=("entropy",),
    ),
    Claim(
        name="experts are worth it",
        statement="The mixture has a lower loss than a dense decoder of its active size.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="recurrent",
        references=("dense",),
        metrics=("loss",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Texts, decoder, size of the state, tokens that every design reads and seeds, at one size."""

    texts: Literal["smoke", "demo", "full"]
    n_layers: int
    width: int
    context: int
    state_size: int
    n_tokens: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", 3, width=32, context=32, state_size=8, n_tokens=2_000, seeds=2),
    "laptop": Budget("demo", 6, width=96, context=128, state_size=32, n_tokens=220_000, seeds=3),
    "full": Budget("full", 12, width=192, context=256, state_size=64, n_tokens=6_000_000, seeds=5),
}
N_EXPERTS = 8


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.experts.problem.layers import LayerProblem
    from bakeoff.models.small_gpt import SmallGPT
    from bakeoff.study import Design, Designs, Study

    budget = BUDGETS[size]
    problem = LayerProblem(
        budget.texts,
        shape=SmallGPT(
            vocabulary=2048,
            n_layers=budget.n_layers,
            width=budget.width,
            n_heads=4,
            context=budget.context,
        ),
        n_tokens=budget.n_tokens,
    )
    state = {"state_size": budget.state_size}

    def recurrent(name: str, **params: Any) -> Design:
        return Design(name, "recurrent", {**state, **params})

    designs = [
        Design("linear", "top-k"),
        Design("perceptron", "perceptron", {"width": perceptron_width(budget)}),
        recurrent("recurrent"),
        recurrent("recurrent, state not passed", pass_state=False),
        recurrent("recurrent, state without gradient", detach=True),
        Design("dense", "dense"),
    ]
    if size == "full":
        designs += [
            recurrent("recurrent, one projection", shared_projection=True),
            recurrent("recurrent, tanh cell", cell="rnn"),
            recurrent("recurrent, LSTM cell", cell="lstm"),
            recurrent("recurrent, cosine gate", gate="cosine"),
            Design("cosine", "cosine"),
        ]
    return Study(
        problem,
        Designs(designs),
        reference="linear",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )


def perceptron_width(budget: Budget) -> int:
    """Return the width at which perceptrons have as many parameters as the recurrent routers."""
    h, p, n_layers = budget.width, budget.state_size, budget.n_layers
    recurrent = n_layers * (h * p + p * N_EXPERTS) + 6 * p * p + 6 * p
    return round(recurrent / (n_layers * (h + 1 + N_EXPERTS)))
