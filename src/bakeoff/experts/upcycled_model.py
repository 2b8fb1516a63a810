"""The model that `bakeoff.experts.bam.upcycle` makes: a decoder whose blocks hold several experts.

Importing this module makes ``AutoConfig`` and ``AutoModelForCausalLM`` know it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import check_gradient
from bakeoff.experts.token_sums import token_mean

Method = Literal["bam", "btx"]

ATTENTION_NAMES = ("self_attn", "attention", "attn")
FEED_FORWARD_NAMES = ("mlp", "feed_forward")
_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class UpcycledConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """Configuration of an `UpcycledForCausalLM`.

    Parameters
    ----------
    text_config
        Configuration of the dense decoder that the experts come from, or its dict.
    n_experts
        N, experts per block.
    method
        ``"bam"``: attention and feed-forward experts; ``"btx"``: feed-forward experts alone.
    share_kv
        One key and value projection for all attention experts, and one cache.
    ffn_top_k
        Feed-forward experts per token.
    attn_routing
        ``"soft"`` for all attention experts, or how many of them count.
    normalize_ffn
        Whether the weights of a token's feed-forward experts are divided by their sum.
    load_balance_coefficient, router_z_coefficient
        Factors of the two auxiliary losses of the feed-forward routers, alpha and beta.
    router_init_std
        Standard deviation of the routers' first weights.

    Raises
    ------
    bakeoff.errors.DataError
        If a setting is impossible; names it and what is accepted.
    """

    model_type = "bakeoff-upcycled"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  transformers' convention
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        n_experts: int = 2,
        method: Method = "bam",
        share_kv: bool = False,
        ffn_top_k: int = 1,
        attn_routing: Literal["soft"] | int = "soft",
        normalize_ffn: bool = False,
        load_balance_coefficient: float = 1e-2,
        router_z_coefficient: float = 1e-3,
        router_init_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if text_config is None:  # transformers compares with a config built without arguments
            text_config = AutoConfig.for_model("llama")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.n_experts = n_experts
        self.method = method
        self.share_kv = share_kv
        self.ffn_top_k = ffn_top_k
        self.attn_routing = attn_routing
        self.normalize_ffn = normalize_ffn
        self.load_balance_coefficient = load_balance_coefficient
        self.router_z_coefficient = router_z_coefficient
        self.router_init_std = router_init_std
        self._check()
        # Tying is the decoder's own business; transformers reads this of the outermost config.
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def _check(self) -> None:
        if self.method not in ("bam", "btx"):
            raise DataError(f'method must be "bam" or "btx", got {self.method!r}')
        if not _is_count(self.n_experts) or self.n_experts < 2:
            raise DataError(f"n_experts must be an integer of at least 2, got {self.n_experts!r}")
        if not _is_count(self.ffn_top_k) or self.ffn_top_k > self.n_experts:
            raise DataError(
                f"ffn_top_k must be between 1 and the number of experts, {self.n_experts}, got "
                f"{self.ffn_top_k!r}"
            )
        routing = self.attn_routing
        if routing != "soft" and (not _is_count(routing) or routing > self.n_experts):
            raise DataError(
                'attn_routing must be "soft" or between 1 and the number of experts, '
                f"{self.n_experts}, got {routing!r}"
            )
        if self.method == "btx" and (self.share_kv or routing != "soft"):
            raise DataError(
                'share_kv and attn_routing belong to method="bam": "btx" has one attention, whose '
                "weights are the average"
            )
        for name in ("load_balance_coefficient", "router_z_coefficient", "router_init_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DataError(f"{name} must be a number >= 0, got {getattr(self, name)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass
class UpcycledOutput(MoeCausalLMOutputWithPast):  # type: ignore[misc]
    """What `UpcycledForCausalLM` returns.

    As `transformers`' output of mixtures: ``loss``, ``aux_loss`` (a float32 scalar, coefficients
    applied), ``logits``, ``past_key_values``, and on request ``hidden_states``, ``attentions`` and
    ``router_logits`` (feed-forward routers, per block ``(batch * length, N)`` float32); besides:

    Parameters
    ----------
    attention_router_logits
        The same of the attention routers.
    """

    attention_router_logits: tuple[Tensor, ...] | None = None


class ExpertRouter(nn.Module):
    """A linear softmax router: ``p = softmax(W u)``, of which the `top_k` largest count.

    Weights are the probabilities themselves; with `normalize` they are divided by their sum.

    Parameters
    ----------
    hidden
        Features of a token.
    n_experts, top_k
        N and K.
    normalize
        Whether a token's weights sum to 1.
    std
        Standard deviation of the first weights.

    Examples
    --------
    >>> router = ExpertRouter(hidden=2, n_experts=2, top_k=1)
    >>> router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> routing = router(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))
    >>> routing.indices[1].tolist(), [round(w, 3) for w in routing.weights.flatten().tolist()]
    ([1], [0.5, 0.881])
    """

    def __init__(
        self,
        hidden: int,
        n_experts: int,
        top_k: int,
        normalize: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.top_k = top_k
        self.normalize = normalize
        # Whatever the dtype of the model: rounding would decide which expert wins.
        self.weight = nn.Parameter(torch.empty(n_experts, hidden, dtype=torch.float32))
        nn.init.normal_(self.weight, std=std)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route ``(T, hidden)`` tokens; those with a mask ``(T,)`` of False go nowhere."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.to(precision), self.weight.to(precision))
        probs = logits.softmax(dim=-1)
        weights, indices = probs.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if mask is not None:
            indices = indices.masked_fill(~mask[:, None], -1)
            weights = weights.masked_fill(~mask[:, None], 0.0)
        return Routing(logits, probs, indices, weights)

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        hidden = self.weight.shape[1]
        return f"{hidden}, {self.n_experts}, top_k={self.top_k}, normalize={self.normalize}"


class _Batch:
    """What the blocks of a model share during one forward pass and cannot pass to each other."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        # None outside a forward pass: gradient checkpointing runs blocks again, unrecorded.
        self.attention: list[Routing] | None = None
        self.feed_forward: list[Routing] | None = None

    def token_mask(self, leading: torch.Size) -> Tensor | None:
        """Return ``(batch * length,)`` bool, or None where no padding is known of."""
        if self.mask is None or len(leading) != 2 or len(self.mask) != leading[0]:
            return None
        # While generating, the mask covers the cached positions as well.
        recent = self.mask[:, -leading[1] :]
        return recent.reshape(-1) if recent.shape == leading else None


