import io
import json
import subprocess
import sys

import numpy as np
import pytest
from toy import DESIGNS, METRICS, toy_scores

from bakeoff.errors import StoreError
from bakeoff.study import Metric, compare, load_results
from bakeoff.study.environment import environment
from bakeoff.study.results import (
    Plan,
    Results,
    assemble,
    combined_tasks,
    comparable,
    headline_score,
    plain,
    save_results,
)
from bakeoff.study.schema import parse_results
from bakeoff.study.store import Run, StoredTrial

EFFECTS = {"plain": 0.0, "good": 1.0, "bad": -1.0}
TASKS = ["hit: news", "law", "rank: news"]


def plan(**changes):
    parts = {
        "name": "a study",
        "command": "bakeoff run",
        "problem": "toy",
        "fingerprint": "abc",
        "description": {"data": "some"},
        "metrics": METRICS,
        "designs": DESIGNS,
        "reference": "plain",
        "seeds": (0, 1, 2),
        "alpha": 0.05,
        "workers": 1,
        "method_versions": {"toy": "1"},
    }
    return Plan(**(parts | changes))


def trial(scores, seed=0, **changes):
    parts = {
        "id": f"{seed}",
        "status": "finished",
        "run": Run("2026-01-01T00:00:00", 1.0 + seed, f"2026-01-01T00:00:0{seed}"),
        "summary": {
            metric: {task: (len(values), values.mean()) for task, values in tasks.items()}
            for metric, tasks in scores.items()
        },
        "cost": {"wall_seconds": 1.0 + seed},
        "notes": ("seen",),
    }
    return StoredTrial(**(parts | changes))


def put_together(directory, missing=(), failed=(), plan=plan()):  # noqa: B008 (it is frozen)
    scores = {
        (design.name, seed): toy_scores(EFFECTS[design.name], seed, 20)
        for design in plan.designs
        for seed in plan.seeds
        if (design.name, seed) not in {*missing, *failed}
    }
    trials = {pair: trial(found, pair[1]) for pair, found in scores.items()}
    for pair in failed:
        trials[pair] = trial(
            {}, pair[1], status="failed", cost={}, notes=(), error="E: x", traceback="T"
        )
    shared = {"wall_seconds": 1.0, "peak_memory_bytes": 2.0}
    results = assemble(plan, trials, scores, reused=0, shared_cost=shared, directory=directory)
    parse_results(json.loads(json.dumps(results.data, allow_nan=False)))  # it follows the schema
    return results


def stacked(effect, metric, task, seeds=(0, 1, 2)):
    return np.stack([toy_scores(effect, seed, 20)[metric][task] for seed in seeds])


def headline_grid(seeds=(0, 1, 2)):
    sources = {"hit: news": ("hit", "news"), "law": ("hit", "law"), "rank: news": ("rank", "news")}
    return {
        name: {label: stacked(effect, *source, seeds) for label, source in sources.items()}
        for name, effect in EFFECTS.items()
    }


def records(results, metric="score"):
    return {
        entry["name"]: entry["metrics"][metric]["overall"]
        for entry in results["designs"]
        if entry["metrics"]
    }


def test_a_combined_metric_is_the_comparison_over_the_union_of_tasks(tmp_path):
    results = put_together(tmp_path)
    assert results["metrics"]["score"]["tasks"] == TASKS
    expected = compare(headline_grid(), "plain", margin=0.001)
    for entry in results["designs"]:
        found = expected[entry["name"]].to_json()
        if entry["name"] == "plain":  # the reference has no verdict against itself
            for record in (found["overall"], *found["tasks"].values()):
                record["verdict"] = None
        assert entry["metrics"]["score"] == plain(found)
    assert [entry["name"] for entry in results["designs"]] == ["good", "plain", "bad"]
    assert set(results["ranks"]["score"]["average_ranks"]) == set(EFFECTS)


def test_where_lower_is_better_an_improvement_is_negative_and_better(tmp_path):
    found = records(put_together(tmp_path), "loss")
    assert found["good"]["difference"] == pytest.approx(-1.0, abs=0.3)
    assert (found["good"]["verdict"], found["bad"]["verdict"]) == ("better", "worse")


def test_designs_are_ordered_by_a_headline_that_is_a_loss(tmp_path):
    loss_first = {name: METRICS[name] for name in ("loss", "hit", "rank", "score")}
    results = put_together(tmp_path, plan=plan(metrics=loss_first))
    assert [entry["name"] for entry in results["designs"]] == ["good", "plain", "bad"]
    assert results.winner == "good"


