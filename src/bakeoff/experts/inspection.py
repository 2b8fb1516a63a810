"""What the experts of a trained model do: load, domains, certainty, drops, redundancy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.mixture_of_experts import MoE, router_k
from bakeoff.experts.protocol import Routing
from bakeoff.experts.recurrent_router import RecurrentRouter
from bakeoff.experts.soft_routers import Dense, MergedExperts, SoftMoE

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerReport:
    """One mixture layer.

    Parameters
    ----------
    name
        Of the module.
    counts
        ``(N, D)`` int64: assignments to each expert by tokens of each domain, before drops.
    entropy
        Mean entropy of a token's probabilities, divided by log N: 1 is undecided, 0 is certain.
    drop_rate
        Share of the assignments that capacity dropped.
    similarity
        Mean cosine between the experts' weights, pair by pair; NaN where that is not known. Of a
        Read-ME model: the share of channels that two experts have in common.
    soft
        Every token visits every expert: `counts` are of each token's heaviest one.
    """

    name: str
    counts: NDArray[np.int64]
    entropy: float
    drop_rate: float
    similarity: float
    soft: bool = False

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.counts)

    @property
    def load(self) -> Floats:
        """``(N,)`` share of the assignments; sums to 1."""
        total = self.counts.sum()
        return np.asarray(self.counts.sum(axis=1) / max(total, 1))

    @property
    def max_over_mean(self) -> float:
        """Heaviest load over mean load."""
        return float(self.load.max() * len(self.load))

    @property
    def by_domain(self) -> Floats:
        """``(N, D)`` share of each domain's assignments; columns sum to 1."""
        totals = self.counts.sum(axis=0, keepdims=True)
        return np.asarray(self.counts / np.maximum(totals, 1))

    @property
    def specialisation(self) -> float:
        """How differently the domains use the experts, from 0 (alike) to 1 (disjoint).

        The Jensen-Shannon divergence of the domains' distributions over experts, each domain
        weighing the same, divided by its maximum, log D. NaN with fewer than two domains.
        """
        used = self.by_domain[:, self.counts.sum(axis=0) > 0]
        if used.shape[1] < 2:
            return math.nan
        own = np.mean([_entropy(column) for column in used.T])
        return float((_entropy(used.mean(axis=1)) - own) / math.log(used.shape[1]))


