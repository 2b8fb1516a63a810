"""Pairs from citations against brute force; splits that leak nothing; readers of graphs."""

import bz2
import gzip
import itertools
import json
import lzma
import shutil
import subprocess
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff.data import citation_graphs
from bakeoff.data.citation_graphs import (
    debian_packages,
    standard_library_graph,
    standard_library_imports,
)
from bakeoff.data.citations import CoCitationPairs, LabelledPairs, read_citations
from bakeoff.data.splits import runs
from bakeoff.errors import DataError


def random_graph(seed, n=60, n_citing=80, domains=("a", "b")):
    rng = np.random.default_rng(seed)
    ids = [f"d{i:02}" for i in range(n)]
    texts = {key: f"text of document {key}" for key in ids}
    references = {
        f"c{row}" if row % 2 else ids[row % n]: rng.choice(ids, rng.integers(0, 6)).tolist()
        for row in range(n_citing)
    }
    domain_of = {key: domains[int(rng.integers(len(domains)))] for key in ids}
    return references, texts, domain_of


def by_brute_force(references, texts, domains, least=1, most=None, longest=None):
    """Return positives and all pairs that somebody cites together."""
    cited = {
        key: {one for one in row if one in texts and one != key} for key, row in references.items()
    }
    often = Counter(one for row in cited.values() for one in row)
    together, anyhow = Counter(), set()
    for row in cited.values():
        for pair in itertools.combinations(sorted(row), 2):
            if domains[pair[0]] != domains[pair[1]]:
                continue
            anyhow.add(pair)
            if longest is None or len(row) <= longest:
                together[pair] += 1
    positives = {
        pair
        for pair, n in together.items()
        if n >= least and (most is None or all(often[one] <= most for one in pair))
    }
    return positives, anyhow


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    least=st.integers(1, 2),
    most=st.sampled_from([None, 4, 8]),
    longest=st.sampled_from([None, 2, 4]),
)
def test_pairs_are_those_of_brute_force(seed, least, most, longest):
    references, texts, domains = random_graph(seed)
    expected, anyhow = by_brute_force(references, texts, domains, least, most, longest)
    options = {"min_cocitations": least, "max_citations": most, "max_references": longest}
    if not expected:
        with pytest.raises(DataError, match="cited together"):
            CoCitationPairs(references, texts, domains=domains, **options)
        return
    pairs = CoCitationPairs(references, texts, domains=domains, **options)
    positives = pairs.positives()
    assert len(positives) == len(set(positives))
    assert set(positives) == expected
    negatives = [tuple(sorted(pair)) for pair in pairs.negatives(seed)]
    assert len(negatives) == len(set(negatives)) <= len(positives)
    assert not set(negatives) & anyhow
    assert all(a != b and domains[a] == domains[b] for a, b in negatives)


def test_negatives_have_the_positives_documents_as_often():
    references, texts, domains = random_graph(3, n=300, n_citing=400)
    pairs = CoCitationPairs(references, texts, domains=domains)
    positives, negatives = pairs.positives(), pairs.negatives(seed=1)
    assert Counter(itertools.chain(*positives)) == Counter(itertools.chain(*negatives))
    assert negatives == pairs.negatives(seed=1) != pairs.negatives(seed=2)
    assert Counter(domains[a] for a, _ in positives) == Counter(domains[a] for a, _ in negatives)


def test_near_copies_are_no_pair_and_equal_texts_are_near_copies():
    references = {"c": ["a1", "a2", "b1", "b2"]}
    texts = {"a1": "one", "a2": "two", "b1": "Three ", "b2": "three"}
    pairs = CoCitationPairs(references, texts, groups={"a1": "a", "a2": "a"})
    assert set(pairs.positives()) == set(itertools.product(("a1", "a2"), ("b1", "b2")))
    assert pairs.negatives(0) == []  # nobody is left to be dealt


def test_labels_are_those_of_any_near_copy():
    # b2 is b1 from another package, and nobody cites it beside a: no reason to call them unrelated.
    references = {"s": ["a", "b1"], "t": ["c", "d"], "u": ["b2", "e"], "v": ["e", "f"]}
    texts = {key: f"text {key}" for key in "acdef"} | {"b1": "the same", "b2": "The  same"}
    pairs = CoCitationPairs(references, texts)
    for seed in range(20):
        found = {frozenset(pair) for pair in pairs.negatives(seed)}
        assert len(found) == 4
        assert not found & {frozenset(pair) for pair in (("a", "b2"), ("b1", "e"), ("b1", "b2"))}
    assert pairs.related(["a", "b1", "b2", "e", "d"]) == {
        ("a", "b1"), ("a", "b2"), ("b1", "b2"), ("b1", "e"), ("b2", "e"),
    }  # fmt: skip


