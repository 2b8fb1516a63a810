"""`bakeoff run embedding --question domains`: one encoder for several domains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.cli.run import Contest, Options, choose_designs, refuse, unless_asked
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.embedding.problem.domain_pairs import DomainPairs

_UNUSED = (
    *("target", "task", "embedder", "selector_model", "train", "tokens", "budgets", "learners"),
    *("number", "max_texts", "pivot", "held_out"),
)
_SIMPLEST = ("shared", "untrained")
_ROLES = ("id", "text", "references", "domain", "group")


def contest(options: Options, console: Console) -> Contest:
    """Read who cites whom, make pairs, choose the designs: one per idea, if none are named."""
    from bakeoff.embedding.problem.domains import DomainEncoderProblem, domain_encoder_designs

    refuse(options, _UNUSED, "makes no difference to domains; leave it out")
    known = domain_encoder_designs()
    chosen = choose_designs(known, options.designs)
    console.print("reading data", style="dim")
    data = _pairs(options, console)
    given: dict[str, Any] = {
        "base": options.base,
        "n_layers": options.layers,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rates": None if options.learning_rate is None else (options.learning_rate,),
    }
    problem = DomainEncoderProblem(
        data, **{name: value for name, value in given.items() if value is not None}
    )
    if options.designs is None:
        plain = domain_encoder_designs(variants=False)
        chosen = unless_asked(known, plain, "variants", problem, console)

    def usage(destination: Any, loads_anywhere: bool) -> list[str]:
        return problem.usage(destination)

    return Contest(problem, known, chosen, _SIMPLEST, f"domains: {data.split.name}", usage)


def _pairs(options: Options, console: Console) -> DomainPairs:
    """Return pairs of the user's graph, or the default ones."""
    from bakeoff.embedding.problem.domain_pairs import DomainPairs, domain_pairs_default

    if not options.data:
        if options.columns:
            raise DataError("--column needs --data")
        return domain_pairs_default(options.size)
    if len(options.data) > 1:
        raise DataError(f"--data takes one file with a document a row, got {len(options.data)}")
    from bakeoff.data.manual_pages import is_manual, manual_pages

    path = Path(options.data[0]).expanduser()
    if is_package_index(path):
        from bakeoff.data.citation_graphs import debian_packages

        if options.columns:
            raise DataError(f"--column makes no difference to Debian's index {path.name}")
        graph = debian_packages(path)
    elif is_manual(path):
        if options.columns:
            raise DataError(f"--column makes no difference to the manual pages in {path}")
        graph = manual_pages(path)
    else:
        from bakeoff.data.citations import read_citations

        unknown = sorted(set(options.columns) - set(_ROLES))
        if unknown:
            raise DataError(f"citations have columns {', '.join(_ROLES)}, got {', '.join(unknown)}")
        graph = read_citations(path, columns=options.columns or None)
    data = DomainPairs.from_graph(graph)
    for note in data.split.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    return data


def is_package_index(path: Path) -> bool:
    """Say whether a file's name is that of Debian's package index.

    Examples
    --------
    >>> is_package_index(Path("Packages.xz")), is_package_index(Path("papers.jsonl"))
    (True, False)
    """
    stem = path.name.split(".")[0]
    return stem == "Packages" or stem.endswith("_Packages") or path.name.endswith("_Packages.lz4")
