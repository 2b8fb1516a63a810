"""GATEAU against the official numbers, transformers' own losses and attention, and brute force."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.base import clone
from tests.models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bakeoff.data.far_context import far_context_samples
from bakeoff.data.samples import Sample
from bakeoff.errors import DataError, ModelError
from bakeoff.models import likelihood
from bakeoff.models.loading import LanguageModel
from bakeoff.selection import gateau
from bakeoff.selection.context_samples import sample_id
from bakeoff.selection.gateau import (
    GateauSelector,
    cam_scores,
    hmg_scores,
    homologous_guidance,
)
from bakeoff.selection.response_attention import response_attention, visit_attention_rows

BOS = 256


def byte_tokenizer(bos=True):
    """One token per byte, so that joining texts and joining their ids is the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS, "<pad>": 257}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<pad>")


def llama(seed=0, attention="sdpa", **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # attention far from uniform
    }
    config = LlamaConfig(**{**shape, **changes})
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


TOKENIZER = byte_tokenizer()
SAMPLES = [
    {"context": "a b c d e f g h i j", "instruction": "first letter?", "response": "a"},
    {"context": "the cat sat on the mat " * 4, "instruction": "who?", "response": "the cat sat"},
    {"context": "zzz", "response": "no instruction here"},
    {
        "context": "1 2 3 4 5 6 7 8 " * 3,
        "instruction": "count\non",
        "response": "9 10 ### Input: 11",
    },
    {"context": "A: 1\nB: 2\nC: 3\n", "instruction": "B?", "response": "\u00e9t\u00e9"},
]


def prompt(sample):
    """The paper's text before the response's space."""
    asked = sample.get("instruction", "")
    asked = f"\n\n ### Instruction: {asked}" if asked else ""
    return f"### Input: {sample['context']}{asked}\n\n ### Response:"


def joint_ids(sample):
    """Ids of the whole text, tokenised at once, and the number of them that are the response's."""
    response = f" {sample['response']}"
    return TOKENIZER(prompt(sample) + response)["input_ids"], len(response.encode())


def hf_loss(model, ids, n_response):
    labels = torch.tensor([ids])
    labels[0, :-n_response] = -100
    return model(torch.tensor([ids]), labels=labels).loss.item()


def loop_loss(model, ids, n_response):
    """Token by token, in float64."""
    losses = []
    for place in range(len(ids) - n_response, len(ids)):
        logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[place]].item())
    return sum(losses) / len(losses)


# HMG ----------------------------------------------------------------------------------------------


def test_official_numbers():
    """Min-max and softmax as the official ranking script computes them."""
    found = homologous_guidance([10, 4, 6, 8], [3, 4, 2, 8])
    np.testing.assert_allclose(found.differences, [5 / 6, -1 / 3, 1 / 3, -1 / 3], atol=1e-15)
    powers = [math.exp(d) for d in (5 / 6, -1 / 3, 1 / 3, -1 / 3)]
    np.testing.assert_allclose(found.scores, np.array(powers) / sum(powers), rtol=1e-14)
    assert found.scores[1] == found.scores[3]


@settings(max_examples=50, deadline=None)
@given(
    short=st.lists(st.floats(1, 1e4), min_size=2, max_size=8),
    seed=st.integers(0, 100),
    scale=st.floats(0.1, 10),
    shift=st.floats(0, 10),
)
def test_normalisation_forgets_what_it_should(short, seed, scale, shift):
    short = np.array(short)
    long = np.random.default_rng(seed).uniform(1, 50, len(short))
    spread = np.ptp(short) > 1e-3  # else scaling is rounding noise
    plain = homologous_guidance(short, long)
    assert np.isclose(plain.scores.sum(), 1)
    assert (np.abs(plain.differences) <= 1).all()
    if spread:
        moved = homologous_guidance(short * scale + shift, long)
        np.testing.assert_allclose(moved.differences, plain.differences, atol=1e-6)
        logs = homologous_guidance(short, long, "log").differences
        powered = homologous_guidance(short**scale, long, "log").differences
        np.testing.assert_allclose(powered, logs, atol=1e-6)
    ranks = homologous_guidance(short, long, "rank").differences
    cubed = homologous_guidance(np.sqrt(short), long**3, "rank").differences
    ties = len(np.unique(np.sqrt(short))) == len(np.unique(short))  # rounding may make ties
    if ties:
        np.testing.assert_array_equal(cubed, ranks)


