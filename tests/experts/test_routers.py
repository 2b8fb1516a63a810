"""Routers against Megatron-core, vmoe, scipy, brute force and finite differences."""

import copy
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from bakeoff.errors import DataError
from bakeoff.experts import assignment_routers, fixed_routers, soft_routers  # noqa: F401
from bakeoff.experts.assignment_routers import (
    BalancedAssignment,
    ExpertChoice,
    Sinkhorn,
    balanced_assignment,
    sinkhorn_plan,
)
from bakeoff.experts.fixed_routers import DomainRouter, HashRouter, RandomRouter
from bakeoff.experts.protocol import Router
from bakeoff.experts.routers import (
    PRESETS,
    ROUTERS,
    AttentionTopK,
    CosineTopK,
    DSelectK,
    GShardTop2,
    NullExperts,
    PerceptronTopK,
    Threshold,
    TopK,
    make_router,
    smooth_step,
    top_k,
)
from bakeoff.experts.soft_routers import Dense, MergedExperts, SoftMoE, sequence_rows

GOLDEN = json.loads((Path(__file__).parent / "mixture_of_experts_golden.json").read_text())


def golden_logits():
    j = torch.arange(16 * 6, dtype=torch.float32).reshape(16, 6)
    return torch.sin(1.7 * j) + 0.5 * torch.cos(0.31 * j * j) + torch.linspace(1, -1, 6)


def with_identity_gate(router, n_experts=6):
    """Bind the router so that its logits are its input."""
    router.bind(n_experts, n_experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(n_experts))
    return router.eval()


def table(routing):
    """Weights as ``(T, N)``."""
    full = torch.zeros_like(routing.probs)
    return full.scatter_add_(1, routing.indices.clamp_min(0), routing.weights)


def every_router():
    return {
        "top-k": TopK(),
        "switch": TopK(k=1),
        "noisy": TopK(noise="learned", seed=0),
        "v-moe": TopK(noise=1.0, renorm=False, seed=0),
        "jitter": TopK(jitter=0.1, seed=0),
        "sigmoid": TopK(score="sigmoid"),
        "loss-free": TopK(score="sigmoid", bias_rate=0.1),
        "groups": TopK(groups=3, groups_kept=2),
        "standardised": TopK(standardise=True),
        "cosine": CosineTopK(),
        "attention": AttentionTopK(),
        "perceptron": PerceptronTopK(width=5),
        "null": NullExperts(k=3),
        "gshard": GShardTop2(seed=0),
        "threshold": Threshold(),
        "dselect-k": DSelectK(),
        "base": BalancedAssignment(),
        "sinkhorn": Sinkhorn(k=2),
        "expert-choice": ExpertChoice(),
        "hash": HashRouter(vocabulary=50, k=2),
        "random": RandomRouter(k=2),
        "domain": DomainRouter(groups=[[0], [1, 2, 3], [4, 5]]),
        "dense": Dense(),
        "soft": SoftMoE(slots=2),
        "merged": MergedExperts(),
    }


# Against other libraries


