"""The table of methods says the truth about each of them, and vectors are made only once."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from tests.embedding.tiny_problem import sentences
from tests.models import tiny
from tests.models.test_likelihood import language_model
from tests.selection.tiny_selection import samples

from bakeoff.errors import DataError
from bakeoff.models import LanguageModel
from bakeoff.selection.selector import Selector
from bakeoff.selection.selectors import SELECTORS, SelectorKind, selector_kind
from bakeoff.selection.vectors import cached_vectors

pytestmark = pytest.mark.filterwarnings("ignore:k=", "ignore:.*copies of others")
NAMES = list(SELECTORS)
N = 30


@pytest.fixture(scope="module")
def model():
    from pathlib import Path

    return LanguageModel("tiny", language_model(), tiny.tokenizer(), Path("tiny"), "0", 128)


def contents(kind):
    """Return a pool of what a method reads, and what else `fit` must be given."""
    rng = np.random.default_rng(0)
    if kind.reads in ("vectors", "states"):
        pool, queries = rng.normal(size=(N, 8)) + 1, rng.normal(size=(3, 8))
    else:
        made = samples(N + 3, 1)
        pool, queries = list(made[:N]), list(made[N:])
        if kind.reads == "texts":
            pool, queries = [s.text for s in pool], [s.text for s in queries]
    data = {
        "queries": queries,
        "confidence": np.random.default_rng(1).random(N),
        "groups": [("a", "b", "c")[row % 3] for row in range(N)],
    }
    return pool, {need: data[need] for need in kind.needs}


def picks(name, n, model, *, seed=0, **params):
    kind = selector_kind(name)
    if name == "mates":  # every sample probed: nothing to predict, no encoder to load
        params = {"n_probes": N, "warmup_steps": 1, **params}
    selector = kind.build(n_select=n, seed=seed, model=model if kind.uses_model else None, **params)
    pool, data = contents(kind)
    fitted = selector.fit(pool, **data)
    assert fitted is selector
    assert len(selector.reasons()) == n
    assert all(isinstance(reason, str) and reason for reason in selector.reasons())
    return selector.selected_indices_


@pytest.mark.parametrize("name", NAMES)
def test_what_the_table_says_of_the_constructor_and_of_fit_is_so(name):
    kind = SELECTORS[name]
    home = kind._class()
    assert issubclass(home, Selector)
    arguments = inspect.signature(home.__init__).parameters
    assert "n_select" in arguments
    # vote-k draws only where it has confidences.
    assert kind.seeded == ("random_state" in arguments) or name == "vote-k"
    assert kind.uses_model == ("model" in arguments)
    assert set(kind.needs) <= set(inspect.signature(home.fit).parameters)
    assert {key for key, _ in kind.fixed} <= set(kind.parameters)
    assert not {"self", "n_select", "random_state"} & set(kind.parameters)
    assert ("model" in kind.parameters) == ("model" in arguments and not kind.uses_model)
    assert kind.version.isdigit()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_picks_distinct_rows_and_the_same_ones_again(name, model):
    first = picks(name, 8, model)
    assert first.dtype == np.int64
    assert len(set(first.tolist())) == 8
    assert set(first.tolist()) <= set(range(N))
    np.testing.assert_array_equal(picks(name, 8, model), first)


@pytest.mark.parametrize("name", [name for name, kind in SELECTORS.items() if kind.nested])
def test_where_the_table_says_nested_small_budgets_begin_large_ones(name, model):
    large = picks(name, 12, model).tolist()
    for n in (1, 2, 5, 9):
        assert picks(name, n, model).tolist() == large[:n]


@pytest.mark.parametrize("name", ["random", "balanced-random", "kmeans", "importance-resampling"])
def test_seeds_reach_those_that_draw(name, model):
    assert any(
        picks(name, 8, model, seed=seed).tolist() != picks(name, 8, model, seed=0).tolist()
        for seed in (1, 2, 3)
    )


def test_a_parameter_that_draws_follows_the_seed():
    def first(seed):
        return picks("farthest-first", 3, None, seed=seed, start="random").tolist()

    assert first(1) == first(1)
    assert len({tuple(first(seed)) for seed in range(6)}) > 1


def test_a_name_may_fix_parameters_that_a_design_can_still_set():
    kind = selector_kind("vote-k")
    assert kind.build(n_select=3).k == 0.05
    assert kind.build(n_select=3, k=4).k == 4
    assert selector_kind("vote-k-confidence").build(n_select=3, seed=9).random_state == 9


def test_a_model_is_handed_on_only_if_there_is_one(model):
    kind = selector_kind("perplexity")
    assert kind.build(n_select=3, model=model).model is model
    assert kind.build(n_select=3).model == "smollm2-135m"
    assert selector_kind("random").build(n_select=3, model=model).n_select == 3


def test_unknown_names_and_parameters_are_told_what_there_is():
    with pytest.raises(DataError, match=r"no selection method 'votek'; there are: vote-k, .*"):
        selector_kind("votek")
    with pytest.raises(DataError, match=r"VoteK takes k, rho, .*; got depth, width$"):
        selector_kind("vote-k").build(n_select=3, width=1, depth=2)
    with pytest.raises(DataError, match=r"RandomSelector takes no parameters; got k$"):
        selector_kind("random").build(n_select=3, k=1)


def test_kinds_are_plain_values():
    import pickle

    for kind in SELECTORS.values():
        assert pickle.loads(pickle.dumps(kind)) == kind
    assert SelectorKind("1", "baselines:RandomSelector").parameters == ()


# Vectors ------------------------------------------------------------------------------------------


class Encoder:
    """Counts what it embeds."""

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return np.array([[len(text), sum(map(ord, text)) % 97] for text in texts], dtype=np.float32)


TEXTS = list(sentences(40, 2))


def test_vectors_are_made_once_for_texts_and_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    encoder = Encoder()
    first = cached_vectors(TEXTS, encoder, {"model": "a"})
    np.testing.assert_array_equal(first, Encoder()(TEXTS))
    assert encoder.seen == TEXTS
    np.testing.assert_array_equal(cached_vectors(TEXTS, encoder, {"model": "a"}), first)
    assert encoder.seen == TEXTS
    cached_vectors(TEXTS, encoder, {"model": "b"})
    assert len(encoder.seen) == 80
    other = cached_vectors(TEXTS[::-1], encoder, {"model": "a"})
    np.testing.assert_array_equal(other, first[::-1])
    cached_vectors([*TEXTS[:1], "".join(TEXTS[1:3])], encoder, {"model": "a"})
    assert len(encoder.seen) == 122


def test_vectors_of_an_interrupted_call_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    many = [f"text {i}" for i in range(2500)]
    encoder, seen = Encoder(), []

    def broken(texts):
        if len(encoder.seen) > 1000:
            raise KeyboardInterrupt
        return encoder(texts)

    with pytest.raises(KeyboardInterrupt):
        cached_vectors(many, broken, {"model": "a"})
    done = len(encoder.seen)
    assert 0 < done < 2500
    found = cached_vectors(many, encoder, {"model": "a"}, progress=lambda *a: seen.append(a))
    assert len(encoder.seen) == 2500
    assert encoder.seen == many
    assert seen[-1] == (2500, 2500)
    np.testing.assert_array_equal(found, Encoder()(many))
