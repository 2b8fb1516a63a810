"""What a study found: assembled from its trials, written to and read from ``results.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import write_text
from bakeoff.errors import StoreError
from bakeoff.study.design import Design
from bakeoff.study.protocol import Metric
from bakeoff.study.store import Scores, StoredTrial

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"

_UNKNOWN = (
    "difference",
    "interval",
    "p_value",
    "p_holm",
    "effect_size",
    "verdict",
    "wins",
    "ties",
    "losses",
    "difference_quantiles",
    "needed_units",
    "needed_seeds",
)
_RANK_FIELDS = ("average_ranks", "critical_difference", "cliques", "n_blocks", "test")


@dataclass(frozen=True)
class Plan:
    """The facts of a study that do not depend on how far it has come.

    Parameters
    ----------
    name, command
        As in `Study`.
    problem, fingerprint, description
        Name, fingerprint and description of the problem.
    metrics
        The problem's metrics; the first that has scores is the headline.
    designs, reference, seeds, alpha, workers
        As in `Study`.
    method_versions
        By method.
    """

    name: str
    command: str
    problem: str
    fingerprint: str
    description: Mapping[str, object]
    metrics: Mapping[str, Metric]
    designs: Sequence[Design]
    reference: str
    seeds: Sequence[int]
    alpha: float
    workers: int
    method_versions: Mapping[str, str]


class Results(Mapping[str, Any]):
    """What a study found; reads like the dictionary in ``results.json``.

    Parameters
    ----------
    data
        Content of ``results.json``.
    directory
        The study directory, which artifact paths are relative to.
    unit_scores
        ``unit_scores[metric][design][task]``, float64 ``(n_seeds, n_units)``, aligned across the
        designs that could be compared: what `bakeoff.study.compare` takes, for comparisons with
        another reference. Empty for results that were read from a file.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        directory: Path,
        unit_scores: Mapping[str, Grid] | None = None,
    ) -> None:
        self.data = dict(data)
        self.directory = Path(directory)
        self.unit_scores = dict(unit_scores or {})

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        study = self.data["study"]
        return (
            f"<Results of {study['name']!r} in {self.directory}: winner {self.winner!r}, "
            f"{study['trials']['finished']} of {study['trials']['planned']} trials>"
        )

    @property
    def winner(self) -> str | None:
        """Name of the design to use, or None if nothing could be compared."""
        name: str | None = self.data["winner"]["design"]
        return name

    @property
    def winner_artifact(self) -> Path | None:
        """Folder with the fitted winner, or None if it left none."""
        artifact = self.data["winner"]["artifact"]
        return None if artifact is None else self.directory / artifact

    def table(self) -> Any:
        """Return the verdict table for a `rich.console.Console` to print."""
        from bakeoff.study.terminal import terminal_table

        return terminal_table(self.data)


def load_results(directory: str | Path) -> Results:
    """Read what the study in a directory found; the study may be running.

    Parameters
    ----------
    directory
        The study directory.

    Raises
    ------
    StoreError
        If there are no results, or they are damaged or of another version.
    """
    from bakeoff.study.schema import parse_results

    path = Path(directory) / RESULTS_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{directory} holds no {RESULTS_FILE}: no study has finished or been interrupted there"
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); run the study again: it is made anew from the store"
        ) from error
    parse_results(data)
    return Results(data, Path(directory))


