"""MoS against PEFT's LoRA, the official code's numbers and closed forms. About a minute."""

import copy
import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bakeoff.errors import DataError
from bakeoff.experts.mixture_of_shards import (
    MoSConfig,
    MoSLinear,
    ShardPool,
    prolora,
    pure_sharing,
    tied_lora,
)
from bakeoff.experts.shard_layout import (
    ShardLayout,
    count_trained_parameters,
    draw_shards,
    shard_layouts,
)

BLOCKS = 8
TOKENS = torch.arange(22).view(2, 11) * 5 % 64
ARMS = {
    "mos": MoSConfig(),
    "lora": MoSConfig(r=2, equivalent_rank=2, private_rank=2),
    "without privatisation": MoSConfig(private_rank=0),
    "without dissociation": MoSConfig(pair_dissociation=False),
    "without sharding": MoSConfig(shards_per_vector=1),
    "subset selection alone": MoSConfig(
        private_rank=0, shards_per_vector=1, pair_dissociation=False
    ),
    "pure sharing": pure_sharing(),
    "tied": tied_lora(r=8),
    "prolora": prolora(),
}


def tiny_llama(seed=0, dtype=torch.float32, blocks=BLOCKS, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).to(dtype).eval()


def fill(model, adapter="default", seed=1, scale=0.3):
    """Give the pools values as after training: B starts at zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pool in model.base_model.shard_pools[adapter].values():
            for parameter in pool.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter))
    return model


def adapted(config=None, seed=0, dtype=torch.float32, **changes):
    return fill(get_peft_model(tiny_llama(seed, dtype, **changes), config or MoSConfig())).eval()


def layers_of(model):
    named = model.base_model.model.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, MoSLinear)}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def same_as_lora(model, **config):
    """Return PEFT's LoRA on an equal base, with the matrices that each layer of `model` uses."""
    layers = layers_of(model)
    first = next(iter(layers.values()))
    lora = get_peft_model(
        copy.deepcopy(model).unload(),
        LoraConfig(
            **({"r": first.r["default"], "lora_alpha": 16, "target_modules": list(layers)} | config)
        ),
    )
    for name, layer in layers.items():
        a, b = layer.lora_matrices("default")
        theirs = lora.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data = a.detach().clone()
        theirs.lora_B["default"].weight.data = b.detach().clone()
    return lora


# --- what it computes --------------------------------------------------------------------------

# The official code (Tied_LoRA.py) on pools (i mod 7) - 3 and (i mod 5) - 2: 3 blocks, 6 inputs, 4
# outputs, r=3, e=2, p=1, l=2, alpha=16, x = (1, -2, 0.5, 3, -1, 2). Outputs are multiplied by 3.
OFFICIAL_INDICES = {
    "A": [[4, 1, 0, 5, 6, 7], [2, 3, 5, 0, 8, 9], [1, 0, 3, 4, 10, 11]],
    "B": [[0, 5, 2, 1, 6, 7], [4, 0, 1, 3, 8, 9], [3, 5, 0, 2, 10, 11]],
}
OFFICIAL_A = [
    [[2, 3, -3, 0, 1, 2], [-3, -2, -1, -2, -1, 0], [1, 2, 3, -3, -2, -1]],
    [[3, -3, -2, -1, 0, 1], [-2, -1, 0, -3, -2, -1], [0, 1, 2, 3, -3, -2]],
    [[0, 1, 2, -3, -2, -1], [-1, 0, 1, 2, 3, -3], [-1, 0, 1, 2, 3, -3]],
]
OFFICIAL_B = [
    [[-2, 2, 0], [-1, -2, 1], [-2, 0, 2], [-1, 1, -2]],
    [[1, 0, -1], [2, 1, 0], [-2, -1, 1], [-1, 0, 2]],
    [[-1, -2, -2], [0, -1, -1], [-2, 2, 0], [-1, -2, 1]],
]
OFFICIAL_OUTPUTS = [[-64, 16, -256, 304], [0, 80, 32, 112], [384, 112, 208, 216]]


def three_linears():
    return nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 4)}) for _ in range(3))}
    ).double()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = three_linears()

    def forward(self, x):
        return torch.stack([block["proj"](x) for block in self.net["blocks"]])


