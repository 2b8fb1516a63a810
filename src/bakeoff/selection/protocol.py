"""What a selector must offer: fit on a pool, picks in order, a reason for each."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class DataSelector(Protocol):
    """Chooses rows of a pool. Constructor arguments configure it; data goes to `fit`."""

    selected_indices_: NDArray[np.int64]

    def fit(self, X: Any, y: None = None) -> DataSelector:
        """Choose rows of the pool `X` (vectors, a graph, texts or samples, as the class says)."""

    def reasons(self) -> list[str]:
        """Return one short reason per pick, in pick order, e.g. ``"12.3 votes"``."""
