"""How selection designs are tried out: the family's side of a study.

`AnnotationProblem`: which examples to label. A design picks from a pool whose labels it does not
see; learners answer held-out tests with the labels of the picks alone.

`TrainingProblem`: which samples to train on. A design picks from a pool, given queries that look
like the target; a language model is trained on the picks with a fixed number of tokens and judged
by its loss on held-out text of the target.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import cache_directory, write_text
from bakeoff.data import splits
from bakeoff.data.samples import Sample, TrainingPool
from bakeoff.data.tasks import ClassificationTask
from bakeoff.errors import DataError
from bakeoff.models.shared import SharedModels
from bakeoff.selection.annotation import (
    ConfidenceOf,
    LabelledPool,
    nearest_label,
    nearest_label_confidence,
    pick_for_budgets,
)
from bakeoff.selection.fine_tuning import (
    FineTuned,
    FineTuningBudget,
    fine_tune,
    target_losses,
    training_rows,
)
from bakeoff.selection.selectors import SelectorKind, selector_kind
from bakeoff.selection.staged_training import (
    DEFAULT_PROBES,
    STAGED_PARAMETERS,
    Staged,
    train_in_stages,
)
from bakeoff.selection.winner import save_picks
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel, TextEncoder
    from bakeoff.selection.in_context import InContextClassifier

Learner = Literal["nearest-neighbour", "in-context"]
Counting = Callable[[int, int], None]
Scores = dict[str, dict[str, NDArray[np.float64]]]

ANNOTATION_METRICS: dict[str, Metric] = {
    "score": Metric("accuracy", combines=("accuracy", "in_context"), margin=0.01),
    "accuracy": Metric("nearest label (accuracy)", margin=0.01),
    "in_context": Metric("in context (accuracy)", margin=0.01),
    "similarity": Metric("cosine to the nearest label", margin=0.01),
    "known_class": Metric("class has a label", margin=0.01),
}
TRAINING_METRICS: dict[str, Metric] = {
    "target_loss": Metric(
        "loss on the target (nats per token)", higher_is_better=False, margin=0.01
    ),
    "relevant": Metric("picks of the target's kind (share)", margin=0.01),
}
DEFAULT_BUDGETS = (18, 50, 100)
LEARNERS: tuple[Learner, ...] = ("nearest-neighbour", "in-context")

# The paper's pools have 3,000 rows; a smaller data set gives two thirds of itself, so that pools
# differ from seed to seed.
_LARGEST_POOL = 3000
_POOL_SHARE = 2 / 3
# Parameters of designs that are not the selector's own.
_RETRIEVAL = "retrieval"
_STATES = ("pooling", "layer")
# The one method that chooses while training runs; it is no selector.
_STAGED = "mates-refreshed"
# Methods that read samples, and generalise from some of them by the vectors of all.
_PREDICT_FROM_VECTORS = ("mates", _STAGED)


def annotation_designs() -> Designs:
    """Return the published ways to choose what to label, and the sceptic's.

    Examples
    --------
    >>> [design.name for design in annotation_designs()][:3]
    ['random', 'kmeans', 'facility-location']
    """
    names = "random kmeans facility-location farthest-first typical-clusters least-confidence"
    published = "vote-k vote-k-confidence ideal"
    return Designs([Design(name, name) for name in f"{names} {published}".split()])


def training_designs() -> Designs:
    """Return the published ways to choose what to train on, and the sceptic's.

    Examples
    --------
    >>> "rds-plus" in [design.name for design in training_designs()]
    True
    """
    names = "random balanced-random longest perplexity ifd tf-idf bm25 importance-resampling"
    published = "embedding-similarity rds-plus mates mates-refreshed gateau"
    # As published, weights are sums over a text's n-grams, so that short texts win.
    fair = {"adjust_length": True, "smoothing": 1e-4}
    adjusted = Design("importance-resampling, by length", "importance-resampling", fair)
    designs = [Design(name, name) for name in f"{names} {published}".split()]
    return Designs([*designs, adjusted])


def default_budgets(tasks: Sequence[ClassificationTask]) -> tuple[int, ...]:
    """Return those of 18, 50 and 100 labels that every pool has, or half of the smallest pool.

    Examples
    --------
    >>> texts = tuple(f"text {i}" for i in range(90))
    >>> default_budgets([ClassificationTask("t", texts, texts, texts, texts)])
    (18, 50)
    """
    smallest = min(_pool_size(task) for task in tasks)
    fitting = tuple(budget for budget in DEFAULT_BUDGETS if budget <= smallest)
    return fitting or (max(1, smallest // 2),)


def _pool_size(task: ClassificationTask) -> int:
    return min(_LARGEST_POOL, max(1, round(_POOL_SHARE * len(task.train_texts))))


class _Loaded(SharedModels):
    """Models and vectors that trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.picks: dict[tuple[Design, int], tuple[NDArray[np.int64], float]] = {}

    def encoded(
        self, texts: Sequence[str], encoder: TextEncoder, progress: Counting | None
    ) -> dict[str, NDArray[np.float32]]:
        """Return a vector per text, by a sentence-transformers model."""
        fingerprint = {"encoder": encoder.fingerprint}

        def embed(some: list[str]) -> NDArray[np.float32]:
            return encoder.encode(some, on_truncated=lambda rows: None)

        return self.by_text(texts, embed, fingerprint, progress)

    def by_text(
        self,
        texts: Sequence[str],
        embed: Callable[[list[str]], NDArray[np.float32]],
        fingerprint: Mapping[str, object],
        progress: Counting | None,
    ) -> dict[str, NDArray[np.float32]]:
        """Return a vector per text, made once per process and once per cache."""
        key = json.dumps(dict(fingerprint), sort_keys=True)
        known = self.vectors.setdefault(key, {})
        if not known:
            from bakeoff.selection.vectors import cached_vectors

            distinct = list(dict.fromkeys(texts))
            vectors = cached_vectors(distinct, embed, fingerprint, progress=progress)
            known.update(zip(distinct, vectors, strict=True))
        return known