def test_perceptron_is_torchs():
    torch.manual_seed(0)
    router = PerceptronTopK(width=5, k=3).bind(8, 6)
    nn.init.normal_(router.inner_bias)
    theirs = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 6, bias=False))
    given = {"0.weight": router.inner, "0.bias": router.inner_bias, "2.weight": router.weight}
    theirs.load_state_dict({name: value.detach() for name, value in given.items()})
    hidden = torch.randn(11, 8)
    routing, logits = router(hidden), theirs(hidden)
    torch.testing.assert_close(routing.logits, logits)
    top = logits.topk(3, dim=1)
    assert torch.equal(routing.indices, top.indices)
    torch.testing.assert_close(routing.weights, top.values.softmax(dim=1))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("softmax_after", TopK(k=2)),
        ("softmax_before", TopK(k=2, renorm=False)),
        ("switch", TopK(k=1)),
        ("sigmoid", TopK(k=2, score="sigmoid")),
        ("groups", TopK(k=2, groups=3, groups_kept=2, renorm=False)),
    ],
)
def test_top_k_equals_megatron(name, router):
    routing = with_identity_gate(router)(golden_logits())
    expected = torch.tensor(GOLDEN["megatron"][name])
    torch.testing.assert_close(table(routing), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "router", "span"),
    [
        ("sigmoid_bias", TopK(k=2, score="sigmoid", bias_rate=1.0), 0.5),
        (
            "groups_sigmoid",
            TopK(k=4, score="sigmoid", bias_rate=1.0, groups=3, groups_kept=2, scale=2.5),
            0.3,
        ),
    ],
)
def test_biased_choice_equals_megatron(name, router, span):
    with_identity_gate(router).bias.copy_(torch.linspace(-span, span, 6))
    expected = torch.tensor(GOLDEN["megatron"][name])
    torch.testing.assert_close(table(router(golden_logits())), expected, rtol=1e-5, atol=1e-6)


def test_sinkhorn_equals_megatron_and_its_marginals_hold():
    plan = sinkhorn_plan(golden_logits(), tolerance=1e-7, max_iterations=1000)
    expected = torch.tensor(GOLDEN["megatron"]["sinkhorn"]) / 96
    torch.testing.assert_close(plan, expected, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((6,), 1 / 6), rtol=1e-5, atol=0)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((16,), 1 / 16), rtol=1e-4, atol=0)


def test_sinkhorn_survives_large_logits_and_padding():
    mask = torch.arange(16) < 11
    whole = sinkhorn_plan(golden_logits()[:11] * 100, tolerance=1e-6, max_iterations=500)
    padded = sinkhorn_plan(golden_logits() * 100, mask, 1e-6, 500)
    assert torch.isfinite(whole).all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sinkhorn_plan(golden_logits()[:11] * 100, tolerance=1e-6, max_iterations=500)
    assert torch.equal(mixed, whole)
    torch.testing.assert_close(padded[:11], whole)
    assert padded[11:].abs().sum() == 0


def test_expert_choice_equals_vmoe_and_brute_force():
    routing = with_identity_gate(ExpertChoice(capacity_factor=1.4))(golden_logits())
    expected = torch.tensor(GOLDEN["vmoe"]["expert_choice"])
    weights = table(routing)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    probs = golden_logits().softmax(dim=1)
    for expert in range(6):
        best = sorted(range(16), key=lambda t: -float(probs[t, expert]))[: math.ceil(1.4 * 16 / 6)]
        assert set(best) == set((weights[:, expert] > 0).nonzero()[:, 0].tolist())