def test_official_codes_matrices_and_outputs():
    config = MoSConfig(r=3, equivalent_rank=2, private_rank=1, shards_per_vector=2, lora_dropout=0)
    base = Stack()
    model = get_peft_model(base, config)
    pool = model.base_model.shard_pools["default"]["proj"]
    assert pool.pool_A.shape == (12, 3)
    assert pool.pool_B.shape == (12, 2)
    # The private part of the table is fixed by the layout; only the public part is drawn.
    assert pool.index_A[:, 4:].tolist() == [row[4:] for row in OFFICIAL_INDICES["A"]]
    assert pool.index_B[:, 4:].tolist() == [row[4:] for row in OFFICIAL_INDICES["B"]]
    pool.index_A.copy_(torch.tensor(OFFICIAL_INDICES["A"]))
    pool.index_B.copy_(torch.tensor(OFFICIAL_INDICES["B"]))
    pool.pool_A.data = (torch.arange(36.0).view(12, 3) % 7 - 3).double()
    pool.pool_B.data = (torch.arange(24.0).view(12, 2) % 5 - 2).double()
    for block, layer in enumerate(layers_of(model).values()):
        a, b = layer.lora_matrices("default")
        assert a.tolist() == OFFICIAL_A[block]
        assert b.tolist() == OFFICIAL_B[block]
    x = torch.tensor([1, -2, 0.5, 3, -1, 2], dtype=torch.float64)
    with torch.no_grad():
        update = model(x)
        with model.disable_adapter():
            update = update - model(x)
    expected = torch.tensor(OFFICIAL_OUTPUTS, dtype=torch.float64) / 3
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ARMS)
def test_outputs_and_gradients_are_those_of_peft_lora(name):
    config = copy.deepcopy(ARMS[name])
    model = adapted(config, dtype=torch.float64)
    lora = same_as_lora(model, lora_dropout=0.1)
    for each in (model, lora):
        each.train()
        torch.manual_seed(5)  # the same dropout masks
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.eval(), lora.eval()
    torch.testing.assert_close(logits(model), logits(lora), rtol=0, atol=1e-12)

    # A pool's gradient is the sum over all uses of a shard of what LoRA's matrices get there.
    for kind, pool in model.base_model.shard_pools["default"].items():
        want_a, want_b = torch.zeros_like(pool.pool_A), torch.zeros_like(pool.pool_B)
        members = [n for n in layers_of(model) if n.endswith(kind)]
        for block, member in enumerate(members):
            theirs = lora.base_model.model.get_submodule(member)
            grad_a = theirs.lora_A["default"].weight.grad
            grad_b = theirs.lora_B["default"].weight.grad.t()
            if pool.scale_rank is not None:
                rows = functional_rows(pool, block)
                scales = pool.scale_rank[block].detach(), pool.scale_out[block].detach()
                want = (grad_a * rows[0]).sum(1), (grad_b * rows[1]).sum(0)
                torch.testing.assert_close(pool.scale_rank.grad[block], want[0])
                torch.testing.assert_close(pool.scale_out.grad[block], want[1])
                grad_a, grad_b = grad_a * scales[0].unsqueeze(1), grad_b * scales[1]
            for index, grad, want in (
                (pool.index_A[block], grad_a, want_a),
                (pool.index_B[block], grad_b, want_b),
            ):
                for position, shard in enumerate(index.tolist()):
                    want[shard] += grad.reshape(len(index), -1)[position]
        torch.testing.assert_close(pool.pool_A.grad, want_a, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(pool.pool_B.grad, want_b, rtol=1e-9, atol=1e-13)


def functional_rows(pool, block):
    """Rows of A and of B transposed before any scaling, by plain indexing."""
    a = pool.pool_A[pool.index_A[block].long()].reshape(pool.r, -1).detach()
    return a, pool.pool_B[pool.index_B[block].long()].reshape(pool.r, -1).detach()


def test_finite_differences():
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, trained_scaling=True)
    layout = shard_layouts(three_linears(), config)[0]
    pool = ShardPool(config, layout).double()
    nn.init.normal_(pool.pool_B)
    x = torch.randn(3, 6, dtype=torch.float64)

    def update(pool_a, pool_b, scale_rank, scale_out):
        values = {
            "pool_A": pool_a,
            "pool_B": pool_b,
            "scale_rank": scale_rank,
            "scale_out": scale_out,
        }
        a, b = torch.func.functional_call(
            MatricesOf(pool), {f"pool.{k}": v for k, v in values.items()}, (1,)
        )
        return x @ a.t() @ b.t()

    start = [each.detach().requires_grad_() for each in (pool.pool_A, pool.pool_B)]
    start += [
        torch.rand(3, 4).double().requires_grad_(),
        torch.rand(3, 4).double().requires_grad_(),
    ]
    assert torch.autograd.gradcheck(update, start)