@dataclass(frozen=True)
class ExpertReport:
    """All mixture layers of a model.

    Parameters
    ----------
    layers
        In the order of the model.
    domains
        Names of the D domains.
    tokens
        ``(D,)`` tokens seen, without padding.
    redundancy
        ``(L, L)`` normalised mutual information of two layers' first choices for the same tokens:
        1 where one layer's choice tells the other's, 0 where they are independent.
    """

    layers: tuple[LayerReport, ...]
    domains: tuple[str, ...]
    tokens: NDArray[np.int64]
    redundancy: Floats

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists and numbers; NaN becomes None."""
        return {
            "domains": list(self.domains),
            "tokens": self.tokens.tolist(),
            "redundancy": self.redundancy.tolist(),
            "layers": [
                {
                    "name": layer.name,
                    "counts": layer.counts.tolist(),
                    "load": layer.load.tolist(),
                    "max_over_mean": layer.max_over_mean,
                    "by_domain": layer.by_domain.tolist(),
                    "entropy": layer.entropy,
                    "drop_rate": layer.drop_rate,
                    "specialisation": _none_if_nan(layer.specialisation),
                    "similarity": _none_if_nan(layer.similarity),
                    "soft": layer.soft,
                }
                for layer in self.layers
            ],
        }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _entropy(shares: Floats) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


@dataclass
class _Seen:
    """What one layer did in one forward pass."""

    probs: Tensor
    indices: Tensor
    kept: Tensor | None


@dataclass
class _Tally:
    """What one layer did so far."""

    n_experts: int
    n_domains: int
    soft: bool
    counts: Tensor = field(init=False)
    entropy: float = 0.0
    n_tokens: int = 0
    chosen: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.n_experts, self.n_domains, dtype=torch.int64)

    def add(self, seen: _Seen, present: Tensor, domains: Tensor) -> None:
        indices, domains = seen.indices[present], domains[present]
        chosen = (indices >= 0) & (indices < self.n_experts)
        counted, valid = indices, chosen
        if self.soft:
            counted = _heaviest(seen)[present]
            valid = (counted >= 0) & (counted < self.n_experts)
        cell = counted * self.n_domains + domains[:, None]
        found = torch.bincount(cell[valid], minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)
        each = torch.special.entr(seen.probs[present].double()).sum(dim=1)
        self.entropy += float(each.sum())
        self.n_tokens += len(indices)
        self.chosen += int(chosen.sum())
        if seen.kept is not None:
            self.dropped += int((chosen & ~seen.kept[present]).sum())


def _heaviest(seen: _Seen) -> Tensor:
    """Return ``(T, 1)``: the expert of the largest probability, -1 where a token has none."""
    return seen.probs.argmax(dim=1, keepdim=True).where(seen.indices[:, :1] >= 0, -1)


def mixture_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules to watch by name.

    They are `MoE` layers, routers of upcycled models, the one router of a Read-ME model, and
    routers of transformers' mixtures.

    Raises
    ------
    bakeoff.errors.ModelError
        If there are none.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            inside.update(module.modules())
            found[name] = module
        elif module not in inside and (_is_our_router(module) or _is_their_router(module)):
            found[name] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no mixture-of-experts layer: neither a MoE of this "
            "library nor a router of transformers (Mixtral, OLMoE, Qwen-MoE and their kind)"
        )
    return found


def _is_our_router(module: nn.Module) -> bool:
    from bakeoff.experts.read_me import PreGatingRouter
    from bakeoff.experts.upcycled_model import ExpertRouter

    return isinstance(module, PreGatingRouter | ExpertRouter)


def _is_their_router(module: nn.Module) -> bool:
    # transformers' routers return (logits, weights, indices) and say how many experts they have.
    named = type(module).__name__.lower().endswith(("router", "gate"))
    own = isinstance(module, RecurrentRouter)  # all layers', behind theirs
    return named and not own and hasattr(module, "top_k") and hasattr(module, "num_experts")


def _is_soft(module: nn.Module) -> bool:
    """Tell whether every token visits every expert of a layer."""
    k = router_k(module.router) if isinstance(module, MoE) else getattr(module, "top_k", 1)
    if isinstance(module, MoE) and isinstance(module.router, Dense | SoftMoE | MergedExperts):
        k = module.n_experts
    return _n_experts(module) > 1 and k == _n_experts(module)


@contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Seen]]:
    seen: dict[str, _Seen] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def ours(module: nn.Module, args: Any, output: Any) -> None:
            routing = module.routing
            seen[name] = _Seen(routing.probs, routing.indices, module._kept)  # type: ignore[union-attr, arg-type]

        def theirs(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Routing):
                seen[name] = _Seen(output.probs, output.indices, None)
                return
            if isinstance(output, Tensor) and _is_our_router(module):  # logits (B, T, N)
                probs = output.flatten(0, -2).softmax(dim=1)
                seen[name] = _Seen(probs, probs.argmax(dim=1, keepdim=True), None)
                return
            if not isinstance(output, tuple) or len(output) != 3:
                raise ModelError(
                    f"{type(module).__name__} does not return (logits, weights, indices)"
                )
            logits, _, indices = output
            logits = logits.float().reshape(-1, logits.shape[-1])
            probs = logits.softmax(dim=1)
            if hasattr(module, "e_score_correction_bias"):  # DeepSeek's scores are sigmoids
                scores = logits.sigmoid()
                probs = scores / scores.sum(dim=1, keepdim=True)
            seen[name] = _Seen(probs, indices.reshape(len(logits), -1), None)

        return ours if isinstance(layers[name], MoE) else theirs

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inspect_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    domains: Sequence[str] = ("all",),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertReport:
    """Run a model over texts and report what its experts do.

    Parameters
    ----------
    model
        A decoder with `MoE` layers (see `to_moe`), an upcycled or Read-ME model, or one of
        transformers' own mixtures. Runs in evaluation mode without gradients; its mode is restored.
    batches
        Dicts with ``input_ids`` ``(B, L)``, optionally ``attention_mask`` ``(B, L)``, and
        ``domains``, the number of each sequence's domain, ``(B,)``, or of each token's, ``(B, L)``;
        0 if absent.
    domains
        Names of the domains.
    progress
        Called with (batches done, batches in all or 0 if unknown).

    Returns
    -------
    ExpertReport
        Padding counts nowhere.

    Raises
    ------
    bakeoff.errors.ModelError
        If the model has no mixture layer.
    bakeoff.errors.DataError
        If there are no batches or no tokens, or a domain's number is out of range.
    """
    layers = mixture_layers(model)
    sizes = {name: _n_experts(module) for name, module in layers.items()}
    tallies = {
        name: _Tally(size, len(domains), _is_soft(layers[name])) for name, size in sizes.items()
    }
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    joint = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    tokens = torch.zeros(len(domains), dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _watching(layers) as seen:
            total = len(batches) if isinstance(batches, Sequence) else 0
            for done, batch in enumerate(batches, start=1):
                inputs, present, number = _unpack(batch, len(domains))
                model(**inputs)
                tokens += torch.bincount(number[present], minlength=len(domains))
                first = torch.zeros(int(present.sum()), len(joint))
                for name, one in seen.items():
                    one = _Seen(
                        one.probs.cpu(),
                        one.indices.cpu(),
                        None if one.kept is None else one.kept.cpu(),
                    )
                    if len(one.indices) != len(present):
                        raise ModelError(
                            f"{name} routed {len(one.indices)} tokens of {len(present)}"
                        )
                    tallies[name].add(one, present, number)
                    top = (_heaviest(one) if tallies[name].soft else one.indices)[present, 0]
                    real = (top >= 0) & (top < sizes[name])
                    first[real.nonzero()[:, 0], starts[name] + top[real]] = 1.0
                joint += (first.T @ first).double()
                seen.clear()
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(was_training)
    if not int(tokens.sum()):
        raise DataError("batches held no token that is not padding")
    reports = tuple(
        LayerReport(
            name,
            tally.counts.numpy(),
            tally.entropy / max(tally.n_tokens, 1) / max(math.log(max(tally.n_experts, 2)), 1e-9),
            tally.dropped / max(tally.chosen, 1),
            expert_similarity(layers[name], model, name),
            tally.soft,
        )
        for name, tally in tallies.items()
    )
    spans = [slice(starts[name], starts[name] + sizes[name]) for name in layers]
    pairs = [[_shared_information(joint[a, b].numpy()) for b in spans] for a in spans]
    return ExpertReport(reports, tuple(domains), tokens.numpy(), np.array(pairs))


def _n_experts(module: nn.Module) -> int:
    return int(module.n_experts if hasattr(module, "n_experts") else module.num_experts)  # type: ignore[arg-type]


def _unpack(batch: Mapping[str, Any], n_domains: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key not in ("domains", "labels")}
    if "input_ids" not in inputs:
        raise DataError(f"a batch must have input_ids, got {', '.join(batch) or 'nothing'}")
    ids = torch.as_tensor(inputs["input_ids"]).cpu()
    mask = inputs.get("attention_mask")
    present = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).cpu()
    number = torch.as_tensor(batch.get("domains", 0)).cpu()
    if number.ndim == 1 and len(number) == len(ids):
        number = number[:, None]
    elif number.ndim not in (0, 2):
        raise DataError(f"domains must be ({len(ids)},) or {tuple(ids.shape)}")
    number = number.expand(ids.shape).reshape(-1).long()
    if len(number) and not 0 <= int(number.min()) <= int(number.max()) < n_domains:
        raise DataError(
            f"domains must be from 0 to {n_domains - 1}, got {int(number.min())} to "
            f"{int(number.max())}"
        )
    return inputs, present.bool().reshape(-1), number


def _shared_information(joint: Floats) -> float:
    """Return I(A; B) / sqrt(H(A) H(B)) of a table of counts; 0 if a layer never varies."""
    total = joint.sum()
    if not total:
        return 0.0
    table = joint / total
    a, b = _entropy(table.sum(axis=1)), _entropy(table.sum(axis=0))
    if a < 1e-12 or b < 1e-12:
        return 0.0
    return (a + b - _entropy(table.ravel())) / math.sqrt(a * b)


def expert_similarity(module: nn.Module, model: nn.Module | None = None, name: str = "") -> float:
    """Return the mean cosine of a layer's experts' weights over all pairs; NaN if unknown.

    1 right after copying one feed-forward layer, about 0 for independent weights. For a router that
    stands beside its experts, `model` and `name` lead to them; for a Read-ME model's it is the
    share of channels that two experts have in common.
    """
    if isinstance(module, MoE):
        bank = module.experts
        if not isinstance(bank, FeedForwardExperts):
            return math.nan
        stacked: list[Any] = [bank.w_in, bank.w_out]
    else:
        block: Any = model.get_submodule(name.rpartition(".")[0]) if model is not None else module
        if hasattr(block, "expert_masks"):
            shared = block.masks.overlap()
            return float((shared.sum() - np.trace(shared)) / (len(shared) * (len(shared) - 1)))
        theirs = getattr(block, "experts", None)
        if isinstance(theirs, nn.ModuleList):
            stacked = _stacked(theirs)
        else:
            stacked = [getattr(theirs, n, None) for n in ("gate_up_proj", "down_proj")]
    if (
        not stacked
        or any(not isinstance(p, Tensor) or p.ndim != 3 for p in stacked)
        or len(stacked[0]) < 2
    ):
        return math.nan
    gram = torch.zeros(len(stacked[0]), len(stacked[0]), dtype=torch.float64)
    for parameter in stacked:
        flat = parameter.detach().flatten(1).float()
        gram += (flat @ flat.T).double().cpu()
    length = gram.diagonal().sqrt().clamp_min(1e-30)
    cosine = gram / length[:, None] / length[None, :]
    n = len(cosine)
    return float((cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1)))


def _stacked(experts: nn.ModuleList) -> list[Tensor]:
    """Return ``(N, rows, columns)`` matrices that all experts have, each by itself."""
    named = [dict(expert.named_parameters()) for expert in experts]
    return [
        torch.stack([own[name].detach() for own in named])
        for name, first in named[0].items()
        if first.ndim == 2 and all(name in own and own[name].shape == first.shape for own in named)
    ]


def text_batches(
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    max_tokens: int | None = 20_000,
    max_length: int = 512,
    batch_tokens: int = 4096,
) -> list[dict[str, Tensor]]:
    """Tokenise texts of several domains for `inspect_experts`.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a padding token.
    texts
        By domain; the numbers in ``domains`` follow their order.
    max_tokens
        Of each domain, taken from its texts in order; None for all.
    max_length
        Longer texts are cut into pieces of so many tokens, each read by itself.
    batch_tokens
        Most tokens of a batch, padding included, unless one piece has more.

    Returns
    -------
    list of dict
        ``input_ids`` and ``attention_mask`` ``(B, L)`` and ``domains`` ``(B,)``, int64, padded on
        the right.

    Raises
    ------
    bakeoff.errors.DataError
        If a number is out of range, or a domain has no token.
    """
    limits = {"max_tokens": max_tokens, "max_length": max_length, "batch_tokens": batch_tokens}
    for what, number in limits.items():
        if number is not None and number < 1:
            raise DataError(f"{what} must be at least 1, got {number}")
    rows: list[tuple[int, list[int]]] = []
    for domain, (name, given) in enumerate(texts.items()):
        left = math.inf if max_tokens is None else max_tokens
        before = len(rows)
        for text in given:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
            ids = ids[: int(min(left, len(ids)))]
            rows += [(domain, ids[i : i + max_length]) for i in range(0, len(ids), max_length)]
            left -= len(ids)
            if left <= 0:
                break
        if len(rows) == before:
            raise DataError(f"domain {name!r} holds no token")
    rows.sort(key=lambda row: len(row[1]))
    batches, start = [], 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * len(rows[stop][1]) <= batch_tokens:
            stop += 1
        batches.append(padded_batch(rows[start:stop], int(tokenizer.pad_token_id)))
        start = stop
    return batches


def padded_batch(rows: Sequence[tuple[int, list[int]]], padding: int) -> dict[str, Tensor]:
    """Return rows, each a domain's number and token ids, as one batch of `inspect_experts`."""
    ids = torch.full((len(rows), max(len(row) for _, row in rows)), padding)
    mask = torch.zeros_like(ids)
    for place, (_, row) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    domains = torch.tensor([domain for domain, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "domains": domains}
