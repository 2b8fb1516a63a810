"""Trainable pooling over the last layer or over all layers (Tang and Yang, 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bakeoff.embedding.cross_attention import CrossAttentionBlock, random_latents
from bakeoff.embedding.pooling import (
    LayerwisePooling,
    PoolingModule,
    TokenReduce,
    one_of,
    positive_int,
)

METHOD = {
    "slug": "pooling-and-attention",
    "title": "Trainable pooling over one or all layers, with causal or bidirectional attention",
    "paper": "Tang and Yang, Pooling And Attention: What Are Effective Designs For LLM-Based "
    "Embedding Models?, 2024, arXiv 2409.02727",
    "designs": ["last-token", "last-layer-pooling", "multi-layer-pooling"],
    "names": ["MultiLayerPooling", "LastLayerPooling", "bidirectional", "compare_designs"],
}


class LatentQueryAttention(nn.Module):
    """Learned latents query a set of vectors; the mean of what they gather is the result.

    Parameters
    ----------
    hidden_size
        Width d of the vectors.
    num_latents
        Number r of learned queries, initialised from the standard normal.
    num_heads, head_dim
        As in `CrossAttentionBlock`.
    """

    def __init__(
        self, hidden_size: int, num_latents: int, num_heads: int, head_dim: int | None
    ) -> None:
        super().__init__()
        self.latents = random_latents(num_latents, hidden_size)
        self.block = CrossAttentionBlock(hidden_size, num_heads, head_dim)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(B, d)`` of `states` ``(B, m, d)``; `mask` ``(B, m)`` hides where False."""
        gathered: Tensor = self.block(self.latents.unsqueeze(0), states, mask)
        return gathered.mean(dim=1)


class LastLayerPooling(PoolingModule):
    """Learned latents query the last layer: designs 2 and 4 of the pooling-attention grid.

    Parameters
    ----------
    hidden_size
        Width d of the backbone's hidden states.
    num_latents
        Number of learned queries. The paper's code uses 768.
    num_heads
        Number of attention heads. The paper uses 32.
    head_dim
        Size of one head; `hidden_size` / `num_heads` if None. The paper uses 2048, which at
        d = 4096 makes the head larger than one billion parameters.
    normalize
        Whether embeddings have unit length.
    token_reduce
        ``"last"``: the latents see the last real token only (design 2, for causal attention).
        ``"none"``: they see all real tokens (design 4, for bidirectional attention).
    include_prompt
        As in `PoolingModule`.

    Notes
    -----
    Two departures from the paper's code, which both remove a dependence on padding. Design 4 hides
    padding from the latents; the original does not, so that there a text's embedding depends on the
    lengths of the texts beside it. Design 2 finds the last real token by the mask; the original
    takes position -1, which is padding when that is on the right.

    References
    ----------
    Yixuan Tang and Yi Yang. "Pooling And Attention: What Are Effective Designs For LLM-Based
    Embedding Models?". 2024. arXiv:2409.02727.

    Examples
    --------
    >>> head = LastLayerPooling(hidden_size=32, num_latents=4, num_heads=4, token_reduce="none")
    >>> head(torch.randn(2, 7, 32), torch.ones(2, 7)).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = True,
        token_reduce: Literal["last", "none"] = "last",
        include_prompt: bool = True,
    ) -> None:
        super().__init__(hidden_size, normalize=normalize, include_prompt=include_prompt)
        self.num_latents = positive_int("num_latents", num_latents)
        self.num_heads = positive_int("num_heads", num_heads)
        self.head_dim = None if head_dim is None else positive_int("head_dim", head_dim)
        self.token_reduce = one_of("token_reduce", token_reduce, ("last", "none"))
        self.reads = "tokens" if token_reduce == "none" else "layer_lasts"
        self.attention = LatentQueryAttention(hidden_size, num_latents, num_heads, head_dim)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        vectors: Tensor
        if self.reads == "tokens":
            # Attention gives padding the weight 0, which does not silence a NaN there.
            vectors = self.attention(states.masked_fill(~mask.unsqueeze(-1), 0.0), mask)
        else:
            vectors = self.attention(states[:, -1:])
        return vectors


class MultiLayerPooling(LayerwisePooling):
    """Learned latents query one vector per layer: designs 3 and 5 of the pooling-attention grid.

    Every layer 1..L gives one vector (the mean over tokens, or the last token's state). A learned
    table adds an offset of its own to each layer, which is how the head tells layers apart and
    weighs them; then learned latents attend over the L vectors, and the mean over latents is the
    embedding.

    Parameters
    ----------
    hidden_size
        Width d of the backbone's hidden states.
    num_layers
        Number L of layers of the backbone, ``config.num_hidden_layers``.
    num_latents
        Number of learned queries. The paper's code uses 768.
    num_heads
        Number of attention heads. The paper uses 32.
    head_dim
        Size of one head; `hidden_size` / `num_heads` if None. The paper uses 2048.
    normalize
        Whether embeddings have unit length.
    token_reduce
        ``"mean"``: the mean over real tokens per layer (design 5, for bidirectional attention).
        ``"last"``: the last real token per layer (design 3, for causal attention).
    include_prompt
        As in `PoolingModule`.

    Notes
    -----
    The embedding output, index 0 of ``hidden_states``, is dropped: pass all L + 1 states (a
    sequence, or stacked) or a stacked ``(B, L, T, d)`` without it.

    Departures from the paper's code: the layer table is sized by `num_layers` and not fixed at 32;
    tokens are chosen by the attention mask and not by comparing ids with the padding token, which
    loses real end-of-sequence tokens when the two are the same.

    References
    ----------
    Yixuan Tang and Yi Yang. "Pooling And Attention: What Are Effective Designs For LLM-Based
    Embedding Models?". 2024. arXiv:2409.02727.

    Examples
    --------
    >>> head = MultiLayerPooling(hidden_size=32, num_layers=6, num_latents=4, num_heads=4)
    >>> hidden_states = [torch.randn(2, 7, 32) for _ in range(7)]
    >>> head(hidden_states, torch.ones(2, 7)).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = True,
        token_reduce: TokenReduce = "mean",
        include_prompt: bool = True,
    ) -> None:
        super().__init__(
            hidden_size,
            num_layers,
            normalize=normalize,
            token_reduce=token_reduce,
            include_prompt=include_prompt,
        )
        self.num_latents = positive_int("num_latents", num_latents)
        self.num_heads = positive_int("num_heads", num_heads)
        self.head_dim = None if head_dim is None else positive_int("head_dim", head_dim)
        # Unit variance as in the paper's code: beside small hidden states it dominates at first.
        self.layer_table = nn.Parameter(torch.randn(num_layers, hidden_size))
        self.attention = LatentQueryAttention(hidden_size, num_latents, num_heads, head_dim)

    def _combine(self, layers: Tensor) -> Tensor:
        vectors: Tensor = self.attention(layers + self.layer_table)
        return vectors
