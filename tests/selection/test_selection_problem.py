"""Both problems on tiny models: every design runs, is paired, and sees only what it may see."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import KNeighborsClassifier
from tests.selection.tiny_selection import labelled, pool, samples, save_models

from bakeoff.data.samples import Sample, TrainingPool
from bakeoff.errors import DataError
from bakeoff.models import TextEncoder, load_language_model
from bakeoff.selection.fine_tuning import FineTuningBudget, target_losses
from bakeoff.selection.problem import (
    AnnotationProblem,
    TrainingProblem,
    annotation_designs,
    training_designs,
)
from bakeoff.selection.selectors import SELECTORS
from bakeoff.study import Design, Study, Work

pytestmark = pytest.mark.filterwarnings(
    "ignore:k=", "ignore:.*more than one copy", "ignore:.*copies of others"
)
RANDOM = Design("random", "random")
# Few probes, of a pool of 24.
SMALL = {
    "mates": {"n_probes": 8, "warmup_steps": 1},
    "mates-refreshed": {"n_probes": 6, "stages": 2},
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Tiny models, and a cache of this module's own."""
    made = save_models(tmp_path_factory.mktemp("selection"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def annotation(folder, tasks=None, **changes):
    options = {
        "budgets": (4, 9),
        "embedder": str(folder / "encoder"),
        "language_model": str(folder / "base"),
        "n_shots": 2,
        "max_in_context": 5,
        **changes,
    }
    return AnnotationProblem(tasks or [labelled()], **options)


def training(folder, pools=None, **changes):
    options = {
        "n_select": 6,
        "base": str(folder / "base"),
        "embedder": str(folder / "encoder"),
        "budget": FineTuningBudget(n_tokens=600, batch_size=4, max_length=60),
        **changes,
    }
    return TrainingProblem(pools or [pool()], **options)


def trial(problem, design, folder, name="trial", seed=0):
    (folder / name).mkdir()
    return problem.run(design, seed, Work(folder / name))


def units(found):
    return np.concatenate([v for tasks in found.scores.values() for v in tasks.values()])


def same(one, other):
    """Where memory lies decides the last bits of a matrix product, so that equal is close."""
    np.testing.assert_allclose(units(one), units(other), rtol=1e-5, atol=1e-6)
    assert picks(one) == picks(other)


def picks(found):
    return json.loads((found.artifact / "picks.json").read_text())


# Which to label -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(folder):
    return annotation(folder, learners=("in-context", "nearest-neighbour"))


@pytest.mark.parametrize("design", annotation_designs(), ids=lambda design: design.name)
def test_every_annotation_design_picks_and_is_scored(both, design, tmp_path):
    found = trial(both, design, tmp_path)
    shapes = {m: {t: v.shape for t, v in tasks.items()} for m, tasks in found.scores.items()}
    whole = {"4 labels": (24,), "9 labels": (24,)}
    assert shapes == {
        "accuracy": whole,
        "in_context": {"4 labels": (5,), "9 labels": (5,)},
        "similarity": whole,
        "known_class": whole,
    }
    assert np.isfinite(units(found)).all()
    assert found.cost["labels_used"] == 9
    assert found.cost["selection_seconds"] > 0
    chosen = picks(found)["animals"]
    assert {budget: len(set(rows)) for budget, rows in chosen.items()} == {"4": 4, "9": 9}
    assert {row for rows in chosen.values() for row in rows} <= set(range(60))
    again = trial(both, design, tmp_path, "again")
    same(again, found)
    assert picks(again) == picks(found)


def test_accuracy_is_scikit_learns_on_the_pool_of_the_seed(folder, tmp_path):
    problem = annotation(folder)
    task = problem.tasks[0]
    encoder = TextEncoder(folder / "encoder")
    train, tests = encoder.encode(task.train_texts), encoder.encode(task.test_texts)
    for design in (RANDOM, Design("v", "vote-k", {"k": 5})):
        found = trial(problem, design, tmp_path, design.name, seed=3)
        rows = np.random.default_rng([3, 7]).choice(60, 40, replace=False)
        centre = train[rows].astype(np.float64).mean(axis=0)
        for budget, chosen in picks(found)["animals"].items():
            assert set(chosen) <= set(rows.tolist())
            oracle = KNeighborsClassifier(1, metric="cosine").fit(
                train[chosen] - centre, np.array(task.train_labels)[chosen]
            )
            right = oracle.predict(tests - centre) == np.array(task.test_labels)
            name = f"{budget} labels"
            np.testing.assert_array_equal(found.scores["accuracy"][name], right)
            distances = oracle.kneighbors(tests - centre)[0][:, 0]
            np.testing.assert_allclose(found.scores["similarity"][name], 1 - distances, atol=1e-5)
            known = {task.train_labels[row] for row in chosen}
            expected = [float(label in known) for label in task.test_labels]
            assert found.scores["known_class"][name].tolist() == expected


def test_designs_of_a_seed_share_a_pool_and_seeds_do_not(folder, tmp_path, monkeypatch):
    from bakeoff.selection import problem as module

    seen = []
    original = module.pick_for_budgets
    monkeypatch.setattr(
        module,
        "pick_for_budgets",
        lambda kind, params, pool, *rest, **more: (
            seen.append(tuple(pool.texts)) or original(kind, params, pool, *rest, **more)
        ),
    )
    problem = annotation(folder)
    for number, (design, seed) in enumerate(
        (d, s)
        for s in (0, 1)
        for d in (RANDOM, Design("k", "kmeans"), Design("f", "farthest-first"))
    ):
        trial(problem, design, tmp_path, str(number), seed)
    assert len(seen) == 6
    assert len(set(seen[:3])) == len(set(seen[3:])) == 1
    assert set(seen[0]) != set(seen[3])
    assert {len(texts) for texts in seen} == {40}  # two thirds of 60


@pytest.mark.parametrize("learner", ["nearest-neighbour", "in-context"])
@pytest.mark.parametrize("method", ["vote-k", "vote-k-confidence", "least-confidence", "ideal"])
def test_labels_of_what_is_not_picked_change_no_pick(folder, tmp_path, method, learner):
    options = {"learners": [learner], "budgets": [8], "max_in_context": 1}
    design = Design(method, method)
    first = picks(trial(annotation(folder, **options), design, tmp_path, "first"))
    chosen = first["animals"]["8"]
    task = labelled()
    labels = np.array(task.train_labels)
    hidden = np.setdiff1d(np.arange(60), chosen)
    for number in range(2):
        labels[hidden] = np.random.default_rng(number).permutation(labels[hidden])
        changed = replace(task, train_labels=tuple(labels.tolist()))
        assert changed.train_labels != task.train_labels
        problem = annotation(folder, [changed], **options)
        assert picks(trial(problem, design, tmp_path, f"swapped {number}")) == first


def test_a_learner_in_context_tells_how_sure_it_is_itself(folder, tmp_path):
    """Confidences of the language model give other picks than those of the nearest label."""
    design = Design("least", "least-confidence")
    chosen = [
        picks(
            trial(
                annotation(folder, learners=[learner], max_in_context=1), design, tmp_path, learner
            )
        )
        for learner in ("nearest-neighbour", "in-context")
    ]
    assert chosen[0] != chosen[1]


def test_random_retrieval_changes_answers_in_context_and_nothing_else(folder, tmp_path):
    problem = annotation(folder, learners=["in-context"], max_in_context=24)
    similar, other = (
        trial(problem, Design(how, "random", {"retrieval": how}), tmp_path, how, seed=1)
        for how in ("similarity", "random")
    )
    assert picks(similar) == picks(other)
    plain = trial(problem, RANDOM, tmp_path, "plain", seed=1)
    same(plain, similar)
    differs = {
        metric: any((similar.scores[metric][t] != v).any() for t, v in tasks.items())
        for metric, tasks in other.scores.items()
    }
    assert differs == {"in_context": True, "similarity": False, "known_class": False}


def test_only_some_budgets_may_be_answered_in_context(folder, tmp_path):
    problem = annotation(folder, learners=["in-context"], in_context_budgets=[9])
    found = trial(problem, RANDOM, tmp_path)
    assert list(found.scores["in_context"]) == ["9 labels"]
    assert list(found.scores["similarity"]) == ["4 labels", "9 labels"]


def test_several_tasks_are_named(folder, tmp_path):
    tasks = [labelled(), labelled("others", seed=1)]
    found = trial(annotation(folder, tasks), RANDOM, tmp_path)
    names = ["animals, 4", "animals, 9", "others, 4", "others, 9"]
    assert sorted(found.scores["accuracy"]) == names
    assert found.cost["labels_used"] == 18
    assert set(picks(found)) == {"animals", "others"}


def test_the_annotation_fingerprint_follows_what_scores_depend_on(folder, tmp_path):
    from tests.selection.tiny_selection import save_encoder, save_language_model

    save_encoder(tmp_path / "encoder", seed=1)
    save_language_model(tmp_path / "base", seed=1)
    asked = {"learners": ["in-context"]}
    task = labelled()
    prints = {
        annotation(folder).fingerprint(),
        annotation(folder, [labelled(seed=1)]).fingerprint(),
        annotation(folder, [replace(task, train_labels=task.train_labels[::-1])]).fingerprint(),
        annotation(folder, budgets=[4, 10]).fingerprint(),
        annotation(folder, embedder=str(tmp_path / "encoder")).fingerprint(),
        annotation(folder, **asked).fingerprint(),
        annotation(folder, learners=["in-context", "nearest-neighbour"]).fingerprint(),
        annotation(folder, **asked, n_shots=3).fingerprint(),
        annotation(folder, **asked, max_in_context=6).fingerprint(),
        annotation(folder, **asked, in_context_budgets=[4]).fingerprint(),
        annotation(folder, **asked, language_model=str(tmp_path / "base")).fingerprint(),
    }
    assert len(prints) == 11
    # What is not used does not count, nor does the order in which things were said.
    for same in (
        {"n_shots": 3},
        {"language_model": str(tmp_path / "base")},
        {"budgets": [9, 4, 4]},
        {"budgets": list(np.array([4, 9]))},
    ):
        assert annotation(folder, **same).fingerprint() == annotation(folder).fingerprint()


def test_a_fingerprint_does_not_depend_on_what_is_loaded(folder, tmp_path):
    for problem in (annotation(folder, learners=["in-context"]), training(folder)):
        before = problem.fingerprint()
        trial(problem, RANDOM, tmp_path, type(problem).__name__)
        assert problem.fingerprint() == before
        assert pickle.loads(pickle.dumps(problem)).fingerprint() == before


@pytest.mark.parametrize("make", [annotation, training])
def test_a_pickled_problem_carries_no_model_and_gives_the_same_trial(folder, tmp_path, make):
    problem = make(folder)
    design = Design("f", "facility-location") if make is annotation else Design("r", "rds-plus")
    problem.prepare([design], [0], Work(tmp_path))
    mine = trial(problem, design, tmp_path, "mine")
    packed = pickle.dumps(problem)
    assert len(packed) < 50_000
    theirs = trial(pickle.loads(packed), design, tmp_path, "theirs")
    same(mine, theirs)
    assert picks(mine) == picks(theirs)


def test_texts_are_embedded_once_for_all_designs_and_processes(folder, tmp_path, monkeypatch):
    problem = annotation(folder, [labelled(seed=9)])
    seen = []
    original = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, texts, **more: seen.append(len(texts)) or original(self, texts, **more),
    )
    messages = []
    problem.prepare([RANDOM], [0], Work(tmp_path, lambda *a: messages.append(a)))
    assert sum(seen) == 84
    assert messages[-1] == (1.0, "embedding")
    trial(problem, RANDOM, tmp_path)
    trial(pickle.loads(pickle.dumps(problem)), RANDOM, tmp_path, "elsewhere")
    assert sum(seen) == 84


def test_annotation_winners_are_picked_from_all_texts(folder, tmp_path):
    problem = annotation(folder)
    assert problem.export(Design("v", "vote-k"), tmp_path, tmp_path / "winner", reason="it won")
    table = pq.read_table(tmp_path / "winner" / "picks.parquet").to_pydict()
    assert list(table) == ["task", "pick", "row", "text"]
    assert table["pick"] == list(range(1, 10))
    assert table["task"] == ["animals"] * 9
    task = labelled()
    assert [task.train_texts[row] for row in table["row"]] == table["text"]
    vectors = TextEncoder(folder / "encoder").encode(task.train_texts)
    expected = SELECTORS["vote-k"].build(n_select=9).fit(vectors).selected_indices_
    assert table["row"] == expected.tolist()
    readme = (tmp_path / "winner" / "README.md").read_text()
    assert "it won" in readme
    assert "bakeoff select --method vote-k" in readme


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "votek"), "no selection method 'votek'; there are: vote-k"),
        (
            Design("x", "vote-k", {"depth": 3}),
            "design 'x': vote-k takes k, .*, retrieval; got depth",
        ),
        (Design("x", "tf-idf"), "design 'x': tf-idf chooses what to train on, .*--target"),
        (Design("x", "rds-plus"), "design 'x': rds-plus chooses what to train on"),
        (Design("x", "balanced-random"), "design 'x': balanced-random chooses what to train on"),
        (
            Design("x", "random", {"retrieval": "best"}),
            "design 'x': retrieval must be similarity or random, got 'best'",
        ),
    ],
)
def test_annotation_designs_that_cannot_run_are_refused(folder, tmp_path, design, message):
    problem = annotation(folder)
    for refused in (problem.check, lambda d: problem.prepare([RANDOM, d], [0], Work(tmp_path))):
        with pytest.raises(DataError, match=message):
            refused(design)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks must hold at least one labelled data set"),
        ({"tasks": [labelled(), labelled(seed=1)]}, "tasks must have distinct names, .* animals"),
        ({"learners": []}, "learners must be among nearest-neighbour, in-context"),
        ({"learners": ["oracle"]}, r"learners must be among .*, got \['oracle'\]"),
        ({"budgets": []}, "budgets must be positive numbers of labels"),
        ({"budgets": [3, 0]}, r"budgets must be positive numbers of labels, got \[3, 0\]"),
        ({"budgets": [2.5]}, r"budgets must be positive numbers of labels, got \[2\.5\]"),
        ({"budgets": [4, 41]}, r"at most 40, the size of a pool drawn from 'animals' \(60 texts\)"),
        ({"n_shots": 0}, "n_shots must be at least 1, got 0"),
        ({"max_in_context": 0}, "max_in_context must be at least 1, got 0"),
        ({"in_context_budgets": [5]}, r"in_context_budgets must be among budgets \[4, 9\]"),
    ],
)
def test_wrong_annotation_settings_are_refused(changes, message):
    options = {"budgets": (4, 9), **changes}
    with pytest.raises(DataError, match=message):
        AnnotationProblem(options.pop("tasks", [labelled()]), **options)


