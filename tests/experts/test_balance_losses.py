"""Balance losses against Megatron-core, vmoe, closed forms and finite differences."""

import json
import math
from pathlib import Path

import pytest
import torch

from bakeoff.errors import DataError
from bakeoff.experts.balance_losses import (
    LOSSES,
    AdaptiveCoefficient,
    DeviceBalance,
    DiverseGate,
    Importance,
    Load,
    MutualInformation,
    SelectorEntropy,
    SwitchBalance,
    ZLoss,
    make_loss,
)
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import DSelectK, NullExperts, Threshold, TopK, smooth_step

GOLDEN = json.loads((Path(__file__).parent / "mixture_of_experts_golden.json").read_text())


def golden_logits():
    j = torch.arange(16 * 6, dtype=torch.float32).reshape(16, 6)
    return torch.sin(1.7 * j) + 0.5 * torch.cos(0.31 * j * j) + torch.linspace(1, -1, 6)


def golden_routing(mask=None, **settings):
    router = TopK(k=2, **settings).bind(6, 6)
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    return router(golden_logits(), mask=mask)


MASK = torch.arange(16) < 11


def close(value, expected):
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)


def test_switch_equals_megatron():
    close(SwitchBalance(0.01)(golden_routing()), GOLDEN["megatron"]["switch_loss"])
    masked = golden_routing(MASK)
    close(SwitchBalance(0.01)(masked, MASK), GOLDEN["megatron"]["switch_loss_masked"])
    sigmoid = golden_routing(score="sigmoid")
    close(SwitchBalance(0.01)(sigmoid), GOLDEN["megatron"]["switch_loss_sigmoid"])


def test_z_loss_equals_megatron():
    close(ZLoss(0.001)(golden_routing()), GOLDEN["megatron"]["z_loss"])
    close(ZLoss(0.001)(golden_routing(MASK), MASK), GOLDEN["megatron"]["z_loss_masked"])


def test_losses_equal_vmoe():
    routing = golden_routing()
    close(SwitchBalance(1.0, first_choice=True)(routing), GOLDEN["vmoe"]["gshard_loss"])
    close(Importance(1.0)(routing), GOLDEN["vmoe"]["importance_loss"])
    j = torch.arange(16 * 6, dtype=torch.float32).reshape(16, 6)
    aux = {
        "clean_logits": golden_logits(),
        "noisy_logits": golden_logits() + 0.1 * torch.cos(3.3 * j),
        "noise_std": torch.full((16, 6), 0.125),
    }
    noisy = Routing(routing.logits, routing.probs, routing.indices, routing.weights, aux)
    close(Load(1.0)(noisy), GOLDEN["vmoe"]["load_loss"])


def by_hand(probs, indices):
    probs, indices = torch.tensor(probs), torch.tensor(indices)
    return Routing(probs.log(), probs, indices, torch.ones(indices.shape))


def test_switch_is_one_when_balanced_and_n_at_collapse():
    balanced = by_hand([[0.5, 0.5]] * 4, [[0], [1], [0], [1]])
    close(SwitchBalance(1.0)(balanced), 1.0)
    collapsed = by_hand([[1.0, 0.0]] * 4, [[0]] * 4)
    close(SwitchBalance(1.0)(collapsed), 2.0)


def test_device_balance_counts_groups_only():
    # Within its group each expert is used unevenly, the groups evenly.
    routing = by_hand([[0.5, 0.0, 0.3, 0.2]] * 4, [[0], [2], [0], [2]])
    close(DeviceBalance([[0, 1], [2, 3]], 1.0)(routing), 1.0)
    # Groups of one are the switch loss.
    close(DeviceBalance([[0], [1], [2], [3]], 1.0)(routing), float(SwitchBalance(1.0)(routing)))
    with pytest.raises(DataError, match="each of the 4 experts once"):
        DeviceBalance([[0, 1], [2]])(routing)


def test_importance_with_both_variances():
    routing = by_hand([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]], [[0], [0]])
    shares = [0.7, 0.15, 0.15]
    squares = sum((s - 1 / 3) ** 2 for s in shares)
    close(Importance(1.0)(routing), squares / 3 * 9)
    close(Importance(1.0, sample=True)(routing), squares / 2 * 9)


def test_mutual_information_in_closed_form():
    sure = by_hand([[1.0, 0.0], [0.0, 1.0]], [[0], [1]])
    close(MutualInformation(1.0)(sure), -math.log(2))
    undecided = by_hand([[0.5, 0.5], [0.5, 0.5]], [[0], [1]])
    close(MutualInformation(1.0)(undecided), 0.0)
    collapsed = by_hand([[1.0, 0.0], [1.0, 0.0]], [[0], [0]])
    close(MutualInformation(1.0)(collapsed), 0.0)


def test_load_falls_as_the_noisy_choice_evens_out():
    torch.manual_seed(0)
    router = TopK(k=2, noise=1.0, seed=0).bind(4, 6)
    even = Load(1.0)(router(torch.randn(4000, 4)))
    with torch.no_grad():
        router.weight[0] += 5.0
    uneven = Load(1.0)(router(torch.randn(4000, 4).abs()))
    assert float(even.detach()) < 0.05 < float(uneven.detach())
    with pytest.raises(DataError, match="adds noise"):
        Load()(golden_routing())


