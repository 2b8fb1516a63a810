"""Prompts whose answer cannot depend on the order of marked pieces (set-based prompting).

A piece of a set sees what stands before the set and itself; all pieces begin at one position; what
follows sees everything. No weight is changed: the attention mask and the position ids are. The
plain order and the permute-and-vote that people use today answer through the same two methods,
`generate` and `score`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bakeoff.errors import DataError, ModelError
from bakeoff.models.attention import backbone, transformer_layers
from bakeoff.models.inference import evaluating

METHOD = {
    "slug": "set-based-prompting",
    "title": "Set-based prompting",
    "paper": "McIlroy-Young et al., Order-Independence Without Fine Tuning, NeurIPS 2024, "
    "arXiv 2406.06581",
    "designs": ["set-based"],
    "names": [
        "OrderEnsembleModel",
        "PlainOrderModel",
        "SetBatch",
        "SetPrompt",
        "SetPromptingModel",
        "encode_prompts",
        "order_free",
    ],
}

START, SPLIT, END = "<|start_2d|>", "<|split_2d|>", "<|end_2d|>"
"""Markers of the inline form ``prefix START piece SPLIT piece END suffix``."""

Progress = Callable[[int, int], None]
Rule = Literal["likelihood", "generated"]
Normalize = Literal["mean", "sum"]

_MARKERS = re.compile(f"({'|'.join(map(re.escape, (START, SPLIT, END)))})")
_BACKENDS = ("eager", "sdpa")
_MOST_ORDERS = 40_320  # 8!: more are a mistake, and there is `n` to draw some of them
# What `generate` can be told that would run the model on other ids than the encoded prompts, or
# keep keys in a shape that cannot be masked column by column.
_REFUSED = {
    "input_ids": "the prompts are the input",
    "inputs": "the prompts are the input",
    "inputs_embeds": "the prompts are the input",
    "attention_mask": "the mask is what this method makes",
    "position_ids": "the positions are what this method makes",
    "past_key_values": "a cache of other text is no part of the set",
    "cache_implementation": "only the default cache, which grows, can be masked",
    "assistant_model": "a draft model would read the pieces in their listed order",
    "prompt_lookup_num_tokens": "it copies from the pieces in their listed order",
    "guidance_scale": "its unconditional pass has no set",
    "negative_prompt_ids": "its unconditional pass has no set",
}
# What a pass costs beyond its tokens, in tokens: weights are read, kernels are started. The key
# says whether it runs on a CPU.
_START_UP_TOKENS = {False: 1024, True: 48}
_VERIFIED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


# Prompts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetPrompt:
    """A prompt with unordered pieces: ``prefix {a, b, c} suffix``.

    Parameters
    ----------
    prefix
        Text before the first set; may be empty.
    groups
        The sets, one after the other; each a sequence of at least one piece. A piece is a text or
        again a `SetPrompt`, for a set inside a piece (then its suffix may be empty). A set of one
        piece is ordinary text.
    suffix
        Text after the last set, where the answer is predicted from.
    between
        Text between consecutive sets, one fewer than there are sets; empty means none anywhere.

    Raises
    ------
    DataError
        If a set or a piece is empty, a group is a plain string, or `between` has another length.

    Notes
    -----
    Numbers or letters in front of the pieces ("1.", "(b)") belong to the text: they would be
    another set in another order. Nothing stands between two pieces but what they bring along, so
    end each in a separator (`from_options` and `from_passages` do).

    References
    ----------
    Reid McIlroy-Young, Katrina Brown, Conlan Olson, Linjun Zhang and Cynthia Dwork.
    "Order-Independence Without Fine Tuning". NeurIPS 2024. arXiv:2406.06581.

    Examples
    --------
    >>> prompt = SetPrompt("Which is a fruit? ", [["'oak' ", "'fig' "]], "Answer:")
    >>> prompt.n_orders
    2
    >>> [order.text for order in prompt.orders()]
    ["Which is a fruit? 'oak' 'fig' Answer:", "Which is a fruit? 'fig' 'oak' Answer:"]
    >>> SetPrompt.parse("Q <|start_2d|>a <|split_2d|>b <|end_2d|>A:").groups
    (('a ', 'b '),)
    """

    prefix: str
    groups: Sequence[Sequence[str | SetPrompt]]
    suffix: str
    between: Sequence[str] = ()

    def __post_init__(self) -> None:
        groups = []
        for number, group in enumerate(self.groups):
            if isinstance(group, str | SetPrompt) or not isinstance(group, Sequence):
                raise DataError(
                    f"groups[{number}] must be a sequence of pieces, got {group!r}; one set is "
                    "groups=[[piece, piece, ...]]"
                )
            if not group:
                raise DataError(f"groups[{number}] has no pieces: give at least one")
            for place, piece in enumerate(group):
                if not isinstance(piece, str | SetPrompt):
                    raise DataError(
                        f"groups[{number}][{place}] must be a text or a SetPrompt, got {piece!r}"
                    )
                if piece == "":
                    raise DataError(f"groups[{number}][{place}] is empty: every piece needs text")
            groups.append(tuple(group))
        between = tuple(self.between) or ("",) * max(len(groups) - 1, 0)
        if isinstance(self.between, str) or len(between) != max(len(groups) - 1, 0):
            raise DataError(
                f"between must hold one text fewer than there are groups ({len(groups)}), got "
                f"{self.between!r}"
            )
        for name, text in (("prefix", self.prefix), ("suffix", self.suffix)):
            if not isinstance(text, str):
                raise DataError(f"{name} must be a text, got {text!r}")
        object.__setattr__(self, "groups", tuple(groups))
        object.__setattr__(self, "between", between)

    @classmethod
    def parse(cls, text: str) -> SetPrompt:
        """Read the inline form, markers included.

        Parameters
        ----------
        text
            ``prefix<|start_2d|>piece<|split_2d|>piece<|end_2d|>suffix``; several sets may follow
            one another, and a piece may contain a set. The markers are removed.

        Returns
        -------
        SetPrompt
            The prompt; without markers, one without sets.

        Raises
        ------
        DataError
            If the markers are not balanced or a piece is empty.
        """
        parts = _MARKERS.split(text)
        prompt, stop = cls._parse(parts, 0)
        if stop < len(parts):
            raise DataError(f"{parts[stop]} without {START} before it, in {_short(text)}")
        return prompt

    @classmethod
    def _parse(cls, parts: list[str], at: int) -> tuple[SetPrompt, int]:
        """Read texts and sets until a marker that ends the piece, or the end."""
        texts, groups = [parts[at]], []
        at += 1
        while at < len(parts) and parts[at] == START:
            group: list[str | SetPrompt] = []
            while True:
                piece, at = cls._parse(parts, at + 1)
                group.append(piece if piece.groups else piece.prefix)
                if at >= len(parts):
                    raise DataError(f"{START} without {END} after it, in {_short(''.join(parts))}")
                if parts[at] == END:
                    break
            groups.append(group)
            texts.append(parts[at + 1])
            at += 2
        suffix = texts.pop() if groups else ""
        return cls(texts[0], groups, suffix, texts[1:]), at

    @classmethod
    def from_options(
        cls, question: str, options: Sequence[str], *, answer: str = "\nAnswer:"
    ) -> SetPrompt:
        """Make a multiple-choice prompt: the options are a set, each in double quotes.

        Parameters
        ----------
        question
            The question.
        options
            The options; their double quotes become single ones.
        answer
            The suffix.
        """
        quoted = ['"' + option.replace('"', "'") + '" ' for option in options]
        return cls(f"{question}\n", [quoted], answer)

    @classmethod
    def from_passages(
        cls,
        question: str,
        passages: Sequence[str],
        *,
        instruction: str = "Answer the question with the help of the passages.\n",
        passage_format: str = "Passage: {}\n",
        question_format: str = "Question: {}\nAnswer:",
    ) -> SetPrompt:
        """Make a prompt for retrieval: the passages are a set, whatever the retriever's order.

        Parameters
        ----------
        question
            The question, behind the passages.
        passages
            What was retrieved.
        instruction
            Text before the passages.
        passage_format, question_format
            Formats with one ``{}``.
        """
        pieces = [passage_format.format(passage) for passage in passages]
        return cls(instruction, [pieces], question_format.format(question))

    @property
    def text(self) -> str:
        """The plain prompt: everything joined in the listed order."""
        return self._join("", "", "")

    @property
    def marked(self) -> str:
        """The inline form that `parse` reads."""
        return self._join(START, SPLIT, END)

    def _join(self, start: str, split: str, end: str) -> str:
        parts = [self.prefix]
        for group, after in zip(self.groups, (*self.between, self.suffix), strict=False):
            pieces = (p if isinstance(p, str) else p._join(start, split, end) for p in group)
            parts += [start, split.join(pieces), end, after]
        return "".join(parts if self.groups else [self.prefix, self.suffix])

    @property
    def n_orders(self) -> int:
        """Number of orders of all sets together: the product of their factorials."""
        return math.prod(self._radices())

    def _radices(self) -> list[int]:
        """Return the range of each digit that together number the orders."""
        radices: list[int] = []
        for group in self.groups:
            radices += range(len(group), 0, -1)
            for piece in group:
                if isinstance(piece, SetPrompt):
                    radices += piece._radices()
        return radices

    def _in_order(self, digits: Iterator[int]) -> SetPrompt:
        groups = []
        for group in self.groups:
            # The d-th of the pieces that are left, again and again (Lehmer's code).
            picks = list(itertools.islice(digits, len(group)))
            left = [p if isinstance(p, str) else p._in_order(digits) for p in group]
            groups.append([left.pop(pick) for pick in picks])
        return SetPrompt(self.prefix, groups, self.suffix, self.between)

    def orders(self, n: int | None = None, *, random_state: int = 0) -> list[SetPrompt]:
        """Return the prompt in all its orders, or in `n` different ones drawn at random.

        Parameters
        ----------
        n
            How many; None, or as many as there are, means all, the listed order first.
        random_state
            Seed of the draw.

        Returns
        -------
        list of SetPrompt
            Different permutations; equal pieces count as different.

        Raises
        ------
        DataError
            If `n` is below 1, or all of more than 40,320 orders are asked for.
        """
        radices, total = self._radices(), self.n_orders
        if n is not None and n < 1:
            raise DataError(f"n must be at least 1, got {n}")
        count = total if n is None else min(n, total)
        if count == total:
            if total > _MOST_ORDERS:
                raise DataError(f"there are {total} orders: give n, at most {_MOST_ORDERS}")
            chosen = list(itertools.product(*map(range, radices)))
        else:
            rng = np.random.default_rng(random_state)
            if total <= _MOST_ORDERS:
                every = list(itertools.product(*map(range, radices)))
                chosen = [every[i] for i in rng.choice(total, count, replace=False)]
            else:
                drawn: dict[tuple[int, ...], None] = {}
                while len(drawn) < count:
                    drawn[tuple(int(rng.integers(radix)) for radix in radices)] = None
                chosen = list(drawn)
        return [self._in_order(iter(digits)) for digits in chosen]

    def sorted(self) -> SetPrompt:
        """Return the prompt with the pieces of every set in alphabetical order.

        All orders of a prompt become one. That alone makes any model's answer independent of the
        listed order, but not of the position that the alphabet gives each piece.
        """
        groups = []
        for group in self.groups:
            pieces = [piece if isinstance(piece, str) else piece.sorted() for piece in group]
            groups.append(sorted(pieces, key=_sort_key))
        return SetPrompt(self.prefix, groups, self.suffix, self.between)

    def encode(self, tokenizer: Any, *, add_special_tokens: bool = True) -> dict[str, Tensor]:
        """Return what a forward pass needs, in the listed order.

        Parameters
        ----------
        tokenizer
            A transformers tokenizer.
        add_special_tokens
            Whether the prefix gets the tokenizer's beginning-of-sequence token. Give False where
            the text, such as a chat template's, already has it.

        Returns
        -------
        dict
            ``input_ids`` and ``position_ids``, int64 ``(1, N)``; ``attention_mask_4d``, bool
            ``(1, 1, N, N)``, True where the row's token may attend to the column's.

        Raises
        ------
        DataError
            As `encode_prompts`.
        """
        batch = encode_prompts(
            [self], tokenizer, canonical_order=False, add_special_tokens=add_special_tokens
        )
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask_4d": batch.mask_4d(),
        }


def _sort_key(piece: str | SetPrompt) -> tuple[bool, str]:
    return (False, piece) if isinstance(piece, str) else (True, piece.marked)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# From text to columns -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Token ids that stand in order."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Set:
    """Token sequences without order."""

    pieces: tuple[_Sequence, ...]


_Sequence = tuple[_Run | _Set, ...]


def _tokenize(prompt: SetPrompt, tokenizer: Any, *, special: bool, where: str) -> _Sequence:
    """Tokenise every text by itself: merges across a border would depend on the order."""
    items: list[_Run | _Set] = [_Run(_text_ids(tokenizer, prompt.prefix, special))]
    for number, group in enumerate(prompt.groups):
        pieces = []
        for place, piece in enumerate(group):
            name = f"{where}.groups[{number}][{place}]"
            if isinstance(piece, str):
                tokens: _Sequence = (_Run(_text_ids(tokenizer, piece, False)),)
            else:
                tokens = _tokenize(piece, tokenizer, special=False, where=name)
            if not _n_tokens(tokens):
                raise DataError(
                    f"{where}.groups[{number}] has a piece without tokens: {_short(str(piece))}"
                )
            pieces.append(tokens)
        after = (*prompt.between, prompt.suffix)[number]
        items += [_Set(tuple(pieces)), _Run(_text_ids(tokenizer, after, False))]
    if not prompt.groups:
        items.append(_Run(_text_ids(tokenizer, prompt.suffix, False)))
    return tuple(items)


def _text_ids(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    if not text and not special:
        return ()
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def _check_tokenizer(tokenizer: Any, special: bool) -> None:
    """Refuse a tokenizer that puts special tokens where a text is to be continued."""
    blank = list(tokenizer("", add_special_tokens=False)["input_ids"])
    if blank:
        raise DataError(
            f"tokenizer adds special tokens ({tokenizer.convert_ids_to_tokens(blank)}) to every "
            "piece although told not to: give one that honours add_special_tokens=False"
        )
    plain, dressed = (_text_ids(tokenizer, "a", dress) for dress in (False, True))
    if special and dressed[len(dressed) - len(plain) :] != plain:
        raise DataError(
            "tokenizer appends special tokens, so that the text would end before the set: give one "
            "that adds them in front only, or add_special_tokens=False"
        )


def _n_tokens(sequence: _Sequence) -> int:
    return sum(
        len(item.ids) if isinstance(item, _Run) else sum(map(_n_tokens, item.pieces))
        for item in sequence
    )


@dataclass
class _Columns:
    """Token columns of one row, laid out from left to right."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    # Which piece of which set a token is in, from the outermost set to the innermost.
    paths: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    position: int = 0
    n_sets: int = 0

    def lay(
        self,
        sequence: _Sequence,
        path: tuple[tuple[int, int], ...] = (),
        *,
        edit_positions: bool = True,
        edit_mask: bool = True,
    ) -> _Columns:
        for item in sequence:
            if isinstance(item, _Run):
                n = len(item.ids)
                self.ids += item.ids
                self.positions += range(self.position, self.position + n)
                self.paths += [path] * n
                self.position += n
                continue
            number, start, ends = self.n_sets, self.position, []
            self.n_sets += 1
            for place, piece in enumerate(item.pieces):
                if edit_positions:
                    self.position = start
                self.lay(
                    piece,
                    (*path, (number, place)) if edit_mask else path,
                    edit_positions=edit_positions,
                    edit_mask=edit_mask,
                )
                ends.append(self.position)
            # What follows starts behind the longest piece; shorter ones leave a gap.
            self.position = max(ends)
        return self


