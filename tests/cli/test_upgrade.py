"""`bakeoff upgrade` as a user meets it: what each finding leads to, files in and out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.embedding.small_models import WORDS, backbone_folder

from bakeoff.cli.run import Options
from bakeoff.cli.upgrade import advise, made_queries, read_queries, read_stored, upgrade
from bakeoff.embedding.upgrade import StoredIndex, evaluate_upgrade
from bakeoff.embedding.upgrade_baselines import LinearAdapter
from bakeoff.errors import DataError

RNG = np.random.default_rng(0)
MEANING = RNG.standard_normal((400, 16))
TURN = np.linalg.qr(RNG.standard_normal((16, 16)))[0]
ASKED = MEANING[:120] + 0.9 * RNG.standard_normal((120, 16))
BLURRED = MEANING[:120] + 2.5 * RNG.standard_normal((120, 16))
OTHER = RNG.standard_normal((400, 16))


def found(old, new, *, relevant=True, margin=0.03, **options):
    n = len(new[0])
    result = evaluate_upgrade(
        old, new, None, None, relevant=list(range(n)) if relevant else None, **options
    )
    return advise(result, margin=margin), result


# The advice ---------------------------------------------------------------------------------------


def test_a_compatible_model_skips():
    advice, _ = found((BLURRED, MEANING), (ASKED, MEANING + 0.001))
    assert (advice["advice"], advice["adapter"]) == ("skip re-indexing", None)
    assert advice["options"]["skip re-indexing"]["verdict"] == "equivalent"
    assert "can be skipped" in advice["reasons"][0]
    assert json.loads(json.dumps(advice, allow_nan=False)) == advice


def test_an_old_index_that_is_better_than_a_new_one_is_kept():
    advice, _ = found((BLURRED, MEANING), (ASKED, MEANING + 2 * OTHER))
    assert advice["options"]["skip re-indexing"]["verdict"] == "better"
    assert advice["advice"] == "skip re-indexing"


def test_intervals_have_the_confidence_that_was_asked_for():
    _, result = found((BLURRED, MEANING), (ASKED, MEANING + 0.5 * OTHER))
    narrow, wide = (advise(result, alpha=alpha) for alpha in (0.3, 0.01))
    for name in ("today", "skip re-indexing"):
        (low, high), (lower, higher) = (
            each["options"][name]["interval"] for each in (narrow, wide)
        )
        assert lower < low < narrow["options"][name]["difference"] < high < higher
    assert "70% interval" in " ".join(narrow["reasons"])


def test_a_rotated_model_needs_an_adapter_and_gets_the_better_one():
    advice, result = found((BLURRED, MEANING), (ASKED @ TURN, MEANING @ TURN), n_pairs=200)
    assert advice["advice"] == "adapter"
    assert advice["options"][advice["adapter"]]["verdict"] == "equivalent"
    scores = {name: advice["options"][name]["scores"]["mrr@10"] for name in ("procrustes", "ridge")}
    assert scores[advice["adapter"]] == max(scores.values())
    assert result.options[advice["adapter"]].adapter is not None


def test_an_unrelated_model_needs_the_whole_index_again():
    new = (OTHER[:120] + 0.1 * RNG.standard_normal((120, 16)), OTHER)
    advice, _ = found((BLURRED, MEANING), new)
    assert advice["advice"] == "re-index"
    verdicts = {name: option["verdict"] for name, option in advice["options"].items()}
    assert verdicts["re-index"] is None
    assert {verdicts[name] for name in verdicts if name != "re-index"} == {"worse"}
    assert "Re-indexing costs 400 texts." in advice["reasons"][-1]


def test_a_model_that_is_no_better_is_no_reason_to_change():
    advice, _ = found((ASKED, MEANING), (ASKED @ TURN, MEANING @ TURN), adapters={})
    assert advice["advice"] == "keep the old model"
    # Judged by agreement, the old model's finding the same is no statement about quality.
    advice, _ = found((ASKED, MEANING), (ASKED @ TURN, MEANING @ TURN), relevant=False, adapters={})
    assert advice["advice"] == "re-index"


def test_too_few_queries_decide_nothing_and_say_how_many_would():
    noisy = (MEANING[:12] + 0.9 * RNG.standard_normal((12, 16))) @ TURN
    old = (RNG.standard_normal((12, 16)), MEANING)
    turned = (MEANING + 0.25 * RNG.standard_normal(MEANING.shape)) @ TURN
    advice, _ = found(old, (noisy, turned), n_pairs=100, margin=1e-6)
    assert advice["advice"] == "undecided"
    assert "Undecided at 12 queries" in advice["reasons"][0]


@pytest.mark.parametrize(
    ("n", "verdict"), [(10, "undecided"), (60, "undecided"), (120, "equivalent")]
)
def test_queries_that_all_find_the_same_must_be_many(n, verdict):
    # Reciprocal ranks of all kinds, but never another one after the upgrade: no variance at all.
    asked = MEANING[:n] + 1.6 * np.random.default_rng(1).standard_normal((n, 16))
    advice, result = found((asked, MEANING), (asked, MEANING), adapters={}, margin=0.03)
    ranks = result.options["re-index"].per_query["mrr@10"]
    assert len(set(ranks.tolist())) > 2
    option = advice["options"]["skip re-indexing"]
    assert option["difference"] == 0
    low, high = option["interval"]
    assert high == -low == pytest.approx(2.7 / n, rel=0.2)
    assert option["verdict"] == verdict
    assert (option["needed_queries"] is None) == (verdict == "equivalent")
    if verdict == "undecided":
        assert 60 < option["needed_queries"] <= 120
        assert f"about {option['needed_queries']} queries would decide" in advice["reasons"][1]


def test_one_query_and_a_new_model_of_another_width():
    advice, _ = found((ASKED[:1], MEANING), (ASKED[:1, :9], MEANING[:, :9]))
    assert advice["advice"] == "undecided"
    assert "Undecided at 1 query:" in advice["reasons"][0]
    assert advice["options"]["today"]["interval"] == [None, None]
    assert "width 9, the stored ones 16" in advice["unavailable"]["skip re-indexing"]


def test_nothing_but_embedding_again_may_be_possible():
    stored = StoredIndex([str(row) for row in range(400)], MEANING)
    result = evaluate_upgrade(
        None,
        lambda texts: MEANING[[int(text) for text in texts]][:, :9],
        stored,
        ["3", "4"],
        relevant=[3, 4],
        adapters={},
    )
    advice = advise(result)
    assert list(advice["options"]) == ["re-index"]
    assert advice["advice"] == "re-index"
    assert set(advice["unavailable"]) == {"today", "skip re-indexing"}


def test_an_upgrade_that_changes_nothing_says_so():
    advice, _ = found((ASKED, MEANING), (ASKED, MEANING))
    assert advice["advice"] == "skip re-indexing"
    assert "So does the old model" in advice["reasons"][1]
    better, _ = found((BLURRED, MEANING), (ASKED, MEANING + 0.001))
    assert "old model" not in " ".join(better["reasons"])


def test_what_re_indexing_would_give_must_be_known():
    stored = StoredIndex(vectors=MEANING.astype(np.float32))
    result = evaluate_upgrade(
        None, lambda texts: ASKED[: len(texts)], stored, ["a", "b"], relevant=[0, 1]
    )
    with pytest.raises(DataError, match="re-indexing could not be tried: the index has no texts"):
        advise(result)


# Files --------------------------------------------------------------------------------------------


def test_queries_with_and_without_answers(tmp_path):
    (tmp_path / "plain.txt").write_text("one\n\ntwo\n")
    assert read_queries(tmp_path / "plain.txt").texts == ("one", "two")
    rows = [{"query": "one", "doc_id": 4}, {"query": "two", "doc_id": ["a", "b"]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_queries(tmp_path / "q.jsonl").relevant == (("4",), ("a", "b"))
    (tmp_path / "q.csv").write_text('ask,which\none,"[""a"", ""b""]"\ntwo,c\n')
    named = {"query": "ask", "relevant": "which"}
    assert read_queries(tmp_path / "q.csv", named).relevant == (("a", "b"), ("c",))
    with pytest.raises(DataError, match="has no column of queries"):
        read_queries(tmp_path / "q.csv")
    with pytest.raises(DataError, match="has no column 'nope', it has ask, which"):
        read_queries(tmp_path / "q.csv", {"query": "nope"})
    (tmp_path / "bad.jsonl").write_text('{"query": "one", "relevant": []}')
    with pytest.raises(DataError, match="no document answers this query"):
        read_queries(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="there is no"):
        read_queries(tmp_path / "none.txt")


def test_an_index_of_two_files(tmp_path):
    np.save(tmp_path / "vectors.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(DataError, match=r"one \.npy file and one file of texts .* it has 1 and 0"):
        read_stored(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"id": f"d{n}", "body": f"text {n}"}) for n in range(3))
    )
    stored = read_stored(tmp_path)
    assert stored.ids == ("d0", "d1", "d2")
    assert stored.texts[2] == "text 2"
    assert np.array_equal(stored.vectors, np.eye(3))


def test_made_queries_are_beginnings_of_their_documents():
    texts = [
        "A first sentence here. And then a good deal more of other words follows it.",
        "one two three four five six seven eight nine",
        "too short",
    ]
    made = made_queries(StoredIndex(texts, ids=("a", "b", "c")), 3)
    assert made.texts == ("A first sentence here.", "one two three")
    assert made.relevant == (("a",), ("b",))
    assert "No --queries" in made.notes[0]
    with pytest.raises(DataError, match="fewer than 8 words"):
        made_queries(StoredIndex(["too short", "as well"]), 2)
    # Of two equal documents none can be told to be the answer.
    copied = made_queries(StoredIndex([*texts, texts[1], f"{texts[1]} ten"]), 5)
    assert copied.relevant == (("0",), ("4",))


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny encoders, the second a rotation of the first, and an index."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tests.embedding.small_models import embedder
    from torch import nn

    made = tmp_path_factory.mktemp("upgrade-command")
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    old = embedder(made / "backbone", Pooling(16))
    old.save(str(made / "old"), create_model_card=False)
    dense = Dense(
        *(16, 16),
        bias=False,
        activation_function=nn.Identity(),
        init_weight=torch.from_numpy(turn),
    )
    SentenceTransformer(modules=[*old, Normalize(), dense], device="cpu").save(
        str(made / "new"), create_model_card=False
    )
    rng = np.random.default_rng(1)
    lengths = rng.integers(9, 16, size=150)
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    np.save(made / "vectors.npy", old.encode(texts))
    lines = [json.dumps({"id": f"d{n}", "text": text}) for n, text in enumerate(texts)]
    (made / "index.jsonl").write_text("\n".join(lines))
    (made / "both").mkdir()
    np.save(made / "both" / "vectors.npy", old.encode(texts))
    (made / "both" / "texts.jsonl").write_text("\n".join(lines))
    halves = [" ".join(text.split()[::2]) for text in texts[:60]]
    rows = [{"query": half, "relevant": [f"d{n}"]} for n, half in enumerate(halves)]
    (made / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def test_the_adapter_is_written_and_does_what_was_measured(folder, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    upgrade(
        str(folder / "old"),
        str(folder / "new"),
        folder / "both",
        queries=folder / "queries.jsonl",
        margin=0.06,
        out=tmp_path / "out",
        as_json=True,
    )
    printed = json.loads(capsys.readouterr().out)
    # As good a model in another space: an upgrade that nobody needs, and says so.
    assert printed["advice"] == "keep the old model"
    assert printed == json.loads((tmp_path / "out" / "upgrade.json").read_text())
    assert not (tmp_path / "out" / "adapter").exists()
    # Where the old model can no longer be asked, the adapter is the answer.
    upgrade(
        None,
        str(folder / "new"),
        folder / "both",
        queries=folder / "queries.jsonl",
        margin=0.06,
        out=tmp_path / "out",
        as_json=True,
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["advice"] == "adapter"
    # Fitted on documents that answer no query.
    assert "none that answers a query" in " ".join(printed["notes"])
    assert printed["options"]["ridge"]["texts_to_embed"] == 90
    assert printed["unavailable"]["today"]
    adapter = LinearAdapter.load(tmp_path / "out" / "adapter")
    asked = list(read_queries(folder / "queries.jsonl").texts)
    mapped = adapter.transform(SentenceTransformer(str(folder / "new")).encode(asked))
    stored = np.load(folder / "vectors.npy")
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    similarity = mapped @ stored.T
    ranks = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
    score = np.where(ranks <= 10, 1 / ranks, 0).mean()
    reported = printed["options"][printed["adapter"]]["scores"]["mrr@10"]
    assert score == pytest.approx(reported, abs=0.02)
    assert "LinearAdapter.load" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    # A later run with another advice leaves no adapter behind that nothing speaks for.
    (tmp_path / "out" / "adapter" / "mine.txt").write_text("kept")
    same = str(folder / "old")
    upgrade(same, same, folder / "both", margin=0.2, out=tmp_path / "out", as_json=True)
    assert json.loads(capsys.readouterr().out)["advice"] == "skip re-indexing"
    assert [path.name for path in (tmp_path / "out" / "adapter").iterdir()] == ["mine.txt"]


def test_an_index_in_another_order_is_noticed(folder, tmp_path, capsys, recwarn):
    (tmp_path / "texts.jsonl").write_text((folder / "both" / "texts.jsonl").read_text())
    np.save(tmp_path / "vectors.npy", 3 * np.load(folder / "vectors.npy")[::-1])
    upgrade(str(folder / "old"), str(folder / "new"), tmp_path, queries=folder / "queries.jsonl")
    shown = " ".join(capsys.readouterr().out.split())
    assert "The old model does not reproduce the stored vectors" in shown
    assert "not in the order of its texts" in shown
    assert not [one for one in recwarn if "reproduce" in str(one.message)]
    narrow = np.load(folder / "vectors.npy")[:, :7]
    np.save(tmp_path / "vectors.npy", narrow)
    with pytest.raises(DataError, match="vectors have width 16, the stored vectors 7"):
        upgrade(str(folder / "old"), str(folder / "new"), tmp_path)
    narrow[5] = np.nan
    np.save(tmp_path / "vectors.npy", narrow)
    with pytest.raises(DataError, match="the stored vectors: vector 5 is not finite"):
        upgrade(None, str(folder / "new"), tmp_path)


def test_all_documents_that_answer_a_query_are_searched(folder, capsys, monkeypatch):
    monkeypatch.setattr("bakeoff.cli.upgrade.SAMPLE", 20)
    arguments = (str(folder / "old"), str(folder / "new"), folder / "index.jsonl")
    asked = folder / "queries.jsonl"
    upgrade(*arguments, queries=asked, as_json=True)
    assert json.loads(capsys.readouterr().out)["n_documents"] == 120
    with pytest.raises(DataError, match="--sample 50: 60 documents answer the queries"):
        upgrade(*arguments, queries=asked, sample=50)


def test_three_successive_encoders_of_ours_serve_one_index_in_a_new_process(folder, tmp_path):
    import subprocess
    import sys

    from sentence_transformers.sentence_transformer.modules import Pooling
    from tests.embedding.small_models import embedder

    from bakeoff.embedding.stationary_text import (
        fit_stationary_encoder,
        slots_of,
        stationary_encoder,
    )
    from bakeoff.models import load_encoder

    lines = (folder / "index.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    labels = [max(WORDS, key=text.split().count) for text in texts]
    model = stationary_encoder(embedder(tmp_path / "base", Pooling(16)), 24)
    before = model.encode(texts)
    for number in range(3):
        if number:
            previous = load_encoder(tmp_path / f"version-{number - 1}")
            model = stationary_encoder(
                embedder(tmp_path / "base", Pooling(16)),
                24,
                slots=slots_of(previous),
                seed=number,
            )
        fit_stationary_encoder(
            model,
            texts,
            labels,
            old=str(tmp_path / f"version-{number - 1}") if number else None,
            epochs=60,
            freeze_encoder=True,
            projection_learning_rate=0.05,
        )
        model.save(str(tmp_path / f"version-{number}"), create_model_card=False)
    command = ["upgrade", "--index", str(folder / "index.jsonl"), "--margin", "0.1", "--json"]
    command += ["--queries", str(folder / "queries.jsonl")]
    command += ["--old", str(tmp_path / "version-0"), "--new", str(tmp_path / "version-2")]
    done = subprocess.run(
        [sys.executable, "-m", "bakeoff.cli.main", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    score = {
        name: option["scores"]["mrr@10"]
        for name, option in json.loads(done.stdout)["options"].items()
    }
    assert score["skip re-indexing"] > 0.08  # by chance 0.02
    # Without an update there is nothing in common: the same base, another projection.
    other = stationary_encoder(embedder(tmp_path / "base", Pooling(16)), 24, seed=2)
    unrelated = (other.encode(texts) * before).sum(axis=1).mean()
    tied = load_encoder(tmp_path / "version-2").encode(texts)
    stored = load_encoder(tmp_path / "version-0").encode(texts)
    assert (tied * stored).sum(axis=1).mean() > unrelated + 0.2


def test_the_same_model_skips_on_made_queries_and_a_sample(folder, capsys):
    old = str(folder / "old")
    upgrade(old, old, folder / "index.jsonl", sample=80, margin=0.1)
    shown = capsys.readouterr().out
    assert "Re-indexing can be skipped" in shown
    assert "80 of 150 documents were searched" in " ".join(shown.split())
    assert "No --queries: 40 beginnings" in " ".join(shown.split())
    assert "re-index: new model, everything embedded again" in shown
    table = [line for line in shown.splitlines() if line.lstrip().startswith("mrr@10 ")]
    assert [line.split()[1:3] for line in table] == [["against", "re-indexing"]]


def test_without_a_terminal_no_line_is_broken(folder, capsys):
    old, queries = str(folder / "old"), folder / "asked.txt"
    texts = [json.loads(line)["text"] for line in (folder / "index.jsonl").open(encoding="utf-8")]
    queries.write_text("\n".join(texts[:20]), encoding="utf-8")
    upgrade(old, old, folder / "index.jsonl", queries=queries)
    shown = capsys.readouterr()
    assert shown.err == "reading the index\n"
    (row,) = [line for line in shown.out.splitlines() if line.startswith("skip re-indexing  ")]
    assert "(-" in row
    assert row.index(" to ") < row.index(")") < row.index("undecided")


def test_bad_arguments_are_refused(folder, tmp_path):
    old = str(folder / "old")
    (tmp_path / "head.csv").write_text("id,text\n")
    with pytest.raises(DataError, match=r"head\.csv: the file has no row"):
        upgrade(old, old, tmp_path / "head.csv")
    with pytest.raises(
        DataError, match="--margin must be between 0 and 1, as the measure is, got 0"
    ):
        upgrade(old, old, folder / "index.jsonl", margin=0)
    with pytest.raises(DataError, match=r"--out .*vectors\.npy is a file; give a folder"):
        upgrade(old, old, folder / "index.jsonl", out=folder / "vectors.npy")
    with pytest.raises(DataError, match="--column: roles are text, vector, id, query, relevant"):
        upgrade(old, old, folder / "index.jsonl", columns={"label": "x"})
    with pytest.raises(DataError, match=r"--old is missing, and .*index\.jsonl holds no vectors"):
        upgrade(None, old, folder / "index.jsonl")
    with pytest.raises(DataError, match="holds no texts"):
        upgrade(old, old, folder / "vectors.npy")
    with pytest.raises(DataError, match="there is no"):
        upgrade(old, old, tmp_path / "none.jsonl")


# The contest --------------------------------------------------------------------------------------


def test_the_contest_takes_options(folder, tmp_path):
    from rich.console import Console

    from bakeoff.cli.run_embedding_upgrades import contest

    backbone_folder(tmp_path / "encoder")
    rng = np.random.default_rng(2)
    rows = ["text,label"]
    for number in range(8):
        for _ in range(12):
            words = [WORDS[number]] * 4 + list(rng.choice(WORDS, 5))
            rows.append(f"{' '.join(rng.permutation(words))},c{number}")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    options = Options(
        data=(tmp_path / "mine.csv",), base=str(tmp_path / "encoder"), question="upgrades", steps=2
    )
    found = contest(options, Console(quiet=True))
    assert found.problem.steps == 2
    assert len(found.chosen) == len(found.known) == 14
    whole = Options(**{**vars(options), "train": "full"})
    names = [design.name for design in contest(whole, Console(quiet=True)).chosen]
    assert "stationary" in names
    assert "replay" not in names
    for wrong, message in (
        ({"tokens": 5}, "--tokens makes no difference to upgrades"),
        ({"train": "lora"}, "--train for upgrades is head or full"),
        ({"designs": "nope"}, "does not begin with a design or method name"),
    ):
        with pytest.raises(DataError, match=message):
            contest(Options(**{**vars(options), **wrong}), Console(quiet=True))
