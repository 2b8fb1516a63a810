"""CodeGen2's training recipe: one causal decoder that writes left to right and fills in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bakeoff.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = {
    "slug": "codegen2",
    "title": "Causal language modelling mixed with file-level span corruption, and infilling",
    "paper": "Nijkamp et al., CodeGen2: Lessons for Training LLMs on Programming and Natural "
    "Languages, 2023, arXiv 2305.02309",
    "designs": ["span-corruption"],
    "names": [
        "SpanCorruption",
        "FillInTheMiddle",
        "PrefixLM",
        "DataMixture",
        "InfillTokens",
        "add_infill_tokens",
        "pack",
        "uncorrupt",
        "train_decoder",
        "infill",
        "format_infill",
        "evaluate_infilling",
    ],
}

Level = Literal["file", "sequence"]
Attention = Literal["causal", "prefix"]
LossOn = Literal["all", "no-sentinels", "targets"]
Span = tuple[int, int]

SEPARATOR, END_OF_MASK = "<sep>", "<eom>"
FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

# The same three tokens as other families of code models spell them.
_FIM_SPELLINGS = (
    FIM_TOKENS,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
# A shorter document has no room for a span with something kept on both sides.
_SHORTEST = 4
_IGNORED = -100


def mask_token(number: int) -> str:
    """Return the sentinel of span `number`, counted from 1.

    Examples
    --------
    >>> mask_token(1)
    '<mask_1>'
    """
    return f"<mask_{number}>"


# The vocabulary -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfillTokens:
    """Ids of the tokens that mark holes; None or empty where a vocabulary lacks them.

    Parameters
    ----------
    eot
        End of text, which separates documents.
    separator, end_of_mask
        ``<sep>``, after which the spans follow, and ``<eom>``, which ends each.
    masks
        ``<mask_1>``, ``<mask_2>``, ... as far as they go without a gap.
    fim
        Prefix, suffix and middle markers of the fill-in-the-middle layouts.
    """

    eot: int
    separator: int | None = None
    end_of_mask: int | None = None
    masks: tuple[int, ...] = ()
    fim: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> InfillTokens:
        """Read the ids from a tokenizer.

        Raises
        ------
        DataError
            If the tokenizer has no end-of-text token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("tokenizer has no eos_token, which has to separate documents")
        vocabulary = tokenizer.get_vocab()
        masks: list[int] = []
        while (found := vocabulary.get(mask_token(len(masks) + 1))) is not None:
            masks.append(found)
        fim: tuple[int, int, int] | None = None
        for prefix, suffix, middle in _FIM_SPELLINGS:
            if fim is None and {prefix, suffix, middle} <= vocabulary.keys():
                fim = (vocabulary[prefix], vocabulary[suffix], vocabulary[middle])
        return cls(
            eot=int(tokenizer.eos_token_id),
            separator=vocabulary.get(SEPARATOR),
            end_of_mask=vocabulary.get(END_OF_MASK),
            masks=tuple(masks),
            fim=fim,
        )

    @property
    def control(self) -> frozenset[int]:
        """All ids that mark holes; the end of text is not among them."""
        single = (self.separator, self.end_of_mask)
        return frozenset({*self.masks, *(self.fim or ()), *(i for i in single if i is not None)})

    def for_spans(self) -> tuple[int, int, tuple[int, ...]]:
        """Return (separator, end of mask, masks).

        Raises
        ------
        DataError
            If one of them is missing.
        """
        if self.separator is None or self.end_of_mask is None or not self.masks:
            raise DataError(
                f"tokenizer lacks {SEPARATOR}, {END_OF_MASK} or {mask_token(1)}: add them with "
                "add_infill_tokens(tokenizer, model)"
            )
        return self.separator, self.end_of_mask, self.masks

    def for_fim(self) -> tuple[int, int, int]:
        """Return the prefix, suffix and middle markers.

        Raises
        ------
        DataError
            If they are missing.
        """
        if self.fim is None:
            raise DataError(
                f"tokenizer lacks {', '.join(FIM_TOKENS)} (or another known spelling): add them "
                "with add_infill_tokens(tokenizer, model)"
            )
        return self.fim


def add_infill_tokens(
    tokenizer: Any, model: Any = None, *, max_sentinels: int = 64, fim: bool = True
) -> InfillTokens:
    """Give a tokenizer and its model the tokens of the infill layouts.

    What is there already stays. The embedding of a new token starts as the mean of the old ones.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with an end-of-text token; changed in place.
    model
        The transformers model to go with it; its embeddings grow in place, never shrink.
    max_sentinels
        How many holes one document can have.
    fim
        Whether to add the three fill-in-the-middle markers too.

    Returns
    -------
    InfillTokens
        Their ids.

    Raises
    ------
    DataError
        If `max_sentinels` is below 1 or the tokenizer has no end-of-text token.

    Examples
    --------
    >>> tokens = add_infill_tokens(tokenizer, model)  # doctest: +SKIP
    >>> tokenizer.convert_ids_to_tokens(tokens.masks[:2])  # doctest: +SKIP
    ['<mask_1>', '<mask_2>']
    """
    from tokenizers import AddedToken

    if max_sentinels < 1:
        raise DataError(f"max_sentinels must be at least 1, got {max_sentinels}")
    present = InfillTokens.of(tokenizer)
    wanted = [mask_token(number) for number in range(1, max_sentinels + 1)]
    wanted += [SEPARATOR, END_OF_MASK]
    if fim and present.fim is None:
        wanted += FIM_TOKENS
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in wanted if token not in vocabulary]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in missing],
        special_tokens=True,
    )
    if model is not None:
        # A tokenizer may have had the tokens before its model got rows for them.
        beyond = range(model.get_input_embeddings().weight.shape[0], len(tokenizer))
        new = sorted({*tokenizer.convert_tokens_to_ids(missing), *beyond})
        if new:
            _grow(model, new, len(tokenizer))
    return InfillTokens.of(tokenizer)


