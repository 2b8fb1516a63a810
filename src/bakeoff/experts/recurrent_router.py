"""Layerwise recurrent router: a small recurrent cell carries each token's routing through depth."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import check_finite, top_k

METHOD = {
    "slug": "recurrent-router",
    "title": "Layerwise recurrent router",
    "paper": 'Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", ICLR 2025, '
    "arXiv 2408.06793",
    "designs": ["recurrent"],
    "names": [
        "RecurrentRouter",
        "convert_router",
        "load_recurrent",
        "routing_mutual_information",
    ],
}

CELLS = {"gru": 3, "rnn": 1, "lstm": 4}
"""Recurrent cells, and how many gates' weights each stacks."""

GATES = ("linear", "cosine")

# Attribute of a model's configuration that holds the settings.
_CONFIG_KEY = "recurrent_router"


class RecurrentCell(nn.Module):
    """One step of a GRU, a tanh network or an LSTM, with the parameter names of torch's cells.

    Parameters
    ----------
    size
        p, of input and state.
    kind
        ``"gru"``, ``"rnn"`` or ``"lstm"``; `torch.nn.GRUCell`, ``RNNCell`` and ``LSTMCell`` hold
        the same ``state_dict``.
    """

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.size, self.kind = size, kind
        rows = CELLS[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, size))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))

    @property
    def state_width(self) -> int:
        """Numbers per token in the state: p, or 2 p for the LSTM."""
        return 2 * self.size if self.kind == "lstm" else self.size

    def forward(self, value: Tensor, state: Tensor) -> Tensor:
        """Return the next state, ``(T, state_width)``; its first p columns are the output."""
        parts = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        weights = tuple(each.to(value.dtype) for each in parts)
        if self.kind == "gru":
            return torch.gru_cell(value, state, *weights)
        if self.kind == "rnn":
            return torch.rnn_tanh_cell(value, state, *weights)
        return torch.cat(torch.lstm_cell(value, state.chunk(2, dim=1), *weights), dim=1)


