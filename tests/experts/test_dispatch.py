"""Dispatchers against a loop over tokens, with gradients; capacity against vmoe and Megatron."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bakeoff.errors import DataError
from bakeoff.experts.capacity import expert_capacity, seats, within_capacity
from bakeoff.experts.dispatch import DISPATCHERS, dispatch
from bakeoff.experts.expert_bank import ModuleExperts
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.grouped import ACTIVATIONS, Workspace, grouped_linear
from bakeoff.experts.lora_experts import LoRAExperts
from bakeoff.experts.protocol import Routing

GOLDEN = json.loads((Path(__file__).parent / "mixture_of_experts_golden.json").read_text())


def assignments(n_tokens, n_experts, k, seed, holes=True):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_tokens, n_experts, generator=generator)
    scores[:, n_experts // 2] -= 2.0  # an expert that nobody chooses
    indices = scores.topk(k, dim=1).indices
    if holes:
        indices[torch.rand(indices.shape, generator=generator) < 0.2] = -1
        indices[0] = -1
    weights = torch.rand(n_tokens, k, generator=generator, dtype=torch.float64)
    return indices, weights


def token_by_token(hidden, indices, weights, experts):
    """The definition, one token at a time."""
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros(experts.n_out, dtype=hidden.dtype)
        for choice in range(indices.shape[1]):
            expert = int(indices[token, choice])
            if 0 <= expert < experts.n_experts:
                out = experts.one(expert, hidden[token : token + 1])[0]
                total = total + weights[token, choice] * out
        rows.append(total)
    return torch.stack(rows)


BANKS = {
    **{
        f"{name}-{'gated' if gated else 'plain'}": (
            lambda name=name, gated=gated: FeedForwardExperts(5, 6, 7, name, gated)
        )
        for name in ACTIVATIONS
        for gated in (True, False)
    },
    "bias": lambda: FeedForwardExperts(5, 6, 7, "gelu", gated=False, bias=True),
    "other activation": lambda: FeedForwardExperts(5, 6, 7, "tanh"),
    "lora": lambda: LoRAExperts(5, 6, n_out=4, rank=3),
    "modules": lambda: ModuleExperts([nn.Linear(6, 6) for _ in range(5)], 6),
}


@pytest.mark.parametrize("how", DISPATCHERS)
@pytest.mark.parametrize("kind", BANKS)
def test_values_and_gradients_equal_the_definition(how, kind):
    torch.manual_seed(0)
    experts = BANKS[kind]().double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    indices, weights = assignments(11, 5, 3, seed=1)
    weights.requires_grad_()
    given_gradient = torch.randn(11, experts.n_out, dtype=torch.float64)
    inputs = [hidden, weights, *experts.parameters()]

    expected = token_by_token(hidden, indices, weights, experts)
    expected_gradients = torch.autograd.grad(
        expected, inputs, given_gradient, materialize_grads=True
    )
    result = dispatch(hidden, indices, weights, experts, how)
    gradients = torch.autograd.grad(result, inputs, given_gradient)

    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(0, 40),
    n_experts=st.integers(1, 9),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_dispatchers_agree_in_float32(n_tokens, n_experts, k, seed):
    k = min(k, n_experts)
    torch.manual_seed(seed)
    experts = FeedForwardExperts(n_experts, 8, 16)
    indices, weights = assignments(n_tokens + 1, n_experts, k, seed)
    indices, weights = indices[:n_tokens], weights[:n_tokens].float()
    hidden = torch.randn(n_tokens, 8)
    results = [dispatch(hidden, indices, weights, experts, how) for how in DISPATCHERS]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", DISPATCHERS)
def test_null_experts_and_holes_add_nothing(how):
    experts = FeedForwardExperts(3, 4, 8)
    hidden = torch.randn(2, 4)
    hidden[1] = torch.nan  # padding may hold anything
    indices = torch.tensor([[0, 3, 7], [-1, -1, -1]])
    out = dispatch(hidden, indices, torch.ones(2, 3), experts, how)
    torch.testing.assert_close(out[0], experts.one(0, hidden[:1])[0], rtol=1e-5, atol=1e-6)
    assert out[1].tolist() == [0.0] * 4


def test_every_expert_has_a_gradient_even_without_tokens():
    for how in DISPATCHERS:
        experts = FeedForwardExperts(4, 4, 8)
        indices = torch.zeros(3, 1, dtype=torch.int64)
        dispatch(torch.randn(3, 4), indices, torch.ones(3, 1), experts, how).sum().backward()
        assert experts.w_in.grad is not None
        assert experts.w_in.grad[0].abs().sum() > 0
        assert experts.w_in.grad[1:].abs().sum() == 0


def test_order_of_tokens_does_not_matter():
    experts = FeedForwardExperts(5, 8, 16)
    indices, weights = assignments(30, 5, 2, seed=3)
    hidden, order = torch.randn(30, 8), torch.randperm(30)
    whole = dispatch(hidden, indices, weights.float(), experts)
    moved = dispatch(hidden[order], indices[order], weights.float()[order], experts)
    torch.testing.assert_close(moved, whole[order], rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    experts = FeedForwardExperts(64, 8, 16).bfloat16()
    hidden = torch.randn(20, 8).bfloat16()
    indices = torch.arange(64).expand(20, 64)
    weights = torch.rand(20, 64)
    exact = sum(experts.one(i, hidden).double() * weights[:, i, None].double() for i in range(64))
    for how in ("sort", "loop"):
        out = dispatch(hidden, indices, weights, experts, how)
        assert out.dtype == torch.bfloat16
        # One rounding at the end, relative 2^-8, whatever the number of terms.
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


def test_autocast_computes_in_its_dtype():
    experts = FeedForwardExperts(4, 8, 16)
    indices, weights = assignments(10, 4, 2, seed=0)
    hidden = torch.randn(10, 8)
    plain = dispatch(hidden, indices, weights.float(), experts)
    with torch.autocast("cpu", torch.bfloat16):
        low = dispatch(hidden, indices, weights.float(), experts)
    assert low.dtype == torch.float32
    assert 0 < (low - plain).abs().max() < 0.05
    low.sum().backward()
    assert experts.w_in.grad.dtype == torch.float32


def test_kept_gradients_are_never_overwritten():
    # 1.5 MiB of weights, so that their gradients live in the workspace.
    experts = FeedForwardExperts(3, 128, 512)
    hidden, indices = torch.randn(6, 128), torch.tensor([[0], [1], [2], [0], [1], [2]])

    def gradient(scale):
        out = dispatch(hidden * scale, indices, torch.ones(6, 1), experts)
        return torch.autograd.grad(out.square().sum(), experts.w_in)[0]

    first = gradient(1.0)
    copy_of_first, address = first.clone(), first.data_ptr()
    second = gradient(2.0)
    assert torch.equal(first, copy_of_first)
    assert second.data_ptr() != address
    del first, second
    third = gradient(3.0)
    expected = torch.autograd.grad(
        dispatch(hidden * 3, indices, torch.ones(6, 1), experts, "loop").square().sum(),
        experts.w_in,
    )[0]
    torch.testing.assert_close(third, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_used_again_and_gradients_accumulate():
    experts = FeedForwardExperts(3, 128, 512)
    hidden, indices = torch.randn(6, 128), torch.tensor([[0], [1], [2], [0], [1], [2]])
    addresses = set()
    for _ in range(4):
        experts.zero_grad()
        dispatch(
            hidden, indices, torch.ones(6, 1), experts, workspace=experts.workspace
        ).sum().backward()
        addresses.add(experts.w_in.grad.data_ptr())
    assert len(addresses) <= 2
    once = experts.w_in.grad.clone()
    dispatch(hidden, indices, torch.ones(6, 1), experts).sum().backward()
    torch.testing.assert_close(experts.w_in.grad, 2 * once)


def test_workspace_is_empty_in_copies():
    workspace = Workspace()
    workspace.empty((2**19,), torch.zeros(1))
    assert len(workspace._storages) == 1
    assert copy.deepcopy(workspace)._storages == []


def test_grouped_linear_against_slices():
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(7, 3), torch.randn(3, 4, 3), torch.randn(3, 4)
    out = grouped_linear(rows, torch.tensor([2, 0, 5]), weight, bias)
    expected = torch.cat([rows[:2] @ weight[0].T + bias[0], rows[2:] @ weight[2].T + bias[2]])
    torch.testing.assert_close(out, expected)


def test_unknown_dispatch_lists_the_known():
    with pytest.raises(DataError, match="sort, loop, einsum, batched"):
        dispatch(
            torch.zeros(1, 4),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
            FeedForwardExperts(2, 4, 4),
            "magic",
        )


# Capacity


def golden_logits():
    j = torch.arange(16 * 6, dtype=torch.float32).reshape(16, 6)
    return torch.sin(1.7 * j) + 0.5 * torch.cos(0.31 * j * j) + torch.linspace(1, -1, 6)


def top2(renorm):
    logits = golden_logits()
    probs = logits.softmax(dim=1)
    weights, indices = probs.topk(2, dim=1)
    if renorm:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return Routing(logits, probs, indices, weights)


def table(routing, kept):
    full = torch.zeros_like(routing.probs)
    return full.scatter_add_(1, routing.indices, routing.weights * kept)


@pytest.mark.parametrize(
    ("policy", "source", "name", "renorm"),
    [
        ("probs", "megatron", "drop_probs", True),
        ("position", "vmoe", "drop_position", False),
        ("priority", "vmoe", "drop_priority", False),
    ],
)
def test_drops_equal_the_reference_libraries(policy, source, name, renorm):
    routing = top2(renorm)
    capacity = expert_capacity(16, 6, k=2, factor=0.7)
    kept = within_capacity(routing, capacity, policy)
    expected = torch.tensor(GOLDEN[source][name])
    assert (expected > 0).sum() < 32  # the reference did drop some
    torch.testing.assert_close(table(routing, kept), expected, rtol=1e-5, atol=1e-6)


def test_policies_differ_where_it_matters():
    kept = [
        tuple(within_capacity(top2(False), 4, p).flatten().tolist())
        for p in ("probs", "position", "priority")
    ]
    assert len(set(kept)) == 3


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(1, 30),
    policy=st.sampled_from(["probs", "position", "priority", "random"]),
    capacity=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_seats_are_a_queue(n_tokens, policy, capacity, seed):
    indices, weights = assignments(n_tokens, 6, 2, seed)
    zeros = torch.zeros(n_tokens, 6)
    routing = Routing(zeros, zeros, indices, weights.float())
    place = seats(routing, policy)
    kept = within_capacity(routing, capacity, policy)
    for expert in range(6):
        queue = sorted(place[indices == expert].tolist())
        assert queue == list(range(len(queue)))
        assert int(kept[indices == expert].sum()) == min(capacity, len(queue))
        if policy == "probs" and 0 < capacity < len(queue):
            mine = indices == expert
            assert weights[mine & kept].min() >= weights[mine & ~kept].max()
    assert (place[indices < 0] == -1).all()


def test_capacity_rounds_up_and_refuses_nothing():
    assert expert_capacity(10, 1, k=1, factor=1.1) == 11  # 1.1 * 10 is 11.000000000000002
    assert expert_capacity(16, 6, k=2, factor=0.7) == 4
    assert expert_capacity(16, 6, k=2, factor=0.7, multiple_of=8) == 8
    assert expert_capacity(1, 64, factor=1.0) == 1
    with pytest.raises(DataError, match="above 0"):
        expert_capacity(4, 2, factor=0.0)
    with pytest.raises(DataError, match="probs, position, priority, random"):
        seats(top2(True), "alphabet")


def test_random_drops_follow_their_generator():
    routing = top2(True)
    same = [
        within_capacity(routing, 2, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
