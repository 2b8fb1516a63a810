"""Rules of deferral on tiny models: areas are exact, prompts judged unseen, nobody asked twice."""

from __future__ import annotations

import pickle
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.selection.tiny_selection import save_language_model

from bakeoff.data.prompts import Prompt
from bakeoff.data.spellings import (
    SPELLING_KINDS,
    number_in_words,
    ordinal_in_words,
    roman_numeral,
    spelling_prompts,
    spelling_texts,
    year_in_words,
)
from bakeoff.decoding import Cascade, TextGenerator
from bakeoff.decoding import deferral_rules as rules
from bakeoff.decoding.deferral_curves import deferral_auc, deferral_curve
from bakeoff.decoding.problem import cascading
from bakeoff.decoding.problem.cascading import (
    ALPHAS,
    CascadeProblem,
    area_units,
    cascade_designs,
    contains_answer,
    default_cascade_problem,
    deferred_shares,
    edit_similarity,
)
from bakeoff.decoding.winner import load_settings
from bakeoff.errors import DataError
from bakeoff.models import load_language_model
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

N = 96
DESIGNS = {design.name: design for design in cascade_designs()}
ORACLE = Design("oracle", "oracle")
LEARNED = [design for design in DESIGNS.values() if design.method.startswith("post-hoc")]


# Units, against the components' own figures -------------------------------------------------------

curves = st.integers(2, 30).flatmap(
    lambda n: st.tuples(
        # Few values, so that scores are often equal.
        arrays.arrays(np.float64, n, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.inf])),
        arrays.arrays(np.float64, n, elements=st.floats(0, 1)),
        arrays.arrays(np.float64, n, elements=st.floats(0, 1)),
    )
)


@given(curves)
@settings(deadline=None)
def test_the_mean_of_the_units_is_the_area_ties_included(curve):
    units = area_units(*curve)
    assert units.mean() == pytest.approx(deferral_curve(*curve).auc, abs=1e-12)
    assert units.mean() == pytest.approx(deferral_auc(*curve).value, abs=1e-12)


@given(curves)
@settings(deadline=None)
def test_the_spread_of_the_units_is_that_of_the_components_interval(curve):
    from scipy import stats

    units = area_units(*curve)
    n = len(units)
    half = stats.t.ppf(0.975, n - 1) * units.std(ddof=1) / np.sqrt(n)
    _, low, high = deferral_auc(*curve)
    assert (high - low) / 2 == pytest.approx(half, abs=1e-12)


@given(curves, st.floats(0, 1))
@settings(deadline=None)
def test_deferred_shares_give_the_curve_at_any_rate(curve, rate):
    scores, small, large = curve
    shares = deferred_shares(scores, rate)
    assert shares.mean() == pytest.approx(rate, abs=1e-12)
    quality = (small + shares * (large - small)).mean()
    assert quality == pytest.approx(deferral_curve(*curve).at(rate), abs=1e-9)


def test_differences_of_two_rules_vary_as_their_units_say():
    """Without the second part of a unit the standard error would be a quarter too large here."""
    rng = np.random.default_rng(0)
    n, differences, errors = 200, [], []
    for _ in range(400):
        hard = rng.normal(size=n)
        small = (rng.random(n) < 1 / (1 + np.exp(2 * hard))).astype(float)
        large = (rng.random(n) < 0.9).astype(float)
        one, other = (
            area_units(hard + noise * rng.normal(size=n), small, large) for noise in (1, 1.5)
        )
        differences.append((one - other).mean())
        errors.append((one - other).std(ddof=1) / np.sqrt(n))
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.1)


@pytest.mark.parametrize(
    ("text", "accepted", "expected"),
    [
        ("a b c", ["a b c"], 1.0),
        (" a  b c ", ["a b c"], 1.0),
        ("a b c", ["a x c"], 2 / 3),
        ("a b", ["a b c"], 2 / 3),
        ("b c a", ["a b c"], 1 / 3),
        ("", ["a b"], 0.0),
        ("x y z", ["a"], 0.0),
        ("a b", ["x", "a c", "y"], 0.5),
    ],
)
def test_edit_similarity(text, accepted, expected):
    assert edit_similarity(text, accepted) == pytest.approx(expected)


