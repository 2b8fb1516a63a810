"""How designs that train each look for a learning rate of their own, in one way for all."""

from __future__ import annotations

import math
from collections.abc import Callable


def search_rate(
    loss_at: Callable[[float], float], start: float, *, factor: float = 3.0, reach: int = 4
) -> dict[float, float]:
    """Go up in steps for as long as it helps; if it does not help at all, go down.

    Down from rates at which training diverged, too, to one at which it does not.

    Parameters
    ----------
    loss_at
        From a learning rate to what shall be low; infinite where training diverged.
    start
        Where to begin.
    factor
        Between one rate and the next.
    reach
        Most steps in one direction.

    Returns
    -------
    dict of float to float
        The losses of all rates that were tried, in order.

    Examples
    --------
    >>> list(search_rate(lambda rate: abs(rate - 9), 1.0))
    [1.0, 3.0, 9.0, 27.0]
    >>> list(search_rate(lambda rate: rate, 27.0, reach=2))
    [27.0, 81.0, 9.0, 3.0]
    """
    found = {start: loss_at(start)}
    for up in (True, False):
        best = start
        for step in range(1, reach + 1):
            rate = start * factor**step if up else start / factor**step
            found[rate] = loss_at(rate)
            helps = found[rate] < found[best] or (not up and math.isinf(found[best]))
            if not helps:
                break
            best = rate
        if best != start:
            break
    return found
