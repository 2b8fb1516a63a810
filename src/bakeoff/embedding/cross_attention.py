"""The cross-attention block that both trainable pooling families are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedFeedForward(nn.Module):
    """A two-layer perceptron with a GELU-gated hidden layer (GEGLU).

    ``f(u) = (a * GELU(g)) W2 + b2`` with ``a, g = split(u W1 + b1)``; GELU is the exact one.

    Parameters
    ----------
    width
        Size of input and output.
    inner_width
        Size of the hidden layer.

    References
    ----------
    Noam Shazeer. "GLU Variants Improve Transformer". 2020. arXiv:2002.05202.
    """

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * inner_width)
        self.contract = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``f(x)``, of the shape of `x`."""
        value, gate = self.expand(x).chunk(2, dim=-1)
        contracted: Tensor = self.contract(value * nn.functional.gelu(gate))
        return contracted


class CrossAttentionBlock(nn.Module):
    """One pre-norm cross-attention layer and one gated feed-forward layer, both residual.

    ::

        Z = softmax(LN(queries) Wq (LN(context) Wk)^T / sqrt(head_dim)) LN(context) Wv Wo + queries
        Y = f(LN(Z)) + Z

    Which side is learned decides the method: learned latents that query hidden states give
    `MultiLayerPooling`; hidden states that query learned latents give `LatentAttentionPooling`.

    Parameters
    ----------
    width
        Size d of queries, context and output.
    num_heads
        Number of attention heads.
    head_dim
        Size of one head; `width` / `num_heads` if None. The projections have no bias.

    References
    ----------
    Andrew Jaegle et al. "Perceiver: General Perception with Iterative Attention". ICML 2021.
    arXiv:2103.03206.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        if head_dim is None:
            if width % num_heads:
                raise ValueError(
                    f"num_heads={num_heads} does not divide hidden_size={width}; give head_dim"
                )
            head_dim = width // num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        inner_width = num_heads * head_dim
        self.query_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner_width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * inner_width, bias=False)
        self.to_output = nn.Linear(inner_width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width, 4 * width)

    def forward(
        self, queries: Tensor, context: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """Let queries attend to the context.

        Parameters
        ----------
        queries
            ``(B, n, d)``, or ``(1, n, d)`` to use the same ones for every row of `context`.
        context
            ``(B, m, d)``, or ``(1, m, d)`` likewise.
        context_mask
            ``(B, m)``, True where the context may be attended to; None means everywhere.

        Returns
        -------
        Tensor
            ``(B, n, d)``.
        """
        batch_size = max(queries.shape[0], context.shape[0])
        query = self._split_heads(self.to_query(self.query_norm(queries)))
        key, value = self.to_key_value(self.context_norm(context)).chunk(2, dim=-1)
        # Shared latents are projected once and expanded after, not before.
        query, key, value = (
            part.expand(batch_size, -1, -1, -1)
            for part in (query, self._split_heads(key), self._split_heads(value))
        )
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if context_mask is None else context_mask[:, None, None, :],
        )
        residual: Tensor = self.to_output(attended.transpose(1, 2).flatten(2)) + queries
        output: Tensor = self.feed_forward(self.feed_forward_norm(residual)) + residual
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        """Turn ``(B, n, heads * head_dim)`` into ``(B, heads, n, head_dim)``."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


def random_latents(num_latents: int, width: int) -> nn.Parameter:
    """Return learned latents ``(num_latents, width)``, drawn from the standard normal."""
    return nn.Parameter(torch.randn(num_latents, width))