def test_an_answer_is_contained_as_whole_words():
    assert contains_answer("The answer: NEW york!", ["new york"]) == 1
    assert contains_answer("New Yorkers", ["new york"]) == 0
    assert contains_answer("3 > 2", [">"]) == 1
    assert contains_answer("three", [">"]) == 0


# Tiny models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Two tiny models, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("cascade")
    save_language_model(made / "small")
    save_language_model(made / "large", seed=1, hidden_size=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def prompts(folder):
    """Prompts of which each model answers some rightly: what it says is declared right."""
    texts = [f"query {number} of {number % 7}" for number in range(N)]
    said = {
        name: [
            record.text
            for record in TextGenerator(
                load_language_model(folder / name), batch_size=16, max_new_tokens=6
            )(texts)
        ]
        for name in ("small", "large")
    }
    rng = np.random.default_rng(0)
    chosen = []
    for row, text in enumerate(texts):
        who = ("small", "large", "nobody")[rng.choice(3, p=[0.4, 0.45, 0.15])]
        answer = said[who][row] if who in said else "quite another thing"
        chosen.append(Prompt(text, answers=(answer if answer.strip() else "nothing", "never")))
    return tuple(chosen)


def made(folder, prompts, **changes):
    options = {
        "small": str(folder / "small"),
        "large": str(folder / "large"),
        "max_new_tokens": 6,
        "folds": 4,
        **changes,
    }
    return CascadeProblem(prompts, **options)


@pytest.fixture(scope="module")
def problem(folder, prompts):
    return made(folder, prompts)


def trial(problem, design, folder, name="trial", seed=0):
    (folder / name).mkdir()
    return problem.run(design, seed, Work(folder / name))


def units(found, metric="area"):
    return found.scores[metric]["prompts"]


def test_qualities_are_the_components(problem, prompts):
    examples = problem.examples()
    both = ((examples.q_small, examples.small), (examples.q_large, examples.large))
    for quality, records in both:
        pairs = zip(records, prompts, strict=True)
        expected = [record.text.strip() == prompt.answers[0].strip() for record, prompt in pairs]
        assert quality.tolist() == expected
        assert 0.2 < quality.mean() < 0.8


def test_answers_are_those_of_a_cascade_that_asks_the_models_itself(problem, folder, prompts):
    models = [load_language_model(folder / name) for name in ("small", "large")]
    options = {"batch_size": 5, "max_new_tokens": 6}
    cascade = Cascade(
        TextGenerator(models[0], embeddings=True, **options), TextGenerator(models[1], **options)
    )
    expected = cascade.collect([(prompt.text, prompt.answers) for prompt in prompts])
    found = problem.examples()
    for side in ("small", "large"):
        for ours, theirs in zip(getattr(found, side), getattr(expected, side), strict=True):
            assert ours.text == theirs.text
            assert ours.cost == theirs.cost
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.small[3].embedding, expected.small[3].embedding, atol=1e-4)
    assert found.large[0].embedding is None
    np.testing.assert_array_equal(found.q_small, expected.q_small)
    np.testing.assert_array_equal(found.q_large, expected.q_large)


