"""What is done about the order of pieces without set-based prompting, by the name designs have.

The rivals of the other methods stand beside them: readers of documents in `document_baselines`,
masking and rejection among the methods of `sample_aligned`, scores that need no fitting in
`deferral_rules`, training objectives in `codegen2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bakeoff.decoding.set_based_prompting import (
    OrderEnsembleModel,
    PlainOrderModel,
    SetPromptingModel,
)
from bakeoff.errors import DataError

_JOINT = {"joint_tokens": "a boolean"}
_ORDERS = {"n_orders": "a positive whole number, or null for all", **_JOINT}

ORDER_PARAMETERS: dict[str, dict[str, str]] = {
    "plain-order": _JOINT,
    "sorted-order": _JOINT,
    "set-based": {
        "edit_mask": "a boolean",
        "edit_positions": "a boolean",
        "canonical_order": "a boolean",
    },
    "permute-and-vote": _ORDERS,
    "average-over-orders": _ORDERS,
}
"""By method: the parameters that a design may set, and what each may be."""

OrderModel = SetPromptingModel | PlainOrderModel


def order_parts(
    method: str, params: Mapping[str, Any], random_state: int
) -> tuple[type[OrderModel], dict[str, Any], dict[str, Any]]:
    """Return a method's class, the arguments that make one, and those of its calls.

    Raises
    ------
    DataError
        If the method is unknown or does not take a parameter.
    """
    if method not in ORDER_PARAMETERS:
        raise DataError(
            f"{method!r} is no way to read pieces; there are: {', '.join(ORDER_PARAMETERS)}"
        )
    unknown = sorted(set(params) - set(ORDER_PARAMETERS[method]))
    if unknown:
        raise DataError(
            f"{method} takes {', '.join(ORDER_PARAMETERS[method])}; got {', '.join(unknown)}"
        )
    own = dict(params)
    if method == "set-based":
        order = own.pop("canonical_order", None)
        return SetPromptingModel, own, {} if order is None else {"canonical_order": order}
    if method in ("permute-and-vote", "average-over-orders"):
        own["aggregate"] = "vote" if method == "permute-and-vote" else "mean"
        return OrderEnsembleModel, {**own, "random_state": random_state}, {}
    return PlainOrderModel, own, {"canonical_order": True} if method == "sorted-order" else {}


def order_model(
    method: str,
    params: Mapping[str, Any],
    model: Any,
    tokenizer: Any = None,
    *,
    random_state: int = 0,
    **options: Any,
) -> tuple[OrderModel, dict[str, Any]]:
    """Return a method's model, and the arguments that its `generate` and `score` need.

    Parameters
    ----------
    method, params
        Of the design; see `ORDER_PARAMETERS`.
    model, tokenizer
        As for `SetPromptingModel`.
    random_state
        Seed of the orders that a vote or a mean draws.
    **options
        As for `SetPromptingModel`: ``batch_size``, ``add_special_tokens``.

    Raises
    ------
    DataError
        If the method is unknown or does not take a parameter.

    Examples
    --------
    >>> from bakeoff.decoding import SetPrompt
    >>> from bakeoff.models import load_language_model
    >>> reader, arguments = order_model(
    ...     "sorted-order", {}, load_language_model("smollm2-135m")
    ... )  # doctest: +SKIP
    >>> prompt = SetPrompt.from_options("Which is a fruit?", ["oak", "fig"])
    >>> reader.predict([prompt], [' "oak"', ' "fig"'], **arguments)  # doctest: +SKIP
    array([1])
    """
    kind, own, arguments = order_parts(method, params, random_state)
    return kind(model, tokenizer, **own, **options), arguments
