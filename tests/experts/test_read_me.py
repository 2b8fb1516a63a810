"""Read-ME against the official code's numbers, dense models and finite differences.

About a minute.
"""

import copy
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from bakeoff.errors import DataError, ModelError
from bakeoff.experts import read_me
from bakeoff.experts.read_me import (
    ChannelStats,
    ExpertMasks,
    PreGatingRouter,
    ReadMeForCausalLM,
    RouterCache,
    build_expert_masks,
    collect_channel_stats,
    moefy,
    pack_texts,
    routing_distillation_loss,
    tune,
    tune_experts,
    tune_router,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases, tied": LlamaConfig(**SHAPE, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(sliding_window=4, **SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(sliding_window=4, **SHAPE),
    "gemma3": Gemma3TextConfig(
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **SHAPE,
    ),
    "phi3": Phi3Config(pad_token_id=0, **SHAPE),
}
IDS = torch.arange(36).view(3, 12) * 7 % 50


def dense(kind="llama", seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "proj" in name:  # so that the feed-forward layers matter
                parameter.mul_(4)
    return model


def masks_for(model, n=3, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = {name: torch.randint(0, 50, (4, 20), generator=generator) for name in "abcdefg"[:n]}
    return build_expert_masks(collect_channel_stats(model, data), keep)


def refactored(kind="llama", keep=0.5, **settings):
    model = dense(kind)
    return moefy(model, masks_for(model, keep=keep), **settings).eval()


# The official code --------------------------------------------------------------------------------
# VITA-Group/READ-ME at 1df7e68: its functions were run on these inputs, and their answers kept.


def wave(*shape, step=0.7, phase=0.0):
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(steps * step + phase + steps**2 * 0.013).reshape(shape).float()


def official_masks(n, width, kept, step, phases):
    masks = torch.zeros(n, width)
    for i in range(n):
        masks[i, wave(width, step=step, phase=phases(i)).argsort(descending=True)[:kept]] = 1
    return masks - masks.prod(0)


@pytest.mark.parametrize("case", ["small", "large"])
def test_loss_is_the_official_one(case):
    if case == "small":
        arguments = (
            wave(2, 3, 24),
            wave(2, 3, 3, step=1.3) * 2,
            official_masks(3, 24, 12, 0.7, lambda i: 1.0 + i),
        )
        loss, soft = 2.1084747314453125, 2.115302801132202
    else:
        arguments = (
            wave(2, 5, 60, step=0.31) * 3,
            wave(2, 5, 4, step=2.1),
            official_masks(4, 60, 30, 0.4, lambda i: 2.0 * i),
        )
        loss, soft = 1.8178445100784302, 1.6699129343032837
    torch.testing.assert_close(
        routing_distillation_loss(*arguments).item(), loss, rtol=1e-5, atol=0
    )
    # Without the hard labels, which ties can turn either way.
    only = routing_distillation_loss(*arguments, hard_weight=0.0)
    assert only.item() == pytest.approx(soft, rel=1e-5)


OFFICIAL_ROUTER = {
    True: [
        0.592951, -1.55661, 0.725068, 1.304833, -1.09044, 0.695164, 2.466049, 2.384223, -2.334477,
        -1.046787, -1.460707, 2.470163, 1.914685, -0.123616, -0.414811, -0.874915, -0.707281,
        0.328975, 1.058261, -2.499652, 2.025827, 1.64462, -0.017269, 0.540321, 1.157587, 2.970922,
        -2.429394, 1.596696, 0.666239, -0.062953, 1.296751, -0.4903, 0.526858, 1.593049, -0.906214,
        -1.484653, 2.09628, 0.141319, 0.068318, 0.463058, 0.776225, -2.01891,
    ],
    False: [
        5.255502, -2.533932, 3.055663, 4.966128, -2.32808, 4.54528, 3.459669, -2.138177, 3.816432,
        4.966128, -2.32808, 4.54528, 3.663409, -1.231506, 3.369687, 4.886821, -2.589471, 3.467377,
        4.8833, -1.238365, 2.816252, 3.465213, -1.383895, 2.667818, 3.663409, -1.231506, 3.369687,
        5.255502, -2.533932, 3.055663, 3.663409, -1.231506, 3.369687, 4.456119, -1.255892, 2.707362,
        4.886821, -2.589471, 3.467377, 3.012944, -1.640071, 3.46408,
    ],
}  # fmt: skip
OFFICIAL_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_out",
    "proj_1": "mlp_in",
    "proj_2": "mlp_out",
}


@pytest.mark.parametrize("attention", [True, False])
def test_router_is_the_official_one(attention):
    router = PreGatingRouter(11, 3, width=16, n_layers=2, n_heads=2, attention=attention)
    official = {"out_layernorm": router.norm, "proj_out": router.head}
    for theirs, ours in OFFICIAL_NAMES.items():
        for number, block in enumerate(router.blocks):
            if hasattr(block, ours):
                official[f"{theirs}_{number}"] = getattr(block, ours)
    parameters = {
        f"{name}.{kind}": parameter
        for name, module in official.items()
        for kind, parameter in module.named_parameters()
    }
    parameters["embed.weight"] = router.embed.weight
    with torch.no_grad():
        for number, name in enumerate(sorted(parameters)):
            parameter = parameters[name]
            if name == "embed.weight":
                parameter.copy_(wave(11, 16, step=0.21))
                continue
            values = wave(*parameter.shape, step=0.37, phase=0.1 * number) * 0.6
            parameter.copy_(values + (1 if "layernorm" in name else 0))
    logits = router(torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]))
    expected = torch.tensor(OFFICIAL_ROUTER[attention]).view(2, 7, 3)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_router_has_the_size_of_the_paper():
    with torch.device("meta"):
        router = PreGatingRouter(32000, 7)
    assert sum(p.numel() for p in router.parameters()) == 17_965_063  # 18.0 million


