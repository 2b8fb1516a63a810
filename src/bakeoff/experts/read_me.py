"""Read-ME: a dense decoder refactored into domain experts behind one router that runs first.

The router reads token ids alone, before the model, and its choice holds in every layer. What is
done with plans that are known ahead (batching, prefetching, caching) is in `expert_serving`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from bakeoff._files import atomic_path
from bakeoff.errors import DataError, ModelError
from bakeoff.models.attention import backbone, transformer_layers

METHOD = {
    "slug": "read-me",
    "title": "Domain experts cut from a dense model behind a router that runs first",
    "paper": "Cai et al., Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with "
    "System Co-Design, NeurIPS 2024, arXiv 2410.19123",
    "designs": ["read-me"],
    "names": [
        "collect_channel_stats",
        "build_expert_masks",
        "moefy",
        "ReadMeForCausalLM",
        "PreGatingRouter",
        "routing_distillation_loss",
        "tune_router",
        "tune_experts",
        "tune",
        "ExpertBatcher",
        "BeladyCache",
        "simulate_serving",
        "OffloadedExperts",
        "ServingEngine",
    ],
}

Rule = Literal["domain", "pooled", "random"]
Objective = Literal["code", "paper"]
Progress: TypeAlias = Callable[[int, int], None]
# Sequences of equal length, texts, or batches as a DataLoader gives them.
Tokens: TypeAlias = "Tensor | Sequence[str] | Iterable[Any]"

RULES: tuple[Rule, ...] = ("domain", "pooled", "random")
OBJECTIVES: tuple[Objective, ...] = ("code", "paper")

# (gate, up, down) and (gate and up in one, down), as transformers' models name them.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


# Where the channels are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _FeedForward:
    """A gated feed-forward module of a decoder layer."""

    owner: nn.Module
    name: str
    module: nn.Module
    projections: tuple[nn.Linear, ...]

    @property
    def down(self) -> nn.Linear:
        return self.projections[-1]

    @property
    def channels(self) -> int:
        return self.down.in_features

    @property
    def hidden(self) -> int:
        return self.down.out_features

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        for name in _ACTIVATIONS:
            function = getattr(self.module, name, None)
            if callable(function):
                found: Callable[[Tensor], Tensor] = function
                return found
        raise ModelError(f"{type(self.module).__name__} holds no activation function")

    def in_weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of the gate, then of the up projection."""
        first = self.projections[:-1]
        if len(first) == 2:
            return first[0].weight, first[0].bias, first[1].weight, first[1].bias
        gate, up = first[0].weight.chunk(2)
        bias = (None, None) if first[0].bias is None else first[0].bias.chunk(2)
        return gate, bias[0], up, bias[1]


def _feed_forwards(model: nn.Module) -> list[_FeedForward]:
    """Return every layer's gated feed-forward module, in order; raise ModelError without one."""
    inner: Any = backbone(model)
    layers = transformer_layers(inner)
    if layers is None:
        raise ModelError(f"the stack of layers of {type(inner).__name__} was not found")
    found = []
    for number, layer in enumerate(layers):
        of_layer = [
            _FeedForward(layer, name, child, projections)
            for name, child in layer.named_children()
            if (projections := _projections(child)) is not None
        ]
        if len(of_layer) != 1:
            mixture = any("experts" in name.split(".") for name, _ in layer.named_modules())
            raise ModelError(
                f"no gated feed-forward module found in layer {number} of {type(inner).__name__}"
                + (", which is a mixture of experts already" if mixture else "")
                + ": accepted are decoders whose layers hold gate, up and down projections"
            )
        found += of_layer
    return found


def _projections(module: nn.Module) -> tuple[nn.Linear, ...] | None:
    children = dict(module.named_children())
    for names in (*_GATED, _FUSED):
        chosen = [children.get(name) for name in names]
        if all(isinstance(child, nn.Linear) for child in chosen):
            return tuple(child for child in chosen if isinstance(child, nn.Linear))
    return None


# Tokens -------------------------------------------------------------------------------------------


def pack_texts(tokenizer: Any, texts: Sequence[str], sequence_length: int) -> Tensor:
    """Join texts and cut them into sequences of equal length; the rest is dropped.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer. Its end-of-text token, if it has one, is put between texts.
    texts
        What to pack, in this order.
    sequence_length
        Tokens of each sequence.

    Returns
    -------
    Tensor
        ``(n, sequence_length)`` int64.

    Raises
    ------
    bakeoff.errors.DataError
        If `sequence_length` is below 2, or the texts do not fill one sequence.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, got {sequence_length}")
    if isinstance(texts, str):
        raise DataError("texts must be a list of texts, got one string")
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
    n = len(ids) // sequence_length
    if n == 0:
        raise DataError(
            f"texts hold {len(ids)} tokens, fewer than sequence_length={sequence_length}"
        )
    return torch.tensor(ids[: n * sequence_length]).view(n, sequence_length)


def _is_texts(data: Any) -> bool:
    return isinstance(data, list | tuple) and all(isinstance(item, str) for item in data)


def _checked_batch(item: Any, what: str) -> tuple[Tensor, Tensor | None]:
    """Return token ids ``(B, T)`` and their mask from one batch of a DataLoader."""
    if isinstance(item, Mapping) or hasattr(item, "keys"):
        ids, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, list | tuple):
        ids, mask = item[0], (item[1] if len(item) > 1 else None)
    else:
        ids, mask = item, None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(
            f"{what}: a batch must hold integer token ids (B, T), got {shape}"
            + (" (texts must come as a list)" if isinstance(ids, str) else "")
        )
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"{what}: attention_mask must have the shape of the ids, {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError(
            f"{what}: attention_mask must hold 0 and 1 only; a batch is token ids, (ids, mask), or "
            "a mapping with input_ids"
        )
    return ids, mask


def _evaluation_batches(
    data: Any, tokenizer: Any, sequence_length: int, batch_size: int, what: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ``(ids, mask)`` once through `data`."""
    if isinstance(data, str):
        raise DataError(f"{what} must be texts, token ids (n, T) or batches, got one string")
    if isinstance(data, Tensor):
        ids, _ = _checked_batch(data, what)
        for start in range(0, len(ids), batch_size):
            yield ids[start : start + batch_size], None
    elif _is_texts(data):
        if tokenizer is None:
            raise DataError(f"{what} is a list of texts, which needs a tokenizer")
        # In the order given: who stops early has seen the first texts, not the shortest.
        encoded = (
            tokenizer(text, truncation=True, max_length=sequence_length)["input_ids"]
            for text in data
        )
        rows = (row for row in encoded if row)
        while part := list(islice(rows, batch_size)):
            mask = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            ids = torch.zeros_like(mask)
            for number, row in enumerate(part):
                ids[number, : len(row)] = torch.tensor(row)
                mask[number, : len(row)] = 1
            yield ids, mask
    else:
        yield from (_checked_batch(item, what) for item in data)


