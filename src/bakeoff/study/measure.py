"""What a stretch of work in this process took and warned of."""

from __future__ import annotations

import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_HIGH_WATER_MARK = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)
_SAMPLE_SECONDS = 0.05


class Measured:
    """Measures the block it is entered for.

    Peak memory is the largest resident set of the whole process meanwhile, in bytes. Linux keeps it
    exactly; elsewhere it is sampled twenty times a second, so shorter peaks can be missed.

    Examples
    --------
    >>> with Measured() as measured:
    ...     total = sum(range(1000))
    >>> measured.wall_seconds >= 0 and measured.peak_memory_bytes > 0
    True
    """

    wall_seconds: float = 0.0
    peak_memory_bytes: float = 0.0

    def __enter__(self) -> Measured:
        self._sampler = None if _reset_high_water_mark() else _Sampler()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_seconds = time.perf_counter() - self._began
        self.peak_memory_bytes = float(
            self._sampler.stop() if self._sampler else _read_high_water_mark()
        )


def _reset_high_water_mark() -> bool:
    """Set the kernel's peak back to the present use; False where that is not possible."""
    try:
        _CLEAR_REFS.write_text("5")
        return _read_high_water_mark() > 0
    except OSError:
        return False


def _read_high_water_mark() -> int:
    match = _HIGH_WATER_MARK.search(_STATUS.read_bytes())
    return 1024 * int(match[1]) if match else 0


class _Sampler:
    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process(os.getpid())
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        self._sample()
        return self._peak

    def _sample(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while True:
            self._sample()
            if self._done.wait(_SAMPLE_SECONDS):
                return


@contextmanager
def warnings_noted() -> Iterator[list[str]]:
    """Collect what a trial warns of, for its notes in the report, instead of printing it.

    Yields
    ------
    list of str
        Filled when the block ends: the messages of all `UserWarning`, in order.

    Examples
    --------
    >>> with warnings_noted() as notes:
    ...     warnings.warn("one text was cut", stacklevel=1)
    >>> notes
    ['one text was cut']
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
        notes += [str(each.message) for each in caught if each.category is UserWarning]
