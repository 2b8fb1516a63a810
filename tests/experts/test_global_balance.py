"""Global balance against megatron-core, transformers, closed forms and one big batch.

Run as a script under torchrun, this file is the worker of its own tests with several processes.
About a minute, most of it the start of those processes.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.balance_losses import GlobalBalance
from bakeoff.experts.global_balance import Attachment, BalanceSyncError, LoadBalancingLoss
from bakeoff.experts.mixture_of_experts import MoE
from bakeoff.experts.protocol import Routing

N, K = 5, 2
SIZES = (4, 6, 3)


def wave(j, n_tokens):
    """Logits without a random generator, so that frozen numbers stay true everywhere."""
    t = torch.arange(n_tokens, dtype=torch.float64)[:, None]
    i = torch.arange(N, dtype=torch.float64)[None]
    return 2 * torch.sin(1.3 * t + 2.1 * i * (j + 1) + 0.7 * t * i) + 0.4 * i


def reference(logits, k):
    """Shares and mean probabilities of one micro-batch, in numpy."""
    z = np.asarray(logits, dtype=np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.argsort(-z, axis=1, kind="stable")[:, :k]
    counts = np.bincount(chosen.ravel(), minlength=z.shape[1])
    return counts, p.mean(axis=0)


def tiny(kind="mixtral", **changes):
    import transformers as t

    common = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **common))
    if kind == "olmoe":
        return t.OlmoeForCausalLM(t.OlmoeConfig(num_experts=4, **common))
    more = {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8}
    if kind == "qwen2":
        config = t.Qwen2MoeConfig(shared_expert_intermediate_size=12, **more, **common)
        return t.Qwen2MoeForCausalLM(config)
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**more, **common))


def checkpoint_layers(model, settings):
    """transformers 5.23 gave the method a new name."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable(settings)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# -- oracles in one process ---------------------------------------------------------------------

# megatron-core 0.16.1, switch_load_balancing_loss_func(..., moe_aux_loss_coeff=0.01): the loss and
# the first row of its gradient, with the counts and tokens of the micro-batch alone, and with
# those of all three.
MEGATRON_MICRO = [
    (
        0.01052116468326844,
        [
            3.629106291079136e-06,
            3.04292753653016e-05,
            -1.3583632752277642e-05,
            -0.00011977858814323544,
            9.930383923913224e-05,
        ],
    ),
    (
        0.011131366173207884,
        [
            -7.251546526273024e-05,
            -8.827803648594654e-06,
            5.99396230924829e-05,
            1.7311760219906477e-05,
            4.091885598935361e-06,
        ],
    ),
    (
        0.01194658449456155,
        [
            -9.502737265650838e-05,
            -0.00014661246077318814,
            -0.0006898385312706784,
            0.0003663262111585122,
            0.0005651521535418632,
        ],
    ),
]
MEGATRON_GLOBAL = [
    (
        0.003419210180006872,
        [
            -8.748228545615723e-06,
            -4.277962551877577e-05,
            -3.4065487537850315e-06,
            -4.999000765384449e-06,
            5.993340358356101e-05,
        ],
    ),
    (
        0.004894829484375625,
        [
            -4.538401151377621e-06,
            9.669239053062302e-07,
            -5.5799928995454605e-05,
            4.2425087999550946e-05,
            1.6946318241974982e-05,
        ],
    ),
    (
        0.002516208902789026,
        [
            -1.8826966835945454e-05,
            -1.3043430791524137e-05,
            -4.481470591858716e-05,
            7.046150831626958e-06,
            6.963895271442989e-05,
        ],
    ),
]


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_one_micro_batch_agrees_with_megatron(scope):
    lbl = LoadBalancingLoss(N, K, coef=0.01, scope=scope)
    for j, (size, (value, row)) in enumerate(zip(SIZES, MEGATRON_MICRO, strict=True)):
        logits = wave(j, size).requires_grad_()
        with lbl.accumulate(1):
            loss = lbl(logits)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(gradient[0].tolist(), row, rtol=1e-9, atol=1e-15)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 5),
    tokens=st.integers(1, 7),
    n=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_micro_exceeds_global_by_the_covariance_of_shares_and_probabilities(
    groups, tokens, n, seed, data
):
    k = data.draw(st.integers(1, n))
    torch.manual_seed(seed)
    batches = [2 * torch.randn(tokens, n, dtype=torch.float64) for _ in range(groups)]
    micro = LoadBalancingLoss(n, k, coef=1.0, scope="micro")
    whole = LoadBalancingLoss(n, k, coef=1.0, scope="global")
    known = [reference(each, k) for each in batches]
    f = np.array([counts / counts.sum() for counts, _ in known])
    p = np.array([mean for _, mean in known])
    covariance = ((f - f.mean(axis=0)) * (p - p.mean(axis=0))).mean(axis=0)
    of_micro = np.mean([float(micro(each)) for each in batches])
    of_whole = float(whole(torch.cat(batches)))
    assert of_micro - of_whole == pytest.approx(n * covariance.sum(), abs=1e-12)
    if groups == 1:
        assert of_micro == pytest.approx(of_whole, abs=1e-14)


