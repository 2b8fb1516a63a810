"""NV-Embed: what the paper says of latent-attention pooling, run.

The base model is frozen and all heads get the same pairs, steps and seeds: a question about pooling
alone, with the control that the paper lacks (a perceptron with as many parameters).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding '
    'Models", ICLR 2025, arXiv 2405.17428'
)
TREATMENT = "latent attention, bidirectional"

CLAIMS = (
    Claim(
        name="central",
        statement="Latent-attention pooling beats mean pooling and last-token pooling, all "
        "bidirectional (here the base is frozen, so those two have nothing to train).",
        source=f"{PAPER}, pooling ablation",
        figure="mean over 56 MTEB tasks 69.32 against 68.97 (mean) and 67.85 (last token)",
        treatment=TREATMENT,
        references=("mean, bidirectional", "last token, bidirectional"),
        metrics=("score",),
    ),
    Claim(
        name="more-than-parameters",
        statement="The gain is the latent dictionary's: latent attention beats a residual "
        "perceptron with as many parameters followed by the mean (our question).",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment=TREATMENT,
        references=("residual MLP + mean, bidirectional",),
        metrics=("score",),
    ),
    Claim(
        name="causal",
        statement="Under causal attention, too, latent attention beats mean pooling and the "
        "perceptron (our question).",
        source="not in the paper for the perceptron; mean pooling in its attention ablation",
        figure="68.47 against 68.13 (mean)",
        treatment="latent attention, causal",
        references=("mean, causal", "residual MLP + mean, causal"),
        metrics=("score",),
    ),
    Claim(
        name="bidirectional",
        statement="Removing the causal mask helps latent attention.",
        source=f"{PAPER}, attention ablation",
        figure="69.32 against 68.47",
        treatment=TREATMENT,
        references=("latent attention, causal",),
        metrics=("score",),
    ),
)
DESIGNS = (
    "last token, bidirectional",
    "mean, causal",
    "mean, bidirectional",
    "residual MLP + mean, causal",
    "residual MLP + mean, bidirectional",
    "latent attention, causal",
    TREATMENT,
)


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.claims.embedding_budget import pooling_study

    return pooling_study(
        size, DESIGNS, reference="mean, causal", directory=directory, workers=workers
    )
