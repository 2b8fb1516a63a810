"""Losses against transformers' own loss, a token-by-token loop, and each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.errors import DataError, ModelError
from bakeoff.models import load_language_model, option_losses, response_losses


def language_model(kind="llama"):
    import transformers

    torch.manual_seed(3)
    if kind == "gpt2":  # learnt absolute positions: padding must not shift them
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    architecture = {"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}[kind]
    config = tiny.config(kind, initializer_range=0.2)
    return getattr(transformers, architecture)(config).eval()


def by_hand(model, prefix, response):
    """Sum -log P(token | all before it), one forward pass per token."""
    total, ids = 0.0, list(prefix)
    for token in response:
        if ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_losses_are_those_of_a_loop_over_tokens(kind):
    model = language_model(kind)
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(3, 96, n).tolist() for n in (0, 1, 5, 17, 9)]
    responses = [rng.integers(3, 96, n).tolist() for n in (4, 1, 6, 2, 11)]
    found = response_losses(model, prefixes, responses, batch_tokens=64)
    expected = [by_hand(model, p, r) for p, r in zip(prefixes, responses, strict=True)]
    np.testing.assert_allclose(found.sums, expected, rtol=2e-5)
    assert found.n_tokens.tolist() == [3, 1, 6, 2, 11]


def test_losses_are_those_of_transformers_with_masked_labels():
    model = language_model()
    ids = torch.randint(3, 96, (1, 20))
    labels = ids.clone()
    labels[:, :12] = -100
    expected = model(ids, labels=labels).loss.item()
    found = response_losses(model, [ids[0, :12].tolist()], [ids[0, 12:].tolist()])
    assert found.means[0] == pytest.approx(expected, rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=8),
    budget=st.sampled_from([1, 16, 40, 10_000]),
)
def test_batching_changes_nothing(lengths, budget):
    model = language_model()
    rng = np.random.default_rng(len(lengths))
    prefixes = [rng.integers(3, 96, p).tolist() for p, _ in lengths]
    responses = [rng.integers(3, 96, r).tolist() for _, r in lengths]
    alone = [
        response_losses(model, [p], [r]).sums[0] for p, r in zip(prefixes, responses, strict=True)
    ]
    together = response_losses(model, prefixes, responses, batch_tokens=budget)
    np.testing.assert_allclose(together.sums, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_options_cost_what_they_cost_as_responses(kind):
    model = language_model(kind)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 96, n).tolist() for n in (3, 8, 8, 15)]
    options = [[5], [6, 7, 8], [5, 9], [20, 21, 22, 23]]
    found = option_losses(model, prompts, options)
    for row, prompt in enumerate(prompts):
        expected = response_losses(model, [prompt] * len(options), options).means
        np.testing.assert_allclose(found[row], expected, rtol=2e-5, atol=1e-5)
    # The cache is left as it was: the order of the options does not matter.
    np.testing.assert_allclose(option_losses(model, prompts, options[::-1])[:, ::-1], found, 1e-5)


def test_a_first_token_without_prefix_is_not_predicted():
    losses = response_losses(language_model(), [[], [4]], [[7], [7]])
    assert losses.n_tokens.tolist() == [0, 1]
    assert np.isnan(losses.means[0])
    assert losses.means[1] > 0


def test_the_models_mode_is_kept_and_progress_counts():
    model = language_model().train()
    seen = []
    response_losses(
        model, [[4]] * 3, [[5], [5, 6], [7]], progress=lambda *a: seen.append(a), batch_tokens=2
    )
    assert model.training
    assert seen[-1] == (3, 3)


def test_bad_input_is_named():
    model = language_model()
    with pytest.raises(DataError, match="as many, got 1 and 2"):
        response_losses(model, [[1]], [[1], [2]])
    with pytest.raises(DataError, match="response 1 has no tokens"):
        response_losses(model, [[1], [1]], [[1], []])
    with pytest.raises(DataError, match="option 0 has no tokens"):
        option_losses(model, [[1]], [[]])
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        option_losses(model, [[]], [[1]])
    with pytest.raises(DataError, match="at least one option"):
        option_losses(model, [[1]], [])


@pytest.mark.model
def test_the_packaged_model_continues_as_english_does():
    loaded = load_language_model("smollm2-135m")
    prompt = loaded.tokenizer("The capital of France is").input_ids
    options = [loaded.tokenizer(word).input_ids for word in (" Paris", " London", " banana")]
    losses = option_losses(loaded.model, [prompt], options)[0]
    assert losses.argmin() == 0
    assert losses[2] == losses.max()


@pytest.mark.model
def test_an_encoder_is_no_language_model():
    with pytest.raises(ModelError):
        load_language_model("all-minilm-l6-v2")
