"""`bakeoff experts`: make mixtures of experts, and look inside them."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import bakeoff
from bakeoff._files import atomic_folder, write_text
from bakeoff.cli.values import json_or_text
from bakeoff.errors import BakeoffError, DataError, ModelError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from bakeoff.experts.inspection import ExpertReport
    from bakeoff.models import LanguageModel

Progress = Callable[[int, int], None]

experts_app = typer.Typer(
    help="Make mixtures of experts, and look inside them.\n\n"
    "Try: bakeoff experts convert smollm2-135m --experts 8 --out my-moe",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output instead of text.")
]
NewFolder = Annotated[
    Path, typer.Option("--out", help="Folder to write; must not exist, or be empty.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of all that is drawn at random.")]

_LONGEST = 512
_HIGHEST_LOSS = 700.0  # nats per token: its exponential is still a number


# Look inside --------------------------------------------------------------------------------------


@experts_app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A mixture: folder of convert, upcycle or refactor, or any of transformers' "
            "(folder or hub id)."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME=FILE: texts of a domain (folder of text or code, table, text file). "
            "Repeatable. Default: Python, English and Bulgarian.",
        ),
    ] = None,
    size: Annotated[
        Literal["smoke", "demo", "full"], typer.Option("--size", help="Of the default data.")
    ] = "demo",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="To read of each domain.")
    ] = 20_000,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write experts.html and experts.json into this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which experts each domain uses, and how balanced, certain and redundant routers are.

    Example: bakeoff experts inspect my-moe --data code=src --data docs=docs --out look
    """
    from bakeoff.experts.inspection import inspect_experts, mixture_layers, text_batches
    from bakeoff.experts.inspection_report import (
        InspectionPage,
        layer_rows,
        remarks,
        write_inspection,
    )

    work = _Work()
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is no folder")
    given = _given_texts(data, work) if data else None
    loaded = work.load(model, half=False)
    try:
        mixture_layers(loaded.model)
    except ModelError:
        raise ModelError(
            f"{model} is dense: it has no experts to look at. Make a mixture of it: "
            f"bakeoff experts convert {shlex.quote(model)} --experts 8 --out "
            f"{shlex.quote(Path(model).name + '-moe')}"
        ) from None
    texts, named, notes = given or _default_texts(size, work)
    length = min(_LONGEST, loaded.max_length)
    batches = text_batches(loaded.tokenizer, texts, max_tokens=max_tokens, max_length=length)
    with work.step(f"reading {', '.join(texts)}", len(batches)) as bar:
        report = inspect_experts(loaded.model, batches, tuple(texts), progress=bar)
    total, active = _parameters(loaded.model)
    found = {
        "model": model,
        "data": named,
        "notes": notes,
        "parameters": total,
        "active_parameters": active,
        **report.to_dict(),
    }
    if out is not None:
        page = InspectionPage(
            report,
            model,
            named,
            facts={
                "model": f"{type(loaded.model).__name__}, {_millions(total)} parameters, "
                f"{_millions(active)} active per token",
                "tokens": ", ".join(
                    f"{name} {int(n):,}"
                    for name, n in zip(report.domains, report.tokens, strict=True)
                ),
                "texts": f"cut into pieces of at most {length} tokens, each read by itself",
                "time": f"{time.monotonic() - work.started:.0f} s",
            },
            notes=notes,
            command=_command(),
            started=datetime.now().strftime("%Y-%m-%d %H:%M"),
            version=bakeoff.__version__,
        )
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write_inspection(page, out / "experts.html")
            write_text(out / "experts.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        _print_json({**found, "out": None if out is None else str(out)})
        return
    _print_report(report, layer_rows(report))
    for remark in remarks(report):
        typer.echo(remark)
    if out is not None:
        typer.echo(f"report: {out / 'experts.html'}")


_Texts = tuple[Mapping[str, Sequence[str]], str, list[str]]


def _given_texts(data: Sequence[str], work: _Work) -> _Texts:
    """Return texts by domain, what they are, and what to know about them."""
    from bakeoff.data.domain_texts import read_domains

    work.say(f"reading {', '.join(data)}")
    texts, notes = read_domains(data)
    for note in notes:
        work.say(f"  {note}")
    return texts, ", ".join(data), list(notes)


def _default_texts(size: Literal["smoke", "demo", "full"], work: _Work) -> _Texts:
    from bakeoff.data.domain_texts import default_domains

    work.say("reading the default data")
    found = default_domains(size)
    return found.held_out, found.name, []  # its notes are about training texts


def _print_report(report: ExpertReport, rows: Sequence[Any]) -> None:
    """Print a line per layer: its measures, then each domain's favourite experts."""
    from rich.table import Table

    from bakeoff.experts.inspection_report import hundredths, percent

    def shown(value: float | None) -> str:
        return "–" if value is None else hundredths(value)

    measures = Table(box=None, pad_edge=False)
    heads = ("experts", "heaviest", "idle", "entropy", "special.", "dropped", "next", "similar")
    for number, head in enumerate(("layer", *heads)):
        measures.add_column(head, justify="right" if number else "left", no_wrap=True)
    favourites = Table(box=None, pad_edge=False)
    for head in ("layer", *report.domains):
        favourites.add_column(head, no_wrap=True)
    for row in rows:
        measures.add_row(
            row.label,
            str(row.n_experts),
            hundredths(row.max_over_mean),
            str(row.idle),
            shown(row.entropy),
            shown(row.specialisation),
            percent(row.drop_rate),
            shown(row.redundancy_to_next),
            shown(row.similarity),
        )
        favourites.add_row(
            row.label,
            *("  ".join(f"{e}: {percent(share)}" for e, share in best) for best in row.favourites),
        )
    _print_table(measures)
    typer.echo(
        "\nheaviest: load over mean load; entropy: 1 undecided, 0 certain; special.: domains' use "
        "of experts,\n0 alike, 1 disjoint; next: what a choice tells about the next layer's; "
        "similar: cosine of weights\n"
    )
    typer.echo("favourite experts, with their share of each domain")
    _print_table(favourites)
    typer.echo("")


def _print_table(table: Any) -> None:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    # As wide as it has to be: on a narrow terminal or in a file lines wrap, and no cell is cut.
    wide = Console(width=10_000)
    needed = Measurement.get(wide, wide.options, table).maximum
    console = Console(width=max(needed, console.width))
    console.print(table, highlight=False, markup=False, soft_wrap=True)


# Make them ----------------------------------------------------------------------------------------


@experts_app.command()
def convert(
    model: Annotated[
        str, typer.Argument(help="A dense decoder: packaged name, folder, .gguf file or hub id.")
    ],
    out: NewFolder,
    experts: Annotated[int, typer.Option("--experts", help="Experts per layer.")] = 8,
    router: Annotated[
        str, typer.Option("--router", help="Its name; a wrong one lists all.")
    ] = "top-k",
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="NAME=VALUE for the router, e.g. k=2. Repeatable."),
    ] = None,
    start: Annotated[
        Literal["copy", "split", "random", "lora"],
        typer.Option(
            "--start",
            help="The experts begin as copies of the dense layer, as its parts, as fresh weights, "
            "or as low-rank updates beside it.",
        ),
    ] = "copy",
    granularity: Annotated[
        int, typer.Option("--granularity", help="copy: cut each copy into so many experts.")
    ] = 1,
    rank: Annotated[int, typer.Option("--rank", help="lora: of the updates.")] = 8,
    every: Annotated[
        int, typer.Option("--every", help="Every so many-th layer becomes a mixture.")
    ] = 1,
    dense_first: Annotated[
        int, typer.Option("--dense-first", help="The first layers, which stay dense.")
    ] = 0,
    shared: Annotated[
        int, typer.Option("--shared", help="Experts that every token passes besides.")
    ] = 0,
    capacity: Annotated[
        float | None,
        typer.Option("--capacity", help="Factor on the balanced load; beyond, tokens are dropped."),
    ] = None,
    drop: Annotated[
        Literal["probs", "position", "priority", "random"],
        typer.Option("--drop", help="Who is dropped beyond the capacity."),
    ] = "probs",
    aux: Annotated[
        list[str] | None,
        typer.Option(
            "--aux",
            help="Balance loss; repeatable; none for no loss. Default: switch-balance and z-loss.",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Turn the feed-forward layers of a dense decoder into mixtures of experts.

    Example: bakeoff experts convert smollm2-135m --experts 8 --router top-k --param k=2 --out moe
    """
    from bakeoff.experts.conversion import save_moe, to_moe

    work = _Work()
    settings = _settings(param or [])
    extra: dict[str, Any] = {} if capacity is None else {"capacity": capacity, "drop": drop}
    if shared and start == "lora":
        raise DataError("--shared does not go with --start lora, which keeps the dense layer")
    if shared:
        extra["shared"] = shared
    if aux:
        extra["aux"] = () if aux == ["none"] else tuple(aux)
    _check_new(out)
    loaded = work.load_dense(model)
    if router == "hash":
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        settings = {"vocabulary": vocabulary, **settings}
    with work.noting():
        to_moe(
            loaded.model,
            experts,
            {"name": router, **settings},
            start=start,
            granularity=granularity,
            rank=rank,
            every=every,
            dense_first=dense_first,
            seed=seed,
            **extra,
        )
    total, active = _parameters(loaded.model)
    lines = _training_lines(out, by_to_moe=True)
    what = f"{model} with {experts} experts per layer, made by `{_command()}`."
    with _new_folder(out, work) as folder:
        save_moe(loaded.model, folder)
        loaded.tokenizer.save_pretrained(folder)
        _write_readme(folder, out, what, total, active, lines)
    _made(out, total, active, lines, as_json, {"model": model, "experts": experts})


@experts_app.command()
def upcycle(
    models: Annotated[
        list[str],
        typer.Argument(
            help="At least two dense decoders of one architecture: a seed and copies of it, each "
            "trained further on a domain."
        ),
    ],
    out: NewFolder,
    method: Annotated[
        Literal["bam", "btx"],
        typer.Option(
            "--method",
            help="bam: attention and feed-forward experts; btx: feed-forward experts, attention "
            "averaged.",
        ),
    ] = "bam",
    share_kv: Annotated[
        bool, typer.Option("--share-kv", help="bam: one key-value cache for all experts.")
    ] = False,
    ffn_top_k: Annotated[
        int, typer.Option("--ffn-top-k", help="Feed-forward experts per token.")
    ] = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge fine-tuned copies of a decoder into one mixture, an expert from each.

    Example: bakeoff experts upcycle seed code law --method bam --out mixture
    """
    from bakeoff.experts.bam import upcycle as merge

    if len(models) < 2:
        raise DataError(
            f"upcycle needs at least 2 models, a seed and copies of it that were trained further; "
            f"got {models[0]} alone. Of one model: bakeoff experts convert {shlex.quote(models[0])}"
        )
    work = _Work()
    _check_new(out)
    loaded = [work.load_dense(name) for name in models]
    with work.noting(), _named_models(models):
        mixture = merge(
            [one.model for one in loaded],
            method,
            share_kv=share_kv,
            ffn_top_k=ffn_top_k,
            seed=seed,
            tokenizers=[one.tokenizer for one in loaded],
        )
    total, active = _parameters(mixture)
    lines = _training_lines(out)
    what = f"A {method} mixture of {', '.join(models)}, made by `{_command()}`."
    with _new_folder(out, work) as folder:
        mixture.save_pretrained(folder)
        loaded[0].tokenizer.save_pretrained(folder)
        _write_readme(folder, out, what, total, active, lines)
    _made(out, total, active, lines, as_json, {"models": models, "method": method})


@experts_app.command()
def refactor(
    model: Annotated[
        str, typer.Argument(help="A dense decoder: packaged name, folder, .gguf file or hub id.")
    ],
    out: NewFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME=FILE: texts of a domain (folder of text or code, table, text file), an "
            "expert each; at least two. Some texts are held out to judge by.",
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of each layer's channels that an expert has.")
    ] = 0.5,
    router_steps: Annotated[
        int, typer.Option("--router-steps", min=1, help="Training steps of the router, a round.")
    ] = 100,
    expert_steps: Annotated[
        int, typer.Option("--expert-steps", min=0, help="Training steps of the experts, a round.")
    ] = 200,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Of router and experts in turn; the paper's: 8.")
    ] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences in a step.")
    ] = 8,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens of a sequence.")
    ] = 256,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cut a dense decoder into domain experts behind a router that runs before it (Read-ME).

    Example: bakeoff experts refactor smollm2-135m --data code=src --data docs=docs --out read-me
    """
    from bakeoff.data.domain_texts import read_domains, split_domains
    from bakeoff.experts.causal_training import domain_batches
    from bakeoff.experts.read_me import build_expert_masks, collect_channel_stats, moefy, tune

    if not data:
        raise DataError("refactor makes an expert of each domain: give --data NAME=FILE, twice")
    if not 0 < keep <= 1:
        raise DataError(f"--keep must be above 0 and at most 1, got {keep}")
    work = _Work()
    _check_new(out)
    work.say(f"reading {', '.join(data)}")
    read, notes = read_domains(data)
    if len(read) < 2:
        raise DataError(
            f"refactor makes an expert of each domain and needs at least 2, got {', '.join(read)}"
        )
    texts = split_domains(read)
    for note in (*notes, *texts.notes):
        work.say(f"  {note}")
    loaded = work.load_dense(model, trained=True)
    length = min(sequence_length, loaded.max_length)
    packed = {
        name: _packed(loaded.tokenizer, name, found, length)
        for name, found in texts.training.items()
    }
    judged = {
        name: _token_ids(loaded.tokenizer, name, found, length)
        for name, found in texts.held_out.items()
    }
    before = _perplexities(loaded.model, judged, "judging the dense model", work)
    with work.step("seeing which channels each domain uses", len(packed)) as bar:
        stats = collect_channel_stats(loaded.model, packed, batch_size=batch_size, progress=bar)
    mixture = moefy(loaded.model, build_expert_masks(stats, keep), seed=seed)
    total_steps = rounds * (router_steps + expert_steps)
    with work.step("tuning router and experts", total_steps) as bar:
        tune(
            mixture,
            domain_batches(packed, batch_size=batch_size, seed=seed),
            rounds=rounds,
            router_steps=router_steps,
            expert_steps=expert_steps,
            seed=seed,
            progress=bar,
        )
    mixture.eval()
    after = _perplexities(mixture, judged, "judging the mixture", work)
    chosen = {name: _expert_shares(mixture, rows) for name, rows in judged.items()}
    total, active = _parameters(mixture)
    dense = mixture.config.dense_parameters
    lines = _use_lines(out)
    what = (
        f"{model} refactored into experts for {', '.join(read)}, made by `{_command()}`.\n\n"
        "| domain | perplexity, dense | perplexity, this |\n|---|---|---|\n"
        + "\n".join(f"| {n} | {before[n]:.2f} | {after[n]:.2f} |" for n in before)
    )
    with _new_folder(out, work) as folder:
        mixture.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        _write_readme(folder, out, what, total, active, lines)
    domains = {
        name: {
            "perplexity_before": before[name],
            "perplexity_after": after[name],
            "experts": dict(zip(mixture.domains, chosen[name], strict=True)),
        }
        for name in before
    }
    if not as_json:
        _print_domains(domains)
        typer.echo(f"dense: {_millions(dense)} parameters")
    facts = {"model": model, "keep": keep, "dense_parameters": dense, "domains": domains}
    _made(out, total, active, lines, as_json, facts)


def _packed(tokenizer: Any, name: str, texts: Sequence[str], length: int) -> Tensor:
    from bakeoff.experts.read_me import pack_texts

    try:
        return pack_texts(tokenizer, texts, length)
    except DataError as error:
        raise DataError(
            f"domain {name!r}: {error}; give more text or a shorter --sequence-length"
        ) from None


def _token_ids(tokenizer: Any, name: str, texts: Sequence[str], length: int) -> list[list[int]]:
    rows = [tokenizer(text, verbose=False)["input_ids"][:length] for text in texts]
    found = [list(row) for row in rows if len(row) > 1]
    if not found:
        raise DataError(f"domain {name!r}: no held-out text has two tokens")
    return found


def _perplexities(
    model: Any, judged: Mapping[str, list[list[int]]], what: str, work: _Work
) -> dict[str, float]:
    """Return the perplexity of each domain's held-out documents, each token weighing the same."""
    import math

    from bakeoff.models.likelihood import response_losses

    found = {}
    with work.step(what, sum(map(len, judged.values()))) as bar:
        done = 0
        for name, rows in judged.items():
            start = done
            losses = response_losses(
                model,
                [[] for _ in rows],
                rows,
                progress=lambda n, _, start=start: bar(start + n, 0),  # type: ignore[misc]
            )
            done += len(rows)
            loss = float(losses.sums.sum() / losses.n_tokens.sum())
            if not loss < _HIGHEST_LOSS:
                raise ModelError(
                    f"{what}: its loss on {name} is {loss:g}, so that its weights or its training "
                    "went wrong; nothing was written"
                )
            found[name] = math.exp(loss)
    return found


