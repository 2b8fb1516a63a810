"""Probes, regressors, Gumbel selection and the Trainer callback. About 40 seconds."""

import copy
import itertools
import json
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tests.models.tiny import SHAPE, WORDS, tokenizer
from torch import nn

from bakeoff.data.samples import Sample
from bakeoff.errors import DataError
from bakeoff.selection.influence_regressor import (
    InfluenceRegressor,
    SplitTextRegressor,
    TransformerInfluenceModel,
)
from bakeoff.selection.mates import (
    GumbelTopK,
    MATESSelector,
    TrainingText,
    collated,
    padded_batches,
    probe_influence,
    reference_loss,
    training_texts,
)
from bakeoff.selection.mates_callback import MATESCallback

# Small problems ---------------------------------------------------------------------------------


def squares(model, batch):
    return (model(batch[0]).squeeze(-1) - batch[1]).square().mean()


def regression(seed=0, width=5, n=12, n_reference=20):
    """Return a linear model in float64, items (one row each) and one reference batch."""
    rng = np.random.default_rng(seed)
    line = nn.Linear(width, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        line.weight.copy_(torch.tensor(rng.standard_normal((1, width))))
    x = torch.tensor(rng.standard_normal((n, width)))
    y = torch.tensor(rng.standard_normal(n))
    reference = (
        torch.tensor(rng.standard_normal((n_reference, width))),
        torch.tensor(rng.standard_normal(n_reference)),
    )
    return line, [(x[i : i + 1], y[i : i + 1]) for i in range(n)], reference


def causal(name="Llama", seed=0, **changes):
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config" if name == "Llama" else f"{name}TextConfig")
    shape = {**SHAPE, "initializer_range": 0.2, **changes}
    return getattr(transformers, f"{name}ForCausalLM")(config(**shape)).eval()


class Bigram(nn.Module):
    """A language model without transformers, in float64 throughout."""

    def __init__(self, vocabulary=96, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary)
        self.double()

    def forward(self, input_ids):
        return self.head(torch.tanh(self.hidden(self.embedding(input_ids))))


def token_batches(n, seed=0, length=9, vocabulary=96):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(4, vocabulary, (1, length))} for _ in range(n)]


