"""The loss against the paper's code and two libraries; batches; the training loop. About 4 s."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tests.embedding.small_models import OFFICIAL, drawn

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding import (
    ContrastiveLoss,
    false_negative_mask,
    homogeneous_batches,
    info_nce,
    train_contrastive,
)
from bakeoff.embedding.training import negatives_of, pairs_with_negatives


def vectors(n=6, d=5, negatives=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, d), (n, d), (n, negatives, d))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


# ---- the loss -----------------------------------------------------------------------------------


def test_equals_the_official_loss():
    queries, positives, negatives = (drawn(number, (5, 8)) for number in (4, 5, 6))
    official = OFFICIAL["hard_negative_loss"]
    assert float(info_nce(queries, positives, negatives)) == pytest.approx(
        official["with_negatives"], abs=2e-6
    )
    assert float(info_nce(queries, positives)) == pytest.approx(
        official["without_negatives"], abs=2e-6
    )


def test_equals_sentence_transformers_loss():
    queries, positives, negatives = vectors()
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=7.0)
    columns = [queries, positives, *negatives.unbind(dim=1)]
    expected = theirs.compute_loss_from_embeddings(columns, labels=None)
    assert torch.allclose(info_nce(queries, positives, negatives, scale=7.0), expected, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_vectors_leave_a_guess(n):
    same = torch.full((n, 4), 0.5)
    assert float(info_nce(same, same, same)) == pytest.approx(math.log(2 * n), abs=1e-6)
    own = info_nce(same, same, same.unsqueeze(1).expand(-1, 3, -1), in_batch=False)
    assert float(own) == pytest.approx(math.log(4), abs=1e-6)


def test_own_negatives_only_is_cross_entropy_over_one_plus_n():
    queries, positives, negatives = vectors()
    cosine = torch.nn.functional.cosine_similarity
    logits = torch.cat(
        [cosine(queries, positives).unsqueeze(1), cosine(queries.unsqueeze(1), negatives, dim=2)], 1
    )
    expected = torch.nn.functional.cross_entropy(20 * logits, torch.zeros(6, dtype=torch.long))
    assert torch.allclose(info_nce(queries, positives, negatives, in_batch=False), expected)
    # Each row stands alone: the loss is the mean of the rows' losses.
    rows = [
        info_nce(queries[[i]], positives[[i]], negatives[[i]], in_batch=False) for i in range(6)
    ]
    assert torch.allclose(torch.stack(rows).mean(), expected)


def test_false_negatives_are_left_out():
    queries, positives, negatives = vectors(n=4, negatives=2)
    positive_ids = torch.tensor([7, 8, 7, 9])
    negative_ids = torch.tensor([[1, 8], [7, 2], [3, 4], [5, 6]])
    mask = false_negative_mask(positive_ids, negative_ids)
    ids = [7, 8, 7, 9, 1, 8, 7, 2, 3, 4, 5, 6]
    documents = torch.cat([positives, negatives.flatten(0, 1)])
    total = 0.0
    for i in range(4):
        kept = [j for j in range(12) if j == i or ids[j] != ids[i]]
        assert mask[i].logical_not().nonzero().flatten().tolist() == kept
        cosines = torch.nn.functional.cosine_similarity(queries[i : i + 1], documents[kept])
        total -= float((20 * cosines).log_softmax(0)[kept.index(i)])
    loss = info_nce(queries, positives, negatives, false_negatives=mask)
    assert float(loss) == pytest.approx(total / 4, abs=1e-5)


@pytest.mark.parametrize("in_batch", [True, False])
def test_gradients_agree_with_finite_differences(in_batch):
    parts = [part.requires_grad_() for part in vectors(n=3, d=4, negatives=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *parts: info_nce(*parts, in_batch=in_batch), parts)


def test_length_of_vectors_does_not_matter_and_precision_is_float32():
    queries, positives, negatives = vectors()
    loss = info_nce(queries, positives, negatives)
    assert torch.allclose(info_nce(queries * 9, positives * 0.1, negatives * 3), loss, atol=1e-5)
    low = [part.bfloat16() for part in (queries, positives, negatives)]
    assert info_nce(*low).dtype == torch.float32
    assert torch.allclose(info_nce(*low), info_nce(*(part.float() for part in low)))


def test_bad_input():
    queries, positives, negatives = vectors()
    with pytest.raises(ValueError, match="one shape"):
        info_nce(queries, positives[:5])
    with pytest.raises(ValueError, match="negatives must be"):
        info_nce(queries, positives, negatives[:5])
    with pytest.raises(ValueError, match="nothing to contrast with"):
        info_nce(queries, positives, in_batch=False)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        info_nce(queries, positives, scale=0)
    with pytest.raises(ValueError, match=r"false_negatives must be \(6, 6\)"):
        info_nce(queries, positives, false_negatives=torch.zeros(6, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="own positive"):
        info_nce(queries, positives, false_negatives=torch.eye(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="only for in_batch=True"):
        info_nce(queries, positives, negatives, in_batch=False, false_negatives=torch.eye(6))


class _Identity(torch.nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features["vectors"]}


def test_loss_module_takes_the_columns_of_a_data_set():
    queries, positives, negatives = vectors()
    columns = [{"vectors": v} for v in (queries, positives, *negatives.unbind(dim=1))]
    for in_batch in (True, False):
        loss = ContrastiveLoss(_Identity(), scale=5.0, in_batch=in_batch)
        expected = info_nce(queries, positives, negatives, scale=5.0, in_batch=in_batch)
        assert torch.equal(loss(columns, None), expected)
    assert torch.equal(ContrastiveLoss(_Identity())(columns[:2]), info_nce(queries, positives))


# ---- batches ------------------------------------------------------------------------------------


def group(size, name="g", texts=10**9, negatives=0, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda side: [f"{name}{side}{rng.integers(texts)}" for _ in range(size)]  # noqa: E731
    if not negatives:
        return TextPairs(tuple(draw("q")), tuple(draw("p")), group=name)
    # Hard negatives come from the positives, as mining gives them.
    hard = list(zip(*(draw("p") for _ in range(negatives)), strict=True))
    return pairs_with_negatives(draw("q"), draw("p"), hard, name)


def sides(pairs):
    return pairs.queries, pairs.positives


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 25), min_size=1, max_size=3),
    batch_size=st.integers(2, 9),
    texts=st.sampled_from([4, 30, 10**9]),
    negatives=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_batches_are_of_one_group_and_free_of_accidental_positives(
    sizes, batch_size, texts, negatives, seed
):
    groups = [group(n, f"g{i}", texts, negatives, seed + i) for i, n in enumerate(sizes)]
    rows = [
        (place, query, positive, hard)
        for place, pairs in enumerate(groups)
        for query, positive, hard in zip(
            pairs.queries, pairs.positives, negatives_of(pairs) or [()] * len(pairs), strict=True
        )
    ]
    may_meet = [
        bool(negatives)
        or any(
            not {q, p} & {r, s}
            for q, p in zip(*sides(one), strict=True)
            for r, s in zip(*sides(one), strict=True)
        )
        for one in groups
    ]
    if not all(may_meet):
        with pytest.raises(ValueError, match="no two pairs"):
            list(islice(homogeneous_batches(groups, batch_size, seed), 200))
        return
    batches = list(islice(homogeneous_batches(groups, batch_size, seed), 20))
    for batch in batches:
        assert (1 if negatives else 2) <= len(batch) <= batch_size
        assert len({rows[i][0] for i in batch}) == 1
        for i in batch:
            for j in batch:
                if i != j:
                    assert not {rows[i][1], rows[i][2]} & {rows[j][1], rows[j][2], *rows[j][3]}
    again = islice(homogeneous_batches(groups, batch_size, seed), 20)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_every_pair_is_used_once_before_any_is_used_again():
    stream = homogeneous_batches([group(12)], batch_size=4, seed=3)
    for _ in range(4):
        epoch = np.concatenate(list(islice(stream, 3)))
        assert sorted(epoch) == list(range(12))


def test_groups_come_in_proportion_to_their_size():
    groups = [group(30, "a"), group(90, "b")]
    drawn_from = Counter(
        bool(batch[0] >= 30) for batch in islice(homogeneous_batches(groups, 5, 0), 2000)
    )
    assert drawn_from[True] / 2000 == pytest.approx(0.75, abs=0.04)  # 4 standard errors


def test_seeds_differ():
    first, second = (next(homogeneous_batches([group(50)], 10, seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_equal_texts_make_small_batches_unless_allowed():
    labels = TextPairs(tuple("abcdefgh"), ("x", "y") * 4, ("y", "x") * 4, group="labels")
    assert len(next(homogeneous_batches([labels], 8, 0))) == 1
    assert len(next(homogeneous_batches([labels], 8, 0, distinct=lambda position: False))) == 8


def test_impossible_batches():
    with pytest.raises(ValueError, match="groups is empty"):
        homogeneous_batches([], 4, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        homogeneous_batches([group(5)], 1, 0)
    with pytest.raises(ValueError, match="'g' has 1 pairs"):
        homogeneous_batches([group(1)], 4, 0)
    same = TextPairs(("a", "b"), ("x", "x"), group="same")
    with pytest.raises(ValueError, match="'same' has no two pairs"):
        next(homogeneous_batches([same], 4, 0))
    uneven = TextPairs(("a", "b"), ("x", "y"), (("n", "m"), ("n",)))
    with pytest.raises(ValueError, match="same number of negatives"):
        negatives_of(uneven)


# ---- the loop -----------------------------------------------------------------------------------


def planted(seed=0, n=64, d=8):
    """Return queries and positives that one linear map turns into each other."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return queries, queries @ turn


