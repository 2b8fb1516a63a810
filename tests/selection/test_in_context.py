"""Answers in context against a plain loop over prompts that are written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.embedding.tiny_problem import sentences
from tests.models import tiny
from tests.selection.tiny_selection import byte_tokenizer

import bakeoff.models
from bakeoff.errors import DataError
from bakeoff.models import LanguageModel
from bakeoff.selection.in_context import InContextClassifier

OPTIONS = ("cat", "a dog", "tree")
TEXTS = sentences(9, 1)
LABELS = [OPTIONS[i % 3] for i in range(9)]
ASKED = sentences(6, 2)


def language_model(*, bos: bool = False, length: int = 1024) -> LanguageModel:
    from pathlib import Path

    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny.config(
        vocab_size=259, max_position_embeddings=length, num_hidden_layers=2, initializer_range=0.2
    )
    return LanguageModel(
        name="tiny",
        model=LlamaForCausalLM(config).eval(),
        tokenizer=byte_tokenizer(bos=bos, length=length),
        path=Path("tiny"),
        fingerprint="0",
        max_length=length,
    )


@pytest.fixture(scope="module")
def tiny_model():
    return language_model()


def vectors(n, seed):
    return (np.random.default_rng(seed).normal(size=(n, 5)) + 1).astype(np.float32)


SHOWN, NEW = vectors(9, 0), vectors(6, 1)
CENTRE = np.full(5, 1.0, dtype=np.float32)


def learner(model, **options):
    made = InContextClassifier(model, OPTIONS, **{"n_shots": 3, **options})
    return made.fit(SHOWN, TEXTS, LABELS, center=CENTRE)


def prompt_of(row, n_shots=3):
    """The prompt as a person would write it: examples with blank lines between, nearest last."""
    a, b = SHOWN.astype(np.float64) - CENTRE, NEW[row].astype(np.float64) - CENTRE
    cosine = a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)
    nearest = np.argsort(-cosine)[:n_shots][::-1]
    shots = [f"{TEXTS[i]}\nLabel: {LABELS[i]}" for i in nearest]
    return "\n\n".join([*shots, f"{ASKED[row]}\nLabel:"])


def naive_losses(model, prompt, special):
    """transformers' own loss of every option after the prompt."""
    losses = []
    for option in OPTIONS:
        ids = model.tokenizer(f"{prompt} {option}", add_special_tokens=special).input_ids
        batch = torch.tensor([ids])
        labels = batch.clone()
        labels[:, : -len(f" {option}")] = -100  # one token per byte
        with torch.no_grad():
            losses.append(model.model(batch, labels=labels).loss.item())
    return losses


@pytest.mark.parametrize("bos", [False, True])
def test_losses_are_those_of_transformers_on_the_written_out_prompt(bos):
    model = language_model(bos=bos)
    found = learner(model).losses(NEW, ASKED)
    expected = [naive_losses(model, prompt_of(row), bos) for row in range(6)]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    best = [OPTIONS[int(np.argmin(row))] for row in expected]
    assert learner(model).predict(NEW, ASKED) == best
    np.testing.assert_allclose(
        learner(model).confidence(NEW, ASKED), -np.min(expected, axis=1), 2e-5
    )
    assert len({*best}) > 1


def prompts_seen(monkeypatch, made, rows=NEW, asked=ASKED):
    seen = []

    def losses(model, prompts, options, progress=None):
        seen.extend(made.language_model.tokenizer.batch_decode(prompts))
        return np.zeros((len(prompts), len(options)))

    monkeypatch.setattr(bakeoff.models, "option_losses", losses)
    made.losses(rows, asked)
    return seen


def test_the_prompt_is_the_one_written_by_hand(tiny_model, monkeypatch):
    assert prompts_seen(monkeypatch, learner(tiny_model)) == [prompt_of(row) for row in range(6)]


