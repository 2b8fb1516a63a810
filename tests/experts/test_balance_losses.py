"""Balance losses against Megatron-core, vmoe, closed forms and finite differences."""

import copy
import json
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from bakeoff.errors import DataError
from bakeoff.experts.balance_losses import (
    LOSSES,
    AdaptiveCoefficient,
    DeviceBalance,
    DiverseGate,
    GlobalBalance,
    Importance,
    Load,
    MutualInformation,
    SelectorEntropy,
    SwitchBalance,
    ZLoss,
    load_fractions,
    make_loss,
)
from bakeoff.experts.global_balance import LoadBalancingLoss
from bakeoff.experts.mixture_of_experts import MoE, after_optimizer_step, moe_layers
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import DSelectK, NullExperts, Threshold, TopK, smooth_step
from bakeoff.experts.soft_routers import Dense

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


def test_importance_is_of_the_probabilities_without_noise():
    torch.manual_seed(0)
    router = TopK(k=2, noise=8.0, seed=0).bind(4, 6)
    hidden = torch.randn(9, 4)
    noisy, clean = router(hidden), copy.deepcopy(router).eval()(hidden)
    assert not torch.allclose(noisy.probs, clean.probs)
    close(Importance(1.0)(noisy), float(Importance(1.0)(clean).detach()))


def test_first_choices_are_counted_where_their_number_varies():
    torch.manual_seed(0)
    for router in (Threshold().bind(4, 6), DSelectK(gamma=0.1).bind(4, 6), Dense().bind(4, 6)):
        routing = router(torch.randn(50, 4))
        first = torch.bincount(routing.probs.argmax(dim=1), minlength=6) / 50
        assert torch.equal(load_fractions(routing, first_choice=True), first)


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


# Losses that other files make are tested there.
OWN = [name for name, made in LOSSES.items() if made.__module__ == SwitchBalance.__module__]


@pytest.mark.parametrize("name", [name for name in OWN if name != "device-balance"])
def test_padding_counts_nowhere(name):
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
    if name == "global-balance":  # other processes must not wait for a batch without tokens
        with pytest.raises(DataError, match="all tokens are padding"):
            loss(router(padded, mask=torch.zeros(9, dtype=torch.bool)), mask & False)
        return
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


# The loss over the global batch, as a layer's loss

SWITCH_LIKE = ["micro", "global"]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scope", SWITCH_LIKE)
def test_one_micro_batch_is_the_switch_loss_with_the_same_coefficient(k, scope):
    routing = TopK(k=k).bind(6, 6)(golden_logits(), mask=MASK)
    ours, theirs = GlobalBalance(0.3, scope), SwitchBalance(0.3)
    torch.testing.assert_close(ours(routing, MASK), theirs(routing, MASK))


def test_null_experts_count_as_in_the_switch_loss():
    torch.manual_seed(0)
    router = NullExperts(k=3, null=3).bind(5, 4)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(20, 5))
    for scope in SWITCH_LIKE:
        gradients = []
        for loss in (GlobalBalance(0.5, scope), SwitchBalance(0.5)):
            value = loss(routing)
            gradients.append(torch.autograd.grad(value, router.weight, retain_graph=True)[0])
        torch.testing.assert_close(*gradients)


def layer(aux, **settings):
    torch.manual_seed(0)
    return MoE(6, 4, {"name": "top-k", "k": 2}, width=8, aux=aux, **settings)


def micro_batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 6, generator=generator) + i for i in range(n)]


def test_a_layer_counts_over_its_micro_batches_until_its_update():
    moe = layer([{"name": "global-balance", "coef": 0.02}])
    by_hand = LoadBalancingLoss(4, 2, 0.02, accumulation_steps=3)
    for _ in range(2):  # two optimizer steps
        counts = torch.zeros(4)
        for x in micro_batches():
            moe(x)
            routing = moe.routing
            torch.testing.assert_close(moe.aux_loss, by_hand(routing.logits, routing.indices))
            counts += torch.bincount(routing.indices.flatten(), minlength=4)
            expected = 0.02 * 4 * (counts / counts.sum() * routing.probs.mean(dim=0)).sum()
            torch.testing.assert_close(moe.aux_loss, expected)
        assert torch.equal(moe.losses[0].fractions, counts / counts.sum())
        after_optimizer_step(moe)
        by_hand.reset()
        assert not moe.losses[0].fractions.any()
    after_first = moe.losses[0].fractions.clone()
    moe.eval()(micro_batches()[0])
    assert torch.equal(moe.losses[0].fractions, after_first)