@dataclass(frozen=True, eq=False)
class SetBatch(Mapping[str, Tensor]):
    """Encoded prompts: as a mapping, the `input_ids` and `attention_mask` of a transformers model.

    ``model.generate(**batch)`` is therefore the plain prompt in its encoded order, and inside
    ``with order_free(model, batch)`` the order-free one.

    Parameters
    ----------
    input_ids
        int64 ``(B, T)``, padding included.
    attention_mask
        int64 ``(B, T)``, 1 at tokens and 0 at padding.
    position_ids
        int64 ``(B, T)``: the edited positions; 0 at padding.
    sets, pieces
        int64 ``(B, L, T)``: for each of L levels of nesting, the number of the set and of the piece
        in it that a token belongs to; -1 outside sets.
    next_positions
        int64 ``(B,)``: the position of the first generated token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    sets: Tensor
    pieces: Tensor
    next_positions: Tensor

    def __getitem__(self, key: str) -> Tensor:
        if key not in ("input_ids", "attention_mask"):
            raise KeyError(key)
        value: Tensor = getattr(self, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        return 2

    @property
    def n_prompts(self) -> int:
        """Number of rows B."""
        return len(self.input_ids)

    @property
    def n_columns(self) -> int:
        """Number of columns T, padding included."""
        return self.input_ids.shape[1]

    @property
    def edits(self) -> bool:
        """Whether any row's mask or positions differ from the plain prompt's."""
        plain = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0) * self.attention_mask
        return bool((self.sets >= 0).any() or (plain != self.position_ids).any())

    def to(self, device: Any) -> SetBatch:
        """Return the batch with its tensors on `device`."""
        return SetBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def repeat(self, times: int) -> SetBatch:
        """Return the batch with every row `times` times in a row, as beams are."""
        if times == 1:
            return self
        repeated = (
            getattr(self, name).repeat_interleave(times, dim=0)
            for name in self.__dataclass_fields__
        )
        return SetBatch(*repeated)

    def positions(self, first: int, last: int) -> Tensor:
        """Return the positions ``(B, last - first)`` of columns; those from T on are generated."""
        extra = torch.arange(max(last - self.n_columns, 0), device=self.position_ids.device)
        every = torch.cat([self.position_ids, self.next_positions[:, None] + extra], dim=1)
        return every[:, first:last]

    def allowed(
        self, first: int, last: int, *, window: int | None = None, chunk: int | None = None
    ) -> Tensor:
        """Return which columns the columns `first` to `last` may attend to.

        Parameters
        ----------
        first, last
            Queries, ``first <= column < last``; columns from T on are generated tokens, which see
            all before them.
        window
            Only keys at positions above the query's position minus this number.
        chunk
            Only keys at positions in the query's own block of this size.

        Returns
        -------
        bool tensor of shape (B, last - first, last)
            A padding column attends at least to itself, so that no row is empty.
        """
        device, n_rows, n_prompt = self.input_ids.device, self.n_prompts, self.n_columns
        columns = torch.arange(last, device=device)
        queries = columns[first:]
        mask = (columns <= queries[:, None]).expand(n_rows, -1, -1).clone()
        mask[:, :, :n_prompt] &= self.attention_mask[:, None, :last].bool()
        prompt_queries = min(n_prompt, last) - first
        if prompt_queries > 0:
            for level in range(self.sets.shape[1]):
                sets, pieces = self.sets[:, level, :last], self.pieces[:, level, :last]
                own_set, own_piece = sets[:, first:, None], pieces[:, first:, None]
                apart = (own_set == sets[:, None]) & (own_piece != pieces[:, None])
                mask[:, :prompt_queries, : apart.shape[2]] &= ~apart
        if window is not None or chunk is not None:
            keys = self.positions(0, last)
            own = keys[:, first:, None]
            if window is not None:
                mask &= keys[:, None] > own - window
            if chunk is not None:
                mask &= keys[:, None] // chunk == own // chunk
        return mask | (columns == queries[:, None])

    def mask_4d(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the attention mask ``(B, 1, T, T)`` of the prompts.

        Parameters
        ----------
        dtype
            None for booleans, True where the row's token may attend to the column's; a floating
            dtype for the additive form, 0 and the dtype's lowest number.
        """
        return _as_mask(self.allowed(0, self.n_columns), dtype)


