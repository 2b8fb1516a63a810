"""Ranks against definitions, what training may see, equal budgets, what leaves. About 30 s."""

from __future__ import annotations

import json
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.embedding.small_models import WORDS as LETTERS
from tests.embedding.small_models import backbone_folder, tokenizer

from bakeoff.data.lexicons import Constraints, string_overlap
from bakeoff.data.splits import normalise
from bakeoff.embedding.lexical import METHOD, LexicalSpecializer
from bakeoff.embedding.lexicon_induction import bli_lexicon
from bakeoff.embedding.problem import words as module
from bakeoff.embedding.problem.words import (
    WORD_METRICS,
    WordProblem,
    default_words,
    word_designs,
)
from bakeoff.embedding.word_vectors import WordEncoder
from bakeoff.errors import BakeoffError, DataError
from bakeoff.study import Design, Work

LANGUAGES = ("aa", "bb", "cc", "dd")
RAW = Design("raw", "raw")
FULL = Design("full", "lexical-full")
TRAINED = (
    FULL,
    Design("adapter", "lexical-adapter", {"reduction": 4}),
    Design("LoRA", "lexical-lora", {"rank": 2}),
    Design("row", "row-contrastive"),
)


def made_words(n_synsets=40, languages=LANGUAGES):
    """Two or three of twelve words, another order and choice in each language."""
    terms = [" ".join(some) for some in product(LETTERS[:12], repeat=2)]
    rng = np.random.default_rng(0)
    rows = []
    for language in languages:
        order = rng.permutation(len(terms))[:n_synsets]
        rows += [(f"s{i}", terms[place], language) for i, place in enumerate(order)]
    rows.append(("s0", "red cat tree", languages[0]))  # a synonym, and the most words
    return Constraints.of(rows, "made up")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def problem(folder, data=None, **given):
    settings = {"steps": 3, "batch_size": 8, "search_share": 0.0, "fraction": 0.3, **given}
    return WordProblem(made_words() if data is None else data, base=folder, **settings)


def run(one, design, seed, folder):
    folder.mkdir(parents=True)
    return one.run(design, seed, Work(folder))


def flat(scores):
    return [(m, t, u) for m, tasks in scores.items() for t, u in tasks.items()]


def same(one, other):
    pairs = zip(flat(one.scores), flat(other.scores), strict=True)
    return all(a[:2] == b[:2] and np.array_equal(a[2], b[2]) for a, b in pairs)


# --- what is asked ----------------------------------------------------------------------------


def test_training_knows_nothing_of_what_is_held_out(bert_folder):
    setting = problem(bert_folder).setting
    split_synsets = set(setting.words.synsets)
    train = set(setting.train.synsets)
    assert setting.pivot == "aa"
    assert len(setting.held_out_languages) == 1
    assert not set(setting.held_out_languages) & set(setting.train.languages)
    hidden = split_synsets - train
    assert len(hidden) >= 0.3 * 40
    known = {normalise(word) for word in setting.train.words}
    new = {
        normalise(word)
        for cell in ("synsets", "both")
        for one in setting.tasks[cell]
        for word in one.words()
    }
    assert new
    assert not new & known
    aside = {normalise(word) for one in setting.validation for word in one.words()}
    assert aside
    assert not aside & (known | new)
    for one in setting.validation:
        assert not {one.source_language, one.target_language} & set(setting.held_out_languages)
    for one in setting.tasks["languages"]:  # no synset of those set aside either
        concepts = setting.words.concepts()
        synsets = [
            {s for s, by in concepts.items() if word in by.get(one.source_language, ())}
            for word in one.source_words
        ]
        assert all(some & train for some in synsets)
    paired = setting.pairs.constraints
    assert set(paired.words) <= set(setting.train.words)


