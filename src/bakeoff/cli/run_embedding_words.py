"""`bakeoff run embedding --question words`: which word vectors to use in many languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, unless_asked
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from bakeoff.data.lexicons import Constraints

_UNUSED = (
    *("target", "task", "embedder", "selector_model", "train", "tokens", "budgets", "learners"),
    *("number", "max_texts", "max_length", "layers"),
)
_SIMPLEST = ("raw", "character n-grams")
_ROLES = ("synset", "word", "language", "gloss")


def contest(options: Options, console: Console) -> Contest:
    """Read the words, choose the designs: one per idea, if none are named."""
    from bakeoff.embedding.problem.words import WordProblem, word_designs

    refuse(options, _UNUSED, "makes no difference to words; leave it out")
    known = word_designs()
    chosen = choose_designs(known, options.designs)
    console.print("reading data", style="dim")
    data = _words(options, console)
    given: dict[str, Any] = {
        "base": options.base,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "pivot": options.pivot,
        "held_out_languages": options.held_out or None,
    }
    problem = WordProblem(
        options.size if data is None else data,
        **{name: value for name, value in given.items() if value is not None},
    )
    setting = problem.setting
    held_out = ", ".join(setting.held_out_languages) or "none"
    console.print(f"  from and into {setting.pivot}; languages held out: {held_out}", style="dim")
    if options.designs is None:
        plain = word_designs(variants=False)
        chosen = unless_asked(known, plain, "variants", problem, console)

    def usage(destination: Path, loads_anywhere: bool) -> list[str]:
        return problem.usage(destination)

    return Contest(problem, known, chosen, _SIMPLEST, f"words: {setting.words.name}", usage)


def _words(options: Options, console: Console) -> Constraints | None:
    """Return the user's words, or None for the default ones."""
    if not options.data:
        if options.columns:
            raise DataError("--column needs --data")
        return None
    from bakeoff.data.lexicon_sources import read_constraints

    if len(options.data) > 1:
        raise DataError(f"--data takes one file with a word a row, got {len(options.data)}")
    if unknown := sorted(set(options.columns) - set(_ROLES)):
        raise DataError(f"words have columns {', '.join(_ROLES)}, got {', '.join(unknown)}")
    columns: dict[str, Any] = {f"{role}_column": name for role, name in options.columns.items()}
    found = read_constraints(options.data[0], **columns)
    for note in found.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    return found