def trained_adamw(model, seed=9, steps=3, learning_rate=1e-3):
    """Return AdamW with moments, after some steps on random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    for batch in token_batches(steps, seed):
        ids = torch.tensor(batch["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def copied(value):
    """Return everything that a step could change, as bytes and plain values."""
    model, optimizer = value
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def by_deepcopy(model, optimizer, batches, reference, clip_norm=1.0):
    """Return the changes as the obvious program finds them: a copy of everything per probe."""

    def loss(model):
        with torch.no_grad():
            parts = [
                model(
                    input_ids=torch.as_tensor(batch["input_ids"]),
                    labels=torch.as_tensor(batch["input_ids"]),
                ).loss.item()
                for batch in reference
            ]
        return sum(parts) / len(parts)  # the batches here are equally long

    before = loss(model)
    found = []
    for batch in batches:
        other, stepper = copy.deepcopy((model, optimizer))
        ids = torch.as_tensor(batch["input_ids"])
        other(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        stepper.step()
        found.append(loss(other) - before)
    return np.array(found)


# Probes -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 7),
    rate=st.floats(1e-6, 0.5),
)
def test_equals_the_closed_form_of_linear_regression(seed, width, rate):
    line, items, (x, y) = regression(seed, width)
    w = line.weight.detach()[0].clone()
    loss = lambda w: float(((x @ w - y) ** 2).mean())  # noqa: E731
    expected = [
        loss(w - rate * 2 * (float(row[0] @ w) - float(target)) * row[0]) - loss(w)
        for row, target in items
    ]
    optimizer = torch.optim.SGD(line.parameters(), lr=rate)
    found = probe_influence(line, optimizer, items, [(x, y)], squares, clip_norm=None)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    # Clipping: a step of the same direction, shortened to the norm.
    found = probe_influence(line, optimizer, items, [(x, y)], squares, clip_norm=0.1)
    gradients = [2 * (float(r[0] @ w) - float(t)) * r[0] for r, t in items]
    clipped = [g * min(1.0, 0.1 / (float(g.norm()) + 1e-6)) for g in gradients]
    expected = [loss(w - rate * g) - loss(w) for g in clipped]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_small_steps_give_the_dot_product_of_gradients():
    model = Bigram()
    items, reference = token_batches(8), token_batches(4, seed=1)

    def gradient(batches):
        total = 0
        for batch in batches:
            ids = torch.tensor(batch["input_ids"])
            logits = model(ids)[:, :-1]
            total = total + nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        wrt = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(total / len(batches), wrt)])

    rate = 1e-7
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = probe_influence(model, optimizer, items, reference, clip_norm=None)
    target = gradient(reference)
    expected = [-rate * float(target @ gradient([item])) for item in items]
    np.testing.assert_allclose(found / expected, 1.0, rtol=1e-5)


@pytest.mark.parametrize("step", ["adamw", "adamw-foreach", "amsgrad", "sgd-momentum", "adafactor"])
def test_everything_is_put_back_to_the_last_bit(step):
    model = causal(attention_dropout=0.5)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
        "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, fused=False),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }[step]
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for batch in token_batches(3, seed=5):
        ids = torch.tensor(batch["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    ids = torch.tensor(token_batches(1, seed=6)[0]["input_ids"])
    model(input_ids=ids, labels=ids).loss.backward()  # gradients half way through accumulation
    gradients = [p.grad.clone() for p in model.parameters()]
    model.train()
    model.model.layers[0].eval()  # a module that the user froze
    before = copied((model, optimizer))
    tensors = [id(v) for s in optimizer.state.values() for v in s.values()]
    random = torch.get_rng_state()
    items, reference = token_batches(4), token_batches(3, seed=1)
    first = probe_influence(model, optimizer, items, reference, learning_rate=0.003)
    assert same(copied((model, optimizer)), before)
    assert [id(v) for s in optimizer.state.values() for v in s.values()] == tensors
    assert torch.equal(torch.get_rng_state(), random)  # dropout was off
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.training
    assert not model.model.layers[0].training
    second = probe_influence(model, optimizer, items[::-1], reference, learning_rate=0.003)
    assert first.tolist() == second[::-1].tolist()  # each starts from the same state
    assert len(set(first)) == 4


def test_equals_a_deepcopy_per_probe():
    model = causal()
    optimizer = trained_adamw(model)
    items, reference = token_batches(6), token_batches(4, seed=1)
    found = probe_influence(model, optimizer, items, reference)
    expected = by_deepcopy(model, optimizer, items, reference)
    np.testing.assert_allclose(found, expected, atol=2e-7)
    assert np.abs(expected).min() > 2e-6
    assert reference_loss(model, reference) == reference_loss(model, reference)


def test_the_same_item_twice_and_no_step_at_all():
    model = causal()
    optimizer = trained_adamw(model)
    item, *_ = token_batches(1)
    reference = token_batches(3, seed=1)
    with pytest.warns(UserWarning, match="by the same"):
        a, b = probe_influence(model, optimizer, [item, item], reference)
    assert a == b != 0.0
    # Putting back without a step: the base loss, exactly.
    from bakeoff.selection.mates import probing

    base = reference_loss(model, reference)
    with probing(model, optimizer) as snapshot:
        snapshot.restore()
        assert reference_loss(model, reference) == base


def test_state_is_put_back_after_an_error_and_an_interruption():
    model = causal()
    optimizer = trained_adamw(model)
    before = copied((model, optimizer))
    ignored = {"input_ids": [[5, 6, 7]], "labels": [[-100, -100, -100]]}
    reference = token_batches(2, seed=1)
    with pytest.raises(DataError, match=r"batches\[1\] has no token to predict"):
        probe_influence(model, optimizer, [*token_batches(1), ignored], reference)
    with pytest.raises(DataError, match=r"reference_batches\[1\] has no token to predict"):
        probe_influence(model, optimizer, token_batches(1), [reference[0], ignored])

    def stop(done, total):
        assert (done, total) == (1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_influence(model, optimizer, token_batches(3), reference, progress=stop)
    assert same(copied((model, optimizer)), before)


def test_a_fresh_optimizer_is_told_and_left_fresh():
    model = causal()
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    items, reference = token_batches(12), token_batches(3, seed=1)
    with pytest.warns(UserWarning, match="has no state yet"):
        cold = probe_influence(model, fresh, items, reference)
    assert len(fresh.state) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain SGD never has any
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        probe_influence(model, sgd, items, reference)
        other = copy.deepcopy(model)
        warm = probe_influence(other, trained_adamw(other), items, reference)
    assert spearmanr(cold, warm).statistic < 0.999


def test_refusals_of_probes():
    model = causal()
    optimizer = trained_adamw(model)
    reference = token_batches(1)
    with pytest.raises(DataError, match="reference_batches must have at least one"):
        probe_influence(model, optimizer, token_batches(1), [])
    with pytest.raises(DataError, match="rates are 0"):
        probe_influence(model, optimizer, token_batches(1), reference, learning_rate=0.0)
    with pytest.raises(DataError, match=r"batches\[0\]"):
        probe_influence(model, optimizer, token_batches(1), reference, learning_rate=float("inf"))
    with pytest.raises(DataError, match="none of the model's parameters"):
        probe_influence(copy.deepcopy(model), optimizer, token_batches(1), reference)
    half = copy.deepcopy(model).to(torch.bfloat16)
    sgd = torch.optim.SGD(half.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="bfloat16"):
        probe_influence(half, sgd, token_batches(1), reference)


def test_the_reference_loss_is_a_mean_over_tokens():
    model = causal()
    rng = np.random.default_rng(3)
    items = [
        TrainingText(
            str(n), ids := rng.integers(4, 90, n).tolist(), [-100] * (n // 2) + ids[n // 2 :]
        )
        for n in (2, 3, 5, 9, 17, 30)
    ]
    total, count = 0.0, 0
    for item in items:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(item.labels):
            if place and label != -100:
                total -= float(logits[place - 1, label])
                count += 1
    for batches in (padded_batches(items, 10), padded_batches(items, 1000), [collated(items)]):
        assert reference_loss(model, batches) == pytest.approx(total / count, abs=1e-6)
    mean_of_batches = [(lambda model, batch: torch.tensor(float(batch["input_ids"].shape[1])))]
    assert (
        reference_loss(model, [collated(items[:1]), collated(items[-1:])], mean_of_batches[0]) == 16
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_frozen_layers_read_the_references_once(name):
    extra = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = causal(name, **(extra if name == "Gemma3" else {}))
    upper = [p for layer in model.model.layers[-1:] for p in layer.parameters()]
    optimizer = torch.optim.AdamW(upper, lr=1e-2)
    for batch in token_batches(2, seed=7):
        ids = torch.tensor(batch["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()
    items = token_batches(5)
    reference = [{**b, "attention_mask": np.ones((1, 9), int)} for b in token_batches(3, seed=1)]
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    fast = probe_influence(model, optimizer, items, reference)
    n_fast = [calls.count(i) for i in range(4)]
    calls.clear()
    slow = probe_influence(model, optimizer, items, reference, reuse_frozen=False)
    assert fast.tolist() == slow.tolist()
    assert np.abs(fast).min() > 0
    assert n_fast == [5 + 3, 5 + 3, 5 + 3, 5 + 3 * 6]
    assert [calls.count(i) for i in range(4)] == [5 + 3 * 6] * 4
    for hook in hooks:
        hook.remove()
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    # A trained embedding lies below all layers, so that nothing may be reused.
    both = torch.optim.SGD([*upper, model.get_input_embeddings().weight], lr=0.1)
    a, b = (
        probe_influence(model, both, items, reference, reuse_frozen=reuse)
        for reuse in (True, False)
    )
    assert a.tolist() == b.tolist()


def test_agrees_with_actual_retraining():
    """Adding a row to a least-squares fit, solved exactly, ranks rows as a probe does."""
    line, _, _ = regression(0, 6)
    rng = np.random.default_rng(1)
    base, truth = rng.standard_normal((400, 6)), rng.standard_normal(6)
    targets = base @ truth + 0.3 * rng.standard_normal(400)
    shifted = truth + rng.standard_normal(6)  # the references follow another line
    reference = rng.standard_normal((100, 6))
    wanted = reference @ shifted
    loss = lambda w: float(((reference @ w - wanted) ** 2).mean())  # noqa: E731
    fitted = np.linalg.lstsq(base, targets, rcond=None)[0]
    rows = rng.standard_normal((60, 6))
    values = rows @ np.where(rng.random(60)[:, None] < 0.5, shifted, truth).T[:, 0] + 0.0
    values = np.einsum("nd,nd->n", rows, np.where(rng.random((60, 1)) < 0.5, shifted, truth))
    retrained = [
        loss(np.linalg.lstsq(np.vstack([base, x]), np.append(targets, y), rcond=None)[0])
        - loss(fitted)
        for x, y in zip(rows, values, strict=True)
    ]
    with torch.no_grad():
        line.weight.copy_(torch.tensor(fitted)[None])
    items = [(torch.tensor(x)[None], torch.tensor([y])) for x, y in zip(rows, values, strict=True)]
    found = probe_influence(
        line,
        torch.optim.SGD(line.parameters(), lr=0.5 / 400),
        items,
        [(torch.tensor(reference), torch.tensor(wanted))],
        squares,
        clip_norm=None,
    )
    assert spearmanr(found, retrained).statistic > 0.97


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_training_on_a_language_model(seed):
    """Ten more steps of training with and without a text rank texts as one step on it does."""
    model = causal(seed=seed, hidden_size=16, num_hidden_layers=2, initializer_range=0.05)
    base = np.concatenate([batch["input_ids"] for batch in token_batches(8, 20 + seed, 9, 40)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))

    def train(model, optimizer, n, extra=None):
        ids = torch.tensor(base if extra is None else np.vstack([base, extra]))
        for _ in range(n):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    train(model, optimizer, 30)
    # Texts share one to eight tokens with a reference.
    reference = token_batches(4, 21, 9, 30)
    rng = np.random.default_rng(seed)
    items = []
    for number in range(24):
        ids = rng.integers(4, 96, (1, 9))
        common = number % 8 + 1
        ids[0, :common] = reference[number // 6]["input_ids"][0, :common]
        items.append({"input_ids": ids})
    found = probe_influence(model, optimizer, items, reference)
    retrained = []
    for item in items:
        other, stepper = copy.deepcopy((model, optimizer))
        train(other, stepper, 10, item["input_ids"])
        retrained.append(reference_loss(other, reference))
    assert spearmanr(found, retrained).statistic > 0.9


# Gumbel top-k -----------------------------------------------------------------------------------


def inclusion(weights, k):
    """Return each item's probability to be among k draws without replacement, by enumeration."""
    found = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        found[list(order)] += probability
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("lower", [True, False])
def test_inclusion_frequencies_are_those_of_drawing_without_replacement(temperature, lower):
    scores = np.array([-1.2, 0.1, 0.4, 1.5])
    rng = np.random.default_rng(0)
    topk = GumbelTopK(0.5, temperature, random_state=rng)
    n, counts, first = 20_000, np.zeros(4), np.zeros(4)
    for _ in range(n):
        picked = topk.select(scores if lower else -scores, lower_is_better=lower)
        counts[picked] += 1
        first[picked[0]] += 1
    weights = np.exp(-scores / temperature)
    # Five standard errors.
    np.testing.assert_allclose(counts / n, inclusion(weights, 2), atol=5 * 0.5 / n**0.5)
    np.testing.assert_allclose(first / n, weights / weights.sum(), atol=5 * 0.5 / n**0.5)


