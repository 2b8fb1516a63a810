"""The loss against pytorch-metric-learning's values, word vectors by hand, training. About 40 s."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from tests.embedding.small_models import llama, tokenizer

from bakeoff.data.lexicons import Constraints, Lexicon, build_pairs
from bakeoff.embedding.bottleneck_adapters import (
    AdaptedNorm,
    BottleneckAdapter,
    _without_adapters,
    add_adapters,
)
from bakeoff.embedding.lexical import (
    LexicalSpecializer,
    _Reader,
    nt_xent,
    supervised_contrastive,
)
from bakeoff.embedding.word_vectors import WordEncoder, WordPooling, word_mask
from bakeoff.errors import DataError, ModelError

# Two synonyms for each of four things, in two "languages", some of two tokens.
WORDS = Constraints.of(
    [("1", "cat", "en", "the red cat"), ("1", "dog", "fr", "a cat"),
     ("2", "mat", "en", "under a tree"), ("2", "red tree", "fr", "the mat"),
     ("3", "sat", "en", "sat on"), ("3", "ran on", "fr", "ran under"),
     ("4", "under", "en", "a"), ("4", "the mat", "fr", "on the red mat")]
)  # fmt: skip


def bert(dropout=0.1):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=17,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
            pad_token_id=0,
        )
    ).eval()
    model.embeddings.word_embeddings.weight.data *= 5  # or positions are all that it sees
    return model


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    (bert(dropout=0.0) if request.param == "encoder" else llama()).save_pretrained(path)
    tokenizer(bos=request.param == "encoder").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


# --- the loss ---------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
# losses.NTXentLoss and SupConLoss of pytorch-metric-learning 2.9.0 with CosineSimilarity, and with
# the CSLS distance of the authors' code, on torch.manual_seed(0); torch.randn(8, 16). The second
# number is the norm of the gradient.
LIBRARY = [
    (nt_xent, "cosine", 0.07, 2.845731735229492, 2.0954067707061768),
    (supervised_contrastive, "cosine", 0.07, 4.715147972106934, 2.3590140342712402),
    (nt_xent, "cosine", 0.5, 1.52852463722229, 0.26105284690856934),
    (supervised_contrastive, "cosine", 0.5, 2.0009193420410156, 0.2623516023159027),
    (nt_xent, "csls", 0.07, 5.123988628387451, 4.47231912612915),
    (supervised_contrastive, "csls", 0.07, 8.364641189575195, 5.199615001678467),
    (nt_xent, "csls", 0.5, 1.5666022300720215, 0.5031472444534302),
    (supervised_contrastive, "csls", 0.5, 2.1913511753082275, 0.5377242565155029),
]


@pytest.mark.parametrize(("loss", "similarity", "temperature", "value", "slope"), LIBRARY)
def test_losses_and_gradients_are_the_librarys(loss, similarity, temperature, value, slope):
    torch.manual_seed(0)
    vectors = torch.randn(8, 16, requires_grad=True)
    found = loss(vectors, LABELS, temperature, similarity=similarity)
    found.backward()
    assert found.item() == pytest.approx(value, abs=2e-6)
    assert vectors.grad.norm().item() == pytest.approx(slope, rel=1e-5)


def test_words_without_partner_are_negatives_only():
    torch.manual_seed(0)
    vectors, labels = torch.randn(8, 16), torch.tensor([0, 0, 1, 1, 2, 3, 0, 0])
    # The same library again.
    assert nt_xent(vectors, labels).item() == pytest.approx(2.783510684967041, abs=2e-6)
    found = supervised_contrastive(vectors, labels).item()
    assert found == pytest.approx(5.193105697631836, abs=2e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.sampled_from(["cosine", "csls"]))
def test_loss_is_its_definition_pair_by_pair(labels, similarity):
    generator = torch.Generator().manual_seed(len(labels))
    vectors = torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
    n, t = len(labels), 0.1
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosine = [[float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    mean = [sum(cosine[i][j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
    terms = []
    for i in range(n):
        for j in range(n):
            if i == j or labels[i] != labels[j]:
                continue

            def s(a, b):
                shift = mean[a] + mean[b] if similarity == "csls" else 0
                return math.exp(((2 if similarity == "csls" else 1) * cosine[a][b] - shift) / t)

            against = sum(s(i, k) for k in range(n) if labels[k] != labels[i])
            terms.append(-math.log(s(i, j) / (s(i, j) + against)))
    if not terms:
        with pytest.warns(UserWarning, match="no positive pair"):
            assert nt_xent(vectors, torch.tensor(labels), t, similarity=similarity).item() == 0
        return
    found = nt_xent(vectors, torch.tensor(labels), t, similarity=similarity)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9, abs=1e-12)


def test_loss_by_rows_is_the_usual_in_batch_loss():
    torch.manual_seed(1)
    vectors = torch.randn(12, 8)
    rows = torch.arange(6).repeat_interleave(2)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    logits = (unit @ unit.T / 0.07).fill_diagonal_(float("-inf"))
    partner = torch.arange(12) ^ 1
    expected = torch.nn.functional.cross_entropy(logits, partner)
    assert torch.allclose(nt_xent(vectors, rows), expected, atol=1e-6)


def test_loss_has_right_gradients_and_survives_extremes():
    torch.manual_seed(0)
    vectors = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    for loss in (nt_xent, supervised_contrastive):
        for similarity in ("cosine", "csls"):
            assert torch.autograd.gradcheck(
                lambda x, loss=loss, similarity=similarity: loss(
                    x, labels, 0.3, similarity=similarity
                ),
                (vectors,),
            )
        tiny = loss(vectors, labels, 1e-4)
        assert torch.isfinite(tiny)
        assert loss(vectors.detach().bfloat16(), labels).dtype == torch.float32
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    assert torch.allclose(nt_xent(vectors, labels), nt_xent(vectors[order], labels[order]))
    assert torch.allclose(nt_xent(vectors, labels), nt_xent(7 * vectors, labels))
    # One label alone: nothing to contrast with, and a gradient of zero, not NaN.
    same = nt_xent(vectors, torch.zeros(6, dtype=torch.long))
    same.backward()
    assert same.item() == 0
    assert (vectors.grad == 0).all()


def test_loss_refuses_bad_input():
    vectors, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(DataError, match=r"vectors must be \(n, d\)"):
        nt_xent(vectors, labels[:3])
    with pytest.raises(DataError, match="temperature must be above 0"):
        nt_xent(vectors, labels, 0.0)
    with pytest.raises(ValueError, match="similarity must be one of"):
        nt_xent(vectors, labels, similarity="dot")


# --- word vectors -----------------------------------------------------------------------------


def test_pooling_is_the_papers_rule_on_either_side_of_the_padding():
    torch.manual_seed(0)
    states = torch.randn(3, 6, 4)
    lengths = [6, 4, 3]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    head = WordPooling(4)
    expected = torch.stack([states[i, 1 : n - 1].mean(dim=0) for i, n in enumerate(lengths)])
    assert torch.allclose(head(states, mask), expected, atol=1e-6)
    shifted = torch.stack([states[i].roll(6 - n, dims=0) for i, n in enumerate(lengths)])
    assert torch.allclose(head(shifted, mask.flip(1)), expected, atol=1e-6)
    spoiled = states.masked_fill(mask[:, :, None] == 0, float("nan"))
    assert torch.allclose(head(spoiled, mask), expected, atol=1e-6)
    # Frozen from mean_pooling of the authors' utils/functions.py (commit 141cb24).
    torch.manual_seed(0)
    theirs = [
        [0.15109848976135254, -0.7801059484481812],
        [-0.11793828010559082, -0.9716047048568726],
        [0.5627213716506958, 0.25962740182876587],
    ]
    assert torch.allclose(WordPooling(2)(torch.randn(3, 6, 2), mask), torch.tensor(theirs))
    bare = WordPooling(4, n_prefix=0, n_suffix=0, normalize=True)(states, mask)
    assert torch.allclose(bare.norm(dim=1), torch.ones(3))


def test_pooling_of_other_layers():
    torch.manual_seed(0)
    layers = [torch.randn(2, 5, 4) for _ in range(4)]
    mask = torch.ones(2, 5, dtype=torch.long)
    for layer, states in ((0, layers[0]), (2, layers[2]), (-2, layers[2]), (-1, layers[-1])):
        found = WordPooling(4, layer=layer)(layers, mask)
        assert torch.allclose(found, states[:, 1:-1].mean(dim=1), atol=1e-6)
    expected = torch.stack(layers).mean(dim=0)[:, 1:-1].mean(dim=1)
    assert torch.allclose(WordPooling(4, layer="mean")(layers, mask), expected, atol=1e-6)
    with pytest.raises(DataError, match="layer=7, but there are 4"):
        WordPooling(4, layer=7)(layers, mask)
    with pytest.raises(DataError, match="layer must be a whole number"):
        WordPooling(4, layer="last")
    with pytest.raises(ValueError, match="hidden states of all layers"):
        WordPooling(4, layer=1)(layers[0], mask)
    with pytest.raises(DataError, match="at least 0"):
        WordPooling(4, n_prefix=-1)


def test_an_empty_word_keeps_its_special_tokens():
    assert word_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), 1, 1).tolist() == [
        [True, True, False],
        [False, True, False],
    ]


def test_encoder_counts_special_tokens_and_equals_transformers(folder):
    encoder = WordEncoder(folder)
    specials = (1, 1) if "encoder" in folder else (0, 1)
    assert (encoder.n_prefix, encoder.n_suffix) == specials
    words = ["cat", "the red tree", "mat", "a cat"]
    model, tok = encoder.backbone, tokenizer(bos=specials[0] == 1)
    all_layers = encoder.encode_layers(words, batch_size=3)
    for row, word in enumerate(words):
        ids = torch.tensor([tok(word)["input_ids"]])
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        end = ids.shape[1] - specials[1]
        by_hand = np.stack([layer[0, specials[0] : end].mean(dim=0).numpy() for layer in states])
        assert np.abs(all_layers[row] - by_hand).max() < 1e-5
    for layer in (-1, 0, 1):
        assert np.abs(encoder.encode(words, layer) - all_layers[:, layer]).max() < 1e-5
    assert np.abs(encoder.encode(words, "mean") - all_layers.mean(axis=1)).max() < 1e-5
    assert np.abs(encoder.encode(words)[2] - encoder.encode(["mat"])[0]).max() < 1e-5
    assert encoder.encode([]).shape == (0, 16)


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path):
    # BERT has absolute positions: on the left they would be others in a batch than alone.
    bert().save_pretrained(tmp_path)
    tokenizer(padding_side="left").save_pretrained(tmp_path)
    encoder = WordEncoder(str(tmp_path))
    words = ["cat", "the red tree", "dog ran"]
    alone = np.concatenate([encoder.encode([word]) for word in words])
    for vectors in (encoder.encode(words), encoder.sentence_transformer().encode(words)):
        assert np.abs(vectors - alone).max() < 1e-5


def test_encoder_refuses_words_without_tokens(folder):
    encoder = WordEncoder(folder)
    assert encoder.has_tokens(["cat", "", " "]).tolist() == [True, False, False]
    with pytest.raises(DataError, match=r"2 words without any token, the first \['', ' '\]"):
        encoder.encode(["cat", "", " "])
    with pytest.raises(DataError, match="got a single one"):
        encoder.encode("cat")


def test_words_of_the_same_tokens_have_the_very_same_vector(folder):
    # Read apart, in batches of other widths, they would differ by rounding, and ties would break.
    words = ["cat", "the red tree", "zebra", " cat", "quagga", "cat  "]
    calls = []
    encoder = WordEncoder(folder)
    vectors = encoder.encode(words, progress=lambda *done: calls.append(done))
    assert calls[-1] == (3, 3)  # two words are unknown to this tokenizer
    assert np.array_equal(vectors[[0, 0, 2]], vectors[[3, 5, 4]])
    assert np.abs(vectors - encoder.encode_layers(words)[:, -1]).max() < 1e-5


def test_encoder_from_a_loaded_model_and_from_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import load

    expected = WordEncoder(folder).encode(["cat", "red tree"])
    base = load(folder)
    assert np.abs(WordEncoder(base).encode(["cat", "red tree"]) - expected).max() < 1e-6
    model = SentenceTransformer(folder, device="cpu")
    other = WordEncoder(model)
    assert np.abs(other.encode(["cat", "red tree"]) - expected).max() < 1e-6
    assert other.backbone is not model[0].auto_model
    with pytest.raises(ModelError):
        WordEncoder("no-such-model")


FRESH = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
for folder, words, expected in json.load(sys.stdin):
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert np.abs(model.encode(words) - np.array(expected)).max() < 1e-5, folder
print("loaded")
"""


