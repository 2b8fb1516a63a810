"""A text encoder whose next version goes on serving the index of the last one.

`stationary_encoder` puts a layer without bias behind any encoder. Its features are trained against
the fixed simplex classifier and, in an update, against the vectors that the old version has stored
(`CompatibleEncoderLoss`). The result is an ordinary sentence-transformers folder with the slots of
the classes in it. `bakeoff.models.load_encoder` reads it without running code of the folder;
``SentenceTransformer(folder, trust_remote_code=True)`` does where this package is installed;
`plain_encoder` makes one that loads without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn

from bakeoff.embedding.pooling import positive_int
from bakeoff.embedding.stationary import (
    SLOTS_FILE,
    ClassSlots,
    Geometry,
    HOCLoss,
    SameClass,
    SimplexClassifier,
    check_share,
    compatible_loss,
    in_order,
)
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

FEATURES = "stationary_features"
"""Key under which `StationaryProjection` leaves its features before normalisation."""


class StationaryProjection(Module):  # type: ignore[misc]  # sentence-transformers is untyped
    """The last module of a stationary encoder: sentence embedding in, simplex features out.

    Parameters
    ----------
    in_features
        Width of the encoder's sentence embedding.
    num_slots
        Number K of preallocated classes; the embedding has width K - 1.
    normalize
        Whether the embedding has unit length. The classifier always reads the features before.
    from_end, geometry, seed
        As in `bakeoff.embedding.stationary.SimplexClassifier`.

    Attributes
    ----------
    classifier : SimplexClassifier
        Has no weights; ``classifier.slots`` is saved as ``slots.json``.
    """

    config_keys = ("in_features", "num_slots", "normalize", "from_end", "geometry", "seed")

    def __init__(
        self,
        in_features: int,
        num_slots: int = 1024,
        *,
        normalize: bool = True,
        from_end: bool = True,
        geometry: Geometry = "simplex",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.num_slots = num_slots
        self.normalize = normalize
        self.from_end = from_end
        self.geometry = geometry
        self.seed = seed
        self.classifier = SimplexClassifier(
            num_slots, from_end=from_end, geometry=geometry, seed=seed
        )
        self.linear = nn.Linear(in_features, self.classifier.width, bias=False)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Replace ``"sentence_embedding"`` and add the features before normalisation."""
        embedding = features["sentence_embedding"]
        if embedding.shape[-1] != self.in_features:
            raise DataError(
                f"the encoder's sentence embedding has width {embedding.shape[-1]}, this "
                f"projection reads in_features={self.in_features}"
            )
        raw = self.linear(embedding.to(self.linear.weight.dtype))
        features[FEATURES] = raw
        features["sentence_embedding"] = (
            nn.functional.normalize(raw, dim=-1) if self.normalize else raw
        )
        return features

    def get_embedding_dimension(self) -> int:
        """Return the width of the embedding, K - 1."""
        return self.classifier.width

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``slots.json``."""
        self.save_config(output_path)
        weight = {"linear.weight": self.linear.weight.detach().contiguous()}
        save_file(weight, str(Path(output_path) / "model.safetensors"))
        self.classifier.slots.save(Path(output_path) / SLOTS_FILE)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read what `save` wrote, from a folder or the hub.

        Raises
        ------
        bakeoff.errors.DataError
            If a file is missing, or the manifest is for another number of slots or geometry.
        """
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        projection = cls(**cls.load_config(model_name_or_path, **where))
        paths = {}
        for name in ("model.safetensors", SLOTS_FILE):
            path = cls.load_file_path(model_name_or_path, name, **where)
            if path is None:
                raise DataError(f"no {name} in {model_name_or_path}/{subfolder}")
            paths[name] = path
        classifier = projection.classifier
        classifier.slots = classifier.slots.merge(ClassSlots.load(paths[SLOTS_FILE]))
        projection.load_state_dict(load_file(paths["model.safetensors"]))
        return projection