def _expert_shares(mixture: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the share of tokens that goes to each expert."""
    import torch

    counts = sum(mixture.route(torch.tensor([list(row)])).counts() for row in rows)
    return [float(share) for share in counts / counts.sum()]


def _print_domains(domains: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    from bakeoff.experts.inspection_report import percent

    table = Table(box=None, pad_edge=False)
    table.add_column("domain")
    for head in ("perplexity before", "after"):
        table.add_column(head, justify="right")
    table.add_column("tokens by expert")
    for name, facts in domains.items():
        shares = "  ".join(f"{expert}: {percent(s)}" for expert, s in facts["experts"].items())
        before, after = facts["perplexity_before"], facts["perplexity_after"]
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", shares)
    _print_table(table)


# What the commands share --------------------------------------------------------------------------


@dataclass
class _Work:
    """A command's progress, on standard error: what begins, bars, and warnings as sentences."""

    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def console(self) -> Console:
        from rich.console import Console

        return Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def load(self, name: str, *, half: bool = True, trained: bool = False) -> LanguageModel:
        """Load a model in the precision that it is stored in, unless that would not do.

        Training needs float32; processors are slow or inexact in float16.
        """
        from bakeoff.experts.loading import load_mixture, stored_dtype

        self.say(f"loading {name}")
        dtype = stored_dtype(name)
        if trained or (dtype == "float16" and not half):
            dtype = "float32"
        with self.noting():
            return load_mixture(name, dtype=dtype)

    def load_dense(self, name: str, *, trained: bool = False) -> LanguageModel:
        """Load a model that is to become a mixture, or a part of one."""
        from bakeoff.experts.inspection import mixture_layers

        loaded = self.load(name, trained=trained)
        try:
            mixture_layers(loaded.model)
        except ModelError:
            return loaded
        raise ModelError(f"{name} is a mixture of experts already: give a dense decoder")

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Turn warnings into sentences."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        said = {f"{w.message}" for w in caught if issubclass(w.category, UserWarning)}
        for text in sorted(said):
            self.notes.append(text)
            self.say(f"  {text}")

    @contextmanager
    def step(self, what: str, total: int) -> Iterator[Progress]:
        """Say what begins, show a bar on a terminal, and hand out its callback."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.say(what)
        console = self.console
        columns = (TextColumn(" "), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bars:
            task = bars.add_task("", total=total)

            def progress(done: int, _: int) -> None:
                bars.update(task, completed=done)

            yield progress


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn a disk's errors into one line."""
    try:
        yield
    except BakeoffError:
        raise
    except OSError as error:
        raise DataError(f"--out: {out} cannot be written ({error.strerror or error})") from None


def _check_new(out: Path) -> None:
    """Refuse before any work a folder that could not be written after it."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is no folder")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"--out: {out} is there already and not empty; give another folder")
    with _writing(out):
        parent = out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.").cleanup()


@contextmanager
def _new_folder(out: Path, work: _Work) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes it when the block ends without an error.

    Whatever happens before, Ctrl-C included, leaves nothing behind.
    """
    work.say(f"writing {out}")
    with _writing(out), _quiet(), atomic_folder(out) as scratch:
        yield scratch


@contextmanager
def _named_models(names: Sequence[str]) -> Iterator[None]:
    """Let errors speak of models by the names that the command was given."""
    try:
        yield
    except (DataError, ModelError) as error:
        text = str(error)
        for number, name in enumerate(names):
            text = text.replace(f"models[{number}]", name)
        raise type(error)(text) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks off the screen."""
    from bakeoff.models import quiet_transformers

    with quiet_transformers():
        yield


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return a router's settings from NAME=VALUE."""
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise typer.BadParameter(f"--param: expected NAME=VALUE, e.g. k=2, got {text!r}")
        if name == "name":
            raise typer.BadParameter("--param name: the router's name is given by --router")
        found[name] = json_or_text(value)
    return found


def _parameters(model: Any) -> tuple[int, int]:
    """Return a model's parameters in all, and those that a token uses."""
    from bakeoff.experts.bam import mixture_cost
    from bakeoff.experts.conversion import parameter_counts
    from bakeoff.experts.read_me import ReadMeForCausalLM
    from bakeoff.experts.upcycled_model import UpcycledForCausalLM

    if isinstance(model, ReadMeForCausalLM):
        return sum(p.numel() for p in model.parameters()), model.count_parameters().active
    if isinstance(model, UpcycledForCausalLM):
        cost = mixture_cost(model, 1)
        return cost.parameters, cost.active_parameters
    counts = parameter_counts(model)
    return counts.total, counts.active


def _millions(number: int) -> str:
    """Return a number of parameters in words.

    Examples
    --------
    >>> _millions(134_515_008), _millions(6_919_161_856), _millions(50_208)
    ('134.5 million', '6.9 billion', '50,208')
    """
    if number >= 1e9:
        return f"{number / 1e9:.1f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _use_lines(out: Path) -> list[str]:
    """Return lines of Python that load and run what was made."""
    return [
        "from bakeoff.experts.loading import load_experts",
        "",
        f"model, tokenizer = load_experts({str(out)!r})",
        'asked = tokenizer("The", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**asked, max_new_tokens=20)[0]))",
    ]


def _training_lines(out: Path, *, by_to_moe: bool = False) -> list[str]:
    """Return lines of Python that train what was made, save it and run it."""
    trained = str(out) + "-trained"
    after, extra = "", []
    saved = f"model.save_pretrained({trained!r})"
    if by_to_moe:
        extra = [
            "from bakeoff.experts.conversion import save_moe",
            "from bakeoff.experts.mixture_of_experts import after_optimizer_step",
        ]
        after = ", after_step=lambda: after_optimizer_step(model)"
        saved = f"save_moe(model, {trained!r})"
    imports = sorted(
        [
            "from bakeoff.data.domain_texts import read_domains",
            "from bakeoff.experts.causal_training import domain_batches, train_causal",
            "from bakeoff.experts.loading import load_experts",
            "from bakeoff.experts.read_me import pack_texts",
            *extra,
        ]
    )
    return [
        *imports,
        "",
        f"model, tokenizer = load_experts({str(out)!r})",
        'texts, _ = read_domains(["code=src", "docs=docs"])  # your domains',
        "domains = {name: pack_texts(tokenizer, found, 256) for name, found in texts.items()}",
        "batches = domain_batches(domains, batch_size=8)",
        f"train_causal(model, batches, steps=1000, peak_learning_rate=5e-4{after})",
        saved,
        f"tokenizer.save_pretrained({trained!r})",
        "",
        'asked = tokenizer("The", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**asked, max_new_tokens=20)[0]))",
    ]


def _write_readme(
    folder: Path, out: Path, what: str, total: int, active: int, lines: Sequence[str]
) -> None:
    code = "\n".join(lines)
    write_text(
        folder / "README.md",
        f"# {out.name}\n\n{what}\n\n{total:,} parameters, {active:,} active per token.\n\n"
        f"```python\n{code}\n```\n\nWhich experts do what:\n\n"
        f"```sh\nbakeoff experts inspect {shlex.quote(str(out))} --out look\n```\n",
    )


def _made(
    out: Path,
    total: int,
    active: int,
    lines: Sequence[str],
    as_json: bool,
    facts: Mapping[str, Any],
) -> None:
    """Say what was made and how to go on."""
    if as_json:
        counts = {"parameters": total, "active_parameters": active}
        _print_json({**facts, **counts, "out": str(out), "usage": list(lines)})
        return
    typer.echo(f"{out}: {_millions(total)} parameters, {_millions(active)} active per token")
    trains = any("train_causal" in line for line in lines)
    typer.echo(f"\nto {'train and use' if trains else 'use'} it (also in {out / 'README.md'}):\n")
    for line in lines:
        typer.echo(f"  {line}".rstrip())
    typer.echo(f"\nto look inside: bakeoff experts inspect {shlex.quote(str(out))} --out look")


def _command() -> str:
    return shlex.join(["bakeoff", *sys.argv[1:]])


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
