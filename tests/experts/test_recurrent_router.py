"""The recurrent router against torch's cells, the released code, finite differences and models.

About 30 seconds.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.nn import functional as F

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.conversion import load_moe, parameter_counts, save_moe, to_moe
from bakeoff.experts.mixture_of_experts import MoE, after_optimizer_step, aux_loss, moe_layers
from bakeoff.experts.protocol import Router
from bakeoff.experts.recurrent_router import (
    LayerRouter,
    RecurrentCell,
    RecurrentRouter,
    convert_router,
    load_recurrent,
    make_layer_routers,
    routing_mutual_information,
)
from bakeoff.experts.routers import PerceptronTopK

CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}


def small(**changes):
    settings = {"hidden_size": 6, "num_experts": 4, "top_k": 2, "num_layers": 3, "state_size": 5}
    generator = torch.Generator().manual_seed(0)
    return RecurrentRouter(**{**settings, "init_std": 0.5, "generator": generator, **changes})


def through(router, layers):
    """Logits of all layers, the state handed from each to the next."""
    state, found = None, []
    for i, x in enumerate(layers):
        logits, state = router(x, state, i)
        found.append(logits)
    return found


def tokens(n=7, hidden=6, layers=3, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, hidden, generator=generator, dtype=dtype) for _ in range(layers)]


def tiny(kind="mixtral", **changes):
    import transformers as t

    common = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": None,
        **changes,
    }
    torch.manual_seed(0)
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **common)).eval()
    if kind == "olmoe":
        return t.OlmoeForCausalLM(t.OlmoeConfig(num_experts=4, **common)).eval()
    more = {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
    if kind == "qwen2":
        config = t.Qwen2MoeConfig(shared_expert_intermediate_size=16, **more, **common)
        return t.Qwen2MoeForCausalLM(config).eval()
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(norm_topk_prob=True, **more, **common)).eval()


KINDS = ["mixtral", "olmoe", "qwen2", "qwen3"]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def checkpoint_layers(model, settings):
    """transformers 5.23 gave the method a new name."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable(settings)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# -- the router alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CELLS))
def test_cell_is_torchs_cell(kind):
    torch.manual_seed(0)
    theirs = CELLS[kind](5, 5)
    ours = RecurrentCell(5, kind)
    ours.load_state_dict(theirs.state_dict())
    x, width = torch.randn(9, 5), ours.state_width
    state = torch.randn(9, width)
    expected = theirs(x, state.chunk(2, dim=1) if kind == "lstm" else state)
    expected = torch.cat(expected, dim=1) if kind == "lstm" else expected
    torch.testing.assert_close(ours(x, state), expected, rtol=0, atol=0)


# qiuzh20/RMoE, llama_moe_rnn/rnn.py (its constructor mended) and the block's two matrices, three
# layers in float64: what the cells gave.
RELEASED = {
    "gru": [
        [
            [-0.8800318747495472, 0.9237220332469656, -0.9442817669513779],
            [0.1481859565012913, -0.09145131885276135, 0.03242669809588255],
        ],
        [
            [-0.3271925894791109, 0.23311077592317436, -0.133191761264676],
            [0.00940712869558917, -0.03442952350753889, 0.05858978720700334],
        ],
        [
            [0.2612786809413028, -0.41589144222842983, 0.5600900904162891],
            [0.7068952628281164, -0.696392820911802, 0.6684523822922265],
        ],
    ],
    "rnn": [
        [
            [0.8427004999691283, -1.0254303449530806, 1.1824829422145442],
            [0.04558951082165319, -0.05090754320024271, 0.05495082727034972],
        ],
        [
            [1.386780205488152, -1.3585449604244486, 1.2962911243734139],
            [0.3825977830785915, -0.3221821089554261, 0.253698846561522],
        ],
        [
            [0.2947611292418969, -0.23395917395880086, 0.16729877329591297],
            [-0.09889689151006176, 0.10338988677122496, -0.10529395168944466],
        ],
    ],
}


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_three_layers_agree_with_the_released_code(cell):
    def ramp(rows, columns, step, shift):
        return (torch.arange(rows * columns).double() * step).reshape(rows, columns) + shift

    def fill(number, *shape):  # the order in which the released cell makes its parameters
        size = int(np.prod(shape))
        return (torch.sin(torch.arange(size).double() * 0.9 + number) * 0.8).reshape(shape)

    router = RecurrentRouter(4, 3, 2, 3, state_size=3, cell=cell).double()
    blocks = range(3 if cell == "gru" else 1)
    with torch.no_grad():
        for i in range(3):
            router.projections[i].copy_(ramp(3, 4, 0.3, i).sin())
            router.gates[i].copy_(ramp(3, 3, 1.1, i).cos())
        router.cell.weight_ih.copy_(torch.cat([fill(4 * b, 3, 3) for b in blocks]))
        router.cell.weight_hh.copy_(torch.cat([fill(4 * b + 1, 3, 3) for b in blocks]))
        router.cell.bias_ih.copy_(torch.cat([fill(4 * b + 2, 3) for b in blocks]))
        router.cell.bias_hh.copy_(torch.cat([fill(4 * b + 3, 3) for b in blocks]))
    found = through(router, [ramp(2, 4, 0.7, i).cos() for i in range(3)])
    torch.testing.assert_close(
        torch.stack(found), torch.tensor(RELEASED[cell]).double(), rtol=0, atol=1e-7
    )
    # Float64 tokens are computed in float64 throughout.
    np.testing.assert_allclose(torch.stack(found).tolist(), RELEASED[cell], rtol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cell": "rnn"},
        {"cell": "lstm"},
        {"pass_state": False},
        {"residual": 0.5},
        {"residual": 0.5, "pass_state": False},
        {"shared_projection": True},
        {"gate": "cosine", "cosine_size": 3},
        {"state_size": 0},
    ],
    ids=str,
)
def test_gradients_by_finite_differences(changes):
    router = small(**changes).double()
    layers = [x.requires_grad_() for x in tokens(3, dtype=torch.float64)]
    parameters = list(router.parameters())

    def run(*inputs):
        return torch.stack(through(router, inputs[:3]))

    assert torch.autograd.gradcheck(run, (*layers, *parameters))


