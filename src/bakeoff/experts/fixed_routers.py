"""Routers that learn nothing: by token id, at random, by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import RouterModule, routed


def fixed(indices: Tensor, n_experts: int, mask: Tensor | None) -> Routing:
    """Return a routing with equal weights on the given ``(T, K)`` experts."""
    weights = torch.full(indices.shape, 1.0 / indices.shape[1], device=indices.device)
    probs = torch.zeros(len(indices), n_experts, device=indices.device)
    probs.scatter_add_(1, indices, weights)
    return routed(torch.zeros_like(probs), probs, indices, weights, mask)


def required(context: dict[str, Any], key: str, n_tokens: int, router: str) -> Tensor:
    """Return ``context[key]``, ``(T,)`` int64, or raise an error that names it."""
    value = context.get(key)
    if value is None or value.shape != (n_tokens,):
        given = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise DataError(
            f"router {router!r} needs {key}, ({n_tokens},) int64, in the call, got {given}"
        )
    return value  # type: ignore[no-any-return]


@dataclass(eq=False, repr=False)
class HashRouter(RouterModule, name="hash"):
    """A fixed table from token id to experts; needs ``token_ids`` in the call.

    Parameters
    ----------
    vocabulary
        Number of token ids.
    k
        Distinct experts per token id, weighted equally.
    seed
        The table deals shuffled token ids out evenly.

    References
    ----------
    Stephen Roller, Sainbayar Sukhbaatar, Arthur Szlam and Jason Weston. "Hash Layers For Large
    Sparse Models". NeurIPS 2021. arXiv:2106.04426.
    """

    vocabulary: int = 0
    k: int = 1
    seed: int = 0

    def build(self, hidden: int, n_experts: int) -> None:
        """Fill the table."""
        if self.vocabulary < 1 or not 1 <= self.k <= n_experts:
            raise DataError(
                f"vocabulary must be at least 1 and k from 1 to {n_experts}, the number of "
                f"experts, got {self.vocabulary} and {self.k}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.randperm(self.vocabulary, generator=generator) % n_experts
        # Distinct further experts at random distances from the first.
        steps = torch.rand(self.vocabulary, n_experts - 1, generator=generator)
        further = (first[:, None] + 1 + steps.argsort(dim=1)[:, : self.k - 1]) % n_experts
        self.table = nn.Buffer(torch.cat([first[:, None], further], dim=1))

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        ids = required(context, "token_ids", len(hidden), self.name)
        if mask is not None:
            ids = ids.masked_fill(~mask, 0)
        if (
            not hidden.is_cuda
            and len(ids)
            and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table)
        ):
            raise DataError(
                f"token_ids must be from 0 to {len(self.table) - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )
        return fixed(self.table[ids], self.n_experts, mask)


@dataclass(eq=False, repr=False)
class RandomRouter(RouterModule, name="random"):
    """k distinct experts at random for every token, every time (THOR draws two).

    Parameters
    ----------
    k
        Experts per token, weighted equally.
    seed
        None draws from torch's own generator.

    References
    ----------
    Simiao Zuo et al. "Taming Sparsely Activated Transformer with Stochastic Experts". ICLR 2022.
    arXiv:2110.04260.
    """

    k: int = 1
    seed: int | None = 0

    def build(self, hidden: int, n_experts: int) -> None:
        """Check k."""
        if not 1 <= self.k <= n_experts:
            raise DataError(f"k must be from 1 to {n_experts}, the number of experts, got {self.k}")

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        shape = torch.empty(len(hidden), self.n_experts, device=hidden.device)
        return fixed(
            self.random(torch.rand, shape).argsort(dim=1)[:, : self.k], self.n_experts, mask
        )


@dataclass(eq=False, repr=False)
class DomainRouter(RouterModule, name="domain"):
    """Each domain has experts of its own; needs ``domains`` in the call (DEMix).

    Parameters
    ----------
    groups
        The experts of each domain, e.g. ``[[0], [1, 2]]``; None gives domain i expert i. Where a
        domain has several, the token id picks one of them in turn (as PanGu-Sigma's fixed hash
        does), so ``token_ids`` is then needed too.

    References
    ----------
    Suchin Gururangan et al. "DEMix Layers: Disentangling Domains for Modular Language Modeling".
    NAACL 2022. arXiv:2108.05036. Xiaozhe Ren et al. "PanGu-Sigma". 2023. arXiv:2303.10845.
    """

    groups: Sequence[Sequence[int]] | None = None
    k: ClassVar[int] = 1

    def build(self, hidden: int, n_experts: int) -> None:
        """Fill the table."""
        groups = [[i] for i in range(n_experts)] if self.groups is None else list(self.groups)
        if not all(groups) or not all(0 <= i < n_experts for group in groups for i in group):
            raise DataError(
                f"groups must name at least one expert from 0 to {n_experts - 1} for each domain, "
                f"got {self.groups}"
            )
        table = torch.zeros(len(groups), max(map(len, groups)), dtype=torch.int64)
        for row, group in enumerate(groups):
            table[row, : len(group)] = torch.tensor(list(group))
        self.table = nn.Buffer(table)
        self.sizes = nn.Buffer(torch.tensor([len(group) for group in groups]))

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        domains = required(context, "domains", len(hidden), self.name)
        if mask is not None:
            domains = domains.masked_fill(~mask, 0)
        if (
            not hidden.is_cuda
            and len(domains)
            and not 0 <= int(domains.min()) <= int(domains.max()) < len(self.table)
        ):
            raise DataError(
                f"domains must be from 0 to {len(self.table) - 1}, got {int(domains.min())} to "
                f"{int(domains.max())}"
            )
        within = torch.zeros_like(domains)
        if self.table.shape[1] > 1:
            ids = required(context, "token_ids", len(hidden), self.name)
            # A multiplicative hash: consecutive ids are often forms of one word.
            within = (ids * 2654435761 % 2**32) % self.sizes[domains]
        return fixed(self.table[domains, within][:, None], self.n_experts, mask)
