"""What one would do without a stationary classifier when an encoder is replaced: the rivals.

Two kinds. *Adapters* map the new model's vectors into the space of the stored ones, or decline to
(`SkipReindex`, `Reembed`); they are fitted on a few hundred items that both models have embedded.
*Heads* are trained anew with another tie to the old version than the HOC loss; they are called as
`bakeoff.embedding.stationary_head.StationaryHead` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor, nn

from bakeoff.embedding.contrastive import false_negative_mask, info_nce
from bakeoff.embedding.stationary import ClassSlots, unit_rows
from bakeoff.embedding.stationary_head import Classifier, IncrementalHead
from bakeoff.errors import DataError

Vectors = NDArray[np.float32]

ADAPTER_FILE = "adapter.safetensors"
"""Name of a saved adapter in its folder."""


# Adapters -----------------------------------------------------------------------------------------


class Adapter(Protocol):
    """A way to search a stored index with a new model."""

    reembeds: bool
    """Whether the documents' stored vectors are replaced by the new model's."""

    def fit(self, new: ArrayLike, old: ArrayLike) -> Self:
        """Learn from items that both models have embedded, ``(n, d_new)`` and ``(n, d_old)``."""

    def transform(self, new: ArrayLike) -> Vectors:
        """Return unit vectors to search with, given the new model's."""


