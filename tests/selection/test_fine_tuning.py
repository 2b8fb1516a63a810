"""Training against a plain PyTorch loop, and its promises about tokens, prefixes and the start."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.embedding.tiny_problem import sentences
from tests.models import tiny

from bakeoff.data.samples import Sample, tokenize_sample
from bakeoff.errors import DataError
from bakeoff.models import LanguageModel
from bakeoff.selection.fine_tuning import (
    FineTuningBudget,
    collate,
    fine_tune,
    target_losses,
    training_rows,
)

TEXTS = sentences(24, 5)
PLAIN = tuple(Sample(text) for text in TEXTS[:8])
ASKED = tuple(Sample(TEXTS[i], instruction=TEXTS[i + 8]) for i in range(8))


def language_model(kind: str = "llama", seed: int = 0) -> LanguageModel:
    import transformers

    torch.manual_seed(seed)
    if kind == "gpt2":  # learnt absolute positions
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.LlamaForCausalLM(
            tiny.config(initializer_range=0.1, num_hidden_layers=2)
        )
    return LanguageModel(
        name="tiny",
        model=model.eval(),
        tokenizer=tiny.tokenizer(),
        path=Path("tiny"),
        fingerprint="0",
        max_length=64,
    )


def tuned(model, samples, folder, *, steps=4, seed=0, length=32, **settings):
    budget = FineTuningBudget(**{"batch_size": len(samples), "learning_rate": 3e-3, **settings})
    rows = training_rows(samples, model.tokenizer, length)
    return fine_tune(model, rows, budget, steps=steps, seed=seed, directory=folder)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Budget -------------------------------------------------------------------------------------------


def rows_of(lengths):
    return [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]


@pytest.mark.parametrize(
    ("lengths", "n_tokens", "expected"),
    [
        ([10] * 16, 800, 10),  # 80 tokens a step
        ([5, 15] * 8, 800, 10),  # the mean length decides
        ([10] * 16, 1, 1),
        ([10] * 2, 200, 10),  # fewer samples than a batch: 20 tokens a step
        ([10] * 10, 1000, 20),  # ten passes of two steps: 80 and 20 tokens
        ([10] * 10, 80, 1),
    ],
)
def test_steps_use_up_the_tokens(lengths, n_tokens, expected):
    assert FineTuningBudget(n_tokens=n_tokens, batch_size=8).steps(rows_of(lengths)) == expected


@pytest.mark.parametrize("n", [3, 8, 13, 20])
def test_as_many_tokens_are_read_as_the_budget_says(tmp_path, n):
    budget = FineTuningBudget(n_tokens=500, batch_size=8)
    model = language_model()
    rows = training_rows([Sample(text) for text in sentences(n, 1)], model.tokenizer, 32)
    steps = budget.steps(rows)
    found = fine_tune(model, rows, budget, steps=steps, seed=0, directory=tmp_path)
    longest = 8 * max(len(row["input_ids"]) for row in rows)
    assert found.steps == steps
    assert abs(found.n_tokens - 500) <= longest


def test_the_tokens_counted_are_those_that_trained(tmp_path):
    """Whoever prepares a batch ahead of time must not count it."""
    model = language_model()
    rows = training_rows(PLAIN, model.tokenizer, 32)
    total = sum(len(row["input_ids"]) for row in rows)
    for steps in (1, 3):
        assert tuned(model, PLAIN, tmp_path, steps=steps).n_tokens == steps * total
    halves = FineTuningBudget(batch_size=4)
    found = fine_tune(model, rows, halves, steps=4, seed=0, directory=tmp_path)
    assert found.n_tokens == 2 * total
    same = training_rows([Sample("cat dog mat")] * 8, model.tokenizer, 32)
    pairs = FineTuningBudget(batch_size=2)
    found = fine_tune(
        model, same, pairs, steps=3, seed=0, directory=tmp_path
    )  # stops within a pass
    assert found.n_tokens == 3 * 2 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"train": "head"}, "train must be full or lora, got 'head'"),
    ],
)
def test_wrong_budgets_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        FineTuningBudget(**settings)


# Rows ---------------------------------------------------------------------------------------------


def test_rows_are_tokens_with_the_prefix_unlabelled():
    tokenizer = tiny.tokenizer()
    rows = training_rows([*PLAIN[:2], *ASKED[:2]], tokenizer, 32)
    for sample, row in zip((*PLAIN[:2], *ASKED[:2]), rows, strict=True):
        prefix, response = tokenize_sample(sample, tokenizer, 32)
        assert row["input_ids"] == [*prefix, *response]
        assert row["labels"] == [-100] * len(prefix) + response
        assert bool(prefix) == bool(sample.instruction)


def test_batches_are_padded_on_the_right():
    batch = collate(
        [{"input_ids": [7], "labels": [7]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    )
    assert batch["input_ids"].tolist() == [[7, 0, 0], [5, 6, 7]]
    assert batch["labels"].tolist() == [[7, -100, -100], [-100, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


# Training -----------------------------------------------------------------------------------------


def by_hand(model, samples, *, steps, learning_rate):
    """AdamW in plain PyTorch, each sample through the model by itself: no padding, no Trainer."""
    import copy

    trained = copy.deepcopy(model.model).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=0.0)
    warm_up = round(0.03 * steps)
    for step in range(steps):
        rate = (
            step / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)
        ) * learning_rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, count = torch.zeros(()), 0
        for sample in samples:
            prefix, response = tokenize_sample(sample, model.tokenizer, 32)
            logits = trained(torch.tensor([[*prefix, *response]])).logits[0]
            start = max(len(prefix), 1)
            wanted = torch.tensor([*prefix, *response][start:])
            chosen = logits[start - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum")
            count += len(wanted)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    return trained.eval()


@pytest.mark.parametrize("samples", [PLAIN, ASKED], ids=["plain", "asked"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_training_is_a_plain_loop_of_adamw(tmp_path, samples, steps):
    """The batch is the whole data set, so that the order of samples does not matter."""
    model = language_model()
    found = tuned(model, samples, tmp_path, steps=steps, learning_rate=2e-3)
    expected = by_hand(model, samples, steps=steps, learning_rate=2e-3)
    held_out = [Sample(text) for text in TEXTS[16:]]
    losses = [
        target_losses(m, model.tokenizer, held_out, 32)
        for m in (found.model, expected, model.model)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
    assert np.abs(losses[0] - losses[2]).max() > 10 * np.abs(losses[0] - losses[1]).max()


def test_training_learns_its_samples(tmp_path):
    model = language_model()
    found = tuned(model, ASKED, tmp_path, steps=60)
    before, after = (
        target_losses(m, model.tokenizer, ASKED, 32).mean() for m in (model.model, found.model)
    )
    assert after < 0.5 * before


def test_the_model_given_is_not_changed_and_neither_is_the_callers_random_state(tmp_path):
    model = language_model()
    before = weights(model.model).clone()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = tuned(model, PLAIN, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(model.model), before)
    assert not model.model.training
    assert not found.model.training
    assert not torch.equal(weights(found.model), before)
    assert found.trained_parameters == len(before)


def test_a_seed_decides_the_order(tmp_path):
    model = language_model()

    def losses(seed):
        found = tuned(model, PLAIN, tmp_path, seed=seed, batch_size=2)
        return target_losses(found.model, model.tokenizer, PLAIN, 32)

    first = losses(0)
    np.testing.assert_allclose(losses(0), first, rtol=1e-5)
    assert np.abs(losses(1) - first).max() > 1e-3


def test_labels_of_the_prefix_give_no_gradient(tmp_path):
    """If they did, a model trained on one token after long prefixes would learn the prefixes."""
    model = language_model()
    prefix = "cat dog cat dog cat dog"
    samples = [Sample("mat", instruction=prefix)] * 4
    found = tuned(model, samples, tmp_path, steps=25, learning_rate=1e-2)
    tokenizer = model.tokenizer
    response = target_losses(found.model, tokenizer, samples[:1], 32)[0]
    assert response < 0.5
    # Losses of the prefix itself, as a document: not learnt.
    before, after = (
        target_losses(m, tokenizer, [Sample(prefix)], 32)[0] for m in (model.model, found.model)
    )
    assert after > 0.8 * before
    # The gradient is that of the response's loss alone.
    (row,) = training_rows(samples[:1], tokenizer, 32)
    batch = collate([row])
    model.model.zero_grad()
    model.model(**batch).loss.backward()
    mine = torch.cat([p.grad.flatten() for p in model.model.parameters()]).clone()
    model.model.zero_grad()
    logits = model.model(batch["input_ids"]).logits[0]
    start = row["labels"].count(-100)
    torch.nn.functional.cross_entropy(
        logits[start - 1 : -1], torch.tensor(row["input_ids"][start:])
    ).backward()
    expected = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_lora_trains_only_adapters(tmp_path):
    model = language_model()
    found = tuned(model, PLAIN, tmp_path, steps=8, train="lora", learning_rate=1e-2)
    changed = dict(found.model.named_parameters())
    original = dict(model.model.named_parameters())
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in changed.items()
        if "lora_" not in name
    }
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    adapters = {name: p for name, p in changed.items() if "lora_" in name}
    assert found.trained_parameters == sum(p.numel() for p in adapters.values())
    layers = {name.split(".lora_")[0] for name in adapters}
    assert len(layers) == 2 * 7  # every linear layer but the head
    assert all(p.abs().sum() > 0 for name, p in adapters.items() if "lora_B" in name)
    losses = [target_losses(m, model.tokenizer, PLAIN, 32) for m in (model.model, found.model)]
    assert losses[1].mean() < losses[0].mean()


def test_progress_and_callbacks_see_every_step(tmp_path):
    from transformers import TrainerCallback

    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    model, counts, seen = language_model(), Counts(), []
    fine_tune(
        model,
        training_rows(PLAIN, model.tokenizer, 32),
        FineTuningBudget(batch_size=4),
        steps=3,
        seed=0,
        directory=tmp_path,
        callbacks=[counts],
        progress=lambda *a: seen.append(a),
    )
    assert counts.steps == 3
    assert [fraction for fraction, _ in seen] == pytest.approx([1 / 3, 2 / 3, 1])
    assert seen[-1][1] == "training, step 3 of 3"


def test_nothing_is_printed_and_nothing_saved(tmp_path, capfd):
    tuned(language_model(), PLAIN, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "{" not in captured.err  # the Trainer's dictionaries of figures


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_target_losses_are_transformers_own(kind):
    model = language_model(kind)
    samples = [*PLAIN, *ASKED, Sample("cat " * 90), Sample("cat", instruction="dog " * 90)]
    expected = []
    for row in training_rows(samples, model.tokenizer, 40):
        assert len(row["input_ids"]) <= 40
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            expected.append(model.model(ids, labels=labels).loss.item())
    found = target_losses(model.model, model.tokenizer, samples, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_target_losses_of_a_model_with_adapters_do_not_depend_on_batch_mates(tmp_path):
    """Adapters hide the arguments of the model inside; its positions must be told all the same."""
    model = language_model("gpt2")
    found = tuned(model, PLAIN, tmp_path, steps=2, train="lora", learning_rate=1e-2)
    together = target_losses(found.model, model.tokenizer, [*PLAIN, *ASKED], 32)
    alone = [
        target_losses(found.model, model.tokenizer, [sample], 32)[0] for sample in (*PLAIN, *ASKED)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_losses_are_json(tmp_path):
    losses = target_losses(language_model().model, tiny.tokenizer(), PLAIN, 32)
    assert losses.dtype == np.float64
    assert json.loads(json.dumps(losses.tolist())) == losses.tolist()
