"""One pass over texts through a frozen model, keeping what pooling needs of every layer's states.

All layers' states of all tokens would be far too much to keep (SmolLM2-135M: 70 kB a token). What
pooling methods read is less: each layer's mean over tokens, each layer's state at the last token,
and the last layer's state at every token. They are taken batch by batch as the layers finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bakeoff.errors import DataError, ModelError
from bakeoff.models.attention import (
    backbone,
    bidirectional,
    sees_ahead,
    transformer_layers,
)

if TYPE_CHECKING:
    from bakeoff.models.loading import BaseModel

Attention = Literal["causal", "bidirectional"]

# What was found out about a model by running it, so that it is done once.
_HOOKS_AGREE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_SEES_AHEAD: WeakKeyDictionary[nn.Module, dict[bool | None, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizedText:
    """A text as the model reads it.

    Parameters
    ----------
    ids
        int32 array (n_tokens,), special tokens included, never empty.
    n_prefix
        How many leading tokens belong to the prefix and are read but not kept.
    truncated
        Whether the text was longer than `max_length`.
    """

    ids: NDArray[np.int32]
    n_prefix: int
    truncated: bool


@dataclass(frozen=True)
class HiddenBatch:
    """What is kept of one batch of B texts; d is the hidden size, S the number of states selected.

    State 0 is the embedding output, state l that of layer l, and the last state follows the final
    norm: the order of transformers' `output_hidden_states`.

    Parameters
    ----------
    indices
        int64 array (B,): which of the given texts these are.
    layer_means
        float32 tensor (B, S, d): each state's mean over the text's tokens.
    layer_lasts
        float32 tensor (B, S, d): each state at the text's last token.
    tokens
        float32 tensor (sum of lengths, d): the last state at every token, text after text.
    token_ids
        int64 tensor (sum of lengths,): the ids that `tokens` belong to.
    offsets
        int64 array (B + 1,): text b owns rows ``offsets[b]:offsets[b + 1]`` of `tokens`.
    truncated
        bool array (B,): which texts were longer than `max_length`.
    """

    indices: NDArray[np.int64]
    layer_means: torch.Tensor
    layer_lasts: torch.Tensor
    tokens: torch.Tensor
    token_ids: torch.Tensor
    offsets: NDArray[np.int64]
    truncated: NDArray[np.bool_]


def hidden_states(
    base: BaseModel,
    texts: Sequence[str],
    *,
    attention: Attention = "causal",
    max_length: int | None = None,
    prefixes: str | Sequence[str] | None = None,
    batch_tokens: int = 4096,
    layers: Literal["all"] | Sequence[int] = "all",
) -> Iterator[HiddenBatch]:
    """Run texts through a model and yield, batch by batch, what pooling needs of its states.

    Texts of similar length share a batch, longest first, so that little is computed for padding;
    neither padding nor batch-mates change a result by more than rounding. No gradients.

    Parameters
    ----------
    base
        The model and its tokenizer.
    texts
        What to read. A text without tokens stands as a lone end-of-text token.
    attention
        ``"causal"`` or ``"bidirectional"`` for decoders; encoders know only the latter.
    max_length
        Longest text in tokens, special tokens included; what is beyond is cut off. By default the
        model's own limit.
    prefixes
        An instruction read before each text: one for all, or one per text. Its tokens (and special
        tokens before it) take part in attention but not in what is kept.
    batch_tokens
        Most tokens in a batch, padding included; a longer text is a batch by itself.
    layers
        Which states `layer_means` and `layer_lasts` hold, from 0 (embedding output) to the number
        of layers; negative ones count from the end.

    Yields
    ------
    HiddenBatch
        Together they cover every text once.

    Raises
    ------
    ModelError
        If the model cannot serve: an encoder asked for causal attention, a decoder that cannot be
        made bidirectional, a model without hidden states.
    DataError
        If a prefix leaves no room for its text within `max_length`.
    ValueError
        If another argument is out of range.

    Examples
    --------
    >>> from bakeoff.models import load
    >>> base = load("smollm2-135m")  # doctest: +SKIP
    >>> batch = next(hidden_states(base, ["A cat.", "Two dogs."]))  # doctest: +SKIP
    >>> batch.layer_means.shape  # doctest: +SKIP
    torch.Size([2, 31, 576])
    """
    tokenized = tokenize(base, texts, max_length=max_length, prefixes=prefixes)
    return run_tokenized(
        base, tokenized, attention=attention, batch_tokens=batch_tokens, layers=layers
    )


def tokenize(
    base: BaseModel,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    prefixes: str | Sequence[str] | None = None,
) -> list[TokenizedText]:
    """Turn texts into the ids that `hidden_states` reads. Parameters and errors are as there.

    Returns
    -------
    list of TokenizedText
        One per text, in order.
    """
    limit = _checked_length(base, max_length)
    heads = _prefix_of_each(texts, prefixes)
    whole = [head + text for head, text in zip(heads, _checked_texts(texts), strict=True)]
    result: list[TokenizedText] = []
    for start in range(0, len(whole), 1024):
        chunk = whole[start : start + 1024]
        options = {"return_offsets_mapping": any(heads[start : start + 1024])}
        # verbose=False: texts longer than the model's window are dealt with here.
        full = base.tokenizer(chunk, truncation=False, verbose=False, **options)
        for number, ids in enumerate(full["input_ids"]):
            position = start + number
            truncated = len(ids) > limit
            encoded: Any = {key: full[key][number] for key in full}
            if truncated:  # the tokenizer's own cut keeps an appended end-of-text token
                encoded = base.tokenizer(
                    chunk[number], truncation=True, max_length=limit, verbose=False, **options
                )
            result.append(_as_tokenized(base, encoded, heads[position], truncated, position, limit))
    return result


def run_tokenized(
    base: BaseModel,
    texts: Sequence[TokenizedText],
    *,
    attention: Attention,
    batch_tokens: int = 4096,
    layers: Literal["all"] | Sequence[int] = "all",
) -> Iterator[HiddenBatch]:
    """Do what `hidden_states` does, for texts that are tokenized already."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    selected = _selected_states(base, layers)
    mask_removed = _attention_block(base, attention)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))

    def batches() -> Iterator[HiddenBatch]:
        for indices in _token_budget_batches(order, texts, batch_tokens):
            # Entered per batch: whoever consumes this iterator half finds the model as it was.
            with mask_removed(), torch.no_grad():
                yield _run_batch(base, texts, indices, selected)

    return batches()