def test_metrics_without_tasks_are_left_out(tmp_path):
    more = {"empty": Metric("nothing", combines=("bleu",)), **METRICS, "bleu": Metric("BLEU")}
    assert list(put_together(tmp_path, plan=plan(metrics=more))["metrics"]) == list(METRICS)


def test_the_winner_is_the_best_that_is_better_and_its_artifact_the_first_seeds(tmp_path):
    results = put_together(tmp_path)
    assert results["winner"]["design"] == results.winner == "good"
    assert results["winner"]["seed"] == 0
    assert "'good' alone is better than the reference 'plain'" in results["winner"]["reason"]
    against_bad = put_together(tmp_path, plan=plan(reference="bad"))
    assert against_bad.winner == "good"
    assert "of the 2 that are better" in against_bad["winner"]["reason"]


def test_where_nothing_beats_the_reference_it_stays(tmp_path):
    results = put_together(tmp_path, plan=plan(reference="good"))
    assert results.winner == "good"
    assert results["winner"]["reason"].startswith("nothing beat the reference 'good'")


def test_artifacts_are_listed_only_while_they_exist(tmp_path):
    scores = {("plain", seed): toy_scores(0.0, seed, 20) for seed in (0, 1)}
    trials = {
        pair: trial(found, pair[1], artifact=f"trials/{pair[1]}/model")
        for pair, found in scores.items()
    }
    one = plan(designs=DESIGNS[:1], seeds=(0, 1))
    options = {"reused": 0, "shared_cost": {"wall_seconds": 0.0, "peak_memory_bytes": 0.0}}
    results = assemble(one, trials, scores, directory=tmp_path, **options)
    assert results["designs"][0]["artifact"] is None
    assert results.winner_artifact is None
    (tmp_path / "trials" / "0" / "model").mkdir(parents=True)
    results = assemble(one, trials, scores, directory=tmp_path, **options)
    assert results.winner_artifact == tmp_path / "trials" / "0" / "model"


def test_costs_are_ranges_over_seeds(tmp_path):
    (entry,) = (e for e in put_together(tmp_path)["designs"] if e["name"] == "good")
    assert entry["cost"] == {"wall_seconds": {"mean": 2.0, "min": 1.0, "max": 3.0}}
    assert entry["notes"] == ["seen"]


def test_times_add_up_over_runs(tmp_path):
    results = put_together(tmp_path)
    assert results["study"]["started"] == "2026-01-01T00:00:00"
    assert results["study"]["finished"] == "2026-01-01T00:00:02"
    assert results["study"]["wall_seconds"] == 3.0  # one run, up to its last trial


def test_an_unfinished_study_uses_the_seeds_that_all_have_finished(tmp_path):
    results = put_together(tmp_path, missing=[("bad", 1), ("good", 2), ("bad", 2)])
    assert not results["study"]["complete"]
    assert results["study"]["finished"] is None
    assert {record["n_seeds"] for record in records(results).values()} == {1}
    assert records(results)["good"]["difference"] == pytest.approx(
        compare(headline_grid(seeds=(0,)), "plain")["good"].overall.difference
    )
    assert any("6 of 9 trials are finished" in note for note in results["notes"])
    assert any("The statistics use seed 0 of 3" in note for note in results["notes"])


def test_a_failed_seed_is_left_out_for_all_and_said(tmp_path):
    results = put_together(tmp_path, failed=[("good", 1)])
    assert results["study"]["complete"]
    assert {record["n_seeds"] for record in records(results).values()} == {2}
    assert results["failures"] == [{"design": "good", "seed": 1, "error": "E: x", "traceback": "T"}]
    assert any("'good' failed under seed 1" in note for note in results["notes"])
    assert any("use seeds 0, 2 of 3" in note for note in results["notes"])


def test_a_design_that_always_failed_is_listed_without_numbers(tmp_path):
    results = put_together(tmp_path, failed=[("good", 0), ("good", 1), ("good", 2)])
    assert results["designs"][-1]["name"] == "good"
    assert results["designs"][-1]["metrics"] == {}
    assert list(records(results)) == ["plain", "bad"]
    assert {record["n_seeds"] for record in records(results).values()} == {3}
    assert any("Left out of the statistics" in n and "'good'" in n for n in results["notes"])