class RecurrentRouter(nn.Module):
    """Routers of all layers, joined by a recurrent state that each token carries through depth.

    In layer i, ``h_i = GRU(W_i x_i, h_{i-1})`` with ``h_0 = 0`` and ``logits = G_i h_i``. The cell
    is shared by all layers, projection W and gate G are each layer's own. The recurrence runs over
    layers, never over time: all tokens go in parallel, and a KV cache needs nothing more.

    Parameters
    ----------
    hidden_size
        h, features of a token.
    num_experts
        N, per layer.
    top_k
        K, experts per token.
    num_layers
        L, layers that have experts.
    state_size
        p. 0 or None for a plain linear router in each layer, ``logits = G_i x_i``.
    cell
        ``"gru"``, ``"rnn"`` (tanh) or ``"lstm"``.
    pass_state
        Hand the state on. False gives each layer the same function of its own input alone, with
        the same parameters: the control. (With ``cell="rnn"`` that is a perceptron.)
    detach
        Let no gradient through what is handed on.
    residual
        a: add a times the previous layer's gate scores to this one's.
    shared_projection
        One W for all layers.
    gate
        ``"linear"``, or ``"cosine"``: cosines of a further projection with expert embeddings, with
        a learnable scale (X-MoE).
    cosine_size
        Width of that projection.
    renormalize
        `route` divides the K weights by their sum.
    init_std
        Weights start as Normal(0, init_std), biases at zero.
    generator
        For the initial weights, on the CPU; None for torch's own.

    Raises
    ------
    bakeoff.errors.DataError
        If a setting is impossible, such as a `top_k` above `num_experts`.

    Notes
    -----
    Everything is computed in float32 (float64 for float64 tokens), whatever the dtype of tokens
    and weights. Departures from the released code: it starts biases as it does weights; it cannot
    have dense layers before the first mixture; its state size is 256 by default, the paper's 128.
    The paper prints one matrix for the input and the state of the cell, the code has two and
    biases, as here. With `residual`, "scores" are taken to be the logits before the softmax, and
    the sum is not handed on, only each layer's own.

    References
    ----------
    Zihan Qiu, Zeyu Huang, Shuang Cheng, Yizhi Zhou, Zili Wang, Ivan Titov and Jie Fu. "Layerwise
    Recurrent Router for Mixture-of-Experts". ICLR 2025. arXiv:2408.06793.

    Examples
    --------
    >>> router = RecurrentRouter(hidden_size=16, num_experts=4, top_k=2, num_layers=3, state_size=8)
    >>> x, state = torch.randn(10, 16), None
    >>> for layer in range(3):
    ...     logits, state = router(x, state, layer)
    >>> logits.shape, state.shape
    (torch.Size([10, 4]), torch.Size([10, 8]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_layers: int,
        state_size: int | None = 128,
        cell: Literal["gru", "rnn", "lstm"] = "gru",
        pass_state: bool = True,
        detach: bool = False,
        *,
        residual: float = 0.0,
        shared_projection: bool = False,
        gate: Literal["linear", "cosine"] = "linear",
        cosine_size: int = 16,
        renormalize: bool = True,
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "num_layers": num_layers}
        for name, value in (*sizes.items(), ("cosine_size", cosine_size)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        if not 1 <= top_k <= num_experts:
            raise DataError(f"top_k must be from 1 to num_experts={num_experts}, got {top_k}")
        if state_size is not None and state_size < 0:
            raise DataError(f"state_size must be at least 0, got {state_size}")
        if cell not in CELLS:
            raise DataError(f"unknown cell {cell!r}; there are: {', '.join(CELLS)}")
        if gate not in GATES:
            raise DataError(f"unknown gate {gate!r}; there are: {', '.join(GATES)}")
        if not math.isfinite(residual) or not (math.isfinite(init_std) and init_std >= 0):
            raise DataError(
                "residual must be finite and init_std finite and at least 0, got "
                f"{residual} and {init_std}"
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.num_layers, self.state_size = num_layers, state_size or 0
        self.pass_state = bool(pass_state) and self.state_size > 0
        self.detach, self.residual = detach, residual
        self.gate_kind, self.renormalize = gate, renormalize
        self.shared_projection = shared_projection
        self.cell_kind, self.cosine_size, self.init_std = cell, cosine_size, init_std
        features = self.state_size or hidden_size
        if self.state_size:
            n_projections = 1 if shared_projection else num_layers
            self.projections = _matrices(n_projections, self.state_size, hidden_size)
            self.cell = RecurrentCell(self.state_size, cell)
        if gate == "cosine":
            self.cosine_projections = _matrices(num_layers, cosine_size, features)
            self.scales = nn.Parameter(torch.full((num_layers,), -math.log(0.3)))
            features = cosine_size
        self.gates = _matrices(num_layers, num_experts, features)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not parameter.is_meta:
                # Expert embeddings are compared by direction: only their spread matters.
                std = 1.0 if gate == "cosine" and name.startswith("gates") else init_std
                with torch.no_grad():
                    parameter.normal_(std=std, generator=generator)

    @property
    def state_width(self) -> int:
        """Numbers per token in what is handed on; 0 if nothing is."""
        width = self.cell.state_width if self.pass_state else 0
        return width + (self.num_experts if self.residual else 0)

    def forward(
        self, x: Tensor, state: Tensor | None = None, layer_idx: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return a layer's logits, and what the next layer is to be given.

        Parameters
        ----------
        x
            ``(T, hidden_size)`` what this layer's experts read, of any floating dtype.
        state
            What the layer before returned; None in the first. Rows are the same tokens in the same
            order as those of `x`.
        layer_idx
            From 0, counting the layers that have experts.

        Returns
        -------
        logits : Tensor
            ``(T, num_experts)`` float32.
        state : Tensor or None
            ``(T, state_width)`` float32; None if nothing is handed on.

        Raises
        ------
        bakeoff.errors.DataError
            If shapes or dtypes are others, `layer_idx` is out of range, or a state is given to the
            first layer or where none is handed on.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise DataError(
                f"layer_idx must be from 0 to {self.num_layers - 1}, got {layer_idx} (it counts "
                "the layers that have experts)"
            )
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise DataError(f"x must be (tokens, {self.hidden_size}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise DataError(f"x must be of a floating dtype, got {x.dtype}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._check_state(state, len(x), dtype, layer_idx)
        with torch.autocast(x.device.type, enabled=False):
            return self._step(x.to(dtype), state, layer_idx)

    def _check_state(
        self, state: Tensor | None, n_tokens: int, dtype: torch.dtype, layer_idx: int
    ) -> None:
        if state is None:
            return
        if not self.state_width:
            raise DataError(
                f"a state is given, but pass_state={self.pass_state} and state_size="
                f"{self.state_size}: nothing is handed from layer to layer"
            )
        if layer_idx == 0:
            raise DataError(
                "a state is given to layer 0: each token starts anew in the first layer, also "
                "when decoding with a cache (the recurrence runs over layers, not over time)"
            )
        if state.shape != (n_tokens, self.state_width):
            raise DataError(
                f"state must be (tokens, {self.state_width}) = ({n_tokens}, {self.state_width}), "
                f"got {tuple(state.shape)}"
            )
        if state.dtype != dtype:
            raise DataError(f"state must be {dtype}, as it was returned, got {state.dtype}")

    def _step(self, x: Tensor, state: Tensor | None, i: int) -> tuple[Tensor, Tensor | None]:
        if state is not None and self.detach:
            state = state.detach()
        width = self.cell.state_width if self.pass_state else 0
        features, handed_on = x, []
        if self.state_size:
            weight = self.projections[0 if self.shared_projection else i]
            projected = F.linear(x, weight.to(x.dtype))
            if state is not None and width:
                before = state[:, :width]
            else:
                before = projected.new_zeros(len(x), self.cell.state_width)
            after = self.cell(projected, before)
            features = after[:, : self.state_size]
            if self.pass_state:
                handed_on.append(after)
        scores = own = self._gate(features, i)
        if self.residual:
            if state is not None:
                scores = own + self.residual * state[:, width:]
            handed_on.append(own)
        if not handed_on:
            return scores, None
        return scores, torch.cat(handed_on, dim=1) if len(handed_on) > 1 else handed_on[0]

    def _gate(self, features: Tensor, i: int) -> Tensor:
        weight = self.gates[i].to(features.dtype)
        if self.gate_kind == "linear":
            return F.linear(features, weight)
        projected = F.linear(features, self.cosine_projections[i].to(features.dtype))
        scale = self.scales[i].to(features.dtype).clamp(max=math.log(100.0)).exp()
        return scale * F.linear(F.normalize(projected, dim=1), F.normalize(weight, dim=1))

    def route(
        self,
        x: Tensor,
        state: Tensor | None = None,
        layer_idx: int = 0,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Routing, Tensor | None]:
        """Return the routing of a layer, and what the next layer is to be given.

        Parameters
        ----------
        x, state, layer_idx
            As in `forward`.
        mask
            ``(T,)`` bool, False at padding, which goes nowhere and may hold anything.

        Raises
        ------
        bakeoff.errors.DataError
            As in `forward`; and if a logit is not finite (on a GPU, an error of the device).
        """
        if mask is not None:
            if mask.shape != (len(x),) or mask.dtype != torch.bool:
                raise DataError(
                    f"mask must be ({len(x)},) bool, got {tuple(mask.shape)} {mask.dtype}"
                )
            x = x.masked_fill(~mask[:, None], 0.0)
        logits, state = self(x, state, layer_idx)
        check_finite(logits)
        probs, weights, indices = self.choose(logits)
        if mask is not None:
            indices = indices.masked_fill(~mask[:, None], -1)
            weights = weights.masked_fill(~mask[:, None], 0.0)
        return Routing(logits, probs, indices, weights), state

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities ``(T, N)``, and weights and indices ``(T, K)`` of the experts taken.

        Of equal logits the lowest index wins.
        """
        probs = logits.softmax(dim=1)
        # Not of the probabilities, which round different logits to the same number.
        indices = top_k(logits, self.top_k)
        weights = probs.gather(1, indices)
        if self.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return probs, weights, indices

    def layers(self) -> list[LayerRouter]:
        """Return one router per layer, each of the family's protocol, with the state between them.

        For models that call their layers in order, once per forward pass.

        Examples
        --------
        >>> first, second = RecurrentRouter(16, 4, top_k=2, num_layers=2, state_size=8).layers()
        >>> hidden = torch.randn(5, 16)
        >>> first(hidden).indices.shape, second(hidden).indices.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
        """
        depth = _Depth(self.num_layers)
        return [LayerRouter(self, depth, i) for i in range(self.num_layers)]

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-able, without the generator."""
        return {
            "hidden_size": self.hidden_size,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_layers": self.num_layers,
            "state_size": self.state_size,
            "cell": self.cell_kind,
            "pass_state": self.pass_state,
            "detach": self.detach,
            "residual": self.residual,
            "shared_projection": self.shared_projection,
            "gate": self.gate_kind,
            "cosine_size": self.cosine_size,
            "renormalize": self.renormalize,
            "init_std": self.init_std,
        }

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"num_layers={self.num_layers}, state_size={self.state_size}, "
            f"pass_state={self.pass_state}"
        )


class _Depth:
    """Where in its layers a forward pass is, and the state on its way to the next layer."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.position = 0
        self.state: Tensor | None = None

    def enter(self, layer: int) -> Tensor | None:
        if layer == 0:
            self.position, self.state = 0, None
        if layer != self.position:
            raise ModelError(
                f"the router of layer {layer} ran out of turn, {self.position} was next: its "
                "state of the layer before is not at hand. Decoder layers must run once each, in "
                "order. To save memory use model.gradient_checkpointing_enable(), or the Trainer's "
                "option, not another wrapper that recomputes layers (FSDP's)"
            )
        state, self.state = self.state, None
        return state

    def leave(self, layer: int, state: Tensor | None) -> None:
        self.position = layer + 1
        self.state = None if self.position == self.n_layers else state

    def __deepcopy__(self, memo: dict[int, Any]) -> _Depth:
        memo[id(self)] = twin = _Depth(self.n_layers)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _Depth, (self.n_layers,)


