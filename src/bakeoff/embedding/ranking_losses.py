"""Ranking losses over the pairs of a batch: MNR, and MNR+ with targets from the batch itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bakeoff.embedding.contrastive import info_nce


def mnr_loss(
    queries: Tensor, positives: Tensor, *, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """Return the multiple-negatives ranking loss: each query must pick its positive.

    Cross-entropy over ``scale * <query, positive>``, from queries to positives only. With
    ``normalize=True`` this is `bakeoff.embedding.info_nce` and the default of sentence-transformers
    (at ``scale=20``); the paper trains on plain dot products.

    Parameters
    ----------
    queries, positives
        ``(B, d)``, floating point; row i of one belongs to row i of the other.
    scale
        One over the temperature.
    normalize
        Whether vectors are scaled to unit length first.

    Returns
    -------
    Tensor
        A scalar, in float32 (float64 for float64 input).

    Raises
    ------
    ValueError
        If shapes do not agree or `scale` is not above 0.

    References
    ----------
    Logan Hallee, Rohan Kapur, Arjun Patel, Jason P. Gleghorn and Bohdan B. Khomtchouk.
    "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings in Biological
    Databases". Scientific Reports, 2025. arXiv:2401.15713.

    Examples
    --------
    >>> same = torch.ones(4, 8)
    >>> torch.isclose(mnr_loss(same, same), torch.tensor(4.0).log())
    tensor(True)
    """
    if normalize:
        return info_nce(queries, positives, scale=scale)
    queries, positives = _checked(queries, positives, scale)
    labels = torch.arange(len(queries), device=queries.device)
    return nn.functional.cross_entropy(scale * queries @ positives.T, labels)


def mnr_plus_targets(
    queries: Tensor, positives: Tensor, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Return which positive each query, and which query each positive, is to pick in MNR+.

    Both sides' similarities among themselves are averaged and passed through a softmax over rows; a
    query's target is the largest entry of its row, a positive's the largest of its column. With
    unit vectors every target is the own partner. With plain dot products a long vector draws the
    targets of others to itself.

    Parameters
    ----------
    queries, positives
        ``(B, d)``.
    normalize
        Whether vectors are scaled to unit length first.

    Returns
    -------
    of_queries, of_positives
        ``(B,)`` int64 each.

    Notes
    -----
    The column's target is the largest over the row-wise softmax, as in the official code, not of a
    softmax over columns. It is found among logarithms, where entries that would vanish in float32
    still compare: the official code then takes the first of equals.
    """
    queries, positives = _checked(queries.detach(), positives.detach(), 1.0)
    if normalize:
        queries, positives = (
            nn.functional.normalize(part, dim=-1) for part in (queries, positives)
        )
    shares = ((queries @ queries.T + positives @ positives.T) / 2).log_softmax(dim=-1)
    return shares.argmax(dim=1), shares.argmax(dim=0)


def mnr_plus_loss(
    queries: Tensor, positives: Tensor, *, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """Return the MNR+ loss: both directions, with the targets of `mnr_plus_targets`.

    No gradient flows through the targets.

    Parameters
    ----------
    queries, positives, scale, normalize
        As in `mnr_loss`. The paper has no `scale`; it multiplies the logits, not what the targets
        are made of.

    Returns
    -------
    Tensor
        A scalar, in float32 (float64 for float64 input).

    Raises
    ------
    ValueError
        If shapes do not agree or `scale` is not above 0.

    References
    ----------
    Hallee et al., as in `mnr_loss`.

    Examples
    --------
    >>> unit = torch.eye(3)
    >>> torch.isclose(mnr_plus_loss(unit, unit), mnr_loss(unit, unit))
    tensor(True)
    """
    return _mnr_plus(queries, positives, scale, normalize)[0]


class MNRLoss(nn.Module):
    """`mnr_loss` as a module: of two tensors, or for ``SentenceTransformerTrainer``.

    Parameters
    ----------
    model
        A SentenceTransformer, for use with its trainer; None where vectors are given.
    scale, normalize
        As in `mnr_loss`.

    Attributes
    ----------
    diagonal_rate
        Share of the last batch's targets that are the own partner: 1 always.

    Examples
    --------
    >>> loss = MNRLoss(scale=20.0, normalize=True)
    >>> bool(loss(torch.eye(4), torch.eye(4)) < 1e-6)
    True
    """

    def __init__(
        self, model: nn.Module | None = None, *, scale: float = 1.0, normalize: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.normalize = normalize
        self.diagonal_rate = 1.0

    def forward(
        self, queries: Tensor | Iterable[dict[str, Any]], positives: Tensor | None = None
    ) -> Tensor:
        """Return the loss of one batch.

        Parameters
        ----------
        queries, positives
            ``(B, d)`` each; or the two feature dictionaries of sentence-transformers, and labels
            that are not used.
        """
        if not isinstance(queries, Tensor):
            queries, positives = self._embedded(list(queries))
        elif positives is None:
            raise ValueError("positives is missing: give vectors (B, d) of both sides")
        return self._loss(queries, positives)

    def _loss(self, queries: Tensor, positives: Tensor) -> Tensor:
        return mnr_loss(queries, positives, scale=self.scale, normalize=self.normalize)

    def _embedded(self, features: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if self.model is None:
            raise ValueError(f"{name} was made without a model, so it takes vectors, not features")
        if len(features) != 2:
            raise ValueError(
                f"{name} takes two columns, a text and its partner, got {len(features)}"
            )
        first, second = (self.model(part)["sentence_embedding"] for part in features)
        return first, second

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card that the trainer writes."""
        return {"scale": self.scale, "normalize": self.normalize}


class MNRPlusLoss(MNRLoss):
    """`mnr_plus_loss` as a module: of two tensors, or for ``SentenceTransformerTrainer``.

    Parameters
    ----------
    model, scale, normalize
        As in `MNRLoss`.

    Attributes
    ----------
    diagonal_rate
        Share of the last batch's targets, both directions together, that are the own partner.
        Where it is low, the loss pulls texts together that do not belong together: normalise.

    Examples
    --------
    >>> loss = MNRPlusLoss()
    >>> one_long = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 0.1]])
    >>> _ = loss(one_long, one_long)
    >>> round(loss.diagonal_rate, 2)
    0.67
    """

    def _loss(self, queries: Tensor, positives: Tensor) -> Tensor:
        loss, rate = _mnr_plus(queries, positives, self.scale, self.normalize)
        self.diagonal_rate = float(rate)
        return loss


def _mnr_plus(
    queries: Tensor, positives: Tensor, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    of_queries, of_positives = mnr_plus_targets(queries, positives, normalize=normalize)
    queries, positives = _checked(queries, positives, scale)
    if normalize:
        queries, positives = (
            nn.functional.normalize(part, dim=-1) for part in (queries, positives)
        )
    logits = scale * queries @ positives.T
    forth = nn.functional.cross_entropy(logits, of_queries)
    back = nn.functional.cross_entropy(logits.T, of_positives)
    own = torch.arange(len(queries), device=queries.device)
    rate = torch.cat([of_queries == own, of_positives == own]).double().mean()
    return (forth + back) / 2, rate


def _checked(queries: Tensor, positives: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if queries.dim() != 2 or queries.shape != positives.shape or not len(queries):
        raise ValueError(
            "queries and positives must have one shape (B, d), got "
            f"{tuple(queries.shape)} and {tuple(positives.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale!r}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.to(dtype), positives.to(dtype)