def test_soft_moe_equals_vmoe():
    hidden = torch.sin(0.37 * torch.arange(40, dtype=torch.float32)).reshape(10, 4)
    router = SoftMoE(slots=2).bind(4, 3)
    with torch.no_grad():
        slots = torch.cos(0.53 * torch.arange(24, dtype=torch.float32)).reshape(4, 3, 2)
        router.slot_vectors.copy_(slots)
        router.scale.fill_(1.3)
    routing = router(hidden, sequence_ids=torch.arange(10) // 5)
    for mine, theirs in (("combine", "soft_combine"), ("dispatch", "soft_dispatch")):
        expected = torch.tensor(GOLDEN["vmoe"][theirs]).reshape(10, 6)
        torch.testing.assert_close(routing.aux[mine], expected, rtol=1e-4, atol=1e-5)
    by_expert = routing.aux["combine"].view(10, 3, 2).sum(dim=2)
    torch.testing.assert_close(routing.probs, by_expert)


@settings(max_examples=30, deadline=None)
@given(n_tokens=st.integers(1, 7), n_experts=st.integers(1, 4), seed=st.integers(0, 999))
def test_balanced_assignment_equals_trying_everything(n_tokens, n_experts, seed):
    scores = np.random.default_rng(seed).standard_normal((n_tokens, n_experts))
    low, high = n_tokens // n_experts, -(-n_tokens // n_experts)
    best = max(
        sum(scores[t, e] for t, e in enumerate(choice))
        for choice in itertools.product(range(n_experts), repeat=n_tokens)
        if all(low <= choice.count(e) <= high for e in range(n_experts))
    )
    chosen = balanced_assignment(torch.from_numpy(scores)).tolist()
    loads = [chosen.count(e) for e in range(n_experts)]
    assert low <= min(loads) <= max(loads) <= high
    assert sum(scores[t, e] for t, e in enumerate(chosen)) == pytest.approx(best)


def test_base_balances_in_training_and_is_greedy_in_evaluation():
    router = with_identity_gate(BalancedAssignment())
    assert router(golden_logits()).indices[:, 0].tolist() == golden_logits().argmax(1).tolist()
    routing = router.train()(golden_logits(), mask=torch.arange(16) < 12)
    assert routing.counts.tolist() == [2] * 6
    kept = routing.indices[:12]
    torch.testing.assert_close(routing.weights[:12], golden_logits()[:12].gather(1, kept).sigmoid())


# Closed forms


def test_renormalised_softmax_is_a_softmax_over_the_chosen():
    logits = golden_logits() * 30  # the others' probabilities underflow
    routing = with_identity_gate(TopK(k=3))(logits)
    expected = logits.topk(3, dim=1).values.softmax(dim=1)
    torch.testing.assert_close(routing.weights, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=5),
    k=st.integers(1, 7),
    masked=st.booleans(),
)
@example(rows=[[0, 0, 0, -2, -2, -2, -2]], k=4, masked=True)
def test_ties_go_to_the_lowest_index(rows, k, masked):
    scores = torch.tensor(rows, dtype=torch.float32)
    if masked:
        scores[scores == -2] = -math.inf
    expected = [sorted(range(7), key=lambda i: (-row[i], i))[:k] for row in scores.tolist()]
    assert top_k(scores, k).tolist() == expected


def test_loss_free_bias_follows_the_load_and_needs_no_gradient():
    router = TopK(k=1, score="sigmoid", bias_rate=0.25).bind(6, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3, 6))
    hidden = torch.zeros(8, 6)
    hidden[:, 0] = 1.0
    for _ in range(2):  # two micro-batches, one update
        assert router(hidden).counts.tolist() == [8, 0, 0]
    router.update()
    assert router.bias.tolist() == [-0.25, 0.25, 0.25]
    assert router(hidden).counts.tolist() == [0, 8, 0]
    assert not any(name == "bias" for name, _ in router.named_parameters())
    before = router.bias.clone()
    router.eval()(hidden)
    router.update()
    router.update()  # the load of one batch counts once, evaluation not at all
    assert router.bias.tolist() == pytest.approx(
        (before + torch.tensor([0.25, -0.25, 0.25])).tolist()
    )


def test_gradient_checkpointing_does_not_change_the_update():
    from torch.utils.checkpoint import checkpoint

    biases = []
    for recompute in (False, True):
        torch.manual_seed(0)
        router = TopK(score="sigmoid", bias_rate=0.1, noise=1.0).bind(6, 4)
        hidden = torch.randn(9, 6, requires_grad=True)
        run = lambda x, router=router: router(x).weights  # noqa: E731
        torch.manual_seed(1)
        weights = checkpoint(run, hidden, use_reentrant=False) if recompute else run(hidden)
        weights.sum().backward()
        router.update()
        biases.append((router.bias.clone(), hidden.grad))
    assert torch.equal(biases[0][0], biases[1][0])
    torch.testing.assert_close(biases[0][1], biases[1][1])


def test_noise_is_for_training_and_has_the_stated_deviation():
    router = TopK(noise=1.5, seed=0).bind(4, 5)
    hidden = torch.zeros(20000, 4)
    noisy = router(hidden).aux["noisy_logits"]
    assert float(noisy.detach().std()) == pytest.approx(1.5 / 5, rel=0.02)
    assert "noisy_logits" not in router.eval()(hidden).aux
    learned = TopK(noise="learned", seed=0).bind(4, 5)
    deviation = math.log(2) + 0.01  # softplus(0) + 0.01
    assert float(learned(hidden).aux["noisy_logits"].detach().std()) == pytest.approx(
        deviation, rel=0.02
    )


