"""`bakeoff upgrade`: whether re-indexing can be skipped when an encoder is replaced."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import typer

from bakeoff._files import write_text
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.embedding.upgrade import StoredIndex, UpgradeResult

Advice = Literal["skip re-indexing", "adapter", "keep the old model", "re-index", "undecided"]

SAMPLE = 2000
"""Documents that are searched by default; a larger index is sampled."""

_MADE_QUERIES = 500
_LEAST_WORDS = 8
_TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
_QUERY_NAMES = ("query", "question", "text", "anchor", "prompt", "sentence")
_RELEVANT_NAMES = (
    *("relevant", "relevant_ids", "doc_id", "docid", "document_id", "answer_id", "positive_id"),
    *("corpus_id", "doc_ids", "corpus_ids"),
)
_ROLES = ("text", "vector", "id", "query", "relevant")


@dataclass(frozen=True)
class Queries:
    """What is asked, and which documents answer it (ids), if that is known."""

    texts: tuple[str, ...]
    relevant: tuple[tuple[str, ...], ...] | None
    notes: tuple[str, ...] = ()


def upgrade(
    old: str | None,
    new: str,
    index: Path,
    *,
    queries: Path | None = None,
    columns: Mapping[str, str] | None = None,
    margin: float = 0.01,
    sample: int | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Try every way to serve an index after an upgrade, and say which suffices."""
    from rich.console import Console

    from bakeoff.embedding.upgrade import evaluate_upgrade

    console = Console(stderr=True)
    roles = dict(columns or {})
    unknown = sorted(set(roles) - set(_ROLES))
    if unknown:
        raise DataError(f"--column: roles are {', '.join(_ROLES)}; got {', '.join(unknown)}")
    if not 0 < margin < 1:
        raise DataError(f"--margin must be between 0 and 1, as the measure is, got {margin}")
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    console.print("reading the index", style="dim")
    stored = read_stored(index, roles)
    if stored.texts is None:
        raise DataError(
            f"{index} holds no texts, so that nothing can be embedded by the new model: give a "
            "file with texts and vectors, or a folder with one .npy file and one file of texts"
        )
    if old is None and stored.vectors is None:
        raise DataError(f"--old is missing, and {index} holds no vectors that it has made")
    n_documents = min(len(stored), SAMPLE if sample is None else sample)
    if queries is None:
        asked = made_queries(stored, n_documents)
    else:
        asked = read_queries(queries, roles)
        n_answers = len({name for names in asked.relevant or () for name in names})
        if sample is None:  # all that answer a query must be there, and as many that do not
            n_documents = min(len(stored), max(n_documents, 2 * n_answers))
        elif n_documents < n_answers:
            raise DataError(
                f"--sample {sample}: {n_answers:,} documents answer the queries and must be in "
                f"it; give at least {n_answers}, or leave it out"
            )
    with _Bars(console) as report, warnings.catch_warnings():
        # It is among the notes.
        warnings.filterwarnings("ignore", message="The old model does not reproduce")
        result = evaluate_upgrade(
            old,
            new,
            stored,
            list(asked.texts),
            relevant=asked.relevant,
            n_documents=n_documents,
            progress=report,
        )
    found = advise(result, margin=margin)
    found = {
        "schema_version": 1,
        "old": old,
        "new": new,
        "index": str(index),
        **found,
        "notes": [*asked.notes, *result.notes],
    }
    if out is not None:
        _write(found, result, out)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        return
    _print(found, Console())


# The advice ---------------------------------------------------------------------------------------


