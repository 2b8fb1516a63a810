import contextlib
import os
import signal
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from toy import DESIGNS, Toy, runs, statistics, toy_scores

from bakeoff.errors import BakeoffError, StoreError
from bakeoff.study import Design, Metric, Study, StudyInterrupted, events, load_results
from bakeoff.study.executors import Finished, Job, Processes, bring_home, run_elsewhere
from bakeoff.study.store import Store

HERE = Path(__file__).parent


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """What an undisturbed study of three seeds finds."""
    folder = tmp_path_factory.mktemp("calm")
    return statistics(study(folder, Toy(folder), seeds=3).run())


def study(tmp_path, problem, designs=DESIGNS, **changes):
    options = {"reference": "plain", "seeds": 2, "directory": tmp_path / "out"}
    return Study(problem, designs, **(options | changes))


def counts(results):
    return {kind: results["study"]["trials"][kind] for kind in ("finished", "failed", "reused")}


def test_a_study_runs_every_trial_once_and_the_same_call_runs_nothing_again(tmp_path, log):
    problem = Toy(log, artifact=True)
    first = study(tmp_path, problem).run()
    assert counts(first) == {"finished": 6, "failed": 0, "reused": 0}
    assert first.winner == "good"
    assert (first.winner_artifact / "weights.txt").read_text() == "good 0"
    assert set(runs(log).values()) == {1}
    assert len(runs(log)) == 6 + 1
    again = study(tmp_path, problem).run()
    assert counts(again) == {"finished": 6, "failed": 0, "reused": 6}
    assert len(runs(log)) == 6 + 1
    assert statistics(again) == statistics(first)
    assert again["shared_cost"] == first["shared_cost"]
    assert again["study"]["wall_seconds"] == first["study"]["wall_seconds"] > 0
    assert load_results(tmp_path / "out").data == again.data
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()


def test_more_seeds_or_designs_run_only_what_is_new(tmp_path, log, calm):
    problem = Toy(log)
    study(tmp_path, problem, DESIGNS[:2]).run()
    grown = study(tmp_path, problem, DESIGNS, seeds=3).run()
    assert counts(grown) == {"finished": 9, "failed": 0, "reused": 4}
    trials = runs(log)
    assert trials.pop("prepare") == 2
    assert set(trials.values()) == {1}
    assert statistics(grown) == calm


def test_a_new_display_name_runs_nothing_again(tmp_path, log):
    study(tmp_path, Toy(log)).run()
    renamed = [replace(design, name=f"the {design.name} one") for design in DESIGNS]
    results = study(tmp_path, Toy(log), renamed, reference="the plain one").run()
    assert counts(results)["reused"] == 6
    assert results.winner == "the good one"


def test_other_data_or_a_new_method_version_runs_everything_again(tmp_path, log):
    for change in ({}, {"data": "other"}, {"version": "2"}, {"n_units": 21}):
        results = study(tmp_path, Toy(log, **change), DESIGNS[:2], seeds=1).run()
        assert counts(results) == {"finished": 2, "failed": 0, "reused": 0}
    again = study(tmp_path, Toy(log), DESIGNS[:2], seeds=1).run()
    assert counts(again)["reused"] == 2  # the old ones are kept


def test_trials_go_seed_by_seed_with_the_reference_first(tmp_path, log):
    seen = []
    study(tmp_path, Toy(log), seeds=[7, 3], reference="bad").run(seen.append)
    order = [(e.design, e.seed) for e in seen if isinstance(e, events.TrialStarted)]
    assert order == [(name, seed) for seed in (7, 3) for name in ("bad", "plain", "good")]


