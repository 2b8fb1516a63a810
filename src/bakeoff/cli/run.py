"""`bakeoff run` and `bakeoff report`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import typer

from bakeoff.errors import DataError
from bakeoff.study.protocol import Problem

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.study import Design, Designs, Results

EXIT_SOME_FAILED = 4

FAMILIES = {
    "embedding": "run_embedding",
    "selection": "run_selection",
    "decoding": "run_decoding",
    "experts": "run_experts",
    "adapters": "run_adapters",
}
"""Families that can be compared, and the module here that turns options into their contest."""


@dataclass(frozen=True)
class Options:
    """What the command was told; None where it was not."""

    data: Sequence[Path] = ()
    target: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    task: Literal["pairs", "labelled", "scored"] | None = None
    size: Literal["smoke", "demo", "full"] = "demo"
    max_texts: int | None = None
    base: str | None = None
    embedder: str | None = None
    selector_model: str | None = None
    designs: str | None = None
    train: Literal["head", "lora", "full"] | None = None
    steps: int | None = None
    tokens: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    budgets: Sequence[int] = ()
    learners: Sequence[str] = ()
    number: int | None = None
    prompts: Sequence[Path] = ()
    question: str | None = None
    grammar: str | None = None
    large: str | None = None
    max_new_tokens: int | None = None
    layers: int | None = None
    match: Literal["tokens", "flops"] | None = None
    rank: int | None = None
    pivot: str | None = None
    held_out: Sequence[str] = ()


FAMILIES_OF: dict[str, tuple[str, ...]] = {
    "prompts": ("decoding",),
    "grammar": ("decoding",),
    "large": ("decoding",),
    "max_new_tokens": ("decoding",),
    "question": ("embedding", "decoding", "experts"),
    "layers": ("embedding", "experts", "adapters"),
    "match": ("experts",),
    "rank": ("adapters",),
    "pivot": ("embedding",),
    "held_out": ("embedding",),
}
"""Options that not every family knows, and the families that do; the others refuse them."""


class ContestProblem(Problem, Protocol):
    """A problem that the command can run: it checks designs beforehand and saves a winner."""

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save what a trial fitted; return whether it loads without bakeoff."""


@dataclass(frozen=True)
class Contest:
    """A problem with the designs to run on it.

    Parameters
    ----------
    problem
        Of the family.
    known
        All designs that have names here; a reference may be any of them.
    chosen
        Those to run.
    simplest
        Names of designs to compare with, the first that is chosen.
    name
        Of the study.
    usage
        From the winner's folder, and whether it loads anywhere, to lines that use it.
    """

    problem: ContestProblem
    known: Designs
    chosen: Designs
    simplest: Sequence[str]
    name: str
    usage: Callable[[Path, bool], list[str]]


