"""Training triplets from labelled texts: an example of the class as positive, or its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.training import pairs_with_negatives
from bakeoff.errors import DataError


class ClassTriplets:
    """Turns texts with class labels into (query, positive, negatives) for contrastive training.

    Every text is a query once. In mode ``"example"`` its positive is a random other text of its
    class and its negatives are random texts of other classes; in mode ``"label"`` they are the
    name of its class and names of other classes. Train on the result with in-batch negatives off:
    other queries' positives are often of the same class.

    Parameters
    ----------
    labels, texts
        One label per text; at least two classes.
    mode
        NV-Embed's second version uses ``"example"``, which its ablation found better, above all in
        clustering; its first used ``"label"``.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If the lengths differ, there are fewer than two classes, or, in mode
        ``"example"``, a class has only one distinct text; names the classes.

    References
    ----------
    Chankyu Lee et al. "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding
    Models". ICLR 2025. arXiv:2405.17428.

    Examples
    --------
    >>> triplets = ClassTriplets(["pet", "pet", "tool", "tool"], ["cat", "dog", "saw", "axe"])
    >>> pairs = triplets.pairs(seed=0)
    >>> pairs.queries[0], pairs.positives[0], pairs.negatives[0] in {"saw", "axe"}
    ('cat', 'dog', True)
    """

    def __init__(
        self,
        labels: Sequence[str],
        texts: Sequence[str],
        mode: Literal["example", "label"] = "example",
    ) -> None:
        if len(labels) != len(texts):
            raise DataError(f"{len(labels)} labels for {len(texts)} texts")
        if mode not in ("example", "label"):
            raise ValueError(f"mode must be 'example' or 'label', got {mode!r}")
        self.mode = mode
        self.queries = tuple(texts)
        self.labels = tuple(labels)
        self._classes = sorted(set(labels))
        if len(self._classes) < 2:
            raise DataError(f"at least two classes are needed, got {self._classes}")
        # Distinct texts, so that a text is never its own positive.
        self._members: dict[str, dict[str, None]] = {label: {} for label in self._classes}
        for label, text in zip(labels, texts, strict=True):
            self._members[label][text] = None
        if mode == "example":
            single = [label for label in self._classes if len(self._members[label]) < 2]
            if single:
                raise DataError(
                    f"mode 'example' needs two distinct texts per class; {len(single)} classes "
                    f"have one: {single[:5]}"
                )
        # In order of class, so that the texts of other classes are what lies outside one slice.
        self._pool = [text for label in self._classes for text in self._members[label]]
        ends = np.cumsum([len(self._members[label]) for label in self._classes]).tolist()
        starts = [0, *ends[:-1]]
        self._slices = dict(zip(self._classes, zip(starts, ends, strict=True), strict=True))

    def pairs(self, seed: int, num_negatives: int = 1, group: str = "classes") -> TextPairs:
        """Draw one triplet per text.

        Parameters
        ----------
        seed
            Determines the draw entirely.
        num_negatives
            Negatives per query, all different. With more than one, each entry of ``negatives`` is
            a tuple.
        group
            Name of the result.

        Raises
        ------
        bakeoff.errors.DataError
            If some class has fewer than `num_negatives` texts (in mode ``"label"``: names) outside.
        """
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
        rng = np.random.default_rng(seed)
        draw = self._draw_example if self.mode == "example" else self._draw_label
        drawn = [
            draw(text, label, num_negatives, rng)
            for text, label in zip(self.queries, self.labels, strict=True)
        ]
        return pairs_with_negatives(
            self.queries,
            [positive for positive, _ in drawn],
            [negatives for _, negatives in drawn],
            group,
        )

    def _draw_example(
        self, text: str, label: str, num_negatives: int, rng: np.random.Generator
    ) -> tuple[str, tuple[str, ...]]:
        start, end = self._slices[label]
        positive = text
        while positive == text:  # the class has another text, so this ends
            positive = self._pool[rng.integers(start, end)]
        outside = len(self._pool) - (end - start)
        usable: list[str] = []
        # A text may stand in several classes; one that is in the query's own is no negative. A few
        # spares nearly always make up for it, and if not, all texts are gone through.
        for size in (min(num_negatives + 2, outside), outside):
            draws = rng.choice(outside, size=size, replace=False)
            drawn = [self._pool[i if i < start else i + end - start] for i in draws.tolist()]
            usable = [other for other in dict.fromkeys(drawn) if other not in self._members[label]]
            if len(usable) >= num_negatives:
                break
        return positive, self._enough(usable, label, num_negatives)

    def _draw_label(
        self, text: str, label: str, num_negatives: int, rng: np.random.Generator
    ) -> tuple[str, tuple[str, ...]]:
        others = [other for other in self._classes if other != label]
        order = rng.permutation(len(others))[:num_negatives].tolist()
        return label, self._enough([others[i] for i in order], label, num_negatives)

    def _enough(self, usable: list[str], label: str, num_negatives: int) -> tuple[str, ...]:
        if len(usable) < num_negatives:
            raise DataError(
                f"num_negatives={num_negatives}, but class {label!r} has only {len(usable)} "
                f"{'texts' if self.mode == 'example' else 'labels'} outside of it"
            )
        return tuple(usable[:num_negatives])
