"""Methods are found without importing them, and bad declarations are refused."""

import pytest

from bakeoff._methods import find_methods

GOOD = """
METHOD = {
    "slug": "a-method",
    "title": "T",
    "paper": "P",
    "designs": ["d"],
    "names": ["N"],
}
raise RuntimeError("parsed, never run")
"""


def declare(tmp_path, **files):
    (tmp_path / "family").mkdir()
    for name, text in files.items():
        (tmp_path / "family" / f"{name}.py").write_text(text)
    return tmp_path


def test_a_declaration_is_read_without_running_the_file(tmp_path):
    (found,) = find_methods(declare(tmp_path, one=GOOD, two="x = 1\n"))
    assert (found.slug, found.family, found.designs) == ("a-method", "family", ("d",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace('"title": "T",', ""), "must be a dict with slug, title.*'title'"),
        ("x = 1\nMETHOD = dict(slug='a')\n", "must be a literal dict"),
        ("x = 1\nMETHOD = ['a']\n", "must be a dict, got list"),
    ],
)
def test_a_bad_declaration_names_its_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"one\.py: METHOD {message}"):
        find_methods(declare(tmp_path, one=text))


def test_a_slug_is_declared_once(tmp_path):
    with pytest.raises(ValueError, match=r"'a-method' is declared twice"):
        find_methods(declare(tmp_path, one=GOOD, two=GOOD))


def test_the_shelf_is_what_has_claims():
    from bakeoff.claims.claim import claim_slugs

    assert sorted(method.slug for method in find_methods()) == claim_slugs()
