"""Experts by domain: equal to the dense model at first, to the official block, to one expert."""

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tests.embedding.small_models import TEXTS, WORDS, drawn, llama, tokenizer
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from bakeoff.data.citations import LabelledPairs
from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.cocitation_training import evaluate_pairs, train_cocitation
from bakeoff.embedding.domain_encoder import (
    DomainEncoder,
    DomainText,
    TanhPooling,
    add_domain_tokens,
    encode_domains,
    with_domains,
)
from bakeoff.embedding.domain_experts import (
    DomainExperts,
    extract_domain,
    load_domain_experts,
    routed,
    routing_loss,
    save_domain_experts,
    to_domain_experts,
    widen_feed_forward,
)
from bakeoff.embedding.ranking_losses import MNRLoss, MNRPlusLoss
from bakeoff.errors import DataError, ModelError

DOMAINS = ["copd", "cvd", "skin"]
IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 2, 0], [1, 10, 2, 0, 0], [1, 7, 7, 7, 2]])
MASK = (IDS != 0).long()


def bert():
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(WORDS) + 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return BertModel(BertConfig(**shape, max_position_embeddings=64)).eval()


def roberta():
    torch.manual_seed(0)
    return XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=66, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def modernbert():
    torch.manual_seed(0)
    return ModernBertModel(
        ModernBertConfig(
            vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
            sep_token_id=2,
        )
    ).eval()  # fmt: skip


MODELS = {"bert": bert, "xlm-roberta": roberta, "modernbert": modernbert, "llama": llama}


