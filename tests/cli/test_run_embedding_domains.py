"""`bakeoff run embedding --question domains` as a user meets it: citations in, one encoder out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.embedding.tiny_domains import DOMAINS, save_encoder, write_graph

from bakeoff.cli import run as command
from bakeoff.cli.run import Options
from bakeoff.cli.run_embedding_domains import contest, is_package_index
from bakeoff.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """An encoder, a file of citations, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("run-domains")
    save_encoder(made)
    write_graph(made / "papers.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def options(folder, **changes):
    given = {
        "data": (folder / "papers.jsonl",),
        "base": str(folder / "encoder"),
        "question": "domains",
        "steps": 2,
        "batch_size": 4,
        "max_length": 12,
        "learning_rate": 1e-3,
    }
    return Options(**{**given, **changes})


def test_a_file_of_citations_becomes_a_contest(folder, capsys):
    found = contest(options(folder, layers=2), Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "papers.jsonl: " in said
    assert "left out: domain experts, wrong domain; domain experts, batches by domain" in said
    assert [design.name for design in found.chosen][:2] == [
        "domain experts",
        "domain experts, middle layer",
    ]
    assert found.simplest[0] == "shared"
    problem = found.problem
    assert problem.data.domains == DOMAINS
    assert (problem.steps, problem.batch_size, problem.max_length) == (2, 4, 12)
    assert problem.learning_rates == (1e-3,)
    assert problem.n_layers == 2
    named = contest(options(folder, designs="domain experts, wrong domain,bm25"), Console())
    assert [design.name for design in named.chosen] == ["domain experts, wrong domain", "BM25"]


def test_a_folder_of_manual_pages_is_known(folder, tmp_path, capsys):
    for domain, section in (("man1", 1), ("man5", 5)):
        (tmp_path / domain).mkdir()
        for number in range(240):  # sixes that know of each other
            words = " ".join(f"word{(number * k) % 239}" for k in range(1, 6))
            first = number - number % 6
            cited = ", ".join(f"page{first + k}({section})" for k in range(6))
            (tmp_path / domain / f"page{number}.{section}").write_text(
                f".SH NAME\npage{number} \\- {domain} {words}\n.SH SEE ALSO\n{cited}\n"
            )
    found = contest(options(folder, data=(tmp_path,)), Console())
    assert found.problem.data.domains == ("commands", "files")
    assert "Manual pages: 480 pages" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match="--column makes no difference to the manual pages"):
        contest(options(folder, data=(tmp_path,), columns={"text": "x"}), Console())


def test_a_run_leaves_a_report_and_a_winner_that_knows_domains(folder):
    out = folder / "out"
    command.run(
        "embedding",
        options(folder, designs="domain experts,shared, domain tokens"),
        reference="domain experts",
        seeds=2,
        out=out,
        workers=1,
        engine="local",
        alpha=0.05,
        as_json=False,
    )
    results = json.loads((out / "results.json").read_text())
    assert not results["failures"]
    assert list(results["metrics"]) == ["mrr", "auc", "f1"]
    assert set(results["designs"][0]["metrics"]["mrr"]["tasks"]) == set(DOMAINS)
    assert (out / "report.html").is_file()
    names = {}
    exec("\n".join(results["problem"]["description"]["usage"]), names)
    assert names["vectors"].shape == (1, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "lora"}, "--train makes no difference to domains"),
        ({"tokens": 5}, "--tokens makes no difference to domains"),
        ({"max_texts": 5}, "--max-texts makes no difference to domains"),
        ({"designs": "best"}, "there are: domain experts;"),
        ({"columns": {"answer": "x"}}, "citations have columns id, text, references"),
        ({"columns": {"text": "body"}}, "no column 'body' for role 'text'"),
        ({"data": (Path("a"), Path("b"))}, "--data takes one file with a document a row, got 2"),
        ({"data": (Path("nowhere/Packages.xz"),)}, "no such file; give a Debian Packages file"),
        ({"data": (), "columns": {"text": "x"}}, "--column needs --data"),
    ],
)
def test_what_cannot_be_is_told(folder, changes, message):
    with pytest.raises(DataError, match=message):
        contest(options(folder, **changes), Console())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Packages", True),
        ("Packages.xz", True),
        ("deb.debian.org_debian_dists_stable_main_binary-amd64_Packages.lz4", True),
        ("packages.jsonl", False),
    ],
)
def test_debian_indexes_are_known_by_name(name, expected):
    assert is_package_index(Path("somewhere") / name) == expected