class FeedForwardMixture(nn.Module):
    """N feed-forward networks, each token in K of them: ``sum_i w_i FFN_i(u)``."""

    def __init__(self, experts: Sequence[nn.Module], router: ExpertRouter, batch: _Batch) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self._batch = batch

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``(batch, length, hidden)``, as the dense network would."""
        leading = hidden_states.shape[:-1]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(tokens, mask=self._batch.token_mask(leading))
        if self._batch.feed_forward is not None:
            self._batch.feed_forward.append(routing)
        return self._mixed(tokens, routing).to(hidden_states.dtype).view_as(hidden_states)

    def _mixed(self, tokens: Tensor, routing: Routing) -> Tensor:
        n_tokens, k = routing.indices.shape
        order = routing.indices.reshape(-1).argsort(stable=True)
        sizes = routing.counts.tolist()  # the only wait for a GPU
        slots = order[order.numel() - sum(sizes) :]  # padding sorts first: its index is -1
        parts = tokens[slots // k].split_with_sizes(sizes)
        # An expert without tokens runs too: its gradient is then zero, not absent.
        outputs = torch.cat(
            [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        )
        weighted = routing.weights.reshape(-1)[slots, None] * outputs
        filled = weighted.new_zeros(n_tokens * k, tokens.shape[1]).index_copy(0, slots, weighted)
        return filled.view(n_tokens, k, -1).sum(dim=1)


class AttentionMixture(nn.Module):
    """N attention modules over the same tokens: ``sum_j g_j(u_t) Attention_j(u)_t``.

    Every expert attends over all tokens; the gate of a query token weighs what comes out of the
    experts' output projections. With top-k routing the remaining gates are zero.

    With `share_kv`, only the first expert has key and value projections; what they give, once, is
    what all experts attend over.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        router: ExpertRouter,
        batch: _Batch,
        *,
        n_layers: int,
        share_kv: bool,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.n_layers = n_layers
        self.share_kv = share_kv
        self.cache_argument = cache_argument(experts[0])
        self._batch = batch

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the dense attention would: its output, or a tuple that starts with it."""
        routing = self.router(hidden_states.reshape(-1, hidden_states.shape[-1]))
        if self._batch.attention is not None:
            self._batch.attention.append(routing)
        gates = torch.zeros_like(routing.probs).scatter(1, routing.indices, routing.weights)
        gates = gates.view(*hidden_states.shape[:-1], -1)
        mixed, rest = None, None
        caches = self._caches(kwargs.get(self.cache_argument))
        for number, (expert, cache) in enumerate(zip(self.experts, caches, strict=True)):
            kwargs[self.cache_argument] = cache
            output = expert(hidden_states, *args, **kwargs)
            if isinstance(output, tuple):
                output, rest = output[0], output[1:]
            part = gates[..., number, None] * output  # gates are float32: so is the sum
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        mixed = mixed.to(hidden_states.dtype)
        return mixed if rest is None else (mixed, *rest)

    def _caches(self, cache: Any) -> list[Any]:
        n_experts = len(self.experts)
        if self.share_kv:
            return [_SharedKeyValues(cache)] * n_experts
        if cache is None:
            return [None] * n_experts
        _widen(cache, self.n_layers, n_experts)
        return [_ExpertCache(cache, expert * self.n_layers) for expert in range(n_experts)]


class _ExpertCache:
    """One expert's part of a key-value cache, in which expert j's blocks follow expert j - 1's."""

    def __init__(self, cache: Any, offset: int) -> None:
        self._cache = cache
        self._offset = offset

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        return self._cache.update(keys, values, layer_idx + self._offset, *args, **kw)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _SharedKeyValues:
    """Gives all experts of a block the keys and values of the one that asks first."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._states: Any = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._states is None:
            self._states = (keys, values)
            if self._cache is not None:
                self._states = self._cache.update(keys, values, *args, **kwargs)
        return self._states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _widen(cache: Any, n_layers: int, n_experts: int) -> None:
    """Make room in a cache of `n_layers` layers for the other experts' keys and values."""
    if len(cache.layers) != n_layers or cache.layer_class_to_replicate is not None:
        return  # widened before, or grows by itself
    if any(layer.is_initialized for layer in cache.layers):
        raise DataError(
            "past_key_values holds one set of keys and values per block, those of a dense model; "
            f"this model keeps {n_experts}: give an empty cache, or what it returned"
        )
    for _ in range(n_experts - 1):
        cache.layers.extend(copy.deepcopy(layer) for layer in cache.layers[:n_layers])