def _training_batches(
    data: Any, tokenizer: Any, sequence_length: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches without end: sequences in an order drawn anew for each epoch."""
    if isinstance(data, str):
        raise DataError("data must be texts, token ids (n, T) or batches, got one string")
    if _is_texts(data):
        if tokenizer is None:
            raise DataError("data is a list of texts, which needs a tokenizer")
        data = pack_texts(tokenizer, data, sequence_length)
    if isinstance(data, Tensor):
        ids, _ = _checked_batch(data, "data")
        if not ids.numel():
            raise DataError(f"data must hold at least one token, got {tuple(ids.shape)}")
        generator = torch.Generator().manual_seed(seed)
        queue = torch.empty(0, dtype=torch.long)
        while True:
            while len(queue) < batch_size:  # an epoch's rest goes into the next epoch's batch
                queue = torch.cat([queue, torch.randperm(len(ids), generator=generator)])
            yield ids[queue[:batch_size].to(ids.device)], None
            queue = queue[batch_size:]
    done = 0
    while True:
        before = done
        for item in data:
            done += 1
            yield _checked_batch(item, "data")
        if done == before:
            raise DataError(
                f"data ran out after {done} batches: give as many as there are steps, or something "
                "that can be read again, such as a list or a DataLoader"
            )


# Experts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelStats:
    """How strongly each domain's text uses the inner channels of each feed-forward layer.

    Parameters
    ----------
    domains
        Names of the N domains.
    means
        For each layer ``(N, D)`` float32: the mean of ``|u|`` over a domain's tokens, where
        ``u = act(gate(x)) * up(x)`` is what enters the down projection.
    n_tokens
        How many tokens each domain's mean is over.
    """

    domains: tuple[str, ...]
    means: tuple[Tensor, ...]
    n_tokens: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        from safetensors.torch import save_file

        about = {"domains": self.domains, "n_tokens": self.n_tokens}
        tensors = {f"layer.{i}": mean.contiguous().cpu() for i, mean in enumerate(self.means)}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"channel_stats": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> ChannelStats:
        """Read what `save` wrote.

        Raises
        ------
        bakeoff.errors.DataError
            If it is some other file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {})["channel_stats"])
                means = [file.get_tensor(f"layer.{i}") for i in range(len(list(file.keys())))]
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{path} was not written by ChannelStats.save") from error
        return cls(tuple(about["domains"]), tuple(means), tuple(about["n_tokens"]))


@torch.no_grad()
def collect_channel_stats(
    model: nn.Module,
    domains: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    sequence_length: int = 4096,
    batch_size: int = 1,
    max_tokens: int | None = 16 * 4096,
    progress: Progress | None = None,
) -> ChannelStats:
    """Run a dense model over each domain's text and average the size of every inner channel.

    Parameters
    ----------
    model
        A transformers decoder with gated feed-forward layers. It is left as it is.
    domains
        For each name: texts (needs `tokenizer`), token ids ``(n, T)``, or batches as a DataLoader
        gives them (``input_ids`` and, where there is padding, ``attention_mask``). Must not be the
        text on which the result is evaluated.
    tokenizer
        For texts; each is cut at `sequence_length`.
    sequence_length, batch_size
        For texts and token ids.
    max_tokens
        Stop a domain with the batch that reaches so many tokens; None for all.
    progress
        Called with the number of domains done and their total.

    Returns
    -------
    ChannelStats

    Raises
    ------
    bakeoff.errors.DataError
        For fewer than two domains, one without a token, or channels that are not finite.
    bakeoff.errors.ModelError
        If a layer has no gated feed-forward module.

    Notes
    -----
    Padding counts nowhere. Every token weighs the same, also where batches differ in size; the
    official code averages means of batches of one size, which is the same.

    References
    ----------
    Ruisi Cai, Yeonju Ro, Geon-Woo Kim, Peihao Wang, Babak Ehteshami Bejnordi, Aditya Akella and
    Zhangyang Wang. "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design". NeurIPS 2024. arXiv:2410.19123.
    """
    if len(domains) < 2:
        raise DataError(f"domains must name at least 2 domains, got {len(domains)}")
    found = _feed_forwards(model)
    inner: Any = backbone(model)
    device = next(inner.parameters()).device
    means: list[list[Tensor]] = [[] for _ in found]
    n_tokens = []
    for done, (name, data) in enumerate(domains.items()):
        sums = [torch.zeros(part.channels, dtype=torch.float64) for part in found]
        count = 0
        real: list[Tensor] = []  # which of the batch's tokens are no padding, if there is any

        def add(
            number: int, states: Tensor, sums: list[Tensor] = sums, real: list[Tensor] = real
        ) -> None:
            flat = states.reshape(-1, states.shape[-1])
            for rows in real:
                flat = flat[rows]
            sums[number] += flat.abs().sum(0, dtype=torch.float32).double().cpu()

        with _recording([part.down for part in found], add), _evaluating(inner):
            for ids, mask in _evaluation_batches(
                data, tokenizer, sequence_length, batch_size, f"domain {name!r}"
            ):
                ids = ids.to(device)
                mask = None if mask is None else mask.to(device)
                real[:] = [] if mask is None else [mask.reshape(-1).bool()]
                inner(input_ids=ids, attention_mask=mask, use_cache=False)
                count += ids.numel() if mask is None else int(mask.sum())
                if max_tokens is not None and count >= max_tokens:
                    break
        if count == 0:
            raise DataError(f"domain {name!r} holds no token")
        n_tokens.append(count)
        for number, (own, total) in enumerate(zip(means, sums, strict=True)):
            if not bool(total.isfinite().all()):
                raise DataError(
                    f"domain {name!r}: channels of layer {number} are not finite, so that the "
                    f"largest are not known; weights are {found[number].down.weight.dtype}, try "
                    "float32"
                )
            own.append((total / count).float())
        if progress is not None:
            progress(done + 1, len(domains))
    stacked = tuple(torch.stack(own) for own in means)
    return ChannelStats(tuple(map(str, domains)), stacked, tuple(n_tokens))


