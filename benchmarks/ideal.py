"""Compare the speed of `InfluenceSelector` with plain greedy choice and with cynetdiff.

Rivals, all on the same graph:

- plain: before every pick, the gain of every row on the same simulated graphs, by depth-first
  search in Python. It must pick the same rows;
- plain-vectorised: the same with this package's own vectorised search, which tells how much is due
  to evaluating less, and how much to evaluating faster;
- cynetdiff: lazy greedy choice (CELF) with its C++ `compute_marginal_gains`, new coins for every
  evaluation, as many simulations. Its picks differ by chance; both are judged on new simulations.

Seconds are CPU seconds of the process, and ours is the median of several runs around the rivals'.

    python benchmarks/ideal.py                       # 3,000 rows: two minutes
    python benchmarks/ideal.py --grow 10000 100000   # also seconds and memory at these sizes
    python benchmarks/ideal.py --stability           # agreement between seeds, on the wine data
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from bakeoff.selection import ideal
from bakeoff.selection.ideal import InfluenceSelector, influence, similarity_graph

SEED = 0


def pool(n: int, width: int = 64) -> np.ndarray:
    """Return vectors in overlapping groups of about 60."""
    rng = np.random.default_rng(SEED)
    centers = rng.standard_normal((max(1, n // 60), width))
    spread = rng.standard_normal((n, width))
    return (centers[rng.integers(len(centers), size=n)] + spread).astype(np.float32)


def ours(graph: csr_array, n_select: int, n_simulations: int) -> list[int]:
    selector = InfluenceSelector(n_select, n_simulations=n_simulations, random_state=SEED)
    return selector.fit(graph=graph).selected_indices_.tolist()


def plain(graph: csr_array, n_select: int, n_simulations: int) -> list[int]:
    n = graph.shape[0]
    coins = ideal._Coins(graph, SEED)
    rows = np.repeat(np.arange(n), np.diff(graph.indptr))
    worlds = []
    for simulation in range(n_simulations):
        successors: list[list[int]] = [[] for _ in range(n)]
        for edge in np.flatnonzero(coins.live(np.array([simulation]))[0]).tolist():
            successors[rows[edge]].append(int(graph.indices[edge]))
        worlds.append((successors, bytearray(n)))

    def reach(successors: list[list[int]], covered: bytearray, row: int) -> Any:
        if covered[row]:
            return ()
        if not successors[row]:
            return (row,)
        found, stack = {row}, [row]
        while stack:
            for other in successors[stack.pop()]:
                if other not in found and not covered[other]:
                    found.add(other)
                    stack.append(other)
        return found

    picks: list[int] = []
    for _ in range(n_select):
        gains = [sum(len(reach(*world, row)) for world in worlds) for row in range(n)]
        for row in picks:
            gains[row] = -1
        picks.append(int(np.argmax(gains)))
        for successors, covered in worlds:
            for row in reach(successors, covered, picks[-1]):
                covered[row] = 1
    return picks


def plain_vectorised(graph: csr_array, n_select: int, n_simulations: int) -> list[int]:
    n, usual = graph.shape[0], (ideal._CANDIDATES, ideal._BACKWARD)
    ideal._CANDIDATES, ideal._BACKWARD = 64, 0  # what suits it best, and no bounds to maintain
    try:
        worlds = ideal._LiveGraphs(ideal._Coins(graph, SEED), n_simulations)
        picks: list[int] = []
        for _ in range(n_select):
            for start in range(0, n, worlds.batch):
                worlds.evaluate(np.arange(start, min(start + worlds.batch, n)))
            worlds.bounds[picks] = -1
            picks.append(int(worlds.bounds.argmax()))
            worlds.cover(np.array(picks[-1:]))
    finally:
        ideal._CANDIDATES, ideal._BACKWARD = usual
    return picks


def cynetdiff_celf(graph: csr_array, n_select: int, n_simulations: int) -> list[int]:
    import array
    import heapq

    from cynetdiff.models import IndependentCascadeModel

    model = IndependentCascadeModel(
        array.array("I", graph.indptr[:-1].tolist()),
        array.array("I", graph.indices.tolist()),
        activation_probs=array.array("f", graph.data.tolist()),
        rng=SEED,
    )

    def gain(row: int) -> float:
        return float(model.compute_marginal_gains(picks, [row], n_simulations)[1])

    picks: list[int] = []
    heap = [(-gain(row), row, 0) for row in range(graph.shape[0])]
    heapq.heapify(heap)
    while len(picks) < n_select:
        _, row, picked = heapq.heappop(heap)
        if picked == len(picks):
            picks.append(row)
        else:
            heapq.heappush(heap, (-gain(row), row, len(picks)))
    return picks


def timed(run: Callable[..., list[int]], *arguments: Any) -> tuple[float, list[int]]:
    start = time.process_time()
    picks = run(*arguments)
    return time.process_time() - start, picks


def compare(n: int, n_select: int, n_simulations: int) -> dict[str, Any]:
    """Time all on the same graph."""
    graph = similarity_graph(pool(n))
    arguments = (graph, n_select, n_simulations)
    ours(graph, 1, 2)  # lazy imports
    seconds = [timed(ours, *arguments)[0] for _ in range(3)]
    rivals: dict[str, Any] = {}
    own = ours(*arguments)
    fresh = {"n_simulations": 2000, "random_state": SEED + 1}
    for name, run in (
        ("plain", plain),
        ("plain-vectorised", plain_vectorised),
        ("cynetdiff", cynetdiff_celf),
    ):
        try:
            taken, picks = timed(run, *arguments)
        except ImportError:
            continue
        seconds.append(timed(ours, *arguments)[0])
        rivals[name] = {
            "seconds": taken,
            "same_picks": picks == own,
            "influence": influence(graph, picks, **fresh).mean,
        }
    for rival in rivals.values():
        rival["ratio"] = rival["seconds"] / statistics.median(seconds)
    return {
        "rows": n,
        "picks": n_select,
        "simulations": n_simulations,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "influence": influence(graph, own, **fresh).mean,
        "rivals": rivals,
    }


def growth(sizes: list[int], n_select: int, n_simulations: int) -> list[dict[str, Any]]:
    """Time the selection alone at several sizes, the neighbour search apart."""
    figures = []
    for n in sizes:
        taken_graph, graph = timed(lambda n=n: similarity_graph(pool(n)))
        taken, _ = timed(ours, graph, n_select, n_simulations)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures.append(
            {"rows": n, "graph_seconds": taken_graph, "seconds": taken, "peak_gib_so_far": peak}
        )
    return figures


def stability(seeds: int = 5) -> list[dict[str, Any]]:
    """Measure how alike the selections of different seeds are: wine, 18 of 178 rows."""
    from sklearn.datasets import load_wine
    from sklearn.preprocessing import StandardScaler

    graph = similarity_graph(StandardScaler().fit_transform(load_wine().data))

    def new_coins(n_simulations: int, seed: int) -> list[int]:
        """Toss new coins for every candidate of every round."""
        rng = np.random.default_rng(seed)
        picks: list[int] = []
        for _ in range(18):
            values = [
                -1.0 if row in picks else influence(graph, [*picks, row], n_simulations, rng).mean
                for row in range(graph.shape[0])
            ]
            picks.append(int(np.argmax(values)))
        return picks

    def same_coins(n_simulations: int, seed: int) -> list[int]:
        selector = InfluenceSelector(18, n_simulations=n_simulations, random_state=seed)
        return selector.fit(graph=graph).selected_indices_.tolist()

    figures = []
    for name, run, n_simulations in (
        ("new coins for every candidate", new_coins, 10),
        ("same coins for all", same_coins, 10),
        ("same coins for all", same_coins, 100),
        ("same coins for all", same_coins, 200),
        ("same coins for all", same_coins, 1000),
        ("same coins for all", same_coins, 10_000),
    ):
        chosen = [run(n_simulations, seed) for seed in range(seeds)]
        overlaps = [
            len(set(a) & set(b)) / len(set(a) | set(b))
            for a, b in itertools.combinations(chosen, 2)
        ]
        values = [influence(graph, picks, 20_000, 1000).mean for picks in chosen]
        figures.append(
            {
                "scheme": name,
                "simulations": n_simulations,
                "mean_jaccard": statistics.mean(overlaps),
                "influence": statistics.mean(values),
            }
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--picks", type=int, default=100)
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--grow", type=int, nargs="*", default=[], help="rows, e.g. 10000 100000")
    parser.add_argument("--stability", action="store_true")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "ideal"}
    if arguments.stability:
        result["stability"] = stability()
    else:
        # First, while the peak of memory is its own.
        result["growth"] = growth(arguments.grow, arguments.picks, arguments.simulations)
        result |= compare(arguments.rows, arguments.picks, arguments.simulations)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for row in result.get("stability", []):
        print(
            f"{row['scheme']}, {row['simulations']} simulations: overlap "
            f"{row['mean_jaccard']:.2f}, influence {row['influence']:.1f}"
        )
    for row in result.get("growth", []):
        print(
            f"{row['rows']} rows: {row['seconds']:.1f} s after {row['graph_seconds']:.1f} s for "
            f"the graph, at most {row['peak_gib_so_far']:.2f} GiB so far"
        )
    if "rivals" in result:
        low, high = result["seconds_range"]
        print(
            f"ideal: {result['picks']} of {result['rows']} rows, {result['simulations']} "
            f"simulations: {result['seconds']:.2f} s ({low:.2f} to {high:.2f}), influence "
            f"{result['influence']:.1f}"
        )
        for name, rival in result["rivals"].items():
            print(
                f"  {rival['ratio']:.0f} times as fast as {name} ({rival['seconds']:.1f} s), "
                f"{'the same' if rival['same_picks'] else 'other'} picks, influence "
                f"{rival['influence']:.1f}"
            )


if __name__ == "__main__":
    main()