def stationary_encoder(
    encoder: SentenceTransformer | str | Path,
    num_slots: int = 1024,
    *,
    slots: ClassSlots | None = None,
    normalize: bool = True,
    from_end: bool = True,
    geometry: Geometry = "simplex",
    seed: int = 0,
) -> SentenceTransformer:
    """Return an encoder with a new `StationaryProjection` behind it: a first or replacing version.

    Parameters
    ----------
    encoder
        A SentenceTransformer (its modules are used, not copied), or what
        `bakeoff.models.load_encoder` takes. If it ends in a normalisation or a projection of an
        earlier version, that is left out.
    num_slots
        Number K of slots; must be that of all other versions. To serve an index that some other
        model has built, whose vectors have width d, take K = d + 1.
    slots
        The classes that have a slot already, e.g. ``slots_of(old_model)``.
    normalize, from_end, geometry
        As in `StationaryProjection`.
    seed
        Of the projection's first weights (and of the random geometries).

    Examples
    --------
    >>> model = stationary_encoder("all-minilm-l6-v2")  # doctest: +SKIP
    >>> fit_stationary_encoder(model, texts, labels)  # doctest: +SKIP
    >>> model.save("version-1")  # doctest: +SKIP
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    if not isinstance(encoder, SentenceTransformer):
        from bakeoff.models import load_encoder

        encoder = load_encoder(encoder)
    modules = list(encoder)
    while len(modules) > 1 and isinstance(modules[-1], Normalize | StationaryProjection):
        modules.pop()
    width = _width_of(modules)
    if slots is not None and (slots.num_slots, slots.geometry) != (num_slots, geometry):
        raise DataError(
            f"versions must share their fixed classifier: slots are for {slots.num_slots} slots "
            f"({slots.geometry}), num_slots is {num_slots} ({geometry})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = StationaryProjection(
            width,
            num_slots,
            normalize=normalize,
            from_end=from_end,
            geometry=geometry,
            seed=seed if slots is None else slots.seed,
        )
    if slots is not None:
        projection.classifier.slots = projection.classifier.slots.merge(slots)
    return SentenceTransformer(
        modules=[*modules, projection],
        prompts=encoder.prompts,
        default_prompt_name=encoder.default_prompt_name,
        similarity_fn_name="cosine",
        device=str(encoder.device),
    )


def plain_encoder(model: SentenceTransformer) -> SentenceTransformer:
    """Return a stationary encoder as modules of sentence-transformers alone.

    A folder of it loads without this package, and without ``trust_remote_code``; it gives the same
    embeddings but cannot be updated, since it does not know the slots.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

    projection = projection_of(model)
    dense = Dense(
        projection.in_features,
        projection.classifier.width,
        bias=False,
        activation_function=nn.Identity(),
        init_weight=projection.linear.weight.detach().clone(),
    )
    modules = [*list(model)[:-1], dense, *([Normalize()] if projection.normalize else [])]
    return SentenceTransformer(
        modules=modules,
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name="cosine",
        device=str(model.device),
    )


def projection_of(model: nn.Module) -> StationaryProjection:
    """Return a model's `StationaryProjection`, or raise DataError if it has none."""
    for module in reversed(list(model.children())):
        if isinstance(module, StationaryProjection):
            return module
    raise DataError(
        "model must end in a StationaryProjection: make it with stationary_encoder(encoder)"
    )


def slots_of(model: nn.Module) -> ClassSlots:
    """Return the slot manifest of a stationary encoder."""
    return projection_of(model).classifier.slots