def shaken(model, seed=1):
    """Change every parameter, so that experts differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def states(model, ids=IDS, mask=MASK, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).last_hidden_state


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_dense_model_at_first(kind):
    dense = states(MODELS[kind]())
    model = to_domain_experts(MODELS[kind](), DOMAINS)
    for domain in range(3):
        assert torch.equal(states(model, expert_ids=torch.full((4,), domain)), dense)
    assert torch.allclose(states(model, expert_ids=[2, 0, 1, 2]), dense, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch_is_each_sequence_by_its_own_expert(kind):
    model = shaken(to_domain_experts(MODELS[kind](), DOMAINS))
    ids = [2, 0, 1, 2]
    mixed = states(model, expert_ids=ids)
    for row, domain in enumerate(ids):
        dense = extract_domain(model, DOMAINS[domain])
        length = int(MASK[row].sum())
        alone = states(dense, IDS[row : row + 1, :length], MASK[row : row + 1, :length])
        assert torch.allclose(mixed[row, :length], alone[0], atol=1e-4)
    others = states(model, expert_ids=[0, 0, 1, 2])
    assert not torch.allclose(mixed[0], others[0], atol=1e-2)
    assert torch.allclose(mixed[1:], others[1:], atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded(kind, tmp_path):
    model = shaken(to_domain_experts(MODELS[kind](), DOMAINS, layers=[1]))
    save_domain_experts(model, tmp_path)
    assert torch.equal(
        states(load_domain_experts(tmp_path), expert_ids=[2, 0, 1, 2]),
        states(model, expert_ids=[2, 0, 1, 2]),
    )


def test_experts_and_shared_parameters():
    model = to_domain_experts(bert(), DOMAINS)
    experts = [module for module in model.modules() if isinstance(module, DomainExperts)]
    assert len(experts) == 3
    mlp = 2 * 16 * 24 + 24 + 16
    dense = sum(parameter.numel() for parameter in bert().parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == dense + 2 * 3 * mlp
    middle = to_domain_experts(bert(), DOMAINS, layers=[-2])
    assert [isinstance(layer.intermediate, DomainExperts) for layer in middle.encoder.layer] == [
        False,
        True,
        False,
    ]
    assert middle.domain_experts.layers == (1,)


def test_gradients_reach_the_own_experts_only():
    model = to_domain_experts(bert(), DOMAINS).train()
    output = model(input_ids=IDS, attention_mask=MASK, expert_ids=[2, 0, 0, 2])
    output.last_hidden_state.square().sum().backward()
    for layer in model.encoder.layer:
        reached = [
            [parameter.grad is not None for parameter in expert.parameters()]
            for expert in layer.intermediate.experts
        ]
        assert [all(flags) for flags in reached] == [True, False, True]
        assert not any(reached[1])
        assert layer.attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_uses_the_experts_of_its_own_pass(kind, reentrant):
    def gradients(checkpointing):
        model = shaken(to_domain_experts(MODELS[kind](), DOMAINS))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        embedded = model.get_input_embeddings()(IDS)
        first = model(inputs_embeds=embedded, attention_mask=MASK, expert_ids=[2, 0, 1, 2])
        second = model(inputs_embeds=embedded, attention_mask=MASK, expert_ids=[0, 0, 1, 1])
        (first.last_hidden_state * second.last_hidden_state).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, checkpointed, strict=True))


# --- the official blocks ----------------------------------------------------------------------

# First entries of each sequence, and the sum of all absolute values, that models/moe_blocks.py of
# Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity gives, newest and first version.
OFFICIAL = {
    "enforced": (
        [3.450563669204712, 1.3843023777008057, -1.5926249027252197, -1.5466032028198242,
         0.870394229888916], 136.73904418945312,
    ),
    "switch": (
        [-0.22107988595962524, 0.6620264053344727, -0.8331847190856934, 0.7213154435157776,
         0.870394229888916], 117.88468933105469,
    ),
    "topk": (
        [0.957603931427002, 0.5732080340385437, -0.4788326323032379, 0.02817147970199585,
         0.2664927542209625], 71.99628448486328,
    ),
    "token_topk": (
        [0.43881750106811523, 0.5856993198394775, -0.007838413119316101, 0.026196569204330444,
         0.3585577607154846], 103.17294311523438,
    ),
}  # fmt: skip


class Block(nn.Module):
    """A model of one block, as far as `routed` needs one."""

    def __init__(self, routing):
        super().__init__()
        experts = [nn.Linear(8, 8) for _ in range(4)]
        with torch.no_grad():
            for number, expert in enumerate(experts):
                expert.weight.copy_(drawn(20, (4, 8, 8), 0.4)[number])
                expert.bias.copy_(drawn(21, (4, 8), 0.4)[number])
        self.block = DomainExperts(experts, 8, routing=routing, top_k=2)
        if self.block.gate is not None:
            self.block.gate.weight.data.copy_(drawn(22, (4, 8), 0.6))
        names = ("a", "b", "c", "d")
        self.domain_experts = to_domain_experts(bert(), names, routing=routing).domain_experts

    def run(self, hidden, ids=None, mask=None):
        with torch.no_grad(), routed(self, ids, hidden, mask):
            return self.block(hidden)


@pytest.mark.parametrize("routing", OFFICIAL)
def test_official_blocks(routing):
    first, total = OFFICIAL[routing]
    output = Block(routing).run(drawn(23, (5, 3, 8)), [2, 0, 1, 0, 2])
    assert output[:, 0, 0].tolist() == pytest.approx(first, rel=1e-5, abs=1e-6)
    assert float(output.abs().sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("routing", ["switch", "topk", "token_topk"])
def test_padding_does_not_route(routing):
    hidden = drawn(23, (5, 3, 8))
    expected = Block(routing).run(hidden)
    padded = torch.cat([hidden, torch.full((5, 2, 8), torch.nan)], dim=1)
    padded[:, 4] = 1e3
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 5)
    assert torch.allclose(Block(routing).run(padded, mask=mask)[:, :3], expected, atol=1e-5)


def test_routers_begin_by_their_seed():
    def gates(seed):
        model = to_domain_experts(bert(), DOMAINS, routing="switch", seed=seed)
        return torch.stack([layer.intermediate.gate.weight for layer in model.encoder.layer])

    first = gates(1)
    assert torch.equal(first, gates(1))
    assert not torch.equal(first, gates(2))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("routing", ["switch", "topk", "token_topk"])
def test_learned_routing_in_a_model(routing, tmp_path):
    model = shaken(to_domain_experts(bert(), DOMAINS, routing=routing, seed=3))
    whole = states(model)
    for row in range(4):
        length = int(MASK[row].sum())
        alone = states(model, IDS[row : row + 1, :length], MASK[row : row + 1, :length])
        assert torch.allclose(whole[row, :length], alone[0], atol=1e-4)
    save_domain_experts(model, tmp_path)
    assert torch.equal(states(load_domain_experts(tmp_path)), whole)


def test_routing_losses_in_closed_form():
    model = to_domain_experts(bert(), DOMAINS, routing="switch")
    with pytest.raises(ModelError, match="make a forward pass first"):
        routing_loss(model, [0, 1, 2, 0])
    for block in (layer.intermediate for layer in model.encoder.layer):
        nn.init.zeros_(block.gate.weight)
    model(input_ids=IDS, attention_mask=MASK)
    domains = [0, 1, 2, 0]
    assert float(routing_loss(model, domains)) == pytest.approx(np.log(3))
    assert float(routing_loss(model, kind="balance")) == pytest.approx(1)
    assert float(routing_loss(model, domains, kind="mutual_information")) == pytest.approx(
        0, abs=1e-6
    )
    sure = 50 * torch.eye(3)[domains]
    for block in (layer.intermediate for layer in model.encoder.layer):
        block.router_logits = sure.clone().requires_grad_()
    assert float(routing_loss(model, domains)) == pytest.approx(0, abs=1e-6)
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    assert float(routing_loss(model, domains, kind="mutual_information")) == pytest.approx(-entropy)
    with pytest.raises(DataError, match="domain_ids is missing"):
        routing_loss(model)


def test_official_balance_loss():
    # LoadBalancingLoss and the cross-entropy of SpecifiedExpertLoss, first version of the code.
    model = to_domain_experts(bert(), [*DOMAINS, "more"], routing="switch", layers=[0, 1])
    blocks = [model.encoder.layer[index].intermediate for index in (0, 1)]
    for number, block in zip((30, 31), blocks, strict=True):
        block.router_logits = drawn(number, (6, 4))
    assert float(routing_loss(model, kind="balance")) == pytest.approx(1.122046947479248)
    assert float(routing_loss(model, [0, 1, 2, 3, 0, 1])) == pytest.approx(1.3177622556686401)


def test_threads_do_not_mix_their_domains():
    model = shaken(to_domain_experts(bert(), DOMAINS))
    plans = [[0, 1, 2, 0], [2, 2, 1, 0], [1, 1, 1, 1], [0, 0, 2, 2]] * 10
    expected = [states(model, expert_ids=plan) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda plan: states(model, expert_ids=plan), plans))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_copies_and_pickles():
    model = shaken(to_domain_experts(bert(), DOMAINS))
    expected = states(model, expert_ids=[2, 0, 1, 2])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(states(other, expert_ids=[2, 0, 1, 2]), expected)
    learned = to_domain_experts(bert(), DOMAINS, routing="topk")
    learned(input_ids=IDS)
    copy.deepcopy(learned)


def test_half_a_block_is_no_block():
    shape = {"vocab_size": 17, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    model = AlbertModel(AlbertConfig(**shape, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ModelError, match="no feed-forward block found in AlbertModel"):
        to_domain_experts(model, DOMAINS)


def test_bad_input():
    with pytest.raises(DataError, match="at least 2, got"):
        to_domain_experts(bert(), ["one"])
    with pytest.raises(DataError, match="distinct"):
        to_domain_experts(bert(), ["a", "a"])
    with pytest.raises(DataError, match="routing must be one of"):
        to_domain_experts(bert(), DOMAINS, routing="random")
    with pytest.raises(DataError, match="top_k must be between 1 and 3"):
        to_domain_experts(bert(), DOMAINS, routing="topk", top_k=4)
    with pytest.raises(DataError, match="layers must be 'all' or indices from -3 to 2, got"):
        to_domain_experts(bert(), DOMAINS, layers=[3])
    model = to_domain_experts(bert(), DOMAINS)
    with pytest.raises(ModelError, match="experts already"):
        to_domain_experts(model, DOMAINS)
    with pytest.raises(DataError, match="expert_ids is missing: give the domain"):
        states(model)
    with pytest.raises(DataError, match=r"must be \(4,\), one per sequence, got \(3,\)"):
        states(model, expert_ids=[0, 1, 2])
    with pytest.raises(DataError, match="between 0 and 2, got values from 0 to 3"):
        states(model, expert_ids=[0, 1, 2, 3])
    with pytest.raises(DataError, match=r"integers, got dtype torch\.float32"):
        states(model, expert_ids=torch.ones(4))
    with pytest.raises(DataError, match="call the model itself"):
        model.encoder.layer[0](torch.zeros(1, 2, 16))
    with pytest.raises(DataError, match="unknown domain 'x'; known are copd, cvd, skin"):
        extract_domain(model, "x")
    with pytest.raises(ModelError, match="has no domain experts"):
        extract_domain(bert(), "copd")

    class Odd(nn.Module):
        layers = None

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(ModelError, match=r"no feed-forward block found in Odd: .*'Linear'"):
        to_domain_experts(Odd(), DOMAINS)


def test_damaged_folders(tmp_path):
    with pytest.raises(ModelError, match="holds no model with domain experts"):
        load_domain_experts(tmp_path)
    save_domain_experts(to_domain_experts(bert(), DOMAINS), tmp_path)
    settings = tmp_path / "domain_experts.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "domains": ["a", "b"]}))
    with pytest.raises(ModelError, match="does not fit the model"):
        load_domain_experts(tmp_path)
    settings.write_text(json.dumps({**content, "model_class": "pipeline"}))
    with pytest.raises(ModelError, match="no model class 'pipeline'"):
        load_domain_experts(tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_wider_blocks_give_what_they_gave_before_and_save_as_ever(kind, tmp_path):
    model = MODELS[kind]()
    before = states(model)
    n_before = sum(parameter.numel() for parameter in model.parameters())
    widen_feed_forward(model, 3)
    assert torch.allclose(states(model), before, atol=1e-5)
    experts = to_domain_experts(MODELS[kind](), DOMAINS)
    n_experts = sum(parameter.numel() for parameter in experts.parameters())
    n_wide = sum(parameter.numel() for parameter in model.parameters())
    assert n_before < n_wide <= n_experts < 1.02 * n_wide  # the writers' biases are not wider
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(states(again), before, atol=1e-5)
    model.train()
    model(input_ids=IDS, attention_mask=MASK).last_hidden_state.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("output.dense.weight", "Wo.weight", "down_proj.weight")) and (
            parameter.shape[1] == 3 * 24  # what reads the new units: they say something
        ):
            assert (parameter.grad[:, 24:].abs().sum(dim=0) > 0).all()
    with pytest.raises(DataError, match="factor must be at least 2"):
        widen_feed_forward(model, 1)


# --- sentence-transformers --------------------------------------------------------------------


def encoder(folder, *, make=bert, experts=True, tokens=True, **options):
    """Return a small encoder for three domains."""
    tokenizer_options = {key: options.pop(key) for key in ("padding_side", "bos") if key in options}
    make().save_pretrained(folder)
    tokenizer(**tokenizer_options).save_pretrained(folder)
    base = SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(16, "mean")], device="cpu"
    ).eval()
    return DomainEncoder.from_model(base, DOMAINS, experts=experts, domain_tokens=tokens, **options)


def shaken_encoder(folder, **options):
    model = encoder(folder, **options)
    shaken(model[0].auto_model)
    return model


def test_encode_gives_each_text_what_it_gets_alone(tmp_path):
    model = shaken_encoder(tmp_path)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(90)]
    domain = [DOMAINS[number % 3] for number in range(90)]
    alone = np.stack(
        [model.encode(text, domain=name) for text, name in zip(texts, domain, strict=True)]
    )
    # Without further wishes texts take a quicker way on a CPU; it must not show.
    for options in ({}, {"batch_size": 7}, {"convert_to_tensor": True}):
        vectors = model.encode(texts, domain=domain, **options)
        assert type(vectors) is (torch.Tensor if "convert_to_tensor" in options else np.ndarray)
        assert np.allclose(np.asarray(vectors), alone, atol=1e-5)
    model.truncate_dim = 5
    assert np.allclose(model.encode(texts, domain=domain), alone[:, :5], atol=1e-5)
    assert model.encode([], domain=[]).shape == (0,)


def test_a_new_encoder_gives_what_the_model_gave(tmp_path):
    model = encoder(tmp_path)
    dense = SentenceTransformer(
        modules=[Transformer(str(tmp_path)), Pooling(16, "mean")], device="cpu"
    )
    expected = dense.encode(list(TEXTS))
    # The token begins as a copy of the one that it replaces.
    assert np.allclose(model.encode(list(TEXTS), domain="cvd"), expected, atol=1e-5)
    assert np.allclose(
        model.encode(list(TEXTS), domain=["skin", "copd", "cvd", "copd"]), expected, atol=1e-5
    )


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
def test_one_domain_each_is_one_domain_at_a_time(tmp_path, make, side, experts, tokens):
    model = shaken_encoder(
        tmp_path, make=make, padding_side=side, experts=experts, tokens=tokens, bos=make is bert
    )
    domains = ["skin", "copd", "cvd", "copd"]
    mixed = model.encode(list(TEXTS), domain=domains)
    alone = np.stack(
        [model.encode(text, domain=name) for text, name in zip(TEXTS, domains, strict=True)]
    )
    # Absolute positions count padding where it is on the left, in any BERT.
    if not (make is bert and side == "left"):
        assert np.allclose(mixed, alone, atol=1e-4)
        assert np.allclose(encode_domains(model, TEXTS, domains), alone, atol=1e-4)
    assert np.allclose(
        model.encode(with_domains(TEXTS, domains), batch_size=3), mixed, atol=1e-4
    ) or (make is bert and side == "left")
    other = model.encode(list(TEXTS), domain="cvd")
    assert np.allclose(other[2], alone[2], atol=1e-4) or (make is bert and side == "left")
    if experts or tokens:
        assert not np.allclose(other[0], alone[0], atol=1e-2)
    else:
        assert np.allclose(other, mixed, atol=1e-4) or (make is bert and side == "left")


def test_the_token_replaces_the_first_or_stands_before_the_text(tmp_path):
    model = encoder(tmp_path / "a")
    plain = model.tokenizer(list(TEXTS), padding=True)["input_ids"]
    found = model[0].preprocess(with_domains(TEXTS, ["skin", "copd", "cvd", "copd"]))["input_ids"]
    tokens = [model.tokenizer.convert_tokens_to_ids(f"[domain:{name}]") for name in DOMAINS]
    assert found[:, 0].tolist() == [tokens[2], tokens[0], tokens[1], tokens[0]]
    assert found[:, 1:].tolist() == torch.tensor(plain)[:, 1:].tolist()
    other = encoder(tmp_path / "b", make=llama, bos=False)
    found = other[0].preprocess(["the cat", "dog"], domain="cvd")["input_ids"]
    token = other.tokenizer.convert_tokens_to_ids("[domain:cvd]")
    plain = other.tokenizer(["the cat", "dog"])["input_ids"]
    assert found[0].tolist() == [token, *plain[0]]
    assert found[1, : 1 + len(plain[1])].tolist() == [token, *plain[1]]


def test_the_token_replaces_the_first_that_is_no_padding(tmp_path):
    model = encoder(tmp_path, make=llama, padding_side="left", bos=True)
    texts = ["the cat sat on the mat", "dog"]
    plain = model.tokenizer(texts, padding=True, return_tensors="pt")
    assert plain["attention_mask"][1, 0] == 0
    expected = plain["input_ids"].clone()
    token = model.tokenizer.convert_tokens_to_ids("[domain:cvd]")
    for row, mask in enumerate(plain["attention_mask"].tolist()):
        expected[row, mask.index(1)] = token
    assert torch.equal(model[0].preprocess(texts, domain="cvd")["input_ids"], expected)


def test_prompts_and_similarity_of_the_model_are_kept(tmp_path):
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    base = SentenceTransformer(
        modules=[Transformer(str(tmp_path)), Pooling(16, "mean")],
        device="cpu",
        prompts={"query": "the "},
        default_prompt_name="query",
        similarity_fn_name="dot",
    ).eval()
    expected = base.encode("cat")
    model = DomainEncoder.from_model(base, DOMAINS)
    assert model.prompts["query"] == "the "
    assert model.similarity_fn_name == "dot"
    assert np.allclose(model.encode("cat", domain="skin"), expected, atol=1e-5)
    assert not np.allclose(model.encode("cat", domain="skin", prompt=""), expected, atol=1e-2)


def test_tokens_are_added_once_and_begin_as_the_first_token():
    model, words = bert(), tokenizer()
    ids = add_domain_tokens(model, words, DOMAINS)
    weight = model.get_input_embeddings().weight
    assert ids == [17, 18, 19]
    assert len(weight) == 20
    assert all(torch.equal(weight[number], weight[words.bos_token_id]) for number in ids)
    with torch.no_grad():
        weight[17] += 1
    assert add_domain_tokens(model, words, ["more", *DOMAINS]) == [20, 17, 18, 19]
    weight = model.get_input_embeddings().weight
    assert not torch.equal(weight[17], weight[1])
    assert torch.equal(weight[20], weight[1])


@pytest.mark.parametrize("experts", [True, False])
def test_a_folder_loads_in_a_new_process(tmp_path, experts):
    folder = tmp_path / "saved"
    model = shaken_encoder(
        tmp_path / "base", experts=experts, layers=[0, 2], pooling=TanhPooling(16)
    )
    model.save_pretrained(str(folder))
    domains = ["skin", "copd", "cvd", "copd"]
    expected = model.encode(list(TEXTS), domain=domains)
    # Without bakeoff, and without leave to load its code, nobody gets a model without domains.
    code = (
        "import json, sys\n"
        "from sentence_transformers import SentenceTransformer\n"
        "def refused(trusted):\n"
        "    try:\n"
        "        SentenceTransformer(sys.argv[1], device='cpu', trust_remote_code=trusted)\n"
        "    except (ImportError, ValueError) as error:\n"
        "        return str(error)\n"
        "assert 'trust_remote_code=True' in refused(False)\n"
        "sys.modules['bakeoff'] = None\n"
        "assert 'bakeoff' in refused(True)\n"
        "del sys.modules['bakeoff']\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu', trust_remote_code=True)\n"
        "texts, domains = json.loads(sys.argv[2])\n"
        "print(json.dumps([model.encode(t, domain=d).tolist() for t, d in zip(texts, domains)]))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps([TEXTS, domains])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert np.allclose(json.loads(finished.stdout.splitlines()[-1]), expected, atol=1e-4)
    half = DomainEncoder(
        str(folder), device="cpu", trust_remote_code=True, model_kwargs={"dtype": "bfloat16"}
    )
    assert half[0].auto_model.dtype == torch.bfloat16
    if experts:
        with pytest.raises(ModelError, match="torch only, got backend='onnx'"):
            DomainEncoder(str(folder), device="cpu", trust_remote_code=True, backend="onnx")
    again = DomainEncoder(str(folder), device="cpu", trust_remote_code=True)
    assert again.domains == tuple(DOMAINS)
    assert np.allclose(again.encode(list(TEXTS), domain=domains), expected, atol=1e-5)
    assert (folder / "domain_experts.safetensors").exists() == experts


def test_texts_without_a_domain_are_refused(tmp_path):
    model = encoder(tmp_path)
    with pytest.raises(DataError, match=r"domain is missing: .* known are copd, cvd, skin"):
        model.encode(list(TEXTS))
    with pytest.raises(DataError, match="unknown domain 'heart'; known are copd, cvd, skin"):
        model.encode(list(TEXTS), domain="heart")
    with pytest.raises(DataError, match="one per text, got 1 for 4 texts"):
        model.encode(list(TEXTS), domain=["copd"])
    with pytest.raises(DataError, match="one name for one text"):
        model.encode("the cat", domain=["copd"])
    # Where texts are sorted by length before anybody sees the domains, a list would be wrong.
    with pytest.raises(DataError, match="one name, got"):
        SentenceTransformer.encode(model, list(TEXTS), domain=["copd"] * 4)
    with pytest.raises(DataError, match="texts is empty"):
        encode_domains(model, [], [])
    with pytest.raises(ModelError, match="must begin with"):
        DomainEncoder.from_model(model, DOMAINS)


def test_learned_routing_needs_no_domain(tmp_path):
    model = shaken_encoder(tmp_path, tokens=False, routing="switch")
    whole = model.encode(list(TEXTS))
    alone = np.stack([model.encode(text) for text in TEXTS])
    assert np.allclose(whole, alone, atol=1e-4)


def test_domain_texts():
    text = DomainText("a mole", "skin")
    assert len({text, DomainText("a mole", "skin"), DomainText("a mole", "copd")}) == 2
    assert pickle.loads(pickle.dumps(text)).domain == "skin"
    assert copy.deepcopy(text) == text


def test_tanh_pooling_by_hand():
    torch.manual_seed(0)
    pooling = TanhPooling(6)
    hidden, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    mean = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    norm = (mean - mean.mean(1, keepdim=True)) / (
        mean.var(1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    inner = torch.tanh(norm @ pooling.inner.weight.T + pooling.inner.bias)
    expected = inner @ pooling.outer.weight.T + pooling.outer.bias
    assert torch.allclose(pooling(hidden, mask), expected, atol=1e-6)


# --- training ---------------------------------------------------------------------------------


def problem():
    """Return pairs to learn by heart: every word belongs to the one five further on."""
    words = [word for word in WORDS if word not in ("cat", "dog", "tree")]
    beasts = {"copd": "cat", "cvd": "dog"}
    train = tuple(
        TextPairs(
            tuple(f"{beast} {word}" for word in words),
            tuple(f"{words[(i + 5) % 10]} tree" for i in range(10)),
            group=domain,
        )
        for domain, beast in beasts.items()
    )
    rows = [
        (f"{beast} {word}", f"{words[(i + step) % 10]} tree", int(step == 5), domain)
        for domain, beast in beasts.items()
        for i, word in enumerate(words)
        for step in (5, 2)
    ]
    a, b, labels, domains = zip(*rows, strict=True)
    return train, LabelledPairs(a, b, np.array(labels), domains)


@pytest.mark.parametrize("batching", ["mixed", "by-domain"])
def test_training_learns_and_repeats(tmp_path, batching):
    train, validation = problem()
    options = {
        "steps": 60,
        "batch_size": 10,
        "patience": 20,
        "batching": batching,
        "learning_rate": 3e-3,
    }
    model = encoder(tmp_path / "a")
    before = evaluate_pairs(model, validation)
    state = torch.random.get_rng_state()
    history = train_cocitation(
        model, train, validation, loss=MNRLoss(scale=10, normalize=True), **options
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    after = evaluate_pairs(model, validation)
    assert after.roc_auc > before.roc_auc + 0.1
    assert after.f1 == pytest.approx(max(f1 for step, f1 in history.validation if step))
    assert dict(history.validation)[history.best_step] == after.f1
    assert history.validation[0] == (0, before.f1)
    assert set(history.diagonal_rates) == {1.0}
    again = train_cocitation(
        encoder(tmp_path / "b"),
        train,
        validation,
        loss=MNRLoss(scale=10, normalize=True),
        **options,
    )
    assert again == history
    unused = model[0].auto_model.encoder.layer[0].intermediate.experts[2]
    fresh = encoder(tmp_path / "c")[0].auto_model.encoder.layer[0].intermediate.experts[2]
    assert all(
        torch.equal(a, b) for a, b in zip(unused.parameters(), fresh.parameters(), strict=True)
    )


def test_batches_are_of_one_domain_or_mixed(tmp_path):
    train, _ = problem()

    def domains_seen(batching):
        seen = []
        model = encoder(tmp_path / batching)

        def note(ids):
            assert 4 <= len(ids) <= 12  # both texts of 2 to 6 pairs
            seen.append(set(ids.tolist()))
            return torch.zeros(())

        train_cocitation(
            model, train, steps=12, batch_size=6, batching=batching, auxiliary=note, seed=1
        )
        return seen

    assert all(len(domains) == 1 for domains in domains_seen("by-domain"))
    assert sum(len(domains) == 2 for domains in domains_seen("mixed")) > 8


def test_steps_are_those_of_adamw_with_warm_up_and_linear_decay(tmp_path):
    # Under a constant gradient AdamW moves a weight by exactly the rate, after its decay.
    model = encoder(tmp_path)
    model.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    path = []

    class Constant(MNRLoss):
        def _loss(self, queries, positives):
            path.append(float(model.weight.detach()))
            return model.weight + 0 * (queries.sum() + positives.sum())

    options = {"steps": 6, "batch_size": 4, "learning_rate": 0.1}
    train_cocitation(
        model, problem()[0], loss=Constant(), warmup_steps=2, weight_decay=0.5, **options
    )
    expected = [1.0]
    for share in (0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4):
        expected.append(expected[-1] * (1 - 0.1 * share * 0.5) - 0.1 * share)
    assert [*path, model.weight.item()] == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    train_cocitation(model, problem()[0], loss=Constant(), **options)  # no warm-up, no decay
    assert model.weight.item() == pytest.approx(1 - 0.1 * (6 + 5 + 4 + 3 + 2 + 1) / 6, abs=1e-5)


def test_what_is_auxiliary_is_added_and_dropout_is_on(tmp_path):
    train, validation = problem()
    training = []

    def losses(value, **options):
        model = encoder(tmp_path / "base")

        def auxiliary(ids):
            training.append(model.training)
            return torch.tensor(value)

        return train_cocitation(
            model, train, validation, steps=3, batch_size=6, evaluate_every=2, auxiliary=auxiliary,
            **options,
        )  # fmt: skip

    plain, more = losses(0.0), losses(5.0)
    assert more.losses == pytest.approx([loss + 5 for loss in plain.losses], rel=1e-5)
    assert len(training) == 6
    assert all(training)
    assert [step for step, _ in plain.validation] == [0, 2, 3]  # the last step counts
    assert losses(0.0, loss=MNRPlusLoss()) == plain
    assert losses(0.0, loss=MNRLoss()) != plain


def test_a_learned_router_learns_its_domains(tmp_path):
    model = encoder(tmp_path, routing="switch")
    backbone = model[0].auto_model
    losses = []

    def auxiliary(ids):
        value = routing_loss(backbone, ids)
        losses.append(float(value.detach()))
        return value

    train_cocitation(
        model, problem()[0], steps=30, batch_size=10, learning_rate=1e-2, auxiliary=auxiliary
    )
    assert losses[0] > np.log(3)
    assert np.mean(losses[-5:]) < 0.8  # that the third never comes, it knows: log 2


def test_training_stops_when_validation_does_not_improve(tmp_path, monkeypatch):
    train, validation = problem()
    scores = iter([0.7, 0.8, 0.75, 0.8, 0.9])

    class Judged:
        def __init__(self):
            self.f1 = next(scores)

    monkeypatch.setattr(
        "bakeoff.embedding.cocitation_training.evaluate_pairs", lambda model, pairs: Judged()
    )
    model = encoder(tmp_path)
    kept = {}

    def note(step, steps):
        if step == 5:
            kept.update({k: v.clone() for k, v in model.state_dict().items()})

    history = train_cocitation(
        model, train, validation, steps=100, batch_size=6, evaluate_every=5, patience=2,
        progress=note,
    )  # fmt: skip
    assert history.validation == ((0, 0.7), (5, 0.8), (10, 0.75), (15, 0.8))
    assert history.best_step == 5
    assert history.stopped_early
    assert len(history.losses) == 15
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_wrong_domain_is_another_model(tmp_path):
    _, validation = problem()
    model = shaken_encoder(tmp_path)
    own = evaluate_pairs(model, validation)
    wrong = evaluate_pairs(model, validation, domain="skin")
    assert not np.allclose(own.scores, wrong.scores)
    of_copd = validation.of_domain("copd")
    same = evaluate_pairs(model, of_copd, domain="copd")
    assert np.allclose(same.scores, own.scores[: len(of_copd)], atol=1e-5)


def test_plain_models_train_too(tmp_path):
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = SentenceTransformer(
        modules=[Transformer(str(tmp_path)), Pooling(16, "mean")], device="cpu"
    )
    train, validation = problem()
    history = train_cocitation(model, train, validation, steps=4, batch_size=6, evaluate_every=2)
    assert len(history.losses) == 4
    assert history.best_step in (2, 4)
    assert history.n_pairs == sum(map(len, train)) == 20  # the last batch has only 2


def test_a_diverged_model_keeps_its_mode(tmp_path):
    model = encoder(tmp_path)
    with pytest.raises(FloatingPointError, match="the loss at step"):
        train_cocitation(model, problem()[0], learning_rate=1e30, steps=20)
    assert not model.training


def test_training_bad_input(tmp_path):
    train, _ = problem()
    model = encoder(tmp_path)
    with pytest.raises(DataError, match="at least one group"):
        train_cocitation(model, [])
    with pytest.raises(DataError, match="train must be pairs alone"):
        train_cocitation(model, [TextPairs(("a", "b"), ("c", "d"), ("e", "f"), group="copd")])
    with pytest.raises(DataError, match="batching must be 'mixed' or 'by-domain', got 'all'"):
        train_cocitation(model, train, batching="all")
    with pytest.raises(DataError, match="unknown domain 'heart'"):
        train_cocitation(model, [TextPairs(("a", "b"), ("c", "d"), group="heart")])
    with pytest.raises(DataError, match="batch_size must be at least 2"):
        train_cocitation(model, train, batch_size=1)
    with pytest.raises(DataError, match="patience"):
        train_cocitation(model, train, patience=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(DataError, match="nothing to train"):
        train_cocitation(model, train)


@pytest.mark.model
def test_a_real_encoder():
    from bakeoff.models import pull

    folder = str(pull("all-minilm-l6-v2"))
    texts = ["a cat sat", "shortness of breath in the cold", "melanoma of the skin"] * 3
    expected = SentenceTransformer(folder, device="cpu").encode(texts)
    model = DomainEncoder.from_model(SentenceTransformer(folder, device="cpu"), DOMAINS)
    domains = ["copd", "skin", "cvd", "cvd", "skin", "copd", "copd", "copd", "skin"]
    assert np.allclose(model.encode(texts, domain=domains), expected, atol=1e-5)
    assert np.allclose(encode_domains(model, texts, domains), expected, atol=1e-5)