def test_saved_folders_load_in_a_new_process(tmp_path, folder):
    words = ["cat", "the red tree", "mat"]
    cases = []
    for peft, layer in (("full", -1), ("adapter", "mean"), ("lora", 1)):
        made = specializer(folder, peft=peft, layer=layer, steps=2, learning_rate=0.05).fit(WORDS)
        vectors = made.encode_words(words)
        path = made.save(tmp_path / peft)
        cases.append((str(path), words, vectors.tolist()))
        assert np.abs(WordEncoder(str(path)).encode(words, layer) - vectors).max() < 1e-5
        assert np.abs(vectors - WordEncoder(folder).encode(words, layer)).max() > 1e-3
    run = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(cases), capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert run.stdout.strip().endswith("loaded"), run.stderr[-2000:]


# --- adapters ---------------------------------------------------------------------------------


def test_adapters_start_as_nothing_and_are_all_that_is_trained(folder):
    encoder = WordEncoder(folder)
    words = ["cat", "the red tree"]
    before = encoder.encode(words)
    adapters = add_adapters(encoder.backbone, reduction=4)
    assert len(adapters) == encoder.n_layers
    assert np.array_equal(encoder.encode(words), before)
    trained = sum(w.numel() for w in encoder.backbone.parameters() if w.requires_grad)
    assert trained == encoder.n_layers * (16 * 4 + 4 + 4 * 16 + 16)
    with torch.no_grad():
        for adapter in adapters:
            adapter.up.weight.normal_()
    changed = encoder.encode(words)
    assert np.abs(changed - before).max() > 0.01
    with _without_adapters(encoder.backbone):
        assert np.array_equal(encoder.encode(words), before)
        assert not any("adapter" in name for name in encoder.backbone.state_dict())
    assert np.array_equal(encoder.encode(words), changed)
    with pytest.raises(ModelError, match="adapters already"):
        add_adapters(encoder.backbone)


