"""Oracles, invariances, bad input and calibration of the paired statistics.

About 16 s on one idle core, of which calibration takes most.
"""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from bakeoff.study.statistics import (
    Comparison,
    Record,
    compare,
    critical_difference,
    wilcoxon_holm,
)

MIXED = (8, 12, 20, 30, 40)


def one_task(design, reference, **options):
    scores = {"reference": {"task": np.atleast_2d(reference)}, "design": {"task": design}}
    scores["design"]["task"] = np.atleast_2d(design)
    return compare(scores, "reference", **options)["design"].overall


def crossed(
    rng,
    units=MIXED,
    n_seeds=3,
    designs=("reference", "design"),
    unit=1.0,
    seed=0.0,
    task=0.0,
    effect=0.0,
    noise=None,
    binary=False,
):
    """Scores with difficulty shared by designs, and effects that are each design's own."""
    draw = noise or (lambda size: rng.normal(size=size))
    difficulty = [rng.normal(size=(1, n)) for n in units]
    scores = {}
    for index, name in enumerate(designs):
        seeds, tasks = seed * rng.normal(size=(n_seeds, 1)), task * rng.normal(size=len(units))
        scores[name] = {}
        for t, n in enumerate(units):
            latent = difficulty[t] + tasks[t] + seeds + unit * draw((1, n)) + draw((n_seeds, n))
            latent = latent + effect * (index > 0)
            scores[name][f"task {t}"] = (latent > 0).astype(float) if binary else latent
    return scores


# --- oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 9, 13])
def test_few_units_give_scipys_exact_permutation_p_value(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        reference, design = rng.normal(size=n), rng.normal(size=n) + 0.4
        expected = stats.permutation_test(
            (design - reference,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            vectorized=True,
        ).pvalue
        assert one_task(design, reference).p_value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [14, 60, 400])
def test_many_units_agree_with_scipys_permutation_test_within_monte_carlo_error(n):
    rng = np.random.default_rng(n)
    reference = rng.normal(size=n)
    design = reference + rng.standard_t(3, size=n) + 2.5 / math.sqrt(n)
    expected = stats.permutation_test(
        (design - reference,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=29_999,
        vectorized=True,
        batch=5_000,
        rng=1,
    ).pvalue
    error = math.sqrt(expected * (1 - expected) * (1 / 9_999 + 1 / 29_999))
    assert one_task(design, reference).p_value == pytest.approx(expected, abs=5 * error + 2e-4)


def test_interval_is_every_value_that_brute_force_sign_flips_do_not_reject():
    rng = np.random.default_rng(5)
    d = rng.exponential(size=8) - 0.2
    low, high = one_task(d, np.zeros(8)).interval
    signs = np.array(list(product((-1, 1), repeat=8)))

    def p_value(x):
        return np.mean(np.abs(signs @ (d - x)) >= abs((d - x).sum()) - 1e-9)

    step = 1e-6
    assert p_value(low + step) > 0.05 >= p_value(low - step)
    assert p_value(high - step) > 0.05 >= p_value(high + step)


def test_interval_and_p_value_agree_at_every_level():
    rng = np.random.default_rng(6)
    for n in (10, 50):
        reference, design = rng.normal(size=n), rng.normal(size=n) + 0.5
        p = one_task(design, reference).p_value
        for alpha, excluded in ((p * 1.01, True), (p * 0.97, False)):
            low, high = one_task(design, reference, alpha=alpha).interval
            assert (low > 0 or high < 0) is excluded


def test_many_units_agree_with_the_paired_t_test():
    rng = np.random.default_rng(7)
    reference, noise = rng.normal(size=3000), rng.normal(size=3000)
    design = reference + noise + 0.05
    oracle = stats.ttest_rel(design, reference)
    interval = oracle.confidence_interval(0.95)
    record = one_task(design, reference)
    width = interval.high - interval.low
    assert record.p_value == pytest.approx(oracle.pvalue, abs=0.01)
    assert record.interval[0] == pytest.approx(interval.low, abs=0.03 * width)
    assert record.interval[1] == pytest.approx(interval.high, abs=0.03 * width)
    assert record.effect_size == pytest.approx(oracle.statistic / math.sqrt(3000), rel=1e-9)


def test_fewer_units_than_flips_can_judge_give_the_paired_t_test_exactly():
    reference, design = np.array([1.0, 2, 4, 3, 2]), np.array([2.0, 3.5, 4.4, 4.2, 2.9])
    oracle = stats.ttest_rel(design, reference)
    record = one_task(design, reference)
    assert record.p_value == pytest.approx(oracle.pvalue)
    assert record.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))