def test_without_the_reference_there_are_means_but_no_verdicts(tmp_path):
    results = put_together(tmp_path, failed=[("plain", seed) for seed in range(3)])
    record = records(results)["good"]
    expected = np.mean([values.mean() for values in headline_grid()["good"].values()])
    assert record["mean"] == pytest.approx(expected)
    assert record["verdict"] is record["interval"] is record["p_value"] is None
    assert results.winner is None
    assert any("no verdicts" in note for note in results["notes"])
    save_results(Results(results.data, tmp_path))  # and the report can be drawn


def test_one_design_alone_is_its_own_winner(tmp_path):
    results = put_together(tmp_path, plan=plan(designs=DESIGNS[:1]))
    assert results.winner == "plain"
    assert results["ranks"] == {}


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        ({}, ([], [])),
        ({"a": [0, 1], "b": [0, 1], "c": [1, 0]}, (["a", "b", "c"], [0, 1])),
        ({"a": [0, 1], "b": [1]}, (["a", "b"], [1])),
        ({"a": [0, 1], "b": [0, 1], "c": []}, (["a", "b"], [0, 1])),
        ({"a": [0], "b": [1, 2], "c": [0, 2]}, (["a", "c"], [0])),
        ({"a": [0], "b": [1], "c": [2]}, (["a"], [0])),  # the reference goes last
        ({"b": [0], "c": [1]}, (["b"], [0])),
    ],
)
def test_comparable_finds_a_full_grid(finished, expected):
    pairs = {(name, seed) for name, seeds in finished.items() for seed in seeds}
    assert comparable(["a", "b", "c"], "a", [0, 1, 2], pairs) == expected


def test_tasks_carry_their_metrics_name_only_where_it_is_needed():
    measured = {"hit": ["news", "law"], "rank": ["news"]}
    assert list(combined_tasks(METRICS, measured, "score")) == TASKS
    assert list(combined_tasks(METRICS, measured, "hit")) == ["news", "law"]
    assert combined_tasks(METRICS, {}, "score") == {}


def test_headline_score_is_the_mean_over_tasks():
    summary = {"hit": {"news": (4, 1.0), "law": (2, 2.0)}, "rank": {"news": (4, 6.0)}}
    assert headline_score(METRICS, summary) == 3.0
    assert headline_score({"rank": METRICS["rank"]}, summary) == 6.0


def test_plain_leaves_only_json():
    odd = {1: (np.float64("nan"), float("inf"), np.int64(3)), "a": np.array([1.5, np.nan])}
    assert plain(odd) == {"1": [None, None, 3], "a": [1.5, None]}


def test_results_come_back_from_their_file(tmp_path):
    results = put_together(tmp_path)
    save_results(results)
    loaded = load_results(tmp_path)
    assert loaded.data == results.data
    assert (len(loaded), list(loaded)) == (len(results.data), list(results.data))
    assert loaded["reference"] == "plain"
    assert "winner 'good', 9 of 9 trials" in repr(loaded)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report.html", "results.json"]


def test_the_table_names_the_designs(tmp_path):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(put_together(tmp_path).table())
    text = console.export_text()
    assert all(name in text for name in EFFECTS)


def test_unusable_results_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"holds no results\.json"):
        load_results(tmp_path)
    path = tmp_path / "results.json"
    path.write_text("{half", encoding="utf-8")
    with pytest.raises(StoreError, match=r"results\.json cannot be read"):
        load_results(tmp_path)
    path.write_text('{"schema_version": 99}', encoding="utf-8")
    with pytest.raises(StoreError, match="99"):
        load_results(tmp_path)
    path.write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(StoreError, match="study"):
        load_results(tmp_path)


def test_a_directory_that_cannot_take_results_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    results = put_together(tmp_path)
    monkeypatch.setattr("bakeoff.study.results.write_text", full)
    with pytest.raises(StoreError, match=r"No space left on device.*trials are kept"):
        save_results(results)


def test_environment_reports_what_is_installed():
    import duckdb

    found = environment()
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["duckdb"] == duckdb.__version__
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e8
    assert "ray" not in found["packages"] or found["packages"]["ray"]


def test_importing_the_study_imports_nothing_heavy():
    code = (
        "import sys, bakeoff.study as s\n"
        "assert set(s.__all__) <= set(dir(s))\n"
        "s.Design, s.Metric, s.Study\n"
        "print([m for m in ('torch','pandas','duckdb','pyarrow','scipy','altair','statsmodels',"
        "'rich','jinja2') if m in sys.modules])\n"
        "[getattr(s, name) for name in s.__all__]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    import bakeoff.study

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bakeoff.study.nonsense  # noqa: B018
