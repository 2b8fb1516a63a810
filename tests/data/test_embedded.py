"""The embedded default: right text, right size, no leaks (about 12 s, mostly parsing)."""

import ast
import re
import sysconfig
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from bakeoff.data import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    SimilarityTask,
    embedded,
    embedded_default,
    task_texts,
)
from bakeoff.data.embedded import (
    HELD_OUT_PACKAGES,
    HELD_OUT_TOPICS,
    manual_paragraphs,
    standard_library_pairs,
)
from bakeoff.data.splits import normalise
from bakeoff.errors import DataError, FetchError

# --- the running Python -----------------------------------------------------------------------


def test_the_standard_library_gives_thousands_of_distinct_pairs():
    pairs = standard_library_pairs()
    assert len(pairs) > 3500
    assert len({normalise(pair.docstring) for pair in pairs}) == len(pairs)
    assert len({normalise(pair.code) for pair in pairs}) == len(pairs)
    assert not any("test" in pair.module.split("/") for pair in pairs)
    assert not any("site-packages" in pair.module for pair in pairs)


def test_pairs_are_what_the_parser_says_they_are():
    # Oracle: the syntax tree of the extracted text equals the tree of a function of that module
    # without its docstring.
    stdlib = Path(sysconfig.get_path("stdlib"))
    pairs_of = defaultdict(list)
    for pair in standard_library_pairs():
        pairs_of[pair.module].append(pair)
    n_checked = n_skipped = 0
    for module in [*pairs_of][::7]:
        bodies = {
            ast.dump(ast.Module(node.body[1:], []))
            for node in ast.walk(ast.parse((stdlib / module).read_bytes()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for pair in pairs_of[module]:
            if re.search(r"\"\"\"|'''|\\\n", pair.code):
                n_skipped += 1  # text over several lines loses its margin: not comparable
                continue
            body = ast.parse("async def f():\n" + textwrap.indent(pair.code, " ")).body[0].body
            assert ast.dump(ast.Module(body, [])) in bodies, (module, pair.docstring)
            n_checked += 1
    assert n_checked > 300
    assert n_skipped < 0.1 * n_checked


def test_odd_line_ends_and_one_line_functions_do_not_shift_the_code():
    source = (
        "x = 1\n\f\ny = 'a\u2028b\x85c\x1cd'\n"
        'async def f():\n    """First\n    line.\n\n    Rest."""\n    # why\n    return y\n'
        "def g(): 'One line.'; return 2\n"
        "class C:\n    def h(self):\n        'Inner.'\n        if self:\n            return 3\n"
        "def without(): return 4\n"
    )
    found = dict(embedded._documented_functions(source))
    assert found["First line."] == "# why\nreturn y"
    assert found["Inner."] == "if self:\n    return 3"
    assert found.get("One line.", "") == ""
    assert len(found) == 3


def test_first_paragraphs_agree_with_the_living_functions():
    import inspect
    import textwrap as living

    expected = {
        " ".join(re.split(r"\n\s*\n", inspect.getdoc(function))[0].split())
        for function in (living.dedent, living.fill, living.wrap, living.shorten)
    }
    found = {pair.docstring for pair in standard_library_pairs() if pair.module == "textwrap.py"}
    assert expected <= found


def test_each_held_out_package_is_large_enough_for_three_tasks():
    sizes = Counter(pair.package for pair in standard_library_pairs())
    assert {package: sizes[package] for package in HELD_OUT_PACKAGES if sizes[package] < 50} == {}


def test_manual_paragraphs_belong_to_one_topic_each():
    topics = manual_paragraphs()
    paragraphs = [normalise(text) for texts in topics.values() for text in texts]
    assert len(set(paragraphs)) == len(paragraphs) > 600
    assert all(len(topics[topic]) >= 10 for topic in HELD_OUT_TOPICS)
    everything = " ".join(paragraphs)
    assert "::=" not in everything
    assert ">>>" not in everything


def test_an_unknown_size_is_named():
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'big'"):
        embedded_default("big")


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no source of its standard library"):
        embedded.standard_library_modules.__wrapped__()


# --- fetching, with a stand-in for pip ----------------------------------------------------------


@pytest.fixture
def wheel_of(monkeypatch, tmp_path):
    """Replace the download by a wheel with given content; return how often it was fetched."""
    import zipfile

    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    fetched = []

    def use(contents):
        def fetch(requirement, expected, directory, *, for_platform):
            fetched.append(requirement)
            directory.mkdir(parents=True, exist_ok=True)
            wheel = directory / "stand-in.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in contents.items():
                    archive.writestr(f"gensim/test/test_data/{name}", content)
            return wheel

        import hashlib

        monkeypatch.setattr(embedded, "fetch_wheel", fetch)
        monkeypatch.setattr(
            embedded,
            "_FILE_SHA256",
            {name: hashlib.sha256(name.encode()).hexdigest() for name in contents},
        )
        return fetched

    return use


def test_files_are_fetched_once_kept_whole_and_mended(wheel_of):
    fetched = wheel_of({"one.txt": "one.txt", "two.txt": "two.txt"})
    assert not embedded.embedded_is_present()
    folder = embedded.fetch_embedded()
    assert {path.name for path in folder.iterdir()} == {"one.txt", "two.txt"}  # no wheel left
    assert embedded.fetch_embedded() == folder
    assert len(fetched) == 1
    (folder / "one.txt").write_text("damaged")
    assert not embedded.embedded_is_present()
    embedded.fetch_embedded()
    assert (folder / "one.txt").read_text() == "one.txt"
    assert len(fetched) == 2


def test_a_file_that_is_not_the_recorded_one_is_not_kept(wheel_of, tmp_path):
    wheel_of({"one.txt": "one.txt", "two.txt": "something else"})
    with pytest.raises(FetchError, match=r"two.txt in gensim==4.4.0 is not the recorded file"):
        embedded.fetch_embedded()
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left == {"one.txt"}


# --- the whole --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes():
    return {size: embedded_default(size) for size in ("smoke", "demo", "full")}


def task(data, name):
    return next(task for task in data.tasks if task.name == name)


needs_fetched_files = pytest.mark.model


@needs_fetched_files
def test_sizes_keep_their_budgets(sizes):
    assert len(sizes["smoke"].texts()) <= 250
    assert 3500 <= len(sizes["demo"].texts()) <= 4500
    assert len(sizes["full"].texts()) > 8000
    # A rough bound on tokens that needs no tokenizer: English and Python have over 2.4 characters
    # a token, and 96 tokens are the most that the demo reads of a text.
    tokens = sum(min(96, len(text) / 2.4) for text in sizes["demo"].texts())
    assert tokens < 220_000


@needs_fetched_files
def test_all_four_families_are_there_in_every_size(sizes):
    families = (RetrievalTask, SimilarityTask, ClusteringTask, ClassificationTask)
    for data in sizes.values():
        assert {type(task) for task in data.tasks} == set(families)
        assert data.train
        assert data.train[0].group == "code"
    assert len(sizes["demo"].tasks) == len(sizes["full"].tasks) == 9
    assert [group.group for group in sizes["demo"].train] == ["code", "manual", "news"]


@needs_fetched_files
@pytest.mark.parametrize("size", ["smoke", "demo", "full"])
def test_no_task_text_and_no_long_piece_of_one_is_trained_on(sizes, size):
    data = sizes[size]

    def words(text):
        return re.findall(r"\w+", text.casefold())

    held_out_texts = {normalise(text) for task in data.tasks for text in task_texts(task)}
    pieces = {
        tuple(found[i : i + 12])
        for text in held_out_texts
        for found in [words(text)]
        for i in range(len(found) - 11)
    }
    for group in data.train:
        for text in (*group.queries, *group.positives):
            assert normalise(text) not in held_out_texts
            found = words(normalise(text))
            assert not any(tuple(found[i : i + 12]) in pieces for i in range(len(found) - 11))


@needs_fetched_files
@pytest.mark.parametrize("size", ["smoke", "demo", "full"])
def test_standard_library_tasks_and_training_share_no_module(sizes, size):
    data = sizes[size]
    module_of = {pair.code: pair.module for pair in standard_library_pairs()}
    package_of = {pair.code: pair.package for pair in standard_library_pairs()}
    searched = task(data, "docstring to code").documents
    judged = task(data, "code by package").test_texts
    trained = data.train[0].positives
    assert {module_of[code] for code in trained}.isdisjoint(
        module_of[code] for code in (*searched, *judged)
    )
    used = {package_of[code] for code in (*searched, *judged)}
    assert used == set(HELD_OUT_PACKAGES[:4] if size == "smoke" else HELD_OUT_PACKAGES)
    assert {package_of[code] for code in trained}.isdisjoint(HELD_OUT_PACKAGES)


@needs_fetched_files
def test_no_function_is_judged_in_two_tasks(sizes):
    data = sizes["full"]
    code_of = {pair.docstring: pair.code for pair in standard_library_pairs()}
    judged = [
        {code_of[text] for text in task(data, "docstring to code").queries},
        {code_of[text] for text in task(data, "docstrings by package").texts},
        set(task(data, "code by package").test_texts),
    ]
    assert sum(map(len, judged)) == len(set().union(*judged))


@needs_fetched_files
def test_every_query_finds_its_own_code(sizes):
    code_of = {pair.docstring: pair.code for pair in standard_library_pairs()}
    retrieval = task(sizes["demo"], "docstring to code")
    assert len(retrieval.queries) == 240
    for query, relevant in zip(retrieval.queries, retrieval.relevant, strict=True):
        assert retrieval.documents[relevant] == code_of[query]


@needs_fetched_files
def test_human_judgements_are_those_of_the_collections(sizes):
    data = sizes["full"]
    lee = task(data, "Lee documents")
    assert len(lee.scores) == 50 * 49 // 2
    assert len(set(task_texts(lee))) == 50
    # Similarity of the first two documents as the matrix file has it, and known extremes.
    assert lee.scores[0] == pytest.approx(0.3)
    assert 0.2 <= lee.scores.min() < lee.scores.max() <= 1
    simlex = task(data, "SimLex-999")
    assert len(simlex.scores) == 999
    scores = dict(zip(zip(simlex.texts_a, simlex.texts_b, strict=True), simlex.scores, strict=True))
    assert scores["old", "new"] == 1.58
    assert scores["smart", "intelligent"] == 9.2
    wordsim = task(data, "WordSim-353")
    assert len(wordsim.scores) == 353
    assert wordsim.scores[wordsim.texts_a.index("tiger")] == 7.35


@needs_fetched_files
def test_news_are_split_at_the_first_sentence_and_not_repeated(sizes):
    news = task(sizes["full"], "news lead to article")
    source = embedded._read("lee_background.cor", "utf-8")
    for lead, relevant in zip(news.queries, news.relevant, strict=True):
        article = news.documents[relevant]
        assert re.search(re.escape(lead) + r"\s+" + re.escape(article), source)
        assert lead[-1] in ".!?"
    assert len(set(news.queries)) == len(news.queries) >= 120


@needs_fetched_files
def test_film_snippets_are_balanced(sizes):
    films = task(sizes["demo"], "film snippets")
    for labels in (films.train_labels, films.test_labels):
        assert Counter(labels) == {"neg": 50, "pos": 50}


@needs_fetched_files
def test_another_seed_gives_another_sample_and_the_same_seed_the_same(sizes):
    assert embedded_default("smoke").fingerprint() == sizes["smoke"].fingerprint()
    assert embedded_default("smoke", seed=1).fingerprint() != sizes["smoke"].fingerprint()


@needs_fetched_files
def test_notes_say_which_python_the_text_is_from(sizes):
    import platform

    assert platform.python_version() in sizes["demo"].notes[0]


@needs_fetched_files
def test_words_alone_predict_the_labels_better_than_chance(sizes):
    # If labels were shuffled or texts empty, no method could do well: a bag of words must learn.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    code = task(sizes["full"], "code by package")
    vectors = TfidfVectorizer(token_pattern=r"\w+")
    model = LogisticRegression(C=10).fit(vectors.fit_transform(code.train_texts), code.train_labels)
    accuracy = model.score(vectors.transform(code.test_texts), code.test_labels)
    assert accuracy > 3 / len(set(code.test_labels))
    assert np.isfinite(accuracy)
