"""What a cascade saves at equal quality, on a synthetic pair of models, and how fast it decides.

The pair: an answer of the small model has 2 to 60 tokens, and is spoilt mostly by its least certain
tokens and a little by its length; the large model is right nine times in ten. Rules are fitted on
one part and judged on another. The saving is the share of cost at which the cascade reaches the
large model's quality (or 95 % of the way there), against asking the large model always and against
the cascade with the mean log-probability per token (Chow-Average), with bootstrap intervals.

Speed: quantile features of all answers against `numpy.quantile` answer by answer, and the interval
of the area under the deferral curve against a bootstrap that computes each area anew. Timings take
turns; ratios are medians over rounds. Then the number of answers is multiplied by ten.

    python benchmarks/cascades.py                    # 20,000 answers: a minute or two
    python benchmarks/cascades.py --quick --json     # seconds
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bakeoff.decoding.deferral_curves import cost_saved, deferral_auc, deferral_curve
from bakeoff.decoding.deferral_rules import (
    ChowAverage,
    ChowSum,
    LengthScore,
    PostHocDeferral,
    QuantileScore,
)
from bakeoff.decoding.token_records import RaggedTokens, TokenRecord

SMALL_COST, LARGE_COST = 1.0, 10.0
GRID = np.linspace(0.0, 1.0, 101)


def made_pair(rng: np.random.Generator, n: int) -> tuple[list[TokenRecord], Any, Any, Any]:
    """Return answers, qualities of both models, and the true expected gap."""
    lengths = 2 + rng.geometric(0.07, n).clip(max=58)
    ease = rng.gamma(4.0, 1.0, n)  # some questions make every token uncertain
    records = [
        TokenRecord(-rng.exponential(0.4, size) / e * 4)
        for size, e in zip(lengths, ease, strict=True)
    ]
    tenth = np.array([np.quantile(record.log_probs, 0.1) for record in records])
    p_small = 1 / (1 + np.exp(-(3.0 * tenth + 4.0 - 0.02 * (lengths - 15))))
    q_small = (rng.random(n) < p_small).astype(float)
    q_large = (rng.random(n) < 0.9).astype(float)
    return records, q_small, q_large, 0.9 - p_small


def quality_and_cost(n: int, n_resamples: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    train = made_pair(rng, n)
    records, small, large, gap = made_pair(rng, n)
    rules: dict[str, Any] = {
        "length": LengthScore(),
        "chow-sum": ChowSum(),
        "chow-average": ChowAverage(),
        "chow-quantile-0": QuantileScore(0.0),
        "post-hoc-quantile": PostHocDeferral(estimator="linear").fit(*train[:3]),
    }
    scores = {name: rule.score(records) for name, rule in rules.items()}
    scores["expected gap"] = gap
    found = {}
    for name, score in scores.items():
        options: dict[str, Any] = {"n_resamples": n_resamples}
        sides = (score, small, large, SMALL_COST, LARGE_COST)
        found[name] = {
            "auc": deferral_auc(score, small, large),
            "gain": deferral_curve(score, small, large).gain,
            "saved_at_large_quality": cost_saved(*sides, **options),
            "saved_at_95_percent": cost_saved(*sides, recovered=0.95, **options),
            "saved_at_95_percent_versus_chow_average": cost_saved(
                *sides, recovered=0.95, versus=scores["chow-average"], **options
            ),
        }
    return {
        "small_quality": float(small.mean()),
        "large_quality": float(large.mean()),
        "rules": found,
    }


def _seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def speed(n: int, rounds: int, n_resamples: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    records, small, large, gap = made_pair(rng, n)
    runs: dict[str, Callable[[], Any]] = {
        "features": lambda: RaggedTokens(records).quantiles(GRID),
        "features, numpy.quantile": lambda: np.array(
            [np.quantile(record.log_probs, GRID) for record in records]
        ),
        "interval": lambda: deferral_auc(gap, small, large),
        "interval, our bootstrap": lambda: deferral_auc(
            gap, small, large, method="bootstrap", n_resamples=n_resamples
        ),
        "interval, areas anew": lambda: _plain_bootstrap(gap, small, large, n_resamples),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}  # lazy imports are not what is timed
    for _ in range(rounds):
        for name, run in runs.items():
            taken, results[name] = _seconds(run)
            times[name].append(taken)
    difference = float(np.abs(results["features"] - results["features, numpy.quantile"]).max())

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    return {
        "answers": n,
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "features_ratio": ratio("features, numpy.quantile", "features"),
        "features_difference": difference,
        "interval_ratio": ratio("interval, areas anew", "interval"),
        "bootstrap_ratio": ratio("interval, areas anew", "interval, our bootstrap"),
    }


def _plain_bootstrap(scores: Any, small: Any, large: Any, n_resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(n_resamples):
        rows = rng.integers(0, len(scores), len(scores))
        order = rows[np.argsort(-scores[rows], kind="stable")]
        steps = np.cumsum((large - small)[order]) / len(rows)
        quality = small[rows].mean() + np.concatenate([[0.0], steps])
        areas.append(np.trapezoid(quality, dx=1 / len(rows)))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


def measure(n: int, rounds: int, n_resamples: int) -> dict[str, Any]:
    small, grown = speed(n // 10, rounds, n_resamples), speed(n, rounds, n_resamples)
    return {
        "benchmark": "cascades",
        **quality_and_cost(n // 4, n_resamples),
        "speed": grown,
        "growth_for_ten_times_as_many": {
            name: grown["seconds"][name] / small["seconds"][name] for name in grown["seconds"]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="4,000 answers, one round")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.answers, arguments.rounds, arguments.resamples = 4000, 1, 100
    result = measure(arguments.answers, arguments.rounds, arguments.resamples)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"quality: small {result['small_quality']:.3f}, large {result['large_quality']:.3f}; "
        f"costs {SMALL_COST:g} and {LARGE_COST:g}\n"
        "cost saved at the large model's quality, and 95 % of the way to it (95 % intervals)"
    )
    for name, row in result["rules"].items():
        figures = [
            "{:+.1%} [{:+.1%}, {:+.1%}]".format(*row[key])
            for key in (
                "saved_at_large_quality",
                "saved_at_95_percent",
                "saved_at_95_percent_versus_chow_average",
            )
        ]
        print(
            f"  {name:18} area {row['auc'].value:.4f} ({row['gain']:+.2%} over random); saved "
            f"{figures[0]}; {figures[1]}, against Chow-Average {figures[2]}"
        )
    fast = result["speed"]
    growth = result["growth_for_ten_times_as_many"]
    print(
        f"features of {fast['answers']} answers: {fast['features_ratio']:.1f} times as fast as "
        f"numpy.quantile one by one (largest difference {fast['features_difference']:.0e}); "
        f"time grows {growth['features']:.1f} times for ten times as many\n"
        f"interval of the area: {fast['interval_ratio']:.0f} times as fast as "
        f"{arguments.resamples} areas anew, the bootstrap {fast['bootstrap_ratio']:.1f} times; "
        f"growth {growth['interval']:.1f} and {growth['interval, our bootstrap']:.1f}"
    )


if __name__ == "__main__":
    main()