def test_null_experts_share_their_load():
    router = NullExperts(k=1, null=2, renorm=False).bind(4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    # Loads 1, 1, 2, 0: balanced, because the nulls' average is 1.
    hidden = torch.eye(4)[[0, 1, 2, 2]] * 5
    routing = router(hidden)
    expected = 4 * (0.25 * routing.probs.mean(dim=0)).sum()
    close(SwitchBalance(1.0)(routing), float(expected.detach()))


def test_selector_entropy_in_closed_form():
    router = DSelectK(k=1, gamma=1.0).bind(1, 3)
    with torch.no_grad():
        router.bit_weight.copy_(torch.tensor([[0.2], [-0.1]]))
    routing = router(torch.ones(2, 1))
    a, b = (float(smooth_step(torch.tensor(x), 1.0)) for x in (0.2, -0.1))
    chances = [(1 - a) * (1 - b), a * (1 - b), (1 - a) * b]  # the fourth code has no expert
    expected = -sum(c * math.log(c) for c in chances) + 1 / sum(chances) - 1
    close(SelectorEntropy(1.0)(routing), expected)
    with pytest.raises(DataError, match="dselect-k"):
        SelectorEntropy()(golden_routing())


def test_diverse_gate_is_zero_for_orthogonal_directions():
    router = Threshold().bind(3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3) * 4)
    loss = DiverseGate(1.0)(router(torch.randn(2, 3)))
    close(loss, 0.0)
    loss.backward()
    assert torch.isfinite(router.weight.grad).all()
    with torch.no_grad():
        router.weight[1] = router.weight[0]
    close(DiverseGate(1.0)(router(torch.randn(2, 3))), 2.0)
    with pytest.raises(DataError, match="threshold"):
        DiverseGate()(golden_routing())


def test_adaptive_coefficient_follows_the_drop_rate():
    loss = AdaptiveCoefficient(coefficient=0.01, gain=0.2, decay=0.9)
    routing = golden_routing()
    close(loss(routing), 0.01 * float(SwitchBalance(1.0)(routing).detach()))
    loss.observe(0.5)
    assert loss.coefficient == pytest.approx(0.9 * 0.01 + 0.1 * 0.2 * 0.5)


def gradient_of(loss, router, hidden, mask=None):
    router.zero_grad()
    loss(router(hidden, mask=mask), mask).backward()
    return router.weight.grad


@pytest.mark.parametrize(
    "loss", [SwitchBalance(1.0), ZLoss(1.0), Importance(1.0), MutualInformation(1.0)]
)
def test_gradients_equal_finite_differences(loss):
    torch.manual_seed(0)
    router = TopK(k=2).bind(5, 4).double()
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(9, 5, dtype=torch.float64)
    gradient = gradient_of(loss, router, hidden)
    direction = torch.randn_like(router.weight)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            router.weight.add_(step * direction)
            values.append(float(loss(router(hidden))))
    slope = (values[0] - values[1]) / 2e-6
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "device-balance"])
def test_padding_counts_nowhere(name):
    if LOSSES[name].__module__ != SwitchBalance.__module__:
        pytest.skip("tested where it is made")
    torch.manual_seed(0)
    loss = make_loss(name)
    router = {
        "load": TopK(noise=1.0),
        "selector-entropy": DSelectK(),
        "diverse-gate": Threshold(),
    }.get(name, TopK()).bind(5, 4)
    hidden = torch.randn(6, 5)
    mask = torch.tensor([True] * 6 + [False] * 3)
    padded = torch.cat([hidden, torch.full((3, 5), torch.nan)])
    routing = router(padded, mask=mask)
    per_token = {k: v[:6] if len(v) == 9 else v for k, v in routing.aux.items()}
    parts = (routing.logits, routing.probs, routing.indices, routing.weights)
    alone = Routing(*(part[:6] for part in parts), per_token)
    torch.testing.assert_close(loss(routing, mask), loss(alone, None))
    nothing = loss(router(padded, mask=torch.zeros(9, dtype=torch.bool)), mask & False)
    assert torch.isfinite(nothing)


def test_loads_carry_no_gradient():
    routing = golden_routing()
    (gradient,) = torch.autograd.grad(SwitchBalance(1.0)(routing), routing.probs)
    share = torch.bincount(routing.indices.flatten(), minlength=6) / 32
    torch.testing.assert_close(gradient, (6 * share / 16).expand(16, 6))


def test_names_and_bad_settings():
    assert make_loss({"name": "switch-balance", "coefficient": 0.5}).coefficient == 0.5
    with pytest.raises(DataError, match=r"unknown loss 'entropy'; there are: .*z-loss"):
        make_loss("entropy")
    with pytest.raises(DataError, match="it accepts: coefficient"):
        make_loss({"name": "z-loss", "strength": 1})
    with pytest.raises(DataError, match="got int"):
        make_loss(3)