def test_masked_layer_is_the_official_one():
    sizes = {"hidden_size": 6, "head_dim": 2, "num_attention_heads": 2, "intermediate_size": 10}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **sizes, "num_hidden_layers": 1})).eval()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(wave(10, 6))
        mlp.up_proj.weight.copy_(wave(10, 6, phase=1))
        mlp.down_proj.weight.copy_(wave(6, 10, phase=2))
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, [0, 4]] = True
    for expert, channels in enumerate([[1, 2, 3], [3, 5, 6], [7, 8, 9]]):
        mask[expert, channels] = True
    made = moefy(model, ExpertMasks(("a", "b", "c"), (mask,)), router_heads=1)
    made._dispatch.set(torch.tensor([[2, 0, 1, 0]]))
    expected = torch.tensor([
        0.430897, -0.380636, 0.01825, 0.004629, 0.028957, 0.00983, -1.08411, 0.84561, 0.460545,
        -0.039359, 0.742688, 0.503581, -1.475862, 1.573217, 2.660183, -0.169098, 2.639294, 2.127742,
        -0.433965, -0.165726, -0.943616, -0.089361, -0.420012, -0.354953,
    ]).view(1, 4, 6)  # fmt: skip
    torch.testing.assert_close(mlp(wave(1, 4, 6, phase=3)), expected, atol=2e-6, rtol=0)


def test_one_channel_more_is_kept_than_by_the_official_code():
    official = [1, 2, 3, 7, 8, 9, 13, 14, 17, 18, 22, 23, 26, 27, 30, 31, 34, 37, 38]
    values = wave(40, step=0.9)
    stats = ChannelStats(("a", "b"), (torch.stack([values, values]),), (1, 1))
    kept = build_expert_masks(stats, 0.5).layers[0][0].nonzero().flatten().tolist()
    assert len(kept) == 20
    assert set(official) < set(kept)


# Statistics and masks -----------------------------------------------------------------------------