@contextmanager
def _recording(modules: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(number, input)` whenever one of `modules` runs."""
    with ExitStack() as hooks:
        for number, module in enumerate(modules):

            def hook(_: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
                see(number, args[0])

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class ExpertMasks:
    """Which inner channels of each layer belong to which expert.

    Parameters
    ----------
    domains
        Names of the N experts.
    layers
        For each layer ``(N, D)`` bool: the channels that are on for a token of each expert.

    Raises
    ------
    bakeoff.errors.DataError
        If there are fewer than two experts, shapes disagree, or an expert has no channel.
    """

    domains: tuple[str, ...]
    layers: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.domains) < 2:
            raise DataError(f"domains must name at least 2 experts, got {len(self.domains)}")
        for number, mask in enumerate(self.layers):
            if mask.ndim != 2 or len(mask) != len(self.domains) or mask.dtype != torch.bool:
                raise DataError(
                    f"the mask of layer {number} must be ({len(self.domains)}, D) bool, got "
                    f"{tuple(mask.shape)} {mask.dtype}"
                )
            if not bool(mask.any(1).all()):
                raise DataError(f"the mask of layer {number} leaves an expert without a channel")

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.domains)

    def permanent(self, layer: int) -> Tensor:
        """Return ``(D,)`` bool: the channels that every expert shares."""
        return self.layers[layer].all(0)

    def private(self, layer: int) -> Tensor:
        """Return ``(N, D)`` bool: each expert's channels without the permanent ones."""
        return self.layers[layer] & ~self.permanent(layer)

    def overlap(self) -> NDArray[np.float64]:
        """Return ``(N, N)``: the share of expert i's channels that j has too, mean over layers."""
        shares = []
        for mask in self.layers:
            own = mask.double()
            shares.append((own @ own.T) / own.sum(1, keepdim=True))
        matrix: NDArray[np.float64] = torch.stack(shares).mean(0).cpu().numpy()
        return matrix


def build_expert_masks(
    stats: ChannelStats, keep: float = 0.5, *, rule: Rule = "domain", seed: int = 0
) -> ExpertMasks:
    """Give each domain's expert the channels that the domain uses most.

    Parameters
    ----------
    stats
        From `collect_channel_stats`.
    keep
        Share of each layer's channels that an expert has, in (0, 1]. ``round(keep * D)`` are kept,
        at least one.
    rule
        ``"domain"``: each domain's own. Controls: ``"pooled"``, one set for all, by the mean over
        domains; ``"random"``, a set of the same size drawn for each expert.
    seed
        For ``"random"``.

    Returns
    -------
    ExpertMasks

    Raises
    ------
    bakeoff.errors.DataError
        If `keep` is out of range or `rule` unknown.

    Notes
    -----
    Exactly so many channels are kept, of equal ones the first. The official code compares strictly
    with the last kept value, which keeps one channel fewer, and fewer still with ties.

    Examples
    --------
    >>> stats = ChannelStats(("a", "b"), (torch.tensor([[3.0, 1, 2, 0], [3, 2, 1, 0]]),), (9, 9))
    >>> masks = build_expert_masks(stats, keep=0.5)
    >>> masks.permanent(0).tolist()
    [True, False, False, False]
    >>> masks.private(0).int().tolist()
    [[0, 0, 1, 0], [0, 1, 0, 0]]
    """
    if not 0 < keep <= 1:
        raise DataError(f"keep must be in (0, 1], got {keep}")
    if rule not in RULES:
        raise DataError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for mean in stats.means:
        values = mean.cpu()
        if rule == "pooled":
            values = values.mean(0, keepdim=True).expand_as(values)
        elif rule == "random":
            values = torch.rand(values.shape, generator=generator)
        n_kept = max(1, round(keep * values.shape[1]))
        order = values.argsort(dim=1, descending=True, stable=True)[:, :n_kept]
        layers.append(torch.zeros(values.shape, dtype=torch.bool).scatter_(1, order, True))
    return ExpertMasks(stats.domains, tuple(layers))


# The router ---------------------------------------------------------------------------------------


@dataclass
class RouterCache:
    """Keys, values and mask of what a router has read, so that later tokens can follow.

    An empty one starts a text. `PreGatingRouter` fills it; `mask` is ``(B, n)`` bool.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens read, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]


class _RouterBlock(nn.Module):
    """Attention (unless it is left out) and a perceptron, each behind a norm and a residual."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        if attention:
            self.attention_norm = nn.RMSNorm(width, eps=1e-6)
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.value = nn.Linear(width, width)
            self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, width)
        self.mlp_out = nn.Linear(width, width)


class PreGatingRouter(nn.Module):
    """Choose an expert for every token from the token ids so far, without running the model.

    One causal transformer block of a small width, by default; its choice holds for all layers of
    the model behind it.

    Parameters
    ----------
    vocab_size
        Number of token ids.
    n_experts
        Number of experts N.
    width
        Width of embedding and block; an even multiple of `n_heads`.
    n_layers, n_heads
        Blocks, and attention heads in each.
    attention_divisor
        What attention scores are divided by. The published routers use 1, not the square root of
        the head's width.
    attention
        False leaves the attention out, so that a token's choice depends on that token alone (the
        paper's non-autoregressive ablation).
    rope_theta
        Base of the rotary position embedding.
    seed
        Of the initial weights: Kaiming-uniform, as published.

    Raises
    ------
    bakeoff.errors.DataError
        If a number is too small or `width` is no even multiple of `n_heads`.

    Notes
    -----
    Always computes in float32, whatever its parameters are stored in. The perceptron is
    ``width -> width -> width`` with SiLU, as in the official code, where the paper's table names
    SwiGLU; with 32,000 ids, width 512 and 7 experts that is 17,965,063 parameters, the paper's
    18.0 million.

    Examples
    --------
    >>> router = PreGatingRouter(vocab_size=50, n_experts=3, width=16, n_heads=2)
    >>> router(torch.tensor([[4, 8, 15, 16]])).shape
    torch.Size([1, 4, 3])
    """

    def __init__(
        self,
        vocab_size: int,
        n_experts: int,
        width: int = 512,
        n_layers: int = 1,
        n_heads: int = 4,
        *,
        attention_divisor: float = 1.0,
        attention: bool = True,
        rope_theta: float = 10000.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, number in {"n_layers": n_layers, "n_heads": n_heads, "width": width}.items():
            if number < 1:
                raise DataError(f"{name} must be at least 1, got {number}")
        if n_experts < 2:
            raise DataError(f"n_experts must be at least 2, got {n_experts}")
        if width % (2 * n_heads):
            raise DataError(f"width must be an even multiple of n_heads={n_heads}, got {width}")
        if not attention_divisor > 0:
            raise DataError(f"attention_divisor must be positive, got {attention_divisor}")
        self.vocab_size, self.n_experts, self.n_heads = vocab_size, n_experts, n_heads
        self.attention_divisor, self.attention = attention_divisor, attention
        self.rope_theta = rope_theta
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(_RouterBlock(width, attention) for _ in range(n_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, n_experts)
        if self.head.weight.device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for module in self.modules():
                    if isinstance(module, nn.Linear):
                        nn.init.kaiming_uniform_(module.weight, generator=generator)
                        bound = 1 / math.sqrt(width)
                        module.bias.uniform_(-bound, bound, generator=generator)
                    elif isinstance(module, nn.Embedding):
                        nn.init.kaiming_uniform_(module.weight, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: RouterCache | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, N)`` float32 for token ids ``(B, T)``, also under autocast.

        Parameters
        ----------
        input_ids
            The tokens; with a `cache`, those that follow what it holds.
        attention_mask
            ``(B, T)`` of these tokens, 0 for padding; padding may be on either side.
        cache
            Extended in place.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._logits(input_ids, attention_mask, cache)

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: RouterCache | None
    ) -> Tensor:
        n_new = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        mask = None if attention_mask is None else attention_mask.bool()
        if cache is not None:
            new = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
            cache.mask = new if cache.mask is None else torch.cat([cache.mask, new], dim=1)
        states = functional.embedding(input_ids, self.embed.weight).float()
        allowed = self._allowed(mask if cache is None else cache.mask, n_new, past, states.device)
        turn = _rotation(
            past, n_new, states.shape[-1] // self.n_heads, self.rope_theta, states.device
        )
        for number, block in enumerate(self.blocks):
            if self.attention:
                states = states + self._attend(block, number, states, allowed, turn, cache)
            inner = functional.silu(_linear(block.mlp_in, _norm(block.mlp_norm, states)))  # type: ignore[arg-type]
            states = states + _linear(block.mlp_out, inner)  # type: ignore[arg-type]
        return _linear(self.head, _norm(self.norm, states))

    def _allowed(
        self, mask: Tensor | None, n_new: int, past: int, device: torch.device
    ) -> Tensor | None:
        """Return ``(B or 1, 1, n_new, past + n_new)`` bool; None where everything is visible."""
        if n_new == 1 and mask is None:
            return None
        keys = torch.arange(past + n_new, device=device)
        own = keys[past:, None]
        causal = keys[None] <= own
        if mask is None:
            return causal[None, None]
        # A padding token sees itself, so that no row of the softmax is empty.
        visible = (causal[None] & mask[:, None, :]) | (keys[None] == own)[None]
        return visible[:, None]

    def _attend(
        self,
        block: Any,
        number: int,
        states: Tensor,
        allowed: Tensor | None,
        turn: tuple[Tensor, Tensor],
        cache: RouterCache | None,
    ) -> Tensor:
        normed = _norm(block.attention_norm, states)
        shape = (*states.shape[:2], self.n_heads, -1)
        query, key, value = (
            _linear(layer, normed).view(shape).transpose(1, 2)
            for layer in (block.query, block.key, block.value)
        )
        query, key = _rotated(query, turn), _rotated(key, turn)
        if cache is not None:
            if number == len(cache.keys):
                cache.keys.append(key)
                cache.values.append(value)
            else:
                key = cache.keys[number] = torch.cat([cache.keys[number], key], dim=2)
                value = cache.values[number] = torch.cat([cache.values[number], value], dim=2)
        read = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=1 / self.attention_divisor
        )
        return _linear(block.attention_out, read.transpose(1, 2).reshape(states.shape))


def _linear(layer: nn.Linear, states: Tensor) -> Tensor:
    return functional.linear(states, layer.weight.float(), layer.bias.float())


def _norm(layer: nn.RMSNorm, states: Tensor) -> Tensor:
    weight = layer.weight.float()
    return functional.rms_norm(states, (states.shape[-1],), weight, layer.eps)


def _rotation(
    past: int, n_new: int, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(n_new, width)``; computed anew, since they are cheap."""
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    places = torch.arange(past, past + n_new, device=device, dtype=torch.float32)
    angles = places[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotated(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


@dataclass(frozen=True)
class RoutePlan:
    """Which expert every token goes to, known before the model runs.

    Parameters
    ----------
    expert_ids
        ``(B, T)`` int64, the same expert in every layer; -1 for padding.
    logits
        ``(B, T, N)`` float32.
    domains
        Names of the experts.
    """

    expert_ids: Tensor
    logits: Tensor
    domains: tuple[str, ...]

    def of(self, row: int) -> NDArray[np.int64]:
        """Return one text's expert ids without padding: what `expert_serving` takes."""
        ids: NDArray[np.int64] = self.expert_ids[row].cpu().numpy()
        return ids[ids >= 0]

    def counts(self) -> NDArray[np.int64]:
        """Return how many tokens go to each expert, ``(N,)``."""
        ids = self.expert_ids[self.expert_ids >= 0]
        counted: NDArray[np.int64] = torch.bincount(ids, minlength=len(self.domains)).cpu().numpy()
        return counted

    def repeat_share(self) -> float:
        """Return the share of tokens with the expert of the token before (temporal locality).

        NaN if no text has two tokens.
        """
        now, before = self.expert_ids[:, 1:], self.expert_ids[:, :-1]
        both = (now >= 0) & (before >= 0)
        return float(((now == before) & both).sum() / both.sum())


# The model ----------------------------------------------------------------------------------------


class ReadMeConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """Configuration of `ReadMeForCausalLM`: the dense model's own and that of experts and router.

    Parameters
    ----------
    text_config
        Configuration of the dense decoder.
    domains
        Names of the experts.
    form
        ``"masked"``: dense weights under masks, which can be tuned. ``"packed"``: permanent
        channels once and each expert's private ones as matrices of their own. ``"fused"``: each
        expert's matrices with a copy of the permanent channels.
    sizes
        For packed forms and each layer: permanent channels, then each expert's own.
    router
        Arguments of `PreGatingRouter` but for the vocabulary and the number of experts.
    dense_parameters
        Parameters of the dense model.
    """

    model_type = "read_me"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  as transformers declares it

    def __init__(
        self,
        text_config: Any = None,
        domains: Sequence[str] = (),
        form: str = "masked",
        sizes: Sequence[Sequence[int]] = (),
        router: Mapping[str, Any] | None = None,
        dense_parameters: int = 0,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.domains = list(domains)
        self.form = form
        self.sizes = [list(row) for row in sizes]
        self.router = dict(router or {})
        self.dense_parameters = dense_parameters
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)
        # Afterwards: the parent's constructor resets the attention of configurations within.
        self.text_config = text_config


class _Dispatch:
    """The expert ids of the batch that is being run; all layers look here."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # (B * T,)
        self._groups: list[tuple[int, Tensor | None]] | None = None

    def set(self, ids: Tensor | None) -> None:
        self.ids = None if ids is None else ids.reshape(-1)
        self._groups = None

    def groups(self) -> list[tuple[int, Tensor | None]]:
        """Return (expert, rows) for each expert present; rows None if all are its.

        Worked out once for all layers: it moves the counts to the CPU.
        """
        if self._groups is None:
            assert self.ids is not None
            counts = torch.bincount(self.ids + 1).tolist()
            order = self.ids.argsort(stable=True)
            rows = torch.split(order, counts)
            self._groups = [
                (place - 1, None if count == len(self.ids) else rows[place])
                for place, count in enumerate(counts)
                if count and place
            ]
        return self._groups


@dataclass(frozen=True)
class _Checkpoint:
    """Gradient checkpointing under whose second run a layer sees the plan of its first."""

    run: Callable[..., Any]
    dispatch: _Dispatch

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.run(partial(self._again, function, self.dispatch.ids), *args)

    def _again(self, function: Callable[..., Any], ids: Tensor | None, *args: Any) -> Any:
        before = self.dispatch.ids
        if before is ids:
            return function(*args)
        self.dispatch.set(ids)
        try:
            return function(*args)
        finally:
            self.dispatch.set(before)


class _BufferList(nn.Module):
    """Each layer's mask ``(N, D)``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(str(number), tensor)

    def __getitem__(self, number: int) -> Tensor:
        found: Tensor = self._buffers[str(number)]  # type: ignore[assignment]
        return found

    def __len__(self) -> int:
        return len(self._buffers)


def _mask_channels(
    dispatch: _Dispatch, masks: _BufferList, number: int, _: nn.Module, args: tuple[Any, ...]
) -> Any:
    """Set what enters a down projection to zero where its token's expert has no channel."""
    ids = dispatch.ids
    if ids is None:
        return None
    states: Tensor = args[0]
    mask = masks[number]
    # The last row is for padding, whose id is -1: the permanent channels.
    table = torch.cat([mask, mask.all(0, keepdim=True)]).to(states.dtype)
    rows = torch.where(ids < 0, len(mask), ids)
    if states.shape[:-1].numel() != len(rows):
        raise DataError(
            f"expert_ids cover {len(rows)} tokens, the layer got {states.shape[:-1].numel()}"
        )
    return (states * table[rows].view(states.shape), *args[1:])


class Expert(nn.Module):
    """Some channels of a gated feed-forward layer: ``down(act(gate(x)) * up(x))``.

    Parameters
    ----------
    hidden, channels
        Outer and inner width.
    activation
        Applied to the gate's half of `gate_up`.
    bias
        Whether gate and up have biases.
    """

    def __init__(
        self, hidden: int, channels: int, activation: Callable[[Tensor], Tensor], bias: bool
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * channels, bias=bias)
        self.down = nn.Linear(channels, hidden, bias=False)
        self._activation = (activation,)  # in a tuple, so as not to become a submodule

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(n, hidden)`` for states ``(n, hidden)``."""
        return self.apply_weights(
            states, self.gate_up.weight, self.gate_up.bias, self.down.weight, self._activation[0]
        )

    @staticmethod
    def apply_weights(
        states: Tensor,
        gate_up: Tensor,
        bias: Tensor | None,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Do the same with matrices given, such as those read from a file."""
        gate, up = functional.linear(states, gate_up, bias).chunk(2, dim=-1)
        return functional.linear(activation(gate) * up, down)


class PackedExperts(nn.Module):
    """A feed-forward layer whose experts are matrices of their own; stands where the MLP stood.

    Parameters
    ----------
    hidden
        Width of the states.
    sizes
        Permanent channels, then each expert's own.
    activation, bias
        As in `Expert`.
    out_bias
        Whether the down projection has a bias, which is added once.
    """

    def __init__(
        self,
        hidden: int,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor],
        bias: bool,
        out_bias: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.permanent = Expert(hidden, sizes[0], activation, bias) if sizes[0] else None
        self.experts = nn.ModuleList(Expert(hidden, n, activation, bias) for n in sizes[1:])
        self.out_bias = nn.Parameter(torch.zeros(hidden)) if out_bias else None
        self._dispatch: _Dispatch | None = None
        # Something that runs an expert that is not held here; `expert_serving` sets it.
        self.provider: Any = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the states' shape and dtype; every token visits the expert of its plan."""
        if self._dispatch is None or self._dispatch.ids is None:
            raise ModelError("packed experts were run without a plan: call the ReadMe model itself")
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if len(states) != len(self._dispatch.ids):
            raise DataError(
                f"expert_ids cover {len(self._dispatch.ids)} tokens, the layer got {len(states)}"
            )
        groups = self._dispatch.groups()
        if self.provider is not None:
            groups = self.provider.ordered(groups)
        output = torch.zeros_like(states) if self.permanent is None else self.permanent(states)
        for expert, rows in groups:
            chosen = states if rows is None else states[rows]
            if self.provider is not None:
                own = self.provider.run(expert, chosen)
            else:
                own = self.experts[expert](chosen)
            output = output + own if rows is None else output.index_add(0, rows, own)
        if self.out_bias is not None:
            output = output + self.out_bias
        return output.view(hidden_states.shape)


@dataclass(frozen=True)
class ReadMeParameters:
    """Parameters, router included except in `dense`.

    Parameters
    ----------
    dense
        Of the dense model.
    active
        That one token uses: permanent channels and its expert's.
    shared
        Stored if permanent channels are stored once.
    fused
        Stored if every expert has a copy of them.
    """

    dense: int
    active: int
    shared: int
    fused: int


class ReadMeForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A decoder of which every token runs through one expert, chosen before the model runs.

    Made by `moefy`; saved and loaded with ``save_pretrained`` and ``from_pretrained`` (also of
    ``AutoModelForCausalLM``, once this module is imported), as safetensors and JSON. Generates like
    any transformers model.

    Attributes
    ----------
    router : PreGatingRouter
    language_model
        The decoder inside. In the masked form, calling it directly runs the dense model.
    """

    config_class = ReadMeConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(
        self,
        config: ReadMeConfig,
        language_model: Any = None,
        masks: ExpertMasks | None = None,
        router: PreGatingRouter | None = None,
    ) -> None:
        super().__init__(config)
        trained = language_model is not None
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        n_experts = len(config.domains)
        if router is None:
            router = PreGatingRouter(
                config.text_config.get_text_config().vocab_size, n_experts, **config.router
            )
        self.router = router
        self._dispatch = _Dispatch()
        parts = _feed_forwards(language_model)
        if config.form == "masked":
            given = (
                [torch.ones(n_experts, part.channels, dtype=torch.bool) for part in parts]
                if masks is None
                else [
                    mask.to(part.down.weight.device)
                    for mask, part in zip(masks.layers, parts, strict=True)
                ]
            )
            self.expert_masks = _BufferList(given)
            for number, part in enumerate(parts):
                # No closure: a deep copy of the model has to look at its own plan and masks.
                hook = partial(_mask_channels, self._dispatch, self.expert_masks, number)
                part.down.register_forward_pre_hook(hook)
        else:
            for part, sizes in zip(parts, config.sizes, strict=True):
                packed = PackedExperts(
                    part.hidden,
                    sizes,
                    part.activation,
                    part.in_weights()[1] is not None,
                    part.down.bias is not None,
                )
                packed._dispatch = self._dispatch
                setattr(part.owner, part.name, packed)
        if trained:  # transformers would draw them anew
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return the decoder's input embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the decoder's input embedding; the router keeps its own."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Return the decoder's head."""
        return self.language_model.get_output_embeddings()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does; raise `ModelError` while experts are in files of their own."""
        self._check_whole()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _check_whole(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, PackedExperts)]
        if any(layer.provider is not None for layer in layers):
            raise ModelError(
                "the model's experts are on disk and not in the model: call "
                "OffloadedExperts.restore() first"
            )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.config.domains)

    @property
    def masks(self) -> ExpertMasks:
        """The masks, on the CPU.

        Raises
        ------
        bakeoff.errors.ModelError
            If the experts were packed: their channels' places are gone.
        """
        if self.config.form != "masked":
            raise ModelError(f"a model of form {self.config.form!r} has no masks")
        layers = [self.expert_masks[i].cpu() for i in range(len(self.expert_masks))]
        return ExpertMasks(self.domains, tuple(layers))

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: RouterCache | None = None,
    ) -> RoutePlan:
        """Choose every token's expert without running the language model.

        Parameters
        ----------
        input_ids
            ``(B, T)`` token ids.
        attention_mask
            ``(B, T)``, 0 for padding, on either side.
        cache
            Where `input_ids` continue a text: what `route` was given for its beginning.

        Returns
        -------
        RoutePlan

        Raises
        ------
        bakeoff.errors.DataError
            If shapes are wrong or an id is outside the vocabulary (checked on the CPU only).
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise DataError(
                f"input_ids must be (B, T) integers, got {tuple(input_ids.shape)} {input_ids.dtype}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise DataError(
                f"attention_mask must be {tuple(input_ids.shape)} as input_ids, got "
                f"{tuple(attention_mask.shape)}"
            )
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = input_ids.aminmax()
            if low < 0 or high >= self.router.vocab_size:
                raise DataError(
                    f"input_ids must be in [0, {self.router.vocab_size}), got {int(low)} to "
                    f"{int(high)}"
                )
        logits = self.router(input_ids, attention_mask, cache)
        chosen = logits.argmax(-1)
        if attention_mask is not None:
            chosen = chosen.masked_fill(~attention_mask.bool(), -1)
        return RoutePlan(chosen, logits, self.domains)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        expert_ids: Tensor | int | None = None,
        dense: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder, each token through its expert; other arguments are the decoder's own.

        Parameters
        ----------
        expert_ids
            ``(B, T)`` int64 from `route`, -1 for padding, or one number for all tokens. None to
            route now, which needs `input_ids` from the beginning of the text.
        dense
            Run the dense model instead, without masks.

        Returns
        -------
        transformers.modeling_outputs.CausalLMOutputWithPast

        Raises
        ------
        bakeoff.errors.DataError
            If expert ids are missing where they cannot be worked out, or are out of range.
        bakeoff.errors.ModelError
            For `dense` with packed experts.
        """
        chosen: Tensor | None = None
        if dense:
            if self.config.form != "masked":
                raise ModelError(f"a model of form {self.config.form!r} has no dense layers left")
            if expert_ids is not None:
                raise DataError("expert_ids and dense=True exclude each other")
        else:
            source = input_ids if input_ids is not None else inputs_embeds
            if source is None:
                raise DataError("forward needs input_ids or inputs_embeds")
            chosen = self._chosen(expert_ids, source, input_ids, attention_mask, past_key_values)
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if torch.is_grad_enabled():
            self._remember_plans()
        self._dispatch.set(chosen)
        try:
            return self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        finally:
            self._dispatch.set(None)

    def _remember_plans(self) -> None:
        """See to it that layers that run once more in the backward pass have their plan then."""
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False):
                run: Any = module._gradient_checkpointing_func
                if not isinstance(run, _Checkpoint):
                    module._gradient_checkpointing_func = _Checkpoint(run, self._dispatch)

    def _chosen(
        self,
        expert_ids: Tensor | int | None,
        source: Tensor,
        input_ids: Tensor | None,
        attention_mask: Any,
        past: Any,
    ) -> Tensor:
        n_experts = len(self.config.domains)
        shape = source.shape[:2]
        if expert_ids is None:
            if input_ids is None:
                raise DataError("with inputs_embeds give expert_ids: the router reads token ids")
            if past is not None and past.get_seq_length() > 0:
                raise DataError(
                    "with a filled key-value cache give expert_ids, for example "
                    "model.route(all_ids).expert_ids[:, -n:]: the router has to have read the text "
                    "from its beginning"
                )
            usable = isinstance(attention_mask, Tensor) and attention_mask.shape == shape
            return self.route(input_ids, attention_mask if usable else None).expert_ids
        if isinstance(expert_ids, int):
            if not 0 <= expert_ids < n_experts:
                raise DataError(f"expert_ids must be in [0, {n_experts}), got {expert_ids}")
            return torch.full(shape, expert_ids, dtype=torch.long, device=source.device)
        if expert_ids.shape != shape or expert_ids.is_floating_point():
            raise DataError(
                f"expert_ids must be {tuple(shape)} integers, got {tuple(expert_ids.shape)} "
                f"{expert_ids.dtype}"
            )
        if expert_ids.device.type == "cpu" and expert_ids.numel():
            low, high = expert_ids.aminmax()
            if low < -1 or high >= n_experts:
                raise DataError(
                    f"expert_ids must be in [-1, {n_experts}), got {int(low)} to {int(high)}"
                )
        return expert_ids

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Add the expert ids of the tokens that the next step reads; `generate` calls this."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        if ids is not None and kwargs.get("expert_ids") is None and not kwargs.get("dense"):
            mask = kwargs.get("attention_mask")
            usable = isinstance(mask, Tensor) and mask.shape == input_ids.shape
            chosen = self._continued(
                input_ids, mask if usable else None, kwargs.get("past_key_values")
            )
            inputs["expert_ids"] = chosen[:, chosen.shape[1] - ids.shape[1] :]
        return inputs

    def _continued(self, ids: Tensor, mask: Tensor | None, past: Any) -> Tensor:
        """Route a text whose beginning may have been routed in the step before.

        The router's cache travels with the key-value cache and holds the ids it is for: where
        beams have changed places, or tokens were taken back, everything is read again.
        """
        known = getattr(past, "_read_me", None)
        if known is not None:
            before, chosen, cache = known
            n = before.shape[1]
            if n < ids.shape[1] and torch.equal(before, ids[:, :n]):
                new = self.route(ids[:, n:], None if mask is None else mask[:, n:], cache)
                chosen = torch.cat([chosen, new.expert_ids], dim=1)
                past._read_me = (ids, chosen, cache)
                return chosen
        cache = RouterCache()
        chosen = self.route(ids, mask, cache).expert_ids
        if past is not None:
            past._read_me = (ids, chosen, cache)
        return chosen

    def count_parameters(self) -> ReadMeParameters:
        """Count parameters of the dense model, per token, and stored in either packed form.

        Raises
        ------
        bakeoff.errors.ModelError
            While the experts are on disk.
        """
        self._check_whole()
        stored = sum(p.numel() for p in self.language_model.parameters())
        router = sum(p.numel() for p in self.router.parameters())
        if self.config.form == "masked":
            parts = _feed_forwards(self.language_model)
            per_channel = [
                sum(p.numel() for p in part.projections[0].parameters())
                * (2 if len(part.projections) == 3 else 1)
                // part.channels
                + part.hidden
                for part in parts
            ]
            sizes = [
                [int(mask.all(0).sum()), *(mask & ~mask.all(0)).sum(1).tolist()]
                for mask in (self.expert_masks[i] for i in range(len(parts)))
            ]
            rest = stored - sum(
                n * part.channels for n, part in zip(per_channel, parts, strict=True)
            )
        else:
            layers = [m for m in self.modules() if isinstance(m, PackedExperts)]
            per_channel, sizes = [], [list(row) for row in self.config.sizes]
            rest = stored
            for layer, row in zip(layers, sizes, strict=True):
                inner = [p for n, p in layer.named_parameters() if n != "out_bias"]
                total = sum(p.numel() for p in inner)
                per_channel.append(total // sum(row))
                rest -= total
        base = rest + router
        means = [sum(row[1:]) / (len(row) - 1) for row in sizes]
        active = sum(
            n * (row[0] + own) for n, row, own in zip(per_channel, sizes, means, strict=True)
        )
        return ReadMeParameters(
            dense=self.config.dense_parameters,
            active=base + round(active),
            shared=base + sum(n * sum(row) for n, row in zip(per_channel, sizes, strict=True)),
            fused=base
            + sum(
                n * sum(row[0] + own for own in row[1:])
                for n, row in zip(per_channel, sizes, strict=True)
            ),
        )

    @torch.no_grad()
    def pack(self, *, fuse_permanent: bool = False) -> ReadMeForCausalLM:
        """Copy every expert's channels into matrices of its own, in place, for serving.

        Ends the tuning of experts: from here on, channels that experts share are separate numbers.

        Parameters
        ----------
        fuse_permanent
            Give each expert a copy of the permanent channels: one multiplication per token instead
            of two, for more memory.

        Returns
        -------
        ReadMeForCausalLM
            Itself.

        Raises
        ------
        bakeoff.errors.ModelError
            If it is packed already, or a layer does more than its three projections (its packed
            form would answer differently); the model is then unchanged.
        """
        if self.config.form != "masked":
            raise ModelError(f"the experts are packed already (form {self.config.form!r})")
        parts = _feed_forwards(self.language_model)
        all_sizes, made = [], []
        for number, part in enumerate(parts):
            mask = self.expert_masks[number]
            permanent = torch.zeros_like(mask[0]) if fuse_permanent else mask.all(0)
            own = mask & ~permanent
            sizes = [int(permanent.sum()), *(int(n) for n in own.sum(1))]
            gate, gate_bias, up, up_bias = part.in_weights()
            down = part.down
            packed = PackedExperts(
                part.hidden, sizes, part.activation, gate_bias is not None, down.bias is not None
            ).to(gate)
            targets = [(packed.permanent, permanent), *zip(packed.experts, own, strict=True)]
            for target, channels in targets:
                if target is None:
                    continue
                target.gate_up.weight.copy_(torch.cat([gate[channels], up[channels]]))  # type: ignore[union-attr, operator]
                target.down.weight.copy_(down.weight[:, channels])  # type: ignore[union-attr, operator]
                if gate_bias is not None and up_bias is not None:
                    both = torch.cat([gate_bias[channels], up_bias[channels]])
                    target.gate_up.bias.copy_(both)  # type: ignore[union-attr, operator]
            if packed.out_bias is not None:
                packed.out_bias.copy_(down.bias)
            packed._dispatch = self._dispatch
            self._check_packed(number, part, packed)
            packed.train(part.module.training)
            all_sizes.append(sizes)
            made.append(packed)
        for part, packed in zip(parts, made, strict=True):
            setattr(part.owner, part.name, packed)
        del self.expert_masks
        self.config.form = "fused" if fuse_permanent else "packed"
        self.config.sizes = all_sizes
        return self

    def _check_packed(self, number: int, part: _FeedForward, packed: PackedExperts) -> None:
        """Raise if the packed layer does not do what the masked one does.

        Copies are compared, in single precision: half precision would hide a difference.
        """
        n_experts = len(self.config.domains)
        masked, packed = copy.deepcopy((part.module, packed))
        masked, packed = masked.float().eval(), packed.float().eval()
        device = part.down.weight.device
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 2 * n_experts, part.hidden, generator=generator).to(device)
        assert packed._dispatch is not None
        packed._dispatch.set(torch.arange(2 * n_experts, device=device)[None] % n_experts)
        expected, got = masked(states), packed(states)
        scale = expected.abs().max().clamp_min(1e-6)
        if not bool((expected - got).abs().max() / scale < 64 * torch.finfo(torch.float32).eps):
            raise ModelError(
                f"layer {number}: {type(part.module).__name__} does more than its projections and "
                "activation, so that its experts cannot be packed; use the masked form"
            )


AutoConfig.register("read_me", ReadMeConfig, exist_ok=True)
AutoModelForCausalLM.register(ReadMeConfig, ReadMeForCausalLM, exist_ok=True)


def moefy(
    model: nn.Module,
    masks: ExpertMasks,
    *,
    router: PreGatingRouter | None = None,
    router_width: int | None = None,
    router_layers: int = 1,
    router_heads: int = 4,
    attention_divisor: float = 1.0,
    router_attention: bool = True,
    rope_theta: float = 10000.0,
    seed: int = 0,
) -> ReadMeForCausalLM:
    """Turn a dense decoder into domain experts behind a router that runs before it.

    Parameters
    ----------
    model
        A causal language model of transformers with gated feed-forward layers (Llama, Mistral,
        Qwen, Gemma, Phi-3 and their like). It is not copied: the result holds it.
    masks
        From `build_expert_masks`.
    router
        One that exists already, for this vocabulary and number of experts. None for a new one,
        whose embedding starts as a copy of the first columns of the model's own.
    router_width
        Width of a new router; None for 512, or the largest that fits a narrower model.
    router_layers, router_heads, attention_divisor, router_attention, rope_theta, seed
        Of a new router, see `PreGatingRouter`.

    Returns
    -------
    ReadMeForCausalLM
        On the model's device. The router is untrained: `tune_router` comes next.

    Raises
    ------
    bakeoff.errors.DataError
        If a mask does not have the length of its layer, or the router does not fit.
    bakeoff.errors.ModelError
        If the model is no causal language model with gated feed-forward layers.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2)
    >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes))
    >>> texts = {"a": torch.arange(40).view(2, 20), "b": torch.arange(40).flip(0).view(2, 20)}
    >>> masks = build_expert_masks(collect_channel_stats(dense, texts), keep=0.5)
    >>> model = moefy(dense, masks)
    >>> model.route(torch.tensor([[1, 2, 3]])).expert_ids.shape
    torch.Size([1, 3])

    References
    ----------
    See `collect_channel_stats`.
    """
    if isinstance(model, ReadMeForCausalLM):
        raise ModelError("model was made by moefy already")
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(
            f"model must be a causal language model of transformers, with its head, got "
            f"{type(model).__name__}"
        )
    parts = _feed_forwards(model)
    if len(masks.layers) != len(parts):
        raise DataError(
            f"masks are for {len(masks.layers)} layers, {type(model).__name__} has {len(parts)}"
        )
    for number, (mask, part) in enumerate(zip(masks.layers, parts, strict=True)):
        if mask.shape[1] != part.channels:
            raise DataError(
                f"the mask of layer {number} is for {mask.shape[1]} channels, the layer has "
                f"{part.channels}"
            )
    embedding = model.get_input_embeddings().weight.detach()
    vocab_size, hidden = model.config.get_text_config().vocab_size, embedding.shape[1]
    if router is None:
        limit = 2 * router_heads
        width = min(512, hidden) // limit * limit if router_width is None else router_width
        if not 0 < width <= hidden:
            raise DataError(
                f"router_width must be at most the model's hidden size, {hidden}, whose embedding "
                f"it starts from, and at least 2 * router_heads, got {width}"
            )
        router = PreGatingRouter(
            vocab_size,
            masks.n_experts,
            width,
            router_layers,
            router_heads,
            attention_divisor=attention_divisor,
            attention=router_attention,
            rope_theta=rope_theta,
            seed=seed,
        )
        with torch.no_grad():
            router.embed.weight.copy_(embedding[:vocab_size, :width])
    if router.vocab_size != vocab_size:
        raise DataError(
            f"router is for a vocabulary of {router.vocab_size}, the model's is {vocab_size}"
        )
    if router.n_experts != masks.n_experts:
        raise DataError(f"router is for {router.n_experts} experts, masks for {masks.n_experts}")
    settings = {
        "width": router.embed.embedding_dim,
        "n_layers": len(router.blocks),
        "n_heads": router.n_heads,
        "attention_divisor": router.attention_divisor,
        "attention": router.attention,
        "rope_theta": router.rope_theta,
    }
    n_dense = sum(parameter.numel() for parameter in model.parameters())
    config = ReadMeConfig(model.config, masks.domains, "masked", (), settings, n_dense)
    made = ReadMeForCausalLM(config, model, masks, router.to(embedding.device))
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    made.train(model.training)
    return made


# Training -----------------------------------------------------------------------------------------


def routing_distillation_loss(
    activations: Tensor,
    router_logits: Tensor,
    private_masks: Tensor,
    mask: Tensor | None = None,
    *,
    objective: Objective = "code",
    hard_weight: float = 0.75,
    label_smoothing: float = 0.5,
    scale: float = 10.0,
    keep: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Teach the router which expert holds the channels that one dense layer used.

    Parameters
    ----------
    activations
        ``(B, T, D)``: what enters the layer's down projection in the dense model.
    router_logits
        ``(B, T, N)``.
    private_masks
        ``(N, D)``: each expert's channels without the permanent ones.
    mask
        ``(B, T)``, 0 for tokens that do not count; None if all do.
    objective
        ``"code"``: affinities count, at five depths, which of an expert's channels are among the
        token's largest; three quarters smoothed cross-entropy with the best expert, one quarter
        cross-entropy with their softmax. ``"paper"``: the divergence of the router's distribution
        from the softmax of how many of the token's channels of largest magnitude each expert has.
    hard_weight, label_smoothing, scale
        For ``"code"``: weight and smoothing of the cross-entropy with the best expert, and what
        affinities are multiplied by before the softmax.
    keep, temperature
        For ``"paper"``: the share of a token's channels that count, and what overlaps are divided
        by.

    Returns
    -------
    Tensor
        A float32 scalar, mean over tokens; its gradient reaches the router's logits only.

    Raises
    ------
    bakeoff.errors.DataError
        If shapes disagree, no token counts, or the first expert has no private channel.

    Notes
    -----
    As in the official code, ``"code"`` takes depths and normaliser from the first expert's number
    of private channels and ranks signed activations, where masks rank magnitudes. That code also
    subtracts the mean affinity, which neither a softmax nor a maximum notices.

    References
    ----------
    See `collect_channel_stats`; section 4 (equation 4) for ``"paper"``.
    """
    affinity = _affinities(activations, private_masks, objective, keep)
    if affinity.shape != router_logits.shape:
        raise DataError(
            f"router_logits must be {tuple(affinity.shape)}, got {tuple(router_logits.shape)}"
        )
    return _distillation(
        affinity * scale if objective == "code" else affinity / temperature,
        router_logits,
        mask,
        objective,
        hard_weight,
        label_smoothing,
    )


@torch.no_grad()
def _affinities(
    activations: Tensor, private_masks: Tensor, objective: Objective, keep: float
) -> Tensor:
    """Return ``(B, T, N)`` float32: how much of what a token uses each expert holds."""
    if objective not in OBJECTIVES:
        raise DataError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if activations.ndim != 3 or private_masks.shape[-1] != activations.shape[-1]:
        raise DataError(
            f"activations (B, T, D) and private_masks (N, D) disagree: "
            f"{tuple(activations.shape)} and {tuple(private_masks.shape)}"
        )
    values = activations.detach().float()
    experts = private_masks.to(values.device, torch.float32)
    if objective == "paper":
        n_kept = max(1, round(keep * values.shape[-1]))
        places = values.abs().topk(n_kept, dim=-1).indices
        used = torch.zeros_like(values).scatter_(-1, places, 1.0)
        return used @ experts.T
    n = int(private_masks[0].sum())
    if n == 0:
        raise DataError(
            "private_masks: the first expert has no private channel, so that there is nothing to "
            "route by"
        )
    depths = [n - 1, *(int(n / 5 * part) for part in (4, 3, 2)), int(n / 5)]
    largest = values.topk(n, dim=-1).values
    weights = torch.zeros_like(values)
    for depth in depths:
        weights += values > largest[..., depth, None]
    return (weights / (3 * n)) @ experts.T


def _distillation(
    affinity: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    objective: Objective,
    hard_weight: float,
    label_smoothing: float,
) -> Tensor:
    rows, targets = logits.float().flatten(0, 1), affinity.flatten(0, 1)
    if mask is not None:
        counted = mask.reshape(-1).bool()
        rows, targets = rows[counted], targets[counted]
    if not len(rows):
        raise DataError("mask leaves no token to learn from")
    chosen = functional.log_softmax(rows, dim=-1)
    if objective == "paper":
        divergence = chosen.exp() * (chosen - functional.log_softmax(targets, dim=-1))
        return divergence.sum(-1).mean()
    soft = -(functional.softmax(targets, dim=-1) * chosen).sum(-1).mean()
    hard = functional.cross_entropy(rows, targets.argmax(-1), label_smoothing=label_smoothing)
    return hard_weight * hard + (1 - hard_weight) * soft


@dataclass(frozen=True)
class TuningRound:
    """Losses of one round of `tune`, a number per step."""

    router_losses: tuple[float, ...]
    expert_losses: tuple[float, ...]


def _checked_training(steps: int, learning_rate: float, batch_size: int, accumulation: int) -> None:
    if min(steps, batch_size, accumulation) < 1:
        raise DataError(
            f"steps, batch_size and accumulation must be at least 1, got {steps}, {batch_size} and "
            f"{accumulation}"
        )
    if not learning_rate > 0:
        raise DataError(f"learning_rate must be positive, got {learning_rate}")


def _optimise(
    groups: list[dict[str, Any]],
    loss_of: Callable[[Tensor, Tensor | None], Tensor],
    batches: Iterator[tuple[Tensor, Tensor | None]],
    device: torch.device,
    *,
    steps: int,
    learning_rate: float,
    accumulation: int,
    progress: Progress | None,
) -> list[float]:
    """Run AdamW with a cosine schedule to zero and no warm-up; return each step's loss."""
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    losses = []
    for step in range(steps):
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for ids, mask in islice(batches, accumulation):
            loss = loss_of(ids.to(device), None if mask is None else mask.to(device)) / accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise DataError(
                f"the loss became {total} at step {step}: lower learning_rate, got {learning_rate}"
            )
        optimizer.step()
        losses.append(total)
        if progress is not None:
            progress(step + 1, steps)
    return losses


@contextmanager
def _training_only(model: nn.Module, chosen: Callable[[str], bool]) -> Iterator[None]:
    """Let only some parameters have gradients, and put everything back afterwards."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(name))
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def tune_router(
    model: ReadMeForCausalLM,
    data: Any,
    *,
    tokenizer: Any = None,
    steps: int = 100,
    learning_rate: float = 5e-4,
    batch_size: int = 64,
    accumulation: int = 1,
    sequence_length: int = 4096,
    weight_decay: float = 0.01,
    objective: Objective = "code",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the router to send tokens where the dense model's own channels are.

    The language model is frozen and runs dense; the loss is the sum of
    `routing_distillation_loss` over its layers.

    Parameters
    ----------
    model
        From `moefy`, not packed.
    data
        Texts (packed with `tokenizer`), token ids ``(n, T)``, or batches that can be read again.
        Sequences are drawn without replacement, in an order that `seed` fixes.
    tokenizer, sequence_length
        For texts.
    steps, learning_rate, weight_decay
        Of AdamW; the rate falls along a cosine to zero.
    batch_size, accumulation
        Sequences of a forward pass, and passes per step.
    objective
        See `routing_distillation_loss`.
    seed
        Of the order of sequences.
    progress
        Called with steps done and their total.

    Returns
    -------
    list of float
        The loss of each step.

    Raises
    ------
    bakeoff.errors.DataError
        If no layer has private channels (then there is nothing to route), a number is out of range,
        the data run out, or the loss is not finite.
    bakeoff.errors.ModelError
        If the experts are packed.

    References
    ----------
    See `collect_channel_stats`.
    """
    _checked_training(steps, learning_rate, batch_size, accumulation)
    masks = model.masks
    private = [masks.private(number) for number in range(len(masks.layers))]
    routable = [bool(mask[0].any()) for mask in private]
    if not any(routable):
        raise DataError("masks: the experts have no private channels, so there is nothing to route")
    downs = [part.down for part in _feed_forwards(model.language_model)]
    private = [mask.to(down.weight.device) for mask, down in zip(private, downs, strict=True)]
    inner: Any = backbone(model.language_model)

    def loss_of(ids: Tensor, mask: Tensor | None) -> Tensor:
        logits = model.router(ids, mask)
        layers: list[Tensor] = []

        def see(number: int, states: Tensor) -> None:
            # At once, so that no more than one layer's activations are held.
            if routable[number]:
                with torch.enable_grad():
                    layers.append(
                        routing_distillation_loss(
                            states, logits, private[number], mask, objective=objective
                        )
                    )

        with _recording(downs, see), torch.no_grad():
            inner(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack(layers).sum()

    with _training_only(model, lambda name: name.startswith("router.")), _evaluating(model):
        return _optimise(
            [{"params": list(model.router.parameters()), "weight_decay": weight_decay}],
            loss_of,
            _training_batches(data, tokenizer, sequence_length, batch_size, seed),
            model.router.head.weight.device,
            steps=steps,
            learning_rate=learning_rate,
            accumulation=accumulation,
            progress=progress,
        )


def tune_experts(
    model: ReadMeForCausalLM,
    data: Any,
    *,
    tokenizer: Any = None,
    steps: int = 200,
    learning_rate: float = 5e-5,
    batch_size: int = 128,
    accumulation: int = 1,
    sequence_length: int = 4096,
    weight_decay: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the language model under its routed masks, the router frozen.

    All parameters but the router's learn from the next-token loss. Channels that experts share are
    one set of numbers until `ReadMeForCausalLM.pack`. Biases and norms have no weight decay.

    Parameters
    ----------
    model, data, tokenizer, steps, learning_rate, batch_size, accumulation, sequence_length
        As in `tune_router`.
    weight_decay, seed, progress
        As in `tune_router`.

    Returns
    -------
    list of float
        The loss of each step, nats per token.

    Raises
    ------
    bakeoff.errors.DataError
        If a number is out of range, the data run out, or the loss is not finite.
    bakeoff.errors.ModelError
        If the experts are packed.

    Notes
    -----
    The official code means to exempt norms from weight decay too, but by a name that no Llama norm
    has.

    References
    ----------
    See `collect_channel_stats`.
    """
    _checked_training(steps, learning_rate, batch_size, accumulation)
    if model.config.form != "masked":
        raise ModelError("experts are tuned before they are packed: their shared channels are tied")

    def loss_of(ids: Tensor, mask: Tensor | None) -> Tensor:
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        loss: Tensor = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss

    was_training = model.training
    with _training_only(model, lambda name: not name.startswith("router.")):
        model.train()
        parameters = list(model.language_model.parameters())
        try:
            return _optimise(
                [
                    {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
                    {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
                ],
                loss_of,
                _training_batches(data, tokenizer, sequence_length, batch_size, seed),
                parameters[0].device,
                steps=steps,
                learning_rate=learning_rate,
                accumulation=accumulation,
                progress=progress,
            )
        finally:
            model.train(was_training)


def tune(
    model: ReadMeForCausalLM,
    data: Any,
    *,
    rounds: int = 8,
    tokenizer: Any = None,
    router_steps: int = 100,
    expert_steps: int = 200,
    router_rate: float = 5e-4,
    expert_rate: float = 5e-5,
    decay: float = 0.8,
    router_batch: int = 64,
    expert_batch: int = 128,
    accumulation: int = 1,
    sequence_length: int = 4096,
    weight_decay: float = 0.01,
    objective: Objective = "code",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TuningRound]:
    """Tune router and experts in turn; the paper's defaults.

    Parameters
    ----------
    model, data, tokenizer, accumulation, sequence_length, weight_decay, objective, seed
        As in `tune_router`.
    rounds
        How often both are tuned.
    router_steps, expert_steps, router_rate, expert_rate, router_batch, expert_batch
        Of each round's two parts; a part of 0 steps is left out.
    decay
        What both rates are multiplied by from round to round.
    progress
        Called with steps done and their total, over all rounds.

    Returns
    -------
    list of TuningRound

    Raises
    ------
    bakeoff.errors.DataError, bakeoff.errors.ModelError
        As in `tune_router` and `tune_experts`.

    References
    ----------
    See `collect_channel_stats`.
    """
    if rounds < 1:
        raise DataError(f"rounds must be at least 1, got {rounds}")
    if not 0 < decay <= 1:
        raise DataError(f"decay must be in (0, 1], got {decay}")
    total = rounds * (router_steps + expert_steps)
    done = 0

    def stage(
        run: Callable[..., list[float]], steps: int, number: int, **settings: Any
    ) -> tuple[float, ...]:
        nonlocal done
        if steps == 0:
            return ()
        start = done

        def report(step: int, _: int) -> None:
            if progress is not None:
                progress(start + step, total)

        losses = run(
            model,
            data,
            tokenizer=tokenizer,
            steps=steps,
            accumulation=accumulation,
            sequence_length=sequence_length,
            weight_decay=weight_decay,
            seed=seed + number,
            progress=report,
            **settings,
        )
        done += steps
        return tuple(losses)

    history = []
    for number in range(rounds):
        shrink = decay**number
        routed = stage(
            tune_router,
            router_steps,
            2 * number,
            learning_rate=router_rate * shrink,
            batch_size=router_batch,
            objective=objective,
        )
        tuned = stage(
            tune_experts,
            expert_steps,
            2 * number + 1,
            learning_rate=expert_rate * shrink,
            batch_size=expert_batch,
        )
        history.append(TuningRound(routed, tuned))
    return history


__all__ = [
    "ChannelStats",
    "Expert",
    "ExpertMasks",
    "PackedExperts",
    "PreGatingRouter",
    "ReadMeConfig",
    "ReadMeForCausalLM",
    "ReadMeParameters",
    "RoutePlan",
    "RouterCache",
    "TuningRound",
    "build_expert_masks",
    "collect_channel_stats",
    "moefy",
    "pack_texts",
    "routing_distillation_loss",
    "tune",
    "tune_experts",
    "tune_router",
]
