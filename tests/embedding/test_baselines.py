"""Baselines against sentence-transformers' own modules and brute force. About 4 seconds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling
from tests.embedding.small_models import n_parameters

from bakeoff.embedding import (
    ConcatLinearPooling,
    LastTokenPooling,
    LatentAttentionPooling,
    MeanPooling,
    PositionWeightedMeanPooling,
    ResidualMLPPooling,
    ScalarMixPooling,
    SingleLayerMeanPooling,
    best_layer,
    layer_scores,
    reduce_hidden_states,
)

LAYERS, WIDTH = 4, 6
MASKS = {
    "right": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]),
}


def hidden_states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, WIDTH, generator=generator) for _ in range(LAYERS + 1)]


HEADS = {
    "last token": lambda: LastTokenPooling(WIDTH),
    "mean": lambda: MeanPooling(WIDTH),
    "weighted mean": lambda: PositionWeightedMeanPooling(WIDTH),
    "layer 2": lambda: SingleLayerMeanPooling(WIDTH, 2),
    "scalar mix": lambda: ScalarMixPooling(WIDTH, LAYERS),
    "scalar mix of last tokens": lambda: ScalarMixPooling(WIDTH, LAYERS, token_reduce="last"),
    "concat": lambda: ConcatLinearPooling(WIDTH, LAYERS, output_size=3),
    "mlp": lambda: ResidualMLPPooling(WIDTH, num_latents=4, num_heads=2),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
both_sides = pytest.mark.parametrize("side", MASKS)


@both_sides
@pytest.mark.parametrize(
    ("head", "mode"),
    [
        (LastTokenPooling(WIDTH, normalize=False), "lasttoken"),
        (MeanPooling(WIDTH, normalize=False), "mean"),
        (PositionWeightedMeanPooling(WIDTH, normalize=False), "weightedmean"),
    ],
)
def test_equals_sentence_transformers(head, mode, side):
    features = {"token_embeddings": hidden_states()[-1], "attention_mask": MASKS[side]}
    theirs = Pooling(WIDTH, mode)(dict(features))["sentence_embedding"]
    assert torch.allclose(head(dict(features))["sentence_embedding"], theirs, atol=1e-6)
    assert torch.allclose(head(hidden_states(), MASKS[side]), theirs, atol=1e-6)


@both_sides
@every_head
def test_pooling_cached_reductions_equals_the_full_forward(make, side):
    torch.manual_seed(0)
    head, states, mask = make(), hidden_states(), MASKS[side]
    reduced = reduce_hidden_states(states, mask, head.reads)
    assert (head(states, mask) - head.pool(reduced, mask)).abs().max() < 1e-6


@every_head
def test_padding_and_batch_mates_do_not_matter(make):
    torch.manual_seed(0)
    head, states = make(), hidden_states()
    reference = head(states, MASKS["right"])
    for row, length in enumerate((5, 2, 1)):
        for left, right in ((0, 0), (3, 0), (1, 4)):
            alone = [
                torch.nn.functional.pad(
                    layer[row : row + 1, :length], (0, 0, left, right), value=float("nan")
                )
                for layer in states
            ]
            mask = torch.zeros(1, left + length + right)
            mask[:, left : left + length] = 1
            assert (head(alone, mask) - reference[row]).abs().max() < 1e-5


def test_single_layer_picks_that_layer():
    states, mask = hidden_states(), MASKS["right"]
    for layer in range(LAYERS + 1):
        head = SingleLayerMeanPooling(WIDTH, layer, normalize=False)
        mean = MeanPooling(WIDTH, normalize=False)(states[layer], mask)
        assert torch.allclose(head(states, mask), mean, atol=1e-6)
    with pytest.raises(ValueError, match="layer=9, but there are hidden states 0 to 4 only"):
        SingleLayerMeanPooling(WIDTH, 9)(states, mask)
    with pytest.raises(ValueError, match="layer must be an integer from 0 on, got -1"):
        SingleLayerMeanPooling(WIDTH, -1)


def test_scalar_mix_equals_weighted_layer_pooling():
    head = ScalarMixPooling(WIDTH, LAYERS, layer_norm=False, normalize=False)
    with torch.no_grad():
        head.layer_logits.copy_(torch.randn(LAYERS))
        head.gamma.fill_(1.7)
    weights = torch.nn.Parameter(head.layer_logits.softmax(0).detach())
    theirs = WeightedLayerPooling(WIDTH, LAYERS, layer_start=1, layer_weights=weights)
    features = {"all_layer_embeddings": hidden_states(), "attention_mask": MASKS["right"]}
    mixed = Pooling(WIDTH, "mean")(theirs(dict(features)))["sentence_embedding"]
    ours = head(dict(features))["sentence_embedding"]
    assert torch.allclose(ours, 1.7 * mixed, atol=1e-5)


def test_scalar_mix_starts_as_the_average_of_standardised_layers():
    states, mask = hidden_states(), MASKS["right"]
    means = [MeanPooling(WIDTH, normalize=False)(layer, mask) for layer in states[1:]]
    standard = [(m - m.mean(1, keepdim=True)) / m.std(1, keepdim=True, correction=0) for m in means]
    expected = torch.stack(standard).mean(dim=0)
    head = ScalarMixPooling(WIDTH, LAYERS, normalize=False)
    assert torch.allclose(head(states, mask), expected, atol=1e-3)


def test_concat_linear_can_copy_a_layer():
    head = ConcatLinearPooling(WIDTH, LAYERS, normalize=False)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.zero_()
        head.linear.weight[:, 2 * WIDTH : 3 * WIDTH] = torch.eye(WIDTH)
    states, mask = hidden_states(), MASKS["right"]
    layer = SingleLayerMeanPooling(WIDTH, 3, normalize=False)(states, mask)
    expected = torch.nn.functional.layer_norm(layer, (WIDTH,))
    assert torch.allclose(head(states, mask), expected, atol=1e-5)
    assert ConcatLinearPooling(WIDTH, LAYERS, output_size=3).get_embedding_dimension() == 3


@pytest.mark.parametrize(
    ("width", "latents", "heads", "head_dim"),
    [(16, 4, 2, None), (32, 16, 4, 8), (64, 512, 8, 64), (576, 32, 4, None)],
)
def test_residual_mlp_matches_latent_attention_in_size(width, latents, heads, head_dim):
    control = ResidualMLPPooling(width, latents, heads, head_dim)
    treatment = LatentAttentionPooling(width, latents, heads, head_dim)
    assert abs(n_parameters(control) - n_parameters(treatment)) <= 1.5 * width + 1


def test_residual_mlp_without_output_map_is_the_mean():
    head = ResidualMLPPooling(WIDTH, 4, 2)
    for parameter in head.feed_forward.contract.parameters():
        torch.nn.init.zeros_(parameter)
    states, mask = hidden_states(), MASKS["right"]
    assert torch.allclose(head(states, mask), MeanPooling(WIDTH)(states, mask), atol=1e-6)


# ---- choosing a layer ---------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 12))
def test_layer_scores_equal_brute_force(n_pairs, n_layers, seed, cutoff):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n_pairs, n_layers, 3, generator=generator)
    positives = queries + torch.randn(n_pairs, n_layers, 3, generator=generator)
    expected = []
    for layer in range(n_layers):
        total = 0.0
        for i in range(n_pairs):
            a = queries[i, layer].double().numpy()
            cosines = []
            for j in range(n_pairs):
                b = positives[j, layer].double().numpy()
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            rank = 1 + sum(cosine > cosines[i] + 1e-6 for cosine in cosines)
            total += 1 / rank if rank <= cutoff else 0.0
        expected.append(total / n_pairs)
    found = layer_scores(queries, positives, cutoff=cutoff, block_size=7)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[best_layer(queries, positives, cutoff=cutoff)] == max(found)


def test_equal_positives_do_not_compete():
    vectors = torch.eye(3).unsqueeze(1)[[0, 0, 2]]
    assert layer_scores(vectors, vectors) == [1.0]


def test_choosing_a_layer_needs_pairs():
    with pytest.raises(ValueError, match="one shape"):
        best_layer(torch.zeros(3, 2, 4), torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="at least 2 training pairs"):
        best_layer(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
