"""Real processes, really killed: nothing that had finished is lost or computed twice."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import DESIGNS, Toy, runs, statistics

from bakeoff.study import Study, load_results
from bakeoff.study.store import Store

SEEDS = 8
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from toy import DESIGNS, Toy
from bakeoff.study import Study, events

def tell(event):
    if isinstance(event, events.StudyStarted):
        print("started", flush=True)
    if isinstance(event, events.TrialFinished):
        print("finished", event.design, event.seed, flush=True)

if __name__ == "__main__":
    problem = Toy(Path({log!r}), seconds=0.03, artifact=True)
    Study(problem, DESIGNS, reference="plain", seeds={seeds}, directory={out!r},
          workers=int(sys.argv[1])).run(tell)
"""


class Victim:
    def __init__(self, tmp_path: Path) -> None:
        self.log, self.out = tmp_path / "log", tmp_path / "out"
        self.log.mkdir()
        self.script = tmp_path / "victim.py"
        self.script.write_text(
            SCRIPT.format(
                here=str(Path(__file__).parent), log=str(self.log), out=str(self.out), seeds=SEEDS
            )
        )

    def run(self, workers: int, delay: float | None) -> tuple[int, set[str]]:
        """Run the study; kill it so many seconds after its start. Returns what it said was done."""
        process = subprocess.Popen(
            [sys.executable, self.script, str(workers)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "started\n"
        if delay is not None:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        return process.returncode, {line for line in said.splitlines() if line.count(" ") == 2}

    def finished(self) -> set[str]:
        """What the store holds, each with its files whole."""
        problem = Toy(self.log)
        found = set()
        with Store(self.out) as store:
            trials = store.trials(problem.fingerprint())
            assert set(store.scores(trials)) == set(trials)
            for trial in trials.values():
                weights = (self.out / trial.artifact / "weights.txt").read_text()
                found.add(f"finished {weights}")
            left = {path.name for path in (self.out / "trials").iterdir()}
        assert left == set(trials)
        return found

    def runs(self) -> dict[str, int]:
        names = {f"{dict(d.params)}".replace("'", '"'): d.name for d in DESIGNS}
        return {
            f"finished {names[label.rsplit('-', 1)[0]]} {label.rsplit('-', 1)[1]}": n
            for label, n in runs(self.log).items()
            if label != "prepare"
        }


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_at_random_moments_and_run_again(tmp_path, workers):
    rng = random.Random(workers)
    victim = Victim(tmp_path)
    acknowledged: set[str] = set()
    runs_when_finished: dict[str, int] = {}
    kills = 0
    while kills < 5:
        # Workers take a while to start; the last kills come when everything is done but the report.
        code, said = victim.run(workers, rng.uniform(0.0, 0.35 if workers == 1 else 1.3))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        acknowledged |= said
        if kills % 2:  # every other time the next run has to clear up by itself
            finished = victim.finished()
            assert acknowledged <= finished
            assert runs_when_finished.keys() <= finished
            counts = victim.runs()
            for trial in finished:
                runs_when_finished.setdefault(trial, counts[trial])
    assert kills >= 4
    code, said = victim.run(workers, None)
    assert code == 0
    planned = len(DESIGNS) * SEEDS
    assert len(said) == len(victim.finished()) == planned
    counts = victim.runs()
    assert {trial: counts[trial] for trial in runs_when_finished} == runs_when_finished
    assert sum(counts.values()) <= planned + kills * workers
    calm = Study(
        Toy(victim.log, artifact=True),
        DESIGNS,
        reference="plain",
        seeds=SEEDS,
        directory=tmp_path / "calm",
    ).run()
    assert statistics(load_results(victim.out)) == statistics(calm)


def test_workers_die_with_a_killed_study(tmp_path):
    import psutil

    victim = Victim(tmp_path)
    script = victim.script.read_text().replace("seconds=0.03", "seconds=60")
    victim.script.write_text(script)
    process = subprocess.Popen(
        [sys.executable, victim.script, "2"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    deadline = time.monotonic() + 20
    while len(victim.runs()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