class MatricesOf(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, block):
        return self.pool.matrices(block)


def test_equal_ranks_make_plain_lora():
    """With e = r = p, every pool row is some layer's own, and training steps coincide with LoRA."""
    config = MoSConfig(r=2, equivalent_rank=2, private_rank=2, lora_dropout=0)
    model = adapted(config, dtype=torch.float64)
    lora = same_as_lora(model)
    for each in (model, lora):
        each.train()
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            each(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
        each.eval()
    torch.testing.assert_close(logits(model), logits(lora), rtol=0, atol=1e-10)
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


def test_pure_sharing_gives_every_block_the_whole_pool():
    model = adapted(pure_sharing(equivalent_rank=1))
    for kind, pool in model.base_model.shard_pools["default"].items():
        for name, layer in layers_of(model).items():
            if name.endswith(kind):
                a, b = layer.lora_matrices("default")
                assert layer.r["default"] == BLOCKS
                assert torch.equal(a, pool.pool_A)
                assert torch.equal(b, pool.pool_B.t())


def test_prolora_is_rolled_copies():
    """Chunk i of A is the first one rolled by i strides along the rank, and so is B's."""
    config = prolora(equivalent_rank=3, unshared_rank=1, chunks=4)  # 8 shared rows, stride 2
    model = adapted(config)
    n_rows = 2 * 4
    for kind, pool in model.base_model.shard_pools["default"].items():
        members = [layer for name, layer in layers_of(model).items() if name.endswith(kind)]
        own = n_rows + 4
        for block, layer in enumerate(members):
            a, b = layer.lora_matrices("default")
            assert a.shape[0] == n_rows + 1
            for matrix, shards in ((a, pool.pool_A), (b.t(), pool.pool_B)):
                rows = shards[block * own : (block + 1) * own]
                rolled = [torch.roll(rows[:n_rows], 2 * i, 0) for i in range(4)]
                assert torch.equal(matrix[:n_rows], torch.cat(rolled, dim=1))
                assert torch.equal(matrix[n_rows], rows[n_rows:].flatten())


def test_updates_have_rank_r_not_e():
    model = adapted(MoSConfig(r=8, equivalent_rank=2), dtype=torch.float64)
    for layer in layers_of(model).values():
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 8
    lora = adapted(MoSConfig(r=2, equivalent_rank=2, private_rank=2), dtype=torch.float64)
    for layer in layers_of(lora).values():
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 2


def test_peft_converts_it_by_singular_values():
    """PEFT's own conversion knows only `get_delta_weight`; at rank r it must lose nothing."""
    model = adapted(dtype=torch.float64)
    _, tensors = peft.convert_to_lora(model, rank=8)
    _, exported = model.to_lora()
    for name, layer in layers_of(model).items():
        key = f"base_model.model.{name}.lora_"
        delta = layer.get_delta_weight("default")
        theirs = tensors[key + "B.weight"] @ tensors[key + "A.weight"]
        ours = exported[key + "B.weight"] @ exported[key + "A.weight"] * 16 / 8
        torch.testing.assert_close(ours, delta, rtol=0, atol=1e-12)
        torch.testing.assert_close(theirs.double(), delta, rtol=0, atol=1e-5)


def test_starts_at_the_base_model():
    model = get_peft_model(tiny_llama(), MoSConfig())
    assert torch.equal(logits(model.eval()), logits(tiny_llama()))


def test_initial_values_follow_the_whole_vector():
    """The official bound for 144 wide shards, four to a vector, is 1 / 24."""
    config = MoSConfig(shards_per_vector=4)
    layout = ShardLayout("q", ("b.0.q", "b.1.q"), 576, 64, 4, 1, 4, 2000, 4, False)
    values = ShardPool(config, layout).pool_A
    bound = 0.041666666666666664
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound
    assert abs(values.std() / (bound / 3**0.5) - 1) < 0.01
    assert abs(values.mean()) < 1e-3


# --- how many parameters -----------------------------------------------------------------------

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("shape", "settings_", "n_trained"),
    [  # the official repository's table
        ({}, {"r": 8, "equivalent_rank": 2}, 4_997_120),
        ({}, {"r": 64, "equivalent_rank": 2, "private_rank": 0}, 4_997_120),
        ({}, {"r": 16, "equivalent_rank": 4}, 9_994_240),
        ({}, {"r": 32, "equivalent_rank": 8, "private_rank": 3}, 19_988_480),
        ({}, {"r": 16, "equivalent_rank": 16, "private_rank": 16}, 39_976_960),
        (LLAMA_3_8B, {"r": 8, "equivalent_rank": 2}, 5_242_880),
        (LLAMA_3_8B, {"r": 8, "equivalent_rank": 1}, 2_621_440),
    ],
)
def test_published_parameter_counts(shape, settings_, n_trained):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    if settings_["equivalent_rank"] == 1:
        settings_ = settings_ | {"private_rank": 0}
    assert count_trained_parameters(model, MoSConfig(**settings_)) == n_trained