@pytest.mark.parametrize(
    ("temperature", "official", "textbook"),
    [(0.5, -1.237, -1.140), (1.0, -1.008, -0.783), (2.0, -0.679, -0.433)],
)
def test_kept_means_of_standard_normal_scores(temperature, official, textbook):
    """Against the integrals over the normal density, computed apart."""
    scores = np.random.default_rng(0).standard_normal(400_000)
    for noise, expected in (("official", official), ("textbook", textbook)):
        kept = GumbelTopK(0.2, temperature, noise, random_state=1).select(scores)
        assert scores[kept].mean() == pytest.approx(expected, abs=0.01)
    assert scores[GumbelTopK(0.2, None).select(scores)].mean() == pytest.approx(-1.40, abs=0.01)


def test_gumbel_counts_and_refusals():
    assert len(GumbelTopK(0.29, random_state=0).select(np.arange(100.0))) == 29
    assert len(GumbelTopK(0.2, random_state=0).select(np.arange(9.0))) == 1  # rounded down
    assert len(GumbelTopK(0.01, random_state=0).select(np.arange(9.0))) == 1
    assert sorted(GumbelTopK(1.0, random_state=0).select(np.arange(9.0))) == list(range(9))
    for ratio in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(DataError, match="ratio"):
            GumbelTopK(ratio)
    for temperature in (0, -1, float("inf"), float("nan")):
        with pytest.raises(DataError, match="temperature"):
            GumbelTopK(0.2, temperature)
    with pytest.raises(DataError, match="noise"):
        GumbelTopK(0.2, noise="code")
    with pytest.raises(DataError, match="row 1"):
        GumbelTopK(0.2).select([0.0, np.nan])
    with pytest.raises(DataError, match="between 1 and 2"):
        GumbelTopK(0.2).select([0.0, 1.0], n=3)
    with pytest.warns(UserWarning, match="next to random"):
        GumbelTopK(0.5, random_state=0).select([1e-4, 2e-4, 3e-4])