def test_one_outlier_squeezes_minmax_and_not_the_others():
    short, long = [10.0, 20, 30, 1e6], [10.0, 10, 10, 10]
    assert np.ptp(homologous_guidance(short, long).differences[:3]) < 1e-4
    assert np.ptp(homologous_guidance(short, long, "log").differences[:3]) > 0.05
    np.testing.assert_allclose(
        homologous_guidance(short, long, "rank").differences, [0, 1 / 3, 2 / 3, 1]
    )


def test_perplexities_equal_transformers_and_a_loop():
    short, long = llama(1), llama(2)
    found = hmg_scores(SAMPLES, short, long, TOKENIZER)
    for row, sample in enumerate(SAMPLES):
        ids, n = joint_ids(sample)
        for model, value in (
            (short, found.short_perplexities[row]),
            (long, found.long_perplexities[row]),
        ):
            assert np.isclose(math.log(value), hf_loss(model, ids, n), atol=1e-5)
            assert np.isclose(math.log(value), loop_loss(model, ids, n), atol=1e-5)
    by_hand = homologous_guidance(found.short_perplexities, found.long_perplexities)
    np.testing.assert_array_equal(found.scores, by_hand.scores)


def test_a_sample_scores_alike_whatever_it_is_batched_with():
    model = llama()
    together = hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=8)
    for row, sample in enumerate(SAMPLES):
        alone = hmg_scores([sample], model, None, TOKENIZER, truncate_context=8)
        assert np.isclose(alone.short_perplexities[0], together.short_perplexities[row], rtol=1e-5)
        assert np.isclose(alone.long_perplexities[0], together.long_perplexities[row], rtol=1e-5)


def test_too_long_texts_are_cut_on_the_left_and_keep_their_labels():
    short, long = llama(1), llama(2)
    window = 60
    with pytest.warns(UserWarning, match=r"[1-5] of 5 samples are longer than max_length=60"):
        found = hmg_scores(SAMPLES, short, long, TOKENIZER, window)
    cut = 0
    for row, sample in enumerate(SAMPLES):
        ids, n = joint_ids(sample)
        kept = [BOS, *ids[1:][-(window - 1) :]]  # as transformers truncates on the left
        cut += len(kept) < len(ids)
        assert len(kept) <= window
        expected = hf_loss(long, kept, n)
        assert np.isfinite(expected)
        assert np.isclose(math.log(found.long_perplexities[row]), expected, atol=1e-5)
    assert cut >= 3


@pytest.mark.parametrize("shown", [1, 7, 30])
def test_the_short_model_sees_only_the_end_of_the_context(shown):
    model = llama()
    found = hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=shown)
    for row, sample in enumerate(SAMPLES):
        context = f" {sample['context']}"[-shown:]
        text = prompt({**sample, "context": ""}).replace("### Input: ", f"### Input:{context}", 1)
        response = f" {sample['response']}"
        ids = TOKENIZER(text + response)["input_ids"]
        expected = hf_loss(model, ids, len(response.encode()))
        assert np.isclose(math.log(found.short_perplexities[row]), expected, atol=1e-5)
        assert np.isclose(
            math.log(found.long_perplexities[row]), hf_loss(model, *joint_ids(sample)), atol=1e-5
        )


def test_equal_models_give_equal_scores():
    """Nothing is cut off, so the pair is one model twice."""
    found = hmg_scores(SAMPLES, llama(), None, TOKENIZER, truncate_context=1000)
    np.testing.assert_array_equal(found.scores, np.full(5, 0.2))
    copies = hmg_scores(SAMPLES, llama(), llama(), TOKENIZER)
    np.testing.assert_allclose(copies.scores, 0.2, atol=1e-6)


def test_no_bos_where_the_tokenizer_adds_none():
    bare = byte_tokenizer(bos=False)
    model = llama()
    found = hmg_scores(SAMPLES[:1], model, None, bare, truncate_context=1000)
    ids, n = joint_ids(SAMPLES[0])
    assert np.isclose(math.log(found.long_perplexities[0]), hf_loss(model, ids[1:], n), atol=1e-5)
    with_bos = hmg_scores(SAMPLES[:1], model, None, TOKENIZER, truncate_context=1000)
    assert not np.isclose(found.long_perplexities[0], with_bos.long_perplexities[0], rtol=1e-4)


