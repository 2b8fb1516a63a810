"""Embed many texts with a sentence-transformers model, without computing padding."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# Texts tokenized at once. Small enough that tokenizing ahead stays little memory, large enough that
# most lengths occur often and batches of one length fill up.
_WINDOW = 4096
# The first window cannot overlap with computing, so it is short.
_FIRST_WINDOW = 256
# What starting one more forward pass costs, in tokens: padding a batch may cost no more than that.
_PASS_COST = 64
# Tokens that keep one thread busy while a layer's activations stay in its cache.
_BATCH_TOKENS = 768
# The same with gradients, on all threads.
_TRAINING_TOKENS = 2048
# Python runs in one thread at a time; with more batches at once than this they would queue for it.
_MOST_LANES = 8

# The texts' places in the result, one list per row, and what the model's first module reads.
_Job = tuple[list[list[int]], dict[str, Any]]


def encode(
    model: SentenceTransformer | str | Path,
    texts: Sequence[str],
    *,
    batch_tokens: int | None = None,
    normalize: bool | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    on_truncated: Callable[[list[int]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the vectors that ``model.encode(texts)`` returns, sooner.

    Texts of one length share a batch, so that next to nothing is computed for padding, and a batch
    holds as many tokens as the processor's caches like rather than a fixed number of texts. The
    next texts are tokenized while the model computes, and torch's threads work on batches of their
    own instead of sharing one. Equal texts are computed once. The model's own modules do the work,
    so any chain of modules gives the vectors it gives in sentence-transformers, up to rounding.

    Parameters
    ----------
    model
        The model, or a folder that ``SentenceTransformer`` loads. It is put in eval mode.
    texts
        n texts; an empty one is allowed.
    batch_tokens
        Most tokens in a batch; a longer text is a batch by itself. By default 768 for each of the
        batch's threads on a CPU, 32,768 elsewhere.
    normalize
        Whether to scale vectors to length 1. None or False leaves them as the model makes them.
    prompt_name, prompt
        What precedes each text: the name of one of the model's prompts, or the text itself. By
        default the model's default prompt, if it has one.
    on_truncated
        Called once with the sorted indices of the texts longer than the model's window, if there
        are any; by default their number is logged as a warning.
    progress
        Called with (texts done, texts in total).

    Returns
    -------
    float32 array of shape (n, d)
        Row i belongs to ``texts[i]``; its value depends neither on the order nor on the number of
        the other texts, up to rounding.

    Raises
    ------
    DataError
        If `texts` is a single string, or one of them is not a string; names its index.
    ModelError
        If `model` is no model, or has no prompt of that name.
    ValueError
        If `batch_tokens` is not positive.

    Examples
    --------
    >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
    >>> model = SentenceTransformer(str(pull("all-minilm-l6-v2")))  # doctest: +SKIP
    >>> encode(model, ["a sentence", "another one"]).shape  # doctest: +SKIP
    (2, 384)
    """
    texts = _checked(texts)
    model = _as_model(model)
    lanes = _lanes(model)
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS * lanes.threads if lanes.on_cpu else 32_768
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be positive, got {batch_tokens}")
    read = _reader(model, _resolved_prompt(model, prompt_name, prompt))
    model.eval()

    places: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        places.setdefault(text, []).append(index)
    # Longest first: what does not fit into memory fails at once, not after an hour.
    distinct = sorted(places, key=len, reverse=True)
    cut: list[int] = []

    def jobs() -> Iterator[_Job]:
        for window in _read_ahead(read, distinct):
            cut.extend(index for member in window.cut for index in places[window.texts[member]])
            for batch in token_budget_batches(window.lengths, batch_tokens):
                yield [places[window.texts[member]] for member in batch], window.features(batch)

    forward = partial(_forward, model, normalize=bool(normalize))
    vectors: NDArray[np.float32] | None = None
    done = 0
    for rows_of, rows in lanes.run(forward, jobs()):
        if vectors is None:
            vectors = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
        for indices, row in zip(rows_of, rows, strict=True):
            vectors[indices] = row
            done += len(indices)
        if progress is not None:
            progress(done, len(texts))
    if vectors is None:  # the width is known only once something was embedded
        vectors = forward(read([""]).features([0]))[:0]
    if cut and on_truncated is not None:
        on_truncated(sorted(cut))
    elif cut:
        logger.warning(
            "%d of %d texts are longer than the model's %s tokens; what is beyond was cut off",
            len(cut),
            len(texts),
            model.max_seq_length,
        )
    return vectors


