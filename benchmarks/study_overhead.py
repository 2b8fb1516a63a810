"""What the study engine costs beyond the trials themselves.

Prints two lines: milliseconds per trivial trial, end to end, over 1,000 of them; and seconds to
assemble results and write the report for 10,000 recorded trials. Limits are those of the project:
30 ms and 10 s. Exits with 1 if one is broken.

    python benchmarks/study_overhead.py [--json] [--trials 1000] [--recorded 10000]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bakeoff.study import Design, Metric, Study, Trial, Work

N_DESIGNS = 20
N_UNITS = 100
MILLISECONDS_PER_TRIAL = 30.0
REPORT_SECONDS = 10.0


class Trivial:
    """Scores that cost nothing to make: two tasks of a hundred units."""

    name = "trivial"
    metrics: Mapping[str, Metric] = {"score": Metric("score", margin=0.01)}

    def fingerprint(self) -> str:
        """Any constant: the data never change."""
        return "0" * 64

    def describe(self) -> Mapping[str, object]:
        """Nothing to tell."""
        return {}

    def method_version(self, method: str) -> str:
        """There is one."""
        return "1"

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Designs share nothing."""

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Draw the scores."""
        rng = np.random.default_rng([seed, design.params["k"]])
        level = 0.02 * design.params["k"]
        return Trial({"score": {t: level + rng.normal(size=N_UNITS) for t in ("easy", "hard")}})


def study(directory: Path, n_trials: int) -> Study:
    designs = [Design(f"design {k}", "trivial", {"k": k}) for k in range(N_DESIGNS)]
    return Study(
        Trivial(),
        designs,
        reference="design 0",
        seeds=max(1, n_trials // N_DESIGNS),
        directory=directory,
    )


def measure(n_trials: int, n_recorded: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        study(Path(folder, "warm up"), N_DESIGNS).run()  # imports are no cost of a trial
        began = time.perf_counter()
        study(Path(folder, "trials"), n_trials).run()
        per_trial = (time.perf_counter() - began) / n_trials
        study(Path(folder, "recorded"), n_recorded).run()
        began = time.perf_counter()
        study(Path(folder, "recorded"), n_recorded).run()
        report = time.perf_counter() - began
    return {"milliseconds_per_trial": 1000 * per_trial, "report_seconds": report}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1_000, help="trivial trials to run")
    parser.add_argument("--recorded", type=int, default=10_000, help="trials to report on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = measure(arguments.trials, arguments.recorded)
    if arguments.json:
        print(json.dumps(found | {"trials": arguments.trials, "recorded": arguments.recorded}))
    else:
        print(
            f"study overhead: {found['milliseconds_per_trial']:.1f} ms per trivial trial over "
            f"{arguments.trials:,} (limit {MILLISECONDS_PER_TRIAL:.0f} ms)"
        )
        print(
            f"results and report: {found['report_seconds']:.1f} s for {arguments.recorded:,} "
            f"recorded trials (limit {REPORT_SECONDS:.0f} s)"
        )
    within = found["milliseconds_per_trial"] <= MILLISECONDS_PER_TRIAL
    return 0 if within and found["report_seconds"] <= REPORT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
