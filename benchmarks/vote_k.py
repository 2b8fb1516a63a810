"""Compare `VoteK` with vote-k written from its definition, and with the neighbour search alone.

The rival is a plain implementation with Python's lists and sets, as the method is usually written:
it adds up the votes of every candidate for every pick. Both get the same graph and must make the
same picks. The large pool runs in a process of its own, whose peak memory is the operating
system's figure; there, the rival is the search for neighbours, timed inside the same `fit`.

    python benchmarks/vote_k.py                     # seconds, then minutes for 100,000 rows
    python benchmarks/vote_k.py --rows 10000 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import scipy.sparse as sp

from bakeoff.data.neighbours import nearest_neighbours, unit_rows
from bakeoff.selection import vote_k
from bakeoff.selection.vote_k import VoteK


def made_vectors(n: int, width: int = 384, topics: int = 200) -> np.ndarray:
    """Return float32 vectors around `topics` centres of unequal size, as embeddings lie."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, topics + 1)
    topic = rng.choice(topics, n, p=share / share.sum())
    centres = rng.standard_normal((topics, width), dtype=np.float32)
    vectors = rng.standard_normal((n, width), dtype=np.float32)
    vectors += centres[topic]
    return vectors


def by_definition(neighbours: list[list[int]], n_select: int) -> list[int]:
    """Pick by adding up all votes anew for every pick; of equal scores the lowest row."""
    voters = defaultdict(list)
    for voter, row in enumerate(neighbours):
        for candidate in row:
            voters[candidate].append(voter)
    picks: list[int] = []
    labeled: set[int] = set()
    discounts: dict[int, int] = defaultdict(int)
    while len(picks) < n_select:
        best, highest = -1, 0.0
        for candidate in range(len(neighbours)):
            if candidate in labeled:
                continue
            score = 0.0
            for voter in voters[candidate]:
                if voter not in labeled:
                    score += 10.0 ** -discounts[voter]
            if score > highest * (1 + 1e-12):  # equal but for the order of additions
                best, highest = candidate, score
        picks.append(best)
        labeled.add(best)
        for voter in voters[best]:
            discounts[voter] += 1
    return picks


def against_definition(n: int, k: int, n_select: int, rounds: int) -> dict[str, Any]:
    """Time both on one graph; they take turns."""
    vectors = made_vectors(n, topics=40)
    mean = vectors.mean(axis=0)
    start = time.perf_counter()
    neighbours = nearest_neighbours(unit_rows(vectors, offset=mean), k).indices
    search = time.perf_counter() - start
    start_of_rows = np.arange(0, n * k + 1, k)
    graph = sp.csr_array((np.ones(n * k), neighbours.reshape(-1), start_of_rows), shape=(n, n))
    lists = neighbours.tolist()
    selector = VoteK(n_select, k)
    selector.fit(graph)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours = selector.fit(graph).selected_indices_.tolist()
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = by_definition(lists, n_select)
        seconds["theirs"].append(time.perf_counter() - start)
        if ours != theirs:
            raise SystemExit(f"the picks differ: {ours} and {theirs}")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "rows": n,
        "k": k,
        "picks": n_select,
        "search_seconds": search,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def _end_to_end(n: int, k: int, n_select: int, pipe: Connection) -> None:
    vectors = made_vectors(n)
    before = _peak_bytes()
    searching = 0.0

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal searching
        start = time.perf_counter()
        found = nearest_neighbours(*arguments, **options)
        searching += time.perf_counter() - start
        return found

    vote_k.nearest_neighbours = timed
    start = time.perf_counter()
    selector = VoteK(n_select, k).fit(vectors)
    total = time.perf_counter() - start
    pipe.send(
        {
            "rows": n,
            "k": k,
            "picks": len(selector.selected_indices_),
            "seconds": total,
            "search_seconds": searching,
            "ratio": total / searching,
            "peak_bytes": _peak_bytes(),
            "peak_bytes_before": before,
        }
    )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def end_to_end(n: int, k: int, n_select: int) -> dict[str, Any]:
    """Run `VoteK` from vectors to picks in a fresh process."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_end_to_end, args=(n, k, n_select, far), daemon=True)
    process.start()
    far.close()  # so that a process which dies is noticed
    result: dict[str, Any] = near.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the large pool")
    parser.add_argument("--picks", type=int, default=1000, help="picks from the large pool")
    parser.add_argument("--k", type=int, default=50, help="votes per row in the large pool")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    small = against_definition(3000, 150, 100, arguments.rounds)
    sizes = [arguments.rows // 10, arguments.rows]
    large = [end_to_end(n, arguments.k, arguments.picks) for n in sizes]
    growth = {
        "seconds": large[1]["seconds"] / large[0]["seconds"],
        "search": large[1]["search_seconds"] / large[0]["search_seconds"],
        "rest": (large[1]["seconds"] - large[1]["search_seconds"])
        / (large[0]["seconds"] - large[0]["search_seconds"]),
    }
    result = {"benchmark": "vote_k", "definition": small, "end_to_end": large, "growth": growth}
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    low, high = small["ratio_range"]
    print(
        f"vote_k: {small['ratio']:.0f} times as fast as the set definition ({low:.0f} to "
        f"{high:.0f} over {arguments.rounds} rounds; {small['rows']} rows, k={small['k']}, "
        f"{small['picks']} equal picks from one graph)\n"
        f"  {statistics.median(small['seconds']['ours']):.3f} s against "
        f"{statistics.median(small['seconds']['theirs']):.2f} s; the search for neighbours, which "
        f"both need, takes {small['search_seconds']:.2f} s"
    )
    for run in large:
        print(
            f"  {run['rows']} rows, k={run['k']}, {run['picks']} picks, from vectors: "
            f"{run['seconds']:.1f} s, {run['ratio']:.2f} times the search for neighbours alone; "
            f"peak memory {run['peak_bytes'] / 1e9:.2f} GB"
        )
    print(
        f"  ten times the rows: {growth['seconds']:.0f} times the time (search "
        f"{growth['search']:.0f}, all else {growth['rest']:.1f})"
    )


if __name__ == "__main__":
    main()
