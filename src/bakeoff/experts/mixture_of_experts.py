"""The mixture-of-experts layer: router, capacity, dispatch, experts and losses in one module."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bakeoff.errors import DataError
from bakeoff.experts.balance_losses import make_loss
from bakeoff.experts.capacity import POLICIES, expert_capacity, within_capacity
from bakeoff.experts.dispatch import DISPATCHERS, dispatch
from bakeoff.experts.expert_bank import ExpertBank, ModuleExperts
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.grouped import Workspace
from bakeoff.experts.protocol import Router, Routing, RoutingLoss
from bakeoff.experts.routers import check_gradient, check_not_recomputed, make_router
from bakeoff.experts.soft_routers import MergedExperts, SoftMoE

METHOD = {
    "slug": "mixture-of-experts",
    "title": "Mixture of experts: routers, losses, capacity and dispatch behind one layer",
    "paper": 'Cai et al., "A Survey on Mixture of Experts in Large Language Models", TKDE 2025, '
    "arXiv 2407.06204",
    "designs": ["top-k", "switch", "loss-free", "hash", "random"],
    "names": [
        "MoE",
        "TopK",
        "to_moe",
        "save_moe",
        "load_moe",
        "inspect_experts",
        "SwitchBalance",
        "ZLoss",
    ],
}


@dataclass(frozen=True)
class RoutingStats:
    """What a layer did with its last batch; padding does not count.

    Parameters
    ----------
    tokens
        Number of tokens.
    load
        ``(N,)`` share of the assignments that chose each expert, before drops.
    max_over_mean
        Heaviest load over mean load: 1 is perfect, N is collapse.
    entropy
        Mean over tokens of the entropy of the probabilities, in nats.
    drop_rate
        Share of the assignments that capacity dropped.
    unrouted
        Share of the tokens that no expert processed.
    """

    tokens: int
    load: tuple[float, ...]
    max_over_mean: float
    entropy: float
    drop_rate: float
    unrouted: float


class MoE(nn.Module):
    """A mixture of experts, in the place of a feed-forward layer.

    Parameters
    ----------
    hidden
        Features of input and output.
    experts
        A number of `FeedForwardExperts`, a list of modules, or an `ExpertBank`.
    router
        A router, or its name, or a dict with ``name`` and settings: ``"top-k"``,
        ``{"name": "top-k", "k": 1}``, ``TopK(k=2, score="sigmoid")``.
    width, activation, gated
        Of the experts, where `experts` is a number; see `FeedForwardExperts`.
    capacity
        Factor on the balanced load beyond which an expert drops tokens: a number, or one for
        training and one for evaluation. None drops nothing.
    drop
        Who is dropped: ``"probs"``, ``"position"``, ``"priority"`` or ``"random"``, see `seats`.
    aux
        Losses: names, dicts, or callables ``(routing, mask) -> scalar``. Of a callable with a
        ``reset`` method, which counts, the layer takes a copy, so that no other layer counts too.
    dispatch
        ``"sort"`` (fast), ``"loop"``, ``"einsum"`` or ``"batched"``; the result is the same.
    shared
        A module that every token passes too, or how many always-on experts of `width`.
    scale
        Factor on the routed experts' sum.
    causal
        Whether later tokens must not influence earlier ones. Routers that look ahead are refused,
        and drop policies that do are warned of.
    seed
        For random drops; None draws from torch's own generator.

    Raises
    ------
    bakeoff.errors.DataError
        On impossible combinations, unknown names (lists those that exist), and inputs of the wrong
        shape.

    Notes
    -----
    A dropped assignment contributes nothing and the weights of those that stay are not
    renormalised. Losses see the router's choices before drops. After a forward pass in training
    mode, ``aux_loss`` holds the sum of the losses; add it to the model's own. Call `update` after
    each optimizer step if the router adapts without a gradient or a loss counts over micro-batches
    (``"global-balance"``).

    References
    ----------
    Weilin Cai, Juyong Jiang, Fan Wang, Jing Tang, Sunghun Kim and Jiayi Huang. "A Survey on
    Mixture of Experts in Large Language Models". TKDE 2025. arXiv:2407.06204.

    Examples
    --------
    >>> moe = MoE(16, experts=4, router={"name": "top-k", "k": 2}, width=32)
    >>> x = torch.randn(2, 5, 16)
    >>> y = moe(x)
    >>> y.shape, moe.stats().tokens
    (torch.Size([2, 5, 16]), 10)
    """

    def __init__(
        self,
        hidden: int,
        experts: int | Sequence[nn.Module] | ExpertBank = 8,
        router: str | dict[str, Any] | Router = "top-k",
        *,
        width: int | None = None,
        activation: str = "silu",
        gated: bool = True,
        capacity: float | tuple[float, float] | None = None,
        drop: str = "probs",
        aux: Iterable[str | dict[str, Any] | RoutingLoss] = ("switch-balance", "z-loss"),
        dispatch: str = "sort",
        shared: int | nn.Module = 0,
        scale: float = 1.0,
        causal: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(experts, int):
            experts = FeedForwardExperts(experts, hidden, width, activation, gated)
        elif not isinstance(experts, ExpertBank):
            experts = ModuleExperts(experts, hidden)
        if experts.hidden != hidden:
            raise DataError(f"hidden is {hidden}, but the experts take {experts.hidden} features")
        if dispatch not in DISPATCHERS:
            raise DataError(f"unknown dispatch {dispatch!r}; there are: {', '.join(DISPATCHERS)}")
        if drop not in POLICIES:
            raise DataError(f"unknown drop policy {drop!r}; there are: {', '.join(POLICIES)}")
        self.hidden = hidden
        self.experts = experts
        self.router = make_router(router, hidden, experts.n_experts)
        self.capacity = (capacity, capacity) if isinstance(capacity, int | float) else capacity
        self.drop, self.dispatch, self.scale, self.causal = drop, dispatch, scale, causal
        self.seed = seed
        self.losses = [own_loss(loss) for loss in aux]
        self.shared = self._shared(shared)
        self.routing: Routing | None = None
        self.aux_loss: Tensor | None = None
        self._kept: Tensor | None = None
        self._mask: Tensor | None = None
        self._generator: torch.Generator | None = None
        self._workspace = getattr(experts, "workspace", None) or Workspace()
        self._batch: Any = None  # set by `to_moe`: mask and token ids of the model's batch
        self._check()

    def _shared(self, shared: int | nn.Module) -> nn.Module | None:
        if isinstance(shared, nn.Module):
            return shared
        if not shared:
            return None
        bank = self.experts
        if not isinstance(bank, FeedForwardExperts):
            raise DataError(
                f"shared must be a module where experts are not FeedForwardExperts, got {shared!r}"
            )
        return FeedForwardExperts(
            1, self.hidden, shared * bank.width, bank.activation, bank.gated, bank.has_bias
        )

    def _check(self) -> None:
        router = self.router
        soft = isinstance(router, SoftMoE | MergedExperts)
        own_load = soft or getattr(router, "name", "") == "expert-choice"
        if self.capacity is not None:
            if own_load:
                raise DataError(
                    f"capacity does not apply to the router {router.name!r}, which sets each "  # type: ignore[attr-defined]
                    "expert's load itself"
                )
            if not has_fixed_choices(router):
                raise DataError(
                    "capacity is reckoned from the number of choices of every token, the router's "
                    f"k; {type(router).__name__} has no fixed one"
                )
            for factor in self.capacity:
                if not factor > 0:
                    raise DataError(
                        f"capacity must be above 0, got {factor}: all tokens would be dropped"
                    )
        if not self.causal:
            return
        if not getattr(router, "is_causal", True):
            raise DataError(
                f"causal=True, but the router {type(router).__name__} looks at later tokens: "
                "choose one where each token routes itself, such as 'top-k'"
            )
        if not getattr(router, "is_causal_in_training", True):
            warnings.warn(
                f"in training the router {type(router).__name__} looks at later tokens; in "
                "evaluation it does not",
                stacklevel=3,
            )
        if self.capacity is not None and (self.drop != "position" or router_k(router) > 1):
            warnings.warn(
                f"drop={self.drop!r} lets later tokens decide whether an earlier one is dropped; "
                "only 'position' with one expert per token does not",
                stacklevel=3,
            )

    def forward(self, hidden: Tensor, mask: Tensor | None = None, **context: Tensor) -> Tensor:
        """Return the mixture's output.

        Parameters
        ----------
        hidden
            ``(T, hidden)``, or ``(B, L, hidden)`` for B sequences.
        mask
            ``(T,)`` or ``(B, L)`` bool, False at padding, whose output is zero.
        **context
            What the router needs, of the same shape as `mask`: ``token_ids``, ``domains``.

        Returns
        -------
        Tensor
            Of the shape and dtype of `hidden`.
        """
        if hidden.ndim < 2 or hidden.shape[-1] != self.hidden:
            raise DataError(
                f"hidden must be (..., {self.hidden}) with at least two axes, got "
                f"{tuple(hidden.shape)}"
            )
        leading = hidden.shape[:-1]
        if self._batch is not None:
            mask, context = self._batch.complete(leading, mask, context)
        for name, value in {**context, "mask": mask}.items():
            if value is not None and name != "sequence_ids" and value.shape != leading:
                raise DataError(f"{name} must be {tuple(leading)}, got {tuple(value.shape)}")
        if mask is not None:
            mask = mask.bool().reshape(-1)
        tokens = hidden.reshape(-1, self.hidden)
        context = {key: value.reshape(-1) for key, value in context.items()}
        if "sequence_ids" not in context and hidden.ndim > 2:
            ids = torch.arange(leading[:-1].numel(), device=hidden.device)
            context["sequence_ids"] = ids.repeat_interleave(leading[-1])
        routing = self.router(tokens, mask=mask, **context)
        result = self._mixture(tokens, routing, mask)
        if self.shared is not None:
            one = isinstance(self.shared, FeedForwardExperts)
            always = self.shared.one(0, tokens) if one else self.shared(tokens)  # type: ignore[operator]
            if mask is not None:
                always = always.masked_fill(~mask[:, None], 0.0)
            result = result + always
        self.routing, self._mask, self.aux_loss = routing, mask, None
        if self.training and self.losses:
            self.aux_loss = sum_of_losses(self.losses, routing, mask, leading)
        return result.reshape(*leading, -1)

    def _mixture(self, tokens: Tensor, routing: Routing, mask: Tensor | None) -> Tensor:
        self._kept = None
        if isinstance(self.router, SoftMoE):
            return self.scale * _through_slots(tokens, routing, self.experts)
        if isinstance(self.router, MergedExperts):
            return self.scale * _through_merged(tokens, routing, self.experts, mask)
        indices, weights = routing.indices, routing.weights
        if self.capacity is not None:
            self._kept = self._within_capacity(routing, mask)
            indices = indices.masked_fill(~self._kept, -1)
            weights = weights * self._kept
        return dispatch(
            tokens, indices, weights * self.scale, self.experts, self.dispatch, self._workspace
        )

    def _within_capacity(self, routing: Routing, mask: Tensor | None) -> Tensor:
        assert self.capacity is not None
        n_tokens = routing.n_tokens if mask is None else int(mask.sum())
        capacity = expert_capacity(
            n_tokens,
            routing.n_experts,
            router_k(self.router),
            self.capacity[0 if self.training else 1],
        )
        if self.drop == "random" and self.seed is not None:
            check_not_recomputed()
            if self._generator is None:
                self._generator = torch.Generator(routing.indices.device).manual_seed(self.seed)
        kept = within_capacity(routing, capacity, self.drop, self._generator)
        # Null experts have no capacity: they cost nothing.
        return kept | (routing.indices >= self.experts.n_experts)

    def stats(self) -> RoutingStats:
        """Return load, entropy and drops of the last forward pass.

        Raises
        ------
        bakeoff.errors.DataError
            Before the first forward pass.
        """
        if self.routing is None:
            raise DataError("there are no statistics before the first forward pass")
        return routing_stats(self.routing, self._mask, self._kept)

    def update(self, group: Any = None) -> None:
        """Adapt what learns without a gradient: routers' biases, adaptive coefficients.

        Losses that count over micro-batches start anew. Call it after each optimizer step.
        """
        if hasattr(self.router, "update"):
            self.router.update(group)
        for loss in self.losses:
            if hasattr(loss, "observe") and self.routing is not None:
                loss.observe(self.stats().drop_rate)
            if hasattr(loss, "reset"):
                loss.reset()

    def parameter_counts(self) -> tuple[int, int]:
        """Return the number of parameters in all, and of those that a token uses."""
        total = sum(p.numel() for p in self.parameters())
        bank = sum(p.numel() for p in self.experts.parameters())
        used = min(getattr(self.router, "active_experts", router_k(self.router)), self.n_experts)
        return total, round(total - bank + bank / self.n_experts * used)

    @property
    def n_experts(self) -> int:
        """Number of routed experts."""
        return self.experts.n_experts

    def settings(self) -> dict[str, Any]:
        """Return what makes the same layer again, with other weights; JSON-able.

        Raises
        ------
        bakeoff.errors.DataError
            If a part has no settings: modules given in a list, a loss that is a function.
        """
        router = self.router
        if not hasattr(router, "settings"):
            raise DataError(f"router {type(router).__name__} has no settings() to save")
        shared: Any = None
        if isinstance(self.shared, FeedForwardExperts):
            shared = self.shared.settings()
        elif self.shared is not None:
            shared = "module"
        return {
            "hidden": self.hidden,
            "experts": self.experts.settings(),
            "router": router.settings(),
            "capacity": self.capacity,
            "drop": self.drop,
            "aux": [_loss_settings(loss) for loss in self.losses],
            "dispatch": self.dispatch,
            "shared": shared,
            "scale": self.scale,
            "causal": self.causal,
            "seed": self.seed,
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any], dense: nn.Module | None = None) -> MoE:
        """Return a layer with the given settings and fresh weights.

        `dense` is needed where the settings speak of a module: it becomes the shared module, or
        what the experts are copies of.
        """
        settings = dict(settings)
        experts = make_experts(settings.pop("experts"), dense)
        always = settings.pop("shared")
        if always == "module" and dense is None:
            raise DataError("the layer has a shared module: give it as dense")
        shared: Any = dense if always == "module" else 0
        if isinstance(always, dict):
            shared = make_experts(always)
        capacity = settings.pop("capacity")
        return cls(
            settings.pop("hidden"),
            experts,
            shared=shared,
            capacity=None if capacity is None else tuple(capacity),
            **settings,
        )

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to the last batch hangs on a graph, which can be neither copied nor saved.
        gone = dict.fromkeys(("routing", "aux_loss", "_kept", "_mask", "_generator"))
        return {**self.__dict__, **gone}

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"capacity={self.capacity}, drop={self.drop!r}, dispatch={self.dispatch!r}, "
            f"scale={self.scale}, causal={self.causal}"
        )


def router_k(router: Any) -> int:
    """Return how many choices a token has; 1 if nothing is said."""
    return int(getattr(router, "k", 1))


def has_fixed_choices(router: Any) -> bool:
    """Tell whether all tokens have as many choices, and the router says how many."""
    return hasattr(router, "k") and not getattr(router, "varies", False)


def own_loss(loss: str | dict[str, Any] | RoutingLoss) -> RoutingLoss:
    """Return a loss for one layer: a copy, if it counts."""
    made = make_loss(loss)
    return copy.deepcopy(made) if made is loss and hasattr(made, "reset") else made


def sum_of_losses(
    losses: Sequence[RoutingLoss], routing: Routing, mask: Tensor | None, leading: torch.Size
) -> Tensor:
    """Return the sum of a layer's losses; `leading` is the shape of its tokens, `mask` ``(T,)``."""
    terms = []
    for loss in losses:
        seen = mask
        if getattr(loss, "needs_sequences", False) and len(leading) > 1:
            if seen is None:
                seen = torch.ones(leading, dtype=torch.bool, device=routing.indices.device)
            seen = seen.reshape(-1, leading[-1])
        terms.append(loss(routing, seen))
    return torch.stack(terms).sum()