def _grow(model: Any, new: list[int], size: int) -> None:
    """Enlarge the embeddings to `size` rows if they are smaller; set the rows `new` to the mean."""
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    if old < size:  # a padded vocabulary may have the room already
        model.resize_token_embeddings(size, mean_resizing=False)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [inner.weight]
    if outer is not None and outer.weight is not inner.weight:
        tables.append(outer.weight)
    if outer is not None and getattr(outer, "bias", None) is not None:
        tables.append(outer.bias)
    with torch.no_grad():
        for table in tables:
            known = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
            known[new] = False
            known[old:] = False
            table[new] = table[known].float().mean(dim=0).to(table.dtype)


def pack(
    tokenizer: Any,
    texts: Iterable[str],
    length: int,
    *,
    on_sentinel: Literal["error", "escape"] = "error",
    keep_rest: bool = False,
) -> list[list[int]]:
    """Tokenise documents, put an end of text after each, and cut rows of equal length.

    Parameters
    ----------
    tokenizer
        As `add_infill_tokens` left it.
    texts
        Documents, in the order wanted.
    length
        Tokens in a row. Span corruption makes a row longer: see `max_length` there.
    on_sentinel
        What to do with a document that spells a special token out, such as ``"<sep>"``:
        ``"error"``, or ``"escape"``, which reads it as ordinary characters.
    keep_rest
        Whether the last, shorter row is kept.

    Returns
    -------
    list of lists of token ids

    Raises
    ------
    DataError
        If a document spells a special token out and `on_sentinel` is ``"error"``; names it.
    """
    if length < 2:
        raise DataError(f"length must be at least 2, got {length}")
    if on_sentinel not in ("error", "escape"):
        raise DataError(f"on_sentinel must be 'error' or 'escape', got {on_sentinel!r}")
    # Other added tokens, such as a run of spaces in the vocabularies of code models, are text.
    added = tokenizer.added_tokens_decoder
    control = InfillTokens.of(tokenizer).control
    special = [str(token) for id_, token in added.items() if token.special or id_ in control]
    ids: list[int] = []
    for number, text in enumerate(texts):
        if on_sentinel == "error" and (found := [token for token in special if token in text]):
            raise DataError(
                f"text {number} spells out the special token {found[0]!r}; on_sentinel='escape' "
                "reads it as ordinary characters"
            )
        ids += plain_ids(tokenizer, text)
        ids.append(int(tokenizer.eos_token_id))
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    if rows and len(rows[-1]) < length and not keep_rest:
        rows.pop()
    return rows


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise `text` without adding anything; a special token spelled out is mere characters."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return [int(token) for token in encoded]


# Spans --------------------------------------------------------------------------------------------


