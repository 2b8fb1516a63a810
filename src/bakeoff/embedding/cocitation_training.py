"""Training on co-cited pairs of several domains, stopped by F1max on validation pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bakeoff.data.citations import LabelledPairs
from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.domain_encoder import DomainText, DomainTransformer, encode_domains
from bakeoff.embedding.domain_experts import domain_index
from bakeoff.embedding.pair_scores import PairScores, score_pairs
from bakeoff.embedding.ranking_losses import MNRLoss, MNRPlusLoss
from bakeoff.embedding.training import Indices, homogeneous_batches
from bakeoff.errors import DataError
from bakeoff.models import embed_batch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Batching = Literal["mixed", "by-domain"]


@dataclass(frozen=True)
class CoCitationHistory:
    """What happened in training.

    Parameters
    ----------
    losses
        At every step, before its update.
    diagonal_rates
        At every step, the share of targets that were the own partner (see `MNRPlusLoss`).
    validation
        ``(step, F1max)`` at every evaluation; step 0 is before training.
    best_step
        The step whose weights the model has now.
    stopped_early
        Whether validation ended training.
    n_pairs
        Pairs read in all; the last batch of a pass through the pairs is smaller.
    """

    losses: tuple[float, ...]
    diagonal_rates: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int
    stopped_early: bool
    n_pairs: int


def train_cocitation(
    model: SentenceTransformer,
    train: Sequence[TextPairs],
    validation: LabelledPairs | None = None,
    *,
    loss: MNRLoss | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    batching: Batching = "mixed",
    learning_rate: float = 1e-4,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    evaluate_every: int | None = None,
    patience: int = 5,
    auxiliary: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CoCitationHistory:
    """Train an encoder on positive pairs, in place, and keep the weights that validate best.

    AdamW on all that requires a gradient, with linear warm-up and decay. Each pair is turned round
    with probability 1/2 whenever it is used.

    Parameters
    ----------
    model
        A SentenceTransformer. A `bakeoff.embedding.DomainEncoder` is told each text's domain, which
        is its group's name; any other model is not.
    train
        Positive pairs, one group per domain, e.g. `CoCitationSplit.train`.
    validation
        Pairs to stop by; None trains for all steps.
    loss
        `MNRPlusLoss` if None, as in the paper.
    steps
        Most optimizer steps.
    batch_size
        Pairs in a batch; all others of the batch are a text's negatives.
    batching
        ``"mixed"``: pairs of all domains together, as in the paper, so that many negatives are
        trivial. ``"by-domain"``: of one domain. No text occurs twice in a batch.
    learning_rate, warmup_steps, weight_decay, max_grad_norm
        Of AdamW; gradients longer than `max_grad_norm` are shortened to it.
    evaluate_every
        Steps between evaluations; a tenth of all if None.
    patience
        Evaluations in a row without a better F1max that end training.
    auxiliary
        Called after the forward pass of a batch with the domain of each text, ``(2 B,)`` int64;
        what it returns is added to the loss. For learned routers,
        ``lambda ids: 0.01 * routing_loss(model[0].auto_model, ids)``.
    seed
        Determines batches, turns and dropout; the caller's random state is left as it was.
    progress
        Called after every step with (steps done, steps).

    Returns
    -------
    CoCitationHistory
        Losses and evaluations.

    Raises
    ------
    DataError
        If there is nothing to train on, a group is none of the model's domains, or a setting is out
        of range.
    FloatingPointError
        If the loss is not finite; names the step.

    Notes
    -----
    Departures from the official code: the checkpoint is chosen by validation pairs, not by the
    test's, and equal texts never share a batch.

    References
    ----------
    Logan Hallee, Rohan Kapur, Arjun Patel, Jason P. Gleghorn and Bohdan B. Khomtchouk.
    "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings in Biological
    Databases". Scientific Reports, 2025. arXiv:2401.15713.

    Examples
    --------
    >>> history = train_cocitation(model, split.train, split.validation)  # doctest: +SKIP
    >>> history.best_step, history.validation[0]  # doctest: +SKIP
    (800, (0, 0.794))
    """
    from transformers import get_linear_schedule_with_warmup

    _check(train, steps, batch_size, batching, learning_rate, evaluate_every, patience)
    loss = MNRPlusLoss() if loss is None else loss
    domains = _domains_of(model, train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise DataError("model has no parameter that requires a gradient: nothing to train")
    every = max(1, steps // 10) if evaluate_every is None else evaluate_every
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, weight_decay=weight_decay, fused=_can_fuse(trained)
    )
    schedule = get_linear_schedule_with_warmup(optimizer, min(warmup_steps, steps), steps)
    best = _Best(patience)
    losses: list[float] = []
    rates: list[float] = []
    n_pairs = 0
    devices = [parameter.device for parameter in trained if parameter.is_cuda][:1]
    with torch.random.fork_rng(devices), _mode_kept(model):
        torch.manual_seed(seed)
        if validation is not None:
            best.start(evaluate_pairs(model, validation).f1)
        batches = _batches(train, batch_size, batching, seed)
        for step in range(1, steps + 1):
            model.train()
            first, second = next(batches)
            n_pairs += len(first)
            texts = [*first, *second]
            vectors = embed_batch(model, texts, one_pass=auxiliary is not None)
            value = loss(*torch.split(vectors, len(first)))
            if auxiliary is not None:
                ids = [domain_index(text.domain, domains) for text in texts]
                value = value + auxiliary(torch.tensor(ids, device=model.device))
            losses.append(float(value.detach()))
            rates.append(loss.diagonal_rate)
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss at step {step} is {losses[-1]}")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, steps)
            if (
                validation is not None
                and (step % every == 0 or step == steps)
                and best.enough(step, evaluate_pairs(model, validation).f1, model)
            ):
                break
    best_step = best.restore(model) if validation is not None else len(losses)
    return CoCitationHistory(
        tuple(losses), tuple(rates), tuple(best.seen), best_step, len(losses) < steps, n_pairs
    )


def evaluate_pairs(
    model: SentenceTransformer, pairs: LabelledPairs, *, domain: str | None = None
) -> PairScores:
    """Return how well a model tells positive from negative pairs, without training it.

    Parameters
    ----------
    model
        As in `train_cocitation`.
    pairs
        What to judge by.
    domain
        Take all texts for texts of this domain: what the wrong expert makes of them. None takes
        each pair's own.
    """
    with _mode_kept(model):
        return score_pairs(
            lambda texts, domains: encode_domains(
                model, texts, domains if domain is None else [domain] * len(texts)
            ),
            pairs,
        )


@contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)


class _Best:
    """The best weights so far, and how long they have been the best."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.seen: list[tuple[int, float]] = []
        self.waited = 0
        self.score = -np.inf
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    def start(self, score: float) -> None:
        """Note the score before training; like the paper, do not count it as a checkpoint."""
        self.seen.append((0, score))

    def enough(self, step: int, score: float, model: nn.Module) -> bool:
        self.seen.append((step, score))
        if score > self.score:
            self.score, self.step, self.waited = score, step, 0
            self.weights = {
                name: value.detach().to("cpu", copy=True)
                for name, value in model.named_parameters()
                if value.requires_grad
            }
        else:
            self.waited += 1
        return self.waited >= self.patience

    @torch.no_grad()
    def restore(self, model: nn.Module) -> int:
        parameters = dict(model.named_parameters())
        for name, value in self.weights.items():
            parameters[name].copy_(value)
        return self.step