def test_tasks_that_disagree_give_the_t_test_over_tasks_exactly():
    rng = np.random.default_rng(8)
    effects = np.array([-1.0, 0.5, 2.0, 4.0, 1.0])
    scores = {
        "a": {f"t{i}": np.zeros((1, 30)) for i in range(5)},
        "b": {f"t{i}": e + 0.1 * rng.normal(size=(1, 30)) for i, e in enumerate(effects)},
    }
    record = compare(scores, "a", tasks="sampled")["b"].overall
    oracle = stats.ttest_1samp([scores["b"][f"t{i}"].mean() for i in range(5)], 0)
    assert record.p_value == pytest.approx(oracle.pvalue)
    assert record.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))


@pytest.mark.parametrize("n_tasks", [2, 5])
def test_fixed_tasks_that_disagree_give_the_stratified_interval(n_tasks):
    """How far fixed tasks lie apart is no noise: the classic interval of a stratified mean."""
    rng = np.random.default_rng(12)
    sizes, effects = (40, 60, 80, 100, 120)[:n_tasks], (-1.0, 0.5, 2.0, 4.0, 1.0)[:n_tasks]
    scores = {
        "a": {f"t{i}": np.zeros((1, n)) for i, n in enumerate(sizes)},
        "b": {
            f"t{i}": e + rng.normal(size=(1, n))
            for i, (n, e) in enumerate(zip(sizes, effects, strict=True))
        },
    }
    record = compare(scores, "a")["b"].overall
    tasks = [scores["b"][name][0] for name in scores["b"]]
    error = math.sqrt(sum(task.var(ddof=1) / len(task) for task in tasks)) / n_tasks
    mean = np.mean([task.mean() for task in tasks])
    assert record.difference == pytest.approx(mean)
    half = (record.interval[1] - record.interval[0]) / 2
    assert half == pytest.approx(stats.norm.ppf(0.975) * error, rel=0.06)
    expected = 2 * stats.norm.sf(abs(mean) / error)
    assert record.p_value == pytest.approx(max(expected, 1e-4), rel=0.3)
    # Moving whole tasks apart, their mean kept, changes nothing but the wins and losses.
    shifts = np.linspace(-3, 3, n_tasks)
    moved = {f"t{i}": scores["b"][f"t{i}"] + shift for i, shift in enumerate(shifts)}
    again = compare({"a": scores["a"], "b": moved}, "a")["b"].overall
    assert again.interval == pytest.approx(record.interval, abs=1e-9)
    assert again.p_value == pytest.approx(record.p_value)


def test_seeds_that_disagree_give_nearly_the_t_test_over_seeds():
    rng = np.random.default_rng(9)
    by_seed = np.array([0.5, 1.5, 1.2, 0.1])[:, None]
    design = by_seed + 0.01 * rng.normal(size=(4, 200))
    record = one_task(design, np.zeros((4, 200)))
    oracle = stats.ttest_1samp(design.mean(axis=1), 0)
    assert record.p_value == pytest.approx(oracle.pvalue, rel=0.01)
    assert record.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=0.01)


def test_one_task_with_seeds_gives_the_wider_of_two_textbook_intervals():
    for spread in (0.02, 0.1, 0.3, 1.0):
        rng = np.random.default_rng(int(100 * spread))
        d = spread * np.array([-1.0, 0.2, 0.8])[:, None] + rng.normal(size=(1, 50))
        d = d + 0.3 * rng.normal(size=(3, 50)) + 0.2
        record = one_task(d, np.zeros((3, 50)))
        units, seeds = d.mean(axis=0), d.mean(axis=1)
        residual = d - units - seeds[:, None] + d.mean()
        v_residual = (residual**2).sum() / (2 * 49) / 150
        v_unit, v_seed = units.var(ddof=1) / 50, seeds.var(ddof=1) / 3
        if v_seed <= v_residual:
            assert spread == 0.02
            continue
        v = v_unit + v_seed - v_residual
        degrees = v**2 / (v_unit**2 / 49 + v_seed**2 / 2 + v_residual**2 / 98)

        def half(p, v=v, degrees=degrees, parts=(v_unit, v_seed - v_residual)):
            t = stats.t.isf(p / 2, [degrees, 49, 2])
            return max(t[0] * v**0.5, (t[1] ** 2 * parts[0] + t[2] ** 2 * parts[1]) ** 0.5)

        assert record.interval == pytest.approx((d.mean() - half(0.05), d.mean() + half(0.05)))
        assert half(record.p_value) == pytest.approx(abs(d.mean()))