# Which to train on --------------------------------------------------------------------------------


@pytest.mark.parametrize("design", training_designs(), ids=lambda design: design.name)
def test_every_training_design_picks_trains_and_is_scored(folder, design, tmp_path):
    design = Design(design.name, design.method, SMALL.get(design.method, {}))
    problem = training(folder)
    before = load_language_model(folder / "base").model.state_dict()
    found = trial(problem, design, tmp_path)
    assert {m: {t: v.shape for t, v in ts.items()} for m, ts in found.scores.items()} == {
        "target_loss": {"tiny pool": (4,)},
        "relevant": {"tiny pool": (10,)},
    }
    assert np.isfinite(units(found)).all()
    chosen = picks(found)["tiny pool"]
    assert len(set(chosen)) == len(chosen) == 6
    share = np.mean([problem.pools[0].samples[row].source == "cat" for row in chosen])
    assert found.scores["relevant"]["tiny pool"].mean() == pytest.approx(share)
    assert found.cost["trained_parameters"] == sum(p.numel() for p in before.values())
    assert abs(found.cost["training_tokens"] - 600) <= 4 * 60
    # Whoever tried out the model for its choice left it as it was.
    after = problem._trained().model.state_dict()
    assert all((after[name] == value).all() for name, value in before.items())
    again = trial(training(folder), design, tmp_path, "again")
    same(again, found)