def _as_mask(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    mask = allowed[:, None]
    if dtype is None:
        return mask
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


def encode_prompts(
    prompts: Sequence[SetPrompt],
    tokenizer: Any,
    *,
    canonical_order: bool = True,
    add_special_tokens: bool = True,
    edit_positions: bool = True,
    edit_mask: bool = True,
    padding_side: Literal["left", "right"] = "left",
) -> SetBatch:
    """Tokenise prompts, every text by itself, and lay out positions and mask.

    Parameters
    ----------
    prompts
        B prompts, or their inline forms with markers.
    tokenizer
        A transformers tokenizer.
    canonical_order
        Whether the pieces of each set are sorted by their text first. The result is the same in
        exact arithmetic; with it, floating-point numbers are added in one order too, so that all
        orders of a prompt give the same bits.
    add_special_tokens
        Whether each prefix gets the tokenizer's beginning-of-sequence token.
    edit_positions, edit_mask
        The two edits; with one of them off the order matters (for ablations).
    padding_side
        ``"left"`` for generation.

    Returns
    -------
    SetBatch
        On the CPU.

    Raises
    ------
    DataError
        If there is no prompt, a piece has no tokens, a prompt has no token behind its last set, or
        the tokenizer adds special tokens to pieces or behind the prefix.
    """
    if padding_side not in ("left", "right"):
        raise DataError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    rows = []
    _check_tokenizer(tokenizer, add_special_tokens)
    for number, prompt in enumerate(_as_prompts(prompts, canonical_order)):
        sequence = _sequence_of(prompt, tokenizer, add_special_tokens, f"prompts[{number}]")
        rows.append(_Columns().lay(sequence, edit_positions=edit_positions, edit_mask=edit_mask))
    return _stack(rows, _pad_id(tokenizer), padding_side)


def _as_prompts(prompts: Sequence[SetPrompt | str], canonical: bool) -> list[SetPrompt]:
    if isinstance(prompts, str | SetPrompt):
        raise DataError("prompts must be a sequence of prompts; for one prompt give [prompt]")
    if not len(prompts):
        raise DataError("prompts must hold at least one prompt")
    parsed = [SetPrompt.parse(p) if isinstance(p, str) else p for p in prompts]
    return [prompt.sorted() for prompt in parsed] if canonical else parsed


def _sequence_of(prompt: SetPrompt, tokenizer: Any, special: bool, where: str) -> _Sequence:
    sequence = _tokenize(prompt, tokenizer, special=special, where=where)
    if prompt.groups and not _n_tokens(sequence[-1:]):
        raise DataError(
            f"{where}.suffix has no tokens: the answer is predicted from the last token, which "
            "must not belong to a piece"
        )
    if not _n_tokens(sequence):
        raise DataError(f"{where} has no tokens")
    return sequence


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0  # never attended to


def _stack(rows: Sequence[_Columns], pad: int, side: str = "left") -> SetBatch:
    width = max(len(row.ids) for row in rows)
    depth = max((len(path) for row in rows for path in row.paths), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    sets = torch.full((len(rows), depth, width), -1, dtype=torch.long)
    pieces = torch.full_like(sets, -1)
    for number, row in enumerate(rows):
        n = len(row.ids)
        place = slice(width - n, width) if side == "left" else slice(n)
        ids[number, place] = torch.tensor(row.ids, dtype=torch.long)
        mask[number, place] = 1
        positions[number, place] = torch.tensor(row.positions, dtype=torch.long)
        if depth:
            paths = torch.tensor([[*path, *[(-1, -1)] * (depth - len(path))] for path in row.paths])
            sets[number, :, place] = paths[..., 0].T
            pieces[number, :, place] = paths[..., 1].T
    following = torch.tensor([row.position for row in rows])
    return SetBatch(ids, mask, positions, sets, pieces, following)


# The model ----------------------------------------------------------------------------------------


@contextmanager
def order_free(model: Any, batch: SetBatch) -> Iterator[Any]:
    """Inside a `with` block, a model reads an encoded batch as sets; afterwards it is as before.

    Forward passes and everything built on them (`model.generate` with sampling, beams, processors,
    streamers; a training step) get the mask and the positions of the batch, and continue behind the
    longest piece. A batch without sets is read as ever.

    Parameters
    ----------
    model
        A transformers decoder, with or without its language-model head, or a PEFT model around one.
    batch
        From `encode_prompts`. Inside the block the model reads this batch and its continuations,
        nothing else.

    Yields
    ------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    ModelError
        If the attention backend is not ``"eager"`` or ``"sdpa"`` (others ignore such a mask or
        refuse it), or the model cannot be order-free: it takes no position ids (ALiBi), has layers
        without attention (recurrent, convolutional), or a probe on first use finds that the order
        still shows.
    DataError
        If the prompts need more positions than the model has; inside the block, if the model is
        given other input ids, or a cache of fixed size.

    Notes
    -----
    Sliding windows and attention chunks are measured between edited positions, so that they hold
    no trace of the order either; their keys are all kept while the block lasts. Learned absolute
    positions are looked up at the edited ones.

    Examples
    --------
    >>> batch = encode_prompts([prompt], tokenizer)  # doctest: +SKIP
    >>> with order_free(model, batch):  # doctest: +SKIP
    ...     output = model.generate(**batch, max_new_tokens=10)
    """
    inner = _stack_owner(model)
    if not batch.edits:
        yield model
        return
    _refuse_backend(inner)
    _verify(model, inner)
    with _reading(inner, batch):
        yield model


@contextmanager
def _reading(inner: Any, batch: SetBatch) -> Iterator[None]:
    """Give a backbone the mask and positions of a batch for a while."""
    config = inner.config.get_text_config()
    kinds = _attention_kinds(inner)
    limit = _n_positions(inner)
    _check_positions(batch, 0, limit)
    highest = int(batch.next_positions.max())
    names = list(inspect.signature(inner.forward).parameters)
    dtype = inner.get_input_embeddings().weight.dtype
    placed: dict[Any, SetBatch] = {}

    def rewrite(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, **dict(zip(names, args, strict=False))}
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None or given.shape[0] % batch.n_prompts:
            raise DataError(
                "inside order_free the model reads the batch it was given, of "
                f"{batch.n_prompts} prompts, got input of shape "
                f"{None if given is None else tuple(given.shape)}"
            )
        times = given.shape[0] // batch.n_prompts
        if (given.device, times) not in placed:
            placed[given.device, times] = batch.to(given.device).repeat(times)
        rows = placed[given.device, times]
        cache = _growing_cache(kwargs, config, kinds)
        first = 0 if cache is None else int(cache.get_seq_length())
        last = first + given.shape[1]
        prompt_part = rows.input_ids[:, first:last]
        seen = kwargs.get("input_ids")
        if seen is not None and not torch.equal(seen[:, : prompt_part.shape[1]], prompt_part):
            raise DataError(
                "inside order_free the model reads only the batch it was given and what is "
                "generated from it, got other input_ids"
            )
        if last < batch.n_columns and cache is None:
            raise DataError(
                f"inside order_free the model was given {last} of the batch's {batch.n_columns} "
                "columns and no cache"
            )
        _check_positions(batch, last - batch.n_columns, limit, highest)
        additive = torch.get_autocast_dtype(given.device.type) if _autocast(given) else dtype
        masks = {
            kind: _as_mask(rows.allowed(first, last, **how), additive)
            for kind, how in kinds.items()
        }
        kwargs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        kwargs["position_ids"] = rows.positions(first, last)
        return (), kwargs

    hook = inner.register_forward_pre_hook(rewrite, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _stack_owner(model: Any) -> Any:
    """Return the innermost transformers model that holds the layers.

    Every pass runs it as a module, hooks included: a head may pass over the model around it (OPT),
    and PEFT calls the `forward` of the outermost one directly.
    """
    from transformers import PreTrainedModel

    inner = backbone(model)
    layers = transformer_layers(inner)
    if layers is not None:
        for module in inner.modules():
            if isinstance(module, PreTrainedModel) and any(m is layers for m in module.modules()):
                inner = module  # parents come first
    return inner


def _autocast(given: Tensor) -> bool:
    return torch.is_autocast_enabled(given.device.type)


def _n_positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_positions(
    batch: SetBatch, n_generated: int, limit: int | None, highest: int | None = None
) -> None:
    highest = int(batch.next_positions.max()) if highest is None else highest
    needed = highest + max(n_generated, 0)
    if limit is not None and needed > limit:
        raise DataError(
            f"the prompts need {highest} positions"
            + (f" and the answer {n_generated}" if n_generated > 0 else "")
            + f", the model has {limit}: shorten the text around the sets or the longest piece"
        )


def _growing_cache(kwargs: dict[str, Any], config: Any, kinds: dict[str, Any]) -> Any:
    """Return the cache, after putting one that keeps every key in place of one that forgets."""
    from transformers import DynamicCache

    cache = kwargs.get("past_key_values")
    windowed = any(kinds.values())
    if cache is None:
        wanted = kwargs.get("use_cache")
        if windowed and (getattr(config, "use_cache", False) if wanted is None else wanted):
            # Left to itself the model would make a cache that drops keys by column, not position.
            cache = kwargs["past_key_values"] = DynamicCache()
        return cache
    if any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        raise DataError(
            f"order_free takes a cache that grows, got {type(cache).__name__}: leave "
            "cache_implementation and past_key_values at their defaults"
        )
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        if cache.get_seq_length():
            raise DataError(
                "order_free cannot continue from a cache that drops keys outside a sliding window: "
                "start with an empty one"
            )
        cache = kwargs["past_key_values"] = DynamicCache()
    return cache


def _refuse_backend(inner: Any) -> None:
    used = inner.config.get_text_config()._attn_implementation
    if used not in _BACKENDS:
        raise ModelError(
            f"attention backend {used!r} does not take the mask of a set: load the model with "
            "attn_implementation='sdpa' (or 'eager'), or call model.set_attn_implementation('sdpa')"
        )


def _attention_kinds(inner: Any) -> dict[str, dict[str, int]]:
    """Return, per kind of layer, how far it looks: the arguments of `SetBatch.allowed`."""
    config = inner.config.get_text_config()
    kind_of_model = getattr(config, "model_type", "unknown")
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ModelError(
            f"a model of type {kind_of_model!r} takes no position_ids (ALiBi or no attention), so "
            "that the order of pieces cannot be hidden from it: choose one with rotary or learned "
            "positions, such as Llama, Qwen, Gemma, Mistral, GPT-2"
        )
    types = getattr(config, "layer_types", None)
    if not types:
        windowed = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            windowed = None
        types = ["sliding_attention" if windowed else "full_attention"]
    kinds: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(types):
        if name == "full_attention":
            kinds[name] = {}
        elif name == "sliding_attention":
            kinds[name] = {"window": int(config.sliding_window)}
        elif name == "chunked_attention":
            kinds[name] = {"chunk": int(config.attention_chunk_size)}
        else:
            raise ModelError(
                f"a model of type {kind_of_model!r} has layers of kind {name!r}, which read tokens "
                "in their order: choose a model whose layers all attend"
            )
    return kinds


# The probe ----------------------------------------------------------------------------------------


def _verify(model: Any, inner: Any) -> None:
    """Check by experiment, once per model and backend, that mask and positions are obeyed."""
    backend = str(inner.config.get_text_config()._attn_implementation)
    if backend in _VERIFIED.get(inner, set()):
        return
    n_ids = inner.get_input_embeddings().num_embeddings
    ids = [(number * 7 + 3) % n_ids for number in range(18)]
    prefix, first, second, suffix = ids[:2], ids[2:8], ids[8:14], ids[14:16]
    # The pieces are equally long, so that only order, mask and positions can make a difference.
    changed = [*first[:-1], (first[-1] + n_ids // 2) % n_ids]

    def states(one: list[int], other: list[int], edit_positions: bool = True) -> Tensor:
        sequence = (
            _Run(tuple(prefix)),
            _Set(((_Run(tuple(one)),), (_Run(tuple(other)),))),
            _Run(tuple(suffix)),
        )
        batch = _stack([_Columns().lay(sequence, edit_positions=edit_positions)], 0)
        ids = batch.input_ids.to(inner.get_input_embeddings().weight.device)
        kept.clear()
        with _reading(inner, batch):
            model(input_ids=ids, use_cache=False)
        return kept.pop()

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output.last_hidden_state[0].float())

    kept: list[Tensor] = []
    hook = inner.register_forward_hook(keep)

    try:
        with torch.no_grad(), evaluating(inner):
            listed, swapped = states(first, second), states(second, first)
            other = states(changed, second)
            leaking = states(first, second, False), states(second, first, False)
    except (
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"{type(inner).__name__} cannot be run with a 4-D attention mask and position ids: "
            f"{error}"
        ) from error
    finally:
        hook.remove()
    exact = inner.get_input_embeddings().weight.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if exact else 0.05
    if _difference(listed[8:14], other[8:14]) > tolerance:
        raise ModelError(
            f"{type(inner).__name__} with attention backend {backend!r} ignores the attention mask "
            "(a piece saw another one): choose attn_implementation='eager', or another model"
        )
    if _difference(listed[14:], other[14:]) == 0:
        raise ModelError(
            f"{type(inner).__name__} does not let the text behind a set see its pieces: choose "
            "another model"
        )
    order, by_position = _difference(listed[14:], swapped[14:]), _difference(*leaking, rows=14)
    if order > tolerance and (exact or order > by_position / 2):
        raise ModelError(
            f"{type(inner).__name__} takes position_ids but the order of pieces still shows "
            f"(states differ by {order:.1e}): choose a model with rotary or learned positions"
        )
    _VERIFIED.setdefault(inner, set()).add(backend)


def _difference(a: Tensor, b: Tensor, rows: int = 0) -> float:
    """Return the largest relative distance between corresponding states."""
    a, b = a[rows:], b[rows:]
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)).max())


# Answers ------------------------------------------------------------------------------------------


class _PromptModel:
    """Generation and scoring for prompts with sets; subclasses say how a prompt is laid out."""

    _edit_positions = True
    _edit_mask = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        add_special_tokens: bool = True,
    ) -> None:
        from bakeoff.models.loading import LanguageModel

        if isinstance(model, LanguageModel):
            tokenizer = model.tokenizer if tokenizer is None else tokenizer
            model = model.model
        if tokenizer is None:
            raise DataError("tokenizer must be given unless model is a bakeoff LanguageModel")
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.add_special_tokens = add_special_tokens

    def generate(
        self,
        prompts: Sequence[SetPrompt | str],
        *,
        max_new_tokens: int = 10,
        canonical_order: bool | None = None,
        random_state: int = 0,
        progress: Progress | None = None,
        **generate_arguments: Any,
    ) -> list[str]:
        """Continue every prompt.

        Parameters
        ----------
        prompts
            n prompts, or their inline forms with markers.
        max_new_tokens
            Most tokens of an answer.
        canonical_order
            Whether the pieces are sorted first, so that all orders of a prompt give the same bits.
            None means yes for a `SetPromptingModel` with both edits, no for its rivals.
        random_state
            Seed, where `generate_arguments` ask for sampling. What is drawn depends on the batch.
        progress
            Called with (prompts done, prompts in total).
        generate_arguments
            Passed to transformers' `generate`. Unless they say otherwise, decoding is greedy.

        Returns
        -------
        list of str
            The answers without special tokens; with ``num_return_sequences=r``, r per prompt, one
            prompt after the other.

        Raises
        ------
        DataError
            If an argument would run the model on other text, or the positions do not suffice.
        ModelError
            As `order_free`.
        """
        prompts = _as_prompts(prompts, self._sorts(canonical_order))
        return self._generate(prompts, max_new_tokens, random_state, progress, generate_arguments)

    def score(
        self,
        prompts: Sequence[SetPrompt | str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        rule: Rule = "likelihood",
        normalize: Normalize = "mean",
        canonical_order: bool | None = None,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """Score what may follow every prompt.

        Parameters
        ----------
        prompts
            n prompts, or their inline forms with markers.
        choices
            The possible answers: one list for all prompts, or one per prompt. Leading spaces count:
            after ``"Answer:"`` most tokenizers want ``" fig"``.
        rule
            ``"likelihood"``: log-probability of the choice's tokens behind the prompt, in nats. All
            choices of a prompt are read in the one pass that reads the prompt. ``"generated"``, the
            rule of the paper's code: the prompt is continued greedily by up to 10 tokens, and a
            choice scores the mean over i of the i-th step's logit of its i-th token.
        normalize
            For the likelihood: ``"mean"`` over tokens, or ``"sum"``.
        canonical_order
            As for `generate`.
        progress
            Called with (prompts done, prompts in total).

        Returns
        -------
        list of float64 arrays
            One per prompt, as long as its choices and in their order.

        Raises
        ------
        DataError
            If the numbers of prompts and lists differ, or a choice has no tokens.
        ModelError
            As `order_free`.
        """
        prompts = _as_prompts(prompts, self._sorts(canonical_order))
        every = self._score_orders(prompts, choices, rule, normalize, progress)
        return [self._combine(scores) for scores in every]

    def predict(
        self,
        prompts: Sequence[SetPrompt | str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        rule: Rule = "likelihood",
        normalize: Normalize = "mean",
        canonical_order: bool | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.int64]:
        """Return the index ``(n,)`` of each prompt's best choice; arguments as for `score`."""
        prompts = _as_prompts(prompts, self._sorts(canonical_order))
        best = []
        for scores in self._score_orders(prompts, choices, rule, normalize, progress):
            # Votes may tie; then the mean decides.
            combined, means = self._combine(scores), scores.mean(axis=0)
            best.append(max(range(len(means)), key=lambda i: (combined[i], means[i])))
        return np.array(best, dtype=np.int64)

    # What subclasses change

    def _sorts(self, canonical_order: bool | None) -> bool:
        return bool(canonical_order)

    def _orders(self, prompt: SetPrompt) -> list[SetPrompt]:
        return [prompt]

    def _combine(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Make one score per choice from those ``(orders, choices)`` of all orders."""
        means: NDArray[np.float64] = scores.mean(axis=0)
        return means

    def _rows(self, prompts: Sequence[SetPrompt]) -> list[_Sequence]:
        _check_tokenizer(self.tokenizer, self.add_special_tokens)
        return [
            _sequence_of(prompt, self.tokenizer, self.add_special_tokens, f"prompts[{number}]")
            for number, prompt in enumerate(prompts)
        ]

    # Running the model

    def _stack(self, rows: Sequence[_Sequence]) -> SetBatch:
        return _stack([self._lay(row) for row in rows], _pad_id(self.tokenizer))

    def _lay(self, sequence: _Sequence) -> _Columns:
        return _Columns().lay(
            sequence, edit_positions=self._edit_positions, edit_mask=self._edit_mask
        )

    def _batches(self, lengths: Sequence[int], n_passes: int = 1) -> list[list[int]]:
        """Return row numbers in batches of similar lengths, with the least work in all."""
        start_up = n_passes * _START_UP_TOKENS[self.model.device.type == "cpu"]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        # best[n] is the least work for the n shortest rows, cuts[n] where their last batch begins.
        best, cuts = [0], [0]
        for end in range(1, len(order) + 1):
            longest = lengths[order[end - 1]]
            work, cut = min(
                (best[start] + start_up + (end - start) * longest, start)
                for start in range(max(0, end - self.batch_size), end)
            )
            best.append(work)
            cuts.append(cut)
        batches, end = [], len(order)
        while end:
            batches.append(order[cuts[end] : end])
            end = cuts[end]
        return batches

    def _generate(
        self,
        prompts: Sequence[SetPrompt],
        max_new_tokens: int,
        random_state: int,
        progress: Progress | None,
        arguments: dict[str, Any],
    ) -> list[str]:
        rows = self._rows(prompts)
        answers: dict[int, list[str]] = {}
        with _seeded(self.model, random_state):
            for numbers in self._batches([_n_tokens(row) for row in rows], 1 + max_new_tokens):
                batch = self._stack([rows[number] for number in numbers])
                output = self._continue(batch, max_new_tokens, arguments)
                texts = self.tokenizer.batch_decode(
                    output[:, batch.n_columns :], skip_special_tokens=True
                )
                each = len(texts) // len(numbers)
                for place, number in enumerate(numbers):
                    answers[number] = texts[place * each : (place + 1) * each]
                if progress is not None:
                    progress(len(answers), len(rows))
        return [text for number in range(len(rows)) for text in answers[number]]

    def _continue(self, batch: SetBatch, max_new_tokens: int, arguments: dict[str, Any]) -> Any:
        """Run transformers' `generate` on a batch."""
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        for name in arguments:
            if name in _REFUSED:
                raise DataError(f"generate cannot take {name!r} here: {_REFUSED[name]}")
        _check_positions(batch, max_new_tokens, _n_positions(self.model))
        rest = dict(arguments)
        own = rest.pop("generation_config", None)
        settings = copy.deepcopy(self.model.generation_config if own is None else own)
        if own is None:
            settings.cache_implementation = None
            if not rest.get("do_sample", False):  # quietly: those of a sampling chat model
                settings.do_sample = False
                settings.temperature = settings.top_p = settings.top_k = None
        for name in ("cache_implementation", "guidance_scale", "prompt_lookup_num_tokens"):
            if getattr(settings, name, None) is not None:
                raise DataError(f"generation_config.{name} cannot be set here: {_REFUSED[name]}")
        settings.max_length = None  # it would count the prompt, and max_new_tokens is given
        settings.max_new_tokens = max_new_tokens
        settings.pad_token_id = _pad_id(self.tokenizer)
        rest = settings.update(**rest)
        batch = batch.to(self.model.device)
        with torch.no_grad(), evaluating(self.model), order_free(self.model, batch):
            return self.model.generate(**batch, generation_config=settings, **rest)

    def _score_orders(
        self,
        prompts: Sequence[SetPrompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        rule: Rule,
        normalize: Normalize,
        progress: Progress | None,
    ) -> list[NDArray[np.float64]]:
        """Return each prompt's scores ``(orders, choices)``."""
        if rule not in ("likelihood", "generated"):
            raise DataError(f"rule must be 'likelihood' or 'generated', got {rule!r}")
        if normalize not in ("mean", "sum"):
            raise DataError(f"normalize must be 'mean' or 'sum', got {normalize!r}")
        options = self._choice_tokens(choices, len(prompts))
        orders = [self._orders(prompt) for prompt in prompts]
        rows = self._rows([order for each in orders for order in each])
        of_row = [number for number, each in enumerate(orders) for _ in each]
        scores: dict[int, NDArray[np.float64]] = {}
        lengths = [
            _n_tokens(row) + sum(len(ids) - 1 for ids in options[number])
            for row, number in zip(rows, of_row, strict=True)
        ]
        for numbers in self._batches(lengths, 11 if rule == "generated" else 1):
            some, their = [rows[n] for n in numbers], [options[of_row[n]] for n in numbers]
            if rule == "likelihood":
                found = self._likelihoods(some, their, normalize)
            else:
                found = self._generated_logits(some, their)
            scores.update(zip(numbers, found, strict=True))
            if progress is not None:
                progress(len(scores) * len(prompts) // len(rows), len(prompts))
        in_order = iter(scores[number] for number in range(len(rows)))
        return [np.stack(list(itertools.islice(in_order, len(each)))) for each in orders]

    def _choice_tokens(
        self, choices: Sequence[str] | Sequence[Sequence[str]], n_prompts: int
    ) -> list[list[tuple[int, ...]]]:
        if isinstance(choices, str) or not len(choices):
            raise DataError(
                f"choices must be a list of texts, or one such list per prompt, got {choices!r}"
            )
        if all(isinstance(choice, str) for choice in choices):
            lists: list[Sequence[str]] = [[str(choice) for choice in choices]] * n_prompts
        else:
            lists = list(choices)
        if len(lists) != n_prompts:
            raise DataError(
                f"choices must hold one list per prompt, got {len(lists)} for {n_prompts} prompts"
            )
        tokens = []
        for number, own in enumerate(lists):
            if isinstance(own, str) or not len(own):
                raise DataError(f"choices[{number}] must be a list of texts, got {own!r}")
            tokens.append([_text_ids(self.tokenizer, choice, False) for choice in own])
            for place, ids in enumerate(tokens[-1]):
                if not ids:
                    raise DataError(f"choices[{number}][{place}] has no tokens")
        return tokens

    def _likelihoods(
        self,
        rows: Sequence[_Sequence],
        choices: Sequence[Sequence[tuple[int, ...]]],
        normalize: Normalize,
    ) -> list[NDArray[np.float64]]:
        """Read each prompt and, as one more set behind it, all that may follow: one pass."""
        laid, sorted_choices = [], []
        for row, options in zip(rows, choices, strict=True):
            order = sorted(range(len(options)), key=options.__getitem__)
            # A choice's last token predicts nothing that is asked for, so it is not read.
            heads = [(_Run(options[place][:-1]),) for place in order if len(options[place]) > 1]
            columns = self._lay(row)
            laid.append(columns.lay((_Set(tuple(heads)),)) if heads else columns)
            sorted_choices.append(order)
        batch = _stack(laid, _pad_id(self.tokenizer)).to(self.model.device)
        keep = 1 + max(sum(len(ids) - 1 for ids in options) for options in choices)
        arguments: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = keep
        with torch.no_grad(), evaluating(self.model), order_free(self.model, batch):
            logits = self.model(**batch, **arguments).logits[:, -keep:]
        results = []
        for number, (options, order) in enumerate(zip(choices, sorted_choices, strict=True)):
            # Of the row's last logits, the first is the prompt's and predicts every first token.
            sources: list[int] = []
            targets: list[int] = []
            read = 1
            for place in order:
                n_read = len(options[place]) - 1
                sources += [0, *range(read, read + n_read)]
                targets += options[place]
                read += n_read
            losses = torch.nn.functional.cross_entropy(
                logits[number, -read:][torch.tensor(sources, device=logits.device)].float(),
                torch.tensor(targets, device=logits.device),
                reduction="none",
            )
            parts = iter(losses.double().tolist())
            found = np.zeros(len(options))
            for place in order:
                own = list(itertools.islice(parts, len(options[place])))
                found[place] = -math.fsum(own) / (len(own) if normalize == "mean" else 1)
            results.append(found)
        return results

    def _generated_logits(
        self, rows: Sequence[_Sequence], choices: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[NDArray[np.float64]]:
        batch = self._stack(rows)
        output = self._continue(batch, 10, {"output_logits": True, "return_dict_in_generate": True})
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        special = set(self.tokenizer.all_special_ids)
        results = []
        for number, options in enumerate(choices):
            made = output.sequences[number, batch.n_columns :].tolist()
            steps = next((n + 1 for n, token in enumerate(made) if token in ends), len(made))
            found = []
            for ids in options:
                values = [
                    float(output.logits[step][number, token])
                    for step, token in enumerate(ids[:steps])
                    if token not in special
                ]
                found.append(float(np.mean(values)) if values else -math.inf)
            results.append(np.array(found))
        return results


class SetPromptingModel(_PromptModel):
    """A frozen decoder that gives one answer per set of pieces, in any order, in one pass.

    Parameters
    ----------
    model
        A transformers causal language model, or a `bakeoff.models.LanguageModel`.
    tokenizer
        Its tokenizer; a `LanguageModel` brings its own.
    batch_size
        Prompts that are run together. The results agree up to rounding.
    add_special_tokens
        Whether prefixes get the beginning-of-sequence token; False for chat templates' texts.
    edit_positions, edit_mask
        The two edits, for ablations: without either, the order matters.

    Notes
    -----
    With ``canonical_order=True`` all orders of a prompt give bit-identical results in any precision
    (in equal batches), and processors that look at the prompt's tokens (``no_repeat_ngram_size``)
    see one order too. With False, results agree up to rounding, about 1e-6 of the logits in
    float32, which can flip a near tie in bfloat16.

    Departures from the paper's code: answers are numbered from behind the longest piece for every
    architecture (there, GPT-2's generated tokens are numbered by column); options are scored by
    likelihood unless ``rule="generated"``; and that rule counts an option's tokens from its first
    (there, a tokenizer's beginning-of-sequence token shifts them by one step).

    References
    ----------
    Reid McIlroy-Young, Katrina Brown, Conlan Olson, Linjun Zhang and Cynthia Dwork.
    "Order-Independence Without Fine Tuning". NeurIPS 2024. arXiv:2406.06581.

    Examples
    --------
    >>> from bakeoff.models import load_language_model  # doctest: +SKIP
    >>> answerer = SetPromptingModel(load_language_model("smollm2-135m"))  # doctest: +SKIP
    >>> passages = ["It was written by Ann.", "It is blue."]
    >>> prompt = SetPrompt.from_passages("Who wrote it?", passages)
    >>> answerer.generate([prompt], max_new_tokens=2)  # doctest: +SKIP
    [' Ann.']
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        add_special_tokens: bool = True,
        edit_positions: bool = True,
        edit_mask: bool = True,
    ) -> None:
        super().__init__(
            model, tokenizer, batch_size=batch_size, add_special_tokens=add_special_tokens
        )
        self._edit_positions = edit_positions
        self._edit_mask = edit_mask

    def _sorts(self, canonical_order: bool | None) -> bool:
        if canonical_order is None:
            # Sorting would hide what an ablation is to show.
            return self._edit_positions and self._edit_mask
        return canonical_order


class PlainOrderModel(_PromptModel):
    """The rival that needs no method: the prompt as text, its pieces in the listed order.

    With ``canonical_order=True`` the pieces stand in alphabetical order: an answer that does not
    depend on the listed order either, and shows what more than that the method has to give.

    Parameters
    ----------
    model, tokenizer, batch_size, add_special_tokens
        As for `SetPromptingModel`.
    joint_tokens
        Whether the joined text is tokenised as a whole, as users do; False takes the tokens of the
        separate texts, so that only mask and positions differ from `SetPromptingModel`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        add_special_tokens: bool = True,
        joint_tokens: bool = True,
    ) -> None:
        super().__init__(
            model, tokenizer, batch_size=batch_size, add_special_tokens=add_special_tokens
        )
        self.joint_tokens = joint_tokens

    def _rows(self, prompts: Sequence[SetPrompt]) -> list[_Sequence]:
        if self.joint_tokens:
            prompts = [SetPrompt(prompt.text, (), "") for prompt in prompts]
        return [(_Run(tuple(_Columns().lay(row).ids)),) for row in super()._rows(prompts)]


class OrderEnsembleModel(PlainOrderModel):
    """The rival that costs k passes: plain prompts in several orders, put to the vote or averaged.

    Parameters
    ----------
    model, tokenizer, batch_size, add_special_tokens, joint_tokens
        As for `PlainOrderModel`.
    n_orders
        Orders per prompt, drawn without repetition; None means all, the only number that makes the
        answer independent of the listed order.
    aggregate
        ``"vote"``: a choice's score is the share of orders in which it is the best (equals share
        their vote); an answer is the text that most orders generate. ``"mean"``: the mean over
        orders of a choice's score; an answer is decoded greedily from the mean log-probability of
        each next token.
    random_state
        Seed of the draw of orders; the same for every prompt.

    Notes
    -----
    Ties of votes go to the choice with the higher mean score in `predict`, and to the first text in
    alphabetical order in `generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        n_orders: int | None = None,
        aggregate: Literal["vote", "mean"] = "vote",
        random_state: int = 0,
        batch_size: int = 8,
        add_special_tokens: bool = True,
        joint_tokens: bool = True,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            batch_size=batch_size,
            add_special_tokens=add_special_tokens,
            joint_tokens=joint_tokens,
        )
        if aggregate not in ("vote", "mean"):
            raise DataError(f"aggregate must be 'vote' or 'mean', got {aggregate!r}")
        if n_orders is not None and n_orders < 1:
            raise DataError(f"n_orders must be at least 1 or None, got {n_orders}")
        self.n_orders = n_orders
        self.aggregate = aggregate
        self.random_state = random_state

    def _orders(self, prompt: SetPrompt) -> list[SetPrompt]:
        return prompt.orders(self.n_orders, random_state=self.random_state)

    def _combine(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.aggregate == "mean":
            return super()._combine(scores)
        best = scores == scores.max(axis=1, keepdims=True)
        votes: NDArray[np.float64] = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
        return votes

    def _generate(
        self,
        prompts: Sequence[SetPrompt],
        max_new_tokens: int,
        random_state: int,
        progress: Progress | None,
        arguments: dict[str, Any],
    ) -> list[str]:
        refused = {"num_return_sequences"}
        if self.aggregate == "mean":
            refused |= {"do_sample", "num_beams", "generation_config"}
        for name in refused & set(arguments):
            raise DataError(
                f"generate cannot take {name!r} with aggregate={self.aggregate!r}: the orders of a "
                "prompt give one answer together"
            )
        answers = []
        for number, prompt in enumerate(prompts):
            orders = self._orders(prompt)
            if self.aggregate == "vote":
                votes = Counter(
                    super()._generate(orders, max_new_tokens, random_state, None, arguments)
                )
                answers.append(min(votes, key=lambda text: (-votes[text], text)))
            else:
                answers.append(self._generate_mean(orders, max_new_tokens, arguments))
            if progress is not None:
                progress(number + 1, len(prompts))
        return answers

    def _generate_mean(
        self, orders: Sequence[SetPrompt], max_new_tokens: int, arguments: dict[str, Any]
    ) -> str:
        from transformers import LogitsProcessorList

        batch = self._stack(self._rows(orders))
        own = list(arguments.get("logits_processor") or [])
        passed = {**arguments, "logits_processor": LogitsProcessorList([*own, _MeanOverRows()])}
        output = self._continue(batch, max_new_tokens, passed)
        text: str = self.tokenizer.decode(output[0, batch.n_columns :], skip_special_tokens=True)
        return text


class _MeanOverRows:
    """A logits processor that gives all rows their mean log-probabilities: they stay together."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mean = torch.log_softmax(scores.float(), dim=-1).mean(dim=0, keepdim=True)
        return mean.expand_as(scores)


@contextmanager
def _seeded(model: Any, random_state: int) -> Iterator[None]:
    """Seed torch for a while; its own random state goes on afterwards as if nothing was drawn."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random_state)
        yield
