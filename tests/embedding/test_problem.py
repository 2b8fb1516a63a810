"""Fitting and scoring designs on a tiny base: exactness, sharing, and clear refusals."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from tests.embedding.tiny_problem import data, problem

from bakeoff.embedding.problem import EmbeddingProblem, compare_designs, default_designs
from bakeoff.errors import DataError
from bakeoff.study import Design, Study, Work

DESIGNS = default_designs(num_latents=2, num_heads=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = problem(tmp_path_factory.mktemp("problem"))
    made.prepare(list(DESIGNS), [0], Work(tmp_path_factory.mktemp("scratch")))
    return made


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_every_default_design_fits_and_scores_each_task(tiny, design, tmp_path):
    trial = tiny.run(design, 0, Work(tmp_path))
    shapes = {m: {t: v.shape for t, v in tasks.items()} for m, tasks in trial.scores.items()}
    assert shapes == {
        "mrr_at_10": {"find reversed": (30,)},
        "spearman": {"overlap": (20,)},
        "v_measure": {"by cat": (40,)},
        "accuracy": {"has cat": (50,)},
    }
    assert all(np.isfinite(v).all() for tasks in trial.scores.values() for v in tasks.values())
    assert trial.cost["forward_flops_per_text"] > 0
    trained = "pooling" in design.name or "latent" in design.name or "MLP" in design.name
    assert (trial.cost["trained_parameters"] > 100) == (trained or "linear" in design.name)
    assert (trial.artifact / "head.safetensors").exists()


def units(trial):
    return np.concatenate([v for tasks in trial.scores.values() for v in tasks.values()])


def test_a_seed_determines_a_trial_and_seeds_differ(tiny, tmp_path):
    design = next(d for d in DESIGNS if d.name == "latent attention, bidirectional")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, again, other = (
        tiny.run(design, seed, Work(folder))
        for seed, folder in zip((1, 1, 2), folders, strict=True)
    )
    np.testing.assert_array_equal(units(first), units(again))
    assert (units(first) != units(other)).any()


def test_a_trial_leaves_the_callers_random_state_alone(tiny, tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.run(DESIGNS[2], 0, Work(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_training_makes_a_head_better_at_what_it_trains_on(tmp_path):
    """Reversed word order is easy to see through for a bag of words, so a head must learn it."""
    longer = problem(tmp_path, steps=60)
    design = Design("d", "concat-linear", {"attention": "causal"})
    untrained = problem(tmp_path, steps=1, learning_rate=1e-9)
    scores = []
    for name, made in (("before", untrained), ("after", longer)):
        (tmp_path / name).mkdir()
        scores.append(made.run(design, 0, Work(tmp_path / name)).scores["mrr_at_10"])
    before, after = (float(score["find reversed"].mean()) for score in scores)
    assert after > before + 0.1


def test_bidirectional_states_differ_from_causal_ones(tiny, tmp_path):
    causal, both = (
        Design(name, "mean", {"attention": name}) for name in ("causal", "bidirectional")
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (
        tiny.run(design, 0, Work(tmp_path / folder))
        for design, folder in ((causal, "a"), (both, "b"))
    )
    assert (units(one) != units(other)).any()


def test_centring_subtracts_each_roles_training_mean(tiny, tmp_path):
    from bakeoff.embedding.fitting import Artifact, fit_head

    design = Design("c", "mean", {"attention": "causal", "center": True})
    tiny.run(design, 0, Work(tmp_path))
    offsets = Artifact.load(tmp_path).offsets
    cached, pairs = tiny._cached("causal"), tiny.data.train[0]
    for role, texts in (("query", pairs.queries), ("document", pairs.positives)):
        states = cached.features.layer_means(cached.positions(list(dict.fromkeys(texts))))[:, -1]
        np.testing.assert_allclose(offsets[role], states.mean(dim=0), atol=1e-5)
    both = (offsets["query"] + offsets["document"]) / 2
    np.testing.assert_allclose(offsets["text"], both, atol=1e-6)
    head = tiny._head(design, {})
    fitted = fit_head(head, cached, tiny.groups, budget=None, seed=0, center=True)
    vectors = {role: fitted.embed(pairs.queries, role) for role in ("query", "document", "text")}
    np.testing.assert_allclose(np.linalg.norm(vectors["query"], axis=1), 1, atol=1e-5)
    assert np.abs(vectors["query"] - vectors["document"]).max() > 1e-3


def test_the_fingerprint_follows_budget_data_and_base(tmp_path):
    made = problem(tmp_path)
    prints = {
        made.fingerprint(),
        problem(tmp_path, steps=4).fingerprint(),
        problem(tmp_path, max_length=11).fingerprint(),
        problem(tmp_path, data=data(seed=1)).fingerprint(),
        problem(tmp_path, train="lora").fingerprint(),
    }
    assert len(prints) == 5
    assert problem(tmp_path).fingerprint() == made.fingerprint()


def test_a_pickled_problem_carries_no_model_and_gives_the_same_trial(tiny, tmp_path):
    packed = pickle.dumps(tiny)
    assert len(packed) < 100_000
    copy = pickle.loads(packed)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mine = tiny.run(DESIGNS[0], 0, Work(tmp_path / "a"))
    theirs = copy.run(DESIGNS[0], 0, Work(tmp_path / "b"))
    np.testing.assert_array_equal(units(mine), units(theirs))


def test_hard_negatives_are_trained_against(tmp_path):
    plain = data()
    group = plain.train[0]
    negatives = group.queries[1:] + group.queries[:1]
    harder = replace(plain, train=(replace(group, negatives=negatives),))
    design = Design("d", "concat-linear", {"attention": "causal"})
    trials = []
    for name, contents in (("plain", plain), ("harder", harder)):
        (tmp_path / name).mkdir()
        made = problem(tmp_path, data=contents)
        trials.append(units(made.run(design, 0, Work(tmp_path / name))))
    assert (trials[0] != trials[1]).any()


def test_a_whole_study_runs_and_exports_its_winner(tmp_path):
    made = problem(tmp_path)
    designs = [d for d in DESIGNS if d.name in ("mean, causal", "last token, causal")]
    study = Study(made, designs, reference="mean, causal", seeds=2, directory=tmp_path / "study")
    results = study.run()
    assert results.winner in {"mean, causal", "last token, causal"}
    assert not results["failures"]
    assert list(results["metrics"]) == ["score", "mrr_at_10", "spearman", "v_measure", "accuracy"]
    design = next(d for d in designs if d.name == results.winner)
    assert made.export(design, results.winner_artifact, tmp_path / "winner") is True


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "no-such-method"), "no embedding method 'no-such-method'; there are: .*mean"),
        (Design("x", "mean", {"latents": 3}), r"mean takes \['attention', 'center'\], got"),
        (Design("x", "mean", {"attention": "both"}), "attention must be causal or bidirectional"),
        (Design("x", "latent-attention", {"center": True}), "got \\['center'\\]"),
    ],
)
def test_a_wrong_design_is_refused_before_anything_runs(tiny, design, message):
    with pytest.raises(DataError, match=message):
        tiny.check(design)


def test_wrong_settings_are_refused():
    with pytest.raises(DataError, match="train must be head, lora or full, got 'all'"):
        EmbeddingProblem(data(), train="all")
    with pytest.raises(DataError, match="steps must be at least 1, got 0"):
        EmbeddingProblem(data(), steps=0)
    with pytest.raises(DataError, match="no task"):
        EmbeddingProblem(replace(data(), tasks=()))


def test_designs_that_learn_need_texts_to_learn_from(tmp_path):
    plain = data()
    unlabelled = replace(plain, train=(), tasks=plain.tasks[:3])
    made = problem(tmp_path, data=unlabelled)
    made.check(Design("m", "mean"))
    for design in (
        Design("l", "latent-attention"),
        Design("b", "best-layer"),
        Design("c", "mean", {"center": True}),
    ):
        with pytest.raises(DataError, match="learns from training texts, but data 'words' has"):
            made.check(design)
    made.check(Design("b", "best-layer", {"layer": 2}))


def test_labelled_texts_alone_train_heads_on_triplets_without_in_batch_negatives(tmp_path):
    labelled = replace(data(), train=())
    made = problem(tmp_path, data=labelled, steps=30)
    (group,) = made.groups
    assert not group.in_batch
    task = labelled.tasks[3]
    label = dict(zip(task.train_texts, task.train_labels, strict=True))
    for query, positive, negative in (group.pairs.texts(row) for row in range(len(group.pairs))):
        assert label[query] == label[positive] != label[negative]
    design = Design("d", "concat-linear", {"attention": "causal"})
    scores = []
    for name, settings in (("before", {"steps": 1, "learning_rate": 1e-9}), ("after", {})):
        (tmp_path / name).mkdir()
        fitted = problem(tmp_path, data=labelled, **{"steps": 40, **settings})
        trial = fitted.run(design, 0, Work(tmp_path / name))
        scores.append(float(trial.scores["accuracy"]["has cat"].mean()))
    assert scores[1] >= scores[0]


def test_compare_designs_is_wilcoxon_with_holm():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=12) + shift for name, shift in (("a", 0), ("b", 1), ("c", 0.2))}
    table = compare_designs(scores, "a")
    assert set(table) == {"b", "c"}
    for name in table:
        expected = wilcoxon(scores[name], scores["a"]).pvalue
        assert table[name]["p_value"] == pytest.approx(expected)
    low, high = sorted(table[name]["p_value"] for name in table)
    assert min(row["p_holm"] for row in table.values()) == pytest.approx(min(1, 2 * low))
    assert max(row["p_holm"] for row in table.values()) == pytest.approx(max(high, 2 * low))


def test_texts_that_are_cut_are_counted(tiny, tmp_path):
    (tmp_path / "short").mkdir()
    assert tiny.run(DESIGNS[0], 0, Work(tmp_path / "short")).notes == ()
    made = problem(tmp_path, max_length=6)
    texts = made.data.texts()
    longer = sum(len(text.split()) + 1 > 6 for text in texts)  # one token a word and the end
    (tmp_path / "long").mkdir()
    notes = made.run(DESIGNS[0], 0, Work(tmp_path / "long")).notes
    assert notes == (f"{longer} of {len(texts)} texts were cut at 6 tokens",)


def test_an_encoder_base_runs_bidirectional_designs_only(tmp_path):
    from tests.models import tiny as small
    from transformers import BertConfig, BertModel

    folder = tmp_path / "base"
    BertModel(
        BertConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    made = problem(tmp_path)
    assert made.attentions == ("bidirectional",)
    with pytest.raises(DataError, match="is an encoder: give attention='bidirectional'"):
        made.check(DESIGNS[0])
    designs = default_designs(made.attentions, num_latents=2, num_heads=4)
    assert len(designs) == 12
    for design in designs:
        scratch = tmp_path / design.name
        scratch.mkdir()
        assert np.isfinite(units(made.run(design, 0, Work(scratch)))).all()


def test_each_batch_takes_the_negative_rule_of_its_own_group(tiny, monkeypatch):
    from bakeoff.embedding import fitting

    pairs = tiny.data.train[0]
    triplets = replace(
        pairs.take(range(20)), negatives=pairs.queries[20:40], group="own negatives only"
    )
    groups = (
        fitting.TrainingGroup(pairs.take(range(20, 60))),
        fitting.TrainingGroup(triplets, in_batch=False),
    )
    seen = {}
    monkeypatch.setattr(
        fitting, "train_contrastive", lambda *args, **settings: seen.update(settings)
    )
    head = tiny._head(Design("d", "concat-linear", {"attention": "causal"}), {})
    fitting.fit_head(head, tiny._cached("causal"), groups, budget=tiny.budget, seed=0)
    rules = [seen["in_batch"](np.array([first])) for first in (0, 39, 40, 59)]
    assert rules == [True, True, False, False]
