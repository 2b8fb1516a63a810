"""`bakeoff select` as a user meets it, with an encoder of a few thousand weights."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.embedding.tiny_problem import save_base, sentences
from typer.testing import CliRunner

from bakeoff.cli import select as command
from bakeoff.cli.main import app

N = 60
TEXTS = list(sentences(N, 3))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["select", *map(str, arguments)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny language model, and as an encoder a sentence-transformers folder around it."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "model")
    SentenceTransformer(str(folder / "model")).save(str(folder / "encoder"))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    table = pa.table(
        {
            "id": pa.array(range(100, 100 + N), pa.int32()),
            "text": TEXTS,
            "label": ["yes" if i in (4, 9) else None for i in range(N)],
            "sure": np.random.default_rng(0).random(N),
            "source": ["web" if i % 6 else "book" for i in range(N)],
            "tags": [[str(i), "ü"] for i in range(N)],
        }
    )
    path = tmp_path_factory.mktemp("pool") / "pool.parquet"
    pq.write_table(table, path, row_group_size=16)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def vote(base, pool, tmp_path):
    """The start of a command line that only lacks what a test is about."""
    return [
        *["--method", "vote-k", "--data", pool, "--embedder", base / "encoder"],
        *["-n", 8, "--param", "k=5", "--out", tmp_path / "chosen.parquet"],
    ]


def encoded(base: Path, texts: list[str]) -> np.ndarray:
    from bakeoff.models import encode

    return encode(base / "encoder", texts)


def test_picks_are_the_selectors_with_whole_rows_in_pick_order(vote, base, pool, tmp_path):
    from bakeoff.selection.vote_k import VoteK

    done = invoke(*vote)
    assert done.exit_code == 0, done.output
    expected = VoteK(8, k=5).fit(encoded(base, TEXTS))
    rows = expected.selected_indices_.tolist()
    chosen = pq.read_table(tmp_path / "chosen.parquet")
    original = pq.read_table(pool)
    assert chosen.column_names == [*original.column_names, "pick", "row", "reason"]
    assert chosen["pick"].to_pylist() == list(range(1, 9))
    assert chosen["row"].to_pylist() == rows
    assert chosen["reason"].to_pylist() == expected.reasons()
    assert chosen.select(original.column_names).equals(original.take(rows))  # types too
    lines = [line for line in done.output.splitlines() if " row " in line]
    for number, (row, reason, line) in enumerate(
        zip(rows, expected.reasons(), lines, strict=True), start=1
    ):
        assert line.split()[:3] == [str(number), "row", str(row)]
        assert reason in line
        assert TEXTS[row] in line
    page = (tmp_path / "chosen.html").read_text("utf-8")
    assert page.count('<tr id="pick-') == 8
    assert all(f'<td dir="auto">{TEXTS[row]}</td>' in page for row in rows)
    assert "Su et al." in page
    assert "k = 5, metric = cosine, rho = 10.0" in page  # what was set, and what was not


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_outputs_hold_the_same_rows(vote, pool, tmp_path, suffix):
    out = tmp_path / f"chosen{suffix}"
    assert invoke(*vote, "--no-report").exit_code == 0
    done = invoke(*vote, "--out", out, "--no-report")
    assert done.exit_code == 0, done.output
    assert not out.with_suffix(".html").exists()
    expected = pq.read_table(tmp_path / "chosen.parquet").to_pylist()
    if suffix == ".jsonl":
        assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == expected
        return
    with open(out, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["id"]) for row in rows] == [row["id"] for row in expected]
    assert [row["reason"] for row in rows] == [row["reason"] for row in expected]
    assert [json.loads(row["tags"]) for row in rows] == [row["tags"] for row in expected]
    assert {row["label"] for row in rows} <= {"yes", ""}


@pytest.mark.parametrize("kind", ["shards", "files", "jsonl"])
def test_the_same_rows_in_other_files_give_the_same_picks(vote, pool, tmp_path, kind):
    first = json.loads(invoke(*vote, "--json").stdout)
    table = pq.read_table(pool)
    if kind == "jsonl":
        data = [tmp_path / "pool.jsonl"]
        data[0].write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        shards = tmp_path / "shards"
        shards.mkdir()
        for i, (start, stop) in enumerate([(0, 7), (7, 41), (41, N)]):
            pq.write_table(table.slice(start, stop - start), shards / f"part-{i}.parquet")
        data = [shards] if kind == "shards" else sorted(shards.iterdir())
    given = list(vote)
    given[2:4] = [part for path in data for part in ("--data", path)]
    again = invoke(*given, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["picks"] == first["picks"]
    assert json.loads(again.stdout)["fingerprint"] == first["fingerprint"]
    # The texts are the same, so nothing was embedded a second time.
    assert "all of them were embedded before" in again.stderr
    ids = pq.read_table(tmp_path / "chosen.parquet")["id"].to_pylist()
    assert ids == [100 + pick["row"] for pick in first["picks"]]


def test_interrupted_embedding_goes_on_where_it_was(vote, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_ROWS_PER_SHARD", 16)
    whole = json.loads(invoke(*vote, "--json").stdout)
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "another-cache"))
    encode, calls = command._Embedder.encode, []

    def stopped(self, texts, progress=None):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, progress)

    (tmp_path / "chosen.parquet").unlink()
    monkeypatch.setattr(command._Embedder, "encode", stopped)
    broken = invoke(*vote)
    assert broken.exit_code == 130
    assert "interrupted. 32 of 60 texts are embedded and kept" in broken.output
    assert not (tmp_path / "chosen.parquet").exists()
    resumed = invoke(*vote, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert "32 of them were embedded before; going on from there" in resumed.stderr
    assert calls == [16, 16, 16, 16, 12]
    after = json.loads(resumed.stdout)
    assert after["picks"] == whole["picks"]
    assert after["vectors"] == whole["vectors"]  # the digest of all vectors


def test_another_text_or_embedder_has_vectors_of_its_own(vote, base, cache, tmp_path):
    from sentence_transformers import SentenceTransformer

    assert invoke(*vote).exit_code == 0
    rows = [{"text": text} for text in [*TEXTS[:-1], "the red cat"]]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    changed = list(vote)
    changed[3] = other
    assert invoke(*changed).exit_code == 0
    model = SentenceTransformer(str(base / "encoder"))
    model[0].model.embed_tokens.weight.data += 1
    model.save(str(tmp_path / "encoder"))
    changed = list(vote)
    changed[5] = tmp_path / "encoder"
    assert invoke(*changed).exit_code == 0
    assert len(list((cache / "vectors").iterdir())) == 3


@pytest.mark.parametrize("given", ["label", "rows.txt", "rows.json", "earlier.parquet"])
def test_labelled_rows_are_not_picked(vote, tmp_path, given, monkeypatch):
    from bakeoff.selection.vote_k import VoteK

    monkeypatch.chdir(tmp_path)
    labelled = [4, 9]
    Path("rows.txt").write_text("4\n9\n")
    Path("rows.json").write_text("[9, 4]")
    pq.write_table(pa.table({"text": ["a", "b"], "row": labelled}), "earlier.parquet")
    done = invoke(*vote, "--already-labeled", given, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    vectors = encoded(Path(vote[5]).parent, TEXTS)
    expected = VoteK(8, k=5).fit(vectors, already_labeled=labelled).selected_indices_
    assert [pick["row"] for pick in answer["picks"]] == expected.tolist()
    assert answer["already_labeled"] == 2
    assert answer["rows_to_choose_from"] == N - 2
    assert "labelled before" in (tmp_path / "chosen.html").read_text()


def test_blank_rows_are_left_out_and_row_numbers_stay(base, tmp_path):
    cells: list[str | None] = [None, "", " \n", *TEXTS[:20], None, *TEXTS[20:30]]
    pq.write_table(pa.table({"body": pa.array(cells)}), tmp_path / "gaps.parquet")
    done = invoke(
        *[
            "--method",
            "kmeans",
            "--data",
            tmp_path / "gaps.parquet",
            "--embedder",
            base / "encoder",
        ],
        *["-n", 30, "--out", tmp_path / "all.parquet", "--json"],
    )
    assert done.exit_code == 0, done.output
    assert "4 rows without text in 'body' cannot be picked" in done.stderr
    assert {pick["row"] for pick in json.loads(done.stdout)["picks"]} == {
        i for i, cell in enumerate(cells) if cell and cell.strip()
    }
    chosen = pq.read_table(tmp_path / "all.parquet")
    assert all(cells[row["row"]] == row["body"] for row in chosen.to_pylist())


def test_copies_of_one_text_are_rows_of_their_own(base, tmp_path):
    pq.write_table(
        pa.table({"text": [*TEXTS[:10], *["the cat"] * 20]}), tmp_path / "copies.parquet"
    )
    done = invoke(
        *["--method", "farthest-first", "--data", tmp_path / "copies.parquet", "--embedder"],
        *[base / "encoder", "-n", 30, "--out", tmp_path / "all.jsonl"],
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line)["row"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert sorted(rows) == list(range(30))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", []),
        ("balanced-random", ["--groups", "source"]),
        ("facility-location", []),
        ("least-confidence", ["--confidence", "sure"]),
        ("vote-k-confidence", ["--confidence", "sure", "--param", "k=5"]),
        ("ideal", ["--param", "k=4"]),
        ("embedding-similarity", ["--queries"]),
        ("tf-idf", ["--queries"]),
        ("bm25", ["--queries"]),
        ("importance-resampling", ["--queries"]),
        ("longest", []),
        ("perplexity", ["--model"]),
        ("rds-plus", ["--model", "--queries"]),
    ],
)
def test_methods_get_what_they_need(method, options, base, pool, tmp_path):
    queries = tmp_path / "queries.csv"
    queries.write_text("question\nthe cat sat\na dog ran under the tree\n")
    given: list[object] = []
    for option in options:
        given.append(option)
        given += {"--queries": [queries], "--model": [base / "model"]}.get(option, [])
    out = tmp_path / "chosen.jsonl"
    start = ["--method", method, "--data", pool, "--embedder", base / "encoder", "-n", 6]
    done = invoke(*start, "--out", out, *given, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    rows = [pick["row"] for pick in answer["picks"]]
    assert len(set(rows)) == 6
    assert all(pick["reason"] for pick in answer["picks"])
    page = out.with_suffix(".html").read_text("utf-8")
    assert page.count('id="on-map-') == 6
    assert ("did not choose by these vectors" in page) == (answer["vectors"] is None)
    if method == "least-confidence":
        sure = pq.read_table(pool)["sure"].to_numpy()
        assert rows == np.argsort(sure)[:6].tolist()
    if method == "balanced-random":
        assert sum(row % 6 == 0 for row in rows) == 3
    if "--queries" in options:
        assert '<g class="query"' in page
    again = invoke(*start, "--out", out, *given, "--json")
    assert json.loads(again.stdout)["picks"] == answer["picks"]


def test_several_files_of_queries_are_tasks_that_take_turns(base, pool, tmp_path):
    from bakeoff.models import TextEncoder
    from bakeoff.selection import NearestToQueries

    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("text\nthe cat sat\nthe cat ran\na cat saw\n")
    two.write_text("text\na dog ran under the tree\n")
    start = ["--data", pool, "-n", 8, "--out", tmp_path / "chosen.jsonl", "--no-report", "--json"]
    start += ["--embedder", base / "encoder", "--queries", one, "--queries", two]
    done = invoke("--method", "embedding-similarity", *start)
    assert done.exit_code == 0, done.output
    encoder = TextEncoder(base / "encoder")
    texts = pq.read_table(pool)["text"].to_pylist()
    asked = ["the cat sat", "the cat ran", "a cat saw", "a dog ran under the tree"]
    expected = NearestToQueries(8).fit(
        encoder.encode(texts), queries=encoder.encode(asked), groups=["1", "1", "1", "2"]
    )
    rows = [pick["row"] for pick in json.loads(done.stdout)["picks"]]
    assert rows == expected.selected_indices_.tolist()
    refused = invoke("--method", "bm25", *start)
    assert refused.exit_code == 3
    assert "several tasks, which bm25 cannot tell apart" in refused.output


def test_training_samples_are_read_by_role(base, tmp_path):
    from bakeoff.data.samples import Sample
    from bakeoff.models import load_language_model
    from bakeoff.selection.text_baselines import IFDSelector

    questions, answers = TEXTS[:20], TEXTS[20:40]
    table = pa.table({"frage": questions, "antwort": answers, "text": answers})
    pq.write_table(table, tmp_path / "chat.parquet")
    done = invoke(
        *["--method", "ifd", "--data", tmp_path / "chat.parquet", "--model", base / "model"],
        *["--column", "instruction=frage", "--column", "response=antwort", "-n", 3, "--json"],
        *["--out", tmp_path / "chosen.jsonl", "--embedder", base / "encoder"],
    )
    assert done.exit_code == 0, done.output
    samples = [Sample(a, instruction=q) for q, a in zip(questions, answers, strict=True)]
    expected = IFDSelector(3, model=load_language_model(base / "model")).fit(samples)
    answer = json.loads(done.stdout)
    assert [pick["row"] for pick in answer["picks"]] == expected.selected_indices_.tolist()
    assert answer["columns"] == {"instruction": "frage", "response": "antwort"}


def test_max_rows_draws_from_the_unlabelled_and_keeps_the_labelled(vote):
    def rows(*options: object) -> list[int]:
        done = invoke(*vote, "--no-report", "--json", "--max-rows", 20, *options)
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert answer["rows_to_choose_from"] == 20
        assert "were drawn at random" in answer["notes"][0]
        return [pick["row"] for pick in answer["picks"]]

    assert rows() == rows()
    assert rows() != rows("--seed", 1)
    assert not {4, 9} & set(rows("--already-labeled", "label"))


def test_what_a_selector_warns_of_is_said_and_in_the_page(vote, tmp_path):
    done = invoke(*vote, "--param", "k=20", "--json")
    assert done.exit_code == 0, done.output
    (note,) = json.loads(done.stdout)["notes"]
    assert note.startswith("k=20 is more than a fifth of the pool of 60 rows")
    assert note in done.stderr
    assert note in (tmp_path / "chosen.html").read_text("utf-8")
    assert "UserWarning" not in done.output


def test_a_taken_column_name_is_kept_and_ours_is_numbered(vote, tmp_path):
    assert invoke(*vote, "--out", tmp_path / "first.parquet", "-n", 30).exit_code == 0
    second = list(vote)
    second[3] = tmp_path / "first.parquet"
    done = invoke(*second)
    assert done.exit_code == 0, done.output
    chosen = pq.read_table(tmp_path / "chosen.parquet")
    assert chosen.column_names[-6:] == ["pick", "row", "reason", "pick_2", "row_2", "reason_2"]
    assert chosen["pick_2"].to_pylist() == list(range(1, 9))
    first = pq.read_table(tmp_path / "first.parquet")
    assert chosen["row"].to_pylist() == first["row"].take(chosen["row_2"]).to_pylist()
    assert "ours is 'row_2'" in done.output


def test_hostile_texts_are_escaped_in_the_page(base, tmp_path):
    texts = [f"<img src=x onerror=alert({i})> cat" for i in range(8)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "<b>.parquet")
    done = invoke(
        *["--method", "kmeans", "--data", tmp_path / "<b>.parquet", "--embedder", base / "encoder"],
        *["-n", 3, "--out", tmp_path / "chosen.csv"],
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "chosen.html").read_text("utf-8")
    assert "<img" not in page
    assert "<b>.parquet" not in page
    assert "&lt;img src=x" in page


def test_without_vectors_for_a_map_the_picks_and_the_table_are_there(pool, tmp_path):
    done = invoke(
        *["--method", "longest", "--data", pool, "--embedder", tmp_path / "absent"],
        *["-n", 3, "--out", tmp_path / "chosen.csv"],
    )
    assert done.exit_code == 0, done.output
    assert "There is no map" in done.output
    page = (tmp_path / "chosen.html").read_text("utf-8")
    assert page.count('<tr id="pick-') == 3
    assert "<svg" not in page


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "fancy"], "no selection method 'fancy'; there are: "),
        (["--data", "absent.parquet"], "no such file"),
        (["-n", 61], "--number must be at most 60, the rows that can be picked, got 61"),
        (["-n", 59, "--already-labeled", "label"], "must be at most 58"),
        (["--param", "k=60"], "k must be"),
        (["--param", "fancy=1"], "takes k, rho"),
        (["--text-column", "absent"], "there is no column 'absent'"),
        (["--text-column", "id"], "column 'id' holds int"),
        (["--text-column", "tags"], "column 'tags' holds list"),
        (["--column", "response=text"], "this method reads one text"),
        (["--already-labeled", "absent"], "neither a column nor a file"),
        (["--queries", "pool.parquet"], "--queries makes no difference to vote-k"),
        (["--confidence", "sure"], "--confidence makes no difference to vote-k"),
        (["--model", "smollm2-135m"], "--model makes no difference to vote-k"),
        (["--method", "bm25"], "bm25 needs --queries"),
        (["--method", "balanced-random"], "balanced-random needs --groups"),
        (["--method", "least-confidence", "--confidence", "label"], "must hold numbers"),
        (["--out", "chosen.txt"], "--out must end in .parquet, .jsonl, .csv"),
        (["--embedder", "absent-model"], "unknown model 'absent-model'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(base, pool, tmp_path, options, message):
    given = {
        "--method": "vote-k",
        "--data": pool,
        "--embedder": base / "encoder",
        "-n": 8,
        "--out": tmp_path / "chosen.parquet",
    }
    given.update(zip(options[::2], options[1::2], strict=True))
    done = invoke(*[part for option in given.items() for part in option])
    assert done.exit_code == 3, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "chosen.parquet").exists()


def test_wrong_arguments_exit_with_2(vote):
    assert invoke(*vote, "--param", "k").exit_code == 2
    assert invoke(*vote, "-n", 0).exit_code == 2
    assert invoke("--method", "vote-k").exit_code == 2


def test_the_data_is_not_written_over(vote, pool, tmp_path):
    content = pool.read_bytes()
    done = invoke(*vote, "--out", pool)
    assert done.exit_code == 3
    assert "would replace the data" in done.output
    assert pool.read_bytes() == content
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), shards / "a.parquet")
    given = list(vote)
    given[3] = shards
    done = invoke(*given, "--out", shards / "chosen.parquet")
    assert done.exit_code == 3
    assert "would become part of the data" in done.output


def test_shards_that_differ_are_refused(vote, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    given = list(vote)
    given[3] = shards
    pq.write_table(pa.table({"text": TEXTS[:5], "id": [1, 2, 3, 4, 5]}), shards / "a.parquet")
    pq.write_table(pa.table({"text": TEXTS[5:9], "id": list("abcd")}), shards / "b.parquet")
    done = invoke(*given)
    assert done.exit_code == 3
    assert "'id' is int64 in" in done.output
    pq.write_table(pa.table({"text": TEXTS[5:9]}), shards / "b.parquet")
    done = invoke(*given)
    assert done.exit_code == 3
    assert "shards differ in their columns" in done.output


def test_help_comes_at_once_with_an_example():
    code = (
        "import sys; sys.argv = ['bakeoff', 'select', '--help']\n"
        "from bakeoff.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn', 'numpy', 'pyarrow', 'jinja2'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "Example: bakeoff select --method vote-k" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.model
def test_the_default_embedder(tmp_path, monkeypatch):
    monkeypatch.delenv("BAKEOFF_CACHE")
    data = tmp_path / "pool.csv"
    topics = [
        "The cat sat on the mat.",
        "Interest rates rose again.",
        "def add(a, b): return a + b",
    ]
    with open(data, "w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *[[f"{t} {i}"] for t in topics for i in range(5)]])
    done = invoke("--method", "kmeans", "--data", data, "-n", 3, "--out", tmp_path / "chosen.csv")
    assert done.exit_code == 0, done.output
    with open(tmp_path / "chosen.csv", newline="") as stream:
        assert {int(row["row"]) // 5 for row in csv.DictReader(stream)} == {0, 1, 2}
