"""`bakeoff run experts`: from options to a contest, by what is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, runnable
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.data.domain_texts import DomainTexts
    from bakeoff.study import Designs

QUESTIONS = ("layers", "upcycling", "refactoring")
"""Which layer; how specialists become a mixture; how a dense model becomes a cheaper one."""

_UNUSED = (
    *("target", "task", "embedder", "selector_model", "train", "steps", "budgets", "learners"),
    "number",
)
_SIMPLEST = {
    "layers": ("dense",),
    "upcycling": ("dense, trained on",),
    "refactoring": ("pooled mask", "dense teacher"),
}


def contest(options: Options, console: Console) -> Contest:
    """Read the domains and choose the designs of one question."""
    refuse(options, _UNUSED, "makes no difference to experts; leave it out")
    question = options.question or "layers"
    if question not in QUESTIONS:
        raise DataError(f"--question must be one of {', '.join(QUESTIONS)}, got {question!r}")
    if question == "refactoring":
        refuse(options, ("match",), "makes no difference to refactoring; leave it out")
    texts = domains(options, console)
    problem, known = _build(question, texts, options)
    chosen = choose_designs(known, options.designs)
    if options.designs is None:
        chosen = runnable(known, problem, console)
    name = f"{question}: {texts.name}"

    def usage(destination: Any, loads_anywhere: bool) -> list[str]:
        lines: list[str] = problem.usage(destination)
        return lines

    return Contest(problem, known, chosen, _SIMPLEST[question], name, usage)


def domains(options: Options, console: Console) -> DomainTexts:
    """Return the user's texts by domain, split, or the default ones."""
    from bakeoff.data.domain_texts import default_domains, read_domains, split_domains

    console.print("reading data", style="dim")
    if not options.data:
        if options.columns:
            raise DataError("--column needs --data")
        refuse(options, ("max_texts",), "needs --data")
        return default_domains(options.size)
    unknown = sorted(set(options.columns) - {"text"})
    if unknown:
        raise DataError(f"--column: domains have a text column, got {', '.join(unknown)}")
    sources = [str(source) for source in options.data]
    texts, notes = read_domains(
        sources, column=options.columns.get("text"), max_texts=options.max_texts
    )
    split = split_domains(texts, name=", ".join(texts))
    for note in (*notes, *split.notes):
        console.print(f"  {note}", style="dim", highlight=False)
    return split


def budget(options: Options) -> dict[str, Any]:
    """Return what `DomainProblem` takes, of the options that were given."""
    given = {
        "base": _folder_or_name(options.base),
        "n_layers": options.layers,
        "n_tokens": options.tokens,
        "context": options.max_length,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    return {name: value for name, value in given.items() if value is not None}


def _folder_or_name(base: str | None) -> str | None:
    return str(Path(base)) if base is not None and Path(base).is_dir() else base


def _build(question: str, texts: DomainTexts, options: Options) -> tuple[Any, Designs]:
    given = budget(options)
    if options.match is not None:
        given["match"] = options.match
    if question == "layers":
        from bakeoff.experts.problem.layers import LayerProblem, layer_designs

        return LayerProblem(texts, **given), layer_designs()
    if question == "upcycling":
        from bakeoff.experts.problem.upcycling import UpcyclingProblem, upcycling_designs

        return UpcyclingProblem(texts, **given), upcycling_designs()
    from bakeoff.experts.problem.refactoring import RefactoringProblem, refactoring_designs

    return RefactoringProblem(texts, **given), refactoring_designs()
