"""`bakeoff run` and `bakeoff report`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from bakeoff.data.tasks import EmbeddingData
    from bakeoff.embedding.problem import EmbeddingProblem
    from bakeoff.study import Designs, Results

TaskKind = Literal["pairs", "labelled", "scored"]
DataSize = Literal["smoke", "demo", "full"]
Train = Literal["head", "lora", "full"]
DEMO_BUDGET: dict[str, Any] = {"steps": 40, "batch_size": 16, "max_length": 48}
EXIT_SOME_FAILED = 4


def run(
    family: str,
    *,
    data: Sequence[Path],
    columns: Mapping[str, str],
    task: TaskKind | None,
    size: DataSize,
    max_texts: int | None,
    base: str,
    designs: str | None,
    reference: str | None,
    seeds: int,
    train: Train,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    max_length: int | None,
    out: Path | None,
    workers: int,
    engine: str,
    alpha: float,
    as_json: bool,
) -> None:
    """Run a study, save its winner, print the verdict table; see the command's help."""
    from rich.console import Console

    from bakeoff.embedding.problem import EmbeddingProblem, default_designs
    from bakeoff.study import Study
    from bakeoff.study.terminal import LiveProgress

    console = Console(stderr=as_json)
    chosen = choose_designs(default_designs(), designs)
    console.print("reading data", style="dim")
    contents = _read(data, columns, task, size, max_texts)
    for note in contents.notes if data else ():  # the default data's are in the report
        console.print(f"  {note}", style="dim", highlight=False)
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "learning_rate": learning_rate,
    }
    problem = EmbeddingProblem(
        contents,
        base,
        train=train,
        **{
            **({} if data else DEMO_BUDGET),
            **{name: value for name, value in given.items() if value is not None},
        },
    )
    console.print(f"loading base model {base}", style="dim", highlight=False)
    known = default_designs(problem.attentions)
    if designs is None:
        chosen = _runnable(known, problem, console)
    reference = reference or _default_reference(chosen)
    chosen = _with_reference(chosen, known, reference)
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
        name=contents.name,
    )
    with LiveProgress(console=console) as progress:
        results = study.run(progress)
    winner = _save_winner(problem, chosen, results, console)
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


def _read(
    data: Sequence[Path],
    columns: Mapping[str, str],
    task: TaskKind | None,
    size: DataSize,
    max_texts: int | None,
) -> EmbeddingData:
    from bakeoff.data import embedded_default, embedding_data

    if data:
        return embedding_data(list(data), columns=columns or None, task=task, max_texts=max_texts)
    return embedded_default(size)


def _runnable(known: Designs, problem: EmbeddingProblem, console: Any) -> Designs:
    """Return the designs that this problem can run, and say which are left out and why."""
    from bakeoff.study import Designs

    kept, reasons = [], {}
    for design in known:
        try:
            problem.check(design)
            kept.append(design)
        except DataError as error:
            reasons[design.name] = str(error)
    if reasons:
        console.print(f"left out: {'; '.join(reasons)}", highlight=False)
        console.print(f"  because {next(iter(reasons.values()))}", highlight=False)
    return Designs(kept)


def _default_reference(chosen: Designs) -> str:
    names = [design.name for design in chosen]
    simplest = ("mean, causal", "mean, bidirectional", names[0])
    return next(name for name in simplest if name in names)


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
    problem: EmbeddingProblem, chosen: Designs, results: Results, console: Any
) -> Path | None:
    artifact = results.winner_artifact
    if results.winner is None or artifact is None:
        return None
    from bakeoff.study.results import save_results

    console.print("saving the winner", style="dim")
    destination = results.directory / "winner"
    design = next(design for design in chosen if design.name == results.winner)
    stock = problem.export(design, artifact, destination, reason=results.data["winner"]["reason"])
    argument = "" if stock else ", trust_remote_code=True"
    results.data["winner"]["artifact"] = "winner"
    results.data["problem"]["description"]["usage"] = [
        "from sentence_transformers import SentenceTransformer",
        f'vectors = SentenceTransformer("{destination}"{argument}).encode(["your text"])',
    ]
    save_results(results)
    return destination
