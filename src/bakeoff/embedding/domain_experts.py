"""One encoder for many domains: every feed-forward block copied per domain, the domain known.

A sequence's domain picks its expert in every layer, so that N domains cost the compute of one
dense model. Attention, norms and embeddings are shared. Called `to_domain_experts` and not
``to_moe``, because nothing is routed unless asked for: the user says the domain.
"""

from __future__ import annotations

import contextvars
import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from bakeoff._files import atomic_path, write_text
from bakeoff.embedding.pooling import mean_over_tokens
from bakeoff.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = {
    "slug": "cocitation-experts",
    "title": "Co-citation contrastive training with enforced-routing domain experts",
    "paper": (
        'Hallee et al., "Contrastive Learning and Mixture of Experts Enables Precise Vector '
        'Embeddings in Biological Databases", Scientific Reports 2025, arXiv 2401.15713'
    ),
    "designs": ["domain-experts"],
    "names": [
        "to_domain_experts",
        "DomainEncoder",
        "TanhPooling",
        "MNRLoss",
        "MNRPlusLoss",
        "train_cocitation",
    ],
}

Routing = Literal["enforced", "switch", "topk", "token_topk"]
ROUTINGS: tuple[Routing, ...] = ("enforced", "switch", "topk", "token_topk")

SETTINGS_FILE = "domain_experts.json"
WEIGHTS_FILE = "domain_experts.safetensors"

# What layers call a feed-forward block that takes states and returns what is added to them.
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward")
EXPERT_IDS = "expert_ids"
"""What `forward` calls the domain of each sequence."""


