"""`bakeoff run decoding` as a user meets it: what the prompts hold says what is compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.decoding.tiny_decoder import save_decoder
from typer.testing import CliRunner

from bakeoff.cli.main import app

WORDS = ["one", "two", "three", "four", "cat", "mat"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", "decoding", *map(str, arguments)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny model, prompts of every kind, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("run-decoding")
    save_decoder(made / "model")
    save_decoder(made / "large", seed=1)
    asked = [{"prompt": f"which {w}?", "answers": [w]} for w in WORDS]
    write(made / "asked.jsonl", asked)
    options = [{**row, "options": [row["answers"][0], "yes", "no"]} for row in asked[:3]]
    write(made / "options.jsonl", options)
    long = "one two three four the cat sat on a mat. " * 3
    write(made / "long.jsonl", [{**row, "document": long} for row in asked[:2]])
    many = [{"prompt": f"{a} {b}?", "answer": [a]} for a in WORDS for b in [*WORDS, "yes", "no"]]
    write(made / "many.jsonl", many)
    code = made / "code"
    code.mkdir()
    for number, word in enumerate(WORDS * 3):
        body = "\n".join(f"    {word}{line} = {number} + {line}" for line in range(9))
        name = f"{word}_{number}"
        (code / f"{name}.py").write_text(f"def {name}(x):\n{body}\n    return x * {number}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def constrained(folder):
    arguments = ["--prompts", folder / "asked.jsonl", "--grammar", "choice:yes|no|maybe"]
    return [*arguments, "--designs", "masking,asap,asap after 10", "--max-new-tokens", 8]


def order(folder):
    return ["--prompts", folder / "options.jsonl", "--designs", "plain-order,set-based"]


def memory(folder):
    designs = "keep-end,infllm"
    return ["--prompts", folder / "long.jsonl", "--designs", designs, "--max-new-tokens", 4]


def cascade(folder):
    arguments = ["--prompts", folder / "many.jsonl", "--large", folder / "large"]
    return [*arguments, "--designs", "random,chow-average", "--max-new-tokens", 4]


def infilling(folder):
    arguments = ["--data", folder / "code", "--tokens", 3000, "--batch-size", 2]
    return [*arguments, "--designs", "causal LM,span corruption", "--max-new-tokens", 4]


QUESTIONS = (constrained, order, memory, cascade, infilling)


@pytest.fixture(scope="module", params=QUESTIONS, ids=lambda function: function.__name__)
def finished(request, folder):
    out = folder / request.param.__name__
    options = [*request.param(folder), "--base", folder / "model", "--seeds", 2, "--out", out]
    done = invoke(*options)
    assert done.exit_code == 0, done.output
    return request.param.__name__, options, out, json.loads((out / "results.json").read_text())


def test_a_run_leaves_everything_it_promises(finished):
    _, _, out, results = finished
    assert {"results.json", "report.html", "winner"} <= {path.name for path in out.iterdir()}
    assert {"README.md", "decoder.json"} <= {path.name for path in (out / "winner").iterdir()}
    assert not results["failures"]
    lines = results["problem"]["description"]["usage"]
    assert lines
    compile("\n".join(lines), "usage", "exec")


def test_a_second_run_takes_up_the_first(finished):
    _, options, out, results = finished
    again = invoke(*options)
    assert again.exit_code == 0, again.output
    assert "0 trials to run" in re.sub(r"\s+", " ", again.output) or "finished" not in again.output
    first, second = results["designs"], json.loads((out / "results.json").read_text())["designs"]
    assert [d["metrics"] for d in first] == [d["metrics"] for d in second]


def test_the_winner_writes(finished, folder):
    name, _, out, _ = finished
    prompt = {"infilling": "def f(x):\n<fill>\n"}.get(name, "which one?")
    extra: list[object] = {
        "order": ["--option", "yes", "--option", "no"],
        "memory": ["--document", folder / "asked.jsonl"],
    }.get(name, [])
    command = ["generate", "--from", out / "winner", "-p", prompt, "--max-new-tokens", 4, *extra]
    if name == "constrained":
        command += ["--max-new-tokens", 8]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "for default data --question"),
        (["--question", "nope"], "--question must be one of constrained, order"),
        (["--prompts", "asked.jsonl"], "what is to be compared?"),
        (["--prompts", "asked.jsonl", "--budgets", "3"], "--budgets makes no difference"),
        (["--prompts", "options.jsonl", "--grammar", "regex:a", "--tokens", "5"], "--tokens makes"),
        (["--data", "code", "--question", "order"], "--data is code to train on"),
        (["--prompts", "asked.jsonl", "--question", "cascade"], "needs --large"),
        (["--grammar", "regex:a"], "--grammar needs --prompts"),
        (["--prompts", "asked.jsonl", "--question", "memory"], "has no document"),
        (["--question", "cascade", "--large", "x"], "need --prompts"),
    ],
)
def test_bad_arguments(folder, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    done = invoke(*arguments)
    assert done.exit_code == 3
    assert message in re.sub(r"\s+", " ", done.output)


def test_other_families_refuse_what_is_for_decoding():
    for family in ("embedding", "selection"):
        done = CliRunner().invoke(app, ["run", family, "--prompts", "x.jsonl"])
        assert done.exit_code == 3
        assert "is for decoding" in done.output
        assert Path("x.jsonl").exists() is False
