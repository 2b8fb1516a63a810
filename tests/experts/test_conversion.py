"""Upcycling transformers' decoders, saving them for a new process, and looking inside."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.conversion import (
    layer_numbers,
    load_moe,
    parameter_counts,
    read_feed_forward,
    save_moe,
    to_moe,
)
from bakeoff.experts.expert_bank import ModuleExperts
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.inspection import LayerReport, inspect_experts
from bakeoff.experts.mixture_of_experts import MoE, aux_loss, moe_layers
from bakeoff.experts.routers import TopK

pytestmark = [
    pytest.mark.filterwarnings("ignore:drop="),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable"),
]

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings, **TOKENS)
    name = "OPTForCausalLM" if kind == "OPT" else f"{kind}ForCausalLM"
    name = "GPT2LMHeadModel" if kind == "GPT2" else name
    return getattr(transformers, name)(config).eval()


def llama(**settings):
    given = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, **settings}
    return build("Llama", **given)


DECODERS = {
    "llama": llama,
    "llama with biases": lambda: llama(mlp_bias=True),
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: build("GPT2", vocab_size=60, n_embd=16, n_layer=3, n_head=2),
    "gemma2": lambda: build(
        "Gemma2", **SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8
    ),
    "qwen2": lambda: build("Qwen2", **SMALL, intermediate_size=24, num_key_value_heads=1),
    "phi": lambda: build("Phi", **SMALL, intermediate_size=24),
    "phi3": lambda: build("Phi3", **SMALL, intermediate_size=24),
    "gpt-neox": lambda: build("GPTNeoX", **SMALL, intermediate_size=24),
    "starcoder2": lambda: build("Starcoder2", **SMALL, intermediate_size=24, num_key_value_heads=1),
}


def ids(rows=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (rows, length), generator=generator)


@pytest.mark.parametrize("name", DECODERS)
def test_copies_leave_the_function_as_it_was(name):
    model = DECODERS[name]()
    before = model(ids()).logits
    to_moe(model, experts=4)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)
    assert all(isinstance(m.experts, FeedForwardExperts) for m in moe_layers(model).values())


def test_parts_with_equal_weights_leave_the_function_as_it_was():
    for settings in ({"start": "split"}, {"granularity": 2}):
        for name in ("llama", "llama with biases", "gpt2"):
            model = DECODERS[name]()
            before = model(ids()).logits
            to_moe(model, experts=4, router={"name": "top-k", "k": 4}, **settings)
            for layer in moe_layers(model).values():
                nn.init.zeros_(layer.router.weight)
            torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)


def test_fine_grained_copies_hold_each_neuron_as_often():
    model = llama()
    dense = model.model.layers[0].mlp
    rows = dense.gate_proj.weight.detach().clone()
    to_moe(model, experts=8, granularity=2)
    bank = moe_layers(model)["model.layers.0.mlp"].experts
    assert bank.width == 12
    gates = bank.w_in[:, :12].reshape(-1, 16)
    for row in rows:
        assert int((gates == row).all(dim=1).sum()) == 4


def test_lora_starts_as_the_dense_model():
    model = llama()
    before = model(ids()).logits
    to_moe(model, experts=4, start="lora", rank=2)
    assert torch.equal(model(ids()).logits, before)


def test_random_start_and_which_layers():
    model = llama(num_hidden_layers=8)
    to_moe(model, experts=4, start="random", every=2, dense_first=2)
    kinds = [isinstance(layer.mlp, MoE) for layer in model.model.layers]
    assert kinds == [False, False, False, True, False, True, False, True]
    bank = model.model.layers[3].mlp.experts
    assert float((bank.w_in[0] - bank.w_in[1]).detach().abs().max()) > 0.01
    assert layer_numbers(8, every=4) == [3, 7]
    assert layer_numbers(4, layers=[-1, 0]) == [0, 3]
    assert layer_numbers(4, layers=(n for n in (0, 2))) == [0, 2]
    with pytest.raises(DataError, match=r"got \[0, 4\]"):
        layer_numbers(4, layers=(n for n in (0, 4)))


def test_losses_may_come_from_an_iterator():
    model = to_moe(llama(), experts=4, aux=(name for name in ("z-loss",)))
    assert all(len(layer.losses) == 1 for layer in moe_layers(model).values())


def test_routers_are_not_shared_between_layers():
    model = to_moe(llama(), experts=4)
    weights = [layer.router.weight for layer in moe_layers(model).values()]
    assert len({w.data_ptr() for w in weights}) == 4
    again = to_moe(llama(), experts=4, router=lambda: TopK(k=2))
    for one, other in zip(weights, moe_layers(again).values(), strict=True):
        assert torch.equal(one, other.router.weight)  # the seed decides


class Squared(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            inner.gate_proj,
            inner.up_proj,
            inner.down_proj,
        )
        self.act_fn = inner.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) ** 2


def test_a_layer_that_does_more_than_it_seems_is_copied_whole(tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Squared(layer.mlp)
    assert read_feed_forward(model.model.layers[0].mlp) is None
    with pytest.raises(ModelError, match="form of Squared is not known"):
        to_moe(model, experts=2, start="split")
    before = model(ids()).logits
    to_moe(model, experts=2)
    assert isinstance(model.model.layers[0].mlp.experts, ModuleExperts)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_does_not_change_the_others(padding):
    model = to_moe(llama(), experts=4, start="random", capacity=1.0, drop="probs")
    row, real = ids(1), torch.ones(1, 7, dtype=torch.int64)
    short = model(row, attention_mask=real).logits
    order = [torch.zeros(1, 3, dtype=torch.int64), row]
    masks = [torch.zeros(1, 3, dtype=torch.int64), real]
    where = slice(3, None)
    if padding == "right":
        order, masks, where = order[::-1], masks[::-1], slice(0, 7)
    mask = torch.cat(masks, dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(torch.cat(order, dim=1), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:, where], short, rtol=1e-4, atol=1e-5)
    assert moe_layers(model)["model.layers.0.mlp"].stats().tokens == 7


def test_generates_as_without_cache_and_with_padding():
    model = to_moe(llama(), experts=4, start="random", router={"name": "hash", "vocabulary": 60})
    row = ids(1, 5)
    cached = model.generate(row, max_new_tokens=6, do_sample=False)
    plain = model.generate(row, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    left = torch.cat([torch.zeros(1, 2, dtype=torch.int64), row], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded = model.generate(left, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(padded[:, 7:], cached[:, 5:])


def test_loss_includes_the_balance_losses_in_training_only():
    model = to_moe(llama(), experts=4)
    row = ids()
    alone = model(row, labels=row).loss
    model.train()
    together = model(row, labels=row).loss
    torch.testing.assert_close(together - aux_loss(model), alone, rtol=1e-4, atol=1e-5)
    together.backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0
    plain = to_moe(llama(), experts=4, add_aux_to_loss=False).train()
    torch.testing.assert_close(plain(row, labels=row).loss, alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_trains_the_router_alike():
    gradients = []
    for recompute in (False, True):
        model = to_moe(llama(), experts=4, start="random").train()
        if recompute:
            model.gradient_checkpointing_enable()
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[0, 5:] = 0
        model(ids(), attention_mask=mask, labels=ids()).loss.backward()
        gradients.append(model.model.layers[1].mlp.router.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_balance_losses_that_checkpointing_cuts_off_are_refused(use_reentrant):
    model = to_moe(llama(), experts=4, start="random").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if use_reentrant:
        with pytest.raises(ModelError, match="'use_reentrant': False"):
            model(ids(), labels=ids(), use_cache=False)
        with torch.no_grad():
            assert float(model(ids(), labels=ids(), use_cache=False).loss) > 0
        return
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


RELOAD = """
import sys, torch
from bakeoff.experts.conversion import load_moe
model = load_moe(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save({
    "logits": model(ids).logits,
    "tokens": model.generate(ids, max_new_tokens=4, do_sample=False),
}, sys.argv[3])
"""


def test_a_new_process_loads_and_generates_the_same(tmp_path):
    model = to_moe(
        llama(tie_word_embeddings=True),
        experts=4,
        start="random",
        router={"name": "top-k", "score": "sigmoid", "bias_rate": 0.1},
        capacity=(1.0, 2.0),
        shared=1,
        every=2,
    ).to(torch.bfloat16)
    for layer in moe_layers(model).values():
        layer.router.bias.uniform_(-0.1, 0.1)
    save_moe(model, tmp_path / "model")
    torch.save(ids(), tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("model", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True, timeout=110)
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["logits"], model(ids()).logits)
    tokens = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(out["tokens"], tokens)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "moe.json", "model.safetensors"}


@pytest.mark.parametrize("settings", [{"start": "lora"}, {"start": "split"}, {"granularity": 2}])
def test_every_start_is_saved(tmp_path, settings):
    model = to_moe(llama(), experts=4, **settings)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    save_moe(model, tmp_path)
    again = load_moe(tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    save_moe(again, tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "moe.json").read_text()) == json.loads(
        (tmp_path / "moe.json").read_text()
    )


def test_parameters_are_counted_twice():
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    feed_forward = 3 * 16 * 24
    to_moe(model, experts=8, router={"name": "top-k", "k": 2})
    counts = parameter_counts(model)
    assert counts.total == dense + 4 * (7 * feed_forward + 8 * 16)
    assert counts.active == dense + 4 * (1 * feed_forward + 8 * 16)
    mixtral = build(
        "Mixtral", **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=8
    )
    theirs = parameter_counts(mixtral)
    assert theirs.total - theirs.active == 4 * 6 * feed_forward


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": "magic"}, DataError, "copy, split, random, lora"),
        ({"granularity": 3}, DataError, "divide experts=8"),
        ({"granularity": 2, "start": "split"}, DataError, "for start='copy'"),
        ({"experts": 7, "start": "split"}, DataError, "7 parts do not divide"),
        ({"layers": [9]}, DataError, "below 4"),
        ({"every": 0}, DataError, "every must be at least 1"),
        ({"every": 9}, DataError, "no layer of 4"),
        ({"router": "soft"}, DataError, "looks at later tokens"),
        ({"router": {"name": "top-k", "k": 9}}, DataError, "only 8"),
        ({"shared": nn.Linear(16, 16)}, DataError, "whole number of at least 0, got Linear"),
        ({"shared": -1}, DataError, "whole number of at least 0, got -1"),
        ({"shared": 1, "start": "lora"}, DataError, "leave out shared=1"),
    ],
)
def test_errors_leave_the_model_as_it_was(change, error, message):
    model = llama()
    before = model(ids()).logits
    with pytest.raises(error, match=message):
        to_moe(model, **change)
    assert torch.equal(model(ids()).logits, before)
    assert not moe_layers(model)


def test_what_is_no_dense_decoder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="already is a mixture"):
        to_moe(to_moe(llama()))
    with pytest.raises(ModelError, match="no list of layers"):
        to_moe(nn.Linear(2, 2))
    mixtral = build(
        "Mixtral", **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=4
    )
    with pytest.raises(ModelError, match="already is a mixture"):
        to_moe(mixtral)
    with pytest.raises(ModelError, match="not made by to_moe"):
        save_moe(llama(), tmp_path)
    with pytest.raises(ModelError, match="not written by save_moe"):
        load_moe(tmp_path)


# Inspection

MIXTURES = {
    "ours": lambda: to_moe(llama(), experts=4, start="random"),
    "mixtral": lambda: build(
        "Mixtral", **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=4
    ),
    "olmoe": lambda: build(
        "Olmoe", **SMALL, intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "qwen2-moe": lambda: build(
        "Qwen2Moe",
        **SMALL,
        intermediate_size=24,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3-moe": lambda: build(
        "Qwen3Moe",
        **SMALL,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}


def batches():
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return [
        {"input_ids": ids(seed=1), "attention_mask": mask, "domains": torch.tensor([0, 1])},
        {"input_ids": ids(seed=2)},
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_report_counts_what_the_routers_did(name):
    model = MIXTURES[name]()
    report = inspect_experts(model, batches(), ["code", "prose"])
    assert report.tokens.tolist() == [7 + 14, 4]
    assert len(report.layers) == 4
    for layer in report.layers:
        assert layer.counts.sum(axis=0).tolist() == [2 * 21, 2 * 4]
        assert layer.load.sum() == pytest.approx(1)
        assert 0 < layer.entropy <= 1 + 1e-9
        assert layer.drop_rate == 0
        assert abs(layer.similarity) < 0.2
    assert report.redundancy.shape == (4, 4)
    np.testing.assert_allclose(np.diag(report.redundancy), 1, rtol=1e-6)
    np.testing.assert_allclose(report.redundancy, report.redundancy.T, atol=1e-9)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("router", ["threshold", {"name": "dselect-k", "gamma": 0.1}, "dense"])
def test_a_layer_tells_all_of_itself_however_many_experts_a_token_has(router):
    model = to_moe(llama(), experts=4, start="random", router=router)
    for layer in moe_layers(model).values():
        if layer.router.name == "dense":
            layer.router.weight.data.mul_(50)
    report = inspect_experts(model, batches(), ["code", "prose"])
    np.testing.assert_allclose(np.diag(report.redundancy), 1, rtol=1e-6)


def test_ours_and_theirs_agree_on_the_same_weights():
    theirs = MIXTURES["mixtral"]()
    same = {"rms_norm_eps": 1e-5, "rope_parameters": theirs.config.rope_parameters}
    ours = to_moe(llama(**same), experts=4, start="random")
    ours.load_state_dict(
        {
            key.replace("mlp.gate.weight", "mlp.router.weight")
            .replace("experts.gate_up_proj", "experts.w_in")
            .replace("experts.down_proj", "experts.w_out"): value
            for key, value in theirs.state_dict().items()
        }
    )
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)
    one, other = (inspect_experts(m, batches(), ["a", "b"]).to_dict() for m in (ours, theirs))
    for a, b in zip(one["layers"], other["layers"], strict=True):
        assert a["counts"] == b["counts"]
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)
        assert a["similarity"] == pytest.approx(b["similarity"], rel=1e-5)
    np.testing.assert_allclose(one["redundancy"], other["redundancy"], rtol=1e-9)


def test_hash_routing_is_wholly_redundant_and_random_is_not():
    model = to_moe(llama(), experts=4, router={"name": "hash", "vocabulary": 60})
    many = [{"input_ids": ids(8, 200, seed=3)}]
    assert inspect_experts(model, many).redundancy.min() == pytest.approx(1)
    model = to_moe(llama(), experts=4, router=lambda: make_random(), start="copy")
    redundancy = inspect_experts(model, many).redundancy
    assert redundancy[~np.eye(4, dtype=bool)].max() < 0.02


def make_random():
    from bakeoff.experts.fixed_routers import RandomRouter

    return RandomRouter(k=1, seed=None)


def test_specialisation_between_none_and_whole():
    make = lambda counts: LayerReport("", np.array(counts), 0.0, 0.0, math.nan)  # noqa: E731
    assert make([[5, 50], [5, 50]]).specialisation == pytest.approx(0)
    assert make([[5, 0], [0, 50]]).specialisation == pytest.approx(1)
    assert math.isnan(make([[5, 0], [5, 0]]).specialisation)
    # One domain uses expert 0, the other both: JS(1, 0 | 1/2, 1/2) in bits.
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert make([[4, 2], [0, 2]]).specialisation == pytest.approx(expected)


def test_copies_are_alike_and_drops_are_seen():
    model = to_moe(llama(), experts=4, capacity=0.5)
    report = inspect_experts(model, batches(), ["a", "b"])
    assert all(layer.similarity == pytest.approx(1, abs=1e-5) for layer in report.layers)
    assert all(layer.drop_rate > 0.4 for layer in report.layers)


def test_inspection_restores_the_model_and_refuses_nonsense():
    model = MIXTURES["mixtral"]().train()
    seen = []
    inspect_experts(
        model, batches(), ["a", "b"], progress=lambda done, total: seen.append((done, total))
    )
    assert model.training
    assert seen == [(1, 2), (2, 2)]
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ModelError, match="no mixture-of-experts layer"):
        inspect_experts(llama(), batches())
    with pytest.raises(DataError, match="domains must be from 0 to 0"):
        inspect_experts(model, batches())
    with pytest.raises(DataError, match="no token"):
        inspect_experts(model, [])
    with pytest.raises(DataError, match="must have input_ids"):
        inspect_experts(model, [{"text": "x"}])
