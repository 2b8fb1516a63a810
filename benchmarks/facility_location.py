"""Compare greedy facility location with submodlib, and apricot if installed, on one matrix.

All get the same float32 similarities (real text: distinct lines of the standard library, as
TF-IDF vectors reduced to 256 dimensions) and pick the same number of rows; they take turns, and the
ratio is the median over the rounds. Times are those of the processor, summed over threads, which a
busy machine hardly changes. Our time includes checking, copying and rounding the matrix.
Then our own growth from N to 10 N, from vectors: exact, and on 50 nearest neighbours.

    python benchmarks/facility_location.py               # 3,000 rows and 10 times as many: a minute
    python benchmarks/facility_location.py --rows 1000 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from bakeoff.selection.baselines import FacilityLocationSelector


def text_vectors(n_rows: int) -> np.ndarray:
    """Return float32 vectors ``(n_rows, 256)`` of distinct lines of text."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found.update(dict.fromkeys(line.strip() for line in lines if len(line.strip()) > 30))
    texts = list(found)
    if len(texts) < n_rows:
        raise SystemExit(f"the standard library here has only {len(texts)} lines of text")
    texts = [texts[i * len(texts) // n_rows] for i in range(n_rows)]
    counts = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    vectors = TruncatedSVD(256, n_iter=2, random_state=0).fit_transform(counts).astype(np.float32)
    # Lines that share no word with others are left with almost nothing: any direction will do.
    lost = np.linalg.norm(vectors, axis=1) < 1e-6
    vectors[lost] = np.random.default_rng(0).standard_normal((int(lost.sum()), 256))
    return vectors


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors - vectors.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return np.clip(unit @ unit.T, 0, 1)


def ours(similarities: np.ndarray, n_select: int) -> list[int]:
    chosen = FacilityLocationSelector(n_select, metric="precomputed").fit(similarities)
    return chosen.selected_indices_.tolist()


def submodlib(similarities: np.ndarray, n_select: int) -> list[int]:
    from submodlib.functions.facilityLocation import FacilityLocationFunction

    objective = FacilityLocationFunction(
        n=len(similarities), mode="dense", sijs=similarities, separate_rep=False
    )
    found = objective.maximize(
        budget=n_select,
        optimizer="LazyGreedy",
        stopIfZeroGain=False,
        stopIfNegativeGain=False,
        show_progress=False,
    )
    return [row for row, _ in found]


def apricot(similarities: np.ndarray, n_select: int) -> list[int]:
    from apricot import FacilityLocationSelection

    chosen = FacilityLocationSelection(n_select, metric="precomputed", optimizer="lazy")
    return [int(row) for row in chosen.fit(similarities.astype(np.float64)).ranking]


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def compare(vectors: np.ndarray, n_select: int, rounds: int) -> dict[str, Any]:
    """Time all sides on the same matrix and check that they choose equally well."""
    similarities = cosines(vectors)
    sides: dict[str, Callable[[np.ndarray, int], list[int]]] = {"ours": ours}
    for side in (submodlib, apricot):
        if importlib.util.find_spec(side.__name__):
            sides[side.__name__] = side
    for run in sides.values():  # imports and compilation are not what is compared
        run(similarities[:50, :50].copy(), 5)
    times: dict[str, list[float]] = {name: [] for name in sides}
    picks: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name, run in sides.items():
            taken, picks[name] = seconds(lambda run=run: run(similarities, n_select))
            times[name].append(taken)
    exact = similarities.astype(np.float64)
    value = {name: float(exact[:, rows].max(axis=1).sum()) for name, rows in picks.items()}
    rivals = [name for name in sides if name != "ours"]
    ratios = {
        name: [b / a for a, b in zip(times["ours"], times[name], strict=True)] for name in rivals
    }
    return {
        "rows": len(vectors),
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratio_range": {name: [min(found), max(found)] for name, found in ratios.items()},
        "objective": value,
        "same_picks": {name: picks[name] == picks["ours"] for name in rivals},
    }


def measure(n_rows: int, n_select: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    vectors = text_vectors(10 * n_rows)
    sizes = {size: vectors[:: len(vectors) // size][:size] for size in (n_rows // 10, n_rows)}
    growth = {}
    for name, n_neighbors in (("exact", None), ("50 neighbours", 50)):
        selector = FacilityLocationSelector(n_select, n_neighbors=n_neighbors)
        selector.fit(sizes[n_rows // 10])  # warm up
        small, _ = seconds(lambda selector=selector: selector.fit(sizes[n_rows]))
        large, _ = seconds(lambda selector=selector: selector.fit(vectors))
        growth[name] = {"seconds": small, "seconds_10x": large, "growth": large / small}
    return {
        "benchmark": "facility_location",
        "n_select": n_select,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cores": os.cpu_count(),
        "comparisons": [compare(rows, n_select, rounds) for rows in sizes.values()],
        "growth_from_vectors": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--select", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.rows, arguments.select, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    small, large = result["comparisons"]
    for found in (small, large):
        for rival, ratio in found["ratio"].items():
            low, high = found["ratio_range"][rival]
            same = "the same picks" if found["same_picks"][rival] else "other picks"
            print(
                f"facility location, {found['rows']} rows, {result['n_select']} picks: "
                f"{ratio:.1f} times as fast as {rival} ({low:.1f} to {high:.1f} over "
                f"{arguments.rounds} rounds; {found['seconds']['ours']:.3f} s against "
                f"{found['seconds'][rival]:.3f} s)\n  {same}, sums "
                f"{found['objective']['ours']:.6f} and {found['objective'][rival]:.6f}"
            )
    for side in large["seconds"]:
        factor = large["seconds"][side] / small["seconds"][side]
        print(f"  10 times the rows take {side} {factor:.0f} times as long")
    for name, found in result["growth_from_vectors"].items():
        print(
            f"from vectors, {name}: {found['seconds']:.2f} s, with 10 times the rows "
            f"{found['seconds_10x']:.1f} s ({found['growth']:.0f} times)"
        )


if __name__ == "__main__":
    main()
