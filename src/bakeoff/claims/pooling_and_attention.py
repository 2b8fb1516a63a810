"""Multi-layer trainable pooling and the pooling-attention grid: what the paper says, run.

The base model is frozen and all heads get the same pairs, steps and seeds: a question about pooling
alone. The paper also trains adapters in the base model; `bakeoff run --train lora` does that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Tang and Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding '
    'Models?", arXiv 2409.02727'
)
TREATMENT = "multi-layer pooling, bidirectional"

CLAIMS = (
    Claim(
        name="central",
        statement="Multi-layer trainable pooling with bidirectional attention beats pooling the "
        "last token under causal attention in retrieval and similarity (here the base is frozen, "
        "so the last token has nothing to train).",
        source=f"{PAPER}, abstract",
        figure=None,
        treatment=TREATMENT,
        references=("last token, causal",),
        metrics=("mrr_at_10", "spearman"),
    ),
    Claim(
        name="all-layers",
        statement="Pooling all layers beats pooling the last layer with a head of the same kind, "
        "both bidirectional.",
        source=f"{PAPER}, comparison of designs 4 and 5",
        figure=None,
        treatment=TREATMENT,
        references=("last-layer pooling, bidirectional",),
        metrics=("score",),
    ),
    Claim(
        name="earns-its-parameters",
        statement="The gain is the cross-attention's: the head also beats simple ways to use all "
        "layers (our question; the paper has no such control).",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment=TREATMENT,
        references=("best layer, centred", "scalar mix of layers", "all layers + linear"),
        metrics=("score",),
    ),
    Claim(
        name="not-everywhere",
        statement="In clustering and classification it does not beat simple mean pooling.",
        source=f"{PAPER}, abstract (there against last-token pooling)",
        figure=None,
        treatment=TREATMENT,
        references=("mean, causal",),
        metrics=("v_measure", "accuracy"),
        expected="not better",
    ),
    Claim(
        name="bidirectional",
        statement="Removing the causal mask helps multi-layer pooling.",
        source=f"{PAPER}, comparison of designs 3 and 5",
        figure=None,
        treatment=TREATMENT,
        references=("multi-layer pooling, causal",),
        metrics=("score",),
    ),
)
DESIGNS = (
    "last token, causal",
    "mean, causal",
    "mean, bidirectional",
    "best layer, centred",
    "scalar mix of layers",
    "all layers + linear",
    "last-layer pooling, causal",
    "last-layer pooling, bidirectional",
    "multi-layer pooling, causal",
    TREATMENT,
)


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.claims.embedding_budget import pooling_study

    return pooling_study(
        size, DESIGNS, reference="mean, causal", directory=directory, workers=workers
    )