def brute_force_means(model, rows):
    """Return each layer's mean |act(gate(x)) * up(x)|, worked out from the layer's own input."""
    sums, count = None, 0
    for row in rows:
        seen = []
        hooks = [
            layer.mlp.register_forward_hook(
                lambda m, args, out, seen=seen: seen.append((m, args[0]))
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([row]))
            inner = [(m.act_fn(m.gate_proj(x)) * m.up_proj(x))[0].abs().sum(0) for m, x in seen]
        for hook in hooks:
            hook.remove()
        sums = inner if sums is None else [a + b for a, b in zip(sums, inner, strict=True)]
        count += len(row)
    return [total / count for total in sums]


class Words:
    """A tokenizer for texts that are numbers."""

    eos_token_id = 49

    def __call__(self, text, truncation=False, max_length=None, **_):
        return {"input_ids": [int(word) for word in text.split()][:max_length]}


def test_statistics_against_brute_force_for_every_kind_of_input():
    model = dense()
    rows = {"a": [[1, 2, 3, 4], [9, 8, 7, 6], [4, 4, 1, 2]], "b": [[5, 6, 7, 8], [1, 3, 2, 1]]}
    texts = {k: [" ".join(map(str, row)) for row in v] for k, v in rows.items()}
    padded = {
        name: [
            {
                "input_ids": functional.pad(torch.tensor([row]), (3, 0), value=17),
                "attention_mask": functional.pad(torch.ones(1, 4, dtype=torch.long), (3, 0)),
            }
            for row in v
        ]
        for name, v in rows.items()
    }
    expected = [brute_force_means(model, v) for v in rows.values()]
    for data, options in [
        ({k: torch.tensor(v) for k, v in rows.items()}, {"batch_size": 2}),
        (texts, {"tokenizer": Words(), "batch_size": 3}),
        (padded, {}),
    ]:
        stats = collect_channel_stats(model, data, **options)
        assert stats.n_tokens == (12, 8)
        for number in range(3):
            for domain in range(2):
                torch.testing.assert_close(
                    stats.means[number][domain], expected[domain][number], rtol=1e-4, atol=1e-6
                )
    uneven = {"a": ["1 2 3 4 5 6", "7 8"], "b": ["5"]}  # padded inside a batch
    stats = collect_channel_stats(model, uneven, tokenizer=Words(), batch_size=2)
    expected = brute_force_means(model, [[1, 2, 3, 4, 5, 6], [7, 8]])
    torch.testing.assert_close(stats.means[2][0], expected[2], rtol=1e-4, atol=1e-6)


def test_statistics_stop_leave_no_trace_and_can_be_saved(tmp_path):
    model = dense()
    before, calls = model(IDS).logits, []
    data = {"a": IDS.repeat(4, 1), "b": IDS}
    stats = collect_channel_stats(
        model, data, max_tokens=30, progress=lambda *step: calls.append(step)
    )
    assert stats.n_tokens == (36, 36)
    assert calls == [(1, 2), (2, 2)]
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    texts = {"a": ["1 2 3 4 5 6", "7 8 9 1", "2", "3", "4"], "b": ["5 6", "7"]}
    some = collect_channel_stats(
        model, texts, tokenizer=Words(), max_tokens=8, batch_size=2
    )  # the first texts, not the shortest
    assert some.n_tokens == (10, 3)
    expected = brute_force_means(model, [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1]])
    torch.testing.assert_close(some.means[1][0], expected[1], rtol=1e-4, atol=1e-6)
    stats.save(tmp_path / "stats.safetensors")
    again = ChannelStats.load(tmp_path / "stats.safetensors")
    assert again.domains == stats.domains
    assert again.n_tokens == stats.n_tokens
    assert all(torch.equal(a, b) for a, b in zip(again.means, stats.means, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 5),
    width=st.integers(1, 30),
    keep=st.floats(0.01, 1.0),
    rule=st.sampled_from(read_me.RULES),
    seed=st.integers(0, 1000),
)
def test_masks_keep_the_largest_and_split_into_permanent_and_private(n, width, keep, rule, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are ties.
    means = torch.randint(0, 4, (n, width), generator=generator).float()
    stats = ChannelStats(tuple("abcde"[:n]), (means,), (1,) * n)
    masks = build_expert_masks(stats, keep, rule=rule, seed=seed)
    mask = masks.layers[0]
    kept = max(1, round(keep * width))
    assert mask.sum(1).tolist() == [kept] * n
    if rule == "domain":
        for values, own in zip(means, mask, strict=True):
            assert own.all() or values[own].min() >= values[~own].max()
    if rule == "pooled":
        assert masks.permanent(0).sum() == kept
    private, permanent = masks.private(0), masks.permanent(0)
    assert not (private & permanent).any()
    assert torch.equal(private | permanent, mask)
    assert not private.all(0).any()
    assert np.allclose(np.diag(masks.overlap()), 1)


def test_random_masks_differ_by_seed_and_expert():
    stats = ChannelStats(("a", "b"), (torch.ones(2, 64),), (1, 1))
    first, again, other = (build_expert_masks(stats, rule="random", seed=s) for s in (0, 0, 1))
    assert torch.equal(first.layers[0], again.layers[0])
    assert not torch.equal(first.layers[0], other.layers[0])
    assert not torch.equal(first.layers[0][0], first.layers[0][1])


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_are_the_dense_model(kind):
    expected = dense(kind)(IDS).logits
    model = refactored(kind, keep=1.0)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_a_dense_model_with_channels_zeroed(kind):
    model = refactored(kind)
    masks = model.masks
    for expert in range(3):
        pruned = dense(kind)
        with torch.no_grad():
            for layer, mask in zip(pruned.model.layers, masks.layers, strict=True):
                layer.mlp.down_proj.weight[:, ~mask[expert]] = 0
        expected = pruned(IDS).logits
        torch.testing.assert_close(model(IDS, expert_ids=expert).logits, expected)
        assert not torch.allclose(expected, dense(kind)(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [False, True])
def test_packed_experts_answer_as_masked_ones(kind, fuse):
    model = refactored(kind)
    chosen = torch.arange(36).view(3, 12) * 5 % 7 % 3
    expected = [model(IDS, expert_ids=e).logits for e in (chosen, 1)]
    expected.append(model(IDS).logits)
    counted = model.count_parameters()
    model.pack(fuse_permanent=fuse)
    for given_ids, logits in zip((chosen, 1, None), expected, strict=True):
        torch.testing.assert_close(
            model(IDS, expert_ids=given_ids).logits, logits, rtol=1e-4, atol=1e-5
        )
    # What was announced is what is there.
    stored = sum(p.numel() for p in model.parameters())
    assert stored == (counted.fused if fuse else counted.shared)
    after = model.count_parameters()
    assert after.active == counted.active
    assert after.dense == counted.dense == sum(p.numel() for p in dense(kind).parameters())


class Louder(LlamaMLP):
    def forward(self, x):
        return 1.05 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_does_more_is_not_packed(dtype):
    model = dense()
    model.model.layers[2].mlp = Louder(model.config)
    masks = masks_for(model)
    model = moefy(model.to(dtype), masks).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        with pytest.raises(ModelError, match="layer 2: Louder does more than its projections"):
            model.pack()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    assert model.masks.n_experts == 3
    assert moefy(dense().to(dtype), masks).pack().config.form == "packed"


def test_active_parameters_are_those_of_one_expert():
    model = refactored()
    router = sum(p.numel() for p in model.router.parameters())
    size = sum(p.numel() for p in dense().parameters())
    half_of_feed_forward = 3 * 3 * 32 * 20
    assert model.count_parameters().active == size - half_of_feed_forward + router


def test_dense_mode_and_the_model_inside_stay_dense():
    expected = dense()(IDS).logits
    model = refactored()
    model(IDS)
    torch.testing.assert_close(model(IDS, dense=True).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.language_model(IDS).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_deep_copy_is_a_model_of_its_own(packed):
    model = refactored()
    model = model.pack() if packed else model
    with torch.no_grad():
        expected = model(IDS).logits
        twin = copy.deepcopy(model)
        for number in range(3):
            if not packed:
                model.expert_masks[number].fill_(True)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(IDS).logits, expected, rtol=0, atol=0)


def test_experts_can_have_different_sizes():
    model = dense()
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, :9] = True
    mask[1, 5:33] = True
    made = moefy(model, ExpertMasks(("a", "b"), (mask,) * 3)).eval()
    expected, stored = made(IDS).logits, made.count_parameters().shared
    made.pack()
    assert made.config.sizes[0] == [4, 5, 24]
    assert sum(p.numel() for p in made.parameters()) == stored
    torch.testing.assert_close(made(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["masked", "packed", "fused"])
@pytest.mark.parametrize("kind", ["llama", "llama with biases, tied", "gemma3", "phi3"])
def test_saved_and_loaded(tmp_path, form, kind):
    model = refactored(kind, router_layers=2, router_heads=2, attention_divisor=3.0)
    if form != "masked":
        model.pack(fuse_permanent=form == "fused")
    model.save_pretrained(tmp_path)
    for again in (
        ReadMeForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert isinstance(again, ReadMeForCausalLM)
        assert again.domains == ("a", "b", "c")
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
        assert again.count_parameters() == model.count_parameters()
    assert not list(tmp_path.glob("*.bin"))


def test_loaded_in_a_new_process(tmp_path):
    model = refactored()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch\n"
        "from bakeoff.experts.read_me import ReadMeForCausalLM\n"
        "model = ReadMeForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(36).view(3, 12) * 7 % 50\n"
        "print(model.route(ids).expert_ids.flatten().tolist())\n"
        "print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,\n"
        "                     do_sample=False, eos_token_id=None,\n"
        "                     pad_token_id=0).flatten().tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    made = model.generate(IDS, attention_mask=ALL, max_new_tokens=4, **GREEDY)
    expected = [model.route(IDS).expert_ids.flatten().tolist(), made.flatten().tolist()]
    assert done.stdout.split("\n")[:2] == [str(line) for line in expected]


def test_half_precision_keeps_the_router_in_single(tmp_path):
    model = refactored()
    model.save_pretrained(tmp_path)
    half = ReadMeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.router.head.weight.dtype == torch.float32
    assert half.language_model.dtype == torch.bfloat16
    torch.testing.assert_close(half.route(IDS).logits, model.route(IDS).logits, rtol=0, atol=0)
    assert half(IDS).logits.dtype == torch.bfloat16
    expected = half(IDS).logits
    half.pack()
    torch.testing.assert_close(half(IDS).logits, expected, rtol=0.1, atol=0.1)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert cast.route(IDS).logits.dtype == torch.float32


# Routing ------------------------------------------------------------------------------------------


def test_a_plan_needs_no_run_of_the_language_model():
    model = refactored()
    expected = model.route(IDS).expert_ids
    model.language_model.forward = None
    plan = model.route(IDS)
    assert torch.equal(plan.expert_ids, expected)
    assert torch.equal(plan.expert_ids, plan.logits.argmax(-1))
    assert plan.counts().sum() == IDS.numel()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_router_is_causal_and_padding_changes_nothing(n_layers):
    router = PreGatingRouter(50, 4, width=16, n_heads=2, n_layers=n_layers)
    logits = router(IDS)
    for cut in range(1, 12):
        torch.testing.assert_close(router(IDS[:, :cut]), logits[:, :cut], rtol=1e-4, atol=1e-5)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    torch.testing.assert_close(router(changed)[:, :-1], logits[:, :-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(router(changed)[:, -1], logits[:, -1], atol=1e-3)
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 50
    assert not torch.allclose(router(changed)[:, 1:], logits[:, 1:], atol=1e-3)
    for left, right in ((5, 0), (0, 5), (2, 3)):
        mask = functional.pad(torch.ones_like(IDS), (left, right))
        padded = router(functional.pad(IDS, (left, right), value=7), mask)
        torch.testing.assert_close(padded[:, left : left + 12], logits, rtol=1e-4, atol=1e-5)
        assert padded.isfinite().all()


def test_routes_are_the_same_under_autocast():
    model = refactored()
    expected = model.route(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(IDS).logits.dtype == torch.bfloat16
        torch.testing.assert_close(model.route(IDS).logits, expected, rtol=0, atol=0)


def test_router_without_attention_sees_one_token():
    router = PreGatingRouter(50, 4, width=16, n_heads=2, attention=False)
    logits = router(IDS)
    again = router(IDS[:, torch.arange(11, -1, -1)])
    torch.testing.assert_close(again[:, torch.arange(11, -1, -1)], logits)


@pytest.mark.parametrize("parts", [(12,), (5, 7), (1,) * 12, (10, 1, 1)])
def test_router_cache_continues_a_text(parts):
    router = PreGatingRouter(50, 4, width=16, n_heads=2, n_layers=2)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    cache, logits, start = RouterCache(), [], 0
    for n in parts:
        logits.append(router(IDS[:, start : start + n], mask[:, start : start + n], cache))
        start += n
    assert cache.length == 12
    expected = router(IDS, mask)
    torch.testing.assert_close(
        torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5
    )


def test_plans_of_padded_texts():
    model = refactored()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[2, 9:] = 0
    plan = model.route(IDS, mask)
    assert (plan.expert_ids[mask == 0] == -1).all()
    alone = model.route(IDS[:1, 4:])
    assert plan.of(0).tolist() == alone.of(0).tolist()
    assert plan.counts().sum() == mask.sum()
    expected = np.mean([a == b for r in range(3) for a, b in zip(plan.of(r), plan.of(r)[1:])])  # noqa: B905
    assert plan.repeat_share() == pytest.approx(expected)


@pytest.mark.parametrize("packed", [False, True])
def test_padding_does_not_change_the_model(packed):
    model = refactored()
    if packed:
        model.pack()
    expected = model(IDS).logits
    mask = functional.pad(torch.ones_like(IDS), (0, 4))
    padded = functional.pad(IDS, (0, 4), value=3)
    got = model(padded, attention_mask=mask).logits[:, :12]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def by_hand(model, ids, n, **options):
    for _ in range(n):
        ids = torch.cat([ids, model(ids, **options).logits[:, -1:].argmax(-1)], dim=1)
    return ids


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ALL = torch.ones_like(IDS)  # id 0 is a token here, not padding


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("packed", [False, True])
def test_generation_routes_every_token(kind, packed):
    model = refactored(kind)
    if packed:
        model.pack()
    expected = by_hand(model, IDS, 8)
    options = {"attention_mask": ALL, "max_new_tokens": 8, **GREEDY}
    for use_cache in (True, False):
        got = model.generate(
            IDS, attention_mask=ALL, max_new_tokens=8, use_cache=use_cache, **GREEDY
        )
        assert torch.equal(got, expected)
    got = model.generate(
        IDS, attention_mask=ALL, max_new_tokens=8, cache_implementation="static", **GREEDY
    )
    assert torch.equal(got, expected)
    got = model.generate(IDS, expert_ids=1, **options)
    assert torch.equal(got, by_hand(model, IDS, 8, expert_ids=1))


def test_generation_reads_each_token_once():
    model, read = refactored(), []
    model.router.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.generate(IDS, attention_mask=ALL, max_new_tokens=6, **GREEDY)
    assert read == [12, 1, 1, 1, 1, 1]


def test_generation_with_beams_and_left_padding():
    model = refactored()
    options = {**GREEDY, "max_new_tokens": 6, "num_beams": 3}
    expected = model.generate(IDS, attention_mask=ALL, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, attention_mask=ALL, **options), expected)
    short = IDS[:1, :7]
    batch = torch.cat([functional.pad(short, (5, 0)), IDS[1:2]])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    both = model.generate(batch, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(both[0, 12:], by_hand(model, short, 6)[0, 7:])
    assert torch.equal(both[1], by_hand(model, IDS[1:2], 6)[0])


# Training -----------------------------------------------------------------------------------------


def reference_loss(activations, logits, masks):
    """Work the loss out token by token, from the card's formulas."""
    n = int(masks[0].sum())
    depths = [n - 1, int(4 * n / 5), int(3 * n / 5), int(2 * n / 5), int(n / 5)]
    hard = soft = 0.0
    count = activations.shape[0] * activations.shape[1]
    for u, g in zip(activations.flatten(0, 1), logits.flatten(0, 1), strict=True):
        order = sorted(u.tolist(), reverse=True)
        w = torch.tensor([sum(x > order[k] for k in depths) / (3 * n) for x in u.tolist()])
        s = 10 * masks.float() @ w
        log_p = g.double().log_softmax(-1)
        soft -= float((s.double().softmax(-1) * log_p).sum()) / count
        smoothed = torch.full_like(log_p, 0.5 / len(g))
        smoothed[int(s.argmax())] += 0.5
        hard -= float((smoothed * log_p).sum()) / count
    return 0.75 * hard + 0.25 * soft


@settings(max_examples=25, deadline=None)
@given(width=st.integers(6, 40), n=st.integers(2, 5), seed=st.integers(0, 999))
def test_loss_against_the_formula(width, n, seed):
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(2, 3, width, generator=generator)
    logits = torch.randn(2, 3, n, generator=generator)
    masks = torch.rand(n, width, generator=generator) < 0.4
    masks[0, 0] = True
    # Without ties among affinities the best expert is plain.
    affinity = read_me._affinities(activations, masks, "code", 0.5)
    top = affinity.topk(2, -1).values
    got = routing_distillation_loss(activations, logits, masks).item()
    if (top[..., 0] - top[..., 1]).min() > 1e-6:
        assert got == pytest.approx(reference_loss(activations, logits, masks), rel=1e-5)


def test_paper_objective_against_its_definition():
    activations, logits = wave(2, 3, 24), wave(2, 3, 3, step=1.3)
    full = torch.zeros(3, 24, dtype=torch.bool)
    for i in range(3):
        full[i, wave(24, phase=1.0 + i).argsort(descending=True)[:12]] = True
    used = torch.zeros(2, 3, 24)
    used.scatter_(-1, activations.abs().topk(12).indices, 1)
    target = (used @ full.float().T).softmax(-1)
    p = logits.softmax(-1)
    expected = (p * (p / target).log()).sum(-1).mean()
    # The permanent channels add the same to every expert's overlap, which no softmax notices.
    for masks in (full, full & ~full.all(0)):
        got = routing_distillation_loss(activations, logits, masks, objective="paper")
        torch.testing.assert_close(got, expected)
    best = (used @ full.float().T).requires_grad_()
    zero = routing_distillation_loss(activations, best, full, objective="paper")
    assert zero.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", read_me.OBJECTIVES)
def test_gradient_by_finite_differences_and_masked_tokens(objective):
    activations, masks = wave(2, 3, 24), official_masks(3, 24, 12, 0.7, lambda i: 1.0 + i)
    logits = wave(2, 3, 3, step=1.3).requires_grad_()
    counted = torch.tensor([[1, 1, 0], [0, 1, 1]])
    loss = routing_distillation_loss(activations, logits, masks, counted, objective=objective)
    loss.backward()
    assert (logits.grad[counted == 0] == 0).all()
    for place in ((0, 0, 0), (1, 2, 1)):
        step = torch.zeros(2, 3, 3)
        step[place] = 1e-2
        with torch.no_grad():
            up, down = (
                routing_distillation_loss(
                    activations, logits + sign * step, masks, counted, objective=objective
                )
                for sign in (1, -1)
            )
        slope = (up - down).item() / 2e-2
        assert logits.grad[place].item() == pytest.approx(slope, rel=2e-2, abs=1e-4)
    kept = counted.bool()
    alone = routing_distillation_loss(
        activations[kept][None], logits[kept][None], masks, objective=objective
    )
    torch.testing.assert_close(alone, loss)


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}


@pytest.mark.parametrize("objective", read_me.OBJECTIVES)
def test_tuning_the_router_changes_only_the_router_and_is_repeatable(objective):
    data = torch.arange(160).view(8, 20) * 11 % 50
    runs = []
    for _ in range(2):
        model = refactored()
        before, steps = parameters_of(model), []
        losses = tune_router(
            model, data, steps=30, batch_size=4, learning_rate=3e-3, objective=objective,
            progress=lambda *step, steps=steps: steps.append(step),
        )  # fmt: skip
        assert steps[-1] == (30, 30)
        assert {name.split(".")[0] for name in changed(before, model)} == {"router"}
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_first_loss_is_the_sum_over_layers_of_the_dense_models_activations():
    model = refactored()
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in model.language_model.model.layers
    ]
    with torch.no_grad():
        model(IDS, dense=True)
        expected = sum(
            routing_distillation_loss(u, model.router(IDS), model.masks.private(i)).item()
            for i, u in enumerate(seen)
        )
    for hook in hooks:
        hook.remove()
    losses = tune_router(model, [IDS], steps=1)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", read_me.OBJECTIVES)
def test_the_router_learns_which_domain_a_token_is_of(objective):
    # Token ids below 25 light the first half of each layer's channels, the others the second half.
    torch.manual_seed(0)
    model = dense()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 1] = 1.0
        model.model.embed_tokens.weight[:25, 0] = 1.0
        model.model.embed_tokens.weight[25:, 0] = -1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(0.01)
            layer.mlp.gate_proj.weight[:20, 0] += 2.0
            layer.mlp.gate_proj.weight[20:, 0] -= 2.0
            layer.mlp.up_proj.weight[:, 1] += 2.0
    low, high = torch.randint(0, 25, (24, 16)), torch.randint(25, 50, (24, 16))
    stats = collect_channel_stats(model, {"low": low[:12], "high": high[:12]})
    made = moefy(model, build_expert_masks(stats)).eval()
    tune_router(
        made,
        torch.cat([low, high]),
        steps=60,
        batch_size=16,
        learning_rate=3e-3,
        objective=objective,
    )
    assert (made.route(low).expert_ids == 0).float().mean() > 0.95
    assert (made.route(high).expert_ids == 1).float().mean() > 0.95


def test_tuning_experts_leaves_the_router_and_lowers_the_routed_loss():
    model = refactored()
    data = torch.arange(20).repeat(8, 1)
    before = parameters_of(model)
    losses = tune_experts(model, data, steps=40, batch_size=4, learning_rate=3e-3)
    assert not any(name.startswith("router") for name in changed(before, model))
    assert "language_model.model.layers.0.mlp.gate_proj.weight" in changed(before, model)
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training
    # The loss is the one that the routed model gives for the batch.
    fresh = refactored()
    given_loss = tune_experts(fresh, [IDS], steps=1)[0]
    assert given_loss == pytest.approx(refactored()(IDS, labels=IDS).loss.item(), rel=1e-6)


def test_a_channel_of_no_expert_gets_no_gradient():
    model = refactored()
    unused = [~mask.any(0) for mask in model.masks.layers]
    model(IDS, labels=IDS).loss.backward()
    for layer, none in zip(model.language_model.model.layers, unused, strict=True):
        assert none.any()
        assert (layer.mlp.gate_proj.weight.grad[none] == 0).all()
        assert (layer.mlp.down_proj.weight.grad[:, none] == 0).all()


def test_padding_does_not_count_in_training():
    padded = {
        "input_ids": functional.pad(IDS, (0, 5), value=3),
        "attention_mask": functional.pad(torch.ones_like(IDS), (0, 5)),
    }
    for train in (tune_router, tune_experts):
        first = train(refactored(), [IDS], steps=2)
        again = train(refactored(), [padded], steps=2)
        assert again == pytest.approx(first, rel=1e-4)


def test_accumulated_batches_are_one_large_batch():
    for train in (tune_router, tune_experts):
        whole = train(refactored(), [torch.cat([IDS, (IDS + 1) % 50])], steps=2)
        parts = train(refactored(), [IDS, (IDS + 1) % 50], steps=2, accumulation=2)
        assert parts == pytest.approx(whole, rel=1e-4)


def checkpointed(model):
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "inside"])
def test_gradient_checkpointing_repeats_a_layer_with_its_own_plan(packed, when):
    gradients = []
    for checkpoint_it in (False, True):
        model = dense()
        if checkpoint_it and when == "before":
            checkpointed(model)
        model = moefy(model, masks_for(model)).train()
        model = model.pack() if packed else model
        if checkpoint_it and when != "before":
            checkpointed(model if when == "after" else model.language_model)
        # What runs between a forward and its backward pass has another plan, or none.
        losses = [
            model(IDS, labels=IDS, use_cache=False, expert_ids=expert).loss for expert in (0, 2)
        ]
        with torch.no_grad():
            model(IDS, use_cache=False)
        sum(losses).backward()
        gradients.append(model.language_model.model.layers[0].mlp)
    for first, second in zip(*(mlp.named_parameters() for mlp in gradients), strict=True):
        torch.testing.assert_close(first[1].grad, second[1].grad)


def test_gradient_checkpointing_leaves_no_plan_behind():
    histories, logits = [], []
    for checkpoint_it in (False, True):
        model = refactored()
        if checkpoint_it:
            checkpointed(model)
        histories.append(
            tune(model, IDS, rounds=2, router_steps=2, expert_steps=2, router_batch=3,
                 expert_batch=3, router_rate=1e-2, expert_rate=1e-2)
        )  # fmt: skip
        with torch.no_grad():
            logits.append(model.language_model(IDS).logits)
            torch.testing.assert_close(logits[-1], model(IDS, dense=True).logits, rtol=0, atol=0)
    for first, second in zip(*histories, strict=True):
        assert first.router_losses == pytest.approx(second.router_losses, rel=1e-5)
        assert first.expert_losses == pytest.approx(second.expert_losses, rel=1e-5)
    torch.testing.assert_close(*logits)


def test_rounds_alternate_and_rates_fall(monkeypatch):
    calls, steps = [], []

    def fake(name):
        def run(model, data, *, steps, learning_rate, seed, progress, **_):
            calls.append((name, steps, learning_rate, seed))
            progress(steps, steps)
            return [0.0] * steps

        return run

    monkeypatch.setattr(read_me, "tune_router", fake("router"))
    monkeypatch.setattr(read_me, "tune_experts", fake("experts"))
    history = tune(
        None, None, rounds=2, router_steps=3, expert_steps=5, progress=lambda *s: steps.append(s)
    )
    assert [call[:2] for call in calls] == [("router", 3), ("experts", 5)] * 2
    assert [call[2] for call in calls] == pytest.approx([5e-4, 5e-5, 4e-4, 4e-5])
    assert len({call[3] for call in calls}) == 4
    assert steps == [(3, 16), (8, 16), (11, 16), (16, 16)]
    assert [len(r.expert_losses) for r in history] == [5, 5]


def test_tuning_for_real_in_rounds():
    data = torch.arange(20).repeat(8, 1)
    model = refactored()
    history = tune(
        model, data, rounds=2, router_steps=2, expert_steps=8, router_batch=4, expert_batch=4,
        expert_rate=3e-3,
    )  # fmt: skip
    assert history[1].expert_losses[-1] < history[0].expert_losses[0]


def test_texts_are_packed_end_to_end():
    packed = pack_texts(Words(), ["1 2 3", "4 5 6 7 8"], 4)
    assert packed.tolist() == [[1, 2, 3, 49], [4, 5, 6, 7]]
    losses = tune_router(
        refactored(), ["1 2 3 4", "5 6 7 8"], tokenizer=Words(), steps=1, sequence_length=5,
        batch_size=2,
    )  # fmt: skip
    rows = torch.tensor([[1, 2, 3, 4, 49], [5, 6, 7, 8, 49]])
    expected = tune_router(refactored(), rows, steps=1, batch_size=2)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_every_sequence_once_per_epoch():
    data = torch.arange(10)[:, None].repeat(1, 3)
    batches = read_me._training_batches(data, None, 3, 4, seed=0)
    seen = torch.cat([next(batches)[0][:, 0] for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_keep_out_of_range(keep):
    stats = ChannelStats(("a", "b"), (torch.ones(2, 4),), (1, 1))
    with pytest.raises(DataError, match=r"keep must be in \(0, 1\]"):
        build_expert_masks(stats, keep)
    with pytest.raises(DataError, match="rule must be one of"):
        build_expert_masks(stats, 0.5, rule="best")


def test_bad_domains():
    model = dense()
    with pytest.raises(DataError, match="at least 2 domains, got 1"):
        collect_channel_stats(model, {"a": IDS})
    with pytest.raises(DataError, match="'b' holds no token"):
        collect_channel_stats(model, {"a": IDS, "b": []}, tokenizer=Words())
    with pytest.raises(DataError, match="needs a tokenizer"):
        collect_channel_stats(model, {"a": ["1 2"], "b": ["3"]})
    with pytest.raises(DataError, match="got one string"):
        collect_channel_stats(model, {"a": "1 2", "b": "3"}, tokenizer=Words())
    with pytest.raises(DataError, match="integer token ids"):
        collect_channel_stats(model, {"a": IDS.float(), "b": IDS})


def test_models_without_gated_layers_or_head():
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(ModelError, match="no gated feed-forward module found in layer 0"):
        collect_channel_stats(GPT2LMHeadModel(GPT2Config(**sizes)), {"a": IDS, "b": IDS})
    mixture = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))
    with pytest.raises(ModelError, match="mixture of experts already"):
        collect_channel_stats(mixture, {"a": IDS, "b": IDS})
    model = dense()
    masks = masks_for(model)
    with pytest.raises(ModelError, match="with its head, got LlamaModel"):
        moefy(LlamaModel(LlamaConfig(**SHAPE)), masks)
    with pytest.raises(ModelError, match="made by moefy already"):
        moefy(moefy(model, masks), masks)


def test_masks_and_routers_that_do_not_fit():
    model = dense()
    masks = masks_for(model)
    cut = (masks.layers[0], masks.layers[1][:, :39], masks.layers[2])
    with pytest.raises(DataError, match="layer 1 is for 39 channels, the layer has 40"):
        moefy(model, ExpertMasks(masks.domains, cut))
    with pytest.raises(DataError, match="masks are for 2 layers"):
        moefy(model, ExpertMasks(masks.domains, masks.layers[:2]))
    with pytest.raises(DataError, match="vocabulary of 51, the model's is 50"):
        moefy(model, masks, router=PreGatingRouter(51, 3, width=16))
    with pytest.raises(DataError, match="router is for 4 experts, masks for 3"):
        moefy(model, masks, router=PreGatingRouter(50, 4, width=16))
    with pytest.raises(DataError, match="at most the model's hidden size, 32"):
        moefy(model, masks, router_width=64)
    with pytest.raises(DataError, match="even multiple of n_heads"):
        PreGatingRouter(50, 3, width=20, n_heads=4)
    with pytest.raises(DataError, match="at least 2 experts"):
        ExpertMasks(("a",), (torch.ones(1, 4, dtype=torch.bool),))
    with pytest.raises(DataError, match=r"must be \(2, D\) bool"):
        ExpertMasks(("a", "b"), (torch.ones(2, 4),))
    with pytest.raises(DataError, match="without a channel"):
        ExpertMasks(("a", "b"), (torch.tensor([[True, False], [False, False]]),))


def test_bad_routes():
    model = refactored()
    for bad, message in [
        (IDS[0], r"input_ids must be \(B, T\)"),
        (IDS + 50, r"must be in \[0, 50\)"),
    ]:
        with pytest.raises(DataError, match=message):
            model.route(bad)
    with pytest.raises(DataError, match="attention_mask must be"):
        model.route(IDS, torch.ones(3, 11))
    for bad, message in [
        (3, "got 3"),
        (torch.full((3, 12), 3), "got 3 to 3"),
        (IDS[:, :4], "must be"),
    ]:
        with pytest.raises(DataError, match=message):
            model(IDS, expert_ids=bad)
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(DataError, match="filled key-value cache"):
        model(IDS[:, :1], past_key_values=cache)
    chosen = model.route(torch.cat([IDS, IDS[:, :1]], 1)).expert_ids[:, -1:]
    got = model(IDS[:, :1], past_key_values=cache, expert_ids=chosen).logits
    expected = model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="exclude each other"):
        model(IDS, expert_ids=0, dense=True)
    model.pack()
    for refused in (
        lambda: model(IDS, dense=True),
        lambda: model.pack(),
        lambda: model.masks,
        lambda: tune_router(model, IDS),
        lambda: tune_experts(model, IDS),
        lambda: model.language_model(IDS),
    ):
        with pytest.raises(ModelError):
            refused()


