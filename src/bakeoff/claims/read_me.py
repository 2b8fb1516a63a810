"""Read-ME: what the paper says of domain experts cut from a dense decoder, run.

The protocol, fixed beforehand: a decoder of 1.3 million weights is trained on three domains, once,
and is then the dense decoder that all designs begin with. Half of its feed-forward channels are
kept per token. Rules and rates are the paper's (channels by their mean size, a fifth of the tokens
for the router and the rest for the experts in eight rounds, the official routing loss, the
experts' rate a sixth of the peak of the decoder's own training, the router's ten times that); how
many tokens are read was set by the time that it takes. Designs that are tuned read one order of
texts: all of the tokens, where router and experts are tuned or there is no router; the experts'
four fifths or the router's fifth, where only they are. The paper refactors a decoder of 7 billion
weights that had read 2 trillion tokens and tunes it on 1 billion: a claim that fails here says what
so small a decoder does not show, not that the paper is wrong. The full size refactors SmolLM2-135M
instead, at the paper's own rates; a narrow decoder from scratch has no counterpart there, since
what that model was trained on is not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size
from bakeoff.models.small_gpt import SmallGPT

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Cai et al., "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System '
    'Co-Design", NeurIPS 2024, arXiv 2410.19123'
)

CLAIMS = (
    Claim(
        name="central",
        statement="A dense decoder refactored into domain experts behind a router that runs first "
        "has a lower loss than a dense decoder of equal active size cut from it by all domains' "
        "statistics, and than experts of random channels, tuned on the same tokens.",
        source=f"{PAPER}, main results (there MMLU, against dense models of 2.7 and 3.4 billion "
        "weights of other origin)",
        figure="38.9 on MMLU with 4.7B of 17B weights active; Sheared-Llama 2.7B 26.4, "
        "Open-Llama-v2 3.4B 25.7",
        treatment="Read-ME",
        references=("pooled mask", "random masks"),
        metrics=("loss",),
    ),
    Claim(
        name="masks",
        statement="Before any training and with the domain known, the channels that a domain uses "
        "most lose less than those that all domains together use most, and than random ones.",
        source="not in the paper by itself; what its construction of experts rests on",
        figure=None,
        treatment="Read-ME, domain known, not tuned",
        references=("pooled mask, not tuned", "random masks, domain known, not tuned"),
        metrics=("loss",),
    ),
    Claim(
        name="router",
        statement="A router that is trained alone, on channels that the dense decoder uses, makes "
        "domain experts better than the channels that all domains together use most.",
        source="not in the paper; how much of the choice of domains a router recovers",
        figure=None,
        treatment="Read-ME, router alone tuned",
        references=("pooled mask, not tuned",),
        metrics=("loss",),
    ),
    Claim(
        name="oracle",
        statement="Knowing the domain of every text is not better than the router, after tuning.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="Read-ME, domain known",
        references=("Read-ME",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="from scratch",
        statement="A dense decoder of equal active size trained from random weights, on as many "
        "tokens as the dense decoder and its tuning together, is not better.",
        source=f"{PAPER}, comparison with small dense models that were trained on far more tokens",
        figure="1 billion tokens of tuning; Open-Llama-v2 3.4B 1 trillion",
        treatment="narrow dense, from scratch",
        references=("Read-ME",),
        metrics=("loss",),
        expected="not better",
    ),
    Claim(
        name="locality",
        statement="A causal router sends more tokens to the expert of the token before than a "
        "router that sees one token at a time.",
        source=f"{PAPER}, temporal locality (there against the routers of Mixtral)",
        figure="2,921 of 4,096 tokens; Mixtral 850",
        treatment="Read-ME",
        references=("Read-ME, token-only router",),
        metrics=("locality",),
    ),
)

DESIGNS = (
    "dense teacher",
    "narrow dense, from scratch",
    "Read-ME",
    "Read-ME, domain known",
    "Read-ME, domain known, not tuned",
    "Read-ME, router alone tuned",
    "Read-ME, token-only router",
    "random masks",
    "random masks, domain known, not tuned",
    "pooled mask",
    "pooled mask, not tuned",
)


@dataclass(frozen=True)
class Budget:
    """Texts, the dense decoder, tokens and seeds, at one claim size."""

    texts: Literal["smoke", "demo", "full"]
    base: str
    shape: SmallGPT
    teacher_tokens: int
    n_tokens: int
    calibration_tokens: int
    context: int
    batch_size: int
    seeds: int


# As `SMALL_SHAPE` of the problem, whose module is too heavy to list claims with.
_SMALL = SmallGPT(vocabulary=2048, n_layers=4, width=128, n_heads=4, context=128)

BUDGETS: dict[Size, Budget] = {
    "smoke": Budget(
        texts="smoke",
        base="small-gpt",
        shape=SmallGPT(vocabulary=400, n_layers=2, width=32, n_heads=2, context=96),
        teacher_tokens=8_000,
        n_tokens=4_000,
        calibration_tokens=2_000,
        context=96,
        batch_size=4,
        seeds=2,
    ),
    "laptop": Budget(
        texts="demo",
        base="small-gpt",
        shape=_SMALL,
        teacher_tokens=1_200_000,
        n_tokens=130_000,
        calibration_tokens=16 * 4096,
        context=128,
        batch_size=4,
        seeds=3,
    ),
    "full": Budget(
        texts="full",
        base="smollm2-135m",
        shape=_SMALL,
        teacher_tokens=1,
        n_tokens=4_000_000,
        calibration_tokens=16 * 4096,
        context=1024,
        batch_size=8,
        seeds=3,
    ),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.experts.problem.refactoring import RefactoringProblem, refactoring_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = RefactoringProblem(
        budget.texts,
        base=budget.base,
        shape=budget.shape,
        teacher_tokens=budget.teacher_tokens,
        n_tokens=budget.n_tokens,
        calibration_tokens=budget.calibration_tokens,
        context=budget.context,
        batch_size=budget.batch_size,
        device=_device() if size == "full" else "cpu",
    )
    designs = list(refactoring_designs())
    if size == "full":
        designs = [design for design in designs if design.method != "dense-narrow"]
    else:
        designs = [design for design in designs if design.name in DESIGNS]
    return Study(
        problem,
        Designs(designs),
        reference="pooled mask",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
