"""Constraints, pairs, splits and test lexicons, against counting by hand. About 6 seconds."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data.lexicons import (
    Constraints,
    ConstraintSplit,
    Lexicon,
    WordPairs,
    build_pairs,
    language_counts,
    lexicon,
    read_lexicon,
    split_constraints,
    string_overlap,
)
from bakeoff.errors import DataError

LANGUAGES = ("de", "en", "fr", "it")


def constraints(n_synsets=30, languages=LANGUAGES):
    return Constraints.of(
        [
            (f"s{synset}", f"{language}{synset}", language)
            for synset in range(n_synsets)
            for language in languages
        ]
    )


entries = st.lists(
    st.tuples(
        st.sampled_from("123"), st.sampled_from("abcde"), st.sampled_from(["en", "fr", "de"])
    ),
    min_size=2,
    max_size=14,
    unique=True,
)


# --- pairs ------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(entries, st.booleans(), st.booleans(), st.booleans())
def test_pairs_are_all_pairs_of_a_synset(rows, monolingual, cross_lingual, identical):
    words = Constraints.of(rows)
    expected = {
        (i, j)
        for (i, one), (j, other) in combinations(enumerate(rows), 2)
        if one[0] == other[0]
        and (monolingual if one[2] == other[2] else cross_lingual)
        and (identical or one[1] != other[1])
    }
    options = {
        "monolingual": monolingual,
        "cross_lingual": cross_lingual,
        "identical": identical,
        "max_per_language_pair": None,
    }
    if not expected:
        with pytest.raises(DataError, match="no two different words"):
            build_pairs(words, **options)
        return
    pairs = build_pairs(words, **options)
    found = [
        tuple(sorted(p)) for p in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert [words.synsets[i] for i, _ in found] == [words.synsets[j] for _, j in found]


def test_caps_hold_per_language_pair_and_budgets_are_nested():
    words = constraints(40)
    capped = build_pairs(words, max_per_language_pair=7, seed=3)
    assert set(Counter(capped.language_pairs()).values()) == {7}
    assert len(set(capped.language_pairs())) == 6
    small, large = (build_pairs(words, max_pairs=n, seed=1) for n in (20, 60))
    rows = [set(zip(p.first.tolist(), p.second.tolist(), strict=True)) for p in (small, large)]
    assert len(rows[0]) == 20
    assert rows[0] < rows[1]
    again = build_pairs(words, max_per_language_pair=7, seed=3)
    assert np.array_equal(again.first, capped.first)
    other = build_pairs(words, max_per_language_pair=7, seed=4)
    assert not np.array_equal(other.first, capped.first)


def test_what_is_drawn_for_two_languages_does_not_depend_on_a_third():
    def drawn(languages):
        words = constraints(40, languages)
        pairs = build_pairs(words, max_per_language_pair=5)
        texts = zip(
            (words.words[i] for i in pairs.first),
            (words.words[j] for j in pairs.second),
            pairs.language_pairs(),
            strict=True,
        )
        return {(a, b) for a, b, languages in texts if languages == ("de", "en")}

    assert drawn(("de", "en")) == drawn(("de", "en", "fr", "it"))
    # Nor on the order in which a third language names the synsets.
    few, many = (("de", "en"), ("de", "en", "fr"))
    turned = Constraints.of(
        [*((f"s{i}", f"fr{i}", "fr") for i in reversed(range(40))),
         *zip(constraints(40, few).synsets, constraints(40, few).words, few * 40, strict=True)]
    )  # fmt: skip
    texts = []
    for words in (turned, constraints(40, many)):
        pairs = build_pairs(words, max_per_language_pair=5).language_pairs()
        rows = [row for row, pair in enumerate(pairs) if pair == ("de", "en")]
        chosen = build_pairs(words, max_per_language_pair=5).select(np.array(rows))
        texts.append([words.words[i] for i in (*chosen.first, *chosen.second)])
    assert texts[0] == texts[1]


def test_weights_are_those_of_the_authors_code():
    # Frozen from get_sampler of their utils/functions.py (commit 141cb24) on these languages.
    spoken = [("en", "en")] * 10 + [("en", "fr"), ("fr", "en")] + [("fr", "fr")] * 3
    words = Constraints.of(
        [(str(i), f"{side}{i}", pair[side]) for i, pair in enumerate(spoken) for side in (0, 1)]
    )
    rows = np.arange(len(spoken))
    pairs = WordPairs(words, 2 * rows, 2 * rows + 1)
    for alpha, weights in (
        (0.5, [0.05012692, 0.1120872, 0.1120872, 0.09151881]),
        (0.0, [0.03333334, 0.16666667, 0.16666667, 0.11111111]),
        (1.0, [0.06666667] * 4),
    ):
        assert pairs.weights(alpha)[[0, 10, 11, 12]] == pytest.approx(weights, abs=1e-7)


def test_weights_are_the_papers_and_drawing_by_them_gives_the_wanted_shares():
    rows = [("1", f"w{i}", "en") for i in range(5)]  # 10 pairs en-en
    rows += [("2", "x", "en"), ("2", "y", "fr")]  # 1 pair en-fr
    rows += [("3", "u", "fr"), ("3", "v", "fr"), ("3", "w", "fr")]  # 3 pairs fr-fr
    pairs = build_pairs(Constraints.of(rows))
    shares = np.array([10, 1, 3]) / 14
    for alpha in (0.0, 0.5, 1.0, 2.0):
        wanted = shares**alpha / (shares**alpha).sum()
        by_pair = Counter()
        for pair, weight in zip(pairs.language_pairs(), pairs.weights(alpha), strict=True):
            by_pair[pair] += weight
        found = [by_pair[pair] for pair in (("en", "en"), ("en", "fr"), ("fr", "fr"))]
        assert np.allclose(found, wanted)
    for plain in (None, -1):
        assert np.allclose(pairs.weights(plain), 1 / 14)
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(pairs), 40_000, p=pairs.weights(0.5))
    kinds = Counter(pairs.language_pairs()[row] for row in drawn.tolist())
    q = np.sqrt(shares) / np.sqrt(shares).sum()
    assert abs(kinds[("en", "fr")] / 40_000 - q[1]) < 0.01
    with pytest.raises(DataError, match="alpha must be at least 0"):
        pairs.weights(-0.5)


def test_pairs_without_words_of_a_test_list():
    words = Constraints.of([("1", "Dog", "en"), ("1", "chien", "fr"), ("1", "cane", "it")])
    pairs = build_pairs(words).without_words(["dog "])  # compared without case and spaces
    assert [
        (words.words[i], words.words[j]) for i, j in zip(pairs.first, pairs.second, strict=True)
    ] == [("chien", "cane")]


def test_bad_pairs():
    words = constraints(2)
    with pytest.raises(DataError, match="joins words of two synsets"):
        WordPairs(words, np.array([0]), np.array([4]))
    with pytest.raises(DataError, match="rows from 0 to 7"):
        WordPairs(words, np.array([0]), np.array([8]))
    with pytest.raises(DataError, match=r"must be \(n,\)"):
        WordPairs(words, np.array([0]), np.array([1, 2]))
    with pytest.raises(DataError, match="max_per_language_pair must be at least 1"):
        build_pairs(words, max_per_language_pair=0)
    with pytest.raises(DataError, match="nothing to draw"):
        build_pairs(words).select(np.array([], dtype=np.int64)).weights()


# --- constraints ------------------------------------------------------------------------------


def test_constraints_refuse_what_cannot_be_trained_on():
    with pytest.raises(DataError, match=r"words: 2 entries empty, the first at rows \[1, 2\]"):
        Constraints(("a", "a", "b"), ("x", " ", ""), ("en", "en", "en"))
    with pytest.raises(DataError, match="differ in length"):
        Constraints(("a",), ("x", "y"), ("en", "en"))
    with pytest.raises(DataError, match="at least one entry"):
        Constraints((), (), ())
    with pytest.raises(DataError, match=r"widths \[2, 3\]"):
        Constraints.of([("a", "b"), ("a", "b", "c")])
    with pytest.raises(DataError, match="'xx' not in the constraints"):
        constraints().only(["xx"])
    with pytest.raises(DataError, match="got the text 'en'"):
        constraints().only("en")


def test_repetitions_and_ambiguous_words():
    words = Constraints.of(
        [("1", "bank", "en"), ("1", "bank", "en"), ("2", "Bank", "en"), ("2", "Bank", "de"),
         ("3", "shore", "en")]
    )  # fmt: skip
    assert len(words.distinct()) == 4
    assert words.distinct().notes == ("1 repeated entry left out.",)
    clear = words.without_ambiguous()
    assert clear.words == ("Bank", "shore")
    assert clear.languages == ("de", "en")
    assert words.without_ambiguous(2).words == words.words
    assert language_counts(words) == {"en": 4, "de": 1}
    assert words.fingerprint() != clear.fingerprint()
    assert Constraints.of([("1", "a", "en", "gloss")]).glosses == ("gloss",)


# --- held out ---------------------------------------------------------------------------------


def test_split_cells_partition_everything_and_nothing_leaks():
    words = constraints(100)
    split = split_constraints(words, held_out_languages=["it"], fraction=0.3, seed=1)
    cells = {cell: split.cell(cell) for cell in ("synsets", "languages", "both", "seen")}
    assert sum(map(len, cells.values())) == len(words)
    assert len(split.held_out_synsets) == 30
    assert len(cells["both"]) == 30
    assert len(cells["synsets"]) == 90
    assert set(split.train.words) == set(cells["seen"].words)
    assert split.seen_languages == ("de", "en", "fr")
    other = split_constraints(words, held_out_languages=["it"], fraction=0.3, seed=2)
    assert other.held_out_synsets != split.held_out_synsets
    # More synsets move few of those held out: each has a place of its own.
    grown = split_constraints(constraints(110), held_out_languages=["it"], fraction=0.3, seed=1)
    assert len(split.held_out_synsets - grown.held_out_synsets) <= 10


def test_words_that_a_held_out_synset_shares_are_not_trained_on():
    rows = [(f"s{i}", f"w{i}", "en") for i in range(20)] + [
        (f"s{i}", f"w{i}", "fr") for i in range(20)
    ]
    whole = Constraints.of(rows)
    held = next(iter(split_constraints(whole, fraction=0.1).held_out_synsets))
    word = whole.concepts()[held]["en"][0]
    shared = Constraints.of([*rows, ("extra", word.upper(), "en"), ("extra", "free", "en")])
    split = split_constraints(shared, fraction=0.1)
    assert held in split.held_out_synsets
    assert "extra" not in split.held_out_synsets
    assert word.upper() not in split.train.words
    assert "free" in split.train.words
    assert "1 training entry left out" in split.notes[1]


def test_lexicons_of_the_cells():
    split = split_constraints(constraints(50), held_out_languages=["it"], fraction=0.2)
    both = split.lexicon("both", "en", "it")
    assert len(both) == 10
    assert all(
        word[2:] == gold[0][2:]
        for word, gold in zip(both.source_words, both.translations, strict=True)
    )
    assert len(both.target_vocabulary) == 50  # seen synsets are candidates too
    assert {f"s{word[2:]}" for word in both.source_words} == set(split.held_out_synsets)
    languages = split.lexicon("languages", "en", "it")
    assert len(languages) == 40
    # Training words of the same synset count for the overlap: en7, de7, fr7 against it7.
    place = languages.source_words.index(next(w for w in languages.source_words if len(w) == 3))
    assert languages.overlaps[place] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="needs one of the languages held out"):
        split.lexicon("both", "en", "de")
    with pytest.raises(DataError, match="needs no language held out"):
        split.lexicon("synsets", "en", "it")
    with pytest.raises(DataError, match="cell must be one of"):
        split.cell("test")
    with pytest.raises(DataError, match="fraction must be in"):
        split_constraints(constraints(), fraction=1.0)
    assert isinstance(split, ConstraintSplit)


def test_a_new_language_is_not_asked_for_what_training_has_by_letters():
    rows = [(f"s{i}", f"{name} {i}", language) for i in range(30) for name, language in
            (("word", "en"), ("Wörter", "de"), ("ordet", "da"))]  # fmt: skip
    rows += [(f"s{i}", f"WORTER {i}", "nl") for i in range(15)]  # German without its dots
    rows += [(f"s{i}", f"woord {i}", "nl") for i in range(15, 30)]
    split = split_constraints(Constraints.of(rows), held_out_languages=["nl"], fraction=0.4)
    new = split.held_out_synsets
    asked = {f"s{i}" for i in range(15, 30)} - new
    assert asked
    for source, target in (("en", "nl"), ("nl", "en")):
        test = split.lexicon("languages", source, target)
        assert {f"s{word.split()[1]}" for word in test.source_words} == asked
        assert len(test.overlaps) == len(test)
        assert len(test.target_vocabulary) == 30  # candidates are all words
        both = split.lexicon("both", source, target)  # training has no word of these synsets
        assert {f"s{word.split()[1]}" for word in both.source_words} == set(new)
    assert len(split.lexicon("seen", "en", "de")) == 18
    copies = Constraints.of([row for row in rows if row[2] != "nl"] + [
        (s, w, "nl") for s, w, language in rows if language == "de"
    ])  # fmt: skip
    copied = split_constraints(copies, held_out_languages=["nl"], fraction=0.4)
    with pytest.raises(DataError, match="training has all questions with an answer, by letters"):
        copied.lexicon("languages", "en", "nl")


def test_of_several_translations_the_one_most_alike_counts():
    whole = Constraints.of(
        [("1", "word", "en"), ("1", "Wort", "de"), ("1", "woord", "nl"), ("1", "WORT", "nl"),
         ("2", "cat", "en"), ("2", "Katze", "de"), ("2", "poes", "nl"), ("2", "kat", "nl")]
    )  # fmt: skip
    split = ConstraintSplit(whole, whole.only(["en", "de"]), frozenset(), ("nl",))
    test = split.lexicon("languages", "en", "nl")
    assert test.source_words == ("cat",)  # training has "word" and "Wort" by letters
    assert test.overlaps == pytest.approx([2 / 3])  # "kat" is near to "cat", "poes" to nothing
    known = Constraints.of([("1", "kat", "nl")])
    assert test.seen_in(known).tolist() == [True]
    assert test.seen_in(Constraints.of([("1", "kat", "de")])).tolist() == [False]


def test_fewer_synsets_are_held_out_if_so_many_are_allowed():
    few, many = (
        split_constraints(constraints(50), fraction=0.5, max_synsets=most).held_out_synsets
        for most in (3, None)
    )
    assert (len(few), len(many)) == (3, 25)
    assert few < many


def test_lexicon_gathers_all_translations_and_synonyms_exclude_the_word():
    words = Constraints.of(
        [("1", "dog", "en"), ("1", "hound", "en"), ("1", "chien", "fr"), ("2", "hound", "en"),
         ("2", "limier", "fr"), ("3", "cat", "en")]
    )  # fmt: skip
    test = lexicon(words, "en", "fr")
    assert dict(zip(test.source_words, test.translations, strict=True)) == {
        "dog": ("chien",),
        "hound": ("chien", "limier"),
    }
    synonyms = lexicon(words, "en", "en")
    assert dict(zip(synonyms.source_words, synonyms.translations, strict=True)) == {
        "dog": ("hound",),
        "hound": ("dog",),
    }
    with pytest.raises(DataError, match="no synset asked for"):
        lexicon(words, "en", "fr", synsets=["3"])


def test_seen_questions_and_low_overlap():
    test = Lexicon(
        "en", "fr", ("Nation", "dog"), (("nation",), ("chien",)), ("nation", "chien"), (),
        (1.0, 0.2),
    )  # fmt: skip
    trained = Constraints.of([("1", "nation", "en"), ("1", "x", "fr")])
    assert test.seen_in(trained).tolist() == [True, False]
    assert test.low_overlap().source_words == ("dog",)
    assert test.words() == {"Nation", "dog", "nation", "chien"}
    with pytest.raises(DataError, match="overlaps are not known"):
        lexicon(constraints(), "en", "fr").low_overlap()
    with pytest.raises(DataError, match="'b' without translation"):
        Lexicon("en", "fr", ("a", "b"), (("c",), ()), ("c",))


@settings(max_examples=60, deadline=None)
@given(st.text("abcö", max_size=6), st.text("abco", max_size=6))
def test_overlap_is_one_less_the_edit_distance(one, other):
    def distance(a, b):  # the definition, by recursion
        if not a or not b:
            return len(a) + len(b)
        return min(
            distance(a[1:], b) + 1,
            distance(a, b[1:]) + 1,
            distance(a[1:], b[1:]) + (a[0] != b[0]),
        )

    bare = one.replace("ö", "o")
    longest = max(len(bare), len(other))
    expected = 1 - distance(bare, other) / longest if longest else 0.0
    assert string_overlap(one, [other]) == pytest.approx(expected)
    assert string_overlap(one, [other, one]) == (1.0 if one else 0.0)


def test_read_lexicon(tmp_path):
    path = tmp_path / "de-en.tsv"
    path.write_text("Hund\tdog\nHund\thound\nEis\tice cream\n", encoding="utf-8")
    test = read_lexicon(path, "de", "en", target_vocabulary=["dog", "ice cream", "dog"])
    assert test.translations == (("dog", "hound"), ("ice cream",))
    assert test.target_vocabulary == ("dog", "ice cream")
    path.write_text("Hund dog\n\nKatze cat\n", encoding="utf-8")  # as MUSE writes them
    assert read_lexicon(path, "de", "en").target_vocabulary == ("dog", "cat")
    path.write_text("Hund dog\nKatze\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 has not two words"):
        read_lexicon(path, "de", "en")
    with pytest.raises(DataError, match="cannot be read"):
        read_lexicon(tmp_path / "none.tsv", "de", "en")