class CompatibleEncoderLoss(nn.Module):
    """Cross-entropy against the fixed classifier and HOC against stored vectors, as one loss.

    For ``SentenceTransformerTrainer`` and for plain loops. The ``label`` of a training row is its
    number: class and stored vector are looked up here, so that stored vectors need not fit into a
    data set's columns. `compatible_dataset` makes such a data set. With `old_vectors`, every batch
    needs two classes: let the trainer leave out a short last one (``dataloader_drop_last=True``).

    Parameters
    ----------
    model
        A stationary encoder. Classes without a slot get one.
    labels
        n labels, strings or whole numbers.
    old_vectors
        ``(n, width)``: what the old version gives for the same texts, e.g. read from the index;
        None for a first version. They are kept on the CPU, in float32.
    lam, mu, same_class
        Of `compatible_loss` and `HOCLoss`. ``lam=0`` ties the model to the stored vectors alone,
        for an index whose model was not trained with the fixed classifier.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If the model has no `StationaryProjection`, there are more classes than
        slots, or `old_vectors` has another shape, is not finite or has rows of length 0.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[Any],
        old_vectors: ArrayLike | None = None,
        *,
        lam: float = 0.1,
        mu: float = 10.0,
        same_class: SameClass = "zero",
    ) -> None:
        super().__init__()
        check_share("lam", lam)
        self.model = model
        self.lam = lam
        self.hoc = HOCLoss(mu, same_class)
        self._classifier = projection_of(model).classifier
        self._old = None if old_vectors is None else self._stored(old_vectors, len(labels))
        self._classifier.add(in_order(labels))
        self._slots = self._classifier.targets(labels)

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of one batch; `labels` are row numbers ``(n,)``."""
        if labels is None:
            raise DataError(
                "labels are missing: the data set needs a column 'label' of row numbers"
            )
        features, *more = sentence_features
        if more:
            raise DataError(f"the data set must have one text column, got {1 + len(more)}")
        return self.loss_of(self.model(dict(features))[FEATURES], labels)

    def loss_of(self, features: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of features ``(n, width)`` that belong to rows ``(n,)``."""
        rows = rows.long().cpu()
        slots = self._slots[rows].to(features.device)
        if self._old is None:
            return nn.functional.cross_entropy(self._classifier(features), slots)
        alignment = self.hoc(features, self._old[rows].to(features.device), slots)
        if self.lam == 0:
            return cast("Tensor", alignment)
        entropy = nn.functional.cross_entropy(self._classifier(features), slots)
        return compatible_loss(entropy, alignment, self.lam)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card that the trainer writes."""
        return {"lam": self.lam, "mu": self.hoc.mu, "same_class": self.hoc.same_class}

    def _stored(self, given: ArrayLike, rows: int) -> Tensor:
        vectors = np.asarray(given)
        expected = (rows, self._classifier.width)
        if vectors.shape != expected:
            raise DataError(
                f"old_vectors must be {expected}: one row per label, as wide as the features of "
                f"{self._classifier.num_slots} slots; got {vectors.shape}"
            )
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            raise DataError(
                f"old_vectors: {len(bad)} rows are not finite or of length 0, first {bad[0]}"
            )
        return torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))


def compatible_dataset(texts: Sequence[str]) -> Dataset:
    """Return texts with their row numbers, the data set that `CompatibleEncoderLoss` reads."""
    from datasets import Dataset

    return Dataset.from_dict({"text": list(texts), "label": list(range(len(texts)))})


