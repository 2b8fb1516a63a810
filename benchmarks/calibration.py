"""Calibration of the statistics: false verdicts, coverage and power in simulated studies.

    python benchmarks/calibration.py --studies 1000 --seed 0 --json calibration.json

Each scenario draws studies in which the designs truly differ by nothing (columns *false* and
*covers*) and the same with a true effect (columns *power* and *covers+*), and asks three judges:
`bakeoff.study.statistics.compare`, `scipy.stats.permutation_test` on the same paired units (seeds
averaged, tasks weighing equally), and Welch's unpaired t-test. A false verdict is a better or worse
for any design; the power of ours is its rate of better verdicts for the first design; the width of
its interval is the median. The band is where a rate of exactly alpha would land in 95 of 100 such
simulations. A rival's power means nothing in rows where its rate of false verdicts is far above
alpha.

Rows that begin with *sampled* ask about tasks like those drawn (``tasks="sampled"``), the others
about the tasks themselves. Takes about six minutes on two idle cores at 1,000 studies.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bakeoff.study.statistics import compare

FloatArray = NDArray[np.float64]
Scores = dict[str, dict[str, FloatArray]]
ALPHA = 0.05
MIXED = (8, 12, 20, 30, 40)


@dataclass(frozen=True)
class Scenario:
    """How the studies of one row are drawn; every spread is a standard deviation per design.

    A score is: difficulty of the unit (shared by all designs) + effect of the design
    + `task` (design x task) + `seed` (design x seed) + `interaction` (design x task x seed)
    + `unit` (design x unit, the same for all seeds) + 1 (design x unit x seed).
    """

    name: str
    units: tuple[int, ...]
    n_seeds: int
    effect: float
    unit: float = 0.0
    seed: float = 0.0
    task: float = 0.0
    interaction: float = 0.0
    tail: str = "normal"
    binary: bool = False
    n_designs: int = 2
    tasks: Literal["fixed", "sampled"] = "fixed"

    def draw(self, rng: np.random.Generator, effect: float) -> Scores:
        """Return scores in which every design but the reference is better by `effect`."""
        seeds, n_tasks = self.n_seeds, len(self.units)
        difficulty = [rng.normal(size=(1, n)) for n in self.units]
        scores: Scores = {}
        for index in range(self.n_designs):
            common = self.seed * rng.normal(size=(seeds, 1))
            tasks = self.task * rng.normal(size=n_tasks)
            if self.tasks == "fixed":
                tasks -= tasks.mean()  # what differs between these tasks is not noise: truth stays
            cells = self.interaction * rng.normal(size=(n_tasks, seeds, 1))
            scores[f"design {index}"] = {}
            for t, n in enumerate(self.units):
                noise = self.unit * self._noise(rng, (1, n), index)
                noise = noise + self._noise(rng, (seeds, n), index)
                latent = difficulty[t] + tasks[t] + common + cells[t] + noise
                latent = latent + (effect if index else 0.0)
                scores[f"design {index}"][f"task {t}"] = (
                    (latent > 0).astype(float) if self.binary else latent
                )
        return scores

    def truth(self, effect: float) -> float:
        """Return the true difference of scores for an effect."""
        if not self.binary:
            return effect
        spread = math.sqrt(2 + self.unit**2 + self.seed**2 + self.task**2 + self.interaction**2)
        return float(stats.norm.cdf(effect / spread) - 0.5)

    def _noise(self, rng: np.random.Generator, size: tuple[int, int], index: int) -> FloatArray:
        if self.tail == "t2":
            return rng.standard_t(2, size)
        if self.tail == "t3":
            return rng.standard_t(3, size)
        if self.tail == "contaminated":
            wild = np.where(rng.random(size) < 0.1, rng.lognormal(1.5, 1.0, size), 0.0)
            return rng.normal(size=size) + wild
        if self.tail == "skewed" and index:  # the designs differ in shape, not in mean
            return rng.lognormal(0.0, 1.0, size) - math.exp(0.5)
        return rng.normal(size=size)


ONE_TASK = (
    Scenario("1 task, 1 seed, 40 units", (40,), 1, 0.65),
    Scenario("1 task, 1 seed, 8 units (exact)", (8,), 1, 1.5),
    Scenario("1 task, 1 seed, 40 units, t3 tails", (40,), 1, 1.0, tail="t3"),
    Scenario("1 task, 1 seed, 40 units, t2 tails", (40,), 1, 1.6, tail="t2"),
    Scenario("0/1, 1 task, 1 seed, 40 units", (40,), 1, 0.7, binary=True),
    Scenario("0/1, 1 task, 1 seed, 200 units", (200,), 1, 0.3, binary=True),
    Scenario("1 task, 3 seeds", (40,), 3, 0.73, unit=1.0),
    Scenario("1 task, 3 seeds, seeds differ", (40,), 3, 0.73, unit=1.0, seed=0.2),
    Scenario("1 task, 3 seeds, seeds differ much", (40,), 3, 1.5, unit=1.0, seed=0.6),
    Scenario("4 designs, 1 task, 1 seed", (40,), 1, 0.65, n_designs=4),
    Scenario("corner: one-sided outliers, 40 units", (40,), 1, 1.2, tail="skewed"),
)
SEVERAL_TASKS = (
    Scenario("5 tasks, 1 seed, lognormal outliers", MIXED, 1, 0.8, tail="contaminated"),
    Scenario("0/1, 5 tasks, 3 seeds", MIXED, 3, 0.4, unit=0.5, binary=True),
    Scenario("5 tasks, 3 seeds", MIXED, 3, 0.5, unit=1.0),
    Scenario("5 tasks, 3 seeds, no lasting unit effect", MIXED, 3, 0.26),
    Scenario("5 tasks, 3 seeds, t3 tails", MIXED, 3, 0.8, unit=1.0, tail="t3"),
    Scenario("5 tasks, 3 seeds, seeds differ", MIXED, 3, 0.5, unit=1.0, seed=0.15),
    Scenario("5 tasks, 3 seeds, seeds differ much", MIXED, 3, 1.0, unit=1.0, seed=0.4),
    Scenario("5 tasks, 3 seeds, worst seed spread", MIXED, 3, 0.26, seed=0.16),
    Scenario("5 tasks, 3 seeds, tasks differ", MIXED, 3, 0.5, unit=1.0, task=0.2),
    Scenario("5 tasks, 3 seeds, tasks differ much", MIXED, 3, 0.5, unit=1.0, task=0.6),
    Scenario(
        "5 tasks, 3 seeds, all of it", MIXED, 3, 0.8, unit=1.0, seed=0.2, task=0.3, interaction=0.3
    ),
    Scenario("10 tasks, 5 seeds", (40,) * 10, 5, 0.21, unit=1.0),
    Scenario("10 tasks, 5 seeds, all of it", (40,) * 10, 5, 0.5, 1.0, 0.15, 0.2, 0.2),
    Scenario("4 designs, 5 tasks, 3 seeds", MIXED, 3, 0.5, unit=1.0, n_designs=4),
    Scenario("corner: 5 tasks, 2 seeds, seeds differ", MIXED, 2, 0.5, unit=1.0, seed=0.3),
    Scenario("corner: 2 tasks, 3 seeds, tasks differ", (40, 40), 3, 0.6, unit=1.0, task=0.4),
    Scenario("corner: 2 tasks, 1 seed, tasks differ", (40, 40), 1, 0.6, task=0.4),
)
SCENARIOS = (
    *ONE_TASK,
    *SEVERAL_TASKS,
    *(
        replace(scenario, name=f"sampled: {scenario.name}", tasks="sampled")
        for scenario in SEVERAL_TASKS
    ),
)


@dataclass(frozen=True)
class Row:
    """What was measured in one scenario."""

    scenario: str
    studies: int
    effect: float
    false_verdicts: float
    false_permutation: float
    false_unpaired: float
    coverage: float
    coverage_with_effect: float
    width: float
    power: float
    power_permutation: float
    power_unpaired: float


def band(rate: float, studies: int) -> tuple[float, float]:
    """Return the central 95 % of rates observed in so many studies when `rate` is the truth."""
    low, high = (float(stats.binom.ppf(level, studies, rate)) for level in (0.025, 0.975))
    return low / studies, high / studies


def _judge(scenario: Scenario, effect: float, rng: np.random.Generator) -> list[float]:
    scores = scenario.draw(rng, effect)
    result = compare(scores, "design 0", rng=rng, tasks=scenario.tasks)
    records = [result[name].overall for name in list(scores)[1:]]
    truth = scenario.truth(effect)
    first = records[0]
    # The rivals judge the first pair only, so with several designs ours has the harder task.
    own, other = scores["design 1"], scores["design 0"]
    weighted = np.concatenate([(own[t] - other[t]).mean(axis=0) / own[t].shape[1] for t in own])
    permutation = stats.permutation_test(
        (weighted,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=499,
        rng=rng,
    ).pvalue
    unpaired = stats.ttest_ind(
        np.concatenate([own[t].mean(axis=0) for t in own]),
        np.concatenate([other[t].mean(axis=0) for t in own]),
        equal_var=False,
    ).pvalue
    if effect:
        decided = first.verdict == "better"
    else:
        decided = any(record.verdict in ("better", "worse") for record in records)
    return [
        decided,
        permutation < ALPHA,
        unpaired < ALPHA,
        first.interval[0] <= truth <= first.interval[1],
        first.interval[1] - first.interval[0],
    ]


def measure(scenario: Scenario, studies: int, seed: int) -> Row:
    """Simulate one scenario with and without its effect."""
    index = [item.name for item in SCENARIOS].index(scenario.name)
    averages = []
    for effect in (0.0, scenario.effect):
        seeds = np.random.SeedSequence([seed, index, int(effect > 0)]).spawn(studies)
        judged = [_judge(scenario, effect, np.random.default_rng(one)) for one in seeds]
        figures = np.array(judged, dtype=float)
        averages.append(np.append(figures[:, :-1].mean(axis=0), np.median(figures[:, -1])))
    null, real = averages
    return Row(
        scenario=scenario.name,
        studies=studies,
        effect=scenario.truth(scenario.effect),
        false_verdicts=float(null[0]),
        false_permutation=float(null[1]),
        false_unpaired=float(null[2]),
        coverage=float(null[3]),
        coverage_with_effect=float(real[3]),
        width=float(null[4]),
        power=float(real[0]),
        power_permutation=float(real[1]),
        power_unpaired=float(real[2]),
    )


def false_equivalence(studies: int, seed: int) -> float:
    """Return how often a difference exactly as large as the margin is called equivalent."""
    scenario = next(item for item in SCENARIOS if item.name == "5 tasks, 3 seeds")
    margin = 1.0
    count = 0
    for one in np.random.SeedSequence([seed, 10_000]).spawn(studies):
        rng = np.random.default_rng(one)
        result = compare(scenario.draw(rng, margin), "design 0", margin=margin, rng=rng)
        count += result["design 1"].overall.verdict == "equivalent"
    return count / studies


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| scenario | false verdicts | permutation | unpaired | covers | covers+ | width "
        "| effect | power | permutation | unpaired |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = band(ALPHA, row.studies)
        mark = "" if row.false_verdicts <= high else " (above the band)"
        lines.append(
            f"| {row.scenario} | {row.false_verdicts:.3f}{mark} | {row.false_permutation:.3f} "
            f"| {row.false_unpaired:.3f} | {row.coverage:.3f} | {row.coverage_with_effect:.3f} "
            f"| {row.width:.2f} | {row.effect:.2f} | {row.power:.2f} "
            f"| {row.power_permutation:.2f} | {row.power_unpaired:.2f} |"
        )
    low, high = band(ALPHA, rows[0].studies)
    lines.append("")
    lines.append(
        f"{rows[0].studies} studies a row; a true rate of {ALPHA} is observed between {low:.3f} "
        f"and {high:.3f}, a true coverage of {1 - ALPHA} between {1 - high:.3f} and {1 - low:.3f}."
    )
    return "\n".join(lines)


def main() -> None:
    """Run all scenarios and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    started = time.perf_counter()
    jobs = [(scenario, arguments.studies, arguments.seed) for scenario in SCENARIOS]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker a core; more threads only collide
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        rows = pool.starmap(measure, jobs, chunksize=1)
    equivalence = false_equivalence(arguments.studies, arguments.seed)
    seconds = time.perf_counter() - started
    print(table(rows))
    print(f"\nA difference as large as the margin was called equivalent in {equivalence:.3f}.")
    print(f"{seconds:.0f} s with {arguments.workers} workers.")
    if arguments.json:
        document = {
            "studies": arguments.studies,
            "seed": arguments.seed,
            "alpha": ALPHA,
            "rows": [vars(row) for row in rows],
            "false_equivalence_at_margin": equivalence,
            "seconds": seconds,
        }
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