def test_training_on_the_target_helps_and_the_loss_is_that_of_the_tuned_model(folder, tmp_path):
    """Rows of the target's kind, against as many others."""

    def said(word, n, seed):
        return tuple(replace(one, response=one.response[:8] + word * 5) for one in samples(n, seed))

    pool = TrainingPool(
        "p", (*said(" dog", 8, 1), *said(" cat", 8, 2)), *(said(" cat", 4, s) for s in (3, 4))
    )
    budget = FineTuningBudget(n_tokens=2500, batch_size=4, max_length=28, learning_rate=3e-3)
    problem = training(folder, [pool], budget=budget)
    start = problem._trained()
    losses = {}
    for kind, rows in (("dog", np.arange(8)), ("cat", np.arange(8, 16))):
        tuned = problem._train(pool, rows, 0, tmp_path, lambda *a: None)
        losses[kind] = problem._test(tuned, pool)
        expected = target_losses(tuned.model, start.tokenizer, pool.test, 28)
        np.testing.assert_allclose(losses[kind], expected, rtol=1e-5)
    untrained = target_losses(start.model, start.tokenizer, pool.test, 28)
    assert losses["cat"].mean() < 0.9 * losses["dog"].mean()
    assert losses["cat"].mean() < 0.9 * untrained.mean()