# Attention ----------------------------------------------------------------------------------------


CAUSAL = {
    name: model.replace("Model", "ForCausalLM")
    for name, (_, model, _) in (tiny.ARCHITECTURES.items())
} | {"gemma3": "Gemma3ForCausalLM"}


def causal(name, attention):
    torch.manual_seed(0)
    made = getattr(transformers, CAUSAL[name])
    config = tiny.config(name, initializer_range=0.2)
    return made._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "sdpa") for name in CAUSAL if name != "gemma2"),
        *((name, "eager") for name in CAUSAL),
    ],
)
@pytest.mark.parametrize("block", [3, 64])
def test_rows_equal_the_full_matrix(name, attention, block):
    model = causal(name, attention)
    ids = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(1)).tolist()
    prefix, response = ids[:20], ids[20:]
    rows = np.zeros((4, 4, len(response), len(ids)))
    sizes = set()

    def keep(layer, first_row, first_key, weights):
        _, n_rows, n_keys = weights.shape
        sizes.add(n_rows)
        part = rows[layer, :, first_row : first_row + n_rows]
        part[..., first_key : first_key + n_keys] = weights.numpy()

    visit_attention_rows(model, prefix, response, keep, block=block)
    found = response_attention(model, prefix, response, block=block)
    assert model.config._attn_implementation == attention
    assert max(sizes) == min(block, len(response))

    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(torch.tensor([ids]), output_attentions=True).attentions
    full = torch.stack(full)[:, 0, :, len(prefix) :].numpy()
    np.testing.assert_allclose(rows, full, atol=1e-5)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found, full.mean(axis=(0, 1, 2)), atol=1e-6)
    assert np.isclose(found.sum(), 1, atol=1e-6)
    assert full.std() > 0.02  # attention is not uniform, so a wrong row would show


def test_layers_and_heads_can_be_chosen():
    model = llama()
    ids = list(range(30))
    with torch.no_grad():
        eager = llama(attention="eager")
        full = torch.stack(eager(torch.tensor([ids]), output_attentions=True).attentions)
    full = full[:, 0, :, 22:].numpy()
    for layers, heads in (([0], "all"), ([-1], [3]), ([0, 2], [1, 2]), ("all", [0])):
        found = response_attention(model, ids[:22], ids[22:], layers=layers, heads=heads)
        chosen = full[range(3) if layers == "all" else layers]
        chosen = chosen[:, range(4) if heads == "all" else heads]
        np.testing.assert_allclose(found, chosen.mean(axis=(0, 1, 2)), atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = llama(attention_dropout=0.5).train()
    ids = list(range(30))
    found = response_attention(model, ids[:20], ids[20:])
    np.testing.assert_array_equal(found, response_attention(model, ids[:20], ids[20:]))
    assert model.training
    with pytest.raises(RuntimeError, match="stop"):
        visit_attention_rows(
            model, ids[:20], ids[20:], lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
        )
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_refusals():
    model = llama()
    for prefix, response in (([], [1]), ([1], [])):
        with pytest.raises(DataError, match="at least one token each"):
            response_attention(model, prefix, response)
    for choice in ({"layers": [3]}, {"heads": [4]}, {"layers": []}, {"heads": "some"}):
        with pytest.raises(DataError, match=next(iter(choice))):
            response_attention(model, [1], [2], **choice)
    with pytest.raises(DataError, match="block"):
        response_attention(model, [1], [2], block=0)
    config = transformers.MambaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2
    )
    with pytest.raises(ModelError, match="no attention layers"):
        response_attention(transformers.MambaForCausalLM(config), [1], [2])
    silent = model.model.layers[1].self_attn
    forward = silent.forward
    silent.forward = lambda *args, **options: (forward(*args, **options)[0], None)
    with pytest.raises(ModelError, match="no attention weights"):
        response_attention(model, [1], [2])


# CAM ----------------------------------------------------------------------------------------------


