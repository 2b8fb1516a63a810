"""What all pooling heads share: masked reductions, input checks, and life as a saved module."""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn

from bakeoff.embedding.protocol import Reads

TokenReduce = Literal["mean", "last"]


def mean_over_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the real tokens' states.

    Parameters
    ----------
    states
        ``(B, T, d)``, floating point.
    mask
        ``(B, T)``, True or non-zero at real tokens; every row has at least one.

    Returns
    -------
    Tensor
        ``(B, d)`` in the dtype of `states`; sums run in float32 at least. Whatever stands at
        padding, NaN included, changes nothing.
    """
    return _weighted_mean(states, mask.bool(), mask.bool().to(_accumulation_dtype(states)))


def position_weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the real tokens' states, the i-th real token with weight i (from 1).

    Arguments and result are those of `mean_over_tokens`.
    """
    rank = mask.bool().cumsum(dim=1)
    return _weighted_mean(states, mask.bool(), rank.to(_accumulation_dtype(states)))


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return the state at each row's last real token, on whichever side the padding is.

    Arguments and result are those of `mean_over_tokens`.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, 0).amax(dim=1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def reduce_hidden_states(hidden_states: Iterable[Tensor], mask: Tensor, reads: Reads) -> Tensor:
    """Reduce the hidden states of a backbone to what a pooling head reads.

    Parameters
    ----------
    hidden_states
        Per layer ``(B, T, d)``, e.g. the ``hidden_states`` of a transformers model.
    mask
        ``(B, T)``, non-zero at real tokens.
    reads
        The head's `reads`.

    Returns
    -------
    Tensor
        ``(B, n_layers, d)`` for ``"layer_means"`` and ``"layer_lasts"``; the last layer's states
        ``(B, T, d)`` for ``"tokens"``.

    Examples
    --------
    >>> layers = [torch.full((2, 3, 4), float(layer)) for layer in range(5)]
    >>> reduce_hidden_states(layers, torch.ones(2, 3), "layer_means")[0, :, 0]
    tensor([0., 1., 2., 3., 4.])
    """
    if reads == "tokens":
        *_, last_layer = hidden_states
        return last_layer
    over_tokens = {"layer_means": mean_over_tokens, "layer_lasts": last_token}[reads]
    return torch.stack([over_tokens(states, mask) for states in hidden_states], dim=1)


def attention_mask_from_ids(
    input_ids: Tensor, pad_token_id: int, eos_token_id: int | None = None
) -> Tensor:
    """Guess an attention mask from token ids, for inputs that came without one.

    Prefer the mask that the tokenizer returns. Where the padding token is also the end-of-sequence
    token, a guess cannot tell a text's own last token from padding and drops it, which changes
    every pooled vector; this function then warns.

    Parameters
    ----------
    input_ids
        ``(B, T)``, int64.
    pad_token_id, eos_token_id
        As in the tokenizer.

    Returns
    -------
    Tensor
        ``(B, T)``, int64: 1 where the id is not `pad_token_id`.
    """
    if pad_token_id == eos_token_id:
        warnings.warn(
            f"pad_token_id and eos_token_id are both {pad_token_id}: a mask guessed from input_ids "
            "drops the real end-of-sequence tokens. Pass the tokenizer's attention_mask instead.",
            stacklevel=2,
        )
    return (input_ids != pad_token_id).long()


class PoolingModule(Module):  # type: ignore[misc]  # sentence-transformers is untyped
    """Base class of the pooling heads: hidden states in, one vector per text out.

    A head is a plain `torch.nn.Module`, called as ``head(hidden_states, attention_mask)``, and a
    module of sentence-transformers, called as ``head(features)``. Both are the same two steps:
    `reduce_hidden_states`, then `pool`. To train on a frozen backbone, cache the first step's
    result and call `pool` alone.

    Subclasses set `reads`, write `_pool`, and keep every constructor argument as an attribute of
    the same name, which is what `save` writes.

    Parameters
    ----------
    hidden_size
        Width d of the backbone's hidden states.
    normalize
        Whether embeddings are scaled to unit Euclidean length.
    include_prompt
        Whether the tokens of a prompt (an instruction before the text) are pooled too. If False,
        the backbone still attends to them. Takes effect in `sentence_transformers`, where
        ``encode(..., prompt=...)`` says how long the prompt is.
    """

    reads: Reads = "tokens"
    all_layers = False
    """Whether `pool` looks at other layers than the last one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What sentence-transformers writes to config.json: the constructor's arguments.
        cls.config_keys = list(inspect.signature(cls).parameters)

    def __init__(
        self, hidden_size: int, *, normalize: bool = True, include_prompt: bool = True
    ) -> None:
        super().__init__()
        self.hidden_size = positive_int("hidden_size", hidden_size)
        self.normalize = normalize
        self.include_prompt = include_prompt

    @abstractmethod
    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return ``(B, d_out)``, not normalised. `mask` is boolean and all True without tokens."""

    def pool(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings of states that are already reduced as `reads` says.

        Parameters
        ----------
        states
            ``(B, L + 1, d)`` for a head that reads layers, ``(B, T, d)`` for one that reads tokens.
        mask
            ``(B, T)``, non-zero at the tokens to pool; None means all. Heads that read layers do
            not look at it: their reduction has used it.

        Returns
        -------
        Tensor
            ``(B, d_out)``.

        Raises
        ------
        ValueError
            If a width is not `hidden_size`, a number of layers is wrong, a mask has another shape
            than the tokens, or a row of the mask is all zero.
        """
        self._check_width(states)
        if self.reads == "tokens":
            mask = checked_mask(mask, states)
        else:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        parameter = next(self.parameters(), None)
        if parameter is not None:
            states = states.to(parameter.dtype)
        vectors = self._pool(states, mask)
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def forward(self, hidden_states: Any, attention_mask: Tensor | None = None) -> Any:
        """Return the embeddings of a batch of hidden states.

        Parameters
        ----------
        hidden_states
            One of

            - a sequence of ``(B, T, d)``, one per layer, as transformers returns them with
              ``output_hidden_states=True`` (the embedding output first);
            - the same stacked, ``(B, n_layers, T, d)``;
            - the last layer alone, ``(B, T, d)``, for heads that need no other;
            - the features dictionary of sentence-transformers.
        attention_mask
            ``(B, T)``, non-zero at the tokens to pool; None means all.

        Returns
        -------
        Tensor or dict
            ``(B, d_out)``; for a features dictionary, that dictionary with the embeddings under
            ``"sentence_embedding"``.

        Raises
        ------
        ValueError
            As `pool`, and if a head that needs all layers is given the last one only.
        """
        if isinstance(hidden_states, Mapping):
            return self._forward_features(hidden_states)
        layers = self._as_layers(hidden_states)
        for layer in layers:
            self._check_width(layer)
        mask = checked_mask(attention_mask, layers[-1])
        return self.pool(reduce_hidden_states(layers, mask, self.reads), mask)

    def _as_layers(self, states: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the layers that this head needs, each ``(B, T, d)``."""
        if isinstance(states, Tensor):
            if states.dim() == 3:
                states = (states,)
                if self.all_layers:
                    raise ValueError(
                        f"{type(self).__name__} needs the hidden states of all layers, got one "
                        f"tensor {tuple(states[0].shape)}: run the backbone with "
                        "output_hidden_states=True and pass its hidden_states"
                    )
            elif states.dim() == 4:
                states = states.unbind(dim=1)
            else:
                raise ValueError(
                    "hidden states must be (B, T, d), (B, n_layers, T, d) or one (B, T, d) per "
                    f"layer, got shape {tuple(states.shape)}"
                )
        if states is None or len(states) == 0:
            raise ValueError(
                "hidden states are missing: run the backbone with output_hidden_states=True"
            )
        return states if self.all_layers else states[-1:]

    def _forward_features(self, features: Any) -> Any:
        if "cu_seq_lens_q" in features:
            raise ValueError(
                f"{type(self).__name__} reads padded batches; load the Transformer with "
                'model_kwargs={"attn_implementation": "sdpa"} instead of flash attention'
            )
        if self.all_layers:
            layers = features.get("all_layer_embeddings")
            if layers is None:
                raise ValueError(
                    f"{type(self).__name__} needs features['all_layer_embeddings']: set "
                    "output_hidden_states=True in the configuration of the Transformer module"
                )
        else:
            layers = (features["token_embeddings"],)
        features["sentence_embedding"] = self(layers, self._mask_from(features, layers[-1]))
        return features

    def _mask_from(self, features: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
        if "pool_mask" in features:
            return torch.as_tensor(features["pool_mask"])
        mask: Tensor | None = features.get("attention_mask")
        if self.include_prompt or "prompt_length" not in features:
            return mask
        mask = checked_mask(mask, tokens)
        # An int when encoding, a tensor of equal entries when training.
        prompt_length = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
        # Counting real tokens, not positions, is right for padding on either side.
        return mask & (mask.cumsum(dim=1) > prompt_length)

    def _check_width(self, states: Tensor) -> None:
        if states.dim() != 3 or states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__} takes states (B, n, hidden_size={self.hidden_size}), "
                f"got shape {tuple(states.shape)}"
            )

    def on_model_ready(self, model: Any) -> None:
        """Ask the backbone for all layers if this head needs them.

        sentence-transformers calls this when a model is put together, and writes the setting to
        the saved folder.
        """
        if self.all_layers:
            model[0].model.config.output_hidden_states = True

    def get_embedding_dimension(self) -> int:
        """Return the width of the embeddings."""
        return self.hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json`` and, if there are parameters, ``model.safetensors``."""
        self.save_config(output_path)
        if weights := {name: value.contiguous() for name, value in self.state_dict().items()}:
            save_file(weights, str(Path(output_path) / "model.safetensors"))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read a head that `save` wrote, from a folder or the hub. Only safetensors are read."""
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        head = cls(**cls.load_config(model_name_or_path, **where))
        if head.state_dict():
            path = cls.load_file_path(model_name_or_path, "model.safetensors", **where)
            if path is None:
                raise ValueError(f"no model.safetensors in {model_name_or_path}/{subfolder}")
            head.load_state_dict(load_file(path))
        return head

    def extra_repr(self) -> str:
        """Return the configuration, for `print(head)`."""
        return ", ".join(f"{key}={value!r}" for key, value in self.get_config_dict().items())


class LayerwisePooling(PoolingModule):
    """Base class of heads that combine one vector per layer, for layers 1 to L.

    The embedding output (layer 0) is not used, as in the multi-layer pooling of Tang and Yang.
    Subclasses write `_combine`.

    Parameters
    ----------
    hidden_size, normalize, include_prompt
        As in `PoolingModule`.
    num_layers
        Number L of layers of the backbone, ``config.num_hidden_layers``; the backbone then returns
        L + 1 hidden states.
    token_reduce
        How the tokens of one layer become one vector: ``"mean"`` over real tokens, or the
        ``"last"`` real token.
    """

    all_layers = True

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        *,
        normalize: bool = True,
        token_reduce: TokenReduce = "mean",
        include_prompt: bool = True,
    ) -> None:
        super().__init__(hidden_size, normalize=normalize, include_prompt=include_prompt)
        self.num_layers = positive_int("num_layers", num_layers)
        self.token_reduce = one_of("token_reduce", token_reduce, ("mean", "last"))
        self.reads = "layer_means" if token_reduce == "mean" else "layer_lasts"

    @abstractmethod
    def _combine(self, layers: Tensor) -> Tensor:
        """Return ``(B, d_out)`` of the layers' vectors ``(B, L, d)``."""

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if states.shape[1] != self.num_layers + 1:
            raise ValueError(
                f"num_layers={self.num_layers} needs {self.num_layers + 1} hidden states (the "
                f"embedding output and one per layer), got {states.shape[1]}"
            )
        return self._combine(states[:, 1:])

    def _as_layers(self, states: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        layers = super()._as_layers(states)
        if isinstance(states, Tensor) and len(layers) == self.num_layers:
            # A stack (B, L, T, d) without the embedding output, which `_pool` would drop anyway.
            layers = (torch.zeros_like(layers[0]), *layers)
        return layers


def checked_mask(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return `mask` as bool, or all True for None; raise ValueError if it cannot be pooled with.

    It must be ``(B, T)`` as the first axes of `tokens` and have a non-zero entry in every row.
    """
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the states have (B, T) = "
            f"{tuple(tokens.shape[:2])}"
        )
    mask = mask.to(tokens.device).bool()
    # Looking into the mask would break tracing, where values do not exist yet.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined, no-untyped-call]
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask is all zero in rows {empty}: nothing to pool there")
    return mask


def positive_int(name: str, value: int) -> int:
    """Return `value` if it is a whole number above 0, else raise ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def one_of(name: str, value: str, accepted: Sequence[str]) -> str:
    """Return `value` if it is accepted, else raise ValueError naming the argument."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {list(accepted)}, got {value!r}")
    return value


def _weighted_mean(states: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    weights = weights * mask
    # masked_fill and not a product with 0: padding may hold anything, NaN included.
    real = states.to(weights.dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
    total = (real * weights.unsqueeze(-1)).sum(dim=1)
    return (total / weights.sum(dim=1, keepdim=True)).to(states.dtype)


def _accumulation_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