# Regressors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["ridge", "mlp"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_heads_learn_linear_scores_of_any_size(head, scale):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((700, 20)) / 20**0.5
    clean = vectors @ rng.standard_normal(20)
    scores = scale * (clean + 0.3 * clean.std() * rng.standard_normal(700)) + 5 * scale
    model = InfluenceRegressor(head=head).fit(vectors[:500], scores[:500])
    assert model.score(vectors[500:], scores[500:]) > (0.93 if head == "ridge" else 0.85)
    predicted = model.predict(vectors[500:])
    assert predicted.mean() == pytest.approx(scores[500:].mean(), abs=0.3 * scores.std())
    # Other units of the vectors and the scores change nothing but the units.
    other = InfluenceRegressor(head=head).fit(1000 * vectors[:500] + 3, -7 * scores[:500] + 2)
    np.testing.assert_allclose(
        other.predict(1000 * vectors[500:] + 3),
        -7 * predicted + 2 if head == "ridge" else other.predict(1000 * vectors[500:] + 3),
        rtol=1e-6,
        atol=1e-9,
    )


def test_noise_gives_flat_predictions_not_confident_ones():
    rng = np.random.default_rng(0)
    vectors, scores = rng.standard_normal((100, 300)), rng.standard_normal(100)
    model = InfluenceRegressor().fit(vectors, scores)
    assert model.predict(rng.standard_normal((200, 300))).std() < 0.2


def letters(texts):
    return np.array([[text.count(c) for c in "abcdefgh"] for text in texts], dtype=np.float32)


class Letters(nn.Module):
    def forward(self, texts):
        return torch.tensor(letters(texts))


@pytest.mark.parametrize("encoder", [letters, Letters()])
def test_encoders_may_be_functions_and_modules(encoder):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 30)) for _ in range(80)]
    scores = letters(texts) @ np.arange(8.0)
    model = InfluenceRegressor(encoder).fit(texts[:60], scores[:60])
    assert model.score(texts[60:], scores[60:]) > 0.99
    assert np.isnan(model.inference_flops(texts))
    again = clone(model)
    assert not hasattr(again, "model_")
    restored = pickle.loads(pickle.dumps(model))
    assert restored.predict(texts[60:]).tolist() == model.predict(texts[60:]).tolist()


def test_a_pipeline_of_vectors():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 3)) * [1, 100, 1e4]
    scores = vectors @ [1.0, 0.01, 1e-4]
    pipeline = make_pipeline(StandardScaler(), InfluenceRegressor()).fit(vectors, scores)
    assert pipeline.score(vectors, scores) > 0.99


def test_refusals_of_regressors():
    vectors, scores = np.eye(4), np.arange(4.0)
    with pytest.raises(DataError, match="head must be one of ridge, mlp"):
        InfluenceRegressor(head="tree").fit(vectors, scores)
    with pytest.raises(DataError, match="shape"):
        InfluenceRegressor().fit(vectors, scores[:3])
    with pytest.raises(DataError, match="row 2"):
        InfluenceRegressor().fit(vectors, [0.0, 1.0, np.nan, 2.0])
    with pytest.raises(DataError, match="at least 3"):
        InfluenceRegressor().fit(vectors[:2], scores[:2])
    with pytest.raises(DataError, match="not fitted"):
        InfluenceRegressor().predict(vectors)
    with pytest.raises(DataError, match="4 columns"):
        InfluenceRegressor().fit(vectors, scores).predict(np.eye(3))
    with pytest.raises(DataError, match="NaN or inf in row 0"):
        InfluenceRegressor().fit(np.full((4, 2), np.inf), scores)
    with pytest.raises(DataError, match="a single one"):
        InfluenceRegressor().fit("text", scores)
    with pytest.raises(DataError, match="encoder must return"):
        InfluenceRegressor(lambda texts: np.zeros(3)).fit(["a", "b", "c"], [1, 2, 3])
    with pytest.raises(DataError, match="encoder must be"):
        InfluenceRegressor(3).fit(["a", "b", "c"], [1, 2, 3])
    with pytest.warns(UserWarning, match="all scores are equal"):
        assert np.isnan(InfluenceRegressor().fit(vectors, np.ones(4)).score(vectors, scores))