def brute_force_cam(model, sample, length, *, drop_first=False, drop_incomplete=False):
    """Segment by segment, from full attention matrices and transformers' loss."""
    head = TOKENIZER(f"### Input: {sample['context']}")["input_ids"][1:]
    ids, n = joint_ids(sample)
    tail = ids[1 + len(head) :]  # instruction, marker, response
    with torch.no_grad():
        full = model(torch.tensor([ids]), output_attentions=True).attentions
    attention, perplexities = [], []
    for start in range(0, len(head), length):
        segment = head[start : start + length]
        if drop_incomplete and len(segment) < length and attention:
            continue
        values = [
            full[layer][0, h, row, 1 + start : 1 + start + len(segment)].mean().item()
            for layer in range(len(full))
            for h in range(full[layer].shape[1])
            for row in range(len(ids) - n, len(ids))
        ]
        attention.append(np.mean(values))
        perplexities.append(math.exp(hf_loss(model, [BOS, *segment, *tail], n)))
    if drop_first and len(attention) > 1:
        attention, perplexities = attention[1:], perplexities[1:]
    weights = [math.exp(-p + min(perplexities)) for p in perplexities]
    a, q = np.array(attention) / sum(attention), np.array(weights) / sum(weights)
    return a, q, a @ q / math.sqrt((a @ a) * (q @ q))


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (16, {}),
        (16, {"drop_first": True}),
        (10, {"drop_incomplete": True}),
        (1000, {"drop_first": True, "drop_incomplete": True}),
    ],
)
def test_cam_equals_brute_force(length, options):
    # Small weights: perplexities near the vocabulary's size differ by ones, not by hundreds.
    model = llama(initializer_range=0.08)
    eager = llama(initializer_range=0.08, attention="eager")
    ours = {f"{name}_segment": value for name, value in options.items()}
    found = cam_scores(SAMPLES, model, TOKENIZER, length, **ours)
    similarities = []
    for row, sample in enumerate(SAMPLES):
        a, q, cosine = brute_force_cam(eager, sample, length, **options)
        np.testing.assert_allclose(found.attention[row], a, atol=1e-5)
        np.testing.assert_allclose(found.importance[row], q, atol=2e-3)
        assert np.isclose(found.similarities[row], cosine, atol=2e-3)
        similarities.append(found.similarities[row])
    powers = np.exp(1 - np.array(similarities))
    np.testing.assert_allclose(found.scores, powers / powers.sum(), rtol=1e-12)
    if length == 16:
        assert len(found.attention[1]) > 4
        assert np.ptp(similarities) > 0.05
        assert any(q.max() > 1.3 / len(q) for q in found.importance if len(q) > 1)


def test_one_segment_is_always_followed():
    found = cam_scores(SAMPLES, llama(), TOKENIZER, segment_length=1000)
    np.testing.assert_array_equal(found.similarities, 1)
    np.testing.assert_array_equal(found.scores, 0.2)


def test_attention_equal_to_importance_is_followed(monkeypatch):
    def perfect(*_):
        losses = np.array([0.1, 1.0, 0.5])
        q = np.exp(-np.exp(losses))
        return 0.3 * q / q.sum(), losses

    monkeypatch.setattr(gateau, "_segment_scores", perfect)
    found = cam_scores(SAMPLES, llama(), TOKENIZER)
    np.testing.assert_allclose(found.similarities, 1, rtol=1e-12)


def test_long_contexts_lose_their_beginning_and_long_answers_their_end():
    model = llama(max_position_embeddings=4096)
    sample = {"context": "c" * 50 + "d" * 700, "instruction": "i" * 600, "response": "r" * 600}
    same = {"context": "x" * 50 + "d" * 700, "instruction": "i" * 600, "response": "r" * 700}
    window = 1600
    with pytest.warns(UserWarning, match="2 of 2 samples are longer"):
        found = cam_scores([sample, same], model, TOKENIZER, 128, max_length=window)
    np.testing.assert_array_equal(found.attention[0], found.attention[1])
    np.testing.assert_array_equal(found.perplexities[0], found.perplexities[1])
    # 1600 - <s> - 500 of the instruction - "\n\n ### Response:" - 500 of the response
    assert len(found.attention[0]) == math.ceil((window - 1 - 500 - 16 - 500) / 128)


