"""The command as a user meets it: real processes for what matters, a runner for the rest."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.embedding.tiny_problem import save_base, sentences
from typer.testing import CliRunner

from bakeoff.cli.main import app
from bakeoff.cli.run import choose_designs
from bakeoff.cli.run_embedding import question_of
from bakeoff.embedding.problem import default_designs
from bakeoff.errors import DataError

BAKEOFF = [sys.executable, "-m", "bakeoff.cli.main"]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model and a file of pairs."""
    made = tmp_path_factory.mktemp("cli")
    save_base(made / "base")
    texts = sentences(120, 3)
    reverse = [" ".join(reversed(text.split())) for text in texts]
    pq.write_table(pa.table({"question": texts, "answer": reverse}), made / "pairs.parquet")
    return made


def run_options(folder: Path, out: Path) -> list[str]:
    return [
        *["run", "embedding", "--data", str(folder / "pairs.parquet")],
        *["--base", str(folder / "base"), "--out", str(out), "--max-length", "12"],
        *["--steps", "2", "--batch-size", "8", "--seeds", "2"],
        *["--designs", "mean, causal,last token, causal,scalar-mix"],
    ]


@pytest.fixture(scope="module")
def finished(folder):
    """A finished run in a process of its own."""
    environment = {**os.environ, "BAKEOFF_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*BAKEOFF, *run_options(folder, folder / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stdout


def test_run_leaves_everything_it_promises(finished):
    out, printed = finished
    assert "report.html" in printed
    assert "winner" in printed
    assert {"results.json", "report.html", "winner", "study.duckdb"} <= {
        path.name for path in out.iterdir()
    }
    results = json.loads((out / "results.json").read_text())
    assert {design["name"] for design in results["designs"]} == {
        "mean, causal",
        "last token, causal",
        "scalar mix of layers",
    }
    assert results["winner"]["artifact"] == "winner"
    assert results["command"].startswith("bakeoff run embedding --data")
    report = (out / "report.html").read_text()
    assert "SentenceTransformer" in report


def test_the_winner_folder_loads(finished):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(finished[0] / "winner"), trust_remote_code=True)
    vectors = model.encode(["the cat sat", "a dog"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_same_command_again_computes_nothing(finished, folder, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(folder / "cache"))
    before = json.loads((finished[0] / "results.json").read_text())
    again = invoke(*run_options(folder, finished[0]), "--json")
    assert again.exit_code == 0, again.output
    results = json.loads(again.stdout)
    assert results["study"]["trials"]["reused"] == before["study"]["trials"]["planned"]
    assert [d["metrics"] for d in results["designs"]] == [d["metrics"] for d in before["designs"]]


def test_report_is_written_again(finished):
    (finished[0] / "report.html").unlink()
    again = invoke("report", finished[0])
    assert again.exit_code == 0, again.output
    assert (finished[0] / "report.html").exists()
    assert "mean, causal" in again.output


def test_ctrl_c_writes_a_partial_report_and_the_next_run_goes_on(folder, tmp_path):
    import signal

    environment = {**os.environ, "BAKEOFF_CACHE": str(folder / "cache")}
    options = run_options(folder, tmp_path / "out")
    options[options.index("--seeds") + 1] = "60"
    process = subprocess.Popen(
        [*BAKEOFF, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 120
    units = tmp_path / "out" / "trials"
    while time.monotonic() < deadline and (not units.exists() or len(list(units.iterdir())) < 7):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert "interrupted" in errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["study"]["complete"] is False
    assert 3 <= results["study"]["trials"]["finished"] < 180
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("command", [["--help"], ["methods"], ["claims"], ["run", "--help"]])
def test_words_come_at_once_because_nothing_heavy_is_imported(command):
    code = (
        "import sys; sys.argv = ['bakeoff', *sys.argv[1:]]\n"
        "from bakeoff.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn', 'pandas', 'duckdb', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout


def test_methods_lists_both_published_methods():
    listed = json.loads(invoke("methods", "--json").stdout)
    assert {method["slug"] for method in listed} >= {"nv-embed", "pooling-and-attention"}
    for method in listed:
        assert "arXiv" in method["paper"]


def test_every_declared_name_can_be_imported_and_every_design_run():
    import importlib

    from bakeoff import decoding, experts
    from bakeoff.embedding import problem
    from bakeoff.selection.problem import annotation_designs, training_designs

    questions = ("order", "memory", "constrained", "cascade", "infilling")
    runs = {
        "embedding": {
            design.method
            for question in ("default", "domain_encoder", "word", "upgrade")
            for design in getattr(problem, f"{question}_designs")()
        },
        "selection": {design.method for design in (*annotation_designs(), *training_designs())},
        "decoding": {
            design.method
            for question in questions
            for design in getattr(decoding, f"{question}_designs")()
        },
        "experts": {
            design.method
            for question in ("layer", "upcycling", "refactoring", "adapter")
            for design in getattr(experts, f"{question}_designs")()
        },
    }
    for method in json.loads(invoke("methods", "--json").stdout):
        family = importlib.import_module(f"bakeoff.{method['family']}")
        for name in method["names"]:
            assert hasattr(family, name), name
        assert set(method["designs"]) <= runs[method["family"]]


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "generate",
        "select",
        "methods",
        "claim",
        "claims",
        "pull",
        "report",
        "export",
        "doctor",
        "upgrade",
    ],
)
def test_every_command_has_help_with_an_example_and_json(command):
    text = invoke(command, "--help").output
    assert "Example: bakeoff" in text
    assert "--json" in text


def test_wrong_arguments_exit_with_2_and_bad_input_with_3(folder, tmp_path):
    assert invoke("run", "--nonsense").exit_code == 2
    assert invoke("run", "--size", "huge").exit_code == 2
    assert invoke("run", "--column", "text").exit_code == 2
    for options, message in (
        (["--data", "absent.csv"], "no such file"),
        (["--base", "no-such-model"], "unknown model"),
        (["--designs", "fancy"], "does not begin with a design or method name"),
        (["--reference", "fancy"], "fancy"),
    ):
        given = ["run", "--data", folder / "pairs.parquet", "--base", folder / "base"]
        answer = invoke(*given, "--out", tmp_path / "out", *options)
        assert answer.exit_code == 3, (options, answer.output)
        assert message in answer.output
        assert "Traceback" not in answer.output
    assert invoke("claim", "no-such-claim").exit_code == 3
    assert invoke("report", tmp_path).exit_code == 3
    assert invoke("pull", "no-such-model").exit_code == 3


def test_doctor_says_what_is_missing_and_how_to_mend_it(monkeypatch, tmp_path):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    facts = json.loads(invoke("doctor", "--json").stdout)
    checks = {check["what"]: check for check in facts["checks"]}
    assert checks["torch"]["state"] == "ok"
    absent = checks["model smollm2-135m"]
    assert absent["state"] == "optional"
    assert "bakeoff pull smollm2-135m" in absent["mend"]
    monkeypatch.setenv("BAKEOFF_CACHE", "/proc/no/such/folder")
    broken = invoke("doctor")
    assert broken.exit_code == 3
    assert "BAKEOFF_CACHE" in broken.output


def test_design_names_with_commas_are_told_apart():
    known = default_designs()
    chosen = choose_designs(known, "mean, causal, mean, centred,latent-attention")
    assert [design.name for design in chosen] == [
        "mean, causal",
        "mean, centred",
        "latent attention, causal",
        "latent attention, bidirectional",
    ]
    assert list(choose_designs(known, None)) == list(known)
    with pytest.raises(DataError, match=r"'nope' does not begin .* there are: last token, causal;"):
        choose_designs(known, "mean, causal,nope")
    with pytest.raises(DataError, match="empty"):
        choose_designs(known, " ")


@pytest.mark.parametrize(
    ("designs", "question"),
    [
        (None, "pooling"),
        ("mean, causal, latent-attention", "pooling"),
        ("domain experts, middle layer, LoRA per domain", "domains"),
        ("raw,character n-grams", "words"),
        ("stationary, replay", "upgrades"),
        ("mean, causal, stationary", "pooling"),  # no question has both; pooling says so
        ("domain experts, raw", "domains"),  # it says that it knows no raw
        ("specialised, full, domain experts", "words"),
    ],
)
def test_embedding_designs_name_their_question(designs, question):
    assert question_of(designs) == question
