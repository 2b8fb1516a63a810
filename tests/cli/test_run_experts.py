"""`bakeoff run experts` as a user meets it: files become domains, a question has a winner."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.decoding.tiny_decoder import save_decoder
from typer.testing import CliRunner

from bakeoff.cli.main import app

WORDS = ["one", "two", "three", "four", "the", "cat", "sat", "on", "a", "mat"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", "experts", *map(str, arguments)])


def words_from(start):
    return " ".join(WORDS[(start + step * (start + 1)) % len(WORDS)] for step in range(40))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny model, two domains of ten texts, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("run-experts")
    save_decoder(made / "model")
    for name, first in (("code", 0), ("prose", 50)):
        rows = [{"text": f"{name} {i} {words_from(first + i)}"} for i in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (made / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def options(folder, *more):
    data = ["--data", f"code={folder / 'code.jsonl'}", "--data", folder / "prose.jsonl"]
    return [*data, "--base", folder / "model", "--tokens", 64, "--max-length", 16, *more]


@pytest.mark.parametrize(
    ("question", "designs"),
    [
        (None, "dense,top-2"),
        ("upcycling", "dense-continued,bam"),
        ("refactoring", "pooled-mask,random-masks"),
    ],
)
def test_each_question_gives_a_table_a_report_and_a_winner(folder, tmp_path, question, designs):
    asked = [] if question is None else ["--question", question]
    out = tmp_path / "study"
    more = [*asked, "--designs", designs, "--seeds", 2, "--batch-size", 2, "--out", out]
    done = invoke(*options(folder, *more))
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert not results["failures"]
    assert set(results["designs"][0]["metrics"]) >= {"loss"}
    assert set(results["problem"]["description"]["data"]) == {"code", "prose"}
    assert (out / "report.html").is_file()
    assert (out / "winner" / "README.md").is_file()
    assert list((out / "winner").glob("*.safetensors"))
    (out / "winner" / "adapter.safetensors").write_bytes(b"of an earlier winner")
    again = invoke(*options(folder, *more))
    assert again.exit_code == 0
    assert json.loads((out / "results.json").read_text())["designs"] == results["designs"]
    assert not (out / "winner" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "order"], "--question must be one of layers, upcycling, refactoring"),
        (["--prompts", "x.jsonl"], "--prompts is for decoding; leave it out"),
        (["--rank", "2"], "--rank is for adapters; leave it out"),
        (["--target", "x"], "--target makes no difference to experts"),
        (["--question", "refactoring", "--match", "flops"], "--match makes no difference to"),
        (["--column", "body=text"], "domains have a text column, got body"),
        (["--designs", "nonsense"], "'nonsense' does not begin with a design or method name"),
        (["--data", "x=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(folder, tmp_path, arguments, message):
    done = invoke(*options(folder), *arguments, "--out", tmp_path / "study")
    assert done.exit_code == 3, done.output
    assert re.search(re.escape(message), " ".join(done.output.split()))
    assert not Path(tmp_path / "study").exists()


@pytest.mark.parametrize("option", [["--column", "text=body"], ["--max-texts", "50"]])
def test_what_goes_with_files_needs_files(tmp_path, option):
    done = invoke("--size", "smoke", *option, "--out", tmp_path / "study")
    assert done.exit_code == 3, done.output
    assert f"{option[0]} needs --data" in done.output


def test_other_families_refuse_what_is_for_experts(folder, tmp_path):
    done = CliRunner().invoke(app, ["run", "selection", "--layers", "2"])
    assert done.exit_code == 3
    assert "--layers is for embedding and experts and adapters; leave it out" in done.output
