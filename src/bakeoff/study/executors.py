"""Three ways to run trials: in this process, in worker processes, on a Ray cluster.

All three are generators of outcomes. None of them touches the store, and none hands out a new trial
to a worker before the consumer has come back for more: a worker has at most one trial that is not
recorded yet, so a kill loses at most one trial per worker.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import signal
import tarfile
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bakeoff.errors import BakeoffError
from bakeoff.study.design import Design
from bakeoff.study.events import Event, TrialProgress, TrialStarted
from bakeoff.study.measure import Measured
from bakeoff.study.protocol import Metric, Problem, Trial, Work
from bakeoff.study.store import Scores, sync_tree

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_PROGRESS_SECONDS = 0.1
_STOP_SECONDS = 3.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A trial to run.

    Parameters
    ----------
    trial_id
        Its id in the store.
    design, seed
        What to run.
    scratch
        The folder to give to the problem; not made yet.
    """

    trial_id: str
    design: Design
    seed: int
    scratch: Path


@dataclass(frozen=True)
class Finished:
    """A trial that ran and gave usable scores; its files are on the disk."""

    job: Job
    scores: Scores
    cost: Mapping[str, float]
    notes: tuple[str, ...]
    artifact: Path | None
    wall_seconds: float


@dataclass(frozen=True)
class Failed:
    """A trial that raised, gave unusable scores, or took its worker down; `error` is one line."""

    job: Job
    error: str
    traceback: str


Outcome = Finished | Failed
Emit = Callable[[Event], None]


class Executor(Protocol):
    """Runs jobs in about the given order and yields their outcomes as they come.

    Closing the generator stops whatever still runs.
    """

    def run(
        self, problem: Problem, jobs: Sequence[Job], emit: Emit
    ) -> Generator[Outcome, None, None]:
        """Yield one outcome per job."""


class InProcess:
    """One trial after the other, here."""

    def run(
        self, problem: Problem, jobs: Sequence[Job], emit: Emit
    ) -> Generator[Outcome, None, None]:
        """Yield one outcome per job, in order."""
        for job in jobs:
            emit(TrialStarted(job.design.name, job.seed))
            yield run_job(problem, job, emit)