def test_queries_are_half_of_them_drawn_by_the_seed_for_all_designs(folder, monkeypatch):
    problem = training(folder, learner="none")
    seen = []
    for name in ("text_baselines:TfidfSelector", "text_baselines:BM25Selector"):
        module, home = name.split(":")
        home = getattr(__import__(f"bakeoff.selection.{module}", fromlist=[home]), home)
        fit = home.fit

        def spy(self, X, *, queries, fit=fit, **more):
            seen.append(tuple(queries))
            return fit(self, X, queries=queries, **more)

        monkeypatch.setattr(home, "fit", spy)
    for seed in range(4):
        for method in ("tf-idf", "bm25"):
            problem._pick(Design(method, method), 0, seed)
    assert {len(asked) for asked in seen} == {2}
    pairs = [set(seen[i : i + 2]) for i in range(0, 8, 2)]
    assert all(len(pair) == 1 for pair in pairs)
    assert len(set().union(*pairs)) > 1
    tests = {sample.text for sample in problem.pools[0].test}
    for asked in seen:
        assert tests.isdisjoint({getattr(one, "text", one) for one in asked})


def test_similar_samples_are_found(folder, tmp_path):
    problem = training(folder, learner="none")
    found = trial(problem, Design("t", "tf-idf"), tmp_path)
    assert list(found.scores) == ["relevant"]
    by_words = found.scores["relevant"]["tiny pool"].mean()
    drawn = [trial(problem, RANDOM, tmp_path, str(s), s).scores["relevant"] for s in range(5)]
    assert by_words > np.mean([tasks["tiny pool"].mean() for tasks in drawn])