def test_random_examples_are_others_and_follow_their_seed(tiny_model, monkeypatch):
    def seen(seed):
        made = learner(tiny_model, choose="random", random_state=seed)
        return prompts_seen(monkeypatch, made)

    assert seen(1) == seen(1)
    assert seen(1) != seen(2)
    similar = prompts_seen(monkeypatch, learner(tiny_model))
    assert seen(1) != similar
    for one, other in zip(seen(1), similar, strict=True):
        assert one.count("Label:") == other.count("Label:") == 4
        assert one.split("\n\n")[-1] == other.split("\n\n")[-1]


def test_a_row_is_no_example_for_itself(tiny_model, monkeypatch):
    for prompt, text in zip(
        prompts_seen(monkeypatch, learner(tiny_model), SHOWN, TEXTS), TEXTS, strict=True
    ):
        assert prompt.count(text) == 1


def test_prompts_keep_to_the_budget_and_lose_the_least_similar(tiny_model, monkeypatch):
    whole = prompts_seen(monkeypatch, learner(tiny_model))
    short = prompts_seen(monkeypatch, learner(tiny_model, max_tokens=100))
    assert max(map(len, whole)) > 100 >= max(map(len, short))  # one token per byte
    for long, cut in zip(whole, short, strict=True):
        assert long.endswith(cut)


def test_a_long_text_is_cut(tiny_model, monkeypatch):
    long = "cat " * 200
    made = InContextClassifier(tiny_model, OPTIONS, n_shots=1)
    made.fit(SHOWN[:1], [long], ["cat"])
    (prompt,) = prompts_seen(monkeypatch, made, NEW[:1], [long])
    shot, question = prompt.split("\n\n")
    assert shot == f"{long[:250]}\nLabel: cat"
    assert question == f"{long[:250]}\nLabel:"


def test_prompts_fit_the_models_window(monkeypatch):
    model = language_model(length=128)
    made = InContextClassifier(model, OPTIONS, n_shots=3).fit(SHOWN, ["dog " * 100] * 9, LABELS)
    seen = prompts_seen(monkeypatch, made, NEW, ["cat " * 100] * 6)
    longest = max(len(f" {option}") for option in OPTIONS)
    assert max(map(len, seen)) + longest <= 128
    assert all(prompt.startswith("cat cat") and prompt.endswith("\nLabel:") for prompt in seen)


def test_the_first_of_equal_options_is_the_answer(tiny_model, monkeypatch):
    losses = np.array([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    monkeypatch.setattr(bakeoff.models, "option_losses", lambda *rest, **more: losses)
    made = learner(tiny_model)
    assert made.predict(NEW[:3], ASKED[:3]) == [OPTIONS[1], OPTIONS[0], OPTIONS[2]]
    assert made.confidence(NEW[:3], ASKED[:3]).tolist() == [-1, -1, -1]


def test_progress_counts_inputs(tiny_model):
    seen = []
    learner(tiny_model).confidence(NEW, ASKED, progress=lambda *a: seen.append(a))
    assert seen[-1] == (6, 6)


def test_bad_arguments_are_named(tiny_model):
    with pytest.raises(DataError, match="options must hold at least one label"):
        InContextClassifier(tiny_model, [])
    with pytest.raises(DataError, match="choose must be 'similarity' or 'random', got 'best'"):
        learner(tiny_model, choose="best")
    with pytest.raises(DataError, match="n_shots must be an integer of at least 1"):
        learner(tiny_model, n_shots=0)
    with pytest.raises(DataError, match="in a window of 32, is too short"):
        learner(language_model(length=32))


@pytest.mark.model
def test_the_packaged_model_tells_sports_from_weather():
    from bakeoff.models import load_language_model

    texts = [
        "The striker scored twice in the final.",
        "Rain and strong wind are expected tomorrow.",
        "She won the tennis match in three sets.",
        "A cold front brings snow to the north.",
    ]
    made = InContextClassifier(load_language_model("smollm2-135m"), ["sport", "weather"], n_shots=4)
    vectors = np.array([[3, 1], [1, 3], [2, 1], [1, 2]])
    made.fit(vectors, texts, ["sport", "weather", "sport", "weather"])
    asked = ["The goalkeeper saved a penalty.", "Sunny with clouds in the evening."]
    answers = made.predict(np.array([[5, 2], [2, 5]]), asked)
    assert answers == ["sport", "weather"]
