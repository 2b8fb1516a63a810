"""Instructions before a text: how they are written and how they are kept out of the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def instruction_prompt(task: str, separator: str = "\n") -> str:
    r"""Return the prefix that tells an embedding model the task of a query.

    Parameters
    ----------
    task
        One sentence, e.g. ``"Given a question, retrieve passages that answer it"``.
    separator
        Between task and query; a newline in the released models, a blank in the papers.

    Examples
    --------
    >>> instruction_prompt("Retrieve the definition of the word")
    'Instruct: Retrieve the definition of the word\nQuery: '
    """
    return f"Instruct: {task}{separator}Query: "


def encode_with_instruction(
    tokenizer: Any,
    instruction: str,
    texts: Sequence[str],
    *,
    add_eos: bool = True,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Tokenize ``instruction + text + EOS`` and mark which tokens are to be pooled.

    Parameters
    ----------
    tokenizer
        A fast tokenizer of transformers (one with character offsets) that pads on the right. Where
        it has no padding token, the end-of-sequence token pads.
    instruction
        Put before every text; may be empty, then every real token is pooled.
    texts
        The texts without the instruction.
    add_eos
        Whether to end with the end-of-sequence token where the tokenizer itself does not.
    max_length
        Most tokens per text, instruction and end-of-sequence token included; None for no limit.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``pool_mask``, each ``(B, T)`` int64. The pool mask is
        the attention mask with 0 up to and including the last token of the instruction (and so at
        a beginning-of-sequence token before it). A token that spans the end of the instruction and
        the start of the text counts as text.

    Raises
    ------
    ValueError
        If the tokenizer pads on the left, has no offsets or no end-of-sequence token to add, if
        `texts` is empty, or if `max_length` leaves no token of some text.

    Notes
    -----
    Departure from NV-Embed's released code, which counts the tokens of the instruction alone,
    without the beginning-of-sequence token, and zeroes that many positions from the first: it
    drops the beginning-of-sequence token and keeps the last token of the instruction, and is off by
    more where tokens merge across the border. Character offsets are exact. The end-of-sequence
    token is never cut off by `max_length` here.

    References
    ----------
    Chankyu Lee et al. "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding
    Models". ICLR 2025. arXiv:2405.17428.
    """
    if not texts:
        raise ValueError("texts is empty")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: pass a fast tokenizer"
        )
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"instruction masking needs padding on the right, got padding_side="
            f"{tokenizer.padding_side!r}: set tokenizer.padding_side = 'right'"
        )
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token: pass add_eos=False")
    room = None if max_length is None else max_length - add_eos
    if room is not None and room < 1:
        raise ValueError(f"max_length={max_length} leaves no room for a text")
    encoded = tokenizer(
        [instruction + text for text in texts],
        truncation=room is not None,
        max_length=room,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    rows = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first_pooled = _tokens_of_prefix(offsets, len(instruction))
        if add_eos and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        rows.append((ids, first_pooled))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        pad_id = tokenizer.eos_token_id
    batch = {
        name: torch.full((len(rows), max(len(ids) for ids, _ in rows)), fill, dtype=torch.int64)
        for name, fill in (("input_ids", pad_id), ("attention_mask", 0), ("pool_mask", 0))
    }
    for row, (ids, first_pooled) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["pool_mask"][row, first_pooled : len(ids)] = 1
    empty = (batch["pool_mask"].sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"texts {empty} have no token to pool after the instruction"
            + ("" if max_length is None else f" within max_length={max_length}")
        )
    return batch


def instruction_pool_mask(
    tokenizer: Any,
    instruction: str,
    texts: Sequence[str],
    *,
    add_eos: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Return the mask ``(B, T)`` int64 that keeps instruction tokens out of the pooled mean.

    It belongs to the ids that `encode_with_instruction` makes of the same arguments, which see.
    """
    encoded = encode_with_instruction(
        tokenizer, instruction, texts, add_eos=add_eos, max_length=max_length
    )
    return encoded["pool_mask"]


def _tokens_of_prefix(offsets: Sequence[tuple[int, int]], length: int) -> int:
    """Return how many leading tokens belong to the first `length` characters.

    Special tokens have the empty span (0, 0) and belong to the prefix if a token of it follows.
    """
    inside = [position for position, (start, end) in enumerate(offsets) if start < end <= length]
    return inside[-1] + 1 if inside else 0
