"""The layer: degenerate cases with a known answer, padding, causality, statistics, bad input."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.attention_experts import MixtureOfAttentionHeads
from bakeoff.experts.balance_losses import GlobalBalance
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.lora_experts import LoRAExperts
from bakeoff.experts.mixture_of_experts import (
    MoE,
    after_optimizer_step,
    aux_loss,
    moe_layers,
)
from bakeoff.experts.routers import TopK, make_router

ROUTERS = [
    "top-k",
    "switch",
    "noisy-top-k",
    "v-moe",
    "loss-free",
    {"name": "top-k", "groups": 2, "groups_kept": 2},
    "cosine",
    "attention",
    "null-experts",
    "gshard",
    "threshold",
    "dselect-k",
    "base",
    "sinkhorn",
    "expert-choice",
    {"name": "hash", "vocabulary": 50},
    "random",
    "domain",
    "dense",
    {"name": "soft", "slots": 2},
    "merged",
]


def name_of(router):
    return router if isinstance(router, str) else router["name"]


def extra(shape):
    ids = torch.arange(math.prod(shape)).reshape(shape)
    return {"token_ids": ids % 50, "domains": ids % 4}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_one_expert_equals_the_dense_layer():
    for router in ({"name": "top-k", "k": 1, "renorm": False}, "dense", "merged"):
        moe = MoE(8, 1, router, width=16)
        x = torch.randn(2, 5, 8, requires_grad=True)
        gate, value = (x @ moe.experts.w_in[0].T).chunk(2, dim=-1)
        expected = (nn.functional.silu(gate) * value) @ moe.experts.w_out[0].T
        torch.testing.assert_close(moe(x), expected)
        ours = torch.autograd.grad(moe(x).square().sum(), [x, moe.experts.w_in])
        theirs = torch.autograd.grad(expected.square().sum(), [x, moe.experts.w_in])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_all_experts_equal_the_dense_sum():
    sparse = MoE(8, 4, TopK(k=4), width=16)
    x = torch.randn(10, 8)
    probs = (x @ sparse.router.weight.T).softmax(dim=1)
    expected = sum(probs[:, i, None] * sparse.experts.one(i, x) for i in range(4))
    torch.testing.assert_close(sparse(x), expected)


def test_identical_experts_make_the_router_irrelevant():
    for router in ("top-k", "noisy-top-k", "cosine", "random", "threshold", "dense"):
        moe = MoE(8, 4, router, width=16)
        with torch.no_grad():
            for parameter in moe.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
        x = torch.randn(10, 8)
        torch.testing.assert_close(moe(x), moe.experts.one(0, x), rtol=1e-4, atol=1e-6)


def test_equals_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    moe = MoE(16, 6, TopK(k=2), width=24)
    moe.router.weight.data.copy_(theirs.gate.weight)
    moe.experts.w_in.data.copy_(theirs.experts.gate_up_proj)
    moe.experts.w_out.data.copy_(theirs.experts.down_proj)
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(moe(x), theirs(x), rtol=1e-5, atol=1e-5)
    moe(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for mine, other in (
        (moe.router.weight, theirs.gate.weight),
        (moe.experts.w_in, theirs.experts.gate_up_proj),
        (moe.experts.w_out, theirs.experts.down_proj),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_soft_moe_against_its_definition():
    moe = MoE(8, 3, {"name": "soft", "slots": 2}, width=16)
    x = torch.randn(2, 5, 8)
    out = moe(x)
    phi = moe.router.slot_vectors.reshape(8, 6)
    for sequence in range(2):
        unit = nn.functional.normalize(x[sequence], dim=1)
        logits = unit @ nn.functional.normalize(phi, dim=0) * moe.router.scale
        slots = logits.softmax(dim=0).T @ x[sequence]
        results = torch.cat([moe.experts.one(i, slots[2 * i : 2 * i + 2]) for i in range(3)])
        expected = logits.softmax(dim=1) @ results
        torch.testing.assert_close(out[sequence], expected, rtol=1e-4, atol=1e-5)


def test_merged_experts_against_their_definition():
    moe = MoE(8, 3, "merged", width=16)
    modules = MoE(8, [nn.Linear(8, 8) for _ in range(3)], "merged")
    x = torch.randn(2, 5, 8)
    for sequence in range(2):
        weights = (x[sequence].mean(dim=0) @ moe.router.weight.T).softmax(0)
        mean = FeedForwardExperts(1, 8, 16)
        mean.w_in.data = torch.einsum("n,noi->oi", weights, moe.experts.w_in)[None]
        mean.w_out.data = torch.einsum("n,noi->oi", weights, moe.experts.w_out)[None]
        torch.testing.assert_close(moe(x)[sequence], mean.one(0, x[sequence]), rtol=1e-4, atol=1e-6)
        weights = (x[sequence].mean(dim=0) @ modules.router.weight.T).softmax(0)
        expected = sum(w * e(x[sequence]) for w, e in zip(weights, modules.experts.experts))  # noqa: B905
        torch.testing.assert_close(modules(x)[sequence], expected, rtol=1e-4, atol=1e-6)


def test_shared_experts_are_added():
    moe = MoE(8, 4, width=16, shared=2)
    assert moe.shared.width == 32
    x = torch.randn(5, 8)
    plain = copy.deepcopy(moe)
    plain.shared = None
    torch.testing.assert_close(moe(x), plain(x) + moe.shared.one(0, x))
    lora = MoE(8, LoRAExperts(4, 8, rank=2), shared=nn.Linear(8, 8))
    assert torch.equal(lora(x), lora.shared(x))


def test_capacity_drops_to_the_residual():
    moe = MoE(8, 4, {"name": "top-k", "k": 1, "renorm": False}, width=16, capacity=1.0)
    with torch.no_grad():
        moe.router.weight.zero_()  # all tie: everyone wants expert 0
    x = torch.randn(12, 8)
    out = moe(x)
    stats = moe.stats()
    assert stats.drop_rate == pytest.approx(9 / 12)  # 3 seats
    assert stats.unrouted == pytest.approx(9 / 12)
    assert stats.load == (1.0, 0.0, 0.0, 0.0)
    assert stats.max_over_mean == 4.0
    assert stats.entropy == pytest.approx(math.log(4))
    assert int((out == 0).all(dim=1).sum()) == 9
    # Survivors keep their weight of 1/4.
    kept = (out != 0).any(dim=1)
    torch.testing.assert_close(out[kept], 0.25 * moe.experts.one(0, x[kept]))
    # The balance loss sees the load before drops.
    loss = moe.losses[0](moe.routing)
    assert float(loss.detach()) == pytest.approx(0.01)


def test_capacity_differs_in_evaluation():
    moe = MoE(8, 4, "switch", width=16, capacity=(0.5, 4.0))
    x = torch.randn(40, 8)
    moe(x)
    assert moe.stats().drop_rate > 0.4
    moe.eval()(x)
    assert moe.stats().drop_rate == 0.0


def test_null_experts_have_no_capacity():
    moe = MoE(8, 2, {"name": "null-experts", "k": 1, "null": 2}, width=4, capacity=0.1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0
    assert moe(torch.ones(20, 8)).abs().sum() == 0
    assert moe.stats().drop_rate == 0.0


@pytest.mark.parametrize("router", ROUTERS, ids=name_of)
def test_padding_is_zero_and_changes_nothing(router):
    moe = MoE(8, 4, router, width=16).eval()
    if name_of(router) == "random":
        moe.router.seed = None
    x = torch.randn(2, 6, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    dirty = x.clone()
    dirty[~mask] = torch.nan
    torch.manual_seed(1)
    clean = moe(x, mask, **extra((2, 6)))
    torch.manual_seed(1)
    out = moe(dirty, mask, **extra((2, 6)))
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out, clean)
    assert moe.stats().tokens == 7


@pytest.mark.parametrize("router", ROUTERS, ids=name_of)
def test_trains_and_every_parameter_has_a_gradient(router):
    moe = MoE(8, 4, router, width=16, shared=1)
    x = torch.randn(3, 20, 8, requires_grad=True)
    (moe(x, **extra((3, 20))).square().sum() + moe.aux_loss).backward()
    assert torch.isfinite(x.grad).all()
    without = [n for n, p in moe.named_parameters() if p.grad is None]
    assert without == []
    after_optimizer_step(moe)


@pytest.mark.parametrize("router", ROUTERS, ids=name_of)
def test_settings_and_weights_make_the_same_layer(router):
    moe = MoE(8, 4, router, width=16, shared=1, scale=1.5)
    settings = json.loads(json.dumps(moe.settings()))
    again = MoE.from_settings(settings)
    again.load_state_dict(moe.state_dict())
    x = torch.randn(2, 6, 8)
    if name_of(router) != "random":
        assert torch.equal(again.eval()(x, **extra((2, 6))), moe.eval()(x, **extra((2, 6))))
    assert again.settings() == moe.settings()


def test_results_do_not_depend_on_batch_mates():
    for router in ("top-k", "loss-free", "cosine", "threshold", "dense", "soft", "merged"):
        moe = MoE(8, 4, router, width=16).eval()
        x = torch.randn(3, 6, 8)
        alone = torch.cat([moe(row[None]) for row in x])
        torch.testing.assert_close(moe(x), alone, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    moe = MoE(8, 4, "noisy-top-k", width=16)
    x = torch.randn(9, 8, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        moe.zero_grad()
        torch.manual_seed(5)
        out = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
        (out.square().sum() + moe.aux_loss).backward()
        gradients.append(moe.router.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_losses_that_checkpointing_cuts_off_are_refused(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    moe = MoE(8, 4, width=16)
    x = torch.randn(9, 8, requires_grad=True)
    checkpoint(moe, x, use_reentrant=use_reentrant)
    if not use_reentrant:
        aux_loss(moe).backward()
        assert moe.router.weight.grad.abs().sum() > 0
        return
    with pytest.raises(ModelError, match="use_reentrant"):
        aux_loss(moe)
    with torch.no_grad():  # to look at them is not to train
        assert float(aux_loss(moe)) > 0
    moe.router.requires_grad_(False)  # then nothing is lost
    assert float(aux_loss(moe)) > 0
    fixed = MoE(8, 4, "random", width=16)
    fixed(x)
    assert float(aux_loss(fixed)) > 0


def test_capacity_of_domain_experts_is_for_one_choice():
    moe = MoE(8, 2, "domain", width=4, capacity=1.0)
    moe(torch.randn(10, 8), domains=torch.tensor([0] * 8 + [1] * 2))
    assert moe.stats().drop_rate == pytest.approx(0.3)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": TopK(k=2, noise=1.0, seed=0)},
        {"router": {"name": "random", "seed": 0}},
        {"router": TopK(k=2), "capacity": 1.0, "drop": "random", "seed": 0},
    ],
)
def test_a_seed_that_recomputation_cannot_repeat_is_refused(settings):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(9, 8, requires_grad=True)
    out = checkpoint(MoE(8, 4, width=16, **copy.deepcopy(settings)), x, use_reentrant=False)
    with pytest.raises(ModelError, match="seed=None"):
        out.sum().backward()
    if "capacity" in settings:
        settings = {**settings, "seed": None}
    else:
        settings = {"router": {**make_router(settings["router"], 8, 4).settings(), "seed": None}}
    moe, gradients = MoE(8, 4, width=16, **settings), []
    for recompute in (False, True):
        moe.zero_grad()
        torch.manual_seed(5)
        out = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
        out.square().sum().backward()
        gradients.append(moe.experts.w_in.grad.clone())
    torch.testing.assert_close(*gradients)


def test_aux_loss_is_the_sum_over_layers_and_only_in_training():
    model = nn.Sequential(MoE(8, 4, width=8), MoE(8, 4, width=8, aux=["z-loss"]))
    model(torch.randn(5, 8))
    layers = list(moe_layers(model).values())
    expected = sum(loss(m.routing) for m in layers for loss in m.losses)
    torch.testing.assert_close(aux_loss(model), expected)
    model.eval()(torch.randn(5, 8))
    assert float(aux_loss(model)) == 0.0
    with pytest.raises(DataError, match="no MoE layer"):
        aux_loss(nn.Linear(2, 2))


def test_parameter_counts():
    moe = MoE(8, 4, TopK(k=2), width=16, shared=1)
    expert, router = 3 * 8 * 16, 4 * 8
    assert moe.parameter_counts() == (5 * expert + router, 3 * expert + router)
    nulls = MoE(8, 4, {"name": "null-experts", "k": 4, "null": 4}, width=16)
    assert nulls.parameter_counts() == (4 * expert + 2 * router, 2 * expert + 2 * router)


def test_copies_and_saves_after_a_forward_pass():
    moe = MoE(8, 4, width=16)
    moe(torch.randn(5, 8))
    twin = copy.deepcopy(moe)
    assert twin.routing is None
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), moe(x))


def test_converts_dtype():
    moe = MoE(8, 4, width=16).to(torch.bfloat16)
    out = moe(torch.randn(5, 8).bfloat16())
    assert out.dtype == torch.bfloat16
    assert moe.routing.logits.dtype == torch.float32


def test_future_tokens_are_refused_or_warned_of():
    for router in ("expert-choice", "soft", "merged"):
        with pytest.raises(DataError, match="looks at later tokens"):
            MoE(8, 4, router, causal=True)
    with pytest.warns(UserWarning, match="in training"):
        MoE(8, 4, "base", causal=True)
    with pytest.warns(UserWarning, match="whether an earlier one is dropped"):
        MoE(8, 4, "top-k", causal=True, capacity=1.0, drop="priority")
    MoE(8, 4, "switch", causal=True, capacity=1.0, drop="position")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoE(8, 2, TopK(k=3)), "k is 3, but there are only 2"),
        (lambda: MoE(8, 4, "nearest"), "unknown router 'nearest'"),
        (lambda: MoE(8, 4, aux=["nothing"]), "unknown loss 'nothing'"),
        (lambda: MoE(8, 4, dispatch="fly"), "sort, loop"),
        (lambda: MoE(8, 4, drop="last"), "probs, position"),
        (lambda: MoE(8, 4, capacity=0.0), "all tokens would be dropped"),
        (lambda: MoE(8, 4, "soft", capacity=1.0), "sets each expert's load itself"),
        (lambda: MoE(8, 4, "expert-choice", capacity=1.0), "sets each expert's load itself"),
        (lambda: MoE(8, 4, "threshold", capacity=1.0), "Threshold has no fixed one"),
        (lambda: MoE(8, 4, "dselect-k", capacity=1.0), "DSelectK has no fixed one"),
        (lambda: MoE(8, 4, "dense", capacity=1.0), "Dense has no fixed one"),
        (lambda: MoE(8, []), "at least one torch.nn.Module"),
        (lambda: MoE(8, 0), "at least 1, got 0"),
        (lambda: MoE(8, FeedForwardExperts(2, 4)), "the experts take 4 features"),
        (lambda: MoE(8, 4, activation="sine"), "unknown activation 'sine'"),
        (lambda: MoE(8, [nn.Linear(8, 8)], "dense", shared=1), "shared must be a module"),
        (lambda: MoE(8, 4)(torch.zeros(3, 5)), r"\(\.\.\., 8\)"),
        (lambda: MoE(8, 4)(torch.zeros(3, 8), torch.ones(4).bool()), r"mask must be \(3,\)"),
        (lambda: MoE(8, 4)(torch.full((3, 8), torch.nan)), "not all finite"),
        (lambda: MoE(8, 4).stats(), "before the first forward"),
        (lambda: MoE(8, [nn.Linear(8, 8)], "dense").settings(), "cannot be saved"),
        (
            lambda: MoE(8, LoRAExperts(2, 8), "merged", aux=[lambda r, m: 0]).settings(),
            "no settings",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_padding_alone_gives_zeros():
    for router in ROUTERS:
        moe = MoE(8, 4, router, width=16)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        out = moe(torch.randn(2, 3, 8), mask, **extra((2, 3)))
        assert out.abs().sum() == 0
        if moe.aux_loss is not None:
            assert torch.isfinite(moe.aux_loss)


# Attention heads as experts


def attention_by_hand(layer, hidden, mask):
    """Token by token, head by head."""
    out = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        keys, values = layer.key(hidden[b]), layer.value(hidden[b])
        probs = (hidden[b] @ layer.router.weight.T).softmax(dim=1)
        for t in range(hidden.shape[1]):
            if not mask[b, t]:
                continue
            weights, heads = probs[t].topk(layer.router.k)
            visible = mask[b] & (torch.arange(hidden.shape[1]) <= t if layer.causal else True)
            for weight, head in zip(weights / weights.sum(), heads, strict=True):
                scores = keys[visible] @ (layer.query[head] @ hidden[b, t])
                attended = (scores / layer.head_dim**0.5).softmax(0) @ values[visible]
                out[b, t] += weight * (layer.output[head] @ attended)
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_attention_heads_against_the_definition(causal):
    layer = MixtureOfAttentionHeads(8, n_experts=5, head_dim=4, router=TopK(k=3), causal=causal)
    hidden = torch.randn(2, 6, 8)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    hidden[~mask] = torch.nan
    out = layer(hidden, mask)
    expected = attention_by_hand(layer, hidden.nan_to_num(), mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (out.square().sum() + layer.aux_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_attention_heads_have_losses_of_their_own_and_are_updated():
    loss = GlobalBalance(coef=1.0)
    router = TopK(k=2, score="sigmoid", bias_rate=0.1)
    one, other = (
        MixtureOfAttentionHeads(8, 4, 4, router=copy.deepcopy(router), aux=[loss]) for _ in range(2)
    )
    for _ in range(2):
        one(torch.randn(2, 6, 8))
    other(torch.randn(2, 3, 8))
    assert [int(x.losses[0]._inner.counts.sum()) for x in (one, other)] == [48, 12]
    one.update()
    assert one.losses[0].fractions.sum() == 0
    assert one.router.bias.abs().sum() > 0
    each = MixtureOfAttentionHeads(
        8, 4, 4, router=TopK(k=2), aux=[{"name": "global-balance", "scope": "sequence"}]
    )
    each(torch.randn(2, 6, 8), torch.ones(2, 6).bool())
    assert math.isfinite(each.aux_loss.detach())


def test_attention_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="later tokens"):
        MixtureOfAttentionHeads(8, 4, 4, router="expert-choice")
    for router in ("threshold", "dselect-k"):
        with pytest.raises(DataError, match="no fixed number"):
            MixtureOfAttentionHeads(8, 4, 4, router=router)
    with pytest.raises(DataError, match=r"\(B, L, 8\)"):
        MixtureOfAttentionHeads(8, 4, 4)(torch.zeros(3, 8))