def _batches(
    train: Sequence[TextPairs], batch_size: int, batching: Batching, seed: int
) -> Iterator[tuple[list[DomainText], list[DomainText]]]:
    columns = [
        [
            DomainText(text, pairs.group)
            for pairs in train
            for text in (pairs.positives if positive else pairs.queries)
        ]
        for positive in (False, True)
    ]
    groups: Sequence[TextPairs] = train
    if batching == "mixed":
        queries, positives = (tuple(str.__str__(text) for text in side) for side in columns)
        groups = [TextPairs(queries, positives, group="mixed")]
    turn = np.random.default_rng([seed, 1])
    indices: Indices
    for indices in homogeneous_batches(groups, batch_size, seed):
        turned = turn.random(len(indices)) < 0.5
        rows = [
            (columns[1][row], columns[0][row]) if flip else (columns[0][row], columns[1][row])
            for row, flip in zip(indices.tolist(), turned.tolist(), strict=True)
        ]
        yield [first for first, _ in rows], [second for _, second in rows]


def _domains_of(model: SentenceTransformer, train: Sequence[TextPairs]) -> list[str]:
    """Return the domains that a group's name is an index of."""
    first = model[0]
    if not isinstance(first, DomainTransformer):
        return list(dict.fromkeys(pairs.group for pairs in train))
    for pairs in train:
        domain_index(pairs.group, first.domains)
    return list(first.domains)


def _can_fuse(parameters: Sequence[nn.Parameter]) -> bool:
    return all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for parameter in parameters
    )


def _check(
    train: Sequence[TextPairs],
    steps: int,
    batch_size: int,
    batching: str,
    learning_rate: float,
    evaluate_every: int | None,
    patience: int,
) -> None:
    if not train or not all(len(pairs) for pairs in train):
        raise DataError("train must hold at least one group of pairs, and none may be empty")
    if any(pairs.negatives is not None for pairs in train):
        raise DataError("train must be pairs alone: other texts of the batch are the negatives")
    if batching not in ("mixed", "by-domain"):
        raise DataError(f"batching must be 'mixed' or 'by-domain', got {batching!r}")
    if steps < 1 or patience < 1 or (evaluate_every is not None and evaluate_every < 1):
        raise DataError(
            f"steps, patience and evaluate_every must be at least 1, got {steps}, {patience} and "
            f"{evaluate_every}"
        )
    if batch_size < 2 or not learning_rate > 0:
        raise DataError(
            f"batch_size must be at least 2 and learning_rate above 0, got {batch_size} and "
            f"{learning_rate}"
        )