def test_a_new_language_is_not_asked_for_what_another_language_has_taught(bert_folder):
    rows = [*zip(*columns(made_words(languages=("aa", "bb", "cc"))), strict=True)]
    copied = [(s, w.upper(), "dd") for s, w, spoken in rows if spoken == "bb" and s[-1] in "1357"]
    terms = {s: f"{w} red sat" for s, w, spoken in rows if spoken == "cc" and s[-1] in "02468"}
    rows += [*copied, *((s, w, "dd") for s, w in terms.items())]
    one = problem(bert_folder, Constraints.of(rows), held_out_languages=["dd"])
    trained = [
        {word for words in spoken.values() for word in words}
        for spoken in one.setting.train.concepts().values()
    ]
    n_copied = sum(s in one.setting.train.synsets for s, _, _ in copied)
    assert n_copied > 5
    for lexicon in one.setting.tasks["languages"]:
        for word, gold in zip(lexicon.source_words, lexicon.translations, strict=True):
            pairs = [{normalise(word), normalise(right)} for right in gold]
            assert not [pair for pair in pairs for words in trained if pair <= words]
    asked = "a question of a new language is not asked if training has the same letters"
    assert asked in one.describe()["judged"]


def test_questions_go_from_and_into_the_pivot_among_all_words(bert_folder):
    setting = problem(bert_folder).setting
    words = setting.words
    held = set(setting.held_out_languages)
    seen = set(LANGUAGES) - held - {"aa"}
    for cell, others in (("synsets", seen), ("languages", held), ("both", held)):
        kinds = {(one.source_language, one.target_language) for one in setting.tasks[cell]}
        assert kinds == {pair for other in others for pair in (("aa", other), (other, "aa"))}
        for one in setting.tasks[cell]:
            spoken = [
                word
                for word, language in zip(words.words, words.languages, strict=True)
                if language == one.target_language
            ]
            assert set(one.target_vocabulary) == set(spoken)


def test_questions_are_capped_alike_for_all(bert_folder):
    whole = problem(bert_folder).setting.tasks
    some = problem(bert_folder, max_questions=5).setting.tasks
    for cell, lexicons in some.items():
        for one, all_of_it in zip(lexicons, whole[cell], strict=True):
            assert len(one) == 5
            assert set(one.source_words) < set(all_of_it.source_words)
            assert one.target_vocabulary == all_of_it.target_vocabulary


def test_one_language_asks_for_synonyms(bert_folder, tmp_path):
    rows = [(s, w, "aa") for s, w, _ in zip(*columns(made_words()), strict=True)]
    one = problem(bert_folder, Constraints.of(rows))
    assert list(one.metrics) == ["mrr_seen", "low_overlap", "precision"]
    assert list(one.setting.tasks) == ["synsets"]
    assert {(x.source_language, x.target_language) for x in one.setting.tasks["synsets"]} == {
        ("aa", "aa")
    }
    trial = run(one, RAW, 0, tmp_path / "raw")
    assert (trial.scores["mrr_seen"]["new synsets"] > 0).all()
    with pytest.raises(DataError, match="procrustes needs 10 training pairs of 'aa'"):
        one.check(Design("p", "procrustes"))


def columns(words):
    return words.synsets, words.words, words.languages


def test_without_languages_held_out_there_is_one_task(bert_folder):
    one = problem(bert_folder, held_out_languages=())
    assert list(one.setting.tasks) == ["synsets"]
    assert next(iter(one.metrics)) == "mrr_seen"
    assert "none" in one.describe()["languages held out"]


def test_words_without_tokens_are_left_out(bert_folder, monkeypatch):
    rows = [*zip(*columns(made_words()), strict=True), ("s1", "empty", "bb")]
    has_tokens = WordEncoder.has_tokens

    def with_an_empty_one(self, words):
        return has_tokens(self, words) & np.array([word != "empty" for word in words])

    monkeypatch.setattr(WordEncoder, "has_tokens", with_an_empty_one)
    setting = problem(bert_folder, Constraints.of(rows)).setting
    assert "1 word without any token left out." in setting.notes
    assert setting.words.words == made_words().words