def advise(result: UpgradeResult, *, margin: float = 0.01, alpha: float = 0.05) -> dict[str, Any]:
    """Return what an upgrade's scores say: which way is as good as embedding everything again.

    Every way is compared with re-indexing, query by query, by the first measure. One *suffices* if
    it is better, or equivalent within the margin.

    Parameters
    ----------
    result
        Of `bakeoff.embedding.upgrade.evaluate_upgrade`.
    margin
        How much of the measure may be lost without practical consequence.
    alpha
        Level of the tests; intervals have confidence ``1 - alpha``.

    Returns
    -------
    dict
        JSON-able: ``advice`` (``"skip re-indexing"``, ``"adapter"``, ``"keep the old model"``,
        ``"re-index"`` or ``"undecided"``), ``adapter`` (which one, or None), ``reasons``
        (sentences), ``measure``, ``margin``, ``alpha``, numbers of queries and documents, and
        ``options`` with scores, difference, interval, verdict and cost of each.

    Raises
    ------
    bakeoff.errors.DataError
        If re-indexing could not be tried.
    """
    from bakeoff.embedding.upgrade import REINDEX, SKIP, TODAY
    from bakeoff.study import compare

    if REINDEX not in result.options:
        raise DataError(f"re-indexing could not be tried: {result.unavailable.get(REINDEX)}")
    measure = result.measures[0]
    scores = result.scores()
    compared = compare(scores, reference=REINDEX, margin=margin, alpha=alpha)
    # Where all queries find the same, nothing varies that could tell how little a few of them say.
    # As hits and misses, for which there is a rule, they leave an interval of about 3 / n.
    nothing = {name: {measure: np.zeros((1, result.n_queries))} for name in scores}
    alike = compare(nothing, reference=REINDEX, margin=margin, alpha=alpha)
    enough = math.ceil(
        math.sqrt(2) * NormalDist().inv_cdf(1 - alpha / max(1, len(scores) - 1)) / margin
    )
    options: dict[str, dict[str, Any]] = {}
    for name, option in result.options.items():
        record = compared[name].overall
        needed = record.needed_units
        if record.ties == record.n_units:
            record = alike[name].overall
            needed = enough if record.verdict == "undecided" else None
        options[name] = {
            "what": option.what,
            "scores": {each: float(option.per_query[each].mean()) for each in result.measures},
            **(
                {"difference": None, "interval": None, "verdict": None, "needed_queries": None}
                if name == REINDEX
                else {
                    "difference": record.difference,
                    "interval": [end if np.isfinite(end) else None for end in record.interval],
                    "verdict": record.verdict,
                    "needed_queries": needed,
                }
            ),
            "texts_to_embed": option.texts_to_embed,
            "seconds_to_embed": option.seconds_to_embed,
            "fit_seconds": option.fit_seconds,
        }
    suffices = [n for n, o in options.items() if o["verdict"] in ("better", "equivalent")]
    # Agreement with the new model says nothing about whether the old one is worse.
    judged = not measure.startswith("agreement")
    candidates = [name for name in options if name != REINDEX and (name != TODAY or judged)]
    open_ = [name for name in candidates if options[name]["verdict"] == "undecided"]
    adapters = [name for name in suffices if name not in (SKIP, TODAY)]
    advice: Advice
    adapter = None
    if SKIP in suffices:
        advice, basis = "skip re-indexing", [SKIP] + [TODAY] * (TODAY in suffices and judged)
    elif TODAY in suffices and judged:
        advice, basis = "keep the old model", [TODAY]
    elif adapters:
        adapter = max(adapters, key=lambda name: options[name]["scores"][measure])
        advice, basis = "adapter", [adapter]
    elif open_:
        advice, basis = "undecided", open_
    else:
        advice = "re-index"
        basis = candidates
    return {
        "advice": advice,
        "adapter": adapter,
        "reasons": _reasons(advice, basis, options, result, margin, alpha),
        "measure": measure,
        "margin": margin,
        "alpha": alpha,
        "n_queries": result.n_queries,
        "n_documents": result.n_documents,
        "n_index": result.n_index,
        "query_seconds": dict(result.query_seconds),
        "options": options,
        "unavailable": dict(result.unavailable),
    }


def _reasons(
    advice: str,
    basis: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    result: UpgradeResult,
    margin: float,
    alpha: float,
) -> list[str]:
    from bakeoff.data.formats import count
    from bakeoff.embedding.upgrade import REINDEX, TODAY
    from bakeoff.study.wording import duration

    again = options[REINDEX]
    seconds = again["seconds_to_embed"]
    price = f"{again['texts_to_embed']:,} texts" + (
        "" if seconds is None else f", about {duration(seconds)} on this machine"
    )
    first = {
        "skip re-indexing": "Re-indexing can be skipped: the new model's queries find as much in "
        "the old index.",
        "keep the old model": "The new model finds no more than the old one, even with everything "
        "embedded again: there is nothing to upgrade for.",
        "adapter": f"An adapter suffices ({', '.join(basis)}): re-indexing can be put off.",
        "re-index": "Re-index: nothing else finds as much.",
        "undecided": f"Undecided at {count(result.n_queries, 'query', 'queries')}: the intervals "
        f"are too wide for a margin of {margin:g}.",
    }[advice]
    reasons = [first]
    if advice == "skip re-indexing" and TODAY in basis:
        reasons.append("So does the old model: the upgrade gains nothing that these queries show.")
    for name in basis:
        option = options[name]
        low, high = option["interval"]
        ends = "unknown" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
        needed = option["needed_queries"]
        more = f"; about {needed:,} queries would decide" if needed else ""
        reasons.append(
            f"{name}: {option['difference']:+.3f} {result.measures[0]} against re-indexing "
            f"({1 - alpha:.0%} interval {ends}): {option['verdict']}{more}."
        )
    reasons.append(f"Re-indexing costs {price}.")
    return reasons


