"""The small GPT learns, is made once, and is an ordinary folder for everybody who loads it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.embedding.tiny_problem import sentences

from bakeoff.errors import DataError
from bakeoff.models import load_language_model, response_losses
from bakeoff.models.small_gpt import SmallGPT, _batches, _byte_pair_tokenizer, _packed

TEXTS = [f"{text}, naïvely: 100 %" for text in sentences(500, 1)]
HELD_OUT = [f"{text}, naïvely: 100 %" for text in sentences(520, 1)[500:]]
TINY = SmallGPT(
    vocabulary=300, n_layers=2, width=32, n_heads=4, context=16, steps=60, batch_size=8,
    learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder():
    return TINY.pretrained(TEXTS)


def mean_loss(folder, texts=HELD_OUT):
    model = load_language_model(folder)
    ids = model.tokenizer(list(texts)).input_ids
    losses = response_losses(model.model, [[]] * len(ids), ids)
    return losses.sums.sum() / losses.n_tokens.sum()


def test_it_learns(folder):
    untrained = mean_loss(replace(TINY, steps=1, learning_rate=1e-9).pretrained(TEXTS))
    model = load_language_model(folder)
    vocabulary = model.model.config.vocab_size
    assert untrained == pytest.approx(math.log(vocabulary), rel=0.05)  # knows nothing
    assert mean_loss(folder) < 0.6 * untrained


def test_progress_tells_the_falling_loss():
    seen = []
    replace(TINY, seed=5).pretrained(TEXTS, progress=lambda *a: seen.append(a))
    assert [fraction for fraction, _ in seen] == pytest.approx(np.arange(1, 61) / 60)
    losses = [float(message.removeprefix("training a small GPT, loss ")) for _, message in seen]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_small_pool_is_not_learnt_by_heart():
    """However many steps were asked for, nothing is read more than twice."""
    seen = []
    few = TEXTS[:40]
    folder = replace(TINY, steps=1000).pretrained(few, progress=lambda *a: seen.append(a))
    n_rows = len(_packed(load_language_model(folder).tokenizer, few, 16, 0))
    assert len(seen) == math.ceil(2 * n_rows / 8)
    assert seen[-1][0] == 1


def test_it_loads_as_a_language_model(folder):
    model = load_language_model(folder)
    assert model.max_length == 16
    config = model.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight
    tokenizer = model.tokenizer
    assert tokenizer.eos_token_id is not None
    assert len(tokenizer) == config.vocab_size <= 300
    ids = tokenizer(TEXTS[0]).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == TEXTS[0]
    odd = "人 ∑ \n\t never seen"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    files = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_the_default_has_the_weights_that_it_says():
    from transformers import LlamaConfig, LlamaForCausalLM

    made = SmallGPT()
    config = LlamaConfig(
        vocab_size=made.vocabulary, hidden_size=made.width, intermediate_size=4 * made.width,
        num_hidden_layers=made.n_layers, num_attention_heads=made.n_heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        n = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert n == pytest.approx(3.1e6, rel=0.02)


def test_it_is_made_once_for_texts_and_settings(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(
        SmallGPT,
        "_train",
        lambda self, texts, folder, progress: trained.append(self) or (folder / "x").write_text(""),
    )
    assert TINY.pretrained(TEXTS) == folder
    assert SmallGPT(**vars(TINY)).pretrained(tuple(TEXTS)) == folder
    assert trained == []
    folders = {
        folder,
        TINY.pretrained(TEXTS[::-1]),
        TINY.pretrained(TEXTS[1:]),
        TINY.pretrained(["".join(TEXTS[:2]), *TEXTS[2:]]),
        replace(TINY, seed=1).pretrained(TEXTS),
        replace(TINY, context=17).pretrained(TEXTS),
        replace(TINY, steps=61).pretrained(TEXTS),
    }
    assert len(folders) == 7
    assert len(trained) == 6


def test_the_same_settings_give_the_same_weights(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = TINY.pretrained(TEXTS)
    assert torch.equal(torch.random.get_rng_state(), before)
    mine, theirs = (load_language_model(f).model.state_dict() for f in (folder, again))
    assert again != folder
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_texts_are_packed_with_an_end_after_each():
    tokenizer = _byte_pair_tokenizer(TEXTS, 300, 16)
    rows = _packed(tokenizer, TEXTS, 16, seed=0)
    stream = rows.flatten().tolist()
    texts = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert len(texts) >= 450
    assert set(texts[:-1]) <= set(TEXTS)
    assert len(set(texts[:-1])) == len(texts) - 1
    n_tokens = sum(len(ids) + 1 for ids in tokenizer(TEXTS).input_ids)
    assert rows.shape == (n_tokens // 16, 16)
    assert not torch.equal(rows, _packed(tokenizer, TEXTS, 16, seed=1))


def test_every_sequence_is_read_equally_often():
    sequences = torch.arange(10)[:, None]
    torch.manual_seed(0)
    batches = list(_batches(sequences, 4, 10))
    assert [len(batch) for batch in batches] == [4] * 10
    assert torch.cat(batches).flatten().bincount().tolist() == [4] * 10
    assert sorted(torch.cat(batches).flatten()[:10].tolist()) == list(range(10))


@pytest.mark.parametrize("texts", [["too short"], [], [""]])
def test_too_little_text_is_refused_and_leaves_nothing(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"the texts hold \d+ tokens, less than one sequence of 16"):
        TINY.pretrained(texts)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"vocabulary": 200}, "vocabulary must be at least 257, got 200"),
        ({"width": 30}, "width must be an even multiple of n_heads, 4, got 30"),
        ({"width": 12}, "width must be an even multiple of n_heads, 4, got 12"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        replace(TINY, **changes)


def test_untrained_models_follow_the_seed_and_leave_the_generator_alone():
    tokenizer = TINY.tokenizer(TEXTS)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (TINY.untrained(tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.config.model_type == "llama"


def test_parallel_blocks_add_what_both_parts_make_of_one_input():
    tokenizer = TINY.tokenizer(TEXTS)
    model = TINY.untrained(tokenizer, block="parallel").model
    ids = torch.tensor([[5, 7, 9, 11]])
    layer, seen = model.layers[0], {}
    layer.register_forward_hook(lambda _, given, made: seen.update(x=given[0], y=made))
    layer.self_attn.register_forward_hook(lambda _, given, made: seen.update(attended=made[0]))
    with torch.no_grad():
        model(ids)
        expected = seen["x"] + seen["attended"] + layer.mlp(layer.input_layernorm(seen["x"]))
    made = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
    assert torch.allclose(made, expected, atol=1e-6)
    with pytest.raises(DataError, match="block must be sequential or parallel, got 'x'"):
        TINY.untrained(tokenizer, block="x")