def bert(seed=0, **changes):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
    }
    return BertModel(BertConfig(**{**shape, **changes})).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_split_texts_give_the_official_logits(attention):
    """The released model's output for the same weights, in float32 and transformers 5.23."""
    encoder = bert(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        attn_implementation=attention,
    )
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(encoder.named_parameters())):
            wave = torch.sin(torch.arange(p.numel()).double() * (0.7 + 0.01 * number) + number)
            p.copy_((0.3 * wave + ("LayerNorm.weight" in name)).reshape(p.shape))
    model = SplitTextRegressor(encoder, piece_length=512).eval()
    ids = (torch.arange(3 * 1024) * 7 % 50).reshape(3, 1024)
    mask = (torch.arange(1024) < torch.tensor([[700], [1024], [300]])).long()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.sin(torch.arange(16.0))[None])
        model.classifier.bias.fill_(0.25)
        logits = model(ids, mask)
        official = [-2.453307628631592, -2.5586986541748047, -2.4632601737976074]
        np.testing.assert_allclose(logits, official, atol=2e-6)
        # Padding, in the row and of the whole batch, changes nothing.
        np.testing.assert_allclose(model(ids[2:, :300], mask[2:, :300]), logits[2:], atol=2e-6)
        np.testing.assert_allclose(model(ids[:1, :700], mask[:1, :700]), logits[:1], atol=2e-6)
        # A row without a token, in a batch and alone, gives the bias and no NaN.
        mask[1] = 0
        assert model(ids, mask)[1] == 0.25
        assert model(ids[1:2], mask[1:2])[0] == 0.25


def word_texts(n, seed=0, length=20):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, length)) for _ in range(n)]
    return texts, np.array(
        [text.split().count("cat") - text.split().count("dog") for text in texts]
    )