def cache_argument(attention: nn.Module) -> str:
    """Return the name under which an attention module takes the key-value cache."""
    accepted = inspect.signature(attention.forward).parameters
    for name in _CACHE_ARGUMENTS:
        if name in accepted:
            return name
    raise ModelError(
        f"{type(attention).__name__} takes no key-value cache under any of the names "
        f"{', '.join(_CACHE_ARGUMENTS)}: it cannot become an expert"
    )


@dataclass(frozen=True)
class SharedRows:
    """Which weights of an attention module make keys and values.

    Parameters
    ----------
    modules
        Names of modules that make nothing else.
    fused
        Name of a projection that makes queries, keys and values, or an empty string.
    groups, query_width
        Its outputs are `groups` runs of equal length, each of which starts with `query_width`
        query features.
    """

    modules: tuple[str, ...] = ()
    fused: str = ""
    groups: int = 1
    query_width: int = 0

    def query_rows(self, n_rows: int) -> Tensor:
        """Return ``(n_rows,)`` bool: which outputs of the fused projection are queries."""
        rows = torch.arange(n_rows).view(self.groups, -1) % (n_rows // self.groups)
        return (rows < self.query_width).view(-1)


def shared_rows(attention: Any) -> SharedRows:
    """Say where the keys and values of an attention module come from.

    Raises
    ------
    bakeoff.errors.ModelError
        If its projections have names or an order that are not known.
    """
    children = dict(attention.named_children())
    name = type(attention).__name__
    if {"q_proj", "k_proj", "v_proj"} <= children.keys():
        known = ("k_proj", "v_proj", "k_norm", "v_norm", "k_layernorm")
        return SharedRows(tuple(key for key in known if key in children))
    if name == "GPTNeoXAttention":  # by head: query, key, value
        heads = attention.config.num_attention_heads
        return SharedRows(fused="query_key_value", groups=heads, query_width=attention.head_size)
    if name == "Phi3Attention":  # all queries, all keys, all values
        width = attention.config.num_attention_heads * attention.head_dim
        return SharedRows(fused="qkv_proj", query_width=width)
    raise ModelError(
        f"share_kv needs separate q_proj, k_proj and v_proj, or a fused projection of GPT-NeoX or "
        f"Phi-3; {name} has {', '.join(children)}"
    )


class _NoStates(nn.Module):
    """In the place of a key or value projection whose result nobody reads."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(1).expand(*hidden_states.shape[:-1], self.n_out)


class _QueryOnly(nn.Module):
    """In the place of a fused projection: queries where they belong, zeros elsewhere."""

    def __init__(self, dense: nn.Linear, rows: SharedRows) -> None:
        super().__init__()
        self.groups = rows.groups
        n_queries = rows.groups * rows.query_width
        self.n_rest = dense.out_features // rows.groups - rows.query_width
        self.query = nn.Linear(dense.in_features, n_queries, bias=dense.bias is not None)
        self.query.to(dense.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        queries = self.query(hidden_states).unflatten(-1, (self.groups, -1))
        return functional.pad(queries, (0, self.n_rest)).flatten(-2)


def _without_keys_and_values(attention: nn.Module) -> None:
    """Take an expert's own keys and values away: it will attend over the first expert's."""
    rows = shared_rows(attention)
    for name in rows.modules:
        module = getattr(attention, name)
        is_projection = isinstance(module, nn.Linear)
        setattr(attention, name, _NoStates(module.out_features) if is_projection else nn.Identity())
    if rows.fused:
        setattr(attention, rows.fused, _QueryOnly(getattr(attention, rows.fused), rows))


def dense_blocks(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield each block of a decoder with the names of its attention and feed-forward module."""
    for block in decoder.modules():
        attention = [name for name in ATTENTION_NAMES if _has(block, name)]
        feed_forward = [name for name in FEED_FORWARD_NAMES if _has(block, name)]
        if attention and feed_forward:
            yield block, attention[0], feed_forward[0]


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def check_convertible(decoder: nn.Module) -> None:
    """Raise a `ModelError` if some block of a decoder cannot become a mixture.

    Raises
    ------
    bakeoff.errors.ModelError
        Says what the block lacks, or has too much of.
    """
    name = type(decoder).__name__
    expected = decoder.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    blocks = list(dense_blocks(decoder))
    if len(blocks) != expected:
        raise ModelError(
            f"{name} has {expected} blocks, of which {len(blocks)} have an attention module named "
            f"{' or '.join(ATTENTION_NAMES)} beside a feed-forward module named "
            f"{' or '.join(FEED_FORWARD_NAMES)}: all must"
        )
    for block, attention, feed_forward in blocks:
        cache_argument(getattr(block, attention))
        network = getattr(block, feed_forward)
        if _has(network, "experts") or _has(network, "router"):
            raise ModelError(f"{name} is a mixture of experts already; its parts must be dense")
        taken = inspect.signature(network.forward).parameters.values()
        if sum(parameter.default is parameter.empty for parameter in taken) != 1:
            raise ModelError(
                f"the feed-forward module of {name}, {type(network).__name__}, takes more than the "
                "hidden states: it cannot become an expert"
            )


class UpcycledForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A decoder of transformers with several experts in every block.

    Made by `bakeoff.experts.bam.upcycle`; ``save_pretrained`` and ``from_pretrained`` keep it as
    safetensors and JSON. ``decoder`` is the dense model's class, whose blocks hold an
    `AttentionMixture` (method ``"bam"``) and a `FeedForwardMixture` where the dense modules were.
    """

    config_class = UpcycledConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012  transformers' convention

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        check_convertible(self.decoder)
        self._batch = _Batch()
        blocks = list(dense_blocks(self.decoder))
        for block, attention, feed_forward in blocks:
            if config.method == "bam":
                mixture = self._attention(getattr(block, attention), len(blocks))
                setattr(block, attention, mixture)
            dense = getattr(block, feed_forward)
            experts = _copies(dense, config.n_experts)
            router = self._router(config.ffn_top_k, config.normalize_ffn)
            setattr(block, feed_forward, FeedForwardMixture(experts, router, self._batch))
        self.post_init()

    def _attention(self, dense: nn.Module, n_layers: int) -> AttentionMixture:
        config = self.config
        experts = _copies(dense, config.n_experts)
        if config.share_kv:
            for expert in experts[1:]:
                _without_keys_and_values(expert)
        n_chosen = config.n_experts if config.attn_routing == "soft" else config.attn_routing
        return AttentionMixture(
            experts,
            self._router(n_chosen),
            self._batch,
            n_layers=n_layers,
            share_kv=config.share_kv,
        )

    def _router(self, top_k: int, normalize: bool = False) -> ExpertRouter:
        config = self.config
        hidden = config.text_config.get_text_config().hidden_size
        return ExpertRouter(hidden, config.n_experts, top_k, normalize, config.router_init_std)

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token embeddings."""
        return self.decoder.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's language-model head."""
        return self.decoder.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder's language-model head."""
        self.decoder.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the decoder without its language-model head."""
        return self.decoder.get_decoder()  # type: ignore[no-any-return]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of one generation step: the decoder's own choice."""
        return self.decoder.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[no-any-return]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> UpcycledOutput:
        """Predict the next token at every position.

        Parameters
        ----------
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache
            As of every causal language model of transformers. Padding, where a two-dimensional
            `attention_mask` is 0, goes to no feed-forward expert and counts in no auxiliary loss.
        output_router_logits
            Whether to return the routers' logits.
        **kwargs
            Go to the decoder.

        Returns
        -------
        UpcycledOutput
            ``loss`` (given `labels`) is the language-model loss, to which ``aux_loss`` is added in
            training mode alone, so that validation losses compare with those of dense models.

        Raises
        ------
        bakeoff.errors.ModelError
            In training with reentrant gradient checkpointing, which cuts off the auxiliary losses.
        """
        batch = self._batch
        padded = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        batch.mask = attention_mask.bool() if padded else None  # type: ignore[union-attr]
        batch.attention, batch.feed_forward = [], []
        try:
            output = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                **kwargs,
            )
            attention, feed_forward = batch.attention, batch.feed_forward
        finally:
            batch.attention, batch.feed_forward = None, None
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None  # or the decoder would have raised an error
        aux_loss = self._aux_loss(feed_forward, batch.token_mask(given.shape[:2]))
        loss = output.loss
        if loss is not None and self.training:
            gates = (m.router.weight for m in self.modules() if isinstance(m, FeedForwardMixture))
            check_gradient(any(routing.logits.requires_grad for routing in feed_forward), gates)
            loss = loss + aux_loss * _share_of_batch(labels, kwargs.get("num_items_in_batch"))
        return UpcycledOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=_logits(feed_forward) if output_router_logits else None,
            attention_router_logits=_logits(attention) if output_router_logits else None,
        )

    def _aux_loss(self, routings: Sequence[Routing], mask: Tensor | None) -> Tensor:
        config = self.config
        total = torch.zeros((), device=self.device)
        for routing in routings:
            total = total + config.load_balance_coefficient * load_balance(routing, mask)
            total = total + config.router_z_coefficient * router_z(routing, mask)
        return total


