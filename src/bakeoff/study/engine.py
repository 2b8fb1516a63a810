"""Runs a study: what is not in the store yet, in order, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

from bakeoff.study.design import Design
from bakeoff.study.events import (
    Event,
    Progress,
    SharedWork,
    StudyFinished,
    StudyStarted,
    TrialFailed,
    TrialFinished,
)
from bakeoff.study.executors import (
    Executor,
    Failed,
    Finished,
    InProcess,
    Job,
    Outcome,
    Processes,
    Ray,
    import_ray,
)
from bakeoff.study.measure import Measured
from bakeoff.study.protocol import Metric, Problem, Work
from bakeoff.study.results import Plan, Results, assemble, headline_score, plain, save_results
from bakeoff.study.store import Run, Store, StoredTrial, TrialKey

ENGINES = ("local", "ray")
_DAMAGED_NOTE = (
    "Unit scores of {count} trials had vanished from the store, so those trials were run again."
)


class StudyInterrupted(KeyboardInterrupt):
    """The study was stopped by Ctrl-C or SIGTERM; what had finished is kept and reported.

    Parameters
    ----------
    signal_number
        Which signal it was.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"the study was interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Study:
    """A controlled comparison of designs on one problem.

    Parameters
    ----------
    problem
        What the designs are compared on.
    designs
        The contenders, with distinct names.
    reference
        Name of the design that the others are compared with.
    seeds
        How many (0, 1, ...), or which: distinct integers from 0 on.
    directory
        Where trials, results and report are kept. A study that was stopped there is continued.
    alpha
        Significance level; intervals cover 1 - alpha.
    workers
        Number of trials that run at the same time.
    engine
        ``"local"`` (this machine) or ``"ray"`` (a Ray cluster).
    command
        What to type to repeat the study; by default what this process was started with.
    name
        For reports; by default the problem's name.

    Raises
    ------
    TypeError, ValueError
        If an argument cannot be used; names it.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from bakeoff.study import Design, Metric, Study, Trial
    >>> class Guessing:
    ...     name = "guessing"
    ...     metrics = {"hits": Metric("hit rate")}
    ...
    ...     def fingerprint(self): return "abc"
    ...     def describe(self): return {"coins": 200}
    ...     def method_version(self, method): return "1"
    ...     def prepare(self, designs, seeds, work): pass
    ...     def run(self, design, seed, work):
    ...         guesses = np.random.default_rng(seed).random(200) < design.params["skill"]
    ...         return Trial({"hits": {"coins": guesses.astype(float)}})
    >>> designs = [Design(f"skill {p}", "guess", {"skill": p}) for p in (0.5, 0.9)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     Study(Guessing(), designs, reference="skill 0.5", directory=directory).run().winner
    'skill 0.9'
    """

    def __init__(
        self,
        problem: Problem,
        designs: Sequence[Design],
        *,
        reference: str,
        seeds: int | Sequence[int] = 5,
        directory: str | os.PathLike[str],
        alpha: float = 0.05,
        workers: int = 1,
        engine: str = "local",
        command: str | None = None,
        name: str | None = None,
    ) -> None:
        self.problem = problem
        self.designs = _checked_designs(designs, reference)
        self.reference = reference
        self.seeds = _checked_seeds(seeds)
        self.directory = Path(directory)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha!r}")
        self.alpha = float(alpha)
        if not _is_integer(workers) or workers < 1:
            raise ValueError(f"workers must be an integer of at least 1, got {workers!r}")
        self.workers = int(workers)
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
        if engine == "ray":
            import_ray()
        self.engine = engine
        self.command = _command_line() if command is None else command
        self.name = name or problem.name
        _check_metrics(problem.metrics)

    def run(self, progress: Progress | None = None) -> Results:
        """Run what the store does not hold, compare, and write ``results.json`` and the report.

        Trials go seed by seed, so that a study that is stopped early is balanced. A trial that
        raises is recorded and does not stop the others; it is tried again by the next run.

        Parameters
        ----------
        progress
            Called with every event (see `bakeoff.study.events`), from this thread.

        Raises
        ------
        StoreError
            If the directory is in use, damaged, of another version, or cannot be written.
        StudyInterrupted
            A `KeyboardInterrupt`, at Ctrl-C or SIGTERM, after a report of what had finished was
            written. A second Ctrl-C does not wait for that.
        """
        with Store(self.directory) as store, _Signals() as signals:
            return _Session(self, store, signals, progress or _ignore).run()