class LayerRouter(nn.Module):
    """One layer of a `RecurrentRouter`; see `RecurrentRouter.layers`.

    Attributes
    ----------
    n_experts, k : int
        Experts, and experts per token.
    """

    name = "recurrent"
    is_causal = True

    def __init__(self, router: RecurrentRouter, depth: _Depth, layer: int) -> None:
        super().__init__()
        self.router, self.layer = router, layer
        self._depth = depth
        self._link: _Link | None = None  # where the decoder layer brings the state
        self.n_experts, self.k = router.num_experts, router.top_k

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, h)`` states; see `bakeoff.experts.protocol.Router`."""
        link = self._link
        if link is not None:
            before = link.incoming
            routing, link.outgoing = self.router.route(hidden, before, self.layer, mask=mask)
            return routing
        state = self._depth.enter(self.layer)
        routing, state = self.router.route(hidden, state, self.layer, mask=mask)
        self._depth.leave(self.layer, state)
        return routing

    def settings(self) -> dict[str, Any]:
        """Return the name, the number of this layer, and the settings of the router of all."""
        return {"name": self.name, "layer": self.layer, **self.router.settings()}


# -- models whose layers to_moe made mixtures ------------------------------------------------------


def is_recurrent(router: Any) -> bool:
    """Return whether `router` is the name, settings or object of a recurrent router."""
    if isinstance(router, Mapping):
        router = router.get("name")
    return isinstance(router, RecurrentRouter) or router == LayerRouter.name


def make_layer_routers(
    router: str | Mapping[str, Any] | RecurrentRouter, hidden: int, n_experts: int, n_layers: int
) -> list[LayerRouter]:
    """Return the routers of a model's mixture layers, which share a `RecurrentRouter`.

    Parameters
    ----------
    router
        ``"recurrent"``; or a dict with that ``name`` and settings of `RecurrentRouter`, where ``k``
        stands for `top_k` (2 if absent) and `renormalize` is ``k > 1`` if absent; or a
        `RecurrentRouter`, which is copied.
    hidden, n_experts, n_layers
        Features of a token, experts per layer, and layers that have experts.

    Raises
    ------
    bakeoff.errors.DataError
        If a setting is unknown (lists those that exist) or impossible, or a router was made for
        another model.

    Examples
    --------
    >>> routers = make_layer_routers({"name": "recurrent", "state_size": 8}, 16, 4, n_layers=3)
    >>> len(routers), len({id(each.router) for each in routers})
    (3, 1)
    """
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_experts": n_experts,
        "num_layers": n_layers,
    }
    if isinstance(router, RecurrentRouter):
        for name, needed in sizes.items():
            if getattr(router, name) != needed:
                raise DataError(
                    f"the router was made with {name}={getattr(router, name)}, the model needs "
                    f"{needed}"
                )
        return copy.deepcopy(router).layers()
    settings = dict(router) if isinstance(router, Mapping) else {}
    settings.pop("name", None)
    fixed = {*sizes, "top_k", "generator"}
    known = [name for name in inspect.signature(RecurrentRouter).parameters if name not in fixed]
    for name in settings:
        if name not in ("k", *known):
            raise DataError(
                f"router 'recurrent' got an unknown setting {name!r}; it accepts: "
                f"{', '.join(['k', *known])}"
            )
    k = settings.pop("k", min(2, n_experts))
    # With one expert a renormalised weight is always 1: the router would get no gradient.
    settings.setdefault("renormalize", k > 1)
    return RecurrentRouter(**sizes, top_k=k, **settings).layers()


def saved_layer_routers(settings: Sequence[Mapping[str, Any]]) -> list[LayerRouter]:
    """Return the routers, with fresh weights, that `LayerRouter.settings` described.

    Raises
    ------
    bakeoff.errors.ModelError
        If they are not all the layers of one router, in order.
    """
    described = [
        {key: each[key] for key in each if key not in ("name", "layer")} for each in settings
    ]
    numbers = [each.get("layer") for each in settings]
    if any(each != described[0] for each in described) or numbers != list(range(len(settings))):
        raise ModelError(
            f"the saved recurrent routers are not the layers of one: layers {numbers}, "
            f"settings {described[0]} and others"
        )
    routers = RecurrentRouter(**described[0]).layers()
    if len(routers) != len(settings):
        raise ModelError(f"{len(settings)} recurrent routers are saved, {len(routers)} described")
    return routers


def thread_layers(layers: Sequence[nn.Module]) -> None:
    """Let decoder layers carry the state to the `LayerRouter` in each, also when recomputed.

    Where gradients are checkpointed, the state goes into and out of the recomputed layer.
    """
    for layer in layers:
        found = [each for each in layer.modules() if isinstance(each, LayerRouter)]
        for router in found:
            router._link = _Link(router.router, router._depth, router.layer, float_weights=True)
            threaded: Any = layer
            threaded.__class__ = _subclass(_ThreadedLayer, cast(Any, type(layer)))
            threaded._link = router._link


# -- models of transformers ----------------------------------------------------------------------


def convert_router(
    model: nn.Module, router: str = "recurrent", *, seed: int = 0, **settings: Any
) -> nn.Module:
    """Replace the routers of a transformers mixture of experts, in place.

    Parameters
    ----------
    model
        Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, or another model of transformers whose routers take a
        softmax over all experts and the K best of it. Layers without experts may be among them.
    router
        ``"recurrent"``.
    seed
        For the new weights.
    **settings
        Of `RecurrentRouter`: ``state_size``, ``cell``, ``pass_state``, ``detach``, ``residual``,
        ``shared_projection``, ``gate``, ``cosine_size``, ``init_std``. K and whether weights are
        renormalised stay what they are in the model.

    Returns
    -------
    torch.nn.Module
        The same model. Its ``recurrent_router``, beside its decoder layers, holds the weights of
        all routers. It trains, generates, checkpoints gradients and reports router logits as
        before; ``save_pretrained`` writes it, `load_recurrent` reads it.

    Raises
    ------
    bakeoff.errors.DataError
        If a setting is unknown or impossible.
    bakeoff.errors.ModelError
        If the model has no mixtures, was converted before, or its routers choose in another way.

    Notes
    -----
    The new routers know nothing: train the model, or at least them. With ``state_size=0`` they
    keep the model's weights and the model computes what it did.

    Examples
    --------
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))
    >>> model = convert_router(model, "recurrent", state_size=8)
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """
    if router != "recurrent":
        raise DataError(f"unknown router {router!r}; there is: recurrent")
    fixed = {"hidden_size", "num_experts", "top_k", "num_layers", "renormalize", "generator"}
    known = [name for name in inspect.signature(RecurrentRouter).parameters if name not in fixed]
    for name in settings:
        if name not in known:
            raise DataError(f"unknown setting {name!r}; there are: {', '.join(known)}")
    blocks = _find_blocks(model)
    found = [_read_gate(block.path, block.gate) for block in blocks]
    if any(each != found[0] for each in found):
        other = next(i for i, each in enumerate(found) if each != found[0])
        raise ModelError(
            f"the routers of {blocks[0].path} and {blocks[other].path} differ: "
            f"{found[0]} and {found[other]}"
        )
    described = {**settings, **found[0], "num_layers": len(blocks)}
    _install(model, blocks, described, seed)
    return model


def load_recurrent(folder: str | Path, **options: Any) -> Any:
    """Return a model that `convert_router` made and ``save_pretrained`` wrote.

    Parameters
    ----------
    folder
        Where it is: ``config.json`` and safetensors; nothing is unpickled.
    **options
        Of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises
    ------
    bakeoff.errors.ModelError
        If the folder holds no such model.
    """
    import transformers

    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it holds no saved model")
    config = transformers.AutoConfig.from_pretrained(folder)
    described = getattr(config, _CONFIG_KEY, None)
    if not isinstance(described, dict):
        raise ModelError(f"the model in {folder} has no recurrent router: load it as usual")
    name = (config.architectures or ["?"])[0]
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"the installed transformers has no model class {name!r}")

    def start(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(building, self).__init__(config, *args, **kwargs)
        _install(self, _find_blocks(self), dict(described), seed=0)

    # Only so that from_pretrained fills the routers too, with all that it can do.
    building: Any = type(kind.__name__, (kind,), {"__init__": start, "__module__": kind.__module__})
    model = building.from_pretrained(folder, config=config, use_safetensors=True, **options)
    model.__class__ = kind
    return model


class _Block:
    """A mixture in a model: its router and the decoder layer around it."""

    def __init__(self, path: str, gate: nn.Module, stack: str, number: int) -> None:
        self.path, self.gate, self.stack, self.number = path, gate, stack, number


def _find_blocks(model: nn.Module) -> list[_Block]:
    blocks, lists = [], []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            lists.append(path)
        if isinstance(module, _RecurrentGate):
            raise ModelError(f"{type(model).__name__} has recurrent routers already: {path}")
        if not hasattr(module, "experts"):
            continue
        name = next((each for each in ("gate", "router") if hasattr(module, each)), None)
        gate = getattr(module, name) if name else None
        weight = getattr(gate, "weight", None)
        if not (isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(gate, "top_k")):
            raise ModelError(
                f"{path} of {type(model).__name__} has experts, but no router of a known form "
                f"(a weight and top_k): {type(gate).__name__}"
            )
        within = re.match(r"(.*?)\.(\d+)\.", path)
        if within is None or within[1] not in lists:
            raise ModelError(f"{path} of {type(model).__name__} is not in a list of layers")
        blocks.append(_Block(f"{path}.{name}", cast(nn.Module, gate), within[1], int(within[2])))
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no mixture of experts")
    places = [(block.stack, block.number) for block in blocks]
    if len({stack for stack, _ in places}) > 1 or len(set(places)) < len(places):
        raise ModelError(
            f"{type(model).__name__} must have its mixtures in one list of layers, one each; "
            f"found {', '.join(block.path for block in blocks)}"
        )
    return sorted(blocks, key=lambda block: block.number)


@torch.no_grad()
def _read_gate(path: str, gate: nn.Module) -> dict[str, Any]:
    """Return how a router chooses, found out by running a copy of it on random tokens."""
    weight = cast(Tensor, gate.weight)
    n_experts, hidden = weight.shape
    k = int(cast(Any, gate).top_k)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, hidden, generator=generator)
    w = torch.randn(n_experts, hidden, generator=generator) * 2 / hidden**0.5
    probs = F.linear(x, w).softmax(dim=1)
    kept, chosen = probs.topk(k, dim=1)
    probe = copy.deepcopy(gate).to(device="cpu", dtype=torch.float32).eval()
    cast(Tensor, probe.weight).copy_(w)
    low = copy.deepcopy(probe).bfloat16()
    renormalize, float_weights = None, False
    # A router of another form may take or return anything.
    with contextlib.suppress(Exception):
        _, weights, indices = probe(x)
        if torch.equal(indices, chosen):
            for choice, expected in (
                (False, kept),
                (True, kept / kept.sum(dim=1, keepdim=True)),
            ):
                if torch.allclose(weights, expected, rtol=1e-4, atol=1e-6):
                    renormalize = choice
        float_weights = low(x.bfloat16())[1].dtype == torch.float32
    if renormalize is None:
        raise ModelError(
            f"the router {path} ({type(gate).__name__}) does not choose the top_k of a softmax "
            "over all experts: only such routers can be converted"
        )
    return {
        "hidden_size": int(hidden),
        "num_experts": int(n_experts),
        "top_k": k,
        "renormalize": renormalize,
        "float_weights": float_weights,
    }


def _install(model: nn.Module, blocks: list[_Block], described: dict[str, Any], seed: int) -> None:
    weight = cast(nn.Parameter, blocks[0].gate.weight)
    settings = {key: value for key, value in described.items() if key != "float_weights"}
    generator = None if weight.is_meta else torch.Generator().manual_seed(seed)
    with torch.device("meta" if weight.is_meta else "cpu"):
        router = RecurrentRouter(**settings, generator=generator)
    router.to(device=weight.device, dtype=weight.dtype).train(model.training)
    router.requires_grad_(weight.requires_grad)
    if not router.state_size and router.gate_kind == "linear" and not weight.is_meta:
        with torch.no_grad():
            for new, block in zip(router.gates, blocks, strict=True):
                new.copy_(cast(Tensor, block.gate.weight))
    depth = _Depth(len(blocks))
    stack = cast(nn.ModuleList, model.get_submodule(blocks[0].stack))
    owner = model.get_submodule(blocks[0].stack.rpartition(".")[0])
    for i, block in enumerate(blocks):
        link = _Link(router, depth, i, described["float_weights"])
        gate: Any = block.gate
        del gate.weight
        gate.__class__ = _subclass(_RecurrentGate, cast(Any, type(gate)))
        gate._link = link
        layer: Any = stack[block.number]
        layer.__class__ = _subclass(_ThreadedLayer, cast(Any, type(layer)))
        layer._link = link
    owner.recurrent_router = router
    cast(Any, model).config.recurrent_router = described


class _Link:
    """What a decoder layer and the router in it share; no module, so that it owns no weights."""

    def __init__(
        self, router: RecurrentRouter, depth: _Depth, layer: int, float_weights: bool
    ) -> None:
        self.router, self.depth, self.layer = router, depth, layer
        self.float_weights = float_weights
        self.incoming: Tensor | None = None
        self.outgoing: Tensor | None = None

    def run(self, state: Tensor | None, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function` returns, and the state that the router in it left."""
        self.incoming = state
        try:
            return function(*args), self.outgoing
        finally:
            self.incoming = self.outgoing = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Link:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.router = copy.deepcopy(self.router, memo)
        twin.depth = copy.deepcopy(self.depth, memo)
        twin.incoming = twin.outgoing = None
        return twin


