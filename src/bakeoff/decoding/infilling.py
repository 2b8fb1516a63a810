"""Fill holes with a causal decoder: prompts in the infill layouts, sampling, likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bakeoff.decoding.codegen2 import (
    END_OF_MASK,
    SEPARATOR,
    Attention,
    InfillTokens,
    mask_token,
    plain_ids,
    prefix_lm_mask,
)
from bakeoff.errors import DataError
from bakeoff.models.likelihood import Losses, response_losses

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["codegen2", "psm", "spm", "left-to-right"]
LAYOUTS: tuple[Layout, ...] = ("codegen2", "psm", "spm", "left-to-right")
Stop = Literal["end of mask", "end of text", "sentinel", "length"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fill:
    """What a model wrote into a hole.

    Parameters
    ----------
    text
        The text, special tokens left out.
    ids
        The tokens generated, without the one that stopped.
    stopped
        What ended it: ``"end of mask"``, which a model trained for infilling writes when it is
        done; ``"end of text"``; another ``"sentinel"``; or the ``"length"``.
    """

    text: str
    ids: tuple[int, ...]
    stopped: Stop


def format_infill(prefix: str, suffix: str, *, eot: str = "<|endoftext|>") -> str:
    """Return the prompt of the published CodeGen2 models as a string.

    Parameters
    ----------
    prefix, suffix
        What stands before and after the hole.
    eot
        The model's end-of-text token.

    Raises
    ------
    DataError
        If the text spells a sentinel out, which a string prompt cannot tell from the real one;
        `infill` can.

    Examples
    --------
    >>> format_infill("def f(x):", "return x")
    'def f(x):<mask_1>return x<|endoftext|><sep><mask_1>'
    """
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        for token in (mask_token(1), SEPARATOR, END_OF_MASK, eot):
            if token in text:
                raise DataError(f"{name} spells out {token!r}: use infill, which escapes it")
    return f"{prefix}{mask_token(1)}{suffix}{eot}{SEPARATOR}{mask_token(1)}"


def infill_prompt(
    tokenizer: Any,
    prefix: str,
    suffix: str,
    *,
    layout: Layout = "codegen2",
    max_tokens: int | None = None,
) -> list[int]:
    """Return the ids after which a model writes what belongs between `prefix` and `suffix`.

    Parameters
    ----------
    tokenizer
        With the tokens of the layout; see `add_infill_tokens`.
    prefix, suffix
        Text; a special token spelled out in it is read as ordinary characters.
    layout
        ``"codegen2"``: prefix, mask, suffix, end of text, separator, mask. ``"psm"`` and
        ``"spm"``: fill-in-the-middle. ``"left-to-right"``: the prefix alone, the suffix unseen.
    max_tokens
        Longest prompt. What is far from the hole is left out: the prefix keeps its end, the suffix
        its beginning, each half of the room unless the other needs less.

    Raises
    ------
    DataError
        If tokens are missing, `layout` is unknown, or `max_tokens` leaves no room for text.

    Examples
    --------
    >>> infill_prompt(tokenizer, "def f(", "return x", layout="psm")  # doctest: +SKIP
    """
    return _prompt(
        InfillTokens.of(tokenizer),
        plain_ids(tokenizer, prefix),
        plain_ids(tokenizer, suffix),
        layout,
        max_tokens,
    )


def _prompt(
    tokens: InfillTokens,
    prefix: list[int],
    suffix: list[int],
    layout: Layout,
    max_tokens: int | None,
) -> list[int]:
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "left-to-right":
        suffix = []
    if max_tokens is not None:
        n_marks = {"codegen2": 4, "left-to-right": 0}.get(layout, 3)
        prefix, suffix = _trimmed(prefix, suffix, max_tokens - n_marks)
    if layout == "left-to-right":
        # A model needs something to go on from.
        return prefix or [tokens.eot]
    if layout == "codegen2":
        separator, _, masks = tokens.for_spans()
        return [*prefix, masks[0], *suffix, tokens.eot, separator, masks[0]]
    before, after, middle = tokens.for_fim()
    if layout == "psm":
        return [before, *prefix, after, *suffix, middle]
    return [before, after, *suffix, middle, *prefix]


def _trimmed(prefix: list[int], suffix: list[int], room: int) -> tuple[list[int], list[int]]:
    if room < 1:
        raise DataError(
            f"no room for text in the prompt ({room} tokens): lower max_new_tokens, or use a model "
            "with a longer context"
        )
    if len(prefix) + len(suffix) <= room:
        return prefix, suffix
    n_suffix = min(len(suffix), max(room // 2, room - len(prefix)))
    return prefix[max(0, len(prefix) - (room - n_suffix)) :], suffix[:n_suffix]


def infill(
    model: Any,
    tokenizer: Any = None,
    prefix: str = "",
    suffix: str = "",
    max_new_tokens: int = 128,
    **options: Any,
) -> Fill:
    """Write what belongs between two texts.

    Parameters
    ----------
    model
        A transformers causal language model, or a `bakeoff.models.LanguageModel`.
    tokenizer
        Its tokenizer; may be None for a `LanguageModel`.
    prefix, suffix
        What stands before and after the hole.
    max_new_tokens
        Longest fill.
    **options
        As for `infill_batch`.

    Returns
    -------
    Fill

    Raises
    ------
    DataError
        As for `infill_batch`.

    References
    ----------
    Erik Nijkamp, Hiroaki Hayashi, Caiming Xiong, Silvio Savarese and Yingbo Zhou. "CodeGen2:
    Lessons for Training LLMs on Programming and Natural Languages". 2023. arXiv:2305.02309.

    Examples
    --------
    >>> fill = infill(model, tokenizer, "def double(x):", "return y")  # doctest: +SKIP
    >>> fill.text, fill.stopped  # doctest: +SKIP
    ('y = 2 * x', 'end of mask')
    """
    return infill_batch(
        model, tokenizer, [(prefix, suffix)], max_new_tokens=max_new_tokens, **options
    )[0]


def infill_batch(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int = 128,
    layout: Layout = "codegen2",
    attention: Attention = "causal",
    heal: bool = False,
    batch_size: int = 8,
    do_sample: bool = False,
    random_state: int | None = None,
    max_prompt_tokens: int | None = None,
    progress: Progress | None = None,
    **generate_options: Any,
) -> list[Fill]:
    """Fill one hole in each of several texts.

    Parameters
    ----------
    model, tokenizer
        As for `infill`.
    pairs
        (prefix, suffix) of each.
    max_new_tokens
        Longest fill.
    layout
        As for `infill_prompt`. ``"left-to-right"`` is plain generation after the prefix.
    attention
        ``"prefix"`` if the model was trained so: the prompt but its last token sees all of itself.
        With the layouts ``"codegen2"`` and, for a prefix-LM, ``"left-to-right"``.
    heal
        Whether the last token of the prefix is taken back and written anew, with the characters it
        stood for as the only constraint: a hole that begins inside a token is filled better. The
        tokenizer must be byte-level.
    batch_size
        Texts at once, padded on the left.
    do_sample
        Greedy if False.
    random_state
        Seed; needed if `do_sample`. Draws depend on the batch a text is in.
    max_prompt_tokens
        As `max_tokens` of `infill_prompt`; by default what the model's context leaves after
        `max_new_tokens`.
    progress
        Called with (texts done, texts in total).
    **generate_options
        Further arguments of ``model.generate``, e.g. ``temperature``, ``top_p``, ``num_beams``.

    Returns
    -------
    list of Fill

    Raises
    ------
    DataError
        If tokens of the layout are missing, `do_sample` comes without `random_state`, or the
        context has no room.
    """
    import torch

    model, tokenizer = _model_and_tokenizer(model, tokenizer)
    tokens = InfillTokens.of(tokenizer)
    _check_attention(attention, layout)
    if do_sample and random_state is None:
        raise DataError("do_sample=True needs random_state, so that the result can be repeated")
    if max_new_tokens < 1 or batch_size < 1:
        raise DataError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens}, {batch_size}"
        )
    limit = max_prompt_tokens or _room(model, max_new_tokens)
    prompts: list[list[int]] = []
    taken_back: list[str] = []
    for prefix, suffix in pairs:
        before = plain_ids(tokenizer, prefix)
        texts = _token_texts(tokenizer) if heal else []
        taken_back.append(texts[before.pop()] if heal and before else "")
        prompts.append(_prompt(tokens, before, plain_ids(tokenizer, suffix), layout, limit))
    fills: list[Fill] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=do_sample):
        if do_sample:
            torch.manual_seed(int(random_state or 0))
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            options = dict(generate_options)
            if any(taken_back[rows]):
                width = max(len(prompt) for prompt in prompts[rows])
                healing = _Healing(width, taken_back[rows], _token_texts(tokenizer))
                options["logits_processor"] = [*options.get("logits_processor", ()), healing]
            generated = _generate(
                model, tokens, prompts[rows], max_new_tokens, do_sample, options, attention
            )
            for ids, forced in zip(generated, taken_back[rows], strict=True):
                fills.append(_fill(tokenizer, tokens, ids, forced))
            if progress is not None:
                progress(len(fills), len(pairs))
    return fills


def infill_holes(
    model: Any,
    tokenizer: Any,
    parts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    layout: Layout = "codegen2",
    attention: Attention = "causal",
    do_sample: bool = False,
    random_state: int | None = None,
    **generate_options: Any,
) -> list[Fill]:
    """Fill every hole of one text, from left to right.

    In the layout of CodeGen2 all holes are open in the context; each fill is written after the ones
    before it, as in training: ``<mask_1> first <eom> <mask_2> ...``. The other layouts know one
    hole: each is asked with the earlier ones filled and the later ones left out.

    Parameters
    ----------
    model, tokenizer
        As for `infill`.
    parts
        The text around the holes: n + 1 parts for n holes.
    max_new_tokens
        Longest fill of each.
    layout, attention
        As for `infill_batch`.
    do_sample, random_state, **generate_options
        As for `infill_batch`.

    Returns
    -------
    list of Fill
        n of them.

    Raises
    ------
    DataError
        If there is no hole, there are more holes than sentinels, or the context is too short.

    Examples
    --------
    >>> fills = infill_holes(model, tokenizer, ["def ", "(x):", "return x"])  # doctest: +SKIP
    """
    import torch

    model, tokenizer = _model_and_tokenizer(model, tokenizer)
    tokens = InfillTokens.of(tokenizer)
    _check_attention(attention, layout)
    if do_sample and random_state is None:
        raise DataError("do_sample=True needs random_state, so that the result can be repeated")
    context = _Holes(tokenizer, tokens, parts, layout)
    limit = _room(model, max_new_tokens)
    fills: list[Fill] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=do_sample):
        if do_sample:
            torch.manual_seed(int(random_state or 0))
        for _ in range(len(parts) - 1):
            prompt, n_given = context.prompt([list(fill.ids) for fill in fills])
            if limit is not None and len(prompt) > limit:
                raise DataError(
                    f"the text and its fills so far have {len(prompt)} tokens, and the context "
                    f"leaves room for {limit}: lower max_new_tokens, or give less text"
                )
            options = dict(generate_options)
            [ids] = _generate(
                model, tokens, [prompt], max_new_tokens, do_sample, options, attention, n_given
            )
            fills.append(_fill(tokenizer, tokens, ids, ""))
    return fills


class _Holes:
    """A text with holes, and the prompt for the next of them."""

    def __init__(
        self, tokenizer: Any, tokens: InfillTokens, parts: Sequence[str], layout: Layout
    ) -> None:
        if len(parts) < 2:
            raise DataError(f"parts must be 2 texts or more around the holes, got {len(parts)}")
        if layout == "codegen2" and len(parts) - 1 > (most := len(tokens.for_spans()[2])):
            raise DataError(
                f"parts must be 2 to {most + 1} texts around 1 to {most} holes, got {len(parts)}"
            )
        self.parts = [plain_ids(tokenizer, part) for part in parts]
        self.tokens, self.layout = tokens, layout

    def trim(self, room: int) -> bool:
        """Leave text out at both ends until no more than `room` tokens are left, if possible."""
        first, *between, last = self.parts
        left = room - sum(map(len, between))
        if left < 1:
            return False
        self.parts = [*_trimmed(first, last, left)]
        self.parts[1:1] = between
        return True

    def prompt(self, filled: Sequence[list[int]]) -> tuple[list[int], int]:
        """Return a prompt for the hole after those filled, and how much of it is given text."""
        number = len(filled)
        if self.layout != "codegen2":
            before = list(self.parts[0])
            for fill, part in zip(filled, self.parts[1:], strict=False):
                before += [*fill, *part]
            after = [token for part in self.parts[number + 1 :] for token in part]
            written = _prompt(self.tokens, before, after, self.layout, None)
            return written, len(written) - 1
        separator, end_of_mask, masks = self.tokens.for_spans()
        written = list(self.parts[0])
        for mask, part in zip(masks, self.parts[1:], strict=False):
            written += [mask, *part]
        written += [self.tokens.eot, separator]
        n_given = len(written)
        for mask, fill in zip(masks, filled, strict=False):
            written += [mask, *fill, end_of_mask]
        return [*written, masks[number]], n_given


def infill_losses(
    model: Any,
    tokenizer: Any,
    triples: Sequence[tuple[str, str, str]],
    *,
    layout: Layout = "codegen2",
    attention: Attention = "causal",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Return how unlikely a model finds the true middles, given what stands around them.

    Parameters
    ----------
    model, tokenizer
        As for `infill`.
    triples
        (prefix, middle, suffix), no middle empty.
    layout
        As for `infill_prompt`; ``"left-to-right"`` sees the prefix alone.
    attention
        As for `infill_batch`.
    max_tokens
        Longest sequence, prompt and middle together; by default the model's context.
    progress
        Called with (texts done, texts in total).

    Returns
    -------
    bakeoff.models.Losses
        Nats over the middle's tokens; the end of the mask is not counted, so that layouts compare.

    Raises
    ------
    DataError
        If a middle is empty, tokens are missing, or a middle leaves no room for a prompt.
    """
    model, tokenizer = _model_and_tokenizer(model, tokenizer)
    tokens = InfillTokens.of(tokenizer)
    _check_attention(attention, layout)
    limit = max_tokens or _room(model, 0)
    prompts: list[list[int]] = []
    middles: list[list[int]] = []
    for prefix, middle, suffix in triples:
        ids = plain_ids(tokenizer, middle)
        around = plain_ids(tokenizer, prefix), plain_ids(tokenizer, suffix)
        prompts.append(
            _prompt(tokens, *around, layout, None if limit is None else limit - len(ids))
        )
        middles.append(ids)
    if attention == "prefix":
        given = [len(prompt) - 1 for prompt in prompts]
        return _prefix_losses(model, prompts, given, middles, progress)
    return response_losses(model, prompts, middles, progress=progress)


