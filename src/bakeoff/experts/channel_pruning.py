"""Cut inner channels out of a decoder's feed-forward layers for good: a narrower dense decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.read_me import _feed_forwards


@torch.no_grad()
def prune_channels(model: PreTrainedModel, kept: Sequence[Tensor]) -> None:
    """Remove all but some inner channels of every gated feed-forward layer, in place.

    What is left computes what the whole model does with the other channels set to zero, is saved by
    ``save_pretrained`` and loads with transformers alone.

    Parameters
    ----------
    model
        A decoder of transformers with gated feed-forward layers.
    kept
        For each layer ``(D,)`` bool, the channels to keep; as many in every layer, since the
        configuration states one number.

    Raises
    ------
    bakeoff.errors.DataError
        If a mask does not fit its layer, or layers would differ in width.
    bakeoff.errors.ModelError
        If a layer has no gated feed-forward module, or the configuration does not state their
        width, so that the result could not be loaded.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes))
    >>> prune_channels(model, [torch.arange(8) < 3] * 2)
    >>> model.config.intermediate_size, model.model.layers[0].mlp.down_proj.weight.shape
    (3, torch.Size([16, 3]))
    """
    parts = _feed_forwards(model)
    if len(kept) != len(parts):
        raise DataError(f"kept is for {len(kept)} layers, the model has {len(parts)}")
    for number, (mask, part) in enumerate(zip(kept, parts, strict=True)):
        if mask.dtype != torch.bool or mask.shape != (part.channels,):
            raise DataError(
                f"kept of layer {number} must be ({part.channels},) bool, got {tuple(mask.shape)} "
                f"{mask.dtype}"
            )
    widths = sorted({int(mask.sum()) for mask in kept})
    if len(widths) > 1 or widths[0] == 0:
        raise DataError(
            f"kept must leave every layer as many channels, and at least one, got {widths}"
        )
    config = model.config.get_text_config()
    stated = getattr(config, "intermediate_size", None)
    if {part.channels for part in parts} != {stated}:
        raise ModelError(
            f"the configuration of {type(model).__name__} does not state the width of its "
            f"feed-forward layers (intermediate_size={stated}), so that a narrower one could not "
            "be loaded"
        )
    for mask, part in zip(kept, parts, strict=True):
        down = part.down
        chosen = mask.to(down.weight.device)
        for linear in part.projections[:-1]:  # gate and up, or both in one
            rows = chosen.repeat(linear.out_features // part.channels)
            _set(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
        _set(down, down.weight[:, chosen], down.bias)
        if hasattr(part.module, "intermediate_size"):
            part.module.intermediate_size = widths[0]  # type: ignore[assignment]
    config.intermediate_size = widths[0]


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    trained = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.clone(), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=trained)
    linear.out_features, linear.in_features = weight.shape


__all__ = ["prune_channels"]