# The file of scores -------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    model, file = llama(), tmp_path / "below" / "scores.jsonl"
    options = {"truncate_context": 8, "scores_file": file}
    calls = []
    real = likelihood.response_losses

    def counted(model, prefixes, responses, **rest):
        calls.append(len(responses))
        return real(model, prefixes, responses, **rest)

    monkeypatch.setattr(likelihood, "response_losses", counted)
    monkeypatch.setattr(gateau, "_CHUNK", 2)
    whole = hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=8)
    calls.clear()

    def stop(done, total):
        assert total == 10
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hmg_scores(SAMPLES, model, None, TOKENIZER, **options, progress=stop)
    assert 5 < sum(calls) < 9  # the short context is one computation for both models
    written = len(file.read_text().splitlines())
    assert written == sum(calls)
    with file.open("a") as stream:
        stream.write('{"id": "torn", "key": "to')  # what a kill leaves
    calls.clear()
    resumed = hmg_scores(SAMPLES, model, None, TOKENIZER, **options)
    assert sum(calls) == len(hmg_keys(file)) - written
    np.testing.assert_array_equal(resumed.scores, whole.scores)

    calls.clear()
    again = hmg_scores(SAMPLES[::-1], model, None, TOKENIZER, **options)  # by content, not row
    assert not calls
    np.testing.assert_allclose(again.scores[::-1], whole.scores, rtol=1e-14)
    ids = {sample_id(sample) for sample in SAMPLES}
    assert {record["id"] for record in hmg_keys(file)} == ids

    # Another model, or other settings, are not served by it.
    other = hmg_scores(SAMPLES, llama(7), None, TOKENIZER, **options)
    assert sum(calls) > 0
    assert not np.allclose(other.long_perplexities, whole.long_perplexities)
    calls.clear()
    hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=9, scores_file=file)
    assert sum(calls) > 0


def hmg_keys(file):
    records = []
    for line in Path(file).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            assert '"torn"' in line
    return records


def test_segments_are_kept_too(tmp_path, monkeypatch):
    model, file = llama(), tmp_path / "scores.jsonl"
    hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=8, scores_file=file)
    first = cam_scores(SAMPLES, model, TOKENIZER, 16, scores_file=file)
    monkeypatch.setattr(gateau, "response_attention", None)  # not to be called again
    again = cam_scores(SAMPLES, model, TOKENIZER, 16, scores_file=file)
    np.testing.assert_array_equal(again.scores, first.scores)
    cam_scores(SAMPLES, model, TOKENIZER, 16, "all", "all", True, scores_file=file)
    for change in ({"segment_length": 15}, {"layers": [0]}, {"heads": [1]}):
        with pytest.raises(TypeError):
            cam_scores(
                SAMPLES, model, TOKENIZER, **{"segment_length": 16, **change}, scores_file=file
            )


# The selector -------------------------------------------------------------------------------------


def selector(**changes):
    options = {"model": llama(), "tokenizer": TOKENIZER, "segment_length": 16}
    return GateauSelector(**{**options, **changes})


@pytest.mark.parametrize("combine", ["softmax", "rank", "z"])
@pytest.mark.parametrize("alpha", [0.8, 0.3])
def test_scores_are_the_weighted_sum(combine, alpha):
    chosen = selector(n_select=3, alpha=alpha, combine=combine, truncate_context=8).fit(SAMPLES)
    model = chosen.model
    hmg = hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=8)
    cam = cam_scores(SAMPLES, model, TOKENIZER, 16)
    np.testing.assert_array_equal(chosen.hmg_, hmg.scores)
    np.testing.assert_array_equal(chosen.cam_, cam.scores)
    scale = {
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
        "rank": lambda x: (rankdata(x) - 1) / 4,
        "z": lambda x: (x - x.mean()) / x.std(),
    }[combine]
    expected = alpha * scale(hmg.differences) + (1 - alpha) * scale(1 - cam.similarities)
    np.testing.assert_allclose(chosen.scores_, expected, rtol=1e-9, atol=1e-12)
    assert chosen.selected_indices_.tolist() == np.argsort(-expected)[:3].tolist()
    assert chosen.selected_indices_.dtype == np.int64
    ranks = (5 - rankdata(hmg.scores) + 1, 5 - rankdata(cam.scores) + 1)
    assert chosen.reasons() == [
        f"HMG rank {int(ranks[0][row])}, CAM rank {int(ranks[1][row])}"
        for row in chosen.selected_indices_
    ]