def test_crossed_variance_is_two_way_clustering_by_hand():
    """Tasks and seeds both disagree, additively: spread of tasks plus spread of seeds."""
    tasks, seeds = np.array([-2.0, 1.0, 4.0, 0.0]), np.array([-1.0, 2.0, 0.5])
    d = 1.0 + tasks[:, None] + seeds[None, :]
    noise = 1e-3 * np.random.default_rng(10).normal(size=(4, 3, 50))
    scores = {
        "a": {f"t{i}": np.zeros((3, 50)) for i in range(4)},
        "b": {f"t{i}": d[i][:, None] + noise[i] for i in range(4)},
    }
    record = compare(scores, "a", tasks="sampled")["b"].overall
    v_task, v_seed = tasks.var(ddof=1) / 4, seeds.var(ddof=1) / 3
    degrees = (v_task + v_seed) ** 2 / (v_task**2 / 3 + v_seed**2 / 2)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(v_task + v_seed)
    assert record.interval == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-3)
    expected = 2 * stats.t.sf(abs(d.mean()) / math.sqrt(v_task + v_seed), degrees)
    assert record.p_value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("n", "gain"), [(40, 0.2), (200, 0.1), (9, 0.5)])
def test_zero_one_scores_under_one_seed_give_exact_mcnemar(n, gain):
    rng = np.random.default_rng(n)
    reference = rng.random(n) < 0.5
    design = np.where(rng.random(n) < 0.3, rng.random(n) < 0.5 + gain, reference)
    table = [
        [np.sum(reference & design), np.sum(reference & ~design)],
        [np.sum(~reference & design), np.sum(~reference & ~design)],
    ]
    record = one_task(design.astype(float), reference.astype(float))
    assert record.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (record.wins, record.losses) == (table[1][0], table[0][1])
    # Bonett and Price: one more win, one more loss
    b, c = (record.wins + 1) / (n + 2), (record.losses + 1) / (n + 2)
    half = stats.norm.ppf(0.975) * math.sqrt((b + c - (b - c) ** 2) / (n + 2))
    assert record.interval == pytest.approx((b - c - half, min(1.0, b - c + half)), abs=1e-6)


def test_all_ties_in_zero_one_scores_are_no_proof_of_equivalence_for_few_units():
    few, many = np.ones(8), np.ones(2000)
    assert one_task(few, few, margin=0.05).verdict == "undecided"
    assert one_task(many, many, margin=0.05).verdict == "equivalent"


def test_equivalence_is_two_one_sided_t_tests():
    rng = np.random.default_rng(12)
    small_reference = np.arange(5.0)
    small_design = small_reference + np.array([0.1, -0.1, 0.05, 0.02, -0.03])
    for margin in (0.05, 0.08, 0.1, 0.12, 0.2):
        p = ttost_paired(small_design, small_reference, -margin, margin)[0]
        verdict = one_task(small_design, small_reference, margin=margin).verdict
        assert (verdict == "equivalent") == (p < 0.05)
    reference = rng.normal(size=500)
    design = reference + rng.normal(size=500)
    for margin in np.linspace(0.02, 0.3, 15):
        p = ttost_paired(design, reference, -margin, margin)[0]
        if abs(p - 0.05) > 0.01:
            verdict = one_task(design, reference, margin=margin).verdict
            assert (verdict == "equivalent") == (p < 0.05)


def test_holm_correction_is_statsmodels_and_runs_over_designs():
    rng = np.random.default_rng(13)
    names = ["reference", *"abcdef"]
    scores = crossed(rng, designs=names, effect=0.4)
    result = compare(scores, "reference")
    for pick in (
        lambda comparison: comparison.overall,
        lambda comparison: comparison.tasks["task 2"],
    ):
        raw = [pick(result[name]).p_value for name in names[1:]]
        expected = multipletests(raw, method="holm")[1]
        assert [pick(result[name]).p_holm for name in names[1:]] == pytest.approx(list(expected))


