"""`bakeoff select`: choose rows of the user's files, write them, and show why."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import bakeoff
from bakeoff.cli.values import json_or_text
from bakeoff.errors import BakeoffError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from bakeoff.data.pool_files import Pool, PoolFiles
    from bakeoff.data.samples import Sample
    from bakeoff.selection.selector import Selector
    from bakeoff.selection.selectors import SelectorKind

Progress = Callable[[int, int], None]

DEFAULT_EMBEDDER = "all-minilm-l6-v2"
DEFAULT_MODEL = "smollm2-135m"
# What an interruption may cost at most, in texts. A shard is also what texts of like length are
# gathered from, so much smaller ones would be slower.
_ROWS_PER_SHARD = 2048
# Raised when the same embedder gives other vectors, because our way of calling it changed.
_EMBEDDING = 1
_PRINTED = 100
_ON_MAP = {"pick": 1000, "query": 50, "labelled": 200}
_OPTION_OF = {"queries": "--queries", "confidence": "--confidence", "groups": "--groups"}


def select(
    *,
    method: str,
    data: Sequence[Path],
    text_column: str | None,
    columns: Mapping[str, str],
    number: int,
    out: Path,
    embedder: str,
    already_labeled: str | None,
    queries: Sequence[Path],
    confidence: str | None,
    groups: str | None,
    model: str | None,
    params: Mapping[str, str],
    seed: int,
    max_rows: int | None,
    no_report: bool,
    as_json: bool,
) -> None:
    """Choose rows, write them and the report, print a reason per pick; see the command's help."""
    from rich.console import Console

    from bakeoff.data.pool_files import PoolFiles
    from bakeoff.selection.selectors import selector_kind

    started = time.monotonic()
    console = Console(stderr=as_json)
    kind = selector_kind(method)
    given = {"queries": queries or None, "confidence": confidence, "groups": groups}
    _check_needs(method, kind, given, model)
    if len(queries) > 1 and kind.reads not in ("vectors", "states"):
        raise DataError(
            f"several --queries are several tasks, which {method} cannot tell apart: give one file"
        )
    values = {name: json_or_text(text) for name, text in params.items()}
    kind.build(n_select=number, seed=seed, **values)  # refuses an unknown parameter at once
    _check_output(out, data)
    named = {**columns, **({} if text_column is None else {"text": text_column})}
    samples = kind.reads != "vectors"  # a text is then made of all parts of a sample
    files = PoolFiles(data, columns=named, samples=samples)
    _say(console, f"reading {_names(files.paths)} ({_shown_roles(files)})")
    pool = files.scan(
        labelled=_labelled(already_labeled, files),
        confidence=confidence,
        groups=groups,
        max_rows=max_rows,
        seed=seed,
    )
    work = _Work(console, kind, files, pool, seed, embedder, model or DEFAULT_MODEL)
    for note in pool.notes:
        _say(console, f"  {note}")
    open_rows = len(pool) - len(pool.labelled)
    labelled = f", {len(pool.labelled):,} labelled already" if already_labeled else ""
    _say(console, f"  {open_rows:,} rows to choose from{labelled}")
    if number > open_rows:
        raise DataError(
            f"--number must be at most {open_rows:,}, the rows that can be picked, got {number:,}"
        )
    query_samples = None
    query_groups: list[str] = []
    for asked in queries:
        found = _read_queries(asked, files, samples=samples)
        query_samples = [*(query_samples or []), *found]
        query_groups += [str(asked)] * len(found)
        _say(console, f"  {len(found):,} queries from {asked}")

    selector = kind.build(n_select=number, seed=seed, **values, **work.model_argument())
    _fit(work, selector, query_samples, query_groups if len(queries) > 1 else None)
    picked = selector.selected_indices_
    reasons = selector.reasons()
    chosen_rows = pool.rows[picked]
    names = _write(files, chosen_rows, reasons, out, work)

    report = None
    if not no_report:
        report = out.with_suffix(".html")
        _report(
            work, method, _effective(selector), picked, reasons, query_samples, out, report, started
        )
    if as_json:
        _print_json(
            work,
            method,
            _effective(selector),
            chosen_rows,
            reasons,
            out,
            report,
            time.monotonic() - started,
        )
        return
    _print_picks(console, work.texts_of(picked[:_PRINTED]), chosen_rows, reasons, out)
    for name, column in names.items():
        if name != column:
            console.print(f"the column {name!r} was there already; ours is {column!r}")
    for label, path in (("rows: ", out), ("report:", report)):
        if path is not None:
            console.print(f"{label:8} {path}", highlight=False, soft_wrap=True, markup=False)


