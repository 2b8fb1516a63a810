"""What a running study tells its audience: small frozen records, handed to one callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StudyStarted:
    """First event of every run.

    Parameters
    ----------
    name
        The study's name.
    designs, seeds
        Names and seeds in the order of the study; every pair of them is one trial.
    planned, reused
        Number of trials in the study, and how many of them the store already holds.
    workers
        Number of trials that run at the same time.
    headline
        Label of the metric whose mean is the `score` of `TrialFinished`.
    higher_is_better
        Direction of that metric.
    """

    name: str
    designs: tuple[str, ...]
    seeds: tuple[int, ...]
    planned: int
    reused: int
    workers: int
    headline: str
    higher_is_better: bool


@dataclass(frozen=True)
class SharedWork:
    """The problem prepares what its designs share; ends with a fraction of 1."""

    fraction: float
    message: str


@dataclass(frozen=True)
class TrialStarted:
    """A trial was handed to a worker."""

    design: str
    seed: int


@dataclass(frozen=True)
class TrialProgress:
    """A running trial says how far it is (at most about ten times a second)."""

    design: str
    seed: int
    fraction: float
    message: str


@dataclass(frozen=True)
class TrialFinished:
    """A trial is in the store.

    Parameters
    ----------
    design, seed
        Which one.
    score
        Mean over tasks of the headline metric.
    seconds
        Wall time of the trial; of the original run if `reused`.
    reused
        The trial was in the store before this run and was not run again.
    """

    design: str
    seed: int
    score: float
    seconds: float
    reused: bool


@dataclass(frozen=True)
class TrialFailed:
    """A trial raised, gave unusable scores, or took its worker down; `error` is one line."""

    design: str
    seed: int
    error: str


@dataclass(frozen=True)
class StudyFinished:
    """Last event of a run, after results and report are written.

    `finished` and `failed` count trials of the whole study; an interrupted study has fewer of the
    two together than were planned.
    """

    finished: int
    failed: int
    interrupted: bool
    seconds: float


Event = (
    StudyStarted
    | SharedWork
    | TrialStarted
    | TrialProgress
    | TrialFinished
    | TrialFailed
    | StudyFinished
)
Progress = Callable[[Event], None]
