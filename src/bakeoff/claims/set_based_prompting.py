"""Set-based prompting: what the paper says of answers that cannot depend on the order, run.

Questions with four options, and questions with four passages, are put in several orders to an
instruct model of 135 million parameters, without a chat template, as the paper does with 0.1 to 13
billion. The options are in quotes, with neither numbers nor letters, and the one with the likeliest
tokens is the answer; there it is the one whose tokens have the highest logits while the model
generates. That options are scored in their quotes was settled on other questions, by how likely the
plain prompt finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    'McIlroy-Young et al., "Order-Independence Without Fine Tuning", NeurIPS 2024, arXiv 2406.06581'
)

CLAIMS = (
    Claim(
        name="central",
        statement="With both edits, of mask and of positions, more questions get the same answer "
        "in every order than as plain text, and than with either edit alone.",
        source=f"{PAPER}, the theorem and the ablation on MMLU",
        figure="all questions; as plain text Llama-2-7B-chat is right in every order on 16 % of "
        "questions and in some order on 43 %",
        treatment="set-based",
        references=("plain-order", "set-based, mask only", "set-based, positions only"),
        metrics=("consistency",),
    ),
    Claim(
        name="log-probabilities",
        statement="With both edits, the answers' log-probabilities differ less between orders than "
        "as plain text, and than with either edit alone.",
        source=f"{PAPER}, the theorem",
        figure="no difference in exact arithmetic",
        treatment="set-based",
        references=("plain-order", "set-based, mask only", "set-based, positions only"),
        metrics=("spread",),
    ),
    Claim(
        name="worst-order",
        statement="More questions are answered right in every order than as plain text.",
        source=f"{PAPER}, comparison with all orders on MMLU",
        figure="27 % against 16 % (Llama-2-7B-chat)",
        treatment="set-based",
        references=("plain-order",),
        metrics=("every_order",),
    ),
    Claim(
        name="instruct",
        statement="An instruct model is right no more often than as plain text in the mean of the "
        "orders, as it was never trained on pieces that share positions.",
        source=f"{PAPER}, accuracy on MMLU and CSQA",
        figure="29.2 against 41.4 (MMLU) and 31.9 against 52.6 (CSQA), Llama-3-8B-instruct",
        treatment="set-based",
        references=("plain-order",),
        metrics=("accuracy",),
        expected="not better",
    ),
    Claim(
        name="vote",
        statement="It is right no more often than a vote over all 24 orders, which takes 24 passes "
        "and does not depend on the order either.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="set-based",
        references=("permute-and-vote, 24 orders",),
        metrics=("accuracy",),
        expected="not better",
    ),
    Claim(
        name="sorted",
        statement="It is right more often than the plain prompt with its pieces in alphabetical "
        "order, which does not depend on the order either and changes nothing in the model.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="set-based",
        references=("sorted-order",),
        metrics=("accuracy",),
    ),
)


@dataclass(frozen=True)
class Budget:
    """Questions, orders in which each is put, and draws of these, at one claim size."""

    data: Literal["smoke", "demo", "full"]
    n_orders: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget("smoke", n_orders=2, seeds=2),
    "laptop": Budget("demo", n_orders=4, seeds=3),
    "full": Budget("full", n_orders=6, seeds=5),
}


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.data.choices import choice_prompts
    from bakeoff.decoding.problem.ordering import OrderProblem, order_designs
    from bakeoff.study import Study

    budget = BUDGETS[size]
    return Study(
        OrderProblem(choice_prompts(budget.data), n_orders=budget.n_orders),
        order_designs(),
        reference="plain-order",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