def run(
    family: str,
    options: Options,
    *,
    reference: str | None,
    seeds: int,
    out: Path | None,
    workers: int,
    engine: str,
    alpha: float,
    as_json: bool,
) -> None:
    """Run a study, save its winner, print the verdict table; see the command's help."""
    from rich.console import Console

    from bakeoff.study import Study
    from bakeoff.study.terminal import LiveProgress

    if family not in FAMILIES:
        raise typer.BadParameter(f"there is {', '.join(FAMILIES)}; got {family!r}")
    for option, families in FAMILIES_OF.items():
        if family not in families:
            refuse(options, (option,), f"is for {' and '.join(families)}; leave it out")
    console = Console(stderr=as_json)
    contest = import_module(f"bakeoff.cli.{FAMILIES[family]}").contest(options, console)
    problem = contest.problem
    reference = reference or _default_reference(contest)
    chosen = _with_reference(contest.chosen, contest.known, reference)
    for design in chosen:
        problem.check(design)
    directory = out or Path("bakeoff-runs") / f"{family}-{problem.fingerprint()[:8]}"
    study = Study(
        problem,
        chosen,
        reference=reference,
        seeds=seeds,
        directory=directory,
        alpha=alpha,
        workers=workers,
        engine=engine,
        command=shlex.join(["bakeoff", *sys.argv[1:]]),
        name=contest.name,
    )
    with LiveProgress(console=console) as progress:
        results = study.run(progress)
    winner = _save_winner(contest, chosen, results, console)
    if as_json:
        typer.echo(json.dumps(results.data, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        console.print()
        console.print(results.table())
        console.print()
        console.print(f"report:  {directory / 'report.html'}", highlight=False, soft_wrap=True)
        if winner is not None:
            console.print(f"winner:  {winner}", highlight=False, soft_wrap=True)
    if results.data["failures"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def refuse(options: Options, unused: Sequence[str], why: str) -> None:
    """Raise `DataError` for options that were given though they would change nothing.

    Parameters
    ----------
    options
        What the command was told.
    unused
        Fields of it.
    why
        What follows the options' names in the message.
    """
    names = {"learners": "learner", "columns": "column", "held_out": "hold-out"}
    given = [f"--{names.get(n, n).replace('_', '-')}" for n in unused if getattr(options, n)]
    if given:
        raise DataError(f"{' and '.join(given)} {why}")


def report(directory: Path, *, as_json: bool) -> None:
    """Write the report again from results.json and print the table."""
    from rich.console import Console

    from bakeoff.study import load_results
    from bakeoff.study.report import write_report

    results = load_results(directory)
    write_report(results.data, directory / "report.html")
    if as_json:
        typer.echo(json.dumps(results.data, indent=1, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    console.print(results.table())
    console.print(f"report:  {directory / 'report.html'}", highlight=False, soft_wrap=True)


def choose_designs(known: Designs, names: str | None) -> Designs:
    """Return the known designs that a comma-separated list of names or methods asks for.

    A name may itself hold a comma ("mean, causal"): the longest known name is matched first. A
    method's slug stands for all its designs.

    Raises
    ------
    DataError
        If something in the list is neither; lists the names.
    """
    from bakeoff.study import Designs

    if names is None:
        return known
    by_name = {design.name: [design] for design in known}
    by_method = {
        method: [design for design in known if design.method == method]
        for method in {design.method for design in known}
    }
    wanted = {**by_method, **by_name}
    rest, found = names.strip(), []
    while rest:
        matches = [
            name for name in wanted if rest == name or rest.startswith((f"{name},", f"{name} ,"))
        ]
        if not matches:
            raise DataError(
                f"--designs: {rest!r} does not begin with a design or method name; there are: "
                f"{'; '.join(by_name)}; methods: {', '.join(sorted(by_method))}"
            )
        match = max(matches, key=len)
        found += [design for design in wanted[match] if design not in found]
        rest = rest[len(match) :].lstrip(" ,")
    if not found:
        raise DataError("--designs is empty")
    return Designs(found)


def runnable(known: Designs, problem: ContestProblem, console: Console) -> Designs:
    """Return the designs that this problem can run, and say which are left out and why."""
    from bakeoff.study import Designs

    kept: list[Design] = []
    left_out: dict[str, list[str]] = {}
    for design in known:
        try:
            problem.check(design)
            kept.append(design)
        except DataError as error:
            # Messages begin with the design's own name; what follows several may share.
            reason = str(error).removeprefix(f"design {design.name!r}").lstrip(": ")
            left_out.setdefault(reason, []).append(design.name)
    for reason, names in left_out.items():
        console.print(f"left out: {'; '.join(names)}", highlight=False)
        console.print(f"  because: {reason}", highlight=False)
    return Designs(kept)


def unless_asked(
    known: Designs, kept: Sequence[Design], why: str, problem: ContestProblem, console: Console
) -> Designs:
    """Return what runs of the designs kept, where nobody named any; say which others there are."""
    from bakeoff.study import Designs

    names = "; ".join(design.name for design in known if design not in kept)
    console.print(f"left out: {names}", highlight=False)
    console.print(f"  because: {why}; --designs takes them", highlight=False)
    return runnable(Designs(kept), problem, console)


def _default_reference(contest: Contest) -> str:
    names = [design.name for design in contest.chosen]
    return next(name for name in (*contest.simplest, names[0]) if name in names)


def _with_reference(chosen: Designs, known: Designs, reference: str) -> Designs:
    """Add the reference to the designs if it was not listed; refuse one that nobody knows."""
    from bakeoff.study import Designs

    if any(design.name == reference for design in chosen):
        return chosen
    added = [design for design in known if design.name == reference]
    if not added:
        names = "; ".join(design.name for design in known)
        raise DataError(
            f"--reference must be a design's name, got {reference!r}; there are: {names}"
        )
    return Designs([*added, *chosen])


def _save_winner(
    contest: Contest, chosen: Designs, results: Results, console: Console
) -> Path | None:
    artifact = results.winner_artifact
    if results.winner is None or artifact is None:
        return None
    from bakeoff.study.results import save_results

    console.print("saving the winner", style="dim")
    destination = results.directory / "winner"
    design = next(design for design in chosen if design.name == results.winner)
    reason = results.data["winner"]["reason"]
    # An earlier winner may have had files that this one has not.
    shutil.rmtree(destination, ignore_errors=True)
    loads_anywhere = contest.problem.export(design, artifact, destination, reason=reason)
    results.data["winner"]["artifact"] = "winner"
    results.data["problem"]["description"]["usage"] = contest.usage(destination, loads_anywhere)
    save_results(results)
    return destination
