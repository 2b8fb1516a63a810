"""What every family's problem checks of a design, and how it reports progress."""

from __future__ import annotations

from collections.abc import Callable, Collection

from bakeoff.errors import DataError
from bakeoff.study.design import Design


def check_parameters(design: Design, accepted: Collection[str]) -> None:
    """Raise `DataError` if a design has a parameter that its method does not take."""
    unknown = sorted(set(design.params) - set(accepted))
    if unknown:
        raise DataError(
            f"design {design.name!r}: {design.method} takes "
            f"{', '.join(accepted) or 'no parameters'}; got {', '.join(unknown)}"
        )


def check_method(design: Design, known: Collection[str], question: str) -> None:
    """Raise `DataError` if a design's method is none of those that answer the question."""
    if design.method not in known:
        raise DataError(
            f"design {design.name!r}: {design.method} does not say {question}; there are: "
            f"{', '.join(known)}"
        )


def counting(
    progress: Callable[[float, str], None], message: str, part: tuple[float, float] = (0.0, 1.0)
) -> Callable[[int, int], None]:
    """Return a callback of (done, total) that reports to a trial's progress.

    Parameters
    ----------
    progress
        Of `bakeoff.study.Work`.
    message
        What is being done.
    part
        Where this stretch begins and ends, as fractions of the trial.
    """

    def report(done: int, total: int) -> None:
        first, last = part
        progress(first + (last - first) * done / max(total, 1), message)

    return report