@pytest.mark.parametrize("design", [*DESIGNS.values(), ORACLE], ids=lambda design: design.name)
def test_every_design_scores_every_prompt_and_again_the_same(problem, design, tmp_path):
    found = trial(problem, design, tmp_path)
    assert list(found.scores) == list(problem.metrics) == ["area", "quality", "cost"]
    for metric in found.scores:
        assert units(found, metric).shape == (N,)
        assert np.isfinite(units(found, metric)).all()
    assert found.cost["seconds_per_prompt"] > 0
    again = trial(problem, design, tmp_path, "again")
    for metric in found.scores:
        np.testing.assert_array_equal(units(again, metric), units(found, metric))


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("chow-sum", rules.ChowSum()),
        ("chow-average", rules.ChowAverage()),
        ("length", rules.LengthScore()),
        ("chow-quantile 0", rules.QuantileScore(0.0)),
        ("chow-quantile 0.5", rules.QuantileScore(0.5)),
    ],
)
def test_in_each_part_the_mean_is_the_area_of_the_rule(problem, name, rule, seed, tmp_path):
    found = trial(problem, DESIGNS[name], tmp_path, seed=seed)
    examples = problem.examples()
    parts = problem._parts(seed)
    assert sorted(np.concatenate(parts)) == list(range(N))
    for part in parts:
        tested = examples.take(part)
        curve = deferral_curve(rule.score(tested.small), tested.q_small, tested.q_large)
        assert units(found)[part].mean() == pytest.approx(curve.auc, abs=1e-12)
        assert units(found, "quality")[part].mean() == pytest.approx(curve.at(0.3), abs=1e-12)


@pytest.mark.parametrize("design", LEARNED, ids=lambda design: design.name)
def test_a_learned_rule_ranks_what_it_has_not_seen(problem, design, tmp_path):
    """An independent cross-fit gives the same areas; the rule fitted to all would not."""
    found = trial(problem, design, tmp_path, seed=2)
    examples = problem.examples()
    features = ["quantiles", "sum", "mean", "length"]
    features += ["embedding"] * (design.method == "post-hoc-embed")
    target = design.params.get("target", "gap")
    for part in problem._parts(2):
        others = examples.take(np.setdiff1d(np.arange(N), part))
        rule = rules.PostHocDeferral(features, target, random_state=2)
        rule.fit(others.small, others.q_small, others.q_large)
        tested = examples.take(part)
        expected = deferral_auc(rule.score(tested.small), tested.q_small, tested.q_large).value
        assert units(found)[part].mean() == pytest.approx(expected, abs=1e-12)


def test_qualities_of_a_part_do_not_change_how_it_is_ranked(problem, monkeypatch):
    """Labels of the prompts that are judged reach no rule, of whatever kind."""
    seen = []
    original = rules.DeferralRule.score
    monkeypatch.setattr(
        rules.DeferralRule,
        "score",
        lambda self, records: seen.append(original(self, records)) or seen[-1],
    )
    examples = problem.examples()
    part = problem._parts(0)[1]
    for design in DESIGNS.values():
        if design.method in ("random", "small-only", "large-only"):
            continue
        ranked = []
        for flip in (False, True):
            q_small, q_large = examples.q_small.copy(), examples.q_large.copy()
            if flip:
                q_small[part], q_large[part] = 1 - q_small[part], 1 - q_large[part]
            changed = cascading.CascadeExamples(
                examples.prompts, examples.small, examples.large, q_small, q_large
            )
            problem._ranked(design, 0, 1, part, changed)
            ranked.append(seen[-1])
        assert len(ranked[0]) == len(part)
        np.testing.assert_array_equal(*ranked, err_msg=design.name)


def test_closed_forms(problem, tmp_path):
    examples = problem.examples()
    small, large = examples.q_small, examples.q_large
    both = {
        name: trial(problem, DESIGNS[name], tmp_path, name)
        for name in ("random", "small-only", "large-only")
    }
    np.testing.assert_allclose(units(both["random"]), (small + large) / 2, atol=1e-12)
    np.testing.assert_allclose(units(both["random"], "quality"), 0.7 * small + 0.3 * large)
    for metric in ("area", "quality"):
        np.testing.assert_array_equal(units(both["small-only"], metric), small)
        np.testing.assert_array_equal(units(both["large-only"], metric), large)
    # The oracle by sorting the gap, in each part.
    found = trial(problem, ORACLE, tmp_path, "oracle")
    for part in problem._parts(0):
        gaps = np.sort((large - small)[part])[::-1]
        curve = small[part].mean() + np.concatenate([[0], np.cumsum(gaps)]) / len(part)
        assert units(found)[part].mean() == pytest.approx(np.trapezoid(curve) / len(part))
    for design in DESIGNS.values():
        if design.method not in ("large-only", "small-only"):
            other = trial(problem, design, tmp_path, f"against {design.name}")
            assert units(found).mean() >= units(other).mean() - 1e-12


