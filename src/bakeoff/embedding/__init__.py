"""Text to vector: pooling, attention masks, contrastive training."""

from importlib import import_module
from typing import Any

# Where each public name lives. Loaded on first use, so that importing this package costs nothing.
_HOMES = {
    "ClassTriplets": "bakeoff.embedding.class_triplets",
    "ConcatLinearPooling": "bakeoff.embedding.baselines",
    "ContrastiveLoss": "bakeoff.embedding.contrastive",
    "CrossAttentionBlock": "bakeoff.embedding.cross_attention",
    "EmbeddingProblem": "bakeoff.embedding.problem.pooling",
    "HardNegatives": "bakeoff.embedding.hard_negatives",
    "LastLayerPooling": "bakeoff.embedding.trainable_pooling",
    "LastTokenPooling": "bakeoff.embedding.baselines",
    "LatentAttentionPooling": "bakeoff.embedding.latent_attention",
    "MeanPooling": "bakeoff.embedding.baselines",
    "MultiLayerPooling": "bakeoff.embedding.trainable_pooling",
    "PoolingHead": "bakeoff.embedding.protocol",
    "PoolingModule": "bakeoff.embedding.pooling",
    "PositionWeightedMeanPooling": "bakeoff.embedding.baselines",
    "ResidualMLPPooling": "bakeoff.embedding.baselines",
    "ScalarMixPooling": "bakeoff.embedding.baselines",
    "SingleLayerMeanPooling": "bakeoff.embedding.baselines",
    "TwoStageTrainer": "bakeoff.embedding.two_stage",
    "attention_mask_from_ids": "bakeoff.embedding.pooling",
    "best_layer": "bakeoff.embedding.baselines",
    "bidirectional": "bakeoff.models",
    "compare_designs": "bakeoff.embedding.problem.pooling",
    "default_designs": "bakeoff.embedding.problem.pooling",
    "encode_with_instruction": "bakeoff.embedding.instruction",
    "false_negative_mask": "bakeoff.embedding.contrastive",
    "homogeneous_batches": "bakeoff.embedding.training",
    "info_nce": "bakeoff.embedding.contrastive",
    "instruction_pool_mask": "bakeoff.embedding.instruction",
    "instruction_prompt": "bakeoff.embedding.instruction",
    "layer_scores": "bakeoff.embedding.baselines",
    "make_bidirectional": "bakeoff.models",
    "mine_hard_negatives": "bakeoff.embedding.hard_negatives",
    "reduce_hidden_states": "bakeoff.embedding.pooling",
    "train_contrastive": "bakeoff.embedding.training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