class Processes:
    """Trials in spawned worker processes, each with its share of the processor's threads.

    A worker that dies costs its one trial and is replaced.

    Parameters
    ----------
    workers
        Number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self, problem: Problem, jobs: Sequence[Job], emit: Emit
    ) -> Generator[Outcome, None, None]:
        """Yield one outcome per job, as they come."""
        from multiprocessing import connection

        payload = pickle.dumps(problem)
        waiting = deque(jobs)
        threads = threads_per_worker(min(self._workers, len(jobs)))
        crew: dict[Connection, _Worker] = {}
        any_worked = False
        try:
            while waiting or crew:
                while waiting and len(crew) < self._workers:
                    worker = _Worker(payload, threads)
                    crew[worker.connection] = worker
                    worker.give(waiting.popleft(), emit)
                # A process that a dead worker has left behind can hold the pipe open, so no end of
                # file comes: look whether the workers live once a second as well.
                ready = connection.wait(list(crew), timeout=1.0)
                for pipe, worker in list(crew.items()):
                    if pipe not in ready and worker.is_alive():
                        continue
                    message = worker.receive()
                    if isinstance(message, TrialProgress):
                        emit(message)
                        continue
                    if message is None:
                        del crew[pipe]
                        if not worker.ready and not any_worked:
                            raise BakeoffError(_cannot_start(worker.ending()))
                        yield worker.obituary()
                        continue
                    any_worked = True
                    if message == _READY:
                        worker.ready = True
                        continue
                    yield message
                    if waiting:
                        worker.give(waiting.popleft(), emit)
                    else:
                        del crew[pipe]
                        worker.dismiss()
        finally:
            for worker in crew.values():
                worker.stop()


class Ray:
    """Trials as tasks of a Ray cluster (``ray.init`` is called unless the caller has done so).

    The machines need not share a file system: a trial's files come back with its scores.

    Parameters
    ----------
    workers
        Number of trials in flight; with 1, as many as the cluster has processors.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self, problem: Problem, jobs: Sequence[Job], emit: Emit
    ) -> Generator[Outcome, None, None]:
        """Yield one outcome per job, as they come."""
        ray = import_ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        in_flight = self._workers
        if in_flight == 1:
            in_flight = max(1, int(ray.cluster_resources().get("CPU", 1)))
        shared = ray.put(problem)
        # A trial that takes its worker down would do so again: no silent retries.
        task = ray.remote(max_retries=0)(run_elsewhere)
        waiting = deque(jobs)
        running: dict[Any, Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < in_flight:
                    job = waiting.popleft()
                    running[task.remote(shared, job)] = job
                    emit(TrialStarted(job.design.name, job.seed))
                (reference,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(reference)
                try:
                    outcome, archive = ray.get(reference)
                    yield bring_home(job, outcome, archive)
                except ray.exceptions.RayError as error:
                    yield Failed(job, one_line(error), str(error))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def import_ray() -> Any:
    """Return the module `ray`.

    Raises
    ------
    BakeoffError
        If it is not installed; says which extra brings it.
    """
    try:
        import ray
    except ImportError as error:
        raise BakeoffError(
            "engine='ray' needs the package ray: pip install 'bakeoff[ray]', "
            "or use engine='local' with workers=N"
        ) from error
    return ray


def run_job(problem: Problem, job: Job, emit: Emit) -> Outcome:
    """Run one trial and check what it gave; whatever it raises becomes a `Failed`."""
    measured = Measured()
    try:
        job.scratch.mkdir(parents=True)
        work = Work(job.scratch, _throttled(job, emit))
        with measured:
            trial = problem.run(job.design, job.seed, work)
        scores, cost, notes = check_trial(trial, problem.metrics, job.scratch)
        if any(job.scratch.iterdir()):
            sync_tree(job.scratch)
    # A trial that calls sys.exit() must not end the study; KeyboardInterrupt must.
    except (Exception, SystemExit) as error:
        return Failed(job, one_line(error), traceback.format_exc())
    return Finished(
        job=job,
        scores=scores,
        cost={
            "wall_seconds": measured.wall_seconds,
            "peak_memory_bytes": measured.peak_memory_bytes,
        }
        | cost,
        notes=notes,
        artifact=Path(trial.artifact) if trial.artifact is not None else None,
        wall_seconds=measured.wall_seconds,
    )


def check_trial(
    trial: Trial, metrics: Mapping[str, Metric], scratch: Path
) -> tuple[Scores, dict[str, float], tuple[str, ...]]:
    """Return a trial's scores, cost and notes as plain types.

    Raises
    ------
    TypeError
        If `trial` is not a `Trial`.
    ValueError
        If a metric is not one that the problem measures, scores are not one finite number per unit,
        a cost is not a finite number, or the artifact is not a folder inside `scratch`.
    """
    if not isinstance(trial, Trial):
        raise TypeError(f"run must return a Trial, got {type(trial).__name__}")
    measured = [name for name, metric in metrics.items() if not metric.combines]
    scores: Scores = {}
    for metric, tasks in trial.scores.items():
        if metric not in measured:
            raise ValueError(f"trial reports metric {metric!r}; the problem measures {measured}")
        scores[metric] = {str(task): _checked(metric, task, s) for task, s in tasks.items()}
    if not any(scores.values()):
        raise ValueError(f"trial reports no scores; the problem measures {measured}")
    cost = {str(name): float(value) for name, value in trial.cost.items()}
    for name, value in cost.items():
        if not math.isfinite(value):
            raise ValueError(f"cost {name!r} must be finite, got {value}")
    if trial.artifact is not None:
        artifact = Path(trial.artifact)
        if not artifact.is_dir() or not artifact.is_relative_to(scratch):
            raise ValueError(
                f"artifact must be a folder inside the trial's own {scratch}, got {artifact}"
            )
    return scores, cost, tuple(str(note) for note in trial.notes)


def one_line(error: BaseException) -> str:
    """Return an exception as its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def threads_per_worker(workers: int) -> int:
    """Return how many threads each of so many workers may use."""
    return max(1, available_cores() // max(1, workers))


def available_cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_elsewhere(problem: Problem, job: Job) -> tuple[Outcome, bytes]:
    """Run a trial on a machine that need not see the study directory.

    Returns the outcome, with paths as if it had run at home, and a tar archive of the trial's
    folder for `bring_home`.
    """
    with tempfile.TemporaryDirectory() as folder:
        away = replace(job, scratch=Path(folder, job.scratch.name))
        outcome = replace(run_job(problem, away, lambda event: None), job=job)
        if isinstance(outcome, Failed):
            return outcome, b""
        if outcome.artifact is not None:
            inside = outcome.artifact.relative_to(away.scratch)
            outcome = replace(outcome, artifact=job.scratch / inside)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(away.scratch, arcname=".")
        return outcome, archive.getvalue()


def bring_home(job: Job, outcome: Outcome, archive: bytes) -> Outcome:
    """Unpack what `run_elsewhere` returned into the job's scratch folder."""
    if isinstance(outcome, Finished):
        try:
            job.scratch.mkdir(parents=True)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(job.scratch, filter="data")
            sync_tree(job.scratch)
        except tarfile.TarError as error:  # e.g. a link that points out of the folder
            return Failed(job, one_line(error), traceback.format_exc())
    return outcome


def _checked(metric: str, task: str, scores: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    where = f"scores of metric {metric!r}, task {task!r}"
    array = np.array(scores, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{where} must be one number per unit, got shape {array.shape}")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{where} must be finite, got {bad} of {len(array)} that are not")
    return array


def _throttled(job: Job, emit: Emit) -> Callable[[float, str], None]:
    last = -float("inf")

    def progress(fraction: float, message: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS:
            last = now
            emit(TrialProgress(job.design.name, job.seed, float(fraction), str(message)))

    return progress


_READY = "ready"


class _Worker:
    """A worker process and this side's end of its pipe."""

    def __init__(self, payload: bytes, threads: int) -> None:
        import multiprocessing

        # Spawned, not forked: a fork of a process with threads (torch, DuckDB) can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.ready = False
        self._job: Job | None = None
        self._process: SpawnProcess = context.Process(target=_serve, args=(theirs, payload))
        with _environment(threads):
            self._process.start()
        theirs.close()

    def give(self, job: Job, emit: Emit) -> None:
        self._job = job
        emit(TrialStarted(job.design.name, job.seed))
        with suppress(OSError):  # it has died: `receive` will say so
            self.connection.send(job)

    def receive(self) -> Any:
        """Return the next message, or None if the worker has died."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def ending(self) -> str:
        """Say how the process ended."""
        self._process.join(_STOP_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            return f"was ended by {name}{hint}"
        return f"ended with exit code {code}"

    def obituary(self) -> Failed:
        assert self._job is not None
        error = f"the worker process {self.ending()}"
        self.stop()
        return Failed(self._job, error, f"{error}; no traceback is to be had\n")

    def dismiss(self) -> None:
        """Let the process end by itself."""
        with suppress(OSError):
            self.connection.send(None)
        self._process.join(_STOP_SECONDS)
        self.stop()

    def stop(self) -> None:
        """End the process, by force if need be."""
        self.connection.close()
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection, payload: bytes) -> None:
    """Run jobs until told to stop; the body of a worker process."""
    # Ctrl-C reaches the whole process group; the parent decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    problem: Problem | None = None
    with suppress(EOFError, OSError):  # the parent has gone: there is nobody to tell
        connection.send(_READY)
        while (job := connection.recv()) is not None:
            try:
                problem = problem or pickle.loads(payload)
                outcome = run_job(problem, job, connection.send)
            except (Exception, SystemExit) as error:
                outcome = Failed(job, one_line(error), traceback.format_exc())
            connection.send(outcome)


def _die_with_parent() -> None:
    """End this process when the study is killed: nobody is left to take the result."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _environment(threads: int) -> Generator[None, None, None]:
    """Give processes started meanwhile their share of threads, unless the user has set it."""
    mine = [name for name in _THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(mine, str(threads)))
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


def _cannot_start(ending: str) -> str:
    return (
        f"a worker process {ending} before it could take a trial (its own message is above); "
        "a script that uses workers > 1 must start its study under "
        "`if __name__ == '__main__':`, because workers import the script"
    )
