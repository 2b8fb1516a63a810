"""Stationary representations: a fixed simplex classifier that all versions of a model share.

If every version is trained towards the same class vectors, which never move, then the features of
one version mean the same to the next: new queries can be compared with vectors that an old version
has stored. The parts are here; `bakeoff.embedding.stationary_head` trains a small network on
vectors with them, `bakeoff.embedding.stationary_text` a text encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bakeoff._files import write_text
from bakeoff.data.formats import count
from bakeoff.embedding.pooling import one_of
from bakeoff.errors import DataError

METHOD = {
    "slug": "stationary-representations",
    "title": "Stationary representations: a fixed simplex classifier and the HOC loss",
    "paper": (
        'Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and '
        'Implications for Improved Model Replacements", CVPR 2024, arXiv 2405.02581'
    ),
    "designs": ["stationary", "simplex-ce", "orthonormal", "gaussian"],
    "names": [
        "simplex",
        "ClassSlots",
        "SimplexClassifier",
        "HOCLoss",
        "StationaryHead",
        "stationary_encoder",
        "CompatibleEncoderLoss",
        "compatibility_matrix",
        "evaluate_upgrade",
    ],
}

Label = str | int
Geometry = Literal["simplex", "orthonormal", "gaussian"]
SameClass = Literal["zero", "drop"]

_GEOMETRIES = ("simplex", "orthonormal", "gaussian")
SLOTS_FILE = "slots.json"
"""Name of the manifest in a saved folder."""

_FORMAT = 1


# The fixed class vectors --------------------------------------------------------------------------


def simplex(num_slots: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the vertices of a regular simplex around the origin, at distance 1.

    Any two vertices have the inner product -1 / (K - 1), the least that K unit vectors can have in
    common, so that no class is closer to one class than to another.

    Parameters
    ----------
    num_slots
        Number K of vertices, at least 2.
    dtype
        Of the result; the construction runs in float64.

    Returns
    -------
    Tensor
        ``(K, K - 1)``, unit rows.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If `num_slots` is below 2.

    References
    ----------
    Niccolò Biondi, Federico Pernici, Simone Ricci and Alberto Del Bimbo. "Stationary
    Representations: Optimally Approximating Compatibility and Implications for Improved Model
    Replacements". CVPR 2024. arXiv:2405.02581.

    Examples
    --------
    >>> vertices = simplex(4)
    >>> (vertices @ vertices.T).round(decimals=4)[0]
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    scale, shift, last = _simplex_constants(_checked_slots(num_slots))
    vertices = torch.full((num_slots, num_slots - 1), -scale * shift, dtype=torch.float64)
    vertices[:-1].diagonal().add_(scale)
    vertices[-1] = last
    return vertices.to(dtype)


class ClassSlots:
    """Which class has which slot of a fixed classifier: the one thing that versions must agree on.

    Slots are given out from either end, so that two parties can do so without asking each other: a
    model that is pre-trained elsewhere takes slots from the beginning, a service writes its own
    classes from the end. A manifest never changes: `add` and `merge` return another one.

    Parameters
    ----------
    num_slots
        Number K of slots.
    label_to_slot
        Labels (strings or whole numbers) with their slots, 0 to K - 1.
    geometry, seed
        Which class vectors the slots stand for, see `SimplexClassifier`.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If a slot is out of range or given twice, or a label is no string and no
        whole number.

    Examples
    --------
    >>> ours = ClassSlots(1024).add(["cat", "dog"])
    >>> dict(ours)
    {'cat': 1023, 'dog': 1022}
    >>> theirs = ClassSlots(1024).add(["car"], from_end=False)
    >>> dict(ours.merge(theirs))
    {'cat': 1023, 'dog': 1022, 'car': 0}
    """

    def __init__(
        self,
        num_slots: int,
        label_to_slot: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (),
        *,
        geometry: Geometry = "simplex",
        seed: int = 0,
    ) -> None:
        self.num_slots = _checked_slots(num_slots)
        self.geometry = cast("Geometry", one_of("geometry", geometry, _GEOMETRIES))
        self.seed = 0 if geometry == "simplex" else int(seed)
        pairs = label_to_slot.items() if isinstance(label_to_slot, Mapping) else label_to_slot
        self._slot_of: dict[Label, int] = {}
        self._label_at: dict[int, Label] = {}
        for given, slot in pairs:
            label = plain_label(given)
            if isinstance(slot, bool) or not isinstance(slot, int | np.integer):
                raise DataError(
                    f"label_to_slot: the slot of {label!r} must be an int, got {slot!r}"
                )
            number = int(slot)
            if not 0 <= number < num_slots:
                raise DataError(
                    f"label_to_slot: slots must be from 0 to {num_slots - 1}, got {slot} for "
                    f"label {label!r}"
                )
            if self._label_at.get(number, label) != label:
                raise DataError(
                    f"slot collision: slot {number} is taken by label {self._label_at[number]!r} "
                    f"and cannot be given to {label!r}"
                )
            if self._slot_of.get(label, number) != number:
                raise DataError(
                    f"slot collision: label {label!r} has slot {self._slot_of[label]} and cannot "
                    f"have {number} as well"
                )
            self._slot_of[label], self._label_at[number] = number, label

    def __len__(self) -> int:
        return len(self._slot_of)

    def __iter__(self) -> Iterator[tuple[Label, int]]:
        """Iterate over (label, slot) in the order in which they were added."""
        return iter(self._slot_of.items())

    def __contains__(self, label: object) -> bool:
        return label in self._slot_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassSlots) and (
            self.num_slots,
            self.geometry,
            self.seed,
            self._slot_of,
        ) == (other.num_slots, other.geometry, other.seed, other._slot_of)

    def __hash__(self) -> int:
        return hash((self.num_slots, self.geometry, self.seed, frozenset(self._slot_of.items())))

    def __repr__(self) -> str:
        kind = "" if self.geometry == "simplex" else f", {self.geometry}, seed {self.seed}"
        return f"ClassSlots({len(self)} of {self.num_slots} slots taken{kind})"

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that have a slot, in the order in which they were added."""
        return tuple(self._slot_of)

    @property
    def width(self) -> int:
        """Width of the features that belong to these slots: K - 1, or K where orthonormal."""
        return self.num_slots if self.geometry == "orthonormal" else self.num_slots - 1

    def add(self, labels: Iterable[Any], *, from_end: bool = True) -> ClassSlots:
        """Return a manifest with slots for new labels, the next free ones from one end.

        Labels that have a slot keep it.

        Raises
        ------
        bakeoff.errors.DataError
            If there are more classes than slots.
        """
        new = [x for x in dict.fromkeys(map(plain_label, labels)) if x not in self]
        if len(self) + len(new) > self.num_slots:
            raise DataError(
                f"more classes than slots: {len(self)} of {self.num_slots} slots are taken and "
                f"{len(new)} new classes need one (first {new[0]!r}); the number of slots cannot "
                "change without breaking compatibility, so preallocate more from the start"
            )
        order = range(self.num_slots - 1, -1, -1) if from_end else range(self.num_slots)
        free = (slot for slot in order if slot not in self._label_at)
        return self._with([*self, *zip(new, free, strict=False)])

    def merge(self, other: ClassSlots) -> ClassSlots:
        """Return a manifest with the classes of both.

        Raises
        ------
        bakeoff.errors.DataError
            If the class vectors are not the same (another number of slots, another geometry), or a
            label or a slot stands for different things.
        """
        mine = (self.num_slots, self.geometry, self.seed)
        theirs = (other.num_slots, other.geometry, other.seed)
        if mine != theirs:
            raise DataError(
                "versions must share their fixed classifier: (slots, geometry, seed) are "
                f"{mine} here and {theirs} there"
            )
        return self._with([*self, *other])

    def slots_of(self, labels: Iterable[Any]) -> NDArray[np.int64]:
        """Return the slot of each label, int64.

        Raises
        ------
        bakeoff.errors.DataError
            If a label has no slot.
        """
        given = [plain_label(label) for label in labels]
        unknown = [label for label in dict.fromkeys(given) if label not in self]
        if unknown:
            raise DataError(
                f"{count(len(unknown), 'label')} without a slot (first {unknown[0]!r}): add them "
                "first"
            )
        return np.array([self._slot_of[label] for label in given], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-able values; labels keep their type."""
        return {
            "format": _FORMAT,
            "num_slots": self.num_slots,
            "geometry": self.geometry,
            "seed": self.seed,
            "slots": [[label, slot] for label, slot in self],
        }

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON to a file, or as ``slots.json`` into a folder."""
        target = Path(path)
        write_text(
            target / SLOTS_FILE if target.is_dir() else target,
            json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n",
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        bakeoff.errors.DataError
            If there is no manifest or it is damaged.
        """
        source = Path(path)
        source = source / SLOTS_FILE if source.is_dir() else source
        try:
            plain = json.loads(source.read_text(encoding="utf-8"))
            if plain["format"] != _FORMAT:
                raise DataError(f"{source} has format {plain['format']!r}, known is {_FORMAT}")
            return cls(
                plain["num_slots"],
                [(label, slot) for label, slot in plain["slots"]],
                geometry=plain["geometry"],
                seed=plain["seed"],
            )
        except FileNotFoundError:
            raise DataError(f"there is no slot manifest {source}") from None
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{source} is no slot manifest: {error}") from error

    def _with(self, pairs: Iterable[tuple[Label, int]]) -> ClassSlots:
        return ClassSlots(self.num_slots, pairs, geometry=self.geometry, seed=self.seed)


class SimplexClassifier(nn.Module):
    """A classifier with K class vectors that never train: the vertices of a regular simplex.

    Features are used as they are: no normalisation, no scale, no bias. The inner products with all
    vertices are computed from one sum per row, in O(K) instead of O(K^2), and nothing is stored.

    Parameters
    ----------
    num_slots
        Number K of preallocated classes, far more than known ones; features have width K - 1.
    label_to_slot
        Classes that have a slot already: a `ClassSlots`, or a mapping from label to slot.
    from_end
        Whether `add` takes slots from the end (a service's own classes) or from the beginning (a
        model that is pre-trained for others to start from).
    geometry
        ``"simplex"``, or a control with other fixed vectors: ``"orthonormal"`` (a random rotation
        of K axes; width K) or ``"gaussian"`` (random unit vectors of width K - 1).
    seed
        Of the random controls; the simplex has none.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If there are more classes than slots, slots collide, or a `ClassSlots` is
        given that is for another number of slots or geometry.

    References
    ----------
    Niccolò Biondi et al. "Stationary Representations: Optimally Approximating Compatibility and
    Implications for Improved Model Replacements". CVPR 2024. arXiv:2405.02581.

    Examples
    --------
    >>> classifier = SimplexClassifier(16)
    >>> classifier.add(["cat", "dog"])
    >>> classifier(torch.randn(3, 15)).shape, classifier.targets(["dog", "cat", "cat"])
    (torch.Size([3, 16]), tensor([14, 15, 15]))
    """

    def __init__(
        self,
        num_slots: int = 1024,
        label_to_slot: ClassSlots | Mapping[Any, int] | None = None,
        *,
        from_end: bool = True,
        geometry: Geometry = "simplex",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.slots = ClassSlots(num_slots, geometry=geometry, seed=seed)
        if isinstance(label_to_slot, ClassSlots):
            self.slots = self.slots.merge(label_to_slot)
        elif label_to_slot is not None:
            self.slots = self.slots.merge(
                ClassSlots(num_slots, label_to_slot, geometry=geometry, seed=seed)
            )
        self.from_end = from_end
        self._constants = _simplex_constants(num_slots)
        fixed = None if geometry == "simplex" else _random_vectors(num_slots, geometry, seed)
        # Not persistent: the manifest determines it.
        self.register_buffer("_fixed", fixed, persistent=False)

    @property
    def num_slots(self) -> int:
        """Number K of slots."""
        return self.slots.num_slots

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.slots.width

    @property
    def weight(self) -> Tensor:
        """The class vectors ``(K, width)``, float32; for the simplex made when asked for."""
        fixed = cast("Tensor | None", self._fixed)
        return simplex(self.num_slots) if fixed is None else fixed

    def add(self, labels: Iterable[Any]) -> None:
        """Give new labels the next free slots; see `ClassSlots.add`."""
        self.slots = self.slots.add(labels, from_end=self.from_end)

    def targets(self, labels: Iterable[Any]) -> Tensor:
        """Return what cross-entropy takes as targets: the labels' slots, ``(n,)`` int64."""
        return torch.from_numpy(self.slots.slots_of(labels))

    def forward(self, features: Tensor) -> Tensor:
        """Return the inner products with all class vectors.

        Parameters
        ----------
        features
            ``(..., width)``, floating point, not normalised.

        Returns
        -------
        Tensor
            ``(..., K)``, float32 at least.

        Raises
        ------
        bakeoff.errors.DataError
            If the width is another one.
        """
        if features.shape[-1] != self.width:
            raise DataError(
                f"features must have width {self.width} for {self.num_slots} slots, got shape "
                f"{tuple(features.shape)}"
            )
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        fixed = cast("Tensor | None", self._fixed)
        if fixed is not None:
            return nn.functional.linear(features, fixed.to(features.dtype))
        scale, shift, last = self._constants
        total = features.sum(dim=-1, keepdim=True)
        return torch.cat([scale * (features - shift * total), last * total], dim=-1)

    def known_logits(self, features: Tensor) -> Tensor:
        """Return the logits of the classes that have a slot, in the order of ``slots.labels``."""
        known = self.targets(self.slots.labels).to(features.device)
        return cast("Tensor", self(features))[..., known]

    def extra_repr(self) -> str:
        """Return the configuration, for `print`."""
        return f"{self.slots!r}, from_end={self.from_end}"


# The losses ---------------------------------------------------------------------------------------


class HOCLoss(nn.Module):
    """The higher-order compatibility loss: each old feature must pick its new one.

    With unit old features u and unit new features v of one batch of inputs and s_ik = <u_i, v_k>,
    the loss is the mean over i of ``-mu * s_ii + log sum_k exp(mu * s_ik * [y_k != y_i])``. Old
    features have no gradient. The positive is not among the terms of the sum, so that the loss can
    be negative.

    Parameters
    ----------
    mu
        One over the temperature.
    same_class
        What becomes of the terms with y_k = y_i, the diagonal included: ``"zero"`` (the released
        code) sets the similarity to 0, so that each adds exp(0) = 1 to the sum; ``"drop"`` (a
        strict reading of the formula) leaves them out.

    References
    ----------
    Niccolò Biondi et al. "Stationary Representations: Optimally Approximating Compatibility and
    Implications for Improved Model Replacements", equation 4. CVPR 2024. arXiv:2405.02581.

    Examples
    --------
    >>> same = torch.eye(3)
    >>> HOCLoss(mu=10, same_class="drop")(same, same, torch.tensor([0, 1, 2]))  # log 2 - 10
    tensor(-9.3069)
    """

    def __init__(self, mu: float = 10.0, same_class: SameClass = "zero") -> None:
        super().__init__()
        if not mu > 0:
            raise DataError(f"mu must be above 0, got {mu!r}")
        self.mu = float(mu)
        self.same_class = one_of("same_class", same_class, ("zero", "drop"))

    def forward(self, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch, a scalar in float32 (float64 for float64 input).

        Parameters
        ----------
        new, old
            ``(n, d)``, features of the same n inputs by the new and the old model, of any length.
        labels
            ``(n,)``, integers: classes or their slots.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If shapes do not agree, all labels are of one class (there are no
            negatives), or a feature is not finite or has length 0.
        """
        if new.dim() != 2 or new.shape != old.shape or labels.shape != new.shape[:1]:
            raise DataError(
                "new and old features must have one shape (n, d) and labels (n,), got "
                f"{tuple(new.shape)}, {tuple(old.shape)} and {tuple(labels.shape)}"
            )
        same = labels[:, None] == labels[None, :]
        if bool(same.all()):
            raise DataError(
                f"labels: all {len(labels)} are of one class, so that the loss has no negatives; "
                "use batches of several classes"
            )
        rows = unit_rows("new", new)
        similarity = self.mu * (unit_rows("old", old.detach()).to(rows) @ rows.T)
        kept = similarity.masked_fill(same, 0.0 if self.same_class == "zero" else -math.inf)
        loss: Tensor = (kept.logsumexp(dim=1) - similarity.diagonal()).mean()
        return loss

    def extra_repr(self) -> str:
        """Return the configuration, for `print`."""
        return f"mu={self.mu}, same_class={self.same_class!r}"


def compatible_loss(cross_entropy: Tensor, alignment: Tensor, lam: float = 0.1) -> Tensor:
    """Return ``lam * cross_entropy + (1 - lam) * alignment``, the objective of an update.

    Parameters
    ----------
    cross_entropy
        Of the fixed classifier's logits.
    alignment
        The `HOCLoss`, or another loss that ties new features to old ones.
    lam
        Between 0 and 1; the paper's 0.1.

    Examples
    --------
    >>> float(compatible_loss(torch.tensor(1.0), torch.tensor(-9.0), lam=0.5))
    -4.0
    """
    check_share("lam", lam)
    return lam * cross_entropy + (1 - lam) * alignment


def unit_rows(name: str, features: Tensor) -> Tensor:
    """Return rows of length 1, float32 at least; raise DataError where that would give NaN."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    length = features.norm(dim=1, keepdim=True)
    bad = ~(torch.isfinite(length) & (length > 0))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise DataError(
            f"{name} features: row {row} has length {float(length.detach()[row])}; a direction "
            "needs finite values and a length above 0"
        )
    unit: Tensor = features / length
    return unit


# Small parts --------------------------------------------------------------------------------------


def plain_label(label: Any) -> Label:
    """Return a label as a plain string or whole number, or raise DataError."""
    if isinstance(label, np.generic):
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(
            f"labels must be strings or whole numbers, got {label!r} ({type(label).__name__})"
        )
    return label


def in_order(labels: Iterable[Any]) -> list[Label]:
    """Return distinct labels, numbers before strings, each in order: the same for any row order."""
    plain = dict.fromkeys(map(plain_label, labels))
    return sorted(plain, key=lambda label: (isinstance(label, str), label))


def _simplex_constants(num_slots: int) -> tuple[float, float, float]:
    """Return scale, shift and last coordinate of the vertices.

    Vertex a < K - 1 is ``scale * (e_a - shift * ones)``, the last one is ``last * ones``.
    """
    width = num_slots - 1
    alpha = (1 - math.sqrt(num_slots)) / width
    shift = (1 + alpha) / num_slots
    scale = 1 / math.sqrt(1 - 2 * shift + width * shift * shift)
    return scale, shift, scale * (alpha - shift)


def _random_vectors(num_slots: int, geometry: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = num_slots if geometry == "orthonormal" else num_slots - 1
    drawn = torch.randn(num_slots, width, generator=generator, dtype=torch.float64)
    if geometry == "orthonormal":
        rotation: Tensor = torch.linalg.qr(drawn)[0]
        return rotation.float()
    return nn.functional.normalize(drawn, dim=1).float()


def _checked_slots(num_slots: Any) -> int:
    if isinstance(num_slots, bool) or not isinstance(num_slots, int | np.integer) or num_slots < 2:
        raise DataError(f"num_slots must be a whole number of at least 2, got {num_slots!r}")
    return int(num_slots)


def check_share(name: str, value: float) -> None:
    """Raise DataError unless `value` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise DataError(f"{name} must be from 0 to 1, got {value!r}")
