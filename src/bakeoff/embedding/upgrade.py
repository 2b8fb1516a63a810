"""Whether a search service that changes its encoder can do without embedding its documents again.

`evaluate_upgrade` answers the same queries in every way that is open (the old model on the index as
it is, the new model on the old index, through an adapter, or after embedding everything again) and
returns a score per query and the cost of each. ``bakeoff.study.compare`` turns the scores into
intervals and a verdict.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.formats import Row, count, iterate_rows
from bakeoff.embedding.compatibility import Units, Vectors, ranks_among, unit_vectors
from bakeoff.embedding.upgrade_baselines import Adapter, ProcrustesAdapter, RidgeAdapter
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Role = Literal["query", "document"]
Progress = Callable[[str, int, int], None]

TODAY, SKIP, REINDEX = "today", "skip re-indexing", "re-index"
"""Names of the three options that are always considered; adapters come under their own names."""

_BLOCK_ENTRIES = 16 * 2**20
_CHECKED_TEXTS = 32
_SAME_MODEL = 0.98
_ONE_LENGTH = 0.01
_TEXT_NAMES = ("text", "document", "passage", "content", "sentence", "body")
_KINDS = (".npy", ".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_ID_NAMES = ("id", "_id", "doc_id", "document_id", "docid", "key")
_VECTOR_NAMES = ("vector", "embedding", "embeddings", "vectors", "emb")


# The index ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredIndex:
    """The documents of a search service: texts, the old model's vectors of them, or both.

    Parameters
    ----------
    texts
        N texts; None if only vectors are known (then nothing can be embedded again).
    vectors
        ``(N, d)``, floating point, may be memory-mapped; None to have the old model make them.
    ids
        N distinct names; row numbers as strings by default.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If there is nothing, lengths disagree, or an id occurs twice.
    """

    texts: tuple[str, ...] | None = None
    vectors: NDArray[Any] | None = None
    ids: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise DataError("texts must be a sequence of strings, got one string")
        if self.texts is not None:
            object.__setattr__(self, "texts", tuple(self.texts))
            for row, text in enumerate(self.texts):
                if not isinstance(text, str):
                    raise DataError(f"the text of row {row} must be a string, got {text!r}")
        if self.vectors is not None:
            vectors = self.vectors
            if getattr(vectors, "ndim", 0) != 2 or vectors.dtype.kind != "f":
                raise DataError(
                    "vectors must be a floating-point array (N, d), got "
                    f"{getattr(vectors, 'dtype', type(vectors).__name__)} of shape "
                    f"{getattr(vectors, 'shape', None)}"
                )
        lengths = {len(part) for part in (self.texts, self.vectors) if part is not None}
        if lengths in (set(), {0}):
            raise DataError("an index needs texts or vectors, at least one row")
        if len(lengths) > 1:
            raise DataError(
                f"texts and vectors must be of one length, got {len(self.texts or ())} and "
                f"{0 if self.vectors is None else len(self.vectors)}"
            )
        n = lengths.pop()
        ids = tuple(map(str, self.ids)) or tuple(map(str, range(n)))
        object.__setattr__(self, "ids", ids)
        if len(ids) != n:
            raise DataError(f"ids must be {n}, one per row, got {len(ids)}")
        if len(set(ids)) < n:
            seen: set[str] = set()
            twice = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
            raise DataError(f"ids must be distinct, {twice!r} occurs twice")

    def __len__(self) -> int:
        return len(self.ids)


def read_index(
    path: str | Path,
    *,
    text_column: str | None = None,
    vector_column: str | None = None,
    id_column: str | None = None,
    texts: Sequence[str] | None = None,
) -> StoredIndex:
    r"""Read an index from a file.

    Parameters
    ----------
    path
        ``.npy`` (vectors, memory-mapped; nothing is unpickled), ``.parquet`` or a folder of such
        shards (any of texts, vectors as lists of numbers, ids), ``.jsonl``, ``.json``, ``.csv`` or
        ``.tsv`` (the same; in a cell of text a vector is a JSON list), a folder that ``datasets``
        has saved, or ``.txt`` (a text per line).
    text_column, vector_column, id_column
        Names of columns; by default the usual ones (``text``, ``vector``, ``embedding``, ``id`` and
        the like).
    texts
        The texts that belong to the rows of a ``.npy`` file.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If the file is missing, of another kind, or has neither texts nor vectors.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "documents.txt"
    >>> _ = path.write_text("first document\nsecond document\n")
    >>> read_index(path).texts
    ('first document', 'second document')
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise DataError(f"there is no {source}")
    kind = source.suffix.lower()
    if kind == ".npy":
        try:
            vectors = np.load(source, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise DataError(f"{source} is no readable .npy file of numbers: {error}") from error
        return StoredIndex(None if texts is None else tuple(texts), vectors)
    if texts is not None:
        raise DataError(f"texts are only for .npy files, {source.name} holds its own")
    if kind == ".txt":
        return StoredIndex(tuple(read_lines(source)))
    if source.is_file() and kind not in _KINDS:
        raise DataError(f"{source}: an index is one of {', '.join(_KINDS)}, got {kind!r}")
    names = (text_column, vector_column, id_column)
    shards = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if shards and shards[0].suffix.lower() == ".parquet":
        columns = _joined(source, [_parquet_columns(shard, *names) for shard in shards])
    else:
        columns = _row_columns(source, *names)
    found_texts, found_vectors, ids = columns
    if found_texts is None and found_vectors is None:
        raise DataError(
            f"{source} has no column of texts ({', '.join(_TEXT_NAMES)}) and none of vectors "
            f"({', '.join(_VECTOR_NAMES)}): name one with text_column or vector_column, or "
            "--column text=NAME or vector=NAME on the command line"
        )
    return StoredIndex(found_texts, found_vectors, ids or ())


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank, without spaces around them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    # Not splitlines, which also splits where a text has a page break or a line separator in it.
    return [line.strip() for line in text.split("\n") if line.strip()]


# The answer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UpgradeOption:
    """One way to answer queries after the upgrade.

    Parameters
    ----------
    name, what
        Its name, and what it means in a sentence.
    per_query
        By measure, float64 ``(n_queries,)``.
    texts_to_embed
        Documents of the whole index that the new model has to embed for it.
    seconds_to_embed
        How long that takes here, from the time that a sample took; None if vectors were given.
    fit_seconds
        To fit an adapter, without embedding.
    adapter
        The fitted adapter, where there is one.
    """

    name: str
    what: str
    per_query: Mapping[str, Units]
    texts_to_embed: int
    seconds_to_embed: float | None
    fit_seconds: float = 0.0
    adapter: Adapter | None = None


@dataclass(frozen=True, eq=False)
class UpgradeResult:
    """What `evaluate_upgrade` found.

    Parameters
    ----------
    options
        By name, in the order of their cost.
    unavailable
        Options that cannot be tried, with the reason.
    measures
        What was measured; the first is the one to decide by.
    n_queries, n_documents, n_index
        Queries; documents that were searched (a sample or all); documents of the index.
    query_seconds
        Seconds to embed one query, by ``"old"`` and ``"new"``, where a model did it here.
    notes
        Sentences to know before trusting the figures.
    """

    options: Mapping[str, UpgradeOption]
    unavailable: Mapping[str, str]
    measures: tuple[str, ...]
    n_queries: int
    n_documents: int
    n_index: int
    query_seconds: Mapping[str, float]
    notes: tuple[str, ...]

    def scores(self, measure: str | None = None) -> dict[str, dict[str, Units]]:
        """Return the scores as ``bakeoff.study.compare`` takes them.

        The question "can re-indexing be skipped?" is then
        ``compare(result.scores(), reference="re-index", margin=0.02)["skip re-indexing"]``.
        """
        chosen = self.measures[0] if measure is None else measure
        if chosen not in self.measures:
            raise DataError(f"measure must be one of {list(self.measures)}, got {measure!r}")
        return {
            name: {chosen: option.per_query[chosen][None, :]}
            for name, option in self.options.items()
        }

    def describe(self) -> str:
        """Return a table of mean scores and costs as text."""
        width = max(len(name) for name in self.options)
        lines = [
            "".ljust(width)
            + "".join(f"  {name:>12}" for name in self.measures)
            + "   texts to embed   seconds"
        ]
        for name, option in self.options.items():
            means = "".join(f"  {option.per_query[m].mean():12.3f}" for m in self.measures)
            seconds = "?" if option.seconds_to_embed is None else f"{option.seconds_to_embed:.0f}"
            lines.append(f"{name:<{width}}{means}   {option.texts_to_embed:14,}   {seconds:>7}")
        lines += [f"{name}: not possible, {reason}" for name, reason in self.unavailable.items()]
        return "\n".join([*lines, *self.notes])


def evaluate_upgrade(
    old: Any,
    new: Any,
    index: StoredIndex | Sequence[str] | str | Path | None,
    queries: Sequence[str] | None,
    *,
    relevant: Sequence[Any] | None = None,
    k: int = 10,
    n_documents: int | None = None,
    n_pairs: int = 1000,
    adapters: Mapping[str, Adapter] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> UpgradeResult:
    """Answer queries in every way that is open when an encoder is replaced, and count the cost.

    Parameters
    ----------
    old, new
        Each one of: what `bakeoff.models.load_encoder` takes (code that comes
        with a model is never run); a SentenceTransformer; another object with ``encode``, or a
        function from a list of texts to vectors; a pair ``(query_vectors, document_vectors)`` with
        a row for each query and each document of the index. `old` may be None where the index has
        vectors: a model that can no longer be asked.
    index
        The documents: a `StoredIndex`, texts, or a file that `read_index` reads; None where `new`
        is a pair of vectors and so is `old`. Stored vectors are compared by cosine, whatever their
        length; without them `old` makes them, which counts as no cost.
    queries
        Texts; None where all vectors are given.
    relevant
        For each query the documents that answer it: an id (string) or a row number, or a collection
        of them. None if not known: each option is then judged by how far it retrieves what the new
        model retrieves after re-indexing, which says how much of the upgrade arrives, not how good
        it is.
    k
        How many documents a user looks at.
    n_documents
        Search only so many documents, all relevant ones and a random sample, instead of the whole
        index. Costs are extrapolated to all of it.
    n_pairs
        Documents that adapters are fitted on, embedded by both models: from outside of those
        searched where there are enough; else any that answer no query, unless that would leave
        fewer than half of what could be had.
    adapters
        By name; by default Procrustes and ridge.
    seed
        Of both samples.
    progress
        Called with (what is being embedded, texts done, texts in total).

    Returns
    -------
    UpgradeResult
        Measures with `relevant`: ``"mrr@k"`` (one over the rank of the first relevant document, 0
        beyond k), ``"ndcg@k"`` and ``"recall@k"`` (share of the relevant documents among the first
        k). Without: ``"agreement@k"`` (share of the new model's first k that are found). Options:
        ``"today"`` (old model, old index), ``"skip re-indexing"`` (new model, old index), one per
        adapter, ``"re-index"`` (new model, new vectors).

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If lengths or widths disagree, a vector has no direction, a relevant document
        is unknown, no option can be tried, or nothing can be judged by: no `relevant`, and no
        vectors of the documents by the new model or not more than `k` of them.

    Warns
    -----
    UserWarning
        If the old model does not reproduce the stored vectors of some documents, so that the index
        was built by another model or with another prompt, or is not in the order of its texts. It
        is a note of the result as well.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> meaning = rng.standard_normal((80, 8))
    >>> turned = meaning @ np.linalg.qr(rng.standard_normal((8, 8)))[0]  # the new model
    >>> result = evaluate_upgrade(
    ...     (meaning[:20], meaning[20:]), (turned[:20], turned[20:]), None, None, n_pairs=60
    ... )
    >>> {name: float(o.per_query["agreement@10"].mean()) for name, o in result.options.items()}[
    ...     "procrustes"
    ... ]
    1.0
    """
    if k < 1 or n_pairs < 2:
        raise DataError(f"k must be at least 1 and n_pairs at least 2, got {k} and {n_pairs}")
    stored, n_queries = _checked_index(old, new, index, queries)
    n_index = len(stored)
    answers = None if relevant is None else _answers(relevant, stored, n_queries)
    rng = np.random.default_rng(seed)
    searched = _searched(answers, n_index, n_documents, rng)
    notes: list[str] = []
    if len(searched) < n_index:
        notes.append(
            f"{len(searched):,} of {n_index:,} documents were searched (the relevant ones and a "
            "random sample): all options find more than in the whole index, and may differ less."
        )
    chosen = (
        {"procrustes": ProcrustesAdapter(), "ridge": RidgeAdapter()}
        if adapters is None
        else dict(adapters)
    )
    taken = {TODAY, SKIP, REINDEX} & set(chosen)
    if taken:
        raise DataError(f"adapters must not be named {sorted(taken)}")

    old_side = _Side("old", old, stored, progress)
    new_side = _Side("new", new, stored, progress)
    can_embed = new_side.given is not None or stored.texts is not None
    if answers is None and not can_embed:
        raise DataError(
            "nothing to judge by: give relevant documents, or texts of the index so that the new "
            "model can embed them"
        )
    if answers is None and len(searched) <= k:
        raise DataError(
            f"nothing to judge by: of {count(len(searched), 'document')} every way finds the same "
            f"first {k}; give relevant documents, a smaller k, or more documents"
        )
    # What may be wrong with the index is found before all its texts are embedded.
    notes += _notes_on_stored(old_side, stored, searched)
    old_queries = None if old is None else old_side.queries(queries, n_queries)
    old_documents = _old_documents(old_side, stored, searched)
    new_queries = new_side.queries(queries, n_queries)
    new_documents = new_side.documents(searched) if can_embed else None

    # What each option searches with and in.
    ways: dict[str, tuple[str, Vectors, Vectors, int, float]] = {}
    unavailable: dict[str, str] = {}
    fitted_adapters: dict[str, Adapter] = {}
    if new_documents is None:
        unavailable[REINDEX] = "the index has no texts to embed again"
    if old_queries is None:
        unavailable[TODAY] = "the old model is not there to embed queries"
    else:
        _same_width(old_queries, old_documents, "the old model's queries", "the stored vectors")
        ways[TODAY] = ("old model, old index", old_queries, old_documents, 0, 0.0)
    if new_queries.shape[1] == old_documents.shape[1]:
        ways[SKIP] = ("new model, old index", new_queries, old_documents, 0, 0.0)
    else:
        unavailable[SKIP] = (
            f"the new model's vectors have width {new_queries.shape[1]}, the stored ones "
            f"{old_documents.shape[1]}"
        )
    if chosen and can_embed:
        pairs, why = _pairs(searched, answers, n_index, n_pairs, rng)
        notes += why
        pairs_new, pairs_old = new_side.documents(pairs), _old_documents(old_side, stored, pairs)
        if len(pairs) < new_queries.shape[1]:
            notes.append(
                f"Adapters were fitted on {count(len(pairs), 'document')} only, fewer than the "
                f"{new_queries.shape[1]} dimensions of the new vectors."
            )
        for name, adapter in chosen.items():
            start = time.perf_counter()
            fitted = _fresh(adapter).fit(pairs_new, pairs_old)
            seconds = time.perf_counter() - start
            fitted_adapters[name] = fitted
            mapped = unit_vectors(f"adapter {name!r}", fitted.transform(new_queries), n_queries)
            ways[name] = (
                f"new model through an adapter fitted on {count(len(pairs), 'document')}",
                mapped,
                old_documents,
                len(pairs),
                seconds,
            )
    elif chosen:
        unavailable |= dict.fromkeys(chosen, "the index has no texts to embed with the new model")
    if new_documents is not None:
        ways[REINDEX] = ("new model, everything embedded again", new_queries, new_documents, 0, 0.0)
    if not ways:
        raise DataError(f"no option can be tried: {unavailable}")

    judge = _Judge(answers, searched, k, new_queries, new_documents)
    options = {}
    for name, (what, query_vectors, documents, n_texts, seconds) in ways.items():
        n_texts = n_index if name == REINDEX else n_texts
        rate = new_side.seconds_per_text
        options[name] = UpgradeOption(
            name=name,
            what=what,
            per_query=judge(query_vectors, documents),
            texts_to_embed=n_texts,
            seconds_to_embed=0.0 if not n_texts else None if rate is None else rate * n_texts,
            fit_seconds=seconds,
            adapter=fitted_adapters.get(name),
        )
    if answers is None:
        notes.append(
            f"Without relevant documents, options are judged by the new model's own first {k} "
            "after re-indexing: 1 by definition there, and no statement about quality."
        )
    notes += [*old_side.notes(n_queries), *new_side.notes(n_queries)]
    return UpgradeResult(
        options=options,
        unavailable=unavailable,
        measures=judge.measures,
        n_queries=n_queries,
        n_documents=len(searched),
        n_index=n_index,
        query_seconds={
            side.name: side.seconds_per_query
            for side in (old_side, new_side)
            if side.seconds_per_query is not None
        },
        notes=tuple(notes),
    )


# Models -------------------------------------------------------------------------------------------


class _Side:
    """The old or the new model: embeds queries and documents, each document once, with a clock."""

    def __init__(
        self, name: str, model: Any, index: StoredIndex, progress: Progress | None
    ) -> None:
        self.name = name
        self.index = index
        self.given: tuple[Any, Any] | None = None
        self.seconds_per_query: float | None = None
        self._progress = progress
        self._embed: Callable[[Sequence[str], Role], Any] | None = None
        self._rows: dict[int, int] = {}
        self._known: list[Vectors] = []
        self._seconds = 0.0
        self._cut: dict[Role, int] = {"query": 0, "document": 0}
        self._window: int | None = None
        if isinstance(model, tuple):
            if len(model) != 2:
                raise DataError(f"{name} must be (query_vectors, document_vectors)")
            self.given = model
        elif model is not None:
            self._embed = self._embedder(model)

    @property
    def seconds_per_text(self) -> float | None:
        """Seconds for one document, or None if none was embedded here."""
        return self._seconds / len(self._rows) if self._rows else None

    @property
    def can_embed(self) -> bool:
        """Whether this side embeds texts."""
        return self._embed is not None

    def queries(self, queries: Sequence[str] | None, n: int) -> Vectors:
        if self.given is not None:
            return unit_vectors(f"query vectors of {self.name}", self.given[0], n)
        if queries is None or self._embed is None:
            raise DataError(f"queries must be given as texts for the {self.name} model")
        start = time.perf_counter()
        vectors = self._embed(queries, "query")
        self.seconds_per_query = (time.perf_counter() - start) / n
        return unit_vectors(f"query vectors of {self.name}", vectors, n)

    def documents(self, rows: NDArray[np.int64]) -> Vectors:
        if self.given is not None:
            return unit_vectors(
                f"document vectors of {self.name}", np.asarray(self.given[1])[rows], numbers=rows
            )
        if self.index.texts is None or self._embed is None:
            raise DataError(f"the index has no texts for the {self.name} model to embed")
        missing = [row for row in rows.tolist() if row not in self._rows]
        if missing:
            start = time.perf_counter()
            vectors = self._embed([self.index.texts[row] for row in missing], "document")
            self._seconds += time.perf_counter() - start
            name = f"document vectors of {self.name}"
            self._known.append(unit_vectors(name, vectors, len(missing), numbers=np.array(missing)))
            for row in missing:
                self._rows[row] = len(self._rows)
        if len(self._known) > 1:
            self._known = [np.concatenate(self._known)]
        return np.asarray(self._known[0][[self._rows[row] for row in rows.tolist()]])

    def notes(self, n_queries: int) -> list[str]:
        """Return sentences about texts that did not fit into the model's window."""
        parts: dict[Role, str] = {
            "query": count(n_queries, "query", "queries"),
            "document": count(len(self._rows), "document"),
        }
        return [
            f"{self._cut[role]:,} of {what} are longer than the {self.name} model's "
            f"{self._window} tokens; what is beyond was cut off."
            for role, what in parts.items()
            if self._cut[role]
        ]

    def _embedder(self, model: Any) -> Callable[[Sequence[str], Role], Any]:
        from bakeoff.models import TextEncoder, load_encoder

        if isinstance(model, TextEncoder):
            model = model.model
        elif isinstance(model, str | Path):
            model = load_encoder(model)
        if hasattr(model, "encode") and hasattr(model, "preprocess") and not _routes(model):
            return lambda texts, role: self._encode(model, texts, role)
        if hasattr(model, "encode_query") and hasattr(model, "encode_document"):
            return lambda texts, role: (
                model.encode_query(list(texts))
                if role == "query"
                else model.encode_document(list(texts))
            )
        if hasattr(model, "encode"):
            return lambda texts, role: model.encode(list(texts))
        if callable(model):
            return lambda texts, role: model(list(texts))
        raise DataError(
            f"{self.name} must be a model's name, an object with encode, a function or a pair of "
            f"vector arrays, got {type(model).__name__}"
        )

    def _encode(self, model: SentenceTransformer, texts: Sequence[str], role: Role) -> Vectors:
        from bakeoff.models import encode

        # The names that sentence-transformers' encode_query and encode_document look for.
        wanted = ("query",) if role == "query" else ("document", "passage", "corpus")
        prompts = model.prompts or {}
        what = f"{'queries' if role == 'query' else 'documents'} by the {self.name} model"

        def note_cut(cut: list[int]) -> None:
            self._cut[role] += len(cut)
            self._window = model.max_seq_length

        return encode(
            model,
            list(texts),
            prompt_name=next((one for one in wanted if prompts.get(one)), None),
            on_truncated=note_cut,
            progress=lambda done, total: self._progress and self._progress(what, done, total),
        )


def _routes(model: Any) -> bool:
    """Tell whether a SentenceTransformer has modules of their own for queries and documents."""
    from sentence_transformers.base.modules import Router

    return any(isinstance(module, Router) for module in model.modules())


def _old_documents(side: _Side, index: StoredIndex, rows: NDArray[np.int64]) -> Vectors:
    if index.vectors is not None:
        return unit_vectors("the stored vectors", np.asarray(index.vectors[rows]), numbers=rows)
    return side.documents(rows)


def _notes_on_stored(side: _Side, index: StoredIndex, rows: NDArray[np.int64]) -> list[str]:
    """Return what is odd about the stored vectors; warn if the old model does not give them."""
    if index.vectors is None:
        return []
    notes = []
    lengths = np.linalg.norm(np.asarray(index.vectors[rows], dtype=np.float64), axis=1)
    if lengths.std() > _ONE_LENGTH * lengths.mean():
        notes.append(
            f"The stored vectors differ in length ({lengths.min():.3g} to {lengths.max():.3g}) and "
            "are compared by cosine; a service that searches by inner product ranks otherwise."
        )
    if index.texts is None or not side.can_embed:
        return notes
    probe = rows[:: max(1, len(rows) // _CHECKED_TEXTS)][:_CHECKED_TEXTS]
    stored = _old_documents(side, index, probe)
    made = side.documents(probe)
    _same_width(made, stored, "the old model's vectors", "the stored vectors")
    cosine = float(np.einsum("nd,nd->n", made, stored).mean())
    if cosine < _SAME_MODEL:
        notes.append(
            f"The old model does not reproduce the stored vectors (mean cosine {cosine:.2f} over "
            f"{count(len(probe), 'document')}): the index was built by another model or with a "
            "prompt, or its vectors are not in the order of its texts."
        )
        warnings.warn(notes[-1], stacklevel=3)
    return notes


# Judging ------------------------------------------------------------------------------------------


class _Judge:
    """Scores ranked documents against known answers, or against the new model's own."""

    def __init__(
        self,
        answers: list[NDArray[np.int64]] | None,
        searched: NDArray[np.int64],
        k: int,
        new_queries: Vectors,
        new_documents: Vectors | None,
    ) -> None:
        self.k = min(k, len(searched))
        if answers is not None:
            place = np.full(int(searched.max()) + 1, -1)
            place[searched] = np.arange(len(searched))
            self.answers = [place[rows] for rows in answers]
            self.measures: tuple[str, ...] = (f"mrr@{k}", f"ndcg@{k}", f"recall@{k}")
        else:
            assert new_documents is not None
            self.answers = _nearest(new_queries, new_documents, self.k)
            self.measures = (f"agreement@{k}",)

    def __call__(self, queries: Vectors, documents: Vectors) -> dict[str, Units]:
        units = {measure: np.empty(len(queries)) for measure in self.measures}
        if len(self.measures) == 1:
            found = _nearest(queries, documents, self.k)
            units[self.measures[0]][:] = [
                len(np.intersect1d(one, other)) / self.k
                for one, other in zip(found, self.answers, strict=True)
            ]
            return units
        discounts = 1 / np.log2(np.arange(2, self.k + 2))
        for start, similarity in _similarities(queries, documents):
            for offset, row in enumerate(similarity):
                answer = self.answers[start + offset]
                ranks = ranks_among(row[answer], np.delete(row, answer))
                seen = ranks[ranks <= self.k]
                gain = discounts[seen - 1].sum() / discounts[: len(ranks)].sum()
                values = (1 / ranks[0] if len(seen) else 0.0, gain, len(seen) / len(ranks))
                for measure, value in zip(self.measures, values, strict=True):
                    units[measure][start + offset] = value
        return units


def _nearest(queries: Vectors, documents: Vectors, k: int) -> list[NDArray[np.int64]]:
    found: list[NDArray[np.int64]] = []
    for _, similarity in _similarities(queries, documents):
        top = np.argpartition(-similarity, min(k, similarity.shape[1] - 1), axis=1)[:, :k]
        found += list(top)
    return found


def _similarities(queries: Vectors, documents: Vectors) -> Iterable[tuple[int, Vectors]]:
    size = max(1, _BLOCK_ENTRIES // len(documents))
    for start in range(0, len(queries), size):
        yield start, queries[start : start + size] @ documents.T


# Checks and samples -------------------------------------------------------------------------------


def _checked_index(old: Any, new: Any, index: Any, queries: Any) -> tuple[StoredIndex, int]:
    if isinstance(index, str | Path):
        index = read_index(index)
    elif index is None:
        for side in (old, new):
            if not isinstance(side, tuple):
                raise DataError("index may be None only where old and new are pairs of vectors")
        index = StoredIndex(vectors=np.asarray(old[1], dtype=np.float32))
    elif not isinstance(index, StoredIndex):
        index = StoredIndex(tuple(index))
    for name, side in (("old", old), ("new", new)):
        if isinstance(side, tuple) and len(side) == 2 and len(side[1]) != len(index):
            raise DataError(
                f"document vectors of {name} must be {len(index)}, one per document of the index, "
                f"got {len(side[1])}"
            )
    if new is None:
        raise DataError("new must be a model or a pair of vectors, got None")
    if old is None and index.vectors is None:
        raise DataError("old may be None only where the index has vectors")
    if isinstance(queries, str):
        raise DataError("queries must be a sequence of texts, got one string")
    lengths = {
        f"vectors by {name}": len(side[0])
        for name, side in (("old", old), ("new", new))
        if isinstance(side, tuple) and len(side) == 2
    }
    if queries is not None:
        lengths["texts"] = len(queries)
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        found = ", ".join(f"{n} {what}" for what, n in lengths.items()) or "none"
        raise DataError(f"queries must be texts or vectors of one number above 0, got {found}")
    return index, next(iter(lengths.values()))


def _answers(
    relevant: Sequence[Any], index: StoredIndex, n_queries: int
) -> list[NDArray[np.int64]]:
    if len(relevant) != n_queries:
        raise DataError(
            f"relevant must have one entry per query, got {len(relevant)} for {n_queries} queries"
        )
    row_of: dict[Any, int] = {name: row for row, name in enumerate(index.ids)}
    answers = []
    for query, entry in enumerate(relevant):
        several = isinstance(entry, Collection | np.ndarray) and not isinstance(entry, str)
        rows = set()
        for one in entry if several else (entry,):
            whole = isinstance(one, int | np.integer) and not isinstance(one, bool)
            row = int(one) if whole else row_of.get(one, -1)
            if not 0 <= row < len(index):
                raise DataError(
                    f"relevant: query {query} names {one!r}, which is no id and no row of the "
                    f"index of {len(index)} documents"
                )
            rows.add(row)
        if not rows:
            raise DataError(f"relevant: query {query} has no document; leave such queries out")
        answers.append(np.array(sorted(rows), dtype=np.int64))
    return answers


def _searched(
    answers: list[NDArray[np.int64]] | None,
    n_index: int,
    n_documents: int | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    if n_documents is None or n_documents >= n_index:
        return np.arange(n_index)
    needed = np.unique(np.concatenate(answers)) if answers else np.zeros(0, dtype=np.int64)
    if n_documents < max(2, len(needed)):
        raise DataError(
            f"n_documents must be at least 2 and hold the {len(needed)} relevant documents, got "
            f"{n_documents}"
        )
    others = np.setdiff1d(np.arange(n_index), needed)
    drawn = rng.choice(others, n_documents - len(needed), replace=False)
    return np.sort(np.concatenate([needed, drawn]))


def _pairs(
    searched: NDArray[np.int64],
    answers: list[NDArray[np.int64]] | None,
    n_index: int,
    n_pairs: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], list[str]]:
    """Return documents to fit adapters on, and what to know of them."""
    everything = np.arange(n_index)
    outside = np.setdiff1d(everything, searched)
    if len(outside) >= n_pairs:
        return rng.choice(outside, n_pairs, replace=False), []
    pool, about = everything, "those that answer queries among them"
    if answers is None:
        about = "as the index of a service would be"
    else:
        unjudged = np.setdiff1d(everything, np.concatenate(answers))
        if 2 * len(unjudged) >= min(n_pairs, n_index):
            pool, about = unjudged, "none that answers a query among them"
    rows = rng.choice(pool, min(n_pairs, len(pool)), replace=False)
    return rows, [
        f"Adapters were fitted on {count(len(rows), 'document')}, {np.isin(rows, searched).sum():,}"
        f" of which are searched too, {about}."
    ]


def _fresh(adapter: Adapter) -> Any:
    from sklearn.base import clone

    return clone(adapter) if hasattr(adapter, "get_params") else adapter


def _same_width(one: Vectors, other: Vectors, name: str, other_name: str) -> None:
    if one.shape[1] != other.shape[1]:
        raise DataError(
            f"{name} have width {one.shape[1]}, {other_name} {other.shape[1]}: the index was built "
            "by another model"
        )


# Files --------------------------------------------------------------------------------------------

_Columns = tuple[tuple[str, ...] | None, NDArray[Any] | None, tuple[str, ...] | None]


def _column(
    found: Collection[str], asked: str | None, usual: Sequence[str], path: Path
) -> str | None:
    if asked is not None and asked not in found:
        raise DataError(f"{path} has no column {asked!r}, it has {sorted(found)}")
    by_lower = {name.lower(): name for name in found}
    return asked or next((by_lower[name] for name in usual if name in by_lower), None)


def _parquet_columns(
    path: Path, text_column: str | None, vector_column: str | None, id_column: str | None
) -> _Columns:
    import pyarrow.compute
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
    found = file.schema_arrow.names
    text = _column(found, text_column, _TEXT_NAMES, path)
    vector = _column(found, vector_column, _VECTOR_NAMES, path)
    name = _column(found, id_column, _ID_NAMES, path)
    texts: list[Any] = []
    ids: list[Any] = []
    blocks: list[NDArray[Any]] = []
    columns = [one for one in (text, vector, name) if one is not None]
    for batch in file.iter_batches(columns=columns) if columns else ():
        if text is not None:
            texts += batch.column(text).to_pylist()
        if name is not None:
            ids += batch.column(name).to_pylist()
        if vector is not None and len(batch):
            # flatten() of a sliced list array gives the slice's values only.
            column = batch.column(vector)
            if not hasattr(column, "flatten") or column.null_count:
                raise DataError(f"{path}: column {vector!r} must hold lists of numbers, no nulls")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            lengths = set(pyarrow.compute.list_value_length(column).to_pylist())
            if len(lengths) > 1 or flat.dtype.kind not in "fiu":
                raise DataError(
                    f"{path}: column {vector!r} must hold lists of numbers of one length"
                )
            blocks.append(flat.reshape(len(batch), -1).astype(np.float32, copy=False))
    vectors = _stacked(path, vector, blocks)
    return (
        _texts(path, texts) if text is not None else None,
        vectors,
        _ids(path, name, ids, [f"row {number}" for number in range(1, 1 + len(ids))]),
    )


def _joined(path: Path, parts: Sequence[_Columns]) -> _Columns:
    """Return the columns of all shards, one after the other."""
    if len({tuple(column is None for column in part) for part in parts}) > 1:
        raise DataError(f"{path}: shards differ in their columns of texts, vectors or ids")
    texts, vectors, ids = zip(*parts, strict=True)
    return (
        None if texts[0] is None else tuple(chain.from_iterable(texts)),
        None if vectors[0] is None else _stacked(path, "vectors", list(vectors)),
        None if ids[0] is None else tuple(chain.from_iterable(ids)),
    )


def _row_columns(
    path: Path, text_column: str | None, vector_column: str | None, id_column: str | None
) -> _Columns:
    rows = list(iterate_rows(path))
    if not rows:
        raise DataError(f"{path}: the file has no row")
    found = list(dict.fromkeys(name for row in rows for name in row.values))
    text = _column(found, text_column, _TEXT_NAMES, path)
    vector = _column(found, vector_column, _VECTOR_NAMES, path)
    name = _column(found, id_column, _ID_NAMES, path)
    vectors = None
    if vector is not None:
        try:
            blocks = [np.array([_numbers(row, vector) for row in rows], dtype=np.float32)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: column {vector!r} must hold lists of numbers of one length"
            ) from error
        vectors = _stacked(path, vector, blocks)
    return (
        _texts(path, [row.values.get(text) for row in rows]) if text is not None else None,
        vectors,
        _ids(path, name, [row.values.get(name) for row in rows], [row.place for row in rows])
        if name is not None
        else None,
    )


def _numbers(row: Row, column: str) -> Any:
    """Return a vector as a list; in formats that hold text alone it is written as JSON."""
    cell = row.values[column]
    return json.loads(cell) if isinstance(cell, str) else cell


def _ids(
    path: Path, column: str | None, cells: Sequence[Any], places: Sequence[str]
) -> tuple[str, ...] | None:
    if column is None:
        return None
    for cell, place in zip(cells, places, strict=True):
        if cell is None or cell == "":
            raise DataError(
                f"{path}, {place}: no id in column {column!r}; every document needs one, or name "
                "another column"
            )
    return tuple(map(str, cells))


def _stacked(path: Path, column: str | None, blocks: list[NDArray[Any]]) -> NDArray[Any] | None:
    if column is None:
        return None
    if not blocks or len({block.shape[1:] for block in blocks}) > 1 or blocks[0].ndim != 2:
        raise DataError(f"{path}: column {column!r} must hold lists of numbers of one length")
    return np.concatenate(blocks)


def _texts(path: Path, cells: Sequence[Any]) -> tuple[str, ...]:
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise DataError(f"{path}: the text of row {row} must be a string, got {cell!r}")
    return tuple(cells)