def test_quantiles_counts_mean_and_effect_size_by_hand():
    rng = np.random.default_rng(14)
    scores = crossed(rng, units=(10, 25))
    record = compare(scores, "reference")["design"].overall
    units = [
        (scores["design"][task] - scores["reference"][task]).mean(axis=0)
        for task in scores["design"]
    ]
    pooled = np.concatenate(units)
    assert record.difference == pytest.approx(np.mean([u.mean() for u in units]))
    assert record.mean == pytest.approx(np.mean([s.mean() for s in scores["design"].values()]))
    assert record.difference_quantiles == pytest.approx(np.percentile(pooled, range(0, 101, 5)))
    assert (record.wins, record.ties, record.losses) == ((pooled > 0).sum(), 0, (pooled < 0).sum())
    spread = math.sqrt(np.mean([u.var(ddof=1) for u in units]))
    assert record.effect_size == pytest.approx(record.difference / spread)
    assert (record.n_units, record.n_seeds, record.n_tasks) == (35, 3, 2)


def test_needed_units_decide_with_the_promised_power():
    """Draw studies of the advised size from what the pilot saw; four in five must decide."""
    rng = np.random.default_rng(15)
    pilot = rng.normal(size=40)
    pilot = (pilot - pilot.mean()) / pilot.std(ddof=1) + 0.25
    needed = one_task(pilot, np.zeros(40)).needed_units
    # The pilot's own variance has 39 degrees of freedom, hence Student's quantile.
    assert needed == math.ceil((stats.t.ppf(0.975, 39) + 0.8416) ** 2 / 0.25**2)
    decided = [
        one_task(rng.normal(0.25, 1, size=needed), np.zeros(needed)).verdict == "better"
        for _ in range(300)
    ]
    assert 0.72 < np.mean(decided) < 0.88  # binomial, false alarm below 1e-3


def test_needed_seeds_help_only_where_seeds_limit():
    rng = np.random.default_rng(16)
    by_seed = np.array([-0.2, 0.9, 0.5])[:, None]
    record = one_task(by_seed + 0.1 * rng.normal(size=(3, 100)), np.zeros((3, 100)))
    assert record.verdict == "undecided"
    assert record.needed_units is None
    assert 4 <= record.needed_seeds <= 30
    single = one_task(rng.normal(size=30), np.zeros(30))
    assert single.verdict == "undecided"
    assert single.needed_seeds is None
    decided = one_task(rng.normal(size=30) + 3, np.zeros(30))
    assert decided.needed_units is None


def test_verdicts():
    rng = np.random.default_rng(17)
    reference = rng.normal(size=(1, 300))
    noise = 0.1 * rng.normal(size=(1, 300))
    assert one_task(reference + noise + 0.5, reference).verdict == "better"
    assert one_task(reference + noise - 0.5, reference).verdict == "worse"
    assert one_task(reference + noise, reference).verdict == "undecided"
    tiny = one_task(reference + noise + 0.05, reference, margin=0.2)
    assert tiny.p_holm < 0.05
    assert tiny.verdict == "equivalent"  # certain, and too small to matter
    assert one_task(reference + noise + 0.05, reference, margin=0.04).verdict == "better"
    lower = one_task(reference + noise + 0.5, reference, higher_is_better=False)
    assert lower.verdict == "worse"
    assert lower.difference > 0
    assert lower.losses > lower.wins


# --- invariances -------------------------------------------------------------------------------


def assert_close(first: Record, second: Record, tolerance=0.02):
    width = first.interval[1] - first.interval[0]
    assert second.difference == pytest.approx(first.difference, rel=1e-9, abs=1e-12)
    assert second.p_value == pytest.approx(first.p_value, abs=tolerance)
    assert second.interval == pytest.approx(first.interval, abs=2 * tolerance * width)
    assert second.effect_size == pytest.approx(first.effect_size, rel=1e-9, abs=1e-12)
    assert (second.wins, second.ties, second.losses) == (first.wins, first.ties, first.losses)


