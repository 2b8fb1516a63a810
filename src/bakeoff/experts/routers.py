"""Learned routers in which each token chooses its experts, and the table of routers by name."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.protocol import Router, Routing

ROUTERS: dict[str, type[RouterModule]] = {}
"""Router classes by name; a subclass of `RouterModule` with ``name=`` adds itself."""

# Names that stand for a class with settings.
PRESETS: dict[str, dict[str, Any]] = {
    "switch": {"name": "top-k", "k": 1, "renorm": False, "jitter": 0.01},
    "noisy-top-k": {"name": "top-k", "noise": "learned"},
    "v-moe": {"name": "top-k", "noise": 1.0, "renorm": False},
    "loss-free": {"name": "top-k", "score": "sigmoid", "bias_rate": 1e-3},
}

SPANNING = ("recurrent",)
"""Names of routers that all layers of a model share: for `to_moe`, not for a layer by itself."""


class RouterModule(nn.Module):
    """Base of the routers here: settings first, parameters once the layer's sizes are known.

    A router is made with its settings alone, ``TopK(k=2)``; `bind` gives it the hidden size and
    the number of experts and creates its parameters. `MoE` and `to_moe` call `bind`.
    """

    name: ClassVar[str] = ""
    is_causal: ClassVar[bool] = True
    is_causal_in_training: ClassVar[bool] = True
    varies: ClassVar[bool] = False
    """Whether tokens differ in how many experts they choose."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            ROUTERS[name] = cls

    def __post_init__(self) -> None:
        # Subclasses are dataclasses, so that their settings are declared once.
        nn.Module.__init__(self)
        self.hidden = 0
        self.n_experts = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def bind(self, hidden: int, n_experts: int) -> Self:
        """Create the parameters for `hidden` features and `n_experts` experts; returns itself."""
        if hidden < 1 or n_experts < 1:
            raise DataError(
                f"hidden and n_experts must be at least 1, got {hidden} and {n_experts}"
            )
        self.hidden, self.n_experts = hidden, n_experts
        self.build(hidden, n_experts)
        return self

    def build(self, hidden: int, n_experts: int) -> None:
        """Create parameters; called once, by `bind`."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the name and the constructor's arguments, JSON-able."""
        own = {item.name: getattr(self, item.name) for item in fields(cast(Any, self))}
        return {"name": self.name, **own}

    @property
    def active_experts(self) -> float:
        """How many experts a token uses, on average if it varies."""
        return float(getattr(self, "k", self.n_experts))

    def update(self, group: Any = None) -> None:
        """Adapt what has no gradient; call after each optimizer step. Most routers do nothing."""

    def random(self, sample: Callable[..., Tensor], like: Tensor) -> Tensor:
        """Draw numbers of the shape of `like` with `torch.rand` or `torch.randn`.

        With ``seed=None`` they come from torch's own generator, as dropout's do, so that gradient
        checkpointing draws the same ones again; with a seed, from a generator of this router.

        Raises
        ------
        bakeoff.errors.ModelError
            If gradient checkpointing asks for them again and there is a seed.
        """
        generator = None
        if getattr(self, "seed", None) is not None:
            check_not_recomputed()
            generator = self._generators.get(like.device)
            if generator is None:
                generator = torch.Generator(like.device).manual_seed(int(cast(Any, self).seed))
                self._generators[like.device] = generator
        return sample(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": {}}  # generators can be neither copied nor pickled

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings().items())


