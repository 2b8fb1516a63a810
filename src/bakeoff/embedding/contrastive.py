"""The contrastive loss, with in-batch negatives on or off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float = 20.0,
    in_batch: bool = True,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Return the InfoNCE loss of queries against documents, averaged over queries.

    Each query must pick its positive out of its candidates: cross-entropy over
    ``scale * cosine``. One direction only, from queries to documents.

    Parameters
    ----------
    queries, positives
        ``(N, d)``, floating point; row i of one belongs to row i of the other. Any length: vectors
        are normalised here.
    negatives
        Hard negatives, ``(N, n, d)`` or ``(N, d)`` for one each.
    scale
        One over the temperature.
    in_batch
        If True, a query's candidates are all positives and all hard negatives of the batch. If
        False, its own positive and its own hard negatives only: for data where other queries'
        positives may well fit, such as texts of a few classes.
    false_negatives
        ``(N, N + N * n)`` bool, True where a candidate is known to fit the query and is left out.
        Columns are the positives, then the hard negatives query by query. Only for
        ``in_batch=True``; `false_negative_mask` makes it.

    Returns
    -------
    Tensor
        A scalar, in float32 (float64 for float64 input), whatever the precision of the vectors.

    Raises
    ------
    ValueError
        If shapes do not agree, `scale` is not above 0, there is nothing to contrast with
        (``in_batch=False`` and no negatives), or `false_negatives` marks a query's own positive.

    References
    ----------
    Aaron van den Oord, Yazhe Li and Oriol Vinyals. "Representation Learning with Contrastive
    Predictive Coding". 2018. arXiv:1807.03748.

    Examples
    --------
    With all vectors equal, a query guesses among 2 N candidates:

    >>> same = torch.ones(4, 8)
    >>> torch.isclose(info_nce(same, same, same), torch.tensor(8.0).log())
    tensor(True)
    """
    if queries.dim() != 2 or queries.shape != positives.shape:
        raise ValueError(
            "queries and positives must have one shape (N, d), got "
            f"{tuple(queries.shape)} and {tuple(positives.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale!r}")
    size, width = queries.shape
    if negatives is None:
        negatives = positives.new_zeros(size, 0, width)
    if negatives.dim() == 2:
        negatives = negatives.unsqueeze(1)
    if negatives.dim() != 3 or negatives.shape[0] != size or negatives.shape[2] != width:
        raise ValueError(
            f"negatives must be (N, n, d) or (N, d) with N={size} and d={width}, got "
            f"{tuple(negatives.shape)}"
        )
    queries, positives, negatives = (
        nn.functional.normalize(part.to(torch.promote_types(part.dtype, torch.float32)), dim=-1)
        for part in (queries, positives, negatives)
    )
    if in_batch:
        logits = scale * queries @ torch.cat([positives, negatives.flatten(0, 1)]).T
        labels = torch.arange(size, device=logits.device)
        if false_negatives is not None:
            logits = _leave_out(logits, false_negatives)
    else:
        if negatives.shape[1] == 0:
            raise ValueError("in_batch=False needs negatives: there is nothing to contrast with")
        if false_negatives is not None:
            raise ValueError("false_negatives is only for in_batch=True")
        candidates = torch.cat([positives.unsqueeze(1), negatives], dim=1)
        logits = scale * torch.einsum("nd,ncd->nc", queries, candidates)
        labels = torch.zeros(size, dtype=torch.long, device=logits.device)
    return nn.functional.cross_entropy(logits, labels)


def false_negative_mask(positive_ids: Tensor, negative_ids: Tensor | None = None) -> Tensor:
    """Return which candidates of a batch are a query's own positive under another row's name.

    Parameters
    ----------
    positive_ids
        ``(N,)``, integers: equal numbers stand for equal texts (or for one class, to leave out all
        of it).
    negative_ids
        ``(N, n)`` or ``(N,)``, the same for hard negatives.

    Returns
    -------
    Tensor
        ``(N, N + N * n)`` bool, for `info_nce`.

    Examples
    --------
    >>> false_negative_mask(torch.tensor([7, 8, 7]))
    tensor([[False, False,  True],
            [False, False, False],
            [ True, False, False]])
    """
    candidates = positive_ids
    if negative_ids is not None:
        candidates = torch.cat([positive_ids, negative_ids.reshape(-1)])
    mask = positive_ids[:, None] == candidates[None, :]
    mask[:, : len(positive_ids)].fill_diagonal_(False)
    return mask


class ContrastiveLoss(nn.Module):
    """`info_nce` as a loss module for ``SentenceTransformerTrainer``.

    The data set's columns are query, positive and any number of hard negatives.

    Parameters
    ----------
    model
        A SentenceTransformer.
    scale, in_batch
        As in `info_nce`.

    Examples
    --------
    >>> loss = ContrastiveLoss(model, in_batch=False)  # doctest: +SKIP
    >>> SentenceTransformerTrainer(model, train_dataset=triplets, loss=loss)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, scale: float = 20.0, in_batch: bool = True) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.in_batch = in_batch

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of one batch; `labels` are there for the trainer and unused."""
        queries, positives, *negatives = (
            self.model(features)["sentence_embedding"] for features in sentence_features
        )
        return info_nce(
            queries,
            positives,
            torch.stack(negatives, dim=1) if negatives else None,
            scale=self.scale,
            in_batch=self.in_batch,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card that the trainer writes."""
        return {"scale": self.scale, "in_batch": self.in_batch}


def _leave_out(logits: Tensor, false_negatives: Tensor) -> Tensor:
    if false_negatives.shape != logits.shape:
        raise ValueError(
            f"false_negatives must be {tuple(logits.shape)}, got {tuple(false_negatives.shape)}"
        )
    if false_negatives.diagonal().any():
        raise ValueError("false_negatives marks a query's own positive")
    return logits.masked_fill(false_negatives.to(logits.device), float("-inf"))