def test_what_is_cited_together_seldom_or_by_many_is_related_all_the_same():
    references = {"s": ["a", "b"], "t": ["a", "b"], "u": ["b", "c"], "long": list("cdef")}
    pairs = CoCitationPairs(
        references, {key: f"text {key}" for key in "abcdef"}, min_cocitations=2, max_references=3
    )
    assert pairs.positives() == [("a", "b")]
    assert pairs.related("abcd") == {("a", "b"), ("b", "c"), ("c", "d")}


def test_groups_differ_by_case():
    texts = {"a": "one", "b": "two"}
    pairs = CoCitationPairs({"c": ["a", "b"]}, texts, groups={"a": "aB", "b": "Ab"})
    assert pairs.positives() == [("a", "b")]


def test_self_references_unknown_ids_and_blank_texts_are_dropped():
    references = {"a": ["a", "b", "c"], "x": ["b", "nowhere", "blank", "b"]}
    texts = {"a": "one", "b": "two", "c": "three", "blank": " \n"}
    assert CoCitationPairs(references, texts).positives() == [("b", "c")]


def split_of(seed=0, **options):
    references, texts, domains = random_graph(7, n=400, n_citing=900)
    pairs = CoCitationPairs(references, texts, domains=domains)
    return pairs, texts, domains, pairs.split(test=0.3, validation=0.2, seed=seed, **options)


def group_columns(group):
    return group.queries, group.positives


def test_no_document_is_in_two_parts():
    pairs, texts, domains, split = split_of()
    key_of = {text: key for key, text in texts.items()}
    parts = {
        "train": [
            (a, b) for group in split.train for a, b in zip(*group_columns(group), strict=True)
        ],
        "validation": list(zip(split.validation.texts_a, split.validation.texts_b, strict=True)),
        "test": list(zip(split.test.texts_a, split.test.texts_b, strict=True)),
    }
    documents = {name: {text for pair in rows for text in pair} for name, rows in parts.items()}
    assert not any(documents[a] & documents[b] for a, b in itertools.combinations(parts, 2))
    assert all(len(rows) > 20 for rows in parts.values())
    positives = set(pairs.positives())
    for name in ("validation", "test"):
        judged = getattr(split, name)
        for row, (a, b) in enumerate(parts[name]):
            found = tuple(sorted((key_of[a], key_of[b])))
            assert (found in positives) == bool(judged.labels[row])
            assert domains[found[0]] == domains[found[1]] == judged.domains[row]
        for domain in split.domains:
            assert judged.of_domain(domain).labels.mean() == 0.5
    # Every positive whose documents are on one side is used.
    inside = sum(
        any({texts[a], texts[b]} <= side for side in documents.values()) for a, b in positives
    )
    used = sum(len(group) for group in split.train)
    used += int(split.validation.labels.sum() + split.test.labels.sum())
    assert used == inside
    assert any(f"{len(positives) - inside} positive pairs left out" in note for note in split.notes)


def test_each_part_has_its_share_of_the_documents():
    references, texts, domains = random_graph(7, n=300, n_citing=4000)  # all are in many pairs
    pairs = CoCitationPairs(references, texts, domains=domains)
    n_documents = len({document for pair in pairs.positives() for document in pair})
    split = pairs.split(test=0.5, validation=0.2)
    for judged, share in ((split.test, 0.5), (split.validation, 0.2)):
        n_judged = len({*judged.texts_a, *judged.texts_b})
        assert n_judged / n_documents == pytest.approx(share, abs=0.02)


def test_a_domain_with_few_negatives_is_balanced_all_the_same():
    # One document cites all, so nearly everything goes together; another knows a few more pairs.
    ids = [f"d{number:02}" for number in range(40)]
    texts = {key: f"text of {key}" for key in ids}
    references = {"most": ids[:36], "few": ids[34:]}
    split = CoCitationPairs(references, texts).split(test=0.4, validation=0.4)
    for judged in (split.test, split.validation):
        assert judged.labels.mean() == 0.5
        documents = {*judged.texts_a, *judged.texts_b}
        assert len(judged) < len(documents) * (len(documents) - 1) / 2