def load_balance(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return ``N sum_i f_i P_i``, a scalar: 1 where all experts get the same share.

    f is the share of assignments that went to each expert, without gradient; P the mean
    probability. Tokens with a mask ``(T,)`` of False do not count.

    Examples
    --------
    >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> chosen = torch.tensor([[0], [0]])
    >>> float(load_balance(Routing(probs.log(), probs, chosen, torch.ones(2, 1))))
    1.5
    """
    counts = routing.counts.to(routing.probs.dtype)
    fractions = counts / counts.sum().clamp_min(1)
    return routing.n_experts * (fractions * token_mean(routing.probs, mask)).sum()


def router_z(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ``logsumexp(logits)**2``, a scalar.

    Examples
    --------
    >>> logits = torch.zeros(3, 1)
    >>> routing = Routing(logits, logits + 1, torch.zeros(3, 1, dtype=int), logits + 1)
    >>> float(router_z(routing))
    0.0
    """
    return token_mean(routing.logits.logsumexp(dim=-1).square(), mask)


def _share_of_batch(labels: Tensor | None, n_items: Any) -> Any:
    """Return what part of an accumulated batch this forward pass is.

    A trainer that accumulates gradients gives the number of labels of the whole batch, and the
    language-model loss is this part's sum over it: the auxiliary loss is to be scaled alike.
    """
    if n_items is None or labels is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / n_items


def _logits(routings: Sequence[Routing]) -> tuple[Tensor, ...]:
    return tuple(routing.logits for routing in routings)


def _copies(module: nn.Module, number: int) -> list[nn.Module]:
    """Return the module and copies of it, which keep referring to the model's one config."""
    config = getattr(module, "config", None)
    others = [copy.deepcopy(module, {id(config): config}) for _ in range(number - 1)]
    return [module, *others]


AutoConfig.register(UpcycledConfig.model_type, UpcycledConfig, exist_ok=True)
AutoModelForCausalLM.register(UpcycledConfig, UpcycledForCausalLM, exist_ok=True)