@pytest.mark.parametrize("name", ARMS)
def test_counts_before_and_after_building_agree(name):
    config = copy.deepcopy(ARMS[name])
    announced = count_trained_parameters(tiny_llama(), config)
    model = get_peft_model(tiny_llama(), config)
    assert model.get_nb_trainable_parameters()[0] == announced
    if name == "tied":
        outputs = 32 + 16 + 16 + 32 + 48 + 48 + 32
        pair = 8 * (32 + 32 + 32 + 32 + 32 + 32 + 48 + outputs)
        assert announced == pair + BLOCKS * (7 * 8 + outputs)
    else:
        lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
        assert announced == lora.get_nb_trainable_parameters()[0]


# --- which shards ------------------------------------------------------------------------------


@st.composite
def budgets(draw):
    blocks = draw(st.integers(2, 6))
    parts = draw(st.sampled_from([1, 2, 4]))
    equivalent = draw(st.integers(1, 4))
    private = draw(st.integers(0, equivalent))
    most = (equivalent - private) * blocks + private
    r = draw(st.integers(equivalent, max(most, equivalent)))
    return blocks, MoSConfig(
        r=r,
        equivalent_rank=equivalent,
        private_rank=private,
        shards_per_vector=parts,
        seed=draw(st.integers(0, 99)),
        pair_dissociation=draw(st.booleans()),
    )


@given(budgets())
@settings(max_examples=60, deadline=None)
def test_table_of_shards(budget):
    blocks, config = budget
    r, e, p = config.r, config.equivalent_rank, config.private_rank
    parts = config.shards_per_vector
    linears = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 4)}) for _ in range(blocks))
    layout = shard_layouts(linears, config)[0]
    assert layout.n_shards == e * blocks * parts
    assert layout.n_parameters == e * blocks * (8 + 4)
    public = (e - p) * blocks * parts
    tables = draw_shards(config, layout)
    for table in tables:
        assert table.shape == (blocks, r * parts)
        assert table.dtype == torch.int64
        for block, row in enumerate(table.tolist()):
            assert len(set(row)) == len(row)  # drawn without replacement
            shared, private = row[: (r - p) * parts], row[(r - p) * parts :]
            assert all(0 <= shard < public for shard in shared)
            start = public + block * p * parts
            assert private == list(range(start, start + p * parts))
    if not config.pair_dissociation:
        assert torch.equal(*tables)
    again = draw_shards(copy.deepcopy(config), layout)
    assert all(torch.equal(a, b) for a, b in zip(tables, again, strict=True))


def test_draws_are_uniform_and_independent():
    """Every public shard is used equally often by A, and B's choice tells nothing about A's."""
    config = MoSConfig(r=3, equivalent_rank=2, private_rank=0, shards_per_vector=1)
    layout = shard_layouts(
        nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(5)), config
    )[0]
    joint = torch.zeros(10, 10)
    n_draws = 2000
    for seed in range(n_draws):
        config.seed = seed
        for a, b in zip(*draw_shards(config, layout), strict=True):
            joint[a[0], b[0]] += 1  # the first pair of each block
    expected = n_draws * 5 / 100
    chi_square = float(((joint - expected) ** 2 / expected).sum())
    assert 60 < chi_square < 150  # 99 degrees of freedom: mean 99, standard deviation 14