def test_a_split_depends_on_content_and_seed_only():
    references, texts, domains = random_graph(7, n=400, n_citing=900)
    shuffled = dict(reversed(texts.items()))
    again = CoCitationPairs(dict(reversed(references.items())), shuffled, domains=domains)
    first = split_of()[3]
    assert again.split(test=0.3, validation=0.2).fingerprint() == first.fingerprint()
    assert split_of(seed=1)[3].fingerprint() != first.fingerprint()


def test_limits_of_a_split():
    _, _, _, split = split_of(max_pairs=9, max_per_document=2)
    for domain in split.domains:
        assert len(split.test.of_domain(domain)) == 18
    for group in split.train:
        assert max(Counter([*group.queries, *group.positives]).values()) <= 2


def test_groups_stay_on_one_side_and_near_copies_leave_training():
    words = [f"w{i}" for i in range(400)]
    references, texts, domains = random_graph(7, n=200, n_citing=900)
    shared = " ".join(words[:14])
    for number in range(0, 200, 10):
        texts[f"d{number:02}"] += f" {number} {shared}"
    groups = {key: f"source {int(key[1:]) // 2}" for key in texts}
    pairs = CoCitationPairs(references, texts, domains=domains, groups=groups)
    split = pairs.split(test=0.3, validation=0.2)
    key_of = {text: key for key, text in texts.items()}
    sides = [
        {text for group in split.train for text in (*group.queries, *group.positives)},
        {*split.validation.texts_a, *split.validation.texts_b},
        {*split.test.texts_a, *split.test.texts_b},
    ]
    sources = [{groups[key_of[text]] for text in side} for side in sides]
    assert not any(a & b for a, b in itertools.combinations(sources, 2))
    copied = [any(runs(text, 12) for text in side if shared in text) for side in sides]
    assert copied == [False, False, True]
    assert any("12 words in a row" in note for note in split.notes)
    whole = pairs.split(test=0.3, validation=0.2, near_copy_words=100)
    assert sum(map(len, whole.train)) > sum(map(len, split.train))


def test_pairs_with_the_same_texts_count_once():
    references, texts, domains = random_graph(7, n=400, n_citing=900)
    # Each document has a copy, and each citation cites both.
    twin = {key: f"{key}b" for key in texts}
    texts |= {twin[key]: text.upper() for key, text in list(texts.items())}
    domains |= {twin[key]: domain for key, domain in list(domains.items())}
    references = {key: [*cited, *(twin[one] for one in cited)] for key, cited in references.items()}
    split = CoCitationPairs(references, texts, domains=domains).split(test=0.3, validation=0.2)
    rows = [(a, b) for group in split.train for a, b in zip(*group_columns(group), strict=True)]
    for judged in (split.validation, split.test):
        rows += zip(judged.texts_a, judged.texts_b, strict=True)
    pairs = [frozenset((a.lower(), b.lower())) for a, b in rows]
    assert len(pairs) == len(set(pairs)) > 100


def test_a_domain_with_too_few_pairs_is_left_out_and_named():
    references, texts, domains = random_graph(7, n=400, n_citing=900)
    texts |= {"x": "rare text", "y": "another rare one"}
    split = CoCitationPairs(
        {**references, "z": ["x", "y"]}, texts, domains={**domains, "x": "rare", "y": "rare"}
    ).split()
    assert split.domains == ("a", "b")
    assert any("rare (" in note for note in split.notes)