def test_first_token_states_reach_later_layers_unless_cut():
    """The gradient path through depth, the point of the method, and the settings that cut it."""

    def reach(**changes):
        layers = [x.requires_grad_() for x in tokens()]
        last = through(small(**changes), layers)[-1]
        return [
            None if g is None else float(g.abs().sum())
            for g in torch.autograd.grad(last.sum(), layers, allow_unused=True)
        ]

    assert all(value > 0 for value in reach())
    for cut in ({"detach": True}, {"pass_state": False}, {"state_size": 0}):
        assert reach(**cut)[:2] == [None, None]
        assert reach(**cut)[2] > 0
    first, second, third = reach(pass_state=False, residual=0.5)
    assert first is None  # only the layer before is added, not all before it
    assert second > 0
    assert third > 0
    assert reach(pass_state=False, residual=0.5, detach=True)[:2] == [None, None]


def test_without_handing_on_each_layer_sees_its_own_input_alone():
    router = small(pass_state=False)
    layers = tokens()
    other = [*tokens(seed=5)[:2], layers[2]]
    assert torch.equal(through(router, layers)[2], through(router, other)[2])
    assert not torch.equal(through(small(), layers)[2], through(small(), other)[2])
    # The control has the same parameters, and is the first step of the cell in every layer.
    assert {n: p.shape for n, p in router.named_parameters()} == {
        n: p.shape for n, p in small().named_parameters()
    }
    state = router.cell(F.linear(layers[2], router.projections[2]), torch.zeros(7, 5))
    torch.testing.assert_close(
        through(router, layers)[2], F.linear(state, router.gates[2]), rtol=0, atol=0
    )


def test_detached_values_are_those_of_the_attached():
    for a, b in zip(through(small(), tokens()), through(small(detach=True), tokens()), strict=True):
        assert torch.equal(a, b)


def test_without_state_it_is_a_plain_linear_router():
    router = small(state_size=0)
    assert sum(p.numel() for p in router.parameters()) == 3 * 4 * 6
    for i, x in enumerate(tokens()):
        logits, state = router(x, None, i)
        torch.testing.assert_close(logits, x @ router.gates[i].T)
        assert state is None


def test_residual_adds_the_scores_of_the_layer_before():
    plain, added = small(pass_state=False), small(pass_state=False, residual=0.5)
    own = through(plain, tokens())
    found = through(added, tokens())
    expected = [own[0], own[1] + 0.5 * own[0], own[2] + 0.5 * own[1]]
    torch.testing.assert_close(found, expected)


