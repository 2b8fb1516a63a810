"""Trainable pooling against the paper's code, closed forms and invariances. About 2 seconds."""

import pytest
import torch
from tests.embedding.small_models import OFFICIAL, drawn, n_parameters, with_official_weights

from bakeoff.embedding import LastLayerPooling, MultiLayerPooling, attention_mask_from_ids
from bakeoff.embedding.pooling import reduce_hidden_states

LAYERS, WIDTH = 5, 16


def small_multi(**options):
    torch.manual_seed(0)
    return MultiLayerPooling(WIDTH, LAYERS, num_latents=3, num_heads=2, **options)


def small_last(**options):
    torch.manual_seed(0)
    return LastLayerPooling(WIDTH, num_latents=3, num_heads=2, **options)


def hidden_states(batch=3, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, WIDTH, generator=generator) for _ in range(LAYERS + 1)]


RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
HEADS = {
    "multi mean": lambda: small_multi(),
    "multi last": lambda: small_multi(token_reduce="last"),
    "last layer, last token": lambda: small_last(),
    "last layer, all tokens": lambda: small_last(token_reduce="none"),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


# ---- against the paper's own code (see the note in the fixture) ---------------------------------


def test_multi_layer_head_equals_the_official_one():
    head = with_official_weights(MultiLayerPooling(32, 6, num_latents=16, num_heads=4))
    layers = drawn(1, (3, 6, 32))
    official = torch.tensor(OFFICIAL["multi_layer"]["output"])
    # One token per text, so that the mean over tokens is that token: (B, L, T=1, d).
    assert (head(layers.unsqueeze(2), torch.ones(3, 1)) - official).abs().max() < 1e-6
    with_embeddings = torch.cat([torch.full((3, 1, 32), 9.0), layers], dim=1)
    assert (head.pool(with_embeddings) - official).abs().max() < 1e-6


def test_last_layer_head_equals_the_official_one():
    head = LastLayerPooling(32, num_latents=16, num_heads=4, token_reduce="none")
    official = torch.tensor(OFFICIAL["last_layer_tokens"]["output"])
    assert (with_official_weights(head)(drawn(2, (3, 7, 32))) - official).abs().max() < 1e-6
    head = LastLayerPooling(32, num_latents=16, num_heads=4, token_reduce="last")
    official = torch.tensor(OFFICIAL["last_layer_last_token"]["output"])
    assert (with_official_weights(head)(drawn(2, (3, 7, 32))) - official).abs().max() < 1e-6


def test_sizes_are_those_of_the_official_code():
    multi = MultiLayerPooling(32, 6, num_latents=16, num_heads=4, head_dim=8)
    assert n_parameters(multi) == OFFICIAL["multi_layer"]["parameters"] == 17_568
    with torch.device("meta"):
        full = LastLayerPooling(4096, num_latents=768, num_heads=32, head_dim=2048)
    block = full.attention.block
    attention = n_parameters(block.to_query) + n_parameters(block.to_key_value)
    assert attention + n_parameters(block.to_output) == pytest.approx(1.074e9, rel=1e-3)
    assert n_parameters(block.feed_forward) == pytest.approx(0.201e9, rel=5e-3)
    assert n_parameters(full) == pytest.approx(1.28e9, rel=5e-3)


# ---- closed forms -------------------------------------------------------------------------------


@every_head
def test_without_output_maps_only_the_latents_remain(make):
    head = make()
    block = head.attention.block
    for parameter in (block.to_output.weight, *block.feed_forward.contract.parameters()):
        torch.nn.init.zeros_(parameter)
    expected = torch.nn.functional.normalize(head.attention.latents.mean(dim=0), dim=0)
    assert torch.allclose(head(hidden_states(), RIGHT), expected.expand(3, -1), atol=1e-6)


def test_gradients_agree_with_finite_differences():
    for head, states in (
        (MultiLayerPooling(4, 2, num_latents=2, num_heads=2), torch.randn(2, 3, 4)),
        (
            LastLayerPooling(4, num_latents=2, num_heads=2, token_reduce="none"),
            torch.randn(2, 3, 4),
        ),
    ):
        head = head.double()
        states = states.double().requires_grad_()
        names, values = zip(*head.named_parameters(), strict=True)
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

        def run(states, *values, head=head, names=names, mask=mask):
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(_Pool(head), _prefixed(given), (states, mask))

        assert torch.autograd.gradcheck(run, (states, *values))


class _Pool(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, states, mask):
        return self.head.pool(states, mask)


def _prefixed(values):
    return {f"head.{name}": value for name, value in values.items()}


# ---- the two paths agree, and nothing but the text matters --------------------------------------


@every_head
def test_pooling_cached_reductions_equals_the_full_forward(make):
    head, states = make(), hidden_states()
    reduced = reduce_hidden_states(states, RIGHT, head.reads)
    difference = head(states, RIGHT) - head.pool(reduced, RIGHT)
    assert difference.abs().max() < 1e-6
    assert (head(torch.stack(states, dim=1), RIGHT) - head(states, RIGHT)).abs().max() < 1e-6


@every_head
def test_padding_side_amount_and_content_do_not_matter(make):
    head, states = make(), hidden_states()
    reference = head(states, RIGHT)
    for row, length in enumerate((6, 3, 1)):
        for left, right in ((0, 0), (0, 5), (4, 0), (2, 1)):
            alone = [
                torch.nn.functional.pad(
                    layer[row : row + 1, :length], (0, 0, left, right), value=float("nan")
                )
                for layer in states
            ]
            mask = torch.zeros(1, left + length + right)
            mask[:, left : left + length] = 1
            assert (head(alone, mask) - reference[row]).abs().max() < 1e-5


def test_embedding_output_is_not_used():
    head, states = small_multi(), hidden_states()
    before = head(states, RIGHT)
    states[0] = states[0] + 100
    assert torch.equal(head(states, RIGHT), before)
    # A stacked tensor may leave it out.
    assert torch.allclose(head(torch.stack(states[1:], dim=1), RIGHT), before, atol=1e-6)


def test_layers_are_told_apart_by_the_table_alone():
    head, states = small_multi(), hidden_states()
    shuffled = [states[0], *(states[1 + layer] for layer in (3, 0, 4, 1, 2))]
    assert (head(states, RIGHT) - head(shuffled, RIGHT)).abs().max() > 1e-3
    torch.nn.init.zeros_(head.layer_table)
    assert torch.allclose(head(states, RIGHT), head(shuffled, RIGHT), atol=1e-5)


def test_all_tokens_head_ignores_their_order_and_last_token_head_does_not():
    states = hidden_states()
    turned = [layer.flip(1) for layer in states]
    ones = torch.ones(3, 6)
    head = small_last(token_reduce="none")
    assert torch.allclose(head(states, ones), head(turned, ones), atol=1e-5)
    head = small_last(token_reduce="last")
    assert (head(states, ones) - head(turned, ones)).abs().max() > 1e-3


@every_head
def test_unit_length_unless_told_otherwise(make):
    head = make()
    assert torch.allclose(head(hidden_states(), RIGHT).norm(dim=1), torch.ones(3), atol=1e-6)
    head.normalize = False
    assert (head(hidden_states(), RIGHT).norm(dim=1) - 1).abs().max() > 1e-2


@every_head
def test_dtype_follows_the_head_and_low_precision_stays_close(make):
    head = make()
    exact = head(hidden_states(), RIGHT)
    half = [layer.half() for layer in hidden_states()]
    assert head(half, RIGHT).dtype == torch.float32
    assert (head(half, RIGHT) - exact).abs().max() < 5e-3


# ---- bad input ----------------------------------------------------------------------------------


def test_wrong_number_of_layers():
    head = small_multi()
    with pytest.raises(ValueError, match=r"num_layers=5 needs 6 hidden states.*got 5"):
        head(hidden_states()[:-1], RIGHT)
    with pytest.raises(ValueError, match="got 8"):
        head.pool(torch.zeros(2, 8, WIDTH))


def test_missing_hidden_states():
    for missing in (None, [], torch.zeros(3, 6, WIDTH)):
        with pytest.raises(ValueError, match="output_hidden_states=True"):
            small_multi()(missing, RIGHT)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        small_multi()({"token_embeddings": torch.zeros(3, 6, WIDTH), "attention_mask": RIGHT})


@every_head
def test_row_without_tokens_wrong_width_wrong_mask(make):
    head = make()
    empty = RIGHT.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match=r"all zero in rows \[1\]"):
        head(hidden_states(), empty)
    with pytest.raises(ValueError, match="hidden_size=16"):
        head([layer[..., :8] for layer in hidden_states()], RIGHT)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\)"):
        head(hidden_states(), RIGHT[:, :5])
    with pytest.raises(ValueError, match="hidden states must be"):
        head(torch.zeros(3, WIDTH), RIGHT)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_heads=3 does not divide hidden_size=16"):
        LastLayerPooling(16, num_heads=3)
    with pytest.raises(ValueError, match="token_reduce must be one of"):
        MultiLayerPooling(16, 4, token_reduce="max")
    with pytest.raises(ValueError, match="num_layers must be a positive integer, got 0"):
        MultiLayerPooling(16, 0)
    with pytest.raises(ValueError, match="num_latents must be a positive integer, got -1"):
        LastLayerPooling(16, num_latents=-1)


def test_guessed_mask_warns_when_padding_is_also_the_end_of_sequence():
    ids = torch.tensor([[5, 6, 2, 2], [5, 2, 2, 2]])
    with pytest.warns(UserWarning, match="drops the real end-of-sequence tokens"):
        mask = attention_mask_from_ids(ids, pad_token_id=2, eos_token_id=2)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_guessed_mask_is_silent_otherwise(recwarn):
    ids = torch.tensor([[5, 6, 2, 0]])
    assert attention_mask_from_ids(ids, pad_token_id=0, eos_token_id=2).tolist() == [[1, 1, 1, 0]]
    assert not recwarn.list