def test_words_of_unknown_tokens_only_are_counted(bert_folder):
    rows = [*zip(*columns(made_words()), strict=True)]
    rows += [("s1", "x", "bb"), ("s2", "x y", "bb"), ("s3", "x cat", "bb")]
    assert not any("unknown" in note for note in problem(bert_folder).setting.notes)
    notes = problem(bert_folder, Constraints.of(rows)).setting.notes
    n_words = len({word for _, word, _ in rows})
    assert notes[-1].startswith(f"For 2 of {n_words} words the base model has unknown tokens")


def test_default_words_have_english_names():
    words, held_out = default_words("smoke")
    by_synset = words.concepts()
    assert all("en" in by for by in by_synset.values())
    assert len(by_synset) == 60
    assert set(held_out) < set(words.all_languages)
    with pytest.raises(DataError, match="size must be one of smoke, demo, full"):
        default_words("tiny")


# --- scores -----------------------------------------------------------------------------------


def reciprocal_ranks(similarities, right):
    """By sorting: the best right answer's place, of equal ones the lower row first."""
    found = []
    for row, gold in zip(similarities, right, strict=True):
        order = np.lexsort((np.arange(len(row)), -row))
        found.append(1 / (1 + min(int(np.flatnonzero(order == g)[0]) for g in gold)))
    return np.array(found)


def test_scores_are_what_their_definitions_say(bert_folder, tmp_path):
    one = problem(bert_folder)
    trial = run(one, RAW, 0, tmp_path / "raw")
    encoder = WordEncoder(bert_folder)

    def unit(words):
        vectors = encoder.encode(list(words)).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for cell, task in module._TASKS.items():
        ranks, hits, low = [], [], []
        for lexicon in one.setting.tasks[cell]:
            source, target = unit(lexicon.source_words), unit(lexicon.target_vocabulary)
            pool = unit(lexicon.source_vocabulary)
            places = {word: place for place, word in enumerate(lexicon.target_vocabulary)}
            right = [[places[word] for word in gold] for gold in lexicon.translations]
            cosines = (source @ target.T).round(6)
            ranks.append(reciprocal_ranks(cosines, right))
            nearest = np.sort(target @ pool.T, axis=1)[:, -10:].mean(axis=1)
            hits.append(reciprocal_ranks((2 * source @ target.T - nearest).round(5), right) == 1)
            low.append(np.array(lexicon.overlaps) <= 0.5)
        expected = np.concatenate(ranks)
        metric = "mrr_seen" if cell == "synsets" else "mrr_unseen"
        assert trial.scores[metric][task] == pytest.approx(expected)
        assert np.array_equal(trial.scores["precision"][task], np.concatenate(hits).astype(float))
        hard = np.concatenate(low)
        assert hard.any()
        assert trial.scores["low_overlap"][task] == pytest.approx(expected[hard])


def test_kept_raw_vectors_are_told_apart_by_model_and_layer(bert_folder, tmp_path):
    words = list(dict.fromkeys(made_words().words))
    other = backbone_folder(tmp_path / "llama")
    for folder, layer in ((bert_folder, -1), (bert_folder, "mean"), (bert_folder, 0), (other, -1)):
        table = problem(folder)._raw(layer)
        assert np.array_equal(table.encode(words), WordEncoder(folder).encode(words, layer))


def test_low_overlap_looks_at_all_that_training_has_of_the_synset(bert_folder):
    setting = problem(bert_folder).setting
    (lexicon, _) = setting.tasks["languages"]
    by_synset = setting.words.concepts()
    synsets = {by["aa"][0]: synset for synset, by in by_synset.items()}
    row = 3
    word, gold = lexicon.source_words[row], lexicon.translations[row]
    trained = zip(setting.train.synsets, setting.train.words, strict=True)
    seen = [w for synset, w in trained if synset == synsets[word]]
    assert seen
    assert lexicon.overlaps[row] == max(string_overlap(one, [word, *seen]) for one in gold)