def infill_holes_losses(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[Sequence[str], Sequence[str]]],
    *,
    layout: Layout = "codegen2",
    attention: Attention = "causal",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Return how unlikely a model finds the true fills of texts with several holes each.

    The prompts are those of `infill_holes`, with the true fills in the holes before.

    Parameters
    ----------
    model, tokenizer
        As for `infill`.
    texts
        (parts, middles) of each: n + 1 parts around n middles, none empty.
    layout, attention
        As for `infill_batch`.
    max_tokens
        Longest sequence, prompt and fills together, whatever the layout; by default the model's
        context. What is farthest from the holes is left out.
    progress
        Called with (holes done, holes in total).

    Returns
    -------
    bakeoff.models.Losses
        Nats over the tokens of a text's middles.

    Raises
    ------
    DataError
        If parts and middles do not fit together, a middle is empty, or the holes and what lies
        between them are longer than `max_tokens`.
    """
    import numpy as np

    model, tokenizer = _model_and_tokenizer(model, tokenizer)
    tokens = InfillTokens.of(tokenizer)
    _check_attention(attention, layout)
    limit = max_tokens or _room(model, 0)
    prompts: list[list[int]] = []
    given: list[int] = []
    wanted: list[list[int]] = []
    owner: list[int] = []
    for number, (parts, middles) in enumerate(texts):
        if len(parts) != len(middles) + 1:
            raise DataError(
                f"text {number} has {len(parts)} parts around {len(middles)} middles; there must "
                "be one part more"
            )
        context = _Holes(tokenizer, tokens, parts, layout)
        filled = [plain_ids(tokenizer, middle) for middle in middles]
        if limit is not None:
            # As many as the longest layout needs, so that all layouts show the same text.
            marks = 3 * len(middles) + 2
            if not context.trim(limit - marks - sum(map(len, filled))):
                raise DataError(f"text {number}: its holes leave no room in {limit} tokens")
        for hole, middle in enumerate(filled):
            prompt, n_given = context.prompt(filled[:hole])
            prompts.append(prompt)
            given.append(n_given)
            wanted.append(middle)
            owner.append(number)
    if attention == "prefix":
        losses = _prefix_losses(model, prompts, given, wanted, progress)
    else:
        losses = response_losses(model, prompts, wanted, progress=progress)
    sums = np.zeros(len(texts))
    n_tokens = np.zeros(len(texts), dtype=np.int64)
    np.add.at(sums, owner, losses.sums)
    np.add.at(n_tokens, owner, losses.n_tokens)
    return Losses(sums, n_tokens)


def _prefix_losses(
    model: Any,
    prompts: list[list[int]],
    given: list[int],
    middles: list[list[int]],
    progress: Progress | None,
) -> Losses:
    """Return the losses of middles after prompts whose first `given` tokens see each other."""
    import numpy as np
    import torch

    sums = np.zeros(len(prompts))
    was_training = bool(model.training)
    model.eval()
    try:
        for row, (prompt, middle) in enumerate(zip(prompts, middles, strict=True)):
            if not middle:
                raise DataError(f"middle {row} has no tokens")
            ids = torch.tensor([[*prompt, *middle]], device=model.device)
            segments = torch.zeros_like(ids)
            segments[:, : given[row]] = 1
            mask = prefix_lm_mask(segments, dtype=model.dtype)
            with torch.inference_mode():
                logits = model(ids, attention_mask=mask).logits[0, len(prompt) - 1 : -1]
            chosen = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            sums[row] = -chosen.double().sum().item()
            if progress is not None:
                progress(row + 1, len(prompts))
    finally:
        model.train(was_training)
    return Losses(sums, np.array([len(middle) for middle in middles], dtype=np.int64))


# Generation ---------------------------------------------------------------------------------------


def _check_attention(attention: Attention, layout: Layout) -> None:
    if attention not in ("causal", "prefix"):
        raise DataError(f"attention must be 'causal' or 'prefix', got {attention!r}")
    if attention == "prefix" and layout not in ("codegen2", "left-to-right"):
        raise DataError(
            f"attention='prefix' goes with layout='codegen2' or 'left-to-right', got {layout!r}"
        )


def _model_and_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from bakeoff.models.loading import LanguageModel

    if isinstance(model, LanguageModel):
        return model.model, model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise DataError("tokenizer may be None only if model is a LanguageModel")
    return model, tokenizer


def _room(model: Any, max_new_tokens: int) -> int | None:
    """Return how many tokens of the model's context are left beside the new ones."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else int(context) - max_new_tokens


