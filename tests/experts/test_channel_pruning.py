"""A pruned decoder against the whole one with the other channels set to zero."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.channel_pruning import prune_channels

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE),
    "phi3, gate and up in one": Phi3Config(pad_token_id=0, **SHAPE),
    "cohere, parallel blocks": CohereConfig(**{**SHAPE, "num_key_value_heads": 4}),
}
IDS = torch.arange(36).view(3, 12) * 7 % 50


def decoder(kind="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind]), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def masks(n_kept=13):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(40, generator=generator)[:n_kept] for _ in range(3)]
    return [torch.zeros(40, dtype=torch.bool).index_fill(0, places, True) for places in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_the_whole_with_other_channels_at_zero(kind, tmp_path):
    whole, kept = decoder(kind), masks()
    pruned = copy.deepcopy(whole)
    prune_channels(pruned, kept)
    for layer, mask in zip(whole.model.layers, kept, strict=True):
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, ~mask] = 0
    with torch.no_grad():
        expected, found = whole(IDS).logits, pruned(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    removed = sum(p.numel() for p in whole.parameters()) - sum(
        p.numel() for p in pruned.parameters()
    )
    biases = 2 if "biases" in kind else 0
    assert removed == 3 * 27 * (3 * 32 + biases)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 13
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, found)


def test_all_channels_kept_is_the_same_model():
    model = decoder()
    before = model(IDS).logits
    prune_channels(model, [torch.ones(40, dtype=torch.bool)] * 3)
    assert torch.equal(model(IDS).logits, before)


def test_a_pruned_model_can_be_trained():
    model = decoder()
    prune_channels(model, masks())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_bad_input_is_refused_and_changes_nothing():
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    uneven = masks()[:2] + masks(12)[:1]
    for kept, said in (
        (masks()[:2], "kept is for 2 layers, the model has 3"),
        ([mask[:39] for mask in masks()], r"layer 0 must be \(40,\) bool, got \(39,\)"),
        ([mask.float() for mask in masks()], r"must be \(40,\) bool, got \(40,\) torch.float32"),
        (uneven, r"as many channels, and at least one, got \[12, 13\]"),
        ([torch.zeros(40, dtype=torch.bool)] * 3, r"at least one, got \[0\]"),
    ):
        with pytest.raises(DataError, match=said):
            prune_channels(model, kept)
    model.config.intermediate_size = 41
    with pytest.raises(ModelError, match="does not state the width"):
        prune_channels(model, masks())
    plain = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no gated feed-forward module"):
        prune_channels(plain, masks()[:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