def test_events_tell_the_whole_story(tmp_path, log):
    broken = Design("broken", "toy", {"mischief": "raise"})
    seen = []
    study(tmp_path, Toy(log), [*DESIGNS, broken]).run(seen.append)
    assert seen[0] == events.StudyStarted(
        name="toy",
        designs=("plain", "good", "bad", "broken"),
        seeds=(0, 1),
        planned=8,
        reused=0,
        workers=1,
        headline="mean score",
        higher_is_better=True,
    )
    shared = [e for e in seen if isinstance(e, events.SharedWork)]
    assert (shared[0].fraction, shared[1], shared[-1].fraction) == (
        0.0,
        events.SharedWork(0.5, "half"),
        1.0,
    )
    assert events.TrialProgress("good", 1, 0.5, "half") in seen
    finished = [e for e in seen if isinstance(e, events.TrialFinished)]
    assert len(finished) == 6
    scores = toy_scores(1.0, 1, 20)
    by_task = [scores["hit"]["news"], scores["hit"]["law"], scores["rank"]["news"]]
    (good,) = [e for e in finished if (e.design, e.seed) == ("good", 1)]
    assert good.score == pytest.approx(np.mean([values.mean() for values in by_task]))
    assert 0 < good.seconds < 5
    failed = [e for e in seen if isinstance(e, events.TrialFailed)]
    assert failed == [
        events.TrialFailed("broken", s, "RuntimeError: the toy broke") for s in (0, 1)
    ]
    assert (seen[-1].finished, seen[-1].failed, seen[-1].interrupted) == (6, 2, False)
    again = []
    study(tmp_path, Toy(log)).run(again.append)
    assert [e.reused for e in again if isinstance(e, events.TrialFinished)] == [True] * 6
    assert again[0].reused == 6


def test_a_failing_trial_is_recorded_and_retried_and_stops_nobody(tmp_path, log):
    designs = [
        *DESIGNS,
        Design("breaks", "toy", {"mischief": "raise", "effect": 2.0, "seeds": [1]}),
        Design("quits", "toy", {"mischief": "sys.exit"}),
        Design("mends", "toy", {"mischief": "raise once", "effect": 0.5}),
    ]
    first = study(tmp_path, Toy(log), designs).run()
    assert counts(first) == {"finished": 8, "failed": 4, "reused": 0}
    assert {(f["design"], f["seed"]) for f in first["failures"]} == {
        ("breaks", 1),
        ("quits", 0),
        ("quits", 1),
        ("mends", 0),
    }
    failure = next(f for f in first["failures"] if f["design"] == "breaks")
    assert failure["error"] == "RuntimeError: the toy broke"
    assert "second line" in failure["traceback"]
    assert "toy.py" in failure["traceback"]
    assert first["study"]["complete"]
    again = study(tmp_path, Toy(log), designs).run()
    assert counts(again) == {"finished": 9, "failed": 3, "reused": 8}
    assert {f["design"] for f in again["failures"]} == {"breaks", "quits"}
    assert not list((tmp_path / "out" / "trials").iterdir())  # failed trials leave no folders


def test_unusable_scores_are_a_recorded_failure(tmp_path, log):
    messages = {
        "nan": "scores of metric 'loss', task 'news' must be finite, got 20 of 20",
        "unknown metric": "reports metric 'bleu'; the problem measures ['hit', 'rank', 'loss']",
        "combined metric": "reports metric 'score'; the problem measures",
        "other task": "units per metric and task differ from those of other trials",
        "other length": "'loss': {'news': 19}",
        "missing metric": "units per metric and task differ",
        "two dimensions": "must be one number per unit, got shape (2, 10)",
        "strings": "could not convert string to float",
        "nothing": "reports no scores",
    }
    odd = [Design(kind, "toy", {"mischief": "replace", "with": kind}) for kind in messages]
    results = study(tmp_path, Toy(log), [*DESIGNS, *odd], seeds=1).run()
    assert counts(results) == {"finished": 3, "failed": 9, "reused": 0}
    errors = {failure["design"]: failure["error"] for failure in results["failures"]}
    assert {kind: messages[kind] in errors[kind] for kind in messages} == dict.fromkeys(
        messages, True
    )