def test_costs_pay_the_small_model_always_and_the_large_one_when_asked(folder, prompts, tmp_path):
    problem = made(folder, prompts, small_cost=1.0, large_cost=8.0, target_rate=0.25)
    # Parts of 24 prompts, 6 of them deferred, and no two averages are equal.
    found = trial(problem, DESIGNS["chow-average"], tmp_path)
    assert set(units(found, "cost").tolist()) == {1 / 8, 9 / 8}
    assert units(found, "cost").mean() == pytest.approx(1 / 8 + 0.25)
    assert (units(trial(problem, DESIGNS["large-only"], tmp_path, "l"), "cost") == 1).all()
    assert (units(trial(problem, DESIGNS["small-only"], tmp_path, "s"), "cost") == 1 / 8).all()
    counted = trial(made(folder, prompts), DESIGNS["large-only"], tmp_path, "counted")
    assert units(counted, "cost").mean() == pytest.approx(1.0)
    assert len(set(units(counted, "cost"))) > 1  # prompts and answers differ in length


def test_the_share_deferred_by_a_calibrated_threshold_is_reported(problem, tmp_path):
    found = trial(problem, DESIGNS["chow-average"], tmp_path)
    assert 0.1 < found.cost["deferred_share"] < 0.5
    assert "deferred_share" not in trial(problem, DESIGNS["random"], tmp_path, "r").cost
    assert "labels_used" not in found.cost
    assert trial(problem, DESIGNS["post-hoc-quantile"], tmp_path, "p").cost["labels_used"] == 72


def test_a_level_is_chosen_by_the_area_on_the_calibration_data(problem, tmp_path):
    found = trial(problem, DESIGNS["chow-quantile, chosen"], tmp_path)
    examples = problem.examples()
    for part in problem._parts(0):
        rest, tested = (examples.take(rows) for rows in (np.setdiff1d(np.arange(N), part), part))
        areas = {
            alpha: deferral_auc(
                -np.array([np.quantile(record.log_probs, alpha) for record in rest.small]),
                rest.q_small,
                rest.q_large,
            ).value
            for alpha in ALPHAS
        }
        best = max(areas, key=areas.__getitem__)
        score = [-np.quantile(record.log_probs, best) for record in tested.small]
        expected = deferral_auc(score, tested.q_small, tested.q_large).value
        assert units(found)[part].mean() == pytest.approx(expected, abs=1e-9)


def test_fewer_prompts_to_fit_on_are_drawn_from_outside_the_part(folder, prompts, monkeypatch):
    problem = made(folder, prompts, n_calibration=60)
    fitted = []
    original = rules.PostHocDeferral.fit
    monkeypatch.setattr(
        rules.PostHocDeferral,
        "fit",
        lambda self, records, *q: fitted.append(records) or original(self, records, *q),
    )
    examples = problem.examples()
    rows = {id(record): row for row, record in enumerate(examples.small)}
    for number, part in enumerate(problem._parts(0)):
        problem._ranked(DESIGNS["post-hoc-quantile"], 0, number, part, examples)
        used = {rows[id(record)] for record in fitted[-1]}
        assert len(used) == 60
        assert not used & set(part.tolist())


# Nobody is asked twice ----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """How many prompts models are asked."""
    counts = []
    original = TextGenerator.__call__
    monkeypatch.setattr(
        TextGenerator,
        "__call__",
        lambda self, prompts, **more: (
            counts.append(len(prompts)) or original(self, prompts, **more)
        ),
    )
    return counts