def _loss_settings(loss: Any) -> dict[str, Any]:
    if hasattr(loss, "settings"):
        return dict(loss.settings())
    if not dataclasses.is_dataclass(loss) or not hasattr(loss, "name"):
        raise DataError(f"loss {type(loss).__name__} has no settings to save")
    return {"name": loss.name, **dataclasses.asdict(cast(Any, loss))}


def make_experts(settings: dict[str, Any], template: nn.Module | None = None) -> ExpertBank:
    """Return an `ExpertBank` from its settings; `template` is what experts may be copies of.

    Raises
    ------
    bakeoff.errors.DataError
        If the kind is unknown; lists those that exist.
    """
    from bakeoff.experts.lora_experts import LoRAExperts

    kinds: dict[str, type[ExpertBank]] = {"feed-forward": FeedForwardExperts, "lora": LoRAExperts}
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind == "copies" and template is not None:
        return ModuleExperts(template, **settings)
    if kind not in kinds:
        raise DataError(f"unknown kind of experts {kind!r}; there are: {', '.join(kinds)}")
    return kinds[kind](**settings)


def routing_stats(
    routing: Routing, mask: Tensor | None = None, kept: Tensor | None = None
) -> RoutingStats:
    """Return the statistics of a routing; `kept` ``(T, K)`` bool says what capacity let pass."""
    counts = routing.counts.double()
    chosen = routing.indices >= 0
    present = torch.ones_like(chosen[:, 0]) if mask is None else mask
    n_tokens = int(present.sum())
    entropy = torch.special.entr(routing.probs.detach().double()).sum(dim=1)
    passed = chosen if kept is None else chosen & kept
    total = max(float(counts.sum()), 1.0)
    return RoutingStats(
        tokens=n_tokens,
        load=tuple((counts / total).tolist()),
        max_over_mean=float(counts.max() / (total / len(counts))),
        entropy=float(entropy[present].sum()) / max(n_tokens, 1),
        drop_rate=1.0 - float(passed.sum()) / total if counts.sum() else 0.0,
        unrouted=float((present & ~passed.any(dim=1)).sum()) / max(n_tokens, 1),
    )


