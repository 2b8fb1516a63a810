"""Contrastive training in the open: which pairs form a batch, and the loop over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.tasks import TextPairs

if TYPE_CHECKING:
    import torch

Indices = NDArray[np.int64]
Kind = Literal["query", "positive", "negative"]
Encode = Callable[[Kind, Indices], "torch.Tensor | None"]
"""Embeds one side of the training pairs with these indices, with gradients.

``(B, d)``; for ``"negative"`` also ``(B, n, d)``, or None where these pairs have no negatives.
"""


@dataclass(frozen=True)
class Budget:
    """What every trained design may spend.

    Parameters
    ----------
    steps, batch_size
        Optimizer steps, and pairs in each.
    learning_rate
        Peak rate of the head; AdamW, warm-up over a tenth of the steps, linear decay.
    base_learning_rate
        Peak rate of the base model's weights or adapters.
    """

    steps: int
    batch_size: int
    learning_rate: float
    base_learning_rate: float


def train_contrastive(
    encode: Encode,
    batches: Iterable[Indices],
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-5,
    warmup_steps: int = 0,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    scale: float = 20.0,
    in_batch: bool | Callable[[Indices], bool] = True,
    progress: Callable[[float, str], None] | None = None,
) -> list[float]:
    """Train by `info_nce` with AdamW, linear warm-up and linear decay to zero.

    The loop knows neither texts nor models, so that a backbone with adapters and a head on cached
    states are trained by the same code.

    Parameters
    ----------
    encode
        ``encode(kind, indices)`` embeds the queries, positives or negatives of some pairs.
    batches
        Index arrays, at least `steps` of them, e.g. from `homogeneous_batches`.
    parameters
        What is trained: parameters, or parameter groups of torch, each with its own ``"lr"``. Those
        that require no gradient are left alone.
    steps
        Number of optimizer steps.
    learning_rate
        Its peak, reached after `warmup_steps`; for groups without one of their own.
    warmup_steps
        At most `steps`; more is cut to `steps`.
    weight_decay
        Of AdamW, on all parameters.
    max_grad_norm
        Gradients longer than this (Euclidean, over all parameters) are shortened to it.
    scale
        One over the temperature of the loss.
    in_batch
        Whether the other pairs of a batch serve as negatives; or a function that says so for a
        batch's indices.
    progress
        Called after every step with the fraction done and a message.

    Returns
    -------
    list of float
        The loss at every step, before that step's update.

    Raises
    ------
    ValueError
        If nothing is to be trained, a setting is out of range, or `batches` ends early.
    FloatingPointError
        If the loss is not finite; names the step.
    """
    import torch

    from bakeoff.embedding.contrastive import info_nce

    groups = _parameter_groups(parameters)
    trained = [parameter for group in groups for parameter in group["params"]]
    if not trained:
        raise ValueError("parameters has none that requires a gradient: nothing to train")
    if steps < 1 or not learning_rate > 0 or warmup_steps < 0:
        raise ValueError(
            "steps and learning_rate must be above 0 and warmup_steps not below, got "
            f"steps={steps}, learning_rate={learning_rate}, warmup_steps={warmup_steps}"
        )
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_up_then_decay(step, min(warmup_steps, steps), steps)
    )
    losses: list[float] = []
    for step, indices in enumerate(islice(batches, steps), start=1):
        queries, positives = encode("query", indices), encode("positive", indices)
        if queries is None or positives is None:
            raise ValueError("encode returned None for queries or positives")
        loss = info_nce(
            queries,
            positives,
            encode("negative", indices),
            scale=scale,
            in_batch=in_batch(indices) if callable(in_batch) else in_batch,
        )
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss at step {step} is {losses[-1]}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step / steps, f"step {step} of {steps}, loss {losses[-1]:.3f}")
    if len(losses) < steps:
        raise ValueError(f"batches ended after {len(losses)} of steps={steps}")
    return losses


def homogeneous_batches(
    groups: Sequence[TextPairs],
    batch_size: int,
    seed: int,
    *,
    distinct: Callable[[int], bool] = lambda group: True,
) -> Iterator[Indices]:
    """Yield batches without end, each of pairs from one group only.

    The group of each batch is drawn with probability proportional to its number of pairs; inside a
    group every pair is used once before any is used again (but for one that is left over alone,
    see below). Mixed batches would let the model tell negatives by their source alone.

    Parameters
    ----------
    groups
        At least one; an index counts pairs through all of them, in this order.
    batch_size
        Pairs per batch. A batch is smaller where no more pairs fit: at the end of a pass through a
        group, or among many equal texts.
    seed
        Determines the batches entirely.
    distinct
        Whether a group's batches must be free of accidental positives: no query or positive occurs
        twice in a batch, nor as another pair's negative. Switch it off for groups that are trained
        without in-batch negatives, where it has no effect but small batches.

    Yields
    ------
    array of int64
        ``(batch_size,)`` or fewer, at least 2 for pairs without negatives, whose loss alone would
        be zero.

    Raises
    ------
    ValueError
        If there are no groups, a group has too few pairs or no two pairs that may share a batch, or
        `batch_size` < 2.

    Examples
    --------
    >>> pairs = TextPairs(queries=("a", "b", "c", "d"), positives=("A", "B", "C", "D"))
    >>> batches = homogeneous_batches([pairs], batch_size=2, seed=0)
    >>> sorted([*next(batches).tolist(), *next(batches).tolist()])
    [0, 1, 2, 3]
    """
    if not groups:
        raise ValueError("groups is empty: nothing to train on")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    for group in groups:
        fewest = 1 if group.negatives else 2
        if len(group) < fewest:
            raise ValueError(
                f"group {group.group!r} has {len(group)} pairs, needs at least {fewest}"
            )
    sizes = np.array([len(group) for group in groups])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    choose, *shuffle = np.random.default_rng(seed).spawn(1 + len(groups))
    streams = [
        _batches_of_group(group, batch_size, rng, distinct=distinct(position))
        for position, (group, rng) in enumerate(zip(groups, shuffle, strict=True))
    ]
    return _interleave(streams, starts, sizes / sizes.sum(), choose)


def pairs_with_negatives(
    queries: Sequence[str],
    positives: Sequence[str],
    negatives: Sequence[tuple[str, ...]],
    group: str,
) -> TextPairs:
    """Return training pairs; with one negative each, as plain texts, with more, as tuples.

    `negatives_of` is its inverse.
    """
    single = all(len(entry) == 1 for entry in negatives)
    entries = tuple(entry[0] if single else entry for entry in negatives)
    return TextPairs(tuple(queries), tuple(positives), cast("tuple[str, ...]", entries), group)


def negatives_of(pairs: TextPairs) -> list[tuple[str, ...]] | None:
    """Return each pair's hard negatives as a tuple, the same number for every pair, or None.

    Raises
    ------
    ValueError
        If the pairs of a group have different numbers of negatives.
    """
    if pairs.negatives is None:
        return None
    given = cast("Sequence[str | Sequence[str]]", pairs.negatives)
    negatives = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in given]
    counts = {len(entry) for entry in negatives}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"group {pairs.group!r}: every pair needs the same number of negatives, at least 1, "
            f"got {sorted(counts)}"
        )
    return negatives


def _parameter_groups(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return groups for an optimizer, without parameters that require no gradient."""
    given = list(parameters)
    groups = [entry for entry in given if isinstance(entry, dict)]
    if len(groups) < len(given):
        groups = [{"params": given}]
    return [
        {**group, "params": [one for one in group["params"] if one.requires_grad]}
        for group in groups
        if any(one.requires_grad for one in group["params"])
    ]