def test_a_study_is_resumed_without_asking_again(folder, prompts, asked, tmp_path):
    fresh = [Prompt(f"new {prompt.text}", answers=prompt.answers) for prompt in prompts[:80]]
    options = {"quality": "edit-similarity"}
    designs = [DESIGNS[name] for name in ("random", "chow-sum", "post-hoc-embed")]
    directory = tmp_path / "study"

    def study(some, seeds):
        problem = made(folder, fresh, **options)
        return Study(problem, some, reference="random", seeds=seeds, directory=directory)

    first = study(designs[:2], 2).run()
    assert asked == [80, 80]
    more = study(designs, 3).run()
    assert asked == [80, 80]
    assert not first.data["failures"]
    assert not more.data["failures"]


def test_a_killed_study_asks_only_what_was_not_answered(folder, asked, monkeypatch):
    monkeypatch.setattr(cascading, "_CHUNK", 8)
    fresh = [Prompt(f"item {number}", answers=("x",)) for number in range(24)]
    calls = []
    original = TextGenerator.__call__

    def dying(self, prompts, **more):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, prompts, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TextGenerator, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            made(folder, fresh).examples()
    asked.clear()
    found = made(folder, fresh).examples()
    assert asked == [8, 8, 8, 8]  # one of the small model's three, three of the large one's
    whole = TextGenerator(load_language_model(folder / "large"), max_new_tokens=6)(found.prompts)
    assert [record.text for record in found.large] == [record.text for record in whole]


def test_workers_find_answers_without_loading_a_model(
    folder, prompts, asked, tmp_path, monkeypatch
):
    problem = made(folder, prompts)
    problem.prepare([DESIGNS["chow-sum"]], [0], Work(tmp_path))
    mine = trial(problem, DESIGNS["post-hoc-embed"], tmp_path, "mine")
    asked.clear()
    packed = pickle.dumps(problem)
    assert len(packed) < 50_000
    monkeypatch.setattr("bakeoff.models.loading.load_language_model", None)
    theirs = trial(pickle.loads(packed), DESIGNS["post-hoc-embed"], tmp_path, "theirs")
    np.testing.assert_array_equal(units(mine), units(theirs))
    assert asked == []


def test_progress_goes_from_nothing_to_everything(folder, tmp_path):
    fresh = [Prompt(f"progress {number}", answers=("x",)) for number in range(20)]
    heard = []
    problem = made(folder, fresh, batch_size=4)
    problem.prepare([DESIGNS["random"]], [0], Work(tmp_path, lambda *a: heard.append(a)))
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {message for _, message in heard} == {
        "the small model answers",
        "the large model answers",
    }


# Identity -----------------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_scores_depend_on(folder, prompts, tmp_path):
    save_language_model(tmp_path / "other", seed=7)
    base = made(folder, prompts)
    prints = {
        base.fingerprint(),
        made(folder, prompts[::-1]).fingerprint(),
        made(folder, prompts, large=str(tmp_path / "other")).fingerprint(),
        made(folder, prompts, quality="contains").fingerprint(),
        made(folder, prompts, folds=3).fingerprint(),
        made(folder, prompts, n_calibration=60).fingerprint(),
        made(folder, prompts, target_rate=0.5).fingerprint(),
        made(folder, prompts, small_cost=1, large_cost=2).fingerprint(),
        made(folder, prompts, max_new_tokens=7).fingerprint(),
        made(folder, prompts, chat=True).fingerprint(),
    }
    assert len(prints) == 10
    assert made(folder, prompts, batch_size=3).fingerprint() == base.fingerprint()
    assert pickle.loads(pickle.dumps(base)).fingerprint() == base.fingerprint()
    base.examples()
    assert made(folder, prompts).fingerprint() == base.fingerprint()


