"""Fitting one design: a head on cached states, or a head and its base model on texts.

Both run the same contrastive loop over the same batches; they differ only in where a text's states
come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.baselines import best_layer
from bakeoff.embedding.pooling import PoolingModule
from bakeoff.embedding.scoring import Embed, Role
from bakeoff.embedding.training import (
    Budget,
    Encode,
    homogeneous_batches,
    negatives_of,
    train_contrastive,
)
from bakeoff.embedding.two_stage import add_lora, embed_with_gradients, merge_lora
from bakeoff.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import Features

Vectors = NDArray[np.float32]
Indices = NDArray[np.int64]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Fitted:
    """A fitted design, ready to embed texts and to be saved.

    Parameters
    ----------
    head
        The pooling head, in evaluation mode.
    embed
        Texts in a role to unit vectors ``(n, d)``, float32.
    trained_parameters
        How many numbers were trained.
    offsets
        By role, ``(d,)``, subtracted before normalising; empty if vectors are not centred.
    base
        What was trained in the base model, by parameter name: adapters, all weights, or nothing.
    """

    head: PoolingModule
    embed: Embed
    trained_parameters: int = 0
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None

    def save(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """Write ``head.safetensors``, ``base.safetensors`` if trained, and ``fitted.json``."""
        _write_tensors(directory / "head.safetensors", self.head.state_dict())
        _write_tensors(directory / "offsets.safetensors", self.offsets)
        if self.base is not None:
            _write_tensors(directory / "base.safetensors", self.base)
        (directory / "fitted.json").write_text(json.dumps(dict(facts)), encoding="utf-8")


@dataclass(frozen=True)
class Artifact:
    """What `Fitted.save` wrote, read again."""

    facts: Mapping[str, Any]
    head: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None

    @classmethod
    def load(cls, directory: Path) -> Artifact:
        """Read an artifact folder."""
        facts = json.loads((directory / "fitted.json").read_text("utf-8"))
        head = load_file(str(directory / "head.safetensors"))
        offsets = load_file(str(directory / "offsets.safetensors"))
        base = directory / "base.safetensors"
        return cls(facts, head, offsets, load_file(str(base)) if base.exists() else None)

    def restore_base(self, model: SentenceTransformer, *, lora: bool) -> None:
        """Put the trained part of the base model, if there is one, into `model`."""
        if self.base is None:
            return
        if lora:
            add_lora(model)
        unknown = model[0].model.load_state_dict(self.base, strict=False).unexpected_keys
        if unknown:
            raise ModelError(f"the base model has no weights named {unknown[:3]}")
        if lora:
            merge_lora(model)


@dataclass(frozen=True)
class TrainingGroup:
    """Pairs of one source, and whether the others of a batch serve as negatives."""

    pairs: TextPairs
    in_batch: bool = True


class CachedTexts:
    """Texts by their position in a set of cached hidden states."""

    def __init__(self, features: Features, texts: Sequence[str]) -> None:
        self.features = features
        self._position = {text: index for index, text in enumerate(texts)}

    def positions(self, texts: Sequence[str]) -> Indices:
        """Return where texts stand, ``(n,)``."""
        return np.array([self._position[text] for text in texts], dtype=np.int64)

    def states(self, reads: str, positions: Indices) -> tuple[Tensor, Tensor | None]:
        """Return what a head reads of some texts, and the token mask if it reads tokens."""
        if reads == "tokens":
            return self.features.tokens(positions)
        if reads == "layer_means":
            return self.features.layer_means(positions), None
        return self.features.layer_lasts(positions), None

    def pool(self, head: PoolingModule, positions: Indices, block: int = 256) -> Tensor:
        """Return a head's vectors of some texts, float32, computed block by block."""
        with torch.no_grad():
            parts = [
                head.pool(*self.states(head.reads, positions[start : start + block]))
                for start in range(0, len(positions), block)
            ]
        return torch.cat(parts).float()


class _Sides:
    """The queries, positives and hard negatives of all groups, addressed by pair."""

    def __init__(self, groups: Sequence[TrainingGroup]) -> None:
        pairs = [group.pairs for group in groups]
        self._queries = [text for group in pairs for text in group.queries]
        self._positives = [text for group in pairs for text in group.positives]
        self._negatives = [
            entry for group in pairs for entry in negatives_of(group) or [()] * len(group)
        ]

    def __len__(self) -> int:
        return len(self._queries)

    def of(self, side: str, pairs: Indices) -> list[str]:
        """Return one side's texts, pair by pair; of n negatives each, all n in a row."""
        if side == "negative":
            return [text for pair in pairs for text in self._negatives[pair]]
        texts = self._queries if side == "query" else self._positives
        return [texts[pair] for pair in pairs]


def _encoder(sides: _Sides, embed: Callable[[Sequence[str]], Tensor]) -> Encode:
    """Return the function that `train_contrastive` asks for the vectors of some pairs."""

    def encode(side: str, pairs: Indices) -> Tensor | None:
        texts = sides.of(side, pairs)
        if not texts:
            return None
        vectors = embed(texts)
        return vectors if side != "negative" else vectors.view(len(pairs), -1, vectors.shape[1])

    return encode