def mapped(scores, change):
    return {
        name: {task: change(task, array) for task, array in tasks.items()}
        for name, tasks in scores.items()
    }


@pytest.mark.parametrize("seed_spread", [0.0, 0.5])
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_order_of_units_and_seeds_does_not_matter(n_seeds, seed_spread):
    scores = crossed(np.random.default_rng(18), n_seeds=n_seeds, seed=seed_spread, effect=0.3)
    before = compare(scores, "reference")["design"]

    def shuffle(task, array):
        order = np.random.default_rng(len(task) + array.shape[1])
        return array[::-1][:, order.permutation(array.shape[1])]

    after = compare(mapped(scores, shuffle), "reference")["design"]
    assert_close(before.overall, after.overall)
    for task in before.tasks:
        assert_close(before.tasks[task], after.tasks[task])


def test_copies_of_one_seed_add_no_information():
    scores = crossed(np.random.default_rng(31), n_seeds=1, effect=0.3)
    single = compare(scores, "reference")["design"]
    copied = compare(mapped(scores, lambda task, array: np.repeat(array, 4, axis=0)), "reference")
    assert_close(single.overall, copied["design"].overall, 1e-9)
    for task, record in single.tasks.items():
        assert_close(record, copied["design"].tasks[task], 1e-9)


def test_constants_scale_and_sign():
    scores = crossed(np.random.default_rng(19), effect=0.4)
    before = compare(scores, "reference")["design"].overall
    shifted = compare(mapped(scores, lambda t, a: a + 5), "reference")["design"].overall
    assert_close(before, shifted, 1e-9)
    scaled = compare(mapped(scores, lambda t, a: 100 * a), "reference")["design"].overall
    assert scaled.difference == pytest.approx(100 * before.difference)
    assert scaled.interval == pytest.approx(tuple(100 * end for end in before.interval))
    assert scaled.p_value == before.p_value
    assert scaled.effect_size == pytest.approx(before.effect_size)
    negated = compare(mapped(scores, lambda t, a: -a), "reference", higher_is_better=False)[
        "design"
    ].overall
    assert negated.interval == pytest.approx((-before.interval[1], -before.interval[0]))
    assert negated.verdict == before.verdict
    assert (negated.wins, negated.losses) == (before.wins, before.losses)


def test_swapping_design_and_reference_mirrors_the_record():
    scores = crossed(np.random.default_rng(20), seed=0.2, effect=0.9)
    forth = compare(scores, "reference")["design"].overall
    back = compare(scores, "design")["reference"].overall
    assert back.difference == pytest.approx(-forth.difference)
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
    assert back.p_value == pytest.approx(forth.p_value)
    assert {forth.verdict, back.verdict} == {"better", "worse"}


def test_order_of_designs_is_kept_and_changes_no_number():
    scores = crossed(np.random.default_rng(21), designs=("reference", "a", "b", "c"), effect=0.2)
    first = compare(scores, "reference")
    second = compare(dict(reversed(scores.items())), "reference")
    assert list(first) == ["reference", "a", "b", "c"]
    assert list(second) == ["c", "b", "a", "reference"]
    for name in scores:
        a, b = first[name].to_json(), second[name].to_json()
        for scope_a, scope_b in zip(
            [a["overall"], *a["tasks"].values()], [b["overall"], *b["tasks"].values()], strict=True
        ):
            for field in scope_a:
                assert scope_a[field] == (
                    scope_b[field]
                    if scope_a[field] is None or isinstance(scope_a[field], str)
                    else pytest.approx(scope_b[field], rel=1e-9, abs=1e-12)
                )


def test_same_scores_and_seed_same_result_other_seed_almost():
    scores = crossed(np.random.default_rng(22))
    assert compare(scores, "reference") == compare(scores, "reference")
    assert compare(scores, "reference") == compare(scores, "reference", rng=0)
    assert compare(scores, "reference", rng=3) == compare(
        scores, "reference", rng=np.random.default_rng(3)
    )
    assert_close(
        compare(scores, "reference")["design"].overall,
        compare(scores, "reference", rng=4)["design"].overall,
    )


