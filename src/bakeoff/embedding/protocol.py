"""What an embedding design must offer: one reading of the hidden states, one function over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["layer_means", "layer_lasts", "tokens"]
"""What a pooling head needs of the hidden states, and so what a feature cache must keep for it.

- ``"layer_means"``: the mean over real tokens of every layer, ``(B, L + 1, d)``;
- ``"layer_lasts"``: the state at the last real token of every layer, ``(B, L + 1, d)``;
- ``"tokens"``: the states of all tokens after the last layer, ``(B, T, d)``.

Index 0 of the layer axis is the output of the embedding matrix, index L the last layer after the
final norm, as in the ``hidden_states`` of transformers.
"""


class PoolingHead(Protocol):
    """A function from reduced hidden states to one vector per text."""

    @property
    def reads(self) -> Reads:
        """Which reduction of the hidden states `pool` takes."""

    def pool(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return embeddings ``(B, d_out)`` of states reduced as `reads` says.

        `mask` ``(B, T)`` marks real tokens; only a head that reads ``"tokens"`` looks at it.
        """
