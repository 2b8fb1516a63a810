"""How an embedding design is fitted and scored: the family's side of a study.

With ``train="head"`` the base model is frozen: its hidden states are computed once per attention
kind, cached, and shared by all designs and seeds, so that a trial trains and scores a head only.
With ``train="lora"`` or ``"full"`` each trial trains its own copy of the base model as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.tasks import ClassificationTask, EmbeddingData, TextPairs, task_texts
from bakeoff.embedding.heads import head_kind
from bakeoff.embedding.training import Budget
from bakeoff.errors import DataError
from bakeoff.study import Design, Designs, Metric, Trial, Work

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from bakeoff.embedding.fitting import CachedTexts, Fitted, TrainingGroup
    from bakeoff.embedding.pooling import PoolingModule
    from bakeoff.embedding.scoring import Embed
    from bakeoff.models import BaseModel, FeatureCache

Train = Literal["head", "lora", "full"]
Attention = Literal["causal", "bidirectional"]
Progress = Callable[[float, str], None]

METRICS: dict[str, Metric] = {
    "score": Metric(
        "mean score", combines=("mrr_at_10", "spearman", "v_measure", "accuracy"), margin=0.01
    ),
    "mrr_at_10": Metric("retrieval (MRR@10)", margin=0.01),
    "spearman": Metric("similarity (Spearman)", margin=0.01),
    "v_measure": Metric("clustering (V-measure)", margin=0.01),
    "accuracy": Metric("classification (accuracy)", margin=0.01),
}


def default_designs(
    attentions: Sequence[Attention] = ("causal", "bidirectional"),
    *,
    num_latents: int = 8,
    num_heads: int = 8,
) -> Designs:
    """Return the paper's grid, latent attention with its control, and the sceptic's baselines.

    Parameters
    ----------
    attentions
        Attention kinds of the grid; the baselines beside it take the first. For encoders give
        ``("bidirectional",)``.
    num_latents, num_heads
        Size of the trainable heads. The papers' sizes (768 and 512 latents) belong to base models
        fifty times as large.

    Examples
    --------
    >>> [design.name for design in default_designs()][:3]
    ['last token, causal', 'last token, bidirectional', 'mean, causal']
    """
    sizes = {"num_latents": num_latents, "num_heads": num_heads}
    grid = Designs(
        [
            Design("last token", "last-token"),
            Design("mean", "mean"),
            Design("weighted mean", "position-weighted-mean"),
            Design("last-layer pooling", "last-layer-pooling", sizes),
            Design("multi-layer pooling", "multi-layer-pooling", sizes),
            Design("latent attention", "latent-attention", sizes),
            Design("residual MLP + mean", "residual-mlp", sizes),
        ]
    )
    plain = {"attention": attentions[0]}
    rivals = Designs(
        [
            Design("mean, centred", "mean", {**plain, "center": True}),
            Design("best layer", "best-layer", plain),
            Design("best layer, centred", "best-layer", {**plain, "center": True}),
            Design("scalar mix of layers", "scalar-mix", plain),
            Design("all layers + linear", "concat-linear", plain),
        ]
    )
    return grid * Designs.axis("attention", list(attentions)) + rivals


class EmbeddingProblem:
    """Fit and score embedding designs on one data set, one base model, one budget.

    Parameters
    ----------
    data
        Training pairs and held-out tasks, see `bakeoff.data`.
    base
        Name, folder, ``.gguf`` file or hub id of the base model.
    train
        ``"head"``: only the pooling head, on frozen and cached hidden states. ``"lora"``: adapters
        in the base model as well. ``"full"``: all its weights.
    steps
        Training steps; the same for all trained designs.
    batch_size
        Pairs per step; the others' positives in the batch serve as negatives.
    learning_rate
        Peak rate of the head, AdamW with linear warm-up and decay.
    base_learning_rate
        Peak rate of the base model's weights or adapters, for ``"lora"`` and ``"full"``.
    max_length
        Tokens kept of each text, the appended end-of-sequence token included.
    cache
        Where hidden states are kept; by default in the user's cache folder.

    Raises
    ------
    DataError
        If there is no task, or a number is out of range.

    Examples
    --------
    >>> from bakeoff.data import embedded_default
    >>> from bakeoff.study import Study
    >>> problem = EmbeddingProblem(embedded_default("smoke"), steps=10)  # doctest: +SKIP
    >>> study = Study(
    ...     problem,
    ...     default_designs(),
    ...     reference="mean, causal",
    ...     seeds=2,
    ...     directory="runs/try",
    ... )  # doctest: +SKIP
    >>> study.run().winner  # doctest: +SKIP
    """

    name = "embedding"

    def __init__(
        self,
        data: EmbeddingData,
        base: str = "smollm2-135m",
        *,
        train: Train = "head",
        steps: int = 300,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        base_learning_rate: float = 1e-4,
        max_length: int = 128,
        cache: FeatureCache | None = None,
    ) -> None:
        if train not in ("head", "lora", "full"):
            raise DataError(f"train must be head, lora or full, got {train!r}")
        for argument, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),
            ("max_length", max_length, 4),
        ):
            if value < least:
                raise DataError(f"{argument} must be at least {least}, got {value}")
        if not data.tasks:
            raise DataError(f"data {data.name!r} holds no task to score designs on")
        self.data = data
        self.base_name = base
        self.train = train
        self.budget = Budget(steps, batch_size, learning_rate, base_learning_rate)
        self.max_length = max_length
        self._cache = cache
        self._base: BaseModel | None = None
        self._states: dict[str, CachedTexts] = {}
        self._base_flops: float | None = None
        self._n_cut: int | None = None
        self._groups: tuple[TrainingGroup, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Loaded models and open maps stay behind when a worker process gets a copy.
        return {**self.__dict__, "_base": None, "_states": {}}

    @property
    def base(self) -> BaseModel:
        """The base model, loaded when first needed; its tokenizer appends an end of sequence."""
        if self._base is None:
            from bakeoff.models import load

            self._base = load(self.base_name, append_eos=True)
        return self._base

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention kinds that the base model can run: both for decoders."""
        return ("causal", "bidirectional") if self.base.is_decoder else ("bidirectional",)

    @property
    def groups(self) -> tuple[TrainingGroup, ...]:
        """What is trained on: the data's pairs, else triplets of its labelled training texts.

        Triplets are NV-Embed's: a text, another of its class, one of another class; the rest of
        the batch may be of the same class and does not serve as negatives.
        """
        if self._groups is None:
            from bakeoff.embedding.fitting import TrainingGroup

            self._groups = tuple(TrainingGroup(pairs) for pairs in self.data.train)
            if not self._groups:
                self._groups = tuple(
                    TrainingGroup(pairs, in_batch=False) for pairs in _class_triplets(self.data)
                )
        return self._groups

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The mean over all tasks, then one metric per kind of task that the data has."""
        from bakeoff.embedding.scoring import METRIC_OF_TASK

        present = {METRIC_OF_TASK[type(task)] for task in self.data.tasks}
        combined = tuple(name for name in METRICS["score"].combines if name in present)
        if len(combined) == 1:
            return {combined[0]: METRICS[combined[0]]}
        headline = Metric("mean score", combines=combined, margin=METRICS["score"].margin)
        return {"score": headline, **{name: METRICS[name] for name in combined}}

    def fingerprint(self) -> str:
        """Return a digest of data, base model and budget."""
        facts = {
            "data": self.data.fingerprint(),
            "base": self.base.fingerprint,
            "train": self.train,
            "budget": asdict(self.budget),
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        trained = {"head": "pooling head, base frozen", "lora": "head and LoRA adapters"}
        return {
            "data": self.data.name,
            "training pairs": {g.pairs.group: len(g.pairs) for g in self.groups},
            "tasks": {t.name: f"{len(set(task_texts(t)))} texts" for t in self.data.tasks},
            "base model": f"{self.base.name} ({self.base.num_layers} layers, "
            f"width {self.base.hidden_size})",
            "trained": trained.get(self.train, "everything"),
            "budget": f"{self.budget.steps} steps of {self.budget.batch_size} pairs, learning rate "
            f"{self.budget.learning_rate:g}, InfoNCE at temperature 0.05",
            "tokens kept per text": self.max_length,
            "notes": list(self.data.notes),
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return head_kind(method).version

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here: unknown method, parameter or attention."""
        kind = head_kind(design.method)
        known = {"attention", *kind.parameters, *(() if kind.trained else ("center",))}
        unknown = sorted(set(design.params) - known)
        if unknown:
            raise DataError(
                f"design {design.name!r}: {design.method} takes {sorted(known)}, got {unknown}"
            )
        attention = design.params.get("attention", self.attentions[0])
        if attention not in ("causal", "bidirectional"):
            raise DataError(
                f"design {design.name!r}: attention must be causal or bidirectional, "
                f"got {attention!r}"
            )
        if attention not in self.attentions:
            raise DataError(
                f"design {design.name!r} asks for {attention} attention, but base model "
                f"{self.base.name!r} is an encoder: give attention='bidirectional'"
            )
        learns = kind.trained or self.train != "head" or design.params.get("center")
        learns = learns or (design.method == "best-layer" and "layer" not in design.params)
        if learns and not self.groups:
            raise DataError(
                f"design {design.name!r} learns from training texts, but data {self.data.name!r} "
                "has none: give pairs (text, positive) or labelled texts, or choose designs that "
                "need none (last token, mean, weighted mean)"
            )

    # ---- shared work -------------------------------------------------------------------------

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs and compute the hidden states that they share."""
        for design in designs:
            self.check(design)
        if self.train != "head":
            return
        attentions = sorted({self._attention(design) for design in designs})
        for index, attention in enumerate(attentions):

            def progress(fraction: float, message: str, index: int = index) -> None:
                work.progress((index + fraction) / len(attentions), message)

            self._cached(attention, progress)

    def _attention(self, design: Design) -> Attention:
        chosen: Attention = design.params.get("attention", self.attentions[0])
        return chosen

    def _cached(self, attention: Attention, progress: Progress | None = None) -> CachedTexts:
        if attention not in self._states:
            from bakeoff.embedding.fitting import CachedTexts
            from bakeoff.models import FeatureCache

            texts = self.data.texts()
            features = (self._cache or FeatureCache()).features(
                self.base,
                texts,
                attention=attention,
                max_length=self.max_length,
                progress=progress,
            )
            self._states[attention] = CachedTexts(features, texts)
        return self._states[attention]

    # ---- one trial ---------------------------------------------------------------------------

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Fit one design under one seed, embed all task texts, score every task."""
        import torch

        self.check(design)
        notes = self._truncation()
        resolved = self._resolve(design, notes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = self._head(design, resolved)
            fitted = self._fit(design, head, seed, work)
        scores = self._score(fitted.embed, seed, work)
        fitted.save(work.directory, {"design": design.to_json(), "resolved": resolved})
        learned = fitted.trained_parameters > 0 or bool(resolved)
        return Trial(
            scores=scores,
            cost={
                "trained_parameters": float(fitted.trained_parameters),
                "labels_used": float(sum(len(g.pairs) for g in self.groups) if learned else 0),
                "forward_flops_per_text": self._forward_flops(design, head),
            },
            artifact=work.directory,
            notes=tuple(notes),
        )

    def _truncation(self) -> list[str]:
        if self._n_cut is None:
            lengths = self.base.tokenizer(list(self.data.texts()))["input_ids"]
            self._n_cut = sum(len(ids) > self.max_length for ids in lengths)
        if not self._n_cut:
            return []
        total = len(self.data.texts())
        return [f"{self._n_cut} of {total} texts were cut at {self.max_length} tokens"]

    def _resolve(self, design: Design, notes: list[str]) -> dict[str, Any]:
        """Return the parameters that the training data decides; so far, which layer."""
        if design.method != "best-layer" or "layer" in design.params:
            return {}
        from bakeoff.embedding.fitting import choose_layer

        center = bool(design.params.get("center", False))
        layer = choose_layer(self._cached(self._attention(design)), self.groups, center=center)
        notes.append(f"layer {layer} of {self.base.num_layers} was best on the training pairs")
        return {"layer": layer}

    def _head(self, design: Design, resolved: Mapping[str, Any]) -> PoolingModule:
        kind = head_kind(design.method)
        params = {**design.params, **resolved}
        chosen = {name: params[name] for name in kind.parameters if name in params}
        return kind.build(self.base, self._attention(design), **chosen)

    def _fit(self, design: Design, head: PoolingModule, seed: int, work: Work) -> Fitted:
        from bakeoff.embedding.fitting import fit_head, fit_whole

        def progress(fraction: float, message: str) -> None:
            work.progress(0.8 * fraction, message)

        if self.train == "head":
            return fit_head(
                head,
                self._cached(self._attention(design)),
                self.groups,
                budget=self.budget if head_kind(design.method).trained else None,
                seed=seed,
                center=bool(design.params.get("center", False)),
                progress=progress,
            )
        model = self._model(design, head, stock=False)
        return fit_whole(
            model,
            head,
            self.groups,
            budget=self.budget,
            seed=seed,
            lora=self.train == "lora",
            progress=progress,
        )

    def _model(
        self,
        design: Design,
        head: PoolingModule,
        *,
        offsets: Mapping[str, Tensor] | None = None,
        stock: bool,
    ) -> SentenceTransformer:
        from bakeoff.embedding.winner import sentence_transformer

        return sentence_transformer(
            self.base,
            head,
            attention=self._attention(design),
            max_length=self.max_length,
            offsets=offsets,
            stock=stock,
        )

    def _score(
        self, embed: Embed, seed: int, work: Work
    ) -> dict[str, dict[str, NDArray[np.float64]]]:
        from bakeoff.embedding.scoring import METRIC_OF_TASK, score_task

        scores: dict[str, dict[str, NDArray[np.float64]]] = {}
        for index, task in enumerate(self.data.tasks):
            work.progress(0.8 + 0.2 * index / len(self.data.tasks), f"scoring {task.name}")
            units = score_task(task, embed, seed=seed)
            scores.setdefault(METRIC_OF_TASK[type(task)], {})[task.name] = units
        return scores

    def _forward_flops(self, design: Design, head: PoolingModule) -> float:
        """Count what embedding one text of median length costs, base model and head."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        def count(call: Callable[[], object]) -> float:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            return float(counter.get_total_flops())

        if self._base_flops is None:
            ids = torch.full((1, self._median_length()), 5)
            self._base_flops = count(lambda: self.base.model(input_ids=ids))
        reads_tokens = head.reads == "tokens"
        length = self._median_length() if reads_tokens else self.base.num_layers + 1
        states = torch.zeros(1, length, self.base.hidden_size)
        return self._base_flops + count(lambda: head.pool(states))

    def _median_length(self) -> int:
        lengths = [len(ids) for ids in self.base.tokenizer(self.data.texts()[:256])["input_ids"]]
        return min(int(np.median(lengths)), self.max_length)

    # ---- the winner leaves ---------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save what a trial fitted as a sentence-transformers folder.

        Parameters
        ----------
        design
            The trial's design.
        artifact
            Its artifact folder.
        destination
            The folder to write; replaced if it exists.
        reason
            Why this design, for the folder's README.

        Returns
        -------
        bool
            Whether the folder loads without bakeoff.
        """
        from bakeoff.embedding.fitting import Artifact
        from bakeoff.embedding.winner import save_winner

        fitted = Artifact.load(artifact)
        head = self._head(design, fitted.facts["resolved"])
        head.load_state_dict(fitted.head)
        head.normalize = not fitted.offsets
        model = self._model(design, head, offsets=fitted.offsets, stock=True)
        fitted.restore_base(model, lora=self.train == "lora")
        return save_winner(
            model,
            destination,
            {
                "design": design.name,
                "reason": reason,
                "base": self.base.name,
                "method": design.method,
                "parameters": dict(design.params),
                "trained": self.train,
                "data": self.data.name,
                "tokens kept per text": self.max_length,
            },
        )


def _class_triplets(data: EmbeddingData) -> list[TextPairs]:
    """Return triplets from the training part of every classification task that allows some."""
    from bakeoff.embedding.class_triplets import ClassTriplets

    found = []
    for task in data.tasks:
        if isinstance(task, ClassificationTask):
            by_label: dict[str, set[str]] = {}
            for text, label in zip(task.train_texts, task.train_labels, strict=True):
                by_label.setdefault(label, set()).add(text)
            rows = [
                (label, text)
                for label, text in zip(task.train_labels, task.train_texts, strict=True)
                if len(by_label[label]) > 1
            ]
            if len({label for label, _ in rows}) > 1:
                labels, texts = zip(*rows, strict=True)
                group = f"triplets of {task.name}"
                found.append(ClassTriplets(labels, texts).pairs(seed=0, group=group))
    return found


def compare_designs(
    scores: Mapping[str, NDArray[np.float64]], reference: str
) -> dict[str, dict[str, float]]:
    """Compare designs over data sets as arXiv 2409.02727 does, with Holm's correction added.

    A two-sided Wilcoxon signed-rank test on the paired scores of each design and the reference.
    For a verdict with intervals over units and seeds use `bakeoff.study.compare`.

    Parameters
    ----------
    scores
        ``scores[design]`` is a float array ``(n_data_sets,)``, aligned across designs.
    reference
        The design that the others are compared with.

    Returns
    -------
    dict
        Per other design ``statistic``, ``p_value``, ``p_holm`` and ``mean_difference``.

    Examples
    --------
    >>> table = compare_designs(
    ...     {"mean": np.arange(8) / 10, "multi": np.arange(8) / 10 + np.arange(1, 9) / 100}, "mean"
    ... )
    >>> round(table["multi"]["p_value"], 4)
    0.0078
    """
    from bakeoff.study.statistics import wilcoxon_holm

    return wilcoxon_holm(scores, reference)