def make_router(router: str | dict[str, Any] | Router, hidden: int, n_experts: int) -> Router:
    """Return a router with its parameters.

    Parameters
    ----------
    router
        A name, a dict with ``name`` and settings, or a router, bound or not.
    hidden, n_experts
        What it is bound to if it is not yet.

    Raises
    ------
    bakeoff.errors.DataError
        If the name or a setting is unknown (lists those that exist), or a router was made for
        another number of experts.

    Examples
    --------
    >>> make_router({"name": "top-k", "k": 1}, hidden=16, n_experts=4).n_experts
    4
    """
    made: Any = router
    if isinstance(made, str):
        made = {"name": made}
    if isinstance(made, dict):
        name = made.get("name")
        if name in PRESETS:
            made = {**PRESETS[name], **{key: made[key] for key in made if key != "name"}}
            name = made["name"]
        if name not in ROUTERS:
            # Names of families that are not imported yet are found by importing them.
            _import_all()
        if name in SPANNING:
            raise DataError(
                f"router {name!r} spans the layers of a model: use it in to_moe(model, "
                f"router={name!r}), or give each layer its part, RecurrentRouter(...).layers()[i]"
            )
        if name not in ROUTERS:
            known = ", ".join(sorted([*ROUTERS, *PRESETS, *SPANNING]))
            raise DataError(f"unknown router {name!r}; there are: {known}")
        settings = {key: value for key, value in made.items() if key != "name"}
        try:
            made = ROUTERS[name](**settings)
        except TypeError:
            accepted = ", ".join(inspect.signature(ROUTERS[name]).parameters)
            raise DataError(
                f"router {name!r} got settings {settings}; it accepts: {accepted}"
            ) from None
    if isinstance(made, RouterModule) and made.n_experts == 0:
        made.bind(hidden, n_experts)
    if not callable(made) or not hasattr(made, "n_experts"):
        raise DataError(
            "router must be a name, a dict with a name, or a callable with n_experts, got "
            f"{type(made).__name__}"
        )
    if made.n_experts != n_experts:
        raise DataError(f"router is made for {made.n_experts} experts, the layer has {n_experts}")
    return cast(Router, made)


def _import_all() -> None:
    from bakeoff.experts import assignment_routers, fixed_routers, soft_routers  # noqa: F401


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the ``(T, k)`` indices of the largest of ``(T, N)`` scores, largest first.

    Equal scores are taken from the lowest index on, which `torch.topk` does not promise.
    """
    if k > 4:
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    # For few choices, repeated maxima cost less than sorting; `max` returns the first of equals.
    # Columns that a group limit masked with -inf stay above those that were chosen.
    left, chosen = scores.detach().clamp_min(torch.finfo(scores.dtype).min), []
    for step in range(k):
        index = left.max(dim=1).indices[:, None]
        chosen.append(index)
        if step + 1 < k:
            left.scatter_(1, index, -math.inf)
    return torch.cat(chosen, dim=1)


def check_finite(logits: Tensor) -> None:
    """Raise if a logit is not finite."""
    finite = torch.isfinite(logits).all()
    if logits.is_cuda:  # without waiting for the device
        torch._assert_async(finite, "the router's logits are not all finite")
    elif not finite:
        raise DataError(
            "the router's logits are not all finite: the hidden states or the gate's weights "
            "hold NaN or infinity"
        )


def check_gradient(has_gradient: bool, gates: Iterable[Tensor]) -> None:
    """Raise if balance losses would be constants while there are gates to train.

    Reentrant checkpointing runs layers without gradients at first: what is made of their routing
    outside of them is cut off.
    """
    if not has_gradient and torch.is_grad_enabled() and any(gate.requires_grad for gate in gates):
        raise ModelError(
            "the balance losses carry no gradient: use gradient checkpointing with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}; to read the losses of a pass "
            "without gradients, read them without gradients too"
        )


def in_backward() -> bool:
    """Return whether autograd is running: then a forward pass is a recomputation."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def check_not_recomputed() -> None:
    """Raise where gradient checkpointing runs a layer again: a seed of its own goes on instead."""
    if in_backward():
        raise ModelError(
            "with a seed of its own, a router or layer draws other numbers when gradient "
            "checkpointing runs it again: give it seed=None"
        )