def save_results(results: Results) -> None:
    """Write ``results.json`` and ``report.html`` into the study directory, each atomically."""
    from bakeoff.study.report import write_report

    text = json.dumps(results.data, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_text(results.directory / RESULTS_FILE, text + "\n")
        write_report(results.data, results.directory / REPORT_FILE)
    except OSError as error:
        raise StoreError(
            f"results cannot be written to {results.directory} ({error.strerror or error}); "
            "trials are kept: make room or mend the rights, then run the study again"
        ) from error


def assemble(
    plan: Plan,
    trials: Mapping[tuple[str, int], StoredTrial],
    scores: Mapping[tuple[str, int], Scores],
    *,
    reused: int,
    shared_cost: Mapping[str, float],
    directory: Path,
    notes: Sequence[str] = (),
) -> Results:
    """Compare the designs on what has finished.

    Parameters
    ----------
    plan
        The study.
    trials
        Recorded trials by design name and seed.
    scores
        Unit scores of the finished ones.
    reused
        Number of trials that were in the store before this run.
    shared_cost
        As `Store.shared_cost` gives it.
    directory
        Study directory.
    notes
        Sentences to put before those about missing trials.
    """
    from bakeoff.study.environment import environment

    finished = {pair for pair, trial in trials.items() if trial.status == "finished"}
    failed = {pair for pair, trial in trials.items() if trial.status == "failed"}
    names = [design.name for design in plan.designs]
    compared, seeds = comparable(names, plan.reference, plan.seeds, finished)
    tasks = _tasks(plan.metrics, {pair: scores[pair] for pair in sorted(finished)})
    metrics = {name: metric for name, metric in plan.metrics.items() if tasks[name]}
    metrics = metrics or dict(plan.metrics)
    grids = {name: _grid(tasks[name], scores, compared, seeds) for name in metrics}
    comparisons, ranks = _compare(plan, metrics, grids)
    headline = next(iter(metrics))
    designs = [
        _design(plan, design, comparisons, trials, seeds, directory) for design in plan.designs
    ]
    designs.sort(key=lambda entry: _rank_key(entry, headline, plan.metrics[headline]))
    complete = len(finished) + len(failed) == len(names) * len(plan.seeds)
    runs = [trial.run for trial in trials.values()]
    data = {
        "schema_version": SCHEMA_VERSION,
        "study": {
            "name": plan.name,
            "started": min((run.started for run in runs), default=_now()),
            "finished": max((run.recorded for run in runs), default=_now()) if complete else None,
            "complete": complete,
            "seeds": list(plan.seeds),
            "alpha": plan.alpha,
            "trials": {
                "planned": len(names) * len(plan.seeds),
                "finished": len(finished),
                "failed": len(failed),
                "reused": reused,
            },
            "wall_seconds": _wall_seconds(trials.values()),
            "workers": plan.workers,
        },
        "problem": {
            "name": plan.problem,
            "fingerprint": plan.fingerprint,
            "description": dict(plan.description),
        },
        "metrics": {
            name: {
                "label": metric.label,
                "higher_is_better": metric.higher_is_better,
                "combines": list(metric.combines),
                "margin": metric.margin,
                "tasks": list(tasks[name]),
            }
            for name, metric in metrics.items()
        },
        "reference": plan.reference,
        "designs": designs,
        "ranks": ranks,
        "shared_cost": dict(shared_cost),
        "failures": [
            {
                "design": name,
                "seed": seed,
                "error": trials[name, seed].error or "",
                "traceback": trials[name, seed].traceback or "",
            }
            for seed in plan.seeds
            for name in names
            if (name, seed) in failed
        ],
        "winner": _winner(designs, plan, headline, seeds),
        "notes": [*notes, *_notes(plan, names, compared, seeds, finished, failed)],
        "environment": environment(),
        "command": plan.command,
    }
    return Results(plain(data), directory, grids)


def comparable(
    designs: Sequence[str],
    reference: str,
    seeds: Sequence[int],
    finished: Collection[tuple[str, int]],
) -> tuple[list[str], list[int]]:
    """Return the designs and the seeds that form a full grid of finished trials.

    A design without any finished trial is left out; of the others, only seeds that all of them have
    finished count. Should there be none, the designs that share the fewest seeds with the reference
    (if that has none, with the design that has the most) are left out until there are.

    Examples
    --------
    >>> comparable(["a", "b"], "a", [0, 1], {("a", 0), ("a", 1), ("b", 1)})
    (['a', 'b'], [1])
    """
    done = {name: {seed for seed in seeds if (name, seed) in finished} for name in designs}
    chosen = [name for name in designs if done[name]]
    if not chosen:
        return [], []
    anchor = reference if reference in chosen else max(chosen, key=lambda name: len(done[name]))
    while not (common := set.intersection(*(done[name] for name in chosen))):
        others = [name for name in reversed(chosen) if name != anchor]
        chosen.remove(min(others, key=lambda name: len(done[name] & done[anchor])))
    return chosen, [seed for seed in seeds if seed in common]


def combined_tasks(
    metrics: Mapping[str, Metric], measured: Mapping[str, Sequence[str]], name: str
) -> dict[str, tuple[str, str]]:
    """Return the tasks of a metric: name in results -> (measured metric, its task).

    A combined metric has the tasks of the metrics it combines; where two of those have a task of
    the same name, it is preceded by the metric's.

    Examples
    --------
    >>> metrics = {"all": Metric("all", combines=("f1", "recall")), "f1": Metric("F1"),
    ...            "recall": Metric("recall")}
    >>> list(combined_tasks(metrics, {"f1": ["news"], "recall": ["news", "law"]}, "all"))
    ['f1: news', 'recall: news', 'law']
    """
    sources = metrics[name].combines or (name,)
    pairs = [(source, task) for source in sources for task in measured.get(source, ())]
    taken = [task for _, task in pairs]
    return {
        f"{source}: {task}" if taken.count(task) > 1 else task: (source, task)
        for source, task in pairs
    }


def headline_score(
    metrics: Mapping[str, Metric], summary: Mapping[str, Mapping[str, tuple[int, float]]]
) -> float:
    """Return a trial's mean over tasks under the first metric that has any."""
    measured = {metric: list(tasks) for metric, tasks in summary.items()}
    for name in metrics:
        pairs = combined_tasks(metrics, measured, name).values()
        if pairs:
            return float(np.mean([summary[source][task][1] for source, task in pairs]))
    raise ValueError("the trial has no scores")


def plain(value: Any) -> Any:
    """Return `value` as JSON types: tuples as lists, NumPy scalars as numbers, NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


Grid = dict[str, dict[str, NDArray[np.float64]]]
"""``grid[design][task]``: scores of shape (n_seeds, n_units)."""


def _tasks(
    metrics: Mapping[str, Metric], scores: Mapping[Any, Scores]
) -> dict[str, dict[str, tuple[str, str]]]:
    any_trial = next(iter(scores.values()), {})
    measured = {metric: list(tasks) for metric, tasks in any_trial.items()}
    return {name: combined_tasks(metrics, measured, name) for name in metrics}


def _grid(
    tasks: Mapping[str, tuple[str, str]],
    scores: Mapping[tuple[str, int], Scores],
    designs: Sequence[str],
    seeds: Sequence[int],
) -> Grid:
    """Return ``grid[design][task]``, float64 ``(n_seeds, n_units)``."""
    return {
        design: {
            label: np.stack([scores[design, seed][source][task] for seed in seeds])
            for label, (source, task) in tasks.items()
        }
        for design in designs
    }


def _compare(
    plan: Plan, metrics: Mapping[str, Metric], grids: Mapping[str, Grid]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return ``comparisons[metric][design]`` and ``ranks[metric]`` as JSON."""
    from bakeoff.study.statistics import compare, critical_difference

    comparisons: dict[str, dict[str, Any]] = {}
    ranks: dict[str, Any] = {}
    for name, metric in metrics.items():
        grid = grids[name]
        if plan.reference in grid:
            compared = compare(
                grid,
                plan.reference,
                margin=metric.margin,
                alpha=plan.alpha,
                higher_is_better=metric.higher_is_better,
            )
            comparisons[name] = {design: found.to_json() for design, found in compared.items()}
            for record in _records(comparisons[name][plan.reference]):
                record["verdict"] = None  # it is what the others are measured against
        else:
            comparisons[name] = {design: _means_only(tasks) for design, tasks in grid.items()}
        if len(grid) > 1:
            ranking = critical_difference(
                grid, alpha=plan.alpha, higher_is_better=metric.higher_is_better
            ).to_json()
            ranks[name] = {field: ranking[field] for field in _RANK_FIELDS}
    return comparisons, ranks


def _records(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [comparison["overall"], *comparison["tasks"].values()]


def _means_only(tasks: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Return records for a design that has no reference to be compared with."""

    def record(arrays: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
        return dict.fromkeys(_UNKNOWN) | {
            "mean": float(np.mean([array.mean() for array in arrays])),
            "n_units": sum(array.shape[1] for array in arrays),
            "n_seeds": arrays[0].shape[0],
            "n_tasks": len(arrays),
        }

    return {
        "overall": record(list(tasks.values())),
        "tasks": {task: record([array]) for task, array in tasks.items()},
    }


def _design(
    plan: Plan,
    design: Design,
    comparisons: Mapping[str, Mapping[str, Any]],
    trials: Mapping[tuple[str, int], StoredTrial],
    seeds: Sequence[int],
    directory: Path,
) -> dict[str, Any]:
    name = design.name
    mine = {metric: found[name] for metric, found in comparisons.items() if name in found}
    counted = [trials[name, seed] for seed in seeds] if mine else []
    costs: dict[str, list[float]] = {}
    for trial in counted:
        for kind, value in trial.cost.items():
            costs.setdefault(kind, []).append(value)
    artifact = counted[0].artifact if counted else None
    return {
        **design.to_json(),
        "method_version": plan.method_versions[design.method],
        # A user may have cleared large folders away; a path that leads nowhere helps nobody.
        "artifact": artifact if artifact and (directory / artifact).is_dir() else None,
        "metrics": mine,
        "cost": {
            kind: {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
            for kind, values in costs.items()
        },
        "notes": list(dict.fromkeys(note for trial in counted for note in trial.notes)),
    }


def _rank_key(entry: Mapping[str, Any], headline: str, metric: Metric) -> tuple[bool, float]:
    if headline not in entry["metrics"]:
        return True, 0.0
    mean = entry["metrics"][headline]["overall"]["mean"]
    return False, -mean if metric.higher_is_better else mean


def _winner(
    designs: Sequence[Mapping[str, Any]], plan: Plan, headline: str, seeds: Sequence[int]
) -> dict[str, Any]:
    compared = {entry["name"]: entry for entry in designs if headline in entry["metrics"]}
    if plan.reference not in compared:
        reason = f"the reference {plan.reference!r} has no finished trial to compare with"
        return {"design": None, "seed": None, "artifact": None, "reason": reason}
    better = [
        entry
        for entry in compared.values()
        if entry["metrics"][headline]["overall"]["verdict"] == "better"
    ]
    label = plan.metrics[headline].label
    if better:
        chosen = better[0]  # designs are in order of their means
        reason = (
            f"{chosen['name']!r} has the best {label} of the {len(better)} that are better than "
            f"the reference {plan.reference!r}"
            if len(better) > 1
            else f"{chosen['name']!r} alone is better than the reference {plan.reference!r} "
            f"in {label}"
        )
    else:
        chosen = compared[plan.reference]
        reason = f"nothing beat the reference {plan.reference!r} in {label}, so it stays"
    return {
        "design": chosen["name"],
        "seed": seeds[0],
        "artifact": chosen["artifact"],
        "reason": reason,
    }


def _notes(
    plan: Plan,
    names: Sequence[str],
    compared: Sequence[str],
    seeds: Sequence[int],
    finished: Collection[tuple[str, int]],
    failed: Collection[tuple[str, int]],
) -> list[str]:
    notes = []
    planned = len(names) * len(plan.seeds)
    if len(finished) + len(failed) < planned:
        notes.append(
            f"The study is not complete: {len(finished)} of {planned} trials are finished. "
            "The same command continues it."
        )
    for name in names:
        missing = [seed for seed in plan.seeds if (name, seed) in failed]
        if missing:
            notes.append(f"{name!r} failed under {_seeds(missing)}; running again retries it.")
    left_out = [name for name in names if name not in compared]
    if left_out and compared:
        listed = ", ".join(repr(name) for name in left_out)
        notes.append(f"Left out of the statistics, for want of finished trials: {listed}.")
    if compared and len(seeds) < len(plan.seeds):
        notes.append(
            f"The statistics use {_seeds(seeds)} of {len(plan.seeds)}: "
            "only what every compared design has finished counts."
        )
    if compared and plan.reference not in compared:
        notes.append(
            f"The reference {plan.reference!r} has no finished trial, so there are means but no "
            "verdicts."
        )
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    listed = ", ".join(str(seed) for seed in seeds)
    return f"seed {listed}" if len(seeds) == 1 else f"seeds {listed}"


def _wall_seconds(trials: Collection[StoredTrial]) -> float:
    """Return the time over all runs that made these trials, each up to its last trial."""
    last: dict[str, float] = {}
    for trial in trials:
        last[trial.run.started] = max(trial.run.seconds, last.get(trial.run.started, 0.0))
    return sum(last.values())


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