def test_each_layer_has_its_own_counts():
    given = GlobalBalance(accumulation_steps=2)
    model = torch.nn.Sequential(layer([given]), layer([given]), layer(["global-balance"]))
    losses = [one.losses[0] for one in moe_layers(model).values()]
    assert len({id(each) for each in [given, *losses]}) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in micro_batches(2):
            model(x)
    assert given.fractions is None
    twin = copy.deepcopy(model)
    after_optimizer_step(twin)
    assert not twin[0].losses[0].fractions.any()
    assert losses[0].fractions.sum() == pytest.approx(1)
    with pytest.warns(UserWarning, match=r"3 micro-steps were .*after_optimizer_step"):
        model(micro_batches(1)[0])


@pytest.mark.parametrize("scope", ["sequence", "shuffle"])
def test_a_layer_tells_the_loss_its_sequences(scope):
    moe = layer([{"name": "global-balance", "scope": scope, "coef": 1.0, "seed": 3}])
    direct = LoadBalancingLoss(4, 2, 1.0, scope, seed=3)
    x = micro_batches(1)[0]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for given in (None, mask):
        moe(x, mask=given)
        shown = torch.ones_like(mask) if given is None else given
        expected = direct(moe.routing.logits, moe.routing.indices, shown)
        torch.testing.assert_close(moe.aux_loss, expected)
    if scope == "sequence":
        halves = []
        for i, kept in enumerate((slice(0, 5), slice(5, 8))):
            probs = moe.routing.probs[kept if i == 0 else slice(5, 8)]
            chosen = moe.routing.indices[kept].flatten()
            share = torch.bincount(chosen, minlength=4) / len(chosen)
            halves.append(4 * (share * probs.mean(dim=0)).sum())
        torch.testing.assert_close(moe.aux_loss, sum(halves) / 2)
    with pytest.raises(DataError, match="needs to know the sequences"):
        moe(x[0])
    wrapped = AdaptiveCoefficient({"name": "global-balance", "scope": scope, "coef": 1.0}, 0.5)
    outer = layer([wrapped])
    outer(x)
    assert math.isfinite(outer.aux_loss.detach())


def test_recomputation_counts_once():
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        moe = layer([{"name": "global-balance", "coef": 3.0}])
        for x in micro_batches(2):
            out = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
            (out.square().sum() + moe.aux_loss).backward()
        gradients.append(moe.router.weight.grad)
        assert moe.losses[0]._inner.counts.sum() == 2 * 10 * 2
    torch.testing.assert_close(*gradients)


def test_global_balance_is_described_and_copied():
    loss = GlobalBalance(0.5, "shuffle", sequences_per_group=2, seed=4)
    settings = json.loads(json.dumps(loss.settings()))
    assert make_loss(settings).settings() == settings
    assert settings["name"] == "global-balance"
    again = MoE.from_settings(json.loads(json.dumps(layer([loss]).settings())))
    assert again.losses[0].settings() == settings
    counted = GlobalBalance()
    counted(golden_routing())
    for twin in (copy.deepcopy(counted), pickle.loads(pickle.dumps(counted))):
        assert torch.equal(twin.fractions, counted.fractions)
        twin.reset()
        assert counted.fractions.any()
    with pytest.raises(DataError, match="counted 6 experts before, the routing has 4"):
        counted(TopK(k=2).bind(6, 4)(golden_logits()))
    for bad in ({"scope": "batch"}, {"coef": -1.0}, {"micro_share": 0.1, "scope": "micro"}):
        with pytest.raises(DataError):
            make_loss({"name": "global-balance", **bad})
    with pytest.raises(DataError, match="it accepts: coef, scope"):
        make_loss({"name": "global-balance", "coefficient": 1.0})
    with pytest.raises(DataError, match=r"torch.distributed is not initialised"):
        GlobalBalance(group="a group")