def test_reference_record_and_json():
    scores = crossed(np.random.default_rng(23), units=(5, 7))
    result = compare(scores, "reference", margin=0.1)
    reference = result["reference"]
    assert isinstance(reference, Comparison)
    assert reference.overall.interval == (0.0, 0.0)
    assert reference.overall["p_value"] == 1.0
    assert reference["overall"]["verdict"] == "equivalent"
    assert reference["tasks"]["task 1"].ties == 7
    text = json.dumps({name: c.to_json() for name, c in result.items()}, allow_nan=False)
    assert json.loads(text)["design"]["overall"]["n_units"] == 12
    with pytest.raises(KeyError):
        reference.overall["nonsense"]


def test_degenerate_but_legal_scores():
    one_unit = one_task([[1.0], [2.0]], [[0.0], [0.0]])
    assert one_unit.interval == (-math.inf, math.inf)
    assert (one_unit.p_value, one_unit.verdict) == (1.0, "undecided")
    assert one_unit.to_json()["interval"] == [None, None]
    constant = one_task(np.full(40, 1.5), np.full(40, 1.0))
    assert constant.verdict == "better"
    assert constant.effect_size == math.inf
    assert constant.to_json()["effect_size"] is None
    # two units cannot prove anything, even if they agree to the last digit
    assert one_task([1.5, 1.5], [1.0, 1.0]).verdict == "undecided"
    same = one_task(np.arange(40.0), np.arange(40.0))
    assert (same.p_value, same.interval, same.verdict) == (1.0, (0.0, 0.0), "undecided")
    rounding = one_task(np.full(40, 0.1 + 0.2), np.full(40, 0.3))
    assert (rounding.ties, rounding.p_value) == (40, 1.0)
    alone = compare({"only": {"t": [[1.0, 2.0]]}}, "only")
    assert alone["only"].overall.mean == 1.5