def test_jitter_is_drawn_in_float32():
    router = TopK(k=1, jitter=0.01, seed=0).bind(1, 2)
    router.weight.data.fill_(1.0)
    logits = router(torch.ones(2000, 1, dtype=torch.bfloat16)).logits.detach()[:, 0]
    assert float(logits.min()) < 0.991 < 1.009 < float(logits.max())
    assert 0.99 <= float(logits.min()) <= float(logits.max()) <= 1.01
    assert len(logits.unique()) > 1000  # bfloat16 knows four numbers there


def test_seeded_noise_repeats_and_copies_start_again():
    make = lambda: TopK(noise=1.0, seed=3).bind(4, 5)  # noqa: E731
    torch.manual_seed(0)
    one = make()
    two = copy.deepcopy(one)
    hidden = torch.randn(6, 4)
    assert torch.equal(one(hidden).aux["noisy_logits"], two(hidden).aux["noisy_logits"])
    assert not torch.equal(one(hidden).aux["noisy_logits"], two.eval()(hidden).probs)
    assert torch.equal(pickle.loads(pickle.dumps(one)).weight, one.weight)


def test_gshard_uses_the_second_expert_as_often_as_said():
    router = with_identity_gate(GShardTop2(seed=0), 3).train()
    # Second renormalised weight 0.2: used with probability 0.4.
    hidden = torch.tensor([math.log(4.0), 0.0, -50.0]).expand(20000, 3)
    routing = router(hidden)
    assert float((routing.indices[:, 1] >= 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(routing.weights[:, 0], torch.full((20000,), 0.8))
    assert (router.eval()(hidden).indices[:, 1] == 1).all()


def test_null_experts_take_their_share_and_lose_their_weight():
    router = NullExperts(k=3, null=2).bind(5, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(5))
    hidden = torch.tensor([[1.0, 0, 0, 3, 2], [3.0, 2, 1, 0, 0], [-9.0, -9, -9, 1, 0]])
    routing = router(hidden)
    assert routing.indices.tolist() == [[3, 4, 0], [0, 1, 2], [3, 4, 0]]
    assert routing.weights[0].tolist() == [0.0, 0.0, 1.0]
    torch.testing.assert_close(routing.weights[1], torch.tensor([3.0, 2, 1]).softmax(0))
    assert routing.counts.tolist() == [3, 1, 1, 2, 2]
    assert router.active_experts == pytest.approx(3 * 3 / 5)


def test_threshold_takes_all_above_and_at_least_one():
    router = Threshold().bind(2, 3)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        router.threshold.copy_(torch.tensor([0.5, 0.5, 0.5]))
    routing = router(torch.tensor([[1.0, 1.0], [5.0, 0.1], [0.0, -1.0]]))
    chosen = [[i for i in row if i >= 0] for row in routing.indices.tolist()]
    assert chosen == [[0, 1], [0], [0]]  # the third passes nowhere: best cosine, lowest index
    assert routing.weights.sum(dim=1).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_threshold_passes_a_gradient_straight_through():
    router = Threshold().bind(3, 4)
    routing = router(torch.randn(5, 3))
    routing.weights[:, 0].sum().backward()
    assert router.threshold.grad.abs().sum() > 0
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("n_experts", [4, 6])
def test_dselect_k_is_a_mixture_of_bit_products(n_experts):
    torch.manual_seed(0)
    router = DSelectK(k=2, gamma=1.0).bind(3, n_experts)
    with torch.no_grad():
        router.bit_weight.uniform_(-0.4, 0.4)
    hidden = torch.randn(5, 3)
    bits = math.ceil(math.log2(n_experts))
    weights = table(router(hidden)).detach()
    for token, expert in itertools.product(range(5), range(n_experts)):
        raw = (router.bit_weight @ hidden[token]).view(2, bits)
        mix = (router.mix_weight @ hidden[token]).softmax(0)
        expected = 0.0
        for selector in range(2):
            product = float(mix[selector].detach())
            for bit in range(bits):
                step = float(smooth_step(raw[selector, bit].detach(), 1.0))
                product *= step if expert >> bit & 1 else 1 - step
            expected += product
        assert float(weights[token, expert]) == pytest.approx(expected, abs=1e-6)


def test_dselect_k_ends_with_at_most_k_experts():
    router = DSelectK(k=2).bind(3, 8)
    with torch.no_grad():
        router.bit_weight.mul_(1e6)
    used = (router(torch.randn(50, 3)).indices >= 0).sum(dim=1)
    assert int(used.max()) <= 2
    assert int(used.min()) >= 1


def test_smooth_step_is_flat_outside_and_symmetric():
    x = torch.linspace(-2, 2, 41)
    y = smooth_step(x, 1.0)
    assert y[x <= -0.5].abs().max() == 0
    assert (y[x >= 0.5] == 1).all()
    torch.testing.assert_close(y + y.flip(0), torch.ones(41))


def test_hash_deals_evenly_and_distinctly():
    router = HashRouter(vocabulary=1000, k=3, seed=1).bind(4, 8)
    ids = torch.arange(1000)
    routing = router(torch.zeros(1000, 4), token_ids=ids)
    assert all(len(set(row)) == 3 for row in routing.indices.tolist())
    first = torch.bincount(routing.indices[:, 0], minlength=8)
    assert int(first.max() - first.min()) <= 1
    again = HashRouter(vocabulary=1000, k=3, seed=1).bind(4, 8)
    assert torch.equal(again.table, router.table)
    with pytest.raises(DataError, match="token_ids must be from 0 to 999"):
        router(torch.zeros(1, 4), token_ids=torch.tensor([1000]))
    with pytest.raises(DataError, match="needs token_ids"):
        router(torch.zeros(2, 4))


def test_domain_uses_its_own_experts():
    router = DomainRouter(groups=[[0], [1, 2, 3], [4, 5]]).bind(4, 6)
    domains = torch.arange(300) % 3
    routing = router(torch.zeros(300, 4), domains=domains, token_ids=torch.arange(300))
    for domain, group in enumerate([[0], [1, 2, 3], [4, 5]]):
        assert set(routing.indices[domains == domain, 0].tolist()) == set(group)
    with pytest.raises(DataError, match="domains must be from 0 to 2"):
        router(torch.zeros(1, 4), domains=torch.tensor([3]), token_ids=torch.tensor([0]))


def test_random_choices_are_distinct_and_uniform():
    routing = RandomRouter(k=2).bind(4, 5)(torch.zeros(5000, 4))
    assert (routing.indices[:, 0] != routing.indices[:, 1]).all()
    assert (routing.counts / 10000 - 0.2).abs().max() < 0.02


def test_merged_weights_come_from_the_mean_of_the_sequence():
    router = MergedExperts().bind(4, 3)
    hidden = torch.randn(7, 4)
    ids = torch.tensor([5, 5, 5, 2, 2, 2, 2])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool()
    routing = router(hidden, mask=mask, sequence_ids=ids)
    for rows in ([0, 1], [3, 4, 5, 6]):
        expected = (hidden[rows].mean(dim=0) @ router.weight.T).softmax(0)
        torch.testing.assert_close(routing.probs[rows], expected.expand(len(rows), 3))


def test_sequence_rows_group_what_is_interleaved():
    ids = torch.tensor([7, 3, 7, 7, 3])
    assert sequence_rows(torch.zeros(5, 1), {"sequence_ids": ids}).tolist() == [
        [1, 4, -1],
        [0, 2, 3],
    ]


# What holds for all


def context(n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "token_ids": torch.randint(0, 50, (n_tokens,), generator=generator),
        "domains": torch.randint(0, 3, (n_tokens,), generator=generator),
    }


@pytest.mark.parametrize("name", every_router())
@pytest.mark.parametrize("training", [True, False])
def test_contract(name, training):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).train(training)
    assert isinstance(router, Router)
    hidden = torch.randn(12, 8)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[3, 11]] = False
    hidden[~mask] = torch.nan
    routing = router(hidden, mask=mask, **context(12))
    assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == torch.float32
    assert routing.indices.dtype == torch.int64
    assert (routing.indices[~mask] == -1).all()
    assert (routing.weights[routing.indices < 0] == 0).all()
    assert torch.isfinite(routing.weights).all()
    assert int(routing.counts.sum()) == int((routing.indices >= 0).sum())
    torch.testing.assert_close(routing.probs.sum(dim=1)[mask], torch.ones(10), rtol=1e-5, atol=1e-5)
    for row in routing.indices[mask].tolist():
        real = [i for i in row if i >= 0]
        assert len(real) == len(set(real))