def embed_batch(
    model: SentenceTransformer,
    texts: Sequence[Any],
    *,
    prompt: str | None = None,
    output: str = "sentence_embedding",
    one_pass: bool = False,
) -> torch.Tensor:
    """Return the vectors of one batch of texts, with gradients, to train a model by.

    They are those of ``model(model.preprocess(texts))``, up to rounding and up to which numbers
    dropout draws. On a CPU, short texts pass through the model without the long ones, so that
    little is computed for padding; the gradients are those of the whole batch.

    Parameters
    ----------
    model
        The model; whether it is in training mode is left as it is.
    texts
        n of what its ``preprocess`` takes.
    prompt
        What precedes each text.
    output
        Which of the model's outputs to return.
    one_pass
        Whether all texts must pass together, for modules that look at the batch as a whole. Batch
        normalisation is known to, and needs no asking.

    Returns
    -------
    Tensor
        ``(n, d)``; row i belongs to ``texts[i]``.

    Examples
    --------
    >>> queries, answers = embed_batch(model, first), embed_batch(model, second)  # doctest: +SKIP
    >>> info_nce(queries, answers).backward()  # doctest: +SKIP
    """
    import torch

    features = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in model.preprocess(list(texts), prompt=prompt or None).items()
    }
    mask = features.get("attention_mask")
    norms = torch.nn.modules.batchnorm._BatchNorm
    if (
        one_pass
        or model.device.type != "cpu"
        or not isinstance(mask, torch.Tensor)
        or mask.shape[:1] != (len(texts),)  # a flat batch has no row per text
        or any(isinstance(module, norms) for module in model.modules())
    ):
        vectors: torch.Tensor = model(features)[output]
        return vectors
    parts, order = [], []
    lengths = mask.sum(dim=1).tolist()
    for rows in token_budget_batches(lengths, _TRAINING_TOKENS):
        chosen = torch.tensor(rows)
        columns = mask[chosen].any(dim=0)  # padding may be on either side
        part = {name: _part(value, mask.shape, chosen, columns) for name, value in features.items()}
        parts.append(model(part)[output])
        order += rows
    return torch.cat(parts)[torch.tensor(order).argsort()]


def _part(value: Any, padded: torch.Size, rows: torch.Tensor, columns: torch.Tensor) -> Any:
    """Return the part of a feature that belongs to some texts of a batch."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != padded[0]:
        return value
    value = value[rows]
    return value[:, columns] if value.shape[1:2] == padded[1:] else value


def token_budget_batches(
    lengths: Sequence[int], batch_tokens: int, pass_cost: int = _PASS_COST
) -> Iterator[list[int]]:
    """Group texts into batches of nearly one length, longest first.

    A batch ends where one more text would exceed the budget, or where padding would cost more than
    another forward pass does.

    Parameters
    ----------
    lengths
        Tokens of each text.
    batch_tokens
        Most tokens in a batch, padding included; a longer text is a batch by itself.
    pass_cost
        What a forward pass costs beside its tokens, in tokens.

    Yields
    ------
    list of int
        Indices into `lengths`; together they cover every index once.

    Examples
    --------
    >>> list(token_budget_batches([3, 9, 3, 4, 9], batch_tokens=16, pass_cost=2))
    [[1], [4], [3, 0, 2]]
    """
    batch: list[int] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            longest = lengths[batch[0]]
            padding += longest - lengths[index]
            if padding > pass_cost or (len(batch) + 1) * longest > batch_tokens:
                yield batch
                batch, padding = [], 0
        batch.append(index)
    if batch:
        yield batch


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Some texts on their way into the model; `cut` are the indices of those that were too long."""

    texts: list[str]
    lengths: list[int]
    cut: list[int]
    features: Callable[[list[int]], dict[str, Any]]


_Read = Callable[[list[str]], _Window]


def _reader(model: SentenceTransformer, prompt: str | None) -> _Read:
    """Return the function that tokenizes texts as the model's first module does.

    A module that gives plain lists of token ids when asked for no padding is asked once for each
    window; any other (words, images, chat templates, flat batches) is asked once for each batch.
    """
    unpadded = {"text": {"padding": False}, "common": {"return_tensors": None}}

    def whole(texts: list[str]) -> Any:
        return model.preprocess(texts, prompt=prompt, processing_kwargs=unpadded)

    try:
        sample = whole(["a", "b c"])
        plain = isinstance(sample["input_ids"], list) and sample.encodings is not None
    except (AttributeError, KeyError, TypeError, ValueError):
        plain = False
    if plain:
        return lambda texts: _token_window(texts, whole(texts), model.tokenizer)
    return lambda texts: _text_window(texts, model, prompt)


def _token_window(texts: list[str], encoded: Any, tokenizer: Any) -> _Window:
    """Return a window whose texts are tokenized, so that a batch has only to be put together."""
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    left = tokenizer.padding_side == "left"

    def features(batch: list[int]) -> dict[str, Any]:
        return {
            key: _padded([value[i] for i in batch], fill.get(key, 0), left=left)
            if isinstance(value, list)
            else value
            for key, value in encoded.items()
        }

    return _Window(
        texts=texts,
        lengths=[len(ids) for ids in encoded["input_ids"]],
        cut=[i for i, encoding in enumerate(encoded.encodings) if encoding.overflowing],
        features=features,
    )