def choose_layer(
    cached: CachedTexts, groups: Sequence[TrainingGroup], *, center: bool, at_most: int = 2000
) -> int:
    """Return the layer whose mean vectors best match training queries with their positives.

    Parameters
    ----------
    cached
        Hidden states of the training texts.
    groups
        Training pairs.
    center
        Whether each layer's mean over queries and over positives is subtracted from them first.
    at_most
        Pairs looked at, chosen at random with a fixed seed: memory is 70 kB a text and layer set.
    """
    sides = _Sides(groups)
    pairs = np.sort(np.random.default_rng(0).permutation(len(sides))[:at_most])
    queries, positives = (
        cached.features.layer_means(cached.positions(sides.of(side, pairs)))
        for side in ("query", "positive")
    )
    if center:
        queries, positives = queries - queries.mean(dim=0), positives - positives.mean(dim=0)
    return best_layer(queries, positives)


def fit_head(
    head: PoolingModule,
    cached: CachedTexts,
    groups: Sequence[TrainingGroup],
    *,
    budget: Budget | None,
    seed: int,
    center: bool = False,
    progress: Progress | None = None,
) -> Fitted:
    """Fit a head on the cached states of a frozen base model.

    Parameters
    ----------
    head
        Changed in place.
    cached
        Hidden states of all texts that are trained on or will be embedded.
    groups
        Training pairs.
    budget
        None for heads that are not trained.
    seed
        Order of the batches.
    center
        Whether the mean vector of the training queries is subtracted from every query, that of the
        training positives from every document, and the mean of the two from other texts. A decoder
        sets docstrings and code far apart as a whole; what is left says which belong together.
    progress
        Called with the fraction done.
    """
    if budget is not None:

        def pool(texts: Sequence[str]) -> Tensor:
            return head.pool(*cached.states(head.reads, cached.positions(texts)))

        _train(_encoder(_Sides(groups), pool), head, [], groups, budget, seed, progress)
    head.eval().requires_grad_(False)
    offsets: dict[str, Tensor] = {}
    if center:
        head.normalize = False
        offsets = _role_means(head, cached, groups)

    def embed(texts: Sequence[str], role: Role) -> Vectors:
        vectors = cached.pool(head, cached.positions(texts))
        vectors = vectors - offsets[role] if offsets else vectors
        return np.asarray(torch.nn.functional.normalize(vectors, dim=-1).numpy())

    trained = sum(parameter.numel() for parameter in head.parameters()) if budget else 0
    return Fitted(head, embed, trained, offsets)


def _role_means(
    head: PoolingModule, cached: CachedTexts, groups: Sequence[TrainingGroup]
) -> dict[str, Tensor]:
    sides = _Sides(groups)
    means = {}
    for role, side in (("query", "query"), ("document", "positive")):
        texts = dict.fromkeys(sides.of(side, np.arange(len(sides))))
        means[role] = cached.pool(head, cached.positions(list(texts))).mean(dim=0)
    return {**means, "text": (means["query"] + means["document"]) / 2}


def fit_whole(
    model: SentenceTransformer,
    head: PoolingModule,
    groups: Sequence[TrainingGroup],
    *,
    budget: Budget,
    seed: int,
    lora: bool,
    progress: Progress | None = None,
) -> Fitted:
    """Fit a head together with its base model, or with LoRA adapters in it.

    Parameters
    ----------
    model
        Holds the base model and `head`; changed in place, adapters merged at the end.
    head
        The module of `model` that pools.
    groups
        Training pairs.
    budget, seed, progress
        As in `fit_head`.
    lora
        Adapters if True, all weights if False.
    """
    from bakeoff.models import encode as encode_texts

    if lora:
        add_lora(model)
    base_parameters = [p for p in model[0].parameters() if p.requires_grad]
    encode = _encoder(_Sides(groups), partial(embed_with_gradients, model))
    model.train()
    _train(encode, head, base_parameters, groups, budget, seed, progress)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned = {
        name: parameter.detach().clone()
        for name, parameter in model[0].model.named_parameters()
        if parameter.requires_grad
    }
    if lora:
        merge_lora(model)
    model.eval().requires_grad_(False)
    known: dict[str, Vectors] = {}

    def embed(texts: Sequence[str], role: Role) -> Vectors:
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            # What is cut is counted and said once, by the problem.
            vectors = encode_texts(model, missing, on_truncated=lambda rows: None)
            known.update(zip(missing, vectors, strict=True))
        return np.stack([known[text] for text in texts])

    return Fitted(head, embed, trained, base=learned)


def _train(
    encode: Encode,
    head: PoolingModule,
    base_parameters: Sequence[torch.nn.Parameter],
    groups: Sequence[TrainingGroup],
    budget: Budget,
    seed: int,
    progress: Progress | None,
) -> None:
    parameter_groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in (
            (list(head.parameters()), budget.learning_rate),
            (list(base_parameters), budget.base_learning_rate),
        )
        if parameters
    ]
    batches = homogeneous_batches(
        [group.pairs for group in groups],
        budget.batch_size,
        seed,
        distinct=lambda number: groups[number].in_batch,
    )
    ends = np.cumsum([len(group.pairs) for group in groups])
    train_contrastive(
        encode,
        batches,
        parameter_groups,
        steps=budget.steps,
        learning_rate=budget.learning_rate,
        warmup_steps=budget.steps // 10,
        # A batch comes from one group, so its first pair tells which.
        in_batch=lambda pairs: groups[int(np.searchsorted(ends, pairs[0], "right"))].in_batch,
        progress=progress,
    )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
