"""`bakeoff run selection`: from options to a contest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, runnable
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.data.samples import TrainingPool
    from bakeoff.data.tasks import ClassificationTask

# Of a pool to train on, where nobody says how much: a fifth, as MATES does.
_SHARE = 0.2
TRAINING_ONLY = (
    "number",
    "tokens",
    "selector_model",
    "train",
    "batch_size",
    "learning_rate",
    "max_length",
)


def contest(options: Options, console: Console) -> Contest:
    """Read the data and choose the designs: to label, or with a target to train on."""
    console.print("reading data", style="dim")
    if options.target is None:
        return _annotation(options, console)
    return _training(options, console)


def _annotation(options: Options, console: Console) -> Contest:
    from bakeoff.selection.problem import (
        AnnotationProblem,
        annotation_designs,
        default_budgets,
    )

    refuse(options, TRAINING_ONLY, "is for data to train on, and needs --target")
    refuse(options, ("steps",), "makes no difference to selection; leave it out")
    if options.task not in (None, "labelled"):
        raise DataError(f"--task must be labelled for data to label, got {options.task}")
    if "in-context" not in options.learners:
        refuse(options, ("base",), "answers in context only: give --learner in-context too")
    known = annotation_designs()
    chosen = choose_designs(known, options.designs)
    tasks, notes = _labelled(options)
    _show(notes, console)
    given: dict[str, Any] = {"language_model": options.base, "embedder": options.embedder}
    problem = AnnotationProblem(
        tasks,
        budgets=options.budgets or default_budgets(tasks),
        learners=options.learners or ("nearest-neighbour",),  # type: ignore[arg-type]
        **{name: value for name, value in given.items() if value is not None},
    )
    name = ", ".join(task.name for task in tasks)
    return Contest(problem, known, chosen, ("random",), name, _usage)


def _training(options: Options, console: Console) -> Contest:
    from bakeoff.selection.fine_tuning import FineTuningBudget
    from bakeoff.selection.problem import TrainingProblem, training_designs

    refuse(options, ("budgets", "learners", "task"), "is for data to label; leave out --target")
    refuse(options, ("steps",), "makes no difference to selection: give --tokens")
    if options.train == "head":
        raise DataError("--train must be lora or full for selection, got head")
    known = training_designs()
    chosen = choose_designs(known, options.designs)
    pools, notes = _pools(options)
    _show(notes, console)
    budget: dict[str, Any] = {
        "n_tokens": options.tokens,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
        "train": options.train,
    }
    given: dict[str, Any] = {
        "base": options.base,
        "embedder": options.embedder,
        "selector_model": options.selector_model,
    }
    problem = TrainingProblem(
        pools,
        n_select=options.number or max(1, round(_SHARE * len(pools[0].samples))),
        budget=FineTuningBudget(**{k: v for k, v in budget.items() if v is not None}),
        **{name: value for name, value in given.items() if value is not None},
    )
    if options.designs is None:
        chosen = runnable(known, problem, console)
    name = ", ".join(pool.name for pool in pools)
    return Contest(problem, known, chosen, ("random",), name, _usage)


def _labelled(options: Options) -> tuple[tuple[ClassificationTask, ...], tuple[str, ...]]:
    from bakeoff.data import ClassificationTask, embedding_data, labelled_default
    from bakeoff.data.files import NO_PAIRS

    if not options.data:
        return labelled_default(options.size), ()
    contents = embedding_data(
        list(options.data),
        columns=options.columns or None,
        task="labelled",
        max_texts=options.max_texts,
    )
    tasks = tuple(task for task in contents.tasks if isinstance(task, ClassificationTask))
    return tasks, tuple(note for note in contents.notes if note != NO_PAIRS)


def _pools(options: Options) -> tuple[tuple[TrainingPool, ...], tuple[str, ...]]:
    from bakeoff.data import training_pools_default
    from bakeoff.data.embedded_pools import TARGETS
    from bakeoff.data.training_files import training_pool

    target = options.target
    if not options.data:
        if str(target) not in TARGETS:
            raise DataError(
                f"--target must be one of {', '.join(TARGETS)} for the default data, got {target}; "
                "with a file of your own give --data too"
            )
        return training_pools_default(options.size, (str(target),)), ()
    pool = training_pool(
        list(options.data),
        Path(str(target)),
        columns=options.columns or None,
        max_texts=options.max_texts,
    )
    return (pool,), pool.notes


def _show(notes: tuple[str, ...], console: Console) -> None:
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False)


def _usage(destination: Path, loads_anywhere: bool) -> list[str]:
    return ["import pandas", f'picks = pandas.read_parquet("{destination / "picks.parquet"}")']