def test_bad_training():
    model = refactored()
    with pytest.raises(DataError, match="ran out after 1 batches"):
        tune_router(model, iter([IDS]), steps=3)
    for empty in (IDS[:0], IDS[:, :0]):
        with pytest.raises(DataError, match="data must hold at least one token"):
            tune_experts(model, empty, steps=1)
    with pytest.raises(DataError, match="attention_mask must hold 0 and 1 only"):
        tune_experts(model, [(IDS, IDS)], steps=1)  # ids and labels
    with pytest.raises(DataError, match="texts must come as a list"):
        tune_router(model, iter(["1 2 3"]), steps=1)
    with pytest.raises(DataError, match="steps, batch_size and accumulation"):
        tune_router(model, IDS, steps=0)
    with pytest.raises(DataError, match="learning_rate must be positive"):
        tune_experts(model, IDS, learning_rate=0.0)
    with pytest.raises(DataError, match="fewer than sequence_length"):
        tune_router(model, ["1 2"], tokenizer=Words(), sequence_length=8)
    with pytest.raises(DataError, match="nothing to route"):
        tune_router(refactored(keep=1.0), IDS)
    with pytest.raises(DataError, match="the loss became"):
        tune_experts(model, IDS, steps=50, batch_size=3, learning_rate=1e30)
    activations, logits = torch.randn(1, 2, 8), torch.randn(1, 2, 2)
    masks = torch.eye(2, 8, dtype=torch.bool)
    with pytest.raises(DataError, match="disagree"):
        routing_distillation_loss(activations, logits, masks[:, :7])
    with pytest.raises(DataError, match="router_logits must be"):
        routing_distillation_loss(activations, logits[..., :1], masks)
    with pytest.raises(DataError, match="no private channel"):
        routing_distillation_loss(activations, logits, masks & False)
    with pytest.raises(DataError, match="objective must be one of"):
        routing_distillation_loss(activations, logits, masks, objective="other")
    with pytest.raises(DataError, match="no token"):
        routing_distillation_loss(activations, logits, masks, torch.zeros(1, 2))