@dataclass(frozen=True)
class DomainExpertsConfig:
    """How a model was given experts.

    Parameters
    ----------
    domains
        Names of the domains; the expert of domain i has index i.
    layers
        Which layers have experts, counted from 0; ``"all"`` for all.
    routing
        Who chooses the expert, see `to_domain_experts`.
    top_k
        Experts per sequence or token, for ``"topk"`` and ``"token_topk"``.
    seed
        Of the routers' initial weights.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...] | Literal["all"] = "all"
    routing: Routing = "enforced"
    top_k: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", checked_domains(self.domains))
        if len(self.domains) < 2:
            raise DataError(
                f"domains must be at least 2, got {list(self.domains)}: one domain is a dense model"
            )
        if self.layers != "all":
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.routing not in ROUTINGS:
            raise DataError(f"routing must be one of {list(ROUTINGS)}, got {self.routing!r}")
        if not 1 <= self.top_k <= len(self.domains):
            raise DataError(
                f"top_k must be between 1 and {len(self.domains)}, the number of experts, got "
                f"{self.top_k!r}"
            )


def to_domain_experts(
    model: PreTrainedModel,
    domains: Sequence[str],
    *,
    layers: Sequence[int] | Literal["all"] = "all",
    routing: Routing = "enforced",
    top_k: int = 2,
    seed: int = 0,
) -> PreTrainedModel:
    """Copy a model's feed-forward blocks once per domain, in place.

    The model's ``forward`` then takes ``expert_ids``, the domain of each sequence as an index. All
    copies are equal at first, so the model gives what it gave before.

    Parameters
    ----------
    model
        Any transformers model whose layers have a block called ``mlp``, ``ffn`` or
        ``feed_forward`` (ModernBERT, Llama and most decoders), or BERT's pair of ``intermediate``
        and ``output`` (BERT, MiniLM, RoBERTa, XLM-R, ELECTRA, MPNet). Dropout and the norm after
        BERT's block stay shared, as norms do everywhere.
    domains
        Their names, at least 2.
    layers
        Which layers get experts, counted from 0 (negative from the end); ``"all"`` for all. One
        layer in the middle is the cheap variant of the paper's first version.
    routing
        ``"enforced"``: `expert_ids` chooses (the published method). The others learn to choose, and
        `expert_ids` may be left out: ``"switch"``, the expert with the largest mean logit over
        tokens; ``"topk"``, the sum of the sequence's best experts weighted by the softmax of those
        means, the weights not scaled up to 1; ``"token_topk"``, each token's best experts, weights
        scaled to 1.
    top_k
        How many experts for ``"topk"`` and ``"token_topk"``.
    seed
        Of the routers' initial weights.

    Returns
    -------
    PreTrainedModel
        The same object.

    Raises
    ------
    DataError
        If there are fewer than 2 domains, one comes twice, or a setting is out of range.
    ModelError
        If the model has experts already, or no feed-forward block is found; names the classes seen.

    Notes
    -----
    ``"switch"`` gets no gradient through the choice, as in the paper's first version: train its
    router by `routing_loss`. Padding takes no part in a mean over tokens here; in the official code
    it did.

    References
    ----------
    Logan Hallee, Rohan Kapur, Arjun Patel, Jason P. Gleghorn and Bohdan B. Khomtchouk.
    "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings in Biological
    Databases". Scientific Reports, 2025. arXiv:2401.15713.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(
    ...     vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
    >>> model = to_domain_experts(BertModel(config).eval(), ["lungs", "skin"])
    >>> ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    >>> states = model(ids, mask, expert_ids=[1, 0]).last_hidden_state
    >>> states.shape
    torch.Size([2, 4, 8])
    """
    if experts_of(model) is not None:
        raise ModelError("model has domain experts already")
    config = DomainExpertsConfig(
        tuple([domains] if isinstance(domains, str) else domains),
        "all" if layers == "all" else tuple(layers),
        routing,
        top_k if routing in ("topk", "token_topk") else 1,
        seed,
    )
    found = _feed_forward_layers(model)
    if not found:
        seen = sorted({type(child).__name__ for child in _layer_like(model)})
        raise ModelError(
            f"no feed-forward block found in {type(model).__name__}: layers of classes {seen} have "
            f"no module called {', '.join(_MLP_NAMES)}, nor intermediate and output"
        )
    chosen = _chosen_layers(config.layers, len(found))
    generator = torch.Generator().manual_seed(seed)
    width = int(model.config.get_text_config().hidden_size)
    for index in chosen:
        layer = found[index]
        for child in layer.children():
            if _takes_any_argument(child):
                child.register_forward_pre_hook(_before_attention, with_kwargs=True)
        _put_experts(layer, config, width, generator)
    model.register_forward_pre_hook(_before_model, with_kwargs=True)
    model.register_forward_hook(_after_model, always_call=True)
    model.domain_experts = config if config.layers == "all" else replace(config, layers=chosen)
    return model


def experts_of(model: nn.Module) -> DomainExpertsConfig | None:
    """Return how a model was given experts, or None."""
    return getattr(model, "domain_experts", None)


def extract_domain(model: PreTrainedModel, domain: str) -> PreTrainedModel:
    """Return a dense copy of a model with experts: what it computes for one domain.

    Parameters
    ----------
    model
        One that `to_domain_experts` converted with ``routing="enforced"``; it is left as it is.
    domain
        Which expert to keep.

    Raises
    ------
    ModelError
        If the model has no experts, or chooses them itself.
    DataError
        If there is no such domain.
    """
    config = _checked_experts(model)
    if config.routing != "enforced":
        raise ModelError(f"routing={config.routing!r} has no expert of one domain to extract")
    index = domain_index(domain, config.domains)
    # Only one expert is copied: the others may be most of the model.
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, DomainExperts):
            for other, expert in enumerate(module.experts):
                if other != index:
                    memo[id(expert)] = nn.Identity()
    dense = copy.deepcopy(model, memo)
    for layer in list(dense.modules()):
        for name, child in list(layer.named_children()):
            if isinstance(child, DomainExperts):
                expert = child.experts[index]
                if isinstance(expert, _TwoStepExpert):
                    setattr(layer, name, expert.intermediate)
                    layer.output.dense = expert.dense
                else:
                    setattr(layer, name, expert)
        _remove_hooks(layer)
    del dense.domain_experts
    return dense


def routing_loss(
    model: PreTrainedModel,
    domain_ids: Tensor | Sequence[int] | None = None,
    *,
    kind: Literal["domain", "balance", "mutual_information"] = "domain",
) -> Tensor:
    """Return an auxiliary loss on the last forward pass's learned routers.

    Parameters
    ----------
    model
        One that `to_domain_experts` converted with a learned routing, after a forward pass.
    domain_ids
        ``(B,)``, the domain of each sequence; not needed for ``"balance"``.
    kind
        ``"domain"``: cross-entropy of the logits, averaged over layers, to the domain.
        ``"balance"``: ``N * sum_e f_e * p_e`` with f_e the share of sequences whose best expert is
        e and p_e the mean probability; 1 where all are used alike. ``"mutual_information"``: minus
        the mutual information of domain and expert, in nats.

    Raises
    ------
    ModelError
        If there are no learned routers, or no forward pass was made.
    DataError
        If `domain_ids` is missing or of another length than the batch.

    Notes
    -----
    The official mutual-information loss is computed from detached logits, so that nothing is
    learned from it; here gradients flow.
    """
    config = _checked_experts(model)
    logits = [
        module.router_logits
        for module in model.modules()
        if isinstance(module, DomainExperts) and module.router_logits is not None
    ]
    if not logits:
        raise ModelError(
            f"routing={config.routing!r} leaves no router logits"
            + ("" if config.routing == "enforced" else ": make a forward pass first")
        )
    stacked = torch.stack(logits).float()  # (layers, B, N)
    n_experts = len(config.domains)
    probabilities = stacked.softmax(dim=-1)
    if kind == "balance":
        share = nn.functional.one_hot(probabilities.flatten(0, 1).argmax(-1), n_experts)
        return n_experts * (share.float().mean(0) * probabilities.flatten(0, 1).mean(0)).sum()
    if domain_ids is None:
        raise DataError(f"domain_ids is missing: kind={kind!r} needs the domain of each sequence")
    ids = _as_ids(domain_ids, stacked.shape[1], n_experts, stacked.device)
    if kind == "domain":
        return nn.functional.cross_entropy(stacked.mean(dim=0), ids)
    if kind != "mutual_information":
        raise DataError(f"kind must be 'domain', 'balance' or 'mutual_information', got {kind!r}")
    of_domain = nn.functional.one_hot(ids, n_experts).float()
    joint = torch.einsum("bt,lbe->te", of_domain, probabilities) / stacked.shape[:2].numel()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # Domains that the batch lacks have no entry; xlogy takes 0 * log 0 for 0, gradients included.
    present = apart > 0
    return -torch.xlogy(joint[present], joint[present] / apart[present]).sum()


# --- the block with experts -------------------------------------------------------------------


class DomainExperts(nn.Module):
    """N copies of a feed-forward block, one of which serves each sequence.

    Parameters
    ----------
    experts
        The copies; each takes ``(n, T, d)`` and returns the same shape.
    hidden_size
        d.
    routing, top_k
        As in `to_domain_experts`.
    generator
        Of the router's initial weights.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        hidden_size: int,
        *,
        routing: Routing = "enforced",
        top_k: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.routing = routing
        self.top_k = top_k
        self.gate: nn.Linear | None = None
        self.router_logits: Tensor | None = None
        if routing != "enforced":
            parameter = next(self.experts.parameters())
            self.gate = nn.Linear(hidden_size, len(self.experts), bias=False)
            with torch.no_grad():
                self.gate.weight.normal_(std=hidden_size**-0.5, generator=generator)
            self.gate.to(parameter.device, parameter.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the experts' outputs, ``(B, T, d)``, for states ``(B, T, d)``."""
        batch = _current.get()
        if batch is None:
            raise DataError(
                "expert_ids is missing: call the model itself, with expert_ids=(B,), and not its "
                "layers or its forward method"
            )
        if hidden_states.dim() != 3 or len(hidden_states) != batch.size:
            raise ModelError(
                f"experts take padded states (B, T, d) with B={batch.size}, got shape "
                f"{tuple(hidden_states.shape)}: load the model with "
                'attn_implementation="sdpa" rather than flash attention without padding'
            )
        if self.gate is None:
            return self._grouped(hidden_states, batch.plan)
        logits = self.gate(hidden_states)
        of_sequences = mean_over_tokens(logits, batch.mask_for(hidden_states))
        # What a module keeps would be shared by threads and copied with it: only while training.
        self.router_logits = of_sequences if torch.is_grad_enabled() else None
        if self.routing == "switch":
            return self._grouped(hidden_states, _Plan.of(of_sequences.argmax(dim=-1)))
        if self.routing == "topk":
            weights, chosen = of_sequences.float().softmax(dim=-1).topk(self.top_k, dim=-1)
            return self._weighted(hidden_states, weights, chosen)
        weights, chosen = logits.flatten(0, 1).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        tokens = hidden_states.flatten(0, 1)[:, None]  # (B * T, 1, d): each token by itself
        return self._weighted(tokens, weights, chosen).view_as(hidden_states)

    def _grouped(self, rows: Tensor, plan: _Plan) -> Tensor:
        """Run each expert once, on all of its rows together."""
        if len(plan.sizes) == 1:
            (expert,) = plan.sizes
            return cast("Tensor", self.experts[expert](rows))
        if plan.order is not None:
            rows = rows.index_select(0, plan.order)
        parts = torch.split(rows, list(plan.sizes.values()))
        done = torch.cat(
            [self.experts[expert](part) for expert, part in zip(plan.sizes, parts, strict=True)]
        )
        return done if plan.inverse is None else done.index_select(0, plan.inverse)

    def _weighted(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return each row's weighted sum over its chosen experts, (n, k) each."""
        n, k = chosen.shape
        repeated = rows.repeat_interleave(k, dim=0)
        outputs = self._grouped(repeated, _Plan.of(chosen.flatten()))
        weighted = outputs.float() * weights.flatten()[:, None, None]
        return weighted.view(n, k, *rows.shape[1:]).sum(dim=1).to(rows.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # The logits hang on a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "router_logits": None}


class _TwoStepExpert(nn.Module):
    """BERT's feed-forward block up to its second projection, without dropout, norm and residual."""

    def __init__(self, intermediate: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.dense = dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast("Tensor", self.dense(self.intermediate(hidden_states)))


@dataclass(frozen=True)
class _Plan:
    """How rows are brought together by expert: how many each gets, in which order, and back."""

    sizes: dict[int, int]
    order: Tensor | None
    inverse: Tensor | None

    @classmethod
    def of(cls, ids: Tensor) -> _Plan:
        counts = ids.bincount().tolist()  # the one look at the values
        sizes = {expert: n for expert, n in enumerate(counts) if n}
        if len(sizes) == 1 or bool((ids[1:] >= ids[:-1]).all()):
            return cls(sizes, None, None)
        order = ids.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(sizes, order, inverse)


@dataclass(frozen=True)
class _Batch:
    """What the experts of one forward pass need to know."""

    size: int
    plan: _Plan
    mask: Tensor | None

    def mask_for(self, states: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape != states.shape[:2]:
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return self.mask


# Per thread, so that two of them can run one model; per pass, set by the hooks below.
_current: contextvars.ContextVar[_Batch | None] = contextvars.ContextVar("_current", default=None)


@contextmanager
def routed(model: nn.Module, ids: Any, inputs: Tensor, mask: Tensor | None) -> Iterator[Any]:
    """Tell a model's experts what to do, for callers of ``model.forward`` that skip its hooks.

    Parameters
    ----------
    model
        One that `to_domain_experts` converted.
    ids
        ``(B,)``, the domain of each sequence; None with a learned routing.
    inputs
        ``(B, ...)``, of which only the number and the device count.
    mask
        ``(B, T)``, non-zero at real tokens; None for all.

    Yields
    ------
    object
        To be passed as ``expert_ids``, so that layers which gradient checkpointing runs again know
        it too.
    """
    token = _current.set(_batch_of(_checked_experts(model), ids, inputs, mask))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def _batch_of(config: DomainExpertsConfig, ids: Any, inputs: Tensor, mask: Any) -> _Batch:
    size = len(inputs)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask.bool()
        # A row of padding alone has no mean; its states are never read, so any tokens will do.
        mask = mask | ~mask.any(dim=1, keepdim=True)
    else:
        mask = None
    if config.routing != "enforced":
        return _Batch(size, _Plan({0: size}, None, None), mask)
    if ids is None:
        raise DataError(
            f"expert_ids is missing: give the domain of each sequence, 0 to "
            f"{len(config.domains) - 1} for {', '.join(config.domains)}"
        )
    return _Batch(size, _Plan.of(_as_ids(ids, size, len(config.domains), inputs.device)), mask)


def _before_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = kwargs.pop(EXPERT_IDS, None)
    batch = ids
    if not isinstance(ids, _Batch):
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if not isinstance(inputs, Tensor):
            raise DataError("input_ids or inputs_embeds is missing")
        batch = _batch_of(_checked_experts(model), ids, inputs, given.get("attention_mask"))
    _current.set(batch)
    if _takes_any_argument(model):
        kwargs[EXPERT_IDS] = batch
    return args, kwargs


def _before_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # A layer passes what it does not know on to its attention, also when gradient checkpointing
    # runs it again, when the pass it belongs to is long over; and its experts come later.
    batch = kwargs.pop(EXPERT_IDS, None)
    if isinstance(batch, _Batch):
        _current.set(batch)
    return args, kwargs


def _takes_any_argument(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def _after_model(model: nn.Module, args: Any, output: Any) -> None:
    _current.set(None)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
            del hooks[key]
            for marks in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                marks.pop(key, None)


_HOOKS: tuple[Callable[..., Any], ...] = (_before_model, _before_attention, _after_model)


def _as_ids(given: Any, size: int, n_experts: int, device: torch.device) -> Tensor:
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"expert_ids must be integers, got {given!r}") from None
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise DataError(f"expert_ids must be integers, got dtype {ids.dtype}")
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if tuple(ids.shape) != (size,):
        raise DataError(f"expert_ids must be ({size},), one per sequence, got {tuple(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < n_experts:
        raise DataError(
            f"expert_ids must be between 0 and {n_experts - 1}, got values from {int(ids.min())} "
            f"to {int(ids.max())}"
        )
    return ids.to(device, torch.int64)


# --- finding and replacing --------------------------------------------------------------------


def _layer_like(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _feed_forward_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that have a feed-forward block, in order."""
    return [layer for layer in _layer_like(model) if _is_two_step(layer) or _mlp_name(layer)]


def _is_two_step(layer: nn.Module) -> bool:
    children = dict(layer.named_children())
    return {"intermediate", "output"} <= children.keys() and isinstance(
        getattr(children["output"], "dense", None), nn.Linear
    )


def _mlp_name(layer: nn.Module) -> str | None:
    for name in _MLP_NAMES:
        block = getattr(layer, name, None)
        # A block that holds experts already returns more than states; a lone linear layer (ALBERT)
        # is half a block.
        if (
            isinstance(block, nn.Module)
            and not isinstance(block, nn.Linear)
            and not hasattr(block, "experts")
            and any(True for _ in block.parameters())
        ):
            return name
    return None


def _chosen_layers(layers: tuple[int, ...] | Literal["all"], n: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(n))
    wrong = [index for index in layers if isinstance(index, bool) or not -n <= index < n]
    if wrong or not layers:
        raise DataError(f"layers must be 'all' or indices from {-n} to {n - 1}, got {list(layers)}")
    return tuple(sorted({index % n for index in layers}))


def _put_experts(
    layer: nn.Module, config: DomainExpertsConfig, width: int, generator: torch.Generator
) -> None:
    if _is_two_step(layer):
        output = cast("nn.Module", layer.output)
        name, block = (
            "intermediate",
            _TwoStepExpert(cast("nn.Module", layer.intermediate), cast("nn.Module", output.dense)),
        )
        output.dense = nn.Identity()
    else:
        name = cast("str", _mlp_name(layer))
        block = getattr(layer, name)
    # The first expert is the block itself, so that nothing is held twice.
    experts = [block, *(copy.deepcopy(block) for _ in config.domains[1:])]
    module = DomainExperts(
        experts, width, routing=config.routing, top_k=config.top_k, generator=generator
    )
    setattr(layer, name, module.train(layer.training))


def _checked_experts(model: nn.Module) -> DomainExpertsConfig:
    config = experts_of(model)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no domain experts: see to_domain_experts")
    return config


def checked_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """Return the domains, or raise DataError if one is blank, no text, or comes twice."""
    names = tuple(domains)
    if not names or any(not isinstance(name, str) or not name.strip() for name in names):
        raise DataError(f"domains must be names, got {list(names)}")
    if len(set(names)) < len(names):
        raise DataError(f"domains must be distinct, got {list(names)}")
    return names


def domain_index(domain: str, domains: Sequence[str]) -> int:
    """Return a domain's index, or raise DataError that lists the known ones."""
    if domain not in domains:
        raise DataError(f"unknown domain {domain!r}; known are {', '.join(domains)}")
    return list(domains).index(domain)


# --- saving -----------------------------------------------------------------------------------


def save_domain_experts(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model with experts: ``config.json``, ``domain_experts.json`` and ``.safetensors``.

    The weights have a name of their own, so that no other tool loads them as a dense model and
    leaves the experts out.

    Parameters
    ----------
    model
        One that `to_domain_experts` converted.
    folder
        Created if need be.
    """
    from safetensors.torch import save_model

    config = _checked_experts(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_model(model, str(temporary))
    settings = {
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        **asdict(config),
    }
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def load_domain_experts(folder: str | Path, **from_config: Any) -> PreTrainedModel:
    """Read a model that `save_domain_experts` wrote, in eval mode.

    Parameters
    ----------
    folder
        Where it lies.
    from_config
        For transformers, e.g. ``attn_implementation="eager"``.

    Raises
    ------
    ModelError
        If the folder holds no such model, or its files do not fit each other.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        name, dtype = settings.pop("model_class"), settings.pop("dtype")
        layers = settings["layers"]
        config = DomainExpertsConfig(
            **{
                **settings,
                "domains": tuple(settings["domains"]),
                "layers": layers if layers == "all" else tuple(layers),
            }
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} holds no model with domain experts: {error}") from error
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"{folder}: transformers has no model class {name!r}")
    base_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = cast("Any", kind)._from_config(base_config, dtype=getattr(torch, dtype), **from_config)
    to_domain_experts(
        model, config.domains, layers=config.layers, routing=config.routing,
        top_k=config.top_k, seed=config.seed,
    )  # fmt: skip
    try:
        load_model(model, folder / WEIGHTS_FILE)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit the model: {error}") from error
    return cast("PreTrainedModel", model.eval())


# --- a dense model of the same size -----------------------------------------------------------


@torch.no_grad()
def widen_feed_forward(model: PreTrainedModel, factor: int, *, seed: int = 0) -> PreTrainedModel:
    """Make every feed-forward block `factor` times as wide, in place: the dense rival of experts.

    With ``factor=N`` the model has the parameters of N experts per layer, all of them used for
    every text. New units read random directions, as long as the old ones' on average, and write
    nothing at first, so that the model gives what it gave before.

    Parameters
    ----------
    model
        One whose blocks are BERT's, ModernBERT's (``Wi``, ``Wo``) or Llama's (``gate_proj``,
        ``up_proj``, ``down_proj``).
    factor
        At least 2.
    seed
        Of the new units.

    Returns
    -------
    PreTrainedModel
        The same object, with its configuration changed, so that it saves and loads as ever.

    Raises
    ------
    DataError
        If `factor` is below 2.
    ModelError
        If the blocks are of another kind.
    """
    if isinstance(factor, bool) or factor < 2:
        raise DataError(f"factor must be at least 2, got {factor!r}")
    if experts_of(model) is not None:
        raise ModelError("model has domain experts: widen a dense one")
    layers = _feed_forward_layers(model)
    if not layers:
        raise ModelError(f"no feed-forward block found in {type(model).__name__}")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        readers, writer, n_parts = _projections(layer)
        for linear in readers:
            _grow_rows(linear, factor, n_parts, generator)
        extra = writer.weight.new_zeros(len(writer.weight), (factor - 1) * writer.in_features)
        writer.weight = nn.Parameter(torch.cat([writer.weight, extra], dim=1))
        writer.in_features *= factor
    config = model.config.get_text_config()
    config.intermediate_size *= factor
    for module in model.modules():  # some blocks keep the number, for their own use
        if isinstance(getattr(module, "intermediate_size", None), int):
            module.intermediate_size = config.intermediate_size
    return model


def _projections(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear, int]:
    """Return what reads and what writes, and of how many parts a reader's output is."""
    if _is_two_step(layer):
        block: Mapping[str, Any] = {
            "Wi": layer.intermediate.dense,  # type: ignore[union-attr]
            "Wo": layer.output.dense,  # type: ignore[union-attr]
        }
        n_parts = 1
    else:
        block = dict(getattr(layer, cast("str", _mlp_name(layer))).named_children())
        n_parts = 2
    for readers, writer, parts in (
        (("Wi",), "Wo", n_parts),
        (("gate_proj", "up_proj"), "down_proj", 1),
    ):
        if all(isinstance(block.get(name), nn.Linear) for name in (*readers, writer)):
            return [block[name] for name in readers], block[writer], parts
    raise ModelError(
        f"feed-forward block of {type(layer).__name__} has {sorted(block)}, not Wi and Wo, nor "
        "gate_proj, up_proj and down_proj"
    )


def _grow_rows(linear: nn.Linear, factor: int, n_parts: int, generator: torch.Generator) -> None:
    def grown(value: Tensor, new: Callable[[Tensor], Tensor]) -> nn.Parameter:
        parts = value.chunk(n_parts)
        return nn.Parameter(
            torch.cat(
                [torch.cat([part, *(new(part) for _ in range(factor - 1))]) for part in parts]
            )
        )

    def drawn(part: Tensor) -> Tensor:
        noise = torch.randn(part.shape, generator=generator)
        return (noise * part.float().std().cpu()).to(part.device, part.dtype)

    linear.weight = grown(linear.weight, drawn)
    if linear.bias is not None:
        linear.bias = grown(linear.bias, torch.zeros_like)
    linear.out_features *= factor