def without_padding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return `hidden` with zeros at padding, which may hold anything, NaN included."""
    return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)


def routed(
    logits: Tensor,
    probs: Tensor,
    indices: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    aux: dict[str, Tensor] | None = None,
) -> Routing:
    """Return a `Routing` in which padding goes nowhere."""
    if mask is not None:
        indices = indices.masked_fill(~mask[:, None], -1)
    weights = weights.masked_fill(indices < 0, 0.0)
    return Routing(logits, probs, indices, weights, aux or {})


def new_gate(n_experts: int, hidden: int) -> nn.Parameter:
    """Return ``(n_experts, hidden)`` float32 weights drawn from Normal(0, 0.02)."""
    return nn.Parameter(torch.empty(n_experts, hidden).normal_(std=0.02))


def at_least_float32(values: Tensor) -> Tensor:
    """Return values of lower precision as float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def in_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden @ weight.T`` in float32 (float64 stays), whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = at_least_float32(hidden)
        return F.linear(hidden, weight.to(hidden.dtype))


@dataclass(eq=False, repr=False)
class TopK(RouterModule, name="top-k"):
    """Each token goes to its k best experts; the common choice, with its usual variants.

    Parameters
    ----------
    k
        Experts per token.
    score
        ``"softmax"`` over all experts, or ``"sigmoid"`` of each logit alone.
    renorm
        Divide the k weights by their sum. With softmax this equals a softmax over the k logits
        (Mixtral); without, the weight is the probability among all experts (Switch, OLMoE). None
        means ``k > 1``: a single renormalised softmax weight is always 1 and gives the router no
        gradient.
    noise
        Added to the logits in training. A number s: Gaussian of standard deviation s / N (V-MoE).
        ``"learned"``: Gaussian of deviation ``softplus(x W_noise) + 0.01`` (Shazeer et al.).
    jitter
        The gate's input is multiplied by uniform noise from 1 - jitter to 1 + jitter in training.
    temperature
        Divides the logits.
    standardise
        Subtract each token's mean logit and divide by its deviation (Skywork-MoE).
    groups, groups_kept
        Group-limited routing: experts in `groups` consecutive groups, of which each token keeps
        the `groups_kept` whose best ``k // groups_kept`` scores sum highest.
    bias_rate
        Above 0, balance without a loss: a bias per expert is added to the scores for choosing, not
        for weighting, and `update` moves it by this much towards the mean load.
    scale
        Multiplies the weights.
    seed
        For noise and jitter; None draws from torch's own generator.

    Raises
    ------
    bakeoff.errors.DataError
        On impossible settings; in `bind` if k exceeds the experts or groups do not divide them; in
        the call if logits are not finite.

    Notes
    -----
    Of equal scores the lowest expert index wins. Logits are computed in float32.

    References
    ----------
    Noam Shazeer et al. "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
    Layer". ICLR 2017. arXiv:1701.06538. William Fedus, Barret Zoph and Noam Shazeer. "Switch
    Transformers". JMLR 2022. arXiv:2101.03961. Lean Wang et al. "Auxiliary-Loss-Free Load
    Balancing Strategy for Mixture-of-Experts". 2024. arXiv:2408.15664. Weilin Cai et al. "A Survey
    on Mixture of Experts in Large Language Models". TKDE 2025. arXiv:2407.06204.

    Examples
    --------
    >>> router = TopK(k=2).bind(hidden=8, n_experts=4)
    >>> routing = router(torch.randn(5, 8))
    >>> routing.indices.shape, int(routing.counts.sum())
    (torch.Size([5, 2]), 10)
    """

    k: int = 2
    score: str = "softmax"
    renorm: bool | None = None
    noise: float | str = 0.0
    jitter: float = 0.0
    temperature: float = 1.0
    standardise: bool = False
    groups: int | None = None
    groups_kept: int = 1
    bias_rate: float = 0.0
    scale: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise DataError(f"k must be at least 1, got {self.k}")
        if self.score not in ("softmax", "sigmoid"):
            raise DataError(f"score must be 'softmax' or 'sigmoid', got {self.score!r}")
        if isinstance(self.noise, str) and self.noise != "learned":
            raise DataError(f"noise must be a number or 'learned', got {self.noise!r}")
        if not isinstance(self.noise, str) and self.noise < 0:
            raise DataError(f"noise must not be negative, got {self.noise}")
        if not 0 <= self.jitter < 1 or self.temperature <= 0 or self.bias_rate < 0:
            raise DataError(
                "jitter must be in [0, 1), temperature above 0 and bias_rate at least 0, got "
                f"{self.jitter}, {self.temperature} and {self.bias_rate}"
            )
        if self.groups is not None and (
            not 1 <= self.groups_kept <= self.groups or self.k % self.groups_kept
        ):
            raise DataError(
                f"groups_kept must be from 1 to groups and divide k, got groups={self.groups}, "
                f"groups_kept={self.groups_kept}, k={self.k}"
            )
        if self.k == 1 and self.renorm:
            warnings.warn(
                "renorm=True with k=1 makes every weight 1: the router gets no gradient from the "
                "model's loss",
                stacklevel=3,
            )

    @property
    def n_choices(self) -> int:
        """How many columns the logits have."""
        return self.n_experts

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate, and the noise gate and the bias where asked for."""
        choices = self.n_choices
        if self.k > choices:
            raise DataError(f"k is {self.k}, but there are only {choices} experts to choose from")
        if self.groups is not None:
            if choices % self.groups:
                raise DataError(f"groups={self.groups} does not divide {choices} experts")
            if self.k > self.groups_kept * (choices // self.groups):
                raise DataError(
                    f"k is {self.k}, but {self.groups_kept} of {self.groups} groups hold only "
                    f"{self.groups_kept * (choices // self.groups)} experts"
                )
        self.build_gate(hidden, choices)
        if self.noise == "learned":
            self.noise_weight = nn.Parameter(torch.zeros(choices, hidden))
        if self.bias_rate:
            self.bias = nn.Buffer(torch.zeros(choices))
            self.load = nn.Buffer(torch.zeros(choices, dtype=torch.int64), persistent=False)

    def build_gate(self, hidden: int, n_choices: int) -> None:
        """Create what `logits` needs."""
        self.weight = new_gate(n_choices, hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The bias stays in float32 when the model is converted: small steps would be rounded away.
        before = self._buffers.get("bias")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers.get("bias")
        if before is not None and after is not None and after.dtype != before.dtype:
            self._buffers["bias"] = before.to(after.device)
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``(T, N)`` float32 scores."""
        return in_float32(hidden, self.weight)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        hidden = without_padding(hidden, mask)
        gated = hidden
        if self.training and self.jitter:
            gated = at_least_float32(hidden)
            gated = gated * (1 + self.jitter * (2 * self.random(torch.rand, gated) - 1))
        logits = self.logits(gated)
        check_finite(logits)
        clean = logits / self.temperature
        if self.standardise:
            deviation = clean.std(dim=1, keepdim=True, correction=0)
            clean = (clean - clean.mean(dim=1, keepdim=True)) / deviation.clamp_min(1e-6)
        scored, aux = self._with_noise(clean, hidden)
        scores, probs = self._score(scored)
        indices = self._choose(scored, scores)
        weights = self._weigh(scored, scores, indices)
        routing = routed(logits, probs, indices, weights * self.scale, mask, aux)
        if self.training and self.bias_rate:
            self.load.add_(routing.counts)
        return routing

    def _score(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, and what they are as probabilities."""
        if self.score == "softmax":
            probs = logits.softmax(dim=1)
            return probs, probs
        scores = logits.sigmoid()
        return scores, scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-20)

    def _with_noise(self, clean: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training or not self.noise:
            return clean, {}
        if self.noise == "learned":
            deviation = F.softplus(in_float32(hidden, self.noise_weight)) + 0.01
        else:
            deviation = torch.full_like(clean, float(self.noise) / clean.shape[1])
        noisy = clean + self.random(torch.randn, clean) * deviation
        return noisy, {
            "clean_logits": clean,
            "clean_probs": self._score(clean)[1],
            "noisy_logits": noisy,
            "noise_std": deviation,
        }

    def _choose(self, scored: Tensor, scores: Tensor) -> Tensor:
        # Softmax keeps the order of the logits but can round different ones to the same number.
        preference = scores.detach()
        if self.bias_rate:
            preference = preference + self.bias
        elif self.groups is None:
            preference = scored.detach()
        if self.groups is not None:
            grouped = preference.view(len(preference), self.groups, -1)
            best = min(self.k // self.groups_kept, grouped.shape[2])
            strength = grouped.topk(best, dim=2).values.sum(dim=2)
            kept = torch.zeros_like(strength, dtype=torch.bool)
            kept.scatter_(1, top_k(strength, self.groups_kept), True)
            preference = grouped.masked_fill(~kept[:, :, None], -math.inf).flatten(1)
        return top_k(preference, self.k)

    @property
    def _divides(self) -> bool:
        return self.k > 1 if self.renorm is None else self.renorm

    def _weigh(self, scored: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        if not self._divides:
            return scores.gather(1, indices)
        if self.score == "softmax":
            return scored.gather(1, indices).softmax(dim=1)
        weights = scores.gather(1, indices)
        return weights / (weights.sum(dim=1, keepdim=True) + 1e-20)

    @torch.no_grad()
    def update(self, group: Any = None) -> None:
        """Move the bias towards the mean load, and forget the load.

        Loads are summed over the process group first, so that all replicas keep the same bias.
        """
        if not self.bias_rate:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load, group=group)
        load = self.load.double()
        self.bias.add_(self.bias_rate * torch.sign(load.mean() - load).to(self.bias.dtype))
        self.load.zero_()


@dataclass(eq=False, repr=False)
class CosineTopK(TopK, name="cosine"):
    """Top-k over cosines of a low-dimensional projection, with a learnable scale (X-MoE).

    Parameters
    ----------
    projection
        Dimensions that tokens are projected to.
    initial_temperature
        The scale starts at ``1 / initial_temperature`` and stays below 100. Other parameters as
        in `TopK`.

    References
    ----------
    Zewen Chi et al. "On the Representation Collapse of Sparse Mixture of Experts". NeurIPS 2022.
    arXiv:2204.09179.
    """

    projection: int = 16
    initial_temperature: float = 0.3

    def build_gate(self, hidden: int, n_choices: int) -> None:
        """Create projection, expert embeddings and scale."""
        self.project = nn.Parameter(torch.empty(self.projection, hidden))
        nn.init.orthogonal_(self.project)
        self.weight = nn.Parameter(torch.randn(n_choices, self.projection))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(self.initial_temperature)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scaled cosines."""
        projected = F.normalize(in_float32(hidden, self.project), dim=1)
        scale = self.log_scale.float().clamp(max=math.log(100.0)).exp()
        return scale * in_float32(projected, F.normalize(self.weight, dim=1))


@dataclass(eq=False, repr=False)
class AttentionTopK(TopK, name="attention"):
    """Top-k over scaled dot products of a token's query with the experts' embeddings.

    Parameters
    ----------
    projection
        Width of queries and embeddings. Other parameters as in `TopK`.
    """

    projection: int = 16

    def build_gate(self, hidden: int, n_choices: int) -> None:
        """Create the query projection and expert embeddings."""
        self.project = nn.Parameter(torch.empty(self.projection, hidden))
        nn.init.normal_(self.project, std=hidden**-0.5)
        self.weight = nn.Parameter(torch.randn(n_choices, self.projection))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return attention scores before the softmax."""
        return in_float32(in_float32(hidden, self.project), self.weight) / math.sqrt(
            self.projection
        )


@dataclass(eq=False, repr=False)
class PerceptronTopK(TopK, name="perceptron"):
    """Top-k over the logits of a perceptron with one inner layer instead of a linear map.

    ``logits = G tanh(W x + b)``.

    Parameters
    ----------
    width
        Inner features. Other parameters as in `TopK`.

    Notes
    -----
    The control for routers that have more parameters or a nonlinearity, such as the recurrent one.
    """

    width: int = 128

    def build_gate(self, hidden: int, n_choices: int) -> None:
        """Create both layers."""
        if self.width < 1:
            raise DataError(f"width must be at least 1, got {self.width}")
        self.inner = nn.Parameter(torch.empty(self.width, hidden))
        nn.init.normal_(self.inner, std=hidden**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(self.width))
        self.weight = new_gate(n_choices, self.width)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the perceptron's output."""
        inner = in_float32(hidden, self.inner)
        return in_float32((inner + self.inner_bias.to(inner.dtype)).tanh(), self.weight)


@dataclass(eq=False, repr=False)
class NullExperts(TopK, name="null-experts"):
    """Top-k among experts and null experts, which cost nothing: a varying number per token.

    Parameters
    ----------
    null
        Number of null experts; k counts them. Renormalised weights are those of the real experts
        among the k, divided by their sum. Indices from ``n_experts`` on are null experts. Other
        parameters as in `TopK`.

    Notes
    -----
    `SwitchBalance` averages the load of the null experts, which then need not be equal.

    References
    ----------
    Zihao Zeng et al. "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts
    Language Models". Findings of EMNLP 2024. arXiv:2406.13233.
    """

    null: int = 4

    @property
    def n_choices(self) -> int:
        """Real and null experts."""
        return self.n_experts + self.null

    @property
    def active_experts(self) -> float:
        """Real experts per token when the load is balanced."""
        return self.k * self.n_experts / self.n_choices

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        routing = super().forward(hidden, mask=mask, **context)
        real = (routing.indices >= 0) & (routing.indices < self.n_experts)
        weights = routing.weights * real
        if self._divides:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-20) * self.scale
        null = torch.arange(self.n_choices, device=hidden.device) >= self.n_experts
        aux = {**routing.aux, "null_experts": null}
        return Routing(routing.logits, routing.probs, routing.indices, weights, aux)


