"""Routers without a hard choice: all experts, merged tokens, merged experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import (
    RouterModule,
    at_least_float32,
    by_preference,
    check_finite,
    in_float32,
    new_gate,
    routed,
    without_padding,
)


def everything(
    logits: Tensor, probs: Tensor, mask: Tensor | None, aux: dict[str, Tensor] | None = None
) -> Routing:
    """Return a routing of each token to all experts, the most probable first."""
    indices = by_preference(torch.ones_like(probs, dtype=torch.bool), logits)
    return routed(logits, probs, indices, probs.gather(1, indices), mask, aux)


def sequence_rows(hidden: Tensor, context: dict[str, Any]) -> Tensor:
    """Return ``(B, L)`` row numbers of each sequence, -1 where a sequence is shorter.

    Without ``sequence_ids`` all rows are one sequence. Padding may be among the rows.
    """
    ids = context.get("sequence_ids")
    if ids is None:
        return torch.arange(len(hidden), device=hidden.device)[None]
    if ids.shape != (len(hidden),):
        raise DataError(f"sequence_ids must be ({len(hidden)},), got {tuple(ids.shape)}")
    _, compact, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    order = torch.argsort(compact, stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(ids), device=ids.device) - starts[compact[order]]
    longest = int(sizes.max()) if len(sizes) else 0
    rows: Tensor = ids.new_full((len(sizes), longest), -1)
    rows[compact[order], place] = order
    return rows


@dataclass(eq=False, repr=False)
class Dense(RouterModule, name="dense"):
    """Every token uses every expert, weighted by a softmax."""

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        logits = in_float32(without_padding(hidden, mask), self.weight)
        check_finite(logits)
        return everything(logits, logits.softmax(dim=1), mask)


@dataclass(eq=False, repr=False)
class SoftMoE(RouterModule, name="soft"):
    """Experts process slots, each a weighted mean of the tokens of a sequence.

    Tokens and slot vectors are of unit length. A slot weighs the tokens of its sequence by a
    softmax over tokens; a token weighs all slots by a softmax over slots.

    Parameters
    ----------
    slots
        Per expert and sequence.

    Notes
    -----
    Not causal. The routing has ``aux["dispatch"]`` and ``aux["combine"]``, ``(T, N * slots)``, and
    ``aux["sequence_rows"]``, ``(B, L)``; its logits are the log-sum over an expert's slots, so
    that ``probs`` is what a token takes from each expert.

    References
    ----------
    Joan Puigcerver et al. "From Sparse to Soft Mixtures of Experts". ICLR 2024. arXiv:2308.00951.
    """

    slots: int = 1
    is_causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise DataError(f"slots must be at least 1, got {self.slots}")

    def build(self, hidden: int, n_experts: int) -> None:
        """Create slot vectors and scale."""
        self.slot_vectors = nn.Parameter(torch.empty(hidden, n_experts, self.slots))
        nn.init.normal_(self.slot_vectors, std=hidden**-0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        unit = _unit(at_least_float32(without_padding(hidden, mask)), 1)
        slots = self.scale * _unit(at_least_float32(self.slot_vectors), 0)
        logits = in_float32(unit, slots.flatten(1).T)
        check_finite(logits)
        rows = sequence_rows(hidden, context)
        seen = rows >= 0
        if mask is not None:
            seen = seen & mask[rows.clamp_min(0)]
        by_sequence = logits[rows.clamp_min(0)].masked_fill(~seen[:, :, None], -torch.inf)
        # A sequence of padding alone gives NaN, which is replaced: no token of it is seen.
        over_tokens = by_sequence.softmax(dim=1).masked_fill(~seen[:, :, None], 0.0)
        dispatch = torch.zeros_like(logits)
        dispatch[rows[seen]] = over_tokens[seen]
        combine = logits.softmax(dim=1)
        if mask is not None:
            combine = combine * mask[:, None]
        by_expert = logits.view(-1, self.n_experts, self.slots).logsumexp(dim=2)
        probs = by_expert.softmax(dim=1)
        aux = {"dispatch": dispatch, "combine": combine, "sequence_rows": rows}
        return everything(by_expert, probs, mask, aux)


def _unit(value: Tensor, dim: int) -> Tensor:
    return value * (value.square().sum(dim=dim, keepdim=True) + 1e-6).rsqrt()


@dataclass(eq=False, repr=False)
class MergedExperts(RouterModule, name="merged"):
    """One expert per sequence: the weighted mean of all experts' parameters (SMEAR).

    The weights are a softmax of the gate on the mean of the sequence's tokens.

    Notes
    -----
    Not causal. ``probs`` holds the sequence's weights at each of its tokens, and
    ``aux["sequence_rows"]`` is ``(B, L)``.

    References
    ----------
    Mohammed Muqeeth, Haokun Liu and Colin Raffel. "Soft Merging of Experts with Adaptive Routing".
    TMLR 2024. arXiv:2306.03745.
    """

    is_causal: ClassVar[bool] = False

    @property
    def active_experts(self) -> float:
        """One merged expert per token."""
        return 1.0

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        states = at_least_float32(without_padding(hidden, mask))
        rows = sequence_rows(hidden, context)
        seen = rows >= 0
        if mask is not None:
            seen = seen & mask[rows.clamp_min(0)]
        total = (states[rows.clamp_min(0)] * seen[:, :, None]).sum(dim=1)
        mean = total / seen.sum(dim=1, keepdim=True).clamp_min(1)
        by_sequence = in_float32(mean, self.weight)
        check_finite(by_sequence)
        sequence = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        present = rows >= 0
        sequence[rows[present]] = present.nonzero()[:, 0]
        logits = by_sequence[sequence]
        return everything(logits, logits.softmax(dim=1), mask, {"sequence_rows": rows})