def run(steps=150, **options):
    torch.manual_seed(0)
    queries, positives = planted()
    head = torch.nn.Linear(8, 8)

    def encode(kind, indices):
        if kind == "negative":
            return None
        return head(queries[indices]) if kind == "query" else positives[indices]

    batches = homogeneous_batches([group(64)], 16, seed=0)
    options = {"learning_rate": 0.02, "warmup_steps": 10, **options}
    return train_contrastive(encode, batches, head.parameters(), steps=steps, **options), head


def test_the_loop_learns_a_planted_map():
    losses, head = run()
    assert len(losses) == 150
    assert np.mean(losses[:5]) > 2.0 > 0.4 > np.mean(losses[-5:])
    queries, positives = planted()
    found = torch.nn.functional.cosine_similarity(head(queries), positives).mean()
    assert found > 0.9


def test_the_loop_repeats_exactly_and_reports():
    reports = []
    first, head = run(12, progress=lambda fraction, message: reports.append((fraction, message)))
    second, again = run(12)
    assert first == second
    assert torch.equal(head.weight, again.weight)
    assert [fraction for fraction, _ in reports] == [step / 12 for step in range(1, 13)]
    assert "step 12 of 12" in reports[-1][1]


def test_learning_rate_rises_and_falls_linearly():
    """AdamW's step on a constant gradient has the length of the learning rate, so it shows it."""
    weight = torch.nn.Parameter(torch.zeros(2))
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    path = []

    def encode(kind, indices):
        if kind == "query":
            path.append(float(weight[0].detach()))
            # The loss is nearly linear in the weight, and pulls it down all the time.
            return queries + 1e-3 * weight * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        return queries if kind == "positive" else None

    steps, peak = 20, 0.1
    train_contrastive(
        encode,
        iter([np.array([0, 1])] * steps),
        [weight],
        steps=steps,
        learning_rate=peak,
        warmup_steps=5,
        weight_decay=0.0,
        scale=1.0,
    )
    path.append(float(weight[0].detach()))
    lengths = np.abs(np.diff(path)) / peak
    expected = [*(np.arange(1, 6) / 5), *((20 - np.arange(5, 20)) / 15)]
    assert lengths == pytest.approx(expected, abs=0.05)


