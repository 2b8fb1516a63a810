"""Let every token of a decoder see every other one, for a while or for good.

A decoder's causal mask serves generation; a text that is read to be embedded is known in full, so
its early tokens may as well see its late ones. Nothing is assumed from an architecture's name:
before a model is changed for the first time it is probed, and one that keeps hiding later tokens
anywhere is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from bakeoff.errors import ModelError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Architectures (`config.model_type`) that bakeoff's tests cover; others may pass the probe."""

_PROBE_LENGTH = 8
_ABSENT = object()
_VERIFIED: WeakSet[nn.Module] = WeakSet()

AnyModel = TypeVar("AnyModel", bound=nn.Module)


@contextmanager
def bidirectional(model: AnyModel) -> Iterator[AnyModel]:
    """Remove a decoder's causal mask inside a `with` block; padding stays hidden.

    A sliding window stays one, and becomes symmetric: `config.sliding_window` tokens to each side.
    Everything is as before when the block ends, also after an error. Blocks may be nested. Inside,
    a key-value cache is refused: cached keys would not have seen the tokens that came later.

    Parameters
    ----------
    model
        A transformers decoder, with or without its language-model head, or a PEFT model around one.

    Yields
    ------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    ModelError
        If the model is bidirectional already, or a probe shows that some part of it (a recurrence,
        a convolution, linear attention) hides later tokens even without the mask.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    >>> config = LlamaConfig(vocab_size=20, num_attention_heads=2, **sizes)
    >>> model = LlamaModel(config).eval()
    >>> def first_state(last_token):
    ...     with torch.no_grad():
    ...         return model(torch.tensor([[1, 2, last_token]])).last_hidden_state[0, 0]
    >>> bool((first_state(3) == first_state(4)).all())
    True
    >>> with bidirectional(model):
    ...     bool((first_state(3) == first_state(4)).all())
    False

    References
    ----------
    Y. Tang, Y. Yang. "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding
    Models?" arXiv:2409.02727, 2024.
    """
    _verify(model)
    with _without_mask(model):
        yield model


def make_bidirectional(model: AnyModel) -> AnyModel:
    """Remove a decoder's causal mask for good; the change survives saving and loading.

    It is written into the model's configuration (`is_causal: false`), which transformers honours
    when it builds masks, so `from_pretrained` of the saved folder needs neither bakeoff nor code.

    Parameters
    ----------
    model
        As for `bidirectional`. Changed in place; doing so twice is harmless.

    Returns
    -------
    torch.nn.Module
        `model` itself.

    Raises
    ------
    ModelError
        As for `bidirectional`.
    """
    _verify(model)
    for owner, name in _switches(model):
        setattr(owner, name, False)
    module = backbone(model)
    if _refuse_cache not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    return model


def sees_ahead(model: nn.Module) -> bool:
    """Tell by experiment whether any token's state depends on a later token.

    The last token of a short text is replaced and the states before it are compared, once without
    and once with padding after it (libraries take different paths for the two).

    Parameters
    ----------
    model
        A transformers model, with or without a head.

    Returns
    -------
    bool
        True for encoders and for decoders without their causal mask, False for causal decoders.

    Raises
    ------
    ModelError
        If the model cannot be run on token ids alone, or padding changes the answer.
    """
    module = _steered(model)
    answers = {_changes_earlier_states(module, padding) for padding in (0, 2)}
    if len(answers) > 1:
        raise ModelError(
            f"{_describe(model)} hides later tokens or not depending on padding: its states would "
            "depend on the other texts of a batch"
        )
    return answers.pop()


def backbone(model: nn.Module) -> nn.Module:
    """Return the transformers model without its head, from inside whatever wraps it.

    Raises
    ------
    ModelError
        If there is no transformers model inside, or it is an encoder-decoder.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if getattr(module.config, "is_encoder_decoder", False):
                raise ModelError(
                    f"{_describe(module)} is an encoder-decoder, whose halves attend differently: "
                    "load one of them alone (for example its encoder)"
                )
            inner: nn.Module = module.base_model
            return inner
    raise ModelError(f"model: {type(model).__name__} holds no transformers model")


def _steered(model: nn.Module) -> nn.Module:
    """Return the backbone, or the whole model where that tells the backbone what to do.

    Mixtures around a decoder do: by a base that is a model with a head of its own, or by a hook
    that reads the batch. What is inside does not run, or does not run the same, by itself.
    """
    from transformers import PreTrainedModel

    inner = backbone(model)
    outer: nn.Module = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    return outer if inner.base_model is not inner or outer._forward_pre_hooks else inner


def transformer_layers(module: Any) -> nn.ModuleList | None:
    """Return a backbone's stack of layers, or None where it is not kept as one list."""
    wanted = module.config.get_text_config().num_hidden_layers
    for candidate in module.modules():
        # Parents come first: a layer's own lists (experts, say) are never reached before the stack.
        if isinstance(candidate, nn.ModuleList) and len(candidate) == wanted:
            return candidate
    return None


