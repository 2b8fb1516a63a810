"""Sums over tokens: how often experts are chosen, and means without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def count_choices(indices: Tensor, n_experts: int) -> Tensor:
    """Return ``(n_experts,)`` int64: how often each index occurs; -1 is no choice.

    Examples
    --------
    >>> import torch
    >>> count_choices(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    # Index 0 collects the -1.
    flat = indices.reshape(-1) + 1
    found = flat.new_zeros(n_experts + 1)
    return found.scatter_add_(0, flat, flat.new_ones(flat.shape))[1:]


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over tokens, the first axis, without padding; 0 if all is padding."""
    if mask is None:
        # Not `mean`, whose gradient would be divided row by row.
        return values.sum(dim=0) / max(len(values), 1)
    kept = values.masked_fill(~mask.view(-1, *[1] * (values.ndim - 1)), 0.0)
    return kept.sum(dim=0) / mask.sum().clamp_min(1)
