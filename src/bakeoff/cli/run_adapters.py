"""`bakeoff run adapters`: from options to a contest of adapters within one budget of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, unless_asked
from bakeoff.cli.run_experts import budget, domains

if TYPE_CHECKING:
    from rich.console import Console

_UNUSED = (
    *("target", "task", "embedder", "selector_model", "train", "steps", "budgets", "learners"),
    "number",
)
_SIMPLEST = ("LoRA", "not adapted")
# Tokens that the small decoder reads beforehand, where it is only to be seen that all runs.
_SMOKE_BASE_TOKENS = 20_000


def contest(options: Options, console: Console) -> Contest:
    """Read the domains and choose the designs: those within the budget, if none are named.

    What is over the budget shows how much there would be to gain; it cannot be the answer, and is
    run only when it is asked for by name.
    """
    from bakeoff.experts.problem.adapters import AdapterProblem, adapter_designs

    refuse(options, _UNUSED, "makes no difference to adapters; leave it out")
    known = adapter_designs()
    chosen = choose_designs(known, options.designs)
    texts = domains(options, console)
    given = budget(options)
    if options.rank is not None:
        given["rank"] = options.rank
    if options.size == "smoke" and not options.data and options.base is None:
        given["base_tokens"] = _SMOKE_BASE_TOKENS
    problem = AdapterProblem(texts, **given)
    if options.designs is None:
        within = [design for design in known if not design.params.get("over_budget")]
        chosen = unless_asked(known, within, "over the budget", problem, console)

    def usage(destination: Any, loads_anywhere: bool) -> list[str]:
        return problem.usage(destination)

    return Contest(problem, known, chosen, _SIMPLEST, f"adapters: {texts.name}", usage)