def test_cosine_gate_does_not_mind_the_length_of_expert_vectors():
    router = small(gate="cosine", cosine_size=3)
    expected = through(router, tokens())
    with torch.no_grad():
        for gate in router.gates:
            gate *= torch.rand(4, 1) + 0.5
    torch.testing.assert_close(through(router, tokens()), expected)
    assert all(bool((logits.abs() <= 1 / 0.3 + 1e-5).all()) for logits in expected)


def test_tokens_are_independent():
    """Order of tokens, company and number: each token's path through depth is its own."""
    router, layers = small(), tokens(50)
    whole = through(router, layers)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    for a, b in zip(whole, through(router, [x[order] for x in layers]), strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole, through(router, [x[:1] for x in layers]), strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-5, atol=1e-6)


def test_number_of_parameters_is_that_of_the_formula():
    h, p, n_layers, n = 1280, 128, 24, 16  # the paper's 0.91B model: about 3.5M more
    count = {}
    for size in (p, 0):
        with torch.device("meta"):
            router = RecurrentRouter(h, n, 4, n_layers, state_size=size)
        count[size] = sum(each.numel() for each in router.parameters())
    extra = n_layers * (h * p + p * n - h * n) + 6 * p * p + 6 * p
    assert count[p] - count[0] == extra == 3_588_864


def test_starts_from_the_given_generator_with_zero_biases():
    a, b = small(), small()
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not a.cell.bias_ih.any()
    assert not a.cell.bias_hh.any()
    wide = RecurrentRouter(256, 64, 2, 2)
    for name, parameter in wide.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_low_precision_is_computed_in_float32():
    router = small().bfloat16()
    layers = [x.bfloat16() for x in tokens()]
    expected = through(copy.deepcopy(router).float(), [x.float() for x in layers])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = through(router, layers)
    assert all(logits.dtype == torch.float32 for logits in found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_route_gives_the_protocols_routing_and_leaves_padding_out():
    router, (x, y, _) = small(), tokens()
    mask = torch.tensor([True, False, True, True, False, True, True])
    dirty = x.clone()
    dirty[~mask] = float("nan")
    routing, state = router.route(dirty, None, 0, mask=mask)
    routing, _ = router.route(y, state, 1, mask=mask)
    _, kept = router(x[mask])
    logits, _ = router(y[mask], kept, 1)
    torch.testing.assert_close(routing.logits[mask], logits, rtol=1e-5, atol=1e-6)
    probs = logits.softmax(dim=1)
    top = probs.topk(2, dim=1)
    assert torch.equal(routing.indices[mask], top.indices)
    weights = top.values / top.values.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.weights[mask], weights)
    assert bool((routing.indices[~mask] == -1).all())
    assert not routing.weights[~mask].any()
    plain = small(renormalize=False)
    torch.testing.assert_close(plain.route(x)[0].weights, plain(x)[0].softmax(1).topk(2).values)


NEAR = torch.tensor([[0.0, 0, 0, 0], [0.0, 1e-9, 3e-9, 2e-9], [1.0, 2, 1, 1]])


def test_ties_go_to_the_lowest_index_and_near_ties_to_the_larger_logit():
    assert (NEAR[:2].softmax(dim=1) == 0.25).all()  # rounding makes ties of logits that differ
    router = small(state_size=0, hidden_size=4, num_experts=4)
    for gate in router.gates:
        gate.data.copy_(torch.eye(4))
    expected = [[0, 1], [2, 3], [1, 0]]
    assert router.route(NEAR)[0].indices.tolist() == expected
    wide = small(state_size=0, hidden_size=64, num_experts=64, top_k=8)
    wide.gates[0].data.zero_()
    assert wide.route(torch.ones(1, 64))[0].indices.tolist() == [list(range(8))]
    model = convert_router(tiny("mixtral"), state_size=0)
    gate = model.model.layers[0].mlp.gate
    gate.weight.data.copy_(torch.eye(4, gate.weight.shape[1]))
    states = torch.nn.functional.pad(NEAR, (0, gate.weight.shape[1] - 4))
    assert gate(states)[2].tolist() == expected


