"""Latent attention against NV-Embed's code, closed forms and invariances. About 1 second."""

import pytest
import torch
from tests.embedding.small_models import OFFICIAL, drawn, n_parameters, with_official_weights

from bakeoff.embedding import LatentAttentionPooling

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def small(**options):
    torch.manual_seed(0)
    return LatentAttentionPooling(32, num_latents=16, num_heads=4, **options)


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_official_layer(normalize):
    head = with_official_weights(small(normalize=normalize))
    name = "latent_attention" if normalize else "latent_attention_not_normalized"
    official = torch.tensor(OFFICIAL[name]["output"])
    assert (head(drawn(3, (2, 5, 32)), pool_mask=MASK) - official).abs().max() < 1e-6


def test_sizes_are_those_of_the_official_code():
    assert n_parameters(small()) == OFFICIAL["latent_attention"]["parameters"] == 17_376
    with torch.device("meta"):
        full = LatentAttentionPooling(4096, num_latents=512, num_heads=8, head_dim=4096)
    assert n_parameters(full) == pytest.approx(0.74e9, rel=5e-3)


def test_masked_tokens_change_nothing_at_all():
    head, tokens = small(), drawn(3, (2, 5, 32))
    before = head(tokens, MASK)
    for value in (1e6, float("nan"), float("inf")):
        assert torch.equal(head(tokens.masked_fill(MASK.unsqueeze(-1) == 0, value), MASK), before)
    changed = tokens.clone()
    changed[0, 1, 3] += 0.1
    assert not torch.equal(head(changed, MASK), before)


def test_without_output_maps_it_is_plain_mean_pooling():
    head = small(normalize=False)
    block = head.block
    for parameter in (block.to_output.weight, *block.feed_forward.contract.parameters()):
        torch.nn.init.zeros_(parameter)
    tokens = drawn(3, (2, 5, 32))
    mean = torch.stack([tokens[0, :3].mean(dim=0), tokens[1, 1:].mean(dim=0)])
    assert torch.allclose(head(tokens, MASK), mean, atol=1e-6)


def test_tokens_are_the_queries():
    """Each token is treated alone, and the dictionary is a set."""
    head, tokens = small(normalize=False), drawn(3, (1, 5, 32))
    alone = torch.cat([head(tokens[:, [t]]) for t in range(5)]).mean(dim=0)
    assert torch.allclose(head(tokens)[0], alone, atol=1e-6)
    before = head(tokens)
    with torch.no_grad():
        head.latents.copy_(head.latents.flip(0))
    assert torch.allclose(head(tokens), before, atol=1e-5)


def test_padding_side_amount_and_batch_mates_do_not_matter():
    head, tokens = small(), drawn(3, (2, 5, 32))
    reference = head(tokens, MASK)
    for row, span in enumerate((slice(0, 3), slice(1, 5))):
        for left, right in ((0, 0), (0, 6), (3, 0), (2, 2)):
            alone = torch.nn.functional.pad(tokens[row : row + 1, span], (0, 0, left, right))
            mask = torch.zeros(1, alone.shape[1], dtype=torch.bool)
            mask[:, left : alone.shape[1] - right] = True
            assert (head(alone, mask) - reference[row]).abs().max() < 1e-5


def test_gradients_agree_with_finite_differences():
    head = LatentAttentionPooling(4, num_latents=3, num_heads=2).double()
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    names, values = zip(*head.named_parameters(), strict=True)

    def run(tokens, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(head, given, (tokens, mask))

    assert torch.autograd.gradcheck(run, (tokens, *values))


def test_bad_input():
    head = small()
    with pytest.raises(ValueError, match=r"all zero in rows \[0\]"):
        head(torch.zeros(2, 3, 32), torch.tensor([[0, 0, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match="hidden_size=32"):
        head(torch.zeros(2, 3, 31), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        head(torch.zeros(2, 3, 32), torch.ones(2, 4))
    with pytest.raises(ValueError, match="num_heads=8 does not divide"):
        LatentAttentionPooling(12)