def test_the_test_part_changes_no_pick(folder):
    problem = training(folder)
    other = replace(pool(), test=samples(4, 77, kind="tree"))
    changed = training(folder, [other])
    for method in ("tf-idf", "rds-plus", "embedding-similarity", "mates", "perplexity", "gateau"):
        design = Design(method, method, SMALL.get(method, {}))
        mine, theirs = (p._pick(design, 0, 1)[0] for p in (problem, changed))
        np.testing.assert_array_equal(mine, theirs)


def test_mates_predicts_from_the_vectors_of_the_problems_encoder(folder, monkeypatch):
    from bakeoff.selection.mates import MATESSelector

    given, fit = [], MATESSelector.fit
    monkeypatch.setattr(
        MATESSelector,
        "fit",
        lambda self, X, **data: given.append(data["vectors"]) or fit(self, X, **data),
    )
    problem = training(folder)
    problem._pick(Design("m", "mates", SMALL["mates"]), 0, 0)
    expected = TextEncoder(folder / "encoder").encode([s.text for s in problem.pools[0].samples])
    np.testing.assert_allclose(given[0], expected, atol=1e-5)


def test_what_depends_on_no_seed_is_chosen_once(folder, monkeypatch):
    problem = training(folder, learner="none")
    chosen = []
    original = TrainingProblem._chosen
    monkeypatch.setattr(
        TrainingProblem,
        "_chosen",
        lambda self, design, *rest: chosen.append(design.method) or original(self, design, *rest),
    )
    for method in ("longest", "random", "tf-idf"):
        rows = [problem._pick(Design(method, method), 0, seed)[0].tolist() for seed in (0, 1)]
        assert (rows[0] == rows[1]) == (method == "longest") or method == "tf-idf"
    assert chosen == ["longest", "random", "random", "tf-idf", "tf-idf"]


def test_several_pools_are_tasks_and_train_the_same_weights(folder, tmp_path):
    one = trial(training(folder), RANDOM, tmp_path, "one")
    pools = [pool(), replace(pool(), name="other", test=samples(3, 8))]
    problem = training(folder, pools)
    found = trial(problem, RANDOM, tmp_path, "two")
    assert {t: v.shape for t, v in found.scores["target_loss"].items()} == {
        "tiny pool": (4,),
        "other": (3,),
    }
    assert found.cost["trained_parameters"] == one.cost["trained_parameters"]
    assert found.cost["training_tokens"] == 2 * one.cost["training_tokens"]
    assert problem.export(RANDOM, found.artifact, tmp_path / "winner")
    table = pq.read_table(tmp_path / "winner" / "picks.parquet").to_pydict()
    assert table["task"] == ["tiny pool"] * 6 + ["other"] * 6
    assert table["row"][:6] == picks(found)["tiny pool"]
    assert table["text"] == [pools[0].samples[row].text for row in table["row"]]