def _switches(model: nn.Module) -> list[tuple[Any, str]]:
    """List every (object, attribute) that has to be False for a model to be bidirectional."""
    from transformers import PreTrainedModel

    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for config in (module.config, module.config.get_text_config()):
                found[id(config), "is_causal"] = (config, "is_causal")
                if hasattr(config, "use_cache"):
                    found[id(config), "use_cache"] = (config, "use_cache")
        # Attention kernels that build no mask of their own ask the attention module instead.
        if hasattr(module, "is_causal"):
            found[id(module), "is_causal"] = (module, "is_causal")
    return list(found.values())


@contextmanager
def _without_mask(model: nn.Module) -> Iterator[None]:
    with ExitStack() as undo:
        for owner, name in _switches(model):
            undo.callback(_restore, owner, name, vars(owner).get(name, _ABSENT))
            setattr(owner, name, False)
        hook = backbone(model).register_forward_pre_hook(_refuse_cache, with_kwargs=True)
        undo.callback(hook.remove)
        yield


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _refuse_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ModelError(
            "a bidirectional model takes no key-value cache (past_key_values, use_cache): cached "
            "keys have not seen the tokens after them. Generate with the causal model"
        )


def _verify(model: nn.Module) -> None:
    """Probe a model the first time it is met; raise ModelError if it cannot be bidirectional."""
    if model in _VERIFIED:
        return
    module = backbone(model)
    if getattr(module.config, "is_causal", True) is not False and sees_ahead(module):
        raise ModelError(
            f"{_describe(model)} is bidirectional already (changing the last token changed the "
            "states before it), so there is no causal mask to remove: use it as it is"
        )
    with _without_mask(module):
        blind = _blind_parts(module)
    if blind:
        raise ModelError(
            f"{_describe(model)} cannot be made bidirectional: without the causal mask, a change "
            f"of the last token still did not reach the tokens before it in {blind}. Architectures "
            f"known to work: {', '.join(SUPPORTED)}"
        )
    _VERIFIED.add(model)


def _blind_parts(module: nn.Module) -> str:
    """Name what still hides later tokens; an empty string means nothing does."""
    if not sees_ahead(module):
        return "the whole model"
    # A model that mixes attention with recurrent or convolutional layers passes as a whole, yet
    # half of it reads left to right only: look at every layer by itself.
    layers = transformer_layers(module)
    if layers is None:
        return "(its stack of layers was not found, so they could not be looked at one by one)"
    blind: list[str] = []

    def look(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        changed = states.clone()
        changed[:, -1] += torch.linspace(-1, 1, states.shape[-1]).to(states) * (1 + states.std())
        # forward() itself, because calling the layer would come back to this hook.
        if args:
            again = layer.forward(changed, *args[1:], **kwargs)
        else:
            again = layer.forward(**{**kwargs, "hidden_states": changed})
        before, after = (x[0] if isinstance(x, tuple) else x for x in (output, again))
        if not _differ(before, after):
            blind.append(f"{number[layer]} ({type(layer).__name__})")

    number = {layer: str(index) for index, layer in enumerate(layers)}
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(look, with_kwargs=True).remove)
        _probe_states(module, replace_last=False, padding=0)
    return f"layers {', '.join(blind)}" if blind else ""


def _changes_earlier_states(module: nn.Module, padding: int) -> bool:
    return _differ(
        _probe_states(module, replace_last=False, padding=padding),
        _probe_states(module, replace_last=True, padding=padding),
    )


def _differ(states: torch.Tensor, others: torch.Tensor) -> bool:
    """Tell whether states of equally long texts differ anywhere before the last real token."""
    a, b = (x[:, : _PROBE_LENGTH - 1].float() for x in (states, others))
    # Both runs have one shape, so what does not depend on the last token comes out the same, up to
    # the order of a few sums (experts get other batches of tokens, for example).
    tolerance = min(32 * torch.finfo(states.dtype).eps, 1e-3)
    scale = a.abs().amax(-1).clamp_min(1e-6)
    return bool(((a - b).abs().amax(-1) / scale).max() > tolerance)


def _probe_states(module: nn.Module, *, replace_last: bool, padding: int) -> torch.Tensor:
    embeddings = module.get_input_embeddings()  # type: ignore[operator]
    n_ids = embeddings.num_embeddings
    ids = (torch.arange(_PROBE_LENGTH + padding, device=embeddings.weight.device) + 3) % n_ids
    mask = torch.ones_like(ids)
    mask[_PROBE_LENGTH:] = 0
    if replace_last:
        ids[_PROBE_LENGTH - 1] = (ids[_PROBE_LENGTH - 1] + n_ids // 2) % n_ids
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:  # dropout would change every state from run to run
            part.training = False
        given = {"input_ids": ids[None], "attention_mask": mask[None] if padding else None}
        with torch.no_grad():
            if module.base_model is module:
                states: torch.Tensor = module(**given).last_hidden_state
            else:  # it has a head
                states = module(**given, output_hidden_states=True).hidden_states[-1]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{_describe(module)} cannot be probed with token ids alone: {error}"
        ) from error
    finally:
        for part in training:
            part.training = True
    return states


def _describe(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    return f"model: {type(model).__name__} (architecture {kind!r})"