def _interleave(
    streams: Sequence[Iterator[Indices]],
    starts: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    rng: np.random.Generator,
) -> Iterator[Indices]:
    while True:
        group = int(rng.choice(len(streams), p=probabilities))
        yield starts[group] + next(streams[group])


def _batches_of_group(
    pairs: TextPairs, batch_size: int, rng: np.random.Generator, *, distinct: bool
) -> Iterator[Indices]:
    negatives = negatives_of(pairs)
    smallest = 2 if negatives is None else 1
    while True:
        waiting = rng.permutation(len(pairs)).tolist()
        yielded = False
        while waiting:
            if distinct:
                batch, waiting = _take_distinct(waiting, pairs, negatives, batch_size)
            else:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
            if len(batch) >= smallest:
                yielded = True
                yield np.array(batch, dtype=np.int64)
        if not yielded:
            raise ValueError(
                f"group {pairs.group!r} has no two pairs that may share a batch: all their texts "
                "are the same"
            )


def _take_distinct(
    waiting: Sequence[int],
    pairs: TextPairs,
    negatives: Sequence[tuple[str, ...]] | None,
    batch_size: int,
) -> tuple[list[int], list[int]]:
    """Return a batch from the front of `waiting` without accidental positives, and the rest."""
    batch: list[int] = []
    passed_over: list[int] = []
    matched: set[str] = set()  # queries and positives of the batch
    avoided: set[str] = set()  # hard negatives of the batch
    for position, index in enumerate(waiting):
        own = {pairs.queries[index], pairs.positives[index]}
        hard = set(negatives[index]) if negatives else set()
        if own & matched or own & avoided or hard & matched:
            passed_over.append(index)
            continue
        batch.append(index)
        matched |= own
        avoided |= hard
        if len(batch) == batch_size:
            return batch, [*passed_over, *waiting[position + 1 :]]
    return batch, passed_over


def _warm_up_then_decay(step: int, warmup_steps: int, steps: int) -> float:
    """Return the factor on the learning rate at `step`, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