def test_bad_input():
    texts = {"a": "one", "b": "two"}
    for references, message in (
        ({}, "no reference is the id of another of the 2 documents .* like 'a', 'b'"),
        ({"c": ["x", "y"]}, "no reference is the id of another"),
        ({"c": ["a"]}, "citations: no two of the 2 documents with a text are cited together once"),
    ):
        with pytest.raises(DataError, match=message):
            CoCitationPairs(references, texts)
    with pytest.raises(DataError, match="no two of the 0 documents"):
        CoCitationPairs({"c": ["a", "b"]}, {})
    with pytest.raises(DataError, match="must be a sequence of ids, got one string 'ab'"):
        CoCitationPairs({"c": "ab"}, texts)
    with pytest.raises(DataError, match="domains lacks 1 of the 2 documents, first 'b'"):
        CoCitationPairs({"c": ["a", "b"]}, texts, domains={"a": "x"})
    with pytest.raises(DataError, match="max_references must be at least 2, got 1"):
        CoCitationPairs({"c": ["a", "b"]}, texts, max_references=1)
    pairs = CoCitationPairs({"c": ["a", "b"]}, texts)
    with pytest.raises(DataError, match="unknown domain 'x'; there are 'documents'"):
        pairs.positives("x")
    with pytest.raises(DataError, match="'x' is no document with a text"):
        pairs.negatives(0, [("a", "x")])
    two = CoCitationPairs({"c": ["a", "b", "d"]}, {**texts, "d": "three"},
                          domains={"a": "x", "b": "x", "d": "y"})  # fmt: skip
    with pytest.raises(DataError, match="within one domain, got"):
        two.negatives(0, [("a", "d")])
    for option in ("max_pairs", "max_per_document", "near_copy_words"):
        with pytest.raises(DataError, match=f"{option} must be at least 1, got 0"):
            pairs.split(**{option: 0})
    with pytest.raises(DataError, match="together below 1"):
        pairs.split(test=0.6, validation=0.4)
    with pytest.raises(DataError, match="no domain of citations has 2 pairs"):
        pairs.split()
    with pytest.raises(DataError, match="lengths must agree"):
        LabelledPairs(("a",), ("b",), np.array([1, 0]), ("d",))
    with pytest.raises(DataError, match="0 or 1"):
        LabelledPairs(("a",), ("b",), np.array([2]), ("d",))
    with pytest.raises(DataError, match="no pair is of domain 'x'; there are 'd'"):
        LabelledPairs(("a",), ("b",), np.array([1]), ("d",)).of_domain("x")


# --- the user's file --------------------------------------------------------------------------

ROWS = [
    {"id": "1", "abstract": "lungs", "refs": [], "topic": "copd"},
    {"id": "2", "abstract": "airways", "refs": ["1"], "topic": "copd"},
    {"id": "3", "abstract": "a survey", "refs": ["1", "2"], "topic": "copd"},
]


def written(folder, kind):
    path = folder / f"papers.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines = [f"{r['id']},{r['abstract']},{'; '.join(r['refs'])},{r['topic']}" for r in ROWS]
        path.write_text("\n".join(["id,abstract,refs,topic", *lines]))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_files_of_all_kinds_give_one_graph(tmp_path, kind):
    graph = read_citations(written(tmp_path, kind))
    assert graph.references == {"1": [], "2": ["1"], "3": ["1", "2"]}
    assert graph.texts["2"] == "airways"
    assert set(graph.domains.values()) == {"copd"}
    assert graph.pairs().positives() == [("1", "2")]


def test_columns_that_the_first_row_lacks_are_found(tmp_path):
    path = tmp_path / "papers.jsonl"
    survey = {"id": "s", "text": "", "references": ["1", "2"]}
    rows = [survey, *({**row, "text": row["abstract"], "references": row["refs"]} for row in ROWS)]
    rows.append({"id": "4", "text": "of no domain", "references": []})
    path.write_text("\n".join(map(json.dumps, rows)))
    graph = read_citations(path)
    assert graph.domains == {"s": "(none)", "1": "copd", "2": "copd", "3": "copd", "4": "(none)"}
    assert graph.notes[-1] == "1 text without a domain: their domain is (none)."


def test_what_a_reader_of_a_graph_must_know_is_noted(tmp_path):
    path = tmp_path / "papers.csv"
    path.write_text("ID,abstract,references\n1,a,\n2,b,\n3,,1;2;x;y\n")
    assert read_citations(path).notes == (
        "papers.csv: 3 documents, 2 of them cited; id from column 'ID', text from column "
        "'abstract', references from column 'references'.",
        "2 ids referred to and not in the file, first 'x'.",
        "1 document without a text: in no pair, but they may cite.",
        "No column for the domain: all texts are one domain. Name yours with "
        "columns={'domain': ...}, or --column domain=NAME on the command line.",
    )
    path.write_text("id,text,references\nd1,a,\nd2,b,\nd3,c,1;2\n")
    with pytest.raises(DataError, match="papers: no reference is the id of another of the 3 doc"):
        read_citations(path).pairs()