def test_marks_are_scored_only_where_all_pools_have_them(folder, tmp_path):
    unmarked = replace(pool("unmarked", marks=False))
    nothing = replace(pool("nothing"), relevant=np.zeros(24, dtype=bool))
    for pools in ([pool(), unmarked], [pool(), nothing]):
        problem = training(folder, pools)
        assert list(problem.metrics) == ["target_loss"]
        assert list(trial(problem, RANDOM, tmp_path, pools[1].name).scores) == ["target_loss"]
        with pytest.raises(DataError, match="learner 'none' needs pools whose relevant samples"):
            training(folder, pools, learner="none")


def test_adapters_are_trained_if_asked_for(folder, tmp_path):
    budget = FineTuningBudget(n_tokens=400, batch_size=4, max_length=60, train="lora")
    found = trial(training(folder, budget=budget), RANDOM, tmp_path)
    whole = sum(p.numel() for p in load_language_model(folder / "base").model.parameters())
    assert 0 < found.cost["trained_parameters"] != whole
    assert np.isfinite(units(found)).all()


def test_the_training_fingerprint_follows_what_scores_depend_on(folder, tmp_path):
    from tests.selection.tiny_selection import save_encoder, save_language_model

    save_encoder(tmp_path / "encoder", seed=1)
    save_language_model(tmp_path / "base", seed=1)
    other = str(tmp_path / "base")
    prints = {
        training(folder).fingerprint(),
        training(folder, [replace(pool(), test=samples(4, 5))]).fingerprint(),
        training(folder, [replace(pool(), queries=samples(4, 6))]).fingerprint(),
        training(folder, [pool(marks=False)]).fingerprint(),
        training(folder, n_select=7).fingerprint(),
        training(folder, learner="none").fingerprint(),
        training(folder, base=other).fingerprint(),
        training(folder, selector_model=other).fingerprint(),
        training(folder, embedder=str(tmp_path / "encoder")).fingerprint(),
        training(folder, budget=FineTuningBudget(n_tokens=601)).fingerprint(),
    }
    assert len(prints) == 10
    same = training(folder, [replace(pool(), name="another name")])
    assert same.fingerprint() == training(folder).fingerprint()
    free = {"learner": "none", "selector_model": other}
    assert (
        training(folder, **free, base="no model of this name").fingerprint()
        == training(folder, **free).fingerprint()  # nothing is trained
    )


PLAIN = tuple(Sample(text.response, source="cat") for text in samples(8, 1))


def plain_pool(**changes):
    return replace(pool(), samples=PLAIN, relevant=None, **changes)


