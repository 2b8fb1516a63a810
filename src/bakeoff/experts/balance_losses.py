"""Losses that keep a router's load balanced and its logits small."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bakeoff.errors import DataError
from bakeoff.experts.global_balance import LoadBalancingLoss, Scope
from bakeoff.experts.protocol import Routing, RoutingLoss
from bakeoff.experts.token_sums import count_choices, token_mean

LOSSES: dict[str, type[Any]] = {}
"""Losses by name."""


def _named(name: str) -> Callable[[type[Any]], type[Any]]:
    def register(cls: type[Any]) -> type[Any]:
        cls.name = name
        LOSSES[name] = cls
        return cls

    return register


def make_loss(loss: str | dict[str, Any] | RoutingLoss) -> RoutingLoss:
    """Return a loss from its name, a dict with ``name`` and settings, or the loss itself.

    Raises
    ------
    bakeoff.errors.DataError
        If the name or a setting is unknown; lists those that exist.

    Examples
    --------
    >>> make_loss({"name": "z-loss", "coefficient": 0.01})
    ZLoss(coefficient=0.01)
    """
    made: Any = {"name": loss} if isinstance(loss, str) else loss
    if isinstance(made, dict):
        name = made.get("name")
        if name not in LOSSES:
            raise DataError(f"unknown loss {name!r}; there are: {', '.join(sorted(LOSSES))}")
        settings = {key: value for key, value in made.items() if key != "name"}
        try:
            made = LOSSES[name](**settings)
        except TypeError:
            accepted = ", ".join(inspect.signature(LOSSES[name]).parameters)
            raise DataError(
                f"loss {name!r} got settings {settings}; it accepts: {accepted}"
            ) from None
    if not callable(made):
        raise DataError(f"a loss must be a name, a dict or a callable, got {type(made).__name__}")
    return made  # type: ignore[no-any-return]


def load_fractions(routing: Routing, first_choice: bool = False) -> Tensor:
    """Return ``(N,)`` float32: each expert's share of the assignments; carries no gradient.

    The loads of null experts are replaced by their mean.
    """
    chosen = routing.indices[:, :1] if first_choice else routing.indices
    counts = count_choices(chosen, routing.n_experts)
    share = counts.float() / counts.sum().clamp_min(1)
    null = routing.aux.get("null_experts")
    if null is not None:
        share = torch.where(null, share[null].mean(), share)
    return share.detach()


@_named("switch-balance")
@dataclass(frozen=True)
class SwitchBalance:
    """``N sum_i f_i P_i``: share of assignments times mean probability; 1 when balanced.

    Parameters
    ----------
    coefficient
        Multiplies the loss.
    first_choice
        Count first choices alone (GShard).

    Notes
    -----
    f counts the router's choices before capacity drops any, and carries no gradient. The batch is
    one micro-batch of one process; see `GlobalBalance` for more.

    References
    ----------
    William Fedus, Barret Zoph and Noam Shazeer. "Switch Transformers". JMLR 2022.
    arXiv:2101.03961.

    Examples
    --------
    >>> uniform = torch.full((4, 2), 0.5)
    >>> chosen = torch.tensor([[0], [1], [0], [1]])
    >>> routing = Routing(uniform.log(), uniform, chosen, torch.ones(4, 1))
    >>> float(SwitchBalance(coefficient=1.0)(routing))
    1.0
    """

    coefficient: float = 0.01
    first_choice: bool = False

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        share = load_fractions(routing, self.first_choice)
        mean = token_mean(routing.probs, mask)
        return self.coefficient * routing.n_experts * (share * mean).sum()


@_named("global-balance")
@dataclass(eq=False)
class GlobalBalance:
    """`SwitchBalance` with shares counted over the global batch: a layer's `LoadBalancingLoss`.

    The shares are those of all micro-batches since the last `reset`, in all processes. Each layer
    has its own loss: a `MoE` takes a copy. `MoE.update`, which `after_optimizer_step` calls for
    every layer, resets it.

    Parameters
    ----------
    coef
        Multiplies the loss.
    scope
        ``"global"``, ``"micro"``, ``"sequence"`` or ``"shuffle"``, see `LoadBalancingLoss`.
        ``"micro"`` is `SwitchBalance` with the same coefficient, for any number of choices.
    sequences_per_group, micro_share, token_weighted, timeout, seed
        As in `LoadBalancingLoss`.
    accumulation_steps
        More micro-batches than this without a reset give a warning: it was forgotten.
    group
        A ``torch.distributed`` process group; None for the default one, if there is one. It is not
        saved: a loaded layer has None.

    Raises
    ------
    bakeoff.errors.DataError
        As `LoadBalancingLoss`; and if two layers of different sizes call the same loss.

    Notes
    -----
    Null experts count as in `SwitchBalance`: only their mean load matters. With activation
    checkpointing, run the backward pass of one micro-batch before the forward pass of the next.

    References
    ----------
    Zihan Qiu et al. "Demons in the Detail: On Implementing Load Balancing Loss for Training
    Specialized Mixture-of-Expert Models". ACL 2025. arXiv:2501.11873.

    Examples
    --------
    Two micro-batches, each with an expert of its own: balanced as a whole.

    >>> sure = torch.eye(2)
    >>> first, second = (
    ...     Routing(sure[[i]].log(), sure[[i]], torch.tensor([[i]]), torch.ones(1, 1))
    ...     for i in range(2)
    ... )
    >>> loss = GlobalBalance(coef=1.0)
    >>> float(loss(first)), float(loss(second))
    (2.0, 1.0)
    >>> loss.reset()
    """

    coef: float = 0.01
    scope: Scope = "global"
    sequences_per_group: int = 1
    micro_share: float = 0.0
    token_weighted: bool = True
    accumulation_steps: int = 256
    timeout: float = 600.0
    seed: int = 0
    group: Any = None

    def __post_init__(self) -> None:
        self._inner: LoadBalancingLoss | None = None
        self._make(1)  # impossible settings are refused now

    def _make(self, n_experts: int) -> LoadBalancingLoss:
        settings = {name: getattr(self, name) for name in _field_names(self)}
        # How many experts a token takes is read from the routing.
        return LoadBalancingLoss(n_experts, 1, **settings)

    @property
    def needs_sequences(self) -> bool:
        """Whether the mask must come as ``(B, S)``, so that sequences are known."""
        return self.scope in ("sequence", "shuffle")

    @property
    def fractions(self) -> Tensor | None:
        """``(N,)`` float32: shares of the assignments since the last reset; None before any."""
        if self._inner is None or not len(self._inner.counts):
            return None
        return self._inner.fractions[0]

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss; `mask` is ``(T,)`` or ``(B, S)`` bool."""
        if self._inner is None:
            self._inner = self._make(routing.n_experts)
        if self._inner.num_experts != routing.n_experts:
            raise DataError(
                f"the loss counted {self._inner.num_experts} experts before, the routing has "
                f"{routing.n_experts}: each layer needs a loss of its own"
            )
        null = routing.aux.get("null_experts")
        if null is not None:
            # The mean of the probabilities with the loads does what the mean of the loads would.
            even = routing.probs[:, null].mean(dim=1, keepdim=True)
            routing = dataclasses.replace(routing, probs=torch.where(null, even, routing.probs))
        loss: Tensor = self._inner(routing, mask)
        return loss

    def reset(self) -> None:
        """Forget the counts; `MoE.update` calls this after each optimizer step."""
        if self._inner is not None:
            self._inner.reset()

    def settings(self) -> dict[str, Any]:
        """Return the name and the constructor's arguments, JSON-able; without the group."""
        own = {name: getattr(self, name) for name in _field_names(self) if name != "group"}
        return {"name": "global-balance", **own}

    def __deepcopy__(self, memo: dict[int, Any]) -> GlobalBalance:
        # A process group cannot be copied, only shared.
        twin = type(self)(**{name: getattr(self, name) for name in _field_names(self)})
        memo[id(self)] = twin
        twin._inner = copy.deepcopy(self._inner, memo)
        return twin


