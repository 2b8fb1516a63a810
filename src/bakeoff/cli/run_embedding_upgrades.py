"""`bakeoff run embedding --question upgrades`: from options to a contest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, runnable
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

SIMPLEST = ("replay", "untrained vectors")
_UNUSED = (
    *("target", "task", "embedder", "selector_model", "budgets", "learners", "number", "tokens"),
    *("max_length", "layers", "pivot", "held_out"),
)


def contest(options: Options, console: Console) -> Contest:
    """Read the labelled texts, arrange them into streams of classes, choose the designs."""
    from bakeoff.embedding.problem.upgrades import (
        UpgradeProblem,
        default_class_texts,
        read_class_texts,
        upgrade_designs,
    )

    refuse(options, _UNUSED, "makes no difference to upgrades; leave it out")
    if options.train == "lora":
        raise DataError("--train for upgrades is head or full, got lora")
    known = upgrade_designs()
    choose_designs(known, options.designs)  # a wrong name is told before any work
    console.print("reading data", style="dim")
    if options.data:
        data = read_class_texts(
            list(options.data), columns=options.columns or None, max_texts=options.max_texts
        )
        for note in (note for one in data for note in one.notes):
            console.print(f"  {note}", style="dim", highlight=False)
    else:
        data = default_class_texts(options.size)
    given: dict[str, Any] = {
        "encoder": options.base,
        "train": options.train,
        # A stream's steps are versions; training is counted in epochs.
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    problem = UpgradeProblem(
        data, **{name: value for name, value in given.items() if value is not None}
    )
    chosen = choose_designs(known, options.designs)
    if options.designs is None:
        chosen = runnable(known, problem, console)
    name = f"upgrades: {', '.join(stream.name for stream in problem.streams)}"

    def usage(destination: Any, loads_anywhere: bool) -> list[str]:
        return problem.usage(destination)

    return Contest(problem, known, chosen, SIMPLEST, name, usage)