def sample_spans(
    n: int,
    rng: np.random.Generator,
    *,
    ratio: tuple[float, float] = (0.05, 0.95),
    span_len: tuple[int, int] | None = None,
    max_spans: int = 64,
) -> list[Span]:
    """Draw which of `n` tokens to mask: spans that neither overlap nor touch.

    A share r is uniform in `ratio`; ``m = max(1, round(r * n))`` tokens are masked. Lengths are
    uniform in `span_len` until they sum to m, the last one cut. Every way to place them with at
    least one kept token between neighbours is equally likely.

    Parameters
    ----------
    n
        Number of tokens.
    rng
        Source of randomness.
    ratio
        Range of the share.
    span_len
        Shortest and longest span; by default from 1 to ``max(1, n // 4)``.
    max_spans
        If lengths run out of spans, or of tokens to keep between them, the last span is longer.

    Returns
    -------
    list of (start, stop)
        From left to right.

    Examples
    --------
    >>> sample_spans(12, np.random.default_rng(0), ratio=(0.5, 0.5), span_len=(2, 2))
    [(0, 2), (3, 5), (10, 12)]
    """
    if n < 1:
        raise DataError(f"n must be at least 1, got {n}")
    share = rng.uniform(*ratio)
    n_masked = min(n, max(1, round(share * n)))
    shortest, longest = span_len or (1, max(1, n // 4))
    most = min(max_spans, n - n_masked + 1)
    lengths: list[int] = []
    left = n_masked
    while left:
        drawn = int(rng.integers(shortest, longest + 1))
        lengths.append(left if len(lengths) + 1 == most else min(drawn, left))
        left -= lengths[-1]
    rng.shuffle(lengths)  # or the one that was cut would always be the rightmost
    # One kept token is tied to every span but the last; the free ones fall into the gaps, each
    # outcome equally likely, which is choosing the places of the spans among free and spans.
    free = n - n_masked - (len(lengths) - 1)
    places = np.sort(rng.choice(free + len(lengths), size=len(lengths), replace=False)).tolist()
    spans: list[Span] = []
    masked_before = 0
    for place, length in zip(places, lengths, strict=True):
        # As many kept tokens lie before it, free and tied ones together, and the earlier spans.
        start = place + masked_before
        spans.append((start, start + length))
        masked_before += length
    return spans


def corrupt_spans(ids: Sequence[int], spans: Sequence[Span], tokens: InfillTokens) -> list[int]:
    """Move the given spans of one document behind it, in the layout of CodeGen2.

    The result is the document with ``<mask_j>`` in place of span j, the end of text, ``<sep>``,
    and ``<mask_j> span_j <eom>`` for every j in turn: ``3 k + 2`` tokens more than the document.

    Parameters
    ----------
    ids
        Token ids of the document, without sentinels.
    spans
        (start, stop) from left to right, none empty; between neighbours lies a kept token.
    tokens
        Ids of the sentinels.

    Returns
    -------
    list of int

    Raises
    ------
    DataError
        If sentinels are missing or fewer than the spans, spans touch, overlap, are empty or lie
        outside, or there is none.

    Examples
    --------
    >>> tokens = InfillTokens(eot=0, separator=90, end_of_mask=91, masks=(101, 102))
    >>> corrupt_spans([1, 2, 3, 4, 5], [(1, 2), (3, 5)], tokens)
    [1, 101, 3, 102, 0, 90, 101, 2, 91, 102, 4, 5, 91]
    """
    separator, end_of_mask, masks = tokens.for_spans()
    if not spans:
        raise DataError("spans must hold at least one (start, stop)")
    if len(spans) > len(masks):
        raise DataError(
            f"{len(spans)} spans, but the tokenizer has {len(masks)} sentinels: add more with "
            "add_infill_tokens(..., max_sentinels=...)"
        )
    context: list[int] = []
    targets: list[int] = []
    position = 0
    for number, (start, stop) in enumerate(spans):
        if not (position + (number > 0) <= start < stop <= len(ids)):
            raise DataError(
                f"span {number} is ({start}, {stop}): spans must not be empty, must go from left "
                f"to right with a kept token between them, and end by {len(ids)}"
            )
        context += [*ids[position:start], masks[number]]
        targets += [masks[number], *ids[start:stop], end_of_mask]
        position = stop
    return [*context, *ids[position:], tokens.eot, separator, *targets]


def uncorrupt(ids: Sequence[int], tokens: InfillTokens, *, level: Level = "file") -> list[int]:
    """Undo `SpanCorruption`: return the packed sequence that was corrupted.

    Parameters
    ----------
    ids
        A sequence with any number of documents, corrupted or not.
    tokens
        Ids of the sentinels.
    level
        The level at which it was corrupted.

    Returns
    -------
    list of int

    Raises
    ------
    DataError
        If sentinels do not match: one without its span, a span without its end, a wrong order.
    """
    separator, end_of_mask, masks = tokens.for_spans()
    ids = list(ids)
    number_of = {mask: number for number, mask in enumerate(masks)}
    done: list[int] = []  # complete documents with the end of text after them
    document: list[int] = []
    position = 0
    while position < len(ids):
        token = ids[position]
        starts_spans = position + 1 < len(ids) and ids[position + 1] == separator
        if token == tokens.eot and starts_spans:
            holes = [number_of[i] for i in document if i in number_of]
            if holes != list(range(len(holes))) or not holes:
                raise DataError(f"before position {position}: sentinels are not 1, 2, ... in order")
            position += 2
            spans: list[list[int]] = []
            for number in holes:
                if position >= len(ids) or ids[position] != masks[number]:
                    raise DataError(
                        f"position {position}: expected the sentinel of span {number + 1}"
                    )
                try:
                    stop = ids.index(end_of_mask, position)
                except ValueError:
                    raise DataError(f"span {number + 1} has no {END_OF_MASK}") from None
                spans.append(ids[position + 1 : stop])
                position = stop + 1
            document = [
                restored
                for i in document
                for restored in (spans[number_of[i]] if i in number_of else [i])
            ]
            continue
        if token == tokens.eot and level == "file":
            done += [*_plain(document, tokens), token]
            document = []
        else:
            document.append(token)
        position += 1
    return done + _plain(document, tokens)


def _plain(ids: list[int], tokens: InfillTokens) -> list[int]:
    if tokens.control.intersection(ids):
        raise DataError("a sentinel is left over: the sequence was cut, or is of another layout")
    return ids


def psm(ids: Sequence[int], cuts: Span, tokens: InfillTokens) -> list[int]:
    """Write one document as prefix, suffix, middle: the layout of fill-in-the-middle training.

    Parameters
    ----------
    ids
        Token ids of the document.
    cuts
        Where the middle starts and stops.
    tokens
        Ids of the markers; ``<eom>`` ends the middle.

    Returns
    -------
    list of int

    References
    ----------
    Mohammad Bavarian et al. "Efficient Training of Language Models to Fill in the Middle". 2022.
    arXiv:2207.14255.

    Examples
    --------
    >>> tokens = InfillTokens(eot=0, end_of_mask=91, fim=(81, 82, 83))
    >>> psm([1, 2, 3, 4, 5], (1, 3), tokens)
    [81, 1, 82, 4, 5, 83, 2, 3, 91]
    """
    start, stop, end = _checked_cuts(ids, cuts, tokens)
    prefix, suffix, middle = tokens.for_fim()
    return [prefix, *ids[:start], suffix, *ids[stop:], middle, *ids[start:stop], end]


def spm(ids: Sequence[int], cuts: Span, tokens: InfillTokens) -> list[int]:
    """Write one document with the suffix first, then prefix and middle in one piece.

    This is the variant for training together with `psm`: both start with the prefix marker.

    Parameters
    ----------
    ids, cuts, tokens
        As for `psm`.

    Returns
    -------
    list of int

    Examples
    --------
    >>> tokens = InfillTokens(eot=0, end_of_mask=91, fim=(81, 82, 83))
    >>> spm([1, 2, 3, 4, 5], (1, 3), tokens)
    [81, 82, 4, 5, 83, 1, 2, 3, 91]
    """
    start, stop, end = _checked_cuts(ids, cuts, tokens)
    prefix, suffix, middle = tokens.for_fim()
    return [prefix, suffix, *ids[stop:], middle, *ids[:start], *ids[start:stop], end]


def _checked_cuts(ids: Sequence[int], cuts: Span, tokens: InfillTokens) -> tuple[int, int, int]:
    start, stop = cuts
    if not 0 <= start <= stop <= len(ids):
        raise DataError(f"cuts must be 0 <= start <= stop <= {len(ids)}, got {cuts}")
    if tokens.end_of_mask is None:
        raise DataError(f"tokenizer lacks {END_OF_MASK}: add it with add_infill_tokens")
    return start, stop, tokens.end_of_mask


def prefix_lm(n: int, length: int) -> list[int]:
    """Return the segments of a prefix-LM sequence of `n` tokens: 1 in the prefix, 0 after it.

    Examples
    --------
    >>> prefix_lm(5, 2)
    [1, 1, 0, 0, 0]
    """
    if not 0 <= length <= n:
        raise DataError(f"length must be from 0 to {n}, got {length}")
    return [1] * length + [0] * (n - length)


def prefix_lm_mask(
    segments: Tensor, attention_mask: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the additive attention mask of a prefix-LM.

    A token sees itself and what comes before it; tokens of one segment see each other as well.

    Parameters
    ----------
    segments
        Integer tensor ``(B, T)``; 0 where a token is read causally.
    attention_mask
        ``(B, T)``, 0 on padding, which nobody sees but itself; None without padding.
    dtype
        That of the model; float32 if None.

    Returns
    -------
    Tensor of shape ``(B, 1, T, T)``
        0 where a query may look at a key, the most negative number elsewhere: what transformers'
        decoders take as ``attention_mask``, with eager attention and with SDPA. It replaces a
        sliding window.

    Examples
    --------
    >>> import torch
    >>> (prefix_lm_mask(torch.tensor([[1, 1, 0, 0]])) == 0).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    import torch

    length = segments.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=segments.device)
    seen = ones.tril()[None] | (
        (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    )
    if attention_mask is not None:
        # Padding sees itself, or a row of nothing but -inf would give NaN.
        seen = (seen & (attention_mask > 0)[:, None]) | torch.eye(
            length, dtype=torch.bool, device=segments.device
        )
    kind = dtype or torch.float32
    mask = torch.zeros(seen.shape, dtype=kind, device=segments.device)
    return mask.masked_fill(~seen, torch.finfo(kind).min)[:, None]


# Objectives ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Parameters
    ----------
    input_ids
        What the model reads.
    labels
        What it is to predict: the ids, or -100 where there is no loss.
    segments
        Which bidirectional prefix a token belongs to, counted from 1; 0 where it is read causally.
    causal
        Whether it was left as it is, for plain language modelling.
    """

    input_ids: list[int]
    labels: list[int]
    segments: list[int]
    causal: bool


class InfillObjective(ABC):
    """What all objectives share: the coin, the documents, the loss, and batches.

    With probability `p_causal` a packed sequence is left as it is. Otherwise each document in it is
    rewritten by itself, and the results are put together in order. Nothing marks which it was. An
    objective is a collator: give it to ``transformers.Trainer`` or a ``DataLoader`` as such, or
    turn single sequences with `apply`.

    Parameters
    ----------
    tokenizer
        With the tokens of the layout; or `InfillTokens`, where `char_cuts` is 0.
    p_causal
        Probability of plain causal language modelling.
    level
        ``"file"`` rewrites each document by itself; ``"sequence"`` the packed sequence as if it
        were one, ends of text included, which is the control.
    attention
        ``"causal"``; or ``"prefix"``, where what is given of a rewritten document sees all of
        itself and carries no loss.
    loss
        ``"all"`` tokens, the paper's choice; ``"no-sentinels"`` leaves out the sentinels inside
        the context; ``"targets"`` is on what was moved alone. A causal sequence has it on all.
    char_cuts
        Probability that a document is cut between characters, and its parts tokenised anew,
        instead of between tokens: a user's cursor is often inside a token.
    max_length
        Longest sequence after rewriting; None for no limit.
    overflow
        If it would be longer: ``"cut"`` the document before it is rewritten, so that no span is
        ever cut, or ``"error"``.
    pad_to_multiple_of
        Batches are padded on the right to a multiple of this.
    seed
        Of all draws. Workers of a ``DataLoader`` draw differently from each other and in every
        epoch, and the same under one ``torch.manual_seed``.

    Raises
    ------
    DataError
        If an argument is out of range or the tokens are missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        p_causal: float = 0.5,
        level: Level = "file",
        attention: Attention = "causal",
        loss: LossOn = "all",
        char_cuts: float = 0.0,
        max_length: int | None = None,
        overflow: Literal["cut", "error"] = "cut",
        pad_to_multiple_of: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value in (("p_causal", p_causal), ("char_cuts", char_cuts)):
            if not 0 <= value <= 1:
                raise DataError(f"{name} must be a probability from 0 to 1, got {value}")
        for name, text, accepted in (
            ("level", level, ("file", "sequence")),
            ("attention", attention, ("causal", "prefix")),
            ("loss", loss, ("all", "no-sentinels", "targets")),
            ("overflow", overflow, ("cut", "error")),
        ):
            if text not in accepted:
                raise DataError(f"{name} must be one of {accepted}, got {text!r}")
        if max_length is not None and max_length < 2:
            raise DataError(f"max_length must be at least 2, got {max_length}")
        if pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        given = isinstance(tokenizer, InfillTokens)
        if given and char_cuts:
            raise DataError("char_cuts needs the tokenizer itself, to tokenise parts anew")
        self.tokenizer = None if given else tokenizer
        self.tokens = tokenizer if given else InfillTokens.of(tokenizer)
        self.p_causal, self.level, self.attention, self.loss = p_causal, level, attention, loss
        self.char_cuts, self.max_length, self.overflow = char_cuts, max_length, overflow
        self.pad_to_multiple_of, self.seed = pad_to_multiple_of, seed
        self._rng = np.random.default_rng(seed)
        self._worker: int | None = None

    @abstractmethod
    def _rewrite(
        self, piece: list[int], room: int, rng: np.random.Generator
    ) -> tuple[list[int], int] | None:
        """Return a document rewritten in at most `room` tokens, and where its target starts.

        None if it cannot be: then it stays as it is.
        """

    def apply(self, ids: Sequence[int], rng: np.random.Generator | None = None) -> Example:
        """Return one packed sequence as the objective wants it.

        Parameters
        ----------
        ids
            Token ids, the end of text between documents.
        rng
            Source of randomness; by default the objective's own, which goes on from call to call.

        Raises
        ------
        DataError
            If `ids` is empty or holds a sentinel, or the result is too long and
            ``overflow="error"``.
        """
        rng = self._own_rng() if rng is None else rng
        ids = [int(token) for token in ids]
        if not ids:
            raise DataError("ids must hold at least one token")
        if found := self.tokens.control.intersection(ids):
            raise DataError(
                f"ids hold the sentinel {min(found)} already: escape sentinels in raw text, as "
                "pack(..., on_sentinel='escape') does"
            )
        if rng.random() < self.p_causal:
            self._check_length(len(ids))
            kept = ids[: self.max_length]
            return Example(kept, list(kept), [0] * len(kept), causal=True)
        return self._rewritten(ids, rng)

    def _rewritten(self, ids: list[int], rng: np.random.Generator) -> Example:
        limit = math.inf if self.overflow == "error" else self.max_length or math.inf
        written: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        for number, (piece, ended) in enumerate(self._pieces(ids), start=1):
            # A document at the very end needs no end of text if there is no room for it.
            room = limit - len(written)
            if room <= 0:
                break
            made = self._rewrite(piece, int(min(room, 2**62)), rng)
            if made is None:
                text, target = piece[: int(min(room, len(piece)))], 0
            else:
                text, target = made
            written += text
            labels += self._labels(text, target)
            inside = self.attention == "prefix"
            segments += [number if inside and place < target else 0 for place in range(len(text))]
            if ended and len(written) < limit:
                written.append(self.tokens.eot)
                labels.append(_IGNORED if self.loss == "targets" else self.tokens.eot)
                segments.append(0)
        self._check_length(len(written))
        return Example(written, labels, segments, causal=False)

    def _check_length(self, length: int) -> None:
        if self.overflow == "error" and self.max_length is not None and length > self.max_length:
            raise DataError(
                f"the sequence has {length} tokens, more than max_length={self.max_length}: pack "
                "shorter rows, or use overflow='cut'"
            )

    def _pieces(self, ids: list[int]) -> list[tuple[list[int], bool]]:
        """Return the documents, each with whether an end of text follows."""
        if self.level == "sequence":
            return [(ids, False)]
        pieces: list[tuple[list[int], bool]] = []
        piece: list[int] = []
        for token in ids:
            if token == self.tokens.eot:
                pieces.append((piece, True))
                piece = []
            else:
                piece.append(token)
        return [*pieces, (piece, False)] if piece else pieces

    def _labels(self, text: list[int], target: int) -> list[int]:
        labels = list(text)
        if self.attention == "prefix" or self.loss == "targets":
            labels[:target] = [_IGNORED] * target
        elif self.loss == "no-sentinels":
            for place in range(target):
                if text[place] in self.tokens.control:
                    labels[place] = _IGNORED
        return labels

    def _own_rng(self) -> np.random.Generator:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker:
            self._worker = int(worker.seed)
            self._rng = np.random.default_rng([self.seed, self._worker])
        return self._rng

    def _characters(self, piece: list[int], rng: np.random.Generator) -> str | None:
        """Return a document's text if the coin says so and it survives the way there and back."""
        if not self.char_cuts or rng.random() >= self.char_cuts or self.tokenizer is None:
            return None
        text = self._text(piece)
        return text if "\ufffd" not in text and len(text) >= _SHORTEST else None

    def _text(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch, padded on the right.

        Parameters
        ----------
        features
            Packed sequences: token ids, or mappings with ``input_ids``.

        Returns
        -------
        dict
            ``input_ids`` and ``labels``, int64 ``(B, T)``, labels -100 on padding, and
            ``attention_mask``: int64 ``(B, T)``, or with ``attention="prefix"`` the float32 mask
            ``(B, 1, T, T)`` of `prefix_lm_mask`.
        """
        sequences = [row["input_ids"] if isinstance(row, Mapping) else row for row in features]
        return collate(
            [self.apply(row) for row in sequences],
            pad_id=self._pad_id(),
            prefix=self.attention == "prefix",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def _pad_id(self) -> int:
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return self.tokens.eot if pad is None else int(pad)


def collate(
    examples: Sequence[Example], *, pad_id: int, prefix: bool = False, pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """Return examples as a batch, padded on the right; see `InfillObjective.__call__`."""
    import torch

    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    mask = padded(([1] * len(example.input_ids) for example in examples), 0)
    if prefix:
        mask = prefix_lm_mask(padded((example.segments for example in examples), 0), mask)
    return {
        "input_ids": padded((example.input_ids for example in examples), pad_id),
        "attention_mask": mask,
        "labels": padded((example.labels for example in examples), _IGNORED),
    }


class SpanCorruption(InfillObjective):
    """Causal language modelling mixed with file-level span corruption: CodeGen2's objective.

    In half of the sequences several spans of each document are replaced by sentinels and written
    behind it, so that the same causal decoder learns to fill holes; see `corrupt_spans`.

    Parameters
    ----------
    tokenizer
        With ``<mask_N>``, ``<sep>`` and ``<eom>``; see `add_infill_tokens`.
    ratio
        Range of the masked share of a document, drawn anew for each.
    span_len
        Shortest and longest span in tokens; by default from 1 to a quarter of the document.
    max_sentinels
        Most spans in a document.
    **options
        As for `InfillObjective`: `p_causal`, `level`, `attention`, `loss`, `char_cuts`,
        `max_length`, `overflow`, `pad_to_multiple_of`, `seed`.

    Notes
    -----
    The paper gives neither range; both are this implementation's. Documents below 4 tokens stay as
    they are. With ``p_causal=1`` this is plain causal language modelling.

    References
    ----------
    Erik Nijkamp, Hiroaki Hayashi, Caiming Xiong, Silvio Savarese and Yingbo Zhou. "CodeGen2:
    Lessons for Training LLMs on Programming and Natural Languages". 2023. arXiv:2305.02309.

    Examples
    --------
    >>> tokens = InfillTokens(eot=0, separator=90, end_of_mask=91, masks=(101, 102, 103))
    >>> objective = SpanCorruption(tokens, p_causal=0.0, ratio=(0.3, 0.3), span_len=(3, 3))
    >>> example = objective.apply([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 11, 12])
    >>> example.input_ids
    [1, 2, 101, 6, 7, 8, 9, 0, 90, 101, 3, 4, 5, 91, 0, 11, 12]
    >>> uncorrupt(example.input_ids, tokens)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 11, 12]
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        ratio: tuple[float, float] = (0.05, 0.95),
        span_len: tuple[int, int] | None = None,
        max_sentinels: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if not 0 < ratio[0] <= ratio[1] <= 1:
            raise DataError(f"ratio must be 0 < low <= high <= 1, got {ratio}")
        if span_len is not None and not 1 <= span_len[0] <= span_len[1]:
            raise DataError(f"span_len must be 1 <= shortest <= longest, got {span_len}")
        if max_sentinels < 1:
            raise DataError(f"max_sentinels must be at least 1, got {max_sentinels}")
        self.ratio, self.span_len = ratio, span_len
        masks = self.tokens.for_spans()[2] if self.p_causal < 1 else self.tokens.masks
        self.max_sentinels = min(max_sentinels, len(masks))

    def _rewrite(
        self, piece: list[int], room: int, rng: np.random.Generator
    ) -> tuple[list[int], int] | None:
        if len(piece) < _SHORTEST:
            return None
        written = self._cut_between_characters(piece, rng)
        if written is None or len(written) > room:
            written = self._cut_between_tokens(piece, room, rng)
        if written is None:
            return None
        # The last separator is the only one: raw text has none.
        return written, written.index(self.tokens.for_spans()[0]) + 1

    def _cut_between_tokens(
        self, piece: list[int], room: int, rng: np.random.Generator
    ) -> list[int] | None:
        length, most = len(piece), self.max_sentinels
        while length >= _SHORTEST:
            spans = self._spans(length, most, rng)
            excess = length + 3 * len(spans) + 2 - room
            if excess <= 0:
                return corrupt_spans(piece[:length], spans, self.tokens)
            # With no more spans than now, the shorter document is sure to fit; where that leaves
            # nothing, one span needs the least.
            most, length = len(spans), length - excess
            if length < _SHORTEST and most > 1:
                most, length = 1, min(len(piece), room - 5)
        return None

    def _spans(self, length: int, most: int, rng: np.random.Generator) -> list[Span]:
        return sample_spans(length, rng, ratio=self.ratio, span_len=self.span_len, max_spans=most)

    def _cut_between_characters(
        self, piece: list[int], rng: np.random.Generator
    ) -> list[int] | None:
        text = self._characters(piece, rng)
        if text is None:
            return None
        span_len = self.span_len
        if span_len is not None:  # the range is in tokens
            scale = len(text) / len(piece)
            span_len = (max(1, round(span_len[0] * scale)), max(1, round(span_len[1] * scale)))
        drawn = sample_spans(
            len(text), rng, ratio=self.ratio, span_len=span_len, max_spans=self.max_sentinels
        )
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for start, stop in drawn:
            ids += plain_ids(self.tokenizer, text[position:start])
            inside = plain_ids(self.tokenizer, text[start:stop])
            spans.append((len(ids), len(ids) + len(inside)))
            ids += inside
            position = stop
        ids += plain_ids(self.tokenizer, text[position:])
        if self._text(ids) != text:  # the tokenizer adds or drops characters at the borders
            return None
        return corrupt_spans(ids, spans, self.tokens)


class FillInTheMiddle(InfillObjective):
    """Fill-in-the-middle training, the sceptic's baseline: one hole a document, PSM or SPM.

    Parameters
    ----------
    tokenizer
        With prefix, suffix and middle markers and ``<eom>``; see `add_infill_tokens`.
    spm_rate
        Share of rewritten documents in the suffix-first layout.
    **options
        As for `InfillObjective`.

    Notes
    -----
    The two cuts are uniform. ``<eom>`` ends the middle where the paper uses its end-of-text token,
    which here goes on to mean the end of the document alone.

    References
    ----------
    Mohammad Bavarian, Heewoo Jun, Nikolas Tezak, John Schulman, Christine McLeavey, Jerry Tworek
    and Mark Chen. "Efficient Training of Language Models to Fill in the Middle". 2022.
    arXiv:2207.14255.

    Examples
    --------
    >>> tokens = InfillTokens(eot=0, end_of_mask=91, fim=(81, 82, 83))
    >>> FillInTheMiddle(tokens, p_causal=0.0, spm_rate=0.0, seed=2).apply([1, 2, 3, 4]).input_ids
    [81, 1, 2, 82, 83, 3, 4, 91]
    """

    def __init__(self, tokenizer: Any, *, spm_rate: float = 0.5, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if not 0 <= spm_rate <= 1:
            raise DataError(f"spm_rate must be a probability from 0 to 1, got {spm_rate}")
        self.spm_rate = spm_rate
        if self.p_causal < 1:
            self.tokens.for_fim()
            _checked_cuts([], (0, 0), self.tokens)

    def _rewrite(
        self, piece: list[int], room: int, rng: np.random.Generator
    ) -> tuple[list[int], int] | None:
        suffix_first = rng.random() < self.spm_rate
        text = self._characters(piece, rng)
        ids = piece[: max(0, room - 4)]
        if len(ids) < _SHORTEST:
            return None
        start, stop = sorted(rng.integers(0, len(ids) + 1, size=2).tolist())
        if text is not None:
            cuts = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
            parts = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
            tokenised = [plain_ids(self.tokenizer, part) for part in parts]
            joined = [token for part in tokenised for token in part]
            if len(joined) + 4 <= room and self._text(joined) == text:
                ids, start = joined, len(tokenised[0])
                stop = start + len(tokenised[1])
        layout = spm if suffix_first else psm
        return layout(ids, (start, stop), self.tokens), len(ids) + 3 - (stop - start)


class PrefixLM(InfillObjective):
    """Prefix language modelling: a random first part of each document is read in both directions.

    Parameters
    ----------
    tokenizer
        Any tokenizer: the layout needs no tokens of its own.
    **options
        As for `InfillObjective`; `attention` is ``"prefix"``.

    Examples
    --------
    >>> example = PrefixLM(InfillTokens(eot=0), p_causal=0.0).apply([1, 2, 3, 4, 5, 0, 6, 7])
    >>> example.labels
    [-100, -100, -100, 4, 5, 0, -100, 7]
    >>> example.segments
    [1, 1, 1, 0, 0, 0, 2, 0]
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **{"attention": "prefix", **options})
        if self.attention != "prefix":
            raise DataError("attention of PrefixLM is 'prefix'; for causal use SpanCorruption")

    def _rewrite(
        self, piece: list[int], room: int, rng: np.random.Generator
    ) -> tuple[list[int], int] | None:
        ids = piece[:room]
        return (ids, int(rng.integers(1, len(ids)))) if len(ids) > 1 else None


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixedRows:
    """Rows drawn by a `DataMixture`.

    Parameters
    ----------
    rows
        The rows, in the order drawn.
    sources
        Where each came from.
    counted
        Tokens (or rows) per source.
    epochs
        How often each source was gone through.
    """

    rows: list[Any]
    sources: list[str]
    counted: dict[str, int]
    epochs: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in what was counted."""
        total = sum(self.counted.values())
        return {name: amount / total for name, amount in self.counted.items()}


class DataMixture:
    """Draw rows of several sources in given proportions: the knob between code and prose.

    The next row always comes from the source that is furthest behind its share, so that every
    stretch of training has the proportions, not only the whole. Each source is gone through in a
    new random order every time.

    Parameters
    ----------
    sources
        Rows by name, e.g. packed token sequences.
    weights
        Share of each, scaled to sum to 1; equal if None.
    unit
        What shares are of: ``"tokens"`` or ``"rows"``.
    max_epochs
        How often a source may be gone through before drawing is refused; None for any number.
    seed
        Of the orders.

    Raises
    ------
    DataError
        If a source is empty, or weights do not fit it.

    Examples
    --------
    >>> sources = {"code": [[1] * 4] * 9, "prose": [[2] * 2] * 9}
    >>> DataMixture(sources, {"code": 2, "prose": 1}).take(24).counted
    {'code': 16, 'prose': 8}
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Sequence[int]]],
        weights: Mapping[str, float] | None = None,
        *,
        unit: Literal["tokens", "rows"] = "tokens",
        max_epochs: float | None = None,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise DataError("sources must hold at least one source")
        weights = dict.fromkeys(sources, 1.0) if weights is None else weights
        if set(weights) != set(sources):
            raise DataError(
                f"weights must name the sources {sorted(sources)}, got {sorted(weights)}"
            )
        for name, rows in sources.items():
            if not math.isfinite(weights[name]) or weights[name] < 0:
                raise DataError(f"weights[{name!r}] must be 0 or above, got {weights[name]}")
            if weights[name] and (not len(rows) or not all(len(row) for row in rows)):
                raise DataError(f"source {name!r} has no rows, or an empty row")
        total = sum(weights.values())
        if total <= 0:
            raise DataError("weights must not all be 0")
        if unit not in ("tokens", "rows"):
            raise DataError(f"unit must be 'tokens' or 'rows', got {unit!r}")
        self.sources = dict(sources)
        self.weights = {name: weights[name] / total for name in sources}
        self.unit, self.max_epochs, self.seed = unit, max_epochs, seed

    def take(self, amount: int) -> MixedRows:
        """Return rows until at least `amount` tokens (or rows) are counted.

        The same from call to call; a larger amount begins with the same rows.

        Raises
        ------
        DataError
            If a source would be gone through more often than `max_epochs`.
        """
        if amount < 1:
            raise DataError(f"amount must be at least 1, got {amount}")
        names = [name for name, weight in self.weights.items() if weight > 0]
        generators = {
            name: np.random.default_rng([self.seed, number]) for number, name in enumerate(names)
        }
        waiting: dict[str, list[int]] = {name: [] for name in names}
        drawn = dict.fromkeys(self.sources, 0)
        counted = dict.fromkeys(self.sources, 0)
        rows: list[Any] = []
        origins: list[str] = []
        total = 0
        while total < amount:
            name = max(names, key=lambda name: self.weights[name] * (total + 1) - counted[name])
            size = len(self.sources[name])
            if self.max_epochs is not None and drawn[name] >= self.max_epochs * size:
                raise DataError(
                    f"source {name!r} would be gone through more than {self.max_epochs} times for "
                    f"{amount} {self.unit}: give it a smaller weight, or take less"
                )
            if not waiting[name]:
                waiting[name] = generators[name].permutation(size).tolist()
            row = self.sources[name][waiting[name].pop()]
            step = len(row) if self.unit == "tokens" else 1
            drawn[name] += 1
            counted[name] += step
            total += step
            rows.append(row)
            origins.append(name)
        epochs = {
            name: drawn[name] / len(rows_of) if len(rows_of) else 0.0
            for name, rows_of in self.sources.items()
        }
        return MixedRows(rows, origins, counted, epochs)


# Training -----------------------------------------------------------------------------------------


@dataclass
class TrainingHistory:
    """What `train_decoder` saw.

    Parameters
    ----------
    losses
        Mean loss per step, in nats per token that carries loss.
    n_tokens
        Tokens read after each step in all, sentinels and moved text included, padding not.
    n_causal_tokens
        Those of sequences that were left as they are.
    """

    losses: list[float] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    n_causal_tokens: list[int] = field(default_factory=list)


def train_decoder(
    model: Any,
    objective: InfillObjective,
    rows: Sequence[Sequence[int]],
    *,
    steps: int | None = None,
    n_tokens: int | None = None,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    final_learning_rate: float = 0.1,
    warmup: float = 0.02,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    max_norm: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingHistory:
    """Train a small causal decoder with an objective: AdamW, warm-up, cosine decay.

    Parameters
    ----------
    model
        A transformers causal language model; trained in place, left in its own mode.
    objective
        `SpanCorruption`, `FillInTheMiddle`, `PrefixLM`; ``SpanCorruption(..., p_causal=1)`` is
        plain language modelling.
    rows
        Packed sequences, gone through in a new order as often as it takes.
    steps, n_tokens
        How long, one of the two: steps, or tokens read, sentinels and moved text included. Equal
        `n_tokens` is equal compute.
    batch_size
        Sequences per step.
    learning_rate, final_learning_rate
        The peak, and the end as a share of it.
    warmup
        Share of the training in which the rate grows linearly.
    weight_decay, betas, max_norm
        Of AdamW, and of the gradient's norm. Vectors (norms, biases) do not decay.
    seed
        Of the order and of dropout. The objective's draws have their own seed.
    progress
        Called with (steps or tokens done, in total).

    Returns
    -------
    TrainingHistory

    Raises
    ------
    DataError
        If not exactly one of `steps` and `n_tokens` is given, or there are no rows.
    """
    import torch

    if (steps is None) == (n_tokens is None):
        raise DataError(f"give steps or n_tokens, one of the two; got {steps} and {n_tokens}")
    total = int(steps if steps is not None else n_tokens or 0)
    if total < 1 or not rows or batch_size < 1:
        raise DataError(
            f"steps or n_tokens, batch_size and the number of rows must be at least 1, got "
            f"{total}, {batch_size} and {len(rows)}"
        )
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=betas,
    )
    rng = np.random.default_rng(seed)
    order: list[int] = []
    history = TrainingHistory()
    done = read = causal = 0
    was_training = bool(model.training)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.train()
        try:
            while done < total:
                while len(order) < batch_size:
                    order = rng.permutation(len(rows)).tolist() + order
                chosen = [rows[order.pop()] for _ in range(batch_size)]
                examples = [objective.apply(row) for row in chosen]
                rate = _rate(done / total, warmup, final_learning_rate)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate
                loss = _loss(model, objective, examples)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                lengths = [len(example.input_ids) for example in examples]
                read += sum(lengths)
                causal += sum(
                    n for n, example in zip(lengths, examples, strict=True) if example.causal
                )
                history.losses.append(float(loss.detach()))
                history.n_tokens.append(read)
                history.n_causal_tokens.append(causal)
                done = len(history.losses) if steps is not None else read
                if progress is not None:
                    progress(min(done, total), total)
        finally:
            model.train(was_training)
    return history


def _rate(fraction: float, warmup: float, final: float) -> float:
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    along = (fraction - warmup) / max(1e-9, 1 - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, along))) / 2


def _loss(model: Any, objective: InfillObjective, examples: list[Example]) -> Tensor:
    prefix = objective.attention == "prefix"
    batch = collate(examples, pad_id=objective._pad_id(), prefix=prefix)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    if prefix:
        batch["attention_mask"] = batch["attention_mask"].to(model.dtype)
        # float32's most negative number is minus infinity in half precision, which is fine: every
        # token sees itself at least.
    output = model(**batch)
    # The mean over no token at all would be NaN, and so would be every weight after it.
    predicts = bool((batch["labels"][:, 1:] != _IGNORED).any())
    loss: Tensor = output.loss if predicts else output.logits.sum() * 0
    return loss
