"""`bakeoff run selection` as a user meets it, on tiny models: what to label, what to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.selection.tiny_selection import labelled, pool, samples, save_models
from typer.testing import CliRunner

from bakeoff.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore:k=")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["run", "selection", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Tiny models, a labelled file, and samples with a target; a cache of this module's own."""
    made = save_models(tmp_path_factory.mktemp("run-selection"))
    task = labelled(n=90, n_test=30)
    table = {
        "text": [*task.train_texts, *task.test_texts],
        "label": [*task.train_labels, *task.test_labels],
    }
    pq.write_table(pa.table(table), made / "labelled.parquet")
    for name, contents in (("pool", pool().samples), ("target", samples(10, 9))):
        columns = ("instruction", "response", "source")
        rows = [{column: getattr(one, column) for column in columns} for one in contents]
        pq.write_table(pa.Table.from_pylist(rows), made / f"{name}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def to_label(folder: Path, out: Path) -> list[object]:
    return [
        *["--data", folder / "labelled.parquet", "--embedder", folder / "encoder"],
        *["--budgets", "4,8", "--seeds", 2, "--designs", "random,kmeans,vote-k", "--out", out],
    ]


def to_train(folder: Path, out: Path) -> list[object]:
    return [
        *["--data", folder / "pool.parquet", "--target", folder / "target.parquet"],
        *["--base", folder / "base", "--embedder", folder / "encoder"],
        *["--number", 6, "--tokens", 400, "--batch-size", 4, "--max-length", 60],
        *["--seeds", 2, "--designs", "random,tf-idf,longest", "--out", out],
    ]


COMMANDS = {"label": to_label, "train": to_train}


@pytest.fixture(scope="module", params=COMMANDS)
def finished(request, folder):
    """A finished run: its options, its folder, its results and what it printed."""
    out = folder / f"out-{request.param}"
    options = COMMANDS[request.param](folder, out)
    done = invoke(*options)
    assert done.exit_code == 0, done.output
    return request.param, options, out, json.loads((out / "results.json").read_text()), done.output


def test_a_run_leaves_everything_it_promises(finished):
    what, _, out, results, printed = finished
    assert {"results.json", "report.html", "winner", "study.duckdb"} <= {
        path.name for path in out.iterdir()
    }
    assert str(out / "report.html") in printed
    assert str(out / "winner") in printed
    names = {"label": {"random", "kmeans", "vote-k"}, "train": {"random", "tf-idf", "longest"}}
    assert {design["name"] for design in results["designs"]} == names[what]
    assert results["study"]["trials"]["finished"] == 6
    assert not results["failures"]
    headline = {"label": "accuracy", "train": "target_loss"}
    assert next(iter(results["metrics"])) == headline[what]
    assert results["reference"] == "random"
    if what == "label":
        for design in results["designs"]:
            assert list(design["metrics"]["accuracy"]["tasks"]) == ["4 labels", "8 labels"]
    page = (out / "report.html").read_text()
    question = {"label": "which examples to label", "train": "which samples to train on"}
    assert question[what] in page
    assert "read_parquet" in page


def test_the_winner_holds_rows_of_the_data(finished, folder):
    what, _, out, results, _ = finished
    table = pq.read_table(out / "winner" / "picks.parquet").to_pydict()
    assert list(table) == ["task", "pick", "row", "text"]
    assert results["winner"]["artifact"] == "winner"
    n = {"label": 8, "train": 6}[what]
    assert table["pick"] == list(range(1, n + 1))
    assert len(set(table["row"])) == n
    if what == "label":
        known = set(pq.read_table(folder / "labelled.parquet")["text"].to_pylist())
        assert set(table["text"]) <= known
    else:
        rows = pq.read_table(folder / "pool.parquet").to_pylist()
        expected = [f"{rows[i]['instruction']}\n\n{rows[i]['response']}" for i in table["row"]]
        assert table["text"] == expected
    assert results["winner"]["design"] in (out / "winner" / "README.md").read_text()


def test_the_same_command_again_computes_nothing(finished):
    _, options, _, before, _ = finished
    again = invoke(*options, "--json")
    assert again.exit_code == 0, again.output
    results = json.loads(again.stdout)
    trials = results["study"]["trials"]
    assert trials["reused"] == trials["planned"] == 6
    assert [d["metrics"] for d in results["designs"]] == [d["metrics"] for d in before["designs"]]


def test_budgets_that_nobody_gave_fit_a_small_file(folder, tmp_path):
    options = to_label(folder, tmp_path / "out")
    del options[options.index("--budgets") : options.index("--budgets") + 2]
    done = invoke(*options, "--json")
    assert done.exit_code == 0, done.output
    paid = json.loads(done.stdout)["problem"]["description"]["labels paid for"]
    assert paid == "18"  # of 18, 50 and 100; a pool has two thirds of the training part


def test_answers_in_context(folder, tmp_path):
    learners = ["--learner", "in-context", "--learner", "nearest-neighbour"]
    options = [*to_label(folder, tmp_path / "out"), *learners, "--base", folder / "base"]
    done = invoke(
        *options, "--designs", "random,vote-k-confidence", "--budgets", 4, "--seeds", 1, "--json"
    )
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert list(results["metrics"])[:3] == ["score", "accuracy", "in_context"]
    assert str(folder / "base") in results["problem"]["description"]["language model"]


def test_designs_that_cannot_run_are_left_out_with_the_reason(folder, tmp_path):
    """Nobody named designs, and the pool has no context for gateau."""
    options = to_train(folder, tmp_path / "out")
    del options[options.index("--designs") : options.index("--designs") + 2]
    options[options.index("--seeds") + 1] = 1
    done = invoke(*options, "--json")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.split())
    assert "left out: mates-refreshed because: mates-refreshed sets 200 samples aside" in said
    assert "left out: gateau because: gateau needs samples with a context" in said
    names = {design["name"] for design in json.loads(done.stdout)["designs"]}
    assert {"random", "rds-plus", "ifd", "mates", "perplexity"} <= names
    assert not {"gateau", "mates-refreshed"} & names


