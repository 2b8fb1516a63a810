"""What this family's problems share: rows, documents, losses, counts, budgets."""

import pickle

import numpy as np
import pytest
import torch
from tests.decoding.tiny_decoder import save_decoder

from bakeoff.data.domain_texts import split_domains
from bakeoff.errors import BakeoffError, DataError
from bakeoff.experts.problem.common import DomainProblem, forward_flops_per_token, keep_layers
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Trial, Work

SHAPE = SmallGPT(vocabulary=300, n_layers=2, width=16, n_heads=2, context=24)
WORDS = {"a": "one two three four", "b": "the cat sat on a mat"}


class Scored(DomainProblem):
    """A problem whose designs do nothing; the losses are made up where a design says so."""

    question = "nothing"

    def check(self, design):
        pass

    def _version(self):
        return 1

    def _run(self, design, seed, work):
        losses = self.losses(self.start(seed))
        if design.method == "diverged":
            losses["a"][0] = np.nan
        return Trial(scores={"loss": losses})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def texts(n=12):
    return split_domains(
        {
            name: [" ".join(f"{word}{i}" for word in words.split()) * 6 for i in range(n)]
            for name, words in WORDS.items()
        },
        share=0.25,
    )


@pytest.fixture(scope="module")
def problem():
    return Scored(texts(), shape=SHAPE, n_tokens=1000)


def test_rows_are_the_texts_with_ends_between_them(problem):
    end = problem.tokenizer.eos_token_id
    for domain, rows in problem.rows().items():
        assert rows.shape[1] == 24
        assert rows.dtype == torch.int64
        read = problem.tokenizer.decode(rows.flatten().tolist())
        joined = "".join(f"<|end|>{text}" for text in problem.texts.training[domain])
        assert joined.startswith(read)
        assert len(joined) - len(read) < 24 * 10
        assert int((rows == end).sum()) <= len(problem.texts.training[domain])


def test_losses_are_those_of_the_model_itself(problem):
    model = problem.start(0)
    end = problem.tokenizer.eos_token_id
    losses = problem.losses(model)
    for domain, documents in problem.documents().items():
        for ids, loss in zip(documents, losses[domain], strict=True):
            assert len(ids) <= 23
            batch = torch.tensor([[end, *ids]])
            with torch.no_grad():
                expected = float(model(batch, labels=batch).loss)
            assert loss == pytest.approx(expected, abs=1e-5)


def test_seeds_draw_weights_and_copies_are_ones_own(problem):
    one, same, other = problem.start(0), problem.start(0), problem.start(1)
    assert one is not same
    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_padding_of_batches_to_inspect_is_masked(problem):
    batches = problem.batches_to_inspect()
    documents = problem.documents()
    for number, domain in enumerate(documents):
        own = [batch for batch in batches if int(batch["domains"][0]) == number]
        lengths = [int(n) for batch in own for n in batch["attention_mask"].sum(1)]
        assert lengths == [len(ids) for ids in documents[domain]]


def test_floating_point_operations_in_closed_form(problem):
    model = problem.start(0)
    width, layers, context = 16, 2, 24
    weights = layers * (4 * width**2 + 3 * width * 4 * width) + len(problem.tokenizer) * width
    # Scores and their weighted sum: 2 products of context by width per token and layer.
    attention = layers * 2 * 2 * context * width
    assert forward_flops_per_token(model, problem.rows()) == 2 * weights + attention


def test_a_model_that_is_named_can_be_cut(tmp_path):
    save_decoder(tmp_path / "model")
    whole = Scored(texts(), base=str(tmp_path / "model"), context=24)
    n_layers = whole.start(0).config.num_hidden_layers
    cut = Scored(texts(), base=str(tmp_path / "model"), context=24, n_layers=1)
    assert n_layers > 1
    model = cut.start(0)
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert len(whole.start(0).model.layers) == n_layers
    assert cut.fingerprint() != whole.fingerprint()
    assert cut.learning_rate == 1e-4
    with pytest.raises(DataError, match=f"n_layers must be at most {n_layers}, got 99"):
        keep_layers(whole.start(0), 99)


def test_fingerprints_follow_what_scores_depend_on(problem):
    same = Scored(texts(), shape=SHAPE, n_tokens=1000)
    assert same.fingerprint() == problem.fingerprint()
    assert pickle.loads(pickle.dumps(problem)).fingerprint() == problem.fingerprint()
    for changed in (
        Scored(texts(13), shape=SHAPE, n_tokens=1000),
        Scored(texts(), shape=SHAPE, n_tokens=999),
        Scored(texts(), shape=SHAPE, n_tokens=1000, batch_size=8),
        Scored(texts(), shape=SHAPE, n_tokens=1000, base="small-parallel"),
    ):
        assert changed.fingerprint() != problem.fingerprint()


def test_fingerprints_are_of_what_can_be_written_down(problem):
    same = Scored(texts(), shape=SHAPE, n_tokens=np.int64(1000), learning_rate=np.float32(0.5))
    plain = Scored(texts(), shape=SHAPE, n_tokens=1000, learning_rate=0.5)
    assert same.fingerprint() == plain.fingerprint()

    class Odd(Scored):
        def _facts(self):
            return {**super()._facts(), "odd": object()}  # whose text holds an address

    with pytest.raises(TypeError, match="not JSON serializable"):
        Odd(texts(), shape=SHAPE).fingerprint()


def test_loaded_models_are_not_pickled(problem):
    problem.rows()
    assert len(pickle.dumps(problem)) < 30_000


def test_a_loss_that_is_no_number_is_an_error(problem, tmp_path):
    problem.run(Design("fine", "fine"), 0, Work(tmp_path))
    with pytest.raises(BakeoffError, match="design 'x': loss is no number: training diverged"):
        problem.run(Design("x", "diverged"), 0, Work(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"n_tokens": 1e6}, "n_tokens must be a whole number, got 1000000.0"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"context": 4}, "context must be at least 8, got 4"),
        ({"context": 25}, "context must be at most the shape's 24, got 25"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_layers": 2}, "n_layers goes with a model that is named"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        Scored(texts(), shape=SHAPE, **options)


def test_too_little_text_is_said():
    few = split_domains({"a": ["one two", "three four"]}, held_out={"a": ["x y z", "u v w"]})
    with pytest.raises(DataError, match=r"domain 'a' holds \d+ tokens to train on, less than one"):
        Scored(few, shape=SHAPE).rows()
    with pytest.raises(DataError, match="domain 'a' has 1 held-out documents, at least 2"):
        Scored(split_domains({"a": ["one", "two"]}), shape=SHAPE)
