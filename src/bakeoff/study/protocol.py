"""What a family and the study engine say to each other.

The engine knows no method: it asks a `Problem` to run a `Design` under a seed and gets a `Trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bakeoff.study.design import Design


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    Parameters
    ----------
    label
        Its name in reports, e.g. ``"MRR@10"``.
    higher_is_better
        Direction.
    combines
        Names of other metrics whose tasks this one averages over (each task with its own measure).
        A combined metric is computed by the study; a trial does not report it.
    margin
        Differences smaller than this are of no practical consequence (the equivalence margin).
    """

    label: str
    higher_is_better: bool = True
    combines: tuple[str, ...] = ()
    margin: float | None = None


@dataclass(frozen=True)
class Trial:
    """What one design scored under one seed.

    Parameters
    ----------
    scores
        ``scores[metric][task]`` is a float64 array ``(n_units,)``: one number per query, example or
        sentence pair, in the same order for every design and seed. The task's score is their mean.
    cost
        Named numbers; the report knows ``wall_seconds``, ``peak_memory_bytes``,
        ``trained_parameters``, ``forward_flops_per_text`` and ``labels_used``.
    artifact
        A folder inside the trial's scratch directory that holds what was fitted, or None.
    notes
        Sentences for the reader, e.g. how many texts were truncated.
    """

    scores: Mapping[str, Mapping[str, NDArray[np.float64]]]
    cost: Mapping[str, float] = field(default_factory=dict)
    artifact: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a running trial is given by the engine.

    Parameters
    ----------
    directory
        An empty folder of this trial's own; what it leaves there is kept with the trial.
    progress
        Called with a fraction in [0, 1] and a short message; may be called often.
    """

    directory: Path
    progress: Callable[[float, str], None] = lambda fraction, message: None


class Problem(Protocol):
    """A comparison's subject: data, base model and budget. One implementation per family.

    Instances are pickled to worker processes: keep loaded models out of the pickled state.
    """

    @property
    def name(self) -> str:
        """The family's name, e.g. ``"embedding"``."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Metrics by name; the first is the headline that ranks the designs."""

    def fingerprint(self) -> str:
        """Return a digest, in hexadecimal, of all that scores depend on besides design and seed."""

    def describe(self) -> Mapping[str, object]:
        """Return JSON-able facts for the report: data, sizes, base model, budget."""

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation; a new one makes old trials stale."""

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Do once what these designs share (hidden states, graphs, teacher scores), if anything.

        Called before the first of the trials that are still to be run, in the process that started
        the study; a resumed study calls it again, so what it made before should be found again.
        What it leaves in `work.directory` is not kept.
        """

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Fit and score one design; depends on nothing but its arguments and the fingerprint."""
