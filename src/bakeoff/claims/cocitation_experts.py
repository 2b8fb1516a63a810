"""Co-citation experts: what the paper says of one mixture against shared and single models, run.

The protocol: functions and classes of the standard library whose docstrings are the texts; what a
function uses, it cites; five areas of the library are the domains. The encoder is MiniLM, already
trained on pairs of texts, cut to its first three layers. Every trained design reads about 1,000
pairs of the same training set, three quarters of it, in 64 steps at the paper's learning rate (LoRA
at ten times that), with symmetric MNR over cosines and the encoder's own pooling. Documents to
judge by are in no training pair. Layers, steps and rates were set by the time they take, before any
design was judged. F1max and ROC-AUC are those of each domain by itself, averaged; the paper's
figures over all domains are of all pairs together, with one threshold. The paper trains a language
model of 22 layers that has not seen pairs before, with a new pooling and until validation scores
fall, so that a claim that fails here says what few pairs and a small encoder do not show, not that
the paper is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Hallee et al., "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings '
    'in Biological Databases", Scientific Reports 2025, arXiv 2401.15713'
)

CLAIMS = (
    Claim(
        name="central",
        statement="One encoder with an expert for each domain tells pairs that are cited together "
        "from others better than one dense encoder with domain tokens, trained on the same pairs.",
        source=f"{PAPER}, table 3 (all domains)",
        figure="F1max 0.8875 against 0.8770, ROC-AUC 0.9426 against 0.9338",
        treatment="domain experts",
        references=("shared, domain tokens",),
        metrics=("f1", "auc"),
    ),
    Claim(
        name="one for many",
        statement="One encoder of each domain's own is not better than the one with experts.",
        source=f"{PAPER}, tables 3, 5 and 8 and the released results",
        figure="F1max of COPD 0.8270 against 0.7861, of autoimmune diseases 0.8904 against 0.8908: "
        "better in 4 of 5 domains",
        treatment="single-domain",
        references=("domain experts",),
        metrics=("f1", "auc"),
        expected="not better",
    ),
    Claim(
        name="free labels",
        statement="Trained on pairs that are cited together, the encoder with experts is better "
        "than the untrained one, TF-IDF and BM25.",
        source=f"{PAPER}, table 3 (there without BM25)",
        figure="F1max 0.8875 against 0.7940 (MiniLM) and 0.7523 (TF-IDF)",
        treatment="domain experts",
        references=("untrained", "TF-IDF", "BM25"),
        metrics=("f1", "auc"),
    ),
    Claim(
        name="one layer",
        statement="Experts in the middle layer alone are already better than none.",
        source=f"{PAPER}, abstract of the first versions: one layer has most of the benefit",
        figure="85 % of the benefit",
        treatment="domain experts, middle layer",
        references=("shared, domain tokens",),
        metrics=("f1", "auc"),
    ),
    Claim(
        name="own domain",
        statement="Experts and token of the own domain are better than those of another one.",
        source="not in the paper; a sceptic's control: otherwise nothing has specialised",
        figure=None,
        treatment="domain experts",
        references=("domain experts, wrong domain",),
        metrics=("mrr", "auc"),
    ),
    Claim(
        name="rivals",
        statement="The encoder with experts is better than an adapter for each domain and than a "
        "dense encoder whose feed-forward blocks are as large as all experts together.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="domain experts",
        references=("LoRA per domain", "wider"),
        metrics=("f1", "auc"),
    ),
    Claim(
        name="negatives",
        statement="Where batches are of one domain each, so that no negative is easy, experts are "
        "still better than one dense encoder with domain tokens.",
        source="not in the paper, whose batches are mixed; a sceptic's control",
        figure=None,
        treatment="domain experts, batches by domain",
        references=("shared, batches by domain",),
        metrics=("f1", "auc"),
    ),
    Claim(
        name="ranking",
        statement="Experts rank the partner of a text higher among all documents of its domain "
        "than one dense encoder with domain tokens does.",
        source="not in the paper, which judges pairs by themselves",
        figure=None,
        treatment="domain experts",
        references=("shared, domain tokens",),
        metrics=("mrr",),
    ),
)

DESIGNS = (
    "untrained",
    "TF-IDF",
    "BM25",
    "shared, domain tokens",
    "domain experts",
    "domain experts, middle layer",
    "single-domain",
    "LoRA per domain",
    "wider",
    "domain experts, batches by domain",
    "shared, batches by domain",
    "domain experts, wrong domain",
)


@dataclass(frozen=True)
class Budget:
    """Pairs, layers of the encoder, steps, and seeds, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    n_layers: int | None
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    evaluate_every: int | None
    max_length: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", 1, 2, 4, (1e-4,), None, 24, seeds=2),
    "laptop": Budget("demo", 3, 64, 16, (1e-4,), None, 32, seeds=3),
    "full": Budget("full", None, 1000, 32, (3e-5, 1e-4, 3e-4), 100, 128, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.embedding.problem.domains import DomainEncoderProblem, domain_encoder_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = DomainEncoderProblem(
        budget.data,
        n_layers=budget.n_layers,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rates=budget.learning_rates,
        evaluate_every=budget.evaluate_every,
        max_length=budget.max_length,
        device=_device() if size == "full" else "cpu",
        keep_models=False,  # claims need no winner, and every trial would leave a model
    )
    known = {design.name: design for design in domain_encoder_designs()}
    # Those that others wait for first: the wrong domain judges what the right one trained.
    names = [*DESIGNS, *(known if size == "full" else ())]
    return Study(
        problem,
        Designs([known[name] for name in dict.fromkeys(names)]),
        reference="shared, domain tokens",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