class AnnotationProblem:
    """Which examples to label: pick with each design, answer tests with the picks' labels.

    Each seed draws a pool from the data's training part (two thirds of it, at most 3,000 rows); the
    tests stay the same, so that designs are paired over tests and pools.

    Parameters
    ----------
    tasks
        Labelled data, split. Labels of the training part are shown only for what a design picks.
    budgets
        Numbers of labels to pay for; each is a task of its own.
    learners
        ``"nearest-neighbour"``: the label of the most similar picked text. ``"in-context"``: a
        language model with the most similar picked texts in its prompt.
    embedder
        A sentence-transformers model: packaged name, folder or hub id.
    language_model
        For the in-context learner.
    n_shots
        Examples in a prompt.
    max_in_context
        At most so many tests of a task, drawn by their content, are answered in context.
    in_context_budgets
        Budgets at which the in-context learner runs, which is slow; by default all.

    Raises
    ------
    DataError
        If there is no task, two have one name, a budget is no number of labels or larger than a
        pool, a learner is unknown, or a number is less than 1.

    Examples
    --------
    >>> from bakeoff.data import labelled_default
    >>> from bakeoff.study import Study
    >>> problem = AnnotationProblem(labelled_default("smoke"), budgets=(8,))  # doctest: +SKIP
    >>> Study(
    ...     problem, annotation_designs(), reference="random", seeds=5, directory="runs/try"
    ... ).run()  # doctest: +SKIP
    """

    name = "selection"

    def __init__(
        self,
        tasks: Sequence[ClassificationTask],
        *,
        budgets: Sequence[int] = DEFAULT_BUDGETS,
        learners: Sequence[Learner] = ("nearest-neighbour",),
        embedder: str = "all-minilm-l6-v2",
        language_model: str = "smollm2-135m",
        n_shots: int = 5,
        max_in_context: int = 256,
        in_context_budgets: Sequence[int] | None = None,
    ) -> None:
        if not tasks:
            raise DataError("tasks must hold at least one labelled data set")
        _check_names("tasks", [task.name for task in tasks])
        unknown = sorted(set(learners) - set(LEARNERS))
        if unknown or not learners:
            raise DataError(f"learners must be among {', '.join(LEARNERS)}, got {list(learners)}")
        whole = all(isinstance(budget, int | np.integer) for budget in budgets)
        if not whole or not budgets or any(budget < 1 for budget in budgets):
            raise DataError(f"budgets must be positive numbers of labels, got {list(budgets)}")
        for what, number in (("n_shots", n_shots), ("max_in_context", max_in_context)):
            if number < 1:
                raise DataError(f"{what} must be at least 1, got {number}")
        self.tasks = tuple(tasks)
        self.budgets = tuple(sorted({int(budget) for budget in budgets}))
        self.learners = tuple(learner for learner in LEARNERS if learner in learners)
        self.embedder = embedder
        self.language_model = language_model
        self.n_shots = n_shots
        self.max_in_context = max_in_context
        asked = self.budgets if in_context_budgets is None else in_context_budgets
        if not set(asked) <= set(self.budgets):
            raise DataError(
                f"in_context_budgets must be among budgets {list(self.budgets)}, got {list(asked)}"
            )
        self.in_context_budgets = tuple(sorted({int(budget) for budget in asked}))
        self._encoder = _text_encoder(embedder)
        self._loaded = _Loaded()
        for task in self.tasks:
            if self.budgets[-1] > _pool_size(task):
                raise DataError(
                    f"budgets must be at most {_pool_size(task)}, the size of a pool drawn "
                    f"from {task.name!r} ({len(task.train_texts)} texts), got {self.budgets[-1]}"
                )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Accuracy of each learner (their mean first, if both run); how well tests are covered."""
        chosen = {"nearest-neighbour": "accuracy", "in-context": "in_context"}
        accuracies = [chosen[learner] for learner in self.learners]
        if len(accuracies) > 1:
            accuracies.insert(0, "score")
        return {
            name: ANNOTATION_METRICS[name] for name in (*accuracies, "similarity", "known_class")
        }

    def fingerprint(self) -> str:
        """Return a digest of data, budgets, learners and models."""
        digest = hashlib.sha256()
        for task in self.tasks:
            line = json.dumps(asdict(task), ensure_ascii=False)
            digest.update(line.encode("utf-8", "surrogatepass"))
        in_context = "in-context" in self.learners
        model = self._loaded.language_model(self.language_model).fingerprint if in_context else ""
        facts = [
            self.budgets,
            self.learners,
            self._encoder.fingerprint,
            model,
            [self.n_shots, self.max_in_context, self.in_context_budgets] if in_context else [],
        ]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        facts: dict[str, object] = {
            "question": "which examples to label",
            "data": {
                task.name: f"pools of {_pool_size(task):,} from {len(task.train_texts):,} "
                f"texts, {len(task.test_texts):,} tests, {len(set(task.train_labels))} classes"
                for task in self.tasks
            },
            "labels paid for": ", ".join(map(str, self.budgets)),
            "learners": list(self.learners),
            "embedded by": self.embedder,
        }
        if "in-context" in self.learners:
            facts["language model"] = (
                f"{self.language_model}, {self.n_shots} examples per prompt, at most "
                f"{self.max_in_context} tests per data set"
            )
        return facts

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return f"{selector_kind(method).version}.{_ANNOTATION_VERSION}"

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here: unknown method or parameter."""
        kind = selector_kind(design.method)
        if kind.reads not in ("rows", "vectors") or {"queries", "groups"} & set(kind.needs):
            raise DataError(
                f"design {design.name!r}: {design.method} chooses what to train on, not what to "
                "label; give a target (see `bakeoff run selection --target`)"
            )
        _check_parameters(design, kind, extra=(_RETRIEVAL,))
        retrieval = design.params.get(_RETRIEVAL, "similarity")
        if retrieval not in ("similarity", "random"):
            raise DataError(
                f"design {design.name!r}: retrieval must be similarity or random, got {retrieval!r}"
            )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs and embed all texts once."""
        for design in designs:
            self.check(design)
        self._vectors(_counting(work.progress, "embedding"))

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Pick with one design from each data set's pool and score every budget."""
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        kind = selector_kind(design.method)
        params = {key: value for key, value in design.params.items() if key != _RETRIEVAL}
        retrieval = str(design.params.get(_RETRIEVAL, "similarity"))
        vectors = self._vectors()
        scores: Scores = {}
        picked: dict[str, dict[int, list[int]]] = {}
        seconds = 0.0
        for number, task in enumerate(self.tasks):
            rows = self._pool_rows(task, seed)
            texts = [task.train_texts[row] for row in rows]
            pool = LabelledPool(
                np.stack([vectors[text] for text in texts]),
                texts,
                np.array([task.train_labels[row] for row in rows]),
            )
            tests = np.stack([vectors[text] for text in task.test_texts])
            picks = pick_for_budgets(
                kind,
                params,
                pool,
                self.budgets,
                seed=seed,
                confidence_of=self._confidence(task, pool, seed),
            )
            seconds += max(of_budget.seconds for of_budget in picks.values())
            for place, budget in enumerate(self.budgets):
                done = (number + (place + 0.5) / len(self.budgets)) / len(self.tasks)
                work.progress(done, f"{task.name}, {budget} labels")
                chosen = picks[budget].rows
                name = f"{budget} labels" if len(self.tasks) == 1 else f"{task.name}, {budget}"
                found = self._score(task, pool, chosen, tests, retrieval, seed)
                for metric, units in found.items():
                    scores.setdefault(metric, {})[name] = units
                picked.setdefault(task.name, {})[budget] = rows[chosen].tolist()
        write_text(work.directory / "picks.json", json.dumps(picked))
        return Trial(
            scores=scores,
            cost={
                "labels_used": float(self.budgets[-1] * len(self.tasks)),
                "selection_seconds": seconds,
            },
            artifact=work.directory,
        )

    def _score(
        self,
        task: ClassificationTask,
        pool: LabelledPool,
        chosen: NDArray[np.int64],
        tests: NDArray[np.float32],
        retrieval: str,
        seed: int,
    ) -> dict[str, NDArray[np.float64]]:
        truth = np.array(task.test_labels)
        nearest = nearest_label(pool, chosen, tests)
        scores = {
            "similarity": nearest.similarities,
            "known_class": np.isin(truth, pool.labels[chosen]).astype(np.float64),
        }
        if "nearest-neighbour" in self.learners:
            scores["accuracy"] = (nearest.labels == truth).astype(np.float64)
        if "in-context" in self.learners and len(chosen) in self.in_context_budgets:
            asked = self._asked(task)
            learner = self._in_context(task, pool, chosen, retrieval, seed)
            answers = np.array(learner.predict(tests[asked], [task.test_texts[i] for i in asked]))
            scores["in_context"] = (answers == truth[asked]).astype(np.float64)
        return scores

    def _in_context(
        self,
        task: ClassificationTask,
        pool: LabelledPool,
        chosen: NDArray[np.int64],
        retrieval: str,
        seed: int,
    ) -> InContextClassifier:
        from bakeoff.selection.in_context import InContextClassifier

        learner = InContextClassifier(
            self._loaded.language_model(self.language_model),
            sorted(set(task.train_labels)),
            n_shots=self.n_shots,
            choose="random" if retrieval == "random" else "similarity",
            random_state=seed,
        )
        return learner.fit(
            pool.vectors[chosen],
            [pool.texts[row] for row in chosen],
            pool.labels[chosen].tolist(),
            center=pool.mean,
        )

    def _asked(self, task: ClassificationTask) -> list[int]:
        """Return the tests that are answered in context: drawn by content, the same for all."""
        return splits.sample(
            range(len(task.test_texts)),
            self.max_in_context,
            seed=0,
            key=lambda row: task.test_texts[row],
        )

    def _confidence(self, task: ClassificationTask, pool: LabelledPool, seed: int) -> ConfidenceOf:
        """Return what tells how sure the learner is: the language model, if it is one."""

        def of_language_model(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            if not len(rows):
                return np.zeros(len(pool.texts))
            learner = self._in_context(task, pool, rows, "similarity", seed)
            return learner.confidence(pool.vectors, pool.texts)

        if "in-context" in self.learners:
            return of_language_model
        return lambda rows: nearest_label_confidence(pool, rows)

    def _pool_rows(self, task: ClassificationTask, seed: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([seed, 7])
        drawn = rng.choice(len(task.train_texts), _pool_size(task), replace=False)
        return drawn.astype(np.int64)

    def _vectors(self, progress: Counting | None = None) -> dict[str, NDArray[np.float32]]:
        texts = [text for task in self.tasks for text in (*task.train_texts, *task.test_texts)]
        return self._loaded.encoded(texts, self._encoder, progress)

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Pick with a design from all training texts, for the largest budget, and save the picks.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder; not needed, picks are made anew from the whole data.
        destination
            The folder to write: ``picks.parquet`` (task, pick, row, text) and ``README.md``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            True: Parquet loads anywhere.
        """
        kind = selector_kind(design.method)
        params = {key: value for key, value in design.params.items() if key != _RETRIEVAL}
        vectors = self._vectors()
        tables = []
        for task in self.tasks:
            texts = list(task.train_texts)
            pool = LabelledPool(
                np.stack([vectors[text] for text in texts]), texts, np.array(task.train_labels)
            )
            budget = self.budgets[-1]
            picks = pick_for_budgets(
                kind, params, pool, [budget], seed=0, confidence_of=self._confidence(task, pool, 0)
            )[budget]
            tables.append((task.name, [(int(row), texts[row]) for row in picks.rows]))
        save_picks(destination, design.to_json(), tables, reason)
        return True


class TrainingProblem:
    """Which samples to train on: pick with each design, train with a fixed budget, test.

    Each seed draws which queries a design may see (half of them) and the order of training.

    Parameters
    ----------
    pools
        Pools with queries and a held-out target; each is a task of its own.
    n_select
        Samples to pick.
    learner
        ``"fine-tune"``: train `base` on the picks. ``"none"``: only count how many picks are of the
        target's kind, which needs pools with marks.
    base
        The language model that is trained: packaged name, folder or hub id; or ``"small-gpt"``, 3.1
        million weights trained on the first pool's texts beforehand, made once.
    selector_model
        The language model of designs that need one (RDS+, perplexity, ...); by default `base`.
    embedder
        A sentence-transformers model, for designs that read vectors.
    budget
        Tokens, batch size, learning rate and what is trained.

    Raises
    ------
    DataError
        If there is no pool, two have one name, `n_select` is larger than one, or marks are missing.
    """

    name = "selection"

    def __init__(
        self,
        pools: Sequence[TrainingPool],
        *,
        n_select: int,
        learner: Literal["fine-tune", "none"] = "fine-tune",
        base: str = "small-gpt",
        selector_model: str | None = None,
        embedder: str = "all-minilm-l6-v2",
        budget: FineTuningBudget | None = None,
    ) -> None:
        if not pools:
            raise DataError("pools must hold at least one pool")
        _check_names("pools", [pool.name for pool in pools])
        if learner not in ("fine-tune", "none"):
            raise DataError(f"learner must be fine-tune or none, got {learner!r}")
        for pool in pools:
            if not 1 <= n_select <= len(pool.samples):
                raise DataError(
                    f"n_select must be between 1 and {len(pool.samples)}, the samples of "
                    f"{pool.name!r}, got {n_select}"
                )
        self.pools = tuple(pools)
        # With no relevant sample at all there is no share to tell.
        self.marked = all(pool.relevant is not None and pool.relevant.any() for pool in pools)
        if learner == "none" and not self.marked:
            raise DataError("learner 'none' needs pools whose relevant samples are marked")
        self.n_select = n_select
        self.learner = learner
        self.base = base
        self.selector_model = selector_model
        self.embedder = embedder
        self.budget = budget or FineTuningBudget()
        self._encoder = _text_encoder(embedder)
        self._loaded = _Loaded()
        self._base_folder: str | None = None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The loss on the target, if a model is trained; the share of relevant picks, if marked."""
        names = ["target_loss"] * (self.learner == "fine-tune") + ["relevant"] * self.marked
        return {name: TRAINING_METRICS[name] for name in names}

    def fingerprint(self) -> str:
        """Return a digest of pools, models and budget."""
        facts = {
            "pools": [pool.fingerprint() for pool in self.pools],
            "n_select": self.n_select,
            "learner": self.learner,
            "base": self._trained().fingerprint if self.learner == "fine-tune" else None,
            "selector_model": self._chooser().fingerprint,
            "embedder": self._encoder.fingerprint,
            "budget": asdict(self.budget) if self.learner == "fine-tune" else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        facts: dict[str, object] = {
            "question": "which samples to train on",
            "data": {
                pool.name: f"{len(pool.samples):,} samples, {len(pool.queries) // 2 or 1:,} of "
                f"{len(pool.queries):,} queries per seed, {len(pool.test):,} tests"
                for pool in self.pools
            },
            "picked": f"{self.n_select:,} samples",
            "notes": list(self.pools[0].notes),
        }
        if self.learner == "fine-tune":
            facts["trained"] = (
                f"{self.base} ({self.budget.train}), {self.budget.n_tokens:,} tokens, batches of "
                f"{self.budget.batch_size}, learning rate {self.budget.learning_rate:g}, "
                f"{self.budget.max_length} tokens kept per sample"
            )
        facts["designs that need a language model use"] = self.selector_model or self.base
        facts["designs that need vectors use"] = self.embedder
        return facts

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        own = "1" if method == _STAGED else selector_kind(method).version
        return f"{own}.{_TRAINING_VERSION}"

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        if design.method == _STAGED:
            self._check_staged(design)
            return
        kind = selector_kind(design.method)
        if "confidence" in kind.needs:
            raise DataError(
                f"design {design.name!r}: {design.method} chooses what to label; a target has no "
                "labels"
            )
        _check_parameters(design, kind, extra=_STATES if kind.reads == "states" else ())
        for pool in self.pools:
            without = sum(not sample.context.strip() for sample in pool.samples)
            if design.method == "gateau" and without:
                raise DataError(
                    f"design {design.name!r}: gateau needs samples with a context, an instruction "
                    f"and a response; {without:,} of {len(pool.samples):,} in {pool.name!r} have "
                    "no context"
                )
            asked = sum(bool(sample.prefix) for sample in pool.samples)
            if design.method == "ifd" and asked < self.n_select:
                raise DataError(
                    f"design {design.name!r}: ifd needs samples with an instruction and a "
                    f"response; {asked:,} in {pool.name!r} have an instruction, and "
                    f"{self.n_select:,} are to be picked"
                )
            if "groups" in kind.needs and len({sample.source for sample in pool.samples}) < 2:
                raise DataError(
                    f"design {design.name!r}: {design.method} needs samples of more than one "
                    f"source, {pool.name!r} has one"
                )

    def _check_staged(self, design: Design) -> None:
        if self.learner != "fine-tune":
            raise DataError(
                f"design {design.name!r}: {_STAGED} chooses while a model is trained; with learner "
                "'none' use mates"
            )
        unknown = sorted(set(design.params) - set(STAGED_PARAMETERS))
        if unknown:
            raise DataError(
                f"design {design.name!r}: {_STAGED} takes {', '.join(STAGED_PARAMETERS)}; got "
                f"{', '.join(unknown)}"
            )
        n_probes = int(design.params.get("n_probes", DEFAULT_PROBES))
        for pool in self.pools:
            aside = min(n_probes, len({sample.text for sample in pool.samples}))
            if len(pool.samples) - aside < self.n_select or aside < 5:
                raise DataError(
                    f"design {design.name!r}: {_STAGED} sets {n_probes} samples aside for probing, "
                    f"at least 5, and picks {self.n_select} of the others; {pool.name!r} has "
                    f"{len(pool.samples)}"
                )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; make the small GPT, vectors and states that they share."""
        for design in designs:
            self.check(design)
        if self.learner == "fine-tune" or self.selector_model is None:
            self._trained(work.progress)
        for design in designs:
            by_vectors = design.method in _PREDICT_FROM_VECTORS
            reads = "vectors" if by_vectors else selector_kind(design.method).reads
            if reads == "vectors":
                self._vectors(_counting(work.progress, "embedding"))
            elif reads == "states":
                self._states(design, _counting(work.progress, "hidden states"))

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Pick with one design from every pool; train and test on each."""
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        scores: Scores = {}
        cost: dict[str, float] = {}
        notes: list[str] = []
        if design.method == "gateau":
            notes.append(
                "Scores of samples are kept and shared by designs that weigh them differently; the "
                "time is that of what was not there yet."
            )
        picked = {}
        for number, pool in enumerate(self.pools):

            def progress(fraction: float, message: str, number: int = number) -> None:
                work.progress((number + fraction) / len(self.pools), message)

            progress(0.0, f"choosing for {pool.name}")
            if design.method == _STAGED:
                staged = self._staged(design, pool, seed, work.directory, progress)
                rows, tuned = staged.rows, staged.tuned
                notes += [f"{pool.name}: {note}" for note in staged.notes]
            else:
                rows, seconds = self._pick(design, number, seed)
                cost["selection_seconds"] = cost.get("selection_seconds", 0.0) + seconds
                tuned = None
            picked[pool.name] = rows.tolist()
            if self.marked and pool.relevant is not None:
                is_picked = np.zeros(len(pool.samples))
                is_picked[rows] = 1.0
                # Per relevant sample, scaled so that the mean is the share of relevant picks.
                scale = np.count_nonzero(pool.relevant) / len(rows)
                scores.setdefault("relevant", {})[pool.name] = is_picked[pool.relevant] * scale
            if self.learner == "fine-tune":
                if tuned is None:
                    tuned = self._train(pool, rows, seed, work.directory, progress)
                scores.setdefault("target_loss", {})[pool.name] = self._test(tuned, pool)
                cost["training_tokens"] = cost.get("training_tokens", 0.0) + tuned.n_tokens
                cost["trained_parameters"] = float(tuned.trained_parameters)
        write_text(work.directory / "picks.json", json.dumps(picked))
        return Trial(scores=scores, cost=cost, artifact=work.directory, notes=tuple(notes))

    def _pick(self, design: Design, number: int, seed: int) -> tuple[NDArray[np.int64], float]:
        """Return picks from a pool and the seconds that choosing them took.

        What depends neither on a seed nor on queries is chosen once for all seeds.
        """
        kind = selector_kind(design.method)
        same = not kind.seeded and "queries" not in kind.needs
        key = (design, number)
        if key in self._loaded.picks:
            return self._loaded.picks[key]
        began = time.perf_counter()
        rows = self._chosen(design, self.pools[number], seed)
        found = (rows, time.perf_counter() - began)
        if same:
            self._loaded.picks[key] = found
        return found

    def _chosen(self, design: Design, pool: TrainingPool, seed: int) -> NDArray[np.int64]:
        kind = selector_kind(design.method)
        queries = self._queries(pool, seed)
        params = {key: value for key, value in design.params.items() if key not in _STATES}
        model = self._chooser() if kind.uses_model else None
        if design.method == "gateau":  # designs that weigh the same scores share them
            params.setdefault("scores_file", str(cache_directory() / "scores" / "gateau.jsonl"))
        selector = kind.build(n_select=self.n_select, seed=seed, model=model, **params)
        data: dict[str, Any] = {}
        asked = [pool.queries[row] for row in queries]
        if "groups" in kind.needs:
            data["groups"] = [sample.source for sample in pool.samples]
        contents: Any
        if kind.reads == "vectors":
            vectors = self._vectors()
            contents = np.stack([vectors[sample.text] for sample in pool.samples])
            wanted: Any = np.stack([vectors[sample.text] for sample in asked])
        elif kind.reads == "states":
            states = self._states(design)
            contents = np.stack([states[sample.text] for sample in pool.samples])
            wanted = np.stack([states[sample.text] for sample in asked])
        else:  # who reads texts takes a sample's
            contents, wanted = list(pool.samples), asked
        if design.method in _PREDICT_FROM_VECTORS:
            vectors = self._vectors()
            data["vectors"] = np.stack([vectors[sample.text] for sample in pool.samples])
        if "queries" in kind.needs:
            data["queries"] = wanted
        rows: NDArray[np.int64] = selector.fit(contents, **data).selected_indices_
        return rows

    def _train(
        self,
        pool: TrainingPool,
        rows: NDArray[np.int64],
        seed: int,
        directory: Path,
        progress: Callable[[float, str], None],
    ) -> FineTuned:
        start = self._trained()
        length = min(self.budget.max_length, start.max_length)
        dataset = training_rows([pool.samples[row] for row in rows], start.tokenizer, length)
        return fine_tune(
            start,
            dataset,
            self.budget,
            steps=self.budget.steps(dataset),
            seed=seed,
            directory=directory,
            progress=progress,
        )

    def _staged(
        self,
        design: Design,
        pool: TrainingPool,
        seed: int,
        directory: Path,
        progress: Callable[[float, str], None],
    ) -> Staged:
        vectors = self._vectors()
        return train_in_stages(
            self._trained(),
            pool.samples,
            [pool.queries[row] for row in self._queries(pool, seed)],
            design.params,
            self.budget,
            n_select=self.n_select,
            embed=lambda texts: np.stack([vectors[text] for text in texts]),
            seed=seed,
            directory=directory,
            progress=progress,
        )

    def _test(self, tuned: FineTuned, pool: TrainingPool) -> NDArray[np.float64]:
        start = self._trained()
        length = min(self.budget.max_length, start.max_length)
        return target_losses(tuned.model, start.tokenizer, pool.test, length)

    def _queries(self, pool: TrainingPool, seed: int) -> NDArray[np.int64]:
        n = max(1, len(pool.queries) // 2)
        drawn = np.random.default_rng([seed, 11]).choice(len(pool.queries), n, replace=False)
        return np.sort(drawn).astype(np.int64)

    def _trained(self, progress: Callable[[float, str], None] | None = None) -> LanguageModel:
        if self._base_folder is None:
            self._base_folder = self.base
            if self.base == "small-gpt":
                from bakeoff.models.small_gpt import SmallGPT

                texts = [sample.text for sample in self.pools[0].samples]
                context = max(128, self.budget.max_length)
                folder = SmallGPT(context=context).pretrained(texts, progress=progress)
                self._base_folder = str(folder)
        return self._loaded.language_model(self._base_folder)

    def _chooser(self) -> LanguageModel:
        if self.selector_model is None:
            return self._trained()
        return self._loaded.language_model(self.selector_model)

    def _samples(self) -> list[Sample]:
        """Return all samples and queries, one for each text."""
        found: dict[str, Sample] = {}
        for pool in self.pools:
            for sample in (*pool.samples, *pool.queries):
                found.setdefault(sample.text, sample)
        return list(found.values())

    def _vectors(self, progress: Counting | None = None) -> dict[str, NDArray[np.float32]]:
        texts = [sample.text for sample in self._samples()]
        return self._loaded.encoded(texts, self._encoder, progress)

    def _states(
        self, design: Design, progress: Counting | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return RDS+'s vector of every sample, by the sample's text.

        Designs that differ in their pooling share one pass of the language model.
        """
        from bakeoff.selection.rds_plus import POOLINGS, RepresentationSelector

        pooling = design.params.get("pooling", POOLINGS[0])
        if pooling not in POOLINGS:
            raise DataError(
                f"design {design.name!r}: pooling must be one of {', '.join(POOLINGS)}, got "
                f"{pooling!r}"
            )
        reader = RepresentationSelector(self._chooser(), layer=design.params.get("layer", -1))
        samples = self._samples()
        # A sample with an instruction is read as a conversation.
        read = [reader.text_of(sample) for sample in samples]

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return reader.embed_poolings(texts).reshape(len(texts), -1)

        facts = {**reader.fingerprint(), "pooling": "all"}
        vectors = self._loaded.by_text(read, embed, facts, progress)
        width = len(vectors[read[0]]) // len(POOLINGS)
        part = slice(POOLINGS.index(pooling) * width, (POOLINGS.index(pooling) + 1) * width)
        return {
            sample.text: vectors[text][part] for sample, text in zip(samples, read, strict=True)
        }

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save what a design picks from every pool when it sees all queries of the first seed.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder, with the picks.
        destination
            The folder to write: ``picks.parquet`` (task, pick, row, text) and ``README.md``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            True: Parquet loads anywhere.
        """
        picked = json.loads((artifact / "picks.json").read_text("utf-8"))
        tables = [
            (pool.name, [(row, pool.samples[row].text) for row in picked[pool.name]])
            for pool in self.pools
        ]
        save_picks(destination, design.to_json(), tables, reason)
        return True


# Raise when the learners or the drawing of pools change what a trial scores.
_ANNOTATION_VERSION = 2
_TRAINING_VERSION = 1


def _check_names(argument: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{argument} must have distinct names, got twice: {', '.join(twice)}")


def _check_parameters(design: Design, kind: SelectorKind, extra: Sequence[str]) -> None:
    unknown = sorted(set(design.params) - {*kind.parameters, *extra})
    if unknown:
        raise DataError(
            f"design {design.name!r}: {design.method} takes "
            f"{', '.join((*kind.parameters, *extra)) or 'no parameters'}; got {', '.join(unknown)}"
        )


def _text_encoder(name: str) -> TextEncoder:
    from bakeoff.models import TextEncoder

    return TextEncoder(name)


def _counting(progress: Callable[[float, str], None], message: str) -> Counting:
    def report(done: int, total: int) -> None:
        progress(done / max(total, 1), message)

    return report
