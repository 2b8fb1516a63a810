"""Long-context training samples whose responses need the far context (GATEAU)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from scipy.stats import rankdata

from bakeoff.errors import DataError
from bakeoff.selection.context_samples import (
    SampleText,
    SampleTokens,
    Scorer,
    ScoresFile,
    named_rows,
    require_known_tokens,
    require_one_tokenizer,
    require_room,
    sample_texts,
    tokenized,
    warn_about_length,
)
from bakeoff.selection.response_attention import Chosen, response_attention
from bakeoff.selection.selector import Selector, checked_count, checked_labeled

METHOD = {
    "slug": "gateau",
    "title": "Long-context samples by homologous models and contextual awareness",
    "paper": "Si et al., GATEAU: Selecting Influential Samples for Long Context Alignment, EMNLP "
    "2025, arXiv 2410.15633",
    "designs": ["gateau"],
    "names": ["GateauSelector", "hmg_scores", "cam_scores"],
}

Progress = Callable[[int, int], None]
Normalize = Literal["minmax", "rank", "log"]
Combine = Literal["softmax", "rank", "z"]

# Longest instruction and response, in tokens, when attention and segments are scored.
_CAP = 500
_SEGMENT = 128
# Samples whose perplexities are computed, and written to the file of scores, together.
_CHUNK = 16


@dataclass(frozen=True, eq=False)
class HomologousGuidance:
    """What `hmg_scores` found.

    Parameters
    ----------
    scores
        float64 array ``(N,)``: the paper's HMG, a softmax over the samples; sums to 1.
    differences
        float64 array ``(N,)``: normalised perplexity under the short model less that under the
        long one, between -1 and 1. The scores are their softmax.
    short_perplexities, long_perplexities
        float64 arrays ``(N,)``: of the responses.
    """

    scores: NDArray[np.float64]
    differences: NDArray[np.float64]
    short_perplexities: NDArray[np.float64]
    long_perplexities: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ContextualAwareness:
    """What `cam_scores` found.

    Parameters
    ----------
    scores
        float64 array ``(N,)``: the paper's CAM, a softmax over the samples; sums to 1.
    similarities
        float64 array ``(N,)``: cosine of `attention` and `importance` of each sample. The scores
        are the softmax of 1 less these.
    attention
        Per sample a float64 array ``(K,)``: mean attention of the response to the tokens of each of
        its K segments, scaled to sum to 1.
    importance
        Per sample a float64 array ``(K,)``: softmax of the negated perplexities.
    perplexities
        Per sample a float64 array ``(K,)``: of the response given one segment and the instruction.
    """

    scores: NDArray[np.float64]
    similarities: NDArray[np.float64]
    attention: tuple[NDArray[np.float64], ...]
    importance: tuple[NDArray[np.float64], ...]
    perplexities: tuple[NDArray[np.float64], ...]


def homologous_guidance(
    short_perplexities: ArrayLike, long_perplexities: ArrayLike, normalize: Normalize = "minmax"
) -> HomologousGuidance:
    """Compute HMG from the perplexities of N responses under two models.

    Parameters
    ----------
    short_perplexities, long_perplexities
        N positive numbers each.
    normalize
        How perplexities become comparable: ``"minmax"`` scales them to 0..1 (the paper's),
        ``"log"`` scales their logarithms, so that one outlier does not squeeze the others,
        ``"rank"`` uses ranks. Where all are equal they become 0.

    Returns
    -------
    HomologousGuidance
        With the perplexities as given.

    Raises
    ------
    DataError
        If lengths differ, there is none, or one is not positive and finite; names the rows.

    Examples
    --------
    >>> found = homologous_guidance([10, 4, 6, 8], [3, 4, 2, 8])
    >>> found.differences.round(3)
    array([ 0.833, -0.333,  0.333, -0.333])
    """
    short = _perplexities(short_perplexities, "short_perplexities")
    long = _perplexities(long_perplexities, "long_perplexities")
    if len(short) != len(long):
        raise DataError(
            f"short_perplexities and long_perplexities must be as many, got {len(short)} and "
            f"{len(long)}"
        )
    differences = _normalized(short, normalize) - _normalized(long, normalize)
    return HomologousGuidance(softmax(differences), differences, short, long)


def hmg_scores(
    samples: Iterable[Any],
    short_model: Any,
    long_model: Any = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    normalize: Normalize = "minmax",
    *,
    truncate_context: int | None = None,
    scores_file: str | Path | None = None,
    progress: Progress | None = None,
) -> HomologousGuidance:
    r"""Score how much easier responses are for a long-context model than for its short sibling.

    Parameters
    ----------
    samples
        N records with ``context``, ``instruction`` (may be empty or absent) and ``response``:
        mappings, or objects with these attributes such as `bakeoff.data.samples.Sample`.
    short_model, long_model
        Two causal language models that share a tokenizer: a base model whose window was stretched
        without training, and the same after training on long text. Transformers models, or what
        `bakeoff.models.load_language_model` returns. Without `long_model`, `short_model` plays both
        parts and `truncate_context` is needed.
    tokenizer
        Their tokenizer; may be left out for what `load_language_model` returns.
    max_length
        Tokens in a model's window; by default the long model's own. Longer texts lose tokens on the
        left, the context first.
    normalize
        As in `homologous_guidance`.
    truncate_context
        The short model is shown only this many tokens from the end of the context. With one model
        in both parts that makes a cheap homologous pair: the same weights with and without the far
        context.
    scores_file
        A JSONL file of losses, one line per sample and model. What is in it is not computed again;
        what is new is appended, so that an interrupted run goes on where it was.
    progress
        Called with (responses scored, responses to score); a sample counts twice.

    Returns
    -------
    HomologousGuidance
        Scores and perplexities, in the order of the samples.

    Warns
    -----
    UserWarning
        If texts were longer than `max_length`.

    Raises
    ------
    DataError
        If a context or response is empty, a response does not fit into `max_length`, or a
        perplexity is not finite; names the samples.
    ModelError
        If the models' tokenizers differ.

    References
    ----------
    Shuzheng Si, Haozhe Zhao, Gang Chen, Yunshui Li, Kangyang Luo, Chuancheng Lv, Kaikai An, Fanchao
    Qi, Baobao Chang and Maosong Sun. "GATEAU: Selecting Influential Samples for Long Context
    Alignment". EMNLP 2025. arXiv:2410.15633.

    Examples
    --------
    >>> found = hmg_scores(samples, model, truncate_context=128)  # doctest: +SKIP
    >>> found.scores.argmax()  # the response that needs the far context most  # doctest: +SKIP
    """
    _check_choice(normalize, "normalize", Normalize)
    if truncate_context is not None and truncate_context < 1:
        raise DataError(f"truncate_context must be at least 1 token, got {truncate_context}")
    if long_model is None or long_model is short_model:
        long_model = short_model
        if truncate_context is None:
            raise DataError(
                "one model in both parts makes every score equal: give a long_model too, or "
                "truncate_context=, the number of context tokens that the short one may see"
            )
    short, long = Scorer.of(short_model, tokenizer), Scorer.of(long_model, tokenizer)
    require_one_tokenizer(short, long)
    window = long.max_length if max_length is None else max_length
    parts = tokenized(sample_texts(samples), long)
    require_known_tokens(parts, short, long)
    require_room(parts, window)
    warn_about_length(parts, window)
    file = ScoresFile(scores_file)
    n = len(parts)
    losses = []
    for done, scorer, shown in ((0, short, truncate_context), (n, long, None)):
        prefixes = [part.prefix(window, shown) for part in parts]
        losses.append(
            _response_losses(scorer, parts, prefixes, file, _shifted(progress, done, 2 * n))
        )
    return homologous_guidance(np.exp(losses[0]), np.exp(losses[1]), normalize)


def cam_scores(
    samples: Iterable[Any],
    model: Any,
    tokenizer: Any = None,
    segment_length: int = _SEGMENT,
    heads: Chosen = "all",
    layers: Chosen = "all",
    drop_first_segment: bool = False,
    *,
    max_length: int | None = None,
    drop_incomplete_segment: bool = False,
    scores_file: str | Path | None = None,
    progress: Progress | None = None,
) -> ContextualAwareness:
    """Score how little a model's attention follows the segments that its responses need.

    The context is cut into segments. A segment is important if the response is likely when the
    model sees only that segment and the instruction; it is attended to as far as the response's
    tokens attend to its tokens when the model sees everything. The score is large where the two
    disagree.

    Parameters
    ----------
    samples
        As for `hmg_scores`.
    model
        The long-context model, as for `hmg_scores`. While attention is read, its implementation is
        ``"eager"`` for the response's rows alone.
    tokenizer
        As for `hmg_scores`.
    segment_length
        Tokens in a segment. The marker before the context opens the first one, as in the paper.
    heads, layers
        Which to average attention over: ``"all"`` or their numbers.
    drop_first_segment
        Whether to leave out the first segment, which draws attention whatever it says (the
        attention sink). Samples with a single segment keep it.
    max_length
        Tokens in the model's window; by default its own. Longer contexts lose tokens on the left.
        Instructions and responses are cut after 500 tokens each.
    drop_incomplete_segment
        Whether a last segment shorter than `segment_length` is left out (if it is not the only
        one).
    scores_file
        As for `hmg_scores`; both may share a file.
    progress
        Called with (samples done, samples in total).

    Returns
    -------
    ContextualAwareness
        Scores and, per sample, the vectors they are made of.

    Warns
    -----
    UserWarning
        If texts were longer than `max_length`.

    Raises
    ------
    DataError
        As `hmg_scores`; also if a layer or head does not exist.
    ModelError
        If the model does not give its attention.

    Notes
    -----
    The released code averages the loss over segment, instruction and response although only the
    response is scored, which flattens the importance; here it is the response's mean, as the paper
    says. The cosine of the two vectors and the softmax over samples are not in the released code.
    Each sample costs K short passes and one long one.

    References
    ----------
    As for `hmg_scores`.

    Examples
    --------
    >>> found = cam_scores(samples, model, segment_length=64)  # doctest: +SKIP
    >>> found.attention[0].shape == found.importance[0].shape  # doctest: +SKIP
    True
    """
    if segment_length < 1:
        raise DataError(f"segment_length must be at least 1 token, got {segment_length}")
    scorer = Scorer.of(model, tokenizer)
    window = scorer.max_length if max_length is None else max_length
    parts = [part.capped(_CAP) for part in tokenized(sample_texts(samples), scorer)]
    require_known_tokens(parts, scorer)
    require_room(parts, window, for_context=True)
    warn_about_length(parts, window)
    file = ScoresFile(scores_file)
    attention, perplexities = [], []
    for done, part in enumerate(parts):
        seen, losses = _segment_scores(
            scorer, part, window, segment_length, drop_incomplete_segment, heads, layers, file
        )
        if not (np.isfinite(losses).all() and np.isfinite(seen).all()):
            raise DataError(
                f"the model gives no finite loss or attention for sample {done} (id {part.id})"
            )
        first = int(drop_first_segment and len(seen) > 1)
        attention.append(seen[first:] / seen[first:].sum())
        perplexities.append(np.exp(losses[first:]))
        if progress is not None:
            progress(done + 1, len(parts))
    importance = [softmax(-perplexity) for perplexity in perplexities]
    similarities = np.array(
        [_cosine(a, q) for a, q in zip(attention, importance, strict=True)], dtype=np.float64
    )
    return ContextualAwareness(
        softmax(1 - similarities),
        similarities,
        tuple(attention),
        tuple(importance),
        tuple(perplexities),
    )


class GateauSelector(Selector):
    """Pick the samples whose responses need the far context, and whose context is misread.

    Two signals are mixed. Homologous guidance (HMG): the response is much less likely for a model
    that cannot use the far context than for its sibling that can. Contextual awareness (CAM): the
    sibling's attention does not follow the segments that make the response likely. No training
    takes part, and samples do not compete: copies get equal scores, so remove duplicates first.

    Parameters
    ----------
    n_select
        How many to pick; by default `fraction` of the samples.
    alpha
        Weight of HMG, 0 to 1; that of CAM is 1 - alpha. With 1 or 0 the other is not computed. The
        paper has 0.8 where many short samples are mixed in for training and 0.7 where few are.
    fraction
        Share of the samples to pick where `n_select` is not given; the paper tries 0.1, 0.3, 0.5.
    model
        The long-context model: a name for `bakeoff.models.load_language_model`, what it returns, or
        a transformers model (then give `tokenizer`).
    short_model
        Its short-context sibling, likewise. By default the same model, shown only the end of the
        context.
    truncate_context
        How many tokens from the end of the context the short model sees. By default
        `segment_length` without a `short_model`, and all with one.
    tokenizer
        For transformers models.
    max_length
        Tokens in the window; by default the long model's own.
    normalize
        How HMG makes perplexities comparable: ``"minmax"``, ``"log"`` or ``"rank"``, as in
        `homologous_guidance`.
    combine
        How the two signals are brought to one scale: ``"softmax"`` over the samples (the paper's),
        ``"z"`` (mean 0, standard deviation 1) or ``"rank"`` (0 to 1).
    segment_length, heads, layers, drop_first_segment, drop_incomplete_segment
        As for `cam_scores`.
    scores_file
        A JSONL file that keeps what was computed, so that an interrupted `fit` goes on.

    Attributes
    ----------
    scores_ : float64 array of shape (N,)
        alpha times one signal plus 1 - alpha times the other; the largest are picked.
    hmg_, cam_ : float64 arrays of shape (N,), or None
        The paper's HMG and CAM, each a softmax over the samples; None if its weight is 0.
    guidance_ : HomologousGuidance or None
        HMG with its perplexities.
    awareness_ : ContextualAwareness or None
        CAM with its segment vectors.
    selected_indices_ : int64 array
        The picks, the largest score first; equal scores in the order of the samples.

    References
    ----------
    Shuzheng Si, Haozhe Zhao, Gang Chen, Yunshui Li, Kangyang Luo, Chuancheng Lv, Kaikai An, Fanchao
    Qi, Baobao Chang and Maosong Sun. "GATEAU: Selecting Influential Samples for Long Context
    Alignment". EMNLP 2025. arXiv:2410.15633.

    Examples
    --------
    >>> from bakeoff.data.far_context import far_context_samples
    >>> samples = far_context_samples(40, n_lines=24)
    >>> gateau = GateauSelector(fraction=0.25, alpha=1).fit(samples)  # doctest: +SKIP
    >>> [samples[row].kind for row in gateau.selected_indices_]  # doctest: +SKIP
    """

    n_select: int | None  # type: ignore[assignment]  # a fraction may stand for it

    scores_: NDArray[np.float64]
    hmg_: NDArray[np.float64] | None
    cam_: NDArray[np.float64] | None
    guidance_: HomologousGuidance | None
    awareness_: ContextualAwareness | None

    def __init__(
        self,
        n_select: int | None = None,
        alpha: float = 0.8,
        fraction: float = 0.3,
        model: Any = "smollm2-135m",
        short_model: Any = None,
        truncate_context: int | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        normalize: Normalize = "minmax",
        combine: Combine = "softmax",
        segment_length: int = _SEGMENT,
        heads: Chosen = "all",
        layers: Chosen = "all",
        drop_first_segment: bool = False,
        drop_incomplete_segment: bool = False,
        scores_file: str | Path | None = None,
    ) -> None:
        self.n_select = n_select
        self.alpha = alpha
        self.fraction = fraction
        self.model = model
        self.short_model = short_model
        self.truncate_context = truncate_context
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.normalize = normalize
        self.combine = combine
        self.segment_length = segment_length
        self.heads = heads
        self.layers = layers
        self.drop_first_segment = drop_first_segment
        self.drop_incomplete_segment = drop_incomplete_segment
        self.scores_file = scores_file

    def fit(
        self,
        X: Iterable[Any],
        y: None = None,
        *,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Progress | None = None,
        **data: Any,
    ) -> Self:
        """Score the samples and pick the best.

        Parameters
        ----------
        X
            N samples, as for `hmg_scores`.
        y
            Ignored.
        already_labeled
            Rows that are taken already. They are scored with the others and not picked.
        progress
            Called with (steps done, steps in total): two steps per sample for HMG, one for CAM.
        **data
            Nothing else is used.

        Raises
        ------
        DataError
            If a parameter is out of range, or as `hmg_scores` and `cam_scores` say.
        """
        if data:
            raise DataError(f"fit does not use {', '.join(sorted(data))}")
        _check_choice(self.normalize, "normalize", Normalize)
        _check_choice(self.combine, "combine", Combine)
        _check_share(self.alpha, "alpha", "0 and 1", 0 <= self.alpha <= 1)
        _check_share(self.fraction, "fraction", "0 (excluded) and 1", 0 < self.fraction <= 1)
        if self.segment_length < 1:
            raise DataError(f"segment_length must be at least 1 token, got {self.segment_length}")
        texts = sample_texts(X)
        n = len(texts)
        labeled = checked_labeled(already_labeled, n)
        wanted = self.n_select
        if wanted is None:
            wanted = max(1, round(self.fraction * (n - len(labeled))))
        n_select = checked_count(wanted, n - len(labeled), pool="the samples")
        _warn_about_copies(texts)

        long = _loaded(self.model)
        short = long if self.short_model is None else _loaded(self.short_model)
        shown = self.truncate_context
        if shown is None and self.short_model is None:
            shown = self.segment_length
        steps = n * (2 * (self.alpha > 0) + (self.alpha < 1))
        self.guidance_ = self.awareness_ = self.hmg_ = self.cam_ = None
        signals: list[tuple[float, NDArray[np.float64]]] = []
        if self.alpha > 0:
            self.guidance_ = hmg_scores(
                texts,
                short,
                long,
                self.tokenizer,
                self.max_length,
                self.normalize,
                truncate_context=shown,
                scores_file=self.scores_file,
                progress=_shifted(progress, 0, steps),
            )
            self.hmg_ = self.guidance_.scores
            signals.append((self.alpha, self.guidance_.differences))
        if self.alpha < 1:
            self.awareness_ = cam_scores(
                texts,
                long,
                self.tokenizer,
                self.segment_length,
                self.heads,
                self.layers,
                self.drop_first_segment,
                max_length=self.max_length,
                drop_incomplete_segment=self.drop_incomplete_segment,
                scores_file=self.scores_file,
                progress=_shifted(progress, steps - n, steps),
            )
            self.cam_ = self.awareness_.scores
            signals.append((1 - self.alpha, 1 - self.awareness_.similarities))
        self.scores_ = np.zeros(n)
        for weight, signal in signals:
            self.scores_ += weight * _on_one_scale(signal, self.combine)
        # Sums of equal parts may differ in the last bits; ties go by row.
        order = np.argsort(-self.scores_.round(15), kind="stable")
        self.selected_indices_ = order[~np.isin(order, labeled)][:n_select].astype(np.int64)
        return self

    def reasons(self) -> list[str]:
        """Return each pick's ranks among all samples, 1 being the highest."""
        ranks = [
            f"{name} rank {{}}"
            for name, s in (("HMG", self.hmg_), ("CAM", self.cam_))
            if s is not None
        ]
        columns = [
            rankdata(-scores, method="min").astype(int)
            for scores in (self.hmg_, self.cam_)
            if scores is not None
        ]
        return [
            ", ".join(text.format(column[row]) for text, column in zip(ranks, columns, strict=True))
            for row in self.selected_indices_
        ]


# Scoring ------------------------------------------------------------------------------------------


def _response_losses(
    scorer: Scorer,
    parts: Sequence[SampleTokens],
    prefixes: Sequence[tuple[int, ...]],
    file: ScoresFile,
    progress: Progress | None,
) -> NDArray[np.float64]:
    """Return the mean loss per response token, each distinct text computed once."""
    from bakeoff.models.likelihood import response_losses

    keys = [
        file.key(scorer, "loss", prefix, part.response)
        for prefix, part in zip(prefixes, parts, strict=True)
    ]
    todo: dict[str, int] = {}
    for row, key in enumerate(keys):
        if file.get(key) is None:
            todo.setdefault(key, row)
    # Texts of one length next to each other: less padding.
    rows = sorted(todo.values(), key=lambda row: len(prefixes[row]) + len(parts[row].response))
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        means = response_losses(
            scorer.model, [prefixes[row] for row in chunk], [parts[row].response for row in chunk]
        ).means
        bad = [row for row, mean in zip(chunk, means, strict=True) if not np.isfinite(mean)]
        if bad:
            ids = ", ".join(parts[row].id for row in bad)
            raise DataError(
                f"the model gives no finite perplexity for {named_rows(bad)} (ids {ids})"
            )
        file.add(
            [
                {"id": parts[row].id, "key": keys[row], "loss": float(mean)}
                for row, mean in zip(chunk, means, strict=True)
            ]
        )
        if progress is not None:
            progress(len(keys) - len(rows) + min(start + _CHUNK, len(rows)), len(keys))
    if progress is not None and not rows:
        progress(len(keys), len(keys))
    records = [file.get(key) for key in keys]
    return np.array([record["loss"] for record in records if record is not None])


def _segment_scores(
    scorer: Scorer,
    part: SampleTokens,
    window: int,
    length: int,
    drop_incomplete: bool,
    heads: Chosen,
    layers: Chosen,
    file: ScoresFile,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return per segment the mean attention to its tokens, and the response's mean loss."""
    head = part.head(window)
    segments = [head[start : start + length] for start in range(0, len(head), length)]
    if drop_incomplete and len(segments) > 1 and len(segments[-1]) < length:
        segments.pop()
    prefix = part.bos + head + part.tail
    numbers = [c if isinstance(c, str) else [int(number) for number in c] for c in (heads, layers)]
    key = file.key(
        scorer, "segments", prefix, part.response, length, len(segments), len(head), numbers
    )
    if (record := file.get(key)) is not None:
        return np.array(record["attention"]), np.array(record["losses"])

    from bakeoff.models.likelihood import response_losses

    losses = response_losses(
        scorer.model,
        [part.bos + segment + part.tail for segment in segments],
        [part.response] * len(segments),
    ).means
    weights = response_attention(scorer.model, prefix, part.response, heads=heads, layers=layers)[
        len(part.bos) :
    ]
    attention = np.array(
        [
            weights[number * length : number * length + len(segment)].mean()
            for number, segment in enumerate(segments)
        ]
    )
    if np.isfinite(losses).all() and np.isfinite(attention).all():
        record = {"id": part.id, "key": key, "losses": losses.tolist()}
        file.add([{**record, "attention": attention.tolist()}])
    return attention, losses


def _loaded(model: Any) -> Any:
    if isinstance(model, str | Path):
        from bakeoff.models import load_language_model

        return load_language_model(model)
    return model


def _warn_about_copies(texts: Sequence[SampleText]) -> None:
    copies = len(texts) - len({text.id for text in texts})
    if copies:
        warnings.warn(
            f"{copies} samples are copies of others; copies get equal scores and are picked "
            "together: remove duplicates first",
            stacklevel=3,
        )


# Numbers ------------------------------------------------------------------------------------------


def _perplexities(values: ArrayLike, name: str) -> NDArray[np.float64]:
    perplexities = np.asarray(values, dtype=np.float64)
    if perplexities.ndim != 1 or not perplexities.size:
        raise DataError(
            f"{name} must be a list of at least one number, got shape {perplexities.shape}"
        )
    bad = np.flatnonzero(~(np.isfinite(perplexities) & (perplexities > 0)))
    if bad.size:
        raise DataError(
            f"{name} must be positive and finite; it is not in {named_rows(bad.tolist())}"
        )
    return perplexities


def _normalized(perplexities: NDArray[np.float64], normalize: Normalize) -> NDArray[np.float64]:
    """Return perplexities on a scale from 0 to 1; zeros where all are equal."""
    _check_choice(normalize, "normalize", Normalize)
    if normalize == "rank":
        return _ranks(perplexities)
    values = np.log(perplexities) if normalize == "log" else perplexities
    spread = values.max() - values.min()
    return np.zeros_like(values) if spread == 0 else (values - values.min()) / spread


def _on_one_scale(signal: NDArray[np.float64], combine: Combine) -> NDArray[np.float64]:
    if combine == "rank":
        return _ranks(signal)
    if combine == "z":
        spread = signal.std()
        # Rounding alone is no spread.
        flat = spread <= 1e-12 * max(1.0, float(np.abs(signal).max()))
        return np.zeros_like(signal) if flat else (signal - signal.mean()) / spread
    scaled: NDArray[np.float64] = softmax(signal)
    return scaled


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 0 to 1, ties their mean; zeros where all are equal."""
    if (values == values[0]).all():
        return np.zeros(len(values))
    ranks: NDArray[np.float64] = (rankdata(values) - 1) / (len(values) - 1)
    return ranks


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) == 1:  # parallel, to the last bit
        return 1.0
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _check_choice(value: Any, name: str, kind: Any) -> None:
    if value not in get_args(kind):
        accepted = ", ".join(repr(choice) for choice in get_args(kind))
        raise DataError(f"{name} must be one of {accepted}, got {value!r}")


def _check_share(value: Any, name: str, accepted: str, fits: bool) -> None:
    if not fits:
        raise DataError(f"{name} must be between {accepted}, got {value!r}")


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a callback that counts on from `before`."""
    if progress is None:
        return None
    report = progress
    return lambda done, _: report(before + done, total)
