"""MATES inside `transformers.Trainer`: what it trains on is chosen anew after every stage."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from transformers.trainer_callback import TrainerCallback

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError
from bakeoff.selection.influence_regressor import InfluenceRegressor, spearman
from bakeoff.selection.mates import (
    GumbelTopK,
    Progress,
    TrainingText,
    collated,
    padded_batches,
    probe_influence,
    reference_loss,
    training_texts,
)

Items = Sequence[TrainingText | Sample | str]

# The entry in the trainer's state. Not the class's name: the Trainer would then try to build this
# callback from JSON, where a pool cannot come from.
_STATE = "mates"
_NEAR_ZERO = 0.01


class StageDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """What a `MATESCallback` lets the Trainer train on: in every epoch the selection of a stage.

    Its length is the number of items a stage trains on, whatever the number selected: these are
    gone through in a random order, again and again where a stage is longer than the selection.
    """

    def __init__(self, callback: MATESCallback) -> None:
        self._callback = callback
        self._rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is out of range for {self._length} items")
        return self._callback.pool[int(self._rows[index])].features()

    def _show(self, selected: NDArray[np.int64], length: int, seed: list[int]) -> None:
        rng = np.random.default_rng(seed)
        rounds = math.ceil(length / len(selected))
        self._rows = np.concatenate([rng.permutation(selected) for _ in range(rounds)])[:length]
        self._length = length


class MATESCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Chooses the data of each training stage by its influence on a reference loss, as of then.

    One stage is one epoch of `train_dataset`. The first stages train on a random part of the pool.
    Before every later one: probe texts of the hold-out from the current weights and optimizer
    state, fit a regressor to the results, score the pool with it, draw the next selection.

    Give both to the Trainer::

        mates = MATESCallback(pool, holdout, reference, every=200, tokenizer=tokenizer)
        Trainer(model, arguments, train_dataset=mates.train_dataset,
                data_collator=mates.data_collator, callbacks=[mates])

    Parameters
    ----------
    pool
        What may be trained on: `TrainingText` items, or samples or texts with a `tokenizer`.
    holdout
        Texts like those of the pool that are probed and never trained on.
    reference
        What the reference loss is computed on. Do not evaluate on it.
    every
        Optimizer steps of a stage.
    ratio
        Share of the pool (of its part, see `n_pools`) that is selected.
    warmup_stages
        Stages on random selections, at least one: probes need a model that has begun to learn and
        an optimizer that has moments.
    n_probes
        Texts of the hold-out probed per refresh, drawn anew each time; None for all.
    regressor
        Copied for every refresh, or kept where it has ``warm_start=True``; by default
        `InfluenceRegressor`.
    validation_fraction
        Share of the probes that the regressor is judged on instead of fitted to.
    temperature, noise
        As in `GumbelTopK`, on standardised scores.
    refresh
        False chooses once, after the warm-up, and keeps that selection: the static control.
    n_pools
        Into how many parts the pool is cut at random; stage s selects from part s modulo
        `n_pools`. 1: always from all of it. The paper uses a new part for every stage.
    learning_rate
        Of the probes; by default the current one.
    clip_norm
        Largest gradient norm of a probe; the Trainer's ``max_grad_norm`` if None.
    tokenizer, max_length
        For samples and texts, see `training_texts`.
    random_state
        Seed of everything that is drawn. The global generators are left alone.
    progress
        Called with (probes done, probes in total) during each refresh.

    Attributes
    ----------
    train_dataset : StageDataset
        For the Trainer.
    selected_ : int64 array
        Rows of the pool in the current selection.
    history : list of dict
        One entry per stage: ``stage``, ``step``, ``kind`` ("random" or "mates"), ``n_selected``,
        ``source_mix`` (shares), ``overlap`` (share of the selection that the previous one had;
        None at first), ``seconds``, ``flops`` (see *Notes*) and, for refreshes, ``n_probes``,
        ``n_validation``, ``spearman`` (on the probes not fitted to; None if not defined),
        ``reference_loss``, ``influence_mean``, ``influence_std``, ``influence_helpful`` (share
        below 0) and ``learning_rate``.

    Warns
    -----
    UserWarning
        If a reference is also in the pool or the hold-out; if the learning rate at a refresh is
        below 1 % of the schedule's own.

    Raises
    ------
    DataError
        If hold-out and pool share a text, or an argument is out of range; at the start of training
        if the Trainer cannot work with it: other data, data loading in other processes, several
        devices, batches found automatically, grouping by length.

    Notes
    -----
    ``flops`` counts 2 x parameters x tokens for reading and 6 x for a step: ``probe_steps``,
    ``reference`` (reading the references after every probe), ``regressor`` (embedding texts; None
    where the encoder is unknown; only once where vectors do not change), and ``training`` (the
    stage itself). To compare at equal compute, give the rival the sum.

    Because an epoch ends where a stage ends, no batch of the old selection has been fetched ahead
    when the new one begins. After ``resume_from_checkpoint`` training goes on as if it had not
    stopped; with a warm-started regressor it begins anew.

    Under mixed precision, probes run in the weights' own float32.

    References
    ----------
    Zichun Yu, Spandan Das and Chenyan Xiong. "MATES: Model-aware data selection for efficient
    pretraining with data influence models". NeurIPS 2024. arXiv:2406.06046.
    """

    def __init__(
        self,
        pool: Items,
        holdout: Items,
        reference: Items,
        *,
        every: int = 10_000,
        ratio: float = 0.2,
        warmup_stages: int = 1,
        n_probes: int | None = None,
        regressor: Any = None,
        validation_fraction: float = 0.1,
        temperature: float | None = 1.0,
        noise: Literal["textbook", "official"] = "textbook",
        refresh: bool = True,
        n_pools: int = 1,
        learning_rate: float | None = None,
        clip_norm: float | None = None,
        tokenizer: Any = None,
        max_length: int = 1024,
        random_state: int = 0,
        progress: Progress | None = None,
    ) -> None:
        for name, value in (
            ("every", every),
            ("warmup_stages", warmup_stages),
            ("n_pools", n_pools),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be a positive integer, got {value!r}")
        if not 0 < validation_fraction < 1:
            raise DataError(
                f"validation_fraction must be between 0 and 1, got {validation_fraction}"
            )
        GumbelTopK(ratio, temperature, noise)  # raises
        self.pool = _as_items(pool, "pool", tokenizer, max_length)
        self.holdout = _as_items(holdout, "holdout", tokenizer, max_length)
        self.reference = _as_items(reference, "reference", tokenizer, max_length)
        if n_pools > len(self.pool):
            raise DataError(f"n_pools must be at most {len(self.pool)}, got {n_pools}")
        if n_probes is not None and not 5 <= n_probes <= len(self.holdout):
            raise DataError(
                f"n_probes must be between 5 and {len(self.holdout)}, the texts of holdout, got "
                f"{n_probes}"
            )
        if len(self.holdout) < 5:
            raise DataError(f"holdout must have at least 5 texts, got {len(self.holdout)}")
        self._check_overlap()
        self.every, self.ratio, self.warmup_stages = every, ratio, warmup_stages
        self.n_probes, self.validation_fraction = n_probes, validation_fraction
        self.temperature, self.noise, self.refresh = temperature, noise, refresh
        self.n_pools, self.learning_rate, self.clip_norm = n_pools, learning_rate, clip_norm
        self.random_state, self.progress = random_state, progress
        self._regressor = InfluenceRegressor() if regressor is None else regressor
        self._vectors: dict[str, Any] = {}
        self._items_per_step: int | None = None
        self.stage = -1
        self.selected_ = np.arange(len(self.pool))
        self._parts = np.array_split(
            np.random.default_rng([random_state, 0]).permutation(len(self.pool)), n_pools
        )
        self.train_dataset = StageDataset(self)
        self._reset()

    def data_collator(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad items on the right; gives ``input_ids``, ``labels`` and ``attention_mask``."""
        return collated([TrainingText("", f["input_ids"], f["labels"]) for f in features])

    # The Trainer's events --------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how many items an optimizer step takes, which fixes the length of an epoch."""
        if args.dataloader_num_workers > 0:
            raise DataError(
                "dataloader_num_workers must be 0: other processes would not see the selection "
                f"change, got {args.dataloader_num_workers}"
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise DataError(
                f"MATESCallback probes on one device; got {args.world_size} processes and "
                f"{args.n_gpu} GPUs"
            )
        if args.auto_find_batch_size:
            raise DataError("auto_find_batch_size must be off: a stage has a fixed number of items")
        strategy = getattr(args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            raise DataError(
                'train_sampling_strategy must be "random" or "sequential", as lengths change with '
                f"the selection, got {strategy!r}"
            )
        self._items_per_step = args.train_batch_size * args.gradient_accumulation_steps
        self._show()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the Trainer; take up the state of the checkpoint, or begin."""
        loader = kwargs.get("train_dataloader")
        if self._items_per_step is None:
            raise DataError(
                "give MATESCallback to the Trainer's constructor, callbacks=[...]: added later, it "
                "comes too late to fix the length of an epoch"
            )
        if loader is not None and getattr(loader, "dataset", None) is not self.train_dataset:
            raise DataError("train_dataset of the Trainer must be MATESCallback.train_dataset")
        if state.global_step == 0:
            self._reset()
        else:
            self._load(state)
        self._show()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose what the stage that begins trains on, unless a checkpoint has told already."""
        stage = state.global_step // self.every
        if stage == self.stage:
            return
        started = time.perf_counter()
        previous = self.selected_ if self.history else None
        part = self._parts[stage % self.n_pools]
        self.stage = stage
        kept = not self.refresh and bool(self.history) and self.history[-1]["kind"] == "mates"
        entry: dict[str, Any] = {"stage": stage, "step": int(state.global_step), "kind": "random"}
        flops: dict[str, float | None] = {"probe_steps": 0.0, "reference": 0.0, "regressor": 0.0}
        if kept:
            entry["kind"] = "mates"
        elif stage < self.warmup_stages:
            n = max(1, math.floor(self.ratio * len(part) + 1e-9))
            self.selected_ = self._rng(stage, 1).choice(part, size=n, replace=False)
        else:
            entry["kind"] = "mates"
            with torch.random.fork_rng(enabled=True):
                found, flops = self._select(args, part, kwargs["model"], kwargs["optimizer"])
            entry.update(found)
        self._show()
        parameters = sum(p.numel() for p in kwargs["model"].parameters())
        shown = [len(self.pool[row].input_ids) for row in self.train_dataset._rows.tolist()]
        sources = Counter(self.pool[row].source for row in self.selected_.tolist())
        n_selected = len(self.selected_)
        entry |= {
            "n_selected": n_selected,
            "source_mix": {name: sources[name] / n_selected for name in sorted(sources)},
            "overlap": None
            if previous is None
            else len(np.intersect1d(self.selected_, previous)) / n_selected,
            "flops": {**flops, "training": 6.0 * parameters * sum(shown)},
            "seconds": time.perf_counter() - started,
        }
        self.history.append(entry)
        logged = ("spearman", "overlap", "reference_loss", "influence_helpful", "seconds")
        state.log_history.append(
            {f"mates_{name}": entry[name] for name in logged if entry.get(name) is not None}
            | {"step": int(state.global_step), "epoch": state.epoch}
        )
        state.stateful_callbacks[_STATE] = self.state()

    # Choosing --------------------------------------------------------------------------------

    def _select(
        self, args: Any, part: NDArray[np.int64], model: Any, optimizer: Any
    ) -> tuple[dict[str, Any], dict[str, float | None]]:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        rng = self._rng(self.stage, 2)
        n = len(self.holdout) if self.n_probes is None else self.n_probes
        rows = rng.choice(len(self.holdout), size=n, replace=False)
        probes = [self.holdout[row] for row in rows.tolist()]
        references = padded_batches(self.reference)
        rate = self._rate(optimizer)
        clip = self.clip_norm if self.clip_norm is not None else (args.max_grad_norm or None)
        with _own_precision(model):
            base = reference_loss(model, references)
            scores = probe_influence(
                model,
                optimizer,
                [collated([item]) for item in probes],
                references,
                learning_rate=self.learning_rate,
                clip_norm=clip,
                progress=self.progress,
            )
        n_validation = min(max(2, round(self.validation_fraction * n)), n - 3)
        holdout, embedded_holdout = self._features("holdout", self.holdout)
        pool, embedded_pool = self._features("pool", self.pool)
        fitted = rows[n_validation:]
        regressor = self._regressor
        if isinstance(regressor, BaseEstimator) and not getattr(regressor, "warm_start", False):
            regressor = clone(regressor)
        regressor.fit(_take(holdout, fitted), scores[n_validation:])
        held_out = regressor.predict(_take(holdout, rows[:n_validation]))
        rank = spearman(np.asarray(held_out, dtype=np.float64), scores[:n_validation])
        mean, std = float(scores[n_validation:].mean()), float(scores[n_validation:].std()) or 1.0
        predicted = (
            np.asarray(regressor.predict(_take(pool, part)), dtype=np.float64) - mean
        ) / std
        sampler = GumbelTopK(
            self.ratio, self.temperature, self.noise, random_state=self._rng(self.stage, 3)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # weak predictions are in the history
            self.selected_ = part[sampler.select(predicted)]
        parameters = sum(p.numel() for p in model.parameters())
        read = 0.0
        if not isinstance(holdout, np.ndarray):  # fine-tuned encoders read everything every time
            read = _flops(regressor, [*_take(holdout, rows), *_take(pool, part)])
        read += embedded_holdout + embedded_pool
        entry = {
            "n_probes": n,
            "n_validation": n_validation,
            "spearman": None if math.isnan(rank) else rank,
            "reference_loss": base,
            "influence_mean": float(scores.mean()),
            "influence_std": float(scores.std()),
            "influence_helpful": float((scores < 0).mean()),
            "learning_rate": rate,
        }
        flops: dict[str, float | None] = {
            "probe_steps": 6.0 * parameters * sum(len(item.input_ids) for item in probes),
            "reference": 2.0
            * parameters
            * (n + 2)
            * sum(len(item.input_ids) for item in self.reference),
            "regressor": None if math.isnan(read) else read,
        }
        return entry, flops

    def _rate(self, optimizer: Any) -> float:
        groups = optimizer.param_groups
        if self.learning_rate is not None:
            return self.learning_rate
        rate = max(float(group["lr"]) for group in groups)
        planned = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        if rate < _NEAR_ZERO * planned:
            warnings.warn(
                f"the learning rate at this refresh is {rate:.1e}, below 1 % of {planned:.1e}: "
                "probes tell little; give learning_rate, or refresh outside warm-up and decay",
                stacklevel=2,
            )
        return rate

    def _features(self, name: str, items: Sequence[TrainingText]) -> tuple[Any, float]:
        """Return what the regressor reads, and the operations it took; vectors are made once."""
        texts = [item.text for item in items]
        if not hasattr(self._regressor, "encode"):
            return texts, 0.0
        if name in self._vectors:
            return self._vectors[name], 0.0
        self._vectors[name] = self._regressor.encode(texts)
        return self._vectors[name], _flops(self._regressor, texts)

    # State -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON-able values."""
        return {
            "stage": self.stage,
            "selected": self.selected_.tolist(),
            "history": self.history,
            "items_per_step": self._items_per_step,
            "pool": _digest(self.pool),
        }

    def _reset(self) -> None:
        self.stage = -1
        self.history: list[dict[str, Any]] = []
        self.selected_ = np.arange(len(self.pool))
        self._show()

    def _load(self, state: Any) -> None:
        kept = state.stateful_callbacks.get(_STATE)
        if kept is None:
            raise DataError(
                "the checkpoint has no state of MATESCallback: it was not made with this callback"
            )
        if kept["pool"] != _digest(self.pool):
            raise DataError("pool must be the one that the checkpoint was made with")
        if kept["items_per_step"] != self._items_per_step:
            raise DataError(
                "the checkpoint was made with "
                f"{kept['items_per_step']} items per optimizer step, got {self._items_per_step}"
            )
        self.stage = int(kept["stage"])
        self.selected_ = np.array(kept["selected"], dtype=np.int64)
        self.history = [dict(entry) for entry in kept["history"]]

    def _show(self) -> None:
        # Before the Trainer has said how many items a step takes, it only asks for a length.
        length = self.every * (self._items_per_step or 1)
        self.train_dataset._show(self.selected_, length, [self.random_state, 4, self.stage + 1])

    def _rng(self, stage: int, part: int) -> np.random.Generator:
        return np.random.default_rng([self.random_state, part, stage + 1])

    def _check_overlap(self) -> None:
        pool, holdout, reference = (
            {_key(item) for item in items} for items in (self.pool, self.holdout, self.reference)
        )
        if shared := pool & holdout:
            raise DataError(
                f"holdout shares {len(shared)} texts with pool: the regressor would have seen what "
                "it scores; take them out of one"
            )
        if shared := reference & (pool | holdout):
            warnings.warn(
                f"{len(shared)} reference texts are also in pool or holdout: training on them "
                "lowers the reference loss without learning what it stands for",
                stacklevel=3,
            )


def _as_items(items: Items, name: str, tokenizer: Any, max_length: int) -> list[TrainingText]:
    if isinstance(items, str) or len(items) == 0:
        raise DataError(f"{name} must be a list with at least one item")
    if all(isinstance(item, TrainingText) for item in items):
        return list(items)  # type: ignore[arg-type]
    if any(not isinstance(item, Sample | str) for item in items):
        bad = next(item for item in items if not isinstance(item, Sample | str))
        raise DataError(
            f"{name} must have TrainingText items, or samples or texts alone, got "
            f"{type(bad).__name__}"
        )
    if tokenizer is None:
        raise DataError(f"tokenizer must be given where {name} has samples or texts")
    return training_texts(items, tokenizer, max_length=max_length)  # type: ignore[arg-type]


def _take(features: Any, rows: NDArray[np.int64]) -> Any:
    if isinstance(features, np.ndarray):
        return features[rows]
    return [features[row] for row in rows.tolist()]


def _flops(regressor: Any, texts: Sequence[str]) -> float:
    return (
        float(regressor.inference_flops(texts))
        if hasattr(regressor, "inference_flops")
        else math.nan
    )


def _key(item: TrainingText) -> bytes:
    return hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).digest()


def _digest(items: Sequence[TrainingText]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(_key(item))
    return digest.hexdigest()


@contextmanager
def _own_precision(model: Any) -> Iterator[None]:
    """Undo accelerate's autocast around the forward pass for a while."""
    original = getattr(model, "_original_forward", None)
    if original is None or "forward" not in model.__dict__:
        yield
        return
    wrapped = model.__dict__["forward"]
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