class Odd(Toy):
    """A toy that returns something else than it should, by the design's name."""

    def run(self, design, seed, work):
        trial = super().run(design, seed, work)
        wrong = {
            "no trial": trial.scores,
            "artifact outside": replace(trial, artifact=Path(self.log)),
            "artifact missing": replace(trial, artifact=work.directory / "none"),
            "cost": replace(trial, cost={"labels_used": "many"}),
            "cost nan": replace(trial, cost={"labels_used": float("nan")}),
        }
        return wrong.get(design.name, trial)


def test_a_trial_that_breaks_the_contract_is_a_recorded_failure(tmp_path, log):
    messages = {
        "no trial": "run must return a Trial, got dict",
        "artifact outside": "artifact must be a folder inside the trial's own",
        "artifact missing": "artifact must be a folder inside the trial's own",
        "cost": "could not convert string to float: 'many'",
        "cost nan": "cost 'labels_used' must be finite, got nan",
    }
    odd = [Design(kind, "toy", {"kind": kind}) for kind in messages]
    results = study(tmp_path, Odd(log), [*DESIGNS, *odd], seeds=1).run()
    errors = {failure["design"]: failure["error"] for failure in results["failures"]}
    assert {kind: messages[kind] in errors[kind] for kind in messages} == dict.fromkeys(
        messages, True
    )


def test_workers_give_the_same_results_as_one_process(tmp_path, log):
    broken = Design("broken", "toy", {"mischief": "raise", "seeds": [1]})
    problem = Toy(log, artifact=True)
    one = study(tmp_path, problem, [*DESIGNS, broken], directory=tmp_path / "one").run()
    two = study(tmp_path, problem, [*DESIGNS, broken], directory=tmp_path / "two", workers=2).run()
    assert statistics(one) == statistics(two)
    for entry in two["designs"]:
        if entry["artifact"]:
            weights = tmp_path / "two" / entry["artifact"] / "weights.txt"
            assert weights.read_text() == f"{entry['name']} 0"
    assert two["study"]["workers"] == 2
    assert min(entry["cost"]["peak_memory_bytes"]["min"] for entry in two["designs"]) > 1e7


def test_a_worker_that_dies_costs_its_own_trial_only(tmp_path, log):
    deadly = Design("deadly", "toy", {"mischief": "exit", "effect": 1.0})
    results = study(tmp_path, Toy(log), [deadly, *DESIGNS], workers=2).run()
    assert counts(results) == {"finished": 6, "failed": 2, "reused": 0}
    assert {f["error"] for f in results["failures"]} == {
        "the worker process ended with exit code 3"
    }
    alone = study(tmp_path, Toy(log), [deadly, *DESIGNS], seeds=[0], workers=2).run()
    assert counts(alone) == {"finished": 3, "failed": 1, "reused": 3}


@dataclass(frozen=True)
class Suicidal(Toy):
    def run(self, design, seed, work):
        if design.name == "bad":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(design, seed, work)


def test_a_worker_that_is_killed_is_reported_with_its_signal(tmp_path, log):
    results = study(tmp_path, Suicidal(log), seeds=1, workers=2).run()
    (failure,) = results["failures"]
    assert failure["error"] == "the worker process was ended by SIGKILL (often: out of memory)"


@dataclass(frozen=True)
class Unpacked(Toy):
    def __setstate__(self, state):
        raise RuntimeError("cannot be unpacked here")


def test_a_problem_that_workers_cannot_unpickle_fails_its_trials_with_the_reason(tmp_path, log):
    results = study(tmp_path, Unpacked(log), seeds=1, workers=2).run()
    assert {f["error"] for f in results["failures"]} == {"RuntimeError: cannot be unpacked here"}
    assert results.winner is None


@dataclass(frozen=True)
class Threads(Toy):
    def run(self, design, seed, work):
        trial = super().run(design, seed, work)
        return replace(trial, cost={"threads": float(os.environ["OMP_NUM_THREADS"])})