def _field_names(made: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(made)]


@_named("device-balance")
@dataclass(frozen=True)
class DeviceBalance:
    """Balance between groups of experts, such as those of one device (DeepSeekMoE).

    ``sum_d f_d P_d`` with f the mean of ``N f_i`` over a group and P the sum of its
    probabilities; 1 when balanced.

    Parameters
    ----------
    groups
        The experts of each group.
    coefficient
        Multiplies the loss.

    References
    ----------
    Damai Dai et al. "DeepSeekMoE". ACL 2024. arXiv:2401.06066.
    """

    groups: Sequence[Sequence[int]]
    coefficient: float = 0.05

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        if sorted(i for group in self.groups for i in group) != list(range(routing.n_experts)):
            raise DataError(
                f"groups must hold each of the {routing.n_experts} experts once, got {self.groups}"
            )
        share = load_fractions(routing) * routing.n_experts
        mean = token_mean(routing.probs, mask)
        terms = [share[list(group)].mean() * mean[list(group)].sum() for group in self.groups]
        return self.coefficient * torch.stack(terms).sum()


@_named("z-loss")
@dataclass(frozen=True)
class ZLoss:
    """Mean square of the log-sum-exp of the logits: keeps them small.

    References
    ----------
    Barret Zoph et al. "ST-MoE: Designing Stable and Transferable Sparse Expert Models". 2022.
    arXiv:2202.08906.
    """

    coefficient: float = 0.001

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        return self.coefficient * token_mean(routing.logits.logsumexp(dim=1).square(), mask)


def _squared_variation(values: Tensor, sample: bool) -> Tensor:
    variance = values.var(correction=1 if sample and len(values) > 1 else 0)
    return variance / values.mean().square().clamp_min(1e-20)


