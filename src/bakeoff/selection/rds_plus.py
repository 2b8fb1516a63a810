"""RDS+: training data nearest to query samples, by a language model's position-weighted states."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.data.neighbours import unit_rows
from bakeoff.data.samples import Sample
from bakeoff.data.vector_store import VectorStore
from bakeoff.errors import DataError, ModelError
from bakeoff.selection.query_selection import Strategy, reasons_of, select_by_queries
from bakeoff.selection.selector import Selector

if TYPE_CHECKING:
    import torch

METHOD = {
    "slug": "rds-plus",
    "title": "Training data nearest to query samples, by position-weighted hidden states",
    "paper": "Ivison et al., Large-Scale Data Selection for Instruction Tuning, 2025, "
    "arXiv 2503.01807",
    "designs": ["rds-plus"],
    "names": ["RepresentationSelector", "NearestToQueries", "round_robin"],
}

Pooling = Literal["weighted_mean", "mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("weighted_mean", "mean", "last")
Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``{"role": "system" | "user" | "assistant", "content": str}`` per turn."""

_ROLES = ("system", "user", "assistant")
# Texts tokenized and sorted by length together: enough that batches hold texts of one length.
_TEXTS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class SelectionResult:
    """What was selected from a pool for some queries.

    Parameters
    ----------
    indices
        int64 array ``(n,)``, rows of the pool in pick order, all different.
    scores
        float32 array ``(n,)``: each pick's cosine to the query or group whose turn it was (the
        highest cosine for ``global_max``, the mean one for ``mean``).
    query_of_each
        int64 array ``(n,)``: the query each pick is nearest to, or that picked it.
    source_counts
        How many picks came from each source; empty where sources are not known.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    query_of_each: NDArray[np.int64]
    source_counts: dict[str, int] = field(default_factory=dict)


def tulu_text(messages: Messages, eos: str = "") -> str:
    r"""Return a conversation as one text in the Tulu chat format.

    Parameters
    ----------
    messages
        The turns.
    eos
        The tokenizer's end-of-text token, which follows every answer.

    Raises
    ------
    DataError
        If there is no turn, a role is unknown or a content is no string.

    Examples
    --------
    >>> turns = [{"role": "user", "content": " Two? "}, {"role": "assistant", "content": "Yes."}]
    >>> tulu_text(turns, "</s>")
    '<|user|>\nTwo?\n<|assistant|>\nYes.</s>'
    """
    parts = []
    for turn in _checked_messages(messages):
        end = eos if turn["role"] == "assistant" else ""
        parts.append(f"<|{turn['role']}|>\n{turn['content'].strip()}{end}\n")
    return "".join(parts).strip()


def pool_states(
    states: torch.Tensor, mask: torch.Tensor, pooling: Pooling = "weighted_mean"
) -> torch.Tensor:
    """Return one vector per text from the states of its tokens.

    Parameters
    ----------
    states
        ``(B, T, d)`` in any dtype.
    mask
        ``(B, T)``, nonzero where there is a token; padding may be on either side.
    pooling
        ``"weighted_mean"``: token i of L, counted from 1 without padding, weighs
        ``2 i / (L (L + 1))``, because under a causal mask only late tokens have read the text;
        ``"mean"``: all weigh the same; ``"last"``: the last token's state.

    Returns
    -------
    float32 tensor of shape (B, d)
        Not normalised.

    Raises
    ------
    DataError
        If `pooling` is unknown or a text has no token.

    Examples
    --------
    >>> import torch
    >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    >>> pool_states(states, torch.ones(1, 3))
    tensor([[1.1667, 1.3333]])
    """
    _check_pooling(pooling)
    kept = (mask != 0).long()
    if not bool(kept.any(dim=1).all()):
        row = int((~kept.any(dim=1)).nonzero()[0, 0])
        raise DataError(f"mask must keep at least one token of each text, row {row} has none")
    positions = kept.cumsum(dim=1) * kept
    if pooling == "weighted_mean":
        weights = positions.float()
    elif pooling == "mean":
        weights = kept.float()
    else:
        weights = (positions == positions.amax(dim=1, keepdim=True)).float()
    weights = weights / weights.sum(dim=1, keepdim=True)
    # Padding may hold anything, NaN included, which a weight of zero would not silence.
    clean = states.float().masked_fill(kept[:, :, None] == 0, 0.0)
    pooled: torch.Tensor = (weights[:, None, :] @ clean)[:, 0]
    return pooled


class RepresentationSelector(Selector):
    """Selects training samples whose representations are nearest to those of query samples (RDS+).

    Every sample, prompt and response together, is read once by a frozen language model; its vector
    is the position-weighted mean of the last hidden states, at length 1. Queries, a few samples of
    what the trained model shall be good at, then take turns at picking the pool sample with the
    highest cosine.

    Parameters
    ----------
    model
        What `bakeoff.models.load` takes (a packaged name, a folder, a hub id), a loaded
        `BaseModel` or `LanguageModel`, or a transformers model.
    tokenizer
        For a transformers model, its tokenizer; else None.
    pooling
        ``"weighted_mean"`` (the method), ``"mean"`` or ``"last"``; see `pool_states`.
    layer
        Which hidden states, in the order of transformers' ``output_hidden_states``; -1 is the last
        one, after the final norm.
    max_length
        Tokens read of each sample, at most the model's own window; the rest is cut off.
    batch_tokens
        Most tokens in a batch, padding included. Changes vectors by rounding only.
    dtype
        Precision in which a model is loaded; pooling is in float32 whatever it is.
    template
        How conversations become text: None for the Tulu format, ``"chat"`` for the tokenizer's own
        template, or a Jinja template. Plain texts are read as they are.
    n_select
        How many samples `fit` picks.
    strategy
        ``"round_robin"`` (the method), ``"global_max"`` or ``"mean"``; see
        `bakeoff.selection.query_selection`.
    device
        Where a model is loaded to.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        Rows of the pool in pick order.
    scores_, query_of_each_ : arrays of shape (n_select,)
        As in `SelectionResult`.
    source_counts_ : dict
        How many picks came from each source, where samples say.
    index_ : VectorStore
        The pool's vectors on disk, after `build_index` or `use_index`.

    Notes
    -----
    Pool and queries may be texts, `bakeoff.data.samples.Sample` records (context and instruction
    become the user's turn, the response the assistant's) or conversations.

    Departures from the authors' code: weights are computed from the attention mask, so that
    batches are allowed; in float32, where theirs are in bfloat16; selection is streamed. The
    paper's Algorithm 1 can pick a row twice; here, as in the code, it cannot. Queries are formatted
    like the pool (the code tokenizes the answers of question-answering queries separately).

    References
    ----------
    Hamish Ivison, Muru Zhang, Faeze Brahman, Pang Wei Koh and Pradeep Dasigi. "Large-Scale Data
    Selection for Instruction Tuning". 2025. arXiv:2503.01807.

    Examples
    --------
    >>> selector = RepresentationSelector("smollm2-135m", n_select=2)  # doctest: +SKIP
    >>> selector.fit(pool, queries=["def add(a, b):"]).selected_indices_  # doctest: +SKIP
    array([17,  4])
    """

    scores_: NDArray[np.float32]
    query_of_each_: NDArray[np.int64]
    source_counts_: dict[str, int]
    index_: VectorStore

    def __init__(
        self,
        model: Any = "smollm2-135m",
        tokenizer: Any = None,
        pooling: Pooling = "weighted_mean",
        layer: int = -1,
        max_length: int = 2048,
        batch_tokens: int = 4096,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        template: str | None = None,
        n_select: int = 100,
        strategy: Strategy = "round_robin",
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.layer = layer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.template = template
        self.n_select = n_select
        self.strategy = strategy
        self.device = device

    def __sklearn_clone__(self) -> Self:
        # sklearn would copy a model's weights; a clone shares them, and what is loaded already.
        copy = type(self)(**self.get_params(deep=False))
        if "_reader" in self.__dict__:
            copy._reader = self._reader
        return copy

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_reader", None)
        return state

    # Vectors --------------------------------------------------------------------------------------

    def text_of(self, item: str | Sample | Messages) -> str:
        """Return what the model reads for one sample.

        Raises
        ------
        DataError
            If it is empty, or no text, Sample or conversation.
        """
        if isinstance(item, Sample):
            prompt = "\n\n".join(part for part in (item.context, item.instruction) if part)
            if not prompt:
                text = item.response
            else:
                text = self._conversation(
                    [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": item.response},
                    ]
                )
        elif isinstance(item, str):
            text = item
        elif isinstance(item, Sequence):
            text = self._conversation(cast("Messages", item))
        else:
            raise DataError(
                "a sample must be a text, a Sample or a list of messages, got "
                f"{type(item).__name__}"
            )
        if not text.strip():
            raise DataError("a sample must have at least one token, got an empty text")
        return text

    def embed(
        self,
        items: Iterable[str | Sample | Messages],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Return one vector of length 1 per sample.

        Parameters
        ----------
        items
            Texts, Samples or conversations.
        progress
            Called with (samples read, samples in total).

        Returns
        -------
        float32 array of shape (n, d)
            Independent of batches and padding up to rounding.

        Raises
        ------
        DataError
            If there is none, one is empty, not of a known kind, or its vector is not finite (names
            it), or a parameter is out of range.
        ModelError
            If the model cannot be loaded or has no hidden states.
        """
        if isinstance(items, str):
            raise DataError("items must be a sequence of samples, got one string")
        return self._embed_texts(list(self._texts(items, "items")), progress)

    def embed_poolings(
        self,
        items: Iterable[str | Sample | Messages],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Return the vectors of every pooling in `POOLINGS`, from one pass over the samples.

        Parameters
        ----------
        items, progress
            As for `embed`.

        Returns
        -------
        float32 array of shape (n, 3, d)
            ``[:, i]`` is what `embed` returns with pooling ``POOLINGS[i]``.
        """
        texts = list(self._texts(items, "items"))
        wide = self._embed_texts(texts, progress, poolings=POOLINGS)
        return wide.reshape(len(texts), len(POOLINGS), -1)

    def fingerprint(self) -> dict[str, Any]:
        """Return what vectors depend on beside the texts: what `build_index` stores."""
        _check_pooling(self.pooling)
        reader = self._ready()
        return {
            "model": reader.fingerprint(),
            "layer": reader.layer_number(self.layer),
            "pooling": self.pooling,
            "max_length": reader.limit(self.max_length),
            "template": self.template or "tulu",
        }

    def build_index(
        self,
        pool: Sequence[str | Sample | Messages] | Callable[[], Iterable[str | Sample | Messages]],
        path: str | Path,
        *,
        rows_per_shard: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> VectorStore:
        """Embed a pool into a folder, or go on where an earlier call was stopped.

        Parameters
        ----------
        pool
            A sequence of samples, or a function that returns a fresh iterator over them, so that
            the pool may exceed memory.
        path
            The folder.
        rows_per_shard
            Samples read between two writes: what a killed call loses at most.
        progress
            Called with (samples done, samples in total, or 0 where that is not known).

        Returns
        -------
        VectorStore
            Also kept as ``index_``, for `score` and `select_for`.

        Raises
        ------
        DataError
            As `embed`; or if the folder was built from another pool, or with another model, layer,
            pooling, length or template (says which).
        StoreError
            If another process is building there.
        """
        if isinstance(pool, str):
            raise DataError("pool must be a sequence of samples or a function, got one string")
        total = 0 if callable(pool) else len(pool)
        done = 0

        def texts() -> Iterator[str]:
            return self._texts(pool() if callable(pool) else pool, "pool")

        def step(rows: int, _: int) -> None:
            nonlocal done
            done = rows
            if progress is not None:
                progress(rows, total)

        def within(rows: int, _: int) -> None:
            if progress is not None:
                progress(done + rows, total)

        self.index_ = VectorStore.build(
            path,
            texts,
            lambda chunk: self._embed_texts(chunk, within, first=done),
            fingerprint=self.fingerprint(),
            rows_per_shard=rows_per_shard,
            progress=step,
        )
        return self.index_

    def use_index(self, index: str | Path | VectorStore) -> Self:
        """Use vectors that `build_index` made earlier.

        Raises
        ------
        DataError
            If they were made with another model, layer, pooling, length or template (says which).
        StoreError
            If the index is unfinished or damaged.
        """
        path = index.path if isinstance(index, VectorStore) else index
        self.index_ = VectorStore.open(path, self.fingerprint())
        return self

    # Selection ------------------------------------------------------------------------------------

    def score(self, queries: Sequence[str | Sample | Messages]) -> NDArray[np.float32]:
        """Return the cosine of every query and every row of the index, held in memory.

        Returns
        -------
        float32 array of shape (Q, N)

        Raises
        ------
        DataError
            If there is no index or no query.
        """
        index = self._built_index()
        vectors = self._query_vectors(queries)
        scores = np.empty((len(vectors), len(index)), dtype=np.float32)
        for start, block in index.blocks(8192):
            scores[:, start : start + len(block)] = vectors @ block.T
        return scores

    def select_for(
        self,
        queries: Sequence[str | Sample | Messages],
        n: int | None = None,
        *,
        strategy: Strategy | None = None,
        groups: Sequence[Hashable] | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        sources: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SelectionResult:
        """Select rows of the index for some queries.

        Parameters
        ----------
        queries
            Samples that look like the target. They must not be test samples.
        n
            How many rows; by default `n_select`.
        strategy
            By default the selector's own.
        groups
            One label per query, e.g. its task: groups take turns instead of queries.
        already_labeled
            Rows that are not picked.
        sources
            One per row of the index, to be counted.
        progress
            Called with (rows compared, rows in total).

        Raises
        ------
        DataError
            If there is no index, no query, fewer rows than `n`, or an argument is out of range.
        """
        index = self._built_index()
        if sources is not None and len(sources) != len(index):
            raise DataError(
                f"sources must have one entry per row of the index: {len(index)} rows, got "
                f"{len(sources)}"
            )
        found = select_by_queries(
            index,
            self._query_vectors(queries),
            self.n_select if n is None else n,
            strategy=self.strategy if strategy is None else strategy,
            groups=groups,
            already_labeled=already_labeled,
            progress=progress,
        )
        picked = found.indices.tolist()
        counts = Counter(sources[row] for row in picked) if sources is not None else {}
        return SelectionResult(found.indices, found.scores, found.query_of_each, dict(counts))

    def fit(  # type: ignore[override]  # the pool comes with queries
        self,
        X: Any,
        y: None = None,
        *,
        queries: Sequence[str | Sample | Messages] | None = None,
        groups: Sequence[Hashable] | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Pick samples of a pool; vectors are held in memory unless `X` is a `VectorStore`.

        Parameters
        ----------
        X
            Texts, Samples, conversations, or a `VectorStore` that `build_index` made.
        y
            Not used.
        queries
            Samples that look like the target. Required.
        groups
            One label per query, e.g. its task: groups take turns instead of queries.
        already_labeled
            Rows of the pool that are not picked.
        progress
            Called with (samples read, samples in total).

        Raises
        ------
        DataError
            As `embed` and `select_for`; or if `X` is a store made with another model, layer,
            pooling, length or template.
        """
        query_vectors = self._query_vectors(queries)
        if isinstance(X, VectorStore):
            VectorStore.open(X.path, self.fingerprint())
            pool: Any = X
        else:
            if not hasattr(X, "__getitem__"):
                X = list(X)
            pool = self.embed(X, progress=progress)
        found = select_by_queries(
            pool,
            query_vectors,
            self.n_select,
            strategy=self.strategy,
            groups=groups,
            already_labeled=already_labeled,
        )
        self.selected_indices_ = found.indices
        self.scores_ = found.scores
        self.query_of_each_ = found.query_of_each
        self.source_counts_ = {}
        if not isinstance(X, VectorStore) and all(isinstance(item, Sample) for item in X):
            self.source_counts_ = dict(Counter(X[row].source for row in found.indices.tolist()))
        return self

    def reasons(self) -> list[str]:
        """Return e.g. ``"nearest query 3, cosine 0.71"`` for each pick."""
        return reasons_of(self.scores_, self.query_of_each_, self.strategy, "cosine")

    # Inside ---------------------------------------------------------------------------------------

    def _built_index(self) -> VectorStore:
        if not hasattr(self, "index_"):
            raise DataError("there is no index: call build_index or use_index first")
        return self.index_

    def _query_vectors(
        self, queries: Sequence[str | Sample | Messages] | None
    ) -> NDArray[np.float32]:
        if queries is None or isinstance(queries, str) or len(queries) == 0:
            raise DataError("queries must be a sequence of at least one sample, got none")
        return self._embed_texts(list(self._texts(queries, "queries")), None)

    def _texts(self, items: Iterable[str | Sample | Messages], name: str) -> Iterator[str]:
        for row, item in enumerate(items):
            try:
                yield self.text_of(item)
            except DataError as error:
                raise DataError(f"{name}[{row}]: {error}") from error

    def _conversation(self, messages: Messages) -> str:
        tokenizer = self._ready().tokenizer
        if self.template is None:
            return tulu_text(messages, tokenizer.eos_token or "")
        own = self.template == "chat"
        if own and getattr(tokenizer, "chat_template", None) is None:
            raise DataError("template='chat': the tokenizer has no chat template of its own")
        turns = [dict(turn) for turn in _checked_messages(messages)]
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, chat_template=None if own else self.template
        )
        return text

    def _embed_texts(
        self,
        texts: list[str],
        progress: Callable[[int, int], None] | None,
        *,
        first: int = 0,
        poolings: Sequence[Pooling] = (),
    ) -> NDArray[np.float32]:
        """Return unit vectors ``(n, d)``, of several poolings side by side."""
        _check_pooling(self.pooling)
        poolings = poolings or (self.pooling,)
        if self.batch_tokens < 1:
            raise DataError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if not texts:
            raise DataError("at least one sample must be given, got none")
        reader = self._ready()
        layer, limit = reader.layer_number(self.layer), reader.limit(self.max_length)
        parts = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            chunk = texts[start : start + _TEXTS_AT_ONCE]
            ids = reader.token_ids(chunk, limit, first + start)
            vectors: NDArray[np.float32] | None = None
            done = 0
            for rows in _batches(ids, self.batch_tokens):
                pooled = reader.pooled([ids[row] for row in rows], layer, poolings)
                bad = np.flatnonzero(~np.isfinite(pooled).all(axis=1))
                if bad.size:
                    row = rows[int(bad[0])]
                    raise DataError(
                        f"the vector of sample {first + start + row} has NaN or inf, text "
                        f"{chunk[row][:60]!r}; load the model in float32"
                    )
                if vectors is None:
                    vectors = np.empty((len(chunk), pooled.shape[1]), dtype=np.float32)
                vectors[rows] = pooled
                done += len(rows)
                if progress is not None:
                    progress(start + done, len(texts))
            assert vectors is not None
            slices = np.split(vectors, len(poolings), axis=1)
            parts.append(np.concatenate([unit_rows(part) for part in slices], axis=1))
        return np.concatenate(parts)

    def _ready(self) -> _Reader:
        """Return the model, loaded at the first call."""
        key = (id(self.model), str(self.model) if _is_name(self.model) else "")
        key += (id(self.tokenizer), self.dtype, self.device)  # type: ignore[assignment]
        reader: _Reader | None = self.__dict__.get("_reader")
        if reader is None or reader.key != key:
            reader = _Reader(key, self.model, self.tokenizer, self.dtype, self.device)
            self._reader = reader
        return reader


