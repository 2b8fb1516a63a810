"""A small network on vectors whose versions stay compatible: simplex classifier and HOC loss."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from torch import Tensor, nn

from bakeoff._files import atomic_path, write_text
from bakeoff.embedding.pooling import positive_int
from bakeoff.embedding.stationary import (
    SLOTS_FILE,
    ClassSlots,
    Geometry,
    HOCLoss,
    Label,
    SameClass,
    SimplexClassifier,
    check_share,
    compatible_loss,
    in_order,
    plain_label,
)
from bakeoff.errors import DataError

Progress = Callable[[int, int], None]

# What a fit leaves behind.
_LEARNED = (
    *("n_features_in_", "classes_", "network_", "classifier_", "memory_", "loss_curve_"),
    "_seen",
)


class Classifier(Protocol):
    """What `IncrementalHead` asks of its last layer."""

    slots: ClassSlots

    def add(self, labels: Iterable[Any]) -> None:
        """Make room for new labels."""

    def targets(self, labels: Iterable[Any]) -> Tensor:
        """Return the labels as targets of cross-entropy over the logits."""

    def known_logits(self, features: Tensor) -> Tensor:
        """Return ``(n, number of labels)``, in the order of ``slots.labels``."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits."""


class IncrementalHead(ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """A small network on vectors whose versions are to stay compatible: what all variants share.

    Subclasses choose the last layer (`_new_classifier`) and what ties a new version to the old one
    (`_alignment`); see `StationaryHead` and `bakeoff.embedding.upgrade_baselines`.
    """

    n_features_in_: int
    classes_: NDArray[Any]
    network_: nn.Module
    classifier_: Classifier
    memory_: tuple[Tensor, list[Label]]
    loss_curve_: list[float]

    def __init__(
        self,
        n_slots: int = 1024,
        *,
        hidden: Sequence[int] = (512,),
        slots: ClassSlots | None = None,
        from_end: bool = True,
        geometry: Geometry = "simplex",
        lam: float = 0.1,
        mu: float = 10.0,
        same_class: SameClass = "zero",
        epochs: int = 70,
        batch_size: int = 128,
        learning_rate: float = 0.1,
        final_learning_rate: float = 1e-5,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        memory_per_class: int = 20,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        self.n_slots = n_slots
        self.hidden = hidden
        self.slots = slots
        self.from_end = from_end
        self.geometry = geometry
        self.lam = lam
        self.mu = mu
        self.same_class = same_class
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.memory_per_class = memory_per_class
        self.random_state = random_state
        self.device = device

    # What subclasses choose

    def _new_classifier(self, generator: torch.Generator) -> Classifier:
        """Return the last layer of a first version."""
        return SimplexClassifier(
            self.n_slots,
            self.slots,
            from_end=self.from_end,
            geometry=self.geometry,
            seed=0 if self.slots is None else self.slots.seed,
        )

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        """Return the loss that ties new features to old ones, or None for none.

        `slots` are the rows' slots; `old_classifier` is None where only old vectors are known.
        """
        raise NotImplementedError

    # scikit-learn's verbs

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        previous: IncrementalHead | None = None,
        old_features: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train a new version from scratch.

        Parameters
        ----------
        X
            ``(n, d)`` vectors.
        y
            ``(n,)`` labels, strings or whole numbers.
        previous
            A fitted version to continue from, see `partial_fit`; whatever this object has learned
            itself is forgotten.
        old_features
            ``(n, width)``: what an old model of another kind, which reads another input, makes of
            the same items. The network starts from random weights and is tied to these vectors.
        progress
            Called with (epochs done, epochs in total).

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If the data cannot be used, there are more classes than slots, slots
            collide with those of `previous` or its number of slots is another one, widths differ,
            or an update has only one class.
        FloatingPointError
            If training diverges; lower `learning_rate`.
        """
        if previous is not None and old_features is not None:
            raise DataError("give previous or old_features, not both")
        if previous is self:
            raise DataError("previous is this object itself: partial_fit goes on from it")
        X, y = _checked_data(X, y)
        old = None
        if old_features is not None:
            old = _checked_matrix("old_features", old_features, len(X))
            zero = np.flatnonzero(~old.any(axis=1))
            if len(zero):
                raise DataError(f"old_features: row {zero[0]} is 0 and has no direction")
        with self._unless_it_fails():
            for name in _LEARNED:
                self.__dict__.pop(name, None)
            if previous is not None:
                return self.partial_fit(X, y, previous=previous, progress=progress)
            return self._update(X, y, None, None, old, progress)

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        previous: IncrementalHead | None = None,
        compatible_with: IncrementalHead | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train the next version on new data, tied to the version from which it starts.

        Batches are half new data and half memory: `memory_per_class` random rows of every class
        seen so far.

        Parameters
        ----------
        X, y
            As in `fit`; classes may be new.
        previous
            The version to start from and to stay compatible with. By default this object's own
            last one; give another where a model trained elsewhere with the same slots replaces it.
            It is not changed.
        compatible_with
            The version to be tied to, where it is not the one to start from: at a replacement, for
            instance, the version that made the index. By default `previous`, as in the paper. It
            must read the same input and have features of the same width.
        progress
            As in `fit`.

        Raises
        ------
        bakeoff.errors.DataError, FloatingPointError
            As `fit`. The object is then as it was before the call, as after an interruption.
        """
        X, y = _checked_data(X, y)
        start = previous if previous is not None else self if hasattr(self, "network_") else None
        for name, one in (("previous", start), ("compatible_with", compatible_with)):
            if one is not None and not hasattr(one, "network_"):
                raise DataError(f"{name} is not fitted")
        if compatible_with is not None and start is None:
            raise DataError("compatible_with needs a version to start from: give previous")
        tie = start if compatible_with is None else compatible_with
        with self._unless_it_fails():
            return self._update(X, y, start, tie, None, progress)

    def features(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return the features ``(n, width)`` before normalisation."""
        X = self._checked_input(X)
        with torch.no_grad():
            blocks = [
                self.network_(torch.from_numpy(X[start : start + 4096]).to(self.device)).cpu()
                for start in range(0, len(X), 4096)
            ]
        return torch.cat(blocks).numpy()

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return unit vectors ``(n, width)`` to store or to search with."""
        features = self.features(X)
        length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        return cast("NDArray[np.float32]", (features / np.maximum(length, 1e-12)).astype("f4"))

    def decision_function(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return the logits ``(n, n_classes)`` in the order of `classes_`."""
        place = {label: column for column, label in enumerate(self.classifier_.slots.labels)}
        columns = [place[plain_label(label)] for label in self.classes_]
        features = torch.from_numpy(self.features(X)).to(self.device)
        with torch.no_grad():
            logits = self.classifier_.known_logits(features).cpu().numpy()
        return cast("NDArray[np.float32]", logits[:, columns])

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most likely class of each row among those that were trained on."""
        return cast("NDArray[Any]", self.classes_[self.decision_function(X).argmax(axis=1)])

    def version(self) -> Self:
        """Return a copy that later calls of `partial_fit` do not change."""
        return copy.deepcopy(self)

    def save(self, folder: str | Path) -> None:
        """Write settings, weights and the slot manifest to a folder; see `load`.

        The memory of past examples is not written: it is data, not model.

        Raises
        ------
        bakeoff.errors.DataError
            If the head is not fitted.
        """
        if not hasattr(self, "network_"):
            raise DataError("this head is not fitted: nothing to save")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # A network that replaced another may be wider than this object's own setting says.
        layers = [layer for layer in self.network_.modules() if isinstance(layer, nn.Linear)]
        settings = {
            **self.get_params(deep=False),
            "hidden": [layer.out_features for layer in layers[:-1]],
        }
        for name in ("slots", "device"):  # the manifest has a file; machines differ
            del settings[name]
        config = {
            "class": type(self).__name__,
            "settings": settings,
            "n_features_in": self.n_features_in_,
            "classes": [plain_label(label) for label in self.classes_],
        }
        text = json.dumps(config, indent=1, default=lambda number: number.item())  # numpy's
        with atomic_path(target / "model.safetensors") as temporary:
            save_file(
                {name: value.contiguous().cpu() for name, value in self._modules_state().items()},
                str(temporary),
            )
        self.classifier_.slots.save(target / SLOTS_FILE)
        write_text(target / "config.json", text + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        folder
            Which folder.
        device
            Where torch computes from now on.

        Raises
        ------
        bakeoff.errors.DataError
            If the folder holds another class of head, a file is missing or damaged, or the manifest
            is for another number of slots than the weights.
        """
        source = Path(folder)
        try:
            return cls._loaded(source, device)
        except FileNotFoundError as error:
            name = Path(str(error.filename)).name if error.filename else "model.safetensors"
            raise DataError(f"{source} holds no head: there is no {name}") from error
        except DataError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(f"{source} holds a damaged head: {error}") from error

    @classmethod
    def _loaded(cls, source: Path, device: str) -> Self:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if config.get("class") != cls.__name__:
            raise DataError(f"{source} holds a {config.get('class')}, not a {cls.__name__}")
        slots = ClassSlots.load(source)
        settings = config["settings"]
        if slots.num_slots != settings["n_slots"]:
            raise DataError(
                f"{source / SLOTS_FILE} is for {slots.num_slots} slots, the head for "
                f"{settings['n_slots']}"
            )
        head = cls(**{**settings, "hidden": tuple(settings["hidden"]), "device": device})
        head.n_features_in_ = int(config["n_features_in"])
        head.network_ = head._new_network(head.n_features_in_, slots.width)
        weights = load_file(source / "model.safetensors")
        try:
            head.network_.load_state_dict(_below("network.", weights))
            head.classifier_ = head._restored_classifier(slots, _below("classifier.", weights))
        except RuntimeError as error:
            raise DataError(f"{source}: weights do not fit the settings: {error}") from error
        head._place()
        head._seen = tuple(config["classes"])
        head.classes_ = _class_array(head._seen)
        head.memory_ = (torch.zeros(0, head.n_features_in_), [])
        return head

    # The training

    def _update(
        self,
        X: NDArray[np.float32],
        y: list[Label],
        start: IncrementalHead | None,
        tie: IncrementalHead | None,
        old_features: NDArray[np.float32] | None,
        progress: Progress | None,
    ) -> Self:
        self._check_settings()
        generator = torch.Generator().manual_seed(self._seed())
        if start is not None and X.shape[1] != start.n_features_in_:
            raise DataError(
                f"X has width {X.shape[1]}, the previous version reads {start.n_features_in_}"
            )
        classifier, network = self._start(start, X.shape[1], generator)
        own_slots = self.classifier_.slots if hasattr(self, "classifier_") else self.slots
        if own_slots is not None:
            classifier.slots = classifier.slots.merge(own_slots)
        memory_X, memory_y = self._memory_before(start, X.shape[1])
        rows = torch.cat([torch.from_numpy(X), memory_X])
        labels = [*y, *memory_y]
        classifier.add(in_order(labels))
        row_slots = torch.from_numpy(classifier.slots.slots_of(labels))
        targets = classifier.targets(labels)

        old: Tensor | None = None
        old_classifier: Classifier | None = None
        if tie is not None:
            # Inputs are not augmented, so that the old version needs to see each row only once.
            old = torch.from_numpy(tie.features(rows.numpy()))
            old_classifier = copy.deepcopy(tie.classifier_)
            if old.shape[1] != classifier.slots.width:
                raise DataError(
                    f"compatible_with has features of width {old.shape[1]}, this version has "
                    f"{classifier.slots.width}"
                )
        elif old_features is not None:
            old = torch.from_numpy(old_features)
            if old.shape[1] != classifier.slots.width:
                raise DataError(
                    f"old_features must have width {classifier.slots.width}, got {old.shape[1]}"
                )
        if old is not None and len(set(row_slots.tolist())) < 2:
            raise DataError(
                f"y and the memory have one class only ({y[0]!r}): the loss that ties versions "
                "together needs negatives"
            )

        self.n_features_in_ = X.shape[1]
        self.network_, self.classifier_ = network, classifier
        self._place()
        self.loss_curve_ = self._train(
            rows, row_slots, targets, old, old_classifier, len(X), generator, progress
        )
        self.memory_ = self._memory_after(rows, labels, generator)
        # No slot of a class that is known from a manifest alone is ever predicted.
        known = {} if start is None else dict.fromkeys(plain_label(c) for c in start.classes_)
        known |= dict.fromkeys(getattr(self, "_seen", ())) | dict.fromkeys(in_order(y))
        self._seen = tuple(known)
        self.classes_ = _class_array(in_order(known))
        return self

    def _train(
        self,
        rows: Tensor,
        row_slots: Tensor,
        targets: Tensor,
        old: Tensor | None,
        old_classifier: Classifier | None,
        n_new: int,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> list[float]:
        parameters = [*self.network_.parameters()]
        if isinstance(self.classifier_, nn.Module):
            parameters += self.classifier_.parameters()
        groups: list[dict[str, Any]] = [
            {"params": [one for one in parameters if one.dim() > 1]},
            {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.epochs, self.final_learning_rate
        )
        frozen: Any = old_classifier
        if isinstance(frozen, nn.Module):
            frozen.to(self.device).requires_grad_(False)
        losses = []
        self.network_.train()
        for epoch in range(self.epochs):
            total = 0.0
            batches = _batches(n_new, row_slots, self.batch_size, generator, mixed=old is not None)
            for batch in batches:
                features = self.network_(rows[batch].to(self.device))
                loss = nn.functional.cross_entropy(
                    self.classifier_(features), targets[batch].to(self.device)
                )
                # Whoever aligns asks for directions; what has none has diverged before.
                finite = old is None or bool(torch.isfinite(features.detach().norm()))
                if old is not None and finite:
                    alignment = self._alignment(
                        features,
                        old[batch].to(self.device),
                        row_slots[batch].to(self.device),
                        old_classifier,
                    )
                    if alignment is not None:
                        loss = compatible_loss(loss, alignment, self.lam)
                if not finite or not bool(torch.isfinite(loss.detach())):
                    raise FloatingPointError(
                        f"training diverged in epoch {epoch + 1}: lower "
                        f"learning_rate={self.learning_rate}"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += float(loss.detach()) / len(batches)
            schedule.step()
            losses.append(total)
            if progress is not None:
                progress(epoch + 1, self.epochs)
        self.network_.eval()
        return losses

    def _start(
        self, start: IncrementalHead | None, n_features_in: int, generator: torch.Generator
    ) -> tuple[Classifier, nn.Module]:
        if start is None:
            classifier = self._new_classifier(generator)
            # Layers draw their first weights from torch's global state.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed())
                return classifier, self._new_network(n_features_in, classifier.slots.width)
        needed = type(self._new_classifier(generator))
        if type(start.classifier_) is not needed:
            raise DataError(
                f"previous has a {type(start.classifier_).__name__}, {type(self).__name__} needs "
                f"a {needed.__name__}"
            )
        for name in ("n_slots", "geometry"):
            here, there = getattr(self, name), getattr(start, name)
            if here != there:
                raise DataError(
                    f"versions must share their fixed classifier: {name} is {here} here and "
                    f"{there} in previous"
                )
        classifier = copy.deepcopy(start.classifier_)
        if hasattr(classifier, "from_end"):
            classifier.from_end = self.from_end
        return classifier, copy.deepcopy(start.network_)

    def _new_network(self, n_features_in: int, width: int) -> nn.Module:
        sizes = [n_features_in, *self.hidden]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], width, bias=False)).eval()

    def _restored_classifier(self, slots: ClassSlots, weights: dict[str, Tensor]) -> Classifier:
        """Return the last layer with these slots and saved weights."""
        return SimplexClassifier(
            self.n_slots, slots, from_end=self.from_end, geometry=self.geometry, seed=slots.seed
        )

    def _memory_before(
        self, start: IncrementalHead | None, n_features_in: int
    ) -> tuple[Tensor, list[Label]]:
        # A model that replaces this one comes without the data of the service, which stays here.
        owner = self if hasattr(self, "memory_") else start
        if owner is None or not len(owner.memory_[1]):
            return torch.zeros(0, n_features_in), []
        width = owner.memory_[0].shape[1]
        if width != n_features_in:
            raise DataError(
                f"X has width {n_features_in}, the memory of earlier classes {width}: a version "
                "that reads another input cannot take it over; fit(X, y, previous=...) leaves it "
                "out"
            )
        return owner.memory_

    def _memory_after(
        self, rows: Tensor, labels: Sequence[Label], generator: torch.Generator
    ) -> tuple[Tensor, list[Label]]:
        members_of: dict[Label, list[int]] = {label: [] for label in in_order(labels)}
        for row, label in enumerate(labels):
            members_of[label].append(row)
        kept: list[int] = []
        for members in members_of.values():
            order = torch.randperm(len(members), generator=generator)[: self.memory_per_class]
            kept += [members[place] for place in order.tolist()]
        return rows[kept].clone(), [labels[row] for row in kept]

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        """Leave this object as it was if what is inside fails or is interrupted."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _place(self) -> None:
        self.network_.to(self.device).eval()
        if isinstance(self.classifier_, nn.Module):
            self.classifier_.to(self.device)

    def _modules_state(self) -> dict[str, Tensor]:
        state = {f"network.{name}": value for name, value in self.network_.state_dict().items()}
        if isinstance(self.classifier_, nn.Module):
            for name, value in self.classifier_.state_dict().items():
                state[f"classifier.{name}"] = value
        return state

    def _seed(self) -> int:
        if isinstance(self.random_state, bool) or not isinstance(
            self.random_state, int | np.integer
        ):
            raise DataError(f"random_state must be a whole number, got {self.random_state!r}")
        return int(self.random_state)

    def _check_settings(self) -> None:
        for name in ("epochs", "batch_size"):
            positive_int(name, getattr(self, name))
        if self.batch_size < 2:
            raise DataError(f"batch_size must be at least 2, got {self.batch_size}")
        for size in self.hidden:
            positive_int("hidden", int(size))
        if self.memory_per_class < 0:
            raise DataError(f"memory_per_class must not be negative, got {self.memory_per_class}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be above 0, got {self.learning_rate}")
        check_share("lam", self.lam)

    def _checked_input(self, X: ArrayLike) -> NDArray[np.float32]:
        if not hasattr(self, "network_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"{type(self).__name__} is not fitted: call fit first")
        array = _checked_matrix("X", X)
        if array.shape[1] != self.n_features_in_:
            raise DataError(
                f"X must have the width {self.n_features_in_} that fit has seen, got "
                f"{array.shape[1]}"
            )
        return array


class StationaryHead(IncrementalHead):
    """Vectors in, features out that stay comparable over updates: simplex classifier and HOC loss.

    The first version is trained by cross-entropy against the vertices of a simplex. Each update
    (`partial_fit`) is trained by ``lam * CE + (1 - lam) * HOC`` against the version from which it
    starts, so that vectors of old versions need not be made anew.

    Parameters
    ----------
    n_slots
        Number K of preallocated classes; features have width K - 1. All versions must have the
        same.
    hidden
        Widths of the layers between input and features, with ReLU; empty for a linear map.
    slots
        A `ClassSlots` to share with models that are trained elsewhere. Needed where two of them see
        different classes; else each would number its classes by itself.
    from_end
        Whether new classes take slots from the end (a service) or the beginning (pre-training).
    geometry
        ``"simplex"``, or the controls ``"orthonormal"`` and ``"gaussian"``.
    lam, mu, same_class
        Of `compatible_loss` and `HOCLoss`.
    epochs, batch_size
        Per version.
    learning_rate, final_learning_rate, momentum, weight_decay
        SGD with cosine decay; no decay of biases.
    memory_per_class
        Rows of each class that are kept for the next update.
    random_state
        Seed of first weights, batches and memory.
    device
        Where torch computes.

    Attributes
    ----------
    classes_
        The classes that were trained on.
    classifier_
        The `SimplexClassifier`; ``classifier_.slots`` is the manifest.
    network_
        The torch module from vectors to features.
    memory_
        The kept rows and their labels.
    loss_curve_
        Mean loss of each epoch of the last version.

    Notes
    -----
    The paper trains convolutional networks from pre-trained weights with a learning rate of 0.001;
    a small network on given vectors starts from random weights, so that the default is 0.1 here.
    Everything else is the released code's.

    References
    ----------
    Niccolò Biondi, Federico Pernici, Simone Ricci and Alberto Del Bimbo. "Stationary
    Representations: Optimally Approximating Compatibility and Implications for Improved Model
    Replacements". CVPR 2024. arXiv:2405.02581.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> old = y < 5
    >>> head = StationaryHead(n_slots=32, hidden=(64,), epochs=5).fit(X[old] / 16, y[old])
    >>> stored = head.transform(X / 16)  # the index
    >>> head = head.partial_fit(X[~old] / 16, y[~old])
    >>> head.transform(X[:3] / 16).shape  # queries for the old index
    (3, 31)
    """

    def _alignment(
        self, new: Tensor, old: Tensor, slots: Tensor, old_classifier: Classifier | None
    ) -> Tensor | None:
        return cast("Tensor", HOCLoss(self.mu, self.same_class)(new, old, slots))


# Small parts --------------------------------------------------------------------------------------


def _class_array(labels: Sequence[Label]) -> NDArray[Any]:
    kinds = {type(label) for label in labels}
    return np.array(labels, dtype=object if len(kinds) > 1 else None)


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _checked_matrix(name: str, given: ArrayLike, rows: int | None = None) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.ndim != 2 or not len(array) or array.dtype.kind not in "fiub":
        raise DataError(
            f"{name} must be (n, d) numbers with n > 0, got {array.dtype} of shape {array.shape}"
        )
    if rows is not None and len(array) != rows:
        raise DataError(f"{name} must have {rows} rows, as X does, got {len(array)}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise DataError(f"{name} must be finite, row {row} is not")
    return np.ascontiguousarray(array, dtype=np.float32)


def _checked_data(X: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float32], list[Label]]:
    array = _checked_matrix("X", X)
    labels = np.asarray(y)
    if labels.shape != (len(array),):
        raise DataError(f"y must have the shape ({len(array)},), got {labels.shape}")
    return array, [plain_label(label) for label in labels]


def _batches(
    n_new: int,
    row_slots: Tensor,
    batch_size: int,
    generator: torch.Generator,
    *,
    mixed: bool,
) -> list[Tensor]:
    """Return one epoch of row numbers: all new rows once, and as much memory in every batch.

    The first `n_new` rows are new, the rest is memory. With `mixed`, no batch is of one class.
    """
    n_memory = len(row_slots) - n_new
    size = batch_size // 2 if n_memory else batch_size
    batches = []
    for new in torch.split(torch.randperm(n_new, generator=generator), size):
        batch = new
        if n_memory:
            drawn = torch.randperm(n_memory, generator=generator)[: batch_size - size]
            batch = torch.cat([new, n_new + drawn])
        first = row_slots[batch[0]]
        if mixed and bool((row_slots[batch] == first).all()):
            others = (row_slots != first).nonzero().flatten()
            pick = torch.randint(len(others), (1,), generator=generator)
            batch = torch.cat([batch, others[pick]])
        batches.append(batch)
    return batches
