"""Encoders for several domains under one protocol: judged as defined, equal at first, exported."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sklearn.metrics import roc_auc_score
from tests.embedding.tiny_domains import (
    DOMAINS,
    graph,
    pairs,
    problem,
    save_decoder,
    save_encoder,
    write_graph,
)

from bakeoff._files import folder_name
from bakeoff.data.citations import CitationGraph, LabelledPairs
from bakeoff.embedding.cocitation_training import CoCitationHistory
from bakeoff.embedding.domain_encoder import with_domains
from bakeoff.embedding.domain_experts import experts_of, routing_loss
from bakeoff.embedding.pair_scores import f1_max
from bakeoff.embedding.problem.domain_pairs import (
    DomainJudge,
    DomainPairs,
    cosine_similarities,
    domain_pairs_default,
    f1_influences,
    placement_values,
    word_similarities,
)
from bakeoff.embedding.problem.domains import (
    DOMAIN_ENCODER_METRICS,
    DomainEncoderProblem,
    domain_encoder_designs,
    shared_out,
)
from bakeoff.embedding.ranking_losses import MNRLoss, MNRPlusLoss
from bakeoff.errors import BakeoffError, DataError
from bakeoff.study import Design, Work

ALL = {design.name: design for design in domain_encoder_designs()}
TRAINED = [name for name, d in ALL.items() if d.method not in ("untrained", "tf-idf", "bm25")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("domains"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))


def run(problem, design, seed, folder):
    folder.mkdir(parents=True)
    return problem.run(design, seed, Work(folder))


def means(trial):
    return {
        (metric, domain): units.mean()
        for metric, tasks in trial.scores.items()
        for domain, units in tasks.items()
    }


def same(a, b, tolerance=0.0):
    assert a.scores.keys() == b.scores.keys()
    for metric, tasks in a.scores.items():
        assert tasks.keys() == b.scores[metric].keys()
        for domain, units in tasks.items():
            assert np.abs(units - b.scores[metric][domain]).max() <= tolerance


# --- judging ----------------------------------------------------------------------------------


def made_pairs(rng, n_documents=12, n=14):
    found = set()
    while len(found) < 2 * n:
        a, b = sorted(rng.choice(n_documents, 2, replace=False).tolist())
        found.add((f"text {a}", f"text {b}"))
    chosen = sorted(found)
    rng.shuffle(chosen)
    labels = np.repeat([1, 0], n)
    first, second = zip(*chosen, strict=True)
    return LabelledPairs(first, second, labels, ("d",) * 2 * n)


@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_what_their_definitions_say(ties):
    rng = np.random.default_rng(1)
    labelled = made_pairs(rng)
    related = frozenset({("text 0", "text 5"), ("text 1", "unknown")})
    judge = DomainJudge(labelled, related)
    n = len(judge.documents)
    matrix = rng.normal(size=(n, n))
    matrix = np.round(matrix + matrix.T, 0 if ties else 9)
    scores = judge.scores(lambda rows: matrix[rows])

    at = {text: row for row, text in enumerate(judge.documents)}
    positives = [
        (at[a], at[b])
        for a, b, label in zip(labelled.texts_a, labelled.texts_b, labelled.labels, strict=True)
        if label
    ]
    belongs = {frozenset(pair) for pair in positives} | {frozenset((at["text 0"], at["text 5"]))}

    def reciprocal_rank(asked, partner):
        rank = 1.0
        for other in range(n):
            if other in (asked, partner) or frozenset((asked, other)) in belongs:
                continue
            rank += (matrix[asked, other] > matrix[asked, partner]) + 0.5 * (
                matrix[asked, other] == matrix[asked, partner]
            )
        return 1 / rank

    expected = [(reciprocal_rank(a, b) + reciprocal_rank(b, a)) / 2 for a, b in positives]
    assert scores["mrr"] == pytest.approx(expected)
    of_pairs = np.array(
        [matrix[at[a], at[b]] for a, b in zip(labelled.texts_a, labelled.texts_b, strict=True)]
    )
    assert len(scores["auc"]) == len(positives)
    assert scores["auc"].mean() == pytest.approx(roc_auc_score(labelled.labels, of_pairs))
    scaled = of_pairs / np.abs(of_pairs).max()
    assert scores["f1"].mean() == pytest.approx(f1_max(scaled, labelled.labels)[0])
    assert len(scores["f1"]) == len(labelled)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    judge = DomainJudge(made_pairs(rng))
    matrix = rng.normal(size=(len(judge.documents),) * 2)
    whole = judge.scores(lambda rows: matrix[rows])
    monkeypatch.setattr("bakeoff.embedding.problem.domain_pairs._BLOCK_ENTRIES", 30)
    sizes = []
    parts = judge.scores(lambda rows: sizes.append(len(rows)) or matrix[rows])
    assert max(sizes) <= 2
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.lists(st.integers(0, 6), min_size=1))
def test_placement_values_are_shares_of_pairs(positive, negative):
    expected = [np.mean([(p > q) + 0.5 * (p == q) for q in negative]) for p in positive]
    found = placement_values(np.array(positive, float), np.array(negative, float))
    assert found == pytest.approx(expected)


def test_f1_influences_have_the_spread_of_f1():
    # Drawn again and again, F1max varies as the spread of the influences says.
    rng = np.random.default_rng(3)
    labels = np.repeat([1, 0], 200)

    def drawn():
        return np.tanh(rng.normal(size=400) + 0.8 * labels)

    units = f1_influences(drawn(), labels)
    values = [f1_max(drawn(), labels)[0] for _ in range(300)]
    # Influences allow for the shares of labels to vary too, which they do not here.
    assert np.std(values) == pytest.approx(units.std() / np.sqrt(len(units)), rel=0.5)
    assert f1_influences(100 * np.arctanh(drawn()), labels).mean() > 0.6


def test_all_alike_is_chance():
    judge = DomainJudge(made_pairs(np.random.default_rng(4)))
    scores = judge.scores(lambda rows: np.zeros((len(rows), len(judge.documents))))
    assert scores["auc"].mean() == 0.5
    assert scores["f1"].mean() == pytest.approx(2 / 3)


def test_a_domain_with_one_label_is_refused():
    labelled = LabelledPairs(("a",), ("b",), np.array([1]), ("d",))
    with pytest.raises(DataError, match="positive and negative pairs"):
        DomainJudge(labelled)


def test_cosines():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    vectors[2] = 0
    found = cosine_similarities(vectors)(np.array([1, 2]))
    a, b = vectors[1].astype(float), vectors[3].astype(float)
    assert found[0, 3] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert not found[1].any()


# --- words ------------------------------------------------------------------------------------

TEXTS = ["Read a file, a line.", "write a FILE", "open a socket", "close it", "read it by line"]


def test_bm25_is_its_formula_in_both_directions():
    more = ["close the file", "read"]
    found = word_similarities("bm25", TEXTS, more)(np.arange(5))
    words = [re.findall(r"\w+", text.lower()) for text in TEXTS + more]
    mean = np.mean([len(text) for text in words])

    def one_way(query, document):
        total = 0.0
        for word in query:
            n = sum(word in text for text in words)
            idf = np.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            tf = document.count(word)
            total += idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(document) / mean))
        return total

    for i, a in enumerate(words[:5]):
        for j, b in enumerate(words[:5]):
            assert found[i, j] == pytest.approx((one_way(a, b) + one_way(b, a)) / 2)


def test_bm25_is_that_of_bm25s():
    # BM25(k1=1.5, b=0.75, method="lucene").get_scores of bm25s 0.3.16, each text as query.
    theirs = np.array(
        [
            [1.402031, 0.825065, 0.455301, 0, 0.648849],
            [0.556521, 1.182930, 0.227651, 0, 0],
            [0.267531, 0.227651, 1.398682, 0, 0],
            [0, 0, 0, 1.110468, 0.324424],
            [0.577979, 0, 0, 0.429833, 1.486995],
        ]
    )
    ours = word_similarities("bm25", TEXTS, [])(np.arange(5))
    # bm25s leaves out the constant factor k1 + 1.
    assert ours == pytest.approx(2.5 * (theirs + theirs.T) / 2, rel=1e-5)


def test_tf_idf_is_its_formula():
    more = ["close the file", "read"]
    found = word_similarities("tf-idf", TEXTS, more)(np.arange(5))
    words = [re.findall(r"\w+", text.lower()) for text in TEXTS + more]
    known = sorted({word for text in words for word in text})
    idf = {word: 1 + np.log(8 / (1 + sum(word in text for text in words))) for word in known}
    vectors = np.array(
        [
            [idf[w] * (1 + np.log(text.count(w))) if w in text else 0.0 for w in known]
            for text in words[:5]
        ]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert found == pytest.approx(vectors @ vectors.T)


def test_tf_idf_and_texts_without_words():
    found = word_similarities("tf-idf", TEXTS, [])(np.arange(5))
    assert np.diag(found) == pytest.approx(np.ones(5))
    assert found[1, 3] == 0 < found[0, 1]
    for kind in ("tf-idf", "bm25"):
        assert not word_similarities(kind, ["...", "!"], [])(np.arange(2)).any()


@pytest.mark.parametrize("name", ["TF-IDF", "BM25"])
def test_words_are_weighed_in_the_domains_training_texts_too(encoder, tmp_path, name):
    made = problem(encoder)
    trial = run(made, ALL[name], 0, tmp_path / "a")
    for train in made.data.split.train:
        test = made.data.split.test.of_domain(train.group)
        judge = DomainJudge(test, made.data.related[train.group])
        found = word_similarities(
            ALL[name].method, judge.documents, [*train.queries, *train.positives]
        )
        for metric, units in judge.scores(found).items():
            assert np.array_equal(trial.scores[metric][train.group], units)


# --- data -------------------------------------------------------------------------------------


def test_pairs_of_a_graph_know_what_is_no_wrong_answer():
    made = graph()
    numbers = {key: int(key[4:]) for key in made.texts}
    groups = {key: f"source {number // 6}" for key, number in numbers.items() if number % 6 < 2}
    data = DomainPairs.from_graph(replace(made, groups=groups), test=0.3, validation=0.3)
    assert data.domains == DOMAINS
    by_text = {text: key for key, text in made.texts.items()}
    citing = [set(cited) for cited in made.references.values()]
    for part, (domain, found) in product(
        (data.split.test, data.split.validation), data.related.items()
    ):
        own = part.of_domain(domain)
        judged = {*own.texts_a, *own.texts_b}
        for a in judged:
            for b in judged:
                if a < b:
                    keys = {by_text[a], by_text[b]}
                    sources = {groups.get(key, key) for key in keys}
                    together = any(
                        sources <= {groups.get(key, key) for key in cited} for cited in citing
                    )
                    assert ((a, b) in found or (b, a) in found) == (together or len(sources) == 1)


def test_pairs_are_saved_and_sampled(tmp_path):
    data = pairs()
    data.save(tmp_path / "pairs.json")
    again = DomainPairs.load(tmp_path / "pairs.json")
    assert again.fingerprint() == data.fingerprint()
    assert replace(data, related={}).fingerprint() != data.fingerprint()
    few = data.smaller(domains=1, train=3, judged=2)
    assert few.domains == DOMAINS[:1]
    assert len(few.split.train[0]) == 3
    assert few.split.test.labels.tolist() == [1, 1, 0, 0]


def test_the_domains_with_most_pairs_are_kept():
    made = graph()
    ids = [key for key in made.texts if key.startswith("dogs")]
    fewer = {key: value for key, value in made.references.items() if "dogs" not in value[0]}
    fewer |= {f"few {first}": ids[first : first + 4] for first in range(0, 60, 4)}
    few = DomainPairs.from_graph(
        CitationGraph("x", fewer, made.texts, made.domains),
        max_domains=1,
        test=0.3,
        validation=0.3,
    )
    assert few.domains == ("cats",)
    assert set(few.split.test.domains) == set(few.split.validation.domains) == {"cats"}
    assert few.split.notes[-1] == "1 domain kept, with most training pairs; left out: 'dogs'."
    with pytest.raises(DataError, match="max_domains must be at least 1"):
        DomainPairs.from_graph(made, max_domains=0)


def test_default_pairs_are_made_once(monkeypatch):
    calls = []

    def library(*, areas):
        calls.append(areas)
        return graph(300)

    monkeypatch.setattr("bakeoff.data.citation_graphs.standard_library_graph", library)
    for size in ("demo", "smoke", "demo", "smoke"):
        domain_pairs_default(size)
    assert calls == [None, ("network", "numbers and types")]  # little is read for a smoke test
    demo, smoke = domain_pairs_default("demo"), domain_pairs_default("smoke")
    assert len(smoke.split.test) < len(demo.split.test)
    assert max(len(group) for group in smoke.split.train) <= 60
    with pytest.raises(DataError, match="size must be one of smoke, demo, full, got 'huge'"):
        domain_pairs_default("huge")


# --- trials -----------------------------------------------------------------------------------


# A new pooling, and a prompt before the text, change the vectors at once.
@pytest.mark.parametrize(
    "name", [name for name in TRAINED if "paper" not in name and "prompts" not in name]
)
def test_without_learning_every_design_is_the_untrained_encoder(encoder, tmp_path, name):
    still = problem(encoder, learning_rates=(1e-12,), keep_models=False)
    plain = run(still, ALL["untrained"], 0, tmp_path / "a")
    design = ALL[name]
    if design.params.get("routing") == "topk":  # whose weights do not sum to 1
        design = Design("all experts", "domain-experts", {"routing": "token_topk", "top_k": 2})
    same(run(still, design, 0, tmp_path / "b"), plain, 1e-3)


@pytest.mark.parametrize("name", ALL)
def test_every_design_runs_and_says_the_same_again(encoder, tmp_path, name):
    made = problem(encoder, steps=2, keep_models=False)
    first = run(made, ALL[name], 1, tmp_path / "a")
    assert set(first.scores) == set(made.metrics) == set(DOMAIN_ENCODER_METRICS)
    for metric, tasks in first.scores.items():
        assert tuple(tasks) == DOMAINS
        for domain, units in tasks.items():
            test = made.data.split.test.of_domain(domain)
            assert len(units) == (len(test) if metric == "f1" else int(test.labels.sum()))
            assert np.isfinite(units).all()
    again = run(pickle.loads(pickle.dumps(made)), ALL[name], 1, tmp_path / "b")
    same(first, again)
    assert first.artifact is None
    json.dumps(dict(first.cost))


def test_training_changes_the_scores_and_seeds_differ(encoder, tmp_path):
    made = problem(encoder, keep_models=False)
    trials = [run(made, ALL["domain experts"], seed, tmp_path / str(seed)) for seed in (0, 1)]
    plain = run(made, ALL["untrained"], 0, tmp_path / "plain")
    assert means(trials[0]) != means(trials[1])
    assert means(trials[0]) != means(plain)


def test_training_finds_partners(encoder, tmp_path):
    # Texts of a pair share a word that no other pair has; judged by the very pairs.
    words = ("cat", "dog", "red", "mat", "tree", "sat", "find", "under")
    rows = [(word, f"{word} a", f"on the {word}") for word in words]
    data = pairs()
    train = tuple(
        type(group)(tuple(a for _, a, _ in rows), tuple(b for *_, b in rows), group=group.group)
        for group in data.split.train
    )
    test = [(a, b, 1) for _, a, b in rows]
    test += [(a, b, 0) for w, a, _ in rows for x, _, b in rows if w != x][: len(rows)]
    labelled = LabelledPairs(
        tuple(a for a, *_ in test) * 2,
        tuple(b for _, b, _ in test) * 2,
        np.array([label for *_, label in test] * 2),
        ("cats",) * len(test) + ("dogs",) * len(test),
    )
    split = replace(data.split, train=train, validation=labelled, test=labelled)
    made = problem(encoder, data=DomainPairs(split), steps=200, batch_size=8)
    plain = means(run(made, ALL["untrained"], 0, tmp_path / "plain"))
    for name in ("domain experts", "shared, domain tokens", "single-domain", "LoRA per domain"):
        own = {"scale": 5.0, "learning_rate": 3e-3}
        design = Design(name, ALL[name].method, {**ALL[name].params, **own})
        trained = means(run(made, design, 0, tmp_path / name))
        for metric in ("mrr", "auc"):
            for domain in DOMAINS:
                assert trained[metric, domain] > plain[metric, domain] + 0.1


def test_costs_count_what_is_trained_hosted_and_used(encoder, tmp_path):
    made = problem(encoder, keep_models=False)
    cost = {
        name: run(made, ALL[name], 0, tmp_path / name).cost
        for name in ("shared", "domain experts", "single-domain", "LoRA per domain", "wider",
                     "domain experts, middle layer", "untrained", "BM25")
    }  # fmt: skip
    dense = cost["shared"]["total_parameters"]
    block = 2 * 16 * 24 + 24 + 16
    tokens = 2 * 16
    assert cost["domain experts"]["total_parameters"] == dense + tokens + 3 * block
    assert cost["domain experts"]["active_parameters"] == dense + tokens
    assert cost["domain experts, middle layer"]["total_parameters"] == dense + tokens + block
    assert cost["wider"]["total_parameters"] == dense + tokens + 3 * (block - 16)
    assert cost["wider"]["active_parameters"] == cost["wider"]["total_parameters"]
    assert cost["single-domain"]["total_parameters"] == 2 * dense
    assert cost["single-domain"]["active_parameters"] == dense
    linear = 4 * 8 * (16 + 16) + 2 * 8 * (16 + 24)  # of a layer, at rank 8
    assert cost["LoRA per domain"]["trained_parameters"] == 2 * 3 * linear
    assert cost["LoRA per domain"]["total_parameters"] == dense + 2 * 3 * linear
    assert cost["LoRA per domain"]["active_parameters"] == dense + 3 * linear
    for name in ("shared", "domain experts", "single-domain", "LoRA per domain", "wider"):
        assert cost[name]["training_pairs"] == 4 * 4
    flops = {name: found.get("forward_flops_per_text") for name, found in cost.items()}
    assert flops["domain experts"] == flops["shared"] == flops["untrained"] < flops["wider"]
    assert cost["untrained"]["trained_parameters"] == cost["BM25"]["trained_parameters"] == 0


def test_the_wrong_domain_is_the_same_by_itself_and_beside_the_right_one(
    encoder, tmp_path, monkeypatch
):
    right, wrong = ALL["domain experts"], ALL["domain experts, wrong domain"]
    made = problem(encoder)
    alone = run(made, wrong, 0, tmp_path / "alone")
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "other cache"))
    made = problem(encoder)
    made.prepare([right, wrong], [0], Work(tmp_path))
    own = run(made, right, 0, tmp_path / "right")
    monkeypatch.setattr(made, "_trained", None)  # nothing is trained a second time
    beside = run(made, wrong, 0, tmp_path / "beside")
    same(alone, beside)
    assert means(own) != means(beside)
    assert beside.artifact is None
    assert beside.notes == ("Every text was taken for one of another domain: cats as dogs, dogs as "
                            "cats.",)  # fmt: skip


def trained_with(made, design, monkeypatch, folder, seed=3):
    """Return what each training of a design was asked for."""
    asked = []

    def note(model, groups, validation, **options):
        asked.append((model, groups, validation, options))
        return CoCitationHistory((), (), (), 0, False, 0)

    with monkeypatch.context() as patch:
        patch.setattr("bakeoff.embedding.cocitation_training.train_cocitation", note)
        run(made, design, seed, folder)
    return asked


def test_designs_train_as_they_say(encoder, tmp_path, monkeypatch):
    made = problem(encoder, keep_models=False, evaluate_every=2)
    split = made.data.split
    for number, name in enumerate(TRAINED):
        design = ALL[name]
        asked = trained_with(made, design, monkeypatch, tmp_path / str(number))
        alone = design.method in ("single-domain", "lora-per-domain")
        assert len(asked) == (2 if alone else 1)
        prompts = "prompts" in name
        for domain, (model, groups, validation, options) in zip(DOMAINS, asked, strict=False):
            loss = options["loss"]
            dots = "dot products" in name or "paper" in name
            assert type(loss) is MNRPlusLoss
            assert (loss.scale, loss.normalize) == ((1.0, False) if dots else (20.0, True))
            assert options["batching"] == ("by-domain" if "batches" in name else "mixed")
            rate = 0.1 if design.method == "lora-per-domain" else 0.01
            assert options["learning_rate"] == pytest.approx(rate)
            assert options["patience"] > options["steps"] // 2  # never too early
            assert (options["seed"], options["evaluate_every"]) == (3, 2)
            kinds = [type(module).__name__ for module in model]
            last = ["TanhPooling"] if "paper" in name else ["Pooling", "Normalize"]
            assert kinds[1:] == (["Pooling"] if "dot products" in name else last)
            own = [group for group in split.train if not alone or group.group == domain]
            judged = split.validation.of_domain(domain) if alone else split.validation
            assert [group.group for group in groups] == [group.group for group in own]
            for group, plain in zip(groups, own, strict=True):
                told = f"{group.group}: " if prompts else ""
                assert group.queries == tuple(told + text for text in plain.queries)
                assert group.positives == tuple(told + text for text in plain.positives)
            for found, plain in ((validation.texts_a, judged.texts_a),
                                 (validation.texts_b, judged.texts_b)):  # fmt: skip
                told = [f"{name}: " if prompts else "" for name in judged.domains]
                assert found == tuple(a + b for a, b in zip(told, plain, strict=True))
            config = experts_of(model[0].auto_model) if not alone else None
            assert (config is not None) == (design.method == "domain-experts")
            if config is not None:
                assert config.layers == ((1,) if "middle" in name else "all")
            auxiliary = options["auxiliary"]
            learned = design.params.get("routing", "enforced") != "enforced"
            assert (auxiliary is not None) == learned
            if auxiliary is not None:
                model(model.preprocess(with_domains(["the cat", "dog"], DOMAINS)))
                ids = torch.tensor([0, 1])
                expected = 0.01 * routing_loss(model[0].auto_model, ids)
                assert torch.isclose(auxiliary(ids), expected)
    design = Design("x", "shared", {"loss": "mnr", "scale": 7.0})
    (only,) = trained_with(problem(encoder), design, monkeypatch, tmp_path / "x")
    assert type(only[3]["loss"]) is MNRLoss
    assert only[3]["loss"].scale == 7.0
    assert only[2] is None  # without evaluations the last weights are kept


def test_new_weights_are_drawn_by_the_seed(encoder, tmp_path, monkeypatch):
    made = problem(encoder, keep_models=False)
    for name in ("LoRA per domain", "domain experts, the paper's pooling", "domain experts, switch",
                 "wider"):  # fmt: skip
        states = []
        for number, seed in enumerate((0, 0, 1)):
            folder = tmp_path / name / str(number)
            (model, *_), *_ = trained_with(made, ALL[name], monkeypatch, folder, seed)
            states.append(model.state_dict())
        first, again, other = states
        assert all(torch.equal(value, again[key]) for key, value in first.items())
        assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_rates_are_looked_for_by_validation_documents_of_each_design(
    encoder, tmp_path, monkeypatch
):
    made = problem(encoder, learning_rates=(3e-3, 1e-12), keep_models=False)
    judges = made._judges("validation")
    trained, seen = made._trained, []

    def note(design, rate, steps, seed, documents, progress, **options):
        seen.append((design.name, rate, steps))
        assert documents == {domain: judge.documents for domain, judge in judges.items()}
        return trained(design, rate, steps, seed, documents, progress, **options)

    monkeypatch.setattr(made, "_trained", note)
    for name in ("shared", "wider"):
        assert made._rate(ALL[name], Work(tmp_path)) in made.learning_rates
    assert seen == [(name, rate, 2) for name in ("shared", "wider") for rate in (1e-12, 3e-3)]


def test_nothing_in_the_cache_is_taken_for_something_else(encoder, tmp_path, monkeypatch):
    wrong = ALL["domain experts, wrong domain"]
    asked = [
        ({}, ALL["untrained"], 0),
        ({"max_length": 4}, ALL["untrained"], 0),
        ({"n_layers": 1}, ALL["untrained"], 0),
        ({"data": pairs(seed=1)}, ALL["untrained"], 0),
        ({}, wrong, 0),
        ({}, wrong, 1),
        ({"steps": 2}, wrong, 0),
    ]

    def all_of_them(folder):
        return [
            run(problem(encoder, keep_models=False, **changes), design, seed, folder / str(number))
            for number, (changes, design, seed) in enumerate(asked)
        ]

    one_cache = all_of_them(tmp_path / "one")
    for number, (changes, design, seed) in enumerate(asked):
        monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / f"cache {number}"))
        own = run(problem(encoder, keep_models=False, **changes), design, seed,
                  tmp_path / f"own {number}")  # fmt: skip
        same(one_cache[number], own)
    assert len({str(means(trial)) for trial in one_cache}) == len(asked)


def test_the_first_layers_are_kept(encoder):
    whole, short = problem(encoder)._base[0].auto_model, problem(encoder, n_layers=2)._base[0]
    assert len(short.auto_model.encoder.layer) == 2
    for own, first in zip(short.auto_model.encoder.layer, whole.encoder.layer[:2], strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(own.parameters(), first.parameters(), strict=True)
        )


def test_a_rate_is_chosen_on_validation_pairs_once(encoder, tmp_path, monkeypatch):
    made = problem(encoder, learning_rates=(3e-3, 1e-12), steps=4, keep_models=False)
    tried = []

    def judged(vectors, part="test"):
        tried.append(part)
        return {"mrr": {"cats": np.array([1.0 if len(tried) == 2 else 0.5])}}

    with monkeypatch.context() as patch:
        patch.setattr(made, "_judged", judged)
        assert made._rate(ALL["shared"], Work(tmp_path)) == 3e-3
    assert tried == ["validation"] * 2
    trial = run(made, ALL["shared"], 0, tmp_path / "a")
    assert trial.notes == ("Learning rate 0.003, by MRR on validation pairs.",)
    fixed = problem(encoder, learning_rates=(3e-3,), keep_models=False)
    same(trial, run(fixed, ALL["shared"], 0, tmp_path / "b"))
    own = Design("own rate", "shared", {"learning_rate": 3e-3})
    same(trial, run(made, own, 0, tmp_path / "c"))


def test_the_best_evaluation_is_kept(encoder, tmp_path):
    made = problem(encoder, steps=3, evaluate_every=1, keep_models=False)
    for name in ("domain experts", "shared, prompts", "LoRA per domain"):
        run(made, ALL[name], 0, tmp_path / name)
    assert "by F1max on validation pairs the best" in made.describe()["budget"]


def test_texts_that_are_cut_are_counted(encoder, tmp_path):
    made = problem(encoder, max_length=4)
    judges = [DomainJudge(made.data.split.test.of_domain(domain)) for domain in DOMAINS]
    texts = [text for judge in judges for text in judge.documents]
    n_cut = sum(len(text.split()) + 2 > 4 for text in texts)
    trial = run(made, ALL["untrained"], 0, tmp_path / "a")
    assert trial.notes == (f"{n_cut} of {len(texts)} texts were cut at 4 tokens.",)


def test_divergence_is_told_with_the_rate(encoder, tmp_path):
    made = problem(encoder, learning_rates=(1e30,), steps=6, keep_models=False)
    with pytest.raises(BakeoffError, match=r"'shared': .*try learning rates below 1e\+30"):
        run(made, ALL["shared"], 0, tmp_path / "a")


def test_fewer_layers_and_a_decoder_as_base(encoder, tmp_path):
    short = problem(encoder, n_layers=1, keep_models=False)
    whole = problem(encoder, keep_models=False)
    assert short.fingerprint() != whole.fingerprint()
    name = "domain experts, middle layer"
    assert (
        run(short, ALL[name], 0, tmp_path / "a").cost["total_parameters"]
        < run(whole, ALL[name], 0, tmp_path / "b").cost["total_parameters"]
    )
    with pytest.raises(DataError, match="n_layers is 9, but the base model has 3 layers"):
        run(problem(encoder, n_layers=9), ALL["untrained"], 0, tmp_path / "c")
    decoder = problem(save_decoder(tmp_path / "decoder"), keep_models=False)
    for name in ("untrained", "domain experts", "LoRA per domain"):
        trial = run(decoder, ALL[name], 0, tmp_path / f"decoder {name}")
        assert np.isfinite(list(means(trial).values())).all()


# --- the winner leaves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["domain experts", "shared", "shared, prompts", "single-domain", "LoRA per domain", "wider",
     "domain experts, the paper's pooling", "untrained"],
)  # fmt: skip
def test_an_exported_winner_scores_what_its_trial_did(encoder, tmp_path, name):
    made = problem(encoder, n_layers=2)
    trial = run(made, ALL[name], 0, tmp_path / "trial")
    out = tmp_path / "winner"
    stock = made.export(ALL[name], trial.artifact, out, reason="It won.")
    facts = json.loads((out / "domains.json").read_text())
    for domain in DOMAINS:
        judge = DomainJudge(made.data.split.test.of_domain(domain), made.data.related[domain])
        folder = out / facts["folders"][domain] if facts["kind"] == "models" else out
        folder = out / "base" if facts["kind"] == "adapters" else folder
        model = SentenceTransformer(str(folder), trust_remote_code=not stock)
        if facts["kind"] == "adapters":
            model[0].auto_model.load_adapter(str(out / facts["folders"][domain]))
        told = {"domain": domain} if facts["takes_domain"] else {}
        told |= {"prompt_name": domain} if facts["prompts"] else {}
        vectors = model.encode(list(judge.documents), **told)
        for metric, units in judge.scores(cosine_similarities(vectors)).items():
            assert units == pytest.approx(trial.scores[metric][domain], abs=0.02)
    assert "It won." in (out / "README.md").read_text()
    assert stock == (name in ("shared", "shared, prompts", "single-domain", "LoRA per domain",
                              "untrained"))  # fmt: skip
    assert made.export(ALL[name], trial.artifact, out) == stock  # replaced


@pytest.mark.parametrize("name", ["shared, prompts", "LoRA per domain", "single-domain"])
def test_usage_runs_without_bakeoff(encoder, tmp_path, name):
    made = problem(encoder)
    trial = run(made, ALL[name], 0, tmp_path / "trial")
    made.export(ALL[name], trial.artifact, tmp_path / "winner")
    lines = ["import sys; sys.modules['bakeoff'] = None", *made.usage(tmp_path / "winner")]
    code = "\n".join([*lines, "print(vectors.shape)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(1, 16)"], done.stderr


def test_usage_of_experts_runs(encoder, tmp_path):
    made = problem(encoder)
    trial = run(made, ALL["domain experts"], 0, tmp_path / "trial")
    made.export(ALL["domain experts"], trial.artifact, tmp_path / "winner")
    names = {}
    exec("\n".join(made.usage(tmp_path / "winner")), names)
    assert names["vectors"].shape == (1, 16)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("nope", {}, "there are: domain-experts, shared"),
        ("shared", {"layers": "middle"}, "shared takes .*; got layers"),
        ("domain-experts", {"routing": "random"}, "routing must be one of enforced"),
        ("domain-experts", {"layers": []}, "layers must be all, middle, or a list"),
        ("domain-experts", {"layers": [3]}, r"layers must be from -3 to 2, got \[3\]"),
        ("domain-experts", {"routing": "topk", "top_k": 3}, "top_k must be at most 2"),
        ("domain-experts", {"top_k": 2}, "top_k is for routing"),
        ("domain-experts", {"loss": "triplet"}, "loss must be one of mnr, mnr+"),
        ("domain-experts", {"learning_rate": 0}, "learning_rate must be above 0"),
        (
            "domain-experts",
            {"judged_as": "wrong", "tokens": False, "routing": "switch"},
            "nothing in it knows the domain",
        ),
        ("shared", {"tokens": True, "prompts": True}, "give tokens or prompts, not both"),
        ("lora-per-domain", {"rank": 0}, "rank must be an integer of at least 1"),
        ("untrained", {"loss": "mnr"}, "untrained takes no parameters; got loss"),
    ],
)
def test_designs_that_cannot_run_are_refused(encoder, method, params, message):
    with pytest.raises(DataError, match=message):
        problem(encoder).check(Design("x", method, params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2"),
        ({"learning_rates": ()}, "learning_rates must be positive, at least one"),
        ({"learning_rates": (1e-4, -1)}, "learning_rates must be positive"),
        ({"search_share": 0}, "search_share must be above 0"),
        ({"n_layers": True}, "n_layers must be an integer"),
        ({"data": "huge"}, "data must be pairs or one of smoke, demo, full"),
    ],
)
def test_numbers_out_of_range_are_refused(encoder, changes, message):
    with pytest.raises(DataError, match=message):
        problem(encoder, **changes)


def test_too_long_texts_and_too_few_domains(encoder, tmp_path):
    with pytest.raises(DataError, match=r"layers must be from -2 to 1, got \[2\]"):
        # A short encoder has fewer layers than its folder says.
        problem(encoder, n_layers=2).check(Design("x", "domain-experts", {"layers": [2]}))
    with pytest.raises(DataError, match="max_length must be at most 64"):
        problem(encoder, max_length=65).prepare([ALL["untrained"]], [0], Work(tmp_path))
    one = pairs().smaller(domains=1, train=20, judged=5)
    for name in ("domain experts", "wider"):
        with pytest.raises(DataError, match="needs at least 2 domains, there is 1"):
            problem(encoder, data=one).check(ALL[name])
    problem(encoder, data=one).check(ALL["shared, domain tokens"])


def test_facts_depend_on_what_scores_depend_on(encoder):
    prints = {
        problem(encoder, **changes).fingerprint()
        for changes in ({}, {"steps": 5}, {"batch_size": 5}, {"learning_rates": (1e-3,)},
                        {"max_length": 13}, {"evaluate_every": 1}, {"data": pairs(seed=1)},
                        {"search_share": 0.4}, {"n_layers": 1})
    }  # fmt: skip
    assert len(prints) == 9
    assert problem(encoder, keep_models=False).fingerprint() in prints
    facts = DomainEncoderProblem(pairs(), base=encoder).describe()
    assert set(facts["data"]) == set(DOMAINS)
    json.dumps(facts)


@given(st.integers(0, 200), st.lists(st.integers(1, 500), min_size=1, max_size=9))
def test_steps_are_shared_out_by_weight(total, weights):
    shares = shared_out(total, weights)
    assert sum(shares) == max(total, len(weights))
    assert min(shares) >= 1
    order = np.argsort(weights, kind="stable")
    assert all(np.diff(np.array(shares)[order]) >= -1)


def test_folder_names():
    assert folder_name("a b", ["a b", "c"]) == "a-b"
    assert folder_name("base", ["base", "c"]) == "1-base"


def test_the_code_on_the_method_page_runs(encoder, tmp_path, monkeypatch):
    made = graph()
    areas = {"cats": "network", "dogs": "numbers and types"}
    domains = {key: areas[domain] for key, domain in made.domains.items()}
    library = replace(made, domains=domains)
    monkeypatch.setattr("bakeoff.data.citation_graphs.standard_library_graph", lambda: library)
    monkeypatch.chdir(tmp_path)
    write_graph(tmp_path / "papers.jsonl")
    page = Path(__file__).parents[2] / "docs/methods/cocitation-experts.md"
    blocks = [part.split("```")[0] for part in page.read_text("utf-8").split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        small = block.replace("PATH_OR_HUB_ID", str(encoder))
        small = (
            small.replace("steps=1000", "steps=2")
            .replace("seeds=3", "seeds=2")
            .replace("batch_size=32", "batch_size=4")
        )
        names = {}
        exec(small, names)
    assert {design["name"] for design in names["results"]["designs"]} >= {"domain experts"}
