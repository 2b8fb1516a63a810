"""The pooling heads by the names that designs use, with what each may be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from bakeoff.embedding.pooling import PoolingModule
    from bakeoff.models import BaseModel


@dataclass(frozen=True)
class HeadKind:
    """One method that designs can name: how its head is made and whether it is trained."""

    version: str
    trained: bool
    parameters: tuple[str, ...]
    build: Callable[..., PoolingModule]


def _baseline(name: str) -> Callable[..., PoolingModule]:
    def build(base: BaseModel, attention: str) -> PoolingModule:
        from bakeoff.embedding import baselines

        head: PoolingModule = getattr(baselines, name)(base.hidden_size)
        return head

    return build


def _layerwise(name: str) -> Callable[..., PoolingModule]:
    def build(base: BaseModel, attention: str, token_reduce: str = "mean") -> PoolingModule:
        from bakeoff.embedding import baselines

        head: PoolingModule = getattr(baselines, name)(
            base.hidden_size, base.num_layers, token_reduce=token_reduce
        )
        return head

    return build


def _single_layer(base: BaseModel, attention: str, layer: int) -> PoolingModule:
    from bakeoff.embedding.baselines import SingleLayerMeanPooling

    return SingleLayerMeanPooling(base.hidden_size, layer)


def _last_layer(base: BaseModel, attention: str, **sizes: Any) -> PoolingModule:
    from bakeoff.embedding.trainable_pooling import LastLayerPooling

    # Designs 2 and 4 of the paper: under a causal mask only the last token has seen the text.
    reduce: Literal["last", "none"] = "last" if attention == "causal" else "none"
    return LastLayerPooling(base.hidden_size, **sizes, token_reduce=reduce)


def _multi_layer(base: BaseModel, attention: str, **sizes: Any) -> PoolingModule:
    from bakeoff.embedding.trainable_pooling import MultiLayerPooling

    # Designs 3 and 5 of the paper.
    reduce: Literal["last", "mean"] = "last" if attention == "causal" else "mean"
    return MultiLayerPooling(base.hidden_size, base.num_layers, **sizes, token_reduce=reduce)


def _latent_attention(base: BaseModel, attention: str, **sizes: Any) -> PoolingModule:
    from bakeoff.embedding.latent_attention import LatentAttentionPooling

    return LatentAttentionPooling(base.hidden_size, **sizes)


def _residual_mlp(base: BaseModel, attention: str, **sizes: Any) -> PoolingModule:
    from bakeoff.embedding.baselines import ResidualMLPPooling

    return ResidualMLPPooling(base.hidden_size, **sizes)


_SIZES = ("num_latents", "num_heads", "head_dim")
HEADS: dict[str, HeadKind] = {
    "last-token": HeadKind("1", False, (), _baseline("LastTokenPooling")),
    "mean": HeadKind("2", False, (), _baseline("MeanPooling")),
    "position-weighted-mean": HeadKind("1", False, (), _baseline("PositionWeightedMeanPooling")),
    "best-layer": HeadKind("2", False, ("layer",), _single_layer),
    "scalar-mix": HeadKind("1", True, ("token_reduce",), _layerwise("ScalarMixPooling")),
    "concat-linear": HeadKind("1", True, ("token_reduce",), _layerwise("ConcatLinearPooling")),
    "residual-mlp": HeadKind("1", True, _SIZES, _residual_mlp),
    "last-layer-pooling": HeadKind("1", True, _SIZES, _last_layer),
    "multi-layer-pooling": HeadKind("1", True, _SIZES, _multi_layer),
    "latent-attention": HeadKind("1", True, _SIZES, _latent_attention),
}
"""Methods by the name that designs use. Raise a version when results of old trials become wrong."""


def head_kind(method: str) -> HeadKind:
    """Return the kind of head that a method names; raise `DataError` if there is none."""
    if method not in HEADS:
        raise DataError(f"no embedding method {method!r}; there are: {', '.join(HEADS)}")
    return HEADS[method]
