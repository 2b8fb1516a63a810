"""The rivals against other libraries and closed forms. About 10 seconds."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scipy.linalg import orthogonal_procrustes
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from tests.embedding.small_models import backbone_folder

from bakeoff.data.lexicons import Constraints, build_pairs
from bakeoff.embedding.lexical_baselines import (
    AllButTheTop,
    AllButTheTopWords,
    CharacterNgramVectors,
    Procrustes,
    ProcrustesWords,
    RawWordVectors,
)
from bakeoff.embedding.lexicon_induction import bli
from bakeoff.embedding.word_vectors import WordEncoder
from bakeoff.errors import DataError

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "find")
PAIRS = Constraints.of(
    [row for i, word in enumerate(WORDS) for row in (
        (f"s{i}", word, "en"), (f"s{i}", f"{word} {WORDS[i - 1]}", "fr"),
        (f"s{i}", f"red {word}", "de"))]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return backbone_folder(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("n_components", [0, 1, 4])
def test_all_but_the_top_is_what_a_principal_component_analysis_leaves(n_components):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)) @ rng.standard_normal((8, 8)) + 5
    found = AllButTheTop(n_components).fit(vectors)
    analysis = PCA(max(1, n_components), svd_solver="full").fit(vectors)
    left = vectors - analysis.mean_
    top = analysis.components_[:n_components]
    expected = left - left @ top.T @ top
    assert np.abs(found.transform(vectors) - expected).max() < 1e-4
    assert np.abs(np.abs(found.components_) - np.abs(top)).max(initial=0) < 1e-5
    new = rng.standard_normal((3, 8))
    assert np.abs(found.transform(new) @ found.components_.T).max(initial=0) < 1e-4


def test_all_but_the_top_in_a_pipeline_and_its_refusals():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30, 6))
    pipeline = clone(make_pipeline(AllButTheTop(2), NearestNeighbors(n_neighbors=1)))
    pipeline.fit(vectors)
    place = pipeline[-1].kneighbors(pipeline[:-1].transform(vectors[:4]), return_distance=False)
    assert place.ravel().tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="n_components must be from 0 to 5"):
        AllButTheTop(6).fit(vectors)
    with pytest.raises(DataError, match="finite"):
        AllButTheTop().fit(vectors * np.nan)
    with pytest.raises(NotFittedError):
        AllButTheTop().transform(vectors)


def test_procrustes_is_scipys_and_finds_a_planted_rotation():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 5))
    expected, _ = orthogonal_procrustes(x, y)
    assert np.allclose(Procrustes(centre=False).fit(x, y).rotation_, expected)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    found = Procrustes().fit(x, (x - 3) @ turn + 7)
    assert np.allclose(found.rotation_, turn)
    assert np.allclose(found.transform(x) + found.target_mean_, (x - 3) @ turn + 7)
    assert np.allclose(found.rotation_ @ found.rotation_.T, np.eye(5))
    with pytest.raises(DataError, match="one shape"):
        Procrustes().fit(x, y[:5])


@pytest.mark.parametrize("centre", [True, False])
def test_what_too_few_pairs_do_not_tell_is_rotated_as_little_as_possible(centre):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((6, 9)), rng.standard_normal((6, 9))
    found = Procrustes(centre=centre).fit(x, y).rotation_
    assert np.allclose(found @ found.T, np.eye(9))
    order = rng.permutation(6)
    assert np.allclose(Procrustes(centre=centre).fit(x[order], y[order]).rotation_, found)
    assert np.allclose(Procrustes(centre=centre).fit(x, x).rotation_, np.eye(9))
    mean_x, mean_y = (x.mean(axis=0), y.mean(axis=0)) if centre else (0, 0)
    best, _ = orthogonal_procrustes(x - mean_x, y - mean_y)
    close = [np.linalg.norm((x - mean_x) @ w - (y - mean_y)) for w in (found, best)]
    assert close[0] == pytest.approx(close[1])
    assert np.linalg.norm(found - np.eye(9)) < np.linalg.norm(best - np.eye(9))


def test_raw_vectors_are_the_encoders(folder):
    raw = RawWordVectors(folder).fit(PAIRS)
    expected = WordEncoder(folder).encode(["cat", "red dog"])
    assert np.array_equal(raw.encode_words(["cat", "red dog"], language="en"), expected)
    assert clone(raw).layer == -1
    ready = WordEncoder(folder)
    assert RawWordVectors(ready).fit().encoder_ is ready
    with pytest.raises(NotFittedError):
        RawWordVectors(folder).encode_words(["cat"])


def test_a_second_fit_takes_the_parameters_as_they_then_are(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(folder, other, dirs_exist_ok=True)
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    for rival in (RawWordVectors(folder), AllButTheTopWords(folder), ProcrustesWords(folder)):
        before = rival.fit(PAIRS).encode_words(["cat"], language="en")
        again = rival.set_params(base_model=str(other)).fit(PAIRS)
        assert np.abs(again.encode_words(["cat"], language="en") - before).max() > 1e-3


def test_all_but_the_top_of_words_is_fitted_on_the_training_words(folder):
    found = AllButTheTopWords(folder, n_components=2).fit(PAIRS)
    encoder = WordEncoder(folder)
    expected = AllButTheTop(2).fit(encoder.encode(list(dict.fromkeys(PAIRS.words))))
    words = ["cat", "red dog"]
    assert np.allclose(
        found.encode_words(words), expected.transform(encoder.encode(words)), atol=1e-5
    )
    pairs = build_pairs(PAIRS)
    by_pairs = AllButTheTopWords(folder, n_components=2).fit(pairs)
    assert np.allclose(by_pairs.encode_words(words), found.encode_words(words), atol=1e-5)
    with pytest.raises(NotFittedError):
        AllButTheTopWords(folder).encode_words(["cat"])


def test_character_ngrams_see_spelling_only():
    words = Constraints.of([("1", "nation", "en"), ("1", "nación", "es"), ("2", "dog", "en"),
                            ("2", "Hund", "de")])  # fmt: skip
    model = CharacterNgramVectors().fit(words)
    scores = bli(
        model.encode_words,
        ["nation", "dog"],
        ["Hund", "nación", "perro"],
        ["nación", "Hund"],
        csls_k=None,
    )
    assert scores.ranks[0] == 1  # "dog" has no letters in common: ties, by vocabulary
    vectors = model.encode_words(["nation", "xyz"])
    assert np.allclose(np.sqrt(vectors.multiply(vectors).sum(axis=1)).ravel(), [1, 1])
    usual = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform(words.words)
    ours = model.encode_words(words.words)
    assert np.abs((ours @ ours.T - usual @ usual.T).toarray()).max() < 1e-6
    # Letters that training never had are letters still.
    foreign = bli(model.encode_words, ["Ελλάδα"], ["Γαλλία", "ΕΛΛΆΔΑ"], ["ΕΛΛΆΔΑ"])
    assert foreign.ranks.tolist() == [1]
    with pytest.raises(DataError, match="shortest must be"):
        CharacterNgramVectors(3, 2).fit(words)


def test_procrustes_of_words_rotates_each_language_onto_the_pivot(folder):
    model = ProcrustesWords(folder, pivot="en").fit(PAIRS)
    assert set(model.rotations_) == {"fr", "de"}
    encoder = WordEncoder(folder)

    def unit(words):
        vectors = encoder.encode(words).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    concepts = PAIRS.concepts().values()
    x = unit([by["fr"][0] for by in concepts])
    y = unit([by["en"][0] for by in concepts])
    words = ["cat dog", "red tree"]
    expected = Procrustes().fit(x, y).transform(unit(words))
    assert np.abs(model.encode_words(words, language="fr") - expected).max() < 1e-5
    home = unit(["cat"]) - unit(list(WORDS)).mean(axis=0)
    assert np.abs(model.encode_words(["cat"], language="en") - home).max() < 1e-5
    unknown = model.encode_words(["cat"], language="xx")
    assert np.abs(unknown - model.encode_words(["cat"])).max() == 0
    spoken = [[by[language][0] for by in concepts] for language in ("en", "fr", "de")]
    middle = np.mean([unit(words).mean(axis=0) for words in spoken], axis=0)
    assert np.abs(unknown - (unit(["cat"]) - middle)).max() < 1e-5
    # On the pairs it was fitted on, the rotation cannot lose.
    raw = ((x - x.mean(axis=0) - (y - y.mean(axis=0))) ** 2).sum()
    turned = model.encode_words([by["fr"][0] for by in concepts], language="fr")
    assert ((turned - (y - y.mean(axis=0))) ** 2).sum() < raw
    with pytest.raises(DataError, match="pivot 'sv' is not among"):
        ProcrustesWords(folder, pivot="sv").fit(PAIRS)
    with pytest.raises(DataError, match="no language has 13 pairs"):
        ProcrustesWords(folder, min_pairs=13).fit(PAIRS)
    assert set(ProcrustesWords(folder, pivot="en", min_pairs=12).fit(PAIRS).rotations_) == {
        "fr", "de"
    }  # fmt: skip
    rows = zip(PAIRS.synsets, PAIRS.words, PAIRS.languages, strict=True)
    more = Constraints.of([*rows, ("s0", "find tree", "en")])
    assert ProcrustesWords(folder).fit(more).pivot_ == "en"  # of most words
