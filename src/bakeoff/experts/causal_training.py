"""Training a decoder, dense or a mixture, on texts of several domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def domain_batches(
    domains: Mapping[str, Tensor],
    shares: Mapping[str, float] | None = None,
    *,
    batch_size: int,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield batches of sequences without end, mixed from domains in given shares.

    Every sequence of a domain comes up once before any comes up twice. The paper trains
    specialists on 90 % domain and 10 % general text, and the mixture on equal shares.

    Parameters
    ----------
    domains
        Token ids ``(n, length)`` int64 of each domain; one length for all.
    shares
        How much of each domain, in any unit; equal if None. A domain without a share is left out.
    batch_size
        Sequences in a batch.
    seed
        Of the order.

    Yields
    ------
    torch.Tensor
        ``(batch_size, length)`` int64.

    Raises
    ------
    bakeoff.errors.DataError
        If a domain is empty or of another length, a share is negative or unknown, or all are 0.

    Examples
    --------
    >>> code, prose = torch.zeros(5, 8, dtype=int), torch.ones(5, 8, dtype=int)
    >>> shares = {"code": 0.9, "prose": 0.1}
    >>> batches = domain_batches({"code": code, "prose": prose}, shares, batch_size=1000)
    >>> round(float(next(batches).float().mean()), 1)
    0.1
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    chosen = dict.fromkeys(domains, 1.0) if shares is None else dict(shares)
    if unknown := [name for name in chosen if name not in domains]:
        raise DataError(f"shares names {unknown[0]!r}; there are: {', '.join(domains)}")
    for name, share in chosen.items():
        if not 0 <= share < math.inf:
            raise DataError(f"the share of {name!r} must be a number >= 0, got {share}")
    names = [name for name, share in chosen.items() if share > 0]
    if not names:
        raise DataError("shares must give at least one domain more than 0")
    length = domains[names[0]].shape[-1]
    for name in names:
        shape = tuple(domains[name].shape)
        if len(shape) != 2 or not shape[0] or shape[1] != length:
            raise DataError(
                f"domain {name!r} must hold at least one sequence of {length} tokens, got shape "
                f"{shape}"
            )
    return _mixed(
        [domains[name] for name in names], [chosen[name] for name in names], batch_size, seed
    )


def _mixed(
    domains: Sequence[Tensor], shares: Sequence[float], batch_size: int, seed: int
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.tensor(shares, dtype=torch.float64)
    queues: list[list[int]] = [[] for _ in domains]
    while True:
        drawn = torch.multinomial(probabilities, batch_size, True, generator=generator)
        rows = []
        for number in drawn.tolist():
            if not queues[number]:
                n_rows = len(domains[number])
                queues[number] = torch.randperm(n_rows, generator=generator).tolist()
            rows.append(domains[number][queues[number].pop()])
        yield torch.stack(rows)


def train_causal(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    steps: int,
    peak_learning_rate: float,
    warmup_steps: int = 0,
    final_share: float = 0.1,
    weight_decay: float = 0.1,
    max_gradient_norm: float = 1.0,
    accumulation: int = 1,
    after_step: Callable[[], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train a decoder or a mixture on token sequences, all its parameters: every phase's loop.

    AdamW (0.9, 0.95); the learning rate rises linearly to its peak and falls along a cosine to
    `final_share` of it. The paper's specialists use half the peak of pre-training.

    Parameters
    ----------
    model
        Trained in place, and left in evaluation mode.
    batches
        Token ids ``(batch, length)`` int64, at least ``steps * accumulation`` of them; see
        `domain_batches`.
    steps, warmup_steps
        Optimiser steps, and how many of them raise the learning rate.
    peak_learning_rate, final_share, weight_decay, max_gradient_norm
        Of the optimiser. Decay is applied to matrices, not to norms and biases.
    accumulation
        Micro-batches whose mean gradient makes a step.
    after_step
        Called after each optimiser step, for what adapts without a gradient; see
        `after_optimizer_step`.
    progress
        Called with steps done and `steps`.

    Returns
    -------
    list of float
        The loss of every step in nats per token, as the model returns it in training mode; the mean
        over its micro-batches.

    Raises
    ------
    bakeoff.errors.DataError
        If a number is impossible or there are fewer batches than steps.
    """
    if steps < 1 or not 0 <= warmup_steps <= steps:
        raise DataError(
            f"steps must be at least 1 and warmup_steps between 0 and steps, got {steps} and "
            f"{warmup_steps}"
        )
    if not 0 < peak_learning_rate < math.inf or not 0 <= final_share <= 1:
        raise DataError(
            "peak_learning_rate must be positive and final_share between 0 and 1, got "
            f"{peak_learning_rate} and {final_share}"
        )
    if accumulation < 1:
        raise DataError(f"accumulation must be at least 1, got {accumulation}")
    optimizer = _optimizer(model, peak_learning_rate, weight_decay)
    losses = []
    model.train()
    supply = iter(batches)
    for step in range(steps):
        for group in optimizer.param_groups:
            share = _learning_rate_share(step, steps, warmup_steps, final_share)
            group["lr"] = peak_learning_rate * share
        optimizer.zero_grad()
        seen = []
        for _ in range(accumulation):
            batch = next(supply, None)
            if batch is None:
                raise DataError(f"batches ended after {step} of {steps} steps")
            batch = batch.to(model.device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            (loss / accumulation).backward()
            seen.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
        optimizer.step()
        if after_step is not None:
            after_step()
        losses.append(torch.stack(seen).mean())
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    found: list[float] = torch.stack(losses).tolist()
    return found


def _optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def _learning_rate_share(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Return the learning rate of a step as a share of its peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final_share + (1 - final_share) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