class _Reader:
    """A backbone and its tokenizer, wherever they came from."""

    def __init__(self, key: Any, model: Any, tokenizer: Any, dtype: Any, device: str) -> None:
        from bakeoff.models.attention import backbone
        from bakeoff.models.loading import BaseModel, LanguageModel, load

        self.key = key
        self.kept = (model, tokenizer)  # so that their ids in the key stay theirs
        if _is_name(model):
            model = load(model, dtype=dtype, device=device)
        self.name = getattr(model, "name", type(model).__name__)
        self.given_fingerprint: str | None = None
        if isinstance(model, BaseModel | LanguageModel):
            if tokenizer is not None:
                raise DataError("tokenizer must be None where model brings its own")
            self.backbone: Any = backbone(model.model)
            self.tokenizer: Any = model.tokenizer
            self.window = model.max_length
            self.given_fingerprint = model.fingerprint
        elif hasattr(model, "modules"):
            if tokenizer is None:
                raise DataError("tokenizer must be given with a transformers model")
            self.backbone = backbone(model)
            self.tokenizer = tokenizer
            stated = getattr(
                self.backbone.config.get_text_config(), "max_position_embeddings", None
            )
            known = int(getattr(tokenizer, "model_max_length", 2**31))  # a huge number for "none"
            self.window = min(known, int(stated or 2**31))
        else:
            raise DataError(
                "model must be a name, a folder, a loaded or a transformers model, got "
                f"{type(model).__name__}"
            )
        self.n_layers = int(self.backbone.config.get_text_config().num_hidden_layers)

    def limit(self, max_length: int) -> int:
        if max_length < 1:
            raise DataError(f"max_length must be at least 1, got {max_length}")
        return min(max_length, self.window)

    def layer_number(self, layer: int) -> int:
        n_states = self.n_layers + 1
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int)
            or not (-n_states <= layer < n_states)
        ):
            raise DataError(
                f"layer must be an integer from {-n_states} to {n_states - 1} for {self.name}, got "
                f"{layer!r}"
            )
        return layer % n_states

    def fingerprint(self) -> str:
        if self.given_fingerprint is None:
            digest = hashlib.sha256()
            digest.update(self.backbone.config.to_json_string(use_diff=False).encode())
            inner = getattr(self.tokenizer, "backend_tokenizer", None)
            vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
            digest.update((vocabulary if inner is None else inner.to_str()).encode())
            for name, tensor in sorted(self.backbone.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().float().numpy().data)
            self.given_fingerprint = digest.hexdigest()
        return self.given_fingerprint

    def token_ids(self, texts: list[str], limit: int, first: int) -> list[list[int]]:
        encoded = self.tokenizer(texts, truncation=True, max_length=limit, verbose=False)
        ids = [list(row) for row in encoded["input_ids"]]
        for row, tokens in enumerate(ids):
            if not tokens:
                raise DataError(f"sample {first + row} has no tokens: {texts[row][:60]!r}")
        return ids

    def pooled(
        self, ids: list[list[int]], layer: int, poolings: Sequence[Pooling]
    ) -> NDArray[np.float32]:
        import torch

        width = max(map(len, ids))
        # Padding is masked, so any id will do where the tokenizer knows none.
        padding = self.tokenizer.pad_token_id or 0
        padded = torch.full((len(ids), width), padding, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        device = next(self.backbone.parameters()).device
        padded, mask = padded.to(device), mask.to(device)
        training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                last = layer == self.n_layers
                output = self.backbone(
                    input_ids=padded, attention_mask=mask, output_hidden_states=not last
                )
                states = output.last_hidden_state if last else self._state(output, layer)
                vectors = [pool_states(states, mask, pooling) for pooling in poolings]
                result: NDArray[np.float32] = torch.cat(vectors, dim=1).cpu().numpy()
        finally:
            self.backbone.train(training)
        return result

    def _state(self, output: Any, layer: int) -> torch.Tensor:
        states = getattr(output, "hidden_states", None)
        if not states or len(states) != self.n_layers + 1:
            raise ModelError(f"{self.name} does not give {self.n_layers + 1} hidden states")
        state: torch.Tensor = states[layer]
        return state


def _is_name(model: Any) -> bool:
    return isinstance(model, str | Path)


def _check_pooling(pooling: Any) -> None:
    if pooling not in POOLINGS:
        raise DataError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def _checked_messages(messages: Messages) -> Messages:
    if len(messages) == 0:
        raise DataError("a conversation must have at least one message")
    for turn in messages:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise DataError(f"a message must have a role and a content, got {turn!r}"[:200])
        if turn["role"] not in _ROLES:
            raise DataError(
                f"a message's role must be one of {', '.join(_ROLES)}, got {turn['role']!r}"
            )
        if not isinstance(turn["content"], str):
            raise DataError(
                f"a message's content must be a string, got {type(turn['content']).__name__}"
            )
    return messages


def _batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield rows for each batch, the longest texts first, within the budget of tokens."""
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    start = 0
    while start < len(order):
        stop = start + max(1, batch_tokens // len(ids[order[start]]))
        yield order[start:stop]
        start = stop