def drawn_once():
    """Return the routers that choose the same for the same tokens: all but the random one."""
    return [name for name in every_router() if name != "random"]


@pytest.mark.parametrize("name", drawn_once())
def test_padding_changes_nothing_for_the_others(name):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).eval()
    hidden, extra = torch.randn(9, 8), context(9)
    short = router(hidden, mask=torch.ones(9, dtype=torch.bool), **extra)
    mask = torch.tensor([True] * 9 + [False] * 4)
    longer = {key: torch.cat([ids, ids[:4]]) for key, ids in extra.items()}
    padded = router(torch.cat([hidden, torch.full((4, 8), 7.0)]), mask=mask, **longer)
    assert torch.equal(padded.indices[:9], short.indices)
    torch.testing.assert_close(padded.weights[:9], short.weights)


@pytest.mark.parametrize("name", drawn_once())
def test_order_of_tokens_does_not_matter(name):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).eval()
    hidden, extra, order = torch.randn(10, 8), context(10), torch.randperm(10)
    routing = router(hidden, **extra)
    moved = router(hidden[order], **{key: ids[order] for key, ids in extra.items()})
    assert torch.equal(moved.indices, routing.indices[order])
    torch.testing.assert_close(moved.weights, routing.weights[order])


@pytest.mark.parametrize(
    "name", [n for n in every_router() if n not in ("random", "hash", "domain")]
)
def test_causal_routers_do_not_look_ahead(name):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).eval()
    hidden = torch.randn(10, 8)
    changed = hidden.clone()
    changed[6:] = torch.randn(4, 8) * 3
    one, two = router(hidden), router(changed)
    same = torch.equal(one.indices[:6], two.indices[:6]) and torch.allclose(
        one.weights[:6], two.weights[:6]
    )
    if name == "soft":  # its weights look only at the token, its slots at all
        same = torch.allclose(one.aux["dispatch"][:6], two.aux["dispatch"][:6])
    assert same == router.is_causal


