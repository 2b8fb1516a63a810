"""BAM against a model written out by hand, transformers' own mixtures, and closed forms."""

import copy
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.bam import average_models, mixture_cost, upcycle
from bakeoff.experts.causal_training import domain_batches, train_causal
from bakeoff.experts.protocol import Router
from bakeoff.experts.upcycled_model import (
    ExpertRouter,
    FeedForwardMixture,
    UpcycledConfig,
    UpcycledForCausalLM,
    _Batch,
    load_balance,
    router_z,
)

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 6}
WINDOW = {**GROUPED, "sliding_window": 4}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, WINDOW),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GROUPED, "head_dim": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA),
    "phi3": (Phi3ForCausalLM, Phi3Config, GROUPED),
    # parallel attention and feed-forward:
    "cohere": (CohereForCausalLM, CohereConfig, {**GROUPED, "use_qk_norm": True}),
    "phi": (PhiForCausalLM, PhiConfig, {**GROUPED, "hidden_size": 32, "qk_layernorm": True}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**SHAPE, "hidden_size": 32}),
}
TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])


def dense(kind: str = "llama", seed: int = 0, **changes):
    """Return a small model whose every weight is random, norms and biases too."""
    model_class, config_class, shape = KINDS[kind]
    model = model_class(config_class(**{**shape, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1 / math.sqrt(parameter.shape[-1])
            start = parameter if parameter.ndim == 1 else 0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(start + scale * noise)
    return model


def three(kind: str = "llama", **changes):
    return [dense(kind, seed, **changes) for seed in range(3)]


def mixture(kind: str = "llama", **settings):
    return upcycle(three(kind), router_init_std=0.5, **settings)


# A model written out by hand -----------------------------------------------------------------


def rotated(states, position, theta, interleaved):
    """Rotate ``(heads, d)`` by the angles of one position."""
    d = states.shape[-1]
    angles = position / theta ** (torch.arange(0, d, 2, dtype=states.dtype) / d)
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        even, odd = states[:, 0::2], states[:, 1::2]
        turned = torch.empty_like(states)
        turned[:, 0::2], turned[:, 1::2] = even * cos - odd * sin, odd * cos + even * sin
        return turned
    low, high = states[:, : d // 2], states[:, d // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attention_by_hand(u, weights, config, interleaved):
    """Return what one expert makes of ``(T, h)``, query by query and head by head."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    d = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    queries = (u @ weights["q"].T).view(len(u), heads, d)
    keys = (u @ weights["k"].T).view(len(u), groups, d)
    values = (u @ weights["v"].T).view(len(u), groups, d)
    out = []
    for t in range(len(u)):
        q = rotated(queries[t], t, theta, interleaved)
        k = torch.stack([rotated(keys[s], s, theta, interleaved) for s in range(t + 1)])
        parts = []
        for head in range(heads):
            group = head * groups // heads
            scores = (k[:, group] @ q[head] / math.sqrt(d)).softmax(dim=0)
            parts.append(scores @ values[: t + 1, group])
        out.append(torch.cat(parts) @ weights["o"].T)
    return torch.stack(out)


def gates_by_hand(u, router, k, normalize):
    """Return ``(T, N)`` gates, token by token."""
    rows = []
    for token in u:
        p = (router @ token).softmax(dim=0)
        best = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        kept = torch.zeros_like(p)
        for i in best:
            kept[i] = p[i] / (sum(p[j] for j in best) if normalize else 1)
        rows.append(kept)
    return torch.stack(rows)


def logits_by_hand(models, routers, ids, parallel, **settings):
    """Return ``(T, V)`` of the mixture of Llama (or Cohere, parallel) models, by its formulas."""
    method = settings.get("method", "bam")
    n, config = len(models), models[0].config
    states = [{k: v.double() for k, v in model.state_dict().items()} for model in models]

    def mean(name):
        return sum(state[name] for state in states) / n

    def norm(x, name):
        if parallel:
            x = x - x.mean(dim=-1, keepdim=True)
            return (
                x * (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).rsqrt() * mean(name)
            )
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * mean(name)

    x = mean("model.embed_tokens.weight")[ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"

        def attention(u, at=at, layer=layer):
            experts = []
            for state in states:
                own = {p: state[f"{at}.self_attn.{p}_proj.weight"] for p in "qkvo"}
                average = {p: mean(f"{at}.self_attn.{p}_proj.weight") for p in "qkvo"}
                if method == "btx":
                    own = average
                elif settings.get("share_kv"):
                    own = {**own, "k": average["k"], "v": average["v"]}
                experts.append(attention_by_hand(u, own, config, interleaved=parallel))
            if method == "btx":
                return experts[0]
            k = settings.get("attn_routing", "soft")
            router = routers[f"decoder.{at}.self_attn.router.weight"].double()
            gates = gates_by_hand(u, router, n if k == "soft" else k, normalize=False)
            return sum(gates[:, j, None] * experts[j] for j in range(n))

        def feed_forward(u, at=at):
            router = routers[f"decoder.{at}.mlp.router.weight"].double()
            gates = gates_by_hand(
                u, router, settings.get("ffn_top_k", 1), settings.get("normalize_ffn", False)
            )
            total = torch.zeros_like(u)
            for j, state in enumerate(states):
                gate, up, down = (
                    state[f"{at}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")
                )
                hidden = functional.silu(u @ gate.T) * (u @ up.T)
                total = total + gates[:, j, None] * (hidden @ down.T)
            return total

        if parallel:
            u = norm(x, f"{at}.input_layernorm.weight")
            x = x + attention(u) + feed_forward(u)
        else:
            x = x + attention(norm(x, f"{at}.input_layernorm.weight"))
            x = x + feed_forward(norm(x, f"{at}.post_attention_layernorm.weight"))
    x = norm(x, "model.norm.weight")
    if parallel:
        return config.logit_scale * x @ mean("model.embed_tokens.weight").T
    return x @ mean("lm_head.weight").T


@pytest.mark.parametrize("kind", ["llama", "cohere"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_kv": True},
        {"method": "btx"},
        {"method": "btx", "ffn_top_k": 2, "normalize_ffn": True},
        {"attn_routing": 1},
        {"attn_routing": 2, "ffn_top_k": 2},
        {"ffn_top_k": 3, "share_kv": True},
    ],
    ids=str,
)
def test_the_mixture_is_what_its_formulas_say(kind, settings):
    models = three(kind, **({"use_qk_norm": False} if kind == "cohere" else {}))
    model = upcycle(models, router_init_std=0.5, **settings).double()
    with torch.no_grad():
        ours = model(TOKENS).logits
        for row, ids in enumerate(TOKENS):
            by_hand = logits_by_hand(
                models, model.state_dict(), ids, parallel=kind == "cohere", **settings
            )
            torch.testing.assert_close(ours[row], by_hand, rtol=0, atol=2e-6)
            # rotary angles are float32 in transformers


def test_the_routers_gradients_are_those_of_the_formulas():
    models = three()
    model = upcycle(models, ffn_top_k=2, router_init_std=0.5).double()
    ids = TOKENS[0]
    direction = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).double()
    (model(ids[None]).logits[0] * direction).sum().backward()
    routers = {n: p for n, p in model.named_parameters() if "router" in n}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in routers.items()}
    by_hand = logits_by_hand(models, leaves, ids, parallel=False, ffn_top_k=2)
    (by_hand * direction).sum().backward()
    for name, router in routers.items():
        torch.testing.assert_close(router.grad, leaves[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"share_kv": True}, {"method": "btx"}], ids=str)
def test_equal_copies_are_the_dense_model_for_any_router(kind, settings):
    model = dense(kind)
    for ffn in ({"ffn_top_k": 3}, {"ffn_top_k": 1, "normalize_ffn": True}):
        with pytest.warns(UserWarning, match="all 3 models are equal"):
            mixed = upcycle([model] * 3, router_init_std=2.0, **settings, **ffn)
        for mask in (None, PADDED):
            kept = slice(None) if mask is None else mask.bool()
            with torch.no_grad():
                ours = mixed(TOKENS, attention_mask=mask).logits[kept]
                theirs = model(TOKENS, attention_mask=mask).logits[kept]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_attention_alone_equals_the_dense_one_where_the_feed_forward_does_not():
    model = dense()
    with pytest.warns(UserWarning, match="equal"):
        mixed = upcycle([model, model], router_init_std=2.0)
    seen = {}
    for name, decoder in (("ours", mixed.decoder), ("theirs", model)):
        module = decoder.model.layers[0].self_attn
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o[0]}))
    with torch.no_grad():
        assert not torch.allclose(mixed(TOKENS).logits, model(TOKENS).logits, atol=1e-2)
    torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=0, atol=1e-6)


def test_a_certain_router_gives_one_experts_attention():
    models = three()
    mixed = upcycle(models)
    module = mixed.decoder.model.layers[1].self_attn
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    hidden[..., 0] = 1.0
    angles = mixed.decoder.model.rotary_emb(hidden, torch.arange(7)[None])
    for expert, model in enumerate(models):
        with torch.no_grad():
            module.router.weight.zero_()[expert, 0] = 200.0
            ours, _ = module(hidden, position_embeddings=angles, attention_mask=None)
            own = model.model.layers[1].self_attn
            theirs, _ = own(hidden, position_embeddings=angles, attention_mask=None)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Against mixtures of transformers --------------------------------------------------------------


def test_shared_keys_and_values_are_jetmoes_mixture_of_attention():
    n, d, heads, length = 3, 6, 4, 7
    config = JetMoeConfig(
        hidden_size=24,
        num_key_value_heads=heads,
        kv_channels=d,
        num_local_experts=n,
        num_experts_per_tok=n,
        attn_implementation="eager",
    )
    theirs = JetMoeAttention(config, layer_idx=0).eval()
    models = three(num_key_value_heads=heads)
    mixed = upcycle(models, share_kv=True, router_init_std=0.5)
    module = mixed.decoder.model.layers[0].self_attn
    hidden = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length)[None]
    with torch.no_grad():
        attentions = [model.model.layers[0].self_attn for model in models]
        queries = torch.stack([a.q_proj.weight for a in attentions])
        outputs = torch.stack([a.o_proj.weight for a in attentions])
        keys = torch.stack([a.k_proj.weight for a in attentions]).mean(0)
        values = torch.stack([a.v_proj.weight for a in attentions]).mean(0)
        theirs.experts.input_linear.weight.copy_(queries)
        theirs.experts.output_linear.weight.copy_(outputs)
        theirs.experts.bias.zero_()
        theirs.experts.router.layer.weight.copy_(module.router.weight)
        theirs.kv_proj.weight.copy_(torch.cat([keys, values]))
        rotary = JetMoeRotaryEmbedding(config)(hidden, positions)
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        expected = theirs(hidden, attention_mask=causal, position_embeddings=rotary)[0]
        angles = mixed.decoder.model.rotary_emb(hidden, positions)
        ours, _ = module(hidden, position_embeddings=angles, attention_mask=None)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def mixtral_block(models, router, top_k):
    config = MixtralConfig(
        hidden_size=24,
        intermediate_size=36,
        num_local_experts=len(models),
        num_experts_per_tok=top_k,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config).eval()
    networks = [model.model.layers[0].mlp for model in models]
    fused = [torch.cat([m.gate_proj.weight, m.up_proj.weight]) for m in networks]
    with torch.no_grad():
        block.gate.weight.copy_(router)
        block.experts.gate_up_proj.copy_(torch.stack(fused))
        block.experts.down_proj.copy_(torch.stack([m.down_proj.weight for m in networks]))
    return block


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_normalised_feed_forward_experts_are_mixtrals(top_k):
    models = three()
    mixed = upcycle(models, ffn_top_k=top_k, normalize_ffn=True, router_init_std=0.5)
    module = mixed.decoder.model.layers[0].mlp
    block = mixtral_block(models, module.router.weight, top_k)
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(hidden)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(module(hidden), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_the_balance_loss_is_mixtrals(top_k, mask):
    router = ExpertRouter(24, 4, top_k, std=1.0)
    hidden = torch.randn(TOKENS.numel(), 24, generator=torch.Generator().manual_seed(1))
    flat = None if mask is None else mask.bool().view(-1)
    routing = router(hidden, mask=flat)
    theirs = load_balancing_loss_func((routing.logits,), 4, top_k, mask)
    # Mixtral's fractions sum to k, ours to 1.
    torch.testing.assert_close(load_balance(routing, flat) * top_k, theirs)
    kept = routing.logits if flat is None else routing.logits[flat]
    torch.testing.assert_close(router_z(routing, flat), kept.exp().sum(-1).log().square().mean())


def test_the_routers_follow_the_familys_protocol():
    router = ExpertRouter(8, 3, 2)
    assert isinstance(router, Router)
    mask = torch.tensor([True, False])
    routing = router(torch.randn(2, 8), mask=mask, token_ids=torch.tensor([1, 2]))
    assert routing.indices[1].tolist() == [-1, -1]
    assert routing.weights[1].tolist() == [0.0, 0.0]


class _Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, rows):
        return self.factor * rows.square()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dispatch_equals_a_loop_over_tokens(data):
    n_experts = data.draw(st.integers(2, 5))
    top_k = data.draw(st.integers(1, n_experts))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    flags = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(data.draw(flags)).view(batch, length)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hidden = torch.randn(batch, length, 6, generator=generator)
    router = ExpertRouter(6, n_experts, top_k, data.draw(st.booleans()), std=1.0)
    shared = _Batch()
    shared.mask = mask
    mixed = FeedForwardMixture([_Scaled(i + 1.0) for i in range(n_experts)], router, shared)
    expected = torch.zeros_like(hidden)
    for b in range(batch):
        for t in range(length):
            if not mask[b, t]:
                continue
            p = (router.weight @ hidden[b, t]).softmax(0)
            best = p.topk(top_k).indices.tolist()
            divisor = sum(p[i] for i in best) if router.normalize else 1.0
            for i in best:
                expected[b, t] += p[i] / divisor * (i + 1.0) * hidden[b, t].square()
    torch.testing.assert_close(mixed(hidden), expected, rtol=1e-4, atol=1e-5)


# Initial weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "cohere", "gpt_neox", "phi3"])
@pytest.mark.parametrize("settings", [{}, {"share_kv": True}, {"method": "btx"}], ids=str)
def test_every_weight_is_a_copy_or_the_average(kind, settings):
    models = three(kind)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    mixed = upcycle(models, **settings)
    sources = [model.state_dict() for model in models]
    for source, old in zip(sources, before, strict=True):
        assert all(torch.equal(source[name], old[name]) for name in old)
    rows = {
        "query_key_value": torch.arange(3 * 32) % (3 * 8) < 8,  # GPT-NeoX: 4 heads of 8
        "qkv_proj": torch.arange(24 + 2 * 12) < 24,  # Phi-3: 4 heads of 6, 2 groups
    }
    copied = averaged = 0
    for name, weight in mixed.decoder.state_dict().items():
        if name.endswith("router.weight"):
            continue
        place, _, rest = name.partition(".experts.")
        if not rest:
            mean = torch.stack([source[name].double() for source in sources]).mean(0)
            torch.testing.assert_close(weight, mean.float(), rtol=1e-6, atol=1e-7)
            averaged += 1
            continue
        number, _, leaf = rest.partition(".")
        leaf = leaf.replace(".query.", ".")
        own = sources[int(number)][f"{place}.{leaf}"]
        mean = torch.stack([source[f"{place}.{leaf}"].double() for source in sources]).mean(0)
        module = leaf.partition(".")[0]
        if settings.get("share_kv") and module in ("k_proj", "v_proj", "k_norm"):
            assert number == "0"
            torch.testing.assert_close(weight, mean.float(), rtol=1e-6, atol=1e-7)
        elif settings.get("share_kv") and module in rows:
            if number != "0":
                assert torch.equal(weight, own[rows[module]])
            else:
                assert torch.equal(weight[rows[module]], own[rows[module]])
                rest_of = ~rows[module]
                torch.testing.assert_close(weight[rest_of], mean.float()[rest_of])
        else:
            assert torch.equal(weight, own)
            copied += 1
    assert copied
    assert averaged


def test_the_average_is_the_mean_of_all_weights():
    models = three()
    average = average_models(models)
    for name, weight in average.named_parameters():
        expected = torch.stack([dict(m.named_parameters())[name] for m in models]).mean(0)
        torch.testing.assert_close(weight, expected)
    same = average_models([models[1]] * 3)
    assert all(
        torch.equal(a, b) for a, b in zip(same.parameters(), models[1].parameters(), strict=True)
    )


def test_routers_come_from_the_seed_alone():
    first, second, other = (mixture(seed=seed) for seed in (3, 3, 4))
    name = "decoder.model.layers.0.mlp.router.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    drawn = torch.cat([w.flatten() for n, w in first.named_parameters() if "router" in n])
    assert float(drawn.detach().std()) == pytest.approx(0.5, rel=0.1)


# Costs -----------------------------------------------------------------------------------------


def paper_model(n_experts=4, **settings):
    """The paper's small model (its Table 8), without weights."""
    shape = CohereConfig(
        vocab_size=256_000,
        hidden_size=1024,
        intermediate_size=2048,  # 4096 is the width of both halves of the SwiGLU together
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        if n_experts == 1:
            return CohereForCausalLM(shape)
        return UpcycledForCausalLM(UpcycledConfig(shape, n_experts, **settings))


@pytest.mark.parametrize(
    ("settings", "total", "active", "flops"),
    [
        ({"n_experts": 1}, 587.2, 587.2, None),
        ({"method": "btx"}, 700.5, 587.2, 21.5),
        ({"n_experts": 6, "method": "btx", "ffn_top_k": 3}, 776.0, 662.7, 46.7),
        ({}, 776.0, 662.7, 48.3),
        ({"share_kv": True}, 738.3, None, None),
    ],
    ids=["dense", "btx", "btx 6 experts", "bam", "bam shared"],
)
def test_parameters_and_operations_are_the_papers(settings, total, active, flops):
    cost = mixture_cost(paper_model(**settings), context=128)
    assert cost.parameters / 1e6 == pytest.approx(total, abs=0.06)
    if active:
        assert cost.active_parameters / 1e6 == pytest.approx(active, abs=0.06)
    if flops:
        assert cost.block_flops / 1e6 == pytest.approx(flops, abs=0.06)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "settings",
    [None, {}, {"share_kv": True}, {"ffn_top_k": 2}, {"method": "btx", "ffn_top_k": 2}],
    ids=str,
)
def test_operations_are_those_that_torch_counts(kind, settings):
    model = dense(kind) if settings is None else mixture(kind, **settings)
    model.set_attn_implementation("eager")  # whole T x T products
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(TOKENS, use_cache=False)
    cost = mixture_cost(model, context=TOKENS.shape[1])
    expected = (2 * cost.block_flops + cost.head_flops) * TOKENS.numel()
    angles = 2 * TOKENS.numel() * 4  # the rotary embedding's, an outer product, at most
    assert 0 <= counter.get_total_flops() - expected <= angles


def test_shared_keys_and_values_keep_one_cache():
    sizes = {}
    for name, model in {
        "dense": dense(),
        "own": mixture(),
        "shared": mixture(share_kv=True),
        "btx": mixture(method="btx"),
    }.items():
        with torch.no_grad():
            cache = model(TOKENS, use_cache=True).past_key_values
        sizes[name] = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sizes["shared"] == sizes["btx"] == sizes["dense"]
    assert sizes["own"] == 3 * sizes["dense"]


# Gradients and training --------------------------------------------------------------------------


def gradcheck(module, call, names, hidden):
    """Compare gradients for the input and the named parameters with finite differences."""
    parameters = [module.get_parameter(name).detach().requires_grad_() for name in names]

    def run(hidden, *values):
        replaced = dict(zip(names, values, strict=True))
        outputs = torch.func.functional_call(module, replaced, *call(hidden))
        return tuple(output for output in outputs if output is not None)

    return torch.autograd.gradcheck(run, (hidden.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("settings", [{}, {"share_kv": True}, {"attn_routing": 2}], ids=str)
def test_attention_gradients_are_finite_differences(settings):
    model = mixture(**settings).double()
    hidden = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(1)).double()
    angles = model.decoder.model.rotary_emb(hidden, torch.arange(4)[None])
    rest = {"position_embeddings": angles, "attention_mask": None}
    names = ["router.weight", "experts.2.q_proj.weight", "experts.1.o_proj.weight"]
    names += ["experts.0.k_proj.weight", "experts.0.v_proj.weight"]

    def call(hidden):
        return (hidden,), rest

    assert gradcheck(model.decoder.model.layers[0].self_attn, call, names, hidden)


class _WithLosses(nn.Module):
    """A feed-forward mixture and the losses of its router."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, hidden):
        mask = torch.tensor([True] * 5 + [False])
        routing = self.mixture.router(hidden.view(6, 24), mask=mask)
        return self.mixture(hidden), load_balance(routing, mask), router_z(routing, mask)


@pytest.mark.parametrize("settings", [{}, {"ffn_top_k": 2, "normalize_ffn": True}], ids=str)
def test_feed_forward_gradients_are_finite_differences(settings):
    module = _WithLosses(mixture(**settings).double().decoder.model.layers[0].mlp)
    hidden = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1)).double()
    names = ["mixture.router.weight"]
    names += [f"mixture.experts.{i}.{p}_proj.weight" for i in range(3) for p in ("up", "down")]
    assert gradcheck(module, lambda hidden: ((hidden,), {}), names, hidden)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("share_kv", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, share_kv):
    model = mixture(kind, share_kv=share_kv).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(TOKENS, attention_mask=PADDED, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(gradients[0][name].abs().sum() > 0 for name in gradients[0] if "router" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_auxiliary_losses_that_checkpointing_cuts_off_are_refused(use_reentrant):
    model = mixture().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if not use_reentrant:
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return
    with pytest.raises(ModelError, match="'use_reentrant': False"):
        model(TOKENS, labels=TOKENS, use_cache=False)
    with torch.no_grad():
        assert float(model(TOKENS, labels=TOKENS, use_cache=False).aux_loss) > 0


def test_the_auxiliary_loss_trains_and_does_not_validate():
    model = mixture(load_balance_coefficient=0.5, router_z_coefficient=0.25)
    validated = model(TOKENS, labels=TOKENS, output_router_logits=True)
    trained = model.train()(TOKENS, labels=TOKENS)
    torch.testing.assert_close(trained.loss, validated.loss + validated.aux_loss)
    logits = validated.logits[:, :-1].reshape(-1, 40)
    plain = functional.cross_entropy(logits, TOKENS[:, 1:].reshape(-1))
    torch.testing.assert_close(validated.loss, plain)
    expected = 0
    for router_logits in validated.router_logits:
        p = router_logits.softmax(-1)
        shares = functional.one_hot(p.argmax(-1), 3).float().mean(0)
        expected += 0.5 * 3 * (shares * p.mean(0)).sum()
        expected += 0.25 * router_logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(validated.aux_loss, expected)
    assert len(validated.attention_router_logits) == 2


def test_parts_of_an_accumulated_batch_add_up():
    model = mixture(load_balance_coefficient=1.0).train()
    parts = [TOKENS[:, :5], TOKENS[:, 3:]]
    n_items = sum(part[:, 1:].numel() for part in parts)
    total = sum(model(p, labels=p, num_items_in_batch=n_items).loss for p in parts)
    expected = 0
    for part in parts:
        output = model(part, labels=part)
        expected += output.loss * part[:, 1:].numel() / n_items
    torch.testing.assert_close(total, expected)


def test_the_trainer_of_transformers_trains_it(tmp_path):
    model = mixture()
    rows = [{"input_ids": ids, "labels": ids} for ids in TOKENS.repeat(8, 1)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_lora_adapts_it():
    model = mixture()
    before = model(TOKENS).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(adapted(TOKENS).logits, before)
    adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [p for p in adapted.parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * 3 * 2


# Generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt_neox", "cohere"])
@pytest.mark.parametrize(
    "settings", [{}, {"share_kv": True}, {"method": "btx"}, {"attn_routing": 2}], ids=str
)
def test_generation_with_a_cache_equals_generation_without(kind, settings):
    model = mixture(kind, **settings)
    options = {
        "attention_mask": PADDED,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    without = model.generate(TOKENS, use_cache=False, **options)
    for cache in (None, "static"):
        cached = model.generate(TOKENS, cache_implementation=cache, **options)
        assert torch.equal(cached.sequences, without.sequences)
        for ours, theirs in zip(cached.logits, without.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_beam_search_reorders_every_experts_cache():
    model = mixture()
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with_cache = model.generate(TOKENS, **options)
    assert torch.equal(with_cache, model.generate(TOKENS, use_cache=False, **options))


def test_a_cache_may_be_given_empty_and_not_with_a_dense_models_states():
    model = mixture()
    whole = model(TOKENS).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config.text_config)):
        model(TOKENS[:, :5], past_key_values=cache, use_cache=True)
        rest = model(TOKENS[:, 5:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-5)
    cache = DynamicCache(config=model.config.text_config)
    dense()(TOKENS, past_key_values=cache, use_cache=True)
    with pytest.raises(DataError, match="those of a dense model"):
        model(TOKENS, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_nowhere_and_changes_nothing(side):
    model = mixture(ffn_top_k=2)
    assert (TOKENS[0] == TOKENS[0, 0]).sum() == 1
    alone = model(TOKENS[:1], labels=TOKENS[:1])
    padding = torch.zeros(1, 4, dtype=torch.long)
    ones = torch.ones_like(TOKENS[:1])
    parts = [(padding, padding), (TOKENS[:1], ones)]
    if side == "right":
        parts.reverse()
    ids, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    labels = ids.masked_fill(mask == 0, -100)
    labels[ids == TOKENS[0, 0]] = -100  # padding would predict the first token
    seen = []
    network = model.decoder.model.layers[0].mlp
    for expert in network.experts:
        expert.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    padded = model(ids, attention_mask=mask, labels=labels)
    assert sum(seen) == 2 * TOKENS.shape[1]
    torch.testing.assert_close(padded.logits[mask.bool()], alone.logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.loss, alone.loss)
    torch.testing.assert_close(padded.aux_loss, alone.aux_loss)
    everything = model(ids, attention_mask=torch.zeros_like(mask))  # nothing but padding
    assert everything.aux_loss.item() == 0.0


def test_batch_mates_do_not_matter():
    model = mixture(ffn_top_k=2)
    together = model(TOKENS).logits
    for row in range(2):
        torch.testing.assert_close(
            model(TOKENS[row : row + 1]).logits[0], together[row], rtol=0, atol=1e-5
        )


# Files, devices, dtypes --------------------------------------------------------------------------

LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
import bakeoff.experts.upcycled_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor([[5, 9, 4, 30]])
torch.save((type(model).__name__, model(tokens).logits.detach(),
            model.generate(tokens, max_new_tokens=4, do_sample=False)), sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_another_process_loads_it(kind, tmp_path):
    model = mixture(kind, share_kv=kind != "llama")
    folder = tmp_path / "mixture"
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bakeoff-upcycled"
    command = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, capture_output=True)
    name, logits, generated = torch.load(tmp_path / "result.pt")
    tokens = torch.tensor([[5, 9, 4, 30]])
    assert name == "UpcycledForCausalLM"
    assert torch.equal(logits, model(tokens).logits)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False))


def test_tied_embeddings_stay_tied(tmp_path):
    models = three(tie_word_embeddings=True)
    model = upcycle(models)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    mean = torch.stack([m.get_input_embeddings().weight for m in models]).mean(0)
    torch.testing.assert_close(model.get_input_embeddings().weight, mean)
    model.save_pretrained(tmp_path)
    loaded = UpcycledForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_routers_stay_in_float32(tmp_path):
    models = [model.to(torch.bfloat16) for model in three()]
    model = upcycle(models)
    expert = "decoder.model.layers.0.self_attn.experts.1.q_proj.weight"
    router = "decoder.model.layers.0.self_attn.router.weight"
    model.save_pretrained(tmp_path)
    for made in (model, UpcycledForCausalLM.from_pretrained(tmp_path)):
        assert made.get_parameter(expert).dtype == torch.bfloat16
        assert made.get_parameter(router).dtype == torch.float32
        output = made(TOKENS, labels=TOKENS, output_router_logits=True)
        assert output.logits.dtype == torch.bfloat16
        assert output.router_logits[0].dtype == torch.float32
    whole = mixture()
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(TOKENS, output_router_logits=True).router_logits[0].dtype == torch.float32
    everything = whole.to(torch.bfloat16)(TOKENS, output_router_logits=True)
    assert everything.router_logits[0].dtype == torch.float32


def test_folders_are_as_good_as_models(tmp_path):
    folders = []
    for number, model in enumerate(three()):
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
    assert torch.equal(upcycle(folders)(TOKENS).logits, upcycle(three())(TOKENS).logits)


def test_a_copy_is_a_model_of_its_own():
    model = mixture()
    expected = model(TOKENS).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(TOKENS).logits, expected)


def test_tuples_and_embeddings():
    model = mixture()
    output = model(TOKENS, labels=TOKENS)
    loss, _, logits = model(TOKENS, labels=TOKENS, return_dict=False)[:3]
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    embedded = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model(inputs_embeds=embedded).logits, output.logits)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, 'method must be "bam" or "btx"'),
        ({"ffn_top_k": 4}, "ffn_top_k must be between 1 and the number of experts, 3, got 4"),
        ({"ffn_top_k": 0}, "ffn_top_k"),
        ({"ffn_top_k": True}, "ffn_top_k"),
        ({"attn_routing": 4}, 'attn_routing must be "soft" or between 1'),
        ({"attn_routing": "hard"}, "attn_routing"),
        ({"method": "btx", "share_kv": True}, "belong to method"),
        ({"method": "btx", "attn_routing": 1}, "belong to method"),
        ({"router_init_std": -1.0}, "router_init_std"),
        ({"load_balance_coefficient": float("nan")}, "load_balance_coefficient"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        upcycle(three(), **settings)


def with_weight(name, change):
    model = dense()
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


def without_weight():
    model = dense()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: dense("qwen3"), r"models\[1\] is a Qwen3ForCausalLM, models\[0\] a Llama"),
        (lambda: dense(intermediate_size=40), "intermediate_size = 40, that of .* 36"),
        (lambda: dense(vocab_size=41), "vocab_size = 41"),
        (lambda: dense(rms_norm_eps=1e-3), "rms_norm_eps"),
        (without_weight, r"models\[1\] lacks the weight model.layers.1.mlp.up_proj.weight"),
        (lambda: with_weight("model.norm.weight", lambda w: w.fill_(torch.nan)), "not finite"),
        (lambda: paper_model(1), r"models\[1\] is a CohereForCausalLM"),
        (lambda: mixture(), "mixture already"),
        (lambda: get_peft_model(dense(), LoraConfig(target_modules=["q_proj"])), "merge its ada"),
        (lambda: dense().model.norm, "must be a causal language model"),
        (lambda: "no/such/folder", "cannot be loaded"),
    ],
)
def test_models_that_do_not_fit_are_refused(other, message):
    with pytest.raises((DataError, ModelError), match=message):
        upcycle([dense(), other()])


def test_too_few_models_are_refused():
    for models in ([], [dense()], dense(), "folder"):
        with pytest.raises(DataError, match="at least 2"):
            upcycle(models)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**GROUPED))
    with pytest.raises(DataError, match="meta device"):
        upcycle([empty, empty])


def test_architectures_that_do_not_fit_are_refused():
    opt = {"vocab_size": 40, "hidden_size": 24, "ffn_dim": 36, "num_hidden_layers": 2}
    model = OPTForCausalLM(
        OPTConfig(**opt, num_attention_heads=4, word_embed_proj_dim=24, pad_token_id=0)
    )
    with pytest.raises(ModelError, match="2 blocks, of which 0"):
        upcycle([model, model])
    model = MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2))
    with pytest.raises(ModelError, match="mixture of experts already"):
        upcycle([model, model])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="share_kv needs separate q_proj"):
        upcycle([model, model], share_kv=True)


def tokenizer(*tokens, split="Whitespace"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    inner.pre_tokenizer = getattr(pre_tokenizers, split)()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=tokens[0])


def test_tokenizers_that_differ_are_refused(tmp_path):
    first = tokenizer("?", "a", "b", "c")
    models = [dense(seed=0), dense(seed=1)]
    upcycle(models, tokenizers=[first, tokenizer("?", "a", "b", "c")])
    for other, message in [
        (tokenizer("?", "a", "c", "b"), r"token 'b' has id 2 in one and 3 in the other"),
        (tokenizer("?", "a", "b"), "token 'c' has id 3 in one and None"),
        (tokenizer("?", "a", "b", "c", split="ByteLevel"), "split text differently"),
    ]:
        with pytest.raises(DataError, match=message):
            upcycle(models, tokenizers=[first, other])
        for number, (model, own) in enumerate(zip(models, (first, other), strict=True)):
            model.save_pretrained(tmp_path / str(number))
            own.save_pretrained(tmp_path / str(number))
        with pytest.raises(DataError, match=message):
            upcycle([tmp_path / "0", tmp_path / "1"])
    with pytest.raises(DataError, match="2 models but 1 tokenizers"):
        upcycle(models, tokenizers=[first])


# Training of all arms ----------------------------------------------------------------------------


def domains(length=16, rows=24):
    """Three languages, each of which counts upwards in steps of its own."""
    starts = torch.arange(rows)[:, None]
    return {
        name: 3 + (starts + step * torch.arange(length)) % 36
        for name, step in (("ones", 1), ("fives", 5), ("sevens", 7))
    }


def test_batches_mix_the_domains_in_their_shares():
    texts = domains()
    batches = domain_batches(texts, {"ones": 9, "fives": 1}, batch_size=400, seed=1)
    batch = next(batches)
    steps = (batch[:, 1] - batch[:, 0]) % 36
    assert set(steps.tolist()) == {1, 5}
    assert (steps == 5).float().mean() == pytest.approx(0.1, abs=0.04)
    again = next(domain_batches(texts, {"ones": 9, "fives": 1}, batch_size=400, seed=1))
    assert torch.equal(batch, again)
    rows = next(domain_batches({"ones": texts["ones"]}, batch_size=48))
    for part in (rows[:24], rows[24:]):  # every sequence once before any twice
        assert sorted(part[:, 0].tolist()) == sorted(texts["ones"][:, 0].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {"four": 1.0}}, "'four'; there are: ones, fives, sevens"),
        ({"shares": {"ones": -1.0}}, "share of 'ones'"),
        ({"shares": {"ones": 0.0}}, "more than 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"domains": {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}}, "'b' must hold"),
        ({"domains": {"a": torch.zeros(0, 3)}}, "'a' must hold"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    settings = {"domains": domains(), "batch_size": 2, **arguments}
    with pytest.raises(DataError, match=message):
        domain_batches(settings.pop("domains"), **settings)


def test_the_learning_rate_rises_and_falls_along_a_cosine(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    calls = []
    batches = domain_batches(domains(), batch_size=2)
    train_causal(
        dense(),
        batches,
        steps=9,
        peak_learning_rate=1e-3,
        warmup_steps=4,
        progress=lambda done, steps: calls.append((done, steps)),
    )
    half = 1e-3 * (0.1 + 0.9 / 2)
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert [rates[4], rates[6], rates[8]] == pytest.approx([1e-3, half, 1e-4])
    assert calls[0] == (1, 9)
    assert calls[-1] == (9, 9)
    for bad in ({"steps": 0}, {"warmup_steps": 10}, {"peak_learning_rate": 0.0}):
        settings = {"steps": 2, "peak_learning_rate": 1e-3, **bad}
        with pytest.raises(DataError, match="must be"):
            train_causal(dense(), batches, **settings)
    with pytest.raises(DataError, match="ended after 1 of 2 steps"):
        train_causal(dense(), [TOKENS], steps=2, peak_learning_rate=1e-3)


def test_all_three_phases_and_the_rivals():
    texts = domains()

    def fit(model, shares, steps, seed, rate=3e-3):
        batches = domain_batches(texts, shares, batch_size=8, seed=seed)
        losses = train_causal(model, batches, steps=steps, peak_learning_rate=rate, warmup_steps=2)
        return model, losses

    @torch.no_grad()
    def loss(model, name):
        return float(model(texts[name], labels=texts[name]).loss)

    base, _ = fit(dense(seed=7), None, 10, seed=0)
    specialists = []
    for seed, name in enumerate(("fives", "sevens")):
        shares = {name: 0.9, "ones": 0.1}
        specialist, losses = fit(copy.deepcopy(base), shares, 15, seed=seed)
        assert loss(specialist, name) < 0.9 * loss(base, name)
        assert losses[-1] < losses[0]
        specialists.append(specialist)
    parts = [base, *specialists]
    arms = {
        "bam": upcycle(parts),
        "shared": upcycle(parts, share_kv=True),
        "btx": upcycle(parts, "btx"),
        "average": average_models(parts),
        "dense": copy.deepcopy(base),
    }
    for arm in arms.values():
        before = sum(loss(arm, name) for name in texts)
        fit(arm, None, 8, seed=5)
        assert sum(loss(arm, name) for name in texts) < 0.95 * before
    again = upcycle(parts)
    fit(again, None, 8, seed=5)
    assert loss(again, "ones") == loss(arms["bam"], "ones")  # nothing but the seeds decides


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture()(TOKENS, labels=TOKENS)
