"""When tokens come out of ``generate``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class TokenClock:
    """A logits processor that notes when each token's logits were ready; changes nothing.

    Pass it in ``logits_processor=[clock]`` of any ``generate``.

    Parameters
    ----------
    started
        When the work began, as `time.perf_counter` says; now if None.

    Attributes
    ----------
    seconds_to_first_token : float
        From the start to the first logits; NaN before.
    n_steps : int
        Calls so far: tokens of the longest sequence in the batch.

    Examples
    --------
    >>> clock = TokenClock()
    >>> clock(None, "logits"), clock.n_steps, clock.seconds_to_first_token < 1
    ('logits', 1, True)
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self.seconds_to_first_token = float("nan")
        self.n_steps = 0

    def __call__(self, input_ids: Tensor | None, scores: Any) -> Any:
        """Note the time, return `scores`."""
        if not self.n_steps:
            self.seconds_to_first_token = time.perf_counter() - self.started
        self.n_steps += 1
        return scores