class _Session:
    """One run of a study."""

    def __init__(self, study: Study, store: Store, signals: _Signals, emit: Progress) -> None:
        self._study = study
        self._store = store
        self._signals = signals
        self._emit = emit
        self._began = time.perf_counter()
        self._started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._plan = _plan(study)
        self._keys = {
            (design.name, seed): TrialKey(
                self._plan.fingerprint, design, seed, self._plan.method_versions[design.method]
            )
            for seed in study.seeds
            for design in study.designs
        }
        self._pairs = {key.id: pair for pair, key in self._keys.items()}
        self._shape: dict[str, dict[str, int]] | None = None
        self._trials = self._recorded()
        self._reused = sum(trial.status == "finished" for trial in self._trials.values())

    def run(self) -> Results:
        self._announce()
        missing = [pair for pair in self._order() if not self._is_finished(pair)]
        try:
            if missing:
                self._prepare(missing)
                self._run_trials(missing)
        except KeyboardInterrupt:
            self._conclude(interrupted=True)
            raise
        return self._conclude(interrupted=False)

    def _recorded(self) -> dict[tuple[str, int], StoredTrial]:
        stored = self._store.trials(self._plan.fingerprint)
        trials = {pair: stored[key.id] for pair, key in self._keys.items() if key.id in stored}
        # Trials of one fingerprint agree on tasks and units unless the problem breaks its word.
        # Then the odd ones are run again, and refused if they still differ.
        finished = [trial for trial in trials.values() if trial.status == "finished"]
        if finished:
            self._shape = min(finished, key=lambda trial: trial.run.recorded).shape
        return {
            pair: trial
            for pair, trial in trials.items()
            if trial.status == "failed" or trial.shape == self._shape
        }

    def _order(self) -> list[tuple[str, int]]:
        # Within a seed the reference comes first: no comparison can do without it.
        names = [design.name for design in self._study.designs]
        names.sort(key=lambda name: name != self._study.reference)
        return [(name, seed) for seed in self._study.seeds for name in names]

    def _is_finished(self, pair: tuple[str, int]) -> bool:
        return pair in self._trials and self._trials[pair].status == "finished"

    def _announce(self) -> None:
        headline = next(iter(self._plan.metrics.values()))
        self._emit(
            StudyStarted(
                name=self._plan.name,
                designs=tuple(design.name for design in self._study.designs),
                seeds=tuple(self._study.seeds),
                planned=len(self._keys),
                reused=self._reused,
                workers=self._study.workers,
                headline=headline.label,
                higher_is_better=headline.higher_is_better,
            )
        )
        for pair in self._order():
            if self._is_finished(pair):
                self._emit(self._finished_event(pair, reused=True))

    def _finished_event(self, pair: tuple[str, int], *, reused: bool) -> TrialFinished:
        trial = self._trials[pair]
        score = headline_score(self._plan.metrics, trial.summary)
        return TrialFinished(*pair, score, trial.cost["wall_seconds"], reused)

    def _prepare(self, missing: Sequence[tuple[str, int]]) -> None:
        names = {name for name, _ in missing}
        designs = [design for design in self._study.designs if design.name in names]
        seeds = [seed for seed in self._study.seeds if any(seed == other for _, other in missing)]
        scratch = self._store.scratch()
        scratch.mkdir()
        work = Work(scratch, self._shared)
        self._shared(0.0, "work that the designs share")
        try:
            with Measured() as measured:
                self._study.problem.prepare(designs, seeds, work)
        finally:
            self._store.discard(scratch)
        self._signals.check()
        with self._signals.held():
            self._store.add_shared_cost(
                self._plan.fingerprint, measured.wall_seconds, measured.peak_memory_bytes
            )
        self._shared(1.0)

    def _shared(self, fraction: float, message: str = "") -> None:
        self._emit(SharedWork(float(fraction), message))

    def _run_trials(self, missing: Sequence[tuple[str, int]]) -> None:
        jobs = [self._job(pair) for pair in missing]
        executor = _executor(self._study.engine, self._study.workers)
        outcomes = executor.run(self._study.problem, jobs, self._emit)
        with closing(outcomes):
            for outcome in outcomes:
                # A trial that swallowed the interruption must not be recorded as if whole.
                self._signals.check()
                with self._signals.held():
                    event = self._record(outcome)
                self._emit(event)

    def _job(self, pair: tuple[str, int]) -> Job:
        key = self._keys[pair]
        return Job(key.id, key.design, key.seed, self._store.scratch(key.id))

    def _record(self, outcome: Outcome) -> Event:
        pair = self._pairs[outcome.job.trial_id]
        if isinstance(outcome, Finished):
            outcome = self._same_shape(outcome)
        recorded = datetime.now(UTC).isoformat(timespec="milliseconds")
        run = Run(self._started, time.perf_counter() - self._began, recorded)
        if isinstance(outcome, Failed):
            self._trials[pair] = self._store.fail(
                self._keys[pair],
                error=outcome.error,
                traceback=outcome.traceback,
                scratch=outcome.job.scratch,
                run=run,
            )
            return TrialFailed(*pair, outcome.error)
        self._trials[pair] = self._store.finish(
            self._keys[pair],
            outcome.scores,
            cost=outcome.cost,
            notes=outcome.notes,
            scratch=outcome.job.scratch,
            artifact=outcome.artifact,
            run=run,
        )
        return self._finished_event(pair, reused=False)

    def _same_shape(self, outcome: Finished) -> Outcome:
        given = {
            metric: {task: len(values) for task, values in tasks.items()}
            for metric, tasks in outcome.scores.items()
        }
        self._shape = self._shape or given
        if given == self._shape:
            return outcome
        error = (
            "ValueError: units per metric and task differ from those of other trials: "
            f"got {given}, expected {self._shape}"
        )
        return Failed(outcome.job, error, f"{error}\n")

    def _conclude(self, *, interrupted: bool) -> Results:
        self._store.flush()
        finished = {pair: t for pair, t in self._trials.items() if t.status == "finished"}
        scores = self._store.scores([trial.id for trial in finished.values()])
        forgotten = self._store.forgotten
        results = assemble(
            self._plan,
            self._trials,
            {pair: scores[trial.id] for pair, trial in finished.items()},
            reused=self._reused,
            shared_cost=self._store.shared_cost(self._plan.fingerprint),
            directory=self._store.directory,
            notes=[_DAMAGED_NOTE.format(count=forgotten)] if forgotten else [],
        )
        save_results(results)
        self._emit(
            StudyFinished(
                finished=len(finished),
                failed=len(self._trials) - len(finished),
                interrupted=interrupted,
                seconds=time.perf_counter() - self._began,
            )
        )
        return results


