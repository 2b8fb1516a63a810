"""Bring tokens to their experts and the results back: four ways with one result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bakeoff.errors import DataError
from bakeoff.experts.expert_bank import ExpertBank
from bakeoff.experts.grouped import Workspace, autocast
from bakeoff.experts.token_sums import count_choices

DISPATCHERS = ("sort", "loop", "einsum", "batched")
"""Names that `dispatch` takes."""


def dispatch(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    experts: ExpertBank,
    how: str = "sort",
    workspace: Workspace | None = None,
) -> Tensor:
    """Return each token's weighted sum of its experts' outputs.

    Parameters
    ----------
    hidden
        ``(T, h)``.
    indices
        ``(T, K)`` int64; an index of -1, or beyond the experts (a null expert), adds nothing.
    weights
        ``(T, K)``.
    experts
        The networks.
    how
        ``"sort"``: rows sorted by expert, one grouped product; the fast one. ``"loop"``: expert by
        expert. ``"batched"``: each expert's rows padded to the longest, one batched product.
        ``"einsum"``: one-hot tensors ``(T, N, C)``, as on accelerators without sorting; memory
        grows with tokens times the heaviest load.
    workspace
        Where large results of ``"sort"`` live.

    Returns
    -------
    Tensor
        ``(T, n_out)`` in the dtype of `hidden`, summed in float32 or better.

    Raises
    ------
    bakeoff.errors.DataError
        If `how` is unknown.
    """
    if how not in DISPATCHERS:
        raise DataError(f"unknown dispatch {how!r}; there are: {', '.join(DISPATCHERS)}")
    indices = indices.masked_fill(indices >= experts.n_experts, -1)
    if how == "sort":
        return _sorted(hidden, indices, weights, experts, workspace or Workspace())
    if how == "loop":
        return _loop(hidden, indices, weights, experts)
    return _slots(hidden, indices, weights, experts, one_hot=how == "einsum")


def _sum_type(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _loop(hidden: Tensor, indices: Tensor, weights: Tensor, experts: ExpertBank) -> Tensor:
    total = hidden.new_zeros(len(hidden), experts.n_out, dtype=_sum_type(hidden))
    for expert in range(experts.n_experts):
        # An expert without tokens gets zero rows and so takes part in the graph.
        token, choice = (indices == expert).nonzero(as_tuple=True)
        rows = experts.one(expert, hidden[token]).to(total.dtype)
        total = total.index_add(0, token, rows * weights[token, choice, None].to(total.dtype))
    return total.to(hidden.dtype)


def _slots(
    hidden: Tensor, indices: Tensor, weights: Tensor, experts: ExpertBank, one_hot: bool
) -> Tensor:
    n_tokens, k = indices.shape
    order, sizes = _sort(indices, experts.n_experts)
    longest = max(1, int(sizes.max()))
    starts = sizes.cumsum(0) - sizes
    expert = indices.reshape(-1)[order]
    place = torch.arange(len(order), device=order.device) - starts[expert]
    token, slot = order // k, expert * longest + place
    kept = weights.reshape(-1)[order]
    if one_hot:
        table = hidden.new_zeros(n_tokens, experts.n_experts * longest, dtype=kept.dtype)
        combine = table.index_put((token, slot), kept, accumulate=True)
        sent = table.index_put((token, slot), torch.ones_like(kept)).to(hidden.dtype)
        # Tokens that go nowhere may hold NaN, and zero times NaN is NaN.
        clean = hidden.masked_fill((indices < 0).all(dim=1, keepdim=True), 0.0)
        slots = torch.einsum("ts,th->sh", sent, clean)
        results = experts.batched(slots.view(experts.n_experts, longest, -1)).flatten(0, 1)
        dtype = _sum_type(results)
        return torch.einsum("ts,sh->th", combine.to(dtype), results.to(dtype)).to(hidden.dtype)
    slots = hidden.new_zeros(experts.n_experts * longest, hidden.shape[1])
    slots = slots.index_put((slot,), hidden[token])
    results = experts.batched(slots.view(experts.n_experts, longest, -1)).flatten(0, 1)
    dtype = _sum_type(results)
    total = torch.zeros(n_tokens, experts.n_out, dtype=dtype, device=hidden.device)
    rows = results[slot].to(dtype) * kept[:, None].to(dtype)
    return total.index_add(0, token, rows).to(hidden.dtype)


def _sort(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Return the assignments sorted by expert, without those that go nowhere, and the loads."""
    sizes = count_choices(indices, n_experts)
    order = indices.reshape(-1).argsort(stable=True)
    # Those that go nowhere are sorted to the front.
    return order[len(order) - int(sizes.sum()) :], sizes


@dataclass(frozen=True)
class _Plan:
    """R assignments sorted by expert, and the way back.

    order (R,): the assignment, t * K + k, of each row. token (R,): its token. row (R,): the row of
    each assignment in the order of tokens. offsets (T,): where each token's assignments begin in
    `row`.
    """

    order: Tensor
    token: Tensor
    row: Tensor
    offsets: Tensor

    def sum_by_token(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``(T, h)`` sums of ``(R, h)`` rows; `weights` ``(R,)`` in the order of tokens."""
        if not len(rows):
            return rows.new_zeros(len(self.offsets), rows.shape[1])
        return F.embedding_bag(self.row, rows, self.offsets, mode="sum", per_sample_weights=weights)


def _sorted(
    hidden: Tensor, indices: Tensor, weights: Tensor, experts: ExpertBank, workspace: Workspace
) -> Tensor:
    n_tokens, k = indices.shape
    order, sizes = _sort(indices, experts.n_experts)
    rank = order.new_empty(n_tokens * k)
    rank[order] = torch.arange(len(order), device=order.device)
    goes = indices >= 0
    per_token = goes.sum(dim=1)
    plan = _Plan(order, order // k, rank[goes.reshape(-1)], per_token.cumsum(0) - per_token)
    (states,) = autocast(hidden)
    rows = _Gather.apply(states, plan, workspace)  # type: ignore[no-untyped-call]
    results = experts.grouped(rows, sizes)
    results = results.to(_sum_type(results))
    weights = weights.to(results.dtype)
    total = _Combine.apply(results, weights, plan, workspace)  # type: ignore[no-untyped-call]
    return total.to(hidden.dtype)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """Copy each token to the rows of its experts. Backward sums rows instead of scattering them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: _Plan, workspace: Workspace) -> Tensor:
        ctx.plan = plan
        rows = workspace.empty((len(plan.token), hidden.shape[1]), hidden)
        return torch.index_select(hidden, 0, plan.token, out=rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dtype = _sum_type(gradient)
        return ctx.plan.sum_by_token(gradient.to(dtype)).to(gradient.dtype), None, None


class _Combine(torch.autograd.Function):
    """Sum each token's rows by weight."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, plan: _Plan, workspace: Workspace
    ) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.plan, ctx.workspace = plan, workspace
        by_row = weights.reshape(-1)[plan.order]
        return plan.sum_by_token(rows, by_row[plan.row])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        plan = ctx.plan
        to_rows = ctx.workspace.empty(tuple(rows.shape), rows)
        torch.index_select(gradient, 0, plan.token, out=to_rows)
        to_weights = torch.zeros_like(weights)
        to_weights.view(-1)[plan.order] = torch.linalg.vecdot(to_rows, rows)
        to_rows.mul_(weights.reshape(-1)[plan.order, None])
        return to_rows, to_weights, None, None
