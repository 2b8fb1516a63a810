"""Training whose data is chosen anew while it runs (MATES), under the budget of other designs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError
from bakeoff.selection.fine_tuning import FineTuned, FineTuningBudget, fine_tune, training_rows

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel

DEFAULT_PROBES = 200
"""Texts probed per refresh."""

STAGED_PARAMETERS = ("stages", "refresh", "n_probes", "temperature", "learning_rate")
"""What a design may tell: the number of stages (4; the first is random), whether to choose anew in
each (else once), texts probed per refresh (200), and as in `MATESCallback`."""


@dataclass(frozen=True, eq=False)
class Staged:
    """A model trained in stages, the last selection as rows of the pool, and what was seen."""

    tuned: FineTuned
    rows: NDArray[np.int64]
    notes: tuple[str, ...]


def train_in_stages(
    language_model: LanguageModel,
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    params: Mapping[str, Any],
    budget: FineTuningBudget,
    *,
    n_select: int,
    embed: Callable[[list[str]], NDArray[np.float32]],
    seed: int,
    directory: Path,
    progress: Callable[[float, str], None] | None = None,
) -> Staged:
    """Train with a `MATESCallback` on a pool.

    Probed texts are taken out of the pool, every copy of them, so that none is trained on.

    Parameters
    ----------
    language_model
        Where training starts.
    samples
        The pool.
    reference
        What the reference loss is computed on.
    params
        See `STAGED_PARAMETERS`.
    budget
        As for every other design; steps follow from the mean length of the pool's samples.
    n_select
        Samples selected per stage.
    embed
        Vectors of texts for the regressor.
    seed
        Of all that is drawn.
    directory
        For the Trainer.
    progress
        Called with a fraction in [0, 1] and a message.

    Raises
    ------
    DataError
        If the pool is too small to set texts aside for probing.
    """
    from bakeoff.selection.influence_regressor import InfluenceRegressor
    from bakeoff.selection.mates import TrainingText
    from bakeoff.selection.mates_callback import MATESCallback

    length = min(budget.max_length, language_model.max_length)
    rows = training_rows(samples, language_model.tokenizer, length)
    n_probes = int(params.get("n_probes", DEFAULT_PROBES))
    probed, kept = _set_aside(samples, n_probes, seed)
    if len(kept) < n_select or len(probed) < 5:
        raise DataError(
            f"a pool of {len(samples)} samples is too small to set {n_probes} aside for probing "
            f"and select {n_select} of the others"
        )

    def texts(chosen: Sequence[int]) -> list[TrainingText]:
        return [
            TrainingText(
                samples[row].text,
                tuple(rows[row]["input_ids"]),
                tuple(rows[row]["labels"]),
                samples[row].source,
            )
            for row in chosen
        ]

    asked = [
        TrainingText(sample.text, tuple(row["input_ids"]), tuple(row["labels"]), sample.source)
        for sample, row in zip(
            reference, training_rows(reference, language_model.tokenizer, length), strict=True
        )
    ]
    steps = budget.steps(rows)
    stages = int(params.get("stages", 4))
    callback = MATESCallback(
        texts(kept.tolist()),
        texts(probed.tolist()),
        asked,
        every=max(1, -(-steps // stages)),
        ratio=n_select / len(kept),
        refresh=bool(params.get("refresh", True)),
        temperature=params.get("temperature", 1.0),
        learning_rate=params.get("learning_rate"),
        regressor=InfluenceRegressor(encoder=embed),
        random_state=seed,
    )
    tuned = fine_tune(
        language_model,
        callback.train_dataset,
        budget,
        steps=steps,
        seed=seed,
        directory=directory,
        callbacks=[callback],
        progress=progress,
    )
    notes = [
        f"stage {entry['stage'] + 1}: the regressor's Spearman correlation with probes it had not "
        f"seen was {entry['spearman']:.2f}"
        for entry in callback.history
        if entry.get("spearman") is not None
    ]
    return Staged(tuned, kept[callback.selected_], tuple(notes))


def _set_aside(
    samples: Sequence[Sample], n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows to probe, one for each of n texts, and the rows whose texts are not probed."""
    rows_of: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows_of.setdefault(sample.text, []).append(row)
    texts = list(rows_of)
    chosen = np.random.default_rng([seed, 13]).choice(len(texts), min(n, len(texts)), replace=False)
    probed = np.array([rows_of[texts[index]][0] for index in chosen], dtype=np.int64)
    aside = {row for index in chosen for row in rows_of[texts[index]]}
    kept = np.array([row for row in range(len(samples)) if row not in aside], dtype=np.int64)
    return probed, kept