def test_a_fine_tuned_encoder_learns_and_leaves_the_generator_alone():
    texts, scores = word_texts(300)
    model = TransformerInfluenceModel(
        bert(), tokenizer(), epochs=12, learning_rate=3e-3, max_length=16, piece_length=8
    )
    state = torch.get_rng_state()
    model.fit(texts[:240], scores[:240] * 1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    seen = np.array([t.split()[:16].count("cat") - t.split()[:16].count("dog") for t in texts])
    assert spearmanr(model.predict(texts[240:]), seen[240:]).statistic > 0.8
    assert model.validation_spearman_ > 0.5
    again = clone(model).fit(texts[:240], scores[:240] * 1e-3)
    assert again.predict(texts[240:]).tolist() == model.predict(texts[240:]).tolist()
    # One text at a time or together: the same.
    alone = [float(model.predict([text])[0]) for text in texts[240:245]]
    np.testing.assert_allclose(alone, model.predict(texts[240:])[:5], atol=1e-8)
    # Warm start goes on from what was learnt.
    model.set_params(warm_start=True, epochs=1, learning_rate=1e-9)
    before = model.predict(texts[240:])
    after = model.fit(texts[:240], scores[:240] * 1e-3).predict(texts[240:])
    np.testing.assert_allclose(after, before, atol=1e-6)
    with pytest.raises(DataError, match="reads them itself"):
        model.fit(np.eye(3), np.arange(3.0))
    with pytest.raises(DataError, match="at most 512"):
        TransformerInfluenceModel(bert(), tokenizer(), piece_length=1024).fit(texts, scores)
    with pytest.raises(DataError, match="tokenizer must be given"):
        TransformerInfluenceModel(bert()).fit(texts, scores)


@pytest.mark.model
def test_packaged_encoder():
    texts = [f"{word} {other}" for word in ("apple", "pear", "plum") for other in WORDS]
    texts += [f"{word} {other}" for word in ("hammer", "saw", "drill") for other in WORDS]
    scores = np.repeat([0.0, 1.0], 3 * len(WORDS))
    order = np.random.default_rng(0).permutation(len(texts))
    texts, scores = [texts[i] for i in order], scores[order]
    for name in ("all-minilm-l6-v2", "all-MiniLM-L6-v2"):
        model = InfluenceRegressor(name).fit(texts[:50], scores[:50])
        assert model.score(texts[50:], scores[50:]) > 0.8
    assert model.inference_flops(["a b"]) == pytest.approx(2 * 22.7e6 * 4, rel=0.01)
    assert pickle.loads(pickle.dumps(model)).predict(texts[:2]).shape == (2,)
    tuned = TransformerInfluenceModel(epochs=2, learning_rate=1e-3, batch_size=8, max_length=16)
    assert tuned.fit(texts[:50], scores[:50]).score(texts[50:], scores[50:]) > 0.5


# Tokens of samples ------------------------------------------------------------------------------


def test_only_responses_are_to_be_predicted():
    words = tokenizer()
    ids = lambda text: words(text)["input_ids"]  # noqa: E731
    plain, asked = training_texts(
        ["the cat sat", Sample("a mat", instruction="on a tree", source="s")], words
    )
    assert plain.labels == plain.input_ids == tuple(ids("the cat sat"))
    assert asked.input_ids == (*ids("on a tree"), *ids("a mat"))
    assert asked.labels == (-100, -100, -100, *ids("a mat"))
    assert asked.source == "s"
    long = Sample("cat dog " * 5, instruction="the a " * 5)
    (cut,) = training_texts([long], words, max_length=8)
    assert cut.input_ids == (*ids("the a the a"), *ids("cat dog cat dog"))
    assert cut.labels[4:] == cut.input_ids[4:]
    assert cut.labels[:4] == (-100,) * 4
    (short,) = training_texts([Sample("cat", instruction="the a " * 5)], words, max_length=8)
    assert len(short.input_ids) == 8
    assert sum(label != -100 for label in short.labels) == 1
    with pytest.raises(DataError, match="sample 1 has too few tokens"):
        training_texts(["the cat", "cat"], words)
    with pytest.raises(DataError, match="no token to predict"):
        TrainingText("x", [1, 2], [1, -100])


# The selector -----------------------------------------------------------------------------------


def two_kinds(n, seed=0):
    """Return texts that walk through the words forwards (kind 0) or backwards (kind 1)."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, n)
    steps = rng.integers(0, len(WORDS), n)
    texts = [
        " ".join(WORDS[(start + (1 - 2 * kind) * i) % len(WORDS)] for i in range(length))
        for start, kind, length in zip(steps, kinds, rng.integers(10, 16, n), strict=True)
    ]
    return texts, kinds


def tiny_language_model(seed=0):
    return SimpleNamespace(model=causal(seed=seed), tokenizer=tokenizer(), max_length=128)


def bigrams(texts):
    """Return counts of the words' neighbours: enough to tell the kinds."""
    made = np.zeros((len(texts), len(WORDS) ** 2))
    for row, text in enumerate(texts):
        places = [WORDS.index(word) for word in text.split()]
        for a, b in itertools.pairwise(places):
            made[row, a * len(WORDS) + b] += 1
    return made


def directions(texts):
    """Return how often a text goes forwards and how long it is."""
    columns = np.arange(len(WORDS))
    forwards = (columns[:, None] + 1) % len(WORDS) == columns[None, :]
    counts = bigrams(texts)
    return np.stack([counts @ forwards.ravel(), counts.sum(axis=1)], axis=1)


@pytest.mark.parametrize("layers", [None, 1])
def test_the_selector_finds_the_kind_of_the_references(layers):
    texts, kinds = two_kinds(160)
    queries, query_kinds = two_kinds(60, seed=1)
    queries = [text for text, kind in zip(queries, query_kinds, strict=True) if kind == 0]
    loaded = tiny_language_model()
    before = copy.deepcopy(loaded.model.state_dict())
    selector = MATESSelector(
        40,
        model=loaded,
        n_probes=60,
        learning_rate=1e-3,
        regressor=InfluenceRegressor(bigrams),
        temperature=0.3,
        trainable_layers=layers,
    )
    selector.fit(texts, queries=queries, already_labeled=[3, 5])
    picks = selector.selected_indices_
    assert same(loaded.model.state_dict(), before)
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert len(set(picks.tolist())) == 40
    assert not {3, 5} & set(picks.tolist())
    assert not {3, 5} & set(selector.probed_indices_.tolist())
    assert (kinds[picks] == 0).mean() > 0.85
    assert selector.spearman_ > 0.6
    # The other references, the other picks: the sign is right.
    other = selector.set_params(n_select=20).select(texts, queries=[" ".join(reversed(WORDS))] * 2)
    assert (kinds[other] == 1).mean() > 0.85


def test_the_selector_is_an_estimator_and_explains_itself():
    texts, _ = two_kinds(40)
    selector = MATESSelector(
        6, model=tiny_language_model(), n_probes=15, learning_rate=1e-3, warmup_steps=2
    )
    vectors = bigrams(texts)
    done = []
    fitted = clone(selector).fit(
        texts, queries=texts[:5], vectors=vectors, progress=lambda *at: done.append(at)
    )
    assert done == [(i, 15) for i in range(1, 16)]
    again = selector.select(texts, queries=texts[:5], vectors=vectors)
    assert again.tolist() == fitted.selected_indices_.tolist()
    assert again.dtype == np.int64
    samples = [Sample(text) for text in texts]
    assert selector.select(samples, queries=texts[:5], vectors=vectors).tolist() == again.tolist()
    moved = clone(selector).set_params(random_state=1)
    assert moved.select(texts, queries=texts[:5], vectors=vectors).tolist() != again.tolist()
    for row, reason in zip(again, fitted.reasons(), strict=True):
        kind = "measured" if row in fitted.probed_indices_ else "predicted"
        assert reason == f"{kind} change of the reference loss {fitted.scores_[row]:+.2g}"
    whole = clone(selector).set_params(n_probes=100, temperature=None)
    whole.fit(texts, queries=texts[:5])
    assert whole.selected_indices_.tolist() == np.argsort(whole.scores_, kind="stable")[:6].tolist()
    assert np.isnan(whole.spearman_)


def test_refusals_of_the_selector():
    texts, _ = two_kinds(20)
    selector = MATESSelector(5, model=tiny_language_model())
    with pytest.raises(DataError, match="queries must be given"):
        selector.select(texts)
    with pytest.raises(DataError, match="between 1 and 20"):
        selector.select(texts, 21, queries=texts)
    for name, value in (
        ("n_probes", 2),
        ("n_probes", 2.5),
        ("warmup_steps", -1),
        ("learning_rate", 0.0),
        ("max_length", 1),
        ("trainable_layers", 5),
        ("temperature", 0.0),
        ("n_reference", 0),
    ):
        with pytest.raises(DataError, match=name):
            clone(selector).set_params(**{name: value}).fit(texts, queries=texts)
    with pytest.raises(DataError, match="vectors must have shape"):
        clone(selector).set_params(n_probes=5).fit(texts, queries=texts, vectors=np.eye(3))


# The callback -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    texts, kinds = two_kinds(600, seed=2)
    samples = [
        Sample(t, source=f"kind {k}") for t, k in dict(zip(texts, kinds, strict=True)).items()
    ]
    pool, holdout = samples[:100], samples[100:]
    known = {sample.text for sample in samples}
    reference = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(20)) for i in range(0, 12, 3)]
    assert not known & set(reference)
    return pool, holdout, reference