@_named("importance")
@dataclass(frozen=True)
class Importance:
    """Squared coefficient of variation of the experts' summed probabilities.

    Where the router adds noise, the probabilities are those without it, as in V-MoE.

    Parameters
    ----------
    coefficient
        Multiplies the loss.
    sample
        Divide the variance by N - 1 (as Shazeer et al. and MoA) instead of N (as V-MoE).

    References
    ----------
    Noam Shazeer et al. "Outrageously Large Neural Networks". ICLR 2017. arXiv:1701.06538.
    """

    coefficient: float = 0.1
    sample: bool = False

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        probs = routing.aux.get("clean_probs", routing.probs)
        return self.coefficient * _squared_variation(token_mean(probs, mask), self.sample)


@_named("load")
@dataclass(frozen=True)
class Load:
    """Squared coefficient of variation of the probability of being chosen under fresh noise.

    Parameters
    ----------
    coefficient, sample
        As in `Importance`.

    Raises
    ------
    bakeoff.errors.DataError
        If the router adds no noise.

    References
    ----------
    Carlos Riquelme et al. "Scaling Vision with Sparse Mixture of Experts". NeurIPS 2021.
    arXiv:2106.05974.
    """

    coefficient: float = 0.1
    sample: bool = False

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        if "noisy_logits" not in routing.aux:
            raise DataError(
                "the load loss needs a router that adds noise in training: TopK(noise=1.0) or "
                "TopK(noise='learned')"
            )
        noisy = routing.aux["noisy_logits"]
        threshold = noisy.topk(routing.indices.shape[1], dim=1).values[:, -1:]
        distance = (routing.aux["clean_logits"] - threshold) / routing.aux["noise_std"]
        chance = torch.special.ndtr(distance)
        return self.coefficient * _squared_variation(token_mean(chance, mask), self.sample)


@_named("mutual-information")
@dataclass(frozen=True)
class MutualInformation:
    """Minus the mutual information of expert and token, in nats: sure choices, used equally.

    References
    ----------
    Yikang Shen et al. "ModuleFormer: Modularity Emerges from Mixture-of-Experts". 2023.
    arXiv:2306.04640. Zitian Chen et al. "Mod-Squad". CVPR 2023. arXiv:2212.08066.
    """

    coefficient: float = 0.001

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        each: Tensor = torch.special.entr(routing.probs).sum(dim=1)
        overall: Tensor = torch.special.entr(token_mean(routing.probs, mask)).sum()
        return self.coefficient * (token_mean(each, mask) - overall)


@_named("selector-entropy")
@dataclass(frozen=True)
class SelectorEntropy:
    """Drives DSelect-k's selectors to one expert each.

    Entropy of each selector plus the inverse of its mass on experts that exist, which is above 1
    only if their number is no power of two.
    """

    coefficient: float = 0.01

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        if "selector_entropy" not in routing.aux:
            raise DataError("the selector-entropy loss is for the 'dselect-k' router")
        inverse = (1 / routing.aux["selector_mass"].clamp_min(1e-6) - 1).sum(dim=1)
        return self.coefficient * token_mean(routing.aux["selector_entropy"] + inverse, mask)


@_named("diverse-gate")
@dataclass(frozen=True)
class DiverseGate:
    """Distance of the expert directions' Gram matrix from the identity (DYNMoE)."""

    coefficient: float = 0.01

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        if "directions" not in routing.aux:
            raise DataError("the diverse-gate loss is for the 'threshold' router")
        directions = routing.aux["directions"]
        identity = torch.eye(len(directions), device=directions.device)
        # Not the root of the sum, whose gradient is infinite where directions are orthogonal.
        return self.coefficient * (directions @ directions.T - identity).square().sum()


class AdaptiveCoefficient:
    """A loss whose strength follows the share of assignments that capacity dropped (Skywork-MoE).

    After each step the coefficient becomes ``decay * coefficient + (1 - decay) * gain * drops``.

    Parameters
    ----------
    loss
        The loss, with a coefficient of 1.
    coefficient
        At the start.
    gain, decay
        See above.

    References
    ----------
    Tianwen Wei et al. "Skywork-MoE". 2024. arXiv:2406.06563.
    """

    def __init__(
        self,
        loss: str | dict[str, Any] | RoutingLoss | None = None,
        coefficient: float = 0.01,
        gain: float = 0.2,
        decay: float = 0.99,
    ) -> None:
        self.loss = SwitchBalance(coefficient=1.0) if loss is None else make_loss(loss)
        self.coefficient, self.gain, self.decay = coefficient, gain, decay

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the scalar loss."""
        return self.coefficient * self.loss(routing, mask)

    @property
    def needs_sequences(self) -> bool:
        """Whether the inner loss does."""
        return bool(getattr(self.loss, "needs_sequences", False))

    def reset(self) -> None:
        """Forget what the inner loss counted, if it counts."""
        if hasattr(self.loss, "reset"):
            self.loss.reset()

    def observe(self, drop_rate: float) -> None:
        """Adapt the coefficient; `MoE.update` calls this."""
        aim = self.gain * drop_rate
        self.coefficient = self.decay * self.coefficient + (1 - self.decay) * aim