def test_parameter_groups_keep_their_own_rates():
    queries, positives = planted()
    fast, slow, frozen = (torch.nn.Parameter(torch.ones(8)) for _ in range(3))
    frozen.requires_grad_(False)

    def encode(kind, indices):
        if kind == "negative":
            return None
        scaled = queries[indices] * fast * slow * frozen
        return scaled if kind == "query" else positives[indices]

    groups = [
        {"params": [fast, frozen], "lr": 1e-2},
        {"params": [slow], "lr": 1e-4},
        {"params": [frozen], "lr": 1.0},
    ]
    train_contrastive(encode, homogeneous_batches([group(64)], 16, 0), groups, steps=1)
    assert float((fast.detach() - 1).abs().mean()) == pytest.approx(1e-2, rel=0.05)
    assert float((slow.detach() - 1).abs().mean()) == pytest.approx(1e-4, rel=0.05)
    assert torch.equal(frozen, torch.ones(8))


def test_long_gradients_are_shortened():
    """With plain clipping to a tiny norm, Adam's epsilon dominates and the weight hardly moves."""
    _, free = run(1)
    _, clipped = run(1, max_grad_norm=1e-12)
    torch.manual_seed(0)
    start = torch.nn.Linear(8, 8)
    assert (free.weight - start.weight).abs().max() > 1e-3
    assert (clipped.weight - start.weight).abs().max() < 1e-4


def test_the_loop_refuses():
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match="nothing to train"):
        train_contrastive(lambda kind, indices: None, [], [frozen], steps=1)
    with pytest.raises(ValueError, match="steps and learning_rate must be above 0"):
        run(0)
    weight = torch.nn.Parameter(torch.eye(3))

    def encode(kind, indices):
        return None if kind == "negative" else weight[indices]

    with pytest.raises(ValueError, match="batches ended after 1 of steps=3"):
        train_contrastive(encode, [np.array([0, 1])], [weight], steps=3)
    torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(FloatingPointError, match="loss at step 1 is nan"):
        train_contrastive(encode, [np.array([0, 1])], [weight], steps=1)
