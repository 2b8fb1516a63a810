"""Routers that look at all tokens at once to balance the load exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bakeoff.errors import DataError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import (
    RouterModule,
    by_preference,
    check_finite,
    in_float32,
    new_gate,
    routed,
    top_k,
    without_padding,
)


@dataclass(eq=False, repr=False)
class BalancedAssignment(RouterModule, name="base"):
    """In training, the assignment of highest total score with equal loads (BASE layers).

    Each expert gets between ``floor(T / N)`` and ``ceil(T / N)`` tokens. In evaluation each token
    takes its best expert. The weight is the sigmoid of the logit.

    Raises
    ------
    bakeoff.errors.DataError
        If logits are not finite.

    Notes
    -----
    Solved exactly by `scipy.optimize.linear_sum_assignment` on the CPU, whose time grows with the
    cube of the tokens: seconds for a few thousand. `Sinkhorn` is the approximation for more.

    References
    ----------
    Mike Lewis et al. "BASE Layers: Simplifying Training of Large, Sparse Models". ICML 2021.
    arXiv:2103.16716.
    """

    k: ClassVar[int] = 1
    is_causal_in_training: ClassVar[bool] = False

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        logits = in_float32(without_padding(hidden, mask), self.weight)
        check_finite(logits)
        if self.training:
            valid = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask
            indices = torch.full_like(logits[:, :1], -1, dtype=torch.int64)
            if bool(valid.any()):
                indices[valid, 0] = balanced_assignment(logits.detach()[valid])
        else:
            indices = top_k(logits, 1)
        weights = logits.gather(1, indices.clamp_min(0)).sigmoid()
        return routed(logits, logits.softmax(dim=1), indices, weights, mask)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Return the ``(T,)`` experts that maximise the sum of ``(T, N)`` scores under equal loads.

    Loads differ by at most one.

    Examples
    --------
    >>> balanced_assignment(torch.tensor([[3.0, 2.5], [3.0, 0.0], [1.0, 0.0], [1.0, 0.9]])).tolist()
    [1, 0, 0, 1]
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    table = scores.double().cpu().numpy()
    n_tokens, n_experts = table.shape
    low, extra = divmod(n_tokens, n_experts)
    seats = np.repeat(np.arange(n_experts), low)
    profit = table[:, seats]
    if extra:
        # One further seat per expert, taken only when the first ones are: those pay a premium
        # that no difference of scores can outweigh.
        premium = 1.0 + n_tokens * (table.max() - table.min())
        profit = np.concatenate([profit + premium, table], axis=1)
        seats = np.concatenate([seats, np.arange(n_experts)])
    _, chosen = linear_sum_assignment(profit, maximize=True)
    return torch.as_tensor(seats[chosen], device=scores.device)


@dataclass(eq=False, repr=False)
class Sinkhorn(RouterModule, name="sinkhorn"):
    """In training, top-k of the balanced transport plan of exp(logits) (S-BASE).

    In evaluation, plain top-k. The weight is the sigmoid of the logit for k = 1, else the
    softmax, not renormalised.

    Parameters
    ----------
    k
        Experts per token.
    tolerance
        The iteration ends when the expert factors change by less than this on average.
    max_iterations
        It ends here in any case.

    References
    ----------
    Aidan Clark et al. "Unified Scaling Laws for Routed Language Models". ICML 2022.
    arXiv:2202.01169.
    """

    k: int = 1
    tolerance: float = 1e-4
    max_iterations: int = 100
    is_causal_in_training: ClassVar[bool] = False

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        if not 1 <= self.k <= n_experts:
            raise DataError(f"k must be from 1 to {n_experts}, the number of experts, got {self.k}")
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        logits = in_float32(without_padding(hidden, mask), self.weight)
        check_finite(logits)
        preference = logits.detach()
        if self.training:
            plan = sinkhorn_plan(preference, mask, self.tolerance, self.max_iterations)
            preference = plan
        indices = top_k(preference, self.k)
        probs = logits.softmax(dim=1)
        scores = logits.sigmoid() if self.k == 1 else probs
        return routed(logits, probs, indices, scores.gather(1, indices), mask)


@torch.no_grad()
def sinkhorn_plan(
    logits: Tensor, mask: Tensor | None = None, tolerance: float = 1e-4, max_iterations: int = 100
) -> Tensor:
    """Return the ``(T, N)`` plan whose rows sum to 1/T and columns to 1/N.

    Padding rows (mask False) are zero and T counts the others.
    """
    # A factor per row changes nothing in the plan, and keeps exp from overflowing.
    kernel = (logits - logits.max(dim=1, keepdim=True).values).exp()
    if mask is not None:
        kernel = kernel * mask[:, None]
    n_tokens = len(logits) if mask is None else mask.sum()
    columns = torch.ones_like(kernel[0])
    rows = kernel.sum(dim=1)
    with torch.autocast(logits.device.type, enabled=False):
        for _ in range(max_iterations):
            rows = 1 / (n_tokens * (kernel @ columns).clamp_min(1e-20))
            new = 1 / (len(columns) * (rows @ kernel).clamp_min(1e-20))
            # Relative, because the factors' own scale depends on the kernel's.
            change = ((new - columns) / new).abs().mean()
            columns = new
            if change < tolerance:
                break
    return kernel * columns * rows[:, None]


@dataclass(eq=False, repr=False)
class ExpertChoice(RouterModule, name="expert-choice"):
    """Each expert takes its best ``ceil(capacity_factor * T / N)`` tokens.

    Loads are equal without a balance loss; a token may get any number of experts. The weight is
    the softmax over the experts. Padding is not taken and not counted in T.

    Parameters
    ----------
    capacity_factor
        Average number of experts per token.

    Notes
    -----
    Not causal: whether a token is taken depends on the tokens after it.

    References
    ----------
    Yanqi Zhou et al. "Mixture-of-Experts with Expert Choice Routing". NeurIPS 2022.
    arXiv:2202.09368.
    """

    capacity_factor: float = 2.0
    is_causal: ClassVar[bool] = False
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.capacity_factor > 0:
            raise DataError(f"capacity_factor must be above 0, got {self.capacity_factor}")

    @property
    def active_experts(self) -> float:
        """Experts per token on average."""
        return min(self.capacity_factor, float(self.n_experts))

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        logits = in_float32(without_padding(hidden, mask), self.weight)
        check_finite(logits)
        probs = logits.softmax(dim=1)
        taken = torch.zeros_like(probs, dtype=torch.bool)
        n_tokens = len(probs) if mask is None else int(mask.sum())
        # Rounded before the ceiling: 1.1 * 10 / 1 must not become 12.
        wanted = math.ceil(round(self.capacity_factor * n_tokens / self.n_experts, 9))
        if n_tokens:
            preference = probs.detach()
            if mask is not None:
                preference = preference.masked_fill(~mask[:, None], -1.0)
            best = torch.sort(preference, dim=0, descending=True, stable=True).indices
            taken.scatter_(0, best[: min(wanted, n_tokens)], True)
        indices = by_preference(taken, probs)
        return routed(logits, probs, indices, probs.gather(1, indices.clamp_min(0)), mask)
