"""`bakeoff generate` as a user meets it, with a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from tests.decoding.tiny_decoder import save_decoder
from typer.testing import CliRunner

from bakeoff.cli.generate import read_grammar
from bakeoff.cli.main import app
from bakeoff.decoding.grammar import Grammar
from bakeoff.decoding.winner import Settings, load_settings, save_settings
from bakeoff.errors import DataError


def invoke(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"), chat=True)


def test_answers_go_to_standard_output_and_cost_to_the_other(model):
    asked = ["-p", "one two", "-p", "the cat", "--max-new-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "bakeoff.cli.main", "generate", "--model", str(model), *asked],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 answers in" in done.stderr
    assert "nats" in done.stderr
    assert "answers" not in done.stdout


def test_json_has_one_record_per_answer(model):
    arguments = ["--model", model, "--method", "asap", "--grammar", "choice:yes|no"]
    done = invoke(*arguments, "-p", "the cat", "-n", 3, "--max-new-tokens", 8, "--json")
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert {record["text"] for record in records} <= {"yes", "no"}
    assert len(records) == 3
    assert records[0]["facts"]["attempts"] >= 3


def test_a_trie_is_kept_between_runs(model, tmp_path):
    arguments = ["--model", model, "--method", "asap", "--grammar", "choice:yes|no", "-n", 3]
    arguments += ["-p", "the cat", "--max-new-tokens", 8, "--json", "--trie"]
    first, again = (invoke(*arguments, tmp_path / "t.safetensors") for _ in range(2))
    calls = [json.loads(done.stdout)[0]["facts"]["model_calls"] for done in (first, again)]
    assert calls[1] <= calls[0]
    refused = invoke(*arguments[:5], "choice:a|b", *arguments[6:], tmp_path / "t.safetensors")
    assert refused.exit_code == 3
    assert "grammar" in refused.output


def test_a_file_of_prompts_and_a_file_of_answers(model, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"question": "which?", "choices": ["cat", "mat"]}))
    out = tmp_path / "deep" / "answers.jsonl"
    done = invoke("--model", model, "--method", "set-based", "--prompts", file, "--out", out)
    assert done.exit_code == 0, done.output
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["text"] in ("cat", "mat")


def test_a_winner_is_taken_up(model, tmp_path):
    settings = Settings("memory", "infllm", {"n_local": 64, "exec_chunk": 32}, str(model), {})
    save_settings(tmp_path / "w", settings, usage=["import bakeoff"], reason="It was better.")
    assert load_settings(tmp_path / "w") == settings
    assert "It was better." in (tmp_path / "w/README.md").read_text()
    sizes = ["--param", "block_size=8", "--param", "topk=2", "--param", "n_init=4"]
    done = invoke("--from", tmp_path / "w", "-p", "one", "--max-new-tokens", 3, *sizes)
    assert done.exit_code == 0, done.output
    other = invoke("--from", tmp_path / "w", "--method", "greedy", "-p", "one")
    assert other.exit_code == 3
    assert "holds infllm" in other.output
    constrained = Settings(
        "asap after 10",
        "asap",
        {"burn_in": 2},
        str(model),
        {"max_new_tokens": 8, "prompts": [{"grammar": asdict(Grammar.choice(["yes", "no"]))}]},
    )
    save_settings(tmp_path / "g", constrained, usage=[])
    done = invoke("--from", tmp_path / "g", "-p", "one")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() in ("yes", "no")
    other = Settings("resampling", "importance", {}, str(model), {})
    save_settings(tmp_path / "i", other, usage=[])
    assert "does not run" in invoke("--from", tmp_path / "i", "-p", "one").output
    (tmp_path / "w/decoder.json").write_text("{}")
    assert "holds no decoding settings" in invoke("--from", tmp_path / "w", "-p", "a").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a", "--method", "nope"], "there is no decoding method 'nope'"),
        ([], "give --prompt TEXT or --prompts FILE"),
        (["-p", "a", "--prompts", "x.jsonl"], "one of the two"),
        (["-p", "a", "--method", "asap"], "asap needs a grammar"),
        (["-p", "a", "--method", "asap", "--grammar", "x.lark"], "there is no such file"),
        (["-p", "a", "--method", "asap", "--grammar", "regex:["], "error:"),
        (["-p", "a", "--document", "no.txt"], "--document no.txt cannot be read"),
        (["-p", " "], "prompt must not be blank"),
        (["-p", "a", "--temperature", "0"], "temperature must be above 0"),
        (["--prompts", "x.jsonl", "--option", "a"], "go with --prompt"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(arguments, message, monkeypatch):
    from bakeoff import models

    monkeypatch.setattr(models, "load_language_model", lambda name: pytest.fail("loaded"))
    done = invoke(*arguments)
    assert done.exit_code == 3
    assert message in done.output


def test_grammars_are_read_from_files_and_words(tmp_path):
    files = {
        "a.json": ('{"type": "integer"}', "json_schema"),
        "a.lark": ('start: "a" | "b"', "lark"),
        "a.gbnf": ('root ::= "a"', "lark"),
        "a.regex": ("[0-9]+\n", "regex"),
    }
    for name, (text, kind) in files.items():
        (tmp_path / name).write_text(text)
        assert read_grammar(str(tmp_path / name)).kind == kind
    assert read_grammar("regex:a+").kind == "regex"
    assert read_grammar('{"type": "null"}').kind == "json_schema"
    assert read_grammar("choice:a|b").kind is not None
    with pytest.raises(DataError, match="must be a file"):
        read_grammar("hello")