def test_accumulation_follows_algorithm_1_and_ends_exact():
    lbl = LoadBalancingLoss(N, K, coef=1.0)
    batches = [wave(j, size) for j, size in enumerate(SIZES)]
    total = np.zeros(N)
    with lbl.accumulate(3):
        for each in batches:
            counts, mean = reference(each, K)
            total += counts
            assert float(lbl(each)) == pytest.approx(N * (total / total.sum() * mean).sum())
        assert lbl.counts.tolist() == [total.tolist()]
        torch.testing.assert_close(lbl.fractions[0].double().numpy(), total / total.sum())
    assert lbl.counts.tolist() == [[0] * N]
    # The last micro-step sees what one big batch would.
    big = LoadBalancingLoss(N, K, coef=1.0)
    big(torch.cat(batches))
    assert big.counts.tolist() == [total.tolist()]


def test_agrees_with_transformers_loss_of_one_layer_but_for_the_factor_k():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as theirs

    torch.manual_seed(1)
    logits = torch.randn(3 * 7, 6)
    mask = torch.ones(3, 7)
    mask[0, 4:] = mask[2, :2] = 0
    lbl = LoadBalancingLoss(6, 2, coef=1.0, scope="micro")
    for given_mask in (None, mask):
        expected = theirs((logits,), 6, 2, given_mask)
        assert 2 * float(lbl(logits, None, given_mask)) == pytest.approx(float(expected), rel=1e-6)


def test_choices_are_of_logits_which_do_not_underflow():
    logits = torch.tensor([[-400.0, -300, -200, 0], [-400.0, -300, 0, -200]])
    assert int((logits.softmax(dim=1) > 0).sum()) == 2
    lbl = LoadBalancingLoss(4, 2, coef=1.0)
    lbl(logits.requires_grad_())
    assert lbl.fractions.tolist() == [[0.0, 0.0, 0.5, 0.5]]
    lbl.reset()
    lbl(torch.zeros(3, 4).requires_grad_())  # of equal ones the first
    assert lbl.fractions.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_gradient_flows_through_mean_probabilities_alone():
    logits = wave(0, 4).requires_grad_()
    lbl = LoadBalancingLoss(N, K, coef=1.0, scope="micro")
    counts, _ = reference(logits.detach(), K)
    share = torch.tensor(counts / counts.sum())
    by_hand = N * (share * logits.softmax(dim=1).mean(dim=0)).sum()
    expected = torch.autograd.grad(by_hand, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(lbl(logits), logits)[0], expected)
    assert torch.autograd.gradcheck(lbl, wave(0, 4).requires_grad_())


