"""Experts that are low-rank updates, for mixtures on top of a frozen layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.expert_bank import ExpertBank
from bakeoff.experts.grouped import Workspace, grouped_linear


class LoRAExperts(ExpertBank):
    """N low-rank maps ``alpha / rank * B_i A_i x``; give the layer they add to as ``shared``.

    Parameters
    ----------
    n_experts
        Number of experts.
    hidden, n_out
        Features of the layer that is adapted; `n_out` is `hidden` if None.
    rank, alpha
        As in LoRA. B starts at zero: the mixture starts as the shared layer alone.

    References
    ----------
    Edward J. Hu et al. "LoRA: Low-Rank Adaptation of Large Language Models". ICLR 2022.
    arXiv:2106.09685. Shihan Dou et al. "LoRAMoE". ACL 2024. arXiv:2312.09979.

    Examples
    --------
    >>> from bakeoff.experts.mixture_of_experts import MoE
    >>> base = nn.Linear(8, 8)
    >>> moe = MoE(8, LoRAExperts(4, 8, rank=2), router="dense", shared=base)
    >>> x = torch.randn(3, 8)
    >>> torch.equal(moe(x), base(x))
    True
    """

    def __init__(
        self,
        n_experts: int,
        hidden: int,
        n_out: int | None = None,
        rank: int = 8,
        alpha: float = 16.0,
    ) -> None:
        super().__init__(n_experts, hidden, n_out)
        if rank < 1:
            raise DataError(f"rank must be at least 1, got {rank}")
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.empty(n_experts, rank, hidden))
        self.b = nn.Parameter(torch.zeros(n_experts, self.n_out, rank))
        nn.init.uniform_(self.a, -(hidden**-0.5), hidden**-0.5)
        self.workspace = Workspace()

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Apply one expert."""
        inner = nn.functional.linear(rows, self.a[expert]) * (self.alpha / self.rank)
        return nn.functional.linear(inner, self.b[expert])

    def grouped(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert i to the i-th run of rows."""
        inner = grouped_linear(rows, sizes, self.a, None, self.workspace)
        inner = inner * (self.alpha / self.rank)
        return grouped_linear(inner, sizes, self.b, None, self.workspace)

    def batched(self, slots: Tensor) -> Tensor:
        """Apply expert i to ``slots[i]``."""
        inner = torch.bmm(slots, self.a.transpose(1, 2)) * (self.alpha / self.rank)
        return torch.bmm(inner, self.b.transpose(1, 2))

    def merged(self, weights: Tensor, hidden: Tensor) -> Tensor:
        """Apply each sequence's merged expert: A and B are averaged apart."""
        a = torch.tensordot(weights.to(self.a.dtype), self.a, dims=1)
        b = torch.tensordot(weights.to(self.b.dtype), self.b, dims=1)
        inner = torch.bmm(hidden, a.transpose(1, 2)) * (self.alpha / self.rank)
        return torch.bmm(inner, b.transpose(1, 2))

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "kind": "lora",
            "n_experts": self.n_experts,
            "hidden": self.hidden,
            "n_out": self.n_out,
            "rank": self.rank,
            "alpha": self.alpha,
        }