def _padded(values: Tensor, rows: Tensor) -> Tensor:
    """Return ``(B, L, ...)`` values at ``(B, L)`` rows, zero where the row is -1."""
    taken = values[rows.clamp_min(0)]
    return taken.masked_fill((rows < 0)[:, :, None], 0.0)


def _through_slots(tokens: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    rows = routing.aux["sequence_rows"]
    send = _padded(routing.aux["dispatch"], rows)  # (B, L, N * S)
    states = _padded(tokens, rows).to(send.dtype)
    # Padding may hold NaN, and zero times NaN is NaN.
    states = states.masked_fill((send.sum(dim=2) == 0)[:, :, None], 0.0)
    slots = torch.bmm(send.transpose(1, 2), states).to(tokens.dtype)
    n_sequences, n_slots, hidden = slots.shape
    by_expert = slots.view(n_sequences, experts.n_experts, -1, hidden).transpose(0, 1)
    results = experts.batched(by_expert.reshape(experts.n_experts, -1, hidden))
    results = results.view(experts.n_experts, n_sequences, -1, results.shape[-1]).transpose(0, 1)
    combine = _padded(routing.aux["combine"], rows)
    back = torch.bmm(combine, results.reshape(n_sequences, n_slots, -1).to(combine.dtype))
    return _unpadded(back, rows, len(tokens)).to(tokens.dtype)


def _unpadded(values: Tensor, rows: Tensor, n_tokens: int) -> Tensor:
    present = rows >= 0
    result = values.new_zeros(n_tokens, values.shape[-1])
    return result.index_put((rows[present],), values[present])


def _through_merged(
    tokens: Tensor, routing: Routing, experts: ExpertBank, mask: Tensor | None
) -> Tensor:
    rows = routing.aux["sequence_rows"]
    if not rows.numel():
        return tokens.new_zeros(len(tokens), experts.n_out)
    weights = routing.probs[rows[:, 0].clamp_min(0)]
    clean = tokens if mask is None else tokens.masked_fill(~mask[:, None], 0.0)
    back = _unpadded(experts.merged(weights, _padded(clean, rows)), rows, len(tokens))
    back = back.to(tokens.dtype)
    return back if mask is None else back.masked_fill(~mask[:, None], 0.0)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return the mixture layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def aux_loss(model: nn.Module) -> Tensor:
    """Return the sum of the layers' losses of the last forward pass; add it to the model's loss.

    Raises
    ------
    bakeoff.errors.DataError
        If the model has no mixture layer.
    bakeoff.errors.ModelError
        If gradients are on and the losses of a layer whose router is trained have none, as after
        reentrant gradient checkpointing.
    """
    layers = moe_layers(model)
    if not layers:
        raise DataError("the model has no MoE layer")
    found = []
    for layer in layers.values():
        if layer.aux_loss is not None:
            router: Any = layer.router
            gates = router.parameters() if isinstance(router, nn.Module) else ()
            check_gradient(layer.aux_loss.requires_grad, gates)
            found.append(layer.aux_loss)
    if not found:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([loss.to(found[0].device) for loss in found]).sum()


def after_optimizer_step(model: nn.Module, group: Any = None) -> None:
    """Call `MoE.update` on every mixture layer of `model`."""
    for layer in moe_layers(model).values():
        layer.update(group)