def test_all_designs_answer_the_same_questions(bert_folder, tmp_path):
    one = problem(bert_folder, keep_models=False)
    shapes = set()
    for number, design in enumerate(word_designs()):
        trial = run(one, design, 0, tmp_path / str(number))
        shapes.add(tuple((m, t, len(u)) for m, t, u in flat(trial.scores)))
        assert all(
            np.isfinite(u).all() and (u >= 0).all() and len(u) for *_, u in flat(trial.scores)
        )
        assert trial.artifact is None
        assert not any((tmp_path / str(number)).iterdir())
    assert len(shapes) == 1
    names = {m for m, *_ in next(iter(shapes))}
    assert names == {name for name, metric in one.metrics.items() if not metric.combines}
    assert list(one.metrics) == list(WORD_METRICS)


@pytest.mark.parametrize("design", [RAW, *TRAINED], ids=lambda d: d.name)
def test_a_trial_depends_on_design_and_seed_only(bert_folder, tmp_path, design):
    one = problem(bert_folder, keep_models=False)
    first = run(one, design, 1, tmp_path / "1")
    other = run(one, design, 2, tmp_path / "2")
    copy = pickle.loads(pickle.dumps(one))
    assert copy.fingerprint() == one.fingerprint()
    torch.manual_seed(99)
    again = run(copy, design, 1, tmp_path / "3")
    assert same(first, again)
    assert same(first, other) == (design is RAW)


def test_loaded_models_stay_behind(bert_folder):
    one = problem(bert_folder)
    before = len(pickle.dumps(one))
    one.prepare([RAW], [0], Work(None))
    assert one._loaded.encoder is not None
    assert len(pickle.dumps(one)) < before + 200


def test_the_fingerprint_sees_what_matters(bert_folder, tmp_path):
    other = backbone_folder(tmp_path / "llama")
    kinds = [
        problem(bert_folder), problem(other), problem(bert_folder, made_words(39)),
        problem(bert_folder, steps=4), problem(bert_folder, batch_size=9),
        problem(bert_folder, learning_rate=1e-3), problem(bert_folder, search_share=0.5),
        problem(bert_folder, fraction=0.4), problem(bert_folder, pivot="bb"),
        problem(bert_folder, held_out_languages=("cc", "dd")),
    ]  # fmt: skip
    assert len({one.fingerprint() for one in kinds}) == len(kinds)
    assert problem(bert_folder, keep_models=False).fingerprint() == kinds[0].fingerprint()


def test_a_decoder_works_too(tmp_path):
    one = problem(backbone_folder(tmp_path / "llama"), keep_models=False)
    for number, design in enumerate((RAW, FULL, Design("mean", "raw", {"layer": "mean"}))):
        assert run(one, design, 0, tmp_path / str(number)).cost["texts_embedded"] > 40


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("design", TRAINED, ids=lambda d: d.name)
def test_costs(bert_folder, tmp_path, monkeypatch, design):
    counted = []
    prepare = LexicalSpecializer._prepare

    def counting(self, encoder):
        weights = prepare(self, encoder)
        counted.append(sum(weight.numel() for weight in weights))
        return weights

    monkeypatch.setattr(LexicalSpecializer, "_prepare", counting)
    one = problem(bert_folder, keep_models=False)
    cost = run(one, design, 0, tmp_path / "t").cost
    assert cost["trained_parameters"] == counted[0]
    assert cost["training_pairs"] == 3 * 8
    assert cost["search_pairs"] == 0
    assert cost["texts_embedded"] == len(set(one.setting.words.words) - _dropped(one))
    assert cost["active_parameters"] >= sum(
        weight.numel() for weight in WordEncoder(bert_folder).backbone.parameters()
    )


def _dropped(one):
    asked = {w for some in one.setting.tasks.values() for x in some for w in module._all(x)}
    return set(one.setting.words.words) - asked