@pytest.mark.parametrize("name", every_router())
def test_padding_alone_goes_nowhere(name):
    router = every_router()[name].bind(8, 6)
    routing = router(torch.randn(3, 8), mask=torch.zeros(3, dtype=torch.bool), **context(3))
    assert int(routing.counts.sum()) == 0
    assert torch.isfinite(routing.probs).all()


@pytest.mark.parametrize(
    "name",
    [
        "top-k",
        "switch",
        "sigmoid",
        "groups",
        "standardised",
        "cosine",
        "attention",
        "perceptron",
        "null",
        "gshard",
        "dselect-k",
        "sinkhorn",
        "expert-choice",
        "dense",
        "soft",
        "merged",
    ],
)
def test_gradients_equal_finite_differences(name):
    torch.manual_seed(0)
    router = every_router()[name].bind(4, 6).double().eval()
    hidden = torch.randn(5, 4, dtype=torch.float64)
    parameter = next(p for p in router.parameters() if p.ndim >= 2)
    nn.init.normal_(parameter)
    if name == "dselect-k":
        parameter.data.mul_(0.1)
    direction = torch.randn(1)

    def value():
        routing = router(hidden)
        total = (routing.weights.double() * torch.cos(routing.indices.double())).sum()
        if name == "soft":
            total = total + (routing.aux["dispatch"] * torch.arange(12.0)).sum()
        return total

    value().backward()
    direction = torch.randn_like(parameter)
    step = 1e-6
    with torch.no_grad():
        parameter.add_(step * direction)
        above = value()
        parameter.sub_(2 * step * direction)
        below = value()
    slope = float((above - below) / (2 * step))
    expected = float((parameter.grad * direction).sum())
    assert expected != 0
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_single_renormalised_weight_gives_no_gradient_and_is_warned_of(score):
    with pytest.warns(UserWarning, match="no gradient"):
        router = TopK(k=1, renorm=True, score=score)
    router.bind(4, 3)(torch.randn(5, 4)).weights.sum().backward()
    assert router.weight.grad.abs().max() < 1e-7
    default = TopK(k=1, score=score).bind(4, 3)
    default(torch.randn(5, 4)).weights.sum().backward()
    assert default.weight.grad.abs().max() > 1e-3