@settings(max_examples=60, deadline=None)
@given(
    units=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    n_seeds=st.integers(1, 4),
    n_designs=st.integers(1, 4),
    kind=st.sampled_from(["normal", "binary", "constant"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_gives_sound_records(units, n_seeds, n_designs, kind, seed):
    rng = np.random.default_rng(seed)
    make = {
        "normal": lambda size: rng.normal(size=size),
        "binary": lambda size: rng.integers(0, 2, size=size),
        "constant": lambda size: np.full(size, rng.normal()),
    }[kind]
    scores = {
        f"d{k}": {f"t{t}": make((n_seeds, n)) for t, n in enumerate(units)}
        for k in range(n_designs)
    }
    result = compare(scores, "d0", margin=0.1, rng=0)
    assert list(result) == list(scores)
    for comparison in result.values():
        for record in (comparison.overall, *comparison.tasks.values()):
            low, high = record.interval
            assert low <= record.difference + 1e-9
            assert high >= record.difference - 1e-9
            assert 0 <= record.p_value <= record.p_holm <= 1
            assert record.wins + record.ties + record.losses == record.n_units
            if record.verdict in ("better", "worse"):
                assert record.p_holm < 0.05
                assert (low > 0) if record.verdict == "better" else (high < 0)
            for needed, today in (
                (record.needed_units, record.n_units),
                (record.needed_seeds, record.n_seeds),
            ):
                assert needed is None or needed > today
            json.dumps(record.to_json(), allow_nan=False)
    ranks = critical_difference(scores)
    k = len(scores)
    assert sum(ranks.average_ranks.values()) == pytest.approx(k * (k + 1) / 2)


# --- bad input ---------------------------------------------------------------------------------


def good():
    return {
        "a": {"t": np.zeros((2, 3)), "u": np.ones((2, 4))},
        "b": {"t": np.zeros((2, 3)), "u": np.ones((2, 4))},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["b"].update(t=np.zeros((2, 4))), ["'b'", "'t'", "(2, 4)", "(2, 3)"]),
        (lambda s: s["b"].update(t=np.zeros((3, 3))), ["'b'", "'t'", "(3, 3)", "(2, 3)"]),
        (lambda s: [s[d].update(u=np.ones((3, 4))) for d in s], ["seeds", "'u'", "(3, 4)"]),
        (lambda s: s["b"].pop("u"), ["'b'", "'u'", "same tasks"]),
        (lambda s: s["b"].update(v=np.ones((2, 4))), ["'b'", "'v'", "same tasks"]),
        (lambda s: s["b"]["t"].__setitem__((0, 1), np.nan), ["'b'", "'t'", "1 NaN"]),
        (lambda s: s["b"]["t"].__setitem__((0, slice(2)), np.inf), ["'b'", "'t'", "2 NaN"]),
        (lambda s: s["b"].update(t=np.zeros(3)), ["'b'", "'t'", "(n_seeds, n_units)", "(3,)"]),
        (lambda s: s["b"].update(t=np.zeros((2, 0))), ["'b'", "'t'", "empty"]),
        (lambda s: s["b"].update(t=[[1, 2], [3]]), ["'b'", "'t'", "rectangular"]),
        (lambda s: s["b"].update(t=[["x", "y"]]), ["'b'", "'t'", "numbers"]),
        (lambda s: s.clear(), ["empty"]),
        (lambda s: [s[d].clear() for d in s], ["no tasks"]),
        (lambda s: s.pop("a"), ["reference 'a'", "['b']"]),
    ],
)
def test_bad_scores_are_named(change, words):
    scores = good()
    change(scores)
    with pytest.raises(ValueError) as caught:
        compare(scores, "a")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("margin", [0, -1, math.nan, math.inf])
def test_bad_margin(margin):
    with pytest.raises(ValueError, match="margin"):
        compare(good(), "a", margin=margin)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        compare(good(), "a", alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        critical_difference(good(), alpha=alpha)


# --- ranks -------------------------------------------------------------------------------------


def test_wilcoxon_holm_is_scipy_and_statsmodels():
    rng = np.random.default_rng(24)
    scores = {
        name: rng.normal(size=15) + shift
        for name, shift in zip("abcd", (0, 0.3, 0.8, 2), strict=True)
    }
    result = wilcoxon_holm(scores, "a")
    oracle = [stats.wilcoxon(scores[name], scores["a"]) for name in "bcd"]
    holm = multipletests([o.pvalue for o in oracle], method="holm")[1]
    for name, expected, corrected in zip("bcd", oracle, holm, strict=True):
        assert result[name]["statistic"] == expected.statistic
        assert result[name]["p_value"] == pytest.approx(expected.pvalue)
        assert result[name]["p_holm"] == pytest.approx(corrected)
        assert result[name]["mean_difference"] == pytest.approx(
            scores[name].mean() - scores["a"].mean()
        )
    assert wilcoxon_holm({"a": [1.0, 2], "b": [1.0, 2]}, "a")["b"]["p_value"] == 1.0
    with pytest.raises(ValueError, match=r"\(n_datasets,\)"):
        wilcoxon_holm({"a": np.zeros((2, 2))}, "a")
    with pytest.raises(ValueError, match="reference 'z'"):
        wilcoxon_holm(scores, "z")
    with pytest.raises(ValueError, match="misaligned"):
        wilcoxon_holm({"a": [1.0, 2.0], "b": [1.0]}, "a")


def test_ranks_friedman_and_nemenyi_figures():
    rng = np.random.default_rng(25)
    scores = {
        name: {"t": rng.normal(size=(2, 30)) + shift}
        for name, shift in {"low": 0.0, "high": 3.0, "also low": 0.05}.items()
    }
    ranks = critical_difference(scores)
    means = np.stack([scores[name]["t"].mean(axis=0) for name in scores])
    expected = stats.rankdata(-means, axis=0).mean(axis=1)
    assert next(iter(ranks.average_ranks)) == "high"
    for name, rank in zip(scores, expected, strict=True):
        assert ranks.average_ranks[name] == pytest.approx(rank)
    assert ranks.p_value == pytest.approx(stats.friedmanchisquare(*means).pvalue)
    # Demsar (2006), table 5: q for three classifiers at 0.05 is 2.343
    assert ranks.critical_difference == pytest.approx(2.343 * math.sqrt(12 / (6 * 30)), abs=1e-3)
    assert [set(clique) for clique in ranks.cliques] == [{"low", "also low"}]
    assert ranks.n_blocks == 30
    assert "unit" in ranks.test
    json.dumps(ranks.to_json(), allow_nan=False)


def test_blocks_are_tasks_when_there_are_ten_and_direction_counts():
    rng = np.random.default_rng(26)
    scores = crossed(rng, units=(6,) * 10, designs=("a", "b"), effect=2.0)
    ranks = critical_difference(scores)
    assert ranks.n_blocks == 10
    assert "task" in ranks.test
    assert ranks.average_ranks == {"b": 1.0, "a": 2.0}
    assert ranks.cliques == ()
    assert critical_difference(scores, higher_is_better=False).average_ranks == {"a": 1.0, "b": 2.0}


def test_identical_designs_are_one_clique():
    scores = {name: {"t": np.arange(12.0).reshape(1, 12)} for name in "abc"}
    ranks = critical_difference(scores)
    assert ranks.average_ranks == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert ranks.cliques == (("a", "b", "c"),)
    assert ranks.p_value == 1.0


# --- calibration (the long version is benchmarks/calibration.py) -------------------------------

STUDIES = 300
# A true rate r gives a count outside these in fewer than 1 of 2,000 runs; seeds are fixed anyway.
UPPER_FALSE = stats.binom.isf(5e-4, STUDIES, 0.05) / STUDIES
LOWEST_COVERAGE = stats.binom.ppf(5e-4, STUDIES, 0.93) / STUDIES
HIGHEST_COVERAGE = stats.binom.isf(5e-4, STUDIES, 0.97) / STUDIES


def simulate(rng_seed, **options):
    """Return rate of false verdicts, coverage and rate of unpaired significance."""
    rng = np.random.default_rng(rng_seed)
    tail, tasks = options.pop("tail", None), options.pop("tasks", "fixed")
    noise = (lambda size: rng.standard_t(tail, size)) if tail else None
    false, covered, unit_level = 0, 0, 0
    for _ in range(STUDIES):
        scores = crossed(rng, noise=noise, **options)
        result = compare(scores, "reference", rng=rng, tasks=tasks)
        records = [result[name].overall for name in list(scores)[1:]]
        false += any(record.verdict != "undecided" for record in records)
        covered += records[0].interval[0] <= 0 <= records[0].interval[1]
        units = np.concatenate(
            [(scores["design"][t] - scores["reference"][t]).mean(axis=0) for t in scores["design"]]
        )
        unit_level += stats.ttest_1samp(units, 0).pvalue < 0.05
    return false / STUDIES, covered / STUDIES, unit_level / STUDIES


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"units": (30,), "n_seeds": 1, "tail": 2}, id="heavy tails"),
        pytest.param({"units": (60,), "n_seeds": 1, "binary": True}, id="0/1"),
        pytest.param({}, id="5 tasks x 3 seeds"),
        pytest.param({"tasks": "sampled"}, id="5 tasks x 3 seeds, sampled"),
        pytest.param({"task": 0.4, "tasks": "sampled"}, id="tasks differ, sampled"),
    ],
)
def test_calibrated_in_null_studies(options):
    false, covered, _ = simulate(27, **options)
    assert false <= UPPER_FALSE
    assert LOWEST_COVERAGE <= covered <= HIGHEST_COVERAGE


