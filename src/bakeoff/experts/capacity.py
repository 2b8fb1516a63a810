"""How many tokens an expert takes, and which it drops when there are more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bakeoff.errors import DataError
from bakeoff.experts.protocol import Routing

POLICIES = ("probs", "position", "priority", "random")
"""Drop policies, see `seats`."""


def expert_capacity(
    n_tokens: int,
    n_experts: int,
    k: int = 1,
    factor: float = 1.25,
    *,
    multiple_of: int | None = None,
    minimum: int = 1,
) -> int:
    """Return ``ceil(factor * k * n_tokens / n_experts)``, at least `minimum`.

    Parameters
    ----------
    n_tokens
        Tokens without padding.
    n_experts, k
        Experts, and choices per token.
    factor
        1 is just enough for a perfectly balanced load.
    multiple_of
        Round up to a multiple of this.
    minimum
        Lower bound.

    Examples
    --------
    >>> expert_capacity(4096, 8, k=2, factor=1.25)
    1280
    """
    if not factor > 0:
        raise DataError(f"capacity factor must be above 0, got {factor}")
    # Rounded before the ceiling, because 1.1 * 10 is a little more than 11.
    capacity = math.ceil(round(factor * k * n_tokens / n_experts, 9))
    if multiple_of:
        capacity += -capacity % multiple_of
    return max(capacity, minimum)


def seats(routing: Routing, policy: str, generator: torch.Generator | None = None) -> Tensor:
    """Return ``(T, K)`` int64: each assignment's place in its expert's queue, from 0.

    Parameters
    ----------
    routing
        The assignments; -1 gets no seat and the place -1.
    policy
        Who goes first. ``"probs"``: the largest weight. ``"position"``: first come first served,
        all tokens' first choices before any second choice. ``"priority"``: the same, but tokens
        in order of their largest weight (batch-priority routing). ``"random"``.
    generator
        For ``"random"``; None draws from torch's own generator.

    Raises
    ------
    bakeoff.errors.DataError
        If the policy is unknown.
    """
    indices, weights = routing.indices, routing.weights.detach()
    n_tokens, k = indices.shape
    device = indices.device
    flat = indices.reshape(-1)
    if policy == "probs":
        queue = weights.reshape(-1).argsort(descending=True, stable=True)
    elif policy in ("position", "priority"):
        tokens = torch.arange(n_tokens, device=device)
        if policy == "priority":
            tokens = weights.amax(dim=1).argsort(descending=True, stable=True)
        queue = (tokens[None, :] * k + torch.arange(k, device=device)[:, None]).reshape(-1)
    elif policy == "random":
        queue = torch.rand(flat.shape, generator=generator, device=device).argsort()
    else:
        raise DataError(f"unknown drop policy {policy!r}; there are: {', '.join(POLICIES)}")
    by_expert = queue[flat[queue].argsort(stable=True)]
    experts = flat[by_expert]
    counts = torch.cat([(flat < 0).sum()[None], routing.counts])
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[by_expert] = torch.arange(len(flat), device=device) - starts[experts + 1]
    return place.masked_fill(flat < 0, -1).view(n_tokens, k)


def within_capacity(
    routing: Routing, capacity: int, policy: str, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``(T, K)`` bool: which assignments find a seat among `capacity` per expert."""
    place = seats(routing, policy, generator)
    return (place >= 0) & (place < capacity)