def test_named_columns_json_lists_and_integers(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('n,words,out\n1,lungs,\n2,airways,"[1, 3]"\n3,skin,1 2\n4,more,"[""1"",3]"\n')
    graph = read_citations(path, columns={"id": "n", "text": "words", "references": "out"})
    assert graph.references["2"] == ["1", "3"]
    assert graph.references["4"] == ["1", "3"]
    assert graph.pairs(min_cocitations=2).positives() == [("1", "3")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_that_comes_again_is_left_out_with_a_note(tmp_path, kind):
    rows = [
        {"id": "1", "text": "lungs", "references": []},
        {"id": "2", "text": "airways", "references": []},
        {"id": "3", "text": "a survey", "references": ["1", "2"]},
    ]
    rows += [rows[2], rows[0]]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    graph = read_citations(path)
    assert list(graph.texts) == ["1", "2", "3"]
    assert "2 rows left out: the same as an earlier one." in graph.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n", "no column for 'references'. Columns found: 'id', 'text'"),
        ("id,text\n1,a\n", "or --column references=NAME on the command line"),
        ("id,text,references\n", "the file has no row"),
        ("id,text,references\n1,a,\n1,b,\n", "line 3: id '1' comes a second time with other"),
        ("id,text,references\n ,a,\n", "must hold an id"),
        ('id,text,references\n1,a,"[1"\n', "is not a JSON list"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_citations(path)
    assert message in str(caught.value)


def test_unknown_roles_and_columns(tmp_path):
    path = written(tmp_path, "csv")
    with pytest.raises(DataError, match="unknown role 'texts'"):
        read_citations(path, columns={"texts": "abstract"})
    with pytest.raises(DataError, match="no column 'body' for role 'text'"):
        read_citations(path, columns={"text": "body"})


# --- Debian -----------------------------------------------------------------------------------

PACKAGES = """\
Package: app
Version: 2
Depends: liba1 (>= 1.0), libb:any | libb-alternative, libc6
Pre-Depends: tool-x [amd64]
Section: games
Description: An app that uses libraries
Description-md5: 0001

Package: app
Version: 1
Depends: other
Section: games
Description: The older version of an app

Package: liba1
Source: srca (1.0)
Section: contrib/libs
Description: Library of the first letter
 It goes on in a second line.
 .
 And a third paragraph.

Package: libb
Section: libs
Description: Library of the second letter
Description-md5: 0002

Package: libold
Section: libs
Depends: liba1
Description: transitional dummy package of old times

Package: tool-x
Section: libs
Description: Tool that others need at once
"""
TRANSLATION = """\
Package: libb
Description-md5: 0002
Description-en: Library of the second letter
 With the long text.
"""


@pytest.mark.parametrize(
    "kind", ["", ".gz", ".xz", ".bz2", *([".lz4"] if shutil.which("lz4") else [])]
)
def test_debian_index_however_compressed(tmp_path, kind):
    path = tmp_path / f"Packages{kind}"
    plain = tmp_path / "plain"
    plain.write_text(PACKAGES)
    if kind == ".lz4":
        subprocess.run(["lz4", "-q", str(plain), str(path)], check=True)
    else:
        opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(kind, open)
        with opener(path, "wt") as stream:
            stream.write(PACKAGES)
    graph = debian_packages(path)
    assert graph.references["app"] == ["liba1", "libb", "libc6", "tool-x"]
    assert graph.texts["liba1"].split("\n") == [
        "Library of the first letter",
        "It goes on in a second line.",
        "",
        "And a third paragraph.",
    ]
    assert graph.domains == {"app": "games", "liba1": "libs", "libb": "libs", "tool-x": "libs"}
    assert graph.groups["liba1"] == "srca"
    assert "libold" not in graph.texts
    assert set(graph.pairs().positives()) == set(
        itertools.combinations(("liba1", "libb", "tool-x"), 2)
    )


def test_long_descriptions_come_from_the_translation(tmp_path):
    index, translation = tmp_path / "Packages", tmp_path / "Translation-en"
    index.write_text(PACKAGES)
    translation.write_text(TRANSLATION)
    assert any("one line long" in note for note in debian_packages(index).notes)
    graph = debian_packages(index, translation=translation, sections=["libs"])
    assert graph.texts["libb"] == "Library of the second letter\nWith the long text."
    assert "app" not in graph.texts
    assert graph.references["app"]  # it still cites
    assert not any("one line long" in note for note in graph.notes)


def test_debian_troubles(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        debian_packages(tmp_path / "Packages")
    broken = tmp_path / "Packages.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"Packages\.gz: cannot be read"):
        debian_packages(broken)
    whole = gzip.compress(PACKAGES.encode() * 100)
    broken.write_bytes(whole[:60] + bytes(40) + whole[100:])  # damaged in the middle
    with pytest.raises(DataError, match=r"Packages\.gz: cannot be read"):
        debian_packages(broken)
    empty = tmp_path / "Packages"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no packages"):
        debian_packages(empty)
    empty.write_text(PACKAGES)
    with pytest.raises(DataError, match="no section 'nowhere'; there are 'games', 'libs'"):
        debian_packages(empty, sections=["nowhere"])
    monkeypatch.setattr(citation_graphs.shutil, "which", lambda tool: None)
    with pytest.raises(DataError, match="no apt-cache on this machine"):
        debian_packages()


def test_a_translation_that_cannot_be_read_is_not_taken(tmp_path, monkeypatch):
    tool = tmp_path / "apt-cache"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{PACKAGES}END\n")
    tool.chmod(0o755)
    (tmp_path / "x_main_i18n_Translation-en.lz4").write_bytes(b"")
    monkeypatch.setattr(citation_graphs, "_APT_LISTS", tmp_path)
    monkeypatch.setattr(citation_graphs.shutil, "which", lambda tool: tool == "apt-cache" or None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "liba1" in debian_packages().texts
    (tmp_path / "y_main_i18n_Translation-en").write_text(TRANSLATION)
    assert "With the long text." in debian_packages().texts["libb"]


def test_what_a_tool_complains_of_is_told(tmp_path, monkeypatch):
    tool = tmp_path / "apt-cache"
    tool.write_text("#!/bin/sh\necho 'E: broken lists' >&2\nexit 100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match="apt-cache dumpavail failed: E: broken lists"):
        debian_packages()


# --- the standard library ---------------------------------------------------------------------

SOURCES = {
    "pkg/__init__.py": (
        '"""A package with a docstring of several words in it."""\nfrom . import low\n'
    ),
    "pkg/low.py": (
        '"""The lower module, which all the others import for what it has."""\n'
        "import json\n"
        "class Base:\n"
        '    """Holds what the others share."""\n'
        "    def one(self):\n"
        '        """Do the first of the steps.\n\n        More.\n        """\n'
        "    def two(self):\n"
        '        """Do the second of the steps."""\n'
        "    def both(self):\n"
        "        self.one()\n"
        "        return self.two() or json.loads\n"
        "def helper(x):\n"
        '    """Help with x, whatever it is."""\n'
        "if True:\n"
        "    def chosen():\n"
        '        """Run where the platform allows it."""\n'
    ),
    "json.py": 'def loads(text):\n    """Read the text of a document."""\n',
    "user.py": (
        "from pkg.low import Base as B, helper\n"
        "from pkg import low\n"
        "import json as j\n"
        "def use():\n"
        "    j.loads(helper(B()))\n"
        "    low.chosen()\n"
    ),
}


@pytest.fixture
def small_library(monkeypatch):
    monkeypatch.setattr("bakeoff.data.embedded.standard_library_modules", lambda: SOURCES)
    citation_graphs._standard_library.cache_clear()
    yield
    citation_graphs._standard_library.cache_clear()


@pytest.mark.usefixtures("small_library")
def test_names_in_a_function_are_resolved():
    graph = standard_library_graph()
    assert graph.texts["pkg.low.Base.one"] == "Do the first of the steps."
    assert graph.references["pkg.low.Base.both"] == [
        "json.loads",
        "pkg.low.Base.one",
        "pkg.low.Base.two",
    ]
    assert graph.references["user.use"] == [
        "json.loads",
        "pkg.low.Base",
        "pkg.low.chosen",
        "pkg.low.helper",
    ]
    assert graph.domains["json.loads"] == "text and data formats"


@pytest.mark.usefixtures("small_library")
def test_areas_of_the_library_are_read_by_themselves():
    graph = standard_library_graph(areas=["text and data formats"])
    assert list(graph.texts) == ["json.loads"]
    with pytest.raises(DataError, match="unknown area 'poetry'; there are 'text and data formats'"):
        standard_library_graph(areas=("poetry",))


@pytest.mark.usefixtures("small_library")
def test_modules_that_import_modules():
    graph = standard_library_imports()
    assert graph.references["pkg"] == ["pkg.low"]
    assert graph.references["user"] == ["json", "pkg.low"]
    assert set(graph.texts) == {"pkg", "pkg.low"}
    assert graph.groups == {"pkg": "pkg", "pkg.low": "pkg"}


def test_the_running_librarys_graph_can_be_split():
    split = standard_library_graph().pairs(max_citations=40).split(test=0.3, validation=0.15)
    assert len(split.domains) == 5
    assert sum(map(len, split.train)) > 800
    assert min(len(split.test.of_domain(domain)) for domain in split.domains) > 20
