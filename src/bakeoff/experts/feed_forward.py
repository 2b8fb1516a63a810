"""Experts that are two-layer perceptrons: ReLU, GELU, SwiGLU and their relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.expert_bank import ExpertBank
from bakeoff.experts.grouped import (
    ACTIVATIONS,
    PLAIN,
    Workspace,
    grouped_feed_forward,
    grouped_linear,
)

# What transformers calls the same functions.
_SAME = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class FeedForwardExperts(ExpertBank):
    """N perceptrons, ``w_out act(w_in x)``, or gated, ``w_out (act(w_gate x) * w_value x)``.

    Parameters
    ----------
    n_experts
        Number of experts.
    hidden
        Input and output features.
    width
        Inner features; ``4 * hidden`` if None.
    activation
        ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, or any that transformers knows. The
        four have the fast path on the CPU.
    gated
        SwiGLU, GeGLU and so on. Gate and value are stored as one matrix, gate first, as in
        transformers' Mixtral.
    bias
        Whether both layers add a bias. Takes the slower path.

    Examples
    --------
    >>> experts = FeedForwardExperts(4, hidden=8, width=16)
    >>> experts.grouped(torch.randn(6, 8), torch.tensor([1, 0, 3, 2])).shape
    torch.Size([6, 8])
    """

    def __init__(
        self,
        n_experts: int,
        hidden: int,
        width: int | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(n_experts, hidden)
        self.width = 4 * hidden if width is None else width
        if self.width < 1:
            raise DataError(f"width must be at least 1, got {width}")
        self.activation = _SAME.get(activation, activation)
        self.gated, self.has_bias = gated, bias
        self._function: Callable[[Tensor], Tensor] = _function(self.activation)
        rows = 2 * self.width if gated else self.width
        self.w_in = nn.Parameter(torch.empty(n_experts, rows, hidden))
        self.w_out = nn.Parameter(torch.empty(n_experts, hidden, self.width))
        self.b_in = nn.Parameter(torch.zeros(n_experts, rows)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(n_experts, hidden)) if bias else None
        nn.init.uniform_(self.w_in, -(hidden**-0.5), hidden**-0.5)
        nn.init.uniform_(self.w_out, -(self.width**-0.5), self.width**-0.5)
        self.workspace = Workspace()

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Apply one expert."""
        b_in = None if self.b_in is None else self.b_in[expert]
        b_out = None if self.b_out is None else self.b_out[expert]
        inner = self._act(nn.functional.linear(rows, self.w_in[expert], b_in))
        return nn.functional.linear(inner, self.w_out[expert], b_out)

    def grouped(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert i to the i-th run of rows."""
        if self.activation in ACTIVATIONS and not self.has_bias:
            return grouped_feed_forward(
                rows, sizes, self.w_in, self.w_out, self.activation, self.gated, self.workspace
            )
        inner = self._act(grouped_linear(rows, sizes, self.w_in, self.b_in, self.workspace))
        return grouped_linear(inner, sizes, self.w_out, self.b_out, self.workspace)

    def batched(self, slots: Tensor) -> Tensor:
        """Apply expert i to ``slots[i]``."""
        return self._by_matrices(slots, self.w_in, self.b_in, self.w_out, self.b_out)

    def merged(self, weights: Tensor, hidden: Tensor) -> Tensor:
        """Apply each sequence's merged expert."""
        merge = [
            None if p is None else torch.tensordot(weights.to(p.dtype), p, dims=1)
            for p in (self.w_in, self.b_in, self.w_out, self.b_out)
        ]
        return self._by_matrices(hidden, *merge)  # type: ignore[arg-type]

    def _by_matrices(
        self, rows: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
    ) -> Tensor:
        inner = torch.bmm(rows, w_in.transpose(1, 2))
        inner = self._act(inner if b_in is None else inner + b_in[:, None])
        result = torch.bmm(inner, w_out.transpose(1, 2))
        return result if b_out is None else result + b_out[:, None]

    def _act(self, inner: Tensor) -> Tensor:
        if not self.gated:
            return self._function(inner)
        gate, value = inner.chunk(2, dim=-1)
        return self._function(gate) * value

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "kind": "feed-forward",
            "n_experts": self.n_experts,
            "hidden": self.hidden,
            "width": self.width,
            "activation": self.activation,
            "gated": self.gated,
            "bias": self.has_bias,
        }

    def extra_repr(self) -> str:
        """Show the sizes."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings().items())


def _function(name: str) -> Callable[[Tensor], Tensor]:
    if name in PLAIN:
        return PLAIN[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        known = ", ".join(sorted({*PLAIN, *ACT2FN}))
        raise DataError(f"unknown activation {name!r}; there are: {known}")
    return ACT2FN[name]  # type: ignore[no-any-return]