def test_models_are_trained_once_and_travel_without_their_texts(tmp_path, prompts):
    texts = [f"query {number} of {number % 7} is {number % 3} <end>" for number in range(400)]
    shape = {"vocabulary": 300, "n_heads": 2, "steps": 3, "batch_size": 4}
    problem = CascadeProblem(
        prompts,
        small=SmallGPT(n_layers=1, width=16, **shape),
        large=SmallGPT(n_layers=2, width=32, **shape),
        training_texts=texts,
        quality="edit-similarity",
        max_new_tokens=4,
    )
    before = problem.fingerprint()
    heard = []
    problem.prepare([DESIGNS["random"]], [0], Work(tmp_path, lambda *a: heard.append(a)))
    assert problem.fingerprint() == before
    assert heard[0][1].startswith("training a small GPT")
    assert len(pickle.dumps(problem)) < 60_000
    other = CascadeProblem(
        prompts, small=problem.models["small"], large=problem.models["large"],
        training_texts=texts[1:], quality="edit-similarity", max_new_tokens=4,
    )  # fmt: skip
    assert other.fingerprint() != before
    design = DESIGNS["chow-average"]
    found = trial(problem, design, tmp_path)
    destination = tmp_path / "winner"
    assert not problem.export(design, found.artifact, destination)
    assert load_settings(destination).model == "./small"
    answers = use(problem.usage(destination), [prompts[0].text])
    assert answers[0].text == problem.examples().small[0].text or answers.deferred[0]
    assert "trained on 400 texts" in problem.describe()["small model"]


def test_the_default_pair_differs_in_size_as_it_says_and_has_not_seen_the_prompts():
    def weights(shape):  # of a Llama with tied embeddings: attention 4 w^2, three matrices of 4 w^2
        return shape.n_layers * 16 * shape.width**2 + shape.vocabulary * shape.width

    problem = default_cascade_problem("demo", folds=4)
    assert problem.folds == 4
    assert 0.2e6 < weights(problem.models["small"]) < 0.5e6
    assert 2e6 < weights(problem.models["large"]) < 3e6
    asked = {prompt.text for prompt in problem.prompts}
    assert not asked & {text.split(" = ")[0] + " =" for text in problem.training_texts}
    for design in DESIGNS.values():
        problem.check(design)


# The winner ---------------------------------------------------------------------------------------


def use(lines, prompts):
    scope = {"prompts": prompts}
    exec("\n".join(lines), scope)
    return scope["answers"]


@pytest.mark.filterwarnings("ignore:.*of the queries were deferred")  # labels are mere chance
@pytest.mark.parametrize(
    "name", ["post-hoc-embed", "chow-quantile, chosen", "chow-sum", "random", "post-hoc-quantile"]
)
def test_the_winner_is_a_cascade_that_defers_the_target_rate(problem, name, tmp_path):
    found = trial(problem, DESIGNS[name], tmp_path)
    destination = tmp_path / "winner"
    assert problem.export(DESIGNS[name], found.artifact, destination, reason="it won") is False
    lines = problem.usage(destination)
    readme = (destination / "README.md").read_text()
    assert "it won" in readme
    assert "\n".join(lines) in readme
    examples = problem.examples()
    answers = use(lines, list(examples.prompts))
    cascade = Cascade.load(destination / "cascade.safetensors", lambda p: [], lambda p: [])
    assert 0.2 < cascade.point_.rate <= 0.3
    # Calibration scores of a learned rule are others; random ones follow every bit of an answer.
    if name in ("chow-sum", "chow-quantile, chosen"):
        assert answers.rate == pytest.approx(cascade.point_.rate)
    texts = [
        large.text if deferred else small.text
        for small, large, deferred in zip(
            examples.small, examples.large, answers.deferred, strict=True
        )
    ]
    assert answers.texts == texts
    assert 0 < sum(answers.deferred) < N


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_model_alone_is_a_winner_too(problem, which, tmp_path):
    design = DESIGNS[f"{which}-only"]
    found = trial(problem, design, tmp_path)
    problem.export(design, found.artifact, tmp_path / "winner")
    examples = problem.examples()
    answers = use(problem.usage(tmp_path / "winner"), list(examples.prompts[:4]))
    assert [a.text for a in answers] == [r.text for r in getattr(examples, which)[:4]]