def _text_window(texts: list[str], model: SentenceTransformer, prompt: str | None) -> _Window:
    """Return a window whose texts are tokenized batch by batch, their lengths a guess."""
    return _Window(
        texts=texts,
        lengths=[1 + len(text) // 4 for text in texts],
        cut=[],
        features=lambda batch: model.preprocess([texts[i] for i in batch], prompt=prompt),
    )


def _padded(rows: list[list[int]], fill: int, *, left: bool) -> torch.Tensor:
    import torch

    width = max(len(row) for row in rows)
    if left:
        return torch.tensor([[fill] * (width - len(row)) + row for row in rows])
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _read_ahead(read: _Read, texts: list[str]) -> Iterator[_Window]:
    """Yield the windows of `texts`, tokenizing the next one while the caller works on this one."""
    bounds = [0, *range(_FIRST_WINDOW, len(texts), _WINDOW), len(texts)]
    parts = [texts[a:b] for a, b in pairwise(bounds) if a < b]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize") as thread:
        upcoming = [thread.submit(read, part) for part in parts[:1]]
        for number in range(len(parts)):
            window = upcoming.pop().result()
            upcoming += [thread.submit(read, part) for part in parts[number + 1 : number + 2]]
            yield window


# Computing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lanes:
    """How batches share the processor: `count` at a time, each with `threads` of torch's threads.

    Two threads that share one batch wait for each other after every operation, hundreds of times a
    batch; on a busy machine each wait can last a time slice. Two batches side by side never wait.
    """

    count: int
    threads: int
    on_cpu: bool

    def run(
        self, forward: Callable[[dict[str, Any]], NDArray[np.float32]], jobs: Iterator[_Job]
    ) -> Iterator[tuple[list[list[int]], NDArray[np.float32]]]:
        """Yield, for each job in order, its rows' places and its vectors."""
        # The first batch has the longest texts. By itself it may use all threads, and what modules
        # make on demand (position tables, say) is made before others need it.
        for places, features in islice(jobs, 1):
            yield places, forward(features)
        if self.count == 1:
            for places, features in jobs:
                yield places, forward(features)
            return
        import torch

        total = torch.get_num_threads()
        waiting: deque[tuple[list[list[int]], Future[NDArray[np.float32]]]] = deque()
        pool = ThreadPoolExecutor(self.count, "encode", torch.set_num_threads, (self.threads,))
        try:
            for places, features in jobs:
                waiting.append((places, pool.submit(forward, features)))
                if len(waiting) > 2 * self.count:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(total)  # what threads that start later will take over


def _lanes(model: SentenceTransformer) -> _Lanes:
    import torch

    on_cpu = model.device.type == "cpu"
    total = torch.get_num_threads()
    if not on_cpu or not _keeps_no_state(model):
        return _Lanes(1, total, on_cpu)
    count = min(total, _MOST_LANES)
    return _Lanes(count, total // count, on_cpu)


def _keeps_no_state(model: SentenceTransformer) -> bool:
    """Tell whether two batches may pass through the model at once.

    Modules of these libraries change nothing on themselves in a forward pass, with the exceptions
    named; of others one cannot know.
    """
    known = ("torch.nn.", "transformers.", "sentence_transformers.", "bakeoff.")
    return all(
        type(module).__module__.startswith(known)
        and getattr(module, "rope_type", "default") not in ("dynamic", "longrope")
        and not hasattr(module, "_hf_hook")  # accelerate moves weights in and out
        for module in model.modules()
    )


def _forward(
    model: SentenceTransformer, features: dict[str, Any], *, normalize: bool
) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        placed = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in features.items()
        }
        vectors = model(placed)["sentence_embedding"]
        if model.truncate_dim is not None:
            vectors = vectors[..., : model.truncate_dim]
        if normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors.float().cpu().numpy()  # type: ignore[no-any-return]


# Arguments ----------------------------------------------------------------------------------------


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | bytes):
        raise DataError("texts must be a list of strings, got a single one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts[{index}] must be a string, got {type(text).__name__}: {text!r}")
    return list(texts)


def _as_model(model: SentenceTransformer | str | Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    if isinstance(model, SentenceTransformer):
        return model
    if not isinstance(model, str | Path):
        raise ModelError(
            f"model must be a SentenceTransformer or a folder, got {type(model).__name__}"
        )
    if not Path(model).is_dir():
        raise ModelError(f"model: there is no folder {model}")
    return SentenceTransformer(str(model))


def _resolved_prompt(
    model: SentenceTransformer, prompt_name: str | None, prompt: str | None
) -> str | None:
    if prompt is not None:
        return prompt
    name = model.default_prompt_name if prompt_name is None else prompt_name
    if prompt_name is not None and prompt_name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none"
        raise ModelError(f"the model has no prompt {prompt_name!r}; its prompts are: {known}")
    return None if name is None else model.prompts.get(name)
