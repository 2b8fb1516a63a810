"""Attention heads as experts: each token picks its query heads, keys and values are shared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.grouped import grouped_linear
from bakeoff.experts.mixture_of_experts import (
    RoutingStats,
    has_fixed_choices,
    own_loss,
    router_k,
    routing_stats,
    sum_of_losses,
)
from bakeoff.experts.protocol import Router, Routing, RoutingLoss
from bakeoff.experts.routers import make_router


class MixtureOfAttentionHeads(nn.Module):
    """Self-attention in which each token uses k of N heads (MoA).

    Every head has its own query and output projection; one key and one value projection serve all
    of them. Position information is the caller's (add it to `hidden`).

    Parameters
    ----------
    hidden
        Features of input and output.
    n_experts
        Number of heads to choose from.
    head_dim
        Width of a head.
    router
        Any router with the same number of choices for every token.
    aux
        Losses, as in `MoE`. Their sum is ``aux_loss`` after a forward pass in training mode; call
        `update` after each optimizer step.
    causal
        Whether a token sees only itself and earlier ones.

    References
    ----------
    Xiaofeng Zhang et al. "Mixture of Attention Heads: Selecting Attention Heads Per Token". EMNLP
    2022. arXiv:2210.05144.

    Examples
    --------
    >>> layer = MixtureOfAttentionHeads(16, n_experts=6, head_dim=8)
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden: int,
        n_experts: int,
        head_dim: int,
        router: str | dict[str, Any] | Router = "top-k",
        aux: Iterable[str | dict[str, Any] | RoutingLoss] = ("mutual-information", "z-loss"),
        causal: bool = True,
    ) -> None:
        super().__init__()
        if hidden < 1 or n_experts < 1 or head_dim < 1:
            raise DataError(
                "hidden, n_experts and head_dim must be at least 1, got "
                f"{hidden}, {n_experts} and {head_dim}"
            )
        self.hidden, self.head_dim, self.causal = hidden, head_dim, causal
        self.router = make_router(router, hidden, n_experts)
        if causal and not getattr(self.router, "is_causal", True):
            raise DataError(
                f"causal=True, but the router {type(self.router).__name__} looks at later tokens"
            )
        if not has_fixed_choices(self.router):
            raise DataError(
                f"the router {type(self.router).__name__} has no fixed number of choices k"
            )
        self.losses = [own_loss(loss) for loss in aux]
        self.query = nn.Parameter(torch.empty(n_experts, head_dim, hidden))
        self.output = nn.Parameter(torch.empty(n_experts, hidden, head_dim))
        self.key = nn.Linear(hidden, head_dim, bias=False)
        self.value = nn.Linear(hidden, head_dim, bias=False)
        nn.init.uniform_(self.query, -(hidden**-0.5), hidden**-0.5)
        nn.init.uniform_(self.output, -(head_dim**-0.5), head_dim**-0.5)
        self.routing: Routing | None = None
        self.aux_loss: Tensor | None = None
        self._mask: Tensor | None = None

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each of B sequences.

        Parameters
        ----------
        hidden
            ``(B, L, hidden)``.
        mask
            ``(B, L)`` bool, False at padding, which is not attended to and whose output is zero.

        Returns
        -------
        Tensor
            ``(B, L, hidden)``.
        """
        if hidden.ndim != 3 or hidden.shape[2] != self.hidden:
            raise DataError(f"hidden must be (B, L, {self.hidden}), got {tuple(hidden.shape)}")
        n_sequences, length, _ = hidden.shape
        present = mask
        if mask is not None:
            hidden = hidden.masked_fill(~mask[:, :, None], 0.0)
            present = mask.reshape(-1)
        tokens, k = hidden.reshape(-1, self.hidden), router_k(self.router)
        routing = self.router(tokens, mask=present)
        flat = routing.indices.reshape(-1)
        order = flat.argsort(stable=True)
        order = order[int((flat < 0).sum()) :]
        sizes, token = routing.counts, order // k
        rows = grouped_linear(tokens[token], sizes, self.query)
        queries = rows.new_zeros(len(flat), self.head_dim).index_copy(0, order, rows)
        queries = queries.view(n_sequences, length, k, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            queries,
            self.key(hidden)[:, None].expand(-1, k, -1, -1),
            self.value(hidden)[:, None].expand(-1, k, -1, -1),
            attn_mask=self._visible(mask, length, hidden.device),
        )
        attended = attended.transpose(1, 2).reshape(-1, self.head_dim)
        results = grouped_linear(attended[order], sizes, self.output).float()
        weighted = results * routing.weights.reshape(-1)[order, None]
        total = torch.zeros(len(tokens), self.hidden, device=hidden.device)
        total = total.index_add(0, token, weighted)
        self.routing, self._mask, self.aux_loss = routing, present, None
        if self.training and self.losses:
            self.aux_loss = sum_of_losses(self.losses, routing, present, hidden.shape[:2])
        return total.to(hidden.dtype).view(n_sequences, length, -1)

    def _visible(self, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
        visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        if self.causal:
            visible = visible.tril()
        if mask is not None:
            # A padding query sees itself, or its softmax over nothing would be NaN.
            itself = torch.eye(length, dtype=torch.bool, device=device)
            visible = (visible & mask[:, None, None, :]) | itself
        return visible

    def update(self, group: Any = None) -> None:
        """Adapt what learns without a gradient, as `MoE.update`; after each optimizer step."""
        if hasattr(self.router, "update"):
            self.router.update(group)
        for loss in self.losses:
            if hasattr(loss, "reset"):
                loss.reset()

    def stats(self) -> RoutingStats:
        """Return load and entropy of the last forward pass."""
        if self.routing is None:
            raise DataError("there are no statistics before the first forward pass")
        return routing_stats(self.routing, self._mask)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routing": None, "aux_loss": None, "_mask": None}