def test_adapter_of_a_post_norm_layer_stands_where_pfeiffers_does():
    # AdapterHub's settings: original_ln_before, residual after it not taken, original_ln_after.
    torch.manual_seed(0)
    model = bert(dropout=0.0)
    plain = model.encoder.layer[0].output
    dense, norm = plain.dense, plain.LayerNorm
    adapter = add_adapters(model, reduction=4)[0]
    torch.nn.init.normal_(adapter.up.weight)
    inner, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 16)
    feed_forward = dense(inner)
    inside = adapter.up(torch.relu(adapter.down(norm(feed_forward + residual))))
    expected = norm(inside + feed_forward + residual)
    assert isinstance(plain.LayerNorm, AdaptedNorm)
    assert torch.allclose(plain(inner, residual), expected, atol=1e-6)


def test_adapter_of_a_pre_norm_layer_adds_to_its_sum():
    model = llama()
    layer = model.layers[1]
    adapter = add_adapters(model, reduction=4)[1]
    torch.nn.init.normal_(adapter.up.weight)
    states = {}
    layer.register_forward_hook(lambda module, args, output: states.update(inside=output))
    model.layers[1].register_forward_hook(lambda m, args, output: states.update(outside=output))
    model(input_ids=torch.tensor([[1, 5, 6]]))
    inside, outside = (s[0] if isinstance(s, tuple) else s for s in states.values())
    assert torch.allclose(outside, inside + adapter(inside), atol=1e-6)
    assert BottleneckAdapter(8, 100).down.out_features == 1


