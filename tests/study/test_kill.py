"""Real processes, really killed: nothing that had finished is lost or computed twice."""

import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from toy import DESIGNS, Toy, runs, statistics

from bakeoff.study import Study, load_results
from bakeoff.study.store import Store

SEEDS = 14
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from toy import DESIGNS, Toy
from bakeoff.study import Study, events

def tell(event):
    if isinstance(event, events.StudyStarted):
        print("started", flush=True)
    if isinstance(event, events.TrialFinished) and not event.reused:
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

    def run(self, workers: int, kill_after: int | None, delay: float = 0.0) -> set[str]:
        """Run the study; kill it `delay` seconds after that many trials have been finished.

        Returns which trials it said it had finished.
        """
        command = [sys.executable, self.script, str(workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "started\n"
            lines = list(islice(process.stdout, kill_after))
            if kill_after is not None:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
        # A kill can cut the last line short.
        return {line.strip() for line in [*lines, *said.splitlines(True)] if line.endswith("\n")}

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
    planned = len(DESIGNS) * SEEDS
    acknowledged: set[str] = set()
    runs_when_finished: dict[str, int] = {}

    def look() -> None:
        finished = victim.finished()
        assert acknowledged <= finished
        assert runs_when_finished.keys() <= finished
        counts = victim.runs()
        for trial in finished:
            runs_when_finished.setdefault(trial, counts[trial])

    # Two kills hit the start, where files are made and workers spawned.
    moments = [(0, rng.uniform(0, 0.1)), (0, rng.uniform(0, 0.4))]
    moments += [(rng.randrange(1, 5), rng.uniform(0, 0.06)) for _ in range(3)]
    for number, (kill_after, delay) in enumerate(moments):
        acknowledged |= victim.run(workers, kill_after, delay)
        if number % 2:  # every other time the next run has to clear up by itself
            look()
    look()
    # The last kill comes when all is done but the results.
    acknowledged |= victim.run(workers, planned - len(victim.finished()), rng.uniform(0, 0.1))
    look()
    assert len(acknowledged) <= planned
    assert victim.run(workers, None) == set()
    assert len(victim.finished()) == planned
    counts = victim.runs()
    assert {trial: counts[trial] for trial in runs_when_finished} == runs_when_finished
    assert sum(counts.values()) <= planned + len(moments) * workers
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
