"""Readers of files, CLDR, WordNet and FreeDict. About 5 seconds; real databases if installed."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bakeoff.data.lexicon_sources import (
    cldr_names,
    constraints_of_columns,
    freedict,
    pairs_of_columns,
    read_constraints,
    read_pairs,
    wordnet,
    wordnet_folder,
)
from bakeoff.errors import DataError

# --- files ------------------------------------------------------------------------------------

ROWS = [("DE", "Germany", "en"), ("DE", "Allemagne", "fr"), ("FR", "France", "fr")]


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_words_from_every_format(tmp_path, kind):
    path = tmp_path / f"names.{kind}"
    names = ("synset_id", "word", "lang")
    if kind == "parquet":
        table = pyarrow.table(dict(zip(names, map(list, zip(*ROWS, strict=True)), strict=True)))
        pyarrow.parquet.write_table(table, path)
    elif kind == "jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in [*ROWS, ROWS[0]]]
        path.write_text("\n".join(lines))
    else:
        mark = "\t" if kind == "tsv" else ","
        path.write_text("\n".join(mark.join(row) for row in [names, *ROWS, ROWS[0]]))
    found = read_constraints(path)
    assert list(zip(found.synsets, found.words, found.languages, strict=True)) == ROWS
    if kind != "parquet":
        assert found.name == path.name


def test_pair_rows_with_glosses_keep_their_repetitions(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        "synsetID,word1,lang1,word2,lang2,gloss1,gloss2\n"
        "bn:1,dog,en,chien,fr,a pet,un animal\n"
        "bn:1,dog,en,chien,fr,a pet,un animal\n"
        "bn:2,ice,en,Eis,de,cold,kalt\n"
    )
    pairs = read_pairs(path)
    words = pairs.constraints
    assert [
        (words.words[i], words.words[j]) for i, j in zip(pairs.first, pairs.second, strict=True)
    ] == [
        ("dog", "chien"),
        ("dog", "chien"),
        ("ice", "Eis"),
    ]
    assert pairs.labels.tolist() == [0, 0, 1]
    assert words.glosses == ("a pet", "un animal", "cold", "kalt")
    assert len(read_constraints(path)) == 4


def test_pairs_of_columns_are_those_of_the_file(tmp_path):
    path = tmp_path / "pairs.csv"
    names = ["synset", "word1", "lang1", "word2", "lang2", "gloss1", "gloss2"]
    rows = [
        ["b", "ice", "en", "Eis", "de", "cold", "kalt"],
        ["a", "dog", "en", "chien", "fr", "a pet", ""],
        ["a", "dog", "en", "cane", "it", "a pet", "un animale"],
        ["b", "ice", "en", "Eis", "de", "cold", "kalt"],
    ]
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    by_file = read_pairs(path)
    found = pairs_of_columns(dict(zip(names, zip(*rows, strict=True), strict=True)))
    assert found.constraints.fingerprint() == by_file.constraints.fingerprint()
    assert np.array_equal(found.first, by_file.first)
    assert np.array_equal(found.second, by_file.second)
    bare = {name: [row[i] for row in rows] for i, name in enumerate(names[:5])}
    assert pairs_of_columns(bare).constraints.glosses is None
    with pytest.raises(DataError, match="no column for the synset"):
        pairs_of_columns({name: cells for name, cells in bare.items() if name != "synset"})
    with pytest.raises(DataError, match=r"lang2: 4 entries empty, the first at rows \[0, 1, 2\]"):
        pairs_of_columns(bare | {"lang2": [None, float("nan"), " ", ""]})
    with pytest.raises(DataError, match="at least one pair"):
        pairs_of_columns({name: [] for name in names})


def test_pairs_without_synset_are_grouped_by_their_first_word(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("word1\tlang1\tword2\tlang2\ndog\ten\tchien\tfr\ndog\ten\tcane\tit\n")
    assert read_constraints(path).n_synsets == 1
    assert read_pairs(path).labels.tolist() == [0, 0]


def test_columns_by_name_and_a_language_for_all(tmp_path):
    path = tmp_path / "terms.csv"
    path.write_text("key,text,tongue\n1,a,en\n1,b,fr\n")
    names = {"synset_column": "key", "word_column": "text"}
    assert read_constraints(path, language_column="tongue", **names).languages == ("en", "fr")
    assert read_constraints(path, language="sv", **names).languages == ("sv", "sv")
    with pytest.raises(DataError, match=r"no column for the language: .*'key', 'text', 'tongue'"):
        read_constraints(path, **names)
    with pytest.raises(DataError, match="no column for the word"):
        read_constraints(path, synset_column="key")
    with pytest.raises(DataError, match="not pairs: use read_constraints"):
        read_pairs(path, language="sv", **names)
    frame = {"synset": [1, 1], "lemma": ["a", "b"], "language": ["en", "fr"], "gloss": ["x", None]}
    assert constraints_of_columns(frame).glosses == ("x", "")
    with pytest.raises(DataError, match="no column for the language"):
        constraints_of_columns({"synset": [1], "word": ["a"]})
    frame = {"synset": [1, 1], "lemma": ["a", float("nan")], "language": ["en", "fr"]}
    with pytest.raises(DataError, match=r"words: 1 entry empty, the first at rows \[1\]"):
        constraints_of_columns(frame)


def test_empty_cells_are_counted_and_named(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text("synset,word,lang\n1,a,en\n1,,en\n,b,en\n2, ,en\n2,c,\n")
    with pytest.raises(DataError, match=r"4 rows with an empty .* line 3, line 4, line 5"):
        read_constraints(path)
    kept = read_constraints(path, skip_empty=True)
    assert kept.words == ("a",)
    assert kept.notes[0].startswith(f"{path.name}: synset from column ")
    assert kept.notes[1:] == ("4 rows with an empty cell left out.",)


# --- CLDR -------------------------------------------------------------------------------------


def test_cldr_names_are_those_of_babels_own_api():
    from babel import Locale

    names = cldr_names(["de", "fr", "ja", "zh_Hant"])
    concepts = names.concepts()
    for language in ("de", "ja", "zh_Hant"):
        locale = Locale.parse(language)
        for code in ("DE", "JP", "BR"):
            assert concepts[f"territory:{code}"][language] == (locale.territories[code],)
        for code in ("USD", "EUR"):
            assert concepts[f"currency:{code}"][language] == (locale.currencies[code],)
        assert concepts["language:fi"][language] == (locale.languages["fi"],)
        assert concepts["script:Arab"][language] == (locale.scripts["Arab"],)
    assert concepts["month:1"]["de"] == ("Januar",)
    assert concepts["day:0"]["fr"] == ("lundi",)
    assert concepts["unit:length-kilometer"]["fr"] == ("kilomètres",)


def test_month_names_do_not_depend_on_which_locale_came_first():
    from babel import Locale

    _ = dict(Locale("jgo").months["stand-alone"]["wide"])  # changes what babel's locales share
    months = cldr_names(["jgo", "de", "ja"], ["months"]).concepts()["month:2"]
    assert months["de"] == ("Februar",)
    assert months["ja"] == ("2月",)
    assert Locale("de").territories["FR"] == "Frankreich"  # babel's memory is as it was


def test_many_languages_without_codes_and_without_twins():
    names = cldr_names(kinds=["territories", "days"], min_names=50)
    assert len(names.all_languages) > 150
    assert "no" in names.notes[0]
    assert not {"no", "nb"} <= set(names.all_languages)
    codes = [synset.split(":")[1] for synset in names.synsets]
    assert all(code != word for code, word in zip(codes, names.words, strict=True))
    few = {lang: names.languages.count(lang) for lang in names.all_languages}
    assert min(few.values()) >= 50


def test_unknown_locales_and_kinds():
    with pytest.raises(DataError, match=r"locales of CLDR .* got 'xx'"):
        cldr_names(["de", "xx"])
    with pytest.raises(DataError, match="kinds must be among"):
        cldr_names(["de"], ["cities"])


# --- WordNet ----------------------------------------------------------------------------------

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
NOUNS = (
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is known  \n"
    "02084071 05 n 0b dog 0 domestic_dog 0 Canis_familiaris 0 a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 "
    "001 @ 02083346 n 0000 | a member | of the genus  \n"
)
ADJECTIVES = '00001740 00 s 02 able(p) 0 galore(ip) 1 000 | having means; "able to swim"  \n'


def database(folder):
    (folder / "data.noun").write_text(LICENCE + NOUNS)
    (folder / "data.adj").write_text(LICENCE + ADJECTIVES)
    return folder


def test_wordnet_lines(tmp_path):
    found = wordnet(database(tmp_path), parts=["noun", "adj"])
    assert found.words[:4] == ("entity", "dog", "domestic dog", "Canis familiaris")
    assert len(found) == 1 + 11 + 2  # the number of words is hexadecimal: 0b
    assert found.words[-2:] == ("able", "galore")
    assert found.synsets[0] == "wn:00001740-n"
    assert found.synsets[-1] == "wn:00001740-s"
    assert found.glosses[0] == "that which is known"
    assert found.glosses[1] == "a member | of the genus"
    assert set(found.languages) == {"en"}
    single = wordnet(tmp_path, parts=["noun"], max_words=1)
    assert "domestic dog" not in single.words
    assert "dog" in single.words


def test_damaged_wordnet(tmp_path):
    with pytest.raises(DataError, match="no WordNet database"):
        wordnet(tmp_path)
    database(tmp_path)
    with pytest.raises(DataError, match=r"data\.verb: no such file"):
        wordnet(tmp_path, parts=["verb"])
    with pytest.raises(DataError, match="parts must be among"):
        wordnet(tmp_path, parts=["nouns"])
    (tmp_path / "data.noun").write_text(LICENCE + "00001740 03 n zz entity\n")
    with pytest.raises(DataError, match=r"line 2 is not in the format wndb\(5WN\)"):
        wordnet(tmp_path, parts=["noun"])


def test_words_and_synsets_agree_with_the_databases_own_index(tmp_path):
    # Oracle: index.noun lists each lemma's synsets, in a file apart.
    lemmas = ["entity", "dog", "domestic_dog", "canis_familiaris", *"abcdefgh"]
    (database(tmp_path) / "index.noun").write_text(
        LICENCE
        + "".join(
            f"{lemma} n 1 0 1 0 {'00001740' if lemma == 'entity' else '02084071'}  \n"
            for lemma in lemmas
        )
    )
    assert n_lemmas_of_index(tmp_path) == 12
    if (Path("/usr/share/wordnet") / "data.noun").is_file():  # Debian's, if it is there
        assert n_lemmas_of_index(wordnet_folder()) > 100_000


def n_lemmas_of_index(folder):
    found = wordnet(folder, parts=["noun"])
    of_lemma = {}
    for synset, word in zip(found.synsets, found.words, strict=True):
        of_lemma.setdefault(word.lower().replace(" ", "_"), set()).add(synset)
    n_lemmas = 0
    for line in (Path(folder) / "index.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        fields = line.split()
        n_synsets = int(fields[2])
        assert of_lemma[fields[0]] == {f"wn:{offset}-n" for offset in fields[-n_synsets:]}
        n_lemmas += 1
    assert n_lemmas == len(of_lemma)
    return n_lemmas


# --- FreeDict ---------------------------------------------------------------------------------

ENTRIES = {
    "00databaseinfo": "00-database-info\nA dictionary, free for all\n",
    "eisenhaltig": "eisenhaltig /ˈaɪzənhˌaltɪç/ <adj>\niron-bearing <adj>, ferrous <adj>\n"
    "   Synonyms: {Eisenerz enthaltend}, {eisenschüssig}\n\n see: {eisenhaltige Verkrustung}\n",
    "rogue": "Kaventsmann /kˈɑvəntsmˌan/ <masc, n, sg>\n [naut.] freak wave <n>, rogue wave <n>\n"
    '      "ein Kaventsmann"  - quite a wave\n         Note: at sea\n',
    "single": "single, lone /siŋgl/\n1. célibataire; seul (adv.)\n2. unique, qui est tout à fait "
    "seul ici\n3.\n see: {one}\n        Note: always\n",
    "waren": "Waren Sie / Warst du da? /vɑːrən/\nHave you ever been to that place?\n",
}
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value):
    digits = ""
    while value or not digits:
        value, rest = divmod(value, 64)
        digits = DIGITS[rest] + digits
    return digits


def dictionary(folder, name="freedict-deu-eng", compressed=True):
    body, lines = b"", []
    for head, entry in ENTRIES.items():
        data = entry.encode()
        lines.append(f"{head}\t{number(len(body))}\t{number(len(data))}")
        body += data
    lines.append(lines[1])  # two index words may lead to one entry
    (folder / f"{name}.index").write_text("\n".join(lines) + "\n")
    if compressed:
        (folder / f"{name}.dict.dz").write_bytes(gzip.compress(body))
    else:
        (folder / f"{name}.dict").write_bytes(body)
    return folder / f"{name}.index"


@pytest.mark.parametrize("compressed", [True, False])
def test_freedict_entries(tmp_path, compressed):
    calls = []
    found = freedict(
        dictionary(tmp_path, compressed=compressed), progress=lambda *done: calls.append(done)
    )
    assert list(found.concepts().values()) == [
        {"de": ("eisenhaltig",), "en": ("iron-bearing", "ferrous")},
        {"de": ("Kaventsmann",), "en": ("freak wave", "rogue wave")},
        {"de": ("single", "lone"), "en": ("célibataire", "seul")},
        {"de": ("single", "lone"), "en": ("unique",)},
    ]
    assert found.synsets[-1].endswith(":2")
    assert found.name == "FreeDict deu-eng"
    assert calls == [(4, 4)]
    long = freedict(dictionary(tmp_path, compressed=compressed), max_words=9)
    assert "qui est tout à fait seul ici" in long.words
    with pytest.raises(DataError, match="max_entries must be at least 1, got -1"):
        freedict(tmp_path / "freedict-deu-eng.index", max_entries=-1)


def test_freedict_names_and_damage(tmp_path):
    path = dictionary(tmp_path, "words")
    with pytest.raises(DataError, match="tells no two languages"):
        freedict(path)
    assert freedict(path, languages=("a", "b")).all_languages == ("a", "b")
    with pytest.raises(DataError, match="two files side by side"):
        freedict(tmp_path / "freedict-eng-fra.index")
    path.write_text("word\t!\tB\n")
    with pytest.raises(DataError, match="line 1: '!' is not a number"):
        freedict(path, languages=("a", "b"))
    path.write_text("word\tB\tzzzz\n")
    with pytest.raises(DataError, match="points behind the end"):
        freedict(path, languages=("a", "b"))
    (tmp_path / "words.dict.dz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        freedict(path, languages=("a", "b"))


def test_a_slash_between_spaces_is_no_pronunciation(tmp_path):
    found = freedict(dictionary(tmp_path), max_words=9)
    # "Waren Sie / Warst du da" keeps its slash, which makes it no word, and leaves no half of it.
    assert not any("Waren" in word for word in found.words)
    assert np.unique(found.synset_codes).tolist() == list(range(found.n_synsets))
