"""`bakeoff run embedding --question words`: from a file of words to a winner. About 10 s."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from rich.console import Console
from tests.embedding.small_models import WORDS as LETTERS
from tests.embedding.small_models import backbone_folder

from bakeoff.cli.run import Options
from bakeoff.cli.run_embedding_words import contest
from bakeoff.errors import DataError
from bakeoff.study import Study

COLUMNS = {"word": "naming", "synset": "entry"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny model, words in four languages, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("run-words")
    backbone_folder(made / "model")
    terms = [" ".join(some) for some in product(LETTERS[:12], repeat=2)]
    rng = np.random.default_rng(0)
    lines = ["entry\tnaming\tlang"]
    for language in ("en", "fr", "de", "it"):
        order = rng.permutation(len(terms))[:40]
        lines += [f"s{i}\t{terms[place]}\t{language}" for i, place in enumerate(order)]
    (made / "words.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def options(folder, **given):
    usual = {"data": (folder / "words.tsv",), "columns": COLUMNS, "base": str(folder / "model")}
    return Options(**{**usual, **given})


def test_a_contest_runs_and_its_winner_leaves(folder, tmp_path):
    given = options(folder, designs="raw,character n-grams,lexical-adapter", steps=2, batch_size=4)
    found = contest(given, Console(quiet=True))
    assert [design.name for design in found.chosen] == [
        "raw",
        "character n-grams",
        "specialised, adapter",
    ]
    assert (found.problem.steps, found.problem.batch_size) == (2, 4)
    assert found.simplest[0] == "raw"
    study = Study(found.problem, found.chosen, reference="raw", seeds=2, directory=tmp_path / "out")
    results = study.run()
    assert not results.data["failures"]
    assert next(iter(results.data["metrics"])) == "mrr"
    design = next(one for one in found.chosen if one.name == results.winner)
    destination = tmp_path / "winner"
    assert found.problem.export(design, results.winner_artifact, destination) is False
    made = {}
    exec("\n".join(found.usage(destination, False)), made)
    assert made["vectors"].shape[0] == 1


def test_one_design_per_idea_unless_asked(folder, capsys):
    found = contest(options(folder, learning_rate=0.002), Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "languages held out: " in said
    assert "left out: specialised, SupCon; specialised, CSLS; specialised, mean of layers" in said
    assert "specialised, full" in [design.name for design in found.chosen]
    assert "specialised, SupCon" not in [design.name for design in found.chosen]
    assert found.problem.learning_rate == 0.002
    assert found.name == "words: words.tsv"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "lora"}, "--train makes no difference to words"),
        ({"max_length": 8}, "--max-length makes no difference to words"),
        ({"designs": "best"}, "there are: specialised, full; specialised, adapter"),
        ({"columns": {"answer": "x"}}, "words have columns synset, word, language, gloss, got"),
        ({"columns": {**COLUMNS, "word": "x"}}, "no column.* the file has"),
        ({"data": ("a.tsv", "b.tsv")}, "--data takes one file with a word a row, got 2"),
        ({"data": ()}, "--column needs --data"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, given, message):
    with pytest.raises(DataError, match=message):
        contest(options(folder, **given), Console(quiet=True))


def test_without_data_the_size_decides(folder):
    found = contest(options(folder, data=(), columns={}, size="smoke"), Console(quiet=True))
    assert found.problem.setting.held_out_languages == ("nl",)
    assert found.problem.setting.pivot == "en"


def test_pivot_and_languages_held_out_are_the_users(folder):
    found = contest(options(folder), Console(quiet=True)).problem.setting
    language = found.held_out_languages[0]
    other = next(one for one in found.words.all_languages if one not in (found.pivot, language))
    asked = contest(options(folder, pivot=language, held_out=(other,)), Console(quiet=True))
    assert asked.problem.setting.pivot == language
    assert asked.problem.setting.held_out_languages == (other,)
    for given in ({"pivot": "xx"}, {"held_out": ("xx",)}):
        with pytest.raises(DataError, match="xx"):
            contest(options(folder, **given), Console(quiet=True))