def test_workers_share_the_threads_unless_the_user_has_set_them(tmp_path, log, monkeypatch):
    monkeypatch.setattr("bakeoff.study.executors.available_cores", lambda: 6)
    for setting, expected in ((None, 3.0), ("5", 5.0)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if setting:
            monkeypatch.setenv("OMP_NUM_THREADS", setting)
        results = study(
            tmp_path,
            Threads(log),
            DESIGNS[:2],
            seeds=1,
            workers=2,
            directory=tmp_path / expected.hex(),
        ).run()
        assert results["designs"][0]["cost"]["threads"]["mean"] == expected
        assert os.environ.get("OMP_NUM_THREADS") == setting


def test_a_script_without_main_guard_is_told_so(tmp_path, log):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path; from toy import *; from bakeoff.study import Study\n"
        f"Study(Toy(Path({str(log)!r})), DESIGNS, reference='plain', seeds=1, workers=2,"
        f" directory={str(tmp_path / 'out')!r}).run()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr.splitlines()[-1]
    assert not runs(log).keys() - {"prepare"}


def start(tmp_path, log, *, workers=1, seconds=0.3, name="running.py"):
    """Run a slow study in a process of its own, as a script would."""
    script = tmp_path / name
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path; from toy import *; from bakeoff.study import Study, events\n"
        "def tell(event):\n"
        "    if isinstance(event, (events.TrialStarted, events.TrialFinished)):\n"
        "        print(type(event).__name__, event.design, event.seed, flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    Study(Toy(Path({str(log)!r}), seconds={seconds}), DESIGNS, reference='plain',"
        f" seeds=3, workers={workers}, directory={str(tmp_path / 'out')!r}).run(tell)\n"
    )
    return subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process, text):
    for line in process.stdout:
        if line.strip() == text:
            return
    raise AssertionError(f"the study ended without saying {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interruption_leaves_a_report_of_what_had_finished(tmp_path, log, calm, number, workers):
    process = start(tmp_path, log, workers=workers)
    wait_for(process, "TrialFinished good 1")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert f"StudyInterrupted: the study was interrupted by {number.name}" in stderr
    partial = load_results(tmp_path / "out")
    assert not partial["study"]["complete"]
    assert partial["study"]["finished"] is None
    assert 5 <= partial["study"]["trials"]["finished"] < 9
    assert {entry["metrics"]["score"]["overall"]["n_seeds"] for entry in partial["designs"]} <= {
        1,
        2,
    }
    assert any("trials are finished. The same command continues it" in n for n in partial["notes"])
    assert any("The statistics use seed" in note for note in partial["notes"])
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    whole = study(tmp_path, Toy(log), seeds=3).run()
    assert counts(whole)["reused"] == partial["study"]["trials"]["finished"]
    assert statistics(whole) == calm


def test_two_studies_in_one_directory_at_once(tmp_path, log):
    process = start(tmp_path, log, seconds=5)
    try:
        wait_for(process, "TrialStarted plain 0")
        with pytest.raises(
            StoreError, match=rf"another study is running .*process {process.pid}\)"
        ):
            study(tmp_path, Toy(log)).run()
    finally:
        process.kill()
        process.communicate()
    Store(tmp_path / "out").close()


@dataclass(frozen=True)
class Interrupting(Toy):
    """Is interrupted during a trial, and swallows it."""

    def run(self, design, seed, work):
        if (design.name, seed) == ("good", 1):
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)
        return super().run(design, seed, work)


def test_a_trial_that_swallows_the_interruption_is_not_recorded(tmp_path, log):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(StudyInterrupted):
        study(tmp_path, Interrupting(log)).run()
    assert load_results(tmp_path / "out")["study"]["trials"]["finished"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_recording_waits_until_it_is_recorded(tmp_path, log, monkeypatch):
    finish = Store.finish

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, *args, **kwargs)

    monkeypatch.setattr(Store, "finish", interrupted)
    with pytest.raises(StudyInterrupted, match="SIGTERM"):
        study(tmp_path, Toy(log)).run()
    assert load_results(tmp_path / "out")["study"]["trials"]["finished"] == 1