def test_routers_of_single_layers_hand_the_state_on_and_start_anew():
    router = small()
    layers = router.layers()
    assert all(isinstance(layer, Router) for layer in layers)
    expected = through(router, tokens())
    for _ in range(2):
        found = [layer(x).logits for layer, x in zip(layers, tokens(), strict=True)]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    twins = copy.deepcopy(nn.ModuleList(layers))
    with torch.no_grad():
        router.gates[0].zero_()
    found = [layer(x).logits for layer, x in zip(twins, tokens(), strict=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    layers[0](tokens()[0])
    with pytest.raises(ModelError, match="layer 2 ran out of turn, 1 was next"):
        layers[2](tokens()[2])


BAD_SETTINGS = [
    ({"top_k": 5}, "top_k must be from 1 to num_experts=4, got 5"),
    ({"top_k": 0}, "top_k"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"num_layers": 0}, "num_layers"),
    ({"state_size": -1}, "state_size"),
    ({"cell": "mamba"}, "unknown cell 'mamba'; there are: gru, rnn, lstm"),
    ({"gate": "dot"}, "unknown gate 'dot'; there are: linear, cosine"),
    ({"residual": float("nan")}, "residual"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_bad_settings(changes, message):
    with pytest.raises(DataError, match=message):
        small(**changes)


BAD_INPUT = [
    ({}, (torch.zeros(7, 5),), r"x must be \(tokens, 6\), got \(7, 5\)"),
    ({}, (torch.zeros(2, 7, 6),), "x must be"),
    ({}, (torch.zeros(7, 6).long(),), "floating"),
    ({}, (torch.zeros(7, 6), None, 3), "layer_idx must be from 0 to 2, got 3"),
    ({}, (torch.zeros(7, 6), None, -1), "layer_idx"),
    ({}, (torch.zeros(7, 6), torch.zeros(6, 5), 1), r"state must be \(tokens, 5\) = \(7, 5\)"),
    ({}, (torch.zeros(7, 6), torch.zeros(7, 4), 1), "state must be"),
    ({}, (torch.zeros(7, 6), torch.zeros(7, 5).half(), 1), "state must be torch.float32"),
    ({}, (torch.zeros(7, 6).double(), torch.zeros(7, 5), 1), "state must be torch.float64"),
    ({}, (torch.zeros(7, 6), torch.zeros(7, 5), 0), "over layers, not over time"),
    ({"pass_state": False}, (torch.zeros(7, 6), torch.zeros(7, 5), 1), "pass_state=False"),
    ({"state_size": 0}, (torch.zeros(7, 6), torch.zeros(7, 5), 1), "state_size=0"),
    ({"cell": "lstm"}, (torch.zeros(7, 6), torch.zeros(7, 5), 1), r"\(tokens, 10\)"),
]


@pytest.mark.parametrize(("changes", "args", "message"), BAD_INPUT)
def test_bad_input(changes, args, message):
    with pytest.raises(DataError, match=message):
        small(**changes)(*args)


def test_route_refuses_nan_and_wrong_masks():
    with pytest.raises(DataError, match="not all finite"):
        small().route(torch.full((2, 6), float("nan")))
    with pytest.raises(DataError, match="mask must be"):
        small().route(torch.zeros(2, 6), mask=torch.ones(3, dtype=torch.bool))


def test_mutual_information_is_the_papers_recipe():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 8, generator=generator).softmax(dim=1) for _ in range(2))
    a[0] = b[0] = 1 / 8  # all in one bin
    b[1] = a[1]
    expected = np.mean(
        [
            mutual_info_score(*(np.floor(np.minimum(p, 0.999999) * 20) for p in pair))
            for pair in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
    )
    assert routing_mutual_information(a, b, bins=20) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(DataError, match="probabilities"):
        routing_mutual_information(a - 1, b)
    with pytest.raises(DataError, match="tokens, experts"):
        routing_mutual_information(a, b[:3])


# -- models of transformers -----------------------------------------------------------------------


def by_hand(model, ids, mask=None):
    """Router logits of a converted model, from what its routers read."""
    read, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            hooks.append(
                module.register_forward_hook(lambda m, args, out: read.append((args[0], out)))
            )
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    router = model.model.recurrent_router
    logits = through(router, [x.reshape(-1, x.shape[-1]) for x, _ in read])
    return output, logits, [out for _, out in read]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_routes_by_the_shared_state(kind):
    plain = tiny(kind)
    renormalised = getattr(plain.config, "norm_topk_prob", True)
    model = convert_router(copy.deepcopy(plain), "recurrent", state_size=8, init_std=0.5, seed=3)
    output, logits, routed = by_hand(model, IDS)
    assert len(output.router_logits) == 3
    for shown, expected, (first, weights, indices) in zip(
        output.router_logits, logits, routed, strict=True
    ):
        torch.testing.assert_close(shown, expected, rtol=1e-5, atol=1e-6)
        assert first is shown
        top = expected.softmax(dim=1).topk(2, dim=1)
        assert torch.equal(indices, top.indices)
        share = top.values / top.values.sum(dim=1, keepdim=True) if renormalised else top.values
        torch.testing.assert_close(weights, share)
    # What the first layer decides changes what the last one decides.
    with torch.no_grad():
        model.model.recurrent_router.projections[0].mul_(-3)
    changed, again, _ = by_hand(model, IDS)
    torch.testing.assert_close(changed.router_logits[2], again[2], rtol=1e-5, atol=1e-6)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.endswith(".gate.weight") for name in names)
    assert sum("weight_hh" in name for name in names) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_state_a_converted_model_computes_what_it_did(kind):
    plain = tiny(kind)
    model = convert_router(copy.deepcopy(plain), state_size=0)
    a, b = (m(IDS, labels=IDS, output_router_logits=True) for m in (plain, model))
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-5, atol=1e-6)
    if bool((a.router_logits[0] < 0).any()):  # transformers 5.2 reports probabilities as logits
        torch.testing.assert_close(b.loss, a.loss)
        torch.testing.assert_close(b.aux_loss, a.aux_loss)
    low = [m.bfloat16()(IDS).logits for m in (plain, model)]
    torch.testing.assert_close(*low, rtol=0.1, atol=0.1)