class _AdapterBase(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    reembeds = False

    def fit(self, new: ArrayLike, old: ArrayLike) -> Self:
        """Learn from items that both models have embedded.

        Parameters
        ----------
        new, old
            ``(n, d_new)`` and ``(n, d_old)``: row i of both is the same item.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If shapes do not agree, or a value is not finite.
        """
        a, b = _finite("new", new), _finite("old", old)
        if len(a) != len(b):
            raise DataError(
                f"new and old must have one row per item, got {len(a)} and {len(b)} rows"
            )
        self._fit(a, b)
        self.n_features_in_, self.n_features_out_ = a.shape[1], b.shape[1]
        return self

    def transform(self, new: ArrayLike) -> Vectors:
        """Return unit vectors ``(n, d_out)``, float32, to search with."""
        if not hasattr(self, "n_features_in_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"{type(self).__name__} is not fitted: call fit first")
        rows = _finite("new", new)
        if rows.shape[1] != self.n_features_in_:
            raise DataError(
                f"new must have the width {self.n_features_in_} that fit has seen, got "
                f"{rows.shape[1]}"
            )
        return _unit(self._map(rows))

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        raise NotImplementedError

    def _map(self, new: NDArray[np.float64]) -> NDArray[np.float64]:
        return new


class SkipReindex(_AdapterBase):
    """Search the old vectors with the new model's as they are.

    What a compatible upgrade promises to make possible; with unrelated models it finds nothing.
    Both models must have one width.
    """

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        if new.shape[1] != old.shape[1]:
            raise DataError(
                f"vectors of width {new.shape[1]} cannot be compared with stored ones of width "
                f"{old.shape[1]}"
            )


class Reembed(_AdapterBase):
    """Embed every document again with the new model: the best in quality, and the cost to beat."""

    reembeds = True

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        pass


class ProcrustesAdapter(_AdapterBase):
    """The rotation that brings new vectors closest to the old ones of the same items.

    Rows are scaled to unit length; then ``R = argmin |new R - old|`` over matrices with orthonormal
    columns (rows, where the new vectors are the narrower), from one singular value decomposition.
    No centring: a search by cosine knows no offset.

    References
    ----------
    Peter H. Schönemann. "A generalized solution of the orthogonal Procrustes problem".
    Psychometrika 31, 1966.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> old = rng.standard_normal((50, 4))
    >>> rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    >>> adapter = ProcrustesAdapter().fit(old @ rotation, old)
    >>> bool(np.allclose(adapter.rotation_, rotation.T))
    True
    """

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        left, _, right = np.linalg.svd(_unit64(new).T @ _unit64(old), full_matrices=False)
        self.rotation_ = left @ right

    def _map(self, new: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(_unit64(new) @ self.rotation_)


class RidgeAdapter(_AdapterBase):
    """The linear map that predicts old vectors from new ones, by ridge regression.

    Parameters
    ----------
    alphas
        Penalties to choose from by leave-one-out error; rows have unit length, so that useful ones
        are about 0.001 to 10.
    fit_intercept
        Whether the map has a bias. With one, the penalty shrinks predictions towards the mean of
        the stored vectors; where these crowd around their mean and the new vectors predict them
        loosely, as is usual between two encoders, every query then finds the same documents.
        Without one, what the penalty takes away is mostly length, which a search by cosine does not
        see. Where the prediction is nearly exact, a bias is the better choice.
    """

    def __init__(
        self,
        alphas: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0),
        *,
        fit_intercept: bool = False,
    ) -> None:
        self.alphas = alphas
        self.fit_intercept = fit_intercept

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        from sklearn.linear_model import RidgeCV

        ridge = RidgeCV(alphas=list(self.alphas), fit_intercept=self.fit_intercept)
        self.ridge_ = ridge.fit(_unit64(new), _unit64(old))

    def _map(self, new: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.ridge_.predict(_unit64(new)), dtype=np.float64).reshape(len(new), -1)


class LinearAdapter(_AdapterBase):
    """A fitted adapter as a matrix and an offset, to save, to load and to use elsewhere.

    Whatever fitted it, searching through it is ``unit(unit(new) @ matrix + offset)``.

    Parameters
    ----------
    matrix
        ``(d_new, d_old)``.
    offset
        ``(d_old,)``; zeros by default.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If a shape is another one or a value is not finite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> fitted = ProcrustesAdapter().fit(rng.standard_normal((9, 4)), rng.standard_normal((9, 3)))
    >>> plain, new = LinearAdapter.of(fitted), rng.standard_normal((2, 4))
    >>> bool(np.allclose(plain.transform(new), fitted.transform(new), atol=1e-6))
    True
    """

    def __init__(self, matrix: ArrayLike, offset: ArrayLike | None = None) -> None:
        self.matrix = matrix
        self.offset = offset
        self._matrix = _finite("matrix", matrix)
        self.n_features_in_, self.n_features_out_ = self._matrix.shape
        given = np.zeros(self.n_features_out_) if offset is None else offset
        self._offset = _finite("offset", np.asarray(given)[None])[0]
        if len(self._offset) != self.n_features_out_:
            raise DataError(
                f"offset must have the {self.n_features_out_} values that matrix has columns, got "
                f"{len(self._offset)}"
            )

    @classmethod
    def of(cls, adapter: Any) -> Self:
        """Return a fitted adapter of this module as one of this class.

        Raises
        ------
        bakeoff.errors.DataError
            If it is not fitted, or no linear map.
        """
        if isinstance(adapter, LinearAdapter):
            return cls(adapter.matrix, adapter.offset)
        if hasattr(adapter, "rotation_"):
            return cls(adapter.rotation_)
        if hasattr(adapter, "ridge_"):
            matrix = adapter.ridge_.coef_.reshape(adapter.n_features_out_, -1).T
            return cls(matrix, np.zeros(matrix.shape[1]) + adapter.ridge_.intercept_)
        raise DataError(
            f"{type(adapter).__name__} is no fitted linear adapter (ProcrustesAdapter, "
            "RidgeAdapter)"
        )

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors``: ``matrix`` ``(d_new, d_old)`` and ``offset``, float32."""
        from safetensors.numpy import save_file

        from bakeoff._files import atomic_path

        weights = {
            "matrix": np.ascontiguousarray(self._matrix, dtype=np.float32),
            "offset": np.ascontiguousarray(self._offset, dtype=np.float32),
        }
        with atomic_path(Path(folder) / ADAPTER_FILE) as temporary:
            save_file(weights, str(temporary))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        bakeoff.errors.DataError
            If the folder holds no adapter, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(folder) / ADAPTER_FILE
        try:
            weights = load_file(path)
            return cls(weights["matrix"], weights["offset"])
        except FileNotFoundError:
            raise DataError(f"{folder} holds no adapter: there is no {ADAPTER_FILE}") from None
        except (KeyError, SafetensorError) as error:
            raise DataError(f"{path} is no adapter: {error}") from error

    def modules(self) -> list[Any]:
        """Return modules to put behind a new sentence-transformers model: it then searches as this.

        A length of 1, the linear map, a length of 1 again; all of them sentence-transformers' own.
        """
        from sentence_transformers.base.modules import Dense, Normalize

        dense = Dense(
            self.n_features_in_,
            self.n_features_out_,
            bias=True,
            activation_function=nn.Identity(),
            init_weight=torch.from_numpy(self._matrix.T.astype(np.float32)),
            init_bias=torch.from_numpy(self._offset.astype(np.float32)),
        )
        return [Normalize(), dense, Normalize()]

    def _fit(self, new: NDArray[np.float64], old: NDArray[np.float64]) -> None:
        raise DataError("a LinearAdapter is not fitted: fit another adapter and take it with of")

    def _map(self, new: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(_unit64(new) @ self._matrix + self._offset)


# Heads --------------------------------------------------------------------------------------------


class LearnedClassifier(nn.Module):
    """An ordinary last layer without bias that grows by a row for each new class.

    Parameters
    ----------
    num_slots
        Most classes it may have, for the same bookkeeping as the fixed classifier's.
    width
        Width of the features.
    seed
        Of the first values of new rows, uniform as in ``torch.nn.Linear``.
    """

    def __init__(
        self,
        num_slots: int,
        width: int,
        *,
        slots: ClassSlots | None = None,
        from_end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.slots = ClassSlots(num_slots) if slots is None else slots
        self.from_end = from_end
        self.seed = seed
        self.weight = nn.Parameter(torch.zeros(0, width))
        self.row_slots: Tensor
        self.register_buffer("row_slots", torch.zeros(0, dtype=torch.long))

    def add(self, labels: Iterable[Any]) -> None:
        """Add a row for each label that has none."""
        labels = list(labels)
        self.slots = self.slots.add(labels, from_end=self.from_end)
        have = set(self.row_slots.tolist())
        new = [s for s in dict.fromkeys(self.slots.slots_of(labels).tolist()) if s not in have]
        generator = torch.Generator().manual_seed(self.seed + len(have))
        width = self.weight.shape[1]
        drawn = width**-0.5 * (2 * torch.rand(len(new), width, generator=generator) - 1)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), drawn.to(self.weight)]))
        self.row_slots = torch.cat([self.row_slots, torch.tensor(new).to(self.row_slots)])

    def targets(self, labels: Iterable[Any]) -> Tensor:
        """Return the row number of each label, ``(n,)`` int64; -1 for labels without a row."""
        return self.rows_of(torch.from_numpy(self.slots.slots_of(labels)))

    def rows_of(self, slots: Tensor) -> Tensor:
        """Return the row number of each slot; -1 for slots without a row."""
        row_at = {slot: row for row, slot in enumerate(self.row_slots.tolist())}
        rows = [row_at.get(slot, -1) for slot in slots.tolist()]
        return torch.tensor(rows, dtype=torch.long, device=slots.device)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``(n, number of rows)``."""
        return nn.functional.linear(features, self.weight)

    def known_logits(self, features: Tensor) -> Tensor:
        """Return the logits in the order of ``slots.labels``; -inf for labels without a row."""
        logits = self(features)
        none = logits.new_full((len(features), 1), -torch.inf)
        # Row -1 is the appended column.
        return torch.cat([logits, none], dim=1)[:, self.targets(self.slots.labels)]


class ReplayHead(IncrementalHead):
    """Experience replay: a learned classifier that grows, and nothing that ties versions together.

    The paper's baseline. Parameters are those of `StationaryHead`; `geometry`, `lam`, `mu` and
    `same_class` have no effect. Features have the same width, `n_slots` - 1.
    """

    def _new_classifier(self, generator: torch.Generator) -> Classifier:
        return LearnedClassifier(
            self.n_slots,
            self.n_slots - 1,
            slots=self.slots,
            from_end=self.from_end,
            seed=self._seed(),
        )

    def _restored_classifier(self, slots: ClassSlots, weights: dict[str, Tensor]) -> Classifier:
        classifier = LearnedClassifier(
            self.n_slots, self.n_slots - 1, slots=slots, from_end=self.from_end, seed=self._seed()
        )
        classifier.weight = nn.Parameter(weights["weight"])
        classifier.row_slots = weights["row_slots"]
        return classifier

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        return None


class FixedClassifierHead(IncrementalHead):
    """The simplex classifier without the HOC loss: cross-entropy alone. The ablation."""

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        return None


class DistillationHead(IncrementalHead):
    """The simplex classifier, and the squared distance of new and old unit features."""

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        distance = unit_rows("new", new) - unit_rows("old", old.detach())
        return distance.pow(2).sum(dim=1).mean()


class InfoNCEHead(ReplayHead):
    """A learned classifier, and InfoNCE from old to new features of the same item.

    Items of other classes are the negatives, and the positive is among the terms of the sum.
    """

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        same_class = false_negative_mask(slots)
        return info_nce(old.detach(), new, scale=self.mu, false_negatives=same_class)


class BackwardCompatibleHead(ReplayHead):
    """Backward-compatible training: new features must also suit the old, frozen classifier.

    The alignment is the cross-entropy of the old classifier on new features, for rows whose class
    it knows.

    References
    ----------
    Yantao Shen, Yuanjun Xiong, Wei Xia and Stefano Soatto. "Towards Backward-Compatible
    Representation Learning". CVPR 2020. arXiv:2003.11942.
    """

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        if not isinstance(old_classifier, LearnedClassifier):
            raise DataError(
                "backward-compatible training needs the old version's classifier: give previous, "
                "not old_features"
            )
        targets = old_classifier.rows_of(slots)
        known = targets >= 0
        if not bool(known.any()):
            return new.sum() * 0.0
        return nn.functional.cross_entropy(old_classifier(new)[known], targets[known])


def _finite(name: str, given: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(given)
    if array.ndim != 2 or not len(array) or array.dtype.kind not in "fiu":
        raise DataError(
            f"{name} must be (n, d) numbers with n > 0, got {array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise DataError(f"{name} must be finite, row {row} is not")
    return array.astype(np.float64)


def _unit64(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, 1e-12))


def _unit(rows: NDArray[np.float64]) -> Vectors:
    return _unit64(rows).astype(np.float32)