# Arguments ----------------------------------------------------------------------------------------


def _check_needs(
    method: str, kind: SelectorKind, given: Mapping[str, Any], model: str | None
) -> None:
    """Refuse what is missing, and what would be read and then make no difference."""
    for need, value in given.items():
        option = _OPTION_OF[need]
        if need in kind.needs and value is None:
            what = {
                "queries": "a file of examples of what is wanted",
                "confidence": "the column that says how sure the model is of each row",
                "groups": "the column that says where each row comes from",
            }[need]
            raise DataError(f"{method} needs {option}: {what}")
        if need not in kind.needs and value is not None:
            raise DataError(f"{option} makes no difference to {method}; leave it out")
    if model is not None and not (kind.uses_model or kind.reads == "states"):
        raise DataError(f"--model makes no difference to {method}, which uses none; leave it out")


def _check_output(out: Path, data: Sequence[Path]) -> None:
    """Refuse before any work what could not be written after it."""
    from bakeoff.data.pool_files import OUTPUTS

    if out.suffix.lower() not in OUTPUTS:
        raise DataError(f"--out must end in {', '.join(OUTPUTS)}, got {out}")
    if out.is_dir():
        raise DataError(f"--out: {out} is a folder")
    for path in data:
        inside = path.is_dir() and out.resolve().is_relative_to(path.resolve())
        if inside or out.resolve() == path.resolve():
            raise DataError(
                f"--out {out} would {'become part of' if inside else 'replace'} the data {path}: "
                "write it elsewhere"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        trial = out.parent / f".{out.name}.part"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise DataError(
            f"--out: the folder {out.parent} cannot be written ({error.strerror or error})"
        ) from None


def _labelled(given: str | None, files: PoolFiles) -> str | list[int] | None:
    from bakeoff.data.pool_files import read_row_numbers

    if given is None or given in files.names:
        return given
    if Path(given).expanduser().exists():
        return read_row_numbers(Path(given).expanduser())
    raise DataError(
        f"--already-labeled: {given!r} is neither a column nor a file; columns are: "
        f"{', '.join(map(repr, files.names))}"
    )


def _read_queries(path: Path, files: PoolFiles, *, samples: bool) -> list[Sample]:
    """Read the queries by the pool's columns where they are there, else by usual names."""
    from bakeoff.data.formats import iterate_rows
    from bakeoff.data.pool_files import PoolFiles

    path = path.expanduser()
    first = next(iterate_rows(path), None)
    there = () if first is None else tuple(first.values)
    shared = {role: column for role, column in files.roles.items() if column in there}
    complete = files.roles.keys() == shared.keys() or "response" in shared or "text" in shared
    own = PoolFiles([path], columns=shared if complete else None, samples=samples)
    return list(own.samples(own.scan()))


def _shown_roles(files: PoolFiles) -> str:
    if files.roles.keys() == {"text"}:
        return f"text: column {files.roles['text']!r}"
    return ", ".join(f"{role}: column {column!r}" for role, column in files.roles.items())


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name or str(path) for path in paths)


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


# The work -----------------------------------------------------------------------------------------