def test_the_oracle_cannot_be_taken_home(problem, tmp_path):
    found = trial(problem, ORACLE, tmp_path)
    with pytest.raises(DataError, match="design 'oracle': the oracle reads the accepted answers"):
        problem.export(ORACLE, found.artifact, tmp_path / "winner")


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "chow"), "design 'x': chow does not say when to ask .*: random, small-only"),
        (Design("x", "chow-sum", {"alpha": 1}), "design 'x': chow-sum takes no parameters; got al"),
        (Design("x", "chow-quantile", {"alpha": 1.5}), r"'x': alpha must be in \[0, 1\] or 'cho"),
        (Design("x", "chow-quantile", {"alpha": "best"}), "'x': alpha must be .*, got 'best'"),
        (Design("x", "post-hoc-quantile", {"target": "all"}), "'x': target must be one of gap"),
        (Design("x", "post-hoc-quantile", {"estimator": "tree"}), "'x': estimator must be 'auto'"),
        (Design("x", "post-hoc-quantile", {"estimator": 3}), "'x': estimator must be 'auto'"),
        (Design("x", "chow-quantile", {"alpha": [0.1]}), "design 'x': "),
        (Design("x", "post-hoc-quantile", {"features": 3}), "design 'x': "),
        (Design("x", "post-hoc-quantile", {"folds": 1}), "'x': folds must be at least 2"),
        (
            Design("x", "post-hoc-embed", {"features": ["quantiles", "large_embedding"]}),
            "design 'x': features has 'large_embedding': token features of the large model are not",
        ),
        (Design("x", "post-hoc-embed", {"features": "sum"}), "'x': features must be a sequence"),
        (Design("x", "post-hoc-embed", {"n_components": 0}), "'x': n_components must be at least"),
    ],
)
def test_designs_that_cannot_run_are_refused(problem, tmp_path, design, message):
    for refused in (problem.check, lambda d: problem.prepare([d], [0], Work(tmp_path))):
        with pytest.raises(DataError, match=message):
            refused(design)


def test_too_few_prompts_to_learn_from_are_told_beforehand(folder, prompts):
    problem = made(folder, prompts, n_calibration=49)
    problem.check(DESIGNS["chow-quantile, chosen"])
    with pytest.raises(DataError, match="needs at least 50 prompts to learn from, and gets 49"):
        problem.check(DESIGNS["post-hoc-quantile"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": "bleu"}, "quality must be one of exact-match, .*, got 'bleu'"),
        ({"folds": 1}, "folds must be from 2 to 48, half the prompts, got 1"),
        ({"folds": 49}, "folds must be from 2 to 48"),
        ({"n_calibration": 73}, "n_calibration must be from 1 to 72, .*, got 73"),
        ({"target_rate": 0.0}, "target_rate must be between 0 and 1, got 0.0"),
        ({"small_cost": 1.0}, "give small_cost and large_cost, in one unit, or neither"),
        ({"small_cost": -1.0, "large_cost": 2.0}, "small_cost must be a positive number, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"training_texts": ["a"]}, "training_texts is for models that are to be trained"),
        ({"small": SmallGPT()}, "training_texts must hold what a SmallGPT is to be trained on"),
        ({"small": "same", "large": "same"}, "small and large must be two models, got 'same'"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, prompts, changes, message):
    with pytest.raises(DataError, match=message):
        made(folder, prompts, **changes)


def test_prompts_without_answers_or_too_few_are_refused(folder, prompts):
    with pytest.raises(DataError, match="prompt 1 has none: 'what'"):
        made(folder, [prompts[0], Prompt("what"), *prompts[2:]])
    with pytest.raises(DataError, match="prompts must hold at least 10 to compare when to ask"):
        made(folder, prompts[:9])


def test_a_prompt_that_a_model_cannot_read_is_named(folder, tmp_path):
    save_language_model(tmp_path / "short", seed=3, length=40)
    long = [Prompt("x" * (35 if row == 7 else 20), answers=("y",)) for row in range(12)]
    problem = made(folder, long, large=str(tmp_path / "short"))
    with pytest.raises(DataError, match=r"prompt 7 has 35 tokens for the large model, .* most 40"):
        problem.examples()


def test_documents_and_options_are_read_with_the_prompt():
    prompt = Prompt("Which?", ("b",), ("a", "b"), passages=("One.", "Two."), document="Long.")
    assert cascading._asked(prompt) == "Long.\n\nOne.\n\nTwo.\n\nWhich?\n- a\n- b"
    assert cascading._asked(Prompt("Which?")) == "Which?"


# The data -----------------------------------------------------------------------------------------


def spoken_number(words):
    """Read a number in words, as another program would."""
    values = {word: value for value, word in enumerate(SPOKEN_ONES)}
    values |= {word: 10 * value for value, word in enumerate(SPOKEN_TENS, 2)}
    total = part = 0
    for word in re.split(r"[ -]", words):
        if word == "thousand":
            total, part = total + 1000 * part, 0
        elif word == "hundred":
            part *= 100
        elif word != "and":
            part += values[word]
    return total + part


SPOKEN_ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
]
SPOKEN_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@given(st.integers(0, 999_999))
def test_a_number_in_words_reads_back(number):
    assert spoken_number(number_in_words(number)) == number


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (100, "one hundred"), (1001, "one thousand and one"), (40_000, "forty thousand")],
)
def test_numbers_known_by_heart(number, words):
    assert number_in_words(number) == words