def _run_batch(
    base: BaseModel, texts: Sequence[TokenizedText], indices: list[int], selected: list[int]
) -> HiddenBatch:
    device = next(base.model.parameters()).device
    batch = [texts[i] for i in indices]
    lengths = torch.tensor([len(text.ids) for text in batch], device=device)
    starts = torch.tensor([text.n_prefix for text in batch], device=device)
    width = int(lengths.max())
    ids = np.full((len(batch), width), _padding_id(base), np.int64)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text.ids)] = text.ids
    input_ids = torch.from_numpy(ids).to(device)
    position = torch.arange(width, device=device)
    attended = position < lengths[:, None]
    kept = attended & (position >= starts[:, None])
    weights = (kept / kept.sum(1, keepdim=True))[:, None, :]
    rows, last = torch.arange(len(batch), device=device), lengths - 1

    means: dict[int, torch.Tensor] = {}
    lasts: dict[int, torch.Tensor] = {}

    def reduce(number: int, states: torch.Tensor) -> None:
        if number in wanted:
            means[number] = torch.bmm(weights, states.float())[:, 0]
            lasts[number] = states[rows, last].float()

    wanted = set(selected)
    final = _forward(base.model, input_ids, attended.long(), reduce)
    if wanted - means.keys():
        raise ModelError(f"{base.name} gave {len(means)} hidden states, not {base.num_layers + 1}")
    n_kept = (lengths - starts).cpu().numpy()
    result = HiddenBatch(
        indices=np.asarray(indices, np.int64),
        layer_means=torch.stack([means[number] for number in selected], 1).cpu(),
        layer_lasts=torch.stack([lasts[number] for number in selected], 1).cpu(),
        tokens=final[kept].float().cpu(),
        token_ids=input_ids[kept].cpu(),
        offsets=np.concatenate([[0], np.cumsum(n_kept)]).astype(np.int64),
        truncated=np.array([text.truncated for text in batch]),
    )
    if not all(bool(x.isfinite().all()) for x in (result.layer_means, result.tokens)):
        raise ModelError(
            f"{base.name} computed infinite or undefined hidden states in {final.dtype}; "
            "load it in float32 or bfloat16"
        )
    return result


def _forward(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, reduce: Any) -> torch.Tensor:
    """Run a model, hand every numbered state to `reduce`, and return the last one.

    Hooks let each layer's states be reduced and freed before the next layer runs; asking the model
    for `output_hidden_states` holds all of them at once. A model whose hooks do not see what it
    would report itself (layers that are shared, or not kept in one list) is asked.
    """
    module = backbone(model)
    if module not in _HOOKS_AGREE:
        _HOOKS_AGREE[module] = _hooks_agree(module, ids[:2, :8], mask[:2, :8])
    if _HOOKS_AGREE[module]:
        return _forward_with_hooks(module, ids, mask, reduce)
    states = _reported_states(module, ids, mask)
    for number, state in enumerate(states):
        reduce(number, state)
    return states[-1]