class _Signals:
    """Turns SIGINT and SIGTERM into `StudyInterrupted`, but never in the middle of a recording.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._received: int | None = None
        self._holding = False

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in self._NUMBERS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the block has ended."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()

    def check(self) -> None:
        """Raise if a signal has come, even one whose exception was swallowed."""
        if self._received is not None:
            raise StudyInterrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self._holding:
            raise StudyInterrupted(number)


def _plan(study: Study) -> Plan:
    problem = study.problem
    fingerprint = problem.fingerprint()
    if not isinstance(fingerprint, str) or not fingerprint:
        raise TypeError(f"fingerprint() must return a non-empty string, got {fingerprint!r}")
    description = plain(problem.describe())
    try:  # now, not after hours of trials
        json.dumps(description)
    except TypeError as error:
        raise TypeError(f"describe() must return JSON-able facts: {error}") from error
    return Plan(
        name=study.name,
        command=study.command,
        problem=problem.name,
        fingerprint=fingerprint,
        description=description,
        metrics=dict(problem.metrics),
        designs=study.designs,
        reference=study.reference,
        seeds=study.seeds,
        alpha=study.alpha,
        workers=study.workers,
        method_versions={
            design.method: problem.method_version(design.method) for design in study.designs
        },
    )


def _executor(engine: str, workers: int) -> Executor:
    if engine == "ray":
        return Ray(workers)
    return InProcess() if workers == 1 else Processes(workers)


def _checked_designs(designs: Sequence[Design], reference: str) -> tuple[Design, ...]:
    designs = tuple(designs)
    for design in designs:
        if not isinstance(design, Design):
            raise TypeError(f"designs must be Design objects, got {type(design).__name__}")
    if not designs:
        raise ValueError("designs must hold at least one design, got none")
    names = [design.name for design in designs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"designs must have distinct names, got twice: {twice}")
    same: dict[Any, str] = {}
    for design in designs:
        first = same.setdefault((design.method, design.params), design.name)
        if first != design.name:
            raise ValueError(
                f"designs {first!r} and {design.name!r} have the same method and params"
            )
    if reference not in names:
        raise ValueError(f"reference must be one of the designs {names}, got {reference!r}")
    return designs


def _checked_seeds(seeds: object) -> tuple[int, ...]:
    if _is_integer(seeds):
        seeds = range(seeds)
    elif isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be an integer or a sequence of integers, got {seeds!r}")
    chosen = list(seeds)
    if not chosen:
        raise ValueError("seeds must be at least one, got none")
    for seed in chosen:
        if not _is_integer(seed) or seed < 0:
            raise ValueError(f"seeds must be integers from 0 on, got {seed!r}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be distinct, got {chosen}")
    return tuple(int(seed) for seed in chosen)


def _is_integer(value: object) -> TypeGuard[int]:
    # NumPy's integers are integers too; True is not a number of anything.
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_metrics(metrics: Mapping[str, Metric]) -> None:
    if not metrics:
        raise ValueError("the problem has no metrics")
    for name, metric in metrics.items():
        for part in metric.combines:
            if part not in metrics or metrics[part].combines:
                raise ValueError(
                    f"metric {name!r} combines {part!r}, which is not a measured metric"
                )
            if metrics[part].higher_is_better != metric.higher_is_better:
                raise ValueError(
                    f"metric {name!r} combines {part!r}, which has the other direction"
                )


def _command_line() -> str:
    """Return what started this process, without the folder of the interpreter."""
    first, *rest = sys.orig_argv or ["python"]
    return shlex.join([Path(first).name, *rest])


def _ignore(event: Event) -> None:
    pass
