"""Load balancing over the global batch: what the paper says of it, run.

The protocol: a decoder with 8 experts per layer, 2 per token, from random weights, on Python,
English and Bulgarian. A step is 6 micro-batches of 2 sequences, each micro-batch of one domain, as
in large runs, where a process holds few sequences. All designs read the same sequences in the same
steps; only where the balance loss counts differs, or its weight. The weight is 0.01 (the paper:
0.008). The number of tokens was set by the time that training takes, not by what came out. The
paper trains 3.4 to 43 billion weights on 120 to 400 billion tokens, with 64 or 160 experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Qiu et al., "Demons in the Detail: On Implementing Load Balancing Loss for Training '
    'Specialized Mixture-of-Expert Models", ACL 2025, arXiv 2501.11873'
)

CLAIMS = (
    Claim(
        name="central",
        statement="At equal weight, a balance loss whose expert loads are counted over the global "
        "batch lets experts specialise in domains more than one that counts each micro-batch.",
        source=f"{PAPER}, the analysis of expert selection by domain",
        figure="pictures of selection frequencies, without a number",
        treatment="global batch",
        references=("micro-batch",),
        metrics=("specialisation",),
    ),
    Claim(
        name="lower loss",
        statement="It also gives a lower loss on held-out documents.",
        source=f"{PAPER}, table 1 (perplexity; 3.4B weights, 0.6B active, 120B tokens)",
        figure="perplexity 8.038 against 8.167, a loss lower by 0.016",
        treatment="global batch",
        references=("micro-batch",),
        metrics=("loss",),
    ),
    Claim(
        name="no price",
        statement="At least it costs no loss: counting each micro-batch is not better.",
        source="what remains to be asked where the loss is not lower",
        figure=None,
        treatment="micro-batch",
        references=("global batch",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="not by weakening",
        statement="A micro-batch loss of a tenth of the weight is no substitute: the global batch "
        "gives more specialisation and a lower loss.",
        source=f"{PAPER}, table 4 (there the perplexity at half and an eighth of the weight)",
        figure="perplexity 8.038 against 8.154 and 8.159",
        treatment="global batch",
        references=("micro-batch, a tenth of the weight",),
        metrics=("specialisation", "loss"),
    ),
    Claim(
        name="the mixture counts",
        statement="It is the mixture of texts that is counted over, not their number: micro-"
        "batches of the same size, dealt from all domains, already let experts specialise more "
        "than micro-batches of one domain.",
        source=f"{PAPER}, table 2 (there loads are drawn from the global batch's tokens)",
        figure="perplexity 8.041 (drawn), 8.038 (global), 8.167 (micro-batch)",
        treatment="micro-batch, shuffled",
        references=("micro-batch",),
        metrics=("specialisation",),
    ),
    Claim(
        name="balance is kept",
        statement="Over all texts, the load is as even as with the micro-batch loss: that one is "
        "not better.",
        source=f"{PAPER}, what the loss is for",
        figure=None,
        treatment="micro-batch",
        references=("global batch",),
        metrics=("balance",),
        expected="not better",
    ),
    Claim(
        name="balance is needed",
        statement="Without a balance loss the load is less even than with the global batch's.",
        source=f"{PAPER}, what the loss is for",
        figure=None,
        treatment="global batch",
        references=("no balance loss",),
        metrics=("balance",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Texts, decoder, tokens that every design reads and seeds, at one claim size."""

    texts: Literal["smoke", "demo", "full"]
    n_layers: int
    width: int
    context: int
    n_tokens: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", n_layers=3, width=32, context=32, n_tokens=2_000, seeds=2),
    "laptop": Budget("demo", n_layers=4, width=128, context=128, n_tokens=250_000, seeds=3),
    "full": Budget("full", n_layers=6, width=192, context=256, n_tokens=6_000_000, seeds=5),
}
MICRO_BATCHES = 6  # each of the three domains twice
SEQUENCES_PER_MICRO_BATCH = 2


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
        batch_size=MICRO_BATCHES * SEQUENCES_PER_MICRO_BATCH,
        batching="by-domain",
        accumulation=MICRO_BATCHES,
    )

    def counted(scope: str, **params: Any) -> dict[str, Any]:
        return {"balance": "global-balance", "scope": scope, "coefficient": 0.01, **params}

    designs = [
        Design("micro-batch", "top-k", counted("micro")),
        Design("global batch", "top-k", counted("global")),
        Design("micro-batch, a tenth of the weight", "top-k", counted("micro", coefficient=0.001)),
        Design("micro-batch, shuffled", "top-k", counted("micro", batching="shuffled")),
        Design("no balance loss", "top-k", {"balance": None}),
    ]
    if size == "full":
        mixed = {"name": "global-balance", "scope": "global", "micro_share": 0.01}
        designs += [
            Design("global batch and 1 % micro-batch", "top-k", {"balance": mixed}),
            Design("balanced by a bias", "loss-free"),
            Design("dense", "dense"),
        ]
    return Study(
        problem,
        Designs(designs),
        reference="micro-batch",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
