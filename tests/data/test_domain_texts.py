"""Domains are split by whole texts, nothing judged on is trained on, and files become domains."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeoff.data.domain_texts import (
    DomainTexts,
    default_domains,
    pieces,
    read_domains,
    split_domains,
)
from bakeoff.data.encyclopedia import encyclopedia_pages, prose
from bakeoff.data.splits import runs
from bakeoff.errors import DataError


def paragraphs(name, n=30):
    return [
        "\n\n".join(
            f"{name} {i} {j} " + " ".join(f"{name}{i}x{j}y{k}" for k in range(40)) for j in range(4)
        )
        for i in range(n)
    ]


def test_held_out_texts_are_whole_texts_that_training_has_no_part_of():
    texts = {"a": paragraphs("a"), "b": paragraphs("b", 10)}
    split = split_domains(texts, share=0.2)
    assert split.domains == ("a", "b")
    assert [len(split.training[name]) for name in split.domains] == [24, 8]
    for name in split.domains:
        aside = set(texts[name]) - set(split.training[name])
        assert {piece for text in aside for piece in pieces(text)} == set(split.held_out[name])
        trained = {run for text in split.training[name] for run in runs(text, 12)}
        assert all(trained.isdisjoint(runs(text, 12)) for text in split.held_out[name])


def test_the_split_goes_by_content_not_by_order():
    texts = paragraphs("a")
    one = split_domains({"a": texts})
    other = split_domains({"a": texts[::-1]})
    assert set(one.held_out["a"]) == set(other.held_out["a"])
    assert one.fingerprint() != split_domains({"b": texts}).fingerprint()


def test_what_copies_a_held_out_document_is_not_trained_on():
    texts = paragraphs("a")
    aside = split_domains({"a": texts}).held_out["a"][0]
    copied = f"Something before it. {aside} And something after it."
    split = split_domains({"a": texts}, held_out={"a": [aside]})
    with_copy = split_domains({"a": [*texts, copied]}, held_out={"a": [aside]})
    assert with_copy.training == split.training
    assert "12 words in a row" in with_copy.notes[0]


def test_what_another_domain_is_judged_by_is_not_trained_on():
    texts = {"a": paragraphs("a"), "b": paragraphs("b")}
    alone = split_domains(texts)
    whole = next(text for text in texts["a"] if text not in alone.training["a"])
    part = f"Quoted from elsewhere: {alone.held_out['a'][0]}"
    both = split_domains({**texts, "b": [*texts["b"], whole, part]}, share=5 / 32)
    assert {whole, part}.isdisjoint(both.training["b"])
    trained = {run for some in both.training.values() for text in some for run in runs(text, 12)}
    judged = [text for some in both.held_out.values() for text in some]
    assert all(trained.isdisjoint(runs(text, 12)) for text in judged)
    assert any("left out of training" in note for note in both.notes)


LICENCE = "\n".join(f"Line {i} of a licence at the top of each of these files." for i in range(6))


def test_a_licence_at_the_top_of_every_file_is_no_copy():
    plain = paragraphs("a", 60)
    licensed = [f"{LICENCE}\n\n{text}" for text in plain[:58]] + plain[58:]
    aside = [licensed[0]]
    copied = f"{LICENCE}\n\nIn another file: {plain[0]}"
    split = split_domains({"a": [*licensed[1:], copied]}, held_out={"a": aside})
    assert set(split.training["a"]) == set(licensed[1:])
    assert split.notes == (
        "a: 1 text left out of training, with 12 words in a row from a held-out document (words "
        "that many texts share were not counted).",
    )


def test_where_every_text_copies_the_notes_say_so():
    texts = [f"{LICENCE}\n\nNumber {i}" for i in range(4)]
    split = split_domains({"a": texts}, share=0.25)
    assert len(split.training["a"]) == 3
    assert "every text has 12 words in a row" in split.notes[0]
    assert "only whole copies were left out" in split.notes[0]


def test_limits_of_characters_and_documents():
    split = split_domains({"a": paragraphs("a", 60)}, max_characters=5000, max_held_out=3)
    assert sum(map(len, split.training["a"])) == 5000
    assert len(split.held_out["a"]) == 3


@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_pieces_are_short_enough_and_lose_only_blanks_and_stubs(text, longest):
    found = pieces(text, longest)
    assert all(len(piece) <= longest for piece in found)
    assert bool(found) == bool(text.strip())
    rest = "".join(text.split())
    for piece in found:  # in order, letters unchanged
        letters = "".join(piece.split())
        assert letters in rest
        rest = rest[rest.index(letters) + len(letters) :]


def test_pieces_keep_everything_of_a_long_text():
    text = paragraphs("a", 1)[0] * 5
    assert "".join("".join(pieces(text, 700)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": {"a": ["one"]}}, "domain 'a' has 1 distinct text: at least 2"),
        ({"texts": {"a": ["x", "y"]}, "share": 1.0}, "share must be between 0 and 1, got 1.0"),
        ({"texts": {"a": ["x", "y"]}, "held_out": {"b": ["z"]}}, "must have the domains a, got b"),
        ({"texts": {}}, "at least one domain"),
    ],
)
def test_bad_splits_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        split_domains(**arguments)


def test_domains_must_agree_and_hold_something():
    with pytest.raises(DataError, match="must be the same"):
        DomainTexts("x", {"a": ("t",)}, {"b": ("t",)})
    with pytest.raises(DataError, match="held_out: domain 'a' has no text"):
        DomainTexts("x", {"a": ("t",)}, {"a": ()})


def test_files_folders_and_tables_become_domains(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    for i in range(3):
        (code / f"m{i}.py").write_text(f"x = {i}\n")
    rows = [{"text": f"ticket {i}"} for i in range(5)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs("b", 8)))
    texts, notes = read_domains(
        [f"code={code}", tmp_path / "tickets.jsonl", f"prose={tmp_path / 'book.txt'}"]
    )
    assert list(texts) == ["code", "tickets", "prose"]
    assert [len(texts["code"]), len(texts["tickets"])] == [3, 5]
    assert len(texts["prose"]) > 5  # one file is cut, so that some of it can be held out
    assert notes == ()


def test_names_of_folders_are_whole_and_tildes_are_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for folder in ("api.v1", "api.v2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(f"# {folder}\n")
    (tmp_path / "notes.txt").write_text("a note")
    texts, _ = read_domains([tmp_path / "api.v1", "~/api.v2", "mine=~/notes.txt", "~/notes.txt"])
    assert list(texts) == ["api.v1", "api.v2", "mine", "notes"]
    monkeypatch.chdir(tmp_path / "api.v1")
    assert list(read_domains(["."])[0]) == ["api.v1"]


@pytest.mark.parametrize("sources", [[], ["=x"], ["name="], ["name=does-not-exist"]])
def test_bad_sources_are_refused(sources):
    with pytest.raises(DataError):
        read_domains(sources)


def test_default_domains_are_three_real_ones():
    texts = default_domains("smoke")
    assert texts.domains == ("python", "english", "bulgarian")
    assert all(sum(map(len, some)) == 60_000 for some in texts.training.values())
    assert [len(some) for some in texts.held_out.values()] == [8, 8, 8]
    cyrillic = [
        sum("а" <= c.lower() <= "я" for c in t) / len(t) for t in texts.held_out["bulgarian"]
    ]
    assert min(cyrillic) > 0.4
    assert any("def " in text for text in texts.held_out["python"])
    with pytest.raises(DataError, match="size must be one of 'smoke', 'demo', 'full', got 'big'"):
        default_domains("big")


def test_markup_is_gone_from_the_encyclopedia():
    for language, least in (("en", 90), ("bg", 60)):
        pages = encyclopedia_pages(language)
        assert len(pages) >= least
        text = "\n".join(pages)
        for mark in ("{{", "}}", "[[", "]]", "<ref", "'''"):
            # Unbalanced markup of the source may leave some behind, in one page of many.
            assert text.count(mark) <= len(pages) / 10, mark


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        (
            "{| class=x\n| cell of a table. It goes.\n|}\nThis sentence of five words stays.",
            "This sentence of five words stays.",
        ),
        (
            "[[File:a.jpg|thumb|A [[link]] here.]]It is the text around it.",
            "It is the text around it.",
        ),
        (
            "A [https://example.org good link] and <b>bold</b> words here.",
            "A good link and bold words here.",
        ),
        ("== A heading of some five words. ==\nToo short.\nNo full stop in this line", ""),
        ("<!-- one\ntwo -->The &nbsp;end of it all is near.", "The  end of it all is near."),
    ],
)
def test_prose_of_wikitext(wikitext, expected):
    assert prose(wikitext) == expected