def test_trained_designs_read_the_same_pairs(bert_folder, monkeypatch):
    drawn = []
    batches = LexicalSpecializer._batches

    def recording(self, pairs):
        for rows in batches(self, pairs):
            drawn.append((id(pairs.constraints), rows.tolist()))
            yield rows

    monkeypatch.setattr(LexicalSpecializer, "_batches", recording)
    one = problem(bert_folder)
    read = []
    for design in TRAINED:
        drawn.clear()
        one._fit(design, 1e-3, 3, 5)
        read.append(list(drawn))
    assert len(read[0]) == 3
    assert all(other == read[0] for other in read)


def test_row_labels_are_what_tells_the_rival_apart(bert_folder):
    one = problem(bert_folder)
    ours, theirs = (one._fit(design, 1e-3, 1, 0) for design in (TRAINED[0], TRAINED[3]))
    assert (ours.labels, theirs.labels) == ("synset", "row")
    assert ours.history_.losses != theirs.history_.losses


def test_training_is_that_of_the_component(bert_folder, tmp_path):
    one = problem(bert_folder)
    trial = run(one, FULL, 4, tmp_path / "t")
    plain = LexicalSpecializer(
        bert_folder, steps=3, batch_size=8, learning_rate=one.learning_rate, seed=4
    ).fit(one.setting.pairs)
    expected = [
        bli_lexicon(plain.encode_words, lexicon).reciprocal_ranks
        for lexicon in one.setting.tasks["both"]
    ]
    found = trial.scores["mrr_unseen"]["new synsets and languages"]
    assert found == pytest.approx(np.concatenate(expected))


# --- learning rates ---------------------------------------------------------------------------


def test_the_rate_is_looked_for_once_and_never_on_held_out_words(
    bert_folder, tmp_path, monkeypatch
):
    one = problem(bert_folder, search_share=0.5, steps=4, search_reach=1, keep_models=False)
    fits, asked, seeds = [], [], []
    fit, ranked = WordProblem._fit, module._ranked

    def fitting(self, design, rate, steps, seed, progress=None):
        fits.append((round(rate, 10), steps))
        seeds.append(seed)
        return fit(self, design, rate, steps, seed, progress)

    def asking(encode, lexicon, csls_k=None):
        asked.append(lexicon)
        return ranked(encode, lexicon, csls_k)

    monkeypatch.setattr(WordProblem, "_fit", fitting)
    monkeypatch.setattr(module, "_ranked", asking)
    adapter = TRAINED[1]
    first = run(one, adapter, 0, tmp_path / "0")
    assert [steps for _, steps in fits[:-1]] == [2] * (len(fits) - 1)
    assert fits[-1][1] == 4
    assert not {0, 1} & set(seeds[:-1])  # no trial's draws choose its rate
    assert seeds[-1] == 0
    assert fits[0][0] == pytest.approx(5e-4)  # ten times that of full training
    assert first.cost["search_pairs"] == (len(fits) - 1) * 2 * 8
    n = len(one.setting.validation) * (len(fits) - 1)
    assert {id(x) for x in asked[:n]} == {id(x) for x in one.setting.validation}
    assert not {id(x) for x in asked[n:]} & {id(x) for x in one.setting.validation}
    scores = {}
    for path in (module.cache_directory() / "words").glob("rates-*/rates.json"):
        scores = dict(json.loads(path.read_text()))
    assert fits[-1][0] == pytest.approx(max(scores, key=lambda rate: scores[rate]))
    fits.clear()
    second = run(one, adapter, 1, tmp_path / "1")
    assert len(fits) == 1
    assert second.cost["search_pairs"] == first.cost["search_pairs"]
    assert "Learning rate" in second.notes[0]


def test_rates_are_kept_apart_for_each_design_and_setting(bert_folder, monkeypatch):
    searched = []

    def fitting(self, design, rate, steps, seed, progress=None):
        searched.append(design.name)

    monkeypatch.setattr(WordProblem, "_fit", fitting)
    monkeypatch.setattr(WordProblem, "_table", lambda self, *given: self._raw(-1))
    supcon = Design("supcon", "lexical-full", {"loss": "supcon"})
    for batch_size, design in ((7, FULL), (7, supcon), (8, FULL), (8, TRAINED[3])):
        one = problem(bert_folder, batch_size=batch_size, search_share=0.4, search_reach=1)
        for _ in range(2):  # the second time from the cache
            searched.clear()
            rates = one._rates(design, Work(None))
            assert rates[one.learning_rate] > 0
            if searched:
                assert set(searched) == {design.name}
                n_searches = len(searched)
        assert not searched
        assert n_searches == len(rates)
        n_searches = 0