def _generate(
    model: Any,
    tokens: InfillTokens,
    prompts: list[list[int]],
    max_new_tokens: int,
    do_sample: bool,
    options: dict[str, Any],
    attention: Attention = "causal",
    n_given: int | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, the one that stopped it included.

    With prefix attention the first `n_given` tokens see each other: all but the last if None.
    """
    import torch

    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor(
        [[*[tokens.eot] * n, *prompt] for n, prompt in zip(padding, prompts, strict=True)],
        device=model.device,
    )
    mask = torch.tensor(
        [[*[0] * n, *[1] * len(prompt)] for n, prompt in zip(padding, prompts, strict=True)],
        device=model.device,
    )
    was_training = bool(model.training)
    model.eval()
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            # A chat model's own sampling defaults are no concern of a greedy fill.
            warnings.filterwarnings("ignore", message=".*do_sample.*")
            if attention == "prefix" and width > 1:
                n_given = width - 1 if n_given is None else n_given
                cache = _prefix_cache(model, ids[:, :n_given], mask[:, :n_given])
                options = {**options, "past_key_values": cache}
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                eos_token_id=_stops(tokens),
                pad_token_id=tokens.eot,
                **options,
            )
    finally:
        model.train(was_training)
    if len(output) != len(prompts):
        raise DataError("num_return_sequences must be 1: call again with another random_state")
    stops = set(_stops(tokens))
    rows: list[list[int]] = []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def _prefix_cache(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """Return the keys and values of texts that see all of themselves."""
    return model(
        ids,
        attention_mask=prefix_lm_mask(mask, mask, dtype=model.dtype),
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
    ).past_key_values


def _stops(tokens: InfillTokens) -> list[int]:
    """Return the tokens that end a fill: it can hold no sentinel, whatever the model writes."""
    return sorted({tokens.eot, *tokens.control})


def _fill(tokenizer: Any, tokens: InfillTokens, ids: list[int], forced: str) -> Fill:
    stopped: Stop = "length"
    if ids and ids[-1] in _stops(tokens):
        last = ids[-1]
        ids = ids[:-1]
        if last == tokens.end_of_mask:
            stopped = "end of mask"
        else:
            stopped = "end of text" if last == tokens.eot else "sentinel"
    # Decoded after it was cut: the stop mark is a special token, which decoding leaves out.
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Fill(text[len(forced) :] if forced else text, tuple(ids), stopped)


_TEXTS: dict[int, tuple[Any, list[str]]] = {}


def _token_texts(tokenizer: Any) -> list[str]:
    """Return what each token of a byte-level vocabulary stands for; "" for special tokens."""
    known = _TEXTS.get(id(tokenizer))
    if known is not None and known[0] is tokenizer and len(known[1]) == len(tokenizer):
        return known[1]
    texts: list[str] = tokenizer.batch_decode(
        [[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special:
            texts[token] = ""
    probe = plain_ids(tokenizer, "def heal(x):\n        return  x + 1")
    if "".join(texts[token] for token in probe) != "def heal(x):\n        return  x + 1":
        raise DataError("heal=True needs a byte-level tokenizer, whose tokens' texts simply join")
    _TEXTS.clear()
    _TEXTS[id(tokenizer)] = (tokenizer, texts)
    return texts


class _Healing:
    """Logits processor: what is generated must begin with a given text."""

    def __init__(self, width: int, forced: list[str], texts: list[str]) -> None:
        self.width, self.forced, self.texts = width, forced, texts
        self._allowed: dict[str, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, forced in enumerate(self.forced):
            written = "".join(self.texts[i] for i in input_ids[row, self.width :].tolist())
            remaining = forced[len(written) :]
            if remaining:
                scores[row, ~self._mask(remaining, scores)] = float("-inf")
        return scores

    def _mask(self, remaining: str, scores: Tensor) -> Tensor:
        import torch

        if remaining not in self._allowed:
            allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
            for token, text in enumerate(self.texts):
                if text and (text.startswith(remaining) or remaining.startswith(text)):
                    allowed[token] = True
            self._allowed[remaining] = allowed.to(scores.device)
        return self._allowed[remaining]