# What is asked ------------------------------------------------------------------------------------


def read_stored(path: Path, columns: Mapping[str, str] | None = None) -> StoredIndex:
    """Return an index from a file or folder.

    A folder is a ``datasets`` folder or Parquet shards; or it holds one ``.npy`` file of vectors
    and one file of texts (``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``) in
    the same order.
    """
    from bakeoff.embedding.upgrade import StoredIndex, read_index

    roles = columns or {}
    names: dict[str, Any] = {
        f"{role}_column": roles[role] for role in ("text", "vector", "id") if role in roles
    }
    path = path.expanduser()
    if path.is_dir():
        vectors = sorted(path.glob("*.npy"))
        texts = sorted(each for each in path.iterdir() if each.suffix.lower() in _TEXT_FILES)
        if len(vectors) == 1 and len(texts) == 1:
            held = read_index(texts[0], **names)
            if held.texts is None:
                raise DataError(
                    f"{texts[0]} has no column of texts: name one with --column text=NAME"
                )
            return StoredIndex(held.texts, read_index(vectors[0]).vectors, held.ids)
        if vectors:
            raise DataError(
                f"{path} must hold one .npy file and one file of texts in the same order, it has "
                f"{len(vectors)} and {len(texts)}"
            )
    return read_index(path, **names)


def read_queries(path: Path, columns: Mapping[str, str] | None = None) -> Queries:
    """Return queries from a file, with the ids of the documents that answer them if it has some.

    Parameters
    ----------
    path
        ``.txt`` (one per line), or what `bakeoff.data.read_table` reads: a column of queries, and
        perhaps one of ids (an id, or a list of them; in CSV a JSON list). Ids are those of the
        index, or row numbers from 0 where it has none.
    columns
        Names of columns for the roles ``"query"`` and ``"relevant"``.
    """
    from bakeoff.data.formats import read_table
    from bakeoff.embedding.upgrade import read_lines

    path = path.expanduser()
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise DataError(f"there is no {path}")
        lines = read_lines(path)
        if not lines:
            raise DataError(f"{path} holds no queries")
        return Queries(tuple(lines), None)
    table = read_table(path)
    roles = columns or {}
    query = _column(path, table.columns, roles.get("query"), _QUERY_NAMES)
    if query is None:
        raise DataError(
            f"{path} has no column of queries ({', '.join(_QUERY_NAMES)}); it has "
            f"{', '.join(table.columns)}: name one with --column query=NAME"
        )
    relevant = _column(path, table.columns, roles.get("relevant"), _RELEVANT_NAMES)
    texts = []
    for cell, place in zip(table.columns[query], table.places, strict=True):
        if not isinstance(cell, str) or not cell.strip():
            raise DataError(f"{path}, {place}: the query must be a text, got {cell!r}")
        texts.append(cell)
    if not texts:
        raise DataError(f"{path} holds no queries")
    if relevant is None:
        return Queries(tuple(texts), None)
    answers = tuple(
        _ids(cell, f"{path}, {place}")
        for cell, place in zip(table.columns[relevant], table.places, strict=True)
    )
    return Queries(tuple(texts), answers)