def callback(problem, **changes):
    options = {
        "every": 4,
        "ratio": 0.25,
        "n_probes": 40,
        "regressor": InfluenceRegressor(directions),
        "temperature": 0.3,
        "tokenizer": tokenizer(),
    }
    return MATESCallback(*problem, **{**options, **changes})


def trainer(folder, mates, *, callbacks=None, dataset=None, collator=None, dropout=0.1, **changes):
    from transformers import Trainer, TrainingArguments

    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 16,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 4,
    }
    return Trainer(
        causal(attention_dropout=dropout),
        TrainingArguments(**{**options, **changes}),
        train_dataset=mates.train_dataset if dataset is None else dataset,
        data_collator=collator or mates.data_collator,
        callbacks=[mates] if callbacks is None else callbacks,
    )


def test_every_batch_of_a_stage_comes_from_its_selection(problem, tmp_path):
    mates = callback(problem, n_probes=None, validation_fraction=0.4)
    batches, selections = [], []

    def collator(features):
        batches.append([tuple(feature["input_ids"]) for feature in features])
        return mates.data_collator(features)

    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            selections.append({mates.pool[row].input_ids for row in mates.selected_.tolist()})

    run = trainer(tmp_path, mates, collator=collator, callbacks=[mates, Watch()])
    run.train()
    assert len(mates.train_dataset) == 4 * 3 * 2
    assert len(selections) == 4
    assert len(batches) == 32
    for stage, selected in enumerate(selections):
        seen = [ids for batch in batches[8 * stage : 8 * stage + 8] for ids in batch]
        assert set(seen) <= selected
        # 24 items out of 30 selected: none twice.
        assert len(set(seen)) == 24
    history = mates.history
    assert [entry["kind"] for entry in history] == ["random", "mates", "mates", "mates"]
    assert [entry["step"] for entry in history] == [0, 4, 8, 12]
    random, *chosen = history
    n = len(mates.holdout)
    assert random["overlap"] is None
    assert abs(random["source_mix"]["kind 0"] - 0.5) < 0.25
    for entry in chosen:
        assert entry["source_mix"]["kind 0"] > 0.8  # the references are of this kind
        assert entry["spearman"] > 0.5
        assert (entry["n_probes"], entry["n_validation"]) == (n, round(0.4 * n))
        assert entry["reference_loss"] > 0
        assert 0 <= entry["overlap"] <= 1
        parameters = sum(p.numel() for p in run.model.parameters())
        assert entry["flops"]["reference"] == 2 * parameters * (n + 2) * 80
        assert 10 <= entry["flops"]["probe_steps"] / (6 * parameters * n) <= 16
        assert 10 <= entry["flops"]["training"] / (6 * parameters * 24) <= 16
        # A function embeds: nobody knows at what cost. Vectors are made once.
        assert entry["flops"]["regressor"] == (None if entry is chosen[0] else 0)
    assert history[-1]["reference_loss"] < history[1]["reference_loss"]
    json.dumps(mates.state())
    assert [e["mates_overlap"] for e in run.state.log_history if "mates_overlap" in e] == [
        entry["overlap"] for entry in chosen
    ]


# In the middle of a stage, at a border, and one step before a border.
@pytest.mark.parametrize(("at", "restore"), [(6, False), (8, False), (11, False), (6, True)])
def test_resuming_goes_on_as_if_nothing_had_happened(problem, tmp_path, at, restore):
    options = {
        "save_strategy": "steps",
        "save_steps": at,
        "restore_callback_states_from_checkpoint": restore,
    }
    mates = callback(problem)
    run = trainer(tmp_path, mates, **options)
    run.train()
    again = callback(problem)
    resumed = trainer(tmp_path, again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert same(resumed.model.state_dict(), run.model.state_dict())
    without = lambda entry: {k: v for k, v in entry.items() if k != "seconds"}  # noqa: E731
    # Embeddings are made once per process, so that a resumed one may have made them again.
    for a, b in zip(again.history, mates.history, strict=True):
        a, b = without(a), without(b)
        a.pop("flops"), b.pop("flops")
        assert a == b
    # A checkpoint of other data is refused.
    other = callback((problem[0][:-1], *problem[1:]))
    with pytest.raises(DataError, match="pool must be the one"):
        trainer(tmp_path, other, **options).train(
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}")
        )