def _forward_with_hooks(
    module: nn.Module, ids: torch.Tensor, mask: torch.Tensor, reduce: Any
) -> torch.Tensor:
    layers = transformer_layers(module)
    assert layers is not None, "_hooks_agree said that there are layers"

    def before_first(layer: nn.Module, args: Any, kwargs: Any) -> None:
        reduce(0, args[0] if args else kwargs["hidden_states"])

    def after(number: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            reduce(number, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as hooks:
        first = layers[0].register_forward_pre_hook(before_first, with_kwargs=True)
        hooks.callback(first.remove)
        for number, layer in enumerate(layers[:-1], start=1):
            hooks.callback(layer.register_forward_hook(after(number)).remove)
        final: torch.Tensor = module(input_ids=ids, attention_mask=mask).last_hidden_state
    reduce(len(layers), final)  # after the final norm, which the last layer's hook would miss
    return final


def _reported_states(
    module: nn.Module, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    output = module(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states: tuple[torch.Tensor, ...] | None = getattr(output, "hidden_states", None)
    if not states:
        raise ModelError(f"{type(module).__name__} gives no hidden states")
    return states


def _hooks_agree(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    if transformer_layers(module) is None:
        return False
    hooked: dict[int, torch.Tensor] = {}
    _forward_with_hooks(module, ids, mask, hooked.__setitem__)
    reported = _reported_states(module, ids, mask)
    return len(hooked) == len(reported) and all(
        torch.allclose(hooked[number], state) for number, state in enumerate(reported)
    )


def _attention_block(base: BaseModel, attention: str) -> Any:
    """Return what makes the context in which a batch is run; fails now rather than mid-way."""
    if attention not in ("causal", "bidirectional"):
        raise ValueError(f"attention must be 'causal' or 'bidirectional', got {attention!r}")
    module = backbone(base.model)
    causal_flag = getattr(module.config, "is_causal", None)  # a lasting patch sets it
    answers = _SEES_AHEAD.setdefault(module, {})
    if causal_flag not in answers:
        answers[causal_flag] = sees_ahead(module)
    already = answers[causal_flag]
    if attention == "causal" and already:
        raise ModelError(
            f"{base.name} is an encoder, or was made bidirectional: it has no causal mask. "
            "Use attention='bidirectional'"
        )

    def block() -> AbstractContextManager[Any]:
        removes = attention == "bidirectional" and not already
        return bidirectional(base.model) if removes else nullcontext()

    with block():
        return block


def _token_budget_batches(
    order: Sequence[int], texts: Sequence[TokenizedText], batch_tokens: int
) -> Iterator[list[int]]:
    """Cut texts that are sorted by falling length into batches of at most `batch_tokens`."""
    start = 0
    while start < len(order):
        longest = len(texts[order[start]].ids)
        stop = start + max(1, batch_tokens // longest)
        yield list(order[start:stop])
        start = stop


def _checked_texts(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] must be a string, got {type(text).__name__}")
    return texts


def _checked_length(base: BaseModel, max_length: int | None) -> int:
    if max_length is None:
        return base.max_length
    if not 1 <= max_length <= base.max_length:
        raise ValueError(
            f"max_length must be between 1 and {base.max_length} (the window of {base.name}), "
            f"got {max_length}"
        )
    return max_length


def _prefix_of_each(texts: Sequence[str], prefixes: str | Sequence[str] | None) -> Sequence[str]:
    if prefixes is None or isinstance(prefixes, str):
        return [prefixes or ""] * len(texts)
    if len(prefixes) != len(texts):
        raise ValueError(f"prefixes: {len(prefixes)} given for {len(texts)} texts")
    return prefixes


def _selected_states(base: BaseModel, layers: Literal["all"] | Sequence[int]) -> list[int]:
    n_states = base.num_layers + 1
    if layers == "all":
        return list(range(n_states))
    for layer in layers:
        if not isinstance(layer, int) or not -n_states <= layer < n_states:
            raise ValueError(
                f"layers must be 'all' or integers in [{-n_states}, {n_states - 1}] for "
                f"{base.name}, got {layer!r}"
            )
    return [int(layer) % n_states for layer in layers]


def _as_tokenized(
    base: BaseModel, encoded: Any, prefix: str, truncated: bool, position: int, limit: int
) -> TokenizedText:
    ids = list(encoded["input_ids"])
    n_prefix = 0
    if prefix:
        # The text starts with the first token that reaches beyond the prefix, so a token that
        # straddles the border counts as text.
        ends = [end for _, end in encoded["offset_mapping"]]
        n_prefix = next((i for i, end in enumerate(ends) if end > len(prefix)), len(ids))
        if n_prefix == len(ids) and not truncated and ends and ends[-1] == 0:
            n_prefix -= 1  # an empty text, but the tokenizer appended an end-of-text token
    if n_prefix == len(ids):  # nothing of the text is there
        if truncated or n_prefix == limit:
            raise DataError(
                f"prefixes: the one of text {position} takes up all {limit} tokens of max_length; "
                "shorten it or raise max_length"
            )
        ids.append(_stand_in_id(base))
    return TokenizedText(np.asarray(ids, np.int32), n_prefix, truncated)


def _stand_in_id(base: BaseModel) -> int:
    """Return the token that stands for a text that has none."""
    tokenizer = base.tokenizer
    for found in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        if found is not None:
            return int(found)
    raise DataError(
        f"an empty text cannot be read: the tokenizer of {base.name} has no end-of-text token"
    )


def _padding_id(base: BaseModel) -> int:
    # Padding is masked, so any id will do where the tokenizer knows none.
    found = base.tokenizer.pad_token_id
    return 0 if found is None else int(found)