def test_other_files_are_not_statistics(tmp_path):
    refactored().save_pretrained(tmp_path)
    (tmp_path / "text.safetensors").write_text("no statistics at all")
    for name in ("model", "text"):
        with pytest.raises(DataError, match="not written by ChannelStats"):
            ChannelStats.load(tmp_path / f"{name}.safetensors")


def test_channels_that_are_not_finite_are_no_statistics():
    model = dense()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3].fill_(torch.inf)
    with pytest.raises(DataError, match=r"domain 'a': channels of layer 1 are not finite"):
        collect_channel_stats(model, {"a": IDS, "b": IDS})


# A real model -------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_domain_experts():
    from pydoc_data.topics import topics

    from bakeoff.models import load_language_model

    smollm = load_language_model("smollm2-135m")
    code = subprocess.__file__
    with open(code, encoding="utf-8") as stream:
        python = stream.read()
    prose = "\n\n".join(text for _, text in sorted(topics.items()))
    sequences = {
        name: pack_texts(smollm.tokenizer, [text[:30000]], 256)
        for name, text in {"code": python, "prose": prose}.items()
    }
    stats = collect_channel_stats(smollm.model, {k: v[:4] for k, v in sequences.items()})
    with torch.no_grad():
        held_out = {k: v[8:10] for k, v in sequences.items()}
        dense_loss = {k: smollm.model(v, labels=v).loss.item() for k, v in held_out.items()}
        losses = {}
        for rule in ("domain", "random"):
            model = moefy(smollm.model, build_expert_masks(stats, rule=rule))
            losses[rule] = {
                k: model(v, labels=v, expert_ids=i).loss.item()
                for i, (k, v) in enumerate(held_out.items())
            }
            # What was made of the same model before does not interfere.
            again = {k: model(v, labels=v, dense=True).loss.item() for k, v in held_out.items()}
            assert again == dense_loss
    for name in sequences:
        assert dense_loss[name] < losses["domain"][name] < losses["random"][name]