def test_parameters_reach_the_component(bert_folder):
    one = problem(bert_folder)
    training = {"temperature": 0.2, "alpha": None, "loss": "supcon", "similarity": "csls",
                "layer": "mean"}  # fmt: skip
    cases = [
        ("lexical-full", {}, {"peft": "full", "labels": "synset"}),
        ("lexical-adapter", {"reduction": 4}, {"peft": "adapter", "adapter_reduction": 4}),
        ("lexical-lora", {"rank": 2}, {"peft": "lora", "lora_rank": 2}),
        ("row-contrastive", {}, {"peft": "full", "labels": "row"}),
    ]
    for method, given, expected in cases:
        made = one._fit(Design("d", method, {**training, **given}), 1e-3, 1, 7)
        found = made.get_params()
        expected = expected | training | {"learning_rate": 1e-3, "steps": 1, "seed": 7}
        assert {name: found[name] for name in expected} == expected


def test_training_that_diverges_is_told(bert_folder, tmp_path):
    design = Design("wild", "lexical-full", {"learning_rate": 1e30})
    with pytest.raises(BakeoffError, match="design 'wild': training diverged"):
        run(problem(bert_folder), design, 0, tmp_path / "t")
    hopeless = problem(bert_folder, search_share=1.0, search_reach=1, learning_rate=1e30)
    with pytest.raises(BakeoffError, match="at every learning rate"):
        run(hopeless, FULL, 0, tmp_path / "u")


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2"),
        ({"search_reach": 0}, "search_reach must be"),
        ({"max_questions": 0.5}, "max_questions must be"),
        ({"fraction": 0}, "fraction must be above 0"),
        ({"search_share": 2}, "search_share must be from 0 to 1"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"held_out_languages": "dd"}, "must be several names, got the text 'dd'"),
        ({"data": "huge"}, "data must be constraints or one of smoke, demo, full, got 'huge'"),
        ({"data": 3}, "data must be constraints, got int"),
        ({"held_out_languages": ["xx"]}, "held_out_languages names 'xx'"),
        ({"pivot": "xx"}, "pivot names 'xx', which has no words; there are:"),
        ({"pivot": "dd", "held_out_languages": ["dd"]}, "must not be among held_out_languages"),
        ({"held_out_languages": LANGUAGES}, "leaves no language to train on"),
    ],
)
def test_bad_settings_are_refused(bert_folder, given, message):
    with pytest.raises(DataError, match=message):
        problem(bert_folder, **given).setting  # noqa: B018


def test_too_few_words_are_refused(bert_folder):
    rows = [("1", "cat", "aa"), ("1", "dog", "bb"), ("2", "mat", "aa"), ("3", "red", "bb")]
    with pytest.raises(DataError):
        problem(bert_folder, Constraints.of(rows), held_out_languages=()).setting  # noqa: B018


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("word2vec", {}, "does not say which word vectors to use"),
        ("raw", {"rank": 2}, "raw takes layer; got rank"),
        ("lexical-full", {"loss": "hinge"}, "loss must be one of nt-xent, supcon, got 'hinge'"),
        ("lexical-full", {"similarity": "dot"}, "similarity must be one of cosine, csls"),
        ("lexical-full", {"learning_rate": 0}, "learning_rate must be above 0"),
        ("lexical-full", {"temperature": "x"}, "temperature must be above 0"),
        ("lexical-full", {"alpha": -2}, "alpha must be at least 0"),
        ("lexical-lora", {"rank": 0}, "rank must be an integer of at least 1"),
        ("lexical-adapter", {"reduction": 1.5}, "reduction must be an integer"),
        ("raw", {"layer": 3}, "layer must be 'mean' or a whole number from -3 to 2, got 3"),
        ("raw", {"layer": "last"}, "layer must be 'mean' or a whole number from -3 to 2, got"),
        ("character-ngrams", {"shortest": 5}, "shortest must be at most longest"),
    ],
)
def test_bad_designs_are_refused(bert_folder, method, params, message):
    with pytest.raises(DataError, match=f"design 'd': .*{message}"):
        problem(bert_folder).check(Design("d", method, params))