@functools.cache
def _subclass(mixin: Any, kind: Any) -> Any:
    # transformers finds routers by their class and layers by its name: both stay what they were.
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (mixin, kind), body)


class _RecurrentGate:
    """In front of a router's class: the recurrent router chooses."""

    _link: _Link

    @property
    def weight(self) -> nn.Parameter:
        """``(N, p)``, the gate on the state."""
        return cast(nn.Parameter, self._link.router.gates[self._link.layer])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return logits ``(T, N)`` float32, weights ``(T, K)`` and indices ``(T, K)``."""
        link = self._link
        x = hidden_states.reshape(-1, link.router.hidden_size)
        state = link.incoming
        if state is not None:
            state = state.to(x.device)  # layers may be on several devices
        logits, link.outgoing = link.router(x, state, link.layer)
        _, weights, indices = link.router.choose(logits)
        return logits, weights if link.float_weights else weights.to(x.dtype), indices


class _ThreadedLayer:
    """In front of a decoder layer's class: brings the state to its router and carries it on."""

    _link: _Link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link = self._link
        state = link.depth.enter(link.layer)
        ahead = cast(Any, super()).__call__
        layer = cast(Any, self)
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            output, state = link.run(state, functools.partial(ahead, **kwargs), *args)
            link.depth.leave(link.layer, state)
            return output
        # The state goes in and out of what is recomputed, as the hidden states do.
        checkpoint, left = layer._gradient_checkpointing_func, []

        def with_state(function: Callable[..., Any], *inputs: Any) -> Any:
            def block(state: Tensor | None, *inputs: Any) -> Any:
                return link.run(state, function, *inputs)

            output, after = checkpoint(block, state, *inputs)
            left.append(after)
            return output

        layer._gradient_checkpointing_func = with_state
        try:
            output = ahead(*args, **kwargs)
        finally:
            layer._gradient_checkpointing_func = checkpoint
        link.depth.leave(link.layer, left[0])
        return output