def fit_stationary_encoder(
    model: SentenceTransformer,
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    old: SentenceTransformer | str | Path | Callable[[list[str]], Any] | ArrayLike | None = None,
    freeze_encoder: bool = False,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 2e-5,
    projection_learning_rate: float = 3e-3,
    weight_decay: float = 5e-4,
    lam: float = 0.1,
    mu: float = 10.0,
    same_class: SameClass = "zero",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train a stationary encoder in place, in plain PyTorch.

    Parameters
    ----------
    model
        From `stationary_encoder`, or an earlier version to go on from.
    texts, labels
        n texts and their classes.
    old
        What the new version is to stay compatible with: the old model (`model` itself, as it is
        before training, or another) or its name, a function from texts to vectors, or the vectors
        ``(n, K - 1)`` that the index holds for these texts. None for a first version.
    freeze_encoder
        Whether to train the projection only; texts are then embedded once, and an epoch takes
        seconds.
    epochs, batch_size
        Batches have at least two classes, where an old version is given.
    learning_rate, projection_learning_rate, weight_decay
        AdamW with cosine decay to 0; the first for the encoder, the second for the projection.
    lam, mu, same_class
        Of the loss.
    seed
        Of batches and dropout; the caller's random state is left as it was.
    progress
        Called with (steps done, steps in total).

    Returns
    -------
    list of float
        Mean loss of each epoch.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) As `CompatibleEncoderLoss`; and if lengths differ, or an update has one class
        only.
    FloatingPointError
        If training diverges.
    """
    if not texts or len(texts) != len(labels):
        raise DataError(
            f"texts and labels must be of one length above 0, got {len(texts)} and {len(labels)}"
        )
    positive_int("epochs", epochs)
    positive_int("batch_size", batch_size)
    loss = CompatibleEncoderLoss(
        model, labels, _old_vectors(old, texts), lam=lam, mu=mu, same_class=same_class
    )
    slots = projection_of(model).classifier.targets(labels)
    if old is not None and len(set(slots.tolist())) < 2:
        raise DataError(
            f"labels: all are {labels[0]!r}; the loss that ties versions together needs negatives"
        )
    projection = projection_of(model)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    was_training = model.training
    inputs = _embedded(model, texts) if freeze_encoder else None
    if freeze_encoder:
        model.requires_grad_(False)
        projection.requires_grad_(True)
    inner = {id(one) for one in projection.parameters()}
    outer = [one for one in model.parameters() if one.requires_grad and id(one) not in inner]
    groups: list[dict[str, Any]] = [
        {"params": list(projection.parameters()), "lr": projection_learning_rate}
    ]
    if outer:
        groups.append({"params": outer, "lr": learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    n_steps = epochs * math.ceil(len(texts) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    generator = torch.Generator().manual_seed(seed)
    devices = [one.device for one in model.parameters() if one.is_cuda][:1]
    history: list[float] = []
    done = 0
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            model.train(not freeze_encoder)
            for _ in range(epochs):
                total, n_batches = 0.0, 0
                for rows in _mixed_batches(slots, batch_size, generator, mixed=old is not None):
                    if inputs is None:
                        features = _features(model, [texts[row] for row in rows.tolist()])
                    else:
                        features = projection.linear(inputs[rows].to(projection.linear.weight))
                    diverged = FloatingPointError(f"training diverged at step {done + 1}")
                    if not bool(torch.isfinite(features.detach().norm())):
                        raise diverged
                    value = loss.loss_of(features, rows)
                    if not bool(torch.isfinite(value.detach())):
                        raise diverged
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    total, n_batches, done = total + float(value.detach()), n_batches + 1, done + 1
                    if progress is not None:
                        progress(done, n_steps)
                history.append(total / n_batches)
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
    return history


def _features(model: SentenceTransformer, texts: list[str]) -> Tensor:
    from bakeoff.models import embed_batch

    return embed_batch(model, texts, prompt=_default_prompt(model), output=FEATURES)


def _embedded(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Return what the projection reads, without gradients."""
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import encode

    encoder = SentenceTransformer(modules=list(model)[:-1], device=str(model.device))
    prompt = _default_prompt(model)
    return torch.from_numpy(encode(encoder, texts, prompt=prompt, on_truncated=lambda cut: None))


def _default_prompt(model: SentenceTransformer) -> str:
    """Return what the model puts before every text when it encodes."""
    return str((model.prompts or {}).get(model.default_prompt_name or "", "") or "")


def _old_vectors(old: Any, texts: Sequence[str]) -> NDArray[Any] | None:
    if old is None:
        return None
    if isinstance(old, str | Path):
        from bakeoff.models import load_encoder

        old = load_encoder(old)
    if hasattr(old, "encode"):
        from bakeoff.models import encode

        return encode(old, texts, on_truncated=lambda cut: None)
    if callable(old):
        old = old(list(texts))
    if isinstance(old, Tensor):
        old = old.detach().float().cpu().numpy()
    return np.asarray(old)


def _mixed_batches(
    slots: Tensor, batch_size: int, generator: torch.Generator, *, mixed: bool
) -> Iterable[Tensor]:
    """Yield one epoch of row numbers; with `mixed`, every batch has at least two classes."""
    order = torch.randperm(len(slots), generator=generator)
    for rows in torch.split(order, batch_size):
        first = slots[rows[0]]
        if mixed and bool((slots[rows] == first).all()):
            others = (slots != first).nonzero().flatten()
            pick = torch.randint(len(others), (1,), generator=generator)
            rows = torch.cat([rows, others[pick]])
        yield rows


def _width_of(modules: Sequence[nn.Module]) -> int:
    for module in reversed(modules):
        for name in ("get_embedding_dimension", "get_sentence_embedding_dimension"):
            if hasattr(module, name) and getattr(module, name)():
                return int(getattr(module, name)())
    raise DataError("the encoder does not say how wide its sentence embedding is")