def test_calibrated_where_a_test_that_averages_over_seeds_is_not():
    false, covered, unit_level = simulate(28, seed=0.4)
    assert unit_level > 0.25  # the scenario has teeth
    assert false <= UPPER_FALSE
    assert LOWEST_COVERAGE <= covered <= HIGHEST_COVERAGE


def test_familywise_error_over_designs():
    false, _, _ = simulate(29, units=(25,), n_seeds=1, designs=("reference", "design", "b", "c"))
    assert false <= UPPER_FALSE


def test_as_powerful_as_scipys_permutation_test_under_one_seed():
    rng = np.random.default_rng(30)
    ours = theirs = 0
    for _ in range(200):
        d = rng.standard_t(3, size=25) + 0.8
        ours += one_task(d, np.zeros(25)).verdict == "better"
        theirs += (
            stats.permutation_test(
                (d,),
                lambda x, axis: np.mean(x, axis=axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=999,
                rng=rng,
            ).pvalue
            < 0.05
        )
    assert abs(ours - theirs) <= 8  # the same test, up to two Monte Carlo errors near 0.05
    assert ours > 100


def test_tasks_are_fixed_or_sampled():
    scores = {"a": {"t": np.zeros((1, 9))}, "b": {"t": np.ones((1, 9))}}
    with pytest.raises(ValueError, match="tasks must be 'fixed' or 'sampled', got 'random'"):
        compare(scores, "a", tasks="random")
