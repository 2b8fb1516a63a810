"""`bakeoff run embedding`: from options to a contest."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, runnable
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.data.tasks import EmbeddingData

DEMO_BUDGET: dict[str, Any] = {"steps": 40, "batch_size": 16, "max_length": 48}
DEFAULT_BASE = "smollm2-135m"
_UNUSED = (
    *("target", "embedder", "selector_model", "budgets", "learners", "number", "tokens"),
    *("layers", "pivot", "held_out"),
)
QUESTIONS = {
    "pooling": "",
    "domains": "run_embedding_domains",
    "words": "run_embedding_words",
    "upgrades": "run_embedding_upgrades",
}
"""What can be asked, and the module here that knows more of it; the first is the default."""
SIMPLEST = ("mean, causal", "mean, bidirectional")


def contest(options: Options, console: Console) -> Contest:
    """Read the data, load the base model, choose the designs of one question."""
    question = options.question or question_of(options.designs)
    if question not in QUESTIONS:
        raise DataError(f"--question must be one of {', '.join(QUESTIONS)}, got {question!r}")
    if question != "pooling":
        asked: Contest = import_module(f"bakeoff.cli.{QUESTIONS[question]}").contest(
            options, console
        )
        return asked
    from bakeoff.embedding.problem import EmbeddingProblem, default_designs

    refuse(options, _UNUSED, "makes no difference to pooling; leave it out")
    choose_designs(default_designs(), options.designs)  # a wrong name is told before any work
    console.print("reading data", style="dim")
    contents = _read(options)
    for note in contents.notes if options.data else ():  # the default data's are in the report
        console.print(f"  {note}", style="dim", highlight=False)
    given = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
    }
    base = options.base or DEFAULT_BASE
    problem = EmbeddingProblem(
        contents,
        base,
        train=options.train or "head",
        **{
            **({} if options.data else DEMO_BUDGET),
            **{name: value for name, value in given.items() if value is not None},
        },
    )
    console.print(f"loading base model {base}", style="dim", highlight=False)
    known = default_designs(problem.attentions)
    chosen = choose_designs(default_designs(), options.designs)
    if options.designs is None:
        chosen = runnable(known, problem, console)
    return Contest(problem, known, chosen, SIMPLEST, contents.name, _usage)


def question_of(designs: str | None) -> str:
    """Return the first question that has all these designs, so that naming them is enough."""
    from bakeoff.embedding import problem

    if designs is None:
        return "pooling"
    known = {
        "pooling": problem.default_designs,
        "domains": problem.domain_encoder_designs,
        "words": problem.word_designs,
        "upgrades": problem.upgrade_designs,
    }
    parts = designs.split(",")
    for end in range(len(parts), 0, -1):
        for question, list_designs in known.items():
            with suppress(DataError):
                choose_designs(list_designs(), ",".join(parts[:end]))
                return question  # of the most designs that belong together; it refuses the rest
    return "pooling"  # which says what is wrong with them


def _usage(destination: Path, loads_anywhere: bool) -> list[str]:
    argument = "" if loads_anywhere else ", trust_remote_code=True"
    return [
        "from sentence_transformers import SentenceTransformer",
        f'vectors = SentenceTransformer("{destination}"{argument}).encode(["your text"])',
    ]


def _read(options: Options) -> EmbeddingData:
    from bakeoff.data import embedded_default, embedding_data

    if options.data:
        return embedding_data(
            list(options.data),
            columns=options.columns or None,
            task=options.task,
            max_texts=options.max_texts,
        )
    return embedded_default(options.size)