def made_queries(index: StoredIndex, n_documents: int, *, seed: int = 0) -> Queries:
    """Return the beginnings of some documents as queries, each answered by its document.

    At most 500, and at most half of the documents that are searched. A query is the document's
    first sentence, or, where that is more than half of it, the first third of its words. Documents
    that have a copy are left out, since nothing tells which of the two is meant.

    Raises
    ------
    DataError
        If fewer than two such documents have at least eight words.
    """
    assert index.texts is not None
    copies = Counter(index.texts)
    rows = [
        row
        for row, text in enumerate(index.texts)
        if copies[text] == 1 and len(text.split()) >= _LEAST_WORDS
    ]
    n_queries = min(_MADE_QUERIES, max(2, n_documents // 2), len(rows))
    if len(rows) < 2 or n_documents < 2:
        raise DataError(
            f"queries cannot be made of copies and documents with fewer than {_LEAST_WORDS} words: "
            "give --queries"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(rows, n_queries, replace=False))
    note = (
        f"No --queries: {n_queries:,} beginnings of documents are the queries, each answered by "
        "its document. They share words with it, so that all ways look better than with people's "
        "queries; give some of yours for an answer about them."
    )
    return Queries(
        tuple(_beginning(index.texts[row]) for row in chosen.tolist()),
        tuple((index.ids[row],) for row in chosen.tolist()),
        (note,),
    )


def _beginning(text: str) -> str:
    words = text.split()
    sentence = re.split(r"(?<=[.!?])\s", " ".join(words), maxsplit=1)[0].split()
    if 3 <= len(sentence) <= len(words) // 2:
        return " ".join(sentence)
    return " ".join(words[: max(3, len(words) // 3)])


def _column(
    path: Path, found: Mapping[str, Any], asked: str | None, usual: Sequence[str]
) -> str | None:
    if asked is not None and asked not in found:
        raise DataError(f"{path} has no column {asked!r}, it has {', '.join(found)}")
    by_lower = {name.lower(): name for name in found}
    return asked or next((by_lower[name] for name in usual if name in by_lower), None)


def _ids(cell: Any, place: str) -> tuple[str, ...]:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: {cell!r} is no list of ids: {error}") from error
    several = isinstance(cell, list | tuple | np.ndarray)
    ids = tuple(str(one) for one in (cell if several else (cell,)) if one not in (None, ""))
    if not ids:
        raise DataError(f"{place}: no document answers this query; leave such queries out")
    return ids


# What comes out -----------------------------------------------------------------------------------


def _write(found: dict[str, Any], result: UpgradeResult, out: Path) -> None:
    """Write the JSON, and the adapter where that is the advice; none stays of an earlier run."""
    from bakeoff.embedding.upgrade_baselines import ADAPTER_FILE, LinearAdapter

    folder = out / "adapter"
    if (folder / ADAPTER_FILE).is_file():
        for name in (ADAPTER_FILE, "README.md"):
            (folder / name).unlink(missing_ok=True)
    if found["adapter"] is not None:
        folder.mkdir(parents=True, exist_ok=True)
        LinearAdapter.of(result.options[found["adapter"]].adapter).save(folder)
        write_text(folder / "README.md", _read_me(found))
        found["adapter_folder"] = str(folder)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(out / "upgrade.json", text + "\n")


def _read_me(found: Mapping[str, Any]) -> str:
    return (
        f"# Adapter: {found['adapter']}\n\n"
        f"Maps query vectors of {found['new']} to the index that {found['old'] or 'the old model'} "
        f"has made. {' '.join(found['reasons'])}\n\n"
        "```python\n"
        "from bakeoff.embedding.upgrade_baselines import LinearAdapter\n\n"
        'queries = LinearAdapter.load("adapter").transform(new_model.encode(["your query"]))\n'
        "```\n\n"
        "Without bakeoff: scale a query's vector to length 1, multiply it by `matrix`, add "
        "`offset`, scale to length 1 again; both are in `adapter.safetensors`.\n"
    )


def _print(found: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    from bakeoff.study.wording import duration

    measure = found["measure"]
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(("", measure, "against re-indexing", "", "texts", "time")):
        table.add_column(name, justify="left" if number in (0, 3) else "right")
    for name, option in found["options"].items():
        difference = ""
        if option["difference"] is not None:
            low, high = option["interval"]
            ends = "" if low is None or high is None else f" ({low:+.3f} to {high:+.3f})"
            difference = f"{option['difference']:+.3f}{ends}"
        seconds = option["seconds_to_embed"]
        table.add_row(
            name,
            f"{option['scores'][measure]:.3f}",
            difference,
            option["verdict"] or "",
            f"{option['texts_to_embed']:,}",
            "?" if seconds is None else duration(seconds) if seconds else "",
        )
    for reason in found["reasons"]:
        console.print(reason, highlight=False, soft_wrap=True)
    console.print()
    # Into a file or pipe a table may be wider than the 80 characters that rich takes it for.
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(table)
    console.print()
    for name, option in found["options"].items():
        console.print(f"{name}: {option['what']}", style="dim", highlight=False, soft_wrap=True)
    for name, why in found["unavailable"].items():
        console.print(f"{name}: not possible, {why}", highlight=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    if "adapter_folder" in found:
        console.print(f"adapter: {found['adapter_folder']}", highlight=False, soft_wrap=True)
    elif found["adapter"] is not None:
        console.print("Give --out FOLDER to have the adapter written.", highlight=False)


class _Bars:
    """A bar per thing that is embedded; a callback of (what, done, total)."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        hidden = not console.is_terminal  # where it would leave an empty line
        self._bar = Progress(*columns, console=console, transient=True, disable=hidden)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