@dataclass(eq=False, repr=False)
class GShardTop2(RouterModule, name="gshard"):
    """Top-2; in training the second expert is used with probability ``min(1, 2 g)``.

    g is the second of the two renormalised weights. Drop the rest with ``MoE(capacity=...,
    drop="position")``.

    Parameters
    ----------
    seed
        None draws from torch's own generator.

    References
    ----------
    Dmitry Lepikhin et al. "GShard: Scaling Giant Models with Conditional Computation and Automatic
    Sharding". ICLR 2021. arXiv:2006.16668.
    """

    seed: int | None = None
    k: ClassVar[int] = 2

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the gate."""
        if n_experts < 2:
            raise DataError(f"GShard's router takes two experts per token, there are {n_experts}")
        self.weight = new_gate(n_experts, hidden)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        logits = in_float32(without_padding(hidden, mask), self.weight)
        check_finite(logits)
        indices = top_k(logits, 2)
        weights = logits.gather(1, indices).softmax(dim=1)
        if self.training:
            second = weights[:, 1].detach()
            used = self.random(torch.rand, second) < 2 * second
            indices = torch.stack([indices[:, 0], indices[:, 1].masked_fill(~used, -1)], dim=1)
        return routed(logits, logits.softmax(dim=1), indices, weights, mask)


@dataclass(eq=False, repr=False)
class Threshold(RouterModule, name="threshold"):
    """Every expert whose cosine score passes its own learnable threshold; at least one (DYNMoE).

    The chosen experts are averaged. The gradient passes the comparison as if it were the
    difference of the two sigmoids.

    References
    ----------
    Yongxin Guo et al. "Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient
    Transformer Models". ICLR 2025. arXiv:2405.14297.

    Notes
    -----
    Adding and removing experts during training is not part of this router. A token that passes no
    threshold goes to its best expert in training too, where the paper lets it pass by.
    """

    varies: ClassVar[bool] = True

    def build(self, hidden: int, n_experts: int) -> None:
        """Create expert directions and thresholds."""
        self.weight = nn.Parameter(torch.randn(n_experts, hidden))
        self.threshold = nn.Parameter(torch.zeros(n_experts))

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        directions = F.normalize(at_least_float32(self.weight), dim=1)
        states = at_least_float32(without_padding(hidden, mask))
        logits = in_float32(F.normalize(states, dim=1), directions)
        check_finite(logits)
        margin = logits.sigmoid() - self.threshold.to(logits).sigmoid()
        passed = (margin > 0).detach()
        passed = passed.scatter(1, top_k(margin, 1), True)
        count = passed.sum(dim=1, keepdim=True)
        straight_through = passed + margin - margin.detach()
        indices = by_preference(passed, margin)
        weights = (straight_through / count).gather(1, indices.clamp_min(0))
        probs = logits.softmax(dim=1)
        return routed(logits, probs, indices, weights, mask, {"directions": directions})


@dataclass(eq=False, repr=False)
class DSelectK(RouterModule, name="dselect-k"):
    """k single-expert selectors, each a smooth product over the bits of the expert's number.

    Training starts with many experts per token and ends with at most k, as the smooth steps
    saturate; `SelectorEntropy` drives them there. Every step is differentiable.

    Parameters
    ----------
    k
        Selectors, an upper bound on the experts per token once the bits are decided.
    gamma
        Width of the smooth step; outside +-gamma / 2 a bit is exactly 0 or 1.

    References
    ----------
    Hussein Hazimeh et al. "DSelect-k: Differentiable Selection in the Mixture of Experts with
    Applications to Multi-Task Learning". NeurIPS 2021. arXiv:2106.03760.
    """

    k: int = 2
    gamma: float = 1.0
    varies: ClassVar[bool] = True

    def build(self, hidden: int, n_experts: int) -> None:
        """Create the bit and mixing weights of the selectors."""
        if not 1 <= self.k <= n_experts or self.gamma <= 0:
            raise DataError(
                f"k must be from 1 to {n_experts} and gamma above 0, got {self.k} and {self.gamma}"
            )
        bits = max(1, math.ceil(math.log2(n_experts)))
        self.bit_weight = nn.Parameter(torch.empty(self.k * bits, hidden))
        nn.init.uniform_(self.bit_weight, -self.gamma / 100, self.gamma / 100)
        self.mix_weight = new_gate(self.k, hidden)
        codes = (torch.arange(n_experts)[:, None] >> torch.arange(bits)) & 1
        self.codes = nn.Buffer(codes.bool(), persistent=False)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` states; see `Router`."""
        hidden = without_padding(hidden, mask)
        raw = in_float32(hidden, self.bit_weight)
        check_finite(raw)
        bit = smooth_step(raw, self.gamma).view(len(raw), self.k, 1, -1)
        selected = torch.where(self.codes, bit, 1 - bit).prod(dim=3)  # (T, k, N)
        mix = in_float32(hidden, self.mix_weight).softmax(dim=1)
        # No matrix product, which autocast would round.
        by_expert = (mix[:, :, None] * selected).sum(dim=1)
        # With a number of experts that is no power of two, mass can lie on codes without expert.
        mass = selected.sum(dim=2)
        entropy = -(selected * selected.clamp_min(1e-20).log()).sum(dim=2)
        aux = {"selector_entropy": entropy.sum(dim=1), "selector_mass": mass}
        probs = by_expert / by_expert.sum(dim=1, keepdim=True).clamp_min(1e-20)
        logits = by_expert.clamp_min(1e-20).log()
        indices = by_preference(by_expert > 0, by_expert)
        weights = by_expert.gather(1, indices.clamp_min(0))
        return routed(logits, probs, indices, weights, mask, aux)


def smooth_step(value: Tensor, gamma: float) -> Tensor:
    """Return the cubic that rises from 0 at -gamma / 2 to 1 at gamma / 2, flat outside."""
    inside = value.clamp(-gamma / 2, gamma / 2)
    return -2 / gamma**3 * inside**3 + 3 / (2 * gamma) * inside + 0.5


def by_preference(chosen: Tensor, preference: Tensor) -> Tensor:
    """Return ``(T, N)`` indices: the columns that are `chosen`, the most preferred first, then -1.

    Equal ones are taken from the lowest index on.

    Examples
    --------
    >>> by_preference(torch.tensor([[True, False, True]]), torch.tensor([[0.2, 0.9, 0.7]])).tolist()
    [[2, 0, -1]]
    """
    ranked = preference.detach().masked_fill(~chosen, -math.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    return order.masked_fill(~chosen.gather(1, order), -1)
