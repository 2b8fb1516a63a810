"""MNR and MNR+ against the official functions' numbers, closed forms and sentence-transformers."""

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tests.embedding.small_models import drawn

from bakeoff.embedding.ranking_losses import (
    MNRLoss,
    MNRPlusLoss,
    mnr_loss,
    mnr_plus_loss,
    mnr_plus_targets,
)


def batch(common_mean):
    """Return 16 pairs, those of the official numbers below."""
    first = drawn(1, (16, 64), 0.3)
    second = first + drawn(2, (16, 64), 0.2)
    if common_mean:
        shared = drawn(3, (1, 64))
        return 0.5 * first + shared, 0.5 * second + shared
    return first, second


# What models/losses.py of Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity gives.
OFFICIAL = {
    (False, False): (0.09767607599496841, 0.09732413291931152),
    (False, True): (2.0204906463623047, 2.0205509662628174),
    (True, False): (2.1357128620147705, 1.7604596614837646),
    (True, True): (2.7548632621765137, 2.7548627853393555),
}


@pytest.mark.parametrize(("common_mean", "normalize"), OFFICIAL)
def test_official_values(common_mean, normalize):
    first, second = batch(common_mean)
    mnr, mnr_plus = OFFICIAL[common_mean, normalize]
    assert float(mnr_loss(first, second, normalize=normalize)) == pytest.approx(mnr, rel=1e-5)
    assert float(mnr_plus_loss(first, second, normalize=normalize)) == pytest.approx(
        mnr_plus, rel=1e-5
    )


def test_official_diagonal_rates():
    first, second = batch(common_mean=True)
    rows, columns = mnr_plus_targets(first, second)
    own = torch.arange(16)
    assert float((rows == own).float().mean()) == 0.6875
    assert float((columns == own).float().mean()) == 1.0
    loss = MNRPlusLoss()
    loss(first, second)
    assert loss.diagonal_rate == pytest.approx((0.6875 + 1) / 2)
    loss = MNRPlusLoss(normalize=True)
    loss(first, second)
    assert loss.diagonal_rate == 1.0


@pytest.mark.parametrize("size", [2, 5, 16])
def test_identical_rows_give_the_logarithm_of_the_batch(size):
    same = torch.full((size, 7), 0.3)
    for normalize in (False, True):
        assert float(mnr_loss(same, same, normalize=normalize)) == pytest.approx(math.log(size))
        assert float(mnr_plus_loss(same, same, normalize=normalize)) == pytest.approx(
            math.log(size)
        )


def test_column_targets_are_of_the_row_wise_softmax():
    # A long vector takes nearly all of every row; what is left of a row is larger for short ones.
    vectors = torch.tensor([[4.0, 0.0], [2.0, 1.0], [0.5, 0.0]])
    similarity = (vectors @ vectors.T).double()
    by_hand = torch.stack([row.exp() / row.exp().sum() for row in similarity])
    rows, columns = mnr_plus_targets(vectors, vectors)
    assert rows.tolist() == [max(range(3), key=lambda j: by_hand[i, j]) for i in range(3)]
    assert columns.tolist() == [max(range(3), key=lambda i: by_hand[i, j]) for j in range(3)]
    assert columns.tolist() != similarity.argmax(dim=0).tolist()


def test_targets_are_of_the_mean_similarity_and_not_of_the_sum():
    first, second = drawn(3, (8, 3), 0.5).double(), drawn(103, (8, 3), 0.5).double()
    sums = first @ first.T + second @ second.T
    columns = [(factor * sums).softmax(dim=1).argmax(dim=0).tolist() for factor in (0.5, 1)]
    assert columns[0] != columns[1]
    assert mnr_plus_targets(first, second)[1].tolist() == columns[0]


def test_normalised_mnr_plus_is_symmetric_mnr():
    first, second = batch(common_mean=False)
    expected = (
        mnr_loss(first, second, normalize=True) + mnr_loss(second, first, normalize=True)
    ) / 2
    assert torch.isclose(mnr_plus_loss(first, second, normalize=True), expected)


def test_normalised_mnr_is_that_of_sentence_transformers():
    first, second = batch(common_mean=True)
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings([first, second], None)
    assert torch.isclose(mnr_loss(first, second, scale=20.0, normalize=True), expected)


def test_gradients_are_those_of_finite_differences_with_targets_held_fixed():
    first, second = (part[:5, :6].double() for part in batch(common_mean=True))
    rows, columns = mnr_plus_targets(first, second)
    assert rows.tolist() != list(range(5))  # or targets would not matter
    first.requires_grad_()
    mnr_plus_loss(first, second, scale=0.7).backward()
    logits = 0.7 * first.detach() @ second.T
    forth = logits.softmax(1) - torch.nn.functional.one_hot(rows, 5)
    back = (logits.T.softmax(1) - torch.nn.functional.one_hot(columns, 5)).T
    assert torch.allclose(first.grad, 0.7 * (forth + back) @ second / 10)


def test_half_precision_is_summed_in_single():
    first, second = (part.bfloat16() for part in batch(common_mean=True))
    loss = mnr_plus_loss(first, second)
    assert loss.dtype == torch.float32
    assert torch.isclose(loss, mnr_plus_loss(first.float(), second.float()))


@pytest.mark.parametrize("kind", [MNRLoss, MNRPlusLoss])
def test_as_a_loss_of_sentence_transformers(kind):
    first, second = batch(common_mean=False)
    model = torch.nn.Linear(64, 8)

    class Embeds(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": model(features["x"])}

    loss = kind(Embeds(), scale=2.0, normalize=True)
    assert torch.isclose(
        loss([{"x": first}, {"x": second}], None), loss(model(first), model(second))
    )
    assert loss.get_config_dict() == {"scale": 2.0, "normalize": True}
    with pytest.raises(ValueError, match="two columns, a text and its partner, got 3"):
        loss([{"x": first}] * 3)


def test_bad_input():
    first, second = batch(common_mean=False)
    for loss in (mnr_loss, mnr_plus_loss):
        with pytest.raises(ValueError, match=r"one shape .*\(16, 64\) and \(15, 64\)"):
            loss(first, second[:15])
        with pytest.raises(ValueError, match="scale must be above 0, got 0"):
            loss(first, second, scale=0)
    with pytest.raises(ValueError, match="without a model"):
        MNRLoss()([{"x": first}, {"x": second}])
    with pytest.raises(ValueError, match="positives is missing"):
        MNRPlusLoss()(first)