def test_a_single_choice_among_null_experts_trains_the_gate():
    torch.manual_seed(0)
    router = NullExperts(k=1, null=2).bind(4, 3)
    routing = router(torch.randn(20, 4))
    chosen = routing.probs.gather(1, routing.indices)
    expected = torch.where(routing.indices < 3, chosen, 0.0)
    torch.testing.assert_close(routing.weights, expected)
    routing.weights.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", every_router())
def test_low_precision_input_is_routed_in_float32(name, training):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).train(training)
    for parameter in router.parameters():
        nn.init.normal_(parameter)  # so that rounding shows
    twin, hidden = copy.deepcopy(router), torch.randn(40, 8).bfloat16()
    expected = twin(hidden.float(), **context(40))
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden, **context(40))
    for part in ("logits", "probs", "weights"):
        assert getattr(routing, part).dtype == torch.float32
        assert torch.equal(getattr(routing, part), getattr(expected, part)), part
    assert torch.equal(routing.indices, expected.indices)
    for key, value in expected.aux.items():
        assert torch.equal(routing.aux[key], value), key


# Of those that are left out the weights are equal, or a bias or groups have a say in the order.
@pytest.mark.parametrize(
    "name", [n for n in every_router() if n not in ("loss-free", "hash", "random", "domain")]
)
def test_experts_come_in_order_of_choice_and_those_not_chosen_last(name):
    torch.manual_seed(0)
    router = every_router()[name].bind(8, 6).eval()
    if name == "dselect-k":
        router.bit_weight.data.mul_(60)  # some bits are decided, others not
    routing = router(torch.randn(60, 8), mask=torch.arange(60) < 57)
    chosen = routing.indices >= 0
    assert not (chosen[:, 1:] & ~chosen[:, :-1]).any()
    if getattr(router, "varies", False):
        assert len(set(chosen.sum(dim=1).tolist())) > 2
    order = routing.logits.gather(1, routing.indices.clamp_min(0))
    if name == "threshold":  # thresholds are equal at the start, and so are the weights
        first = routing.logits.argmax(dim=1)
    else:
        order = routing.weights
        first = routing.probs.argmax(dim=1)
    if name in ("null", "base"):  # null experts weigh nothing; there is one choice
        order = routing.probs.gather(1, routing.indices.clamp_min(0))
    if name not in ("groups", "expert-choice"):  # whose best may not be to be had
        assert torch.equal(routing.indices[:57, 0], first[:57])
    rises = order[:, 1:] > order[:, :-1]
    assert not (rises & chosen[:, 1:]).any()