@pytest.mark.parametrize(
    ("design", "changes", "message"),
    [
        (Design("x", "random", {"k": 3}), {}, "design 'x': random takes no parameters; got k"),
        (Design("x", "vote-k-confidence"), {}, "design 'x': vote-k-confidence chooses what to lab"),
        (Design("x", "least-confidence"), {}, "design 'x': least-confidence chooses what to label"),
        (
            Design("x", "mates", {"model": "y"}),
            {},
            "design 'x': mates takes n_probes, .*; got model",
        ),
        (Design("x", "rds-plus", {"k": 1}), {}, "rds-plus takes .*pooling, layer; got k"),
        (Design("x", "tf-idf", {"layer": 1}), {}, "design 'x': tf-idf takes .*; got layer"),
        (Design("x", "mates-refreshed", {"k": 1}), {}, "design 'x': mates-refreshed takes stages"),
        (Design("x", "mates-refreshed"), {"learner": "none"}, "design 'x': .*use mates"),
        (Design("x", "mates-refreshed"), {}, "design 'x': .* sets 200 .* 'tiny pool' has 24"),
        (
            Design("x", "gateau"),
            {"pools": [plain_pool()]},
            "design 'x': gateau needs samples with a context.* 8 of 8 in 'tiny pool' have no cont",
        ),
        (
            Design("x", "gateau"),
            {"pools": [replace(pool(), samples=(*samples(9, 1), *PLAIN[:3]), relevant=None)]},
            "3 of 12 in 'tiny pool' have no context",
        ),
        (
            Design("x", "ifd"),
            {"pools": [plain_pool()]},
            "design 'x': ifd needs samples with an instruction",
        ),
        (
            Design("x", "ifd"),
            {"pools": [pool(), plain_pool(name="plain")]},
            "0 in 'plain' have an instruction, and 6 are to be picked",
        ),
        (
            Design("x", "balanced-random"),
            {"pools": [plain_pool()]},
            "design 'x': balanced-random needs samples of more than one source",
        ),
    ],
)
def test_training_designs_that_cannot_run_are_refused(folder, tmp_path, design, changes, message):
    problem = training(folder, **changes)
    for refused in (problem.check, lambda d: problem.prepare([RANDOM, d], [0], Work(tmp_path))):
        with pytest.raises(DataError, match=message):
            refused(design)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pools": []}, "pools must hold at least one pool"),
        ({"pools": [pool(), pool()]}, "pools must have distinct names, got twice: tiny pool"),
        ({"learner": "oracle"}, "learner must be fine-tune or none, got 'oracle'"),
        ({"n_select": 25}, "between 1 and 24, the samples of 'tiny pool', got 25"),
        ({"n_select": 0}, "between 1 and 24, the samples of 'tiny pool', got 0"),
    ],
)
def test_wrong_training_settings_are_refused(changes, message):
    options = {"n_select": 6, **changes}
    with pytest.raises(DataError, match=message):
        TrainingProblem(options.pop("pools", [pool()]), **options)


def test_a_small_gpt_is_made_of_the_first_pools_texts(folder, monkeypatch, tmp_path):
    from bakeoff.models import small_gpt

    made = []

    def pretrained(self, texts, *, progress=None):
        made.append((self.context, list(texts)))
        progress(1.0, "trained")
        return folder / "base"

    monkeypatch.setattr(small_gpt.SmallGPT, "pretrained", pretrained)
    budget = FineTuningBudget(n_tokens=400, max_length=200)
    problem = training(folder, base="small-gpt", budget=budget)
    messages = []
    problem.prepare([RANDOM], [0], Work(tmp_path, lambda *a: messages.append(a)))
    assert made == [(200, [sample.text for sample in pool().samples])]
    assert messages == [(1.0, "trained")]
    assert problem.fingerprint() == training(folder, budget=budget).fingerprint()
    assert len(made) == 1


# Whole studies ------------------------------------------------------------------------------------


def test_whole_studies_run_and_describe_themselves(folder, tmp_path):
    for number, (problem, designs) in enumerate(
        [
            (annotation(folder, learners=["in-context", "nearest-neighbour"]), "random vote-k"),
            (training(folder), "random longest"),
        ]
    ):
        chosen = [Design(name, name) for name in designs.split()]
        directory = tmp_path / str(number)
        results = Study(problem, chosen, reference="random", seeds=2, directory=directory).run()
        assert not results["failures"]
        assert results["study"]["trials"]["finished"] == 4
        headline = next(iter(results["metrics"]))
        assert headline == ("score" if number == 0 else "target_loss")
        facts = results["problem"]["description"]
        assert facts["question"].startswith("which ")
        assert str(folder / "encoder") in json.dumps(facts)


def test_method_versions_follow_the_method_and_the_problem(folder, monkeypatch):
    from bakeoff.selection import problem as module

    for problem, own in (
        (annotation(folder), "_ANNOTATION_VERSION"),
        (training(folder), "_TRAINING_VERSION"),
    ):
        versions = {problem.method_version("random")}
        with monkeypatch.context() as patch:
            patch.setitem(SELECTORS, "random", replace(SELECTORS["random"], version="99"))
            versions.add(problem.method_version("random"))
        with monkeypatch.context() as patch:
            patch.setattr(module, own, 99)
            versions.add(problem.method_version("random"))
        assert len(versions) == 3
        with pytest.raises(DataError, match="no selection method"):
            problem.method_version("nothing")


def test_a_text_with_half_a_character_pair_has_a_fingerprint(folder):
    task = replace(labelled(), test_texts=("half \ud83d", *labelled().test_texts[1:]))
    assert annotation(folder, [task]).fingerprint() != annotation(folder).fingerprint()
