"""`bakeoff run decoding`: from options to a contest, by what the prompts hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bakeoff.cli.generate import DEFAULT_MODEL
from bakeoff.cli.run import Contest, Options, choose_designs, refuse, runnable
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.data.prompts import Prompt
    from bakeoff.study import Designs

QUESTIONS = ("constrained", "order", "memory", "cascade", "infilling")
"""What can be asked, and so what is compared."""

_UNUSED = (
    *("target", "task", "embedder", "selector_model", "train", "steps", "budgets", "learners"),
    *("number", "max_length"),
)
_SIMPLEST = {
    "constrained": ("masking",),
    "order": ("plain-order",),
    "memory": ("keep-end",),
    "cascade": ("chow-average", "random"),
    "infilling": ("causal LM",),
}


def contest(options: Options, console: Console) -> Contest:
    """Read the prompts, see what is asked, and choose the designs."""
    refuse(options, _UNUSED, "makes no difference to decoding; leave it out")
    asked = options.question
    if asked is not None and asked not in QUESTIONS:
        raise DataError(f"--question must be one of {', '.join(QUESTIONS)}, got {asked!r}")
    if options.data and asked not in (None, "infilling"):
        raise DataError(f"--data is code to train on (infilling); for {asked} give --prompts")
    console.print("reading data", style="dim")
    prompts = _prompts(options, console)
    question = asked or _question(options, prompts)
    _check_fit(question, options, prompts)
    build = {
        "constrained": _constrained,
        "order": _order,
        "memory": _memory,
        "cascade": _cascade,
        "infilling": _infilling,
    }[question]
    problem, known = build(options, prompts, console)
    chosen = choose_designs(known, options.designs)
    if options.designs is None:
        chosen = runnable(known, problem, console)
    name = ", ".join(path.name for path in (*options.prompts, *options.data)) or "default data"

    def usage(destination: Any, loads_anywhere: bool) -> list[str]:
        lines: list[str] = problem.usage(destination)
        return lines

    return Contest(problem, known, chosen, _SIMPLEST[question], f"{question}: {name}", usage)


def _prompts(options: Options, console: Console) -> tuple[Prompt, ...]:
    if not options.prompts:
        return ()
    from bakeoff.data.prompts import read_prompts

    prompts, notes = read_prompts(
        list(options.prompts), columns=options.columns or None, max_prompts=options.max_texts
    )
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False)
    return prompts


def _question(options: Options, prompts: Sequence[Prompt]) -> str:
    """Return what the files and options can only mean."""
    if options.grammar is not None:
        return "constrained"
    if options.large is not None:
        return "cascade"
    if options.data:
        return "infilling"
    if not prompts:
        raise DataError(
            "give --prompts FILE, or for default data --question, one of " + ", ".join(QUESTIONS)
        )
    for part, question in (("document", "memory"), ("options", "order"), ("passages", "order")):
        if all(getattr(prompt, part) for prompt in prompts):
            return question
    raise DataError(
        "what is to be compared? Give --grammar for ways to sample in it, --large for when to ask "
        "a larger model; or prompts with options or passages (orders) or documents (memory) in "
        "every row"
    )


def _check_fit(question: str, options: Options, prompts: Sequence[Prompt]) -> None:
    """Refuse options that another question would use."""
    uses = {
        "constrained": ("grammar", "prompts", "max_new_tokens"),
        "order": ("prompts", "max_new_tokens"),
        "memory": ("prompts", "max_new_tokens"),
        "cascade": ("large", "prompts", "max_new_tokens"),
        "infilling": ("data", "tokens", "batch_size", "learning_rate", "max_new_tokens"),
    }[question]
    every = ("grammar", "large", "data", "prompts", "tokens", "batch_size", "learning_rate")
    refuse(
        options, [name for name in every if name not in uses], f"makes no difference to {question}"
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


Found = tuple[Any, "Designs"]


def _constrained(options: Options, prompts: Sequence[Prompt], console: Console) -> Found:
    from bakeoff.data.constrained_prompts import constrained_prompts
    from bakeoff.decoding.problem.constrained import ConstrainedProblem, constrained_designs

    grammar: Any = None
    if options.grammar is not None:
        from bakeoff.cli.generate import read_grammar

        grammar = read_grammar(options.grammar)
    if not prompts:
        if grammar is not None:
            raise DataError("--grammar needs --prompts: what is to be answered in it?")
        found = constrained_prompts(options.size)
        prompts, grammar = found.prompts, found.grammars
    given = _given(model=options.base, max_new_tokens=options.max_new_tokens)
    return ConstrainedProblem(prompts, grammar=grammar, **given), constrained_designs()


def _order(options: Options, prompts: Sequence[Prompt], console: Console) -> Found:
    from bakeoff.data.choices import choice_prompts
    from bakeoff.decoding.problem.ordering import OrderProblem, order_designs

    given = _given(model=options.base, max_new_tokens=options.max_new_tokens)
    return OrderProblem(prompts or choice_prompts(options.size), **given), order_designs()


def _memory(options: Options, prompts: Sequence[Prompt], console: Console) -> Found:
    from bakeoff.data.long_documents import long_documents_default
    from bakeoff.decoding.problem.memory import MemoryProblem, memory_designs

    given = _given(model=options.base, max_new_tokens=options.max_new_tokens)
    return MemoryProblem(prompts or long_documents_default(options.size), **given), memory_designs()


def _cascade(options: Options, prompts: Sequence[Prompt], console: Console) -> Found:
    from bakeoff.decoding.problem.cascading import (
        CascadeProblem,
        cascade_designs,
        default_cascade_problem,
    )

    given = _given(max_new_tokens=options.max_new_tokens)
    if prompts:
        if options.large is None:
            raise DataError("--question cascade needs --large, the model to ask when needed")
        small = options.base or DEFAULT_MODEL
        return CascadeProblem(prompts, small=small, large=options.large, **given), cascade_designs()
    if options.base is not None or options.large is not None:
        raise DataError("--base and --large need --prompts: the default data come with their own")
    return default_cascade_problem(options.size, **given), cascade_designs()


def _infilling(options: Options, prompts: Sequence[Prompt], console: Console) -> Found:
    from bakeoff.data.code_files import read_code
    from bakeoff.decoding.problem.infilling import InfillingProblem, infilling_designs

    texts: Any = options.size
    if options.data:
        texts, notes = read_code(
            list(options.data),
            column=dict(options.columns).get("text"),
            max_texts=options.max_texts,
        )
        for note in notes:
            console.print(f"  {note}", style="dim", highlight=False)
    given = _given(
        base=options.base,
        n_tokens=options.tokens,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        max_new_tokens=options.max_new_tokens,
    )
    return InfillingProblem(texts, **given), infilling_designs()