def test_with_all_weight_on_one_the_other_is_not_computed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gateau, "cam_scores", None)
        chosen = selector(alpha=1, n_select=2).fit(SAMPLES)
    assert chosen.cam_ is None
    assert chosen.awareness_ is None
    assert chosen.reasons() == ["HMG rank 1", "HMG rank 2"]
    np.testing.assert_allclose(chosen.scores_, chosen.hmg_)
    monkeypatch.setattr(gateau, "hmg_scores", None)
    chosen = selector(alpha=0, n_select=2).fit(SAMPLES)
    assert chosen.hmg_ is None
    assert chosen.reasons() == ["CAM rank 1", "CAM rank 2"]


def test_how_many_and_which_are_picked():
    every = selector(fraction=1).fit(SAMPLES)
    assert sorted(every.selected_indices_) == [0, 1, 2, 3, 4]
    assert len(selector(fraction=0.3).fit(SAMPLES).selected_indices_) == 2
    assert len(selector(fraction=0.01).fit(SAMPLES).selected_indices_) == 1
    assert len(selector(fraction=0.01, n_select=4).fit(SAMPLES).selected_indices_) == 4
    taken = [int(every.selected_indices_[0]), 3]
    rest = selector(fraction=1).fit(SAMPLES, already_labeled=taken)
    kept = [row for row in every.selected_indices_ if row not in taken]
    assert rest.selected_indices_.tolist() == kept
    np.testing.assert_array_equal(rest.scores_, every.scores_)
    np.testing.assert_array_equal(selector().select(SAMPLES, 2), every.selected_indices_[:2])


def test_order_and_form_of_the_samples_do_not_matter():
    by_dict = selector(n_select=5).fit(SAMPLES)
    by_record = selector(n_select=5).fit([Sample(**sample) for sample in SAMPLES])
    np.testing.assert_array_equal(by_dict.scores_, by_record.scores_)
    turned = selector(n_select=5).fit(SAMPLES[::-1])
    np.testing.assert_allclose(turned.scores_[::-1], by_dict.scores_, rtol=1e-5)
    assert (4 - turned.selected_indices_).tolist() == by_dict.selected_indices_.tolist()


def test_copies_tie_and_are_pointed_out():
    with pytest.warns(UserWarning, match="2 samples are copies"):
        chosen = selector(n_select=7).fit([*SAMPLES, SAMPLES[1], SAMPLES[1]])
    assert len(set(chosen.scores_[[1, 5, 6]])) == 1
    picks = chosen.selected_indices_.tolist()
    place = picks.index(1)
    assert picks[place : place + 3] == [1, 5, 6]


def test_defaults_make_a_pair_of_one_model():
    language_model = LanguageModel("tiny", llama(), TOKENIZER, Path("tiny"), "f" * 64, 2048)
    chosen = GateauSelector(n_select=2, model=language_model, segment_length=16).fit(SAMPLES)
    explicit = selector(n_select=2, truncate_context=16).fit(SAMPLES)
    np.testing.assert_array_equal(chosen.scores_, explicit.scores_)
    # A sibling of its own sees everything.
    pair = selector(n_select=2, short_model=llama(5)).fit(SAMPLES)
    whole = hmg_scores(SAMPLES, llama(5), llama(), TOKENIZER)
    np.testing.assert_allclose(pair.hmg_, whole.scores, rtol=1e-6)


def test_estimator_conventions():
    chosen = selector(n_select=2, alpha=0.7, scores_file=None)
    copy = clone(selector(n_select=2, alpha=0.7, model="smollm2-135m"))
    assert copy.get_params()["alpha"] == 0.7
    assert copy.get_params()["model"] == "smollm2-135m"
    chosen.fit(SAMPLES)
    thawed = pickle.loads(pickle.dumps(chosen))
    np.testing.assert_array_equal(thawed.selected_indices_, chosen.selected_indices_)
    assert thawed.reasons() == chosen.reasons()
    np.testing.assert_array_equal(
        chosen.selected_indices_, selector(n_select=2, alpha=0.7).fit(SAMPLES).selected_indices_
    )