def test_layers_each_have_their_own_counts_and_are_summed_or_averaged():
    layers = [wave(j, 6) for j in range(3)]
    each = [float(LoadBalancingLoss(N, K, coef=0.1)(one)) for one in layers]
    at_once = LoadBalancingLoss(N, K, coef=0.1)
    assert float(at_once(layers)) == pytest.approx(sum(each))
    one_by_one = LoadBalancingLoss(N, K, coef=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = [float(one_by_one(one, layer=i)) for i, one in enumerate(layers)]
    assert values == pytest.approx(each)
    assert torch.equal(one_by_one.counts, at_once.counts)
    mean = LoadBalancingLoss(N, K, coef=0.1, layer_reduction="mean")
    assert float(mean(layers)) == pytest.approx(sum(each) / 3)


def test_sequence_scope_is_the_mean_over_sequences_and_groups():
    batch = torch.stack([wave(j, 6) for j in range(4)])
    mask = torch.ones(4, 6)
    mask[1, 3:] = 0
    mask[3, :] = 0  # a sequence of padding alone does not count
    rows = [batch[0], batch[1, :3], batch[2]]

    def value(parts):
        counts, mean = reference(torch.cat(parts), K)
        return N * (counts / counts.sum() * mean).sum()

    single = LoadBalancingLoss(N, K, coef=1.0, scope="sequence")
    assert float(single(batch, None, mask)) == pytest.approx(np.mean([value([r]) for r in rows]))
    assert float(single(batch.reshape(-1, N), None, mask)) == pytest.approx(
        float(single(batch, None, mask))
    )
    pairs = LoadBalancingLoss(N, K, coef=1.0, scope="sequence", sequences_per_group=2)
    expected = np.mean([value(rows[:2]), value(rows[2:])])
    assert float(pairs(batch, None, mask)) == pytest.approx(expected)
    whole = LoadBalancingLoss(N, K, coef=1.0, scope="sequence", sequences_per_group=4)
    assert float(whole(batch, None, mask)) == pytest.approx(value(rows))


def test_shuffled_counts_have_the_sequence_size_and_the_global_distribution():
    # Two domains, an expert each: balanced as a whole, at its worst within a sequence.
    sure = 20.0 * torch.eye(2, dtype=torch.float64)
    batch = torch.stack([sure[[i % 2] * 64] for i in range(8)])
    by_sequence = LoadBalancingLoss(2, 1, coef=1.0, scope="sequence")
    shuffled = LoadBalancingLoss(2, 1, coef=1.0, scope="shuffle")
    assert float(by_sequence(batch)) == pytest.approx(2.0, abs=1e-6)
    values = [float(shuffled(batch)) for _ in range(20)]
    assert len(set(values)) > 1
    assert np.mean(values) == pytest.approx(1.0, abs=0.03)
    again = LoadBalancingLoss(2, 1, coef=1.0, scope="shuffle")
    assert [float(again(batch)) for _ in range(20)] == values
    # A draw of all tokens without replacement is all tokens.
    whole = LoadBalancingLoss(N, K, coef=1.0, scope="shuffle", sequences_per_group=3)
    micro = LoadBalancingLoss(N, K, coef=1.0, scope="micro")
    waves = torch.stack([wave(j, 6) for j in range(3)])
    assert float(whole(waves)) == pytest.approx(float(micro(waves)))


@pytest.mark.parametrize("scope", ["global", "micro", "sequence"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere_whatever_it_holds(scope, side):
    logits = torch.stack([wave(j, 5) for j in range(2)])
    padding = torch.full((2, 3, N), float("nan"), dtype=torch.float64)
    padding[0] = 1e3
    parts = [padding, logits] if side == "left" else [logits, padding]
    mask = torch.cat([torch.full(part.shape[:2], int(part is logits)) for part in parts], dim=1)
    padded = torch.cat(parts, dim=1).requires_grad_()
    plain = logits.clone().requires_grad_()
    a, b = (LoadBalancingLoss(N, K, scope=scope) for _ in range(2))
    loss, expected = a(padded, None, mask), b(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(loss, padded)[0]
    torch.testing.assert_close(
        gradient[mask.bool()], torch.autograd.grad(expected, plain)[0].reshape(-1, N)
    )
    assert not gradient[~mask.bool()].any()
    assert torch.equal(a.counts, b.counts)


def test_given_choices_count_instead_of_the_largest_logits():
    logits = wave(0, 4)
    chosen = torch.tensor([[0, 1], [0, -1], [0, 2], [-1, -1]])
    lbl = LoadBalancingLoss(N, K, coef=1.0)
    share = torch.tensor([3, 1, 1, 0, 0]) / 5
    expected = N * (share * logits.softmax(dim=1).mean(dim=0)).sum()
    torch.testing.assert_close(lbl(logits, chosen), expected)
    assert lbl.counts.tolist() == [[3, 1, 1, 0, 0]]


def test_is_a_loss_of_a_routing_and_its_mask():
    logits = wave(1, 6).float()
    mask = torch.tensor([True] * 4 + [False] * 2)
    indices = logits.topk(K, dim=1).indices.masked_fill(~mask[:, None], -1)
    probs = logits.softmax(dim=1)
    routing = Routing(logits, probs, indices, torch.ones_like(indices).float())
    a, b = LoadBalancingLoss(N, K), LoadBalancingLoss(N, K)
    expected = b(logits[:4])
    torch.testing.assert_close(a(routing, mask), expected)
    a.reset()
    torch.testing.assert_close(a(routing, attention_mask=mask), expected)


def test_share_of_the_micro_batch_loss_is_added():
    first, second = wave(0, 4), wave(1, 6)
    mixed = LoadBalancingLoss(N, K, micro_share=0.25, accumulation_steps=2)
    whole = LoadBalancingLoss(N, K, accumulation_steps=2)
    micro = LoadBalancingLoss(N, K, scope="micro")
    for each in (first, second):
        torch.testing.assert_close(mixed(each), whole(each) + 0.25 * micro(each))


def test_a_forgotten_reset_warns_once_and_a_declared_one_does_not():
    lbl = LoadBalancingLoss(N, K)
    lbl(wave(0, 4))
    with pytest.warns(UserWarning, match="2 micro-steps were counted since the last reset"):
        lbl(wave(0, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lbl(wave(0, 4))
        lbl.reset()
        lbl(wave(0, 4))
        with lbl.accumulate(2):
            lbl(wave(0, 4))
            lbl(wave(1, 4))
        lbl(wave(0, 4))
    with pytest.raises(RuntimeError, match="stop"), lbl.accumulate(2):  # noqa: PT012
        lbl(wave(0, 4))
        raise RuntimeError("stop")
    assert not lbl.counts.any()
    assert lbl.accumulation_steps == 1


def test_evaluation_and_no_grad_count_nothing():
    lbl = LoadBalancingLoss(N, K)
    lbl(wave(0, 4))
    before = lbl.counts.clone()
    micro = LoadBalancingLoss(N, K, scope="micro")
    with torch.no_grad():
        torch.testing.assert_close(lbl(wave(1, 6)), micro(wave(1, 6)))
    lbl.eval()
    torch.testing.assert_close(lbl(wave(1, 6)), micro(wave(1, 6)))
    assert torch.equal(lbl.counts, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once_and_gives_the_same_gradient(reentrant):
    weight = torch.linspace(-1, 1, N * N, dtype=torch.float64).reshape(N, N)

    def run(checkpointed):
        w = weight.clone().requires_grad_()
        lbl = LoadBalancingLoss(N, K, coef=1.0, accumulation_steps=2)
        for j in range(2):
            x = wave(j, 6).requires_grad_()
            block = lambda x: lbl(x @ w)  # noqa: E731
            loss = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
            loss.backward()
        return w.grad, lbl.counts

    gradient, counts = run(True)
    expected, expected_counts = run(False)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(counts, expected_counts)


def test_buffers_stay_integers_are_not_saved_and_copies_are_independent():
    lbl = LoadBalancingLoss(N, K, scope="global")
    lbl(wave(0, 4))
    assert lbl.to(torch.bfloat16).counts.dtype == torch.int64
    assert not lbl.state_dict()
    twins = [copy.deepcopy(lbl), pickle.loads(pickle.dumps(lbl))]
    for twin in twins:
        assert torch.equal(twin.counts, lbl.counts)
        twin.reset()
    assert lbl.counts.sum() == 4 * K


def test_low_precision_logits_are_averaged_in_float32():
    logits = wave(0, 4).bfloat16()
    lbl = LoadBalancingLoss(N, K)
    loss = lbl(logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LoadBalancingLoss(N, K)(logits.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(LoadBalancingLoss(N, K)(logits), loss, rtol=0, atol=0)


BAD_SETTINGS = [
    ({"top_k": 6}, "top_k must be from 1 to num_experts=5, got 6"),
    ({"top_k": 0}, "top_k"),
    ({"scope": "rank"}, "unknown scope 'rank'; there are: global, micro, sequence, shuffle"),
    ({"coef": float("nan")}, "coef"),
    ({"micro_share": -1.0}, "micro_share"),
    ({"micro_share": 0.1, "scope": "micro"}, "micro_share is for scope='global'"),
    ({"layer_reduction": "max"}, "layer_reduction"),
    ({"accumulation_steps": 0}, "accumulation steps"),
    ({"accumulation_steps": 1.5}, "accumulation steps"),
    ({"sequences_per_group": 0}, "sequences_per_group"),
    ({"timeout": 0}, "timeout"),
    ({"group": object()}, "torch.distributed is not initialised"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_SETTINGS)
def test_bad_settings(changed, message):
    with pytest.raises(DataError, match=message):
        LoadBalancingLoss(**{"num_experts": N, "top_k": K, **changed})


BAD_INPUT = [
    ((torch.zeros(4, 3),), r"router_logits must be \(T, 5\)"),
    ((torch.zeros(4, N, dtype=torch.int64),), "floating"),
    ((torch.full((4, N), float("nan")),), "router_logits hold NaN or infinity"),
    ((torch.full((4, N), float("inf")),), "router_logits hold NaN or infinity"),
    ((torch.zeros(0, N),), "no tokens"),
    (((),), "must be a tensor or a sequence"),
    (("logits",), "must be a tensor or a sequence"),
    (([torch.zeros(4, N), torch.zeros(3, N)],), "one shape"),
    ((torch.zeros(4, N), None, torch.zeros(4)), "all tokens are padding"),
    ((torch.zeros(4, N), None, torch.ones(2, 3)), "attention_mask must be"),
    ((torch.zeros(4, N), torch.zeros(4, 3, dtype=torch.int64)), "selected_experts must be"),
    ((torch.zeros(4, N), torch.full((4, K), 5)), "from 0 to 4"),
    ((torch.zeros(4, N), torch.zeros(4, K)), "integers"),
    (([torch.zeros(4, N)], [torch.zeros(4, K).long()] * 2), "has 2 layers"),
]


@pytest.mark.parametrize(("args", "message"), BAD_INPUT)
def test_bad_input(args, message):
    lbl = LoadBalancingLoss(N, K)
    with pytest.raises(DataError, match=message):
        lbl(*args)
    assert not lbl.counts.any()


def test_minus_infinity_leaves_an_expert_out():
    logits = wave(0, 4)
    masked = torch.cat([logits, torch.full((4, 1), -torch.inf, dtype=torch.float64)], dim=1)
    masked.requires_grad_()
    loss = LoadBalancingLoss(N + 1, K)(masked)
    torch.testing.assert_close(loss * N / (N + 1), LoadBalancingLoss(N, K)(logits))
    assert torch.isfinite(torch.autograd.grad(loss, masked)[0]).all()


def test_sequence_scope_needs_to_know_sequences():
    with pytest.raises(DataError, match="needs to know the sequences"):
        LoadBalancingLoss(N, K, scope="sequence")(wave(0, 4))


# -- transformers --------------------------------------------------------------------------------

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
LABELS = IDS.masked_fill(MASK == 0, -100)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2", "qwen3"])
def test_replaces_the_loss_of_transformers_mixtures(kind):
    model = tiny(kind).train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    output = model(**batch, output_router_logits=True)
    plain = output.loss - 0.5 * output.aux_loss
    by_hand = LoadBalancingLoss(4, 2, coef=0.5)
    old = bool((output.router_logits[0] >= 0).all())  # transformers 5.2 reports probabilities
    balance = sum(
        by_hand(each[MASK.reshape(-1) == 1], layer=i, probabilities=old)
        for i, each in enumerate(output.router_logits)
    )
    chosen = []  # what the routers did, not what their logits make one think
    hooks = [
        module.register_forward_hook(lambda m, a, out: chosen.append(out[2]))
        for name, module in model.named_modules()
        if name.endswith(".gate")
    ]
    lbl = LoadBalancingLoss(4, 2, coef=0.5)
    with lbl.attach(model) as attached:
        assert isinstance(attached, Attachment)
        found = model(**batch)
        torch.testing.assert_close(found.loss, plain + balance)
        torch.testing.assert_close(found.aux_loss, balance)
        counts = [each[MASK.reshape(-1) == 1].flatten().bincount(minlength=4) for each in chosen]
        assert torch.equal(lbl.counts, torch.stack(counts))
        model.eval()
        torch.testing.assert_close(model(**batch).loss, plain)
        model.train()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(model(**batch, output_router_logits=True).loss, output.loss)
    again = LoadBalancingLoss(4, 2, coef=0.5)
    torch.testing.assert_close(again.from_output(output, MASK), balance)


def test_probabilities_under_the_name_of_logits_are_noticed():
    logits = [wave(j, 6).float() for j in range(2)]
    old = SimpleNamespace(router_logits=tuple(each.softmax(dim=1) for each in logits))
    new = SimpleNamespace(router_logits=tuple(logits))
    a, b = LoadBalancingLoss(N, K), LoadBalancingLoss(N, K)
    torch.testing.assert_close(a.from_output(old), b.from_output(new))


def test_attach_refuses_models_it_cannot_serve():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ModelError, match="has no balance loss to replace"):
        LoadBalancingLoss(4, 2).attach(LlamaForCausalLM(config))
    with pytest.raises(DataError, match="num_experts is 5, but MixtralForCausalLM has 4"):
        LoadBalancingLoss(5, 2).attach(tiny())
    with pytest.raises(DataError, match="top_k is 1"):
        LoadBalancingLoss(4, 1).attach(tiny())
    with pytest.raises(ModelError, match="no router_logits"):
        LoadBalancingLoss(4, 2).from_output(SimpleNamespace(router_logits=None))


@pytest.mark.parametrize("reentrant", [False, True])
def test_attached_loss_and_gradient_checkpointing(reentrant):
    model = tiny().train()
    lbl = LoadBalancingLoss(4, 2, coef=1.0)
    with lbl.attach(model):
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        expected, counts = gradients(model), lbl.counts.clone()
        model.zero_grad()
        lbl.reset()
        checkpoint_layers(model, {"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
            with pytest.raises(ModelError, match="use_reentrant"):
                model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False)
            return
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False).loss.backward()
    torch.testing.assert_close(gradients(model), expected)
    assert torch.equal(lbl.counts, counts)


def test_trainer_equals_a_loop_by_hand(tmp_path):
    """Five batches and two micro-steps per step: the last step of the epoch has one."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(3)
    rows = [torch.randint(1, 19, (length,)) for length in (6, 4, 7, 5, 6)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    start = tiny()

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return DataLoader(
                data, batch_size=1, collate_fn=lambda b: {k: v[None] for k, v in b[0].items()}
            )

    trained = copy.deepcopy(start)
    lbl = LoadBalancingLoss(4, 2, coef=0.3)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*micro-steps were counted")
        InOrder(trained, arguments, train_dataset=data, callbacks=[lbl.callback()]).train()
    assert not lbl.counts.any()
    assert trained.router_aux_loss_coef == 0.5

    model = copy.deepcopy(start).train()
    by_hand = LoadBalancingLoss(4, 2, coef=0.3)
    for _ in range(2):
        for group in ([0, 1], [2, 3], [4]):
            predicted = sum(len(rows[i]) - 1 for i in group)
            with by_hand.accumulate(len(group)):
                for i in group:
                    out = model(input_ids=rows[i][None], output_router_logits=True)
                    entropy = torch.nn.functional.cross_entropy(
                        out.logits[0, :-1], rows[i][1:], reduction="sum"
                    )
                    (entropy / predicted + by_hand.from_output(out) / len(group)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
    for (name, a), b in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


# -- several processes ---------------------------------------------------------------------------


def ragged(rank, step):
    """Micro-batches of unequal length, padded to 8 tokens."""
    size = 3 + (rank + 2 * step) % 5
    logits = torch.full((8, N), float("inf"), dtype=torch.float64)
    logits[:size] = wave(rank + 3 * step, size)
    return logits, torch.arange(8) < size


def mixture_layer(loss="global-balance"):
    torch.manual_seed(0)
    return MoE(6, N, {"name": "top-k", "k": K}, width=8, aux=[loss])


def work(folder):
    """What each process of the distributed tests does; writes what it found."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}

    lbl = LoadBalancingLoss(N, K, coef=1.0, timeout=60)
    steps = []
    with lbl.accumulate(3):
        for step in range(3):
            logits, mask = ragged(rank, step)
            logits = logits.requires_grad_()
            loss = lbl([logits, 2 * logits], None, mask)
            gradient = torch.autograd.grad(loss, logits)[0]
            steps.append([loss.item(), gradient[mask].tolist()])
        found["counts"] = lbl.counts.tolist()
    found["steps"] = steps
    found["after"] = int(lbl.counts.sum())

    moe = mixture_layer()
    moe(torch.sin(torch.arange(24.0) + rank).view(4, 6))
    found["layer"] = [moe.aux_loss.item(), moe.losses[0].fractions.tolist()]
    moe.update()
    found["layer_after"] = float(moe.losses[0].fractions.sum())

    unweighted = LoadBalancingLoss(N, K, coef=1.0, token_weighted=False)
    found["unweighted"] = float(unweighted(ragged(rank, 0)[0], None, ragged(rank, 0)[1]))

    if world == 4:  # the last three processes hold the three micro-batches
        members = dist.new_group([1, 2, 3])
        if rank:
            shared = LoadBalancingLoss(N, K, coef=0.01, group=members)
            logits = wave(rank - 1, SIZES[rank - 1]).requires_grad_()
            loss = shared(logits)
            found["megatron"] = [loss.item(), torch.autograd.grad(loss, logits)[0][0].tolist()]
            twins = [copy.deepcopy(each) for each in (shared, GlobalBalance(group=members))]
            twins.append(mixture_layer(GlobalBalance(group=members)).losses[0])
            found["twin_keeps_group"] = all(twin.group is members for twin in twins)
        else:
            try:
                LoadBalancingLoss(N, K, group=members)
            except DataError as error:
                found["outsider"] = str(error)

    local = LoadBalancingLoss(N, K, coef=1.0, scope="micro")
    logits, mask = ragged(rank, 0)
    found["micro"] = float(local(logits, None, mask))
    if rank == 0:  # evaluation must not wait for anyone
        found["evaluation"] = float(lbl.eval()(logits, None, mask))
        lbl.train()

    try:
        bad = torch.full((4, N), float("nan")) if rank == world - 1 else torch.zeros(4, N)
        lbl(bad)
    except (DataError, BalanceSyncError) as error:
        found["bad"] = [type(error).__name__, str(error)]
    lbl.reset()
    found["still_works"] = float(lbl(torch.zeros(4, N)))

    odd = dist.new_group(backend="cuda:gloo")  # cannot add up tensors on the CPU
    try:
        LoadBalancingLoss(N, K, group=odd)(torch.zeros(4, N))
    except BalanceSyncError as error:
        found["no_backend"] = str(error)

    if world == 2:
        model = torch.nn.parallel.DistributedDataParallel(tiny().train())
        attached = LoadBalancingLoss(4, 2, coef=0.7)
        with attached.attach(model):
            ids = IDS.clamp_min(1)[rank : rank + 1]
            model(input_ids=ids, labels=ids).loss.backward()
        torch.save(gradients(model.module), Path(folder) / f"gradients{rank}.pt")

    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def desert(folder, how):
    """Process 1 dies or sleeps where process 0 waits for it."""
    dist.init_process_group("gloo")
    lbl = LoadBalancingLoss(N, K, timeout=2)
    lbl(torch.zeros(4, N))
    if dist.get_rank() == 1:
        if how == "sleep":
            waited = time.monotonic() + 60
            while not (Path(folder) / "done").exists() and time.monotonic() < waited:
                time.sleep(0.1)
        os._exit(0)
    start = time.monotonic()
    try:
        lbl.reset()
        lbl(torch.zeros(4, N))
        result = ["no error", ""]
    except BalanceSyncError as error:
        result = [type(error).__name__, str(error)]
    (Path(folder) / "0.json").write_text(json.dumps([*result, time.monotonic() - start]))
    (Path(folder) / "done").touch()
    os._exit(0)


def environment():
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return a function that runs `work` in so many processes, once."""
    known = {}

    def start(world):
        if world not in known:
            folder = tmp_path_factory.mktemp(f"world{world}")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={world}", __file__, "work", str(folder)]
            finished = subprocess.run(
                command, env=environment(), capture_output=True, text=True, timeout=110, check=False
            )
            assert finished.returncode == 0, finished.stderr[-4000:]
            results = [json.loads((folder / f"{r}.json").read_text()) for r in range(world)]
            known[world] = SimpleNamespace(world=world, folder=folder, results=results)
        return known[world]

    return start


@pytest.fixture(params=[2, 4])
def processes(request, started):
    """What 2 and 4 processes under torchrun found."""
    return started(request.param)


def test_mean_over_processes_is_one_big_batch(processes):
    """Unequal lengths, two layers, padding that is not finite: value and gradient."""
    lbl = LoadBalancingLoss(N, K, coef=1.0)
    parts = [ragged(rank, 0) for rank in range(processes.world)]
    big = torch.cat([logits[mask] for logits, mask in parts]).requires_grad_()
    loss = lbl([big, 2 * big])
    gradient = torch.autograd.grad(loss, big)[0]
    first = [result["steps"][0] for result in processes.results]
    assert np.mean([value for value, _ in first]) == pytest.approx(loss.item(), rel=1e-12)
    rows = np.concatenate([np.array(rows) for _, rows in first]) / processes.world
    np.testing.assert_allclose(rows, gradient.numpy(), rtol=1e-9, atol=1e-14)


def test_a_mixture_layer_shares_its_counts_with_other_processes(processes):
    moe = mixture_layer()
    world = range(processes.world)
    moe(torch.cat([torch.sin(torch.arange(24.0) + rank).view(4, 6) for rank in world]))
    values, shares = zip(*(result["layer"] for result in processes.results), strict=True)
    assert np.mean(values) == pytest.approx(moe.aux_loss.item(), rel=1e-5)
    for share in shares:
        np.testing.assert_allclose(share, moe.losses[0].fractions, rtol=1e-6)
    assert all(result["layer_after"] == 0 for result in processes.results)


def test_counts_cover_processes_and_micro_steps_and_end_with_the_step(processes):
    total = np.zeros(N)
    for step in range(3):
        parts = [ragged(rank, step) for rank in range(processes.world)]
        known = [reference(logits[mask], K) for logits, mask in parts]
        total += sum(counts for counts, _ in known)
        sizes = np.array([int(mask.sum()) for _, mask in parts])
        if step:  # layer 2 has the same order of logits, so the same counts
            doubled = [reference(2 * logits[mask], K)[1] for logits, mask in parts]
            for rank, result in enumerate(processes.results):
                mean = known[rank][1] + doubled[rank]
                expected = N * (total / total.sum() * mean).sum() * sizes[rank] / sizes.mean()
                assert result["steps"][step][0] == pytest.approx(expected, rel=1e-10)
    for result in processes.results:
        assert result["counts"] == [total.tolist()] * 2
        assert result["after"] == 0


def test_processes_without_token_weights_follow_the_papers_formula(processes):
    parts = [ragged(rank, 0) for rank in range(processes.world)]
    known = [reference(logits[mask], K) for logits, mask in parts]
    total = sum(counts for counts, _ in known)
    for (counts, mean), result in zip(known, processes.results, strict=True):
        assert result["unweighted"] == pytest.approx(N * (total / total.sum() * mean).sum())
        assert result["micro"] == pytest.approx(N * (counts / counts.sum() * mean).sum())


def test_evaluation_in_one_process_waits_for_nobody(processes):
    assert processes.results[0]["evaluation"] == pytest.approx(processes.results[0]["micro"])


def test_bad_input_in_one_process_stops_all_and_spoils_nothing(processes):
    *others, last = (result["bad"] for result in processes.results)
    assert last[0] == "DataError"
    assert "NaN" in last[1]
    for kind, message in others:
        assert kind == "BalanceSyncError"
        assert f"1 of {processes.world} processes refused" in message
    assert all(r["still_works"] == pytest.approx(1.0) for r in processes.results)


def test_a_group_that_cannot_add_up_is_a_clear_error(processes):
    for result in processes.results:
        assert "no backend for this device" in result["no_backend"]


def test_a_group_of_three_agrees_with_megatron(started):
    processes = started(4)
    assert "is not in the group" in processes.results[0]["outsider"]
    for result, (value, row) in zip(processes.results[1:], MEGATRON_GLOBAL, strict=True):
        # Megatron's is a sum over processes, ours a mean.
        assert result["megatron"][0] == pytest.approx(3 * value, rel=1e-12)
        np.testing.assert_allclose(result["megatron"][1], 3 * np.array(row), rtol=1e-8, atol=1e-14)
        assert result["twin_keeps_group"]


def test_data_parallel_training_equals_one_process(started):
    processes = started(2)
    model = tiny().train()
    lbl = LoadBalancingLoss(4, 2, coef=0.7)
    ids = IDS.clamp_min(1)
    with lbl.attach(model):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(processes.folder / f"gradients{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", ["die", "sleep"])
def test_a_process_that_leaves_gives_an_error_and_no_hang(how, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, __file__, "desert", str(tmp_path), how]
    running = [subprocess.Popen(command, env={**shared, "RANK": str(r)}) for r in range(2)]
    try:
        assert running[0].wait(timeout=100) == 0
    finally:
        (tmp_path / "done").touch()
        for process in running:
            process.terminate()
            process.wait(timeout=20)
    kind, message, seconds = json.loads((tmp_path / "0.json").read_text())
    assert kind == "BalanceSyncError"
    assert "process 0 of 2 could not add up expert counts" in message
    assert seconds < 20


if __name__ == "__main__":
    {"work": work, "desert": desert}[sys.argv[1]](*sys.argv[2:])