# -- measures and small parts ----------------------------------------------------------------------


def routing_mutual_information(first: Tensor, second: Tensor, bins: int = 100) -> float:
    """Return how much the gate probabilities of one layer tell about those of another, in nats.

    For each token, both layers' N probabilities are put into `bins` equal bins over [0, 1]; the
    mutual information of the two labellings of the N experts is averaged over tokens.

    Parameters
    ----------
    first, second
        ``(T, N)`` probabilities of the same tokens; memory is of order T N^2 bytes.
    bins
        100 in the paper.

    Raises
    ------
    bakeoff.errors.DataError
        If shapes differ or a value lies outside [0, 1].

    References
    ----------
    Qiu et al. "Layerwise Recurrent Router for Mixture-of-Experts". ICLR 2025, table 8 and appendix.

    Examples
    --------
    >>> p = torch.tensor([[0.7, 0.3]])
    >>> f"{routing_mutual_information(p, p.flip(1)):.4f}"
    '0.6931'
    """
    if first.shape != second.shape or first.ndim != 2 or not first.numel():
        raise DataError(
            "first and second must both be (tokens, experts), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if bins < 1:
        raise DataError(f"bins must be at least 1, got {bins}")
    labels = []
    for each in (first, second):
        if not bool(((each >= 0) & (each <= 1 + 1e-6)).all()):
            raise DataError("first and second must hold probabilities from 0 to 1")
        labels.append((each.detach().double() * bins).long().clamp_max(bins - 1))
    same = [each[:, :, None] == each[:, None, :] for each in labels]
    alone = [each.sum(dim=2).double() for each in same]
    both = (same[0] & same[1]).sum(dim=2).double()
    n_experts = first.shape[1]
    return float((n_experts * both / (alone[0] * alone[1])).log().mean())


def _matrices(count: int, rows: int, columns: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(rows, columns)) for _ in range(count))
