"""Latent-attention pooling (NV-Embed): token states query a learned dictionary."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bakeoff.embedding.cross_attention import CrossAttentionBlock, random_latents
from bakeoff.embedding.pooling import PoolingModule, mean_over_tokens, positive_int

METHOD = {
    "slug": "nv-embed",
    "title": "Latent-attention pooling and two-stage contrastive instruction tuning",
    "paper": "Lee et al., NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding "
    "Models, ICLR 2025, arXiv 2405.17428",
    "designs": ["latent-attention"],
    "names": [
        "LatentAttentionPooling",
        "TwoStageTrainer",
        "ClassTriplets",
        "mine_hard_negatives",
        "instruction_pool_mask",
        "make_bidirectional",
    ],
}


class LatentAttentionPooling(PoolingModule):
    """Every token's state attends to a learned dictionary; the results are averaged over tokens.

    Tokens are the queries and the r learned latents are keys and values, the reverse of
    `MultiLayerPooling`. A token's output does not depend on other tokens, so that padding and
    instructions are kept out by the final mean alone.

    Parameters
    ----------
    hidden_size
        Width d of the backbone's hidden states.
    num_latents
        Size r of the dictionary, initialised from the standard normal.
    num_heads
        Number of attention heads.
    head_dim
        Size of one head; `hidden_size` / `num_heads` if None. The released models use 4096 at
        d = 4096, i.e. an inner width of 8 d and 0.74 billion parameters.
    normalize
        Whether embeddings have unit length.
    include_prompt
        As in `PoolingModule`. NV-Embed keeps instruction tokens out of the mean: give False, or
        pass ``forward`` the mask that `bakeoff.embedding.instruction_pool_mask` makes.

    Notes
    -----
    Follows the released code, which adds to the paper's formula pre-norms, separate key and value
    projections, scaling, residuals and a gated feed-forward layer. Departures: a row with nothing
    to pool raises instead of dividing by zero, and the default inner width is d, not 8 d.

    References
    ----------
    Chankyu Lee, Rajarshi Roy, Mengyao Xu, Jonathan Raiman, Mohammad Shoeybi, Bryan Catanzaro and
    Wei Ping. "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models".
    ICLR 2025. arXiv:2405.17428.

    Examples
    --------
    >>> import torch
    >>> head = LatentAttentionPooling(hidden_size=32, num_latents=16, num_heads=4)
    >>> head(torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).shape
    torch.Size([2, 32])
    """

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
        self.num_latents = positive_int("num_latents", num_latents)
        self.num_heads = positive_int("num_heads", num_heads)
        self.head_dim = None if head_dim is None else positive_int("head_dim", head_dim)
        self.latents = random_latents(num_latents, hidden_size)
        self.block = CrossAttentionBlock(hidden_size, num_heads, head_dim)

    def forward(self, token_embeddings: Any, pool_mask: Tensor | None = None) -> Any:
        """Return the embeddings of a batch; as `PoolingModule.forward`.

        Parameters
        ----------
        token_embeddings
            The last layer's states, ``(B, T, d)``; or anything else that `PoolingModule` takes.
        pool_mask
            ``(B, T)``, non-zero at the tokens to average: the attention mask with instruction
            tokens set to 0. None means all.
        """
        return super().forward(token_embeddings, pool_mask)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return mean_over_tokens(self.block(states, self.latents.unsqueeze(0)), mask)