def test_progress_counts_every_step():
    seen = []
    selector(n_select=2).fit(SAMPLES, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {15}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (15, 15)


# Refusals -----------------------------------------------------------------------------------------


def test_samples_that_cannot_be_scored_are_named():
    model = llama()
    empty = [*SAMPLES[:2], {"context": " ", "response": "r"}, {"context": "", "response": "r"}]
    with pytest.raises(DataError, match="needs a context; it is empty in samples 2, 3"):
        selector().fit(empty)
    with pytest.raises(DataError, match="needs a response; it is empty in sample 1"):
        selector().fit([SAMPLES[0], {"context": "c", "response": ""}])
    with pytest.raises(DataError, match="sample 0 must have a text 'response', got nothing"):
        selector().fit([{"context": "c"}])
    with pytest.raises(DataError, match="sample 0 must have a text 'context', got nothing"):
        selector().fit(["a plain text"])
    for none in ([], "text", {"context": "c", "response": "r"}):
        with pytest.raises(DataError, match="samples must"):
            selector().fit(none)
    with pytest.raises(DataError, match="response fill the window of max_length=15 in sample"):
        hmg_scores(SAMPLES, model, None, TOKENIZER, 15, truncate_context=8)
    with pytest.raises(DataError, match="instruction and response fill the window"):
        cam_scores(SAMPLES, model, TOKENIZER, max_length=60)


def test_models_that_cannot_score_are_refused():
    model = llama()
    with pytest.raises(DataError, match="truncate_context"):
        hmg_scores(SAMPLES, model, model, TOKENIZER)
    with pytest.raises(DataError, match="tokenizer must be given"):
        hmg_scores(SAMPLES, model, truncate_context=8)
    with pytest.raises(DataError, match="got object"):
        hmg_scores(SAMPLES, object(), None, TOKENIZER, truncate_context=8)
    with pytest.raises(ModelError, match="do not belong together"):
        hmg_scores(SAMPLES, llama(vocab_size=100), None, TOKENIZER, truncate_context=8)
    first = LanguageModel("a", llama(), TOKENIZER, Path("a"), "a", 2048)
    second = LanguageModel("b", llama(), tiny.tokenizer(), Path("b"), "b", 2048)
    with pytest.raises(ModelError, match="different tokenizers"):
        hmg_scores(SAMPLES, first, second)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(DataError, match=rf"no finite perplexity.*{sample_id(SAMPLES[0])}"):
        hmg_scores(SAMPLES, model, None, TOKENIZER, truncate_context=8)
    with pytest.raises(DataError, match=rf"for sample 0 \(id {sample_id(SAMPLES[0])}"):
        cam_scores(SAMPLES, model, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha"),
        ({"fraction": 0}, "fraction"),
        ({"normalize": "zscore"}, "normalize must be one of 'minmax', 'rank', 'log', got 'zscore'"),
        ({"combine": "minmax"}, "combine must be one of"),
        ({"n_select": 6}, "n_select must be between 1 and 5"),
        ({"segment_length": 0}, "segment_length"),
        ({"truncate_context": 0}, "truncate_context"),
        ({"layers": [9]}, "layers"),
    ],
)
def test_parameters_out_of_range(options, message):
    with pytest.raises(DataError, match=message):
        selector(**options).fit(SAMPLES)


def test_perplexities_that_make_no_sense():
    with pytest.raises(DataError, match="as many"):
        homologous_guidance([1, 2], [1])
    with pytest.raises(DataError, match=r"long_perplexities must be positive.* sample 1"):
        homologous_guidance([1, 2], [1, np.nan])
    with pytest.raises(DataError, match="shape"):
        homologous_guidance([], [])


# A real model -------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_small_model_tells_what_needs_the_far_context():
    from bakeoff.models import load_language_model

    samples = far_context_samples(6, n_lines=16, kinds=("far", "near", "none"))
    found = hmg_scores(samples, load_language_model("smollm2-135m"), truncate_context=64)
    gain = np.log(found.short_perplexities / found.long_perplexities)
    far = np.array([sample.kind == "far" for sample in samples])
    assert gain[far].min() > 0.5
    assert gain[~far].max() < 0.5
