"""Branch-Attend-Mix (BAM): several trained copies of a dense decoder become one mixture.

The three phases of the paper, and its rivals: `train_causal` on `domain_batches` trains copies of a
seed on their domains (branch) and later the mixture (mix); `upcycle` builds the mixture, or that
of Branch-Train-Mix; `average_models` builds the plain average.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.upcycled_model import (
    FEED_FORWARD_NAMES,
    AttentionMixture,
    FeedForwardMixture,
    Method,
    SharedRows,
    UpcycledConfig,
    UpcycledForCausalLM,
    check_convertible,
    dense_blocks,
    shared_rows,
)

METHOD = {
    "slug": "bam",
    "title": "Branch-Attend-Mix: dense specialists upcycled to a mixture of attention and "
    "feed-forward experts",
    "paper": "Zhang et al., BAM! Just Like That: Simple and Efficient Parameter Upcycling for "
    "Mixture of Experts, NeurIPS 2024, arXiv 2408.08274",
    "designs": ["bam", "bam-shared-kv", "btx", "btx-larger", "average", "dense-continued"],
    "names": [
        "upcycle",
        "average_models",
        "train_causal",
        "domain_batches",
        "mixture_cost",
        "MixtureCost",
    ],
}

# What may differ between configurations of models that mix: none of it changes a computation.
_IMMATERIAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_IMMATERIAL |= {"use_cache", "_attn_implementation", "attn_implementation"}

_EXPERT_WEIGHT = re.compile(r"(?P<mixture>.+?)\.experts\.(?P<number>\d+)\.(?P<rest>.+)")


def upcycle(
    models: Sequence[PreTrainedModel | str | Path],
    method: Method = "bam",
    *,
    share_kv: bool = False,
    ffn_top_k: int = 1,
    attn_routing: Literal["soft"] | int = "soft",
    normalize_ffn: bool = False,
    load_balance_coefficient: float = 1e-2,
    router_z_coefficient: float = 1e-3,
    router_init_std: float = 0.02,
    seed: int = 0,
    tokenizers: Sequence[Any] | None = None,
) -> UpcycledForCausalLM:
    """Merge N dense decoders of one architecture into a mixture with N experts in every block.

    With u the normalised input of a block, ``y = x + sum_j g_j(u) Attention_j(u) + sum_{i in T}
    p_i(u) FFN_i(u)``: g is the softmax of a linear router over all N attention modules, p that of
    another over the feed-forward networks, T its `ffn_top_k` largest. Attention and feed-forward
    experts are copied; whatever else there is (norms, embeddings, head) is averaged; routers are
    random. The result is meant to be trained on, whole.

    Parameters
    ----------
    models
        The seed and the specialists trained from it, at least two: models, or folders and hub ids.
        Weights are copied; the models stay as they are.
    method
        ``"bam"``, or ``"btx"`` (Branch-Train-Mix), which averages the attention modules as well.
    share_kv
        Average the key and value projections (and key norms): each attention expert has its own
        query and output projection, and the cache is as small as the dense model's. Otherwise it
        is N times as large.
    ffn_top_k
        Feed-forward experts per token. The paper's is 1.
    attn_routing
        ``"soft"`` (the paper's), or how many attention experts count: the weights of the others
        become 0, those that stay are not rescaled. All are computed in either case, because later
        tokens need their keys and values.
    normalize_ffn
        Divide the weights of a token's feed-forward experts by their sum. The paper does not: with
        a random router and ``ffn_top_k=1`` the feed-forward output starts at about 1/N of its
        size. With 1 expert per token a divided weight is always 1, so that the router learns from
        the auxiliary losses alone.
    load_balance_coefficient, router_z_coefficient
        Factors of the auxiliary losses of the feed-forward routers, summed over blocks; the paper
        gives none, these are the usual ones.
    router_init_std
        Standard deviation of the routers' first weights; not given in the paper either.
    seed
        Of the routers' first weights.
    tokenizers
        Those of the models, to be compared. For folders they are read if they are there.

    Returns
    -------
    UpcycledForCausalLM
        In evaluation mode, on the device and in the dtype of the first model; routers in float32.
        ``generate``, ``save_pretrained``, gradient checkpointing and ``Trainer`` work as with any
        model; ``forward`` also returns ``aux_loss``.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If there are fewer than two models, a setting is impossible, a weight is not
        finite, or models differ in class, configuration, weights or tokenizer: names the first
        difference.
    bakeoff.errors.ModelError
        (a ValueError) If the architecture has blocks that cannot become experts.

    Warns
    -----
    UserWarning
        If all models are equal.

    Notes
    -----
    In the paper every block is parallel, one norm before attention and feed-forward; Cohere's and
    Phi's are, GPT-NeoX's have two norms. Blocks of the usual sequential kind (Llama, Qwen, Mistral,
    Gemma) stay sequential: the feed-forward router then sees what the attention mixture did, which
    is not the paper's model. Attention and feed-forward run one after the other here; the paper's
    implementation overlaps them.

    The weights of a token's experts are those of the softmax over all experts. Branch-Train-Mix
    itself takes the softmax over the selected ones: ``normalize_ffn=True, ffn_top_k=2``.

    References
    ----------
    Qizhen Zhang, Nikolas Gritsch, Dwaraknath Gnaneshwar, Simon Guo, David Cairuz, Bharat
    Venkitesh, Jakob Foerster, Phil Blunsom, Sebastian Ruder, Ahmet Üstün and Acyr Locatelli. "BAM!
    Just like that: simple and efficient parameter upcycling for mixture of experts". NeurIPS 2024.
    arXiv:2408.08274. Sainbayar Sukhbaatar et al. "Branch-Train-MiX: mixing expert LLMs into a
    mixture-of-experts LLM". COLM 2024. arXiv:2403.07816.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
    ...                     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    >>> mixture = upcycle([LlamaForCausalLM(shape) for _ in range(3)])
    >>> tokens = torch.tensor([[5, 3, 8]])
    >>> mixture(tokens, labels=tokens).logits.shape
    torch.Size([1, 3, 32])
    >>> mixture.generate(tokens, max_new_tokens=2, do_sample=False).shape
    torch.Size([1, 5])
    """
    dense = _compatible(models, tokenizers)
    first = dense[0]
    config = UpcycledConfig(
        text_config=copy.deepcopy(first.config),
        n_experts=len(dense),
        method=method,
        share_kv=share_kv,
        ffn_top_k=ffn_top_k,
        attn_routing=attn_routing,
        normalize_ffn=normalize_ffn,
        load_balance_coefficient=load_balance_coefficient,
        router_z_coefficient=router_z_coefficient,
        router_init_std=router_init_std,
        dtype=first.dtype,
    )
    check_convertible(first)
    sharing = shared_rows(_first_attention(first)) if share_kv else None
    if all(_same_weights(first, other) for other in dense[1:]):
        warnings.warn(
            f"all {len(dense)} models are equal: the experts of the mixture start equal too",
            stacklevel=2,
        )
    with torch.device("meta"):
        mixture = UpcycledForCausalLM(config)
    if type(mixture.decoder) is not type(first):
        raise ModelError(
            f"models[0] is a {type(first).__name__}, but a causal language model of this "
            f"configuration is a {type(mixture.decoder).__name__}"
        )
    _fill(mixture, _Sources(dense, sharing, router_init_std, seed))
    mixture.generation_config = copy.deepcopy(first.generation_config)
    mixture.eval()
    return mixture


def average_models(
    models: Sequence[PreTrainedModel | str | Path], *, tokenizers: Sequence[Any] | None = None
) -> PreTrainedModel:
    """Return the dense model whose every weight is the mean over models: the simplest merger.

    Parameters
    ----------
    models, tokenizers
        As of `upcycle`.

    Returns
    -------
    transformers.PreTrainedModel
        Of the class of the models, in evaluation mode, on the device and in the dtype of the first.

    Raises
    ------
    bakeoff.errors.DataError
        As `upcycle`.

    References
    ----------
    Mitchell Wortsman et al. "Model soups". ICML 2022. arXiv:2203.05482.
    """
    dense = _compatible(models, tokenizers)
    average = copy.deepcopy(dense[0])
    weights = [model.state_dict() for model in dense]
    with torch.no_grad():
        for name, weight in average.state_dict().items():
            weight.copy_(_mean([each[name] for each in weights]))
    return average.eval()


def _compatible(
    models: Sequence[PreTrainedModel | str | Path], tokenizers: Sequence[Any] | None
) -> list[PreTrainedModel]:
    """Return the models, loaded; raise an error unless they can be mixed."""
    if isinstance(models, str | Path | nn.Module):
        raise DataError(f"models must be a sequence of at least 2, got one {type(models).__name__}")
    models = list(models)
    if len(models) < 2:
        raise DataError(f"models must hold at least 2 models, got {len(models)}")
    if tokenizers is None:
        tokenizers = [_tokenizer(given) for given in models]
    elif len(tokenizers) != len(models):
        raise DataError(f"there are {len(models)} models but {len(tokenizers)} tokenizers")
    dense = [_loaded(given, f"models[{i}]") for i, given in enumerate(models)]
    for i, other in enumerate(dense):
        _check_same(dense[0], other, f"models[{i}]")
        _check_finite(other, f"models[{i}]")
    known = [(i, tokenizer) for i, tokenizer in enumerate(tokenizers) if tokenizer is not None]
    for i, tokenizer in known[1:]:
        _check_tokenizers(known[0][1], tokenizer, known[0][0], i)
    return dense


def _loaded(given: PreTrainedModel | str | Path, name: str) -> PreTrainedModel:
    if isinstance(given, str | Path):
        try:
            given = AutoModelForCausalLM.from_pretrained(given, dtype="auto")
        except (OSError, ValueError) as error:
            raise ModelError(f"{name}, {given}, cannot be loaded: {error}") from error
    if not isinstance(given, PreTrainedModel):
        hint = ": merge its adapter first" if hasattr(given, "merge_and_unload") else ""
        raise DataError(
            f"{name} must be a causal language model of transformers, or where to load one from, "
            f"got {type(given).__name__}{hint}"
        )
    if isinstance(given, UpcycledForCausalLM):
        raise DataError(f"{name} is a mixture already; its parts must be dense")
    if getattr(given, "hf_quantizer", None) is not None:
        raise DataError(f"{name} is quantised: load it in float32 or bfloat16")
    if getattr(given, "_hf_peft_config_loaded", False):
        raise DataError(f"{name} carries an adapter: merge it first")
    return given


def _check_same(first: PreTrainedModel, other: PreTrainedModel, name: str) -> None:
    if type(first) is not type(other):
        raise DataError(
            f"{name} is a {type(other).__name__}, models[0] a {type(first).__name__}: they must be "
            "of one class"
        )
    ours, theirs = first.config.to_dict(), other.config.to_dict()
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key not in _IMMATERIAL and ours.get(key) != theirs.get(key):
            raise DataError(
                f"the configuration of {name} has {key} = {theirs.get(key)!r}, that of models[0] "
                f"{ours.get(key)!r}: they must agree"
            )
    weights, others = first.state_dict(), other.state_dict()
    for key in [*weights, *(key for key in others if key not in weights)]:
        if key not in weights or key not in others:
            without = name if key in weights else "models[0]"
            raise DataError(f"{without} lacks the weight {key}")
        if weights[key].shape != others[key].shape:
            raise DataError(
                f"the weight {key} of {name} has shape {tuple(others[key].shape)}, that of "
                f"models[0] {tuple(weights[key].shape)}: they must agree"
            )


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for key, weight in model.state_dict().items():
        if weight.is_meta:
            raise DataError(f"the weight {key} of {name} is on the meta device: load the weights")
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise DataError(f"the weight {key} of {name} holds values that are not finite")


def _tokenizer(given: PreTrainedModel | str | Path) -> Any:
    """Return the tokenizer of a model given as a folder or hub id, or None."""
    from transformers import AutoTokenizer

    if isinstance(given, PreTrainedModel | nn.Module):
        return None
    if Path(given).is_dir() and not any(Path(given).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError):
        return None


def _check_tokenizers(first: Any, other: Any, i: int, j: int) -> None:
    ours, theirs = first.get_vocab(), other.get_vocab()
    for token in sorted({**ours, **theirs}, key=lambda t: (ours.get(t, math.inf), t)):
        if ours.get(token) != theirs.get(token):
            raise DataError(
                f"the tokenizers of models[{i}] and models[{j}] differ: token {token!r} has id "
                f"{ours.get(token)} in one and {theirs.get(token)} in the other"
            )
    if first.special_tokens_map != other.special_tokens_map:
        raise DataError(
            f"the tokenizers of models[{i}] and models[{j}] have special tokens "
            f"{first.special_tokens_map} and {other.special_tokens_map}: they must agree"
        )
    rules = [getattr(t, "backend_tokenizer", None) for t in (first, other)]
    if None not in rules and _rules(rules[0]) != _rules(rules[1]):
        raise DataError(
            f"the tokenizers of models[{i}] and models[{j}] have one vocabulary but split text "
            "differently"
        )


def _rules(backend: Any) -> dict[str, Any]:
    import json

    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "model")}


def _same_weights(first: PreTrainedModel, other: PreTrainedModel) -> bool:
    others = dict(other.named_parameters())
    return all(
        torch.equal(weight, others[name].to(weight)) for name, weight in first.named_parameters()
    )


def _first_attention(model: PreTrainedModel) -> nn.Module:
    block, attention, _ = next(iter(dense_blocks(model)))
    module: nn.Module = getattr(block, attention)
    return module


class _Sources:
    """Where each weight of a mixture comes from, by its name below the mixture's decoder."""

    def __init__(
        self,
        dense: Sequence[PreTrainedModel],
        sharing: SharedRows | None,
        router_std: float,
        seed: int,
    ) -> None:
        self._device = dense[0].device
        self._weights = [model.state_dict() for model in dense]
        # Among them those that are not saved, such as the frequencies of a rotary embedding.
        self._buffers = dict(dense[0].named_buffers())
        self._sharing = sharing
        self._router_std = router_std
        self._generator = torch.Generator().manual_seed(seed)

    def weight(self, name: str, like: Tensor) -> Tensor:
        """Return the first value of a parameter or saved buffer of the shape of `like`."""
        if name.endswith(".router.weight"):
            drawn = torch.randn(like.shape, generator=self._generator)
            return (drawn * self._router_std).to(self._device)
        expert = _EXPERT_WEIGHT.fullmatch(name)
        if expert is None:
            return self._mean(name)
        return self._of_expert(expert["mixture"], int(expert["number"]), expert["rest"])

    def buffer(self, name: str) -> Tensor:
        """Return the value of a buffer."""
        expert = _EXPERT_WEIGHT.fullmatch(name)
        source = name if expert is None else f"{expert['mixture']}.{expert['rest']}"
        value: Tensor = self._buffers[source]
        return value.to(self._device, copy=True)

    def _of_expert(self, mixture: str, number: int, rest: str) -> Tensor:
        sharing, source = self._sharing, f"{mixture}.{rest}"
        module = rest.partition(".")[0]
        if sharing is not None and not mixture.endswith(FEED_FORWARD_NAMES):
            if module in sharing.modules:
                return self._mean(source)
            if module == sharing.fused:
                fused = f"{mixture}.{module}.{rest.rpartition('.')[2]}"
                own = self._own(number, fused)
                queries = sharing.query_rows(len(own)).to(own.device)
                if number:  # has queries alone
                    return own[queries]
                return own.where(queries.view(-1, *[1] * (own.ndim - 1)), self._mean(fused))
        return self._own(number, source)

    def _own(self, number: int, name: str) -> Tensor:
        value: Tensor = self._weights[number][name]
        return value.to(self._weights[0][name], copy=True)

    def _mean(self, name: str) -> Tensor:
        return _mean([weights[name] for weights in self._weights]).to(self._device)


def _mean(weights: Sequence[Tensor]) -> Tensor:
    first = weights[0]
    if not first.is_floating_point():
        return first.clone()
    # In float64 the mean of equal float32 values is that value.
    total = first.to(torch.float64)
    for other in weights[1:]:
        total = total + other.to(total)
    return (total / len(weights)).to(first.dtype)


@torch.no_grad()
def _fill(mixture: UpcycledForCausalLM, sources: _Sources) -> None:
    """Give every weight and buffer of a mixture on the meta device its first value."""
    prefix = "decoder."
    state = {
        name: sources.weight(name.removeprefix(prefix), like)
        for name, like in mixture.state_dict().items()
        if name not in mixture.all_tied_weights_keys  # the same tensor as another: tied below
    }
    mixture.load_state_dict(state, strict=False, assign=True)
    for name, _ in list(mixture.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(mixture.get_submodule(owner), leaf, sources.buffer(name.removeprefix(prefix)))
    mixture.tie_weights()
    assert not any(parameter.is_meta for parameter in mixture.parameters())


@dataclass(frozen=True)
class MixtureCost:
    """Sizes and work of a decoder, in closed form.

    Parameters
    ----------
    parameters
        All of them, shared ones once.
    active_parameters
        Those that one token meets: without the feed-forward experts that it does not go to.
    block_flops
        Floating-point operations per token and block, forward; the mean over blocks. A
        multiply-add counts as two; norms, activations and the softmax do not count.
    head_flops
        The same of the language-model head.
    """

    parameters: int
    active_parameters: int
    block_flops: float
    head_flops: int


def mixture_cost(model: PreTrainedModel, context: float) -> MixtureCost:
    """Count parameters and operations of a mixture, or of a dense model to compare it with.

    Parameters
    ----------
    model
        An `UpcycledForCausalLM`, or a dense decoder that could become part of one.
    context
        Keys that a query attends to, in the mean: T for a full ``T x T`` product, ``(T + 1) / 2``
        for one that skips what the causal mask hides.

    Returns
    -------
    MixtureCost
        For a block of N attention experts with M weights each and heads of joint width w, and
        feed-forward experts of F weights, K per token: ``2 (N M + K F + routers) + 4 N context w``.

    Raises
    ------
    bakeoff.errors.DataError
        If `context` is not positive.

    Examples
    --------
    The small model of the paper, its Tables 7 and 9.

    >>> import torch
    >>> from transformers import CohereConfig, CohereForCausalLM
    >>> shape = CohereConfig(vocab_size=256000, hidden_size=1024, intermediate_size=2048,
    ...     num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
    ...     tie_word_embeddings=False)
    >>> with torch.device("meta"):
    ...     model = UpcycledForCausalLM(UpcycledConfig(shape, n_experts=4))
    >>> cost = mixture_cost(model, context=128)
    >>> [round(n / 1e6, 1) for n in (cost.parameters, cost.active_parameters, cost.block_flops)]
    [776.0, 662.8, 48.3]
    """
    if not context > 0:
        raise DataError(f"context must be positive, got {context}")
    decoder = model.decoder if isinstance(model, UpcycledForCausalLM) else model
    config = decoder.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    idle, flops = 0, 0.0
    blocks = list(dense_blocks(decoder))
    for block, attention_name, feed_forward_name in blocks:
        attention = getattr(block, attention_name)
        n_attention = 1
        if isinstance(attention, AttentionMixture):
            n_attention = len(attention.experts)
            flops += 2 * attention.router.weight.numel()
        flops += 2 * _matrix_weights(attention) + 4 * context * width * n_attention
        network = getattr(block, feed_forward_name)
        if isinstance(network, FeedForwardMixture):
            n_idle = len(network.experts) - network.router.top_k
            idle += n_idle * sum(weight.numel() for weight in network.experts[0].parameters())
            flops += 2 * network.router.weight.numel()
            flops += 2 * network.router.top_k * _matrix_weights(network.experts[0])
        else:
            flops += 2 * _matrix_weights(network)
    return MixtureCost(
        parameters=parameters,
        active_parameters=parameters - idle,
        block_flops=flops / len(blocks),
        head_flops=2 * decoder.get_output_embeddings().weight.numel(),
    )


def _matrix_weights(module: nn.Module) -> int:
    """Return how many weights below a module are multiplied with every token."""
    from transformers.pytorch_utils import Conv1D

    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D))
    return sum(layer.weight.numel() for layer in layers)
