"""Mixture of shards: what the paper says of adapters cut from one pool of parameters, run.

The protocol: a decoder of eight layers and 0.6 million weights is trained beforehand on two domains
and a little of the third, and adapted to the third: once to Python, once to Bulgarian. Every
adapter trains at most the parameters of LoRA of rank 2 on all linear layers, but for LoRA of eight
times the rank, and reads the same 30,000 tokens; its learning rate is looked for on training texts
set aside, in one way for all. The working rank is 8, with 4 shards to a vector and half of the
budget private. Decoder, vocabulary and tokens were set by the time they take and so that LoRA of
rank 16 leaves LoRA of rank 2 behind (with a larger vocabulary or fewer steps it does not, and rank
would be no question), before any adapter with shared parameters was run. The paper adapts decoders
of 7 and 13 billion weights and 32 to 40 layers to instructions for 10,000 steps and judges by
tasks, so that a claim that fails here says what small decoders do not show, not that the paper is
wrong. The full size adapts SmolLM2-135M as it is, on a million tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of '
    'Shards", ICLR 2025, arXiv 2410.00938'
)

CLAIMS = (
    Claim(
        name="central",
        statement="At equal trained parameters, a mixture of shards adapts a decoder to a new "
        "domain better than LoRA and better than one pair of matrices shared by all layers.",
        source=f"{PAPER}, the main comparison at 5.00 million parameters on Llama-2-7B (there the "
        "mean of six task scores) and the motivating one",
        figure="36.39 against 34.98 for LoRA of rank 2",
        treatment="MoS",
        references=("LoRA", "pure sharing"),
        metrics=("loss",),
    ),
    Claim(
        name="sharing alone",
        statement="Sharing alone hurts: LoRA is better than one pair of matrices shared by all "
        "layers at equal trained parameters.",
        source=f"{PAPER}, the motivating comparison",
        figure="worse than LoRA of rank 2 on 3 of 5 tasks",
        treatment="LoRA",
        references=("pure sharing",),
        metrics=("loss",),
    ),
    Claim(
        name="privatisation",
        statement="Shards that one layer has to itself help.",
        source=f"{PAPER}, the ablation at 19.99 million parameters",
        figure="more than 1 point lost without",
        treatment="MoS",
        references=("MoS without privatisation",),
        metrics=("loss",),
    ),
    Claim(
        name="dissociation",
        statement="Drawing the two matrices' shards independently of each other helps.",
        source=f"{PAPER}, the ablation at 19.99 million parameters",
        figure="more than 1 point lost without",
        treatment="MoS",
        references=("MoS without dissociation",),
        metrics=("loss",),
    ),
    Claim(
        name="sharding",
        statement="Joining vectors from several shards helps.",
        source=f"{PAPER}, the ablation at 19.99 million parameters",
        figure="about 0.4 points lost without",
        treatment="MoS",
        references=("MoS without sharding",),
        metrics=("loss",),
    ),
    Claim(
        name="subset selection",
        statement="A random subset of the pool for each layer is better than the whole public pool "
        "for all.",
        source=f"{PAPER}, the motivating comparison (there without the other strategies)",
        figure="more than 1 point above LoRA by subset selection alone, pure sharing below it",
        treatment="MoS",
        references=("MoS without subset selection",),
        metrics=("loss",),
    ),
    Claim(
        name="rivals",
        statement="At equal trained parameters, a mixture of shards is better than Tied-LoRA and "
        "than PRoLoRA.",
        source=f"{PAPER}, the main comparison at 5.00 million parameters",
        figure="36.39 against 35.26 and 36.03",
        treatment="MoS",
        references=("Tied-LoRA", "PRoLoRA"),
        metrics=("loss",),
    ),
    Claim(
        name="eight times fewer",
        statement="LoRA with eight times the parameters is not better than a mixture of shards.",
        source=f"{PAPER}, the main comparison: 19.99 million parameters against LoRA of rank 64 "
        "with 159.9 million",
        figure="37.53 for LoRA, 37.63 for the mixture",
        treatment="LoRA, 8 times the rank",
        references=("MoS",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="ceiling",
        statement="A mixture of shards is not better than LoRA with eight times the parameters, "
        "which has the same number of vectors in every layer, all of them its own.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="MoS",
        references=("LoRA, 8 times the rank",),
        metrics=("loss",),
        expected="not better",
    ),
)

DESIGNS = (
    "not adapted",
    "LoRA",
    "pure sharing",
    "Tied-LoRA",
    "PRoLoRA",
    "MoS",
    "MoS without privatisation",
    "MoS without dissociation",
    "MoS without sharding",
    "MoS without subset selection",
    "LoRA, 8 times the rank",
)


@dataclass(frozen=True)
class Budget:
    """Texts, decoder, what is adapted to, tokens that every adapter reads, and seeds."""

    texts: Literal["smoke", "demo", "full"]
    base: str
    targets: tuple[str, ...]
    n_tokens: int
    base_tokens: int
    search_share: float
    batch_size: int
    context: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget(
        *("smoke", "small-gpt", ("bulgarian",)),
        n_tokens=512,
        base_tokens=8_000,
        search_share=0.0,
        batch_size=2,
        context=128,
        seeds=2,
    ),
    "laptop": Budget(
        *("demo", "small-gpt", ("python", "bulgarian")),
        n_tokens=30_000,
        base_tokens=400_000,
        search_share=0.5,
        batch_size=2,
        context=128,
        seeds=3,
    ),
    "full": Budget(
        *("full", "smollm2-135m", ("python", "bulgarian")),
        n_tokens=1_000_000,
        base_tokens=1,  # a model that is named comes trained
        search_share=0.25,
        batch_size=16,
        context=256,
        seeds=3,
    ),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.experts.problem.adapters import AdapterProblem, adapter_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = AdapterProblem(
        budget.texts,
        base=budget.base,
        targets=budget.targets,
        n_tokens=budget.n_tokens,
        base_tokens=budget.base_tokens,
        search_share=budget.search_share,
        batch_size=budget.batch_size,
        context=budget.context,
        device=_device() if size == "full" else "cpu",
    )
    designs = adapter_designs()
    if size != "full":
        designs = Designs([design for design in designs if design.name in DESIGNS])
    return Study(
        problem,
        designs,
        reference="LoRA",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