def test_seeds_and_kinds():
    def tables(config):
        pools = get_peft_model(tiny_llama(), config).base_model.shard_pools["default"]
        return {kind: (pool.index_A, pool.index_B, pool.pool_A) for kind, pool in pools.items()}

    def equal(one, other):
        return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]

    torch.manual_seed(0)
    everything = tables(MoSConfig())
    torch.manual_seed(7)  # the global generator has no say
    two_kinds = tables(MoSConfig(target_modules=["q_proj", "down_proj"]))
    assert set(two_kinds) == {"q_proj", "down_proj"}
    for kind, found in two_kinds.items():
        assert all(equal(found, everything[kind]))
    other_seed = tables(MoSConfig(seed=1))
    assert not any(equal(other_seed["q_proj"], everything["q_proj"]))
    assert not any(equal(everything["gate_proj"], everything["up_proj"]))  # equal shapes
    state = torch.get_rng_state()
    tiny = tiny_llama()
    before = torch.get_rng_state()
    get_peft_model(tiny, MoSConfig())
    assert torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(state)


def test_kinds_are_told_apart_by_their_names():
    """GPT-2 calls two layers of different shape c_proj; its Conv1D weights lie transposed."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=64)).eval()
    model = fill(get_peft_model(copy.deepcopy(gpt2), MoSConfig(r=5))).eval()
    pools = model.base_model.shard_pools["default"]
    assert set(pools) == {"c_attn", "attn-c_proj", "c_fc", "mlp-c_proj"}
    assert pools["mlp-c_proj"].pool_A.shape == (2 * 4 * 4, 64 // 4)
    want = logits(model)
    assert (want - logits(gpt2)).abs().max() > 0.01
    torch.testing.assert_close(logits(same_as_lora(model, fan_in_fan_out=True)), want)
    config, _ = model.to_lora()
    assert config.fan_in_fan_out
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-5, atol=1e-5)


def test_kinds_may_differ_in_number():
    """Layers that only some blocks have get a pool, and with r=None a rank, of their own."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in (1, 4)]
    chosen = MoSConfig(
        r=None,
        equivalent_rank=1,
        private_rank=0,
        selection="all",
        target_modules=[*names, "q_proj"],
    )
    model = adapted(chosen)
    ranks = {name: layer.r["default"] for name, layer in layers_of(model).items()}
    assert {rank for name, rank in ranks.items() if "up_proj" in name} == {2}
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {BLOCKS}
    config, tensors = model.to_lora()
    assert config.r == BLOCKS
    assert config.rank_pattern == dict.fromkeys(names, 2)
    lora = get_peft_model(tiny_llama(), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(logits(lora), logits(model))


# --- as a PEFT tuner ---------------------------------------------------------------------------


def test_trains_the_pools_and_nothing_else():
    model = get_peft_model(tiny_llama(), MoSConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 14  # two pools per kind, each once
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {name for name in before if "pool_" in name}


def test_gradient_checkpointing_changes_nothing():
    plain, saving = (adapted(MoSConfig(lora_dropout=0), dtype=torch.float64) for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (plain, saving):
        each.train()
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    pools = plain.base_model.shard_pools, saving.base_model.shard_pools
    for one, other in zip(*(each.parameters() for each in pools), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_state_dict_and_copies_hold_each_pool_once():
    model = adapted()
    keys = [name for name in model.state_dict() if "pool_" in name]
    assert len(keys) == 14
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    fill(twin, seed=3)
    pool = twin.base_model.shard_pools["default"]["q_proj"]
    layer = layers_of(twin)["model.layers.2.self_attn.q_proj"]
    assert layer.shard_pools["default"] is pool
    assert not torch.equal(logits(twin), logits(model))


LOAD = """
import sys, torch
from transformers import LlamaForCausalLM
{extra}
from peft import PeftModel
base = LlamaForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
tokens = torch.arange(22).view(2, 11) * 5 % 64
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, {out!r})
assert ("bakeoff" in sys.modules) == {ours}
assert not any(p.requires_grad for p in model.parameters())
"""


@pytest.mark.parametrize("plain_lora", [False, True])
def test_loads_in_a_new_process(tmp_path, plain_lora):
    model = adapted(MoSConfig(task_type="CAUSAL_LM"))
    folder = tmp_path / "adapter"
    if plain_lora:
        model.to_lora(folder)
    else:
        model.save_pretrained(folder)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
        pools = sum(n for name, n in sizes.items() if ".pool_" in name)
        assert pools == model.get_nb_trainable_parameters()[0]
        assert sum(sizes.values()) - pools == 7 * BLOCKS * 2 * 8 * 4  # 2 r l integers per layer
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == (
        "LORA" if plain_lora else "MIXTURE_OF_SHARDS"
    )
    tiny_llama().save_pretrained(tmp_path / "base")
    script = LOAD.format(
        extra="" if plain_lora else "import bakeoff.experts.mixture_of_shards",
        base=str(tmp_path / "base"),
        adapter=str(folder),
        out=str(tmp_path / "logits.pt"),
        ours=not plain_lora,
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_saves_and_loads(tmp_path, name, low_memory):
    model = adapted(copy.deepcopy(ARMS[name]))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys it misses
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded.eval()), logits(model))
    resumed = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert resumed.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_kinds_whose_names_end_alike(tmp_path):
    def net():
        torch.manual_seed(0)
        block = {"out_proj": nn.Linear(8, 4), "proj": nn.Linear(4, 8)}
        return nn.Sequential(*(nn.ModuleDict(copy.deepcopy(block)) for _ in range(8)))

    config = MoSConfig(target_modules=["out_proj", "proj"])
    model = fill(get_peft_model(net(), config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    for name, layer in layers_of(model).items():
        delta = layers_of(loaded)[name].get_delta_weight("default")
        assert torch.equal(delta, layer.get_delta_weight("default"))


def test_kinds_named_like_a_dictionarys_methods(tmp_path):
    def net():
        torch.manual_seed(0)
        block = {"att": nn.Module()}
        block["att"].keys, block["att"].values = nn.Linear(8, 4), nn.Linear(4, 8)
        return nn.Sequential(*(nn.ModuleDict(copy.deepcopy(block)) for _ in range(8)))

    model = fill(get_peft_model(net(), MoSConfig(target_modules=["keys", "values"])))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert len(layers_of(loaded)) == 16
    for name, layer in layers_of(model).items():
        delta = layers_of(loaded)[name].get_delta_weight("default")
        assert torch.equal(delta, layer.get_delta_weight("default"))


def test_indices_come_from_the_file_not_from_the_seed(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    settings_ = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_ | {"seed": 99}))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging(dtype):
    model = adapted(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter(safe_merge=True)
    merged = logits(model)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(merged, want, rtol=0, atol=tolerance)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # bit for bit
    assert torch.equal(logits(model), want)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges by itself
        assert torch.equal(logits(model), base)
    unloaded = model.merge_and_unload()
    assert type(unloaded) is LlamaForCausalLM
    assert not any(isinstance(each, MoSLinear) for each in unloaded.modules())
    torch.testing.assert_close(logits(unloaded), merged, rtol=0, atol=0)


def test_merging_rounds_once():
    """The merged bfloat16 weight is the float64 sum, rounded; not a sum of rounded parts."""
    model = adapted(dtype=torch.bfloat16)
    assert model.base_model.shard_pools["default"]["q_proj"].pool_A.dtype == torch.float32
    for layer in layers_of(model).values():
        a, b = (each.double() for each in layer.lora_matrices("default"))
        exact = layer.base_layer.weight.double() + b @ a * 2
        layer.merge()
        off = (layer.base_layer.weight.double() - exact).abs() / exact.abs().clamp_min(1e-6)
        assert off.max() <= 2**-8 * (1 + 1e-4)  # half a unit in the last place
        assert float((layer.base_layer.weight == exact.to(torch.bfloat16)).float().mean()) > 0.99


def test_safe_merge_refuses_broken_adapters():
    model = adapted()
    pool = model.base_model.shard_pools["default"]["v_proj"]
    pool.pool_B.data[:] = torch.nan
    with pytest.raises(DataError, match="'default' is broken"):
        model.merge_adapter(safe_merge=True)


def test_several_adapters():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", MoSConfig(r=4, seed=3, target_modules=["q_proj", "v_proj"]))
    fill(model, "second", seed=9)
    assert torch.equal(logits(model), first)  # added, not active
    pools = model.base_model.shard_pools
    assert not any(p.requires_grad for p in pools["second"].parameters())
    assert all(p.requires_grad for p in pools["default"].parameters())

    model.set_adapter("second")
    second = logits(model)
    assert all(p.requires_grad for p in pools["second"].parameters())
    assert not any(p.requires_grad for p in pools["default"].parameters())
    alone = get_peft_model(
        tiny_llama(), MoSConfig(r=4, seed=3, target_modules=["q_proj", "v_proj"])
    )
    assert torch.equal(logits(fill(alone, seed=9).eval()), second)

    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)

    with pytest.raises(DataError, match="adapter_name must name one of"):
        model.to_lora()
    with pytest.raises(DataError, match="'third' is not an adapter of this model"):
        model.to_lora(adapter_name="third")
    config, _ = model.to_lora(adapter_name="second")
    assert config.r == 4

    model.set_adapter("default")
    model.delete_adapter("second")
    assert "second" not in model.base_model.shard_pools
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_mixed_batches_are_refused():
    """PEFT drops `adapter_names` where a tuner does not take it: all rows would get one adapter."""
    model = adapted()
    model.add_adapter("second", MoSConfig(r=4, seed=3))
    for call in (model, model.generate):
        with pytest.raises(DataError, match=r"adapter_names: .* cannot be mixed in one batch"):
            call(input_ids=TOKENS, adapter_names=["default", "second"])
    assert torch.equal(logits(model), logits(adapted()))


def test_another_adapter_leaves_a_frozen_one_frozen(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model.load_adapter(tmp_path, "again", is_trainable=True)
    pools = model.base_model.shard_pools
    assert not any(p.requires_grad for p in pools["default"].parameters())
    assert all(p.requires_grad for p in pools["again"].parameters())


def test_saves_several_adapters_apart(tmp_path):
    model = adapted()
    model.add_adapter("q_only", MoSConfig(r=4, target_modules=["q_proj"]))
    fill(model, "q_only", seed=4)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "q_only" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in names} == {"q_proj"}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "q_only").eval()
    model.set_adapter("q_only")
    assert torch.equal(logits(loaded), logits(model))
    model.set_adapter("default")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_failed_adapter_leaves_the_model_alone():
    model = adapted()
    want = logits(model)
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("bad", MoSConfig(target_modules=["nothing"]))
    with pytest.raises(DataError, match="does not divide"):
        model.add_adapter("bad", MoSConfig(shards_per_vector=5))
    assert set(model.base_model.shard_pools) == {"default"}
    assert torch.equal(logits(model), want)
    model.add_adapter("bad", MoSConfig())  # the name is free again


def test_types_of_the_base_and_of_the_adapter():
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), MoSConfig())
    pools = model.base_model.shard_pools["default"]
    assert {p.dtype for p in pools.parameters()} == {torch.float32}
    assert {b.dtype for b in pools.buffers()} == {torch.int32}
    assert logits(model).dtype == torch.bfloat16
    narrow = get_peft_model(
        tiny_llama(dtype=torch.bfloat16), MoSConfig(), autocast_adapter_dtype=False
    )
    narrow_pools = narrow.base_model.shard_pools["default"]
    assert {p.dtype for p in narrow_pools.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow_pools["q_proj"].index_A, pools["q_proj"].index_A)


def test_further_modules_are_trained_saved_and_exported(tmp_path):
    model = adapted(MoSConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    want = logits(model)
    model.save_pretrained(tmp_path / "mos")
    model.to_lora(tmp_path / "lora")
    for folder in ("mos", "lora"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-6)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 1, "equivalent_rank": 2}, "r=1 is less than equivalent_rank=2"),
        ({"private_rank": 3}, "private_rank=3 is more than the whole budget"),
        ({"r": 4, "equivalent_rank": 2, "private_rank": 2}, "leaves no public shards"),
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 8.0}, "r must be an integer"),
        ({"equivalent_rank": True}, "equivalent_rank must be an integer"),
        ({"private_rank": -1}, "private_rank must be an integer of at least 0"),
        ({"shards_per_vector": 0}, "shards_per_vector must be an integer of at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"selection": "best"}, "selection must be one of subset, all, rotation"),
        ({"pair_dissociation": "no"}, "pair_dissociation must be True or False"),
        ({"equivalent_rank": None}, "equivalent_rank=None is derived from r"),
        (
            {"equivalent_rank": None, "r": None, "selection": "all"},
            "equivalent_rank=None is derived",
        ),
        (
            {"equivalent_rank": None, "r": 2, "private_rank": 3, "selection": "all"},
            "is more than r=2",
        ),
        ({"layers_pattern": "layers"}, "give both"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(DataError, match=message):
        MoSConfig(**arguments)


def test_not_enough_public_shards():
    """(r - p) must not exceed (e - p) L: 8 public vectors here."""
    get_peft_model(tiny_llama(), MoSConfig(r=BLOCKS + 1))
    with pytest.raises(DataError, match=r"q_proj: r=10 takes 9 public vectors.*at most 9"):
        get_peft_model(tiny_llama(), MoSConfig(r=BLOCKS + 2))


def test_ranks_that_contradict_each_other():
    with pytest.raises(DataError, match="equivalent_rank=2 means r=16, got r=8"):
        get_peft_model(tiny_llama(), pure_sharing(r=8))
    with pytest.raises(DataError, match="equivalent_rank=2 means r=5, got r=8"):
        get_peft_model(tiny_llama(), prolora(r=8))


def test_indivisible_sizes_name_the_module():
    with pytest.raises(
        DataError, match=r"does not divide in_features=32 of model.layers.0.self_at"
    ):
        get_peft_model(tiny_llama(), MoSConfig(shards_per_vector=3))
    with pytest.raises(DataError, match=r"out_features=16 of model\.layers\.0\.self_attn\.k_proj"):
        get_peft_model(tiny_llama(), MoSConfig(shards_per_vector=32))


def test_one_kind_of_several_shapes():
    model = tiny_llama()
    model.model.layers[3].mlp.up_proj = nn.Linear(32, 52, bias=False)
    with pytest.raises(DataError, match=r"32 to 48 and model\.layers\.3\.mlp\.up_proj maps 32 to"):
        get_peft_model(model, MoSConfig())


def test_a_single_layer_has_nobody_to_share_with():
    with pytest.warns(UserWarning, match="there is nobody to share with"):
        get_peft_model(tiny_llama(blocks=1), MoSConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(blocks=1), prolora())
        get_peft_model(tiny_llama(blocks=1), MoSConfig(r=2, private_rank=2))


def test_tied_layers():
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(DataError, match=r"lm_head is tied: it is also model\.embed_tokens\.weight"):
        get_peft_model(model, MoSConfig(target_modules=["q_proj", "lm_head"]))
    get_peft_model(model, MoSConfig())  # all-linear leaves the head out
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(DataError, match="is tied"):
        get_peft_model(model, MoSConfig())


class Packed(nn.Linear):
    """As bitsandbytes does: a linear layer whose weight holds packed integers."""

    def __init__(self):
        super().__init__(32, 32)
        self.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)


class Subclassed(nn.Linear):
    """As torchao does: a weight that is a tensor subclass."""

    def __init__(self):
        super().__init__(32, 32)
        self.weight = nn.Parameter(torch.zeros(32, 32).as_subclass(Wrapped), requires_grad=False)


class Wrapped(torch.Tensor):
    pass


def eight_bit_float():
    return nn.Linear(32, 32).requires_grad_(False).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("make", [Packed, Subclassed, eight_bit_float])
def test_quantised_layers(make):
    model = tiny_llama()
    model.model.layers[2].self_attn.q_proj = make()
    with pytest.raises(DataError, match=r"layers\.2\.self_attn\.q_proj .* is quantised"):
        get_peft_model(model, MoSConfig())


def test_layers_that_are_not_linear():
    with pytest.raises(DataError, match=r"embed_tokens \(Embedding\) is not a linear layer"):
        get_peft_model(tiny_llama(), MoSConfig(target_modules=["embed_tokens"]))
    attention = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(8))
    with pytest.raises(DataError, match="inside torch's MultiheadAttention"):
        get_peft_model(attention, MoSConfig(target_modules=["out_proj"]))


def test_a_model_that_is_already_adapted():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DataError, match=r"q_proj already carries a lora adapter"):
        shard_layouts(model.base_model.model, MoSConfig())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("mos", MoSConfig())


def test_injection_without_a_tuner_is_refused():
    """PEFT's low-level entry keeps the layers only; the pools would be lost."""
    with pytest.raises(ValueError, match="shared"):
        peft.inject_adapter_in_model(MoSConfig(), tiny_llama())


def damage_index(tensors):
    tensors["base_model.shard_pools.q_proj.index_A"][0, 0] = 10**6


def damage_shape(tensors):
    key = "base_model.shard_pools.k_proj.pool_B"
    tensors[key] = tensors[key][1:].clone()


def damage_missing(tensors):
    del tensors["base_model.shard_pools.v_proj.pool_B"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "index_A of the layers q_proj is damaged: entries must be integers from 0"),
        (damage_shape, r"pool_B of the layers k_proj has shape \(63, 4\), .* need \(64, 4\)"),
        (damage_missing, "the saved adapter has no pool_B for the layers v_proj"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