def test_dense_layers_do_not_touch_the_state():
    """The released code fails where the first layer is dense."""
    model = convert_router(tiny("qwen3", mlp_only_layers=[0, 2], num_hidden_layers=5), state_size=8)
    router = model.model.recurrent_router
    assert router.num_layers == 3
    output, logits, _ = by_hand(model, IDS)
    assert len(output.router_logits) == 3
    torch.testing.assert_close(list(output.router_logits), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_generation_without(kind):
    model = convert_router(tiny(kind), state_size=8, init_std=1.0)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    runs = [
        model.generate(IDS, use_cache=cached, output_logits=True, **settings)
        for cached in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for a, b in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    beams = [
        model.generate(IDS, use_cache=cached, num_beams=3, **settings) for cached in (True, False)
    ]
    assert torch.equal(beams[0].sequences, beams[1].sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = convert_router(tiny(), state_size=8, init_std=1.0)
    short = IDS[:1, :4]
    padding, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    batch = torch.cat([torch.cat(order(short, padding), dim=1), IDS[1:]])
    mask = torch.cat([torch.cat(order(ones, padding), dim=1), torch.ones(1, 6, dtype=torch.long)])
    kept = slice(2, 6) if side == "left" else slice(0, 4)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = model(batch, attention_mask=mask, position_ids=positions).logits[0, kept]
        torch.testing.assert_close(padded, model(short).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradient_checkpointing_changes_no_gradient(cell, reentrant):
    model = convert_router(tiny(), state_size=8, init_std=0.5, cell=cell, residual=0.3).train()
    model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    assert any("recurrent_router.cell" in name for name in expected)
    model.zero_grad()
    checkpoint_layers(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    # Two forward passes before the first backward: states must not be mixed up.
    losses = [model(ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS.flip(1))]
    losses[0].backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputation_by_another_wrapper_is_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = convert_router(tiny(), state_size=8).train()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(ModelError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_detach_leaves_early_projections_to_their_own_layer():
    def early(**changes):
        model = convert_router(tiny(), state_size=8, init_std=0.5, **changes).train()
        logits = model(IDS, output_router_logits=True).router_logits[2]
        into = model.model.recurrent_router.projections[0]
        return torch.autograd.grad(logits.square().sum(), into)[0]

    # Both arms get a gradient through the experts' weights; only the attached one through states.
    attached, detached = early(), early(detach=True)
    assert not torch.allclose(attached, detached)


def test_hooks_on_layers_see_plain_hidden_states():
    model = convert_router(tiny(), state_size=8).train()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(out))
    model(IDS, output_hidden_states=True)
    checkpoint_layers(model, {"use_reentrant": False})
    output = model(IDS, output_hidden_states=True, use_cache=False)
    assert all(isinstance(out, torch.Tensor) and out.shape == (2, 6, 16) for out in seen)
    assert len(output.hidden_states) == 4


def test_copies_are_independent_and_equal():
    model = convert_router(tiny(), state_size=8, init_std=0.5)
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.recurrent_router.cell.weight_ih.zero_()
        model.model.recurrent_router.gates[0].zero_()
    torch.testing.assert_close(twin(IDS).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(model(IDS).logits, expected)


def test_an_error_in_mid_model_does_not_spoil_the_next_pass():
    model = convert_router(tiny(), state_size=8)
    expected = model(IDS).logits

    def fail(module, args):
        raise RuntimeError("stop")

    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(IDS)
    hook.remove()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)


RELOAD = """
import sys, json, torch
from bakeoff.experts.recurrent_router import load_recurrent
model = load_recurrent(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
logits = model(ids).logits.tolist()
new = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
print(json.dumps({"logits": logits, "new": new, "class": type(model).__name__}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_in_a_new_process(kind, tmp_path):
    model = convert_router(
        tiny(kind, tie_word_embeddings=kind == "olmoe"),
        state_size=8,
        init_std=0.5,
        cell="lstm",
        residual=0.25,
        gate="cosine",
        cosine_size=4,
    )
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}
    saved = json.loads((tmp_path / "config.json").read_text())["recurrent_router"]
    assert saved["residual"] == 0.25
    if kind in ("mixtral", "qwen2"):
        finished = subprocess.run(
            [sys.executable, "-c", RELOAD, str(tmp_path), json.dumps(IDS.tolist())],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        found = json.loads(finished.stdout.splitlines()[-1])
        assert found["class"] == type(model).__name__
        assert found["new"] == model.generate(IDS, max_new_tokens=5, do_sample=False).tolist()
        torch.testing.assert_close(torch.tensor(found["logits"]), model(IDS).logits)
    again = load_recurrent(tmp_path)
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    again.save_pretrained(tmp_path / "twice")
    torch.testing.assert_close(load_recurrent(tmp_path / "twice")(IDS).logits, model(IDS).logits)
    assert load_recurrent(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_recurrent(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no recurrent router"):
        load_recurrent(tmp_path)


def test_trains_with_global_balance_attached():
    from bakeoff.experts.global_balance import LoadBalancingLoss

    model = convert_router(tiny(), state_size=8).train()
    lbl = LoadBalancingLoss(4, 2, coef=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with lbl.attach(model):
        for _ in range(20):
            with lbl.accumulate(1):
                loss = model(IDS, labels=IDS).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_conversion_refuses_what_it_cannot_do():
    from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

    with pytest.raises(DataError, match="unknown router 'linear'; there is: recurrent"):
        convert_router(tiny(), "linear")
    with pytest.raises(DataError, match="unknown setting 'top_k'; there are: state_size, cell"):
        convert_router(tiny(), top_k=1)
    with pytest.raises(DataError, match="unknown cell"):
        convert_router(tiny(), cell="mamba")
    with pytest.raises(ModelError, match="has recurrent routers already"):
        convert_router(convert_router(tiny(), state_size=4))
    size = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    with pytest.raises(ModelError, match="LlamaForCausalLM has no mixture of experts"):
        convert_router(LlamaForCausalLM(LlamaConfig(**size, **heads)))
    other = GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **size, **heads)
    with pytest.raises(ModelError, match="does not choose the top_k of a softmax"):
        convert_router(GptOssForCausalLM(other))


def test_a_failed_conversion_leaves_the_model_alone():
    model = tiny()
    expected = model(IDS).logits
    with pytest.raises(DataError), warnings.catch_warnings():
        convert_router(model, state_size=-3)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    assert not hasattr(model.config, "recurrent_router")


# -- models whose layers to_moe made mixtures -----------------------------------------------------


DENSE = {"vocab_size": 23, "num_hidden_layers": 4, "num_attention_heads": 2}


def dense(kind="llama", **changes):
    import transformers as t

    torch.manual_seed(0)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=23, n_embd=16, n_layer=4, n_head=2)).eval()
    common = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    if kind == "cohere":  # attention and feed-forward side by side
        return t.CohereForCausalLM(t.CohereConfig(**DENSE, **common, **changes)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**DENSE, **common, **changes)).eval()


RECURRENT = {"name": "recurrent", "state_size": 8, "init_std": 0.5}


def mixture(kind="llama", router=RECURRENT, **settings):
    changes = settings.pop("config", {})
    given = {"experts": 4, "start": "random", **settings}
    return to_moe(dense(kind, **changes), router=router, **given)


def read_by_routers(model, ids, mask=None):
    """What the routers of a model read, and what they made of it."""
    read, hooks = [], []
    for module in model.modules():
        if isinstance(module, LayerRouter):
            hooks.append(module.register_forward_hook(lambda m, a, out: read.append((a[0], out))))
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return output, read


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere"])
def test_layers_of_to_moe_share_one_router_and_its_state(kind):
    model = mixture(kind)
    routers = [layer.router for layer in moe_layers(model).values()]
    assert len(routers) == 4
    assert len({id(each.router) for each in routers}) == 1
    names = [name for name, _ in model.named_parameters()]
    assert sum("weight_hh" in name for name in names) == 1
    _, read = read_by_routers(model, IDS)
    for (_, routing), expected in zip(
        read, through(routers[0].router, [x for x, _ in read]), strict=True
    ):
        torch.testing.assert_close(routing.logits, expected)
        top = expected.softmax(dim=1).topk(2, dim=1)
        assert torch.equal(routing.indices, top.indices)
        torch.testing.assert_close(
            routing.weights, top.values / top.values.sum(dim=1, keepdim=True)
        )
    # What the first layer's router reads reaches the last one's choice.
    with torch.no_grad():
        routers[0].router.projections[0].mul_(-3)
    _, again = read_by_routers(model, IDS)
    alone = through(routers[0].router, [x for x, _ in again])
    torch.testing.assert_close(again[3][1].logits, alone[3])


def test_only_chosen_layers_have_routers_and_parameters_count_once():
    h, p, n, chosen = 16, 8, 4, 2
    model = mixture(every=2)
    plain = mixture(every=2, router="top-k")
    router = moe_layers(model)["model.layers.1.mlp"].router.router
    assert router.num_layers == chosen
    extra = chosen * (h * p + p * n - h * n) + 6 * p * p + 6 * p
    counts, before = parameter_counts(model), parameter_counts(plain)
    assert counts.total - before.total == counts.active - before.active == extra
    assert torch.isfinite(model(IDS).logits).all()


def test_without_state_and_passing_it_is_another_function():
    passed = mixture()
    control = mixture(router={**RECURRENT, "pass_state": False})
    control.load_state_dict(passed.state_dict())  # the same parameters
    (_, a), (_, b) = read_by_routers(passed, IDS), read_by_routers(control, IDS)
    torch.testing.assert_close(a[0][1].logits, b[0][1].logits)
    assert not torch.allclose(a[1][1].logits, b[1][1].logits)
    for (x, routing), i in zip(b, range(4), strict=True):
        router = moe_layers(control)["model.layers.0.mlp"].router.router
        torch.testing.assert_close(routing.logits, router(x, None, i)[0])


@pytest.mark.parametrize("changes", [{}, {"residual": 0.3, "cell": "lstm"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_of_a_mixture_with_a_cache_equals_one_full_pass(kind, changes):
    model = mixture(kind, router={**RECURRENT, **changes})
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    runs = [
        model.generate(IDS, use_cache=cached, output_logits=True, pad_token_id=0, **settings)
        for cached in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    with torch.no_grad():
        full = model(runs[0].sequences).logits
    for i, step in enumerate(runs[0].logits):
        torch.testing.assert_close(step, full[:, 5 + i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_a_mixture(side):
    model = mixture()
    short = IDS[:1, :4]
    padding, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    batch = torch.cat([torch.cat(order(short, padding), dim=1), IDS[1:]])
    mask = torch.cat([torch.cat(order(ones, padding), dim=1), torch.ones(1, 6, dtype=torch.long)])
    kept = slice(2, 6) if side == "left" else slice(0, 4)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = model(batch, attention_mask=mask, position_ids=positions).logits[0, kept]
        torch.testing.assert_close(padded, model(short).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aux", ["switch-balance", "global-balance"])
def test_checkpointing_a_mixture_changes_no_gradient(aux):
    model = mixture(aux=[aux]).train()
    model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    assert any("cell" in name for name in expected)
    model.zero_grad()
    after_optimizer_step(model)
    checkpoint_layers(model, {"use_reentrant": False})
    # Two passes in flight: states must not be mixed up. A loss that counts allows one at a time.
    passes = (IDS, IDS.flip(1)) if aux == "switch-balance" else (IDS,)
    losses = [model(ids, labels=ids, use_cache=False).loss for ids in passes]
    losses[0].backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_mixture_trains_through_depth_and_copies_are_independent():
    model = mixture().train()
    loss = model(IDS, labels=IDS).loss
    assert float(aux_loss(model).detach()) > 0
    loss.backward()
    router = moe_layers(model)["model.layers.0.mlp"].router.router
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
    model.eval()
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    inner = [layer.router.router for layer in moe_layers(twin).values()]
    assert len({id(each) for each in inner}) == 1
    assert inner[0] is not router
    with torch.no_grad():
        router.cell.weight_ih.zero_()
        router.gates[0].zero_()
    torch.testing.assert_close(twin(IDS).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(model(IDS).logits, expected)


def test_the_seed_decides_and_a_given_router_is_copied():
    one, two, other = mixture(seed=1), mixture(seed=1), mixture(seed=2)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)
    given = small(hidden_size=16, num_layers=4)
    model = mixture(router=given)
    inside = moe_layers(model)["model.layers.2.mlp"].router.router
    assert inside is not given
    for a, b in zip(inside.parameters(), given.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DataError, match="made with num_layers=4, the model needs 2"):
        mixture(router=given, every=2)


def test_one_expert_per_token_keeps_its_probability():
    routers = make_layer_routers({"name": "recurrent", "k": 1}, 6, 4, 2)
    routing = routers[0](tokens()[0])
    torch.testing.assert_close(routing.weights, routing.probs.max(dim=1, keepdim=True).values)
    assert routers[0].k == 1


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"name": "recurrent", "top_k": 1}, "unknown setting 'top_k'; it accepts: k, state_size"),
        ({"name": "recurrent", "k": 9}, "top_k must be from 1 to num_experts=4, got 9"),
        ({"name": "recurrent", "cell": "mamba"}, "unknown cell 'mamba'"),
    ],
)
def test_bad_router_settings_leave_the_model_as_it_was(router, message):
    model = dense()
    before = model(IDS).logits
    with pytest.raises(DataError, match=message):
        to_moe(model, experts=4, router=router)
    assert torch.equal(model(IDS).logits, before)
    assert not moe_layers(model)
    with pytest.raises(DataError, match="spans the layers of a model"):
        MoE(8, 4, "recurrent", width=8)


RELOAD_MOE = """
import sys, json, torch
from bakeoff.experts.conversion import load_moe
model = load_moe(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
new = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
print(json.dumps({"logits": model(ids).logits.tolist(), "new": new}))
"""


def test_a_saved_mixture_keeps_shared_weights_once_and_a_new_process_reads_it(tmp_path):
    from safetensors import safe_open

    model = mixture(
        router={**RECURRENT, "k": 1, "residual": 0.25, "cell": "lstm", "gate": "cosine"},
        every=2,
        aux=[{"name": "global-balance", "scope": "sequence"}],
        config={"tie_word_embeddings": True},
    )
    save_moe(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        assert sum(name.endswith("cell.weight_hh") for name in names) == 1
        assert sum("router.gates." in name for name in names) == 2
        assert sum(stored.get_slice(n)[:].numel() for n in names) == parameter_counts(model).total
    finished = subprocess.run(
        [sys.executable, "-c", RELOAD_MOE, str(tmp_path), json.dumps(IDS.tolist())],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["new"] == model.generate(IDS, max_new_tokens=5, do_sample=False).tolist()
    torch.testing.assert_close(torch.tensor(found["logits"]), model(IDS).logits)
    again = load_moe(tmp_path)
    assert len({id(layer.router.router) for layer in moe_layers(again).values()}) == 1
    save_moe(again, tmp_path / "twice")
    saved = [json.loads((tmp_path / d / "moe.json").read_text()) for d in ("", "twice")]
    assert saved[0] == saved[1]
    assert saved[0]["layers"][1]["settings"]["router"]["layer"] == 1
    assert saved[0]["layers"][0]["settings"]["aux"][0]["scope"] == "sequence"
    saved[0]["layers"][1]["settings"]["router"]["layer"] = 0
    (tmp_path / "moe.json").write_text(json.dumps(saved[0]))
    with pytest.raises(ModelError, match=r"not the layers of one: layers \[0, 0\]"):
        load_moe(tmp_path)


def test_a_mixture_in_low_precision_is_saved(tmp_path):
    model = mixture().bfloat16()
    save_moe(model, tmp_path)
    again = load_moe(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("size", ["smoke", "laptop", "full"])
def test_the_claims_perceptron_has_as_many_parameters(size):
    from bakeoff.claims.recurrent_router import BUDGETS, N_EXPERTS, perceptron_width

    budget = BUDGETS[size]
    h, n_layers = budget.width, budget.n_layers
    with torch.device("meta"):
        recurrent = RecurrentRouter(h, N_EXPERTS, 2, n_layers, budget.state_size)
        perceptron = PerceptronTopK(width=perceptron_width(budget)).bind(h, N_EXPERTS)
    counts = [sum(p.numel() for p in each.parameters()) for each in (recurrent, perceptron)]
    assert n_layers * counts[1] == pytest.approx(counts[0], rel=0.03)
