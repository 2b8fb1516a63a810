"""`bakeoff run adapters` as a user meets it: texts by domain, a winner that PEFT loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console
from tests.decoding.tiny_decoder import save_decoder
from typer.testing import CliRunner

from bakeoff.cli.main import app
from bakeoff.cli.run import Options
from bakeoff.cli.run_adapters import contest
from bakeoff.errors import DataError

WORDS = {"pets": ["the cat sat on", "a mat", "on the mat"], "counts": ["one two", "three four one"]}


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", "adapters", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny model, two domains, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("run-adapters")
    save_decoder(made / "model")
    for domain, lines in WORDS.items():
        rows = [{"body": f"{line} {number} " * 3} for number in range(20) for line in lines]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (made / f"{domain}.jsonl").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def arguments(folder):
    data = ["--data", f"animals={folder / 'pets.jsonl'}", "--data", folder / "counts.jsonl"]
    options = ["--column", "text=body", "--base", folder / "model", "--rank", 1, "--tokens", 64]
    return [*data, *options, "--batch-size", 2, "--max-length", 16, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def finished(folder):
    out = folder / "out"
    chosen = ["--designs", "not adapted,LoRA,MoS", "--reference", "LoRA", "--seeds", 2]
    done = invoke(*arguments(folder), *chosen, "--out", out)
    assert done.exit_code == 0, done.output
    return out, json.loads((out / "results.json").read_text())


def test_a_run_leaves_everything_it_promises(finished):
    out, results = finished
    assert not results["failures"]
    assert {"results.json", "report.html"} <= {path.name for path in out.iterdir()}
    assert [d["name"] for d in results["designs"]].count("MoS") == 1
    facts = results["problem"]["description"]
    assert facts["adapted to"] == "animals, counts: one adapter each"
    assert "as LoRA of rank 1" in facts["notes"][0]
    assert list(results["metrics"]) == ["loss", "forgetting"]


def test_the_winner_works_without_bakeoff(finished):
    out, results = finished
    assert results["winner"]["design"] in ("LoRA", "MoS")
    assert {"README.md", "animals", "counts"} <= {p.name for p in (out / "winner").iterdir()}
    lines = results["problem"]["description"]["usage"]
    block = "import sys; sys.modules['bakeoff'] = None\n"
    command = [sys.executable, "-c", block + "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


def test_what_is_over_the_budget_is_asked_for_by_name(folder, capsys):
    data = tuple(folder / f"{domain}.jsonl" for domain in WORDS)
    given = {"data": data, "columns": {"text": "body"}, "base": str(folder / "model")}
    found = contest(Options(**given, rank=1, max_length=16), Console())
    said = " ".join(capsys.readouterr().out.split())
    names = [design.name for design in found.chosen]
    assert "left out: LoRA, 4 times the rank; LoRA, 8 times the rank; full fine-tuning" in said
    assert "left out: DoRA because: dora of rank 1 trains" in said
    assert {"LoRA", "VeRA", "MoS", "MoS without sharding"} <= set(names)
    assert not {"full fine-tuning", "DoRA"} & set(names)
    assert found.simplest[0] == "LoRA"
    assert found.problem.rank == 1
    named = contest(Options(**given, max_length=16, designs="full,mos"), Console())
    assert [design.name for design in named.chosen][:2] == ["full fine-tuning", "MoS"]
    assert named.problem.rank == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "--steps makes no difference to adapters"),
        ({"train": "lora"}, "--train makes no difference to adapters"),
        ({"embedder": "x"}, "--embedder makes no difference to adapters"),
        ({"designs": "best"}, "there are: not adapted; LoRA;"),
        ({"columns": {"answer": "body"}}, "domains have a text column, got answer"),
    ],
)
def test_what_makes_no_difference_is_refused(folder, options, message):
    given = {"data": (folder / "pets.jsonl",), "base": str(folder / "model"), **options}
    with pytest.raises(DataError, match=message):
        contest(Options(**given), Console())


@pytest.mark.parametrize("option", ["--match", "--question"])
def test_options_of_experts_are_refused(folder, option):
    value = {"--match": "flops", "--question": "layers"}[option]
    done = invoke(*arguments(folder), option, value)
    assert done.exit_code != 0
    assert "is for" in " ".join(done.output.split())
