"""The multilayer perceptron that a learned deferral rule puts on its features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch import nn

FloatArray = NDArray[np.float64]


class DeferralMLP(BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """A perceptron of equal hidden layers, each with batch normalisation and ReLU.

    Parameters
    ----------
    loss
        ``"squared"``: predicts a number. ``"logistic"``: predicts the probability of class 1 from
        targets 0 and 1.
    n_layers, width
        Hidden layers, and units of each.
    epochs, batch_size, learning_rate
        Of Adam. A last batch of one row is left out of its epoch: it has no variance.
    random_state
        Seed of the initial weights and of the batches.

    Attributes
    ----------
    n_features_in_ : int
        Width of the input.
    losses_ : list of float
        Mean training loss of every epoch.

    Notes
    -----
    Five layers of 32 units, batch normalisation and 200 epochs are the paper's; rate and batch size
    were not to be verified. Inputs should be of about unit scale. Squared-loss targets are
    standardised inside.

    References
    ----------
    Neha Gupta, Harikrishna Narasimhan, Wittawat Jitkrittum, Ankit Singh Rawat, Aditya Krishna
    Menon and Sanjiv Kumar. "Language model cascades: token-level uncertainty and beyond".
    ICLR 2024. arXiv:2404.10136.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((256, 2))
    >>> model = DeferralMLP(epochs=60).fit(x, np.abs(x[:, 0]))
    >>> bool(np.corrcoef(model.predict(x), np.abs(x[:, 0]))[0, 1] > 0.9)
    True
    """

    def __init__(
        self,
        loss: Literal["squared", "logistic"] = "squared",
        *,
        n_layers: int = 5,
        width: int = 32,
        epochs: int = 200,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.loss = loss
        self.n_layers = n_layers
        self.width = width
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn `y` ``(n,)`` from `X` ``(n, d)``.

        Raises
        ------
        DataError
            If shapes do not agree, a value is not finite, targets of the logistic loss are not 0
            and 1, or a parameter is not accepted.
        """
        import torch
        from torch.nn import functional

        x, targets = self._checked(X, y)
        self.n_features_in_ = x.shape[1]
        self.target_mean_, self.target_scale_ = 0.0, 1.0
        if self.loss == "squared":
            self.target_mean_ = float(targets.mean())
            self.target_scale_ = float(targets.std()) or 1.0
        inputs = torch.from_numpy(x.astype(np.float32))
        wanted = torch.from_numpy(
            ((targets - self.target_mean_) / self.target_scale_).astype(np.float32)
        )
        criterion: Any = (
            functional.mse_loss
            if self.loss == "squared"
            else functional.binary_cross_entropy_with_logits
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self.network_ = self._network()
        shuffle = torch.Generator().manual_seed(self.random_state)
        optimizer = torch.optim.Adam(self.network_.parameters(), lr=self.learning_rate)
        self.losses_ = []
        self.network_.train()
        for _ in range(self.epochs):
            total, seen = 0.0, 0
            order = torch.randperm(len(inputs), generator=shuffle)
            for start in range(0, len(inputs), self.batch_size):
                rows = order[start : start + self.batch_size]
                if len(rows) < 2:
                    continue
                value = criterion(self.network_(inputs[rows])[:, 0], wanted[rows])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total, seen = total + value.item() * len(rows), seen + len(rows)
            self.losses_.append(total / seen)
        self.network_.eval()
        return self

    def predict(self, X: ArrayLike) -> FloatArray:
        """Return ``(n,)``: predicted targets, or probabilities of class 1 with logistic loss."""
        import torch

        if not hasattr(self, "network_"):
            raise DataError("this DeferralMLP is not fitted: call fit first")
        x = np.asarray(X, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.n_features_in_:
            raise DataError(f"X must have shape (n, {self.n_features_in_}), got {x.shape}")
        with torch.inference_mode():
            found = self.network_(torch.from_numpy(x.astype(np.float32)))[:, 0]
            if self.loss == "logistic":
                found = torch.sigmoid(found)
        values: FloatArray = found.double().numpy() * self.target_scale_ + self.target_mean_
        return values

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that `fit` learnt as arrays, for `from_arrays`."""
        state = {name: value.numpy() for name, value in self.network_.state_dict().items()}
        moments = np.array([self.target_mean_, self.target_scale_])
        return {**{f"network.{name}": value for name, value in state.items()}, "moments": moments}

    def from_arrays(self, arrays: dict[str, NDArray[Any]]) -> Self:
        """Take over what `arrays` gave; this object has the parameters of the one that was fitted.

        Raises
        ------
        DataError
            If the arrays do not fit the parameters.
        """
        import torch

        prefix = "network."
        try:
            self.target_mean_, self.target_scale_ = (float(value) for value in arrays["moments"])
            self.n_features_in_ = int(arrays[f"{prefix}0.weight"].shape[1])
            with torch.random.fork_rng(devices=[]):
                self.network_ = self._network()
            self.network_.load_state_dict(
                {
                    name.removeprefix(prefix): torch.from_numpy(np.array(value))
                    for name, value in arrays.items()
                    if name.startswith(prefix)
                }
            )
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise DataError(f"these arrays are not those of such a DeferralMLP: {error}") from error
        self.network_.eval()
        return self

    def _network(self) -> nn.Sequential:
        from torch import nn

        layers: list[nn.Module] = []
        width_in = self.n_features_in_
        for _ in range(self.n_layers):
            layers += [nn.Linear(width_in, self.width), nn.BatchNorm1d(self.width), nn.ReLU()]
            width_in = self.width
        return nn.Sequential(*layers, nn.Linear(width_in, 1))

    def _checked(self, X: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
        if self.loss not in ("squared", "logistic"):
            raise DataError(f"loss must be 'squared' or 'logistic', got {self.loss!r}")
        for name in ("n_layers", "width", "epochs", "batch_size"):
            least = 2 if name == "batch_size" else 1
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        x, targets = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if x.ndim != 2 or targets.shape != (len(x),) or len(x) < 2:
            raise DataError(
                "X must have shape (n, d) and y (n,) with n of at least 2, got "
                f"{x.shape} and {targets.shape}"
            )
        if not (np.isfinite(x).all() and np.isfinite(targets).all()):
            raise DataError("X and y must be finite")
        if self.loss == "logistic" and not np.isin(targets, (0.0, 1.0)).all():
            raise DataError("targets of the logistic loss must be 0 or 1")
        return x, targets
