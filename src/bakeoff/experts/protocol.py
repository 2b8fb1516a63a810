"""What a router returns, and what routers, losses and experts must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bakeoff.errors import DataError
from bakeoff.experts.token_sums import count_choices

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each of T tokens goes to, and how much of each comes back.

    Parameters
    ----------
    logits
        ``(T, N)`` float32, the scores as they left the gate: no noise, no softmax. N counts what
        the router can choose from, null experts (which output zero) included.
    probs
        ``(T, N)`` float32, what the router made of the logits and what balance losses average.
    indices
        ``(T, K)`` int64, the experts of each token in order of choice; -1 for no expert. Padding
        tokens have -1 throughout.
    weights
        ``(T, K)`` float32, the factor on each chosen expert's output; 0 where the index is -1.
    aux
        Further tensors that a particular loss or report needs, by name.

    Examples
    --------
    >>> import torch
    >>> routing = Routing(
    ...     logits=torch.zeros(3, 4),
    ...     probs=torch.full((3, 4), 0.25),
    ...     indices=torch.tensor([[0, 1], [0, 3], [-1, -1]]),
    ...     weights=torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]),
    ... )
    >>> routing.counts.tolist()
    [2, 1, 0, 1]
    """

    logits: Tensor
    probs: Tensor
    indices: Tensor
    weights: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.logits.shape != self.probs.shape:
            raise DataError(
                "logits and probs must both be (tokens, experts), got shapes "
                f"{tuple(self.logits.shape)} and {tuple(self.probs.shape)}"
            )
        if self.indices.ndim != 2 or self.indices.shape != self.weights.shape:
            raise DataError(
                "indices and weights must both be (tokens, choices), got shapes "
                f"{tuple(self.indices.shape)} and {tuple(self.weights.shape)}"
            )
        if len(self.indices) != len(self.logits):
            raise DataError(
                f"indices has {len(self.indices)} tokens, logits {len(self.logits)}: they must "
                "agree"
            )

    @property
    def n_tokens(self) -> int:
        """T, padding included."""
        return int(self.logits.shape[0])

    @property
    def n_experts(self) -> int:
        """N, null experts included."""
        return int(self.logits.shape[1])

    @property
    def counts(self) -> Tensor:
        """``(N,)`` int64: how many tokens chose each expert, before capacity drops any."""
        return count_choices(self.indices, self.n_experts)


@runtime_checkable
class Router(Protocol):
    """A callable that routes tokens.

    Some attributes are optional. ``is_causal`` is False where a token's routing depends on later
    tokens (absent means True). ``k`` is the number of choices of every token; where it is absent,
    or ``varies`` is True, there is no such number, and so no capacity. ``update(group=None)`` is
    called by `MoE.update` after each optimizer step, for routers that adapt without a gradient;
    `group` is the process group whose loads are summed up.
    """

    n_experts: int

    def __call__(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, h)`` hidden states.

        `mask`, ``(T,)`` bool, is False at padding, which goes nowhere. `context` may hold
        ``token_ids (T,)``, ``sequence_ids (T,)`` and ``domains (T,)``, all int64; a router takes
        what it needs and ignores the rest.
        """
        ...


class RoutingLoss(Protocol):
    """A callable that scores a routing; padding (mask False) does not count."""

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return a scalar float32 tensor with its coefficient already applied."""
        ...


class Experts(Protocol):
    """N networks of one shape, whose parameters are stacked along a first axis."""

    n_experts: int
    hidden: int

    def grouped(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert i to the i-th run of rows.

        `rows` is ``(R, hidden)``, sorted by expert; `sizes` ``(N,)`` int64 says how many rows each
        expert has (zero is allowed). Returns ``(R, hidden)``.
        """
        ...
