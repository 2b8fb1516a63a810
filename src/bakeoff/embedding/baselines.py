"""The simple strong rivals that a trainable head must beat, under the same protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bakeoff.embedding.cross_attention import GatedFeedForward
from bakeoff.embedding.latent_attention import LatentAttentionPooling
from bakeoff.embedding.pooling import (
    LayerwisePooling,
    PoolingModule,
    TokenReduce,
    mean_over_tokens,
    position_weighted_mean,
    positive_int,
)


class LastTokenPooling(PoolingModule):
    """The last layer's state at the last real token: design 1 of the pooling-attention grid.

    If the tokenizer appends an end-of-sequence token, that is the one.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.

    Examples
    --------
    >>> tokens = torch.eye(3).unsqueeze(0)  # three tokens, the last one is padding
    >>> LastTokenPooling(hidden_size=3)(tokens, torch.tensor([[1, 1, 0]]))
    tensor([[0., 1., 0.]])
    """

    reads = "layer_lasts"

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[:, -1]


class MeanPooling(PoolingModule):
    """The mean over the real tokens of the last layer.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.

    Examples
    --------
    >>> tokens = torch.eye(3).unsqueeze(0)
    >>> MeanPooling(hidden_size=3, normalize=False)(tokens, torch.tensor([[1, 1, 0]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """

    reads = "layer_means"

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[:, -1]


class PositionWeightedMeanPooling(PoolingModule):
    """The mean over the real tokens of the last layer, the i-th token weighted by i.

    Under causal attention later tokens have seen more of the text; this gives them more say.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.

    References
    ----------
    Niklas Muennighoff. "SGPT: GPT Sentence Embeddings for Semantic Search". 2022.
    arXiv:2202.08904.

    Examples
    --------
    >>> tokens = torch.eye(3).unsqueeze(0)
    >>> PositionWeightedMeanPooling(hidden_size=3, normalize=False)(tokens)
    tensor([[0.1667, 0.3333, 0.5000]])
    """

    reads = "tokens"

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return position_weighted_mean(states, mask)


class SingleLayerMeanPooling(PoolingModule):
    """The mean over the real tokens of one chosen layer.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.
    layer
        Index into the backbone's hidden states: 0 is the embedding output, L the last layer.
        Choose it on training pairs with `best_layer`.

    Examples
    --------
    >>> hidden_states = [torch.full((1, 2, 4), float(layer)) for layer in range(7)]
    >>> SingleLayerMeanPooling(hidden_size=4, layer=5, normalize=False)(hidden_states)
    tensor([[5., 5., 5., 5.]])
    """

    reads = "layer_means"
    all_layers = True

    def __init__(
        self,
        hidden_size: int,
        layer: int,
        *,
        normalize: bool = True,
        include_prompt: bool = True,
    ) -> None:
        super().__init__(hidden_size, normalize=normalize, include_prompt=include_prompt)
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer must be an integer from 0 on, got {layer!r}")
        self.layer = layer

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.layer >= states.shape[1]:
            raise ValueError(
                f"layer={self.layer}, but there are hidden states 0 to {states.shape[1] - 1} only"
            )
        return states[:, self.layer]


class ScalarMixPooling(LayerwisePooling):
    """A learned weighted average of the layers, L + 1 numbers in all: ELMo's scalar mix.

    ``e = gamma * sum_l softmax(w)_l * LN(h_l)`` over layers 1..L. It starts as the plain average.

    Parameters
    ----------
    hidden_size, num_layers, normalize, token_reduce, include_prompt
        As in `LayerwisePooling`.
    layer_norm
        Whether each layer's vector is standardised first (LN above, without parameters), an option
        of the paper. Without it the layers with the longest vectors decide the average: in a
        pre-norm decoder lengths grow by orders of magnitude from first to last layer.

    References
    ----------
    Matthew E. Peters et al. "Deep contextualized word representations". NAACL 2018.
    arXiv:1802.05365.

    Examples
    --------
    >>> head = ScalarMixPooling(hidden_size=4, num_layers=6)
    >>> sum(parameter.numel() for parameter in head.parameters())
    7
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        *,
        normalize: bool = True,
        token_reduce: TokenReduce = "mean",
        layer_norm: bool = True,
        include_prompt: bool = True,
    ) -> None:
        super().__init__(
            hidden_size,
            num_layers,
            normalize=normalize,
            token_reduce=token_reduce,
            include_prompt=include_prompt,
        )
        self.layer_norm = layer_norm
        self.layer_logits = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def _combine(self, layers: Tensor) -> Tensor:
        if self.layer_norm:
            layers = nn.functional.layer_norm(layers, layers.shape[-1:])
        weights = self.layer_logits.softmax(dim=0)
        return self.gamma * torch.einsum("l,bld->bd", weights, layers)


class ConcatLinearPooling(LayerwisePooling):
    """All layers side by side, then one linear map.

    Parameters
    ----------
    hidden_size, num_layers, normalize, token_reduce, include_prompt
        As in `LayerwisePooling`.
    output_size
        Width of the embedding; `hidden_size` if None.

    Notes
    -----
    Each layer's vector is standardised first (layer norm without parameters): the scales of layers
    differ by orders of magnitude, and one learning rate cannot serve them all.

    Examples
    --------
    >>> head = ConcatLinearPooling(hidden_size=4, num_layers=6, output_size=3)
    >>> head(torch.randn(2, 6, 5, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
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
        self.output_size = positive_int(
            "output_size", hidden_size if output_size is None else output_size
        )
        self.linear = nn.Linear(num_layers * hidden_size, self.output_size)

    def _combine(self, layers: Tensor) -> Tensor:
        vectors: Tensor = self.linear(
            nn.functional.layer_norm(layers, layers.shape[-1:]).flatten(1)
        )
        return vectors

    def get_embedding_dimension(self) -> int:
        """Return the width of the embeddings."""
        return self.output_size


class ResidualMLPPooling(PoolingModule):
    """A residual gated perceptron on every token, then the mean: latent attention's control.

    It has the parameters of a `LatentAttentionPooling` of the same arguments, but no dictionary to
    attend to. Where latent attention does not beat it, its gain was one of size.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.
    num_latents, num_heads, head_dim
        Those of the `LatentAttentionPooling` to match; the number of parameters agrees to within
        ``1.5 * hidden_size + 1``, half of what one more hidden unit costs.

    Examples
    --------
    >>> def size(head):
    ...     return sum(parameter.numel() for parameter in head.parameters())
    >>> size(ResidualMLPPooling(32, 16, 4)), size(LatentAttentionPooling(32, 16, 4))
    (17344, 17376)
    """

    reads = "tokens"

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = True,
        include_prompt: bool = True,
    ) -> None:
        super().__init__(hidden_size, normalize=normalize, include_prompt=include_prompt)
        with torch.device("meta"):  # counts parameters without making them
            matched = LatentAttentionPooling(hidden_size, num_latents, num_heads, head_dim)
        budget = sum(parameter.numel() for parameter in matched.parameters())
        self.num_latents, self.num_heads, self.head_dim = num_latents, num_heads, head_dim
        # The norm has 2 d parameters; the perceptron of inner width m has m (3 d + 2) + d.
        inner_width = max(1, round((budget - 3 * hidden_size) / (3 * hidden_size + 2)))
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = GatedFeedForward(hidden_size, inner_width)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return mean_over_tokens(self.feed_forward(self.norm(states)) + states, mask)


def layer_scores(
    query_states: Tensor,
    positive_states: Tensor,
    *,
    cutoff: int = 10,
    block_size: int = 256,
) -> list[float]:
    """Return, per layer, how well its vectors alone find each query's positive.

    Parameters
    ----------
    query_states, positive_states
        ``(N, n_layers, d)``: one vector per text and layer, e.g. means over tokens; row i of one
        belongs to row i of the other. Use training pairs.
    cutoff
        A positive ranked below this counts as not found.
    block_size
        Queries compared at once, which bounds memory at ``block_size * N`` floats.

    Returns
    -------
    list of float
        Mean reciprocal rank at `cutoff`, by cosine among all N positives. A positive that occurs
        twice does not lower its own rank.

    Raises
    ------
    ValueError
        If the shapes differ, are not three-dimensional, or N < 2.
    """
    if query_states.shape != positive_states.shape or query_states.dim() != 3:
        raise ValueError(
            "query_states and positive_states must have one shape (N, n_layers, d), got "
            f"{tuple(query_states.shape)} and {tuple(positive_states.shape)}"
        )
    if len(query_states) < 2:
        raise ValueError(f"at least 2 training pairs are needed, got {len(query_states)}")
    scores = []
    for layer in range(query_states.shape[1]):
        queries = nn.functional.normalize(query_states[:, layer].float(), dim=-1)
        positives = nn.functional.normalize(positive_states[:, layer].float(), dim=-1)
        # Counted as whole numbers, so that equal layers score equally whatever the block size.
        counts = torch.zeros(cutoff + 2, dtype=torch.long)
        for start in range(0, len(queries), block_size):
            block = queries[start : start + block_size]
            similarity = block @ positives.T
            own = similarity.diagonal(start)[:, None]
            # Equal texts give equal vectors, but a matrix product only nearly equal similarities.
            ranks = 1 + (similarity > own + 1e-6).sum(dim=1)
            counts += torch.bincount(ranks.clamp(max=cutoff + 1).cpu(), minlength=cutoff + 2)
        total = sum(int(counts[rank]) / rank for rank in range(1, cutoff + 1))
        scores.append(total / len(queries))
    return scores


def best_layer(
    query_states: Tensor,
    positive_states: Tensor,
    *,
    cutoff: int = 10,
    block_size: int = 256,
) -> int:
    """Return the layer whose vectors best find each query's positive, for `SingleLayerMeanPooling`.

    Arguments and errors are those of `layer_scores`. Choose on training pairs: a layer that was
    chosen on test data is not a fair rival. Of layers that score the same, the first is taken.

    Examples
    --------
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...
    >>> queries = torch.randn(50, 4, 8)
    >>> positives = torch.randn(50, 4, 8)
    >>> positives[:, 2] = queries[:, 2]
    >>> best_layer(queries, positives)
    2
    """
    scores = layer_scores(query_states, positive_states, cutoff=cutoff, block_size=block_size)
    return max(range(len(scores)), key=scores.__getitem__)
