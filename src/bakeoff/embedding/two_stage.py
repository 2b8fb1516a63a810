"""Two-stage contrastive instruction tuning (NV-Embed): retrieval first, then all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.training import (
    Encode,
    Indices,
    Kind,
    homogeneous_batches,
    negatives_of,
    train_contrastive,
)

if TYPE_CHECKING:
    from peft import LoraConfig

Stage = Literal["stage1", "stage2"]
STAGES: tuple[Stage, Stage] = ("stage1", "stage2")

# Attention and feed-forward projections of Llama-like decoders, then of BERT-like encoders.
LORA_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "dense"),
)


class TwoStageTrainer:
    """Trains an embedding model in two stages that differ in data and in what counts as negative.

    Stage 1 trains on retrieval data and uses the other texts of a batch as negatives. Stage 2 goes
    on from there with all tasks, class-labelled ones included, and contrasts each query with its
    own hard negatives only, since another query's positive may be of the same class.

    Parameters
    ----------
    stage1, stage2
        Groups of training pairs; one of the two may be empty. Every batch comes from one group. A
        group that is trained without in-batch negatives needs hard negatives.
    in_batch
        Per stage, whether the batch serves as negatives; or per group name of that stage.
    steps, learning_rate
        Per stage. The defaults are the paper's, made for eight large GPUs.
    batch_size
        Pairs per batch.
    warmup_steps, weight_decay, max_grad_norm
        Of each stage's optimizer, see `bakeoff.embedding.train_contrastive`.
    scale
        One over the temperature; the paper does not state its own.
    query_prompts, document_prompts
        By group name, what is put before the group's queries, and before its positives and
        negatives (for symmetric tasks). `bakeoff.embedding.instruction_prompt` writes one. Whether
        prompts are pooled is the pooling module's choice (``include_prompt``).
    lora
        True for LoRA on the backbone's attention and feed-forward projections (rank 16, alpha 32,
        dropout 0.1) with everything else in the backbone frozen; or a ``peft.LoraConfig``. The
        modules after the backbone are trained whole. After training, the adapters are merged, so
        that the model saves and loads as before. False trains whatever requires a gradient.

    References
    ----------
    Chankyu Lee et al. "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding
    Models". ICLR 2025. arXiv:2405.17428.

    Edward J. Hu et al. "LoRA: Low-Rank Adaptation of Large Language Models". ICLR 2022.
    arXiv:2106.09685.

    Examples
    --------
    >>> trainer = TwoStageTrainer(
    ...     stage1=[questions_and_answers],
    ...     stage2=[questions_and_mined, ClassTriplets(labels, texts).pairs(seed=0)],
    ...     steps={"stage1": 300, "stage2": 300},
    ...     batch_size=16,
    ...     lora=True,
    ... )  # doctest: +SKIP
    >>> history = trainer.train(model, seed=0)  # doctest: +SKIP
    """

    def __init__(
        self,
        stage1: Sequence[TextPairs],
        stage2: Sequence[TextPairs],
        *,
        in_batch: Mapping[Stage, bool | Mapping[str, bool]] | None = None,
        steps: Mapping[Stage, int] | None = None,
        learning_rate: Mapping[Stage, float] | None = None,
        batch_size: int = 128,
        warmup_steps: int = 500,
        weight_decay: float = 0.03,
        max_grad_norm: float = 1.0,
        scale: float = 20.0,
        query_prompts: Mapping[str, str] | None = None,
        document_prompts: Mapping[str, str] | None = None,
        lora: bool | LoraConfig = False,
    ) -> None:
        self.groups: dict[Stage, tuple[TextPairs, ...]] = {
            "stage1": tuple(stage1),
            "stage2": tuple(stage2),
        }
        if not (stage1 or stage2):
            raise ValueError("stage1 and stage2 are both empty: nothing to train on")
        self.in_batch = _per_stage("in_batch", in_batch, {"stage1": True, "stage2": False})
        self.steps = _per_stage("steps", steps, {"stage1": 20_000, "stage2": 18_000})
        self.learning_rate = _per_stage(
            "learning_rate", learning_rate, {"stage1": 2e-5, "stage2": 1.5e-5}
        )
        self.batch_size = batch_size
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.scale = scale
        self.query_prompts = dict(query_prompts or {})
        self.document_prompts = dict(document_prompts or {})
        self.lora = lora
        for stage in STAGES:
            for group in self.groups[stage]:
                if not self._uses_batch(stage, group) and negatives_of(group) is None:
                    raise ValueError(
                        f"{stage} trains group {group.group!r} without in-batch negatives, but it "
                        "has no negatives: mine some with mine_hard_negatives or draw them with "
                        "ClassTriplets"
                    )

    def train(
        self,
        model: nn.Module,
        seed: int = 0,
        progress: Callable[[float, str], None] | None = None,
    ) -> dict[Stage, list[float]]:
        """Train `model` in place.

        Parameters
        ----------
        model
            A SentenceTransformer, or any torch module that turns a list of texts into vectors
            ``(n, d)`` with gradients (prompts are then put before the texts as they are).
        seed
            Determines batches, dropout and the adapters' initial weights; the caller's random state
            is left as it was.
        progress
            Called with the fraction done and a message.

        Returns
        -------
        dict
            Per stage that has data, the loss at every step.

        Raises
        ------
        ValueError
            If nothing in the model can be trained, or LoRA finds none of its projections.
        """
        stages = [stage for stage in STAGES if self.groups[stage]]
        total = sum(self.steps[stage] for stage in stages)
        history: dict[Stage, list[float]] = {}
        was_training = model.training
        devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
        with torch.random.fork_rng(devices), self._adapters(model, seed):
            torch.manual_seed(seed)
            model.train()
            for stage in stages:
                done = sum(len(losses) for losses in history.values())

                def report(
                    fraction: float, message: str, stage: Stage = stage, done: int = done
                ) -> None:
                    if progress is not None:
                        finished = done + fraction * self.steps[stage]
                        progress(finished / total, f"{stage}: {message}")

                history[stage] = self._train_stage(model, stage, seed, report)
        model.train(was_training)
        return history

    def _train_stage(
        self, model: nn.Module, stage: Stage, seed: int, progress: Callable[[float, str], None]
    ) -> list[float]:
        groups = self.groups[stage]
        policy = [self._uses_batch(stage, group) for group in groups]
        lookup = _Lookup(groups)
        return train_contrastive(
            self._encoder(model, lookup),
            homogeneous_batches(
                groups,
                self.batch_size,
                # Stages must not walk shared groups in the same order.
                seed=2 * seed + STAGES.index(stage),
                distinct=policy.__getitem__,
            ),
            model.parameters(),
            steps=self.steps[stage],
            learning_rate=self.learning_rate[stage],
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            scale=self.scale,
            in_batch=lambda indices: policy[lookup.group_of(indices)],
            progress=progress,
        )

    def _encoder(self, model: nn.Module, lookup: _Lookup) -> Encode:
        def encode(kind: Kind, indices: Indices) -> Tensor | None:
            prompts = self.query_prompts if kind == "query" else self.document_prompts
            prompt = prompts.get(lookup.groups[lookup.group_of(indices)].group, "")
            rows = lookup.texts(kind, indices)
            if rows is None:
                return None
            vectors = embed_with_gradients(model, [text for row in rows for text in row], prompt)
            return vectors.view(len(rows), -1, vectors.shape[-1]) if kind == "negative" else vectors

        return encode

    def _uses_batch(self, stage: Stage, group: TextPairs) -> bool:
        policy = self.in_batch[stage]
        if isinstance(policy, Mapping):
            if group.group not in policy:
                raise ValueError(
                    f"in_batch[{stage!r}] says nothing about group {group.group!r}, only about "
                    f"{sorted(policy)}"
                )
            return bool(policy[group.group])
        return bool(policy)

    @contextmanager
    def _adapters(self, model: nn.Module, seed: int) -> Iterator[None]:
        """Put LoRA adapters into the backbone, and merge them at the end; or do nothing."""
        if not self.lora:
            yield
            return
        backbone = _backbone(model)
        requires_grad = {
            name: parameter.requires_grad for name, parameter in backbone.named_parameters()
        }
        torch.manual_seed(seed)
        add_lora(model, None if self.lora is True else self.lora)
        try:
            yield
        except BaseException:
            _take_out_lora(backbone, merge=False)  # no half-trained model: weights are as before
            raise
        else:
            merge_lora(model)
        finally:
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(requires_grad[name])


def add_lora(model: nn.Module, config: LoraConfig | None = None) -> None:
    """Put LoRA adapters into a model's backbone, in place, and freeze the rest of the backbone.

    Parameters
    ----------
    model
        A SentenceTransformer (its other modules are left as they are), or a backbone.
    config
        `lora_config` of the backbone if None.

    See Also
    --------
    merge_lora : Takes the adapters out again.
    """
    import peft

    backbone = _backbone(model)
    peft.inject_adapter_in_model(lora_config(backbone) if config is None else config, backbone)


def merge_lora(model: nn.Module) -> None:
    """Add what `add_lora`'s adapters have learned to the weights, and take the adapters out.

    The backbone then has its old structure, so that it saves and loads without peft.
    """
    _take_out_lora(_backbone(model), merge=True)


def lora_config(backbone: nn.Module) -> LoraConfig:
    """Return the LoRA configuration of both papers for a decoder.

    Rank 16, alpha 32, dropout 0.1 on the attention and feed-forward projections.

    Raises
    ------
    ValueError
        If the backbone has none of these projections by their usual names; lists what it has.
    """
    import peft

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
    }
    targets = [name for name in LORA_PROJECTIONS if name in linear]
    if not targets:
        raise ValueError(
            f"{type(backbone).__name__} has no linear layer called {', '.join(LORA_PROJECTIONS)}; "
            f"it has {sorted(linear)}: pass lora=peft.LoraConfig(target_modules=[...])"
        )
    return peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.1,
        bias="none",
        target_modules=targets,
        task_type="FEATURE_EXTRACTION",
    )


def embed_with_gradients(model: nn.Module, texts: Sequence[str], prompt: str = "") -> Tensor:
    """Return the vectors ``(n, d)`` of texts, with gradients.

    Parameters
    ----------
    model
        A SentenceTransformer, or a torch module called with a list of texts.
    texts
        The texts, without the prompt.
    prompt
        Put before every text. A SentenceTransformer is told its length, so that its pooling can
        leave it out.
    """
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import embed_batch

    if not isinstance(model, SentenceTransformer):
        return cast("Tensor", model([prompt + text for text in texts]))
    return embed_batch(model, texts, prompt=prompt)


class _Lookup:
    """Texts of several groups under one running index."""

    def __init__(self, groups: Sequence[TextPairs]) -> None:
        self.groups = groups
        self._negatives = [negatives_of(group) for group in groups]
        self._place = [(g, row) for g, group in enumerate(groups) for row in range(len(group))]

    def group_of(self, indices: Indices) -> int:
        """Return the position of the group that a homogeneous batch is from."""
        return self._place[int(indices[0])][0]

    def texts(self, kind: Kind, indices: Indices) -> list[tuple[str, ...]] | None:
        """Return one tuple of texts per pair, or None where the group has no negatives."""
        group = self.group_of(indices)
        rows = [self._place[index][1] for index in indices.tolist()]
        if kind == "negative":
            negatives = self._negatives[group]
            return None if negatives is None else [negatives[row] for row in rows]
        pairs = self.groups[group]
        column = pairs.queries if kind == "query" else pairs.positives
        return [(column[row],) for row in rows]


def _backbone(model: nn.Module) -> nn.Module:
    """Return the transformers model inside `model`, or `model` itself if it is not a pipeline."""
    from sentence_transformers import SentenceTransformer

    if isinstance(model, SentenceTransformer):
        return cast("nn.Module", model[0].auto_model)
    return model


def _take_out_lora(backbone: nn.Module, *, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, module.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config


def _per_stage(name: str, given: Mapping[Any, Any] | None, default: dict[Any, Any]) -> Any:
    unknown = sorted(set(given or {}) - set(STAGES))
    if unknown:
        raise ValueError(f"{name} must have the keys 'stage1' and 'stage2', got {unknown}")
    return {**default, **(given or {})}