def test_every_design_can_run_and_every_published_method_is_one(bert_folder):
    one = problem(bert_folder)
    for design in word_designs():
        one.check(design)
    assert set(METHOD["designs"]) <= {design.method for design in word_designs(variants=False)}


# --- what leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "design",
    [*TRAINED, RAW, Design("abt", "all-but-the-top", {"n_components": 2}),
     Design("p", "procrustes"), Design("n", "character-ngrams", {"longest": 3})],
    ids=lambda d: d.name,
)  # fmt: skip
def test_the_winner_gives_the_vectors_that_were_judged(bert_folder, tmp_path, design):
    one = problem(bert_folder)
    trial = run(one, design, 0, tmp_path / "trial")
    destination = tmp_path / "winner"
    destination.mkdir()
    (destination / "old").touch()
    assert one.export(design, trial.artifact, destination, reason="It was best.") is False
    assert not (destination / "old").exists()
    text = (destination / "README.md").read_text()
    lines = one.usage(destination)
    assert "SentenceTransformer" in lines[0] or "language='aa'" in lines[-1]  # the pivot
    assert "It was best." in text
    assert "\n".join(lines) in text
    found = {}
    exec("\n".join(lines), found)  # the lines that the README shows
    model = found["model"]

    def vectors(words, language):
        if hasattr(model, "encode_words"):
            return model.encode_words(words, language=language)
        return model.encode(words)

    scores = [
        bli_lexicon(
            lambda words, x=x: vectors(words, x.source_language),
            x,
            encode_target=lambda words, x=x: vectors(words, x.target_language),
        ).reciprocal_ranks
        for x in one.setting.tasks["synsets"]
    ]
    assert trial.scores["mrr_seen"]["new synsets"] == pytest.approx(np.concatenate(scores))


def test_the_description_is_json_and_says_what_the_base_is(bert_folder):
    facts = problem(bert_folder, search_share=0.5).describe()
    json.dumps(facts, allow_nan=False)
    assert "set aside, in runs of 50% of the steps" in facts["budget"]
    assert set(facts["tasks"]) == {"new synsets", "new languages", "new synsets and languages"}
    assert "English" not in " ".join(facts["notes"])


@pytest.mark.model
def test_the_default_says_that_its_base_is_english():
    facts = WordProblem("smoke").describe()
    assert "English" in facts["notes"][0]
    assert facts["languages held out"] == "nl"


def test_the_comparison_on_the_method_page_runs(bert_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = zip(*columns(made_words(languages=("en", "de", "fi", "fr"))), strict=True)
    lines = ["synset\tword\tlang", *("\t".join(row) for row in rows)]
    (tmp_path / "terms.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = Path(__file__).parents[2] / "docs/methods/lexical-specialization.md"
    section = page.read_text("utf-8").split("## Compare it on your data")[1]
    code = section.split("```python\n")[1].split("```")[0]
    quick = {
        "PATH_OR_HUB_ID": bert_folder,
        'pivot="en"': 'pivot="en", steps=2, search_share=0, keep_models=False',
        "seeds=3": "seeds=2",
    }
    for written, here in quick.items():
        assert written in code
        code = code.replace(written, here)
    names = {}
    exec(code, names)
    setting = names["problem"].setting
    assert (setting.pivot, setting.held_out_languages) == ("en", ("fi",))
    assert not names["study"].run().data["failures"]
    for design in word_designs():
        assert design.method in {"raw", *module._PEFT, *module._CLASSES}