@dataclass
class _Work:
    """What the steps share: the pool, and the models, which are loaded when first asked for."""

    console: Console
    kind: SelectorKind
    files: PoolFiles
    pool: Pool
    seed: int
    embedder_name: str
    model_name: str
    notes: list[str] = field(default_factory=list)
    known_texts: list[str] | None = None
    vectors: Any = None  # a VectorStore, once there is one
    query_vectors: NDArray[np.float32] | None = None

    @cached_property
    def embedder(self) -> _Embedder:
        return _Embedder(self.embedder_name, self)

    @cached_property
    def language_model(self) -> Any:
        from bakeoff.models import load_language_model

        _say(self.console, f"loading {self.model_name}")
        return load_language_model(self.model_name)

    def model_argument(self) -> dict[str, Any]:
        return {"model": self.language_model} if self.kind.uses_model else {}

    def note(self, text: str) -> None:
        """Say something that the report says too."""
        self.notes.append(text)
        _say(self.console, f"  {text}")

    def texts_of(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Return some candidates' texts, read again if they were not kept."""
        wanted = [int(index) for index in indices]
        if self.known_texts is not None:
            return [self.known_texts[index] for index in wanted]
        places = set(wanted)
        last = max(places, default=-1)
        found: dict[int, str] = {}
        for index, text in enumerate(self.files.texts(self.pool)):
            if index in places:
                found[index] = text
            if index == last:
                break
        return [found[index] for index in wanted]

    @contextmanager
    def step(self, what: str, total: int | None = None) -> Iterator[Progress]:
        """Say what begins, show a bar on a terminal, and hand out its callback."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        _say(self.console, what)
        bars = Bars(
            TextColumn(" "),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bars:
            task = bars.add_task("", total=total)

            def progress(done: int, of: int) -> None:
                bars.update(task, completed=done, total=of or total)

            yield progress


class _Embedder:
    """The text encoder, and how many texts it read only in part."""

    def __init__(self, name: str, work: _Work) -> None:
        from bakeoff.models import TextEncoder

        self.name = name
        self.encoder = TextEncoder(name)
        self.fingerprint = self.encoder.fingerprint
        _say(work.console, f"loading {name}")
        if not self.encoder.is_sentence_transformer:
            work.note(
                f"{name} is no sentence-transformers model; its vectors are means over tokens."
            )
        self.model = self.encoder.model
        self.n_cut = 0

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Any:
        def cut(indices: list[int]) -> None:
            self.n_cut += len(indices)

        return self.encoder.encode(texts, on_truncated=cut, progress=progress)


def _fit(
    work: _Work,
    selector: Selector,
    queries: list[Sample] | None,
    query_groups: list[str] | None,
) -> None:
    """Give the selector what it reads."""
    kind, pool = work.kind, work.pool
    beside: dict[str, Any] = {}
    if len(pool.labelled):
        beside["already_labeled"] = pool.labelled
    if "confidence" in kind.needs:
        beside["confidence"] = pool.confidence
    if "groups" in kind.needs:
        beside["groups"] = pool.groups
    content: Any
    if _unread(selector):
        content = range(len(pool))
    elif kind.reads == "vectors":
        content = _embedded(work, queries)
    elif kind.reads == "states":
        content = _states(work, queries)
    elif kind.reads == "texts":
        content = work.known_texts = list(work.files.texts(pool))
    else:
        content = list(work.files.samples(pool))
        work.known_texts = [sample.text for sample in content]
    if "queries" in kind.needs and queries is not None:
        by_vector = kind.reads in ("vectors", "states")
        as_text = [sample.text for sample in queries] if kind.reads == "texts" else queries
        beside["queries"] = work.query_vectors if by_vector else as_text
        if query_groups is not None and by_vector:
            beside["groups"] = query_groups  # each file is a task, and tasks take turns
    elif work.vectors is not None:
        import numpy as np

        content = np.asarray(content)  # only nearest-to-queries methods read a store block by block
    with work.step(f"choosing {selector.n_select:,} of {len(pool) - len(pool.labelled):,}") as bar:
        if "progress" in inspect.signature(selector.fit).parameters:
            beside["progress"] = bar
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            selector.fit(content, **beside)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            work.note(f"{warning.message}".rstrip(".") + ".")


def _effective(selector: Selector) -> dict[str, Any]:
    """Return the parameters that the picks depend on, those that nobody set included."""
    said_elsewhere = ("n_select", "model", "random_state")
    values = selector.get_params(deep=False).items()
    return {
        name: value
        for name, value in values
        if name not in said_elsewhere
        and (value is None or isinstance(value, bool | int | float | str))
    }


def _unread(selector: Selector) -> bool:
    """Tell whether a selector looks at the pool at all (a random one does not)."""
    return bool(selector.__sklearn_tags__().no_validation)


def _embedded(work: _Work, queries: list[Sample] | None) -> Any:
    """Return the pool's vectors by the embedder, from the cache as far as they are there."""
    embedder = work.embedder
    fingerprint = {"embedder": embedder.fingerprint, "version": _EMBEDDING}
    work.vectors = _stored(work, embedder.name, fingerprint, embedder.encode)
    if embedder.n_cut:
        work.note(
            f"{embedder.n_cut:,} of the texts embedded now are longer than "
            f"{embedder.model.max_seq_length} tokens, which is all that {embedder.name} reads; it "
            "saw their beginning."
        )
    if queries is not None:
        work.query_vectors = embedder.encode([sample.text for sample in queries])
    return work.vectors


def _stored(
    work: _Work,
    name: str,
    fingerprint: Mapping[str, object],
    embed: Callable[[Sequence[str], Progress | None], Any],
    *,
    texts: Callable[[], Iterator[str]] | None = None,
    rows_per_shard: int | None = None,
) -> Any:
    """Return a finished vector store, building what is not there yet."""
    from bakeoff._files import cache_directory
    from bakeoff.data.vector_store import VectorStore

    pool, console = work.pool, work.console
    content = {**fingerprint, "texts": pool.fingerprint}
    address = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = cache_directory() / "vectors" / address[:32]
    finished = 0
    started = False

    with work.step(f"embedding {len(pool):,} texts with {name}", len(pool)) as bar:

        def shard(part: list[str]) -> Any:
            nonlocal started
            if finished and not started:
                _say(console, f"  {finished:,} of them were embedded before; going on from there")
            started = True
            return embed(part, lambda done, _: bar(finished + done, len(pool)))

        def shard_done(done: int, _: int) -> None:
            nonlocal finished
            finished = done
            bar(done, len(pool))

        try:
            store = VectorStore.build(
                folder,
                texts or (lambda: work.files.texts(pool)),
                shard,
                fingerprint=content,
                rows_per_shard=rows_per_shard or _ROWS_PER_SHARD,
                progress=shard_done,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{finished:,} of {len(pool):,} texts are embedded and kept; the same command goes "
                "on from there."
            ) from None
    if not started:
        _say(console, "  all of them were embedded before")
    return store


def _states(work: _Work, queries: list[Sample] | None) -> Any:
    """Return the pool's vectors as RDS+ makes them of a language model's states."""
    from bakeoff.selection.rds_plus import RepresentationSelector

    _say(work.console, f"loading {work.model_name}")
    maker = RepresentationSelector(work.model_name)
    fingerprint = {"rds-plus": maker.fingerprint()}

    def texts() -> Iterator[str]:
        return map(maker.text_of, work.files.samples(work.pool))

    def embed(part: Sequence[str], progress: Progress | None) -> Any:
        return maker.embed(part, progress=progress)

    work.vectors = _stored(
        work, work.model_name, fingerprint, embed, texts=texts, rows_per_shard=_ROWS_PER_SHARD // 4
    )
    if queries is not None:
        work.query_vectors = maker.embed(queries)
    return work.vectors


def _write(
    files: PoolFiles, rows: NDArray[np.int64], reasons: Sequence[str], out: Path, work: _Work
) -> dict[str, str]:
    from bakeoff.data.pool_files import write_picks

    numbers = [int(row) for row in rows]
    added: dict[str, list[int] | list[str]] = {
        "pick": list(range(1, len(rows) + 1)),
        "row": numbers,
        "reason": list(reasons),
    }
    try:
        return write_picks(files.fetch(numbers), out, added)
    except OSError as error:
        raise DataError(f"--out: {out} cannot be written ({error.strerror or error})") from None


# What is shown ------------------------------------------------------------------------------------


def _print_picks(
    console: Console,
    texts: Sequence[str],
    rows: NDArray[np.int64],
    reasons: Sequence[str],
    out: Path,
) -> None:
    from bakeoff.selection.picks_report import beginning

    width = console.width if console.is_terminal else 120
    places = len(str(max(len(rows), 4)))
    row_places = len(str(int(rows.max())))
    reason_places = min(44, max(map(len, reasons[:_PRINTED])))
    console.print()
    for i, text in enumerate(texts):
        head = f"{i + 1:>{places}}  row {int(rows[i]):>{row_places}}  "
        reason = reasons[i] if len(reasons[i]) <= reason_places else reasons[i][:43] + "…"
        line = f"{head}{reason:<{reason_places}}  "
        line += beginning(text, max(20, width - len(line) - 1))
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(rows) > len(texts):
        console.print(f"and {len(rows) - len(texts):,} more in {out}", highlight=False)
    console.print()


def _print_json(
    work: _Work,
    method: str,
    params: Mapping[str, Any],
    rows: NDArray[np.int64],
    reasons: Sequence[str],
    out: Path,
    report: Path | None,
    seconds: float,
) -> None:
    record = {
        "method": method,
        "params": dict(params),
        "seed": work.seed,
        "data": [str(path) for path in work.files.paths],
        "columns": work.files.roles,
        "rows_read": work.pool.n_read,
        "rows_to_choose_from": len(work.pool) - len(work.pool.labelled),
        "already_labeled": len(work.pool.labelled),
        "fingerprint": work.pool.fingerprint,
        "vectors": None if work.vectors is None else work.vectors.digest,
        "picks": [
            {"pick": i + 1, "row": int(row), "reason": reason}
            for i, (row, reason) in enumerate(zip(rows, reasons, strict=True))
        ],
        "out": str(out),
        "report": None if report is None else str(report),
        "notes": [*work.pool.notes, *work.notes],
        "seconds": round(seconds, 3),
    }
    typer.echo(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def _report(
    work: _Work,
    method: str,
    params: Mapping[str, Any],
    picked: NDArray[np.int64],
    reasons: Sequence[str],
    queries: list[Sample] | None,
    out: Path,
    path: Path,
    started: float,
) -> None:
    """Write the page beside the picks; without a map if no vectors can be had for one."""
    import numpy as np

    from bakeoff._methods import find_methods
    from bakeoff.selection.picks_report import PickRow, PicksReport, write_picks_report

    pool = work.pool
    shown = _shown_on_map(work, picked, queries)
    texts = work.texts_of(np.concatenate([shown.picks, shown.labelled, shown.others]))
    layout = _layout(work, shown, texts)
    published = next((m for m in find_methods() if method in m.designs), None)
    n_open = len(pool) - len(pool.labelled)
    facts = {
        "data": "; ".join(map(str, work.files.paths)),
        "columns": _shown_roles(work.files),
        "rows read": f"{pool.n_read:,}",
        "parameters": ", ".join(f"{k} = {v}" for k, v in params.items() if v is not None) or "none",
        "seed": str(work.seed),
        **({"language model": work.model_name} if _uses_model(work.kind) else {}),
        **({"embedder": work.embedder_name} if work.vectors is not None else {}),
        "texts": f"SHA-256 {pool.fingerprint}",
        "written to": str(out),
        "time": f"{time.monotonic() - started:.0f} s",
    }
    page = PicksReport(
        method=method,
        data=_names(work.files.paths),
        n_candidates=n_open,
        n_labelled=len(pool.labelled),
        n_picks=len(picked),
        picks=[
            PickRow(i + 1, int(pool.rows[index]), texts[i], reasons[i])
            for i, index in enumerate(shown.picks)
        ],
        n_others=n_open - len(picked),
        **layout,
        title="" if published is None else published.title,
        paper="" if published is None else published.paper,
        facts=facts,
        notes=[*pool.notes, *work.notes],
        command=shlex.join(["bakeoff", *sys.argv[1:]]),
        started=datetime.now().strftime("%Y-%m-%d %H:%M"),
        usage=_usage(out),
        version=bakeoff.__version__,
    )
    write_picks_report(page, path)


def _uses_model(kind: SelectorKind) -> bool:
    return kind.uses_model or kind.reads == "states"


def _usage(out: Path) -> list[str]:
    reader = {
        ".parquet": f'pandas.read_parquet("{out}")',
        ".jsonl": f'pandas.read_json("{out}", lines=True)',
        ".csv": f'pandas.read_csv("{out}")',
    }[out.suffix.lower()]
    return ["import pandas", f"chosen = {reader}"]


@dataclass(frozen=True)
class _Shown:
    """Which candidates the page shows."""

    picks: NDArray[np.int64]
    labelled: NDArray[np.int64]
    others: NDArray[np.int64]
    queries: list[str]


def _shown_on_map(work: _Work, picked: NDArray[np.int64], queries: list[Sample] | None) -> _Shown:
    import numpy as np

    from bakeoff.selection.picks_report import MOST_ON_MAP

    random = np.random.default_rng(work.seed)

    def drawn(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        return rows if len(rows) <= most else np.sort(random.choice(rows, most, replace=False))

    picks = picked[: _ON_MAP["pick"]]
    texts = [sample.text for sample in (queries or [])[: _ON_MAP["query"]]]
    labelled = drawn(work.pool.labelled, _ON_MAP["labelled"])
    left = np.ones(len(work.pool), dtype=np.bool_)
    left[picked] = False
    left[work.pool.labelled] = False
    others = drawn(np.flatnonzero(left), MOST_ON_MAP - len(picks) - len(texts) - len(labelled))
    return _Shown(picks, labelled, others, texts)


def _layout(work: _Work, shown: _Shown, texts: Sequence[str]) -> dict[str, Any]:
    """Return the map's part of the page."""
    import numpy as np

    from bakeoff.selection.picks_report import MapPoint, picks_map

    rows = np.concatenate([shown.picks, shown.labelled, shown.others])
    stored = work.vectors is not None
    name = work.model_name if work.kind.reads == "states" else work.embedder_name
    try:
        if stored:
            vectors = work.vectors.take(rows)
            if work.query_vectors is not None:
                vectors = np.concatenate([vectors, work.query_vectors[: len(shown.queries)]])
        else:
            embedder = work.embedder
            with work.step(f"embedding {len(rows):,} rows for the map with {name}") as bar:
                vectors = embedder.encode([*texts, *shown.queries], bar)
    except BakeoffError as error:
        work.note(f"There is no map, because there are no vectors for it: {error}")
        return {
            "points": [],
            "positions": np.empty((0, 2)),
            "map_method": "",
            "neighbours_kept": float("nan"),
            "map_vectors": "",
            "sees_map_vectors": False,
        }
    _say(work.console, "drawing the map")
    found = picks_map(vectors)
    n_picks, n_labelled = len(shown.picks), len(shown.labelled)
    points = [MapPoint("pick", text, i + 1) for i, text in enumerate(texts[:n_picks])]
    points += [MapPoint("labelled", text) for text in texts[n_picks : n_picks + n_labelled]]
    points += [MapPoint("other", text) for text in texts[n_picks + n_labelled :]]
    points += [MapPoint("query", text, i) for i, text in enumerate(shown.queries)]
    return {
        "points": points,
        "positions": found.positions,
        "map_method": found.method,
        "neighbours_kept": found.neighbours_kept,
        "map_vectors": f"{name} vectors, {vectors.shape[1]} dimensions",
        "sees_map_vectors": stored,
    }