def test_ordinals_years_and_numerals_known_by_heart():
    numbers = (1, 2, 3, 5, 8, 9, 12, 20, 21, 100, 112)
    assert [ordinal_in_words(number) for number in numbers] == [
        *("first", "second", "third", "fifth", "eighth", "ninth", "twelfth", "twentieth"),
        *("twenty-first", "one hundredth", "one hundred and twelfth"),
    ]
    years = {1066: "ten sixty-six", 1900: "nineteen hundred", 2000: "two thousand"}
    years |= {1809: "eighteen oh nine", 2024: "twenty twenty-four", 1000: "one thousand"}
    assert {year: year_in_words(year) for year in years} == years
    written = {4: "IV", 1994: "MCMXCIV", 3888: "MMMDCCCLXXXVIII", 2049: "MMXLIX"}
    assert {number: roman_numeral(number) for number in written} == written


@pytest.mark.parametrize("call", [number_in_words, roman_numeral, year_in_words])
@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_numbers_that_nobody_reads_are_refused(call, number):
    with pytest.raises(DataError, match="must be from"):
        call(number)


def test_prompts_are_no_training_texts_and_the_same_everywhere(monkeypatch):
    prompts = spelling_prompts("smoke")
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 240
    assert {prompt.text.split()[0] for prompt in prompts} == set(SPELLING_KINDS)
    trained = {text.split(" = ")[0] + " =" for text in spelling_texts("smoke")}
    assert len(spelling_texts("smoke")) == 3000
    assert not trained & {prompt.text for prompt in spelling_prompts("demo")}
    state = random.getstate()
    assert prompts == spelling_prompts("smoke")
    assert random.getstate() == state
    with pytest.raises(DataError, match="size must be one of smoke, demo, full, got 'huge'"):
        spelling_prompts("huge")


def test_every_kind_reads_as_it_should():
    known = {
        "date 2 1 . 7 . 2 0 9 2 =": "the twenty-first of July twenty ninety-two",
        "time 1 3 : 5 0 =": "ten to two in the afternoon",
        "telephone 0 8 8 3 6 0 7 =": "oh double eight three six oh seven",
        "measure 5 4 h =": "fifty-four hours",
        "decimal 0 . 1 2 0 =": "zero point one two zero",
        "roman V I I I =": "eight",
        "ordinal 4 7 3 r d =": "four hundred and seventy-third",
    }
    found = {prompt.text: prompt.answers[0] for prompt in spelling_prompts("demo")}
    assert {text: found[text] for text in known} == known
    for text, answer in found.items():
        kind, written = text.removesuffix(" =").split(" ", 1)
        if kind == "cardinal":
            assert spoken_number(answer) == int(written.replace(" ", ""))
