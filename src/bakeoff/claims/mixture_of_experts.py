"""Mixture of experts: what a survey says of routers, balance, drops and fine experts, run.

The protocol: a decoder of 1.3 million weights and a vocabulary of 2,048 are made anew from texts of
three domains (Python, English, Bulgarian). Every design reads the same number of tokens from the
same first weights outside its feed-forward layers. Mixtures have the dense decoder's active size:
two of eight experts of half its feed-forward width, or four of sixteen of a quarter. They are
judged by the loss of held-out documents. The settings are the survey's common ones: balance loss
0.01, z-loss 0.001, nothing dropped but where a claim is about drops. The number of tokens was set
by the time that training takes, not by what came out: 200,000 at the laptop size, 5 million at the
full size. Mixtures are trained on billions elsewhere, so that a claim that fails here says what so
little training does not show yet, not that the paper is wrong: after 200,000 tokens a decoder is
still learning which token follows which, what experts that belong to tokens serve directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'Cai et al., "A Survey on Mixture of Experts in Large Language Models", IEEE TKDE 2025, '
    "arXiv 2407.06204"
)

CLAIMS = (
    Claim(
        name="central",
        statement="At equal active size and equal tokens, a decoder that chooses two of eight "
        "half-wide experts for each token has a lower loss than a dense one, and than one whose "
        "experts a hash of the token chooses.",
        source=f"{PAPER}, sections on sparse gates with token choice and on non-trainable gates",
        figure=None,
        treatment="top-2",
        references=("dense", "hash of the token"),
        metrics=("loss",),
    ),
    Claim(
        name="learned routing",
        statement="A learned router has a lower loss than experts drawn at random.",
        source="not in the paper; a sceptic's control: is it the router, or the weights?",
        figure=None,
        treatment="top-2",
        references=("random",),
        metrics=("loss",),
    ),
    Claim(
        name="balance loss",
        statement="The balance loss makes the load of the experts more even.",
        source=f"{PAPER}, table of auxiliary losses and their coefficients",
        figure="coefficient 0.01 (Switch, GShard)",
        treatment="top-2",
        references=("top-2, no balance loss",),
        metrics=("balance",),
    ),
    Claim(
        name="drops",
        statement="Where experts take only three quarters of an even load, dropping the tokens "
        "with the smallest weights gives a lower loss than dropping those that come last.",
        source=f"{PAPER}, on capacity, from Riquelme et al., arXiv 2106.05974 (there in vision)",
        figure=None,
        treatment="top-2, tight, by priority",
        references=("top-2, tight, by position",),
        metrics=("loss",),
    ),
    Claim(
        name="fine-grained",
        statement="At equal active and equal total size, four of sixteen experts have a lower loss "
        "than two of eight.",
        source=f"{PAPER}, section on the number and size of experts",
        figure="LLaMA-MoE: 4 of 16 experts of width 688 slightly better than 2 of 8 of 1,376",
        treatment="fine-grained, 4 of 16",
        references=("top-2",),
        metrics=("loss",),
    ),
    Claim(
        name="not for nothing",
        statement="The mixture is not better than a dense decoder whose feed-forward layers are as "
        "wide as all experts together, which costs more at every token.",
        source="not in the paper; the ceiling that a mixture approaches at less cost",
        figure=None,
        treatment="top-2",
        references=("dense, as wide as all experts",),
        metrics=("loss",),
        expected="not better",
    ),
)

DESIGNS = (
    "dense",
    "dense, as wide as all experts",
    "top-2",
    "top-2, no balance loss",
    "top-2, tight, by position",
    "top-2, tight, by priority",
    "fine-grained, 4 of 16",
    "hash of the token",
    "random",
)


@dataclass(frozen=True)
class Budget:
    """Texts, tokens that every design reads, sequences per step and seeds, at one claim size."""

    texts: Literal["smoke", "demo", "full"]
    n_tokens: int
    batch_size: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", 2_000, batch_size=4, seeds=2),
    "laptop": Budget("demo", 200_000, batch_size=4, seeds=3),
    "full": Budget("full", 5_000_000, batch_size=8, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.experts.problem.common import SMALL_SHAPE
    from bakeoff.experts.problem.layers import LayerProblem, layer_designs
    from bakeoff.models.small_gpt import SmallGPT
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    # That everything runs is seen on a decoder of any size.
    tiny = SmallGPT(vocabulary=512, n_layers=2, width=64, n_heads=2, context=64)
    problem = LayerProblem(
        budget.texts,
        shape=tiny if size == "smoke" else SMALL_SHAPE,
        n_tokens=budget.n_tokens,
        batch_size=budget.batch_size,
    )
    designs = layer_designs()
    if size != "full":
        designs = Designs([design for design in designs if design.name in DESIGNS])
    return Study(
        problem,
        designs,
        reference="dense",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