def test_a_design_that_was_named_must_run(folder, tmp_path):
    for name, message in (("gateau", "have no context"), ("reference", "does not begin with")):
        options = to_train(folder, tmp_path / "out")
        options[options.index("--designs") + 1] = name
        done = invoke(*options)
        assert done.exit_code == 3, done.output
        assert message in " ".join(done.output.split())
    done = invoke(
        *to_label(folder, tmp_path / "out"), "--reference", "ideal", "--seeds", 1, "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reference"] == "ideal"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("label", ["--number", 5], "--number is for data to train on, and needs --target"),
        ("label", ["--tokens", 5, "--train", "full"], "--tokens and --train is for data to train"),
        ("label", ["--selector-model", "x"], "--selector-model is for data to train on"),
        ("label", ["--max-length", 50], "--max-length is for data to train on"),
        ("label", ["--steps", 50], "--steps makes no difference to selection"),
        ("label", ["--base", "x"], "--base answers in context only: give --learner in-context too"),
        ("label", ["--task", "pairs"], "--task must be labelled for data to label, got pairs"),
        ("label", ["--learner", "oracle"], "learners must be among nearest-neighbour, in-context"),
        ("label", ["--budgets", "4,1000"], "budgets must be at most"),
        ("label", ["--budgets", "0"], "budgets must be positive numbers of labels, got [0]"),
        ("label", ["--designs", "tf-idf"], "'tf-idf' does not begin with a design or method name"),
        ("label", ["--embedder", "absent"], "unknown model 'absent'"),
        ("label", ["--data", "absent.csv"], "absent.csv: no such file"),
        ("label", ["--reference", "absent"], "--reference must be a design's name, got 'absent'"),
        ("train", ["--budgets", "4"], "--budgets is for data to label; leave out --target"),
        (
            "train",
            ["--learner", "in-context"],
            "--learner is for data to label; leave out --target",
        ),
        ("train", ["--steps", 50], "--steps makes no difference to selection: give --tokens"),
        ("train", ["--train", "head"], "--train must be lora or full for selection, got head"),
        ("train", ["--number", 500], "n_select must be between 1 and 24"),
        ("train", ["--base", "absent"], "unknown model 'absent'"),
        ("train", ["--target", "manual"], "manual: no such file"),
        ("train", ["--designs", "vote-k"], "'vote-k' does not begin with a design or method name"),
        ("train", ["--learning-rate", "-1"], "learning_rate must be positive, got -1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_3(folder, tmp_path, command, options, message):
    done = invoke(*COMMANDS[command](folder, tmp_path / "out"), *options)
    assert done.exit_code == 3, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_default_target_is_named(folder):
    done = invoke("--target", "poems", "--size", "smoke")
    assert done.exit_code == 3
    assert "--target must be one of manual, news, films, docstrings, code" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "selections"],
            "there is embedding, selection, decoding, experts, adapters; got 'selections'",
        ),
        (["run", "selection", "--budgets", "4,x"], "expected whole numbers with commas, got '4,x'"),
        (["run", "selection", "--seeds", "0"], "greater than or equal to 1"),
        (["run", "selection", "--number", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_arguments_are_exit_code_2(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--target", "manual"), ("--budgets", "4"), ("--learner", "in-context")],
        *[("--number", "5"), ("--tokens", "5"), ("--embedder", "x"), ("--selector-model", "x")],
    ],
)
def test_options_of_selection_are_refused_by_embedding(option, value):
    done = CliRunner().invoke(app, ["run", "embedding", option, value])
    assert done.exit_code == 3
    assert f"{option} makes no difference to pooling; leave it out" in done.output


@pytest.mark.model
def test_the_default_data_need_no_option(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("BAKEOFF_CACHE")
    options = ["--size", "smoke", "--seeds", 1, "--designs", "random,vote-k", "--out"]
    done = invoke(*options, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["study"]["trials"]["finished"] == 2
    # Labels follow packages: the nearest of 18 knows more than a guess among 4 classes.
    assert results["designs"][0]["metrics"]["accuracy"]["tasks"]["18 labels"]["mean"] > 0.4