def test_probing_leaves_training_alone(problem, tmp_path):
    """With a stage that selects at random again, probes or no probes: the same weights."""

    class Same(MATESCallback):
        def _select(self, *args):
            found = super()._select(*args) if self.really else ({}, {})
            self.selected_ = self._rng(self.stage, 9).choice(len(self.pool), 30, replace=False)
            return found

    states = []
    for really in (True, False):
        mates = Same(*problem, every=4, n_probes=10, tokenizer=tokenizer(),
                     regressor=InfluenceRegressor(directions))  # fmt: skip
        mates.really = really
        run = trainer(tmp_path, mates, dropout=0.3)
        run.train()
        states.append(copied((run.model, run.optimizer.optimizer)))
    assert same(*states)


def test_static_selection_and_pools_of_stages(problem, tmp_path):
    static = callback(problem, refresh=False)
    trainer(tmp_path, static).train()
    assert [entry["overlap"] for entry in static.history[2:]] == [1.0, 1.0]
    assert "spearman" in static.history[1]
    assert "spearman" not in static.history[2]
    cut = callback(problem, n_pools=4)
    trainer(tmp_path, cut).train()
    assert [entry["overlap"] for entry in cut.history[1:]] == [0.0, 0.0, 0.0]
    assert {entry["n_selected"] for entry in cut.history} <= {6, 7}
    assert sorted(np.concatenate(cut._parts).tolist()) == list(range(len(problem[0])))
    # A stage of 24 items goes through seven selected ones more than three times.
    rows = cut.train_dataset._rows
    assert np.unique(rows, return_counts=True)[1].min() >= 3


def test_training_twice_begins_anew_and_epochs_are_stages(problem, tmp_path):
    mates = callback(problem)
    run = trainer(tmp_path, mates, max_steps=-1, num_train_epochs=2)
    run.train()
    assert run.state.global_step == 8
    assert [entry["stage"] for entry in mates.history] == [0, 1]
    first = mates.history
    run.train()
    assert [entry["stage"] for entry in mates.history] == [0, 1]
    assert mates.history[0]["source_mix"] == first[0]["source_mix"]


def test_mixed_precision_probes_in_float32(problem, tmp_path):
    mates = callback(problem, every=2)
    run = trainer(tmp_path, mates, bf16=True, max_steps=4, dropout=0.0)
    seen = []
    original = type(run.model.lm_head).forward

    class Spy(nn.Linear):
        def forward(self, x):
            out = original(self, x)
            seen.append((out.dtype, torch.is_grad_enabled()))
            return out

    run.model.lm_head.__class__ = Spy
    run.train()
    dtypes = [dtype for dtype, _ in seen]
    assert dtypes.count(torch.bfloat16) == 2 * 4  # micro-batches of training
    assert dtypes.count(torch.float32) > 40


def test_refusals_of_the_callback(problem, tmp_path):
    pool, holdout, reference = problem
    words = tokenizer()
    with pytest.raises(DataError, match="holdout shares 2 texts with pool"):
        MATESCallback(pool, [*holdout, *pool[:2]], reference, tokenizer=words)
    with pytest.warns(UserWarning, match="1 reference texts are also in pool"):
        MATESCallback(pool, holdout, [pool[0]], tokenizer=words)
    with pytest.raises(DataError, match="tokenizer must be given"):
        MATESCallback(pool, holdout, reference)
    with pytest.raises(DataError, match="TrainingText items"):
        MATESCallback([{"input_ids": [1]}], holdout, reference, tokenizer=words)
    for name, value in (
        ("ratio", 0.0),
        ("temperature", -1.0),
        ("every", 0),
        ("warmup_stages", 0),
        ("n_probes", 10_000),
        ("n_pools", 10_000),
        ("validation_fraction", 1.0),
    ):
        with pytest.raises(DataError, match=name):
            callback(problem, **{name: value})
    for name, value, message in (
        ("dataloader_num_workers", 1, "must be 0"),
        ("train_sampling_strategy", "group_by_length", "train_sampling_strategy"),
        ("auto_find_batch_size", True, "auto_find_batch_size"),
    ):
        with pytest.raises(DataError, match=message):
            trainer(tmp_path, callback(problem), **{name: value})
    mates = callback(problem)
    with pytest.raises(DataError, match="train_dataset of the Trainer"):
        trainer(tmp_path, mates, dataset=[item.features() for item in mates.pool]).train()
    late = callback(problem)
    run = trainer(tmp_path, late, callbacks=[])
    run.add_callback(late)
    with pytest.raises(DataError, match="callbacks="):
        run.train()
    decayed = callback(problem, every=8)
    run = trainer(
        tmp_path, decayed, lr_scheduler_type="constant_with_warmup", warmup_steps=10**4, max_steps=9
    )
    with pytest.warns(UserWarning, match="below 1 %"):
        run.train()


def test_a_fine_tuned_regressor_inside_the_callback(problem, tmp_path):
    influence = TransformerInfluenceModel(
        bert(), words := tokenizer(), epochs=3, learning_rate=3e-3, max_length=32, piece_length=16
    )
    mates = callback(problem, regressor=influence, tokenizer=words)
    trainer(tmp_path, mates, max_steps=8).train()
    assert mates.history[1]["flops"]["regressor"] > 0
    assert not hasattr(influence, "module_")  # a copy was fitted
