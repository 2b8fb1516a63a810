"""N expert networks behind one interface: base class, and experts that are any modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.grouped import runs


class ExpertBank(nn.Module):
    """Base of the expert kinds: `one` is required, the rest follows from it.

    Parameters
    ----------
    n_experts
        Number of experts.
    hidden, n_out
        Features of inputs and outputs.
    """

    def __init__(self, n_experts: int, hidden: int, n_out: int | None = None) -> None:
        super().__init__()
        if n_experts < 1 or hidden < 1:
            raise DataError(
                f"n_experts and hidden must be at least 1, got {n_experts} and {hidden}"
            )
        self.n_experts, self.hidden = n_experts, hidden
        self.n_out = hidden if n_out is None else n_out

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Apply expert number `expert` to ``(R, hidden)`` rows; returns ``(R, n_out)``."""
        raise NotImplementedError

    def grouped(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert i to the i-th run of ``(R, hidden)`` rows; `sizes` is ``(N,)`` int64."""
        parts = [self.one(expert, rows[run]) for expert, run in runs(sizes)]
        # Experts without rows take part too, so that every parameter has a gradient.
        idle = [i for i, size in enumerate(sizes.tolist()) if not size]
        parts += [self.one(expert, rows[:0]) for expert in idle]
        return torch.cat(parts)

    def batched(self, slots: Tensor) -> Tensor:
        """Apply expert i to ``slots[i]``; ``(N, C, hidden)`` gives ``(N, C, n_out)``."""
        return torch.stack([self.one(expert, rows) for expert, rows in enumerate(slots)])

    def merged(self, weights: Tensor, hidden: Tensor) -> Tensor:
        """Apply to each sequence the expert whose parameters are a weighted mean of all.

        `weights` is ``(B, N)``, `hidden` ``(B, L, hidden)``; returns ``(B, L, n_out)``.
        """
        raise DataError(f"{type(self).__name__} cannot be merged by the 'merged' router")

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-able."""
        raise DataError(f"{type(self).__name__} cannot be saved by its settings")

    @property
    def parameters_per_expert(self) -> float:
        """Parameters of one expert."""
        return sum(p.numel() for p in self.parameters()) / self.n_experts


class ModuleExperts(ExpertBank):
    """Experts that are modules of any kind, from ``(R, hidden)`` to ``(R, n_out)``.

    Parameters
    ----------
    modules
        One per expert; or one module to copy, with `n_experts`.
    hidden
        Input features.
    n_experts
        How many copies to make of a single module.
    n_out
        Output features; `hidden` if None.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module] | nn.Module,
        hidden: int,
        n_experts: int | None = None,
        n_out: int | None = None,
    ) -> None:
        self.are_copies = isinstance(modules, nn.Module)
        if isinstance(modules, nn.Module):
            modules = [copy.deepcopy(modules) for _ in range(n_experts or 0)]
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise DataError("modules must be at least one torch.nn.Module")
        super().__init__(len(modules), hidden, n_out)
        self.experts = nn.ModuleList(modules)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, where experts are copies of one module."""
        if not self.are_copies:
            return super().settings()
        return {"kind": "copies", "n_experts": self.n_experts, "hidden": self.hidden}

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Apply one expert."""
        return self.experts[expert](rows)  # type: ignore[no-any-return]

    def merged(self, weights: Tensor, hidden: Tensor) -> Tensor:
        """Apply each sequence's merged module."""
        from torch.func import functional_call

        first = self.experts[0]
        names = [name for name, _ in first.named_parameters()]
        stacked = {
            name: torch.stack([expert.get_parameter(name) for expert in self.experts])
            for name in names
        }
        results = []
        for weight, states in zip(weights, hidden, strict=True):
            mean = {
                name: torch.tensordot(weight.to(value.dtype), value, dims=1)
                for name, value in stacked.items()
            }
            results.append(functional_call(first, mean, (states,)))
        return torch.stack(results)