# --- training ---------------------------------------------------------------------------------


def specializer(folder, **options):
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, **options}
    return LexicalSpecializer(folder, **settings)


def test_reading_in_passes_equals_one_padded_batch(folder, monkeypatch):
    encoder = WordEncoder(folder)
    encoder.backbone.eval()  # no dropout
    pairs = build_pairs(WORDS)
    rows = np.array([2, 0, 3, 0, 1])
    words = [
        WORDS.words[row]
        for pair in rows.tolist()
        for row in (pairs.first[pair], pairs.second[pair])
    ]
    labels = torch.from_numpy(np.repeat(pairs.labels[rows], 2))
    reader = _Reader(encoder, pairs, "none", -1)
    gradients = []
    for budget in (4, 10**6):  # a pass per word, or all words of a length
        monkeypatch.setattr("bakeoff.embedding.lexical._PASS_TOKENS", budget)
        (vectors,) = reader.read(rows)
        assert np.abs(vectors.detach().numpy() - encoder.encode(words)).max() < 1e-5
        encoder.backbone.zero_grad()
        nt_xent(vectors, labels).backward()
        gradients.append(
            torch.cat(
                [w.grad.flatten() for w in encoder.backbone.parameters() if w.grad is not None]
            )
        )
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4)


def test_first_loss_is_the_loss_of_the_drawn_batch(tmp_path):
    bert(dropout=0.0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = specializer(str(tmp_path), steps=1, batch_size=3, alpha=None).fit(WORDS)
    pairs = build_pairs(WORDS, seed=10)
    rows = np.random.default_rng(10).permutation(len(pairs))[:3]
    words = [WORDS.words[row] for i in rows for row in (pairs.first[i], pairs.second[i])]
    vectors = torch.from_numpy(WordEncoder(str(tmp_path)).encode(words))
    expected = nt_xent(vectors, torch.from_numpy(np.repeat(pairs.labels[rows], 2)))
    assert made.history_.losses[0] == pytest.approx(expected.item(), abs=1e-4)


# Two synsets of three words: each of these has more than one positive.
LARGER = Constraints.of(
    [*zip(WORDS.synsets, WORDS.words, WORDS.languages, WORDS.glosses, strict=True),
     ("1", "the red", "de", "a mat"), ("2", "sat under", "de", "a tree")]
)  # fmt: skip

# A change of one option at a time, each with something that a plain loop does about it.
VARIANTS = [
    {},
    {"temperature": 0.5},
    {"loss": "supcon"},
    {"similarity": "csls"},
    {"layer": "mean"},
    {"layer": 1},
    {"glosses": "multitask"},
    {"weight_decay": 50.0},
    {"warmup_steps": 3},
    # AdamW evens out any longer gradient: this one is below its epsilon.
    {"max_grad_norm": 1e-9},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_training_is_a_plain_loop(tmp_path, options):
    bert(dropout=0.0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    settings = {"alpha": None, "steps": 4, "batch_size": 6, "learning_rate": 0.003, **options}
    found = specializer(str(tmp_path), **settings).fit(LARGER).history_.losses

    model, tok, pairs = bert(dropout=0.0), tokenizer(), build_pairs(LARGER, seed=10)
    decay = options.get("weight_decay", 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=decay)
    loss = supervised_contrastive if options.get("loss") == "supcon" else nt_xent
    layer, warmup = options.get("layer", -1), options.get("warmup_steps", 1)
    rng = np.random.default_rng(10)
    epochs = [rng.permutation(len(pairs)) for _ in range(2)]
    batches = [rows for order in epochs for rows in (order[:6], order[6:])]
    expected = []
    for step, rows in enumerate(batches, start=1):
        entries = [int(side[row]) for row in rows for side in (pairs.first, pairs.second)]
        words, glosses = [], []
        for entry in entries:
            word = tok(LARGER.words[entry], add_special_tokens=False)["input_ids"]
            gloss = tok(LARGER.glosses[entry], add_special_tokens=False)["input_ids"]
            both = [1, *word, 2, *gloss, 2] if "glosses" in options else [1, *word, 2]
            states = model(input_ids=torch.tensor([both]), output_hidden_states=True).hidden_states
            chosen = torch.stack(states).mean(dim=0) if layer == "mean" else states[layer]
            words.append(chosen[0, 1 : 1 + len(word)].mean(dim=0))
            glosses.append(chosen[0, 2 + len(word) : -1].mean(dim=0))
        labels = torch.tensor([int(LARGER.synsets[entry]) for entry in entries])
        value = torch.zeros(())
        for views in (words, glosses) if "glosses" in options else (words,):
            value = value + loss(
                torch.stack(views), labels, options.get("temperature", 0.07),
                similarity=options.get("similarity", "cosine"),
            )  # fmt: skip
        n_labels = len(set(labels.tolist()))
        expected.append(value.item() if n_labels > 1 else math.nan)
        if n_labels > 1:
            optimizer.zero_grad()
            value.backward()
            if "max_grad_norm" in options:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
            optimizer.param_groups[0]["lr"] = 0.003 * min(1.0, step / warmup)
            optimizer.step()
    assert found == pytest.approx(expected, abs=2e-3, nan_ok=True)


def unseen_lexicons():
    """Two lexicons of the tokenizer's words, none of which is trained on."""
    words = ("a cat", "on mat", "tree", "find", "red dog", "a sat", "ran", "on", "red", "tree mat")
    pairs = [("a cat", "red dog"), ("on mat", "ran"), ("tree", "tree mat"), ("find", "red")]
    assert not set(words) & set(LARGER.words)
    return [
        Lexicon("en", "fr", *zip(*((a, (b,)) for a, b in some), strict=True), words)
        for some in (pairs, [(b, a) for a, b in pairs[:3]])
    ]


@pytest.mark.parametrize("options", [{}, {"csls_k": 2}, {"layer": 1}], ids=str)
def test_checks_are_the_mean_relative_gain_of_what_fewer_steps_would_have_made(
    encoder_folder, options
):
    from bakeoff.embedding.lexicon_induction import bli_lexicon

    lexicons = unseen_lexicons()
    settings = {"alpha": None, "batch_size": 2, "learning_rate": 0.01, "seed": 4, **options}

    def made(steps, validation=()):
        one = specializer(encoder_folder, checks_per_epoch=2, steps=steps, **settings)
        return one.fit(LARGER, validation=validation)

    def mrr(model):
        k = options.get("csls_k")
        return np.array([bli_lexicon(model, one, csls_k=k).mrr for one in lexicons])

    raw = WordEncoder(encoder_folder)
    before = mrr(lambda words: raw.encode(words, options.get("layer", -1)))
    checked = made(9, lexicons)
    assert checked.history_.n_validation == 0
    later = {step: made(step) for step in (2, 4, 6, 8, 9)}  # twice an epoch of four, and the end
    gains = {s: float(((mrr(x.encode_words) - before) / before).mean()) for s, x in later.items()}
    assert dict(checked.history_.checks) == pytest.approx({0: 0.0, **gains})
    # Judging has no part in training: dropout is on again after it, and draws the same.
    losses = (x.history_.losses for x in (checked, later[9]))
    assert np.array_equal(*losses, equal_nan=True)
    best = max(gains, key=lambda step: gains[step])
    assert checked.history_.best_step == best
    assert np.abs(before[0] - before[1]) > 0.01
    kept, last = (x.encode_words(WORDS.words) for x in (checked, later[9]))
    assert np.array_equal(kept, later[best].encode_words(WORDS.words))
    assert not np.array_equal(kept, last)


@pytest.mark.parametrize("peft", ["full", "adapter", "lora"])
def test_training_brings_synonyms_together(folder, peft):
    made = specializer(
        folder, peft=peft, steps=80, batch_size=8, learning_rate=0.005, adapter_reduction=2
    ).fit(WORDS)

    def share_nearest(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -2)
        return np.mean(cosine.argmax(axis=1) == np.arange(8) ^ 1)

    assert share_nearest(WordEncoder(folder).encode(WORDS.words)) < 0.7
    assert share_nearest(made.encode_words(WORDS.words)) == 1.0
    assert np.nanmean(made.history_.losses[-5:]) < np.nanmean(made.history_.losses[:5]) / 2
    assert made.transform(["cat"]).shape == (1, 16)


def test_seed_determines_everything_and_the_base_is_untouched(encoder_folder):
    from bakeoff.models import load

    base = load(encoder_folder)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    state = torch.random.get_rng_state()
    one, two, other = (
        specializer(base, seed=seed).fit(WORDS).encode_words(WORDS.words) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two)
    assert not np.allclose(one, other)
    assert all(torch.equal(before[n], w) for n, w in base.model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_dropout_is_on_in_training_and_off_afterwards(encoder_folder, tmp_path):
    bert(dropout=0.0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with_dropout, without = (
        specializer(path, steps=1, alpha=None).fit(WORDS) for path in (encoder_folder, tmp_path)
    )
    assert abs(with_dropout.history_.losses[0] - without.history_.losses[0]) > 1e-3
    vectors = with_dropout.encode_words(WORDS.words)
    assert np.array_equal(vectors, with_dropout.encode_words(WORDS.words))
    assert not with_dropout.encoder_.backbone.training


def test_pairs_are_capped_and_glosses_are_needed_on_both_sides(encoder_folder):
    assert specializer(encoder_folder, max_per_language_pair=3).fit(WORDS).history_.n_pairs == 3
    glosses = ("", "a cat", *WORDS.glosses[2:5], " ", *WORDS.glosses[6:])
    partly = Constraints(WORDS.synsets, WORDS.words, WORDS.languages, glosses)
    assert specializer(encoder_folder, glosses="separate").fit(partly).history_.n_pairs == 2


def test_batches_follow_the_weights(encoder_folder):
    rows = [("1", f"w{i}", "en") for i in range(6)] + [("2", "x", "fr"), ("2", "y", "fr")]
    pairs = build_pairs(Constraints.of(rows))  # 15 and 1
    made = specializer(encoder_folder, batch_size=16, alpha=0.0)
    batches = made._batches(pairs)
    drawn = Counter(
        kind for _ in range(300) for row in next(batches) for kind in [pairs.language_pairs()[row]]
    )
    share = drawn["fr", "fr"] / sum(drawn.values())
    assert abs(share - 0.5) < 0.03
    plain = specializer(encoder_folder, batch_size=5, alpha=-1)._batches(pairs)
    epoch = [row for _ in range(4) for row in next(plain).tolist()]
    assert sorted(epoch) == list(range(16))


def test_epochs_history_and_progress(encoder_folder):
    calls = []
    made = specializer(encoder_folder, steps=None, epochs=2, batch_size=3, alpha=None)
    made.fit(WORDS, progress=lambda *done: calls.append(done))
    assert calls == [(i, 4) for i in range(1, 5)]  # 4 pairs: batches of 3 and 1, twice
    history = made.history_
    assert (history.n_pairs, history.n_words, history.best_step) == (4, 8, None)
    assert sum(map(math.isnan, history.losses)) in (0, 2)


def test_batches_without_negatives_are_skipped_with_a_warning(encoder_folder):
    lone = Constraints.of([("1", "cat", "en"), ("1", "dog", "fr")])
    with pytest.warns(UserWarning, match="3 batches without a positive or a negative pair"):
        made = specializer(encoder_folder).fit(lone)
    assert all(map(math.isnan, made.history_.losses))
    raw = WordEncoder(encoder_folder).encode(["cat"])
    assert np.array_equal(made.encode_words(["cat"]), raw)


def test_validation_words_are_left_out_and_the_best_weights_kept(encoder_folder):
    test = Lexicon("en", "fr", ("cat",), (("dog",),), tuple(WORDS.words[1::2]))
    made = specializer(encoder_folder, steps=6, learning_rate=0.3, checks_per_epoch=1)
    made.fit(WORDS, validation=[test])
    history = made.history_
    assert history.n_validation == 1
    assert history.n_pairs == 3
    assert history.checks[0] == (0, 0.0)
    best = max(gain for _, gain in history.checks)
    assert dict(history.checks)[history.best_step] == best
    from bakeoff.embedding.lexicon_induction import bli_lexicon

    raw = bli_lexicon(WordEncoder(encoder_folder).encode, test).mrr
    kept = bli_lexicon(made.encode_words, test).mrr
    assert (kept - raw) / raw == pytest.approx(best)


def deaf_folder(path):
    """A model that makes no token of question marks."""
    from tokenizers import normalizers

    bert().save_pretrained(path)
    deaf = tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    deaf.save_pretrained(path)
    return str(path)


def test_validation_vocabularies_may_hold_words_without_tokens(tmp_path):
    test = Lexicon("en", "fr", ("cat", "?"), (("dog",), ("dog",)), (*WORDS.words[1::2], "??"))
    made = specializer(deaf_folder(tmp_path), steps=1).fit(WORDS, validation=[test])
    assert made.history_.checks[0] == (0, 0.0)


def test_words_without_tokens_are_left_out_with_a_warning(tmp_path):
    deaf_folder(tmp_path)
    words = Constraints.of(
        [*zip(WORDS.synsets, WORDS.words, WORDS.languages, strict=True), ("4", "??", "it")]
    )
    with pytest.warns(
        UserWarning, match=r"1 word without any token left out, the first \['\?\?'\]"
    ):
        made = specializer(str(tmp_path)).fit(words)
    assert made.history_.n_untokenisable == 1
    assert made.history_.n_pairs == 4
    only = Constraints.of([("1", "?", "en"), ("1", "??", "fr")])
    with (
        pytest.warns(UserWarning, match="2 words"),
        pytest.raises(DataError, match="no pair is left"),
    ):
        specializer(str(tmp_path)).fit(only)


def test_row_labels_make_false_negatives(encoder_folder):
    # One synset of four words: by synset there is nothing to contrast, by row there is.
    rows = [("1", word, "en") for word in ("cat", "dog", "mat", "tree")]
    with pytest.warns(UserWarning, match="without a positive or a negative"):
        specializer(encoder_folder).fit(rows)
    by_row = specializer(encoder_folder, labels="row").fit(rows)
    assert all(loss > 0 for loss in by_row.history_.losses)


# --- glosses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "multitask", "joint"])
def test_glosses_are_read_with_the_word_and_only_its_tokens_are_pooled(encoder_folder, mode):
    encoder = WordEncoder(encoder_folder)
    encoder.backbone.eval()
    pairs = build_pairs(WORDS)
    rows = np.array([1, 3])
    views = _Reader(encoder, pairs, mode, -1).read(rows)
    tok = tokenizer()
    expected, glosses = [], []
    for row in rows.tolist():
        one, other = int(pairs.first[row]), int(pairs.second[row])
        w = [tok(WORDS.words[i], add_special_tokens=False)["input_ids"] for i in (one, other)]
        g = [tok(WORDS.glosses[i], add_special_tokens=False)["input_ids"] for i in (one, other)]
        if mode == "joint":  # the order of the authors' code
            ids = [1, *w[0], 2, *w[1], 2, *g[0], 2, *g[1], 2]
            with torch.no_grad():
                states = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
            start = 2 + len(w[0])
            expected += [states[1 : start - 1].mean(0), states[start : start + len(w[1])].mean(0)]
            continue
        for word, gloss in zip(w, g, strict=True):
            ids = [1, *word, 2, *gloss, 2]
            with torch.no_grad():
                states = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
            expected.append(states[1 : 1 + len(word)].mean(0))
            glosses.append(states[2 + len(word) : -1].mean(0))
    assert torch.allclose(views[0], torch.stack(expected), atol=1e-5)
    assert len(views) == (2 if mode == "multitask" else 1)
    if mode == "multitask":
        assert torch.allclose(views[1], torch.stack(glosses), atol=1e-5)


def test_glosses_have_no_token_types_and_end_at_the_window(encoder_folder):
    encoder = WordEncoder(encoder_folder)
    encoder.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoder.backbone.eval()
    long = Constraints.of(
        [("1", "cat", "en", "a red " * 60), ("1", "dog", "fr", "a"), ("2", "mat", "en", "b"),
         ("2", "tree", "en", "c")]
    )  # fmt: skip
    pairs = build_pairs(long)
    (views,) = _Reader(encoder, pairs, "separate", -1).read(np.array([0, 1]))
    tok = tokenizer()
    ids = [1, *tok("dog", add_special_tokens=False)["input_ids"], 2, 5, 2]
    with torch.no_grad():  # the authors' code gives the model ids and mask alone
        states = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
    order = [long.words[i] for pair in zip(pairs.first, pairs.second, strict=True) for i in pair]
    assert torch.allclose(views[order.index("dog")], states[1], atol=1e-5)
    assert torch.isfinite(views).all()  # 120 tokens of gloss were cut at the model's 64


@pytest.mark.parametrize("mode", ["none", "separate", "multitask", "joint"])
@pytest.mark.parametrize("n_words", [30, 31, 59, 60, 61, 90])
def test_long_terms_are_cut_at_the_window_and_glosses_keep_a_token(encoder_folder, mode, n_words):
    encoder = WordEncoder(encoder_folder)
    long = ("cat dog " * 60).split()[:n_words]
    rows = [("1", " ".join(long), "en", "a red cat"), ("1", "mat " + " ".join(long), "fr", "on")]
    pairs = build_pairs(Constraints.of(rows))
    reader = _Reader(encoder, pairs, mode, -1)
    made = [reader._joint(0, 1)] if mode == "joint" else [reader._single(row) for row in (0, 1)]
    for ids, spans in made:
        assert len(ids) == len(spans) <= 64
        assert ids[0] == 1
        assert ids[-1] == 2
        assert spans.count(1) > 0
        assert (spans.count(2) > 0) == (mode != "none")
    assert all(torch.isfinite(view).all() for view in reader.read(np.array([0])))


@pytest.mark.parametrize("mode", ["separate", "multitask", "joint"])
def test_training_with_glosses(folder, mode):
    made = specializer(folder, glosses=mode, steps=30, batch_size=8, learning_rate=0.003).fit(WORDS)
    assert np.mean(made.history_.losses[-3:]) < np.mean(made.history_.losses[:3]) / 2
    bare = Constraints(WORDS.synsets, WORDS.words, WORDS.languages)
    with pytest.raises(DataError, match="needs constraints with glosses"):
        specializer(folder, glosses=mode).fit(bare)


# --- conventions ------------------------------------------------------------------------------


def test_scikit_learn_clone_and_data_frames(encoder_folder):
    import pandas

    made = specializer(encoder_folder, peft="adapter", temperature=0.1)
    copy = clone(made)
    assert copy.get_params() == made.get_params()
    frame = pandas.DataFrame(
        {"synset": WORDS.synsets, "word": WORDS.words, "lang": WORDS.languages}
    )
    by_frame = copy.fit(frame).encode_words(["cat"])
    by_pairs = made.fit(build_pairs(WORDS, seed=10)).encode_words(["cat"])
    assert np.allclose(by_frame, by_pairs, atol=1e-6)
    pairs = build_pairs(WORDS, seed=10)
    sides = [(pairs.first, "1"), (pairs.second, "2")]
    columns = {"synset_id": [WORDS.synsets[row] for row in pairs.first]} | {
        f"{name}{side}": [column[row] for row in rows]
        for rows, side in sides
        for name, column in (("word", WORDS.words), ("lang", WORDS.languages))
    }
    table = pandas.DataFrame(columns)
    for shape in (table, table.to_numpy().tolist()):
        assert np.allclose(copy.fit(shape).encode_words(["cat"]), by_pairs, atol=1e-6)
    with pytest.raises(DataError, match="no column for the language2: looked for 'language2'"):
        made.fit(table.drop(columns="lang2"))
    table.loc[1, "word2"] = None
    with pytest.raises(DataError, match=r"word2: 1 entry empty, the first at rows \[1\]"):
        made.fit(table)
    frame["word"] = frame["word"].astype("string")
    frame.loc[[2, 5], "word"] = None
    with pytest.raises(DataError, match=r"words: 2 entries empty, the first at rows \[2, 5\]"):
        made.fit(frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "prefix"}, "peft must be one of"),
        ({"loss": "triplet"}, "loss must be one of"),
        ({"labels": "word"}, "labels must be one of"),
        ({"glosses": "all"}, "glosses must be one of"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"batch_size": 0}, "batch_size must be a positive"),
        ({"steps": 0}, "steps must be a positive"),
        ({"alpha": -0.5}, "alpha must be at least 0"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"layer": 9}, "layer must be 'mean' or a whole number from -3 to 2, got 9"),
        ({"layer": "last"}, "layer must be 'mean' or a whole number from -3 to 2, got 'last'"),
    ],
)
def test_bad_settings(encoder_folder, options, message):
    with pytest.raises(ValueError, match=message):
        specializer(encoder_folder, **options).fit(WORDS)


def test_bad_constraints(encoder_folder):
    with pytest.raises(DataError, match="no two different words"):
        specializer(encoder_folder).fit([("1", "cat", "en"), ("2", "dog", "en")])
    with pytest.raises(DataError, match="rows"):
        specializer(encoder_folder).fit([("cat", "dog")])
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        specializer(encoder_folder).encode_words(["cat"])
    with pytest.raises(FloatingPointError, match="loss at step"):
        specializer(encoder_folder, learning_rate=1e30, steps=9).fit(WORDS)


@pytest.mark.model
@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "smollm2-135m"])
def test_packaged_models(name):
    encoder = WordEncoder(name)
    vectors = encoder.encode(["Germany", "Allemagne"])
    assert vectors.shape == (2, encoder.hidden_size)
    assert (encoder.n_prefix, encoder.n_suffix) == ((1, 1) if "minilm" in name else (0, 0))
    layers = encoder.encode_layers(["Germany", "Allemagne"])
    assert np.abs(layers[:, -1] - vectors).max() < 1e-3 * np.abs(vectors).max()
