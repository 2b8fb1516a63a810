"""Where a response looks: its attention to everything before it, without a square matrix.

The keys and values of the prefix are computed first, in the model's own fast attention; then the
response goes through in blocks of rows with plain attention, and each layer's rows are reduced as
soon as they exist. Memory grows with the length of the text, not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError, ModelError
from bakeoff.models.inference import evaluating

if TYPE_CHECKING:
    from torch import Tensor

Chosen = Literal["all"] | Sequence[int]


def response_attention(
    model: Any,
    prefix: Sequence[int],
    response: Sequence[int],
    *,
    layers: Chosen = "all",
    heads: Chosen = "all",
    block: int = 64,
) -> NDArray[np.float64]:
    """Return how much attention a response pays to every token of its text, on average.

    The softmax is over all keys that a row may see, as in the model's own forward pass; the mean is
    over the response's rows, the heads and the layers.

    Parameters
    ----------
    model
        A transformers causal language model. Its attention implementation is set to ``"eager"``
        for the response's rows and put back afterwards.
    prefix
        Token ids before the response, at least one.
    response
        Token ids of the response, at least one. Its rows are those in which these tokens are the
        queries, as in the paper, not those that predict them.
    layers, heads
        Which to average over: ``"all"`` or their numbers (negative ones count from the end).
    block
        Rows computed at once. The result does not depend on it beyond rounding (1e-6).

    Returns
    -------
    float64 array of shape (len(prefix) + len(response),)
        Sums to 1. Tokens that a sliding window hides get 0.

    Raises
    ------
    DataError
        If a sequence is empty, or a layer or head does not exist.
    ModelError
        If the model does not give its attention weights.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)).eval()
    >>> attention = response_attention(small, [1, 5, 7, 9], [3, 4])
    >>> attention.shape, round(float(attention.sum()), 5)
    ((6,), 1.0)
    """
    total = np.zeros(len(prefix) + len(response))
    n_layers = 0

    def add(layer: int, first_row: int, first_key: int, weights: Tensor) -> None:
        nonlocal n_layers
        n_layers += first_row == 0
        if heads != "all":
            weights = weights[_numbers(heads, len(weights), "heads")]
        rows = weights.float().mean(dim=0).sum(dim=0).double().cpu().numpy()
        total[first_key : first_key + len(rows)] += rows

    visit_attention_rows(model, prefix, response, add, layers=layers, block=block)
    return total / (len(response) * n_layers)


def visit_attention_rows(
    model: Any,
    prefix: Sequence[int],
    response: Sequence[int],
    visit: Callable[[int, int, int, Tensor], None],
    *,
    layers: Chosen = "all",
    block: int = 64,
) -> None:
    """Compute the response's rows of every layer's attention and hand them over, block by block.

    Parameters
    ----------
    model, prefix, response, layers, block
        As in `response_attention`.
    visit
        Called as ``visit(layer, first_row, first_key, weights)``: `weights` is ``(heads, rows,
        keys)``, its rows are those of the response from `first_row` on, its keys the tokens of the
        text from `first_key` on (0 but for sliding windows). Nothing is kept after the call.

    Raises
    ------
    DataError, ModelError
        As in `response_attention`.
    """
    import torch

    if len(prefix) == 0 or len(response) == 0:
        raise DataError(
            f"prefix and response must have at least one token each, got {len(prefix)} and "
            f"{len(response)}"
        )
    if block < 1:
        raise DataError(f"block must be at least 1, got {block}")
    backbone = getattr(model, "base_model", model)  # without the head: no logits are needed
    attentions = _attention_modules(backbone)
    chosen = _numbers(layers, len(attentions), "layers")
    device = next(model.parameters()).device
    ids = torch.tensor([[*prefix, *response]], dtype=torch.long, device=device)
    n_seen = len(prefix)
    # Plain attention builds rows x keys at once: a model that uses it reads the prefix in blocks.
    whole = getattr(model.config, "_attn_implementation", None) != "eager"
    with torch.inference_mode(), evaluating(model):
        cache = None
        for start in range(0, n_seen, n_seen if whole else block):
            stop = n_seen if whole else min(start + block, n_seen)
            out = backbone(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        if cache is None:
            raise ModelError(f"{type(model).__name__} keeps no cache of keys and values")
        with _eager(model):
            for start in range(n_seen, ids.shape[1], block):
                stop = min(start + block, ids.shape[1])
                hooks = [
                    attentions[layer].register_forward_hook(
                        _handing_over(visit, layer, start - n_seen, stop)
                    )
                    for layer in chosen
                ]
                try:
                    backbone(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
                finally:
                    for hook in hooks:
                        hook.remove()


def _handing_over(
    visit: Callable[[int, int, int, Tensor], None], layer: int, first_row: int, n_keys: int
) -> Callable[..., None]:
    """Return a forward hook that passes one layer's weights on."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or getattr(weights, "ndim", 0) != 4:
            raise ModelError(
                f"{type(module).__name__} returns no attention weights; load the model with "
                'attn_implementation="eager", or use another one'
            )
        visit(layer, first_row, n_keys - weights.shape[-1], weights[0])

    return hook


def _attention_modules(backbone: Any) -> list[Any]:
    """Return the self-attention modules, in the order of their layers."""
    found = [
        module
        for module in backbone.modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
    ]
    if not found:
        raise ModelError(f"{type(backbone).__name__} has no attention layers that can be read")
    return sorted(found, key=lambda module: int(module.layer_idx))


def _numbers(chosen: Chosen, n: int, name: str) -> list[int]:
    """Return the chosen layers or heads as numbers from 0 to n - 1."""
    if isinstance(chosen, str):
        if chosen != "all":
            raise DataError(f'{name} must be "all" or a list of numbers, got {chosen!r}')
        return list(range(n))
    numbers = [int(number) for number in chosen]
    outside = [number for number in numbers if not -n <= number < n]
    if outside or not numbers:
        raise DataError(
            f"{name} must be one or more numbers from {-n} to {n - 1}, got "
            f"{outside[0] if outside else 'none'}"
        )
    return sorted({number % n for number in numbers})


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Use the attention that returns its weights, and put back the one that was set."""
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        model.set_attn_implementation("eager")
        if model.config._attn_implementation != "eager":
            raise ModelError(
                f"{type(model).__name__} cannot switch its attention from {before!r} to 'eager'; "
                'load it with attn_implementation="eager"'
            )
        yield
    finally:
        model.set_attn_implementation(before)