def test_an_interruption_before_anything_has_finished_still_leaves_a_report(tmp_path, log):
    problem = Toy(log)
    started = []

    def stop(event):
        started.append(event)
        if isinstance(event, events.TrialStarted):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, problem).run(stop)
    results = load_results(tmp_path / "out")
    assert results.winner is None
    assert counts(results)["finished"] == 0
    assert [entry["metrics"] for entry in results["designs"]] == [{}, {}, {}]


def test_a_study_runs_in_a_thread_where_no_signal_handlers_are_allowed(tmp_path, log):
    found = []
    thread = threading.Thread(target=lambda: found.append(study(tmp_path, Toy(log)).run()))
    thread.start()
    thread.join()
    assert found[0].winner == "good"


@dataclass(frozen=True)
class Hungry(Toy):
    def run(self, design, seed, work):
        if design.name == "good":
            assert np.ones(25_000_000).sum() == 25_000_000  # 200 MB, touched, gone at once
        return super().run(design, seed, work)


def test_peak_memory_is_each_trials_own(tmp_path, log):
    results = study(tmp_path, Hungry(log), seeds=1).run()
    peak = {d["name"]: d["cost"]["peak_memory_bytes"]["mean"] for d in results["designs"]}
    assert 190e6 < peak["good"] - peak["plain"] < 230e6
    assert peak["bad"] < peak["plain"] + 50e6  # bad ran last: the peak does not stick


def test_work_that_fails_before_the_trials_stops_the_study(tmp_path, log):
    @dataclass(frozen=True)
    class Unprepared(Toy):
        def prepare(self, designs, seeds, work):
            raise RuntimeError("no base model")

    with pytest.raises(RuntimeError, match="no base model"):
        study(tmp_path, Unprepared(log)).run()
    assert counts(study(tmp_path, Toy(log)).run())["finished"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "none"}, r"reference must be one of the designs .*got 'none'"),
        ({"seeds": 0}, "seeds must be at least one, got none"),
        ({"seeds": []}, "seeds must be at least one, got none"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seeds": [0.5]}, "seeds must be integers from 0 on, got 0.5"),
        ({"seeds": [-1]}, "seeds must be integers from 0 on, got -1"),
        ({"seeds": [True]}, "seeds must be integers from 0 on, got True"),
        ({"seeds": "12"}, "seeds must be an integer or a sequence of integers, got '12'"),
        ({"seeds": 2.0}, "seeds must be an integer or a sequence of integers, got 2.0"),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"workers": 1.5}, "workers must be an integer of at least 1, got 1.5"),
        ({"engine": "slurm"}, r"engine must be one of \['local', 'ray'\], got 'slurm'"),
        ({"alpha": 1.0}, "alpha must be between 0 and 1, got 1.0"),
        ({"designs": []}, "designs must hold at least one design"),
        ({"designs": ["plain"]}, "designs must be Design objects, got str"),
        ({"designs": [DESIGNS[0], replace(DESIGNS[1], name="plain")]}, "distinct names"),
        (
            {"designs": [DESIGNS[0], replace(DESIGNS[0], name="same")]},
            "'plain' and 'same' have the same method and params",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(tmp_path, log, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        study(tmp_path, Toy(log), **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "no metrics"),
        ({"a": Metric("a", combines=("b",))}, "combines 'b', which is not a measured metric"),
        (
            {"a": Metric("a", combines=("b",)), "b": Metric("b", higher_is_better=False)},
            "has the other direction",
        ),
    ],
)
def test_bad_metrics_are_named(tmp_path, log, metrics, message):
    class Strange(Toy):
        pass

    Strange.metrics = metrics
    with pytest.raises(ValueError, match=message):
        study(tmp_path, Strange(log))


def test_a_description_that_is_not_json_is_refused_before_the_trials(tmp_path, log):
    class Strange(Toy):
        def describe(self):
            return {"model": object()}

    with pytest.raises(TypeError, match=r"describe\(\) must return JSON-able facts"):
        study(tmp_path, Strange(log)).run()
    assert not runs(log)


def test_ray_without_ray_names_the_extra(tmp_path, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BakeoffError, match=r"pip install 'bakeoff\[ray\]'"):
        study(tmp_path, Toy(log), engine="ray")