def test_the_balancing_bias_and_the_load_survive_a_conversion():
    exact = TopK(k=1, bias_rate=1e-3).bind(4, 3)
    low = copy.deepcopy(exact)
    for router in (exact, low):
        router.bias.copy_(torch.tensor([0.3, -0.3001, 0.0001]))
    low.to(torch.bfloat16)
    assert low.weight.dtype == torch.bfloat16
    assert low.bias.dtype == torch.float32
    assert torch.equal(low.bias, exact.bias)
    assert "bias" in dict(low.named_buffers())
    for router in (exact, low):
        router.weight.data.copy_(torch.eye(3, 4))
        for _ in range(3):  # bfloat16 has no 301
            router(torch.tensor([[1.0, 0, 0, 0]]).expand(100, 4))
        router(torch.tensor([[0.0, 9, 0, 0]]))
    assert low.load.tolist() == exact.load.tolist() == [300, 1, 0]
    for router in (exact, low):
        router.update()
    assert torch.equal(low.bias, exact.bias)
    assert float(low.bias[0]) == pytest.approx(0.299, abs=1e-6)  # bfloat16 would stay at 0.3008
    assert low.to("meta").bias.is_meta


@pytest.mark.parametrize("name", every_router())
def test_settings_make_the_same_router(name):
    router = every_router()[name]
    described = json.loads(json.dumps(router.settings()))
    again = make_router(described, 8, 6)
    assert type(again) is type(router)
    assert again.settings() == router.settings()
    again.load_state_dict(router.bind(8, 6).state_dict())


def test_every_name_and_preset_is_tested_and_made():
    tested = {router.name for router in every_router().values()}
    own = {
        n
        for n, cls in ROUTERS.items()
        if cls.__module__.rpartition(".")[2]
        in ("routers", "assignment_routers", "fixed_routers", "soft_routers")
    }
    assert own <= tested
    for preset in PRESETS:
        assert make_router(preset, 8, 6).n_experts == 6


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(k=0), "k must be at least 1"),
        (lambda: TopK(k=7).bind(4, 6), "k is 7, but there are only 6"),
        (lambda: TopK(score="tanh"), "'softmax' or 'sigmoid'"),
        (lambda: TopK(noise="loud"), "'learned'"),
        (lambda: TopK(noise=-1.0), "negative"),
        (lambda: TopK(groups=4).bind(4, 6), "groups=4 does not divide 6"),
        (lambda: TopK(k=3, groups=3, groups_kept=2), "divide k"),
        (lambda: TopK(k=3, groups=3).bind(4, 6), "hold only 2"),
        (lambda: TopK(temperature=0.0), "temperature above 0"),
        (lambda: GShardTop2().bind(4, 1), "two experts"),
        (lambda: Sinkhorn(k=3).bind(4, 2), "k must be from 1 to 2"),
        (lambda: ExpertChoice(capacity_factor=0), "above 0"),
        (lambda: SoftMoE(slots=0), "slots must be at least 1"),
        (lambda: HashRouter().bind(4, 2), "vocabulary must be at least 1"),
        (lambda: DomainRouter(groups=[[0], []]).bind(4, 2), "at least one expert"),
        (lambda: TopK().bind(0, 4), "at least 1, got 0 and 4"),
        (lambda: PerceptronTopK(width=0).bind(4, 2), "width must be at least 1, got 0"),
        (lambda: make_router("top-q", 4, 2), "unknown router 'top-q'; there are: .*recurrent.*top"),
        (lambda: make_router("recurrent", 4, 2), r"spans the layers of a model: use it in to_moe"),
        (lambda: make_router({"name": "top-k", "q": 1}, 4, 2), "it accepts: k, score"),
        (lambda: make_router(TopK().bind(4, 3), 4, 2), "made for 3 experts, the layer has 2"),
        (lambda: make_router(3, 4, 2), "got int"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    "name", [n for n in every_router() if n not in ("random", "hash", "domain")]
)
def test_nan_is_refused(name):
    router = every_router()[name].bind(8, 6)
    with pytest.raises(DataError, match="not all finite"):
        router(torch.full((2, 8), torch.nan))