def test_ray_runs_a_study(tmp_path, log, monkeypatch):
    ray = pytest.importorskip("ray")
    # Ray's workers import the toy problem by themselves.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        on_ray = study(tmp_path, Toy(log, artifact=True), engine="ray", workers=2).run()
    finally:
        ray.shutdown()
    here = study(tmp_path, Toy(log, artifact=True), directory=tmp_path / "here").run()
    assert statistics(on_ray) == statistics(here)


def ray_in_process():
    """The few calls of Ray that the engine makes, with Ray's meaning, run when waited for."""
    ray = types.ModuleType("ray")
    ray.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))
    ray.in_flight = 0
    ray.most_in_flight = 0

    class Task:
        def __init__(self, function, arguments):
            self.function, self.arguments = function, arguments
            ray.in_flight += 1
            ray.most_in_flight = max(ray.most_in_flight, ray.in_flight)

    def remote(**options):
        assert options == {"max_retries": 0}
        return lambda function: types.SimpleNamespace(
            remote=lambda *arguments: Task(function, arguments)
        )

    def get(task):
        ray.in_flight -= 1
        if task.arguments[1].design.params.get("mischief") == "exit":
            raise ray.exceptions.RayError("The worker died unexpectedly.")
        return task.function(*task.arguments)

    ray.is_initialized = lambda: True
    ray.put = lambda value: value
    ray.remote = remote
    ray.wait = lambda tasks, num_returns: (tasks[-1:], tasks[:-1])
    ray.get = get
    return ray


def test_the_ray_engine_keeps_to_its_limit_and_survives_dead_workers(tmp_path, log, monkeypatch):
    ray = ray_in_process()
    monkeypatch.setitem(sys.modules, "ray", ray)
    designs = [*DESIGNS, Design("deadly", "toy", {"mischief": "exit"})]
    problem = Toy(log, artifact=True)
    results = study(tmp_path, problem, designs, engine="ray", workers=3).run()
    assert ray.most_in_flight == 3
    assert counts(results) == {"finished": 6, "failed": 2, "reused": 0}
    assert results["failures"][0]["error"] == "RayError: The worker died unexpectedly."
    assert (results.winner_artifact / "weights.txt").read_text() == "good 0"


def test_files_of_a_trial_come_home_from_another_machine(tmp_path, log):
    job = Job("0" * 64, DESIGNS[1], 5, tmp_path / "home" / "scratch")
    outcome, archive = run_elsewhere(Toy(log, artifact=True), job)
    assert not job.scratch.exists()
    home = bring_home(job, outcome, archive)
    assert isinstance(home, Finished)
    assert home.artifact == job.scratch / "model"
    assert (home.artifact / "weights.txt").read_text() == "good 5"


def test_closing_the_generator_stops_the_workers(tmp_path, log):
    jobs = [Job(f"{n}", DESIGNS[0], n, tmp_path / f"{n}") for n in range(3)]
    started = []
    outcomes = Processes(2).run(Toy(log, seconds=0.01), jobs, started.append)
    next(outcomes)
    import multiprocessing

    assert multiprocessing.active_children()
    outcomes.close()
    assert not multiprocessing.active_children()


class Fickle(Toy):
    """Breaks its word: another number of units under the same fingerprint."""

    def run(self, design, seed, work):
        trial = super().run(design, seed, work)
        if design.name == "good" and not (self.log / "mended").exists():
            (self.log / "mended").touch()
            return replace(trial, scores=toy_scores(1.0, seed, 12))
        return trial


def test_recorded_trials_that_disagree_are_run_again(tmp_path, log):
    study(tmp_path, Fickle(log), DESIGNS[1:2], seeds=1, reference="good").run()
    study(tmp_path, Fickle(log), DESIGNS[2:], seeds=1, reference="bad").run()
    first = study(tmp_path, Fickle(log), DESIGNS[1:], seeds=1, reference="bad").run()
    assert counts(first) == {"finished": 1, "failed": 1, "reused": 1}
    assert "expected {" in first["failures"][0]["error"]
